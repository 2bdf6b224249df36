"""Examples -> (Patch, Verdict): the main road in one call, shared by Python and the CLI.

Finds the text to hold with and to judge with, lets the method work inside the budget, and has the gate judge what comes out, on text that
does not state the edited facts. Nothing here is specific to a method.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata import gate, hosts, methods, text
from errata.hosts import Host
from errata.types import (
    Budget,
    ConflictError,
    Example,
    InvalidExample,
    Method,
    Neighbour,
    Patch,
    Progress,
    Run,
    Spread,
    State,
    Verdict,
    forget,
    here,
    no_progress,
)


def parse(line: str) -> Example:
    """`prompt|target` as an Example; the bar is the last one in the line. Raises InvalidExample."""
    prompt, bar, target = line.rpartition("|")
    if not bar:
        raise InvalidExample(f"'{line}' has no bar. Write prompt and target as in 'The capital of Mauritius is| Port Louis'.")
    return Example(prompt=prompt, target=target)


def check(host: Host, examples: Sequence[Example]) -> None:
    """What can be wrong with examples before anything is built: none at all, contradictions, too long, already so.

    Raises InvalidExample or ConflictError.
    """
    if not examples:
        raise InvalidExample("There are no examples to build from.")
    for e in examples:
        hosts.encode(host, e.prompt, e.target)
    answers: dict[str, Example] = {}
    for e in examples:
        if e.goal == "raise" and (other := answers.setdefault(" ".join(e.prompt.split()), e)).target != e.target:
            raise ConflictError(f"Two examples give '{e.prompt}' two answers: '{other.target}' and '{e.target}'. Keep one.")
    if all(hosts.fixes(host, examples)):
        raise InvalidExample(f"{host.name} already does what the {len(examples)} example(s) ask; there is nothing to fix.")


def edit(
    host: Host,
    examples: Iterable[Example | str],
    method: str | Method = "finetune",
    *,
    epsilon: float = 1e-3,
    budget: Budget | None = None,
    reference: str | Path | None = None,
    watched: Sequence[Neighbour | str] = (),
    seed: int = 0,
    state: State | None = None,
    sums: State | None = None,
    keep: Callable[[State], None] = forget,
    progress: Progress = no_progress,
    spread: Spread = here,
    **settings: Any,
) -> tuple[Patch, Verdict]:
    """A patch that fixes `examples` (or "prompt|target" strings) inside the budget, and the gate's verdict on it.

    `reference` is a text or JSONL file, half of which holds the model still while the other half judges; without it the lab's own text
    or, for other models, text sampled from the model serves. `watched` are prompts whose answers the gate
    compares. `state` is what `method.prepare` returned, for a method that learns first. `keep` gets the sums that a method of sums has
    made, with which as `sums` the next edit reads only the examples that came or went. `spread` is where the work of a method of sums is
    done: here, or as `on_ray` gives it. `settings` are the method's hyper-parameters, unless
    `method` is one already. The host is left bit-identical.
    Look at `verdict.passed`: a patch that could not be made to fit comes back too, with the reason in `verdict.failures`.

    Raises InvalidExample, ConflictError, UnknownName, InvalidReference, BudgetError.
    """
    budget = budget or Budget(epsilon=epsilon)
    ((patch, verdict),) = edit_within(
        host, examples, [budget], method, reference, watched, seed, progress, state, sums, keep, spread, **settings
    )
    return patch, verdict


def edit_within(
    host: Host,
    examples: Iterable[Example | str],
    budgets: Sequence[Budget],
    method: str | Method = "finetune",
    reference: str | Path | None = None,
    watched: Sequence[Neighbour | str] = (),
    seed: int = 0,
    progress: Progress = no_progress,
    state: State | None = None,
    sums: State | None = None,
    keep: Callable[[State], None] = forget,
    spread: Spread = here,
    **settings: Any,
) -> list[tuple[Patch, Verdict]]:
    """`edit` for several budgets: built once, inside the widest of them; the gate scales it onto the edges of the others."""
    made = method if isinstance(method, Method) else methods.make(method, **settings)
    rows = tuple(parse(e) if isinstance(e, str) else e for e in examples)
    check(host, rows)
    hold, judge = text.standing(host, reference, seed)
    judge, left_out = text.set_aside(judge, rows, text.answers_of(host, rows))
    base = gate.baseline(host, judge, left_out, watched)
    widest = max(budgets, key=lambda budget: budget.epsilon)
    conditions: list[float] = []
    run = Run(
        hold=hold,
        budget=widest,
        keep=keep,
        seed=seed,
        state=state,
        sums=sums,
        progress=progress,
        tell=lambda name, value: conditions.append(value) if name == "condition" else None,
        spread=spread,
    )
    patch = made.edit(host, rows, run)
    fitted = [gate.fit(host, patch, budget, base, progress=progress) for budget in budgets]
    return [(scaled, replace(verdict, condition=max(conditions, default=None))) for scaled, verdict in fitted]
