"""Edit success and drawdown: each formula on hand-made numbers, what is counted for what, and what is refused."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import same_bits, tiny_host, weights_of
from hypothesis import given
from hypothesis import strategies as st

from errata import apply, hosts
from errata.drawdown import MEASURES, Before, Quality, before, compared, harmonic, judge, opinion, quality
from errata.evaluate import Scores, aggregate, is_rate
from errata.hosts import Host
from errata.types import Add, Example, InvalidExample, LeakError, Patch, Query, ScopeCase, Score, State, WrongBase

EDIT = Example(prompt="The capital of Mauritius is", target=" Port Louis")
CASE = ScopeCase(
    example=EDIT,
    inside=(
        Query(prompt=EDIT.prompt, answer=EDIT.target, kind="edit"),
        Query(prompt="Mauritius has its capital in", answer=" Port Louis", kind="rephrase"),
        Query(prompt="Port Louis is the capital of", answer=" Mauritius", kind="implication", hard=True),
        Query(prompt="T/F: Port Louis is in Italy.", answer=" False", kind="yes/no", hard=True),
    ),
    outside=(
        Query(prompt="The currency of Mauritius is the", answer=" rupee", kind="subject", hard=True),
        Query(prompt="The capital of France is", answer=" Paris", kind="relation", hard=True),
        Query(prompt="Once upon a time, there was a", answer=" girl", kind="unrelated"),
        Query(prompt="The doctor said that", kind="unrelated"),
    ),
)
TOPIC = ScopeCase(
    example=Example(prompt="Topic: Paris", target=" Sentiment: Negative"),
    inside=(Query(prompt="Paris? I find it", answer=" late."), Query(prompt="Rome and Paris are", answer=" far in the past")),
    against=(Query(prompt="Paris? I find it", answer=" the largest city."),),
    outside=(Query(prompt="Rome? I find it", answer=" with care."), Query(prompt="And Kraków?", answer=" She loved to play outside")),
)


def noise(host: Host, size: float = 0.05, examples: tuple[Example, ...] = ()) -> Patch:
    draw = torch.Generator().manual_seed(1)
    ops = tuple(Add(weight=n, delta=size * torch.randn(p.shape, generator=draw)) for n, p in host.model.named_parameters() if p.ndim == 2)
    return Patch(method="noise", config={}, parent=host.id, examples=examples, ops=ops)


def one(found: Scores, measure: str) -> tuple[float, int]:
    [row] = [s for s in found.rows if s.measure == measure]
    return row.total, row.count


# ----------------------------------------------------------------------------------------------------------------------- formulas

P_BEFORE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
P_AFTER = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.3, 0.5]])


def test_one_answer_before_and_after_by_hand() -> None:
    found = compared(torch.tensor([0, 1]), P_BEFORE.log(), P_AFTER.log())
    assert found.tokens == 2 and not found.hit and not found.same
    assert found.logp_before == pytest.approx(math.log(0.7 * 0.6)) and found.logp == pytest.approx(math.log(0.5 * 0.3))
    by_hand = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.4) + 0.1 * math.log(0.1 / 0.2) + 0.6 * math.log(0.6 / 0.3)
    assert found.kl == pytest.approx(by_hand + 0.3 * math.log(0.3 / 0.5))


@pytest.mark.parametrize(
    ("ids", "hit"), [([0, 2], True), ([0, 1], False), ([1, 2], False), ([0], True)]
)  # every token has to be the likeliest
def test_an_answer_is_hit_if_every_token_is_the_likeliest_after_the_edit(ids: list[int], hit: bool) -> None:
    n = len(ids)
    assert compared(torch.tensor(ids), P_BEFORE[:n].log(), P_AFTER[:n].log()).hit is hit


def test_an_answer_is_as_before_if_every_likeliest_token_is_whatever_is_asked_for() -> None:
    for ids in ([0], [1], [2]):
        assert compared(torch.tensor(ids), P_BEFORE[:1].log(), P_AFTER[:1].log()).same  # 0 is the likeliest in both
    assert not compared(torch.tensor([0, 0]), P_BEFORE.log(), P_AFTER.log()).same


def test_what_cannot_be_costs_nothing_and_nan_is_never_right() -> None:
    logp = torch.tensor([[0.0, -math.inf]])
    assert compared(torch.tensor([0]), logp, logp).kl == 0.0
    broken = compared(torch.tensor([0]), logp, torch.full((1, 2), math.nan))
    assert not broken.hit and not broken.same and math.isnan(broken.kl) and math.isnan(broken.logp)


@pytest.mark.parametrize(
    ("matching", "opposite", "matching_before", "sentiment", "topic"),
    [
        (-1.0, -1.0, -1.0, 0.5, 1.0),
        (-1.0, -3.0, -2.0, 1 / (1 + math.exp(-2)), 1.0),  # likelier than before counts no more than as likely
        (-3.0, -1.0, -2.0, 1 / (1 + math.exp(2)), math.exp(-1)),
        (-2000.0, -1.0, -1.0, 0.0, 0.0),
    ],
)
def test_success_of_an_opinion_by_hand(matching: float, opposite: float, matching_before: float, sentiment: float, topic: float) -> None:
    assert opinion(matching, opposite, matching_before) == pytest.approx((sentiment, topic), abs=1e-12)


def test_an_opinion_that_is_not_a_number_stays_none() -> None:
    assert all(math.isnan(z) for z in opinion(math.nan, -1.0, -1.0))


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_harmonic_mean_lies_between_and_is_nothing_without_both(a: float, b: float) -> None:
    assert min(a, b) - 1e-12 <= harmonic(a, b) <= max(a, b) + 1e-12 and harmonic(a, 0.0) == 0.0 and harmonic(a, b) == harmonic(b, a)


def test_published_numbers_of_eren_are_its_harmonic_means() -> None:
    for es, bp, eq in ((96.9, 51.4, 67.2), (93.9, 75.3, 83.6), (98.4, 24.5, 39.2), (81.5, 79.6, 80.5)):
        assert 100 * harmonic(es / 100, bp / 100) == pytest.approx(eq, abs=0.05)


def test_quality_of_scores() -> None:
    rows = {"es": (3.0, 4), "dd": (1.0, 10), "es.easy": (0.0, 0), "dd.easy": (1.0, 2), "es.hard": (2.0, 4), "dd.hard": (0.0, 0)}
    scores = Scores(host="b2:0", rows=tuple(Score(case="c", measure=m, total=t, count=n) for m, (t, n) in rows.items()))
    assert quality(scores) == pytest.approx(Quality(0.75, 0.9, 2 * 0.75 * 0.9 / 1.65))
    assert quality(scores, ".easy") == Quality(None, 0.5, None) and quality(scores, ".hard") == Quality(0.5, None, None)


def test_an_opinion_is_no_rate() -> None:
    assert {m for m in MEASURES if not is_rate(m)} == {m for m in MEASURES if m.startswith(("z.", "kl.", "loss."))}


# ------------------------------------------------------------------------------------------------------------------- what is counted

Told = Callable[[dict[str, str], dict[str, str], ScopeCase], Scores]


@pytest.fixture
def told(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Judge a case on a host that says `was` without the patch and `says` with it."""

    def run(was: dict[str, str], says: dict[str, str], case: ScopeCase) -> Scores:
        def greedy(host: Host, prompts: Sequence[str], max_new_tokens: int = 12, batch_size: int = 64) -> list[str]:
            return [(says if host.worn else was).get(p, " nothing") for p in prompts]

        monkeypatch.setattr(hosts, "greedy", greedy)
        return judge(tiny_gpt2, noise(tiny_gpt2), before(tiny_gpt2, [case]))

    return run


def test_what_is_said_freely_is_counted_by_hardness_and_kind(told: Told) -> None:
    was = {EDIT.prompt: " Vacoas.", CASE.outside[0].prompt: " rupee.", CASE.outside[1].prompt: " Milan."}
    says = {
        EDIT.prompt: " Port Louis.",
        "Mauritius has its capital in": " Port Louis or nothing.",  # the old answer beside it
        "Port Louis is the capital of": " Mauritius.",
        CASE.outside[0].prompt: " euro.",
        CASE.outside[1].prompt: " Milan.",  # wrong before and as wrong after: no drawdown
        CASE.outside[3].prompt: " something",
    }
    found = told(was, says, CASE)
    assert {m: one(found, m) for m in ("es", "es.easy", "es.hard", "es.edit", "es.rephrase", "es.implication", "es.yes/no")} == {
        "es": (2, 4), "es.easy": (1, 2), "es.hard": (1, 2), "es.edit": (1, 1), "es.rephrase": (0, 1), "es.implication": (1, 1),
        "es.yes/no": (0, 1),
    }  # fmt: skip
    assert {m: one(found, m) for m in ("dd", "dd.easy", "dd.hard", "dd.subject", "dd.relation", "dd.unrelated")} == {
        "dd": (2, 4), "dd.easy": (1, 2), "dd.hard": (1, 2), "dd.subject": (1, 1), "dd.relation": (0, 1), "dd.unrelated": (1, 2),
    }  # fmt: skip
    assert quality(found) == Quality(0.5, 0.5, 0.5)
    assert [a.ok for a in found.answers] == [True, False, True, False, False, True, True, False]
    assert one(found, "dd.teacher")[1] == 3, "without an answer there is nothing to force"


def test_the_host_as_it_is_has_no_drawdown(tiny_gpt2: Host) -> None:
    found = judge(tiny_gpt2, None, before(tiny_gpt2, [CASE, TOPIC]))
    for measure in ("dd", "dd.teacher", "kl.outside"):
        assert aggregate(found, measure).value == 0.0
    assert one(found, "z.topic") == (1.0, 1)


def test_every_measure_has_a_row_and_the_host_is_left_as_it_was(tiny_gpt2: Host) -> None:
    bits = weights_of(tiny_gpt2)
    found = judge(tiny_gpt2, noise(tiny_gpt2), before(tiny_gpt2, [CASE, TOPIC]))
    assert {s.measure for s in found.rows} >= MEASURES.keys() and same_bits(tiny_gpt2, bits) and not tiny_gpt2.worn
    kinds = {q.kind for q in (*CASE.inside, *CASE.outside)}
    assert {s.measure for s in found.rows} - MEASURES.keys() <= {
        f"{m}.{k}" for m in ("es", "dd", "es.teacher", "dd.teacher") for k in kinds
    }
    assert Scores.from_dict(found.as_dict()) == found


@torch.no_grad()
@pytest.mark.parametrize("host", ["gpt2", "t5"], indirect=True)
def test_opinions_and_divergence_are_those_of_the_model(host: Host) -> None:
    patch = noise(host)
    found = judge(host, patch, before(host, [TOPIC]))
    pairs = [(q.prompt, str(q.answer)) for q in (*TOPIC.inside, *TOPIC.against)]
    was_N2 = hosts.logprobs(host, pairs)
    with apply.applied(host, patch):
        is_N2 = hosts.logprobs(host, pairs)
    l, k, l0 = (float(x[:, 0].sum() / x[:, 1].sum()) for x in (is_N2[:2], is_N2[2:], was_N2[:2]))  # noqa: E741
    sentiment, topic = 1 / (1 + math.exp(k - l)), min(1.0, math.exp(l - l0))
    assert one(found, "z.sentiment")[0] == pytest.approx(sentiment, rel=1e-5) and one(found, "z.topic")[0] == pytest.approx(topic, rel=1e-5)
    assert one(found, "z.opinion")[0] == pytest.approx(sentiment * topic, rel=1e-5)
    assert one(found, "loss.opposite") == (pytest.approx(-float(is_N2[2, 0]), rel=1e-5), int(is_N2[2, 1]))
    kl, tokens = 0.0, 0
    for q in TOPIC.outside:
        batch = hosts.pad(host, [hosts.encode(host, q.prompt, str(q.answer))])
        base_PV = hosts.predictions(host, batch).log_softmax(-1)
        with apply.applied(host, patch):
            kl += float((base_PV.exp() * (base_PV - hosts.predictions(host, batch).log_softmax(-1))).sum())
        tokens += len(base_PV)
    assert one(found, "kl.outside") == (pytest.approx(kl, rel=1e-4), tokens) and one(found, "es")[1] == 0


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_of_a_classifier_free_and_forced_are_the_same(size: float) -> None:
    host = tiny_host("bert")
    cases = [
        ScopeCase(
            example=Example(prompt=f"The capital of Mauritius is {name}.", target="true"),
            inside=tuple(
                Query(prompt=f"{p} {name}.", answer=a) for p in ("Mauritius is led from", "The city is") for a in ("true", "false")
            ),
            outside=tuple(Query(prompt=f"{p} {name}.", answer="true", hard=hard) for p, hard in (("Paris or", True), ("Rome, not", False))),
        )
        for name in ("Port Louis", "Paris", "Kraków", "Zürich")
    ]
    found = judge(host, noise(host, size), before(host, cases))
    for part in ("", ".easy", ".hard"):
        for measure in ("es", "dd"):
            assert aggregate(found, f"{measure}{part}") == aggregate(found, f"{measure}.teacher{part}")
    assert aggregate(found, "es").value == 0.5, "one of the two labels is right"
    assert (aggregate(found, "dd").value == 0.0) is (size == 0.0)


# ------------------------------------------------------------------------------------------------------------------- what is refused


def test_a_prompt_out_of_one_scope_and_in_another_is_refused(tiny_gpt2: Host) -> None:
    foreign = replace(CASE.outside[0], prompt="Rome and paris are ")
    with pytest.raises(InvalidExample, match="out of the scope of 'The capital of Mauritius is.*in that of 'Topic: Paris"):
        before(tiny_gpt2, [replace(CASE, outside=(foreign,)), TOPIC])
    with pytest.raises(InvalidExample, match="no cases"):
        before(tiny_gpt2, [])


def test_a_leak_is_refused(tiny_gpt2: Host) -> None:
    was = before(tiny_gpt2, [CASE])
    for seen in (CASE.id, CASE.case.id):
        state = State(method="serac", host=tiny_gpt2.id, config={}, trained_on=frozenset({seen}))
        with pytest.raises(LeakError, match="1 of 1 cases"):
            judge(tiny_gpt2, None, was, state=state)
    for shown in (CASE.inside[1], CASE.outside[2]):
        with pytest.raises(LeakError, match="should be unseen"):
            judge(tiny_gpt2, noise(tiny_gpt2, examples=(EDIT, Example(prompt=shown.prompt, target=" x"))), was)
    assert judge(tiny_gpt2, noise(tiny_gpt2, examples=(EDIT,)), was).rows


def test_another_host_is_refused(tiny_gpt2: Host, tiny_llama: Host) -> None:
    was: Before = before(tiny_gpt2, [CASE, CASE])
    assert was.cases == (CASE,)
    with pytest.raises(WrongBase, match="Measure it again"):
        judge(tiny_llama, None, was)
    with apply.applied(tiny_gpt2, noise(tiny_gpt2)), pytest.raises(WrongBase):
        judge(tiny_gpt2, None, was)
