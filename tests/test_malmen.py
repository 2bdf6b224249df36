"""malmen: its formula, that it learns, other ways to ask, and its rows as things that are kept."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from conftest import TEXT, tiny_host
from test_meta import CASES, malmen, mend
from torch import Tensor

from errata import apply, hosts
from errata.hosts import Host
from errata.methods import _gradients, _hyper, _keys, _meta, _normal
from errata.methods import malmen as room
from errata.methods._descend import kl_sum
from errata.methods._normal import Whitened
from errata.methods._restated import Spoken
from errata.methods.malmen import Malmen
from errata.types import AddLowRank, Budget, Example, InvalidExample, InvalidPatch, Rows, Run, State, Summed, WrongBase

EXAMPLES = tuple(c.example for c in CASES)
RUN = Run(hold=TEXT * 2, budget=Budget(epsilon=10.0))
both_orientations = pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)


def prepared(host: Host, method: Any = None, **more: Any) -> Run:
    return dataclasses.replace(RUN, state=(method or malmen(**more)).prepare(host, CASES, RUN))


def changes(host: Host, rows: tuple[Rows, ...], run: Run, method: Any = None) -> dict[str, Tensor]:
    return {op.weight: apply.change(host, op) for op in (method or malmen()).solve(host, rows, run).ops}


@both_orientations
@pytest.mark.parametrize("settings", [{}, {"prior": "I"}, {"prior": "U"}, {"tokens": "all"}, {"faithful": True}], ids=str)
def test_the_shift_is_the_formula(host: Host, settings: dict[str, Any]) -> None:
    """S = (K^T K + lam P)^-1 K^T D, written out densely; in both forms of the solve, for "all" has more rows than a key is wide."""
    method = malmen(steps=2, **settings)
    run = prepared(host, method)
    assert run.state is not None
    _, net = _meta.known(method, "malmen", host, run.state, ())
    rows = method.rows(host, EXAMPLES, run)
    got = changes(host, rows, run, method)
    covariances, _ = _keys.covariances(host, run.hold, run.state.config["modules"], method.per_key)
    for module, (keys, g) in _gradients.together(host, rows, run.state.config["modules"], 64 if settings.get("faithful") else None).items():
        K, C = keys.double(), covariances[module].double()
        eye = torch.eye(len(C)).double()
        units = {"C": len(C) * (C + 1e-3 * C.diagonal().mean() * eye), "I": C.trace() * eye}
        if method.prior == "U":
            basis, unit = _keys.null_space(C, 0.02)
            keys, units["U"] = basis.into(K), unit * torch.eye(basis.width).double()
        X = K if method.prior != "U" else keys
        P = eye if method.faithful else units[method.prior]
        D = _hyper.differences(net, module, K.to(g), g).detach().double()
        S = torch.linalg.solve(X.T @ X + _hyper.lam(net, module) * P, X.T @ D)
        S = basis.back(S) if method.prior == "U" else S
        wanted = S if hosts.stored_transposed(host.model.get_submodule(module)) else S.T
        assert float((got[f"{module}.weight"].double() - wanted).norm()) < 1e-4 * float(wanted.norm())


@both_orientations
def test_it_learns_to_carry_edits_to_other_phrasings(host: Host) -> None:
    """On cases that it did not see; what comes of it is better than what an untrained network does, in what it was trained for."""
    kept: list[State] = []
    method = malmen(steps=24, every=3, lr=1e-3, rate=0.1, share=0.1, hold_weight=1.0)
    state = method.prepare(host, CASES, dataclasses.replace(RUN, keep=kept.append))
    untrained = malmen(steps=1, every=1, lr=1e-12, rate=1e-12, share=0.1, hold_weight=1.0).prepare(host, CASES, RUN).config["best_loss"]
    assert state.config["best_loss"] < 0.98 * untrained and state.config["best_step"] > 0
    assert state.config["best_loss"] == min(s.config["best_loss"] for s in kept)


@both_orientations
def test_its_rows_may_come_in_any_order_and_one_that_is_left_out_was_never_there(host: Host) -> None:
    method, run = malmen(), prepared(host)
    assert isinstance(method, Summed)
    a, b, c = method.rows(host, EXAMPLES[:3], run)
    whole, back = changes(host, (a, b, c), run), changes(host, (c, b, a), run)
    assert all(torch.equal(whole[w], back[w]) for w in whole)
    left = changes(host, (a, c), run)
    alone = {op.weight: apply.change(host, op) for op in method.edit(host, (EXAMPLES[0], EXAMPLES[2]), run).ops}
    for weight in left:
        assert float((left[weight] - alone[weight]).norm()) < 1e-4 * float(alone[weight].norm())
        assert not torch.allclose(left[weight], whole[weight])
    with pytest.raises(WrongBase, match="were taken on weights"):
        changes(tiny_host("llama", seed=1), (a,), run)


def test_the_patch_names_its_state_and_few_rows_are_kept_as_factors(tiny_llama: Host) -> None:
    run = prepared(tiny_llama)
    assert run.state is not None
    few, all_of_them = malmen().edit(tiny_llama, EXAMPLES[:1], run), malmen(tokens="all")
    many = all_of_them.edit(tiny_llama, EXAMPLES, prepared(tiny_llama, all_of_them))
    assert few.config["state"] == run.state.id
    assert all(isinstance(op, AddLowRank) for op in few.ops) and not any(isinstance(op, AddLowRank) for op in many.ops)
    assert [op.weight for op in few.ops] == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)], "from the first to the last"


def test_modules_can_be_named(tiny_llama: Host) -> None:
    method = malmen(modules="model.layers.0.mlp, model.layers.1.mlp.down", steps=2)
    patch = method.edit(tiny_llama, EXAMPLES[:2], prepared(tiny_llama, method))
    names = [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")] + ["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(InvalidExample, match="is about"):
        malmen(modules="model.layers.1.mlp.down").edit(tiny_llama, EXAMPLES[:2], prepared(tiny_llama, method))
    assert [op.weight for op in patch.ops] == names


def test_held_text_raises_lam_until_the_budget_is_kept(tiny_llama: Host) -> None:
    run = prepared(tiny_llama, modules="model.layers.1.mlp.down_proj")
    sizes = []
    for epsilon in (10.0, 1e-4):
        within = dataclasses.replace(run, budget=Budget(epsilon=epsilon))
        patch = malmen(held=12, modules="model.layers.1.mlp.down_proj").edit(tiny_llama, EXAMPLES[:2], within)
        sizes.append(float(sum(apply.change(tiny_llama, op).norm() for op in patch.ops)))
    assert sizes[1] < 0.7 * sizes[0]


@both_orientations
def test_a_further_round_asks_for_what_is_still_missing(host: Host) -> None:
    """Written out: the rows on the edited weights, solved and added to what was there."""
    run = prepared(host)
    one, two = (malmen(rounds=n, caution=1.0, spared=0).edit(host, EXAMPLES, run) for n in (1, 2))
    first = {op.weight: apply.change(host, op) for op in one.ops}
    with apply.applied(host, one):
        again = malmen(rounds=1).edit(host, EXAMPLES, run)
        more = {op.weight: apply.change(host, op) for op in again.ops}
    for op in two.ops:
        wanted = first[op.weight] + more[op.weight]
        assert float((apply.change(host, op) - wanted).norm()) < 1e-3 * float(wanted.norm())
        assert float(more[op.weight].norm()) > 1e-2 * float(first[op.weight].norm())


def test_each_round_may_use_its_share_of_the_budget(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a part of the documents and roughly, but for the last one; none begins with more than half of the caution of the one before."""
    seen, inside = list[tuple[int, float, float, float, bool]](), _keys.inside

    def watched(host: Host, still: Any, epsilon: float, lam: float, solved: Any, spread: Any, onto: Any, further: float = 1.02) -> Any:
        found, used = inside(host, still, epsilon, lam, solved, spread, onto, further)
        seen.append((len(still), epsilon, lam, used, onto is None))
        return found, 5 * lam  # as if the budget had asked for it

    monkeypatch.setattr(_keys, "inside", watched)
    monkeypatch.setattr(room, "LEAST", 2)
    hold = (*RUN.hold, *(f"The mill number {i} stands by the old river." for i in range(12)))
    run = dataclasses.replace(prepared(tiny_llama), budget=Budget(epsilon=1e-5), hold=hold)
    malmen(rounds=3, held=12, spared=0).edit(tiny_llama, EXAMPLES, run)
    still, epsilons, begun, used, first = zip(*seen, strict=True)
    assert still == (6, 6, 12) and epsilons == pytest.approx((1e-5 / 3, 2e-5 / 3, 1e-5)) and first == (True, False, False)
    assert begun == pytest.approx((12.0, 30.0, 1.0)) and used == pytest.approx(begun)


@both_orientations
def test_what_is_on_top_of_something_leaves_the_whole_inside(host: Host) -> None:
    name, still = f"{host.projections('mlp_out')[0]}.weight", list(TEXT[:6])
    W, rows = hosts.weight(host.model, name), hosts.chunks(host, TEXT[:6])
    leaf = W.detach().clone().requires_grad_()
    (worse,) = torch.autograd.grad(-hosts.scored_logprobs(host, hosts.pad(host, rows), {name: leaf}).sum(), leaf)
    worse = worse / worse.norm() * W.norm()
    score_N2 = hosts.score(host, rows)

    def spent(change: Tensor) -> float:
        return hosts.increase(score_N2, hosts.score(host, rows, {name: W + change}))[0]

    epsilon = 1.5 * spent(0.01 * worse)

    def solved(lam: float) -> Any:
        return (), {name: W + (0.01 + 0.5 / (1 + lam)) * worse}

    for onto, further in (({name: W + 0.01 * worse}, 1.02), (None, 1.02), ({name: W + 0.01 * worse}, 2.0)):
        (_, weights), lam = _keys.inside(host, still, epsilon, 0.0, solved, onto=onto, further=further)
        assert torch.equal(weights[name], solved(lam)[1][name]) and lam > 0.5
        assert (0.9 if further < 2.0 and onto else 0.4) * epsilon < spent(weights[name] - W) <= epsilon * (1 + 1e-6)
    (_, weights), lam = _keys.inside(host, still, 0.5 * epsilon, 0.0, solved, onto={name: W + 0.01 * worse})  # there is nothing left
    assert lam == 0.0 and float((weights[name] - W - 0.01 * worse).norm()) < 1e-4 * float(worse.norm())


@both_orientations
def test_what_a_further_round_is_not_to_make_worse_is_the_gradient_of_what_text_has_lost(host: Host) -> None:
    """KL per token from the base to the edited model, by autograd through the whole model."""
    names = [f"{m}.weight" for m in host.projections("mlp_out")]
    leaves = {name: hosts.weight(host.model, name).detach().clone() for name in names}
    torch.manual_seed(0)
    changed = {name: 0.05 * torch.randn_like(leaf) for name, leaf in leaves.items()}
    leaves = {name: (leaf + changed[name]).requires_grad_() for name, leaf in leaves.items()}
    rows = hosts.chunks(host, TEXT[:5])
    batch = hosts.pad(host, rows)
    logp, logq = (hosts.predictions(host, batch, weights).log_softmax(-1) for weights in (None, leaves))
    lost = (logp.exp() * (logp - logq)).sum() / sum(len(ids) - given for ids, given in rows)
    wanted = torch.autograd.grad(lost, [leaves[name] for name in names])
    got = malmen(batch_size=2)._worse(host, TEXT[:5], {name.removesuffix(".weight"): c for name, c in changed.items()}, RUN.spread)
    for name, grad in zip(names, wanted, strict=True):
        torch.testing.assert_close(
            _meta.stored(host, name.removesuffix(".weight"), got[name.removesuffix(".weight")]), grad, rtol=1e-3, atol=1e-6
        )


@both_orientations
@pytest.mark.parametrize("n", [2, 60])  # fewer rows than a key is wide, and more
def test_a_shift_under_a_constraint_is_that_of_the_quadratic_program(host: Host, n: int) -> None:
    """Both modules together: where least squares alone would go along what is worse, it is the nearest that does not (KKT)."""
    modules = host.projections("mlp_out")
    generator = torch.Generator().manual_seed(1)
    sums, worse, dense = {}, {}, {}
    for m in modules:
        k, v = _keys.in_out(host, m)
        K, D, g = (torch.randn(*shape, generator=generator).double() for shape in ((n, k), (n, v), (k, v)))
        root = torch.randn(2 * k, k, generator=generator).double()
        C = root.T @ root / (2 * k)
        sums[m], worse[m] = _normal.of(Whitened(L_KK=torch.linalg.cholesky(C)), K, D), g
        dense[m] = (K.T @ K + 3.0 * C, K.T @ D)
    free = {m: torch.linalg.solve(H, B) for m, (H, B) in dense.items()}
    rises = sum(float((worse[m] * free[m]).sum()) for m in modules)
    for sign in (1.0, -1.0):
        limit = {m: sign * math.copysign(1.0, rises) * g for m, g in worse.items()}
        ops, weights = _keys.of_sums(host, sums, dict.fromkeys(modules, 1.0), 3.0, worse=limit)
        got = {op.weight.removesuffix(".weight"): _meta.stored(host, op.weight.removesuffix(".weight"), op.delta).double() for op in ops}
        away = {m: torch.linalg.solve(dense[m][0], g) for m, g in limit.items()}
        mu = abs(rises) / sum(float((limit[m] * away[m]).sum()) for m in modules) if sign > 0 else 0.0
        for m in modules:
            torch.testing.assert_close(got[m], free[m] - mu * away[m], rtol=1e-4, atol=1e-5)
            change = weights[f"{m}.weight"] - hosts.weight(host.model, f"{m}.weight")
            torch.testing.assert_close(_meta.stored(host, m, change).double(), got[m], rtol=1e-4, atol=1e-5)
        if sign > 0:
            assert abs(sum(float((limit[m] * got[m]).sum()) for m in modules)) < 1e-4 * abs(rises)


def test_fewer_documents_than_none_are_refused_in_a_sentence() -> None:
    with pytest.raises(InvalidExample, match="spares 0 documents or more, got -1"):
        malmen(spared=-1)


def test_each_further_round_spares_other_documents_as_long_as_there_are_others(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = tuple(f"The mill number {i} stands by the old river." for i in range(40))
    run = dataclasses.replace(RUN, hold=hold)

    def held(rounds: int, n: int, **more: Any) -> tuple[list[str], list[list[str]]]:
        return malmen(**more)._held(tiny_llama, EXAMPLES[:n], run, rounds)

    still, spared = held(3, 1, held=10, spared=100)
    assert len(still) == 10 and [len(turn) for turn in spared] == [room.EACH] * 2, "so many for each example"
    assert len({*still, *spared[0], *spared[1]}) == 10 + 2 * room.EACH
    still, spared = held(4, 4, held=10, spared=12)
    assert [len(turn) for turn in spared] == [12] * 3 and not {*still} & {d for turn in spared for d in turn}
    assert len({d for turn in spared for d in turn}) == 30, "then they come again"
    still, spared = held(2, 4, held=100, spared=10)
    assert len(still) == 36 and len(spared[0]) == 4, "short text is shared out"
    assert held(1, 4, held=10, spared=12) == (still[:10], []) and held(2, 4, held=0, spared=0) == ([], [[]])
    monkeypatch.setattr(room, "MANY", 2)
    monkeypatch.setattr(room, "MOST", 9)
    assert [malmen(rounds=3)._rounds(n) for n in (1, 2, 4, 100)] == [3, 3, 6, 9] and malmen(rounds=1)._rounds(100) == 1


@both_orientations
def test_further_rounds_spare_what_text_has_lost(host: Host) -> None:
    """As far in the examples, text is nearer to what it was."""
    run = prepared(host, share=0.5)
    _, (spared, *_) = malmen(rounds=4)._held(host, EXAMPLES[:4], run, 4)
    batch = hosts.pad(host, hosts.chunks(host, spared))
    base_PV = hosts.predictions(host, batch)
    answers = [hosts.encode(host, e.prompt, e.target) for e in EXAMPLES[:4]]
    lost, said = [], []
    for n in (0, 2000):
        patch = malmen(rounds=4, caution=1.0, spared=n).edit(host, EXAMPLES[:4], run)
        with torch.no_grad(), apply.applied(host, patch):
            lost.append(float(kl_sum(base_PV, hosts.predictions(host, batch))))
            said.append(float(hosts.score(host, answers)[:, 0].sum()))
    start = float(hosts.score(host, answers)[:, 0].sum())
    assert lost[1] < 0.9 * lost[0] and said[1] - start > 0.9 * (said[0] - start) > 0


@both_orientations
def test_training_begins_behind_the_rounds_that_an_edit_makes(host: Host) -> None:
    run = prepared(host)
    assert run.state is not None
    method = malmen()
    _, net = _meta.known(method, "malmen", host, run.state, ())
    modules = run.state.config["modules"]
    priors = method._priors(host, modules, run.state.tensors, run.state.config["units"])
    take = functools.partial(method._pairs, host, modules=modules, ways=run.state.config["ways"], progress=RUN.progress)
    first = take(EXAMPLES)
    shifts, behind = method._earlier(host, take, priors, net, EXAMPLES, first, 2)
    with pytest.MonkeyPatch.context() as patched:  # of more rounds than two the first two
        inside = _keys.inside
        patched.setattr(_keys, "inside", lambda h, still, epsilon, lam, *rest, **more: inside(h, still, epsilon, method.caution, *rest))
        made = malmen(rounds=2, spared=0).edit(host, EXAMPLES, run)
    for op in made.ops:
        wanted = _meta.stored(host, op.weight.removesuffix(".weight"), shifts[op.weight.removesuffix(".weight")]).float()
        assert float((apply.change(host, op) - wanted).norm()) < 1e-3 * float(wanted.norm())
    with apply.applied(host, made):
        again = take(EXAMPLES)
    for m in modules:
        for mine, theirs in zip(behind[m], again[m], strict=True):
            assert float((mine - theirs).norm()) < 1e-3 * float(theirs.norm())


def test_the_training_begins_behind_any_round_but_the_last(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, earlier, graded = list[tuple[int, int]](), Malmen._earlier, _meta.Merging.graded
    steps: list[int] = []

    def at(self: Any, point: Any, *rest: Any) -> Any:
        steps.append(point.step)
        out = graded(self, point, *rest)
        steps.pop()
        return out

    def seen(self: Malmen, *given: Any) -> Any:
        taken.extend((step, given[-1]) for step in steps)
        return earlier(self, *given)

    monkeypatch.setattr(_meta.Merging, "graded", at)
    monkeypatch.setattr(Malmen, "_earlier", seen)
    malmen(steps=16, rounds=3).prepare(tiny_llama, CASES, RUN)
    assert {rounds for _, rounds in taken} == {1, 2} and min(step for step, _ in taken) < 4
    assert len(taken) < 16, "some of them begin at the beginning"


def test_rows_of_all_tokens(tiny_gpt2: Host) -> None:
    answer, every = (
        malmen(tokens=t)._rows(tiny_gpt2, EXAMPLES[:2], ["transformer.h.1.mlp.c_proj"], {}, RUN.progress) for t in ("answer", "all")
    )
    for e, few, many in zip(EXAMPLES[:2], answer, every, strict=True):
        ids, given = hosts.encode(tiny_gpt2, e.prompt, e.target)
        for few_x, many_x in ((few.keys, many.keys), (few.values, many.values)):
            (a,), (b,) = few_x.values(), many_x.values()
            assert (len(a), len(b)) == (len(ids) - given, len(ids) - 1)
            torch.testing.assert_close(b[given - 1 :], a)


@both_orientations
def test_of_each_text_the_rows_with_the_longest_gradients(host: Host) -> None:
    """In each module by itself; of the other ways to ask, too."""
    modules, ways = _meta.modules_of(host, ""), {"\0 lies in": ["Where does \0 lie? In"]}
    examples = (Example(prompt="Togo lies in", target=" Africa"), *EXAMPLES[:2])
    every = malmen(tokens="all", restated=1)._rows(host, examples, modules, ways, RUN.progress)
    plain = malmen(tokens="all", restated=0)._rows(host, examples, modules, ways, RUN.progress)
    some = malmen(tokens="all", restated=1, per_text=2)._rows(host, examples, modules, ways, RUN.progress)
    for m in modules:
        for whole, own, few in zip(every, plain, some, strict=True):
            n, wanted = len(own.keys[m]), list[int]()
            for place in (range(n), range(n, len(whole.keys[m]))):
                wanted += sorted(sorted(place, key=lambda i: -float(whole.values[m][i].norm()))[:2])  # noqa: B023
            assert len(wanted) == (4 if own is plain[0] else 2)
            torch.testing.assert_close(few.keys[m], whole.keys[m][wanted], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(few.values[m], whole.values[m][wanted], rtol=1e-4, atol=1e-6)


def test_a_row_that_is_not_finite_is_found_among_all(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, modules = _gradients.captured, _meta.modules_of(tiny_gpt2, "")

    def spoilt(host: Host, batch: Any, modules: Any, loss: Any, *rest: Any) -> Any:
        return captured(host, batch, modules, lambda logp_N: loss(logp_N) * float("nan"), *rest)

    monkeypatch.setattr(_gradients, "captured", spoilt)
    with pytest.raises(InvalidPatch, match="NaN"):
        malmen(tokens="all", per_text=1)._rows(tiny_gpt2, EXAMPLES[:2], modules, {}, RUN.progress)
    with pytest.raises(InvalidPatch, match="NaN"):
        malmen(tokens="all", per_text=1)._pairs(tiny_gpt2, EXAMPLES[:2], modules=modules, ways={}, progress=RUN.progress)


@pytest.mark.parametrize("kind", ["C", "I", "U"])
def test_a_state_keeps_its_priors(tiny_gpt2: Host, kind: str) -> None:
    method = malmen(prior=kind)
    state = prepared(tiny_gpt2, method).state
    assert state is not None
    modules = state.config["modules"]
    C, _ = _keys.covariances(tiny_gpt2, RUN.hold, modules, method.per_key)
    for m, (own, unit) in method._priors(tiny_gpt2, modules, state.tensors, state.config["units"]).items():
        fresh, wanted = method._prior(C[m].double())
        assert type(own) is type(fresh) and own.width == fresh.width and unit == pytest.approx(wanted)
        if kind == "C":
            torch.testing.assert_close(
                own.L_KK.tril() @ own.L_KK.tril().T, fresh.P_KK, rtol=1e-5, atol=1e-6 * float(fresh.P_KK.diagonal().mean())
            )
            torch.testing.assert_close(own.P_KK, fresh.P_KK, rtol=1e-5, atol=1e-6 * float(fresh.P_KK.diagonal().mean()))
    older = {name: value for name, value in state.config.items() if name != "units"}  # one that an earlier version began
    with pytest.raises(InvalidExample, match="begin afresh"):
        method.prepare(tiny_gpt2, CASES, dataclasses.replace(RUN, state=dataclasses.replace(state, config=older | {"unfinished": True})))
    short = dataclasses.replace(state, config={**state.config, "units": {}})
    with pytest.raises(InvalidExample, match="knows nothing of"):
        method.edit(tiny_gpt2, EXAMPLES, dataclasses.replace(RUN, state=short))


# ------------------------------------------------------------------------------------------------------------------------ other phrasings


def test_an_example_is_asked_in_the_ways_of_its_kind() -> None:
    ways = {
        "The capital of \0 is": ["\0 has its capital in", "Ask in \0 for the seat of \0:", "The seat of \0 is"],
        "The \0 is": ["What is the \0?"],
    }
    e = Example(prompt="The capital of San Marino is", target=" Rome", subject="San Marino")
    found = room.restatements(e, ways, 2)
    assert [o.prompt for o in found] == ["San Marino has its capital in", "Ask in San Marino for the seat of San Marino:"]
    assert all(o.target == " Rome" and o.goal == "raise" for o in found)
    assert [o.prompt for o in room.restatements(Example(prompt="The sea is", target=" blue"), ways, 2)] == ["What is the sea?"]
    assert room.restatements(Example(prompt="Lily loved", target=" it"), ways, 2) == [] == room.restatements(e, ways, 0)
    twice = {"\0, or \0, is": ["\0 is"]}
    assert room.restatements(Example(prompt="Rome, or Paris, is", target=" far"), twice, 1) == []
    assert [o.prompt for o in room.restatements(Example(prompt="Rome, or Rome, is", target=" far"), twice, 1)] == ["Rome is"]


def test_phrasings_that_the_text_has_are_kept_by_kind(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest first; asked of a few examples of each kind."""
    asked: list[Example] = []

    def spoken(host: Host, examples: Any, seen: Any, n: int) -> list[Spoken]:
        asked.extend(examples)
        return [Spoken(topic=e.subject or "", old=" Rome", first=0) for e in examples]

    def found(host: Host, examples: Any, *_: Any) -> list[list[str]]:
        return [
            [f"{e.subject} has", f"Of {e.subject} it is"] if i else [f"Of {e.subject} it is", "no slot"] for i, e in enumerate(examples)
        ]

    monkeypatch.setattr(room, "spoken_of", spoken)
    monkeypatch.setattr(room, "restated", found)
    names = ("Mauritius", "France", "Italy", "Togo", "Kenya", "Peru", "Chad", "Mali")
    examples = [Example(prompt=f"The capital of {n} is", target=" Rome", subject=n) for n in names]
    ways = room.phrasings(tiny_gpt2, examples, TEXT, 3, 0)
    assert ways == {"The capital of \0 is": ["Of \0 it is", "\0 has"]} and len(asked) == room.KIND < len(names)
    assert room.phrasings(tiny_gpt2, examples, TEXT, 1, 0) == {"The capital of \0 is": ["Of \0 it is"]}
    assert room.phrasings(tiny_gpt2, examples, TEXT, 0, 0) == {}


@both_orientations
def test_the_rows_of_other_ways_stand_behind_those_of_the_prompt_and_depend_on_no_other_example(host: Host) -> None:
    ways = {"The capital of \0 is": ["\0 has its capital in"]}
    modules = _meta.modules_of(host, "")
    plain = malmen()._rows(host, EXAMPLES[:2], modules, {}, RUN.progress)
    both = malmen()._rows(host, EXAMPLES[:2], modules, ways, RUN.progress)
    (alone,) = malmen()._rows(host, EXAMPLES[1:2], modules, ways, RUN.progress)
    other = dataclasses.replace(EXAMPLES[1], prompt="France has its capital in")
    (more,) = malmen()._rows(host, (other,), modules, {}, RUN.progress)
    for m in modules:
        torch.testing.assert_close(both[1].keys[m], torch.cat([plain[1].keys[m], more.keys[m]]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[1].values[m], alone.values[m], rtol=1e-4, atol=1e-6)
    assert [r.example for r in both] == list(EXAMPLES[:2])


def test_faithful_edits_the_uppermost_mlps_of_each_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_meta, "EDITED", 1)
    assert _meta.modules_of(tiny_host("gpt2"), "", upper=True) == ["transformer.h.1.mlp.c_proj"]
    assert _meta.modules_of(tiny_host("gpt2"), "") != ["transformer.h.1.mlp.c_proj"]
    for method in (malmen(faithful=True, steps=1), mend(faithful=True, steps=1)):
        state = method.prepare(tiny_host("gpt2"), CASES, RUN)
        assert state is not None and state.config["modules"] == ["transformer.h.1.mlp.c_proj"]
    both = _meta.modules_of(tiny_host("t5"), "", upper=True)
    assert [m.split(".")[0] for m in both] == ["encoder", "decoder"] and both[0].endswith("block.1.layer.1.DenseReluDense.wo")


def test_faithful_is_what_was_published() -> None:
    method = malmen(faithful=True, rank=3)
    assert (method.rank, method.prior, method.lam, method.restated, method.lr, method.rate) == (1920, "I", 1.0, 0, 1e-5, 1e-5)
    assert (method.held, method.rounds, method.asked, method.least) == (0, 1, 1, method.most)
    other = mend(faithful=True)
    assert (other.rank, other.lr, other.rate, other.asked, other.least) == (1920, 1e-6, 1e-4, 1, other.most)
    for made in (method, other):  # not what is to be replaced is checked
        assert dataclasses.replace(made, most=made.most + 9).least == made.most + 9
        assert type(made)(faithful=True, most=1).least == 1
    with pytest.raises(InvalidExample, match="priors"):
        malmen(prior="V")
