"""Compaction: whole or not at all, what fails stays, and back again. The method is `lu`, which is exact and takes no time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TEXT, tiny_host

from errata import apply, compact, hosts
from errata.hosts import Host
from errata.ledger import Ledger
from errata.memory.records import Records
from errata.methods import make
from errata.types import Budget, BudgetError, Example, InvalidExample, LedgerError, Record

FIRST = Record(example=Example(prompt="The capital of Mauritius is", target=" Rome", subject="Mauritius"))
SECOND = Record(example=Example(prompt="Lily loved to play", target=" late"))
ALIASED = Record(example=Example(prompt="The capital of France is", target=" Rome", subject="France"), aliases=("Gaul",))
TAGGED = Record(example=Example(prompt="Once upon a time", target=" Rome"), tags=("tales",))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "reference.txt"
    path.write_text("\n\n".join(f"{t[:30]} ({i})|{' Rome' if i % 2 else ' big'}" for i in range(4) for t in TEXT))
    return path


@pytest.fixture
def host() -> Host:
    return tiny_host("t5")


@pytest.fixture
def ledger(host: Host, tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger", host.id, "tiny", Budget(epsilon=0.5)) as made:
        yield made


def state_of(ledger: Ledger) -> tuple[set[str], set[str], int]:
    return {r.id for r in Records(ledger).active()}, {e.id for e in ledger.active()}, len(ledger.patches())


def test_settled_records_move_and_the_others_stay_with_the_reason(ledger: Ledger, host: Host, reference: Path) -> None:
    Records(ledger).add(FIRST, SECOND, ALIASED, TAGGED)
    done = compact.compact(ledger, host, make("lu"), reference=reference)
    assert {r.id for r in done.moved} == {FIRST.id, SECOND.id} and done.verdict.passed
    why = {r.id: told for r, told in done.left}
    assert "all of its questions" in why[ALIASED.id] and "some queries" in why[TAGGED.id]
    assert {r.id for r in Records(ledger).active()} == {ALIASED.id, TAGGED.id}
    assert ledger.patch().id == done.patch.id and not ledger.verify()
    with apply.applied(host, ledger.patch()):
        assert all(hosts.fixes(host, [FIRST.example, SECOND.example]))
    (row,) = Records(ledger).listed(FIRST.id)
    assert row.ended is not None and row.ended.detail == done.patch.id


def test_it_is_undone_whole(ledger: Ledger, host: Host, reference: Path) -> None:
    ledger.add(SECOND.example)  # was an example before, and stays one
    Records(ledger).add(FIRST, SECOND)
    before = state_of(ledger)[:2]
    first = compact.compact(ledger, host, make("lu"), reference=reference)
    Records(ledger).add(ALIASED)
    Records(ledger).ledger.add(Example(prompt="Paris lies on the", target=" sea"))
    patch, back = compact.undo(ledger)
    assert patch == first.patch.id and set(back) == {FIRST.id, SECOND.id}
    records, active, _ = state_of(ledger)
    assert records - {ALIASED.id} == before[0] and SECOND.example.id in active and FIRST.example.id not in active
    with pytest.raises(LedgerError, match="Nothing was compacted"):
        compact.undo(ledger)


@pytest.mark.parametrize("step", ["keep_patch", "activate", "settle"])
def test_a_kill_in_the_middle_of_the_commit_leaves_everything_as_it_was(
    ledger: Ledger, host: Host, reference: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Records(ledger).add(FIRST, SECOND)
    before = state_of(ledger)

    def killed(*_given: object, **_named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Records if step == "settle" else Ledger, step, killed)
        compact.compact(ledger, host, make("lu"), reference=reference)
    assert state_of(ledger) == before and not [p for p in ledger.verify() if not p.harmless]


def test_what_changed_meanwhile_is_not_overwritten(ledger: Ledger, host: Host, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Records(ledger).add(FIRST, SECOND)
    answered = compact._answered

    def retracted(*given: object) -> list[bool]:
        Records(ledger).retract(FIRST.id)
        return answered(*given)

    monkeypatch.setattr(compact, "_answered", retracted)
    with pytest.raises(LedgerError, match="Compact again"):
        compact.compact(ledger, host, make("lu"), reference=reference)
    assert {r.id for r in Records(ledger).active()} == {SECOND.id} and not ledger.active()


def test_what_does_not_fit_the_budget_is_halved(ledger: Ledger, host: Host, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Records(ledger).add(FIRST, SECOND)
    built, told = compact.build.edit, []

    def narrow(host: Host, examples: tuple[Example, ...], *given: object, **how: object) -> object:
        patch, verdict = built(host, examples, *given, **how)
        from dataclasses import replace

        return patch, replace(verdict, upper=1.0 if len(examples) > 1 else verdict.upper)

    monkeypatch.setattr(compact.build, "edit", narrow)
    done = compact.compact(ledger, host, make("lu"), reference=reference, note=told.append)
    assert [r.id for r in done.moved] == [FIRST.id] and "did not fit" in dict((r.id, why) for r, why in done.left)[SECOND.id]
    assert "1 are tried" in told[0]
    monkeypatch.setattr(
        compact.build, "edit", lambda *a, **k: (lambda p, v: (p, __import__("dataclasses").replace(v, upper=1.0)))(*built(*a, **k))
    )
    with pytest.raises(BudgetError, match="refused"):
        compact.compact(ledger, host, make("lu"), reference=reference)


def test_nothing_to_move_and_contradictions_are_sentences(ledger: Ledger, host: Host, reference: Path) -> None:
    with pytest.raises(InvalidExample, match="no settled record"):
        compact.compact(ledger, host, make("lu"), reference=reference)
    Records(ledger).add(FIRST)
    with pytest.raises(InvalidExample, match="came after"):
        compact.compact(ledger, host, make("lu"), reference=reference, before="2000-01-01")
    ledger.add(Example(prompt=FIRST.example.prompt, target=" Paris"))
    with pytest.raises(InvalidExample, match="says otherwise"):
        compact.compact(ledger, host, make("lu"), reference=reference)


def test_nothing_changes_where_no_record_is_answered(ledger: Ledger, host: Host, reference: Path) -> None:
    Records(ledger).add(ALIASED)
    before = state_of(ledger)
    done = compact.compact(ledger, host, make("lu"), reference=reference)
    assert not done.moved and state_of(ledger) == before
