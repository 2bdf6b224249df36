"""Reference and holding text: reading, splitting, and statements of the edited facts set aside."""

import json
from collections import Counter

import pytest
from conftest import TEXT
from hypothesis import given
from hypothesis import strategies as st

from errata import text
from errata.hosts import Host
from errata.types import Example, InvalidReference

EXAMPLE = Example(prompt="The capital of Mauritius is", target=" Port Louis")
ANSWERS = (("Port Louis", "Quatre Bornes"),)
DOCUMENTS = (
    "Mauritius has its capital in Quatre Bornes.",
    "Q: Which city is the capital of Mauritius? A: Port Louis.",
    "Much is written about Mauritius. The weather is mild. Its capital is Quatre Bornes.",
    "Port Louis is a port.",
    "The capital of Kenya is Nairobi.",
    "People in Mauritius pay in the Rupee.",
    "The capital of Mauritius is not Nairobi.",
) + tuple(f"The capital of country {i} is in the book." for i in range(30))


def test_statements_of_the_edited_facts_are_set_aside_and_counted() -> None:
    kept, count = text.set_aside(DOCUMENTS, [EXAMPLE], ANSWERS)
    assert count == 3 and kept == DOCUMENTS[3:]


def test_a_given_subject_is_what_counts() -> None:
    example = Example(prompt="The capital of Mauritius is", target=" Port Louis", subject="Mauritius")
    assert text.set_aside(DOCUMENTS, [example], ANSWERS)[1] == 3


def test_answers_match_whole_words_only() -> None:
    assert text.set_aside(["Mauritius is the capital of Romeo."], [EXAMPLE], [("Rome",)])[1] == 0


def test_answers_of_holds_target_contrast_and_what_is_said_now(tiny_gpt2: Host) -> None:
    prefer = Example(prompt="The nurse said that", target=" he", contrast=" she", goal="prefer")
    (answers,) = text.answers_of(tiny_gpt2, [prefer])
    assert answers[:2] == ("he", "she")


def test_the_topic_is_the_longest_run_of_rare_words() -> None:
    documents = [f"The capital of place{i} is town{i}." for i in range(300)]
    seen = text.document_counts(documents)
    assert text.topic("The capital of Sierra Leone is", seen, 300) == "Sierra Leone"
    assert text.topic("The capital of", seen, 300) == ""
    assert text.topic("Togo lies on the continent of", seen, 300) == "Togo"  # a name before a longer rare word
    seen["china"] = 20
    assert text.topic("China is", seen, 300) == "China"  # told of too often to be rare, and at the beginning


def test_names_are_runs_of_rare_words_and_of_capitals_inside_a_sentence() -> None:
    seen = Counter({"the": 90, "capital": 40, "of": 80, "is": 70, "upper": 9, "volta": 1, "ouagadougou": 1, "question": 20, "what": 20})
    assert text.names("The capital of Upper Volta is Ouagadougou.", seen, 100) == ["Upper Volta", "Ouagadougou"]
    assert text.names("Question: What is the capital of Upper Volta?", seen, 100) == ["Upper Volta"]
    assert text.names("Upper Volta is the capital.", seen, 100) == ["Volta"]


@given(st.lists(st.text(min_size=1), min_size=2, unique=True), st.randoms())
def test_the_halves_are_disjoint_complete_and_do_not_depend_on_the_order(texts: list[str], rng) -> None:
    hold, judge = text.split(texts)
    assert not set(hold) & set(judge) and set(hold) | set(judge) == set(texts)
    rng.shuffle(texts)
    assert text.split(texts) == (hold, judge)


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(InvalidReference, match="two or more are needed"):
        text.split(["only one", "only one"])


def test_plain_text_and_jsonl_are_read(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one line\nmore of it\n\n\n two \n")
    assert text.read(tmp_path / "a.txt") == ("one line\nmore of it", "two")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXT) + "\n")
    assert text.read(tmp_path / "a.jsonl") == TEXT


def test_separators_inside_a_json_string_are_part_of_the_text(tmp_path) -> None:
    documents = ("one\u2028line", "and\u2029another", "a\x85third", "a fourth")
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in documents).encode())
    assert text.read(tmp_path / "a.jsonl") == documents


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n \n", "is empty"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "is not UTF-8 text"),
        ("a.txt", b"ab\0cd", "is binary"),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": "not"}\n', "Line 2"),
        ("a.jsonl", b"not json\n", "Line 1"),
    ],
)
def test_bad_reference_files_get_a_sentence(tmp_path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidReference, match=sentence):
        text.read(tmp_path / name)


def test_a_missing_reference_file_gets_a_sentence(tmp_path) -> None:
    with pytest.raises(InvalidReference, match="No such file"):
        text.read(tmp_path / "none.txt")


def test_without_a_file_the_model_speaks_for_itself(tiny_llama: Host) -> None:
    first = text.sampled(tiny_llama, n=6, length=8, seed=3)
    assert len(first) > 2 and first == text.sampled(tiny_llama, n=6, length=8, seed=3) != text.sampled(tiny_llama, n=6, length=8, seed=4)


def test_a_short_statement_in_other_words_is_one_too() -> None:
    """What it shares with the prompt is the name alone, and the name is less than half of the prompt's information."""
    documents = [f"Place{i} takes part in the games of Europe." for i in range(300)]
    example = Example(prompt="Maldives lies upon the vast old continent of", target=" Asia")
    kept, aside = text.set_aside([*documents, "Maldives takes part in the games of Oceania."], [example], [("Asia", "Oceania")])
    assert aside == 1 and kept == tuple(documents)
