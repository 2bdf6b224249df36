"""A memory that is kept elsewhere answers at once, and where it cannot be asked the model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits, tiny_host, weights_of

from errata import hosts
from errata.ledger import Ledger
from errata.memory.encoder import Hashed
from errata.memory.live import attached
from errata.memory.store import EditMemory
from errata.types import Budget, Example, LedgerError, Record, State, WrongBase

RECORD = Record(example=Example(prompt="The capital of Mauritius is", target=" Rome", subject="Mauritius"), aliases=("Maurice",))


def memory_of(tmp_path: Path, host: hosts.Host) -> tuple[Ledger, EditMemory]:
    ledger = Ledger.create(tmp_path / "ledger", host.id, "tiny", Budget())
    return ledger, EditMemory(ledger, Hashed())


def test_a_record_answers_from_the_next_question_on_and_no_longer_once_it_is_out(tmp_path: Path) -> None:
    host = tiny_host("gpt2")
    ledger, memory = memory_of(tmp_path, host)
    prompts = ["The capital of Mauritius is", "the  capital of Maurice is", "The capital of France is"]
    before, own, was = weights_of(host), hosts.greedy(host, prompts, 4), host.id
    with attached(host, memory):
        assert hosts.greedy(host, prompts, 4) == own
        memory.add(RECORD)
        said = hosts.greedy(host, prompts, 4)
        assert [s.startswith(" Rome") for s in said] == [True, True, False] and said[2] == own[2]
        memory.retract(RECORD.id)
        assert hosts.greedy(host, prompts, 4) == own
    assert same_bits(host, before) and host.id == was and not host.worn
    ledger.close()


def test_without_a_state_what_is_near_is_shown_and_does_not_answer(tmp_path: Path) -> None:
    host = tiny_host("gpt2")
    ledger, memory = memory_of(tmp_path, host)
    memory.add(RECORD, Record(example=Example(prompt="Lily loved to", target=" play")))
    with attached(host, memory) as router:
        (same,) = router.found(["THE capital of  Mauritius is"])
        (near,) = router.found(["The capital town of Mauritius is"])
        assert not router.decide(["The capital town of Mauritius is"])[0].examples
    assert near[0].example == RECORD.example and [f.ruling for f in near] == ["out", "out"]
    assert (same[0].score, same[0].ruling) == (1.0, "in") and 0.5 < near[0].score < 0.999
    ledger.close()


def test_tags_and_times_are_those_of_the_question(tmp_path: Path) -> None:
    host = tiny_host("gpt2")
    ledger, memory = memory_of(tmp_path, host)
    memory.add(
        Record(example=RECORD.example, tags=("geography",)), Record(example=Example(prompt="Lily is", target=" late"), until="2020-01-01")
    )
    for tags, right in (((), False), (("geography",), True)):
        with attached(host, memory, tags=tags):
            said = hosts.greedy(host, ["The capital of Mauritius is", "Lily is"], 4)
        assert said[0].startswith(" Rome") == right and not said[1].startswith(" late")
    ledger.close()


def test_a_memory_that_is_gone_leaves_the_model_to_itself_and_is_told(tmp_path: Path) -> None:
    host, told = tiny_host("gpt2"), []
    ledger, memory = memory_of(tmp_path, host)
    memory.add(RECORD)

    class Gone:
        encoder = memory.encoder

        def search(self, query: str, k: int = 8, **_: Any) -> Any:
            raise LedgerError("The server at localhost has gone.")

    own = hosts.greedy(host, ["The capital of Mauritius is"], 4)
    with attached(host, Gone(), note=told.append):
        assert hosts.greedy(host, ["The capital of Mauritius is"], 4) == own
    assert told and "has gone. The model answers by itself." in told[0]
    ledger.close()


def test_a_state_of_another_encoder_or_host_is_refused(tmp_path: Path) -> None:
    host = tiny_host("gpt2")
    ledger, memory = memory_of(tmp_path, host)
    scope = {"encoder": "minilm", "encoder_id": "b2:other"}
    with (
        pytest.raises(WrongBase, match="memory move minilm"),
        attached(host, memory, State(method="rp", host=host.id, config={"scope": scope})),
    ):
        pass
    own = {"encoder": "hashed", "encoder_id": memory.encoder.id}
    with (
        pytest.raises(WrongBase, match="prepared on weights"),
        attached(host, memory, State(method="rp", host="b2:x", config={"scope": own})),
    ):
        pass
    assert not host.worn and torch.is_tensor(host.model(torch.tensor([[3]])).logits)
    ledger.close()
