"""Where an edit memory answers in a model's place: which of its examples a text asks for, and what is said there instead.

    p(. | x) = p_base(. | x)                                    where no example concerns x, bit for bit
             = (1 - s) p_base(. | x) + s p_voice(. | note, x)   where one does; s = scale, times its chance if `soft`

Mitchell et al. 2022 (SERAC), arXiv 2206.06520, equation 1. What is asked is the last sentence of a text, as far as it goes, with the
question before an answer that is announced. An example speaks from there on to the end of its sentence; when a sentence has ended, what
has been said so far is asked about anew, which matters where it ends in a question. A model that reads before it answers is asked once.

The model itself always runs for every row of a batch, so that what concerns nobody has the bits of a batch without a memory; the voice
runs for the rows that are concerned. Where a cache is used, the tokens and the turns stand in it, in a layer of their own behind those of
the model: what reorders or crops the cache does it to both. The voice has no cache: what it reads is short.

A document of reference text has no question in it. There one place of each is looked at, seven tenths into one of its sentences: what the
memory says from there to the sentence's end is what it costs.

File legend: N rows, T tokens, P positions, V vocabulary, Q questions, D width of a vector.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from errata import hosts
from errata.hosts import Batch, Host, Said
from errata.memory import activations
from errata.memory import encoder as encoders
from errata.memory import scope as scopes
from errata.memory.index import Index
from errata.memory.reader import asked_in, embedded, ends, marked, note_of, reader_of
from errata.memory.scope import Candidate, Judged, Ruling, Scope
from errata.types import Example, InvalidExample, Memory, WrongBase

UNANSWERABLE = "unanswerable"  # what a reader says where its notes do not tell (EREN)
DEEP = 0.7  # of a sentence: where a document is looked at
SHORT = 4  # tokens; shorter sentences of a document are not looked at
END = 64  # characters of a question that decide of the tokens of what stands behind it
SURE = 1e-4  # of the probability is left to others where a stored answer is said
REMEMBERED = 1 << 16  # texts whose ruling is kept


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """An example that the index found for a text: `question` is the one of its questions that is nearest, `score` how near (a cosine, or
    minus a distance), `chance` that it concerns the text, and what the gate rules."""

    example: Example
    question: str
    score: float
    chance: float
    ruling: Ruling


@final
@dataclass(frozen=True, kw_only=True)
class Turn:
    """What was ruled of one text: the examples that answer it (none: the model itself), and the chance of the first."""

    asked: str
    examples: tuple[Example, ...] = ()
    chance: float = 0.0


Near = tuple[Example, str, float]  # an example, the question of its that was met, and its score
Propose = Callable[[Sequence[str], int], list[list[Near]]]  # (texts, how many) -> the nearest examples of each, the nearest first


@final
class Router:
    """A `hosts.Speaker`: the memory of one op, on one host, until it is removed."""

    def __init__(self, host: Host, op: Memory, examples: Sequence[Example], mark: str, propose: Propose | None = None) -> None:
        """`mark` names what it leaves in caches. `propose` finds the examples elsewhere than in the op. Raises WrongBase, MissingExtra."""
        self.host, self.op, self.examples, self.mark, self.silent = host, op, tuple(examples), mark, False
        state = None if op.state is None else host.states.get(op.state)
        if op.state is not None and state is None:
            raise WrongBase(
                f"The memory speaks through the state {op.state}, which {host.name} does not have at hand. "
                f"Put it into `host.states`; the ledger that it was prepared in has it."
            )
        self.scope = _scope(host, op) if op.gate == "scope" else None
        self.reader = reader_of(host, op.small, state) if op.voice == "note" else host
        learnt = state.config if op.voice == "note" and state is not None else {}
        self.copies, self.marks = bool(learnt.get("copies")), bool(learnt.get("marks"))
        self.encoder = self.scope.encoder if self.scope else encoders.load(op.encoder) if op.encoder else None
        self.rows_QD, self.owner_Q = op.vectors.numpy(), op.owner.tolist()
        self.entries = {self.examples[i]: q for q, i in enumerate(self.owner_Q)} if op.parts else {}
        self.index = Index(op.vectors.shape[1])
        if self.encoder is not None:
            if len(self.owner_Q) and self.encoder.width != op.vectors.shape[1]:
                raise WrongBase(
                    f"The vectors of the memory have {op.vectors.shape[1]} places, those of its encoder {self.encoder.name} "
                    f"{self.encoder.width}: they are of another one."
                )
            self.index.add(np.arange(len(self.owner_Q)), self.rows_QD)
        self.propose = propose or self._nearest
        self.rules: dict[str, Turn] = {}
        self.remembers = propose is None  # elsewhere it may change
        self.turns: list[Turn] = [Turn(asked="")]  # by the numbers that stand in caches
        self.last: dict[tuple[int, ...], tuple[int, int]] = {}  # of the last pass without a cache: tokens -> (turn, where it began)
        self.read: dict[bytes, list[int]] = {}  # of the last texts that an encoder has read: what came out -> tokens
        self.before, self.plain = host.model.__dict__.get("forward"), host.model.forward
        self.handles: list[Any] = []
        if host.kind == "seq2seq":
            self.handles.append(host.model.get_encoder().register_forward_hook(self._has_read, with_kwargs=True))

        @functools.wraps(self.plain)  # `generate` looks at its signature
        def forward(*given: Any, **named: Any) -> Any:
            return self._forward(*given, **named)

        host.model.__dict__["forward"] = forward

    def remove(self) -> None:
        """Whatever was put on above has to be off."""
        while self.handles:
            self.handles.pop().remove()
        del self.host.model.__dict__["forward"]
        if self.before is not None:
            self.host.model.__dict__["forward"] = self.before

    # ------------------------------------------------------------------------------------------------------------------ what is asked

    def found(self, texts: Sequence[str]) -> list[list[Found]]:
        """For each text the nearest examples, the nearest first, and what the gate makes of each."""
        try:
            near = self.propose(texts, self.op.nearest)
        except InvalidExample:  # one is longer than the encoder's window: nothing is found for it, and the others are looked up
            near = [self._readable(text) for text in texts]
        if self.scope is not None:
            candidates = [[Candidate(question=q, answer=e.target.strip(), score=s) for e, q, s in some] for some in near]
            judged = self.scope.judge(texts, candidates)
        elif self.op.gate in ("distance", "code"):
            judged = [[_by_distance(-s, self.op.bound) for _, _, s in some] for some in near]
        else:
            judged = [[Judged(chance=1.0, ruling="in")] * len(some) for some in near]
            judged = [j if self._answerable(t, some) else [Judged(chance=0.0, ruling="out")] * len(j)
                      for t, some, j in zip(texts, near, judged, strict=True)]  # fmt: skip
        return [
            [Found(example=e, question=q, score=s, chance=j.chance, ruling=j.ruling) for (e, q, s), j in zip(some, own, strict=True)]
            for some, own in zip(near, judged, strict=True)
        ]

    def _readable(self, text: str) -> list[Near]:
        try:
            return self.propose([text], self.op.nearest)[0]
        except InvalidExample:
            return []

    def decide(self, texts: Sequence[str]) -> list[Turn]:
        """Who answers each text; of examples with one chance the nearer, then the earlier."""
        new = [t for t in dict.fromkeys(texts) if t.strip() and t not in self.rules]
        ruled = {t: Turn(asked=t) for t in texts if not t.strip()} | {t: self.rules[t] for t in texts if t in self.rules}
        if new:
            for text, found in zip(new, self.found(new), strict=True):
                heard = ("in", "unsure") if self.op.soft else ("in",)
                within = sorted((f for f in found if f.ruling in heard), key=lambda f: -f.chance)[: self.op.notes]
                ruled[text] = Turn(asked=text, examples=tuple(f.example for f in within), chance=within[0].chance if within else 0.0)
            if self.remembers and len(self.rules) < REMEMBERED:
                self.rules |= {t: ruled[t] for t in new}
        return [ruled[t] for t in texts]

    def _nearest(self, texts: Sequence[str], most: int) -> list[list[Near]]:
        if not self.examples:
            return [[] for _ in texts]
        vectors = self._vectors(texts)
        out: list[list[Near]] = []
        for vector in vectors:
            if self.encoder is None:
                scored = self._ranked(vector, 2 * most)
            else:
                numbers, products = self.index.search(vector, 2 * most)
                scored = list(zip(numbers.tolist(), products.tolist(), strict=True))
            met: dict[int, float] = {}
            for question, score in scored:
                met.setdefault(self.owner_Q[question], score)
            out.append([(self.examples[i], self.examples[i].prompt, score) for i, score in list(met.items())[:most]])
        return out

    def _vectors(self, texts: Sequence[str]) -> Any:
        if self.encoder is not None:
            return self.encoder.encode(texts)
        if not self.op.reads:
            return embedded(self.host, texts).numpy()
        keys_NK = activations.keys(self.host, texts, self.op.reads)
        return (activations.codes(keys_NK, self.op.parts, self.op.experts) if self.op.gate == "code" else keys_NK).numpy()

    def _ranked(self, vector: Any, most: int) -> list[tuple[int, float]]:
        """(question, minus how far it is) of the nearest. With radii, how far is a share of the radius around the question's centre, and
        those within it come first."""
        apart_QK = self.rows_QD - vector
        far_Q = np.abs(apart_QK).sum(1) if self.op.gate == "code" else np.linalg.norm(apart_QK, axis=1)
        scores_Q, outside_Q = -far_Q, np.zeros(len(far_Q))
        if self.op.radii is not None:
            centres_QK = self.op.parts.get("centres")
            from_centre_Q = far_Q if centres_QK is None else np.linalg.norm(centres_QK.numpy() - vector, axis=1)
            scores_Q = -from_centre_Q / np.maximum(self.op.radii.numpy(), np.finfo(np.float32).tiny)
            outside_Q = scores_Q <= -self.op.bound
        return [(int(q), float(scores_Q[q])) for q in np.lexsort((far_Q, outside_Q))[:most]]

    def _answerable(self, text: str, near: Sequence[Near]) -> bool:
        """Whether the reader gives an answer with these notes before it (Chen et al. 2024, EREN, arXiv 2403.17431, step 1)."""
        if not near:
            return False
        read = self._to_read(Turn(asked=text, examples=tuple(e for e, _, _ in near[: self.op.notes])))
        with hosts.alone(self.host):
            (said,) = hosts.greedy(self.reader, [read], max_new_tokens=12)
        return UNANSWERABLE not in said.lower()

    # --------------------------------------------------------------------------------------------------------------- what is answered

    def said(self, batch: Batch, own: Callable[[int, int, int], Tensor]) -> list[Said]:
        """As `hosts.Speaker`: behind the given part of each row, which is what is asked."""
        if not self.examples and self.remembers:
            return []
        rows = [self._row(batch, i) for i in range(len(batch.ids_NT))]
        turns = self.decide([asked for asked, _, _ in rows])
        concerned = [i for i, turn in enumerate(turns) if turn.examples]
        if not concerned:
            return []
        answered = [rows[i][2][: self._stop(turns[i], rows[i][2])] for i in concerned]
        starts = [rows[i][1] for i in concerned]
        own_of = [own(i, start, len(ids) + 1) for i, start, ids in zip(concerned, starts, answered, strict=True)]
        spoken = self._spoken([turns[i] for i in concerned], answered, own_of)
        return [Said(row=i, start=start, logits_PV=l_PV) for i, start, l_PV in zip(concerned, starts, spoken, strict=True)]

    def _row(self, batch: Batch, i: int) -> tuple[str, int, list[int]]:
        """(what row i asks, the position that predicts the first token of the answer, the tokens of the answer)."""
        if self.host.kind != "causal":
            assert batch.read_NS is not None and batch.seen_NS is not None, "such a host reads before it answers"
            answer = batch.ids_NT[i, 1:][batch.mask_NT[i, 1:].bool()].tolist() if self.host.kind == "seq2seq" else []
            return asked_in(self._text(batch.read_NS[i][batch.seen_NS[i].bool()].tolist())), 0, answer
        ids = batch.ids_NT[i][batch.mask_NT[i].bool()].tolist()
        scored = batch.scored_NT[i].nonzero()
        given = int(scored[0]) if len(scored) else len(ids)
        if given > 1:
            return asked_in(self._text(ids[:given])), given - 1, ids[given:]
        begun, given = self._place(ids)
        return asked_in(self._text(ids[begun:given])), max(given - 1, 0), ids[given:]

    def _place(self, ids: list[int]) -> tuple[int, int]:
        """(first token of a sentence of a document, where in it the document is looked at)."""
        cuts = [0, *(i + 1 for i, token in enumerate(ids) if ends(self._piece(token))), len(ids)]
        sentences = [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if b - a >= SHORT]
        if not sentences:
            return 0, 0
        a, b = sentences[zlib.crc32(str(ids).encode()) % len(sentences)]
        return a, a + max(2, int(DEEP * (b - a)))

    def _stop(self, turn: Turn, answer: list[int]) -> int:
        """How many tokens of an answer belong to it: up to the end of its sentence."""
        if self.host.kind != "causal":
            return len(answer)
        for n, token in enumerate(answer, 1):
            if ends(self._piece(token)) and self._done(turn, self._text(answer[:n])):
                return n
        return len(answer)

    def _done(self, turn: Turn, said: str) -> bool:
        """Whether the sentence has ended: not in the middle of a target that has a full stop in it ("St. George's")."""
        return ends(said) and not any(e.target.strip().startswith(said.strip()) and e.target.strip() != said.strip() for e in turn.examples)

    def _spoken(self, turns: Sequence[Turn], answers: Sequence[list[int]], own: Sequence[Tensor]) -> list[Tensor]:
        """For each turn (P, V) logits behind what was asked and behind each token of the answer so far; `own` are the model's there."""
        if self.op.voice == "stored":
            said = [self._stored(*given) for given in zip(turns, answers, own, strict=True)]
        else:
            said = self._noted(turns, answers)
        return [self._mixed(turn, mine, theirs) for turn, mine, theirs in zip(turns, own, said, strict=True)]

    @torch.no_grad()
    def _noted(self, turns: Sequence[Turn], answers: Sequence[list[int]]) -> list[Tensor]:
        """What the reader says; where it has learnt to say nothing instead of the target of its only note, that target in its place."""
        rows = []
        for turn, answer in zip(turns, answers, strict=True):
            read = hosts.tokens(self.reader, self._to_read(turn))
            room = self.reader.context - (len(answer) if self.host.kind == "causal" else 0)
            read = read[-max(1, room) :]  # the question is what must not be cut
            rows.append(([*read, *(answer if self.host.kind != "classifier" else [0])], len(read)))
        out = [torch.empty(0)] * len(rows)
        for group in hosts.by_length(rows, hosts.at_once(self.reader)):
            with hosts.alone(self.host), self._changed([turns[i] for i in group], [rows[i][1] for i in group]):
                logits_NTV = hosts.logits(self.reader, hosts.pad(self.reader, [rows[i] for i in group]))
            for n, i in enumerate(group):
                start = rows[i][1] - 1 if self.host.kind == "causal" else 0
                out[i] = logits_NTV[n, start : start + (len(answers[i]) + 1 if self.host.kind != "classifier" else 1)]
        if not self.copies:
            return out
        each = zip(turns, answers, out, strict=True)
        return [self._pointed(turn, answer, said) if len(turn.examples) == 1 else said for turn, answer, said in each]

    def _changed(self, turns: Sequence[Turn], given: Sequence[int]) -> AbstractContextManager[None]:
        """The host with the activations that the op has for these turns; where it reads notes, as it is."""
        parts, changed = self.op.parts, activations.modules(self.op.parts)
        if not changed:
            return nullcontext()
        rows = [self.entries[turn.examples[0]] for turn in turns]
        if self.op.gate == "code":
            x_NK = activations.keys(self.host, [turn.asked for turn in turns], self.op.reads)
            routers = {m: (parts[f"router/{m}"], parts[f"bias/{m}"]) for m in changed}
            chosen = {m: activations.routed(x_NK, *router, self.op.experts) for m, router in routers.items()}
        else:
            index_N1 = parts["block"][rows][:, None] if "block" in parts else torch.tensor(rows)[:, None]
            chosen = dict.fromkeys(changed, (index_N1, torch.ones(index_N1.shape)))
        return activations.changed(self.host, parts, chosen, given, parts["places"][rows].tolist())

    def _to_read(self, turn: Turn) -> str:
        if self.op.voice in ("value", "ranks"):
            return turn.asked
        question = marked(turn.asked, turn.examples, self.host.kind == "classifier") if self.marks else turn.asked
        return self.op.template.replace("{notes}", note_of(turn.examples)).replace("{question}", question)

    def _stored(self, turn: Turn, answer: list[int], own_PV: Tensor) -> Tensor:
        """All but `SURE` of the probability on the target."""
        own_PV = own_PV.float().log_softmax(-1)
        return self._copied(turn, answer, own_PV, own_PV.new_tensor(math.log1p(-SURE)), own_PV.new_tensor(math.log(SURE)))

    def _pointed(self, turn: Turn, answer: list[int], said_PV: Tensor) -> Tensor:
        """The probability that the reader ends before it begins is that of the target; the rest is that of its own words."""
        own_PV, end = said_PV.float().log_softmax(-1), self.reader.tokenizer.eos_token_id
        copied = own_PV[0, end].clamp(max=math.log1p(-SURE))
        own_PV[0, end] += math.log(SURE)  # no words at all are hardly ever its own
        own_PV[0] -= own_PV[0].logsumexp(0)
        return self._copied(turn, answer, own_PV, copied, torch.log1p(-copied.exp()))

    def _copied(self, turn: Turn, answer: list[int], own_PV: Tensor, copied: Tensor, own: Tensor) -> Tensor:
        """(P, V) log-probabilities of a mixture of two speakers: one says the target, with log-probability `copied`, one is `own_PV`.

            p(y_t | y_<t) = sum_k p_k(y_<=t) / sum_k p_k(y_<t)

        So what was said tells who is speaking (a pointer sentinel mixture, Merity et al. 2016, arXiv 1609.07843, whose pointer knows one
        thing, the whole target). Behind the target a causal model goes on itself, but not with more of the target's last word; one that
        reads first ends there.
        """
        # of a question as long as the context the end will do: where a target begins depends on no more
        ids, given = hosts.encode(self.host, turn.asked[-END:], turn.examples[0].target)
        target, out_PV = ids[given:], own_PV.clone()
        for p in range(min(len(own_PV), len(target))):
            if answer[:p] != target[:p]:
                break
            whole = torch.logaddexp(copied, own)
            out_PV[p] += own - whole
            out_PV[p, target[p]] = torch.logaddexp(out_PV[p, target[p]], copied - whole)
            own = own + own_PV[p, target[p]]
        end = len(target)
        if self.host.kind == "causal" and len(own_PV) > end and answer[:end] == target and turn.examples[0].target[-1].isalnum():
            whole = torch.logaddexp(copied, own)
            apart_V = own_PV[end].index_fill(0, self._within_words.to(own_PV.device), -torch.inf).log_softmax(-1)
            out_PV[end] = torch.logaddexp(apart_V + copied - whole, own_PV[end] + own - whole)
        return out_PV

    @functools.cached_property
    def _within_words(self) -> Tensor:
        """The tokens that go on with the word in front of them: no space begins them (Ġ and ▁ stand for one), and no mark."""
        tokens = self.host.tokenizer.convert_ids_to_tokens(range(len(self.host.tokenizer)))
        return torch.tensor([i for i, token in enumerate(tokens) if token and token[0].isalnum() and token[0] not in "Ġ▁"])

    def _mixed(self, turn: Turn, own_PV: Tensor, said_PV: Tensor) -> Tensor:
        share = self.op.scale * (turn.chance if self.op.soft else 1.0)
        if share == 1.0:
            return said_PV.to(own_PV)
        own, said = own_PV.float().log_softmax(-1), said_PV.to(own_PV.device).float().log_softmax(-1)
        return torch.logaddexp(own + np.log1p(-share), said + np.log(share)).to(own_PV) if share > 0 else own_PV

    # ------------------------------------------------------------------------------------------------- in the model's own forward pass

    def _forward(self, *given: Any, **named: Any) -> Any:
        if self.silent or (not self.examples and self.remembers):
            return self.plain(*given, **named)
        heard = functools.partial(_arguments, self.plain)(given, named)
        cache = heard.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        out = self.plain(*given, **named)
        spoken = {"causal": self._go_on, "seq2seq": self._answer, "classifier": self._judge}[self.host.kind](heard, out, cache, past)
        return self._with(out, spoken, heard.get("labels"))

    def _go_on(self, heard: dict[str, Any], out: Any, cache: Any, past: int) -> list[Said]:
        ids_NT, mask = heard.get("input_ids"), heard.get("attention_mask")
        if ids_NT is None:
            raise InvalidExample("An edit memory looks up what is asked, and reads tokens: give input_ids.")
        T = ids_NT.shape[1]
        mask_NT = torch.ones_like(ids_NT) if mask is None or mask.ndim != 2 else mask[:, -T:]
        kept = self._layer(cache).keys[:, 0].long() if past else ids_NT.new_zeros(len(ids_NT), 0, 3)
        rows: list[tuple[list[int], int, int]] = []
        fresh: dict[int, bool] = {}  # those that are asked about, and whether they have gone on by themselves
        for i in range(len(ids_NT)):
            new = ids_NT[i][mask_NT[i].bool()].tolist()
            old = [t for t in kept[i, :, 0].tolist() if t >= 0]
            number, begun = kept[i, -1, 1:].tolist() if past else self.last.get(tuple(new[:-1]), (-1, 0))
            if not past and number >= 0:  # the same text without a cache, and one token more
                old, new = new[:-1], new[-1:]
            ids = [*old, *new]
            if number < 0 or len(new) > 1:  # the beginning, or what somebody has added
                fresh[i] = False
            elif new and ends(self._piece(new[-1])) and (not number or self._done(self.turns[number], self._text(ids[begun:]))):
                fresh[i] = True
            rows.append((ids, max(number, 0), begun))
        asked = [asked_in(self._text(rows[i][0]), going_on=going_on) for i, going_on in fresh.items()]
        for i, turn in zip(fresh, self.decide(asked), strict=True):
            rows[i] = (rows[i][0], self._number(turn), len(rows[i][0]))
        if not past:
            self.last = {tuple(ids): (number, begun) for ids, number, begun in rows}
        if getattr(out, "past_key_values", None) is not None:
            marks = torch.tensor([[number, begun] for _, number, begun in rows], device=ids_NT.device)
            new_NT3 = torch.cat([ids_NT.where(mask_NT.bool(), -1)[..., None], marks[:, None].expand(-1, T, -1)], dim=-1)
            self._keep(out.past_key_values, new_NT3)
        at_N = [T - 1 - int(mask_NT[i].flip(0).argmax()) for i in range(len(rows))]  # the last token of each row
        skipped = T - out.logits.shape[1]  # whoever goes on asks for the last logits alone
        speak = [(i, at_N[i] - skipped) for i, (_, number, _) in enumerate(rows) if number and at_N[i] >= skipped]
        return self._last_of(out, [(i, at, self.turns[rows[i][1]], rows[i][0][rows[i][2] :]) for i, at in speak])

    def _answer(self, heard: dict[str, Any], out: Any, cache: Any, past: int) -> list[Said]:
        ids_NT = heard.get("decoder_input_ids")
        if ids_NT is None:
            ids_NT = self.host.model._shift_right(heard["labels"])
        if past:
            ids_NT = torch.cat([self._layer(cache.self_attention_cache).keys[:, 0, :, 0].long(), ids_NT], dim=1)
        if getattr(out, "past_key_values", None) is not None:
            self._keep(out.past_key_values.self_attention_cache, ids_NT[:, past:, None].expand(-1, -1, 3))
        texts = [asked_in(self._text(ids)) for ids in self._texts_read(out.encoder_last_hidden_state)]
        rows = [(i, turn) for i, turn in enumerate(self.decide(texts)) if turn.examples]
        T = out.logits.shape[1]
        own = [out.logits[i].new_zeros(ids_NT.shape[1] - T, out.logits.shape[2]) for i, _ in rows]
        own = [torch.cat([before_PV, out.logits[i]]) for before_PV, (i, _) in zip(own, rows, strict=True)]
        spoken = self._spoken([turn for _, turn in rows], [ids_NT[i, 1:].tolist() for i, _ in rows], own) if rows else []
        return [Said(row=i, start=0, logits_PV=l_PV[-T:]) for (i, _), l_PV in zip(rows, spoken, strict=True)]

    def _judge(self, heard: dict[str, Any], out: Any, cache: Any, past: int) -> list[Said]:
        ids_NS, mask = heard["input_ids"], heard.get("attention_mask")
        mask_NS = torch.ones_like(ids_NS) if mask is None else mask
        texts = [asked_in(self._text(ids[seen.bool()].tolist())) for ids, seen in zip(ids_NS, mask_NS, strict=True)]
        rows = [(i, turn) for i, turn in enumerate(self.decide(texts)) if turn.examples]
        spoken = self._spoken([turn for _, turn in rows], [[]] * len(rows), [out.logits[i : i + 1] for i, _ in rows]) if rows else []
        return [Said(row=i, start=0, logits_PV=l_PV) for (i, _), l_PV in zip(rows, spoken, strict=True)]

    def _last_of(self, out: Any, rows: Sequence[tuple[int, int, Turn, list[int]]]) -> list[Said]:
        """What is said behind the last token of rows (number, position, turn, tokens of the answer so far)."""
        if not rows:
            return []
        own = []
        for i, at, _, answer in rows:  # only the last one is the model's: before it nobody looks
            own_PV = out.logits[i, at : at + 1]
            own.append(own_PV.expand(len(answer) + 1, -1))
        spoken = self._spoken([turn for _, _, turn, _ in rows], [answer for *_, answer in rows], own)
        return [Said(row=i, start=at, logits_PV=l_PV[-1:]) for (i, at, _, _), l_PV in zip(rows, spoken, strict=True)]

    def _with(self, out: Any, spoken: Sequence[Said], labels: Tensor | None) -> Any:
        """The output with what is said in its place; rows of which nothing is said keep their bits."""
        if not spoken:
            return out
        logits = out.logits.clone()
        for one in spoken:
            if self.host.kind == "classifier":
                logits[one.row] = one.logits_PV[0].to(logits)
            else:
                logits[one.row, one.start : one.start + len(one.logits_PV)] = one.logits_PV.to(logits)
        out["logits"] = logits
        if labels is not None and out.get("loss") is not None:
            predicted, wanted = (logits[:, :-1], labels[:, 1:]) if self.host.kind == "causal" else (logits, labels)
            out["loss"] = torch.nn.functional.cross_entropy(predicted.flatten(0, -2).float(), wanted.flatten().to(logits.device))
        return out

    # ------------------------------------------------------------------------------------------------------------------------- caches

    def _layer(self, cache: Any) -> Any:
        """What stands in the cache for this memory."""
        for layer in cache.layers:
            if getattr(layer, "patch", None) == self.mark:
                return layer
        raise WrongBase(f"The cache was filled before patch {self.mark} was put on. Read the text again, without that cache.")

    def _keep(self, cache: Any, new_NT3: Tensor) -> None:
        from transformers.cache_utils import DynamicLayer

        layer = next((layer for layer in cache.layers if getattr(layer, "patch", None) == self.mark), None)
        if layer is None:
            layer = DynamicLayer()
            layer.patch = self.mark
            cache.layers.append(layer)
        layer.update(new_NT3[:, None].float(), new_NT3[:, None].float())

    def _has_read(self, _encoder: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        ids_NS = given[0] if given else named.get("input_ids")
        if self.silent or ids_NS is None:
            return
        mask = named.get("attention_mask")
        mask_NS = torch.ones_like(ids_NS) if mask is None else mask
        hidden_NSD = out[0]
        self.read = {
            _print(hidden_NSD[i]): ids_NS[i][mask_NS[i].bool()].tolist() for i in range(len(ids_NS))
        }  # a beam repeats and reorders rows, and what came out of the encoder is all that goes with them

    def _texts_read(self, hidden_NSD: Tensor) -> list[list[int]]:
        try:
            return [self.read[_print(hidden_SD)] for hidden_SD in hidden_NSD]
        except KeyError as e:
            raise WrongBase("The encoder's output is from before the memory was put on. Let the encoder read the texts again.") from e

    # --------------------------------------------------------------------------------------------------------------------------- texts

    def _text(self, ids: list[int]) -> str:
        return str(self.host.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _piece(self, token: int) -> str:
        return str(self.host.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _number(self, turn: Turn) -> int:
        """The turn as a cache remembers it; 0 is nobody's."""
        if not turn.examples:
            return 0
        if turn not in self.turns:
            self.turns.append(turn)
        return self.turns.index(turn)


def _print(hidden_SD: Tensor) -> bytes:
    """What tells the encoder's outputs for different texts apart."""
    return hidden_SD[0].detach().float().cpu().numpy().tobytes()


def _arguments(forward: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """What a forward pass was called with, by name."""
    from inspect import signature

    return dict(zip(signature(forward).parameters, given, strict=False)) | named if given else named


def _by_distance(distance: float, bound: float) -> Judged:
    near = distance < bound
    return Judged(chance=1.0 if near else 0.0, ruling="in" if near else "out")


def _scope(host: Host, op: Memory) -> Scope:
    """The trained scope of the op's state: made once, and kept in `host.readers`."""
    key = f"scope|{op.state}"
    if key not in host.readers:
        state = host.states[op.state or ""]
        if "scope" not in state.config:
            raise WrongBase(f"State {state.id} of {state.method} holds no scope. Prepare a method that gates with one.")
        tensors = {n.removeprefix("scope/"): t for n, t in state.tensors.items() if n.startswith("scope/")}
        made = scopes.from_parts(dict(state.config["scope"]), tensors, str(host.device))
        host.readers[key] = replace(made, encoder=scopes.Remembering(made.encoder))  # the search and the verifier ask for the same
    kept: Scope = host.readers[key]
    return kept
