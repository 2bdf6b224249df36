"""The Backpack against its formulas in loops, its gradients, padding, cache, checkpoints, and the table of overridden senses."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, tiny_host
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from errata.hosts import encode, greedy, load, score, weights_id
from errata.models.backpack import BackpackConfig, BackpackLMHeadModel, BackpackModel, CheckpointError
from errata.types import UnknownName

V, D, K, H, T, LAYERS = 60, 24, 4, 3, 9, 3  # as many heads as senses would hide a mix-up
SENSE_WEIGHT = "backpack.sense_network.final_mlp.c_proj.weight"
both_implementations = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


def tiny_config(**more: Any) -> BackpackConfig:
    sizes = {"vocab_size": V, "n_positions": 40, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_inner": 40}
    senses = {"num_senses": K, "sense_intermediate_scale": 2}
    return BackpackConfig(**sizes | senses | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | more)


def tiny(attention: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> BackpackLMHeadModel:
    """Random, with weights large enough that attention is far from flat; no norm and no bias is invisible."""
    model = BackpackLMHeadModel._from_config(tiny_config(**more), attn_implementation=attention)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter == 1) + 0.3 * torch.randn(parameter.shape, generator=draw))
    return model.to(dtype).eval()


def some_ids(rows: int = 2, columns: int = T, seed: int = 1) -> Tensor:
    return torch.randint(1, V, (rows, columns), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------- the formulas


def in_loops(model: BackpackLMHeadModel, ids: list[int], inverse_layer: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(T, V) logits, (K, T, T) alpha and (T, K, D) senses of one text, in float64, one number after another; nothing of ours is called."""
    W = {name.removeprefix("backpack."): t.double() for name, t in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        mean = sum(x.tolist()) / len(x)
        variance = sum((v - mean) ** 2 for v in x.tolist()) / len(x)
        return (x - mean) / math.sqrt(variance + 1e-5) * W[f"{name}.weight"] + W[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:  # weights are stored (in, out)
        return torch.stack([(x * W[f"{name}.weight"][:, o]).sum() for o in range(W[f"{name}.weight"].shape[1])]) + W[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return torch.tensor(
            [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()], dtype=torch.float64
        )

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(gelu(linear(x, f"{name}.c_fc")), f"{name}.c_proj")

    def weights(query: Tensor, keys: list[Tensor], divisor: float) -> list[float]:
        raised = [math.exp(float((query * key).sum()) / divisor) for key in keys]
        return [r / sum(raised) for r in raised]

    n = len(ids)
    senses = torch.zeros(n, K, D).double()
    for t in range(n):
        e = W["gpt2_model.wte.weight"][ids[t]]
        r = e + norm(e, "sense_network.ln")
        r = r + mlp(norm(r, "sense_network.block.ln_1"), "sense_network.block.mlp")
        out = mlp(norm(r, "sense_network.block.ln_2"), "sense_network.final_mlp")
        for k in range(K):
            senses[t, k] = out[k * D : (k + 1) * D]

    x = [W["gpt2_model.wte.weight"][ids[t]] + W["gpt2_model.wpe.weight"][t] for t in range(n)]
    width = D // H
    for layer in range(LAYERS):
        at = f"gpt2_model.h.{layer}"
        qkv = [linear(norm(x_t, f"{at}.ln_1"), f"{at}.attn.c_attn") for x_t in x]
        mixed = [torch.zeros(D).double() for _ in x]
        for head in range(H):
            part = slice(head * width, (head + 1) * width)
            keys, values = [p[D : 2 * D][part] for p in qkv], [p[2 * D :][part] for p in qkv]
            for t in range(n):
                a = weights(qkv[t][:D][part], keys[: t + 1], math.sqrt(width) * (layer + 1 if inverse_layer else 1))
                for j in range(t + 1):
                    mixed[t][part] += a[j] * values[j]
        x = [x_t + linear(m, f"{at}.attn.c_proj") for x_t, m in zip(x, mixed, strict=True)]
        x = [x_t + mlp(norm(x_t, f"{at}.ln_2"), f"{at}.mlp") for x_t in x]

    W_qk, b_qk = W["sense_weight_net.c_attn.weight"], W["sense_weight_net.c_attn.bias"]  # stored (out, in)
    qk = [W_qk @ norm(x_t, "gpt2_model.ln_f") + b_qk for x_t in x]
    alpha, o = torch.zeros(K, n, n).double(), torch.zeros(n, D).double()
    width = D // K
    for k in range(K):
        part = slice(k * width, (k + 1) * width)
        for t in range(n):
            for j, a in enumerate(weights(qk[t][:D][part], [p[D:][part] for p in qk][: t + 1], math.sqrt(width))):
                alpha[k, t, j] = a
                o[t] += a * senses[j, k]
    return o @ W["gpt2_model.wte.weight"].T, alpha, senses


@both_implementations
@pytest.mark.parametrize("inverse_layer", [True, False])
def test_it_is_the_formulas(attention: str, inverse_layer: bool) -> None:
    model, ids = tiny(attention, dtype=torch.float64, scale_attn_by_inverse_layer_idx=inverse_layer), some_ids()
    with torch.no_grad():
        logits, alpha, senses = model(ids).logits, model.alpha(ids), model.senses(ids)
    for n, row in enumerate(ids.tolist()):
        wanted = in_loops(model, row, inverse_layer)
        for got, want in zip((logits[n], alpha[n], senses[n]), wanted, strict=True):
            assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-10)
    if inverse_layer:
        assert (in_loops(model, ids[0].tolist(), False)[0] - logits[0]).abs().max() > 0.1, "the scale would be noticed"


def test_eager_and_sdpa_are_the_same() -> None:
    ids, mask = some_ids(3), torch.ones(3, T, dtype=torch.long)
    mask[1, :4] = mask[2, 6:] = 0
    for given in (None, mask):
        eager, sdpa = tiny("eager"), tiny("sdpa")
        assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
        with torch.no_grad():
            assert torch.allclose(eager(ids, given).logits, sdpa(ids, given).logits, rtol=1e-5, atol=1e-5)
            assert torch.allclose(eager.alpha(ids, given), sdpa.alpha(ids, given), rtol=0, atol=1e-5)


def test_alpha_is_a_causal_distribution_for_each_sense() -> None:
    alpha = tiny().alpha(some_ids())
    assert alpha.shape == (2, K, T, T) and (alpha >= 0).all()
    assert torch.allclose(alpha.sum(-1), torch.ones(2, K, T), rtol=0, atol=1e-6)
    assert (alpha.triu(1) == 0).all(), "exactly"
    assert (alpha[:, 0] - alpha[:, 1]).abs().max() > 0.1


@torch.no_grad()
def test_logits_are_the_head_of_the_weighted_sum_of_senses() -> None:
    model, ids = tiny(), some_ids()
    senses = model.senses(ids)
    out = sum(model.alpha(ids)[:, k] @ senses[:, :, k] for k in range(K))
    assert torch.allclose(model.lm_head(out), model(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model.backpack(ids).last_hidden_state, out, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model.senses(torch.arange(V))[ids], senses, atol=1e-5), "a sense knows no context"
    assert model.senses(torch.arange(V)).shape == (V, K, D) and model.senses(torch.tensor(3)).shape == (K, D)


def test_gradients_are_those_of_finite_differences() -> None:
    model, ids = tiny(dtype=torch.float64), some_ids()
    names = [SENSE_WEIGHT, "backpack.sense_weight_net.c_attn.weight", "backpack.gpt2_model.h.1.attn.c_attn.weight", "lm_head.weight"]

    def loss() -> Tensor:
        return -torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).sum()

    weights = [model.get_parameter(name) for name in names]
    for weight, gradient in zip(weights, torch.autograd.grad(loss(), weights), strict=True):
        at = tuple(int(i) for i in torch.nonzero(gradient.abs() == gradient.abs().max())[0])
        with torch.no_grad():
            weight[at] += 1e-5
            above = loss()
            weight[at] -= 2e-5
            below = loss()
            weight[at] += 1e-5
        assert float((above - below) / 2e-5) == pytest.approx(float(gradient[at]), rel=1e-6)


def test_labels_are_shifted_and_minus_100_does_not_count() -> None:
    model, ids = tiny(), some_ids()
    labels = ids.masked_fill(ids % 3 == 0, -100)
    assert (labels[:, 1:] == -100).any()
    logits = model(ids).logits.detach()
    total, count = torch.zeros(()), 0
    for n in range(len(ids)):
        for t in range(1, T):
            if labels[n, t] != -100:
                total, count = total - torch.log_softmax(logits[n, t - 1], -1)[labels[n, t]], count + 1
    assert model(ids, labels=labels).loss.item() == pytest.approx(float(total / count), rel=1e-5)
    assert model(ids).loss is None


def test_each_dropout_acts_in_training_only() -> None:
    ids, kinds = some_ids(), ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    for kind in kinds:
        for attention in ("eager", "sdpa"):
            model = tiny(attention, **{other: 0.0 for other in kinds if other != kind})
            assert torch.equal(model(ids).logits, model(ids).logits)
            assert not torch.equal(model.train()(ids).logits, model(ids).logits), kind


def test_it_learns() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids = BackpackLMHeadModel(tiny_config()).train(), some_ids()
        assert model(ids).past_key_values is None, "a cache would cost K * D numbers for each token"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(60):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(V), abs=0.1) and losses[-1] < 1.5, losses


def test_residual_projections_of_the_trunk_start_smaller() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BackpackLMHeadModel(tiny_config(n_embd=96, n_inner=None))
    for name, parameter in model.named_parameters():
        std = 0.02 / math.sqrt(2 * LAYERS) if ".h." in name and "c_proj.weight" in name else 0.02
        if parameter.ndim == 2:
            assert parameter.detach().std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("ln" in name and name.endswith("weight")))), name


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        model = BackpackLMHeadModel(BackpackConfig())
    assert sum(p.numel() for p in model.parameters()) == 170_083_584
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.backpack.named_children()}
    assert parts == {"gpt2_model": 124_051_968, "sense_network": 44_850_432, "sense_weight_net": 1_181_184, "overrides": 0}


@pytest.mark.parametrize("wrong", [{"num_senses": 5}, {"num_senses": 0}, {"n_head": 7}])
def test_a_width_that_cannot_be_divided_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"n_embd \(24\) must be a multiple of n"):
        tiny_config(**wrong)


@both_implementations
def test_bf16_runs(attention: str) -> None:
    exact, model, ids = tiny(attention), tiny(attention, dtype=torch.bfloat16), some_ids()
    with torch.no_grad():
        got = model(ids, labels=ids)
        assert got.logits.dtype == model.alpha(ids).dtype == model.senses(ids).dtype == torch.bfloat16
        assert (got.logits - exact(ids).logits).norm() < 0.05 * exact(ids).logits.norm() and got.loss.isfinite()
        assert torch.allclose(model.alpha(ids).float(), exact.alpha(ids), atol=0.05)
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape == (2, T + 3)


# --------------------------------------------------------------------------------------------------------------- padding and cache


def padded(rows: list[list[int]], side: str, width: int, filler: int = 0) -> tuple[Tensor, Tensor]:
    ids, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[n, where], mask[n, where] = torch.tensor(row), 1
    return ids, mask


ROWS = [[5, 9, 31, 7, 9, 2], [14], [8, 8, 17, 44, 6, 21, 59, 3, 30]]


@both_implementations
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 33])
def test_padding_changes_nothing(attention: str, side: str, filler: int) -> None:
    model = tiny(attention)
    ids, mask = padded(ROWS, side, 12, filler)
    with torch.no_grad():
        logits, alpha = model(ids, attention_mask=mask).logits, model.alpha(ids, mask)
        assert torch.allclose(model.alpha(ids, mask.bool()), alpha)
        for n, row in enumerate(ROWS):
            real, alone = mask[n].bool(), torch.tensor([row])
            assert torch.allclose(logits[n, real], model(alone).logits[0], rtol=1e-5, atol=1e-5)
            assert torch.allclose(alpha[n][:, real][:, :, real], model.alpha(alone)[0], rtol=0, atol=1e-5)
            assert (alpha[n][:, real][:, :, ~real] == 0).all(), "exactly"
    assert logits.isfinite().all() and torch.allclose(alpha.sum(-1), torch.ones(3, K, 12), atol=1e-5)


@both_implementations
def test_gradients_do_not_see_the_padding(attention: str) -> None:
    def gradients(ids: Tensor, mask: Tensor) -> list[Tensor]:
        model = tiny(attention, dtype=torch.float64)
        labels = ids.masked_fill(mask.cumsum(-1) * mask < 2, -100)  # neither padding nor the first token, which has nothing before it
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return [p.grad for p in model.parameters()]

    wanted = gradients(torch.tensor([ROWS[2]]), torch.ones(1, len(ROWS[2]), dtype=torch.long))
    for side in ("left", "right"):
        for got, want in zip(gradients(*padded([ROWS[2]], side, 14, 33)), wanted, strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)  # the loss itself is taken in float32


@both_implementations
@pytest.mark.parametrize("cut", [1, 4, T - 1])
def test_cached_tokens_count_as_if_they_were_read_again(attention: str, cut: int) -> None:
    model = tiny(attention)
    ids, mask = padded(ROWS, "left", T)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False)
        assert whole.past_key_values is None
        first = model(ids[:, :cut], attention_mask=mask[:, :cut])
        got, cache = [first.logits], first.past_key_values
        for t in range(cut, T):
            step = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            got.append(step.logits)
            assert step.past_key_values is cache and cache.get_seq_length() == t + 1
        several = model(ids[:, cut:], attention_mask=mask, past_key_values=model(ids[:, :cut], mask[:, :cut]).past_key_values).logits
    real = mask.bool()
    assert torch.allclose(torch.cat(got, 1)[real], whole.logits[real], rtol=1e-4, atol=1e-5)
    assert torch.allclose(several[real[:, cut:].nonzero(as_tuple=True)], whole.logits[:, cut:][real[:, cut:]], rtol=1e-4, atol=1e-5)


def test_without_a_mask_positions_go_on_behind_the_cache() -> None:
    model, ids = tiny(), some_ids()
    with torch.no_grad():
        cache = model(ids[:, :5]).past_key_values
        assert torch.allclose(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


@both_implementations
@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}, {"num_return_sequences": 3, "num_beams": 4}], ids=str)
def test_generation_with_a_cache_is_that_without(attention: str, how: dict[str, int]) -> None:
    model = tiny(attention)
    ids, mask = padded(ROWS, "left", 11)
    asked = {"max_new_tokens": 12, "do_sample": False, **how}
    said = model.generate(ids, attention_mask=mask, **asked)
    assert torch.equal(said, model.generate(ids, attention_mask=mask, use_cache=False, **asked))
    for n, row in enumerate(ROWS):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **asked)
        many = how.get("num_return_sequences", 1)
        for got, want in zip(said[n * many : (n + 1) * many, 11:].tolist(), alone[:, len(row) :].tolist(), strict=True):
            assert got[: len(want)] == want and not any(got[len(want) :]), "another row may go on longer"


def test_generation_is_greedy_by_hand() -> None:
    model, ids = tiny(), torch.tensor([ROWS[0]])
    by_hand = ids
    for _ in range(8):
        with torch.no_grad():
            by_hand = torch.cat([by_hand, model(by_hand, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **asked), by_hand) and len(set(by_hand[0, 6:].tolist())) > 1


@torch.no_grad()
def test_logits_of_chosen_positions_only() -> None:
    model, ids = tiny(), some_ids()
    whole = model(ids).logits
    for keep, want in ((1, whole[:, -1:]), (3, whole[:, -3:]), (torch.tensor([0, 4]), whole[:, [0, 4]])):
        assert torch.allclose(model(ids, logits_to_keep=keep).logits, want, rtol=1e-5, atol=1e-5)
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], whole)


def test_what_it_does_not_take_is_refused() -> None:
    model, ids = tiny("eager"), some_ids()
    for asked in ({"output_attentions": True}, {"output_hidden_states": True}, {"inputs_embeds": torch.zeros(2, T, D)}):
        with pytest.raises(ValueError, match=f"does not take '{[*asked][0]}'"):
            model(ids, **asked)
    with pytest.raises(ValueError, match=r"0 cached and the 9 new tokens, \(2, 9\); it is \(2, 8\)"):
        model(ids, attention_mask=torch.ones(2, T - 1))
    with pytest.raises(ValueError, match="Static caches"):
        model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", max_new_tokens=2)


# ---------------------------------------------------------------------------------------------------------------------- checkpoints


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path: Path) -> None:
    model, ids = tiny(), some_ids()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "backpack"
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters()), "E is stored once, an empty table never"
    again, read = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is BackpackLMHeadModel and not any(read.values())
    assert torch.equal(again(ids).logits, model(ids).logits)
    moved = {"_name_or_path", "dtype"}
    assert {n: v for n, v in again.config.to_dict().items() if n not in moved} == {
        n: v for n, v in model.config.to_dict().items() if n not in moved
    }
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half(ids).logits, tiny(dtype=torch.bfloat16)(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BackpackConfig)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is BackpackModel
    assert torch.equal(headless(ids).last_hidden_state, model.backpack(ids).last_hidden_state)


def test_the_embedding_stays_tied(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    for model in (tiny(), copy.deepcopy(tiny()), BackpackLMHeadModel.from_pretrained(tmp_path)):
        assert model.lm_head.weight is model.backpack.gpt2_model.wte.weight is model.get_input_embeddings().weight
        assert "lm_head.weight" not in dict(model.named_parameters())
    model.resize_token_embeddings(V + 4)
    assert model.lm_head.weight is model.backpack.gpt2_model.wte.weight and model.lm_head.weight.shape == (V + 4, D)
    untied = tiny(tie_word_embeddings=False)
    untied.save_pretrained(tmp_path)
    again = BackpackLMHeadModel.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.backpack.gpt2_model.wte.weight
    assert torch.equal(again(some_ids()).logits, untied(some_ids()).logits)


def published(config: BackpackConfig, fill: float | None = None) -> dict[str, Tensor]:
    """A state dict with the names and shapes of stanfordnlp/backpack-gpt2: second names and causal masks too."""
    D, k = config.n_embd, config.num_senses
    inner, scale = config.n_inner or 4 * D, config.sense_intermediate_scale
    shapes: dict[str, tuple[int, ...]] = {"gpt2_model.wte.weight": (config.vocab_size, D), "gpt2_model.wpe.weight": (config.n_positions, D)}

    def conv1d(name: str, into: int, out: int) -> None:
        shapes.update({f"{name}.weight": (into, out), f"{name}.bias": (out,)})

    for norm in ["gpt2_model.ln_f", "sense_network.ln", "sense_network.block.ln_1", "sense_network.block.ln_2"]:
        shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    for i in range(config.n_layer):
        at = f"gpt2_model.h.{i}"
        for norm in (f"{at}.ln_1", f"{at}.ln_2"):
            shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
        conv1d(f"{at}.attn.c_attn", D, 3 * D)
        conv1d(f"{at}.attn.c_proj", D, D)
        conv1d(f"{at}.mlp.c_fc", D, inner)
        conv1d(f"{at}.mlp.c_proj", inner, D)
    conv1d("sense_network.block.mlp.c_fc", D, 4 * D)
    conv1d("sense_network.block.mlp.c_proj", 4 * D, D)
    conv1d("sense_network.final_mlp.c_fc", D, scale * D)
    conv1d("sense_network.final_mlp.c_proj", scale * D, k * D)
    shapes |= {"sense_weight_net.c_attn.weight": (2 * D, D), "sense_weight_net.c_attn.bias": (2 * D,)}
    draw = torch.Generator().manual_seed(7)
    state = {
        f"backpack.{n}": 0.3 * torch.randn(s, generator=draw) if fill is None else torch.empty(s, device="meta") for n, s in shapes.items()
    }
    for second, first in (("word_embeddings", "wte"), ("position_embeddings", "wpe")):
        state[f"backpack.{second}.weight"] = state[f"backpack.gpt2_model.{first}.weight"]
    state["lm_head.weight"] = state["backpack.gpt2_model.wte.weight"]
    for i in range(config.n_layer):
        state[f"backpack.gpt2_model.h.{i}.attn.bias"] = torch.ones(1, 1, config.n_positions, config.n_positions, dtype=torch.bool).tril()
        state[f"backpack.gpt2_model.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def test_the_published_names_and_shapes_go_in() -> None:
    small = published(tiny_config())
    given = dict(small)
    model = tiny()
    assert str(model.load_state_dict(small)) == "<All keys matched successfully>" and small.keys() == given.keys()
    own = model.state_dict()
    assert all(torch.equal(own[n], t) for n, t in small.items() if n in own) and own.keys() < small.keys()
    assert model.lm_head.weight is model.backpack.gpt2_model.wte.weight
    with torch.no_grad():
        wanted, _, _ = in_loops(model, ROWS[0])
        assert torch.allclose(model(torch.tensor([ROWS[0]])).logits[0].double(), wanted, rtol=1e-3, atol=1e-4)
    with torch.device("meta"):
        big = BackpackLMHeadModel(BackpackConfig())
    shapes = {n: t.shape for n, t in published(BackpackConfig(), fill=0.0).items()}
    assert {n: t.shape for n, t in big.state_dict().items()}.items() <= shapes.items()


@pytest.mark.parametrize("gone", [("backpack.gpt2_model.wte.weight", "lm_head.weight"), ("backpack.gpt2_model.wpe.weight",),
    ("backpack.word_embeddings.weight", "backpack.position_embeddings.weight", "lm_head.weight")], ids=str)  # fmt: skip
def test_any_name_of_a_tensor_that_has_several_will_do(gone: tuple[str, ...]) -> None:
    whole, model = published(tiny_config()), tiny()
    model.load_state_dict({n: t for n, t in whole.items() if n not in gone})
    assert torch.equal(model.lm_head.weight, whole["lm_head.weight"])
    assert torch.equal(model.backpack.gpt2_model.wpe.weight, whole["backpack.gpt2_model.wpe.weight"])


def test_a_checkpoint_that_does_not_fit_names_the_tensor() -> None:
    whole = published(tiny_config())
    with pytest.raises(RuntimeError, match="Missing key.*backpack.sense_network.ln.bias"):
        tiny().load_state_dict({n: t for n, t in whole.items() if n != "backpack.sense_network.ln.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key.*backpack.extra"):
        tiny().load_state_dict(whole | {"backpack.extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="'backpack.word_embeddings.weight' and 'backpack.gpt2_model.wte.weight' are one tensor"):
        tiny().load_state_dict(whole | {"backpack.word_embeddings.weight": torch.zeros(V, D)})


def test_a_published_folder_is_read_and_can_be_saved_as_ours(tmp_path: Path) -> None:
    """As on the hub: pytorch_model.bin, and a config that says GPT-2."""
    sizes = {n: getattr(tiny_config(), n) for n in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "num_senses")}
    more = {"sense_intermediate_scale": 2, "model_type": "gpt2", "architectures": ["BackpackGPT2LMHeadModel"], "scale_attn_weights": True}
    (tmp_path / "config.json").write_text(json.dumps(sizes | more))
    torch.save(published(tiny_config()), tmp_path / "pytorch_model.bin")
    model, read = BackpackLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(read.values())
    wanted, ids = tiny(), some_ids()
    wanted.load_state_dict(published(tiny_config()))
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("change, told", [
    (lambda t: t.pop("backpack.sense_network.ln.bias"), "The checkpoint lacks 'backpack.sense_network.ln.bias', which a Backpack"),
    (lambda t: [t.pop(n) for n in sorted(t) if ".h.0." in n], "lacks 'backpack.gpt2_model.h.0.attn.c_attn.bias' and 11 more, which"),
    (lambda t: t.update({"backpack.extra": torch.zeros(1)}), "The checkpoint holds 'backpack.extra', which a Backpack of"),
    (lambda t: t.update({"score.a": torch.zeros(1), "score.b": torch.zeros(1)}), "holds 'score.a' and 1 more, which"),
    (lambda t: t.update({"backpack.sense_network.ln.bias": torch.zeros(7)}), r"'backpack.sense_network.ln.bias' as \(7,\), a Backpack"),
])  # fmt: skip
def test_a_folder_whose_tensors_do_not_fit_is_refused_by_the_name_of_one(change: Callable[[Any], Any], told: str, tmp_path: Path) -> None:
    host = tiny_host("backpack")
    host.model.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path), "cpu").id == host.id
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for read in (BackpackLMHeadModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=told):
            read(tmp_path)
    with pytest.raises(UnknownName, match=f"Cannot load '{tmp_path}': .*{told}"):
        load(str(tmp_path), "cpu")


# ------------------------------------------------------------------------------------------------------------------------ overrides

IDS = torch.tensor([31, 8, 9])  # not sorted on purpose
TEXT_IDS = torch.tensor([[5, 9, 31, 7, 9, 2]])


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_substituted_senses_take_the_place_of_the_network_s() -> None:
    model, put = tiny(), drawn(3, K, D)
    base, alpha, before = model.senses(torch.arange(V)), model.alpha(TEXT_IDS), model(TEXT_IDS).logits
    model.override(IDS, put)
    now = model.senses(torch.arange(V))
    assert torch.equal(now[IDS], put)
    others = torch.tensor([i for i in range(V) if i not in IDS.tolist()])
    assert torch.equal(now[others], base[others])
    assert torch.equal(model.alpha(TEXT_IDS), alpha), "the contextualisation does not see the senses"
    wanted = model.lm_head(sum(alpha[:, k] @ now[TEXT_IDS][:, :, k] for k in range(K)))
    after = model(TEXT_IDS).logits
    assert torch.allclose(after, wanted, rtol=1e-5, atol=1e-4) and (after - before).abs().max() > 0.1
    assert torch.equal(after[:, 0], before[:, 0]), "before the first overridden token nothing changes"


@torch.no_grad()
def test_shifts_add_up_as_the_formula_says() -> None:
    """logits(shift) = logits + sum over edited (v, k) of a_t,(v,k) E shift, a_t the weight of all places of v up to t."""
    model, shift = tiny(), torch.zeros(2, K, D)
    before, alpha = model(TEXT_IDS).logits, model.alpha(TEXT_IDS)
    model.override(torch.tensor([9, 31]), shift, keep=1.0)
    assert torch.equal(model(TEXT_IDS).logits, before), "a shift of 0 changes no bit"
    shift[0, 2], shift[1, 0] = drawn(D), drawn(D, seed=6)
    model.override(torch.tensor([9, 31]), shift, keep=1.0)
    a_T = alpha[0, 2][:, TEXT_IDS[0] == 9].sum(-1)[:, None] * (model.lm_head.weight @ shift[0, 2])
    b_T = alpha[0, 0][:, TEXT_IDS[0] == 31].sum(-1)[:, None] * (model.lm_head.weight @ shift[1, 0])
    assert torch.allclose(model(TEXT_IDS).logits[0], before[0] + a_T + b_T, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_sense_can_be_turned_down() -> None:
    model, keep = tiny(), torch.ones(3, K)
    base = model.senses(IDS)
    keep[1, 3] = 0.25
    model.override(IDS, torch.zeros(3, K, D), keep=keep)
    assert torch.allclose(model.senses(IDS), base * keep[..., None], rtol=1e-6)


@torch.no_grad()
def test_overrides_hold_in_generation_and_go_without_a_trace() -> None:
    model, ids = tiny(), torch.tensor([ROWS[0]])
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before, said = model(ids).logits, model.generate(ids, **asked)
    model.override(said[0, -4:].unique(), 3 * drawn(len(said[0, -4:].unique()), K, D))
    now = model.generate(ids, **asked)
    assert torch.equal(now, model.generate(ids, use_cache=False, **asked)) and not torch.equal(now, said)
    model.override(torch.empty(0, dtype=torch.long), torch.empty(0, K, D))
    assert torch.equal(model(ids).logits, before) and not [n for n in model.state_dict() if "overrides" in n]


def test_overrides_can_be_given_to_a_functional_call_and_learnt() -> None:
    model = tiny(dtype=torch.float64)
    plain = model(TEXT_IDS).logits
    model.override(IDS, torch.zeros(3, K, D), keep=1.0)
    name = "backpack.overrides.senses"

    def loss(shift: Tensor) -> Tensor:
        said = torch.func.functional_call(model, {name: shift}, args=(TEXT_IDS,), kwargs={"use_cache": False})
        return -torch.log_softmax(said.logits[0, :-1], -1).gather(-1, TEXT_IDS[0, 1:, None]).sum()

    shift = drawn(3, K, D).double()
    gradient = torch.func.grad(loss)(shift)
    tracked = shift.clone().requires_grad_()
    assert torch.allclose(torch.autograd.grad(loss(tracked), tracked)[0], gradient)
    direction = drawn(3, K, D, seed=8).double()
    slope = (loss(shift + 1e-5 * direction) - loss(shift - 1e-5 * direction)) / 2e-5
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)
    assert (gradient[1] == 0).all() and (gradient[0] != 0).any(), "8 is not in the text, 31 is"
    assert torch.equal(model(TEXT_IDS).logits, plain), "the model itself is as it was"
    table = {"ids": torch.tensor([9]), "keep": torch.zeros(1, K).double(), "senses": shift[:1]}
    model.override(torch.empty(0, dtype=torch.long), torch.empty(0, K, D))
    whole = torch.func.functional_call(model, {f"backpack.overrides.{n}": t for n, t in table.items()}, args=(TEXT_IDS,)).logits
    model.override(torch.tensor([9]), shift[:1])
    assert torch.equal(model(TEXT_IDS).logits, whole) and not torch.equal(whole, plain), "and a whole table for a model without one"


def test_overrides_are_saved_with_the_model_and_count_in_its_id(tmp_path: Path) -> None:
    model = tiny()
    ids = {weights_id(model)}
    table = drawn(3, K, D)
    model.override(IDS, table)
    ids.add(weights_id(model))
    logits = model(TEXT_IDS).logits
    table.zero_()
    assert torch.equal(model(TEXT_IDS).logits, logits), "the table is a copy"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_overrides == 3 and torch.equal(again(TEXT_IDS).logits, logits) and weights_id(again) in ids
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.backpack.overrides.ids, IDS) and half.backpack.overrides.senses.dtype == torch.bfloat16
    model.override(torch.tensor([31, 8, 10]), drawn(3, K, D))
    ids.add(weights_id(model))
    model.override(torch.empty(0, dtype=torch.long), torch.empty(0, K, D))
    assert len(ids) == 3 and weights_id(model) in ids
    model.save_pretrained(tmp_path / "without")
    assert not load_file(tmp_path / "without" / "model.safetensors").keys() & {"backpack.overrides.ids"}
    assert weights_id(AutoModelForCausalLM.from_pretrained(tmp_path / "without")) == weights_id(model)


@pytest.mark.parametrize("ids, shape, told", [
    ([1, 2, 1], (3, K, D), "there twice"),
    ([1, V], (2, K, D), f"from 0 to {V - 1}, got 1 to {V}"),
    ([-1], (1, K, D), "got -1"),
    ([1], (1, K + 1, D), rf"1 tokens is \(1, {K}, {D}\) .* got \(1, {K + 1}, {D}\)"),
])  # fmt: skip
def test_a_table_that_cannot_be_is_refused(ids: list[int], shape: tuple[int, ...], told: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=told):
        model.override(torch.tensor(ids), torch.zeros(shape))
    assert len(model.backpack.overrides.ids) == 0


# ---------------------------------------------------------------------------------------------------------------------------- host


def test_a_host_carries_it(tmp_path: Path) -> None:
    host = tiny_host("backpack")
    assert host.blocks == 2 and host.context == CONTEXT and host.model.config.num_senses == 4
    said = greedy(host, ["The capital of Mauritius is", "Paris"])
    assert len(set(said)) == 2 and said[1] == greedy(host, ["Paris"])[0]
    rows = [encode(host, "The capital of Mauritius is", " Port Louis"), encode(host, "Paris", " is")]
    scored = score(host, rows)
    assert scored[:, 1].tolist() == [len(ids) - n for ids, n in rows] and (scored[:, 0] < 0).all()
    host.model.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    again = load(str(tmp_path), device="cpu")
    assert again.id == host.id and torch.equal(score(again, rows), scored)


def test_a_fresh_process_loads_it_without_being_told_of_it(tmp_path: Path) -> None:
    host = tiny_host("backpack")
    host.model.save_pretrained(tmp_path)
    host.tokenizer.save_pretrained(tmp_path)
    code = f"from errata.hosts import load; print(load({str(tmp_path)!r}, device='cpu').id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == host.id
