"""The ledger keeps what it acknowledged: across conflicts, damage, full disks, other writers, and 100 rounds of `kill -9`.

Run as a script, this file is the writer that the last tests kill: see `serve`.
"""

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata import ledger as room
from errata.artefact import to_bytes, write_whole
from errata.ledger import FILE, Ledger
from errata.memory.records import Records
from errata.types import (
    Add,
    Budget,
    ConflictError,
    EditError,
    Example,
    InvalidPatch,
    LedgerError,
    Patch,
    Record,
    State,
    UnknownName,
    Verdict,
    WrongBase,
    digest,
)

BASE = "b2:" + "0" * 32
BUDGET = Budget(epsilon=1e-3, neighbours=0.9)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # what a kill leaves is the same there, and syncing takes no time


def fact(number: int, target: str | None = None) -> Example:
    return Example(prompt=f"The capital of country {number} is", target=f" City {number}" if target is None else target)


def patch_of(*examples: Example, value: float = 1.0) -> Patch:
    return Patch(
        method="finetune",
        config={"steps": 3},
        parent=BASE,
        examples=examples,
        ops=(Add(weight="blocks.0.weight", delta=torch.full((4, 4), value)),),
    )


def judged(patch: Patch, passed: bool = True, **changed: Any) -> Verdict:
    measured: dict[str, Any] = {
        "patch": patch.id,
        "budget": BUDGET,
        "loss_before": 3.0,
        "loss_after": 3.0001 if passed else 3.3,
        "upper": 1e-4 if passed else 0.2,
        "chunks": 8,
        "tokens": 4096,
        "set_aside": 0,
        "kept": 10,
        "asked": 10,
        "norm": 0.01,
        "fixed": len(patch.examples),
        "wanted": len(patch.examples),
    }
    return Verdict(**measured | changed)


def state_of(value: float = 1.0) -> State:
    tensors = {"covariance": torch.full((3, 3), value, dtype=torch.float64), "mean": torch.arange(3).bfloat16()}
    return State(method="memit", host=BASE, config={"layers": [1, 2]}, tensors=tensors, trained_on=frozenset({"b2:1", "b2:2"}))


def put(ledger: Ledger, *examples: Example, value: float = 1.0, passed: bool = True) -> str:
    patch = patch_of(*examples, value=value)
    return ledger.put_patch(patch, judged(patch, passed))


def blobs(ledger: Ledger) -> list[Path]:
    return sorted(p for p in (ledger.path / "blobs").rglob("*") if p.is_file())


def kinds(ledger: Ledger) -> list[str]:
    return [problem.kind for problem in ledger.verify()]


def tamper(ledger: Ledger, sql: str, *values: object) -> None:
    with sqlite3.connect(ledger.path / FILE) as db:
        db.execute(sql, values)
    db.close()


def seen(ledger: Ledger) -> tuple[object, ...]:
    """Everything that a reader can see, but for the times."""
    patches = [(row.id, row.method, row.examples, row.verdict, row.current) for row in ledger.patches()]
    return ledger.active(), patches, [(event.what, event.id, event.detail) for event in ledger.history()]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger", BASE, "lab/neox", BUDGET) as made:
        yield made


# ------------------------------------------------------------------------------------------------------------------ open and create


def test_reopened_ledger_is_the_one_that_was_created(ledger: Ledger) -> None:
    put(ledger, *[fact(i) for i in range(3)])
    ledger.add(*[fact(i) for i in range(3)], source="facts.jsonl")
    before = seen(ledger)
    ledger.close()
    with Ledger(str(ledger.path)) as again:
        assert (again.host, again.model, again.budget) == (BASE, "lab/neox", BUDGET)
        assert seen(again) == before
        assert again.verify() == []


def test_the_disk_is_told_to_keep_every_commit(ledger: Ledger) -> None:
    pragmas = [ledger._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert pragmas == ["wal", 2, 1]


def test_create_refuses_a_folder_that_has_a_ledger_and_leaves_it_whole(ledger: Ledger) -> None:
    ledger.add(fact(1))
    with pytest.raises(LedgerError, match="a ledger at .* already"):
        Ledger.create(ledger.path, BASE, "lab/neox", BUDGET)
    assert ledger.active() == (fact(1),)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "There is no ledger"), (b"", "no ledger in it"), (b"not a database " * 99, "is damaged")],
    ids=["absent", "empty", "text"],
)
def test_what_is_no_ledger_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(LedgerError, match=sentence):
        Ledger(tmp_path)


def test_create_completes_what_a_kill_interrupted(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    with Ledger.create(tmp_path, BASE, "lab/neox", BUDGET) as made:
        assert made.verify() == []


def test_odd_folder_names_are_names(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "50% of #1?mode=ro é", BASE, "lab/neox", BUDGET) as made:
        made.add(fact(1))
        assert (made.path / FILE).is_file()


def test_newer_schema_is_refused_and_older_one_brought_up_to_date(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(fact(1))
    ledger.close()
    with monkeypatch.context() as newer:
        newer.setattr(room, "MIGRATIONS", (*room.MIGRATIONS, "CREATE TABLE note (text TEXT) STRICT\n\nCREATE INDEX n ON note (text)"))
        for _ in range(2):  # the second time there is nothing left to do
            with Ledger(ledger.path) as migrated:
                assert migrated.rows("SELECT * FROM note") == []
                assert migrated.active() == (fact(1),)
    known = len(room.MIGRATIONS)
    with pytest.raises(LedgerError, match=f"number {known + 1}, this version knows {known}. Update errata"):
        Ledger(ledger.path)


def test_a_ledger_from_before_the_edit_memory_gets_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(room, "MIGRATIONS", room.MIGRATIONS[:1])
        with Ledger.create(tmp_path, BASE, "lab/neox", BUDGET) as made:
            made.add(fact(1))
            assert made.rows("SELECT 1 FROM sqlite_master WHERE name = 'record'") == []
    with Ledger(tmp_path) as again:
        assert again.rows("SELECT * FROM record") == []
        assert again.active() == (fact(1),)
        assert again.verify() == []


def test_a_ledger_from_before_tags_were_looked_up_gets_those_of_its_records(ledger: Ledger) -> None:
    records = Records(ledger)
    records.bind("b2:1", "made")
    records.add(Record(example=fact(1), tags=("a", "b")), Record(example=fact(2)), Record(example=fact(3), tags=("b",)))
    now = {tags: records.tagged(tags) for tags in ((), ("a",), ("b",), ("c",))}
    assert now == {(): [2], ("a",): [1, 2], ("b",): [1, 2, 3], ("c",): [2]}
    ledger.close()
    with closing(sqlite3.connect(ledger.path / FILE)) as db, db:
        db.execute("DROP TABLE tag")
        db.execute("DELETE FROM migration WHERE number > 2")
    with Ledger(ledger.path) as again:
        assert {tags: Records(again).tagged(tags) for tags in now} == now


def test_a_migration_that_fails_changes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.close()
    with monkeypatch.context() as newer:
        newer.setattr(room, "MIGRATIONS", (*room.MIGRATIONS, "CREATE TABLE note (text TEXT) STRICT\n\nCREATE TABLE active (x TEXT)"))
        with pytest.raises(LedgerError):
            Ledger(ledger.path)
    with Ledger(ledger.path) as again:
        assert again.verify() == []
        assert again.rows("SELECT name FROM sqlite_master WHERE name = 'note'") == []


# ------------------------------------------------------------------------------------------------------------------------- examples


def test_active_examples_keep_the_order_in_which_they_were_added(ledger: Ledger) -> None:
    ids = ledger.add(fact(3), fact(1)) + ledger.add(fact(2))
    assert ids == [fact(3).id, fact(1).id, fact(2).id]
    assert ledger.active() == (fact(3), fact(1), fact(2))
    ledger.retract(ids[0])
    ledger.add(fact(3))
    assert ledger.active() == (fact(1), fact(2), fact(3))


def test_adding_an_active_example_again_changes_nothing(ledger: Ledger) -> None:
    ledger.add(fact(1), fact(1))
    before = seen(ledger)
    assert ledger.add(fact(1)) == [fact(1).id]
    assert ledger.add() == []
    assert seen(ledger) == before


def test_add_is_all_or_nothing(ledger: Ledger) -> None:
    ledger.add(fact(1))
    before = seen(ledger)
    with pytest.raises(ConflictError):
        ledger.add(fact(2), fact(1, " Elsewhere"), fact(3))
    with pytest.raises(ConflictError):  # within one call
        ledger.add(fact(5), fact(5, " Elsewhere"))
    assert seen(ledger) == before


def test_history_tells_what_happened_in_order(ledger: Ledger) -> None:
    ledger.add(fact(1), source="facts.jsonl")
    ledger.supersede(fact(1).id, fact(2))
    put(ledger, fact(2), passed=False)
    ledger.retract(fact(2).id)
    ledger.put_state(state_of())
    events = ledger.history()
    assert [(e.what, e.id) for e in events] == [
        ("create", BASE),
        ("add", fact(1).id),
        ("supersede", fact(1).id),
        ("add", fact(2).id),
        ("patch", patch_of(fact(2)).id),
        ("retract", fact(2).id),
        ("state", state_of().id),
    ]
    assert [e.detail for e in events[1:4]] == ["facts.jsonl", f"by {fact(2).id}", f"instead of {fact(1).id}"]
    assert events[4].detail.startswith("refused: reference loss")
    assert all(e.at.endswith("+00:00") for e in events)


def test_supersede_replaces_in_one_step_or_not_at_all(ledger: Ledger) -> None:
    ledger.add(fact(1), fact(2))
    assert ledger.supersede(fact(1).id, fact(1, " Elsewhere")) == fact(1, " Elsewhere").id
    assert ledger.active() == (fact(2), fact(1, " Elsewhere"))
    before = seen(ledger)
    with pytest.raises(ConflictError):
        ledger.supersede(fact(1, " Elsewhere").id, fact(2, " Elsewhere"))
    with pytest.raises(UnknownName):
        ledger.supersede(fact(1).id, fact(9))
    assert seen(ledger) == before


def test_retract_needs_an_active_example(ledger: Ledger) -> None:
    ledger.add(fact(1))
    assert ledger.retract(fact(1).id) == fact(1).id
    with pytest.raises(UnknownName, match="is not active: it was retracted at"):
        ledger.retract(fact(1).id)


def test_an_example_that_was_taken_out_is_still_found(ledger: Ledger) -> None:
    ledger.add(fact(1), fact(2), fact(3), source="facts.jsonl")
    ledger.retract(fact(1).id)
    ledger.supersede(fact(2).id, fact(2, " Elsewhere"))
    ledger.retract(fact(3).id)
    ledger.add(fact(3))
    told = {row.example: (row.active, row.last.what, row.last.detail) for row in ledger.examples()}
    assert told == {
        fact(1): (False, "retract", ""),
        fact(2): (False, "supersede", f"by {fact(2, ' Elsewhere').id}"),
        fact(2, " Elsewhere"): (True, "add", f"instead of {fact(2).id}"),
        fact(3): (True, "add", ""),
    }
    assert {row.example for row in ledger.examples() if row.active} == set(ledger.active())
    assert all(row.last in ledger.history() for row in ledger.examples())
    for start in (fact(1).id, fact(1).id[:9], fact(1).id[3:9]):
        assert [row.example for row in ledger.examples(start)] == [fact(1)]
    assert ledger.examples("b2:%") == ledger.examples("?") == ()


PROMPT = "The capital of Mauritius is"


def example(goal: str, target: str, contrast: str | None = None) -> Example:
    return Example(prompt=PROMPT, target=target, contrast=contrast, goal=goal)  # type: ignore[arg-type]


RAISE_A, RAISE_B = example("raise", " A"), example("raise", " B")
LOWER_A, LOWER_B = example("lower", " A"), example("lower", " B")
A_OVER_B, B_OVER_A, B_OVER_C = example("prefer", " A", " B"), example("prefer", " B", " A"), example("prefer", " B", " C")
A_AS_B, B_AS_A, B_AS_C = example("balance", " A", " B"), example("balance", " B", " A"), example("balance", " B", " C")

CONTRADICT = [
    (RAISE_A, RAISE_B),
    (RAISE_A, LOWER_A),
    (RAISE_A, B_OVER_A),
    (RAISE_A, A_AS_B),
    (RAISE_A, B_AS_A),
    (A_OVER_B, B_OVER_A),
    (A_OVER_B, A_AS_B),
    (A_OVER_B, B_AS_A),
    (RAISE_A, replace(RAISE_B, prompt="  The capital\n of Mauritius  is ")),
]
AGREE = [
    (RAISE_A, LOWER_B),
    (RAISE_A, A_OVER_B),
    (RAISE_A, B_OVER_C),
    (RAISE_A, B_AS_C),
    (LOWER_A, LOWER_B),
    (LOWER_A, A_OVER_B),
    (LOWER_A, A_AS_B),
    (A_OVER_B, B_OVER_C),
    (A_OVER_B, B_AS_C),
    (A_AS_B, B_AS_A),
    (RAISE_A, replace(RAISE_A, prompt=PROMPT + " ", target="A")),
    (RAISE_A, replace(RAISE_A, subject="Mauritius")),
    (RAISE_A, replace(RAISE_B, prompt="The capital of Malawi is")),
]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("pair", CONTRADICT, ids=lambda pair: f"{pair[0].goal}-{pair[1].goal}")
def test_examples_that_no_model_can_satisfy_are_refused(ledger: Ledger, pair: tuple[Example, Example], first: int) -> None:
    one, other = pair[first], pair[1 - first]
    ledger.add(one)
    with pytest.raises(ConflictError) as refusal:
        ledger.add(other)
    sentence = str(refusal.value)
    assert all(text in sentence for text in (one.target, other.target, one.id, "Supersede", "retract", PROMPT))
    ledger.supersede(one.id, other)
    assert ledger.active() == (other,)


@pytest.mark.parametrize("pair", AGREE, ids=lambda pair: f"{pair[0].goal}-{pair[1].goal}")
def test_examples_that_can_hold_together_do(ledger: Ledger, pair: tuple[Example, Example]) -> None:
    ledger.add(*pair)
    ledger.add(*pair[::-1])
    assert ledger.active() == pair


def test_a_retracted_example_contradicts_nothing(ledger: Ledger) -> None:
    ledger.add(RAISE_A)
    ledger.retract(RAISE_A.id)
    ledger.add(RAISE_B)
    assert ledger.active() == (RAISE_B,)


@given(
    st.lists(
        st.builds(
            Example,
            prompt=st.text(min_size=1).filter(str.strip),
            target=st.text(min_size=1).filter(str.strip),
        ),
        unique_by=lambda e: " ".join(e.prompt.split()),
        max_size=5,
    )
)
def test_any_text_comes_back_as_it_was(examples: list[Example]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        with Ledger.create(folder, BASE, "lab/neox", BUDGET) as made:
            made.add(*examples)
            put(made, *examples)
        with Ledger(folder) as again:
            assert again.active() == tuple(examples)
            assert again.patch().examples == tuple(examples)
            assert again.verify() == []


@given(st.lists(st.tuples(st.sampled_from(["add", "retract", "supersede"]), st.integers(0, 4), st.integers(0, 1)), max_size=12))
def test_active_examples_follow_the_model(steps: list[tuple[str, int, int]]) -> None:
    """The model is a dictionary from the prompt to the one answer that is active."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, Ledger.create(folder, BASE, "lab/neox", BUDGET) as made:
        model: dict[int, int] = {}
        for what, number, answer in steps:
            chosen = fact(number, f" {answer}")
            if what == "add" and model.get(number, answer) == answer:
                made.add(chosen)
                model.setdefault(number, answer)
            elif what == "retract" and model.get(number) == answer:
                made.retract(chosen.id)
                del model[number]
            elif what == "supersede" and model.get(number) == answer:
                made.supersede(chosen.id, fact(number, f" {1 - answer}"))
                del model[number]
                model[number] = 1 - answer
            else:
                with pytest.raises((ConflictError, UnknownName)):
                    made.add(chosen) if what == "add" else made.retract(chosen.id)
        assert made.active() == tuple(fact(number, f" {answer}") for number, answer in model.items())


# ------------------------------------------------------------------------------------------------------------------------ short ids


def test_an_id_may_be_abbreviated_wherever_one_is_taken(ledger: Ledger) -> None:
    ledger.add(fact(1), fact(2))
    id, state = put(ledger, fact(1), fact(2)), ledger.put_state(state_of())
    for short in (id[:7], id[3:7], id[3:], id):
        assert ledger.patch(short).id == ledger.verdict(short).patch == id
    assert ledger.state(state[3:9]).id == state
    assert ledger.supersede(fact(1).id[3:9], fact(3)) == fact(3).id
    assert ledger.retract(fact(2).id[:9]) == fact(2).id


def test_an_ambiguous_id_lists_what_it_may_mean(ledger: Ledger) -> None:
    ids = [put(ledger, fact(i)) for i in range(2)]
    twins = [f"b2:abcd{i}" + "0" * 27 for i in range(2)]
    for old, new in zip(ids, twins, strict=True):
        tamper(ledger, "UPDATE patch SET id = ? WHERE id = ?", new, old)
    with pytest.raises(UnknownName, match=f"more than one patch: {twins[0]}, {twins[1]}"):
        ledger.patch("abcd")


@pytest.mark.parametrize("given_id", ["", "b2:", "b2:12", "123"])
def test_an_id_that_is_too_short_is_refused(ledger: Ledger, given_id: str) -> None:
    with pytest.raises(UnknownName, match="4 hex digits"):
        ledger.verdict(given_id)


@pytest.mark.parametrize("given_id", ["b2:ffff", "%%%%", "____", "' OR 1 = 1 --"])
def test_an_unknown_id_is_refused_with_the_known_ones(ledger: Ledger, given_id: str) -> None:
    id = put(ledger, fact(1))
    for ask in (ledger.patch, ledger.verdict):
        with pytest.raises(UnknownName, match=f"Known: {id}"):
            ask(given_id)
    with pytest.raises(UnknownName, match="Known: none"):
        ledger.state(given_id)


# ------------------------------------------------------------------------------------------------------------- patches and verdicts


def test_a_patch_comes_back_bit_for_bit(ledger: Ledger) -> None:
    ledger.add(fact(1))
    patch = Patch(method="finetune", config={"lr": 1e-3}, parent=BASE, examples=(fact(1),), ops=(Add(weight="w", delta=torch.randn(4, 4)),))
    assert ledger.put_patch(patch, judged(patch)) == patch.id
    back = ledger.patch()
    assert back.id == patch.id
    assert torch.equal(back.ops[0].tensors["delta"], patch.ops[0].tensors["delta"])
    assert ledger.verdict(patch.id) == judged(patch)


def test_the_latest_patch_that_passed_is_handed_out(ledger: Ledger) -> None:
    ledger.add(fact(1), fact(2))
    first = put(ledger, fact(1), fact(2), value=1.0)
    second = put(ledger, fact(2), fact(1), value=2.0)  # the order of the examples does not matter to whether it is current
    put(ledger, fact(1), fact(2), value=3.0, passed=False)
    assert ledger.patch().id == second
    put(ledger, fact(1), fact(2), value=1.0)  # built again, and so the latest
    assert ledger.patch().id == first
    assert [(row.verdict.passed, row.current) for row in ledger.patches()] == [(True, True), (False, True), (True, True)]


def test_a_refused_patch_is_handed_out_only_by_name(ledger: Ledger) -> None:
    ledger.add(fact(1))
    id = put(ledger, fact(1), passed=False)
    with pytest.raises(LedgerError, match=f"{id}, did not pass: reference loss"):
        ledger.patch()
    assert ledger.patch(id).id == id


def test_the_latest_verdict_counts(ledger: Ledger) -> None:
    ledger.add(fact(1))
    put(ledger, fact(1), passed=True)
    id = put(ledger, fact(1), passed=False)
    assert not ledger.verdict(id).passed
    with pytest.raises(LedgerError, match="did not pass"):
        ledger.patch()
    assert len(ledger.patches()) == len(blobs(ledger)) == 1


def test_nan_is_kept_and_does_not_pass(ledger: Ledger) -> None:
    ledger.add(fact(1))
    patch = patch_of(fact(1))
    ledger.put_patch(patch, judged(patch, loss_after=float("nan"), upper=float("nan")))
    assert not ledger.verdict(patch.id).passed
    with pytest.raises(LedgerError, match="did not pass"):
        ledger.patch()
    assert ledger.verify() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda ledger: ledger.add(fact(2)), "lacks 1 active and holds 0 inactive"),
        (lambda ledger: ledger.supersede(fact(1).id, fact(2)), "lacks 1 active and holds 1 inactive"),
        (lambda ledger: ledger.retract(fact(1).id), "lacks 0 active and holds 1 inactive"),
    ],
    ids=["add", "supersede", "retract"],
)
def test_a_patch_of_other_examples_is_never_handed_out_silently(ledger: Ledger, change: Callable[[Ledger], object], sentence: str) -> None:
    ledger.add(fact(0), fact(1))
    id = put(ledger, fact(0), fact(1))
    change(ledger)
    with pytest.raises(LedgerError, match=f"{id}, is out of date: it {sentence}.*errata build"):
        ledger.patch()
    assert ledger.patch(id).id == id


def test_what_is_taken_back_and_added_again_makes_its_patch_current_again(ledger: Ledger) -> None:
    ledger.add(fact(1), fact(2))
    id = put(ledger, fact(1), fact(2))
    ledger.retract(fact(1).id)
    ledger.add(fact(1))
    assert ledger.patch().id == id


def test_without_a_patch_the_sentence_says_build(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="No example is active.*base model"):
        ledger.patch()
    ledger.add(fact(1))
    with pytest.raises(LedgerError, match="No patch has passed yet. Run 'errata build'"):
        ledger.patch()


def test_a_patch_needs_its_own_verdict_and_the_base_of_the_ledger(ledger: Ledger) -> None:
    patch, other = patch_of(fact(1)), patch_of(fact(2))
    with pytest.raises(InvalidPatch, match=f"about patch {other.id}"):
        ledger.put_patch(patch, judged(other))
    foreign = Patch(method="finetune", config={}, parent="b2:" + "1" * 32, examples=(fact(1),), ops=())
    with pytest.raises(WrongBase, match=foreign.parent):
        ledger.put_patch(foreign, judged(foreign))
    with pytest.raises(WrongBase, match="State"):
        ledger.put_state(replace(state_of(), host=foreign.parent))
    assert ledger.patches() == ()


def test_a_state_comes_back_bit_for_bit(ledger: Ledger) -> None:
    shared = torch.randn(6)
    state = replace(state_of(), tensors={**state_of().tensors, "whole": shared, "part": shared[::2], "empty": torch.empty(0, 4)})
    assert ledger.put_state(state) == ledger.put_state(state) == state.id
    back = ledger.state(state.id)
    assert (back.id, back.method, back.host, back.trained_on) == (state.id, state.method, state.host, state.trained_on)
    assert all(torch.equal(back.tensors[name], t) and back.tensors[name].dtype == t.dtype for name, t in state.tensors.items())


# ----------------------------------------------------------------------------------------------------------------------------- damage


def ruin(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": raw[:-1], "empty": b"", "grown": raw + b"\0", "flipped": raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]}[how]
        )


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "grown", "flipped"])
def test_a_damaged_file_is_found_and_refused_and_mended_by_putting_it_again(ledger: Ledger, how: str) -> None:
    ledger.add(fact(1))
    id = put(ledger, fact(1))
    ruin(blobs(ledger)[0], how)
    (problem,) = ledger.verify()
    assert (problem.kind, problem.where, problem.harmless) == ("patch", id, False)
    for ask in (None, id):
        with pytest.raises(LedgerError) as refusal:
            ledger.patch(ask)
        assert str(refusal.value) == problem.sentence
    put(ledger, fact(1))
    assert ledger.verify() == []
    assert ledger.patch().id == id


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_state_is_found_and_refused(ledger: Ledger, how: str) -> None:
    id = ledger.put_state(state_of())
    ruin(blobs(ledger)[0], how)
    assert kinds(ledger) == ["state"]
    with pytest.raises(LedgerError, match=f"state {id}"):
        ledger.state(id)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_no_flipped_bit_of_a_patch_goes_unnoticed(ledger: Ledger, place: float, bit: int) -> None:
    id = put(ledger, fact(1))
    (path,) = blobs(ledger)
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw))] ^= 1 << bit
    path.write_bytes(raw)
    assert kinds(ledger) == ["patch"]
    with pytest.raises((LedgerError, InvalidPatch)):
        ledger.patch(id)


ALTERATIONS = {
    "example": "UPDATE example SET content = replace(content, 'City', 'Town')",
    "example that is none": "UPDATE example SET content = '[]'",
    "example elsewhere": "UPDATE example SET prompt = 'another'",
    "patch of other examples": "UPDATE patch SET examples = 'b2:1'",
    "patch of another method": "UPDATE patch SET method = 'memit'",
    "patch with the file of another": "UPDATE patch SET blob = (SELECT max(blob) FROM patch)",
    "verdict": "UPDATE verdict SET content = replace(content, '0.2', '0.0')",
    "verdict of another": "UPDATE verdict SET (id, content) = (SELECT id, content FROM verdict ORDER BY number DESC LIMIT 1)",
    "verdict that is none": "UPDATE verdict SET content = '[]'",
    "state with the file of a patch": "UPDATE state SET blob = (SELECT max(blob) FROM patch)",
    "state with the file of another": "UPDATE state SET blob = (SELECT max(blob) FROM state)",
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_an_altered_row_is_found_and_refused(ledger: Ledger, what: str) -> None:
    ledger.add(fact(1))
    ids = [put(ledger, fact(1), value=value, passed=False) for value in (1.0, 2.0)]
    states = [ledger.put_state(state_of(value)) for value in (1.0, 2.0)]
    tamper(ledger, ALTERATIONS[what])
    kind = what.split()[0]
    assert set(kinds(ledger)) - {"stray"} == {kind}
    readers: dict[str, Callable[[], object]] = {
        "example": lambda: [pytest.raises(LedgerError, ledger.examples), ledger.active()],
        "patch": lambda: [ledger.patch(id) for id in ids],
        "verdict": lambda: [ledger.verdict(id) for id in ids],
        "state": lambda: [ledger.state(id) for id in states],
    }
    with pytest.raises(LedgerError):
        readers[kind]()


def test_an_altered_example_is_mended_as_the_sentence_says(ledger: Ledger) -> None:
    ledger.add(fact(1))
    tamper(ledger, ALTERATIONS["example"])
    ledger.retract(fact(1).id)
    ledger.add(fact(1))
    assert ledger.verify() == []
    assert ledger.active() == (fact(1),)


def test_a_row_that_refers_to_nothing_is_found(ledger: Ledger) -> None:
    tamper(ledger, "INSERT INTO active (id) VALUES ('b2:1')")
    assert kinds(ledger) == ["database"]


def test_an_index_that_does_not_meet_its_table_is_found(ledger: Ledger) -> None:
    ledger.add(fact(1))
    ledger.close()
    raw, prompt = (ledger.path / FILE).read_bytes(), fact(1).prompt.encode()
    _, index = [found.start() for found in re.finditer(b'(?<!:")' + prompt, raw)]  # and once more in the content, behind :"
    (ledger.path / FILE).write_bytes(raw[:index] + prompt.upper() + raw[index + len(prompt) :])
    with Ledger(ledger.path) as again:
        assert set(kinds(again)) == {"database"}


def test_verify_looks_at_every_record(ledger: Ledger) -> None:
    for value in (1.0, 2.0, 3.0):
        put(ledger, fact(1), value=value)
        ledger.put_state(state_of(value))
    for path in blobs(ledger):
        path.unlink()
    assert kinds(ledger) == ["patch"] * 3 + ["state"] * 3


def test_strays_are_harmless_and_collected_and_nothing_else_is_touched(ledger: Ledger) -> None:
    ledger.add(fact(1))
    put(ledger, fact(1))
    ledger.put_state(state_of())
    kept, folder = blobs(ledger), blobs(ledger)[0].parent
    (note := folder / "README.txt").write_text("mine")
    strays = [folder / ".tmp-1234", folder / f"{'f' * 64}.safetensors"]
    for path in strays:
        path.write_bytes(b"half")
    shutil.copy(kept[0], twin := folder.parent / "zz")  # in the place of a shard, and not a shard
    problems = ledger.verify()
    assert [(p.kind, p.where) for p in problems] == [("stray", str(path)) for path in sorted(strays)]
    assert all(p.harmless for p in problems)
    assert ledger.collect() == sorted(strays)
    assert blobs(ledger) == sorted([*kept, note, twin])
    assert ledger.verify() == []
    assert ledger.collect() == []


@pytest.fixture
def settled(ledger: Ledger) -> tuple[Path, bytes, set[Example], Verdict]:
    """A closed ledger: its folder, the bytes of its database, and what a reader must see or be refused."""
    ledger.add(*[fact(i) for i in range(3)])
    verdict = ledger.verdict(put(ledger, fact(1)))
    ledger.close()
    return ledger.path, (ledger.path / FILE).read_bytes(), {fact(i) for i in range(3)}, verdict


@settings(max_examples=200)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 255))
def test_a_damaged_database_is_a_sentence(settled: tuple[Path, bytes, set[Example], Verdict], place: float, value: int) -> None:
    folder, raw, active, verdict = settled
    for name in (f"{FILE}-wal", f"{FILE}-shm"):
        (folder / name).unlink(missing_ok=True)
    at = int(place * len(raw))
    (folder / FILE).write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
    try:
        with Ledger(folder) as again:
            if not again.verify():
                assert set(again.active()) == active
                assert [row.verdict for row in again.patches()] == [verdict]
    except LedgerError as refusal:
        assert str(folder) in str(refusal)


# ------------------------------------------------------------------------------------------------------------------------- hard times


def expect_refusal_and_wholeness(ledger: Ledger, write: Callable[[], object], sentence: str) -> None:
    before = seen(ledger)
    with pytest.raises(LedgerError, match=sentence):
        write()
    assert seen(ledger) == before
    assert all(problem.harmless for problem in ledger.verify())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_a_file_leaves_everything_whole(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ledger.add(fact(1))
    put(ledger, fact(1))
    with monkeypatch.context() as hard_times:
        hard_times.setattr(os, call, full)
        expect_refusal_and_wholeness(ledger, lambda: put(ledger, fact(1), value=2.0), "No space left on device")
        expect_refusal_and_wholeness(ledger, lambda: ledger.put_state(state_of()), "No space left on device")
    put(ledger, fact(1), value=2.0)
    assert ledger.verify() == []


def test_a_database_that_cannot_grow_leaves_everything_whole(ledger: Ledger) -> None:
    ledger.add(fact(1))
    put(ledger, fact(1))
    ledger._db.execute("PRAGMA max_page_count = 1")  # at most what it has
    many = [fact(i) for i in range(2, 500)]
    expect_refusal_and_wholeness(ledger, lambda: ledger.add(*many), "the disk is full. Nothing was changed")
    expect_refusal_and_wholeness(ledger, lambda: put(ledger, *many), "the disk is full. Nothing was changed")
    assert len(ledger.collect()) == 1  # the blob was written before the database refused its row
    ledger._db.execute("PRAGMA max_page_count = 4294967294")
    ledger.add(*many)
    assert ledger.verify() == []


def test_a_body_that_raises_between_blob_and_commit_leaves_a_stray_at_most(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = seen(ledger)
    with monkeypatch.context() as hard_times:
        hard_times.setattr(room, "_log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put(ledger, fact(1))
    assert seen(ledger) == before
    assert kinds(ledger) == ["stray"]


def test_a_sync_that_failed_promises_nothing(ledger: Ledger) -> None:
    """SQLite reports the error, and may find the commit whole when the ledger is opened again; found with strace."""
    failed = sqlite3.OperationalError("disk I/O error")
    failed.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    with pytest.raises(LedgerError, match="whole or not at all"), room._spoken(ledger.path):
        raise failed


def test_a_blob_that_waits_for_its_row_is_not_collected(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_while_another_collects(path: Path, raw: bytes) -> None:
        write_whole(path, raw)
        with Ledger(ledger.path) as other:
            other._db.execute("PRAGMA busy_timeout = 0")
            with pytest.raises(LedgerError, match="another process"):
                other.collect()

    monkeypatch.setattr(room, "write_whole", write_while_another_collects)
    put(ledger, fact(1))
    ledger.put_state(state_of())
    assert ledger.verify() == []


HOLDER = (
    "import sqlite3, sys, time; db = sqlite3.connect(sys.argv[1]); db.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(60)"
)


def test_another_process_that_is_writing_gets_a_sentence(ledger: Ledger) -> None:
    ledger.add(fact(1))
    ledger._db.execute("PRAGMA busy_timeout = 50")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(ledger.path / FILE)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        busy = "is being written by another process. Try again when it has finished"
        expect_refusal_and_wholeness(ledger, lambda: ledger.add(fact(2)), busy)
        expect_refusal_and_wholeness(ledger, lambda: put(ledger, fact(1)), busy)
        expect_refusal_and_wholeness(ledger, ledger.collect, busy)
        with Ledger(ledger.path) as reader:  # reading needs no turn
            assert reader.active() == (fact(1),)
        holder.kill()
    ledger.add(fact(2))
    assert ledger.active() == (fact(1), fact(2))


FILLER = """
import itertools, os, sys
sys.path.insert(0, sys.argv[2])
from test_ledger import *
with Ledger.create(sys.argv[1] + "/ledger", BASE, "lab/neox", BUDGET) as ledger:
    try:
        for number in itertools.count():
            before = seen(ledger)
            ledger.add(fact(number))
            before = seen(ledger)
            put(ledger, *ledger.active())
    except LedgerError as e:
        print(number, e)
    assert seen(ledger) == before
    assert all(problem.harmless for problem in ledger.verify())
with Ledger(ledger.path) as ledger:
    assert seen(ledger) == before
    ledger.collect()
    assert ledger.verify() == []
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=512k none "$1" && shift && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, str(tmp_path), "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    command = [*mount, str(tmp_path), sys.executable, "-c", FILLER, str(tmp_path), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    number, sentence = run.stdout.split(" ", 1)
    assert int(number) > 1
    assert "full" in sentence or "No space left" in sentence


# ---------------------------------------------------------------------------------------------------- the writer that is killed: child


Ack = Callable[[str], None]


def act(ledger: Ledger, draw: random.Random) -> None:
    """One random edit; the same `draw` on an equal ledger makes the same edit."""
    active = ledger.active()
    match draw.choice(["add", "patch", "patch", "retract", "state", "supersede"]) if active else "add":
        case "add":
            ledger.add(*(fact(draw.getrandbits(40)) for _ in range(draw.randint(1, 3))))
        case "retract":
            ledger.retract(draw.choice(active).id)
        case "supersede":
            ledger.supersede(draw.choice(active).id, fact(draw.getrandbits(40)))
        case "patch":
            put(ledger, *active, value=draw.random(), passed=draw.random() < 0.7)
        case "state":
            ledger.put_state(state_of(draw.random()))


def write_until_killed(ack: Ack, path: str, seed: int) -> None:
    draw = random.Random(seed)
    with Ledger(path) as ledger:
        ack("open")
        while True:
            act(ledger, draw)
            ack("done")


OPERATIONS: dict[str, Callable[[str], object]] = {
    "create": lambda path: Ledger.create(path, BASE, "lab/neox", BUDGET),
    "add": lambda path: Ledger(path).add(fact(7), fact(8)),
    "supersede": lambda path: Ledger(path).supersede(fact(1).id, fact(9)),
    "retract": lambda path: Ledger(path).retract(fact(1).id),
    "put_patch": lambda path: put(Ledger(path), fact(1), fact(2), value=9.0),
    "put_state": lambda path: Ledger(path).put_state(state_of(9.0)),
}


def write_and_die(ack: Ack, path: str, operation: str, step: int) -> None:
    """Do one operation and, at the `step`-th visit to the disk, be killed: before or after each file call, at each SQL statement."""
    visits = itertools.count(1)

    def visit(*_: object) -> None:
        if next(visits) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def visited(*args: Any, **named: Any) -> Any:
            visit()
            result = call(*args, **named)
            visit()
            return result

        return visited

    def traced(*args: Any, **named: Any) -> sqlite3.Connection:
        db = connect(*args, **named)
        db.set_trace_callback(visit)
        return db

    connect, sqlite3.connect = sqlite3.connect, traced
    os.fsync, os.replace = around(os.fsync), around(os.replace)
    OPERATIONS[operation](path)
    visit()
    ack("done")


def write_when_continued(ack: Ack, path: str, operation: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    OPERATIONS[operation](path)
    ack("done")


def write_twenty(ack: Ack, path: str, start: int) -> None:
    with Ledger(path) as ledger:
        for number in range(start, start + 20):
            put(ledger, fact(number))
            ack(ledger.add(fact(number))[0])
            ledger.collect()  # must not take the other's fresh blob for a stray


def write_as_nobody(ack: Ack, path: str) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)  # root may write whatever the permissions say
    try:
        with Ledger(path) as ledger:
            ledger.add(fact(9))
    except EditError as e:
        ack(f"{type(e).__name__}: {e}")


# --------------------------------------------------------------------------------------------------- the writer that is killed: server


def start(job: Callable[..., None], *args: object) -> tuple[int, Any]:
    """Fork a child that does the job. Returns its pid and the open pipe of what it acknowledges."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return pid, os.fdopen(reading)
    try:
        job(lambda line: os.write(writing, f"{line}\n".encode()), *args)
        os._exit(0)
    except BaseException as e:
        os.write(writing, f"{e!r}\n".encode())
        os._exit(1)


def finish(pid: int, pipe: Any) -> dict[str, Any]:
    """Wait for the child. `code` is its exit code, or minus the signal that killed it."""
    with pipe:
        said = pipe.read().splitlines()
    return {"said": said, "code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def kill_after(edits: int, seconds: float, path: str, seed: int) -> dict[str, Any]:
    pid, pipe = start(write_until_killed, path, seed)
    first = [pipe.readline().strip() for _ in range(1 + edits)]
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    answer = finish(pid, pipe)
    return answer | {"said": first + answer["said"]}


def fail_at(call: str, fault: str, step: int, path: str, operation: str) -> dict[str, Any]:
    """Let the `step`-th system call named `call` fail, or kill, by the hand of strace: also those that SQLite makes."""
    pid, pipe = start(write_when_continued, path, operation)
    os.waitpid(pid, os.WUNTRACED)
    log = Path(f"{path}.strace")
    tracing = ["strace", "-qq", "-o", str(log), "-p", str(pid), "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={step}"]
    with subprocess.Popen(tracing) as tracer:
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text() and tracer.poll() is None:
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        answer = finish(pid, pipe)
    return answer | {"hit": any(word in log.read_text() for word in ("INJECTED", "SIGKILL"))}


def race(path: str) -> list[dict[str, Any]]:
    return [finish(*child) for child in [start(write_twenty, path, first) for first in (0, 100)]]


TASKS: dict[str, Callable[..., Any]] = {
    "kill_after": kill_after,
    "die_at": lambda *args: finish(*start(write_and_die, *args)),
    "fail_at": fail_at,
    "race": race,
    "nobody": lambda path: finish(*start(write_as_nobody, path)),
}


def serve() -> None:
    """One JSON line in, one out. A fork for each task, so that torch (1.5 seconds) is imported once."""
    assert "transformers" not in sys.modules
    to_bytes(patch_of(fact(1)))  # torch and NumPy open files of their own at first use, and torch dies if it cannot
    for line in sys.stdin:
        task, *args = json.loads(line)
        print(json.dumps(TASKS[task](*args)), flush=True)


@pytest.fixture(scope="module")
def writer() -> Iterator[Callable[..., Any]]:
    """`writer(task, *args)` does a task in a child of another process, and tells how that went."""
    single = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork takes only the thread that forks
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=single) as server:
        assert server.stdin is not None and server.stdout is not None

        def ask(*task: object) -> Any:
            assert server.stdin is not None and server.stdout is not None
            print(json.dumps(task), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()


# --------------------------------------------------------------------------------------------------- the writer that is killed: checks


def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path, writer: Callable[..., Any]) -> None:
    """100 rounds. `twin` repeats in peace what the killed writer acknowledged; the two may differ by the one edit that was under way."""
    draw = random.Random(0)
    for batch in range(10):
        path = tmp_path / str(batch)
        Ledger.create(path, BASE, "lab/neox", BUDGET).close()
        with Ledger.create(tmp_path / f"{batch}-twin", BASE, "lab/neox", BUDGET) as twin:
            for seed in range(batch * 10, batch * 10 + 10):
                answer = writer("kill_after", draw.randint(0, 3), draw.uniform(0, 0.01), str(path), seed)
                assert answer["code"] == -signal.SIGKILL and answer["said"][0] == "open" and set(answer["said"][1:]) <= {"done"}, answer
                same = random.Random(seed)
                for _ in answer["said"][1:]:
                    act(twin, same)
                with Ledger(path) as ledger:
                    if seen(ledger) != seen(twin):
                        act(twin, same)
                    assert seen(ledger) == seen(twin), f"round {seed}"
                    assert all(problem.harmless for problem in ledger.verify()), f"round {seed}"
        with Ledger(path) as ledger:
            ledger.collect()
            assert ledger.verify() == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_each_step_an_edit_is_whole_or_absent(tmp_path: Path, writer: Callable[..., Any], operation: str) -> None:
    base = tmp_path / "base"
    if operation != "create":
        with Ledger.create(base, BASE, "lab/neox", BUDGET) as made:
            made.add(fact(1), fact(2))
            put(made, fact(1), fact(2))
            before = seen(made)
        shutil.copytree(base, tmp_path / "after")
    OPERATIONS[operation](str(tmp_path / "after"))
    with Ledger(tmp_path / "after") as made:
        after = seen(made)
    for step in itertools.count(1):
        path = tmp_path / str(step)
        if operation != "create":
            shutil.copytree(base, path)
        answer = writer("die_at", str(path), operation, step)
        if operation == "create" and not answer["said"]:
            try:
                Ledger(path).close()
            except LedgerError:
                Ledger.create(path, BASE, "lab/neox", BUDGET).close()
        with Ledger(path) as ledger:
            assert all(problem.harmless for problem in ledger.verify())
            if answer["code"] == 0:
                assert answer["said"] == ["done"] and seen(ledger) == after
                break
            assert (answer["said"], answer["code"]) == ([], -signal.SIGKILL)
            assert seen(ledger) == after if operation == "create" else seen(ledger) in (before, after)
    assert step > 8


def can_trace() -> bool:
    return shutil.which("strace") is not None and subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="needs strace and the right to trace")
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC"])
@pytest.mark.parametrize("call", ["openat", "mkdir", "fsync", "rename", "pwrite64", "fdatasync", "ftruncate"])
def test_every_system_call_may_fail(tmp_path: Path, writer: Callable[..., Any], call: str, fault: str) -> None:
    with Ledger.create(tmp_path / "base", BASE, "lab/neox", BUDGET) as made:
        made.add(fact(1), fact(2))
        before = seen(made)
        shutil.copytree(tmp_path / "base", tmp_path / "after")
    OPERATIONS["put_patch"](str(tmp_path / "after"))
    with Ledger(tmp_path / "after") as made:
        after = seen(made)
    for step in itertools.count(1):
        shutil.copytree(tmp_path / "base", path := tmp_path / str(step))
        answer = writer("fail_at", call, fault, step, str(path), "put_patch")
        with Ledger(path) as ledger:
            assert all(problem.harmless for problem in ledger.verify())
            assert seen(ledger) in ([after] if answer["said"] == ["done"] else [before, after])
        assert answer["code"] == -signal.SIGKILL or str(answer["said"]).startswith(("['done", '["LedgerError(')), answer
        if not answer["hit"]:
            break
    assert step > 1


def test_two_processes_write_in_turn(tmp_path: Path, writer: Callable[..., Any]) -> None:
    with Ledger.create(tmp_path, BASE, "lab/neox", BUDGET) as ledger:
        answers = writer("race", str(tmp_path))
        assert [(answer["code"], len(answer["said"])) for answer in answers] == [(0, 20), (0, 20)], answers
        assert {e.id for e in ledger.active()} == {id for answer in answers for id in answer["said"]}
        assert len(ledger.patches()) == 40
        assert ledger.verify() == []


def test_a_folder_that_may_not_be_written_is_a_sentence(writer: Callable[..., Any]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:  # not tmp_path, whose parents only its owner may enter
        with Ledger.create(folder, BASE, "lab/neox", BUDGET) as ledger:
            ledger.add(fact(1))
        (Path(folder) / FILE).chmod(0o444)
        Path(folder).chmod(0o555)
        answer = writer("nobody", folder)
        Path(folder).chmod(0o755)
        (sentence,) = answer["said"]
        assert sentence.startswith(f"LedgerError: The ledger {folder} cannot be")
        assert "permissions" in sentence or "may write" in sentence
        (Path(folder) / FILE).chmod(0o644)
        with Ledger(folder) as ledger:
            assert ledger.active() == (fact(1),)
            assert ledger.verify() == []


def test_ids_are_those_of_the_content(ledger: Ledger) -> None:
    ledger.add(fact(1))
    put(ledger, fact(1))
    ((id, content),) = ledger.rows("SELECT id, content FROM verdict")
    assert id == digest("verdict", content)
    assert [path.stem for path in blobs(ledger)] == [row[0] for row in ledger.rows("SELECT blob FROM patch")]


if __name__ == "__main__":
    serve()


# ------------------------------------------------------------------------------------------------------------- what is being prepared


def test_the_newest_state_of_a_method_is_found(ledger: Ledger) -> None:
    assert ledger.latest_state("memit") is None
    first, second, other = state_of(1.0), state_of(2.0), replace(state_of(3.0), method="malmen")
    for state in (first, second, other):
        ledger.put_state(state)
    assert ledger.latest_state("memit").id == second.id and ledger.latest_state("malmen").id == other.id
    ledger.put_state(first)  # what was put last is the newest, also if it was there before
    assert ledger.latest_state("memit").id == first.id


def test_what_is_half_prepared_is_kept_beside_the_records(ledger: Ledger) -> None:
    assert ledger.aside("memit") is None
    for value in (1.0, 2.0):
        ledger.put_aside(state_of(value))
    with Ledger(ledger.path) as again:
        assert again.aside("memit").id == state_of(2.0).id and again.aside("malmen") is None
        assert again.verify() == [] and again.latest_state("memit") is None and again.collect() == []
    ledger.drop_aside("memit")
    ledger.drop_aside("memit")
    assert ledger.aside("memit") is None
    with pytest.raises(WrongBase):
        ledger.put_aside(replace(state_of(), host="b2:" + "f" * 32))


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-1], lambda raw: raw[:20], lambda raw: b"", lambda raw: raw[:-9] + b"x" + raw[-8:]])
def test_what_is_half_prepared_and_was_cut_short_is_refused_in_one_sentence(ledger: Ledger, spoil: Any) -> None:
    ledger.put_aside(state_of())
    path = ledger.path / "aside" / "memit.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(LedgerError, match="cut short or altered.*Begin afresh"):
        ledger.aside("memit")
