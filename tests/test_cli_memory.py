"""The verbs of the edit memory, as text and as JSON, and bad input as one sentence. No model is loaded for any of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import Done, run
from test_ledger import BASE, BUDGET

from errata.ledger import Ledger


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


def test_the_encoder_is_the_memorys_own(at: Path, tmp_path: Path) -> None:
    from test_memory_encoder import folder_of

    say(at, "add", MALI)
    folder = folder_of(tmp_path / "tiny")
    assert "is of the encoder hashed" in refused(at, "search", "Mali", "--encoder", folder)
    assert say(at, "move", folder)[0]["encoder"] == str(folder)
    assert say(at, "search", "The capital of Mali is")[0]["score"] > 0.99
