"""Published layouts of edits: a record becomes the case that its data set means; what is wrong with one is said by its number."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import real

from errata.evaluate import read_cases, read_sound_cases
from errata.types import Case, Example, InvalidExample, Neighbour

ZSRE = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "pred": "uniform",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform"],
    "loc": "nq question: who wrote the song",
    "loc_ans": "Walter Sobchak",
}
COUNTERFACT = {
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}
PUBLISHED = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Shayna does this. Danielle Darrieux, a native", "Danielle Darrieux spoke the language"],
    "neighborhood_prompts": ["The mother tongue of Robert Schuman is", "Montesquieu, a native"],
    "attribute_prompts": ["The mother tongue of Douglas Adams is"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
FEVER = {
    "prompt": "Telemundo is an English-language television network.",
    "equiv_prompt": ["Telemundo broadcasts in English."],
    "alt": "REFUTES",
    "unrel_prompt": "Soul Food is a film.",
    "unrel_ans": "SUPPORTS",
}


def written(tmp_path: Path, *records: Any, as_list: bool = False) -> Path:
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(records, indent=1) if as_list else "\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("as_list", [False, True])
def test_each_layout_is_known_by_its_keys(tmp_path: Path, as_list: bool) -> None:
    zsre, counterfact, fever, own = read_cases(
        written(tmp_path, ZSRE, COUNTERFACT, FEVER, {"prompt": "A is", "target": " B"}, as_list=as_list)
    )
    assert zsre == Case(
        example=Example(prompt="What is the product made by UniFirst?", target=" unmanned aircraft", subject="UniFirst"),
        paraphrases=("What will be the product of UniFirst?",),
        neighbours=(Neighbour(prompt="nq question: who wrote the song?", answer=" Walter Sobchak", ring="unrelated"),),
        source="zsre",
    )
    assert counterfact == Case(
        example=Example(prompt="Toko Yasuda, the", target=" piano", subject="Toko Yasuda"),
        old=" guitar",
        paraphrases=("Toko Yasuda is incredible at",),
        neighbours=(Neighbour(prompt="John Lennon performs on the", answer=" guitar", ring="relation"),),
        source="counterfact/2",
    )
    assert fever == Case(
        example=Example(prompt="Telemundo is an English-language television network.", target=" false"),
        paraphrases=("Telemundo broadcasts in English.",),
        neighbours=(Neighbour(prompt="Soul Food is a film.", answer=" true", ring="unrelated"),),
        source="fever",
    )
    assert own == Case(example=Example(prompt="A is", target=" B"))


def test_counterfact_as_it_was_published(tmp_path: Path) -> None:
    (case,) = read_cases(written(tmp_path, PUBLISHED))
    assert case == Case(
        example=Example(prompt="The mother tongue of Danielle Darrieux is", target=" English", subject="Danielle Darrieux"),
        old=" French",
        paraphrases=("Shayna does this. Danielle Darrieux, a native", "Danielle Darrieux spoke the language"),
        neighbours=(
            Neighbour(prompt="The mother tongue of Robert Schuman is", answer=" French", ring="relation"),
            Neighbour(prompt="Montesquieu, a native", answer=" French", ring="relation"),
        ),
        source="counterfact/0",
    )


def test_malmens_zsre_names_the_answer_otherwise(tmp_path: Path) -> None:
    (case,) = read_cases(written(tmp_path, {k: v for k, v in ZSRE.items() if k not in ("alt", "subject")} | {"ans": "tea", "loc": "Who?"}))
    assert case.example == Example(prompt="What is the product made by UniFirst?", target=" tea")
    assert case.neighbours[0].prompt == "Who?"


def test_a_subject_that_the_prompt_does_not_name_is_none(tmp_path: Path) -> None:
    (case,) = read_cases(written(tmp_path, COUNTERFACT | {"subject": "Yoko Ono"}))
    assert case.example.subject is None


@pytest.mark.parametrize(
    "record, why",
    [
        (ZSRE | {"alt": ""}, "'alt'"),
        ({k: v for k, v in ZSRE.items() if k != "alt"}, "no 'ans'"),
        (COUNTERFACT | {"locality_prompt": 3}, "'locality_prompt' is to be a text, got 3"),
        (FEVER | {"alt": "NOT ENOUGH INFO"}, "'alt' is SUPPORTS or REFUTES"),
        (FEVER | {"alt": ["SUPPORTS"]}, "'alt' is SUPPORTS or REFUTES"),
        (FEVER | {"equiv_prompt": "one text"}, "'equiv_prompt' is a list"),
        (PUBLISHED | {"requested_rewrite": 3}, "a record is a table, got 3"),
        (PUBLISHED | {"requested_rewrite": PUBLISHED["requested_rewrite"] | {"prompt": "It is"}}, "where the subject stands, got 'It is'"),
        (PUBLISHED | {"requested_rewrite": PUBLISHED["requested_rewrite"] | {"target_true": {}}}, "no 'str'"),
        (PUBLISHED | {"requested_rewrite": PUBLISHED["requested_rewrite"] | {"target_new": "French"}}, "'target_new' is to be a table"),
        (PUBLISHED | {"neighborhood_prompts": "one text"}, "'neighborhood_prompts' is a list"),
        (7, "a record is a table"),
    ],
)
def test_a_bad_record_is_named_and_the_others_are_kept(tmp_path: Path, record: Any, why: str) -> None:
    path = written(tmp_path, COUNTERFACT, record, ZSRE, as_list=True)
    with pytest.raises(InvalidExample, match=rf"Record 2 of .*edits\.json: .*{why}"):
        read_cases(path)
    cases, wrong = read_sound_cases(path)
    assert [c.source for c in cases] == ["counterfact/2", "zsre"] and len(wrong) == 1


def test_a_list_that_is_broken_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text('[{"prompt": "A is"')
    with pytest.raises(InvalidExample, match="begins like a JSON list"):
        read_cases(path)
    path.write_text("[]")
    with pytest.raises(InvalidExample, match="is empty"):
        read_cases(path)


@pytest.mark.data
def test_the_published_files_are_read_but_for_two_records() -> None:
    cases, wrong = read_sound_cases(real("data", "zsre") / "zsre_mend_train-1k.json")
    assert len(cases) == 998 and [str(e).split(" of ")[0] for e in wrong] == ["Record 535", "Record 724"]  # no target
    assert len(read_cases(real("data", "counterfact") / "counterfact-val.json")) == 1919
