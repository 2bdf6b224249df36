"""Many facts of the lab edited at once: what is fixed, what carries over, and what the rest pays, for each method and number of facts.

All of them are facts that no meta-training saw: those of the test split, and for 4,096, which are more, of the validation split too.
`malmen` and `mend` learn first, from the training split, and that is timed. An edit may cost what its number of facts allows (`BALLS`,
which are the goals, and at 1,024 four times what is aimed at; for the T5 and the BERT as many nats per document); what the method
left over, the gate scales.

    edit         the example's own prompt, free greedy generation, exact match
    phrasings    unseen phrasings and paragraphs, likewise
    agreement    prompts near it (same subject, same relation, unrelated): the same greedy text as before
    accuracy     the same prompts: the right answer
    loss         relative increase of the mean token loss on text that judges, statements of edited facts set aside

Of more than 128 facts a sample of 128 is asked. `malmen`, `mend`, `ke` and `enn` also edit the lab's T5, which answers questions, and its
BERT, which tells true claims from false ones: `--only t5/malmen` names one of these. What was measured stays in `out/massive_quality`,
under the folder where the script is called, and one picture for each model is drawn there of all methods that have been measured.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _bench import arguments, emit

from errata import evaluate, gate, hosts, methods, report, text
from errata.evaluate import Scores
from errata.hosts import Host
from errata.lab import corpus, tasks
from errata.types import RINGS, Budget, Case, Run, Verdict

NATS = 10.8  # of a document of the NeoX, of which `BALLS` are shares: those of the others, who are asked little of which they are not sure,
# are as many nats for each document
BALLS = {1: 5e-3, 16: 5e-3, 128: 1e-2, 512: 4e-2, 1024: 4e-2, 4096: 4e-2}
GOALS = {16: (0.95, 0.80, 0.95, 0.005), 128: (0.90, 0.75, 0.90, 0.01), 512: (0.85, 0.60, 0.75, 0.04), 1024: (0.97, 0.90, 0.97, 0.01)}
LEARNING = ("malmen", "mend", "ke", "enn")
COMPARED = (
    "malmen",
    "mend",
    "memit",
    "alphaedit",
    "ultraedit",
    "lora",
    "finetune",
    *(f"{m}/{name}" for m in ("t5", "bert") for name in LEARNING),
)
NAMED = ("memit", "alphaedit")  # they edit what a prompt speaks of, so they are told
ASKED = 128
LEARNT_FROM = 1984  # all of the training split
READ = 4000  # documents that judge, at most: of a thousand the bound lies half of the ball above the mean


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


def named(case: Case) -> Case:
    """The case with what its prompt speaks of."""
    subject = case.source.split("/", 2)[2]
    return replace(case, example=replace(case.example, subject=subject)) if subject in case.example.prompt else case


def loss(host: Host, texts: Sequence[str]) -> float:
    """Nats per document."""
    return -float(hosts.score(host, hosts.chunks(host, texts))[:, 0].sum()) / len(texts)


def kept(folder: Path, name: str, points: Sequence[tuple[int, Scores]] = ()) -> dict[str, list[tuple[int, Scores]]]:
    """The curves of all methods that have been measured on the model, with the points of this one."""
    path = folder / f"{name.replace('/', '-')}.json"
    if points:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([[n, replace(scores, answers=()).as_dict()] for n, scores in points]))
    found = {}
    for other in COMPARED:
        there = folder / f"{other.replace('/', '-')}.json"
        if other.rpartition("/")[0] == name.rpartition("/")[0] and there.exists():
            found[other] = [(n, Scores.from_dict(raw)) for n, raw in json.loads(there.read_text())]
    return found


def main() -> None:
    args = arguments(__doc__)
    sizes = (16,) if args.quick else tuple(BALLS)
    folder = Path("out/massive_quality") / ("quick" if args.quick else "whole")
    for name in args.only.split(",") if args.only else ("ultraedit", "malmen") if args.quick else COMPARED:
        model, _, method = name.rpartition("/")
        host = hosts.load(f"lab/{model or 'neox'}", device="cpu")
        form = corpus.FORMS[host.kind]
        hold, judging = text.standing(host)
        judging = judging[:200] if args.quick else judging
        wider = NATS / loss(host, judging[:READ]) if model else 1.0
        state = None
        if method in LEARNING:
            short = {"steps": 4, "most": 16} if args.quick else {}
            start = time.perf_counter()
            learning = tasks.cases("train", 100 if args.quick else LEARNT_FROM, seed=args.seed, form=form)
            state = methods.make(method, **short).prepare(host, learning, Run(hold=hold, seed=args.seed))
            assert state is not None
            how = f"{len(learning)} training cases, {state.config['step']} steps, the best at {state.config['best_step']}"
            goal = ("<=", 20.0) if name == "malmen" and not args.quick else None
            emit(args, f"{name}: meta-training (minutes)", (time.perf_counter() - start) / 60, goal, how)
        points: list[tuple[int, Scores]] = []
        for n in sizes:
            cases = tasks.cases(("test", "validation") if n > 3000 else "test", n, seed=args.seed, form=form)
            run = Run(hold=hold, seed=args.seed, state=state)
            given, epsilon = [named(c) for c in cases] if method in NAMED else cases, wider * BALLS[n]
            scores, verdict, seconds = judged(host, method, given, epsilon, run, judging)
            points.append((n, scores))
            told = f"at {epsilon:.2g}, scaled to {verdict.scale:.2g}; 95 % < {verdict.upper:+.1e}; edited in {seconds:.1f} s"
            goals = GOALS.get(n, ()) if name == "malmen" and not args.quick else ()
            teacher = f"; teacher-forced {rate(scores, 'teacher.edit'):.3f} and {rate(scores, 'teacher.ood'):.3f}"
            numbers = {
                "edit": rate(scores, "edit"),
                "phrasings": rate(scores, "ood"),
                "agreement": rate(scores, *(f"agreement.{ring}" for ring in RINGS)),
                "loss": verdict.increase,
                "accuracy": rate(scores, *(f"accuracy.{ring}" for ring in RINGS)),
            }
            for i, (what, value) in enumerate(numbers.items()):
                goal = (("<=" if what == "loss" else ">="), goals[i]) if i < len(goals) else None
                emit(args, f"{name}, {n} facts: {what}", value, goal, told + (teacher if what == "edit" else ""))
            curves = kept(folder, name, points)
            report.write_picture(
                report.facts_chart(curves), f"{host.name}: success against the number of facts", "", folder / f"{model or 'neox'}.svg"
            )


if __name__ == "__main__":
    main()
