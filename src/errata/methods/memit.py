"""memit: write many facts into the MLPs of a few layers at once, with one solve for each layer.

    W_l' = W_l + R_l K_l^T (lam C_l + K_l K_l^T)^-1       R_l = (z - h_L) / (layers that are left)
                                                                   Meng et al. 2023, arXiv 2210.07229, equation 14 and algorithm 1

z is the value that `_values.py` finds for the output of the last layer's block, h_L what that output is with the layers before l written
already, K_l the MLPs' inputs at the edited tokens, C_l = E[k k^T] over text (`_keys.py`). The layers are found by causal tracing
(`_trace.py`) or given.
Unlike memit@80426fd the solve is a Cholesky's (there: LU), whose factor of C serves all facts; the residual is that of the mean over the
prefixes whose mean key is used (there: of the plain prompt); nothing is downloaded, and there are no files of settings for models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

from errata.hosts import Host, Weights
from errata.methods import _keys
from errata.types import Case, Example, InvalidExample, Method, Op, Patch, Run, State


@final
@dataclass(frozen=True, kw_only=True)
class Memit(Method):
    """layers: "3-8" or "3,4,5"; empty: `width` of them, found by tracing (0: five, or half of a small model's).

    prior: what stands in the place of C: "C"; "I", the identity; "U", a basis of what text hardly uses, as in `alphaedit`. lam: least
    weight of the text against the facts; a usual key takes 1 / (1 + lam) of its residual. held: documents on which lam is raised until the
    budget is kept; with 0 the gate alone keeps it. ridge: multiple of C's mean eigenvalue that is added to it. per_key: tokens of text for
    each dimension of C. contexts: prefixes. The rest: `_values.Settings`.
    """

    spreads: ClassVar[bool] = True

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
        _keys.check_prior("memit", self.prior)
        if not self.lam > 0 or not self.ridge >= 0:
            raise InvalidExample(f"memit needs a lam over 0 and a ridge of 0 or more, got {self.lam} and {self.ridge}.")

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The layers and the C of each. The cases serve to find the layers alone."""
        return _keys.prepared_on(self, "memit", host, train_cases, run)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        want = _keys.wanted(self, "memit", host, examples, run, self.held)
        known = _keys.priors(host, want.state, want.layers, self.prior, self.ridge)

        def solved(lam: float) -> tuple[tuple[Op, ...], Weights]:
            return _keys.spread(host, want.found, want.delta_PD, known, lambda own, K: _keys.gains(own[0], K, lam * own[1], run.tell))

        ops = _keys.within(host, want.still, run.budget.epsilon, self.lam, solved, run.spread)
        return Patch(method="memit", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)
