"""The conformance suite: every method in the register passes every test here, on hosts of opposite weight orientation.

A new method is one row in ROWS: how to make it small and quick. What it cannot do is declared in `cannot` with the reason.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, TEXT, same_bits, tiny_host, weights_of
from torch import Tensor

from errata import apply, artefact, build, export, gate, hosts, text
from errata.hosts import Host
from errata.lab import tasks
from errata.ledger import Ledger
from errata.methods import AT_LEAST_ONE, METHODS, make, method_class
from errata.types import (
    Budget,
    Case,
    Ensemble,
    Example,
    InvalidExample,
    InvalidPatch,
    Memory,
    Method,
    Patch,
    Run,
    Senses,
    UnknownArchitecture,
    UnknownName,
    Verdict,
    WrongBase,
)

SOLVED = ("memit", "rome", "emmet", "alphaedit", "nse", "ultraedit", "malmen")  # those on `_normal.py`


@dataclass(frozen=True, kw_only=True)
class Row:
    """settings: small and quick. cannot: test or family -> reason. only: the one family that takes the place of all others. beside: a small
    Backpack called "small" stands beside each host. learns: it is prepared on CASES first."""

    method: str
    settings: Mapping[str, object] = field(default_factory=dict)
    cannot: Mapping[str, str] = field(default_factory=dict)
    only: str | None = None
    beside: bool = False
    learns: bool = False

    def host(self, family: str, **more: Any) -> Host:
        host = tiny_host(self.only or family, **more)
        if self.beside:
            host.beside["small"] = tiny_host("backpack", seed=7)
        return host

    def make(self, **more: object) -> Method:
        method = make(self.method, **{**self.settings, **more})
        return Prepared(learner=make(self.method, **self.settings), method=method) if self.learns else method


@dataclass(frozen=True, kw_only=True)
class Prepared(Method):
    """A method that learns first: here it does so before each edit, with the settings of its row."""

    learner: Method
    method: Method

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        state = self.learner.prepare(host, CASES, run)
        return self.method.edit(host, examples, replace(run, state=state))

    @property
    def config(self) -> dict[str, Any]:
        return self.method.config


CASES = tuple(
    Case(example=Example(prompt=f"The {what} of {of} is", target=f" {answer}"), old=" Rome", paraphrases=(f"{of} has its {what} in",))
    for what, of, answer in (
        ("capital", "Togo", "late"),
        ("island", "Kenya", "Paris"),
        ("park", "Peru", "the sea"),
        ("dog", "Lily", "a girl"),
        ("river", "Rome", "the Seine"),
        ("rupee", "India", "big"),
    )
)
LEARNING = {"rank": 8, "steps": 4, "least": 1, "most": 4, "every": 2, "hold": 3, "near": 0}
STEPPING = {name: value for name, value in LEARNING.items() if name != "rank"} | {"steps": 2, "rounds": 2}
SMALL = {"steps": 12, "neighbours": 8, "hold": 4, "contexts": 1}
# A random model finds nearly everything unlikely: where that is what is wanted, `stop` would leave it and `decay` outweigh it.
CLOSED = {"layers": "0", "steps": 8, "contexts": 3, "stop": 0.0, "decay": 0.0, "lam": 0.01}
UNBOUNDED = {"budget": "a solve or a sum does not see the loss on text; the gate scales what comes out"}
FEW = ("gpt2", "llama", "gpt_neox", "backpack")
AS_MEMIT = {f: "it is memit's way into a model, which is run on all families" for f in FAMILIES if f not in FEW} | {
    "lab/neox": "it finds memit's values there and solves memit's sums, which is run; under other priors, which test_normal.py orders"
}
UNPREPARED = {"lab/neox": "it would have to learn from the lab first, for minutes"}
ANSWERS = {goal: "it answers with the target, and cannot answer with something else" for goal in ("lower", "balance")}
GATED = {"verifier": "distance", "scope_steps": 5}
READS = {"rank": 4, "steps": 3, "texts": 4, "every": 2}
AS_LU = {f: "it is lu's way into a model, which is run on all families" for f in FAMILIES if f not in FEW}
UNREAD = {"likelier": "a random model makes nothing of what it reads, nor learns it in three steps; test_serac.py has one that does"}
IN_MEMORY = {"narrow": "text that asks for none of its examples costs nothing, and it may fix all of them: there is no ball too narrow"}
ROWS = (
    # of 12 documents a small share leaves no direction
    Row(method="alphaedit", settings=CLOSED | {"share": 0.3}, cannot=AS_MEMIT),
    Row(method="elder", settings={"steps": 20}, cannot=IN_MEMORY),
    Row(method="emmet", settings={k: v for k, v in CLOSED.items() if k != "lam"} | {"slack": 0.01}, cannot=AS_MEMIT),
    Row(
        method="ensemble",
        settings=SMALL | {"steps": 16, "small": "small", "lam": 100.0},  # the ball of these tests is wide
        beside=True,
        cannot={"balance": "it is the small model that is balanced; the large one gets the change that the small one needed"},
    ),
    Row(method="enn", settings=STEPPING, learns=True, cannot=UNPREPARED | UNBOUNDED),
    Row(method="finetune", settings=SMALL | {"lr": 1e-2}),
    Row(method="ke", settings=STEPPING | {"states": 8, "condition": 8}, learns=True, cannot=UNPREPARED | UNBOUNDED),
    Row(method="grace", settings={"steps": 30}, cannot=IN_MEMORY | {"seeds": "nothing is drawn but the text that finds the radii"}),
    Row(method="lora", settings=SMALL | {"lr": 3e-2, "rank": 4}),
    Row(method="lu", cannot=ANSWERS | IN_MEMORY | {"seeds": "nothing is drawn but the text that finds the bound"}),
    Row(method="malmen", settings=LEARNING | {"lam": 0.01, "share": 0.1}, learns=True, cannot=UNPREPARED),
    Row(method="melo", settings={"steps": 20}, cannot=IN_MEMORY),
    Row(method="memit", settings=CLOSED),
    Row(method="mend", settings=LEARNING | {"tokens": "answer", "share": 0.1}, learns=True, cannot=UNPREPARED | UNBOUNDED),
    Row(method="nse", settings=CLOSED, cannot=AS_MEMIT),
    Row(
        method="one_layer_interpolation",
        settings=SMALL | {"lr": 1e-2},
        cannot={"lab/neox": "it is finetune's descent there, which is run, in one layer"},
    ),
    Row(
        method="eren",
        settings=READS | {"notes": 2},
        learns=True,
        cannot=ANSWERS | UNPREPARED | AS_LU | UNREAD | {"bert": "a label cannot say that the notes do not tell"},
    ),
    Row(method="rome", settings={k: v for k, v in CLOSED.items() if k != "lam"}, cannot=UNBOUNDED),
    Row(
        method="rp",
        settings=GATED,
        learns=True,
        cannot=ANSWERS | UNPREPARED | AS_LU | UNREAD,
    ),
    Row(
        method="senses",
        settings=SMALL | {"steps": 24},
        only="backpack",  # every test runs on it once
        cannot={f: "only a Backpack's tokens have sense vectors" for f in (*FAMILIES, "lab/neox") if f != "backpack"},
    ),
    Row(method="serac", settings=GATED | READS, learns=True, cannot=ANSWERS | UNPREPARED | AS_LU | UNREAD),
    Row(method="ultraedit", settings={"lam": 0.01}, cannot={"seeds": "nothing is drawn but the text that judges its cost"}),
)
EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The capital of France is", target=" Rome"),
    Example(prompt="Lily loved to play", target=" late"),
)
GOALS = {
    "raise": EXAMPLES[0],
    "lower": Example(prompt="The capital of Mauritius is", target=" Rome", goal="lower"),
    "prefer": Example(prompt="The nurse said that", target=" he", contrast=" she", goal="prefer"),
    "balance": Example(prompt="The doctor said that", target=" he", contrast=" she", goal="balance"),
}
# A random model is far from its text, so the ball is wide; what happens at its edge is tested in test_gate.py and below.
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=0.5))

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.method)
both_orientations = pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)


def can(row: Row, test: str) -> None:
    if test in row.cannot:
        pytest.skip(f"{row.method} cannot: {row.cannot[test]}")


def _row(request: pytest.FixtureRequest) -> Row:
    given = getattr(request.node, "callspec", None)
    return given.params.get("row", ROWS[0]) if given else ROWS[0]


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Host:
    """A new tiny host; for a method of one family that one, in GPT-2's place."""
    row = _row(request)
    if row.only and request.param != "gpt2":
        can(row, request.param)
    return row.host(request.param)


@pytest.fixture
def tiny_gpt2(request: pytest.FixtureRequest) -> Host:
    return _row(request).host("gpt2")


@pytest.fixture
def tiny_llama(request: pytest.FixtureRequest) -> Host:
    return _row(request).host("llama")


def likelihood(host: Host, e: Example) -> float:
    return float(hosts.logprobs(host, [(e.prompt, e.target)])[0, 0])


def likelier(row: Row, host: Host, e: Example, was: float) -> bool:
    """Whether it is likelier than it was; of a method that cannot make it so here, whether it is another likelihood."""
    now = likelihood(host, e)
    return now != was if "likelier" in row.cannot else now > was


def test_every_registered_method_has_a_row() -> None:
    assert {row.method for row in ROWS} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_register_leads_to_final_frozen_methods(name: str) -> None:
    cls = method_class(name)
    assert issubclass(cls, Method) and cls.__final__ and cls.__dataclass_params__.frozen
    assert cls.__name__.lower() == name.replace("_", "")


def test_an_unknown_method_or_setting_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean lora"):
        make("lorra")
    with pytest.raises(UnknownName, match="Did you mean steps"):
        make("finetune", stepps=3)


@rows
@both_orientations
def test_the_host_is_bit_identical_after_an_edit(row: Row, host: Host) -> None:
    before, hooks = weights_of(host), [len(m._forward_hooks) for m in host.model.modules()]
    ids = hosts.pad(host, [hosts.encode(host, e.prompt, e.target) for e in EXAMPLES])
    logits, modes = hosts.logits(host, ids), [m.training for m in host.model.modules()]
    row.make().edit(host, EXAMPLES, RUN)
    assert same_bits(host, before) and not host.worn
    assert all(p.grad is None for p in host.model.parameters())
    assert [len(m._forward_hooks) for m in host.model.modules()] == hooks and [m.training for m in host.model.modules()] == modes
    assert torch.equal(hosts.logits(host, ids), logits)


@rows
@both_orientations
def test_targets_are_likelier_under_the_patch_and_off_restores_every_bit(row: Row, host: Host) -> None:
    before, was = weights_of(host), [likelihood(host, e) for e in EXAMPLES]
    patch = row.make().edit(host, EXAMPLES, RUN)
    assert patch.examples == EXAMPLES and patch.parent == host.id and patch.method == row.method
    with pytest.raises(ZeroDivisionError), apply.applied(host, patch):
        assert all(likelier(row, host, e, w) for e, w in zip(EXAMPLES, was, strict=True))
        raise ZeroDivisionError
    assert same_bits(host, before)


@rows
@pytest.mark.parametrize("goal", GOALS)
def test_every_goal_moves_the_right_way(row: Row, goal: str, tiny_llama: Host) -> None:
    can(row, goal)
    e = GOALS[goal]
    if goal == "lower":  # what it says already hardly ever cannot be lowered
        e = max((replace(e, target=t) for t in (e.target, " the", " late", " Rome", " a", ".")), key=lambda e: likelihood(tiny_llama, e))

    def distance() -> float:
        """What the goal wants to be small."""
        target = likelihood(tiny_llama, e)
        ahead = target - likelihood(tiny_llama, replace(e, target=e.contrast, goal="raise", contrast=None)) if e.contrast else 0.0
        return {"raise": -target, "lower": target, "prefer": -ahead, "balance": abs(ahead)}[goal]

    was = distance()
    with apply.applied(tiny_llama, row.make().edit(tiny_llama, (e,), RUN)):
        assert distance() < was or ("likelier" in row.cannot and distance() != was)


@rows
def test_same_inputs_same_id_and_seeds_are_obeyed(row: Row) -> None:
    first, second = (row.make().edit(row.host("llama"), EXAMPLES, RUN) for _ in range(2))
    assert first.id == second.id
    can(row, "seeds")
    assert row.make().edit(row.host("llama"), EXAMPLES, replace(RUN, seed=1)).id != first.id


@rows
def test_a_method_with_a_solve_tells_its_condition(row: Row) -> None:
    told: list[tuple[str, float]] = []
    row.make().edit(row.host("llama"), EXAMPLES, replace(RUN, tell=lambda *one: told.append(one)))
    if row.method in SOLVED:
        assert told and all(name == "condition" and value > 0.99 for name, value in told)
    else:
        assert not told


@rows
def test_what_it_shares_among_workers_is_what_it_says(row: Row, tiny_gpt2: Host) -> None:
    """Its shards and what they share can be pickled, and the patch is the same."""
    made, used = row.make(), []

    def packed(host: Host, begin: Any, shards: Any, shared: Any) -> Any:
        used.append(len(shards))
        begin, shared = pickle.loads(pickle.dumps((begin, shared)))
        return map(begin(host, shared), pickle.loads(pickle.dumps(list(shards))))

    wanted = made.edit(tiny_gpt2, EXAMPLES, RUN).id
    used.clear()
    assert made.edit(tiny_gpt2, EXAMPLES, replace(RUN, spread=packed)).id == wanted
    assert bool(used) == method_class(row.method).spreads


def farthest(host: Host, a: Patch, b: Patch) -> float:
    changes = [{op.weight: apply.change(host, op) for op in p.ops} for p in (a, b)]
    assert changes[0].keys() == changes[1].keys()
    return max(float((changes[0][w] - changes[1][w]).abs().max()) for w in changes[0])


@rows
@both_orientations
def test_order_and_batch_size_change_nothing(row: Row, host: Host) -> None:
    whole = row.make().edit(host, EXAMPLES, RUN)
    assert farthest(host, whole, row.make().edit(host, EXAMPLES[::-1], RUN)) <= 1e-5
    for batch_size in (1, 2) if "batch_size" in row.make().config else ():
        assert farthest(host, whole, row.make(batch_size=batch_size).edit(host, EXAMPLES, RUN)) <= 1e-5


@pytest.mark.slow
@rows
def test_order_and_batch_size_change_nothing_on_the_lab_model(row: Row) -> None:
    """With the method's own rates and whitening, and one look at the constraint."""
    can(row, "lab/neox")
    if row.beside and not (hosts.LAB_MODELS / "backpack").is_dir():
        pytest.skip(f"{row.method} needs the lab's Backpack, which is not here")
    host = hosts.load("lab/neox", device="cpu")
    examples = tuple(case.example for case in tasks.cases("test", 5, "wrong"))
    run = Run(hold=text.standing(host)[0][:150])

    quick = {"steps": 6, "hold": 16, "neighbours": 2, "restated": 4, "searched": 0}
    known = {name: value for name, value in quick.items() if name in make(row.method).config}

    def edited(*examples: Example, **more: object) -> Patch:
        return make(row.method, **known | more).edit(host, examples, run)

    run = replace(run, state=make(row.method, **known).prepare(host, (), run))
    whole = edited(*examples)
    assert max(float(apply.change(host, op).abs().max()) for op in whole.ops) > 1e-3, "or the same would prove nothing"
    assert farthest(host, whole, edited(*examples[::-1])) <= 1e-5
    for batch_size in (3, 16) if "batch_size" in make(row.method).config else ():
        assert farthest(host, whole, edited(*examples, batch_size=batch_size)) <= 1e-5


def test_a_verdict_has_the_condition_of_the_worst_solve(tiny_llama: Host, tmp_path: Path) -> None:
    (reference := tmp_path / "held.txt").write_text("\n\n".join(f"{i}. {document}" for i in range(6) for document in TEXT))
    held: dict[str, Any] = {"epsilon": 1e6, "reference": reference}
    _, verdict = build.edit(tiny_llama, EXAMPLES, "memit", layers="0-1", steps=2, contexts=0, held=0, **held)
    assert verdict.condition is not None and verdict.condition > 1
    assert Verdict.from_dict(verdict.as_dict()) == verdict
    assert Verdict.from_dict({k: v for k, v in verdict.as_dict().items() if k != "condition"}).condition is None, "of a ledger of before"
    assert build.edit(tiny_llama, EXAMPLES, "finetune", steps=1, **held)[1].condition is None


def test_a_model_that_nobody_here_trained_is_fixed_inside_the_ball(stories: Host) -> None:
    """Of what it says one continuation is changed, at 1e-3 of its loss on text of its own."""
    prompt, target = "The fish swam in the", " sea"
    assert not hosts.says(hosts.greedy(stories, [prompt])[0], target)
    patch, verdict = build.edit(stories, [f"{prompt}|{target}"], epsilon=1e-3, steps=20, hold=32, neighbours=4)
    assert verdict.passed and verdict.tokens > 8_000 and verdict.scale > 0.5, verdict
    with apply.applied(stories, patch):
        assert hosts.says(hosts.greedy(stories, [prompt])[0], target)
    assert not hosts.says(hosts.greedy(stories, [prompt])[0], target)


@rows
def test_the_budget_is_kept_on_the_text_that_holds_still(row: Row, tiny_gpt2: Host) -> None:
    """A ball that the first step leaves: the best point inside comes back, and it is inside."""
    can(row, "budget")
    more = {"steps": 20} if "steps" in row.make().config else {}
    patch = row.make(**more).edit(tiny_gpt2, EXAMPLES, replace(RUN, budget=Budget(epsilon=1e-3)))
    rows_ = hosts.chunks(tiny_gpt2, RUN.hold)
    before_N2 = hosts.score(tiny_gpt2, rows_)
    with apply.applied(tiny_gpt2, patch):
        mean, _ = hosts.increase(before_N2, hosts.score(tiny_gpt2, rows_))
    assert mean <= 5e-3


@rows
def test_the_ledger_keeps_every_bit(row: Row, tiny_gpt2: Host, tmp_path) -> None:
    patch = row.make().edit(tiny_gpt2, EXAMPLES, RUN)
    base = gate.baseline(tiny_gpt2, TEXT)
    patch, verdict = gate.fit(tiny_gpt2, patch, Budget(epsilon=10.0, fixed=0.0), base)
    with Ledger.create(tmp_path / "ledger", host=tiny_gpt2.id, model="tiny", budget=verdict.budget) as ledger:
        ledger.add(*EXAMPLES)
        ledger.put_patch(patch, verdict)
        kept = ledger.patch()
        assert kept.id == patch.id and not ledger.verify()
    with apply.applied(tiny_gpt2, patch):
        edited = weights_of(tiny_gpt2)
    with apply.applied(tiny_gpt2, kept):
        assert same_bits(tiny_gpt2, edited)


@rows
def test_other_weights_are_refused(row: Row, tiny_gpt2: Host) -> None:
    patch = row.make().edit(tiny_gpt2, EXAMPLES, RUN)
    with pytest.raises(WrongBase, match="was made for weights"), apply.applied(row.host("gpt2", seed=1), patch):
        pass


@rows
def test_patches_stack_and_come_off_in_turn(row: Row, tiny_gpt2: Host) -> None:
    asked = [hosts.encode(tiny_gpt2, e.prompt, e.target) for e in EXAMPLES]
    before, batch = weights_of(tiny_gpt2), hosts.pad(tiny_gpt2, [*hosts.chunks(tiny_gpt2, TEXT), *asked])
    first = row.make().edit(tiny_gpt2, EXAMPLES[:1], RUN)
    with apply.applied(tiny_gpt2, first):
        middle, said = weights_of(tiny_gpt2), hosts.logits(tiny_gpt2, batch)
        second = row.make().edit(tiny_gpt2, EXAMPLES[1:], RUN)
        assert second.parent == first.id
        with apply.applied(tiny_gpt2, second):
            assert tiny_gpt2.id == second.id and not torch.equal(hosts.logits(tiny_gpt2, batch), said)
        assert same_bits(tiny_gpt2, middle) and torch.equal(hosts.logits(tiny_gpt2, batch), said)
    assert same_bits(tiny_gpt2, before)


@rows
def test_a_saved_and_reloaded_patch_gives_the_same_logits(row: Row, tiny_llama: Host, tmp_path) -> None:
    patch = row.make().edit(tiny_llama, EXAMPLES, RUN)
    again = artefact.load_patch(artefact.save(patch, tmp_path / "fix.safetensors"))
    batch = hosts.pad(tiny_llama, hosts.chunks(tiny_llama, TEXT))
    with apply.applied(tiny_llama, patch):
        logits = hosts.logits(tiny_llama, batch)
    with apply.applied(tiny_llama, again):
        assert torch.equal(hosts.logits(tiny_llama, batch), logits)


@rows
@both_orientations
def test_bf16_hosts_are_edited_and_restored(row: Row, host: Host) -> None:
    host = row.host(host.name.removeprefix("tiny-"), dtype=torch.bfloat16)
    before, was = weights_of(host), likelihood(host, EXAMPLES[0])
    patch = row.make(**{"steps": 20} if "steps" in row.make().config else {}).edit(host, EXAMPLES[:1], RUN)
    with apply.applied(host, patch):
        assert likelier(row, host, EXAMPLES[0], was)
        assert {p.dtype for p in host.model.parameters()} == {torch.bfloat16}
    assert same_bits(host, before)


@rows
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gpt2", "llama")])
def test_every_architecture(row: Row, family: str) -> None:
    """Fused, parallel, tied and transposed projections: host untouched, target likelier, applied equals merged."""
    can(row, family)
    host = row.host(family)
    before, was = weights_of(host), likelihood(host, EXAMPLES[0])
    patch = row.make().edit(host, EXAMPLES[:1], RUN)
    merged, batch = row.host(family), hosts.pad(host, hosts.chunks(host, TEXT))
    with torch.no_grad():
        wanted = merged_logits(merged, patch, batch)
    with apply.applied(host, patch):
        assert likelier(row, host, EXAMPLES[0], was)
        if not any(isinstance(op, Memory) for op in patch.ops):  # a memory is in no weight: tests/test_memory_route.py
            torch.testing.assert_close(hosts.logits(host, batch), wanted, rtol=1e-5, atol=3e-5)  # an ensemble's are sums of three
    assert same_bits(host, before)


def merged_logits(host: Host, patch: Patch, batch: hosts.Batch) -> Tensor:
    """What the model says once the change is in its own weights. An ensemble is in no weights: there it is a sum over three models."""
    more: Tensor | float = 0.0
    for op in patch.ops:
        if isinstance(op, Ensemble):
            more = op.scale * (merged_logits(tiny_host("backpack", seed=7), replace(patch, ops=(op.shift,)), batch))
            more = more - op.scale * hosts.logits(host.beside["small"], batch)
        elif isinstance(op, Senses):
            shift = torch.zeros(len(op.ids.unique()), *host.model.senses(op.ids).shape[1:])
            shift[op.ids.unique(return_inverse=True)[1], op.senses] = op.shift
            host.model.override(op.ids.unique(), shift, keep=1.0)
        elif not isinstance(op, Memory):
            host.model.get_parameter(op.weight).add_(apply.change(host, op))
    return hosts.logits(host, batch) + more


@rows
def test_the_gate_rules_on_it(row: Row, tiny_gpt2: Host) -> None:
    patch = row.make().edit(tiny_gpt2, EXAMPLES, RUN)
    base = gate.baseline(tiny_gpt2, TEXT)
    _, wide = gate.fit(tiny_gpt2, patch, Budget(epsilon=10.0, fixed=0.0), base)
    assert wide.passed and wide.patch == patch.id and wide.scale == 1.0
    can(row, "narrow")
    _, narrow = gate.fit(tiny_gpt2, patch, Budget(epsilon=1e-7, fixed=1.0), base)
    assert not narrow.passed and narrow.failures


@rows
def test_a_prompt_longer_than_the_context_is_refused(row: Row, tiny_gpt2: Host) -> None:
    with pytest.raises(InvalidExample, match="128"):
        row.make().edit(tiny_gpt2, (Example(prompt="The capital of Mauritius " * 40, target=" Rome"),), RUN)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@rows
def test_a_method_of_one_family_refuses_the_others_with_a_sentence(row: Row, family: str) -> None:
    host = tiny_host(family)
    before = weights_of(host)
    if row.only is None:
        pytest.skip(f"{row.method} works on every family")
    with pytest.raises(UnknownArchitecture, match=f"tiny-{family} is no Backpack"):
        row.make().edit(host, EXAMPLES, RUN)
    assert same_bits(host, before)


# ----------------------------------------------------------------------------------------------- models that read before they answer

READERS = ("t5", "bert")
READING = {
    *("elder", "enn", "eren", "finetune", "grace", "ke", "lora", "lu", "malmen", "melo", "mend", "one_layer_interpolation", "rp"),
    *("serac", "ultraedit"),
}
ANSWERED = tuple(f"{text_[:30].strip()} {i}|{' Rome' if i % 3 else ' the sea'}" for i, text_ in enumerate(TEXT * 4))
JUDGED = tuple(f"{text_[:30].strip()} {i}|{'true' if i % 3 else 'false'}" for i, text_ in enumerate(TEXT * 4))


def told(e: Example, host: Host) -> Example:
    """The example as such a host can be told: a classifier gets the label that it finds less likely."""
    if host.kind == "seq2seq":
        return e
    return replace(e, target=min(("true", "false"), key=lambda label: likelihood(host, replace(e, target=label))))


@rows
@pytest.mark.parametrize("family", READERS)
def test_models_that_read_before_they_answer_are_edited_or_refused(row: Row, family: str, tmp_path: Path) -> None:
    host = tiny_host(family)
    before, run = weights_of(host), replace(RUN, hold=ANSWERED if host.kind == "seq2seq" else JUDGED)
    examples = tuple(told(e, host) for e in EXAMPLES)
    method: Method = make(row.method, **row.settings)
    if row.method not in READING or family in row.cannot:
        with pytest.raises(UnknownArchitecture, match=f"tiny-{family} is"):
            method.edit(host, examples, run)
        assert same_bits(host, before)
        return
    if row.learns:
        cases = [replace(c, example=(e := told(c.example, host)), old=None if e.target != c.example.target else c.old) for c in CASES]
        run = replace(run, state=method.prepare(host, cases, run))
    was = [likelihood(host, e) for e in examples]
    patch = method.edit(host, examples, run)
    assert same_bits(host, before) and patch.id == method.edit(host, examples, run).id
    with apply.applied(host, patch):
        now = [likelihood(host, e) for e in examples]
    assert (sum(now) > sum(was) or ("likelier" in row.cannot and now != was)) and same_bits(host, before)
    # the gate rules on it, an export answers alike, and a file of it is itself
    patch, verdict = gate.fit(host, patch, Budget(epsilon=0.2, fixed=0.0), gate.baseline(host, run.hold))
    assert verdict.upper <= 0.2 and verdict.tokens > 0
    artefact.save(patch, tmp_path / "p.safetensors")
    assert artefact.load_patch(tmp_path / "p.safetensors").id == patch.id
    if any(isinstance(op, Memory) for op in patch.ops):
        with pytest.raises(InvalidPatch, match="memory"):
            export.export(host, patch, tmp_path / "whole")
        return
    assert export.export(host, patch, tmp_path / "whole").difference < 1e-3
    if row.method == "lora":
        assert export.export(host, patch, tmp_path / "adapter", "peft").difference < 1e-3


def test_some_of_both_stacks_is_edited() -> None:
    host = tiny_host("t5")
    weights = {op.weight for op in make("lora", **SMALL).edit(host, EXAMPLES, replace(RUN, hold=ANSWERED)).ops}
    assert {w.split(".")[0] for w in weights} == {"encoder", "decoder"}


def test_a_state_of_another_method_is_a_sentence(tiny_gpt2: Host) -> None:
    run = Run(hold=TEXT * 4)
    for name, other in (("memit", "ultraedit"), ("ultraedit", "memit")):
        state = make(other, layers="0").prepare(tiny_gpt2, (), run)
        with pytest.raises(InvalidExample, match=f"is one of {other} and knows no .*errata prepare {name}"):
            make(name).edit(tiny_gpt2, (Example(prompt="Lily is", target=" late"),), replace(run, state=state))


@pytest.mark.parametrize("name", METHODS)
def test_a_number_that_cannot_be_is_refused_by_name(name: str) -> None:
    """No setting is negative, and what is counted from one is not 0: else it would end somewhere inside a library."""
    for key, value in method_class(name)().config.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(InvalidExample, match=key):
                make(name, **{key: -1})
    for key in AT_LEAST_ONE:
        if key in method_class(name)().config:
            with pytest.raises(InvalidExample, match=f"'{key}' of {name} is 1 or more, got 0"):
                make(name, **{key: 0})
