"""zsRE, questions and answers, in the layouts of mend@e04fdb9 (an `alt` answer is the edit) and malmen@1df295d (`ans` is).

    {"src", "rephrase", "alt" | "ans", "loc", "loc_ans", "subject"?, ...}

The unrelated question is one of Natural Questions, without its question mark there; MALMEN adds it, and so do we. What the unedited
model answers is not in the file (`pred` is another model's), so `Case.old` is left to be found.
"""

from collections.abc import Mapping
from typing import Any

from errata.tasks._layouts import asked, behind, spoken_of
from errata.types import Case, Example, Neighbour

KEYS = frozenset({"src", "rephrase", "loc", "loc_ans"})


def case(raw: Mapping[str, Any]) -> Case:
    """Raises InvalidExample for a record that lacks something, or in which something is no text."""
    question, unrelated = asked(raw, "src"), asked(raw, "loc")
    return Case(
        example=Example(prompt=question, target=behind(raw, "alt" if "alt" in raw else "ans"), subject=spoken_of(raw, question)),
        paraphrases=(asked(raw, "rephrase"),),
        neighbours=(Neighbour(prompt=unrelated.removesuffix("?") + "?", answer=behind(raw, "loc_ans"), ring="unrelated"),),
        source="zsre",
    )
