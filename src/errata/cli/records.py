"""log, show, retract, verify: what the ledger holds, and whether it still is what was put in."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from errata.cli.edge import LEDGER, Device, Json, LedgerAt, Out, PatchId, app, bound_host, chosen_patch, give_states, opened
from errata.cli.shown import about, described, fate, listed, overview, short, table

if TYPE_CHECKING:
    from errata.hosts import Host
    from errata.types import Patch


@app.command()
def log(at: LedgerAt = LEDGER, json: Json = False) -> None:
    """What happened, oldest first."""
    with opened(at) as ledger:
        known = {e.id: str(e) for e in ledger.active()}
        events = ledger.history()
    Out(json=json).emit(
        [{"at": e.at, "what": e.what, "id": e.id, "detail": e.detail} for e in events],
        table("at (UTC)", "what", "id", "", rows=[(e.at[:19], e.what, short(e.id), e.detail or known.get(e.id, "")) for e in events]),
    )


@app.command()
def show(
    id: Annotated[str | None, typer.Argument(help="First digits of an id. \\[default: the whole ledger]", show_default=False)] = None,
    at: LedgerAt = LEDGER,
    json: Json = False,
) -> None:
    """An example, or a patch with its verdict; without an id, what is in the ledger now."""
    from errata.types import UnknownName

    out = Out(json=json)
    with opened(at) as ledger:
        if id is None:
            out.emit(*overview(ledger))
            return
        found = ledger.examples(id)
        if len(found) > 1:
            raise UnknownName(f"'{id}' is the start of {len(found)} examples, {short(found[0].example.id)} among them. Write more of it.")
        if found:
            out.emit(*fate(found[0]))
        else:
            try:
                patch = ledger.patch(id)
            except UnknownName as e:
                raise UnknownName(f"No example's id begins with '{id}'. {e}") from e
            out.emit(*described(patch, ledger.verdict(patch.id)), listed(patch.examples))


@app.command()
def retract(id: Annotated[str, typer.Argument(help="Id of an active example.")], at: LedgerAt = LEDGER, json: Json = False) -> None:
    """Take an example back; patches that hold it are no longer handed out."""
    with opened(at) as ledger:
        whole = ledger.retract(id)
        left = len(ledger.active())
    Out(json=json).emit({"retracted": whole, "active": left}, f"Retracted {short(whole)}; {left} active. Next: errata build")


@app.command()
def verify(
    host: Annotated[bool, typer.Option("--host", help="Also load the model, put the patch on and take it off again.")] = False,
    collect: Annotated[bool, typer.Option("--collect", help="First remove stray files that a kill left behind.")] = False,
    patch: PatchId = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Derive every hash again from what is on the disk; exit status 1 if anything was lost or altered."""
    from errata.types import LedgerError

    out, shown = Out(json=json), list[RenderableType]()
    with opened(at) as ledger:
        removed = ledger.collect() if collect else []
        problems = ledger.verify()
        broken = [p for p in problems if not p.harmless]
        told = about(ledger) | {
            "problems": [{"kind": p.kind, "where": p.where, "sentence": p.sentence, "harmless": p.harmless} for p in problems],
            "removed": [str(path) for path in removed],
        }
        if problems:
            shown.append(table("kind", "problem", rows=[(p.kind, p.sentence) for p in problems]))
        if not broken:
            shown.append(f"{at} is sound: every hash was derived again.")
        if host and not broken:
            worn, model = chosen_patch(ledger, patch), bound_host(ledger, device, out)
            give_states(ledger, model, worn)
            told["round trip"] = trip = round_trip(model, worn)
            shown.append(table("weights", "id", rows=trip.items()))
    out.emit(told, *shown)
    if broken:
        raise LedgerError(f"{len(broken)} thing(s) in {at} were lost or altered; the first: {broken[0].sentence}")


def round_trip(host: "Host", patch: "Patch") -> dict[str, str]:
    """Hashes of the weights before, under and after the patch. Raises WrongBase if it left a trace."""
    from errata import apply, hosts
    from errata.types import WrongBase

    before = hosts.weights_id(host.model)
    with apply.applied(host, patch):
        under = hosts.weights_id(host.model)
    if (after := hosts.weights_id(host.model)) != before:
        raise WrongBase(f"Patch {patch.id} left a trace: the weights were {before} and are {after}.")
    return {"before": before, "under the patch": under, "after": after}
