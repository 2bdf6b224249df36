"""What it costs to put a patch on and take it off, against one copy of the tensors that it touches (paired, median of ratios)."""

import statistics
import time
from collections.abc import Callable

import torch
from _bench import arguments, emit

from errata import apply, hosts
from errata.types import Add, AddLowRank, Op, Patch


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    args = arguments(__doc__)
    host = hosts.load("lab/neox", device="cpu")
    draw = torch.Generator().manual_seed(args.seed)
    names = [n for n, p in host.model.named_parameters()]
    mlp = [f"{n}.weight" for n in host.module_names((*host.layout.mlp_in, host.layout.mlp_out))]

    def dense(name: str) -> Op:
        return Add(weight=name, delta=1e-3 * torch.randn(host.model.get_parameter(name).shape, generator=draw))

    def low_rank(name: str) -> Op:
        d_out, d_in = host.model.get_parameter(name).shape
        return AddLowRank(weight=name, A=torch.randn(16, d_in, generator=draw), B=1e-3 * torch.randn(d_out, 16, generator=draw))

    kinds = {"every weight, dense": [dense(n) for n in names], "MLP weights, rank 16": [low_rank(n) for n in mlp]}
    rounds = 30 if args.quick else 200
    for kind, ops in kinds.items():
        patch = Patch(method="bench", config={}, parent=host.id, examples=(), ops=tuple(ops))
        touched = [host.model.get_parameter(op.weight).data for op in ops]
        patch_id = patch.id
        ratios = []
        for _ in range(rounds):
            copy = seconds(lambda touched=touched: [t.clone() for t in touched])
            both = seconds(lambda patch=patch: (apply.put_on(host, patch), apply.take_off(host)))
            ratios.append(both / copy)
        how = f"{rounds} pairs on {sum(t.numel() for t in touched) * 4 / 1e6:.1f} MB of float32; patch {patch_id[:11]}"
        emit(args, f"apply and undo / copy ({kind})", statistics.median(ratios), ("<=", 2.0), how)


if __name__ == "__main__":
    main()
