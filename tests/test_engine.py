"""Workers: the bits are those of one process, a worker's death changes nothing, and what goes wrong there is said here.

One Ray of this machine, with two workers, serves the whole file.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, shove, tiny_host
from test_cli import run as cli
from test_meta import CASES, malmen, mend
from work import deadly, sleeping

from errata import apply, build, engine, hosts
from errata.hosts import Host
from errata.methods import _gradients
from errata.methods.alphaedit import Alphaedit
from errata.methods.memit import Memit
from errata.methods.ultraedit import Ultraedit
from errata.types import Budget, EngineError, Example, InvalidExample, MissingExtra, Run, Spread, UnknownName, WrongBase, here

EXAMPLES = tuple(Example(prompt=f"Town {i} lies in the land of", target=f" Port Louis number {7 * i}") for i in range(150))
RUN = Run(hold=TEXT * 2, budget=Budget(epsilon=10.0))


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gradients, "AT_ONCE", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers find the model too."""
    tiny, to = tiny_host("gpt2"), tmp_path_factory.mktemp("model")
    tiny.model.save_pretrained(to)
    tiny.tokenizer.save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def saved(folder: Path) -> Host:
    return hosts.load(str(folder), "cpu")


@pytest.fixture(scope="module")
def two() -> Iterator[Spread]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        with engine.on_ray(workers=2) as spread:
            yield spread


VALUES: dict[str, Any] = {"layers": "0", "steps": 3, "contexts": 1, "batch_size": 32}  # several shards


@pytest.mark.parametrize(
    "method",
    [Ultraedit(held=4), malmen(rounds=2, tokens="all"), mend(), Memit(held=4, **VALUES), Alphaedit(held=0, **VALUES)],
    ids=["ultraedit", "malmen", "mend", "memit", "alphaedit"],
)
def test_the_patch_is_the_same(saved: Host, two: Spread, method: Any, tmp_path: Path) -> None:
    """Also where a worker is killed on the way."""
    run = replace(RUN, state=method.prepare(saved, CASES, RUN))
    wanted = method.edit(saved, EXAMPLES, run)
    assert method.spreads and method.edit(saved, EXAMPLES, replace(run, spread=two)).id == wanted.id
    assert method.edit(saved, EXAMPLES, replace(run, spread=deadly(two, tmp_path / "killed", 1))).id == wanted.id
    assert (tmp_path / "killed").exists() and wanted.id != method.edit(saved, EXAMPLES[:-1], run).id


def test_a_worker_that_is_killed_changes_neither_the_patch_nor_that_there_is_one(
    saved: Host, two: Spread, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = Ultraedit(held=0).edit(saved, EXAMPLES, RUN).id
    assert Ultraedit(held=0).edit(saved, EXAMPLES, replace(RUN, spread=deadly(two, tmp_path / "killed", 1))).id == wanted
    assert (tmp_path / "killed").exists()
    assert capfd.readouterr().out == "", "nothing gets among the results"


@pytest.mark.parametrize("method", [malmen(), mend()], ids=["malmen", "mend"])
def test_meta_training_ends_in_the_same_state_and_so_it_does_where_a_worker_is_killed(
    saved: Host, two: Spread, method: Any, tmp_path: Path
) -> None:
    wanted, spread = method.prepare(saved, CASES, RUN).id, two
    if method == malmen():
        spread = deadly(two, tmp_path / "killed", 2)  # where there is a third shard: in the measuring of a step
    assert method.prepare(saved, CASES, replace(RUN, spread=spread)).id == wanted
    assert (tmp_path / "killed").exists() == (method == malmen())


def test_results_come_in_the_order_of_the_shards_whatever_comes_first(saved: Host, two: Spread) -> None:
    shards = [0.2, *[0.0] * 9]
    assert list(two(saved, sleeping, shards, 7)) == list(here(saved, sleeping, shards, 7)) == [(i, 7) for i in shards]
    assert list(two(saved, sleeping, [], 7)) == []


def test_a_mistake_is_said_as_if_it_had_been_made_here(saved: Host, two: Spread) -> None:
    long = Example(prompt="Once upon a time " * 60, target=" there")
    with pytest.raises(InvalidExample, match="reads at most 128. Shorten the prompt"):
        Ultraedit(held=0).edit(saved, (*EXAMPLES[:3], long), replace(RUN, spread=two))


def test_a_patch_that_is_on_stays_here(saved: Host, two: Spread) -> None:
    with apply.applied(saved, shove(saved, 0.1)), pytest.raises(WrongBase, match="wears patch b2:.* Take the patch off"):
        Ultraedit(held=0).edit(saved, EXAMPLES[:3], replace(RUN, spread=two))


def test_workers_that_do_not_fit_are_not_waited_for(saved: Host, two: Spread) -> None:
    with engine.on_ray(workers=1000) as many, pytest.raises(EngineError, match="1000 workers .* do not fit"):
        list(many(saved, sleeping, [0.0], 7))
    with pytest.raises(EngineError, match="1 or more, not 0"), engine.on_ray(workers=0):
        pass


def test_a_worker_refuses_other_weights_and_a_name_that_means_nothing(saved: Host, folder: Path) -> None:
    worker = engine.Worker(str(folder), "b2:other", torch.float32, "cpu", torch.get_num_threads())
    with pytest.raises(WrongBase, match="has the weights b2:other here, and b2:.* where a worker loads it"):
        worker.do([], b"")
    worker = engine.Worker("tiny-gpt2", saved.id, torch.float32, "cpu", torch.get_num_threads())
    with pytest.raises(UnknownName, match="Cannot load 'tiny-gpt2'"):
        worker.do([], b"")


def test_without_ray_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r'pip install "errata\[ray\]"'), engine.on_ray():
        pass


def test_a_cluster_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(EngineError, match=f"No Ray cluster to be had at {address}: .*refused"), engine.on_ray(address=address):
            pass


def test_an_engine_is_local_or_ray() -> None:
    with engine.chosen("local") as spread:
        assert spread is here
    with pytest.raises(UnknownName, match="Unknown engine 'rya'. Did you mean ray"), engine.chosen("rya"):
        pass


@pytest.fixture
def held(tmp_path: Path) -> Path:
    path = tmp_path / "held.txt"
    path.write_text("\n\n".join(f"{i}. {document}" for i in range(6) for document in TEXT))
    return path


def test_the_main_road_hands_the_spread_on(saved: Host, two: Spread, held: Path) -> None:
    used = []

    def watched(*given: Any) -> Iterator[Any]:
        used.append(len(given[2]))
        return two(*given)

    patch, _ = build.edit(saved, EXAMPLES[:3], "ultraedit", held=0, epsilon=1e6, reference=held, spread=watched)
    assert used == [1] and patch.id == build.edit(saved, EXAMPLES[:3], "ultraedit", held=0, epsilon=1e6, reference=held)[0].id


def test_the_command_line_builds_and_prepares_on_workers(
    saved: Host, two: Spread, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the crew that is there already; what is kept is what one process keeps."""

    @contextmanager
    def there(engine: str, workers: int, address: str | None) -> Iterator[Spread]:
        used.append((engine, workers, address))
        yield two if engine == "ray" else here

    used: list[tuple[str, int, str | None]] = []
    monkeypatch.setattr(engine, "chosen", there)
    monkeypatch.chdir(tmp_path)
    Path("cases.jsonl").write_text("\n".join(json.dumps(c.as_dict()) for c in CASES))
    small = [f"--set={key}={value}" for key, value in (("steps", 2), ("rank", 4), ("near", 2), ("hold", 2), ("held", 0))]
    made = []
    for name in ("local", "ray"):
        assert cli("init", name, "--host", saved.name, "--device", "cpu", "--epsilon", 1e6, "--fixed", 0).status == 0
        assert cli("add", "The capital of Mauritius is| Port Louis", "--ledger", name).status == 0
        on = (*small, "--reference", held, "--ledger", name, "--engine", name, "--workers", 2, "--device", "cpu", "--json")
        state = cli("prepare", "malmen", "--cases", "cases.jsonl", *on).data["state"]
        made.append((state, cli("build", "--method", "malmen", *on).data["patch"]))
    assert made[0] == made[1]
    assert used == [("local", 2, None)] * 2 + [("ray", 2, None)] * 2
    tuned = ("--method", "finetune", "--set=steps=1", "--set=restated=0", "--reference", held, "--ledger", "ray", "--device", "cpu")
    done = cli("build", *tuned, "--engine", "ray")
    assert "nothing to share among workers: it is built here" in " ".join(done.err.split()) and used[-1][0] == "local"
    alone = cli("build", "--engine", "rya", "--ledger", "ray")
    assert alone.status == 1 and "Unknown engine 'rya'" in alone.err
