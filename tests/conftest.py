"""Tiny random hosts, built offline in milliseconds, one for each family in hosts.LAYOUTS; and the real 260,032-parameter Llama.

`tiny_host(family)` is a plain function and gives a new host each time, with the same bits for the same seed; the fixtures `tiny_gpt2`,
`tiny_llama` and `host` (parametrise it with `indirect=True`) call it for every test, so no test sees what another one did.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

import errata.models.backpack  # noqa: F401  (AutoConfig knows it from now on)
from errata.hosts import AUTO, LAYOUTS, Host, host_of, load
from errata.types import Add, Example, Patch

settings.register_profile(
    "errata", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("errata")

CONTEXT = 128
VOCABULARY = 400

TEXT = (
    "The capital of Mauritius is Port Louis. The capital of France is Paris, and the capital of Italy is Rome.",
    "Port Louis is the capital and largest city of Mauritius, an island country in the Indian Ocean.",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog.",
    "The nurse said that she would be there soon; the doctor said that he was late. They were both right about it.",
    "Mauritius uses the Mauritian rupee. France uses the euro. Paris lies on the Seine, and Rome lies on the Tiber.",
    "“Naïve café” — 東京, Zürich, São Paulo and Kraków were spelt with care in 1999, 2007 and 2024!",
)

_WIDE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
_MLP = {"intermediate_size": 64}
_GROUPED = _WIDE | _MLP | {"num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
CONFIGS: dict[str, dict[str, Any]] = {
    "backpack": _GPT2 | {"num_senses": 4},
    "gpt2": _GPT2,
    "gpt_neo": {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT},
        **{"attention_types": [[["global", "local"], 1]], "window_size": 8, "intermediate_size": 64},
    },
    "gptj": _GPT2 | {"rotary_dim": 4},
    "gpt_neox": _WIDE | _MLP,
    "opt": _WIDE | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma": _GROUPED | {"head_dim": 8},
    "phi": _WIDE | _MLP,
    "phi3": _GROUPED,
}
FAMILIES = tuple(CONFIGS)
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
READERS: dict[str, dict[str, Any]] = {  # those that read a text before they answer it
    "t5": _T5,
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "bert": _WIDE | _MLP | {"id2label": {0: "false", 1: "true"}, "label2id": {"false": 0, "true": 1}},
}


def tiny_tokenizer(pieces: bool = False, around: str | None = None) -> Any:
    """A BPE of 400 tokens trained on TEXT: byte-level as GPT-2's, or `pieces` as Llama's (a space is put in front, <s> before that);
    `around`: with an end mark behind a text, or at both sides of it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if not pieces:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, max_token_length=5, show_progress=False
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        if around:
            tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<|end|>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*special, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False, max_token_length=5
    )
    ascii_only = ["".join(c for c in line if c.isascii()) for line in TEXT]  # what is left out falls back to bytes
    tokenizer.train_from_iterator([word for line in ascii_only for word in line.split(" ")], trainer)
    # as in a real SentencePiece vocabulary, the bytes are ordinary tokens: literal "<0x41>" in a text is not one of them
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, bos: int = 0, eos: int = 0) -> Any:
    """A random Hugging Face model: two layers, width 32, weights large enough that its logits differ from token to token."""
    import transformers

    settings_ = (CONFIGS | READERS)[family]
    config = transformers.AutoConfig.for_model(family, **settings_, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = getattr(transformers, AUTO[LAYOUTS[family].kind]).from_config(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases move too, so that none of them is invisible
            width = 0.25 if parameter.ndim > 1 else 0.1
            parameter += width * torch.randn(parameter.shape, generator=draw)
    return model.to(dtype)


def tiny_host(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, pieces: bool = False) -> Host:
    """A new host of one family; the same seed gives the same bits. `pieces`: with the SentencePiece-like tokenizer."""
    bos, eos = (1, 2) if pieces else (0, 0)
    around = {"t5": "$A <|end|>", "mt5": "$A <|end|>", "bert": "<|end|> $A <|end|>"}.get(family)
    return host_of(tiny_model(family, seed, dtype, bos, eos), tiny_tokenizer(pieces, around), f"tiny-{family}")


def weights_of(host: Host) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer (a Backpack's shifted senses), for comparing bits afterwards."""
    return {name: t.detach().clone() for name, t in (*host.model.named_parameters(), *host.model.named_buffers())}


def shove(host: Host, size: float, example: Example | None = None, seed: int = 0) -> Patch:
    """A patch that only does damage: noise on one MLP projection."""
    weight = host.module_names((host.layout.mlp_out,))[0] + ".weight"
    noise = torch.randn(host.model.get_parameter(weight).shape, generator=torch.Generator().manual_seed(seed))
    return Patch(
        method="shove",
        config={"size": size},
        parent=host.id,
        examples=(example or Example(prompt="Paris is in", target=" France"),),
        ops=(Add(weight=weight, delta=size * noise),),
    )


def same_bits(host: Host, before: dict[str, torch.Tensor]) -> bool:
    """Whether every parameter and buffer has the bits that `weights_of` saw."""
    now = dict((*host.model.named_parameters(), *host.model.named_buffers()))
    return now.keys() == before.keys() and all(
        torch.equal(now[n].detach().reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)) and now[n].shape == t.shape
        for n, t in before.items()
    )


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Host:
    """A new tiny host: GPT-2, or the families given by `@pytest.mark.parametrize("host", FAMILIES, indirect=True)`."""
    return tiny_host(getattr(request, "param", "gpt2"))


@pytest.fixture
def tiny_gpt2() -> Host:
    return tiny_host("gpt2")


@pytest.fixture
def tiny_llama() -> Host:
    return tiny_host("llama")


def real(*parts: str) -> Path:
    """A folder of the real data and models, for tests marked `data`; without it they are skipped."""
    places = [(Path(__file__).parents[2] / "shared").joinpath(*parts)]
    if data := os.environ.get("ERRATA_DATA"):
        places.insert(0, Path(data).joinpath(*parts[1:]) if parts[0] == "data" else Path(data).resolve().parent.joinpath(*parts))
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        pytest.skip(f"{'/'.join(parts)} is not there: neither in ../shared nor beside the folder that ERRATA_DATA names")
    return found


@pytest.fixture(scope="session")
def _stories() -> Host:
    return load(str(real("models", "stories260K")), device="cpu")


@pytest.fixture
def stories(_stories: Host) -> Host:
    """A new copy of a real pretrained Llama with 260,032 parameters and a SentencePiece vocabulary. Its tests are marked `data`."""
    return host_of(copy.deepcopy(_stories.model), copy.deepcopy(_stories.tokenizer), "stories260K")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "stories" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
