"""grace: a codebook at one module: what is asked is near to a key, and a learnt value takes the place of what the module gives.

    y = v_i  where |x - k_i| <= eps_i for the nearest key i,  y = f(x) elsewhere;    v_i = argmin L_goal(x_i)

Hartvigsen et al. 2023, arXiv 2211.11031, equation 1 and algorithm 1. Key: what goes into the module at the last token of what is asked.
Value: what comes out from there on, to the end of the answer. A ball ends half way to the nearest key of another label, and grows over
those of its own, which then have no entry of their own.

What the first radius should be depends on the model, so by default it is found: as far as the ball may reach (see `_routes.py` for that,
and for how this differs from GRACE@f674183). There too a value begins as what the module gives, and one step is a length in its units.

File legend: N what is asked, K key width, D output width, G entries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata.hosts import Host
from errata.memory.activations import Chosen, keys
from errata.methods._routes import COVERED, KEY, VALUE, Parts, Settings, asked, learn, modules_at, patched, reaches, still
from errata.types import Example, Method, Patch, Run


@final
@dataclass(frozen=True, kw_only=True)
class Grace(Method):
    """epsilon: first radius of a ball, 0: as far as it may reach. module: whose input is the key and whose output the value; "": the last
    MLP projection of the block at `depth`, a share of the stack that speaks. steps, lr, stop: see `_routes.Settings`."""

    epsilon: float = 0.0
    reads: str = ""
    module: str = ""
    steps: int = 100
    lr: float = 0.3
    stop: float = 0.05

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        (reads,), (module,) = modules_at(host, self.reads, KEY), modules_at(host, self.module, VALUE)
        questions = asked(host, examples)
        keys_NK, labels = keys(host, [q.text for q in questions], reads), [q.label for q in questions]
        reach_N = reaches(keys_NK, labels, still(host, examples, run, reads, keys_NK.shape[1]), keys_NK, labels)
        owner, entry, radii_G = codebook(keys_NK, labels, reach_N, self.epsilon or math.inf)
        first_GD = keys(host, [questions[i].text for i in owner], module, outputs=True)

        def choose(_parts: Parts, numbers: list[int]) -> dict[str, Chosen]:
            index_N1 = torch.tensor([[entry[i]] for i in numbers])
            return {module: (index_N1, torch.ones(index_N1.shape))}

        name, settings = f"value/{module}", Settings(steps=self.steps, lr=self.lr, stop=self.stop)
        parts = learn(host, questions, {name: first_GD}, {name: first_GD.norm(dim=1)}, choose, settings, run.progress, entry)
        entries, how = [questions[i] for i in owner], {"gate": "distance", "voice": "value", "bound": 1.0}
        return patched(host, "grace", self.config, examples, entries, keys_NK[owner], parts, reads=reads, radii=radii_G, **how)


def codebook(
    keys_NK: Float[Tensor, "N K"], labels: Sequence[object], reach_N: Float[Tensor, "N"], epsilon: float
) -> tuple[list[int], list[int], Float[Tensor, "G"]]:
    """(which of the keys have an entry, the entry of each key, the entries' radii).

    A key within `epsilon` of a ball of its label belongs to it, and the ball grows over it, as far as it may reach.
    """
    apart_NN = torch.cdist(keys_NK.double(), keys_NK.double())
    owner, entry = list[int](), list[int]()
    radii: list[float] = []
    for n in range(len(keys_NK)):
        far = {g: COVERED * float(apart_NN[n, o]) for g, o in enumerate(owner) if labels[o] == labels[n]}
        near = [g for g, d in far.items() if d <= min(radii[g] + epsilon, float(reach_N[owner[g]]))]
        if near:
            g = min(near, key=lambda g: far[g])
            radii[g] = max(radii[g], far[g])
        else:
            g = len(owner)
            owner.append(n)
            radii.append(min(epsilon, float(reach_N[n])))
        entry.append(g)
    return owner, entry, torch.tensor(radii, dtype=torch.float32)
