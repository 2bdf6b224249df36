"""malmen at the size of GPT-J: seconds and peak memory of an edit and of one step of meta-training, each part against its floor.

Random weights (what they say does not matter for time): 28 blocks of width 4,096 in bfloat16, the last projections of the last six MLPs,
8,192 facts in an edit and in a step of meta-training, where there is a GPU; elsewhere 8 blocks of width 256 in float32 and 512 facts, with
--quick 64. The lab has fewer cases than that: the others say the same with more before it. Peaks are counted from where each begins.

    rows       keys and value gradients, forwards and back   floor: the same texts through `bench/edit_floor.py`'s lean pass
    network    the hypernetwork on all rows                  floor: its matrix products alone
    solve      the sums and their solution                   floor: one product K^T K and one Cholesky factor of it, of the same size
               (rows are those that count: two of each text)
    model      of a step: its losses with S in the weights, forwards and back   floor: the lean pass over as many of its texts

Of the step "the rest" is what no part names: Adam, and what it draws. The network goes forwards twice in it and back once, its floor
likewise. Rows are taken in each step, as of a model this large they are: none are remembered. No budget is looked at (`held` = 0),
no other phrasings are sought (`restated` = 0), and one round is taken: a further one takes all of it again, and the gradient of what text
has lost.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from _bench import arguments, emit
from build_memory import resident, restart
from edit_floor import floor
from transformers import GPTJConfig, GPTJForCausalLM

from errata import hosts, methods
from errata.hosts import Host
from errata.lab import tasks
from errata.methods import _gradients, _hyper, _keys, _meta, _normal
from errata.types import Case, Run

LARGE = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "n_positions": 2048}
SMALL = {"n_embd": 256, "n_layer": 8, "n_head": 8, "rotary_dim": 16, "n_positions": 256}
EDITED = 6


def main() -> None:
    args = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = device == "cuda" and not args.quick
    n = 8192 if large else 64 if args.quick else 512
    host = random_host(LARGE if large else SMALL, device, torch.bfloat16 if large else torch.float32)
    modules = host.module_names((host.layout.mlp_out,), range(host.blocks - EDITED, host.blocks))
    examples = tuple(case.example for case in cases(n, args.seed))
    hold = tuple(f"{e.prompt}{e.target}." for e in examples[:400])
    learning = cases(n + n // 8 + 2, args.seed)  # a share of them validates
    size = {"least": n, "most": n} | ({"near": 8, "hold": 4, "asked": 1} if args.quick else {})
    _meta.REMEMBERED = 0
    made = methods.make("malmen", modules=",".join(modules), held=0, restated=0, rounds=1, steps=1, **size)
    about = f"{n} facts, {EDITED} modules of {host.model.get_parameter(f'{modules[0]}.weight').numel() / 1e6:.1f} M weights, {device}"

    forget_peak(device)
    with clocked(device) as spent, stepping(device, spent) as step:
        start = seconds(device)
        state = made.prepare(host, learning, Run(hold=hold, seed=args.seed))
        whole = seconds(device) - start
    assert state is not None
    told = ", ".join(f"{k} {v:.2f} s" for k, v in spent.items())
    emit(args, "meta-training of one step, with what comes before and after it (s)", whole, None, f"{len(learning)} cases; {told}; {about}")
    emit(args, "the same, peak memory (MB)", peak_mb(device), None, "of the process, or of the GPU's allocator")
    against_floors(args, "a step", step, state, host, modules, examples, asked=made.config["asked"])
    emit(args, "a step: the rest (s)", step["whole"] - sum(v for k, v in step.items() if k != "whole"), None, f"of {step['whole']:.2f} s")

    run = Run(hold=hold, state=state, seed=args.seed)
    made.edit(host, examples[:16], run)
    forget_peak(device)
    with clocked(device) as spent:
        start = seconds(device)
        made.edit(host, examples, run)
        whole = seconds(device) - start
    emit(args, "an edit (s)", whole, None, about)
    emit(args, "the same, peak memory (MB)", peak_mb(device), None, "of the process, or of the GPU's allocator")
    against_floors(args, "an edit", spent, state, host, modules, examples)


def cases(n: int, seed: int) -> list[Case]:
    """So many cases: those of the lab, and again with more before their prompts. What they say does not matter."""
    known = tasks.cases("train", min(n, 1984), seed=seed)

    def again(case: Case, times: int) -> Case:
        return replace(case, example=replace(case.example, prompt=f"Told {times} times: {case.example.prompt}", subject=None))

    return [again(known[i % len(known)], i // len(known)) if i >= len(known) else known[i] for i in range(n)]


def against_floors(args, what: str, spent: dict[str, float], state: Any, host: Host, modules: list[str], examples, asked: int = 0) -> None:
    """Each part of what was spent on the examples, beside the least that it can cost; with `asked` prompts of each, the losses too."""
    texts = (len(hosts.encode(host, e.prompt, e.target)[0]) - 1 for e in examples)  # a row at every token that something follows
    rows = sum(min(n, state.config["per_text"] or n) for n in texts)
    least = {
        "rows": lambda: floor(host, examples, modules),
        "network": lambda: [products(state, host, modules, rows) for _ in range(4 if asked else 1)],  # back is twice forwards
        "solve": lambda: solutions(state, host, modules, rows),
    }
    if asked:
        least["model"] = lambda: [floor(host, examples, modules) for _ in range(asked)]
    for part, work in least.items():
        start = seconds(str(host.device.type))
        work()
        lean, own = seconds(str(host.device.type)) - start, spent[part] + spent.get(f"{part} backwards", 0.0)
        emit(args, f"{what}: {part} / its floor", own / lean, None, f"{own:.2f} s against {lean:.2f} s; {rows} rows")


@contextmanager
def stepping(device: str, spent: dict[str, float]) -> Iterator[dict[str, float]]:
    """What is spent inside one step alone, and in it as a whole."""
    found: dict[str, float] = {}
    stepped = _meta.School.stepped

    def timed(self: _meta.School, point: _meta.Point) -> _meta.Point:
        before, start = dict(spent), seconds(device)
        try:
            return stepped(self, point)
        finally:
            found.update({part: spent[part] - before[part] for part in spent} | {"whole": seconds(device) - start})

    _meta.School.stepped = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        _meta.School.stepped = stepped  # type: ignore[method-assign]


def random_host(size: dict[str, int], device: str, dtype: torch.dtype) -> Host:
    """A GPT-J that has learnt nothing, with the lab's tokenizer."""
    tokenizer = hosts.load("lab/neox", device="cpu").tokenizer
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **size))
    finally:
        torch.set_default_dtype(torch.float32)
    return hosts.host_of(model, tokenizer, "a random GPT-J")


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        restart()


def peak_mb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM") / 2**20


def seconds(device: str) -> float:
    """Now, when everything that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def clocked(device: str) -> Iterator[dict[str, float]]:
    """Seconds spent in each part, while inside."""
    parts = [
        ("rows", _gradients, "taken"), ("rows", _gradients, "gathered"), ("network", _hyper, "differences"), ("solve", _normal, "of"),
        ("solve", _normal, "grown"), ("solve", _normal, "solve"), ("solve backwards", _normal, "backward"), ("model", _meta, "measured"),
        ("C", _keys, "covariances"), ("network backwards", _hyper, "pull"),
    ]  # fmt: skip
    spent = {part: 0.0 for part, *_ in parts}
    were: list[tuple[Any, str, Callable[..., Any]]] = []

    running = list[str]()

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **more: Any) -> Any:
            if running:  # what is done within a part is counted there
                return work(*given, **more)
            running.append(part)
            start = seconds(device)
            try:
                return work(*given, **more)
            finally:
                running.pop()
                spent[part] += seconds(device) - start

        return wrapped

    for part, module, name in parts:
        were.append((module, name, getattr(module, name)))
        setattr(module, name, timed(part, were[-1][2]))
    try:
        yield spent
    finally:
        for module, name, work in were:
            setattr(module, name, work)


def products(state: Any, host: Host, modules: list[str], rows: int) -> None:
    """The matrix products of the network on so many rows, for each module."""
    for module in modules:
        k, v = _meta.widths_of(state)[module]
        A, B = (state.tensors[f"net/{k}x{v}/{name}"].to(host.device) for name in ("A0", "B0"))
        x = torch.randn(rows, k + v, device=host.device)
        for _ in range(_hyper.BLOCKS):
            x = x @ A @ B


def solutions(state: Any, host: Host, modules: list[str], rows: int) -> None:
    """The Gram matrix of the rows or of their coordinates, whichever is smaller, and its factor."""
    for module in modules:
        k, _ = _meta.widths_of(state)[module]
        X = torch.randn(rows, k, device=host.device, dtype=torch.float64)
        small = X.T @ X if k <= rows else X @ X.T
        torch.linalg.cholesky(small + small.diagonal().mean() * torch.eye(len(small), device=host.device, dtype=torch.float64))


if __name__ == "__main__":
    main()
