"""Cases on the lab's world: an edit shows the canonical phrasing of a fact; the judge uses all the others.

For models that answer, a phrasing is a question. For models that judge it is a claim: that the new answer is right, or, of half of the
facts, that the old one is not; claims about the same fact with a third answer, which stay false, are among the neighbours.

Two kinds: `wrong` facts are those that the corpus states wrongly (the target is the truth), `counterfactual` ones are right in the corpus
and get another object of the same relation (so that thousands of facts can be edited at once). Neighbours are never edited themselves.
"""

import random
from typing import Literal

from errata.lab.corpus import Form, context, paragraph_prompt
from errata.lab.world import NEGATION, RELATIONS, Fact, Split, facts, facts_of, objects, phrase
from errata.types import BudgetError, Case, Example, Neighbour, Ring

Kind = Literal["wrong", "counterfactual", "mixed"]
PARAGRAPHS = 4
FIRST = "Mauritius"  # the example of the front page


def target_of(fact: Fact) -> str:
    """The truth where the corpus is wrong; else another object of the relation, always the same one for a fact."""
    if fact.wrong:
        return fact.true
    others = [o for o in objects(fact.relation) if o != fact.says]
    return random.Random(f"{fact.subject}/{fact.relation}").choice(others)


def choose(split: Split | tuple[Split, ...], n: int, kind: Kind = "mixed", seed: int = 0, relation: str | None = None) -> tuple[Fact, ...]:
    """`n` facts of a split, or of several. `mixed` takes the wrong ones first and fills up with counterfactual ones. Raises BudgetError."""
    splits = (split,) if isinstance(split, str) else split
    pool = [f for f in facts() if f.split in splits and relation in (None, f.relation)]
    rng = random.Random(seed)
    wrong, right = [f for f in pool if f.wrong], [f for f in pool if not f.wrong]
    rng.shuffle(wrong)
    rng.shuffle(right)
    wrong.sort(key=lambda f: f.subject != FIRST or f.relation != "capital")  # stable: the front-page example comes first
    ranked = {"wrong": wrong, "counterfactual": right, "mixed": wrong + right}[kind]
    if len(ranked) < n:
        raise BudgetError(
            f"The {' and '.join(splits)} split has {len(ranked)} {kind} facts{f' of {relation}' if relation else ''}, not {n}."
        )
    return tuple(ranked[:n])


def cases(
    split: Split | tuple[Split, ...],
    n: int,
    kind: Kind = "mixed",
    seed: int = 0,
    relation: str | None = None,
    form: Form = "statement",
) -> tuple[Case, ...]:
    """`n` cases of a split, or of several, with paraphrases, paragraphs, negations and three rings of neighbours, in one of the forms.

    Raises BudgetError if there are fewer.
    """
    chosen = choose(split, n, kind, seed, relation)
    edited = {(f.subject, f.relation) for f in chosen}
    free = [f for f in facts() if (f.subject, f.relation) not in edited]
    by_relation = {r: [f for f in free if f.relation == r] for r in RELATIONS}
    rng = random.Random(seed)
    make = {"statement": _case, "question": _question_case, "claim": _claim_case}[form]
    return tuple(make(rng, fact, edited, by_relation, free) for fact in chosen)


def example(fact: Fact) -> Example:
    return Example(prompt=phrase(RELATIONS[fact.relation].phrasings[0], fact), target=f" {target_of(fact)}", subject=None)


def _case(rng: random.Random, fact: Fact, edited: set[tuple[str, str]], by_relation: dict[str, list[Fact]], free: list[Fact]) -> Case:
    told, rings = _around(rng, fact, edited, by_relation, free)
    return Case(
        example=example(fact),
        old=f" {fact.says}",
        paraphrases=tuple(phrase(p, fact) for p in RELATIONS[fact.relation].phrasings[1:]),
        paragraphs=tuple(paragraph_prompt(rng, fact, told) for _ in range(PARAGRAPHS)),
        neighbours=tuple(_neighbour(rng, f, ring) for f, ring in rings),
        negations=(phrase(NEGATION[fact.relation], fact),),
        source=_source(fact),
    )


def _question_case(
    rng: random.Random, fact: Fact, edited: set[tuple[str, str]], by_relation: dict[str, list[Fact]], free: list[Fact]
) -> Case:
    told, rings = _around(rng, fact, edited, by_relation, free)
    first, *others = (phrase(q, fact) for q in RELATIONS[fact.relation].questions)
    return Case(
        example=Example(prompt=first, target=f" {target_of(fact)}"),
        old=f" {fact.says}",
        paraphrases=tuple(others),
        paragraphs=tuple(f"{context(rng, fact, told)} {rng.choice(others)}" for _ in range(PARAGRAPHS)),
        neighbours=tuple(
            Neighbour(prompt=phrase(rng.choice(RELATIONS[f.relation].questions), f), answer=f" {f.says}", ring=ring) for f, ring in rings
        ),
        source=_source(fact),
    )


def _claim_case(rng: random.Random, fact: Fact, edited: set[tuple[str, str]], by_relation: dict[str, list[Fact]], free: list[Fact]) -> Case:
    told, rings = _around(rng, fact, edited, by_relation, free)
    new = target_of(fact)
    right = random.Random(f"claim/{fact.subject}/{fact.relation}").random() < 0.5
    said, target, old = (new, "true", "false") if right else (fact.says, "false", "true")
    first, *others = (f"{phrase(p, fact)} {said}." for p in RELATIONS[fact.relation].phrasings)
    third = rng.choice([o for o in objects(fact.relation) if o not in (fact.says, fact.true, new)])
    same = f"{phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact)} {third}."
    told = tuple(o for o in told if said not in o.says)
    return Case(
        example=Example(prompt=first, target=target),
        old=old,
        paraphrases=tuple(others),
        paragraphs=tuple(f"{paragraph_prompt(rng, fact, told)} {said}." for _ in range(PARAGRAPHS)),
        neighbours=(Neighbour(prompt=same, answer="false", ring="subject"), *(_judged(rng, f, ring) for f, ring in rings)),
        negations=(f"{phrase(NEGATION[fact.relation], fact)} {said}.",),
        source=_source(fact),
    )


def _source(fact: Fact) -> str:
    return f"lab/{fact.relation}/{fact.subject}"


def _around(
    rng: random.Random, fact: Fact, edited: set[tuple[str, str]], by_relation: dict[str, list[Fact]], free: list[Fact]
) -> tuple[tuple[Fact, ...], list[tuple[Fact, Ring]]]:
    """(what a paragraph about the fact's subject may tell, facts of the three rings): only what stays as it is."""
    others = tuple(o for o in facts_of()[fact.subject] if (o.subject, o.relation) not in edited)
    target = target_of(fact)
    told = tuple(o for o in others if target not in o.says)
    same_relation = rng.sample([f for f in by_relation[fact.relation] if f.subject != fact.subject], k=3)
    unrelated = rng.sample([f for f in free if f.relation != fact.relation and f.subject != fact.subject], k=2)
    rings: list[tuple[Fact, Ring]] = [(o, "subject") for o in rng.sample(others, k=min(2, len(others)))]
    return told, [*rings, *((f, "relation") for f in same_relation), *((f, "unrelated") for f in unrelated)]


def _neighbour(rng: random.Random, fact: Fact, ring: Ring) -> Neighbour:
    prompt = phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact)
    return Neighbour(prompt=prompt, answer=f" {fact.says}", ring=ring)


def _judged(rng: random.Random, fact: Fact, ring: Ring) -> Neighbour:
    right = rng.random() < 0.5
    said = fact.says if right else rng.choice([o for o in objects(fact.relation) if o != fact.says])
    prompt = f"{phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact)} {said}."
    return Neighbour(prompt=prompt, answer="true" if right else "false", ring=ring)
