"""ultraedit: turn each answer token's gradient into a difference of what one module gives, and write all of them with one solve.

    d = -eta |k~|^2 v~        S = (K^T K + lam P)^-1 K^T D                                      Gu et al. 2025, arXiv 2505.14679

k are a module's inputs at the tokens that say the answers, v the gradients of its outputs there (`_gradients.py`), k~ and v~ both
standardised, coordinate by coordinate. It is the pipeline of MALMEN (arXiv 2311.04661) with nothing to train: no subject, no values to
optimise, one pass forward and back for an example, and one solve of the sums (`_normal.py`) for each module.

The rows of an example are taken on the base and depend on no other example, so whoever keeps them adds one with a pass and a solve, and
takes one back exactly, as if it had never been there: `rows` and `solve`.

Unlike UltraEdit@0beb222 the statistics are those of text, of each module by itself, with an exact variance (there: of all edits so far, in
all modules of one shape; a first row would be its own mean, and its shift nothing). eta is the length of d as a share of what the module
usually gives, where k and v deviate as text's do (there: 1e-6 times what these come to). P is C = E[k k^T] over text, or with `prior` "I"
the identity, as published, or with "U" a basis of what text hardly uses; lam says, as in `memit`, that a usual key takes 1 / (1 + lam) of
its difference (there: 1, whatever the keys), and it rises until the loss on text is inside the budget. The gradients are sums over tokens
(there: means over a batch).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hosts, text
from errata.hosts import Host, stored_transposed
from errata.methods import _gradients, _kept, _keys, _normal
from errata.methods._gradients import Moments, Pairs
from errata.methods._normal import Prior
from errata.methods._values import quiet
from errata.types import Case, Example, InvalidExample, Method, Patch, Progress, Rows, Run, State

STATISTICS = 4096  # tokens of text that the deviations of keys and gradients are estimated from


@final
@dataclass(frozen=True, kw_only=True)
class Ultraedit(Method):
    """layers: "3-8" or "3,4,5", of whose MLPs the last projection is edited (of a seq2seq, in its decoder); empty: the upper half. eta:
    length of d. prior: "C", "I" or "U". lam: its least weight. held: documents on which lam is raised until the budget is kept;
    with 0 the gate alone keeps it. ridge, per_key: as in `memit`. batch_size: examples in memory at once; it changes nothing else."""

    spreads: ClassVar[bool] = True

    layers: str = ""
    eta: float = 1.0
    prior: str = "C"
    lam: float = 0.1
    held: int = 500
    ridge: float = 1e-3
    per_key: int = 16
    batch_size: int = 64

    def __post_init__(self) -> None:
        _keys.check_prior("ultraedit", self.prior)
        if not self.eta > 0 or not self.lam > 0 or not self.ridge >= 0:
            raise InvalidExample(
                f"ultraedit needs an eta and a lam over 0 and a ridge of 0 or more, got {self.eta}, {self.lam} and {self.ridge}."
            )

    @property
    def reads_cases(self) -> bool:
        return False

    def _modules(self, host: Host) -> list[str]:
        layers = _keys.layers_of(host, self.layers) if self.layers else range(host.blocks // 2, host.blocks)
        return host.module_names((host.layout.mlp_out,), list(layers))

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """C, the mean and deviation of keys and gradients, and the size of the outputs of each module, over text. No case is read."""
        texts, modules = run.hold or text.sampled(host, seed=run.seed), self._modules(host)
        C, tokens = _keys.covariances(host, texts, modules, self.per_key)
        tensors, rows = dict(C), 0
        for module, (k, v) in _gradients.of_text(host, texts, modules, STATISTICS).items():
            tensors[f"{module}/k"] = torch.stack([k.mean_W, k.squares_W]).float().cpu()
            tensors[f"{module}/v"] = torch.stack([v.mean_W, v.squares_W]).float().cpu()
            rows = k.n  # the same for all of them
        return State(method="ultraedit", host=host.id, config={"modules": modules, "tokens": tokens, "rows": rows}, tensors=tensors)

    def rows(self, host: Host, examples: tuple[Example, ...], run: Run) -> tuple[Rows, ...]:
        """Keys and value gradients of each example."""
        return _gradients.rows(host, examples, self._modules(host), self.batch_size, run.progress, spread=run.spread)

    def solve(self, host: Host, rows: tuple[Rows, ...], run: Run) -> Patch:
        """The patch that all the rows come to, in whatever order. Raises WrongBase for rows of other weights."""
        priors, units, read, _ = self._known(host, run)
        parts = (_gradients.together(host, part, list(priors)) for part in _gradients.in_order(host, rows))
        sums = _kept.of_rows(host, parts, priors, read)
        return self._solved(host, tuple(r.example for r in rows), units, sums, run)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """`solve` of the `rows`, of which only some are in memory at once; from `run.sums`, if these are of the same settings."""
        priors, units, read, state = self._known(host, run)
        about = _kept.about(host, "ultraedit", state.id, self.config | {"held": 0, "lam": 0})
        take = partial(self._pairs, modules=self._modules(host), progress=run.inner)
        summing = _kept.Summing(asked=lambda _, given: given, take=take, read=read, priors=priors)
        sums = _kept.of_examples(host, "ultraedit", about, examples, summing, run)
        return self._solved(host, examples, units, sums, run)

    def _pairs(self, host: Host, examples: tuple[Example, ...], modules: Sequence[str], progress: Progress) -> Pairs:
        return _gradients.gathered(host, examples, modules, self.batch_size, progress)

    def _known(self, host: Host, run: Run) -> tuple[dict[str, Prior], dict[str, float], _kept.Read, State]:
        """({module: its prior}, {module: what lam is multiplied with}, what makes keys and differences of rows, the state)."""
        state = _keys.of_method("ultraedit", run.state, "rows") if run.state else self.prepare(host, (), run)
        C = {module: _keys.covariance_of(host, state, module) for module in self._modules(host)}
        about = {
            m: (_moments(state, m, "k", C_KK), _moments(state, m, "v", C_KK), self.eta * _usual_output(host, m, C_KK))
            for m, C_KK in C.items()
        }
        found = {module: _keys.prior(self.prior, C_KK, self.ridge) for module, C_KK in C.items()}
        priors, units = {m: prior for m, (prior, _) in found.items()}, {m: unit for m, (_, unit) in found.items()}
        return priors, units, partial(_read, about), state

    def _solved(
        self,
        host: Host,
        examples: tuple[Example, ...],
        units: Mapping[str, float],
        sums: Mapping[str, _normal.Sums],
        run: Run,
    ) -> Patch:
        still = quiet(host, examples, run, self.held)
        ops = _keys.within(
            host, still, run.budget.epsilon, self.lam, lambda lam: _keys.of_sums(host, sums, units, lam, tell=run.tell), run.spread
        )
        return Patch(method="ultraedit", config=self.config, parent=host.id, examples=examples, ops=ops)


def _read(about: Mapping[str, tuple[Moments, Moments, float]], host: Host, rows: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (keys, differences)} of the rows, given {module: (moments of keys, of values, the length of d)}; float64."""
    out = {}
    for module, (k, v, eta) in about.items():
        keys_NK, v_NV = (x.to(k.mean_W) for x in rows[module])
        out[module] = (keys_NK, differences(k, v, keys_NK, v_NV, eta))
    return out


def differences(k: Moments, v: Moments, keys_NK: Float[Tensor, "N K"], v_NV: Float[Tensor, "N V"], eta: float) -> Float[Tensor, "N V"]:
    """(N, V) d = -eta (|k~|^2 / K) (v~ / sqrt(V)): where k and v deviate as those of text do, |d| is eta."""
    size_N1 = _gradients.standardised(k, keys_NK).square().mean(1, keepdim=True)
    d_NV: Tensor = -eta * size_N1 * _gradients.standardised(v, v_NV) / v_NV.shape[1] ** 0.5
    return d_NV


def _usual_output(host: Host, module: str, C_KK: Float[Tensor, "K K"]) -> float:
    """The root mean square length of k W over text, which is tr(W^T C W)."""
    W_KV = hosts.weight(host.model, f"{module}.weight").to(C_KK)
    W_KV = W_KV if stored_transposed(host.model.get_submodule(module)) else W_KV.T
    return float((W_KV * (C_KK @ W_KV)).sum().sqrt())


def _moments(state: State, module: str, which: str, like: Tensor) -> Moments:
    mean_W, squares_W = state.tensors[f"{module}/{which}"].to(like)
    return Moments(n=int(state.config["rows"]), mean_W=mean_W, squares_W=squares_W)
