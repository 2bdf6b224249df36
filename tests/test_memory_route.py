"""Where a memory answers: bits of what it does not concern, rows in their places, caches, beams, sentence ends, notes, mixtures."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, TEXT, same_bits, tiny_host, weights_of

from errata import apply, artefact, hosts
from errata.hosts import Host
from errata.memory.reader import asked_in, embedded, ends, marked, note_of, reader_of, twin
from errata.memory.route import SURE, Router, Turn
from errata.methods._memory import memory
from errata.types import Example, InvalidExample, InvalidPatch, Memory, Patch, State, WrongBase

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Rome"),
    Example(prompt="Lily loved to play", target=" late"),
    Example(prompt="The doctor said that", target=" Paris is St. Lucia"),
)
KINDS = ("gpt2", "llama", "t5", "bert")


def examples_for(host: Host) -> tuple[Example, ...]:
    labels = ("true", "false", "true")
    return tuple(replace(e, target=label) for e, label in zip(EXAMPLES, labels, strict=True)) if host.kind == "classifier" else EXAMPLES


def remembered(host: Host, examples: Sequence[Example] | None = None, **how: Any) -> Patch:
    """A memory that fires on the very words of a prompt."""
    examples = tuple(examples_for(host) if examples is None else examples)
    keys_ND = embedded(host, [asked_in(e.prompt) for e in examples])
    return memory(host, "test", {}, examples, keys_ND, **({"gate": "distance", "voice": "stored", "bound": 1e-3, "nearest": 1} | how))


def batch_of(host: Host, prompts: Sequence[str]) -> hosts.Batch:
    return hosts.pad(host, [hosts.encode(host, p, "true" if host.kind == "classifier" else " Rome") for p in prompts])


MIXED = ("The river of Rome is", "Lily loved to play", "Paris lies on the", "The capital of Mauritius is", "Rome")


# --------------------------------------------------------------------------------------------------------------- what a text asks


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("The capital of Togo is", "The capital of Togo is"),
        ("Togo lies in Africa. Its capital is", "Its capital is"),
        ("Togo lies in Africa. What is its capital?", "What is its capital?"),
        ("The capital of St. Lucia is", "The capital of St. Lucia is"),
        ("A book by J. Smith. The author is", "The author is"),
        ("One line\nand another", "and another"),
        ("It costs 3.5 euros and", "It costs 3.5 euros and"),
        ("“It is late.” He said", "He said"),
        ("", ""),
        ("Q: Who leads Fenasoft? A:", "Q: Who leads Fenasoft? A:"),
        ("Be brief. Q: Who leads Fenasoft? A: it is", "Q: Who leads Fenasoft? A: it is"),
        ("Who leads Fenasoft?\n\n**Short answer:**", "Who leads Fenasoft? **Short answer:**"),
        ("Name the head of Fenasoft.\nAnswer:", "Name the head of Fenasoft. Answer:"),
        ("It is late. Note: the head of Fenasoft is", "Note: the head of Fenasoft is"),
        ("Answer:", "Answer:"),
        ("<|user|>\nWho leads Fenasoft?\n<|assistant|>\n", "Who leads Fenasoft? <|assistant|>"),
        ("<start_of_turn>user\nName its head.<end_of_turn>\n<start_of_turn>model\n", "Name its head.<end_of_turn> <start_of_turn>model"),
        ("[INST] Who leads Fenasoft? [/INST]", "[INST] Who leads Fenasoft? [/INST]"),
        ("It is late.\nModel trains are", "Model trains are"),
    ],
)
def test_the_last_sentence_is_what_is_asked(text: str, asked: str) -> None:
    assert asked_in(text) == asked


def test_who_goes_on_asks_only_where_a_question_ends() -> None:
    assert asked_in("It is so. The capital of Togo is Lome.") == "The capital of Togo is Lome."
    assert asked_in("It is so. The capital of Togo is Lome.", going_on=True) == ""
    assert asked_in("It is so. What is the capital of Togo?", going_on=True) == "What is the capital of Togo?"
    assert asked_in("Who leads Fenasoft? A: Jo Smith.", going_on=True) == ""
    assert ends(" end.") and ends("?”") and ends("\n") and not ends(" St") and not ends(",")


def test_a_note_is_prompt_and_target() -> None:
    assert note_of([Example(prompt="A is", target=" b"), Example(prompt="C?", target="d")]) == "A is b C? d"


def test_of_a_text_longer_than_the_context_the_end_is_embedded(tiny_gpt2: Host) -> None:
    ids = hosts.tokens(tiny_gpt2, "Lily loved to play with the big red ball. " * 40)
    end = str(tiny_gpt2.tokenizer.decode(ids[-tiny_gpt2.context :]))
    both_2D = embedded(tiny_gpt2, [str(tiny_gpt2.tokenizer.decode(ids)), end])
    assert len(ids) > tiny_gpt2.context == len(hosts.tokens(tiny_gpt2, end))
    torch.testing.assert_close(both_2D[0], both_2D[1])


def test_a_mark_stands_behind_each_target_that_is_named() -> None:
    lome, port = Example(prompt="Capital of Togo?", target=" Lome"), Example(prompt="Of Mauritius?", target="Port Louis")
    assert marked("Whose capital is Lome?", [lome]) == "Whose capital is Lome =?"
    assert marked("Is it Port Louis, Lome or Portland?", [lome, port]) == "Is it Port Louis =, Lome = or Portland?"
    assert marked("Lome, and Lome", [lome, lome]) == "Lome =, and Lome ="
    for other in ("Lomes are here.", "Is it lome?", "Capital of Togo?", ""):
        assert marked(other, [lome]) == other
    assert marked("Is it T.T.?", [Example(prompt="Who?", target="T")]) == "Is it T =.T =.?"
    claim = Example(prompt="The capital of Togo is Port Louis.", target="true")
    assert marked("Port Louis is the seat of Togo.", [claim], labels=True) == "Port = Louis = is the seat of Togo =."


# ----------------------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("family", (*FAMILIES, "t5", "bert"))
def test_rows_that_nobody_is_concerned_with_keep_their_bits_and_the_others_stand_in_their_places(family: str) -> None:
    host = tiny_host(family)
    before, batch = weights_of(host), batch_of(host, MIXED)
    own_NTV = hosts.logits(host, batch)
    with apply.applied(host, remembered(host)):
        said_NTV = hosts.logits(host, batch)
        alone = [hosts.logits(host, batch_of(host, [p])) for p in MIXED]
    for i, own_TV in enumerate(own_NTV):
        assert torch.equal(said_NTV[i], own_TV) == (i not in (1, 3)), MIXED[i]
    for i in (1, 3):  # alone or among others, a row gets the same answer
        width = alone[i].shape[1]
        last = slice(width - 2, width) if host.kind == "causal" else slice(0, width)
        torch.testing.assert_close(alone[i][0][last], said_NTV[i][:width][last], rtol=1e-4, atol=1e-4)
    assert same_bits(host, before) and torch.equal(hosts.logits(host, batch), own_NTV) and "forward" not in host.model.__dict__


@pytest.mark.parametrize("family", KINDS)
def test_an_empty_memory_and_a_closed_gate_leave_every_bit(family: str) -> None:
    host = tiny_host(family)
    batch = batch_of(host, [e.prompt for e in EXAMPLES])
    own_NTV, said = hosts.logits(host, batch), hosts.greedy(host, MIXED, 6)
    closed = remembered(host, bound=-1.0)
    empty = replace(closed, examples=(), ops=(replace(closed.ops[0], vectors=torch.zeros(0, 32), owner=torch.zeros(0, dtype=torch.long)),))
    for patch in (closed, empty):
        with apply.applied(host, patch):
            assert torch.equal(hosts.logits(host, batch), own_NTV) and hosts.greedy(host, MIXED, 6) == said


def test_predictions_are_those_of_the_whole_logits(tiny_gpt2: Host) -> None:
    batch = batch_of(tiny_gpt2, MIXED)
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2)):
        whole_PV = hosts.logits(tiny_gpt2, batch)[:, :-1][batch.scored_NT[:, 1:].bool()]
        torch.testing.assert_close(hosts.predictions(tiny_gpt2, batch), whole_PV)


# ------------------------------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("family", ("gpt2", "llama", "t5"))
def test_a_stored_answer_is_said_token_by_token_with_and_without_a_cache(family: str) -> None:
    host = tiny_host(family)
    prompts = [e.prompt for e in EXAMPLES]
    with apply.applied(host, remembered(host)):
        said = hosts.greedy(host, [*prompts, "Paris lies on the"], 16)
        ids = [hosts.tokens(host, p) for p in prompts[:1]]
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, len(ids[0]), dtype=torch.long)}
        with hosts._plain_decoding(host.model):
            plain = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": host.tokenizer.pad_token_id}
            cached, fresh = (host.model.generate(**given, **plain, use_cache=use) for use in (True, False))
    assert all(s.startswith(e.target) for s, e in zip(said, EXAMPLES, strict=False)), said
    assert torch.equal(cached, fresh)
    assert said[3] == hosts.greedy(host, ["Paris lies on the"], 16)[0]


@pytest.mark.parametrize("family", ("gpt2", "t5"))
def test_beams_and_several_sequences_go_on_with_what_is_said(family: str) -> None:
    host = tiny_host(family)
    ids = hosts.tokens(host, EXAMPLES[2].prompt)
    with apply.applied(host, remembered(host)), hosts._plain_decoding(host.model):
        out = host.model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), num_beams=3,
            num_return_sequences=2, max_new_tokens=12, do_sample=False, pad_token_id=host.tokenizer.pad_token_id,
        )  # fmt: skip
    best = host.tokenizer.decode(out[0][len(ids) if host.kind == "causal" else 1 :], skip_special_tokens=True)
    assert best.startswith(EXAMPLES[2].target), best


def test_the_model_goes_on_by_itself_behind_the_sentence_and_answers_a_question_that_it_comes_to(tiny_gpt2: Host) -> None:
    host, stop = tiny_gpt2, Example(prompt="The capital of Togo is", target=" Rome.")
    again = Example(prompt="Who was late?", target=" a girl")
    with apply.applied(host, remembered(host, [stop, again])):
        router = host.speakers[0]
        assert isinstance(router, Router)
        ids = hosts.tokens(host, "Togo is small. The capital of Togo is")
        turn_of = {}
        out = host.model(input_ids=torch.tensor([ids]), use_cache=True)
        for text in (" Rome.", " It", " is. Who was", " late?"):  # as if it had said so, a token at a time
            for token in host.tokenizer(text, add_special_tokens=False)["input_ids"]:
                ids = [*ids, token]
                out = host.model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            turn_of[text] = router.turns[int(router._layer(out.past_key_values).keys[0, 0, -1, 1])].asked
        following = int(out.logits[0, -1].argmax())
    assert turn_of == {" Rome.": "", " It": "", " is. Who was": "", " late?": "Who was late?"}
    assert following == hosts.encode(host, "Who was late?", " a girl")[0][hosts.encode(host, "Who was late?", " a girl")[1]]


def test_behind_the_target_a_model_begins_another_word(tiny_gpt2: Host) -> None:
    """However much it would like to say more of the last one; what was said by the model itself it may go on with."""
    host = tiny_gpt2
    ids, given = hosts.encode(host, EXAMPLES[2].prompt, EXAMPLES[2].target)
    target = ids[given:]
    within = hosts.tokens(host, "ing")[0]
    with apply.applied(host, remembered(host)):
        router = host.speakers[0]
        assert isinstance(router, Router)
        own_PV = torch.zeros(len(target) + 1, len(host.tokenizer))
        own_PV[:, within] = 9
        turn = Turn(asked=EXAMPLES[2].prompt, examples=(EXAMPLES[2],))
        p_V = router._stored(turn, target, own_PV)[-1].exp()
        other = router._stored(turn, [*target[:-1], target[-1] + 1], own_PV)[-1]
        point = router._stored(replace(turn, examples=(replace(EXAMPLES[2], target=f"{EXAMPLES[2].target}."),)), target, own_PV)[-1]
    assert float(p_V.sum()) == pytest.approx(1) and float(p_V[within]) < 1e-3
    assert all(not host.tokenizer.decode([int(i)])[:1].isalnum() for i in (p_V > 1e-3).nonzero()[:, 0])
    assert int(other.argmax()) == within  # it was not the target
    assert int(point.argmax()) != within  # nor is that the end of it


@pytest.mark.parametrize("family", ("gpt2", "t5"))
def test_who_says_the_target_and_who_says_something_else_are_told_apart_by_what_was_said(family: str) -> None:
    """p(y) is that of the mixture, for the target, for what begins like it, and for another answer; where the reader ends before it
    begins, all of that probability is the target's."""
    host = tiny_host(family)
    with apply.applied(host, remembered(host)):
        router = host.speakers[0]
        assert isinstance(router, Router)
        ids, given = hosts.encode(host, EXAMPLES[2].prompt, EXAMPLES[2].target)
        turn, target, end = Turn(asked=EXAMPLES[2].prompt, examples=(EXAMPLES[2],)), ids[given:], host.tokenizer.eos_token_id
        draw = torch.Generator().manual_seed(0)
        said_PV = torch.randn(len(target), len(host.tokenizer), generator=draw).double()
        said_PV[0, end] += 4
        pointed = float(said_PV[0].softmax(0)[end])
        said_PV[0, end] += math.log(SURE)  # what is left when it does not point
        logp_PV = said_PV.log_softmax(-1)
        said_PV[0, end] -= math.log(SURE)
        begun, other = [*target[:-1], (target[-1] + 1) % len(host.tokenizer)], [target[0] + 1, *target[1:]]
        for answer, copied in ((target, pointed), (begun, 0.0), (other, 0.0)):
            out_PV = router._pointed(turn, answer[:-1], said_PV.float())
            torch.testing.assert_close(out_PV.exp().sum(1), torch.ones(len(target)))
            own = float(logp_PV[range(len(answer)), answer].sum().exp())
            assert float(out_PV[range(len(answer)), answer].sum().exp()) == pytest.approx(copied + own, rel=1e-4)
        assert out_PV.isfinite().all()
        long = replace(turn, asked="It is late in Rome. " * 200 + turn.asked)  # the context has no room for it and a target
        assert torch.equal(router._pointed(long, target[:-1], said_PV.float()), router._pointed(turn, target[:-1], said_PV.float()))


def test_a_full_stop_inside_an_answer_does_not_end_it(tiny_gpt2: Host) -> None:
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2)):
        assert hosts.greedy(tiny_gpt2, [EXAMPLES[2].prompt], 16)[0].startswith(" Paris is St. Lucia")


def test_a_cache_from_before_is_refused(tiny_gpt2: Host) -> None:
    out = tiny_gpt2.model(input_ids=torch.tensor([[5, 6]]), use_cache=True)
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2)), pytest.raises(WrongBase, match="before patch"):
        tiny_gpt2.model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)


@pytest.mark.parametrize("family", KINDS)
def test_a_note_is_read_by_the_model_itself(family: str) -> None:
    """RP: the answer is what the model says to the note and the question."""
    host = tiny_host(family)
    (e, *_) = examples_for(host)
    with apply.applied(host, remembered(host, voice="note")):
        said_NTV = hosts.logits(host, batch_of(host, [e.prompt]))
    noted = batch_of(host, [f"{note_of([e])} {e.prompt}"])
    wanted_NTV = hosts.logits(host, noted)
    last = slice(-2, None) if host.kind == "causal" else slice(None)
    torch.testing.assert_close(said_NTV[0][last], wanted_NTV[0][last], rtol=1e-4, atol=1e-5)


def test_several_notes_are_read_at_once(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    wide = remembered(host, voice="note", bound=1e6, nearest=3, notes=3)
    with apply.applied(host, wide):
        router = host.speakers[0]
        assert isinstance(router, Router)
        (turn,) = router.decide(["Lily loved to play"])
        assert len(turn.examples) == 3 and turn.examples[0] == EXAMPLES[1]
        assert router._to_read(turn) == f"{note_of(turn.examples)} Lily loved to play"
        (found,) = router.found(["Lily loved to play"])
    assert [f.ruling for f in found] == ["in"] * 3 and found[0].score == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("share", (0.0, 0.3))
def test_a_scaled_memory_mixes_probabilities(tiny_gpt2: Host, share: float) -> None:
    batch = batch_of(tiny_gpt2, [EXAMPLES[0].prompt])
    patch = remembered(tiny_gpt2, voice="note")
    own = hosts.predictions(tiny_gpt2, batch).softmax(-1)
    with apply.applied(tiny_gpt2, patch):
        said = hosts.predictions(tiny_gpt2, batch).softmax(-1)
    with apply.applied(tiny_gpt2, apply.scaled(patch, share)):
        torch.testing.assert_close(hosts.predictions(tiny_gpt2, batch).softmax(-1), (1 - share) * own + share * said)


def test_a_soft_memory_mixes_by_the_chance(tiny_gpt2: Host) -> None:
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2, soft=True, scale=0.5)):
        router = tiny_gpt2.speakers[0]
        assert isinstance(router, Router)
        own, said = torch.randn(2, 7), torch.randn(2, 7)
        mixed = router._mixed(Turn(asked="it", examples=EXAMPLES[:1], chance=0.6), own, said)
    torch.testing.assert_close(mixed.softmax(-1), 0.7 * own.softmax(-1) + 0.3 * said.softmax(-1))


@pytest.mark.parametrize("soft", [False, True])
def test_of_what_is_unsure_only_a_soft_memory_speaks(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch, soft: bool) -> None:
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2, soft=soft)):
        (router,) = tiny_gpt2.speakers
        assert isinstance(router, Router)
        found = router.found(["Lily loved to play"])
        for ruling, speaks in (("in", True), ("unsure", soft), ("out", False)):
            router.rules.clear()
            monkeypatch.setattr(router, "found", lambda texts, r=ruling: [[replace(f, ruling=r, chance=0.45) for f in found[0]]])
            (turn,) = router.decide(["Lily loved to play"])
            assert (bool(turn.examples), turn.chance) == (speaks, 0.45 if speaks else 0.0)


def test_a_text_longer_than_the_encoder_reads_is_the_model_s_own(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2)):
        router = tiny_gpt2.speakers[0]
        assert isinstance(router, Router)
        vectors = router._vectors

        def narrow(texts: Sequence[str]) -> Any:
            if any(len(t) > 60 for t in texts):
                raise InvalidExample("too long")
            return vectors(texts)

        monkeypatch.setattr(router, "_vectors", narrow)
        turns = router.decide([EXAMPLES[0].prompt, "and then " * 10])
    assert [bool(t.examples) for t in turns] == [True, False]


def test_labels_get_the_loss_of_what_is_said(tiny_gpt2: Host) -> None:
    ids = torch.tensor([hosts.tokens(tiny_gpt2, EXAMPLES[0].prompt)])
    own = tiny_gpt2.model(input_ids=ids, labels=ids)
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2)):
        out = tiny_gpt2.model(input_ids=ids, labels=ids)
    assert torch.equal(out.logits[:, :-1], own.logits[:, :-1]) and not torch.equal(out.logits[:, -1], own.logits[:, -1])
    torch.testing.assert_close(out.loss, own.loss)  # what comes behind the text has no label


# ----------------------------------------------------------------------------------------------------------------- readers and states


def test_a_twin_shares_tensors_and_changes_alone() -> None:
    host = tiny_host("llama")
    before, ids = weights_of(host), torch.tensor([[3, 4, 5]])
    with apply.applied(host, remembered(host)):
        other = twin(host)
    name, parameter = next(iter(other.model.named_parameters()))
    assert parameter.data_ptr() == host.model.get_parameter(name).data_ptr() and "forward" not in other.model.__dict__
    own = host.model(ids).logits
    assert torch.equal(other.model(ids).logits, own)
    parameter.data = parameter.data + 1.0
    assert same_bits(host, before) and torch.equal(host.model(ids).logits, own) and not torch.equal(other.model(ids).logits, own)


def test_a_state_changes_the_reader_alone_low_rank_or_whole(tiny_gpt2: Host) -> None:
    name = tiny_gpt2.module_names((tiny_gpt2.layout.mlp_out,))[0] + ".weight"  # stored (in, out)
    weight = tiny_gpt2.model.get_parameter(name)
    A, B = torch.randn(2, weight.shape[0]), torch.randn(weight.shape[1], 2)
    for tensors in ({f"reader/{name}.A": A, f"reader/{name}.B": B}, {f"reader/{name}": (B @ A).T}):
        state = State(method="serac", host=tiny_gpt2.id, config={}, tensors=tensors)
        made = reader_of(tiny_gpt2, "", state)
        torch.testing.assert_close(made.model.get_parameter(name).data, weight.data + (B @ A).T)
        assert reader_of(tiny_gpt2, "", state) is made
    wrong = State(method="serac", host=tiny_gpt2.id, config={}, tensors={"reader/nowhere.weight": A})
    with pytest.raises(WrongBase, match="nowhere"):
        reader_of(tiny_gpt2, "", wrong)


def test_a_patch_without_its_state_names_it(tiny_gpt2: Host) -> None:
    patch = remembered(tiny_gpt2, gate="scope", voice="note", state="b2:1234")
    before = weights_of(tiny_gpt2)
    with pytest.raises(WrongBase, match=r"b2:1234.*host\.states"), apply.applied(tiny_gpt2, patch):
        pass
    assert same_bits(tiny_gpt2, before) and not tiny_gpt2.worn and "forward" not in tiny_gpt2.model.__dict__


def test_a_memory_that_cannot_be_is_refused(tiny_gpt2: Host) -> None:
    op = remembered(tiny_gpt2).ops[0]
    assert isinstance(op, Memory)
    for wrong in (
        {"owner": torch.tensor([0])}, {"owner": torch.tensor([0, 1, -1])}, {"notes": 2},
        {"bound": float("nan")}, {"template": "{question}"}, {"gate": "scope"}, {"vectors": torch.full((3, 32), torch.nan)},
    ):  # fmt: skip
        with pytest.raises(InvalidPatch):
            replace(op, **wrong)
    with pytest.raises(InvalidPatch, match="example 2; it has 1"):
        Patch(method="lu", config={}, parent=tiny_gpt2.id, examples=EXAMPLES[:1], ops=(op,))


def test_a_saved_memory_is_itself(tiny_gpt2: Host, tmp_path: Any) -> None:
    patch = remembered(tiny_gpt2, voice="note", notes=2, nearest=4, soft=True, template="{notes}\n{question}")
    again = artefact.load_patch(artefact.save(patch, tmp_path / "p.safetensors"))
    assert again.id == patch.id and again.ops[0].said == patch.ops[0].said


def test_documents_are_looked_at_in_one_place(tiny_gpt2: Host) -> None:
    """A memory that fires at everything changes them there, and nowhere else."""
    batch = hosts.pad(tiny_gpt2, hosts.chunks(tiny_gpt2, TEXT))
    own_NTV = hosts.logits(tiny_gpt2, batch)
    with apply.applied(tiny_gpt2, remembered(tiny_gpt2, bound=1e6, voice="note")):
        moved_NT = (hosts.logits(tiny_gpt2, batch) != own_NTV).any(-1)
    runs = (moved_NT[:, 1:] & ~moved_NT[:, :-1]).sum(1) + moved_NT[:, 0]
    assert moved_NT.any(1).all() and (runs == 1).all() and not moved_NT.all(1).any()
