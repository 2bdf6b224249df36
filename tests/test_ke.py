"""ke: its formula against the published one, its gradient against autograd, its sentence, its rounds, and the multiplier beside it."""

import dataclasses
import pickle
import random
from typing import Any

import pytest
import torch
from conftest import TEXT, same_bits, tiny_host, weights_of
from test_meta import CASES, settings, whole_loss
from torch import Tensor

from errata import apply, hosts, text
from errata.hosts import Host
from errata.methods import _meta, ke
from errata.methods._hyper import Net
from errata.methods.ke import Ke
from errata.types import Begin, Budget, Example, InvalidExample, Run, State, here

EXAMPLES = tuple(c.example for c in CASES)
RUN = Run(hold=TEXT * 2, budget=Budget(epsilon=10.0))
SMALL: dict[str, Any] = {"states": 5, "condition": 6, "steps": 4, "least": 1, "most": 3, "every": 2, "near": 3, "hold": 3}
ANSWERED = tuple(f"{t[:30].strip()} {i}| Rome" for i, t in enumerate(TEXT * 2))


def made(**more: Any) -> Ke:
    return Ke(**(SMALL | more))


def unlike(net: Net) -> Net:
    """In float64, with nothing at zero any more."""
    draw = torch.Generator().manual_seed(5)
    own = {name: (t + 0.1 * torch.randn(t.shape, generator=draw)).double().requires_grad_() for name, t in net.parameters.items()}
    return dataclasses.replace(net, parameters=own)


def school_of(host: Host, method: Ke, hold: tuple[str, ...] = RUN.hold) -> tuple[_meta.School, Any]:
    """What a training works with: the school and ke's part in it."""
    modules, cases = host.projections(), CASES if host.kind == "causal" else CASES[:-1]
    run = dataclasses.replace(RUN, hold=hold)
    lesson = _meta.Lesson(
        name="ke", modules=modules, learning=lambda school: ke._Learning(school, method, modules, run), config={}, tensors={}
    )
    school = _meta.School(host, lesson, cases, run, settings(method))
    return school, school.learning


def published(net: Net, module: str, h_C: Tensor, grad_VK: Tensor, scale: float) -> Tensor:
    """dW (V, K) written out: A = softmax(a_r) a_c^T, B = softmax(b_r) b_c^T, weight-normalised layers with a tanh between them."""
    own, (V, K) = net.parameters, grad_VK.shape
    layers = [(torch.nn.functional.normalize(own[f"{module}/v{i}"], dim=1) * own[f"{module}/g{i}"][:, None], i) for i in range(2)]
    hidden = torch.tanh(layers[0][0] @ h_C + own[f"{module}/b0"])
    a_c, a_r, b_c, b_r, eta = torch.split(layers[1][0] @ hidden + own[f"{module}/b1"], [K, V, K, V, 1])
    if net.faithful:
        A = torch.outer(a_r.softmax(0), a_c)
    else:
        A = own[f"{module}/log_step"].exp() * V * torch.outer(a_r.softmax(0), a_c - 1)
    return scale * eta.sigmoid() * (grad_VK * A + torch.outer(b_r.softmax(0), b_c))


def weight_gradients(host: Host, e: Example, modules: list[str]) -> dict[str, Tensor]:
    """{module: dL/dW (V, K)} by autograd, L the sum over the answer's tokens."""
    leaves = {f"{m}.weight": hosts.weight(host.model, f"{m}.weight").clone().requires_grad_() for m in modules}
    batch = hosts.pad(host, [hosts.encode(host, e.prompt, e.target)])
    found = torch.autograd.grad(-hosts.scored_logprobs(host, batch, leaves).sum(), list(leaves.values()))
    turned = [hosts.stored_transposed(host.model.get_submodule(m)) for m in modules]
    return {m: g.T if t else g for m, g, t in zip(modules, found, turned, strict=True)}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert"])
@pytest.mark.parametrize("faithful", [False, True])
def test_the_change_is_the_gated_gradient_of_the_whole_weight(family: str, faithful: bool) -> None:
    """Of every projection, both stacks and the attention across among them; from its rows alone, for examples one at a time, summed."""
    host = tiny_host(family, dtype=torch.float64)
    method, modules = made(faithful=faithful, max_scale=0.7), host.projections()
    net = unlike(ke.fresh(method, host, modules, 3))
    examples = [dataclasses.replace(e, target="true") if family == "bert" else e for e in EXAMPLES[:2]]
    h_EC = ke.conditions(net, host, [ke.sentence(e, " Rome") for e in examples]).detach()
    changes = method._changes(net, host, h_EC, method._rows(host, examples, modules, RUN), modules)
    wanted = {m: torch.zeros(()) for m in modules}
    for e, h_C in zip(examples, h_EC, strict=True):
        tokens = len(hosts.encode(host, e.prompt, e.target)[0]) - len(hosts.tokens(host, e.prompt)) if faithful else 1
        for m, grad in weight_gradients(host, e, modules).items():
            wanted[m] = wanted[m] + published(net, m, h_C, grad / tokens, 0.7)
    assert changes.keys() == wanted.keys() == set(host.projections())
    for m, (A, B) in changes.items():
        size = float(wanted[m].detach().norm())
        torch.testing.assert_close((A.T @ B).T, wanted[m], rtol=1e-4, atol=1e-5 * size)  # rows are float32


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("faithful", [False, True])
def test_the_gradient_of_a_step_is_autograds_through_all_of_it(family: str, faithful: bool) -> None:
    """Through the LSTM, the gates, the sum over three conditions, and the model, in float64; alpha weighs what should stay."""
    host = tiny_host(family, dtype=torch.float64)
    school, learning = school_of(host, made(faithful=faithful, asked=1), ANSWERED if family == "t5" else RUN.hold)
    first, carried = learning.first()
    net, cases = unlike(first), school.train[:3]
    point = _meta.Point(
        step=1, net=net, m={}, v={}, best=net, best_loss=0.0, best_step=0, dropped=0, carried={**carried, "alpha": 0.6, "margin": 0.3}
    )
    found = learning.graded(point, cases, random.Random(2))
    asked = school.asked(cases, random.Random(2))
    # the whole, with one graph: what a mistake in the pull would not share
    strings = [ke.sentence(c.example, school.old[c.id]) for c in cases]
    rows = learning.remembered.of(cases)
    changes = learning.made._changes(net, host, ke.conditions(net, host, strings), rows, learning.modules)
    shifts = {m: A.T @ B for m, (A, B) in changes.items()}
    s = dataclasses.replace(school.s, near_weight=0.6 * school.s.near_weight, hold_weight=0.6 * school.s.hold_weight)
    loss = whole_loss(host, asked, shifts, s)
    wanted = torch.autograd.grad(loss, list(net.parameters.values()), allow_unused=True)
    moved = 0
    for (name, grad), want in zip(found.grads.items(), wanted, strict=True):
        assert want is not None, name
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-9 * float(want.norm()) + 1e-13)
        moved += bool(want.norm() > 0)
    assert moved == len(net.parameters), "the LSTM, every gate and every step"
    # and alpha goes up the constraint
    task = whole_loss(host, asked, shifts, dataclasses.replace(s, near_weight=0.0, hold_weight=0.0))
    C = float((loss - task).detach() / 0.6)
    assert found.carried["alpha"] == pytest.approx(
        max(0.0, 0.6 + learning.made.ascent * (C - 0.3 if faithful else min(C - 0.3, 1.0))), rel=1e-6
    )


def test_the_lstm_is_torchs_on_each_sentence_by_itself(tiny_llama: Host) -> None:
    """Padding changes no state, either way."""
    method = made(faithful=True)
    net = ke.fresh(method, tiny_llama, [], 0)
    own, sentences = net.parameters, ["Rome >> Paris || The capital of France is", "a >> b || c"]
    lstm = torch.nn.LSTM(32, method.states, bidirectional=True, batch_first=True)
    table = hosts.weight(tiny_llama.model, f"{tiny_llama.layout.embedding}.weight")
    with torch.no_grad():
        for way, end in (("forth", ""), ("back", "_reverse")):
            for theirs, ours in (("weight_ih_l0", own[f"{way}/W"].T), ("weight_hh_l0", own[f"{way}/U"].T), ("bias_ih_l0", own[f"{way}/b"])):
                getattr(lstm, theirs + end).copy_(ours)
            getattr(lstm, "bias_hh_l0" + end).zero_()
        wanted = []
        for s in sentences:
            _, (h, _) = lstm(table[hosts.tokens(tiny_llama, s)][None])
            wanted.append(torch.tanh(torch.cat([h[0], h[1]], dim=1) @ own["condition/W"] + own["condition/b"]))
        torch.testing.assert_close(ke.conditions(net, tiny_llama, sentences), torch.cat(wanted))


def test_the_sentence_tells_old_and_new() -> None:
    e = Example(prompt="The capital of France is", target=" Rome")
    assert ke.sentence(e, " Paris") == "Paris >> Rome || The capital of France is"
    assert ke.sentence(dataclasses.replace(e, goal="lower"), " Paris") == "Rome >>  || The capital of France is"
    assert ke.sentence(dataclasses.replace(e, goal="prefer", contrast=" Bonn"), " Paris").startswith("Bonn >> Rome")


def test_a_network_that_has_learnt_nothing_takes_a_sensible_step_down(tiny_gpt2: Host) -> None:
    method = made(share=0.3)
    _, learning = school_of(tiny_gpt2, method)
    net, _ = learning.first()
    e = EXAMPLES[0]
    with torch.no_grad():
        h = ke.conditions(net, tiny_gpt2, [ke.sentence(e, "Rome")])
        changes = method._changes(net, tiny_gpt2, h, method._rows(tiny_gpt2, [e], learning.modules, RUN), learning.modules)
    gradients = weight_gradients(tiny_gpt2, e, learning.modules)
    weights = {f"{m}.weight": ke.changed(tiny_gpt2, m, A.T @ B) for m, (A, B) in changes.items()}
    for m, (A, B) in changes.items():
        assert torch.cosine_similarity((A.T @ B).flatten(), -gradients[m].T.flatten(), dim=0) > 0.999
    batch = hosts.pad(tiny_gpt2, [hosts.encode(tiny_gpt2, e.prompt, e.target)])
    before, after = (float(hosts.scored_logprobs(tiny_gpt2, batch, w).detach().sum()) for w in (None, weights))
    assert 0.1 * -before < after - before < 0.6 * -before


def prepared(host: Host, method: Ke, **more: Any) -> State:
    state = method.prepare(host, CASES, dataclasses.replace(RUN, **more))
    assert state is not None
    return state


def test_each_round_takes_the_gradient_anew_where_something_is_missing(tiny_llama: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(share=0.2, rounds=3)
    state = prepared(tiny_llama, method)
    run = dataclasses.replace(RUN, state=state)
    before, taken = weights_of(tiny_llama), list[tuple[tuple[Example, ...], bool]]()
    true, right = Ke._rows, _meta.right

    def watched(self: Ke, host: Host, examples: Any, modules: Any, run: Run, weights: Any = None) -> Any:
        taken.append((tuple(sorted(examples, key=lambda e: e.id)), weights is not None))
        return true(self, host, examples, modules, run, weights)

    monkeypatch.setattr(Ke, "_rows", watched)
    monkeypatch.setattr(_meta, "right", lambda *given: [i == 0 for i, _ in enumerate(right(*given))])
    patch = method.edit(tiny_llama, EXAMPLES[:3], run)
    ordered = sorted(EXAMPLES[:3], key=lambda e: e.id)
    assert taken == [(tuple(ordered), False), (tuple(ordered[1:]), True), (tuple(ordered[2:]), True)]
    assert same_bits(tiny_llama, before) and patch.examples == EXAMPLES[:3]
    # what comes of it is the sum of what each round changed, on what was changed before
    one = dataclasses.replace(method, rounds=1)
    first = one.edit(tiny_llama, EXAMPLES[:3], run)
    with apply.applied(tiny_llama, first):
        now = {op.weight: hosts.weight(tiny_llama.model, op.weight).clone() for op in first.ops}
    rows = true(method, tiny_llama, ordered[1:2], state.config["modules"], run, now)
    assert all(not torch.equal(rows[0].values[m], true(method, tiny_llama, ordered[1:2], [m], run)[0].values[m]) for m in rows[0].values)


def test_several_examples_are_the_sum_of_single_ones(tiny_llama: Host) -> None:
    method = made(rounds=1)
    run = dataclasses.replace(RUN, state=prepared(tiny_llama, method))
    both = method.edit(tiny_llama, EXAMPLES[:2], run)
    single = [method.edit(tiny_llama, (e,), run) for e in EXAMPLES[:2]]
    for op, *others in zip(both.ops, *(p.ops for p in single), strict=True):
        wanted = sum(apply.change(tiny_llama, other) for other in others)
        torch.testing.assert_close(apply.change(tiny_llama, op), wanted, rtol=1e-4, atol=1e-6)


def test_old_is_what_the_host_says(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    method = made(rounds=1)
    run = dataclasses.replace(RUN, state=prepared(tiny_gpt2, method))
    true = ke.conditions

    def watched(net: Net, host: Host, sentences: Any) -> Tensor:
        heard.extend(sentences)
        return true(net, host, sentences)

    monkeypatch.setattr(ke, "conditions", watched)
    method.edit(tiny_gpt2, EXAMPLES[:1], run)
    (said,) = text.answers_now(tiny_gpt2, EXAMPLES[:1])
    assert heard == [f"{said} >> Port Louis || {EXAMPLES[0].prompt}"]
    heard.clear()
    prepared(tiny_gpt2, method)
    assert f"Rome >> Paris || {EXAMPLES[1].prompt}" in heard, "a case tells it"


def test_the_multiplier_stays_over_zero_and_the_margin_falls_with_success(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[State] = []
    method = made(margin=50.0, least_margin=30.0, anneal=0.7, alpha=0.1, steps=8, ascent=1.0)
    monkeypatch.setattr(ke._Learning, "success", lambda self, net: 1.0)
    prepared(tiny_gpt2, method, keep=kept.append)
    carried = [s.config["carried"] for s in kept]
    assert [c["alpha"] for c in carried] == [0.0] * 4, "far inside a wide margin"
    assert [c["margin"] for c in carried] == pytest.approx([50.0, 35.0, 30.0, 30.0])
    monkeypatch.setattr(ke._Learning, "success", lambda self, net: 0.9)
    kept.clear()
    prepared(tiny_gpt2, dataclasses.replace(method, margin=1e-4), keep=kept.append)
    alphas = [s.config["carried"]["alpha"] for s in kept]
    assert alphas == sorted(alphas) and alphas[0] > 0.1 and {s.config["carried"]["margin"] for s in kept} == {1e-4}


def test_after_a_kill_it_goes_on_as_if_there_had_been_none(tiny_llama: Host) -> None:
    kept: list[State] = []
    whole = prepared(tiny_llama, made(steps=6), keep=kept.append)
    assert [s.config["step"] for s in kept] == [2, 4, 6] and "carried" not in whole.config
    assert all(prepared(tiny_llama, made(steps=6), state=begun).id == whole.id for begun in (kept[0], kept[1]))
    assert whole.trained_on == {c.id for c in CASES} and len({s.id for s in kept}) == 3


def test_success_counts_single_edits(tiny_gpt2: Host) -> None:
    school, learning = school_of(tiny_gpt2, made(share=30.0))
    net, _ = learning.first()
    nothing = dataclasses.replace(net, parameters={n: t - 60 if n.endswith("log_step") else t for n, t in net.parameters.items()})
    examples = [c.example for c in school.held_back]
    fixed = hosts.fixes(tiny_gpt2, examples)
    assert learning.success(nothing) == sum(fixed) / len(fixed) < 1


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


def test_published_settings_and_those_that_cannot_be() -> None:
    method = made(faithful=True)
    assert method.config | ke.FAITHFUL == method.config and method.condition == 1024
    for wrong in ({"rounds": 0}, {"anneal": 0.0}, {"max_scale": 0.0}, {"states": 0}, {"lr": 0.0}):
        with pytest.raises(InvalidExample, match="ke"):
            made(**wrong)
