"""A model with other activations behind what it is asked: how GRACE, MELO and ELDER speak, and through what they learn.

    value   y_t = v                                  GRACE, Hartvigsen et al. 2023, arXiv 2211.11031, equation 1
    ranks   y_t = f(x_t) + sum_c w_c B_c A_c x_t     MELO, Yu et al. 2024, arXiv 2312.11795; ELDER, Li et al. 2025, arXiv 2408.11869

f is a module of the model, and t runs from the last token of what is asked, or where a decoder begins, over as many tokens as the answer
has: what is said is predicted there. Behind them the model goes on by itself. A module that reads a text to its end before it is answered
changes everywhere in it.

The tensors stand in an op by names with a module in them: value/MODULE (G, D), or A/MODULE (G, R, K) and B/MODULE (G, D, R), for G entries
of which each row speaks with C; a router is router/MODULE (G, K) and bias/MODULE (G,). Besides, for each of the op's vectors: `places`, how
many tokens its answer has; `block`, its entry, if that is not its own number; `centres`, around which its radius is, if that is not itself.
Nothing here decides who is concerned.

File legend: N rows, T tokens, K width of what a module reads, D of what it gives, G entries, C of them at once, R ranks of each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errata import hooks, hosts
from errata.hosts import Host

EVERYWHERE = 1 << 30
Chosen = tuple[Int[Tensor, "N C"], Float[Tensor, "N C"]]  # which entries speak for each row, and how much of each


@torch.no_grad()
def keys(host: Host, texts: Sequence[str], module: str, everywhere: bool = False, outputs: bool = False) -> Float[Tensor, "N K"]:
    """(N, K) float32 on the CPU: what goes into the module at the last place of each text; in a decoder, where the answer begins.

    `everywhere`: one after the other at each token of each text that goes on, which is the last place of what is asked so far.
    `outputs`: what comes out of it.
    """
    going_on = host.kind == "causal"
    rows = [(ids, len(ids)) if going_on else ([*ids, 0], len(ids)) for ids in (hosts.tokens(host, t) for t in texts)]
    found: dict[int, Tensor] = {}
    for group in hosts.by_length(rows, hosts.at_once(host)):
        batch = hosts.unscored(hosts.pad(host, [rows[i] for i in group]))
        with hosts.alone(host), hooks.reading(host.model, [module], inputs=not outputs, stop=True) as seen:
            hosts.logits(host, batch)
        for i, x_TK in zip(group, seen[module].float().cpu(), strict=True):
            at = rows[i][1] - 1 if going_on or hosts.reads(host, module) else 0
            found[i] = x_TK[0 if everywhere and going_on else at : at + 1]
    return torch.cat([found[i] for i in range(len(texts))]) if texts else torch.zeros(0, 1)


def routed(x_NK: Float[Tensor, "N K"], router_GK: Float[Tensor, "G K"], bias_G: Float[Tensor, "G"], most: int) -> Chosen:
    """(N, C) the `most` experts that a router gives most to, and what it gives them: of a softmax over all, not made to sum to 1 again."""
    p_NG = (x_NK @ router_GK.T + bias_G).softmax(-1)
    p_NC, index_NC = p_NG.topk(most, dim=-1)
    return index_NC, p_NC


def codes(x_NK: Float[Tensor, "N K"], parts: Mapping[str, Tensor], most: int) -> Float[Tensor, "N Q"]:
    """(N, Q) for the routers of all modules, one after the other, 1 at each expert that speaks (Li et al. 2025, section 3.4)."""
    found = []
    for module in modules(parts):
        router_GK = parts[f"router/{module}"]
        index_NC, _ = routed(x_NK, router_GK, parts[f"bias/{module}"], most)
        found.append(torch.zeros(len(x_NK), len(router_GK)).scatter(1, index_NC, 1.0))
    return torch.cat(found, dim=1)


def modules(parts: Mapping[str, Tensor]) -> list[str]:
    """The modules that are changed, in the order of their names."""
    return sorted({name.partition("/")[2] for name in parts if name.startswith(("value/", "B/"))})


@contextmanager
def changed(
    host: Host, parts: Mapping[str, Tensor], chosen: Mapping[str, Chosen], given: Sequence[int], said: Sequence[int]
) -> Iterator[None]:
    """Inside the block the model reads a batch whose rows have so many tokens `given`, and each module gives what `parts` say for the
    entries `chosen` for it, while up to so many tokens are `said`. Gradients flow to both."""

    def change(module: str) -> Callable[[Tensor, Tensor], Tensor]:
        index_NC, weight_NC = chosen[module]
        weight_NC = weight_NC.to(host.device)
        at_N = torch.tensor([n - 1 if host.kind == "causal" else 0 for n in given], device=host.device)
        end_N = at_N + torch.tensor([EVERYWHERE if hosts.reads(host, module) else n for n in said], device=host.device)

        def own(kind: str) -> Tensor:  # picked where they are: of all entries only these go to the model
            kept = parts[f"{kind}/{module}"]
            return kept[index_NC.to(kept.device)].to(host.device)

        if f"value/{module}" in parts:
            value_N1D = torch.einsum("ncd,nc->nd", own("value"), weight_NC)[:, None]
        else:
            A_NCRK, B_NCDR = own("A"), own("B")

        def instead(x_NTK: Tensor, y_NTD: Tensor) -> Tensor:
            if f"value/{module}" in parts:
                said_NTD = value_N1D.expand_as(y_NTD)
            else:
                h_NTCR = torch.einsum("ntk,ncrk->ntcr", x_NTK.to(A_NCRK), A_NCRK) * weight_NC[:, None, :, None]
                said_NTD = y_NTD + torch.einsum("ntcr,ncdr->ntd", h_NTCR, B_NCDR)
            t_T = torch.arange(y_NTD.shape[1], device=at_N.device)
            there_NT = (t_T >= at_N[:, None]) & (t_T < end_N[:, None])
            return torch.where(there_NT[..., None], said_NTD.to(y_NTD.dtype), y_NTD)

        return instead

    with hooks.changing(host.model, {module: change(module) for module in chosen}):
        yield
