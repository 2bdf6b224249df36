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

import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from errata import hooks, hosts, text
from errata.hosts import Host, Weights
from errata.methods._restated import DOCUMENTS, Spoken, asking, restated, spoken_of
from errata.types import Example, Run

Row = tuple[list[int], int]
Metric = Callable[[Tensor], Tensor]
MARGIN = math.log(16)  # `prefer` is content when the target is 16 times as likely as the contrast (Hewitt et al. 2024, table 1)
KEYS, EIGENVECTORS = 512, 256  # how many rows C is estimated from at most, and how many of its directions are kept
PASS = 512  # tokens that go through the model at once where gradients are taken: more take memory, and no less time on a CPU
CACHED = 1 << 18  # logits that a processor keeps near
AVERAGE = 0.95  # decay of the running mean of the leaves
RARE = 0.001  # what `lower` is to bring the probability under (the same table)
EVEN = 0.1  # nats; two answers of `balance` that are no further apart are all but even
ENOUGH = 0.3  # nats; `raise` is content when the whole target has p = .74, for then every token of it is what is said
CONTENT = 0.02  # mean loss of the examples at which a point inside the ball is good enough
PROMPTS = 8  # of each step, at least: where the examples are fewer, each is asked in several ways at once
DRAWN = 256  # examples of each step, at most: where there are more, they take turns at random
CHECK_EVERY = 16  # steps between two measurements of the constraint
HURT = 0.3  # nats that a held row has lost when it counts as hurt
LAM_STEP = 1.2  # what the multiplier rises by where the increase is over epsilon, and falls by where it is under a share of it
SLACK, SLACK_OF_MANY = 0.5, 0.75  # that share; of more than `DRAWN` examples, of which each comes seldom, less room is left unused
FLAT = 0.6  # of the steps of a descent of so many go by before the rate falls
EDGE = 1500  # documents on which the edge of the ball is sought, at least: the gate reads others, and more
EACH = 20  # documents for each example, at least: the more is changed, the more may flip
LOOKS = (150, 500, 1500, 4000)  # documents that it is measured on, never among those whose KL is minimised: no more of them than it takes


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of the descent; each method carries them as its own fields.

    steps       at most; of more than `DRAWN` examples that many for each `DRAWN`
    lr          length of the first step for one example, in the norm of each weight's change; sqrt(n) times that for n, and of more than
                `DRAWN` less again by the root of how many more; falls as a cosine, for so many in the last two fifths of the steps
    lam         first value of the multiplier
    contexts    up to so many documents of other matters stand before a prompt while it is learnt
    restated    up to so many other ways of asking for each example's fact, from the text that holds still (see `_restated.py`)
    neighbours  how many continuations of each example's beginnings are drawn from the model
    hold        documents and continuations in the KL of each step
    searched    held rows in which what was hurt most is looked for at each check; it then makes up to half of each step's held rows
    damping     mu as a multiple of the mean eigenvalue of C; None leaves the coordinates as they are
    batch_size  rows in memory at once, at most; it changes nothing else
    tried       documents in which other ways of asking are looked for, for prompts that differ in what they speak of alone
    """

    steps: int
    lr: float
    lam: float
    contexts: int
    restated: int
    neighbours: int
    hold: int
    searched: int
    damping: float | None
    batch_size: int
    tried: int = DOCUMENTS


def goal_losses(
    logp_N: Float[Tensor, "N"],
    contrast_N: Float[Tensor, "N"],
    tokens_N: Float[Tensor, "N"],
    examples: Sequence[Example],
    enough: float = ENOUGH,
) -> Float[Tensor, "N"]:
    """(N,) what is minimised for each example, from log p of the whole target and contrast, and how many tokens the target has.

    raise: what -log p exceeds `enough` by, per token. lower: softplus(log p - log RARE). prefer: softplus(MARGIN - (log p - log
    p_contrast)). balance: |log p - log p_contrast|, rounded off (Huber) below `EVEN`, so that a solver which trusts gradients comes to
    rest there. Unlike the published losses, all are bounded below, so that the descent stops pushing where the goal is reached: certainty
    that nobody asked for is paid for elsewhere. The two that compare do so for whole answers, as they are judged: per token, an answer of
    two tokens would weigh half of one of one.
    """
    by_goal: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "raise": lambda p, c, n: (-p - enough).clamp(min=0) / n,
        "lower": lambda p, c, n: nn.functional.softplus(p - math.log(RARE)),
        "prefer": lambda p, c, n: nn.functional.softplus(MARGIN - (p - c)),
        "balance": lambda p, c, n: nn.functional.huber_loss(p, c, reduction="none", delta=EVEN) / EVEN,
    }
    losses_N = torch.empty_like(logp_N)
    for goal in {e.goal for e in examples}:
        (index,) = torch.tensor([e.goal == goal for e in examples], device=logp_N.device).nonzero(as_tuple=True)
        losses_N = losses_N.index_put((index,), by_goal[goal](logp_N[index], contrast_N[index], tokens_N[index]))
    return losses_N


def kl_sum(base_PV: Float[Tensor, "P V"], edited_PV: Float[Tensor, "P V"]) -> Tensor:
    """Sum over P predictions of KL(p_base || p_edited), from logits; differentiable once, in the edited ones."""
    total: Tensor = _KL.apply(base_PV, edited_PV)  # type: ignore[no-untyped-call]
    return total


@final
class _KL(torch.autograd.Function):
    """The gradient in the edited logits is q - p. It is found while p and q are at hand, some predictions at a time: with a large
    vocabulary each (P, V) matrix in between would take more memory than the model, and more time than the head."""

    @staticmethod
    def forward(ctx: Any, base_PV: Tensor, edited_PV: Tensor) -> Tensor:
        grad_PV, total = torch.empty_like(edited_PV), edited_PV.new_zeros(())
        rows = max(1, CACHED // edited_PV.shape[1])
        for base, edited, grad in zip(*(torch.split(x, rows) for x in (base_PV, edited_PV, grad_PV)), strict=True):
            logp, logq = base.log_softmax(-1), edited.log_softmax(-1)
            p = logp.exp()
            total += torch.dot(p.flatten(), logp.sub_(logq).flatten())
            torch.sub(logq.exp_(), p, out=grad)
        ctx.save_for_backward(grad_PV)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor]:
        (grad_PV,) = ctx.saved_tensors
        return None, grad_PV * outer[0]


@final
class Whitening:
    """x -> x R for one module, R = I + U (f - I) U^T with f_e = (s_e / mu + 1)^(-1/2) over the eigenpairs (s, U) of C, given
    with s ascending."""

    def __init__(self, s_K: Float[Tensor, "K"], U_KK: Float[Tensor, "K K"], damping: float) -> None:
        mu = damping * s_K.mean()
        self.U_KE = U_KK[:, -EIGENVECTORS:].contiguous()
        self.f_E = (s_K[-EIGENVECTORS:].clamp(min=0) / mu + 1).rsqrt() - 1

    def __call__(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        white: Tensor = x + ((x @ self.U_KE) * self.f_E) @ self.U_KE.T
        return white

    def twice(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """x R R."""
        if len(self.U_KE) == len(self.f_E):  # one product is half of two
            return x @ self._twice_KK
        white: Tensor = x + ((x @ self.U_KE) * (self.f_E * (self.f_E + 2))) @ self.U_KE.T
        return white

    @functools.cached_property
    def _twice_KK(self) -> Float[Tensor, "K K"]:
        whole_KK: Tensor = (self.U_KE * (self.f_E + 1).square()) @ self.U_KE.T
        return whole_KK


def beginnings(host: Host, prompt: str, about: str) -> list[str]:
    """Where sentences about other things branch off: every beginning of the prompt, token by token, and of what it speaks of."""
    out = []
    for text_, least in ((prompt, 1), (f" {about}", 1)) if about else ((prompt, 1),):
        ids = hosts.tokens(host, text_)
        out += [str(host.tokenizer.decode(ids[:k], skip_special_tokens=True)).strip() for k in range(least, len(ids) + (text_ != prompt))]
    return [start for start in dict.fromkeys(out) if start] or [prompt]


def near(host: Host, examples: Sequence[Example], spoken: Sequence[Spoken], per_example: int, seed: int) -> list[str]:
    """The model's own sentences near the examples, but for those that come to where an edited fact must be told: there it has to change."""
    if host.kind != "causal":  # it writes no sentences of its own
        return []
    rng = random.Random(seed)
    starts = [
        (start, own)
        for e, own in zip(examples, spoken, strict=True)
        for start in rng.choices(beginnings(host, e.prompt, own.topic), k=per_example)
    ]
    begun = tuple(start for start, _ in starts)
    said = hosts.remembered(
        host, ("sample", begun, seed), lambda: hosts.sample(host, begun, max_new_tokens=20, seed=seed, batch_size=256) if begun else []
    )
    whole = list(dict.fromkeys((start + more, own) for (start, own), more in zip(starts, said, strict=True)))
    return list(dict.fromkeys(sentence for (sentence, _), asks in zip(whole, asking(host, whole), strict=True) if not asks))


class Reader(Protocol):
    """How a descent learns what the host says of rows, as if `weights` were its own; gradients flow to them."""

    def logp(self, rows: Sequence[Row], weights: Weights) -> Float[Tensor, "N"]:
        """(N,) log-probability of the scored tokens of each row together."""

    def both(self, rows: Sequence[Row], weights: Weights) -> tuple[Float[Tensor, "P V"], Float[Tensor, "P V"]]:
        """Logits that predict the scored tokens, of the base and under `weights`; places where they cannot differ may be left out."""

    def score(self, rows: Sequence[Row], weights: Weights | None = None) -> Float[Tensor, "N 2"]:
        """As `hosts.score`."""


@final
@dataclass(frozen=True, kw_only=True)
class Through:
    """Reads through the whole model."""

    host: Host

    def logp(self, rows: Sequence[Row], weights: Weights) -> Float[Tensor, "N"]:
        return hosts.scored_logprobs(self.host, hosts.pad(self.host, rows), weights).sum(1)

    def both(self, rows: Sequence[Row], weights: Weights) -> tuple[Float[Tensor, "P V"], Float[Tensor, "P V"]]:
        batch = hosts.pad(self.host, rows)
        with torch.no_grad():
            base_PV = hosts.predictions(self.host, batch)
        return base_PV, hosts.predictions(self.host, batch, weights)

    def score(self, rows: Sequence[Row], weights: Weights | None = None) -> Float[Tensor, "N 2"]:
        return hosts.base_score(self.host, rows) if weights is None else hosts.score(self.host, rows, weights)


@final
class Descent:
    """What is prepared once for a descent, and the two gradients of a step. `ways`, where it is given, are the prompts that each example
    is asked with; else they are drawn anew in each step. `prior` is what else the weights cost, in nats per token of held text."""

    def __init__(self, host: Host, examples: Sequence[Example], run: Run, settings: Settings) -> None:
        more = max(1.0, len(examples) / DRAWN)  # as many turns for each of many as for each of few, on a way longer by the root of it
        settings = replace(settings, steps=round(settings.steps * more), lr=settings.lr / math.sqrt(more))
        self.check_every = CHECK_EVERY * round(math.sqrt(more))
        self.host, self.settings, self.rng = host, settings, random.Random(run.seed)
        self.reader: Reader = Through(host=host)
        self.ways: list[list[str]] = []
        self.lost = [math.inf] * len(examples)  # the loss of each when it was asked last
        self.prior: Callable[[Weights], Tensor] | None = None
        self.examples = sorted(examples, key=lambda e: e.id)  # any order gives the same patch
        given = run.hold or text.sampled(host, seed=run.seed)
        seen = text.document_counts(given)
        spoken = spoken_of(host, self.examples, seen, len(given))
        answers = [text.in_play(e, own.old) for e, own in zip(self.examples, spoken, strict=True)]
        statements = text.Statements(self.examples, answers, seen, len(given))
        documents = [d for d in given if not statements.any_in(d)]
        self.rng.shuffle(documents)
        n = max(2, min(len(documents) // 3, LOOKS[-1]))  # the bound needs two
        others = documents[n:]
        drawn = others[: max(settings.searched, settings.steps * settings.hold)]  # more are never needed
        self.looks = [documents[a : min(b, n)] for a, b in zip((0, *LOOKS), LOOKS, strict=False) if a < n]
        self.checked: list[list[Row]] = []  # their rows, and what the base gives them, once they are needed
        self.before_N2 = torch.zeros(0, 2, dtype=torch.float64)
        self.read: list[Tensor] = []  # what they were under the weights whose cost was asked for last, look by look
        self.held = hosts.chunks(host, drawn or documents)
        said = near(host, self.examples, spoken, settings.neighbours, run.seed)
        self.pool = self.held + hosts.chunks(host, [sentence for sentence in said if not statements.any_in(sentence)])
        self.pool_N2 = torch.full((len(self.pool), 2), math.nan, dtype=torch.float64)  # base scores of those searched so far
        self.hurt: list[int] = []
        self.prefixes = [d for d in others if len(d) < 120 and host.kind == "causal"]  # others are whole questions
        ways = settings.restated
        if len(self.examples) > DRAWN:  # half of an example's turns ask in another way
            ways = min(ways, 1 + settings.steps * DRAWN // (2 * len(self.examples)))
        self.others = restated(host, self.examples, spoken, others, seen, ways, run.seed, settings.tried)

    def whitenings(self, modules: Sequence[str], outputs: bool = False) -> dict[str, Whitening]:
        """The coordinates of what each module reads, or with `outputs` of what reads it; none without damping."""
        if self.settings.damping is None:
            return {}
        # not those near the examples: there it must move; of the others about as many as the descent will read, as a power of two, so
        # that settings which differ little have one C
        wanted = 1 << (self.settings.steps * self.settings.hold - 1).bit_length()
        rows = self.rng.sample(self.held, k=min(len(self.held), KEYS, wanted))
        asked = ("eigenpairs", *modules, outputs, *((given, *ids) for ids, given in rows))
        found = hosts.remembered(self.host, asked, lambda: self._eigenpairs(rows, modules, outputs))
        return {name: Whitening(s_K, U_KK, self.settings.damping) for name, (s_K, U_KK) in found.items()}

    def _eigenpairs(self, rows: Sequence[Row], modules: Sequence[str], outputs: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Those of each module's C."""
        sums: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        for group in hosts.by_length(rows, 2048):
            batch = hosts.unscored(hosts.pad(self.host, [rows[i] for i in group]))
            with torch.no_grad(), hooks.reading(self.host.model, modules, inputs=not outputs) as seen:
                hosts.predictions(self.host, batch)
            for name in modules:
                keys_NK = seen[name][hosts.places(self.host, batch, name)].float()
                sums[name] = sums.get(name, 0) + keys_NK.T @ keys_NK
                tokens[name] = tokens.get(name, 0) + len(keys_NK)
        # float32 will do, for what is small is swamped by mu
        return {name: tuple(torch.linalg.eigh(C_KK / tokens[name])) for name, C_KK in sums.items()}

    def task(self, weights: Weights) -> float:
        """Adds the gradient of the mean loss of the examples, or of `DRAWN` of them, to that of the weights; returns that loss."""
        each = -(-PROMPTS // len(self.examples))
        turn = [i for i in self._turn() for _ in range(each)]
        asked = [
            (self.rng.choice(self.ways[i]) if self.ways else self.prompt(self.examples[i], self.others[i]), self.examples[i]) for i in turn
        ]
        rows, total = [hosts.encode(self.host, prompt, e.target) for prompt, e in asked], 0.0
        for group in self._together(rows):
            logp_N = contrast_N = self.reader.logp([rows[i] for i in group], weights)
            examples = [asked[i][1] for i in group]
            if any(e.contrast for e in examples):
                others = [hosts.encode(self.host, asked[i][0], asked[i][1].contrast or asked[i][1].target) for i in group]
                contrast_N = self.reader.logp(others, weights)
            tokens_N = torch.tensor([float(len(ids) - max(given, 1)) for ids, given in (rows[i] for i in group)], device=logp_N.device)
            losses_N = goal_losses(logp_N, contrast_N, tokens_N, examples)
            loss = losses_N.sum() / len(asked)
            _accumulate(loss, weights.values())
            total += loss.item()
            for i, lost in zip(group, losses_N.tolist(), strict=True):
                self.lost[turn[i]] = lost
        return total

    def _turn(self) -> Sequence[int]:
        """The examples of a step: all, or `DRAWN`, three quarters of them such as were not content when they were asked last."""
        n = len(self.examples)
        if n <= DRAWN:
            return range(n)
        wanting = [i for i in range(n) if self.lost[i] > CONTENT]
        first = self.rng.sample(wanting, k=min(len(wanting), 3 * DRAWN // 4))
        return first + self.rng.sample(sorted({*range(n)}.difference(first)), k=DRAWN - len(first))

    def prompt(self, example: Example, others: list[str]) -> str:
        """The example's own prompt in half of the steps, another way of asking in the others; documents of other matters before it."""
        asked = self.rng.choice(others) if others and self.rng.random() < 0.5 else example.prompt
        count = self.rng.randint(0, self.settings.contexts) if self.prefixes else 0
        whole = "".join(f"{self.rng.choice(self.prefixes)} " for _ in range(count)) + asked
        answers = max(len(a.encode()) for a in (example.target, example.contrast or ""))  # in bytes: no fewer than tokens
        return whole if len(hosts.tokens(self.host, whole)) + answers <= self.host.context else example.prompt

    def _together(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Indices of rows of similar length that go through the model at once."""
        for group in hosts.by_length(rows, PASS):
            for start in range(0, len(group), self.settings.batch_size):
                yield group[start : start + self.settings.batch_size]

    def hold(self, weights: Weights, lam: float) -> float:
        """Adds the gradient of lam * KL on a draw of held text to that of the weights; returns the KL per token."""
        hurt = self.rng.sample(self.hurt, k=min(len(self.hurt), self.settings.hold // 2))
        drawn = hurt + self.rng.sample(range(len(self.pool)), k=min(len(self.pool), self.settings.hold - len(hurt)))
        rows = [self.pool[i] for i in drawn]
        tokens, total = sum(len(ids) - given for ids, given in rows), 0.0
        for group in self._together(rows):
            kl = kl_sum(*self.reader.both([rows[i] for i in group], weights)) / tokens
            _accumulate(lam * kl, weights.values())
            total += kl.item()
        if self.prior:
            _accumulate(lam * self.prior(weights), weights.values())
        return total

    @torch.no_grad()
    def search(self, weights: Weights) -> None:
        """Find the held rows that have lost most: a flipped fact stands in few of them, and a plain draw seldom meets it."""
        n = min(self.settings.searched, len(self.pool))
        if not n:
            return
        found = sorted({*self.hurt, *self.rng.sample(range(len(self.pool)), k=n)})
        if new := [i for i in found if self.pool_N2[i].isnan().any()]:
            self.pool_N2[new] = self.reader.score([self.pool[i] for i in new])
        lost_N = self.pool_N2[found, 0] - self.reader.score([self.pool[i] for i in found], weights)[:, 0]
        order = lost_N.argsort(descending=True)[: 4 * self.settings.hold].tolist()
        self.hurt = [found[j] for j in order if lost_N[j] > HURT]

    @torch.no_grad()
    def cost(self, weights: Weights, epsilon: float) -> float:
        """Relative loss increase on the checked documents, read until it is a standard error away from `epsilon`, or to their end.

        An estimate, not a bound: it steers the descent. What counts is the gate's bound, on other text, and the gate scales what is left.
        """
        self.read, mean = [], math.inf
        for i in range(len(self.looks)):
            self.read.append(self._look(i, weights))
            after_N2 = torch.cat(self.read)
            if len(after_N2) < 2 or (len(after_N2) < EACH * len(self.examples) and i + 1 < len(self.looks)):
                continue
            mean, above = hosts.increase(self.before_N2[: len(after_N2)], after_N2, z=1.0)
            # among the first documents a single flipped fact would look like a point that is plainly outside
            if above <= epsilon or (i > 0 and 2 * mean - above > epsilon):
                break
        return mean

    @torch.no_grad()
    def upper(self, weights: Weights, z: float) -> float:
        """The relative loss increase on some of the checked documents, and `z` standard errors more."""
        after_N2 = self._edge(weights)
        return hosts.increase(self.before_N2[: len(after_N2)], after_N2, z)[1]

    @torch.no_grad()
    def furthest(self, weights: Callable[[float], Weights], epsilon: float, z: float = -1.0, read: Sequence[Tensor] = ()) -> float:
        """The largest s for which `upper` of `weights(s)`, of a way that begins at the base, is no more than `epsilon`, as far as can be
        told. 0.0 if none is found. `read`: what is known already of the end, look by look."""
        end_N2 = self._edge(weights(1.0), read)
        before_N2 = self.before_N2[: len(end_N2)]
        if hosts.increase(before_N2, end_N2, z)[1] <= epsilon:
            return 1.0
        return hosts.furthest(lambda s: (self._edge(weights(s)), True), {1.0: end_N2}, before_N2, epsilon, z)

    def _edge(self, weights: Weights, read: Sequence[Tensor] = ()) -> Float[Tensor, "N 2"]:
        """Scores of the checked documents that the edge of the ball is sought on."""
        needed = max(EDGE, EACH * len(self.examples))
        looks = [i for i in range(len(self.looks)) if i == 0 or LOOKS[i - 1] < needed]
        return torch.cat([read[i] if i < len(read) else self._look(i, weights) for i in looks])

    def _look(self, i: int, weights: Weights) -> Float[Tensor, "N 2"]:
        """Scores of part i of the checked documents; the base's too, once."""
        if i == len(self.checked):
            self.checked.append(hosts.chunks(self.host, self.looks[i]))
            self.before_N2 = torch.cat([self.before_N2, self.reader.score(self.checked[i])])
        return self.reader.score(self.checked[i], weights)


def _accumulate(loss: Tensor, weights: Iterable[Tensor]) -> None:
    """Adds to the gradients of these alone, one after the other: the host's own parameters get none."""
    loss.backward(inputs=list(weights))  # type: ignore[no-untyped-call]


def _gradients(descent: Descent, leaves: Sequence[Tensor], weights: Callable[[], Weights], lam: float) -> float:
    """Gives the leaves the gradient of one step; returns the examples' mean loss.

    The batches' gradients meet at the weights, and what they sum to goes from there to the leaves once: the way between, whitening or a
    product of factors, is the same for all of them, and costs as much as a batch.
    """
    for leaf in leaves:
        leaf.grad = None  # else those of the step before would lie beside the new ones
    through = weights()
    met = {name: weight.detach().requires_grad_() for name, weight in through.items()}
    loss = descent.task(met)
    descent.hold(met, lam)
    sums = [weight.grad for weight in met.values()]
    for leaf, grad in zip(leaves, torch.autograd.grad(list(through.values()), leaves, sums), strict=True):
        leaf.grad = grad
    return loss


@final
class NovoGrad:
    """m <- b1 m + g / sqrt(v), w <- w - rate m, with one v <- b2 v + (1 - b2) ||g||^2 for each tensor (Ginsburg et al. 2019, algorithm 1).

    Adam gives every weight a step of about the same length, also where its gradient is noise, and thousands of such steps are what moves a
    model away from its text. Here the step keeps the direction of the gradient, which for a few examples has low rank. A leaf with a metric
    steps along d = metric(g) instead, and <g, d> is what ||g||^2 is there.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        rates: Sequence[float],
        metrics: Sequence[Metric | None],
        betas: tuple[float, float] = (0.95, 0.95),
    ) -> None:
        self.leaves, self.rates, self.metrics, (self.b1, self.b2) = list(leaves), list(rates), list(metrics), betas
        self.m = [torch.zeros_like(leaf) for leaf in leaves]
        self.v = [torch.zeros((), device=leaf.device) for leaf in leaves]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.steps += 1
        for i, leaf in enumerate(self.leaves):
            g, metric = leaf.grad, self.metrics[i]
            assert g is not None, "step() comes after the gradients"
            d = g if metric is None else metric(g)
            self.v[i].lerp_((g * d).sum(), 1 - self.b2)
            scale = (self.v[i] / (1 - self.b2**self.steps)).sqrt() + 1e-12
            self.m[i].mul_(self.b1).add_(d / scale, alpha=1 - self.b1)
            leaf.sub_(self.m[i], alpha=rate * self.rates[i])


def descend(
    descent: Descent,
    run: Run,
    leaves: Sequence[Tensor],
    weights: Callable[[], Weights],
    rates: Sequence[float] | None = None,
    metrics: Sequence[Metric | None] | None = None,
) -> None:
    """Move `leaves` (float32, requiring gradients) to the best point inside the ball.

    `weights()` gives the substituted parameters as a function of the leaves; where the leaves begin, it gives the base's. `rates` multiply
    the step length of each leaf, `metrics` are as in `NovoGrad`. What is judged and kept is the running mean of the leaves (Polyak &
    Juditsky 1992): single iterates carry the noise of their batches.
    """
    settings, epsilon = descent.settings, run.budget.epsilon
    optimizer = NovoGrad(leaves, rates or [1.0] * len(leaves), metrics or [None] * len(leaves))
    # a leaf that begins at zero, as a shift of all weights does, needs no memory for that
    origin = [leaf.detach().clone() if leaf.any() else leaf.new_zeros(()).expand_as(leaf) for leaf in leaves]
    mean = _copies(leaves)
    lam, best, best_loss, recent, cost = settings.lam, origin, math.inf, 0.0, math.inf
    first = settings.lr * math.sqrt(min(len(descent.examples), DRAWN))  # each example of a step needs a direction of its own
    flat, slack = (FLAT, SLACK_OF_MANY) if len(descent.examples) > DRAWN else (0.0, SLACK)
    for step in run.progress(range(settings.steps), "descending", settings.steps):
        loss = _gradients(descent, leaves, weights, lam)
        recent = 0.8 * recent + 0.2 * loss if step else loss
        warm, fallen = min(1.0, (step + 1) / 5), max(0.0, step / settings.steps - flat) / (1 - flat)
        optimizer.step(first * warm * 0.5 * (1 + math.cos(math.pi * fallen)))
        for average, leaf in zip(mean, leaves, strict=True):
            average.lerp_(leaf.detach(), 1 - min(AVERAGE, (step + 1) / (step + 10)))
        if (step + 1) % descent.check_every == 0 or step + 1 == settings.steps:
            current = _copies(leaves)
            _put(leaves, mean)
            with torch.no_grad():
                now = weights()
            cost = descent.cost(now, epsilon)
            if step + 1 < settings.steps:
                descent.search(now)
            _put(leaves, current)
            lam *= LAM_STEP if cost > epsilon else 1 / LAM_STEP if cost < slack * epsilon else 1.0
            inside = cost <= epsilon
            if inside and recent < best_loss:
                best, best_loss = [m.clone() for m in mean], recent
            if inside and recent < CONTENT:
                break
    if recent < best_loss:  # the last point goes furthest towards the examples, and is outside: back to the edge
        best = _edge(descent, leaves, weights, origin, mean, epsilon) or best
    _put(leaves, best)


def _edge(
    descent: Descent,
    leaves: Sequence[Tensor],
    weights: Callable[[], Weights],
    origin: list[Tensor],
    end: list[Tensor],
    epsilon: float,
) -> list[Tensor]:
    """The point furthest on the way from `origin` to `end` that is inside the ball; [] if none is found."""

    def move(s: float) -> list[Tensor]:
        return [torch.lerp(a, b, s) for a, b in zip(origin, end, strict=True)]

    def at(s: float) -> Weights:
        _put(leaves, move(s))
        return weights()

    s = descent.furthest(at, epsilon, read=descent.read)  # the end is what was measured last
    return move(s) if s else []


def _copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in leaves]


@torch.no_grad()
def _put(leaves: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)
