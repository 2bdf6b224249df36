"""The gate of the edit memory on real data: does the right record fire in scope, and nothing out of scope, with all records in memory?

    ES   queries in scope for which the record that fires is the right one (of several that fire, the one with the greatest chance)
    BP   queries out of scope for which none fires
    EQ   their harmonic mean, as EREN reports it

Each file is judged in two halves: a scope is trained, calibrated and given its thresholds on the one (a quarter of it held back for that),
and judged on the other, in a memory of all records of the file. So no record, and no query, is judged by a scope that has seen it; records
that share a wording stand in the same half. `distance` is on the encoder as it is, `cross` finetunes its transformer.

Beside each stands the lexical floor: TF-IDF over words and pairs of words, greatest cosine over the memory; and the encoder as it comes,
its best EQ with a threshold that was chosen on what is judged. AUROC is of the greatest chance (cosine) over the memory, in scope against
out of scope.

counterfact_hard  eren/counterfact_hard.json: out of scope ask another relation of the record's subject, or its relation of another subject
zsre              zsre/zsre_mend_train-1k.json: rephrasings against questions of Natural Questions; and against other records, with the
                  query's own record taken out
fever             eren/fever.json: claims about the edited facts against claims about others
dune              dune/scope_classifier_all.jsonl: pairs of an information and a question, those of one information in the same half

--only chooses among these.
"""

import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _bench import arguments, emit
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

from errata.memory.encoder import MINILM, load
from errata.memory.scope import CANDIDATES, Candidate, Lesson, Lessons, Remembering, Scope, train
from errata.types import MissingExtra, folded

FIRES = 0.04  # of queries that concern nothing may fire, with 95 % confidence: EQ weighs them as much as those that must fire


class Task(NamedTuple):
    lessons: list[Lesson]
    rings: dict[str, str]  # query out of scope -> what kind it is
    goal: float | None
    verifiers: dict[str, int]  # -> steps
    left_out: bool = False  # whether queries in scope are asked again of the memory without their own record
    note: str = ""


class Asked(NamedTuple):
    """A query, and what the memory makes of it: the greatest chance, whether that record is the right one, whether it fires."""

    lesson: int
    query: str
    ring: str  # "in", or what kind of query out of scope
    chance: float
    right: bool
    fires: bool


def main() -> None:
    args = arguments(__doc__)
    chosen = set(args.only.split(",")) if args.only else set(TASKS)
    if args.data is None:
        return print("Give --data: the folder of real data.", file=sys.stderr)
    try:
        encoder = Remembering(load(MINILM))
    except MissingExtra as e:
        return print(e, file=sys.stderr)
    for name, (file, read) in TASKS.items():
        if name not in chosen:
            continue
        if not (args.data / file).is_file():
            print(f"{name}: there is no {file} in the folder of data.", file=sys.stderr)
            continue
        of_task(args, name, read(args.data / file, args.quick), encoder)


# ------------------------------------------------------------------------------------------------------------------------------- judging


def of_task(args, name: str, task: Task, encoder: Remembering) -> None:
    began = time.process_time()
    memory = Lessons(task.lessons, encoder)
    queries = len(memory.rows)
    seconds = time.process_time() - began
    emit(args, f"{name}: records", len(task.lessons), None, f"{queries} queries; processor {seconds:.0f} s for their vectors{task.note}")
    shown(args, f"{name}: AUROC", "lexical floor", lexical(memory, task), None)
    plain = by_cosine(memory, task)
    shown(args, f"{name}: AUROC", "encoder as it comes", plain, None)
    emit(args, f"{name}: EQ, encoder as it comes, best threshold", best_eq(plain), None, "the threshold is chosen on what is judged")
    for verifier, steps in task.verifiers.items():
        began = time.process_time()
        asked, bound = crossfit(args, memory, task, encoder, verifier, max(20, steps // 10) if args.quick else steps)
        seconds = time.process_time() - began
        es, bp = share([a.right and a.fires for a in asked if a.ring == "in"]), share([not a.fires for a in asked if a.ring != "in"])
        goal = task.goal if verifier == list(task.verifiers)[-1] else None
        how = f"ES {told(es)}, BP {told(bp)}; bound on false fires {bound:.3f}; processor {seconds:.0f} s with training"
        emit(args, f"{name}: EQ, {verifier}", harmonic(es, bp), None if goal is None else (">=", goal), how)
        for ring in sorted({a.ring for a in asked} - {"in"}):
            those = [not a.fires for a in asked if a.ring == ring]
            emit(args, f"{name}: BP, {verifier}, {ring}", share(those), None, f"{len(those)} queries")
        shown(args, f"{name}: AUROC", verifier, asked, best_eq(asked))


def crossfit(args, memory: Lessons, task: Task, encoder: Remembering, verifier: str, steps: int) -> tuple[list[Asked], float]:
    """What scopes that are trained on one half make of the queries of the other; the larger of their bounds."""
    halves = memory.split(0.5, np.random.default_rng(args.seed))
    asked: list[Asked] = []
    bounds: list[float] = []
    for taught, judged in (halves, halves[::-1]):
        scope = train(
            [task.lessons[i] for i in taught],
            encoder,
            verifier=verifier,
            backbone=MINILM if verifier == "cross" else "",
            seed=args.seed,
            steps=steps,
            false_fires=FIRES,
        )
        asked += judge(scope, memory, task, judged)
        bounds.append(scope.false_fires)
    return asked, max(bounds)


def judge(scope: Scope, memory: Lessons, task: Task, judged: Sequence[int]) -> list[Asked]:
    queries = queries_of(memory, task, judged)
    found = memory.nearest([query for _, query, _ in queries], range(len(task.lessons)), CANDIDATES)
    proposed = [[Candidate(question=task.lessons[i].question, answer=task.lessons[i].answer, score=s) for i, s in some] for some in found]
    out = []
    for (i, query, ring), some, said in zip(queries, found, scope.judge([q for _, q, _ in queries], proposed), strict=True):
        # its own record is taken out of the memory
        seen = [(n, j) for (n, _), j in zip(some, said, strict=True) if ring != LEFT_OUT or not memory.concerns(int(n), query)]
        first, best = max(seen, key=lambda pair: pair[1].chance)
        out.append(Asked(i, query, ring, best.chance, memory.concerns(first, query), best.ruling == "in"))
    return out


LEFT_OUT = "own record taken out"


def queries_of(memory: Lessons, task: Task, records: Sequence[int]) -> list[tuple[int, str, str]]:
    """(record, query, ring). A query that is said to be out of scope of one record and in scope of another is not out of scope."""
    inside = [(i, query) for i in records for query in memory.lessons[i].inside]
    out = [(i, query, "in") for i, query in inside]
    out += [(i, query, task.rings[query]) for i in records for query in memory.outside(i) if memory.stray(query)]
    return out + ([(i, query, LEFT_OUT) for i, query in inside] if task.left_out else [])


def by_cosine(memory: Lessons, task: Task) -> list[Asked]:
    return greatest(memory, task, lambda queries: memory.queries[[memory.rows[query] for query in queries]] @ memory.records.T)


def lexical(memory: Lessons, task: Task) -> list[Asked]:
    """TF-IDF with the frequencies of the memory, over words and pairs of words."""

    def terms(text: str) -> Counter[str]:
        words = re.findall(r"\w+", folded(text))
        return Counter(words) + Counter(f"{a} {b}" for a, b in pairwise(words))

    texts = [f"{x.question} {x.answer}" for x in task.lessons]
    seen_in = Counter(term for text in texts for term in terms(text).keys())
    place = {term: i for i, term in enumerate(seen_in)}
    weight = {term: 1 + np.log((1 + len(texts)) / (1 + n)) for term, n in seen_in.items()}

    def rows(texts: Sequence[str]) -> csr_matrix:
        at, columns, values = [], [], []
        for i, text in enumerate(texts):
            own = {term: n * weight[term] for term, n in terms(text).items() if term in place}
            norm = np.sqrt(sum(v * v for v in own.values())) or 1.0
            at += [i] * len(own)
            columns += [place[term] for term in own]
            values += [v / norm for v in own.values()]
        return csr_matrix((values, (at, columns)), shape=(len(texts), len(place)))

    records = rows(texts)
    return greatest(memory, task, lambda queries: (rows(queries) @ records.T).toarray())


def greatest(memory: Lessons, task: Task, scores: Callable[[Sequence[str]], np.ndarray]) -> list[Asked]:
    queries = queries_of(memory, task, range(len(task.lessons)))
    out = []
    for at in range(0, len(queries), 512):
        part = queries[at : at + 512]
        for (i, query, ring), row in zip(part, scores([query for _, query, _ in part]), strict=True):
            if ring == LEFT_OUT:
                row = np.where([memory.concerns(j, query) for j in range(len(row))], -1.0, row)
            first = int(row.argmax())
            out.append(Asked(i, query, ring, float(row[first]), memory.concerns(first, query), True))
    return out


# -------------------------------------------------------------------------------------------------------------------------------- numbers


def share(those: Sequence[bool]) -> float | None:
    return sum(those) / len(those) if those else None


def told(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def harmonic(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else 2 * a * b / (a + b) if a + b else 0.0


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float | None:
    if not inside or not outside:
        return None
    ranks = rankdata([*inside, *outside])[: len(inside)]
    return float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def of_all(asked: Sequence[Asked], ring: str | None = None) -> float | None:
    return auroc([a.chance for a in asked if a.ring == "in"], [a.chance for a in asked if a.ring != "in" and ring in (None, a.ring)])


def best_eq(asked: Sequence[Asked]) -> float | None:
    inside = np.array([(a.chance, a.right) for a in asked if a.ring == "in"])
    outside = np.sort([a.chance for a in asked if a.ring != "in"])
    if not len(inside) or not len(outside):
        return None
    right = np.sort(inside[inside[:, 1] > 0, 0])
    return max(
        harmonic((len(right) - np.searchsorted(right, t)) / len(inside), np.searchsorted(outside, t) / len(outside)) or 0.0
        for t in np.unique(inside[:, 0])
    )


def shown(args, name: str, of: str, asked: Sequence[Asked], best: float | None) -> None:
    each = "; ".join(f"{ring} {told(of_all(asked, ring))}" for ring in sorted({a.ring for a in asked} - {"in"}))
    first = share([a.right for a in asked if a.ring == "in"])
    how = f"{each}; the right one is first {told(first)}" + ("" if best is None else f"; best EQ {told(best)}")
    emit(args, f"{name}, {of}", of_all(asked), None, how)


# -------------------------------------------------------------------------------------------------------------------------------- the data


def distinct(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def counterfact_hard(file: Path, quick: bool) -> Task:
    """A record is the statement up to the new answer, and the answer; the statement and the answer, where that stands inside."""
    lessons, rings = [], {}
    for raw in json.loads(file.read_text())[: 100 if quick else None]:
        said, answer = raw["edit_statement"].strip().rstrip("."), raw["edit_scope"][0][1] if raw["edit_scope"] else ""
        question = said.removesuffix(f" {answer}") if answer else said
        near = raw["unrelated"]
        lessons.append(
            Lesson(
                question=question,
                answer=answer,
                inside=distinct([query for query, _ in raw["edit_scope"]]),
                outside=distinct([*near["same_subj"], *near["neighbor_subj"]]),
            )
        )
        rings |= dict.fromkeys(near["neighbor_subj"], "other subject") | dict.fromkeys(near["same_subj"], "same subject")
    return Task(lessons, rings, 0.97, {"distance": 400, "cross": 400})


def zsre(file: Path, quick: bool) -> Task:
    """One record a subject: the file asks some of them several times, in other words and with other answers."""
    lessons, rings, seen = [], {}, set()
    raws = json.loads(file.read_text())[: 100 if quick else None]
    for raw in raws:
        if raw["subject"] in seen:
            continue
        seen.add(raw["subject"])
        unrelated = raw["loc"].removeprefix("nq question: ") + "?"
        lessons.append(Lesson(question=raw["src"], answer=raw["alt"], inside=distinct([raw["rephrase"]]), outside=(unrelated,)))
        rings[unrelated] = "Natural Questions"
    return Task(lessons, rings, None, {"distance": 400}, True, f"; {len(raws) - len(lessons)} records of a subject that has one left out")


def fever(file: Path, quick: bool) -> Task:
    """Claims about other facts are laid to records in turn: what counts of them is the whole memory."""
    raw = json.loads(file.read_text())
    edits, others = (raw[part][: 60 if quick else None] for part in ("edits", "out_of_scope"))
    lessons = [
        Lesson(
            question=x["edit_statement"],
            answer="",
            inside=distinct([claim for claim, _ in x["edit_scope"] if folded(claim) != folded(x["edit_statement"])][:4]),
        )
        for x in edits
    ]
    laid = defaultdict(list)
    for i, x in enumerate(others):
        laid[i % len(lessons)] += distinct([x["edit_statement"], *(claim for claim, _ in x["edit_scope"][:2])])
    lessons = [replace(x, outside=distinct(laid[i])) for i, x in enumerate(lessons)]
    return Task(lessons, {claim: "other claims" for x in lessons for claim in x.outside}, None, {"distance": 400})


def dune(file: Path, quick: bool) -> Task:
    """Informations of 600 letters or fewer: the encoder reads 256 tokens."""
    inside, outside = defaultdict(list), defaultdict(list)
    for line in file.read_text().splitlines():
        raw = json.loads(line)
        said, _, asked = raw["text"].removeprefix("Information:").partition("Question:")
        if len(said) <= 600 and 0 < len(asked.strip()) <= 600:
            (inside if raw["label"] else outside)[said.strip()].append(asked.strip())
    both = [said for said in inside if said in outside][: 60 if quick else 300]
    lessons = [Lesson(question=said, answer="", inside=distinct(inside[said]), outside=distinct(outside[said])) for said in both]
    return Task(lessons, {query: "other questions" for x in lessons for query in x.outside}, None, {"distance": 400})


TASKS: dict[str, tuple[str, Callable[[Path, bool], Task]]] = {
    "counterfact_hard": ("eren/counterfact_hard.json", counterfact_hard),
    "zsre": ("zsre/zsre_mend_train-1k.json", zsre),
    "fever": ("eren/fever.json", fever),
    "dune": ("dune/scope_classifier_all.jsonl", dune),
}

if __name__ == "__main__":
    main()
