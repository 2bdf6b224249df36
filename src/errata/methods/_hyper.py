"""The hypernetwork of `malmen` and `mend`: what a module read, and which way its output should go, become a pseudo key and gradient.

    x = [k ; g], standardised          x <- x + scale_m max(0, x A B + b) + shift_m, for each block          [k^ ; g^] = x
                                                                    Mitchell et al. 2022 (MEND), arXiv 2110.11309, section 3;
                                                                    Tan et al. 2023 (MALMEN), arXiv 2311.04661

A ~ N(0, 1) and B = 0, so a network that has learnt nothing is the identity. Modules of one shape share A, B and b; scale, shift, the step
eta and lam are each module's own. All of it is plain tensors by name: a State holds them as they are.

A module may have a metric T = (G / mean + I)^-1/2 with G = E[g g^T] over text: g is times T, and g^ again, so that the outputs change
least where text feels it most.      the output factor of K-FAC, Martens & Grosse 2015, arXiv 1503.05671

Unlike malmen@1df295d, unless `faithful`:
  - the statistics are those of each module by itself (there: of all modules of one shape), merged exactly (there: a deviation that is 11 to
    13 % too large with four rows at a time); a single row, or one that is not finite, does no harm in either mode
  - gradients are scaled and not centred: what should not move, for its gradient is nothing, is not told to move by the mean gradient
  - k^ is multiplied with the standardised key (there: with the raw one), so that a row which goes unchanged moves against its gradient
  - eta is kept as a logarithm, and begins where the first differences are a given share of the module's outputs (there: a raw 1e-6, which
    may wander through zero)

File legend: N rows, K key width, V value width, S = K + V, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata.methods import _gradients
from errata.methods._gradients import Moments

BLOCKS = 2
STEP = 1e-6  # the published eta
EPSILON = torch.finfo(torch.float32).eps


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Net:
    """`parameters` by name: SHAPE/A0, MODULE/scale0, MODULE/log_eta, ... `moments` of k and g by module; by shape if `faithful`.
    `metrics`: the (V, V) T of each module, none where outputs count as they are."""

    parameters: Mapping[str, Tensor]
    moments: Mapping[str, tuple[Moments, Moments]]
    shapes: Mapping[str, str]  # module -> "KxV"
    faithful: bool = False
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def fresh(widths: Mapping[str, tuple[int, int]], rank: int, lam: float, seed: int, faithful: bool = False) -> Net:
    """A network that has learnt nothing, for modules of these (K, V)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {module: f"{k}x{v}" for module, (k, v) in widths.items()}
    out: dict[str, Tensor] = {}
    for shape, s in sorted({(shapes[module], k + v) for module, (k, v) in widths.items()}):
        r = min(rank, s)
        for i in range(BLOCKS):
            out[f"{shape}/A{i}"] = torch.randn(s, r, generator=generator)
            out |= {f"{shape}/B{i}": torch.zeros(r, s), f"{shape}/b{i}": torch.zeros(s)}
    for module, (k, v) in widths.items():
        for i in range(BLOCKS):
            out |= {f"{module}/scale{i}": torch.ones(k + v), f"{module}/shift{i}": torch.zeros(k + v)}
        out |= {f"{module}/eta": torch.tensor(STEP)} if faithful else {f"{module}/log_eta": torch.tensor(0.0)}
        out[f"{module}/log_lam"] = torch.tensor(math.log(lam))
    return Net(parameters=out, moments={}, shapes=shapes, faithful=faithful)


def eta(net: Net, module: str) -> Float[Tensor, ""]:
    return net.parameters[f"{module}/eta"] if net.faithful else net.parameters[f"{module}/log_eta"].exp()


def lam(net: Net, module: str) -> float:
    return float(net.parameters[f"{module}/log_lam"].detach().exp())


def calibrated(net: Net, module: str, factor: float) -> Net:
    """With eta `factor` times as long."""
    name = f"{module}/log_eta"
    return replace(net, parameters={**net.parameters, name: net.parameters[name] + math.log(factor)})


# ------------------------------------------------------------------------------------------------------------------------- statistics


def watched(net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]) -> Net:
    """The network with the statistics of these rows too. Rows that are not finite are left out: they would stay for good."""
    sound_N = keys_NK.isfinite().all(1) & g_NV.isfinite().all(1)
    if not sound_N.any():
        return net
    where = _where(net, module)
    now = [_gradients.moments(x[sound_N]) for x in (keys_NK, _measured(net, module, g_NV))]
    if net.faithful:
        now = [replace(m, squares_W=m.squares_W * (m.n / max(m.n - 1, 1))) for m in now]
    if where in net.moments:
        now = [_gradients.merged(a, b) for a, b in zip(net.moments[where], now, strict=True)]
    return replace(net, moments={**net.moments, where: (now[0], now[1])})


def _where(net: Net, module: str) -> str:
    return net.shapes[module] if net.faithful else module


def metric(G_VV: Float[Tensor, "V V"]) -> Float[Tensor, "V V"]:
    """T = (G / g + I)^-1/2, g the mean eigenvalue of G, float32; G is the second moment of a module's gradients on text."""
    s_V, U_VV = torch.linalg.eigh(G_VV.double())
    least = torch.finfo(s_V.dtype).tiny  # text may feel nothing at all of a module: then T = I
    T_VV: Tensor = (U_VV * (s_V.clamp(min=0) / s_V.mean().clamp(min=least) + 1).rsqrt()) @ U_VV.T
    return T_VV.float()


def _measured(net: Net, module: str, rows_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Times T."""
    return rows_NV @ net.metrics[module].to(rows_NV) if module in net.metrics else rows_NV


def standardised(
    net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N V"]]:
    """Both by the statistics, as precise as they are."""
    k, g = net.moments[_where(net, module)]
    g_NV = _measured(net, module, g_NV)
    if net.faithful:
        return _published(k, keys_NK), _published(g, g_NV)
    about_zero = Moments(n=g.n, mean_W=torch.zeros_like(g.mean_W), squares_W=g.squares_W + g.n * g.mean_W.square())
    return _gradients.standardised(k, keys_NK), _gradients.standardised(about_zero, g_NV)


def _published(of: Moments, rows_NW: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
    return (rows_NW - of.mean_W.to(rows_NW)) / ((of.squares_W / (of.n - 1 + EPSILON)).sqrt() + EPSILON).to(rows_NW)


# ------------------------------------------------------------------------------------------------------------------------- what it says


def factors(
    net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N V"]]:
    """(k^, g^) of each row, in the precision of the parameters."""
    return _moved(net, module, *standardised(net, module, keys_NK, g_NV))


def _moved(
    net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N V"]]:
    """`factors` of what is standardised."""
    own, shape = net.parameters, net.shapes[module]
    x_NS = torch.cat([keys_NK, g_NV], dim=1).to(own[f"{shape}/b0"])
    for i in range(BLOCKS):
        # clamp: its gradient at zero, where all of them begin, is one; that of relu is none
        moved_NS = (x_NS @ own[f"{shape}/A{i}"] @ own[f"{shape}/B{i}"] + own[f"{shape}/b{i}"]).clamp(min=0)
        x_NS = x_NS + own[f"{module}/scale{i}"] * moved_NS + own[f"{module}/shift{i}"]
    k_NK, g_NV = torch.split(x_NS, [keys_NK.shape[1], g_NV.shape[1]], dim=1)
    return k_NK, g_NV


def differences(net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """(N, V) d = -eta (k . k^) T g^: what the step -eta k^ g^T of MEND would change of the row's own output."""
    own_NK, own_NV = standardised(net, module, keys_NK, g_NV)
    pseudo_NK, pseudo_NV = _moved(net, module, own_NK, own_NV)
    if net.faithful:
        along_N1 = (keys_NK.to(pseudo_NK) * pseudo_NK).sum(1, keepdim=True)
    else:
        along_N1 = (own_NK.to(pseudo_NK) * pseudo_NK).mean(1, keepdim=True)
    return -eta(net, module) * along_N1 * _measured(net, module, pseudo_NV)


def pull(net: Net, module: str, keys_NK: Float[Tensor, "N K"], g_NV: Float[Tensor, "N V"], grad_NV: Float[Tensor, "N V"]) -> None:
    """Adds what follows from dL/dd of these rows' `differences` to the gradients of the parameters."""
    d_NV = differences(net, module, keys_NK, g_NV)
    (d_NV * grad_NV.to(d_NV)).sum().backward()  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------------------------------------------------ as tensors


def tensors(net: Net) -> dict[str, Tensor]:
    """All of it by name, on the CPU, for a State."""
    out = {f"net/{name}": t.detach().cpu().clone() for name, t in net.parameters.items()}
    for where, (k, g) in net.moments.items():
        out |= {f"moments/{where}/k": torch.stack([k.mean_W, k.squares_W]).cpu(), f"moments/{where}/n": torch.tensor(k.n)}
        out[f"moments/{where}/g"] = torch.stack([g.mean_W, g.squares_W]).cpu()
    return out | {f"metric/{module}": T_VV.cpu() for module, T_VV in net.metrics.items()}


def of_tensors(kept: Mapping[str, Tensor], widths: Mapping[str, tuple[int, int]], faithful: bool, device: torch.device) -> Net:
    """The inverse of `tensors`. Raises KeyError for what is not there."""
    shapes = {module: f"{k}x{v}" for module, (k, v) in widths.items()}
    names = [name for name in kept if name.startswith("net/")]
    moments = {}
    for where in dict.fromkeys(shapes.values() if faithful else shapes):
        n = int(kept[f"moments/{where}/n"])
        (k_mean, k_squares), (g_mean, g_squares) = (kept[f"moments/{where}/{x}"].to(device) for x in ("k", "g"))
        k, g = Moments(n=n, mean_W=k_mean, squares_W=k_squares), Moments(n=n, mean_W=g_mean, squares_W=g_squares)
        moments[where] = (k, g)
    parameters = {name.removeprefix("net/"): kept[name].to(device) for name in names}
    metrics = {module: kept[name].to(device) for module in shapes if (name := f"metric/{module}") in kept}
    return Net(parameters=parameters, moments=moments, shapes=shapes, faithful=faithful, metrics=metrics)
