"""malmen: a hypernetwork proposes how each answer token's row should change, and ridge regression merges thousands of rows into one shift.

    S_m = argmin  sum_i |k_i S - d_i|^2 + lam_m <S, P S>  =  (K^T K + lam_m P)^-1 K^T D          d_i = -eta_m (k_i . k^_i) g^_i
                                            Tan et al. 2023, arXiv 2311.04661

k_i are a module's inputs at chosen tokens of the example, g_i the gradients of its outputs there (`_gradients.py`), k^ and g^ what the
network (`_hyper.py`) makes of them. It learns from training cases (`_meta.py`), and what it needs there of the model is dL/dS alone: from
that the solve is gone through backwards, with the factor that it has already (`_normal.backward`).

Of each text a module has rows at the `per_text` tokens alone where its gradient is longest: below where a subject is named, above where
the answer begins. All others say little of what to change, and cost as much. Above the last attention a token that predicts no answer has
none: there a row in the middle of the text says that its key is to give what it gives.

In each of `rounds` the rows are taken on what the rounds before have come to, so that what is still missing is asked for again, and only
that; of more than `MANY` examples there are as many rounds more. lam is `caution` times what was learnt, or more, so that a round uses no
more than its share of the budget. The first one is paid for with what text loses; no further one makes that worse, to first order. With
the KL of `spared` documents per token, others in each round (the mean gradient of the last `TURNS`, as in SAG: Schmidt et al. 2017),

    S_m = argmin  the same, for all modules together,  subject to  sum_m <dKL/dS_m, S_m> <= 0          (`_keys.of_sums`)

goes along what text feels least, and takes back what was hurt. Training begins behind rounds as well, without that constraint, and teaches
the next. With one round the rows of an example depend on no other example: whoever keeps them, or their sums, adds one with a pass and a
solve, and takes one back as if it had never been there (`rows`, `solve`).

Unlike malmen@1df295d, unless `faithful`, which stands for all of these at once (Adam's rates alone still rise and fall):
  - P is C = E[k k^T] over text, and lam counts usual keys as in `memit` (there: P = I and lam begins at 1, whatever the keys; the keys of a
    small model then have leverage .9 and more, the solve interpolates, and the shift grows to eight times the weight)
  - gradients and differences are in a metric that is short where text feels a change of the outputs (`_hyper.metric`)
  - there are several rounds (there: one), at any tokens (there: the answer's), in modules from below to above (there: the last blocks)
  - each example adds rows for up to `restated` other ways to ask for its fact (`_restated.py`): phrasings of the text that holds still,
    found once while preparing
  - the gradients are sums over tokens (there: means over the tokens of a batch of examples, so that a smaller batch says more)
  - the rank is 64 and Adam's rates are 5e-6 and, for eta and lam, 1e-3 (there: 1,920 and 1e-5); for the rest see `_hyper.py`, `_meta.py`
`held` documents raise lam until the budget is kept, as in `memit`; in all rounds but the last half of them do, roughly. With 0 the gate
alone keeps it.

File legend: N rows, K key width, V value width.
"""

import itertools
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hosts, text
from errata.hosts import Host, Weights
from errata.methods import _gradients, _hyper, _kept, _keys, _meta, _normal
from errata.methods._gradients import Pairs
from errata.methods._hyper import Net
from errata.methods._meta import Asked, Lesson, Merge, Merging, Pull, Shifts
from errata.methods._normal import Prior
from errata.methods._restated import restated, spoken_of
from errata.methods._values import quiet
from errata.types import Case, Example, InvalidExample, Method, Op, Patch, Progress, Rows, Run, Spread, State, forget, here

FAITHFUL = {
    "tokens": "answer",
    "per_text": 0,
    "prior": "I",
    "rounds": 1,
    "lam": 1.0,
    "restated": 0,
    "held": 0,
    "rank": 1920,
    "lr": 1e-5,
    "rate": 1e-5,
    "asked": 1,
    "near_weight": 1.0,
    "hold_weight": 0.0,
}
FIXED = ("tokens", "per_text", "prior", "restated", "ridge", "faithful")  # what an edit must share with its preparation
TAUGHT = 4  # rounds that a training knows, at most: those behind them find the same in smaller
KIND = 6  # examples of one kind of prompt that other phrasings are sought for
MANY, MOST = 256, 32  # there are as many rounds more as there are examples more than so many, but no more than so many
EACH = 4  # documents for each example, of those that a further round is not to make worse: the more is changed, the more it may hurt
TURNS = 4  # what the documents of so many rounds had lost is remembered: of one round's alone too much is chance
HASTY, LEAST = 2, 32  # a round in the middle looks at one of so many of the documents that hold still, but at so many at least
SLOT = "\0"  # what a phrasing speaks of


@final
@dataclass(frozen=True, kw_only=True)
class Malmen(Method):
    """modules: comma-separated beginnings of module names; empty: the last projections of up to six MLPs, evenly from the first block to
    the last (the uppermost ones if `faithful`). tokens: whose rows are taken, "all" or those that say the "answer"; per_text: so many of
    them in each text and module, those with the longest gradients, 0 for all. prior: P, "C", "I" or "U" (`_keys.prior`). rounds, caution,
    restated: see above. spared: so many documents at most, and `EACH` for each example. held, ridge, per_key: as in `memit`. chunk: rows
    that go through the network at once; it changes nothing else. rank: of the network's blocks. lam: first value of each module's. share:
    first length of the differences, as a share of the module's outputs. The rest: `_meta.Settings`."""

    spreads: ClassVar[bool] = True

    modules: str = ""
    tokens: str = "all"
    per_text: int = 2
    prior: str = "C"
    restated: int = 3
    rounds: int = 8
    caution: float = 12.0
    held: int = 500
    spared: int = 2000
    ridge: float = 1e-3
    per_key: int = 16
    chunk: int = 1024
    rank: int = 64
    lam: float = 0.1
    share: float = 0.15
    steps: int = 240
    lr: float = 5e-6
    rate: float = 1e-3
    least: int = 16
    most: int = 128
    asked: int = 2
    near: int = 64
    near_weight: float = 1.0
    hold: int = 32
    hold_weight: float = 200.0
    every: int = 20
    patience: int = 8
    clip: float = 1.0
    batch_size: int = 64
    faithful: bool = False

    def __post_init__(self) -> None:
        if self.prior not in _keys.PRIORS or self.tokens not in ("answer", "all"):
            raise InvalidExample(
                f'malmen has the priors "C", "I" and "U" and the tokens "answer" and "all", got {self.prior!r}, {self.tokens!r}.'
            )
        if self.per_text < 0:
            raise InvalidExample(f"malmen takes so many rows of a text as per_text says, all with 0, got {self.per_text}.")
        if self.spared < 0:
            raise InvalidExample(f"malmen spares 0 documents or more, got {self.spared}.")
        _meta.as_published(self, FAITHFUL | {"least": self.most})
        _meta.check("malmen", self.config)

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The network, the prior of each module, and the phrasings. Raises InvalidExample, UnknownName."""
        cases, begun = tuple(train_cases), run.state if run.state is not None and run.state.config.get("unfinished") else None
        modules = _meta.modules_of(host, self.modules, upper=self.faithful)
        texts = run.hold or text.sampled(host, seed=run.seed)
        if begun is None:
            C, _ = _keys.covariances(host, texts, modules, self.per_key)
            found = {m: self._prior(C_KK.to(host.device, torch.float64)) for m, C_KK in C.items()}
            tensors, units = _keys.kept({m: own for m, (own, _) in found.items()}), {m: unit for m, (_, unit) in found.items()}
            metrics = {} if self.faithful else self._metrics(host, texts, modules)
            ways = phrasings(host, [c.example for c in cases], texts, self.restated, run.seed)
        else:
            tensors, units, ways = dict(begun.tensors), begun.config.get("units", {}), begun.config.get("ways", {})
            metrics = {}  # they are in its network
        priors = self._priors(host, modules, tensors, units)  # as an edit will find them
        how: dict[str, Any] = {"modules": modules, "ways": ways, "progress": run.progress, "spread": run.spread}
        learning = partial(
            Merging,
            rows=partial(self._rows, host, **how),
            moved=self._differences,
            merge=self._merge(priors),
            rounds=min(self.rounds, TAUGHT),
            earlier=partial(self._earlier, host, partial(self._pairs, host, **how), priors),
            rank=self.rank,
            lam=self.lam,
            share=self.share,
            metrics=metrics,
        )
        tensors = {m: tensors[m] for m in modules if m in tensors}
        lesson = Lesson(
            name="malmen", modules=modules, learning=learning, config=self.config | {"ways": ways, "units": units}, tensors=tensors
        )
        return _meta.learnt(host, lesson, cases, run, _meta.settings_of(self.config))

    def rows(self, host: Host, examples: tuple[Example, ...], run: Run) -> tuple[Rows, ...]:
        """Keys and value gradients of each example. Raises UnknownName, WrongBase or InvalidExample for a state that does not serve."""
        state, _ = _meta.known(self, "malmen", host, run.state, FIXED)
        how = {"modules": state.config["modules"], "ways": state.config["ways"]}
        return self._rows(host, examples, progress=run.progress, spread=run.spread, **how)

    def solve(self, host: Host, rows: tuple[Rows, ...], run: Run) -> Patch:
        """The patch that all the rows come to in one round, in whatever order. Raises WrongBase for rows of other weights."""
        ordered = _gradients.in_order(host, rows)
        state, priors, units, read = self._known(host, run)
        parts = (_gradients.together(host, part, list(priors), self._batch()) for part in ordered)
        sums = _kept.of_rows(host, parts, priors, read)
        examples = tuple(r.example for r in rows)
        still = quiet(host, examples, run, self.held)
        solved = partial(_keys.of_sums, host, sums, units, tell=run.tell)
        ops = _keys.within(host, still, run.budget.epsilon, 1.0, solved, run.spread)
        return self._patch(host, examples, state, ops)

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """With one round, `solve` of the `rows`, of which only some are in memory at once; from `run.sums`, if these are of the same
        settings. Each further round reads all examples again."""
        state, priors, units, read = self._known(host, run)
        asked = partial(self._asked, ways=state.config["ways"])
        take = partial(self._taken, modules=state.config["modules"], progress=run.inner)
        summing = _kept.Summing(asked=asked, take=take, read=read, priors=priors)
        about = _kept.about(host, "malmen", state.id, self.config | {"held": 0, "caution": 0, "spared": 0})
        # further rounds read everything anyway: then the patch had better not depend on what was built before, not even in its last digits
        own = run if self.rounds == 1 else replace(run, sums=None, keep=forget)
        sums = _kept.of_examples(host, "malmen", about, examples, summing, own)
        rounds = self._rounds(len(examples))
        still, spared = self._held(host, examples, run, rounds)
        few = still[: max(LEAST, len(still) // HASTY)]
        lam, weights = self.caution, None
        lost = deque[dict[str, Tensor]](maxlen=TURNS)
        solved = partial(_keys.of_sums, host, sums, units, tell=run.tell)
        for done, now in run.progress(enumerate(spared, 1), "rounds", len(spared)):
            epsilon, lam = run.budget.epsilon * done / rounds, max(self.caution, lam / 2)
            (ops, weights), lam = _keys.inside(host, few, epsilon, lam, solved, run.spread, weights, further=2.0)
            changed = {op.weight.removesuffix(".weight"): _keys.dense(host, op) for op in ops}
            del sums, solved  # else they would lie beside those of the next round
            sums = _kept.of_all(host, examples, replace(summing, take=partial(take, weights=weights)), run)
            lost.append(self._worse(host, now, changed, run.spread))
            worse = {m: torch.stack([own[m] for own in lost]).mean(0) for m in lost[-1]}
            solved = partial(_keys.of_sums, host, sums, units, onto=changed, worse=worse, tell=run.tell)
        (ops, _), _ = _keys.inside(host, still, run.budget.epsilon, 1.0, solved, run.spread, weights)
        return self._patch(host, examples, state, ops)

    def _rounds(self, n: int) -> int:
        """Of so many examples: the more there are, the less of its way a round may go."""
        return self.rounds if self.rounds == 1 else max(self.rounds, min(MOST, round(self.rounds * n / MANY)))

    def _held(self, host: Host, examples: tuple[Example, ...], run: Run, rounds: int) -> tuple[list[str], list[list[str]]]:
        """(documents that say what an edit costs; for each further round others that it is not to make worse, as fresh as there are)."""
        each = min(self.spared, EACH * len(examples)) if rounds > 1 else 0
        drawn = quiet(host, examples, run, self.held + each * (rounds - 1))
        cut = min(self.held, len(drawn) * self.held // max(1, self.held + each))  # a share of both where text is short
        still, pool = drawn[:cut], drawn[cut:]
        turns = (itertools.islice(itertools.cycle(pool), i * each, (i + 1) * each) for i in range(rounds - 1))
        return still, [list(dict.fromkeys(turn)) for turn in turns]

    def _worse(self, host: Host, spared: Sequence[str], changed: Mapping[str, Tensor], spread: Spread) -> dict[str, Float[Tensor, "K V"]]:
        """{module: gradient of what these documents have lost, as KL per token, with `changed` added to the weights}."""
        shifts = {m: _meta.stored(host, m, delta) for m, delta in changed.items()}
        asked = Asked(prompts=[], near=[], held=hosts.chunks(host, spared))
        s = replace(_meta.settings_of(self.config), hold_weight=1.0)
        return _meta.measured(host, asked, shifts, s, learn=True, spread=spread)[1] if spared else {}

    def _known(self, host: Host, run: Run) -> tuple[State, dict[str, Prior], dict[str, float], _kept.Read]:
        """(the state, {module: its prior}, {module: its learnt weight}, what makes keys and differences of rows)."""
        state, net = _meta.known(self, "malmen", host, run.state, FIXED)
        found = self._priors(host, state.config["modules"], state.tensors, state.config["units"])
        priors, units = {m: own for m, (own, _) in found.items()}, {m: unit * _hyper.lam(net, m) for m, (_, unit) in found.items()}
        return state, priors, units, partial(self._read, net)

    def _read(self, net: Net, host: Host, rows: Pairs) -> Pairs:
        return {m: (keys_NK, self._differences(net, m, keys_NK, g_NV)) for m, (keys_NK, g_NV) in rows.items()}

    def _patch(self, host: Host, examples: tuple[Example, ...], state: State, ops: tuple[Op, ...]) -> Patch:
        return Patch(method="malmen", config=self.config | {"state": state.id}, parent=host.id, examples=examples, ops=ops)

    def _earlier(
        self,
        host: Host,
        take: Callable[..., Pairs],
        priors: Mapping[str, tuple[Prior, float]],
        net: Net,
        examples: tuple[Example, ...],
        rows: Pairs,
        rounds: int,
    ) -> tuple[Shifts, Pairs]:
        """What cautious rounds come to, as in `edit`, and the rows behind them."""
        shifts = Shifts()
        for _ in range(rounds):
            for m, both in rows.items():
                S_KV = self._solve(net, m, priors[m], *both, caution=self.caution).shift
                shifts[m] = shifts[m] + S_KV if m in shifts else S_KV
            rows = take(examples, weights=_meta.shifted(host, shifts))
        return shifts, rows

    def _batch(self) -> int | None:
        return self.batch_size if self.faithful else None

    def _rows(
        self,
        host: Host,
        examples: tuple[Example, ...],
        modules: Sequence[str],
        ways: Mapping[str, Sequence[str]],
        progress: Progress,
        weights: Weights | None = None,
        spread: Spread = here,
    ) -> tuple[Rows, ...]:
        """Those of the example's own prompt, and behind them those of its other ways."""
        asked = self._ways(host, examples, ways)
        flat, everywhere = [e for own in asked for e in own], self.tokens == "all"
        found = iter(_gradients.taken(host, flat, modules, self.batch_size, progress, everywhere, weights, spread, self.per_text))
        return tuple(_gradients.joined(host, e, [next(found) for _ in own]) for e, own in zip(examples, asked, strict=True))

    def _ways(self, host: Host, examples: Sequence[Example], ways: Mapping[str, Sequence[str]]) -> list[list[Example]]:
        """Each example, and behind it the other ways in which it is asked; where one is too long its own prompt again."""
        asked = [[e, *restatements(e, ways, self.restated)] for e in examples]
        return [[e if _meta.fits(host, e.prompt, e) else own[0] for e in own] for own in asked]

    def _asked(self, host: Host, examples: Sequence[Example], ways: Mapping[str, Sequence[str]]) -> list[Example]:
        return [e for own in self._ways(host, examples, ways) for e in own]

    def _taken(
        self,
        host: Host,
        texts: Sequence[Example],
        modules: Sequence[str],
        progress: Progress,
        weights: Weights | None = None,
        spread: Spread = here,
    ) -> Pairs:
        """The rows of all these texts together."""
        if self.faithful:  # then what else is in a batch counts
            rows = self._rows(host, tuple(texts), modules, {}, progress, weights, spread)
            return _gradients.together(host, rows, modules, self._batch())
        return _gradients.gathered(host, texts, modules, self.batch_size, progress, self.tokens == "all", weights, spread, self.per_text)

    def _pairs(self, host: Host, examples: tuple[Example, ...], ways: Mapping[str, Sequence[str]], **how: Any) -> Pairs:
        """`_rows` of all examples together."""
        return self._taken(host, self._asked(host, examples, ways), **how)

    def _metrics(self, host: Host, texts: Sequence[str], modules: Sequence[str]) -> dict[str, Float[Tensor, "V V"]]:
        wide = max(_keys.in_out(host, m)[1] for m in modules)
        found = _gradients.second_moments(host, texts, modules, self.per_key * wide)
        return {m: _hyper.metric(G_VV) for m, G_VV in found.items()}

    def _prior(self, C_KK: Float[Tensor, "K K"]) -> tuple[Prior, float]:
        """(P, what lam counts in)."""
        found, unit = _keys.prior(self.prior, C_KK, self.ridge)
        return found, 1.0 if self.faithful else unit

    def _priors(
        self, host: Host, modules: Sequence[str], tensors: Mapping[str, Tensor], units: Mapping[str, float]
    ) -> dict[str, tuple[Prior, float]]:
        """Those that were prepared."""
        if missing := next((m for m in modules if m not in units or (self.prior != "I" and m not in tensors)), None):
            raise InvalidExample(f"What was prepared knows nothing of {missing}. Give the settings that it began with, or begin afresh.")
        return {m: (_keys.of_kept(host, self.prior, m, tensors.get(m)), units[m]) for m in modules}

    @torch.no_grad()
    def _differences(self, net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        parts = zip(torch.split(keys_NK, self.chunk), torch.split(g_NV, self.chunk), strict=True)
        return torch.cat([_hyper.differences(net, module, *part) for part in parts])

    def _solve(
        self, net: Net, module: str, prior: tuple[Prior, float], keys_NK: Tensor, g_NV: Tensor, caution: float = 1.0
    ) -> _normal.Solved:
        own, unit = prior
        d_NV = self._differences(net, module, keys_NK, g_NV)
        return _normal.solve(_normal.of(own, keys_NK, d_NV), caution * unit * _hyper.lam(net, module))

    def _merge(self, priors: Mapping[str, tuple[Prior, float]]) -> Merge:
        def merge(net: Net, module: str, keys_NK: Tensor, g_NV: Tensor) -> tuple[Tensor, Pull]:
            solved = self._solve(net, module, priors[module], keys_NK, g_NV)

            def pull(grad_KV: Tensor) -> None:
                keys = None if solved.sums.rows is not None else keys_NK
                grad_NV, grad_log_lam = _normal.backward(solved, grad_KV, keys)
                for part in zip(*(torch.split(x, self.chunk) for x in (keys_NK, g_NV, grad_NV)), strict=True):
                    _hyper.pull(net, module, *part)
                log_lam = net.parameters[f"{module}/log_lam"]
                (log_lam * grad_log_lam.to(log_lam)).backward()  # type: ignore[no-untyped-call]

            return solved.shift, pull

        return merge


# ------------------------------------------------------------------------------------------------------------------------- other phrasings


def phrasings(host: Host, examples: Sequence[Example], documents: Sequence[str], n: int, seed: int) -> dict[str, list[str]]:
    """For each kind of prompt, with what it speaks of as a slot: up to `n` other ways to ask the same that text has, commonest first."""
    if not n:
        return {}
    seen, kinds = text.document_counts(documents), dict[str, list[Example]]()
    for e in sorted(examples, key=lambda e: e.id):
        topic = e.subject or text.topic(e.prompt, seen, len(documents))
        if topic in e.prompt:
            kinds.setdefault(e.prompt.replace(topic, SLOT), []).append(e)
    chosen = [e for same in kinds.values() for e in same[:KIND]]
    spoken = spoken_of(host, chosen, seen, len(documents))
    found: dict[str, Counter[str]] = {}
    for e, own, ways in zip(chosen, spoken, restated(host, chosen, spoken, documents, seen, 2 * n, seed), strict=True):
        if own.topic:
            asked = found.setdefault(e.prompt.replace(own.topic, SLOT), Counter())
            asked.update(way.replace(own.topic, SLOT) for way in ways if own.topic in way)
    return {kind: [way for way, _ in asked.most_common(n)] for kind, asked in sorted(found.items()) if asked}


def restatements(e: Example, ways: Mapping[str, Sequence[str]], n: int) -> list[Example]:
    """The example asked in up to `n` other ways; none if it is of no known kind. It depends on no other example."""
    for kind in sorted(ways, key=len, reverse=True):  # the one that says most
        if found := _of_kind(kind).fullmatch(e.prompt):
            return [replace(e, prompt=way.replace(SLOT, found[1]), subject=None) for way in ways[kind][:n]]
    return []


@cache
def _of_kind(kind: str) -> re.Pattern[str]:
    """What finds a prompt's topic; nothing where a kind has no place for it."""
    first, *rest = (re.escape(part) for part in kind.split(SLOT))
    return re.compile(first + "(.+?)" + r"\1".join(rest) if rest else "(?!)")
