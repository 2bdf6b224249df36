"""50 canonical examples at once on the lab's test facts: success out of distribution against the budget.

Out of distribution: all phrasings and paragraphs that the examples do not contain; free greedy generation, exact match, old answer absent.
The curve runs from epsilon 1e-5 to 1e-2; the goal is set at 1e-3, for the better of the methods. A patch is built inside 1e-2 and one
inside 1e-3, which the gate scales onto the edges of 1e-4 and 1e-5. With --data, what the patches cost on
ordinary English is measured too, on the held-out part of DIR/general/fineweb_val.jsonl.
"""

import time
from typing import Any

from _bench import arguments, emit

from errata import apply, build, evaluate, hosts, text
from errata.lab import tasks
from errata.lab.train import read_prose
from errata.types import Budget, Verdict

COMPARED = ("finetune", "lora")
MEASURES = ("edit", "ood", "paraphrases", "paragraphs", "neighbours.relation", "neighbours.subject", "neighbours.unrelated", "negations")


def cost(verdict: Verdict) -> str:
    ruled = "passed" if verdict.passed else "REFUSED: " + "; ".join(verdict.failures)
    scaled = f", scaled to {verdict.scale:.2g}" if verdict.scale != 1 else ""
    return f"loss {verdict.increase:+.1e} (95 % < {verdict.upper:+.1e}) on {verdict.tokens} tokens{scaled}, {ruled}"


def main() -> None:
    args = arguments(__doc__)
    host = hosts.load("lab/neox", device="cpu")
    cases = tasks.cases("test", 10 if args.quick else 50, "wrong", seed=args.seed)
    examples = [c.example for c in cases]
    reference, _ = text.set_aside(text.standing(host)[1], examples, text.answers_of(host, examples))
    before = evaluate.baseline(host, cases, reference[:200])
    prose = hosts.chunks(host, read_prose(args.data / "general" / "fineweb_val.jsonl")[1][: 40 if args.quick else 400]) if args.data else []
    prose_N2 = hosts.score(host, prose)
    settings: dict[str, Any] = {"steps": 24, "hold": 48, "searched": 0} if args.quick else {}
    best: dict[str, tuple[float, float]] = {}
    for epsilons in ((1e-3,),) if args.quick else ((1e-3, 1e-4, 1e-5), (1e-2,)):
        budgets = [Budget(epsilon=epsilon) for epsilon in epsilons]
        for method in COMPARED:
            start = time.perf_counter()
            built = build.edit_within(host, examples, budgets, method, seed=args.seed, **settings)
            seconds = time.perf_counter() - start
            for patch, verdict in built:
                label = f"{method} at {verdict.budget.epsilon:.0e}"
                scores = evaluate.evaluate(host, patch, before)
                values = {m: evaluate.aggregate(scores, m) for m in MEASURES}
                for m, e in values.items():
                    interval = "" if e.low is None or e.high is None else f"[{e.low:.3f}, {e.high:.3f}], "
                    emit(args, f"{label}: {m}", e.value, None, f"{interval}n = {e.n}; {cost(verdict)}; built in {seconds:.0f} s")
                if prose:
                    with apply.applied(host, patch):
                        mean, upper = hosts.increase(prose_N2, hosts.score(host, prose))
                    how = f"95 % < {upper:+.1e}; {len(prose)} chunks of held-out prose, none of which held the model still or judged it"
                    emit(args, f"{label}: increase of the loss on prose", mean, None, how)
                if verdict.budget.epsilon == 1e-3 and verdict.passed:
                    best[method] = (values["ood"].value or 0.0, values["neighbours.relation"].value or 0.0)
    ood, kept = max(best.values(), default=(0.0, 0.0))
    how = f"the better method of {', '.join(COMPARED)}; {len(cases)} wrong test facts at once, seed {args.seed}"
    emit(args, "success out of distribution at 1e-3", ood, (">=", 0.80), how)
    emit(args, "neighbours of the same relation still right, there", kept, (">=", 0.98), how)


if __name__ == "__main__":
    main()
