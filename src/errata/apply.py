"""Patch on, off, merged: the only file that changes what a host computes.

Edited tensor = f(base tensor, ops of every patch that is on), computed in float32, cast once. The base tensor's storage is never written:
a patch puts a new tensor in its place, and taking the patch off puts the old one back. So undo is exact and costs nothing, and putting on
costs one pass over the tensors that are touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from errata.hosts import Host, Worn, stored_transposed
from errata.types import Add, AddLowRank, InvalidPatch, Op, Patch, WrongBase


@torch.no_grad()
def put_on(host: Host, patch: Patch) -> None:
    """Put `patch` on top of what the host wears; `host.id` becomes `patch.id`. All of it or, on an error, nothing.

    Raises WrongBase if the patch was made for other weights, InvalidPatch if an op does not meet a parameter of its shape.
    """
    check(host, patch)
    own = _own_names(host)
    below: dict[str, list[Op]] = {}
    for worn in host.worn:
        for op in worn.patch.ops:
            below.setdefault(own[op.weight], []).append(op)
    fresh = {own[op.weight]: _edited(host, own[op.weight], [*below.get(own[op.weight], ()), op]) for op in patch.ops}
    replaced = {}
    for weight, tensor in fresh.items():
        parameter = host.model.get_parameter(weight)
        replaced[weight], parameter.data = parameter.data, tensor
    host.worn.append(Worn(patch=patch, replaced=replaced))


def take_off(host: Host) -> Patch:
    """Take off the uppermost patch: its tensors are put back, bit for bit. Raises WrongBase if nothing is on."""
    if not host.worn:
        raise WrongBase(f"{host.name} wears no patch; there is nothing to take off.")
    worn = host.worn.pop()
    for weight, tensor in worn.replaced.items():
        host.model.get_parameter(weight).data = tensor
    return worn.patch


@contextmanager
def applied(host: Host, *patches: Patch) -> Iterator[Host]:
    """The host with `patches` on inside the block, and exactly as it was afterwards, also when the body raises."""
    depth = len(host.worn)
    try:
        for patch in patches:
            put_on(host, patch)
        yield host
    finally:
        while len(host.worn) > depth:
            take_off(host)


def check(host: Host, patch: Patch) -> None:
    """Raises WrongBase or InvalidPatch exactly when `put_on` would."""
    if patch.parent != host.id:
        on = f" with {len(host.worn)} patch(es) on" if host.worn else ""
        raise WrongBase(
            f"Patch {patch.id} was made for weights {patch.parent}; {host.name}{on} has {host.id}. "
            f"Load the model that it was made for, or build it again from its examples."
        )
    own, met = _own_names(host), dict[str, str]()
    for op in patch.ops:
        if op.weight not in own:
            raise InvalidPatch(f"Patch {patch.id} changes '{op.weight}', which {host.name} does not have.")
        if (other := met.setdefault(own[op.weight], op.weight)) != op.weight:
            raise InvalidPatch(f"Patch {patch.id} changes '{other}' and '{op.weight}', which are one tied tensor in {host.name}.")
        parameter = host.model.get_parameter(op.weight)
        if (shape := _shape(host, op)) != tuple(parameter.shape):
            raise InvalidPatch(f"Patch {patch.id} changes '{op.weight}' as {shape}, in {host.name} it is {tuple(parameter.shape)}.")


def _own_names(host: Host) -> dict[str, str]:
    """Every name of every parameter -> the name under which its tensor is kept; a tied one has several, and an op may use any."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in host.model.named_parameters(remove_duplicate=False)}


def _base(host: Host, own_name: str) -> Tensor:
    """The tensor that stands in this place while the host wears nothing."""
    return next((w.replaced[own_name] for w in host.worn if own_name in w.replaced), host.model.get_parameter(own_name).data)


def _module(host: Host, weight: str) -> nn.Module:
    found: nn.Module = host.model.get_submodule(weight.rpartition(".")[0])
    return found


def _shape(host: Host, op: Op) -> tuple[int, ...]:
    """The shape that the op's change has in the orientation of the parameter."""
    match op:
        case Add():
            return tuple(op.delta.shape)
        case AddLowRank():
            out_in = (op.B.shape[0], op.A.shape[1])
            return out_in[::-1] if stored_transposed(_module(host, op.weight)) else out_in


def _edited(host: Host, own_name: str, ops: list[Op]) -> Tensor:
    """A new tensor: the base's under `ops`, in order, in float32 until the one cast at the end."""
    value = base = _base(host, own_name)
    for op in ops:
        value = _plus(host, value.float(), op)
    return value.to(base.dtype)


def _plus(host: Host, value: Tensor, op: Op) -> Tensor:
    """`value` (float32) with one op added, out of place."""
    match op:
        case Add():
            return value + op.delta.to(value.device)
        case AddLowRank():
            A, B = op.A.to(value.device), op.B.to(value.device)
            if stored_transposed(_module(host, op.weight)):
                return torch.addmm(value, A.T, B.T, alpha=op.scale)
            return torch.addmm(value, B, A, alpha=op.scale)


@torch.no_grad()
def change(host: Host, op: Op) -> Tensor:
    """What the op adds, float32, in the shape and orientation of the parameter."""
    parameter = host.model.get_parameter(op.weight)
    return _plus(host, torch.zeros(parameter.shape, device=parameter.device), op)


def scaled(patch: Patch, scale: float) -> Patch:
    """base + scale * change: the same patch pulled towards the base (0) or left as it is (1)."""
    if scale == 1.0:
        return patch
    ops: list[Op] = []
    for op in patch.ops:
        match op:
            case Add():
                ops.append(Add(weight=op.weight, delta=op.delta * scale))
            case AddLowRank():
                ops.append(AddLowRank(weight=op.weight, A=op.A, B=op.B, scale=op.scale * scale))
    return Patch(method=patch.method, config=dict(patch.config), parent=patch.parent, examples=patch.examples, ops=tuple(ops))


@torch.no_grad()
def relative_norm(host: Host, patch: Patch) -> float:
    """||change|| / ||weight|| (Frobenius) over all touched weights together. The patch may be on or off; the base counts."""
    moved = sum(float(change(host, op).double().square().sum()) for op in patch.ops)
    own = _own_names(host)
    held = sum(float(_base(host, own[op.weight]).double().square().sum()) for op in patch.ops)
    return (moved / held) ** 0.5 if held else 0.0
