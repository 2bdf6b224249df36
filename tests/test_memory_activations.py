"""What a model says with other activations: where they stand, what ranks add, and the codes of routers."""

import pytest
import torch
from conftest import tiny_host

from errata import hooks, hosts
from errata.hosts import Host
from errata.memory import activations

TEXTS = ("The capital of Mauritius is", "Lily loved to play")


def one(index: int, n: int = 2) -> activations.Chosen:
    return torch.full((n, 1), index), torch.ones(n, 1)


def outputs(host: Host, module: str, parts: dict[str, torch.Tensor], chosen: activations.Chosen, said: int) -> tuple[torch.Tensor, ...]:
    """(what the module gives by itself, with the parts, and how many tokens of each row are given)."""
    rows = [hosts.encode(host, text, " Rome") for text in TEXTS]
    batch, given = hosts.pad(host, rows), [n for _, n in rows]
    with torch.no_grad(), hooks.reading(host.model, [module]) as seen:
        hosts.logits(host, batch)
        base = seen[module]
        with activations.changed(host, parts, {module: chosen}, given, [said] * 2), hooks.reading(host.model, [module]) as now:
            hosts.logits(host, batch)
        changed = now[module]
    return base, changed, torch.tensor(given)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3"])
def test_a_value_stands_where_the_answer_is_predicted_and_nowhere_else(family: str) -> None:
    host = tiny_host(family)
    module = host.module_names((host.layout.mlp_out,))[0]
    base, now, given = outputs(host, module, {f"value/{module}": torch.stack([torch.zeros(32), torch.ones(32)])}, one(1), 2)
    for row, n in enumerate(given.tolist()):
        assert (now[row, n - 1 : n + 1] == 1).all()
        assert torch.equal(now[row, : n - 1], base[row, : n - 1]) and torch.equal(now[row, n + 1 :], base[row, n + 1 :])


def test_an_encoder_changes_everywhere_and_a_decoder_from_where_it_begins() -> None:
    host = tiny_host("t5")
    for module, everywhere in (("encoder.block.1.layer.1.DenseReluDense.wo", True), ("decoder.block.1.layer.2.DenseReluDense.wo", False)):
        base, now, _ = outputs(host, module, {f"value/{module}": torch.ones(1, 32)}, one(0), 2)
        assert (now[:, :2] == 1).all() and (now[:, 2:] == 1).all() == everywhere
        assert everywhere or torch.equal(now[:, 2:], base[:, 2:])


def test_ranks_add_what_the_chosen_ones_make_of_the_input() -> None:
    host, draw = tiny_host("gpt2"), torch.Generator().manual_seed(0)
    module = host.module_names((host.layout.mlp_out,))[1]
    A, B = torch.randn(3, 2, 128, generator=draw), torch.randn(3, 32, 2, generator=draw)
    chosen = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    base, now, given = outputs(host, module, {f"A/{module}": A, f"B/{module}": B}, chosen, 2)
    x = activations.keys(host, TEXTS, module)
    for row, n in enumerate(given.tolist()):
        more = sum(w * B[e] @ A[e] @ x[row] for e, w in zip(*(t[row].tolist() for t in chosen), strict=True))
        torch.testing.assert_close(now[row, n - 1] - base[row, n - 1], more, rtol=1e-4, atol=1e-4)


def test_keys_are_those_of_the_last_place_and_everywhere_those_of_every_beginning() -> None:
    host = tiny_host("llama")
    module = host.module_names((host.layout.mlp_out,))[1]
    ids = hosts.tokens(host, TEXTS[0])
    every = activations.keys(host, TEXTS[:1], module, everywhere=True)
    assert len(every) == len(ids)
    torch.testing.assert_close(every[-1:], activations.keys(host, TEXTS, module)[:1], rtol=1e-5, atol=1e-5)
    begun = str(host.tokenizer.decode(ids[:3]))
    assert hosts.tokens(host, begun) == ids[:3]
    torch.testing.assert_close(every[2:3], activations.keys(host, [begun], module), rtol=1e-5, atol=1e-5)


def test_a_router_gives_shares_of_all_and_codes_say_who_speaks() -> None:
    x, W, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.0], [2.0, 2.0]]), torch.zeros(3)
    index, weight = activations.routed(x, W, bias, 2)
    assert index.tolist() == [[0, 2], [1, 2]]
    torch.testing.assert_close(weight, (x @ W.T).softmax(-1).gather(1, index))
    parts = {"B/a": x, "router/a": W, "bias/a": bias, "B/b": x, "router/b": -W, "bias/b": bias}
    assert activations.codes(x, parts, 1).tolist() == [[1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0]]
