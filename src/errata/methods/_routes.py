"""What `grace`, `melo` and `elder` share: the keys of what is asked, how far each reaches, and how activations are learnt.

    key      k_i = what goes into one module at the last place of what example i asks
    reach_i  = 1/2 min( |k_i - k_j| over j with another label, |k_i - k| over what else is asked in the text that holds still )
    loss     sum over examples of L_goal, each through its own entry, Adam

Hartvigsen et al. 2023 (GRACE), arXiv 2211.11031, algorithm 1; Yu et al. 2024 (MELO), arXiv 2312.11795, section 3.2. The label of an
example is what it wants: its goal and its answers.

Unlike GRACE@f674183 and EasyEdit@14cea82, all examples are looked at together, in the order of their texts, so that any order gives the
same patch; where two labels meet each of the two balls ends half way (there: the later one decides, against its nearest key alone); what
the text that holds still asks counts as another label; labels are compared as they are (there: by the mean or the sum of token ids, so that
two answers can pass for one); examples that ask the same have one entry, which is learnt for all of them. What is put in place ends with
the answer (there it stays on, and a value says its answer over and over). Keys are taken late, where what is asked lies apart, and what is
put in place begins below the middle, from where it can say several tokens (there: one module for both).

File legend: N examples or what they ask, M other places, K key width, D output width, G entries, R ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hooks, hosts
from errata.hosts import Host
from errata.memory.activations import Chosen, changed, keys
from errata.memory.reader import asked_in, sentences
from errata.methods._descend import PASS, goal_losses
from errata.methods._values import quiet
from errata.types import Example, Memory, Patch, Progress, Run

KEY, VALUE = 0.85, 0.4  # of the blocks are below the one where keys are taken, and the first one where something is put
STILL = 512  # documents of the text that holds still are asked about, at most
SHARE = 0.5  # of the way to what is another matter
COVERED = 1.001  # times the distance: another batch rounds otherwise
BETAS = (0.9, 0.999)


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question, its ids, and the examples that ask it, each with the ids of its target and of its contrast."""

    text: str
    ids: tuple[int, ...]
    examples: tuple[Example, ...]
    answers: tuple[tuple[list[int], list[int] | None], ...]

    @property
    def places(self) -> int:
        """How many tokens the longest answer has."""
        return max(len(answer) for both in self.answers for answer in both if answer is not None)

    @property
    def label(self) -> frozenset[tuple[str, str, str | None]]:
        return frozenset((e.goal, e.target, e.contrast) for e in self.examples)


def asked(host: Host, examples: Sequence[Example]) -> list[Asked]:
    """What the examples ask, in the order of the texts. Raises InvalidExample for what cannot be encoded."""
    found: dict[str, list[Example]] = {}
    for e in sorted(set(examples), key=lambda e: (asked_in(e.prompt), e.id)):
        found.setdefault(asked_in(e.prompt), []).append(e)

    def said(e: Example, answer: str) -> list[int]:
        ids, given = hosts.encode(host, e.prompt, answer)
        return ids[given:]

    return [
        Asked(
            text=text,
            ids=tuple(hosts.tokens(host, text)),
            examples=tuple(own),
            answers=tuple((said(e, e.target), None if e.contrast is None else said(e, e.contrast)) for e in own),
        )
        for text, own in found.items()
    ]


def modules_at(host: Host, modules: str, depth: float, n: int = 1) -> list[str]:
    """The modules that are named, with commas between them; for "" the last MLP projections of `n` blocks, or as many as there are, from
    this share of the stack that speaks. Raises UnknownName."""
    if named := [m.strip() for m in modules.split(",") if m.strip()]:
        for name in named:
            hooks.module(host.model, name)
        return sorted(set(named))
    first = int(depth * host.blocks)
    return host.module_names((host.layout.mlp_out,), range(first, min(first + n, host.blocks)))


def still(host: Host, examples: Sequence[Example], run: Run, module: str, width: int) -> Float[Tensor, "M K"]:
    """(M, K) the keys of what is asked in the text that holds still: of a text that goes on, at each of its tokens. K is the `width`; the
    first one is zero, of what nobody asks, so that there always is another matter."""
    documents = quiet(host, examples, run, STILL)
    if host.kind == "causal":
        texts = [sentence for document in documents for sentence in sentences(document)]
    else:
        texts = [asked_in(document.rpartition("|")[0]) for document in documents]
    asked_MK = keys(host, list(dict.fromkeys(texts)), module, everywhere=True)
    return torch.cat([torch.zeros(1, width), *([asked_MK] if texts else [])])


def reaches(
    keys_NK: Float[Tensor, "N K"],
    labels: Sequence[object],
    still_MK: Float[Tensor, "M K"],
    from_GK: Float[Tensor, "G K"],
    of: Sequence[object],
) -> Float[Tensor, "G"]:
    """(G,) how far each of the places `from_GK`, which have the labels `of`, may reach: half of the way to what is another matter."""
    other_GN = torch.tensor([[mine != label for label in labels] for mine in of], dtype=torch.bool).reshape(len(of), len(labels))
    apart_GN = torch.cdist(from_GK.double(), keys_NK.double()).masked_fill(~other_GN, math.inf)
    apart_GM = torch.cdist(from_GK.double(), still_MK.double())
    return SHARE * torch.cat([apart_GN, apart_GM], dim=1).amin(1)


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """steps: at most. lr: length of a step, as a share of what the module gives. stop: what is asked is learnt when the loss is below."""

    steps: int
    lr: float
    stop: float


Parts = dict[str, Tensor]
Choose = Callable[[Parts, list[int]], Mapping[str, Chosen]]  # (the parts as they are, numbers of questions) -> what speaks for each


def low_rank(host: Host, questions: Sequence[Asked], modules: Sequence[str], n: int, ranks: int, seed: int) -> tuple[Parts, Parts]:
    """`n` entries of so many ranks for each module, and the units of their steps: A drawn so that A x is about 1 in each rank, B zero and
    in units of what the module gives."""
    parts, units, texts = Parts(), Parts(), [q.text for q in questions]
    for i, module in enumerate(modules):
        x_NK, y_ND = keys(host, texts, module), keys(host, texts, module, outputs=True)
        draw = torch.Generator().manual_seed(seed + i)
        A_GRK = torch.randn(n, ranks, x_NK.shape[1], generator=draw) / x_NK.square().sum(1).mean().sqrt()
        parts |= {f"A/{module}": A_GRK, f"B/{module}": torch.zeros(n, y_ND.shape[1], ranks)}
        units |= {f"A/{module}": A_GRK.flatten(1).norm(dim=1), f"B/{module}": y_ND.norm(dim=1).mean().expand(n)}
    return parts, units


def learn(
    host: Host,
    questions: Sequence[Asked],
    parts: Parts,
    units: Mapping[str, Float[Tensor, "G"]],
    choose: Choose,
    settings: Settings,
    progress: Progress,
    entry: Sequence[int] | None = None,
) -> Parts:
    """The parts after the descent of each question's loss through what `choose` gives it, in steps that are shares of `units`.

    With `entry`, the one that each question has, entries are learnt as if alone: side by side, with a second moment each (a scalar, so that
    a step has the direction of the gradient), and those whose questions are all learnt rest. Without it all are learnt together, until all
    questions are; `besides` is what else is to be small.
    """
    leaves = {name: t.to(host.device).clone().requires_grad_() for name, t in parts.items()}
    moments = {name: (torch.zeros_like(t), t.new_zeros(len(t))) for name, t in leaves.items()}
    going, (b1, b2) = list(range(len(questions))), BETAS
    for step in progress(range(settings.steps), "learning activations", settings.steps):
        for leaf in leaves.values():
            leaf.grad = None
        left = {i for i, loss in losses(host, questions, going, leaves, choose).items() if not loss < settings.stop}
        if not left:
            break
        rows = slice(None) if entry is None else torch.tensor(sorted({entry[i] for i in left}), device=host.device)
        going = going if entry is None else [i for i in going if entry[i] in {entry[j] for j in left}]
        with torch.no_grad():
            for name, leaf in leaves.items():
                if leaf.grad is None:
                    continue
                (m, v), g = moments[name], leaf.grad[rows]
                m[rows] = b1 * m[rows] + (1 - b1) * g
                v[rows] = b2 * v[rows] + (1 - b2) * g.reshape(len(g), -1).square().sum(1)
                length = settings.lr * units[name].to(leaf)[rows] / ((v[rows] / (1 - b2 ** (step + 1))).sqrt() + 1e-30)
                leaf[rows] -= length.view(-1, *[1] * (leaf.ndim - 1)) * m[rows] / (1 - b1 ** (step + 1))
    return {name: leaf.detach().float().cpu() for name, leaf in leaves.items()}


def losses(host: Host, questions: Sequence[Asked], numbers: list[int], leaves: Parts, choose: Choose) -> dict[int, float]:
    """The loss of each of these questions, summed over what asks it; adds its gradient to those of the leaves."""
    items = [(i, e, answers) for i in numbers for e, answers in zip(questions[i].examples, questions[i].answers, strict=True)]
    found = dict.fromkeys(numbers, 0.0)
    for group in hosts.by_length([([*questions[i].ids, *target], 0) for i, _, (target, _) in items], PASS):
        some = [items[k] for k in group]
        said = [(i, target) for i, _, (target, _) in some] + [(i, c) for i, _, (_, c) in some if c is not None]
        rows = [([*questions[i].ids, *answer], len(questions[i].ids)) for i, answer in said]
        chosen, places = choose(leaves, [i for i, _ in said]), [questions[i].places for i, _ in said]
        with hosts.alone(host), changed(host, leaves, chosen, [given for _, given in rows], places):
            logp_N = hosts.scored_logprobs(host, hosts.pad(host, rows)).sum(1)
        against = iter(range(len(some), len(said)))
        with_contrast = [k if c is None else next(against) for k, (_, _, (_, c)) in enumerate(some)]
        tokens_N = torch.tensor([float(len(target)) for _, _, (target, _) in some], device=logp_N.device)
        loss_N = goal_losses(logp_N[: len(some)], logp_N[with_contrast], tokens_N, [e for _, e, _ in some], enough=0.0)
        loss_N.sum().backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
        for (i, _, _), loss in zip(some, loss_N.tolist(), strict=True):
            found[i] += loss
    return found


def patched(
    host: Host,
    name: str,
    config: Mapping[str, Any],
    examples: Sequence[Example],
    questions: Sequence[Asked],
    vectors_QK: Tensor,
    parts: Parts,
    **how: Any,
) -> Patch:
    """The patch whose memory looks up the questions, one vector for each; `how` are fields of `types.Memory`."""
    owner = torch.tensor([examples.index(q.examples[0]) for q in questions], dtype=torch.long)
    parts = parts | {"places": torch.tensor([q.places for q in questions], dtype=torch.long)}
    op = Memory(weight=host.layout.head, vectors=vectors_QK.float().contiguous(), owner=owner, parts=parts, nearest=1, **how)
    return Patch(method=name, config=dict(config), parent=host.id, examples=tuple(examples), ops=(op,))
