"""The ledger: a directory that keeps examples, records, patches, verdicts and states, and can prove that they are still what was put in.

    ledger.sqlite                    what is active, what was judged, what happened when (SQLite, WAL, synchronous FULL; schema below)
    blobs/ab/ab....safetensors       patches and states; a file is named by the SHA-256 of its content
    aside/NAME.safetensors           what may be made again: how far a long preparation has come, the sums of the last build of a method;
                                     behind the SHA-256 of what follows; nothing refers to it
    aside/memory/                    what may be made again of the edit memory: vectors of its texts, its index (`memory/`)

Commit protocol: the blob is written to a temporary file, synced, renamed, and its folder synced; only then does one transaction refer to
it, and only after the commit does the call return. So a kill at any moment loses nothing that was acknowledged and leaves at worst a
stray file, which no reader sees, `verify` reports as harmless and `collect` removes. Opening needs no repair.

Nothing here builds, judges or applies a patch, and nothing here has a model: examples come in, and patches with their verdicts. The records
of the edit memory are kept here and put, taken and found by `memory/records.py`.
A Ledger belongs to the thread that opened it; open one for each thread, as for each process.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, final

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from errata.artefact import TEMPORARY, from_bytes, make_folder, to_bytes, write_whole
from errata.types import (
    GOALS,
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
    canonical_json,
    digest,
)

FILE = "ledger.sqlite"
BUSY_SECONDS = 5.0  # how long a call waits for another process that is writing
SHORTEST = 4  # hex digits that an abbreviated id needs
STATE_FORMAT = "errata-state-1"

# ----------------------------------------------------------------------------------------------------------------------------- schema

MIGRATIONS = (  # number n is the n-th; a blank line stands between statements. Never edit one that was released: add the next.
    """
CREATE TABLE ledger (            -- one row: what this ledger is about
    host     TEXT NOT NULL,      -- id of the base weights; every patch and state must be made for them
    model    TEXT NOT NULL,      -- the name that loads them, such as lab/neox
    budget   TEXT NOT NULL       -- JSON of the Budget that patches are judged by
) STRICT

CREATE TABLE example (           -- every example that ever was active; no row is ever deleted
    id       TEXT PRIMARY KEY,
    content  TEXT NOT NULL,      -- canonical JSON; the id is its hash
    prompt   TEXT NOT NULL       -- the prompt with each run of white space as one space: where contradictions are looked for
) STRICT

CREATE INDEX example_prompt ON example (prompt)

CREATE TABLE active (            -- the examples that the next build compiles
    place    INTEGER PRIMARY KEY,   -- they are compiled in this order
    id       TEXT NOT NULL UNIQUE REFERENCES example
) STRICT

CREATE TABLE patch (             -- every patch that was kept, passed or not
    id       TEXT PRIMARY KEY,
    method   TEXT NOT NULL,
    examples TEXT NOT NULL,      -- ids of its examples, one on each line; they need not be in this ledger
    blob     TEXT NOT NULL       -- SHA-256 of its file
) STRICT

CREATE TABLE verdict (           -- every ruling; the latest of a patch is the one that counts
    number   INTEGER PRIMARY KEY,
    id       TEXT NOT NULL,      -- hash of the content
    patch    TEXT NOT NULL REFERENCES patch,
    content  TEXT NOT NULL,      -- JSON of the Verdict
    at       TEXT NOT NULL       -- UTC, ISO 8601
) STRICT

CREATE INDEX verdict_patch ON verdict (patch)

CREATE TABLE state (             -- what methods learnt once for the base
    id       TEXT PRIMARY KEY,
    blob     TEXT NOT NULL       -- SHA-256 of its file
) STRICT

CREATE TABLE event (             -- what happened, in order; rows are only ever added
    number   INTEGER PRIMARY KEY,
    at       TEXT NOT NULL,      -- UTC, ISO 8601; the number orders, as clocks jump
    what     TEXT NOT NULL,      -- create, add, supersede, retract, patch, state
    id       TEXT NOT NULL,      -- of the example, patch or state
    detail   TEXT NOT NULL
) STRICT
""",
    """
CREATE TABLE record (            -- the edit memory: a row for each time that a record came into force; no row is ever deleted
    number     INTEGER PRIMARY KEY,
    id         TEXT NOT NULL,    -- hash of the example's id and the scope
    example    TEXT NOT NULL REFERENCES example,
    scope      TEXT NOT NULL,    -- canonical JSON: aliases, tags, since, until
    supersedes TEXT NOT NULL,    -- ids of the records that it took the place of, one on each line
    provenance TEXT NOT NULL,    -- where it came from
    begun      INTEGER NOT NULL REFERENCES event,   -- what put it in force
    ended      INTEGER REFERENCES event             -- what took it out of force; NULL: it is in force
) STRICT

CREATE UNIQUE INDEX record_in_force ON record (id) WHERE ended IS NULL

CREATE INDEX record_id ON record (id)

CREATE INDEX record_begun ON record (begun)

CREATE INDEX record_ended ON record (ended) WHERE ended IS NOT NULL

CREATE TABLE question (          -- how a record is asked for: its prompt, and the prompt with each alias in the subject's place
    number     INTEGER PRIMARY KEY,  -- by which an index knows its vector
    record     INTEGER NOT NULL REFERENCES record,
    text       TEXT NOT NULL,
    folded     TEXT NOT NULL     -- without case, width and the mark at the end: where contradictions are looked for
) STRICT

CREATE INDEX question_record ON question (record)

CREATE INDEX question_folded ON question (folded)

CREATE TABLE encoder (           -- at most one row: what turns the memory's questions into vectors
    id         TEXT NOT NULL,    -- hash of its weights and settings
    name       TEXT NOT NULL     -- what loads it
) STRICT
""",
    """
CREATE TABLE tag (               -- which records concern a query with a tag; those without tags, which concern every one, have the tag ''
    tag        TEXT NOT NULL,
    record     INTEGER NOT NULL REFERENCES record,
    PRIMARY KEY (tag, record)
) STRICT, WITHOUT ROWID

INSERT INTO tag SELECT DISTINCT value, record.number FROM record, json_each(scope, '$.tags')

INSERT INTO tag SELECT '', number FROM record WHERE json_array_length(scope, '$.tags') = 0
""",
)


def _version(db: sqlite3.Connection) -> int:
    """Number of the last migration that the database has had; 0 if it is not a ledger's."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'migration'").fetchone():
        return 0
    return int(db.execute("SELECT coalesce(max(number), 0) FROM migration").fetchone()[0])


def _migrate(db: sqlite3.Connection) -> None:
    """Bring the schema up to date, inside the caller's transaction."""
    db.execute("CREATE TABLE IF NOT EXISTS migration (number INTEGER PRIMARY KEY, at TEXT NOT NULL) STRICT")
    for number in range(_version(db) + 1, len(MIGRATIONS) + 1):
        for statement in MIGRATIONS[number - 1].strip().split("\n\n"):
            db.execute(statement)
        db.execute("INSERT INTO migration VALUES (?, ?)", (number, _now()))


# ------------------------------------------------------------------------------------------------------------------------- what it tells


Kind = Literal["database", "example", "record", "patch", "verdict", "state", "stray"]


@final
@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the log. `what` happened to the example, patch or state called `id`, at a UTC time in ISO 8601."""

    at: str
    what: str
    id: str
    detail: str


@final
@dataclass(frozen=True, kw_only=True)
class ExampleRow:
    """An example as the ledger lists it. `last` is what happened to it last: it was added, superseded or retracted."""

    example: Example
    active: bool
    last: Event


@final
@dataclass(frozen=True, kw_only=True)
class PatchRow:
    """A patch as the ledger lists it. `current`: its examples are exactly the active ones. `at`: when it was last judged."""

    id: str
    at: str
    method: str
    examples: tuple[str, ...]
    verdict: Verdict
    current: bool


@final
@dataclass(frozen=True, kw_only=True)
class Problem:
    """What `verify` found, and where: an id or a path. A stray file, left by a kill, is harmless: `collect` removes it."""

    kind: Kind
    where: str
    sentence: str

    @property
    def harmless(self) -> bool:
        return self.kind == "stray"


# ----------------------------------------------------------------------------------------------------------------------------- ledger


@final
class Ledger:
    """An open ledger. Close it, or use it in `with`. Wherever an id is taken, its first hex digits will do (four or more)."""

    def __init__(self, path: str | Path) -> None:
        """Open the ledger at `path`; one written by an older version is brought up to date.

        Raises LedgerError if there is none, or it is not a ledger, damaged, busy, not writable, or written by a newer version.
        """
        self.path = Path(path)
        if not (self.path / FILE).is_file():
            raise LedgerError(f"There is no ledger at {self.path}. Create one with 'errata init', or name the folder of an existing one.")
        with _spoken(self.path):
            self._db = _connect(self.path / FILE, "rw")
        try:
            self._catch_up()
            self.host, self.model, self.budget = self._about()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: str | Path, host: str, model: str, budget: Budget) -> "Ledger":
        """Make an empty ledger at `path` for the base weights with the id `host`, which the name `model` loads.

        Raises LedgerError if there is one already, or the folder cannot be written.
        """
        path = Path(path)
        with _spoken(path):
            make_folder(path)
            with closing(_connect(path / FILE, "rwc")) as db, _transaction(db):
                if _version(db):
                    raise LedgerError(f"There is a ledger at {path} already. Open it, or choose another folder.")
                _migrate(db)
                db.execute("INSERT INTO ledger VALUES (?, ?, ?)", (host, model, canonical_json(asdict(budget))))
                _log(db, "create", host, model)
        return cls(path)

    def close(self) -> None:
        """Hand the files back. Closing twice is no error."""
        self._db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------------- examples

    def add(self, *examples: Example, source: str = "") -> list[str]:
        """Make `examples` active, all of them or, on an error, none. One that is active already stays as it is. Returns their ids.

        `source` says where they came from, and stands in the log.
        Raises ConflictError if one contradicts another that is active or in `examples`, LedgerError.
        """
        with self.writing():
            for example in examples:
                self._activate(example, source)
        return [example.id for example in examples]

    def supersede(self, old: str, example: Example) -> str:
        """Put `example` in place of the active example with the id `old`, in one step. Returns the new id.

        Raises UnknownName if `old` is not active, ConflictError if `example` contradicts what stays active, LedgerError.
        """
        with self.writing():
            old = self._resolve("active", old)
            self._deactivate(old, "supersede", f"by {example.id}")
            self._activate(example, f"instead of {old}")
        return example.id

    def retract(self, id: str) -> str:
        """Take an active example back; patches that hold it are no longer handed out. Returns its whole id.

        Raises UnknownName if it is not active, LedgerError.
        """
        with self.writing():
            id = self._resolve("active", id)
            self._deactivate(id, "retract", "")
        return id

    def active(self) -> tuple[Example, ...]:
        """The active examples in the order in which they were added. Raises LedgerError if one was altered."""
        rows = self.rows("SELECT id, content, prompt FROM example JOIN active USING (id) ORDER BY place")
        return tuple(_example(*row) for row in rows)

    def examples(self, start: str = "") -> tuple[ExampleRow, ...]:
        """Every example that is or was active and whose id begins with `start`, the one whose lot changed last at the end.

        Raises LedgerError if one of them was altered.
        """
        rows = self.rows(
            """SELECT id, content, prompt, active.place IS NOT NULL, at, what, detail
               FROM example LEFT JOIN active USING (id) JOIN event USING (id)
               WHERE substr(id, 1, length(?1)) = ?1 AND number IN (SELECT max(number) FROM event GROUP BY id)
               ORDER BY number""",
            f"b2:{start.removeprefix('b2:')}",
        )
        return tuple(
            ExampleRow(example=_example(id, content, prompt), active=bool(active), last=Event(at=at, what=what, id=id, detail=detail))
            for id, content, prompt, active, at, what, detail in rows
        )

    def history(self) -> tuple[Event, ...]:
        """Everything that happened, oldest first. Raises LedgerError."""
        rows = self.rows("SELECT at, what, id, detail FROM event ORDER BY number")
        return tuple(Event(at=at, what=what, id=id, detail=detail) for at, what, id, detail in rows)

    def moment(self) -> int:
        """Number of the last event."""
        return int(self.rows("SELECT max(number) FROM event")[0][0])

    def compacted(self, since: int) -> bool:
        """Whether records went into weights, or came back, after an event: what was read before and after it does not go together."""
        return bool(self.rows("SELECT 1 FROM event WHERE number > ? AND what IN ('compact', 'compact undo')", since))

    # -------------------------------------------------------------------------------------------------------- patches and verdicts

    def put_patch(self, patch: Patch, verdict: Verdict) -> str:
        """Keep a patch with what the gate said of it, passed or not. Returns its id once both are safe on the disk.

        Putting a patch again adds a verdict, which from then on is the one that counts, and mends the file if it was damaged.
        Raises InvalidPatch if the verdict is about another patch, WrongBase if the patch is for other weights, LedgerError.
        """
        with self.writing():
            self.keep_patch(patch, verdict)
        return patch.id

    def patch(self, id: str | None = None) -> Patch:
        """The latest patch that passed and holds exactly the active examples; or, by its id, any that was kept.

        The file is checked against its hash and its id before it is believed.
        Raises LedgerError if no patch qualifies, with the reason, or if its file is missing or altered; UnknownName, InvalidPatch.
        """
        whole = self._latest() if id is None else self._resolve("patch", id)
        (row,) = self.rows("SELECT id, method, examples, blob FROM patch WHERE id = ?", whole)
        return self._load_patch(*row)

    def verdict(self, patch_id: str) -> Verdict:
        """The latest verdict on a patch. Raises UnknownName, or LedgerError if it was altered."""
        patch_id = self._resolve("patch", patch_id)
        (row,) = self.rows("SELECT patch, id, content FROM verdict WHERE patch = ? ORDER BY number DESC LIMIT 1", patch_id)
        return _verdict(*row)

    def patches(self) -> tuple[PatchRow, ...]:
        """Every patch with its latest verdict, the one judged last at the end. Raises LedgerError."""
        active = {id for (id,) in self.rows("SELECT id FROM active")}
        rows = self.rows(
            """SELECT patch.id, patch.method, patch.examples, verdict.id, verdict.content, verdict.at
               FROM patch JOIN verdict ON verdict.patch = patch.id
               WHERE verdict.number = (SELECT max(number) FROM verdict WHERE patch = patch.id)
               ORDER BY verdict.number"""
        )
        return tuple(
            PatchRow(
                id=id,
                at=at,
                method=method,
                examples=tuple(examples.split()),
                verdict=_verdict(id, verdict, content),
                current=set(examples.split()) == active,
            )
            for id, method, examples, verdict, content, at in rows
        )

    # --------------------------------------------------------------------------------------------------------------------- states

    def put_state(self, state: State) -> str:
        """Keep what a method learnt. Returns its id once it is safe on the disk.

        Raises WrongBase if the state was learnt on other weights, LedgerError.
        """
        self._check_base(f"State {state.id}", state.host)
        raw = _state_bytes(state)
        with self.writing():
            blob = self._keep(raw)
            self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (state.id, blob))
            _log(self._db, "state", state.id, state.method)
        return state.id

    def state(self, id: str) -> State:
        """The state with this id, its file checked first. Raises UnknownName, or LedgerError if the file is missing or altered."""
        (row,) = self.rows("SELECT id, blob FROM state WHERE id = ?", self._resolve("state", id))
        return self._load_state(*row)

    def latest_state(self, method: str) -> State | None:
        """The newest state of a method; None if it has prepared nothing. Raises LedgerError if its file is missing or altered."""
        rows = self.rows("SELECT id FROM event WHERE what = 'state' AND detail = ? ORDER BY number DESC LIMIT 1", method)
        return self.state(rows[0][0]) if rows else None

    def put_aside(self, state: State, name: str | None = None) -> None:
        """Keep what may be made again: what a long preparation has so far, the sums of the last build. It takes the place of what was put
        aside under that name (the method's, if none is given) before. Raises WrongBase, LedgerError."""
        self._check_base(f"What {state.method} puts aside", state.host)  # to find its id is to read it all
        raw = _state_bytes(state)
        write_whole(self._aside(name or state.method), hashlib.sha256(raw).digest() + raw)

    def aside(self, name: str) -> State | None:
        """What was put aside under a name, if there is something. Raises LedgerError if the file was cut short or altered."""
        path = self._aside(name)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise LedgerError(f"What was put aside for {name} cannot be read: {path}: {e.strerror}. Begin afresh.") from e
        sha, raw = raw[:32], raw[32:]
        if hashlib.sha256(raw).digest() != sha:
            raise LedgerError(f"What was put aside for {name} was cut short or altered: {path}. Begin afresh, or remove the file.")
        return _state_from_bytes(raw, f"What was put aside for {name}")

    def drop_aside(self, name: str) -> None:
        """Remove it; no error if there is none."""
        self._aside(name).unlink(missing_ok=True)

    def _aside(self, name: str) -> Path:
        return self.path / "aside" / f"{name}.safetensors"

    # -------------------------------------------------------------------------------------------------------------------- checking

    def verify(self) -> list[Problem]:
        """Derive every hash again from what is on the disk. An empty list, or one of harmless strays only: nothing was lost or altered.

        A damaged database is reported alone, since its rows cannot be believed. Raises nothing but for a closed ledger.
        """
        problems: list[Problem] = []
        try:
            damage = [str(row[0]) for row in self.rows("PRAGMA integrity_check") if row[0] != "ok"]
            damage += [f"row {row[1]} of {row[0]} refers to a missing row of {row[2]}" for row in self.rows("PRAGMA foreign_key_check")]
            if damage:
                return [Problem(kind="database", where=str(self.path / FILE), sentence=f"The database is damaged: {d}.") for d in damage]
            problems += _refused("example", _example, self.rows("SELECT id, content, prompt FROM example"))
            problems += _refused("record", record_of, self.rows(f"SELECT {RECORD} FROM record JOIN example ON example.id = record.example"))
            problems += _refused("patch", self._load_patch, self.rows("SELECT id, method, examples, blob FROM patch"))
            problems += _refused("verdict", _verdict, self.rows("SELECT patch, id, content FROM verdict"))
            problems += _refused("state", self._load_state, self.rows("SELECT id, blob FROM state"))
            for path in self._strays():
                problems.append(Problem(kind="stray", where=str(path), sentence=f"{path} belongs to nothing that was acknowledged."))
        except LedgerError as e:
            problems.append(Problem(kind="database", where=str(self.path / FILE), sentence=str(e)))
        return problems

    def collect(self) -> list[Path]:
        """Remove the stray files that a kill left behind, and say which. Raises LedgerError."""
        with self.writing():
            strays = self._strays()
            for path in strays:
                path.unlink()
        return strays

    # ------------------------------------------------------------------------------------------- for the rooms that keep something here

    def rows(self, sql: str, *values: str | int) -> list[Any]:
        """What a statement gives. Raises LedgerError."""
        with _spoken(self.path):
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """All of the block or nothing of it.

        Blobs are written inside too: otherwise `collect` in another process could take one for a stray before its row is there.
        """
        with _spoken(self.path), _transaction(self._db):
            yield

    def log(self, what: str, id: str, detail: str) -> int:
        """Say in the log what happened, inside `writing`. Returns the number of the event."""
        return _log(self._db, what, id, detail)

    def keep_example(self, example: Example) -> str:
        """Write down an example without making it active, inside `writing`. Returns its id."""
        row = (example.id, canonical_json(example.as_dict()), plain(example.prompt))
        self._db.execute("INSERT OR REPLACE INTO example VALUES (?, ?, ?)", row)
        return example.id

    def keep_patch(self, patch: Patch, verdict: Verdict) -> None:
        """As `put_patch`, inside `writing`."""
        if verdict.patch != patch.id:
            raise InvalidPatch(f"The verdict is about patch {verdict.patch}, the patch is {patch.id}. Judge the patch that is to be kept.")
        self._check_base(f"Patch {patch.id}", patch.parent)
        examples = "\n".join(example.id for example in patch.examples)
        ruling = json.dumps(verdict.as_dict(), sort_keys=True)  # not canonical_json: a refused patch may well have a loss of NaN
        blob = self._keep(to_bytes(patch))
        self._db.execute("INSERT OR REPLACE INTO patch VALUES (?, ?, ?, ?)", (patch.id, patch.method, examples, blob))
        row = (digest("verdict", ruling), patch.id, ruling, _now())
        self._db.execute("INSERT INTO verdict (id, patch, content, at) VALUES (?, ?, ?, ?)", row)
        _log(self._db, "patch", patch.id, "passed" if verdict.passed else f"refused: {'; '.join(verdict.failures)}")

    def activate(self, example: Example, detail: str) -> bool:
        """Make an example active, inside `writing`; whether it was not so already. Raises ConflictError."""
        was = bool(self.rows("SELECT 1 FROM active WHERE id = ?", example.id))
        self._activate(example, detail)
        return not was

    def deactivate(self, id: str, detail: str) -> None:
        """Take an active example back, inside `writing`."""
        self._deactivate(id, "retract", detail)

    # -------------------------------------------------------------------------------------------------------------------- inside

    def _catch_up(self) -> None:
        with _spoken(self.path):
            version = _version(self._db)
            if version == 0:
                raise LedgerError(
                    f"{self.path / FILE} is a database with no ledger in it. Create the ledger there, or name another folder."
                )
            if version > len(MIGRATIONS):
                raise LedgerError(
                    f"The ledger {self.path} was written by a newer errata: its schema is number {version}, "
                    f"this version knows {len(MIGRATIONS)}. Update errata."
                )
            if version < len(MIGRATIONS):
                with _transaction(self._db):
                    _migrate(self._db)

    def _about(self) -> tuple[str, str, Budget]:
        rows = self.rows("SELECT host, model, budget FROM ledger")
        with _parsing(f"The ledger {self.path}"):
            ((host, model, budget),) = rows
            return host, model, Budget(**json.loads(budget))

    def _check_base(self, what: str, base: str) -> None:
        if base != self.host:
            raise WrongBase(f"{what} was made for weights {base}; this ledger is about {self.host} ({self.model}). Use a ledger for those.")

    def _resolve(self, table: Literal["active", "patch", "state"], given: str) -> str:
        """The whole id that `given` is the start of. Raises UnknownName if there is none or more than one."""
        noun = "active example" if table == "active" else table
        prefix = given if given.startswith("b2:") else f"b2:{given}"
        if len(prefix) < len("b2:") + SHORTEST:
            raise UnknownName(f"'{given}' is too short to name one {noun}. Write {SHORTEST} hex digits of its id or more.")
        found = [id for (id,) in self.rows(f"SELECT id FROM {table} WHERE substr(id, 1, length(?1)) = ?1 ORDER BY id", prefix)]
        if not found:
            if table == "active" and (gone := [row for row in self.examples(prefix) if not row.active]):
                raise UnknownName(
                    f"Example {gone[-1].example.id} is not active: {_ENDED[gone[-1].last.what]} {gone[-1].last.at[:19]} (UTC)."
                )
            raise UnknownName.among(noun, given, [id for (id,) in self.rows(f"SELECT id FROM {table}")])
        if len(found) > 1:
            raise UnknownName(f"'{given}' is the start of more than one {noun}: {', '.join(found)}. Write more of it.")
        return str(found[0])

    def _activate(self, example: Example, detail: str) -> None:
        id, prompt = example.id, plain(example.prompt)
        if self.rows("SELECT 1 FROM active WHERE id = ?", id):
            return
        for row in self.rows("SELECT id, content, prompt FROM example JOIN active USING (id) WHERE prompt = ? ORDER BY place", prompt):
            if contradict(other := _example(*row), example):
                raise ConflictError(
                    f"Two examples for '{prompt}' contradict each other: {claim(other)} ({other.id}) and {claim(example)} ({id}). "
                    f"Supersede the first with the second, or retract the first, or leave the second out."
                )
        self.keep_example(example)
        self._db.execute("INSERT INTO active (id) VALUES (?)", (id,))
        _log(self._db, "add", id, detail)

    def _deactivate(self, id: str, what: str, detail: str) -> None:
        self._db.execute("DELETE FROM active WHERE id = ?", (id,))
        _log(self._db, what, id, detail)

    def _latest(self) -> str:
        """Id of the latest patch that passed and is current. Raises LedgerError with the reason why there is none."""
        rows = self.patches()
        passed = [row.id for row in rows if row.current and row.verdict.passed]
        if not passed:
            raise LedgerError(_why_no_patch(rows, {id for (id,) in self.rows("SELECT id FROM active")}))
        return passed[-1]

    # ------------------------------------------------------------------------------------------------------------------------ blobs

    def _blob_path(self, sha: str) -> Path:
        return self.path / "blobs" / sha[:2] / f"{sha}.safetensors"

    def _keep(self, raw: bytes) -> str:
        """Write a blob by the commit protocol; also one that is there already, which mends it if it was damaged."""
        sha = hashlib.sha256(raw).hexdigest()
        write_whole(self._blob_path(sha), raw)
        return sha

    def _blob(self, sha: str, owner: str) -> bytes:
        path = self._blob_path(sha)
        try:
            raw = path.read_bytes()
        except OSError as e:
            raise LedgerError(
                f"The file of {owner} cannot be read: {path}: {e.strerror}. Restore it from a copy, or build it again."
            ) from e
        if hashlib.sha256(raw).hexdigest() != sha:
            raise LedgerError(f"The file of {owner} was cut short or altered: {path}. Restore it from a copy, or build it again.")
        return raw

    def _load_patch(self, id: str, method: str, examples: str, blob: str) -> Patch:
        patch = from_bytes(self._blob(blob, f"patch {id}"), f"patch {id}")
        if (patch.id, patch.method, [e.id for e in patch.examples]) != (id, method, examples.split()):
            raise LedgerError(f"The row of patch {id} was altered: its file holds another patch. Build it again.")
        return patch

    def _load_state(self, id: str, blob: str) -> State:
        state = _state_from_bytes(self._blob(blob, f"state {id}"), f"State {id}")
        if state.id != id:
            raise LedgerError(f"The row of state {id} was altered: its file holds state {state.id}. Prepare it again.")
        return state

    def _strays(self) -> list[Path]:
        """Blobs that no row refers to, and temporary files. Whatever else someone put there is not ours to judge."""
        kept = {self._blob_path(sha) for (sha,) in self.rows("SELECT blob FROM patch UNION SELECT blob FROM state")}
        found = [*self.path.glob("blobs/??/*.safetensors"), *self.path.glob(f"blobs/??/{TEMPORARY}*")]
        return sorted(path for path in found if path not in kept)


# --------------------------------------------------------------------------------------------------------------------------- database


def _connect(file: Path, mode: Literal["rw", "rwc"]) -> sqlite3.Connection:
    db = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite rolls back by itself when the disk is full
            db.execute("ROLLBACK")
        raise


_ENDED = {"retract": "it was retracted at", "supersede": "another took its place at"}

_REASONS = {
    sqlite3.SQLITE_BUSY: "is being written by another process. Try again when it has finished.",
    sqlite3.SQLITE_FULL: "cannot be written: the disk is full. Nothing was changed; make room and try again.",
    # a commit whose sync failed may still be found when the ledger is opened again
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk reports an error. The change is there whole or not at all; check the disk.",
    sqlite3.SQLITE_READONLY: "cannot be written: the folder is read-only for you. Nothing was changed; mend its permissions.",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened for writing. Check that the folder is there and that you may write it.",
}


@contextmanager
def _spoken(path: Path) -> Iterator[None]:
    """What SQLite and the disk raise inside the block comes out as a LedgerError about the ledger at `path`."""
    try:
        yield
    except (EditError, sqlite3.ProgrammingError):  # the second is our own mistake, or a closed ledger
        raise
    except (sqlite3.Error, UnicodeDecodeError) as e:  # a damaged schema can make the message itself undecodable
        code = getattr(e, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # the low byte is the kind, the rest a detail
        reason = _REASONS.get(code, f"is damaged: {e}. Restore the folder from a copy.")
        raise LedgerError(f"The ledger {path} {reason}") from e
    except OSError as e:
        raise LedgerError(f"The ledger {path} cannot be written: {e.strerror}. Mend that and try again.") from e


def _log(db: sqlite3.Connection, what: str, id: str, detail: str) -> int:
    number = db.execute("INSERT INTO event (at, what, id, detail) VALUES (?, ?, ?, ?)", (_now(), what, id, detail)).lastrowid
    assert number is not None
    return number


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# -------------------------------------------------------------------------------------------------------------- rows, read and checked


@contextmanager
def _parsing(what: str) -> Iterator[None]:
    """Whatever a value in the ledger cannot be turned into comes out as a LedgerError about `what`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as e:
        raise LedgerError(f"{what} cannot be read: {e}. Restore the folder from a copy.") from e


def _example(id: str, content: str, prompt: str) -> Example:
    with _parsing(f"Example {id}"):
        example = Example(**json.loads(content))
    if (example.id, plain(example.prompt)) != (id, prompt):
        raise LedgerError(f"The row of example {id} was altered. Retract it and add it again.")
    return example


RECORD = "record.id, example.content, example.prompt, example.id, record.scope"  # the columns that `record_of` reads


def record_of(id: str, content: str, prompt: str, example_id: str, scope: str) -> Record:
    """The record that a row holds, checked against its hashes. Raises LedgerError."""
    example = _example(example_id, content, prompt)
    with _parsing(f"Record {id}"):
        record = Record.from_dict(example.as_dict() | json.loads(scope))
    if record.id != id:
        raise LedgerError(f"The row of record {id} was altered. Retract it and add it again.")
    return record


def _verdict(patch_id: str, id: str, content: str) -> Verdict:
    with _parsing(f"The verdict on patch {patch_id}"):
        raw = json.loads(content)
        if digest("verdict", content) != id or raw["patch"] != patch_id:
            raise LedgerError(f"The verdict on patch {patch_id} was altered. Judge the patch again.")
        return Verdict.from_dict(raw)


def _refused(kind: Kind, read: Callable[..., object], rows: Iterable[Any]) -> Iterator[Problem]:
    """One problem for each row that `read` refuses: what readers check and what `verify` checks is the same code."""
    for row in rows:
        try:
            read(*row)
        except EditError as e:
            yield Problem(kind=kind, where=row[0], sentence=str(e))


def _why_no_patch(rows: tuple[PatchRow, ...], active: set[str]) -> str:
    """Why none of `rows`, the one judged last at the end, can be handed out, and what to do."""
    if not active:
        return "No example is active, so there is no patch: the base model stands as it is. Add an example and run 'errata build'."
    current = [row for row in rows if row.current]
    if current:
        why = f"The patch of the active examples, {current[-1].id}, did not pass: {'; '.join(current[-1].verdict.failures)}."
        return f"{why} Build with another method, fewer examples or a wider budget, or ask for this patch by its id."
    passed = [row for row in rows if row.verdict.passed]
    if not passed:
        return "No patch has passed yet. Run 'errata build'."
    missing, surplus = len(active.difference(passed[-1].examples)), len(set(passed[-1].examples) - active)
    why = f"The last patch that passed, {passed[-1].id}, is out of date: it lacks {missing} active and holds {surplus} inactive example(s)."
    return f"{why} Run 'errata build' again, or ask for this patch by its id."


def _state_bytes(state: State) -> bytes:
    """A safetensors file with everything but the tensors as JSON in its header."""
    manifest = {
        "format": STATE_FORMAT,
        "method": state.method,
        "host": state.host,
        "config": dict(state.config),
        "trained_on": sorted(state.trained_on),
    }
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.tensors.items()}  # two names may share one storage
    raw: bytes = bytes_from_tensors(tensors, metadata={"errata": canonical_json(manifest)})
    return raw


def _state_from_bytes(raw: bytes, what: str) -> State:
    """The inverse of `_state_bytes`, for bytes whose hash was checked. Raises LedgerError."""
    with _parsing(what):
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])  # safetensors: length, header as JSON, tensors
        manifest = json.loads(header["__metadata__"]["errata"])
        if manifest["format"] != STATE_FORMAT:
            raise ValueError(f"it has format '{manifest['format']}', this version reads '{STATE_FORMAT}'")
        return State(
            method=manifest["method"],
            host=manifest["host"],
            config=manifest["config"],
            tensors=tensors_from_bytes(raw),
            trained_on=frozenset(manifest["trained_on"]),
        )


# ----------------------------------------------------------------------------------------------------------------------- contradictions


def plain(text: str) -> str:
    """`text` with each run of white space as one space."""
    return " ".join(text.split())


def claim(example: Example) -> str:
    """What an example asks for, in words."""
    against = f" against '{example.contrast}'" if example.contrast is not None else ""
    return f"{example.goal} '{example.target}'{against}"


def contradict(a: Example, b: Example) -> bool:
    """Whether no model can do what both examples of one prompt ask for. Several targets may be lowered; only one may be raised."""
    a, b = sorted((a, b), key=lambda example: GOALS.index(example.goal))
    a_target, b_target = plain(a.target), plain(b.target)
    a_contrast, b_contrast = plain(a.contrast or ""), plain(b.contrast or "")
    match a.goal, b.goal:
        case "raise", "raise":
            return a_target != b_target
        case "raise", "lower":
            return a_target == b_target
        case "raise", "prefer":  # b puts something else above the answer
            return a_target == b_contrast
        case "raise", "balance":  # b gives the answer an equal
            return a_target in (b_target, b_contrast)
        case "prefer", "prefer":
            return (a_target, a_contrast) == (b_contrast, b_target)
        case "prefer", "balance":
            return {a_target, a_contrast} == {b_target, b_contrast}
        case _:
            return False
