"""Causal tracing: in which layers' MLPs the model recalls what it answers. `memit` and `rome` choose their layers by it.

    effect(l) = p(answer | subject corrupted, MLP outputs of layers l .. l + width - 1 at its last token restored)
              - p(answer | subject corrupted)                            Meng et al. 2022, arXiv 2202.05262, section 2.1

The answer is what the model gives now, as it is what an edit replaces. Where no subject is given the whole prompt is one.
Unlike memit@80426fd the window is as wide as the range of layers that is edited, begins at l, and is the same for whoever chooses.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hooks, hosts
from errata.hosts import Host
from errata.methods._values import last_token
from errata.types import Example

NOISE = 3.0  # standard deviations of the embeddings of what is corrupted
TRACED = 16  # examples that choose the layers


@torch.no_grad()
def trace(host: Host, examples: Sequence[Example], width: int = 1, samples: int = 10, seed: int = 0) -> Float[Tensor, "W"]:
    """(W,) the mean indirect effect, in probability, of each window of `width` layers; it begins at layer 0, 1, ..., blocks - width."""
    modules = host.module_names((host.layout.mlp_out,))
    table = host.model.get_submodule(host.layout.embedding).weight
    spans = [_span(host, e) for e in examples]
    seen = sorted({i for ids, start, at in spans for i in ids[start : at + 1]})
    sigma = NOISE * float(table[seen].float().std())
    draw = torch.Generator().manual_seed(seed)
    effects = []
    for ids, start, at in spans:
        noise_STD = sigma * torch.randn(samples, at + 1 - start, table.shape[1], generator=draw)
        effects.append(_effects(host, modules, ids, start, at, noise_STD, width))
    return torch.stack(effects).mean(0).cpu()


def _effects(
    host: Host, modules: Sequence[str], ids: list[int], start: int, at: int, noise_STD: Float[Tensor, "S T D"], width: int
) -> Float[Tensor, "W"]:
    """`trace` of one prompt, of which the tokens `start` to `at` are corrupted with each of S noises."""
    batch = hosts.pad(host, [([*ids, ids[-1]], len(ids))] * (len(noise_STD) + 1))  # the last token stands for whatever comes next

    def corrupt(x: Tensor) -> Tensor:
        x = x.clone()
        x[1:, start : at + 1] += noise_STD.to(x)
        return x

    def restore(x: Tensor) -> Tensor:
        x = x.clone()
        x[1:, at] = x[0, at]  # the first row is the clean one
        return x

    def said(restored: Sequence[str]) -> Float[Tensor, "N V"]:
        with hooks.shifting(host.model, {host.layout.embedding: corrupt} | dict.fromkeys(restored, restore)):
            return hosts.predictions(host, batch).softmax(-1)

    p_NV = said(())
    answer = p_NV[0].argmax()
    windows = [said(modules[i : i + width])[1:, answer].mean() for i in range(len(modules) - width + 1)]
    return torch.stack(windows) - p_NV[1:, answer].mean()


def _span(host: Host, e: Example) -> tuple[list[int], int, int]:
    """(ids of the prompt, first and last token of its subject)."""
    ids, special = hosts.tokens(host, e.prompt), len(hosts.tokens(host, ""))
    if e.subject is None:
        return ids, min(special, len(ids) - 1), len(ids) - 1
    start = e.prompt.rindex(e.subject)
    at = last_token(host, ids, e.prompt[: start + len(e.subject)])
    before = e.prompt[:start].rstrip()
    return ids, min(last_token(host, ids, before) + 1 if before else special, at), at


def traced_window(host: Host, examples: Sequence[Example], width: int, seed: int) -> list[int]:
    """The `width` layers with the greatest effect; 0 for five, or half of them where there are fewer than ten.

    Not the last one where it can be helped: behind it there is nothing that a change before the end of the prompt could reach.
    """
    width = min(width, host.blocks) if width else max(1, min(5, host.blocks // 2))
    effects_W = trace(host, sorted(examples, key=lambda e: e.id)[:TRACED], width, seed=seed)
    start = int(effects_W[: max(1, len(effects_W) - 1)].argmax())
    return list(range(start, start + width))
