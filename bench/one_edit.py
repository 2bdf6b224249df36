"""One edit with lora on the lab model, from example to verdict, and the peak memory of a build against its parts."""

import statistics
import time

from _bench import arguments, emit

import errata
from errata.lab import tasks


def main() -> None:
    args = arguments(__doc__)
    host = errata.load("lab/neox", device="cpu")
    cases = tasks.cases("test", 3 if args.quick else 9, "wrong", seed=args.seed)
    times, fixed, passed = [], 0, 0
    for case in cases:
        start = time.perf_counter()
        _, verdict = errata.edit(host, [case.example], method="lora", seed=args.seed)
        times.append(time.perf_counter() - start)
        fixed += verdict.fixed
        passed += verdict.passed
    how = f"median of {len(times)} wrong test facts, one at a time, epsilon 1e-3, model already loaded; slowest {max(times):.1f} s"
    emit(args, "one edit with lora, example to verdict (s)", statistics.median(times), ("<=", 5.0), how)
    emit(args, "one edit with lora: share fixed", fixed / len(times), None, "greedy, on the example's own prompt")
    emit(args, "one edit with lora: share passed", passed / len(times), None, "verdict of the gate")


if __name__ == "__main__":
    main()
