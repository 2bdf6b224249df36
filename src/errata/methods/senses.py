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
runs. All of them are made of log Z = log sum over v of exp(E_v o), whose gradient is the mean of E (`expected`): log p(y) = E_y o - log Z,
and KL at o + d is log Z(o + d) - log Z(o) - mean(o) d. `raise`, KL and the ridge are convex in Delta, `balance` is where both answers are
single tokens: one optimum, which L-BFGS comes near (`Problem.solve`). Of the held places it has the KL of those alone that moved in a row
that was hurt; that of the many others is taken for its second order, tr(G Delta^T A Delta) / 2, with one G for all places (as in K-FAC,
Martens & Grosse 2015, arXiv 1503.05671). It also tells which places have not moved at all, nine in ten: what a point costs is found from
the rest. lam is sought so that the point lies a standard error inside the ball.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from errata import hosts
from errata.hosts import Host, Weights
from errata.methods._descend import EACH, EDGE, HURT, Descent, Row, Settings, Through, descend, goal_losses
from errata.types import Example, InvalidExample, Method, Patch, Run
from errata.types import Senses as Op

CHUNK = 500  # tokens of a published background text
BACKGROUND = 500  # rows of held text, at most, whose mass is counted
LOGITS = 1 << 20  # that are found at once
WAYS = 8  # prompts of each example that are read: its own, and others as in `finetune`
TRIED = 64  # documents in which other ways of asking are looked for: of 1,200, two thirds of the time go to kinds that have few
DRAWN, READ = 3000, 1500  # held rows with a chosen token in them that the loop draws from, and that the solver reads, at most
SURPRISED = 150  # checked rows that tell the base's mean loss
FAINT = 1e-5  # nats of KL, to second order, up to which a place has not moved: nine in ten of those that see a chosen sense
WORST = 256  # held rows that are found hurt at once, at most
ROUNDS = 6  # values of lam that are tried, at most
LAM_STEP, AIM = 4.0, 0.8  # the next is cost / (AIM * epsilon) times the last, while one side of the edge is known; LAM_STEP times at most
WIDE = 1e-2  # the ball that lam is for: where it is narrower, the search begins at a larger one, where it is wider at a smaller
SAFE = 1.0  # standard errors that the edit stays inside the ball: what the gate has to scale loses most of what it did
NEAR = 0.65  # share of the ball that is near enough to its edge
ITERATIONS = 12  # of L-BFGS for each of them
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
    restated: int = 1
    neighbours: int = 0
    hold: int = 64
    searched: int = 4000
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.k < 1 or not self.against >= 0 or not self.ridge > 0:
            told = f"{self.k}, {self.against} and {self.ridge}"
            raise InvalidExample(f"senses needs a k of 1 or more, against of 0 or more and a ridge over 0, got {told}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        name = hosts.senses_of(host)
        descent, quadratic, reader = prepared(self, host, examples, run)
        ids_M, senses_M = reader.ids_M, reader.senses_M
        if self.faithful:
            with torch.no_grad():
                C_MD = host.model.senses(ids_M)[torch.arange(len(ids_M), device=ids_M.device), senses_M]
            shift_MD = torch.zeros_like(C_MD, dtype=reader.E_VD.dtype, requires_grad=True)
            descent.reader, descent.prior = Whole(host, ids_M, senses_M), quadratic.ridge
            descend(descent, run, [shift_MD], lambda: {name: shift_MD}, [float(C_MD.float().norm(dim=1).mean())])
        else:
            shift_MD = minimise(descent, quadratic, reader, run)
        op = Op(weight=name, ids=ids_M.cpu(), senses=senses_M.cpu(), shift=shift_MD.detach().float().cpu().clone())
        return Patch(method="senses", config=self.config, parent=host.id, examples=tuple(examples), ops=(op,))


def prepared(made: Senses, host: Host, examples: Sequence[Example], run: Run) -> tuple[Descent, "Quadratic", "Cached"]:
    """The descent with everything read, what moving costs, and the reader, which knows the tokens and senses that are to move."""
    own = ("k", "against", "ridge", "faithful")
    settings = Settings(damping=None, tried=TRIED, **{k: v for k, v in made.config.items() if k not in own})
    descent = Descent(host, examples, run, settings)
    background = descent.rng.sample(descent.held, k=min(len(descent.held), BACKGROUND))
    ids_M, senses_M = choose(host, descent.examples, background, made.k, made.against)
    narrow(descent, set(ids_M.tolist()), DRAWN if made.faithful else READ)
    reader = Cached(host, ids_M, senses_M, descent.pool if made.faithful else known_rows(descent, set(ids_M.tolist())))
    return descent, Quadratic(reader, descent.pool, len(ids_M), made.ridge), reader


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


def narrow(descent: Descent, tokens: set[int], most: int) -> None:
    """Fixes the prompts, and keeps of the held rows up to `most` that hold one of `tokens`: the KL of the others is 0 whatever moves, so
    they count only in the share that those that are left are weighed with."""
    descent.ways = [
        [e.prompt, *(descent.prompt(e, others) for _ in range(WAYS - 1))]
        for e, others in zip(descent.examples, descent.others, strict=True)
    ]
    pool, share = reached(descent.pool, tokens)
    descent.pool = descent.rng.sample(pool, k=min(len(pool), most))
    descent.pool_N2 = descent.pool_N2[: len(descent.pool)]
    descent.settings = replace(descent.settings, lam=descent.settings.lam * share)


def reached(rows: Sequence[Row], tokens: set[int]) -> tuple[list[Row], float]:
    """Those of `rows` in which one of `tokens` has something behind it, and the share of all predictions that stands in them."""
    found = [row for row in rows if not tokens.isdisjoint(row[0][:-1])]
    return found, sum(len(ids) - 1 for ids, _ in found) / max(1, sum(len(ids) - 1 for ids, _ in rows))


def known_rows(descent: Descent, tokens: set[int]) -> Iterable[Row]:
    """All that the solver asks for: the rows of every prompt with every answer, the held ones, and those that are checked."""
    for e, ways in zip(descent.examples, descent.ways, strict=True):
        yield from (hosts.encode(descent.host, prompt, answer) for prompt in ways for answer in answers(e))
    checked = checked_rows(descent)
    yield from (*descent.pool, *checked[:SURPRISED], *reached(checked, tokens)[0])


# -------------------------------------------------------------------------------------------------------------------------- solving


@final
class Quadratic:
    """The KL per token of `rows` to second order, tr(G Delta^T A Delta) / 2, and the ridge."""

    @torch.no_grad()
    def __init__(self, reader: "Cached", rows: Sequence[Row], M: int, ridge: float) -> None:
        places, E_VD = reader.places(rows).reached(), reader.E_VD
        sampled_PD = places.out_PD[:: -(-len(places.out_PD) // SAMPLED) or 1]
        p_V, square_DD = E_VD.new_zeros(len(E_VD)), E_VD.new_zeros(E_VD.shape[1], E_VD.shape[1])
        for o_PD in torch.split(sampled_PD, max(1, LOGITS // len(E_VD))):
            p_PV = (o_PD @ E_VD.T).softmax(-1)
            mean_PD = p_PV @ E_VD
            p_V += p_PV.sum(0)
            square_DD += mean_PD.T @ mean_PD
        self.G_DD = ((E_VD.T * p_V) @ E_VD - square_DD) / max(1, len(sampled_PD)) + UNSURE * torch.cov(E_VD.T, correction=0)
        tokens = max(1, sum(len(ids) - 1 for ids, _ in rows))
        self.A_MM = E_VD.new_zeros(M, M)
        for index_P in torch.split(torch.arange(len(places.row_P), device=E_VD.device), SAMPLED):
            part = places.part(index_P)
            self.A_MM += part.pulled(part.a_PM.to_dense()) / tokens
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

    def coordinates(self) -> tuple[Float[Tensor, "M"], Float[Tensor, "D D"], Float[Tensor, "D D"]]:
        """s, R and its inverse: for Delta = s x R what this costs is about |x|^2 / 2."""
        e_D, U_DD = torch.linalg.eigh(self.G_DD)
        root_D = (e_D.clamp(min=0) + 0.05 * e_D.mean() + torch.finfo(e_D.dtype).tiny).sqrt()
        return (self.A_MM.diagonal() + self.weight).rsqrt(), (U_DD / root_D) @ U_DD.T, (U_DD * root_D) @ U_DD.T


@final
class Problem:
    """What is minimised, over fixed rows: every way of asking each example, and the held rows; and what a point costs elsewhere.

    `hurt` are those of the held places whose KL is taken as it is; that of all others is to second order. With `whole` it is that of all.
    """

    @torch.no_grad()
    def __init__(self, descent: Descent, quadratic: Quadratic, reader: "Cached", whole: bool = False) -> None:
        self.quadratic, self.E_VD, self.whole = quadratic, reader.E_VD, whole
        asked = Counter((prompt, e) for e, ways in zip(descent.examples, descent.ways, strict=True) for prompt in ways)
        self.examples = [e for _, e in asked]
        rows = [hosts.encode(descent.host, prompt, e.target) for prompt, e in asked]
        self.tokens_N = self.E_VD.new_tensor([float(len(ids) - max(given, 1)) for ids, given in rows])
        self.share_N = self.E_VD.new_tensor([count / asked.total() for count in asked.values()])
        compared = [i for i, e in enumerate(self.examples) if e.contrast]
        self.contrast = list(range(len(rows)))  # the row of each contrast; where there is none, its own, which counts for nothing
        for r, i in enumerate(compared, len(rows)):
            self.contrast[i] = r
        self.asked = reader.places(rows + [hosts.encode(descent.host, prompt, e.contrast) for prompt, e in asked if e.contrast])
        self.held = reader.places(descent.pool).reached()
        self.held_tokens = max(1, sum(len(ids) - 1 for ids, _ in descent.pool))
        self.take(torch.full(self.held.target_P.shape, whole, device=self.E_VD.device))
        tokens = set(reader.ids_M.tolist())
        self.share = reached(descent.held, tokens)[1]
        checked = checked_rows(descent)
        first = reader.places(checked[:SURPRISED])
        self.nats = -float(first.logp(self.E_VD).mean())
        self.before_N2 = torch.tensor([(-self.nats * (len(ids) - 1), len(ids) - 1) for ids, _ in checked], dtype=torch.float64)
        self.reached_N = torch.tensor([i for i, row in enumerate(checked) if reached([row], tokens)[0]], dtype=torch.long)
        self.checked = reader.places([checked[i] for i in self.reached_N.tolist()])

    def take(self, hurt_P: Bool[Tensor, "P"]) -> None:
        """From now on these of the held places are the hurt ones."""
        self.hurt_P, self.hurt = hurt_P, self.held.part(hurt_P.nonzero()[:, 0])
        self.base_P, self.base_PD = expected(self.hurt.out_PD, self.E_VD)

    def gradient(self, shift_MD: Float[Tensor, "M D"], lam: float) -> tuple[float, float, Float[Tensor, "M D"]]:
        """(mean loss of the examples, the whole objective, its gradient)."""
        out_PD, next_PD = self.asked.out_PD + self.asked.moved(shift_MD), self.E_VD[self.asked.target_P]
        log_z_P, mean_PD = expected(out_PD, self.E_VD)
        logp_R = self.asked.by_row((out_PD * next_PD).sum(1) - log_z_P).requires_grad_()
        losses_N = goal_losses(logp_R[: len(self.examples)], logp_R[self.contrast], self.tokens_N, self.examples)
        task = (self.share_N * losses_N).sum()
        (weight_R,) = torch.autograd.grad(task, logp_R)
        grad_MD = self.asked.pulled(weight_R[self.asked.row_P, None] * (next_PD - mean_PD))
        quiet, more_MD = self.quadratic.gradient(shift_MD, alone=self.whole)
        moved_PD = self.hurt.moved(shift_MD)
        log_z_P, mean_PD = expected(self.hurt.out_PD + moved_PD, self.E_VD)
        kl = float((log_z_P - self.base_P - (self.base_PD * moved_PD).sum(1)).sum()) / self.held_tokens
        kl_MD = self.hurt.pulled(mean_PD - self.base_PD) / self.held_tokens
        return task.item(), task.item() + lam * (quiet + kl), grad_MD + lam * (more_MD + kl_MD)

    def solve(self, shift_MD: Float[Tensor, "M D"], lam: float, iterations: int = ITERATIONS) -> tuple[Float[Tensor, "M D"], float]:
        """(the optimum for this lam, or what so many iterations of L-BFGS from `shift_MD` come to; the mean loss of the examples there)."""
        scale_M, R_DD, inverse_DD = self.quadratic.coordinates()
        x_MD = ((shift_MD.detach() / scale_M[:, None]) @ inverse_DD).requires_grad_()
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

    @torch.no_grad()
    def lost(self, places: "Places", shift_MD: Float[Tensor, "M D"]) -> Float[Tensor, "P"]:
        """What the next token loses at each place. Exactly 0 where the KL is no more than `FAINT`, to second order."""
        moved_PD = places.moved(shift_MD)
        kl_P = 0.5 * ((moved_PD @ self.quadratic.G_DD) * moved_PD).sum(1)
        index_P = (~(kl_P <= FAINT)).nonzero()[:, 0]  # a NaN is not faint
        part = places.part(index_P)
        lost_P = part.logp(self.E_VD) - part.logp(self.E_VD, moved_PD[index_P])
        return torch.zeros_like(kl_P).index_copy_(0, index_P, lost_P)

    def after(self, shift_MD: Float[Tensor, "M D"]) -> Float[Tensor, "N 2"]:
        """Scores of the checked rows, as `before_N2`: what a row loses is found, what it had is taken for the mean."""
        lost_N = self.checked.by_row(self.lost(self.checked, shift_MD)).double().cpu()
        return self.before_N2.index_add(0, self.reached_N, torch.stack([-lost_N, torch.zeros_like(lost_N)], dim=1))

    @torch.no_grad()
    def check(self, shift_MD: Float[Tensor, "M D"]) -> tuple[float, int]:
        """What the ball is measured with, and how many places were hurt that were not before: those which moved, of the held rows that
        have lost most.

        It is the relative loss increase on the checked documents, `SAFE` standard errors on top, or that on the held rows where it is
        larger: of a short text the former may hold no chosen token at all.
        """
        lost_P = self.lost(self.held, shift_MD)
        lost_N = self.held.by_row(lost_P)
        worst_N = torch.zeros_like(lost_N, dtype=torch.bool).index_fill_(0, lost_N.argsort(descending=True)[:WORST], True)
        before = len(self.hurt.row_P)
        self.take(self.hurt_P | ((worst_N & (lost_N > HURT))[self.held.row_P] & (lost_P != 0)))
        held = self.share * float(lost_P.double().sum()) / self.held_tokens / self.nats
        cost = max(held, hosts.increase(self.before_N2, self.after(shift_MD), SAFE)[1], key=lambda c: (c != c, c))  # a NaN is no small one
        return cost, len(self.hurt.row_P) - before


def checked_rows(descent: Descent) -> list[Row]:
    """Of the documents whose KL is not minimised as many as the edge of the ball is sought on."""
    documents = itertools.chain(*descent.looks)
    return hosts.chunks(descent.host, list(itertools.islice(documents, max(EDGE, EACH * len(descent.examples)))))


def minimise(descent: Descent, quadratic: Quadratic, reader: "Cached", run: Run) -> Float[Tensor, "M D"]:
    """The shifts of the least loss of the examples that lie inside the ball, of those that minimise the objective for some lam."""
    problem, epsilon = Problem(descent, quadratic, reader), run.budget.epsilon
    shift_MD = reader.E_VD.new_zeros(len(reader.ids_M), reader.E_VD.shape[1])
    best, best_loss, loss, cost = shift_MD, math.inf, math.inf, 0.0
    lam = descent.settings.lam * math.sqrt(WIDE / epsilon)
    least = lam / LAM_STEP**2  # a text that shows no cost is no reason to hold nothing
    outside, inside = 0.0, math.inf  # the largest lam that was outside, the smallest that was inside
    for _ in run.progress(range(ROUNDS), "solving", ROUNDS):
        shift_MD, loss = problem.solve(shift_MD, lam)
        hurt = len(problem.hurt.row_P)
        cost, more = problem.check(shift_MD)
        if cost <= epsilon and loss < best_loss:
            best, best_loss = shift_MD, loss
        if not cost <= epsilon and more > hurt:
            continue  # with their KL in it the same lam may be inside
        step = min(max(cost / (AIM * epsilon), 1 / LAM_STEP), LAM_STEP) if cost == cost else LAM_STEP
        if not cost <= epsilon:
            outside, lam = lam, lam * step if math.isinf(inside) else math.sqrt(lam * inside)
        elif cost < NEAR * epsilon and loss > 0:
            inside, lam = lam, math.sqrt(lam * outside) if outside else max(lam * step, least)
            if lam == inside:
                break
        else:
            break
    if not cost <= epsilon and loss < best_loss:
        before_N2, end_N2 = problem.before_N2, problem.after(shift_MD)
        s = hosts.furthest(lambda s: (problem.after(s * shift_MD), True), {1.0: end_N2}, before_N2, epsilon, SAFE)
        best = s * shift_MD if s else best
    return best


# -------------------------------------------------------------------------------------------------------------------------- reading


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """P places of some rows that predict a scored token: what goes into the head there, the token that comes next, which row it is, and
    how much each chosen sense counts, (P, M) and sparse."""

    out_PD: Tensor
    target_P: Tensor
    row_P: Tensor
    a_PM: Tensor
    rows: int

    def part(self, index_P: Int[Tensor, "some"]) -> "Places":
        out_PD, target_P, row_P = self.out_PD[index_P], self.target_P[index_P], self.row_P[index_P]
        return replace(self, out_PD=out_PD, target_P=target_P, row_P=row_P, a_PM=self.a_PM.index_select(0, index_P).coalesce())

    def reached(self) -> "Places":
        """Those that see a chosen sense: the others cannot move."""
        return self.part(torch.unique(self.a_PM.indices()[0]))

    def moved(self, shift_MD: Float[Tensor, "M D"]) -> Float[Tensor, "P D"]:
        """a Delta."""
        moved_PD: Tensor = torch.sparse.mm(self.a_PM, shift_MD)
        return moved_PD

    def pulled(self, grad_PD: Float[Tensor, "P D"]) -> Float[Tensor, "M D"]:
        """a^T grad: what a gradient at the places is for the shifts."""
        (place_Z, sense_Z), alpha_Z = self.a_PM.indices(), self.a_PM.values()
        return grad_PD.new_zeros(self.a_PM.shape[1], grad_PD.shape[1]).index_add_(0, sense_Z, alpha_Z[:, None] * grad_PD[place_Z])

    def logp(self, E_VD: Float[Tensor, "V D"], moved_PD: Float[Tensor, "P D"] | float = 0.0) -> Float[Tensor, "P"]:
        """Log-probability of the next token."""
        out_PD = self.out_PD + moved_PD
        return (out_PD * E_VD[self.target_P]).sum(1) - log_sum(out_PD, E_VD)

    def by_row(self, value_P: Float[Tensor, "P"]) -> Float[Tensor, "rows"]:
        return value_P.new_zeros(self.rows).index_add(0, self.row_P, value_P)


def expected(out_PD: Float[Tensor, "P D"], E_VD: Float[Tensor, "V D"]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P D"]]:
    """log Z = log sum over v of exp(E_v o), and the mean of E under the prediction, which is its gradient."""
    mean_PD = torch.empty_like(out_PD)
    return log_sum(out_PD, E_VD, mean_PD), mean_PD


def log_sum(out_PD: Float[Tensor, "P D"], E_VD: Float[Tensor, "V D"], mean_PD: Float[Tensor, "P D"] | None = None) -> Float[Tensor, "P"]:
    """log Z; the mean is written where there is a place for it: it is a third of the work."""
    log_z_P, some = out_PD.new_empty(len(out_PD)), max(1, LOGITS // len(E_VD))
    for start in range(0, len(out_PD), some):
        part = slice(start, start + some)
        logits_PV = out_PD[part] @ E_VD.T
        most_P1 = logits_PV.amax(1, keepdim=True)
        sum_P1 = logits_PV.sub_(most_P1).exp_().sum(1, keepdim=True)
        log_z_P[part] = (most_P1 + sum_P1.log())[:, 0]
        if mean_PD is not None:
            mean_PD[part] = (logits_PV @ E_VD).div_(sum_P1)
    return log_z_P


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the base computes of one row, P places: out_PD goes into the head, target_P is the token that comes next. At place place_Z the
    chosen sense sense_Z counts alpha_Z."""

    out_PD: Tensor
    target_P: Tensor
    place_Z: Tensor
    sense_Z: Tensor
    alpha_Z: Tensor


@final
class Cached:
    """Reads each row once: those of `known` at once, others when they are first asked for."""

    def __init__(self, host: Host, ids_M: Tensor, senses_M: Tensor, known: Iterable[Row] = ()) -> None:
        self.host, self.ids_M, self.senses_M = host, ids_M, senses_M
        self.E_VD = _exact(host.model.get_submodule(host.layout.head).weight.detach())
        self.seen: dict[tuple[int, ...], Seen] = {}
        self._find(list(known))

    def places(self, rows: Sequence[Row]) -> Places:
        """Those of all rows, one row after the other."""
        seen = self._find(rows)
        counts = [len(s.target_P) for s in seen]
        starts = itertools.accumulate(counts, initial=0)
        device, P = self.E_VD.device, sum(counts)
        place_Z = torch.cat([self.ids_M[:0], *(s.place_Z + start for s, start in zip(seen, starts, strict=False))])
        sense_Z = torch.cat([self.ids_M[:0], *(s.sense_Z for s in seen)])
        alpha_Z = torch.cat([self.E_VD[0, :0], *(s.alpha_Z for s in seen)])
        return Places(
            out_PD=torch.cat([self.E_VD[:0], *(s.out_PD for s in seen)]),
            target_P=torch.cat([self.ids_M[:0], *(s.target_P for s in seen)]),
            row_P=torch.arange(len(rows), device=device).repeat_interleave(torch.tensor(counts, dtype=torch.long, device=device)),
            a_PM=torch.sparse_coo_tensor(torch.stack([place_Z, sense_Z]), alpha_Z, (P, len(self.ids_M)), check_invariants=False).coalesce(),
            rows=len(rows),
        )

    def _find(self, rows: Sequence[Row]) -> list[Seen]:
        new = {(given, *ids): (ids, given) for ids, given in rows if (given, *ids) not in self.seen}
        for (key, _), seen in zip(new.items(), read(self.host, list(new.values()), self.ids_M, self.senses_M), strict=True):
            self.seen[key] = seen
        return [self.seen[given, *ids] for ids, given in rows]


def _exact(t: Tensor) -> Tensor:
    """float32 or better."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


@torch.no_grad()
def read(host: Host, rows: Sequence[Row], ids_M: Tensor, senses_M: Tensor) -> list[Seen]:
    """What the host, as it is, computes of each row: one pass of its trunk, none of its head."""
    out: dict[int, Seen] = {}
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.pad(host, [rows[i] for i in group])
        alpha_NKTT, predicting_NT = host.model.alpha(batch.ids_NT, batch.mask_NT), _predicting(batch)
        ids_U, which_NT = torch.unique(batch.ids_NT, return_inverse=True)  # a sense is the token's, wherever it stands
        senses_UKD = host.model.senses(ids_U)
        senses_NSD = nn.functional.embedding(which_NT, senses_UKD.flatten(1)).view(len(group), -1, senses_UKD.shape[-1])  # S = T K
        out_NTD = alpha_NKTT.permute(0, 2, 3, 1).flatten(2) @ senses_NSD
        # Q occurrences: in row n, place j holds the token of the chosen sense m
        n_Q, j_Q, m_Q = ((batch.ids_NT[..., None] == ids_M) & batch.mask_NT.bool()[..., None]).nonzero(as_tuple=True)
        weight_QT = alpha_NKTT[n_Q, senses_M[m_Q], :, j_Q] * predicting_NT[n_Q]
        q_Z, t_Z = weight_QT.nonzero(as_tuple=True)
        place_Z = (predicting_NT.long().cumsum(1) - 1)[n_Q[q_Z], t_Z]  # each row's own, from 0
        places, met = predicting_NT.sum(1).tolist(), n_Q[q_Z].bincount(minlength=len(group)).tolist()
        target_P = nn.functional.pad(batch.ids_NT[:, 1:], (0, 1))[predicting_NT]
        parts = zip(
            *(torch.split(x, places) for x in (_exact(out_NTD[predicting_NT]), target_P)),
            *(torch.split(x, met) for x in (place_Z, m_Q[q_Z], _exact(weight_QT[q_Z, t_Z]))),
            strict=True,
        )
        for i, (out_PD, target_P, place_Z, sense_Z, alpha_Z) in zip(group, parts, strict=True):
            out[i] = Seen(out_PD=out_PD, target_P=target_P, place_Z=place_Z, sense_Z=sense_Z, alpha_Z=alpha_Z)
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
