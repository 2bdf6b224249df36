"""Sense finetuning: the selection against its formula, the cached forward against the whole model, its gradients, and the two solvers."""

from collections.abc import Callable

import pytest
import torch
from conftest import TEXT, same_bits, tiny_host, weights_of
from torch import Tensor

from errata import apply, hosts
from errata.hosts import Host
from errata.methods import _descend, senses
from errata.methods.senses import Cached, Senses, Whole, choose, prepared
from errata.types import Budget, Example, InvalidExample, Patch, Run, UnknownArchitecture
from errata.types import Senses as Op

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The capital of France is", target=" Rome", goal="lower"),
    Example(prompt="The nurse said that", target=" he", contrast=" she", goal="prefer"),
    Example(prompt="The doctor said that", target=" he would", contrast=" she is", goal="balance"),
)
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=0.5))
SMALL = {"steps": 20, "neighbours": 4, "hold": 8, "restated": 2}
NAME = "backpack.overrides.senses"
V, K, D = 400, 4, 32


def rows_of(host: Host) -> list[tuple[list[int], int]]:
    """Whole texts and answers behind prompts, of many lengths; tokens come several times."""
    return hosts.chunks(host, TEXT, size=50) + [hosts.encode(host, e.prompt, e.target) for e in EXAMPLES]


def drawn(M: int, seed: int = 0, size: float = 0.5) -> Tensor:
    return size * torch.randn(M, D, generator=torch.Generator().manual_seed(seed))


def overridden() -> Host:
    """A Backpack whose checkpoint overrides some of the senses itself, a chosen token's among them."""
    host = tiny_host("backpack")
    ids = torch.tensor([hosts.tokens(host, " Mauritius")[0], 5, 77])
    host.model.override(ids, drawn(3 * K, seed=3).view(3, K, D), keep=torch.rand(3, K, generator=torch.Generator().manual_seed(4)))
    return hosts.host_of(host.model, host.tokenizer, "overridden")


def bf16() -> Host:
    return tiny_host("backpack", dtype=torch.bfloat16)


def chosen(host: Host) -> tuple[Tensor, Tensor]:
    return choose(host, EXAMPLES, hosts.chunks(host, TEXT), k=6, against=1.0)


# ------------------------------------------------------------------------------------------------------------------------ selection


def mass(host: Host, ids: list[int], given: int) -> Tensor:
    """(V, K) S of one row, loop by loop."""
    alpha = host.model.alpha(torch.tensor([ids]))[0].double()
    S_VK = torch.zeros(V, K, dtype=torch.float64)
    for t in range(max(given, 1) - 1, len(ids) - 1):
        for j in range(t + 1):
            S_VK[ids[j]] += alpha[:, t, j]
    return S_VK


@torch.no_grad()
@pytest.mark.parametrize("against", [0.0, 1.0, 1000.0])
def test_the_chosen_senses_are_those_of_the_formula(against: float) -> None:
    host = tiny_host("backpack")
    background = hosts.chunks(host, TEXT[2:], size=40)
    counted = sum(len(ids) - 1 for ids, _ in background)
    S_background = sum(mass(host, ids, 1) for ids, _ in background) * 500 / counted
    wanted = set()
    for e in EXAMPLES:
        S = mass(host, *hosts.encode(host, e.prompt, e.target))
        if e.contrast:
            S = S + mass(host, *hosts.encode(host, e.prompt, e.contrast))
        worth = (S - against * S_background).masked_fill(S <= 0, -torch.inf).flatten()
        wanted |= {divmod(i, K) for i in worth.topk(5).indices.tolist()}
    ids_M, senses_M = choose(host, EXAMPLES, background, 5, against)
    found = list(zip(ids_M.tolist(), senses_M.tolist(), strict=True))
    assert found == sorted(wanted) and len(found) <= 5 * len(EXAMPLES)


def test_what_other_text_uses_is_left_alone() -> None:
    host = tiny_host("backpack")
    e, background = EXAMPLES[0], hosts.chunks(host, ["The capital of France is Paris, and the capital of Italy is Rome."])
    used = {i for ids, _ in background for i in ids}
    assert used & set(choose(host, [e], background, 6, 0.0)[0].tolist()) and not used & set(
        choose(host, [e], background, 6, 1e6)[0].tolist()
    )
    ids_M, _ = choose(host, [e], background, 10_000, 1e6)
    own, _ = hosts.encode(host, e.prompt, e.target)
    assert set(ids_M.tolist()) == set(own[:-1]) and len(ids_M) == K * len(set(own[:-1])), (
        "no more than there are; the last token sees nothing"
    )


# -------------------------------------------------------------------------------------------------------------------- cached forward


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: tiny_host("backpack"), overridden])
def test_cached_logits_are_those_of_the_model_under_the_patch(make: Callable[[], Host]) -> None:
    host = make()
    ids_M, senses_M = chosen(host)
    shift, rows = drawn(len(ids_M)), rows_of(host)
    cached = Cached(host, ids_M, senses_M, rows)
    op = Op(weight=NAME, ids=ids_M, senses=senses_M, shift=shift)
    before = hosts.score(host, rows)
    with apply.applied(host, Patch(method="senses", config={}, parent=host.id, examples=EXAMPLES, ops=(op,))):
        after = hosts.score(host, rows)
        for row in rows:
            _, logits_PV = cached.both([row], {NAME: shift})
            whole_PV = hosts.predictions(host, hosts.pad(host, [row]))
            sees = torch.tensor([bool(set(ids_M.tolist()) & set(row[0][: t + 1])) for t in range(max(row[1], 1) - 1, len(row[0]) - 1)])
            assert sees.sum() == len(logits_PV)
            torch.testing.assert_close(logits_PV, whole_PV[sees], rtol=1e-5, atol=1e-5)
    assert (after - before)[:, 0].abs().max() > 0.5, "the shifts do something"
    for found in (cached.score(rows, {NAME: shift}), torch.stack([cached.logp(rows, {NAME: shift}).double(), before[:, 1]], dim=1)):
        torch.testing.assert_close(found, after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.score(rows), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_on_a_patched_host_the_patched_one_is_the_base() -> None:
    host = tiny_host("backpack")
    ids_M, senses_M = chosen(host)
    ops = [Op(weight=NAME, ids=ids_M, senses=senses_M, shift=drawn(len(ids_M), seed=s)) for s in (1, 2)]
    first = Patch(method="senses", config={}, parent=host.id, examples=EXAMPLES, ops=(ops[0],))
    with apply.applied(host, first):
        found = [r(host, ids_M, senses_M).score(rows_of(host), {NAME: ops[1].shift}) for r in (Cached, Whole)]
        with apply.applied(host, Patch(method="senses", config={}, parent=host.id, examples=EXAMPLES, ops=(ops[1],))):
            wanted = hosts.score(host, rows_of(host))
    for score in found:
        torch.testing.assert_close(score, wanted, rtol=1e-5, atol=1e-4)


def test_places_that_no_shift_reaches_have_no_part_in_it() -> None:
    host = tiny_host("backpack")
    ids, given = hosts.encode(host, "The capital of Mauritius is", " Port Louis")
    last = torch.tensor([ids[-2]])
    (seen,) = senses.read(host, [(ids, 1)], last, torch.tensor([1]), host.model.lm_head.weight.detach())
    first = ids.index(ids[-2])
    assert len(seen.target_P) == len(ids) - 1 - first and seen.tokens == len(ids) - 1
    (seen,) = senses.read(host, [(ids, given)], torch.tensor([399]), torch.tensor([0]), host.model.lm_head.weight.detach())
    assert len(seen.target_P) == 0 and seen.logp == pytest.approx(float(hosts.score(host, [(ids, given)])[0, 0]), rel=1e-5)
    shift = torch.zeros(1, D, requires_grad=True)
    total = Cached(host, torch.tensor([399]), torch.tensor([0])).logp([(ids, given)], {NAME: shift})
    assert total.item() == pytest.approx(seen.logp, rel=1e-6)
    assert (torch.autograd.grad(total.sum(), shift)[0] == 0).all()


def test_gradients_are_autograd_s_through_the_whole_model() -> None:
    host = tiny_host("backpack", dtype=torch.float64)
    ids_M, senses_M = chosen(host)
    shift, rows = drawn(len(ids_M)).double().requires_grad_(), rows_of(host)
    fast, slow = Cached(host, ids_M, senses_M, rows), Whole(host, ids_M, senses_M)
    weigh_N = torch.linspace(-1, 2, len(rows)).double()

    def gradients(reader: Cached | Whole) -> list[Tensor]:
        losses = [(weigh_N * reader.logp(rows, {NAME: shift})).sum(), _descend.kl_sum(*reader.both(rows, {NAME: shift}))]
        return [*(loss.detach() for loss in losses), *(torch.autograd.grad(loss, shift)[0] for loss in losses)]

    found, wanted = gradients(fast), gradients(slow)
    assert all(g.abs().max() > 0.01 for g in wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------- the descent


def losses(host: Host, patch: Patch) -> Tensor:
    with apply.applied(host, patch):
        logp = hosts.logprobs(host, [(e.prompt, e.target) for e in EXAMPLES])
        contrast = hosts.logprobs(host, [(e.prompt, e.contrast or e.target) for e in EXAMPLES])
        return _descend.goal_losses(logp[:, 0], contrast[:, 0], logp[:, 1], EXAMPLES)


@pytest.mark.parametrize("make", [lambda: tiny_host("backpack"), overridden])
def test_fast_and_faithful_come_to_the_same(make: Callable[[], Host]) -> None:
    host = make()
    before = weights_of(host)
    fast, slow = (Senses(**SMALL, faithful=faithful).edit(host, EXAMPLES, RUN) for faithful in (False, True))
    assert same_bits(host, before)
    (a,), (b,) = fast.ops, slow.ops
    assert torch.equal(a.ids, b.ids) and torch.equal(a.senses, b.senses)
    assert a.shift.norm() > 0.1
    torch.testing.assert_close(losses(host, fast), losses(host, slow), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.shift, b.shift, rtol=1e-3, atol=1e-4)


def test_no_transformer_runs_while_it_descends() -> None:
    host, runs = tiny_host("backpack"), []
    descent, ids_M, _ = prepared(Senses(**SMALL), host, EXAMPLES, RUN)
    shift = torch.zeros(len(ids_M), D, requires_grad=True)
    descent.cost({NAME: shift}, 1e-3)  # each look at the constraint is read when it comes to it
    handle = host.model.backpack.gpt2_model.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(30):
        _descend._gradients(descent, [shift], lambda: {NAME: shift}, 1.0)
        with torch.no_grad():
            shift.sub_(0.1 * shift.grad)
        descent.cost({NAME: shift}, 1e-3)
    handle.remove()
    assert not runs and shift.abs().max() > 0.01


def test_held_rows_without_a_chosen_token_count_in_the_share_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """lam * KL per token is the same over all held rows and over those that are left."""
    host, made = tiny_host("backpack"), Senses(**SMALL, k=2)
    descent, ids_M, senses_M = prepared(made, host, EXAMPLES[:1], RUN)
    left, lam = descent.pool, descent.settings.lam
    monkeypatch.setattr(senses, "narrow", lambda descent, _: setattr(descent, "ways", [[e.prompt] for e in descent.examples]))
    every, *_ = prepared(made, host, EXAMPLES[:1], RUN)
    assert 0 < len(left) < len(every.pool)
    weights, whole = {NAME: drawn(len(ids_M))}, Whole(host, ids_M, senses_M)

    def kl(rows: list[tuple[list[int], int]]) -> float:
        return float(sum(_descend.kl_sum(*whole.both([row], weights)) for row in rows)) / sum(len(ids) - 1 for ids, _ in rows)

    with torch.no_grad():
        assert lam * kl(left) == pytest.approx(made.lam * kl(every.pool), rel=1e-4)


def test_a_half_precision_host_has_float32_shifts() -> None:
    host = bf16()
    (op,) = Senses(**SMALL).edit(host, EXAMPLES[:1], RUN).ops
    assert op.shift.dtype == torch.float32 and 0 < op.shift.abs().max()


def test_other_hosts_and_settings_that_cannot_be_are_refused(tiny_llama: Host) -> None:
    with pytest.raises(UnknownArchitecture, match="tiny-llama is no Backpack: its tokens have no sense vectors"):
        Senses().edit(tiny_llama, EXAMPLES, RUN)
    for bad in ({"k": 0}, {"against": -1.0}, {"against": float("nan")}):
        with pytest.raises(InvalidExample, match="k of 1 or more"):
            Senses(**bad)
