"""ensemble: shift senses of a small Backpack, and add what that changes in its predictions to those of a larger model.

    log p(x_t+1) = log p_large + beta (log p_small,edited - log p_small) + const                    Hewitt et al. 2024, equation 11
    log p_small,edited - log p_small = E sum over chosen senses of a_t Delta + const                (see `senses`)
    beta         = the largest of 1.0, 0.9, ... 0.1 whose increase of the large model's loss, with 95 % confidence, is inside the ball

Hewitt et al. 2024, arXiv 2402.06155, section 6. The two models share a tokenizer. No weight of the large one changes, and nothing is ever
learnt through it: it is only read, once, to choose beta.

Half of the text that holds still serves the descent on the small model, and beta is chosen on the other half, which that has not seen.
Unlike model-editing-canonical-examples@15a1e7b, where beta is chosen on the very text that judges.

File legend: N rows, T tokens, P places that predict a token and see a shifted sense, D width of the small model, V vocabulary, B betas.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import final

import torch

from errata import hosts, text
from errata.hosts import Host
from errata.methods.senses import Senses
from errata.types import Ensemble as Op
from errata.types import Example, InvalidExample, Method, Patch, Run, digest
from errata.types import Senses as Shift

TENTHS = tuple(i / 10 for i in range(10, 0, -1))
DOCUMENTS = 4000  # on which beta is chosen, at most


@final
@dataclass(frozen=True, kw_only=True)
class Ensemble(Method):
    """`small`: a Backpack with the tokenizer of the host; `beta`: where the search for it begins; the rest is for `senses` on it."""

    small: str = "lab/backpack"
    beta: float = 1.0
    k: int = 10
    against: float = 1000.0
    ridge: float = 10.0
    steps: int = 144
    lr: float = 0.1
    lam: float = 1000.0
    contexts: int = 1
    restated: int = 8
    neighbours: int = 8
    hold: int = 64
    searched: int = 4000
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise InvalidExample(f"ensemble needs a beta over 0, got {self.beta}.")
        self._senses()

    def _senses(self) -> Senses:
        return Senses(**{f.name: getattr(self, f.name) for f in fields(Senses) if hasattr(self, f.name)})

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        hosts.require_causal(host, "ensemble")
        # a folder is found again from elsewhere
        folder = self.small not in host.beside and not self.small.startswith("lab/") and Path(self.small).is_dir()
        name = str(Path(self.small).resolve()) if folder else self.small
        small = hosts.beside(host, name)
        for e in examples:
            hosts.encode(host, e.prompt, e.target)  # it may be too long for the large model alone
        ranked = sorted(run.hold or text.sampled(host, seed=run.seed), key=digest)  # by content: the order of a file is not random
        (shift,) = self._senses().edit(small, examples, replace(run, hold=tuple(ranked[1::2]))).ops
        assert isinstance(shift, Shift)
        other, _ = text.set_aside(ranked[::2], examples, text.answers_of(host, examples))
        betas = [self.beta * tenth for tenth in TENTHS]
        costs = upper(host, small, shift, other[:DOCUMENTS], betas, run)
        # where none is inside, the gate scales what is left, or refuses it
        beta = next((b for b, cost in zip(betas, costs, strict=True) if cost <= run.budget.epsilon), betas[-1])
        op = Op(weight=host.layout.head, small=name, parent=small.id, shift=shift, scale=beta)
        return Patch(method="ensemble", config=self.config, parent=host.id, examples=tuple(examples), ops=(op,))


@torch.no_grad()
def upper(host: Host, small: Host, shift: Shift, documents: Sequence[str], betas: Sequence[float], run: Run) -> list[float]:
    """For each beta the 95 % bound of the relative increase of the host's loss on `documents`, from one pass of both models."""
    rows = hosts.chunks(host, documents)
    if len(rows) < 2:
        return [float("inf")] * len(betas)
    before_N2 = hosts.score(host, rows)
    worse_BN = torch.zeros(len(betas), len(rows), dtype=torch.float64)
    common = min(len(host.tokenizer), len(small.tokenizer))
    E_VD = small.model.get_submodule(small.layout.head).weight[:common].to(host.device)
    shifted = set(shift.ids.tolist())
    reached = [i for i, (ids, _) in enumerate(rows) if not shifted.isdisjoint(ids[:-1])]
    groups = list(hosts.by_length([rows[i] for i in reached], hosts.at_once(host)))
    for group in run.progress(groups, "choosing beta", len(groups)):
        index = [reached[i] for i in group]
        batch = hosts.pad(host, [rows[i] for i in index])
        added_NTD = hosts.spoken_by(small, shift, batch.ids_NT, batch.mask_NT).to(host.device)
        moved_NT = torch.zeros_like(batch.scored_NT)
        moved_NT[:, 1:] = batch.scored_NT[:, 1:] * added_NTD[:, :-1].any(-1)
        at_NT = moved_NT.bool()
        logits_PV = hosts.predictions(host, replace(batch, scored_NT=moved_NT))
        more_PV = added_NTD[:, :-1][at_NT[:, 1:]] @ E_VD.T
        token_P1, row_P = batch.ids_NT[at_NT][:, None], at_NT.nonzero()[:, 0].cpu()
        base_P = logits_PV.log_softmax(-1).gather(-1, token_P1)[:, 0]
        for b, beta in enumerate(betas):
            edited_PV = torch.cat([logits_PV[:, :common] + beta * more_PV, logits_PV[:, common:]], dim=-1)
            lost_P = (base_P - edited_PV.log_softmax(-1).gather(-1, token_P1)[:, 0]).double().cpu()
            worse_BN[b].index_add_(0, torch.tensor(index)[row_P], lost_P)
    after = [torch.stack([before_N2[:, 0] - worse_N, before_N2[:, 1]], dim=1) for worse_N in worse_BN]
    return [hosts.increase(before_N2, after_N2)[1] for after_N2 in after]
