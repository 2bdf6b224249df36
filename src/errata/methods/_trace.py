"""Causal tracing: in which layers' MLPs the model recalls what it answers. `memit` and `rome` choose their layers by it.

    effect(l) = p(answer | subject corrupted, MLP outputs of layers l .. l + width - 1 at its last token restored)
              - p(answer | subject corrupted)                            Meng et al. 2022, arXiv 2202.05262, section 2.1

The answer is what the model gives now, as it is what an edit replaces. Where no subject is given the whole prompt is one.
Unlike memit@80426fd the window is as wide as the range of layers that is edited, begins at l, and is the same for whoever chooses.

File legend: E prompts, W windows, S samples of noise, T tokens, D model width, N rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hooks, hosts
from errata.hosts import Host
from errata.methods._values import last_token
from errata.types import InvalidExample, Progress, no_progress

Prompt = tuple[str, str | None]  # and its subject, if it is known

NOISE = 3.0  # standard deviations of the embeddings of what is corrupted
SAMPLES = 10  # of the noise, for each prompt
TRACED = 16  # prompts that choose the layers


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What tracing E prompts found, in probabilities of the clean answer: clean, corrupted, and the effect of each window of layers.

    Window w begins at layer w and is `width` layers wide.
    """

    width: int
    clean_E: Float[Tensor, "E"]
    corrupted_E: Float[Tensor, "E"]
    effects_EW: Float[Tensor, "E W"]

    @property
    def chosen(self) -> list[int]:
        """The layers of the window with the greatest mean effect.

        Not the last window where it can be helped: behind it there is nothing that a change before the end of the prompt could reach.
        """
        mean_W = self.effects_EW.mean(0)
        start = int(mean_W[: max(1, len(mean_W) - 1)].argmax())
        return list(range(start, start + self.width))


@torch.no_grad()
def trace(
    host: Host, prompts: Sequence[Prompt], width: int = 0, samples: int = SAMPLES, seed: int = 0, progress: Progress = no_progress
) -> Trace:
    """Trace each prompt. `width` 0 is what `memit` edits by default: five layers, or half of them where there are fewer than ten.

    Raises InvalidExample for a prompt that is empty or does not fit the context, UnknownArchitecture for a host that is not causal.
    """
    hosts.require_causal(host, "tracing")
    width = min(width, host.blocks) if width else max(1, min(5, host.blocks // 2))
    modules = host.module_names((host.layout.mlp_out,))
    table = hosts.weight(host.model, f"{host.layout.embedding}.weight")
    spans = [_span(host, prompt, subject) for prompt, subject in prompts]
    seen = sorted({i for ids, start, at in spans for i in ids[start : at + 1]})
    sigma = NOISE * float(table[seen].float().std())
    draw = torch.Generator().manual_seed(seed)
    found = []
    for ids, start, at in progress(spans, "tracing", len(spans)):
        noise_STD = sigma * torch.randn(samples, at + 1 - start, table.shape[1], generator=draw)
        found.append(_effects(host, modules, ids, start, at, noise_STD, width))
    table_EX = torch.stack(found).double().cpu()
    return Trace(width=width, clean_E=table_EX[:, 0], corrupted_E=table_EX[:, 1], effects_EW=table_EX[:, 2:])


def _effects(
    host: Host, modules: Sequence[str], ids: list[int], start: int, at: int, noise_STD: Float[Tensor, "S T D"], width: int
) -> Float[Tensor, "X"]:
    """(2 + W,) clean, corrupted and effects for one prompt, of which the tokens `start` to `at` are corrupted with each of S noises."""
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
    clean, corrupted = p_NV[0, answer], p_NV[1:, answer].mean()
    windows = [said(modules[i : i + width])[1:, answer].mean() - corrupted for i in range(len(modules) - width + 1)]
    return torch.stack([clean, corrupted, *windows])


def _span(host: Host, prompt: str, subject: str | None) -> tuple[list[int], int, int]:
    """(ids of the prompt, first and last token of its subject)."""
    ids, special = hosts.tokens(host, prompt), len(hosts.tokens(host, ""))
    if not special <= len(ids) - 1 < host.context - 1:
        raise InvalidExample(f"'{prompt[:60]}' has {len(ids) - special} tokens; {host.name} can be traced on 1 to {host.context - 1}.")
    if subject is None:
        return ids, special, len(ids) - 1
    start = prompt.rindex(subject)
    at = last_token(host, ids, prompt[: start + len(subject)])
    before = prompt[:start].rstrip()
    return ids, min(last_token(host, ids, before) + 1 if before else special, at), at
