"""The loop of the paper on canonical examples as its code runs it: what the protocol's faithful mode is made of. Not a method.

    each example:   L = L_goal(x) + lam * KL on one text of R,  weights in float32 or bfloat16, Adam (.9, .995), no weight decay
    each fifth:     a step;   each epoch: the rate falls, lr (1 + cos(pi epoch / 10)) / 2

L_goal, from mean cross-entropies over the tokens of a continuation: raise CE, lower -CE, prefer CE - CE_contrast, balance its absolute
value; nothing holds the second and the third. Hewitt et al. 2024, arXiv 2402.06155, section 4.2;
john-hewitt/model-editing-canonical-examples@15a1e7b.

Where code and paper differ, and where a difference changed what was published, there is a switch; on is what the code does.
Unlike the code, Adam's states are not in 8 bits, and prompt and target are tokenised as one string.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, final

import torch
from torch import Tensor

from errata import hosts
from errata.hosts import Host, Weights, stored_transposed
from errata.types import Add, Example, Patch

Row = tuple[list[int], int]
TEXT = 500  # tokens of one text of R
EVERY = 5  # examples for each step
ALPHA = 8.0


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """kind: all weights, or low-rank factors on the MLPs of the middle layers; `rank` and `fraction` of the layers are the latter's.

    discarded_gradients   the gradient is set to zero before each example: a step has that of the fifth alone, and what is left at the end
                          of an epoch is dropped; else a step has the sum of all five, and the rest is applied
    bf16_weights          weights and activations in bfloat16, without float32 masters
    summed_kl             KL(base || edited) summed over positions; else KL(edited || base), their mean
    bf16_reference        the base of the KL is rounded to bfloat16
    """

    kind: Literal["full", "lora"]
    lr: float
    lam: float
    rank: int = 8
    fraction: float = 0.5
    epochs: int = 10
    discarded_gradients: bool = True
    bf16_weights: bool = True
    summed_kl: bool = True
    bf16_reference: bool = True


def epochs(host: Host, examples: Sequence[Example], hold: Sequence[str], made: Published, seed: int) -> Iterator[Patch]:
    """The patch after each epoch. The host is not touched."""
    rng, order = random.Random(seed), list(examples)
    dtype = torch.bfloat16 if made.bf16_weights else torch.float32
    base = {n: p.detach().to(dtype) for n, p in host.model.named_parameters()}
    reference = {n: w.bfloat16().to(dtype) for n, w in base.items()} if made.bf16_reference else base
    texts = whole_texts(host, hold)
    leaves, weights = _all(base) if made.kind == "full" else _factors(host, base, made, seed)
    optimizer = torch.optim.Adam(leaves, lr=made.lr, betas=(0.9, 0.995))
    for epoch in range(made.epochs):
        for group in optimizer.param_groups:
            group["lr"] = made.lr * (1 + math.cos(math.pi * epoch / made.epochs)) / 2
        rng.shuffle(order)
        drawn = [rng.choice(texts) for _ in order]
        for start in range(0, len(order), EVERY):
            five = list(zip(order, drawn, strict=True))[start : start + EVERY]
            if made.discarded_gradients:  # what is set to zero again need not be found
                five = five[EVERY - 1 :]
            if not five:
                continue
            optimizer.zero_grad()
            for example, row in five:
                now = weights()
                loss = example_loss(host, example, now) + made.lam * _kl(host, row, reference, now, made.summed_kl)
                loss.backward(inputs=list(leaves))  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            shifts = {n: (w.float() - base[n].float()).cpu() for n, w in weights().items()}
        ops = tuple(Add(weight=n, delta=shift) for n, shift in shifts.items() if shift.any())
        yield Patch(method="published", config=asdict(made) | {"epoch": epoch + 1}, parent=host.id, examples=tuple(examples), ops=ops)


def whole_texts(host: Host, documents: Sequence[str]) -> list[Row]:
    """The documents end to end, cut into texts of 500 tokens, or of as many as the host reads."""
    end = [host.tokenizer.eos_token_id] if host.tokenizer.eos_token_id is not None else []
    running = [i for document in documents for i in (*hosts.tokens(host, document), *end)]
    size = min(TEXT, host.context)
    return [(running[i : i + size], 1) for i in range(0, max(1, len(running) - size + 1), size)]


def _all(base: Weights) -> tuple[list[Tensor], Callable[[], Weights]]:
    moved = {n: w.clone().requires_grad_() for n, w in base.items()}
    return list(moved.values()), lambda: moved


def _factors(host: Host, base: Weights, made: Published, seed: int) -> tuple[list[Tensor], Callable[[], Weights]]:
    """W + (alpha / rank) B A; A as usual (Kaiming, uniform), B zero. The layers are those of the code: one more than the fraction says,
    where there are so many."""
    n, L = math.ceil(host.blocks * made.fraction), host.blocks
    layers = range(max(0, L // 2 - n // 2), min(L, L // 2 + n // 2 + n % 2 + 1))
    names = [f"{m}.weight" for m in host.module_names((*host.layout.mlp_in, host.layout.mlp_out), layers)]
    turned = {name: stored_transposed(host.model.get_submodule(name.removesuffix(".weight"))) for name in names}
    draw, A, B = torch.Generator().manual_seed(seed), {}, {}
    for name in names:
        d_out, d_in = base[name].shape[::-1] if turned[name] else base[name].shape
        bound = 1 / math.sqrt(d_in)
        A[name] = (bound * (2 * torch.rand(made.rank, d_in, generator=draw) - 1)).to(base[name]).requires_grad_()
        B[name] = torch.zeros(d_out, made.rank).to(base[name]).requires_grad_()

    def weights() -> Weights:
        shifts = {name: ALPHA / made.rank * (B[name] @ A[name]) for name in names}
        return base | {name: base[name] + (shift.T if turned[name] else shift) for name, shift in shifts.items()}

    return [*A.values(), *B.values()], weights


def example_loss(host: Host, e: Example, weights: Weights) -> Tensor:
    """What is minimised for one example."""

    def ce(target: str) -> Tensor:
        row = hosts.encode(host, e.prompt, target)
        loss: Tensor = -hosts.scored_logprobs(host, hosts.pad(host, [row]), weights).sum() / (len(row[0]) - max(row[1], 1))
        return loss

    if e.contrast is None:
        return -ce(e.target) if e.goal == "lower" else ce(e.target)
    ahead = ce(e.target) - ce(e.contrast)
    return ahead if e.goal == "prefer" else ahead.abs()


def _kl(host: Host, row: Row, reference: Weights, weights: Weights, as_coded: bool) -> Tensor:
    batch = hosts.pad(host, [row])
    with torch.no_grad():
        logp_PV = hosts.predictions(host, batch, reference).log_softmax(-1)
    logq_PV = hosts.predictions(host, batch, weights).log_softmax(-1)
    if as_coded:
        return torch.sum(logp_PV.exp() * (logp_PV - logq_PV))
    return torch.sum(logq_PV.exp() * (logq_PV - logp_PV)) / len(logq_PV)
