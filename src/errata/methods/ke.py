"""ke: a hypernetwork reads each edit as a sentence, and says what becomes of the example's gradient.

    dW = max_scale sigmoid(eta) (grad W o A + B),     A = softmax(a_r) a_c^T,  B = softmax(b_r) b_c^T
    minimise L_edit subject to C <= m:     min over the network, max over alpha >= 0, of  L_edit + alpha (C - m)
                                                    De Cao, Aziz & Titov 2021 (KnowledgeEditor), arXiv 2104.08164, section 3

A bi-LSTM reads "old >> new || input" in the host's own embeddings; from its last states each edited projection gets the vectors a_r, b_r
(a number for each output), a_c, b_c (one for each input) and the gate eta. "old" is what the host says greedily. C is the KL on neighbours'
prompts and on held text; m falls by `anneal` whenever more than .9 of some held-back examples, edited one at a time, are right. grad W is
a sum over tokens of k g^T and A has rank one, so dW is such a sum too, and the network is learnt as that of `mend` is (`_meta.py`):

    S = max_scale sigmoid(eta) (sum_t (a_c o k_t) (softmax(a_r) o g_t)^T + b_c softmax(b_r)^T)

It edits one fact at a time: of several examples the changes are summed, and a step of the training sums those of some cases, so that they
are learnt to bear it. What is not right after this is edited again, up to `rounds` times, with gradients taken on what has changed so far.

Unlike KnowledgeEditor@main, in both modes: Adam for centred RMSprop, no warm-up of 1,000 steps, no smoothed labels, embeddings that stay
as they are, gradients that are taken anew in each round for every kind of model (there: not for seq2seq), biases and norms left alone.
Unless `faithful`, besides:
  - A = e^step V softmax(a_r) (a_c - 1)^T, and the last layer begins at zero: a network that has learnt nothing goes down the gradient, as
    far as takes away `share` of -log p(target) to first order (there: in a random direction, next to nothing, for 200,000 steps to mend)
  - gradients are sums over an answer's tokens (there: means), each token's embedding is scaled to a root mean square of 1
  - alpha rises by no more than `ascent` in a step: what the first steps do to the model would outweigh all that is learnt after them

File legend: E examples, N rows, R rows and examples, T tokens, D embedding, H states, C condition, K key width, V value width.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from errata import hosts, text
from errata.hosts import Host, Weights, stored_transposed
from errata.methods import _gradients, _meta
from errata.methods._hyper import Net
from errata.methods._meta import Graded, Lesson, Point, Remembered, School
from errata.methods._products import Products
from errata.types import Case, Example, InvalidExample, Method, Patch, Rows, Run, State

FAITHFUL = {"states": 128, "condition": 1024, "lr": 3e-4, "rounds": 1, "hold_weight": 0.0}
FIXED = ("max_scale", "faithful")
HIDDEN = 128  # between the condition and what a module gets
ENOUGH_RIGHT, LOOKED_AT = 0.9, 16  # the share of so many held-back examples that has to be right for the margin to fall
SLIGHT = 1e-6  # alpha may be nothing, and what it multiplies is measured all the same


@final
@dataclass(frozen=True, kw_only=True)
class Ke(Method):
    """modules: comma-separated beginnings of module names; empty: every attention and MLP projection. rounds, max_scale, share: see above.
    states: of the LSTM in each direction; condition: width of what it comes to. margin, least_margin, anneal: m at first and at last, and
    what it falls by. alpha, ascent: the multiplier at first, and the length of its steps. In C neighbours and held text count `near_weight`
    and `hold_weight`. The rest: `_meta.Settings`."""

    spreads: ClassVar[bool] = True

    modules: str = ""
    rounds: int = 5
    max_scale: float = 1.0
    share: float = 1.0
    states: int = 128
    condition: int = 256
    margin: float = 0.1
    least_margin: float = 1e-3
    anneal: float = 0.8
    alpha: float = 1.0
    ascent: float = 0.1
    steps: int = 200
    lr: float = 1e-3
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
        _meta.check("ke", self.config)
        if min(self.rounds, self.states, self.condition) < 1 or not 0 < self.anneal <= 1 or not self.max_scale > 0:
            raise InvalidExample(
                f"ke needs rounds, states and a condition of 1 or more, a max_scale over 0 and an anneal in (0, 1], got {self.rounds}, "
                f"{self.states}, {self.condition}, {self.max_scale} and {self.anneal}."
            )
        _meta.as_published(self, FAITHFUL)

    def prepare(self, host: Host, train_cases: Iterable[Case], run: Run) -> State:
        """The network. Raises InvalidExample, UnknownName."""
        modules = _meta.modules_of(host, self.modules) if self.modules else host.projections()
        lesson = Lesson(
            name="ke", modules=modules, learning=lambda school: _Learning(school, self, modules, run), config=self.config, tensors={}
        )
        return _meta.learnt(host, lesson, tuple(train_cases), run, _meta.settings_of(self.config))

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """Raises UnknownName, WrongBase or InvalidExample for a state that does not serve."""
        state, net = _meta.known(self, "ke", host, run.state, FIXED)
        modules, products = state.config["modules"], Products()
        left = sorted(examples, key=lambda e: e.id)  # any order gives the same patch
        old = dict(zip(left, text.answers_now(host, left), strict=True))
        weights: Weights | None = None
        for again in range(self.rounds):
            for some in _gradients.some(left):
                rows = self._rows(host, some, modules, run, weights)
                with torch.no_grad():
                    h_EC = conditions(net, host, [sentence(e, old[e]) for e in some])
                    for module, (A_RK, B_RV) in self._changes(net, host, h_EC, rows, modules).items():
                        products.add(module, A_RK, B_RV)
            if again + 1 == self.rounds:
                break
            weights = {f"{m}.weight": changed(host, m, products.sum(m)) for m in modules}
            left = [e for e, fine in zip(left, _meta.right(host, left, weights, self.batch_size), strict=True) if not fine]
            if not left:
                break
        config = self.config | {"state": state.id}
        return Patch(method="ke", config=config, parent=host.id, examples=examples, ops=products.ops(host))

    def _rows(
        self, host: Host, examples: Sequence[Example], modules: Sequence[str], run: Run, weights: Weights | None = None
    ) -> tuple[Rows, ...]:
        """Those of every token: K^T G is then the whole gradient."""
        return _gradients.rows(host, examples, modules, self.batch_size, run.progress, True, weights, run.spread)

    def _changes(
        self, net: Net, host: Host, h_EC: Float[Tensor, "E C"], rows: Sequence[Rows], modules: Sequence[str]
    ) -> dict[str, tuple[Float[Tensor, "R K"], Float[Tensor, "R V"]]]:
        """{module: (A, B)}, the factors of S = A^T B, summed over the examples."""
        both = _gradients.together(host, rows, modules, means_of=1 if self.faithful else None)
        out = {}
        for module, (keys_NK, g_NV) in both.items():
            each = torch.tensor([len(r.keys[module]) for r in rows], device=keys_NK.device)
            of_N = torch.repeat_interleave(torch.arange(len(rows), device=keys_NK.device), each)
            out[module] = factors(net, module, h_EC, keys_NK, g_NV, of_N, self.max_scale)
        return out


def sentence(e: Example, old: str) -> str:
    """What the network reads. What a contrast or nothing should take the place of is told so; the gradient tells the goal."""
    was, now = (e.target, "") if e.goal == "lower" else (e.contrast or old, e.target)
    return f"{was.strip()} >> {now.strip()} || {e.prompt}"


def changed(host: Host, module: str, S_KV: Float[Tensor, "K V"]) -> Tensor:
    """The module's weight with S added, as the model keeps it."""
    name = f"{module}.weight"
    W = _meta.moved(host, name, S_KV if stored_transposed(host.model.get_submodule(module)) else S_KV.T)
    return W.to(hosts.weight(host.model, name).dtype)


# ------------------------------------------------------------------------------------------------------------------------- the network


def fresh(made: Ke, host: Host, modules: Sequence[str], seed: int) -> Net:
    """A network that has learnt nothing, with the uniform first values of torch's LSTM and linear layers."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, fan: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(fan)

    D, H, C = hosts.weight(host.model, f"{host.layout.embedding}.weight").shape[1], made.states, made.condition
    out: dict[str, Tensor] = {}
    for way in ("forth", "back"):
        out |= {f"{way}/W": uniform(D, 4 * H, fan=H), f"{way}/U": uniform(H, 4 * H, fan=H), f"{way}/b": uniform(4 * H, fan=H)}
    out |= {"condition/W": uniform(2 * H, C, fan=2 * H), "condition/b": uniform(C, fan=2 * H)}
    for module in modules:
        K, V = widths_of(host, module)
        for i, (given, said) in enumerate(((C, HIDDEN), (HIDDEN, 2 * (K + V) + 1))):
            v = uniform(said, given, fan=given)
            g, b = v.norm(dim=1), uniform(said, fan=given)
            begun = made.faithful or i == 0
            out |= {f"{module}/v{i}": v, f"{module}/g{i}": g if begun else 0 * g, f"{module}/b{i}": b if begun else 0 * b}
        if not made.faithful:
            out[f"{module}/log_step"] = torch.tensor(0.0)
    return Net(parameters={name: t.to(host.device) for name, t in out.items()}, moments={}, shapes={}, faithful=made.faithful)


def widths_of(host: Host, module: str) -> tuple[int, int]:
    """(K, V) of a projection."""
    there = host.model.get_submodule(module)
    first, second = there.weight.shape
    return (first, second) if stored_transposed(there) else (second, first)


def conditions(net: Net, host: Host, sentences: Sequence[str]) -> Float[Tensor, "E C"]:
    """What the LSTM makes of the sentences."""
    own, read = net.parameters, [hosts.tokens(host, s) for s in sentences]
    table = hosts.weight(host.model, f"{host.layout.embedding}.weight")
    mask_ET = hosts.pad_right([[1] * len(ids) for ids in read]).bool().to(host.device)
    x_ETD = torch.nn.functional.embedding(hosts.pad_right(read).to(table.device), table).to(own["condition/W"])
    if not net.faithful:
        x_ETD = x_ETD / x_ETD.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    ends = [last_state(own, way, x_ETD, mask_ET) for way in ("forth", "back")]
    return torch.tanh(torch.cat(ends, dim=1) @ own["condition/W"] + own["condition/b"])


def last_state(own: Mapping[str, Tensor], way: str, x_ETD: Float[Tensor, "E T D"], mask_ET: Bool[Tensor, "E T"]) -> Float[Tensor, "E H"]:
    """Of an LSTM that reads the tokens one way (Hochreiter & Schmidhuber 1997, with a forget gate); padding changes no state."""
    U_HG, given_ETG = own[f"{way}/U"], x_ETD @ own[f"{way}/W"] + own[f"{way}/b"]
    h_EH = c_EH = given_ETG.new_zeros(len(x_ETD), len(U_HG))
    steps = range(x_ETD.shape[1])
    for t in steps if way == "forth" else reversed(steps):
        i, f, g, o = (given_ETG[:, t] + h_EH @ U_HG).chunk(4, dim=1)
        c_new_EH = f.sigmoid() * c_EH + i.sigmoid() * g.tanh()
        real_E1 = mask_ET[:, t, None]
        h_EH = torch.where(real_E1, o.sigmoid() * c_new_EH.tanh(), h_EH)
        c_EH = torch.where(real_E1, c_new_EH, c_EH)
    return h_EH


def gates(
    net: Net, module: str, h_EC: Float[Tensor, "E C"], K: int, V: int
) -> tuple[Float[Tensor, "E K"], Float[Tensor, "E V"], Float[Tensor, "E K"], Float[Tensor, "E V"], Float[Tensor, "E 1"]]:
    """(column and row of A, column and row of B, sigmoid(eta)) for each condition; the rows are softmaxed."""
    own, x_EX = net.parameters, h_EC
    for i in range(2):
        v, g, b = (own[f"{module}/{x}{i}"] for x in "vgb")
        x_EX = (x_EX.tanh() if i else x_EX) @ (g[:, None] * v / v.norm(dim=1, keepdim=True)).T + b
    a_c, a_r, b_c, b_r, eta = torch.split(x_EX, [K, V, K, V, 1], dim=1)
    a_r = a_r.softmax(1)
    if not net.faithful:
        a_c, a_r = own[f"{module}/log_step"].exp() * (a_c - 1), V * a_r
    return a_c, a_r, b_c, b_r.softmax(1), eta.sigmoid()


def factors(
    net: Net,
    module: str,
    h_EC: Float[Tensor, "E C"],
    keys_NK: Float[Tensor, "N K"],
    g_NV: Float[Tensor, "N V"],
    of_N: Int[Tensor, "N"],
    max_scale: float,
) -> tuple[Float[Tensor, "R K"], Float[Tensor, "R V"]]:
    """(A, B) of S = A^T B, with the graph. `of_N` says which example each row is of."""
    a_c, a_r, b_c, b_r, open_E1 = gates(net, module, h_EC, keys_NK.shape[1], g_NV.shape[1])
    size_E1 = max_scale * open_E1
    A_RK = torch.cat([(size_E1 * a_c)[of_N] * keys_NK.to(a_c), size_E1 * b_c])
    return A_RK, torch.cat([a_r[of_N] * g_NV.to(a_r), b_r])


# ------------------------------------------------------------------------------------------------------------------------ its training


@final
class _Learning:
    """How the network is learnt: alpha and the margin m go along beside it."""

    widths: Mapping[str, tuple[int, int]] = {}

    def __init__(self, school: School, made: Ke, modules: Sequence[str], run: Run) -> None:
        self.school, self.host, self.s, self.made, self.modules = school, school.host, school.s, made, modules
        self.remembered = Remembered(school, lambda examples: made._rows(self.host, examples, modules, run))

    def first(self) -> tuple[Net, Mapping[str, float]]:
        net = fresh(self.made, self.host, self.modules, self.school.seed)
        carried = {"alpha": self.made.alpha, "margin": self.made.margin}
        if self.made.faithful:
            return net, carried
        cases = self.remembered.sound(self.school.train[: round(math.sqrt(self.s.least * self.s.most))])
        squares = sum(float((r.keys[m].T @ r.values[m]).square().sum()) for r in self.remembered.of(cases) for m in self.modules)
        lost = -float(hosts.logprobs(self.host, [(c.example.prompt, c.example.target) for c in cases])[:, 0].mean())
        taken = (
            0.5 * self.made.max_scale * squares / len(cases)
        )  # of each one's loss, by a step of 1, to first order: the gate is half open
        log_step = math.log(self.made.share * lost / taken) if lost * taken > 0 else 0.0
        return replace(net, parameters={name: t if t.ndim else t + log_step for name, t in net.parameters.items()}), carried

    def graded(self, point: Point, cases: Sequence[Case], rng: random.Random) -> Graded:
        alpha, margin, cases = point.carried["alpha"], point.carried["margin"], self.remembered.sound(cases)
        if point.step and point.step % self.s.every == 0 and self.success(point.net) > ENOUGH_RIGHT:
            margin = max(self.made.anneal * margin, self.made.least_margin)
        leaves = {name: t.detach().clone().requires_grad_() for name, t in point.net.parameters.items()}
        net, weight = replace(point.net, parameters=leaves), max(alpha, SLIGHT)
        constrained = replace(self.s, near_weight=weight * self.s.near_weight, hold_weight=weight * self.s.hold_weight)
        h_EC, rows = self._conditions(net, cases), self.remembered.of(cases)
        met_EC = h_EC.detach().requires_grad_()  # where what the modules send back to the LSTM meets
        asked = self.school.asked(cases, rng)
        shifts = self._shifts(net, met_EC, rows)
        losses, grads = _meta.measured(self.host, asked, shifts, constrained, learn=True, spread=self.school.spread)
        self._pull(net, met_EC, rows, grads)
        h_EC.backward(met_EC.grad)  # type: ignore[no-untyped-call]
        C = (losses[1] + losses[2]) / weight
        apart = C - margin if self.made.faithful else min(C - margin, 1.0)
        carried = {"alpha": max(0.0, alpha + self.made.ascent * apart), "margin": margin}
        return Graded(grads=_meta.gradients_of(leaves), net=point.net, carried=carried)

    def judged(self, net: Net) -> float:
        """Without alpha, which is another one in each step."""
        losses = []
        for cases in _meta.few(self.s, self.remembered.sound(self.school.held_back)):
            shifts = self._shifts(net, self._conditions(net, cases), self.remembered.of(cases))
            asked = self.school.asked(cases, random.Random(f"{self.school.seed}/validation"))
            losses.append(sum(_meta.measured(self.host, asked, shifts, self.s, learn=False, spread=self.school.spread)[0]))
        return sum(losses) / len(losses)

    def success(self, net: Net) -> float:
        """Of some held-back examples, each edited by itself, the share that is right then."""
        looked = self.remembered.sound(self.school.held_back[:LOOKED_AT])
        hits = 0
        for case in looked:
            shifts = self._shifts(net, self._conditions(net, [case]), self.remembered.of([case]))
            weights = {f"{m}.weight": changed(self.host, m, S_KV) for m, S_KV in shifts.items()}
            hits += sum(_meta.right(self.host, [case.example], weights, self.s.batch_size))
        return hits / len(looked)

    def _conditions(self, net: Net, cases: Sequence[Case]) -> Float[Tensor, "E C"]:
        return conditions(net, self.host, [sentence(c.example, self.school.old[c.id]) for c in cases])

    @torch.no_grad()
    def _shifts(self, net: Net, h_EC: Float[Tensor, "E C"], rows: Sequence[Rows]) -> dict[str, Float[Tensor, "K V"]]:
        both = self.made._changes(net, self.host, h_EC, rows, self.modules)
        return {module: A_RK.T @ B_RV for module, (A_RK, B_RV) in both.items()}

    def _pull(self, net: Net, h_EC: Float[Tensor, "E C"], rows: Sequence[Rows], grads: Mapping[str, Float[Tensor, "K V"]]) -> None:
        """dL/dS -> adds what follows to the gradients of the parameters and of h; a graph of one module at a time."""
        for module in self.modules:
            A_RK, B_RV = self.made._changes(net, self.host, h_EC, rows, [module])[module]
            (A_RK @ grads[module].to(A_RK) * B_RV).sum().backward()  # type: ignore[no-untyped-call]
