"""finetune: move the weights themselves.

    theta = argmin  mean_i L(x_i) + lam * KL on held text,  loss increase <= eps          Hewitt et al. 2024, arXiv 2402.06155, section 4.1

All weights, or those of chosen modules. float32 master weights whatever the host's dtype.
"""

from dataclasses import dataclass
from typing import final

import torch

from errata import hosts
from errata.hosts import Host, Weights, stored_transposed
from errata.methods._descend import Descent, Metric, Settings, descend
from errata.types import Add, Example, Method, Patch, Run, UnknownName

EMBEDDING_RATE = 5.0  # the rows of the targets' tokens are few; in the coordinates of what the head reads, moving them costs little


@final
@dataclass(frozen=True, kw_only=True)
class Finetune(Method):
    """modules: `all`, `blocks`, `mlp`, `attention`, or comma-separated beginnings of parameter names. The rest: `_descend.Settings`."""

    modules: str = "all"
    steps: int = 144
    lr: float = 0.014
    lam: float = 200.0
    contexts: int = 1
    restated: int = 48
    neighbours: int = 8
    hold: int = 96
    searched: int = 4000
    damping: float | None = 0.1
    batch_size: int = 64

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        descent = Descent(host, examples, run, Settings(**{k: v for k, v in self.config.items() if k != "modules"}))
        names = chosen(host, self.modules)
        base = {n: hosts.weight(host.model, n) for n in names}
        shifts = {n: torch.zeros_like(w, dtype=torch.float32, requires_grad=True) for n, w in base.items()}
        projections = {f"{m}.weight": m for m in host.projections() if f"{m}.weight" in base}
        whitenings = descent.whitenings(list(projections.values()))
        embeddings = {f"{host.layout.embedding}.weight", f"{host.layout.head}.weight"}
        # the head's own weight only: an embedding that is not tied to it is read by tokens, not by hidden states
        # (and a classifier's head reads what was pooled)
        heads = [n for n in names if host.model.get_parameter(n) is host.model.get_submodule(host.layout.head).weight]
        heads = [] if host.kind == "classifier" else heads
        head = descent.whitenings([host.layout.norm], outputs=True).get(host.layout.norm) if heads else None

        def metric(name: str) -> Metric | None:
            if name in heads and head and len(head.U_KE) == base[name].shape[1]:
                return head.twice
            if not (whiten := whitenings.get(projections.get(name, ""))):
                return None
            turned = stored_transposed(host.model.get_submodule(projections[name]))
            return (lambda g: whiten.twice(g.T).T) if turned else whiten.twice

        def weights() -> Weights:
            return {n: (w.float() + shifts[n]).to(w.dtype) for n, w in base.items()}

        rates = [EMBEDDING_RATE if n in embeddings else 1.0 for n in names]
        descend(descent, run, list(shifts.values()), weights, rates, [metric(n) for n in names])
        ops = tuple(Add(weight=n, delta=shift.detach().cpu().clone()) for n, shift in shifts.items())
        return Patch(method="finetune", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)


def chosen(host: Host, modules: str) -> list[str]:
    """Names of the parameters that `modules` means. Raises UnknownName if it means none."""
    names = [n for n, _ in host.model.named_parameters()]
    sets = {
        "all": [""],
        "blocks": [f"{row.blocks}." for row, _ in host.stacks()],
        "mlp": [f"{n}." for n in host.projections("mlp_in", "mlp_out")],
        "attention": [f"{n}." for n in host.projections("attention_in", "attention_out")],
    }
    starts = sets.get(modules) or [m.strip() for m in modules.split(",") if m.strip()]
    found = [n for n in names if n.startswith(tuple(starts))]
    if not found:
        raise UnknownName.among("module", modules, [*sets, *{n.rsplit(".", 2)[0] for n in names}])
    return found
