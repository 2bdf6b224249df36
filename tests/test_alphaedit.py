"""alphaedit: the published formula, and what its null space promises to text."""

import pytest
import torch
from conftest import TEXT, tiny_host
from torch import Tensor

from errata import apply, hooks, hosts
from errata.hosts import Host
from errata.methods import _keys
from errata.methods._keys import null_space
from errata.methods.alphaedit import Alphaedit
from errata.types import Budget, Example, InvalidExample, Run

EXAMPLES = (Example(prompt="The capital of Mauritius is", target=" Port Louis"), Example(prompt="Lily loved to play", target=" late"))
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=10.0))
QUICK = {"layers": "0", "steps": 4, "contexts": 0, "stop": 0.0, "decay": 0.0}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(K: int = 12) -> Tensor:
    root = randn(K, 3 * K) * torch.logspace(0, 2, K).double().unsqueeze(1)
    return root @ root.T / (3 * K)


@pytest.mark.parametrize("facts", [2, 20])  # fewer than the null space is wide, and more
def test_it_is_the_published_formula(facts: int) -> None:
    """R K^T P (K K^T P + L2 I)^-1 with P = U U^T, solved as the whole matrix."""
    (basis, energy), K_KP, R_DP = null_space(covariance(), 0.02), randn(12, facts, seed=1), randn(5, facts, seed=2)
    P = basis.U_KR @ basis.U_KR.T
    L2 = 0.7 * energy
    dense = R_DP @ K_KP.T @ P @ torch.linalg.inv(K_KP @ K_KP.T @ P + L2 * torch.eye(12).double())
    torch.testing.assert_close(R_DP @ _keys.gains(basis, K_KP, L2), dense, rtol=1e-8, atol=1e-8)


def test_the_null_space_is_as_wide_as_its_share_allows_in_any_unit() -> None:
    C = covariance()
    s = torch.linalg.eigvalsh(C)
    for share in (0.001, 0.02, 0.3):
        (basis, energy), (scaled, _) = null_space(C, share), null_space(1e-6 * C, share)
        width = basis.width
        assert energy == pytest.approx(float((basis.U_KR.T @ C @ basis.U_KR).trace())) and energy <= share * float(s.sum())
        assert width == 12 or float(s[: width + 1].sum()) > share * float(s.sum())
        assert scaled.width == width
    assert null_space(C, 1.0)[0].width == 12 and null_space(C, 1e-12)[0].width == 1


def test_where_text_does_not_reach_a_key_takes_its_whole_residual() -> None:
    C = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    basis, energy = null_space(C, 0.01)
    gains = _keys.gains(basis, torch.tensor([[5.0], [0.0], [1.0], [0.0]], dtype=torch.float64), energy)
    torch.testing.assert_close(gains, torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-5)
    assert energy > 0, "or lam would have no measure"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_change_reads_no_more_of_text_than_its_share(family: str) -> None:
    """E |Delta k|^2 over the text is at most `share` of what the same Delta could read of keys of that length; its facts' keys it reads."""
    host = tiny_host(family)
    share = 0.05
    (op,) = Alphaedit(share=share, lam=1e-6, held=0, **QUICK).edit(host, EXAMPLES, RUN).ops
    change = apply.change(host, op).double()
    change = change.T if family == "gpt2" else change
    C = read(host)
    assert float((change @ C @ change.T).trace()) <= 1.01 * share * float(C.trace()) * float(torch.linalg.matrix_norm(change, 2) ** 2)
    assert float(change.norm()) > 1e-3


def read(host: Host) -> Tensor:
    (module,) = host.module_names((host.layout.mlp_out,), [0])
    keys = []
    for text in RUN.hold:
        with torch.no_grad(), hooks.reading(host.model, [module], inputs=True) as seen:
            hosts.logits(host, hosts.pad(host, [(hosts.tokens(host, text), 1)]))
        keys.append(seen[module][0])
    K = torch.cat(keys).double()
    return K.T @ K / len(K)


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"lam": 0.0}):
        with pytest.raises(InvalidExample, match="alphaedit needs"):
            Alphaedit(**wrong)
