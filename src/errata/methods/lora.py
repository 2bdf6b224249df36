"""lora: move the MLP projections of the middle layers through low-rank factors.

    W' = W + (alpha / r) B A,  B = 0 at the start          Hu et al. 2021, arXiv 2106.09685, equation 3; as an editor: Hewitt et al. 2024,
                                                           arXiv 2402.06155, section 4.1

The same descent inside the ball as `finetune`. The factors are those that PEFT stores, so the patch exports as an adapter.
Unlike model-editing-canonical-examples@15a1e7b, a fraction p of L layers means ceil(p L) layers, all of which exist, and alpha is given as
the scale alpha / r, so that rank and learning rate are not entangled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hosts
from errata.hosts import Host, Weights, stored_transposed
from errata.methods._descend import Descent, Settings, Whitening, descend
from errata.types import AddLowRank, Example, InvalidExample, Method, Patch, Run


@final
@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """rank of the factors; `fraction` of the layers, around the middle; `scale` = alpha / rank; the rest as in `finetune`."""

    rank: int = 16
    fraction: float = 0.5
    scale: float = 2.0
    steps: int = 10
    lr: float = 0.9
    lam: float = 200.0
    contexts: int = 1
    restated: int = 8
    neighbours: int = 4
    hold: int = 8
    searched: int = 0
    damping: float | None = 0.05
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.fraction <= 1:
            raise InvalidExample(f"lora needs a rank of 1 or more and a fraction in (0, 1], got {self.rank} and {self.fraction}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        own = ("rank", "fraction", "scale")
        descent = Descent(host, examples, run, Settings(**{k: v for k, v in self.config.items() if k not in own}))
        middle = tuple(f"{row.blocks}.{i}." for row, blocks in host.stacks() for i in middle_layers(blocks, self.fraction))
        modules = [name for name in host.projections("mlp_in", "mlp_out") if name.startswith(middle)]
        turned = {name: stored_transposed(host.model.get_submodule(name)) for name in modules}
        whitenings = descent.whitenings(modules)
        A = {name: factor.requires_grad_() for name, factor in first_factors(host, descent, whitenings, turned, self.rank).items()}
        B = {}
        for name in modules:
            weight = host.model.get_parameter(f"{name}.weight")
            d_out = weight.shape[1] if turned[name] else weight.shape[0]
            B[name] = torch.zeros(d_out, self.rank, device=host.device, requires_grad=True)

        def factor(name: str) -> Tensor:
            return whitenings[name](A[name]) if name in whitenings else A[name]

        def weights() -> Weights:
            out = {}
            for name in modules:
                base = hosts.weight(host.model, f"{name}.weight")
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


def first_factors(
    host: Host, descent: Descent, whitenings: Mapping[str, Whitening], turned: Mapping[str, bool], rank: int
) -> dict[str, Float[Tensor, "R K"]]:
    """(R, K) the A of each module to begin with: the right singular vectors of the task's first gradient, as far as it has any.

    From random ones a step follows the part of the gradient that they happen to hold, which is R of K (LoRA-GA, Wang, Yu & Li 2024,
    arXiv 2407.05000, section 3.2; there B begins at the left ones and the base is moved to make up for it, here B begins at zero).
    """
    weights = {f"{name}.weight": hosts.weight(host.model, f"{name}.weight").requires_grad_() for name in turned}
    descent.task(weights)
    factors = {}
    for name in turned:
        G = weights[f"{name}.weight"].grad
        assert G is not None, "the task gave every weight a gradient"
        G = (G.T if turned[name] else G).float()
        _, _, Vh = torch.linalg.svd(whitenings[name](G) if name in whitenings else G, full_matrices=False)
        A = torch.zeros(rank, G.shape[1], device=G.device)
        A[: len(Vh)] = Vh[:rank] / math.sqrt(3)  # as long as the usual uniform ones
        factors[name] = A
    return factors


def middle_layers(layers: int, fraction: float) -> range:
    """ceil(fraction * layers) layers around the middle one."""
    n = math.ceil(layers * fraction)
    start = (layers - n) // 2
    return range(start, start + n)
