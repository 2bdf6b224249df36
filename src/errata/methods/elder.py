"""elder: a router gives each question a few LoRA experts of each module; whose code no example has is left to the model alone.

    y = f(x) + sum over the k best experts of p_e B_e A_e x,  p = softmax(W q + b)     where  min_i Hamming(code(q), code_i) < bound
    W, b = argmin  - mean_i sum over e allocated to i of log p_e(q_i) / k  -  the same for what is asked in the text that holds still

Li et al. 2025, arXiv 2408.11869, sections 3.2 to 3.4. q is what goes into one module at the last token of what is asked, and each module
with experts has a router of its own; the code says which experts they choose. The questions are allocated one selection of k experts each.

Unlike ELDER@0391c8f the last k experts are allocated to what the text that holds still asks, and their ranks stay zero: there all other
texts get whatever code they come to, and one in forty that of an edit (docs/log.md). So the bound can be found: half of the way from the
codes of the examples to those of that text. The routers are learnt before the experts, by the loss above alone, which is convex (there:
together, with a weight for it), and p then is what it is.

File legend: N what is asked, M other places, K width of a key, E experts.
"""

import itertools
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from errata.hosts import Host
from errata.memory.activations import Chosen, codes, keys, routed
from errata.methods._routes import KEY, SHARE, VALUE, Parts, Settings, asked, learn, low_rank, modules_at, patched, still
from errata.types import Example, InvalidExample, Method, Patch, Run

ROUNDS = 100  # of the solver, at most
DECAY = 1e-4  # of |W|^2 / 2, for keys of length 1


@final
@dataclass(frozen=True, kw_only=True)
class Elder(Method):
    """experts of each module, of which `at_once` speak, and the `ranks` of each. bound: Hamming distance from which on nothing is
    concerned, 0: found. reads: the module whose inputs are routed, modules: those with experts, with commas; "": last MLP projections.
    steps, lr, stop: see `_routes.Settings`."""

    experts: int = 16
    at_once: int = 2
    ranks: int = 4
    bound: float = 0.0
    reads: str = ""
    modules: str = ""
    steps: int = 100
    lr: float = 0.1
    stop: float = 0.05

    def __post_init__(self) -> None:
        if self.ranks < 1 or not 1 <= self.at_once <= self.experts // 2:
            how = f"{self.at_once} of {self.experts} experts with {self.ranks} ranks"
            raise InvalidExample(f"elder needs ranks, and twice as many experts as speak at once or more, got {how}.")

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        (reads,), modules = modules_at(host, self.reads, KEY), modules_at(host, self.modules, VALUE, 2)
        questions = asked(host, examples)
        keys_NK = keys(host, [q.text for q in questions], reads)
        still_MK = still(host, examples, run, reads, keys_NK.shape[1])
        parts, units = low_rank(host, questions, modules, self.experts, self.ranks, run.seed)
        for i, module in enumerate(modules):
            allocated_NE = allocation(len(questions), self.experts, self.at_once, run.seed + i)
            W_EK, bias_E = router(keys_NK, allocated_NE, still_MK, self.at_once)
            parts |= {f"router/{module}": W_EK, f"bias/{module}": bias_E}
        chosen = {m: routed(keys_NK, parts[f"router/{m}"], parts[f"bias/{m}"], self.at_once) for m in modules}

        def choose(_parts: Parts, numbers: list[int]) -> dict[str, Chosen]:
            return {m: (index_NC[numbers], weight_NC[numbers]) for m, (index_NC, weight_NC) in chosen.items()}

        settings = Settings(steps=self.steps, lr=self.lr, stop=self.stop)
        parts |= learn(host, questions, {n: parts[n] for n in units}, units, choose, settings, run.progress)
        codes_NQ, others_MQ = codes(keys_NK, parts, self.at_once), codes(still_MK, parts, self.at_once)
        apart_NM = torch.cdist(codes_NQ, others_MQ, p=1)
        found = SHARE * float(apart_NM.min()) if apart_NM.numel() else 0.0
        how = {"gate": "code", "voice": "ranks", "bound": self.bound or max(1.0, found), "reads": reads, "experts": self.at_once}
        return patched(host, "elder", self.config, examples, questions, codes_NQ, parts, **how)


def allocation(n: int, experts: int, at_once: int, seed: int) -> Bool[Tensor, "N E"]:
    """(N, E) which experts each of `n` questions is to have: every selection without the last ones, in an order drawn, over and over."""
    every = list(itertools.combinations(range(experts - at_once), at_once))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    out_NE = torch.zeros(n, experts, dtype=torch.bool)
    for i in range(n):
        out_NE[i, list(every[order[i % len(every)]])] = True
    return out_NE


def router(
    keys_NK: Float[Tensor, "N K"], allocated_NE: Bool[Tensor, "N E"], still_MK: Float[Tensor, "M K"], at_once: int
) -> tuple[Float[Tensor, "E K"], Float[Tensor, "E"]]:
    """W and b that give each key what is allocated to it, and the last `at_once` experts to what is another matter."""
    mean_K = still_MK.mean(0)
    x_NK, y_MK = keys_NK - mean_K, still_MK - mean_K
    size = x_NK.square().sum(1).mean().sqrt()
    W_EK = torch.zeros(allocated_NE.shape[1], keys_NK.shape[1], requires_grad=True)
    b_E = torch.zeros(len(W_EK), requires_grad=True)
    solver = torch.optim.LBFGS([W_EK, b_E], max_iter=ROUNDS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        own_NE, other_ME = ((k / size @ W_EK.T + b_E).log_softmax(-1) for k in (x_NK, y_MK))
        total = -(own_NE[allocated_NE].sum() / len(own_NE) + other_ME[:, -at_once:].sum() / len(other_ME)) / at_once
        total = total + DECAY / 2 * W_EK.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    solver.step(loss)  # type: ignore[no-untyped-call]
    W_EK, b_E = W_EK.detach() / size, b_E.detach()
    return W_EK, b_E - W_EK @ mean_K
