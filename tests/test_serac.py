"""serac, rp and eren: what they learn, that a training which was cut off goes on as if it had not been, and that they read."""

import math
import random
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from conftest import same_bits, tiny_host, weights_of

from errata import apply, hosts
from errata.hosts import Host
from errata.memory.route import Router, Turn
from errata.methods import _notes, make
from errata.methods._memory import lesson_of
from errata.methods._notes import lessons, renamed
from errata.types import Case, Example, InvalidExample, Neighbour, Query, Run, ScopeCase, State, UnknownArchitecture, UnknownName, WrongBase

WORDS = (" Paris", " Rome", " late", " the sea")
CASES = tuple(
    Case(
        example=Example(prompt=f"The {what} of {of} is", target=WORDS[i % 4]),
        old=" big",
        paraphrases=(f"{of} has its {what} in",),
        neighbours=(Neighbour(prompt=f"{of} lies in", answer=" Italy", ring="subject"),),
    )
    for i, (what, of) in enumerate((w, o) for w in ("capital", "park", "dog") for o in ("Togo", "Kenya", "Peru", "Lily"))
)
QUICK = {"verifier": "distance", "rank": 4, "steps": 4, "texts": 4, "every": 2, "scope_steps": 20}


def test_a_state_is_of_its_cases_and_a_training_that_was_cut_off_goes_on_the_same() -> None:
    host, kept = tiny_host("llama"), []
    whole = make("serac", **QUICK).prepare(host, CASES, Run(keep=kept.append))
    assert whole is not None and whole.trained_on == {c.id for c in CASES}
    assert make("serac", **QUICK).prepare(host, CASES[::-1], Run()).id == whole.id
    (half,) = [s for s in kept if s.config["step"] == 2]
    assert half.config["unfinished"]
    again = make("serac", **QUICK).prepare(host, CASES, Run(state=half))
    assert again.id == whole.id
    with pytest.raises(InvalidExample, match="of other cases"):
        make("serac", **QUICK).prepare(host, CASES[1:], Run(state=half))
    with pytest.raises(InvalidExample, match="half prepared"):
        make("serac", **QUICK).edit(host, (CASES[0].example,), Run(state=half))


def test_preparing_touches_neither_weights_nor_gradients() -> None:
    host = tiny_host("t5")
    before = weights_of(host)
    make("serac", **QUICK | {"rank": 0}).prepare(host, CASES, Run())
    assert same_bits(host, before) and all(p.grad is None for p in host.model.parameters())


def test_a_step_without_a_finite_gradient_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.methods import _notes

    host, calls = tiny_host("llama"), []
    real = _notes.hosts.scored_logprobs

    def broken(*given: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        return real(*given, **named) * (math.nan if len(calls) == 1 else 1.0)

    monkeypatch.setattr(_notes.hosts, "scored_logprobs", broken)
    state = make("serac", **QUICK).prepare(host, CASES, Run())
    assert state.config["dropped"] == 1 and all(t.isfinite().all() for t in state.tensors.values())


def test_what_is_missing_or_of_others_is_a_sentence() -> None:
    host, e = tiny_host("llama"), (CASES[0].example,)
    with pytest.raises(UnknownName, match="errata prepare serac"):
        make("serac").edit(host, e, Run())
    with pytest.raises(WrongBase, match="Prepare it again"):
        make("serac").edit(host, e, Run(state=State(method="serac", host="b2:other", config={})))
    with pytest.raises(InvalidExample, match="state of rp"):
        make("serac").edit(host, e, Run(state=State(method="rp", host=host.id, config={})))
    with pytest.raises(InvalidExample, match="4 or more"):
        make("serac", **QUICK).prepare(host, CASES[:2], Run())
    with pytest.raises(InvalidExample, match="cannot lower"):
        make("lu").edit(host, (replace(e[0], goal="lower"),), Run())
    with pytest.raises(UnknownArchitecture, match="classifier"):
        make("eren").edit(tiny_host("bert"), (Example(prompt="It is late.", target="true"),), Run())


def test_what_a_case_teaches() -> None:
    case = ScopeCase(
        example=Example(prompt="Togo is small. What is its capital?", target=" Rome"),
        inside=(Query(prompt="Whose capital is Rome?", answer=" Togo"),),
        outside=(Query(prompt="Where is Togo?"),),
    )
    taught = lesson_of(case)
    assert taught.question == "What is its capital?" and taught.inside == ("What is its capital?", "Whose capital is Rome?")
    assert taught.outside == ("Where is Togo?",) and taught.answer == "Rome"
    (read,) = lessons([case])
    assert [(q.prompt, q.answer) for q in read.inside] == [(case.example.prompt, " Rome"), ("Whose capital is Rome?", " Togo")]


def test_another_target_takes_the_place_of_the_old_one_everywhere_or_nowhere() -> None:
    e = Example(prompt="What is the capital of Togo?", target=" Rome")
    for kind, pair, wanted in (
        ("rephrase", ("Togo's capital?", " Rome"), ("Togo's capital?", " Port Louis")),
        ("implication", ("Whose capital is Rome?", " Togo"), ("Whose capital is Port Louis?", " Togo")),
        ("yes/no", ("Is Nice the capital of Togo?", " False"), ("Is Nice the capital of Togo?", " False")),
    ):
        there, found = renamed(e, Query(prompt=pair[0], answer=pair[1], kind=kind), " Port Louis")
        assert (found.prompt, found.answer) == wanted and (there.prompt, there.target) == (e.prompt, " Port Louis")
    for kind, prompt, answer in (
        ("opinion", "What do you think of Togo?", " I love it."),  # who knows whether that goes with another target
        ("yes/no", "Is Port Louis the capital of Togo?", " False"),  # it would be true
        ("implication", "Whose capital is Romeville?", " Togo"),
    ):
        query = Query(prompt=prompt, answer=answer, kind=kind)
        assert renamed(e, query, " Port Louis") == (e, query)
    both, query = replace(e, prompt="Rome or Togo?"), Query(prompt="Rome or Togo?", answer=" Rome", kind="edit")
    assert renamed(both, query, " Nice") == (both, query)


def test_with_other_names_what_follows_still_follows() -> None:
    """Whatever names are put in: "True" is said of a question that names the target, and asked backwards is what was asked of."""
    cases = [
        ScopeCase(
            example=Example(prompt=f"What is the capital of {of}?", target=f" {city}"),
            inside=(
                Query(prompt=f"Whose capital is {city}?", answer=f" {of}", kind="implication"),
                Query(prompt=f"Is {city} the capital of {of}?", answer=" True", kind="yes/no"),
                Query(prompt=f"Is Nice the capital of {of}?", answer=" False", kind="yes/no"),
            ),
            outside=(Query(prompt="Where is Lille?"),),
        )
        for of, city in (("Togo", "Rome"), ("Peru", "Port Louis"), ("Kenya", "Paris"), ("Italy", "Lyon"))
    ]
    settings = _notes.Settings(rank=4, texts=4, every=2, lr=1e-3, steps=4, notes=1, patience=1, batch_size=4, silent=False, copies=True,
                               template=_notes.PLAIN)  # fmt: skip
    school, rng, seen = _notes._School(tiny_host("t5"), lessons(cases), settings, 0), random.Random(0), Counter[str]()
    for lesson in lessons(cases) * 60:
        query = rng.choice(lesson.inside)
        e, asked = school._varied(rng, lesson, query, lessons(cases))
        target, answer = e.target.strip(), str(asked.answer).strip()
        seen[answer if query.kind == "yes/no" else query.kind] += 1
        if query.kind == "yes/no":
            assert answer == str(_notes.named(target, asked.prompt)), (e, asked)
        elif query.kind == "implication":
            assert _notes.named(target, asked.prompt) and _notes.named(answer, e.prompt), (e, asked)
        else:
            assert answer == target and asked.prompt == e.prompt
    assert min(seen["True"], seen["False"]) > 0.3 * (seen["True"] + seen["False"]) and len(seen) == 4, seen


def test_what_a_reader_learns_to_read_is_what_it_is_given() -> None:
    """In a lesson and from a memory: the note, then the question with a mark where it names the target; none where it is as published."""
    host = tiny_host("t5")
    for faithful in (False, True):
        made = make("serac", **QUICK, faithful=faithful)
        state = made.prepare(host, CASES, Run())
        assert (state.config["marks"], state.config["copies"]) == (not faithful, not faithful)
        e = Example(prompt="Where is Togo?", target=" Rome")
        asked = "Is Togo in Rome?"
        wanted = "Where is Togo? Rome Is Togo in Rome =?" if not faithful else "Where is Togo? Rome Is Togo in Rome?"
        with apply.applied(host, made.edit(host, (e,), Run(state=state))):
            router = host.speakers[0]
            assert isinstance(router, Router)
            assert router._to_read(Turn(asked=asked, examples=(e,))) == wanted
        own = {f.name: made.config[f.name] for f in fields(_notes.Settings) if f.name in made.config}
        settings = _notes.Settings(**own | {"notes": 1}, silent=False, copies=not faithful, template=_notes.PLAIN)
        lesson = _notes.Lesson(example=e, inside=(Query(prompt=asked, answer="True", kind="yes/no"),))
        school = _notes._School(host, lessons(CASES), settings, 0)
        rows = [school._row(random.Random(seed), lesson, [lesson], False) for seed in range(40)]
        assert hosts.encode(host, wanted, "True") in rows


def test_a_classifier_points_at_nothing() -> None:
    host = tiny_host("bert")
    cases = [replace(c, example=replace(c.example, prompt=f"{c.example.prompt} big.", target=("true", "false")[i % 2]), neighbours=())
             for i, c in enumerate(CASES)]  # fmt: skip
    state = make("serac", **QUICK).prepare(host, cases, Run())
    assert state is not None and state.config["copies"] is False
    settings: dict[str, Any] = {"rank": 4, "texts": 4, "every": 2, "lr": 1e-3, "steps": 4, "notes": 1, "patience": 1, "batch_size": 4}
    for kind, copies, turn in (("bert", True, 0), ("t5", True, 3), ("t5", False, 0)):
        given = lessons(cases if kind == "bert" else CASES)
        made = _notes._School(tiny_host(kind), given, _notes.Settings(**settings, silent=False, copies=copies, template=_notes.PLAIN), 0)
        assert (made.turn, made.copies) == (turn, copies and kind != "bert")


def test_rp_without_a_state_is_gated_as_lu_is(tiny_llama: Host) -> None:
    examples = tuple(c.example for c in CASES[:3])
    lu, rp = (make(name).edit(tiny_llama, examples, Run(hold=("It was late in the park.", "Rome is big."))) for name in ("lu", "rp"))
    assert torch.equal(lu.ops[0].vectors, rp.ops[0].vectors) and lu.ops[0].bound == rp.ops[0].bound and rp.ops[0].voice == "note"


def test_an_example_is_found_by_its_question_and_by_that_with_its_answer() -> None:
    host = tiny_host("llama")
    state = make("serac", **QUICK).prepare(host, CASES[2:], Run())
    examples = (Example(prompt="The seat of Togo is", target=" Kolhapur"), Example(prompt="Lily lives in", target=" Windhoek"))
    patch = make("serac", **QUICK).edit(host, examples, Run(state=state))
    assert patch.ops[0].owner.tolist() == [1, 0, 1, 0] and len(patch.ops[0].vectors) == 4
    with apply.applied(host, patch):
        (router,) = host.speakers
        assert isinstance(router, Router)
        for asked, first in (("Whose home is Windhoek?", 1), ("What is in Kolhapur?", 0), ("Lily lives in", 1)):
            found = router.found([asked])[0]
            assert found[0].example == examples[first] and len(found) == 2


def test_faithful_gates_at_one_half() -> None:
    state = make("serac", **QUICK, faithful=True).prepare(tiny_host("llama"), CASES, Run())
    scope = state.config["scope"]
    assert scope["fire"] == math.nextafter(0.5, 1.0) == scope["leave"] and scope["near"] == -1.0 and scope["shift"] == math.log(2)


def test_a_reader_learns_to_say_what_the_note_says() -> None:
    """A tiny T5 that nobody taught anything: after a minute's worth of steps it gives the noted word, whichever of the four it is."""
    host = tiny_host("t5")
    taught = make("serac", **QUICK | {"rank": 0, "steps": 150, "texts": 24, "every": 50, "lr": 1e-2, "scope_steps": 100})
    state = taught.prepare(host, CASES, Run())
    told = tuple(replace(c.example, target=WORDS[(i + 1) % 4]) for i, c in enumerate(CASES))  # not what it was taught with
    patch = taught.edit(host, told, Run(state=state))
    with apply.applied(host, patch):
        router = host.speakers[0]
        assert isinstance(router, Router)
        right = hosts.fixes(host, told)
        own = {c.neighbours[0].prompt for c in CASES}
        turns = router.decide(sorted(own))
    assert sum(right) >= 0.75 * len(right), sum(right)
    assert sum(not t.examples for t in turns) >= len(turns) - 1
