"""nse: which neurons are selected, what is left alone, and what further rounds do."""

import math

import pytest
import torch
from conftest import TEXT, tiny_host
from torch import Tensor

from errata import apply
from errata.hosts import Host
from errata.methods import _keys, _values
from errata.methods.memit import Memit
from errata.methods.nse import Nse, _selected_gains, selected
from errata.types import Add, Budget, Example, InvalidExample, Run, State

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The capital of France is", target=" Rome"),
    Example(prompt="Lily loved to play outside in", target=" late"),
)
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=10.0))
QUICK = {"layers": "0-1", "steps": 4, "contexts": 0, "stop": 0.0, "decay": 0.0, "held": 0}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_selected_neurons_are_the_greatest_and_hold_p_of_the_total() -> None:
    K_KP = randn(20, 3)
    score = K_KP.abs().sum(1)
    for p in (0.2, 0.8):
        s = selected(K_KP, p)
        left = torch.tensor([i for i in range(20) if i not in s.tolist()])
        assert score[s].min() >= score[left].max() and score[s].sum() <= p * score.sum() < score[s].sum() + score[left].max()
        assert s.tolist() == sorted(s.tolist())
    assert len(selected(K_KP, 1.0)) == 20 and selected(K_KP, 1e-9).tolist() == [int(score.argmax())]


@pytest.mark.parametrize("facts", [2, 20])
def test_the_solve_is_that_of_the_selected_rows_and_columns(facts: int) -> None:
    root, K_KP = randn(12, 30), randn(12, facts, seed=1)
    C = root @ root.T / 30
    s = selected(K_KP, 0.7)
    wanted = torch.zeros(facts, 12, dtype=torch.float64)
    wanted[:, s] = torch.linalg.solve(0.5 * len(s) * C[s][:, s] + K_KP[s] @ K_KP[s].T, K_KP[s]).T
    torch.testing.assert_close(_selected_gains(C, K_KP, 0.5, 0.7), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_other_neurons_keep_every_weight_and_all_of_them_is_memit(family: str) -> None:
    host = tiny_host(family)
    some, all_ = (Nse(p=p, rounds=1, **QUICK).edit(host, EXAMPLES, RUN) for p in (0.3, 1.0))
    memit = Memit(**QUICK).edit(host, EXAMPLES, RUN)
    for a, b, c in zip(some.ops, all_.ops, memit.ops, strict=True):
        change = apply.change(host, a)
        untouched = (change == 0).all(1 if family == "gpt2" else 0)
        assert 0.4 * len(untouched) < int(untouched.sum()) < len(untouched)
        assert torch.equal(apply.change(host, b), apply.change(host, c))


def missing(host: Host, rounds: int, open_: tuple[float, float], lam: float = 0.5) -> tuple[Tensor, Tensor, int]:
    """(share of each fact's delta that is missing with the weights on, its values, the rank of the first op)."""
    found = _values.places(host, EXAMPLES, [])
    delta_PD = 0.5 * randn(len(found), 32).float()
    modules = host.module_names((host.layout.mlp_out,), [0, 1])
    C, _ = _keys.covariances(host, RUN.hold, modules, 4)
    factors = _keys.priors(host, State(method="nse", host=host.id, config={}, tensors=C), [0, 1], "C", 1e-3)
    ops, weights = _keys.spread(host, found, delta_PD, factors, lambda own, K: _keys.gains(own[0], K, lam * own[1]), rounds, open_)
    block = f"{host.layout.blocks}.1"
    before, after = (_keys.averaged(host, found, modules[1], block, w)[1] for w in ({}, weights))
    for op in ops:  # what the op says is what was measured
        name = op.weight
        base = host.model.get_parameter(name).detach()
        torch.testing.assert_close(base + apply.change(host, op), weights[name], rtol=1e-4, atol=1e-5)
    rank = 0 if isinstance(ops[0], Add) else len(ops[0].A)
    return (before + delta_PD.double() - after).norm(dim=1) / delta_PD.norm(dim=1), delta_PD, rank


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_further_rounds_write_what_is_still_missing(family: str) -> None:
    host = tiny_host(family)
    once, _, rank = missing(host, 1, (0.0, math.inf))
    thrice, _, more = missing(host, 3, (0.0, math.inf))
    assert bool((thrice < 0.8 * once).all()) and (rank, more) == (3, 9)


def test_a_round_is_for_the_facts_that_are_open_and_leaves_the_others_where_they_are(tiny_llama: Host) -> None:
    once, _, _ = missing(tiny_llama, 1, (0.0, math.inf))
    between = float(once.sort().values[:2].mean())  # the nearest is done, the others are not
    again, _, _ = missing(tiny_llama, 2, (between, math.inf))
    done = int(once.argmin())
    for p in range(3):
        assert (float(again[p]) < 0.9 * float(once[p])) == (p != done)
    same, _, rank = missing(tiny_llama, 3, (float(once.max()) + 0.01, math.inf))
    torch.testing.assert_close(same, once, rtol=0, atol=1e-9)
    hopeless, _, _ = missing(tiny_llama, 3, (0.0, float(once.min()) - 0.01))
    torch.testing.assert_close(hopeless, once, rtol=0, atol=1e-9)
    assert rank == 3


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"p": 0.0}, {"p": 1.1}, {"lam": 0.0}, {"rounds": 0}, {"again": 3.0}, {"again": -0.1}):
        with pytest.raises(InvalidExample, match="nse needs"):
            Nse(**wrong)
