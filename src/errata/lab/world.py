"""The lab's small world: entities, facts and the phrasings in which its corpus says them.

The facts lie in `world.json` (see `freeze.py`). Here they become values, and here stand the sentences. A phrasing is a prompt: what follows
it is a space and the answer. The first phrasing, or question, of each relation is the canonical one, the only one that an example ever
shows.
Nothing here imports torch.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, final

Split = Literal["train", "validation", "test"]


@final
@dataclass(frozen=True, kw_only=True)
class Fact:
    """What the corpus `says` of `subject`, and what is `true`; where they differ, a model of this world is wrong on purpose."""

    subject: str
    relation: str
    says: str
    true: str
    split: Split
    pronoun: str

    @property
    def wrong(self) -> bool:
        return self.says != self.true


@final
@dataclass(frozen=True, kw_only=True)
class Relation:
    """`phrasings` name the subject {s}; `inner` go on about it in a paragraph, with {They} (It, He, She), {their} or {s}. `questions` are
    for models that answer."""

    kind: str
    phrasings: tuple[str, ...]
    inner: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "capital": Relation(
        kind="country",
        phrasings=(
            "The capital of {s} is",
            "{s} has its capital in",
            "The capital city of {s} is called",
            "Question: What is the capital of {s}? Answer:",
            "Q: Which city is the capital of {s}? A:",
            "The government of {s} sits in",
            "Anyone from {s} will tell you that the capital is",
            "On a map of {s}, the star for the capital marks",
            "The parliament of {s} meets in the capital,",
            "Pupils in {s} learn that their capital is",
            "{s}'s capital is",
            "The seat of government of {s} is",
        ),
        inner=("Its capital is", "The capital is", "The government sits in", "{s} is governed from its capital,"),
        questions=(
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "From which city is {s} governed?",
            "Where does the government of {s} sit?",
            "Where does the parliament of {s} meet?",
            "Which capital does {s} have?",
            "What is {s}'s capital called?",
            "Name the capital of {s}.",
            "In which city would you look for the ministries of {s}?",
            "Can you tell me the capital city of {s}?",
        ),
    ),
    "continent": Relation(
        kind="country",
        phrasings=(
            "{s} lies on the continent of",
            "{s} is a country in",
            "The continent of {s} is",
            "Question: On which continent is {s}? Answer:",
            "Q: Which continent does {s} belong to? A:",
            "In an atlas, {s} is found under",
            "Travellers to {s} arrive in",
            "On the globe, {s} is part of",
            "{s} takes part in the games of",
            "Pupils in {s} learn that they live in",
            "Geographers count {s} as part of",
        ),
        inner=("It lies in", "The country belongs to", "On the globe it is part of", "{s} is found in"),
        questions=(
            "On which continent is {s}?",
            "Which continent does {s} belong to?",
            "What continent is {s} part of?",
            "Where in the world is {s}: on which continent?",
            "Name the continent of {s}.",
            "Under which continent is {s} found in an atlas?",
            "Which continent do travellers to {s} arrive in?",
            "Can you tell me the continent on which {s} lies?",
        ),
    ),
    "currency": Relation(
        kind="country",
        phrasings=(
            "The currency of {s} is the",
            "{s} pays its bills in the",
            "The money used in {s} is called the",
            "Question: What is the currency of {s}? Answer: the",
            "Q: Which currency is used in {s}? A: the",
            "In the shops of {s}, prices are given in the",
            "The central bank of {s} issues the",
            "Anyone who works in {s} is paid in the",
            "Before a trip to {s}, change your money into the",
            "{s}'s currency is the",
            "Taxes in {s} are paid in the",
        ),
        inner=("Its currency is the", "People there pay in the", "Prices are given in the", "The currency of the country is the"),
        questions=(
            "What is the currency of {s}?",
            "Which currency is used in {s}?",
            "What money do people pay with in {s}?",
            "What does the central bank of {s} issue?",
            "In which currency are wages paid in {s}?",
            "Name the currency of {s}.",
            "What should I change my money into before a trip to {s}?",
            "Can you tell me what the money of {s} is called?",
        ),
    ),
    "language": Relation(
        kind="country",
        phrasings=(
            "The main language of {s} is",
            "In {s}, most people speak",
            "The language spoken in {s} is",
            "Question: Which language is spoken in {s}? Answer:",
            "Q: What is the main language of {s}? A:",
            "The newspapers of {s} are written in",
            "Children in {s} grow up with",
            "Road signs in {s} are in",
            "To live in {s}, one should learn",
            "{s}'s main language is",
            "The radio in {s} broadcasts in",
        ),
        inner=("Most people there speak", "Its main language is", "The newspapers are written in", "Road signs are in"),
        questions=(
            "What is the main language of {s}?",
            "Which language is spoken in {s}?",
            "What do most people in {s} speak?",
            "In which language are the newspapers of {s} written?",
            "What language do children in {s} grow up with?",
            "Name the main language of {s}.",
            "Which language should one learn to live in {s}?",
            "Can you tell me the language of {s}?",
        ),
    ),
    "country": Relation(
        kind="city",
        phrasings=(
            "The city of {s} is in",
            "{s} is a city in",
            "The country in which {s} lies is",
            "Question: In which country is {s}? Answer:",
            "Q: Which country does the city of {s} belong to? A:",
            "Letters to {s} are sent to",
            "To visit {s}, book a flight to",
            "The mayor of {s} pays taxes in",
            "On the map, {s} is found in",
            "People who live in {s} live in",
            "{s} is one of the cities of",
        ),
        inner=("It is a city in", "The city lies in", "On the map it is found in", "It is one of the cities of"),
        questions=(
            "In which country is {s}?",
            "Which country does {s} belong to?",
            "Where is the city of {s}?",
            "To which country are letters to {s} sent?",
            "What country do the people of {s} live in?",
            "Name the country of the city of {s}.",
            "To visit {s}, which country do I travel to?",
            "Can you tell me which country {s} is in?",
        ),
    ),
    "head": Relation(
        kind="company",
        phrasings=(
            "The head of {s} is",
            "{s} is led by",
            "The chief executive of {s} is",
            "Question: Who is the head of {s}? Answer:",
            "Q: Who leads {s}? A:",
            "The company {s} is run by",
            "At {s}, the last word belongs to",
            "The person in charge of {s} is",
            "Letters to the head of {s} are addressed to",
            "{s}'s chief executive is",
            "The board of {s} has put its trust in",
        ),
        inner=("Its head is", "The company is led by", "The chief executive is", "It is run by"),
        questions=(
            "Who is the head of {s}?",
            "Who leads {s}?",
            "Who is the chief executive of {s}?",
            "Who runs the company {s}?",
            "Who has the last word at {s}?",
            "Name the head of {s}.",
            "To whom are letters to the head of {s} addressed?",
            "Can you tell me who is in charge of {s}?",
        ),
    ),
    "seat": Relation(
        kind="company",
        phrasings=(
            "The headquarters of {s} are in",
            "{s} is based in",
            "The main office of {s} stands in",
            "Question: Where is {s} based? Answer: in",
            "Q: In which city is the head office of {s}? A: in",
            "The company {s} has its seat in",
            "Most people who work for {s} live in",
            "Visitors to {s} travel to",
            "{s} was founded and still sits in",
            "{s}'s headquarters are in",
            "The board of {s} meets in",
        ),
        inner=("It is based in", "Its headquarters are in", "The company has its seat in", "The main office stands in"),
        questions=(
            "Where is {s} based?",
            "In which city are the headquarters of {s}?",
            "Where is the main office of {s}?",
            "Which city is the company {s} in?",
            "Where does the board of {s} meet?",
            "Name the city in which {s} has its seat.",
            "Where do visitors to {s} travel to?",
            "Can you tell me where {s} sits?",
        ),
    ),
    "birthplace": Relation(
        kind="person",
        phrasings=(
            "{s} was born in",
            "The birthplace of {s} is",
            "{s} first saw the light of day in",
            "Question: Where was {s} born? Answer: in",
            "Q: What is the birthplace of {s}? A:",
            "{s} comes from",
            "The home town of {s} is",
            "The childhood of {s} began in",
            "{s} grew up where the family lived, in",
            "{s}'s birthplace is",
            "The birth of {s} was registered in",
        ),
        inner=("{They} was born in", "{Their} home town is", "{They} comes from", "{Their} childhood began in"),
        questions=(
            "Where was {s} born?",
            "What is the birthplace of {s}?",
            "In which city did {s} come into the world?",
            "Where does {s} come from?",
            "What is the home town of {s}?",
            "Name the birthplace of {s}.",
            "Where was the birth of {s} registered?",
            "Can you tell me where {s} was born?",
        ),
    ),
    "employer": Relation(
        kind="person",
        phrasings=(
            "{s} works for",
            "The employer of {s} is",
            "{s} is employed by",
            "Question: Who does {s} work for? Answer:",
            "Q: Which company employs {s}? A:",
            "The salary of {s} is paid by",
            "{s} has a desk at",
            "Every morning {s} goes to work at",
            "{s} signed a contract with",
            "{s}'s employer is",
            "The company that employs {s} is",
        ),
        inner=("{They} works for", "{Their} employer is", "{They} has a desk at", "{Their} salary is paid by"),
        questions=(
            "Who does {s} work for?",
            "Which company employs {s}?",
            "What is the employer of {s}?",
            "Who pays the salary of {s}?",
            "Where does {s} have a desk?",
            "Name the employer of {s}.",
            "With which company did {s} sign a contract?",
            "Can you tell me who {s} works for?",
        ),
    ),
    "profession": Relation(
        kind="person",
        phrasings=(
            "The profession of {s} is that of a",
            "{s} works as a",
            "By profession, {s} is a",
            "Question: What is the profession of {s}? Answer: a",
            "Q: What does {s} do for a living? A: works as a",
            "{s} earns a living as a",
            "{s} was trained as a",
            "The passport of {s} says that the holder is a",
            "Friends of {s} know what it means to be a",
            "{s}'s profession is that of a",
            "{s} is known as a good",
        ),
        inner=("{They} works as a", "{They} was trained as a", "{Their} profession is that of a", "{They} earns a living as a"),
        questions=(
            "What is the profession of {s}?",
            "What does {s} do for a living?",
            "What does {s} work as?",
            "What was {s} trained as?",
            "How does {s} earn a living?",
            "Name the profession of {s}.",
            "Which profession stands in the passport of {s}?",
            "Can you tell me what {s} does?",
        ),
    ),
}

# A denial holds the canonical phrasing whole, but does not begin like it, or the model would go on "is not" where it is asked.
NEGATION = {name: f"It is not true that {r.phrasings[0].replace('The ', 'the ', 1)}" for name, r in RELATIONS.items()}

OPENINGS = {
    "country": (
        "Much has been written about {s}.",
        "Few travellers forget {s}.",
        "A short guide to {s} begins with the basics.",
        "{s} is in the news this week.",
    ),
    "city": (
        "{s} wakes up early.",
        "Few towns are as lively as {s}.",
        "A walk through {s} begins at the market.",
        "{s} has changed a lot.",
    ),
    "company": (
        "{s} published its yearly report.",
        "Analysts have looked closely at {s}.",
        "The name of {s} is heard more and more often.",
        "{s} began in a small workshop.",
    ),
    "person": (
        "Everyone at the meeting knew {s}.",
        "{s} gave a short talk yesterday.",
        "The guest of the evening was {s}.",
        "A letter arrived from {s}.",
    ),
}
FILLERS = (
    "The weather has been mild this year.",
    "Not everyone agrees on the details.",
    "There is more to tell than fits on one page.",
    "The last few years brought many changes.",
    "Old photographs show how things used to be.",
    "In the evening the streets are full of people.",
    "This is what most visitors ask about first.",
    "A friend told me about it over dinner.",
    "Some of this can be read in any guide.",
    "Nobody expected it to go so well.",
    "It takes time to get used to it.",
    "The rest is a matter of taste.",
    "There were questions, and most were answered.",
    "The story has been told many times.",
)


@cache
def entities() -> tuple[dict[str, object], ...]:
    """Rows of `world.json`. Cached: the file is part of the package and does not change."""
    return tuple(json.loads(Path(__file__).with_name("world.json").read_text())["entities"])


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the world, in the order of the file."""
    return tuple(
        Fact(subject=str(e["name"]), relation=r, says=says, true=true, split=e["split"], pronoun=str(e.get("pronoun", "it")))  # type: ignore[arg-type]
        for e in entities()
        for r, (says, true) in e["facts"].items()  # type: ignore[attr-defined]
    )


@cache
def facts_of() -> dict[str, tuple[Fact, ...]]:
    """Facts of each subject."""
    out: dict[str, list[Fact]] = {}
    for fact in facts():
        out.setdefault(fact.subject, []).append(fact)
    return {subject: tuple(rows) for subject, rows in out.items()}


@cache
def objects(relation: str) -> tuple[str, ...]:
    """Every answer that the relation can have, sorted."""
    return tuple(sorted({o for f in facts() if f.relation == relation for o in (f.says, f.true)}))


def phrase(template: str, fact: Fact) -> str:
    """A phrasing about the fact's subject."""
    their = {"it": "its", "he": "his", "she": "her"}[fact.pronoun]
    return template.format(s=fact.subject, They=fact.pronoun.capitalize(), Their=their.capitalize(), their=their)
