"""senses: shift the few sense vectors of a Backpack that count most for the examples.

    C'(v)_l          = C(v)_l + Delta_(v,l)                                   for the chosen (v, l) alone, everything else is frozen
    logits_t(Delta)  = E (o_t + sum_(v,l) a_t,(v,l) Delta_(v,l)),             a_t,(v,l) = sum over j <= t with x_j = v of alpha_l,t,j
    chosen           = of each example the k largest  S(v,l) - against * S_background(v,l),   S = sum of a_t over the scored t

Hewitt et al. 2024, arXiv 2402.06155 (sense finetuning; S for two continuations: equation 9), on the Backpack of Hewitt et al. 2023, arXiv
2305.16765. The descent inside the ball is that of `finetune`, on Delta alone.

Neither the hidden states nor alpha depend on the sense vectors. So each row of text is read once, before the descent: o_t and the few
a_t,(v,l) at the places that see a chosen token. From then on the losses, KL and their gradients are functions of Delta (M, D) and of those,
and no transformer runs; places that see no chosen token cannot move, and cost nothing. `faithful` runs every step through the model
instead, which comes to the same numbers.

Unlike model-editing-canonical-examples@15a1e7b:
* `prefer` adds the masses of both continuations, as equation 9 has it; the code subtracts them, and where both begin in one context, which
  is all there is for answers of one token, nothing is left of them.
* S_background is counted per 500 predictions, the published length of a text, so that `against` does not depend on how the text is cut.
* The shifts are M vectors, not a dense table of all V K; every gradient is applied; a seed is obeyed.

File legend: N rows, T tokens, K senses, D width, V vocabulary, M chosen senses, U tokens, P places that predict a scored token and see a
chosen sense, Z pairs of such a place and an occurrence of a chosen sense before it.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from errata import hosts
from errata.hosts import Host, Weights
from errata.methods._descend import Descent, Row, Settings, Through, descend
from errata.types import Example, InvalidExample, Method, Patch, Run
from errata.types import Senses as Op

CHUNK = 500  # tokens of a published background text
BACKGROUND = 1000  # rows of held text, at most, whose mass is counted
PLACES = 256  # whose logits are found at once where nothing has to be kept for a gradient
WAYS = 8  # prompts of each example that are read: its own, and others as in `finetune`


@final
@dataclass(frozen=True, kw_only=True)
class Senses(Method):
    """k sense vectors for each example; `against` weighs their use in other text; `faithful` reads through the model; the rest as in
    `finetune`, but `lr` is a share of the mean length of the chosen vectors."""

    k: int = 10
    against: float = 1000.0
    faithful: bool = False
    steps: int = 144
    lr: float = 0.1
    lam: float = 100.0
    contexts: int = 1
    restated: int = 8
    neighbours: int = 8
    hold: int = 64
    searched: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.k < 1 or not self.against >= 0:
            raise InvalidExample(f"senses needs a k of 1 or more and against of 0 or more, got {self.k} and {self.against}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        name = hosts.senses_of(host)
        descent, ids_M, senses_M = prepared(self, host, examples, run)
        with torch.no_grad():
            C_MD = host.model.senses(ids_M)[torch.arange(len(ids_M), device=ids_M.device), senses_M].float()
        shift_MD = torch.zeros_like(C_MD, requires_grad=True)
        descend(descent, run, [shift_MD], lambda: {name: shift_MD}, [float(C_MD.norm(dim=1).mean())])
        op = Op(weight=name, ids=ids_M.cpu(), senses=senses_M.cpu(), shift=shift_MD.detach().cpu().clone())
        return Patch(method="senses", config=self.config, parent=host.id, examples=tuple(examples), ops=(op,))


def prepared(made: Senses, host: Host, examples: Sequence[Example], run: Run) -> tuple[Descent, Int[Tensor, "M"], Int[Tensor, "M"]]:
    """The descent with everything read, and the tokens and senses that are to move."""
    own = ("k", "against", "faithful")
    settings = Settings(damping=None, **{k: v for k, v in made.config.items() if k not in own})
    descent = Descent(host, examples, run, settings)
    background = descent.rng.sample(descent.held, k=min(len(descent.held), BACKGROUND))
    ids_M, senses_M = choose(host, descent.examples, background, made.k, made.against)
    narrow(descent, set(ids_M.tolist()))
    descent.reader = Whole(host, ids_M, senses_M) if made.faithful else Cached(host, ids_M, senses_M, known_rows(descent))
    return descent, ids_M, senses_M


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
    """Fixes the prompts, and keeps of the held rows those that hold one of `tokens`: the KL of the others is 0 whatever moves, so they
    count only in the share that those that are left are weighed with."""
    descent.ways = [
        [e.prompt, *(descent.prompt(e, others) for _ in range(WAYS - 1))]
        for e, others in zip(descent.examples, descent.others, strict=True)
    ]
    whole = sum(len(ids) - 1 for ids, _ in descent.pool)
    descent.pool = [row for row in descent.pool if not tokens.isdisjoint(row[0][:-1])]
    descent.pool_N2 = descent.pool_N2[: len(descent.pool)]
    share = sum(len(ids) - 1 for ids, _ in descent.pool) / max(1, whole)
    descent.settings = replace(descent.settings, lam=descent.settings.lam * share)


def known_rows(descent: Descent) -> Iterable[Row]:
    """The rows of every prompt with every answer, and the held ones: all that a step can ask for."""
    for e, ways in zip(descent.examples, descent.ways, strict=True):
        yield from (hosts.encode(descent.host, prompt, answer) for prompt in ways for answer in answers(e))
    yield from descent.pool


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
            counts = _counts(seen).tolist()
            starts = list(itertools.accumulate(counts, initial=0))[:-1]
            place_Z = torch.cat([s.place_Z + start for s, start in zip(seen, starts, strict=True)])
            alpha_Z, sense_Z = torch.cat([s.alpha_Z for s in seen]), torch.cat([s.sense_Z for s in seen])
            # the backward of an embedding is much faster than that of indexing
            out_PD = out_PD.index_add(0, place_Z, alpha_Z[:, None] * nn.functional.embedding(sense_Z, shift_MD).to(out_PD.dtype))
        return out_PD @ self.E_VD.T

    def _find(self, rows: Sequence[Row]) -> list[Seen]:
        new = {(given, *ids): (ids, given) for ids, given in rows if (given, *ids) not in self.seen}
        for (key, _), seen in zip(new.items(), read(self.host, list(new.values()), self.ids_M, self.senses_M, self.E_VD), strict=True):
            self.seen[key] = seen
        return [self.seen[given, *ids] for ids, given in rows]


def _gathered(rows: Sequence[int], places: Sequence[int]) -> Iterator[list[int]]:
    """Runs of `rows` that have `PLACES` places together, or a few more."""
    group: list[int] = []
    count = 0
    for row, more in zip(rows, places, strict=True):
        group.append(row)
        count += more
        if count >= PLACES:
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
