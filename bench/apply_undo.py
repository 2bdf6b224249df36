"""What it costs to put a patch on and take it off, against one copy of the tensors that it touches (paired, median of ratios).

On the lab's model, and on random weights of GPT-2's size, which no cache holds: there a copy costs what the memory gives, here it costs
next to nothing, so that the product of the factors of a low-rank op, 2 R flops for each weight, shows.
"""

import argparse
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


def gpt2_sized() -> hosts.Host:
    """GPT-2 of 124 M parameters, random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return hosts.host_of(GPT2LMHeadModel(GPT2Config()).eval(), hosts.load("lab/neox", device="cpu").tokenizer, "random GPT-2")


def dense(host: hosts.Host, name: str, draw: torch.Generator) -> Op:
    return Add(weight=name, delta=1e-3 * torch.randn(host.model.get_parameter(name).shape, generator=draw))


def low_rank(host: hosts.Host, name: str, draw: torch.Generator) -> Op:
    shape = host.model.get_parameter(name).shape
    turned = hosts.stored_transposed(host.model.get_submodule(name.removesuffix(".weight")))
    d_out, d_in = reversed(shape) if turned else shape
    return AddLowRank(weight=name, A=torch.randn(16, d_in, generator=draw), B=1e-3 * torch.randn(d_out, 16, generator=draw))


def measure(args: argparse.Namespace, host: hosts.Host, kind: str, ops: list[Op], rounds: int) -> None:
    patch = Patch(method="bench", config={}, parent=host.id, examples=(), ops=tuple(ops))
    touched = [host.model.get_parameter(op.weight).data for op in ops]
    patch_id = patch.id
    ratios = []
    for _ in range(rounds):
        copy = seconds(lambda: [t.clone() for t in touched])
        both = seconds(lambda: (apply.put_on(host, patch), apply.take_off(host)))
        ratios.append(both / copy)
    how = f"{rounds} pairs on {sum(t.numel() for t in touched) * 4 / 1e6:.1f} MB of float32; patch {patch_id[:11]}"
    emit(args, f"apply and undo / copy ({host.name}, {kind})", statistics.median(ratios), ("<=", 2.0), how)


def main() -> None:
    args = arguments(__doc__)
    draw = torch.Generator().manual_seed(args.seed)
    for host, rounds in ((hosts.load("lab/neox", device="cpu"), 200), (gpt2_sized(), 20)):
        every = [n for n, _ in host.model.named_parameters()]
        mlp = [f"{n}.weight" for n in host.module_names((*host.layout.mlp_in, host.layout.mlp_out))]
        rounds = rounds // 4 if args.quick else rounds
        measure(args, host, "every weight, dense", [dense(host, n, draw) for n in every], rounds)
        measure(args, host, "MLP weights, rank 16", [low_rank(host, n, draw) for n in mlp], rounds)


if __name__ == "__main__":
    main()
