"""The sums: one least-squares problem for each edited matrix, as H = sum k k^T and B = sum k d^T. What the methods with a solve share.

    S = argmin  sum_i |k_i S - d_i|^2 + lam <S, P S>   =   (sum k k^T + lam P)^-1 sum k d^T
                            ridge regression with P = I: Tan et al. 2023 (MALMEN), arXiv 2311.04661; P = C = E[k k^T] over text: Meng et al.
                            2023 (MEMIT), arXiv 2210.07229, equation 14; P = I on the span of U, infinite off it: Fang et al. 2024
                            (AlphaEdit), arXiv 2410.02355, where (P K K^T + lam I) X = P K R^T is this in the basis U

Each prior has coordinates x = T k of its own: T = U^T on the span of U, else x = k; and S = T^T S'. So there is one problem to solve, with
P = C or I, in one of two forms, the cheaper of which is taken:

    primal   S' = (H + lam P)^-1 B                      as large as the coordinates are wide
    dual     S' = P^-1 X^T (X P^-1 X^T + lam I)^-1 D    as large as there are rows          (the push-through identity)

Rows are whitened in the dual alone, z = L^-1 x with P = L L^T: the primal, which is for many rows, takes them as they are.

Adding rows adds to the sums, taking an example back subtracts what its rows added, and the sums of two workers or teams merge by adding.
Memory does not grow with the rows: once there are enough of them that the primal costs less they are dropped, unless they are asked to be
kept. Of H, and of what it becomes, the half on and above the diagonal counts, and no other is made.
The sums are in float64, for a solve in float32 loses three digits and more where keys are alike. The factor may be float32, which is half
the memory and on many devices a fraction of the time. Where the condition takes digits that count, one step of refinement, with a residual
in float64, gives them back.

File legend: N rows, K key (module input) width, R width of the coordinates, V value width, M either N or R.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata.types import InvalidExample

STRIP = 256  # rows of H that are summed at once
FEW = 0.75  # rows to each coordinate with which whitening them, and the rest of the dual, costs as much as the primal, for V = K / 4
LOSS = 1e-8  # of a solution, that rounding may cost: what is made of it is kept in float32

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
    def half_KK(self) -> Float[Tensor, "K K"]:
        """C above its diagonal."""
        return _gram(self.L_KK.tril().T) if self.upper_KK is None else self.upper_KK

    @property
    def diagonal_K(self) -> Float[Tensor, "K"]:
        """The diagonal of C."""
        length_K: Tensor = torch.linalg.vector_norm(self.L_KK.tril(), dim=1)
        return length_K.square()

    @property
    def P_KK(self) -> Float[Tensor, "K K"]:
        """C, made anew. Where rows are few nobody asks for it."""
        P_KK = _mirrored(self.half_KK)
        P_KK.diagonal().copy_(self.diagonal_K)
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
    """H + lam P, on and above the diagonal."""
    if not isinstance(prior, Whitened):
        half_RR = H_RR.clone()
        half_RR.diagonal().add_(lam)
        return half_RR
    half_RR = torch.add(H_RR, prior.half_KK, alpha=lam)
    half_RR.diagonal().copy_(H_RR.diagonal() + lam * prior.diagonal_K)
    return half_RR


# -------------------------------------------------------------------------------------------------------------------------------- sums


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What `n` rows (x, d) come to under one prior: `rows` = (X, D) while they are kept, `folded` = (H, B) once they are not, with H on and
    above its diagonal.

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
    n = sums.n + len(keys_NK)
    if sums.rows is not None and (sums.keep or _few(sums.prior, n)):
        return merged(sums, of(sums.prior, keys_NK, d_NV))
    H_RR, B_RV = _fold(sums)
    X_NR = sums.prior.into(keys_NK.double())
    _gram(X_NR, onto=H_RR)
    B_RV.addmm_(X_NR.T, d_NV.double())
    return replace(sums, n=n, rows=None, folded=(H_RR, B_RV))


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
    """Rows that are no longer few become their sums."""
    return sums if sums.keep or _few(sums.prior, sums.n) else replace(sums, rows=None, folded=_fold(sums))


def _few(prior: Prior, n: int) -> bool:
    """Whether with so many rows the dual costs less."""
    return n < prior.width * (FEW if isinstance(prior, Whitened) else 1.0)


def _fold(sums: Sums) -> tuple[Float[Tensor, "R R"], Float[Tensor, "R V"]]:
    if sums.folded is not None:
        return sums.folded
    assert sums.rows is not None, "sums have their rows or what these come to"
    X_NR, D_NV = sums.rows
    return _gram(X_NR), X_NR.T @ D_NV


def _gram(X_NR: Float[Tensor, "N R"], onto: Float[Tensor, "R R"] | None = None) -> Float[Tensor, "R R"]:
    """X^T X on and above its diagonal, `onto` what is there; a strip at a time, which is little more than half of the work."""
    H_RR = X_NR.new_zeros(X_NR.shape[1], X_NR.shape[1]) if onto is None else onto
    for start in range(0, len(H_RR), STRIP):
        end = start + STRIP
        H_RR[start:end, start:].addmm_(X_NR[:, start:end].T, X_NR[:, start:])
    return H_RR


def _mirrored(half_MM: Float[Tensor, "M M"]) -> Float[Tensor, "M M"]:
    """The symmetric matrix of which this is what is on and above the diagonal."""
    return half_MM.triu() + half_MM.triu(1).T


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
    """The matrix of the cheaper form, on and above its diagonal, its upper factor U, for U^T U is the matrix, and the solution: S' or, in
    the dual, where `white` are the whitened rows Z, what Z^T makes it of. `condition`: see `_condition`."""

    sums: Sums
    lam: float
    white: Float[Tensor, "N R"] | None
    half_MM: Float[Tensor, "M M"]
    U_MM: Float[Tensor, "M M"]
    condition: float
    y_MV: Float[Tensor, "M V"]

    @property
    def shift(self) -> Float[Tensor, "K V"]:
        """S, by which x S changes what a row x gives."""
        prior = self.sums.prior
        return prior.back(self.y_MV if self.white is None else _coloured(prior, self.white.T @ self.y_MV))


def solve(sums: Sums, lam: float, factor: torch.dtype = torch.float64) -> Solved:
    """Solves for the shift; lam 0, for rows that are kept, is the limit in which each gets its own value exactly, and the shift is the
    smallest that does it.

    `factor` is the precision of the factor alone; in float32 it serves up to a condition number of about 1e6.
    Raises InvalidExample where there is no such solution, for a row follows from the others.
    """
    assert lam or sums.rows is not None, "without lam it is about the rows"
    white = None
    if sums.rows is not None and (_few(sums.prior, sums.n) or not lam):
        X_NR, rhs = sums.rows
        white = whitened(sums.prior, X_NR)
        half = _gram(white.T)
        half.diagonal().add_(lam)
    else:
        H_RR, rhs = _fold(sums)
        half = _stiffened(sums.prior, H_RR, lam)
    U_MM, failed = _factored(half.to(factor))
    pivots_M = U_MM.diagonal()
    if failed or (not lam and float(pivots_M.min()) < 1e-6 * float(pivots_M.max())):
        raise InvalidExample(
            f"Of the keys of {sums.n} examples one follows from the others, so no change gives each its own value. "
            f"Leave one of them out, or give the method some slack."
        )
    bare = Solved(sums=sums, lam=lam, white=white, half_MM=half, U_MM=U_MM, condition=_condition(half, U_MM), y_MV=rhs)
    return replace(bare, y_MV=_answered(bare, rhs))


def _factored(half_MM: Float[Tensor, "M M"]) -> tuple[Float[Tensor, "M M"], bool]:
    """(U, whether there is none). On a CPU U is written in columns, which is slow where their length is a multiple of a large power of two:
    1,024 wide it takes 24 ms, 1,032 wide 9. So such a matrix is made a little wider."""
    size = len(half_MM)
    if half_MM.device.type != "cpu" or size % 256:
        U_MM, wrong = torch.linalg.cholesky_ex(half_MM, upper=True)
        return U_MM, bool(wrong)
    wider = torch.eye(size + 8, dtype=half_MM.dtype)
    wider[:size, :size] = half_MM
    U, wrong = torch.linalg.cholesky_ex(wider, upper=True)
    del wider
    return U[:size, :size].T.contiguous().T, bool(wrong)  # else each solve would copy it


def _answered(solved: Solved, rhs_MV: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
    """Matrix^-1 rhs, with one step of refinement (Wilkinson 1963) where it gives digits that count."""
    y_MV = _by_factor(solved.U_MM, rhs_MV)
    if solved.condition * torch.finfo(solved.U_MM.dtype).eps < LOSS:
        return y_MV
    return y_MV + _by_factor(solved.U_MM, rhs_MV - _mirrored(solved.half_MM) @ y_MV)


def _by_factor(U_MM: Float[Tensor, "M M"], rhs_MV: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
    # not cholesky_solve, which copies the factor
    half_MV = torch.linalg.solve_triangular(U_MM.T, rhs_MV.to(U_MM.dtype), upper=False)
    y_MV: Tensor = torch.linalg.solve_triangular(U_MM, half_MV, upper=True)
    return y_MV.double()


def gains(solved: Solved) -> Float[Tensor, "N K"]:
    """(N, K) the rows g with S = sum_i g_i d_i^T, whatever the differences are: for rows that are still there."""
    assert solved.sums.rows is not None, "the gains of rows need the rows"
    prior, (X_NR, _) = solved.sums.prior, solved.sums.rows
    Y_RN = _answered(solved, X_NR.T) if solved.white is None else _coloured(prior, _answered(solved, solved.white).T)
    return prior.back(Y_RN).T.contiguous()


def answer(solved: Solved, rhs_KV: Float[Tensor, "K V"]) -> Float[Tensor, "K V"]:
    """(K, V) (H + lam P)^-1 of another right side than B, with the factor that is there; lam over 0."""
    prior = solved.sums.prior
    R_RV = prior.into(rhs_KV.double().T).T
    if solved.white is None:
        return prior.back(_answered(solved, R_RV))
    Y_RV = whitened(prior, R_RV.T).T
    Y_RV = (Y_RV - solved.white.T @ _answered(solved, solved.white @ Y_RV)) / solved.lam  # Woodbury
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
        grad_NV = _answered(solved, solved.white @ whitened(prior, G_RV.T).T)
        return grad_NV, -solved.lam * (grad_NV * solved.y_MV).sum()
    A_RV = _answered(solved, G_RV)
    if keys_NK is not None:
        X_NR = prior.into(keys_NK.double())
    else:
        assert solved.sums.rows is not None, "dL/dD of rows that were dropped needs their keys"
        X_NR, _ = solved.sums.rows
    stiff_RV = prior.P_KK @ solved.y_MV if isinstance(prior, Whitened) else solved.y_MV
    return X_NR @ A_RV, -solved.lam * (A_RV * stiff_RV).sum()


def _condition(half_MM: Float[Tensor, "M M"], U_MM: Float[Tensor, "M M"]) -> float:
    """An estimate, from below, of the condition number of the factored matrix in the 1-norm (Hager 1984; Higham 1988, algorithm 4.1)."""
    size = len(U_MM)
    x_M1 = U_MM.new_full((size, 1), 1 / size)
    best = 0.0
    for _ in range(5):
        y_M1 = _by_factor(U_MM, x_M1)
        z_M1 = _by_factor(U_MM, torch.where(y_M1 < 0, -1.0, 1.0))
        best = max(best, float(y_M1.abs().sum()))
        j = int(z_M1.abs().argmax())
        if float(z_M1[j].abs()) <= float((z_M1 * x_M1).sum()):
            break
        x_M1 = torch.zeros_like(x_M1)
        x_M1[j] = 1.0
    sums_M = torch.zeros_like(half_MM[0])
    for start in range(0, size, STRIP):
        strip_SM = half_MM[start : start + STRIP, start:].abs()
        sums_M[start:] += strip_SM.triu_().sum(0)
        sums_M[start : start + STRIP] += strip_SM.triu_(1).sum(1)
    return best * float(sums_M.max())
