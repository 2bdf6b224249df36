"""One more example where 4,096 are there, and where 128 are: from the sums that stayed to the new patch, and one less.

The sums of the first n facts are made once and go through a file, as in a ledger. Then: read them, take the rows of one more example,
add, solve, make the patch: one round of `malmen`, whose rows depend on no other example. No budget is looked at (`held` = 0); what the
gate reads does not depend on the method, and is not counted. What `malmen` has learnt does not matter: one step of it.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from _bench import arguments, emit

from errata import hosts, methods, text
from errata.lab import tasks
from errata.ledger import Ledger
from errata.types import Budget, Run, State


def main() -> None:
    args = arguments(__doc__)
    host = hosts.load("lab/neox", device="cpu")
    hold = text.standing(host)[0][:400]
    made = methods.make("malmen", steps=1, least=4, most=4, held=0, rounds=1)
    run = Run(hold=hold, state=made.prepare(host, tasks.cases("train", 64, seed=args.seed), Run(hold=hold)))
    taken: dict[int, float] = {}
    for n in (128, 512) if args.quick else (128, 4096):
        examples = tuple(tasks.example(fact) for fact in tasks.choose(("test", "validation"), n + 1, seed=args.seed))
        with tempfile.TemporaryDirectory() as folder, Ledger.create(Path(folder) / "ledger", host.id, host.name, Budget()) as ledger:

            def keep(sums: State, ledger: Ledger = ledger) -> None:
                ledger.put_aside(sums, "sums")

            def seconds(now: int, ledger: Ledger = ledger) -> float:
                start = time.perf_counter()
                made.edit(host, examples[:now], replace(run, sums=ledger.aside("sums"), keep=keep))  # noqa: B023
                return time.perf_counter() - start

            seconds(n)
            more, less = zip(*((seconds(n + 1), seconds(n)) for _ in range(3 if args.quick else 7)), strict=True)
        taken[n] = statistics.median(more)
        goal = ("<=", 2.0) if n == 4096 else None
        emit(args, f"one more example beside {n} (s)", taken[n], goal, f"median of {len(more)}; one less {statistics.median(less):.2f} s")
    few, many = taken.values()
    emit(args, "the same beside many / beside 128", many / few, ("<=", 1.25), "; ".join(f"{n}: {s:.3f} s" for n, s in taken.items()))


if __name__ == "__main__":
    main()
