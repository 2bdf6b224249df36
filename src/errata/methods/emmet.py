"""emmet: rewrite one layer's MLP for a batch of facts at once, each with nearly its own value, and other text's keys as they were.

    W' = W + (V - W K) (K^T C^-1 K + slack I)^-1 K^T C^-1                               Gupta et al. 2024, arXiv 2403.14236

The equality constraints of ROME for a batch, with some slack, for keys that are nearly alike have no tame solution without. `rome` is
this formula at one fact, and for several with next to no slack, whatever it costs: there the constraint is what is kept. Here the slack is
what gives: it rises until the loss on text is inside the budget. With it the formula is that of `memit` at one layer (the push-through
identity); only the unit differs: slack is in units of the facts' own mean k^T C^-1 k, lam in those of text's.

Unlike EMMET in EasyEdit@14cea82 the slack has no unit (there: .1, with a C that is multiplied by 1e5 or 1e4). Values, layer: as in `rome`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

from errata.hosts import Host, Weights
from errata.methods import _keys
from errata.types import Case, Example, InvalidExample, Method, Op, Patch, Run, State


@final
@dataclass(frozen=True, kw_only=True)
class Emmet(Method):
    """layers: the one layer; empty: found by tracing. prior: as in `memit`; slack counts in its k^T P^-1 k. slack: the least; a fact with
    the mean key takes 1 / (1 + slack) of its residual when it is alone. held: documents on which slack is raised until the budget is kept;
    with 0 the gate alone keeps it. The rest: as in `memit`."""

    spreads: ClassVar[bool] = True

    layers: str = ""
    prior: str = "C"
    slack: float = 0.1
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
        _keys.check_prior("emmet", self.prior)
        if not self.slack > 0 or not self.ridge >= 0:
            raise InvalidExample(f"emmet needs a slack over 0 and a ridge of 0 or more, got {self.slack} and {self.ridge}.")

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The layer and its C. The cases serve to find the layer alone."""
        return _keys.prepared_on(self, "emmet", host, train_cases, run, width=1)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        want = _keys.wanted(self, "emmet", host, examples, run, self.held, width=1)
        known = _keys.priors(host, want.state, want.layers, self.prior, self.ridge)

        def solved(slack: float) -> tuple[tuple[Op, ...], Weights]:
            return _keys.spread(
                host,
                want.found,
                want.delta_PD,
                known,
                lambda own, K: _keys.gains(own[0], K, slack * _keys.mean_energy(own[0], K), run.tell),
            )

        ops = _keys.within(host, want.still, run.budget.epsilon, self.slack, solved, run.spread)
        return Patch(method="emmet", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)
