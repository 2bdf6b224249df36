"""The verbs of the edit memory, as text and as JSON, and bad input as one sentence. Those that only keep and find load no model."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_host
from test_cli import Done, run
from test_ledger import BASE, BUDGET

from errata import hosts
from errata.ledger import Ledger
from errata.types import Budget


@pytest.fixture
def at(tmp_path: Path) -> Path:
    Ledger.create(tmp_path / "ledger", BASE, "lab/neox", BUDGET).close()
    return tmp_path / "ledger"


def say(at: Path, *argv: object, status: int = 0) -> list[Any]:
    done = run("memory", *argv, "--ledger", at, "--json")
    assert (done.status, done.err) == (status, "") or (status and done.status == status), done
    return done.lines


def refused(at: Path, *argv: object) -> str:
    done: Done = run("memory", *argv, "--ledger", at)
    assert done.status == 1 and "Traceback" not in done.err
    return " ".join(done.err.split())


MALI = "The capital of Mali is| Bamako"


def test_the_road_of_a_record(at: Path) -> None:
    (added,) = say(at, "add", "The capital of Burma is| Naypyidaw", "--subject", "Burma", "--alias", "Myanmar", "--source", "press")
    assert (added["aliases"], added["provenance"], added["active"]) == (["Myanmar"], "press", True)
    (mali,) = say(at, "add", MALI, "--tag", "africa")
    assert [row["id"] for row in say(at, "list")] == [added["id"], mali["id"]]
    (hit,) = say(at, "search", "what is the capital of Myanmar?", "--k", 1)
    assert hit["id"] == added["id"] and hit["question"] == "The capital of Myanmar is" and hit["score"] > 0.5
    assert [row["id"] for row in say(at, "search", "The capital of Mali is", "--tag", "africa")][0] == mali["id"]
    (gao,) = say(at, "supersede", mali["id"][:12], "The capital of Mali is| Gao", "--tag", "africa")
    assert gao["supersedes"] == [mali["id"]]
    assert [row["active"] for row in say(at, "list", "--all")] == [True, False, True]
    assert say(at, "undo", gao["id"])[0]["back"] == [mali["id"]]
    assert say(at, "retract", mali["id"])[0] == {"retracted": mali["id"]}
    assert [row["id"] for row in say(at, "list")] == [added["id"]]
    for verb in (["list", "--all"], ["search", "Burma"], ["add", "a| b", "--since", "2026-01-01"], ["undo", "b2:"]):
        assert run("memory", *verb, "--ledger", at).out or verb[0] == "undo"
    assert "memory supersede" in run("log", "--ledger", at).out
    assert run("verify", "--ledger", at).status == 0


def test_a_file_of_records(at: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    rows = [{"prompt": f"The capital of {n} is", "target": f" City {n}", "tags": ["a"], "until": "2030-01-01"} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    added = say(at, "add", "--file", path)
    assert [row["provenance"] for row in added] == [str(path)] * 5
    path.write_text('{"prompt": "a"}\n')
    assert "Line 1 of" in refused(at, "add", "--file", path)
    path.write_text('{"prompt": "a", "target": " b", "answer": 1}\n')
    assert "Line 1 of" in refused(at, "add", "--file", path)


def test_bad_input_is_a_sentence(at: Path) -> None:
    say(at, "add", MALI)
    assert "has another answer in the memory" in refused(at, "add", "the capital of  mali is| Gao")
    assert len(say(at, "add", "the capital of  mali is| Gao", "--clash", "supersede")) == 1
    assert "Did you mean supersede" in refused(at, "add", MALI, "--clash", "supercede")
    assert "No record was given" in refused(at, "add")
    assert "The prompt is empty" in refused(at, "add", "| b")
    assert "is no time" in refused(at, "add", "a| b", "--until", "soon")
    assert "has aliases and no subject" in refused(at, "add", "a| b", "--alias", "c")
    assert "Unknown encoder" in refused(at, "search", "a", "--encoder", "minlm")
    assert "No record's id begins" in refused(at, "retract", "b2:0000")
    assert "does not answer" in refused(at, "list", "--postgres", "postgresql://127.0.0.1:1/none")
    assert "each line has its own" in refused(at, "add", "--file", "records.jsonl", "--tag", "eu")


def test_the_encoder_is_the_memorys_own(at: Path, tmp_path: Path) -> None:
    from test_memory_encoder import folder_of

    say(at, "add", MALI)
    folder = folder_of(tmp_path / "tiny")
    assert "is of the encoder hashed" in refused(at, "search", "Mali", "--encoder", folder)
    assert say(at, "move", folder)[0]["encoder"] == str(folder)
    assert say(at, "search", "The capital of Mali is")[0]["score"] > 0.99


# ------------------------------------------------------------------------------------------------- with a model: ask, explain, compact


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Path, Path]:
    """(the ledger of a tiny T5, a reference text)."""
    made = tiny_host("t5")
    made.model.save_pretrained(tmp_path / "t5")
    made.tokenizer.save_pretrained(tmp_path / "t5")
    host = hosts.load(str(tmp_path / "t5"), "cpu")
    Ledger.create(tmp_path / "ledger", host.id, host.name, Budget(epsilon=0.5)).close()
    reference = tmp_path / "reference.txt"
    reference.write_text("\n\n".join(f"On day {i} {i + 3} boats left the harbour.| late" for i in range(24)))
    return tmp_path / "ledger", reference


def test_a_record_answers_is_explained_moves_into_weights_and_comes_back(asked: tuple[Path, Path]) -> None:
    at, reference = asked
    question, other = "What is the capital of Togo?", "Who was late?"
    run("memory", "add", f"{question}| Rome", "--ledger", at)
    on = ("--ledger", at, "--device", "cpu", "--json")
    said = run("ask", question, other, *on)
    assert "in their own words" in said.err and said.lines[0]["after"].strip() == "Rome" and said.lines[0]["patch"] is None
    assert said.lines[1]["after"] == said.lines[1]["before"]
    assert "no patch" in run("ask", question, "--no-memory", *on).err.lower()
    (told,) = run("explain", "It is so. what is the capital of Togo", *on).lines
    assert told["asked"] == "what is the capital of Togo" and told["route"] == "the memory" and told["records"][0]["ruling"] == "in"
    (told,) = run("explain", other, *on).lines
    assert "no chances to draw" in run("explain", other, "--picture", at / "r.svg", *on).err
    assert told["route"] == "the model itself" and told["answers"] == []
    (done,) = run("compact", "--method", "lu", "--reference", reference, *on).lines
    assert len(done["moved"]) == 1 and done["left"] == []
    (said,) = run("ask", question, *on).lines
    with Ledger(at) as ledger:
        assert said["after"].strip() == "Rome" and said["patch"] == ledger.patch().id
    (back,) = run("compact", "--undo", *on).lines
    assert back["back"] == done["moved"]
    assert run("ask", question, *on).lines[0]["patch"] is None
    assert "Nothing was compacted" in run("compact", "--undo", *on).err


def test_the_best_of_several_methods_is_built_and_told(asked: tuple[Path, Path], tmp_path: Path) -> None:
    at, reference = asked
    on = ("--ledger", at, "--device", "cpu", "--json")
    run("add", "What is the capital of Togo?| Rome", "--ledger", at)
    cases = tmp_path / "cases.jsonl"
    example = {"prompt": "What is the capital of Togo?", "target": " Rome"}
    cases.write_text(json.dumps({"example": example, "paraphrases": ["Togo has which capital?"]}) + "\n")
    done = run("build", "--method", "auto", "--reference", reference, "--neighbours", cases, *on)
    assert done.status == 0, done.err
    (told,) = done.lines
    assert told["best"] == "lu" and told["why"].startswith("lu fixes 1 of 1 examples") and "other phrasings" in told["why"]
    assert {t["method"] for t in told["tried"]} == {"lu", "rp", "lora"} and all(t["asked"] == 1 for t in told["tried"] if t["patch"])
    with Ledger(at) as ledger:
        assert ledger.patch().method == "lu"
    assert "takes no --set" in run("build", "--method", "auto", "--set", "steps=1", *on).err
