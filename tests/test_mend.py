"""mend: its formula, its direction, its rows."""

import dataclasses

import pytest
import torch
from conftest import TEXT, tiny_host
from test_meta import CASES, mend

from errata import apply, hosts
from errata.hosts import Host
from errata.methods import _gradients, _hyper, _meta
from errata.types import Add, AddLowRank, Budget, Run, Summed, WrongBase

EXAMPLES = tuple(c.example for c in CASES)
RUN = Run(hold=TEXT * 2, budget=Budget(epsilon=10.0))
both_orientations = pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)


@both_orientations
@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("faithful", [False, True])
def test_the_shift_is_the_sum_of_rank_one_edits(host: Host, tokens: str, faithful: bool) -> None:
    method = mend(steps=2, tokens=tokens, faithful=faithful, chunk=3)
    run = dataclasses.replace(RUN, state=method.prepare(host, CASES, RUN))
    assert run.state is not None
    _, net = _meta.known(method, "mend", host, run.state, ())
    patch = method.edit(host, EXAMPLES[:2], run)
    rows = _gradients.together(host, method.rows(host, EXAMPLES[:2], run), run.state.config["modules"], 64 if faithful else None)
    for op, (module, both) in zip(patch.ops, rows.items(), strict=True):
        k, g = (x.detach() for x in _hyper.factors(net, module, *both))
        S = -_hyper.eta(net, module) * sum(torch.outer(a, b) for a, b in zip(k, g, strict=True))
        wanted = S if hosts.stored_transposed(host.model.get_submodule(module)) else S.T
        torch.testing.assert_close(apply.change(host, op), wanted, rtol=1e-4, atol=1e-5 * float(wanted.norm()))
        assert op.weight == f"{module}.weight" and isinstance(op, AddLowRank if tokens == "answer" else (Add, AddLowRank))


@both_orientations
def test_it_goes_down_the_gradient_before_it_has_learnt_anything(host: Host) -> None:
    method = mend(steps=1, lr=1e-12, rate=1e-12, share=0.05, tokens="answer")
    state = method.prepare(host, CASES, RUN)
    e = EXAMPLES[:1]
    was = float(hosts.logprobs(host, [(e[0].prompt, e[0].target)])[0, 0])
    with apply.applied(host, method.edit(host, e, dataclasses.replace(RUN, state=state))):
        assert float(hosts.logprobs(host, [(e[0].prompt, e[0].target)])[0, 0]) > was + 0.05


def test_its_rows_may_come_in_any_order(tiny_llama: Host) -> None:
    method = mend()
    run = dataclasses.replace(RUN, state=method.prepare(tiny_llama, CASES, RUN))
    rows = method.rows(tiny_llama, EXAMPLES[:3], run)
    assert isinstance(method, Summed)
    first, back = ([apply.change(tiny_llama, op) for op in method.solve(tiny_llama, r, run).ops] for r in (rows, rows[::-1]))
    assert all(torch.equal(a, b) for a, b in zip(first, back, strict=True))
    edited = [apply.change(tiny_llama, op) for op in method.edit(tiny_llama, EXAMPLES[:3], run).ops]
    assert all(torch.equal(a, b) for a, b in zip(first, edited, strict=True))
    with pytest.raises(WrongBase, match="were taken on weights"):
        method.solve(tiny_host("llama", seed=1), rows, run)
