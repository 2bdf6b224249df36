"""CounterFact, sentences with another object: as published (Meng et al. 2022, arXiv 2202.05262); and in the flat form of EasyEdit@14cea82.

    {"requested_rewrite": {"prompt": "The mother tongue of {} is", "subject", "target_new": {"str"}, "target_true": {"str"}},
     "paraphrase_prompts": [...], "neighborhood_prompts": [...], "case_id"?}
    {"prompt", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth", "subject"?, "case_id"?}

The prompts of the neighbourhood ask the same of other subjects, of whom the old object is true.
"""

from collections.abc import Mapping
from typing import Any

from errata.tasks._layouts import asked, behind, spoken_of, table, texts
from errata.types import Case, Example, InvalidExample, Neighbour

KEYS = frozenset({"requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"})
FLAT_KEYS = frozenset({"prompt", "target_new", "rephrase_prompt", "locality_prompt"})


def case(raw: Mapping[str, Any]) -> Case:
    """Of a record as published. Raises InvalidExample for one that lacks something, or in which something is no text."""
    rewrite = table(raw["requested_rewrite"])
    form, subject = asked(rewrite, "prompt"), asked(rewrite, "subject")
    if "{}" not in form:
        raise InvalidExample(f"'prompt' is to hold {{}} where the subject stands, got {form!r}.")
    new, old = (_object(rewrite, key) for key in ("target_new", "target_true"))
    return Case(
        example=Example(prompt=form.replace("{}", subject), target=new, subject=subject),
        old=old,
        paraphrases=texts(raw, "paraphrase_prompts"),
        neighbours=tuple(Neighbour(prompt=prompt, answer=old, ring="relation") for prompt in texts(raw, "neighborhood_prompts")),
        source=f"counterfact/{raw.get('case_id', '')}",
    )


def _object(rewrite: Mapping[str, Any], key: str) -> str:
    if not isinstance(found := rewrite.get(key), Mapping):
        raise InvalidExample(f"'{key}' is to be a table with 'str', got {found!r}.")
    return behind(found, "str")


def flat(raw: Mapping[str, Any]) -> Case:
    """Of a flat record. Raises InvalidExample as `case`."""
    prompt = asked(raw, "prompt")
    return Case(
        example=Example(prompt=prompt, target=behind(raw, "target_new"), subject=spoken_of(raw, prompt)),
        old=behind(raw, "ground_truth"),
        paraphrases=(asked(raw, "rephrase_prompt"),),
        neighbours=(Neighbour(prompt=asked(raw, "locality_prompt"), answer=behind(raw, "locality_ground_truth"), ring="relation"),),
        source=f"counterfact/{raw.get('case_id', '')}",
    )
