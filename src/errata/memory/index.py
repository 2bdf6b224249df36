"""Unit vectors by number -> the nearest to a query: compared one by one up to EXACT of them, above that by a graph.

The graph is a hierarchical navigable small world (Malkov & Yashunin 2016, arXiv 1603.09320) of usearch, over float16. What came since it
was last extended stands in a tail that is compared exactly, so that adding costs the same however many there are; what went is skipped,
until so much of the graph is gone that it is made anew. `fold` does either: it takes as long as it takes, and whoever owns the index says
when.

A file of the graph can always be made again. It says from which encoder its vectors are and up to which moment it is complete, and is
believed only if its hash is right: a damaged one would crash the library that reads it.
"""

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float, Int64

from errata.artefact import TEMPORARY, make_folder, write_whole
from errata.types import LedgerError, MissingExtra, WrongBase

EXACT = 50_000  # up to so many are compared one by one
TAIL = 4_096  # so many newcomers stand beside a graph before it is extended
GONE = 0.2  # share of the graph that may be skipped before it is made anew
FORMAT = "errata-index-2"  # 1 had one key for each question
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 64, 768  # M, efConstruction and ef of the paper; see docs/log.md

Numbers = Int64[np.ndarray, "N"]
Rows = Float[np.ndarray, "N D"]
Query = Float[np.ndarray, "D"]
Scores = Float[np.ndarray, "N"]


@final
class Index:
    """Numbered unit vectors of one width; the greatest product with a query is the nearest."""

    def __init__(self, width: int, exact: int = EXACT) -> None:
        self.width, self.exact = width, exact
        self._numbers = np.empty(0, dtype=np.int64)  # of the tail; only the first `_count` are there
        self._rows = np.empty((0, width), dtype=np.float32)
        self._count = 0
        self._place: dict[int, int] = {}  # number -> row of the tail
        self._graph: Any = None
        self._gone: set[int] = set()

    def __len__(self) -> int:
        return self._count + self.folded

    @property
    def folded(self) -> int:
        """How many of them the graph finds."""
        return 0 if self._graph is None else len(self._graph) - len(self._gone)

    @property
    def tail(self) -> int:
        """How many stand beside the graph, or are all there are."""
        return self._count

    @property
    def due(self) -> bool:
        """Whether it is time to `fold`."""
        if self._graph is None:
            return self._count > self.exact
        return self._count > TAIL or len(self._gone) > GONE * len(self._graph)

    def add(self, numbers: Numbers, rows: Rows) -> None:
        """Put vectors in under numbers that are not there yet."""
        need = self._count + len(numbers)
        if need > len(self._numbers):
            room = max(need, 2 * len(self._numbers), 64)  # doubling: one more costs the same on average, however many there are
            self._numbers = np.concatenate([self._numbers[: self._count], np.empty(room - self._count, dtype=np.int64)])
            self._rows = np.concatenate([self._rows[: self._count], np.empty((room - self._count, self.width), dtype=np.float32)])
        self._numbers[self._count : need] = numbers
        self._rows[self._count : need] = rows
        self._place |= zip(numbers.tolist(), range(self._count, need), strict=True)
        self._count = need

    def remove(self, numbers: Numbers) -> None:
        """Take vectors out; a number that is not there is no error."""
        for number in numbers.tolist():
            place = self._place.pop(number, None)
            if place is not None:
                self._count -= 1  # the last one moves into its place
                if place != self._count:
                    last = int(self._numbers[self._count])
                    self._numbers[place], self._rows[place], self._place[last] = last, self._rows[self._count], place
            elif self._graph is not None and number in self._graph:
                self._gone.add(number)

    def search(self, query: Query, k: int) -> tuple[Numbers, Scores]:
        """Numbers and products of the k nearest, the nearest first; of equal ones the greater number. Fewer if there are fewer."""
        k = min(k, len(self))
        if k <= 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        tail = self._rows[: self._count] @ query.astype(np.float32)
        near = np.argpartition(-tail, k - 1)[:k] if len(tail) > k else np.arange(len(tail))
        numbers, scores = self._numbers[near], tail[near]
        if self.folded:
            found, products = self._in_graph(query, k)
            numbers, scores = np.concatenate([numbers, found]), np.concatenate([scores, products])
        order = np.lexsort((-numbers, -scores))[:k]
        return numbers[order], scores[order].astype(np.float32)

    def among(self, query: Query, numbers: Numbers) -> tuple[Numbers, Scores]:
        """Those of the numbers that are here, and their products, each compared; the nearest first, of equal ones the greater number."""
        found, products = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)]
        for at in range(0, len(numbers), EXACT):
            part = numbers[at : at + EXACT]
            beside = np.array([number in self._place for number in part.tolist()], dtype=bool)
            places = [self._place[number] for number in part[beside].tolist()]
            found.append(part[beside])
            products.append(self._rows[places] @ query.astype(np.float32))
            if self.folded and len(others := part[~beside]):
                there = np.asarray(self._graph.contains(others.astype(np.uint64)), dtype=bool)
                inside = np.array([n for n in others[there].tolist() if n not in self._gone], dtype=np.int64)
                found.append(inside)
                products.append(self._vectors(inside) @ query.astype(np.float32))
        numbers, scores = np.concatenate(found), np.concatenate(products)
        order = np.lexsort((-numbers, -scores))
        return numbers[order], scores[order].astype(np.float32)

    def _vectors(self, numbers: Numbers) -> Rows:
        """Those of the graph under these numbers."""
        if not len(numbers):
            return np.empty((0, self.width), dtype=np.float32)
        return np.asarray(self._graph.get(numbers.astype(np.uint64)), dtype=np.float32)

    def _in_graph(self, query: Query, k: int) -> tuple[Numbers, Scores]:
        """The k nearest of the graph that are not gone; with k of its size it is compared whole."""
        wanted = min(k, self.folded)
        fetch = wanted
        while True:
            matches = self._graph.search(query.astype(np.float32), fetch, exact=fetch >= len(self._graph) // 2)
            numbers, scores = matches.keys.astype(np.int64), 1.0 - matches.distances.astype(np.float32)
            if self._gone:
                stays = np.array([number not in self._gone for number in numbers.tolist()], dtype=bool)
                numbers, scores = numbers[stays], scores[stays]
            if len(numbers) >= wanted or fetch >= len(self._graph):
                return numbers[:wanted], scores[:wanted]
            fetch = min(4 * fetch, len(self._graph))

    def fold(self) -> None:
        """Bring the tail into the graph, or make a new one from what is left. Raises MissingExtra without usearch."""
        if self._graph is None or len(self._gone) > GONE * len(self._graph):
            kept = self._left()
            if len(kept):
                rows = self._vectors(kept)
                self._graph, self._gone = None, set()
                self.add(kept, rows)
            self._graph, self._gone = _graph(self.width), set()
        # threads that add side by side make another graph each time, and a small one then missed a neighbour now and then
        threads = 1 if self._count <= TAIL else 0
        self._graph.add(self._numbers[: self._count].astype(np.uint64), self._rows[: self._count].astype(np.float16), threads=threads)
        self._numbers, self._rows = np.empty(0, dtype=np.int64), np.empty((0, self.width), dtype=np.float32)
        self._count, self._place = 0, {}

    def _left(self) -> Numbers:
        if self._graph is None:
            return np.empty(0, dtype=np.int64)
        numbers = np.asarray(self._graph.keys[: len(self._graph)]).astype(np.int64)
        return numbers[~np.isin(numbers, np.fromiter(self._gone, dtype=np.int64, count=len(self._gone)))]

    # ---------------------------------------------------------------------------------------------------------------------- files

    def save(self, path: Path, encoder: str, moment: tuple[int, str]) -> None:
        """Write the graph beside `path` and what is to be known of it to `path`, whole or not at all; the tail is no part of it.

        `moment`: up to where it is complete. Raises LedgerError if the disk refuses.
        """
        name = f"{path.stem}-{secrets.token_hex(8)}.usearch"
        try:
            make_folder(path.parent)
            temporary = path.parent / f"{TEMPORARY}{name}"
            self._graph.save(str(temporary))
            with open(temporary, "rb+") as f:
                sha = hashlib.file_digest(f, "sha256").hexdigest()
                os.fsync(f.fileno())
            os.replace(temporary, path.parent / name)
        except (OSError, RuntimeError) as e:
            raise LedgerError(f"The index cannot be written to {path.parent}: {e}. The records are not concerned; make room.") from e
        about = {
            "format": FORMAT,
            "encoder": encoder,
            "width": self.width,
            "number": moment[0],
            "name": moment[1],
            "file": name,
            "sha256": sha,
        }
        write_whole(path, json.dumps(about | {"gone": sorted(self._gone)}).encode())
        for old in (*path.parent.glob(f"{path.stem}-*.usearch"), *path.parent.glob(f"{TEMPORARY}{path.stem}-*.usearch")):
            if old.name != name:
                old.unlink(missing_ok=True)

    def load(self, path: Path, encoder: str) -> tuple[int, str] | None:
        """Read the graph that `save` wrote, and say up to which moment it is complete; None if there is no file.

        Raises LedgerError if it is cut short or altered, WrongBase if its vectors are from another encoder, MissingExtra without usearch.
        """
        if not path.is_file():
            return None
        try:
            about = _About(**json.loads(path.read_bytes()))
            if about.format != FORMAT:
                raise ValueError(f"its format is '{about.format}', this version reads '{FORMAT}'")
            body = path.parent / Path(about.file).name
            if about.encoder == encoder:
                with open(body, "rb") as f:
                    if hashlib.file_digest(f, "sha256").hexdigest() != about.sha256:
                        raise ValueError(f"{body.name} was cut short or altered")
        except (OSError, ValueError, TypeError, AttributeError) as e:
            raise LedgerError(f"The index {path} is damaged: {e}.") from e
        if about.encoder != encoder or about.width != self.width:
            raise WrongBase(
                f"The index {path} is of the encoder {about.encoder}, and this memory is of {encoder}. "
                f"Put the right file there, or remove this one: it is made again from the records."
            )
        graph = _graph(self.width)
        graph.load(str(body))
        self._graph, self._gone = graph, set(about.gone)
        self._graph.expansion_search = EXPANSION_SEARCH
        return about.number, about.name


@final
@dataclass(frozen=True, kw_only=True)
class _About:
    format: str
    encoder: str
    width: int
    number: int
    name: str
    file: str
    sha256: str
    gone: list[int]


def _graph(width: int) -> Any:
    try:
        from usearch.index import Index as Graph
    except ImportError as e:
        raise MissingExtra('More than 50,000 questions need usearch, which is not installed: pip install "errata[memory]".') from e
    return Graph(
        ndim=width,
        metric="ip",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )
