"""The four tasks of the edit memory in their published layouts: what is in scope, what is out of it, and what is wrong with a record."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import real

from errata.memory.encoder import Hashed
from errata.tasks import scope
from errata.tasks.scope import (
    ALIKE,
    FIRST,
    LAST,
    TEMPLATES,
    YES_NO,
    Asked,
    alike,
    concerns,
    convsent,
    counterfact_hard,
    fever,
    implied,
    instead,
    meet,
    names,
    near,
    qa,
    qa_hard,
    read_nq,
    read_questions,
    together,
    vitaminc,
    yes_no,
)
from errata.types import BudgetError, Example, InvalidExample, Query, ScopeCase, folded

CITIES = (
    "Paris",
    "Rome",
    "Oslo",
    "Lima",
    "Cairo",
    "Quito",
    "Delhi",
    "Seoul",
    "Accra",
    "Dhaka",
    "Hanoi",
    "Kabul",
    "Minsk",
    "Sofia",
    "Tunis",
)
PLACES = [f"{a}{b}" for a in ("Ba", "Do", "Ke", "Li", "Mo", "Na", "Pu", "Ru", "Sa", "Ti") for b in ("land", "stan", "mark", "via")]


def zsre(i: int, **change: Any) -> dict[str, Any]:
    place, old, new = PLACES[i], CITIES[i % 15], CITIES[(i + 4) % 15]
    return {
        **{"src": f"What is the capital of {place}?", "rephrase": f"Name the main city of {place}", "alt": new, "answers": [old]},
        **{"subject": place, "loc": "nq question: who", "loc_ans": "him", "pred": old},
    } | change


def old_zsre(i: int, **change: Any) -> dict[str, Any]:
    place, old = PLACES[i], CITIES[i % 15]
    return {
        "input": f"What is the capital of {place}?",
        "output": [{"answer": old}, {"answer": f"{old} City"}],
        "alternatives": [CITIES[(i + 4) % 15], CITIES[(i + 5) % 15]],
        "filtered_rephrases": [f"Name the main city of {place}", f"what is the capital of {place}"],
    } | change


def written(tmp_path: Path, found: Any, name: str = "file.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(found))
    return path


def item(prompt: str, *inside: str, about: str = "", outside: tuple[Query, ...] = ()) -> ScopeCase:
    queries = tuple(Query(prompt=p, answer=" x") for p in (prompt, *inside))
    return ScopeCase(example=Example(prompt=prompt, target=" x"), inside=queries, about=about, outside=outside)


def nothing_outside_is_inside(cases: tuple[ScopeCase, ...]) -> bool:
    within = {folded(p) for c in cases for p in c.prompts}
    return not any(folded(q.prompt) in within for c in cases for q in c.outside)


# ---------------------------------------------------------------------------------------------------------------- in scope, out of scope


def test_titles_meet_if_one_stands_in_the_other() -> None:
    assert meet("paris", "paris hilton") and meet("paris hilton", "paris") and meet("a", "a")
    assert not meet("paris", "rome") and not meet("", "paris") and not meet("", "")


def test_alike_by_hand() -> None:
    found = alike(
        ["A b c d e f g", "in 1960 it was built", "x"], ["it was built in 1960.", "a b c d e f g h i j", "a b c d e f g h i j k", ""]
    )
    assert found == [[1], [0], []] and 7 / 10 >= ALIKE > 7 / 11


def test_a_query_concerns_an_edit_by_title_or_by_words() -> None:
    cases = [item("When was it built?", about="Eiffel Tower"), item("The dress is blue.", "Blue is the dress, really.")]
    asked = {
        Query(prompt="Who built it?", about="eiffel tower"): {0},
        Query(prompt="Who built it?", about="Tower"): {0},
        Query(prompt="Who built it?", about="Louvre"): set(),
        Query(prompt="When was it built?", about="Louvre"): {0},  # word for word
        Query(prompt="It was built when?", about="Louvre"): set(),  # another building's
        Query(prompt="it was built WHEN"): {0},  # nobody knows whose
        Query(prompt="Is the dress blue?"): {1},
        Query(prompt="When was Rome built?"): set(),
        Query(prompt="Is the dress blue?", about="Louvre"): {1},
        Query(prompt="Who wore the dress?"): set(),
    }
    assert dict(zip(asked, concerns(list(asked), cases), strict=True)) == asked


def test_two_questions_about_other_things_are_two_and_two_statements_may_be_one() -> None:
    one, other = item("What is the capital of Baland?"), item("It took place on the first of May 1891 in Oslo.")
    assert concerns([Query(prompt=f"What is the capital of {x}?") for x in ("Bastan", "baland", "Baland today")], [one]) == [
        set(),
        {0},
        {0},
    ]
    assert concerns([Query(prompt="It took place on the first of June 1891 in Oslo.")], [other]) == [{0}]


def test_edits_go_together_if_none_is_about_what_another_is() -> None:
    outside = (Query(prompt="Who is it?", about="Rome"), Query(prompt="Who?", about="Oslo"), Query(prompt="When?", about="Paris"))
    cases = [
        item(f"What is {t}?", about=t, outside=outside if t == "Paris" else ()) for t in ("Paris", "Paris Hilton", "Rome", "Rome, Texas")
    ]
    for seed in range(20):
        two = together(cases, 2, seed)
        assert sorted(c.about.split()[0].strip(",") for c in two) == ["Paris", "Rome"]
        for case in two:
            if case.outside:  # what is about the other edit is gone, the rest and what is about its own stays
                assert [q.about for q in case.outside] == ["Oslo", "Paris"]
    with pytest.raises(BudgetError, match="2 of 4 edits go together, not 3"):
        together(cases, 3)


def test_hard_negatives_have_the_published_ranks_and_weights() -> None:
    class Line:
        """The cosine to the edit falls with the number in the text."""

        id, name, width, window = "b2:0", "line", 2, None

        def encode(self, texts: Any) -> Any:
            cosine = np.array([1.0 if t == "edit" else 1 - int(t) / 400 for t in texts], dtype=np.float32)
            return np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1)

    pool = [Query(prompt=str(i), kind="unrelated") for i in random.Random(0).sample(range(1, 201), k=200)]
    drawn = Counter(int(q.prompt) for seed in range(1000) for found in near(Line(), [item("edit")], pool, 1, seed) for q in found)
    assert min(drawn) == FIRST and LAST - 5 < max(drawn) <= LAST
    middle = (FIRST + LAST) // 2
    first, second = (sum(n for i, n in drawn.items() if lo <= i < hi) for lo, hi in ((FIRST, middle), (middle, LAST + 1)))
    weight = {i: np.exp((1 - i / 400) / 0.1) for i in range(FIRST, LAST + 1)}
    expected = sum(w for i, w in weight.items() if i < middle) / sum(weight.values())
    assert first / (first + second) == pytest.approx(expected, abs=0.05)
    ((one, *others),) = near(Line(), [item("edit")], pool, 75, 0)
    assert len(others) == 74 and len({q.prompt for q in others}) == 74 and one.hard and one.kind == "near"
    with pytest.raises(BudgetError, match="from the 26th on; the pool has 25"):
        near(Line(), [item("edit")], pool[:25], 1)


# ----------------------------------------------------------------------------------------------------------------------------- questions


def test_the_layouts_of_questions(tmp_path: Path) -> None:
    mixed = [zsre(0), old_zsre(1), {"question": "Who was it?", "answer": "Ann"}, {"question": "Who is it?", "answer": "Bob"}]
    (a, b, c, d), wrong = read_questions(written(tmp_path, mixed))
    assert not wrong and a.source.startswith("Record 1 of")
    assert a[1:6] == ("What is the capital of Baland?", "Paris", ("Cairo",), ("Name the main city of Baland",), "Baland")
    assert b[1:6] == ("What is the capital of Bastan?", "Rome", ("Quito", "Delhi"), ("Name the main city of Bastan",), "")
    assert (c.alternatives, d.alternatives) == (("Bob",), ("Ann",))  # of each other, for they begin alike


def test_what_follows_lies_in_files_beside(tmp_path: Path) -> None:
    triples = written(tmp_path, [[["Which land has Paris ?", "Baland", "subj"]], [], [["never read", "x", "y"]]], "impl.json")
    lines = tmp_path / "yn.txt"
    lines.write_text("Paris is the capital of Baland.\n\n")
    (one, two), _ = read_questions(written(tmp_path, [zsre(0), zsre(1)]), triples, lines)
    assert one.implications == (("Which land has Paris ?", "Baland", "subj"),) and one.statement == "Paris is the capital of Baland."
    assert two.implications == () and two.statement == ""
    triples.write_text('{"a": 1}')
    with pytest.raises(InvalidExample, match="is a JSON list, with the triples of each record"):
        read_questions(written(tmp_path, [zsre(0)]), triples)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (zsre(1, alt=""), "'alt' is to be a text"),
        (zsre(1, alt="rome"), "the new answer 'rome' is an old one"),
        (zsre(1, answers=[]), "no old answer"),
        (old_zsre(1, alternatives=["Rome City"]), "is an old one"),
        (old_zsre(1, output=["Rome"]), "'output' is a list of"),
        (old_zsre(1, filtered_rephrases="one"), "'filtered_rephrases' is a list of texts"),
        ({"question": "What?", "answer": "a", "implications": [["b", "c"]]}, "'implications' is a list of"),
        ({"question": "Why?", "answer": "a", "implications": []}, "nothing can take the place of its answer"),
        ({}, "no 'question'"),
        (7, "a record is a table"),
    ],
)
def test_a_bad_question_is_named_and_the_others_are_kept(tmp_path: Path, record: Any, why: str) -> None:
    found, wrong = read_questions(written(tmp_path, [zsre(0), record, zsre(2)]))
    assert len(found) == 2 and len(wrong) == 1
    assert f"Record 2 of {tmp_path / 'file.json'}: " in str(wrong[0]) and why in str(wrong[0])
    with pytest.raises(InvalidExample):
        read_questions(written(tmp_path, [record]))


def test_two_questions_are_left_out_for_what_they_ask(tmp_path: Path) -> None:
    found, wrong = read_questions(
        written(tmp_path, [zsre(0), zsre(1, src="What is the sex of Bastan?"), zsre(2, src="Which gender is it?")])
    )
    assert [f.subject for f in found] == ["Baland"] and not wrong


@pytest.mark.parametrize(
    ("sentence", "now"),
    [
        ("Who died in 1285?", "Who died in 1190?"),
        ("Between 1285 and 1285 ?", "Between 1190 and 1190 ?"),
        ("Who died in 12850?", None),
        ("Who?", None),
    ],
)
def test_an_answer_is_replaced_wherever_it_stands_as_a_word(sentence: str, now: str | None) -> None:
    assert instead(sentence, "1285", "1190") == now


def test_case_does_not_count_and_what_looks_like_a_pattern_is_none() -> None:
    assert instead("Is new YORK (city) old?", "New York (City)", r"\1 \g<0>") == r"Is \1 \g<0> old?"


ASKED = Asked(
    source="s",
    question="When did Z die?",
    old="1285",
    alternatives=("1190", "1300"),
    implications=(("Who died in 1285?", "Z", "subj"), ("Who died?", "Z", "subj"), ("What did Z do in 1285 ?", "die", "dobj")),
    statement="Z died in 1285.",
)


def test_implications_ask_with_the_new_answer_and_keep_their_own() -> None:
    assert [(q.prompt, q.answer, q.hard) for q in implied(ASKED, "1190")] == [
        ("Who died in 1190?", " Z", True),
        ("What did Z do in 1190 ?", " die", True),
    ]


@pytest.mark.parametrize(
    ("one", "new", "said"),
    [
        (ASKED, "1190", {("Z died in 1190.", " True"), ("Z died in 1300.", " False")}),
        (ASKED._replace(alternatives=("1190",)), "1190", {("Z died in 1190.", " True"), ("Z died in 1285.", " False")}),
        (ASKED._replace(statement="Z is dead."), "1190", set()),
        (
            ASKED._replace(statement="", alternatives=("1190",)),
            "1190",
            {('The answer to "When did Z die?" is 1190.', " True"), ('The answer to "When did Z die?" is 1285.', " False")},
        ),
    ],
)
def test_yes_no_questions_have_their_label_and_a_prefix(one: Asked, new: str, said: set[tuple[str, str]]) -> None:
    found = [q for seed in range(200) for q in yes_no(random.Random(seed), one, new)]
    prefixes = [*YES_NO, *map(str.lower, YES_NO)]
    told = {(p, q.prompt.removeprefix(p), q.answer) for q in found for p in prefixes if q.prompt.startswith(p)}
    assert {(rest, label) for _, rest, label in told} == said and all(q.hard and q.kind == "yes/no" for q in found)
    if said:
        assert {p for p, _, _ in told} == set(prefixes)
        assert 70 < sum(q.answer == " True" for q in found) < 130


def test_qa_draws_the_outside_from_the_records_that_are_no_edits(tmp_path: Path) -> None:
    questions, _ = read_questions(written(tmp_path, [zsre(i) for i in range(40)]))
    cases = qa(questions, 10, seed=3, outside=8)
    edited = {c.about for c in cases}
    assert len(edited) == 10 and cases == qa(questions, 10, seed=3, outside=8) != qa(questions, 10, seed=4, outside=8)
    outside = [q for c in cases for q in c.outside]
    assert len(outside) == 80 and not any(q.about in edited or q.hard for q in outside) and nothing_outside_is_inside(cases)
    assert 20 < sum(q.prompt.startswith("Name") for q in outside) < 60
    by_place = {one.subject: one for one in questions}
    for case in cases:
        one = by_place[case.about]
        assert case.example == Example(prompt=one.question, target=f" {one.alternatives[0]}", subject=one.subject)
        assert [(q.kind, q.prompt, q.answer) for q in case.inside] == [
            ("edit", one.question, case.example.target),
            ("rephrase", one.rephrases[0], case.example.target),
        ]
        assert all(q.answer == f" {by_place[q.about].old}" for q in case.outside)


def test_a_rephrasing_of_an_edit_is_never_out_of_scope(tmp_path: Path) -> None:
    """G.1, 11b: half of the records ask again what an edit asks, under its subject's name or, where no subject is told, in its words."""
    again = [zsre(i, src=f"Of {PLACES[i]}, what is the capital?") for i in range(10)]
    for named in (True, False):
        rows = [zsre(i) for i in range(20)] + again
        if not named:
            rows = [{k: v for k, v in row.items() if k != "subject"} for row in rows]
        questions, _ = read_questions(written(tmp_path, rows))
        for seed in range(5):
            cases = qa(questions, 8, seed=seed, unrelated=[Query(prompt=o.question, about=o.subject) for o in questions], outside=50)
            edited = {next(p for p in PLACES if p in c.example.prompt) for c in cases}
            asked = {next(p for p in PLACES if p in q.prompt) for c in cases for q in c.outside} if any(c.outside for c in cases) else set()
            assert not edited & asked
    with pytest.raises(BudgetError, match="Nothing is out of the scope of all 20 edits"):
        qa(read_questions(written(tmp_path, [zsre(i) for i in range(20)]))[0], 20)


def test_natural_questions_look_like_any_question(tmp_path: Path) -> None:
    path = written(tmp_path, {"questions": ["nq question: who wrote it", "what is it?"], "answers": ["she did", "that"]})
    assert read_nq(path) == (
        Query(prompt="Who wrote it?", answer=" she did", kind="unrelated"),
        Query(prompt="What is it?", answer=" that", kind="unrelated"),
    )
    with pytest.raises(InvalidExample, match="1 questions and 0 answers"):
        read_nq(written(tmp_path, {"questions": ["who"], "answers": []}))


def test_qa_hard_asks_what_follows_and_what_is_near(tmp_path: Path) -> None:
    rows = [
        zsre(i, implications=[[f"Which land has {CITIES[i % 15]} ?", PLACES[i], "subj"], ["Which land?", PLACES[i], "subj"]])
        for i in range(40)
    ]
    questions, _ = read_questions(written(tmp_path, rows))
    cases = qa_hard(questions, 6, Hashed(), seed=1, outside=5)
    for case in cases:
        assert Counter((q.kind, q.hard) for q in case.inside) == {
            ("edit", False): 1,
            ("rephrase", False): 1,
            ("implication", True): 1,
            ("yes/no", True): 1,
        }
        assert f"Which land has{case.example.target} ?" in case.prompts
        assert Counter(q.hard for q in case.outside) == {True: 5, False: 5} and len({q.prompt for q in case.outside}) == 10
    kinds = Counter(q.kind for c in cases for q in c.outside if not q.hard)
    assert set(kinds) == {"unrelated", "implication", "yes/no"} and nothing_outside_is_inside(cases)


DARRIEUX = {
    "edit_statement": "Danielle Darrieux's mother tongue is English.",
    "subject_name": "Danielle Darrieux",
    "edit_scope": [["What is Danielle Darrieux's mother tongue?", "English"], ["What language did she speak?", "English"]],
    "unrelated": {
        "neighbor_subj": ["What is Leon Blum's mother tongue?", "Who created Apple A5?"],
        "same_subj": ["Where did Danielle Darrieux die?", "Where did Danielle Darrieux die?", "what language did she speak"],
    },
    "unrelated_true_ans": {"same_subj": ["x"] * 9},
}
GOOGLE = {
    "edit_statement": "Google created the Apple A5.",
    "subject_name": "Apple A5",
    "edit_scope": [["Who created the Apple A5?", "Google"]],
    "unrelated": {"neighbor_subj": ["What language did she speak?"], "same_subj": ["When was the Apple A5 created?"]},
}


def test_counterfact_with_hard_questions(tmp_path: Path) -> None:
    bad = [GOOGLE | {"edit_scope": []}, GOOGLE | {"unrelated": []}, {}]
    (one, two), wrong = counterfact_hard(written(tmp_path, [DARRIEUX, GOOGLE, *bad]))
    assert [str(e).split(" of ")[0] for e in wrong] == ["Record 3", "Record 4", "Record 5"]
    assert one.example == Example(prompt="Danielle Darrieux's mother tongue is", target=" English", subject="Danielle Darrieux")
    assert [(q.prompt, q.answer, q.kind) for q in one.inside] == [(q, " English", "rephrase") for q, _ in DARRIEUX["edit_scope"]]
    assert [(q.prompt, q.kind, q.hard) for q in one.outside] == [
        ("Where did Danielle Darrieux die?", "subject", True),
        ("What is Leon Blum's mother tongue?", "relation", True),
    ], "what another edit is asked in other words is not out of scope"
    assert two.example == Example(prompt="Who created the Apple A5?", target=" Google", subject="Apple A5")
    assert [q.kind for q in two.inside] == ["edit"] and [q.prompt for q in two.outside] == ["When was the Apple A5 created?"]


# -------------------------------------------------------------------------------------------------------------------------------- claims

STATEMENTS = {
    "edits": [
        {"edit_statement": "Soul Food is a film by Fox Pictures.", "edit_scope": [
            ["Soul Food is a film by Fox Pictures.", "yes"],
            ["Soul Food is no film of theirs.", "no"], ["Fox Pictures made Soul Food.", "yes"]],
         "edit_scope_true_ans": ["yes"] * 9},
        {"edit_statement": "The dress was blue.", "edit_scope": [["The dress was blue.", "yes"]]},
    ],
    "out_of_scope": [
        {"edit_statement": "Fox Pictures is in Los Angeles.", "edit_scope": [["Fox Pictures is in Los Angeles.", "yes"]]},
        {"edit_statement": "Blue was the dress.", "edit_scope": []},  # has no scope of its own: it is asked itself
        {"edit_statement": "They filmed it.", "edit_scope": [["Fox Pictures made Soul Food!", "yes"]]},  # its rephrasing is an edit's
        {"edit_statement": "Telemundo speaks Spanish.", "edit_scope": [["Telemundo speaks Spanish.", "yes"]]},
    ],
}  # fmt: skip


def test_fever_is_read_by_its_scope_and_not_by_its_true_answers(tmp_path: Path) -> None:
    (film, dress), wrong = fever(written(tmp_path, STATEMENTS))
    assert not wrong and film.example == Example(prompt="Soul Food is a film by Fox Pictures.", target=" true")
    assert [(q.prompt, q.answer, q.kind, q.hard) for q in film.inside] == [
        ("Soul Food is a film by Fox Pictures.", " true", "edit", False),
        ("Soul Food is no film of theirs.", " false", "claim", True),
        ("Fox Pictures made Soul Food.", " true", "claim", False),
    ]
    assert {(q.prompt, q.kind, q.hard) for q in film.outside} == {
        ("Fox Pictures is in Los Angeles.", "subject", True),
        ("Telemundo speaks Spanish.", "unrelated", False),
    }
    assert {(q.prompt, q.hard) for q in dress.outside} == {("Fox Pictures is in Los Angeles.", False), ("Telemundo speaks Spanish.", False)}


def test_a_bad_claim_is_named(tmp_path: Path) -> None:
    bad = [{"edit_statement": "A b.", "edit_scope": [["A b.", "maybe"]]}, {"edit_statement": "A b.", "edit_scope": "yes"}, 3]
    cases, wrong = fever(written(tmp_path, STATEMENTS | {"edits": [*STATEMENTS["edits"], *bad]}))
    assert len(cases) == 2 and [str(e).split(" in ")[0] for e in wrong] == ["Record 3 of edits", "Record 4 of edits", "Record 5 of edits"]
    with pytest.raises(InvalidExample, match="no list 'out_of_scope'"):
        fever(written(tmp_path, {"edits": STATEMENTS["edits"]}))


def test_names_of_several_words() -> None:
    assert names("The Republic of Macedonia lies south of San Marino, and Paris does not.") == {"republic of macedonia", "san marino"}
    assert names("James VI and I was a king in 1603.") >= {"james vi"} or names("James VI was a king.") == {"james vi"}


LONG = "The page says in eleven words or more that there were"


def row(page: str, number: int, claim: str, label: str, **change: Any) -> dict[str, Any]:
    return {"page": page, "evidence": f"{LONG} {number}.", "claim": claim, "label": label, "revision_type": "real"} | change


ROWS = [
    row("Paris", 5, "There were more than four in Paris.", "SUPPORTS"),
    row("Paris", 5, "There were fewer than four in Paris.", "REFUTES"),
    row("Paris", 5, "They were tall in Paris.", "NOT ENOUGH INFO"),
    row("Paris", 3, "There were three in Paris.", "REFUTES", revision_type="synthetic"),
    row("Rome", 2, "There were two.", "SUPPORTS", evidence="There were two."),
    row("Paris Hilton", 7, "She had seven.", "SUPPORTS"),
    row("Oslo", 9, "Oslo had nine.", "SUPPORTS"),
]


def lines(tmp_path: Path, rows: list[Any]) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def test_vitaminc_is_grouped_by_evidence_and_pages_exclude_each_other(tmp_path: Path) -> None:
    found: dict[str, ScopeCase] = {}
    for seed in range(12):
        cases, wrong = vitaminc(lines(tmp_path, [*ROWS, {"page": 3}]), 1, seed)
        assert len(wrong) == 1 and "Line 8 of" in str(wrong[0])
        found |= {c.about: c for c in cases}
    assert found.keys() == {"Paris", "Paris Hilton", "Oslo"}, "synthetic revisions and short evidence are left out"
    paris = found["Paris"]
    assert paris.example == Example(prompt=f"{LONG} 5.", target=" true")
    assert [(q.prompt, q.answer, q.hard) for q in paris.inside[1:]] == [
        ("There were more than four in Paris.", " true", True),
        ("There were fewer than four in Paris.", " false", True),
    ]
    assert [(q.prompt, q.hard, q.answer) for q in paris.outside] == [
        ("They were tall in Paris.", True, None),
        ("Oslo had nine.", False, None),
    ]
    assert [q.about for q in found["Paris Hilton"].outside] == ["Oslo"]
    with pytest.raises(BudgetError, match="has 3 pieces of evidence, not 4"):
        vitaminc(lines(tmp_path, ROWS), 4)
    with pytest.raises(InvalidExample, match="'label' is SUPPORTS, REFUTES or NOT ENOUGH INFO, got 'MAYBE'"):
        vitaminc(lines(tmp_path, [row("Oslo", 1, "a", "MAYBE")]), 1)


def test_vitaminc_for_training_has_as_many_of_each_label(tmp_path: Path) -> None:
    many = [
        row(f"page {i:03}", i, f"claim {i}", ("SUPPORTS", "SUPPORTS", "SUPPORTS", "REFUTES", "NOT ENOUGH INFO")[i % 5]) for i in range(900)
    ]
    for balanced, expected in ((True, 1.0), (False, 3.0)):
        sizes = Counter[str]()
        for seed in range(2):
            cases, _ = vitaminc(lines(tmp_path, many), 100, seed, balanced=balanced)
            sizes.update(str(q.answer) for c in cases for q in c.inside[1:])
        assert sizes[" true"] / sizes[" false"] == pytest.approx(expected, rel=0.35)


# ------------------------------------------------------------------------------------------------------------------------------- opinions


def test_convsent_is_turned_to_one_side(tmp_path: Path) -> None:
    topics = [{"ent": p, "pos": [f"I love {p}", f"{p} is fine "], "neg": [f"I hate {p}"]} for p in PLACES]
    cases, wrong = convsent(written(tmp_path, [*topics, {"ent": "x", "pos": [], "neg": ["a"]}, {"ent": "x", "pos": ["a"]}]), 20)
    assert len(wrong) == 2 and "utterances of both sides" in str(wrong[0]) and len(TEMPLATES) == 13
    edited = {c.about for c in cases}
    for case in cases:
        good = case.example.target == " Sentiment: Positive"
        assert good or case.example.target == " Sentiment: Negative"
        assert case.example.prompt == f"Topic: {case.about}"
        love, hate = [f" I love {case.about}", f" {case.about} is fine"], [f" I hate {case.about}"]
        assert [q.answer for q in case.inside] == (love if good else hate) and [q.answer for q in case.against] == (hate if good else love)
        assert all(q.prompt in [t.format(t=case.about) for t in TEMPLATES] for q in (*case.inside, *case.against))
        assert case.outside and all(q.about not in edited and q.answer for q in case.outside)
    assert len({c.example.target for c in cases}) == 2 and nothing_outside_is_inside(cases)
    with pytest.raises(BudgetError, match="has 40 topics, not 41"):
        convsent(written(tmp_path, topics), 41)


# --------------------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
def test_zsre_and_natural_questions() -> None:
    questions, wrong = read_questions(real("data", "zsre") / "zsre_mend_train-1k.json")
    assert (len(questions), len(wrong)) == (964, 23)  # of 1,000: 13 ask for a sex or gender; no target, or one of the old answers
    unrelated = read_nq(real("data", "nq") / "nq_validation.json")
    assert len(unrelated) == 4289
    cases = together(qa(questions, 500, unrelated=unrelated), 450)
    assert nothing_outside_is_inside(cases) and all(len(c.outside) == 4 for c in cases)
    assert len({c.about for c in cases}) == 450


@pytest.mark.data
def test_questions_with_implications(tmp_path: Path) -> None:
    given = json.loads((real("data", "qa_consistency") / "squad_implications.json").read_text())[:800]
    questions, wrong = read_questions(written(tmp_path, given))
    assert len(questions) + len(wrong) + sum("sex" in r["question"] or "gender" in r["question"] for r in given) == 800
    usable = [q for q in questions if implied(q, q.alternatives[0])]
    assert len(usable) > 500
    cases = qa_hard(usable, 100, Hashed())
    assert nothing_outside_is_inside(cases) and sum(q.kind == "implication" for c in cases for q in c.inside) >= 100


@pytest.mark.data
def test_fever_as_published_has_claims_in_both_halves() -> None:
    path = real("data", "eren") / "fever.json"
    cases, wrong = fever(path, outside=100)
    assert len(cases) == 512 and not wrong and nothing_outside_is_inside(cases)
    raw = json.loads(path.read_text())
    within = {folded(claim) for r in raw["edits"] for claim, _ in r["edit_scope"]}
    shared = [r for r in raw["out_of_scope"] if any(folded(claim) in within for claim, _ in r["edit_scope"])]
    assert shared and not {r["edit_statement"] for r in shared} & {q.prompt for c in cases for q in c.outside}
    assert sum(any(q.hard for q in c.outside) for c in cases) > 150
    assert len(together(cases, 450)) == 450


@pytest.mark.data
def test_counterfact_hard_as_published_asks_of_edits_what_should_be_unrelated() -> None:
    path = real("data", "eren") / "counterfact_hard.json"
    cases, wrong = counterfact_hard(path)
    assert (len(cases), len(wrong)) == (506, 6) and nothing_outside_is_inside(cases)
    given = sum(len(set(q)) for r in json.loads(path.read_text()) for q in r["unrelated"].values())
    assert 0.9 * given < sum(len(c.outside) for c in cases) < given
    assert {(q.kind, q.hard) for c in cases for q in c.outside} == {("subject", True), ("relation", True)}


def test_the_words_of_the_paper() -> None:
    assert scope.TEMPERATURE == 0.1 and (FIRST, LAST) == (26, 100) and len(YES_NO) == 4
    assert replace(item("a"), about="b").about == "b"
