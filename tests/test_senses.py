"""Sense finetuning: the selection against its formula, the cached forward against the whole model, its gradients, and the two solvers."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import TEXT, same_bits, tiny_host, weights_of
from torch import Tensor

from errata import apply, hosts
from errata.hosts import Host
from errata.methods import _descend, senses
from errata.methods.senses import Cached, Problem, Senses, Whole, choose, minimise, prepared
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


def scored(reader: Cached, rows: list[tuple[list[int], int]], shift: Tensor | None = None) -> Tensor:
    """(N,) log-probability of the scored tokens of each row."""
    places = reader.places(rows)
    return places.by_row(places.logp(reader.E_VD, 0.0 if shift is None else places.moved(shift))).double()


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
            places = cached.places([row])
            logits_PV = (places.out_PD + places.moved(shift)) @ cached.E_VD.T
            whole_PV = hosts.predictions(host, hosts.pad(host, [row]))
            sees = torch.tensor([bool(set(ids_M.tolist()) & set(row[0][: t + 1])) for t in range(max(row[1], 1) - 1, len(row[0]) - 1)])
            assert sees.sum() == len(places.reached().target_P)
            torch.testing.assert_close(logits_PV, whole_PV, rtol=1e-5, atol=1e-5)
    assert (after - before)[:, 0].abs().max() > 0.5, "the shifts do something"
    torch.testing.assert_close(scored(cached, rows, shift), after[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored(cached, rows), before[:, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_on_a_patched_host_the_patched_one_is_the_base() -> None:
    host = tiny_host("backpack")
    ids_M, senses_M = chosen(host)
    ops = [Op(weight=NAME, ids=ids_M, senses=senses_M, shift=drawn(len(ids_M), seed=s)) for s in (1, 2)]
    first = Patch(method="senses", config={}, parent=host.id, examples=EXAMPLES, ops=(ops[0],))
    with apply.applied(host, first):
        cached = scored(Cached(host, ids_M, senses_M), rows_of(host), ops[1].shift)
        whole = Whole(host, ids_M, senses_M).score(rows_of(host), {NAME: ops[1].shift})[:, 0]
        with apply.applied(host, Patch(method="senses", config={}, parent=host.id, examples=EXAMPLES, ops=(ops[1],))):
            wanted = hosts.score(host, rows_of(host))[:, 0]
    for score in (cached, whole):
        torch.testing.assert_close(score, wanted, rtol=1e-5, atol=1e-4)


def test_places_that_no_shift_reaches_have_no_part_in_it() -> None:
    host = tiny_host("backpack")
    ids, _ = hosts.encode(host, "The capital of Mauritius is", " Port Louis")
    places = Cached(host, torch.tensor([ids[-2]]), torch.tensor([1])).places([(ids, 1)])
    assert len(places.reached().target_P) == len(ids) - 1 - ids.index(ids[-2]) and len(places.target_P) == len(ids) - 1
    places = Cached(host, torch.tensor([399]), torch.tensor([0])).places([(ids, 1)])
    assert len(places.reached().target_P) == 0 and not places.moved(drawn(1)).any() and not places.pulled(drawn(len(ids) - 1)).any()


@torch.no_grad()
def test_what_was_expected_is_the_gradient_of_log_z() -> None:
    E, out = drawn(V).double(), drawn(70, seed=1, size=2.0).double()
    with torch.enable_grad():
        wanted = (leaf := out.clone().requires_grad_()) @ E.T
        (mean,) = torch.autograd.grad(wanted.logsumexp(-1).sum(), leaf)
    found = senses.expected(out, E)
    torch.testing.assert_close(found, (wanted.detach().logsumexp(-1), mean), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------- the descent


def losses(host: Host, patch: Patch) -> Tensor:
    with apply.applied(host, patch):
        logp = hosts.logprobs(host, [(e.prompt, e.target) for e in EXAMPLES])
        contrast = hosts.logprobs(host, [(e.prompt, e.contrast or e.target) for e in EXAMPLES])
        return _descend.goal_losses(logp[:, 0], contrast[:, 0], logp[:, 1], EXAMPLES)


CONVEX = (EXAMPLES[0], Example(prompt="The capital of France is", target=" Rome"))  # and smooth: `balance` has a kink where it is reached


def objective(host: Host, descent: _descend.Descent, quadratic: senses.Quadratic, through: Whole, shift_MD: Tensor, lam: float) -> Tensor:
    """What is minimised, written out, and read through every layer."""
    weights, task = {NAME: shift_MD}, torch.zeros((), dtype=torch.float64)
    for e, ways in zip(descent.examples, descent.ways, strict=True):
        for prompt in ways:
            rows = [hosts.encode(host, prompt, answer) for answer in (e.target, e.contrast or e.target)]
            logp, contrast = (through.logp([row], weights) for row in rows)
            count = torch.tensor([float(len(rows[0][0]) - rows[0][1])])
            task = task + _descend.goal_losses(logp, contrast, count, [e])[0] / (len(ways) * len(descent.examples))
    kl = sum(_descend.kl_sum(*through.both([row], weights)) for row in descent.pool) / sum(len(ids) - 1 for ids, _ in descent.pool)
    return task + lam * (kl + quadratic.ridge(weights))


def test_gradients_are_autograd_s_through_the_whole_model() -> None:
    host = tiny_host("backpack", dtype=torch.float64)
    descent, quadratic, reader = prepared(Senses(**SMALL), host, EXAMPLES, RUN)
    problem, through = Problem(descent, quadratic, reader, whole=True), Whole(host, reader.ids_M, reader.senses_M)
    leaf = drawn(len(reader.ids_M)).double().requires_grad_()
    wanted = objective(host, descent, quadratic, through, leaf, 30.0)
    (grad,) = torch.autograd.grad(wanted, leaf)
    _, found, found_MD = problem.gradient(leaf.detach(), 30.0)
    assert found == pytest.approx(wanted.item(), rel=1e-9) and grad.abs().max() > 0.01
    torch.testing.assert_close(found_MD, grad, rtol=1e-9, atol=1e-9)


def test_the_fast_solver_finds_the_optimum_that_the_whole_model_has() -> None:
    """The gradient of the objective, written out and taken through every layer, is zero where the cached solver ends."""
    host, lam = tiny_host("backpack", dtype=torch.float64), 30.0
    descent, quadratic, reader = prepared(Senses(**SMALL), host, CONVEX, RUN)
    problem, through = Problem(descent, quadratic, reader, whole=True), Whole(host, reader.ids_M, reader.senses_M)

    def gradient(shift_MD: Tensor) -> Tensor:
        leaf = shift_MD.clone().requires_grad_()
        return torch.autograd.grad(objective(host, descent, quadratic, through, leaf, lam), leaf)[0]

    zero = torch.zeros(len(reader.ids_M), D, dtype=torch.float64)
    found, task = problem.solve(zero, lam, iterations=300)
    assert gradient(found).norm() < 1e-4 * gradient(zero).norm()
    told = problem.gradient(found, lam)[:2]
    with torch.no_grad():
        least = float(objective(host, descent, quadratic, through, found, lam))
        assert least < 0.9 * float(objective(host, descent, quadratic, through, zero, lam))
        assert told == pytest.approx((task, least), rel=1e-9)
        for seed in range(3):
            away = drawn(len(zero), seed)
            moved = found + 0.1 * found.norm() * away / away.norm()
            assert float(objective(host, descent, quadratic, through, moved, lam)) > least


@torch.no_grad()
def test_what_a_point_costs_is_what_the_whole_model_loses_on_the_checked_documents() -> None:
    host = tiny_host("backpack", dtype=torch.float64)
    descent, quadratic, reader = prepared(Senses(**SMALL, against=0.0), host, EXAMPLES, RUN)
    problem, through = Problem(descent, quadratic, reader), Whole(host, reader.ids_M, reader.senses_M)
    shift, rows = drawn(len(reader.ids_M)).double(), senses.checked_rows(descent)
    assert len(rows) < senses.SURPRISED, "the mean loss is that of all"
    before, after = through.score(rows), through.score(rows, {NAME: shift})
    mean, upper = (hosts.increase(problem.before_N2, problem.after(shift), z)[1] for z in (0.0, senses.SAFE))
    assert mean == pytest.approx(hosts.increase(before, after)[0], abs=1e-5) and mean > 1e-3
    assert upper == pytest.approx(hosts.increase(before, after, senses.SAFE)[1], rel=1e-2)
    cost, new = problem.check(shift)
    assert cost >= upper and new == len(problem.hurt.row_P) > 0
    assert problem.check(float("nan") * shift)[0] != problem.check(shift)[0] >= upper, "a NaN is no small cost"


def test_the_second_order_of_the_kl_is_its_hessian_averaged() -> None:
    host = tiny_host("backpack", dtype=torch.float64)
    ids_M, senses_M = chosen(host)
    rows, shift = rows_of(host), drawn(len(ids_M), size=1.0).double()
    cached = Cached(host, ids_M, senses_M, rows)
    quadratic = senses.Quadratic(cached, rows, len(ids_M), ridge=2.0)
    seen, out_PD = cached._find(rows), cached.places(rows).reached().out_PD

    def kl(delta_D: Tensor, out_D: Tensor) -> Tensor:
        p, q = ((o @ cached.E_VD.T).log_softmax(-1) for o in (out_D, out_D + delta_D))
        return (p.exp() * (p - q)).sum()

    G_DD = sum(torch.autograd.functional.hessian(lambda d, o=o: kl(d, o), torch.zeros(D).double()) for o in out_PD) / len(out_PD)
    centred_VD = cached.E_VD - cached.E_VD.mean(0)
    G_DD = G_DD + senses.UNSURE * centred_VD.T @ centred_VD / V
    torch.testing.assert_close(quadratic.G_DD, G_DD, rtol=1e-6, atol=1e-9)

    def value(shift_MD: Tensor) -> Tensor:
        total, energy = torch.zeros(()).double(), torch.zeros(len(ids_M)).double()
        tokens = sum(len(ids) - 1 for ids, _ in rows)
        for s in seen:
            for place in range(len(s.target_P)):
                a_M = torch.zeros(len(ids_M)).double().index_add(0, s.sense_Z[s.place_Z == place], s.alpha_Z[s.place_Z == place])
                total, energy = total + (a_M @ shift_MD) @ G_DD @ (a_M @ shift_MD) / (2 * tokens), energy + a_M**2 / tokens
        return total + 2.0 / 2 * energy.mean() * sum(d @ G_DD @ d for d in shift_MD)

    leaf = shift.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(value(leaf), leaf)
    found, grad = quadratic.gradient(shift, alone=False)
    assert found == pytest.approx(float(value(shift)), rel=1e-9)
    torch.testing.assert_close(grad, wanted, rtol=1e-7, atol=1e-10)
    (wanted,) = torch.autograd.grad(quadratic.ridge({NAME: leaf}), leaf)
    torch.testing.assert_close(quadratic.gradient(shift, alone=True)[1], wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: tiny_host("backpack"), overridden])
def test_inside_one_ball_the_fast_solver_gets_as_far_as_the_faithful_loop(make: Callable[[], Host]) -> None:
    host = make()
    before = weights_of(host)
    fast, slow = (Senses(**SMALL, faithful=faithful).edit(host, EXAMPLES, RUN) for faithful in (False, True))
    assert same_bits(host, before)
    (a,), (b,) = fast.ops, slow.ops
    assert torch.equal(a.ids, b.ids) and torch.equal(a.senses, b.senses) and a.shift.norm() > 0.1 and b.shift.norm() > 0.1
    none = Patch(method="none", config={}, parent=host.id, examples=(), ops=())
    assert losses(host, fast).mean() <= 1.01 * losses(host, slow).mean() < 0.97 * losses(host, none).mean()


def test_no_transformer_runs_while_it_solves() -> None:
    host, runs = tiny_host("backpack"), []
    descent, quadratic, reader = prepared(Senses(**SMALL), host, EXAMPLES, RUN)
    handle = host.model.backpack.gpt2_model.register_forward_hook(lambda *_: runs.append(1))
    found = minimise(descent, quadratic, reader, RUN)
    handle.remove()
    assert not runs and found.abs().max() > 0.01


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4])
@pytest.mark.parametrize("first", [0.3, 20.0])
def test_it_comes_to_rest_near_the_edge_of_any_ball_and_inside(monkeypatch: pytest.MonkeyPatch, epsilon: float, first: float) -> None:
    """Also with a standard error on top: the gate bounds what it cannot know, and what it has to scale loses most of what it did. What the
    first lam gives costs `first` times what is allowed."""
    asked: list[float] = []

    def check(_: Problem, shift: Tensor) -> tuple[float, int]:
        asked.append(float(shift.square().sum()))
        return first * epsilon * asked[-1] / asked[0], 0

    monkeypatch.setattr(Problem, "check", check)
    run = replace(RUN, budget=Budget(epsilon=epsilon))
    found = minimise(*prepared(Senses(**SMALL), tiny_host("backpack"), EXAMPLES[:1], run), run)
    assert senses.SAFE >= 1 and senses.NEAR * epsilon <= first * epsilon * float(found.square().sum()) / asked[0] <= epsilon


def test_a_text_that_shows_no_cost_does_not_let_it_run_away(monkeypatch: pytest.MonkeyPatch) -> None:
    descent, quadratic, reader = prepared(Senses(**SMALL), tiny_host("backpack"), EXAMPLES[:1], RUN)
    lams, solve = [], Problem.solve
    monkeypatch.setattr(Problem, "check", lambda *_: (0.0, 0))
    monkeypatch.setattr(Problem, "solve", lambda self, x, lam: lams.append(lam) or solve(self, x, lam))
    minimise(descent, quadratic, reader, RUN)
    first = descent.settings.lam * math.sqrt(senses.WIDE / RUN.budget.epsilon)
    assert lams == pytest.approx([first / senses.LAM_STEP**i for i in range(3)])


def test_held_rows_without_a_chosen_token_count_in_the_share_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """lam * KL per token is the same over all held rows and over those that are left."""
    host, made = tiny_host("backpack"), Senses(**SMALL, k=2)
    descent, _, reader = prepared(made, host, EXAMPLES[:1], RUN)
    left, lam = descent.pool, descent.settings.lam
    monkeypatch.setattr(senses, "narrow", lambda descent, *_: setattr(descent, "ways", [[e.prompt] for e in descent.examples]))
    every, *_ = prepared(made, host, EXAMPLES[:1], RUN)
    assert 0 < len(left) < len(every.pool)
    weights, whole = {NAME: drawn(len(reader.ids_M))}, Whole(host, reader.ids_M, reader.senses_M)

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
    for bad in ({"k": 0}, {"against": -1.0}, {"against": float("nan")}, {"ridge": 0.0}):
        with pytest.raises(InvalidExample, match="k of 1 or more"):
            Senses(**bad)
