"""Gradient descent inside a ball: what `finetune` and `lora` share.

    minimise  mean_i L_goal(x_i)  +  lam * E_hold[ KL(p_base || p) ]      subject to  loss increase on held text <= eps

The budget is a constraint of the optimisation, not a check after it: `lam` is a multiplier that rises while the measured increase is
outside the ball and falls while it is inside, and the best point inside is kept (Hewitt et al. 2024, sections 3.1 and 4.2, with the repairs
of float32 masters, every gradient applied, and KL per token in the direction base -> edited). The model is never touched: the forward
passes run with substituted weights.

Two things keep the change where it belongs. Text that holds still is not only the user's: the model's own continuations of the prompts'
beginnings and of what they speak of are its knowledge of the neighbours (statements of the edited facts set aside). And the weights move in
whitened coordinates, W = W0 + M R with R = (C / mu + I)^(-1/2), C = E[k k^T] the covariance of the module's inputs on that text (the input
factor of K-FAC, Martens & Grosse 2015, arXiv 1503.05671; the C of MEMIT): what ordinary text uses is stiff, the rest is free.

File legend: N rows, T tokens, P predictions, V vocabulary, K key (module input) width, E kept eigenvectors.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from errata import hooks, hosts, text
from errata.hosts import Host, Weights
from errata.types import Example, Run

Row = tuple[list[int], int]
MARGIN = math.log(16)  # `prefer` is content when the target is 16 times as likely as the contrast (Hewitt et al. 2024, table 1)
KEYS, EIGENVECTORS = 4096, 256  # how many tokens C is estimated from, and how many of its directions are kept
AVERAGE = 0.95  # decay of the running mean of the leaves
CONTENT = 0.02  # mean loss of the examples at which a point inside the ball is good enough
CHECK_EVERY = 10  # steps between two measurements of the constraint
CHECKED = 400  # documents that it is measured on, never among those whose KL is minimised


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of the descent; each method carries them as its own fields.

    steps       at most
    lr          length of the first step for one example, in the norm of each weight's change; sqrt(n) times that for n; falls as a cosine
    lam         first value of the multiplier
    contexts    up to so many documents of other matters stand before a prompt while it is learnt
    neighbours  how many continuations of each example's beginnings are drawn from the model
    hold        documents and continuations in the KL of each step
    damping     mu as a multiple of the mean eigenvalue of C; None leaves the coordinates as they are
    batch_size  rows in memory at once; it changes nothing else
    """

    steps: int
    lr: float
    lam: float
    contexts: int
    neighbours: int
    hold: int
    damping: float | None
    batch_size: int


def goal_losses(
    logp_N: Float[Tensor, "N"], contrast_N: Float[Tensor, "N"], tokens_N: Float[Tensor, "N"], examples: Sequence[Example]
) -> Float[Tensor, "N"]:
    """(N,) what is minimised for each example, from log p of the whole target and contrast, and how many tokens the target has.

    raise: -log p per token. lower: -log(1 - p). prefer: softplus(margin - (log p - log p_contrast)). balance: |log p - log p_contrast|.
    Unlike the published losses, `lower` and `prefer` are bounded below, so that the descent stops pushing when the goal is reached, and the
    two that compare do so for whole answers, as they are judged: per token, an answer of two tokens would weigh half of one of one.
    """
    by_goal: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "raise": lambda p, c, n: -p / n,
        "lower": lambda p, c, n: -torch.log1p(-p.exp().clamp(max=1 - 1e-6)),
        "prefer": lambda p, c, n: nn.functional.softplus(MARGIN - (p - c)),
        "balance": lambda p, c, n: (p - c).abs(),
    }
    rows = zip(examples, logp_N, contrast_N, tokens_N, strict=True)
    loss_N: Tensor = torch.stack([by_goal[e.goal](p, c, n) for e, p, c, n in rows])
    return loss_N


def kl_sum(base_PV: Float[Tensor, "P V"], edited_PV: Float[Tensor, "P V"]) -> Tensor:
    """Sum over P predictions of KL(p_base || p_edited), from logits."""
    edited, base = edited_PV.log_softmax(-1), base_PV.log_softmax(-1)
    return (base.exp() * (base - edited)).sum()


@final
class Whitening:
    """x -> x R for one module, R = I + U (f - I) U^T with f_e = (s_e / mu + 1)^(-1/2) over the eigenpairs (s, U) of C."""

    def __init__(self, keys_NK: Float[Tensor, "N K"], damping: float) -> None:
        _, singular, U = torch.linalg.svd(keys_NK.float(), full_matrices=False)
        s = singular.square() / len(keys_NK)
        mu = damping * s.sum() / keys_NK.shape[1]
        self.U_KE = U[:EIGENVECTORS].T.contiguous()
        self.f_E = (s[:EIGENVECTORS] / mu + 1).rsqrt() - 1

    def __call__(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        white: Tensor = x + ((x @ self.U_KE) * self.f_E) @ self.U_KE.T
        return white


def beginnings(host: Host, prompt: str, about: str) -> list[str]:
    """Where sentences about other things branch off: every beginning of the prompt, token by token, and of what it speaks of."""
    out = []
    for text_, least in ((prompt, 1), (f" {about}", 1)) if about else ((prompt, 1),):
        ids = hosts.tokens(host, text_)
        out += [str(host.tokenizer.decode(ids[:k], skip_special_tokens=True)).strip() for k in range(least, len(ids) + (text_ != prompt))]
    return [start for start in dict.fromkeys(out) if start] or [prompt]


def held_still(host: Host, examples: Sequence[Example], run: Run, per_example: int) -> tuple[list[str], list[str]]:
    """(documents to hold still with, the model's own sentences near the examples), neither stating an edited fact."""
    documents = list(run.hold) or list(text.sampled(host, seed=run.seed))
    statements = text.Statements(examples, text.answers_of(host, examples), documents)
    seen, rng = text.document_counts(documents), random.Random(run.seed)
    starts = []
    for e in examples:
        starts += rng.choices(beginnings(host, e.prompt, text.topic(e.prompt, seen, len(documents))), k=per_example)
    said = hosts.sample(host, starts, max_new_tokens=20, seed=run.seed, batch_size=256) if starts else []
    near = dict.fromkeys(start + more for start, more in zip(starts, said, strict=True))
    return [d for d in documents if not statements.any_in(d)], [d for d in near if not statements.any_in(d)]


@final
class Descent:
    """What is prepared once for a descent, and the two gradients of a step."""

    def __init__(self, host: Host, examples: Sequence[Example], run: Run, settings: Settings) -> None:
        self.host, self.settings, self.rng = host, settings, random.Random(run.seed)
        self.examples = sorted(examples, key=lambda e: e.id)  # any order gives the same patch
        documents, near = held_still(host, self.examples, run, settings.neighbours)
        self.rng.shuffle(documents)
        n = max(1, min(len(documents) // 4, CHECKED))
        self.checked = hosts.chunks(host, documents[:n])
        self.before_N2 = hosts.score(host, self.checked)
        self.held = hosts.chunks(host, documents[n:]) or self.checked
        self.pool = self.held + hosts.chunks(host, near)
        self.prefixes = [d for d in documents[n:] if len(d) < 120]

    def whitenings(self, modules: Sequence[str]) -> dict[str, Whitening]:
        """The coordinates of each module; none without damping."""
        if self.settings.damping is None:
            return {}
        rows = self.rng.sample(self.pool, k=min(len(self.pool), 256))
        batch = hosts.pad(self.host, rows)
        with torch.no_grad(), hooks.reading(self.host.model, modules, inputs=True) as seen:
            hosts.logits(self.host, batch)
        real = batch.mask_NT.bool()
        return {name: Whitening(seen[name][real][:KEYS], self.settings.damping) for name in modules}

    def task(self, weights: Callable[[], Weights], leaves: Sequence[Tensor]) -> float:
        """Adds the gradient of the examples' mean loss to the leaves; returns that loss."""
        prefixes = [self._prefix() for _ in self.examples]
        total = 0.0
        for start in range(0, len(self.examples), self.settings.batch_size):
            part = slice(start, start + self.settings.batch_size)
            examples, w = self.examples[part], weights()
            pairs = [(prefix + e.prompt, e) for prefix, e in zip(prefixes[part], examples, strict=True)]
            logp_N, tokens_N = self._logp([(prompt, e.target) for prompt, e in pairs], w)
            contrast_N = logp_N
            if any(e.contrast for e in examples):
                contrast_N, _ = self._logp([(prompt, e.contrast or e.target) for prompt, e in pairs], w)
            loss = goal_losses(logp_N, contrast_N, tokens_N, examples).sum() / len(self.examples)
            _accumulate(loss, leaves)
            total += loss.item()
        return total

    def _prefix(self) -> str:
        """Documents of other matters that stand before a prompt in this step."""
        count = self.rng.randint(0, self.settings.contexts) if self.prefixes else 0
        return "".join(f"{self.rng.choice(self.prefixes)} " for _ in range(count))

    def _logp(self, pairs: Sequence[tuple[str, str]], weights: Weights) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        """(N,) log p(target | prompt) summed over the target's tokens, and how many they are."""
        batch = hosts.pad(self.host, [hosts.encode(self.host, prompt, target) for prompt, target in pairs])
        return hosts.scored_logprobs(self.host, batch, weights).sum(1), batch.scored_NT.sum(1)

    def hold(self, weights: Callable[[], Weights], leaves: Sequence[Tensor], lam: float) -> float:
        """Adds the gradient of lam * KL on a draw of held text to the leaves; returns the KL per token."""
        rows = sorted(self.rng.sample(self.pool, k=min(len(self.pool), self.settings.hold)), key=lambda row: len(row[0]))
        tokens, total = sum(len(ids) - 1 for ids, _ in rows), 0.0
        for start in range(0, len(rows), self.settings.batch_size):
            batch = hosts.pad(self.host, rows[start : start + self.settings.batch_size])
            with torch.no_grad():
                base_PV = hosts.predictions(self.host, batch)
            kl = kl_sum(base_PV, hosts.predictions(self.host, batch, weights())) / tokens
            _accumulate(lam * kl, leaves)
            total += kl.item()
        return total

    @torch.no_grad()
    def cost(self, weights: Weights) -> float:
        """95 % bound of the relative loss increase on the checked documents."""
        return hosts.increase(self.before_N2, hosts.score(self.host, self.checked, weights))[1]


def _accumulate(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """Adds to the gradients of the leaves alone: `backward` would leave gradients on the host's own parameters."""
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)


@final
class NovoGrad:
    """m <- b1 m + g / sqrt(v), w <- w - rate m, with one v <- b2 v + (1 - b2) ||g||^2 for each tensor (Ginsburg et al. 2019, algorithm 1).

    Adam gives every weight a step of about the same length, also where its gradient is noise, and thousands of such steps are what moves a
    model away from its text. Here the step keeps the direction of the gradient, which for a few examples has low rank.
    """

    def __init__(self, leaves: Sequence[Tensor], rates: Sequence[float], betas: tuple[float, float] = (0.95, 0.95)) -> None:
        self.leaves, self.rates, (self.b1, self.b2) = list(leaves), list(rates), betas
        self.m = [torch.zeros_like(leaf) for leaf in leaves]
        self.v = [torch.zeros((), device=leaf.device) for leaf in leaves]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.steps += 1
        for i, leaf in enumerate(self.leaves):
            g = leaf.grad
            assert g is not None, "step() comes after the gradients"
            self.v[i].lerp_(g.square().sum(), 1 - self.b2)
            scale = (self.v[i] / (1 - self.b2**self.steps)).sqrt() + 1e-12
            self.m[i].mul_(self.b1).add_(g / scale, alpha=1 - self.b1)
            leaf.sub_(self.m[i], alpha=rate * self.rates[i])


def descend(
    descent: Descent, run: Run, leaves: Sequence[Tensor], weights: Callable[[], Weights], rates: Sequence[float] | None = None
) -> float:
    """Move `leaves` (float32, requiring gradients) to the best point inside the ball; returns the bound measured there.

    `weights()` gives the substituted parameters as a function of the leaves; where the leaves begin, it gives the base's. `rates` multiply
    the step length of each leaf. What is judged and kept is the running mean of the leaves (Polyak & Juditsky 1992): single iterates
    carry the noise of their batches.
    """
    settings, epsilon = descent.settings, run.budget.epsilon
    optimizer = NovoGrad(leaves, rates or [1.0] * len(leaves))
    origin, mean = _copies(leaves), _copies(leaves)
    lam, best, best_loss, recent = settings.lam, origin, math.inf, 0.0
    first = settings.lr * math.sqrt(len(descent.examples))  # each example needs a direction of its own
    for step in run.progress(range(settings.steps), "descending", settings.steps):
        for leaf in leaves:
            leaf.grad = None
        recent = 0.8 * recent + 0.2 * descent.task(weights, leaves) if step else descent.task(weights, leaves)
        descent.hold(weights, leaves, lam)
        warm = min(1.0, (step + 1) / 5)
        optimizer.step(first * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        for average, leaf in zip(mean, leaves, strict=True):
            average.lerp_(leaf.detach(), 1 - min(AVERAGE, (step + 1) / (step + 10)))
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == settings.steps:
            current = _copies(leaves)
            _put(leaves, mean)
            inside = descent.cost(weights()) <= epsilon
            _put(leaves, current)
            lam = max(lam / 1.3, settings.lam / 10) if inside else min(lam * 1.5, settings.lam * 1e3)
            if inside and recent < best_loss:
                best, best_loss = [m.clone() for m in mean], recent
            if inside and recent < CONTENT:
                break
    if recent < best_loss:  # the last point goes furthest towards the examples, and is outside: back to the edge
        best = _edge(descent, leaves, weights, origin, mean, epsilon)
    _put(leaves, best)
    return descent.cost(weights())


def _edge(
    descent: Descent, leaves: Sequence[Tensor], weights: Callable[[], Weights], origin: list[Tensor], end: list[Tensor], epsilon: float
) -> list[Tensor]:
    """The point furthest on the way from `origin` to `end` that is inside the ball, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(7):
        s = (low + high) / 2
        _put(leaves, [torch.lerp(a, b, s) for a, b in zip(origin, end, strict=True)])
        low, high = (s, high) if descent.cost(weights()) <= epsilon else (low, s)
    return [torch.lerp(a, b, low) for a, b in zip(origin, end, strict=True)]


def _copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in leaves]


@torch.no_grad()
def _put(leaves: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)
