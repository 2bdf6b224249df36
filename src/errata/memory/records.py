"""The records of the edit memory, in a ledger: put in, put in the place of others, taken out, brought back.

A record's question, target and subject are an example, and stand in the ledger's table of examples; a record adds which questions it
concerns, what it took the place of and where it came from. An example that is active is compiled by the next build; a record is looked up
at inference. The same example may be both, and neither knows of the other.

One question has one answer: whoever adds a second one, where both would hold for the same query, is refused, or asks that it supersede the
first. The question is the same if it differs in case, white space or the mark at its end, or names the subject by an alias. That two
differently worded questions mean the same is nothing that a spelling tells: see `memory/store.py` for what is near.

Nothing here has a vector or an encoder.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

from errata.ledger import RECORD, Event, Ledger, claim, contradict, plain, record_of
from errata.types import ConflictError, Record, UnknownName, canonical_json, folded

Clash = Literal["refuse", "supersede"]
CLASHES: tuple[Clash, ...] = ("refuse", "supersede")
SHORTEST = 4  # hex digits that an abbreviated id needs


@final
@dataclass(frozen=True, kw_only=True)
class RecordRow:
    """A record as the memory lists it. `begun` put it in force and `ended` took it out: by another, retracted, or undone."""

    number: int
    record: Record
    supersedes: tuple[str, ...]
    provenance: str
    begun: Event
    ended: Event | None

    @property
    def active(self) -> bool:
        return self.ended is None


def clash(a: Record, b: Record) -> bool:
    """Whether two records of one question cannot both be kept: some query concerns both, and they contradict or repeat each other."""
    return a.meets(b) and (contradict(a.example, b.example) or _claimed(a) == _claimed(b))


def _claimed(record: Record) -> tuple[str, str, str]:
    example = record.example
    return example.goal, plain(example.target), plain(example.contrast or "")


def check_clash(given: str) -> Clash:
    """`given` as a way to treat contradictions. Raises UnknownName."""
    for known in CLASHES:
        if given == known:
            return known
    raise UnknownName.among("way to treat a contradiction", given, CLASHES)


def conflict(old: Record, new: Record) -> ConflictError:
    """What to say to whoever adds `new` while `old` is in force."""
    same = _claimed(old) == _claimed(new)
    says = "is in the memory already, with other aliases, tags or times" if same else "has another answer in the memory"
    return ConflictError(
        f"'{plain(new.example.prompt)}' {says}: {claim(old.example)} ({old.id}), and now {claim(new.example)} ({new.id}). "
        f"Supersede the first with the second, or retract the first, or give them tags or times that do not meet."
    )


def no_record(given: str, rows: Sequence[RecordRow]) -> UnknownName:
    """Why `given` names no record in force, or more than one, where `rows` are those whose ids begin so."""
    if found := [row.record.id for row in rows if row.active]:
        return UnknownName(f"'{given}' is the start of more than one record: {', '.join(found[:3])}. Write more of it.")
    if rows and (ended := rows[-1].ended) is not None:
        return UnknownName(f"Record {rows[-1].record.id} is not in force: {_ENDED[ended.what]} at {ended.at[:19]} (UTC).")
    return UnknownName(f"No record's id begins with '{given}'. 'errata memory list' shows those in force.")


SETTLED = "memory compact"
INTO = "compacted into "  # in the log, of an example that a compaction made active
_ENDED = {
    SETTLED: "it was moved into weights",
    "memory retract": "it was retracted",
    "memory supersede": "another took its place",
    "memory undo": "it was undone",
}


@final
class Records:
    """The records in an open ledger. Wherever an id is taken, its first hex digits will do (four or more)."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    # -------------------------------------------------------------------------------------------------------------------- writing

    def add(self, *records: Record, clash: Clash = "refuse", provenance: str = "") -> list[str]:
        """Put `records` in force, all of them or, on an error, none. One that is in force already stays as it is. Returns their ids.

        What contradicts one of them is, as `clash` says, a reason to refuse all, or superseded.
        Raises ConflictError, LedgerError.
        """
        with self.ledger.writing():
            for record in records:
                if not self._in_force(record.id):
                    self._begin(record, self._ousted(record, clash), provenance, "memory add")
        return [record.id for record in records]

    def supersede(self, old: str, record: Record, provenance: str = "") -> str:
        """Put `record` in the place of the one with the id `old`, in one step. Returns the new id.

        Raises UnknownName if `old` is not in force, ConflictError if `record` contradicts another one, or is the same, LedgerError.
        """
        with self.ledger.writing():
            (row,) = self._where("record.id = ? AND ended IS NULL", self._resolve(old))
            if row.record.id == record.id:
                raise ConflictError(f"Record {record.id} cannot take its own place. Change its target, aliases, tags or times.")
            if self._in_force(record.id):
                raise ConflictError(f"Record {record.id} is in force already. Retract {row.record.id}, and it alone is left.")
            if others := [other for other in self._clashing(record) if other.number != row.number]:
                raise conflict(others[0].record, record)
            self._begin(record, [row], provenance, "memory add")
        return record.id

    def retract(self, id: str) -> str:
        """Take a record out of force. What it had superseded stays out: see `undo`. An example that a compaction made active although its
        record stayed goes with it, and a build is due. Returns its whole id.

        Raises UnknownName if it is not in force, LedgerError.
        """
        with self.ledger.writing():
            (row,) = self._where("record.id = ? AND ended IS NULL", self._resolve(id))
            self._end(row, "memory retract", "")
            self._let_go(row)
        return row.record.id

    def undo(self, id: str) -> tuple[str, ...]:
        """Take a record out of force and bring back what it had superseded, as that was. Returns the ids of what is back.

        Raises UnknownName if it is not in force, ConflictError if what would come back contradicts what is in force by now, LedgerError.
        """
        with self.ledger.writing():
            (row,) = self._where("record.id = ? AND ended IS NULL", self._resolve(id))
            self._end(row, "memory undo", "")
            self._let_go(row)
            for old in row.supersedes:
                before = self._where("record.id = ? ORDER BY record.number DESC LIMIT 1", old)[0]
                if before.active:
                    continue  # somebody has added it again
                if others := self._clashing(before.record):
                    raise conflict(others[0].record, before.record)
                self._begin(before.record, [], before.provenance, "memory add", f"{row.record.id} was undone", before.supersedes)
        return row.supersedes

    def settle(self, ids: Iterable[str], patch: str) -> None:
        """Take records out of force because a patch says from now on what they said, inside the ledger's `writing`."""
        for id in ids:
            (row,) = self._where("record.id = ? AND ended IS NULL", id)
            self._end(row, SETTLED, patch)

    def unsettle(self, patch: str) -> tuple[str, ...]:
        """Bring back what `settle` took out for this patch, inside the ledger's `writing`. Returns the ids.

        Raises ConflictError if one of them contradicts what is in force by now.
        """
        sql = "e.what = ? AND e.detail = ? ORDER BY record.number"
        last = {row.record.id: row for row in self._where(sql, SETTLED, patch)}
        back = [row for row in last.values() if not self._in_force(row.record.id)]
        self.bring_back(back, f"{patch} was undone")
        return tuple(row.record.id for row in back)

    def bring_back(self, rows: Iterable[RecordRow], detail: str, clash: Clash = "refuse") -> None:
        """Put the records in force again, as they were, inside the ledger's `writing`. If one of them contradicts what is in force by now
        it raises ConflictError, or, where that is to `supersede`, leaves the record out."""
        for row in rows:
            if others := self._clashing(row.record):
                if clash == "supersede":
                    continue
                raise conflict(others[0].record, row.record)
            self._begin(row.record, [], row.provenance, "memory add", detail, row.supersedes)

    def bind(self, id: str, name: str) -> None:
        """Say which encoder the memory's vectors come from. Raises LedgerError."""
        with self.ledger.writing():
            self.ledger.rows("DELETE FROM encoder")
            self.ledger.rows("INSERT INTO encoder VALUES (?, ?)", id, name)
            self.ledger.log("memory encoder", id, name)

    # -------------------------------------------------------------------------------------------------------------------- reading

    def active(self) -> tuple[Record, ...]:
        """The records in force, in the order in which they came. Raises LedgerError if one was altered."""
        rows = self.ledger.rows(f"SELECT {RECORD} {_FROM} WHERE ended IS NULL ORDER BY record.number")
        return tuple(record_of(*row) for row in rows)

    def listed(self, start: str = "") -> tuple[RecordRow, ...]:
        """Every record that is or was in force and whose id begins with `start`, a row for each time, in order. Raises LedgerError."""
        low, high = _between(start)
        return self._where("record.id >= ? AND record.id < ? ORDER BY record.number", low, high)

    def numbered(self, numbers: Iterable[int]) -> dict[int, RecordRow]:
        """Rows by their numbers. Raises LedgerError."""
        wanted = json.dumps(sorted(set(numbers)))
        return {row.number: row for row in self._where("record.number IN (SELECT value FROM json_each(?))", wanted)}

    def moved(self) -> tuple[RecordRow, ...]:
        """The records that compactions moved into weights and that are there now. Raises LedgerError."""
        return tuple(row for row in self._last_of_active() if row.ended is not None and row.ended.what == SETTLED)

    def outdated(self) -> tuple[str, ...]:
        """Ids of examples that a compaction made active, that of a record which stayed in memory and has gone from there since."""
        gone = (row for row in self._last_of_active() if row.ended is not None and row.ended.what != SETTLED)
        return tuple(row.record.example.id for row in gone if self._compacted(row.record.example.id))

    @property
    def encoder(self) -> tuple[str, str] | None:
        """Id and name of the encoder that the vectors come from; None as long as there is none."""
        rows = self.ledger.rows("SELECT id, name FROM encoder")
        return (str(rows[0][0]), str(rows[0][1])) if rows else None

    def count(self) -> int:
        """How many questions are asked of the records in force."""
        return int(
            self.ledger.rows("SELECT count(*) FROM question JOIN record ON record.number = question.record WHERE ended IS NULL")[0][0]
        )

    def moment(self) -> tuple[int, str]:
        """Number of the last event, and what names it: so that an index can say up to where it is complete, and of which ledger."""
        ((number, name),) = self.ledger.rows("SELECT number, at || ' ' || id FROM event ORDER BY number DESC LIMIT 1")
        return int(number), str(name)

    def was(self, number: int, name: str) -> bool:
        """Whether `moment` once was that of this ledger."""
        return self.ledger.rows("SELECT at || ' ' || id FROM event WHERE number = ?", number) == [(name,)]

    def came(self, after: int, upto: int) -> list[tuple[int, str, str]]:
        """(number, text, answer) of the questions that came into force after one event, with another one at the latest, and still are."""
        sql = """SELECT question.number, text, json_extract(content, '$.target') FROM record
                 JOIN question ON question.record = record.number JOIN example ON example.id = record.example
                 WHERE begun > ? AND begun <= ? AND ended IS NULL ORDER BY question.number"""
        return self.ledger.rows(sql, after, upto)

    def went(self, after: int) -> list[int]:
        """Numbers of the questions that were in force at an event and no longer are."""
        sql = "SELECT question.number FROM record JOIN question ON question.record = record.number WHERE ended > ?1 AND begun <= ?1"
        return [number for (number,) in self.ledger.rows(sql, after)]

    def asked(self, numbers: Iterable[int]) -> list[tuple[int, int, str, str]]:
        """(question, record, text, scope as JSON) for those of the questions whose record is in force."""
        sql = """SELECT question.number, record.number, text, scope FROM question JOIN record ON record.number = question.record
                 WHERE question.number IN (SELECT value FROM json_each(?)) AND ended IS NULL"""
        return self.ledger.rows(sql, json.dumps(list(numbers)))

    def tagged(self, tags: Iterable[str]) -> list[int]:
        """The questions whose record is in force and concerns a query with these tags, whatever the time."""
        sql = """SELECT DISTINCT question.number FROM tag JOIN record ON record.number = tag.record
                 JOIN question ON question.record = record.number
                 WHERE tag IN (SELECT value FROM json_each(?)) AND ended IS NULL ORDER BY question.number"""
        return [number for (number,) in self.ledger.rows(sql, json.dumps(["", *tags]))]

    # --------------------------------------------------------------------------------------------------------------------- inside

    def _last_of_active(self) -> tuple[RecordRow, ...]:
        """Of each active example that is that of a record, the last row."""
        last = "SELECT max(number) FROM record WHERE example IN (SELECT id FROM active) GROUP BY example"
        return self._where(f"record.number IN ({last}) ORDER BY record.number")

    def _compacted(self, example: str) -> bool:
        """Whether it was a compaction that made the example active."""
        told = self.ledger.rows("SELECT detail FROM event WHERE id = ? AND what = 'add' ORDER BY number DESC LIMIT 1", example)
        return bool(told) and str(told[0][0]).startswith(INTO)

    def _let_go(self, row: RecordRow) -> None:
        id = row.record.example.id
        if self._compacted(id) and self.ledger.rows("SELECT 1 FROM active WHERE id = ?", id):
            self.ledger.deactivate(id, f"its record {row.record.id} went")

    def _in_force(self, id: str) -> bool:
        return bool(self.ledger.rows("SELECT 1 FROM record WHERE id = ? AND ended IS NULL", id))

    def _clashing(self, record: Record) -> list[RecordRow]:
        """The rows in force that `record` cannot stand beside, oldest first."""
        same = "record.number IN (SELECT record FROM question WHERE folded IN (SELECT value FROM json_each(?)))"
        asked = json.dumps([folded(question) for question in record.questions])
        return [row for row in self._where(f"{same} AND ended IS NULL ORDER BY record.number", asked) if clash(row.record, record)]

    def _ousted(self, record: Record, clash: Clash) -> list[RecordRow]:
        rows = self._clashing(record)
        if rows and clash == "refuse":
            raise conflict(rows[0].record, record)
        return rows

    def _begin(
        self, record: Record, ousted: list[RecordRow], provenance: str, what: str, detail: str = "", supersedes: tuple[str, ...] = ()
    ) -> None:
        for row in ousted:
            self._end(row, "memory supersede", f"by {record.id}")
        instead = tuple(row.record.id for row in ousted) or supersedes
        told = detail or (f"instead of {', '.join(instead)}" if instead else provenance)
        event = self.ledger.log(what, record.id, told)
        values = (record.id, self.ledger.keep_example(record.example), canonical_json(record.scope), "\n".join(instead), provenance, event)
        sql = "INSERT INTO record (id, example, scope, supersedes, provenance, begun) VALUES (?, ?, ?, ?, ?, ?) RETURNING number"
        ((number,),) = self.ledger.rows(sql, *values)
        for text in record.questions:
            self.ledger.rows("INSERT INTO question (record, text, folded) VALUES (?, ?, ?)", number, text, folded(text))
        for tag in record.tags or ("",):
            self.ledger.rows("INSERT INTO tag (tag, record) VALUES (?, ?)", tag, number)

    def _end(self, row: RecordRow, what: str, detail: str) -> None:
        event = self.ledger.log(what, row.record.id, detail)
        self.ledger.rows("UPDATE record SET ended = ? WHERE number = ?", event, row.number)

    def _where(self, condition: str, *values: str) -> tuple[RecordRow, ...]:
        return tuple(self._read(condition, *values))

    def _read(self, condition: str, *values: str) -> Iterator[RecordRow]:
        sql = f"""SELECT record.number, supersedes, provenance, b.at, b.what, b.detail, e.at, e.what, e.detail, {RECORD} {_FROM}
                  JOIN event AS b ON b.number = begun LEFT JOIN event AS e ON e.number = ended WHERE {condition}"""
        for number, supersedes, provenance, *told, id, content, prompt, example, scope in self.ledger.rows(sql, *values):
            yield RecordRow(
                number=number,
                record=record_of(id, content, prompt, example, scope),
                supersedes=tuple(supersedes.split()),
                provenance=provenance,
                begun=Event(at=told[0], what=told[1], id=id, detail=told[2]),
                ended=None if told[3] is None else Event(at=told[3], what=told[4], id=id, detail=told[5]),
            )

    def _resolve(self, given: str) -> str:
        """The whole id in force that `given` is the start of. Raises UnknownName if there is none or more than one."""
        low, high = _between(given)
        if len(low) < len("b2:") + SHORTEST:
            raise UnknownName(f"'{given}' is too short to name one record. Write {SHORTEST} hex digits of its id or more.")
        # by range and not by substr: with a million records only this is answered from the index
        found = [id for (id,) in self.ledger.rows("SELECT id FROM record WHERE id >= ? AND id < ? AND ended IS NULL LIMIT 3", low, high)]
        if len(found) == 1:
            return str(found[0])
        raise no_record(given, self.listed(given))


_FROM = "FROM record JOIN example ON example.id = record.example"


def _between(start: str) -> tuple[str, str]:
    """The ids that begin with `start` lie from the first to before the second."""
    low = f"b2:{start.removeprefix('b2:')}"
    return low, low + "\U0010ffff"
