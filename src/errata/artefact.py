"""Patch <-> one safetensors file, checked before it is believed.

The header carries the manifest (method, config, parent, examples, ops, id), the body the tensors. Nothing in the file is code and
nothing is unpickled. A file that was cut, altered, blown up or made for something else is refused with a sentence. Nothing here applies a
patch or keeps one: see `apply.py` and `ledger.py`.
"""

import json
import os
import struct
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from errata.types import OPS, AddLowRank, EditError, Example, InvalidPatch, LedgerError, Patch, canonical_json

FORMAT = "errata-patch-1"
MAX_HEADER = 16 << 20  # bytes; the manifest of a hundred thousand examples is smaller
MAX_BYTES = 64 << 30


def to_bytes(patch: Patch) -> bytes:
    """The file's content; the same patch always gives the same bytes."""
    ops = sorted(patch.ops, key=lambda op: op.weight)
    manifest = {
        "format": FORMAT,
        "id": patch.id,
        "method": patch.method,
        "config": dict(patch.config),
        "parent": patch.parent,
        "examples": [e.as_dict() for e in patch.examples],
        "ops": [{"kind": type(op).__name__, "weight": op.weight} | ({"scale": op.scale} if isinstance(op, AddLowRank) else {}) for op in ops],
    }
    tensors = {f"{i}.{name}": t.contiguous() for i, op in enumerate(ops) for name, t in op.tensors.items()}
    return bytes_from_tensors(tensors, metadata={"errata": canonical_json(manifest)})


def from_bytes(raw: bytes, name: str = "the file") -> Patch:
    """The inverse of `to_bytes`. Every byte is accounted for: the patch that comes out must have the id that the manifest states.

    Raises InvalidPatch.
    """
    if raw[:2] == b"PK" or raw[:1] == b"\x80":
        raise InvalidPatch(f"{name} is a pickle. Errata reads only safetensors files, which cannot run code.")
    header = _header(raw, name)
    try:
        manifest = json.loads(header["__metadata__"]["errata"])
        if manifest["format"] != FORMAT:
            raise InvalidPatch(f"{name} has format '{manifest['format']}', this version reads '{FORMAT}'.")
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, EditError):
            raise
        raise InvalidPatch(f"{name} is a safetensors file, but not a patch of errata.") from e
    try:
        tensors = tensors_from_bytes(raw)
        ops = []
        for i, row in enumerate(manifest["ops"]):
            kind = OPS[row["kind"]]
            own = {key.split(".", 1)[1]: tensors.pop(key) for key in sorted(tensors) if key.split(".", 1)[0] == str(i)}
            extra = {"scale": row["scale"]} if kind is AddLowRank else {}
            ops.append(kind(weight=row["weight"], **own, **extra))
        if tensors:
            raise InvalidPatch(f"{name} holds tensors that no op names: {', '.join(sorted(tensors))}.")
        patch = Patch(
            method=manifest["method"],
            config=manifest["config"],
            parent=manifest["parent"],
            examples=tuple(Example(**e) for e in manifest["examples"]),
            ops=tuple(ops),
        )
    except (SafetensorError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise InvalidPatch(f"{name} is damaged: {e}.") from e
    if patch.id != manifest.get("id"):
        raise InvalidPatch(f"{name} was altered: it states the id {manifest.get('id')}, its content has {patch.id}.")
    return patch


def _header(raw: bytes, name: str) -> dict[str, dict[str, str]]:
    """The safetensors header, refused before anything of the stated size is allocated."""
    if len(raw) < 8:
        raise InvalidPatch(f"{name} is cut short: {len(raw)} bytes, a safetensors file has 8 or more.")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > MAX_HEADER:
        raise InvalidPatch(f"{name} states a header of {length} bytes, over the limit of {MAX_HEADER}: it is damaged, or not a safetensors file.")
    if 8 + length > len(raw):
        raise InvalidPatch(f"{name} is cut short: its header should have {length} bytes, {len(raw) - 8} are there.")
    try:
        header = json.loads(raw[8 : 8 + length])
    except ValueError as e:
        raise InvalidPatch(f"{name} is damaged: its header is not JSON.") from e
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise InvalidPatch(f"{name} is damaged: its header is not a table.")
    return header


def save(patch: Patch, path: str | Path) -> Path:
    """Write the patch whole or not at all. Raises LedgerError if the disk refuses."""
    path = Path(path)
    write_whole(path, to_bytes(patch))
    return path


def load_patch(path: str | Path) -> Patch:
    """Read and check a patch. Raises InvalidPatch, also for a file that is not there."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InvalidPatch(f"{path} has {size} bytes, over the limit of {MAX_BYTES}.")
        return from_bytes(path.read_bytes(), str(path))
    except OSError as e:
        raise InvalidPatch(f"Cannot read the patch {path}: {e.strerror}.") from e


def write_whole(path: Path, raw: bytes) -> None:
    """Temporary file in the same folder, fsync, rename, fsync of the folder: readers see the old file or the new, never half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise LedgerError(f"Cannot write {path}: {e.strerror}. Nothing was changed.") from e
