"""The sums against dense formulas, autograd and each other, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errata.methods import _normal
from errata.methods._normal import Plain, Prior, Reduced, Whitened
from errata.types import InvalidExample

K, V = 8, 5
PRIORS = ("plain", "whitened", "reduced")
priors = pytest.mark.parametrize("kind", PRIORS)
sizes = pytest.mark.parametrize("n", [1, 4, 5, 8, 30])  # fewer rows than coordinates, as many, more
Dense = tuple[Prior, Tensor, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prior_of(kind: str) -> tuple[Prior, Tensor, Tensor]:
    """(the prior, T with x = T k, P with the penalty lam <S, P S>)."""
    if kind == "plain":
        return Plain(width=K), torch.eye(K).double(), torch.eye(K).double()
    if kind == "whitened":
        root = randn(K, 3 * K, seed=7)
        C = root @ root.T / (3 * K) * torch.logspace(0, 2, K).double().outer(torch.logspace(0, 2, K).double())
        L = torch.linalg.cholesky(C)
        return Whitened(L_KK=L), torch.linalg.inv(L), C
    U = torch.linalg.qr(randn(K, 5, seed=8))[0]
    return Reduced(U_KR=U), U.T, torch.eye(K).double()


def dense(kind: str, keys: Tensor, d: Tensor, lam: float) -> Tensor:
    """S by the formula of the paper, as the whole matrix."""
    _, T, P = prior_of(kind)
    if kind == "reduced":  # AlphaEdit's own, with the projection: not symmetric
        project = T.T @ T
        return torch.linalg.solve(project @ keys.T @ keys + lam * P, project @ keys.T @ d)
    return torch.linalg.solve(keys.T @ keys + lam * P, keys.T @ d)


@priors
@sizes
@pytest.mark.parametrize("keep", [False, True])
def test_the_shift_is_the_dense_solve(kind: str, n: int, keep: bool) -> None:
    prior, _, _ = prior_of(kind)
    keys, d, lam = randn(n, K), randn(n, V, seed=1), 0.3
    sums = _normal.of(prior, keys, d, keep=keep)
    solved = _normal.solve(sums, lam)
    few = n < prior.width * (0.75 if kind == "whitened" else 1)
    assert (solved.white is not None) == few and (sums.rows is not None) == (keep or few)
    torch.testing.assert_close(solved.shift, dense(kind, keys, d, lam), rtol=1e-9, atol=1e-10)


@priors
@sizes
def test_gains_times_differences_are_the_shift(kind: str, n: int) -> None:
    keys, d = randn(n, K), randn(n, V, seed=1)
    solved = _normal.solve(_normal.of(prior_of(kind)[0], keys, d, keep=True), 0.3)
    torch.testing.assert_close(_normal.gains(solved).T @ d, solved.shift, rtol=1e-9, atol=1e-10)


@priors
@sizes
@pytest.mark.parametrize("keep", [False, True])
def test_another_right_side_is_answered_by_the_same_factor(kind: str, n: int, keep: bool) -> None:
    prior, T, P = prior_of(kind)
    keys, rhs, lam = randn(n, K), randn(K, V, seed=2), 0.3
    X = keys @ T.T if kind == "reduced" else keys
    matrix = X.T @ X + lam * (torch.eye(prior.width).double() if kind == "reduced" else P)
    wanted = T.T @ torch.linalg.solve(matrix, T @ rhs) if kind == "reduced" else torch.linalg.solve(matrix, rhs)
    solved = _normal.solve(_normal.of(prior, keys, randn(n, V, seed=1), keep=keep), lam)
    torch.testing.assert_close(_normal.answer(solved, rhs), wanted, rtol=1e-9, atol=1e-10)


@priors
@pytest.mark.parametrize("n", [1, 3])
def test_without_lam_each_row_gets_its_value_and_the_shift_is_the_smallest(kind: str, n: int) -> None:
    prior, T, P = prior_of(kind)
    keys, d = randn(n, K), randn(n, V, seed=1)
    S = _normal.solve(_normal.of(prior, keys, d), 0.0).shift
    torch.testing.assert_close(keys @ S, d, rtol=1e-9, atol=1e-9)
    free = T.T @ torch.linalg.pinv(keys @ T.T)  # the directions that are allowed, less what would change a row
    for seed in range(3):
        other = T.T @ randn(prior.width, V, seed=seed)
        other = other - free @ (keys @ other)
        torch.testing.assert_close(keys @ (S + other), d, rtol=1e-7, atol=1e-7)
        assert float(((S + other) * (P @ (S + other))).sum()) > float((S * (P @ S)).sum())


def test_rows_that_follow_from_one_another_need_slack() -> None:
    keys, d = randn(1, K).repeat(2, 1), randn(2, V, seed=1)
    with pytest.raises(InvalidExample, match="slack"):
        _normal.solve(_normal.of(Plain(width=K), keys, d), 0.0)
    S = _normal.solve(_normal.of(Plain(width=K), keys, d), 1e-9).shift
    torch.testing.assert_close(keys @ S, d.mean(0).expand(2, V), rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidExample, match="slack"):
        _normal.solve(_normal.of(Plain(width=K), randn(K + 1, K), randn(K + 1, V), keep=True), 0.0)


@given(st.sampled_from(PRIORS), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(-4, 2), st.randoms(use_true_random=False))
def test_sums_do_not_see_how_their_rows_came(kind: str, parts: list[int], log_lam: float, random) -> None:
    """In any pieces, merged in any order, with rows or without."""
    prior, n, lam = prior_of(kind)[0], sum(parts), 10**log_lam
    keys, d = randn(n, K), randn(n, V, seed=1)
    pieces = list(zip(keys.split(parts), d.split(parts), strict=True))
    random.shuffle(pieces)
    sums, growing = [_normal.of(prior, *piece) for piece in pieces], _normal.of(prior, *pieces[0])
    for piece in pieces[1:]:
        growing = _normal.grown(growing, *piece)
    while len(sums) > 1:
        a = sums.pop(random.randrange(len(sums)))
        b = sums.pop(random.randrange(len(sums)))
        sums.append(_normal.merged(a, b))
    whole = _normal.solve(_normal.of(prior, keys, d, keep=True), lam).shift
    for total in (sums[0], growing):
        assert total.n == n
        torch.testing.assert_close(_normal.solve(total, lam).shift, whole, rtol=1e-6, atol=1e-8)


def test_a_factor_and_what_it_is_of_may_lie_in_one_matrix() -> None:
    """The factor on and below the diagonal, C above it: in both forms of the solve."""
    apart, _, C = prior_of("whitened")
    assert isinstance(apart, Whitened)
    both = apart.L_KK + C.triu(1)
    together = Whitened(L_KK=both, upper_KK=both)
    torch.testing.assert_close(together.P_KK, C, rtol=1e-9, atol=1e-10)
    for n in (3, 30):
        keys, d = randn(n, K), randn(n, V, seed=1)
        one, other = (_normal.solve(_normal.of(p, keys, d), 0.3).shift for p in (apart, together))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@given(st.sampled_from(PRIORS), st.integers(1, 12), st.integers(1, 12), st.floats(-3, 2))
def test_an_example_that_is_taken_back_was_never_there(kind: str, stay: int, go: int, log_lam: float) -> None:
    prior, lam = prior_of(kind)[0], 10**log_lam
    keys, d = randn(stay + go, K), randn(stay + go, V, seed=1)
    both = _normal.of(prior, keys, d)
    left = _normal.solve(_normal.without(both, keys[stay:], d[stay:]), lam)
    never = _normal.solve(_normal.of(prior, keys[:stay], d[:stay]), lam)
    assert left.sums.n == stay
    assert float((left.shift - never.shift).norm()) <= 1e-6 * float(never.shift.norm())


@priors
def test_built_again_from_the_rows_that_stay_it_was_never_there_to_the_last_bit(kind: str) -> None:
    prior = prior_of(kind)[0]
    rows = [(randn(3, K, seed=s), randn(3, V, seed=50 + s)) for s in range(6)]

    def built(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = _normal.of(prior, *parts[0])
        for part in parts[1:]:
            total = _normal.merged(total, _normal.of(prior, *part))
        return _normal.solve(total, 0.3).shift

    assert torch.equal(built([r for i, r in enumerate(rows) if i != 2]), built(rows[:2] + rows[3:]))
    assert not torch.equal(built(rows), built(rows[:2] + rows[3:]))


def test_memory_does_not_grow_with_the_rows_unless_they_are_kept() -> None:
    def numbers(keep: bool) -> list[int]:
        total, seen = _normal.of(Plain(width=K), randn(2, K), randn(2, V), keep=keep), []
        for s in range(20):
            total = _normal.merged(total, _normal.of(Plain(width=K), randn(2, K, seed=s), randn(2, V), keep=keep))
            seen.append(sum(t.numel() for t in (*(total.rows or ()), *(total.folded or ()))))
        assert total.n == 42
        return seen

    assert max(numbers(keep=False)) <= K * (K + V) and numbers(keep=False)[-1] == numbers(keep=False)[5]
    assert numbers(keep=True)[-1] == 42 * (K + V)


@pytest.mark.parametrize("n", [4, 30])
def test_one_sum_serves_many_lams(n: int) -> None:
    sums = _normal.of(Plain(width=K), randn(n, K), randn(n, V, seed=1))
    first = _normal.solve(sums, 0.3).shift
    assert not torch.allclose(_normal.solve(sums, 30.0).shift, first) and torch.equal(_normal.solve(sums, 0.3).shift, first)


def test_sums_of_other_coordinates_do_not_merge() -> None:
    with pytest.raises(AssertionError, match="coordinates"):
        _normal.merged(_normal.of(Plain(width=K), randn(1, K), randn(1, V)), _normal.of(prior_of("whitened")[0], randn(1, K), randn(1, V)))


@priors
@sizes
@pytest.mark.parametrize("kept", [False, True])
def test_backward_is_autograd_through_the_dense_solve(kind: str, n: int, kept: bool) -> None:
    prior, T, P = prior_of(kind)
    keys, grad = randn(n, K), randn(K, V, seed=2)
    d, log_lam = randn(n, V, seed=1).requires_grad_(), torch.tensor(math.log(0.3), dtype=torch.float64, requires_grad=True)
    if kind == "reduced":
        inner = T @ keys.T @ keys @ T.T + log_lam.exp() * torch.eye(len(T)).double()
        S = T.T @ torch.linalg.solve(inner, T @ keys.T @ d)
    else:
        S = torch.linalg.solve(keys.T @ keys + log_lam.exp() * P, keys.T @ d)
    wanted_d, wanted_lam = torch.autograd.grad((S * grad).sum(), (d, log_lam))
    solved = _normal.solve(_normal.of(prior, keys, d.detach(), keep=kept), 0.3)
    given_keys = None if solved.sums.rows else keys
    got_d, got_lam = _normal.backward(solved, grad, given_keys)
    torch.testing.assert_close(got_d, wanted_d, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got_lam, wanted_lam, rtol=1e-9, atol=1e-10)
    if given_keys is not None:  # some rows at a time
        parts = torch.cat([_normal.backward(solved, grad, part)[0] for part in keys.split(2)])
        torch.testing.assert_close(parts, wanted_d, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [4, 30])
def test_a_small_lam_costs_no_digits_of_the_gradients(n: int) -> None:
    """(G - K^T (...)^-1 K G) / lam would lose them in the dual."""
    keys, d, grad, lam = randn(n, K), randn(n, V, seed=1), randn(K, V, seed=2), 1e-9
    got_d, got_lam = _normal.backward(_normal.solve(_normal.of(Plain(width=K), keys, d, keep=True), lam), grad)
    torch.testing.assert_close(got_d, torch.linalg.pinv(keys).T @ grad, rtol=1e-6, atol=1e-8)
    step = 1e-2
    S = [_normal.solve(_normal.of(Plain(width=K), keys, d, keep=True), lam * math.exp(s * step)).shift for s in (-1, 1)]
    if n < K:  # with more rows lam moves the shift by less than a difference can show
        inner = torch.linalg.inv(keys @ keys.T)
        torch.testing.assert_close(got_lam, -lam * (inner @ keys @ grad * (inner @ d)).sum(), rtol=1e-5, atol=0)
    assert torch.isfinite(got_lam) and all(bool(s.isfinite().all()) for s in S)


@pytest.mark.parametrize("n", [4, 30])
def test_the_condition_is_that_of_the_matrix_that_was_factored(n: int) -> None:
    keys = randn(n, K) * torch.logspace(0, 3, K).double()
    solved = _normal.solve(_normal.of(Plain(width=K), keys, randn(n, V)), 1e-3)
    matrix = keys @ keys.T if (solved.white is not None) else keys.T @ keys
    matrix = matrix + 1e-3 * torch.eye(len(matrix)).double()
    true = float(torch.linalg.cond(matrix, 1))
    assert 0.3 * true <= solved.condition <= true * (1 + 1e-6) and true > 1e2


@pytest.mark.parametrize("n", [6, 30])
def test_refinement_gives_the_digits_of_a_float32_factor_back(n: int) -> None:
    keys, d = randn(n, K) * torch.logspace(0, 2, K).double(), randn(n, V, seed=1)
    sums = _normal.of(Plain(width=K), keys, d, keep=True)
    rough, exact = _normal.solve(sums, 0.1, factor=torch.float32), _normal.solve(sums, 0.1)
    rhs = d if exact.white is not None else keys.T @ d
    unrefined = torch.cholesky_solve(rhs.float(), rough.U_MM, upper=True).double()
    error, without = (float((y - exact.y_MV).norm() / exact.y_MV.norm()) for y in (rough.y_MV, unrefined))
    assert rough.U_MM.dtype == torch.float32 and exact.condition > 1e3
    assert error < 1e-6 and error < 0.01 * without
    whole = torch.linalg.solve(exact.half_MM.triu() + exact.half_MM.triu(1).T, rhs)
    torch.testing.assert_close(exact.y_MV, whole, rtol=1e-8, atol=1e-8 * float(whole.abs().max()))


@pytest.mark.parametrize("n", [6, 30])
def test_a_step_of_refinement_is_taken_where_the_condition_costs_digits(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, d = randn(n, K) * torch.logspace(0, 5, K).double(), randn(n, V, seed=1)
    for lam, refined in ((1e-2, True), (1e10, False)):
        sums = _normal.of(Plain(width=K), keys, d, keep=True)
        solved = _normal.solve(sums, lam)
        assert (solved.condition * 2.3e-16 > 1e-8) == refined
        monkeypatch.setattr(_normal, "LOSS", math.inf)
        assert torch.equal(_normal.solve(sums, lam).y_MV, solved.y_MV) != refined
        monkeypatch.undo()


@pytest.mark.parametrize("size", [255, 256, 512])
def test_a_wide_matrix_is_factored_as_a_narrow_one(size: int) -> None:
    X = randn(size + 50, size)
    H = X.T @ X
    U, failed = _normal._factored(H.triu())
    torch.testing.assert_close(U.T @ U, H, rtol=1e-9, atol=1e-9)
    assert not failed and torch.equal(U, U.triu())
    assert _normal._factored(H.triu() - 2 * float(H.trace()) * torch.eye(size).double())[1]


def test_of_a_sum_what_is_below_the_diagonal_does_not_count() -> None:
    keys, d = randn(30, K), randn(30, V, seed=1)
    for kind in PRIORS:
        sums = _normal.of(prior_of(kind)[0], keys, d)
        assert sums.folded is not None
        H, B = sums.folded
        spoilt = replace(sums, folded=(H.triu() + torch.full_like(H, torch.nan).tril(-1), B))
        assert torch.equal(_normal.solve(spoilt, 0.3).shift, _normal.solve(sums, 0.3).shift)
        whole = replace(sums, folded=(keys.T @ keys if kind != "reduced" else H.triu() + H.triu(1).T, B))  # as they were kept before
        torch.testing.assert_close(_normal.solve(whole, 0.3).shift, _normal.solve(sums, 0.3).shift, rtol=1e-9, atol=1e-10)


def test_rows_in_float32_are_summed_in_float64() -> None:
    keys, d = randn(30, K).float(), randn(30, V, seed=1).float()
    shift = _normal.solve(_normal.of(Plain(width=K), keys, d), 1e-3).shift
    assert shift.dtype == torch.float64
    torch.testing.assert_close(shift, dense("plain", keys.double(), d.double(), 1e-3), rtol=1e-9, atol=1e-10)
