"""senses: shift the few sense vectors of a Backpack that count most for the examples.

    C'(v)_l          = C(v)_l + Delta_(v,l)                                   for the chosen (v, l) alone, everything else is frozen
    logits_t(Delta)  = E (o_t + sum_(v,l) a_t,(v,l) Delta_(v,l)),             a_t,(v,l) = sum over j <= t with x_j = v of alpha_l,t,j
    chosen           = of each example the k largest  S(v,l) - against * S_background(v,l),   S = sum of a_t over the scored t
    Delta            = argmin  mean of L_goal + lam * (KL per token of held text + ridge * mean(A_mm) * sum of Delta_m^T G Delta_m / 2)
    A_mn             = sum over places of a_t,m a_t,n / tokens,     G = mean over places of E^T (diag p_t - p_t p_t^T) E

Hewitt et al. 2024, arXiv 2402.06155 (sense finetuning; S for two continuations: equation 9), on the Backpack of Hewitt et al. 2023, arXiv
2305.16765. The ridge is ours: held text tells little of senses that it seldom uses, and with it they move as if it used them more.

Neither the hidden states nor alpha depend on the sense vectors. So each row of text is read once: o_t and the few a_t,(v,l) at the places
that see a chosen token. From then on the losses, KL and their gradients are functions of Delta (M, D) and of those, and no transformer
runs; places that see no chosen token cannot move, and cost nothing. `raise`, KL and the ridge are convex in Delta, `balance` is where both
answers are single tokens: one optimum, which L-BFGS finds (`minimise`). Of the held rows it has the KL of those alone that some point on
its way has hurt; that of the many others is taken for its second order, tr(G Delta^T A Delta) / 2, with one G for all places (as in K-FAC,
Martens & Grosse 2015, arXiv 1503.05671). lam is sought so that the point lies a standard error inside the ball.
`faithful` is the loop as published: it descends the same loss in small draws of rows, every step through the model.

Unlike model-editing-canonical-examples@15a1e7b:
* `prefer` adds the masses of both continuations, as equation 9 has it; the code subtracts them, and where both begin in one context, which
  is all there is for answers of one token, nothing is left of them.
* S_background is counted per 500 predictions, the published length of a text, so that `against` does not depend on how the text is cut.
* The shifts are M vectors, not a dense table of all V K; every gradient is applied; a seed is obeyed.

File legend: N rows, T tokens, K senses, D width, V vocabulary, M chosen senses, U tokens, P places that predict a scored token and see a
chosen sense, Z pairs of such a place and an occurrence of a chosen sense before it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from errata import hosts
from errata.hosts import Host, Weights
from errata.methods._descend import Descent, Row, Settings, Through, descend, goal_losses, kl_sum
from errata.types import Example, InvalidExample, Method, Patch, Run
from errata.types import Senses as Op

CHUNK = 500  # tokens of a published background text
BACKGROUND = 1000  # rows of held text, at most, whose mass is counted
PLACES = 256  # whose logits are found at once where nothing has to be kept for a gradient
WAYS = 8  # prompts of each example that are read: its own, and others as in `finetune`
READ = 3000  # held rows with a chosen token in them that are read, at most
ROUNDS, LAM_STEP = 8, 4.0  # values of lam that are tried, at most; how far apart while only one side of the edge is known
WIDE = 1e-3  # the ball that lam is for: where it is narrower, the search begins at a larger one, where it is wider at a smaller
SAFE = 1.0  # standard errors that the edit stays inside the ball: what the gate has to scale loses most of what it did
EDGE = 0.65  # share of the ball that is near enough to its edge
ITERATIONS = 30  # of L-BFGS for each of them
# Where the held rows hardly use a chosen sense, or are sure of what follows, nothing would hold it, and the solver would run away:
SELDOM = 0.01  # the energy, alpha^2, that a sense is taken to have once in them, at least
UNSURE = 0.01  # share of a place at which every token is as likely, in G
SAMPLED = 2048  # places that G is the mean over, at most


@final
@dataclass(frozen=True, kw_only=True)
class Senses(Method):
    """k sense vectors for each example; `against` weighs their use in other text. lam, ridge: see above. `faithful` runs the
    published loop, for which `steps`, `lr` (a share of the mean length of the chosen vectors), `hold` and `batch_size` are; the rest as in
    `finetune`.
    """

    k: int = 10
    against: float = 1000.0
    ridge: float = 10.0
    faithful: bool = False
    steps: int = 144
    lr: float = 0.1
    lam: float = 1000.0
    contexts: int = 1
    restated: int = 8
    neighbours: int = 8
    hold: int = 64
    searched: int = 4000
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.k < 1 or not self.against >= 0 or not self.ridge > 0:
            told = f"{self.k}, {self.against} and {self.ridge}"
            raise InvalidExample(f"senses needs a k of 1 or more, against of 0 or more and a ridge over 0, got {told}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        name = hosts.senses_of(host)
        descent, quadratic, ids_M, senses_M = prepared(self, host, examples, run)
        with torch.no_grad():
            C_MD = host.model.senses(ids_M)[torch.arange(len(ids_M), device=ids_M.device), senses_M]
        shift_MD = torch.zeros_like(C_MD, dtype=torch.promote_types(C_MD.dtype, torch.float32), requires_grad=True)
        if self.faithful:
            descend(descent, run, [shift_MD], lambda: {name: shift_MD}, [float(C_MD.float().norm(dim=1).mean())])
        else:
            shift_MD = minimise(descent, quadratic, run, shift_MD)
        op = Op(weight=name, ids=ids_M.cpu(), senses=senses_M.cpu(), shift=shift_MD.detach().float().cpu().clone())
        return Patch(method="senses", config=self.config, parent=host.id, examples=tuple(examples), ops=(op,))


def prepared(
    made: Senses, host: Host, examples: Sequence[Example], run: Run
) -> tuple[Descent, "Quadratic", Int[Tensor, "M"], Int[Tensor, "M"]]:
    """The descent with everything read, what moving costs, and the tokens and senses that are to move."""
    own = ("k", "against", "ridge", "faithful")
    settings = Settings(damping=None, **{k: v for k, v in made.config.items() if k not in own})
    descent = Descent(host, examples, run, settings)
    background = descent.rng.sample(descent.held, k=min(len(descent.held), BACKGROUND))
    ids_M, senses_M = choose(host, descent.examples, background, made.k, made.against)
    narrow(descent, set(ids_M.tolist()))
    cached = Cached(host, ids_M, senses_M, known_rows(descent))
    descent.reader = Whole(host, ids_M, senses_M) if made.faithful else cached
    quadratic = Quadratic(cached, descent.pool, len(ids_M), made.ridge)
    descent.prior = quadratic.ridge
    return descent, quadratic, ids_M, senses_M


# ------------------------------------------------------------------------------------------------------------------------ selection


def answers(e: Example) -> list[str]:
    """The continuations that an example speaks of."""
    return [e.target] + ([e.contrast] if e.contrast is not None else [])


@torch.no_grad()
def choose(
    host: Host, examples: Sequence[Example], background: Sequence[Row], k: int, against: float
) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"]]:
    """(M,) tokens and (M,) senses that are to move: of each example the k most important, all of them together in ascending order."""
    V, K = int(host.model.config.vocab_size), int(host.model.config.num_senses)
    background_VK = torch.zeros(V, K, dtype=torch.float64, device=host.device)
    for ids_T, mass_TK in masses(host, background):
        background_VK.index_add_(0, ids_T, mass_TK)
    background_VK *= CHUNK / max(1, sum(len(ids) - max(given, 1) for ids, given in background))
    rows = [hosts.encode(host, e.prompt, answer) for e in examples for answer in answers(e)]
    found, chosen = iter(masses(host, rows)), set[tuple[int, int]]()
    for e in examples:
        parts = [next(found) for _ in answers(e)]
        ids_U, place_T = torch.unique(torch.cat([ids_T for ids_T, _ in parts]), return_inverse=True)
        own_UK = background_VK.new_zeros(len(ids_U), K).index_add_(0, place_T, torch.cat([mass_TK for _, mass_TK in parts]))
        worth_UK = (own_UK - against * background_VK[ids_U]).masked_fill(own_UK <= 0, -torch.inf)
        best = worth_UK.flatten().topk(min(k, int((own_UK > 0).sum()))).indices.tolist()
        chosen |= {(int(ids_U[i // K]), i % K) for i in best}
    pairs_M2 = torch.tensor(sorted(chosen), device=host.device)
    return pairs_M2[:, 0].contiguous(), pairs_M2[:, 1].contiguous()


@torch.no_grad()
def masses(host: Host, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
    """Of each row its tokens (T,), and how much each of their senses counts at the places that predict a scored token together, (T, K)."""
    out: list[tuple[Tensor, Tensor]] = [(torch.zeros(0), torch.zeros(0))] * len(rows)
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.pad(host, [rows[i] for i in group])
        alpha_NKTT = host.model.alpha(batch.ids_NT, batch.mask_NT)
        mass_NTK = torch.einsum("nkij,ni->njk", alpha_NKTT, _predicting(batch).to(alpha_NKTT.dtype)).double()
        for n, i in enumerate(group):
            length = len(rows[i][0])
            out[i] = (batch.ids_NT[n, :length], mass_NTK[n, :length])
    return out


def _predicting(batch: hosts.Batch) -> Tensor:
    """(N, T) bool: whether the token behind this place is scored."""
    return nn.functional.pad(batch.scored_NT[:, 1:].bool(), (0, 1))


def narrow(descent: Descent, tokens: set[int]) -> None:
    """Fixes the prompts, and keeps of the held rows up to `READ` that hold one of `tokens`: the KL of the others is 0 whatever moves, so
    they count only in the share that those that are left are weighed with."""
    descent.ways = [
        [e.prompt, *(descent.prompt(e, others) for _ in range(WAYS - 1))]
        for e, others in zip(descent.examples, descent.others, strict=True)
    ]
    pool, share = reached(descent.pool, tokens)
    descent.pool = descent.rng.sample(pool, k=min(len(pool), READ))
    descent.pool_N2 = descent.pool_N2[: len(descent.pool)]
    descent.settings = replace(descent.settings, lam=descent.settings.lam * share)


def reached(rows: Sequence[Row], tokens: set[int]) -> tuple[list[Row], float]:
    """Those of `rows` in which one of `tokens` has something behind it, and the share of all predictions that stands in them."""
    found = [row for row in rows if not tokens.isdisjoint(row[0][:-1])]
    return found, sum(len(ids) - 1 for ids, _ in found) / max(1, sum(len(ids) - 1 for ids, _ in rows))


def known_rows(descent: Descent) -> Iterable[Row]:
    """The rows of every prompt with every answer, and the held ones: all that a step can ask for."""
    for e, ways in zip(descent.examples, descent.ways, strict=True):
        yield from (hosts.encode(descent.host, prompt, answer) for prompt in ways for answer in answers(e))
    yield from descent.pool


# -------------------------------------------------------------------------------------------------------------------------- solving


@final
class Quadratic:
    """The KL per token of `rows` to second order, tr(G Delta^T A Delta) / 2, and the ridge."""

    @torch.no_grad()
    def __init__(self, reader: "Cached", rows: Sequence[Row], M: int, ridge: float) -> None:
        seen, E_VD = reader._find(rows), reader.E_VD
        out_PD = torch.cat([s.out_PD for s in seen]) if seen else E_VD[:0]
        self.G_DD, self.A_MM = E_VD.new_zeros(E_VD.shape[1], E_VD.shape[1]), E_VD.new_zeros(M, M)
        sampled_PD = out_PD[:: -(-len(out_PD) // SAMPLED) or 1]
        for o_PD in torch.split(sampled_PD, PLACES):
            p_PV = (o_PD @ E_VD.T).softmax(-1)
            mean_PD = p_PV @ E_VD
            self.G_DD += ((E_VD.T * p_PV.sum(0)) @ E_VD - mean_PD.T @ mean_PD) / len(sampled_PD)
        self.G_DD += UNSURE * torch.cov(E_VD.T, correction=0)
        for group in _gathered(range(len(seen)), [len(s.target_P) for s in seen], SAMPLED):
            part = [seen[i] for i in group]
            place_Z, sense_Z, alpha_Z = _met(part)
            a_PM = E_VD.new_zeros(sum(len(s.target_P) for s in part), M).index_put_((place_Z, sense_Z), alpha_Z, accumulate=True)
            self.A_MM += a_PM.T @ a_PM
        tokens = max(1, sum(len(ids) - 1 for ids, _ in rows))
        self.A_MM /= tokens
        self.weight = ridge * max(float(self.A_MM.diagonal().mean()), SELDOM / tokens)

    def ridge(self, weights: Weights) -> Tensor:
        """ridge / 2 * mean(A_mm) * sum over m of Delta_m^T G Delta_m."""
        (shift_MD,) = weights.values()
        cost: Tensor = 0.5 * self.weight * ((shift_MD @ self.G_DD.to(shift_MD.dtype)) * shift_MD).sum()
        return cost

    def gradient(self, shift_MD: Float[Tensor, "M D"], alone: bool) -> tuple[float, Float[Tensor, "M D"]]:
        """The value and the gradient of both; of the ridge `alone`."""
        moved_MD = self.weight * shift_MD if alone else self.A_MM @ shift_MD + self.weight * shift_MD
        grad_MD = moved_MD @ self.G_DD
        return 0.5 * float((shift_MD * grad_MD).sum()), grad_MD

    def coordinates(self) -> tuple[Float[Tensor, "M"], Float[Tensor, "D D"]]:
        """s, R: for Delta = s x R what this costs is about |x|^2 / 2."""
        e_D, U_DD = torch.linalg.eigh(self.G_DD)
        least = 0.05 * e_D.mean() + torch.finfo(e_D.dtype).tiny
        R_DD: Tensor = (U_DD * (e_D.clamp(min=0) + least).rsqrt()) @ U_DD.T
        return (self.A_MM.diagonal() + self.weight).rsqrt(), R_DD


@final
class Problem:
    """What is minimised, over fixed rows: every way of asking each example, and the held rows. `hurt` are those of the latter whose KL is
    taken as it is; that of the others to second order. With `whole` it is that of all of them."""

    def __init__(self, descent: Descent, quadratic: Quadratic, whole: bool = False) -> None:
        assert isinstance(descent.reader, Cached)
        self.descent, self.reader, self.quadratic, self.whole = descent, descent.reader, quadratic, whole
        asked = Counter((prompt, e) for e, ways in zip(descent.examples, descent.ways, strict=True) for prompt in ways)
        self.examples = [e for _, e in asked]
        self.rows = [hosts.encode(descent.host, prompt, e.target) for prompt, e in asked]
        self.contrasts = [hosts.encode(descent.host, prompt, e.contrast or e.target) for prompt, e in asked]
        like = self.reader.E_VD
        self.tokens_N = like.new_tensor([float(len(ids) - max(given, 1)) for ids, given in self.rows])
        self.share_N = like.new_tensor([count / asked.total() for count in asked.values()])
        self.held_tokens = sum(len(ids) - 1 for ids, _ in descent.pool)
        self.hurt = list(range(len(descent.pool))) if whole else []
        held, share = reached(descent.held, set(self.reader.ids_M.tolist()))
        self.held, self.held_share = held[:READ], share

    def cost(self, shift_MD: Float[Tensor, "M D"]) -> float:
        """What the ball is measured with: the relative loss increase on the checked documents, `SAFE` standard errors on top, or that on
        the held ones where it is larger: of a short text the former may hold no chosen token at all."""
        weights = {"shift": shift_MD}
        before_N2, after_N2 = self.reader.score(self.held), self.reader.score(self.held, weights)
        lost, loss = float((before_N2 - after_N2)[:, 0].sum()), -float(before_N2[:, 0].sum())
        # a NaN is no small cost
        return max(self.held_share * lost / loss if loss else 0.0, self.descent.upper(weights, SAFE), key=lambda c: (c != c, c))

    def gradient(self, shift_MD: Float[Tensor, "M D"], lam: float) -> tuple[float, float, Float[Tensor, "M D"]]:
        """(mean loss of the examples, the whole objective, its gradient)."""
        leaf_MD = shift_MD.detach().requires_grad_()
        weights = {"shift": leaf_MD}
        logp_N = contrast_N = self.reader.logp(self.rows, weights)
        if any(e.contrast for e in self.examples):
            contrast_N = self.reader.logp(self.contrasts, weights)
        task = (self.share_N * goal_losses(logp_N, contrast_N, self.tokens_N, self.examples)).sum()
        (grad_MD,) = torch.autograd.grad(task, leaf_MD)
        quiet, more_MD = self.quadratic.gradient(shift_MD, alone=self.whole)
        objective, grad_MD = task.item() + lam * quiet, grad_MD + lam * more_MD
        pool = [self.descent.pool[i] for i in self.hurt]
        for group in _gathered(range(len(pool)), [len(s.target_P) for s in self.reader._find(pool)], SAMPLED):
            kl = kl_sum(*self.reader.both([pool[i] for i in group], weights)) / self.held_tokens
            objective += lam * kl.item()
            grad_MD = grad_MD + lam * torch.autograd.grad(kl, leaf_MD)[0]
        return task.item(), objective, grad_MD

    def solve(self, shift_MD: Float[Tensor, "M D"], lam: float, iterations: int = ITERATIONS) -> tuple[Float[Tensor, "M D"], float]:
        """(the optimum for this lam, or what so many iterations of L-BFGS from `shift_MD` come to; the mean loss of the examples there)."""
        scale_M, R_DD = self.quadratic.coordinates()
        x_MD = torch.linalg.solve(R_DD, shift_MD.detach() / scale_M[:, None], left=False).requires_grad_()
        task = math.nan

        def shift() -> Float[Tensor, "M D"]:
            shift_MD: Tensor = scale_M[:, None] * (x_MD.detach() @ R_DD)
            return shift_MD

        def closure() -> float:
            nonlocal task
            task, objective, grad_MD = self.gradient(shift(), lam)
            x_MD.grad = scale_M[:, None] * (grad_MD @ R_DD)
            return objective

        # no tolerances: they are absolute, and where little is to be gained they would end it at the first step
        solver = torch.optim.LBFGS(
            [x_MD],
            max_iter=iterations,
            history_size=iterations,
            tolerance_grad=0.0,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )
        solver.step(closure)  # type: ignore[no-untyped-call]
        return shift(), task


def minimise(descent: Descent, quadratic: Quadratic, run: Run, shift_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
    """The shifts of the least loss of the examples that lie inside the ball, of those that minimise the objective for some lam."""
    problem, epsilon = Problem(descent, quadratic), run.budget.epsilon
    best, best_loss, loss, cost = torch.zeros_like(shift_MD), math.inf, math.inf, 0.0
    lam = descent.settings.lam * math.sqrt(WIDE / epsilon)
    least = lam / LAM_STEP**2  # a text that shows no cost is no reason to hold nothing
    outside, inside = 0.0, math.inf  # the largest lam that was outside, the smallest that was inside
    for _ in run.progress(range(ROUNDS), "solving", ROUNDS):
        shift_MD, loss = problem.solve(shift_MD, lam)
        weights = {"shift": shift_MD}
        cost = problem.cost(shift_MD)
        descent.search(weights)
        hurt = {*problem.hurt, *descent.hurt}
        more = len(hurt) - len(problem.hurt)
        problem.hurt = sorted(hurt)
        if cost <= epsilon and loss < best_loss:
            best, best_loss = shift_MD, loss
        if not cost <= epsilon and more:
            outside = 0.0  # with their KL in it the same lam may be inside
        elif not cost <= epsilon:
            outside = lam
            lam = lam * LAM_STEP if math.isinf(inside) else math.sqrt(lam * inside)
        elif cost < EDGE * epsilon and loss > 0:
            inside = lam
            lam = math.sqrt(lam * outside) if outside else max(lam / LAM_STEP, least)
            if lam == inside:
                break
        else:
            break
    if not cost <= epsilon and loss < best_loss and (s := descent.furthest(lambda s: {"shift": s * shift_MD}, epsilon, SAFE)):
        best = s * shift_MD
    return best


# -------------------------------------------------------------------------------------------------------------------------- reading


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the base computes of one row. `logp` is that of all its scored tokens, `still` that of those which no shift can reach; the rest
    is of the P places that shifts do reach.

    out_PD is what goes into the head, target_P the token that comes next, logp_P its log-probability. At place place_Z the chosen sense
    sense_Z counts alpha_Z.
    """

    logp: float
    still: float
    tokens: int
    out_PD: Tensor
    target_P: Tensor
    logp_P: Tensor
    place_Z: Tensor
    sense_Z: Tensor
    alpha_Z: Tensor


@final
class Cached:
    """A `_descend.Reader` that reads each row once. `weights` are the shifts (M, D) of the chosen senses, by whatever name.

    Rows of `known` are read at once, others when they are first asked for.
    """

    def __init__(self, host: Host, ids_M: Tensor, senses_M: Tensor, known: Iterable[Row] = ()) -> None:
        self.host, self.ids_M, self.senses_M = host, ids_M, senses_M
        self.E_VD = _exact(host.model.get_submodule(host.layout.head).weight.detach())
        self.seen: dict[tuple[int, ...], Seen] = {}
        self._find(list(known))

    def logp(self, rows: Sequence[Row], weights: Weights) -> Float[Tensor, "N"]:
        seen = self._find(rows)
        logp_P = self._logits(seen, weights).log_softmax(-1).gather(-1, torch.cat([s.target_P for s in seen])[:, None])[:, 0]
        row_P = torch.arange(len(seen), device=logp_P.device).repeat_interleave(_counts(seen))
        still_N = torch.tensor([s.still for s in seen], dtype=logp_P.dtype, device=logp_P.device)
        return still_N.index_add(0, row_P, logp_P)

    def both(self, rows: Sequence[Row], weights: Weights) -> tuple[Float[Tensor, "P V"], Float[Tensor, "P V"]]:
        seen = self._find(rows)
        return self._logits(seen, None), self._logits(seen, weights)

    @torch.no_grad()
    def score(self, rows: Sequence[Row], weights: Weights | None = None) -> Float[Tensor, "N 2"]:
        seen = self._find(rows)
        out_N2 = torch.tensor([(s.logp, s.tokens) for s in seen], dtype=torch.float64).reshape(-1, 2)
        reached = [i for i, s in enumerate(seen) if len(s.target_P)] if weights is not None else []
        for group in _gathered(reached, [len(seen[i].target_P) for i in reached]):
            part = [seen[i] for i in group]
            target_P, logp_P = torch.cat([s.target_P for s in part]), torch.cat([s.logp_P for s in part])
            now_P = self._logits(part, weights).log_softmax(-1).gather(-1, target_P[:, None])[:, 0]
            row_P = torch.tensor(group, device=now_P.device).repeat_interleave(_counts(part))
            out_N2[:, 0].index_add_(0, row_P.cpu(), (now_P.double() - logp_P.double()).cpu())
        return out_N2

    def _logits(self, seen: Sequence[Seen], weights: Weights | None) -> Float[Tensor, "P V"]:
        """E (o + a Delta) at the places that shifts can reach, row after row."""
        out_PD = torch.cat([s.out_PD for s in seen])
        if weights is not None:
            (shift_MD,) = weights.values()
            place_Z, sense_Z, alpha_Z = _met(seen)
            # the backward of an embedding is much faster than that of indexing
            out_PD = out_PD.index_add(0, place_Z, alpha_Z[:, None] * nn.functional.embedding(sense_Z, shift_MD).to(out_PD.dtype))
        return out_PD @ self.E_VD.T

    def _find(self, rows: Sequence[Row]) -> list[Seen]:
        new = {(given, *ids): (ids, given) for ids, given in rows if (given, *ids) not in self.seen}
        for (key, _), seen in zip(new.items(), read(self.host, list(new.values()), self.ids_M, self.senses_M, self.E_VD), strict=True):
            self.seen[key] = seen
        return [self.seen[given, *ids] for ids, given in rows]


def _met(seen: Sequence[Seen]) -> tuple[Tensor, Tensor, Tensor]:
    """(Z,) places, counted through all of `seen`, senses and weights."""
    starts = list(itertools.accumulate(_counts(seen).tolist(), initial=0))[:-1]
    place_Z = torch.cat([s.place_Z + start for s, start in zip(seen, starts, strict=True)])
    return place_Z, torch.cat([s.sense_Z for s in seen]), torch.cat([s.alpha_Z for s in seen])


def _gathered(rows: Sequence[int], places: Sequence[int], most: int = PLACES) -> Iterator[list[int]]:
    """Runs of `rows` that have `most` places together, or a few more."""
    group: list[int] = []
    count = 0
    for row, more in zip(rows, places, strict=True):
        group.append(row)
        count += more
        if count >= most:
            yield group
            group, count = [], 0
    if group:
        yield group


def _exact(t: Tensor) -> Tensor:
    """float32 or better."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _counts(seen: Sequence[Seen]) -> Tensor:
    return torch.tensor([len(s.target_P) for s in seen], device=seen[0].target_P.device)


@torch.no_grad()
def read(host: Host, rows: Sequence[Row], ids_M: Tensor, senses_M: Tensor, E_VD: Float[Tensor, "V D"]) -> list[Seen]:
    """What the host, as it is, computes of each row: one pass of its trunk."""
    out: dict[int, Seen] = {}
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.pad(host, [rows[i] for i in group])
        alpha_NKTT, predicting_NT = host.model.alpha(batch.ids_NT, batch.mask_NT), _predicting(batch)
        out_NTD = alpha_NKTT.permute(0, 2, 3, 1).flatten(2) @ host.model.senses(batch.ids_NT).flatten(1, 2)
        target_NT = nn.functional.pad(batch.ids_NT[:, 1:], (0, 1))
        logp_NT = torch.zeros(target_NT.shape, dtype=E_VD.dtype, device=E_VD.device)
        logits_PV = _exact(out_NTD[predicting_NT]) @ E_VD.T
        logp_NT[predicting_NT] = logits_PV.log_softmax(-1).gather(-1, target_NT[predicting_NT][:, None])[:, 0]
        # Q occurrences: in row n, place j holds the token of the chosen sense m
        n_Q, j_Q, m_Q = ((batch.ids_NT[..., None] == ids_M) & batch.mask_NT.bool()[..., None]).nonzero(as_tuple=True)
        weight_QT = alpha_NKTT[n_Q, senses_M[m_Q], :, j_Q] * predicting_NT[n_Q]
        for n, i in enumerate(group):
            mine_Q = n_Q == n
            q_Z, t_Z = weight_QT[mine_Q].nonzero(as_tuple=True)
            t_P, place_Z = t_Z.unique(return_inverse=True)
            out[i] = Seen(
                logp=(whole := float(logp_NT[n].double().sum())),
                still=whole - float(logp_NT[n, t_P].double().sum()),
                tokens=int(predicting_NT[n].sum()),
                out_PD=_exact(out_NTD[n, t_P]),
                target_P=target_NT[n, t_P],
                logp_P=logp_NT[n, t_P],
                place_Z=place_Z,
                sense_Z=m_Q[mine_Q][q_Z],
                alpha_Z=_exact(weight_QT[mine_Q][q_Z, t_Z]),
            )
    return [out[i] for i in range(len(rows))]


@final
class Whole:
    """The same answers from the whole model, with the shifts in its table of overridden senses."""

    def __init__(self, host: Host, ids_M: Tensor, senses_M: Tensor) -> None:
        self.through, self.senses_M = Through(host=host), senses_M
        self.name = hosts.senses_of(host).rpartition(".")[0]
        kept = host.model.get_submodule(self.name)
        place = {token: r for r, token in enumerate(dict.fromkeys([*kept.ids.tolist(), *ids_M.tolist()]))}
        more = len(place) - len(kept.ids)
        self.row_M = torch.tensor([place[token] for token in ids_M.tolist()], device=ids_M.device)
        self.ids_R = torch.tensor(list(place), device=ids_M.device)
        self.keep_RK = nn.functional.pad(kept.keep, (0, 0, 0, more), value=1.0)
        self.senses_RKD = nn.functional.pad(kept.senses, (0, 0, 0, 0, 0, more))

    def table(self, weights: Weights) -> Weights:
        """The buffers of the table with the shifts in it."""
        (shift_MD,) = weights.values()
        sum_RKD = _exact(self.senses_RKD).index_put((self.row_M, self.senses_M), _exact(shift_MD), accumulate=True)
        table = {"ids": self.ids_R, "keep": self.keep_RK, "senses": sum_RKD.to(self.senses_RKD.dtype)}
        return {f"{self.name}.{part}": tensor for part, tensor in table.items()}

    def logp(self, rows: Sequence[Row], weights: Weights) -> Float[Tensor, "N"]:
        return self.through.logp(rows, self.table(weights))

    def both(self, rows: Sequence[Row], weights: Weights) -> tuple[Float[Tensor, "P V"], Float[Tensor, "P V"]]:
        return self.through.both(rows, self.table(weights))

    def score(self, rows: Sequence[Row], weights: Weights | None = None) -> Float[Tensor, "N 2"]:
        return self.through.score(rows, weights and self.table(weights))
