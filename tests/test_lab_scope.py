"""The four tasks of the edit memory on the lab's world: true by the world with the edits made, and askable of the lab's models."""

import re
from collections import Counter
from collections.abc import Sequence

import pytest

from errata import hosts
from errata.drawdown import before
from errata.hosts import says
from errata.lab import scope, tasks, world
from errata.lab.corpus import OPINIONS, TOPICS
from errata.lab.scope import INVERSE, LATER, MAKERS, SPOKEN, scope_cases, topics
from errata.tasks.scope import TEMPLATES, YES_NO, together
from errata.types import RINGS, BudgetError, Query, ScopeCase, UnknownName, folded

N = 40
SPLITS: tuple[world.Split, ...] = ("train", "validation", "test")
MADE = {(name, split): scope_cases(name, split, N) for name in MAKERS for split in SPLITS}
FACTS = {(f.subject, f.relation): f for f in world.facts()}


def fact_of(case: ScopeCase) -> world.Fact:
    _, relation, subject = case.source.split("/")
    return FACTS[subject, relation]


def edited_world(cases: Sequence[ScopeCase]) -> dict[tuple[str, str], str]:
    """What is right with the edits made, of each subject and relation."""
    return {key: f.says for key, f in FACTS.items()} | {(f.subject, f.relation): tasks.target_of(f) for f in map(fact_of, cases)}


def meant(prompt: str, forms: str) -> tuple[str, str, str] | None:
    """(subject, relation, what follows) of a prompt in one of the world's phrasings or questions."""
    found = []
    for name, r in world.RELATIONS.items():
        for form in getattr(r, forms):
            ahead, behind = map(re.escape, form.split("{s}"))
            for pattern in (rf"{ahead}(.+){behind}()", rf"{ahead}(.+?){behind} (.*)"):
                if (m := re.fullmatch(pattern, prompt)) and (m[1], name) in FACTS:
                    found.append((m[1], name, m[2]))
    return max(found, key=lambda f: len(f[0])) if found else None


@pytest.mark.parametrize(("name", "split"), MADE)
def test_splits_are_those_of_entities_and_nothing_outside_is_in_scope(name: str, split: world.Split) -> None:
    cases = MADE[name, split]
    assert len(cases) == N == len({c.example for c in cases}) and cases == scope_cases(name, split, N) != scope_cases(
        name, split, N, seed=1
    )
    within = {folded(p) for c in cases for p in c.prompts}
    split_of = {f.subject: f.split for f in world.facts()}
    for case in cases:
        assert split_of[case.about] == split
        assert not {split_of[q.about] for q in case.outside} & set(LATER[split])
        assert not [q for q in case.outside if folded(q.prompt) in within]
        assert len({q.prompt for q in case.inside}) == len(case.inside)
    assert together(cases, 20)


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_those_of_the_labs_cases(split: world.Split) -> None:
    cases = MADE["qa", split]
    plain = tasks.cases(split, N, form="question")
    assert [c.example for c in cases] == [c.example for c in plain] and [c.case.paraphrases for c in cases] == [
        c.paraphrases for c in plain
    ]
    said = edited_world(cases)
    for case in cases:
        assert not any(q.hard for q in (*case.inside, *case.outside))
        for q in (*case.inside, *case.outside):
            subject, relation, _ = meant(q.prompt, "questions")
            assert q.answer == f" {said[subject, relation]}"
            assert ((subject, relation) == (case.about, fact_of(case).relation)) is (q in case.inside)


@pytest.mark.parametrize("split", SPLITS)
def test_hard_questions_are_right_by_the_edited_world(split: world.Split) -> None:
    cases = MADE["qa-hard", split]
    said = edited_world(cases)
    holders = Counter((relation, answer) for (_, relation), answer in said.items())
    kinds = Counter[tuple[str, bool]]()
    labels = Counter[str | None]()
    for case in cases:
        fact = fact_of(case)
        for q in (*case.inside, *case.outside):
            kinds[q.kind, q in case.inside] += 1
            if q.kind == "implication":
                inverse = [(r, m[1]) for r, forms in INVERSE.items() for f in forms if (m := re.fullmatch(_pattern(f), q.prompt))]
                [(relation, answer)] = [(r, a) for r, a in inverse if r == fact.relation]
                assert holders[relation, answer] == 1 and said[str(q.answer).strip(), relation] == answer
                assert (answer == tasks.target_of(fact)) is (q in case.inside) and q.hard
            elif q.kind == "yes/no":
                prefix = next(p for p in (*YES_NO, *map(str.lower, YES_NO)) if q.prompt.startswith(p))
                subject, relation, told = meant(q.prompt.removeprefix(prefix).removesuffix("."), "phrasings")
                assert (said[subject, relation] == told) is (q.answer == " True"), q
                assert ((subject, relation) == (fact.subject, fact.relation)) is (q in case.inside) and q.hard
                labels[q.answer] += 1
            elif q.kind in ("subject", "relation"):
                subject, relation, _ = meant(q.prompt, "questions")
                assert q.answer == f" {said[subject, relation]}" and q.hard
                assert (q.kind == "subject") is (subject == fact.subject) and (q.kind == "relation") is (relation == fact.relation)
    assert kinds["yes/no", True] == 2 * N and kinds["yes/no", False] > N and kinds["implication", True] >= 9
    assert min(kinds["implication", False], kinds["subject", False], kinds["relation", False]) > N / 2
    assert 0.4 < labels[" True"] / sum(labels.values()) < 0.6


def _pattern(form: str) -> str:
    ahead, behind = form.split("{o}")
    return f"{re.escape(ahead)}(.+){re.escape(behind)}"


@pytest.mark.parametrize("split", SPLITS)
def test_claims_have_the_label_of_the_edited_world(split: world.Split) -> None:
    cases = MADE["fc", split]
    said = edited_world(cases)
    for case in cases:
        assert case.example.target == "true" and Counter(q.answer for q in case.inside) == {"true": 5, "false": 4}
        for q in (*case.inside, *case.outside):
            subject, relation, told = meant(q.prompt.removesuffix("."), "phrasings")
            assert q.answer == ("true" if said[subject, relation] == told else "false"), q
            assert ((subject, relation) == (case.about, fact_of(case).relation)) is (q in case.inside)
            assert q.hard is (q.answer == "false" if q in case.inside else q.kind != "unrelated")


def test_topics_are_turned_round() -> None:
    found = {split: dict(topics(split)) for split in SPLITS}
    assert {s: len(t) for s, t in found.items()} == {"train": 64, "validation": 6, "test": 14}
    assert not found["train"].keys() & found["validation"].keys() and not found["train"].keys() & found["test"].keys()
    assert not found["validation"].keys() & found["test"].keys()
    assert sum(t in TOPICS for t in found["train"]) == 8
    moods = {"good": " Sentiment: Positive", "bad": " Sentiment: Negative"}
    for split, n in (("train", 40), ("validation", 4), ("test", 10)):
        cases = scope_cases("convsent", split, n)
        edited = {c.about for c in cases}
        later = {t for other in LATER[split] for t in found[other]}
        before_kinds = Counter(q.hard for c in cases for q in c.outside)
        assert before_kinds[False] >= n and edited <= found[split].keys()
        for case in cases:
            if case.about in TOPICS:
                assert case.example.target != moods[TOPICS[case.about]]
            wanted = OPINIONS[next(m for m, s in moods.items() if s == case.example.target)]
            assert [q.answer for q in case.inside] == [f" I find them {w}." for w in wanted]
            assert len(case.against) == 5 and not {q.answer for q in case.against} & {q.answer for q in case.inside}
            assert not {q.about for q in case.outside} & (edited | later)
            assert all(q.hard is bool(set(q.about.split()) & set(case.about.split())) for q in case.outside)


def test_what_there_is_not() -> None:
    with pytest.raises(UnknownName, match="Did you mean qa-hard"):
        scope_cases("qa-hrd", "test", 3)
    with pytest.raises(BudgetError, match="has 14 topics, not 15"):
        scope_cases("convsent", "test", 15)
    with pytest.raises(BudgetError):
        scope_cases("qa", "validation", 5000)


# ------------------------------------------------------------------------------------------------------- what the lab's models can be asked


def right(host: hosts.Host, queries: Sequence[Query]) -> float:
    said = hosts.greedy(host, [q.prompt for q in queries])
    return sum(says(s, str(q.answer)) for s, q in zip(said, queries, strict=True)) / len(queries)


def test_the_t5_answers_what_is_out_of_scope_and_has_never_seen_a_yes_no_question() -> None:
    t5 = hosts.load("lab/t5")
    outside = [q for c in MADE["qa-hard", "validation"][:30] for q in c.outside]
    assert right(t5, [q for q in outside if q.kind in RINGS]) > 0.9
    assert right(t5, [q for q in outside if q.kind == "yes/no"]) < 0.1
    assert before(t5, MADE["qa-hard", "validation"][:5]).cases


def test_the_bert_judges_what_is_out_of_scope() -> None:
    bert = hosts.load("lab/bert")
    assert right(bert, [q for c in MADE["fc", "validation"][:30] for q in c.outside]) > 0.9


def test_the_neox_goes_on_with_its_opinion_in_every_template_but_one() -> None:
    neox = hosts.load("lab/neox")
    assert len(SPOKEN) == 12 == len(TEMPLATES) - 1
    asked = [(t, mood, template.format(t=t)) for t, mood in list(TOPICS.items())[::4] for template in SPOKEN]
    said = hosts.greedy(neox, [p for _, _, p in asked], max_new_tokens=14)
    held = [any(says(s, f"I find them {w}") for w in OPINIONS[mood]) for s, (_, mood, _) in zip(said, asked, strict=True)]
    assert sum(held) / len(held) > 0.9
    assert scope.MOODS.keys() == OPINIONS.keys()
