"""Learning to edit: the meta-training that `malmen`, `mend`, `ke` and `enn` share.

    phi = argmin  E_cases [ mean_i L_goal(x_i')  +  near * KL on neighbours' prompts  +  hold * KL on held text ],  weights W + S_phi
                                        Mitchell et al. 2022 (MEND), arXiv 2110.11309, section 3; Tan et al. 2023 (MALMEN), arXiv 2311.04661

x' are other ways to ask for an example's fact: the paraphrases and paragraphs of a training case. A step draws n cases, and a `Learning`
says what they teach. That of `malmen` and `mend` (`Merging`) takes the rows of their examples (`_gradients.py`), has the method merge what
the network (`_hyper.py`) makes of them into one S for each module, finds G = dL/dS with S in the place of the weights, and pulls G back to
the network. Between the two halves no graph is kept: what the model needs does not grow with the network, and what the network needs does
not grow with n. How many texts go through the model at once, and how many rows through the network, changes nothing else; n need not be
divisible by either. Nothing goes through a disk.

Everything that a step draws follows from the seed and its number alone, so a training that was cut off goes on as if it had not been.

Unlike malmen@1df295d: n is drawn anew for each step, so that one network serves few and many, and the example's own prompt is asked for
too (neither if `faithful`); the rates rise and fall; held text is held still besides the neighbours' answers; a step whose gradient is not
finite is dropped, and counted; the statistics stand still while held-back cases are judged, and the network that did best on them is kept.

File legend: N rows, K key width, V value width.
"""

import math
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hosts, text
from errata.hosts import Host, Weights, stored_transposed
from errata.methods import _gradients, _hyper
from errata.methods._descend import ENOUGH, PASS, Row, Through, goal_losses, kl_sum
from errata.methods._gradients import Pairs
from errata.methods._hyper import Net
from errata.types import (
    Case,
    Example,
    InvalidExample,
    InvalidPatch,
    Method,
    Rows,
    Run,
    Spread,
    State,
    UnknownName,
    WrongBase,
    canonical_json,
    digest,
    here,
)

BETAS = (0.9, 0.999)
WARM = 10  # steps until the rates are whole
HELD_BACK = (0.1, 2, 96)  # cases that validate: this share of them, at least, at most
REMEMBERED = 1 << 28  # bytes, about, of rows that are not taken again: those of a case are the same in every step
EDITED = 6  # modules, if none are named: what a subject means is found in the lower blocks, what to say of it in the upper ones
BLOCK = 32  # cases whose rows are taken together
SCALES = (1.0, 0.7, 0.5)  # of what a network makes of held-back cases: it is judged by the best of them, for the gate scales too
ABOVE_ZERO = "lam share lr rate clip least chunk every patience asked batch_size rank rounds caution".split()
SPECIAL = 8  # tokens that a tokenizer puts around a text, at most
SINGLE = 2  # held-back cases that validate by themselves, where few are edited together

Pull = Callable[[Float[Tensor, "K V"]], None]  # dL/dS -> adds what follows to the gradients of the network's parameters
Merge = Callable[[Net, str, Float[Tensor, "N K"], Float[Tensor, "N V"]], tuple[Float[Tensor, "K V"], Pull]]
Shifts = dict[str, Float[Tensor, "K V"]]
Earlier = Callable[[Net, tuple[Example, ...], Pairs, int], tuple[Shifts, Pairs]]  # (what so many rounds come to, the rows behind them)


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of the training; each method carries them as its own fields.

    steps        at most
    lr, rate     length of Adam's steps, for the network and for its scalars, as log eta and log lam; both fall as a cosine
    least, most  n of a step is drawn between them, evenly in its logarithm
    asked        prompts of each case in a step: its own, unless `faithful`, and some of its other ways
    near         neighbours in a step; `near_weight` that of their KL, per token
    hold         held documents in a step; `hold_weight` that of their KL, per token
    every        steps between two validations
    patience     validations without a better one before it stops
    clip         greatest norm of a gradient
    batch_size   texts in memory at once, at most; it changes nothing else, unless `faithful`: the gradients then are means over as many
    """

    steps: int
    lr: float
    rate: float
    least: int
    most: int
    asked: int
    near: int
    near_weight: float
    hold: int
    hold_weight: float
    every: int
    patience: int
    clip: float
    batch_size: int
    faithful: bool


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What a method tells the training: how it learns, and what else belongs in its State."""

    name: str
    modules: Sequence[str]
    learning: Callable[["School"], "Learning"]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Graded:
    """What a step has found: gradients by parameter, the network with the statistics of what it has seen, and what else goes on from
    here."""

    grads: Mapping[str, Tensor]
    net: Net
    carried: Mapping[str, float]


class Learning(Protocol):
    """How something is learnt. The answers follow from what they are given alone."""

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """(K, V) of the modules that the network has statistics of."""

    def first(self) -> tuple[Net, Mapping[str, float]]:
        """The network that has learnt nothing, and what else a training begins with."""

    def graded(self, point: "Point", cases: Sequence[Case], rng: random.Random) -> Graded:
        """What these cases teach. Raises InvalidPatch where something is not finite."""

    def judged(self, net: Net) -> float:
        """The loss on held-back cases."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """What one step asks: prompts of examples, and the rows that should stay."""

    prompts: list[tuple[str, Example]]
    near: list[Row]
    held: list[Row]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """Where a training stands: behind `step` steps, with Adam's moments, the best network so far, how many steps were dropped, and what
    else its `Learning` carries along."""

    step: int
    net: Net
    m: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    best: Net
    best_loss: float
    best_step: int
    dropped: int
    carried: Mapping[str, float] = field(default_factory=dict)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Those of the training among a method's."""
    return Settings(**{f.name: config[f.name] for f in fields(Settings)})


def check(name: str, config: Mapping[str, Any]) -> None:
    """Raises InvalidExample for settings that cannot be."""
    for setting in ABOVE_ZERO:
        if setting in config and not config[setting] > 0:
            raise InvalidExample(f"{name} needs a {setting} over 0, got {config[setting]}.")
    if not config["least"] <= config["most"]:
        raise InvalidExample(f"{name} edits from `least` to `most` examples in a step, got {config['least']} and {config['most']}.")


# ------------------------------------------------------------------------------------------------------------------------------ the state


def learnt(host: Host, lesson: Lesson, cases: Sequence[Case], run: Run, s: Settings) -> State:
    """The State that comes of the training. With an unfinished one in `run.state` it goes on there; `run.keep` gets one at each validation.

    Raises InvalidExample for too few cases, or if what was begun is of other cases, settings or text.
    """
    if len(cases) < 4:
        raise InvalidExample(f"{lesson.name} learns from training cases: 4 or more are needed, got {len(cases)}.")
    about = digest(
        lesson.name, host.id, canonical_json([dict(lesson.config), list(lesson.modules), run.seed]), *sorted(c.id for c in cases), *run.hold
    )
    school = School(host, lesson, cases, run, s)

    def state(point: Point, net: Net, **more: object) -> State:
        best = point.best_loss if math.isfinite(point.best_loss) else None
        told = {"step": point.step, "best_step": point.best_step, "best_loss": best, "dropped": point.dropped}
        config = {**lesson.config, "modules": list(lesson.modules), "widths": school.learning.widths, "about": about, **told}
        tensors = {**lesson.tensors, **_hyper.tensors(net)}
        if more:
            tensors |= {f"best/{name}": t for name, t in _hyper.tensors(point.best).items()}
            tensors |= {f"{x}/{name}": t.cpu().clone() for x, of in (("m", point.m), ("v", point.v)) for name, t in of.items()}
            more |= {"carried": dict(point.carried)} if point.carried else {}
        trained_on = frozenset(c.id for c in cases)
        return State(method=lesson.name, host=host.id, config=config | more, tensors=tensors, trained_on=trained_on)

    begun = run.state if run.state is not None and run.state.config.get("unfinished") else None
    if begun is not None and begun.config["about"] != about:
        raise InvalidExample(
            f"The preparation of {begun.method} that was begun is of other cases, settings, text or weights. "
            f"Give the same ones to go on with it, or begin afresh."
        )
    point = school.first() if begun is None else _point(begun, host.device, s.faithful)
    for _ in run.progress(range(point.step, s.steps), "meta-training", s.steps - point.step):
        if point.step - point.best_step >= s.patience * s.every:
            break
        point = school.stepped(point)
        if point.step % s.every == 0 or point.step == s.steps:
            point = school.validated(point)
            run.keep(state(point, point.net, unfinished=True))
    return state(point, point.best)


def _point(begun: State, device: torch.device, faithful: bool) -> Point:
    config, kept = begun.config, begun.tensors

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t.to(device) for name, t in kept.items() if name.startswith(prefix)}

    widths = widths_of(begun)
    return Point(
        step=config["step"],
        net=_hyper.of_tensors(kept, widths, faithful, device),
        m=part("m/"),
        v=part("v/"),
        best=_hyper.of_tensors(part("best/"), widths, faithful, device),
        best_loss=math.inf if config["best_loss"] is None else config["best_loss"],
        best_step=config["best_step"],
        dropped=config["dropped"],
        carried=config.get("carried", {}),
    )


def widths_of(state: State) -> dict[str, tuple[int, int]]:
    """Module -> (K, V), as the state was learnt for."""
    return {module: (k, v) for module, (k, v) in state.config["widths"].items()}


def finished(name: str, host: Host, state: State | None) -> State:
    """The state, if it is one that `name` has finished on these weights.

    Raises UnknownName if there is none, WrongBase if it is of other weights, InvalidExample if it is of another method or half done.
    """
    if state is None:
        raise UnknownName(
            f"{name} has learnt nothing about {host.name} yet. Run 'errata prepare {name}'; "
            f"in Python, give `state` what its `prepare` returns."
        )
    if state.method != name or state.config.get("unfinished"):
        what = f"a state of {state.method}" if state.method != name else "half prepared"
        raise InvalidExample(f"State {state.id} is {what}; {name} needs one that 'errata prepare {name}' has finished.")
    if state.host not in (host.id, host.base_id):
        raise WrongBase(f"State {state.id} was prepared on weights {state.host}, {host.name} has {host.id}. Prepare it again.")
    return state


def known(made: Method, name: str, host: Host, state: State | None, fixed: Sequence[str]) -> tuple[State, Net]:
    """The state that `made` edits with, checked, and its network. `fixed` are the settings that it has to share with what was prepared.

    Raises UnknownName if there is none, WrongBase if it is of other weights or shapes, InvalidExample if it is of other settings.
    """
    state = finished(name, host, state)
    for setting in fixed:
        if (was := state.config.get(setting)) != made.config[setting]:
            raise InvalidExample(
                f"State {state.id} was prepared with {setting}={was}, {name} is asked for {made.config[setting]}. "
                f"Ask for what was prepared, or prepare it again."
            )
    if made.config["modules"] and (asked := modules_of(host, made.config["modules"])) != list(state.config["modules"]):
        raise InvalidExample(f"State {state.id} is about {', '.join(state.config['modules'])}, {name} is asked for {', '.join(asked)}.")
    there = dict(host.model.named_modules())
    for module, (k, v) in widths_of(state).items():
        if module not in there:
            raise UnknownName.among("module", module, [n for n in there if n])
        shape = tuple(there[module].weight.shape)
        if tuple(sorted(shape)) != tuple(sorted((k, v))):
            raise WrongBase(
                f"State {state.id} knows '{module}' as {k} x {v}, in {host.name} it has the shape {' x '.join(map(str, shape))}. "
                f"Prepare it again."
            )
    try:
        return state, _hyper.of_tensors(state.tensors, widths_of(state), bool(state.config["faithful"]), host.device)
    except KeyError as e:
        raise WrongBase(f"State {state.id} lacks {e}, which a {name} of this version needs. Prepare it again.") from e


# --------------------------------------------------------------------------------------------------------------------------- the training


@final
class School:
    """What stays the same through a training. Its steps are functions of a Point, the seed and the step's number."""

    def __init__(self, host: Host, lesson: Lesson, cases: Sequence[Case], run: Run, s: Settings) -> None:
        self.host, self.s, self.seed, self.spread = host, s, run.seed, run.spread
        ordered = sorted(dict.fromkeys(cases), key=lambda c: c.id)  # any order gives the same state
        random.Random(run.seed).shuffle(ordered)
        share, fewest, most = HELD_BACK
        n = min(most, max(fewest, round(share * len(ordered))))
        self.held_back, self.train = ordered[:n], ordered[n:]
        self.documents = run.hold or text.sampled(host, seed=run.seed)
        self.seen = text.document_counts(self.documents)
        unknown = [c for c in ordered if c.old is None]
        said = dict(zip((c.id for c in unknown), text.answers_now(host, [c.example for c in unknown]), strict=True))
        self.old = {c.id: c.old if c.old is not None else said[c.id] for c in ordered}
        self.ordered = ordered
        self.learning = lesson.learning(self)

    def first(self) -> Point:
        """What has learnt nothing; judged."""
        net, carried = self.learning.first()
        zero = {name: torch.zeros_like(t) for name, t in net.parameters.items()}
        bare = Point(step=0, net=net, m=zero, v=zero, best=net, best_loss=math.inf, best_step=0, dropped=0, carried=carried)
        return self.validated(bare)

    def stepped(self, point: Point) -> Point:
        """One step further. Where something is not finite, the number of the step and of those that were dropped is all that changes."""
        s, rng = self.s, random.Random(f"{self.seed}/{point.step}")
        dropped = replace(point, step=point.step + 1, dropped=point.dropped + 1)
        n = round(math.exp(rng.uniform(math.log(s.least), math.log(s.most))))
        chosen = rng.sample(self.train, k=min(n, len(self.train)))
        try:
            found = self.learning.graded(point, chosen, rng)
        except InvalidPatch:
            return dropped
        # sorted, for from a file they come in any order, and the last digits of a sum depend on it
        norm = torch.stack([g.square().sum() for _, g in sorted(found.grads.items())]).sum().sqrt()
        if not norm.isfinite():
            return dropped
        scale = min(1.0, s.clip / (float(norm) + 1e-12))
        onto = replace(point, net=found.net, carried=found.carried)
        return self._moved(onto, {name: g * scale for name, g in found.grads.items()})

    def _moved(self, point: Point, grads: Mapping[str, Tensor]) -> Point:
        """Adam's step (Kingma & Ba 2015)."""
        s, t, (b1, b2) = self.s, point.step - point.dropped + 1, BETAS
        m = {name: b1 * point.m[name] + (1 - b1) * g for name, g in grads.items()}
        v = {name: b2 * point.v[name] + (1 - b2) * g.square() for name, g in grads.items()}
        fallen = min(1.0, (point.step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * point.step / s.steps))
        parameters = {
            name: w - fallen * (s.lr if w.ndim else s.rate) * (m[name] / (1 - b1**t)) / ((v[name] / (1 - b2**t)).sqrt() + 1e-8)
            for name, w in point.net.parameters.items()
        }
        return replace(point, step=point.step + 1, net=replace(point.net, parameters=parameters), m=m, v=v)

    def validated(self, point: Point) -> Point:
        """With the network kept if it is the best so far on the held-back cases."""
        try:
            loss = self.learning.judged(point.net)
        except InvalidPatch:  # something on the way to it is not finite
            return point
        if not loss < point.best_loss:  # so that NaN is never the best
            return point
        return replace(point, best=point.net, best_loss=loss, best_step=point.step)

    def asked(self, cases: Sequence[Case], rng: random.Random) -> Asked:
        """What is asked with these cases edited; none of what should stay states one of them."""
        s, host = self.s, self.host
        examples = [c.example for c in cases]
        prompts: list[tuple[str, Example]] = []
        for c in cases:
            own, others = [c.example.prompt], [*c.paraphrases, *c.paragraphs]
            always = [] if s.faithful and others else own
            chosen = [*always, *rng.sample(others, k=min(s.asked - len(always), len(others)))]
            prompts += [(way if fits(host, way, c.example) else c.example.prompt, c.example) for way in chosen]
        edited = {e.prompt for e in examples}.union(*((*c.paraphrases, *c.paragraphs) for c in cases))
        around = [(nb.prompt, nb.answer) for c in cases for nb in c.neighbours if nb.prompt not in edited]
        around = rng.sample(around, k=min(s.near, len(around)))
        near = [hosts.encode(host, *pair) for pair in around if fits(host, pair[0], Example(prompt=pair[0], target=pair[1]))]
        answers = [text.in_play(c.example, self.old[c.id]) for c in cases]
        statements = text.Statements(examples, answers, self.seen, len(self.documents))
        drawn = rng.sample(self.documents, k=min(2 * s.hold, len(self.documents)))
        quiet = [d for d in drawn if not statements.any_in(d)][: s.hold]
        return Asked(prompts=prompts, near=near, held=hosts.chunks(host, quiet))


@final
class Remembered:
    """Rows of a school's cases, the same in every step: those of some are kept, those of the others are taken again."""

    def __init__(self, school: School, take: Callable[[tuple[Example, ...]], Sequence[Rows]]) -> None:
        self.take, self.ordered = take, school.ordered
        self.place = {c.id: i for i, c in enumerate(self.ordered)}
        self.kept: dict[int, Rows] = {}
        self.last: dict[int, Rows] = {}  # of the others, those that were asked for last
        self.unsound: set[int] = set()
        first = next((r for i in range(len(self.ordered)) for r in self._taken([i]).values()), None)
        if first is None:
            raise InvalidPatch("The gradients of no training case are finite. Try the model in float32.")
        self.widths = {m: (k.shape[1], first.values[m].shape[1]) for m, k in first.keys.items()}
        self.most = REMEMBERED // sum(t.nbytes for t in (*first.keys.values(), *first.values.values()))

    def sound(self, cases: Sequence[Case]) -> list[Case]:
        """Those whose rows are finite. Raises InvalidPatch if none are.

        Rows that are remembered are taken a whole block at a time, the others together: which go through the model at once, and so their
        last digits, follows from the cases alone, not from what a training has done before.
        """
        places = [self.place[c.id] for c in cases]
        for start in sorted({p // BLOCK * BLOCK for p in places if p < self.most and p not in self.kept and p not in self.unsound}):
            self.kept |= self._taken(range(start, min(start + BLOCK, len(self.ordered))))
        self.last = self._taken(others) if (others := [p for p in places if p not in self.kept and p not in self.unsound]) else {}
        if not (found := [c for c, p in zip(cases, places, strict=True) if p not in self.unsound]):
            raise InvalidPatch("The gradients of none of the cases are finite.")
        return found

    def of(self, cases: Sequence[Case]) -> list[Rows]:
        """Those of the cases' examples, which are `sound`."""
        places = [self.place[c.id] for c in cases]
        if any(p not in self.kept and p not in self.last for p in places):
            self.sound(cases)
        return [self.kept[p] if p in self.kept else self.last[p] for p in places]

    def _taken(self, places: Sequence[int]) -> dict[int, Rows]:
        """The rows at these places. Where some are not finite, what is not is found, left out of the training, and told."""
        examples = [self.ordered[p].example for p in places]
        try:
            return dict(zip(places, self.take(tuple(examples)), strict=True))
        except InvalidPatch as e:
            if len(places) > 1:
                return {p: rows for one in places for p, rows in self._taken([one]).items()}
            if places[0] not in self.unsound:
                self.unsound.add(places[0])
                warnings.warn(f"Left out of the training: '{examples[0]}', for {e}", stacklevel=2)
            return {}


@final
class Merging:
    """How the network of `_hyper.py` is learnt: `rows` says how rows are taken, `moved` what their outputs should differ by, `merge` how
    they come to S. `share` is the first length of the differences, as a share of the module's outputs, `metrics` the T of each module.

    A method that edits in several `rounds` says with `earlier` what some of them come to. A step then begins behind any number of them but
    the last, as they are, and teaches the round that follows; what is judged is a round in the middle."""

    def __init__(
        self,
        school: School,
        *,
        rows: Callable[[tuple[Example, ...]], Sequence[Rows]],
        moved: Callable[[Net, str, Float[Tensor, "N K"], Float[Tensor, "N V"]], Float[Tensor, "N V"]],
        merge: Merge,
        rank: int,
        lam: float,
        share: float,
        rounds: int = 1,
        earlier: Earlier | None = None,
        metrics: Mapping[str, Float[Tensor, "V V"]] = MappingProxyType({}),
    ) -> None:
        self.school, self.host, self.s, self.moved, self.merge = school, school.host, school.s, moved, merge
        self.earlier = earlier
        self.rounds = rounds if earlier else 1
        self.rank, self.lam, self.share, self.metrics = rank, lam, share, metrics
        self.remembered = Remembered(school, rows)
        self.widths = self.remembered.widths

    def first(self) -> tuple[Net, Mapping[str, float]]:
        """The untrained network, whose differences are `share` of the outputs at the first rows."""
        s, train = self.s, self.remembered.sound(self.school.train[: self.s.most])
        net = _hyper.fresh(self.widths, self.rank, self.lam, self.school.seed, s.faithful)
        parameters, metrics = ({name: t.to(self.host.device) for name, t in of.items()} for of in (net.parameters, self.metrics))
        net = replace(net, parameters=parameters, metrics=metrics)
        for module, rows in self._rows(train).items():
            net = _hyper.watched(net, module, *rows)
        usual = round(math.sqrt(s.least * s.most))
        for module, (keys_NK, g_NV) in self._rows(train[:usual]).items() if not s.faithful else ():
            given, asked = outputs(self.host, module, keys_NK), self.moved(net, module, keys_NK, g_NV)
            if asked.norm() > 0:
                net = _hyper.calibrated(net, module, self.share * float(given.norm() / asked.norm()))
        return net, {}

    def graded(self, point: Point, cases: Sequence[Case], rng: random.Random) -> Graded:
        cases = self.remembered.sound(cases)
        rows, net = self._rows(cases), point.net
        for module, (keys_NK, g_NV) in rows.items():
            net = _hyper.watched(net, module, keys_NK, g_NV)
        before, rows = self._behind(net, cases, rows, rng.randrange(self.rounds) if self.rounds > 1 else 0)
        leaves = {name: t.detach().clone().requires_grad_() for name, t in net.parameters.items()}
        learning = replace(net, parameters=leaves)
        merged = {module: self.merge(learning, module, *both) for module, both in rows.items()}
        shifts = {module: S + before[module] if before else S for module, (S, _) in merged.items()}
        _, grads = measured(self.host, self.school.asked(cases, rng), shifts, self.s, learn=True, spread=self.school.spread)
        for module, (_, pull) in merged.items():
            pull(grads[module])
        return Graded(grads=gradients_of(leaves), net=net, carried={})

    def judged(self, net: Net) -> float:
        """On all of them edited at once, and on a few; each with as much of the change on as is best."""
        losses, held_back = [], self.remembered.sound(self.school.held_back)
        for cases in (held_back, held_back[: max(1, len(held_back) // 8)]):
            before, rows = self._behind(net, cases, self._rows(cases), self.rounds // 2)
            merged = {module: self.merge(net, module, *both)[0] for module, both in rows.items()}
            asked = self.school.asked(cases, random.Random(f"{self.school.seed}/validation"))
            losses.append(min(self._loss(asked, before, merged, scale) for scale in SCALES))
        return sum(losses) / len(losses)

    def _loss(self, asked: Asked, before: Shifts, merged: Shifts, scale: float) -> float:
        shifts = {module: scale * (S_KV + before[module] if before else S_KV) for module, S_KV in merged.items()}
        return sum(measured(self.host, asked, shifts, self.s, learn=False, spread=self.school.spread)[0])

    def _behind(self, net: Net, cases: Sequence[Case], rows: Pairs, rounds: int) -> tuple[Shifts, Pairs]:
        if not rounds or self.earlier is None:
            return {}, rows
        return self.earlier(net, tuple(c.example for c in cases), rows, rounds)

    def _rows(self, cases: Sequence[Case]) -> Pairs:
        """{module: (k, g)} of the cases' examples."""
        return _gradients.together(self.host, self.remembered.of(cases), list(self.widths), self.s.batch_size if self.s.faithful else None)


def gradients_of(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What has come to each; zeros where nothing has."""
    return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}


def few(s: Settings, held_back: Sequence[Case]) -> list[Sequence[Case]]:
    """Held-back cases as they are edited together where few are: the most, the usual number, and single ones."""
    usual = round(math.sqrt(s.least * s.most))
    return [held_back[: s.most], held_back[-usual:], *([c] for c in held_back[:SINGLE])]


def outputs(host: Host, module: str, keys_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N V"]:
    """What the module gives for these keys, but for its bias."""
    W = hosts.weight(host.model, f"{module}.weight").to(keys_NK)
    given_NV: Tensor = keys_NK @ (W if _turned(host, module) else W.T)
    return given_NV


def as_published(made: Method, values: Mapping[str, object]) -> None:
    """Puts published settings in the place of those of a `faithful` method, while it is made."""
    for name, value in values.items() if made.config["faithful"] else ():
        object.__setattr__(made, name, value)


def modules_of(host: Host, given: str, upper: bool = False) -> list[str]:
    """The projections that `given` means; without it the last ones of `EDITED` MLPs, of all blocks evenly or of the uppermost of each
    stack. Raises UnknownName for a beginning that none has."""
    if not given and upper:
        outs, each = host.projections("mlp_out"), -(-EDITED // len(host.stacks()))
        stacks = ([name for name in outs if name.startswith(f"{row.blocks}.")] for row, _ in host.stacks())
        return [name for own in stacks for name in own[-each:]]
    if not given:
        outs = host.projections("mlp_out")
        apart = max(1, min(EDITED, len(outs)) - 1)
        return [outs[i] for i in sorted({round(i * (len(outs) - 1) / apart) for i in range(apart + 1)})]
    starts = [part.strip() for part in given.split(",") if part.strip()]
    names = host.projections()
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise UnknownName.among("module", start, names)
    return [name for name in names if name.startswith(tuple(starts))]


def fits(host: Host, prompt: str, e: Example) -> bool:
    """Whether both answers fit the context behind the prompt."""
    answers = max(len(a.encode()) for a in (e.target, e.contrast or ""))  # in bytes: no fewer than tokens
    if len(prompt.encode()) + answers + SPECIAL <= host.context:
        return True
    return len(hosts.tokens(host, prompt)) + answers <= host.context


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Measuring:
    """What all batches of one measurement share: what is added to each parameter, whose gradient is wanted, what `goal_losses` needs to
    know, and what is added to the parameters in that to which the model is held; nothing: they are the base's."""

    deltas: Mapping[str, Tensor]
    learn: tuple[str, ...]
    enough: float
    against: Mapping[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Texts that go through the model at once. `part` 0: `rows` are examples' targets, `others` their contrasts, if one of them has any.
    1 and 2: rows that should stay, near the edits and held. Their loss counts `weight` times, and is a share of one `of` so many."""

    part: int
    rows: list[Row]
    weight: float
    of: int
    examples: list[Example] | None = None
    others: list[Row] | None = None


def measured(
    host: Host, asked: Asked, shifts: Mapping[str, Float[Tensor, "K V"]], s: Settings, learn: bool, spread: Spread = here
) -> tuple[tuple[float, float, float], dict[str, Float[Tensor, "K V"]]]:
    """As `weighed`, with S for each module in its weight: ((...), {module: dL/dS} if `learn`)."""
    deltas = {f"{m}.weight": stored(host, m, S_KV) for m, S_KV in shifts.items()}
    losses, found = weighed(host, asked, deltas, s, learn=deltas if learn else (), spread=spread)
    return losses, {m: stored(host, m, found[f"{m}.weight"]) for m in shifts if learn}


def weighed(
    host: Host,
    asked: Asked,
    deltas: Mapping[str, Tensor],
    s: Settings,
    learn: Collection[str],
    against: Mapping[str, Tensor] = MappingProxyType({}),
    spread: Spread = here,
) -> tuple[tuple[float, float, float], dict[str, Tensor]]:
    """((loss of the goals, weighted KL on neighbours, weighted KL on held text), {parameter: its gradient}, of those in `learn`).

    With `deltas` added to the parameters; the KL is from the model with `against` added. Losses and gradients are summed over batches, in
    their order, each weighted by what it is of the whole. The model is not touched.
    """
    enough = 0.0 if s.faithful else ENOUGH
    shared = Measuring(deltas=deltas, learn=tuple(learn), enough=enough, against=dict(against))
    totals, found = [0.0, 0.0, 0.0], dict[str, Tensor]()
    for part, loss, grads in spread(host, _measuring, batched(host, asked, s), shared):
        totals[part] += loss
        for name, grad in grads.items():
            found[name] = found[name].add_(grad) if name in found else grad
    return (totals[0], totals[1], totals[2]), found


def batched(host: Host, asked: Asked, s: Settings) -> list[Batch]:
    out = []
    rows = [hosts.encode(host, prompt, e.target) for prompt, e in asked.prompts]
    for group in _batches(rows, s.batch_size):
        prompts, examples = zip(*(asked.prompts[i] for i in group), strict=True)
        others = [hosts.encode(host, prompt, e.contrast or e.target) for prompt, e in zip(prompts, examples, strict=True)]
        contrasted = others if any(e.contrast for e in examples) else None
        own = [rows[i] for i in group]
        out.append(Batch(part=0, rows=own, weight=1.0, of=len(rows), examples=list(examples), others=contrasted))
    for part, rows, weight in ((1, asked.near, s.near_weight), (2, asked.held, s.hold_weight)):
        scored = sum(len(ids) - max(given, 1) for ids, given in rows)
        for group in _batches(rows, s.batch_size) if weight else ():
            out.append(Batch(part=part, rows=[rows[i] for i in group], weight=weight, of=scored))
    return out


def _measuring(host: Host, shared: Measuring) -> Callable[[Batch], tuple[int, float, dict[str, Tensor]]]:
    """What makes (its part, its loss, {parameter: its gradient}) of a batch."""
    still = {name: w.detach() for name, w in host.model.named_parameters()}
    leaves = {name: moved(host, name, delta).requires_grad_(name in shared.learn) for name, delta in shared.deltas.items()}
    wanted = [leaves[name] for name in shared.learn]

    def weights() -> Weights:
        return still | {name: leaf.to(still[name].dtype) for name, leaf in leaves.items()}

    held = still | {name: moved(host, name, delta).to(still[name].dtype) for name, delta in shared.against.items()}

    def measure(batch: Batch) -> tuple[int, float, dict[str, Tensor]]:
        with torch.set_grad_enabled(bool(wanted)):
            if batch.examples is None:
                own = hosts.pad(host, batch.rows)
                with torch.no_grad():
                    held_PV = hosts.predictions(host, own, held if shared.against else None)
                total = kl_sum(held_PV, hosts.predictions(host, own, weights()))
            else:
                total = goal_sum(host, batch, weights, shared.enough)
            loss = batch.weight * total / batch.of
        if not wanted:
            return batch.part, loss.item(), {}
        found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return batch.part, loss.item(), dict(zip(shared.learn, found, strict=True))

    return measure


def goal_sum(host: Host, batch: Batch, weights: Callable[[], Weights], enough: float) -> Tensor:
    """The summed loss of a batch of examples, with the graph. Each pass has weights of its own."""
    assert batch.examples is not None, "these rows are of examples"
    reader = Through(host=host)
    logp_N = reader.logp(batch.rows, weights())
    contrast_N = logp_N if batch.others is None else reader.logp(batch.others, weights())
    tokens_N = torch.tensor([float(len(ids) - max(given, 1)) for ids, given in batch.rows], device=logp_N.device)
    return goal_losses(logp_N, contrast_N, tokens_N, batch.examples, enough).sum()


def moved(host: Host, name: str, delta: Tensor) -> Tensor:
    """What a parameter is with `delta` added, in float32 or better: a gradient in bf16 would lose what the batches add."""
    base = hosts.weight(host.model, name)
    exact = base.to(torch.promote_types(base.dtype, torch.float32))
    return exact + delta.to(exact)


@torch.no_grad()
def right(host: Host, examples: Sequence[Example], weights: Weights, batch_size: int) -> list[bool]:
    """Whether each example is as its goal wants it, with `weights` in the place of the model's: as `hosts.fixes`, but that nothing is
    generated. The target is said where each of its tokens is the likeliest behind those before it; what would follow is not looked at.
    """
    target, said = _read(host, [(e.prompt, e.target) for e in examples], weights, batch_size)
    contrast, _ = _read(host, [(e.prompt, e.contrast or e.target) for e in examples], weights, batch_size)
    verdict: dict[str, Callable[[int], bool]] = {
        "raise": lambda i: said[i],
        "lower": lambda i: not said[i],
        "prefer": lambda i: target[i] > contrast[i],
        "balance": lambda i: abs(target[i] - contrast[i]) <= math.log(1.5),
    }
    return [verdict[e.goal](i) for i, e in enumerate(examples)]


def _read(host: Host, pairs: Sequence[tuple[str, str]], weights: Weights, batch_size: int) -> tuple[dict[int, float], dict[int, bool]]:
    """(log p of each answer behind its prompt, whether each of its tokens is the likeliest)."""
    rows, logp, likeliest = [hosts.encode(host, *pair) for pair in pairs], dict[int, float](), dict[int, bool]()
    for group in _batches(rows, batch_size):
        batch = hosts.pad(host, [rows[i] for i in group])
        logp_PV = hosts.predictions(host, batch, weights).log_softmax(-1)
        said_P = batch.ids_NT[batch.scored_NT.bool()]
        each_P, hit_P = logp_PV.gather(1, said_P[:, None]).squeeze(1), logp_PV.argmax(-1) == said_P
        counts = batch.scored_NT.sum(1).long().tolist()
        for i, own_Q, hit_Q in zip(group, torch.split(each_P, counts), torch.split(hit_P, counts), strict=True):
            logp[i], likeliest[i] = float(own_Q.sum()), bool(hit_Q.all())
    return logp, likeliest


def stored(host: Host, module: str, S_KV: Tensor) -> Tensor:
    """S in the orientation of the module's weight, or what has that in the orientation of S."""
    return S_KV if _turned(host, module) else S_KV.T


def shifted(host: Host, shifts: Mapping[str, Float[Tensor, "K V"]]) -> Weights:
    """The weights of the modules with S added."""
    names = {m: f"{m}.weight" for m in shifts}
    return {name: moved(host, name, stored(host, m, shifts[m])).to(host.model.get_parameter(name).dtype) for m, name in names.items()}


def _turned(host: Host, module: str) -> bool:
    """Whether the module's weight is (K, V) as S is."""
    return stored_transposed(host.model.get_submodule(module))


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows of similar length that go through the model at once."""
    for group in hosts.by_length(rows, PASS):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
