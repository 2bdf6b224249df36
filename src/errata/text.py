"""The text that holds a model still and the text that judges it: read from a file, taken from the lab, or sampled from the model.

The two are disjoint. Neither may state a fact that is being changed, or it would fight the edit: `set_aside` finds such documents. Nothing
here measures anything or imports a method.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import final

from errata.hosts import Host, greedy, remembered, sample, tokens
from errata.types import EditError, Example, InvalidReference, digest

MAX_BYTES = 256 << 20


def decoded(path: Path, what: str, error: type[EditError], errors: str = "strict") -> str:
    """The whole file. Raises `error` where it is missing, binary or not UTF-8; it is called `what` there. `errors`: as in `open`."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors)
    except OSError as e:
        raise error(f"Cannot read the {what} {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise error(f"The {what} {path} is not UTF-8 text (byte {e.start}).") from e
    if "\0" in text:
        raise error(f"The {what} {path} is binary.")
    return text


def lines(path: Path, what: str, error: type[EditError], errors: str = "strict") -> list[tuple[str, str]]:
    """("Line 3 of PATH", its text) for each line that is not blank. Raises `error` as `decoded`, and where there is none."""
    # not splitlines: it also cuts at the separators that may stand inside a JSON string
    found = [(f"Line {n} of {path}", line) for n, line in enumerate(decoded(path, what, error, errors).split("\n"), 1) if line.strip()]
    if not found:
        raise error(f"The {what} {path} is empty.")
    return found


def read(path: str | Path) -> tuple[str, ...]:
    """Documents of a JSONL file ("text" in each line, or "prompt" and "target") or of a plain text file (blank lines between documents).

    Raises InvalidReference for a file that is missing, empty, binary or malformed.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InvalidReference(f"The reference file {path} is larger than {MAX_BYTES >> 20} MiB; a sample of it is enough.")
    if path.suffix == ".jsonl":
        documents = [_text_of(where, line) for where, line in lines(path, "reference file", InvalidReference)]
    else:
        documents = re.split(r"\n\s*\n", decoded(path, "reference file", InvalidReference))
    kept = tuple(d.strip() for d in documents if d.strip())
    if not kept:
        raise InvalidReference(f"The reference file {path} is empty.")
    return kept


def _text_of(where: str, line: str) -> str:
    try:
        raw = json.loads(line)
        return f"{raw['prompt']}|{raw['target']}" if "prompt" in raw else str(raw["text"])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InvalidReference(f"{where} is not a JSON object with a 'text', or with a 'prompt' and a 'target'.") from e


def sampled(host: Host, n: int = 384, length: int = 96, seed: int = 0) -> tuple[str, ...]:
    """`n` documents drawn from the model itself. On its own text the expected increase of the loss is KL(base || edited)."""
    if host.kind != "causal":
        raise InvalidReference(
            f"{host.name} writes no text of its own: name a reference text, in which each document is what it reads and what it should "
            f"say, as prompt|answer."
        )
    start = "" if tokens(host, "") else (host.tokenizer.bos_token or host.tokenizer.eos_token or " ")
    room = max(2, min(length, host.context - 2))
    drawn = sample(host, [start] * n, max_new_tokens=room, seed=seed)
    return tuple(d for d in drawn if d.strip())


def split(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(to hold with, to judge with): disjoint halves, by content, so that the order of the file does not matter.

    Raises InvalidReference if either would be empty.
    """
    ranked = sorted(dict.fromkeys(texts), key=digest)
    hold, judge = tuple(ranked[1::2]), tuple(ranked[::2])
    if not hold:
        raise InvalidReference(
            f"The reference text has {len(ranked)} distinct document(s); two or more are needed, one to hold with and one to judge."
        )
    return hold, judge


def standing(host: Host, reference: str | Path | None = None, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(to hold with, to judge with) for a host: the user's file, the lab's own documents, or what the model says by itself."""
    if reference is not None:
        return split(read(reference))
    if host.name.startswith("lab/"):
        from errata.lab import corpus

        form = corpus.FORMS[host.kind]
        return corpus.hold(form), corpus.reference(form)
    return split(sampled(host, seed=seed))


# ------------------------------------------------------------------------------------------------- statements of the edited facts


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def names(text: str, seen: Counter[str], n: int) -> list[str]:
    """What a text may speak of: runs of words that stand in fewer than one in a hundred of `n` documents or, inside a sentence, have a
    capital; capitals and small letters do not mix. `seen` counts the documents that hold each word (lower case)."""
    runs: list[tuple[int, int]] = []
    for word in re.finditer(r"\w+", text):
        before = text[: word.start()].rstrip(" '\"(")
        proper = word.group()[0].isupper() and before != "" and before[-1] not in ".!?:\n"
        if seen[word.group().lower()] >= 0.01 * n and not proper:
            continue
        alike = bool(runs) and text[runs[-1][0]].isupper() == word.group()[0].isupper()  # "Togo lies" is not a name
        if alike and not text[runs[-1][1] : word.start()].strip(" -'"):
            runs[-1] = (runs[-1][0], word.end())
        else:
            runs.append((word.start(), word.end()))
    return list(dict.fromkeys(text[a:b] for a, b in runs))


def topic(prompt: str, seen: Counter[str], n: int) -> str:
    """What a prompt speaks of: the longest of its `names`, those with a capital first; else its rarest word with a capital that stands in
    fewer than one in ten documents; "" if there is none."""
    if found := names(prompt, seen, n):
        return max(found, key=lambda name: (name[0].isupper(), len(name)))
    words = [word for word in re.findall(r"\w+", prompt) if word[0].isupper() and seen[word.lower()] < 0.1 * n]
    return min(words, key=lambda word: seen[word.lower()], default="")


def document_counts(texts: Sequence[str]) -> Counter[str]:
    """How many of `texts` hold each word (lower case)."""
    return Counter(word for text in texts for word in set(_words(text)))


def answers_of(host: Host, examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """For each example every answer in play: target, contrast, and what the host says now."""
    return [in_play(e, old) for e, old in zip(examples, answers_now(host, examples), strict=True)]


def in_play(example: Example, old: str) -> tuple[str, ...]:
    """The answers of an example, of which the host gives `old` now."""
    return tuple(dict.fromkeys(a for a in (example.target.strip(), (example.contrast or "").strip(), old.strip()) if a))


def answers_now(host: Host, examples: Sequence[Example]) -> list[str]:
    """What the host says to each prompt now; "" where it says nothing."""
    prompts = tuple(e.prompt for e in examples)
    return [answer(said) for said in remembered(host, ("greedy", prompts), lambda: greedy(host, prompts))]


def answer(said: str) -> str:
    """What a continuation answers: its text up to the first stop."""
    return re.split(r"[.,;:!?\n]", said.strip(), maxsplit=1)[0].strip()


def whole(name: str, flags: int = 0) -> re.Pattern[str]:
    """What finds a name in a text where it stands as words of its own, whatever it begins and ends with."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", flags)


@final
class Statements:
    """Recognises documents that state one of the edited facts.

    A document states a fact if it holds one of its answers and speaks of what the prompt speaks of: the subject, where one is given; else
    the prompt's `topic`, or words that carry half of its information or more (weighted by their rarity). `seen` counts in how many of `n`
    documents each word stands.
    """

    def __init__(self, examples: Sequence[Example], answers: Sequence[Sequence[str]], seen: Counter[str], n: int) -> None:
        n += 1  # what stands everywhere keeps a little weight
        self._facts: list[tuple[re.Pattern[str] | None, dict[str, float], list[re.Pattern[str]]]] = []
        self._of_word: dict[str, set[int]] = {}  # the facts that have an answer which begins with this word
        self._of_any: set[int] = set()  # those that have one without a word
        for example, words in zip(examples, answers, strict=True):
            # a given subject is all that counts; one that was guessed from rare words is not
            weights = {} if example.subject else {w: math.log((n + 1) / (seen[w] + 1)) for w in set(_words(example.prompt))}
            subject = example.subject or topic(example.prompt, seen, n)
            for first in (next(iter(_words(a)), None) for a in words):
                (self._of_any if first is None else self._of_word.setdefault(first, set())).add(len(self._facts))
            self._facts.append((whole(subject) if subject else None, weights, [whole(a) for a in words]))

    def any_in(self, text: str) -> bool:
        words = set(_words(text))
        # no fact is looked for whose answers are plainly not there
        for i in self._of_any.union(*(self._of_word[w] for w in words if w in self._of_word)):
            subject, weights, answers = self._facts[i]
            if not any(a.search(text) for a in answers):
                continue
            if subject is not None and subject.search(text):
                return True
            if weights and sum(x for w, x in weights.items() if w in words) >= 0.5 * sum(weights.values()):
                return True
        return False


def set_aside(texts: Sequence[str], examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], int]:
    """(documents that state none of the edited facts, how many did and were left out)."""
    statements = Statements(examples, answers, document_counts(texts), len(texts))
    kept = tuple(t for t in texts if not statements.any_in(t))
    return kept, len(texts) - len(kept)
