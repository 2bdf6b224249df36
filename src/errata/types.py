"""The nouns: Example, Record, Case, Query, ScopeCase, Op, Patch, Budget, Verdict, Score, State, Run, Rows, Method, and the error tree.

Values only: frozen, keyword-only, checked once at construction, named by a hash of their content (`id`, "b2:" and 32 hex digits).
Nothing here reads a file, touches a model or knows a method. Change a value with `dataclasses.replace`.

EditError                                what the user can act on; the CLI prints the sentence, never a traceback
├── InvalidExample    (ValueError)       empty target, contrast without a goal that needs it, prompt too long, ...
├── ConflictError     (ValueError)       two active examples, or two records of the edit memory, give one question two answers
├── InvalidPatch      (ValueError)       a file or value that is not a whole, finite, well-formed patch
├── WrongBase         (ValueError)       the patch, or the index of a memory, was made for other weights
├── BudgetError       (ValueError)       a budget that cannot be, or a patch that does not fit it
├── InvalidReference  (ValueError)       reference text missing, empty, binary, or with nothing left to measure
├── UnknownName       (KeyError)         a method, host, module or record that does not exist ("Did you mean ...?")
├── UnknownArchitecture (NotImplementedError)  no row in hosts.LAYOUTS
├── LedgerError       (OSError)          a ledger or a memory that is busy, damaged, gone, or cannot be written
├── LeakError         (ValueError)       evaluation on a case that a state was trained on
├── EngineError       (RuntimeError)     no workers to be had, or workers that die again and again
└── MissingExtra      (ImportError)      an optional dependency that is not installed, with its install line
"""

import difflib
import hashlib
import itertools
import json
import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, final, get_args, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:  # types stands above hosts; only the annotations look down
    from errata.hosts import Host


class EditError(Exception):
    """Base of every error that the user can act on. The message is a sentence: both sides and the remedy."""

    def __str__(self) -> str:  # KeyError would print the repr of its message
        return str(self.args[0]) if self.args else ""


class InvalidExample(EditError, ValueError): ...


class ConflictError(EditError, ValueError): ...


class InvalidPatch(EditError, ValueError): ...


class WrongBase(EditError, ValueError): ...


class BudgetError(EditError, ValueError): ...


class InvalidReference(EditError, ValueError): ...


class UnknownName(EditError, KeyError):
    """A name that is not among the known ones; the message suggests the nearest."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> "UnknownName":
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        more = f" and {len(known) - 40} more" if len(known) > 40 else ""  # a model has hundreds of modules
        return cls(f"Unknown {kind} '{name}'.{hint} Known: {', '.join(known[:40]) or 'none'}{more}.")


class UnknownArchitecture(EditError, NotImplementedError): ...


class LedgerError(EditError, OSError): ...


class LeakError(EditError, ValueError): ...


class EngineError(EditError, RuntimeError): ...


class MissingExtra(EditError, ImportError): ...


def digest(*parts: bytes | str) -> str:
    """Content name of `parts`: BLAKE2b over each part with its length in front, so that ("ab", "c") is not ("a", "bc")."""
    return digest_of(parts)


def digest_of(parts: Iterable[bytes | str]) -> str:
    """`digest` of parts that need not be in memory together."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        h.update(len(raw).to_bytes(8, "little"))
        h.update(raw)
    return f"b2:{h.hexdigest()}"


def tensor_bytes(t: Tensor) -> bytes:
    """The raw bytes of `t` in row-major order; bf16 has no NumPy type, so the view is taken in torch."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def canonical_json(value: object) -> str:
    """One spelling for each value: sorted keys, no spaces, no NaN. Raises TypeError or ValueError for what has none."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text.encode()  # half of a surrogate pair passes json, and no file can hold it
    return text


Goal = Literal["raise", "lower", "prefer", "balance"]
Ring = Literal["subject", "relation", "unrelated"]
GOALS: tuple[Goal, ...] = get_args(Goal)
ANSWERED: tuple[Goal, ...] = ("raise", "prefer")  # what an answer with the target does, which is all that a memory can do
RINGS: tuple[Ring, ...] = get_args(Ring)


def _check_text(**texts: object) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InvalidExample(f"The {name} must be text, got {type(text).__name__} {text!r}.")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InvalidExample(f"The {name} {text!r} holds half a character (a lone surrogate): it was cut or decoded wrongly.") from e


@final
@dataclass(frozen=True, kw_only=True)
class Example:
    """What an editor may see. `prompt + target` is the exact string scored: no hidden space is put between them.

    The goals are the four canonical-examples losses (Hewitt et al. 2024, section 3.1): `raise` (good) makes `target` likely, `lower`
    (bad) makes it unlikely, `prefer` (good-v-bad) puts it above `contrast`, `balance` makes the two equally likely.
    `subject` is never required; where given it must stand in the prompt.

    Raises InvalidExample.
    """

    prompt: str
    target: str
    contrast: str | None = None
    subject: str | None = None
    goal: Goal = "raise"

    def __post_init__(self) -> None:
        optional = {"contrast": self.contrast, "subject": self.subject}
        _check_text(prompt=self.prompt, target=self.target, **{k: v for k, v in optional.items() if v is not None})
        if not self.prompt.strip():
            raise InvalidExample("The prompt is empty. Write the text that comes before the answer, as in 'The capital of Mauritius is'.")
        if not self.target.strip():
            raise InvalidExample(
                f"The target of '{self.prompt}' is empty. Write it after the bar: 'The capital of Mauritius is| Port Louis'."
            )
        if self.goal not in GOALS:
            raise InvalidExample(f"Unknown goal '{self.goal}'. Known: {', '.join(GOALS)}.")
        if (self.contrast is not None) != (self.goal in ("prefer", "balance")):
            need = "needs" if self.goal in ("prefer", "balance") else "takes no"
            raise InvalidExample(f"The goal '{self.goal}' {need} contrast (example '{self.prompt}').")
        if self.contrast is not None and not self.contrast.strip():
            raise InvalidExample(f"The contrast of '{self.prompt}' is empty.")
        if self.contrast == self.target:
            raise InvalidExample(f"Target and contrast of '{self.prompt}' are the same: '{self.target}'.")
        if self.subject is not None and (not self.subject or self.subject not in self.prompt):
            raise InvalidExample(f"The subject '{self.subject}' does not stand in the prompt '{self.prompt}'.")

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def id(self) -> str:
        return digest("example", canonical_json(self.as_dict()))

    def __str__(self) -> str:
        versus = f" / {self.contrast}" if self.contrast is not None else ""
        return f"{self.prompt}|{self.target}{versus}"


@final
@dataclass(frozen=True, kw_only=True)
class Record:
    """What the edit memory holds: an example, and which questions it concerns.

    aliases        other names of the example's subject: the question asked with one of them is the same question
    tags           a record without tags concerns every query, one with tags those queries that carry one of them
    since, until   from when, and up to but without which moment, it holds; ISO 8601, kept as UTC to the second; None: no bound

    What it stands in the place of and where it came from are no part of it: the store keeps them beside it. Raises InvalidExample.
    """

    example: Example
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    since: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.example, Example):
            raise InvalidExample(f"A record of the memory holds an example, got {type(self.example).__name__} {self.example!r}.")
        if self.example.goal not in ANSWERED:
            raise InvalidExample(
                f"The memory answers with the target, so it cannot {self.example.goal} it ('{self.example}'). Build it instead."
            )
        for name in ("aliases", "tags"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise InvalidExample(f"'{name}' is a list of texts, got the one text '{given}'.")
            for text in given:
                _check_text(**{name: text})
                if not text.strip():
                    raise InvalidExample(f"One of the {name} of '{self.example}' is empty. Leave it out.")
            # one spelling for each value: in another order, or said twice, they are the same record
            object.__setattr__(self, name, tuple(sorted(set(given))))
        if self.aliases and self.example.subject is None:
            raise InvalidExample(f"'{self.example}' has aliases and no subject. Name the subject that they are other names of.")
        for name in ("since", "until"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, utc(given))
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise InvalidExample(f"'{self.example}' would hold until {self.until}, and only since {self.since}.")

    @property
    def scope(self) -> dict[str, Any]:
        return {"aliases": list(self.aliases), "tags": list(self.tags), "since": self.since, "until": self.until}

    def as_dict(self) -> dict[str, Any]:
        return self.example.as_dict() | self.scope

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Record":
        """The inverse of `as_dict`. Raises InvalidExample on missing or unknown keys."""
        try:
            scope: dict[str, Any] = {
                k: tuple(raw[k]) if isinstance(raw[k], list) else raw[k] for k in ("aliases", "tags", "since", "until") if k in raw
            }
            return cls(example=Example(**{k: v for k, v in raw.items() if k not in scope}), **scope)
        except TypeError as e:
            raise InvalidExample(f"Not a record: {e}.") from e

    @property
    def id(self) -> str:
        return digest("record", self.example.id, canonical_json(self.scope))

    @property
    def questions(self) -> tuple[str, ...]:
        """The prompt, and the prompt with each alias in the subject's place."""
        prompt, subject = self.example.prompt, self.example.subject
        return tuple(dict.fromkeys([prompt, *(prompt.replace(subject, alias) for alias in self.aliases if subject is not None)]))

    def holds(self, moment: str) -> bool:
        """Whether it is valid at `moment`, written as `utc` writes it."""
        return (self.since is None or self.since <= moment) and (self.until is None or moment < self.until)

    def concerns(self, tags: Iterable[str]) -> bool:
        """Whether a query that carries `tags` is one of those that the record is about."""
        return not self.tags or not set(self.tags).isdisjoint(tags)

    def meets(self, other: "Record") -> bool:
        """Whether some query at some moment concerns both."""
        together = not self.tags or not other.tags or not set(self.tags).isdisjoint(other.tags)
        begun = max(self.since or "", other.since or "")
        return together and all(until is None or begun < until for until in (self.until, other.until))


def utc(moment: str | datetime) -> str:
    """A date or a time in ISO 8601 as UTC to the second, so that the order of texts is that of times. Without a zone it is taken for UTC.

    Raises InvalidExample.
    """
    try:
        read = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        return (read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (TypeError, ValueError, OverflowError, AttributeError) as e:
        raise InvalidExample(f"{moment!r} is no time. Write it as 2026-11-22 or 2026-11-22T09:30+01:00.") from e


def folded(question: str) -> str:
    """The spelling under which a question is looked up: case, width, white space and the mark at the end make no other question of it."""
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split()).rstrip(" .?!:…")


@final
@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A prompt near an edit whose answer must not move. `ring`: same subject and another relation, same relation and another
    subject, or unrelated."""

    prompt: str
    answer: str
    ring: Ring

    def __post_init__(self) -> None:
        _check_text(prompt=self.prompt, answer=self.answer)
        if not self.prompt.strip() or not self.answer.strip():
            raise InvalidExample(f"A neighbour needs a prompt and an answer, got '{self.prompt}' and '{self.answer}'.")
        if self.ring not in RINGS:
            raise InvalidExample(f"Unknown ring '{self.ring}'. Known: {', '.join(RINGS)}.")


@final
@dataclass(frozen=True, kw_only=True)
class Case:
    """What the judge sees: an example and the held-out text around it. An editor never receives one (`edit` takes Examples).

    `paraphrases` and `paragraphs` are prompts whose right answer is `example.target`; `negations` are prompts whose answer must not be
    it. `old` is the answer that the unedited model is known to give, where it is known.
    """

    example: Example
    old: str | None = None
    paraphrases: tuple[str, ...] = ()
    paragraphs: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    negations: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        _check_text(source=self.source, **({} if self.old is None else {"old": self.old}))
        for name in ("paraphrases", "paragraphs", "negations"):
            if isinstance(getattr(self, name), str):
                raise InvalidExample(f"'{name}' is a list of texts, got the one text '{getattr(self, name)}'.")
            for text in getattr(self, name):
                _check_text(**{name: text})

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {
            "example": self.example.as_dict(),
            "neighbours": [{f.name: getattr(n, f.name) for f in fields(n)} for n in self.neighbours],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Case":
        """The inverse of `as_dict`. Raises InvalidExample on missing or unknown keys."""
        try:
            for key in ("prompt", "target"):
                if key not in raw["example"]:
                    raise InvalidExample(f"Not a case: its example has no '{key}'.")
            lists: dict[str, Any] = {k: raw.get(k, ()) for k in ("paraphrases", "paragraphs", "negations")}
            lists = {k: v if isinstance(v, str) else tuple(v) for k, v in lists.items()}  # tuple("one text") would be its letters
            return cls(
                example=Example(**raw["example"]),
                neighbours=tuple(Neighbour(**n) for n in raw.get("neighbours", ())),
                **{k: v for k, v in raw.items() if k not in ("example", "neighbours", *lists)},
                **lists,
            )
        except (TypeError, KeyError, AttributeError) as e:
            raise InvalidExample(f"Not a case: {e!r}.") from e

    @property
    def id(self) -> str:
        return digest("case", canonical_json(self.as_dict()))


@final
@dataclass(frozen=True, kw_only=True)
class Query:
    """What a model is asked about an edit's scope. In scope, `answer` is what the edit makes right; out of it, what would be answered there
    (None: it is not known, and only what changes is looked at).

    kind    in scope: edit, rephrase, implication, yes/no, claim, opinion; out of scope: a ring, near (found by an encoder), or as in scope
    hard    in scope: not a rephrasing; out of scope: about something that the edit is about too
    about   the page, topic or subject, where it is known
    """

    prompt: str
    answer: str | None = None
    kind: str = ""
    hard: bool = False
    about: str = ""

    def __post_init__(self) -> None:
        _check_text(prompt=self.prompt, kind=self.kind, about=self.about, **({} if self.answer is None else {"answer": self.answer}))
        if not self.prompt.strip() or (self.answer is not None and not self.answer.strip()):
            raise InvalidExample(f"A query needs a prompt, and an answer that is not empty, got '{self.prompt}' and '{self.answer}'.")


@final
@dataclass(frozen=True, kw_only=True)
class ScopeCase:
    """An edit, what it concerns (`inside`) and what it does not (`outside`): what a memory learns its scope from, and what judges it.

    It says more than a Case: what follows from an edit has other answers than its target. Where the edit is an attitude, `inside` are
    utterances that express it and `against` are those that express the opposite. `about` is the page, topic or subject of the edit, where
    it is known. Raises InvalidExample; a query cannot be inside and outside.
    """

    example: Example
    inside: tuple[Query, ...] = ()
    outside: tuple[Query, ...] = ()
    against: tuple[Query, ...] = ()
    about: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        _check_text(about=self.about, source=self.source)
        if not self.inside and not self.outside:
            raise InvalidExample(f"'{self.example}' has no query in its scope and none out of it.")
        if silent := next((q for q in (*self.inside, *self.against) if q.answer is None), None):
            raise InvalidExample(f"'{silent.prompt}' is in the scope of '{self.example}': say what should be answered.")
        within = {folded(prompt) for prompt in self.prompts}
        if both := next((q for q in self.outside if folded(q.prompt) in within), None):
            raise InvalidExample(f"'{both.prompt}' stands in the scope of '{self.example}' and out of it.")

    @property
    def prompts(self) -> tuple[str, ...]:
        """Everything that the edit concerns: its own prompt and those of `inside` and `against`."""
        return tuple(dict.fromkeys([self.example.prompt, *(q.prompt for q in (*self.inside, *self.against))]))

    @property
    def case(self) -> Case:
        """What a Case can say of it: its rephrasings, and what lies outside and has an answer."""
        own = (self.example.prompt, self.example.target)
        known = ((q, q.answer) for q in self.outside if q.answer is not None)
        return Case(
            example=self.example,
            paraphrases=tuple(q.prompt for q in self.inside if q.answer == own[1] and q.prompt != own[0]),
            neighbours=tuple(Neighbour(prompt=q.prompt, answer=answer, ring=_ring(q)) for q, answer in known),
            source=self.source,
        )

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        queries = {
            name: [{f.name: getattr(q, f.name) for f in fields(q)} for q in plain[name]] for name in ("inside", "outside", "against")
        }
        return plain | {"example": self.example.as_dict()} | queries

    @property
    def id(self) -> str:
        return digest("scope case", canonical_json(self.as_dict()))


def _ring(query: Query) -> Ring:
    return next((ring for ring in RINGS if ring == query.kind), "relation" if query.hard else "unrelated")


def _check_tensor(weight: object, **tensors: Tensor) -> None:
    if not isinstance(weight, str) or not weight:
        raise InvalidPatch(f"An op needs the name of a parameter, got {weight!r}.")
    for name, t in tensors.items():
        if t.device.type != "cpu" or t.dtype != torch.float32:
            raise InvalidPatch(f"{name} of '{weight}' must be float32 on the CPU, got {t.dtype} on {t.device}.")
        if not torch.isfinite(t).all():
            raise InvalidPatch(f"{name} of '{weight}' holds NaN or infinity.")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Add:
    """W + delta. `delta` has the shape of the parameter called `weight`."""

    weight: str
    delta: Tensor

    def __post_init__(self) -> None:
        _check_tensor(self.weight, delta=self.delta)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AddLowRank:
    """W + scale * B A for W as (out, in), whatever the orientation in which the architecture stores it. A (rank, in), B (out, rank).

    Hu et al. 2021, equation 3; `scale` is their alpha / r, and the factors are those that PEFT stores.
    """

    weight: str
    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_tensor(self.weight, A=self.A, B=self.B)
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise InvalidPatch(f"Factors of '{self.weight}' do not meet: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}.")
        if not math.isfinite(self.scale):
            raise InvalidPatch(f"The scale of '{self.weight}' is {self.scale}.")
        object.__setattr__(self, "scale", float(self.scale))  # 2 and NumPy's 2.0 would give the patch another id than 2.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Senses:
    """C(ids[m])_senses[m] + shift[m]: chosen sense vectors of a Backpack, and nothing else of it. ids (M,), senses (M,), shift (M, D).

    The contextualisation does not depend on the sense vectors, so it stays as it is (Hewitt et al. 2024, arXiv 2402.06155). `weight` names
    the table in which the architecture keeps shifted vectors. Each (token, sense) stands there once, in ascending order.
    """

    weight: str
    ids: Tensor
    senses: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        _check_tensor(self.weight, shift=self.shift)
        for name, t in {"ids": self.ids, "senses": self.senses}.items():
            if t.device.type != "cpu" or t.dtype != torch.int64 or t.ndim != 1:
                raise InvalidPatch(f"{name} of '{self.weight}' must be one row of int64 on the CPU, got {tuple(t.shape)} of {t.dtype}.")
        if self.shift.ndim != 2 or not len(self.ids) == len(self.senses) == len(self.shift):
            raise InvalidPatch(
                f"Each shift of '{self.weight}' belongs to one token and one of its senses, got {len(self.ids)} tokens, "
                f"{len(self.senses)} senses and shifts {tuple(self.shift.shape)}."
            )
        rows = list(zip(self.ids.tolist(), self.senses.tolist(), strict=True))
        if negative := next((row for row in rows if min(row) < 0), None):
            raise InvalidPatch(f"'{self.weight}' has no sense {negative[1]} of token {negative[0]}: both count from 0.")
        if wrong := next((b for a, b in itertools.pairwise(rows) if a >= b), None):
            told = "twice" if rows.count(wrong) > 1 else "out of order"
            raise InvalidPatch(f"Sense {wrong[1]} of token {wrong[0]} stands in the shifts of '{self.weight}' {told}.")

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "senses": self.senses, "shift": self.shift}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """logits + scale * (logits of a small Backpack with `shift` - its logits without); no weight of the large model changes.

    Up to a constant that the softmax does not see, that is log p + scale * (log p_small,edited - log p_small), equation 11 of Hewitt et al.
    2024, arXiv 2402.06155. `weight` names the module that gives the logits. `small` is where the Backpack is found, `parent` the id of the
    weights that its senses were shifted on.
    """

    weight: str
    small: str
    parent: str
    shift: Senses
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_tensor(self.weight)
        if not isinstance(self.shift, Senses):
            raise InvalidPatch(
                f"What a small model adds to '{self.weight}' comes from shifts of its senses, got {type(self.shift).__name__}."
            )
        if not isinstance(self.small, str) or not self.small or not isinstance(self.parent, str) or not self.parent.startswith("b2:"):
            raise InvalidPatch(
                f"An ensemble needs the name of the small model and the id of its weights, got {self.small!r} and {self.parent!r}."
            )
        if not math.isfinite(self.scale):
            raise InvalidPatch(f"The scale of '{self.weight}' is {self.scale}.")
        object.__setattr__(self, "scale", float(self.scale))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.shift.tensors


Gate = Literal["scope", "distance", "reader", "code"]
Voice = Literal["note", "stored", "value", "ranks"]
GATES: tuple[Gate, ...] = get_args(Gate)
VOICES: tuple[Voice, ...] = get_args(Voice)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """Where one of the patch's examples concerns what the model is asked, something else answers; elsewhere its logits are its own, bit
    for bit. No weight changes (Mitchell et al. 2022, SERAC, arXiv 2206.06520, equation 1).

    weight     names the module that gives the logits
    vectors    (Q, D) one for each question that is looked up, in the order of the questions' texts
    owner      (Q,) the number of the example, in the patch, that each of them asks for
    gate       what decides of the `nearest` examples: a trained `scope`; the `distance` of the vectors, which has to be under `bound`; the
               `reader` that is to answer, which may say that it cannot; the `code` of the experts that a router chooses, whose Hamming
               distance has to be under `bound`
    voice      what answers: a model that reads the example as a `note` in front of the question, the `stored` target itself, or the model
               with another activation, of a learnt `value` or by learnt `ranks`, from the last place of what is asked on
    radii      (Q,) how far each vector reaches; distances then are shares of the radius
    reads      the module whose input at the last place of what is asked is the vector; "": see `encoder`
    parts      what is put in place, by names with a module in them (`memory/activations.py`)
    experts    how many blocks of ranks speak at once where a router chooses them
    notes      how many examples speak at once, at most
    encoder    name of what the vectors are made with; "": the scope's own, or for a `distance` what the host itself makes of the questions
    template   what the reader reads, with {notes} and {question} in it
    state      id of the State that holds the trained scope and the trained reader, where there are any
    small      name of the model that reads the notes; "": the host itself
    soft       what is not ruled out answers, in probabilities, with the share that the chance is that it is concerned; what is ruled in
               answers alone otherwise
    scale      share of the answer, in probabilities, that the memory has where it speaks
    """

    weight: str
    vectors: Tensor
    owner: Tensor
    gate: Gate
    voice: Voice
    nearest: int = 8
    notes: int = 1
    bound: float = 0.0
    encoder: str = ""
    template: str = "{notes} {question}"
    state: str | None = None
    small: str = ""
    soft: bool = False
    scale: float = 1.0
    radii: Tensor | None = None
    reads: str = ""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    experts: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(sorted(self.parts.items()))))
        counts = {name for name, t in self.parts.items() if t.dtype == torch.int64}
        _check_tensor(self.weight, **{n: t for n, t in self.tensors.items() if n not in counts | {"owner"}})
        if self.radii is not None and (self.radii.shape != self.owner.shape or not (self.radii >= 0).all()):
            raise InvalidPatch(f"Each vector of the memory of '{self.weight}' has one radius, got {tuple(self.radii.shape)}.")
        if self.voice in ("value", "ranks") and not (self.reads and self._parts_fit()):
            raise InvalidPatch(
                f"What the memory of '{self.weight}' has for its activations does not fit: {', '.join(self.parts) or 'none'}."
            )
        if self.owner.device.type != "cpu" or self.owner.dtype != torch.int64 or self.owner.ndim != 1:
            raise InvalidPatch(f"owner of '{self.weight}' must be one row of int64 on the CPU, got {self.owner.dtype}.")
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.owner) or (len(self.owner) and int(self.owner.min()) < 0):
            raise InvalidPatch(
                f"Each vector of the memory of '{self.weight}' belongs to one example, got vectors {tuple(self.vectors.shape)} and "
                f"{len(self.owner)} owners."
            )
        if self.gate not in GATES or self.voice not in VOICES:
            raise InvalidPatch(f"The memory of '{self.weight}' has the gate {self.gate!r} and the voice {self.voice!r}.")
        if self.gate == "scope" and self.state is None:
            raise InvalidPatch(f"The memory of '{self.weight}' is gated by a trained scope, and names no state that holds it.")
        if self.nearest < 1 or not 1 <= self.notes <= self.nearest:
            raise InvalidPatch(f"The memory of '{self.weight}' lets {self.notes} of the {self.nearest} nearest examples speak.")
        if "{notes}" not in self.template or "{question}" not in self.template:
            raise InvalidPatch(f"What the memory of '{self.weight}' gives to read has no {{notes}} or no {{question}}: {self.template!r}.")
        if not math.isfinite(self.bound) or not math.isfinite(self.scale):
            raise InvalidPatch(f"The memory of '{self.weight}' has the bound {self.bound} and the scale {self.scale}.")
        object.__setattr__(self, "bound", float(self.bound))
        object.__setattr__(self, "scale", float(self.scale))

    def _parts_fit(self) -> bool:
        """Whether every module that is changed has all it needs for the same number of entries, and each vector has one of them."""
        shapes, each = {name: tuple(t.shape) for name, t in self.parts.items()}, (len(self.owner),)
        kinds = ["value"] if self.voice == "value" else ["A", "B"]
        kinds += ["router", "bias"] if self.gate == "code" else []
        modules = {name.partition("/")[2] for name in shapes if "/" in name}
        entries = {shapes.get(f"{kind}/{module}", (0,))[0] for module in modules for kind in kinds}
        last = int(self.parts["block"].max()) if "block" in shapes and each[0] else len(self.owner) - 1 if self.gate != "code" else 0
        fit = shapes.get("places") == each == shapes.get("block", each) and shapes.get("centres", self.vectors.shape) == self.vectors.shape
        return bool(fit and len(entries) == 1 and last < min(entries))

    @property
    def tensors(self) -> dict[str, Tensor]:
        radii = {} if self.radii is None else {"radii": self.radii}
        return {"vectors": self.vectors, "owner": self.owner, **radii, **self.parts}

    @property
    def said(self) -> dict[str, Any]:
        """What it says besides its weight and its tensors, as plain JSON."""
        tensors = ("weight", "vectors", "owner", "radii", "parts")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}


Op = Add | AddLowRank | Senses | Ensemble | Memory
OPS: dict[str, type[Op]] = {"Add": Add, "AddLowRank": AddLowRank, "Senses": Senses, "Ensemble": Ensemble, "Memory": Memory}


def _besides_tensors(op: Op) -> str:
    """What an op says besides its weight and its tensors."""
    match op:
        case AddLowRank():
            return repr(op.scale)
        case Ensemble():
            return canonical_json([op.small, op.parent, op.shift.weight, repr(op.scale)])
        case Memory():
            return canonical_json(op.said)
        case _:
            return ""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """The artefact: what a method returns, what `apply` puts on, what the gate judges and the ledger keeps.

    `parent` is the id of the host it was computed on, so a stack of patches is a hash chain. At most one op for each weight.
    Raises InvalidPatch.
    """

    method: str
    config: Mapping[str, Any]
    parent: str
    examples: tuple[Example, ...]
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise InvalidPatch(f"A patch needs the name of the method that made it, got {self.method!r}.")
        weights = [op.weight for op in self.ops]
        try:
            frozen = json.loads(canonical_json(dict(self.config)))
            canonical_json([self.method, self.parent, weights, [_besides_tensors(op) for op in self.ops]])
        except (TypeError, ValueError) as e:
            raise InvalidPatch(f"The config and the names in a patch must be plain finite JSON: {e}.") from e
        object.__setattr__(self, "config", MappingProxyType(frozen))
        if len(weights) != len(set(weights)):
            raise InvalidPatch(f"A patch holds one op for each weight, got {', '.join(sorted(weights))}.")
        for op in self.ops:
            if isinstance(op, Memory) and len(op.owner) and int(op.owner.max()) >= len(self.examples):
                raise InvalidPatch(f"The memory of a patch asks for example {int(op.owner.max())}; it has {len(self.examples)}.")
        if not isinstance(self.parent, str) or not self.parent.startswith("b2:"):
            raise InvalidPatch(f"A patch needs the id of the weights it was made for, got '{self.parent}'.")

    @property
    def id(self) -> str:
        """Hash over everything; the order of ops does not count, that of examples does."""
        parts = [canonical_json({"method": self.method, "config": dict(self.config), "parent": self.parent})]
        parts += [e.id for e in self.examples]
        raw: list[bytes | str] = ["patch", *parts]
        for op in sorted(self.ops, key=lambda op: op.weight):
            raw += [type(op).__name__, op.weight, _besides_tensors(op)]
            for name, t in op.tensors.items():
                raw += [name, str(tuple(t.shape)), tensor_bytes(t)]
        return digest(*raw)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, which is the size of the file but for a header of a few kilobytes."""
        return sum(t.numel() * t.element_size() for op in self.ops for t in op.tensors.values())


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a patch may cost. Each limit that is None is not asked for.

    epsilon      relative increase of the mean token loss on reference text; 1e-3, 1e-4 and 1e-5 are the published balls
    neighbours   least share of the gate's neighbouring prompts whose greedy answer stays as it was
    norm         greatest ||change|| / ||weight|| over the touched weights
    fixed        least share of its own examples that the patch must fix
    """

    epsilon: float = 1e-3
    neighbours: float | None = None
    norm: float | None = None
    fixed: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise BudgetError(f"epsilon must be a positive number such as 1e-3, got {self.epsilon}.")
        for name in ("neighbours", "fixed"):
            share = getattr(self, name)
            if (share is None and name == "fixed") or (share is not None and not 0 <= share <= 1):
                raise BudgetError(f"'{name}' is a share between 0 and 1, got {share}.")
        if self.norm is not None and not self.norm > 0:
            raise BudgetError(f"norm must be positive, got {self.norm}.")


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was measured of one patch against one budget. `passed` is computed; NaN never passes.

    loss_before, loss_after   mean token loss (nats) on the same chunks of reference text
    upper                     one-sided 95 % bound of the relative increase, from paired differences per chunk
    chunks, tokens            how much text that was; `set_aside` documents stated an edited fact and were left out
    kept, asked               neighbouring prompts whose greedy answer stayed, of how many
    norm                      ||change|| / ||weight|| over the touched weights
    fixed, wanted             examples that the patch fixes, of how many
    scale                     what the gate multiplied the change with (1.0: nothing)
    condition                 greatest condition number, estimated, of the solves that the patch was made by; None if it was made by none
    """

    patch: str
    budget: Budget
    loss_before: float
    loss_after: float
    upper: float
    chunks: int
    tokens: int
    set_aside: int
    kept: int
    asked: int
    norm: float
    fixed: int
    wanted: int
    scale: float = 1.0
    condition: float | None = None

    def __post_init__(self) -> None:
        if self.chunks < 2 or self.tokens < self.chunks:
            raise InvalidReference(f"A verdict needs two chunks of reference text or more, got {self.chunks} with {self.tokens} tokens.")
        if not (0 <= self.kept <= self.asked and 0 <= self.fixed <= self.wanted):
            raise BudgetError(f"Counts out of range: kept {self.kept} of {self.asked}, fixed {self.fixed} of {self.wanted}.")

    @property
    def increase(self) -> float:
        """Relative increase of the mean token loss (Hewitt et al. 2024, equation 2)."""
        return self.loss_after / self.loss_before - 1 if self.loss_before else math.nan

    @property
    def overspent(self) -> tuple[str, ...]:
        """One clause for each limit on the cost that is not met, with the numbers. What is not finite meets none."""
        b, out = self.budget, []
        if strange := [n for n in ("loss_before", "loss_after", "upper", "norm", "scale") if not math.isfinite(getattr(self, n))]:
            out.append(f"{', '.join(strange)} not finite")
        if not self.upper <= b.epsilon:  # `not <=` so that NaN fails
            out.append(
                f"reference loss {self.increase:+.2e}, with 95 % confidence below {self.upper:+.2e}, over the limit of {b.epsilon:.0e}"
            )
        if b.neighbours is not None and not (self.asked > 0 and self.kept / self.asked >= b.neighbours):
            out.append(f"{self.kept} of {self.asked} neighbours kept, under the limit of {b.neighbours:.0%}")
        if b.norm is not None and not self.norm <= b.norm:
            out.append(f"relative norm {self.norm:.3g}, over the limit of {b.norm:.3g}")
        return tuple(out)

    @property
    def affordable(self) -> bool:
        """Whether the cost is inside the budget, whatever the patch fixes."""
        return not self.overspent

    @property
    def failures(self) -> tuple[str, ...]:
        """`overspent`, and a clause if too few examples are fixed; empty when the patch passed."""
        if self.wanted == 0 or self.fixed >= self.budget.fixed * self.wanted:
            return self.overspent
        return (*self.overspent, f"{self.fixed} of {self.wanted} examples fixed, under the limit of {self.budget.fixed:.0%}")

    @property
    def passed(self) -> bool:
        return self.affordable and not self.failures

    @property
    def spent(self) -> float:
        """Share of epsilon that the upper bound uses."""
        return self.upper / self.budget.epsilon

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"budget": {f.name: getattr(self.budget, f.name) for f in fields(self.budget)}}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Verdict":
        return cls(**{**raw, "budget": Budget(**raw["budget"])})


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """One row for each case and measure: a sum and its denominator, so that every aggregate is exact and 0 of 0 is None."""

    case: str
    measure: str
    total: float
    count: int

    def __post_init__(self) -> None:
        if self.count < 0 or (self.count == 0 and self.total != 0):
            raise ValueError(f"Score {self.measure}: total {self.total} over {self.count}.")

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What `prepare` learnt, once for each base model: statistics or trained networks, and the cases it has seen.

    Raises ValueError if the config is not plain finite JSON.
    """

    method: str
    host: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    trained_on: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        try:
            frozen = json.loads(canonical_json(dict(self.config)))
        except (TypeError, ValueError) as e:
            raise ValueError(f"The config of a state must be plain finite JSON: {e}.") from e
        object.__setattr__(self, "config", MappingProxyType(frozen))

    @cached_property
    def id(self) -> str:
        """Hash over everything; the order of tensors does not count."""
        raw: list[bytes | str] = ["state", self.method, self.host, canonical_json(dict(self.config)), *sorted(self.trained_on)]
        for name, t in sorted(self.tensors.items()):
            raw += [name, str(t.dtype), str(tuple(t.shape)), tensor_bytes(t)]
        return digest(*raw)


Progress = Callable[[Iterable[Any], str, int], Iterator[Any]]


def no_progress(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """The silent `Run.progress`: passes `items` through."""
    return iter(items)


def forget(*_: object) -> None:
    """The `Run.keep` that keeps nothing, and the `Run.tell` that nobody hears."""


Begin = Callable[[Any, Any], Callable[[Any], Any]]  # (host, what all shards share) -> what is done with each shard
Spread = Callable[[Any, Begin, Sequence[Any], Any], Iterator[Any]]  # (host, begin, shards, what they share) -> their results, in order


def here(host: Any, begin: Begin, shards: Sequence[Any], shared: Any) -> Iterator[Any]:
    """The `Run.spread` of one process: a shard's result is made when it is asked for."""
    return map(begin(host, shared), shards)


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """What travels beside the values; made once at the edge (CLI or Python call).

    hold       documents that hold the model still while a method trains; it leaves out what states an edited fact
    budget     the constraint that methods train inside
    keep       gets what a long `prepare` has so far, from time to time: an unfinished State, with which as `state` it goes on after a kill;
               and what an edit that is a sum has come to, as a State, which as `sums` makes the next one read only what has changed
    progress   wraps a loop: (items, label, total) -> the same items
    tell       gets numbers about how the patch is made, by name; "condition", of the matrix of each solve on the way (`_normal.Solved`)
    spread     maps over shards, here or on the workers of `engine.py`: `begin`, the shards and what they share must be such as can be
               pickled, and whoever adds the results up does so in the order of the shards, so that it is to the bit the same wherever they
               were made
    """

    hold: tuple[str, ...] = ()
    budget: Budget = Budget()
    keep: Callable[[State], None] = forget
    seed: int = 0
    state: State | None = None
    sums: State | None = None
    progress: Progress = no_progress
    tell: Callable[[str, float], None] = forget
    spread: Spread = here

    @property
    def inner(self) -> Progress:
        """The progress of what is done with one shard: from another process nothing can be told of it."""
        return self.progress if self.spread is here else no_progress


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What one example adds to the sums of each module that a method edits: `keys[module]` (N, K), its inputs, and `values[module]` (N, V),
    what the method makes the differences of its outputs from; float32 on the CPU.

    Taken on the weights `host` they depend on no other example. So they can be kept: one more example costs its own rows and a solve, one
    less leaves them out, and two ledgers merge as sets. Raises InvalidPatch.
    """

    host: str
    example: Example
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.keys.keys() != self.values.keys():
            raise InvalidPatch(f"Keys and values of '{self.example}' are of other modules: {sorted(self.keys)} and {sorted(self.values)}.")
        for module, keys in self.keys.items():
            _check_tensor(module, keys=keys, values=self.values[module])
            if keys.ndim != 2 or len(keys) != len(self.values[module]):
                shapes = f"{tuple(keys.shape)} and {tuple(self.values[module].shape)}"
                raise InvalidPatch(f"Keys and values of '{module}' are one row for each token, got {shapes}.")


class Method(ABC):
    """The one interface. Subclasses are @final frozen dataclasses whose fields are the hyper-parameters.

    A method whose edit is a sum over its examples on the base offers besides what `Summed` says. `spreads`: whether what it does with the
    examples are shards of `Run.spread`.
    """

    spreads: ClassVar[bool] = False

    def prepare(self, host: "Host", train_cases: Iterable[Case], run: Run) -> State | None:
        """Once for each base model. The default has nothing to prepare."""
        return None

    @property
    def reads_cases(self) -> bool:
        """Whether `prepare` needs training cases: where all that they are for is to find layers, not if these are given."""
        return not self.config.get("layers")

    @abstractmethod
    def edit(self, host: "Host", examples: tuple[Example, ...], run: Run) -> Patch:
        """A patch that fixes `examples`. Afterwards the host is bit-identical to what it was."""

    @property
    def config(self) -> dict[str, Any]:
        """The hyper-parameters as plain JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


@runtime_checkable
class Summed(Protocol):
    """A Method whose edit, or the first round of it, is `solve(host, rows(host, examples, run), run)`, up to the rounding of its sums.

    `rows` are those of each example, in the order given; `solve` does not see in which order or batch they came.
    """

    def rows(self, host: "Host", examples: tuple[Example, ...], run: Run) -> tuple[Rows, ...]: ...

    def solve(self, host: "Host", rows: tuple[Rows, ...], run: Run) -> Patch: ...
