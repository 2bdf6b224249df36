"""What the published layouts of edits share: the records of a file, and a record's texts as prompts and answers."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from errata import text
from errata.types import EditError, InvalidExample

T = TypeVar("T")


def records(path: str | Path) -> list[tuple[str, Any]]:
    """("Line 3 of PATH", the line), or ("Record 3 of PATH", what it is) of a JSON list. Raises InvalidExample."""
    # a line that is not UTF-8 holds what no example may, which is told of that line
    found = text.lines(Path(path), "file of examples or cases", InvalidExample, "surrogateescape")
    if not found[0][1].lstrip().startswith("["):
        return list(found)
    try:
        whole = json.loads("\n".join(line for _, line in found))
    except (ValueError, RecursionError) as e:
        raise InvalidExample(f"{path} begins like a JSON list and is none: {e}.") from e
    return listed(whole, path)


def listed(found: list[Any], what: str | Path) -> list[tuple[str, Any]]:
    """("Record 3 of WHAT", what it is) of a list. Raises InvalidExample for an empty one."""
    if not found:
        raise InvalidExample(f"The list in {what} is empty.")
    return [(f"Record {n} of {what}", record) for n, record in enumerate(found, 1)]


def check_text(record: Any) -> None:
    """Raises InvalidExample for a line that is not UTF-8."""
    try:
        str(record).encode()
    except UnicodeEncodeError as e:
        raise InvalidExample("this is not UTF-8 text.") from e


def table(record: Any) -> dict[str, Any]:
    """A record, or what is said in JSON on its line. Raises InvalidExample."""
    check_text(record)
    try:
        raw = json.loads(record) if isinstance(record, str) else record
    except (ValueError, RecursionError) as e:
        raise InvalidExample(f"this is not JSON: {e}.") from e
    if not isinstance(raw, dict):
        raise InvalidExample(f"a record is a table, got {raw!r}.")
    return raw


@contextmanager
def named(where: str) -> Iterator[None]:
    """Whatever is wrong inside the block is told with where it stands. Raises InvalidExample."""
    try:
        yield
    except EditError as e:
        raise InvalidExample(f"{where}: {e}") from e


def sound(found: Iterable[tuple[str, Any]], make: Callable[[str, Any], T]) -> tuple[list[T], list[InvalidExample]]:
    """(what the sound records make, what is wrong with each of the others): among thousands a bad one need not cost the others."""
    made, wrong = list[T](), list[InvalidExample]()
    for where, record in found:
        try:
            with named(where):
                made.append(make(where, record))
        except InvalidExample as e:
            wrong.append(e)
    return made, wrong


def asked(raw: Mapping[str, Any], key: str) -> str:
    """A text of the record, without the space around it. Raises InvalidExample."""
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InvalidExample(f"the record has no '{key}'." if value is None else f"'{key}' is to be a text, got {value!r}.")
    return value.strip()


def texts(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of texts, without the space around them. Raises InvalidExample."""
    if not isinstance(found := raw.get(key), list):
        raise InvalidExample(f"'{key}' is a list of texts, got {found!r}.")
    return tuple(asked({key: one}, key) for one in found)


def behind(raw: Mapping[str, Any], key: str) -> str:
    """An answer, as it stands behind its prompt: with one space."""
    return f" {asked(raw, key)}"


def spoken_of(raw: Mapping[str, Any], prompt: str) -> str | None:
    """The subject, if the prompt names it so."""
    subject = raw.get("subject")
    return subject if isinstance(subject, str) and subject and subject in prompt else None
