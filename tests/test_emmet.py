"""emmet: the published formula; its kinship with memit and rome; the slack that the budget asks for."""

import dataclasses

import pytest
import torch
from conftest import TEXT, tiny_host

from errata import apply, hosts
from errata.hosts import Host
from errata.methods import _keys, _values
from errata.methods._normal import Whitened
from errata.methods.emmet import Emmet
from errata.methods.memit import Memit
from errata.methods.rome import Rome
from errata.types import Budget, Example, InvalidExample, Run

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The capital of France is", target=" Rome"),
    Example(prompt="Lily loved to play outside in", target=" late"),
)
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=10.0))
QUICK = {"layers": "0", "steps": 4, "contexts": 0, "stop": 0.0, "decay": 0.0}


def key_and_factor(host: Host) -> tuple[torch.Tensor, torch.Tensor]:
    found = _values.places(host, EXAMPLES, [])
    (module,) = host.module_names((host.layout.mlp_out,), [0])
    key_PK, _ = _keys.averaged(host, found, module, f"{host.layout.blocks}.0", {})
    own, _ = _keys.priors(host, Emmet(layers="0").prepare(host, (), RUN), [0], "C", 1e-3)[0]
    assert isinstance(own, Whitened)
    return key_PK, own.L_KK.tril()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_the_published_formula_and_that_of_memit_in_other_units(family: str) -> None:
    """(V - W K) (K^T C^-1 K + slack I)^-1 K^T C^-1 and R K^T (lam C + K K^T)^-1."""
    host = tiny_host(family)
    key_PK, L = key_and_factor(host)
    slack = 0.3 * _keys.mean_energy(Whitened(L_KK=L), key_PK.T)
    inverse = torch.linalg.inv(L @ L.T)
    (op,) = Emmet(slack=0.3, held=0, **QUICK).edit(host, EXAMPLES, RUN).ops
    (same,) = Memit(lam=slack / len(L), held=0, **QUICK).edit(host, EXAMPLES, RUN).ops
    wanted = torch.linalg.inv(key_PK @ inverse @ key_PK.T + slack * torch.eye(3).double()) @ key_PK @ inverse
    torch.testing.assert_close(op.A.double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(apply.change(host, op), apply.change(host, same), rtol=1e-4, atol=1e-6)


def test_with_little_slack_it_is_rome_for_several(tiny_gpt2: Host) -> None:
    (a,), (b,) = (made.edit(tiny_gpt2, EXAMPLES, RUN).ops for made in (Emmet(slack=1e-3, held=0, **QUICK), Rome(slack=1e-3, **QUICK)))
    assert torch.equal(apply.change(tiny_gpt2, a), apply.change(tiny_gpt2, b))


def test_the_slack_rises_until_the_budget_is_kept(tiny_llama: Host) -> None:
    method = Emmet(slack=1e-3, **{**QUICK, "steps": 8}, lr=0.5, clamp=4.0)
    still = hosts.chunks(tiny_llama, _values.quiet(tiny_llama, EXAMPLES, RUN, method.held))
    before_N2 = hosts.score(tiny_llama, still)

    def cost(made: Emmet, epsilon: float) -> float:
        with apply.applied(tiny_llama, made.edit(tiny_llama, EXAMPLES, dataclasses.replace(RUN, budget=Budget(epsilon=epsilon)))):
            return hosts.increase(before_N2, hosts.score(tiny_llama, still))[0]

    free = cost(dataclasses.replace(method, held=0), 10.0)
    assert free > 1e-3, "or there would be nothing to keep"
    assert 0.5 * free / 4 < cost(method, free / 4) <= free / 4


def test_one_layer_and_settings_that_can_be(tiny_gpt2: Host) -> None:
    with pytest.raises(InvalidExample, match="emmet rewrites one layer"):
        Emmet(layers="0-1").edit(tiny_gpt2, EXAMPLES, RUN)
    for wrong in ({"slack": 0.0}, {"ridge": -1.0}):
        with pytest.raises(InvalidExample, match="emmet needs"):
            Emmet(**wrong)
