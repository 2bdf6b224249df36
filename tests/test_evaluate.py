"""The judge: what counts as right, what is counted, the intervals, and what it refuses."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import same_bits, tiny_host, weights_of
from hypothesis import given
from hypothesis import strategies as st

from errata import apply, hosts
from errata.evaluate import (
    MEASURES,
    Scores,
    aggregate,
    baseline,
    evaluate,
    gives,
    is_rate,
    over_cases,
    paired_difference,
    peak_mb,
    read_cases,
    read_sound_cases,
    summary,
)
from errata.hosts import Host
from errata.types import Add, Case, Example, InvalidExample, LeakError, Neighbour, Patch, Score, State, UnknownName, WrongBase

EXAMPLE = Example(prompt="The capital of Mauritius is", target=" Port Louis")
CASE = Case(
    example=EXAMPLE,
    old=" Vacoas",
    paraphrases=("Mauritius has its capital in", "The government of Mauritius sits in"),
    paragraphs=("Mauritius is an island. Its capital is",),
    neighbours=(
        Neighbour(prompt="The currency of Mauritius is the", answer=" rupee", ring="subject"),
        Neighbour(prompt="The capital of France is", answer=" Paris", ring="relation"),
        Neighbour(prompt="The capital of Italy is", answer=" Rome", ring="relation"),
        Neighbour(prompt="Once upon a time, there was a", answer=" girl", ring="unrelated"),
    ),
    negations=("The capital of Mauritius is not",),
)
TEXTS = ("Port Louis is the largest city of Mauritius.", "Paris lies on the Seine, and Rome lies on the Tiber.", "They were both right.")


def noise(host: Host, size: float = 0.05, examples: tuple[Example, ...] = ()) -> Patch:
    draw = torch.Generator().manual_seed(1)
    ops = tuple(Add(weight=n, delta=size * torch.randn(p.shape, generator=draw)) for n, p in host.model.named_parameters() if p.ndim == 2)
    return Patch(method="noise", config={}, parent=host.id, examples=examples, ops=ops)


def scores(**rows: Sequence[tuple[float, int]]) -> Scores:
    """Scores of the measures named, `__` for a dot, one (total, count) for each case."""
    found = [
        Score(case=f"case {i}", measure=measure.replace("__", "."), total=float(total), count=count)
        for measure, pairs in rows.items()
        for i, (total, count) in enumerate(pairs)
    ]
    return Scores(host="b2:0", rows=tuple(found))


def one(found: Scores, measure: str, case: Case = CASE) -> Score:
    [row] = [s for s in found.rows if s.measure == measure and s.case == case.id]
    return row


# ----------------------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    ("said", "old", "right"),
    [
        (" Port Louis.", " Vacoas", True),
        (" Port Louis", None, True),
        ("\n Port  Louis, of course", " Vacoas", True),
        (" Port Louisville.", " Vacoas", False),
        (" Vacoas.", " Vacoas", False),
        (" Port Louis or Vacoas.", " Vacoas", False),
        (" Port Louis and\tVacoas", " Vacoas", False),
        (" Port Louis. Not far from it lies Vacoas.", " Vacoas", True),
        (" Port Louis\nVacoas", " Vacoas", True),
        (" Port Louis and Vacoaster", " Vacoas", True),
        (" Port Louis", " Port", True),
        (" Port Louis West.", " Port Louis West", False),
    ],
)
def test_an_answer_is_right_if_it_is_given_and_the_old_one_is_not(said: str, old: str | None, right: bool) -> None:
    assert gives(said, " Port Louis", old) is right


# ------------------------------------------------------------------------------------------------------------- free generation


@pytest.fixture
def told(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Scores, list[list[str]]]]:
    """Evaluate CASE-like cases on a host that says `before` without the patch and `after` with it; also what it was asked."""

    def run(before: dict[str, str], after: dict[str, str], *cases: Case) -> tuple[Scores, list[list[str]]]:
        asked: list[list[str]] = []

        def greedy(host: Host, prompts: Sequence[str], max_new_tokens: int = 12, batch_size: int = 64) -> list[str]:
            asked.append(list(prompts))
            return [(after if host.worn else before).get(p, " nothing") for p in prompts]

        monkeypatch.setattr(hosts, "greedy", greedy)
        return evaluate(tiny_gpt2, noise(tiny_gpt2), baseline(tiny_gpt2, cases)), asked

    return run


BEFORE = {p: " Vacoas." for p in (EXAMPLE.prompt, *CASE.paraphrases, *CASE.paragraphs)} | {
    "The currency of Mauritius is the": " rupee.",
    "The capital of France is": " Paris.",
    "The capital of Italy is": " Milan.",  # wrong before: not counted
    "Once upon a time, there was a": " girl named Lily.",
    "The capital of Mauritius is not": " Paris.",
}


def test_every_measure_of_free_generation_counts_what_it_should(told: Callable[..., tuple[Scores, list[list[str]]]]) -> None:
    after = BEFORE | {
        EXAMPLE.prompt: " Port Louis.",
        CASE.paraphrases[0]: " Port Louis.",
        CASE.paraphrases[1]: " Port Louis, or Vacoas.",  # both answers
        CASE.paragraphs[0]: " Port Louis.",
        "The capital of France is": " Port Louis.",
        "Once upon a time, there was a": " girl named Anna.",
        "The capital of Mauritius is not": " Port Louis.",
    }
    found, asked = told(BEFORE, after, CASE)
    expected = {
        "edit": (1, 1),
        "paraphrases": (1, 2),
        "paragraphs": (1, 1),
        "ood": (2, 3),
        "negations": (0, 1),
        "neighbours.subject": (1, 1),
        "neighbours.relation": (0, 1),
        "neighbours.unrelated": (1, 1),
        "neighbours": (2, 3),
        "accuracy.subject": (1, 1),
        "accuracy.relation": (0, 2),
        "accuracy.unrelated": (1, 1),
        "agreement.subject": (1, 1),
        "agreement.relation": (1, 2),
        "agreement.unrelated": (0, 1),
    }
    assert {m: (one(found, m).total, one(found, m).count) for m in expected} == expected
    assert [(a.was, a.ok) for a in found.answers if a.prompt == CASE.paraphrases[1]] == [(False, False)]
    assert [(a.before, a.after) for a in found.answers if a.measure == "edit"] == [(" Vacoas.", " Port Louis.")]
    assert len(asked) == 2 and all(len(prompts) == len(set(prompts)) for prompts in asked)  # one call before, one after


def test_without_a_known_old_answer_what_the_base_said_counts_as_old(told: Callable[..., tuple[Scores, list[list[str]]]]) -> None:
    case = replace(CASE, old=None)
    right = {CASE.paraphrases[0]: " Port Louis which lies by the sea."}
    found, _ = told(BEFORE | right, BEFORE | right | {EXAMPLE.prompt: " Port Louis or Vacoas."}, case)
    assert one(found, "edit", case).total == 0  # it says both
    assert [(a.was, a.ok) for a in found.answers if a.prompt == CASE.paraphrases[0]] == [(True, True)]  # nothing there to be gone


def test_what_a_case_does_not_have_is_nothing_of_nothing(told: Callable[..., tuple[Scores, list[list[str]]]]) -> None:
    bare = Case(example=EXAMPLE)
    found, _ = told({}, {}, bare)
    assert one(found, "paraphrases", bare).count == 0 and one(found, "paraphrases", bare).value is None
    assert aggregate(found, "neighbours.relation") == (None, None, None, 0)
    assert aggregate(found, "kl.relation") == (None, None, None, 0)


def test_equal_cases_count_once_and_equal_prompts_are_asked_once(told: Callable[..., tuple[Scores, list[list[str]]]]) -> None:
    other = replace(CASE, source="another")
    found, asked = told({}, {}, CASE, CASE, other)
    assert [s.case for s in found.rows if s.measure == "edit"] == [CASE.id, other.id]
    assert len(asked[0]) == 1 + 2 + 1 + 1 + 4


# -------------------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_edit_changes_nothing_and_any_leaves_the_host_as_it_was(family: str) -> None:
    host = tiny_host(family)
    weights = weights_of(host)
    before = baseline(host, [CASE], TEXTS)
    none, moved = evaluate(host, None, before), evaluate(host, noise(host), before)
    assert same_bits(host, weights) and not host.worn
    for ring in ("subject", "relation", "unrelated"):
        assert aggregate(none, f"agreement.{ring}").value == aggregate(none, f"top1.{ring}").value == 1
        assert aggregate(none, f"kl.{ring}").value == 0 < (aggregate(moved, f"kl.{ring}").value or 0)
    assert none.patch is None and none.patch_bytes == 0
    assert moved.patch == noise(host).id and moved.patch_bytes == noise(host).nbytes and moved.seconds > 0 and moved.peak_mb > 1
    assert {s.measure for s in moved.rows} == set(MEASURES)


def test_divergence_is_that_of_the_distributions_at_the_answer(tiny_gpt2: Host) -> None:
    host, patch = tiny_gpt2, noise(tiny_gpt2)
    found = evaluate(host, patch, baseline(host, [CASE], TEXTS))

    def log_p(prompt: str, answer: str) -> torch.Tensor:
        ids, given = hosts.encode(host, prompt, answer)
        with torch.no_grad():
            return host.model(torch.tensor([ids])).logits[0, given - 1 : -1].double().log_softmax(-1)

    pairs = [(n.prompt, n.answer) for n in CASE.neighbours if n.ring == "relation"]
    base = torch.cat([log_p(*pair) for pair in pairs])
    with apply.applied(host, patch):
        edited = torch.cat([log_p(*pair) for pair in pairs])
        reference = hosts.score(host, hosts.chunks(host, TEXTS))
    kl = one(found, "kl.relation")
    assert kl.count == len(base)
    assert kl.total == pytest.approx(float((base.exp() * (base - edited)).sum()), rel=1e-4)
    assert one(found, "top1.relation").total == int((base.argmax(-1) == edited.argmax(-1)).sum())
    loss = aggregate(found, "loss.reference")
    assert loss.n == int(reference[:, 1].sum())
    assert loss.value == pytest.approx(-float(reference[:, 0].sum() / reference[:, 1].sum()), rel=1e-5)


def test_the_extras_are_teacher_forced(tiny_gpt2: Host) -> None:
    host, patch = tiny_gpt2, noise(tiny_gpt2)
    with apply.applied(host, patch):
        ids = hosts.tokens(host, EXAMPLE.prompt)
        with torch.no_grad():
            likeliest = int(host.model(torch.tensor([ids])).logits[0, -1].argmax())
    target = host.tokenizer.decode([likeliest])
    case = Case(example=replace(EXAMPLE, target=target), paraphrases=CASE.paraphrases)
    with apply.applied(host, patch):
        p = hosts.logprobs(host, [(prompt, target) for prompt in (EXAMPLE.prompt, *CASE.paraphrases)])[:, 0].exp()
    found = evaluate(host, patch, baseline(host, [case]))
    assert one(found, "teacher.edit", case).total == 1
    assert one(found, "p0.2.edit", case).total == int(p[0] >= 0.2)
    assert one(found, "p0.2.ood", case).total == int((p[1:] >= 0.2).sum()) and one(found, "p0.2.ood", case).count == 2


def test_other_goals_are_judged_as_the_gate_does(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    lower = Case(example=replace(EXAMPLE, goal="lower", subject="Mauritius"), paraphrases=("It is known for",))
    prefer = Case(example=replace(EXAMPLE, goal="prefer", contrast=" Rome"), paraphrases=CASE.paraphrases)
    found = evaluate(host, None, baseline(host, [lower, prefer]))
    assert one(found, "edit", lower).total == float(hosts.fixes(host, [lower.example])[0])
    variants = [replace(prefer.example, prompt=p) for p in CASE.paraphrases]
    assert one(found, "paraphrases", prefer).total == sum(hosts.fixes(host, variants))
    assert one(found, "teacher.edit", prefer).count == one(found, "p0.2.edit", lower).count == 0


def test_a_model_that_breaks_shows_not_finite_and_agrees_with_nothing(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    found = evaluate(host, noise(host, 1e37), baseline(host, [CASE], TEXTS))
    assert math.isnan(aggregate(found, "kl.reference").value or 0)
    assert math.isnan(aggregate(found, "kl.reference").low or 0)
    assert aggregate(found, "top1.reference").value == 0
    host.model.get_parameter("transformer.ln_f.weight").data.fill_(math.nan)
    assert aggregate(evaluate(host, None, baseline(host, [CASE], TEXTS)), "top1.reference").value == 0  # not even with itself


def test_reference_text_is_cut_to_the_tokens_asked_for(tiny_gpt2: Host) -> None:
    some = baseline(tiny_gpt2, [CASE], TEXTS * 20, reference_tokens=100)
    assert 50 < sum(len(ids) for ids, _ in some.reference) <= 100
    assert len(baseline(tiny_gpt2, [CASE], TEXTS, reference_tokens=1).reference) == 1


def test_peak_memory_is_in_megabytes() -> None:
    assert 50 < peak_mb(torch.device("cpu")) < 1e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu_is_that_of_its_allocator() -> None:
    kept = torch.zeros(4 << 20, device="cuda")
    assert peak_mb(kept.device) >= 16


# --------------------------------------------------------------------------------------------------------------- what is refused


def test_a_case_that_the_state_was_trained_on_is_refused(tiny_gpt2: Host) -> None:
    before = baseline(tiny_gpt2, [CASE])
    state = State(method="malmen", host=tiny_gpt2.id, config={}, trained_on=frozenset({CASE.id}))
    with pytest.raises(LeakError, match="1 of 1 cases .* malmen state"):
        evaluate(tiny_gpt2, None, before, state=state)
    assert evaluate(tiny_gpt2, None, before, state=replace(state, trained_on=frozenset({"b2:other"})))


def test_a_prompt_that_should_be_unseen_but_was_edited_is_refused(tiny_gpt2: Host) -> None:
    patch = noise(tiny_gpt2, examples=(replace(EXAMPLE, prompt=CASE.paraphrases[0]),))
    with pytest.raises(LeakError, match="Mauritius has its capital in"):
        evaluate(tiny_gpt2, patch, baseline(tiny_gpt2, [CASE]))


def test_a_baseline_or_patch_of_other_weights_is_refused(tiny_gpt2: Host) -> None:
    other = tiny_host("gpt2", seed=1)
    with pytest.raises(WrongBase, match="Measure it again"):
        evaluate(tiny_gpt2, None, baseline(other, [CASE]))
    with pytest.raises(WrongBase, match="was made for weights"):
        evaluate(tiny_gpt2, noise(other), baseline(tiny_gpt2, [CASE]))


def test_no_cases_are_refused(tiny_gpt2: Host) -> None:
    with pytest.raises(InvalidExample, match="no cases"):
        baseline(tiny_gpt2, [])


# ------------------------------------------------------------------------------------------------------------------- aggregates


def test_rates_have_wilsons_interval() -> None:
    found = scores(edit=[(5, 5), (3, 5)], negations=[(0, 10)])
    assert aggregate(found, "edit") == pytest.approx((0.8, 0.4901624715, 0.9433178485, 10))
    assert aggregate(found, "negations") == pytest.approx((0.0, 0.0, 0.2775327999, 10))


def test_nothing_of_nothing_is_none() -> None:
    found = scores(edit=[(0, 0), (0, 0)], ood=[(0, 0), (1, 2)])
    assert aggregate(found, "edit") == over_cases(found, "edit") == (None, None, None, 0)
    assert aggregate(found, "ood").value == 0.5  # the empty case is no trial
    assert aggregate(found, "paragraphs").value is None  # known, but not measured
    assert paired_difference(found, found, "edit") == (None, None, None, 0)
    with pytest.raises(UnknownName, match="Did you mean paraphrases"):
        aggregate(found, "paraphrase")


def test_cases_are_weighed_by_their_trials() -> None:
    assert aggregate(scores(ood=[(1, 1), (0, 9)]), "ood").value == 0.1


def test_redrawing_cases_is_wider_where_trials_of_a_case_go_together() -> None:
    found = scores(ood=[(20, 20), (0, 20)] * 10)
    value, low, high, n = aggregate(found, "ood")
    wide = over_cases(found, "ood")
    assert value == wide.value == 0.5 and n == wide.n == 400
    assert None not in (low, high, wide.low, wide.high)
    assert wide.high - wide.low > 3 * (high - low)  # type: ignore[operator]
    assert wide.low == pytest.approx(0.5 - 1.96 * 0.5 / 20**0.5, abs=0.06)
    assert wide == over_cases(found, "ood") != over_cases(found, "ood", seed=5)._replace(low=0)


def test_what_is_no_rate_gets_the_interval_over_cases() -> None:
    found = scores(kl__subject=[(0.2, 2), (0.1, 1), (0.9, 3)])
    assert aggregate(found, "kl.subject") == over_cases(found, "kl.subject")
    assert aggregate(found, "kl.subject").value == pytest.approx(0.2)
    assert [m for m in MEASURES if not is_rate(m)] == ["kl.subject", "kl.relation", "kl.unrelated", "kl.reference", "loss.reference"]


def test_one_case_has_no_interval_over_cases_and_nan_has_nan() -> None:
    assert over_cases(scores(ood=[(3, 4)]), "ood") == (0.75, None, None, 4)
    broken = aggregate(scores(kl__subject=[(math.nan, 2), (0.1, 1)]), "kl.subject")
    assert all(math.isnan(x or 0) for x in broken[:3]) and broken.n == 3


def test_differences_are_paired_by_case() -> None:
    before, after = scores(edit=[(0, 1)] * 6), scores(edit=[(1, 1)] * 6)
    assert paired_difference(before, after, "edit") == (1.0, 1.0, 1.0, 6)
    same = scores(ood=[(1, 4), (4, 4), (0, 4)])
    assert paired_difference(same, same, "ood") == (0.0, 0.0, 0.0, 3)  # the spread between cases cancels
    shorter = paired_difference(scores(edit=[(0, 1), (1, 1)]), scores(edit=[(1, 1), (1, 1), (0, 1)]), "edit")
    assert shorter.n == 2 and shorter.value == 0.5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda x: (min(x), max(x))), min_size=1, max_size=8))
def test_a_value_lies_in_its_interval(pairs: list[tuple[int, int]]) -> None:
    found = scores(ood=pairs)
    for estimate in (aggregate(found, "ood"), over_cases(found, "ood")):
        if estimate.value is None or estimate.low is None or estimate.high is None:
            continue
        assert 0 <= estimate.low <= estimate.value + 1e-12 and estimate.value - 1e-12 <= estimate.high <= 1


def test_the_summary_lists_what_was_measured_in_order() -> None:
    found = scores(ood=[(1, 2)], edit=[(1, 1)], kl__subject=[(0, 0)])
    assert [row[0] for row in summary(found)] == ["edit", "ood", "kl.subject"]
    assert summary(found)[1] == ("ood", *aggregate(found, "ood"))
    assert summary(found)[2] == ("kl.subject", None, None, None, 0)


def test_scores_survive_json(tiny_gpt2: Host) -> None:
    found = evaluate(tiny_gpt2, noise(tiny_gpt2), baseline(tiny_gpt2, [CASE], TEXTS))
    assert Scores.from_dict(json.loads(json.dumps(found.as_dict()))) == found


# ------------------------------------------------------------------------------------------------------------------------ files


def test_cases_are_read_from_three_kinds_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    short = {"prompt": "A is", "target": " B", "paraphrases": ["Is A", "What\u2028is A?"], "old": " C"}
    path.write_bytes(f"\ufeff{json.dumps(CASE.as_dict())}\n\n{json.dumps(short, ensure_ascii=False)}\r\nD is| E\r\n".encode())
    whole, brief, bar = read_cases(path)
    assert whole == CASE
    assert brief == Case(example=Example(prompt="A is", target=" B"), paraphrases=("Is A", "What\u2028is A?"), old=" C")
    assert bar == Case(example=Example(prompt="D is", target=" E"))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "A is"}', "target"),
        ('{"prompt": "A is", "target": " "}', "target of 'A is' is empty"),
        ('{"prompt": "A is", "target": " B", "paraphrase": ["x"]}', "paraphrase"),
        ('{"prompt": "A is", "target": " B", "paraphrases": "x"}', "paraphrases"),
        ('{"prompt": "A is", "target": " B", "neighbours": [{"prompt": "x"}]}', "answer"),
        ('{"prompt": "A is", "target": 3}', "target"),
        ('{"example": 3}', "Not a case"),
        ('{"example": {"target": " B"}}', "its example has no 'prompt'"),
        ('{"example": {}}', "its example has no 'prompt'"),
        ('{"prompt"', "not JSON"),
        ("{" * 100_000, "not JSON"),
        ("no bar here", "no bar"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(f"A is| B\n{line}\n")
    with pytest.raises(InvalidExample, match=rf"Line 2 of .*cases\.jsonl.*{why}"):
        read_cases(path)


def test_a_file_that_is_missing_empty_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidExample, match="No such file"):
        read_cases(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InvalidExample, match="is empty"):
        read_cases(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidExample, match="is binary"):
        read_cases(tmp_path / "binary.jsonl")


def test_a_bad_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b'a| b\n{"prompt": 3}\n\nno bar\nc| d\nMal\xe9| e\nlong| f\n')

    def check(case: Case) -> None:
        if case.example.prompt == "long":
            raise InvalidExample("too long.")

    cases, wrong = read_sound_cases(path, check)
    assert [str(c.example) for c in cases] == ["a| b", "c| d"]
    assert [str(e).split(":")[0] for e in wrong] == [f"Line {n} of {path}" for n in (2, 4, 6, 7)]
    assert "not UTF-8" in str(wrong[2]) and "too long" in str(wrong[3])
    path.write_text("no bar\n")
    with pytest.raises(InvalidExample, match="Line 1"):
        read_sound_cases(path)
