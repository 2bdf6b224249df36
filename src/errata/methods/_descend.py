"""Gradient descent inside a ball: what `finetune` and `lora` share.

    minimise  mean_i L_goal(x_i)  +  lam * E_hold[ KL(p_base || p) ]      subject to  loss increase on held text <= eps

The budget is a constraint of the optimisation, not a check after it: `lam` is a multiplier that rises while the measured increase is
outside the ball and falls while it is inside, and the best point inside is kept (Hewitt et al. 2024, sections 3.1 and 4.2, with the repairs
of our spec: float32 masters, every gradient applied, KL per token in the direction base -> edited). The model is never touched: the forward
passes run with substituted weights.

File legend: N rows, T tokens, V vocabulary.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from errata import hosts, text
from errata.hosts import Batch, Host, Weights
from errata.types import Example, Run

Row = tuple[list[int], int]
MARGIN = math.log(16)  # `prefer` is content when the target is 16 times as likely as the contrast (Hewitt et al. 2024, table 1)


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of the descent; each method carries them as its own fields."""

    steps: int
    lr: float
    lam: float
    contexts: int
    neighbours: int
    hold: int
    batch_size: int


def goal_losses(logp_N: Float[Tensor, "N"], contrast_N: Float[Tensor, "N"], examples: Sequence[Example]) -> Float[Tensor, "N"]:
    """(N,) what is minimised for each example, from mean log-probabilities per token of target and contrast.

    raise: -log p. lower: -log(1 - p). prefer: softplus(margin - (log p - log p_contrast)). balance: |log p - log p_contrast|.
    Unlike the published losses, `lower` and `prefer` are bounded below, so that the descent stops pushing when the goal is reached.
    """
    by_goal = {
        "raise": lambda p, c: -p,
        "lower": lambda p, c: -torch.log1p(-p.exp().clamp(max=1 - 1e-6)),
        "prefer": lambda p, c: nn.functional.softplus(MARGIN - (p - c)),
        "balance": lambda p, c: (p - c).abs(),
    }
    return torch.stack([by_goal[e.goal](p, c) for e, p, c in zip(examples, logp_N, contrast_N, strict=True)])


def kl_per_token(base_NTV: Float[Tensor, "N T V"], edited_NTV: Float[Tensor, "N T V"], batch: Batch) -> Tensor:
    """Sum over the scored tokens of KL(p_base || p_edited) at the position that predicts them."""
    base = torch.log_softmax(base_NTV[:, :-1].float(), dim=-1)
    edited = torch.log_softmax(edited_NTV[:, :-1].float(), dim=-1)
    kl_NT = (base.exp() * (base - edited)).sum(-1)
    return (kl_NT * batch.scored_NT[:, 1:]).sum()


@final
class Descent:
    """One descent: what is prepared once, and the step. Made by `descend`."""

    def __init__(self, host: Host, examples: Sequence[Example], run: Run, settings: Settings) -> None:
        self.host, self.run, self.settings = host, run, settings
        self.examples = sorted(examples, key=lambda e: e.id)  # any order gives the same patch
        self.rng = random.Random(run.seed)
        documents = list(run.hold) or list(text.sampled(host, seed=run.seed))
        statements = text.Statements(self.examples, text.answers_of(host, self.examples), documents)
        documents = [d for d in documents if not statements.any_in(d)]
        near = [d for d in self._own_neighbours() if not statements.any_in(d)]
        self.rng.shuffle(documents)
        held = max(1, len(documents) // 3)
        self.check = hosts.chunks(host, documents[:held])[:600]
        self.held = hosts.chunks(host, documents[held:])
        self.near = hosts.chunks(host, near)
        self.before_N2 = hosts.score(host, self.check)
        self.prefixes = [d for d in documents[held:] if len(d) < 160] or [""]

    def _own_neighbours(self) -> list[str]:
        """What the model itself says after the beginnings of the prompts: the same kind of sentence about other things."""
        starts = []
        for e in self.examples:
            words = e.prompt.split(" ")
            starts += [" ".join(words[:k]) for k in range(1, min(len(words), 8))]
        if not starts or self.settings.neighbours == 0:
            return []
        starts = sorted(set(starts))
        drawn = [self.rng.choice(starts) for _ in range(self.settings.neighbours)]
        said = hosts.sample(self.host, drawn, max_new_tokens=24, seed=self.run.seed)
        return [start + more for start, more in zip(drawn, said, strict=True)]

    def rows(self, answers: Sequence[str | None]) -> list[Row]:
        """One row for each example; some steps put a document of other matters in front of the prompt."""
        out = []
        for e, answer in zip(self.examples, answers, strict=True):
            prefix = self._prefixes_now[e.id]
            out.append(hosts.encode(self.host, prefix + e.prompt, answer if answer is not None else e.target))
        return out

    def draw_prefixes(self) -> None:
        self._prefixes_now = {}
        for e in self.examples:
            k = self.rng.randint(0, self.settings.contexts)
            self._prefixes_now[e.id] = "".join(f"{self.rng.choice(self.prefixes)} " for _ in range(k))

    def mean_logp(self, rows: list[Row], weights: Weights) -> Float[Tensor, "N"]:
        batch = hosts.pad(self.host, rows)
        logp_NT = hosts.token_logprobs(hosts.logits(self.host, batch, weights), batch)
        return logp_NT.sum(1) / batch.scored_NT.sum(1)

    def task_step(self, weights: Callable[[], Weights]) -> float:
        """Adds the gradient of the examples' mean loss; returns that loss."""
        self.draw_prefixes()
        targets, contrasts = self.rows([e.target for e in self.examples]), self.rows([e.contrast for e in self.examples])
        total, size = 0.0, self.settings.batch_size
        for start in range(0, len(self.examples), size):
            part = slice(start, start + size)
            w = weights()
            logp_N = self.mean_logp(targets[part], w)
            contrast_N = self.mean_logp(contrasts[part], w) if any(e.contrast for e in self.examples[part]) else logp_N
            loss = goal_losses(logp_N, contrast_N, self.examples[part]).sum() / len(self.examples)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def hold_step(self, weights: Callable[[], Weights], lam: float) -> float:
        """Adds the gradient of lam * KL on a batch of held text; returns the KL per token."""
        rows = self.rng.choices(self.held, k=self.settings.hold)
        if self.near:
            rows += self.rng.choices(self.near, k=self.settings.hold)
        tokens = sum(len(ids) - 1 for ids, _ in rows)
        total, size = 0.0, self.settings.batch_size
        rows.sort(key=lambda r: len(r[0]))
        for start in range(0, len(rows), size):
            batch = hosts.pad(self.host, rows[start : start + size])
            with torch.no_grad():
                base_NTV = hosts.logits(self.host, batch)
            kl = kl_per_token(base_NTV, hosts.logits(self.host, batch, weights()), batch) / tokens
            (lam * kl).backward()  # type: ignore[no-untyped-call]
            total += kl.item()
        return total

    def cost(self, weights: Weights) -> float:
        """95 % bound of the relative loss increase on the checked documents."""
        return hosts.increase(self.before_N2, hosts.score(self.host, self.check, weights))[1]


def descend(host: Host, examples: Sequence[Example], run: Run, settings: Settings, leaves: Sequence[Tensor], weights: Callable[[], Weights]) -> float:
    """Move `leaves` (float32, requiring gradients) to the best point inside the ball. Returns its measured increase.

    `weights()` gives the substituted parameters as a function of the leaves.
    """
    descent = Descent(host, examples, run, settings)
    optimizer = torch.optim.Adam(leaves, lr=settings.lr, betas=(0.9, 0.99), eps=1e-7)
    lam, epsilon = settings.lam, run.budget.epsilon
    best = [leaf.detach().clone() for leaf in leaves]
    best_cost = 0.0
    every = 10
    for step in run.progress(range(settings.steps), "descending", settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps)) * min(1, (step + 1) / 5)
        optimizer.zero_grad(set_to_none=True)
        loss = descent.task_step(weights)
        kl = descent.hold_step(weights, lam)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            with torch.no_grad():
                cost = descent.cost(weights())
            if DEBUG:
                DEBUG(step, loss, kl, lam, cost, weights)
            if cost <= epsilon:
                best = [leaf.detach().clone() for leaf in leaves]
                best_cost = cost
                lam = max(lam / 1.3, settings.lam / 10)
            else:
                lam = min(lam * 1.5, settings.lam * 1e4)
    with torch.no_grad():
        for leaf, value in zip(leaves, best, strict=True):
            leaf.copy_(value)
    return best_cost


DEBUG = None
