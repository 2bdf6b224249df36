"""An honest router: several methods on the user's own examples and text, judged alike, and why one of them was taken.

What is tried is what can be had at once: memory (`serac` if it was prepared, else `lu`), a note in front of the prompt (`rp`), senses on
a Backpack, `lora`, and those of `malmen` and `memit` that are prepared or need nothing but a subject. The best is inside the budget, fixes
most of the examples, gets most of the other phrasings right that the user's cases know, and then costs least.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from errata import apply, build, hosts, methods
from errata.hosts import Host
from errata.types import Case, EditError, Example, Method, Patch, State, Verdict

StateOf = Callable[[str], State | None]


@final
@dataclass(frozen=True, kw_only=True)
class Tried:
    """One method: what came out, or the sentence why nothing did. `right` of `asked` other phrasings are right under the patch."""

    method: str
    patch: Patch | None = None
    verdict: Verdict | None = None
    right: int = 0
    asked: int = 0
    seconds: float = 0.0
    why: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict is not None and self.verdict.passed

    @property
    def rank(self) -> tuple[Any, ...]:
        """Greater is better."""
        v = self.verdict
        if v is None or self.patch is None:
            return (False, 0.0, 0.0, 0.0, 0)
        return (v.passed, v.fixed / max(1, v.wanted), self.right / max(1, self.asked), -max(v.upper, 0.0), -self.patch.nbytes)


def candidates(host: Host, examples: Sequence[Example], state_of: StateOf) -> Iterator[tuple[str, Method, State | None]]:
    """(name, method, what it has learnt) of what can be tried on this host."""
    wanted = ["serac" if state_of("serac") is not None else "lu", "rp"]
    wanted += ["senses"] if host.layout.senses is not None else []
    wanted += ["lora"]
    wanted += ["malmen"] if state_of("malmen") is not None else []
    wanted += ["memit"] if host.kind == "causal" and all(e.subject for e in examples) else []
    for name in wanted:
        yield name, methods.make(name), state_of(name)


def tried(
    host: Host,
    examples: Sequence[Example],
    state_of: StateOf,
    *,
    cases: Sequence[Case] = (),
    busy: Callable[[str], None] = lambda name: None,
    **how: Any,
) -> list[Tried]:
    """Every candidate, the best first; `how` goes to `build.edit`. `cases` know other phrasings. The host is left as it was."""
    known = {e.id for e in examples}
    others = [(p, c.example.target) for c in cases if c.example.id in known for p in (*c.paraphrases, *c.paragraphs)]
    out = []
    for name, method, state in candidates(host, examples, state_of):
        busy(name)
        start = time.perf_counter()
        try:
            patch, verdict = build.edit(host, examples, method, state=state, **how)
        except EditError as e:  # one that cannot do it is a row of the table and no reason to stop
            out.append(Tried(method=name, seconds=time.perf_counter() - start, why=" ".join(str(e).split())))
            continue
        seconds = time.perf_counter() - start
        with apply.applied(host, patch):
            said = hosts.greedy(host, [p for p, _ in others], 24) if others else []
        right = sum(hosts.says(s, target) for s, (_, target) in zip(said, others, strict=True))
        why = "; ".join(verdict.failures)
        out.append(Tried(method=name, patch=patch, verdict=verdict, right=right, asked=len(others), seconds=seconds, why=why))
    return sorted(out, key=lambda t: t.rank, reverse=True)


def reason(found: Sequence[Tried]) -> str:
    """Why the first one was taken, in one sentence."""
    best, *others = found
    if not best.passed or best.verdict is None:
        return f"None of {len(found)} methods fits the budget and fixes enough; the nearest is {best.method}: {best.why}."
    told = f"{best.method} fixes {best.verdict.fixed} of {best.verdict.wanted} examples"
    told += f" and gets {best.right} of {best.asked} other phrasings right" if best.asked else ""
    second = next((t for t in others if t.passed), None)
    if second is None or second.verdict is None:
        return f"{told} inside the budget; no other does."
    names = ("", "more examples", "more of the other phrasings", "less of the budget", "a smaller file")
    by = next((name for name, a, b in zip(names[1:], best.rank[1:], second.rank[1:], strict=True) if a != b), "nothing")
    return f"{told} inside the budget; what puts it before {second.method} is {by}."
