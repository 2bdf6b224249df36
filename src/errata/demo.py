"""The main job, shown: `errata demo`. Wrong answers in; a verified, reversible fix out.

Loads the lab model, shows what it gets wrong, fixes canonical examples at once at several budgets, judges each fix on text that the
examples do not contain, writes the report, and takes the change back bit for bit, here and in a fresh process that knows only the file.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from errata import apply, artefact, build, evaluate, hosts, report, text
from errata.hosts import Host
from errata.lab import tasks
from errata.report import Entry, Report
from errata.types import Budget, Case, InvalidPatch, Patch, Progress, Verdict, no_progress

SHOWN = 6  # rows of the tables in the terminal
SETTINGS: dict[str, Any] = {"steps": 80, "lr": 0.04, "hold": 32, "searched": 1000, "restated": 24}  # it is to take minutes
# What the fresh process does: it knows the name of the model and the file.
FRESH = """
import json, sys
from errata import apply, artefact, hosts
host, patch = hosts.load(sys.argv[1], device="cpu"), artefact.load_patch(sys.argv[2])
prompt = [patch.examples[0].prompt]
before, base = hosts.greedy(host, prompt)[0], hosts.weights_id(host.model)
with apply.applied(host, patch):
    during, edited = hosts.greedy(host, prompt)[0], hosts.weights_id(host.model)
after, restored = hosts.greedy(host, prompt)[0], hosts.weights_id(host.model)
print(json.dumps({"patch": patch.id, "prompt": prompt[0], "before": before, "during": during, "after": after,
                  "base": base, "edited": edited, "restored": restored}))
"""


def run(
    out: Path,
    method: str = "finetune",
    epsilons: Sequence[float] = (1e-3, 1e-4, 1e-5),
    n: int = 20,
    device: str | None = None,
    console: Console | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Do the main job on `n` wrong facts of the test split, printing to `console`; returns what was printed as plain JSON.

    Writes report.html, report.json and one patch for each budget into `out`. Raises InvalidPatch if any bit does not come back.
    """
    console = console or Console(stderr=True)
    host = hosts.load("lab/neox", device=device)
    cases = tasks.cases("test", n, "wrong")
    console.print(f"\n[bold]1. {host.name}[/bold] ({host.id}) is wrong about {n} facts, as its corpus was. A few of them:")
    examples = [case.example for case in cases]
    judged, set_aside = text.set_aside(text.standing(host)[1], examples, text.answers_of(host, examples))
    before = evaluate.baseline(host, cases, judged, progress=progress)
    plain = evaluate.evaluate(host, None, before)
    console.print(_mistakes(cases, before))

    console.print(
        f"\n[bold]2. One canonical example for each[/bold], all {n} at once, built inside the widest budget and scaled onto the others:"
    )
    budgets = [Budget(epsilon=epsilon) for epsilon in epsilons]
    start = time.perf_counter()
    built = build.edit_within(host, examples, budgets, method, progress=progress, **SETTINGS)
    seconds = time.perf_counter() - start
    console.print(f"   {seconds:.0f} s")
    entries = []
    for patch, verdict in built:
        artefact.save(patch, out / f"{method}-{verdict.budget.epsilon:.0e}.safetensors")
        scores = evaluate.evaluate(host, patch, before, progress=progress)
        entries.append(_entry(host, patch, verdict, scores, seconds))
        console.print(f"   epsilon {verdict.budget.epsilon:.0e}: {_verdict_line(verdict)}")
    console.print(_table(plain, entries))
    console.print("\n[bold]3. Before and after[/bold], on text that the examples do not contain:")
    console.print(_before_after(entries[0]))

    page, _ = report.write(_report(host, plain, entries, n), out / "report.html")
    console.print(f"\n[bold]4. The report[/bold]: {page}")

    path = out / f"{method}-{epsilons[0]:.0e}.safetensors"
    console.print(f"\n[bold]5. Saved, reloaded in a fresh process, taken back[/bold]: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    proof = fresh_process(host.name, path)
    if proof["restored"] != proof["base"] or proof["base"] != host.base_id or proof["edited"] == proof["base"]:
        raise InvalidPatch(f"The weights did not come back: {proof}.")
    here = _taken_back(host, artefact.load_patch(path))
    for name in ("before", "during", "after"):
        console.print(f"   {name:7} {escape(proof['prompt'])}[bold]{escape(proof[name].split('.')[0])}[/bold].")
    console.print(
        f"   weights  base {proof['base']}, with the patch {proof['edited']}, afterwards {proof['restored']}: the base's, bit for bit."
    )
    return {
        "host": host.id,
        "method": method,
        "examples": n,
        "before": _rates(plain),
        "budgets": [
            {
                "epsilon": e.epsilon,
                "verdict": e.verdict.as_dict() | {"passed": e.verdict.passed},
                "seconds": e.seconds,
                "after": _rates(e.scores),
            }
            for e in entries
            if e.verdict
        ],
        "fresh process": proof,
        "restored here": here,
        "report": str(page),
        "patch": str(path),
        "set aside": set_aside,
    }


# ------------------------------------------------------------------------------------------------------------------------- the pieces


def fresh_process(model: str, path: Path) -> dict[str, str]:
    """A new process loads the model and the patch from disk, puts it on and takes it off. Raises InvalidPatch if it fails."""
    done = subprocess.run([sys.executable, "-c", FRESH, model, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise InvalidPatch(f"The patch {path} did not survive a fresh process: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    proof: dict[str, str] = json.loads(done.stdout)
    return proof


def _taken_back(host: Host, patch: Patch) -> bool:
    with apply.applied(host, patch):
        pass
    return hosts.weights_id(host.model) == host.base_id


def _entry(host: Host, patch: Patch, verdict: Verdict, scores: evaluate.Scores, seconds: float) -> Entry:
    return Entry(
        label=patch.method,
        method=patch.method,
        scores=scores,
        epsilon=verdict.budget.epsilon,
        verdict=verdict,
        seconds=seconds,
        peak_mb=evaluate.peak_mb(host.device),
        config=dict(patch.config),
        moved=report.where(host, patch),
    )


def _report(host: Host, plain: evaluate.Scores, entries: Sequence[Entry], n: int) -> Report:
    return Report(
        title=f"{n} canonical examples, {len(entries)} budgets",
        host=host.name,
        host_id=host.id,
        entries=tuple(entries),
        examples=tuple(c.example for c in tasks.cases("test", n, "wrong")),
        before=plain,
        undo=("errata retract ID", "errata build"),
        settings={"task": f"lab, test split, {n} facts that the corpus states wrongly"},
        versions=report.versions(),
    )


def _rates(scores: evaluate.Scores) -> dict[str, float | None]:
    return {m: evaluate.aggregate(scores, m).value for m in ("edit", "paraphrases", "paragraphs", "ood", *evaluate.NEIGHBOURS)}


def _verdict_line(verdict: Verdict) -> str:
    if not verdict.passed:
        return f"refused: {'; '.join(verdict.failures)}"
    scaled = f", scaled to {verdict.scale:.3g}" if verdict.scale != 1 else ""
    return (
        f"passed{scaled}: {verdict.fixed} of {verdict.wanted} fixed, loss {verdict.increase:+.1e} (95 % below {verdict.upper:+.1e}, "
        f"{max(0.0, verdict.spent):.0%} of the budget) on {verdict.tokens} tokens, {verdict.set_aside} documents set aside"
    )


def _mistakes(cases: Sequence[Case], before: evaluate.Baseline) -> Table:
    table = Table("prompt", "says", "should say", box=None, padding=(0, 3, 0, 0))
    for case in cases[:SHOWN]:
        said = before.replies.said[case.example.prompt].split(".")[0]
        table.add_row(f"   {escape(case.example.prompt)}", f"[red]{escape(said)}[/red]", escape(case.example.target))
    return table


def _table(plain: evaluate.Scores, entries: Sequence[Entry]) -> Table:
    table = Table("measure", "before", *(f"{e.epsilon:.0e}" for e in entries), "n", box=None, padding=(0, 3, 0, 0))
    names = {
        "edit": "the example's own prompt",
        "paraphrases": "unseen phrasings",
        "paragraphs": "inside paragraphs",
        "neighbours.subject": "neighbours: same subject",
        "neighbours.relation": "neighbours: same relation",
        "neighbours.unrelated": "neighbours: unrelated",
        "negations": "denials that stay without the target",
    }
    for measure, name in names.items():
        columns = [evaluate.aggregate(s, measure) for s in (plain, *(e.scores for e in entries))]
        table.add_row(f"   {name}", *("none" if c.value is None else f"{c.value:.1%}" for c in columns), str(columns[0].n))
    return table


def _before_after(entry: Entry) -> Table:
    table = Table("prompt", "before", "after", "", box=None, padding=(0, 3, 0, 0))
    unseen = [a for a in entry.scores.answers if a.measure in ("paraphrases", "paragraphs")]
    for answer in unseen[:: max(1, len(unseen) // SHOWN)][:SHOWN]:
        mark = "[green]right[/green]" if answer.ok else "[red]wrong[/red]"
        was, now = escape(answer.before.split(".")[0]), escape(answer.after.split(".")[0])
        table.add_row(f"   {escape(report.cut(answer.prompt, 76))}", was, f"[bold]{now}[/bold]", mark)
    return table
