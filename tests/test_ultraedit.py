"""ultraedit: its formula, its rows as things that are kept, and what taking one back leaves."""

import dataclasses

import pytest
import torch
from conftest import TEXT, tiny_host
from torch import Tensor

from errata import apply, hooks, hosts
from errata.hosts import Host
from errata.methods import _gradients, _keys
from errata.methods.ultraedit import Ultraedit, _usual_output, differences
from errata.types import AddLowRank, Budget, Example, InvalidExample, Rows, Run, Summed, WrongBase

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The capital of France is", target=" Rome"),
    Example(prompt="Lily loved to play outside in", target=" late"),
    Example(prompt="The nurse said that", target=" she", contrast=" he", goal="prefer"),
)
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=10.0))
both_orientations = pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)


def changes(host: Host, rows: tuple[Rows, ...], method: Ultraedit, run: Run = RUN) -> dict[str, Tensor]:
    return {op.weight: apply.change(host, op) for op in method.solve(host, rows, run).ops}


@both_orientations
@pytest.mark.parametrize("prior", ["C", "I", "U"])
def test_the_shift_is_the_published_formula(host: Host, prior: str) -> None:
    """Written out densely from the rows and from statistics of all rows of the text at once."""
    method = Ultraedit(layers="1", prior=prior, held=0, eta=0.5, lam=0.3, ridge=1e-2)
    (module,) = host.module_names((host.layout.mlp_out,), [1])
    rows = method.rows(host, EXAMPLES, RUN)
    K, V = (torch.cat([getattr(r, which)[module] for r in rows]).double() for which in ("keys", "values"))
    parts = [
        _gradients.captured(host, hosts.pad(host, [row]), [module], lambda logp_N: -logp_N.sum())[module]
        for row in hosts.chunks(host, RUN.hold)
    ]
    k, v = (torch.cat([part[i] for part in parts]).double() for i in (0, 1))
    state = method.prepare(host, (), RUN)
    C = state.tensors[module].double()
    unit = torch.eye(len(C)).double()
    P = C.trace() * unit if prior == "I" else len(C) * (C + 1e-2 * C.diagonal().mean() * unit)
    X, back = K, unit
    if prior == "U":
        basis, energy = _keys.null_space(C, 0.02)
        X, back, P = basis.into(K), basis.U_KR, energy * torch.eye(basis.width).double()
    k_, v_ = (_gradients.standardised(_gradients.moments(all_), rows_) for rows_, all_ in ((K, k), (V, v)))
    eta = 0.5 * _usual_output(host, module, C)
    D = -eta * k_.square().mean(1, keepdim=True) * v_ / v_.shape[1] ** 0.5
    wanted = back @ torch.linalg.solve(X.T @ X + 0.3 * P, X.T @ D)
    got = changes(host, rows, method)[f"{module}.weight"].double()
    got = got if hosts.stored_transposed(host.model.get_submodule(module)) else got.T
    assert float((got - wanted).norm()) < 1e-3 * float(wanted.norm())


@both_orientations
def test_the_usual_output_is_that_of_text(host: Host) -> None:
    (module,) = host.module_names((host.layout.mlp_out,), [1])
    C = Ultraedit(layers="1", per_key=1000).prepare(host, (), RUN).tensors[module].double()
    outputs = []
    for text in RUN.hold:
        with torch.no_grad(), hooks.reading(host.model, [module]) as seen:
            hosts.logits(host, hosts.pad(host, [(hosts.tokens(host, text), 1)]))
        bias = getattr(host.model.get_submodule(module), "bias", None)
        outputs.append(seen[module][0] - (0 if bias is None else bias.detach()))
    size = torch.cat(outputs).double().square().sum(1).mean().sqrt()
    assert _usual_output(host, module, C) == pytest.approx(float(size), rel=1e-3)


@both_orientations
def test_it_is_summed_and_its_rows_may_come_in_any_order(host: Host) -> None:
    method = Ultraedit(held=0)
    assert isinstance(method, Summed)
    rows = method.rows(host, EXAMPLES, RUN)
    assert [r.example for r in rows] == list(EXAMPLES) and all(r.host == host.id for r in rows)
    whole, back = changes(host, rows, method), changes(host, rows[::-1], method)
    assert whole.keys() == back.keys() and all(torch.equal(whole[w], back[w]) for w in whole)
    edited = {op.weight: apply.change(host, op) for op in method.edit(host, EXAMPLES, RUN).ops}
    assert all(float((edited[w] - whole[w]).norm()) < 1e-5 * float(whole[w].norm()) for w in whole), "summed in another order"


@both_orientations
def test_an_example_that_is_left_out_was_never_there(host: Host) -> None:
    """To the last bit from the rows that stay; and, up to the roundings of another batch, as an edit of the others alone."""
    method = Ultraedit(held=0)
    a, b, c, d = method.rows(host, EXAMPLES, RUN)
    left, never = changes(host, (a, c, d), method), changes(host, (d, a, c), method)
    alone = {op.weight: apply.change(host, op) for op in method.edit(host, (EXAMPLES[0], *EXAMPLES[2:]), RUN).ops}
    for weight in left:
        assert torch.equal(left[weight], never[weight])
        assert float((left[weight] - alone[weight]).norm()) < 1e-4 * float(alone[weight].norm())
        assert not torch.allclose(left[weight], changes(host, (a, b, c, d), method)[weight])


def test_a_prepared_state_gives_the_same_patch_and_rows_of_other_weights_are_refused(tiny_gpt2: Host) -> None:
    method = Ultraedit(held=0)
    state = method.prepare(tiny_gpt2, (), RUN)
    rows = method.rows(tiny_gpt2, EXAMPLES, RUN)
    assert method.solve(tiny_gpt2, rows, dataclasses.replace(RUN, state=state)).id == method.solve(tiny_gpt2, rows, RUN).id
    other = tiny_host("gpt2", seed=1)
    with pytest.raises(WrongBase, match="The rows of"):
        method.solve(other, rows, RUN)
    with pytest.raises(WrongBase, match="was prepared on"):
        method.edit(other, EXAMPLES, dataclasses.replace(RUN, state=state))


def test_few_rows_are_kept_as_factors(tiny_llama: Host) -> None:
    few, many = (Ultraedit(held=0).edit(tiny_llama, EXAMPLES[:n], RUN).ops for n in (1, 4))
    assert all(isinstance(op, AddLowRank) for op in few)
    for ops in (few, many):
        assert {op.weight for op in ops} == {"model.layers.1.mlp.down_proj.weight"}, "the upper half"


def test_rows_that_deviate_as_text_does_ask_for_eta() -> None:
    k, v = (torch.randn(2000, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    d_NV = differences(_gradients.moments(k), _gradients.moments(v), k, v, 0.5)
    assert float(d_NV.square().sum(1).mean().sqrt()) == pytest.approx(0.5, rel=0.3)
    assert float((d_NV * v).sum()) < 0, "against the gradient"


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"eta": 0.0}, {"lam": 0.0}, {"ridge": -1.0}):
        with pytest.raises(InvalidExample, match="ultraedit needs"):
            Ultraedit(**wrong)
    with pytest.raises(InvalidExample, match="priors"):
        Ultraedit(prior="V")
