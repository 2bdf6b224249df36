"""Compaction: records of the edit memory -> weights, under the ledger's budget; and back, whole.

    choose    the settled records: those that hold for every query, at any time, and that came before a given moment
    build     one patch of the active examples and theirs, inside the budget (`build.py`); where the gate refuses, half of them are tried
    judge     each record is asked for, in all of its questions, by free generation under the new patch
    commit    one transaction: the patch and its verdict, the examples active, and the records that are answered right out of force

Before the commit nothing has changed, after it everything has, so whoever asks meanwhile, or after a kill, gets each answer once: from the
memory or from the weights. What failed stays in memory, which speaks first. `undo` brings all of it back in one transaction. This is how a
log-structured store moves what is settled to where it costs nothing to look up (O'Neil et al. 1996).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, final

from errata import apply, build, gate, hosts
from errata.hosts import Host
from errata.ledger import Ledger
from errata.memory.records import RecordRow, Records
from errata.types import Budget, ConflictError, Example, InvalidExample, LedgerError, Patch, Record, Verdict, utc

INTO = "compacted into "  # in the log, of an example that became active so


@final
@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What a compaction did: `moved` are records that the patch answers now, `left` those that stay in memory, each with the reason."""

    patch: Patch
    verdict: Verdict
    moved: tuple[Record, ...]
    left: tuple[tuple[Record, str], ...]


def settled(rows: Sequence[RecordRow], before: str | datetime | None = None) -> tuple[list[RecordRow], list[tuple[Record, str]]]:
    """(records that can be compiled, the others with the reason). `before`: those that came earlier."""
    moment = None if before is None else utc(before)
    fit, left = [], []
    for row in rows:
        r = row.record
        if r.tags or r.since or r.until:
            left.append((r, "it holds only for some queries, or at some times, and weights answer everybody"))
        elif moment is not None and utc(row.begun.at) >= moment:
            left.append((r, f"it came after {moment}"))
        else:
            fit.append(row)
    return fit, left


def compact(
    ledger: Ledger,
    host: Host,
    method: Any,
    *,
    budget: Budget | None = None,
    before: str | datetime | None = None,
    note: Callable[[str], None] = lambda sentence: None,
    **how: Any,
) -> Compacted:
    """Move settled records into weights; `how` goes to `build.edit`. The host is left as it was, and the ledger if nothing could be moved.

    Raises InvalidExample if there is nothing to move, BudgetError with the numbers if not even one record fits, LedgerError if the memory
    changed meanwhile.
    """
    records, budget = Records(ledger), replace(budget or ledger.budget, fixed=0.0)
    rows, left = settled([row for row in records.listed() if row.active], before)
    rows, clashing = _beside(ledger.active(), rows)
    left += clashing
    if not rows:
        raise InvalidExample("There is no settled record to move into weights." + (f" Of {len(left)}, {left[0][1]}." if left else ""))
    while True:
        examples = tuple(dict.fromkeys([*ledger.active(), *(row.record.example for row in rows)]))
        patch, verdict = build.edit(host, examples, method, budget=budget, **how)
        if verdict.passed:
            break
        if len(rows) == 1:
            gate.require(verdict)
        note(f"{len(rows)} records do not fit the budget ({'; '.join(verdict.failures)}); {len(rows) // 2} are tried.")
        left += [(row.record, "it did not fit the budget") for row in rows[len(rows) // 2 :]]
        rows = rows[: len(rows) // 2]
    with apply.applied(host, patch):
        right = _answered(host, rows)
    moved = tuple(row.record for row, ok in zip(rows, right, strict=True) if ok)
    left += [(row.record, "the patch does not answer all of its questions") for row, ok in zip(rows, right, strict=True) if not ok]
    if moved:
        _commit(ledger, records, patch, verdict, rows, moved)
    return Compacted(patch=patch, verdict=verdict, moved=moved, left=tuple(left))


def undo(ledger: Ledger) -> tuple[str, tuple[str, ...]]:
    """Take back the last compaction that is not taken back: its records are in force again, its examples no longer active.

    Returns the id of its patch and those of the records. Raises LedgerError if there is none, ConflictError.
    """
    records, active = Records(ledger), {e.id for e in ledger.active()}
    own: dict[str, list[str]] = {}
    for event in ledger.history():
        if event.what == "compact":
            own[event.id] = []
        elif event.what == "compact undo":
            own.pop(event.id, None)
        elif event.what == "add" and event.detail.removeprefix(INTO) in own:
            own[event.detail.removeprefix(INTO)].append(event.id)
    if not own:
        raise LedgerError(f"Nothing was compacted in {ledger.path} that is not undone already.")
    patch = list(own)[-1]
    with ledger.writing():
        for id in own[patch]:
            if id in active:
                ledger.deactivate(id, f"the compaction into {patch} was undone")
        back = records.unsettle(patch)
        ledger.log("compact undo", patch, f"{len(back)} records")
    return patch, back


def _beside(active: Sequence[Example], rows: Sequence[RecordRow]) -> tuple[list[RecordRow], list[tuple[Record, str]]]:
    """The rows whose examples can be compiled beside the active ones and each other, and the others with the reason."""
    said = {" ".join(e.prompt.split()): e for e in active}
    fit, left = [], []
    for row in rows:
        e = row.record.example
        other = said.setdefault(" ".join(e.prompt.split()), e)
        if other.target.split() != e.target.split():
            left.append((row.record, f"an example says otherwise: {other} ({other.id})"))
        else:
            fit.append(row)
    return fit, left


def _answered(host: Host, rows: Sequence[RecordRow]) -> list[bool]:
    """Whether every question of each record is answered right."""
    asked = [replace(row.record.example, prompt=q, subject=None) for row in rows for q in row.record.questions]
    right = iter(hosts.fixes(host, asked))
    return [all([next(right) for _ in row.record.questions]) for row in rows]


def _commit(ledger: Ledger, records: Records, patch: Patch, verdict: Verdict, rows: Sequence[RecordRow], moved: Sequence[Record]) -> None:
    with ledger.writing():
        still = {row.number for row in records.listed() if row.active}
        if gone := [row for row in rows if row.number not in still]:
            raise LedgerError(
                f"The memory changed while its records were compacted: {gone[0].record.example} is no longer in force. Compact again."
            )
        if set(e.id for e in ledger.active()) - {e.id for e in patch.examples}:
            raise LedgerError("Examples were added while records were compacted. Compact again.")
        ledger.keep_patch(patch, verdict)
        ledger.log("compact", patch.id, f"{len(moved)} of {len(rows)} records")
        for example in patch.examples:
            try:
                ledger.activate(example, f"{INTO}{patch.id}")
            except ConflictError as e:
                raise LedgerError(f"The examples changed while records were compacted. {e}") from e
        records.settle([r.id for r in moved], patch.id)
