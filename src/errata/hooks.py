"""Read, shift or skip the activations of a named module, always inside `with`. When the block ends, the hooks are gone.

Nothing here knows a method; names are dotted paths as in `host.model.named_modules()`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.types import UnknownName


def module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`. Raises UnknownName with the nearest name there is."""
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        raise UnknownName.among("module", name, [n for n, _ in model.named_modules() if n]) from e


@final
class _Enough(Exception):
    """Ends a pass of which no more is needed; no caller sees it."""


def first(value: Tensor | tuple[Any, ...]) -> Tensor:
    """Blocks of some architectures return a tuple whose first member is the hidden state; the others may be caches or None."""
    hidden: Tensor = value if isinstance(value, Tensor) else value[0]
    return hidden


def _first_input(given: tuple[object, ...], named: dict[str, object]) -> Tensor:
    """Attention is called with `hidden_states=` in some architectures and by position in others."""
    return next(value for value in (*given, *named.values()) if isinstance(value, Tensor))


@final
class _Rows:
    """How many texts and tokens the model is reading. OPT's MLP sees them in one row after the other, (N T, D) for (N, T, D)."""

    def __init__(self, model: nn.Module) -> None:
        self.shape: tuple[int, ...] = ()
        self.handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _model: nn.Module, given: tuple[object, ...], named: dict[str, object]) -> None:
        self.shape = tuple(_first_input(given, named).shape[:2])

    def fold(self, x: Tensor) -> Tensor:
        flat = x.ndim == 2 and len(self.shape) == 2 and len(x) == math.prod(self.shape)
        return x.reshape(*self.shape, x.shape[1]) if flat else x


def with_first(value: Tensor | tuple[Any, ...], hidden: Tensor) -> Tensor | tuple[Any, ...]:
    """`value`, what a block returned, with another hidden state."""
    return hidden if isinstance(value, Tensor) else (hidden, *value[1:])


@contextmanager
def _held(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reading(model: nn.Module, names: Sequence[str], inputs: bool = False, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the dictionary holds the latest output (or first input) of each module: (N, T, D).

    The tensors are the live ones, still part of the graph. `stop`: the block ends as soon as each module was seen.
    """
    seen: dict[str, Tensor] = {}
    modules = {name: module(model, name) for name in names}  # all found before the first hook is set
    rows = _Rows(model)

    def keep(name: str) -> Callable[..., object]:
        def hook(_module: nn.Module, given: tuple[object, ...], named: dict[str, object], output: Tensor | tuple[Any, ...]) -> object:
            if inputs:
                seen[name] = rows.fold(_first_input(given, named))
                if stop and len(seen) == len(modules):
                    raise _Enough
                return None
            seen[name] = rows.fold(first(output))
            if stop and len(seen) == len(modules):
                raise _Enough
            # what was folded goes on from there, so that the loss still depends on what was read
            return None if seen[name] is first(output) else with_first(output, seen[name].flatten(0, 1))

        return hook

    with _held([rows.handle, *(m.register_forward_hook(keep(name), with_kwargs=True) for name, m in modules.items())]):
        with suppress(_Enough):
            yield seen


@contextmanager
def recording(model: nn.Module, name: str) -> Iterator[list[Any]]:
    """Runs the model up to the module: the list holds its whole output as it came, and the block ends there."""
    kept: list[Any] = []

    def hook(_module: nn.Module, _given: object, output: object) -> None:
        kept.append(output)
        raise _Enough

    with _held([module(model, name).register_forward_hook(hook)]), suppress(_Enough):
        yield kept


@contextmanager
def skipping(model: nn.Module, names: Sequence[str], output: object) -> Iterator[None]:
    """Inside the block the named modules compute nothing and give back `output`: with the first blocks of a model, and what `recording`
    found behind the last of them, a pass begins there."""
    modules = [module(model, name) for name in names]
    own = [m.__dict__.get("forward") for m in modules]
    try:
        for m in modules:
            m.__dict__["forward"] = lambda *_given, **_named: output
        yield
    finally:
        for m, forward in zip(modules, own, strict=True):
            if forward is None:
                del m.__dict__["forward"]
            else:
                m.__dict__["forward"] = forward


@contextmanager
def looking_at(model: nn.Module, name: str, place_NP: Tensor) -> Iterator[None]:
    """Inside the block the named module, which takes each token by itself, sees (N, P) places of the texts alone, (N, P, D) of (N, T, D),
    and gives zeros elsewhere."""
    lengths: list[int] = []

    def pick(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_NTD, *others = given
        lengths.append(x_NTD.shape[1])
        return x_NTD.take_along_dim(place_NP.to(x_NTD.device).unsqueeze(-1), dim=1), *others

    def put(_module: nn.Module, _given: object, y_NPD: Tensor) -> Tensor:
        out_NTD = y_NPD.new_zeros(len(y_NPD), lengths.pop(), y_NPD.shape[-1])
        return out_NTD.scatter(1, place_NP.to(y_NPD.device).unsqueeze(-1).expand_as(y_NPD), y_NPD)

    looked_at = module(model, name)
    with _held([looked_at.register_forward_pre_hook(pick), looked_at.register_forward_hook(put)]):
        yield


@contextmanager
def changing(model: nn.Module, changes: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
    """Inside the block, the output of each named module, (N, T, D), is replaced by `changes[name](input, output)`."""
    modules = {name: module(model, name) for name in changes}  # all found before the first hook is set
    rows = _Rows(model)

    def turn(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., object]:
        def hook(_module: nn.Module, given: tuple[object, ...], named: dict[str, object], output: Tensor | tuple[Any, ...]) -> object:
            fresh = change(rows.fold(_first_input(given, named)), rows.fold(first(output)))
            return with_first(output, fresh.reshape(first(output).shape))

        return hook

    with _held([rows.handle, *(m.register_forward_hook(turn(changes[name]), with_kwargs=True) for name, m in modules.items())]):
        yield


@contextmanager
def shifting(model: nn.Module, shifts: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside the block, the output of each named module, (N, T, D), is replaced by `shifts[name](output)`."""

    def turn(shift: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda _given, output: shift(output)

    with changing(model, {name: turn(shift) for name, shift in shifts.items()}):
        yield
