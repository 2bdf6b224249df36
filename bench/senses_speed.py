"""The two solvers of `senses` on 100 lab examples: fast (each text read once) against faithful (every step through the model).

Both minimise one objective: the fast one by L-BFGS over rows that it reads once, with second orders for what stays as it is, the faithful
one by steps on draws of them. What they come to is judged alike: the gate's verdict inside one ball, and success on phrasings and
paragraphs that the examples do not contain. The time is that of the whole edit, from the examples to the patch, with what both share:
reading the text, the model's own sentences, the choice of senses. The time of the descent alone is printed beside it.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from _bench import arguments, emit

from errata import evaluate, gate, hosts, text
from errata.lab import tasks
from errata.methods import senses
from errata.types import Budget, Example, Patch, Run

MEASURES = ("edit", "ood", "paraphrases", "paragraphs", "neighbours.relation")
EPSILON = 1e-3


def main() -> None:
    args = arguments(__doc__)
    host = hosts.load("lab/backpack", device="cpu")
    n, settings = (100, {}) if not args.quick else (10, {"steps": 16, "hold": 32})
    cases = tasks.cases("test", n, "mixed", seed=args.seed)
    examples, budget = tuple(case.example for case in cases), Budget(epsilon=EPSILON)
    hold, judge = text.standing(host)
    judge, left_out = text.set_aside(judge, examples, text.answers_of(host, examples))
    base, before = gate.baseline(host, judge, left_out), evaluate.baseline(host, cases, ())
    run = Run(hold=hold[: 400 if args.quick else None], budget=budget, seed=args.seed)
    whole: dict[str, float] = {}
    alone: dict[str, float] = {}
    success: dict[str, float] = {}
    for solver in ("fast", "faithful"):
        made = senses.Senses(faithful=solver == "faithful", **settings)
        patch, whole[solver], alone[solver], processor = timed(made, host, examples, run)
        patch, verdict = gate.fit(host, patch, budget, base)
        scores = evaluate.evaluate(host, patch, before)
        ruled = "passed" if verdict.passed else "REFUSED: " + "; ".join(verdict.failures)
        how = f"loss {verdict.increase:+.1e} (95 % < {verdict.upper:+.1e}), scaled to {verdict.scale:.2g}, {ruled}"
        for measure in MEASURES:
            found = evaluate.aggregate(scores, measure)
            emit(args, f"{solver}: {measure}", found.value, None, f"n = {found.n}; {how}")
            success[f"{solver} {measure}"] = found.value or 0.0
        emit(args, f"{solver}: the whole edit (s)", whole[solver], None, f"{n} examples at once, epsilon {EPSILON:.0e}, model loaded")
        emit(args, f"{solver}: the whole edit, processor time (s)", processor, None, "the same; it tells less of what else ran")
        emit(args, f"{solver}: the descent alone (s)", alone[solver], None, "when all is read that is read before it")
    goal = None if args.quick else (">=", 20.0)
    emit(args, "how many times faster the fast solver is", whole["faithful"] / whole["fast"], goal, "the whole edit")
    emit(args, "how many times faster, the descent alone", alone["faithful"] / alone["fast"], None, "without reading and choosing")
    gained = success["fast ood"] - success["faithful ood"]
    emit(args, "what the fast solver gains in success", gained, None if args.quick else (">=", 0.0), "share of unseen text right")


def timed(made: senses.Senses, host: hosts.Host, examples: tuple[Example, ...], run: Run) -> tuple[Patch, float, float, float]:
    """The patch, the seconds that it took, those of its descent, and the processor's for the whole."""
    begun = []

    def progress(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        begun.append(time.perf_counter())
        return iter(items)

    start, worked = time.perf_counter(), time.process_time()
    patch = made.edit(host, examples, replace(run, progress=progress))
    end = time.perf_counter()
    return patch, end - start, end - begun[-1], time.process_time() - worked


if __name__ == "__main__":
    main()
