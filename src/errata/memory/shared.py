"""SharedMemory: the same memory on Postgres with pgvector, for several servers that read and write it together.

What EditMemory keeps in a ledger, with its rules: the records in one table, for each of those in force its questions with their vectors in
another, a row for each key, under a graph of pgvector (HNSW, Malkov & Yashunin 2016, arXiv 1603.09320; float16). A record and its vectors
are written in one transaction, so nothing has to be brought up to date. Whoever writes waits for who is writing: two servers cannot each
add half of a contradiction. A memory is a schema of the database; it belongs to one encoder.

Unlike a ledger it keeps no log of events: each record says when it came into force, when it went and why.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Any, final

import numpy as np

from errata.ledger import Event
from errata.memory.encoder import Encoder
from errata.memory.index import CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH
from errata.memory.records import SHORTEST, Clash, RecordRow, clash, conflict, no_record
from errata.memory.store import Hit, keys, now
from errata.types import ConflictError, LedgerError, MissingExtra, Record, UnknownName, WrongBase, canonical_json, folded, utc

VERSION = 1
# so that a server that vanished without a word is noticed; whoever names them in the address has his own
PATIENCE = {"connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 15_000}

SCHEMA = """
CREATE TABLE about (             -- one row
    version    int NOT NULL,
    encoder    text NOT NULL,    -- hash of its weights and settings
    name       text NOT NULL     -- what loads it
);
CREATE TABLE record (            -- a row for each time that a record came into force; no row is ever deleted
    number     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         text NOT NULL,
    content    text NOT NULL,    -- JSON; the id is its hash
    tags       text[] NOT NULL,
    since      text COLLATE "C", -- UTC, ISO 8601, as `until`
    until      text COLLATE "C",
    supersedes text[] NOT NULL,
    provenance text NOT NULL,
    begun      timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended      timestamptz,      -- NULL: it is in force
    why        text NOT NULL DEFAULT '',
    detail     text NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX record_in_force ON record (id) WHERE ended IS NULL;
CREATE INDEX record_id ON record (id COLLATE "C");
CREATE TABLE question (          -- of the records in force, a row for each key
    record     bigint NOT NULL REFERENCES record,
    text       text NOT NULL,
    folded     text NOT NULL,
    vector     halfvec(WIDTH) NOT NULL
);
CREATE INDEX question_record ON question (record);
CREATE INDEX question_folded ON question USING hash (folded);
CREATE INDEX question_vector ON question USING hnsw (vector halfvec_ip_ops) WITH (m = CONNECTIVITY, ef_construction = EXPANSION_ADD);
"""


@final
class SharedMemory:
    """A memory at a Postgres address, by one encoder. Close it, or use it in `with`. It belongs to one thread, as a ledger does."""

    def __init__(self, address: str, encoder: Encoder, *, name: str = "errata") -> None:
        """Open the memory called `name` in the database at `address`; it is made if there is none.

        Raises LedgerError if the server does not answer or has no pgvector, WrongBase if the memory is of another encoder, MissingExtra.
        """
        try:
            import psycopg
            from psycopg import conninfo, sql
        except ImportError as e:
            raise MissingExtra('A shared memory needs psycopg, which is not installed: pip install "errata[postgres]".') from e
        self.encoder, self.name = encoder, name
        self._psycopg, self._schema = psycopg, sql.Identifier(name)
        try:
            given = conninfo.conninfo_to_dict(address)
        except psycopg.Error as e:
            raise LedgerError(f"That is no address of a Postgres server: {_first(e)}. Write postgresql://user@host/database.") from e
        self._address = conninfo.make_conninfo(**PATIENCE | given)
        # without the password
        self.where = f"{given.get('dbname', '')} at {given.get('host') or given.get('hostaddr') or 'this machine'}, memory {name}"
        self._db: Any = None
        try:
            with self._writing() as db:
                self._make(db)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hand the connection back. Closing twice is no error."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def __enter__(self) -> "SharedMemory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------------------- writing

    def add(self, *records: Record, clash: Clash = "refuse", provenance: str = "") -> list[str]:
        """As `EditMemory.add`. Raises ConflictError, InvalidExample, LedgerError."""
        vectors = self._vectors(records)
        with self._writing() as db:
            for record in records:
                if not db.execute("SELECT 1 FROM record WHERE id = %s AND ended IS NULL", (record.id,)).fetchone():
                    ousted = self._clashing(db, record)
                    if ousted and clash == "refuse":
                        raise conflict(ousted[0].record, record)
                    self._begin(db, record, ousted, provenance, vectors)
        return [record.id for record in records]

    def supersede(self, old: str, record: Record, provenance: str = "") -> str:
        """As `EditMemory.supersede`. Raises UnknownName, ConflictError, InvalidExample, LedgerError."""
        vectors = self._vectors([record])
        with self._writing() as db:
            row = self._resolve(db, old)
            if db.execute("SELECT 1 FROM record WHERE id = %s AND ended IS NULL", (record.id,)).fetchone():
                raise ConflictError(f"Record {record.id} is in force already; it cannot take the place of {row.record.id}.")
            if others := [other for other in self._clashing(db, record) if other.number != row.number]:
                raise conflict(others[0].record, record)
            self._begin(db, record, [row], provenance, vectors)
        return record.id

    def retract(self, id: str) -> str:
        """As `EditMemory.retract`. Raises UnknownName, LedgerError."""
        with self._writing() as db:
            row = self._resolve(db, id)
            self._end(db, row, "memory retract", "")
        return row.record.id

    def undo(self, id: str) -> tuple[str, ...]:
        """As `EditMemory.undo`. Raises UnknownName, ConflictError, LedgerError."""
        with self._writing() as db:
            row = self._resolve(db, id)
            self._end(db, row, "memory undo", "")
            for old in row.supersedes:
                before = self._where(db, "id = %s ORDER BY number DESC LIMIT 1", old)[0]
                if before.active:
                    continue  # somebody has added it again
                if others := self._clashing(db, before.record):
                    raise conflict(others[0].record, before.record)
                self._begin(db, before.record, [], before.provenance, self._vectors([before.record]), before.supersedes)
        return row.supersedes

    # ------------------------------------------------------------------------------------------------------------------ reading

    def active(self) -> tuple[Record, ...]:
        """The records in force, in the order in which they came. Raises LedgerError."""
        with self._reading() as db:
            return tuple(row.record for row in self._where(db, "ended IS NULL ORDER BY number"))

    def listed(self, start: str = "") -> tuple[RecordRow, ...]:
        """As `Records.listed`. Raises LedgerError."""
        with self._reading() as db:
            return self._where(db, _STARTS + " ORDER BY number", *_between(start))

    def search(self, query: str, k: int = 8, *, tags: Iterable[str] = (), at: str | datetime | None = None) -> tuple[Hit, ...]:
        """As `EditMemory.search`. Raises InvalidExample, LedgerError."""
        return self.nearest(self.encoder.encode([query])[0], k, tags=tags, at=at)

    def nearest(self, vector: np.ndarray, k: int = 8, *, tags: Iterable[str] = (), at: str | datetime | None = None) -> tuple[Hit, ...]:
        """As `EditMemory.nearest`. Raises LedgerError."""
        moment = now() if at is None else utc(at)
        values = {"q": _literal(vector), "tags": list(tags), "moment": moment, "k": k, "fetch": 4 * k}
        with self._reading() as db:
            db.execute(f"SET LOCAL hnsw.ef_search = {EXPANSION_SEARCH}")
            db.execute("SET LOCAL hnsw.iterative_scan = strict_order")  # goes on where a tag or a time leaves too few
            found = _best(db.execute(_NEAREST, values).fetchall(), k)
            if len(found) < k:  # the graph gave up: a rare tag, or many names of few records
                db.execute("SET LOCAL enable_indexscan = off")
                found = _best(db.execute(_NEAREST_OF_ALL, values).fetchall(), k)
            rows = {row.number: row for row in self._where(db, "number = ANY(%s)", list(found))}
        return tuple(Hit(row=rows[number], score=score, question=text) for number, (score, text) in found.items())

    # --------------------------------------------------------------------------------------------------------------------- inside

    def _make(self, db: Any) -> None:
        """The schema, if it is not there; what is there must be of this encoder."""
        if not db.execute("SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = 'about'", (self.name,)).fetchone():
            db.execute("CREATE EXTENSION IF NOT EXISTS vector SCHEMA public")
            db.execute(self._compose("CREATE SCHEMA IF NOT EXISTS {}"))
            self._enter()
            schema = SCHEMA.replace("WIDTH", str(self.encoder.width))
            db.execute(schema.replace("CONNECTIVITY", str(CONNECTIVITY)).replace("EXPANSION_ADD", str(EXPANSION_ADD)))
            db.execute("INSERT INTO about VALUES (%s, %s, %s)", (VERSION, self.encoder.id, self.encoder.name))
        version, id, name = db.execute("SELECT version, encoder, name FROM about").fetchone()
        if version != VERSION:
            raise LedgerError(f"The memory {self.where} was written by another errata: its schema is number {version}, this one knows 1.")
        if id != self.encoder.id:
            raise WrongBase(
                f"The memory {self.where} is of the encoder {name} ({id}), and this one is {self.encoder.name} ({self.encoder.id}). "
                f"Open it with the first, or begin another memory under a name of its own."
            )

    def _compose(self, text: str) -> Any:
        from psycopg import sql

        return sql.SQL(text).format(self._schema)

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """All of the block or nothing of it, while nobody else writes to this memory."""
        with self._spoken(), self._connected().transaction():
            self._enter()
            self._db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (f"errata memory {self.name}",))
            yield self._db

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """The block sees one state, whoever writes meanwhile."""
        with self._spoken(), self._connected().transaction():
            self._db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            self._enter()
            yield self._db

    def _enter(self) -> None:
        self._db.execute(self._compose("SET LOCAL search_path TO {}, public"))

    def _connected(self) -> Any:
        """The connection, made anew after one that broke."""
        if self._db is None or self._db.closed:
            self._db = self._psycopg.connect(self._address, autocommit=True)
        return self._db

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        """What Postgres raises inside the block comes out as a LedgerError."""
        try:
            yield
        except self._psycopg.OperationalError as e:
            # a commit whose answer was lost may have been done
            raise LedgerError(
                f"The memory {self.where} does not answer: {_first(e)}. What was asked is there whole or not at all; "
                f"try again when the server is back."
            ) from e
        except self._psycopg.Error as e:
            raise LedgerError(f"The memory {self.where} refuses: {_first(e)}. Mend that and try again.") from e

    def _vectors(self, records: Iterable[Record]) -> dict[str, str]:
        """{key: its vector as pgvector reads it}."""
        pairs = [(question, record.example.target) for record in records for question in record.questions]
        texts = list(dict.fromkeys(key for pair in pairs for key in keys(*pair)))
        return {text: _literal(row) for text, row in zip(texts, self.encoder.encode(texts), strict=True)}

    def _clashing(self, db: Any, record: Record) -> list[RecordRow]:
        same = "ended IS NULL AND number IN (SELECT record FROM question WHERE folded = ANY(%s)) ORDER BY number"
        return [row for row in self._where(db, same, [folded(text) for text in record.questions]) if clash(row.record, record)]

    def _begin(
        self,
        db: Any,
        record: Record,
        ousted: list[RecordRow],
        provenance: str,
        vectors: dict[str, str],
        supersedes: tuple[str, ...] = (),
    ) -> None:
        for row in ousted:
            self._end(db, row, "memory supersede", f"by {record.id}")
        instead = [row.record.id for row in ousted] or list(supersedes)
        values = (record.id, canonical_json(record.as_dict()), list(record.tags), record.since, record.until, instead, provenance)
        sql = "INSERT INTO record (id, content, tags, since, until, supersedes, provenance) VALUES (%s, %s, %s, %s, %s, %s, %s)"
        (number,) = db.execute(f"{sql} RETURNING number", values).fetchone()
        for text in record.questions:
            for key in keys(text, record.example.target):
                db.execute("INSERT INTO question VALUES (%s, %s, %s, %s::halfvec)", (number, text, folded(text), vectors[key]))

    def _end(self, db: Any, row: RecordRow, why: str, detail: str) -> None:
        sql = "UPDATE record SET ended = clock_timestamp(), why = %s, detail = %s WHERE number = %s"
        db.execute(sql, (why, detail, row.number))
        db.execute("DELETE FROM question WHERE record = %s", (row.number,))  # made again from the record if it comes back

    def _where(self, db: Any, condition: str, *values: object) -> tuple[RecordRow, ...]:
        sql = f"SELECT number, id, content, supersedes, provenance, begun, ended, why, detail FROM record WHERE {condition}"
        return tuple(self._row(*row) for row in db.execute(sql, values).fetchall())

    def _row(
        self,
        number: int,
        id: str,
        content: str,
        supersedes: list[str],
        provenance: str,
        begun: datetime,
        ended: datetime | None,
        why: str,
        detail: str,
    ) -> RecordRow:
        try:
            record = Record.from_dict(json.loads(content))
        except (ValueError, TypeError, AttributeError) as e:
            raise LedgerError(f"Record {id} of the memory {self.where} cannot be read: {e}. Restore it from a copy.") from e
        if record.id != id:
            raise LedgerError(f"Record {id} of the memory {self.where} was altered. Restore it from a copy.")
        return RecordRow(
            number=number,
            record=record,
            supersedes=tuple(supersedes),
            provenance=provenance,
            begun=Event(at=utc(begun), what="memory add", id=id, detail=provenance),
            ended=None if ended is None else Event(at=utc(ended), what=why, id=id, detail=detail),
        )

    def _resolve(self, db: Any, given: str) -> RecordRow:
        """The record in force whose id `given` is the start of. Raises UnknownName if there is none or more than one."""
        low, high = _between(given)
        if len(low) < len("b2:") + SHORTEST:
            raise UnknownName(f"'{given}' is too short to name one record. Write {SHORTEST} hex digits of its id or more.")
        rows = self._where(db, _STARTS + " ORDER BY number", low, high)
        if len(found := [row for row in rows if row.active]) == 1:
            return found[0]
        raise no_record(given, rows)


_STARTS = 'id COLLATE "C" >= %s AND id COLLATE "C" < %s'
_HOLDS = (
    """(tags = '{}' OR tags && %(tags)s::text[]) AND (since IS NULL OR since <= %(moment)s) AND (until IS NULL OR %(moment)s < until)"""
)
_NEAREST = f"""SELECT question.record, -(vector <#> %(q)s::halfvec), text FROM question JOIN record ON record.number = question.record
               WHERE {_HOLDS} ORDER BY vector <#> %(q)s::halfvec LIMIT %(fetch)s"""
_NEAREST_OF_ALL = f"""SELECT * FROM (
                          SELECT DISTINCT ON (question.record) question.record, -(vector <#> %(q)s::halfvec) AS score, text
                          FROM question JOIN record ON record.number = question.record WHERE {_HOLDS}
                          ORDER BY question.record, score DESC
                      ) AS found ORDER BY score DESC LIMIT %(k)s"""


def _best(rows: list[tuple[int, float, str]], k: int) -> dict[int, tuple[float, str]]:
    """{record: (score, question)} for k records, each by its nearest question, the nearest first, of equal ones the newer."""
    found: dict[int, tuple[float, str]] = {}
    for number, score, text in sorted(rows, key=lambda row: (-row[1], -row[0])):
        found.setdefault(number, (float(score), text))
    return dict(list(found.items())[:k])


def _literal(vector: np.ndarray) -> str:
    return json.dumps([round(float(x), 7) for x in vector])


def _between(start: str) -> tuple[str, str]:
    low = f"b2:{start.removeprefix('b2:')}"
    return low, low + "~"


def _first(error: Exception) -> str:
    """The first line of what the server said, without the mark at its end."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
