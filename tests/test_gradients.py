"""Value gradients against finite differences and plain autograd; what they cost; statistics against those of all rows at once."""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, TEXT, same_bits, tiny_host, weights_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errata import apply, hooks, hosts, methods
from errata.hosts import Host
from errata.methods import _gradients
from errata.methods._descend import goal_losses
from errata.types import Example, Rows, Run

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The capital of France, where the Seine flows past, is", target=" Rome", subject="France"),
    Example(prompt="The nurse said that", target=" she", contrast=" he", goal="prefer"),
    Example(prompt="The doctor said", target=" that he", contrast=" she", goal="balance"),
    Example(prompt="Paris lies on the", target=" Rome", goal="lower"),
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def modules_of(host: Host, layers: tuple[int, ...] = (0, 1)) -> list[str]:
    return host.module_names((*host.layout.mlp_in, host.layout.mlp_out), list(layers))


def loss_of(host: Host, e: Example, shifts: dict[str, Tensor] | None = None, contrast: bool = False) -> float:
    """The loss of one example, by whole passes; `shifts` move what the modules give in the pass of the target, or of the contrast."""

    def logp(answer: str, moved: bool) -> Tensor:
        batch = hosts.pad(host, [hosts.encode(host, e.prompt, answer)])
        turns = {m: (lambda y, s=s: y + s) for m, s in (shifts or {}).items()} if moved else {}
        with torch.no_grad(), hooks.shifting(host.model, turns):
            return hosts.scored_logprobs(host, batch).sum(1)

    target = logp(e.target, not contrast)
    n = torch.tensor([float(tokens_of(host, e, e.target))], dtype=torch.float64)
    loss = goal_losses(target, logp(e.contrast, contrast) if e.contrast else target, n, [e], enough=0.0)
    return float(loss[0]) * (float(n) if e.goal == "raise" else 1.0)


def tokens_of(host: Host, e: Example, answer: str) -> int:
    ids, given = hosts.encode(host, e.prompt, answer)
    return len(ids) - given


def by_differences(host: Host, e: Example, modules: list[str]) -> None:
    """Each module's rows against central differences, along a random direction at all answer tokens."""
    (rows,) = _gradients.rows(host, [e], modules, 8)
    of_target = tokens_of(host, e, e.target)
    for answer in (e.target, e.contrast):
        if answer is None:
            continue
        ids, given = hosts.encode(host, e.prompt, answer)
        for module in modules:
            values = rows.values[module][of_target:] if answer is e.contrast else rows.values[module][:of_target]
            assert len(values) == len(ids) - given
            way = randn(1, len(ids), values.shape[1])
            way[:, : given - 1] = way[:, -1:] = 0.0
            step = 1e-5
            up, down = (loss_of(host, e, {module: s * step * way}, answer is e.contrast) for s in (1, -1))
            wanted = float((values.double() * way[0, given - 1 : -1]).sum())
            assert (up - down) / (2 * step) == pytest.approx(wanted, rel=1e-4, abs=1e-5), module


@pytest.mark.parametrize("e", EXAMPLES, ids=lambda e: e.goal)
def test_values_are_the_gradients_of_the_loss_in_the_outputs(e: Example) -> None:
    """On a family that keeps to float64; others round their norms to float32, which differences do not bear."""
    host = tiny_host("gpt2", dtype=torch.float64)
    by_differences(host, e, modules_of(host))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_changes_no_gradient(family: str) -> None:
    """Against a pass with the whole graph, of one row alone, on every architecture."""
    host, e = tiny_host(family), EXAMPLES[0]
    modules = modules_of(host)
    (rows,) = _gradients.rows(host, [e], modules, 8)
    ids, given = hosts.encode(host, e.prompt, e.target)
    with hooks.reading(host.model, modules) as seen:
        logp = hosts.scored_logprobs(host, hosts.pad(host, [(ids, given)])).sum()
    for module, grad in zip(modules, torch.autograd.grad(-logp, [seen[m] for m in modules]), strict=True):
        assert float(grad.abs().max()) > 1e-4, "or the same would prove nothing"
        torch.testing.assert_close(rows.values[module], grad[0, given - 1 : -1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("everywhere", "per_text"), [(True, 2), (True, 1), (False, 0), (False, 1), (True, 0)])
def test_the_last_mlp_is_asked_no_more_than_it_has_to_be(
    family: str, everywhere: bool, per_text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows as with all of it, of answers of one token and of several, on every architecture."""
    host, answers = tiny_host(family), (" Rome", " the sea and the wind", " Rome")
    if host.kind == "classifier":
        answers = ("true", "false", "true")
    prompts = ("What is the capital of Mauritius?", "Who?", "Where, in which of the towns?")
    batch = hosts.pad(host, [hosts.encode(host, p, a) for p, a in zip(prompts, answers, strict=True)])
    modules, asked = host.projections(), list[int]()
    looking_at = hooks.looking_at

    def counted(model: Any, name: str, place_NP: torch.Tensor) -> Any:
        asked.append(place_NP.shape[1])
        return looking_at(model, name, place_NP)

    monkeypatch.setattr(hooks, "looking_at", counted)
    few = _gradients.captured(host, batch, modules, lambda logp_N: -logp_N.sum(), everywhere, None, per_text)
    n = int(batch.scored_NT.sum(1).max()) + per_text
    assert asked == ([n] if host.last_mlp and (per_text or not everywhere) and n < batch.scored_NT.shape[1] else [])
    assert n < batch.scored_NT.shape[1] or host.kind != "causal"
    monkeypatch.setattr(_gradients, "_few_places", lambda *_: None)
    whole = _gradients.captured(host, batch, modules, lambda logp_N: -logp_N.sum(), everywhere, None, per_text)
    for m in modules:
        for a, b in zip(few[m], whole[m], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=m)


def test_an_answer_without_a_gradient_has_the_same_rows_in_any_batch(tiny_gpt2: Host) -> None:
    """As of a goal that is met by far: then the places in the middle come before those of the answer."""
    (module,) = tiny_gpt2.module_names((tiny_gpt2.layout.mlp_out,), [1])
    row = hosts.encode(tiny_gpt2, "The capital of Italy is", " a")
    longer = hosts.encode(tiny_gpt2, "What is the capital of Mauritius? It is, as far as we know,", " Port Louis")

    def keys(rows: list[Any]) -> Tensor:
        padded = hosts.pad(tiny_gpt2, rows)
        return _gradients.captured(tiny_gpt2, padded, [module], lambda logp_N: 0 * logp_N.sum(), True, None, 2)[module][0][:2]

    torch.testing.assert_close(keys([row]), keys([row, longer]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(keys([row]), keys([row, row]), rtol=1e-4, atol=1e-6)


def test_of_equal_rows_those_in_the_middle_are_taken_whatever_else_is_in_the_batch(tiny_gpt2: Host) -> None:
    """Above the last attention no token but those that predict the answer has a gradient."""
    (module,) = tiny_gpt2.module_names((tiny_gpt2.layout.mlp_out,), [1])
    row = hosts.encode(tiny_gpt2, "The capital of Italy is", " a")
    longer = hosts.encode(tiny_gpt2, "What is the capital of Mauritius? It is, as far as we know,", " Port Louis")
    n = len(row[0]) - 1  # places that predict something
    assert n == row[1], "or more than one row is of the answer"
    with torch.no_grad(), hooks.reading(tiny_gpt2.model, [module], inputs=True) as seen:
        hosts.logits(tiny_gpt2, hosts.pad(tiny_gpt2, [row]))
    wanted = seen[module][0, [n // 2, n // 2 - 1, n - 1]]
    for per_text, order in ((2, [0, 2]), (3, [1, 0, 2])):
        for rows in ([row], [row, longer]):
            keys, v = _gradients.captured(tiny_gpt2, hosts.pad(tiny_gpt2, rows), [module], lambda p: -p.sum(), True, None, per_text)[module]
            torch.testing.assert_close(keys[:per_text], wanted[order], rtol=1e-4, atol=1e-6)
            assert not v[: per_text - 1].any() and bool(v[per_text - 1].any())


def test_a_patch_that_is_on_sees_all_of_a_text(tiny_gpt2: Host) -> None:
    batch = hosts.pad(tiny_gpt2, [hosts.encode(tiny_gpt2, "The capital of Italy is", " Rome")])
    assert _gradients._few_places(tiny_gpt2, batch, True, 2) is not None
    with apply.applied(tiny_gpt2, methods.make("grace").edit(tiny_gpt2, (EXAMPLES[0],), Run(hold=tuple(TEXT)))):
        assert _gradients._few_places(tiny_gpt2, batch, True, 2) is None


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_keys_are_the_inputs_at_what_predicts_the_answer(family: str) -> None:
    host = tiny_host(family)
    (module,) = host.module_names((host.layout.mlp_out,), [1])
    e = EXAMPLES[0]
    ids, given = hosts.encode(host, e.prompt, e.target)
    with torch.no_grad(), hooks.reading(host.model, [module], inputs=True) as seen:
        hosts.logits(host, hosts.pad(host, [(ids, given)]))
    (rows,) = _gradients.rows(host, [e], [module], 8)
    torch.testing.assert_close(rows.keys[module], seen[module][0, given - 1 : -1])
    weight = host.model.get_parameter(f"{module}.weight")
    assert rows.keys[module].shape[1] == 64 * (2 if family == "gpt2" else 1) and 32 in weight.shape
    assert rows.host == host.id and rows.example == e


@pytest.mark.parametrize("host", ["gpt2", "llama", "opt"], indirect=True)
def test_rows_do_not_depend_on_the_batch(host: Host) -> None:
    modules = modules_of(host)
    together = _gradients.rows(host, EXAMPLES, modules, 64)
    for batch_size in (1, 2):
        for a, b in zip(together, _gradients.rows(host, EXAMPLES[::-1], modules, batch_size)[::-1], strict=True):
            assert a.example == b.example
            for module in modules:
                torch.testing.assert_close(a.keys[module], b.keys[module], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(a.values[module], b.values[module], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)
def test_weights_times_rows_are_the_gradients_of_the_weights(host: Host) -> None:
    """K^T V over all positions of a text is dL/dW; with what is scored everywhere, that is all positions but the last, where nothing is."""
    host = tiny_host(host.name.removeprefix("tiny-"), dtype=torch.float64)
    (module,) = host.module_names((host.layout.mlp_out,), [1])
    row = hosts.chunks(host, TEXT[:1])[0]
    ((k, v),) = _gradients.captured(host, hosts.pad(host, [row]), [module], lambda logp_N: -logp_N.sum()).values()
    weight = host.model.get_parameter(f"{module}.weight")
    (grad,) = torch.autograd.grad(-hosts.scored_logprobs(host, hosts.pad(host, [row])).sum(), weight)
    torch.testing.assert_close(k.T @ v if hosts.stored_transposed(host.model.get_submodule(module)) else v.T @ k, grad)


@pytest.mark.parametrize("family", ["t5", "mt5", "bert"])
def test_they_are_in_every_projection_of_a_model_that_reads_before_it_answers(family: str) -> None:
    """Taken everywhere, K^T V is dL/dW: of what reads, at all of its tokens, padding aside; of what answers, at all but the last."""
    host = tiny_host(family, dtype=torch.float64)
    answers = (" Rome", " the sea") if host.kind == "seq2seq" else ("true", "false")
    batch = hosts.pad(host, [hosts.encode(host, p, a) for p, a in zip(("What is the capital of Mauritius?", "Who?"), answers, strict=True)])
    modules = host.projections()
    found = _gradients.captured(host, batch, modules, lambda logp_N: -logp_N.sum(), everywhere=True)
    weights = [host.model.get_parameter(f"{m}.weight") for m in modules]
    wanted = torch.autograd.grad(-hosts.scored_logprobs(host, batch).sum(), weights)
    for module, grad in zip(modules, wanted, strict=True):
        k, v = found[module]
        torch.testing.assert_close(v.T @ k, grad, msg=module)
        assert len(k) == int(_gradients.at(host, batch, module, True).sum())


def test_only_the_answer_of_a_seq2seq_and_the_first_token_of_a_classifier() -> None:
    prompt = "The capital of Mauritius is"
    for family, answer in (("t5", " Rome"), ("bert", "true")):
        host = tiny_host(family)
        (rows,) = _gradients.rows(host, [Example(prompt=prompt, target=answer)], host.projections("mlp_out"), 4)
        ids, given = hosts.encode(host, prompt, answer)
        wanted = {"encoder": given, "decoder": len(ids) - given, "bert": 1}
        assert {m: len(keys) for m, keys in rows.keys.items()} == {m: wanted[m.split(".")[0]] for m in rows.keys}


def kept_for_backward(host: Host, layers: tuple[int, ...]) -> int:
    """Numbers that autograd keeps during the capture, parameters aside."""
    own = {p.data_ptr() for p in host.model.parameters()}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _gradients.rows(host, EXAMPLES[:2], host.module_names((host.layout.mlp_out,), list(layers)), 8)
    return sum(sizes.values())


def test_nothing_is_kept_below_the_first_module_and_no_weight_gets_a_gradient(tiny_llama: Host) -> None:
    before, asking = weights_of(tiny_llama), [p.requires_grad for p in tiny_llama.model.parameters()]
    upper, both = kept_for_backward(tiny_llama, (1,)), kept_for_backward(tiny_llama, (0, 1))
    assert upper < 0.5 * both
    assert same_bits(tiny_llama, before) and all(p.grad is None for p in tiny_llama.model.parameters())
    assert [p.requires_grad for p in tiny_llama.model.parameters()] == asking
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.model.modules())


def test_a_captured_row_is_not_a_view_of_the_batch(tiny_gpt2: Host) -> None:
    first: Rows = _gradients.rows(tiny_gpt2, EXAMPLES, modules_of(tiny_gpt2), 8)[0]
    for t in (*first.keys.values(), *first.values.values()):
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size() and not t.requires_grad


# --------------------------------------------------------------------------------------------------------------------------- statistics


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.floats(-3, 3))
def test_moments_of_parts_are_those_of_the_whole(parts: list[int], offset: float) -> None:
    """Single rows among them, which have no variance of their own; far from zero, where squares would cancel."""
    x = randn(sum(parts), 3) + 10**offset
    each = [_gradients.moments(part) for part in x.split(parts)]
    total = each[0]
    for part in each[1:]:
        total = _gradients.merged(total, part)
    torch.testing.assert_close(total.mean_W, x.mean(0))
    torch.testing.assert_close(total.squares_W, (x - x.mean(0)).square().sum(0), rtol=1e-9, atol=1e-12)
    assert total.n == len(x)


def test_standardised_rows_have_mean_zero_and_deviation_one() -> None:
    x = randn(50, 3) * torch.tensor([1.0, 2.0, 5.0]) + 7
    z = _gradients.standardised(_gradients.moments(x), x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(0), torch.ones(3, dtype=torch.float64))


def test_a_coordinate_that_never_moved_does_not_become_all_that_counts() -> None:
    still = randn(50, 3) * torch.tensor([1.0, 1.0, 0.0])
    z = _gradients.standardised(_gradients.moments(still), torch.ones(1, 3))
    assert bool(z.isfinite().all()) and float(z[0, 2]) < 2 / _gradients.FLOOR
    alone = _gradients.standardised(_gradients.moments(still[:1]), still[:1])
    assert torch.equal(alone, torch.zeros(1, 3, dtype=torch.float64)), "one row is its own mean, and not NaN"


def test_statistics_of_text_do_not_depend_on_how_it_is_cut_into_passes(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = tiny_llama.module_names((tiny_llama.layout.mlp_out,), [1])
    whole = _gradients.of_text(tiny_llama, TEXT, [module], 10_000)[module]
    monkeypatch.setattr(_gradients, "PASS", 1)
    single = _gradients.of_text(tiny_llama, TEXT, [module], 10_000)[module]
    rows = sum(len(ids) - 1 for ids, _ in hosts.chunks(tiny_llama, TEXT))
    for a, b in zip(whole, single, strict=True):
        assert a.n == b.n == rows
        torch.testing.assert_close(a.mean_W, b.mean_W, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.squares_W, b.squares_W, rtol=1e-4, atol=1e-6)
    few = _gradients.of_text(tiny_llama, TEXT, [module], 30)[module][0].n
    assert 29 <= few + 1 and few < rows


def test_the_second_moments_of_text_are_those_of_the_gradients_at_all_its_tokens(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = tiny_llama.module_names((tiny_llama.layout.mlp_out,), [1])
    wanted, count = torch.zeros(1), 0
    for row in hosts.chunks(tiny_llama, TEXT):
        (v,) = (v for _, v in _gradients.captured(tiny_llama, hosts.pad(tiny_llama, [row]), [module], lambda p: -p.sum(), True).values())
        wanted, count = wanted + v.double().T @ v.double(), count + len(v)
    for size in (1, 512):
        monkeypatch.setattr(_gradients, "PASS", size)
        torch.testing.assert_close(
            _gradients.second_moments(tiny_llama, TEXT, [module], 10_000)[module], wanted / count, rtol=1e-4, atol=1e-9
        )
    captured = _gradients.captured

    def spoiled(*given: Any) -> Any:
        return {m: (k, v.index_fill(0, torch.tensor([0]), torch.nan)) for m, (k, v) in captured(*given).items()}

    monkeypatch.setattr(_gradients, "captured", spoiled)
    assert _gradients.second_moments(tiny_llama, TEXT, [module], 10_000)[module].isfinite().all()
