"""What the published layouts of edits share: a record's texts as prompts and answers."""

from collections.abc import Mapping
from typing import Any

from errata.types import InvalidExample


def asked(raw: Mapping[str, Any], key: str) -> str:
    """A text of the record, without the space around it. Raises InvalidExample."""
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InvalidExample(f"the record has no '{key}'." if value is None else f"'{key}' is to be a text, got {value!r}.")
    return value.strip()


def behind(raw: Mapping[str, Any], key: str) -> str:
    """An answer, as it stands behind its prompt: with one space."""
    return f" {asked(raw, key)}"


def spoken_of(raw: Mapping[str, Any], prompt: str) -> str | None:
    """The subject, if the prompt names it so."""
    subject = raw.get("subject")
    return subject if isinstance(subject, str) and subject and subject in prompt else None
