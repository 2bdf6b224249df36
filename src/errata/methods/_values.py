"""Places and values: which hidden states the examples turn on, and what these should be. What `memit` and `rome` share.

    delta = argmin  mean over prefixes L_goal(h + delta) + kl * KL(p || p') on "{subject} is a" + decay * |delta|^2 / |h|^2,
            |delta| <= clamp * |h|                Meng et al. 2022, arXiv 2202.05262, equation 4; 2023, arXiv 2210.07229, equation 16

h is the output of one block at the last token of the subject, or of the prompt where no subject is given (Hewitt et al. 2024, arXiv
2402.06155, section 4.1, "oracle" and "standard"). In every layout it is the residual stream: a shift of it is one of its MLP's output.

The facts are independent, so they are optimised side by side, and each leaves the batch when its goal is reached. Below the block nothing
changes: its output is computed once, the steps run through the blocks above it and the head at the scored tokens alone.

Unlike memit@80426fd: all four goals. Steps are lengths in units of |h|, with one second moment for each fact (Adam's m / sqrt(v) with a
scalar v): a setting means the same in any model, and a batch gives what its facts give alone. Prefixes are text that holds still, not
prompts in English, and follow from the seed. The KL is taken behind "is a" (as in the paper; there: behind the subject). A fact is done
by its goal alone (there: by the whole sum). Examples that read the same text up to their place have one key, so they share one value. A
subject may stand in the prompt more than once (the last one counts), and its last token is looked for in the tokens of the whole prompt.

File legend: N rows, T tokens, Q scored tokens, V vocabulary, P places, D model width, E examples, I an example behind one prefix.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errata import hooks, hosts, text
from errata.hosts import Batch, Host
from errata.methods._descend import goal_losses, kl_sum
from errata.types import Example, Progress, Run, Spread, here

ESSENCE = "{} is a"  # what is said here of a subject should stay
CHARACTERS = 120  # of a prefix at most
BETAS = (0.9, 0.999)
NEAR = 768  # tokens of one pass that is to be gone through many times


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of the values; each method carries them as its own fields.

    steps       at most
    lr          length of a step as a share of |h|
    clamp       greatest |delta| as a share of |h|
    decay       weight of |delta|^2 / |h|^2
    kl          weight of the KL on "{subject} is a", where a subject is given
    stop        a fact is done when the loss of its goal is below
    batch_size  rows in memory at once; it changes nothing else
    """

    steps: int
    lr: float
    clamp: float
    decay: float
    kl: float
    stop: float
    batch_size: int


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """One row: ids, how many of them are given, and the token `at` which the hidden state is shifted. `example` is None in "{} is a"."""

    ids: list[int]
    given: int
    at: int
    example: Example | None
    contrast: bool = False
    weight: float = 0.0


@final
@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a change is put. `keys` are the ids up to the place, plain and behind each prefix; `weights` are theirs, and sum to 1."""

    examples: tuple[Example, ...]
    keys: tuple[list[int], ...]
    weights: tuple[float, ...]
    asked: tuple[Asked, ...]


def quiet(host: Host, examples: Sequence[Example], run: Run, n: int) -> list[str]:
    """Up to `n` documents, drawn with the run's seed from the text that holds still: none states an edited fact, before or after."""
    if not n:
        return []
    given = run.hold or text.sampled(host, seed=run.seed)
    statements = text.Statements(examples, text.answers_of(host, examples), text.document_counts(given), len(given))
    drawn = list(dict.fromkeys(given))
    random.Random(run.seed).shuffle(drawn)
    return list(itertools.islice((document for document in drawn if not statements.any_in(document)), n))


def prefixes(documents: Sequence[str], n: int) -> list[str]:
    """The beginnings of `n` of the documents, to stand before a prompt."""
    return [(d if len(d) <= CHARACTERS else d[:CHARACTERS].rpartition(" ")[0] + ".") + " " for d in documents[:n]]


def places(host: Host, examples: Sequence[Example], leads: Sequence[str]) -> list[Place]:
    """The places of the examples, in an order of their own. Raises InvalidExample for what cannot be encoded."""
    found: dict[tuple[int, ...], list[Example]] = {}
    for e in sorted(examples, key=lambda e: e.id):
        ids, _, at = located(host, "", e, e.target)
        found.setdefault(tuple(ids[: at + 1]), []).append(e)
    return [_place(host, members, leads) for members in found.values()]


def _place(host: Host, examples: Sequence[Example], leads: Sequence[str]) -> Place:
    fitting = ["", *(lead for lead in leads if all(_fits(host, lead, e) for e in examples))]
    weights = [0.5, *([0.5 / (len(fitting) - 1)] * (len(fitting) - 1))] if len(fitting) > 1 else [1.0]
    keys, asked = [], []
    for lead, weight in zip(fitting, weights, strict=True):
        for j, e in enumerate(examples):
            for answer in (e.target, e.contrast):
                if answer is not None:
                    ids, given, at = located(host, lead, e, answer)
                    asked.append(Asked(ids=ids, given=given, at=at, example=e, contrast=answer is e.contrast, weight=weight))
            if j == 0:
                keys.append(asked[-1].ids[: asked[-1].at + 1])
    for subject in sorted({e.subject for e in examples if e.subject is not None}):
        ids = hosts.tokens(host, ESSENCE.format(subject))
        at = last_token(host, ids, ESSENCE.partition("{")[0] + subject)
        if len(ids) < host.context:  # the token behind it stands for whatever comes next
            asked.append(Asked(ids=[*ids, ids[-1]], given=len(ids), at=at, example=None))
    return Place(examples=tuple(examples), keys=tuple(keys), weights=tuple(weights), asked=tuple(asked))


def _fits(host: Host, lead: str, e: Example) -> bool:
    answers = max(len(a.encode()) for a in (e.target, e.contrast or ""))  # in bytes: no fewer than tokens
    return len(hosts.tokens(host, lead + e.prompt)) + answers <= host.context


def located(host: Host, lead: str, e: Example, answer: str) -> tuple[list[int], int, int]:
    """(ids of lead + prompt + answer, how many of them are given, the last token of the subject or, without one, of the prompt)."""
    ids, given = hosts.encode(host, lead + e.prompt, answer)
    if e.subject is None:
        return ids, given, given - 1
    end = e.prompt.rindex(e.subject) + len(e.subject)
    return ids, given, last_token(host, ids[:given], lead + e.prompt[:end])


def last_token(host: Host, ids: Sequence[int], begun: str) -> int:
    """The token of `ids` in which their beginning `begun` ends; the tokenizer may have merged its end with what follows."""
    alone = hosts.tokens(host, begun)
    if list(ids[: len(alone)]) == alone:
        return len(alone) - 1

    def length(ids: Sequence[int]) -> int:
        return len(host.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    wanted = length(alone)
    return next((k for k in range(len(ids)) if length(ids[: k + 1]) >= wanted), len(ids) - 1)


def values(
    host: Host, found: Sequence[Place], layer: int, settings: Settings, progress: Progress, spread: Spread = here
) -> Float[Tensor, "P D"]:
    """(P, D) what should be added to the output of block `layer` at each place, in float32 or better. What is optimised side by side is a
    shard."""
    groups = list(_groups(found, settings.batch_size))
    parts = spread(host, _optimising, [[found[p] for p in group] for group in groups], (layer, settings))
    out: dict[int, Tensor] = {}
    for group, part in zip(groups, progress(parts, "optimising values", len(groups)), strict=True):
        out |= zip(group, part, strict=True)
    return torch.stack([out[p] for p in range(len(found))])


def _optimising(host: Host, shared: tuple[int, Settings]) -> Callable[[list[Place]], Float[Tensor, "P D"]]:
    return lambda group: _values(host, group, *shared)


def _groups(found: Sequence[Place], rows: int) -> Iterator[list[int]]:
    """Places of similar length, together at most `rows` rows unless it is a single place."""
    group: list[int] = []
    for p in sorted(range(len(found)), key=lambda p: max(len(a.ids) for a in found[p].asked)):
        if group and sum(len(found[q].asked) for q in (*group, p)) > rows:
            yield group
            group = []
        group.append(p)
    yield group


@final
class _Above:
    """The part of the model above one block, over rows of which the block's output is computed once.

    Rows of similar length run together, a few at a time: with more of them the hidden states no longer stay near the processor.
    """

    def __init__(self, host: Host, layer: int, rows: Sequence[Asked]) -> None:
        self.host = host
        self.batch = hosts.pad(host, [(a.ids, a.given) for a in rows])
        self.at_N = torch.tensor([a.at for a in rows], device=host.device)
        self.skipped = [f"{host.layout.blocks}.{i}" for i in range(layer + 1)]
        self.parts = list(hosts.by_length([(a.ids, a.given) for a in rows], NEAR))
        self.outputs: list[Any] = []
        for part in self.parts:
            with torch.no_grad(), hooks.recording(host.model, self.skipped[-1]) as kept:
                hosts.predictions(host, self._cut(part))
            self.outputs += kept
        width = hooks.first(self.outputs[0]).shape[-1]
        self.h_ND = hooks.first(self.outputs[0]).new_zeros(len(rows), width)
        for part, output in zip(self.parts, self.outputs, strict=True):
            self.h_ND[part] = hooks.first(output)[torch.arange(len(part)), self.at_N[part]]

    def _cut(self, rows: Sequence[int]) -> Batch:
        """Some rows, no wider than the longest of them."""
        width = int(self.batch.mask_NT[rows].sum(1).max())
        ids_NT, mask_NT, scored_NT = (x[rows, :width] for x in (self.batch.ids_NT, self.batch.mask_NT, self.batch.scored_NT))
        return Batch(ids_NT=ids_NT, mask_NT=mask_NT, scored_NT=scored_NT)

    def predictions(self, live: Sequence[int], shift_ND: Float[Tensor, "N D"]) -> Float[Tensor, "Q V"]:
        """(Q, V) logits that predict the scored tokens of the `live` rows, row after row, with their hidden states shifted."""
        found, where, among = [], [], {row: i for i, row in enumerate(live)}
        for part, output in zip(self.parts, self.outputs, strict=True):
            of_part = [k for k, row in enumerate(part) if row in among]
            if not of_part:
                continue
            rows = [part[k] for k in of_part]
            batch = self._cut(rows)
            h_NTD = hooks.first(output)[of_part, : batch.ids_NT.shape[1]]
            shift = shift_ND[[among[row] for row in rows]].to(h_NTD.dtype)
            h_NTD = h_NTD.index_put((torch.arange(len(rows), device=h_NTD.device), self.at_N[rows]), shift, accumulate=True)
            with hooks.skipping(self.host.model, self.skipped, hooks.with_first(output, h_NTD)):
                found.append(hosts.predictions(self.host, batch))
            places = torch.tensor([among[row] for row in rows], device=h_NTD.device)
            where.append(places[batch.scored_NT.bool().nonzero()[:, 0]])
        return torch.cat(found)[torch.cat(where).argsort(stable=True)]

    def scored(self, live: Sequence[int]) -> tuple[Int[Tensor, "Q"], Int[Tensor, "Q"]]:
        """(Q,) the row, and the id, of each token that `predictions` predicts."""
        where_NT = self.batch.scored_NT[live].bool()
        return torch.tensor(live, device=where_NT.device)[where_NT.nonzero()[:, 0]], self.batch.ids_NT[live][where_NT]


def _values(host: Host, found: Sequence[Place], layer: int, s: Settings) -> Float[Tensor, "P D"]:
    """`values` of places that are all in memory at once."""
    rows = [(p, a) for p, place in enumerate(found) for a in place.asked]
    above = _Above(host, layer, [a for _, a in rows])
    dtype = torch.promote_types(above.h_ND.dtype, torch.float32)
    place_N = torch.tensor([p for p, _ in rows], device=host.device)
    plain = [[p for p, _ in rows].index(p) for p in range(len(found))]  # each place begins with it
    norm_P = above.h_ND[plain].to(dtype).norm(dim=1)
    delta_PD = torch.zeros(len(found), above.h_ND.shape[-1], dtype=dtype, device=host.device)
    m_PD, v_P, (b1, b2) = torch.zeros_like(delta_PD), torch.zeros_like(norm_P), BETAS

    essence = [i for i, (_, a) in enumerate(rows) if a.example is None]
    with torch.no_grad():
        base_V = dict(zip(essence, above.predictions(essence, delta_PD[place_N[essence]]), strict=True)) if essence else {}
    items = [(i, i + (a.example.contrast is not None), p, a) for i, (p, a) in enumerate(rows) if a.example is not None and not a.contrast]
    questions = {q: n for n, q in enumerate(sorted({(p, a.example.id) for _, _, p, a in items if a.example}))}
    tokens_N = above.batch.scored_NT.sum(1).to(dtype)
    still = set(range(len(found)))

    for step in range(s.steps):
        live = [i for i, (p, _) in enumerate(rows) if p in still]
        leaf_PD = delta_PD.clone().requires_grad_()
        logits_QV = above.predictions(live, leaf_PD[place_N[live]])
        row_Q, id_Q = above.scored(live)
        logp_Q = logits_QV.log_softmax(-1).gather(-1, id_Q.unsqueeze(1)).squeeze(1)
        logp_N = torch.zeros(len(rows), dtype=logp_Q.dtype, device=host.device).index_add(0, row_Q, logp_Q)

        now = [(i, j, p, a.example, a.weight) for i, j, p, a in items if p in still and a.example]
        i_I, j_I = [i for i, *_ in now], [j for _, j, *_ in now]
        loss_I = goal_losses(logp_N[i_I], logp_N[j_I], tokens_N[i_I], [e for *_, e, _ in now], enough=0.0)
        weight_I = torch.tensor([w for *_, w in now], dtype=loss_I.dtype, device=host.device)
        of_I = torch.tensor([questions[p, e.id] for _, _, p, e, _ in now], device=host.device)
        goal_E = torch.zeros(len(questions), dtype=loss_I.dtype, device=host.device).index_add(0, of_I, weight_I * loss_I)

        still &= {p for (p, _), loss in zip(questions, goal_E.tolist(), strict=True) if not loss < s.stop}
        if not still:
            break
        loss = goal_E.sum() + s.decay * (leaf_PD.square().sum(1) / norm_P.square()).sum()
        if kept := [i for i in live if i in base_V]:
            of_kept = torch.isin(row_Q, torch.tensor(kept, device=host.device))
            loss = loss + s.kl * kl_sum(torch.stack([base_V[i] for i in kept]), logits_QV[of_kept])
        (grad_PD,) = torch.autograd.grad(loss, leaf_PD)
        open_ = sorted(still)
        m_PD[open_] = b1 * m_PD[open_] + (1 - b1) * grad_PD[open_]
        v_P[open_] = b2 * v_P[open_] + (1 - b2) * grad_PD[open_].square().sum(1)
        scale_P = (v_P[open_] / (1 - b2 ** (step + 1))).sqrt() + 1e-30
        step_PD = m_PD[open_] / (1 - b1 ** (step + 1)) / scale_P.unsqueeze(1)
        moved_PD = delta_PD[open_] - s.lr * norm_P[open_].unsqueeze(1) * step_PD
        reach_P = s.clamp * norm_P[open_]
        delta_PD[open_] = moved_PD * (reach_P / moved_PD.norm(dim=1).clamp(min=1e-30)).clamp(max=1).unsqueeze(1)
    return delta_PD
