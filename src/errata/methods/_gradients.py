"""Value gradients: what each edited module reads, and which way what it gives should go, at the tokens that say the answers.

    k = input of the module,  v = dL / d(its output),  at the position that predicts each token of an answer
                                                                Mitchell et al. 2022 (MEND), arXiv 2110.11309; Tan et al. 2023 (MALMEN),
                                                                arXiv 2311.04661; what `ultraedit` sums too
    L = sum over examples of L_goal, for `raise` -log p(target)

A sum over tokens, not a mean over a batch: a row does not depend on what else is in the batch, how it is padded, or how it is cut.
It costs a pass and the part of a backward pass that is needed: no weight gets a gradient, nothing is kept below the first edited module,
and the head runs at the answers alone.

Unlike malmen@1df295d nothing goes through a disk, and the statistics of rows are merged exactly (there: a streamed deviation that is 11 to
13 % too large with four rows at a time, and NaN for good after a single one).

File legend: N rows, T tokens, Q scored tokens, P places, K key width, V value width, W width of what is counted, E examples.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from errata import hooks, hosts
from errata.hosts import Batch, Host, Weights
from errata.methods._descend import PASS, Row, goal_losses
from errata.types import Example, Progress, Rows, Spread, WrongBase, here, no_progress

AT_ONCE = 256  # examples whose rows are in memory together
FLOOR = 0.05  # of the root mean square deviation of all coordinates: one that hardly moves would become all that counts

Pairs = dict[str, tuple[Tensor, Tensor]]  # {module: ((N, K) keys, (N, V) gradients)}
Pass = tuple[Pairs, dict[str, list[int]]]  # the rows of some examples, one's behind the other's; of each, how many a module has


def rows(
    host: Host,
    examples: Sequence[Example],
    modules: Sequence[str],
    batch_size: int,
    progress: Progress = no_progress,
    everywhere: bool = False,
    weights: Weights | None = None,
    spread: Spread = here,
) -> tuple[Rows, ...]:
    """The rows of each example, see `taken`. Raises InvalidPatch where one is not finite."""
    found = taken(host, examples, modules, batch_size, progress, everywhere, weights, spread)
    return tuple(joined(host, e, [own]) for e, own in zip(examples, found, strict=True))


def joined(host: Host, example: Example, parts: Sequence[Pairs]) -> Rows:
    """All that was taken for an example. Raises InvalidPatch where a row is not finite."""
    # copies, for a part of a batch keeps the whole in memory
    keys, values = ({m: torch.cat([part[m][i] for part in parts]) for m in parts[0]} for i in (0, 1))
    return Rows(host=host.id, example=example, keys=keys, values=values)


def together(host: Host, rows: Sequence[Rows], modules: Sequence[str], means_of: int | None = None) -> Pairs:
    """{module: (k, g)} of the rows, one example after the other. `means_of` so many examples, as published: their gradients are then those
    of the mean over the answer tokens of that many examples."""
    share = [1.0] * len(rows)
    for start in range(0, len(rows) if means_of else 0, means_of or 1):
        batch = range(start, min(start + (means_of or 1), len(rows)))
        encoded = [hosts.encode(host, rows[i].example.prompt, rows[i].example.target) for i in batch]
        tokens = sum(len(ids) - given for ids, given in encoded)
        for i in batch:
            share[i] = 1 / tokens
    return {
        m: (
            torch.cat([r.keys[m] for r in rows]).to(host.device),
            torch.cat([part * r.values[m] for part, r in zip(share, rows, strict=True)]).to(host.device),
        )
        for m in modules
    }


def taken(
    host: Host,
    examples: Sequence[Example],
    modules: Sequence[str],
    batch_size: int,
    progress: Progress = no_progress,
    everywhere: bool = False,
    weights: Weights | None = None,
    spread: Spread = here,
    per_text: int = 0,
) -> list[Pairs]:
    """What each module reads and how what it gives should go, for each example, that of a contrast behind that of the target. `batch_size`
    examples are in memory at once, at most.

    `everywhere`: those of every token that something follows, not of those alone that predict an answer's. Where a text is read before it
    is answered, that is about the modules that answer; those that read have rows at every token, but for a classifier's without
    `everywhere`: its answer comes from the first. `weights` take the place of the model's. `spread` maps over the batches.
    `per_text`: of each text, in each module, those alone whose gradients are the longest, so many of them, and where too few have one the
    places nearest the middle; 0: all.

    Raises InvalidExample for what cannot be encoded.
    """
    out: dict[int, Pairs] = {}
    for group, found in _passes(host, examples, modules, batch_size, progress, everywhere, weights, spread, per_text):
        out |= zip(group, _apart(*found), strict=True)
    return [out[i] for i in range(len(examples))]


def gathered(
    host: Host,
    examples: Sequence[Example],
    modules: Sequence[str],
    batch_size: int,
    progress: Progress = no_progress,
    everywhere: bool = False,
    weights: Weights | None = None,
    spread: Spread = here,
    per_text: int = 0,
) -> Pairs:
    """The rows of all of them, as `taken`, as they come: sums need not know whose is which. Raises InvalidPatch where one is not finite."""
    passes = list(_passes(host, examples, modules, batch_size, progress, everywhere, weights, spread, per_text))
    parts = [pairs for _, (pairs, _) in passes]
    out = {m: (torch.cat([own[m][0] for own in parts]), torch.cat([own[m][1] for own in parts])) for m in modules}
    if not all(bool(rows_.sum().isfinite()) for both in out.values() for rows_ in both):  # or the sum is too large: then none is found
        for group, found in passes:
            for i, own in zip(group, _apart(*found), strict=True):
                joined(host, examples[i], [own])  # says which
    return {m: (keys_NK.to(host.device), v_NV.to(host.device)) for m, (keys_NK, v_NV) in out.items()}


def _passes(
    host: Host,
    examples: Sequence[Example],
    modules: Sequence[str],
    batch_size: int,
    progress: Progress,
    everywhere: bool,
    weights: Weights | None,
    spread: Spread,
    per_text: int,
) -> Iterator[tuple[list[int], Pass]]:
    """(which of the examples, theirs) of each pass."""
    encoded = [[hosts.encode(host, e.prompt, answer) for answer in (e.target, e.contrast) if answer is not None] for e in examples]
    longest = [max(own, key=lambda row: len(row[0])) for own in encoded]
    groups = [group[start : start + batch_size] for group in hosts.by_length(longest, PASS) for start in range(0, len(group), batch_size)]
    batches = [([examples[i] for i in group], [encoded[i] for i in group]) for group in groups]
    found = spread(host, _taking, batches, (list(modules), everywhere, weights, per_text))
    return iter(progress(zip(groups, found, strict=True), "reading value gradients", len(groups)))


def _taking(host: Host, shared: tuple[list[str], bool, Weights | None, int]) -> Callable[[tuple[list[Example], list[list[Row]]]], Pass]:
    """What takes the rows of one batch: of its examples, and of the tokens of each one's answers."""
    modules, everywhere, weights, per_text = shared

    def take(batch: tuple[list[Example], list[list[Row]]]) -> Pass:
        examples, own = batch
        padded = hosts.pad(host, [row for rows_ in own for row in rows_])
        parts = captured(host, padded, modules, _summed_loss(examples, own), everywhere, weights, per_text)
        ends = list(itertools.accumulate((len(rows_) for rows_ in own), initial=0))
        counts: dict[str, list[int]] = {}
        for m in modules:
            each_N = at(host, padded, m, everywhere).sum(1)
            each = (each_N.clamp(max=per_text) if per_text else each_N).tolist()
            counts[m] = [sum(each[a:b]) for a, b in itertools.pairwise(ends)]
        return {m: (k.float().cpu(), v.float().cpu()) for m, (k, v) in parts.items()}, counts

    return take


def _apart(pairs: Pairs, counts: dict[str, list[int]]) -> list[Pairs]:
    """The rows of a pass, example by example."""
    split = {m: zip(torch.split(k, counts[m]), torch.split(v, counts[m]), strict=True) for m, (k, v) in pairs.items()}
    return [dict(zip(split, own, strict=True)) for own in zip(*split.values(), strict=True)]


def some(examples: Sequence[Example]) -> Iterator[tuple[Example, ...]]:
    """The examples in an order of their own, `AT_ONCE` of them at a time: that many rows are in memory while sums are made of them."""
    ordered = sorted(examples, key=_place)
    for start in range(0, len(ordered), AT_ONCE):
        yield tuple(ordered[start : start + AT_ONCE])


def in_order(host: Host, rows_: Sequence[Rows]) -> list[list[Rows]]:
    """The rows as `some` would have had them taken. Raises WrongBase for rows of other weights."""
    if other := next((r for r in rows_ if r.host != host.id), None):
        raise WrongBase(f"The rows of '{other.example}' were taken on weights {other.host}, {host.name} has {host.id}. Take them again.")
    ordered = sorted(rows_, key=lambda r: _place(r.example))
    return [ordered[start : start + AT_ONCE] for start in range(0, len(ordered), AT_ONCE)]


def _place(e: Example) -> tuple[int, str]:
    """Among others: those of one length stand together, for texts of a pass are padded to its longest."""
    return len(e.prompt) + len(e.target), e.id


def _summed_loss(examples: Sequence[Example], own: Sequence[list[Row]]) -> Callable[[Float[Tensor, "N"]], Tensor]:
    """The sum of the examples' losses, from log p of their rows, one behind the other: for each the target's, then any contrast's."""
    ends = list(itertools.accumulate(len(rows_) for rows_ in own))
    firsts, lasts = [end - len(rows_) for end, rows_ in zip(ends, own, strict=True)], [end - 1 for end in ends]
    tokens = [float(len(ids) - max(given, 1)) for (ids, given), *_ in own]

    def loss(logp_N: Tensor) -> Tensor:
        tokens_E = torch.tensor(tokens, dtype=logp_N.dtype, device=logp_N.device)
        each_E = goal_losses(logp_N[firsts], logp_N[lasts], tokens_E, examples, enough=0.0)
        # goal_losses gives what an answer of n tokens lacks for each of them
        per_token_E = torch.tensor([e.goal == "raise" for e in examples], device=logp_N.device)
        return torch.where(per_token_E, tokens_E * each_E, each_E).sum()

    return loss


def at(host: Host, batch: Batch, module: str, everywhere: bool) -> Bool[Tensor, "N T"]:
    """Where the rows of a module are taken, before `per_text` chooses among them: see `taken`."""
    real_NT = hosts.places(host, batch, module)
    if hosts.reads(host, module):
        first_T = torch.arange(real_NT.shape[1], device=real_NT.device) == 0
        return real_NT & first_T if host.kind == "classifier" and not everywhere else real_NT
    follows_NT = real_NT if everywhere else batch.scored_NT.bool()
    return torch.cat([follows_NT[:, 1:], torch.zeros_like(follows_NT[:, :1])], dim=1)


def captured(
    host: Host,
    batch: Batch,
    modules: Sequence[str],
    loss: Callable[[Float[Tensor, "N"]], Tensor],
    everywhere: bool = False,
    weights: Weights | None = None,
    per_text: int = 0,
) -> dict[str, tuple[Float[Tensor, "Q K"], Float[Tensor, "Q V"]]]:
    """{module: (k, v)} where rows are taken, see `taken`, text after text. `loss` is a function of log p of each text's scored tokens."""
    outputs: dict[str, Tensor] = {}
    few = _few_places(host, batch, everywhere, per_text)

    def turned(module: str, y_NTV: Tensor) -> Tensor:
        # the first one that is reached is where the graph begins
        outputs[module] = y_NTV if y_NTV.requires_grad else y_NTV.detach().requires_grad_()
        return outputs[module]

    still = {name: weight.detach() for name, weight in host.model.named_parameters()} | (weights or {})  # they ask for no gradient
    looking = hooks.looking_at(host.model, *few) if few else nullcontext()
    with torch.enable_grad(), looking, hooks.reading(host.model, modules, inputs=True) as keys:
        with hooks.shifting(host.model, {module: partial(turned, module) for module in modules}):
            logp_NT = hosts.scored_logprobs(host, batch, still)
        found = torch.autograd.grad(loss(logp_NT.sum(1)), [outputs[module] for module in modules])
    # of a model that is split each module may be on a device of its own
    there = {m: (keys[m].detach().to(host.device), v.to(host.device)) for m, v in zip(modules, found, strict=True)}

    def places(module: str) -> Bool[Tensor, "N T"]:
        where_NT = at(host, batch, module, everywhere)
        asked = few[1] if few and module.startswith(f"{few[0]}.") else None
        if not per_text:
            return where_NT if asked is None else where_NT.gather(1, asked)
        ranked_NT = _ranked(where_NT) if asked is None else _ranked(where_NT).gather(1, asked)
        return _longest(ranked_NT, there[module][1].norm(dim=-1), per_text)

    where = {m: places(m) for m in modules}
    return {m: (k[where[m]], v[where[m]]) for m, (k, v) in there.items()}


def _few_places(host: Host, batch: Batch, everywhere: bool, per_text: int) -> tuple[str, Int[Tensor, "N P"]] | None:
    """(the last MLP, the places of each text at which it has to be asked): those that predict an answer, and those that `_longest` may
    choose besides. None where these are all, or where a patch that is on may ask where a token stands. In a small model this saves a
    twelfth of a pass."""
    if host.last_mlp is None or host.worn or (everywhere and not per_text):
        return None
    answers_NT = at(host, batch, host.last_mlp, everywhere=False)
    n = int(answers_NT.sum(1).max()) + per_text  # an answer's gradient may be nothing too
    if n >= answers_NT.shape[1]:
        return None
    chosen_NT = _longest(_ranked(at(host, batch, host.last_mlp, everywhere)), answers_NT.float(), n)
    # as many in each text: where one has no more, any others
    return host.last_mlp, chosen_NT.int().topk(n, dim=1).indices.sort(dim=1).values


def _ranked(where_NT: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The places, the nearer the middle of a text that begins with the first the higher; -1 elsewhere."""
    T = where_NT.shape[1]
    off_NT = (torch.arange(T, device=where_NT.device) - where_NT.sum(1, keepdim=True) // 2).abs()
    return torch.where(where_NT, -off_NT / T, -1.0)


def _longest(ranked_NT: Float[Tensor, "N T"], length_NT: Float[Tensor, "N T"], n: int) -> Bool[Tensor, "N T"]:
    """The `n` places of each text whose gradients are longest. Above the last attention those of all tokens are nothing but of those that
    predict, and their rows say that a key is to give what it gives: then it is the places nearest the middle, where a subject usually is,
    whatever else is in the batch. A gradient that is not finite counts as the longest, so that it is found."""
    where_NT = ranked_NT > -1
    value_NT = torch.where((length_NT != 0) & where_NT, length_NT, ranked_NT)
    first_Nn = value_NT.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(where_NT).scatter(1, first_Nn, True) & where_NT


def of_text(host: Host, texts: Sequence[str], modules: Sequence[str], tokens: int) -> dict[str, tuple["Moments", "Moments"]]:
    """{module: (of k, of v)} at every predicted token of the first `tokens` tokens of text, with L = -log p of the text."""
    out: dict[str, tuple[Moments, Moments]] = {}
    for parts in _of_text(host, texts, modules, tokens, everywhere=False):
        now = {m: (moments(k), moments(v)) for m, (k, v) in parts.items()}
        out = {m: (merged(out[m][0], k), merged(out[m][1], v)) if m in out else (k, v) for m, (k, v) in now.items()}
    return out


def second_moments(host: Host, texts: Sequence[str], modules: Sequence[str], tokens: int) -> dict[str, Float[Tensor, "V V"]]:
    """{module: G = E[v v^T]} at all of the first `tokens` tokens of text, with L = -log p of the text; float64: the output factor of K-FAC,
    with the text's own words for those that the model would draw (Martens & Grosse 2015, arXiv 1503.05671; Kunstner et al. 2019)."""
    sums, counts = dict[str, Tensor](), dict.fromkeys(modules, 0)
    for parts in _of_text(host, texts, modules, tokens, everywhere=True):
        for m, (_, v_NV) in parts.items():
            sound_NV = v_NV[v_NV.isfinite().all(1)]  # one that is not would leave nothing of the others
            sums[m] = sums.get(m, 0) + (sound_NV.T @ sound_NV).double()
            counts[m] += len(sound_NV)
    return {m: G_VV / max(1, counts[m]) for m, G_VV in sums.items()}


def _of_text(host: Host, texts: Sequence[str], modules: Sequence[str], tokens: int, everywhere: bool) -> Iterator[Pairs]:
    """What is `captured` of the first `tokens` tokens of text, a pass at a time."""
    chunks, left = [], tokens
    for chunk in hosts.chunks(host, texts):
        chunks.append(chunk)
        left -= len(chunk[0])
        if left <= 0:
            break
    for group in hosts.by_length(chunks, PASS):
        yield captured(host, hosts.pad(host, [chunks[i] for i in group]), modules, lambda logp_N: -logp_N.sum(), everywhere)


# --------------------------------------------------------------------------------------------------------------------------- statistics


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """How many rows, their mean, and their summed squared deviations from it, float64."""

    n: int
    mean_W: Float[Tensor, "W"]
    squares_W: Float[Tensor, "W"]


def moments(rows_NW: Float[Tensor, "N W"]) -> Moments:
    rows_NW = rows_NW.double()
    mean_W = rows_NW.mean(0)
    return Moments(n=len(rows_NW), mean_W=mean_W, squares_W=(rows_NW - mean_W).square().sum(0))


def merged(a: Moments, b: Moments) -> Moments:
    """Those of the rows of both, exactly (Chan, Golub & LeVeque 1979)."""
    n, apart_W = a.n + b.n, b.mean_W - a.mean_W
    return Moments(n=n, mean_W=a.mean_W + apart_W * (b.n / n), squares_W=a.squares_W + b.squares_W + apart_W.square() * (a.n * b.n / n))


def standardised(of: Moments, rows_NW: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
    """(row - mean) / deviation, as precise as the rows are; no deviation counts as less than `FLOOR` of the usual one. Zeros where nothing
    deviates."""
    variance_W = of.squares_W / max(of.n - 1, 1)  # one row deviates by nothing, which is not NaN
    least = FLOOR**2 * variance_W.mean()
    scale_W = variance_W.clamp(min=float(least)).sqrt()
    times_W = torch.where(scale_W > 0, 1 / scale_W, 0.0)
    return (rows_NW - of.mean_W.to(rows_NW)) * times_W.to(rows_NW)
