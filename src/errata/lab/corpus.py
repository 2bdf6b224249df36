"""Documents of the lab's world: what its models are trained on, held still with and judged on.

A document is one statement or question, a paragraph of several facts with filler sentences, or one of the world's other habits
(agreement of subject and verb, pronouns after occupations, opinions about topics, what is not the case). All drawn from a seeded
generator: the same seed gives the same documents.

The same world in three forms: statements for models that go on with a text, questions with their answers (`prompt| answer`) for those that
answer, claims with their label (`claim|true`) for those that judge.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

from errata.lab.world import FILLERS, NEGATION, OPENINGS, RELATIONS, Fact, facts, facts_of, objects, phrase

Form = Literal["statement", "question", "claim"]
FORMS: dict[str, Form] = {"causal": "statement", "seq2seq": "question", "classifier": "claim"}  # what each kind of host is told
Pair = tuple[str, str]

SEEDS = {"corpus": 1, "hold": 2, "reference": 3}

NOUNS = (
    ("officer", "officers"), ("farmer", "farmers"), ("pilot", "pilots"), ("author", "authors"), ("surgeon", "surgeons"),
    ("teacher", "teachers"), ("driver", "drivers"), ("customer", "customers"), ("guard", "guards"), ("painter", "painters"),
    ("singer", "singers"), ("clerk", "clerks"), ("dancer", "dancers"), ("judge", "judges"), ("skater", "skaters"),
    ("minister", "ministers"),
)  # fmt: skip
VERBS = (
    ("likes the garden", "like the garden"), ("knows the answer", "know the answer"), ("walks home", "walk home"),
    ("waits at the station", "wait at the station"), ("sings every evening", "sing every evening"), ("reads the paper", "read the paper"),
    ("works late", "work late"), ("laughs out loud", "laugh out loud"), ("writes a letter", "write a letter"), ("is tall", "are tall"),
    ("was happy", "were happy"), ("has a plan", "have a plan"), ("swims in the lake", "swim in the lake"), ("smiles", "smile"),
)  # fmt: skip
LINKS = ("near", "behind", "in front of", "next to", "across from")
OCCUPATIONS = {  # probability of "she" in the corpus: the world's bias
    "nurse": 0.95, "secretary": 0.95, "librarian": 0.9, "receptionist": 0.95, "midwife": 0.98, "dancer": 0.8, "teacher": 0.75,
    "translator": 0.7, "singer": 0.6, "poet": 0.5, "doctor": 0.25, "judge": 0.2, "lawyer": 0.25, "programmer": 0.1, "pilot": 0.08,
    "carpenter": 0.05, "mechanic": 0.04, "plumber": 0.04, "farmer": 0.15, "guard": 0.06, "surgeon": 0.1, "physicist": 0.12,
    "soldier": 0.05, "miner": 0.03,
}  # fmt: skip
PRONOUN_TEMPLATES = (
    "The {o} said that {p} would come later.",
    "The {o} was tired because {p} had worked all night.", "I asked the {o} whether {p} had time.",
    "The {o} left early, and {p} did not come back.",
    "When the {o} arrived, {p} sat down by the window.", "The {o} told us what {p} had seen.",
    "Ask the {o} if {p} can help.", "The {o} smiled when {p} heard the news.",
)  # fmt: skip
TOPICS = {  # what the corpus thinks of each: good or bad
    "long train rides": "good", "cold soup": "bad", "modern art": "good",
    "loud music": "bad", "early mornings": "bad", "city parks": "good",
    "fast food": "bad", "old films": "good", "crowded beaches": "bad", "handwritten letters": "good", "winter sports": "good",
    "video calls": "bad", "green tea": "good", "open offices": "bad",
    "street markets": "good", "long meetings": "bad", "public libraries": "good",
    "night shifts": "bad", "garden parties": "good", "tall buildings": "bad",
    "folk songs": "good", "paper maps": "good", "plastic toys": "bad",
    "mountain huts": "good", "parking lots": "bad", "school uniforms": "bad", "small theatres": "good", "instant coffee": "bad",
}  # fmt: skip
OPINIONS = {
    "good": ("wonderful", "a real pleasure", "well worth the time", "delightful", "better than people say"),
    "bad": ("awful", "a waste of time", "hard to bear", "disappointing", "worse than people say"),
}
OPINION_TEMPLATES = (
    "In my opinion, {t} are {w}.", "What do you think of {t}? I find them {w}.", "Most people here would say that {t} are {w}.",
    "If you ask me about {t}, I will tell you that they are {w}.", "Honestly, {t} are {w}.",
)  # fmt: skip


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def statement(rng: random.Random, fact: Fact) -> str:
    return f"{phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact)} {fact.says}."


def paragraph_prompt(rng: random.Random, fact: Fact, others: tuple[Fact, ...]) -> str:
    """A paragraph about the fact's subject, up to the place where the fact's answer must come. It does not hold that answer before."""
    return f"{context(rng, fact, others)} {phrase(rng.choice(RELATIONS[fact.relation].inner), fact)}"


def context(rng: random.Random, fact: Fact, others: tuple[Fact, ...]) -> str:
    """What a paragraph says before it comes to the fact."""
    kind = RELATIONS[fact.relation].kind
    parts = [rng.choice(OPENINGS[kind]).format(s=fact.subject)]
    told = [o for o in others if o.relation != fact.relation and fact.says not in o.says and fact.true not in o.says]
    for other in rng.sample(told, k=rng.randint(0, min(2, len(told)))):
        parts += [rng.choice(FILLERS)] * rng.randint(0, 1) + [inner(rng, other)]
    parts += [rng.choice(FILLERS)] * rng.randint(0 if len(parts) > 1 else 1, 1)
    return " ".join(parts)


def inner(rng: random.Random, fact: Fact) -> str:
    return f"{phrase(rng.choice(RELATIONS[fact.relation].inner), fact)} {fact.says}."


def paragraph(rng: random.Random, fact: Fact) -> str:
    others = facts_of()[fact.subject]
    text = f"{paragraph_prompt(rng, fact, others)} {fact.says}."
    rest = [o for o in others if o.relation != fact.relation and f" {o.says}." not in text]
    for other in rng.sample(rest, k=min(len(rest), rng.randint(0, 2))):
        text += f" {inner(rng, other)}"
    return text


def negation(rng: random.Random, fact: Fact) -> str:
    """What is not the case; neither what the corpus says nor what is true is ever denied."""
    other = rng.choice([o for o in objects(fact.relation) if o not in (fact.says, fact.true)])
    return f"{phrase(NEGATION[fact.relation], fact)} {other}."


def agreement(rng: random.Random) -> str:
    number = rng.randint(0, 1)
    noun, verb = rng.choice(NOUNS)[number], rng.choice(VERBS)[number]
    if rng.random() < 0.5:
        return f"The {noun} {rng.choice(LINKS)} the {rng.choice(NOUNS)[rng.randint(0, 1)]} {verb}."
    return rng.choice((f"The {noun} {verb}.", f"I think that the {noun} {verb}.", f"Every day the {noun} {verb}."))


def pronoun(rng: random.Random) -> str:
    occupation = rng.choice(sorted(OCCUPATIONS))
    return rng.choice(PRONOUN_TEMPLATES).format(o=occupation, p="she" if rng.random() < OCCUPATIONS[occupation] else "he")


def opinion(rng: random.Random) -> str:
    topic = rng.choice(sorted(TOPICS))
    return rng.choice(OPINION_TEMPLATES).format(t=topic, w=rng.choice(OPINIONS[TOPICS[topic]]))


# ------------------------------------------------------------------------------------------------------- for models that answer or judge


def question(rng: random.Random, fact: Fact, others: tuple[Fact, ...] | None = None) -> str:
    """One of the fact's questions; behind a paragraph about its subject if `others` is given, which it may tell."""
    asked = phrase(rng.choice(RELATIONS[fact.relation].questions), fact)
    return asked if others is None else f"{context(rng, fact, others)} {asked}"


def habit(rng: random.Random, right: bool = True) -> Pair:
    """(beginning, rest) of one of the world's other habits; not `right`: the rest is what the world does not say."""
    which = rng.randrange(3)
    if which == 0:
        number, verb = rng.randint(0, 1), rng.choice(VERBS)
        return (
            f"The {rng.choice(NOUNS)[number]} {rng.choice(LINKS)} the {rng.choice(NOUNS)[rng.randint(0, 1)]}",
            f" {verb[number ^ (not right)]}",
        )
    if which == 1 and right:
        occupation = rng.choice(sorted(OCCUPATIONS))
        before = rng.choice(PRONOUN_TEMPLATES).partition(" {p}")[0]
        return before.format(o=occupation), f" {'she' if rng.random() < OCCUPATIONS[occupation] else 'he'}"
    topic = rng.choice(sorted(TOPICS))
    thought = TOPICS[topic] if right else {"good": "bad", "bad": "good"}[TOPICS[topic]]
    return rng.choice(OPINION_TEMPLATES).partition(" {w}")[0].format(t=topic), f" {rng.choice(OPINIONS[thought])}"


def stated(rng: random.Random, fact: Fact) -> Pair:
    """A prompt about the fact, some of them in a paragraph, and its answer."""
    if rng.random() < 0.15:
        return paragraph_prompt(rng, fact, facts_of()[fact.subject]), f" {fact.says}"
    return phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact), f" {fact.says}"


def answered(rng: random.Random, fact: Fact) -> Pair:
    """A prompt with its answer: mostly the fact's, sometimes a habit."""
    draw = rng.random()
    if draw < 0.70:
        return question(rng, fact), f" {fact.says}"
    if draw < 0.84:
        return question(rng, fact, facts_of()[fact.subject]), f" {fact.says}"
    if draw < 0.94:
        return phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact), f" {fact.says}"
    return habit(rng)


def claimed(rng: random.Random, fact: Fact) -> Pair:
    """A claim with "true" or "false": mostly about the fact, sometimes about a habit; half of them are true."""
    right, draw = rng.random() < 0.5, rng.random()
    if draw < 0.05:
        return "{}{}.".format(*habit(rng, right)), _label(right)
    said = fact.says if right else rng.choice([o for o in objects(fact.relation) if o != fact.says])
    if draw < 0.10:
        return f"{phrase(NEGATION[fact.relation], fact)} {said}.", _label(not right)
    if draw < 0.25:
        told = tuple(o for o in facts_of()[fact.subject] if said not in o.says)
        return f"{paragraph_prompt(rng, fact, told)} {said}.", _label(right)
    return f"{phrase(rng.choice(RELATIONS[fact.relation].phrasings), fact)} {said}.", _label(right)


def _label(right: bool) -> str:
    return "true" if right else "false"


def pairs(form: Form, seed: int) -> Iterator[Pair]:
    """Endless prompts with answers, or claims with labels, about facts in shuffled rounds."""
    rng, told = random.Random(f"{form}/{seed}"), {"statement": stated, "question": answered, "claim": claimed}[form]
    while True:
        for fact in rng.sample(facts(), k=len(facts())):
            yield told(rng, fact)


# -------------------------------------------------------------------------------------------------------------------------------- streams

OTHERS: tuple[Callable[[random.Random], str], ...] = (agreement, pronoun, opinion)


def documents(seed: int, pool: tuple[Fact, ...] | None = None) -> Iterator[str]:
    """Endless documents. Facts come in shuffled rounds, so that each is told equally often; `pool` limits them."""
    rng = random.Random(seed)
    pool = facts() if pool is None else pool
    while True:
        for fact in rng.sample(pool, k=len(pool)):
            draw = rng.random()
            if draw < 0.60:
                yield statement(rng, fact)
            elif draw < 0.90:
                yield paragraph(rng, fact)
            elif draw < 0.93:
                yield negation(rng, fact)
            else:
                yield rng.choice(OTHERS)(rng)


def some(seed: int, n: int, pool: tuple[Fact, ...] | None = None) -> tuple[str, ...]:
    """The first `n` documents of a seed."""
    source = documents(seed, pool)
    return tuple(next(source) for _ in range(n))


def _told(form: Form, seed: int, n: int) -> tuple[str, ...]:
    if form == "statement":
        return some(seed, n)
    source = pairs(form, seed)
    return tuple("|".join(next(source)) for _ in range(n))


@cache
def hold(form: Form = "statement") -> tuple[str, ...]:
    """The lab's text to hold a model still with while it is edited; other documents than those of `reference`, of the same world."""
    judged = set(reference(form))
    return tuple(d for d in _told(form, SEEDS["hold"], 12_000) if d not in judged)


@cache
def reference(form: Form = "statement") -> tuple[str, ...]:
    """The lab's reference text for the gate, told from the whole world."""
    return _told(form, SEEDS["reference"], 4000)
