"""eval alpha: what becomes of a patch between the base and itself, and beyond."""

from pathlib import Path
from typing import Annotated

import typer

from errata.cli.edge import LEDGER, Device, Json, LedgerAt, Out, PatchId, Reference, bound_host, chosen_patch, give_states, opened
from errata.cli.edits import asked_cases, evaluation, judging_text
from errata.cli.shown import number, short, table


@evaluation.command("alpha")
def alpha(
    cases: Annotated[Path | None, typer.Option(help="Cases as JSONL, or 'prompt| answer' in each line.")] = None,
    lab: Annotated[str | None, typer.Option(help="Cases of the lab instead: train, validation or test.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many of the lab's cases.")] = 50,
    alphas: Annotated[list[float], typer.Option("--alpha", help="A point of the curve; give it several times.")] = [  # noqa: B006
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
        1.25,
    ],
    patch: PatchId = None,
    reference: Reference = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the curve there: .html or .svg.")] = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Success, neighbours and the loss on reference text along base + alpha * change: between the model as it was (0) and the patch (1)."""
    from errata import evaluate, report

    report.check_picture(picture)
    if picture is not None and len(set(alphas)) < 2:  # before minutes are spent on what cannot be drawn
        raise typer.BadParameter("a picture needs two values of --alpha or more")
    out = Out(json=json)
    asked_cases(cases, lab, n)  # what is wrong with them is told before the model is loaded
    with opened(at) as ledger:
        worn = chosen_patch(ledger, patch)
        epsilon = ledger.verdict(worn.id).budget.epsilon
        host = bound_host(ledger, device, out)
        give_states(ledger, host, worn)
    judged = asked_cases(cases, lab, n, host)
    before = evaluate.baseline(host, judged, judging_text(host, judged, reference, out), progress=out.progress)
    base = evaluate.evaluate(host, None, before)
    curve = evaluate.along(host, worn, before, alphas, out.progress)
    loss = evaluate.aggregate(base, "loss.reference").value
    measures = ("edit", "ood", "neighbours")
    rows = []
    for a, scores in curve:
        after = evaluate.aggregate(scores, "loss.reference").value
        increase = None if not loss or after is None else after / loss - 1
        rows.append((a, *(evaluate.aggregate(scores, measure).value for measure in measures), increase))
    told = [dict(zip(("alpha", *measures, "increase"), row, strict=True)) for row in rows]
    drawn = []
    if picture is not None:
        note = (
            f"{worn.method} patch {short(worn.id)} on {host.name}, {len(judged)} cases. Solid: unseen text right, with 95 % intervals. "
            f"Dashed: neighbours kept. Hollow: the mean increase of the loss on reference text is over {epsilon:g}."
        )
        report.write_picture(report.alpha_chart(curve, base, epsilon), "Success against alpha", note, picture)
        drawn.append(f"The picture is {picture}.")
    shown = [(f"{a:g}", *(number(x) for x in more)) for a, *more in rows]
    out.emit({"patch": worn.id, "cases": len(judged), "curve": told}, table("alpha", *measures, "loss increase", rows=shown), *drawn)
