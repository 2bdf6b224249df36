"""Host + Cases -> Scores: what a patch does to text that its method has never seen.

The main numbers come from free greedy generation: an answer is right if the continuation gives exactly the target, and not the old answer
beside it. Teacher-forced matches (`teacher.*`) and probability thresholds (`p0.2.*`) flatter an edit; they are extras, and are called so.
Everything is a `Score`, a sum and its denominator for one case and one measure, so every aggregate is exact and 0 of 0 is None.

    before = baseline(host, cases, reference)       once
    scores = evaluate(host, patch, before)          for each patch; `None` stands for no edit

Nothing here makes, scales or refuses a patch (`gate.py` does) or draws a table (`report.py` does).

File legend: N rows, T tokens, P scored positions, V vocabulary.
"""

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import apply, hosts, text
from errata.build import parse
from errata.hosts import Batch, Host, says
from errata.tasks import counterfact, fever, zsre
from errata.tasks._layouts import check_text, named, records, sound, table
from errata.types import (
    RINGS,
    Case,
    Example,
    InvalidExample,
    LeakError,
    Patch,
    Progress,
    Score,
    State,
    UnknownName,
    WrongBase,
    no_progress,
)

Row = tuple[list[int], int]
Pair = tuple[str, str]

WANTED = ("edit", "paraphrases", "paragraphs")  # prompts whose right answer is the target
NEIGHBOURS = tuple(f"neighbours.{ring}" for ring in RINGS)
MEASURES: dict[str, str] = {
    "edit": "the example's own prompt gets the target",
    "paraphrases": "unseen phrasings get the target",
    "paragraphs": "prompts inside a paragraph get the target",
    "ood": "paraphrases and paragraphs together",
    "negations": "denials do not get the target",
    "neighbours": "what was right is still right, all rings",
    **{f"neighbours.{r}": "what was right is still right" for r in RINGS},
    **{f"accuracy.{r}": "the right answer is given, whatever was said before" for r in RINGS},
    **{f"agreement.{r}": "same greedy text as before" for r in RINGS},
    **{f"kl.{r}": "KL(base || edited) at the answer, nats" for r in RINGS},
    **{f"top1.{r}": "same likeliest token at the answer" for r in RINGS},
    "kl.reference": "KL(base || edited) on reference text, nats",
    "top1.reference": "same likeliest token on reference text",
    "loss.reference": "mean token loss on a sample of the reference text, nats",
    **{f"teacher.{m}": "teacher-forced, every token likeliest" for m in (*WANTED, "ood")},
    **{f"p0.2.{m}": "probability of the target 0.2 or more" for m in (*WANTED, "ood")},
}
LAYOUTS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Case]], ...] = (  # published ones, by the keys that a record must have
    (zsre.KEYS, zsre.case),
    (counterfact.KEYS, counterfact.case),
    (counterfact.FLAT_KEYS, counterfact.flat),
    (fever.KEYS, fever.case),
)
THRESHOLD = 0.2  # Hewitt et al. 2024, table 1: country-capital
SPARE_TOKENS = 4  # generated beyond the longest answer, so that one sees how the sentence goes on
ASKED_AT_ONCE = 128  # prompts between two signs of progress
RESAMPLES = 2000


# --------------------------------------------------------------------------------------------------------------------------- values


class Estimate(NamedTuple):
    """A value with its 95 % interval; None where there is nothing to count (value) or too little for an interval (low, high)."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """One prompt, what the host said before and after, and whether that was right (`was`, `ok`).

    `measure` is the one that it counts for. Right means `wanted` is said; for `negations`, that it is not.
    """

    case: str
    measure: str
    prompt: str
    wanted: str
    before: str
    after: str
    was: bool
    ok: bool


@final
@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `evaluate` found: one Score for each case and measure, and the answers behind them.

    Rows on reference text have `reference/<chunk>` for a case. `seconds` is the time of this evaluation, `peak_mb` the process's greatest
    memory so far (of the GPU, if the host is on one), `patch_bytes` the size of the patch's tensors.
    """

    host: str
    rows: tuple[Score, ...]
    answers: tuple[Answer, ...] = ()
    patch: str | None = None
    seconds: float = 0.0
    peak_mb: float = 0.0
    patch_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = [[s.case, s.measure, s.total, s.count] for s in self.rows]  # thousands of them: lists, without the names
        return plain | {"rows": rows, "answers": [{f.name: getattr(a, f.name) for f in fields(a)} for a in self.answers]}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Scores":
        rows = tuple(Score(case=c, measure=m, total=t, count=n) for c, m, t, n in raw["rows"])
        return cls(**{**raw, "rows": rows, "answers": tuple(Answer(**a) for a in raw["answers"])})


@final
@dataclass(frozen=True, kw_only=True)
class Replies:
    """What a host replied: greedy continuations by prompt, and for goals other than `raise` whether each example is as wanted."""

    said: Mapping[str, str]
    fixed: Mapping[Example, bool]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """What the host replied before any patch: made once, compared with many times.

    `reference` are token rows. Distributions are not kept (a gigabyte for thirty thousand tokens): each comparison computes them again.
    """

    host: str
    cases: tuple[Case, ...]
    reference: tuple[Row, ...]
    new_tokens: int
    replies: Replies


# ---------------------------------------------------------------------------------------------------------------------- the judgement


def baseline(
    host: Host, cases: Iterable[Case], reference: Sequence[str] = (), reference_tokens: int = 8192, progress: Progress = no_progress
) -> Baseline:
    """Put every question of `cases` to the host as it is. Equal cases count once.

    Of `reference` the first `reference_tokens` tokens are used; documents that state an edited fact should be set aside before.
    Raises InvalidExample for a prompt that does not fit the context.
    """
    unique = tuple(dict.fromkeys(cases))
    if not unique:
        raise InvalidExample("There are no cases to evaluate.")
    new_tokens = SPARE_TOKENS + max(_length(host, pair) for case in unique for pair in _known_answers(case))
    rows: list[Row] = []
    room = reference_tokens
    for row in hosts.chunks(host, reference):
        if (room := room - len(row[0])) < 0 and rows:
            break
        rows.append(row)
    replies = _replies(host, unique, new_tokens, progress)
    return Baseline(host=host.id, cases=unique, reference=tuple(rows), new_tokens=new_tokens, replies=replies)


def evaluate(host: Host, patch: Patch | None, before: Baseline, *, state: State | None = None, progress: Progress = no_progress) -> Scores:
    """Every measure of every case with `patch` on; with None, of the host as it is. The host is left as it was.

    `state` is what the method had prepared, if anything. Raises LeakError if it was trained on one of the cases or if the patch was made
    from a prompt that should be unseen, WrongBase if the patch or `before` belongs to other weights.
    """
    started = time.perf_counter()
    if before.host != host.id:
        raise WrongBase(f"The baseline was measured on {before.host}, {host.name} is {host.id}. Measure it again with `baseline`.")
    _refuse_leaks(before.cases, patch, state)
    patches = [] if patch is None else [patch]
    with apply.applied(host, *patches):
        after = before.replies if patch is None else _replies(host, before.cases, before.new_tokens, progress)
        forced = _forced(host, before.cases)
    near = _pairs_near(before.cases)
    encoded = [hosts.encode(host, *pair) for pair in near]
    moved_N4 = _divergence(host, patches, [*encoded, *before.reference])
    by_pair = dict(zip(near, moved_N4, strict=False))
    rows: list[Score] = []
    answers: list[Answer] = []
    for case in before.cases:
        own = list(_answers(case, before.replies, after))
        answers += own
        rows += [*_spoken(case, own), *_near(case, by_pair), *_extras(case, forced)]
    rows += _on_reference(moved_N4[len(near) :])
    return Scores(
        host=host.id,
        rows=tuple(rows),
        answers=tuple(answers),
        patch=patch.id if patch else None,
        seconds=time.perf_counter() - started,
        peak_mb=peak_mb(host.device),
        patch_bytes=patch.nbytes if patch else 0,
    )


def along(
    host: Host, patch: Patch, before: Baseline, alphas: Sequence[float], progress: Progress = no_progress
) -> list[tuple[float, Scores]]:
    """(alpha, scores) of base + alpha * change for each alpha, in ascending order: 1-LI's curve (arXiv 2303.00046), for any patch."""
    return [(a, evaluate(host, apply.scaled(patch, a), before)) for a in progress(sorted(set(alphas)), "along the curve", len(set(alphas)))]


def gives(continuation: str, answer: str, old: str | None = None) -> bool:
    """Whether a continuation gives the answer, and not the old one too: `old` neither begins it nor stands in the rest of its sentence.

    An answer that begins with the old one ("New York City" for "New York") is not held against itself.
    """
    if not says(continuation, answer):
        return False
    if old is None:
        return True
    if says(continuation, old) and not says(answer, old):
        return False
    sentence = re.split(r"(?<=[.!?])\s|\n", continuation.strip(), maxsplit=1)[0]
    rest = " ".join(sentence.split())[len(" ".join(answer.split())) :]
    return text.whole(" ".join(old.split())).search(rest) is None


def _refuse_leaks(cases: Sequence[Case], patch: Patch | None, state: State | None) -> None:
    if state is not None and (seen := [c for c in cases if c.id in state.trained_on]):
        raise LeakError(
            f"{len(seen)} of {len(cases)} cases are among those that the {state.method} state was trained on, the first is "
            f"'{seen[0].example}'. Evaluate on cases of another split."
        )
    shown = {e.prompt for e in patch.examples} if patch else set()
    for case in cases:
        if unseen := shown.intersection((*case.paraphrases, *case.paragraphs)):
            raise LeakError(f"'{min(unseen)}' should be an unseen phrasing, but the patch was made from it. Leave it out of the case.")


# ------------------------------------------------------------------------------------------------------------------------- questions


def _questions(case: Case) -> Iterator[tuple[str, str, str]]:
    """(measure, prompt, wanted) of everything that is asked for a case."""
    target = case.example.target
    yield "edit", case.example.prompt, target
    for measure in ("paraphrases", "paragraphs", "negations"):
        for prompt in getattr(case, measure):
            yield measure, prompt, target
    for n in case.neighbours:
        yield f"neighbours.{n.ring}", n.prompt, n.answer


def _known_answers(case: Case) -> Iterator[Pair]:
    e = case.example
    yield from ((e.prompt, answer) for answer in (e.target, case.old, e.contrast) if answer)
    yield from ((n.prompt, n.answer) for n in case.neighbours)


def _length(host: Host, pair: Pair) -> int:
    """How many tokens the answer has behind its prompt."""
    ids, given = hosts.encode(host, *pair)
    return len(ids) - given


def _variant(case: Case, prompt: str) -> Example:
    return replace(case.example, prompt=prompt, subject=None)  # the subject need not stand in another phrasing


def say(host: Host, prompts: Iterable[str], new_tokens: int, progress: Progress) -> dict[str, str]:
    """What the host says to each prompt, freely and greedily."""
    ordered = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    groups = [ordered[i : i + ASKED_AT_ONCE] for i in range(0, len(ordered), ASKED_AT_ONCE)]
    said: dict[str, str] = {}
    for group in progress(groups, "asking", len(groups)):
        said |= zip(group, hosts.greedy(host, group, new_tokens), strict=True)
    return said


def _replies(host: Host, cases: Sequence[Case], new_tokens: int, progress: Progress) -> Replies:
    said = say(host, (prompt for case in cases for _, prompt, _ in _questions(case)), new_tokens, progress)
    others = [_variant(c, p) for c in cases if c.example.goal != "raise" for m, p, _ in _questions(c) if m in WANTED]
    return Replies(said=said, fixed=dict(zip(others, hosts.fixes(host, others), strict=True)))


def _answers(case: Case, before: Replies, after: Replies) -> Iterator[Answer]:
    id = case.id
    for measure, prompt, wanted in _questions(case):
        old = _old(case, before.said[prompt])
        yield Answer(
            case=id,
            measure=measure,
            prompt=prompt,
            wanted=wanted,
            before=before.said[prompt],
            after=after.said[prompt],
            was=_right(case, measure, prompt, wanted, before, old),
            ok=_right(case, measure, prompt, wanted, after, old),
        )


def _old(case: Case, said: str) -> str | None:
    """The answer that must be gone: the known one, else what the base said here up to the first stop; None if that was right already."""
    target = case.example.target
    if case.old is not None:
        return None if case.old.split() == target.split() else case.old
    first = text.answer(said)
    return first if first and not says(said, target) else None


def _right(case: Case, measure: str, prompt: str, wanted: str, replies: Replies, old: str | None) -> bool:
    said = replies.said[prompt]
    if measure == "negations":
        return not says(said, wanted)
    if measure in NEIGHBOURS:
        return says(said, wanted)
    return gives(said, wanted, old) if case.example.goal == "raise" else replies.fixed[_variant(case, prompt)]


# ---------------------------------------------------------------------------------------------------------------------------- scores


def _score(case: str, measure: str, outcomes: Sequence[float | bool]) -> Score:
    return Score(case=case, measure=measure, total=float(sum(outcomes)), count=len(outcomes))


def _spoken(case: Case, answers: Sequence[Answer]) -> Iterator[Score]:
    """What free generation says."""
    ok = {m: [a.ok for a in answers if a.measure == m] for m in (*WANTED, "negations")}
    kept = {m: [a.ok for a in answers if a.measure == m and a.was] for m in NEIGHBOURS}
    for measure, outcomes in (ok | {"ood": ok["paraphrases"] + ok["paragraphs"], "neighbours": sum(kept.values(), [])} | kept).items():
        yield _score(case.id, measure, outcomes)
    for ring in RINGS:
        near = [a for a in answers if a.measure == f"neighbours.{ring}"]
        yield _score(case.id, f"accuracy.{ring}", [a.ok for a in near])
        yield _score(case.id, f"agreement.{ring}", [a.before == a.after for a in near])


def _pairs_near(cases: Iterable[Case]) -> list[Pair]:
    return list(dict.fromkeys((n.prompt, n.answer) for case in cases for n in case.neighbours))


def _near(case: Case, moved: Mapping[Pair, Tensor]) -> Iterator[Score]:
    """How far the distributions at the neighbours' answers have moved."""
    for ring in RINGS:
        found = [moved[n.prompt, n.answer].tolist() for n in case.neighbours if n.ring == ring]
        positions = int(sum(row[3] for row in found))
        for column, measure in enumerate(("kl", "top1")):
            yield Score(case=case.id, measure=f"{measure}.{ring}", total=float(sum(row[column] for row in found)), count=positions)


def _on_reference(moved_N4: Float[Tensor, "N 4"]) -> Iterator[Score]:
    for i, row in enumerate(moved_N4.tolist()):
        for total, measure in zip(row[:3], ("kl", "top1", "loss"), strict=True):
            yield Score(case=f"reference/{i}", measure=f"{measure}.reference", total=total, count=int(row[3]))


def _extras(case: Case, forced: Mapping[Pair, tuple[float, bool]]) -> Iterator[Score]:
    """The two flattering measures, for the goal that they are defined for."""
    asked = [(m, forced[p, w]) for m, p, w in _questions(case) if m in WANTED and case.example.goal == "raise"]
    for measure in (*WANTED, "ood"):
        own = [outcome for m, outcome in asked if m == measure or (measure == "ood" and m != "edit")]
        yield _score(case.id, f"teacher.{measure}", [whole for _, whole in own])
        yield _score(case.id, f"p0.2.{measure}", [p >= THRESHOLD for p, _ in own])


# -------------------------------------------------------------------------------------------------------------------------- the model


def _batches(host: Host, rows: Sequence[Row]) -> Iterator[tuple[list[int], Batch]]:
    """(indices, batch) of rows of similar length, as many as one pass may read."""
    for group in hosts.by_length(rows, hosts.at_once(host)):
        yield group, hosts.pad(host, [rows[i] for i in group])


@torch.no_grad()
def _forced(host: Host, cases: Sequence[Case]) -> dict[Pair, tuple[float, bool]]:
    """(p(target | prompt), whether every token of the target is the likeliest) for the goal `raise`."""
    asked = [(p, w) for c in cases if c.example.goal == "raise" for m, p, w in _questions(c) if m in WANTED]
    pairs = list(dict.fromkeys(asked))
    out: dict[Pair, tuple[float, bool]] = {}
    for group, batch in _batches(host, [hosts.encode(host, *pair) for pair in pairs]):
        logp_PV, ids_P = _logprobs_PV(host, batch), batch.ids_NT[batch.scored_NT.bool()]
        logp_P, hit_P = logp_PV.gather(1, ids_P[:, None])[:, 0].cpu(), (logp_PV.argmax(1) == ids_P).cpu()
        lengths = batch.scored_NT.sum(1).int().tolist()
        for i, logp, hit in zip(group, torch.split(logp_P, lengths), torch.split(hit_P, lengths), strict=True):
            out[pairs[i]] = (float(logp.sum().exp()), bool(hit.all()))
    return out


def _logprobs_PV(host: Host, batch: Batch) -> Float[Tensor, "P V"]:
    """(P, V) log-probabilities, float32 or better, at the positions that predict the scored tokens, row after row."""
    return torch.log_softmax(hosts.predictions(host, batch), dim=-1)


@torch.no_grad()
def _divergence(host: Host, patches: Sequence[Patch], rows: Sequence[Row]) -> Float[Tensor, "N 4"]:
    """(N, 4) float64 for each row: summed KL(base || edited), agreeing likeliest tokens, the edited model's loss, scored positions."""
    out_N4 = torch.zeros(len(rows), 4, dtype=torch.float64)
    for group, batch in _batches(host, rows):
        scored_NT = batch.scored_NT[:, 1:] > 0
        base_PV = _logprobs_PV(host, batch)
        with apply.applied(host, *patches):
            edited_PV = _logprobs_PV(host, batch)
        kl_PV = base_PV.exp() * (base_PV - edited_PV)
        kl_P = torch.where(base_PV > -math.inf, kl_PV, 0.0).sum(1, dtype=torch.float64)  # p log p is 0 where p is
        same_P = (base_PV.argmax(1) == edited_PV.argmax(1)) & ~edited_PV[:, 0].isnan()  # one NaN makes the row NaN
        loss_P = -edited_PV.gather(1, batch.ids_NT[:, 1:][scored_NT][:, None])[:, 0]
        values_P4 = torch.stack([kl_P, same_P.double(), loss_P.double(), torch.ones_like(kl_P)], dim=1).cpu()
        out_N4.index_add_(0, torch.tensor(group)[scored_NT.nonzero()[:, 0].cpu()], values_P4)
    return out_N4


def peak_mb(device: torch.device) -> float:
    """The greatest memory so far in megabytes: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows keeps no such count
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, kilobytes elsewhere


# ------------------------------------------------------------------------------------------------------------------------ aggregates


def is_rate(measure: str) -> bool:
    """Whether each count is a trial that comes out 0 or 1."""
    return not measure.startswith(("kl.", "loss.", "z."))


def aggregate(scores: Scores, measure: str) -> Estimate:
    """Sum over all cases divided by the summed denominators, with its 95 % interval: Wilson's for rates, `over_cases` for the rest.

    Wilson's takes trials as independent; those of one case are not, so where a case has many it is too narrow and `over_cases` is the
    fair one. Raises UnknownName.
    """
    rows = _rows(scores, measure)
    count, total = sum(s.count for s in rows), sum(s.total for s in rows)
    if not is_rate(measure) or not count:
        return over_cases(scores, measure)
    from scipy.stats import binomtest  # a second to import, and the CLI reads this file for less

    interval = binomtest(round(total), count).proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(total / count, float(interval.low), float(interval.high), count)


def over_cases(scores: Scores, measure: str, seed: int = 0) -> Estimate:
    """As `aggregate`, with the interval of a bootstrap that redraws whole cases (or chunks of text). Raises UnknownName."""
    rows = [s for s in _rows(scores, measure) if s.count]
    count = sum(s.count for s in rows)
    if not count:
        return Estimate(None, None, None, 0)
    totals, counts = [s.total for s in rows], [float(s.count) for s in rows]
    low, high = _redrawn([totals, counts], lambda t, c, axis=-1: t.sum(axis) / c.sum(axis), seed)
    return Estimate(sum(totals) / count, low, high, count)


def paired_difference(before: Scores, after: Scores, measure: str, seed: int = 0) -> Estimate:
    """After minus before over the cases that both have, with the interval of a paired bootstrap over cases; `n` is those cases.

    Raises UnknownName.
    """
    first, second = ({s.case: s for s in _rows(x, measure) if s.count} for x in (before, after))
    pairs = [(first[case], second[case]) for case in first if case in second]
    if not pairs:
        return Estimate(None, None, None, 0)
    columns = [
        [b.total for b, _ in pairs],
        [float(b.count) for b, _ in pairs],
        [a.total for _, a in pairs],
        [float(a.count) for _, a in pairs],
    ]
    value = sum(columns[2]) / sum(columns[3]) - sum(columns[0]) / sum(columns[1])
    low, high = _redrawn(columns, lambda b, m, a, n, axis=-1: a.sum(axis) / n.sum(axis) - b.sum(axis) / m.sum(axis), seed)
    return Estimate(value, low, high, len(pairs))


def summary(scores: Scores) -> list[tuple[str, float | None, float | None, float | None, int]]:
    """(measure, value, low, high, count) of each measure that the scores hold, in the order of MEASURES."""
    held = {s.measure for s in scores.rows}
    return [(measure, *aggregate(scores, measure)) for measure in MEASURES if measure in held]


def _rows(scores: Scores, measure: str) -> list[Score]:
    rows = [s for s in scores.rows if s.measure == measure]
    if not rows and measure not in MEASURES:
        raise UnknownName.among("measure", measure, MEASURES)
    return rows


def _redrawn(columns: list[list[float]], statistic: Any, seed: int) -> tuple[float | None, float | None]:
    """95 % percentile interval of `statistic` over redrawn positions of `columns`, the same positions in each."""
    if len(columns[0]) < 2:
        return None, None  # one case says nothing about the spread between cases
    if not all(math.isfinite(x) for column in columns for x in column):
        return math.nan, math.nan
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        tuple(np.array(column) for column in columns),
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(columns[0])),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


# ----------------------------------------------------------------------------------------------------------------------------- files


def read_cases(path: str | Path) -> tuple[Case, ...]:
    """Cases of a text file, one in each line, or of one JSON list; empty lines do not count. A record is one of

        {"example": {...}, "paraphrases": [...], "neighbours": [{"prompt", "answer", "ring"}], ...}     as `Case.as_dict` writes it
        {"prompt": "The capital of Mauritius is", "target": " Port Louis", "paraphrases": [...], ...}   the example's fields beside the rest
        one of zsRE, CounterFact or FEVER, as published                                                 tasks/zsre.py, ...
        The capital of Mauritius is| Port Louis                                                         a line, not in a list

    Raises InvalidExample, with the number of the line or record.
    """
    made = []
    for where, record in records(path):
        with named(where):
            made.append(_case(where, record))
    return tuple(made)


def read_sound_cases(
    path: str | Path, check: Callable[[Case], object] = lambda case: None
) -> tuple[tuple[Case, ...], tuple[InvalidExample, ...]]:
    """(the cases of a file, what is wrong with each record that is none, or that `check` refuses). Raises InvalidExample if all are so."""

    def checked(where: str, record: Any) -> Case:
        case = _case(where, record)
        check(case)
        return case

    cases, wrong = sound(records(path), checked)
    if not cases:
        raise wrong[0]
    return tuple(cases), tuple(wrong)


def _case(_where: str, record: Any) -> Case:
    """Of a line, or of what a JSON list holds."""
    check_text(record)
    if isinstance(record, str) and not record.lstrip().startswith("{"):
        return Case(example=parse(record.rstrip("\r")))
    raw = table(record)
    if published := next((case for keys, case in LAYOUTS if raw.keys() >= keys), None):
        return published(raw)
    if "example" not in raw:
        raw["example"] = {f.name: raw.pop(f.name) for f in fields(Example) if f.name in raw}
    return Case.from_dict(raw)
