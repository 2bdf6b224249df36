"""FEVER, claims that are true or not, in the layout of malmen@1df295d.

    {"prompt", "equiv_prompt": [...], "alt": "SUPPORTS" | "REFUTES", "unrel_prompt", "unrel_ans"}

A claim is a prompt and its verdict the answer: " true" or " false".
"""

from collections.abc import Mapping
from typing import Any

from errata.tasks._layouts import asked, texts
from errata.types import Case, Example, InvalidExample, Neighbour

KEYS = frozenset({"prompt", "equiv_prompt", "unrel_prompt"})
VERDICTS = {"SUPPORTS": " true", "REFUTES": " false"}


def case(raw: Mapping[str, Any]) -> Case:
    """Raises InvalidExample for a record that lacks something, or with another verdict."""
    return Case(
        example=Example(prompt=asked(raw, "prompt"), target=_verdict(raw, "alt")),
        paraphrases=texts(raw, "equiv_prompt"),
        neighbours=(Neighbour(prompt=asked(raw, "unrel_prompt"), answer=_verdict(raw, "unrel_ans"), ring="unrelated"),),
        source="fever",
    )


def _verdict(raw: Mapping[str, Any], key: str) -> str:
    if not isinstance(said := raw.get(key), str) or said not in VERDICTS:
        raise InvalidExample(f"'{key}' is {' or '.join(VERDICTS)}, got {said!r}.")
    return VERDICTS[said]
