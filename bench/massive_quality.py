"""Many facts of the lab edited at once: what is fixed, what carries over, and what the rest pays, for each method and number of facts.

All of them are facts that no meta-training saw: those of the test split, and for 4,096, which are more, some of the training split that
were not learnt from. `malmen` and `mend` learn first, from 1,200 cases of the training split, and that is timed. An edit may cost what its
number of facts allows (`BALLS`, which are the goals); what the method left over, the gate scales.

    edit         the example's own prompt, free greedy generation, exact match
    phrasings    unseen phrasings and paragraphs, likewise
    agreement    prompts near it (same subject, same relation, unrelated): the same greedy text as before
    loss         relative increase of the mean token loss on text that judges, statements of edited facts set aside

Of more than 128 facts a sample of 128 is asked. The curve is drawn into `massive_quality.svg`, in the folder where the script is called.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from errata import evaluate, gate, methods, text
from errata.evaluate import Scores
from errata.hosts import Host
from errata.types import Budget, Case, Run, Verdict

BALLS = {1: 5e-3, 16: 5e-3, 128: 1e-2, 512: 4e-2, 1024: 4e-2, 4096: 4e-2}
GOALS = {16: (0.95, 0.80, 0.95, 0.005), 128: (0.90, 0.75, 0.90, 0.01), 512: (0.85, 0.60, 0.75, 0.04)}
LEARNT_FROM = 1200
ASKED = 128
READ = 1000  # documents that judge


def judged(
    host: Host, method: str, cases: Sequence[Case], epsilon: float, run: Run, judging: Sequence[str], **settings: object
) -> tuple[Scores, Verdict, float]:
    """What one edit of all `cases` does, what it costs, and the seconds that it took."""
    examples = tuple(c.example for c in cases)
    start = time.perf_counter()
    made = methods.make(method, **settings).edit(host, examples, replace(run, budget=Budget(epsilon=epsilon)))
    seconds = time.perf_counter() - start
    kept, aside = text.set_aside(judging[:READ], examples, text.answers_of(host, examples))
    patch, verdict = gate.fit(host, made, Budget(epsilon=epsilon, fixed=0.0), gate.baseline(host, kept, aside))
    before = evaluate.baseline(host, asked(cases))
    return evaluate.evaluate(host, patch, before, state=run.state), verdict, seconds


def asked(cases: Sequence[Case]) -> list[Case]:
    """A sample of the cases, with some of what could be asked about each."""
    rng = random.Random(0)
    some = rng.sample(list(cases), min(len(cases), ASKED))
    each = 4 if len(cases) <= 16 else 1

    def of(texts: Sequence[Any], n: int) -> tuple[Any, ...]:
        return tuple(rng.sample(list(texts), min(len(texts), n)))

    return [
        replace(
            c,
            paraphrases=of(c.paraphrases, 2 * each),
            paragraphs=of(c.paragraphs, each),
            neighbours=of(c.neighbours, 2 * each),
            negations=(),
        )
        for c in some
    ]


def rate(scores: Scores, *measures: str) -> float:
    """Of several measures together."""
    rows = [s for s in scores.rows if s.measure in measures]
    return sum(s.total for s in rows) / max(1, sum(s.count for s in rows))
