"""Patch on, off, merged: the only file that changes what a host computes.

Edited tensor = f(base tensor, ops of every patch that is on), computed in float32, cast once. The base tensor's storage is never written:
a patch puts a new tensor in its place, and taking the patch off puts the old one back. So undo is exact and costs nothing, and putting on
costs one pass over the tensors that are touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from errata.hosts import Host, Worn, stored_transposed
from errata.types import Add, AddLowRank, InvalidPatch, Op, Patch, WrongBase


@torch.no_grad()
def put_on(host: Host, patch: Patch) -> None:
    """Put `patch` on top of what the host wears; `host.id` becomes `patch.id`. All of it or, on an error, nothing.

    Raises WrongBase if the patch was made for other weights, InvalidPatch if an op does not meet a parameter of its shape.
    """
    places = _places(host)
    targets = _checked(host, patch, places)
    below: dict[nn.Parameter, list[_Target]] = {}
    for target in (_target(op, places) for worn in host.worn for op in worn.patch.ops):
        below.setdefault(target.parameter, []).append(target)
    fresh = {t.parameter: _edited(host, t.parameter, [*below.get(t.parameter, ()), t]) for t in targets}
    replaced = {}
    for parameter, tensor in fresh.items():
        replaced[parameter], parameter.data = parameter.data, tensor
    host.worn.append(Worn(patch=patch, replaced=replaced))


def take_off(host: Host) -> Patch:
    """Take off the uppermost patch: its tensors are put back, bit for bit. Raises WrongBase if nothing is on."""
    if not host.worn:
        raise WrongBase(f"{host.name} wears no patch; there is nothing to take off.")
    worn = host.worn.pop()
    for parameter, tensor in worn.replaced.items():
        parameter.data = tensor
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
    _checked(host, patch, _places(host))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Target:
    """An op and the parameter that it changes. `turned`: the architecture stores that as (in, out)."""

    op: Op
    parameter: nn.Parameter
    turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the op's change has in the orientation of the parameter."""
        match self.op:
            case Add():
                return tuple(self.op.delta.shape)
            case AddLowRank():
                out_in = (self.op.B.shape[0], self.op.A.shape[1])
                return out_in[::-1] if self.turned else out_in


_Places = dict[str, tuple[nn.Parameter, nn.Module]]


def _places(host: Host) -> _Places:
    """Every name of every parameter -> it and the module that it stands in. A tied one has several names, and an op may use any.

    One walk: to look up each op's parameter and module by name takes as long as to copy a small weight.
    """
    return {
        f"{path}.{name}" if path else name: (parameter, module)
        for path, module in host.model.named_modules(remove_duplicate=False)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _target(op: Op, places: _Places) -> _Target:
    parameter, module = places[op.weight]
    return _Target(op=op, parameter=parameter, turned=isinstance(op, AddLowRank) and stored_transposed(module))


def _checked(host: Host, patch: Patch, places: _Places) -> list[_Target]:
    """What the ops of `patch` change, in their order."""
    if patch.parent != host.id:
        on = f" with {len(host.worn)} patch(es) on" if host.worn else ""
        raise WrongBase(
            f"Patch {patch.id} was made for weights {patch.parent}; {host.name}{on} has {host.id}. "
            f"Load the model that it was made for, or build it again from its examples."
        )
    met, targets = dict[nn.Parameter, str](), list[_Target]()
    for op in patch.ops:
        if op.weight not in places:
            raise InvalidPatch(f"Patch {patch.id} changes '{op.weight}', which {host.name} does not have.")
        target = _target(op, places)
        if (other := met.setdefault(target.parameter, op.weight)) != op.weight:
            raise InvalidPatch(f"Patch {patch.id} changes '{other}' and '{op.weight}', which are one tied tensor in {host.name}.")
        if (shape := target.shape) != (stored := tuple(target.parameter.shape)):
            raise InvalidPatch(f"Patch {patch.id} changes '{op.weight}' as {shape}, in {host.name} it is {stored}.")
        targets.append(target)
    return targets


def _base(host: Host, parameter: nn.Parameter) -> Tensor:
    """The tensor that stands in this place while the host wears nothing."""
    return next((w.replaced[parameter] for w in host.worn if parameter in w.replaced), parameter.data)


def _edited(host: Host, parameter: nn.Parameter, targets: list[_Target]) -> Tensor:
    """A new tensor: the base's under the ops of `targets`, in order, in float32 until the one cast at the end."""
    base = _base(host, parameter)
    value, fresh = base.float(), base.dtype != torch.float32  # of float32 it is the base itself, which is never written
    for target in targets:
        value, fresh = _plus(value, target, out=value if fresh else None), True
    return value.to(base.dtype)


def _plus(value: Tensor, target: _Target, out: Tensor | None = None) -> Tensor:
    """`value` (float32) with one op added: in `out`, which may be `value` itself, or in a new tensor."""
    match op := target.op:
        case Add():
            return torch.add(value, op.delta.to(value.device), out=out)
        case AddLowRank():
            A, B = op.A.to(value.device), op.B.to(value.device)
            left, right = (A.T, B.T) if target.turned else (B, A)
            return torch.addmm(value, left, right, alpha=op.scale, out=out)


@torch.no_grad()
def change(host: Host, op: Op) -> Tensor:
    """What the op adds, float32, in the shape and orientation of the parameter."""
    target = _target(op, _places(host))
    zero = torch.zeros(target.parameter.shape, device=target.parameter.device)
    return _plus(zero, target, out=zero)


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
    places = _places(host)
    held = sum(float(_base(host, places[op.weight][0]).double().square().sum()) for op in patch.ops)
    return (moved / held) ** 0.5 if held else 0.0
