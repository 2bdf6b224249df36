"""The ensemble: its beta against the formula, on text that the descent has not seen; a small model from a folder; the logits processor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, same_bits, tiny_host, weights_of

import errata
from errata import apply, artefact, hosts
from errata.hosts import Host
from errata.methods import ensemble
from errata.methods.ensemble import Ensemble
from errata.types import Add, Budget, Example, InvalidExample, InvalidPatch, Patch, Run, UnknownArchitecture, UnknownName, WrongBase
from errata.types import Ensemble as Op
from errata.types import Senses as Shift

EXAMPLES = (
    Example(prompt="The capital of Mauritius is", target=" Port Louis"),
    Example(prompt="The nurse said that", target=" he", contrast=" she", goal="prefer"),
)
RUN = Run(hold=tuple(t for t in TEXT for _ in range(2)), budget=Budget(epsilon=0.5))
SMALL: dict[str, Any] = {"small": "small", "steps": 12, "neighbours": 4, "hold": 8, "restated": 2}


def both(family: str = "gpt_neox", **more: Any) -> Host:
    host = tiny_host(family, **more)
    host.beside["small"] = tiny_host("backpack", seed=7)
    return host


def shift_of(host: Host, size: float = 1.0) -> Shift:
    """Every second sense of some tokens of TEXT."""
    ids = sorted({*hosts.tokens(host, " Mauritius is"), *hosts.tokens(host, "She loved")})
    rows = torch.tensor([(i, k) for i in ids for k in (0, 2)])
    shift = size * torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(3))
    return Shift(weight="backpack.overrides.senses", ids=rows[:, 0].clone(), senses=rows[:, 1].clone(), shift=shift)


def patch_of(host: Host, shift: Shift, scale: float) -> Patch:
    op = Op(weight=host.layout.head, small="small", parent=host.beside["small"].id, shift=shift, scale=scale)
    return Patch(method="ensemble", config={}, parent=host.id, examples=EXAMPLES, ops=(op,))


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_what_each_beta_costs_is_what_it_costs_when_it_is_on(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    host, betas = both(), [1.0, 0.6, 0.1, 0.0]
    monkeypatch.setattr(hosts, "at_once", lambda _: batch_size)
    shift, rows = shift_of(host, size=4.0), hosts.chunks(host, TEXT)
    found = ensemble.upper(host, host.beside["small"], shift, TEXT, betas, RUN)
    before_N2 = hosts.score(host, rows)
    for beta, cost in zip(betas, found, strict=True):
        with apply.applied(host, patch_of(host, shift, beta)):
            wanted = hosts.increase(before_N2, hosts.score(host, rows))[1]
        assert cost == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert found[0] > 0.1 and found[-1] == 0.0


def test_the_large_model_is_read_only_where_a_shift_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    host, seen = both(), []
    plain = hosts.predictions
    monkeypatch.setattr(hosts, "predictions", lambda h, batch, *more: seen.append((h, batch)) or plain(h, batch, *more))
    shift = shift_of(host)
    ensemble.upper(host, host.beside["small"], shift, TEXT, [1.0], RUN)
    asked = [batch for h, batch in seen if not batch.scored_NT[:, 1].all()]  # the others are those that score the text itself
    assert asked and all((batch.ids_NT[..., None] == shift.ids).any(-1).any(1).all() for batch in asked)


def test_beta_is_the_largest_inside_on_text_that_the_descent_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    host, seen, costs = both(), {}, ensemble.upper
    small, shift = host.beside["small"], shift_of(host, size=4.0)

    def edit(_self: Any, _small: Host, _examples: Any, run: Run) -> Patch:
        seen["descent"] = run.hold
        return Patch(method="senses", config={}, parent=small.id, examples=(), ops=(shift,))

    def upper(host: Host, small: Host, shift: Shift, documents: Sequence[str], betas: Sequence[float], run: Run) -> list[float]:
        seen["choice"], seen["costs"] = documents, costs(host, small, shift, documents, betas, run)
        return seen["costs"]

    monkeypatch.setattr(ensemble.Senses, "edit", edit)
    monkeypatch.setattr(ensemble, "upper", upper)
    text = (*TEXT, *(t.replace("Lily", "Tim").replace("France", "Spain") + " So be it." for t in TEXT))

    def op_of(epsilon: float, **more: Any) -> Op:
        (op,) = Ensemble(**SMALL | more).edit(host, EXAMPLES[:1], Run(hold=text, budget=Budget(epsilon=epsilon))).ops
        return op

    op = op_of(100.0)
    assert not {*seen["descent"]} & {*seen["choice"]} and {*seen["descent"], *seen["choice"]} < {*text}
    assert not any("Mauritius" in t and "Port Louis" in t for t in seen["choice"]), "what states the new fact is set aside"
    assert op.scale == 1.0 and op.small == "small" and op.parent == small.id and op.weight == "lm_head" and op.shift is shift
    assert 0 < seen["costs"][4] < seen["costs"][3]
    assert op_of((seen["costs"][3] + seen["costs"][4]) / 2).scale == 0.6
    assert op_of(100.0, beta=0.5).scale == 0.5
    assert op_of(1e-12).scale == 0.1, "the gate will scale it, or refuse it"


def test_the_small_model_is_edited_as_senses_does_it_and_no_other() -> None:
    host = both("llama")
    small = host.beside["small"]
    before, own = weights_of(host), weights_of(small)
    host.model.requires_grad_(False)  # nothing is learnt through it
    patch = Ensemble(**SMALL).edit(host, EXAMPLES, RUN)
    assert same_bits(host, before) and same_bits(small, own) and not host.worn and not small.worn
    wanted = ensemble.Senses(**{k: v for k, v in SMALL.items() if k != "small"})
    half = tuple(sorted(RUN.hold, key=errata.types.digest)[1::2])
    (op,) = wanted.edit(tiny_host("backpack", seed=7), EXAMPLES, Run(hold=half, budget=RUN.budget)).ops
    assert torch.equal(patch.ops[0].shift.shift, op.shift) and torch.equal(patch.ops[0].shift.ids, op.ids)


def test_a_small_model_in_a_folder_is_loaded_when_it_is_first_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, small, folder = tiny_host("llama"), tiny_host("backpack", seed=7), tmp_path / "small"
    small.model.to(torch.bfloat16).save_pretrained(folder)
    small.tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    patch = Ensemble(**SMALL | {"small": "small"}).edit(host, EXAMPLES, RUN)
    monkeypatch.chdir("/")
    assert host.beside.keys() == {str(folder)} and host.beside[str(folder)].model.dtype == torch.float32
    again = artefact.load_patch(artefact.save(patch, tmp_path / "fix.safetensors"))
    fresh = tiny_host("llama")
    with apply.applied(host, patch), apply.applied(fresh, again):
        assert torch.equal(*(hosts.logits(h, hosts.pad(h, hosts.chunks(h, TEXT))) for h in (host, fresh)))
    moved = folder.rename(tmp_path / "elsewhere")
    third = tiny_host("llama")
    with pytest.raises(UnknownName, match=f"Cannot load '{folder}'"):
        apply.put_on(third, again)
    third.beside[str(folder)] = hosts.load(str(moved), "cpu")
    with apply.applied(third, again):
        assert third.id == patch.id


def test_what_cannot_stand_together_is_refused_with_a_sentence() -> None:
    host = both("gpt2", pieces=True)
    with pytest.raises(WrongBase, match="tiny-gpt2 and tiny-backpack have different tokenizers.*reads the same tokens"):
        Ensemble(**SMALL).edit(host, EXAMPLES, RUN)
    host = both("gpt2")
    host.beside["small"] = tiny_host("gpt_neox")
    with pytest.raises(UnknownArchitecture, match="tiny-gpt_neox is no Backpack"):
        Ensemble(**SMALL).edit(host, EXAMPLES, RUN)
    with pytest.raises(UnknownName, match="Unknown lab model 'lab/nothing'"):
        Ensemble(small="lab/nothing").edit(host, EXAMPLES, RUN)
    for bad in ({"beta": 0.0}, {"beta": -1.0}, {"beta": float("nan")}, {"beta": float("inf")}, {"k": 0}):
        with pytest.raises(InvalidExample, match="needs a"):
            Ensemble(**bad)
    host = both("gpt2")
    host.beside["small"].tokenizer.add_tokens([" Mauritius"], special_tokens=False)
    assert hosts.beside(host, "small") is host.beside["small"], "a token that was added to one alone"


# ------------------------------------------------------------------------------------------------------------------ the processor


def written(host: Host, **how: Any) -> list[list[int]]:
    rows = [hosts.tokens(host, t) for t in ("The capital of Mauritius is", "She loved", "The nurse said that she")]
    width = max(map(len, rows))
    ids = torch.tensor([[host.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    how = {"attention_mask": (ids != host.tokenizer.pad_token_id).long(), "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0} | how
    whole: list[list[int]] = host.model.generate(input_ids=ids, **how).tolist()
    return whole


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}], ids=["greedy", "beams", "sample"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_processor_writes_what_the_patch_does(family: str, how: dict[str, Any]) -> None:
    host = both(family)
    patch = patch_of(host, shift_of(host), 0.8)

    def seeded(**more: Any) -> list[list[int]]:
        torch.manual_seed(0)
        return written(host, **{"do_sample": False} | how | more)

    alone, beside = seeded(), seeded(logits_processor=[errata.logits_processor(host, patch)])
    with apply.applied(host, patch):
        assert seeded() == beside != alone
    assert seeded() == alone and not host.worn


def test_its_scores_are_equation_11() -> None:
    host, scores = both(), torch.randn(2, 400, generator=torch.Generator().manual_seed(5))
    small, shift = host.beside["small"], shift_of(host)
    ids = torch.tensor([[0, 0, *hosts.tokens(host, "She loved")]] * 2)  # padded on the left
    edited = Patch(method="senses", config={}, parent=small.id, examples=(), ops=(shift,))
    text = torch.tensor([hosts.tokens(host, "She loved")])

    @torch.no_grad()
    def says() -> torch.Tensor:
        last: torch.Tensor = small.model(text).logits[:, -1].log_softmax(-1)
        return last

    base = says()
    with apply.applied(small, edited):
        after = says()
    wanted = (scores.log_softmax(-1) + 0.6 * (after - base)).log_softmax(-1)
    found = errata.logits_processor(host, patch_of(host, shift, 0.6))(ids, scores)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(errata.logits_processor(host, patch_of(host, shift, 0.6))(ids, scores + 7.0), wanted, rtol=1e-4, atol=1e-4)
    other = torch.full((2, 3), 399)
    torch.testing.assert_close(errata.logits_processor(host, patch_of(host, shift, 0.6))(other, scores), scores.log_softmax(-1))


def test_a_patch_of_weights_is_no_processor() -> None:
    host = both("gpt2")
    delta = torch.zeros(host.model.get_parameter("transformer.wte.weight").shape)
    patch = Patch(method="hand", config={}, parent=host.id, examples=EXAMPLES, ops=(Add(weight="transformer.wte.weight", delta=delta),))
    with pytest.raises(InvalidPatch, match="only one of ensemble is a logits processor"):
        errata.logits_processor(host, patch)
    with pytest.raises(WrongBase, match="was made for weights"):
        errata.logits_processor(both("gpt2", seed=1), patch_of(host, shift_of(host), 1.0))
