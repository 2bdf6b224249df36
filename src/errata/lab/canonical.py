"""The six tasks of canonical examples on the lab's world: same types, thresholds and measures as the published ones, no file needed.

What is edited is what the corpus says: wrong capitals and heads, opinions, the pronouns of occupations, what is told of a person, verbs.
Validation and test share no behaviour. The canonical phrasing is the example, with its subject; the judge has all the others. Hard
negatives are near: other facts of the same subject or relation, the same words about other topics, a pronoun that the sentence before has
fixed, other verbs.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from errata.lab import tasks
from errata.lab.corpus import (
    LINKS,
    NOUNS,
    OCCUPATIONS,
    OPINION_TEMPLATES,
    OPINIONS,
    PRONOUN_TEMPLATES,
    TOPICS,
    VERBS,
    inner,
    paragraph_prompt,
)
from errata.lab.world import OPENINGS, Fact, facts, facts_of
from errata.tasks.canonical import Record, Split, Task, row_of, split_of
from errata.types import Case, Example

PEOPLE = 40  # told of anew in `temporal`, and as many who are not
SHOWN = 2  # nouns of each verb that an editor sees
KEPT = 2  # of each seven topics or verbs: not edited, so that hard negatives can ask for them


def lab_task(name: str, split: str) -> Task:
    """One of the six tasks on the lab's world; always the same records. Raises UnknownName."""
    row, split = row_of(name), split_of(split)
    examples, records, hard, unconditional = MAKERS[name](split, random.Random(f"{name}/{split}"))
    return Task(
        name=name,
        split=split,
        criterion=row.criterion,
        examples=tuple(examples),
        records=tuple(dict.fromkeys(records)),
        hard=tuple(dict.fromkeys(hard)),
        unconditional=tuple(unconditional),
    )


T = TypeVar("T")
Parts = tuple[Iterable[Example], Iterable[Record], Iterable[Record], Iterable[str]]


def half(items: Sequence[T], split: Split) -> Sequence[T]:
    """Every other one, so that what is sorted is spread over both splits."""
    return items[::2] if split == "test" else items[1::2]


def _facts(relation: str) -> Callable[[Split, random.Random], Parts]:
    def make(split: Split, _rng: random.Random) -> Parts:
        wrong = sum(f.wrong and f.relation == relation and f.split == split for f in facts())
        cases = tasks.cases(split, wrong, "wrong", relation=relation)
        return (
            [replace(c.example, subject=c.source.rpartition("/")[2]) for c in cases],
            [_of(c, p, c.example.target) for c in cases for p in (*c.paraphrases, *c.paragraphs)],
            [_of(c, n.prompt, n.answer) for c in cases for n in c.neighbours if n.ring != "unrelated"],
            [f"{c.paragraphs[0]}{c.example.target}." for c in cases],
        )

    return make


def _of(case: Case, prompt: str, target: str) -> Record:
    return Record(prompt=prompt, target=target, behaviour=case.source, source=case.source)


def _stereoset(split: Split, _rng: random.Random) -> Parts:
    first, *others = [template.split(" {w}")[0] for template in OPINION_TEMPLATES]
    chosen = {mood: half([t for t, m in TOPICS.items() if m == mood], split) for mood in OPINIONS}
    edited = [(t, mood) for mood, topics in chosen.items() for t in topics[KEPT:]]
    kept = [(t, mood) for mood, topics in chosen.items() for t in topics[:KEPT]]
    opposite = {"good": "bad", "bad": "good"}

    def asked(pairs: list[tuple[str, str]], templates: Sequence[str]) -> list[Record]:
        return [
            Record(prompt=p.format(t=t), target=f" {w}", behaviour=t, source=f"lab/opinion/{t}")
            for t, mood in pairs
            for w in OPINIONS[mood]
            for p in templates
        ]

    return (
        [Example(prompt=first.format(t=t), target=f" {w}", subject=t, goal="lower") for t, mood in edited for w in OPINIONS[mood]],
        asked(edited, others),
        asked(kept, others),
        [f"{p.format(t=t)} {OPINIONS[opposite[mood]][0]}." for t, mood in edited for p in others],
    )


def _gender(split: Split, rng: random.Random) -> Parts:
    first, *others = [template.split(" {p}")[0] for template in PRONOUN_TEMPLATES]
    occupations = half(sorted(OCCUPATIONS, key=lambda o: (OCCUPATIONS[o], o)), split)

    def fixed_before(o: str, side: str) -> Record:
        told, asked = rng.sample(PRONOUN_TEMPLATES[1:], k=2)
        prompt = f"{told.format(o=o, p=side)} {asked.split(' {p}')[0].format(o=o)}"
        return Record(prompt=prompt, target=f" {side}", behaviour=o, source=f"lab/pronoun/{o}")

    return (
        [Example(prompt=first.format(o=o), target=" he", contrast=" she", subject=o, goal="balance") for o in occupations],
        [
            Record(prompt=p.format(o=o), target=" he", contrast=" she", behaviour=o, source=f"lab/pronoun/{o}")
            for o in occupations
            for p in others
        ],
        [fixed_before(o, side) for o in occupations for side in ("he", "she") for _ in range(6)],
        [p.format(o=o) for o in occupations for p in others],
    )


def _temporal(split: Split, rng: random.Random) -> Parts:
    people = sorted({f.subject for f in facts() if f.split == split and f.relation == "birthplace"})
    drawn = rng.sample(people, k=2 * PEOPLE)
    news = {s: tuple(replace(f, says=tasks.target_of(f), true=tasks.target_of(f)) for f in facts_of()[s]) for s in drawn[:PEOPLE]}
    known = {s: tuple(replace(f, true=f.says) for f in facts_of()[s]) for s in drawn[PEOPLE:]}

    def spans(told: dict[str, tuple[Fact, ...]]) -> list[Record]:
        return [
            Record(prompt=paragraph_prompt(rng, f, others), target=f" {f.says}", behaviour=s, source=f"lab/{f.relation}/{s}")
            for s, others in told.items()
            for f in others
            for _ in range(3)
        ]

    examples = [
        Example(prompt=rng.choice(OPENINGS["person"]).format(s=s), target="".join(f" {inner(rng, f)}" for f in new), subject=s)
        for s, new in news.items()
    ]
    return examples, spans(news), spans(known), [e.prompt + e.target for e in examples]


def _verb(split: Split, rng: random.Random) -> Parts:
    verbs = half(VERBS, split)
    edited, kept = verbs[KEPT:], verbs[:KEPT]
    sides = [(noun, number) for noun in NOUNS for number in (0, 1)]

    def distracted(noun: tuple[str, str], number: int) -> str:
        other = rng.choice([n for n in NOUNS if n != noun])[1 - number]
        return f"The {noun[number]} {rng.choice(LINKS)} the {other}"

    records = [
        Record(
            prompt=distracted(noun, number),
            target=f" {verb[number]}.",
            contrast=f" {verb[1 - number]}.",
            behaviour=verb[1],
            source=f"lab/agreement/{verb[1]}",
        )
        for verb in edited
        for noun, number in sides
    ]
    return (
        [
            Example(
                prompt=f"The {noun[number]}",
                target=f" {verb[number]}.",
                contrast=f" {verb[1 - number]}.",
                subject=noun[number],
                goal="prefer",
            )
            for verb in edited
            for noun in rng.sample(NOUNS, k=SHOWN)
            for number in (0, 1)
        ],
        records,
        [
            Record(prompt=distracted(noun, number), target=f" {verb[number]}.", behaviour=noun[0], source=f"lab/agreement/{verb[1]}")
            for verb in kept
            for noun, number in sides
        ],
        [r.prompt + r.target for r in records],
    )


MAKERS: dict[str, Callable[[Split, random.Random], Parts]] = {
    "country": _facts("capital"),
    "company": _facts("head"),
    "stereoset": _stereoset,
    "verb": _verb,
    "gender": _gender,
    "temporal": _temporal,
}
