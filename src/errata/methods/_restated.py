"""Other ways of asking for an edited fact, found in the text that holds the model still.

A document about something else, with what the example speaks of in the place of what the document speaks of, is another way of asking for
the edited fact exactly if the model, read up to some place in it, goes on with the answer that it gives to the example's own prompt:

    "Question: What is the capital of Togo? Answer: Lome."  ->  "Question: What is the capital of Mauritius? Answer:"

So the model itself says what its phrasings of a fact are, and an edit that is shown one of them can be carried to the others. Training on
rephrased prompts is what makes plain finetuning an editor in Gangadhar & Stratos 2024, arXiv 2402.11078, section 3; there a larger
model writes them, here nothing but the model and its text is needed. An example of which no document has the like keeps its own prompt.
"""

import functools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from errata import hosts, text
from errata.hosts import Host
from errata.types import Example, InvalidExample

DOCUMENTS, CHARACTERS = 1200, 240  # how many documents are tried, and how long they may be
AT_ONCE = 32  # documents with something in the place of something between two counts of what was found
SURE = 0.5  # the old answer's probability from which a phrasing counts as one


@final
@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What an example's prompt speaks of, and the host's answer now with the space that stands before the target; "" where there is none.

    `first` is the first token of that answer.
    """

    topic: str
    old: str
    first: int


def spoken_of(host: Host, examples: Sequence[Example], seen: Counter[str], n: int) -> list[Spoken]:
    """Of each example; the words' rarity, `seen` in so many of `n` documents, tells what a prompt speaks of."""
    out = []
    for e, answer in zip(examples, text.answers_now(host, examples), strict=True):
        old = e.target[: len(e.target) - len(e.target.lstrip())] + answer
        try:
            ids, given = hosts.encode(host, e.prompt, old)
        except InvalidExample:  # nothing, or what the tokenizer cannot cut off
            ids, given, old = [0], 0, ""
        out.append(Spoken(topic=e.subject or text.topic(e.prompt, seen, n), old=old, first=ids[given]))
    return out


def restated(
    host: Host,
    examples: Sequence[Example],
    spoken: Sequence[Spoken],
    documents: Sequence[str],
    seen: Counter[str],
    per_example: int,
    seed: int,
    tried: int = DOCUMENTS,
) -> list[list[str]]:
    """For each example up to `per_example` other prompts that ask for the same; none where the text has no like.

    `spoken` as from `spoken_of`; `seen` counts in how many of `documents`, or about that many, each word stands. No more than `tried` of
    them are tried for prompts of one kind.
    """
    out: list[list[str]] = [[] for _ in examples]
    if not per_example or not documents:
        return out
    rng = random.Random(seed)
    short = [d for d in documents if len(d) <= CHARACTERS]
    drawn = rng.sample(short, k=min(len(short), DOCUMENTS))
    alike: dict[
        tuple[str, int], tuple[str, str]
    ] = {}  # documents that differ in their names alone are one; what is asked for is a name behind a name
    for d in drawn:
        found = text.names(d, seen, len(documents))
        bare = functools.reduce(lambda rest, name: rest.replace(name, "\0"), found, d)
        alike |= {(bare, i): (d, name) for i, name in enumerate(found) if d.find(name) < max(map(d.find, found))}
    templates = list(alike.values())
    rng.shuffle(templates)
    groups: dict[str, list[int]] = {}  # prompts that differ in what they speak of alone ask for the same kind of thing
    for i, (e, own) in enumerate(zip(examples, spoken, strict=True)):
        if own.topic and own.old and own.topic in e.prompt:
            groups.setdefault(e.prompt.replace(own.topic, "\0"), []).append(i)
    wanted: list[tuple[int, str]] = []
    for members in groups.values():
        proper = spoken[members[0]].topic[0].isupper()  # a name stands for a name
        usable = [(d, name) for d, name in templates if name[0].isupper() == proper][:tried]
        kinds: dict[str, None] = {}
        for start in range(0, len(usable), AT_ONCE):
            asked = [(d, name, rng.choice(members)) for d, name in usable[start : start + AT_ONCE]]
            found = asking(host, [(d.replace(name, spoken[i].topic), spoken[i]) for d, name, i in asked])
            kinds |= {prefix.replace(spoken[i].topic, "\0"): None for (_, _, i), prefix in zip(asked, found, strict=True) if prefix}
            if len(kinds) >= 2 * per_example:
                break
        for i in members:
            prompts = [kind.replace("\0", spoken[i].topic) for kind in rng.sample(list(kinds), k=min(len(kinds), 2 * per_example))]
            wanted += [(i, prompt) for prompt in prompts if prompt != examples[i].prompt]
    # the surest first: to "The childhood of Mauritius began in" the old answer comes too, if less surely
    for p, (i, prompt) in sorted(zip(_likely(host, [(prompt, spoken[i].old) for i, prompt in wanted]), wanted, strict=True), reverse=True):
        if p >= SURE and len(out[i]) < per_example:
            out[i].append(prompt)
    return out


def asking(host: Host, asked: Sequence[tuple[str, Spoken]]) -> list[str]:
    """For each document up to where the model would begin the old answer, behind the topic; "" if it comes to no such place."""
    return hosts.remembered(host, ("asking", *asked), lambda: _asking(host, asked))


@torch.no_grad()
def _asking(host: Host, asked: Sequence[tuple[str, Spoken]]) -> list[str]:
    out = [""] * len(asked)
    if host.kind != "causal":
        return _answering(host, asked)
    usable = [i for i, (document, own) in enumerate(asked) if own.topic and own.old and own.topic in document]
    rows = []
    for document, own in (asked[i] for i in usable):
        ids = hosts.tokens(host, document)[: host.context // 2]  # the rest is for the answer
        # what is said before the topic is not looked at; the last token before it may be another where the topic follows
        rows.append((ids, min(max(1, len(hosts.tokens(host, document[: document.find(own.topic)])) - 1), len(ids))))
    for group in hosts.by_length(rows, hosts.at_once(host)):
        said = hosts.predictions(host, hosts.pad(host, [rows[j] for j in group])).argmax(-1).tolist()
        for j in group:
            (ids, given), own = rows[j], asked[usable[j]][1]
            mine, said = said[: len(ids) - given], said[len(ids) - given :]
            begun = (_text(host, ids[:t]) for t, token in enumerate(mine, given) if token == own.first)
            out[usable[j]] = next((prefix for prefix in begun if own.topic in prefix), "")
    return out


def _answering(host: Host, asked: Sequence[tuple[str, Spoken]]) -> list[str]:
    """The prompts of the documents to which the model begins the old answer; "" for the others. That two claims are both true does not make
    them ask the same, so that a classifier is asked nothing."""
    out = [""] * len(asked)
    prompts = [document.rpartition("|")[0] for document, _ in asked]
    usable = [i for i, (_, own) in enumerate(asked) if own.topic in prompts[i] and own.topic and own.old and host.kind == "seq2seq"]
    rows = [hosts.encode(host, prompts[i], asked[i][1].old) for i in usable]
    rows = [(ids[: given + 1], given) for ids, given in rows]  # the first token of what it says
    for group in hosts.by_length(rows, 2048):
        said = hosts.predictions(host, hosts.pad(host, [rows[j] for j in group])).argmax(-1).tolist()
        for j, token in zip(group, said, strict=True):
            if token == asked[usable[j]][1].first:
                out[usable[j]] = prompts[usable[j]]
    return out


@torch.no_grad()
def _likely(host: Host, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The probability that the model gives to each (prompt, answer)."""
    rows = [hosts.encode(host, prompt, answer) for prompt, answer in pairs]
    return hosts.base_score(host, rows)[:, 0].exp().tolist() if rows else []


def _text(host: Host, ids: list[int]) -> str:
    return str(host.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
