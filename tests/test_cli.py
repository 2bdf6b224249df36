"""The command line: every verb as text and as JSON, and every kind of bad input as one sentence that loses nothing."""

import contextlib
import errno
import io
import json
import math
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import TEXT, tiny_host
from safetensors.torch import load_file, save_file

from errata import apply, artefact, build, cli, hosts, ledger
from errata.cli import edge
from errata.cli.edits import settings_of
from errata.hosts import Host
from errata.ledger import Ledger
from errata.methods import _meta
from errata.types import Add, AddLowRank, Budget, Example, InvalidExample, Patch, Senses, Verdict

EXAMPLE = "The capital of Mauritius is| Port Louis"
QUICK = [f"--set={s}" for s in ("steps=3", "neighbours=0", "hold=2", "contexts=0", "damping=null")]
WIDE = "1e6"  # a budget that everything fits


@dataclass(frozen=True, kw_only=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The one JSON object on stdout."""
        (line,) = self.lines
        return line

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Errata = Callable[..., Done]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(ledger, "BUSY_SECONDS", 0.05)


def run(*argv: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(a) for a in argv])
    return Done(status=status, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny hosts: `neox`, `gpt2`, `backpack`, and `nan`, which has lost a weight."""
    root = tmp_path_factory.mktemp("models")
    for name, family in (("neox", "gpt_neox"), ("gpt2", "gpt2"), ("backpack", "backpack")):
        host = tiny_host(family)
        host.model.save_pretrained(root / name)
        host.tokenizer.save_pretrained(root / name)
    shutil.copytree(root / "neox", root / "nan")
    spoiled = load_file(root / "nan" / "model.safetensors")
    spoiled[min(spoiled)].view(-1)[0] = float("nan")
    save_file(spoiled, root / "nan" / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.txt"
    path.write_text("\n\n".join(f"On day {i} the weather was fine and {i + 3} boats left the harbour." for i in range(24)))
    return path


def hand_made(host: Host, *examples: Example) -> Patch:
    """A low-rank patch by hand, which is quicker than a method."""
    draw = torch.Generator().manual_seed(0)
    weight = f"{host.module_names((host.layout.mlp_out,))[0]}.weight"
    d_out, d_in = host.model.get_parameter(weight).shape
    op = AddLowRank(weight=weight, A=torch.randn(2, d_in, generator=draw), B=torch.randn(d_out, 2, generator=draw))
    return Patch(method="lora", config={"rank": 2}, parent=host.id, examples=examples, ops=(op,))


def verdict_on(patch: Patch, upper: float = 5e-4) -> Verdict:
    counts = {"chunks": 2, "tokens": 99, "set_aside": 0, "kept": 0, "asked": 0, "fixed": len(patch.examples), "wanted": len(patch.examples)}
    return Verdict(patch=patch.id, budget=Budget(), loss_before=2.0, loss_after=2.0002, upper=upper, norm=0.1, **counts)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A ledger with one active example and a current patch that passed, on the tiny NeoX in `models`."""

    path: Path
    patch: Patch

    def __call__(self, verb: str, *argv: object) -> Done:
        return run(verb, *argv, "--ledger", self.path)

    def state(self) -> tuple[object, ...]:
        with Ledger(self.path) as book:
            assert book.verify() == []
            return book.active(), tuple(row.id for row in book.patches()), book.history()


@pytest.fixture(scope="session")
def _made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    path, host = tmp_path_factory.mktemp("ledger") / "made", hosts.load(str(models / "neox"), "cpu")
    example = build.parse(EXAMPLE)
    patch = hand_made(host, example)
    with Ledger.create(path, host.id, host.name, Budget()) as book:
        book.add(example)
        book.put_patch(patch, verdict_on(patch))
    return Place(path=path, patch=patch)


@pytest.fixture
def place(_made: Place, tmp_path: Path) -> Place:
    return replace(_made, path=Path(shutil.copytree(_made.path, tmp_path / "ledger")))


@pytest.fixture
def bad(place: Place) -> Iterator[Callable[..., str]]:
    """Runs a command that must fail: exit status 1 and one sentence, and nothing in the ledger has changed. Returns the sentence."""

    def fail(verb: str, *argv: object) -> str:
        before = place.state()
        done = place(verb, *argv)
        assert done.status == 1, done
        sentence = one_sentence(done.err)
        assert done.out == "" and place.state() == before
        told = place(verb, *argv, "--json")
        assert told.status == 1 and set(told.data) == {"error", "kind"}
        assert place.state() == before
        return sentence

    yield fail


def one_sentence(err: str) -> str:
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    line = err.strip()
    assert line.endswith((".", "?")), line
    return line


# ------------------------------------------------------------------------------------------------------------------------------ edge


def test_help_is_quick_and_imports_no_model_library() -> None:
    code = "import sys, errata.cli; s = errata.cli.main(['--help']); print(s, {'torch', 'transformers', 'scipy'} & set(sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "0 set()"
    assert all(f" {verb} " in done.stdout for verb in ("init", "add", "build", "ask", "export", "verify", "lab", "demo"))
    # seconds of the processor: those on the wall depend on what else the machine does
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version_and_usage() -> None:
    from errata import __version__

    assert run("--version").out == f"errata {__version__}\n"
    for wrong in (["biuld"], ["ask"], ["build", "--no-such"], ["add", "--goal", "raise"], ["eval"], ["lab", "train"]):
        done = run(*wrong)
        assert done.status == 2 and "Traceback" not in done.err and done.out == ""
    assert "Did you mean 'build'" in run("biuld").err


def test_an_interrupt_is_a_sentence_and_130(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hosts, "load", interrupt)
    done = place("ask", "Hello")
    assert done.status == 130 and one_sentence(done.err).startswith("Interrupted.")


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(Closed()):
        cli.main(["lab", "cases", "--n", "1"])
    assert err.getvalue() == ""


def test_a_bar_only_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr as a terminal
    for slow, drawn in ((60.0, False), (-1.0, True)):
        monkeypatch.setattr(edge, "SLOW", slow)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert list(edge.Out(json=True).progress(range(3), "descending", 3)) == [0, 1, 2]
        assert ("descending" in err.getvalue()) is drawn


def test_our_own_mistakes_keep_their_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "load", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        place("ask", "Hello")


# ------------------------------------------------------------------------------------------------------------------- the main road


def test_the_main_road(models: Path, reference: Path, tmp_path: Path) -> None:
    at = tmp_path / "book"
    done = run("init", at, "--host", models / "neox", "--epsilon", WIDE, "--fixed", 0, "--norm", 100, "--json")
    assert done.status == 0 and done.data["budget"] == {"epsilon": 1e6, "neighbours": None, "norm": 100.0, "fixed": 0.0}
    assert done.data["model"] == str(models / "neox")

    done = run("add", EXAMPLE, "--ledger", at, "--json")
    assert done.status == 0 and done.data["active"] == 1 and done.data["added"][0]["target"] == " Port Louis"

    road = ("build", *QUICK, "--reference", reference, "--ledger", at)
    plan = run(*road, "--plan", "--json").data
    assert plan["seconds"] > 0 and plan["bytes"] == sum(plan["bytes_by_part"].values()) and plan["steps"] == 3
    with Ledger(at) as book:
        assert book.patches() == ()

    built = run(*road, "--json")
    assert built.status == 0, built
    assert built.data["passed"] and built.data["verdict"]["wanted"] == 1 and built.data["config"]["steps"] == 3
    id = built.data["patch"]

    said = run("ask", "The capital of Mauritius is", "Once", "--max-new-tokens", 4, "--ledger", at, "--json").lines
    assert [row["prompt"] for row in said] == ["The capital of Mauritius is", "Once"]
    assert {row["patch"] for row in said} == {id}

    assert [event["what"] for event in run("log", "--ledger", at, "--json").lines] == ["create", "add", "patch"]
    trip = run("verify", "--host", "--ledger", at, "--json").data["round trip"]
    assert trip["before"] == trip["after"] != trip["under the patch"]


def test_a_refused_patch_is_kept_and_said(place: Place, reference: Path) -> None:
    done = place("build", *QUICK, "--reference", reference, "--epsilon", 1e-9, "--set", "lr=0.1", "--json")
    told, error = done.lines
    assert done.status == 1 and not told["passed"] and "is refused" in error["error"] and error["kind"] == "BudgetError"
    assert "is refused" in one_sentence(done.err)
    with Ledger(place.path) as book:
        assert book.patch(told["patch"]).id == told["patch"]
        assert book.patch().id == place.patch.id  # what passed before is still handed out
    shown = place("show", told["patch"][:8])
    assert "REFUSED" in shown.out and shown.status == 0


def test_tables_are_for_readers(place: Place) -> None:
    assert "Port Louis" in place("log").out
    overview = place("show").out
    assert "The capital of Mauritius is| Port Louis" in overview and "passed" in overview and "in use" in overview
    with Ledger(place.path) as book:
        (example,) = book.active()
    assert " Port Louis" in place("show", example.id[:9]).out
    shown = place("show", place.patch.id[3:9]).out
    assert "reference loss" in shown and "passed" in shown
    assert "is sound" in place("verify").out
    said = place("ask", "The [bold]capital", "--max-new-tokens", 3).out
    assert "[bold]" in said and "before" in said


def test_what_each_sense_of_a_word_promotes(models: Path, tmp_path: Path) -> None:
    told = run("senses", "Mauritius", "--host", models / "backpack", "--top", 3, "--json").data
    host = hosts.load(str(models / "backpack"), "cpu")
    assert told["word"] == "Mauritius" and told["patch"] is None
    assert [t["id"] for t in told["tokens"]] == host.tokenizer(" Mauritius")["input_ids"] and len(told["tokens"]) > 1
    for token in told["tokens"]:
        assert [row["sense"] for row in token["senses"]] == [0, 1, 2, 3] and token["token"] == host.tokenizer.decode([token["id"]])
        with torch.no_grad():
            scores_KV = host.model.senses(torch.tensor(token["id"])) @ host.model.lm_head.weight.T
        for row in token["senses"]:
            top = scores_KV[row["sense"]].topk(3)
            assert [p["id"] for p in row["promotes"]] == top.indices.tolist()
            assert [p["score"] for p in row["promotes"]] == pytest.approx(top.values.tolist(), rel=1e-5)
    shown = run("senses", "Mauritius", "--host", models / "backpack").out
    assert f"token {told['tokens'][0]['id']}" in shown and repr(told["tokens"][0]["senses"][2]["promotes"][0]["token"]) in shown

    drawn = run("senses", "Mauritius", "--host", models / "backpack", "--top", 3, "--picture", tmp_path / "deep" / "senses.svg")
    assert "senses.svg" in drawn.out and "token" in drawn.out
    picture = ElementTree.parse(tmp_path / "deep" / "senses.svg").getroot()  # well-formed, whatever the tokens are
    words = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(w.startswith("sense ") for w in words) == 4 * len(told["tokens"])
    assert sum(w.startswith("The token ") for w in words) == len(told["tokens"])
    assert "“Mauritius”" in str(picture.findtext("{http://www.w3.org/2000/svg}title"))

    token = told["tokens"][0]["id"]  # under a patch that makes sense 2 the row of another token, that one is on top
    with torch.no_grad():
        shift = 20 * host.model.lm_head.weight[123] - host.model.senses(torch.tensor(token))[2]
    op = Senses(weight="backpack.overrides.senses", ids=torch.tensor([token]), senses=torch.tensor([2]), shift=shift[None])
    patch = Patch(method="senses", config={}, parent=host.id, examples=(), ops=(op,))
    file = artefact.save(patch, tmp_path / "fix.safetensors")
    with Ledger.create(tmp_path / "ledger", host.id, host.name, Budget()) as book:
        book.add(build.parse(EXAMPLE))
    for where in (["--host", models / "backpack"], ["--ledger", tmp_path / "ledger"]):
        now = run("senses", "Mauritius", *where, "--patch-file", file, "--json").data
        assert now["patch"] == patch.id
        assert now["tokens"][0]["senses"][2]["promotes"][0]["id"] == 123
        assert now["tokens"][0]["senses"][:2] == run("senses", "Mauritius", *where, "--json").data["tokens"][0]["senses"][:2]


def test_a_small_model_beside_a_large_one(models: Path, place: Place, reference: Path, tmp_path: Path) -> None:
    settings = [x for s in ("steps=4", "neighbours=2", "hold=4", f"small={models / 'backpack'}") for x in ("--set", s)]
    built = place("build", "--method", "ensemble", *settings, "--reference", reference, "--epsilon", 50, "--json")
    told = built.lines[0]  # a random model is not fixed in four steps: the patch is kept, and asked for by name
    assert told["method"] == "ensemble" and told["verdict"]["scale"] == 1.0 and "0 of 1 examples fixed" in built.err, built
    patch = told["patch"]
    assert place("ask", "The capital of Mauritius is", "--patch", patch, "--max-new-tokens", 3, "--json").lines[0]["patch"] == patch
    assert "changes no weight" in one_sentence(place("export", tmp_path / "out", "--patch", patch).err)
    assert place("export", tmp_path / "fix.safetensors", "--as", "patch", "--patch", patch).status == 0
    other = tiny_host("backpack", pieces=True)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    refused = place("build", "--method", "ensemble", "--set", f"small={tmp_path / 'other'}", "--reference", reference)
    assert refused.status == 1 and "have different tokenizers" in one_sentence(refused.err)


def test_senses_of_what_has_none(models: Path, place: Place, tmp_path: Path) -> None:
    assert "gpt2 is no Backpack" in one_sentence(run("senses", "Mauritius", "--host", models / "gpt2").err)
    assert "is no Backpack" in one_sentence(place("senses", "Mauritius").err)
    assert "no word" in one_sentence(run("senses", " ", "--host", models / "backpack").err)
    file = artefact.save(place.patch, tmp_path / "other.safetensors")
    assert "was made for weights" in one_sentence(run("senses", "Mauritius", "--host", models / "backpack", "--patch-file", file).err)


def test_a_trace_is_a_table_a_picture_and_a_choice(models: Path, place: Place, tmp_path: Path) -> None:
    from errata.methods._trace import trace

    host = hosts.load(str(models / "neox"), "cpu")
    prompts = [("The capital of Mauritius is", None), ("Once upon a time", None)]
    told = run("trace", f"{prompts[0][0]}| Port Louis", prompts[1][0], "--host", models / "neox", "--samples", 3, "--json").data
    found = trace(host, prompts, samples=3)
    assert told["width"] == 1 and told["prompts"] == 2 and told["subjects"] == 0
    assert told["chosen"] == found.chosen == [0] and [w["layers"] for w in told["windows"]] == [[0], [1]]
    assert [w["effect"] for w in told["windows"]] == pytest.approx(found.effects_EW.mean(0).tolist(), abs=1e-6)
    assert told["clean"] == pytest.approx(float(found.clean_E.mean()), abs=1e-6) and told["corrupted"] != told["clean"]
    assert all(w["low"] < w["effect"] < w["high"] for w in told["windows"])

    for name, start in (("trace.html", "<!DOCTYPE html>"), ("trace.svg", "<svg")):
        done = place("trace", prompts[0][0], "--subject", "Mauritius", "--width", 2, "--samples", 2, "--out", tmp_path / name)
        assert done.status == 0 and "0–1" in done.out and "would take layers 0–1" in done.out and name in done.out
        drawn = (tmp_path / name).read_text()
        assert (
            drawn.startswith(start)
            and "Causal tracing" in drawn
            and "layers 0–1" in drawn
            and ("their subjects" in drawn) == (start != "<svg")
        )
    whole = place("trace", prompts[0][0], "--subject", "Mauritius", "--prefix", "--samples", 2, "--json").data
    assert whole["subjects"] == 0 and whole["windows"][0]["low"] is None


def test_the_lab_traces_facts_of_its_own() -> None:
    told = run("trace", "--host", "lab/neox", "--n", 2, "--samples", 2, "--json").data
    assert told["prompts"] == told["subjects"] == 2 and len(told["windows"]) == 3 and len(told["chosen"]) == 2
    assert told["clean"] > 0.5 > told["corrupted"], "it knows them, and not when they are corrupted"


def test_what_cannot_be_traced(bad: Callable[..., str], models: Path, tmp_path: Path) -> None:
    assert "only the lab's models have cases of their own" in bad("trace")
    assert "'Togo' was given with 1 prompt(s)" in bad("trace", "The capital of Mauritius is", "--subject", "Togo")
    assert "was given with 2 prompt(s)" in bad("trace", "Togo is", "Togo was", "--subject", "Togo")
    assert "written as .html or .svg" in bad("trace", "Togo is", "--out", tmp_path / "trace.png")
    assert "can be traced on 1 to" in bad("trace", " ".join(["Togo"] * 400))
    assert "No such file" in bad("trace", "--file", tmp_path / "none.jsonl") and not list(tmp_path.glob("trace*"))


def test_an_id_that_is_the_start_of_several(place: Place) -> None:
    place("add", *(f"Town {i} lies in| Italy" for i in range(40)))
    digits = Counter(example["id"][3] for example in place("show", "--json").data["active"])
    assert "is the start of" in one_sentence(place("show", max(digits, key=lambda d: digits[d])).err)


def test_what_is_added_twice_is_active_once_and_a_note_says_so(place: Place) -> None:
    done = place("add", EXAMPLE)
    assert "is active already" in done.err and done.status == 0
    assert len(place("show", "--json").data["active"]) == 1


def test_an_id_that_nothing_has(place: Place) -> None:
    assert "No example's id begins with 'zzzz'" in one_sentence(place("show", "zzzz").err)


def test_verbs_that_list_speak_json(place: Place) -> None:
    assert place("show", "--json").data["patches"][0]["id"] == place.patch.id
    assert place("show", place.patch.id[:8], "--json").data["verdict"]["upper"] == 5e-4
    assert place("verify", "--json").data["problems"] == []
    with Ledger(place.path) as book:
        (example,) = book.active()
    assert place("show", example.id, "--json").data["id"] == example.id
    assert place("retract", example.id[3:9], "--json").data == {"retracted": example.id, "active": 0}
    assert "No example is active" in one_sentence(place("ask", "Hello").err)


def test_an_example_that_was_taken_out_is_shown_with_what_became_of_it(place: Place) -> None:
    with Ledger(place.path) as book:
        (example,) = book.active()
    assert "active since 20" in place("show", example.id).out
    done = place("add", "The capital of Mauritius is| Curepipe", "--supersede", example.id, "--json")
    after = done.data["added"][0]["id"]
    shown = place("show", example.id[:9]).out
    assert "superseded at 20" in shown and after[:9] in shown and " Port Louis" in shown
    place("retract", after)
    assert "retracted at 20" in place("show", after).out
    told = place("show", after, "--json").data
    assert told["id"] == after and not told["active"] and told["last"]["what"] == "retract" and told["last"]["at"].startswith("20")


def test_not_a_number_is_null_in_json(place: Place, models: Path) -> None:
    patch = hand_made(hosts.load(str(models / "neox"), "cpu"), build.parse("Paris is in| France"))
    with Ledger(place.path) as book:
        book.put_patch(patch, verdict_on(patch, upper=float("nan")))
    done = place("show", patch.id, "--json")
    assert done.data["verdict"]["upper"] is None and not done.data["passed"]


def test_add_in_all_its_forms(place: Place, tmp_path: Path) -> None:
    assert place("add", "Paris is in| France", "Rome is in|Italy").err.startswith(
        "Note: There is no space between prompt and answer in 'Rome"
    )
    given = ("--prompt", "The nurse said that", "--target", " she", "--contrast", " he", "--goal", "balance", "--subject", "nurse")
    assert place("add", *given, "--json").data["added"][0]["goal"] == "balance"
    assert place("add", "--prompt", "I am", "--target", " well", "--contrast", " ill", "--json").data["added"][0]["goal"] == "prefer"
    file = tmp_path / "more.jsonl"
    file.write_text('{"prompt": "Bern is in", "target": " Switzerland"}\n\n{"prompt": "Oslo is in", "target": " Norway"}\n')
    assert place("add", "--file", file, "--json").data["active"] == 7
    with Ledger(place.path) as book:
        old = book.active()[0].id
    done = place("add", "The capital of Mauritius is| Curepipe", "--supersede", old[:10], "--json")
    assert done.data["active"] == 7 and done.status == 0
    assert place("log", "--json").lines[-2]["what"] == "supersede"


def test_eval_and_its_report(place: Place, tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    near = {"prompt": "The capital of France is", "answer": " Paris", "ring": "relation"}
    cases.write_text(json.dumps({"prompt": "The capital of Mauritius is", "target": " Port Louis", "neighbours": [near]}))
    done = place("eval", "--cases", cases, "--report", tmp_path / "r.html", "--json")
    measures = {row["measure"]: row for row in done.data["measures"]}
    assert measures["edit"]["n"] == 1 and measures["paraphrases"]["after"] is None
    assert (tmp_path / "r.html").stat().st_size > 1000 and (tmp_path / "r.json").exists()
    assert "edit" in place("eval", "--cases", cases).out


def test_the_curve_between_the_base_and_a_patch(place: Place, tmp_path: Path) -> None:
    cases, picture = tmp_path / "cases.txt", tmp_path / "curve.svg"
    cases.write_text("The capital of Mauritius is| Port Louis\n")
    reference = tmp_path / "text.txt"
    reference.write_text("\n\n".join(TEXT * 4))
    given = ("--cases", cases, "--reference", reference, "--alpha", 1, "--alpha", 0)
    done = place("eval", "alpha", *given, "--picture", picture, "--json")
    first, last = done.data["curve"]
    assert (first["alpha"], last["alpha"]) == (0, 1) and first["increase"] == pytest.approx(0, abs=1e-12) != last["increase"]
    assert "Success against alpha" in picture.read_text() and done.data["patch"] == place.patch.id
    judged = {row["measure"]: row["after"] for row in place("eval", "--cases", cases, "--reference", reference, "--json").data["measures"]}
    assert last["edit"] == judged["edit"]
    assert "neither" in one_sentence(place("eval", "alpha", *given, "--picture", tmp_path / "curve.png").err)
    assert "two values" in place("eval", "alpha", "--cases", cases, "--alpha", 1, "--picture", picture).err


@pytest.mark.parametrize("form", ["model", "peft"])
def test_export(place: Place, models: Path, tmp_path: Path, form: str) -> None:
    done = place("export", tmp_path / "out", "--as", form, "--json")
    assert done.status == 0 and done.data["difference"] < 1e-3 and done.data["bytes"] > 1000
    said = json.loads((tmp_path / "out" / "errata.json").read_text())
    assert said["patch"] == place.patch.id and said["base"] == hosts.load(str(models / "neox"), "cpu").id


def test_a_patch_travels_as_one_file(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "fix.safetensors"
    done = place("export", file, "--as", "patch", "--json")
    assert done.status == 0 and done.data["bytes"] == file.stat().st_size and artefact.load_patch(file).id == place.patch.id
    assert "is there already" in one_sentence(place("export", file, "--as", "patch").err)
    assert place("ask", "Hello", "--patch-file", file, "--json").data["patch"] == place.patch.id


def test_methods_come_from_the_register() -> None:
    from errata.methods import METHODS

    rows = run("methods", "--json").lines
    assert [row["method"] for row in rows] == sorted(METHODS)
    assert all(row["idea"] and row["settings"] for row in rows)
    assert "finetune" in run("methods").out


def test_lab_cases_are_jsonl_that_add_and_eval_read(place: Place, tmp_path: Path) -> None:
    done = run("lab", "cases", "--split", "validation", "--n", 3, "--kind", "wrong")
    assert [row["source"].split("/")[0] for row in done.lines] == ["lab"] * 3
    file = tmp_path / "cases.jsonl"
    file.write_text(done.out)
    assert place("add", "--file", file, "--json").data["active"] == 4
    assert "Did you mean test" in one_sentence(run("lab", "cases", "--split", "tset").err)
    assert "Did you mean wrong" in one_sentence(run("lab", "cases", "--kind", "wrnog").err)
    assert "Did you mean claim" in one_sentence(run("lab", "cases", "--form", "clam").err)
    assert run("lab", "cases", "--form", "question", "--n", 1).data["example"]["prompt"].endswith("?")
    assert "facts" in one_sentence(run("lab", "cases", "--n", 10**6).err)


@pytest.mark.parametrize("family, example, answers", [("t5", "Who?| Lily", None), ("bert", "Rome is in Italy.|{}", ["false", "true"])])
def test_models_that_answer_or_judge_go_the_whole_road(family: str, example: str, answers: list[str] | None, tmp_path: Path) -> None:
    host, at = tiny_host(family), tmp_path / "ledger"
    host.model.save_pretrained(tmp_path / family)
    host.tokenizer.save_pretrained(tmp_path / family)
    prompt = example.partition("|")[0]
    (said,) = hosts.greedy(host, [prompt], 4)
    wanted = example.format("true" if said == "false" else "false")
    texts = [(f"On day {i} there were {i + 3} boats.", wanted.partition("|")[2]) for i in range(24)]
    reference = tmp_path / "reference.jsonl"
    reference.write_text("\n".join(json.dumps({"prompt": p, "target": t}) for p, t in texts))
    assert run("init", at, "--host", tmp_path / family).status == 0
    added = run("add", wanted, "--ledger", at)
    assert added.status == 0 and not added.err
    built = run("build", "--ledger", at, "--method", "ultraedit", "--reference", reference, "--epsilon", 50, "--json")
    done = run("ask", prompt, "--ledger", at, "--patch", built.lines[0]["patch"], "--max-new-tokens", 4, "--json").data
    assert done["before"] == said and (answers is None or done["after"] in answers)
    (tmp_path / "plain.txt").write_text("Rome lies on the Tiber.\n\nParis lies on the Seine.")
    assert "has no answer" in one_sentence(run("build", "--ledger", at, "--reference", tmp_path / "plain.txt").err)
    if answers:
        assert run("add", "Rome is large.|perhaps", "--ledger", at).status == 0
        assert "'perhaps' is no label" in one_sentence(run("build", "--ledger", at, "--reference", reference).err)


# ------------------------------------------------------------------------------------------------------------------------- bad input


def test_an_example_that_cannot_be(bad: Callable[..., str], tmp_path: Path) -> None:
    assert "is empty. Write it after the bar" in bad("add", "The capital of Mauritius is|")
    assert "has no bar" in bad("add", "The capital of Mauritius is Port Louis")
    assert "The prompt is empty" in bad("add", "--target", " Port Louis")
    assert "0 examples were given" in bad("add")
    assert "2 examples were given" in bad("add", "A|b", "C|d", "--supersede", "abcd")
    assert "Did you mean raise?" in bad("add", "--prompt", "A", "--target", " b", "--goal", "rise")
    assert "does not stand in the prompt" in bad("add", "--prompt", "A", "--target", " b", "--subject", "C")
    for line, why in (
        ('{"prompt": "A is"}', "line 2"),
        ("{", "Line 2"),
        ('{"prompt": "A is", "target": NaN}', "Line 2"),
        ('["A"]', "Line 2"),
    ):
        file = tmp_path / "examples.jsonl"
        file.write_text('{"prompt": "Rome is in", "target": " Italy"}\n' + line + "\n")
        assert why.lower() in bad("add", "--file", file).lower()
    assert "No such file" in bad("add", "--file", tmp_path / "none.jsonl")


def test_a_contradiction_is_reported_at_once(bad: Callable[..., str]) -> None:
    assert "contradict" in bad("add", "The capital of Mauritius is| Curepipe")
    assert "contradict" in bad("add", "Rome is in| Italy", "Rome is in| France")


def test_what_the_model_says_already(place: Place, models: Path, reference: Path) -> None:
    host = hosts.load(str(models / "neox"), "cpu")
    answer = next(
        (p, said[:6])
        for p in ("Once upon a time", "The nurse said", "Paris", "There was", "Rome lies")
        for said in hosts.greedy(host, [p])
        if said[:6].isascii() and not said[6:7].isalnum() and said.strip()
    )
    so = "|".join(answer)
    assert "already does what" in place("add", so, "--check").err
    build_it = ("build", *QUICK, "--reference", reference, "--epsilon", WIDE)
    assert f"{so}' asks" in place(*build_it).err
    with Ledger(place.path) as book:
        book.retract(book.active()[0].id)
    before = place.state()
    done = place(*build_it)
    assert done.status == 1 and "there is nothing to fix" in one_sentence(done.err) and place.state() == before


def test_a_prompt_longer_than_the_context(place: Place, bad: Callable[..., str]) -> None:
    long = "word " * 200 + "is| done"
    assert "reads at most 128" in bad("add", long, "--check")
    assert "do not fit the 128" in bad("ask", "word " * 200)
    assert place("add", long).status == 0
    assert "reads at most 128" in bad("build", *QUICK)


def test_a_method_that_is_unknown_or_wrongly_set(bad: Callable[..., str]) -> None:
    assert "Did you mean finetune?" in bad("build", "--method", "finetun")
    assert "Did you mean steps?" in bad("build", "--set", "stpes=3")
    assert "is int, not 'three'" in bad("build", "--set", "steps=three")
    assert "is no setting" in bad("build", "--set", "steps")
    assert "not 'nan'" in bad("build", "--set", "lr=nan")
    assert "epsilon must be a positive number" in bad("build", "--epsilon", "nan")
    assert "epsilon must be a positive number" in bad("build", "--epsilon", 0)
    assert "Unknown device 'tpu'" in bad("ask", "Hello", "--device", "tpu")
    assert "Did you mean peft?" in bad("export", "out", "--as", "petf")


def test_nothing_to_build_from(place: Place, bad: Callable[..., str]) -> None:
    with Ledger(place.path) as book:
        book.retract(book.active()[0].id)
    assert "no examples to build from" in bad("build", *QUICK)
    assert "no examples to build from" in bad("build", *QUICK, "--plan")


def test_a_patch_for_other_weights(place: Place, models: Path, bad: Callable[..., str], tmp_path: Path) -> None:
    file = artefact.save(replace(place.patch, parent="b2:" + "0" * 32), tmp_path / "other.safetensors")
    assert "was made for weights b2:0000" in bad("ask", "Hello", "--patch-file", file)
    good = artefact.save(place.patch, tmp_path / "own.safetensors")
    assert place("ask", "Hello", "--patch-file", good).status == 0


def test_the_model_of_the_ledger_has_other_weights_now(_made: Place, models: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models / "neox", tmp_path / "model"))
    run("init", tmp_path / "book", "--host", copy)
    weights = load_file(copy / "model.safetensors")
    weights[min(weights)].mul_(1.5)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    run("add", EXAMPLE, "--ledger", tmp_path / "book")
    done = run("build", *QUICK, "--ledger", tmp_path / "book")
    assert done.status == 1 and "Put the old weights back" in one_sentence(done.err)


def broken_files(patch: Patch, folder: Path) -> Iterator[tuple[str, Path]]:
    raw = artefact.to_bytes(patch)
    flipped = bytearray(raw)
    flipped[-5] ^= 1
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    tensors = {k: v for k, v in load_file(artefact.save(patch, folder / "whole.safetensors")).items()}
    save_file({k: v * float("nan") for k, v in tensors.items()}, folder / "nan.safetensors", metadata=header["__metadata__"])
    torch.save({"weights": torch.zeros(3)}, folder / "pickle.pt")
    for name, content, why in (
        ("cut", raw[: len(raw) // 2], "is damaged"),
        ("stub", raw[:5], "is cut short"),
        ("flipped", bytes(flipped), "was altered"),
        ("oversized", struct.pack("<Q", 1 << 40) + raw[8:], "states a header of 1099511627776 bytes"),
        ("empty", b"", "is cut short"),
    ):
        (folder / f"{name}.safetensors").write_bytes(content)
        yield why, folder / f"{name}.safetensors"
    yield "holds NaN", folder / "nan.safetensors"
    yield "is a pickle", folder / "pickle.pt"
    yield "Cannot read the patch", folder / "none.safetensors"
    yield "it is not a file", folder


def test_a_file_that_is_no_whole_patch(place: Place, bad: Callable[..., str], tmp_path: Path) -> None:
    for why, file in broken_files(place.patch, tmp_path):
        assert why in bad("ask", "Hello", "--patch-file", file)


def test_a_damaged_ledger(place: Place) -> None:
    (blob,) = place.path.glob("blobs/??/*.safetensors")
    raw = bytearray(blob.read_bytes())
    raw[-5] ^= 1
    blob.write_bytes(raw)
    assert "was cut short or altered" in one_sentence(place("ask", "Hello").err)
    done = place("verify", "--json")
    told, error = done.lines
    assert done.status == 1 and told["problems"][0]["kind"] == "patch" and "lost or altered" in error["error"]
    (place.path / "ledger.sqlite").write_bytes(b"not a database" * 100)
    assert "is damaged" in one_sentence(place("show").err)


def test_stray_files_are_harmless_and_collected(place: Place) -> None:
    stray = next(place.path.glob("blobs/??")) / ".tmp-0123"
    stray.write_bytes(b"half")
    done = place("verify", "--json")
    assert done.status == 0 and done.data["problems"][0]["harmless"]
    assert place("verify", "--collect", "--json").data["removed"] == [str(stray)] and not stray.exists()


def test_not_a_number_in_the_model(models: Path, tmp_path: Path) -> None:
    done = run("init", tmp_path / "book", "--host", models / "nan")
    assert done.status == 1 and "holds NaN or infinity" in one_sentence(done.err)
    assert not (tmp_path / "book").exists()


def test_a_host_that_is_not_there(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, why in (
        (tmp_path / "empty", "without a whole model"),
        (tmp_path / "none", "no folder here"),
        ("lab/nexo", "Unknown lab model"),
    ):
        done = run("init", tmp_path / "book", "--host", name)
        assert done.status == 1 and why in one_sentence(done.err)
    assert "epsilon must be a positive number" in one_sentence(run("init", tmp_path / "book", "--epsilon", "-1").err)
    assert not (tmp_path / "book").exists()


def test_a_reference_file_that_is_none(bad: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "one.txt").write_text("One short document.")
    for name, why in (
        ("none.txt", "Cannot read the reference file"),
        ("empty.txt", "is empty"),
        ("binary.txt", "is binary"),
        ("latin.txt", "is not UTF-8"),
        ("bad.jsonl", "Line 2 of"),
        ("one.txt", "two or more are needed"),
    ):
        assert why in bad("build", *QUICK, "--reference", tmp_path / name)


def test_a_ledger_that_is_not_there_or_there_already(place: Place, bad: Callable[..., str], models: Path, tmp_path: Path) -> None:
    assert "There is no ledger at" in one_sentence(run("log", "--ledger", tmp_path / "none").err)
    assert "There is a ledger at" in one_sentence(run("init", place.path, "--host", models / "neox").err)
    assert "Unknown active example" in bad("retract", "ffffffff")
    assert "Unknown active example" in bad("add", "A|b", "--supersede", "ffffffff")
    assert "Unknown patch" in bad("show", "ffffffff")
    assert "Unknown patch" in bad("ask", "Hello", "--patch", "ffffffff")
    assert "too short" in bad("ask", "Hello", "--patch", "f")


def test_a_ledger_that_another_process_is_writing(place: Place, reference: Path) -> None:
    writer = sqlite3.connect(place.path / "ledger.sqlite", isolation_level=None)
    before = place.state()
    try:
        writer.execute("BEGIN IMMEDIATE")
        for argv in (["add", "Rome is in| Italy"], ["build", *QUICK, "--reference", reference, "--epsilon", WIDE]):
            done = place(*argv)
            assert done.status == 1 and "is being written by another process" in one_sentence(done.err)
        assert place("show").status == 0  # reading goes on
    finally:
        writer.execute("ROLLBACK")
        writer.close()
    assert place.state() == before


def test_a_full_disk(place: Place, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = place.state()
    cases = tmp_path / "cases.jsonl"
    cases.write_text(EXAMPLE)
    with monkeypatch.context() as m:
        m.setattr(artefact.os, "fsync", full)
        for argv in (
            ["build", *QUICK, "--reference", reference, "--epsilon", WIDE],
            ["export", tmp_path / "out"],
            ["eval", "--cases", cases, "--report", tmp_path / "r.html"],
        ):
            done = place(*argv)
            assert done.status == 1 and "No space left on device" in one_sentence(done.err)
    assert place.state() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases.jsonl", "ledger"]


def test_a_dense_patch_is_no_adapter(place: Place, models: Path, tmp_path: Path) -> None:
    host = hosts.load(str(models / "neox"), "cpu")
    weight = f"{host.layout.norm}.weight"
    op = Add(weight=weight, delta=torch.ones(host.model.get_parameter(weight).shape))
    patch = replace(place.patch, method="finetune", ops=(op,))
    apply.check(host, patch)
    with Ledger(place.path) as book:
        book.put_patch(patch, verdict_on(patch))
    done = place("export", tmp_path / "out", "--as", "peft")
    assert done.status == 1 and "Export it as a model, or build with --method lora" in one_sentence(done.err)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------------- prepare


LEARN = [f"--set={s}" for s in ("rank=4", "steps=4", "least=1", "most=2", "every=2", "hold=2", "near=0", "restated=0")]


@pytest.fixture
def training(tmp_path: Path) -> Path:
    path = tmp_path / "training.jsonl"
    names = ("Togo", "Kenya", "Peru", "Mali", "Chad")
    path.write_text(
        "\n".join(json.dumps({"prompt": f"The capital of {n} is", "target": " Rome", "paraphrases": [f"{n} has"]}) for n in names)
    )
    return path


def test_what_was_prepared_is_built_with_and_its_cases_judge_nothing(place: Place, reference: Path, training: Path) -> None:
    learn = ("prepare", "malmen", *LEARN, "--cases", training, "--reference", reference)
    told = place(*learn, "--json")
    assert told.status == 0 and told.data["cases"] == 5 and told.data["step"] == 4 and told.data["dropped"] == 0, told
    with Ledger(place.path) as book:
        state = book.latest_state("malmen")
        assert state is not None and state.id == told.data["state"] and book.aside("malmen") is None
    assert place(*learn, "--json").data["state"] == state.id, "the same again"
    shown = place(*learn, "--seed", 1)
    assert "malmen has learnt from 5 cases" in shown.out and "errata build --method malmen" in shown.out and "Step 2:" in shown.err

    build_ = ("build", "--method", "malmen", "--set=held=0", "--set=restated=0", "--reference", reference, "--epsilon", WIDE)
    built = place(*build_, "--json").lines[0]
    with Ledger(place.path) as book:
        assert built["config"]["state"] == book.latest_state("malmen").id != state.id, "the newest"
    leak = place("eval", "--cases", training, "--patch", built["patch"])
    assert leak.status == 1 and "was trained on" in one_sentence(leak.err)


def test_a_build_goes_on_from_the_sums_of_the_last_one(place: Place, reference: Path) -> None:
    place("add", *(f"Town {i} lies in the land of| Port Louis number {7 * i}" for i in range(24)))
    build_ = ("build", "--method", "ultraedit", "--set=held=0", "--reference", reference, "--epsilon", WIDE, "--json")
    first = place(*build_).lines[0]["patch"]
    sums = place.path / "aside" / "ultraedit-sums.safetensors"
    assert sums.exists() and place(*build_).lines[0]["patch"] == first
    before = sums.read_bytes()
    place("add", "Town 99 lies in the land of| Port Louis number 1")
    assert place(*build_).lines[0]["patch"] != first and sums.read_bytes() != before
    place("retract", Example(prompt="Town 99 lies in the land of", target=" Port Louis number 1").id)
    assert place(*build_, "--afresh").lines[0]["patch"] == first, "to the bit"
    sums.write_bytes(before[:-5])
    done = place(*build_)
    assert "cut short" in done.err and "The sums are made again" in done.err and sums.read_bytes() == before
    assert place("verify").status == 0


def test_prepare_says_in_a_sentence_what_it_cannot_do(bad: Callable[..., str], models: Path, reference: Path, training: Path) -> None:
    assert "'errata prepare malmen'" in bad("build", "--method", "malmen", "--reference", reference)
    assert "nothing to prepare" in bad("prepare", "finetune")
    assert "Name a file of them with --cases" in bad("prepare", "malmen")
    assert "Name its model" in bad("prepare", "malmen", "--host", models / "gpt2", "--cases", training)
    assert "Did you mean rank" in bad("prepare", "malmen", "--set", "rnak=3")
    training.write_text("nothing\n{}\n")
    assert "Line 1 of" in bad("prepare", "malmen", "--cases", training)


def test_what_reads_no_cases_is_prepared_without(place: Place, reference: Path) -> None:
    for method, *how in (("ultraedit",), ("memit", "--set", "layers=0")):
        done = place("prepare", method, *how, "--reference", reference, "--json")
        assert done.status == 0 and done.data["cases"] == 0, done


def test_a_bad_line_of_a_training_file_costs_itself_alone(place: Place, reference: Path, training: Path) -> None:
    lines = training.read_text().split("\n")
    long = json.dumps({"prompt": "The capital of Mauritius " * 90, "target": " Rome"})
    training.write_text("\n".join([*lines[:2], '{"prompt": "The', *lines[2:], long]))
    done = place("prepare", "malmen", *LEARN, "--cases", training, "--reference", reference, "--json")
    assert done.status == 0 and done.data["cases"] == 5, done
    told = " ".join(done.err.split())
    assert f"Left out: Line 3 of {training}" in told and f"Left out: Line {training.read_text().count(chr(10)) + 1} of {training}: " in told
    assert "reads at most" in told


def test_prepare_goes_on_after_a_kill(place: Place, reference: Path, training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = ("prepare", "malmen", *LEARN, "--cases", training, "--reference", reference)
    keep, whole = Ledger.put_aside, place(*learn, "--json").data["state"]

    def killed(book: Ledger, state: Any) -> None:
        keep(book, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Ledger, "put_aside", killed)
        assert place(*learn).status == 130
    again = place(*learn, "--json")
    assert "Going on behind step 2" in again.err and again.data["state"] == whole

    with monkeypatch.context() as m:
        m.setattr(Ledger, "put_aside", killed)
        place(*learn)
    other = place(*learn, "--seed", 7)
    assert other.status == 1 and "begin afresh" in other.err
    half = place.path / "aside" / "malmen.safetensors"
    half.write_bytes(half.read_bytes()[:-5])
    assert "cut short" in one_sentence(place(*learn).err)
    assert place(*learn, "--afresh", "--json").data["state"] == whole and not half.exists()


def test_prepare_goes_on_after_a_kill_that_nothing_can_catch(place: Place, reference: Path, training: Path) -> None:
    """SIGKILL while it learns, behind its first validation; what comes of it is what would have come of it, to the bit."""
    learn = ("prepare", "malmen", *LEARN, "--set=steps=60", "--set=patience=99", "--cases", training, "--reference", reference)
    half = place.path / "aside" / "malmen.safetensors"
    asked = [sys.executable, "-c", "from errata import cli; cli.main()", *map(str, learn), "--ledger", str(place.path)]
    with subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not half.exists():
            assert process.poll() is None and time.monotonic() < deadline, "it never got so far"
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    again = place(*learn, "--json")
    assert again.status == 0 and "Going on behind step" in again.err and again.data["step"] == 60, again
    assert place(*learn, "--afresh", "--json").data["state"] == again.data["state"] and place("verify").status == 0


def test_steps_that_were_dropped_are_counted_while_it_learns(
    place: Place, reference: Path, training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is NaN in every step."""
    graded = _meta.Merging.graded

    def broken(self: _meta.Merging, *given: Any) -> _meta.Graded:
        found = graded(self, *given)
        return replace(found, grads={name: g * math.nan for name, g in found.grads.items()})

    monkeypatch.setattr(_meta.Merging, "graded", broken)
    done = place("prepare", "malmen", *LEARN, "--cases", training, "--reference", reference)
    told = " ".join(done.err.split())
    assert done.status == 0 and "of step 0. Steps dropped so far: 2." in told, told
    assert "4 of 4 steps dropped: a gradient was not finite." in told


def test_a_model_is_split_as_a_device_map_says(models: Path, tmp_path: Path) -> None:
    """It is the same model: a ledger about the whole one is about it too."""
    at, init = tmp_path / "map.json", ("--host", models / "gpt2", "--device")
    split = {f"transformer.{part}": "cpu" for part in ("wte", "wpe", "h.0", "ln_f")} | {"transformer.h.1": "disk", "lm_head": "cpu"}
    at.write_text(json.dumps(split))
    made = [run("init", tmp_path / f"ledger{i}", *init, device, "--json") for i, device in enumerate((at, "auto", "cpu"))]
    assert [done.status for done in made] == [0, 0, 0], made
    assert len({done.data["host"] for done in made}) == 1
    for text, told in (("{", "is no JSON"), ("[]", "is no device map"), ('{"lm_head": "nowhere"}', "with this device map")):
        at.write_text(text)
        done = run("init", tmp_path / "none", *init, at)
        assert done.status == 1 and told in one_sentence(done.err)


def test_a_setting_that_is_one_of_some_words_can_be_given() -> None:
    assert settings_of("rp", ["verifier=distance", "nearest=4"]) == {"verifier": "distance", "nearest": 4}
    for given, why in (("verifier=dist", "is distance or cross, not 'dist'"), ("nearest=few", "is int, not 'few'")):
        with pytest.raises(InvalidExample, match=why):
            settings_of("rp", [given])
    with pytest.raises(InvalidExample, match="is bool, not '3'"):
        settings_of("serac", ["faithful=3"])
