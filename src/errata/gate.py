"""Patch + Budget -> Verdict. Measures what a patch costs and fixes; scales one that costs too much onto the edge of the budget, or refuses.

The loss on reference text is measured before and after on the same chunks, and the bound is taken over their paired differences: what the
chunks have in common cancels. A long reference text is read in up to three looks, each only where those before leave the matter open:
they may be wrong in 1, 1 and 3 %, so that together they are in at most 5 % (Bonferroni; Dunn 1961). Nothing here makes or keeps a patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import apply, hosts
from errata.hosts import Host
from errata.types import Budget, BudgetError, InvalidReference, Neighbour, Patch, Progress, Verdict, no_progress

LOOKS = (250, 900)  # chunks read at the end of the first and of the second look; the third reads them all
QUANTILES = {1: (1.6449,), 2: (2.3263, 1.7507), 3: (2.3263, 2.3263, 1.8808)}  # of the normal distribution: .95; .99, .96; .99, .99, .97


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """What the host said before any patch: made once, compared with many times.

    `looks` are the rows of the reference text, in up to three parts; `losses` is what `hosts.score` gave for those that were needed so
    far, and `after` what it gave with a patch on, by patch and scale: another budget asks for the same again. `said` are the host's greedy
    answers to the neighbouring prompts.
    """

    host: str
    looks: list[list[tuple[list[int], int]]]
    losses: list[Float[Tensor, "N 2"]]
    set_aside: int
    neighbours: tuple[str, ...]
    said: tuple[str, ...]
    after: dict[tuple[str, float], list[Float[Tensor, "N 2"]]] = field(default_factory=dict)


def baseline(host: Host, reference: Sequence[str], set_aside: int = 0, neighbours: Sequence[Neighbour | str] = ()) -> Baseline:
    """Measure `host` as it is. `set_aside` is how many documents were left out of `reference` because they state an edited fact.

    Raises InvalidReference if there are not two chunks to measure.
    """
    rows = hosts.chunks(host, reference)
    if len(rows) < 2:
        raise InvalidReference(
            f"{len(rows)} chunk(s) of reference text are left to measure, two or more are needed"
            + (f": {set_aside} document(s) state an edited fact and were set aside" if set_aside else "")
            + ". Give a reference text with more documents about other matters."
        )
    prompts = tuple(n if isinstance(n, str) else n.prompt for n in neighbours)
    looks = [part for a, b in zip((0, *LOOKS), (*LOOKS, len(rows)), strict=True) if (part := rows[a:b])]
    return Baseline(
        host=host.id,
        looks=looks,
        losses=[hosts.score(host, looks[0])],
        set_aside=set_aside,
        neighbours=prompts,
        said=tuple(hosts.greedy(host, prompts)) if prompts else (),
    )


def judge(host: Host, patch: Patch, budget: Budget, base: Baseline) -> Verdict:
    """Measure `patch` against `budget`. The host is left as it was. Raises WrongBase."""
    return _judge(host, patch, 1.0, budget, base)[1]


def _judge(host: Host, whole: Patch, s: float, budget: Budget, base: Baseline, thorough: bool = False) -> tuple[Patch, Verdict]:
    """(base + s * change of `whole`, the verdict on it); a `thorough` one reads the whole text, whatever the first looks say."""
    apply.check(host, whole)
    patch = whole if s == 1.0 else apply.scaled(whole, s)
    with apply.applied(host, patch):
        now = hosts.greedy(host, base.neighbours) if base.neighbours else []
        fixed = hosts.fixes(host, patch.examples)
    before_N2 = after_N2 = torch.zeros(0, 2, dtype=torch.float64)
    measured, upper = base.after.setdefault((whole.id, s), []), math.inf
    for i, (rows, z) in enumerate(zip(base.looks, QUANTILES[len(base.looks)], strict=True)):
        if i == len(base.losses):
            base.losses.append(hosts.score(host, rows))
        if i == len(measured):
            with apply.applied(host, patch):
                measured.append(hosts.score(host, rows))
        before_N2, after_N2 = torch.cat([before_N2, base.losses[i]]), torch.cat([after_N2, measured[i]])
        mean, upper = hosts.increase(before_N2, after_N2, z)
        if not thorough and (upper <= budget.epsilon or 2 * mean - upper > budget.epsilon):  # inside or outside; else more has to be read
            break
    tokens = float(before_N2[:, 1].sum())
    return patch, Verdict(
        patch=patch.id,
        budget=budget,
        loss_before=-float(before_N2[:, 0].sum()) / tokens,
        loss_after=-float(after_N2[:, 0].sum()) / tokens,
        upper=upper,
        chunks=len(before_N2),
        tokens=int(tokens),
        set_aside=base.set_aside,
        kept=sum(a == b for a, b in zip(base.said, now, strict=True)),
        asked=len(base.neighbours),
        norm=apply.relative_norm(host, patch),
        fixed=sum(fixed),
        wanted=len(fixed),
        scale=s,
    )


def fit(
    host: Host, patch: Patch, budget: Budget, base: Baseline, rounds: int = 6, progress: Progress = no_progress
) -> tuple[Patch, Verdict]:
    """`patch` as it is if it costs no more than the budget allows, else base + s * change with the largest s that is found.

    The verdict that comes back may still have failed: a scaled patch that no longer fixes its examples is not a fix. Raises WrongBase.
    """
    whole = judge(host, patch, budget, base)
    if whole.affordable:
        return patch, whole
    # the bound of a first look is wide: how far to go can only be told from the whole text
    _, whole = _judge(host, patch, 1.0, budget, base, thorough=True)
    if whole.affordable:
        return patch, whole
    tried: dict[float, tuple[Patch, Verdict]] = {}
    steps = iter(progress(range(rounds), "scaling onto the edge of the budget", rounds))

    def read(s: float) -> tuple[Float[Tensor, "N 2"], bool]:
        next(steps, None)
        tried[s] = _judge(host, patch, s, budget, base, thorough=True)
        # it may be too costly in other ways too: its norm, its neighbours
        verdict = tried[s][1]
        return torch.cat(base.after[patch.id, s]), verdict.affordable or not verdict.upper <= budget.epsilon

    # whatever budget they were read for
    known = {s: torch.cat(parts) for (of, s), parts in base.after.items() if of == patch.id and len(parts) == len(base.looks)}
    s = hosts.furthest(read, known, torch.cat(base.losses), budget.epsilon, QUANTILES[len(base.looks)][-1], rounds)
    return tried.get(s, (patch, whole))


def require(verdict: Verdict) -> None:
    """Raises BudgetError with the numbers unless the verdict passed."""
    if not verdict.passed:
        scaled = f" even scaled to {verdict.scale:.3g}" if verdict.scale != 1 else ""
        raise BudgetError(f"Patch {verdict.patch} is refused{scaled}: {'; '.join(verdict.failures)}.")
