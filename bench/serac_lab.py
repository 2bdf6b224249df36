"""SERAC on the lab beside what it is compared with: edit success ES and drawdown DD on its four tasks.

    qa, qa-hard   lab/t5 answers questions          fc   lab/bert judges claims          convsent   lab/neox has opinions

`serac` and `rp` learn from training cases once for each task's model, `mend`, `enn` and `ke` likewise; what they learnt stays in
`out/serac_lab`, under the folder where the script is called. SERAC is judged at 1 to 1,024 records; the others beside it at ten, the
published number (five for convsent). One record is 32 memories of one each. Facts of the test split alone are edited. Of more than 128
edits a sample of 128 is asked about.
The main numbers are of free generation; teacher-forced ones, which are the published measures, stand beside them. --only names tasks, or
task/method. One picture of each task is drawn in the same folder.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _bench import arguments, emit

from errata import drawdown, evaluate, hosts, methods, report, text
from errata.hosts import Host
from errata.lab import scope
from errata.ledger import Ledger
from errata.types import Budget, Example, LedgerError, Run, ScopeCase, State

HOSTS = {"qa": "lab/t5", "qa-hard": "lab/t5", "fc": "lab/bert", "convsent": "lab/neox"}
SIZES = (1, 16, 128, 512, 1024)
MOST = {"convsent": 14}  # topics that the test split has
TOGETHER = {"qa": 10, "qa-hard": 10, "fc": 10, "convsent": 5}
GOALS = {("qa", "es"): (">=", 0.97), ("qa", "dd"): ("<=", 0.01), ("qa-hard", "es"): (">=", 0.90)}
COMPARED = ("serac", "lu", "rp", "eren", "grace", "finetune", "mend", "enn", "ke")
READER: dict[str, Any] = {"rank": 0, "lr": 1e-3, "steps": 2500, "every": 250}
COPYING = {"lr": 1e-3, "steps": 6000, "patience": 32}  # a T5 has to learn to say names that it has never seen
SCOPE = {"scope_steps": 1600}
SETTINGS: dict[str, dict[str, Any]] = {"serac": READER | SCOPE, "rp": SCOPE, "eren": READER}
CURVES = ("serac", "lu", "rp")  # those that hold any number
ASKED = 128
ALONE = 32  # memories of one record each, whose questions count together: one alone is asked fifteen things
LEARNT_FROM = 1300  # of the training split: what is out of their scope are the others


def settings_of(host: Host, method: str) -> dict[str, Any]:
    return SETTINGS.get(method, {}) | (COPYING if host.kind == "seq2seq" and method in ("serac", "eren") else {})


def prepared(host: Host, method: str, cases: Sequence[ScopeCase], run: Run, folder: Path, quick: bool) -> State | None:
    """What the method has learnt about the host from the cases: from the folder, or now."""
    short = {"steps": 4, "every": 2, "scope_steps": 20} if quick else {}
    settings = settings_of(host, method) | {k: v for k, v in short.items() if k in methods.make(method).config}
    made = methods.make(method, **settings)
    try:
        ledger = Ledger(folder)
    except LedgerError:
        ledger = Ledger.create(folder, host.id, host.name, Budget())
    with ledger:
        known = ledger.latest_state(method)
        if known is not None:
            return known
        given: Sequence[Any] = cases if method in ("serac", "rp", "eren") else [c.case for c in cases]
        state = made.prepare(host, given, run)
        if state is not None:
            ledger.put_state(state)
    return state


def edited(host: Host, method: str, examples: tuple[Example, ...], run: Run) -> tuple[Any, float]:
    start = time.perf_counter()
    patch = methods.make(method, **settings_of(host, method)).edit(host, examples, run)
    return patch, time.perf_counter() - start


def as_facts(scores: evaluate.Scores) -> evaluate.Scores:
    """ES as unseen text that is right, and 1 - DD as neighbours that are kept, which is how a curve of many facts is drawn."""
    es, dd = ("z.opinion", "dd") if any(r.measure == "z.opinion" for r in scores.rows) else ("es", "dd")
    right = [replace(r, measure="ood") for r in scores.rows if r.measure == es]
    kept = [replace(r, measure="neighbours", total=r.count - r.total) for r in scores.rows if r.measure == dd]
    return replace(scores, rows=(*right, *kept))


def main() -> None:
    args = arguments(__doc__)
    root = Path("out/serac_lab") / ("quick" if args.quick else "whole")
    for task, name in HOSTS.items():
        wanted = [m for m in COMPARED if args.only is None or {task, f"{task}/{m}"} & set(args.only.split(","))]
        if not wanted or (args.quick and args.only is None and task != "qa"):
            continue
        host = hosts.load(name, device="cpu")
        hold, _ = text.standing(host)
        split = 64 if task == "convsent" else 60 if args.quick else LEARNT_FROM
        learning = scope.scope_cases("qa-hard" if task == "qa" else task, "train", split, seed=args.seed)
        for method in ("serac", "lu") if args.quick and args.only is None else wanted:
            start = time.process_time()
            run = Run(hold=hold, seed=args.seed)
            if type(methods.make(method)).prepare is not methods.Method.prepare:
                run = replace(run, state=prepared(host, method, learning, run, root / f"{name.replace('/', '-')}-{task[:2]}", args.quick))
            learnt = time.process_time() - start
            points: list[tuple[int, evaluate.Scores]] = []
            sizes = (
                (4,) if args.quick else SIZES if method == "serac" else (TOGETHER[task], 1024) if method in CURVES else (TOGETHER[task],)
            )
            for n in dict.fromkeys(min(n, MOST.get(task, n)) for n in sizes):
                cases = scope.scope_cases(task, "test", n if n > 1 else min(ALONE, MOST.get(task, ALONE)), seed=args.seed)
                found, seconds = [], 0.0
                for edits in [[c] for c in cases] if n == 1 else [cases]:
                    patch, took = edited(host, method, tuple(c.example for c in edits), run)
                    told = drawdown.before(host, edits[:ASKED])
                    found.append(drawdown.judge(host, patch, told, state=run.state))
                    seconds += took
                scores = replace(found[-1], rows=tuple(row for one in found for row in one.rows))
                points.append((n, scores))
                how = f"edited in {seconds:.1f} s, learnt in {learnt / 60:.1f} minutes of processor time"
                for measure in ("es", "dd", "es.teacher", "dd.teacher", "es.hard", "dd.hard", "z.opinion", "kl.outside"):
                    if any(row.measure == measure and row.count for row in scores.rows):
                        rate = evaluate.aggregate(scores, measure)
                        goal = GOALS.get((task, measure)) if method == "serac" and not args.quick else None
                        emit(args, f"{task}, {method}, {n} records: {measure}", rate.value, goal, f"n = {rate.n}; {how}")
            keep(root, task, method, points)


def keep(root: Path, task: str, method: str, points: Sequence[tuple[int, evaluate.Scores]]) -> None:
    """The points of a method, beside those of others that have been measured, and the picture of them all."""
    root.mkdir(parents=True, exist_ok=True)
    kept = root / f"{task}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    known[method] = [[n, replace(s, answers=()).as_dict()] for n, s in points]
    kept.write_text(json.dumps(known))
    drawn = {m: [(n, as_facts(evaluate.Scores.from_dict(raw))) for n, raw in points] for m, points in known.items()}
    title = f"{task}: in scope right (solid) and out of scope unchanged (dashed) against the number of records"
    report.write_picture(report.facts_chart(drawn), title, "", root / f"{task}.svg")


if __name__ == "__main__":
    main()
