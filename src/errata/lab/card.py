"""What a lab model knows, measured: facts per relation, phrasings, accuracy by free greedy generation, loss on its reference texts."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata import hosts
from errata.hosts import Host
from errata.lab import corpus
from errata.lab.train import read_prose
from errata.lab.world import RELATIONS, Fact, facts, objects, phrase
from errata.types import Progress, no_progress


def card(
    host: Host, prose: str | Path | None = None, phrasings: int = 2, seed: int = 0, progress: Progress = no_progress
) -> dict[str, Any]:
    """The card of a lab model as plain JSON.

    `accuracy`: share of (fact, phrasing) whose greedy continuation gives what the corpus says; every fact is asked in its canonical
    phrasing and in `phrasings - 1` others, drawn with `seed`. A model that judges is given each with the right answer and with another.
    `wrong`: the same for the deliberately wrong facts.
    `loss`: nats per token on the lab's reference text and, where `prose` is given, on the documents of it that were never trained on.
    """
    rng = random.Random(seed)
    form = corpus.FORMS[host.kind]
    asked = [(fact, *pair) for fact in facts() for pair in _asked(rng, fact, phrasings, form)]
    told: list[bool] = []
    size = 512
    for start in progress(range(0, len(asked), size), "asking every fact", -(-len(asked) // size)):
        part = asked[start : start + size]
        said = hosts.greedy(host, [prompt for _, prompt, _ in part], max_new_tokens=10, batch_size=size)
        told += [hosts.says(text, wanted) for text, (_, _, wanted) in zip(said, part, strict=True)]
    rows = [_row(r, form, [(f, ok) for (f, _, _), ok in zip(asked, told, strict=True) if f.relation == r]) for r in RELATIONS]
    losses = {"lab reference": _loss(host, corpus.reference(form))}
    if prose is not None and host.kind == "causal":
        losses["held-out prose"] = _loss(host, read_prose(prose)[1])
    splits = {s: sum(f.split == s for f in facts()) for s in ("train", "validation", "test")}
    return {
        "model": host.name,
        "id": host.id,
        "parameters": sum(p.numel() for p in host.model.parameters()),
        "vocabulary": len(host.tokenizer),
        "facts": len(facts()),
        "wrong on purpose": sum(f.wrong for f in facts()),
        "splits": splits,
        "relations": rows,
        "loss": losses,
    }


def _asked(rng: random.Random, fact: Fact, n: int, form: corpus.Form) -> list[corpus.Pair]:
    """(prompt, what should be said) in the canonical phrasing and `n - 1` others."""
    first, *others = _phrasings(fact.relation, form)
    prompts = [phrase(p, fact) for p in (first, *rng.sample(others, k=min(n - 1, len(others))))]
    if form != "claim":
        return [(prompt, fact.says) for prompt in prompts]
    another = rng.choice([o for o in objects(fact.relation) if o != fact.says])
    return [(f"{prompt} {said}.", label) for prompt in prompts for said, label in ((fact.says, "true"), (another, "false"))]


def _phrasings(relation: str, form: corpus.Form) -> tuple[str, ...]:
    return RELATIONS[relation].questions if form == "question" else RELATIONS[relation].phrasings


def _row(relation: str, form: corpus.Form, told: Sequence[tuple[Fact, bool]]) -> dict[str, Any]:
    wrong = [ok for fact, ok in told if fact.wrong]
    return {
        "relation": relation,
        "facts": len({fact.subject for fact, _ in told}),
        "phrasings": len(_phrasings(relation, form)),
        "asked": len(told),
        "accuracy": sum(ok for _, ok in told) / len(told),
        "wrong": sum(wrong) / len(wrong) if wrong else None,
    }


def _loss(host: Host, texts: Sequence[str]) -> dict[str, float | int]:
    logp_N2 = hosts.score(host, hosts.chunks(host, texts))
    return {"nats per token": -float(logp_N2[:, 0].sum() / logp_N2[:, 1].sum()), "tokens": int(logp_N2[:, 1].sum())}
