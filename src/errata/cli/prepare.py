"""prepare: what a method learns once for a model, before it edits: from training cases to a state in the ledger."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli.edge import LEDGER, Address, Device, Engine, Json, LedgerAt, Out, Reference, Workers, app, bound_host, load_host, opened
from errata.cli.edits import Settings, settings_of
from errata.cli.lab import lab_cases
from errata.cli.shown import short

if TYPE_CHECKING:
    from errata.hosts import Host
    from errata.types import Case, State


@app.command()
def prepare(
    method: Annotated[str, typer.Argument(help="See 'errata methods'.")],
    name: Annotated[str | None, typer.Option("--host", help="\\[default: the ledger's model]", show_default=False)] = None,
    cases: Annotated[
        str | None,
        typer.Option(help="Training cases as JSONL, or 'lab' for its train split. \\[default: lab, for a lab model]", show_default=False),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many of the lab's cases.")] = 1200,
    reference: Reference = None,
    seed: int = 0,
    set_: Settings = None,
    afresh: Annotated[bool, typer.Option("--afresh", help="Do not go on with what an earlier call had begun.")] = False,
    engine: Engine = "local",
    workers: Workers = 2,
    address: Address = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Let a method learn about the ledger's model, and keep what it learnt; 'errata build' finds it there.

    After a kill the same command goes on where it was. The cases that it learnt from cannot judge its patches.
    """
    from errata import engine as engines
    from errata import methods, text
    from errata.types import InvalidExample, Method, Run, WrongBase

    out, made = Out(json=json), methods.make(method, **settings_of(method, set_ or ()))
    if type(made).prepare is Method.prepare:
        raise InvalidExample(f"{method} has nothing to prepare: build with it at once.")
    engines.check(engine)
    if reference is not None:
        text.read(reference)  # a bad file is reported before the model is loaded
    with opened(at) as ledger:
        begun = None if afresh else ledger.aside(method)
        host = bound_host(ledger, device, out) if name is None else load_host(name, device, out)
        if host.id != ledger.host:
            raise WrongBase(f"The ledger {ledger.path} is about {ledger.model} ({ledger.host}), {host.name} is {host.id}. Name its model.")
        learning = training_cases(host, cases, n, out) if made.reads_cases or cases is not None else ()
        if begun is not None:
            out.note(f"Going on behind step {begun.config['step']}; --afresh would begin again.")

        def keep(state: "State") -> None:
            ledger.put_aside(state)
            told = state.config
            if not json:
                best, dropped = told["best_loss"], told["dropped"]
                out.note(
                    f"Step {told['step']}: the best loss on held-back cases is {best and round(best, 4)}, of step {told['best_step']}."
                    + (f" Steps dropped so far: {dropped}." if dropped else "")
                )

        with out.busy("Reading the text that holds still"):
            hold = text.standing(host, reference, seed)[0]
        with engines.chosen(engine, workers, address) as spread:
            run = Run(hold=hold, keep=keep, seed=seed, state=begun, progress=out.progress, spread=spread)
            state = made.prepare(host, learning, run)
        assert state is not None, "a method that prepares returns what it prepared"
        ledger.put_state(state)
        ledger.drop_aside(method)
    if dropped := state.config.get("dropped"):
        out.note(f"{dropped} of {state.config['step']} steps dropped: a gradient was not finite.")
    size = sum(t.numel() * t.element_size() for t in state.tensors.values())
    told = {"state": state.id, "method": method, "cases": len(state.trained_on), "bytes": size}
    told |= {key: state.config[key] for key in ("step", "best_step", "best_loss", "dropped") if key in state.config}
    learnt = f"{method} has learnt from {len(state.trained_on)} cases: state {short(state.id)}, {size / 1e6:.1f} MB."
    out.emit(told, learnt, f"Next: errata build --method {method}")


def training_cases(host: "Host", given: str | None, n: int, out: Out) -> Sequence["Case"]:
    """What is to be learnt from, without what this model cannot read: that is said, line by line. Raises InvalidExample."""
    from errata import evaluate, hosts
    from errata.lab import corpus
    from errata.types import InvalidExample

    if given is None and not host.name.startswith("lab/"):
        raise InvalidExample(f"There are no training cases for {host.name} here. Name a file of them with --cases.")
    if given in (None, "lab"):
        return lab_cases("train", n, form=corpus.FORMS[host.kind])

    def fits(case: "Case") -> None:
        for answer in (case.example.target, case.example.contrast):
            hosts.encode(host, case.example.prompt, answer or case.example.target)

    sound, wrong = evaluate.read_sound_cases(Path(given or ""), fits)
    for reason in wrong[:20]:
        out.note(f"Left out: {reason}")
    if len(wrong) > 20:
        out.note(f"Left out: {len(wrong) - 20} more.")
    return sound
