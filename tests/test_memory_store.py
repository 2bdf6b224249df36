"""The memory finds what is in force and nothing else: after kills, damage, other writers, and for tags and times."""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ledger import BASE, BUDGET, MEMORY

from errata.ledger import Ledger
from errata.memory import store as room
from errata.memory.encoder import Hashed, Vectors
from errata.memory.index import Index
from errata.memory.records import Records
from errata.memory.store import FOLDER, EditMemory, keys
from errata.types import ConflictError, Example, InvalidExample, LedgerError, MissingExtra, Record, WrongBase

CITIES = ["Lagos", "Quito", "Oslo", "Perth", "Kyoto", "Tunis", "Lima", "Minsk", "Accra", "Hanoi", "Turin", "Leeds"]
THINGS = ["mayor", "largest bridge", "oldest school", "river", "first newspaper", "football club"]


def record(city: str, thing: str, answer: str = "A", **scope: Any) -> Record:
    return Record(example=Example(prompt=f"The {thing} of {city} is", target=f" {answer}", subject=city), **scope)


RECORDS = [record(city, thing, f"{city[0]}{thing[0]}") for city in CITIES for thing in THINGS]


class Counting:
    """Hashed, and how many texts it has encoded. With a window, as sentence encoders have one."""

    def __init__(self, width: int = 256, window: int | None = None) -> None:
        self.inner, self.window, self.asked = Hashed(width), window, 0
        self.id, self.name, self.width = self.inner.id, "hashed", width

    def encode(self, texts: Sequence[str]) -> Vectors:
        for text in texts:
            if self.window is not None and len(text.split()) > self.window:
                raise InvalidExample(f"'{text}' has {len(text.split())} tokens, and the encoder reads {self.window}.")
        self.asked += len(texts)
        return self.inner.encode(texts)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger", BASE, "lab/neox", BUDGET) as made:
        yield made


@pytest.fixture
def notes() -> list[str]:
    return []


def opened(ledger: Ledger, notes: list[str], encoder: Counting | None = None, exact: int = 40) -> EditMemory:
    return EditMemory(ledger, encoder or Counting(), note=notes.append, exact=exact)


def found(memory: EditMemory, query: str, k: int = 8, **how: Any) -> list[Record]:
    return [hit.record for hit in memory.search(query, k, **how)]


# ------------------------------------------------------------------------------------------------------------------------ searching


@pytest.mark.parametrize("exact", [1000, 40])
def test_the_nearest_record_is_found_and_says_how_near(ledger: Ledger, notes: list[str], exact: int) -> None:
    with opened(ledger, notes, exact=exact) as memory:
        assert memory.search("The mayor of Oslo is") == ()
        memory.add(*RECORDS)
        for r in RECORDS:
            first = memory.search(f"Say what the {r.example.prompt[4:-3]} is called", 3)[0]
            assert (first.record, first.question) == (r, r.example.prompt) and 0.3 < first.score < 1
        hits = memory.search("the mayor of oslo is?", 100)
        assert len(hits) == len(RECORDS) and abs(hits[0].score - 1) < 1e-3
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert hits[0].row.active
    assert notes == []


def test_an_alias_is_found_and_its_record_counts_once(ledger: Ledger, notes: list[str]) -> None:
    with opened(ledger, notes) as memory:
        memory.add(record("Burma", "president", aliases=("Myanmar", "Birma")), *RECORDS[:5])
        hits = memory.search("The president of Myanmar is", 6)
        assert (hits[0].record.example.subject, hits[0].question) == ("Burma", "The president of Myanmar is")
        assert len({hit.record.id for hit in hits}) == len(hits) == 6


@pytest.mark.parametrize("exact", [1000, 40])
def test_only_what_holds_then_and_for_these_tags_is_found(ledger: Ledger, notes: list[str], exact: int) -> None:
    with opened(ledger, notes, exact=exact) as memory:
        memory.add(
            *(record(c, t, tags=("common",)) for c in CITIES for t in THINGS),
            record("Oslo", "mayor", "Ada", tags=("a",), until="2026-01-01"),
            record("Oslo", "mayor", "Bo", tags=("a",), since="2026-01-01"),
            record("Leeds", "tram", "Cy"),
        )
        query = "The mayor of Oslo is"
        assert [r.example.target for r in found(memory, query, 8)] == [" Cy"]  # hidden behind 72 nearer ones
        assert [r.example.target for r in found(memory, query, 8, tags=["a"], at="2025-06-01")] == [" Ada", " Cy"]
        assert [r.example.target for r in found(memory, query, 8, tags=["a"], at="2026-06-01")] == [" Bo", " Cy"]
        assert [r.example.target for r in found(memory, query, 1, tags=["common", "b"])] == [" A"]


@pytest.mark.parametrize("exact", [1000, 40])
def test_records_of_a_rare_tag_are_compared_whatever_lies_nearer(
    ledger: Ledger, notes: list[str], exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the graph and beside it; what went is not there; nothing else than the tag's is looked at beyond so many."""
    monkeypatch.setattr(room, "WIDEST", 16)
    looked, search = [], Index.search
    monkeypatch.setattr(Index, "search", lambda self, query, k: (looked.append(k), search(self, query, k))[1])
    rare = [record(c, "harbour", c[:2], tags=("rare", "b")) for c in CITIES]
    with opened(ledger, notes, exact=exact) as memory:
        memory.add(*(record(c, t, tags=("common",)) for c in CITIES for t in THINGS), *rare[:6])
        query = "The mayor of Oslo is"
        found(memory, query)  # into the graph, where there is one
        memory.add(*rare[6:])
        memory.retract(rare[0].id)
        encoder = Hashed(256)
        near = (encoder.encode([r.example.prompt for r in rare[1:]]) @ encoder.encode([query])[0]).tolist()
        hits = memory.search(query, 50, tags=["rare"])
        assert {hit.record for hit in hits} == set(rare[1:])
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(hit.score > near[rare.index(hit.record) - 1] - 1e-3 for hit in hits)
        assert [hit.record for hit in memory.search(query, 3, tags=["b"])] == [hit.record for hit in hits[:3]]
        assert found(memory, query, tags=["none"]) == [] and max(looked, default=0) < 16
    assert notes == []


def test_nothing_that_is_out_of_force_is_found(ledger: Ledger, notes: list[str]) -> None:
    with opened(ledger, notes) as memory:
        memory.add(*RECORDS)
        old = record("Oslo", "mayor", "Om")
        assert found(memory, old.example.prompt)[0] == old
        memory.supersede(old.id, new := record("Oslo", "mayor", "Ada"))
        assert found(memory, old.example.prompt)[0] == new and old not in found(memory, old.example.prompt, 100)
        assert memory.undo(new.id) == (old.id,)
        assert found(memory, old.example.prompt)[0] == old and new not in found(memory, old.example.prompt, 100)
        memory.retract(old.id)
        assert old not in found(memory, old.example.prompt, 100)
        with pytest.raises(ConflictError):
            memory.add(record("Lima", "river", "elsewhere"))


def test_what_another_process_writes_is_found_and_what_it_takes_is_not(ledger: Ledger, notes: list[str]) -> None:
    with opened(ledger, notes) as memory, Ledger(ledger.path) as other:
        memory.add(*RECORDS)
        memory.search("anything")
        Records(other).retract(RECORDS[0].id)
        Records(other).add(new := record("Oslo", "zoo"))  # without its vector, which is made here
        assert found(memory, "The zoo of Oslo is")[0] == new
        assert RECORDS[0] not in found(memory, RECORDS[0].example.prompt, 100)


# --------------------------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_encoded_is_refused_before_anything_is_kept(ledger: Ledger, notes: list[str]) -> None:
    with opened(ledger, notes, Counting(window=8)) as memory:
        with pytest.raises(InvalidExample, match="and the encoder reads 8"):
            memory.add(RECORDS[0], record("Oslo", "house with the very many windows on the old square"))
        long = record("Oslo", "mayor", aliases=("the town that some call the Tiger City",))
        with pytest.raises(InvalidExample, match="and the encoder reads 8"):
            memory.add(long)
        with pytest.raises(InvalidExample, match="empty"):
            memory.search(" ")
        assert memory.records.active() == ()


def test_a_memory_of_another_encoder_is_refused_and_can_be_moved(ledger: Ledger, notes: list[str]) -> None:
    with opened(ledger, notes) as memory:
        memory.add(*RECORDS)
        before = found(memory, "The mayor of Oslo is", 1)
        with pytest.raises(WrongBase, match="is of the encoder hashed .* move it to the second"):
            opened(ledger, notes, Counting(128))
        room.moved(ledger, Counting(128), note=notes.append)
        with pytest.raises(WrongBase):  # who has it open goes on finding, and no longer writes
            memory.add(record("Oslo", "zoo"))
        assert found(memory, "The mayor of Oslo is", 1) == before
    with pytest.raises(WrongBase):
        opened(ledger, notes)
    with opened(ledger, notes, Counting(128)) as memory:
        assert found(memory, "The mayor of Oslo is", 1) == before


def test_an_index_file_of_another_encoder_is_refused(ledger: Ledger, notes: list[str]) -> None:
    with opened(ledger, notes) as memory:
        memory.add(*RECORDS)
        memory.search("x y")
        theirs = memory._file
    room.moved(ledger, Counting(128), note=notes.append)
    with opened(ledger, notes, Counting(128)) as memory:
        mine = memory._file
    with Ledger.create(ledger.path.parent / "other", BASE, "lab/neox", BUDGET) as other, opened(other, notes) as memory:
        memory.add(*RECORDS)
        memory.search("x y")
        for body in memory._file.parent.glob("graph*"):
            shutil.copy(body, mine.parent / body.name.replace(theirs.stem, mine.stem) if body.suffix == ".json" else mine.parent)
    with opened(ledger, notes, Counting(128)) as memory, pytest.raises(WrongBase, match="is made again from the records"):
        memory.search("The mayor of Oslo is")


# ------------------------------------------------------------------------------------------------------------------ damage and kills


def graphs(ledger: Ledger) -> list[Path]:
    return sorted((ledger.path / FOLDER).glob("graph-*"))


@pytest.fixture
def settled(ledger: Ledger, notes: list[str]) -> Ledger:
    """A ledger whose memory has a graph on the disk and newer records besides."""
    with opened(ledger, notes) as memory:
        memory.add(*RECORDS[:60])
        memory.search("anything")
        memory.add(*RECORDS[60:])
        memory.retract(RECORDS[1].id)
    assert len(graphs(ledger)) == 2
    return ledger


def check(ledger: Ledger, notes: list[str], encoder: Counting | None = None) -> None:
    with opened(ledger, notes, encoder) as memory:
        assert {hit.record.id for hit in memory.search("The mayor of Oslo is", 100)} == {r.id for r in memory.records.active()}
        for r in memory.records.active():
            assert found(memory, r.example.prompt, 1) == [r]


def test_reopened_it_reads_the_graph_and_encodes_nothing_again(settled: Ledger, notes: list[str]) -> None:
    encoder, before = Counting(), graphs(settled)
    check(settled, notes, encoder)
    assert encoder.asked == 72  # the queries of `check` and no more: 71 records are left
    assert (notes, graphs(settled)) == ([], before)


@pytest.mark.parametrize("which", [".json", ".usearch"])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_broken_index_is_made_again_and_said(settled: Ledger, notes: list[str], which: str, how: str) -> None:
    (path,) = [path for path in graphs(settled) if path.suffix == which]
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(raw[: len(raw) // 2] if how == "cut" else bytes([raw[0] ^ 255]) + raw[1:])
    check(settled, notes)
    if (which, how) != (".json", "missing"):  # then there is none
        (note,) = notes
        assert "is damaged" in note and "It is made again from the records." in note
    notes.clear()
    check(settled, notes)
    assert notes == []


def test_an_index_of_a_later_state_of_the_ledger_is_made_again_and_said(settled: Ledger, notes: list[str]) -> None:
    with Ledger.create(settled.path.parent / "copy", BASE, "lab/neox", BUDGET) as copy:
        with opened(copy, notes) as memory:
            memory.add(*RECORDS[:3])
        shutil.rmtree(copy.path / FOLDER)
        shutil.copytree(settled.path / FOLDER, copy.path / FOLDER)
        check(copy, notes)
    assert "is not of this ledger, or of a later state of it. It is made again" in notes[0]


@pytest.mark.parametrize("how", ["overwritten", "empty", "missing"])
def test_damaged_vectors_are_encoded_again_and_said(settled: Ledger, notes: list[str], how: str) -> None:
    path = settled.path / FOLDER / "vectors.sqlite"
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    path.unlink() if how == "missing" else path.write_bytes(b"" if how == "empty" else b"no database" * 1000)
    check(settled, notes)
    assert len(notes) == (how == "overwritten")
    assert all("They are encoded again." in note for note in notes)


def test_a_vector_cut_short_is_encoded_again(settled: Ledger, notes: list[str]) -> None:
    with sqlite3.connect(settled.path / FOLDER / "vectors.sqlite") as db:
        db.execute("UPDATE vector SET vector = substr(vector, 1, 7)")
    db.close()
    check(settled, notes)


def test_killed_between_vector_record_and_index(settled: Ledger, notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a write or a search stops, the next memory that is opened finds what is in force and nothing else."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    new = record("Oslo", "zoo")
    for step, where, what in enumerate_kills():
        with monkeypatch.context() as hard_times:
            memory = opened(settled, notes)
            hard_times.setattr(where, what, killed)
            with pytest.raises(KeyboardInterrupt):
                memory.add(record("Oslo", f"zoo number {step}"))
                memory._index.exact = 1
                memory.search("The zoo of Oslo is")
                memory._index.fold()
                memory._save()
            memory._cache.close()  # not `memory.close`, which would save
        check(settled, notes)
    with opened(settled, notes) as memory:
        memory.add(new)
        assert found(memory, "The zoo of Oslo is", 1) == [new]
    assert notes == []


def enumerate_kills() -> Iterator[tuple[int, object, str]]:
    places: list[tuple[object, str]] = [
        (Records, "_begin"),
        (Records, "add"),
        (Index, "add"),
        (Index, "remove"),
        (Index, "save"),
        (room.Cache, "_keep"),
    ]
    for step, (where, what) in enumerate(places):
        yield step, where, what


def test_a_search_that_is_interrupted_does_not_spoil_the_next_one(
    settled: Ledger, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(settled, notes) as memory:
        memory.search("anything")
        memory.add(*(record("Oslo", f"zoo number {n}") for n in range(9)))
        with monkeypatch.context() as hard_times:
            hard_times.setattr(room, "BATCH", 4)
            hard_times.setattr(memory._index, "fold", lambda: None)
            count, add = 0, Index.add

            def third(self: Index, *given: Any) -> None:
                nonlocal count
                count += 1
                if count == 3:
                    raise KeyboardInterrupt
                add(self, *given)

            hard_times.setattr(Index, "add", third)
            with pytest.raises(KeyboardInterrupt):
                memory.search("The zoo number 3 of Oslo is")
        assert found(memory, "The zoo number 3 of Oslo is", 1) == [record("Oslo", "zoo number 3")]
        assert len(memory._index) == 2 * len(memory.active())
    assert notes == []


def test_a_graph_that_is_saved_with_newcomers_beside_it_does_not_lose_them(settled: Ledger, notes: list[str]) -> None:
    with opened(settled, notes) as memory:
        memory.add(new := record("Oslo", "zoo"))
        memory.search("anything")
        assert memory._index.tail > 0  # in the tail
        memory._save()
    with opened(settled, notes) as memory:
        assert found(memory, "The zoo of Oslo is", 1) == [new]
    check(settled, notes)


def test_without_usearch_everything_is_compared_and_it_is_said_once(
    ledger: Ledger, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: int) -> None:
        raise MissingExtra('More than 50,000 questions need usearch, which is not installed: pip install "errata[memory]".')

    monkeypatch.setattr("errata.memory.index._graph", missing)
    with opened(ledger, notes) as memory:
        memory.add(*RECORDS)
        assert found(memory, RECORDS[5].example.prompt, 1) == [RECORDS[5]]
        memory.add(record("Oslo", "zoo"))
        assert found(memory, "The zoo of Oslo is", 1) == [record("Oslo", "zoo")]
    (note,) = notes
    assert "Until then a search compares all of them" in note


def test_a_folder_for_vectors_that_cannot_be_had_is_a_sentence(ledger: Ledger, notes: list[str]) -> None:
    (ledger.path / "aside").mkdir()
    (ledger.path / FOLDER).write_text("a file")
    with pytest.raises(LedgerError, match="cannot be opened"):
        opened(ledger, notes)


def test_what_follows_is_found_by_the_answer(ledger: Ledger, notes: list[str]) -> None:
    """Its question shares no word with such a query. The last sentence is what is asked, as a router asks it."""
    asked = Record(example=Example(prompt="I have been there. Where is Kolhapur?", target=" Zanzibar"))
    with opened(ledger, notes) as memory:
        memory.add(*RECORDS, asked)
        (hit,) = memory.search("Zanzibar lies around which town?", 1)
        assert (hit.record, hit.question) == (asked, asked.example.prompt) and hit.score > 0.1
        assert keys(asked.example.prompt, " Zanzibar") == ("Where is Kolhapur?", "Where is Kolhapur? Zanzibar")
        assert [h.record for h in memory.search("Where is Kolhapur?", 3)].count(asked) == 1
        memory.retract(asked.id)
        assert asked not in [h.record for h in memory.search("Zanzibar lies around which town?", 99)]


def test_scores_are_those_of_the_vectors(ledger: Ledger, notes: list[str]) -> None:
    with opened(ledger, notes, exact=1000) as memory:
        memory.add(*RECORDS)
        query = memory.encoder.encode(["Who leads the town of Oslo"])[0]
        for hit in memory.nearest(query, 5):
            found_by = memory.encoder.encode(keys(hit.question, hit.record.example.target))
            assert abs(hit.score - float((found_by @ query).max())) < 1e-3
        assert np.isclose(np.linalg.norm(query), 1)
