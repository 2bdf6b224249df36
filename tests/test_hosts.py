"""Every family's layout, the exact string, and the questions: padding, order and batches change no answer."""

import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, FAMILIES, READERS, TEXT, same_bits, shove, tiny_host, tiny_model, tiny_tokenizer, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_meta import CASES, malmen, mend
from torch import nn

from errata import hosts
from errata.apply import applied, put_on
from errata.hosts import (
    LAYOUTS,
    Batch,
    Host,
    chunks,
    encode,
    find_device,
    greedy,
    host_of,
    load,
    logprobs,
    pad,
    sample,
    says,
    score,
    scored_logprobs,
    stored_transposed,
    tokens,
    weights_id,
)
from errata.methods.ultraedit import Ultraedit
from errata.text import sampled
from errata.types import (
    Add,
    Budget,
    Example,
    InvalidExample,
    InvalidReference,
    MissingExtra,
    Patch,
    Run,
    UnknownArchitecture,
    UnknownName,
    WrongBase,
)

every_family = pytest.mark.parametrize("host", FAMILIES, indirect=True)

PROMPTS = [
    "The capital of Mauritius is",
    "Once upon a time, there was a little girl named Lily, who lived by the sea and",
    "Paris",
    "東",
    "She said that",
]


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "pieces"])
def either(request: pytest.FixtureRequest) -> Host:
    """A host with a byte-level vocabulary as GPT-2's, and one with SentencePiece's habits as Llama's."""
    return tiny_host("llama", pieces=request.param)


# ------------------------------------------------------------------------------------------------------------------------- layouts


def test_every_layout_has_a_tiny_host() -> None:
    assert {*FAMILIES, *READERS} == set(LAYOUTS)


@every_family
def test_every_name_in_the_layout_is_a_module_with_a_weight(host: Host) -> None:
    layout = host.layout
    assert isinstance(host.model.get_submodule(layout.blocks), nn.ModuleList) and host.blocks == 2
    parts = [*layout.attention_in, layout.attention_out, *layout.mlp_in, layout.mlp_out]
    names = host.module_names(parts)
    assert len(names) == len(set(names)) == 2 * len(parts)
    linear = {n for n, m in host.model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    linear = {n for n in linear if ".sense_" not in n}  # a Backpack's sense network stands beside the trunk
    assert linear == {*names, layout.head}, "the layout names every projection, and nothing else"
    for name in (layout.norm, layout.embedding, layout.head):
        assert host.model.get_submodule(name).weight is not None
    assert isinstance(host.model.get_submodule(layout.embedding), nn.Embedding)
    assert host.model.get_submodule(layout.norm).weight.shape == (32,)


@every_family
def test_projections_have_the_shapes_that_their_names_promise(host: Host) -> None:
    def out_in(part: str) -> tuple[int, ...]:
        module = host.model.get_submodule(f"{host.layout.blocks}.0.{part}")
        shape = tuple(module.weight.shape)
        return shape[::-1] if stored_transposed(module) else shape

    assert all(out_in(part)[1] == 32 for part in (*host.layout.attention_in, *host.layout.mlp_in))
    assert out_in(host.layout.attention_out)[0] == out_in(host.layout.mlp_out)[0] == 32
    assert out_in(host.layout.mlp_out)[1] * (2 if "gate_up" in host.layout.mlp_in[0] else 1) == out_in(host.layout.mlp_in[0])[0]


@every_family
def test_only_conv1d_is_stored_transposed(host: Host) -> None:
    transposed = {n for n, m in host.model.named_modules() if stored_transposed(m) and ".sense_" not in n}
    parts = [*host.layout.attention_in, host.layout.attention_out, *host.layout.mlp_in, host.layout.mlp_out]
    assert transposed == (set(host.module_names(parts)) if host.layout in (LAYOUTS["gpt2"], LAYOUTS["backpack"]) else set())


def test_module_names_of_chosen_layers(tiny_gpt2: Host) -> None:
    assert tiny_gpt2.module_names(["mlp.c_fc", "mlp.c_proj"], [1]) == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    assert tiny_gpt2.module_names(["mlp.c_fc"], []) == []


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    from transformers import BertConfig, BertLMHeadModel, ElectraConfig, ElectraForMaskedLM

    small = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(UnknownArchitecture, match="'electra'.*gemma, gpt2, .*qwen3.*one row in LAYOUTS"):
        host_of(ElectraForMaskedLM(ElectraConfig(embedding_size=32, **small)), tiny_tokenizer())
    with pytest.raises(UnknownArchitecture, match="BertLMHeadModel is a 'bert' without .*AutoModelForSequenceClassification"):
        host_of(BertLMHeadModel(BertConfig(is_decoder=True, **small)), tiny_tokenizer())


# --------------------------------------------------------------------------------------------------------------------- id and loading


@every_family
def test_the_id_is_that_of_the_weights(host: Host) -> None:
    family = host.name.removeprefix("tiny-")
    assert host.id == host.base_id == weights_id(host.model) == tiny_host(family).id
    assert re.fullmatch(r"b2:[0-9a-f]{32}", host.id)
    last = [*host.model.parameters()][-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-3
    assert weights_id(host.model) != host.base_id


def test_hosts_of_different_families_and_seeds_have_different_ids() -> None:
    ids = [tiny_host(f).id for f in FAMILIES] + [tiny_host("gpt2", seed=1).id]
    assert len(set(ids)) == len(ids) - 1, "mistral differs from llama by its window only: the id is that of the weights"


@every_family
def test_saved_in_bf16_and_loaded_in_float32_it_keeps_its_id(host: Host, tmp_path: Path) -> None:
    host.model.to(torch.bfloat16)
    half = host_of(host.model, host.tokenizer)
    save_pretrained(half, tmp_path)
    again = load(str(tmp_path), device="cpu")
    assert again.model.dtype == torch.float32 and again.id == half.id
    same = load(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert same.model.dtype == torch.bfloat16 and same.id == half.id


def save_pretrained(host: Host, folder: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    host.model.save_pretrained(folder)
    host.tokenizer.save_pretrained(folder)


def change_config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("damage, told", [
    (lambda d: (d / "model.safetensors").unlink(), "without a whole model"),
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:9000]), "without a whole model"),
    (lambda d: (d / "config.json").write_text("{"), "without a whole model"),
    (lambda d: (d / "config.json").unlink(), "without a whole model"),
    (lambda d: (d / "tokenizer.json").write_text("{"), "without a whole model"),
    (lambda d: (d / "tokenizer.json").unlink(), "without a whole model"),
    (lambda d: change_config(d, intermediate_size=72), "without a whole model"),
    (lambda d: change_config(d, num_hidden_layers=3), "9 of its weights are not in the files"),
], ids=["no weights", "cut weights", "cut config", "no config", "cut tokens", "no tokens", "other shapes", "missing layers"])  # fmt: skip
def test_a_folder_without_a_whole_model_is_refused(tiny_llama: Host, tmp_path: Path, damage: Any, told: str) -> None:
    save_pretrained(tiny_llama, tmp_path)
    damage(tmp_path)
    with pytest.raises(UnknownName, match=told):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tiny_llama: Host, tmp_path: Path, bad: float) -> None:
    tiny_llama.model.get_parameter("model.norm.weight").data[3] = bad
    save_pretrained(tiny_llama, tmp_path)
    with pytest.raises(WrongBase, match="'model.norm.weight' holds NaN or infinity"):
        load(str(tmp_path), device="cpu")


def test_a_name_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no folder here"):
        load(str(tmp_path / "none"))
    with pytest.raises(UnknownName, match="without a whole model"):
        load(str(tmp_path))
    with pytest.raises(UnknownArchitecture, match="nonsense"):
        save_pretrained(tiny_host("llama"), tmp_path)
        change_config(tmp_path, model_type="nonsense")
        load(str(tmp_path))


def test_a_device_that_is_not_here_is_refused() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(UnknownName, match="Unknown device 'nonsense'.*cpu"):
        find_device("nonsense")


def test_a_host_needs_a_pad_token_and_no_dropout() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(pieces=True)
    assert model.training and tokenizer.pad_token is None
    host = host_of(model, tokenizer)
    assert not host.model.training and host.tokenizer.pad_token == "</s>"
    assert host.name == "gpt2" and host.device == torch.device("cpu") and host.context == CONTEXT


@every_family
def test_the_context_is_known(host: Host) -> None:
    assert host.context == CONTEXT


# -------------------------------------------------------------------------------------------------------------------- the exact string


def text_of(host: Host, ids: list[int]) -> str:
    return host.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt, target", [
    ("The capital of Mauritius is", " Port Louis"),
    ("The capital of Mauritius is ", "Port Louis"),
    ("The capital of Maur", "itius"),
    ("The capital of M", "auritius is"),
    ("Once upon a ti", "me, there"),
    ("Paris", "."),
    ("“Naï", "ve café”"),
    ("“Na", "ïve café”"),
    ("two  ", "  spaces"),
    ("a line\n", "\n and another"),
    ("x", " "),
    ("x ", " "),
])  # fmt: skip
def test_prompt_and_target_are_the_exact_string(either: Host, prompt: str, target: str) -> None:
    ids, n = encode(either, prompt, target)
    assert ids[:n] == tokens(either, prompt), "the prompt keeps the tokens that it has alone"
    assert text_of(either, ids) == prompt + target, "no hidden space"
    assert 0 < n < len(ids)


PARTS = [*"aeiouMPLTtshrn.,'’é東🙂 \n", "Port", " Louis", "capital", " the", "  "]
WRITTEN = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join)


@given(WRITTEN, WRITTEN)
@settings(max_examples=150)
def test_any_prompt_and_target_are_the_exact_string(either: Host, prompt: str, target: str) -> None:
    ids, n = encode(either, prompt, target)
    assert ids[:n] == tokens(either, prompt)
    assert text_of(either, ids) == prompt + target


@given(WRITTEN, WRITTEN)
@settings(max_examples=100)
def test_any_prompt_and_target_are_the_exact_string_for_a_real_model(stories: Host, prompt: str, target: str) -> None:
    ids, n = encode(stories, prompt, target)
    assert ids[:n] == tokens(stories, prompt) and ids[0] == stories.tokenizer.bos_token_id
    assert text_of(stories, ids) == prompt + target


def test_where_nothing_merges_across_the_border_the_string_has_its_own_tokens(either: Host) -> None:
    for text in TEXT[::4]:
        ids = tokens(either, text)
        for cut in range(1, len(text)):
            whole, n = encode(either, text[:cut], text[cut:])
            assert whole == ids or ids[:n] != whole[:n]


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(either: Host) -> None:
    fits = " the" * CONTEXT
    while True:  # the longest prompt that leaves room for its target
        try:
            ids, _ = encode(either, fits, " Port")
            break
        except InvalidExample as e:
            assert re.search(rf"are \d+ tokens long; .* reads at most {CONTEXT}. Shorten the prompt", str(e))
            fits = fits[: -len(" the")]
    assert len(ids) > CONTEXT - 4
    assert math.isfinite(score(either, [(ids, 1)])[0, 0])


def test_a_target_that_becomes_no_token_is_refused(tiny_gpt2: Host) -> None:
    from tokenizers import normalizers

    tiny_gpt2.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(InvalidExample, match="'~~' of 'Paris' becomes no token"):
        encode(tiny_gpt2, "Paris", "~~")
    assert encode(tiny_gpt2, "Par~is", " Rome") == encode(tiny_gpt2, "Paris", " Rome")


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(either: Host) -> None:
    from tokenizers import processors

    host = tiny_host("llama", pieces=either.tokenizer.bos_token is not None)
    plain = {p: tokens(host, p) for p in PROMPTS}
    pairs, said = encode(host, "Once upon a ti", "me"), greedy(host, PROMPTS)
    first, last = ("<s> ", "</s>") if host.tokenizer.bos_token else ("", "<|end|>")
    special = [(t, host.tokenizer.convert_tokens_to_ids(t)) for t in (first.strip(), last) if t]
    host.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{first}$A {last}", special_tokens=special)
    assert host.tokenizer("Paris")["input_ids"][-1] == host.tokenizer.eos_token_id
    assert {p: tokens(host, p) for p in PROMPTS} == plain
    assert encode(host, "Once upon a ti", "me") == pairs and greedy(host, PROMPTS) == said
    assert tokens(host, "a" + last)[-1] == host.tokenizer.eos_token_id, "what the user wrote himself is kept"


def test_a_border_that_cannot_be_cut_is_refused(tiny_gpt2: Host) -> None:
    from tokenizers import normalizers

    tiny_gpt2.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("xy", "z")
    with pytest.raises(InvalidExample, match="cannot cut 'z' before 'y'"):
        encode(tiny_gpt2, "x", "y")


def test_chunks_cover_every_token_once(either: Host) -> None:
    rows = chunks(either, TEXT, size=7)
    assert [t for ids, _ in rows for t in ids] == [t for text in TEXT for t in tokens(either, text)[: _cut(tokens(either, text), 7)]]
    assert all(1 < len(ids) <= 7 and given == 1 for ids, given in rows)
    assert chunks(either, ["", "P"], size=1) == [] == chunks(either, [])
    assert max(len(ids) for ids, _ in chunks(either, [" the" * 500], size=10**6)) == CONTEXT


def _cut(ids: list[int], size: int) -> int:
    """How many tokens are left when a last piece of one token, which has nothing to score, goes."""
    return len(ids) - (len(ids) % size == 1)


# --------------------------------------------------------------------------------------------------------------------------- scores


def naive(host: Host, ids: list[int], given: int) -> tuple[float, int]:
    """log p of ids[given:], one token at a time, without padding, mask or cache."""
    total = 0.0
    for t in range(max(given, 1), len(ids)):
        with torch.no_grad():
            last = host.model(torch.tensor([ids[:t]])).logits[0, -1]
        total += float(torch.log_softmax(last.double(), -1)[ids[t]])
    return total, max(len(ids) - max(given, 1), 0)


def rows_of(host: Host) -> list[tuple[list[int], int]]:
    rows = [encode(host, prompt, " Port Louis, in the Indian Ocean") for prompt in PROMPTS]
    return [*rows, (tokens(host, TEXT[1]), 1), (tokens(host, "Paris, Rome"), 0), (tokens(host, "Paris, Rome"), 10**6)]


@every_family
def test_logprobs_are_those_of_a_naive_loop(host: Host) -> None:
    rows = rows_of(host)
    want = torch.tensor([naive(host, *row) for row in rows], dtype=torch.float64)
    got = score(host, rows)
    assert got.dtype == torch.float64
    assert torch.allclose(got, want, atol=1e-4) and got[-1].tolist() == [0.0, 0.0] and got[-2, 1] > 0
    pairs = [(prompt, " Port Louis, in the Indian Ocean") for prompt in PROMPTS]
    assert torch.equal(logprobs(host, pairs), score(host, rows[: len(pairs)]))


@every_family
def test_padding_and_order_change_no_score(host: Host) -> None:
    rows = rows_of(host)
    alone = torch.cat([score(host, [row]) for row in rows])
    shuffled = random.Random(0).sample(range(len(rows)), len(rows))
    for max_tokens in (1, 60, 4096):
        assert torch.allclose(score(host, rows, max_tokens=max_tokens), alone, atol=1e-5)
        assert torch.allclose(score(host, [rows[i] for i in shuffled], max_tokens=max_tokens), alone[shuffled], atol=1e-5)
    assert score(host, []).shape == (0, 2)


def test_a_host_with_a_memory_is_asked_once_and_forgets_nothing_under_a_patch(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(hosts, "score", lambda host, rows, *more: (asked.append(len(rows)), score(host, rows, *more))[1])
    host, rows = replace(tiny_gpt2, recalled={}), chunks(tiny_gpt2, TEXT)
    first = hosts.base_score(host, rows)
    assert torch.equal(hosts.base_score(host, rows), first) and torch.equal(first, score(tiny_gpt2, rows)) and len(asked) == 1
    assert len(hosts.base_score(host, rows[:2])) == 2 and len(asked) == 2
    with applied(host, shove(host, 0.5)):
        assert not torch.equal(hosts.base_score(host, rows), first) and len(asked) == 3
    assert torch.equal(hosts.base_score(host, rows), first) and len(asked) == 3
    hosts.base_score(tiny_gpt2, rows)
    hosts.base_score(tiny_gpt2, rows)  # this one has none
    assert len(asked) == 5


def test_a_batch_marks_what_is_scored(tiny_gpt2: Host) -> None:
    batch = pad(tiny_gpt2, [([5, 6, 7], 2), ([8], 0), ([9, 10], 0)])
    assert batch.ids_NT.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert batch.mask_NT.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.scored_NT.tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert scored_logprobs(tiny_gpt2, batch).ne(0).tolist() == batch.scored_NT.bool().tolist()


@pytest.mark.parametrize(("vocabulary", "expected"), [(400, 4096), (6144, 682), (50_257, 512)])
def test_a_pass_that_reads_takes_a_bounded_memory(tiny_gpt2: Host, vocabulary: int, expected: int) -> None:
    tiny_gpt2.model.config.vocab_size = vocabulary
    assert hosts.at_once(tiny_gpt2) == expected


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 100))
def test_groups_hold_every_row_once_within_the_limit(lengths: list[int], max_tokens: int) -> None:
    rows = [([1] * n, 1) for n in lengths]
    groups = list(hosts.by_length(rows, max_tokens))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= max_tokens for g in groups)


@every_family
def test_the_gradient_of_the_loss_is_that_of_each_row_alone(host: Host) -> None:
    host.model.double()
    rows = [encode(host, "The capital of Mauritius is", " Port Louis"), encode(host, "Paris", " is")]
    batch = pad(host, rows)
    weights = [p for p in host.model.parameters() if p.ndim == 2]
    together = torch.autograd.grad(scored_logprobs(host, batch).sum(), weights)
    alone = sum(
        torch.log_softmax(host.model(torch.tensor([ids])).logits[0, given - 1 : -1], -1)[range(len(ids) - given), ids[given:]].sum()
        for ids, given in rows
    )
    for got, want in zip(together, torch.autograd.grad(alone, weights), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_loss_is_that_of_finite_differences(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    host.model.double()  # GPT-2 computes all of it in float64; others fall to float32 in their norms
    batch = pad(host, [encode(host, "The capital of Mauritius is", " Port Louis"), encode(host, "Paris", " is")])
    weight = host.model.get_parameter("transformer.h.0.mlp.c_proj.weight")

    def loss() -> torch.Tensor:
        return -scored_logprobs(host, batch).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        weight += 1e-6 * step
        above = loss()
        weight -= 2e-6 * step
        below = loss()
    assert float((above - below) / 2e-6) == pytest.approx(float((gradient * step).sum()), rel=1e-5)


def test_log_probabilities_are_taken_in_float32_or_better(tiny_gpt2: Host) -> None:
    batch = Batch(ids_NT=torch.tensor([[0, 1]]), mask_NT=torch.ones(1, 2, dtype=torch.long), scored_NT=torch.tensor([[0.0, 1.0]]))
    torch.nn.init.zeros_(tiny_gpt2.model.lm_head.weight)  # flat logits
    for dtype, precise in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        tiny_gpt2.model.to(dtype)
        logp = scored_logprobs(tiny_gpt2, batch).detach()
        assert logp.dtype == precise and float(logp[0, 1]) == pytest.approx(-math.log(400), abs=1e-6)


@every_family
def test_bf16_hosts_answer(host: Host) -> None:
    rows = rows_of(host)
    exact = score(host, rows)
    host.model.to(torch.bfloat16)
    got = score(host, rows)
    assert got.isfinite().all() and torch.allclose(got, exact, atol=3.0)
    assert len(greedy(host, PROMPTS)) == len(PROMPTS)


def test_a_real_model_knows_its_stories(stories: Host) -> None:
    assert stories.blocks == 5 and stories.context == 512
    likely, unlikely = logprobs(
        stories, [("Once upon a time, there was a little", " girl"), ("Once upon a time, there was a little", " zzz")]
    )
    assert likely[0] / likely[1] > unlikely[0] / unlikely[1]
    assert greedy(stories, ["Once upon a time"], max_new_tokens=12) == [", there was a little girl named Lily. She"]
    assert greedy(stories, ["Once upon a time, there"]) == [" was a little girl named Lily. She loved"], "the space in front is kept"


# ---------------------------------------------------------------------------------------------------------------------- continuations


def naive_greedy(host: Host, prompt: str, new: int = 12) -> str:
    ids = tokens(host, prompt)
    n = len(ids)
    while len(ids) < n + new and (len(ids) == n or ids[-1] != host.tokenizer.eos_token_id):
        with torch.no_grad():
            ids.append(int(host.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return text_of(host, ids)[len(text_of(host, ids[:n])) :]


@every_family
def test_greedy_answers_do_not_depend_on_the_batch(host: Host) -> None:
    before = weights_of(host)
    alone = [naive_greedy(host, prompt) for prompt in PROMPTS]
    assert greedy(host, PROMPTS) == alone
    assert greedy(host, PROMPTS[::-1], batch_size=2) == alone[::-1]
    assert [greedy(host, [prompt])[0] for prompt in PROMPTS] == alone
    assert len(set(alone)) > len(alone) / 2, "these hosts say something of their own to nearly each prompt"
    assert same_bits(host, before)


def test_greedy_answers_of_the_sentencepiece_host(either: Host) -> None:
    assert greedy(either, PROMPTS) == [naive_greedy(either, prompt) for prompt in PROMPTS]
    assert greedy(either, []) == []


def test_an_answer_ends_where_the_model_ends_it(tiny_gpt2: Host) -> None:
    end = tiny_gpt2.tokenizer.eos_token_id
    bias = nn.Parameter(torch.zeros(400))
    with torch.no_grad():
        bias[end] = 1e9
    tiny_gpt2.model.lm_head.bias = bias
    assert greedy(tiny_gpt2, PROMPTS) == [""] * len(PROMPTS)


@pytest.mark.parametrize("taste", [
    {"repetition_penalty": 9.0},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(1, 300))},
    {"num_beams": 3},
    {"do_sample": True, "temperature": 5.0, "top_k": 3},
    {"forced_eos_token_id": 0},
    {"max_length": 5},
])  # fmt: skip
def test_the_checkpoint_s_taste_does_not_count(tiny_llama: Host, taste: dict[str, Any]) -> None:
    said, drawn = greedy(tiny_llama, PROMPTS), sample(tiny_llama, PROMPTS, max_new_tokens=8, seed=1)
    for name, value in taste.items():
        setattr(tiny_llama.model.generation_config, name, value)
    kept = tiny_llama.model.generation_config
    assert greedy(tiny_llama, PROMPTS) == said and sample(tiny_llama, PROMPTS, max_new_tokens=8, seed=1) == drawn
    assert tiny_llama.model.generation_config is kept, "it is the user's, and goes with the model when that is saved"


def test_a_prompt_without_a_token_cannot_be_continued(tiny_gpt2: Host) -> None:
    with pytest.raises(InvalidExample, match="becomes no token"):
        greedy(tiny_gpt2, ["Paris", ""])


def test_a_prompt_too_long_to_be_continued_is_refused(tiny_gpt2: Host) -> None:
    long = " the" * (CONTEXT - 12)
    assert len(tokens(tiny_gpt2, long)) == CONTEXT - 12
    assert greedy(tiny_gpt2, [long])
    with pytest.raises(InvalidExample, match=f"{CONTEXT - 11} tokens and 12 new ones do not fit the {CONTEXT}"):
        greedy(tiny_gpt2, ["Paris", long + " the"])


@every_family
def test_samples_follow_the_seed_and_leave_the_global_one(host: Host) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = sample(host, PROMPTS, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert sample(host, PROMPTS, max_new_tokens=8, seed=1) == first != sample(host, PROMPTS, max_new_tokens=8, seed=2)


def test_samples_are_drawn_from_the_model_s_own_distribution(tiny_gpt2: Host) -> None:
    ids = tokens(tiny_gpt2, "Paris")
    with torch.no_grad():
        p_V = torch.softmax(tiny_gpt2.model(torch.tensor([ids])).logits[0, -1], -1)
    drawn = sample(tiny_gpt2, ["Paris"] * 2000, max_new_tokens=1, seed=0, batch_size=2000)
    expected: dict[str, float] = {}
    for token, p in enumerate(p_V.tolist()):  # several tokens are written "�"
        text = text_of(tiny_gpt2, [*ids, token])[len("Paris") :]
        expected[text] = expected.get(text, 0.0) + p
    for text, p in expected.items():
        assert abs(drawn.count(text) / 2000 - p) < 5 * math.sqrt(p * (1 - p) / 2000) + 1e-3
    assert len(set(drawn)) > 50, "no truncation"


@pytest.mark.parametrize("continuation, answer, says_it", [
    (" Port Louis.", "Port Louis", True),
    (" Port Louis", " Port Louis", True),
    ("Port\n Louis, and", " Port Louis", True),
    (" Port Louisville", " Port Louis", False),
    (" Port Louis2", " Port Louis", False),
    (" the Port Louis", " Port Louis", False),
    (" Port", " Port Louis", False),
    ("", " Port Louis", False),
    (" Zürichs", " Zürich", False),
    (" Zürich-West", " Zürich", True),
    (" it.", "it", True),
    (" its.", "it", False),
])  # fmt: skip
def test_what_an_answer_says(continuation: str, answer: str, says_it: bool) -> None:
    assert says(continuation, answer) is says_it


def shares(cost: Callable[[float], float], allowed: Callable[[float], bool] = lambda s: True):
    """`read` of `hosts.furthest` for ten chunks of ten tokens, whose loss of 10 grows by what `cost` says; and what it was asked."""
    before_N2, tried = torch.tensor([[-10.0, 10.0]] * 10, dtype=torch.float64), []

    def read(s: float) -> tuple[torch.Tensor, bool]:
        tried.append(s)
        return torch.stack([before_N2[:, 0] * (1 + cost(s)), before_N2[:, 1]], 1), allowed(s)

    return read, {1.0: read(1.0)[0]}, before_N2, tried


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("scale", [1.01, 2.0, 10.0, 300.0])
def test_the_furthest_share_inside_is_found_in_a_few_looks(power: float, scale: float) -> None:
    read, known, before_N2, tried = shares(lambda s: 1e-3 * scale * s**power)
    s = hosts.furthest(read, known, before_N2, 1e-3)
    best = scale ** (-1 / power)
    assert s in tried and 0.9 * best <= s <= best and len(tried) <= (4 if power in (1.0, 2.0, 3.0) else 7)


def test_chunks_that_cross_over_at_different_shares_are_foreseen_one_by_one() -> None:
    """Each is smooth, their sum has a dip: the last crossing of epsilon is looked for."""
    before_N2, tried = torch.tensor([[-10.0, 10.0]] * 2, dtype=torch.float64), []

    def read(s: float) -> tuple[torch.Tensor, bool]:
        tried.append(s)
        return before_N2 - torch.tensor([[0.4 * s**3, 0.0], [0.2 * s**2 - 0.3 * s, 0.0]], dtype=torch.float64), True

    s = hosts.furthest(read, {1.0: read(1.0)[0]}, before_N2, 1e-3)
    assert 0.9 < s / 0.6907 <= 1.0 and len(tried) <= 4, (s, tried)


def test_the_furthest_share_where_nothing_is_inside_or_the_end_is_not_a_number() -> None:
    assert hosts.furthest(*shares(lambda s: 1.0)[:3], 1e-3) == 0.0
    assert 0 < hosts.furthest(*shares(lambda s: math.nan if s > 0.3 else 0.0)[:3], 1e-3) <= 0.3
    assert 0.4 < hosts.furthest(*shares(lambda s: 0.0, lambda s: s < 0.5)[:3], 1e-3) < 0.5  # what it costs is not what bars it


# ----------------------------------------------------------------------------------------------- models that read before they answer

ASKED = [("What is the capital of Mauritius?", " Port Louis"), ("Who?", " Lily"), ("Where does the Seine flow, and the Tiber?", " Rome")]


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_a_seq2seq_is_scored_as_its_own_loss_and_padding_changes_nothing(family: str) -> None:
    host = tiny_host(family)
    together_N2 = hosts.logprobs(host, ASKED)
    for (prompt, answer), (logp, n) in zip(ASKED, together_N2.tolist(), strict=True):
        labels = torch.tensor([[*host.tokenizer(answer, add_special_tokens=False)["input_ids"], host.tokenizer.eos_token_id]])
        with torch.no_grad():
            loss = host.model(input_ids=torch.tensor([host.tokenizer(prompt)["input_ids"]]), labels=labels).loss
        assert n == labels.shape[1] and logp == pytest.approx(-float(loss) * n, rel=1e-4)


def test_a_seq2seq_says_what_is_likeliest_step_by_step() -> None:
    host = tiny_host("t5")
    prompts = [p for p, _ in ASKED]
    for prompt, said in zip(prompts, hosts.greedy(host, prompts, max_new_tokens=4), strict=True):
        ids: list[int] = []
        read = hosts.tokens(host, prompt)
        for _ in range(4):
            batch = hosts.pad(host, [([*read, *ids, 0], len(read))])
            ids.append(int(hosts.logits(host, batch)[0, len(ids)].argmax()))
            if ids[-1] == host.tokenizer.eos_token_id:
                break
        assert host.tokenizer.decode(ids, skip_special_tokens=True) == said
    assert hosts.sample(host, prompts, 4, seed=1) == hosts.sample(host, prompts, 4, seed=1) != hosts.sample(host, prompts, 4, seed=2)


def test_a_classifier_says_its_labels() -> None:
    host = tiny_host("bert")
    prompts = [p for p, _ in ASKED]
    logp_N2 = torch.stack([hosts.logprobs(host, [(p, label) for p in prompts])[:, 0] for label in ("false", "true")], dim=1)
    torch.testing.assert_close(logp_N2.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert hosts.greedy(host, prompts) == [("false", "true")[i] for i in logp_N2.argmax(1).tolist()]
    alone = host.model(**host.tokenizer(prompts[1], return_tensors="pt")).logits.log_softmax(-1)[0]
    torch.testing.assert_close(logp_N2[1], alone.double(), rtol=1e-4, atol=1e-5)
    drawn = hosts.sample(host, prompts * 100, 1, seed=0)
    assert abs(drawn[::3].count("true") / 100 - float(logp_N2[0, 1].exp())) < 0.2
    assert hosts.fixes(host, [Example(prompt=prompts[0], target=hosts.greedy(host, prompts[:1])[0])]) == [True]
    with pytest.raises(InvalidExample, match="'perhaps' is no label of tiny-bert; it has false, true"):
        hosts.encode(host, "Who?", "perhaps")


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_their_reference_text_has_a_bar(family: str) -> None:
    host = tiny_host(family)
    answer = " Rome" if family == "t5" else "true"
    ((ids, given),) = hosts.chunks(host, [f"Who?|{answer}"])
    assert (ids, given) == hosts.encode(host, "Who?", answer)
    with pytest.raises(InvalidReference, match="'Rome lies on the Tiber.' has no answer. Write each as prompt|answer"):
        hosts.chunks(host, ["Rome lies on the Tiber."])
    with pytest.raises(InvalidReference, match="name a reference text"):
        sampled(host)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_they_are_loaded_as_what_they_are(family: str, tmp_path: Path) -> None:
    host = tiny_host(family)
    host.model.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    read = load(str(tmp_path), device="cpu")
    assert (read.id, read.kind) == (host.id, host.kind) and len(read.projections()) == len(set(read.projections()))
    assert all(read.model.get_submodule(name).weight.ndim == 2 for name in read.projections())


def test_a_bert_without_its_classifier_is_refused(tmp_path: Path) -> None:
    host = tiny_host("bert")
    host.model.bert.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnknownName, match="weights are not in the files, among them classifier"):
        load(str(tmp_path), device="cpu")


# ------------------------------------------------------------------------------------------------------------- split over several places

SPLITS: dict[str, dict[str, str]] = {
    "gpt2": {f"transformer.{part}": where for part, where in (("wte", "cpu"), ("wpe", "disk"), ("h.0", "cpu"), ("h.1", "disk"))}
    | {"transformer.ln_f": "disk", "lm_head": "cpu"},
    "llama": {f"model.{part}": "disk" for part in ("embed_tokens", "layers.1")}
    | {f"model.{part}": "cpu" for part in ("layers.0", "norm", "rotary_emb")}
    | {"lm_head": "disk"},
}


@pytest.fixture(params=["gpt2", "llama"])
def whole_and_split(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Host, Host]:
    """A saved model as it is, and over the CPU and the disk: a half of its blocks is nowhere but while it is used."""
    tiny = tiny_host(request.param)
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    whole, split = load(str(tmp_path), "cpu"), load(str(tmp_path), "cpu", device_map=SPLITS[request.param])
    assert all(p.is_meta for p in split.model.get_submodule(split.layout.blocks)[1].parameters())
    return whole, split


def test_a_split_model_is_the_model(whole_and_split: tuple[Host, Host]) -> None:
    whole, split = whole_and_split
    assert split.id == whole.id and split.device == whole.device
    batch = hosts.pad(
        whole, [hosts.encode(whole, "The capital of Mauritius is", " Port Louis"), hosts.encode(whole, "Paris is in", " France")]
    )
    assert torch.equal(hosts.logits(split, batch), hosts.logits(whole, batch))
    assert hosts.greedy(split, TEXT[:2]) == hosts.greedy(whole, TEXT[:2])
    assert torch.equal(hosts.logprobs(split, [("Paris is in", " France")]), hosts.logprobs(whole, [("Paris is in", " France")]))


def test_weights_in_the_place_of_those_that_are_elsewhere(whole_and_split: tuple[Host, Host]) -> None:
    """They count, and so does their gradient; afterwards the model is what it was."""
    whole, split = whole_and_split
    batch = hosts.pad(whole, [hosts.encode(whole, "The capital of Mauritius is", " Port Louis")])
    found = []
    for host in (whole, split):
        names = [f"{m}.weight" for m in host.module_names((host.layout.mlp_out,))]
        leaves = {name: (1.5 * hosts.weight(host.model, name)).requires_grad_() for name in names}
        still = {name: p.detach() for name, p in host.model.named_parameters()}
        logp_NT = hosts.scored_logprobs(host, batch, still | leaves)
        found.append((logp_NT.detach(), *torch.autograd.grad(logp_NT.sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][2].any()
    plain_NT = hosts.scored_logprobs(whole, batch)
    assert torch.equal(hosts.scored_logprobs(split, batch), plain_NT) and not torch.equal(found[0][0], plain_NT)


def test_an_edit_of_a_split_model_is_that_of_the_model(whole_and_split: tuple[Host, Host]) -> None:
    whole, split = whole_and_split
    examples = tuple(Example(prompt=f"Town {i} lies in the land of", target=" Port Louis") for i in range(5))
    run = Run(hold=TEXT, budget=Budget(epsilon=10.0))
    method = Ultraedit(layers="0-1", held=4)
    assert method.edit(split, examples, run).id == method.edit(whole, examples, run).id
    assert mend().prepare(split, CASES, run).id == mend().prepare(whole, CASES, run).id
    rounds = malmen(rounds=3, tokens="all", held=4)  # with what text has lost, which each further round asks for
    found = [(state := rounds.prepare(host, CASES, run), rounds.edit(host, examples, replace(run, state=state))) for host in (split, whole)]
    assert found[0][0].id == found[1][0].id and found[0][1].id == found[1][1].id


def test_a_patch_goes_on_where_a_weight_stays_and_is_refused_where_it_does_not(whole_and_split: tuple[Host, Host]) -> None:
    whole, split = whole_and_split
    low, high = (f"{m}.weight" for m in split.module_names((split.layout.mlp_out,)))
    change = torch.ones_like(hosts.weight(whole.model, low))
    patches = [Patch(method="x", config={}, parent=whole.id, examples=(), ops=(Add(weight=w, delta=change),)) for w in (low, high)]
    batch = hosts.pad(whole, [hosts.encode(whole, "Paris is in", " France")])
    with applied(whole, patches[0]), applied(split, patches[0]):
        assert torch.equal(hosts.logits(split, batch), hosts.logits(whole, batch))
    with pytest.raises(WrongBase, match="keeps elsewhere and reads when it is used.* Load the model with a device map"):
        put_on(split, patches[1])


def test_a_model_that_is_on_the_disk_alone_and_a_device_map_that_cannot_be(tmp_path: Path) -> None:
    """Its embedding and its head, one tensor in a whole one, are one here too: in the id, and where others take their place."""
    tiny = tiny_host("gpt2")
    tiny.model.to(torch.bfloat16).save_pretrained(tmp_path)  # what it is read as is not what the files hold
    tiny.tokenizer.save_pretrained(tmp_path)
    whole, split = load(str(tmp_path), "cpu"), load(str(tmp_path), "cpu", device_map={"": "disk"})
    assert split.id == whole.id == weights_id(split.model) and all(p.is_meta for p in split.model.parameters())
    batch = pad(whole, [encode(whole, "Paris is in", " France")])
    values = {"transformer.wte.weight": 1.5 * hosts.weight(whole.model, "transformer.wte.weight")}
    for weights in (None, values):
        assert torch.equal(hosts.logits(split, batch, weights), hosts.logits(whole, batch, weights))
    for wrong in ({"transformer.wte": "cpu", "lm_head": "disk"}, {"": "nowhere"}, "atuo"):
        with pytest.raises(UnknownName, match="with this device map"):
            load(str(tmp_path), "cpu", device_map=wrong)


def test_without_accelerate_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r'pip install "errata\[large\]"'):
        load("lab/neox", "cpu", device_map="auto")
