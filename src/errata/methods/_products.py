"""Sums of outer products, one for each module, kept as factors for as long as these are smaller: what `mend` and `ke` come to.

    S_m = sum_r a_r b_r^T

File legend: R rows, K key width, V value width.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata.hosts import Host, stored_transposed
from errata.types import Add, AddLowRank, Op


@final
class Products:
    def __init__(self) -> None:
        self.factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.dense: dict[str, Tensor] = {}

    def add(self, module: str, A_RK: Float[Tensor, "R K"], B_RV: Float[Tensor, "R V"]) -> None:
        own = self.factors.setdefault(module, [])
        own.append((A_RK, B_RV))
        if sum(len(a) for a, _ in own) * (A_RK.shape[1] + B_RV.shape[1]) >= A_RK.shape[1] * B_RV.shape[1]:
            self.dense[module] = self.sum(module)  # the product is smaller than its factors
            own.clear()

    def sum(self, module: str) -> Float[Tensor, "K V"]:
        return sum((a.T @ b for a, b in self.factors[module]), self.dense.get(module, torch.zeros(())))

    def ops(self, host: Host) -> tuple[Op, ...]:
        """One for each module, in the order in which they came."""
        out: list[Op] = []
        for module, own in self.factors.items():
            name = f"{module}.weight"
            if module in self.dense:
                S_KV = self.sum(module)
                turned = stored_transposed(host.model.get_submodule(module))
                out.append(Add(weight=name, delta=(S_KV if turned else S_KV.T).float().cpu().contiguous()))
            else:
                A, B = torch.cat([a for a, _ in own]), torch.cat([b for _, b in own]).T
                out.append(AddLowRank(weight=name, A=A.float().cpu().contiguous(), B=B.float().cpu().contiguous()))
        return tuple(out)
