"""alphaedit: write facts as memit does, but only in directions of the keys that text hardly uses.

    W_l' = W_l + R_l K_l^T U (U^T K_l K_l^T U + lam s I)^-1 U^T                 Fang et al. 2024, arXiv 2410.02355

U are eigenvectors of C_l = E[k k^T] over text, those with the smallest eigenvalues s_1 <= s_2 <= ..., and s is the sum of those that are
kept. The paper writes Delta = R K^T P (K K^T P + I)^-1 with P = U U^T, which is a solve with a matrix that is as large as a key and not
symmetric; in the basis U it is symmetric, as large as the null space or as there are facts, and a prior of the sums (`_normal.py`). The
keys of earlier batches, which the paper adds to K K^T, are here among the keys themselves: a ledger builds from all its examples.

Unlike AlphaEdit@f5248d3 the threshold has no unit: U is as wide as it can be with at most `share` of the energy of text's keys, tr C, in
it (there: singular values under 2e-2, which another scale of the activations makes all or none of them). Nor has lam: with 1, a key that
lies in U no more than text's do takes half of its residual (there: 10, whatever the keys). Values, layers and the budget: as in `memit`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

from errata.hosts import Host, Weights
from errata.methods import _keys
from errata.types import Case, Example, InvalidExample, Method, Op, Patch, Run, State


@final
@dataclass(frozen=True, kw_only=True)
class Alphaedit(Method):
    """share: of the energy of text's keys, at most so much lies in the directions that may change. lam: least weight of the L2 penalty. The
    rest: as in `memit`."""

    spreads: ClassVar[bool] = True

    share: float = 0.02
    layers: str = ""
    width: int = 0
    lam: float = 1.0
    held: int = 500
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
        if not 0 < self.share <= 1 or not self.lam > 0:
            raise InvalidExample(f"alphaedit needs a share over 0 and up to 1 and a lam over 0, got {self.share} and {self.lam}.")

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The layers and the C of each. The cases serve to find the layers alone."""
        return _keys.prepared_on(self, "alphaedit", host, train_cases, run)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        want = _keys.wanted(self, "alphaedit", host, examples, run, self.held)
        spaces = _keys.priors(host, want.state, want.layers, "U", share=self.share)

        def solved(lam: float) -> tuple[tuple[Op, ...], Weights]:
            return _keys.spread(host, want.found, want.delta_PD, spaces, lambda own, K: _keys.gains(own[0], K, lam * own[1], run.tell))

        ops = _keys.within(host, want.still, run.budget.epsilon, self.lam, solved, run.spread)
        return Patch(method="alphaedit", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)
