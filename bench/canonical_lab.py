"""The protocol of canonical examples on the lab's models: tasks by methods for each ball, and whether the paper's order holds here.

Six tasks, three balls; for each method settings are searched on validation, chosen for each ball, and tested over seeds. What was done lies
in out/canonical-lab and is not done again: after a kill the same command goes on. The goal is the time of four methods on two cores, which
go first; it is told only by a run that begins in an empty folder. For a reader the whole tables are printed too. With --quick one task and
a few examples of it, one ball, the two methods that take least, one setting.
"""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from _bench import arguments, emit
from rich.console import Console

from errata import hosts, protocol
from errata.cli.edge import Out
from errata.cli.protocol import tables
from errata.protocol import Column, Plan

FOLDER = Path("out/canonical-lab")
MINUTES = 60.0
FOUR = ("finetune", "lora", "memit", "senses")  # each on the model that it is for, without subjects: what the goal is about
SEEDS = 2  # of the test edits
FEW = 6  # examples, records and hard negatives of a quick run


def columns() -> tuple[Column, ...]:
    """The columns that there are models for, those of `FOUR` first: a lab without a Backpack has no senses."""
    found = [Column(host="lab/backpack" if m == "senses" else "lab/neox", method=m) for m in FOUR]
    found += [Column(host="lab/neox", method="memit", subjects=True), Column(host="lab/neox", method="ensemble")]
    found += [Column(host="lab/backpack", method=m) for m in ("finetune", "lora")]
    backpack = (hosts.LAB_MODELS / "backpack").is_dir()
    return tuple(c for c in found if backpack or (c.host == "lab/neox" and c.method != "ensemble"))


def main() -> None:
    args = arguments(__doc__)
    asked = columns()
    if args.quick:
        asked = tuple(c for c in asked if c.method in ("memit", "senses") and not c.subjects)
    plan = Plan(columns=asked, seeds=SEEDS, seed=args.seed, device="cpu")
    if args.quick:
        plan = replace(plan, tasks=("gender",), epsilons=plan.epsilons[:1], trials=1, seeds=1, limit=FEW)
    workers = 1 if args.quick else min(2, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.quick else FOLDER
        fresh = not (folder / "search.db").exists()
        for some, goal in ((asked[: len(FOUR)], ("<=", MINUTES)), (asked, None)):
            if args.quick and goal is None:
                break
            start = time.perf_counter()
            found = protocol.run(replace(plan, columns=some), folder, workers, Out(json=args.json).progress)
            if fresh:
                what = "the protocol, minutes" if goal else "its other columns, minutes"
                how = f"{len(some)} columns by then, {len(plan.tasks)} task(s), {plan.trials} trial(s), {workers} process(es)"
                emit(args, what, (time.perf_counter() - start) / 60, None if args.quick else goal, how)
    for column in plan.columns:
        for epsilon in plan.epsilons:
            own = [f for f in found if f.column == column and f.epsilon == epsilon]
            value, low, high = protocol.estimate(own)
            hard = [h for f in own if (h := protocol.cell(f).hard_change) is not None]
            interval = "" if low is None else f"[{low:+.2f}, {high:+.2f}], behaviours redrawn; "
            near = f"hard negatives {sum(hard) / len(hard):+.3f} nats; " if hard else ""
            how = f"{interval}{near}{plan.trials} trials, {plan.seeds} seed(s), {len(own)} task(s)"
            emit(args, f"{column.host}, {column.label} at {epsilon:.0e}: success, points", value, None, how)
    if args.json:
        emit(args, protocol.order(found), None, None, "means over tasks; differences with the interval of redrawn behaviours")
    else:
        Console(highlight=False).print(*tables({plan.mode: found}), protocol.order(found), sep="\n", markup=False)


if __name__ == "__main__":
    main()
