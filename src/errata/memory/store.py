"""EditMemory: the records of a ledger, found by their vectors.

    keys    a question is found by what it asks, and by that with its answer, for what follows from a record may name the answer alone
    write   the keys are encoded and kept, then one transaction puts the record in force. A kill between the two leaves vectors that
            nobody asks for.
    search  the index is first brought up to what the ledger holds now, so that nothing which is in force is missed and nothing which is not
            is found, whoever wrote it; then the nearest questions whose record holds at that moment and for those tags.

The index and the vectors are made again from the records wherever they are missing or damaged, and whoever opened the memory is told.
The memory belongs to one encoder from its first record on (`moved` takes it to another), for what counts as near depends on it.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import final

import numpy as np

from errata.ledger import Ledger
from errata.memory.encoder import Encoder
from errata.memory.index import EXACT, TAIL, Index
from errata.memory.reader import asked_in
from errata.memory.records import Clash, RecordRow, Records
from errata.memory.scope import told
from errata.memory.vectors import BATCH, Cache
from errata.types import LedgerError, MissingExtra, Record, WrongBase, utc

FOLDER = Path("aside") / "memory"
WIDEST = 4096  # questions that are looked through for those of a tag or a time, before those of the tag are


@final
@dataclass(frozen=True, kw_only=True)
class Hit:
    """A record that a search found: `score` is the cosine of the query and the nearest of its keys, `question` is whose that is."""

    row: RecordRow
    score: float
    question: str

    @property
    def record(self) -> Record:
        return self.row.record


def warn(sentence: str) -> None:
    """The `note` of whoever gives none."""
    warnings.warn(sentence, stacklevel=2)


def keys(question: str, answer: str) -> tuple[str, str]:
    """The texts that a record's question is found by."""
    asked = asked_in(question)
    return asked, told(asked, answer.strip())


def now() -> str:
    return utc(datetime.now(UTC))


@final
class EditMemory:
    """The memory of an open ledger, by one encoder. Close it, or use it in `with`; the ledger stays open."""

    def __init__(self, ledger: Ledger, encoder: Encoder, *, note: Callable[[str], None] = warn, exact: int = EXACT) -> None:
        """Open the memory. `note` hears what was damaged and is made again; `exact`: up to so many questions are compared one by one.

        Raises WrongBase if the memory's vectors are from another encoder, LedgerError.
        """
        self.records, self.encoder, self.note = Records(ledger), encoder, note
        self._check_encoder()
        self._cache = Cache(ledger.path / FOLDER / "vectors.sqlite", note)
        self._index = Index(encoder.width, 2 * exact)  # question n has the keys 2n and 2n + 1
        self._moment: tuple[int, str] | None = None  # up to where the index is complete; None: it was not read yet
        self._graph_moment: tuple[int, str] = (0, "")  # up to where its graph is, without the tail
        self._saved = 0  # how many the graph on the disk finds
        self._graphs = True  # whether there is usearch

    def close(self) -> None:
        """Keep the graph, if it has grown by much, and hand the files back. Closing twice is no error."""
        if self._moment is not None and self._index.folded > self._saved + TAIL:
            self._save()
        self._cache.close()

    def __enter__(self) -> "EditMemory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _file(self) -> Path:
        # named by the encoder: a move that is killed half-way leaves nothing that the other one would stumble over
        return self.records.ledger.path / FOLDER / f"graph-{self.encoder.id.removeprefix('b2:')[:12]}.json"

    # -------------------------------------------------------------------------------------------------------------------- writing

    def add(self, *records: Record, clash: Clash = "refuse", provenance: str = "") -> list[str]:
        """As `Records.add`. Raises InvalidExample besides, if a question with its answer is longer than the encoder's window."""
        self._encode(records)
        return self.records.add(*records, clash=clash, provenance=provenance)

    def supersede(self, old: str, record: Record, provenance: str = "") -> str:
        """As `Records.supersede`. Raises InvalidExample besides, if a question with its answer is longer than the encoder's window."""
        self._encode([record])
        return self.records.supersede(old, record, provenance)

    def retract(self, id: str) -> str:
        """As `Records.retract`."""
        return self.records.retract(id)

    def undo(self, id: str) -> tuple[str, ...]:
        """As `Records.undo`."""
        return self.records.undo(id)

    # ------------------------------------------------------------------------------------------------------------------ listing

    def active(self) -> tuple[Record, ...]:
        """As `Records.active`."""
        return self.records.active()

    def listed(self, start: str = "") -> tuple[RecordRow, ...]:
        """As `Records.listed`."""
        return self.records.listed(start)

    # ------------------------------------------------------------------------------------------------------------------ searching

    def search(self, query: str, k: int = 8, *, tags: Iterable[str] = (), at: str | datetime | None = None) -> tuple[Hit, ...]:
        """The k records nearest to `query` that hold `at` a moment (now) and concern a query with `tags`, the nearest first, of equal ones
        the newer. Raises InvalidExample if the query is empty or longer than the encoder's window, LedgerError.
        """
        return self.nearest(self.encoder.encode([query])[0], k, tags=tags, at=at)

    def nearest(self, vector: np.ndarray, k: int = 8, *, tags: Iterable[str] = (), at: str | datetime | None = None) -> tuple[Hit, ...]:
        """As `search`, for the vector (D,) of a query."""
        self.catch_up()
        moment, tags = now() if at is None else utc(at), frozenset(tags)
        found: dict[int, tuple[float, str]] = {}
        for numbers, scores in self._nearer(vector, 4 * k, tags):
            found = self._holding((numbers // 2).tolist(), scores.tolist(), moment, tags) | found
            if len(found) >= k:
                break
        found = dict(sorted(found.items(), key=lambda item: (-item[1][0], -item[0]))[:k])
        rows = self.records.numbered(found)
        return tuple(Hit(row=rows[number], score=score, question=text) for number, (score, text) in found.items())

    def _nearer(self, vector: np.ndarray, fetch: int, tags: frozenset[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The questions nearest to a vector, with their products, four times as many each time; where few of so many concern the query,
        all whose tags do, some at a time."""
        while fetch < min(WIDEST, len(self._index)):
            yield self._index.search(vector, fetch)
            fetch *= 4
        numbers = np.array(self.records.tagged(tags), dtype=np.int64)
        numbers, scores = self._index.among(vector, np.concatenate([2 * numbers, 2 * numbers + 1]))
        for at in range(0, len(numbers), WIDEST):
            yield numbers[at : at + WIDEST], scores[at : at + WIDEST]

    def _holding(self, numbers: list[int], scores: list[float], moment: str, tags: frozenset[str]) -> dict[int, tuple[float, str]]:
        """{record: (score, question)} of the records of these questions that hold and are concerned, by the nearest question of each."""
        asked = {question: (record, text, scope) for question, record, text, scope in self.records.asked(numbers)}
        found: dict[int, tuple[float, str]] = {}
        for number, score in zip(numbers, scores, strict=True):
            if number not in asked:  # another process took it out of force since the index was brought up to date
                continue
            record, text, scope = asked[number]
            if record not in found and _concerns(json.loads(scope), moment, tags):
                found[record] = (score, text)
        return found

    # -------------------------------------------------------------------------------------------------------------------- the index

    def catch_up(self) -> None:
        """Bring the index up to what the ledger holds now. Raises LedgerError."""
        moment = self.records.moment()
        if moment == self._moment:
            return
        if self._moment is None:
            self._check_encoder()
            self._moment = self._load()
        try:
            self._follow(self._moment[0], moment[0])
        except BaseException:  # half of it is in the index: the next search begins with what is on the disk
            self._forget()
            raise
        self._moment = moment
        if self._index.folded and not self._index.tail:  # the graph holds all; with a tail beside it it is as old as it was
            self._graph_moment = moment
        if self._index.folded > 1.2 * self._saved:  # not each time: with a million questions the file has a gigabyte
            self._save()

    def _follow(self, after: int, upto: int) -> None:
        """Take out of the index what went after one event, and put in what came up to another."""
        self._index.remove(_of_questions(self.records.went(after)))
        came, folded = self.records.came(after, upto), self._fold()
        for at in range(0, len(came), BATCH):
            part = came[at : at + BATCH]
            texts = [key for _, question, answer in part for key in keys(question, answer)]
            self._index.add(_of_questions([number for number, _, _ in part]), self._cache.of(self.encoder, texts))
            folded |= self._fold()  # in parts, so that a million rows do not stand in memory twice
        if folded and self._index.tail:
            self._index.fold()

    def _fold(self) -> bool:
        """Fold the index if it is due; whether it was done."""
        if not self._index.due or not self._graphs:
            return False
        try:
            self._index.fold()
        except MissingExtra as e:
            self.note(f"{e} Until then a search compares all of them.")
            self._graphs = False
        return self._graphs

    def _forget(self) -> None:
        self._index = Index(self.encoder.width, self._index.exact)
        self._moment, self._graph_moment, self._saved = None, (0, ""), 0

    def _load(self) -> tuple[int, str]:
        """The moment of the graph on the disk, which is in the index now; the beginning, if there is none."""
        try:
            moment = self._index.load(self._file, self.encoder.id)
            if moment is not None and not self.records.was(*moment):
                self._forget()
                raise LedgerError(f"The index {self._file} is not of this ledger, or of a later state of it.")
        except LedgerError as e:
            self.note(f"{e} It is made again from the records.")
            moment = None
        except MissingExtra as e:
            self.note(f"{e} Until then a search compares all questions.")
            moment, self._graphs = None, False
        self._saved = self._index.folded
        self._graph_moment = moment or (0, "")
        return self._graph_moment

    def _save(self) -> None:
        self._index.save(self._file, self.encoder.id, self._graph_moment)
        self._saved = self._index.folded

    def _encode(self, records: Iterable[Record]) -> None:
        self._check_encoder(bind=True)
        pairs = [(question, record.example.target) for record in records for question in record.questions]
        self._cache.of(self.encoder, [key for pair in pairs for key in keys(*pair)])

    def _check_encoder(self, bind: bool = False) -> None:
        bound = self.records.encoder
        if bound is None and bind:
            self.records.bind(self.encoder.id, self.encoder.name)
        elif bound is not None and bound[0] != self.encoder.id:
            raise WrongBase(
                f"The memory of {self.records.ledger.path} is of the encoder {bound[1]} ({bound[0]}), and this one is {self.encoder.name} "
                f"({self.encoder.id}). Open it with the first, or move it to the second: errata memory move {self.encoder.name}."
            )


def moved(ledger: Ledger, encoder: Encoder, *, note: Callable[[str], None] = warn) -> None:
    """Take the memory of a ledger to another encoder: all its questions are encoded before anything changes.

    Raises InvalidExample if one is longer than the encoder's window with its answer, LedgerError.
    """
    records, folder = Records(ledger), ledger.path / FOLDER
    cache = Cache(folder / "vectors.sqlite", note)
    try:
        cache.of(encoder, [key for _, *pair in records.came(0, records.moment()[0]) for key in keys(*pair)])
        records.bind(encoder.id, encoder.name)
    finally:
        cache.close()
    for old in folder.glob("graph-*"):
        old.unlink(missing_ok=True)


def _of_questions(numbers: Sequence[int]) -> np.ndarray:
    """The numbers of their keys, in order."""
    return np.array([key for number in numbers for key in (2 * number, 2 * number + 1)], dtype=np.int64)


def _concerns(scope: dict[str, list[str] | str | None], moment: str, tags: frozenset[str]) -> bool:
    """As `Record.holds` and `Record.concerns`, on the scope alone: a search with a rare tag looks at very many."""
    since, until, own = scope["since"], scope["until"], scope["tags"] or ()
    in_time = (since is None or str(since) <= moment) and (until is None or moment < str(until))
    return in_time and (not own or not tags.isdisjoint(own))
