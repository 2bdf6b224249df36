"""Keys, their covariance and the solve: how a change of hidden states becomes one of weights. What `memit`, `rome` and their kin share.

    Delta = R K^T (lam C + K K^T)^-1        Meng et al. 2023, arXiv 2210.07229, equation 14       C = E[k k^T] over text
    Delta = R (K^T C^-1 K)^-1 K^T C^-1      the same with an equality constraint: Gupta et al. 2024, arXiv 2403.14236

Both are one solve of the sums (`_normal.py`), with lam or without: one Cholesky factor of C for all facts of a layer, in float64, and a
system as large as there are facts. I, or the directions that text hardly uses (U), may stand in the place of C (`prior`).

Unlike memit@80426fd lam is in units of the key width, which is what k^T C^-1 k is on average over the text: with lam = 1 one usual key
takes half of its residual. C gets a small multiple of the identity, for where it was estimated from little text.

File legend: N rows, P places, K key (MLP projection's input) width, D model width.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hooks, hosts, text
from errata.hosts import Host, Weights, stored_transposed
from errata.methods import _normal
from errata.methods._normal import Plain, Prior, Reduced, Sums, Whitened
from errata.methods._trace import TRACED, trace
from errata.methods._values import Place, Settings, places, prefixes, quiet, values
from errata.types import (
    Add,
    AddLowRank,
    Case,
    Example,
    InvalidExample,
    Method,
    Op,
    Run,
    Spread,
    State,
    UnknownName,
    WrongBase,
    forget,
    here,
)

PRIORS = ("C", "I", "U")
HARDLY = 0.02  # of the energy of text's keys lies in the directions of "U", at most
NOTHING = 1e-4  # of a residual, as good as none of it
Row = tuple[list[int], int]
Tell = Callable[[str, float], None]  # `Run.tell`
T = TypeVar("T")  # what a method knows of a layer before it sees the keys: C, or a prior and its unit
Solve = Callable[[T, Float[Tensor, "K P"]], Float[Tensor, "P K"]]


def layers_of(host: Host, given: str) -> list[int]:
    """ "3-8" or "3,4,5" as layers. Raises UnknownName for one that the host does not have."""
    out: list[int] = []
    for part in given.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdigit() and (high or low).isdigit() and int(low) <= int(high or low) < host.blocks):
            raise UnknownName.among("layer", part.strip(), map(str, range(host.blocks)))
        out += range(int(low), int(high or low) + 1)
    return sorted(set(out))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """What an edit wants before anything is solved: behind the last of `layers` the hidden states at the places `found` should move by
    `delta_PD`. `still` are documents that hold still, as many as were asked for."""

    still: list[str]
    found: list[Place]
    layers: list[int]
    state: State
    delta_PD: Float[Tensor, "P D"]


def wanted(made: Method, name: str, host: Host, examples: tuple[Example, ...], run: Run, held: int = 0, width: int | None = None) -> Wanted:
    """For the method `made`, called `name`, whose settings are `layers`, `per_key`, `contexts` and those of the values; `width` layers are
    found by tracing, or as many as its setting says. Raises InvalidExample where one layer is all it rewrites and several are given."""
    hosts.require_causal(host, name)
    config = made.config
    still = quiet(host, examples, run, max(config["contexts"], held))
    found = places(host, examples, prefixes(still, config["contexts"]))
    state = of_method(name, run.state, "layers") if run.state else prepared(made, name, host, examples, run, width)
    layers = layers_of(host, config["layers"]) if config["layers"] else [int(layer) for layer in state.config["layers"]]
    if width == 1 != len(layers):
        raise InvalidExample(f"{name} rewrites one layer, got {len(layers)}: {', '.join(map(str, layers))}. memit spreads over several.")
    settings = Settings(**{f.name: config[f.name] for f in fields(Settings)})
    delta_PD = values(host, found, layers[-1], settings, run.progress, run.spread)
    return Wanted(still=still[:held], found=found, layers=layers, state=state, delta_PD=delta_PD)


def prepared(
    made: Method, name: str, host: Host, examples: Sequence[Example], run: Run, width: int | None = None, cases: Sequence[Case] = ()
) -> State:
    """The layers and the C of each; the examples serve to find the layers alone."""
    config = made.config
    return state_for(name, host, examples, run, config["layers"], config["width"] if width is None else width, config["per_key"], cases)


def prepared_on(made: Method, name: str, host: Host, train_cases: Iterable[Case], run: Run, width: int | None = None) -> State:
    """`prepared` with the examples of cases, which are read only where there are layers to find."""
    cases = () if made.config["layers"] else tuple(train_cases)
    return prepared(made, name, host, tuple(case.example for case in cases), run, width, cases)


def state_for(
    method: str, host: Host, examples: Sequence[Example], run: Run, layers: str, width: int, per_key: int, cases: Sequence[Case] = ()
) -> State:
    """The layers, given or found by tracing `examples`, and C of each, from `per_key` tokens of held text for each of its dimensions."""
    hosts.require_causal(host, method)
    texts = run.hold or text.sampled(host, seed=run.seed)
    # in an order of their own, so that the order of the examples does not count
    prompts = [(e.prompt, e.subject) for e in sorted(examples, key=lambda e: e.id)] or [(_cut(t), None) for t in texts if " " in t[:120]]
    chosen = layers_of(host, layers) if layers else trace(host, prompts[:TRACED], width, seed=run.seed).chosen
    modules = host.module_names((host.layout.mlp_out,), chosen)
    C, tokens = covariances(host, texts, modules, per_key)
    config = {"layers": chosen, "tokens": tokens}
    trained_on = frozenset(case.id for case in cases)
    return State(method=method, host=host.id, config=config, tensors=C, trained_on=trained_on)


def _cut(document: str) -> str:
    """A document's beginning, to be gone on with: what to trace where there is nothing else."""
    return document[:120].rpartition(" ")[0]


def of_method(name: str, state: State, *needed: str) -> State:
    """The state, if it was prepared for `name` or for a method that leaves as much behind. Raises InvalidExample."""
    if missing := [key for key in needed if key not in state.config]:
        raise InvalidExample(
            f"State {state.id} is one of {state.method} and knows no {missing[0]}; {name} needs one that 'errata prepare {name}' has made."
        )
    return state


def covariance_of(host: Host, state: State, module: str) -> Float[Tensor, "K K"]:
    """The C of a module, float64. Raises WrongBase, UnknownName."""
    if state.host not in (host.id, host.base_id):
        raise WrongBase(f"State {state.id} was prepared on weights {state.host}, {host.name} has {host.id}. Prepare it again.")
    if module not in state.tensors:
        raise UnknownName.among("covariance", module, state.tensors)
    return state.tensors[module].to(host.device, torch.float64)  # float64: the solve is ill-conditioned in float32


def covariances_of(host: Host, state: State, layers: Sequence[int]) -> dict[int, Float[Tensor, "K K"]]:
    """Layer -> the C of its MLP's last projection, float64. Raises WrongBase, UnknownName."""
    modules = host.module_names((host.layout.mlp_out,), layers)
    return {layer: covariance_of(host, state, module) for layer, module in zip(layers, modules, strict=True)}


def priors(
    host: Host, state: State, layers: Sequence[int], name: str, ridge: float = 0.0, share: float = HARDLY
) -> dict[int, tuple[Prior, float]]:
    """Layer -> `prior` of its MLP's last projection. Raises WrongBase, UnknownName."""
    return {layer: prior(name, C_KK, ridge, share) for layer, C_KK in covariances_of(host, state, layers).items()}


def check_prior(method: str, name: str) -> None:
    """Raises InvalidExample for a prior that there is not."""
    if name not in PRIORS:
        raise InvalidExample(f'{method} has the priors "C", "I" and "U", got {name!r}.')


def ridged(C_KK: Float[Tensor, "K K"], ridge: float) -> Float[Tensor, "K K"]:
    """C + ridge * mean eigenvalue * I."""
    P_KK = C_KK.clone()
    P_KK.diagonal().add_(ridge * C_KK.diagonal().mean())
    return P_KK


def factor(C_KK: Float[Tensor, "K K"], ridge: float) -> Float[Tensor, "K K"]:
    """The lower factor of `ridged`."""
    L_KK: Tensor = torch.linalg.cholesky(ridged(C_KK, ridge))
    return L_KK


def null_space(C_KK: Float[Tensor, "K K"], share: float) -> tuple[Reduced, float]:
    """(the widest basis of C's weakest eigenvectors that holds at most `share` of its trace, one at least; what it does hold)."""
    s_K, U_KK = torch.linalg.eigh(C_KK)
    s_K = s_K.clamp(min=0)  # zeros come out a little under it
    # the whole of a sum may come out a little over it
    kept = max(1, int((s_K.cumsum(0) <= (share + 1e-9) * s_K.sum()).sum()))
    # where text does not reach at all, lam still needs a measure
    least = torch.finfo(torch.float32).eps * float(s_K.sum())
    return Reduced(U_KR=U_KK[:, :kept].contiguous()), max(float(s_K[:kept].sum()), least)


def prior(name: str, C_KK: Float[Tensor, "K K"], ridge: float, share: float = HARDLY) -> tuple[Prior, float]:
    """(the prior of that name, what lam counts in): "C", where it is a usual key's k^T C^-1 k; "I", where it is its squared length; "U", a
    basis of the directions with at most `share` of the energy of text's keys, where it is what text has in them."""
    if name == "I":
        return Plain(width=len(C_KK)), float(C_KK.diagonal().sum())
    if name == "U":
        return null_space(C_KK, share)
    both_KK = factor(C_KK, ridge).tril_() + C_KK.triu(1)  # one matrix, for there is one for each layer
    return Whitened(L_KK=both_KK, upper_KK=both_KK), float(len(C_KK))


def kept(priors: Mapping[str, Prior]) -> dict[str, Float[Tensor, "K R"]]:
    """Priors by name as tensors of a State, float32: the factor of C, with C above the diagonal; the basis; nothing of a plain one."""
    out = dict[str, Tensor]()
    for name, own in priors.items():
        if not isinstance(own, Plain):
            matrix = own.L_KK.tril() + own.half_KK.triu(1) if isinstance(own, Whitened) else own.U_KR
            out[name] = matrix.float().cpu().contiguous()  # as it comes back from a file, to the last digit
    return out


def of_kept(host: Host, name: str, module: str, matrix_KR: Float[Tensor, "K R"] | None) -> Prior:
    """The prior of that name (`prior`) with what was kept of it."""
    if matrix_KR is None:
        return Plain(width=in_out(host, module)[0])
    own_KR = matrix_KR.to(host.device, torch.float64)
    return Reduced(U_KR=own_KR) if name == "U" else Whitened(L_KK=own_KR, upper_KK=own_KR)


@torch.no_grad()
def covariances(host: Host, texts: Sequence[str], modules: Sequence[str], per_key: int) -> tuple[dict[str, Float[Tensor, "K K"]], int]:
    """({module: (K, K) mean of k k^T over tokens, float32}, how many tokens): streamed, summed in float64."""
    width = max(in_out(host, module)[0] for module in modules)
    rows, tokens = [], 0
    for ids, given in hosts.chunks(host, texts):
        rows.append((ids, given))
        # the keys that every module has, at least
        tokens += {"causal": len(ids), "seq2seq": min(given, len(ids) - given), "classifier": given}[host.kind]
        if tokens >= per_key * width:
            break
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.unscored(hosts.pad(host, [rows[i] for i in group]))
        with hooks.reading(host.model, modules, inputs=True, stop=True) as seen:
            hosts.predictions(host, batch)
        for module in modules:
            keys_NK = seen[module][hosts.places(host, batch, module)].float()
            sums[module] = sums.get(module, 0) + (keys_NK.T @ keys_NK).double()
            counts[module] += len(keys_NK)
    return {module: (C_KK / counts[module]).float().cpu() for module, C_KK in sums.items()}, tokens


def in_out(host: Host, module: str) -> tuple[int, int]:
    """(K, D) of a projection."""
    part = host.model.get_submodule(module)
    a, b = part.weight.shape
    return (a, b) if stored_transposed(part) else (b, a)


def gains(prior: Prior, K_KP: Float[Tensor, "K P"], lam: float, tell: Tell = forget) -> Float[Tensor, "P K"]:
    """(P, K) the rows g with Delta = R g: (lam P + K K^T)^-1 K, transposed; with lam 0 its limit, for C that is C^-1 K (K^T C^-1 K)^-1.
    Raises InvalidExample."""
    keys_PK = K_KP.T
    solved = _normal.solve(_normal.of(prior, keys_PK, keys_PK.new_zeros(len(keys_PK), 0), keep=True), lam)
    tell("condition", solved.condition)
    return _normal.gains(solved)


def mean_energy(prior: Prior, K_KP: Float[Tensor, "K P"]) -> float:
    """The mean of k^T P^-1 k over the columns of K: for C that of k^T C^-1 k."""
    return float(_normal.whitened(prior, prior.into(K_KP.T)).square().sum(1).mean())


def spread(
    host: Host,
    found: Sequence[Place],
    delta_PD: Float[Tensor, "P D"],
    known: Mapping[int, T],
    solve: Solve[T],
    rounds: int = 1,
    open_: tuple[float, float] = (0.0, math.inf),
) -> tuple[tuple[Op, ...], Weights]:
    """(one op for each layer, the weights with them on): behind the last layer the places' hidden states have moved by `delta_PD`.

    Layer by layer: with the changes so far on, what is still missing, shared equally among the layers that are left (algorithm 1 of
    MEMIT; what the layers above make of it is measured before the next takes its share). Keys and hidden states are means over prefixes,
    both of them, so that the last equation holds for what it was solved for (Gupta et al. 2024, arXiv 2403.07175, "R-ROME").

    Keys and values of all places are in memory meanwhile: P (K + D) numbers for each layer.

    In each further round the same for the places whose missing part is a share of |delta| inside `open_`; the others' keys are in the
    sums with nothing missing, so that they stay where they are.
    """
    layers, weights = sorted(known), Weights()
    block = f"{host.layout.blocks}.{layers[-1]}"
    goal_PD: Tensor | None = None
    reach_P = delta_PD.double().norm(dim=1)
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    for round_ in range(rounds):
        in_P = torch.ones_like(reach_P, dtype=torch.bool)
        for i, layer in enumerate(layers):
            (module,) = host.module_names((host.layout.mlp_out,), [layer])
            key_PK, h_PD = averaged(host, found, module, block, weights)
            goal_PD = h_PD + delta_PD.double() if goal_PD is None else goal_PD
            if round_ and i == 0:
                share_P = (goal_PD - h_PD).norm(dim=1) / reach_P
                in_P = (share_P > open_[0]) & (share_P < open_[1])
                if not in_P.any():
                    break
            missing_DP = ((goal_PD - h_PD) * in_P.unsqueeze(1) / (len(layers) - i)).T
            parts[layer].append((solve(known[layer], key_PK.T), missing_DP))
            base = hosts.weight(host.model, f"{module}.weight")
            weights[f"{module}.weight"] = (base.float() + _product(host, module, parts[layer])).to(base.dtype)
    ops = [_op(host, layer, parts[layer]) for layer in layers]
    return tuple(ops), weights


def _product(host: Host, module: str, parts: Sequence[tuple[Float[Tensor, "P K"], Float[Tensor, "D P"]]]) -> Tensor:
    """The change of a weight, as it is stored."""
    change = sum(missing_DP @ gains_PK for gains_PK, missing_DP in parts)
    assert isinstance(change, Tensor), "a layer has a part"
    return (change.T if stored_transposed(host.model.get_submodule(module)) else change).float().contiguous()


def _op(host: Host, layer: int, parts: Sequence[tuple[Float[Tensor, "P K"], Float[Tensor, "D P"]]]) -> Op:
    """Factors, or their product where that is smaller."""
    (module,) = host.module_names((host.layout.mlp_out,), [layer])
    A_PK, B_DP = torch.cat([gains for gains, _ in parts]), torch.cat([missing for _, missing in parts], dim=1)
    (P, K), D = A_PK.shape, len(B_DP)
    if P * (K + D) < K * D:
        return AddLowRank(weight=f"{module}.weight", A=A_PK.float().cpu().contiguous(), B=B_DP.float().cpu().contiguous())
    return Add(weight=f"{module}.weight", delta=_product(host, module, parts).cpu())


def of_sums(
    host: Host,
    sums: Mapping[str, Sums],
    units: Mapping[str, float],
    lam: float,
    onto: Mapping[str, Tensor] = MappingProxyType({}),
    worse: Mapping[str, Float[Tensor, "K V"]] = MappingProxyType({}),
    tell: Tell = forget,
) -> tuple[tuple[Op, ...], Weights]:
    """(one op for each module of `sums`, the weights with them on); each module's weight of the prior is lam of its units.

    An op is factors where they are smaller than their product. `onto`: what has been added to a weight before, which the op is to add too.
    `worse`: the gradient g of what should not rise in each module's S; then sum <g, S> <= 0 is a constraint of the least squares, and where
    it binds S = (H + lam P)^-1 (B - mu g), with the one mu for all modules that makes it an equality (Nocedal & Wright 2006, chapter 16).
    """
    factors, shifts, back = dict[str, AddLowRank](), dict[str, Tensor](), dict[str, Tensor]()
    for module, total in sums.items():
        solved = _normal.solve(total, lam * units[module])
        tell("condition", solved.condition)
        shifts[module] = S_KV = solved.shift
        if module in worse:
            back[module] = _normal.answer(solved, worse[module])
        elif module not in onto and total.rows is not None and total.n * sum(S_KV.shape) < S_KV.numel():
            A_NK, B_VN = _normal.gains(solved), total.rows[1].T
            factors[module] = AddLowRank(weight=f"{module}.weight", A=A_NK.float().cpu(), B=B_VN.float().cpu().contiguous())
    rises, falls = (sum(float((worse[m] * of[m]).sum()) for m in back) for of in (shifts, back))
    mu = max(0.0, rises / falls) if falls else 0.0
    ops, weights = list[Op](), Weights()
    for module, S_KV in shifts.items():
        name, base = f"{module}.weight", hosts.weight(host.model, f"{module}.weight")
        S_KV = S_KV - mu * back[module] if mu else S_KV
        change = S_KV if stored_transposed(host.model.get_submodule(module)) else S_KV.T
        change = change + onto[module] if module in onto else change
        weights[name] = (base.float() + change.float()).to(base.dtype)
        ops.append(factors[module] if module in factors else Add(weight=name, delta=change.float().cpu().contiguous()))
    return tuple(ops), weights


def dense(host: Host, op: Op) -> Tensor:
    """What an op that adds adds to its weight, as it is stored; float32, on the host's device."""
    if isinstance(op, Add):
        return op.delta.to(host.device)
    assert isinstance(op, AddLowRank), "an op of sums adds"
    product = op.scale * (op.B @ op.A).to(host.device)
    return product.T if stored_transposed(host.model.get_submodule(op.weight.removesuffix(".weight"))) else product


Solution = tuple[tuple[Op, ...], Weights]


def within(
    host: Host, documents: Sequence[str], epsilon: float, lam: float, solved: Callable[[float], Solution], spread: Spread = here
) -> tuple[Op, ...]:
    """The ops of `inside`."""
    return inside(host, documents, epsilon, lam, solved, spread)[0][0]


def inside(
    host: Host,
    documents: Sequence[str],
    epsilon: float,
    lam: float,
    solved: Callable[[float], Solution],
    spread: Spread = here,
    onto: Weights | None = None,
    further: float = 1.02,
) -> tuple[Solution, float]:
    """(`solved`, its weight of the text), with the least such weight, `lam` or more, that keeps the increase of the loss on `documents`
    within `epsilon`. `onto`: the weights that what is solved for is on top of, and that have used a part of it; if they have used all,
    next to nothing is added, and the weight is what it was. `further` as in `hosts.furthest`.

    A usual key takes s / (1 + lam) of its residual: s is sought, as the gate seeks its scale. Unlike that scale it takes back more from
    the facts whose keys text uses much. If no s is found the smallest that was tried comes back, and the gate has the last word.
    """
    rows = hosts.chunks(host, documents)
    tried = {1.0: solved(lam)}
    if len(rows) < 2:
        return tried[1.0], lam
    base_N2 = hosts.remembered(host, ("score", *documents), lambda: scored(host, rows, None, spread))
    before_N2 = base_N2 if onto is None else scored(host, rows, onto, spread)
    used = hosts.increase(base_N2, before_N2)[0]
    left = (epsilon - used) / (1 + used)  # of the loss before
    if onto is not None and left <= 0:
        return solved((1 + lam) / NOTHING - 1), lam
    after_N2 = scored(host, rows, tried[1.0][1], spread)
    if hosts.increase(before_N2, after_N2)[0] <= left:
        return tried[1.0], lam

    def read(s: float) -> tuple[Float[Tensor, "N 2"], bool]:
        tried[s] = solved((1 + lam) / s - 1)
        return scored(host, rows, tried[s][1], spread), True

    s = hosts.furthest(read, {1.0: after_N2}, before_N2, left, further=further) or min(tried)
    return tried[s], (1 + lam) / s - 1


def scored(host: Host, rows: Sequence[Row], weights: Weights | None, spread: Spread) -> Float[Tensor, "N 2"]:
    """`hosts.score`, whose passes are the shards."""
    groups = list(hosts.by_length(rows, hosts.at_once(host)))
    out_N2 = torch.zeros(len(rows), 2, dtype=torch.float64)
    for group, part_N2 in zip(groups, spread(host, _scoring, [[rows[i] for i in group] for group in groups], weights), strict=True):
        out_N2[group] = part_N2
    return out_N2


def _scoring(host: Host, weights: Weights | None) -> Callable[[list[Row]], Float[Tensor, "N 2"]]:
    return lambda rows: hosts.score(host, rows, weights)


@torch.no_grad()
def averaged(
    host: Host, found: Sequence[Place], module: str, block: str, weights: Weights
) -> tuple[Float[Tensor, "P K"], Float[Tensor, "P D"]]:
    """(inputs of `module`, outputs of `block`) at each place, float64, means over prefixes; `weights` take the place of the model's."""
    rows = [(p, ids, share) for p, place in enumerate(found) for ids, share in zip(place.keys, place.weights, strict=True)]
    key_PK, h_PD = None, None
    for group in hosts.by_length([(ids, len(ids)) for _, ids, _ in rows], hosts.at_once(host)):
        batch = hosts.pad(host, [(rows[i][1], len(rows[i][1])) for i in group])
        with hooks.reading(host.model, [module], inputs=True) as keys, hooks.reading(host.model, [block], stop=True) as out:
            hosts.predictions(host, batch, weights or None)
        last_N = batch.mask_NT.sum(1) - 1
        one_N = torch.arange(len(group), device=last_N.device)
        place_N = torch.tensor([rows[i][0] for i in group], device=last_N.device)
        share_N1 = torch.tensor([[rows[i][2]] for i in group], dtype=torch.float64, device=last_N.device)
        key_NK, h_ND = keys[module][one_N, last_N].double(), out[block][one_N, last_N].double()
        if key_PK is None or h_PD is None:
            key_PK, h_PD = key_NK.new_zeros(len(found), key_NK.shape[1]), h_ND.new_zeros(len(found), h_ND.shape[1])
        key_PK.index_add_(0, place_N, share_N1 * key_NK)
        h_PD.index_add_(0, place_N, share_N1 * h_ND)
    assert key_PK is not None and h_PD is not None, "a place has a key"
    return key_PK, h_PD
