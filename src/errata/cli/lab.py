"""lab card, lab train, lab cases; methods; demo: the embedded world, and what there is to choose from."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from errata.cli.edge import Device, Json, Out, app, load_host
from errata.cli.shown import percent, table

lab = typer.Typer(no_args_is_help=True, help="The embedded world: its facts, its small models, its cases.")
app.add_typer(lab, name="lab")


@lab.command()
def card(
    host: Annotated[str, typer.Option(help="A model of the lab.")] = "lab/neox",
    prose: Annotated[Path | None, typer.Option(help="The JSONL file that it was trained on, for its loss on what was held out.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """What a lab model knows, measured."""
    from errata.lab.card import card as measure

    out = Out(json=json)
    told = measure(load_host(host, device, out), prose, progress=out.progress)
    facts = [(key, value) for key, value in told.items() if not isinstance(value, dict | list)]
    relations = [
        (*(r[k] for k in ("relation", "facts", "phrasings", "asked")), percent(r["accuracy"]), percent(r["wrong"]))
        for r in told["relations"]
    ]
    losses = [(name, f"{loss['nats per token']:.3f}", loss["tokens"]) for name, loss in told["loss"].items()]
    out.emit(
        told,
        table("", "", rows=facts),
        table("relation", "facts", "phrasings", "asked", "accuracy", "wrong ones", rows=relations),
        table("text", "nats per token", "tokens", rows=losses),
    )


@lab.command()
def train(
    name: Annotated[str, typer.Argument(help="neox, backpack, t5 or bert.")],
    prose: Annotated[Path, typer.Option(help="JSONL of real English, with a 'text' in each line.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    steps: Annotated[int | None, typer.Option(min=1, help="\\[default: those of the committed weights]", show_default=False)] = None,
) -> None:
    """Train a model of the lab anew; one JSON line for each fifty steps. Goes on where it was interrupted."""
    from errata.lab.train import train as run

    run(name, prose, out, steps)


@lab.command()
def cases(
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    n: Annotated[int, typer.Option("--n", min=1)] = 50,
    kind: Annotated[str, typer.Option(help="wrong, counterfactual or mixed.")] = "mixed",
    relation: Annotated[str | None, typer.Option(help="Only facts of this relation.")] = None,
    form: Annotated[str, typer.Option(help="statement, question (for models that answer) or claim (for those that judge).")] = "statement",
    seed: int = 0,
    json: Json = True,
) -> None:
    """Cases on the lab's world as JSONL: an example, and the text that judges it."""
    Out(json=True).emit([case.as_dict() for case in lab_cases(split, n, kind, relation, seed, form)])


def lab_cases(
    split: str, n: int, kind: str = "mixed", relation: str | None = None, seed: int = 0, form: str = "statement"
) -> tuple[Any, ...]:
    """`errata.lab.tasks.cases`, for names that a user typed. Raises UnknownName, BudgetError."""
    from typing import get_args

    from errata.lab import corpus, tasks, world
    from errata.types import UnknownName

    choices = (
        ("split", split, get_args(world.Split)),
        ("kind", kind, get_args(tasks.Kind)),
        ("relation", relation, world.RELATIONS),
        ("form", form, get_args(corpus.Form)),
    )
    for what, name, known in choices:
        if name is not None and name not in known:
            raise UnknownName.among(what, name, known)
    found: tuple[Any, ...] = tasks.cases(split, n, kind, seed, relation, form)  # type: ignore[arg-type]
    return found


@app.command()
def methods(json: Json = False) -> None:
    """The methods and their settings."""
    from errata.methods import METHODS, make, method_class

    told, shown = list[dict[str, Any]](), list[tuple[str, str, str]]()
    for name in sorted(METHODS):
        idea = (sys.modules[method_class(name).__module__].__doc__ or "").splitlines()[0].removeprefix(f"{name}: ")
        settings = make(name).config
        told.append({"method": name, "idea": idea, "settings": settings})
        shown.append((name, idea, "  ".join(f"{k}={v}" for k, v in settings.items())))
    Out(json=json).emit(told, table("method", "idea", "settings", rows=shown))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for patch and report.")] = Path("errata-demo"),
    method: Annotated[str, typer.Option(help="See 'errata methods'.")] = "finetune",
    epsilon: Annotated[list[float], typer.Option(help="A budget; give it several times.")] = [1e-3, 1e-4, 1e-5],  # noqa: B006
    n: Annotated[int, typer.Option("--n", min=1, help="How many examples.")] = 20,
    device: Device = None,
    json: Json = False,
) -> None:
    """The main job, shown: wrong answers in; a verified, reversible fix out."""
    from errata import demo as room

    shown = Out(json=json)
    told = room.run(out, method, epsilon, n, device, Console(stderr=json, highlight=False), shown.progress)
    if json:
        shown.emit(told)
