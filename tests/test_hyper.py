"""The hypernetwork: what it is before it has learnt, its statistics, and its way into a State and back."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errata.methods import _hyper
from errata.methods._hyper import Net

K, V = 6, 4
WIDTHS = {"a": (K, V), "b": (K, V), "c": (3, V)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(n: int, seed: int = 0, k: int = K) -> tuple[Tensor, Tensor]:
    return 3 + randn(n, k, seed=seed) * torch.arange(1, k + 1), 1e-3 * randn(n, V, seed=seed + 100)


def seen(faithful: bool = False, **more: int) -> Net:
    net = _hyper.fresh(WIDTHS, rank=5, lam=0.1, seed=0, faithful=faithful)
    for i, (module, (k, _)) in enumerate(WIDTHS.items()):
        net = _hyper.watched(net, module, *rows(40, seed=i, k=k))
    return net


@pytest.mark.parametrize("faithful", [False, True])
def test_a_network_that_has_learnt_nothing_is_the_identity_and_can_learn(faithful: bool) -> None:
    net = seen(faithful)
    leaves = {name: t.clone().requires_grad_() for name, t in net.parameters.items()}
    both = _hyper.factors(dataclasses.replace(net, parameters=leaves), "a", *rows(7))
    for got, wanted in zip(both, _hyper.standardised(net, "a", *rows(7)), strict=True):
        torch.testing.assert_close(got, wanted.float())
    sum(x.square().sum() for x in both).backward()
    for name in ("6x4/B0", "6x4/b0", "6x4/B1", "a/shift0"):  # not A: nothing comes through B yet
        assert float(leaves[name].grad.norm()) > 0, "at exactly zero, where all of them begin"


def test_modules_of_one_shape_share_what_is_large() -> None:
    net = seen()
    shared = {name.split("/")[0] for name in net.parameters if name.endswith("/A0")}
    assert shared == {"6x4", "3x4"} and net.shapes == {"a": "6x4", "b": "6x4", "c": "3x4"}
    own = dict(net.parameters) | {"b/shift0": torch.ones(K + V)}
    other = dataclasses.replace(net, parameters=own)
    assert torch.equal(_hyper.factors(other, "a", *rows(3))[0], _hyper.factors(net, "a", *rows(3))[0])
    assert not torch.equal(_hyper.factors(other, "b", *rows(3))[0], _hyper.factors(net, "b", *rows(3))[0])


def test_another_seed_is_another_network() -> None:
    first, same, other = (_hyper.fresh(WIDTHS, rank=5, lam=0.1, seed=seed).parameters["6x4/A0"] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert 0.7 < float(first.std()) < 1.3


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_statistics_of_parts_are_those_of_all_rows(parts: list[int]) -> None:
    """Single rows among them, and rows that are not finite, which are left out."""
    keys, g = rows(sum(parts))
    net = _hyper.fresh(WIDTHS, rank=5, lam=0.1, seed=0)
    for part in zip(keys.split(parts), g.split(parts), strict=True):
        net = _hyper.watched(net, "a", *part)
        net = _hyper.watched(net, "a", torch.full((1, K), torch.nan), torch.zeros(1, V))
        net = _hyper.watched(net, "a", torch.zeros(1, K), torch.full((1, V), torch.inf))
    k, of_g = net.moments["a"]
    assert k.n == of_g.n == sum(parts) and "b" not in net.moments
    torch.testing.assert_close(k.mean_W, keys.double().mean(0))
    if k.n > 1:
        torch.testing.assert_close(k.squares_W / (k.n - 1), torch.var(keys.double(), dim=0))
        torch.testing.assert_close(of_g.squares_W / (k.n - 1), torch.var(g.double(), dim=0))
    assert all(x.isfinite().all() for x in _hyper.standardised(net, "a", keys, g))


def test_the_published_deviation_is_too_large_and_shared() -> None:
    x, g = randn(400, K), randn(400, V)
    net = _hyper.fresh(WIDTHS, rank=5, lam=0.1, seed=0, faithful=True)
    for i, part in enumerate(zip(x.split(4), g.split(4), strict=True)):
        net = _hyper.watched(net, "ab"[i % 2], *part)
    assert set(net.moments) == {"6x4"} and net.moments["6x4"][0].n == 400
    too_large = (net.moments["6x4"][0].squares_W / 399).sqrt() / x.double().std(0)
    assert 1.10 < float(too_large.min()) and float(too_large.max()) < 1.14
    one = _hyper.watched(net, "a", x[:1], g[:1])
    assert one.moments["6x4"][0].squares_W.isfinite().all(), "a single row is not NaN for good"


def test_untrained_rows_move_against_their_gradients_and_not_without_one() -> None:
    net, (keys, g) = seen(), rows(9)
    g[4] = 0.0
    d = _hyper.differences(net, "a", keys, g)
    against = (d * g).sum(1)
    assert bool((against[[0, 1, 2, 3, 5, 6, 7, 8]] < 0).all()) and torch.equal(d[4], torch.zeros(V))


def test_faithful_differences_are_the_published_ones() -> None:
    net, (keys, g) = seen(faithful=True), rows(9)
    own = dict(net.parameters) | {"6x4/B0": randn(5, K + V), "6x4/b0": randn(K + V), "a/eta": torch.tensor(-2e-3)}
    net = dataclasses.replace(net, parameters=own)
    k, v = net.moments["6x4"]
    x = torch.cat([(r.double() - m.mean_W) / (m.squares_W / (m.n - 1)).sqrt() for r, m in ((keys, k), (g, v))], dim=1).float()
    x = x + torch.relu(x @ own["6x4/A0"] @ own["6x4/B0"] + own["6x4/b0"])
    wanted = 2e-3 * (keys * x[:, :K]).sum(1, keepdim=True) * x[:, K:]
    torch.testing.assert_close(_hyper.differences(net, "a", keys, g), wanted, rtol=1e-3, atol=1e-5)


def test_with_a_metric_outputs_change_least_where_text_feels_it() -> None:
    root = randn(V, 3 * V, seed=5) * torch.tensor([[10.0], [1.0], [1.0], [0.1]])
    G, (keys, g) = root @ root.T, rows(9)
    T = _hyper.metric(G)
    torch.testing.assert_close(T @ T @ (G / (G.trace() / V) + torch.eye(V)), torch.eye(V), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_hyper.metric(torch.zeros(V, V)), torch.eye(V))
    bare = dataclasses.replace(_hyper.fresh(WIDTHS, rank=5, lam=0.1, seed=0), metrics={"a": T})
    net, plain = (
        _hyper.watched(bare, "a", *rows(40)),
        _hyper.watched(dataclasses.replace(bare, metrics={}), "a", rows(40)[0], rows(40)[1] @ T),
    )
    torch.testing.assert_close(_hyper.differences(net, "a", keys, g), _hyper.differences(plain, "a", keys, g @ T) @ T)
    kept = _hyper.of_tensors(_hyper.tensors(net), {"a": (K, V)}, False, torch.device("cpu"))
    assert torch.equal(_hyper.differences(kept, "a", keys, g), _hyper.differences(net, "a", keys, g))


def test_calibration_is_of_the_length_alone() -> None:
    net, both = seen(), rows(9)
    longer = _hyper.differences(_hyper.calibrated(net, "a", 3.0), "a", *both)
    torch.testing.assert_close(longer, 3.0 * _hyper.differences(net, "a", *both))


@pytest.mark.parametrize("faithful", [False, True])
def test_it_comes_back_from_a_state_with_every_bit(faithful: bool) -> None:
    net, both = seen(faithful), rows(9)
    kept = _hyper.tensors(net) | {"something": torch.zeros(1)}
    again = _hyper.of_tensors(kept, WIDTHS, faithful, torch.device("cpu"))
    assert again.parameters.keys() == net.parameters.keys()
    assert torch.equal(_hyper.differences(again, "a", *both), _hyper.differences(net, "a", *both))
    assert _hyper.lam(again, "a") == _hyper.lam(net, "a") == pytest.approx(0.1)
