"""The vectors of texts, kept by (encoder, text) in a SQLite file of their own, so that a text is encoded once.

All of it may be made again. So the file stands beside the ledger's database and not in it, is not synced at each step, and is begun afresh,
with a note, where it turns out to be damaged. Vectors are kept as float16: a coordinate is off by a two-thousandth of itself at most, and a
cosine by far less than what tells two questions apart.
"""

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float16

from errata.artefact import make_folder
from errata.memory.encoder import Encoder
from errata.types import LedgerError

Halves = Float16[np.ndarray, "N D"]
BATCH = 4096  # texts that are looked up, or encoded and kept, together
BUSY_SECONDS = 5.0


@final
class Cache:
    """An open file of vectors. Close it."""

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        """Open the file at `path`, or make it. `note` hears it if it was damaged. Raises LedgerError if it cannot be had."""
        self.path, self.note = path, note
        try:
            make_folder(path.parent)
            self._db = self._open()
        except (OSError, sqlite3.OperationalError) as e:
            raise LedgerError(f"The vectors in {path} cannot be opened: {e}. Check that you may write there.") from e

    def close(self) -> None:
        self._db.close()

    def of(self, encoder: Encoder, texts: Sequence[str]) -> Halves:
        """(N, D) the vector of each text; those that are not kept yet are encoded and kept. Raises InvalidExample, LedgerError."""
        out = np.empty((len(texts), encoder.width), dtype=np.float16)
        for at in range(0, len(texts), BATCH):
            out[at : at + BATCH] = self._batch(encoder, texts[at : at + BATCH])
        return out

    def _batch(self, encoder: Encoder, texts: Sequence[str]) -> Halves:
        names = [_name(encoder, text) for text in texts]
        known = self._kept(names, 2 * encoder.width)
        if missing := {name: text for name, text in zip(names, texts, strict=True) if name not in known}:
            made = encoder.encode(list(missing.values())).astype(np.float16)
            new = {name: row.tobytes() for name, row in zip(missing, made, strict=True)}
            self._keep(new)
            known |= new
        return np.frombuffer(b"".join(known[name] for name in names), dtype=np.float16).reshape(len(texts), encoder.width)

    def _kept(self, names: list[bytes], size: int) -> dict[bytes, bytes]:
        try:
            found: dict[bytes, bytes] = {}
            for at in range(0, len(names), 500):  # SQLite bounds the number of parameters
                part = names[at : at + 500]
                found |= self._db.execute(f"SELECT name, vector FROM vector WHERE name IN ({','.join('?' * len(part))})", part).fetchall()
            return {name: raw for name, raw in found.items() if len(raw) == size}
        except sqlite3.DatabaseError as e:
            self._begin_afresh(e)
            return {}

    def _keep(self, new: dict[bytes, bytes]) -> None:
        try:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO vector VALUES (?, ?)", new.items())
        except sqlite3.OperationalError as e:
            self.note(f"New vectors could not be kept in {self.path}: {e}. They will be encoded again when they are needed.")
        except sqlite3.DatabaseError as e:
            self._begin_afresh(e)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is encoded again
            db.execute("CREATE TABLE IF NOT EXISTS vector (name BLOB PRIMARY KEY, vector BLOB NOT NULL) STRICT")
        except sqlite3.OperationalError:
            db.close()
            raise
        except sqlite3.DatabaseError as e:
            db.close()
            self._remove(e)
            return self._open()
        return db

    def _begin_afresh(self, why: sqlite3.DatabaseError) -> None:
        if isinstance(why, sqlite3.OperationalError):  # busy or full, and not damaged
            raise LedgerError(f"The vectors in {self.path} cannot be read: {why}. Try again.") from why
        self._db.close()
        self._remove(why)
        self._db = self._open()

    def _remove(self, why: sqlite3.DatabaseError) -> None:
        self.note(f"The vectors in {self.path} are damaged ({why}). They are encoded again.")
        for end in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)


def _name(encoder: Encoder, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, key=encoder.id.encode()).digest()
