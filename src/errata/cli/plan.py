"""What a build would take: seconds and bytes, from one small pass of the model forwards and backwards, before anything is started.

Nothing here is exact: the descent may stop at another length of text, and the gate may have to scale. It is meant to be right within a
factor of two, which is enough to know whether to wait for it.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from errata import hosts, text
from errata.cli.shown import table
from errata.hosts import Host
from errata.types import Example, InvalidExample, Method, Summed

COPIES = 5  # float32 each: the trained part, its gradient, momentum, running mean and best point
SAMPLED = (384, 96)  # documents that `text.sampled` draws where there is no reference text, and their tokens
# tokens, steps and documents, as in text.py, hosts.py and methods/
CHUNK, PREFIX, NEIGHBOUR, ANSWER, CHECK_EVERY, CHECKED, TRIED, PASS = 128, 40, 24, 12, 16, 1000, 600, 512


def estimate(host: Host, examples: Sequence[Example], made: Method, reference: Path | None) -> tuple[dict[str, Any], Table]:
    """The plan as data and as a table. Raises InvalidExample if there is nothing to build."""
    if not examples:
        raise InvalidExample("There are no examples to build from.")
    lengths = [len(hosts.encode(host, e.prompt, e.target)[0]) for e in examples]
    hold, judge, drawn = _texts(host, reference)
    speed = _speeds(host)
    config, trained = made.config, 0 if isinstance(made, Summed) else _trained(host, made)
    if not trained:  # rows, or keys of a memory, are one pass; what else its settings speak of is its preparation
        config = {"steps": 1, "batch_size": config.get("batch_size", 64), "contexts": config.get("restated", 0)}
    steps, contexts, near = (int(config.get(k, 0)) for k in ("steps", "contexts", "neighbours"))
    held_rows = int(config.get("hold", 0))

    task = sum(lengths) + contexts * PREFIX * len(lengths) // 2  # tokens that one step trains on
    batch = int(config.get("batch_size", 64))
    held = _batches(hold, held_rows, batch)
    longest = max(max(lengths) + contexts * PREFIX, max(hold, default=0))
    widest = max(longest, min(PASS, max([*held, min(batch, len(lengths)) * (max(lengths) + contexts * PREFIX)])))
    each = sum(hold) // max(1, len(hold))
    check = each * (min(len(hold) // 4, CHECKED) + min(len(hold), int(config.get("searched", 0)))) * (steps // CHECK_EVERY + 1)
    asked = each * TRIED * min(len(lengths), 10) if config.get("restated") else 0  # for each kind of prompt
    read = 2 * judge + check + asked + sum(held) * steps
    said = drawn + (near * NEIGHBOUR + 4 * ANSWER) * len(lengths)
    seconds = {
        "reading": read / speed["read"],
        "training": (task + sum(held)) * steps / speed["train"],
        "writing": said / speed["write"],
    }

    vocabulary = host.model.get_input_embeddings().num_embeddings
    memory = {
        "model": sum(p.numel() * p.element_size() for p in host.model.parameters()),
        "trained part": trained * 4 * COPIES,
        "activations": int(widest * (speed["saved"] + 16 * vocabulary)),  # 16: both sides' logits, the gradient of their KL, and of it
    }
    data = {
        "method": type(made).__name__.lower(),
        "examples": len(examples),
        "steps": steps,
        "trained": trained,
        "seconds": sum(seconds.values()),
        "seconds_by_part": seconds,
        "bytes": sum(memory.values()),
        "bytes_by_part": memory,
        "tokens_per_second": {k: speed[k] for k in ("read", "train", "write")},
    }
    rows = [("time", _clock(sum(seconds.values())), ", ".join(f"{k} {_clock(s)}" for k, s in seconds.items()))]
    rows += [("memory", _size(sum(memory.values())), ", ".join(f"{k} {_size(b)}" for k, b in memory.items()))]
    rows += [("speed", f"{speed['train']:.0f} tokens/s", f"training; reading {speed['read']:.0f}, writing {speed['write']:.0f}")]
    title = f"About {len(examples)} example(s), {steps} step(s), {trained:,} numbers trained, on {host.device}"
    return data, table("", "about", "of which", rows=rows, title=title)


def _texts(host: Host, reference: Path | None) -> tuple[list[int], int, int]:
    """Lengths of the documents to hold with, tokens of those to judge with, and how many have to be drawn from the model first."""
    n, length = SAMPLED
    if reference is None and not host.name.startswith("lab/"):
        return [length] * (n // 2), n // 2 * length, n * length
    hold, judge = text.standing(host, reference)
    longest = min(CHUNK, host.context)
    return [min(len(hosts.tokens(host, d)), longest) for d in hold], sum(len(hosts.tokens(host, d)) for d in judge), 0


def _batches(lengths: Sequence[int], rows: int, batch: int) -> list[int]:
    """Tokens, with their padding, of each batch of so many rows drawn evenly from documents of these lengths and sorted."""
    ranked = sorted(lengths)
    drawn = [ranked[i * len(ranked) // rows] for i in range(rows)]
    return [max(part) * len(part) for part in (drawn[i : i + batch] for i in range(0, rows, batch))]


def _trained(host: Host, made: Method) -> int:
    """How many numbers the method moves; where it does not say, no more than the model has."""
    says: Callable[[Host], int] | None = getattr(made, "trained", None)
    return says(host) if says else sum(p.numel() for p in host.model.parameters())


def _speeds(host: Host) -> dict[str, float]:
    """Tokens a second of a pass forwards, forwards and backwards, and of generation; and bytes that backwards keeps for each token."""
    width = min(32, host.context // 2)
    batch = hosts.pad(host, hosts.random_rows(host, 8, width))
    own = {t.data_ptr() for t in (*host.model.parameters(), *host.model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    def loss() -> Tensor:
        return hosts.scored_logprobs(host, batch).sum()

    def train() -> None:
        torch.autograd.grad(loss(), [p for p in host.model.parameters() if p.requires_grad], allow_unused=True)

    def read() -> None:
        with torch.no_grad():
            loss().item()

    def write() -> None:
        hosts.greedy(host, [host.tokenizer.decode(batch.ids_NT[0, :4])] * 8, max_new_tokens=8)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        train()
    tokens = batch.ids_NT.numel()
    return {"read": tokens / _time(read), "train": tokens / _time(train), "write": 64 / _time(write), "saved": sum(kept.values()) / tokens}


def _time(work: Callable[[], None]) -> float:
    """Seconds of the fastest of three runs: the first may still be warming up."""
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return min(spent)


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
