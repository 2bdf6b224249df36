"""Keys, their covariance and the solve: how a change of hidden states becomes one of weights. What `memit` and `rome` share.

    Delta = R K^T (lam C + K K^T)^-1        Meng et al. 2023, arXiv 2210.07229, equation 14       C = E[k k^T] over text
    Delta = R (K^T C^-1 K)^-1 K^T C^-1      the same with an equality constraint: Gupta et al. 2024, arXiv 2403.14236

Both are one solve of the sums (`_normal.py`), with lam or without: one Cholesky factor of C for all facts of a layer, in float64, and a
system as large as there are facts.

Unlike memit@80426fd lam is in units of the key width, which is what k^T C^-1 k is on average over the text: with lam = 1 one usual key
takes half of its residual. C gets a small multiple of the identity, for where it was estimated from little text.

File legend: N rows, P places, K key (MLP projection's input) width, D model width.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hooks, hosts, text
from errata.hosts import Host, Weights, stored_transposed
from errata.methods import _normal
from errata.methods._normal import Prior, Whitened
from errata.methods._trace import TRACED, trace
from errata.methods._values import Place
from errata.types import Add, AddLowRank, Case, Example, InvalidExample, Op, Run, State, UnknownName, WrongBase

Solve = Callable[[Float[Tensor, "K K"], Float[Tensor, "K P"]], Float[Tensor, "P K"]]


def layers_of(host: Host, given: str) -> list[int]:
    """ "3-8" or "3,4,5" as layers. Raises UnknownName for one that the host does not have."""
    out: list[int] = []
    for part in given.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdigit() and (high or low).isdigit() and int(low) <= int(high or low) < host.blocks):
            raise UnknownName.among("layer", part.strip(), map(str, range(host.blocks)))
        out += range(int(low), int(high or low) + 1)
    return sorted(set(out))


def state_for(
    method: str, host: Host, examples: Sequence[Example], run: Run, layers: str, width: int, per_key: int, cases: Sequence[Case] = ()
) -> State:
    """The layers, given or found by tracing `examples`, and C of each, from `per_key` tokens of held text for each of its dimensions."""
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


def covariance_factors(host: Host, state: State, layers: Sequence[int], ridge: float) -> dict[int, Float[Tensor, "K K"]]:
    """Layer -> the lower factor of C + ridge * mean eigenvalue * I, float64. Raises WrongBase, UnknownName."""
    if state.host not in (host.id, host.base_id):
        raise WrongBase(f"State {state.id} was prepared on weights {state.host}, {host.name} has {host.id}. Prepare it again.")
    factors = {}
    for layer, module in zip(layers, host.module_names((host.layout.mlp_out,), layers), strict=True):
        if module not in state.tensors:
            raise UnknownName.among("covariance", module, state.tensors)
        C_KK = state.tensors[module].to(host.device, torch.float64)  # float64: the solve is ill-conditioned in float32
        shift = ridge * C_KK.diagonal().mean()
        factors[layer] = torch.linalg.cholesky(C_KK + shift * torch.eye(len(C_KK), dtype=torch.float64, device=C_KK.device))
    return factors


@torch.no_grad()
def covariances(host: Host, texts: Sequence[str], modules: Sequence[str], per_key: int) -> tuple[dict[str, Float[Tensor, "K K"]], int]:
    """({module: (K, K) mean of k k^T over tokens, float32}, how many tokens): streamed, summed in float64."""
    width = max(_in_out(host, module)[0] for module in modules)
    rows, tokens = [], 0
    for ids, _ in hosts.chunks(host, texts):
        rows.append((ids, len(ids)))  # all given: nothing for the head to do
        tokens += len(ids)
        if tokens >= per_key * width:
            break
    sums: dict[str, Tensor] = {}
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.pad(host, [rows[i] for i in group])
        real_NT = batch.mask_NT.bool()
        with hooks.reading(host.model, modules, inputs=True, stop=True) as seen:
            hosts.predictions(host, batch)
        for module in modules:
            keys_NK = seen[module][real_NT].float()
            sums[module] = sums.get(module, 0) + (keys_NK.T @ keys_NK).double()
    return {module: (C_KK / tokens).float().cpu() for module, C_KK in sums.items()}, tokens


def _in_out(host: Host, module: str) -> tuple[int, int]:
    """(K, D) of a projection."""
    part = host.model.get_submodule(module)
    a, b = part.weight.shape
    return (a, b) if stored_transposed(part) else (b, a)


def gains(L_KK: Float[Tensor, "K K"], K_KP: Float[Tensor, "K P"], prior: float) -> Float[Tensor, "P K"]:
    """(P, K) the rows g with Delta = R g: (prior C + K K^T)^-1 K, transposed; with prior 0 its limit, C^-1 K (K^T C^-1 K)^-1."""
    return gains_under(Whitened(L_KK=L_KK), K_KP, prior)


def gains_under(prior: Prior, K_KP: Float[Tensor, "K P"], lam: float) -> Float[Tensor, "P K"]:
    """(P, K) the rows g with Delta = R g, for any prior of the sums. Raises InvalidExample."""
    keys_PK = K_KP.T
    return _normal.gains(_normal.solve(_normal.of(prior, keys_PK, keys_PK.new_zeros(len(keys_PK), 0), keep=True), lam))


def mean_energy(L_KK: Float[Tensor, "K K"], K_KP: Float[Tensor, "K P"]) -> float:
    """The mean of k^T C^-1 k over the columns of K."""
    return float(Whitened(L_KK=L_KK).into(K_KP.T).square().sum(1).mean())


def spread(
    host: Host,
    found: Sequence[Place],
    delta_PD: Float[Tensor, "P D"],
    factors: Mapping[int, Float[Tensor, "K K"]],
    solve: Solve,
) -> tuple[tuple[Op, ...], Weights]:
    """(one op for each layer, the weights with them on): behind the last layer the places' hidden states have moved by `delta_PD`.

    Layer by layer: with the changes so far on, what is still missing, shared equally among the layers that are left (algorithm 1 of
    MEMIT; what the layers above make of it is measured before the next takes its share). Keys and hidden states are means over prefixes,
    both of them, so that the last equation holds for what it was solved for (Gupta et al. 2024, arXiv 2403.07175, "R-ROME").
    """
    layers, weights = sorted(factors), Weights()
    ops: list[Op] = []
    block = f"{host.layout.blocks}.{layers[-1]}"
    goal_PD: Tensor | None = None
    for i, layer in enumerate(layers):
        (module,) = host.module_names((host.layout.mlp_out,), [layer])
        key_PK, h_PD = averaged(host, found, module, block, weights)
        goal_PD = h_PD + delta_PD.double() if goal_PD is None else goal_PD
        missing_DP = ((goal_PD - h_PD) / (len(layers) - i)).T
        gains_PK = solve(factors[layer], key_PK.T)
        turned = stored_transposed(host.model.get_submodule(module))
        change = missing_DP @ gains_PK
        change = (change.T if turned else change).float().contiguous()
        base = host.model.get_parameter(f"{module}.weight").detach()
        weights[f"{module}.weight"] = (base.float() + change).to(base.dtype)
        (P, K), D = gains_PK.shape, len(missing_DP)
        if P * (K + D) < K * D:
            A, B = gains_PK.float().cpu().contiguous(), missing_DP.float().cpu().contiguous()
            ops.append(AddLowRank(weight=f"{module}.weight", A=A, B=B))
        else:
            ops.append(Add(weight=f"{module}.weight", delta=change.cpu()))
    return tuple(ops), weights


def within(
    host: Host, documents: Sequence[str], epsilon: float, lam: float, solved: Callable[[float], tuple[tuple[Op, ...], Weights]]
) -> tuple[Op, ...]:
    """`solved` with the least weight of the text, `lam` or more, that keeps the increase of the loss on `documents` within `epsilon`.

    A usual key takes s / (1 + lam) of its residual: s is sought, as the gate seeks its scale. Unlike that scale it takes back more from
    the facts whose keys text uses much. If no s is found the smallest that was tried comes back, and the gate has the last word.
    """
    rows = hosts.chunks(host, documents)
    ops, weights = solved(lam)
    if len(rows) < 2:
        return ops
    before_N2, after_N2, tried = hosts.score(host, rows), hosts.score(host, rows, weights), {1.0: ops}
    if hosts.increase(before_N2, after_N2)[0] <= epsilon:
        return ops

    def read(s: float) -> tuple[Float[Tensor, "N 2"], bool]:
        tried[s], weights = solved((1 + lam) / s - 1)
        return hosts.score(host, rows, weights), True

    s = hosts.furthest(read, {1.0: after_N2}, before_N2, epsilon)
    return tried[s or min(tried)]


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
