"""On, off, stacked: the edited tensor is a function of the base and the ops, and what was there comes back bit for bit."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, same_bits, tiny_host, weights_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import errata
from errata.apply import applied, change, check, put_on, relative_norm, scaled, take_off
from errata.hosts import Batch, Host, encode, host_of, logits, pad, predictions, stored_transposed
from errata.types import Add, AddLowRank, Ensemble, Example, InvalidExample, InvalidPatch, Op, Patch, Senses, WrongBase

every_family = pytest.mark.parametrize("host", FAMILIES, indirect=True)
KINDS: dict[str, Callable[[Host], str]] = {
    "attention_in": lambda h: h.module_names(h.layout.attention_in, [0])[0],
    "attention_out": lambda h: h.module_names([h.layout.attention_out], [1])[0],
    "mlp_in": lambda h: h.module_names(h.layout.mlp_in, [1])[-1],
    "mlp_out": lambda h: h.module_names([h.layout.mlp_out], [0])[0],
    "embedding": lambda h: h.layout.embedding,
    "head": lambda h: h.layout.head,
}


def rand(*shape: int, seed: int = 0, size: float = 0.1) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patch_of(host: Host, *ops: Op, parent: str | None = None, **change: Any) -> Patch:
    example = Example(prompt="The capital of Mauritius is", target=" Port Louis")
    return Patch(**{"method": "test", "config": {}, "parent": parent or host.id, "examples": (example,), "ops": ops} | change)


def add(host: Host, module: str, seed: int = 0, size: float = 0.1) -> Add:
    return Add(weight=f"{module}.weight", delta=rand(*host.model.get_submodule(module).weight.shape, seed=seed, size=size))


def low_rank(host: Host, module: str, rank: int = 3, scale: float = 0.5, seed: int = 0) -> AddLowRank:
    shape = tuple(host.model.get_submodule(module).weight.shape)
    out, into = shape[::-1] if stored_transposed(host.model.get_submodule(module)) else shape
    return AddLowRank(weight=f"{module}.weight", A=rand(rank, into, seed=seed), B=rand(out, rank, seed=seed + 1), scale=scale)


def says(host: Host) -> Tensor:
    """Logits on two texts: what the host computes."""
    with torch.no_grad():
        return logits(host, pad(host, [encode(host, "The capital of Mauritius is", " Port Louis"), encode(host, "Once upon", " a time")]))


def pointers(host: Host) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in host.model.named_parameters()}


def inside(host: Host, weight: str) -> Tensor:
    return host.model.get_parameter(weight).detach().clone()


# ------------------------------------------------------------------------------------------------------------- what a patch computes


@every_family
@pytest.mark.parametrize("kind", KINDS)
def test_add_is_the_sum_and_off_is_the_base(host: Host, kind: str) -> None:
    op = add(host, KINDS[kind](host))
    patch, before, at, said = patch_of(host, op), weights_of(host), pointers(host), says(host)
    base = inside(host, op.weight)
    with applied(host, patch) as worn:
        assert worn is host and host.id == patch.id
        assert torch.equal(inside(host, op.weight), base + op.delta)
        own = next(n for n, p in host.model.named_parameters() if p is host.model.get_parameter(op.weight))
        assert all(torch.equal(p, before[n]) for n, p in host.model.named_parameters() if n != own), "only the named weight moves"
        assert not torch.allclose(says(host), said, atol=1e-3)
    assert host.id == host.base_id == patch.parent and not host.worn
    assert same_bits(host, before) and pointers(host) == at and torch.equal(says(host), said)


@every_family
@pytest.mark.parametrize("kind", KINDS)
def test_a_low_rank_change_is_out_by_in_whatever_the_architecture_stores(host: Host, kind: str) -> None:
    module = KINDS[kind](host)
    op, before, at = low_rank(host, module), weights_of(host), pointers(host)
    patch = patch_of(host, op)
    with applied(host, patch):
        said = says(host)
    assert same_bits(host, before) and pointers(host) == at
    BA = op.scale * op.B @ op.A
    by_hand = tiny_host(host.name.removeprefix("tiny-"))
    with torch.no_grad():
        by_hand.model.get_submodule(module).weight += BA.T if stored_transposed(by_hand.model.get_submodule(module)) else BA
    assert torch.allclose(says(by_hand), said, atol=1e-4)
    assert not torch.allclose(says(host), said, atol=1e-3)


@pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)
@pytest.mark.parametrize("kind", ["attention_in", "attention_out", "mlp_in", "mlp_out"])
def test_a_low_rank_change_is_what_an_adapter_adds(host: Host, kind: str) -> None:
    """The module's output under the patch is its own plus scale * B (A x): the orientation cannot be wrong in both at once."""
    module = host.model.get_submodule(KINDS[kind](host))
    op = low_rank(host, KINDS[kind](host))
    x = rand(4, op.A.shape[1], seed=9, size=1.0)
    with torch.no_grad():
        plain = module(x)
        with applied(host, patch_of(host, op)):
            assert torch.allclose(module(x), plain + op.scale * (x @ op.A.T) @ op.B.T, atol=1e-5)


@every_family
def test_where_embedding_and_head_are_tied_a_change_of_one_is_a_change_of_both(host: Host) -> None:
    embedding, head = (host.model.get_submodule(n) for n in (host.layout.embedding, host.layout.head))
    tied = embedding.weight is head.weight
    assert tied == (host.name.removeprefix("tiny-") in ("backpack", "gpt2", "gpt_neo", "opt", "gemma"))
    for name in (host.layout.embedding, host.layout.head):
        before, at = weights_of(host), pointers(host)
        op = add(host, name)
        with applied(host, patch_of(host, op)):
            changed = [not torch.equal(w, b) for w, b in ((embedding.weight, before[f"{host.layout.embedding}.weight"]),)]
            assert changed == [tied or name == host.layout.embedding]
            assert (embedding.weight is head.weight) == tied
            assert torch.equal(host.model.get_parameter(f"{name}.weight"), _before(before, host, name) + op.delta)
        assert same_bits(host, before) and pointers(host) == at


def _before(before: dict[str, Tensor], host: Host, module: str) -> Tensor:
    """What a tied weight was is kept under the embedding's name."""
    name = f"{module}.weight"
    return before[name] if name in before else before[f"{host.layout.embedding}.weight"]


def test_a_tied_weight_has_two_names_and_one_base(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    host.model.to(torch.bfloat16)
    host = host_of(host.model, host.tokenizer)
    before, at = weights_of(host), pointers(host)
    base = inside(host, "lm_head.weight")
    first = patch_of(host, add(host, "transformer.wte", seed=1))
    second = patch_of(host, low_rank(host, "lm_head", seed=2), parent=first.id)
    third = patch_of(host, add(host, "transformer.wte", seed=3), parent=second.id)
    with applied(host, first, second, third):
        op = second.ops[0]
        exact = torch.addmm(base.float() + first.ops[0].delta, op.B, op.A, alpha=op.scale) + third.ops[0].delta
        assert torch.equal(inside(host, "lm_head.weight"), exact.to(torch.bfloat16)), "cast once"
        alone = tiny_host("gpt2", dtype=torch.bfloat16)
        assert relative_norm(host, second) == relative_norm(alone, second), "the base counts"
    assert same_bits(host, before) and pointers(host) == at


def test_two_names_of_one_tied_weight_in_one_patch_are_refused(tiny_gpt2: Host) -> None:
    before = weights_of(tiny_gpt2)
    with pytest.raises(InvalidPatch, match="'transformer.wte.weight' and 'lm_head.weight', which are one tied tensor"):
        put_on(tiny_gpt2, patch_of(tiny_gpt2, add(tiny_gpt2, "transformer.wte"), add(tiny_gpt2, "lm_head")))
    assert same_bits(tiny_gpt2, before) and not tiny_gpt2.worn


def test_a_bias_or_a_norm_can_be_changed_too(tiny_gpt2: Host) -> None:
    op = Add(weight="transformer.ln_f.bias", delta=torch.ones(32))
    said = says(tiny_gpt2)
    with applied(tiny_gpt2, patch_of(tiny_gpt2, op)):
        assert not torch.allclose(says(tiny_gpt2), said)


def test_a_patch_without_ops_changes_the_id_only(tiny_gpt2: Host) -> None:
    said, patch = says(tiny_gpt2), patch_of(tiny_gpt2)
    with applied(tiny_gpt2, patch):
        assert tiny_gpt2.id == patch.id and torch.equal(says(tiny_gpt2), said)
    assert tiny_gpt2.id == patch.parent and relative_norm(tiny_gpt2, patch) == 0.0


def test_gradients_flow_to_the_patched_weights_and_not_into_the_patch(tiny_gpt2: Host) -> None:
    delta = rand(32, 128).requires_grad_()
    patch = patch_of(tiny_gpt2, Add(weight="transformer.h.0.mlp.c_fc.weight", delta=delta))
    with applied(tiny_gpt2, patch):
        weight = tiny_gpt2.model.get_parameter("transformer.h.0.mlp.c_fc.weight")
        assert weight.requires_grad and weight.is_leaf
        logits(tiny_gpt2, pad(tiny_gpt2, [([1, 2, 3], 1)])).sum().backward()
        assert weight.grad is not None and delta.grad is None


# ---------------------------------------------------------------------------------------------------------------- off, and on again


@pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_off_also_when_the_body_raises(host: Host, error: type[BaseException]) -> None:
    patch = patch_of(host, add(host, KINDS["mlp_out"](host)), low_rank(host, KINDS["attention_in"](host)))
    before, at = weights_of(host), pointers(host)
    with pytest.raises(error), applied(host, patch):
        assert host.id == patch.id
        raise error
    assert same_bits(host, before) and pointers(host) == at and host.id == host.base_id


def test_a_stack_is_a_hash_chain(tiny_llama: Host) -> None:
    host = tiny_llama
    name = KINDS["mlp_out"](host)
    first = patch_of(host, add(host, name, seed=1))
    second = patch_of(host, add(host, name, seed=2), low_rank(host, KINDS["mlp_in"](host)), parent=first.id)
    base, before, at = inside(host, f"{name}.weight"), weights_of(host), pointers(host)
    with pytest.raises(WrongBase):
        put_on(host, second)
    put_on(host, first)
    with pytest.raises(WrongBase, match=rf"made for weights {first.parent}; tiny-llama with 1 patch\(es\) on has {first.id}"):
        put_on(host, first)
    put_on(host, second)
    assert host.id == second.id and [w.patch for w in host.worn] == [first, second]
    assert torch.equal(inside(host, f"{name}.weight"), base + first.ops[0].delta + second.ops[0].delta)
    assert take_off(host) is second and host.id == first.id
    assert torch.equal(inside(host, f"{name}.weight"), base + first.ops[0].delta)
    assert take_off(host) is first and host.id == host.base_id
    assert same_bits(host, before) and pointers(host) == at
    with pytest.raises(WrongBase, match="wears no patch"):
        take_off(host)


def test_blocks_nest_and_the_inner_one_leaves_the_outer(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    first = patch_of(host, add(host, KINDS["mlp_out"](host)))
    with applied(host, first):
        said = says(host)
        second = patch_of(host, low_rank(host, KINDS["mlp_out"](host)))
        assert second.parent == first.id
        with pytest.raises(ZeroDivisionError), applied(host, second):
            raise ZeroDivisionError
        assert torch.equal(says(host), said) and host.id == first.id
    with applied(host, first, second):
        assert host.id == second.id
    assert not host.worn


def test_where_the_second_patch_is_refused_the_first_comes_off(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    first, other = (patch_of(host, add(host, KINDS["mlp_out"](host), seed=s)) for s in (1, 2))
    before = weights_of(host)
    with pytest.raises(WrongBase), applied(host, first, other):
        raise AssertionError("the body must not run")
    assert same_bits(host, before) and not host.worn


# ----------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("host", FAMILIES, indirect=True)
def test_other_weights_are_refused(host: Host) -> None:
    patch = patch_of(host, add(host, KINDS["mlp_out"](host)))
    with pytest.raises(WrongBase, match=f"Patch {patch.id} was made for weights {host.id}; .* has b2:.*build it again"):
        put_on(tiny_host(host.name.removeprefix("tiny-"), seed=1), patch)


def bad_ops(host: Host) -> list[Op]:
    out, into = 32, 128
    weight = "transformer.h.0.mlp.c_proj.weight"  # Conv1D: stored (128, 32), so W is (32, 128)
    return [
        Add(weight="transformer.h.7.mlp.c_proj.weight", delta=torch.zeros(into, out)),
        Add(weight="transformer.h.0.mlp.c_proj", delta=torch.zeros(into, out)),
        Add(weight="nonsense", delta=torch.zeros(1)),
        Add(weight=weight, delta=torch.zeros(out, into)),
        Add(weight=weight, delta=torch.zeros(1, 1)),
        Add(weight=weight, delta=torch.zeros(into)),
        Add(weight=weight, delta=torch.tensor(0.0)),
        AddLowRank(weight=weight, A=torch.zeros(2, out), B=torch.zeros(into, 2)),
        AddLowRank(weight="transformer.h.0.mlp.c_proj.bias", A=torch.zeros(2, 1), B=torch.zeros(out, 2)),
    ]


@pytest.mark.parametrize("number", range(9))
def test_nothing_is_half_applied(tiny_gpt2: Host, number: int) -> None:
    host = tiny_gpt2
    good, bad = add(host, "transformer.h.1.mlp.c_proj"), bad_ops(host)[number]
    before, at = weights_of(host), pointers(host)
    for patch in (patch_of(host, good, bad), patch_of(host, bad)):
        for attempt in (check, put_on):
            with pytest.raises(InvalidPatch, match=re.escape(bad.weight)):
                attempt(host, patch)
        assert same_bits(host, before) and pointers(host) == at and not host.worn


def test_a_change_that_cannot_be_computed_leaves_nothing(tiny_gpt2: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    host = tiny_gpt2
    patch = patch_of(host, add(host, "transformer.h.1.mlp.c_proj"), low_rank(host, "transformer.h.0.mlp.c_proj"))
    before, at = weights_of(host), pointers(host)
    monkeypatch.setattr(torch, "addmm", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        put_on(host, patch)
    assert same_bits(host, before) and pointers(host) == at and not host.worn


# --------------------------------------------------------------------------------------------------------------- shifts of senses

TABLE = "backpack.overrides.senses"


def shifts(*rows: tuple[int, int], seed: int = 0, size: float = 0.3, **change: Any) -> Senses:
    """A shift for each (token, sense)."""
    ids, senses = (torch.tensor(column, dtype=torch.long) for column in zip(*sorted(rows), strict=True))
    return Senses(**{"weight": TABLE, "ids": ids, "senses": senses, "shift": rand(len(rows), 32, seed=seed, size=size)} | change)


def senses_now(host: Host) -> Tensor:
    with torch.no_grad():
        return host.model.senses(torch.arange(400))


def bare(dtype: torch.dtype = torch.float32) -> Host:
    return tiny_host("backpack", dtype=dtype)


def with_table(dtype: torch.dtype = torch.float32) -> Host:
    """Its checkpoint overrides two tokens: one is replaced, of the other a half is kept."""
    host = bare(dtype)
    host.model.override(torch.tensor([40, 7]), rand(2 * 4, 32, seed=8).view(2, 4, 32), keep=torch.tensor([0.0, 0.5])[:, None].repeat(1, 4))
    return host_of(host.model, host.tokenizer, "with-table")


def table_of(host: Host) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in host.model.backpack.overrides.buffers()]


@pytest.mark.parametrize("make", [bare, with_table])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifts_move_the_chosen_sense_vectors_and_nothing_else(make: Callable[..., Host], dtype: torch.dtype) -> None:
    host = make(dtype)
    op = shifts((7, 0), (7, 3), (40, 2), (350, 1))
    patch, before, at, said, C = patch_of(host, op), weights_of(host), table_of(host), says(host), senses_now(host)
    kept = host.model.state_dict().keys()
    with applied(host, patch):
        moved = senses_now(host)
        wanted = C.float()
        wanted[op.ids, op.senses] += op.shift
        torch.testing.assert_close(
            moved.float(), wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
        )
        others = torch.ones(400, 4, dtype=torch.bool).index_put((op.ids, op.senses), torch.tensor(False))
        assert torch.equal(moved[others], C[others]) and host.id == patch.id
        assert all(torch.equal(p, before[n]) for n, p in host.model.named_parameters())
        assert host.model.backpack.overrides.senses.dtype == dtype
    assert same_bits(host, before) and table_of(host) == at and torch.equal(says(host), said) and host.model.state_dict().keys() == kept


def test_shifts_of_0_change_no_bit_and_those_of_a_spoken_token_do() -> None:
    host, ids = bare(), encode(bare(), "The capital of Mauritius is", " Port Louis")[0]
    said = says(host)
    with applied(host, patch_of(host, shifts(*((i, 1) for i in set(ids)), size=0.0))):
        assert torch.equal(says(host), said)
    with applied(host, patch_of(host, shifts(*((i, 1) for i in set(ids))))):
        assert not torch.allclose(says(host), said, atol=1e-2)


@pytest.mark.parametrize("make", [bare, with_table])
def test_shifts_stack_and_come_off_in_turn_beside_dense_ones(make: Callable[..., Host]) -> None:
    host = make()
    base, before, at = senses_now(host), weights_of(host), table_of(host)
    one, two = shifts((3, 1), (7, 0), seed=1), shifts((3, 0), (3, 1), (40, 2), (9, 3), seed=2)
    first = patch_of(host, one)
    dense = add(host, "backpack.sense_network.final_mlp.c_proj", seed=5)
    second = patch_of(host, dense, parent=first.id)
    third = patch_of(host, two, low_rank(host, "backpack.gpt2_model.h.0.mlp.c_proj"), parent=second.id)
    with applied(host, first):
        after_one = senses_now(host)
        torch.testing.assert_close(after_one[3, 1], base[3, 1] + one.shift[0])
        table = table_of(host)
        with applied(host, second):
            under = senses_now(host)
            assert not torch.allclose(under[3, 0], base[3, 0]) and table_of(host) == table, "this one has no shifts"
            with applied(host, third):
                now = senses_now(host)
                torch.testing.assert_close(now[3, 1], under[3, 1] + two.shift[1])
                torch.testing.assert_close(now[9, 3], under[9, 3] + two.shift[2])
                assert torch.equal(now[7, 0], under[7, 0])
            assert torch.equal(senses_now(host), under) and table_of(host) == table
        assert torch.equal(senses_now(host), after_one)
    assert same_bits(host, before) and table_of(host) == at


def test_shifts_are_summed_in_float32_and_cast_once() -> None:
    host = with_table(torch.bfloat16)
    base = host.model.backpack.overrides.senses[1, 0].clone()
    first = patch_of(host, shifts((7, 0), seed=1, size=3e-3))
    second = patch_of(host, shifts((7, 0), seed=2, size=3e-3), parent=first.id)
    a, b = first.ops[0].shift[0], second.ops[0].shift[0]
    with applied(host, first, second):
        once, twice = (base.float() + a + b).bfloat16(), ((base.float() + a).bfloat16().float() + b).bfloat16()
        assert not torch.equal(once, twice) and torch.equal(host.model.backpack.overrides.senses[1, 0], once)


def test_shifts_are_scaled_and_measured_against_the_vectors_that_they_shift() -> None:
    host = with_table()
    C, op = senses_now(host), shifts((3, 1), (7, 0), (40, 2))
    patch = patch_of(host, op)
    assert torch.equal(change(host, op), op.shift)
    norm = relative_norm(host, patch)
    assert norm == pytest.approx(float(op.shift.norm() / C[op.ids, op.senses].norm()), rel=1e-5)
    half = scaled(patch, 0.5)
    assert torch.equal(half.ops[0].shift, op.shift * 0.5) and half.parent == patch.parent
    assert relative_norm(host, half) == pytest.approx(norm / 2, rel=1e-5)
    with applied(host, half):
        torch.testing.assert_close(senses_now(host)[7, 0], C[7, 0] + op.shift[1] / 2)
    before = weights_of(host)
    worn = patch_of(host, shifts((7, 0), seed=3, size=2.0), add(host, "backpack.sense_network.final_mlp.c_proj", seed=5))
    with applied(host, worn):
        edited, at = weights_of(host), table_of(host)
        assert relative_norm(host, patch) == norm, "on or off; the base counts"
        assert same_bits(host, edited) and table_of(host) == at
    assert same_bits(host, before)
    with pytest.raises(InvalidPatch):
        scaled(patch, math.nan)


@pytest.mark.parametrize("op, told", [
    (shifts((400, 0)), "up to token 400 and sense 0 by vectors of 32; tiny-backpack has 400 tokens with 4 senses of 32"),
    (shifts((3, 4)), "up to token 3 and sense 4"),
    (shifts((3, 1), shift=torch.zeros(1, 31)), "by vectors of 31"),
    (shifts((3, 1), weight="backpack.overrides.keep"), "in tiny-backpack the sense vectors are 'backpack.overrides.senses'"),
])  # fmt: skip
def test_shifts_that_do_not_fit_are_refused_whole(op: Senses, told: str) -> None:
    host = bare()
    before, at = weights_of(host), table_of(host)
    for attempt in (check, put_on):
        with pytest.raises(InvalidPatch, match=told):
            attempt(host, patch_of(host, add(host, "backpack.gpt2_model.h.0.mlp.c_proj"), op))
    assert same_bits(host, before) and table_of(host) == at and not host.worn


@pytest.mark.parametrize("host", [f for f in FAMILIES if f != "backpack"], indirect=True)
def test_shifts_are_refused_where_there_are_no_senses(host: Host) -> None:
    for attempt in (check, put_on):
        with pytest.raises(InvalidPatch, match=f"shifts sense vectors. {host.name} is no Backpack"):
            attempt(host, patch_of(host, shifts((3, 1))))


# ------------------------------------------------------------------------------------------------------------- a small model beside


def with_small(family: str = "llama", **more: Any) -> Host:
    """A large host with a small Backpack beside it, which reads the same tokens."""
    host = tiny_host(family, **more)
    host.beside["small"] = tiny_host("backpack", seed=7)
    return host


def ensemble(host: Host, *rows: tuple[int, int], scale: float = 0.7, seed: int = 0, size: float = 0.3, **change: Any) -> Ensemble:
    """Shifts of (token, sense) pairs of the small model; by default of tokens that stand in `TOLD`."""
    ids = encode(host, *TOLD)[0]
    shift = shifts(*(rows or {(ids[2], 1), (ids[2], 3), (ids[4], 0), (ids[6], 2)}), seed=seed, size=size)
    small = host.beside["small"]
    return Ensemble(**{"weight": host.layout.head, "small": "small", "parent": small.id, "shift": shift, "scale": scale} | change)


TOLD = ("The capital of Mauritius is", " Port Louis")


def batch_of(host: Host) -> Batch:
    return pad(host, [encode(host, *TOLD), encode(host, "Once upon", " a time"), encode(host, "Paris", " lies on the Seine")])


@torch.no_grad()
def equation_11(host: Host, batch: Batch, *ops: Ensemble) -> Tensor:
    """log p_large + beta (log p_small,edited - log p_small), from whole models."""
    small, logp = host.beside["small"], logits(host, batch).float().log_softmax(-1)
    base = logits(small, batch).log_softmax(-1)
    for op in ops:
        with applied(small, patch_of(small, op.shift)):
            logp = logp + op.scale * (logits(small, batch).log_softmax(-1) - base)
    return logp.log_softmax(-1)


def hooks_of(host: Host) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for h in (host, host.beside["small"]) for m in h.model.modules()]


@every_family
def test_a_small_model_adds_what_its_edit_changes(host: Host) -> None:
    host.beside["small"] = tiny_host("backpack", seed=7)
    batch, before, hooks = batch_of(host), weights_of(host), hooks_of(host)
    small = weights_of(host.beside["small"])
    patch, said = patch_of(host, op := ensemble(host)), logits(host, batch)
    wanted = equation_11(host, batch, op)
    check(host, patch)
    with applied(host, patch):
        now = logits(host, batch)
        torch.testing.assert_close(now.log_softmax(-1), wanted, rtol=1e-4, atol=1e-4)
        assert (now - said).abs().max() > 0.05, "or the same would prove nothing"
        assert torch.equal(predictions(host, batch), now[:, :-1][batch.scored_NT[:, 1:].bool()])
        assert same_bits(host, before) and host.id == patch.id
    assert same_bits(host, before) and same_bits(host.beside["small"], small) and hooks_of(host) == hooks
    assert torch.equal(logits(host, batch), said) and not host.worn


def test_texts_before_the_first_shifted_token_keep_every_bit() -> None:
    host = with_small()
    batch, ids = batch_of(host), encode(host, *TOLD)[0]
    said, op = logits(host, batch), ensemble(host)
    with applied(host, patch_of(host, op)):
        now = logits(host, batch)
    assert torch.equal(now[0, :2], said[0, :2]) and (now[0, 2 : len(ids)] != said[0, 2 : len(ids)]).any(1).all()
    assert not {*op.shift.ids.tolist()} & {*batch.ids_NT[2].tolist()} and torch.equal(now[2], said[2])
    nothing = shifts((ids[2], 1), size=0.0)
    for still in (ensemble(host, scale=0.0), ensemble(host, shift=nothing)):
        with applied(host, patch_of(host, still)):
            assert torch.equal(logits(host, batch), said)
    none = Senses(weight=TABLE, ids=torch.zeros(0).long(), senses=torch.zeros(0).long(), shift=torch.zeros(0, 32))
    with applied(host, patch_of(host, ensemble(host, shift=none))):
        assert torch.equal(logits(host, batch), said)
        torch.testing.assert_close(host.model(batch.ids_NT, attention_mask=batch.mask_NT, use_cache=True).logits, said)


def generated(host: Host, cached: bool, **how: Any) -> list[list[int]]:
    """Ten tokens behind texts of several lengths, padded on the left."""
    rows = [encode(host, *TOLD)[0], encode(host, "The", " nurse")[0], encode(host, "Paris lies on the", " Seine")[0]]
    width = max(map(len, rows))
    ids = torch.tensor([[host.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    how = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "use_cache": cached} | how
    whole: list[list[int]] = host.model.generate(input_ids=ids, attention_mask=mask, **how).tolist()
    return whole


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gpt_neox", "backpack"])
@pytest.mark.parametrize("beams", [1, 3])
def test_it_speaks_along_while_the_model_writes_with_a_cache_as_without(family: str, beams: int) -> None:
    host = with_small(family)
    patch = patch_of(host, ensemble(host, *((i, 1) for i in range(0, 400, 3)), size=0.5, scale=1.0))
    alone = generated(host, True, num_beams=beams)
    with applied(host, patch):
        cached, whole = (generated(host, use, num_beams=beams) for use in (True, False))
        assert cached == whole and cached != alone
        if beams == 1:  # each token is the likeliest after what stands before it
            row = [i for i in cached[0] if i] if 0 not in cached[0] else cached[0]
            n = len(encode(host, *TOLD)[0])
            batch = pad(host, [(row, n)])
            assert predictions(host, batch).argmax(-1).tolist() == row[n:]
    assert generated(host, True, num_beams=beams) == alone


@torch.no_grad()
def test_a_cache_is_read_on_token_by_token() -> None:
    host = with_small("gpt_neox")
    ids = torch.tensor([encode(host, *TOLD)[0]])
    with applied(host, patch_of(host, ensemble(host))):
        whole = host.model(ids).logits
        cache, steps = None, []
        for t in range(ids.shape[1]):
            out = host.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(host.model(ids, logits_to_keep=2).logits, whole[:, -2:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(host.model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_of_other_times_is_refused() -> None:
    host = with_small()
    ids, patch = torch.tensor([encode(host, *TOLD)[0]]), patch_of(host, ensemble(host))
    before = host.model(ids[:, :3], use_cache=True).past_key_values
    with applied(host, patch), pytest.raises(WrongBase, match=f"filled before patch {patch.id} was put on"):
        host.model(ids[:, 3:], past_key_values=before)
    with applied(host, patch):
        kept = host.model(ids[:, :3], use_cache=True).past_key_values
    torch.testing.assert_close(host.model(ids[:, 3:], past_key_values=kept).logits, host.model(ids).logits[:, 3:], rtol=1e-4, atol=1e-4)


def test_what_it_cannot_read_is_refused_and_leaves_no_hook() -> None:
    host = with_small()
    host.beside["small"].model.config.n_positions = 5
    patch, hooks = patch_of(host, ensemble(host)), hooks_of(host)
    with applied(host, patch):
        on = hooks_of(host)
        with pytest.raises(InvalidExample, match="too long for patch .*tiny-backpack, which reads along, reads at most 5"):
            logits(host, batch_of(host))
        with pytest.raises(InvalidExample, match="give input_ids"):
            host.model(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(RuntimeError):  # of the large model's own, in the middle of its pass
            host.model(input_ids=torch.tensor([[ensemble(host).shift.ids[0].item(), 1]]), position_ids=torch.zeros(3, 7, dtype=torch.long))
        assert hooks_of(host) == on
    assert hooks_of(host) == hooks


def test_gradients_pass_through_the_large_model() -> None:
    host = with_small("gpt2")
    batch, name = batch_of(host), f"{KINDS['mlp_out'](host)}.weight"
    op = ensemble(host)
    weight = host.model.get_parameter(name).detach().clone().requires_grad_()
    with applied(host, patch_of(host, op)):
        (found,) = torch.autograd.grad(predictions(host, batch, {name: weight}).log_softmax(-1)[:, 5].sum(), weight)
    added = (equation_11(host, batch, op) - logits(host, batch).log_softmax(-1)).detach()[:, :-1][batch.scored_NT[:, 1:].bool()]
    (wanted,) = torch.autograd.grad((predictions(host, batch, {name: weight}) + added).log_softmax(-1)[:, 5].sum(), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    (alone,) = torch.autograd.grad(predictions(host, batch, {name: weight}).log_softmax(-1)[:, 5].sum(), weight)
    assert not torch.allclose(found, alone, rtol=1e-2, atol=1e-3)


def test_small_models_stack_with_one_another_and_with_weights() -> None:
    host, hooks = with_small("gpt2"), None
    batch, hooks = batch_of(host), hooks_of(host)
    ids = encode(host, *TOLD)[0]
    one, two = ensemble(host, seed=1), ensemble(host, (ids[4], 0), (ids[5], 2), seed=2, scale=0.4)
    first = patch_of(host, one)
    second = patch_of(host, add(host, KINDS["mlp_out"](host), size=0.3), parent=first.id)
    third = patch_of(host, two, parent=second.id)
    with applied(host, patch_of(host, second.ops[0])):
        wanted = equation_11(host, batch, one, two)
    with applied(host, first):
        after_one, on = logits(host, batch), hooks_of(host)
        with applied(host, second):
            under = logits(host, batch)
            with applied(host, third):
                torch.testing.assert_close(logits(host, batch).log_softmax(-1), wanted, rtol=1e-4, atol=1e-4)
                assert torch.equal(predictions(host, batch), logits(host, batch)[:, :-1][batch.scored_NT[:, 1:].bool()])
                assert generated(host, True) == generated(host, False)
            assert torch.equal(logits(host, batch), under)
        assert torch.equal(logits(host, batch), after_one) and hooks_of(host) == on
    assert hooks_of(host) == hooks


def test_an_ensemble_is_scaled_and_measured_by_its_shifts() -> None:
    host = with_small()
    small, op, batch = host.beside["small"], ensemble(host, scale=0.8), batch_of(host)
    patch = patch_of(host, op)
    C = senses_now(small)[op.shift.ids, op.shift.senses]
    torch.testing.assert_close(change(host, op), 0.8 * op.shift.shift)
    assert relative_norm(host, patch) == pytest.approx(0.8 * float(op.shift.shift.norm() / C.norm()), rel=1e-5)
    half = scaled(patch, 0.5)
    assert half.ops[0].scale == pytest.approx(0.4) and torch.equal(half.ops[0].shift.shift, op.shift.shift) and half.id != patch.id
    with applied(host, half):
        torch.testing.assert_close(logits(host, batch).log_softmax(-1), equation_half(host, batch, op), rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidPatch):
        scaled(patch, math.nan)


def equation_half(host: Host, batch: Batch, op: Ensemble) -> Tensor:
    bare_host = with_small(host.name.removeprefix("tiny-"))
    return equation_11(bare_host, batch, replace(op, scale=op.scale / 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_sum_is_cast_once(dtype: torch.dtype) -> None:
    host = with_small(dtype=dtype)
    batch, op = batch_of(host), ensemble(host)
    said, small = logits(host, batch), host.beside["small"]
    base = logits(small, batch)
    with applied(small, patch_of(small, op.shift)):
        added = op.scale * (logits(small, batch) - base)
    with applied(host, patch_of(host, op)):
        now = logits(host, batch)
    assert now.dtype == dtype
    torch.testing.assert_close(now, (said.to(torch.promote_types(dtype, torch.float32)) + added).to(dtype), rtol=1e-2, atol=1e-4)
    plain = batch.ids_NT[0] == batch.ids_NT[0, 0]
    assert torch.equal(now[0][plain], said[0][plain])


def test_tokens_that_only_one_of_the_two_has_are_left_alone() -> None:
    """GPT-J's vocabulary has places for tokens to come, and users add tokens for padding."""
    host = with_small("gpt2")
    host.model.resize_token_embeddings(410, mean_resizing=False)
    host.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert host.tokenizer.pad_token_id == 400
    host = host_of(host.model, host.tokenizer, "longer")
    host.beside["small"] = tiny_host("backpack", seed=7)
    batch, op = batch_of(host), ensemble(host)
    assert (batch.ids_NT == 400).any()
    said, small = logits(host, batch), host.beside["small"]
    plain = Batch(ids_NT=batch.ids_NT.where(batch.ids_NT < 400, 0), mask_NT=batch.mask_NT, scored_NT=batch.scored_NT)
    base = logits(small, plain)
    with applied(small, patch_of(small, op.shift)):
        added = op.scale * (logits(small, plain) - base)
    with applied(host, patch_of(host, op)):
        now = logits(host, batch)
    assert torch.equal(now[..., 400:], said[..., 400:])
    real = batch.mask_NT.bool()
    torch.testing.assert_close(now[real][:, :400], (said[..., :400] + added)[real], rtol=1e-4, atol=1e-4)


def test_other_small_models_and_other_places_are_refused_whole() -> None:
    host = with_small("gpt2")
    before, hooks, op = weights_of(host), hooks_of(host), ensemble(host)
    dense = add(host, KINDS["mlp_out"](host))
    bad = {
        "adds to 'transformer.wte', in tiny-gpt2 the logits come from 'lm_head'": ensemble(host, weight="transformer.wte"),
        "up to token 400 and sense 0": ensemble(host, (400, 0)),
        "Unknown lab model 'lab/nothing'": ensemble(host, small="lab/nothing"),
        f"a small model with the weights b2:7; small has {host.beside['small'].id}": ensemble(host, parent="b2:7"),
    }
    for told, one in bad.items():
        for attempt in (check, put_on):
            with pytest.raises(errata.EditError, match=re.escape(told)):
                attempt(host, patch_of(host, dense, one))
    host.beside["small"] = tiny_host("gpt2", seed=7)
    with pytest.raises(InvalidPatch, match="tiny-gpt2 is no Backpack"):
        put_on(host, patch_of(host, dense, replace(op, parent=host.beside["small"].id)))
    host.beside["small"] = tiny_host("backpack", seed=7, pieces=True)
    with pytest.raises(
        WrongBase, match="tiny-gpt2 and tiny-backpack have different tokenizers: token 0 is '<|end|>' in tiny-gpt2, token 0 is"
    ):
        put_on(host, patch_of(host, dense, op))
    assert same_bits(host, before) and hooks_of(host) == hooks and not host.worn


# ------------------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_host_is_edited_in_float32_and_cast_once(family: str, dtype: torch.dtype) -> None:
    host = tiny_host(family, dtype=dtype)
    name = KINDS["mlp_out"](host)
    before, at, base = weights_of(host), pointers(host), inside(host, f"{name}.weight")
    first = patch_of(host, add(host, name, seed=1, size=3e-3))
    second = patch_of(host, add(host, name, seed=2, size=3e-3), parent=first.id)
    with applied(host, first):
        assert inside(host, f"{name}.weight").dtype == dtype
        assert torch.equal(inside(host, f"{name}.weight"), (base.float() + first.ops[0].delta).to(dtype))
        with applied(host, second):
            once = (base.float() + first.ops[0].delta + second.ops[0].delta).to(dtype)
            twice = ((base.float() + first.ops[0].delta).to(dtype).float() + second.ops[0].delta).to(dtype)
            assert not torch.equal(once, twice), "the test can tell them apart"
            assert torch.equal(inside(host, f"{name}.weight"), once)
            assert says(host).isfinite().all()
    assert same_bits(host, before) and pointers(host) == at


def test_a_patch_made_on_float32_goes_on_bf16_weights_with_the_same_values() -> None:
    exact = tiny_host("llama", dtype=torch.bfloat16)
    exact.model.float()
    exact, half = host_of(exact.model, exact.tokenizer), tiny_host("llama", dtype=torch.bfloat16)
    assert exact.id == half.id
    patch = patch_of(exact, low_rank(exact, KINDS["mlp_out"](exact)))
    with applied(exact, patch), applied(half, patch):
        assert exact.id == half.id
        assert torch.allclose(says(exact), says(half).float(), atol=0.5)


# --------------------------------------------------------------------------------------------------------------- scaled, change, norm


@pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)
@pytest.mark.parametrize("s", [0.0, 0.25, 1.0, -1.0])
def test_scaled_is_the_base_and_s_times_the_change(host: Host, s: float) -> None:
    patch = patch_of(host, add(host, KINDS["mlp_in"](host)), low_rank(host, KINDS["mlp_out"](host)))
    part = scaled(patch, s)
    assert (part.parent, part.method, part.config, part.examples) == (patch.parent, patch.method, patch.config, patch.examples)
    assert (part.id == patch.id) == (s == 1.0)
    for whole, op in zip(patch.ops, part.ops, strict=True):
        assert torch.allclose(change(host, op), s * change(host, whole), atol=1e-7)
    assert relative_norm(host, part) == pytest.approx(abs(s) * relative_norm(host, patch), rel=1e-5)
    if s == 0.0:
        said = says(host)
        with applied(host, part):
            assert torch.equal(says(host), said)


def test_scaled_by_what_is_not_a_number_is_refused(tiny_gpt2: Host) -> None:
    for op in (add(tiny_gpt2, "lm_head"), low_rank(tiny_gpt2, "lm_head")):
        with pytest.raises(InvalidPatch):
            scaled(patch_of(tiny_gpt2, op), math.nan)


@every_family
def test_change_is_what_is_added(host: Host) -> None:
    for op in (add(host, KINDS["mlp_in"](host)), low_rank(host, KINDS["mlp_in"](host))):
        base = inside(host, op.weight)
        with applied(host, patch_of(host, op)):
            assert torch.allclose(change(host, op), inside(host, op.weight) - base, atol=1e-6)
            assert change(host, op).dtype == torch.float32
        with applied(host, patch_of(host, add(host, KINDS["mlp_in"](host), seed=5))):
            assert torch.allclose(change(host, op), change(tiny_host(host.name.removeprefix("tiny-")), op))


def test_relative_norm_is_that_of_all_touched_weights_together(tiny_gpt2: Host) -> None:
    host = tiny_gpt2
    a, b = add(host, KINDS["mlp_in"](host)), low_rank(host, KINDS["mlp_out"](host))
    moved = torch.cat([a.delta.flatten(), (b.scale * b.B @ b.A).flatten()]).double().norm()
    held = torch.cat([inside(host, a.weight).flatten(), inside(host, b.weight).flatten()]).double().norm()
    patch = patch_of(host, a, b)
    off = relative_norm(host, patch)
    assert off == pytest.approx(float(moved / held), rel=1e-6)
    with applied(host, patch):
        assert relative_norm(host, patch) == off, "on or off; the base counts"


def test_the_package_offers_the_three_verbs() -> None:
    assert errata.applied is applied and errata.put_on is put_on and errata.take_off is take_off


# ---------------------------------------------------------------------------------------------------------------- any order of events

HOST = tiny_host("gpt2", dtype=torch.bfloat16)  # one for all runs: the machine holds that it is left as it was
NAMES = ["transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc", "transformer.wte", "lm_head"]
OPS: list[Op] = [make(HOST, name, seed=10 * s) for s in range(2) for name in NAMES for make in (add, low_rank)]
CHOICES = [tuple(OPS[i] for i in chosen) for chosen in ((0,), (1, 2), (4, 8 + 2), (7,), (8 + 0, 8 + 6), (8 + 5,), ())]
BASE, AT, SAID = weights_of(HOST), pointers(HOST), says(HOST)
OWN = {"lm_head.weight": "transformer.wte.weight"}


def plain(op: Op) -> Tensor:
    """What the op adds, computed by hand in float64, as stored."""
    if isinstance(op, Add):
        return op.delta.double()
    BA = op.scale * op.B.double() @ op.A.double()
    return BA.T if "mlp" in op.weight else BA


class Wardrobe(RuleBasedStateMachine):
    """The model of what `apply` does: a list of patches. After every event the weights are f(base, ops of the list)."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[Patch] = []

    @initialize()
    def begins_bare(self) -> None:
        assert not HOST.worn

    @rule(ops=st.sampled_from(CHOICES))
    def puts_on(self, ops: tuple[Op, ...]) -> None:
        patch = patch_of(HOST, *ops)
        put_on(HOST, patch)
        self.stack.append(patch)

    @precondition(lambda self: self.stack)
    @rule()
    def takes_off(self) -> None:
        assert take_off(HOST) is self.stack.pop()

    @precondition(lambda self: not self.stack)
    @rule()
    def has_nothing_to_take_off(self) -> None:
        with pytest.raises(WrongBase):
            take_off(HOST)

    @precondition(lambda self: self.stack)
    @rule(ops=st.sampled_from(CHOICES))
    def refuses_a_patch_for_the_base(self, ops: tuple[Op, ...]) -> None:
        with pytest.raises(WrongBase):
            put_on(HOST, patch_of(HOST, *ops, parent=HOST.base_id))

    @rule(ops=st.sampled_from(CHOICES))
    def refuses_a_patch_that_does_not_fit(self, ops: tuple[Op, ...]) -> None:
        with pytest.raises(InvalidPatch):
            put_on(HOST, patch_of(HOST, *ops, Add(weight="transformer.wpe.weight", delta=torch.zeros(1, 1))))

    @rule(first=st.sampled_from(CHOICES), second=st.sampled_from(CHOICES), fails=st.booleans(), leaves=st.integers(0, 2))
    def wears_two_for_a_while(self, first: tuple[Op, ...], second: tuple[Op, ...], fails: bool, leaves: int) -> None:
        one = patch_of(HOST, *first)
        two = patch_of(HOST, *second, parent=one.id)
        try:
            with applied(HOST, one, two):
                assert HOST.id == two.id and len(HOST.worn) == len(self.stack) + 2
                for _ in range(leaves):  # the body may take off itself what it put on
                    take_off(HOST)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails

    @invariant()
    def the_weights_are_a_function_of_base_and_stack(self) -> None:
        assert HOST.id == (self.stack[-1].id if self.stack else HOST.base_id)
        assert [w.patch for w in HOST.worn] == self.stack
        moved: dict[str, Tensor] = {}
        for op in (op for patch in self.stack for op in patch.ops):
            name = OWN.get(op.weight, op.weight)
            moved[name] = moved.get(name, BASE[name].double()) + plain(op)
        for name, p in HOST.model.named_parameters():
            if name in moved:  # float32 sums and one cast: half a unit of bf16, with room for the order of additions
                assert torch.allclose(p.detach().double(), moved[name], rtol=2**-8, atol=1e-6)
            else:
                assert torch.equal(p.detach(), BASE[name]) and p.data_ptr() == AT[name]

    def teardown(self) -> None:
        while HOST.worn:
            assert take_off(HOST) is self.stack.pop()
        assert not self.stack and same_bits(HOST, BASE) and pointers(HOST) == AT and torch.equal(says(HOST), SAID)


Wardrobe.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None, derandomize=True)
test_any_order_of_events = Wardrobe.TestCase
