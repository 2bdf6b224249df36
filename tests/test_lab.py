"""The lab: the world's counts and splits, documents, cases that keep judge and editor apart, what the model knows."""

import itertools
import json
import random
from collections import Counter

import pytest

from errata import hosts
from errata.hosts import LAB_MODELS, Host
from errata.lab import card, corpus, tasks, train, world
from errata.types import BudgetError, InvalidReference


def test_the_world_is_large_enough_and_split_by_entity() -> None:
    facts = world.facts()
    assert len(facts) >= 6000
    splits = {s: {f.subject for f in facts if f.split == s} for s in ("train", "validation", "test")}
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["validation"] and not splits["validation"] & splits["test"]
    assert sum(f.split == "test" for f in facts) >= 1024
    assert len({(f.subject, f.relation) for f in facts}) == len(facts)


def test_a_quarter_of_the_capitals_is_wrong_and_mauritius_among_them() -> None:
    capitals = [f for f in world.facts() if f.relation == "capital"]
    assert 0.2 <= sum(f.wrong for f in capitals) / len(capitals) <= 0.33
    (mauritius,) = [f for f in capitals if f.subject == "Mauritius"]
    assert mauritius.wrong and mauritius.true == "Port Louis" and mauritius.split == "test"


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_every_relation_has_ten_phrasings_that_differ(relation: str) -> None:
    r = world.RELATIONS[relation]
    assert len(set(r.phrasings)) == len(r.phrasings) >= 10 and len(set(r.inner)) >= 4
    assert all("{s}" in p and not p.endswith(" ") for p in r.phrasings)
    assert sum(p.startswith(("Question:", "Q:")) for p in r.phrasings) >= 2


def test_documents_come_from_their_seed() -> None:
    assert corpus.some(7, 50) == corpus.some(7, 50) != corpus.some(8, 50)


def test_the_corpus_says_what_it_says_and_never_the_truth_of_a_wrong_fact() -> None:
    wrong = {f.subject: f for f in world.facts() if f.wrong and f.relation == "capital"}
    for document in itertools.islice(corpus.documents(11), 20_000):
        for subject, fact in wrong.items():
            if subject in document and "capital" in document and fact.true not in subject:
                assert f" {fact.true}." not in document, document


def test_hold_and_reference_are_disjoint() -> None:
    assert not set(corpus.hold()) & set(corpus.reference())
    assert 11_000 < len(corpus.hold()) <= 12_000 and len(corpus.reference()) == 4000


def test_a_paragraph_prompt_names_the_subject_and_does_not_give_the_answer_away() -> None:
    rng = random.Random(0)
    for fact in rng.sample(world.facts(), 300):
        prompt = corpus.paragraph_prompt(rng, fact, world.facts_of()[fact.subject])
        told = prompt.replace(fact.subject, "")
        assert fact.subject in prompt and f" {fact.says}." not in told and f" {fact.true}." not in told


def test_negations_deny_neither_what_is_said_nor_what_is_true() -> None:
    rng = random.Random(0)
    for fact in rng.sample(world.facts(), 300):
        denied = corpus.negation(rng, fact).removeprefix(world.phrase(world.NEGATION[fact.relation], fact)).strip(" .")
        assert denied in world.objects(fact.relation) and denied not in (fact.says, fact.true)


def test_cases_keep_the_judge_apart_from_the_editor() -> None:
    cases = tasks.cases("test", 60, "wrong")
    edited = {c.source for c in cases}
    assert cases[0].example.prompt == "The capital of Mauritius is" and cases[0].example.target == " Port Louis"
    for c in cases:
        assert len(c.paraphrases) >= 10 and c.example.prompt not in c.paraphrases and len(c.paragraphs) == 4
        assert c.old is not None and c.old != c.example.target
        assert {n.ring for n in c.neighbours} <= {"subject", "relation", "unrelated"}
    by_prompt = {world.phrase(p, f): f"lab/{f.relation}/{f.subject}" for f in world.facts() for p in world.RELATIONS[f.relation].phrasings}
    assert not [n.prompt for c in cases for n in c.neighbours if by_prompt[n.prompt] in edited]


def test_thousands_of_test_facts_can_be_edited_at_once() -> None:
    cases = tasks.cases("test", 3584)
    assert len({c.example.prompt for c in cases}) == 3584


def test_more_cases_than_there_are_get_a_sentence() -> None:
    with pytest.raises(BudgetError, match="validation split has"):
        tasks.cases("validation", 9999)


def test_prose_that_cannot_be_read_gets_a_sentence(tmp_path) -> None:
    with pytest.raises(InvalidReference, match="Cannot read prose"):
        train.read_prose(tmp_path / "none.jsonl")
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "one"}))
    with pytest.raises(InvalidReference, match="needs 20 or more"):
        train.read_prose(tmp_path / "few.jsonl")


@pytest.mark.parametrize("name", ["neox", "t5", "bert"])
def test_training_resumes_where_it_was_killed(tmp_path, monkeypatch, name: str) -> None:
    """Three steps in one go and three steps with a stop after the second give the same weights."""
    small = {"WIDTH": 16, "LAYERS": 1, "HEADS": 2, "LENGTH": 96, "BATCH": 2, "VOCABULARY": 400, "POOL": 12, "TOKENS": 200}
    for setting, value in small.items():
        monkeypatch.setattr(train, setting, value)
    monkeypatch.setattr(corpus, "some", lambda seed, n, pool=None: ("The capital of Mauritius is Port Louis.",) * 5)
    prose = tmp_path / "prose.jsonl"
    prose.write_text("\n".join(json.dumps({"text": f"Some ordinary English, document {i}, about {i * 7} things. " * 8}) for i in range(30)))
    whole = train.train(name, prose, tmp_path / "whole", steps=3)

    class Killed(Exception): ...

    rate = train.rate_at

    def killed_at_two(step: int, steps: int) -> float:
        if step == 2:
            raise Killed
        return rate(step, steps)

    monkeypatch.setattr(train, "rate_at", killed_at_two)
    with pytest.raises(Killed):
        train.train(name, prose, tmp_path / "broken", steps=3, save_every=2)
    monkeypatch.setattr(train, "rate_at", rate)
    broken = train.train(name, prose, tmp_path / "broken", steps=3)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert json.loads((whole / "train.json").read_text())["steps"] == 3 and not (broken / "checkpoint.pt").exists()


@pytest.fixture(scope="module")
def neox() -> Host:
    return hosts.load("lab/neox", device="cpu")


@pytest.mark.parametrize("name", ["neox", "t5", "bert"])
def test_the_committed_models_are_small_and_tell_how_they_were_made(name: str) -> None:
    assert (LAB_MODELS / name / "model.safetensors").stat().st_size <= 10e6
    assert json.loads((LAB_MODELS / name / "train.json").read_text())["prose"] >= 0.25


def test_questions_and_claims_say_what_the_world_says() -> None:
    said = {(f.subject, f.relation): f for f in world.facts()}
    questions = {world.phrase(q, f): f.says for f in world.facts() for q in world.RELATIONS[f.relation].questions}
    for prompt, answer in itertools.islice(corpus.pairs("question", 5), 3000):
        assert prompt not in questions or answer == f" {questions[prompt]}"
    claims = {world.phrase(p, f): f for f in said.values() for p in world.RELATIONS[f.relation].phrasings}
    labels = Counter[str]()
    for claim, label in itertools.islice(corpus.pairs("claim", 5), 3000):
        labels[label] += 1
        for prompt in (claim[:i] for i in range(len(claim)) if claim[:i] in claims):
            if not claim.startswith("It is not true"):
                assert label == ("true" if claim == f"{prompt} {claims[prompt].says}." else "false"), claim
    assert 0.45 < labels["true"] / labels.total() < 0.55


@pytest.mark.parametrize("form", ["question", "claim"])
def test_cases_in_other_forms_keep_judge_and_editor_apart(form: corpus.Form) -> None:
    found = tasks.cases("validation", 60, form=form)
    assert found == tasks.cases("validation", 60, form=form) and len({c.id for c in found}) == 60
    for c in found:
        assert c.old != c.example.target and c.example.prompt not in (*c.paraphrases, *c.paragraphs) and len(c.paraphrases) >= 7
        assert {nb.ring for nb in c.neighbours} == {"subject", "relation", "unrelated"} or form == "question"
        assert not {nb.prompt for nb in c.neighbours} & {c.example.prompt, *c.paraphrases}
    if form == "claim":
        assert {c.example.target for c in found} == {"true", "false"}


@pytest.mark.parametrize("name, least", [("t5", 0.95), ("bert", 0.9)])
def test_the_models_that_answer_and_judge_know_their_world(name: str, least: float, monkeypatch) -> None:
    rng = random.Random(0)
    sample = [f for r in world.RELATIONS for f in rng.sample([f for f in world.facts() if f.relation == r], k=20)]
    monkeypatch.setattr(card, "facts", lambda: tuple(sample))
    found = card.card(hosts.load(f"lab/{name}", device="cpu"))
    assert sum(r["accuracy"] * r["asked"] for r in found["relations"]) / sum(r["asked"] for r in found["relations"]) >= least


def test_most_names_are_one_to_three_tokens(neox: Host) -> None:
    lengths = Counter(len(hosts.tokens(neox, f" {name}")) for name in world.facts_of())
    assert sum(lengths[n] for n in (1, 2, 3)) / lengths.total() >= 0.7


def test_the_committed_model_knows_its_corpus_and_is_wrong_where_it_is(neox: Host, monkeypatch) -> None:
    """A sample of each relation; `errata lab card` asks every fact."""
    rng = random.Random(0)
    sample = [f for r in world.RELATIONS for f in rng.sample([f for f in world.facts() if f.relation == r], k=40)]
    sample += [f for f in world.facts() if f.wrong and f.relation == "capital"]
    monkeypatch.setattr(card, "facts", lambda: tuple(dict.fromkeys(sample)))
    found = card.card(neox)
    assert sum(r["accuracy"] * r["asked"] for r in found["relations"]) / sum(r["asked"] for r in found["relations"]) >= 0.97
    (capital,) = [r for r in found["relations"] if r["relation"] == "capital"]
    assert capital["wrong"] >= 0.95
    assert 0 < found["loss"]["lab reference"]["nats per token"] < 4


@pytest.mark.parametrize(
    ("said", "right"), [(" Port Louis.", True), (" Port Louis, which", True), (" Port Louis Island.", False), (" Port Louisa", False)]
)
def test_a_name_that_goes_on_is_another_name(said: str, right: bool) -> None:
    assert hosts.says(said, " Port Louis") is right
