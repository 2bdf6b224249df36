"""A scope tells the record that a query concerns from those beside it, says how sure it is, keeps its bound, and loads again."""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer

from errata.memory import scope as scopes
from errata.memory.encoder import Encoder, Hashed, load
from errata.memory.scope import (
    Candidate,
    Cross,
    Distance,
    Drawn,
    Lesson,
    Lessons,
    Pair,
    Scope,
    above,
    bare,
    clopper_pearson,
    from_parts,
    platt,
    train,
    unnamed,
)
from errata.types import Case, Example, InvalidExample, MissingExtra, Neighbour, UnknownName, WrongBase

SYLLABLES = ("ba", "lor", "mi", "tan", "ve", "kru", "so", "dil", "pe", "gan", "fu", "rix")
ASKED = {
    "capital": ("The capital of {} is", "What is the capital of {}?", "Which city is the capital of {}?"),
    "river": ("The longest river of {} is", "What is the longest river of {}?", "Which river of {} is the longest?"),
    "money": ("People in {} pay with", "What do people in {} pay with?", "With what money do people in {} pay?"),
    "anthem": ("The anthem of {} was written by", "Who wrote the anthem of {}?", "By whom was the anthem of {} written?"),
}


def name(i: int) -> str:
    n = len(SYLLABLES)
    return (SYLLABLES[i % n] + SYLLABLES[i // n % n] + SYLLABLES[(i * 7 + i // (n * n) + 3) % n]).capitalize()


def lesson(i: int) -> Lesson:
    """Another subject for each i; the relation goes round."""
    relations = list(ASKED)
    own, other = relations[i % 4], relations[(i + 1) % 4]
    first, *others = (phrase.format(name(i)) for phrase in ASKED[own])
    beside = (ASKED[other][1].format(name(i)), ASKED[own][1].format(name(i + 1)), ASKED[own][2].format(name(i + 5)))
    return Lesson(question=first, answer=name(i + 400), inside=(first, *others), outside=beside)


def proposals(queries: Sequence[str], lessons: Sequence[Lesson], encoder: Encoder, k: int = 4) -> list[list[Candidate]]:
    """What an index proposes."""
    scores = encoder.encode(queries) @ encoder.encode([x.question for x in lessons]).T
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [
        [Candidate(question=lessons[j].question, answer=lessons[j].answer, score=float(scores[i, j])) for j in row]
        for i, row in enumerate(first)
    ]


def backbone(path: Path, seed: int = 0, positions: int = 64) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    wide = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**wide, max_position_embeddings=positions)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained() -> Scope:
    return train([lesson(i) for i in range(60)], Hashed(), seed=1, steps=100)


# ---------------------------------------------------------------------------------------------------------------------------- the gate


def test_a_distance_tells_the_right_record_from_those_beside_it_on_subjects_that_it_never_saw(trained: Scope) -> None:
    fresh = [lesson(i) for i in range(60, 100)]
    inside = [(x, query) for x in fresh for query in x.inside]
    outside = [query for x in fresh for query in x.outside if not any(query in y.inside for y in fresh)]
    proposed = proposals([query for _, query in inside], fresh, trained.encoder)
    judged = trained.judge([query for _, query in inside], proposed)
    right = [
        [c.question for c, j in zip(some, said, strict=True) if j.ruling == "in"] == [x.question]
        for (x, _), some, said in zip(inside, proposed, judged, strict=True)
    ]
    quiet = [all(j.ruling != "in" for j in said) for said in trained.judge(outside, proposals(outside, fresh, trained.encoder))]
    assert np.mean(right) > 0.9 and np.mean(quiet) > 0.9


def test_what_is_judged_depends_neither_on_the_order_nor_on_what_is_judged_beside_it(trained: Scope) -> None:
    lessons = [lesson(i) for i in range(60, 70)]
    queries = [query for x in lessons for query in (*x.inside, *x.outside)]
    proposed = proposals(queries, lessons, trained.encoder)
    together = trained.judge(queries, proposed)
    backwards = trained.judge(queries[::-1], proposed[::-1])[::-1]
    alone = [trained.judge([query], [some])[0] for query, some in zip(queries, proposed, strict=True)]
    for other in (backwards, alone):
        assert [[j.ruling for j in said] for said in together] == [[j.ruling for j in said] for said in other]
        assert np.allclose([j.chance for said in together for j in said], [j.chance for said in other for j in said], atol=1e-6)
    assert trained.judge([], []) == [] and trained.judge(["What?"], [[]]) == [[]]


def looked_at(monkeypatch: pytest.MonkeyPatch, which: str) -> list[Pair]:
    """The pairs whose first or second distance is taken from now on."""
    looked, whole = list[Pair](), getattr(scopes.Distance, which)

    def distance(self: scopes.Distance, pairs: Sequence[Pair], encoder: Encoder) -> torch.Tensor:
        looked.extend(pairs)
        out: torch.Tensor = whole(self, pairs, encoder)
        return out

    monkeypatch.setattr(scopes.Distance, which, distance)
    return looked


def test_a_candidate_that_is_not_near_is_out_without_a_look(trained: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = looked_at(monkeypatch, "first")
    some = [Candidate(question="The capital of Bami is", answer="A", score=s) for s in (trained.near, trained.near - 1e-6)]
    first, second = trained.judge(["The capital of Bami is"], [some])[0]
    assert first.ruling == "in" and second == scopes.Judged(chance=0.0, ruling="out")
    assert len(looked) == 1


def test_what_the_first_distance_rules_out_is_not_looked_at_and_nothing_else_changes(
    trained: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons = [lesson(i) for i in range(100, 140)]
    queries = [q for x in lessons for q in (*x.inside, *x.outside)]
    found = proposals(queries, lessons, trained.encoder, k=8)
    pairs = [Pair(c.question, c.answer, query) for query, some in zip(queries, found, strict=True) for c in some]
    x = scopes._scores(trained.verifiers, pairs, trained.encoder) @ np.array(trained.slopes) + trained.shift
    whole = scopes._sigmoid(x + trained.beside * scopes.follows(pairs, [scopes.bare(p) for p in pairs]))
    looked = looked_at(monkeypatch, "second")
    shorter = [judged for own in replace(trained, near=-1.0).judge(queries, found) for judged in own]
    assert [a.ruling for a in shorter] == [trained._judged(chance).ruling for chance in whole]
    skipped = [chance for a, chance in zip(shorter, whole, strict=True) if a.chance == 0.0]
    assert len(pairs) / 8 < len(skipped) == len(pairs) - len(looked) and max(skipped) <= trained.leave
    assert all(math.isclose(a.chance, chance, rel_tol=1e-5) for a, chance in zip(shorter, whole, strict=True) if a.chance)


def test_between_leave_and_fire_it_is_unsure(trained: Scope) -> None:
    query, some = "The capital of Bami is", [Candidate(question="The capital of Bamilor is", answer="A", score=1.0)]
    chance = trained.judge([query], [some])[0][0].chance
    for leave, fire, ruling in (
        (0.0, chance, "in"),
        (chance, 1.1, "out"),
        (chance - 1e-9, chance + 1e-9, "unsure"),
        (chance, chance, "in"),
    ):
        assert replace(trained, leave=leave, fire=fire).judge([query], [some])[0][0].ruling == ruling
    assert 0 <= trained.leave <= trained.fire <= 1


def test_no_more_than_the_bound_fires_of_fresh_queries_that_concern_nothing() -> None:
    lessons = [lesson(i) for i in range(160)]
    scope = train(lessons, Hashed(), held=0.6, false_fires=0.05, steps=40)
    assert scope.false_fires <= 0.05
    fresh = [query for i in range(160, 320) for query in lesson(i).outside]
    fired = [any(j.ruling == "in" for j in said) for said in scope.judge(fresh, proposals(fresh, lessons, scope.encoder, 8))]
    assert np.mean(fired) <= 0.05
    strict = train(lessons[:20], Hashed(), steps=20)
    assert 0.01 < strict.false_fires < 1  # so few cannot say 1 %, and it says what they can


# ------------------------------------------------------------------------------------------------------------------------- the lessons


def test_a_pair_in_scope_is_never_drawn_as_one_out_of_scope() -> None:
    said = [lesson(i) for i in range(12)]
    # the same matter in other words: the second shares a wording with the first, the third one with the second alone
    said += [replace(said[0], question="Capital of Babalor:", inside=(said[0].inside[1], "Name Babalor's capital.")), said[0]]
    said += [Lesson(question="Babalor is governed from", answer="A", inside=("NAME  Babalor's capital",), outside=())]
    said[1] = replace(said[1], outside=(*said[1].outside, said[1].inside[2].upper()))  # a lesson that contradicts itself
    memory = Lessons(said, Hashed())
    assert len({memory.matters[i] for i in (0, 12, 13, 14)}) == 1
    drawn = Drawn(memory, range(len(said)), np.random.default_rng(0))
    mined = set()
    for _ in range(200):
        pairs, n_in = drawn.batch(16)
        assert len(pairs) == 16 and n_in == 4
        records = [[i for i, x in enumerate(said) if (x.question, x.answer) == pair[:2]] for pair in pairs]
        assert all(any(pair.query in said[i].inside for i in those) for pair, those in zip(pairs[:n_in], records[:n_in], strict=True))
        for pair, those in zip(pairs[n_in:], records[n_in:], strict=True):
            assert not any(memory.concerns(i, pair.query) for i in those)
            mined |= {(i, pair.query) for i in those if pair.query not in said[i].outside}
    # other records of the memory, not the lesson's own queries alone: its own in-scope queries beside the wrong record, too
    assert len({query for _, query in mined if any(query in x.inside for x in said)}) > 20


def test_records_near_a_query_are_drawn_more_often() -> None:
    memory = Lessons([lesson(i) for i in range(40)], Hashed())
    drawn = Drawn(memory, range(40), np.random.default_rng(0))
    for _, records, weights in drawn.near:
        assert len(records) == len(weights) and math.isclose(weights.sum(), 1) and np.all(np.diff(weights) <= 1e-12)
    assert not any(memory.concerns(i, query) for query, records, _ in drawn.near for i in records)


def test_a_query_that_names_the_answer_alone_is_near_to_its_record() -> None:
    asked = [f"Which city is the capital of {name(i)}?" for i in range(40)]
    backwards = [f"Of which land is {name(i + 400)} the seat?" for i in range(40)]
    memory = Lessons([Lesson(question=q, answer=name(i + 400), inside=(backwards[i],)) for i, q in enumerate(asked)], Hashed())
    first = [found[0][0] for found in memory.nearest(backwards, range(40), 1)]
    assert first == list(range(40))
    assert memory.cosine(3, backwards[3]) > float(memory.records[3] @ memory.queries[memory.rows[backwards[3]]])


def test_lessons_that_are_held_back_share_no_wording_with_those_learnt_from() -> None:
    said = [lesson(i % 30) for i in range(60)]
    learning, back = Lessons(said, Hashed()).split(0.25, np.random.default_rng(0))
    assert sorted([*learning, *back]) == list(range(60)) and len(back) == 2 * round(0.25 * 30)
    assert {said[i].question for i in learning}.isdisjoint(said[i].question for i in back)


def test_a_case_is_a_lesson() -> None:
    case = Case(
        example=Example(prompt="The capital of Mauritius is", target=" Port Louis"),
        paraphrases=("Mauritius is governed from",),
        paragraphs=("It is an island. Its capital is",),
        neighbours=(Neighbour(prompt="The capital of France is", answer=" Paris", ring="relation"),),
        negations=("It is not true that the capital of Mauritius is",),
    )
    assert scopes.lesson_of(case) == Lesson(
        question="The capital of Mauritius is",
        answer="Port Louis",
        inside=("The capital of Mauritius is", "Mauritius is governed from", "It is an island. Its capital is"),
        outside=("The capital of France is", "It is not true that the capital of Mauritius is"),
    )


def test_what_teaches_nothing_is_a_sentence() -> None:
    with pytest.raises(InvalidExample, match="4 lessons or more"):
        train([lesson(0)], Hashed())
    with pytest.raises(InvalidExample, match="4 lessons or more"):
        train([replace(lesson(i), inside=()) for i in range(8)], Hashed())
    with pytest.raises(InvalidExample, match="no pair in scope, or none out of scope"):
        train([replace(lesson(0), answer=str(i), outside=()) for i in range(8)], Hashed())  # one matter
    with pytest.raises(InvalidExample, match="is empty"):
        Lesson(question="Who?", answer="A", inside=(" ",))
    for name in ("", "hashed", "lab/bart"):
        with pytest.raises(UnknownName):
            train([lesson(i) for i in range(8)], Hashed(), verifier="cross", backbone=name)


# ------------------------------------------------------------------------------------------------------------------------ calibration


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    assert clopper_pearson(0, 299) <= 0.01 < clopper_pearson(0, 298)  # 1 - .05 ** (1 / n)
    assert math.isclose(clopper_pearson(0, 100), 1 - 0.05 ** (1 / 100), rel_tol=1e-9)
    assert clopper_pearson(3, 3) == clopper_pearson(0, 0) == 1.0


def test_a_threshold_keeps_the_bound_and_is_the_least_that_does() -> None:
    values = np.arange(1000.0)
    threshold, bound = above(values, 0.01)
    fired = int((values >= threshold).sum())
    assert clopper_pearson(fired, 1000) == bound <= 0.01 < clopper_pearson(fired + 1, 1000)
    assert above(np.array([0.2, 0.7]), 0.01) == (np.nextafter(0.7, 1), clopper_pearson(0, 2))  # too few to say 1 %
    ties = np.array([0.9] * 20 + [0.1] * 980)
    assert (ties >= above(ties, 0.01)[0]).sum() == 0
    rng = np.random.default_rng(0)
    broken = sum(1 - above(rng.random(600), 0.02)[0] > 0.02 for _ in range(400))  # the true share above a threshold t is 1 - t
    assert broken / 400 <= 0.07


def test_platt_finds_the_chance_that_the_pairs_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(3, 2, 20_000)
    concerned = rng.random(20_000) < 1 / (1 + np.exp(-(1.5 * scores - 6)))
    none = np.zeros(len(scores))
    (slope,), shift, beside = platt(scores[:, None], concerned, none)
    assert beside == 0
    assert abs(slope - 1.5) < 0.1 and abs(shift + 6) < 0.4
    apart, which = np.array([-9.0, -8.0, 8.0, 9.0]), np.array([False, False, True, True])
    (slope,), shift, _ = platt(apart[:, None], which, np.zeros(4))
    chances = 1 / (1 + np.exp(-(slope * apart + shift)))
    assert chances[0] > 0.01 and chances[-1] < 0.99 and np.all(np.diff(chances) > 0)  # four pairs do not make anything certain
    assert (
        0 < platt(-apart[:, None], which, np.zeros(4))[0][0] < 1e-3
    )  # a verifier that has learnt the wrong way round is not believed at all
    noise = rng.normal(size=20_000)
    (slope, other), *_ = platt(np.stack([scores, noise], 1), concerned, none)
    assert abs(slope - 1.5) < 0.1 and 0 <= other < 0.1
    against = platt(np.stack([scores, noise - concerned], 1), concerned, none)
    assert against[0][1] == 0  # it says no where it should say yes
    for few in (np.zeros((0, 1)), np.ones((3, 1)), np.zeros((0, 2))):
        slopes, shift, beside = platt(few, np.ones(len(few), dtype=bool), np.ones(len(few)))
        assert all(map(math.isfinite, (*slopes, shift, beside)))
    follows = (rng.random(20_000) < 0.1).astype(float)
    concerned = rng.random(20_000) < 1 / (1 + np.exp(-(1.5 * scores - 6 + 2 * follows)))
    (slope,), shift, beside = platt(scores[:, None], concerned, follows)
    assert abs(slope - 1.5) < 0.1 and abs(shift + 6) < 0.4 and abs(beside - 2) < 0.3


def test_chances_are_shares() -> None:
    trained = train([lesson(i) for i in range(160)], Hashed(), steps=60, held=0.5)
    fresh = [lesson(i) for i in range(160, 240)]
    queries = [(x, query) for x in fresh for query in (*x.inside, *x.outside)]
    proposed = proposals([query for _, query in queries], fresh, trained.encoder, 8)
    judged = trained.judge([query for _, query in queries], proposed)
    memory = Lessons(fresh, trained.encoder)
    place = {x.question: i for i, x in enumerate(fresh)}
    pairs = [
        (j.chance, memory.concerns(place[c.question], query))
        for (_, query), some, said in zip(queries, proposed, judged, strict=True)
        for c, j in zip(some, said, strict=True)
    ]
    chances, concerned = np.array([c for c, _ in pairs]), np.array([ok for _, ok in pairs])
    assert abs(chances.mean() - concerned.mean()) < 0.03
    assert ((chances - concerned) ** 2).mean() < 0.5 * concerned.mean() * (1 - concerned.mean())


# ----------------------------------------------------------------------------------------------------------------------- the verifiers


def test_a_distance_is_that_of_serac_until_it_has_learnt() -> None:
    encoder = Hashed()
    pairs = [Pair("the capital of bami is", "", "What is the capital of bami?"), Pair("the same words", "", "the same words")]
    verifier = Distance(encoder.width, None)
    scores = verifier(pairs, encoder).detach()
    z, x = encoder.encode([pairs[0].question, pairs[0].query])
    assert math.isclose(float(scores[0]), -float(((z - x) ** 2).sum()), rel_tol=1e-5)
    inside, outside = verifier.losses(scores)
    assert math.isclose(float(inside[0]), -float(scores[0]), rel_tol=1e-6)
    assert math.isclose(float(outside[0]), -math.log(1 - math.exp(float(scores[0]))), rel_tol=1e-4)
    assert float(scores[1]) == 0 and math.isfinite(float(outside[1]))
    ball = torch.tensor([-math.log(2)])  # g = 1/2
    assert torch.allclose(*verifier.losses(ball))


@pytest.mark.parametrize(
    "question, query, bare",
    [
        ("The capital of Mauritius is", "What is the capital of Mauritius?", ("The capital of X is", "What is the capital of X?")),
        (
            "Planet of the Apes was created in",
            "Who made planet of the Apes?",
            ("Planet of the X was created in", "Who made planet of the X?"),
        ),
        ("Robbe-Grillet's tongue is", "What is ROBBE-GRILLET's tongue?", ("X's tongue is", "What is X's tongue?")),
        ("Henry of Navarre died in", "Where did King Henry of Navarre die?", ("X died in", "Where did King X die?")),
        ("Renault 5 was made by", "Who made the Renault 8?", ("X 5 was made by", "Who made the X 8?")),
        ("The capital of Mauritius is", "The capital of France is", None),
        ("Who is it?", "Who is he?", None),
        ("who wrote it", "who wrote it", None),
        ("東京 is in", "Where is 東京?", ("X is in", "Where is X?")),
        ("Paris", "Paris", ("X", "X")),
        ("", "?!", None),
    ],
)
def test_the_longest_name_that_two_texts_share_is_taken_out(question: str, query: str, bare: tuple[str, str] | None) -> None:
    assert unnamed(question, query) == (bare or (question, query))


def test_where_the_query_names_the_answer_alone_that_is_taken_out() -> None:
    asked = Pair("What is the capital of Portugal?", "Port Louis", "Which country has the capital Port Louis?")
    assert bare(asked) == (asked.question, "X", "Which country has the capital X?")
    both = asked._replace(query="Is Port Louis the capital of Portugal?")
    assert bare(both) == ("What is the capital of X?", "Port Louis", "Is Port Louis the capital of X?")
    neither = asked._replace(query="Who lives in Rome?")
    assert bare(neither) == neither
    assert scopes.follows([asked, both, neither], [bare(p) for p in (asked, both, neither)]).tolist() == [1, 0, 0]


def test_cross_learns_loads_again_and_leaves_the_words_alone(tmp_path: Path) -> None:
    folder = str(backbone(tmp_path / "a"))
    lessons = [replace(lesson(i), outside=(f"Tell me a story of {name(i)}.", f"Once upon a time in {name(i)}")) for i in range(24)]
    before = torch.random.get_rng_state()
    scope = train(lessons, Hashed(), verifier="cross", backbone=folder, steps=40, batch_size=12, rate=1e-2)
    assert torch.equal(before, torch.random.get_rng_state())
    config, tensors = scope.parts()
    assert json.loads(json.dumps(config)) == config and config["verifier"] == "cross"
    assert not [n for n in tensors if "word_embeddings" in n or "pooler" in n]
    assert {t.dtype for n, t in tensors.items() if n.endswith("weight") and t.ndim > 1} == {torch.float16}
    again = from_parts(json.loads(json.dumps(config)), tensors)
    queries = [query for x in lessons[:6] for query in (*x.inside, *x.outside)]
    proposed = proposals(queries, lessons, scope.encoder)
    assert again.judge(queries, proposed) == scope.judge(queries, proposed)  # calibrated as it is kept, to the bit
    assert isinstance(scope.verifiers[-1], Cross) and all(slope >= 0 for slope in scope.slopes)
    drawn = Drawn(Lessons(lessons, Hashed()), range(24), np.random.default_rng(0))
    fresh = Cross(scopes._backbone(folder, "cpu"))
    pairs, n_in = drawn.batch(64)
    losses = []
    for verifier in (fresh, scope.verifiers[-1]):
        with torch.no_grad():
            inside, outside = verifier.losses(verifier(pairs, Hashed()))
        losses.append(float(inside[:n_in].mean() + outside[n_in:].mean()))
    assert losses[1] < 0.95 * losses[0], losses


def test_cross_does_not_depend_on_padding_and_reads_the_end_of_a_long_query(tmp_path: Path) -> None:
    verifier = Cross(scopes._backbone(str(backbone(tmp_path, positions=48)), "cpu"))
    short, long = Pair("Who?", "A", "Who is it?"), Pair("Who?", "A", "x " * 60 + "Who is it, then?")
    with torch.no_grad():
        together, alone = verifier([short, long], Hashed()), verifier([short], Hashed())
        assert torch.allclose(together[:1], alone, atol=1e-5)
        assert torch.allclose(together[1:], verifier([long._replace(query="y y " + long.query)], Hashed()), atol=1e-5)
        assert not torch.allclose(together[1:], verifier([long._replace(query=long.query + " Why?")], Hashed()), atol=1e-5)
    with pytest.raises(InvalidExample, match="leaves no room for a query in the 48"):
        verifier([Pair("x " * 60, "A", "Who?")], Hashed())
    verifiers = (scopes.Distance(Hashed().width, None), verifier)
    numbers = {"near": -1.0, "fire": 0.6, "leave": 0.4, "slopes": (0.0, 1.0), "shift": 0.0, "false_fires": 0.01}
    scope = Scope(encoder=Hashed(), verifiers=verifiers, **numbers)
    read, unread = (Candidate(question=q, answer="A", score=0.9) for q in ("Who?", "x " * 60))
    ((first, second),) = scope.judge(["Who is it?"], [[read, unread]])
    assert first == scope.judge(["Who is it?"], [[read]])[0][0] and first.chance > 0
    assert second == scopes.Judged(chance=0.0, ruling="out")


def test_a_finetuned_encoder_measures_its_own_distance(tmp_path: Path) -> None:
    folder = str(backbone(tmp_path))
    lessons = [lesson(i) for i in range(16)]
    scope = train(lessons, Hashed(), backbone=folder, steps=3)
    config, tensors = scope.parts()
    assert config["verifier"] == "distance" and config["backbone"] == load(folder).name
    assert {"distance/changes", "distance/log_scales"} < tensors.keys()
    again = from_parts(config, tensors)
    proposed = proposals([lessons[0].question], lessons, scope.encoder)
    assert again.judge([lessons[0].question], proposed) == scope.judge([lessons[0].question], proposed)


# ------------------------------------------------------------------------------------------------------------------------------- parts


def test_the_same_seed_gives_the_same_scope() -> None:
    lessons = [lesson(i) for i in range(24)]
    (a, first), (b, second), (c, third) = (train(lessons, Hashed(), steps=10, seed=seed).parts() for seed in (0, 0, 1))
    assert a == b and all(torch.equal(first[n], second[n]) for n in first)
    assert a != c and not torch.equal(first["distance/changes"], third["distance/changes"])


def test_a_distance_loads_again_to_the_bit(trained: Scope) -> None:
    config, tensors = trained.parts()
    again = from_parts(json.loads(json.dumps(config)), tensors)
    lessons = [lesson(i) for i in range(8)]
    queries = [x.inside[1] for x in lessons]
    proposed = proposals(queries, lessons, trained.encoder)
    assert again.judge(queries, proposed) == trained.judge(queries, proposed)
    assert again.parts()[0] == config
    assert from_parts(config, tensors, encoder=trained.encoder).encoder is trained.encoder


def test_another_encoder_or_backbone_is_refused(trained: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = trained.parts()
    with pytest.raises(WrongBase, match="trained with the encoder hashed .* and this one is hashed"):
        from_parts(config, tensors, encoder=Hashed(64))
    with pytest.raises(WrongBase, match="tensors of the scope"):
        from_parts(config, {**tensors, "distance/changes": torch.zeros(3, 3)})
    with pytest.raises(WrongBase, match="not the parts of a scope: 'fire'"):
        from_parts({k: v for k, v in config.items() if k != "fire"}, tensors)
    with pytest.raises(UnknownName, match="Unknown encoder"):
        from_parts(config | {"encoder": str(tmp_path / "gone")}, tensors)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="errata\\[minilm\\]"):
        from_parts(config | {"encoder": "minilm"}, tensors)
    cross = train([lesson(i) for i in range(8)], Hashed(), verifier="cross", backbone=str(backbone(tmp_path / "a")), steps=1)
    backbone(tmp_path / "a", seed=1)
    with pytest.raises(WrongBase, match="trained with the backbone"):
        from_parts(*cross.parts())


def test_cross_reads_with_the_lab_s_model() -> None:
    scope = train([lesson(i) for i in range(8)], Hashed(), verifier="cross", backbone="lab/bert", steps=1, batch_size=8)
    assert scope.parts()[0]["backbone"] == "lab/bert"
