"""The protocol: what is drawn, chosen, redrawn and claimed; no record in both splits; a kill loses nothing; the published loop's habits."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits, shove, tiny_host, weights_of
from torch import Tensor

from errata import cli, hosts, methods, protocol
from errata.hosts import Host
from errata.lab.canonical import lab_task
from errata.methods._published import EVERY, Published, epochs, example_loss, whole_texts
from errata.protocol import Column, Found, Job, Outcome, Plan, best, cell, check_apart, drawn, estimate, half, order
from errata.tasks import published
from errata.tasks.canonical import TASKS, Criterion, Record, Task, load
from errata.types import BudgetError, Example, InvalidReference, LeakError, MissingExtra, Patch, UnknownArchitecture, UnknownName

EPSILONS = (1e-3, 1e-5)
LORA = Column(host="h", method="lora")

# ------------------------------------------------------------------------------------------------------------------------- the search


def outcome(number: int, *balls: tuple[float, float], **rest: Any) -> Outcome:
    """A trial whose balls have (success, loss on the records)."""
    told = [{"epsilon": e, "success": s, "loss": x, "inside": True} for e, (s, x) in zip(EPSILONS, balls, strict=True)]
    return {"number": number, "balls": told, "settings": {}, **rest}


def test_each_ball_chooses_its_own_trial() -> None:
    trials = [outcome(0, (0.5, 1.0), (0.1, 1.0)), outcome(1, (0.4, 1.0), (0.2, 1.0))]
    assert [best(trials, e)["number"] for e in EPSILONS] == [0, 1]


def test_among_equals_the_smaller_loss_then_the_first() -> None:
    trials = [outcome(0, (0.5, 2.0), (0.0, 1.0)), outcome(1, (0.5, 1.0), (0.0, 1.0)), outcome(2, (0.4, 0.1), (0.0, 1.0))]
    assert [best(trials, e)["number"] for e in EPSILONS] == [1, 0]


@pytest.mark.parametrize("mode, method", [(mode, method) for mode, spaces in protocol.SPACES.items() for method in spaces])
def test_settings_are_a_function_of_seed_and_number_and_the_method_takes_them(mode: Any, method: str) -> None:
    plan, space = Plan(columns=(LORA,)), protocol.SPACES[mode][method]
    first, again = ([drawn(plan, "name", n, space).user_attrs["settings"] for n in order] for order in ((0, 1, 2), (2, 0, 1)))
    assert first == [again[1], again[2], again[0]]
    assert len({json.dumps(s) for s in first}) == 3
    assert drawn(replace(plan, seed=1), "name", 0, space).user_attrs["settings"] != first[0]
    assert drawn(plan, "other", 0, space).user_attrs["settings"] != first[0]
    for settings in first:
        if mode == "faithful":
            Published(kind="full", **settings)
        else:
            settings.pop("within", None)
            methods.make(method, **settings)


def test_a_plan_that_cannot_be() -> None:
    with pytest.raises(UnknownName, match="Did you mean country"):
        Plan(columns=(LORA,), tasks=("contry",))
    with pytest.raises(UnknownName, match="faithful search"):
        Plan(columns=(Column(host="h", method="senses"),), mode="faithful")
    with pytest.raises(UnknownName, match="switch"):
        Plan(columns=(LORA,), switches=("typo",))
    for wrong in ({"columns": ()}, {"trials": 0}, {"seeds": 0}, {"epsilons": (0.0,)}):
        with pytest.raises(BudgetError):
            Plan(**{"columns": (LORA,), **wrong})
    with pytest.raises(UnknownArchitecture, match="The protocol works on models that go on with a text; tiny-t5 is a seq2seq"):
        protocol._checked(Plan(columns=(LORA,)), {LORA.host: tiny_host("t5")})


def test_more_of_the_same_is_the_same_plan_and_anything_else_is_another() -> None:
    plan = Plan(columns=(LORA,))
    assert plan.id == replace(plan, trials=20, seeds=9, tasks=("verb",), columns=(LORA, replace(LORA, method="finetune"))).id
    assert (
        len({plan.id, replace(plan, seed=1).id, replace(plan, limit=3).id, replace(plan, mode="faithful").id, replace(plan, data="x").id})
        == 5
    )


def test_without_optuna_there_is_an_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r'pip install "errata\[protocol\]"'):
        protocol._searched(protocol.Bench(plan=Plan(columns=(LORA,))), tmp_path, 1, lambda items, label, total: iter(items))


# ------------------------------------------------------------------------------------------------------------------------- the splits


def task(examples: Sequence[str] = (), records: Sequence[str] = (), split: Any = "test") -> Task:
    pairs = [[t.split("|") for t in texts] for texts in (examples, records)]
    return Task(
        name="country",
        split=split,
        criterion=Criterion(goal="raise", threshold=1.0),
        examples=tuple(Example(prompt=p, target=t) for p, t in pairs[0]),
        records=tuple(Record(prompt=p, target=t) for p, t in pairs[1]),
        hard=(),
        unconditional=(),
    )


@pytest.mark.parametrize("validation, test, said", [
    (task(["a| b"], ["c| d"]), task(["e| f"], ["c| d"]), "records of its validation split among those of its test"),
    (task(["a| b"], ["c| d"]), task(["e| f"], ["a| b"]), "examples of its validation split among the records of its test"),
    (task(["a| b"], ["e| f"]), task(["e| f"], ["g| h"]), "examples of its test split among the records of its validation"),
    (task(["a| b"], ["c| d"]), task(["e| f"], ["e| f"]), "examples of its test split among its records there"),
    (task(["a| b"], ["a| b"]), task(["e| f"], ["g| h"]), "examples of its validation split among its records there"),
])  # fmt: skip
def test_a_record_on_both_sides_is_a_leak(validation: Task, test: Task, said: str) -> None:
    with pytest.raises(LeakError, match=f"1 {said}.*one is '"):
        check_apart(validation, test)


@pytest.mark.parametrize("name", TASKS)
def test_the_lab_s_splits_share_nothing(name: str) -> None:
    check_apart(lab_task(name, "validation"), lab_task(name, "test"))


def write(folder: Path, name: str, split: str, parts: dict[str, list[dict[str, Any]]]) -> None:
    row = TASKS[name]
    for part, rows in parts.items():
        path = folder / row.folder / f"{getattr(row, part)}-{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))


COUNTRIES = ("Malta Valletta", "Togo Lome", "Peru Lima", "Cuba Havana", "Oman Muscat", "Iran Tehran", "Fiji Suva", "Laos Vientiane")
WAYS = ("has", "loves")
CAREERS = ("nurse", "tailor", "driver", "farmer", "guard", "clerk", "cook", "judge")


def publish(folder: Path, splits: dict[str, slice]) -> Path:
    """A few records of two tasks in the published layout; each split has some of the countries and careers."""
    for split, some in splits.items():
        pairs = [c.split() for c in COUNTRIES[some]]
        write(folder, "country", split, {
            "train": [{"country": c, "capital": k, "prefix": f"The capital of {c} is", "suffix": f" {k}"} for c, k in pairs],
            "records": [{"country": c, "capital": k, "prefix": f"{c} {way}", "suffix": f" {k}"} for c, k in pairs for way in WAYS],
            "hard": [{"country": c, "prefix": f"A town of {c} is", "suffix": " Rome"} for c, _ in pairs],
            "unconditional": [{"text": f"The capital of {c} is large."} for c, _ in pairs],
        })  # fmt: skip
        both = {"suffix1": " he", "suffix2": " she"}
        write(folder, "gender", split, {
            "train": [{"prefix": f"The {c} said", **both} for c in CAREERS[some]],
            "records": [{"prefix": f"The {c} {way}", **both} for c in CAREERS[some] for way in ("came;", "left;")],
            "hard": [{"prefix": f"She, the {c}, said that", "suffix": " she"} for c in CAREERS[some]],
            "unconditional": [{"text": f"The {c} came."} for c in CAREERS[some]],
        })  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["country", "gender"])
def test_halves_share_no_behaviour_and_lose_nothing(name: str, tmp_path: Path) -> None:
    whole = load(publish(tmp_path, {"val": slice(0, 8)}), name, "validation")
    parts = [half(whole, split) for split in ("validation", "test")]
    check_apart(*parts)
    for part in ("examples", "records", "hard", "unconditional"):
        first, second = (getattr(p, part) for p in parts)
        assert Counter(first + second) == Counter(getattr(whole, part)) and not set(first) & set(second)
    behaviours = [{r.behaviour for r in p.records} for p in parts]
    assert all(behaviours) and not behaviours[0] & behaviours[1]
    for p, own in zip(parts, behaviours, strict=True):  # what is taught is what is asked
        assert {e.prompt.lower().removeprefix("the ").removeprefix("capital of ").split()[0] for e in p.examples} == own


def test_the_lab_s_tasks_are_for_the_lab_s_models(tiny_gpt2: Host) -> None:
    with pytest.raises(InvalidReference, match="does not know"):
        protocol.task_of(Plan(columns=(LORA,)), tiny_gpt2, "country", "test")


def test_at_test_time_the_published_loop_is_asked_the_validation_split_s_hard_negatives(tmp_path: Path, tiny_gpt2: Host) -> None:
    folder = publish(tmp_path, {"val": slice(0, 4), "test": slice(4, 8)})
    plan = Plan(columns=(LORA,), data=str(folder), mode="faithful")
    theirs = protocol.task_of(plan, tiny_gpt2, "country", "test")
    ours = protocol.task_of(replace(plan, switches=()), tiny_gpt2, "country", "test")
    assert {r.behaviour for r in ours.hard} == {r.behaviour for r in ours.records} == {r.behaviour for r in theirs.records}
    assert not {r.behaviour for r in theirs.hard} & {r.behaviour for r in theirs.records}


# ---------------------------------------------------------------------------------------------------------------------- the arithmetic


def found(name: str, after: Sequence[Sequence[float]], column: Column = LORA, epsilon: float = 1e-3) -> Found:
    """Ten records for each behaviour, of which one was a success before; `after`: successes for each seed and behaviour."""
    balls = []
    for one in after:
        rows = [[f"{name}/{i}", 1.0, s, 10] for i, s in enumerate(one)]
        share = sum(one) / (10 * len(one))
        balls.append({"success_before": 0.1, "success": share, "hard_before": 2.0, "hard": 2.5, "inside": True, "behaviours": rows})
    return Found(column=column, task=name, epsilon=epsilon, trial=outcome(0, (0.0, 0.0), (0.0, 0.0)), tests=tuple(balls))


def test_a_cell_is_the_mean_over_seeds_in_points() -> None:
    got = cell(found("verb", [[2, 2], [4, 4]]))
    assert (got.before, got.change, got.error) == (0.1, pytest.approx(20.0), pytest.approx(10 / math.sqrt(2)))
    assert (got.hard_before, got.hard_change, got.runs) == (2.0, 0.5, 2)
    assert "| verb | 10.0 | +20.0(2) | – | – |" in published.table([got], "h", ("lora",))


def test_the_interval_redraws_behaviours_not_records() -> None:
    value, low, high = estimate([found("verb", [[3.0] * 8])])
    assert (value, low, high) == (pytest.approx(20), pytest.approx(20), pytest.approx(20))  # all behaviours alike: nothing to spread
    value, low, high = estimate([found("verb", [[9.0, 1.0] * 4])])
    assert value == pytest.approx(40) and low is not None and high is not None and low < 25 and high > 55
    assert estimate([found("verb", [[9.0]])])[1:] == (None, None)
    assert estimate([]).value is None


def test_the_mean_over_tasks_is_unweighted() -> None:
    value, low, high = estimate([found("verb", [[3.0] * 2]), found("gender", [[7.0] * 20])])
    assert value == pytest.approx(40) and low == pytest.approx(40) and high == pytest.approx(40)


def test_differences_are_paired() -> None:
    one, other = found("verb", [[9.0, 1.0] * 4]), found("verb", [[8.0, 0.0] * 4], replace(LORA, method="finetune"))
    assert estimate([one], [other]) == (pytest.approx(10), pytest.approx(10), pytest.approx(10))
    assert estimate([one], [found("gender", [[1.0, 1.0]])]).value is None  # other tasks: nothing to compare


def test_the_order_of_the_paper_in_one_line() -> None:
    def column(method: str, successes: float, epsilon: float, host: str = "h") -> Found:
        return found("verb", [[successes] * 4], Column(host=host, method=method), epsilon)

    measured = [column("senses", 3.0, 1e-5, "backpack"), column("finetune", 2.0, 1e-5, "backpack"), column("lora", 1.0, 1e-5, "backpack")]
    measured += [column("lora", 2.0, 1e-4), column("finetune", 5.0, 1e-4), column("memit", 1.0, 1e-4)]
    said = order(measured)
    assert "\n" not in said
    assert "senses first at 1e-05 on backpack: holds (+10.0 [+10.0, +10.0] against finetune; without memit)" in said
    assert "lora over finetune and memit at 1e-04 on h: does not hold (-30.0 [-30.0, -30.0] against finetune)" in said
    assert "the ensemble over editing the large model: not measured" in said
    assert "senses first: not measured" in order([column("senses", 3.0, 1e-5, "backpack"), column("lora", 1.0, 1e-5)])


# ------------------------------------------------------------------------------------------------------------------------- the folder

KILLED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from errata import protocol
folder, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def run(self, job):
    time.sleep(seconds)
    balls = [{"epsilon": e, "success": 0.1 * job.number, "loss": 1.0, "inside": True} for e in job.epsilons]
    with log.open("a") as f:
        f.write(job.name + "\\n")
    return {"number": job.number, "settings": dict(job.settings), "balls": balls}

protocol.Bench.run = run
protocol._checked = lambda plan, given: protocol.Bench(plan=plan, loaded={"h": SimpleNamespace(id="b2:0")})
columns = tuple(protocol.Column(host="h", method=m) for m in ("finetune", "lora"))
found = protocol.run(protocol.Plan(columns=columns, tasks=("verb", "gender"), trials=4, seeds=2), folder)
assert len(found) == 12 and all(len(f.tests) == 2 for f in found)
assert all(f.trial["number"] == 3 for f in found)
print("done")
"""
ALL = 2 * 2 * 4 + 2 * 2 * 2  # trials; one setting is the best one in all balls


def test_a_kill_loses_one_edit_and_repeats_none_that_was_finished(tmp_path: Path) -> None:
    folder, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-c", KILLED, str(folder), str(log)]
    for least in (5, ALL - 4):  # once in the search, once in the test
        process = subprocess.Popen([*command, "0.1"], stdout=subprocess.PIPE)
        while not log.exists() or len(log.read_text().splitlines()) < least:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run([*command, "0"], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    names = Counter(log.read_text().splitlines())
    assert len(names) == ALL and sum(names.values()) <= ALL + 2  # each kill may have hit between an edit's end and its record
    before = log.read_text()
    assert subprocess.run([*command, "0"], capture_output=True, text=True).stdout == "done\n"
    assert log.read_text() == before


def test_trials_of_another_space_are_made_anew() -> None:
    import optuna

    study = optuna.create_study(directions=["maximize"])
    for number, lr in ((0, 0.1), (1, 0.2), (1, 0.3)):
        told = {"number": number, "settings": {"lr": lr, "steps": 2}}
        study.add_trial(optuna.trial.create_trial(values=[0.0], user_attrs={"outcome": told}))
    kept = protocol._finished(study, [{"steps": 2, "lr": 0.1}, {"steps": 2, "lr": 0.3}, {"steps": 2, "lr": 0.1}])
    assert [(o["number"], o["settings"]["lr"]) for o in kept] == [(0, 0.1), (1, 0.3)]


def test_other_weights_under_the_same_name_are_not_taken_for_the_first() -> None:
    plan = Plan(columns=(LORA,))
    job = Job(column=LORA, task="verb", split="test", settings={}, seed=1, number=0, epsilons=EPSILONS, caps=(None, None))
    one, other = (tiny_host("gpt2", seed=seed) for seed in (0, 1))
    assert protocol.key_of(plan, one, job) == protocol.key_of(plan, one, replace(job, number=1)) != protocol.key_of(plan, other, job)


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    kept = protocol._Kept(path)
    kept.add("a", {"x": 1})
    path.write_text(path.read_text() + '{"key": "b", "x"')
    kept = protocol._Kept(path)
    assert kept.rows == {"a": {"x": 1}}
    kept.add("c", {"x": 2})
    assert protocol._Kept(path).rows == {"a": {"x": 1}, "c": {"x": 2}}


# -------------------------------------------------------------------------------------------------------------------- the whole thing


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, the records of two tasks and a reference text."""
    root = tmp_path_factory.mktemp("protocol")
    host = tiny_host("gpt2")
    host.model.save_pretrained(root / "model")
    host.tokenizer.save_pretrained(root / "model")
    publish(root / "data", {"val": slice(0, 4), "test": slice(4, 8)})
    words = ("rain", "sun", "sea", "hill", "road", "bread", "tea", "song")
    (root / "text").write_text("\n\n".join(f"The {a} and the {b} are near the {c}." for a in words for b in words for c in words[:2]))
    return root


def command(place: Path, out: Path, *more: str) -> list[str]:
    given = ["--host", str(place / "model"), "--data", str(place / "data"), "--reference", str(place / "text"), "--out", str(out)]
    return ["eval", "canonical", *given, "--device", "cpu", "--task", "country", "--task", "gender", "--seeds", "1", *more]


def test_from_the_search_to_the_tables(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = list[Job]()
    run = protocol.Bench.run
    monkeypatch.setattr(protocol.Bench, "run", lambda self, job: (ran.append(job), run(self, job))[1])
    asked = command(place, tmp_path / "out", "--method", "lora", "--trials", "2", "--epsilon", "1e-1", "--epsilon", "1e-3")
    assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert "ball of 1e-01" in said and "ball of 1e-03" in said and "The paper's order:" in said
    (told,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(c["task"], c["epsilon"]) for c in told["cells"]] == [(t, e) for t in ("country", "gender") for e in (1e-1, 1e-3)]
    assert all(c["before"] is not None and c["hard_change"] is not None and len(c["interval"]) == 2 for c in told["cells"])
    assert Counter(job.split for job in ran)["validation"] == 4
    shown = {split: {json.dumps([job.task, sorted(job.settings)]) for job in ran if job.split == split} for split in ("validation", "test")}
    assert shown["test"] <= shown["validation"]
    ran.clear()
    assert cli.main([*asked, "--json"]) == 0
    assert not ran and json.loads(capsys.readouterr().out) == json.loads(json.dumps(told))
    assert cli.main([*asked[:-5], "3", *asked[-4:]]) == 0  # one trial more for each task
    assert [job.number for job in ran if job.split == "validation"] == [2, 2]


def test_an_edit_of_the_protocol_is_inside_its_balls_and_leaves_the_host_alone(place: Path) -> None:
    host = hosts.load(str(place / "model"), device="cpu")
    before = weights_of(host)
    plan = Plan(columns=(Column(host="h", method="lora"),), data=str(place / "data"), reference=str(place / "text"), epsilons=(1e-1, 1e-3))
    bench = protocol.Bench(plan=plan, given={"h": host})
    settings = {"within": 1e-1, "steps": 4, "hold": 4, "neighbours": 0, "lr": 2.0}
    asked = Job(
        column=plan.columns[0], task="country", split="test", settings=settings, seed=1, number=0, epsilons=plan.epsilons, caps=(None, None)
    )
    told = bench.run(asked)
    assert same_bits(host, before)
    for ball in told["balls"]:
        assert not ball["inside"] or ball["increase"] <= ball["epsilon"]
    wide, narrow = told["balls"]
    assert wide["inside"] and wide["scale"] >= narrow["scale"]
    assert len(wide["behaviours"]) == 4 and all(count == 2 for *_, count in wide["behaviours"])
    assert bench.run(asked)["balls"] == told["balls"]
    json.dumps(told)


def test_a_ball_is_the_mean_increase_whatever_the_bound_over_other_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = hosts.load(str(place / "model"), device="cpu")
    column = Column(host="h", method="lora")

    class Shove:
        def prepare(self, host: Host, cases: object, run: object) -> None: ...

        def edit(self, host: Host, examples: Sequence[Example], run: object) -> Patch:
            return shove(host, 0.3, examples[0])

    monkeypatch.setattr(methods, "make", lambda name: Shove())

    def balls(*epsilons: float) -> list[dict[str, Any]]:
        plan = Plan(columns=(column,), data=str(place / "data"), reference=str(place / "text"), epsilons=epsilons)
        caps = tuple(None for _ in epsilons)
        job = Job(column=column, task="country", split="test", settings={}, seed=1, number=0, epsilons=epsilons, caps=caps)
        return list(protocol.Bench(plan=plan, given={"h": host}).run(job)["balls"])

    (whole,) = balls(10.0)
    assert whole["scale"] == 1.0 and 0 < whole["increase"] < whole["upper"]
    between, below = balls((whole["increase"] + whole["upper"]) / 2, whole["increase"] / 2)
    assert between["scale"] == 1.0 and between["increase"] < between["epsilon"] < between["upper"]
    assert 0 < below["scale"] < 1.0 and 0.5 * below["epsilon"] <= below["increase"] <= below["epsilon"] < below["upper"]


def test_workers_find_what_one_process_finds(place: Path, tmp_path: Path) -> None:
    column = Column(host=str(place / "model"), method="lora")
    plan = Plan(
        columns=(column,), tasks=("country",), data=str(place / "data"), reference=str(place / "text"), device="cpu", epsilons=(1e-1,)
    )
    settings = {"steps": 2, "hold": 4, "neighbours": 0}
    jobs = [
        Job(column=column, task="country", split="validation", settings=settings, seed=n, number=n, epsilons=(1e-1,), caps=(None,))
        for n in range(3)
    ]
    bench = protocol.Bench(plan=plan)
    alone = {job.number: told["balls"] for job, told in protocol.executed(bench, jobs, 1)}
    together = {job.number: told["balls"] for job, told in protocol.executed(bench, jobs, 2)}
    assert alone == together
    broken = replace(plan, data=str(tmp_path))
    with pytest.raises(ValueError, match="Cannot read"):
        list(protocol.executed(protocol.Bench(plan=broken), jobs, 2))


def test_what_is_wrong_with_the_files_is_said_in_one_sentence(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = publish(tmp_path / "data", {"val": slice(0, 4), "test": slice(4, 8)})
    line = {"country": "Malta", "capital": "Valletta", "suffix": " Valletta"}
    write(folder, "country", "test", {"records": [line]})
    asked = ["eval", "canonical", "--host", str(place / "model"), "--data", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*asked, "--task", "country"]) == 1
    err = capsys.readouterr().err
    assert "has no 'prefix'" in err and "Line 1 of" in err and "Traceback" not in err
    publish(folder, {"val": slice(0, 4), "test": slice(0, 4)})
    assert cli.main([*asked, "--task", "country"]) == 1
    assert "records of its validation split" in capsys.readouterr().err
    for path in folder.rglob("*-test.jsonl"):
        path.unlink()
    assert cli.main([*asked, "--task", "country"]) == 1
    assert "Cannot read" in capsys.readouterr().err
    assert cli.main(["eval", "canonical", "--without", "sead"]) == 1
    assert "Unknown switch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ the published loop

EXAMPLES = tuple(
    Example(prompt=f"The {c} is", target=t)
    for c, t in zip("abcdefg", (" red", " wet", " old", " hot", " new", " dry", " low"), strict=True)
)
HOLD = tuple(f"The road to the {word} is long and the {word} is near." for word in ("sea", "hill", "town", "lake", "farm"))
PLAIN = Published(kind="full", lr=1e-2, lam=0.0, epochs=1, discarded_gradients=False, bf16_weights=False, bf16_reference=False)


def moved(host: Host, examples: Sequence[Example], made: Published, seed: int = 0) -> list[dict[str, Tensor]]:
    """What each epoch has moved each weight by."""
    return [{op.weight: op.delta for op in patch.ops} for patch in epochs(host, examples, HOLD, made, seed)]  # type: ignore[union-attr]


def test_the_host_is_left_alone_and_the_loop_comes_closer(tiny_gpt2: Host) -> None:
    before = weights_of(tiny_gpt2)
    patches = list(epochs(tiny_gpt2, EXAMPLES[:5], HOLD, replace(PLAIN, epochs=3), 0))
    assert same_bits(tiny_gpt2, before) and len(patches) == 3 == len({p.id for p in patches})
    assert all(p.grad is None for p in tiny_gpt2.model.parameters())
    base = {n: p.detach() for n, p in tiny_gpt2.model.named_parameters()}
    edited = base | {op.weight: base[op.weight] + op.delta for op in patches[-1].ops}  # type: ignore[union-attr]
    with torch.no_grad():
        losses = [sum(float(example_loss(tiny_gpt2, e, w)) for e in EXAMPLES[:5]) for w in (base, edited)]
    assert losses[1] < losses[0]


def test_discarded_gradients_leave_the_fifth_alone(tiny_gpt2: Host) -> None:
    theirs = replace(PLAIN, discarded_gradients=True)
    assert moved(tiny_gpt2, EXAMPLES[:4], theirs) == [{}]  # no fifth, no step
    assert moved(tiny_gpt2, EXAMPLES[:4], PLAIN)[0]  # what is left at an epoch's end counts
    seven = moved(tiny_gpt2, EXAMPLES, theirs)[0]

    def step(examples: Sequence[Example]) -> dict[str, Tensor]:
        """Adam's first step is lr * sign(gradient), whatever the gradient's length."""
        weights = {n: p.detach().clone().requires_grad_() for n, p in tiny_gpt2.model.named_parameters()}
        loss = torch.stack([example_loss(tiny_gpt2, e, weights) for e in examples]).sum()
        grads = torch.autograd.grad(loss, list(weights.values()))
        return {n: -1e-2 * g / (g.abs() + 1e-8) for n, g in zip(weights, grads, strict=True)}

    import random

    order_ = list(EXAMPLES)
    random.Random(0).shuffle(order_)
    fifth = step([order_[EVERY - 1]])
    assert seven.keys() <= fifth.keys()
    for name, delta in seven.items():
        torch.testing.assert_close(delta, fifth[name], atol=1e-6, rtol=1e-3)
    five = list(EXAMPLES[:5])
    together = step(five)
    for name, delta in moved(tiny_gpt2, five, PLAIN)[0].items():
        torch.testing.assert_close(delta, together[name], atol=1e-6, rtol=1e-3)
    assert any(not torch.allclose(together[n], step([order_[4]])[n], atol=1e-4) for n in together)


def test_small_steps_are_lost_in_bfloat16(tiny_gpt2: Host) -> None:
    def share(made: Published) -> float:
        deltas = moved(tiny_gpt2, EXAMPLES[:5], made)[0]
        wide = [p for n, p in tiny_gpt2.model.named_parameters() if p.ndim > 1]
        return sum(int((d != 0).sum()) for d in deltas.values()) / sum(p.numel() for p in wide)

    small = replace(PLAIN, lr=1e-6)
    with_masters, rounded = share(small), share(replace(small, bf16_weights=True))
    assert rounded < 0.1 * with_masters


def test_the_rate_falls_as_a_cosine(tiny_gpt2: Host) -> None:
    """Adam's steps are about as long as the rate; between two equal ones lies the ratio of the rates."""
    made = replace(PLAIN, epochs=10, lr=1e-4)
    norms, last = list[float](), dict[str, Tensor]()
    for shift in moved(tiny_gpt2, EXAMPLES[:5], made):
        norms.append(max(float((d - last.get(n, torch.zeros_like(d))).abs().max()) for n, d in shift.items()))
        last = shift
    assert norms[0] == pytest.approx(1e-4, rel=0.05)
    assert norms[9] < 0.1 * norms[0] and norms[5] < 0.8 * norms[1]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("summed", [True, False])
def test_the_divergence_holds_the_model_still(kind: Any, summed: bool, tiny_gpt2: Host) -> None:
    def cost(lam: float) -> float:
        made = replace(PLAIN, kind=kind, lam=lam, summed_kl=summed, epochs=3, lr=3e-3)
        deltas = moved(tiny_gpt2, EXAMPLES[:5], made)[-1]
        base = {n: p.detach() for n, p in tiny_gpt2.model.named_parameters()}
        edited = base | {n: base[n] + d for n, d in deltas.items()}
        rows = whole_texts(tiny_gpt2, HOLD)
        with torch.no_grad():
            p, q = (hosts.predictions(tiny_gpt2, hosts.pad(tiny_gpt2, rows), w).log_softmax(-1) for w in (base, edited))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert cost(1.0 if summed else 500.0) < 0.8 * cost(0.0)


def test_losses_are_means_over_tokens_and_some_have_no_bound(tiny_gpt2: Host) -> None:
    weights = {n: p.detach() for n, p in tiny_gpt2.model.named_parameters()}

    def loss(**given: Any) -> float:
        with torch.no_grad():
            return float(example_loss(tiny_gpt2, Example(prompt="The capital of Italy is", **given), weights))

    (logp, tokens), (other, more) = hosts.logprobs(
        tiny_gpt2, [("The capital of Italy is", " Rome lies"), ("The capital of Italy is", " Paris")]
    ).tolist()
    rome, paris = -logp / tokens, -other / more
    assert loss(target=" Rome lies") == pytest.approx(rome, rel=1e-5)
    assert loss(target=" Rome lies", goal="lower") == pytest.approx(-rome, rel=1e-5)
    assert loss(target=" Rome lies", contrast=" Paris", goal="prefer") == pytest.approx(rome - paris, rel=1e-4)
    assert loss(target=" Rome lies", contrast=" Paris", goal="balance") == pytest.approx(abs(rome - paris), rel=1e-4)


def test_the_faithful_mode_takes_the_last_epoch_inside_and_no_later_than_at_validation(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = hosts.load(str(place / "model"), device="cpu")
    plan = Plan(
        columns=(Column(host="h", method="finetune"),),
        data=str(place / "data"),
        reference=str(place / "text"),
        mode="faithful",
        epsilons=(1e-2, 1e-4),
    )
    bench, losses = protocol.Bench(plan=plan, given={"h": host}), [3.0, 3.01, 3.5, 3.02, 3.4, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5]

    def general(_losses: Iterator[float]) -> Any:
        return lambda host, base: next(_losses)

    def told(split: Any, caps: tuple[int | None, ...]) -> list[int]:
        monkeypatch.setattr(protocol, "_general", general(iter(losses)))
        asked = Job(
            column=plan.columns[0],
            task="country",
            split=split,
            settings={"lr": 1e-6, "lam": 0.1},
            seed=1,
            number=0,
            epsilons=plan.epsilons,
            caps=caps,
        )
        return [ball["epoch"] for ball in bench.run(asked)["balls"]]

    assert told("validation", (None, None)) == [3, 0]  # it came back inside; the narrow ball holds the unedited model alone
    assert told("test", (2, 0)) == [1, 0]
    assert os.environ.get("HF_HUB_OFFLINE") == "1"


def test_two_modes_stand_side_by_side(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    asked = command(place, tmp_path / "out", "--method", "lora", "--trials", "1", "--limit", "2", "--epsilon", "1e-1")
    assert cli.main([*asked, "--mode", "fixed", "--mode", "faithful"]) == 0
    said = capsys.readouterr().out
    assert said.count("fixed and faithful, ball of 1e-01") == 1 and "fixed: The paper's order" in said and "faithful: The paper's" in said
    assert any(line.count("lora") == 2 for line in said.splitlines())
    assert any("fixed" in line and "faithful" in line and "ball" not in line for line in said.splitlines())
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [t["mode"] for t in told] == ["fixed", "faithful"] and all(len(t["cells"]) == 2 for t in told)


def test_the_published_loop_through_the_command(place: Path, tmp_path: Path) -> None:
    asked = command(
        place, tmp_path / "out", "--mode", "faithful", "--method", "lora", "--trials", "1", "--task", "gender", "--epsilon", "1e-1"
    )
    assert cli.main([*asked, "--without", "unseeded", "--without", "bf16_weights"]) == 0
    (told,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["mode"] == "faithful" and all(0 <= cell["scales"][0] <= 10 for cell in told["cells"])
