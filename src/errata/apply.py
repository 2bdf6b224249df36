"""Patch on, off, merged: the only file that changes what a host computes.

Edited tensor = f(base tensor, ops of every patch that is on), computed in float32, cast once. The base tensor's storage is never written:
a patch puts a new tensor in its place, and taking the patch off puts the old one back. So undo is exact and costs nothing, and putting on
costs one pass over the tensors that are touched. A Backpack's table of shifted senses is treated like a tensor: shifts are rows of it.
An ensemble changes no tensor: a small model reads along and adds to the logits, through hooks that go when the patch does. Neither does an
edit memory: it answers in the model's place where one of its examples is concerned (`memory/route.py`), until it is taken off.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata import hosts
from errata.hosts import Host, Worn, senses_of, stored_transposed
from errata.memory import activations
from errata.memory.route import Propose, Router
from errata.types import (
    Add,
    AddLowRank,
    Ensemble,
    InvalidExample,
    InvalidPatch,
    Memory,
    Op,
    Patch,
    Senses,
    UnknownArchitecture,
    WrongBase,
)


@torch.no_grad()
def put_on(host: Host, patch: Patch, propose: Propose | None = None) -> None:
    """Put `patch` on top of what the host wears; `host.id` becomes `patch.id`. All of it or, on an error, nothing. `propose` finds what a
    memory looks up elsewhere than in the patch (`memory/live.py`).

    Raises WrongBase if the patch was made for other weights, InvalidPatch if an op does not meet a parameter of its shape, and what
    `hosts.beside` raises.
    """
    places = _places(host)
    targets = _checked(host, patch, places)
    below: dict[nn.Parameter, list[_Target]] = {}
    for target in (_target(op, places) for worn in host.worn for op in worn.patch.ops if isinstance(op, Add | AddLowRank)):
        below.setdefault(target.parameter, []).append(target)
    fresh = {t.parameter: _edited(host, t.parameter, [*below.get(t.parameter, ()), t]) for t in targets}
    shifts = [op for p in (*(worn.patch for worn in host.worn), patch) for op in p.ops if isinstance(op, Senses)]
    table = _shifted(_base_table(host), shifts) if any(isinstance(op, Senses) for op in patch.ops) else None
    spoken = tuple(handle for op in patch.ops if isinstance(op, Ensemble) for handle in _Beside(host, op, patch.id).handles)
    routers = tuple(Router(host, op, patch.examples, patch.id, propose) for op in patch.ops if isinstance(op, Memory))
    replaced = {}
    for parameter, tensor in fresh.items():
        replaced[parameter], parameter.data = parameter.data, tensor
    table = table and _put_table(host, table)
    host.worn.append(Worn(patch=patch, replaced=replaced, table=table, hooks=spoken, speakers=routers))


def take_off(host: Host) -> Patch:
    """Take off the uppermost patch: its tensors are put back, bit for bit. Raises WrongBase if nothing is on."""
    if not host.worn:
        raise WrongBase(f"{host.name} wears no patch; there is nothing to take off.")
    worn = host.worn.pop()
    for parameter, tensor in worn.replaced.items():
        parameter.data = tensor
    if worn.table is not None:
        _put_table(host, worn.table)
    for handle in worn.hooks:
        handle.remove()
    for speaker in worn.speakers:
        speaker.remove()
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
    """Raises exactly what `put_on` would."""
    _checked(host, patch, _places(host))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Target:
    """An op and the parameter that it changes. `turned`: the architecture stores that as (in, out)."""

    op: Add | AddLowRank
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


def _target(op: Add | AddLowRank, places: _Places) -> _Target:
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
        if isinstance(op, Senses):
            _check_shifts(host, patch, op)
            continue
        if isinstance(op, Ensemble):
            _check_beside(host, patch, op)
            continue
        if isinstance(op, Memory):
            if op.weight != host.layout.head:
                raise InvalidPatch(f"Patch {patch.id} answers for '{op.weight}', in {host.name} the logits come from '{host.layout.head}'.")
            _check_activations(host, patch, op)
            continue
        if op.weight not in places:
            raise InvalidPatch(f"Patch {patch.id} changes '{op.weight}', which {host.name} does not have.")
        target = _target(op, places)
        if target.parameter.is_meta:
            raise WrongBase(
                f"Patch {patch.id} changes '{op.weight}', which {host.name} keeps elsewhere and reads when it is used: it cannot be put on "
                f"there. Load the model with a device map in which that module is on a device, or whole."
            )
        if (other := met.setdefault(target.parameter, op.weight)) != op.weight:
            raise InvalidPatch(f"Patch {patch.id} changes '{other}' and '{op.weight}', which are one tied tensor in {host.name}.")
        if (shape := target.shape) != (stored := tuple(target.parameter.shape)):
            raise InvalidPatch(f"Patch {patch.id} changes '{op.weight}' as {shape}, in {host.name} it is {stored}.")
        targets.append(target)
    return targets


def _check_shifts(host: Host, patch: Patch, op: Senses) -> None:
    try:
        name = senses_of(host)
    except UnknownArchitecture as e:
        raise InvalidPatch(f"Patch {patch.id} shifts sense vectors. {e}") from e
    if op.weight != name:
        raise InvalidPatch(f"Patch {patch.id} shifts '{op.weight}', in {host.name} the sense vectors are '{name}'.")
    V, K, D = (int(getattr(host.model.config, n)) for n in ("vocab_size", "num_senses", "n_embd"))
    highest = (int(op.ids.max()), int(op.senses.max())) if len(op.ids) else (0, 0)
    if highest[0] >= V or highest[1] >= K or op.shift.shape[1] != D:
        raise InvalidPatch(
            f"Patch {patch.id} shifts '{op.weight}' up to token {highest[0]} and sense {highest[1]} by vectors of {op.shift.shape[1]}; "
            f"{host.name} has {V} tokens with {K} senses of {D}."
        )


def _check_beside(host: Host, patch: Patch, op: Ensemble) -> None:
    if op.weight != host.layout.head:
        raise InvalidPatch(f"Patch {patch.id} adds to '{op.weight}', in {host.name} the logits come from '{host.layout.head}'.")
    small = hosts.beside(host, op.small)
    if small.id != op.parent:
        raise WrongBase(
            f"Patch {patch.id} shifts senses of a small model with the weights {op.parent}; {op.small} has {small.id}. "
            f"Put the small model that it was made with into `host.beside[{op.small!r}]`, or build it again from its examples."
        )
    _check_shifts(small, patch, op.shift)


def _check_activations(host: Host, patch: Patch, op: Memory) -> None:
    there = dict(host.model.named_modules())
    if missing := [m for m in [*([op.reads] if op.reads else []), *activations.modules(op.parts)] if m not in there]:
        raise InvalidPatch(f"Patch {patch.id} changes what comes out of '{missing[0]}', which {host.name} does not have.")


_Table = tuple[Tensor, Tensor, Tensor]  # ids (R,), senses (R, K, D), keep (R, K), as in `models.backpack.Overrides`


def _table(host: Host) -> _Table:
    kept = host.model.get_submodule(host.layout.senses)
    return kept.ids, kept.senses, kept.keep


def _put_table(host: Host, table: _Table) -> _Table:
    """The table is `table` from now on; returns what it was."""
    old = _table(host)
    host.model.get_submodule(host.layout.senses).put(*table)
    return old


def _base_table(host: Host) -> _Table:
    """The table that stands there while the host wears nothing."""
    return next((worn.table for worn in host.worn if worn.table is not None), None) or _table(host)


def _shifted(table: _Table, shifts: Sequence[Senses]) -> _Table:
    """A new table: `table` and all shifts, summed in float32 and cast once. A token that was not in it keeps what the network gives."""
    ids_R, senses_RKD, keep_RK = table
    place = {token: r for r, token in enumerate(ids_R.tolist())}
    for token in (token for op in shifts for token in op.ids.tolist()):
        place.setdefault(token, len(place))
    more = len(place) - len(ids_R)
    sum_RKD = torch.cat([senses_RKD.float(), senses_RKD.new_zeros(more, *senses_RKD.shape[1:], dtype=torch.float32)])
    for op in shifts:
        rows = torch.tensor([place[token] for token in op.ids.tolist()], dtype=torch.long)
        sum_RKD.index_put_((rows.to(sum_RKD.device), op.senses.to(sum_RKD.device)), op.shift.to(sum_RKD.device), accumulate=True)
    new_ids_R = torch.tensor(list(place), dtype=ids_R.dtype, device=ids_R.device)
    return new_ids_R, sum_RKD.to(senses_RKD.dtype), torch.cat([keep_RK, keep_RK.new_ones(more, keep_RK.shape[1])])


def _base_senses(host: Host, op: Senses) -> Tensor:
    """(M, D) the vectors that `op` shifts, as they are while the host wears nothing."""
    worn = {parameter: parameter.data for w in host.worn for parameter in w.replaced}
    table = _put_table(host, _base_table(host))
    try:
        for parameter in worn:
            parameter.data = _base(host, parameter)
        ids_M, senses_M = op.ids.to(host.device), op.senses.to(host.device)
        base_MD: Tensor = host.model.senses(ids_M)[torch.arange(len(ids_M), device=host.device), senses_M]
        return base_MD
    finally:
        for parameter, tensor in worn.items():
            parameter.data = tensor
        _put_table(host, table)


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


@final
class _Beside:
    """Hooks on a large model through which a small one speaks, until the `handles` are removed.

    The small model reads the tokens of each pass before the large one does. What it has to add goes into the head beside the large one's
    hidden states, as more columns, and is taken out again before the head multiplies: so whoever picks positions in between, such as
    `hosts.predictions`, picks those of both. Where a cache is used, the small model's layers stand in the large one's, behind its own: what
    reorders or crops that does it to both. They are marked with the id of the patch: its shifts are in them.
    """

    def __init__(self, host: Host, op: Ensemble, patch: str) -> None:
        self.op, self.patch, self.small, self.head = op, patch, hosts.beside(host, op.small), host.model.get_submodule(host.layout.head)
        self.common = min(len(host.tokenizer), len(self.small.tokenizer))  # tokens; beyond them stand what only one has, and nothing
        self.E_VD = self.small.model.get_submodule(self.small.layout.head).weight.detach()[: self.common]
        self.parameters = list(signature(host.model.forward).parameters)
        self.cache: Any = None
        self.passing: list[RemovableHandle] = []
        self.handles = (
            host.model.register_forward_pre_hook(self._before, with_kwargs=True),
            host.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    def _before(self, model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        said = dict(zip(self.parameters, given, strict=False)) | named
        ids_NT, cache = said.get("input_ids"), said.get("past_key_values")
        if ids_NT is None:
            raise InvalidExample(f"Patch {self.patch} lets {self.small.name} read along, and it reads tokens: give input_ids.")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past + ids_NT.shape[1] > self.small.context:
            raise InvalidExample(
                f"A text of {past + ids_NT.shape[1]} tokens is too long for patch {self.patch}: {self.small.name}, which reads along, "
                f"reads at most {self.small.context}."
            )
        added_NTD = hosts.spoken_by(self.small, self.op.shift, ids_NT, said.get("attention_mask"), self._read_so_far(model, said, past))
        if added_NTD is None:
            return
        kept = said.get("logits_to_keep", 0)
        added_NTD = added_NTD[:, slice(-kept, None) if isinstance(kept, int) else kept]

        dtype = torch.float32

        def join(_head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal dtype
            dtype = given[0].dtype  # joined they are in the better of the two, and come back bit for bit
            return (torch.cat([given[0], added_NTD.to(given[0].device)], dim=-1), *given[1:])

        def part(_head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            width = given[0].shape[-1] - self.E_VD.shape[1]
            self.added = given[0][..., width:].detach().to(self.E_VD)
            return (given[0][..., :width].to(dtype), *given[1:])

        def add(_head: nn.Module, _given: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            more = (self.op.scale * (self.added @ self.E_VD.T)).to(logits.device)
            spoken = logits[..., : self.common] + more  # in float32 or better, cast once
            return torch.cat([spoken.to(logits.dtype), logits[..., self.common :]], dim=-1)

        self.passing = [
            self.head.register_forward_pre_hook(join, prepend=True),
            self.head.register_forward_pre_hook(part),
            self.head.register_forward_hook(add, prepend=True),
        ]

    def _read_so_far(self, model: Any, said: dict[str, Any], past: int) -> Any:
        """The small model's cache for this pass; None where the large one uses none."""
        from transformers.cache_utils import DynamicCache

        cache: Any = said.get("past_key_values")
        uses = said.get("use_cache")
        self.cache = DynamicCache() if cache is not None or (model.config.use_cache if uses is None else uses) else None
        if past:
            self.cache.layers = [layer for layer in cache.layers if getattr(layer, "patch", None) == self.patch]
            if not self.cache.layers:
                raise WrongBase(f"The cache was filled before patch {self.patch} was put on. Read the text again, without that cache.")
        return self.cache

    def _after(self, _model: nn.Module, _given: tuple[Any, ...], named: dict[str, Any], said: Any) -> None:
        while self.passing:
            self.passing.pop().remove()
        cache = getattr(said, "past_key_values", None)
        if self.cache is not None and cache is not None and not any(layer in cache.layers for layer in self.cache.layers):
            for layer in self.cache.layers:
                layer.patch = self.patch
            cache.layers.extend(self.cache.layers)
        self.cache = None


@torch.no_grad()
def change(host: Host, op: Op) -> Tensor:
    """What the op adds, float32, in the shape and orientation of the parameter; of senses only those that it shifts, (M, D), of an
    ensemble those of the small model, as much as they count, and of a memory, which adds nothing, what it looks up, and what it has for the
    activations behind it, in one row."""
    if isinstance(op, Memory):
        kept = [op.vectors, *(t for t in op.parts.values() if t.is_floating_point())]
        return (torch.cat([t.flatten() for t in kept]) if len(kept) > 1 else op.vectors).to(host.device)
    if isinstance(op, Ensemble):
        return op.scale * op.shift.shift.to(host.device)
    if isinstance(op, Senses):
        return op.shift.to(host.device)
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
            case Senses():
                ops.append(replace(op, shift=op.shift * scale))
            case Ensemble() | Memory():
                ops.append(replace(op, scale=op.scale * scale))
    return Patch(method=patch.method, config=dict(patch.config), parent=patch.parent, examples=patch.examples, ops=tuple(ops))


@torch.no_grad()
def relative_norm(host: Host, patch: Patch) -> float:
    """||change|| / ||weight|| (Frobenius) over all touched weights or senses together; 0.0 if none is. The patch may be on or off; the base
    counts."""

    def base(op: Op) -> Tensor:
        match op:
            case Ensemble():
                return _base_senses(hosts.beside(host, op.small), op.shift)
            case Senses():
                return _base_senses(host, op)
            case _:
                return _base(host, places[op.weight][0])

    changes = [op for op in patch.ops if not isinstance(op, Memory)]
    moved = sum(float(change(host, op).double().square().sum()) for op in changes)
    places = _places(host)
    held = sum(float(base(op).double().square().sum()) for op in changes)
    return (moved / held) ** 0.5 if held else 0.0
