"""CounterFact, sentences with another object, in the flat layout of EasyEdit@14cea82.

    {"prompt", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth", "subject"?, "case_id"?}

The locality prompt asks the same of another subject, of whom the ground truth is true.
"""

from collections.abc import Mapping
from typing import Any

from errata.tasks._layouts import asked, behind, spoken_of
from errata.types import Case, Example, Neighbour

KEYS = frozenset({"prompt", "target_new", "rephrase_prompt", "locality_prompt"})


def case(raw: Mapping[str, Any]) -> Case:
    """Raises InvalidExample for a record that lacks something, or in which something is no text."""
    prompt = asked(raw, "prompt")
    return Case(
        example=Example(prompt=prompt, target=behind(raw, "target_new"), subject=spoken_of(raw, prompt)),
        old=behind(raw, "ground_truth"),
        paraphrases=(asked(raw, "rephrase_prompt"),),
        neighbours=(Neighbour(prompt=asked(raw, "locality_prompt"), answer=behind(raw, "locality_ground_truth"), ring="relation"),),
        source=f"counterfact/{raw.get('case_id', '')}",
    )
