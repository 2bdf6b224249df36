"""Patch <-> one safetensors file, checked before it is believed.

The header carries the manifest (method, config, parent, examples, ops, id), the body the tensors. Nothing in the file is code and
nothing is unpickled. A file that was cut, altered, blown up or made for something else is refused with a sentence. Nothing here applies a
patch or keeps one: see `apply.py` and `ledger.py`.
"""

import json
import os
import secrets
import stat
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from errata.types import OPS, AddLowRank, EditError, Ensemble, Example, InvalidPatch, LedgerError, Memory, Op, Patch, Senses, canonical_json

FORMAT = "errata-patch-1"
MAX_HEADER = 100_000_000  # bytes, which is safetensors' own limit: some hundred thousand examples
MAX_BYTES = 64 << 30
TEMPORARY = ".tmp-"  # how names begin that are not to stay; a kill may leave one behind


def _in_order(patch: Patch) -> list[Op]:
    return sorted(patch.ops, key=lambda op: op.weight)


def _manifest(patch: Patch, id: str) -> str:
    ops = [{"kind": type(op).__name__, "weight": op.weight} | _besides_tensors(op) for op in _in_order(patch)]
    manifest = {
        "format": FORMAT,
        "id": id,
        "method": patch.method,
        "config": dict(patch.config),
        "parent": patch.parent,
        "examples": [e.as_dict() for e in patch.examples],
        "ops": ops,
    }
    return canonical_json(manifest)


def _besides_tensors(op: Op) -> dict[str, Any]:
    match op:
        case AddLowRank():
            return {"scale": op.scale}
        case Ensemble():
            return {"scale": op.scale, "small": op.small, "parent": op.parent, "senses": op.shift.weight}
        case Memory():
            return op.said
        case _:
            return {}


def _op(row: dict[str, Any], tensors: dict[str, Any]) -> Op:
    """The op that `row` of a manifest tells of."""
    kind = OPS[row["kind"]]
    if kind is Ensemble:
        shift = Senses(weight=row["senses"], **tensors)
        return Ensemble(weight=row["weight"], small=row["small"], parent=row["parent"], shift=shift, scale=row["scale"])
    if kind is Memory:
        own = {name: tensors.pop(name) for name in ("vectors", "owner", "radii") if name in tensors}
        return Memory(**{key: value for key, value in row.items() if key != "kind"}, **own, parts=tensors)
    extra: dict[str, Any] = {"scale": row["scale"]} if kind is AddLowRank else {}
    return kind(weight=row["weight"], **tensors, **extra)


def to_bytes(patch: Patch) -> bytes:
    """The file's content; the same patch always gives the same bytes. Raises InvalidPatch if no reader would take them."""
    # cloned: safetensors takes no two views of one storage, and two ops may share a factor
    tensors = {
        f"{i}.{name}": t.detach().clone(memory_format=torch.contiguous_format)
        for i, op in enumerate(_in_order(patch))
        for name, t in op.tensors.items()
    }
    manifest = _manifest(patch, patch.id)
    if 2 * len(manifest.encode()) > MAX_HEADER:  # twice, for the header quotes it once more
        raise InvalidPatch(
            f"The examples and settings of a patch by {patch.method} are too long for one file. Divide it into several patches."
        )
    raw: bytes = bytes_from_tensors(tensors, metadata={"errata": manifest})
    return raw


def from_bytes(raw: bytes, name: str = "the file") -> Patch:
    """The inverse of `to_bytes`. Every byte is accounted for: the patch that comes out must have the id that the manifest states.

    Raises InvalidPatch.
    """
    metadata = _header(raw, name).get("__metadata__", {})
    try:
        manifest = json.loads(metadata["errata"])
        stated = manifest["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise InvalidPatch(f"{name} is a safetensors file, but not a patch of errata.") from e
    if stated != FORMAT:
        raise InvalidPatch(f"{name} has format '{stated}', this version reads '{FORMAT}'.")
    try:
        tensors = tensors_from_bytes(raw)
        ops = []
        for i, row in enumerate(manifest["ops"]):
            own = {key.split(".", 1)[1]: tensors.pop(key) for key in sorted(tensors) if key.split(".", 1)[0] == str(i)}
            ops.append(_op(row, own))
        patch = Patch(
            method=manifest["method"],
            config=manifest["config"],
            parent=manifest["parent"],
            examples=tuple(Example(**e) for e in manifest["examples"]),
            ops=tuple(ops),
        )
        stated, id = manifest["id"], patch.id
    except EditError as e:
        raise InvalidPatch(f"{name} is damaged: {e}") from e
    except SafetensorError as e:  # the library does not say which: fewer bytes than the header names, or other ones
        raise InvalidPatch(f"{name} is damaged or cut short: its header and its {len(raw)} bytes do not fit together.") from e
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as e:
        raise InvalidPatch(f"{name} is damaged: {e!r}.") from e
    if tensors:
        raise InvalidPatch(f"{name} holds tensors that no op names: {', '.join(sorted(tensors))}.")
    if id != stated:
        raise InvalidPatch(f"{name} was altered: it states the id {stated}, its content has {id}.")
    if metadata != {"errata": _manifest(patch, id)}:
        raise InvalidPatch(f"{name} was altered: its manifest says more than errata wrote, or says it otherwise.")
    return patch


def _header(raw: bytes, name: str) -> dict[str, Any]:
    """The safetensors header, refused before anything of the stated size is allocated."""
    # the length comes first, and its low byte may well be 0x80: only what does not go on with "{" is taken for a pickle
    if raw[8:9] != b"{" and (raw[:4] == b"PK\3\4" or raw[:1] == b"\x80"):
        raise InvalidPatch(f"{name} is a pickle. Errata reads only safetensors files, which cannot run code.")
    if len(raw) < 8:
        raise InvalidPatch(f"{name} is cut short: {len(raw)} bytes, a safetensors file has 8 or more.")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > MAX_HEADER:
        raise InvalidPatch(
            f"{name} states a header of {length} bytes, the limit is {MAX_HEADER}: it is damaged, or not a safetensors file."
        )
    if 8 + length > len(raw):
        raise InvalidPatch(f"{name} is cut short: its header should have {length} bytes, {len(raw) - 8} are there.")
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError) as e:
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
        found = path.stat()
        is_file = stat.S_ISREG(found.st_mode)  # a pipe would never end
        raw = path.read_bytes() if is_file and found.st_size <= MAX_BYTES else None
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise InvalidPatch(f"Cannot read the patch {path}: {getattr(e, 'strerror', None) or e}.") from e
    if raw is None:
        why = f"it has {found.st_size} bytes, over the limit of {MAX_BYTES}" if is_file else "it is not a file"
        raise InvalidPatch(f"Cannot read the patch {path}: {why}.")
    return from_bytes(raw, str(path))


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it that are missing, each safe on the disk: a name is kept by the folder that it stands in.

    Raises OSError.
    """
    for new in reversed([f for f in (folder, *folder.parents) if not f.is_dir()]):
        new.mkdir(exist_ok=True)
        _sync(new.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, raw: bytes) -> None:
    """Temporary file in the same folder, fsync, rename, fsync of the folder: readers see the old file or the new, never half of one.

    A link is replaced, not followed: what it points to may be somebody's record. Raises LedgerError if the disk refuses.
    """
    outcome = "Nothing was changed"
    try:
        make_folder(path.parent)
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"  # not tempfile's: its files cannot be read by anybody else
        try:
            with open(temporary, "xb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        outcome = "The file was replaced, but the disk did not confirm it"
        _sync(path.parent)
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise LedgerError(f"Cannot write {path}: {getattr(e, 'strerror', None) or e}. {outcome}.") from e
