"""enn: its step, its gradients against autograd, first and second order, what a patch holds, and what it costs beside one that is on."""

import dataclasses
import pickle
import random
from typing import Any

import pytest
import torch
from conftest import TEXT, same_bits, tiny_host, weights_of
from test_meta import CASES, settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from errata import apply, hosts
from errata.hosts import Host
from errata.methods import _meta, enn
from errata.methods._descend import ENOUGH, goal_losses
from errata.methods._hyper import Net
from errata.methods.enn import Enn
from errata.types import Add, Begin, Budget, Example, InvalidExample, Run, State, here

EXAMPLES = tuple(c.example for c in CASES)
RUN = Run(hold=TEXT * 2, budget=Budget(epsilon=10.0))
SMALL: dict[str, Any] = {"steps": 4, "least": 1, "most": 3, "every": 2, "near": 3, "hold": 3, "rounds": 1}
ANSWERED = tuple(f"{t[:30].strip()} {i}| Rome" for i, t in enumerate(TEXT * 2))


def made(**more: Any) -> Enn:
    return Enn(**(SMALL | more))


def school_of(host: Host, method: Enn) -> tuple[_meta.School, Any]:
    modules, cases = host.projections("mlp_in", "mlp_out"), CASES if host.kind == "causal" else CASES[:-1]
    lesson = _meta.Lesson(
        name="enn", modules=modules, learning=lambda school: enn._Learning(school, method, modules), config={}, tensors={}
    )
    school = _meta.School(
        host, lesson, cases, dataclasses.replace(RUN, hold=RUN.hold if host.kind == "causal" else ANSWERED), settings(method)
    )
    return school, school.learning


def unlike(net: Net) -> Net:
    """Away from the model's own weights, each step of a length of its own."""
    draw = torch.Generator().manual_seed(5)
    own = {name: t.double() + (0.02 if t.ndim else 0.3) * torch.randn(t.shape, generator=draw) for name, t in net.parameters.items()}
    return dataclasses.replace(net, parameters={name: t.requires_grad_() for name, t in own.items()})


def logp(host: Host, rows: list[Any], weights: dict[str, Tensor]) -> Tensor:
    return torch.stack([hosts.scored_logprobs(host, hosts.pad(host, [row]), weights).sum() for row in rows])


def goals(host: Host, prompts: list[tuple[str, Example]], weights: dict[str, Tensor], enough: float) -> Tensor:
    """The examples' losses, one text at a time."""
    rows = [hosts.encode(host, prompt, e.target) for prompt, e in prompts]
    others = [hosts.encode(host, prompt, e.contrast or e.target) for prompt, e in prompts]
    tokens = torch.tensor([float(len(ids) - max(given, 1)) for ids, given in rows])
    return goal_losses(logp(host, rows, weights), logp(host, others, weights), tokens, [e for _, e in prompts], enough)


def kl(host: Host, rows: list[Any], held: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    total, scored = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        batch = hosts.pad(host, [row])
        p = hosts.predictions(host, batch, held).log_softmax(-1).detach()
        total, scored = total + (p.exp() * (p - hosts.predictions(host, batch, weights).log_softmax(-1))).sum(), scored + len(p)
    return total / scored


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(("second", "faithful"), [(False, False), (True, False), (True, True)])
def test_the_gradient_of_a_step_is_autograds_through_all_of_it(family: str, second: bool, faithful: bool) -> None:
    """With the graph of the inner step, or with its gradient for a constant; theta on the held side of the KL is one in any case."""
    host = tiny_host(family, dtype=torch.float64)
    school, learning = school_of(host, made(second_order=second, faithful=faithful, asked=1, base=0.7))
    first, _ = learning.first()
    net, cases = unlike(first), school.train[:3]
    point = _meta.Point(step=1, net=net, m={}, v={}, best=net, best_loss=0.0, best_step=0, dropped=0)
    still = dataclasses.replace(net, parameters={name: t.detach() for name, t in net.parameters.items()})
    found = learning.graded(dataclasses.replace(point, net=still), cases, random.Random(2))

    s, asked, enough = school.s, school.asked(cases, random.Random(2)), 0.0 if faithful else ENOUGH
    base = {name: p.detach() for name, p in host.model.named_parameters()}
    theta = base | {name: base[name] + d for name, d in enn.theta(net).items()}
    moved = [f"{m}.weight" for m in learning.modules]
    with sdpa_kernel(SDPBackend.MATH):
        inner = goals(host, [(c.example.prompt, c.example) for c in cases], theta, enough)
        inner = inner.mean() if faithful else inner.sum()
        down = torch.autograd.grad(inner, [theta[name] for name in moved], create_graph=second, retain_graph=True)
        there = theta | {name: theta[name] - enn.alpha(net, name) * g for name, g in zip(moved, down, strict=True)}
        loss = goals(host, asked.prompts, there, enough).mean()
        for rows, weight in ((asked.near, s.near_weight), (asked.held, s.hold_weight)):
            if weight:
                loss = loss + weight * (kl(host, rows, theta, there) + 0.7 * kl(host, rows, base, theta))
        wanted = torch.autograd.grad(loss, list(net.parameters.values()), allow_unused=True, materialize_grads=True)
    assert found.grads.keys() == net.parameters.keys()
    for (name, leaf), want in zip(net.parameters.items(), wanted, strict=True):
        exact = 1e-8 if family == "gpt2" else 1e-5  # the norms of the others are taken in float32, whatever the weights
        size = exact * float(want.norm()) + 1e-11
        torch.testing.assert_close(found.grads[name].to(want), want, rtol=100 * exact, atol=size, msg=lambda m, n=name: f"{n}: {m}")
        assert leaf.ndim or want != 0, "every alpha learns"


def prepared(host: Host, method: Enn, **more: Any) -> State:
    state = method.prepare(host, CASES, dataclasses.replace(RUN, **more))
    assert state is not None
    return state


@pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)
def test_a_patch_is_the_new_base_and_the_steps(host: Host) -> None:
    """One step, down the gradient that the new base has, on the modules; on all else what was learnt and no more."""
    method = made()
    state = prepared(host, method)
    draw = torch.Generator().manual_seed(5)
    away = {name: t + 1e-3 * torch.randn(t.shape, generator=draw) for name, t in state.tensors.items()}  # whatever was learnt
    state = dataclasses.replace(state, tensors=away)
    net = _meta.known(method, "enn", host, state, ())[1]
    theta = enn.theta(net)
    before = weights_of(host)
    patch = method.edit(host, EXAMPLES[:2], dataclasses.replace(RUN, state=state))
    assert same_bits(host, before) and all(isinstance(op, Add) for op in patch.ops)
    assert {op.weight for op in patch.ops} == set(theta) == {name for name, _ in host.model.named_parameters()}
    leaves = {name: (p.detach() + theta[name]).requires_grad_() for name, p in host.model.named_parameters()}
    loss = goals(host, [(e.prompt, e) for e in EXAMPLES[:2]], leaves, ENOUGH).sum()
    names = [f"{m}.weight" for m in state.config["modules"]]
    for name, g in zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True):
        theta[name] = theta[name] - net.parameters[f"{name}/log_alpha"].exp() * g
    for op in patch.ops:
        torch.testing.assert_close(op.delta, theta[op.weight], rtol=1e-4, atol=1e-6)


def test_where_the_new_base_is_on_only_the_steps_are_added(tiny_llama: Host) -> None:
    method = made(lr=1e-3)
    state = prepared(tiny_llama, method)
    run = dataclasses.replace(RUN, state=state)
    first = method.edit(tiny_llama, EXAMPLES[:1], run)
    with apply.applied(tiny_llama, first):
        second = method.edit(tiny_llama, EXAMPLES[1:2], run)
    assert {op.weight for op in second.ops} == {f"{m}.weight" for m in state.config["modules"]} and len(second.ops) < len(first.ops)
    other = dataclasses.replace(first, config={**first.config, "state": "b2:0"})
    with apply.applied(tiny_llama, other):
        whole = method.edit(tiny_llama, EXAMPLES[1:2], run)
    assert len(whole.ops) == len(first.ops), "of another state it is not there yet"


def test_steps_are_taken_until_the_examples_are_right(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(rounds=4, share=0.2)
    run = dataclasses.replace(RUN, state=prepared(tiny_llama, method))
    asked: list[list[Example]] = []
    true = enn.gradient

    def watched(host: Host, examples: Any, *rest: Any) -> Any:
        asked.append(list(examples))
        return true(host, examples, *rest)

    monkeypatch.setattr(enn, "gradient", watched)
    answers = iter([[False, True, False], [True, False], [True]])
    monkeypatch.setattr(_meta, "right", lambda *given: next(answers))
    method.edit(tiny_llama, EXAMPLES[:3], run)
    a, _, c = sorted(EXAMPLES[:3], key=lambda e: e.id)
    assert [len(some) for some in asked] == [3, 2, 1] and asked[1] == [a, c] and asked[2] == [c]


def test_right_is_what_the_host_itself_would_say(tiny_gpt2: Host) -> None:
    """With its own weights, and with others, once these are in the model: greedily, and which of two it finds likelier."""

    def wanted() -> list[bool]:
        said = hosts.greedy(tiny_gpt2, [e.prompt for e in examples], max_new_tokens=8)
        spoken = [s.startswith(e.target) == (e.goal == "raise") for s, e in zip(said, examples, strict=True)]
        fixed = hosts.fixes(tiny_gpt2, examples)
        return [s if e.goal in ("raise", "lower") else f for s, f, e in zip(spoken, fixed, examples, strict=True)]

    (said,) = hosts.greedy(tiny_gpt2, ["The capital of France is"], max_new_tokens=1)
    e = Example(prompt="The capital of France is", target=said)
    examples = [e, *EXAMPLES, dataclasses.replace(e, goal="lower"), dataclasses.replace(EXAMPLES[0], goal="lower")]
    examples += [dataclasses.replace(e, goal=goal, contrast=" Rome") for goal in ("prefer", "balance")]
    assert _meta.right(tiny_gpt2, examples, {}, 3) == wanted()
    assert _meta.right(tiny_gpt2, [e, examples[-4]], {}, 3) == [True, False]
    method = made(share=2.0)
    patch = method.edit(tiny_gpt2, EXAMPLES[:1], dataclasses.replace(RUN, state=prepared(tiny_gpt2, method)))
    weights = {op.weight: hosts.weight(tiny_gpt2.model, op.weight) + apply.change(tiny_gpt2, op) for op in patch.ops}
    mine = _meta.right(tiny_gpt2, examples, weights, 64)
    with apply.applied(tiny_gpt2, patch):
        assert mine == wanted()


def test_a_part_of_the_weights_may_be_learnt(tiny_gpt2: Host) -> None:
    """The step moves its modules also where these stay as they are."""
    method = made(weights="attention", modules="transformer.h.1.mlp.c_proj")
    state = prepared(tiny_gpt2, method)
    patch = method.edit(tiny_gpt2, EXAMPLES[:1], dataclasses.replace(RUN, state=state))
    names = {op.weight for op in patch.ops}
    assert "transformer.h.1.mlp.c_proj.weight" in names and all(".attn." in n for n in names - {"transformer.h.1.mlp.c_proj.weight"})
    with pytest.raises(InvalidExample, match="weights=attention"):
        made(weights="all").edit(tiny_gpt2, EXAMPLES[:1], dataclasses.replace(RUN, state=state))


def test_after_a_kill_it_goes_on_as_if_there_had_been_none(tiny_llama: Host) -> None:
    kept: list[State] = []
    before = weights_of(tiny_llama)
    whole = prepared(tiny_llama, made(steps=6), keep=kept.append)
    assert same_bits(tiny_llama, before) and [s.config["step"] for s in kept] == [2, 4, 6]
    assert all(prepared(tiny_llama, made(steps=6), state=begun).id == whole.id for begun in (kept[0], kept[1]))
    assert whole.trained_on == {c.id for c in CASES}


def packed(host: Host, begin: Begin, shards: Any, shared: Any) -> Any:
    """A spread to another process, but for the process."""
    begin, shards, shared = pickle.loads(pickle.dumps((begin, list(shards), shared)))
    return map(begin(host, shared), shards)


def test_work_that_is_spread_comes_to_the_same_bits(tiny_gpt2: Host) -> None:
    method = made(steps=2, rounds=2)
    state = prepared(tiny_gpt2, method)
    assert prepared(tiny_gpt2, method, spread=packed).id == state.id
    first, second = (method.edit(tiny_gpt2, EXAMPLES[:3], dataclasses.replace(RUN, state=state, spread=s)).id for s in (here, packed))
    assert first == second


def test_published_settings_and_those_that_cannot_be(tiny_gpt2: Host) -> None:
    method = made(faithful=True)
    assert method.config | enn.FAITHFUL == method.config and method.second_order
    net = _meta.known(method, "enn", tiny_gpt2, prepared(tiny_gpt2, made(faithful=True, steps=1, every=1)), ())[1]
    assert {float(t) for name, t in net.parameters.items() if name.endswith("/alpha")} != set()
    for wrong in ({"rounds": 0}, {"base": -1.0}, {"lr": 0.0}):
        with pytest.raises(InvalidExample, match="enn"):
            made(**wrong)
