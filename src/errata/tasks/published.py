"""How the paper of canonical examples chooses an epoch and reports: its arithmetic, and its tables from the result files it shipped.

A room of its own beside `canonical.py`, because this is about numbers in files, not about text: nothing here reads a data set, touches a
model or scores one. The same functions report our own runs, so that ours and theirs are the same quantity.

    cells = (*finetuned(folder), *ensemble(folder / "intervention.jsonl"), *memit(folder / "memit_results.test.final.float16.json"))
    print(table(cells, "EleutherAI/gpt-j-6b", ("full", "lora", "ensemble")))

Hewitt et al. 2024 (https://arxiv.org/abs/2402.06155), section 4 and tables 2 to 8; john-hewitt/model-editing-canonical-examples@15a1e7b,
`plotting/`. Note that the two families treat a run outside the ball differently: finetuning falls back to the unedited model, and counts 0;
MEMIT leaves it out of its mean, and `Cell.runs` says how many are left.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from errata.types import BudgetError, InvalidReference

TASKS = ("country", "company", "stereoset", "verb", "gender", "temporal")
EPSILONS = (1e-3, 1e-4, 1e-5)

# ------------------------------------------------------------------------------------------------------------------------- the ball


def mean_loss(totals: Sequence[float], counts: Sequence[int]) -> float:
    """Nats per token: every token weighs alike, whatever chunk it stands in."""
    return sum(totals) / sum(counts)


def inside(before: float, after: float, epsilon: float, strict: bool = False) -> bool:
    """Whether a mean token loss grew by at most the relative `epsilon`. Their selection is `strict`, their test report is not."""
    if not before > 0:
        raise BudgetError(f"A mean token loss is positive, got {before}.")
    return after < (1 + epsilon) * before if strict else after <= (1 + epsilon) * before


def last_inside(losses: Sequence[float], epsilon: float, cap: int | None = None, strict: bool = False) -> int:
    """The last epoch inside the ball, be it after one outside; `losses[0]` is the unedited model, which is always inside.

    `cap` is the epoch chosen at validation: at test time no later one is taken.
    """
    last = len(losses) - 1 if cap is None else min(cap, len(losses) - 1)
    return next((i for i in range(last, 0, -1) if inside(losses[0], losses[i], epsilon, strict)), 0)


def points(before: float, after: float) -> float:
    """Change of a share in percentage points."""
    return 100 * (after - before)


def standard_error(changes: Sequence[float]) -> float:
    """Of the mean over seeds, as the paper has it: the population's standard deviation (ddof = 0) by the root of their number."""
    return statistics.pstdev(changes) / math.sqrt(len(changes))


# ----------------------------------------------------------------------------------------------------------------------------- cells


@final
@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a table. Success as a share before, its change in points, both over seeds; hard negatives in nats.

    None where no run was inside the ball. `error` is the standard error of `change`; `runs` are those that the means are over, where told.
    """

    model: str
    method: str
    task: str
    epsilon: float
    before: float | None
    change: float | None
    error: float | None
    hard_before: float | None
    hard_change: float | None
    runs: int | None = None


def finetuned(folder: str | Path) -> tuple[Cell, ...]:
    """Full finetuning and LoRA: results.jsonl, initial.jsonl and their -hn twins. Raises InvalidReference."""
    cells = []
    with _reading(folder):
        results, initial, hard_after, hard_initial = (
            {(str(r["model"]), str(r["method"]), str(r["task"]), float(r["league"])): r for r in _rows(Path(folder) / f"{name}.jsonl")}
            for name in ("results", "initial", "results-hn", "initial-hn")
        )
        for key, result in results.items():
            model, method, task, epsilon = key
            before, hard = float(initial[key]["score"]), float(hard_initial[key]["score"])
            cells.append(
                Cell(
                    model=model,
                    method=method,
                    task=task,
                    epsilon=epsilon,
                    before=before,
                    change=points(before, float(result["score"])),
                    error=float(result["improvement_stddev"]),  # already by the root of the runs, and in points
                    hard_before=hard,
                    hard_change=float(hard_after[key]["score"]) - hard,
                )
            )
    return tuple(cells)


def ensemble(path: str | Path, model: str = "EleutherAI/gpt-j-6b") -> tuple[Cell, ...]:
    """The large model with a small one's edit: intervention.jsonl, whose scores are failures. Raises InvalidReference.

    Its hard negatives are left out: they are not those behind the paper's table 8 (verb has one number for two balls).
    """
    with _reading(path):
        return tuple(
            Cell(
                model=model,
                method="ensemble",
                task=str(row["task"]),
                epsilon=float(row["league"]),
                before=1 - float(row["initial_score"]),
                change=points(float(row["score"]), float(row["initial_score"])),
                error=float(row["improvement_stddev"]),
                hard_before=None,
                hard_change=None,
            )
            for row in _rows(Path(path))
        )


def memit(path: str | Path) -> tuple[Cell, ...]:
    """MEMIT with the whole prompt as its subject ("memit") and with spans from an oracle ("oracle"): one JSON object, NaN for none.

    The file does not hold what was before, and that was not what finetuning began with: on pythia-70m, gender, success after less the
    change gives .10 in their float16, where the bfloat16 of the others gives .87. Raises InvalidReference.
    """
    with _reading(path):
        raw = json.loads(Path(path).read_text())
        return tuple(
            _memit({"prefix": "memit"}.get(kind, kind), model, {"verbs": "verb"}.get(task, task), float(league), found)
            for kind, models in raw.items()
            for model, tasks in models.items()
            for task, leagues in tasks.items()
            for league, found in leagues.items()
        )


def _memit(method: str, model: str, task: str, epsilon: float, found: dict[str, Any]) -> Cell:
    def value(measure: str, statistic: str) -> float | None:
        x = float(found[measure][statistic])
        return None if math.isnan(x) else x

    runs = int(found["n"])
    change, spread = value("success_rate_change", "mean"), value("success_rate_change", "stdv")
    return Cell(
        model=f"EleutherAI/{model}" if model.startswith("pythia") else model,
        method=method,
        task=task,
        epsilon=epsilon,
        before=None,
        change=None if change is None else 100 * change,
        error=None if spread is None else 100 * spread / math.sqrt(runs),
        hard_before=None,
        hard_change=value("hard_negative_score_change", "mean"),
        runs=runs,
    )


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise InvalidReference(f"Cannot read the results {e.filename}: {e.strerror}.") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidReference(f"The results in {path} are not as the paper's code writes them: {e!r}.") from e


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]


# ---------------------------------------------------------------------------------------------------------------------------- tables


def pick(cells: Iterable[Cell], model: str, method: str, epsilon: float) -> dict[str, Cell]:
    """The cells of one column, by task."""
    return {c.task: c for c in cells if (c.model, c.method, c.epsilon) == (model, method, epsilon)}


def task_mean(values: Iterable[float | None]) -> float | None:
    """Unweighted over the six tasks; None if one of them has no value."""
    found = list(values)
    known = [v for v in found if v is not None]
    return sum(known) / len(TASKS) if len(known) == len(found) == len(TASKS) else None


def shown(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:+.{digits}f}"


def table(cells: Iterable[Cell], model: str, methods: Sequence[str]) -> str:
    """A Markdown table as the paper's 3 and 4: tasks by balls, the methods' changes between slashes, the mean over tasks below.

    What was before differs a little from run to run; it is averaged over all columns, as in the paper's table 4. "(n)" stands at means over
    fewer than five runs.
    """
    cells = tuple(cells)
    columns = {(e, m): pick(cells, model, m, e) for e in EPSILONS for m in methods}

    def average(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.1f}"

    def value(cell: Cell | None) -> str:
        few = f"({cell.runs})" if cell and cell.runs and cell.runs < 5 else ""
        return shown(cell.change if cell else None) + few

    lines = [f"| task | before | {' | '.join(f'{e:.0e}: ' + ' / '.join(methods) for e in EPSILONS)} |", "|---" * (2 + len(EPSILONS)) + "|"]
    before = {task: average(column[task].before for column in columns.values() if task in column) for task in TASKS}
    for task in TASKS:
        balls = [" / ".join(value(columns[e, m].get(task)) for m in methods) for e in EPSILONS]
        lines.append(f"| {task} | {percent(before[task])} | {' | '.join(balls)} |")
    means = [" / ".join(shown(task_mean(c.change for c in columns[e, m].values()), 2) for m in methods) for e in EPSILONS]
    lines.append(f"| mean | {percent(task_mean(before.values()))} | {' | '.join(means)} |")
    return "\n".join(lines)
