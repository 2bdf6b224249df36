"""finetune: move the weights themselves.

    theta = argmin  mean_i L(x_i) + lam * KL on held text,  loss increase <= eps          Hewitt et al. 2024, arXiv 2402.06155, section 4.1

All weights, or those of chosen modules. float32 master weights whatever the host's dtype.
"""

from dataclasses import dataclass
from typing import final

import torch

from errata.hosts import Host, Weights
from errata.methods._descend import Settings, descend
from errata.types import Add, Example, Method, Patch, Run, UnknownName


@final
@dataclass(frozen=True, kw_only=True)
class Finetune(Method):
    """modules: `all`, `blocks`, `mlp`, `attention`, or comma-separated beginnings of parameter names."""

    modules: str = "all"
    steps: int = 100
    lr: float = 5e-4
    lam: float = 10.0
    contexts: int = 2
    neighbours: int = 256
    hold: int = 16
    batch_size: int = 64

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        names = chosen(host, self.modules)
        masters = {n: host.model.get_parameter(n).detach().float().clone().requires_grad_() for n in names}
        dtypes = {n: host.model.get_parameter(n).dtype for n in names}

        def weights() -> Weights:
            return {n: w.to(dtypes[n]) for n, w in masters.items()}

        settings = Settings(**{k: v for k, v in self.config.items() if k != "modules"})
        descend(host, examples, run, settings, list(masters.values()), weights)
        with torch.no_grad():
            ops = tuple(Add(weight=n, delta=(w - host.model.get_parameter(n).float()).cpu()) for n, w in masters.items())
        return Patch(method="finetune", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)


def chosen(host: Host, modules: str) -> list[str]:
    """Names of the parameters that `modules` means. Raises UnknownName if it means none."""
    names = [n for n, _ in host.model.named_parameters()]
    layout = host.layout
    sets = {
        "all": [""],
        "blocks": [layout.blocks + "."],
        "mlp": [f"{n}." for n in host.module_names((*layout.mlp_in, layout.mlp_out))],
        "attention": [f"{n}." for n in host.module_names((*layout.attention_in, layout.attention_out))],
    }
    starts = sets.get(modules) or [m.strip() for m in modules.split(",") if m.strip()]
    found = [n for n in names if n.startswith(tuple(starts))]
    if not found:
        raise UnknownName.among("module", modules, [*sets, *{n.rsplit(".", 2)[0] for n in names}])
    return found
