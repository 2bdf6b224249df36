"""Sums of outer products: the same sum as factors and as their product, in either orientation."""

import pytest
import torch
from conftest import tiny_host

from errata import apply, hosts
from errata.methods._products import Products
from errata.methods.ke import widths_of
from errata.types import Add, AddLowRank


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_factors_and_their_product_are_one_change(family: str) -> None:
    host = tiny_host(family)
    few, many = host.projections("mlp_in")[0], host.projections("mlp_out")[0]
    products, draw = Products(), torch.Generator().manual_seed(0)
    wanted = {}
    for module, rows in ((few, (1, 2)), (many, (9, 40, 2))):
        K, V = widths_of(host, module)
        for n in rows:
            A, B = torch.randn(n, K, generator=draw), torch.randn(n, V, generator=draw)
            products.add(module, A, B)
            wanted[module] = wanted.get(module, 0) + A.T @ B
    low, dense = products.ops(host)
    assert isinstance(low, AddLowRank) and low.A.shape == (3, 32) and isinstance(dense, Add)
    for op, module in ((low, few), (dense, many)):
        turned = hosts.stored_transposed(host.model.get_submodule(module))
        torch.testing.assert_close(apply.change(host, op), wanted[module] if turned else wanted[module].T)
        torch.testing.assert_close(products.sum(module), wanted[module])
