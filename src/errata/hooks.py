"""Read or shift the activations of a named module, always inside `with`. When the block ends, the hooks are gone.

Nothing here knows a method; names are dotted paths as in `host.model.named_modules()`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.types import UnknownName


def module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`. Raises UnknownName with the nearest name there is."""
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        raise UnknownName.among("module", name, [n for n, _ in model.named_modules() if n]) from e


def _first(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Blocks of some architectures return a tuple whose first member is the hidden state."""
    return value if isinstance(value, Tensor) else value[0]


def _first_input(given: tuple[object, ...], named: dict[str, object]) -> Tensor:
    """Attention is called with `hidden_states=` in some architectures and by position in others."""
    return next(value for value in (*given, *named.values()) if isinstance(value, Tensor))


@contextmanager
def _held(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reading(model: nn.Module, names: Sequence[str], inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the dictionary holds the latest output (or first input) of each module: (N, T, D) as the module saw it.

    The tensors are the live ones, still part of the graph.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[object, ...], named: dict[str, object], output: Tensor) -> None:
            seen[name] = _first_input(given, named) if inputs else _first(output)

        return hook

    modules = {name: module(model, name) for name in names}  # all found before the first hook is set
    with _held([m.register_forward_hook(keep(name), with_kwargs=True) for name, m in modules.items()]):
        yield seen


@contextmanager
def shifting(model: nn.Module, shifts: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside the block, the output of each named module is replaced by `shifts[name](output)`."""

    def turn(shift: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        def hook(_module: nn.Module, _given: object, output: Tensor | tuple[Tensor, ...]) -> object:
            fresh = shift(_first(output))
            return fresh if isinstance(output, Tensor) else (fresh, *output[1:])

        return hook

    modules = {name: module(model, name) for name in shifts}  # all found before the first hook is set
    with _held([m.register_forward_hook(turn(shifts[name])) for name, m in modules.items()]):
        yield
