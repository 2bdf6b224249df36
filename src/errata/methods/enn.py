"""enn: the model itself is learnt anew, so that a step of gradient descent on a few of its weights edits it and little else.

    theta' = theta - sum_l alpha_l grad_l L(theta; x_e, y_e)
    (theta, alpha) = argmin  E [ L(theta'; x'_e, y_e) + KL(theta || theta') + base KL(theta0 || theta) ],  KL on what should stay
                                     Sinitsin et al. 2020 (editable neural networks), arXiv 2004.00345, equations 1 to 4; with the KL terms
                                     of Mitchell et al. 2022 (MEND), arXiv 2110.11309, appendix

theta0 are the model's weights, theta begins there, x' are other ways to ask (`_meta.py`). All chosen weights are learnt, the step moves
the projections of some modules, and each of these has an alpha of its own. The state holds theta - theta0. A patch is made for theta0, so
it is the whole way, (theta - theta0) and the steps: what the new base costs is the edit's cost, and is judged with it. Where a patch of
the same state is on already, theta is there, as far as the gate let it, and the next patch is its steps alone.

An edit takes steps until its examples are right, at most `rounds`, each with the gradient of those that are not. The gradient that goes
back to theta takes theta' for theta and a constant (Finn, Abbeel & Levine 2017, arXiv 1703.03400, section 5.2), unless `second_order`:
then it is exact, through the Hessian of the step's loss times a vector, for about a tenth more time.

Unlike mend@e04fdb9, in both modes, theta - theta0 is what Adam moves, whole in float32, and what has no gradient stays as it is. Unless
`faithful`, besides:
  - the step goes down the sum of the examples' losses (there: the mean, so that each of ten edits moves a tenth as far)
  - alpha is kept as a logarithm, and begins where a step takes away `share` of the loss to first order (there: .01)
  - the gradient is first-order, rates and weights are those of hundreds of steps; held text is held still besides the neighbours' answers

File legend: none; tensors have the shapes of the weights.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from errata import hosts
from errata.hosts import Host, Weights
from errata.methods import _meta
from errata.methods._descend import ENOUGH
from errata.methods._hyper import Net
from errata.methods._meta import Asked, Graded, Lesson, Point, School, Settings
from errata.methods.finetune import chosen
from errata.types import Add, Case, Example, InvalidExample, Method, Patch, Run, Spread, State

FAITHFUL = {"weights": "all", "rounds": 1, "second_order": True, "lr": 1e-5, "rate": 1e-3, "near_weight": 10.0, "hold_weight": 0.0}
FIXED = ("weights", "faithful")
ALPHA = 1e-2  # the published one


@final
@dataclass(frozen=True, kw_only=True)
class Enn(Method):
    """modules: comma-separated beginnings of names of the modules that a step moves; empty: the projections of all MLPs. weights: what is
    learnt, as `modules` of `finetune`. rounds, second_order, share: see above. base: what the cost of the new base weighs, of that of an
    edit. The rest: `_meta.Settings`."""

    spreads: ClassVar[bool] = True

    modules: str = ""
    weights: str = "all"
    rounds: int = 5
    second_order: bool = False
    share: float = 1.0
    base: float = 1.0
    steps: int = 60
    lr: float = 1e-4
    rate: float = 3e-2
    least: int = 1
    most: int = 16
    asked: int = 2
    near: int = 32
    near_weight: float = 1.0
    hold: int = 16
    hold_weight: float = 10.0
    every: int = 20
    patience: int = 6
    clip: float = 1.0
    batch_size: int = 64
    faithful: bool = False

    def __post_init__(self) -> None:
        _meta.check("enn", self.config)
        if self.rounds < 1 or not self.base >= 0:
            raise InvalidExample(f"enn needs 1 round or more and a base of 0 or more, got {self.rounds} and {self.base}.")
        _meta.as_published(self, FAITHFUL)

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """theta - theta0, and alpha. Raises InvalidExample, UnknownName."""
        modules = _meta.modules_of(host, self.modules) if self.modules else host.projections("mlp_in", "mlp_out")
        lesson = Lesson(
            name="enn", modules=modules, learning=lambda school: _Learning(school, self, modules), config=self.config, tensors={}
        )
        return _meta.learnt(host, lesson, tuple(train_cases), run, _meta.settings_of(self.config))

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """Raises UnknownName, WrongBase or InvalidExample for a state that does not serve."""
        state, net = _meta.known(self, "enn", host, run.state, FIXED)
        there = any(worn.patch.method == "enn" and worn.patch.config.get("state") == state.id for worn in host.worn)
        modules, deltas = state.config["modules"], {} if there else theta(net)
        left = sorted(examples, key=lambda e: e.id)  # any order gives the same patch
        for _ in range(self.rounds):
            grads = gradient(host, left, deltas, modules, _meta.settings_of(self.config), run.spread)
            for name, step in stepped(net, grads).items():
                deltas[name] = deltas[name] + step if name in deltas else step
            now = {name: _meta.moved(host, name, d).to(hosts.weight(host.model, name).dtype) for name, d in deltas.items()}
            left = [e for e, fine in zip(left, _meta.right(host, left, now, self.batch_size), strict=True) if not fine]
            if not left:
                break
        ops = tuple(Add(weight=name, delta=d.float().cpu().contiguous()) for name, d in deltas.items())
        return Patch(method="enn", config=self.config | {"state": state.id}, parent=host.id, examples=examples, ops=ops)


def theta(net: Net) -> dict[str, Tensor]:
    """What is added to each weight that is learnt."""
    return {name.removeprefix("theta/"): t for name, t in net.parameters.items() if name.startswith("theta/")}


def alpha(net: Net, name: str) -> Tensor:
    return net.parameters[f"{name}/alpha"] if net.faithful else net.parameters[f"{name}/log_alpha"].exp()


def stepped(net: Net, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step adds to each of these weights."""
    return {name: -alpha(net, name) * g for name, g in grads.items()}


def gradient(
    host: Host, examples: Sequence[Example], deltas: Mapping[str, Tensor], modules: Sequence[str], s: Settings, spread: Spread
) -> dict[str, Tensor]:
    """{weight: what the step goes against} of the modules, with `deltas` on: the gradient of the examples' summed loss."""
    own = Asked(prompts=[(e.prompt, e) for e in examples], near=[], held=[])
    names = [f"{m}.weight" for m in modules]
    zero = {name: torch.zeros((), device=host.device) for name in names}  # what is not learnt is moved all the same
    _, grads = _meta.weighed(host, own, zero | dict(deltas), s, learn=names, spread=spread)
    return {name: g * (1 if s.faithful else len(examples)) for name, g in grads.items()}


# ------------------------------------------------------------------------------------------------------------------------ its training


@final
class _Learning:
    """How theta and alpha are learnt."""

    widths: Mapping[str, tuple[int, int]] = {}

    def __init__(self, school: School, made: Enn, modules: Sequence[str]) -> None:
        self.school, self.host, self.s, self.made, self.modules = school, school.host, school.s, made, modules

    def first(self) -> tuple[Net, Mapping[str, float]]:
        host, s = self.host, self.s
        names = [f"{m}.weight" for m in self.modules]
        out = {f"theta/{n}": torch.zeros_like(hosts.weight(host.model, n), dtype=torch.float32) for n in chosen(host, self.made.weights)}
        first = ALPHA
        if not self.made.faithful:
            examples = [c.example for c in self.school.train[: round(math.sqrt(s.least * s.most))]]
            own = Asked(prompts=[(e.prompt, e) for e in examples], near=[], held=[])
            lost = len(examples) * _meta.weighed(host, own, {}, s, learn=())[0][0]
            squares = sum(float(g.square().sum()) for g in gradient(host, examples, {}, self.modules, s, self.school.spread).values())
            first = math.log(self.made.share * lost / squares) if lost * squares > 0 else math.log(ALPHA)
        kind = "alpha" if self.made.faithful else "log_alpha"
        out |= {f"{name}/{kind}": torch.tensor(first, device=host.device) for name in names}
        return Net(parameters=out, moments={}, shapes={}, faithful=self.made.faithful), {}

    def graded(self, point: Point, cases: Sequence[Case], rng: random.Random) -> Graded:
        host, s, net, spread = self.host, self.s, point.net, self.school.spread
        asked, here, examples = self.school.asked(cases, rng), theta(net), [c.example for c in cases]
        down = gradient(host, examples, here, self.modules, s, spread)
        there = here | {name: here[name] + step if name in here else step for name, step in stepped(net, down).items()}
        _, grads = _meta.weighed(host, asked, there, s, learn=list(there), against=here, spread=spread)
        found = {f"theta/{name}": grads[name] for name in here}
        for name, g in down.items():
            a = alpha(net, name)
            slope = -(grads[name] * g).sum()
            found[f"{name}/alpha" if net.faithful else f"{name}/log_alpha"] = slope if net.faithful else a * slope
        if self.made.second_order:
            turned = curved(host, examples, here, {name: alpha(net, name) * grads[name] for name in down}, s)
            found |= {f"theta/{name}": found[f"theta/{name}"] - h for name, h in turned.items()}
        if self.made.base:
            _, costs = _meta.weighed(host, replace(asked, prompts=[]), here, s, learn=list(here), spread=spread)
            found |= {f"theta/{name}": found[f"theta/{name}"] + self.made.base * c for name, c in costs.items()}
        return Graded(grads=found, net=net, carried={})

    def judged(self, net: Net) -> float:
        """All of it together, after one step: what should stay is compared with the model's own weights, as an edit is judged."""
        losses, here = [], theta(net)
        for cases in _meta.few(self.s, self.school.held_back):
            down = gradient(self.host, [c.example for c in cases], here, self.modules, self.s, self.school.spread)
            there = here | {name: here[name] + step if name in here else step for name, step in stepped(net, down).items()}
            asked = self.school.asked(cases, random.Random(f"{self.school.seed}/validation"))
            losses.append(sum(_meta.weighed(self.host, asked, there, self.s, learn=(), spread=self.school.spread)[0]))
        return sum(losses) / len(losses)


def curved(
    host: Host, examples: Sequence[Example], deltas: Mapping[str, Tensor], direction: Mapping[str, Tensor], s: Settings
) -> dict[str, Tensor]:
    """{weight: its part of H v}: H is the Hessian of what a step goes down, v = `direction` over the weights that it moves."""
    still = {name: w.detach() for name, w in host.model.named_parameters()}
    zero = {name: torch.zeros_like(v) for name, v in direction.items()}
    leaves = {name: _meta.moved(host, name, d).requires_grad_() for name, d in (zero | dict(deltas)).items()}
    own = Asked(prompts=[(e.prompt, e) for e in examples], near=[], held=[])
    out = {name: torch.zeros_like(leaves[name]) for name in deltas}

    def weights() -> Weights:
        return still | {name: leaf.to(still[name].dtype) for name, leaf in leaves.items()}

    for batch in _meta.batched(host, own, s):
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attentions are differentiable once
            total = _meta.goal_sum(host, batch, weights, 0.0 if s.faithful else ENOUGH)
            down = torch.autograd.grad(total / (batch.of if s.faithful else 1), [leaves[name] for name in direction], create_graph=True)
            along = torch.stack([(g * direction[name]).sum() for g, name in zip(down, direction, strict=True)]).sum()
            found = torch.autograd.grad(along, [leaves[name] for name in deltas], allow_unused=True, materialize_grads=True)
        out = {name: out[name] + h for name, h in zip(deltas, found, strict=True)}
    return out
