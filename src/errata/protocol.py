"""The protocol of canonical examples: settings searched on validation, chosen for each ball, tested over seeds, told in the paper's terms.

    search   for each task and column, `trials` edits of the validation examples with settings drawn at random, each judged in every ball
    choose   for each ball, the trial whose success rose most there
    test     with its settings, edits of the test examples over several seeds: change of success in points, of hard negatives in nats

Hewitt et al. 2024 (https://arxiv.org/abs/2402.06155), sections 4 and 5. The ball of radius eps: mean token loss on general text grows by at
most the relative eps. That is the mean over the documents that are read, as in the paper, so that its tables and these can be laid side by
side; what the gate promises, a bound over text that nobody has read, is told beside it (`upper`). Two modes:

  fixed      one edit by the method itself, with float32 masters and every gradient applied, scaled onto the edge of each ball; hard
             negatives of the same split; intervals from redrawing whole behaviours
  faithful   the published loop (`methods/_published.py`): ten epochs, the last one inside the ball, no later than at validation; what it
             does otherwise than its paper stands behind named switches (`SWITCHES`)

What is done lies in one folder and is never done again: `search.db`, Optuna's trials, and `runs.jsonl`, the edits of the test examples.
One process writes them; those that edit only hand back what they found. Other settings of the protocol, or other weights, are another
plan, and their results stand beside the first ones. Nothing here is specific to a method but the ranges of its settings (`SPACES`).
"""

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from errata import apply, hosts, methods, text
from errata.hosts import Host
from errata.lab import canonical as lab
from errata.methods import _published
from errata.tasks import canonical
from errata.tasks.canonical import Split, Task
from errata.tasks.published import EPSILONS, TASKS, Cell, last_inside, mean_loss, points, standard_error
from errata.types import (
    Budget,
    BudgetError,
    EditError,
    InvalidPatch,
    InvalidReference,
    LeakError,
    MissingExtra,
    Patch,
    Progress,
    Run,
    Score,
    State,
    UnknownName,
    canonical_json,
    digest,
    no_progress,
)

if TYPE_CHECKING:
    import numpy as np
    from optuna import Study
    from optuna.trial import Trial

Mode = Literal["fixed", "faithful"]
HELD = 900  # documents of the holding text that an edit gets: a third of them measure what it costs while it is made, again and again
JUDGED: dict[Split, int] = {"validation": 250, "test": 500}  # documents that a ball is measured on
RESAMPLES = 2000
CONFIDENCE = (2.5, 97.5)  # percentiles

SWITCHES: dict[str, str] = {  # named as in the project's list of what the published code does otherwise than its paper
    "discarded_gradients": "gradients are set to zero before each example, but applied at each fifth: four of five are lost",
    "bf16_weights": "weights, and so their steps, are rounded to bfloat16; there is no float32 master",
    "validation_negatives": "at test time the hard negatives are those of the validation split",
    "summed_kl": "KL(base || edited) summed over the positions of a text; the paper has KL(edited || base), here its mean over them",
    "unseeded": "no seed is set",
    "last_epoch": "the last epoch inside the ball is taken as it is; else the tenth is scaled onto the edge",
    "bf16_reference": "the KL is to a copy of the base that is rounded to bfloat16",
}

# ----------------------------------------------------------------------------------------------------------------------------- values


@final
@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the tables: a method on a host. `subjects`: the editor is told what each prompt speaks of."""

    host: str
    method: str
    subjects: bool = False

    @property
    def label(self) -> str:
        return f"{self.method} with subjects" if self.subjects else self.method


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the protocol is run with.

    data, variant    folder of the published records, "clean" or "published"; without a folder the lab's own tasks
    reference        text that holds still and judges, as for `errata.edit`
    halve            the folder has no test split: half of the behaviours of the validation split serve for it
    limit            at most so many examples, records, hard negatives of a task; None for all
    switches         of `SWITCHES`, those that are on in the faithful mode
    """

    columns: tuple[Column, ...]
    tasks: tuple[str, ...] = TASKS
    epsilons: tuple[float, ...] = EPSILONS
    trials: int = 10
    seeds: int = 3
    seed: int = 0
    mode: Mode = "fixed"
    data: str | None = None
    variant: str = "clean"
    halve: bool = False
    reference: str | None = None
    limit: int | None = None
    switches: tuple[str, ...] = tuple(SWITCHES)
    device: str | None = None

    def __post_init__(self) -> None:
        for what, names, known in (("task", self.tasks, TASKS), ("switch", self.switches, SWITCHES), ("mode", (self.mode,), MODES)):
            for name in names:
                if name not in known:
                    raise UnknownName.among(what, name, known)
        for column in self.columns:
            if column.method not in (spaces := SPACES[self.mode]):
                raise UnknownName.among(f"method with a {self.mode} search", column.method, spaces)
        if not self.columns or not self.tasks or min(self.trials, self.seeds) < 1:
            raise BudgetError("The protocol needs a method, a task, a trial and a seed at least.")
        for epsilon in self.epsilons:
            Budget(epsilon=epsilon)

    @property
    def id(self) -> str:
        """Of all that one result depends on: more trials, seeds, tasks or columns go on where fewer have stopped."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("columns", "tasks", "trials", "seeds", "device")}
        return digest("protocol", canonical_json(kept | {"sizes": [HELD, JUDGED["validation"], JUDGED["test"]]}))


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """One edit to be made, and judged in each ball of `epsilons`. `caps`: the epoch of each of them at validation (faithful)."""

    column: Column
    task: str
    split: Split
    settings: Mapping[str, Any]
    seed: int
    number: int
    epsilons: tuple[float, ...]
    caps: tuple[int | None, ...]

    @property
    def name(self) -> str:
        return f"{self.column.host}, {self.column.label}, {self.task}, {self.split} {self.number}"


Outcome = dict[str, Any]  # JSON: what `Bench.run` says of a job


class Estimate(NamedTuple):
    """A value with its 95 % interval; None where there is nothing, or only one behaviour, to redraw."""

    value: float | None
    low: float | None = None
    high: float | None = None


# ------------------------------------------------------------------------------------------------------------------- what is searched

Space = Callable[["Trial"], dict[str, Any]]


def _descent(trial: "Trial", steps: tuple[int, int], lr: tuple[float, float]) -> dict[str, Any]:
    """What all descents share. `within` is the ball that the edit is built in: one built in a wide ball and scaled into a narrow one has
    lost most of what it did, one built in a narrow ball does not use a wide one."""
    return {
        "within": trial.suggest_categorical("within", EPSILONS),
        "steps": trial.suggest_int("steps", *steps),
        "lr": trial.suggest_float("lr", *lr, log=True),
        "lam": trial.suggest_float("lam", 30.0, 600.0, log=True),
        "hold": 8,
        "searched": 300,
        "contexts": trial.suggest_int("contexts", 0, 1),
        "neighbours": trial.suggest_int("neighbours", 0, 2),
        "restated": trial.suggest_int("restated", 0, 8, step=4),
    }


def _damped(trial: "Trial") -> dict[str, Any]:
    return {"damping": trial.suggest_float("damping", 0.02, 1.0, log=True)}


def _finetune(trial: "Trial") -> dict[str, Any]:
    return _descent(trial, (20, 32), (0.05, 0.2)) | _damped(trial)


def _lora(trial: "Trial") -> dict[str, Any]:
    own = {"rank": trial.suggest_int("rank", 4, 64, log=True), "fraction": trial.suggest_float("fraction", 0.25, 1.0)}
    return _descent(trial, (20, 32), (0.8, 3.0)) | _damped(trial) | own


def _senses(trial: "Trial") -> dict[str, Any]:
    return {
        "within": trial.suggest_categorical("within", EPSILONS),
        "k": trial.suggest_int("k", 5, 12),
        "against": trial.suggest_float("against", 10**2, 10**3.5, log=True),
        "ridge": trial.suggest_float("ridge", 1.0, 100.0, log=True),
        "lam": trial.suggest_float("lam", 100.0, 10**4, log=True),
        "contexts": trial.suggest_int("contexts", 0, 1),
        "neighbours": trial.suggest_int("neighbours", 0, 2),
        "restated": trial.suggest_int("restated", 0, 8, step=4),
    }


def _ensemble(trial: "Trial") -> dict[str, Any]:
    return _senses(trial) | {"beta": trial.suggest_categorical("beta", (1.0, 2.0))}


def _memit(trial: "Trial") -> dict[str, Any]:
    return {
        "clamp": trial.suggest_float("clamp", 0.5, 4.0, log=True),
        "kl": trial.suggest_float("kl", 0.001, 0.1, log=True),
        "lam": trial.suggest_float("lam", 0.05, 10.0, log=True),
        "steps": 20,
    }


def _published_full(trial: "Trial") -> dict[str, Any]:
    return {"lr": trial.suggest_float("lr", 10**-8.5, 10**-4, log=True), "lam": trial.suggest_float("lam", 0.1, 1.0, log=True)}


def _published_lora(trial: "Trial") -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 10**-6.5, 10**-2, log=True),
        "lam": trial.suggest_float("lam", 0.1, 1.0, log=True),
        "rank": trial.suggest_int("rank", 1, 256),
        "fraction": trial.suggest_float("fraction", 0.1, 0.9),
    }


# fixed: ours, and small, so that a trial takes seconds on the lab's models. faithful: the paper's, appendix B
SPACES: dict[Mode, dict[str, Space]] = {
    "fixed": {"finetune": _finetune, "lora": _lora, "memit": _memit, "senses": _senses, "ensemble": _ensemble},
    "faithful": {"finetune": _published_full, "lora": _published_lora},
}
MODES = tuple(SPACES)


def drawn(plan: Plan, name: str, number: int, space: Space) -> "Trial":
    """One trial with its settings in `params`: a function of the plan's seed, the study's name and the trial's number, whoever draws it
    and whatever was drawn before. What the space adds to them is in the attribute `settings`."""
    import optuna

    sampler = optuna.samplers.RandomSampler(seed=int(digest("trial", str(plan.seed), name, str(number))[3:11], 16))
    trial = optuna.create_study(sampler=sampler).ask()
    trial.set_user_attr("settings", space(trial))
    return trial


def best(outcomes: Sequence[Outcome], epsilon: float) -> Outcome:
    """The trial whose success rose most in this ball; among equals the one with the smaller loss on the records, then the first."""

    def worth(outcome: Outcome) -> tuple[float, float, int]:
        ball = ball_of(outcome, epsilon)
        return ball["success"], -ball["loss"], -outcome["number"]

    return max(outcomes, key=worth)


def ball_of(outcome: Outcome, epsilon: float) -> dict[str, Any]:
    """What an outcome says of one ball."""
    found: dict[str, Any] = next(ball for ball in outcome["balls"] if ball["epsilon"] == epsilon)
    return found


# ------------------------------------------------------------------------------------------------------------------------ the records


def task_of(plan: Plan, host: Host, name: str, split: Split) -> Task:
    """A task's split as `host` can read it. Raises InvalidReference if there are no records for such a host."""
    if plan.data is None and not host.name.startswith("lab/"):
        raise InvalidReference(f"The lab's tasks are about the lab's world, which {host.name} does not know. Give the folder of others.")

    def read(split: Split) -> Task:
        if plan.data is None:
            return lab.lab_task(name, split)
        if plan.halve:
            return half(canonical.load(plan.data, name, "validation", plan.variant), split)
        return canonical.load(plan.data, name, split, plan.variant)

    task = read(split)
    if plan.mode == "faithful" and "validation_negatives" in plan.switches:
        task = replace(task, hard=read("validation").hard)
    if plan.limit is not None:
        n = plan.limit
        task = replace(task, examples=task.examples[:n], records=task.records[:n], hard=task.hard[:n], unconditional=task.unconditional[:n])
    task = canonical.fitting(host, task)
    if not task.examples or not task.records:
        raise InvalidReference(f"No example or no record of {name} ({split}) fits the {host.context} tokens that {host.name} reads.")
    return task


def half(task: Task, split: Split) -> Task:
    """One half of a task's behaviours, the same for its examples and its records; of what is not about one, one half of the file.

    A behaviour is the verb, the occupation, or what is to be said; `temporal` has none that could be told, its files go entity by entity.
    """

    def side(key: str) -> bool:
        return (int(digest("half", key)[3:5], 16) % 2 == 0) == (split == "test")

    def cut(items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(items[len(items) // 2 :] if split == "test" else items[: len(items) // 2])

    def own(items: Sequence[Any], key: Callable[[Any], str]) -> tuple[Any, ...]:
        return cut(items) if task.name == "temporal" else tuple(item for item in items if side(key(item)))

    def spoken(x: Any) -> str:
        """The verb of two forms, else what is to be said."""
        return str(min((t.split()[0] for t in (x.target, x.contrast)), key=len) if task.name == "verb" else x.target.strip().lower())

    gender = task.name == "gender"
    return replace(
        task,
        split=split,
        examples=own(task.examples, lambda e: e.prompt.removeprefix("The ").removesuffix(" said") if gender else spoken(e)),
        records=own(task.records, lambda r: r.behaviour if gender else spoken(r)),
        hard=cut(task.hard),
        unconditional=cut(task.unconditional),
    )


def check_apart(validation: Task, test: Task) -> None:
    """Raises LeakError if what judges one split stands in the other, or what an editor is shown is what judges it."""

    def asked(task: Task) -> set[tuple[str, str, str | None]]:
        return {(r.prompt, r.target, r.contrast) for r in task.records}

    def shown(task: Task) -> set[tuple[str, str, str | None]]:
        return {(e.prompt, e.target, e.contrast) for e in task.examples}

    for what, both in (
        ("records of its validation split among those of its test split", asked(validation) & asked(test)),
        ("examples of its validation split among the records of its test split", shown(validation) & asked(test)),
        ("examples of its test split among the records of its validation split", shown(test) & asked(validation)),
        ("examples of its test split among its records there", shown(test) & asked(test)),
        ("examples of its validation split among its records there", shown(validation) & asked(validation)),
    ):
        if both:
            prompt, target, _ = min(both, key=str)
            raise LeakError(f"The task {test.name} has {len(both)} {what}, one is '{prompt}|{target}'.")


# ------------------------------------------------------------------------------------------------------------------------ one edit


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """A task's split on a host, the rows of the general text that its balls are measured on, and what was measured before any edit."""

    task: Task
    before: tuple[Score, ...]
    rows: list[tuple[list[int], int]]
    rows_N2: Tensor


@final
@dataclass(kw_only=True)
class Bench:
    """Makes and judges edits, one after the other. What several of them need (hosts, texts, what was before) is made once and kept."""

    plan: Plan
    given: Mapping[str, Host] = field(default_factory=dict)
    loaded: dict[str, Host] = field(default_factory=dict)
    texts: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    grounds: dict[tuple[str, str, Split], Ground] = field(default_factory=dict)
    states: dict[tuple[str, str], State | None] = field(default_factory=dict)

    def run(self, job: Job) -> Outcome:
        """What the edit that `job` asks for does: for each ball whether and how it fits, the success and the losses inside it."""
        host = self.host(job.column.host)
        ground = self.ground(host, job.task, job.split)
        make = self._fixed if self.plan.mode == "fixed" else self._faithful
        balls = make(host, ground, job)
        return {
            "plan": self.plan.id,
            "host": host.id,
            "name": job.name,
            **asdict(job.column),
            **{"task": job.task, "split": job.split, "number": job.number, "seed": job.seed, "settings": dict(job.settings)},
            "balls": [
                {"epsilon": epsilon, **fit, **_told(ground.before, after, job.split)}
                for epsilon, (fit, after) in zip(job.epsilons, balls, strict=True)
            ],
        }

    def host(self, name: str) -> Host:
        if name not in self.loaded:
            host = self.given[name] if name in self.given else hosts.load(name, self.plan.device)
            self.loaded[name] = replace(host, recalled={})
        return self.loaded[name]

    def standing(self, host: Host) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if host.id not in self.texts:
            self.texts[host.id] = text.standing(host, self.plan.reference, self.plan.seed)
        return self.texts[host.id]

    def ground(self, host: Host, name: str, split: Split) -> Ground:
        key = (host.id, name, split)
        if key not in self.grounds:
            if any(known[1:] != key[1:] for known in self.grounds):  # jobs come task by task, and a baseline is large
                self.grounds.clear()
                for known in self.loaded.values():
                    assert known.recalled is not None, "a bench's hosts have one"
                    known.recalled.clear()
            task = task_of(self.plan, host, name, split)
            judging = self.standing(host)[1][: JUDGED[split]]
            kept, aside = text.set_aside(judging, task.examples, text.answers_of(host, task.examples))
            if len(rows := hosts.chunks(host, kept)) < 2:
                raise InvalidReference(
                    f"Of the general text {len(rows)} chunk(s) are left to measure the balls of {name} on, two or more are needed "
                    f"({aside} document(s) state an edited fact and were set aside)."
                )
            before = canonical.score(host, _asked(task, split))
            self.grounds[key] = Ground(task=task, before=before, rows=rows, rows_N2=hosts.score(host, rows))
        return self.grounds[key]

    def _fixed(self, host: Host, ground: Ground, job: Job) -> Iterator[tuple[dict[str, Any], tuple[Score, ...]]]:
        settings = dict(job.settings)
        within = float(settings.pop("within", max(self.plan.epsilons)))
        hold = self.standing(host)[0][:HELD]
        made = methods.make(job.column.method, **settings)
        if (host.id, job.column.method) not in self.states:  # no space varies what it depends on
            self.states[host.id, job.column.method] = made.prepare(host, (), Run(hold=hold, seed=self.plan.seed))
        state = self.states[host.id, job.column.method]
        examples = tuple(e if job.column.subjects else replace(e, subject=None) for e in ground.task.examples)
        patch: Patch | None = None
        with suppress(InvalidPatch):  # a descent that came to NaN is a run outside every ball
            patch = made.edit(host, examples, Run(hold=hold, budget=Budget(epsilon=within), seed=job.seed, state=state))
        yield from self._scaled(host, ground, patch, job)

    def _scaled(self, host: Host, ground: Ground, patch: Patch | None, job: Job) -> Iterator[tuple[dict[str, Any], tuple[Score, ...]]]:
        """The patch on the edge of each ball, and the scores there; the unedited host where it cannot be brought inside."""
        read: dict[float, Tensor] = {}  # of the general text, by the share of the change
        seen: dict[float, tuple[Score, ...]] = {0.0: ground.before}

        def at(s: float) -> tuple[Tensor, bool]:
            assert patch is not None
            with apply.applied(host, apply.scaled(patch, s)):
                read[s] = hosts.score(host, ground.rows)
            return read[s], True

        for epsilon in job.epsilons:
            s = 0.0
            if patch is not None:
                whole = read[1.0] if 1.0 in read else at(1.0)[0]
                inside = hosts.increase(ground.rows_N2, whole)[0] <= epsilon
                s = 1.0 if inside else hosts.furthest(at, dict(read), ground.rows_N2, epsilon)
            fit: dict[str, Any] = {"inside": s > 0, "scale": s}
            if patch is not None and s:
                fit["increase"], fit["upper"] = hosts.increase(ground.rows_N2, read[s])
                if s not in seen:
                    with apply.applied(host, apply.scaled(patch, s)):
                        seen[s] = canonical.score(host, _asked(ground.task, job.split))
            yield fit, seen[s]

    def _faithful(self, host: Host, ground: Ground, job: Job) -> Iterator[tuple[dict[str, Any], tuple[Score, ...]]]:
        on = frozenset(self.plan.switches)
        made = _published.Published(
            kind="full" if job.column.method == "finetune" else "lora",
            discarded_gradients="discarded_gradients" in on,
            bf16_weights="bf16_weights" in on,
            summed_kl="summed_kl" in on,
            bf16_reference="bf16_reference" in on,
            **job.settings,
        )
        seed = int.from_bytes(os.urandom(4)) if "unseeded" in on else job.seed
        losses, scores, last = [_general(host, ground.rows)], [ground.before], None
        for patch in _published.epochs(host, ground.task.examples, self.standing(host)[0][:HELD], made, seed):
            last = patch
            with apply.applied(host, patch):
                losses.append(_general(host, ground.rows))
                scores.append(canonical.score(host, _asked(ground.task, job.split)))
        if "last_epoch" not in on:
            yield from self._scaled(host, ground, last, job)
            return
        for epsilon, cap in zip(job.epsilons, job.caps, strict=True):
            # strictly inside in their selection, not in their report
            epoch = last_inside(losses, epsilon, cap, strict=job.split == "validation")
            yield {"inside": epoch > 0, "epoch": epoch, "increase": losses[epoch] / losses[0] - 1, "losses": losses}, scores[epoch]


def _asked(task: Task, split: Split) -> Task:
    """The search chooses by success alone: what else is measured waits for the test."""
    return task if split == "test" else replace(task, hard=(), unconditional=())


def _general(host: Host, rows: Sequence[tuple[list[int], int]]) -> float:
    """Mean token loss on the general text."""
    scored_N2 = hosts.score(host, rows)
    return mean_loss((-scored_N2[:, 0]).tolist(), scored_N2[:, 1].int().tolist())


def _told(before: Sequence[Score], after: Sequence[Score], split: Split) -> dict[str, Any]:
    """Success in points and losses in nats, before and after; for the test also behaviour by behaviour, to redraw from."""

    told: dict[str, Any] = {
        "success_before": canonical.mean(before, "success"),
        "success": canonical.mean(after, "success"),
        "loss": canonical.mean(after, "loss.records"),
    }
    if split == "test":
        told |= {f"{m}_before": canonical.mean(before, f"loss.{m}") for m in ("hard", "unconditional")}
        told |= {m: canonical.mean(after, f"loss.{m}") for m in ("hard", "unconditional")}
        pairs = zip((s for s in before if s.measure == "success"), (s for s in after if s.measure == "success"), strict=True)
        told["behaviours"] = [[a.case, a.total, b.total, a.count] for a, b in pairs]
    return told


# ----------------------------------------------------------------------------------------------------------------------- many edits


def executed(bench: Bench, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Each job with its outcome, as they come: on the bench, or in `workers` of their own, which end with this process.

    Raises what a job raises.
    """
    if workers == 1:
        for job in jobs:
            yield job, bench.run(job)
        return
    context, waiting, busy = multiprocessing.get_context("spawn"), deque(jobs), dict[Connection, Job]()
    processes = []
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(bench.plan, theirs, workers), daemon=True))
            processes[-1].start()
            theirs.close()  # else its end would not be seen
            busy[ours] = waiting.popleft()
            ours.send(busy[ours])
        while busy:
            for end in wait(list(busy)):
                assert isinstance(end, Connection)
                job = busy.pop(end)
                try:
                    answer = end.recv()
                except EOFError:
                    raise EditError(f"The process that worked on '{job.name}' was ended from outside. What was done is kept.") from None
                if isinstance(answer, EditError):
                    raise answer
                if waiting:
                    busy[end] = waiting.popleft()
                    end.send(busy[end])
                yield job, answer
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(plan: Plan, end: Connection, workers: int) -> None:
    """Jobs in, outcomes out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked decides
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    bench = Bench(plan=plan)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = end.recv()
            try:
                answer: Outcome | EditError = bench.run(job)
            except EditError as e:
                answer = e
            end.send(answer)


def run(
    plan: Plan, folder: str | Path, workers: int = 1, progress: Progress = no_progress, given: Mapping[str, Host] | None = None
) -> tuple["Found", ...]:
    """What each column does on each task in each ball. Of the edits only those are made that the folder does not hold already.

    `given` are hosts that are loaded already, for `workers` = 1. Raises MissingExtra without Optuna, LeakError if the splits share a
    record, and what an edit raises.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bench = _checked(plan, given or {})
    trials = _searched(bench, folder, workers, progress)
    tests = {where: _tests(plan, *where, found) for where, found in trials.items()}
    kept = _Kept(folder / "runs.jsonl")

    def key(job: Job) -> str:
        return key_of(plan, bench.host(job.column.host), job)

    jobs = {key(job): job for by_ball in tests.values() for own in by_ball.values() for job in own}
    missing = [job for name, job in jobs.items() if name not in kept.rows]
    for job, outcome in progress(executed(bench, missing, workers), "testing", len(missing)):
        kept.add(key(job), outcome)
    return tuple(
        Found(
            column=column,
            task=task,
            epsilon=epsilon,
            trial=best(found, epsilon),
            tests=tuple(ball_of(kept.rows[key(job)], epsilon) for job in tests[column, task][epsilon]),
        )
        for (column, task), found in trials.items()
        for epsilon in plan.epsilons
    )


def _checked(plan: Plan, given: Mapping[str, Host]) -> Bench:
    """A bench with the hosts on it. What would be found out late otherwise: models that are not there, tasks that cannot be read, splits
    that overlap."""
    bench = Bench(plan=plan, given=given)
    for name in dict.fromkeys(column.host for column in plan.columns):
        host = bench.host(name)
        hosts.require_causal(host, "The protocol")
        for task in plan.tasks:
            validation, test = (task_of(plan, host, task, split) for split in ("validation", "test"))
            if plan.variant != "published":  # theirs do: 162 pairs of StereoSet stand in both
                check_apart(validation, test)
    return bench


def key_of(plan: Plan, host: Host, job: Job) -> str:
    plain = asdict(job)
    del plain["number"]  # what it is called does not change what it is
    return digest("job", plan.id, host.id, canonical_json(plain))


def _searched(bench: Bench, folder: Path, workers: int, progress: Progress) -> dict[tuple[Column, str], list[Outcome]]:
    """The trials of each column and task: those that the folder holds, and those that were missing."""
    try:
        import optuna
    except ImportError as e:
        raise MissingExtra('The search needs Optuna, which is not installed: pip install "errata[protocol]".') from e
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # each study announces itself otherwise
    plan, storage = bench.plan, optuna.storages.RDBStorage(f"sqlite:///{folder / 'search.db'}")
    try:
        studies: dict[tuple[Column, str], Study] = {}
        settings_of: dict[tuple[Column, str], list[dict[str, Any]]] = {}
        jobs, trials = list[Job](), list["Trial"]()
        for task in plan.tasks:
            for column in plan.columns:
                name = f"{plan.mode}, {column.host}, {column.label}, {task}"
                studies[column, task] = study = optuna.create_study(
                    storage=storage,
                    study_name=f"{name}, {plan.id}, {bench.host(column.host).id}",
                    directions=["maximize"] * len(plan.epsilons),
                    load_if_exists=True,
                )
                wanted = [drawn(plan, name, number, SPACES[plan.mode][column.method]) for number in range(plan.trials)]
                settings = settings_of[column, task] = [trial.user_attrs["settings"] for trial in wanted]
                done = {outcome["number"] for outcome in _finished(study, settings)}
                for number in sorted(set(range(plan.trials)) - done):
                    trials.append(wanted[number])
                    jobs.append(
                        Job(
                            column=column,
                            task=task,
                            split="validation",
                            settings=settings[number],
                            seed=plan.seed,
                            number=number,
                            epsilons=plan.epsilons,
                            caps=(None,) * len(plan.epsilons),
                        )
                    )
        trial_of = dict(zip((job.name for job in jobs), trials, strict=True))
        for job, outcome in progress(executed(bench, jobs, workers), "searching", len(jobs)):
            trial = trial_of[job.name]
            finished = optuna.trial.create_trial(  # at once and whole: a kill leaves nothing behind that is half a trial
                params=trial.params,
                distributions=trial.distributions,
                values=[ball["success"] for ball in outcome["balls"]],
                user_attrs={"outcome": outcome},
            )
            studies[job.column, job.task].add_trial(finished)
        return {where: _finished(study, settings_of[where]) for where, study in studies.items()}
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _finished(study: "Study", settings: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """The outcomes of the trials that were made with these settings, in their order: another space draws others under the same number."""
    done = {(o["number"], canonical_json(o["settings"])): o for o in (trial.user_attrs["outcome"] for trial in study.get_trials())}
    return [done[key] for n, own in enumerate(settings) if (key := (n, canonical_json(dict(own)))) in done]


def _tests(plan: Plan, column: Column, task: str, trials: Sequence[Outcome]) -> dict[float, list[Job]]:
    """For each ball the jobs of the trial that was the best one there, one for each seed; balls that share a trial share its jobs."""
    chosen: dict[int, list[float]] = {}
    for epsilon in plan.epsilons:
        chosen.setdefault(best(trials, epsilon)["number"], []).append(epsilon)
    jobs: dict[float, list[Job]] = {}
    for trial in trials:
        epsilons = tuple(chosen.get(trial["number"], ()))
        own = [
            Job(
                column=column,
                task=task,
                split="test",
                settings=trial["settings"],
                seed=plan.seed + 1 + number,  # not the search's
                number=number,
                epsilons=epsilons,
                caps=tuple(ball_of(trial, epsilon).get("epoch") for epsilon in epsilons),
            )
            for number in range(plan.seeds)
        ]
        jobs |= dict.fromkeys(epsilons, own)
    return jobs


class _Kept:
    """A file with one JSON object on each line, by key. A line that a kill has cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, dict[str, Outcome]()
        whole = path.read_bytes() if path.exists() else b""
        if len(whole) > (end := whole.rfind(b"\n") + 1):
            os.truncate(path, end)
            whole = whole[:end]
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[row.pop("key")] = row

    def add(self, key: str, row: Outcome) -> None:
        self.rows[key] = row
        with self.path.open("a") as f:
            f.write(json.dumps({"key": key, **row}) + "\n")
            f.flush()
            os.fsync(f.fileno())


# ---------------------------------------------------------------------------------------------------------------------------- tables


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """What a column does on a task in one ball: the validation trial whose settings were chosen for it, and the test edits there."""

    column: Column
    task: str
    epsilon: float
    trial: Outcome
    tests: tuple[dict[str, Any], ...]


def cell(found: Found) -> Cell:
    """As the paper reports it: means over seeds, the error over seeds. Edits that were outside the ball count as none at all."""

    def over(measure: str) -> float | None:
        values = [ball[measure] for ball in found.tests]
        return None if None in values else sum(values) / len(values)

    hard_before, hard = over("hard_before"), over("hard")
    changes = [points(ball["success_before"], ball["success"]) for ball in found.tests]
    return Cell(
        model=found.column.host,
        method=found.column.label,
        task=found.task,
        epsilon=found.epsilon,
        before=over("success_before"),
        change=sum(changes) / len(changes),
        error=standard_error(changes),
        hard_before=hard_before,
        hard_change=None if hard is None or hard_before is None else hard - hard_before,
        runs=len(found.tests),
    )


def estimate(column: Iterable[Found], against: Iterable[Found] = ()) -> Estimate:
    """Change of success in points, the unweighted mean over the tasks of one column in one ball; with another column less that one's.

    The interval redraws the behaviours of each task (a country, an occupation): records of one behaviour succeed or fail together.
    """
    import numpy as np

    first, other = list(column), {found.task: found for found in against}
    if not first or (other and other.keys() != {found.task for found in first}):
        return Estimate(None)
    value = float(np.mean([_change(found) - (_change(other[found.task]) if other else 0.0) for found in first]))
    drawn = [_redrawn(found) - (_redrawn(other[found.task]) if other else 0.0) for found in first]
    if any(not len(one) for one in drawn):
        return Estimate(value)
    low, high = np.percentile(np.mean(drawn, axis=0), CONFIDENCE)
    return Estimate(value, float(low), float(high))


def _change(found: Found) -> float:
    return cell(found).change or 0.0


def _redrawn(found: Found) -> "np.ndarray[Any, Any]":
    """The change of success, in points, over redrawn behaviours; the same ones for every column, so that differences are paired."""
    import numpy as np

    rows = np.array([[row[1:] for row in ball["behaviours"]] for ball in found.tests], dtype=float).mean(0)  # before, after, count
    if len(rows) < 2:
        return np.zeros(0)
    drawn = np.random.default_rng(int(digest("redrawn", found.task)[3:11], 16)).integers(len(rows), size=(RESAMPLES, len(rows)))
    before, after, count = np.moveaxis(rows[drawn].sum(1), 1, 0)
    share: np.ndarray[Any, Any] = 100 * (after - before) / count
    return share


CLAIMS = (  # what the paper finds: which column is first, among which of the same host, in which ball
    ("senses first", "senses", ("finetune", "lora", "memit"), 1e-5),
    ("lora over finetune and memit", "lora", ("finetune", "memit"), 1e-4),
    ("the ensemble over editing the large model", "ensemble", ("finetune", "lora"), 1e-5),
)


def order(found: Iterable[Found]) -> str:
    """In one line: whether the order of the paper's methods holds here. Its second claim is about plain transformers."""
    columns: dict[tuple[str, str, float], list[Found]] = {}
    for f in found:
        columns.setdefault((f.column.host, f.column.label, f.epsilon), []).append(f)
    told = list[str]()
    for claim, first, others, epsilon in CLAIMS:
        before = len(told)
        backpacks = {host for host, label, _ in columns if label == "senses"}
        hosts_ = [host for host, label, e in columns if label == first and e == epsilon and (first != "lora" or host not in backpacks)]
        for host in hosts_:
            means = {label: estimate(columns[host, label, epsilon]) for label in (first, *others) if (host, label, epsilon) in columns}
            if len(means) < 2 or any(m.value is None for m in means.values()):
                continue
            second = max((label for label in means if label != first), key=lambda label: means[label].value or 0.0)
            ahead = estimate(columns[host, first, epsilon], columns[host, second, epsilon])
            assert ahead.value is not None
            within = "" if ahead.low is None else f" [{ahead.low:+.1f}, {ahead.high:+.1f}]"
            absent = [label for label in others if label not in means]
            told.append(
                f"{claim} at {epsilon:.0e} on {host}: {'holds' if ahead.value > 0 else 'does not hold'}"
                f" ({ahead.value:+.1f}{within} against {second}{'; without ' + ', '.join(absent) if absent else ''})"
            )
        if len(told) == before:  # no such column, or none beside it on its host
            told.append(f"{claim}: not measured")
    return "The paper's order: " + ". ".join(told) + "."
