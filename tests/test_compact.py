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

    given = Example(prompt="Paris lies on the", target=" sea")
    changes = [lambda: ledger.retract(given.id), lambda: ledger.add(given), lambda: Records(ledger).retract(FIRST.id)]
    ledger.add(given)
    for change in changes:
        left = [change]

        def changed(*asked: object, left: list = left) -> list[bool]:  # noqa: B006
            while left:
                left.pop()()
            return answered(*asked)

        monkeypatch.setattr(compact, "_answered", changed)
        with pytest.raises(LedgerError, match="Compact again"):
            compact.compact(ledger, host, make("lu"), reference=reference)
    assert {r.id for r in Records(ledger).active()} == {SECOND.id} and ledger.active() == (given,)


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


def test_what_an_earlier_compaction_moved_is_asked_again(
    ledger: Ledger, host: Host, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later patch that no longer answers it: its record is in the memory again, and nobody goes without an answer."""
    Records(ledger).add(FIRST)
    compact.compact(ledger, host, make("lu"), reference=reference)
    Records(ledger).add(SECOND)
    answered = compact._answered
    monkeypatch.setattr(
        compact, "_answered", lambda host, rows: [ok and r.record != FIRST for ok, r in zip(answered(host, rows), rows, strict=True)]
    )
    done = compact.compact(ledger, host, make("lu"), reference=reference)
    assert done.back == (FIRST,) and done.moved == (SECOND,) and Records(ledger).active() == (FIRST,)
    assert {e.id for e in ledger.patch().examples} == {FIRST.example.id, SECOND.example.id}
    newer = Record(example=Example(prompt=SECOND.example.prompt, target=" big"))
    Records(ledger).add(newer, ALIASED)  # what the weights say, and what does not go beside it
    monkeypatch.setattr(compact, "_answered", lambda host, rows: [r.record not in (SECOND, ALIASED) for r in rows])
    done = compact.compact(ledger, host, make("lu"), reference=reference)
    assert done.moved == (FIRST,) and set(Records(ledger).active()) == {newer, ALIASED}
    compact.undo(ledger)
    for r in (newer, ALIASED):
        Records(ledger).retract(r.id)
    monkeypatch.undo()
    again = compact.compact(ledger, host, make("lu"), reference=reference)
    assert again.moved == (FIRST,) and not again.back and not Records(ledger).active()


def test_what_was_active_already_must_stay_fixed(ledger: Ledger, host: Host, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Example(prompt="Paris lies on the", target=" sea")
    ledger.add(given)
    Records(ledger).add(FIRST, SECOND)
    before = state_of(ledger)
    fixes = hosts.fixes
    monkeypatch.setattr(
        hosts, "fixes", lambda host, examples: [ok and e != given for ok, e in zip(fixes(host, examples), examples, strict=True)]
    )
    with pytest.raises(BudgetError, match="it fixes 0"):
        compact.compact(ledger, host, make("lu"), reference=reference)
    assert state_of(ledger) == before


def test_a_record_that_stayed_takes_its_example_along(ledger: Ledger, host: Host, reference: Path) -> None:
    """What failed is in the patch too; whoever retracts its record does not go on hearing it, and what superseded it can be compacted."""
    records = Records(ledger)
    records.add(FIRST, ALIASED)
    compact.compact(ledger, host, make("lu"), reference=reference)
    assert ALIASED.example.id in state_of(ledger)[1]
    records.retract(ALIASED.id)
    assert state_of(ledger)[1] == {FIRST.example.id}
    with pytest.raises(LedgerError):
        ledger.patch()  # until there is a patch without it
    records.add(ALIASED, SECOND)
    compact.compact(ledger, host, make("lu"), reference=reference)
    newer = Record(example=Example(prompt="The capital of France is", target=" Paris", subject="France"))
    records.supersede(ALIASED.id, newer)
    done = compact.compact(ledger, host, make("lu"), reference=reference)
    assert done.moved == (newer,) and state_of(ledger)[1] == {FIRST.example.id, SECOND.example.id, newer.example.id}


def test_what_cannot_be_built_stays_and_the_others_move(ledger: Ledger) -> None:
    long = Record(example=Example(prompt="The capital of Peru " * 50 + "is", target=" Rome"))
    spaced = Record(example=Example(prompt=SECOND.example.prompt, target="late"))
    Records(ledger).add(FIRST, long, spaced)
    fit, left = compact._beside(tiny_host("gpt2"), [SECOND.example], Records(ledger).listed())
    why = {r.id: told for r, told in left}
    assert [row.record for row in fit] == [FIRST] and "tokens long" in why[long.id] and "says otherwise" in why[spaced.id]
