"""nse: write facts as memit does, each into the neurons that its batch uses most, and again where one round is not enough.

    Delta[:, s] = R K_s^T (lam C_ss + K_s K_s^T)^-1            s: the neurons with the greatest sum_i |k_i|, together at most p of the total
                                                                Jiang et al. 2024, arXiv 2410.04045

Three differences from MEMIT: every value is found with the original weights ("weights rewinding"; here all methods do so), only the
selected coordinates of the keys take part in the solve, with the C of those alone, and there are up to `rounds` rounds over the layers, the
further ones for the facts of which a part is still missing.

Unlike AlphaEdit/nse@f5248d3 what counts as missing has no unit: |z - h| / |delta| between `again` and `hopeless` (there: |z - h| between 15
and 100 for GPT-J, 2.5 and 50 for Llama3). Facts that are done keep their keys in the sums with nothing missing, so that a further round
leaves them where they are (there: K K^T of past batches). One neuron is always selected (there: none, and an error, for a small p). The
budget: as in `memit`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from errata.hosts import Host, Weights
from errata.methods import _keys
from errata.types import Case, Example, InvalidExample, Method, Op, Patch, Run, State, forget


@final
@dataclass(frozen=True, kw_only=True)
class Nse(Method):
    """p: share of the keys' total size that the selected neurons have, at most; 1 selects all. rounds: at most. again, hopeless: a fact is
    written once more if the missing share of its delta lies between them. The rest: as in `memit`."""

    spreads: ClassVar[bool] = True

    p: float = 0.8
    rounds: int = 3
    again: float = 0.3
    hopeless: float = 2.0
    layers: str = ""
    width: int = 0
    prior: str = "C"
    lam: float = 1.0
    held: int = 500
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
        _keys.check_prior("nse", self.prior)
        if not 0 < self.p <= 1 or not self.lam > 0 or not self.ridge >= 0:
            raise InvalidExample(
                f"nse needs a p over 0 and up to 1, a lam over 0 and a ridge of 0 or more, got {self.p}, {self.lam} and {self.ridge}."
            )
        if not self.rounds >= 1 or not 0 <= self.again < self.hopeless:
            raise InvalidExample(
                f"nse needs a round or more and an `again` of 0 or more under `hopeless`, got {self.rounds}, {self.again}, {self.hopeless}."
            )

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The layers and the C of each. The cases serve to find the layers alone."""
        return _keys.prepared_on(self, "nse", host, train_cases, run)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        want = _keys.wanted(self, "nse", host, examples, run, self.held)
        C = _keys.covariances_of(host, want.state, want.layers)
        if self.prior == "C":  # that of all neurons, whichever are selected
            C = {layer: _keys.ridged(C_KK, self.ridge) for layer, C_KK in C.items()}
        open_ = (self.again, self.hopeless)

        def solved(lam: float) -> tuple[tuple[Op, ...], Weights]:
            def solve(C_KK: Tensor, K_KP: Tensor) -> Tensor:
                return _selected_gains(C_KK, K_KP, lam, self.p, self.prior, run.tell)

            return _keys.spread(host, want.found, want.delta_PD, C, solve, self.rounds, open_)

        ops = _keys.within(host, want.still, run.budget.epsilon, self.lam, solved, run.spread)
        return Patch(method="nse", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)


def selected(K_KP: Float[Tensor, "K P"], p: float) -> Tensor:
    """The neurons, in their own order, whose sums of |k| over the facts are the greatest, and together at most `p` of the total."""
    score_K, by_score_K = K_KP.abs().sum(1).sort(descending=True, stable=True)
    # the whole of a sum may come out a little over it
    kept = max(1, int((score_K.cumsum(0) <= (p + 1e-9) * score_K.sum()).sum()))
    return by_score_K[:kept].sort().values


def _selected_gains(
    C_KK: Float[Tensor, "K K"],
    K_KP: Float[Tensor, "K P"],
    lam: float,
    p: float,
    prior: str = "C",
    tell: _keys.Tell = forget,
) -> Float[Tensor, "P K"]:
    s = selected(K_KP, p)
    own, unit = _keys.prior(prior, C_KK[s][:, s], 0.0)
    gains_PK = K_KP.new_zeros(K_KP.shape[1], len(K_KP))
    gains_PK[:, s] = _keys.gains(own, K_KP[s], lam * unit, tell)
    return gains_PK
