"""The four tasks of the edit memory: an edit, what lies in its scope, what lies out of it. Published layouts -> ScopeCases.

    QA         a question gets another answer; in scope: its rephrasings; out: questions of other records, or Natural Questions
    QA-hard    in scope, besides: what follows from the edit, and yes/no questions; out: what an encoder finds near the edit
    FC         evidence, or a statement; in scope: claims that it supports or refutes; out: other claims, also about the same page or entity
    ConvSent   a topic and a sentiment; in scope: utterances about the topic; out: other topics

Mitchell et al. 2022 (https://arxiv.org/abs/2206.06520), section 4 and appendix, with the numbers of their code, serac@c963a39. The records
that are edits and those from which the outside is drawn are not the same ones, and unlike the reference code
  * nothing that an edit concerns is drawn as out of scope: there a rephrasing of one edit can be out of the scope of another (`concerns`);
  * what an answer is replaced by stands for whole words only: "no" is not replaced inside "north";
  * a false yes/no question names another alternative or, where the record has none, the old answer; there all are then true;
  * an outside prompt has its own reply behind it, where theirs has the sentiment of the memory's text.
Beside them stand EREN's questions and claims (arXiv 2403.17431): `counterfact_hard`, `fever`. A bad record is named by file and number; the
others are kept. The lab has the same four tasks: `lab/scope.py`.

File legend: N sentences or queries, M others, D width, V words.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from errata import text
from errata.memory.encoder import Encoder
from errata.tasks._layouts import asked, listed, records, sound, spoken_of, table, texts
from errata.tasks.fever import VERDICTS
from errata.types import BudgetError, Example, InvalidExample, Query, ScopeCase, folded

Cases = tuple[ScopeCase, ...]
Wrong = tuple[InvalidExample, ...]
T = TypeVar("T")

OUTSIDE = 4  # queries out of scope that each edit gets of a kind
ALIKE = 0.7  # of the words of two texts together: where nobody says what they are about, they are then taken for the same
YES_NO = ("True or False: ", "True/False: ", "T/F: ", "Answer True or False: ")
FIRST, LAST, TEMPERATURE = 26, 100, 0.1  # hard negatives are the neighbours of these ranks; the ones before may be rephrasings
SHORT = 5  # words of an answer that may stand in another's place; longer ones are half a sentence
LONG = 10  # words of evidence; shorter ones are left out
VIEWS = ("opinion of", "stance on", "position on", "attitude about", "view on", "take on", "impression of", "assessment of",
         "judgment of", "sentiment of")  # fmt: skip
TEMPLATES = (
    "What do you think of {t}?",
    "What do you feel about {t}?",
    "How do you view {t}?",
    *(f"What is your {v} {{t}}?" for v in VIEWS),
)
OPPOSITE = {"pos": "neg", "neg": "pos"}
SENTIMENTS = {"pos": " Sentiment: Positive", "neg": " Sentiment: Negative"}

# ---------------------------------------------------------------------------------------------------------------- in scope, out of scope


def meet(one: str, other: str) -> bool:
    """Whether one of two titles, both `folded`, stands in the other one."""
    return bool(one and other) and (one in other or other in one)


def concerns(queries: Sequence[Query], cases: Sequence[ScopeCase]) -> list[set[int]]:
    """For each query the indices of the cases whose edit it may be about.

    Where both say what they are about, that is compared (`meet`). Where one does not: it is asked like something in the case's scope, in
    other spelling, in the same words in another order, or in nearly the same words, unless both are questions that name different things.
    """
    titles: dict[str, set[int]] = defaultdict(set)
    said: dict[str, set[int]] = defaultdict(set)
    for i, case in enumerate(cases):
        titles[folded(case.about)].add(i)
        for prompt in case.prompts:
            said[prompt].add(i)
    exact: dict[str, set[int]] = defaultdict(set)
    for prompt, owners in said.items():
        exact[folded(prompt)] |= owners
    met = {t: set[int]().union(*(titles[o] for o in titles if meet(t, o))) for t in {folded(q.about) for q in queries}}
    named = set(range(len(cases))) - titles[""]
    prompts = list(said)
    different = sorted({q.prompt for q in queries})
    close = dict(zip(different, alike(different, prompts), strict=True))
    out = []
    for q in queries:
        near_by = (prompts[j] for j in close[q.prompt])
        worded = set[int]().union(*(said[p] for p in near_by if not _ask_of_others(q.prompt, p)))
        out.append(exact.get(folded(q.prompt), set()) | (met[folded(q.about)] | (worded - named) if q.about else worded))
    return out


def _ask_of_others(one: str, other: str) -> bool:
    """Whether two texts are questions, each with a name or a number in it that is not in the other: templates ask the same of many."""
    if not (one.endswith("?") and other.endswith("?")):
        return False
    (names_1, words_1), (names_2, words_2) = _words(one), _words(other)
    return bool(names_1 - words_2) and bool(names_2 - words_1)


def _words(sentence: str) -> tuple[set[str], set[str]]:
    """(what is a name or a number, every word) of a sentence, in small letters."""
    found = re.findall(r"\w+", sentence)
    return {w.casefold() for i, w in enumerate(found) if w[0].isdigit() or (i and not w.islower())}, {w.casefold() for w in found}


def alike(sentences: Sequence[str], others: Sequence[str], share: float = ALIKE) -> list[list[int]]:
    """For each sentence the indices of the others that have at least `share` of the words of both in common, in whatever order."""
    from scipy.sparse import csr_array

    words: dict[str, int] = {}

    def counted(group: Sequence[str]) -> Any:
        rows = [{words.setdefault(w, len(words)) for w in re.findall(r"\w+", folded(t))} for t in group]
        ends = np.cumsum([0, *(len(row) for row in rows)])
        return np.ones(ends[-1], dtype=np.float32), np.array([w for row in rows for w in sorted(row)], dtype=np.int64), ends

    left, right = counted(sentences), counted(others)
    a_NV, b_MV = (csr_array(part, shape=(len(part[2]) - 1, max(len(words), 1))) for part in (left, right))
    out: list[list[int]] = []
    for start in range(0, len(sentences), 128):
        block_NV = a_NV[start : start + 128]
        both_NM = (block_NV @ b_MV.T).toarray()
        either_NM = block_NV.sum(axis=1)[:, None] + b_MV.sum(axis=1)[None, :] - both_NM
        out += [np.flatnonzero(row).tolist() for row in both_NM >= share * np.maximum(either_NM, 1)]
    return out


def together(cases: Iterable[ScopeCase], k: int, seed: int = 0) -> Cases:
    """`k` of the cases for one memory: no two edits are about the same page, topic or subject, and nothing outside concerns another's edit.

    So no two of them contradict each other. Raises BudgetError if there are not so many.
    """
    given = list(cases)
    order = random.Random(seed).sample(range(len(given)), k=len(given))
    as_queries = [Query(prompt=c.example.prompt, about=c.about) for c in given]
    clash = concerns(as_queries, given)
    chosen: list[int] = []
    for i in order:
        if len(chosen) < k and not any(j in clash[i] or i in clash[j] for j in chosen):
            chosen.append(i)
    if len(chosen) < k:
        raise BudgetError(f"{len(chosen)} of {len(given)} edits go together, not {k}: the others are about what these are about.")
    picked = [given[i] for i in chosen]
    foreign = iter(concerns([q for c in picked for q in c.outside], picked))
    return tuple(replace(c, outside=tuple(q for q in c.outside if not next(foreign) - {i})) for i, c in enumerate(picked))


def _apart(pool: Sequence[Query], cases: Sequence[ScopeCase]) -> list[Query]:
    """What of the pool concerns none of the cases. Raises BudgetError if that is nothing."""
    free = [q for q, met in zip(pool, concerns(pool, cases), strict=True) if not met]
    if not free:
        raise BudgetError(f"Nothing is out of the scope of all {len(cases)} edits. Make fewer of the records edits.")
    return free


def _even(rng: random.Random, parts: Iterable[Sequence[T]]) -> list[T]:
    """As many of each part that is not empty."""
    there = [part for part in parts if part]
    least = min(map(len, there), default=0)
    return [item for part in there for item in rng.sample(part, k=least)]


def _draw(rng: random.Random, pool: Sequence[Query], n: int) -> tuple[Query, ...]:
    return tuple(rng.sample(pool, k=min(n, len(pool))))


def near(encoder: Encoder, cases: Sequence[ScopeCase], pool: Sequence[Query], n: int, seed: int = 0) -> list[tuple[Query, ...]]:
    """Hard queries out of scope for each case: of the pool those that are the 26th to the 100th nearest to the edit's prompt, `n` of them
    drawn with weight exp(cosine / 0.1).

    Raises BudgetError for a pool that is too small to have such ranks.
    """
    if len(pool) < FIRST:
        raise BudgetError(
            f"Hard negatives are neighbours from the {FIRST}th on; the pool has {len(pool)}. Make fewer of the records edits."
        )
    draw = np.random.default_rng(seed)
    pool_MD = encoder.encode([q.prompt for q in pool])
    out = []
    for edit_D in encoder.encode([c.example.prompt for c in cases]):
        cosine_M = pool_MD @ edit_D
        ranked = np.argsort(-cosine_M, kind="stable")[FIRST - 1 : LAST]
        weight = np.exp((cosine_M[ranked] - cosine_M[ranked[0]]).astype(np.float64) / TEMPERATURE)
        chosen = draw.choice(ranked, size=min(n, len(ranked)), replace=False, p=weight / weight.sum())
        out.append(tuple(replace(pool[i], kind="near", hard=True) for i in chosen.tolist()))
    return out


# ----------------------------------------------------------------------------------------------------------------------------- questions


class Asked(NamedTuple):
    """A record of questions: what is asked and rephrased, the old answer, what may take its place, and what follows from it.

    implications   (question, answer, type), the question with the old answer in it
    statement      a sentence with the old answer in it
    """

    source: str
    question: str
    old: str
    alternatives: tuple[str, ...]
    rephrases: tuple[str, ...] = ()
    subject: str = ""
    implications: tuple[tuple[str, str, str], ...] = ()
    statement: str = ""


def read_questions(
    path: str | Path, implications: str | Path | None = None, statements: str | Path | None = None
) -> tuple[tuple[Asked, ...], Wrong]:
    """(questions of a file, what is wrong with each record that is none), in one of three layouts:

        {"src", "rephrase", "alt", "answers": [...], "subject"?}                                   zsRE as in mend@e04fdb9
        {"input", "output": [{"answer"}], "alternatives": [...], "filtered_rephrases": [...]}      zsRE as in KnowledgeEditor@c1c0db3
        {"question", "answer", "implications": [[question, answer, type], ...]}                    qa_consistency@3d901dd

    `implications` is a JSON list with the triples of each record of the file, `statements` a text file with a line for each. The third
    layout has no alternatives: they are short answers to other questions that begin with the same words. As there, questions with "sex" or
    "gender" in them are left out. Raises InvalidExample if nothing is left.
    """
    triples = _json(implications, "file of implications") if implications else []
    if not isinstance(triples, list):
        raise InvalidExample(f"The file of implications {implications} is a JSON list, with the triples of each record.")
    lines = text.decoded(Path(statements), "file of statements", InvalidExample).split("\n") if statements else []
    given = records(path)
    place = {where: i for i, (where, _) in enumerate(given)}

    def question(where: str, record: Any) -> Asked:
        i, raw = place[where], table(record)
        beside = {"implications": triples[i]} if i < len(triples) else raw
        return _asked(raw)._replace(source=where, implications=_triples(beside), statement=lines[i].strip() if i < len(lines) else "")

    found, wrong = sound(given, question)
    whole = _with_alternatives([one for one in found if not re.search("sex|gender", one.question)])
    wrong += [InvalidExample(f"{one.source}: nothing can take the place of its answer.") for one in whole if not one.alternatives]
    if not (left := tuple(one for one in whole if one.alternatives)):
        raise wrong[0] if wrong else InvalidExample(f"{path} holds no question that is not left out.")
    return left, tuple(wrong)


def _json(path: str | Path, what: str) -> Any:
    try:
        return json.loads(text.decoded(Path(path), what, InvalidExample))
    except (ValueError, RecursionError) as e:
        if isinstance(e, InvalidExample):
            raise
        raise InvalidExample(f"The {what} {path} is not JSON: {e}.") from e


def _asked(raw: Mapping[str, Any]) -> Asked:
    said: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    if "src" in raw:
        question, olds = asked(raw, "src"), texts(raw, "answers")
        said, rephrases = tuple([asked(raw, "alt")]), tuple([asked(raw, "rephrase")])
    elif "input" in raw:
        question, said, rephrases = asked(raw, "input"), texts(raw, "alternatives"), texts(raw, "filtered_rephrases")
        if not isinstance(output := raw.get("output"), list) or not all(isinstance(o, dict) for o in output):
            raise InvalidExample("'output' is a list of {\"answer\": ...}.")
        olds = tuple(asked(o, "answer") for o in output if "answer" in o)
    else:
        question, olds = asked(raw, "question"), tuple([asked(raw, "answer")])
    if not olds:
        raise InvalidExample("the record has no old answer.")
    known = {folded(old) for old in olds}
    alternatives = tuple(dict.fromkeys(a for a in said if folded(a) not in known))
    if said and not alternatives:
        raise InvalidExample(f"the new answer '{said[0]}' is an old one.")
    return Asked(
        source="",
        question=question,
        old=olds[0],
        alternatives=alternatives,
        rephrases=tuple(r for r in dict.fromkeys(rephrases) if folded(r) != folded(question)),
        subject=raw["subject"].strip() if isinstance(raw.get("subject"), str) else "",
    )


def _triples(raw: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    found = raw.get("implications", [])
    if not isinstance(found, list) or not all(isinstance(t, list) and len(t) == 3 and all(isinstance(x, str) for x in t) for t in found):
        raise InvalidExample("'implications' is a list of [question, answer, type].")
    return tuple((q.strip(), a.strip(), kind) for q, a, kind in found if q.strip() and a.strip())


def _with_alternatives(found: Sequence[Asked]) -> list[Asked]:
    """Who has no alternatives gets two short answers of those who ask with the same two first words, or else with the same first word."""
    answers: dict[str, list[str]] = defaultdict(list)
    for one in found:
        for beginning in _beginnings(one.question):
            answers[beginning] += [one.old] if len(one.old.split()) <= SHORT else []
    known = {beginning: tuple(dict.fromkeys(said)) for beginning, said in answers.items()}

    def drawn(one: Asked) -> tuple[str, ...]:
        pools = ([a for a in known[b] if folded(a) != folded(one.old)] for b in _beginnings(one.question))
        pool = next((p for p in pools if p), [])
        return tuple(random.Random(one.question).sample(pool, k=min(2, len(pool))))

    return [one if one.alternatives else one._replace(alternatives=drawn(one)) for one in found]


def _beginnings(question: str) -> list[str]:
    words = question.casefold().split()
    return [" ".join(words[:2]), words[0]]


def read_nq(path: str | Path) -> tuple[Query, ...]:
    """Natural Questions as mend@e04fdb9 has them, {"questions": [...], "answers": [...]}: a capital in front, a question mark behind, and
    without the "nq question: " that circulates, by which anybody could tell them. Raises InvalidExample."""
    raw = table(_json(path, "file of questions"))
    questions, answers = texts(raw, "questions"), texts(raw, "answers")
    if len(questions) != len(answers):
        raise InvalidExample(f"{path} has {len(questions)} questions and {len(answers)} answers.")
    plain = (q.removeprefix("nq question: ").removesuffix("?").strip() for q in questions)
    return tuple(Query(prompt=f"{q[:1].upper()}{q[1:]}?", answer=f" {a}", kind="unrelated") for q, a in zip(plain, answers, strict=True))


def qa(questions: Sequence[Asked], n: int, seed: int = 0, unrelated: Sequence[Query] = (), outside: int = OUTSIDE) -> Cases:
    """QA: `n` of the questions are edits, each with `outside` queries out of scope: some of `unrelated` (see `read_nq`), else of the other
    records, questions and rephrasings in equal parts. Raises BudgetError."""
    rng, edits, others = _split(questions, n, seed)
    cases = [_question_case(rng, one)[0] for one in edits]
    free = _apart(unrelated or _even(rng, [[q for o in others for q in _plain(o)], [q for o in others for q in _again(o)]]), cases)
    return tuple(replace(c, outside=_draw(rng, free, outside)) for c in cases)


def qa_hard(questions: Sequence[Asked], n: int, encoder: Encoder, seed: int = 0, outside: int = OUTSIDE) -> Cases:
    """QA-hard: in scope, besides, the implications that name the old answer, with the new one in its place, and a yes/no question.

    Out of scope, for each edit, `outside` easy and `outside` hard queries (`near`) of the other records: questions, rephrasings,
    implications and yes/no questions in equal parts, as far as there are any. Raises BudgetError.
    """
    rng, edits, others = _split(questions, n, seed)
    cases = []
    for one in edits:
        case, new = _question_case(rng, one)
        cases.append(replace(case, inside=(*case.inside, *implied(one, new), *yes_no(rng, one, new))))
    parts = ([q for o in others for q in part(o)] for part in (_plain, _again, _follow, lambda o: _judged(rng, o)))
    free = _apart(_even(rng, parts), cases)
    out = []
    for case, hard in zip(cases, near(encoder, cases, free, outside, seed), strict=True):
        chosen = {q.prompt for q in hard}
        out.append(replace(case, outside=(*_draw(rng, [q for q in free if q.prompt not in chosen], outside), *hard)))
    return tuple(out)


def _split(questions: Sequence[Asked], n: int, seed: int) -> tuple[random.Random, list[Asked], list[Asked]]:
    """(the draw that goes on, the questions that are edits, the others)."""
    if not 0 < n <= len(questions):
        raise BudgetError(f"There are {len(questions)} questions, not {n}.")
    rng = random.Random(seed)
    order = rng.sample(questions, k=len(questions))
    return rng, order[:n], order[n:]


def _question_case(rng: random.Random, one: Asked) -> tuple[ScopeCase, str]:
    """(the case with its question and rephrasings, the new answer)."""
    new = rng.choice(one.alternatives)
    prompts = [("edit", one.question), *(("rephrase", r) for r in one.rephrases)]
    case = ScopeCase(
        example=Example(prompt=one.question, target=f" {new}", subject=spoken_of({"subject": one.subject}, one.question)),
        inside=tuple(Query(prompt=p, answer=f" {new}", kind=kind, about=one.subject) for kind, p in prompts),
        about=one.subject,
        source=one.source,
    )
    return case, new


def _plain(one: Asked) -> list[Query]:
    return [Query(prompt=one.question, answer=f" {one.old}", kind="unrelated", about=one.subject)]


def _again(one: Asked) -> list[Query]:
    return [Query(prompt=r, answer=f" {one.old}", kind="unrelated", about=one.subject) for r in one.rephrases]


def _follow(one: Asked) -> list[Query]:
    return [Query(prompt=q, answer=f" {a}", kind="implication", about=one.subject) for q, a, _ in one.implications]


def _judged(rng: random.Random, one: Asked) -> list[Query]:
    label = rng.choice((" True", " False"))  # what is said there is compared with what was said, not with the truth
    statement = _stated(one, one.old)
    return [Query(prompt=prefixed(rng, statement), answer=label, kind="yes/no", about=one.subject)] if statement else []


def instead(sentence: str, old: str, new: str) -> str | None:
    """The sentence with `new` wherever `old` stands in it, in whatever case; None where it does not."""
    out, found = text.whole(old, re.IGNORECASE).subn(lambda _: new, sentence)
    return out if found else None


def implied(one: Asked, new: str) -> list[Query]:
    """The implications that name the old answer, with the new one in its place; what they ask for stays as it is."""
    asked_now = {instead(question, one.old, new): answer for question, answer, _ in one.implications}
    return [Query(prompt=q, answer=f" {a}", kind="implication", hard=True, about=one.subject) for q, a in asked_now.items() if q]


def yes_no(rng: random.Random, one: Asked, new: str) -> list[Query]:
    """Whether an answer is right: the new one or, as likely, one that is not. None if the record's statement does not name the old one."""
    others = [a for a in one.alternatives if folded(a) != folded(new)]
    said, label = rng.choice([(new, " True"), (rng.choice(others or [one.old]), " False")])
    statement = _stated(one, said)
    return [Query(prompt=prefixed(rng, statement), answer=label, kind="yes/no", hard=True, about=one.subject)] if statement else []


def prefixed(rng: random.Random, statement: str) -> str:
    """A statement as a yes/no question, its prefix in small letters half of the time."""
    prefix = rng.choice(YES_NO)
    return (prefix.lower() if rng.random() < 0.5 else prefix) + statement


def _stated(one: Asked, answer: str) -> str:
    """The record's sentence with this answer, "" if it does not name the old one; where it has none, its question is quoted."""
    return (instead(one.statement, one.old, answer) or "") if one.statement else f'The answer to "{one.question}" is {answer}.'


def counterfact_hard(path: str | Path) -> tuple[Cases, Wrong]:
    """QA with the hardest outside, as in thunlp/EREN@e88cea0: {"edit_statement", "subject_name", "edit_scope": [[question, answer], ...],
    "unrelated": {"neighbor_subj": [questions], "same_subj": [questions]}}.

    A statement that ends with its answer is the example; else the first question is. What is called unrelated and yet asks what an edit
    answers is left out (53 of the published 9,132). Its true answers are not read: they do not go with it. Raises InvalidExample.
    """
    cases, wrong = sound(records(path), _counterfact_case)
    if not cases:
        raise wrong[0]
    within = {folded(p) for c in cases for p in c.prompts}
    # whether a question of the subject is the edit's own is told by the data; the words of two such questions are much the same
    met = iter(concerns([replace(q, about="") for c in cases for q in c.outside], cases))
    own = [[(q, next(met) - {i}) for q in c.outside] for i, c in enumerate(cases)]
    free = (tuple(q for q, others in found if not others and folded(q.prompt) not in within) for found in own)
    return tuple(replace(c, outside=outside) for c, outside in zip(cases, free, strict=True)), tuple(wrong)


def _counterfact_case(where: str, record: Any) -> ScopeCase:
    raw = table(record)
    statement, subject = asked(raw, "edit_statement").rstrip(". "), asked(raw, "subject_name")
    scope, unrelated = raw.get("edit_scope"), raw.get("unrelated")
    if not isinstance(scope, list) or not scope or not all(isinstance(pair, list) and len(pair) == 2 for pair in scope):
        raise InvalidExample("'edit_scope' is a list of [question, answer] that is not empty.")
    if not isinstance(unrelated, dict):
        raise InvalidExample("'unrelated' holds the questions out of scope.")
    pairs = [(asked({"question": q}, "question"), asked({"answer": a}, "answer")) for q, a in scope]
    prompt, answer = pairs[0]
    if statement.endswith(f" {answer}"):
        prompt = statement.removesuffix(f" {answer}")
    within = {folded(q) for q, _ in pairs}
    rings = (("subject", "same_subj"), ("relation", "neighbor_subj"))
    outside = {q: ring for ring, key in rings for q in texts(unrelated, key) if folded(q) not in within}
    return ScopeCase(
        example=Example(prompt=prompt, target=f" {answer}", subject=spoken_of({"subject": subject}, prompt)),
        inside=tuple(
            Query(prompt=q, answer=f" {a}", kind="edit" if q == prompt else "rephrase", about=subject) for q, a in dict(pairs).items()
        ),
        outside=tuple(Query(prompt=q, kind=ring, hard=True, about=subject if ring == "subject" else "") for q, ring in outside.items()),
        about=subject,
        source=where,
    )


# -------------------------------------------------------------------------------------------------------------------------------- claims


def fever(path: str | Path, seed: int = 0, outside: int = OUTSIDE) -> tuple[Cases, Wrong]:
    """FC on FEVER as in thunlp/EREN@e88cea0: {"edits": [...], "out_of_scope": [...]}, records of {"edit_statement", "edit_scope": [[claim,
    "yes" | "no"], ...]}.

    `edit_scope_true_ans` is not read: it is longer than `edit_scope` and does not go with it. A claim that the statement refutes is a hard
    one. Out of scope are statements of the other half, hard ones those that share a name with the edit. Those that are said in the scope of
    an edit, or in nearly the same words, are left out: the published halves share ten claims. Raises InvalidExample, BudgetError.
    """
    raw, wrong = table(_json(path, "file of claims")), list[InvalidExample]()
    halves: dict[str, list[ScopeCase]] = {}
    for half in ("edits", "out_of_scope"):
        if not isinstance(raw.get(half), list):
            raise InvalidExample(f"{path} has no list '{half}'.")
        halves[half], bad = sound(listed(raw[half], f"{half} in {path}"), _statement_case)
        wrong += bad
    edits, others = halves["edits"], halves["out_of_scope"]
    met = iter(concerns([q for c in others for q in c.inside], edits))  # a statement is in scope, too, if one of its rephrasings is
    free = [Query(prompt=c.example.prompt, kind="unrelated") for c in others if not any([next(met) for _ in c.inside])]
    if not edits or not free:
        raise wrong[0] if wrong else BudgetError(f"Nothing in {path} is out of the scope of all its edits.")
    rng, called = random.Random(seed), {q.prompt: names(q.prompt) for q in free}
    out = []
    for case in edits:
        own = set[str]().union(*map(names, case.prompts))
        same = [replace(q, kind="subject", hard=True) for q in free if own & called[q.prompt]]
        apart = [q for q in free if not own & called[q.prompt]]
        out.append(replace(case, outside=(*_draw(rng, apart, outside), *_draw(rng, same, outside))))
    return tuple(out), tuple(wrong)


NAME = re.compile(r"[A-Z][\w'’-]*(?:\s(?:of|the|and|de|in)(?=\s[A-Z])|\s[A-Z0-9][\w'’-]*)+")


def names(sentence: str) -> set[str]:
    """The names of several words in a sentence, folded."""
    return {folded(found.removeprefix("The ")) for found in NAME.findall(sentence)}


def _statement_case(where: str, record: Any) -> ScopeCase:
    raw = table(record)
    statement, scope = asked(raw, "edit_statement"), raw.get("edit_scope")
    if not isinstance(scope, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in scope):
        raise InvalidExample("'edit_scope' is a list of [claim, yes or no].")
    if strange := [answer for _, answer in scope if answer not in ("yes", "no")]:
        raise InvalidExample(f"a claim is answered yes or no, got {strange[0]!r}.")
    claims = {asked({"claim": claim}, "claim"): answer == "yes" for claim, answer in scope}
    claims.pop(statement, None)
    inside = (Query(prompt=c, answer=" true" if right else " false", kind="claim", hard=not right) for c, right in claims.items())
    return ScopeCase(
        example=Example(prompt=statement, target=" true"),
        inside=(Query(prompt=statement, answer=" true", kind="edit"), *inside),
        source=where,
    )


class Row(NamedTuple):
    """A row of VitaminC."""

    source: str
    evidence: str
    claim: str
    label: str
    page: str
    revision: str


NEUTRAL = "NOT ENOUGH INFO"


def vitaminc(path: str | Path, n: int, seed: int = 0, balanced: bool = False, outside: int = OUTSIDE) -> tuple[Cases, Wrong]:
    """FC on VitaminC, {"evidence", "claim", "label", "page", "revision_type"} in each line; `n` of its pieces of evidence are edits.

    Real revisions with more than ten words of evidence. Claims that the evidence supports or refutes are in scope and hard; those that it
    says too little about are out of scope and hard; easy ones are about pages whose title neither holds an edit's nor stands in it. Rows of
    one evidence are one case. `balanced`, for training: of the labels that are more frequent, rows are left out at random until all are as
    likely. Raises InvalidExample, BudgetError.
    """
    found, wrong = sound(records(path), _row)
    if not found:
        raise wrong[0]
    rng, rows = random.Random(seed), [r for r in found if r.revision == "real" and len(r.evidence.split(" ")) > LONG]
    if balanced:
        counts = Counter(r.label for r in rows)
        rows = [r for r in rows if rng.random() < min(counts.values()) / counts[r.label]]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.page, row.evidence].append(row)
    order = rng.sample(sorted(groups), k=len(groups))
    if not 0 < n <= len(order):
        raise BudgetError(f"{path} has {len(order)} pieces of evidence, not {n}.")
    cases = [_evidence_case(groups[key]) for key in order[:n]]
    free = _apart([Query(prompt=r.claim, kind="unrelated", about=r.page) for key in order[n:] for r in groups[key]], cases)
    return tuple(replace(c, outside=(*c.outside, *_draw(rng, free, outside))) for c in cases), tuple(wrong)


def _row(where: str, record: Any) -> Row:
    raw = table(record)
    row = Row(where, *(asked(raw, key) for key in ("evidence", "claim", "label", "page", "revision_type")))
    if row.label not in (*VERDICTS, NEUTRAL):
        raise InvalidExample(f"'label' is {', '.join(VERDICTS)} or {NEUTRAL}, got '{row.label}'.")
    return row


def _evidence_case(rows: Sequence[Row]) -> ScopeCase:
    page, evidence = rows[0].page, rows[0].evidence
    claims = {r.claim: r.label for r in rows if r.claim != evidence}
    judged = (
        Query(prompt=c, answer=VERDICTS[label], kind="claim", hard=True, about=page) for c, label in claims.items() if label in VERDICTS
    )
    return ScopeCase(
        example=Example(prompt=evidence, target=" true"),
        inside=(Query(prompt=evidence, answer=" true", kind="edit", about=page), *judged),
        outside=tuple(Query(prompt=c, kind="subject", hard=True, about=page) for c, label in claims.items() if label == NEUTRAL),
        about=page,
        source=rows[0].source,
    )


# ------------------------------------------------------------------------------------------------------------------------------- opinions


def convsent(path: str | Path, n: int, seed: int = 0, outside: int = OUTSIDE) -> tuple[Cases, Wrong]:
    """ConvSent, a JSON list of {"ent": topic, "pos": [utterances], "neg": [utterances]}; `n` of the topics are edits, to a random side.

    Out of scope are prompts about the other topics, with utterances of a random side. Raises InvalidExample, BudgetError.
    """
    topics, wrong = sound(records(path), _topic)
    if not topics:
        raise wrong[0]
    if not 0 < n <= len(topics):
        raise BudgetError(f"{path} has {len(topics)} topics, not {n}.")
    rng = random.Random(seed)
    order = rng.sample(topics, k=len(topics))
    cases = [opinion_case(rng, topic, rng.choice(sorted(OPPOSITE)), said, TEMPLATES, where) for where, topic, said in order[:n]]
    others = [q for _, topic, said in order[n:] for q in opinions(rng, topic, said[rng.choice(sorted(OPPOSITE))], TEMPLATES, "relation")]
    free = _apart(others, cases)
    return tuple(replace(c, outside=_draw(rng, free, outside)) for c in cases), tuple(wrong)


def _topic(where: str, record: Any) -> tuple[str, str, dict[str, tuple[str, ...]]]:
    raw = table(record)
    said = {side: texts(raw, side) for side in OPPOSITE}
    if not all(said.values()):
        raise InvalidExample("a topic has utterances of both sides.")
    return where, asked(raw, "ent"), said


def opinion_case(
    rng: random.Random, topic: str, side: str, said: Mapping[str, Sequence[str]], templates: Sequence[str], source: str
) -> ScopeCase:
    """The edit of a topic to one side, "pos" or "neg": all utterances of that side in scope, each behind a prompt of its own, those of the
    other side against it."""
    return ScopeCase(
        example=Example(prompt=f"Topic: {topic}", target=SENTIMENTS[side]),
        inside=opinions(rng, topic, said[side], templates),
        against=opinions(rng, topic, said[OPPOSITE[side]], templates),
        about=topic,
        source=source,
    )


def opinions(
    rng: random.Random, topic: str, utterances: Iterable[str], templates: Sequence[str], kind: str = "opinion", hard: bool = False
) -> tuple[Query, ...]:
    """Utterances about a topic, each behind a prompt that asks for it."""
    return tuple(
        Query(prompt=rng.choice(templates).format(t=topic), answer=f" {u.strip()}", kind=kind, hard=hard, about=topic) for u in utterances
    )
