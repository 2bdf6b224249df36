"""rome: rewrite one layer's MLP so that the key of each fact gives exactly its value, and other text's keys change as little as can be.

    W' = W + (V - W K) (K^T C^-1 K)^-1 K^T C^-1           for one fact W + (v - W k) (C^-1 k)^T / (k^T C^-1 k)
                          Meng et al. 2022, arXiv 2202.05262, equation 2; for several Gupta et al. 2024, arXiv 2403.14236

Among all W' with W' K = V this one has the least E[|W' k - W k|^2] over text. Several facts are constraints of one problem, not of one
after the other: the last of a sequence would break those before it, and their order would count. Keys that are nearly the same leave that
problem without a tame solution, so with several facts `slack` times the mean of k^T C^-1 k is added to the diagonal of K^T C^-1 K.

V and the layer are found as in `memit`. Unlike the ROME in memit@80426fd one key, the mean over the prefixes, is used throughout (there: in
C^-1 k alone; Gupta et al. 2024, arXiv 2403.07175), the shift is of the block's output, and C is not left out for any model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from errata.hosts import Host
from errata.methods import _keys
from errata.methods._normal import Prior
from errata.types import Case, Example, InvalidExample, Method, Patch, Run, State, forget


@final
@dataclass(frozen=True, kw_only=True)
class Rome(Method):
    """layers: the one layer; empty: found by tracing. The rest: as in `memit`."""

    spreads: ClassVar[bool] = True

    layers: str = ""
    slack: float = 1e-3
    ridge: float = 1e-3
    per_key: int = 16
    contexts: int = 5
    steps: int = 25
    lr: float = 0.1
    clamp: float = 0.75
    decay: float = 0.05
    kl: float = 0.0625
    stop: float = 0.05
    batch_size: int = 256

    def __post_init__(self) -> None:
        if not self.slack >= 0 or not self.ridge >= 0:
            raise InvalidExample(f"rome needs a slack and a ridge of 0 or more, got {self.slack} and {self.ridge}.")

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The layer and its C. The cases serve to find the layer alone."""
        return _keys.prepared_on(self, "rome", host, train_cases, run, width=1)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        want = _keys.wanted(self, "rome", host, examples, run, width=1)
        known = _keys.priors(host, want.state, want.layers, "C", self.ridge)
        ops, _ = _keys.spread(host, want.found, want.delta_PD, known, partial(self._solve, tell=run.tell))
        return Patch(method="rome", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)

    def _solve(self, known: tuple[Prior, float], K_KP: Float[Tensor, "K P"], tell: _keys.Tell = forget) -> Float[Tensor, "P K"]:
        """(P, K) the rows g of the change R g; with one fact there is nothing to slacken."""
        own, several = known[0], K_KP.shape[1] > 1
        return _keys.gains(own, K_KP, self.slack * _keys.mean_energy(own, K_KP) if several else 0.0, tell)
