"""Activations are read and shifted inside the block only."""

import pytest
import torch
from conftest import FAMILIES, same_bits, weights_of
from torch import Tensor, nn

from errata import hooks
from errata.hosts import Host, encode, logits, pad, stored_transposed
from errata.types import UnknownName

every_family = pytest.mark.parametrize("host", FAMILIES, indirect=True)


def says(host: Host) -> Tensor:
    return logits(host, pad(host, [encode(host, "The capital of Mauritius is", " Port Louis"), encode(host, "Paris", " is")]))


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def every_part(host: Host) -> list[str]:
    layout = host.layout
    return host.module_names([*layout.attention_in, layout.attention_out, *layout.mlp_in, layout.mlp_out])


@every_family
def test_what_is_read_is_what_went_in_and_came_out(host: Host) -> None:
    names, before = every_part(host), weights_of(host)
    with torch.no_grad(), hooks.reading(host.model, names) as out, hooks.reading(host.model, names, inputs=True) as into:
        said = says(host)
    assert out.keys() == into.keys() == set(names) and all(x.ndim == 3 for x in (*out.values(), *into.values()))
    for name in names:
        assert out[name].shape[:2] == into[name].shape[:2] == said.shape[:2]
        with torch.no_grad():
            assert torch.equal(host.model.get_submodule(name)(into[name]), out[name])
    assert hook_count(host.model) == 0 and same_bits(host, before)


@every_family
def test_blocks_and_attention_are_read_whatever_they_are_called_with(host: Host) -> None:
    block = f"{host.layout.blocks}.1"
    attention = f"{block}.{host.layout.attention_out.rpartition('.')[0]}"
    with torch.no_grad(), hooks.reading(host.model, [block, attention]) as out, hooks.reading(host.model, [block, attention], True) as into:
        said = says(host)
    for seen in (out, into):  # some call attention with hidden_states=, some return tuples
        assert all(seen[name].shape == (*said.shape[:2], 32) for name in (block, attention))


def test_the_latest_pass_is_the_one_that_is_held(tiny_gpt2: Host) -> None:
    name = "transformer.h.0.mlp"
    with torch.no_grad(), hooks.reading(tiny_gpt2.model, [name]) as seen:
        assert seen == {}
        says(tiny_gpt2)
        first = seen[name]
        logits(tiny_gpt2, pad(tiny_gpt2, [([1, 2, 3], 1)]))
        assert seen[name] is not first and seen[name].shape == (1, 3, 32)
    says(tiny_gpt2)
    assert seen[name].shape == (1, 3, 32), "after the block nothing is written"


@every_family
def test_what_is_read_is_part_of_the_graph(host: Host) -> None:
    name = host.module_names([host.layout.mlp_out], [0])[0]
    weight = host.model.get_submodule(name).weight
    with hooks.reading(host.model, [name]) as out, hooks.reading(host.model, [name], inputs=True) as into:
        loss = says(host).logsumexp(-1).sum()
    gradient_NTD, of_weight = torch.autograd.grad(loss, [out[name], weight])
    assert gradient_NTD.shape == out[name].shape and gradient_NTD.abs().sum() > 0
    factors = torch.einsum("nto,nti->oi", gradient_NTD, into[name])  # what MEND and MALMEN live on: the gradient is a sum of u dᵀ
    assert torch.allclose(factors.T if stored_transposed(host.model.get_submodule(name)) else factors, of_weight, atol=1e-3)


@every_family
def test_a_shift_replaces_the_output_inside_the_block(host: Host) -> None:
    name = host.module_names([host.layout.mlp_out], [0])[0]
    with torch.no_grad():
        plain = says(host)
        with hooks.reading(host.model, [name]) as before, hooks.shifting(host.model, {name: lambda x: x}):
            assert torch.equal(says(host), plain)
        with hooks.shifting(host.model, {name: lambda x: x + torch.linspace(-1, 1, 32)}), hooks.reading(host.model, [name]) as after:
            assert not torch.allclose(says(host), plain, atol=1e-3)
        assert torch.allclose(after[name], before[name] + torch.linspace(-1, 1, 32), atol=1e-5)
        assert torch.equal(says(host), plain) and hook_count(host.model) == 0


@every_family
def test_a_shift_of_a_block_or_attention_keeps_what_else_it_returns(host: Host) -> None:
    block = f"{host.layout.blocks}.0"
    attention = f"{block}.{host.layout.attention_out.rpartition('.')[0]}"
    with torch.no_grad():
        plain = says(host)
        for name in (block, attention):
            with hooks.shifting(host.model, {name: lambda x: x + torch.linspace(-1, 1, 32)}):
                said = says(host)
            assert said.shape == plain.shape and not torch.allclose(said, plain, atol=1e-3)
        assert torch.equal(says(host), plain)


def test_a_gradient_flows_through_a_shift(tiny_gpt2: Host) -> None:
    shift = torch.zeros(32, requires_grad=True)
    with hooks.shifting(tiny_gpt2.model, {"transformer.h.0.mlp.c_proj": lambda x: x + shift}):
        loss = says(tiny_gpt2).logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(loss, shift)
    assert gradient.abs().sum() > 0


@every_family
def test_a_shift_at_one_token_moves_what_comes_after_it_only(host: Host) -> None:
    name = host.module_names([host.layout.mlp_out], [0])[0]

    def at_third_of_first(x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD.clone()
        x_NTD[0, 2] += torch.linspace(-1, 1, 32)
        return x_NTD

    with torch.no_grad():
        plain = says(host)
        with hooks.shifting(host.model, {name: at_third_of_first}):
            said = says(host)
    assert torch.allclose(said[1:], plain[1:], atol=1e-5) and torch.allclose(said[0, :2], plain[0, :2], atol=1e-5)
    assert not torch.allclose(said[0, 2], plain[0, 2], atol=1e-3)


def test_several_shifts_each_with_its_own(tiny_gpt2: Host) -> None:
    names = tiny_gpt2.module_names(["mlp.c_proj"])
    with torch.no_grad():
        with (
            hooks.shifting(tiny_gpt2.model, {n: (lambda x, i=i: x * i) for i, n in enumerate(names)}),
            hooks.reading(tiny_gpt2.model, names) as seen,
        ):
            says(tiny_gpt2)
        assert not seen[names[0]].any() and seen[names[1]].any()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_hooks_are_gone_also_when_the_body_raises(tiny_gpt2: Host, error: type[BaseException]) -> None:
    names = every_part(tiny_gpt2)
    with pytest.raises(error), hooks.reading(tiny_gpt2.model, names), hooks.shifting(tiny_gpt2.model, {n: torch.zeros_like for n in names}):
        assert hook_count(tiny_gpt2.model) >= 2 * len(names)
        raise error
    assert hook_count(tiny_gpt2.model) == 0


def test_the_hooks_are_gone_also_when_a_shift_raises(tiny_gpt2: Host) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooks.shifting(tiny_gpt2.model, {"transformer.h.1": fails}):
        says(tiny_gpt2)
    assert hook_count(tiny_gpt2.model) == 0


def test_an_unknown_module_suggests_the_nearest_and_leaves_no_hook(tiny_gpt2: Host) -> None:
    good, bad = "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_prj"
    told = f"Unknown module '{bad}'. Did you mean {good}"
    with pytest.raises(UnknownName, match=told), hooks.reading(tiny_gpt2.model, [good, bad]):
        raise AssertionError("the body must not run")
    assert hook_count(tiny_gpt2.model) == 0
    with pytest.raises(UnknownName, match=told), hooks.shifting(tiny_gpt2.model, {good: torch.zeros_like, bad: torch.zeros_like}):
        raise AssertionError("the body must not run")
    assert hook_count(tiny_gpt2.model) == 0
    with pytest.raises(UnknownName, match=told):
        hooks.module(tiny_gpt2.model, bad)
    assert hooks.module(tiny_gpt2.model, good) is tiny_gpt2.model.transformer.h[0].mlp.c_proj


@every_family
def test_a_pass_that_was_cut_in_two_is_the_whole_pass(host: Host) -> None:
    """Up to the first block, and on from there: also where blocks return tuples. Nothing is left behind, and what was cut did not run."""
    block, above, whole = f"{host.layout.blocks}.0", f"{host.layout.blocks}.1", says(host)
    with torch.no_grad(), hooks.reading(host.model, [above]) as seen, hooks.recording(host.model, block) as kept:
        says(host)
    assert seen == {} and len(kept) == 1
    with torch.no_grad(), hooks.reading(host.model, host.module_names((host.layout.mlp_out,), [0])) as below:
        with hooks.skipping(host.model, [block], kept[0]):
            assert torch.equal(says(host), whole)
        assert below == {}
        with hooks.skipping(host.model, [block], hooks.with_first(kept[0], 2 * hooks.first(kept[0]))):
            assert not torch.equal(says(host), whole)
    assert torch.equal(says(host), whole) and hook_count(host.model) == 0
    assert not any("forward" in m.__dict__ for m in host.model.modules())


def test_skipping_ends_when_the_body_raises(tiny_gpt2: Host) -> None:
    with pytest.raises(ZeroDivisionError), hooks.skipping(tiny_gpt2.model, ["transformer.h.0"], torch.zeros(1)):
        raise ZeroDivisionError
    assert "forward" not in tiny_gpt2.model.get_submodule("transformer.h.0").__dict__


@every_family
def test_what_predicts_an_answer_needs_the_last_mlp_nowhere_else(host: Host) -> None:
    whole = says(host)
    if host.last_mlp is None:  # where it is no module of its own
        assert host.layout.senses or "." not in host.layout.mlp_out
        return
    places = torch.arange(whole.shape[1]).flip(0)[:2].sort().values.expand(len(whole), 2)
    with torch.no_grad(), hooks.looking_at(host.model, host.last_mlp, places), hooks.reading(host.model, [host.last_mlp], True) as into:
        with hooks.reading(host.model, [f"{host.last_mlp}.{host.layout.mlp_out.rpartition('.')[2]}"]) as out:
            few = says(host)
    torch.testing.assert_close(few[:, -2:], whole[:, -2:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(few[:, :-2], whole[:, :-2], rtol=1e-4, atol=1e-5)
    assert {x.shape[1] for x in (*into.values(), *out.values())} == {2}
    assert torch.equal(says(host), whole) and hook_count(host.model) == 0


@pytest.mark.parametrize("inputs", [False, True])
def test_reading_stops_when_everything_was_seen(tiny_gpt2: Host, inputs: bool) -> None:
    names = ["transformer.h.0.mlp.c_proj", "transformer.h.1.attn"]
    with torch.no_grad(), hooks.reading(tiny_gpt2.model, ["transformer.h.1.mlp"]) as after:
        with hooks.reading(tiny_gpt2.model, names, inputs, stop=True) as seen:
            says(tiny_gpt2)
        assert seen.keys() == set(names) and after == {} and hook_count(tiny_gpt2.model) > 0
    with torch.no_grad(), hooks.reading(tiny_gpt2.model, names, inputs) as whole:
        says(tiny_gpt2)
    assert all(torch.equal(whole[name], seen[name]) for name in names)
