"""The peak memory of a build against the sum of its parts: the model, what is kept for the trained part, and one reference batch.

    measured   bytes of the model + how far the resident memory rises above what it is with the model loaded and one text read,
               while `errata.edit` runs from examples to verdict, in a process of its own
    bound      bytes of the model in float32
               + 5 copies of the trained part in float32: itself, its gradient, NovoGrad's momentum, the running mean, the best point
               + one reference batch: how far one forward and backward pass over `batch_size` rows of the holding text (the loss of every
                 token) raises the resident memory at its peak, in a process of its own

The allocator keeps what was freed, so each number is the median of three processes. With --quick it is one process and fewer steps, and no
goal is judged: memory grows with the steps.
"""

import argparse
import os
import resource
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _bench import arguments, emit

from errata import methods

STEPS, QUICK = 10, 4  # the constraint is checked once; what the allocator keeps grows with more of them (docs/log.md)


def resident(field: str) -> int:
    """Bytes: VmRSS is what this process holds, VmHWM the most that it held. Not `ru_maxrss` on Linux, which outlives an exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(f"{field}:"))


def restart() -> int:
    """The resident memory now; from here on its peak is counted anew."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def loaded() -> tuple[Any, int]:
    """The lab's host, and the resident memory once it has read a text."""
    import torch

    from errata import hosts

    host = hosts.load("lab/neox", device="cpu")
    with torch.no_grad():
        hosts.logits(host, hosts.pad(host, [hosts.encode(host, "The capital of Mauritius is", " Port Louis")]))
    return host, restart()


def of_build(method: str, steps: int, seed: int) -> tuple[int, int, int]:
    """Bytes that a build adds at its peak, of the model, and of one copy of the trained part."""
    import errata
    from errata.lab import tasks

    examples = [case.example for case in tasks.cases("test", 5, "wrong", seed=seed)]
    host, before = loaded()
    patch, _ = errata.edit(host, examples, method, seed=seed, steps=steps)
    return resident("VmHWM") - before, sum(p.numel() * p.element_size() for p in host.model.parameters()), patch.nbytes


def of_batch(rows: int, seed: int) -> int:
    """Bytes that one forward and backward pass over `rows` rows of the holding text adds at its peak."""
    import random

    import torch

    from errata import hosts, text

    host, before = loaded()
    drawn = random.Random(seed).sample(hosts.chunks(host, text.standing(host)[0]), k=rows)
    weights = [p for p in host.model.parameters() if p.requires_grad]
    torch.autograd.grad(-hosts.scored_logprobs(host, hosts.pad(host, drawn)).sum(), weights)
    return resident("VmHWM") - before


def apart(args: argparse.Namespace, measure: Callable[..., Any], *given: object) -> list[Any]:
    """What `measure(*given)` returns in one fresh process after another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return [pool.submit(measure, *given).result() for _ in range(1 if args.quick else 3)]


def main() -> None:
    args = arguments(__doc__)
    steps = QUICK if args.quick else STEPS
    for method in ("finetune", "lora"):
        rows = methods.make(method).config["batch_size"]
        builds = apart(args, of_build, method, steps, args.seed)
        added, (_, model, trained) = statistics.median(b[0] for b in builds), builds[0]
        batch = statistics.median(apart(args, of_batch, rows, args.seed))
        bound = model + 5 * trained + batch
        parts = f"model {model / 1e6:.0f}, trained part 5 x {trained / 1e6:.1f}, a batch of {rows} rows {batch / 1e6:.0f}"
        how = f"{(model + added) / 1e6:.0f} MB against {bound / 1e6:.0f} MB: {parts}; {steps} steps, median of {len(builds)}"
        emit(args, f"peak memory of a build / its parts ({method})", (model + added) / bound, None if args.quick else ("<=", 1.0), how)


if __name__ == "__main__":
    main()
