"""The sums: one least-squares problem for each edited matrix, as H = sum k k^T and B = sum k d^T. What the methods with a solve share.

    S = argmin  sum_i |k_i S - d_i|^2 + lam <S, P S>   =   (sum k k^T + lam P)^-1 sum k d^T
                            ridge regression with P = I: Tan et al. 2023 (MALMEN), arXiv 2311.04661; P = C = E[k k^T] over text: Meng et al.
                            2023 (MEMIT), arXiv 2210.07229, equation 14; P = I on the span of U, infinite off it: Fang et al. 2024
                            (AlphaEdit), arXiv 2410.02355, where (P K K^T + lam I) X = P K R^T is this in the basis U

Each prior has coordinates x = T k of its own: T = U^T on the span of U, else x = k; and S = T^T S'. So there is one problem to solve, with
P = C or I, in one of two forms, the smaller of which is taken:

    primal   S' = (H + lam P)^-1 B                      as large as the coordinates are wide
    dual     S' = P^-1 X^T (X P^-1 X^T + lam I)^-1 D    as large as there are rows          (the push-through identity)

Rows are whitened in the dual alone, z = L^-1 x with P = L L^T: the primal, which is for many rows, takes them as they are.

Adding rows adds to the sums, taking an example back subtracts what its rows added, and the sums of two workers or teams merge by adding.
Memory does not grow with the rows: once they are as many as the coordinates are wide they are dropped, unless they are asked to be kept.
The sums are in float64, for a solve in float32 loses three digits and more where keys are alike. The factor may be float32, which is half
the memory and on many devices a fraction of the time: one step of refinement, with a residual in float64, gives the digits back.

File legend: N rows, K key (module input) width, R width of the coordinates, V value width, M the smaller of N and R.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata.types import InvalidExample

STRIP = 128  # columns of H that are summed at once

# ------------------------------------------------------------------------------------------------------------------------------ priors


@final
@dataclass(frozen=True, kw_only=True)
class Plain:
    """lam I: the keys as they are."""

    width: int

    def into(self, keys_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N R"]:
        return keys_NK

    def back(self, S_RV: Float[Tensor, "R V"]) -> Float[Tensor, "K V"]:
        return S_RV


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Whitened:
    """lam C, by the lower factor of C: what text uses much is stiff. `upper_KK`: C above its diagonal, where that is at hand. What either
    has on the other side is not read, so both may be one matrix."""

    L_KK: Float[Tensor, "K K"]
    upper_KK: Float[Tensor, "K K"] | None = None

    @property
    def width(self) -> int:
        return len(self.L_KK)

    @property
    def P_KK(self) -> Float[Tensor, "K K"]:
        """C, made anew. Where rows are few nobody asks for it."""
        L_KK = self.L_KK.tril()
        if self.upper_KK is None:
            return _gram(L_KK.T)
        diagonal_K = L_KK.square_().sum(1)
        P_KK = self.upper_KK.triu(1)
        P_KK += P_KK.T.clone()
        P_KK.diagonal().copy_(diagonal_K)
        return P_KK

    def into(self, keys_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N R"]:
        return keys_NK

    def back(self, S_RV: Float[Tensor, "R V"]) -> Float[Tensor, "K V"]:
        return S_RV


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Reduced:
    """lam I on the span of the orthonormal columns of U, and no change off it."""

    U_KR: Float[Tensor, "K R"]

    @property
    def width(self) -> int:
        return self.U_KR.shape[1]

    def into(self, keys_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N R"]:
        return keys_NK @ self.U_KR

    def back(self, S_RV: Float[Tensor, "R V"]) -> Float[Tensor, "K V"]:
        return self.U_KR @ S_RV


Prior = Plain | Whitened | Reduced


def whitened(prior: Prior, X_NR: Float[Tensor, "N R"]) -> Float[Tensor, "N R"]:
    """z = L^-1 x of each row, with P = L L^T."""
    if not isinstance(prior, Whitened):
        return X_NR
    Z_RN: Tensor = torch.linalg.solve_triangular(prior.L_KK, X_NR.T, upper=False)
    return Z_RN.T


def _coloured(prior: Prior, S_RV: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    """The S with x S = z S_RV."""
    if not isinstance(prior, Whitened):
        return S_RV
    out_RV: Tensor = torch.linalg.solve_triangular(prior.L_KK.T, S_RV, upper=True)
    return out_RV


def _stiffened(prior: Prior, H_RR: Float[Tensor, "R R"], lam: float) -> Float[Tensor, "R R"]:
    """H + lam P."""
    if isinstance(prior, Whitened):
        return prior.P_KK.mul_(lam).add_(H_RR)
    matrix_RR = H_RR.clone()
    matrix_RR.diagonal().add_(lam)
    return matrix_RR


# -------------------------------------------------------------------------------------------------------------------------------- sums


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What `n` rows (x, d) come to under one prior: `rows` = (X, D) while they are kept, `folded` = (H, B) once they are not.

    `keep`: the rows stay, however many they are. Make one with `of`; a sum is a value, `merged` and `without` give new ones.
    """

    prior: Prior
    n: int
    keep: bool
    rows: tuple[Float[Tensor, "N R"], Float[Tensor, "N V"]] | None
    folded: tuple[Float[Tensor, "R R"], Float[Tensor, "R V"]] | None


def of(prior: Prior, keys_NK: Float[Tensor, "N K"], d_NV: Float[Tensor, "N V"], keep: bool = False) -> Sums:
    """The sums of some rows. (N, 0) differences will do where only `gains` are wanted."""
    X_NR = prior.into(keys_NK.double())
    return _settled(Sums(prior=prior, n=len(X_NR), keep=keep, rows=(X_NR, d_NV.double()), folded=None))


def merged(a: Sums, b: Sums) -> Sums:
    """The sums of the rows of both. Their priors must be the same; rows stay if both have them and either keeps them."""
    assert _alike(a.prior, b.prior), "sums merge in the same coordinates"
    keep = a.keep or b.keep
    if a.rows is None or b.rows is None:
        assert not keep, "rows that are gone cannot be kept"
        (H, B), (H_, B_) = _fold(a), _fold(b)
        return replace(a, n=a.n + b.n, rows=None, folded=(H + H_, B + B_))
    X, D = (torch.cat(both) for both in zip(a.rows, b.rows, strict=True))
    return _settled(replace(a, n=a.n + b.n, keep=keep, rows=(X, D)))


def grown(sums: Sums, keys_NK: Float[Tensor, "N K"], d_NV: Float[Tensor, "N V"]) -> Sums:
    """The sums with these rows too, as `merged`; what is folded grows where it is, so `sums` are not to be used any more."""
    if sums.folded is None:
        return merged(sums, of(sums.prior, keys_NK, d_NV))
    H_RR, B_RV = sums.folded
    X_NR = sums.prior.into(keys_NK.double())
    _gram(X_NR, onto=H_RR)
    B_RV.addmm_(X_NR.T, d_NV.double())
    return replace(sums, n=sums.n + len(X_NR))


def without(sums: Sums, keys_NK: Float[Tensor, "N K"], d_NV: Float[Tensor, "N V"]) -> Sums:
    """The sums less those of some rows that are in them: as if these had never been there, up to rounding.

    What is kept row by row is better built again from the rows that stay: then it is so to the last bit.
    """
    assert len(keys_NK) <= sums.n, "no more rows can go than there are"
    H_RR, B_RV = _fold(sums)
    X_NR = sums.prior.into(keys_NK.double())
    left = (H_RR - _gram(X_NR), B_RV - X_NR.T @ d_NV.double())
    return replace(sums, n=sums.n - len(X_NR), keep=False, rows=None, folded=left)


def _settled(sums: Sums) -> Sums:
    """Rows that are no longer fewer than the coordinates are wide become their sums."""
    return sums if sums.keep or sums.n < sums.prior.width else replace(sums, rows=None, folded=_fold(sums))


def _fold(sums: Sums) -> tuple[Float[Tensor, "R R"], Float[Tensor, "R V"]]:
    if sums.folded is not None:
        return sums.folded
    assert sums.rows is not None, "sums have their rows or what these come to"
    X_NR, D_NV = sums.rows
    return _gram(X_NR), X_NR.T @ D_NV


def _gram(X_NR: Float[Tensor, "N R"], onto: Float[Tensor, "R R"] | None = None) -> Float[Tensor, "R R"]:
    """X^T X, `onto` what is there. A strip at a time from the diagonal on, the rest is its mirror: little more than half of the work."""
    X_RN = X_NR.T.contiguous()
    H_RR = X_NR.new_zeros(len(X_RN), len(X_RN)) if onto is None else onto
    for start in range(0, len(X_RN), STRIP):
        end = start + STRIP
        H_RR[start:, start:end].addmm_(X_RN[start:], X_RN[start:end].T)
        H_RR[start:end, end:] = H_RR[end:, start:end].T
    return H_RR


def _alike(a: Prior, b: Prior) -> bool:
    match a, b:
        case Whitened(), Whitened():
            return torch.equal(a.L_KK, b.L_KK)
        case Reduced(), Reduced():
            return torch.equal(a.U_KR, b.U_KR)
        case _:
            return a == b


# ------------------------------------------------------------------------------------------------------------------------------- solve


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """The smaller matrix, its lower factor, and the solution: S' or, in the dual, where `white` are the whitened rows Z, what Z^T makes it
    of."""

    sums: Sums
    lam: float
    white: Float[Tensor, "N R"] | None
    matrix_MM: Float[Tensor, "M M"]
    L_MM: Float[Tensor, "M M"]
    y_MV: Float[Tensor, "M V"]

    @property
    def shift(self) -> Float[Tensor, "K V"]:
        """S, by which x S changes what a row x gives."""
        prior = self.sums.prior
        return prior.back(self.y_MV if self.white is None else _coloured(prior, self.white.T @ self.y_MV))


def solve(sums: Sums, lam: float, factor: torch.dtype = torch.float64) -> Solved:
    """Solves for the shift; lam 0 is the limit in which each row gets its own value exactly, and the shift is the smallest that does it.

    `factor` is the precision of the factor alone; in float32 it serves up to a condition number of about 1e6.
    Raises InvalidExample where there is no such solution, for a row follows from the others.
    """
    white = None
    if sums.rows is not None and (sums.n <= sums.prior.width or not lam):
        X_NR, rhs = sums.rows
        white = whitened(sums.prior, X_NR)
        matrix = _gram(white.T)
        matrix.diagonal().add_(lam)
    else:
        H_RR, rhs = _fold(sums)
        matrix = _stiffened(sums.prior, H_RR, lam)
    L_MM, wrong = torch.linalg.cholesky_ex(matrix.to(factor))
    pivots_M = L_MM.diagonal()
    if int(wrong) or (not lam and float(pivots_M.min()) < 1e-6 * float(pivots_M.max())):
        raise InvalidExample(
            f"Of the keys of {sums.n} examples one follows from the others, so no change gives each its own value. "
            f"Leave one of them out, or give the method some slack."
        )
    bare = Solved(sums=sums, lam=lam, white=white, matrix_MM=matrix, L_MM=L_MM, y_MV=rhs)
    return replace(bare, y_MV=_refined(bare, rhs))


def _refined(solved: Solved, rhs_MV: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
    """Matrix^-1 rhs, with one step of refinement (Wilkinson 1963)."""
    y_MV = _by_factor(solved, rhs_MV)
    return y_MV + _by_factor(solved, rhs_MV - solved.matrix_MM @ y_MV)


def _by_factor(solved: Solved, rhs_MV: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
    return torch.cholesky_solve(rhs_MV.to(solved.L_MM.dtype).contiguous(), solved.L_MM).double()


def gains(solved: Solved) -> Float[Tensor, "N K"]:
    """(N, K) the rows g with S = sum_i g_i d_i^T, whatever the differences are: for rows that are still there."""
    assert solved.sums.rows is not None, "the gains of rows need the rows"
    prior, (X_NR, _) = solved.sums.prior, solved.sums.rows
    Y_RN = _refined(solved, X_NR.T) if solved.white is None else _coloured(prior, _refined(solved, solved.white).T)
    return prior.back(Y_RN).T.contiguous()


def answer(solved: Solved, rhs_KV: Float[Tensor, "K V"]) -> Float[Tensor, "K V"]:
    """(K, V) (H + lam P)^-1 of another right side than B, with the factor that is there; lam over 0."""
    prior = solved.sums.prior
    R_RV = prior.into(rhs_KV.double().T).T
    if solved.white is None:
        return prior.back(_refined(solved, R_RV))
    Y_RV = whitened(prior, R_RV.T).T
    Y_RV = (Y_RV - solved.white.T @ _refined(solved, solved.white @ Y_RV)) / solved.lam  # Woodbury
    return prior.back(_coloured(prior, Y_RV))


def backward(
    solved: Solved, grad_KV: Float[Tensor, "K V"], keys_NK: Float[Tensor, "N K"] | None = None
) -> tuple[Float[Tensor, "N V"], Float[Tensor, ""]]:
    """(dL/dD, dL/dlog lam) from dL/dS; the factor is used again (MALMEN's push-through, arXiv 2311.04661; keys are constants).

    With A = (H + lam P)^-1 dL/dS these are K A and -lam <A, P S>. In the dual K A comes from the small matrix itself, and the second is
    -lam <K A, y>: nothing is lost to a difference of large terms divided by lam. `keys_NK` are the rows whose dL/dD is asked, for all that
    were dropped, some at a time; without them it is those that were kept.
    """
    prior = solved.sums.prior
    G_RV = prior.into(grad_KV.double().T).T
    if solved.white is not None:
        assert keys_NK is None, "rows that are still there need no keys"
        grad_NV = _refined(solved, solved.white @ whitened(prior, G_RV.T).T)
        return grad_NV, -solved.lam * (grad_NV * solved.y_MV).sum()
    A_RV = _refined(solved, G_RV)
    if keys_NK is not None:
        X_NR = prior.into(keys_NK.double())
    else:
        assert solved.sums.rows is not None, "dL/dD of rows that were dropped needs their keys"
        X_NR, _ = solved.sums.rows
    stiff_RV = prior.P_KK @ solved.y_MV if isinstance(prior, Whitened) else solved.y_MV
    return X_NR @ A_RV, -solved.lam * (A_RV * stiff_RV).sum()


def condition(solved: Solved) -> float:
    """An estimate, from below, of the condition number of the factored matrix in the 1-norm (Hager 1984; Higham 1988, algorithm 4.1)."""
    size = len(solved.L_MM)
    x_M1 = solved.L_MM.new_full((size, 1), 1 / size)
    best = 0.0
    for _ in range(5):
        y_M1 = torch.cholesky_solve(x_M1, solved.L_MM)
        z_M1 = torch.cholesky_solve(torch.where(y_M1 < 0, -1.0, 1.0).to(y_M1.dtype), solved.L_MM)
        best = max(best, float(y_M1.abs().sum()))
        j = int(z_M1.abs().argmax())
        if float(z_M1[j].abs()) <= float((z_M1 * x_M1).sum()):
            break
        x_M1 = torch.zeros_like(x_M1)
        x_M1[j] = 1.0
    return best * float(solved.matrix_MM.abs().sum(0).max())
