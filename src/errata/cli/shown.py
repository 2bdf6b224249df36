"""Values as a reader sees them and as plain JSON: examples, ledgers, patches with their verdicts."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from errata.ledger import ExampleRow, Ledger
    from errata.types import Example, Patch, Verdict


def table(*columns: str, rows: Iterable[Sequence[object]], title: str | None = None, even: bool = False) -> Table:
    """A table whose cells are taken as they are: brackets in what a model says are no markup. `even`: columns of one width."""
    drawn = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False, expand=even)
    for column in columns:
        drawn.add_column(column, ratio=1 if even else None, overflow="fold")
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return drawn


def short(id: str) -> str:
    """An id as it is shown; the ledger takes it back."""
    return id.removeprefix("b2:")[:10]


def number(value: float | None) -> str:
    """A measured value; 0 of 0 is "none"."""
    return "none" if value is None else f"{value:.3f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def plain(example: "Example") -> dict[str, Any]:
    return {"id": example.id} | example.as_dict()


def listed(examples: Sequence["Example"]) -> RenderableType:
    return table("id", "goal", "example", rows=[(short(e.id), e.goal, str(e)) for e in examples])


def fate(row: "ExampleRow") -> tuple[dict[str, Any], RenderableType]:
    """An example and since when it is active or what has ended that and when, as data and as a table."""
    last = row.last
    data = plain(row.example) | {"active": row.active, "last": {"at": last.at, "what": last.what, "detail": last.detail}}
    begun = {"add": "active since", "retract": "retracted at", "supersede": "superseded at"}[last.what]
    state = f"{begun} {last.at[:19]} (UTC)" + (f", {last.detail}" if last.detail else "")
    told = {name: value for name, value in plain(row.example).items() if value is not None}
    return data, table("example", short(row.example.id), rows=[*told.items(), ("state", state)])


def about(ledger: "Ledger") -> dict[str, Any]:
    return {"ledger": str(ledger.path), "model": ledger.model, "host": ledger.host, "budget": asdict(ledger.budget)}


def overview(ledger: "Ledger") -> tuple[dict[str, Any], RenderableType, RenderableType, RenderableType]:
    active, patches, what = ledger.active(), ledger.patches(), about(ledger)
    limits = ", ".join(f"{name} {value:g}" for name, value in what["budget"].items() if value is not None)
    kept = [
        {"id": r.id, "at": r.at, "method": r.method, "examples": r.examples, "passed": r.verdict.passed, "current": r.current}
        for r in patches
    ]
    in_use = next((r.id for r in reversed(patches) if r.current and r.verdict.passed), None)
    rows = [
        (
            short(r.id),
            r.at[:19],
            r.method,
            len(r.examples),
            "passed" if r.verdict.passed else "refused",
            "in use" if r.id == in_use else "" if r.current else "out of date",
        )
        for r in patches
    ]
    data = what | {"active": [plain(e) for e in active], "patches": kept}
    heading = f"{ledger.path}: {ledger.model}, weights {short(ledger.host)}; budget: {limits}"
    return data, heading, listed(active), table("patch", "judged (UTC)", "method", "examples", "verdict", "", rows=rows)


def described(patch: "Patch", verdict: "Verdict") -> tuple[dict[str, Any], RenderableType]:
    """A patch and the verdict on it, as data and as a table of what was measured beside what was allowed."""
    b, v = verdict.budget, verdict
    data = {
        "patch": patch.id,
        "method": patch.method,
        "config": dict(patch.config),
        "base": patch.parent,
        "nbytes": patch.nbytes,
        "passed": v.passed,
        "failures": v.failures,
        "increase": v.increase,
        "spent": v.spent,
        "verdict": v.as_dict(),
        "examples": [plain(e) for e in patch.examples],
    }
    rows = [
        ("reference loss", f"{v.loss_before:.4f} -> {v.loss_after:.4f} nats ({v.increase:+.2e})", ""),
        ("  with 95 % confidence below", f"{v.upper:+.2e} ({v.spent:.0%} of the budget)", f"{b.epsilon:.0e}"),
        ("  measured on", f"{v.tokens} tokens in {v.chunks} chunks, {v.set_aside} documents set aside", ""),
        ("neighbours kept", f"{v.kept} of {v.asked}", "" if b.neighbours is None else f"{b.neighbours:.0%}"),
        ("relative norm of the change", f"{v.norm:.3g}", "" if b.norm is None else f"{b.norm:.3g}"),
        ("examples fixed", f"{v.fixed} of {v.wanted}", f"{b.fixed:.0%}"),
        ("scaled by the gate", "no" if v.scale == 1 else f"to {v.scale:.3g}", ""),
        *([] if v.condition is None else [("condition of the solve, about", f"{v.condition:.1e}", "")]),
    ]
    ruling = "passed" if v.passed else "REFUSED"
    title = f"Patch {short(patch.id)} by {patch.method}, {patch.nbytes / 1e6:.1f} MB: {ruling}"
    return data, table("", "measured", "limit", rows=rows, title=title)
