"""init, add, build, ask, senses, eval, export: the main road, from examples to a patch and to what it does."""

import json as json_module
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final, get_args, get_origin, get_type_hints

import typer
from rich.text import Text
from typer.core import TyperGroup

from errata.cli.edge import (
    LEDGER,
    Address,
    Device,
    Encoder,
    Engine,
    Json,
    LedgerAt,
    Out,
    PatchId,
    Postgres,
    Reference,
    Workers,
    app,
    bound_host,
    chosen_patch,
    give_states,
    load_host,
    opened,
    speaking,
)
from errata.cli.shown import about, described, listed, number, plain, short, table

if TYPE_CHECKING:
    from errata.hosts import Host
    from errata.ledger import Ledger
    from errata.types import Case, Example, State

AUTO = "auto"
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method; see 'errata methods'.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(envvar="ERRATA_LEDGER", help="Folder of the new ledger.")] = LEDGER,
    host: Annotated[str, typer.Option(help="lab/neox, a Hugging Face folder, or a hub id.")] = "lab/neox",
    epsilon: Annotated[float, typer.Option(help="Largest relative increase of the loss on reference text.")] = 1e-3,
    neighbours: Annotated[float | None, typer.Option(help="Least share of neighbouring answers that must stay, e.g. 0.98.")] = None,
    norm: Annotated[float | None, typer.Option(help="Largest norm of the change, relative to the weights.")] = None,
    fixed: Annotated[float, typer.Option(help="Least share of its own examples that a patch must fix.")] = 0.5,
    device: Device = None,
    json: Json = False,
) -> None:
    """Make a ledger for one model."""
    from errata.ledger import Ledger
    from errata.types import Budget

    out, budget = Out(json=json), Budget(epsilon=epsilon, neighbours=neighbours, norm=norm, fixed=fixed)
    loaded = load_host(str(Path(host).resolve()) if Path(host).is_dir() else host, device, out)
    with Ledger.create(folder, loaded.id, loaded.name, budget) as ledger:
        told = f"{folder} is a ledger for {ledger.model} with the weights {short(ledger.host)}."
        out.emit(about(ledger), told, 'Next: errata add "prompt| answer"')


@app.command()
def add(
    texts: Annotated[list[str] | None, typer.Argument(help="'The capital of Mauritius is| Port Louis': the bar ends the prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text before the answer; goes with --target.")] = None,
    target: Annotated[str | None, typer.Option(help="The answer, with the space in front of it.")] = None,
    contrast: Annotated[str | None, typer.Option(help="The other answer, for the goals prefer and balance.")] = None,
    goal: Annotated[str | None, typer.Option(help="raise, lower, prefer or balance. \\[default: raise; prefer with --contrast]")] = None,
    subject: Annotated[str | None, typer.Option(help="What the prompt is about, as it stands in it.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL with prompt, target, ... in each line.")] = None,
    supersede: Annotated[str | None, typer.Option(help="Id of the active example that this one replaces.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Load the model first: does it fit, is it the answer already?")] = False,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Add examples: what the model should say."""
    from errata.build import parse
    from errata.evaluate import read_cases
    from errata.types import GOALS, Example, InvalidExample, UnknownName

    out, examples = Out(json=json), [parse(text) for text in texts or ()]
    if goal is not None and goal not in GOALS:
        raise UnknownName.among("goal", goal, GOALS)
    if prompt is not None or target is not None:
        wanted: Any = goal or ("prefer" if contrast is not None else "raise")
        examples.append(Example(prompt=prompt or "", target=target or "", contrast=contrast, goal=wanted, subject=subject))
    elif not (contrast is goal is subject is None):
        raise typer.BadParameter("--contrast, --goal and --subject go with --prompt and --target")
    if file is not None:
        examples += [case.example for case in read_cases(file)]
    if not examples or (supersede is not None and len(examples) != 1):
        raise InvalidExample(f"{len(examples)} examples were given. Write 'prompt| answer' (one with --supersede), or name a --file.")
    with opened(at) as ledger:
        if check:
            note_what_is_so(bound_host(ledger, device, out), examples, out)
        before = {e.id for e in ledger.active()}
        if supersede is not None:
            ledger.supersede(supersede, examples[0])
        else:
            ledger.add(*examples, source=str(file or ""))
        active = len(ledger.active())
    for example in examples:
        if example.id in before:
            out.note(f"'{example}' is active already.")
        # a whole sentence is answered or judged, not gone on with
        if not example.prompt[-1].isspace() and example.prompt[-1] not in ".?!" and example.target[0].isalnum():
            out.note(f"There is no space between prompt and answer in '{example}'. Write '{example.prompt}| {example.target}' to have one.")
    out.emit({"added": [plain(e) for e in examples], "active": active}, listed(examples))


def note_what_is_so(host: "Host", examples: Sequence["Example"], out: Out) -> None:
    """A note for each example that needs no fixing. Raises InvalidExample for one that does not fit the model's context."""
    from errata import hosts

    for example in examples:
        hosts.encode(host, example.prompt, example.target)
    for example, so in zip(examples, hosts.fixes(host, examples), strict=True):
        if so:
            out.note(f"{host.name} already does what '{example}' asks ({example.goal}).")


@app.command()
def build(
    method: Annotated[str, typer.Option(help="See 'errata methods'; auto: try several, and say which is best here and why.")] = "finetune",
    epsilon: Annotated[float | None, typer.Option(help="Budget of this build. \\[default: the ledger's]", show_default=False)] = None,
    reference: Reference = None,
    neighbours: Annotated[Path | None, typer.Option(help="Cases (JSONL) whose neighbours must keep their answers.")] = None,
    seed: int = 0,
    set_: Settings = None,
    plan: Annotated[bool, typer.Option("--plan", help="Estimate time and memory, and stop.")] = False,
    afresh: Annotated[bool, typer.Option("--afresh", help="Make sums anew: the same bits, whatever was built before.")] = False,
    engine: Engine = "local",
    workers: Workers = 2,
    address: Address = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compile the active examples into one patch inside the budget, judge it, and keep it; exit status 1 if it is refused."""
    from errata import build as road
    from errata import engine as engines
    from errata import evaluate, gate, methods, text
    from errata.types import InvalidExample

    out, auto = Out(json=json), method == AUTO
    if auto and (set_ or plan or engine != "local"):
        raise InvalidExample("'auto' tries several methods as they are, here: it takes no --set, --plan or --engine.")
    made = methods.make("lora" if auto else method, **({} if auto else settings_of(method, set_ or ())))
    engines.check(engine)
    if reference is not None:
        text.read(reference)  # a bad file is reported before the model is loaded
    near = [n for case in evaluate.read_cases(neighbours) for n in case.neighbours] if neighbours is not None else []
    with opened(at) as ledger:
        budget = ledger.budget if epsilon is None else replace(ledger.budget, epsilon=epsilon)
        examples = ledger.active()
        host = bound_host(ledger, device, out)
        if plan:
            from errata.cli.plan import estimate

            with out.busy("Measuring"):
                told, shown = estimate(host, examples, made, reference)
            out.emit(told, shown)
            return
        with out.busy(f"Looking at {len(examples)} example(s)"):
            road.check(host, examples)
            note_what_is_so(host, examples, out)
        if auto:
            _build_best(ledger, host, examples, out, neighbours, budget=budget, reference=reference, watched=near, seed=seed)
            return
        if engine != "local" and not made.spreads:
            out.note(f"{method} has nothing to share among workers: it is built here.")
            engine = "local"
        with engines.chosen(engine, workers, address) as spread:
            patch, verdict = road.edit(
                host,
                examples,
                made,
                budget=budget,
                reference=reference,
                watched=near,
                seed=seed,
                state=ledger.latest_state(method),
                sums=None if afresh else kept_sums(ledger, method, out),
                keep=lambda sums: ledger.put_aside(sums, f"{method}-sums"),
                progress=out.progress,
                spread=spread,
            )
        ledger.put_patch(patch, verdict)
    out.emit(*described(patch, verdict))
    gate.require(verdict)


def _build_best(ledger: "Ledger", host: "Host", examples: Sequence["Example"], out: Out, cases: Path | None, **how: Any) -> None:
    """Try what there is, show all of it, and keep the best; of `cases` the other phrasings judge."""
    from errata import choose, evaluate, gate
    from errata.types import BudgetError

    known = evaluate.read_cases(cases) if cases is not None else ()
    found = choose.tried(
        host,
        examples,
        ledger.latest_state,
        cases=known,
        busy=lambda name: out.note(f"Trying {name}."),
        progress=out.progress,
        **how,
    )
    best, why = found[0], choose.reason(found)
    if best.patch is not None and best.verdict is not None:
        ledger.put_patch(best.patch, best.verdict)
    rows, data = [], []
    for t in found:
        v, other = t.verdict, f"{t.right} of {t.asked}" if t.asked else "none"
        cost = "" if v is None else f"{v.increase:+.1e} (95 % < {v.upper:+.1e})"
        ruled = "passed" if t.passed else "refused" if v is not None else "not made"
        fixed, size = ("", "") if v is None or t.patch is None else (f"{v.fixed} of {v.wanted}", f"{t.patch.nbytes / 1e6:.2f} MB")
        rows.append((t.method, ruled, fixed, other, cost, size, f"{t.seconds:.1f} s", t.why))
        told = {"method": t.method, "ruled": ruled, "right": t.right, "asked": t.asked, "seconds": t.seconds, "why": t.why}
        data.append(told | {"patch": t.patch and t.patch.id, "verdict": v and v.as_dict()})
    columns = ("method", "", "examples fixed", "other phrasings", "reference loss", "size", "time", "why not")
    out.emit({"best": best.method if best.passed else None, "why": why, "tried": data}, table(*columns, rows=rows), why)
    if best.verdict is None:
        raise BudgetError(why)
    gate.require(best.verdict)


def kept_sums(ledger: "Ledger", method: str, out: Out) -> "State | None":
    """Those of the last build, so that this one reads only the examples that came or went. Damaged ones are made again, with a note."""
    from errata.types import LedgerError

    try:
        return ledger.aside(f"{method}-sums")
    except LedgerError as e:
        out.note(f"{e} The sums are made again.")
        ledger.drop_aside(f"{method}-sums")
        return None


def settings_of(method: str, given: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as settings, each of the type that the method's field has. Raises UnknownName, InvalidExample."""
    from errata.methods import method_class
    from errata.types import InvalidExample, UnknownName

    kinds = get_type_hints(method_class(method))
    settings: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidExample(f"'{text}' is no setting. Write --set key=value.")
        if key not in kinds:
            raise UnknownName.among(f"setting of {method}", key, kinds)
        try:
            settings[key] = _typed(kinds[key], value)
        except ValueError as e:
            choices = get_args(kinds[key]) if get_origin(kinds[key]) is Literal else ()
            wanted = " or ".join(map(str, choices)) or getattr(kinds[key], "__name__", kinds[key])
            raise InvalidExample(f"The setting '{key}' of {method} is {wanted}, not '{value}'.") from e
    return settings


def _typed(kind: Any, value: str) -> Any:
    """`value` as text, one of some texts, a finite number, or what JSON says. Raises ValueError."""
    if kind is str or (get_origin(kind) is Literal and value in get_args(kind)):
        return value
    if get_origin(kind) is Literal:
        raise ValueError(value)
    read = kind(value) if kind in (int, float) else json_module.loads(value)
    if (isinstance(read, float) and not math.isfinite(read)) or (kind is bool and not isinstance(read, bool)):
        raise ValueError(value)
    return read


@app.command()
def ask(
    prompts: Annotated[list[str], typer.Argument(help="What the model is to go on with.")],
    patch: PatchId = None,
    patch_file: Annotated[Path | None, typer.Option(help="A patch from a file instead of the ledger.")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Let the records of the edit memory answer too.")] = True,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag of the questions; may be given again.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    encoder: Encoder = None,
    postgres: Postgres = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """What the model says before and after, side by side: under the patch, and with what the edit memory holds."""
    from errata import hosts
    from errata.types import LedgerError

    out = Out(json=json)
    with opened(at) as ledger:
        host = bound_host(ledger, device, out)
        before = hosts.greedy(host, prompts, max_new_tokens)
        for _ in range(5):
            moment = ledger.moment()
            with speaking(ledger, host, out, patch, patch_file, memory, tag or (), postgres, encoder) as worn:
                after = hosts.greedy(host, prompts, max_new_tokens)
            if not ledger.compacted(moment):  # else records had gone into weights between a look at the one and at the other
                break
        else:
            raise LedgerError(f"The ledger {at} was compacted again and again while it was asked. Try again.")
    said = list(zip(prompts, before, after, strict=True))
    rows = [(p, b.strip(), Text(a.strip(), style="" if a == b else "bold green")) for p, b, a in said]
    out.emit(
        [{"prompt": p, "before": b, "after": a, "patch": worn} for p, b, a in said],
        table("prompt", "before", f"after {short(worn)}" if worn else "after, from memory", rows=rows, even=True),
    )


@app.command()
def senses(
    word: Annotated[str, typer.Argument(help="As it stands inside a sentence; each of its tokens has senses of its own.")],
    name: Annotated[str | None, typer.Option("--host", help="A Backpack. \\[default: the ledger's model]", show_default=False)] = None,
    patch: PatchId = None,
    patch_file: Annotated[Path | None, typer.Option(help="Show the senses as this patch leaves them.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many tokens of each sense.")] = 8,
    picture: Annotated[Path | None, typer.Option(help="Draw it here: an .html or an .svg.")] = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """What each sense of a word promotes, in a Backpack: the tokens that follow more often where that sense counts."""
    from contextlib import nullcontext

    from errata import apply, artefact, hosts, report
    from errata.types import InvalidExample

    report.check_picture(picture)
    out, worn = Out(json=json), artefact.load_patch(patch_file) if patch_file is not None else None
    if name is not None and patch is None:
        host = load_host(name, device, out)
    else:
        with opened(at) as ledger:
            worn = ledger.patch(patch) if patch is not None else worn
            host = bound_host(ledger, device, out) if name is None else load_host(name, device, out)
    hosts.senses_of(host)
    ids = host.tokenizer(word if word[:1].isspace() else f" {word}", add_special_tokens=False)["input_ids"]
    if not word.strip() or not ids:
        raise InvalidExample("There is no word to show the senses of.")
    with apply.applied(host, worn) if worn is not None else nullcontext():
        found = [hosts.promotes(host, token, top) for token in ids]

    def text(token: int) -> str:
        return str(host.tokenizer.decode([token]))

    told = [
        {
            "token": text(token),
            "id": token,
            "senses": [
                {"sense": k, "promotes": [{"token": text(i), "id": i, "score": score} for i, score in row]} for k, row in enumerate(rows)
            ],
        }
        for token, rows in zip(ids, found, strict=True)
    ]
    shown = [
        table(
            "sense",
            "promotes",
            title=f"{text(token)!r}, token {token}",
            rows=[(k, ", ".join(f"{text(i)!r} {score:.2f}" for i, score in row)) for k, row in enumerate(rows)],
        )
        for token, rows in zip(ids, found, strict=True)
    ]
    drawn: list[str] = []
    if picture is not None:
        title = f"What the senses of “{word.strip()}” promote in {host.name}" + (f", under patch {short(worn.id)}" if worn else "")
        blocks = [(text(t), [[(text(i), score) for i, score in row] for row in rows]) for t, rows in zip(ids, found, strict=True)]
        note = "What each sense adds to the logits of the tokens that it promotes most, where its weight is 1."
        report.write_picture(report.senses_panels(title, blocks), title, note, picture)
        drawn.append(f"The picture is {picture}.")
    at_ = {"picture": str(picture)} if picture is not None else {}
    out.emit({"word": word, "host": host.name, "patch": worn.id if worn else None, "tokens": told} | at_, *shown, *drawn)


@final
class Judging(TyperGroup):
    """`eval` judges a patch; where a verb follows it, only that is done."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in self.commands:
            self.callback = None  # of this one parse: the next one has a group of its own
        return super().parse_args(ctx, args)


evaluation = typer.Typer(cls=Judging, invoke_without_command=True)
app.add_typer(evaluation, name="eval")


def asked_cases(cases: Path | None, lab: str | None, n: int, host: "Host | None" = None) -> Sequence["Case"]:
    """What a patch is to be judged on: one of the two, the lab's in the form that the host is told."""
    from errata.cli.lab import lab_cases
    from errata.evaluate import read_cases
    from errata.lab import corpus

    if (cases is None) == (lab is None):
        raise typer.BadParameter("name either --cases FILE or --lab test")
    return read_cases(cases) if cases is not None else lab_cases(lab or "", n, form=corpus.FORMS[host.kind if host else "causal"])


def judging_text(host: "Host", judged: Sequence["Case"], reference: Path | None, out: Out) -> Sequence[str]:
    """The reference text that judges, without what states the judged facts; none for a model that comes with none."""
    from errata import text

    with out.busy("Reading the reference text"):
        documents = text.standing(host, reference)[1] if reference is not None or host.name.startswith("lab/") else ()
        examples = [case.example for case in judged]
        return text.set_aside(documents, examples, text.answers_of(host, examples))[0]


@evaluation.callback()
def judge(
    cases: Annotated[Path | None, typer.Option(help="Cases as JSONL, or 'prompt| answer' in each line.")] = None,
    lab: Annotated[str | None, typer.Option(help="Cases of the lab instead: train, validation or test.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many of the lab's cases.")] = 50,
    patch: PatchId = None,
    reference: Reference = None,
    report: Annotated[Path | None, typer.Option(help="Write the page here, and its JSON beside it.")] = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Judge a patch on text that it was not made from, beside the model as it was."""
    from errata import evaluate
    from errata import report as page

    out = Out(json=json)
    asked_cases(cases, lab, n)  # what is wrong with them is told before the model is loaded
    with opened(at) as ledger:
        worn = chosen_patch(ledger, patch)
        verdict = ledger.verdict(worn.id)
        learnt = ledger.state(worn.config["state"]) if "state" in worn.config else None
        host = bound_host(ledger, device, out)
        give_states(ledger, host, worn)
    judged = asked_cases(cases, lab, n, host)
    before = evaluate.baseline(host, judged, judging_text(host, judged, reference, out), progress=out.progress)
    base, edited = evaluate.evaluate(host, None, before), evaluate.evaluate(host, worn, before, state=learnt, progress=out.progress)
    if report is not None:
        entry = page.Entry(
            label=worn.method, method=worn.method, scores=edited, verdict=verdict, config=dict(worn.config), moved=page.where(host, worn)
        )
        whole = page.Report(
            title=f"Patch {short(worn.id)} on {host.name}",
            host=host.name,
            host_id=host.id,
            entries=(entry,),
            examples=worn.examples,
            before=base,
            undo=("errata retract ID   # one example; 'errata show' lists them", "errata build"),
            settings={"cases": str(cases or f"lab {lab}, {n}"), "ledger": str(at)},
            versions=page.versions(),
        )
        report, _ = page.write(whole, report)
    was = {measure: value for measure, value, *_ in evaluate.summary(base)}
    rows = [(m, was.get(m), after, low, high, n) for m, after, low, high, n in evaluate.summary(edited)]
    keys = ("measure", "before", "after", "low", "high", "n")
    told = {"patch": worn.id, "cases": len(judged), "measures": [dict(zip(keys, row, strict=True)) for row in rows]}
    shown = [(m, number(b), number(a), "" if low is None else f"{number(low)} .. {number(high)}", n) for m, b, a, low, high, n in rows if n]
    written = [f"The report is {report}."] if report is not None else []
    out.emit(told, table("measure", "before", "after", "95 %", "of", rows=shown), *written)


@app.command()
def export(
    to: Annotated[Path, typer.Argument(metavar="PATH", help="A new folder; a new file for --as patch.")],
    form: Annotated[
        str, typer.Option("--as", help="model: merged Hugging Face folder. peft: adapter, for low-rank patches. patch: one file.")
    ] = "model",
    patch: PatchId = None,
    at: LedgerAt = LEDGER,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write the model with the patch in it, or the patch alone; it is read back and compared before success is said."""
    from errata import artefact
    from errata import export as room
    from errata.types import LedgerError, UnknownName

    out = Out(json=json)
    if form not in (*room.FORMS, "patch"):
        raise UnknownName.among("form of export", form, (*room.FORMS, "patch"))
    if to.is_file():
        raise LedgerError(f"{to} is there already. Name another path.")
    with opened(at) as ledger:
        worn = chosen_patch(ledger, patch)
        told: dict[str, Any] = {"path": str(to), "as": form, "patch": worn.id}
        if form == "patch":
            told["bytes"] = artefact.save(worn, to).stat().st_size
            read_back = f"its id is {artefact.load_patch(to).id}"
        else:
            host = bound_host(ledger, device, out)
            with out.busy("Writing, reading back and comparing"):
                done = room.export(host, worn, to, form)
            told |= {"bytes": done.nbytes, "difference": done.difference}
            read_back = f"its logits are within {done.difference:.1e} of the patched model's"
    out.emit(told, f"{to}: {told['bytes'] / 1e6:.1f} MB, read back; {read_back}.")
