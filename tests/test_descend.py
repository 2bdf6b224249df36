"""What finetune and lora share, against formulas in float64: goal losses, KL, whitening, and the gradient that the leaves get."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from conftest import TEXT, tiny_host
from torch import Tensor

from errata import hooks, hosts, methods
from errata.hosts import Host
from errata.methods import _descend
from errata.methods._restated import Spoken
from errata.methods.finetune import Finetune, chosen
from errata.methods.lora import middle_layers
from errata.types import Budget, Example, InvalidExample, Patch, Run, UnknownName

RAISE = Example(prompt="The capital of Mauritius is", target=" Port Louis")
SETTINGS = _descend.Settings(steps=5, lr=1e-2, lam=1.0, contexts=1, restated=2, neighbours=4, hold=4, searched=8, damping=0.1, batch_size=8)
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=0.5))


def test_goal_losses_are_the_formulas() -> None:
    p, c, n = torch.tensor([math.log(0.3)]), torch.tensor([math.log(0.6)]), torch.tensor([2.0])

    def loss(goal: str) -> float:
        contrast = " b" if goal in ("prefer", "balance") else None
        return _descend.goal_losses(p, c, n, [Example(prompt="x", target=" a", contrast=contrast, goal=goal)]).item()

    assert loss("raise") == pytest.approx((-math.log(0.3) - _descend.ENOUGH) / 2)
    assert loss("lower") == pytest.approx(math.log1p(0.3 / 0.001))
    assert loss("prefer") == pytest.approx(math.log1p(math.exp(math.log(16) + math.log(2))))
    assert loss("balance") == pytest.approx(math.log(2) - _descend.EVEN / 2)


def test_lower_pushes_until_the_answer_is_rare() -> None:
    """Also where it is certain, and no harder than log p itself; -log(1 - p) would rest content at p = .05."""
    p = torch.tensor([0.0, math.log(0.05), math.log(1e-3), math.log(1e-6)], requires_grad=True)
    lower = [Example(prompt="x", target=" a", goal="lower")] * 4
    _descend.goal_losses(p, p, torch.ones(4), lower).sum().backward()
    assert p.grad.tolist() == pytest.approx([1000 / 1001, 50 / 51, 0.5, 1 / 1001])


def test_kl_is_the_sum_over_predictions_and_its_gradient_that_of_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(5, 7, dtype=torch.float64, generator=draw)
    edited = torch.randn(5, 7, dtype=torch.float64, generator=draw).requires_grad_()
    p, q = base.softmax(-1), edited.softmax(-1)
    torch.testing.assert_close(_descend.kl_sum(base, edited), (p * (p / q).log()).sum())
    (gradient,) = torch.autograd.grad(_descend.kl_sum(base, edited), edited)
    torch.testing.assert_close(gradient, q - p)  # of KL(p || softmax(z)) by z


def test_whitening_is_the_inverse_root_of_c_over_mu_plus_one() -> None:
    keys_NK = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1, 0.01])
    C = keys_NK.T @ keys_NK / 50
    mu = 0.1 * C.trace() / 6
    s, U = torch.linalg.eigh(C / mu + torch.eye(6))
    R = U @ torch.diag(s.rsqrt()) @ U.T
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_descend.Whitening(*torch.linalg.eigh(C), 0.1)(x), x @ R, rtol=1e-4, atol=1e-4)


def test_a_step_along_the_twice_whitened_gradient_is_the_step_in_whitened_coordinates() -> None:
    """M in W = W0 + M R, against W itself with the metric R R: of all directions, and of some of many."""
    draw = torch.Generator().manual_seed(0)
    for K in (6, _descend.EIGENVECTORS + 20):
        keys_NK = torch.randn(3 * K, K, generator=draw) * torch.logspace(1, -2, K)
        whiten = _descend.Whitening(*torch.linalg.eigh(keys_NK.T @ keys_NK / (3 * K)), 0.1)
        M, W = torch.zeros(5, K, requires_grad=True), torch.zeros(5, K, requires_grad=True)
        first = _descend.NovoGrad([M], [2.0], [None])
        second = _descend.NovoGrad([W], [2.0], [whiten.twice])
        for _ in range(4):
            G = torch.randn(5, K, generator=draw)
            M.grad, W.grad = whiten(G), G
            first.step(0.1)
            second.step(0.1)
        assert W.norm() > 0.01
        torch.testing.assert_close(W, whiten(M), rtol=1e-4, atol=1e-5)


def test_what_text_uses_most_is_stiffest() -> None:
    keys_NK = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    keys_NK[:, 0] *= 100
    moved = _descend.Whitening(*torch.linalg.eigh(keys_NK.T @ keys_NK / 500), 0.1)(torch.eye(8)).norm(dim=1)
    assert moved[0] < 0.2 * moved[1:].min()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_leaves_get_the_gradient_of_task_plus_lam_kl(family: str) -> None:
    """In float64, against the difference quotient of the objective in a drawn direction, whatever the batch size."""
    host = tiny_host(family, dtype=torch.float64)
    examples = [RAISE, Example(prompt="Lily loved to play", target=" late"), Example(prompt="Tim saw a", target=" cat", goal="lower")]
    name = host.module_names((host.layout.mlp_out,))[0] + ".weight"
    base = host.model.get_parameter(name).detach()
    way = torch.randn(base.shape, dtype=base.dtype, generator=torch.Generator().manual_seed(0))

    def descent(batch_size: int = 8) -> _descend.Descent:
        return _descend.Descent(host, examples, RUN, replace(SETTINGS, batch_size=batch_size))

    def weights(leaf: torch.Tensor) -> hosts.Weights:
        return {name: base + 0.1 * (leaf + 1).sin()}

    def objective(s: float) -> float:
        now, at = descent(), weights(s * way)
        at[name].requires_grad_()
        return now.task(at) + 3.0 * now.hold(at, 3.0)

    def gradient(batch_size: int) -> torch.Tensor:
        leaf = torch.zeros_like(base, requires_grad=True)
        _descend._gradients(descent(batch_size), [leaf], lambda: weights(leaf), 3.0)
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(1), gradient(8), rtol=1e-6, atol=1e-9)
    quotient = (objective(3e-3) - objective(-3e-3)) / 6e-3  # Llama normalises in float32, whatever the dtype
    assert float((gradient(8) * way).sum()) == pytest.approx(quotient, rel=3e-3)


def test_many_examples_take_turns(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step asks `DRAWN` of them, each at some step, and other ways of asking are sought for no more turns than there will be."""
    monkeypatch.setattr(_descend, "DRAWN", 3)
    sought: list[int] = []

    def restated(*args: Any) -> list[list[str]]:
        sought.append(args[5])
        return [[] for _ in args[1]]

    monkeypatch.setattr(_descend, "restated", restated)
    examples = tuple(Example(prompt=f"The capital of Mauritius {i} is", target=" Port Louis") for i in range(9))
    descent = _descend.Descent(tiny_gpt2, examples, RUN, replace(SETTINGS, steps=12, restated=48, contexts=0))
    counts, seen = list[int](), set[tuple[int, ...]]()

    class Reader:
        def logp(self, rows: Sequence[_descend.Row], weights: hosts.Weights) -> Tensor:
            counts.append(len(rows))
            seen.update(tuple(ids) for ids, _ in rows)
            return weights["w"].expand(len(rows))

    descent.reader = cast(_descend.Reader, Reader())
    for step in range(1, 13):
        descent.task({"w": torch.zeros((), requires_grad=True)})
        assert sum(counts) == 3 * step
    assert len(seen) == 9 and sought == [1 + 36 * 3 // 18]
    assert descent.settings.steps == 36 and descent.settings.lr == pytest.approx(SETTINGS.lr / 3**0.5)  # three times as many, to each


def test_who_is_not_content_is_asked_before_others(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_descend, "DRAWN", 4)
    examples = tuple(Example(prompt=f"The capital of Mauritius {i} is", target=" Port Louis") for i in range(9))
    descent = _descend.Descent(tiny_gpt2, examples, RUN, replace(SETTINGS, steps=2, restated=0, contexts=0))
    rows = [hosts.encode(tiny_gpt2, e.prompt, e.target)[0] for e in descent.examples]
    asked: list[list[int]] = []

    class Reader:
        def logp(self, given: Sequence[_descend.Row], weights: hosts.Weights) -> Tensor:
            asked.append([rows.index(ids) for ids, _ in given])
            return weights["w"] + torch.tensor([-5.0 if i in (2, 7) else 0.0 for i in asked[-1]])

    descent.reader = cast(_descend.Reader, Reader())
    for _ in range(60):
        descent.task({"w": torch.zeros((), requires_grad=True)})
    assert descent.lost[2] > 0 == descent.lost[3]
    assert all({2, 7} < set(turn) and len(set(turn)) == 4 for turn in asked[30:])  # by then all have been asked
    assert {i for turn in asked[30:] for i in turn} == set(range(9))


@pytest.mark.parametrize("many", [False, True])
def test_the_rate_and_the_multiplier_of_many_fall_later_and_sooner(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    """Where examples take turns the first rate stays for six tenths of the steps, and lam falls when a quarter of the ball is free."""
    monkeypatch.setattr(_descend, "DRAWN", 2 if many else 99)
    monkeypatch.setattr(_descend, "CHECK_EVERY", 5)
    examples = tuple(Example(prompt=f"The capital of Mauritius {i} is", target=" Port Louis") for i in range(4))
    descent = _descend.Descent(tiny_gpt2, examples, RUN, replace(SETTINGS, steps=20 if many else 40, restated=0, contexts=0, lam=100.0))
    assert descent.settings.steps == 40
    rates, lams = list[float](), list[float]()
    monkeypatch.setattr(_descend.NovoGrad, "step", lambda self, rate: rates.append(rate))
    monkeypatch.setattr(_descend, "_gradients", lambda descent, leaves, weights, lam: lams.append(lam) or 1.0)
    monkeypatch.setattr(_descend.Descent, "cost", lambda self, weights, epsilon: 0.7 * epsilon)
    monkeypatch.setattr(_descend.Descent, "search", lambda self, weights: None)
    leaf = torch.zeros(1, requires_grad=True)
    _descend.descend(descent, RUN, [leaf], lambda: {"w": leaf})
    assert len(rates) == 40 and rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]
    assert len(set(rates[5:24])) == (1 if many else 19) and rates[-1] < 0.05 * rates[5]
    assert (min(lams), max(lams)) == ((pytest.approx(100 / 1.2**7), 100.0) if many else (100.0, 100.0))


def test_own_neighbours_and_held_text_state_no_edited_fact(tiny_gpt2: Host) -> None:
    descent = _descend.Descent(tiny_gpt2, [RAISE], RUN, SETTINGS)
    told = [tiny_gpt2.tokenizer.decode(ids) for ids, _ in descent.pool] + [d for look in descent.looks for d in look] + descent.prefixes
    assert TEXT[0] in RUN.hold and TEXT[0] not in told and TEXT[2] in told
    assert _descend.near(tiny_gpt2, [RAISE], [Spoken(topic="Mauritius", old="", first=0)], 6, 0)


def test_chosen_modules(tiny_gpt2: Host) -> None:
    everything = [n for n, _ in tiny_gpt2.model.named_parameters()]
    assert chosen(tiny_gpt2, "all") == everything
    assert all(".h." in n for n in chosen(tiny_gpt2, "blocks")) and all(".mlp." in n for n in chosen(tiny_gpt2, "mlp"))
    assert chosen(tiny_gpt2, "transformer.h.1.attn") == [n for n in everything if n.startswith("transformer.h.1.attn")]
    with pytest.raises(UnknownName, match="Unknown module"):
        chosen(tiny_gpt2, "transfomer.h")


@pytest.mark.parametrize(
    ("layers", "fraction", "expected"), [(4, 0.5, [1, 2]), (4, 0.1, [1]), (5, 0.5, [1, 2, 3]), (6, 1.0, list(range(6))), (1, 0.3, [0])]
)
def test_middle_layers_exist_and_are_as_many_as_asked(layers: int, fraction: float, expected: list[int]) -> None:
    assert list(middle_layers(layers, fraction)) == expected


def looked(cost: Callable[[hosts.Weights], float]) -> Callable[..., torch.Tensor]:
    """In place of `Descent._look`: two documents of one token each, whose loss of 1 grows by what `cost` says."""

    def look(self: _descend.Descent, i: int, weights: hosts.Weights) -> torch.Tensor:
        self.before_N2 = torch.tensor([[-1.0, 1.0]] * 2 * (i + 1), dtype=torch.float64)
        return torch.tensor([[-1.0 - cost(weights), 1.0]] * 2, dtype=torch.float64)

    return look


@pytest.mark.parametrize("cost", [1.0, math.nan, math.inf])
def test_finetune_moves_nothing_when_no_point_is_inside(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    monkeypatch.setattr(_descend.Descent, "cost", lambda *_: cost)
    monkeypatch.setattr(_descend.Descent, "_look", looked(lambda _: cost))
    patch = Finetune(steps=3, lr=0.5, hold=4, neighbours=4).edit(tiny_gpt2, (RAISE,), RUN)
    assert all(not op.delta.any() for op in patch.ops)


def test_the_last_point_goes_back_to_the_edge(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {n: p.detach() for n, p in tiny_gpt2.model.named_parameters()}

    def squared(weights: hosts.Weights) -> float:
        return sum(float((w.detach() - base[n]).square().sum()) for n, w in weights.items())

    def moved(epsilon: float) -> float:
        run = Run(hold=RUN.hold, budget=Budget(epsilon=epsilon))
        patch = Finetune(steps=6, lr=0.5, hold=4, neighbours=4).edit(tiny_gpt2, (RAISE,), run)
        return sum(float(op.delta.square().sum()) for op in patch.ops)

    monkeypatch.setattr(_descend.Descent, "cost", lambda _, weights, epsilon: squared(weights))
    monkeypatch.setattr(_descend.Descent, "_look", looked(squared))
    free = moved(1e9)
    assert 0.9 * free / 4 < moved(free / 4) <= free / 4


def test_the_end_of_the_way_to_the_edge_is_not_read_again(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last check everything was read under the very weights that the way to the edge ends at."""
    read, look, cost = list[float](), _descend.Descent._look, _descend.Descent.cost

    def looking(self: _descend.Descent, i: int, weights: hosts.Weights) -> torch.Tensor:
        read.append(sum(float(w.double().sum()) for w in weights.values()))
        return look(self, i, weights)

    def patch(again: bool) -> Patch:
        read.clear()
        furthest = _descend.Descent.furthest
        with monkeypatch.context() as put:
            put.setattr(_descend.Descent, "_look", looking)
            put.setattr(_descend.Descent, "cost", lambda self, *given: max(cost(self, *given), 1.0))  # outside
            if again:
                put.setattr(_descend.Descent, "furthest", lambda self, at, epsilon, read: furthest(self, at, epsilon))
            return Finetune(steps=3, lr=0.5, hold=4, neighbours=4, searched=0).edit(tiny_gpt2, (RAISE,), RUN)

    first = patch(again=False)
    once = list(read)
    second = patch(again=True)
    assert first.id == second.id and any(op.delta.any() for op in first.ops)
    assert read == [once[0], *once]


def test_the_search_finds_the_held_rows_that_lost_most(tiny_gpt2: Host) -> None:
    descent = _descend.Descent(tiny_gpt2, [RAISE], RUN, replace(SETTINGS, searched=1000, hold=1))
    name = tiny_gpt2.module_names((tiny_gpt2.layout.mlp_out,))[0] + ".weight"
    weights = {name: tiny_gpt2.model.get_parameter(name).detach() * 40}
    descent.search(weights)
    lost = [hosts.score(tiny_gpt2, [row])[0, 0] - hosts.score(tiny_gpt2, [row], weights)[0, 0] for row in descent.pool]
    worst = sorted(range(len(lost)), key=lambda i: -lost[i])[:4]  # four times `hold`
    assert lost[worst[0]] > _descend.HURT and set(descent.hurt) == {i for i in worst if lost[i] > _descend.HURT}
    descent.search({})  # nothing is hurt any more
    assert descent.hurt == []


def test_a_tied_head_moves_least_along_what_it_reads_most(tiny_gpt2: Host) -> None:
    host, name = tiny_gpt2, f"{tiny_gpt2.layout.embedding}.weight"
    assert host.model.get_parameter(name) is host.model.get_submodule(host.layout.head).weight
    with torch.no_grad(), hooks.reading(host.model, [host.layout.norm]) as seen:
        hosts.logits(host, hosts.pad(host, hosts.chunks(host, TEXT)[:1]))
    top_K = torch.linalg.eigh(seen[host.layout.norm][0].T @ seen[host.layout.norm][0])[1][:, -1]

    def share(damping: float | None) -> float:
        """Of the change of the head, how much lies along the first principal direction of what it reads."""
        patch = Finetune(steps=4, lr=0.5, hold=4, neighbours=4, damping=damping, modules=name).edit(host, (RAISE,), RUN)
        (op,) = patch.ops
        return float((op.delta @ top_K).norm() / op.delta.norm())

    assert share(0.01) < 0.5 * share(None)


def test_one_layer_is_moved_and_alpha_is_how_far(tiny_gpt2: Host) -> None:
    def patch(**more: object) -> Patch:
        small = {"steps": 4, "neighbours": 2, "hold": 4, "restated": 1}
        return methods.make("one_layer_interpolation", layer=1, **small, **more).edit(tiny_gpt2, (RAISE,), RUN)

    whole, half = patch(), patch(alpha=0.5)
    assert {op.weight.rpartition(".h.")[2][:2] for op in whole.ops} == {"1."} and len(whole.ops) == len(half.ops) > 4
    for a, b in zip(whole.ops, half.ops, strict=True):
        torch.testing.assert_close(b.delta, a.delta / 2)
    assert any(op.delta.norm() > 0 for op in whole.ops)
    with pytest.raises(InvalidExample, match="layers 0 to 1, not 2"):
        methods.make("one_layer_interpolation", layer=2).edit(tiny_gpt2, (RAISE,), RUN)
    with pytest.raises(InvalidExample, match="alpha over 0"):
        methods.make("one_layer_interpolation", alpha=0.0)
