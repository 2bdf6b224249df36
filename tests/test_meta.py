"""Meta-training: its gradient against autograd through the whole of it, what it must not depend on, and what a kill must not change."""

import dataclasses
import math
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TEXT, same_bits, tiny_host, weights_of
from torch import Tensor

from errata import hosts
from errata.hosts import Host
from errata.methods import _gradients, _hyper, _keys, _meta
from errata.methods._descend import ENOUGH, goal_losses
from errata.methods.ke import Ke
from errata.methods.malmen import Malmen
from errata.methods.mend import Mend
from errata.types import Case, Example, InvalidExample, InvalidPatch, Method, Neighbour, Run, Spread, State, UnknownName, WrongBase

NAMES = (("Mauritius", " Port Louis"), ("France", " Paris"), ("Italy", " park"), ("Togo", " dog"), ("Kenya", " late"), ("Peru", " he"))
CASES = tuple(
    Case(
        example=Example(prompt=f"The capital of {name} is", target=target),
        old=" Rome",
        paraphrases=(f"{name} has its capital in", f"Ask where {name} is ruled from:"),
        neighbours=(Neighbour(prompt=f"The coast of {name} lies", answer=" in the south", ring="subject"),),
    )
    for name, target in NAMES
) + (Case(example=Example(prompt="The nurse said that", target=" she", contrast=" he", goal="prefer"), paraphrases=("He said that",)),)
RUN = Run(hold=TEXT * 2)
SMALL: dict[str, Any] = {"rank": 5, "steps": 6, "least": 2, "most": 5, "every": 2, "near": 3, "hold": 3}
KE: dict[str, Any] = {"steps": 6, "least": 2, "most": 5, "every": 3, "near": 3, "hold": 3}
both_orientations = pytest.mark.parametrize("family", ["gpt2", "llama"])


def malmen(**more: Any) -> Malmen:
    return Malmen(**(SMALL | {"held": 0, "rounds": 1, "tokens": "answer", "per_text": 0} | more))


def mend(**more: Any) -> Mend:
    return Mend(**(SMALL | more))


def settings(method: Method) -> _meta.Settings:
    return _meta.Settings(**{f.name: getattr(method, f.name) for f in dataclasses.fields(_meta.Settings)})


def learning(host: Host, method: Malmen | Mend) -> tuple[_hyper.Net, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A network in float64 in which nothing is zero any more, rows of two examples, C of each module."""
    modules = _meta.modules_of(host, "")
    state = method.prepare(host, CASES, dataclasses.replace(RUN, seed=3))
    _, net = _meta.known(method, state.method, host, state, ())
    draw = torch.Generator().manual_seed(5)
    own = {name: (t + 0.1 * torch.randn(t.shape, generator=draw)).double().requires_grad_() for name, t in net.parameters.items()}
    run = dataclasses.replace(RUN, state=state)
    rows = _gradients.together(host, method.rows(host, tuple(c.example for c in CASES[:3]), run), modules)
    C = _keys.covariances(host, RUN.hold, modules, method.per_key)[0] if isinstance(method, Malmen) else {}
    C = {m: C_KK.double() for m, C_KK in C.items()}
    return dataclasses.replace(net, parameters=own), {m: (k.double(), g.double()) for m, (k, g) in rows.items()}, C


def asked_of(host: Host) -> _meta.Asked:
    return _meta.Asked(
        prompts=[(c.paraphrases[0], c.example) for c in (*CASES[:3], CASES[-1])],
        near=[hosts.encode(host, n.prompt, n.answer) for c in CASES[:3] for n in c.neighbours],
        held=hosts.chunks(host, TEXT[2:5]),
    )


def whole_loss(host: Host, asked: _meta.Asked, shifts: dict[str, Tensor], s: _meta.Settings) -> Tensor:
    """Written out, one text at a time, with the graph."""
    weights = {}
    for module, S in shifts.items():
        W = host.model.get_parameter(f"{module}.weight").detach()
        weights[f"{module}.weight"] = W + (S if hosts.stored_transposed(host.model.get_submodule(module)) else S.T)

    def logp(prompt: str, answer: str) -> Tensor:
        return hosts.scored_logprobs(host, hosts.pad(host, [hosts.encode(host, prompt, answer)]), weights).sum(1)

    def kl(rows: list[tuple[list[int], int]]) -> Tensor:
        total, scored = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            batch = hosts.pad(host, [row])
            base, now = (hosts.predictions(host, batch, w).log_softmax(-1) for w in (None, weights))
            total, scored = total + (base.exp() * (base - now)).sum(), scored + len(base)
        return total / scored

    task = torch.zeros((), dtype=torch.float64)
    for prompt, e in asked.prompts:
        n = torch.tensor([float(len(hosts.encode(host, prompt, e.target)[0]) - len(hosts.tokens(host, prompt)))])
        target = logp(prompt, e.target)
        contrast = logp(prompt, e.contrast) if e.contrast else target
        task = task + goal_losses(target, contrast, n, [e], enough=ENOUGH).sum() / len(asked.prompts)
    return task + s.near_weight * kl(asked.near) + s.hold_weight * kl(asked.held)


def pulled(host: Host, method: Malmen | Mend, net: _hyper.Net, rows: dict[str, tuple[Tensor, Tensor]], C: dict[str, Tensor]) -> None:
    """The gradient of one step as the training takes it, into the parameters."""
    merge = method._merge({m: method._prior(c) for m, c in C.items()}) if isinstance(method, Malmen) else method._merge
    merged = {m: merge(net, m, *both) for m, both in rows.items()}
    _, grads = _meta.measured(host, asked_of(host), {m: S for m, (S, _) in merged.items()}, settings(method), learn=True)
    for m, (_, pull) in merged.items():
        pull(grads[m])


@both_orientations
@pytest.mark.parametrize("kind", ["C", "I", "all", "mend"])
def test_the_gradient_of_a_step_is_autograds_through_all_of_it(family: str, kind: str) -> None:
    """Through the network, the solve or the sum, and the model, in float64."""
    host = tiny_host(family, dtype=torch.float64)
    method = {"C": malmen(), "I": malmen(prior="I", chunk=2), "all": malmen(tokens="all", chunk=7), "mend": mend(chunk=5)}[kind]
    net, rows, C = learning(host, method)
    shifts = {}
    for m, (keys, g) in rows.items():
        if isinstance(method, Malmen):
            reach = method.ridge * C[m].diagonal().mean() * torch.eye(len(C[m])).double()
            P = torch.eye(len(C[m])).double() * C[m].trace() if method.prior == "I" else len(C[m]) * (C[m] + reach)
            lam = net.parameters[f"{m}/log_lam"].exp()
            d, k = _hyper.differences(net, m, keys, g), keys.double()
            shifts[m] = torch.linalg.solve(k.T @ k + lam * P, k.T @ d)
        else:
            k_, g_ = _hyper.factors(net, m, keys, g)
            shifts[m] = -_hyper.eta(net, m) * sum(torch.outer(a, b) for a, b in zip(k_, g_, strict=True))
    leaves = dict(net.parameters)
    wanted = torch.autograd.grad(whole_loss(host, asked_of(host), shifts, settings(method)), list(leaves.values()), allow_unused=True)
    pulled(host, method, net, rows, C)
    moved = 0
    for (name, leaf), want in zip(leaves.items(), wanted, strict=True):
        if want is None:
            assert leaf.grad is None and name.endswith("log_lam"), name
            continue
        assert leaf.grad is not None, name
        torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-9 * float(want.norm()) + 1e-14)
        moved += bool(want.norm() > 0)
    assert moved >= len(leaves) - len(rows) and (isinstance(method, Mend) or all(len(k) for k, _ in rows.values()))


@both_orientations
def test_a_step_does_not_depend_on_what_is_in_memory_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts in the model, rows in the network; seven prompts and eleven rows are divisible by neither."""
    host = tiny_host(family, dtype=torch.float64)
    net, rows, C = learning(host, malmen())
    found = []
    for batch_size, chunk, at_once in ((64, 1024, 512), (1, 1, 512), (3, 2, 1), (5, 4, 60)):
        monkeypatch.setattr(_meta, "PASS", at_once)
        method = malmen(batch_size=batch_size, chunk=chunk)
        leaves = {name: t.detach().clone().requires_grad_() for name, t in net.parameters.items()}
        pulled(host, method, dataclasses.replace(net, parameters=leaves), rows, C)
        found.append({name: t.grad for name, t in leaves.items()})
    for other in found[1:]:
        for name, grad in found[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-9, atol=1e-12)


def same(a: State, b: State) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, t in a.tensors.items():
        torch.testing.assert_close(t, b.tensors[name], rtol=1e-3, atol=1e-5)


def test_a_training_does_not_depend_on_batch_or_on_the_order_of_the_cases(tiny_llama: Host) -> None:
    whole = malmen().prepare(tiny_llama, CASES, RUN)
    same(whole, malmen(batch_size=2, chunk=3).prepare(tiny_llama, CASES[::-1], RUN))
    other = malmen().prepare(tiny_llama, CASES, dataclasses.replace(RUN, seed=1))
    name = next(name for name in whole.tensors if name.endswith("/A0"))
    assert not torch.allclose(whole.tensors[name], other.tensors[name]), "the seed is obeyed"


@pytest.mark.parametrize("make", [malmen, mend])
def test_the_host_is_untouched_and_the_cases_are_named(make: Callable[..., Malmen | Mend], tiny_gpt2: Host) -> None:
    before = weights_of(tiny_gpt2)
    state = make().prepare(tiny_gpt2, CASES, RUN)
    assert same_bits(tiny_gpt2, before) and all(p.grad is None for p in tiny_gpt2.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_gpt2.model.modules())
    assert state.trained_on == {c.id for c in CASES} and state.host == tiny_gpt2.id and state.config["step"] == 6
    assert all(t.isfinite().all() for t in state.tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("make", [malmen, mend])
@pytest.mark.parametrize("remembered", [1 << 20, 0])
def test_after_a_kill_it_goes_on_as_if_there_had_been_none(
    make: Callable[..., Malmen | Mend], remembered: int, tiny_llama: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[State] = []
    monkeypatch.setattr(_meta, "BLOCK", 3)
    monkeypatch.setattr(_meta, "REMEMBERED", remembered)
    whole = make().prepare(tiny_llama, CASES, dataclasses.replace(RUN, keep=kept.append))
    assert [s.config["step"] for s in kept] == [2, 4, 6] and all(s.config["unfinished"] for s in kept)
    again: list[State] = []
    resumed = make().prepare(tiny_llama, CASES, dataclasses.replace(RUN, state=kept[0], keep=again.append))
    assert resumed.id == whole.id and [s.id for s in again] == [s.id for s in kept[1:]]
    assert make().prepare(tiny_llama, CASES, dataclasses.replace(RUN, state=kept[2])).id == whole.id
    assert len({s.id for s in kept}) == 3, "or going on from any of them would be no test"
    for other in ({"cases": CASES[1:]}, {"seed": 1}, {"hold": TEXT[1:] * 2}, {"rank": 4}):
        run = dataclasses.replace(RUN, state=kept[0], **{k: v for k, v in other.items() if k in ("seed", "hold")})
        method = make(**{k: v for k, v in other.items() if k == "rank"})
        with pytest.raises(InvalidExample, match="begin afresh"):
            method.prepare(tiny_llama, other.get("cases", CASES), run)


def test_a_step_that_is_not_finite_is_dropped_and_counted(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    true, steps = _meta.measured, [0]

    def spoiled(host: Host, asked: _meta.Asked, shifts: Any, s: _meta.Settings, learn: bool, spread: Spread) -> Any:
        losses, grads = true(host, asked, shifts, s, learn, spread)
        steps[0] += learn
        if learn and steps[0] == 2:
            grads = {m: g * math.nan for m, g in grads.items()}
        return losses, grads

    monkeypatch.setattr(_meta, "measured", spoiled)
    kept: list[State] = []
    state = malmen(every=1).prepare(tiny_llama, CASES, dataclasses.replace(RUN, keep=kept.append))
    assert state.config["dropped"] == 1 and [s.config["dropped"] for s in kept] == [0, 1, 1, 1, 1, 1]
    learnt = [{name: t for name, t in s.tensors.items() if name.startswith(("net/", "moments/", "m/"))} for s in kept]
    assert all(torch.equal(t, learnt[1][name]) for name, t in learnt[0].items()), "nothing of it stays"
    assert any(not torch.equal(t, learnt[2][name]) for name, t in learnt[1].items())
    assert all(t.isfinite().all() for t in state.tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("bad", range(len(CASES)))
@pytest.mark.parametrize("method", [malmen(rounds=2, every=3), mend(every=3), Ke(**KE)], ids=["malmen", "mend", "ke"])
def test_a_case_whose_gradients_are_not_finite_is_left_out_and_named(
    tiny_llama: Host, monkeypatch: pytest.MonkeyPatch, method: Any, bad: int
) -> None:
    """Wherever it stands, and whoever is taken together with it: no step is lost, and the training goes on with the others."""
    true, spoiled = _gradients.taken, CASES[bad].example

    def taken(host: Host, examples: Any, *given: Any, **named: Any) -> Any:
        found = true(host, examples, *given, **named)
        return [
            {m: (k, v * math.nan) for m, (k, v) in own.items()} if e == spoiled else own for e, own in zip(examples, found, strict=True)
        ]

    monkeypatch.setattr(_gradients, "taken", taken)
    with pytest.warns(UserWarning, match=re.escape(f"Left out of the training: '{spoiled}'")) as told:
        state = method.prepare(tiny_llama, CASES, RUN)
    assert len(told) == 1 and state.config["dropped"] == 0 and state.config["step"] == 6
    assert all(t.isfinite().all() for t in state.tensors.values() if t.is_floating_point())


def test_where_no_case_has_finite_gradients_it_is_a_sentence(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*given: Any, **named: Any) -> Any:
        raise InvalidPatch("values hold NaN or infinity.")

    monkeypatch.setattr(_gradients, "rows", rows)
    with pytest.raises(InvalidPatch, match="no training case are finite"), pytest.warns(UserWarning):
        mend().prepare(tiny_llama, CASES, RUN)


def test_the_best_on_held_back_cases_is_kept_and_patience_ends_it(tiny_llama: Host) -> None:
    """With a rate at which every step makes it worse."""
    kept: list[State] = []
    state = malmen(lr=30.0, rate=30.0, every=1, patience=2).prepare(tiny_llama, CASES, dataclasses.replace(RUN, keep=kept.append))
    assert state.config["best_step"] < state.config["step"] == kept[-1].config["step"] == state.config["best_step"] + 2 < 6
    now = [{name: t for name, t in s.tensors.items() if name.startswith("net/")} for s in (state, kept[-1])]
    assert any(not torch.equal(t, now[1][name]) for name, t in now[0].items())


def test_what_should_stay_states_no_edited_fact(tiny_gpt2: Host) -> None:
    method = malmen(hold=12, near=12)
    learning = partial(
        _meta.Merging,
        rows=lambda examples: method._rows(tiny_gpt2, examples, _meta.modules_of(tiny_gpt2, ""), {}, RUN.progress),
        moved=method._differences,
        merge=method._merge({}),
        **{name: getattr(method, name) for name in ("rank", "lam", "share")},
    )
    lesson = _meta.Lesson(name="malmen", modules=_meta.modules_of(tiny_gpt2, ""), learning=learning, config={}, tensors={})
    stated = "In Mauritius, Port Louis is the seat of all that counts."
    blocked = dataclasses.replace(CASES[0], neighbours=(Neighbour(prompt="The capital of France is", answer=" Rome", ring="relation"),))
    school = _meta.School(tiny_gpt2, lesson, (blocked, *CASES[1:]), dataclasses.replace(RUN, hold=(*TEXT, stated)), settings(method))
    asked = school.asked([blocked, CASES[1]], random.Random(0))
    texts = [tiny_gpt2.tokenizer.decode(ids) for ids, _ in (*asked.near, *asked.held)]
    assert stated not in texts and any("Lily" in t for t in texts)
    assert not any(t.startswith("The capital of France is") for t in texts), "it is edited itself"
    assert {e for _, e in asked.prompts} == {blocked.example, CASES[1].example}
    own = {prompt for prompt, e in asked.prompts if prompt == e.prompt}
    assert own == {c.example.prompt for c in (blocked, CASES[1])}, "each in its own prompt, whatever else is drawn"
    assert len(asked.prompts) > len(own)
    school.s = dataclasses.replace(school.s, faithful=True)
    assert not any(prompt == e.prompt for prompt, e in school.asked([blocked, CASES[1]], random.Random(0)).prompts)


def test_states_that_do_not_serve_are_refused_with_a_sentence(tiny_llama: Host) -> None:
    method, examples = malmen(), (CASES[0].example,)
    kept: list[State] = []
    state = method.prepare(tiny_llama, CASES, dataclasses.replace(RUN, keep=kept.append))

    def refused(error: type[Exception], match: str, state: State | None, method: Malmen | Mend = method, host: Host = tiny_llama) -> None:
        with pytest.raises(error, match=match):
            method.edit(host, examples, dataclasses.replace(RUN, state=state))

    refused(UnknownName, "errata prepare malmen", None)
    refused(WrongBase, "was prepared on weights", state, host=tiny_host("llama", seed=1))
    refused(InvalidExample, "a state of malmen", state, mend())
    refused(InvalidExample, "half prepared", kept[0])
    refused(InvalidExample, "prior=C", state, malmen(prior="I"))
    module = state.config["modules"][0]
    config = {**state.config, "widths": {module: [7, 5]}}
    refused(WrongBase, "has the shape", dataclasses.replace(state, config=config))
    refused(UnknownName, "Did you mean", dataclasses.replace(state, config={**state.config, "widths": {module + "s": [64, 32]}}))
    refused(WrongBase, "lacks", dataclasses.replace(state, tensors={}))


def test_too_few_cases_and_settings_that_cannot_be(tiny_llama: Host) -> None:
    for make in (malmen, mend):
        with pytest.raises(InvalidExample, match="4 or more"):
            make().prepare(tiny_llama, CASES[:3], RUN)
        for wrong in ({"lr": 0.0}, {"least": 0}, {"least": 9}, {"chunk": 0}, {"tokens": "some"}):
            with pytest.raises(InvalidExample, match="malmen|mend"):
                make(**wrong)
    with pytest.raises(InvalidExample, match="per_text"):
        malmen(per_text=-1)
    with pytest.raises(UnknownName, match="Did you mean"):
        malmen(modules="model.layer.1").prepare(tiny_llama, CASES, RUN)


def test_published_gradients_are_means_over_the_tokens_of_a_batch(tiny_gpt2: Host) -> None:
    method, examples = malmen(), tuple(c.example for c in CASES[:3])
    modules = _meta.modules_of(tiny_gpt2, "")
    rows = method._rows(tiny_gpt2, examples, modules, {}, RUN.progress)
    m = modules[-1]
    tokens = [len(r.keys[m]) for r in rows]
    sums, means = (_gradients.together(tiny_gpt2, rows, modules, means_of=n)[m] for n in (None, 2))
    share = torch.tensor([1 / sum(tokens[:2])] * sum(tokens[:2]) + [1 / tokens[2]] * tokens[2])
    torch.testing.assert_close(means[1], sums[1] * share[:, None])
    assert torch.equal(means[0], sums[0])
