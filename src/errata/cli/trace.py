"""trace: in which layers a model recalls its answers, as `memit` and `rome` find out before they choose theirs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli.edge import LEDGER, Device, Json, LedgerAt, Out, app, bound_host, load_host, opened
from errata.cli.shown import percent, table

if TYPE_CHECKING:
    from errata.hosts import Host
    from errata.methods._trace import Prompt


@app.command()
def trace(
    texts: Annotated[list[str] | None, typer.Argument(help="Prompts; 'prompt| answer' will do, the answer is not used.")] = None,
    subject: Annotated[str | None, typer.Option(help="What the one prompt is about, as it stands in it.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL with prompt, target, subject, ... in each line.")] = None,
    name: Annotated[str | None, typer.Option("--host", help="A model. \\[default: the ledger's]", show_default=False)] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many cases of the lab, where no prompts are given.")] = 16,
    prefix: Annotated[bool, typer.Option("--prefix", help="Leave subjects out: whole prompts are corrupted.")] = False,
    width: Annotated[
        int, typer.Option(min=0, help="Layers restored together. \\[default: as many as memit edits]", show_default=False)
    ] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Draws of the noise for each prompt.")] = 10,
    seed: int = 0,
    picture: Annotated[Path | None, typer.Option("--out", help="Write the picture here, as .html or .svg.")] = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Causal tracing: how much of the answer each window of layers gives back when the subject is corrupted, and what memit would take."""
    from errata import report
    from errata.methods._trace import trace as traced

    out, given = Out(json=json), asked(texts or (), subject, file)
    report.check_picture(picture)
    if name is not None:
        host = load_host(name, device, out)
    else:
        with opened(at) as ledger:
            host = bound_host(ledger, device, out)
    prompts = [(prompt, None if prefix else about) for prompt, about in given or drawn(host, n, seed)]
    found = traced(host, prompts, width, samples, seed, out.progress)

    count, clean, corrupted = len(prompts), float(found.clean_E.mean()), float(found.corrupted_E.mean())
    effects = [_effect(found.effects_EW[:, w].tolist(), w, found.width, w == found.chosen[0]) for w in range(found.effects_EW.shape[1])]
    layers = effects[found.chosen[0]].layers
    says = f"{'memit' if not width else 'With this width memit'} would take {'layer' if found.width == 1 else 'layers'} {layers}."
    told: dict[str, Any] = {
        "host": host.name,
        "prompts": count,
        "subjects": sum(about is not None for _, about in prompts),
        "width": found.width,
        "clean": clean,
        "corrupted": corrupted,
        "windows": [
            {"layers": list(range(w, w + found.width)), "effect": e.value, "low": e.low, "high": e.high} for w, e in enumerate(effects)
        ],
        "chosen": found.chosen,
    }
    shown = table(
        "layers",
        "mean indirect effect",
        "95 %",
        "",
        title=f"{count} prompt(s) on {host.name}: the answer has p = {percent(clean)}, {percent(corrupted)} when corrupted",
        rows=[
            (e.layers, f"{e.value:+.4f}", "" if e.low is None or e.high is None else f"{e.low:+.4f} .. {e.high:+.4f}", "chosen" * e.chosen)
            for e in effects
        ],
    )
    written = []
    if picture is not None:
        what = (
            "their subjects" if told["subjects"] == count else "the whole prompts" if not told["subjects"] else "subjects or whole prompts"
        )
        note = (
            f"{host.name}, {count} prompt{'s' if count > 1 else ''}: with noise on {what} the model's own answer falls from "
            f"{report.rate(clean)} to {report.rate(corrupted)}. Each bar is how much of its probability comes back when the MLP outputs of "
            f"those layers are the clean ones again at the last corrupted token. {says}"
        )
        report.write_picture(report.effect_bars(effects, clean, corrupted), f"Causal tracing of {host.name}", note, picture)
        told["picture"] = str(picture)
        written = [f"The picture is {picture}."]
    out.emit(told, shown, says, *written)


def _effect(effects: Sequence[float], start: int, width: int, chosen: bool) -> Any:
    """One window as `report.Effect`: the mean over prompts and, from two prompts on, its 95 % interval."""
    from errata.report import Effect

    mean, n = sum(effects) / len(effects), len(effects)
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in effects) / (n - 1) / n) if n > 1 else None
    layers = str(start) if width == 1 else f"{start}–{start + width - 1}"
    return Effect(layers, mean, None if half is None else mean - half, None if half is None else mean + half, chosen)


def asked(texts: Sequence[str], subject: str | None, file: Path | None) -> list["Prompt"]:
    """The prompts that a user gave, with their subjects. Raises InvalidExample."""
    from errata.evaluate import read_cases
    from errata.types import InvalidExample

    prompts: list[Prompt] = [(text.rpartition("|")[0] or text, subject) for text in texts]
    if subject is not None and (len(prompts) != 1 or subject not in prompts[0][0] or not subject.strip()):
        raise InvalidExample(f"--subject goes with one prompt in which it stands; '{subject}' was given with {len(prompts)} prompt(s).")
    if file is not None:
        prompts += [(case.example.prompt, case.example.subject) for case in read_cases(file)]
    return prompts


def drawn(host: "Host", n: int, seed: int) -> list["Prompt"]:
    """Prompts on facts of the lab's validation split. Raises InvalidExample for a model that does not come from there."""
    from errata.lab import tasks
    from errata.types import InvalidExample

    if not host.name.startswith("lab/"):
        raise InvalidExample(
            f"There is nothing to trace. Give prompts or a --file; only the lab's models have cases of their own, not {host.name}."
        )
    return [(tasks.example(fact).prompt, fact.subject) for fact in tasks.choose("validation", n, "mixed", seed)]
