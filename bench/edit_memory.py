"""The peak memory of an edit of 4,096 facts against that of 128: rows are not kept, so it should not grow with the facts.

How far the resident memory rises above what it is with the model, the facts and the learnt state there, while the first `edit` makes the
patch (no budget is looked at, `held` = 0), in a process of its own; the median of three. (Behind another edit that of 128 facts takes
nothing that is not there already.) Beside it the peak of the whole process. `malmen` takes two rounds, however many the facts are: the
second reads all of them again and what text has lost, and so do all others. What was learnt does not matter: one step of it. --only
chooses methods.

Once as it is, and once with what is freed given back to the system: glibc keeps ever larger pieces of what was freed, unless
MALLOC_MMAP_THRESHOLD_ says from what size on it does not. Elsewhere both are the same.
"""

import os
import statistics

from _bench import arguments, emit
from build_memory import apart, loaded, resident, restart

THRESHOLD, LARGE = "MALLOC_MMAP_THRESHOLD_", 128 << 10  # bytes: it begins there; said, it stays


def of_edit(method: str, n: int, seed: int) -> tuple[int, int]:
    """Bytes that an edit of n facts adds at its peak, and that the process has then."""
    from errata import methods, text
    from errata.lab import tasks
    from errata.methods import malmen
    from errata.types import Run

    malmen.MOST = 2
    host, _ = loaded()
    hold = text.standing(host)[0][:400]
    settings = {"held": 0} if method == "ultraedit" else {"steps": 1, "least": 4, "most": 4}
    made = methods.make(method, **settings | ({"held": 0, "rounds": 2} if method == "malmen" else {}))
    state = made.prepare(host, tasks.cases("train", 64, seed=seed), Run(hold=hold))
    examples = tuple(tasks.example(fact) for fact in tasks.choose(("test", "validation"), n, seed=seed))
    before = restart()
    made.edit(host, examples, Run(hold=hold, state=state))
    return resident("VmHWM") - before, resident("VmHWM")


def main() -> None:
    args = arguments(__doc__)
    few, many = (128, 512) if args.quick else (128, 4096)
    for method in args.only.split(",") if args.only else ("malmen", "mend", "ultraedit"):
        for how, setting in (("", {}), (", what is freed given back", {THRESHOLD: str(LARGE)})):
            os.environ.pop(THRESHOLD, None)
            os.environ |= setting  # the processes that are begun have it
            runs = [apart(args, of_edit, method, n, args.seed) for n in (few, many)]
            for what, i in (("an edit", 0), ("a process that edits", 1)):
                small, large = (statistics.median(run[i] for run in own) for own in runs)
                emit(
                    args,
                    f"peak memory of {what}, {many} facts / {few} ({method}{how})",
                    large / small,
                    ("<=", 1.1) if method == "malmen" else None,
                    f"{large / 1e6:.0f} MB against {small / 1e6:.0f} MB",
                )


if __name__ == "__main__":
    main()
