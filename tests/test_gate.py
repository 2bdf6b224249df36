"""The gate: paired measurement, the bound, scaling onto the edge, refusal with numbers."""

import math

import pytest
import torch
from conftest import TEXT, same_bits, shove, weights_of

from errata import apply, gate, hosts
from errata.hosts import Host
from errata.types import Budget, BudgetError, Example, InvalidReference, WrongBase

EXAMPLE = Example(prompt="The capital of Mauritius is", target=" Port Louis")


def naive_mean_loss(host: Host) -> tuple[float, int]:
    """Mean token loss of TEXT, one document at a time, by the model's own cross-entropy."""
    total, count = 0.0, 0
    for text in TEXT:
        for start in range(0, len(ids := hosts.tokens(host, text)), 128):
            piece = torch.tensor([ids[start : start + 128]])
            if piece.shape[1] > 1:
                total += host.model(input_ids=piece, labels=piece).loss.item() * (piece.shape[1] - 1)
                count += piece.shape[1] - 1
    return total / count, count


def test_the_loss_is_the_mean_over_every_token_of_the_reference(tiny_gpt2: Host) -> None:
    patch = shove(tiny_gpt2, 0.1)
    verdict = gate.judge(tiny_gpt2, patch, Budget(), gate.baseline(tiny_gpt2, TEXT))
    before, tokens = naive_mean_loss(tiny_gpt2)
    with apply.applied(tiny_gpt2, patch):
        after, _ = naive_mean_loss(tiny_gpt2)
    assert verdict.tokens == tokens
    assert verdict.loss_before == pytest.approx(before, rel=1e-5) and verdict.loss_after == pytest.approx(after, rel=1e-5)
    assert verdict.increase == pytest.approx(after / before - 1, rel=1e-3)


def test_the_host_is_left_as_it_was(tiny_gpt2: Host) -> None:
    before = weights_of(tiny_gpt2)
    gate.fit(tiny_gpt2, shove(tiny_gpt2, 1.0), Budget(epsilon=1e-4), gate.baseline(tiny_gpt2, TEXT))
    assert same_bits(tiny_gpt2, before) and not tiny_gpt2.worn


def test_an_empty_change_costs_nothing_and_fixes_nothing(tiny_gpt2: Host) -> None:
    verdict = gate.judge(tiny_gpt2, shove(tiny_gpt2, 0.0), Budget(epsilon=1e-9), gate.baseline(tiny_gpt2, TEXT))
    assert verdict.increase == 0 and verdict.upper == 0 and verdict.affordable
    assert verdict.fixed == 0 and not verdict.passed


def test_the_bound_is_that_of_a_ratio_estimator() -> None:
    """Against the bootstrap over chunks: the linearised standard error is close to the resampled one."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (400,), generator=draw).double()
    before = torch.stack([-3 * tokens, tokens], 1)
    after = torch.stack([-3 * tokens - 0.01 * tokens * torch.rand(400, generator=draw).double(), tokens], 1)
    mean, upper = hosts.increase(before, after)
    means = []
    for _ in range(2000):
        i = torch.randint(0, 400, (400,), generator=draw)
        means.append(float((before[i, 0] - after[i, 0]).sum() / -before[i, 0].sum()))
    assert mean == pytest.approx(float((before - after)[:, 0].sum() / -before[:, 0].sum()))
    assert upper - mean == pytest.approx(1.6449 * torch.tensor(means).std().item(), rel=0.1)


def test_a_long_text_is_read_on_only_where_the_first_look_leaves_it_open(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [t for t in TEXT for _ in range(3)]
    monkeypatch.setattr(gate, "LOOKS", (4, 7))
    base = gate.baseline(tiny_gpt2, texts)
    whole = [row for look in base.looks for row in look]
    assert [len(look) for look in base.looks] == [4, 3, len(whole) - 7] and len(base.losses) == 1
    patch = shove(tiny_gpt2, 1.0)
    for epsilon in (1e-9, 10.0):  # plainly outside, plainly inside
        assert gate.judge(tiny_gpt2, patch, Budget(epsilon=epsilon), base).chunks == 4
    before = hosts.score(tiny_gpt2, whole)
    with apply.applied(tiny_gpt2, patch):
        after = hosts.score(tiny_gpt2, whole)
    mean, upper = hosts.increase(before[:4], after[:4], 2.3263)
    verdict = gate.judge(tiny_gpt2, patch, Budget(epsilon=(mean + upper) / 2), base)
    assert verdict.chunks > 4 and len(base.losses) == (3 if verdict.chunks > 7 else 2)
    n, z = (7, 2.3263) if verdict.chunks == 7 else (len(whole), 1.8808)
    assert verdict.upper == pytest.approx(hosts.increase(before[:n], after[:n], z)[1])


@pytest.mark.parametrize(("chunks", "looks"), [(3, 1), (4, 1), (5, 2), (7, 2), (8, 3)])
def test_as_many_looks_as_there_is_text_for(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch, chunks: int, looks: int) -> None:
    monkeypatch.setattr(gate, "LOOKS", (4, 7))
    base = gate.baseline(tiny_gpt2, [TEXT[0]] * chunks)
    assert len(base.looks) == looks and sum(map(len, base.looks)) == chunks
    assert sum(1 - 0.5 * (1 + math.erf(z / 2**0.5)) for z in gate.QUANTILES[looks]) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("set_aside", [0, 5])
def test_a_text_of_which_nothing_is_left_is_refused_with_the_reason(tiny_gpt2: Host, set_aside: int) -> None:
    with pytest.raises(InvalidReference, match="0 chunk.*two or more are needed") as refused:
        gate.baseline(tiny_gpt2, [], set_aside)
    assert ("5 document(s) state an edited fact and were set aside" in str(refused.value)) == bool(set_aside)


def test_a_patch_outside_is_scaled_onto_the_edge(tiny_gpt2: Host) -> None:
    patch, budget, base = shove(tiny_gpt2, 1.0), Budget(epsilon=1e-2, fixed=0.0), gate.baseline(tiny_gpt2, TEXT)
    assert not gate.judge(tiny_gpt2, patch, budget, base).affordable
    scaled, verdict = gate.fit(tiny_gpt2, patch, budget, base)
    assert 0 < verdict.scale < 1 and verdict.passed and verdict.patch == scaled.id != patch.id
    assert torch.allclose(scaled.ops[0].delta, patch.ops[0].delta * verdict.scale)
    again = gate.judge(tiny_gpt2, apply.scaled(patch, verdict.scale + 2**-5), budget, base)
    assert not again.affordable  # one step of the bisection further is outside


def test_a_scaled_patch_that_fixes_nothing_is_refused_with_the_numbers(tiny_gpt2: Host) -> None:
    _, verdict = gate.fit(tiny_gpt2, shove(tiny_gpt2, 1.0), Budget(epsilon=1e-2, fixed=1.0), gate.baseline(tiny_gpt2, TEXT))
    assert verdict.affordable and not verdict.passed
    with pytest.raises(BudgetError, match=r"refused even scaled to .*: 0 of 1 examples fixed"):
        gate.require(verdict)


def test_neighbours_count(tiny_gpt2: Host) -> None:
    base = gate.baseline(tiny_gpt2, TEXT, neighbours=["The capital of France is", "Paris lies on the"])
    kept = gate.judge(tiny_gpt2, shove(tiny_gpt2, 0.0), Budget(neighbours=1.0, fixed=0.0), base)
    assert (kept.kept, kept.asked) == (2, 2) and kept.passed
    broken = gate.judge(tiny_gpt2, shove(tiny_gpt2, 30.0), Budget(epsilon=1e9, neighbours=1.0, fixed=0.0), base)
    assert broken.kept < 2 and not broken.passed and "neighbours kept" in broken.failures[0]


def test_the_norm_counts(tiny_gpt2: Host) -> None:
    patch = shove(tiny_gpt2, 0.1)
    verdict = gate.judge(tiny_gpt2, patch, Budget(epsilon=1e9, norm=1e-3, fixed=0.0), gate.baseline(tiny_gpt2, TEXT))
    weight = tiny_gpt2.model.get_parameter(patch.ops[0].weight)
    assert verdict.norm == pytest.approx(float(patch.ops[0].delta.norm() / weight.detach().norm()), rel=1e-5)
    assert not verdict.passed and "relative norm" in verdict.failures[0]


def test_a_model_that_says_nan_never_passes(tiny_gpt2: Host) -> None:
    verdict = gate.judge(tiny_gpt2, shove(tiny_gpt2, 1e30), Budget(epsilon=1e9, fixed=0.0), gate.baseline(tiny_gpt2, TEXT))
    assert math.isnan(verdict.loss_after) and not verdict.passed and not verdict.affordable


def test_nothing_left_to_measure_is_said(tiny_gpt2: Host) -> None:
    with pytest.raises(InvalidReference, match="3 document.s. state an edited fact"):
        gate.baseline(tiny_gpt2, TEXT[:1], set_aside=3)


def test_another_base_is_refused(tiny_gpt2: Host, tiny_llama: Host) -> None:
    with pytest.raises(WrongBase):
        gate.judge(tiny_llama, shove(tiny_gpt2, 0.1), Budget(), gate.baseline(tiny_llama, TEXT))


def test_scaling_reads_the_whole_text(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide bound of a first look would stop it far from the edge."""
    monkeypatch.setattr(gate, "LOOKS", (4, 8))
    base = gate.baseline(tiny_gpt2, [t for t in TEXT for _ in range(4)])
    patch, verdict = gate.fit(tiny_gpt2, shove(tiny_gpt2, 1.0), Budget(epsilon=1e-2, fixed=0.0), base)
    assert verdict.passed and 0.5e-2 < verdict.upper <= 1e-2
    assert verdict.chunks == sum(map(len, base.looks)) and verdict.scale < 1


def test_the_edge_of_a_ball_far_narrower_than_the_last_one_is_found(tiny_gpt2: Host) -> None:
    """Two scales are known by then, and the one that is wanted is a hundredth of both."""
    patch, base = shove(tiny_gpt2, 1.0), gate.baseline(tiny_gpt2, TEXT)
    wide = gate.judge(tiny_gpt2, patch, Budget(epsilon=1e-9), base).upper
    for epsilon in (wide / 2, wide / 3, wide * 1e-3):
        scaled, verdict = gate.fit(tiny_gpt2, patch, Budget(epsilon=epsilon, fixed=0.0), base)
        assert verdict.affordable and verdict.upper > 0.3 * epsilon, (epsilon, verdict.upper)
    assert verdict.scale < 0.03
