"""explain, compact: what the edit memory would do with a text, and its records' way into weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli.edge import LEDGER, Device, Encoder, Json, LedgerAt, Out, Postgres, Reference, app, bound_host, opened, speaking
from errata.cli.edits import Settings, settings_of
from errata.cli.shown import described, number, short, table

if TYPE_CHECKING:
    from errata.memory.route import Found, Router
    from errata.types import Record

ROUTES = {"in": "bold green", "unsure": "yellow", "out": ""}


@app.command()
def explain(
    query: Annotated[str, typer.Argument(help="What the model would be asked.")],
    patch: Annotated[str | None, typer.Option(help="A kept patch of a memory, in the place of the ledger's records.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag of the query; may be given again.", show_default=False)] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw here, as .html or .svg, how often a record did concern a query, where the chance said so.")
    ] = None,
    encoder: Encoder = None,
    postgres: Postgres = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Which records are near a query, how sure the scope is of each, the thresholds, and who answers."""
    from errata import report
    from errata.memory.reader import asked_in
    from errata.memory.route import Router
    from errata.types import LedgerError

    report.check_picture(picture)
    out, asked = Out(json=json), asked_in(query)
    with opened(at) as ledger:
        host = bound_host(ledger, device, out)
        with speaking(ledger, host, out, patch, None, patch is None, tag or (), postgres, encoder):
            router = next((s for s in reversed(host.speakers) if isinstance(s, Router)), None)
            if router is None:
                raise LedgerError(f"Nothing in {at} is looked up: the memory is empty. Put a record in with 'errata memory add'.")
            (found,) = router.found([asked])
            (turn,) = router.decide([asked])
    if picture is not None:
        _drawn(router, picture)
    route = "the memory" if turn.examples else "the model itself"
    limits = _limits(router)
    out.emit(
        {"asked": asked, "route": route, "answers": [str(e) for e in turn.examples], "thresholds": limits}
        | {"records": [_plain(f) for f in found]},
        f"What is asked: {asked}",
        table("score", "chance", "ruling", "record", rows=[_row(f) for f in found]),
        f"{', '.join(f'{name} {number(value)}' for name, value in limits.items()) or 'In where the reader finds the answer in the notes'}.",
        f"Who answers: {route}{', with ' + ' and '.join(str(e) for e in turn.examples) if turn.examples else ''}.",
    )


def _drawn(router: "Router", path: Path) -> None:
    from errata import report
    from errata.types import InvalidExample

    scope = router.scope
    if scope is None:
        raise InvalidExample("No scope speaks here, so there are no chances to draw. Prepare serac or rp.")
    note = f"{sum(n for _, n, _ in scope.held):,} pairs of a query and a record near it, from lessons that were held back."
    chart = report.reliability_chart(scope.held, fire=scope.fire, leave=scope.leave)
    report.write_picture(chart, "Chances against what was so", note, path)


def _limits(router: "Router") -> dict[str, float]:
    if router.scope is not None:
        return {"looked at from a cosine of": router.scope.near, "in from a chance of": router.scope.fire, "out up to": router.scope.leave}
    if router.op.gate == "reader":
        return {}
    bound = router.op.bound
    return {"in below a distance of": bound} if bound >= 0 else {"in, as the same words, above a cosine of": -bound}


def _plain(found: "Found") -> dict[str, Any]:
    return {"score": found.score, "chance": found.chance, "ruling": found.ruling, "question": found.question} | found.example.as_dict()


def _row(found: "Found") -> tuple[object, ...]:
    return number(found.score), number(found.chance), Text(found.ruling, style=ROUTES[found.ruling]), str(found.example)


@app.command()
def compact(
    method: Annotated[str, typer.Option(help="What makes the patch; see 'errata methods'.")] = "finetune",
    before: Annotated[str | None, typer.Option(help="Only records that came before this time, as in 2026-11-22.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Budget of the patch. \\[default: the ledger's]", show_default=False)] = None,
    reference: Reference = None,
    seed: int = 0,
    set_: Settings = None,
    undo: Annotated[bool, typer.Option("--undo", help="Bring the records of the last compaction back, and take its examples out.")] = False,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Move settled records of the memory into weights, inside the budget; what the patch does not answer right stays in memory."""
    from dataclasses import replace

    from errata import compact as compaction
    from errata import methods, text

    out = Out(json=json)
    if undo:
        with opened(at) as ledger:
            patch, back = compaction.undo(ledger)
        told = f"{len(back)} record(s) are in the memory again; the patch {short(patch)} is kept, and no longer current."
        out.emit({"undone": patch, "back": list(back)}, told)
        return
    made = methods.make(method, **settings_of(method, set_ or ()))
    if reference is not None:
        text.read(reference)  # a bad file is reported before the model is loaded
    with opened(at) as ledger:
        host = bound_host(ledger, device, out)
        done = compaction.compact(
            ledger,
            host,
            made,
            budget=ledger.budget if epsilon is None else replace(ledger.budget, epsilon=epsilon),
            before=before,
            note=out.note,
            reference=reference,
            seed=seed,
            state=ledger.latest_state(method),
            progress=out.progress,
        )
    data, shown = described(done.patch, done.verdict)
    rows = [(short(r.id), str(r.example), why) for r, why in done.left]
    out.emit(
        data | {"moved": [r.id for r in done.moved], "left": [_left(r, why) for r, why in done.left], "back": [r.id for r in done.back]},
        shown,
        f"{len(done.moved)} record(s) left the memory, {len(done.left)} stay there.",
        *([f"{len(done.back)} that had left it before are there again: this patch does not answer them."] if done.back else []),
        *([table("id", "record", "why it stays", rows=rows)] if rows else []),
    )


def _left(record: "Record", why: str) -> dict[str, str]:
    return {"id": record.id, "record": str(record.example), "why": why}
