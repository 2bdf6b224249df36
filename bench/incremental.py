"""One more example where 4,096 are there, and where 128 are: from the sums that stayed to the new patch, and one less.

The sums of the first n facts are made once and go through a file, as in a ledger. Then: read them, take the rows of one more example,
add, solve, make the patch: one round of `malmen`, whose rows depend on no other example. No budget is looked at (`held` = 0); what the
gate reads does not depend on the method, and is not counted. With the rounds that `malmen` takes by default all examples are read again.
What it has learnt does not matter: one step. Seconds are by the clock; the two are compared by their processor time, in turns.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from _bench import arguments, emit

from errata import hosts, methods, text
from errata.lab import tasks
from errata.ledger import Ledger
from errata.types import Budget, Run


def main() -> None:
    args = arguments(__doc__)
    host = hosts.load("lab/neox", device="cpu")
    hold = text.standing(host)[0][:400]
    made = methods.make("malmen", steps=1, least=4, most=4, held=0, rounds=1)
    run = Run(hold=hold, state=made.prepare(host, tasks.cases("train", 64, seed=args.seed), Run(hold=hold)))
    sizes = (128, 512) if args.quick else (128, 4096)
    examples = tuple(tasks.example(fact) for fact in tasks.choose(("test", "validation"), sizes[-1] + 1, seed=args.seed))

    def seconds(ledger: Ledger, now: int) -> tuple[float, float]:
        """By the clock, and of processor time."""
        start, busy = time.perf_counter(), time.process_time()
        keep = partial(ledger.put_aside, name="sums")
        made.edit(host, examples[:now], replace(run, sums=ledger.aside("sums"), keep=keep))
        return time.perf_counter() - start, time.process_time() - busy

    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in sizes]
        ledgers = [stack.enter_context(Ledger.create(folder / "ledger", host.id, host.name, Budget())) for folder in folders]
        for ledger, n in zip(ledgers, sizes, strict=True):
            seconds(ledger, n)
        turns = range(3 if args.quick else 7)
        took = [[(seconds(ledger, n + 1), seconds(ledger, n)) for ledger, n in zip(ledgers, sizes, strict=True)] for _ in turns]
    for i, n in enumerate(sizes):
        more, less = (statistics.median(turn[i][j][0] for turn in took) for j in (0, 1))
        goal = ("<=", 2.0) if n == 4096 else None
        emit(args, f"one more example beside {n} (s)", more, goal, f"one round, no budget; median of {len(took)}; one less {less:.2f} s")
    ratio = statistics.median(turn[1][0][1] / turn[0][0][1] for turn in took)
    busy = "; ".join(f"{n}: {statistics.median(turn[i][0][1] for turn in took):.3f} s" for i, n in enumerate(sizes))
    emit(args, "the same beside many / beside 128", ratio, ("<=", 1.0), f"processor time, median of {len(took)} pairs; {busy}")


if __name__ == "__main__":
    main()
