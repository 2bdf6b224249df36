"""The four tasks of the edit memory on the lab's world: the same values as `tasks/scope.py`, no file needed.

    qa         questions: the canonical one is the edit, the others are in scope; out of scope: unrelated facts
    qa-hard    in scope, besides: what the edit implies the other way round ("Which country has the capital Port Louis?"), where then one
               answer alone is right, and yes/no questions; out: other facts of the subject, the relation of other subjects, and both kinds
               of question about facts that are not edited
    fc         claims: the new one is the edit; in scope: it in other words (true), and what the corpus says instead (false)
    convsent   topics: what the corpus thinks of them is turned round; in scope: utterances of that mood; out: other topics

What can be asked of the lab's models as they are: lab/t5 knows its world's questions, and the capital's country; it has never seen another
question the other way round, or a yes/no one. lab/bert judges claims. lab/neox tells its opinion when it is asked for it, in all of the
published templates but "How do you view".

Splits are those of the entities, and what lies out of scope is of no later split than the edits. Topics of the test split are those of the
canonical task; for training there are, besides some real ones, topics put together from their words, of which the corpus thinks nothing.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from errata.lab.canonical import half
from errata.lab.corpus import OPINIONS, TOPICS
from errata.lab.tasks import Kind, choose, target_of
from errata.lab.world import RELATIONS, Fact, Split, facts, facts_of, objects, phrase
from errata.tasks.scope import OPPOSITE, TEMPLATES, opinion_case, opinions, prefixed
from errata.types import BudgetError, Example, Query, Ring, ScopeCase, UnknownName

INVERSE: dict[str, tuple[str, ...]] = {  # asked with the answer {o} for the subject, where one subject alone has it
    "capital": ("Which country has the capital {o}?", "Of which country is {o} the capital?", "Name the country whose capital is {o}."),
    "country": ("Which city is in {o}?", "Which city belongs to {o}?", "Name the city that is found in {o}."),
    "head": ("Which company does {o} lead?", "Of which company is {o} the head?", "Name the company that is led by {o}."),
    "seat": ("Which company is based in {o}?", "Which company has its headquarters in {o}?", "Name the company that has its seat in {o}."),
    "birthplace": ("Who was born in {o}?", "Whose birthplace is {o}?", "Name the person who comes from {o}."),
    "employer": ("Who works for {o}?", "Who is employed by {o}?", "Name the person who has a desk at {o}."),
}
MOODS = {"good": "pos", "bad": "neg"}
SAID = {side: tuple(f"I find them {w}." for w in OPINIONS[mood]) for mood, side in MOODS.items()}
SPOKEN = tuple(t for t in TEMPLATES if not t.startswith("How"))  # which lab/neox answers with an opinion
LATER: dict[Split, tuple[Split, ...]] = {"train": ("validation", "test"), "validation": ("test",), "test": ()}  # not met before
OUTSIDE = 3  # queries out of scope of each ring
CLAIMS = 4  # of each label
TRAINED = 4  # of the seven topics of each mood that are not for tests; the others are for validation


def scope_cases(name: str, split: Split, n: int, seed: int = 0, kind: Kind = "mixed") -> tuple[ScopeCase, ...]:
    """`n` cases of one of the four tasks; their edits go together in one memory, and nothing is out of scope that concerns one of them.

    `kind` is that of `lab.tasks.choose`, and says nothing of convsent. Raises UnknownName, BudgetError if there are fewer.
    """
    if name == "convsent":
        return _convsent(split, n, seed)
    if name not in MAKERS:
        raise UnknownName.among("task", name, (*MAKERS, "convsent"))
    around = _Around(choose(split, n, kind, seed), split, random.Random(f"{name}/{split}/{seed}"))
    return tuple(MAKERS[name](around, fact) for fact in around.chosen)


class _Around:
    """The facts that are edited, and those that stay as they are."""

    def __init__(self, chosen: tuple[Fact, ...], split: Split, rng: random.Random) -> None:
        self.chosen, self.rng = chosen, rng
        self.edited = {(f.subject, f.relation) for f in chosen}
        stay = [f for f in facts() if (f.subject, f.relation) not in self.edited]
        self.free = [f for f in stay if f.split not in LATER[split]]
        self.of = {r: [f for f in self.free if f.relation == r] for r in RELATIONS}
        self.holders = Counter([*((f.relation, f.says) for f in stay), *((f.relation, target_of(f)) for f in chosen)])
        moved = {(f.relation, answer) for f in chosen for answer in (f.says, target_of(f))}
        asked = [f for f in self.free if self.one_has(f.relation, f.says) and (f.relation, f.says) not in moved]
        self.inverses = {r: [f for f in asked if f.relation == r] for r in INVERSE}

    def one_has(self, relation: str, answer: str) -> bool:
        """Whether, with the edits made, one subject alone has the answer."""
        return relation in INVERSE and self.holders[relation, answer] == 1

    def rings(self, fact: Fact) -> list[tuple[Fact, Ring]]:
        """Facts that stay: of the same subject, of the same relation, of neither."""
        subject = [f for f in facts_of()[fact.subject] if (f.subject, f.relation) not in self.edited]
        relation = [f for f in self.of[fact.relation] if f.subject != fact.subject]
        neither = [f for f in self.free if f.relation != fact.relation and f.subject != fact.subject]
        rings: tuple[tuple[Ring, list[Fact]], ...] = (("subject", subject), ("relation", relation), ("unrelated", neither))
        return [(f, ring) for ring, pool in rings for f in self.rng.sample(pool, k=min(OUTSIDE, len(pool)))]


def _qa(around: _Around, fact: Fact) -> ScopeCase:
    first, *others = (phrase(q, fact) for q in RELATIONS[fact.relation].questions)
    target = f" {target_of(fact)}"
    prompts = [("edit", first), *(("rephrase", other) for other in others)]
    return ScopeCase(
        example=Example(prompt=first, target=target),
        inside=tuple(Query(prompt=p, answer=target, kind=kind, about=fact.subject) for kind, p in prompts),
        outside=tuple(_question(around.rng, f, ring) for f, ring in around.rings(fact) if ring == "unrelated"),
        about=fact.subject,
        source=f"lab/{fact.relation}/{fact.subject}",
    )


def _qa_hard(around: _Around, fact: Fact) -> ScopeCase:
    case, rng, new = _qa(around, fact), around.rng, target_of(fact)
    inverse = INVERSE.get(fact.relation, ()) if around.one_has(fact.relation, new) else ()
    inside = [Query(prompt=p.format(o=new), answer=f" {fact.subject}", kind="implication", hard=True, about=fact.subject) for p in inverse]
    inside += [_yes_no(rng, fact, new, " True"), _yes_no(rng, fact, rng.choice([fact.says, _third(rng, fact)]), " False")]
    near = [(f, ring) for f, ring in around.rings(fact) if ring != "unrelated"]
    outside = [_question(rng, f, ring) for f, ring in near]
    for f in (rng.choice(own) for own in ([f for f, ring in near if ring == r] for r in ("subject", "relation")) if own):
        outside.append(_yes_no(rng, f, *rng.choice([(f.says, " True"), (_third(rng, f), " False")])))
    if others := [f for f in around.inverses.get(fact.relation, ()) if f.subject != fact.subject]:
        f = rng.choice(others)
        prompt = rng.choice(INVERSE[f.relation]).format(o=f.says)
        outside.append(Query(prompt=prompt, answer=f" {f.subject}", kind="implication", hard=True, about=f.subject))
    return replace(case, inside=(*case.inside, *inside), outside=(*case.outside, *outside))


def _fc(around: _Around, fact: Fact) -> ScopeCase:
    rng, new = around.rng, target_of(fact)
    first, *others = RELATIONS[fact.relation].phrasings
    evidence = f"{phrase(first, fact)} {new}."
    right, wrong = (rng.sample(others, k=CLAIMS) for _ in range(2))
    return ScopeCase(
        example=Example(prompt=evidence, target="true"),
        inside=(
            Query(prompt=evidence, answer="true", kind="edit", about=fact.subject),
            *(Query(prompt=f"{phrase(p, fact)} {new}.", answer="true", kind="claim", about=fact.subject) for p in right),
            *(Query(prompt=f"{phrase(p, fact)} {fact.says}.", answer="false", kind="claim", hard=True, about=fact.subject) for p in wrong),
        ),
        outside=tuple(_claim(rng, f, ring) for f, ring in around.rings(fact)),
        about=fact.subject,
        source=f"lab/{fact.relation}/{fact.subject}",
    )


MAKERS: dict[str, Callable[[_Around, Fact], ScopeCase]] = {"qa": _qa, "qa-hard": _qa_hard, "fc": _fc}


def _third(rng: random.Random, fact: Fact) -> str:
    """What neither the corpus says nor an edit would."""
    taken = {fact.says, fact.true, target_of(fact)}
    return rng.choice([o for o in objects(fact.relation) if o not in taken])


def _question(rng: random.Random, fact: Fact, ring: Ring) -> Query:
    prompt = phrase(rng.choice(RELATIONS[fact.relation].questions), fact)
    return Query(prompt=prompt, answer=f" {fact.says}", kind=ring, hard=ring != "unrelated", about=fact.subject)


def _claim(rng: random.Random, fact: Fact, ring: Ring) -> Query:
    said, label = rng.choice([(fact.says, "true"), (_third(rng, fact), "false")])
    prompt = f"{phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact)} {said}."
    return Query(prompt=prompt, answer=label, kind=ring, hard=ring != "unrelated", about=fact.subject)


def _yes_no(rng: random.Random, fact: Fact, said: str, label: str) -> Query:
    plain = [p for p in RELATIONS[fact.relation].phrasings if not p.startswith("Q")]  # a statement, no question with its answer
    prompt = prefixed(rng, f"{phrase(rng.choice(plain), fact)} {said}.")
    return Query(prompt=prompt, answer=label, kind="yes/no", hard=True, about=fact.subject)


# ------------------------------------------------------------------------------------------------------------------------------- opinions


def topics(split: Split) -> tuple[tuple[str, str], ...]:
    """(topic, side that the corpus takes) of a split; the side of one that is put together is drawn."""
    real = {
        side: half([t for t, m in TOPICS.items() if m == mood], "test" if split == "test" else "validation") for mood, side in MOODS.items()
    }
    if split != "test":
        real = {side: own[:TRAINED] if split == "train" else own[TRAINED:] for side, own in real.items()}
    found = [(t, side) for side, own in real.items() for t in own]
    if split == "train":
        words = [t.split(" ", 1) for t, _ in found]
        made = {f"{a} {b}" for a, _ in words for _, b in words} - TOPICS.keys()
        found += [(t, random.Random(t).choice(sorted(OPPOSITE))) for t in sorted(made)]
    return tuple(found)


def _convsent(split: Split, n: int, seed: int) -> tuple[ScopeCase, ...]:
    there = topics(split)
    if not 0 < n <= len(there):
        raise BudgetError(f"The {split} split has {len(there)} topics, not {n}.")
    rng = random.Random(f"convsent/{split}/{seed}")
    chosen = rng.sample(there, k=n)
    edited, unseen = {t for t, _ in chosen}, {t for later in LATER[split] for t, _ in topics(later)}
    others = [(t, MOODS[mood]) for t, mood in TOPICS.items() if t not in edited | unseen]
    others += [pair for pair in there if pair[0] not in edited and pair not in others]
    return tuple(_turned(rng, topic, side, others) for topic, side in chosen)


def _turned(rng: random.Random, topic: str, side: str, others: Sequence[tuple[str, str]]) -> ScopeCase:
    case = opinion_case(rng, topic, OPPOSITE[side], SAID, SPOKEN, f"lab/opinion/{topic}")
    words = set(topic.split())
    akin, apart = [o for o in others if words & set(o[0].split())], [o for o in others if not words & set(o[0].split())]
    drawn = [(o, hard) for pool, hard in ((akin, True), (apart, False)) for o in rng.sample(pool, k=min(OUTSIDE, len(pool)))]
    outside = (opinions(rng, t, [rng.choice(SAID[s])], SPOKEN, "relation", hard) for (t, s), hard in drawn)
    return replace(case, outside=tuple(q for found in outside for q in found))
