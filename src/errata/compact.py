"""Compaction: records of the edit memory -> weights, under the ledger's budget; and back, whole.

    choose    the settled records: those that hold for every query, at any time, and that came before a given moment
    build     one patch of the active examples and theirs, inside the budget (`build.py`); where the gate refuses, half of them are tried
    judge     each record is asked for, in all of its questions, by free generation under the new patch; so are those that went before
    commit    one transaction: the patch and its verdict, the examples active, the records that are answered right out of force, and those
              of an earlier compaction that no longer are in force again

Before the commit nothing has changed, after it everything has, so whoever asks meanwhile, or after a kill, gets each answer once: from the
memory or from the weights. What failed stays in memory, which speaks first; its example is in the patch too, and goes when its record is
retracted (`Records.retract`). `undo` brings all of it back in one transaction. This is how a
log-structured store moves what is settled to where it costs nothing to look up (O'Neil et al. 1996).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, final

from errata import apply, build, gate, hosts
from errata.hosts import Host
from errata.ledger import Ledger, contradict, plain
from errata.memory.records import INTO, RecordRow, Records
from errata.types import Budget, BudgetError, Example, InvalidExample, LedgerError, Patch, Record, Verdict, utc


@final
@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What a compaction did: `moved` are records that the patch answers now, `left` those that stay in memory, each with the reason, and
    `back` those that an earlier compaction had moved and that this patch no longer answers: they are in memory again."""

    patch: Patch
    verdict: Verdict
    moved: tuple[Record, ...]
    left: tuple[tuple[Record, str], ...]
    back: tuple[Record, ...]


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

    Of the examples that were active before, given by hand, the patch must fix the share that the budget asks for.
    Raises InvalidExample if there is nothing to move, BudgetError with the numbers if not even one record fits, LedgerError if the memory
    changed meanwhile.
    """
    budget = budget or ledger.budget
    records, active = Records(ledger), ledger.active()
    outdated, earlier = records.outdated(), records.moved()
    beside = tuple(e for e in active if e.id not in outdated)
    given = [e for e in beside if e.id not in {row.record.example.id for row in earlier}]
    rows, left = settled([row for row in records.listed() if row.active], before)
    rows, unfit = _beside(host, beside, rows)
    left += unfit
    if not rows:
        raise InvalidExample("There is no settled record to move into weights." + (f" Of {len(left)}, {left[0][1]}." if left else ""))
    while True:
        examples = tuple(dict.fromkeys([*beside, *(row.record.example for row in rows)]))
        patch, verdict = build.edit(host, examples, method, budget=replace(budget, fixed=0.0), **how)
        why = "; ".join(verdict.failures)
        if verdict.passed:
            with apply.applied(host, patch):
                right, still, held = _answered(host, rows), _answered(host, earlier), sum(hosts.fixes(host, given))
            if held >= budget.fixed * len(given):
                break
            why = f"of the {len(given)} examples that are active already it fixes {held}"
        if len(rows) == 1:
            gate.require(verdict)
            raise BudgetError(f"Not even one record fits beside what is active: {why}. Allow more, or take another method.")
        note(f"{len(rows)} records do not fit the budget ({why}); {len(rows) // 2} are tried.")
        left += [(row.record, "it did not fit the budget") for row in rows[len(rows) // 2 :]]
        rows = rows[: len(rows) // 2]
    moved = tuple(row.record for row, ok in zip(rows, right, strict=True) if ok)
    back = [row for row, ok in zip(earlier, still, strict=True) if not ok]
    left += [(row.record, "the patch does not answer all of its questions") for row, ok in zip(rows, right, strict=True) if not ok]
    if moved:
        _commit(ledger, patch, verdict, rows, moved, active, outdated, back)
    return Compacted(patch=patch, verdict=verdict, moved=moved, left=tuple(left), back=tuple(row.record for row in back if moved))


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


def _beside(host: Host, active: Sequence[Example], rows: Sequence[RecordRow]) -> tuple[list[RecordRow], list[tuple[Record, str]]]:
    """The rows whose examples can be built on the host beside the active ones and each other, and the others with the reason."""
    said: dict[str, list[Example]] = {}
    for e in active:
        said.setdefault(plain(e.prompt), []).append(e)
    fit, left = [], []
    for row in rows:
        e = row.record.example
        others = said.setdefault(plain(e.prompt), [])
        try:
            hosts.encode(host, e.prompt, e.target)
        except InvalidExample as error:
            left.append((row.record, str(error)))
            continue
        if clash := next((o for o in others if contradict(o, e) or (o.goal == e.goal == "raise" and o.target != e.target)), None):
            left.append((row.record, f"an example says otherwise: {clash} ({clash.id})"))
        else:
            others.append(e)
            fit.append(row)
    return fit, left


def _answered(host: Host, rows: Sequence[RecordRow]) -> list[bool]:
    """Whether every question of each record is answered right."""
    asked = [replace(row.record.example, prompt=q, subject=None) for row in rows for q in row.record.questions]
    right = iter(hosts.fixes(host, asked))
    return [all([next(right) for _ in row.record.questions]) for row in rows]


def _commit(
    ledger: Ledger,
    patch: Patch,
    verdict: Verdict,
    rows: Sequence[RecordRow],
    moved: Sequence[Record],
    active: Sequence[Example],
    outdated: Sequence[str] = (),
    back: Sequence[RecordRow] = (),
) -> None:
    """Raises LedgerError unless all of the rows are in force and the same examples `active` as before."""
    records = Records(ledger)
    with ledger.writing():
        still = {row.number for row in records.listed() if row.active}
        if gone := [row for row in rows if row.number not in still]:
            raise LedgerError(
                f"The memory changed while its records were compacted: {gone[0].record.example} is no longer in force. Compact again."
            )
        if {e.id for e in ledger.active()} != {e.id for e in active}:
            raise LedgerError("Examples came or went while records were compacted. Compact again.")
        ledger.keep_patch(patch, verdict)
        ledger.log("compact", patch.id, f"{len(moved)} of {len(rows)} records")
        for id in outdated:
            ledger.deactivate(id, "another record took the place of its own")
        for example in patch.examples:
            ledger.activate(example, f"{INTO}{patch.id}")
        records.settle([r.id for r in moved], patch.id)
        # where the memory has another answer by now, that one counts
        records.bring_back(back, f"{patch.id} does not answer all of its questions", "supersede")
