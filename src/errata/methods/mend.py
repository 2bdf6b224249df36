"""mend: a hypernetwork turns the rank-one factors of each token's gradient into those of an edit, and the edits are summed.

    S_m = -eta_m sum_i k^_i g^_i^T                                  Mitchell et al. 2022, arXiv 2110.11309, section 3

k^ and g^ are what the network (`_hyper.py`) makes of a module's inputs and of its outputs' gradients, here at all tokens of the example; it
learns from training cases (`_meta.py`), by plain autograd through the sum. `malmen` merges the same factors by least squares, so that
the edits of many examples do not add up to more than any of them asked for.

Unlike mend@e04fdb9 the step goes down the gradient, as in serac@c963a39 (there: up, until eta has learnt to be negative). For what else
differs, and for `faithful`, see `_hyper.py`, `_meta.py` and `malmen`: the gradients are sums (there: means), the rank is 256 (there:
1,920), the rates are 1e-4 and 3e-2 (there: 1e-6, and 1e-4 for eta), and eta begins where the first edits have a sensible size. `faithful`
has the blocks of malmen@1df295d (in mend@e04fdb9 scale and shift stand inside the clamp), its first eta of 1e-6 (there: 1e-4), its modules
and its gradients cut at 1 (there: 100), with the rates and the weight of neighbours of mend@e04fdb9.

File legend: N rows, K key width, V value width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata.hosts import Host
from errata.methods import _gradients, _hyper, _meta
from errata.methods._hyper import Net
from errata.methods._meta import Lesson, Merging, Pull
from errata.methods._products import Products
from errata.types import Case, Example, InvalidExample, Method, Patch, Rows, Run, State

FAITHFUL = {"rank": 1920, "lr": 1e-6, "rate": 1e-4, "asked": 1, "near_weight": 10.0, "hold_weight": 0.0}
FIXED = ("tokens", "faithful")


@final
@dataclass(frozen=True, kw_only=True)
class Mend(Method):
    """modules, tokens, chunk: as in `malmen`. rank: of the network's blocks. share: first length of the edits,
    as a share of the module's outputs. The rest: `_meta.Settings`. It is made for few examples at once; `most` says how many."""

    spreads: ClassVar[bool] = True

    modules: str = ""
    tokens: str = "all"
    chunk: int = 1024
    rank: int = 256
    lam: float = 1.0
    share: float = 0.5
    steps: int = 400
    lr: float = 1e-4
    rate: float = 3e-2
    least: int = 1
    most: int = 16
    asked: int = 2
    near: int = 32
    near_weight: float = 1.0
    hold: int = 16
    hold_weight: float = 10.0
    every: int = 20
    patience: int = 6
    clip: float = 1.0
    batch_size: int = 64
    faithful: bool = False

    def __post_init__(self) -> None:
        if self.tokens not in ("answer", "all"):
            raise InvalidExample(f'mend takes the tokens "answer" or "all", got {self.tokens!r}.')
        _meta.as_published(self, FAITHFUL | {"least": self.most})
        _meta.check("mend", self.config)

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The network. Raises InvalidExample, UnknownName."""
        modules = _meta.modules_of(host, self.modules, upper=self.faithful)
        learning = partial(
            Merging,
            rows=lambda examples: self._rows(host, examples, modules, run),
            moved=lambda net, module, keys_NK, g_NV: keys_NK @ self._sum(net, module, keys_NK, g_NV).to(keys_NK),
            merge=self._merge,
            rank=self.rank,
            lam=self.lam,
            share=self.share,
        )
        lesson = Lesson(name="mend", modules=modules, learning=learning, config=self.config, tensors={})
        return _meta.learnt(host, lesson, tuple(train_cases), run, _meta.settings_of(self.config))

    def rows(self, host: Host, examples: tuple[Example, ...], run: Run) -> tuple[Rows, ...]:
        """Keys and value gradients of each example. Raises UnknownName, WrongBase or InvalidExample for a state that does not serve."""
        state, _ = _meta.known(self, "mend", host, run.state, FIXED)
        return self._rows(host, examples, state.config["modules"], run)

    def solve(self, host: Host, rows: tuple[Rows, ...], run: Run) -> Patch:
        """The sum of all the rows' edits, in whatever order. Raises WrongBase for rows of other weights."""
        return self._summed(host, tuple(r.example for r in rows), _gradients.in_order(host, rows), run)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """`solve` of the `rows`, of which only some are in memory at once."""
        return self._summed(host, examples, (self.rows(host, some, run) for some in _gradients.some(examples)), run)

    def _summed(self, host: Host, examples: tuple[Example, ...], rows: Iterable[Sequence[Rows]], run: Run) -> Patch:
        state, net = _meta.known(self, "mend", host, run.state, FIXED)
        products = Products()
        for part in rows:
            for module, both in _gradients.together(host, part, state.config["modules"], self._batch()).items():
                with torch.no_grad():
                    k_NK, g_NV = _hyper.factors(net, module, *both)
                    products.add(module, k_NK, -_hyper.eta(net, module) * g_NV)
        config = self.config | {"state": state.id}
        return Patch(method="mend", config=config, parent=host.id, examples=examples, ops=products.ops(host))

    def _batch(self) -> int | None:
        return self.batch_size if self.faithful else None

    def _rows(self, host: Host, examples: tuple[Example, ...], modules: Sequence[str], run: Run) -> tuple[Rows, ...]:
        return _gradients.rows(host, examples, modules, self.batch_size, run.progress, self.tokens == "all", spread=run.spread)

    @torch.no_grad()
    def _sum(self, net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]) -> Float[Tensor, "K V"]:
        return sum((shift(net, module, *part) for part in self._parts(keys_NK, g_NV)), torch.zeros(()))

    def _parts(self, keys_NK: Tensor, g_NV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time."""
        return zip(torch.split(keys_NK, self.chunk), torch.split(g_NV, self.chunk), strict=True)

    def _merge(self, net: Net, module: str, keys_NK: Tensor, g_NV: Tensor) -> tuple[Tensor, Pull]:
        def pull(grad_KV: Tensor) -> None:
            for part in self._parts(keys_NK, g_NV):
                S_KV = shift(net, module, *part)
                (S_KV * grad_KV.to(S_KV)).sum().backward()  # type: ignore[no-untyped-call]

        return self._sum(net, module, keys_NK, g_NV), pull


def shift(net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]) -> Float[Tensor, "K V"]:
    """(K, V) S of these rows, with the graph."""
    k_NK, g_NV = _hyper.factors(net, module, keys_NK, g_NV)
    return -_hyper.eta(net, module) * k_NK.T @ g_NV
