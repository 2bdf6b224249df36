"""Host + ScopeCases -> Scores: does what lies in an edit's scope follow it, and does the rest stay as it was?

The measures of SERAC (Mitchell et al. 2022, https://arxiv.org/abs/2206.06520, section 5.1, with the definitions of their code,
serac@c963a39), edit success ES and drawdown DD, and beside them what free generation says; that is our main number, here too.

    questions and claims   ES        in scope, share of answers of which every token is the likeliest, teacher-forced       es.teacher
                           DD        out of scope, share of answers of which not every likeliest token is as before         dd.teacher
                           free      greedy text gives the wanted answer, and not the old one beside it                     es
                           free      greedy text, or the label of a classifier, is another than before                      dd
    opinions               ES        z_sentiment z_topic, with mean log-likelihoods of tokens: l of the matching utterances,
                                     k of the opposite ones, l0 as l but before the edit
                                     z_sentiment = sigmoid(l - k)        z_topic = min(1, exp(l - l0))
                           DD        mean over the tokens of replies out of scope of KL(before || after)                    kl.outside
    EREN (arXiv 2403.17431) ES, BP   as in "free" above, BP = 1 - dd        EQ, their harmonic mean                         quality

A classifier's answer is one label: of it "free" and "teacher" are the same, accuracy and share of changed labels. Every measure is split
into easy and hard queries. What was before is what the host says without the patch.

    told = before(host, cases)      once
    scores = judge(host, patch, told)      for each patch

File legend: N rows, P scored positions, V vocabulary.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errata import apply, hosts, text
from errata.evaluate import SPARE_TOKENS, Answer, Scores, aggregate, gives, peak_mb, say
from errata.hosts import Host, says
from errata.types import InvalidExample, LeakError, Patch, Progress, Query, ScopeCase, Score, State, WrongBase, folded, no_progress

Pair = tuple[str, str]

PARTS = ("", ".easy", ".hard")
MEASURES: dict[str, str] = {  # and es.<kind>, dd.<kind> for each kind of query
    **{f"es{p}": f"in scope, the answer is given{p.replace('.', ', ')}" for p in PARTS},
    **{f"dd{p}": f"out of scope, another text than before{p.replace('.', ', ')}" for p in PARTS},
    **{f"es.teacher{p}": f"in scope, teacher-forced, every token likeliest{p.replace('.', ', ')}" for p in PARTS},
    **{f"dd.teacher{p}": f"out of scope, not every likeliest token as before{p.replace('.', ', ')}" for p in PARTS},
    "z.opinion": "z.sentiment times z.topic",
    "z.sentiment": "sigmoid of the log-likelihood of matching utterances less that of opposite ones, means over tokens",
    "z.topic": "likelihood of matching utterances by that before, means over tokens, at most 1",
    "loss.matching": "mean token loss of matching utterances, nats",
    "loss.opposite": "mean token loss of opposite utterances, nats",
    "kl.outside": "KL(before || after) at the tokens of replies out of scope, nats",
}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Before:
    """What the host said without the patch: made once, compared with many times."""

    host: str
    cases: tuple[ScopeCase, ...]
    new_tokens: int
    said: Mapping[str, str]


class Forced(NamedTuple):
    """One answer behind its prompt, teacher-forced: its tokens, whether each is the likeliest, whether the likeliest are those of before,
    KL(before || after), and the log-probability of the answer before and after, summed over tokens."""

    tokens: int
    hit: bool
    same: bool
    kl: float
    logp_before: float
    logp: float


class Quality(NamedTuple):
    """EREN's three: edit success, behaviour preserved, and their harmonic mean; None where there is nothing to count."""

    es: float | None
    bp: float | None
    eq: float | None


# ---------------------------------------------------------------------------------------------------------------------- the judgement


def before(host: Host, cases: Iterable[ScopeCase], progress: Progress = no_progress) -> Before:
    """Ask the host as it is. Equal cases count once. Raises InvalidExample if a query out of one edit's scope is in that of another."""
    unique = tuple(dict.fromkeys(cases))
    if not unique:
        raise InvalidExample("There are no cases to judge.")
    within = {folded(prompt): case for case in unique for prompt in case.prompts}
    for case in unique:
        if foreign := next((q.prompt for q in case.outside if folded(q.prompt) in within), None):
            raise InvalidExample(
                f"'{foreign}' is out of the scope of '{case.example}', but in that of '{within[folded(foreign)].example}'. Both cannot be "
                f"right: choose cases that go together (`tasks.scope.together`)."
            )
    new_tokens = SPARE_TOKENS + max((_length(host, pair) for case in unique for pair in _answers(case)), default=0)
    return Before(host=host.id, cases=unique, new_tokens=new_tokens, said=say(host, _asked(unique), new_tokens, progress))


def judge(host: Host, patch: Patch | None, told: Before, *, state: State | None = None, progress: Progress = no_progress) -> Scores:
    """Every measure of every case with `patch` on; with None, of the host as it is. The host is left as it was.

    `state` is what the method had prepared, if anything. Raises LeakError if it was trained on one of the cases or if the patch was made
    from a prompt that should be unseen, WrongBase if the patch or `told` belongs to other weights.
    """
    started = time.perf_counter()
    if told.host != host.id:
        raise WrongBase(f"What was before was measured on {told.host}, {host.name} is {host.id}. Measure it again with `before`.")
    _refuse_leaks(told.cases, patch, state)
    patches = [] if patch is None else [patch]
    with apply.applied(host, *patches):
        after = told.said if patch is None else say(host, _asked(told.cases), told.new_tokens, progress)
    forced = _forced(host, patches, [pair for case in told.cases for pair in _answers(case)])
    rows: list[Score] = []
    answers: list[Answer] = []
    for case in told.cases:
        own = list(_compared(case, told.said, after))
        answers += own
        rows += [*_spoken(case, own), *_teacher(case, forced), *_opinion(case, forced)]
    return Scores(
        host=host.id,
        rows=tuple(rows),
        answers=tuple(answers),
        patch=patch.id if patch else None,
        seconds=time.perf_counter() - started,
        peak_mb=peak_mb(host.device),
        patch_bytes=patch.nbytes if patch else 0,
    )


def quality(scores: Scores, part: str = "") -> Quality:
    """EREN's three, of all queries or of one part (".easy", ".hard"). Raises UnknownName."""
    es, dd = aggregate(scores, f"es{part}").value, aggregate(scores, f"dd{part}").value
    if es is None or dd is None:
        return Quality(es, None if dd is None else 1 - dd, None)
    return Quality(es, 1 - dd, harmonic(es, 1 - dd))


def harmonic(a: float, b: float) -> float:
    """The harmonic mean of two shares; 0 if one of them is."""
    return 2 * a * b / (a + b) if a + b else 0.0


def opinion(matching: float, opposite: float, matching_before: float) -> tuple[float, float]:
    """(z_sentiment, z_topic) of mean log-likelihoods of tokens. NaN stays NaN."""
    apart, grown = torch.tensor([matching - opposite, matching - matching_before], dtype=torch.float64)
    return float(apart.sigmoid()), float(grown.clamp(max=0).exp())


def _refuse_leaks(cases: Sequence[ScopeCase], patch: Patch | None, state: State | None) -> None:
    if state is not None and (seen := [c for c in cases if not state.trained_on.isdisjoint((c.id, c.case.id))]):
        raise LeakError(
            f"{len(seen)} of {len(cases)} cases are among those that the {state.method} state was trained on, the first is "
            f"'{seen[0].example}'. Judge on cases of another split."
        )
    shown = {e.prompt for e in patch.examples} if patch else set()
    for case in cases:
        if unseen := shown.intersection(q.prompt for q in _queries(case)) - {case.example.prompt}:
            raise LeakError(f"'{min(unseen)}' should be unseen, but the patch was made from it. Leave it out of the case.")


# ------------------------------------------------------------------------------------------------------------------------- questions


def _queries(case: ScopeCase) -> tuple[Query, ...]:
    return (*case.inside, *case.against, *case.outside)


def _answers(case: ScopeCase) -> Iterator[Pair]:
    yield from ((q.prompt, q.answer) for q in _queries(case) if q.answer is not None)


def _asked(cases: Iterable[ScopeCase]) -> Iterator[str]:
    """What is asked freely: of an opinion only what lies out of its scope, for it may be said in many ways."""
    yield from (q.prompt for case in cases for q in (*(() if case.against else case.inside), *case.outside))


def _length(host: Host, pair: Pair) -> int:
    ids, given = hosts.encode(host, *pair)
    return len(ids) - given


def _compared(case: ScopeCase, said: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Answer]:
    """An answer in scope is right if it is given and the old one is not; one out of scope, if it is what was said before."""
    for q in () if case.against else case.inside:
        wanted, was = str(q.answer), says(said[q.prompt], str(q.answer))
        old = None if was else text.answer(said[q.prompt]) or None
        ok = gives(after[q.prompt], wanted, old)
        yield Answer(
            case=case.id, measure="es", prompt=q.prompt, wanted=wanted, before=said[q.prompt], after=after[q.prompt], was=was, ok=ok
        )
    for q in case.outside:
        was_said, is_said = said[q.prompt], after[q.prompt]
        yield Answer(
            case=case.id,
            measure="dd",
            prompt=q.prompt,
            wanted=was_said,
            before=was_said,
            after=is_said,
            was=True,
            ok=was_said == is_said,
        )


# ---------------------------------------------------------------------------------------------------------------------------- scores


def _split(case: str, measure: str, outcomes: Sequence[tuple[Query, bool]]) -> Iterator[Score]:
    """The measure over all queries, over the easy and the hard ones, and over each kind."""
    parts = {"": outcomes, ".easy": [o for o in outcomes if not o[0].hard], ".hard": [o for o in outcomes if o[0].hard]}
    parts |= {f".{kind}": [o for o in outcomes if o[0].kind == kind] for kind in dict.fromkeys(q.kind for q, _ in outcomes) if kind}
    for part, own in parts.items():
        yield Score(case=case, measure=f"{measure}{part}", total=float(sum(ok for _, ok in own)), count=len(own))


def _spoken(case: ScopeCase, answers: Sequence[Answer]) -> Iterator[Score]:
    inside = [a.ok for a in answers if a.measure == "es"]
    outside = [not a.ok for a in answers if a.measure == "dd"]
    yield from _split(case.id, "es", list(zip(() if case.against else case.inside, inside, strict=True)))
    yield from _split(case.id, "dd", list(zip(case.outside, outside, strict=True)))


def _teacher(case: ScopeCase, forced: Mapping[Pair, Forced]) -> Iterator[Score]:
    inside = [(q, forced[q.prompt, str(q.answer)].hit) for q in (() if case.against else case.inside)]
    known = [(q, forced[q.prompt, q.answer]) for q in case.outside if q.answer is not None]
    yield from _split(case.id, "es.teacher", inside)
    yield from _split(case.id, "dd.teacher", [(q, not found.same) for q, found in known])
    yield Score(case=case.id, measure="kl.outside", total=float(sum(f.kl for _, f in known)), count=sum(f.tokens for _, f in known))


def _opinion(case: ScopeCase, forced: Mapping[Pair, Forced]) -> Iterator[Score]:
    if not case.against:
        return
    matching, opposite = ([forced[q.prompt, str(q.answer)] for q in side] for side in (case.inside, case.against))
    tokens, others = sum(f.tokens for f in matching), sum(f.tokens for f in opposite)
    logp, opposite_logp = sum(f.logp for f in matching), sum(f.logp for f in opposite)
    sentiment, topic = opinion(logp / tokens, opposite_logp / others, sum(f.logp_before for f in matching) / tokens)
    for name, z in (("opinion", sentiment * topic), ("sentiment", sentiment), ("topic", topic)):
        yield Score(case=case.id, measure=f"z.{name}", total=z, count=1)
    yield Score(case=case.id, measure="loss.matching", total=-logp, count=tokens)
    yield Score(case=case.id, measure="loss.opposite", total=-opposite_logp, count=others)


# -------------------------------------------------------------------------------------------------------------------------- the model


@torch.no_grad()
def _forced(host: Host, patches: Sequence[Patch], pairs: Iterable[Pair]) -> dict[Pair, Forced]:
    """Each answer behind its prompt, before and with the patches on."""
    unique = list(dict.fromkeys(pairs))
    rows = [hosts.encode(host, *pair) for pair in unique]
    out: dict[Pair, Forced] = {}
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.pad(host, [rows[i] for i in group])
        ids_P, lengths = batch.ids_NT[batch.scored_NT.bool()], batch.scored_NT.sum(1).int().tolist()
        before_PV = torch.log_softmax(hosts.predictions(host, batch), dim=-1)
        with apply.applied(host, *patches):
            after_PV = torch.log_softmax(hosts.predictions(host, batch), dim=-1)
        for i, *own in zip(group, *(torch.split(t, lengths) for t in (ids_P, before_PV, after_PV)), strict=True):
            out[unique[i]] = compared(*own)
    return out


def compared(ids_P: Int[Tensor, "P"], before_PV: Float[Tensor, "P V"], after_PV: Float[Tensor, "P V"]) -> Forced:
    """Of one answer's tokens and the log-probabilities (P, V) at their places. What is not a number is neither likeliest nor as before."""
    sound_P = ~after_PV.isnan().any(dim=1)
    kl_PV = torch.where(before_PV > -math.inf, before_PV.exp() * (before_PV - after_PV), 0.0)  # p log p is 0 where p is
    return Forced(
        tokens=len(ids_P),
        hit=bool(((after_PV.argmax(1) == ids_P) & sound_P).all()),
        same=bool(((after_PV.argmax(1) == before_PV.argmax(1)) & sound_P).all()),
        kl=float(kl_PV.sum(dtype=torch.float64)),
        logp_before=float(before_PV.gather(1, ids_P[:, None]).sum(dtype=torch.float64)),
        logp=float(after_PV.gather(1, ids_P[:, None]).sum(dtype=torch.float64)),
    )
