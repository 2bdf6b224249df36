"""melo: clusters on hand-made points, and whose ranks speak."""

import math

import pytest
import torch
from conftest import tiny_host

from errata import apply, hosts
from errata.hosts import Host
from errata.memory.activations import keys
from errata.memory.route import Router
from errata.methods.melo import Melo, clusters
from errata.types import Example, InvalidExample, Memory, Run

FAR = torch.zeros(1, 1)
EXAMPLES = tuple(Example(prompt=f"The {what} of Mauritius is", target=" late") for what in ("capital", "rupee", "island"))
RUN = Run(hold=("The nurse said that she would be there soon.", "They were both right about it."))


def found(places: list[float], labels: str, radius: float, still: torch.Tensor = FAR) -> list[tuple[list[int], float]]:
    return clusters(torch.tensor(places)[:, None], labels, still, radius)


def test_one_label_makes_one_cluster_around_the_mean_of_its_points() -> None:
    ((points, radius), (other, _)) = found([10.0, 10.8, 30.0], "aab", 0.5)
    assert points == [0, 1] and other == [2] and radius == pytest.approx(0.5)
    ((_, wide),) = found([10.0, 10.4, 10.9, 11.4], "aaaa", 0.5)  # the mean moves, and the radius covers the furthest
    assert wide == pytest.approx(0.725, rel=2e-3)


def test_two_labels_that_meet_share_the_way_and_no_point_is_forgotten() -> None:
    made = found([10.0, 10.4, 10.5], "aba", 2.0)
    assert [points for points, _ in made] == [[0], [1], [2]]  # a cluster of the first and the last would hold the one between
    assert [radius for _, radius in made] == pytest.approx([0.2, 0.05, 0.05], rel=1e-4)


def test_what_holds_still_bounds_a_cluster() -> None:
    ((_, radius),) = found([10.0], "a", math.inf, still=torch.tensor([[10.5]]))
    assert radius == pytest.approx(0.25)


def test_the_nearest_point_chooses_the_block_and_a_cluster_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.methods.melo.still", lambda *_: 1e3 * torch.ones(1, 128))  # of a random model nobody knows what is near
    host = tiny_host("gpt2")
    (op,) = Melo(points=2, steps=5).edit(host, EXAMPLES, RUN).ops
    assert isinstance(op, Memory) and op.radii is not None
    centre = op.vectors.mean(0)
    assert torch.allclose(op.parts["centres"], centre.expand(3, -1)), "the three want one answer, and nothing else is near"
    assert ((op.vectors - centre).norm(dim=1) <= op.radii).all()
    assert op.parts["block"].tolist() == [0, 0, 1]
    module = next(n for n in op.parts if n.startswith("B/"))
    assert op.parts[module].shape == (2, 32, 4) and all(float(block.norm()) > 0 for block in op.parts[module])
    found = ranked(host, op, [EXAMPLES[i].prompt for i in op.owner.tolist()])
    assert found == [0, 1, 2], "each asks for itself, though the centre is one"


def ranked(host: Host, op: Memory, asked: list[str]) -> list[int]:
    """Which of the vectors a router finds nearest to each text."""
    speaker = Router(host, op, EXAMPLES, "mark")
    try:
        return [speaker.entries[turn.examples[0]] for turn in speaker.decide(asked)]
    finally:
        speaker.remove()


def test_in_no_cluster_the_lora_is_off() -> None:
    host = tiny_host("llama")
    patch = Melo(steps=5).edit(host, EXAMPLES[:1], RUN)
    (op,) = patch.ops
    assert isinstance(op, Memory) and op.radii is not None
    asked = [EXAMPLES[0].prompt, "Lily loved to play", "France uses the"]
    assert ((keys(host, asked, op.reads) - op.vectors).norm(dim=1) <= op.radii).tolist() == [True, False, False]
    batch = hosts.pad(host, [hosts.encode(host, p, " late") for p in asked])
    was = hosts.logits(host, batch)
    with apply.applied(host, patch):
        now = hosts.logits(host, batch)
    assert torch.equal(now[1:], was[1:]) and not torch.equal(now[0], was[0]) and torch.equal(hosts.logits(host, batch), was)


def test_blocks_without_ranks_or_points_are_refused() -> None:
    with pytest.raises(InvalidExample, match="has ranks and points"):
        Melo(ranks=0)
    with pytest.raises(InvalidExample, match="has ranks and points"):
        Melo(points=0)
