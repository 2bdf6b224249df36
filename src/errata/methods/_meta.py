"""Learning to edit: the meta-training that `malmen` and `mend` share.

    phi = argmin  E_cases [ mean_i L_goal(x_i')  +  near * KL on neighbours' prompts  +  hold * KL on held text ],  weights W + S_phi
                                        Mitchell et al. 2022 (MEND), arXiv 2110.11309, section 3; Tan et al. 2023 (MALMEN), arXiv 2311.04661

x' are other ways to ask for an example's fact: the paraphrases and paragraphs of a training case. A step draws n cases, takes the rows of
their examples (`_gradients.py`), has the method merge what the network (`_hyper.py`) makes of them into one S for each module, finds
G = dL/dS with S in the place of the weights, and pulls G back to the network. Between the two halves no graph is kept: what the model needs
does not grow with the network, and what the network needs does not grow with n. How many texts go through the model at once, and how many
rows through the network, changes nothing else; n need not be divisible by either. Nothing goes through a disk.

Everything that a step draws follows from the seed and its number alone, so a training that was cut off goes on as if it had not been.

Unlike malmen@1df295d: n is drawn anew for each step, so that one network serves few and many; the example's own prompt is asked for too
(unless `faithful`); held text is held still besides the neighbours' answers; a step whose gradient is not finite is dropped, and counted;
the statistics stand still while held-back cases are judged, and the network that did best on them is kept.

File legend: N rows, K key width, V value width.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hosts, text
from errata.hosts import Host, Weights, stored_transposed
from errata.methods import _hyper
from errata.methods._descend import ENOUGH, PASS, Row, Through, goal_losses, kl_sum
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

Pull = Callable[[Float[Tensor, "K V"]], None]  # dL/dS -> adds what follows to the gradients of the network's parameters
Merge = Callable[[Net, str, Float[Tensor, "N K"], Float[Tensor, "N V"]], tuple[Float[Tensor, "K V"], Pull]]


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of the training; each method carries them as its own fields.

    rank         of the network's blocks
    lam          first value of each module's
    share        first length of the differences, as a share of the module's outputs
    steps        at most
    lr, rate     length of Adam's steps, for the network and for log eta and log lam; both fall as a cosine
    least, most  n of a step is drawn between them, evenly in its logarithm
    asked        prompts of each case in a step
    near         neighbours in a step; `near_weight` that of their KL, per token
    hold         held documents in a step; `hold_weight` that of their KL, per token
    every        steps between two validations
    patience     validations without a better one before it stops
    clip         greatest norm of a gradient
    batch_size   texts in memory at once, at most; it changes nothing else
    """

    rank: int
    lam: float
    share: float
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
    """What a method tells the training: how rows are taken and merged, and what else belongs in its State."""

    name: str
    modules: Sequence[str]
    rows: Callable[[tuple[Example, ...]], Sequence[Rows]]
    moved: Callable[[Net, str, Float[Tensor, "N K"], Float[Tensor, "N V"]], Float[Tensor, "N V"]]  # what the rows' outputs should differ by
    merge: Merge
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


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
    """Where a training stands: behind `step` steps, with Adam's moments, the best network so far, and how many steps were dropped."""

    step: int
    net: Net
    m: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    best: Net
    best_loss: float
    best_step: int
    dropped: int


def check(name: str, config: Mapping[str, Any]) -> None:
    """Raises InvalidExample for settings that cannot be."""
    for setting in ("lam", "share", "lr", "rate", "clip", "least", "chunk", "every", "patience", "asked", "batch_size"):
        if not config[setting] > 0:
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
    about = digest(lesson.name, host.id, canonical_json([dict(lesson.config), run.seed]), *sorted(c.id for c in cases), *run.hold)
    school = _School(host, lesson, cases, run, s)

    def state(point: Point, net: Net, **more: object) -> State:
        best = point.best_loss if math.isfinite(point.best_loss) else None
        told = {"step": point.step, "best_step": point.best_step, "best_loss": best, "dropped": point.dropped}
        config = {**lesson.config, "modules": list(lesson.modules), "widths": school.widths, "about": about, **told}
        tensors = {**lesson.tensors, **_hyper.tensors(net)}
        if more:
            tensors |= {f"best/{name}": t for name, t in _hyper.tensors(point.best).items()}
            tensors |= {f"{x}/{name}": t.cpu().clone() for x, of in (("m", point.m), ("v", point.v)) for name, t in of.items()}
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
    )


def widths_of(state: State) -> dict[str, tuple[int, int]]:
    """Module -> (K, V), as the state was learnt for."""
    return {module: (k, v) for module, (k, v) in state.config["widths"].items()}


def known(made: Method, name: str, host: Host, state: State | None, fixed: Sequence[str]) -> tuple[State, Net]:
    """The state that `made` edits with, checked, and its network. `fixed` are the settings that it has to share with what was prepared.

    Raises UnknownName if there is none, WrongBase if it is of other weights or shapes, InvalidExample if it is of other settings.
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
class _School:
    """What stays the same through a training. Its steps are functions of a Point, the seed and the step's number."""

    def __init__(self, host: Host, lesson: Lesson, cases: Sequence[Case], run: Run, s: Settings) -> None:
        self.host, self.lesson, self.s, self.seed, self.spread = host, lesson, s, run.seed, run.spread
        ordered = sorted(dict.fromkeys(cases), key=lambda c: c.id)  # any order gives the same state
        random.Random(run.seed).shuffle(ordered)
        share, fewest, most = HELD_BACK
        n = min(most, max(fewest, round(share * len(ordered))))
        self.held_back, self.train = ordered[:n], ordered[n:]
        self.documents = run.hold or text.sampled(host, seed=run.seed)
        self.seen = text.document_counts(self.documents)
        unknown = [c for c in ordered if c.old is None]
        said = dict(zip((c.id for c in unknown), text.answers_now(host, [c.example for c in unknown]), strict=True))
        self.answers = {c.id: text.in_play(c.example, c.old if c.old is not None else said[c.id]) for c in ordered}
        self.place = {c.id: i for i, c in enumerate(ordered)}
        self.ordered = ordered
        (first,) = lesson.rows((ordered[0].example,))
        self.widths = {m: (k.shape[1], first.values[m].shape[1]) for m, k in first.keys.items()}
        self.remembered = REMEMBERED // sum(t.nbytes for t in (*first.keys.values(), *first.values.values()))
        self.kept: dict[int, Rows] = {}

    def first(self) -> Point:
        """The untrained network, whose differences are `share` of the outputs at the first rows; judged."""
        s = self.s
        net = _hyper.fresh(self.widths, s.rank, s.lam, self.seed, s.faithful)
        net = replace(net, parameters={name: t.to(self.host.device) for name, t in net.parameters.items()})
        for module, rows in self._rows(self.train[: s.most]).items():
            net = _hyper.watched(net, module, *rows)
        usual = round(math.sqrt(s.least * s.most))
        for module, (keys_NK, g_NV) in self._rows(self.train[:usual]).items() if not s.faithful else ():
            given, asked = outputs(self.host, module, keys_NK), self.lesson.moved(net, module, keys_NK, g_NV)
            if asked.norm() > 0:
                net = _hyper.calibrated(net, module, s.share * float(given.norm() / asked.norm()))
        zero = {name: torch.zeros_like(t) for name, t in net.parameters.items()}
        bare = Point(step=0, net=net, m=zero, v=zero, best=net, best_loss=math.inf, best_step=0, dropped=0)
        return self.validated(bare)

    def stepped(self, point: Point) -> Point:
        """One step further. Where something is not finite, the number of the step and of those that were dropped is all that changes."""
        s, rng = self.s, random.Random(f"{self.seed}/{point.step}")
        dropped = replace(point, step=point.step + 1, dropped=point.dropped + 1)
        n = round(math.exp(rng.uniform(math.log(s.least), math.log(s.most))))
        chosen = rng.sample(self.train, k=min(n, len(self.train)))
        try:
            rows, net = self._rows(chosen), point.net
        except InvalidPatch:  # rows that are not finite
            return dropped
        for module, (keys_NK, g_NV) in rows.items():
            net = _hyper.watched(net, module, keys_NK, g_NV)
        leaves = {name: t.detach().clone().requires_grad_() for name, t in net.parameters.items()}
        learning = replace(net, parameters=leaves)
        merged = {module: self.lesson.merge(learning, module, *both) for module, both in rows.items()}
        shifts = {module: S for module, (S, _) in merged.items()}
        _, grads = measured(self.host, self._asked(chosen, rng), shifts, s, learn=True, spread=self.spread)
        for module, (_, pull) in merged.items():
            pull(grads[module])
        found = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
        norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
        if not norm.isfinite():
            return dropped
        scale = min(1.0, s.clip / (float(norm) + 1e-12))
        return self._moved(replace(point, net=net), {name: g * scale for name, g in found.items()})

    def _moved(self, point: Point, grads: Mapping[str, Tensor]) -> Point:
        """Adam's step (Kingma & Ba 2015)."""
        s, t, (b1, b2) = self.s, point.step - point.dropped + 1, BETAS
        m = {name: b1 * point.m[name] + (1 - b1) * g for name, g in grads.items()}
        v = {name: b2 * point.v[name] + (1 - b2) * g.square() for name, g in grads.items()}
        fallen = min(1.0, (point.step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * point.step / s.steps))
        parameters = {
            name: w - fallen * _rate(s, name) * (m[name] / (1 - b1**t)) / ((v[name] / (1 - b2**t)).sqrt() + 1e-8)
            for name, w in point.net.parameters.items()
        }
        return replace(point, step=point.step + 1, net=replace(point.net, parameters=parameters), m=m, v=v)

    def validated(self, point: Point) -> Point:
        """With the network kept if it is the best so far on the held-back cases: all of them at once, and a few."""
        losses = []
        for cases in (self.held_back, self.held_back[: max(1, len(self.held_back) // 8)]):
            merged = {module: self.lesson.merge(point.net, module, *both)[0] for module, both in self._rows(cases).items()}
            asked = self._asked(cases, random.Random(f"{self.seed}/validation"))
            losses.append(sum(measured(self.host, asked, merged, self.s, learn=False, spread=self.spread)[0]))
        loss = sum(losses) / len(losses)
        if not loss < point.best_loss:  # so that NaN is never the best
            return point
        return replace(point, best=point.net, best_loss=loss, best_step=point.step)

    def _rows(self, cases: Sequence[Case]) -> dict[str, tuple[Float[Tensor, "N K"], Float[Tensor, "N V"]]]:
        """{module: (k, g)} of the cases' examples.

        Those that are remembered are taken a whole block at a time, the others together: which rows go through the model at once, and so
        their last digits, follows from the cases alone, not from what a training has done before.
        """
        places = [self.place[c.id] for c in cases]
        for start in sorted({p // BLOCK * BLOCK for p in places if p < self.remembered and p not in self.kept}):
            block = range(start, min(start + BLOCK, len(self.ordered)))
            self.kept |= zip(block, self.lesson.rows(tuple(self.ordered[p].example for p in block)), strict=True)
        others = [p for p in places if p not in self.kept]
        new = dict(zip(others, self.lesson.rows(tuple(self.ordered[p].example for p in others)), strict=True)) if others else {}
        rows = [self.kept[p] if p in self.kept else new[p] for p in places]
        return together(self.host, rows, self.lesson.modules, self.s.batch_size if self.s.faithful else None)

    def _asked(self, cases: Sequence[Case], rng: random.Random) -> Asked:
        """What is asked with these cases edited; none of what should stay states one of them."""
        s, host = self.s, self.host
        examples = [c.example for c in cases]
        prompts: list[tuple[str, Example]] = []
        for c in cases:
            ways = [*c.paraphrases, *c.paragraphs, *([] if s.faithful else [c.example.prompt])] or [c.example.prompt]
            chosen = rng.sample(ways, k=min(s.asked, len(ways)))
            prompts += [(way if fits(host, way, c.example) else c.example.prompt, c.example) for way in chosen]
        edited = {e.prompt for e in examples}.union(*((*c.paraphrases, *c.paragraphs) for c in cases))
        around = [(nb.prompt, nb.answer) for c in cases for nb in c.neighbours if nb.prompt not in edited]
        around = rng.sample(around, k=min(s.near, len(around)))
        near = [hosts.encode(host, *pair) for pair in around if fits(host, pair[0], Example(prompt=pair[0], target=pair[1]))]
        statements = text.Statements(examples, [self.answers[c.id] for c in cases], self.seen, len(self.documents))
        drawn = rng.sample(self.documents, k=min(2 * s.hold, len(self.documents)))
        quiet = [d for d in drawn if not statements.any_in(d)][: s.hold]
        return Asked(prompts=prompts, near=near, held=hosts.chunks(host, quiet))


def _rate(s: Settings, name: str) -> float:
    return s.rate if _hyper.is_scalar(name) else s.lr


def together(
    host: Host, rows: Sequence[Rows], modules: Sequence[str], means_of: int | None = None
) -> dict[str, tuple[Float[Tensor, "N K"], Float[Tensor, "N V"]]]:
    """{module: (k, g)} of the rows, one example after the other. `means_of` so many examples, as published: their gradients are then those
    of the mean over the answer tokens of that many examples."""
    share = [1.0] * len(rows)
    for start in range(0, len(rows) if means_of else 0, means_of or 1):
        batch = range(start, min(start + (means_of or 1), len(rows)))
        encoded = [hosts.encode(host, rows[i].example.prompt, rows[i].example.target) for i in batch]
        tokens = sum(len(ids) - given for ids, given in encoded)
        for i in batch:
            share[i] = 1 / tokens
    return {
        m: (
            torch.cat([r.keys[m] for r in rows]).to(host.device),
            torch.cat([part * r.values[m] for part, r in zip(share, rows, strict=True)]).to(host.device),
        )
        for m in modules
    }


def outputs(host: Host, module: str, keys_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N V"]:
    """What the module gives for these keys, but for its bias."""
    W = hosts.weight(host.model, f"{module}.weight").to(keys_NK)
    given_NV: Tensor = keys_NK @ (W if _turned(host, module) else W.T)
    return given_NV


def modules_of(host: Host, given: str) -> list[str]:
    """The projections that `given` means. Raises UnknownName for a beginning that none has."""
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
    return len(hosts.tokens(host, prompt)) + answers <= host.context


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Measuring:
    """What all batches of one measurement share: S for each module, and what `goal_losses` and the gradients need to know."""

    shifts: Mapping[str, Float[Tensor, "K V"]]
    enough: float
    learn: bool


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
    """((loss of the goals, weighted KL on neighbours, weighted KL on held text), {module: dL/dS} if `learn`) with S in the weights.

    Losses and gradients are summed over batches, in their order, each weighted by what it is of the whole. The model is not touched.
    """
    shared = Measuring(shifts=shifts, enough=0.0 if s.faithful else ENOUGH, learn=learn)
    totals, found = [0.0, 0.0, 0.0], dict[str, Tensor]()
    for part, loss, grads in spread(host, _measuring, _batched(host, asked, s), shared):
        totals[part] += loss
        for module, grad_KV in grads.items():
            found[module] = found[module].add_(grad_KV) if module in found else grad_KV
    return (totals[0], totals[1], totals[2]), found


def _batched(host: Host, asked: Asked, s: Settings) -> list[Batch]:
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


def _measuring(host: Host, shared: Measuring) -> Callable[[Batch], tuple[int, float, dict[str, Float[Tensor, "K V"]]]]:
    """What makes (its part, its loss, {module: dL/dS}) of a batch."""
    still = {name: w.detach() for name, w in host.model.named_parameters()}
    leaves: dict[str, Tensor] = {}
    for module, S_KV in shared.shifts.items():
        base = hosts.weight(host.model, f"{module}.weight")
        exact = base.to(torch.promote_types(base.dtype, torch.float32))  # a gradient in bf16 would lose what the batches add
        delta = S_KV if _turned(host, module) else S_KV.T
        leaves[module] = (exact + delta.to(exact)).requires_grad_(shared.learn)
    reader = Through(host=host)

    def weights() -> Weights:
        return still | {f"{m}.weight": leaf.to(still[f"{m}.weight"].dtype) for m, leaf in leaves.items()}

    def measure(batch: Batch) -> tuple[int, float, dict[str, Tensor]]:
        with torch.set_grad_enabled(shared.learn):
            if batch.examples is None:
                total = kl_sum(*reader.both(batch.rows, weights()))
            else:
                logp_N = reader.logp(batch.rows, weights())
                contrast_N = logp_N if batch.others is None else reader.logp(batch.others, weights())
                tokens_N = torch.tensor([float(len(ids) - max(given, 1)) for ids, given in batch.rows], device=logp_N.device)
                total = goal_losses(logp_N, contrast_N, tokens_N, batch.examples, shared.enough).sum()
            loss = batch.weight * total / batch.of
        if not shared.learn:
            return batch.part, loss.item(), {}
        found = torch.autograd.grad(loss, list(leaves.values()))
        return batch.part, loss.item(), {m: g if _turned(host, m) else g.T for m, g in zip(leaves, found, strict=True)}

    return measure


def _turned(host: Host, module: str) -> bool:
    """Whether the module's weight is (K, V) as S is."""
    return stored_transposed(host.model.get_submodule(module))


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows of similar length that go through the model at once."""
    for group in hosts.by_length(rows, PASS):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
