"""eval canonical: the protocol of canonical examples, from the search to the tables."""

import json as json_module
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from errata.cli.edge import Device, Json, Out, Reference
from errata.cli.edits import evaluation
from errata.cli.shown import table

if TYPE_CHECKING:
    from errata.protocol import Column, Found

SUBJECTS = "+subjects"


@evaluation.command("canonical")
def canonical(
    to: Annotated[Path, typer.Option("--out", help="Folder of trials and runs; the same command again goes on in it.")] = Path("canonical"),
    host: Annotated[list[str], typer.Option(help="lab/neox, a Hugging Face folder, or a hub id; give it several times.")] = ["lab/neox"],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="A column; memit+subjects tells the editor each subject.")] = ["finetune", "lora"],  # noqa: B006
    task: Annotated[list[str] | None, typer.Option(help="\\[default: all six]", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the published records. \\[default: the lab's]", show_default=False)] = None,
    variant: Annotated[str, typer.Option(help="Of the published records: clean or published.")] = "clean",
    halve: Annotated[bool, typer.Option("--halve", help="The folder has validation records only: half of them serve as test.")] = False,
    epsilon: Annotated[list[float], typer.Option(help="A ball; give it several times.")] = [1e-3, 1e-4, 1e-5],  # noqa: B006
    trials: Annotated[int, typer.Option(min=1, help="Settings tried for each task and column.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Edits of the test examples for each setting that was chosen.")] = 3,
    seed: int = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples and records of each task at most.")] = None,
    mode: Annotated[list[str], typer.Option(help="fixed, faithful; give it twice for both.")] = ["fixed"],  # noqa: B006
    without: Annotated[list[str] | None, typer.Option(help="A switch of the faithful mode that is to be off.")] = None,
    reference: Reference = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """The protocol of canonical examples: settings searched on validation, chosen for each ball, tested over seeds.

    Told are the change of success in percentage points and that of the hard negatives in nats.
    """
    from errata import protocol, text
    from errata.tasks.published import TASKS
    from errata.types import UnknownName

    out = Out(json=json)
    if reference is not None:
        text.read(reference)  # a bad file is reported before a model is loaded
    for name in without or ():
        if name not in protocol.SWITCHES:
            raise UnknownName.among("switch", name, protocol.SWITCHES)
    columns = [
        protocol.Column(host=h, method=m.removesuffix(SUBJECTS), subjects=m.endswith(SUBJECTS))
        for h in dict.fromkeys(str(Path(h).resolve()) if Path(h).is_dir() else h for h in host)
        for m in dict.fromkeys(method)
    ]
    told: list[dict[str, Any]] = []
    by_mode: dict[str, tuple[protocol.Found, ...]] = {}
    for name in dict.fromkeys(mode):
        plan = protocol.Plan(
            columns=tuple(columns),
            tasks=tuple(dict.fromkeys(task or TASKS)),
            epsilons=tuple(dict.fromkeys(epsilon)),
            trials=trials,
            seeds=seeds,
            seed=seed,
            mode=name,  # type: ignore[arg-type]
            data=None if data is None else str(data.resolve()),
            variant=variant,
            halve=halve,
            reference=None if reference is None else str(reference.resolve()),
            limit=limit,
            switches=tuple(s for s in protocol.SWITCHES if s not in (without or ())),
            device=device,
        )
        found = by_mode[name] = protocol.run(plan, to, jobs, out.progress)
        told.append({"mode": name, "order": protocol.order(found), "cells": rows(found)})
    (to / "results.json").write_text(json_module.dumps(told, indent=1))
    orders = [f"{name}: {protocol.order(found)}" if len(by_mode) > 1 else protocol.order(found) for name, found in by_mode.items()]
    out.emit(told, *tables(by_mode), *orders, f"Trials, runs and results are in {to}.")


def rows(found: Iterable["Found"]) -> list[dict[str, Any]]:
    """Every cell, with what was chosen for it."""
    from errata import protocol

    return [
        asdict(protocol.cell(f))
        | {"interval": protocol.estimate([f])[1:], "inside": sum(ball["inside"] for ball in f.tests)}
        | {"scales": [ball.get("scale", ball.get("epoch")) for ball in f.tests]}
        | {"settings": f.trial["settings"], "validation": protocol.ball_of(f.trial, f.epsilon)["success"]}
        for f in found
    ]


def tables(by_mode: Mapping[str, Sequence["Found"]]) -> list[RenderableType]:
    """One table for each ball: tasks by columns, those of the modes side by side; the change of success with its interval, below it that of
    the hard negatives."""
    from errata import protocol

    at = {(mode, f.column, f.task, f.epsilon): f for mode, found in by_mode.items() for f in found}
    columns = [(mode, column) for column in dict.fromkeys(column for _, column, *_ in at) for mode in by_mode]
    tasks, epsilons = list(dict.fromkeys(task for *_, task, _ in at)), list(dict.fromkeys(epsilon for *_, epsilon in at))
    several = len({column.host for _, column in columns}) > 1

    def row(epsilon: float, task: str) -> list[str]:
        own = [at[*column, task, epsilon] for column in columns]
        before = [protocol.cell(f).before for f in own]
        shared = [b for b in before if b is not None]
        return [task, f"{100 * sum(shared) / len(shared):.1f}" if shared else "none", *(_cell([f]) for f in own)]

    def heading(mode: str, column: "Column") -> str:
        told = [column.label, *([column.host.split("/")[-1]] if several else []), *([mode] if len(by_mode) > 1 else [])]
        return "\n".join(told)

    return [
        table(
            "task",
            "before",
            *(heading(*column) for column in columns),
            title=f"{' and '.join(by_mode)}, ball of {epsilon:.0e}: success in points [95 %], hard negatives in nats",
            rows=[
                *(row(epsilon, task) for task in tasks),
                ["mean", "", *(_cell([at[*column, task, epsilon] for task in tasks]) for column in columns)],
            ],
        )
        for epsilon in epsilons
    ]


def _cell(found: Sequence["Found"]) -> str:
    from errata import protocol

    value, low, high = protocol.estimate(found)
    hard = [h for f in found if (h := protocol.cell(f).hard_change) is not None]
    interval = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
    near = f"\nhard {sum(hard) / len(hard):+.3f}" if hard else ""
    return ("none" if value is None else f"{value:+.1f}") + interval + near
