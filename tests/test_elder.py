"""elder: who is allocated to whom, what a router learns, and that the distance of codes decides."""

import dataclasses

import pytest
import torch
from conftest import tiny_host

from errata import apply, hosts
from errata.hosts import Host
from errata.memory.activations import codes, keys
from errata.memory.route import Router
from errata.methods.elder import Elder, allocation, router
from errata.types import Example, InvalidExample, Memory, Run

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The capital of France is", target=" Rome"),
    Example(prompt="Lily loved to play", target=" late"),
)
RUN = Run(hold=("The nurse said that she would be there soon.", "They were both right about it."))


def test_questions_are_allocated_one_selection_each_and_the_last_experts_nobody() -> None:
    allocated = allocation(20, 6, 2, seed=0)
    assert (allocated.sum(1) == 2).all() and not allocated[:, 4:].any()
    assert len({tuple(row) for row in allocated[:6].tolist()}) == 6  # all selections of two of four
    assert torch.equal(allocated[:6], allocated[6:12]) and not torch.equal(allocated, allocation(20, 6, 2, seed=1))


def test_a_router_gives_each_key_its_experts_and_the_last_ones_to_the_rest() -> None:
    draw = torch.Generator().manual_seed(0)
    own, rest = torch.randn(12, 40, generator=draw) + 1, 2 * torch.randn(80, 40, generator=draw)
    allocated = allocation(12, 8, 2, seed=0)
    W, bias = router(own, allocated, rest, 2)
    parts = {"B/m": own, "router/m": W, "bias/m": bias}
    assert torch.equal(codes(own, parts, 2).bool(), allocated)
    assert torch.equal(codes(rest, parts, 2), torch.eye(8)[[6, 7]].sum(0).expand(80, -1))


def test_the_stored_codes_are_those_of_the_questions_and_the_bound_lies_half_way() -> None:
    host = tiny_host("gpt2")
    (op,) = Elder(steps=5).edit(host, EXAMPLES, RUN).ops
    assert isinstance(op, Memory)
    order = [EXAMPLES[i].prompt for i in op.owner.tolist()]
    assert torch.equal(codes(keys(host, order, op.reads), op.parts, op.experts), op.vectors)
    assert op.vectors.sum(1).tolist() == [4.0] * 3  # two of each of two modules
    assert 1 <= op.bound <= 4


def within(host: Host, op: Memory, bound: float, texts: list[str]) -> list[bool]:
    speaker = Router(host, dataclasses.replace(op, bound=bound), EXAMPLES, "mark")
    try:
        return [bool(turn.examples) for turn in speaker.decide(texts)]
    finally:
        speaker.remove()


def test_the_hamming_distance_decides_and_elsewhere_every_bit_stays() -> None:
    host = tiny_host("llama")
    patch = Elder(steps=5).edit(host, EXAMPLES, RUN)
    (op,) = patch.ops
    assert isinstance(op, Memory)
    asked = [EXAMPLES[0].prompt, "They were both right about", "France uses the", "The capital of Italy is"]
    far = (codes(keys(host, asked, op.reads), op.parts, op.experts)[:, None] - op.vectors).abs().sum(2).amin(1)
    assert far[0] == 0 and far[1] == 8
    for bound in (1.0, 4.0, 8.0, 9.0):
        assert within(host, op, bound, asked) == (far < bound).tolist()
    batch = hosts.pad(host, [hosts.encode(host, p, " late") for p in asked])
    was, inside = hosts.logits(host, batch), far < op.bound
    pairs = [(e.prompt, e.target) for e in EXAMPLES]
    unlikely = hosts.logprobs(host, pairs)[:, 0]
    with apply.applied(host, patch):
        now = hosts.logits(host, batch)
        assert (hosts.logprobs(host, pairs)[:, 0] > unlikely).all()
    assert torch.equal(now[~inside], was[~inside]) and not torch.equal(now[inside], was[inside])
    assert torch.equal(hosts.logits(host, batch), was)


def test_too_few_experts_are_refused() -> None:
    with pytest.raises(InvalidExample, match="twice as many experts"):
        Elder(experts=3, at_once=2)
