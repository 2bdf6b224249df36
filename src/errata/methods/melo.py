"""melo: clusters of what is asked choose a slice of ranks of a LoRA, which is on there alone.

    y = f(x) + B_b A_b x  where |x - c_j| <= r_j, b the block of the nearest point in cluster j,  y = f(x) elsewhere

Yu et al. 2024, arXiv 2312.11795, sections 3.1 and 3.2. A point is what goes into one module at the last token of what is asked, c_j the
mean of a cluster's points, which have one label. Blocks of `ranks` ranks belong to up to `points` points of a cluster, and to nobody else.

Unlike EasyEdit@14cea82, a cluster takes a point only if its ball then still ends half way to what is another matter, so that no point is
forgotten where two labels meet; among the balls that hold what is asked the nearest point decides, not the nearest centre; A begins in
units of what the module reads, and steps are lengths in units of what it gives. See `_routes.py` for the rest.

File legend: N points, K key width, D output width, G blocks, R ranks.
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
from errata.methods._routes import COVERED, KEY, VALUE, Parts, Settings, asked, learn, low_rank, modules_at, patched, reaches, still
from errata.types import Example, InvalidExample, Method, Patch, Run


@final
@dataclass(frozen=True, kw_only=True)
class Melo(Method):
    """radius: first radius of a cluster, 0: as far as it may reach. reads: the module whose inputs are the points, modules: those with the
    LoRA, with commas; "": last MLP projections. steps, lr, stop: see `_routes.Settings`."""

    radius: float = 0.0
    points: int = 4
    ranks: int = 4
    reads: str = ""
    modules: str = ""
    steps: int = 100
    lr: float = 0.1
    stop: float = 0.05

    def __post_init__(self) -> None:
        if self.points < 1 or self.ranks < 1:
            raise InvalidExample(f"A block of melo has ranks and points, got {self.ranks} and {self.points}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        (reads,), modules = modules_at(host, self.reads, KEY), modules_at(host, self.modules, VALUE, 2)
        questions = asked(host, examples)
        keys_NK, labels = keys(host, [q.text for q in questions], reads), [q.label for q in questions]
        found = clusters(keys_NK, labels, still(host, examples, run, reads, keys_NK.shape[1]), self.radius or math.inf)
        block_N, centres_NK, radii_N = torch.zeros(len(questions), dtype=torch.long), torch.zeros_like(keys_NK), torch.zeros(len(questions))
        blocks = 0
        for points, radius in found:
            centres_NK[points], radii_N[points] = keys_NK[points].mean(0), radius
            for start in range(0, len(points), self.points):
                block_N[points[start : start + self.points]] = blocks
                blocks += 1

        def choose(_parts: Parts, numbers: list[int]) -> dict[str, Chosen]:
            return dict.fromkeys(modules, (block_N[numbers][:, None], torch.ones(len(numbers), 1)))

        parts, units = low_rank(host, questions, modules, blocks, self.ranks, run.seed)
        settings = Settings(steps=self.steps, lr=self.lr, stop=self.stop)
        parts = learn(host, questions, parts, units, choose, settings, run.progress, block_N.tolist())
        how = {"gate": "distance", "voice": "ranks", "bound": 1.0, "reads": reads, "radii": radii_N}
        return patched(host, "melo", self.config, examples, questions, keys_NK, parts | {"centres": centres_NK, "block": block_N}, **how)


def clusters(
    keys_NK: Float[Tensor, "N K"], labels: Sequence[object], still_MK: Float[Tensor, "M K"], radius: float
) -> list[tuple[list[int], float]]:
    """(the points, the radius) of each cluster: a point belongs to the nearest of its label that is within `radius` of it and may grow."""
    found: list[tuple[list[int], float]] = []

    def ball(points: list[int]) -> tuple[float, float]:
        """(how far its points are from their mean, how far it may reach)."""
        centre_1K = keys_NK[points].mean(0, keepdim=True)
        reach = float(reaches(keys_NK, labels, still_MK, centre_1K, [labels[points[0]]])[0])
        return COVERED * float((keys_NK[points] - centre_1K).norm(dim=1).max()), reach

    for n in range(len(keys_NK)):
        alike = [j for j, (points, _) in enumerate(found) if labels[points[0]] == labels[n]]
        away = [(float((keys_NK[found[j][0]].mean(0) - keys_NK[n]).norm()), j) for j in alike]
        for d, j in sorted(away):
            points, r = found[j]
            wide, reach = ball([*points, n])
            if d <= r + radius and wide <= reach:
                found[j] = ([*points, n], min(max(wide, radius), reach))
                break
        else:
            found.append(([n], min(radius, ball([n])[1])))
    return found
