"""The index finds what comparing everything finds, while vectors come and go; its file is believed only if it is whole."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.memory import index as room
from errata.memory.index import Index
from errata.types import LedgerError, MissingExtra, WrongBase

pytest.importorskip("usearch", reason='needs usearch: pip install "errata[memory]"')
WIDTH = 24


def draw(n: int, seed: int = 0, cluster: int = 4) -> np.ndarray:
    """(n, WIDTH) unit vectors in clusters, as rephrases are; rounded as the cache rounds them."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((-(-n // cluster), WIDTH)), cluster, axis=0)[:n]
    rows = centres + 0.3 * rng.standard_normal((n, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def numbers(*given: int) -> np.ndarray:
    return np.array(given, dtype=np.int64)


def whole(rows: dict[int, np.ndarray], query: np.ndarray, k: int) -> list[int]:
    scores = {number: float(row.astype(np.float32) @ query) for number, row in rows.items()}
    return sorted(scores, key=lambda number: (-scores[number], -number))[:k]


def query(seed: int) -> np.ndarray:
    return draw(1, seed)[0].astype(np.float32)


def filled(n: int, exact: int = 50) -> Index:
    made = Index(WIDTH, exact)
    made.add(np.arange(n), draw(n))
    return made


@pytest.mark.parametrize("n", [0, 1, 7, 300])
def test_exact_is_comparing_everything(n: int) -> None:
    made, rows = filled(n, exact=1000), dict(enumerate(draw(n)))
    for seed in range(5):
        found, scores = made.search(query(seed), 8)
        assert found.tolist() == whole(rows, query(seed), 8)
        assert (np.diff(scores) <= 0).all() and len(scores) == min(n, 8)


def test_of_equal_ones_the_newer_stands_first() -> None:
    made = Index(WIDTH)
    made.add(np.arange(5), np.repeat(draw(1), 5, axis=0))
    assert made.search(query(3), 5)[0].tolist() == [4, 3, 2, 1, 0]


STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "fold"]), st.integers(0, 30)), max_size=25)


@given(STEPS)
def test_coming_going_and_folding_in_any_order(steps: list[tuple[str, int]]) -> None:
    made, model, rows = Index(WIDTH, exact=10), dict[int, np.ndarray](), draw(2000)
    new = 0
    for what, number in steps:
        if what == "add":
            made.add(np.arange(new, new + number), rows[new : new + number])
            model |= {n: rows[n] for n in range(new, new + number)}
            new += number
        elif what == "remove":
            made.remove(numbers(number, 5000))
            model.pop(number, None)
        else:
            made.fold()
        assert len(made) == len(model)
        found, _ = made.search(query(number), 8)
        assert found.tolist() == whole(model, query(number), 8)  # so few that the graph is searched whole


def test_a_graph_finds_nearly_what_comparing_everything_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = filled(3000), draw(3000)
    assert made.due
    made.fold()
    assert not made.due and made.folded == 3000
    made.remove(np.arange(0, 400))
    made.add(np.arange(3000, 3100), draw(3100)[3000:])
    model = dict(enumerate(draw(3100))) | dict(enumerate(rows))
    model = {n: row for n, row in model.items() if n >= 400}
    found = [len(set(made.search(query(s), 8)[0].tolist()) & set(whole(model, query(s), 8))) for s in range(100)]
    assert sum(found) / 800 > 0.98


def test_it_is_made_anew_when_much_of_it_is_gone() -> None:
    made = filled(500)
    made.fold()
    made.remove(np.arange(0, 101))
    assert made.due
    made.fold()
    assert (made.folded, len(made._graph), made._gone) == (399, 399, set())
    assert set(made.search(query(1), 399)[0].tolist()) == set(range(101, 500))


# --------------------------------------------------------------------------------------------------------------------------- files


MOMENT = (17, "2026-11-22 b2:1")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = filled(300)
    made.fold()
    made.remove(numbers(3))
    made.save(tmp_path / "graph.json", "b2:a", MOMENT)
    made.save(tmp_path / "graph.json", "b2:a", MOMENT)  # the first one's body is removed
    assert len(list(tmp_path.iterdir())) == 2
    return tmp_path / "graph.json"


def test_a_saved_graph_is_the_one_that_was(tmp_path: Path) -> None:
    made, again = filled(300), Index(WIDTH, 50)
    made.fold()
    made.remove(numbers(3))
    made.save(tmp_path / "graph.json", "b2:a", MOMENT)  # this one: threads make another graph of the same vectors each time
    assert again.load(tmp_path / "graph.json", "b2:a") == MOMENT
    assert len(again) == len(made) == 299
    for seed in range(20):
        assert again.search(query(seed), 8)[0].tolist() == made.search(query(seed), 8)[0].tolist()
    again.add(numbers(300), draw(1, 9))  # it can be extended
    again.fold()
    assert len(again) == 300


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert Index(WIDTH).load(tmp_path / "graph.json", "b2:a") is None


def test_a_file_of_another_encoder_is_refused(saved: Path) -> None:
    with pytest.raises(WrongBase, match="is of the encoder b2:a, and this memory is of b2:b"):
        Index(WIDTH).load(saved, "b2:b")
    with pytest.raises(WrongBase):
        Index(WIDTH + 1).load(saved, "b2:a")


def body(path: Path) -> Path:
    (found,) = path.parent.glob("*.usearch")
    return found


DAMAGES: dict[str, Any] = {
    "cut": lambda path: body(path).write_bytes(body(path).read_bytes()[:-100]),
    "flipped": lambda path: body(path).write_bytes(body(path).read_bytes()[:200] + b"\xff" + body(path).read_bytes()[201:]),
    "missing": lambda path: body(path).unlink(),
    "head cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "head empty": lambda path: path.write_bytes(b""),
    "head of another kind": lambda path: path.write_text("[]"),
    "head of a later format": lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "errata-index-9"})),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_refused(saved: Path, how: str) -> None:
    DAMAGES[how](saved)
    with pytest.raises(LedgerError, match="is damaged"):
        Index(WIDTH).load(saved, "b2:a")


def test_a_disk_that_refuses_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    made = filled(100)
    made.fold()
    with monkeypatch.context() as hard_times:
        hard_times.setattr(room.os, "replace", full)
        with pytest.raises(LedgerError, match="cannot be written"):
            made.save(saved, "b2:a", (18, "later"))
    assert Index(WIDTH).load(saved, "b2:a") == MOMENT


def test_without_usearch_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("usearch"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    made = filled(100)
    with pytest.raises(MissingExtra, match=r"pip install \"errata\[memory\]\""):
        made.fold()
    assert len(made.search(query(1), 8)[0]) == 8
