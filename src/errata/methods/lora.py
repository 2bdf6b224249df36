"""lora: move the MLP projections of the middle layers through low-rank factors.

    W' = W + (alpha / r) B A,  B = 0 at the start          Hu et al. 2021, arXiv 2106.09685, equation 3; as an editor: Hewitt et al. 2024,
                                                           arXiv 2402.06155, section 4.1

The same descent inside the ball as `finetune`. The factors are those that PEFT stores, so the patch exports as an adapter.
Unlike model-editing-canonical-examples@15a1e7b, a fraction p of L layers means ceil(p L) layers, all of which exist, and alpha is given as
the scale alpha / r, so that rank and learning rate are not entangled.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from errata.hosts import Host, Weights, stored_transposed
from errata.methods._descend import Descent, Settings, descend
from errata.types import AddLowRank, Example, InvalidExample, Method, Patch, Run


@final
@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """rank of the factors; `fraction` of the layers, around the middle; `scale` = alpha / rank; the rest as in `finetune`."""

    rank: int = 16
    fraction: float = 0.5
    scale: float = 2.0
    steps: int = 40
    lr: float = 0.3
    lam: float = 100.0
    contexts: int = 1
    restated: int = 8
    neighbours: int = 4
    hold: int = 32
    searched: int = 0
    damping: float | None = 0.1
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.fraction <= 1:
            raise InvalidExample(f"lora needs a rank of 1 or more and a fraction in (0, 1], got {self.rank} and {self.fraction}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        own = ("rank", "fraction", "scale")
        descent = Descent(host, examples, run, Settings(**{k: v for k, v in self.config.items() if k not in own}))
        layout = host.layout
        modules = host.module_names((*layout.mlp_in, layout.mlp_out), middle_layers(host.blocks, self.fraction))
        generator = torch.Generator().manual_seed(run.seed)
        A, B, turned = {}, {}, {}
        for name in modules:
            weight = host.model.get_parameter(f"{name}.weight")
            turned[name] = stored_transposed(host.model.get_submodule(name))
            d_out, d_in = weight.T.shape if turned[name] else weight.shape
            bound = 1 / math.sqrt(d_in)
            A[name] = (torch.rand(self.rank, d_in, generator=generator) * 2 * bound - bound).to(host.device).requires_grad_()
            B[name] = torch.zeros(d_out, self.rank, device=host.device, requires_grad=True)

        whitenings = descent.whitenings(modules)

        def factor(name: str) -> Tensor:
            return whitenings[name](A[name]) if name in whitenings else A[name]

        def weights() -> Weights:
            out = {}
            for name in modules:
                base = host.model.get_parameter(f"{name}.weight").detach()
                shift = self.scale * (B[name] @ factor(name))
                out[f"{name}.weight"] = (base.float() + (shift.T if turned[name] else shift)).to(base.dtype)
            return out

        descend(descent, run, [*A.values(), *B.values()], weights)
        with torch.no_grad():
            ops = tuple(
                AddLowRank(weight=f"{n}.weight", A=factor(n).detach().cpu().clone(), B=B[n].detach().cpu().clone(), scale=self.scale)
                for n in modules
            )
        return Patch(method="lora", config=self.config, parent=host.id, examples=tuple(examples), ops=ops)


def middle_layers(layers: int, fraction: float) -> range:
    """ceil(fraction * layers) layers around the middle one."""
    n = math.ceil(layers * fraction)
    start = (layers - n) // 2
    return range(start, start + n)
