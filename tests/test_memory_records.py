"""Records come, go and come back as asked; one question has one answer; a kill leaves all of it or nothing."""

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ledger import BASE, BUDGET, MEMORY, fact, tamper

from errata.ledger import Ledger
from errata.memory import records as room
from errata.memory.records import Records
from errata.types import ConflictError, Example, InvalidExample, LedgerError, Record, UnknownName, folded, utc


def record(number: int, target: str | None = None, **scope: Any) -> Record:
    return Record(example=fact(number, target), **scope)


BURMA = Example(prompt="The capital of Burma is", target=" Naypyidaw", subject="Burma")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with Ledger.create(tmp_path / "ledger", BASE, "lab/neox", BUDGET) as ledger:
        yield Records(ledger)


def seen(records: Records) -> list[tuple[str, bool, tuple[str, ...], str]]:
    return [(row.record.id, row.active, row.supersedes, row.provenance) for row in records.listed()]


# ---------------------------------------------------------------------------------------------------------------------- the value


def test_a_record_has_one_spelling() -> None:
    a = Record(example=BURMA, aliases=("Myanmar", "Birma", "Myanmar"), tags=("b", "a"), since="2026-01-01", until="2026-02-01T01:00+01:00")
    b = Record(example=BURMA, aliases=("Birma", "Myanmar"), tags=("a", "b"), since="2026-01-01T00:00:00Z", until="2026-02-01")
    assert a == b and a.id == b.id
    assert Record.from_dict(a.as_dict()) == a == Record.from_dict(json.loads(json.dumps(a.as_dict())))
    assert a.questions == ("The capital of Burma is", "The capital of Birma is", "The capital of Myanmar is")


@pytest.mark.parametrize(
    ("scope", "sentence"),
    [
        ({"aliases": ("Myanmar",)}, "has aliases and no subject"),
        ({"tags": ("",)}, "One of the tags .* is empty"),
        ({"since": "tomorrow"}, "is no time. Write it as 2026-11-22"),
        ({"since": "2026-02-01", "until": "2026-02-01"}, "would hold until"),
    ],
)
def test_a_record_that_cannot_be_is_refused(scope: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidExample, match=sentence):
        record(1, **scope)


@pytest.mark.parametrize("empty", [{"prompt": " "}, {"target": ""}])
def test_an_empty_record_is_refused(empty: dict[str, str]) -> None:
    with pytest.raises(InvalidExample, match="is empty"):
        Record.from_dict({"prompt": "a", "target": " b"} | empty)
    with pytest.raises(InvalidExample, match="Not a record"):
        Record.from_dict({"prompt": "a", "target": " b", "answer": "c"})


def test_validity_ends_before_its_end() -> None:
    held = record(1, since="2026-01-01", until="2026-02-01")
    moments = ["2025-12-31T23:59:59", "2026-01-01", "2026-01-31T23:59:59", "2026-02-01"]
    assert [held.holds(utc(moment)) for moment in moments] == [False, True, True, False]
    assert record(1).holds(utc("1969-07-20"))


# ------------------------------------------------------------------------------------------------------------ add, retract, supersede


def test_records_stand_in_the_order_in_which_they_came_and_examples_stay_as_they_are(records: Records) -> None:
    records.ledger.add(fact(1))
    ids = records.add(record(3), record(1), provenance="press.jsonl")
    assert [r.id for r in records.active()] == ids
    assert {row.provenance for row in records.listed()} == {"press.jsonl"}
    assert records.ledger.active() == (fact(1),)
    assert [row.example for row in records.ledger.examples()] == [fact(1)]
    assert records.ledger.verify() == []


def test_adding_again_changes_nothing(records: Records) -> None:
    records.add(record(1))
    before = seen(records)
    assert records.add(record(1), record(1), provenance="elsewhere") == [record(1).id] * 2
    assert seen(records) == before


def test_retracted_is_gone_and_said_so(records: Records) -> None:
    records.add(record(1), record(2))
    assert records.retract(record(1).id.removeprefix("b2:")[:8]) == record(1).id
    assert records.active() == (record(2),)
    with pytest.raises(UnknownName, match="is not in force: it was retracted at"):
        records.retract(record(1).id)
    with pytest.raises(UnknownName, match="No record's id begins with"):
        records.retract("ffff")
    with pytest.raises(UnknownName, match="too short"):
        records.retract("b2:12")
    records.add(record(1))
    assert records.active() == (record(2), record(1))
    assert [row.active for row in records.listed(record(1).id)] == [False, True]


def test_supersede_is_one_step_and_says_what_it_replaced(records: Records) -> None:
    records.add(record(1), record(2))
    records.supersede(record(1).id, record(1, " Elsewhere"), provenance="correction")
    assert records.active() == (record(2), record(1, " Elsewhere"))
    assert records.listed()[-1].supersedes == (record(1).id,)
    (old,) = records.listed(record(1).id)
    assert old.ended is not None and (old.ended.what, old.ended.detail) == ("memory supersede", f"by {record(1, ' Elsewhere').id}")
    with pytest.raises(UnknownName, match="another took its place"):
        records.supersede(record(1).id, record(5))
    with pytest.raises(ConflictError, match="cannot take its own place"):
        records.supersede(record(2).id, record(2))
    with pytest.raises(ConflictError, match="in force already"):
        records.supersede(record(2).id, record(1, " Elsewhere"))
    with pytest.raises(ConflictError, match="has another answer in the memory"):
        records.supersede(record(2).id, record(1, " A third place"))


# ---------------------------------------------------------------------------------------------------------------------- contradictions


CLASHING = {
    "another answer": (record(1), record(1, " Elsewhere")),
    "case and mark": (
        Record(example=Example(prompt="What is the capital of Mali?", target=" Bamako")),
        Record(example=Example(prompt="what is  THE capital of Mali", target=" Gao")),
    ),
    "by an alias": (
        Record(example=BURMA, aliases=("Myanmar",)),
        Record(example=Example(prompt="The capital of Myanmar is", target=" Rangoon")),
    ),
    "by aliases of both": (
        Record(example=BURMA, aliases=("Birma",)),
        Record(example=Example(prompt="The capital of Myanmar is", target=" Rangoon", subject="Myanmar"), aliases=("Birma",)),
    ),
    "tagged and not": (record(1, tags=("a",)), record(1, " Elsewhere")),
    "one tag of two": (record(1, tags=("a", "b")), record(1, " Elsewhere", tags=("b", "c"))),
    "times that meet": (record(1, until="2026-02-01"), record(1, " Elsewhere", since="2026-01-31")),
    "one inside the other": (record(1, since="2026-01-01", until="2026-03-01"), record(1, " E", since="2026-02-01", until="2026-02-02")),
    "the same with other tags": (record(1), record(1, tags=("a",))),
}
APART = {
    "other question": (record(1), record(2)),
    "other tags": (record(1, tags=("a",)), record(1, " Elsewhere", tags=("b",))),
    "one after the other": (record(1, until="2026-02-01"), record(1, " Elsewhere", since="2026-02-01")),
    "preferred besides": (record(1), Record(example=replace(fact(1, " Elsewhere"), goal="prefer", contrast=" Nowhere"))),
}


@pytest.mark.parametrize("which", CLASHING)
@pytest.mark.parametrize("turned", [False, True])
def test_a_contradiction_is_refused_or_superseded_as_asked(records: Records, which: str, turned: bool) -> None:
    first, second = CLASHING[which][:: -1 if turned else 1]
    records.add(first)
    before = seen(records), records.ledger.history()
    with pytest.raises(ConflictError) as refusal:
        records.add(record(7), second)
    assert first.id in str(refusal.value) and second.id in str(refusal.value)
    assert (seen(records), records.ledger.history()) == before
    records.add(record(7), second, clash="supersede")
    assert records.active() == (record(7), second)
    assert records.listed(second.id)[0].supersedes == (first.id,)


def test_a_memory_can_only_say_the_target() -> None:
    for goal, contrast in (("lower", None), ("balance", " Nowhere")):
        with pytest.raises(InvalidExample, match=f"cannot {goal} it"):
            Record(example=replace(fact(1), goal=goal, contrast=contrast))


@pytest.mark.parametrize("which", APART)
def test_what_does_not_meet_stands_side_by_side(records: Records, which: str) -> None:
    pair = APART[which]
    records.add(*pair)
    assert records.active() == pair


def test_a_retracted_record_contradicts_nothing(records: Records) -> None:
    records.add(record(1))
    records.retract(record(1).id)
    records.add(record(1, " Elsewhere"))
    assert records.active() == (record(1, " Elsewhere"),)


def test_one_record_may_supersede_several(records: Records) -> None:
    pair = record(1, tags=("a",)), record(1, " Elsewhere", tags=("b",))
    records.add(*pair)
    records.add(record(1, " A third place"), clash="supersede")
    assert records.active() == (record(1, " A third place"),)
    assert records.undo(record(1, " A third place").id) == (pair[0].id, pair[1].id)
    assert records.active() == pair


# -------------------------------------------------------------------------------------------------------------------------- undo


def test_undo_goes_back_along_the_chain(records: Records) -> None:
    chain = [record(1), record(1, " B"), record(1, " C")]
    records.add(chain[0], provenance="one")
    for old, new in zip(chain, chain[1:], strict=False):
        records.supersede(old.id, new)
    for new, old in zip(chain[:0:-1], chain[-2::-1], strict=True):
        assert records.undo(new.id) == (old.id,)
        assert records.active() == (old,)
    assert records.listed()[-1].provenance == "one"
    assert records.undo(chain[0].id) == ()
    assert records.active() == ()
    assert records.ledger.verify() == []


def test_undo_brings_back_nothing_that_contradicts_what_is_in_force_by_now(records: Records) -> None:
    records.add(record(1))
    records.supersede(record(1).id, moved := record(2, " B"))  # another question: so the first may be answered anew
    records.add(record(1, " New"))
    before = seen(records)
    with pytest.raises(ConflictError):
        records.undo(moved.id)
    assert seen(records) == before
    records.retract(record(1, " New").id)
    records.add(record(1))  # somebody has brought it back
    assert records.undo(moved.id) == (record(1).id,)
    assert records.active() == (record(1),)


def test_retract_brings_nothing_back(records: Records) -> None:
    records.add(record(1))
    records.supersede(record(1).id, record(1, " B"))
    records.retract(record(1, " B").id)
    assert records.active() == ()


STEP = st.tuples(st.sampled_from(["add", "force", "retract", "undo"]), st.integers(0, 2), st.sampled_from("ABC"))


@given(st.lists(STEP, max_size=14))
def test_whatever_is_done_a_question_has_one_answer(steps: list[tuple[str, int, str]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, Ledger.create(folder, BASE, "lab/neox", BUDGET) as ledger:
        made = Records(ledger)
        followed, followed_to = set[int](), 0
        for what, number, answer in steps:
            chosen = record(number, f" {answer}")
            before = seen(made)
            try:
                match what:
                    case "add":
                        made.add(chosen)
                    case "force":
                        made.add(chosen, clash="supersede")
                    case "retract":
                        made.retract(chosen.id)
                    case "undo":
                        made.undo(chosen.id)
            except (ConflictError, UnknownName):
                assert seen(made) == before
            prompts = [r.example.prompt for r in made.active()]
            assert len(prompts) == len(set(prompts))
            # an index that follows the log step by step holds what one holds that begins now
            moment = made.moment()[0]
            followed = followed.difference(made.went(followed_to)) | {n for n, *_ in made.came(followed_to, moment)}
            followed_to = moment
            assert followed == {n for n, *_ in made.came(0, moment)}
        assert ledger.verify() == []


# --------------------------------------------------------------------------------------------------------------------- damage and kills


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE record SET scope = replace(scope, '[]', '[\"x\"]')",
        "UPDATE record SET scope = '[]'",
        "UPDATE record SET id = 'b2:1'",
        "UPDATE record SET example = (SELECT max(id) FROM example)",
    ],
)
def test_an_altered_record_is_found_and_refused(records: Records, sql: str) -> None:
    records.add(*sorted([record(1), record(2)], key=lambda r: r.example.id)[:1])
    records.ledger.add(*sorted([fact(1), fact(2)], key=lambda e: e.id)[1:])
    tamper(records.ledger, sql)
    assert {problem.kind for problem in records.ledger.verify()} == {"record"}
    with pytest.raises(LedgerError):
        records.active()


def test_killed_at_each_statement_a_write_is_whole_or_absent(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is cut at each statement of a superseding write; what was there before is there, and nothing else."""
    records.add(record(1))
    ledger, path = records.ledger, records.ledger.path
    before = seen(records)
    ledger.close()
    for step in range(1, 40):
        with Ledger(path) as again:
            count = 0

            def cut(statement: str, step: int = step, again: Ledger = again) -> None:
                nonlocal count
                count += 1
                if count == step:
                    again._db.interrupt()

            again._db.set_trace_callback(cut)
            try:
                Records(again).add(record(1, " Elsewhere"), record(2), clash="supersede")
                again._db.set_trace_callback(None)
                break
            except LedgerError:
                again._db.set_trace_callback(None)
        with Ledger(path) as again:
            assert seen(Records(again)) == before
            assert again.verify() == []
    assert step > 8
    with Ledger(path) as again:
        assert Records(again).active() == (record(1, " Elsewhere"), record(2))


def test_a_question_is_one_for_each_name(records: Records) -> None:
    records.add(Record(example=BURMA, aliases=("Myanmar", "burma")))
    assert records.count() == 3  # they are embedded as written
    with sqlite3.connect(records.ledger.path / "ledger.sqlite") as db:
        assert {key for (key,) in db.execute("SELECT folded FROM question")} == {
            folded("The capital of Burma is"),
            "the capital of myanmar is",
        }
    db.close()


def test_ways_to_treat_a_contradiction() -> None:
    assert room.check_clash("refuse") == "refuse"
    with pytest.raises(UnknownName, match="Did you mean supersede"):
        room.check_clash("supercede")
