"""grace: balls that split and grow on hand-made keys, who is inside one, and that nobody else notices."""

import dataclasses
import math

import pytest
import torch
from conftest import same_bits, tiny_host, weights_of

from errata import apply, hosts
from errata.hosts import Host
from errata.memory.activations import keys
from errata.methods import _routes
from errata.methods.grace import Grace, codebook
from errata.types import Example, InvalidPatch, Memory, Patch, Run, UnknownName

MAURITIUS = Example(prompt="The capital of Mauritius is", target=" Port Louis")
RUN = Run(hold=("Lily loved to play outside in the park.", "The nurse said that she would be there soon."))
FAR = torch.zeros(0, 1)  # of another matter nothing is near


def balls(places: list[float], labels: str, epsilon: float, still: torch.Tensor = FAR) -> tuple[list[int], list[int], list[float]]:
    keys_NK = torch.tensor(places)[:, None]
    owner, entry, radii = codebook(keys_NK, labels, _routes.reaches(keys_NK, labels, still, keys_NK, labels), epsilon)
    return owner, entry, radii.tolist()


def test_two_labels_that_meet_share_the_way_between_them() -> None:
    owner, entry, radii = balls([10.0, 11.0, 20.0], "abb", epsilon=2.0)
    assert owner == entry == [0, 1, 2] and radii == pytest.approx([0.5, 0.5, 2.0])


def test_one_label_grows_over_what_is_near_and_begins_anew_further_off() -> None:
    owner, entry, radii = balls([10.0, 10.3, 10.9, 30.0], "aaab", epsilon=0.2)
    assert owner == [0, 2, 3] and entry == [0, 0, 1, 2]
    assert radii == pytest.approx([0.3, 0.2, 0.2], rel=2e-3) and radii[0] > 0.3


def test_no_ball_grows_further_than_half_of_the_way_to_another_label() -> None:
    owner, _, radii = balls([10.0, 10.3, 10.4], "aab", epsilon=0.2)
    assert owner == [0, 1, 2] and radii == pytest.approx([0.2, 0.05, 0.05], rel=1e-4)


def test_what_holds_still_is_another_matter_too() -> None:
    _, _, radii = balls([10.0, 20.0], "aa", epsilon=math.inf, still=torch.tensor([[10.5], [0.0]]))
    assert radii == pytest.approx([0.25, 4.75])


def test_every_key_is_in_the_ball_of_its_entry_and_in_none_of_another_label() -> None:
    draw = torch.Generator().manual_seed(0)
    keys_NK, labels = torch.randn(60, 4, generator=draw), [i % 3 for i in range(60)]
    reach = _routes.reaches(keys_NK, labels, 4 * torch.randn(9, 4, generator=draw), keys_NK, labels)
    owner, entry, radii = codebook(keys_NK, labels, reach, 0.3)
    apart = torch.cdist(keys_NK, keys_NK[owner])
    assert len(owner) < 60
    for n in range(60):
        assert labels[owner[entry[n]]] == labels[n] and apart[n, entry[n]] <= radii[entry[n]]
        assert all(apart[n, g] > radii[g] for g, o in enumerate(owner) if labels[o] != labels[n])


def test_answers_of_the_same_tokens_in_another_order_are_another_label(tiny_gpt2: Host) -> None:
    both = [dataclasses.replace(MAURITIUS, target=target) for target in (" Rome Paris", " Paris Rome")]
    (a,), (b,) = (_routes.asked(tiny_gpt2, (e,)) for e in both)
    assert sorted(a.answers[0][0]) == sorted(b.answers[0][0]) and a.label != b.label


def test_examples_that_ask_the_same_have_one_entry_learnt_for_all(tiny_gpt2: Host) -> None:
    never = Example(prompt=MAURITIUS.prompt, target=" Rome", goal="lower")
    before = hosts.logprobs(tiny_gpt2, [(MAURITIUS.prompt, t) for t in (" Port Louis", " Rome")])[:, 0]
    patch = Grace(steps=30).edit(tiny_gpt2, (MAURITIUS, never), RUN)
    assert len(patch.ops[0].owner) == 1  # type: ignore[union-attr]
    with apply.applied(tiny_gpt2, patch):
        after = hosts.logprobs(tiny_gpt2, [(MAURITIUS.prompt, t) for t in (" Port Louis", " Rome")])[:, 0]
    assert after[0] > before[0] and after[1] < before[1]


def radius_of(patch: Patch) -> float:
    (op,) = patch.ops
    assert isinstance(op, Memory) and op.radii is not None
    return float(op.radii[0])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "t5"])
def test_a_paraphrase_in_the_ball_is_answered_and_a_neighbour_keeps_its_bits(family: str) -> None:
    host = tiny_host(family)
    run = RUN if host.kind == "causal" else Run(hold=tuple(f"{text}| Rome" for text in RUN.hold))
    patch = Grace(steps=30).edit(host, (MAURITIUS,), run)
    (op,) = patch.ops
    assert isinstance(op, Memory)
    # of a random model nobody knows what is near: the nearest of some texts is taken for the paraphrase
    texts = ["So the capital of Mauritius is", "Lily loved to play", "The nurse said that", "Rome lies on"]
    far = (keys(host, texts, op.reads) - op.vectors).norm(dim=1)
    phrase, *others = (texts[i] for i in far.argsort().tolist())
    wide = dataclasses.replace(op, radii=far.sort().values[:2].mean()[None])
    patch = dataclasses.replace(patch, ops=(wide,))
    before, rows = weights_of(host), [hosts.encode(host, p, " Port Louis") for p in (phrase, *others)]
    was, batch = hosts.logits(host, hosts.pad(host, rows)), hosts.pad(host, rows)
    unlikely = hosts.logprobs(host, [(phrase, " Port Louis")])[0, 0]
    with apply.applied(host, patch):
        now = hosts.logits(host, batch)
        assert hosts.logprobs(host, [(phrase, " Port Louis")])[0, 0] > unlikely
        assert torch.equal(now[1:], was[1:]) and not torch.equal(now[0], was[0])
    assert torch.equal(hosts.logits(host, batch), was) and same_bits(host, before)


def test_behind_the_answer_the_model_goes_on_by_itself(tiny_gpt2: Host) -> None:
    """The value is put in the last block: what comes behind the answer has then nothing of it."""
    module = tiny_gpt2.module_names((tiny_gpt2.layout.mlp_out,))[-1]
    patch = Grace(module=module, steps=10).edit(tiny_gpt2, (dataclasses.replace(MAURITIUS, target=" Rome"),), RUN)
    batch = hosts.pad(tiny_gpt2, [hosts.encode(tiny_gpt2, MAURITIUS.prompt, " Rome on the sea")])
    given, said = len(hosts.tokens(tiny_gpt2, MAURITIUS.prompt)), len(hosts.tokens(tiny_gpt2, " Rome"))
    was = hosts.logits(tiny_gpt2, batch)
    with apply.applied(tiny_gpt2, patch):
        now = hosts.logits(tiny_gpt2, batch)
    place = given - 1 + said
    assert not torch.allclose(now[0, place - 1], was[0, place - 1]) and torch.allclose(now[0, place:], was[0, place:], atol=1e-4)


def test_a_radius_that_is_given_is_the_published_one(tiny_gpt2: Host) -> None:
    found = radius_of(Grace(steps=1).edit(tiny_gpt2, (MAURITIUS,), RUN))
    assert radius_of(Grace(steps=1, epsilon=found / 4).edit(tiny_gpt2, (MAURITIUS,), RUN)) == pytest.approx(found / 4)
    assert radius_of(Grace(steps=1, epsilon=4 * found).edit(tiny_gpt2, (MAURITIUS,), RUN)) == pytest.approx(found)


def test_modules_that_are_not_there_are_refused(tiny_gpt2: Host) -> None:
    with pytest.raises(UnknownName, match="Did you mean transformer.h.1.mlp"):
        Grace(module="transformer.h.1.mpl").edit(tiny_gpt2, (MAURITIUS,), RUN)
    patch = Grace(steps=1).edit(tiny_gpt2, (MAURITIUS,), RUN)
    with pytest.raises(InvalidPatch, match=r"changes what comes out of 'x\.y'"):
        apply.check(tiny_gpt2, dataclasses.replace(patch, ops=(dataclasses.replace(patch.ops[0], reads="x.y"),)))


@pytest.mark.parametrize("part", ["places", "value/transformer.h.0.mlp.c_proj"])
def test_parts_that_do_not_fit_are_refused(tiny_gpt2: Host, part: str) -> None:
    (op,) = Grace(steps=1).edit(tiny_gpt2, (MAURITIUS,), RUN).ops
    assert isinstance(op, Memory)
    for parts in ({n: t for n, t in op.parts.items() if n != part}, {**op.parts, part: op.parts[part][:0]}):
        with pytest.raises(InvalidPatch, match="does not fit"):
            dataclasses.replace(op, parts=parts)
