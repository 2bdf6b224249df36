"""Read or shift the activations of a named module, always inside `with`. When the block ends, the hooks are gone.

Nothing here knows a method; names are dotted paths as in `host.model.named_modules()`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def _first(value: Tensor | tuple[Any, ...]) -> Tensor:
    """Blocks of some architectures return a tuple whose first member is the hidden state; the others may be caches or None."""
    first: Tensor = value if isinstance(value, Tensor) else value[0]
    return first


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


def _with_first(value: Tensor | tuple[Any, ...], first: Tensor) -> object:
    return first if isinstance(value, Tensor) else (first, *value[1:])


@contextmanager
def _held(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reading(model: nn.Module, names: Sequence[str], inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the dictionary holds the latest output (or first input) of each module: (N, T, D).

    The tensors are the live ones, still part of the graph.
    """
    seen: dict[str, Tensor] = {}
    modules = {name: module(model, name) for name in names}  # all found before the first hook is set
    rows = _Rows(model)

    def keep(name: str) -> Callable[..., object]:
        def hook(_module: nn.Module, given: tuple[object, ...], named: dict[str, object], output: Tensor | tuple[Any, ...]) -> object:
            if inputs:
                seen[name] = rows.fold(_first_input(given, named))
                return None
            seen[name] = rows.fold(_first(output))
            # what was folded goes on from there, so that the loss still depends on what was read
            return None if seen[name] is _first(output) else _with_first(output, seen[name].flatten(0, 1))

        return hook

    with _held([rows.handle, *(m.register_forward_hook(keep(name), with_kwargs=True) for name, m in modules.items())]):
        yield seen


@contextmanager
def shifting(model: nn.Module, shifts: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside the block, the output of each named module, (N, T, D), is replaced by `shifts[name](output)`."""
    modules = {name: module(model, name) for name in shifts}  # all found before the first hook is set
    rows = _Rows(model)

    def turn(shift: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        def hook(_module: nn.Module, _given: object, output: Tensor | tuple[Any, ...]) -> object:
            fresh = shift(rows.fold(_first(output)))
            return _with_first(output, fresh.reshape(_first(output).shape))

        return hook

    with _held([rows.handle, *(m.register_forward_hook(turn(shifts[name])) for name, m in modules.items())]):
        yield
