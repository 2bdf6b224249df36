"""Every invariant that types.py checks at construction, the names by content, and the error tree."""

import builtins
import copy
import dataclasses
import itertools
import json
import math
import pickle
import re
from typing import Any, get_args

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata import types
from errata.types import (
    GOALS,
    RINGS,
    Add,
    AddLowRank,
    Budget,
    BudgetError,
    Case,
    EditError,
    Ensemble,
    Example,
    InvalidExample,
    InvalidPatch,
    InvalidReference,
    LedgerError,
    Memory,
    Method,
    Neighbour,
    Patch,
    Query,
    Rows,
    Run,
    ScopeCase,
    Score,
    Senses,
    State,
    UnknownName,
    Verdict,
    canonical_json,
    digest,
    no_progress,
    tensor_bytes,
)

TEXT = st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
PARENT = "b2:" + "0" * 32


def made(cls: type, **given: Any) -> Any:
    """`cls(**given)` as it is outside the tests, where nobody checks annotations at run time: the class's own checks have to do."""
    value = object.__new__(cls)
    for f in dataclasses.fields(cls):
        object.__setattr__(value, f.name, given[f.name] if f.name in given else f.default)
    value.__post_init__()
    return value


def example(**change: Any) -> Any:
    return made(Example, **{"prompt": "The capital of Mauritius is", "target": " Port Louis"} | change)


@st.composite
def examples(draw: st.DrawFn) -> dict[str, Any]:
    goal = draw(st.sampled_from(GOALS))
    prompt, target = draw(TEXT), draw(TEXT)
    contrast = draw(TEXT.filter(lambda t: t != target)) if goal in ("prefer", "balance") else None
    start = draw(st.integers(0, len(prompt) - 1))
    subject = draw(st.none() | st.just(prompt[start : start + 3]))
    return {"prompt": prompt, "target": target, "contrast": contrast, "subject": subject, "goal": goal}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    texts = st.lists(TEXT, max_size=2)
    return {
        "example": draw(examples()),
        "old": draw(st.none() | TEXT),
        "paraphrases": draw(texts),
        "paragraphs": draw(texts),
        "neighbours": draw(st.lists(st.fixed_dictionaries({"prompt": TEXT, "answer": TEXT, "ring": st.sampled_from(RINGS)}), max_size=2)),
        "negations": draw(texts),
        "source": draw(st.text(alphabet=st.characters(codec="utf-8"), max_size=5)),
    }


# -------------------------------------------------------------------------------------------------------------------- the error tree


def drawn_tree() -> dict[str, str]:
    """{class: built-in} as drawn in the docstring of types.py."""
    return dict(re.findall(r"^[├└]── (\w+)\s+\((\w+)\)", types.__doc__ or "", flags=re.M))


def test_the_error_tree_is_the_one_that_is_drawn() -> None:
    classes = {c.__name__: c for c in vars(types).values() if isinstance(c, type) and issubclass(c, EditError) and c is not EditError}
    drawn = drawn_tree()
    assert drawn.keys() == classes.keys()
    for name, builtin in drawn.items():
        assert classes[name].__bases__ == (EditError, getattr(builtins, builtin))


@pytest.mark.parametrize("name", sorted(drawn_tree()))
def test_an_error_prints_its_sentence_and_survives_a_pickle(name: str) -> None:
    error = getattr(types, name)("Patch b2:4f was made for 'b2:a1'.")
    assert str(error) == "Patch b2:4f was made for 'b2:a1'."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(getattr(types, name)()) == ""


def test_an_unknown_name_suggests_the_nearest() -> None:
    error = UnknownName.among("method", "memti", {"memit", "grace", "finetune"})
    assert isinstance(error, KeyError)
    assert str(error) == "Unknown method 'memti'. Did you mean memit? Known: finetune, grace, memit."
    assert str(UnknownName.among("method", "zzz", ["grace"])) == "Unknown method 'zzz'. Known: grace."
    assert str(UnknownName.among("record", "x", [])) == "Unknown record 'x'. Known: none."


def test_an_unknown_name_among_hundreds_does_not_list_them_all() -> None:
    text = str(UnknownName.among("module", "layer.277", (f"layer.{i:03}.mlp" for i in range(300))))
    assert "Did you mean layer.277.mlp?" in text and "and 260 more." in text and len(text) < 1000


# -------------------------------------------------------------------------------------------------------------------- names by content


PARTS = st.lists(st.binary(max_size=6), max_size=4)


@given(PARTS, PARTS)
def test_digest_tells_different_parts_apart(a: list[bytes], b: list[bytes]) -> None:
    assert (digest(*a) == digest(*b)) == (a == b)


@given(st.binary(max_size=5), st.integers(0, 5))
def test_digest_sees_where_a_part_ends(whole: bytes, cut: int) -> None:
    assert digest(whole) != digest(whole[:cut], whole[cut:])


def test_digest_is_pinned() -> None:
    assert digest("ab", "c") == "b2:4826ed043ab3cdec576d8541fa5d5a80"
    assert digest("é") == digest("é".encode())


def test_tensor_bytes_are_row_major_whatever_the_strides() -> None:
    t = torch.arange(6.0).reshape(2, 3)
    assert tensor_bytes(t.T) == tensor_bytes(t.T.contiguous()) != tensor_bytes(t)
    assert len(tensor_bytes(t.bfloat16())) == 12
    assert tensor_bytes(torch.zeros(0)) == b""
    assert tensor_bytes(torch.tensor(1.0)) == torch.tensor([1.0]).numpy().tobytes()
    assert tensor_bytes(torch.zeros(2).expand(3, 2)) == bytes(24)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)))
def test_canonical_json_has_one_spelling(value: object) -> None:
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "\ud83d", {"a": object()}, {1: 0, "b": 0}])
def test_canonical_json_refuses_what_has_no_spelling(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical_json(value)


# ------------------------------------------------------------------------------------------------------------------------- Example


@pytest.mark.parametrize("change, told", [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"target": ""}, "target of 'The capital of Mauritius is' is empty"),
    ({"target": "  "}, "is empty"),
    ({"goal": "rise"}, "Known: raise, lower, prefer, balance"),
    ({"contrast": " Paris"}, "'raise' takes no contrast"),
    ({"contrast": " Paris", "goal": "lower"}, "'lower' takes no contrast"),
    ({"goal": "prefer"}, "'prefer' needs contrast"),
    ({"goal": "balance"}, "'balance' needs contrast"),
    ({"goal": "prefer", "contrast": ""}, "contrast of 'The capital of Mauritius is' is empty"),
    ({"goal": "balance", "contrast": " Port Louis"}, "are the same"),
    ({"subject": "France"}, "'France' does not stand in the prompt"),
    ({"subject": ""}, "does not stand in the prompt"),
    ({"prompt": 5}, "prompt must be text, got int 5"),
    ({"target": None}, "target must be text"),
    ({"subject": ["Mauritius"]}, "subject must be text"),
    ({"prompt": "Half \ud83d"}, "half a character"),
    ({"target": "\udc00"}, "half a character"),
])  # fmt: skip
def test_an_example_that_cannot_be_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidExample, match=re.escape(told)):
        example(**change)


@given(examples())
def test_an_example_is_its_content(raw: dict[str, Any]) -> None:
    e = Example(**raw)
    again = Example(**json.loads(json.dumps(e.as_dict())))
    assert again == e and again.id == e.id and hash(again) == hash(e)
    assert re.fullmatch(r"b2:[0-9a-f]{32}", e.id)
    assert str(e).startswith(f"{e.prompt}|{e.target}")


def test_every_field_of_an_example_is_in_its_id() -> None:
    base = {"prompt": "a b", "target": "c", "contrast": "d", "subject": "a", "goal": "prefer"}
    other = [{}, {"prompt": "a c"}, {"target": "e"}, {"contrast": "e"}, {"subject": None}, {"goal": "balance"}]
    assert len({Example(**base | change).id for change in other}) == len(other)


def test_text_is_kept_as_it_is_written() -> None:
    e = example(target="Port Louis ")
    assert (e.prompt + e.target).endswith("isPort Louis ")
    assert str(example(goal="prefer", contrast=" Paris")) == "The capital of Mauritius is| Port Louis /  Paris"


# ---------------------------------------------------------------------------------------------------------------------------- Case


@given(cases())
def test_a_case_survives_the_round_trip(raw: dict[str, Any]) -> None:
    case = Case.from_dict(raw)
    again = Case.from_dict(json.loads(json.dumps(case.as_dict())))
    assert again == case and again.id == case.id and json.loads(json.dumps(case.as_dict())) == raw


@given(cases(), cases())
def test_different_cases_have_different_names(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (Case.from_dict(a).id == Case.from_dict(b).id) == (a == b)


def test_a_case_needs_only_its_example() -> None:
    assert Case.from_dict({"example": {"prompt": "a", "target": "b"}}) == Case(example=Example(prompt="a", target="b"))


@pytest.mark.parametrize("raw", [
    {},
    {"example": None},
    {"example": {"prompt": "a"}},
    {"example": {"prompt": "a", "target": ""}},
    {"example": {"prompt": "a", "target": "b"}, "surprise": 1},
    {"example": {"prompt": "a", "target": "b", "surprise": 1}},
    {"example": {"prompt": "a", "target": "b"}, "neighbours": [{"prompt": "a"}]},
    {"example": {"prompt": "a", "target": "b"}, "neighbours": [5]},
    {"example": {"prompt": "a", "target": "b"}, "paraphrases": None},
    {"example": {"prompt": "a", "target": "b"}, "paraphrases": "one text, not a list"},
    {"example": {"prompt": "a", "target": "b"}, "paragraphs": [5]},
    {"example": {"prompt": "a", "target": "b"}, "negations": ["\ud83d"]},
    {"example": {"prompt": "a", "target": "b"}, "old": 5},
    {"example": {"prompt": "a", "target": "b"}, "source": None},
])  # fmt: skip
def test_what_is_not_a_case_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(InvalidExample):
        Case.from_dict(raw)


@pytest.mark.parametrize("change", [{"paraphrases": "ab"}, {"paragraphs": (5,)}, {"negations": ("\ud83d",)}, {"old": 5}, {"source": None}])
def test_a_case_checks_its_texts(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidExample):
        made(Case, example=example(), **change)


@pytest.mark.parametrize("change", [{"prompt": " "}, {"answer": ""}, {"ring": "far"}, {"prompt": 5}, {"answer": "\udfff"}])
def test_a_neighbour_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidExample):
        made(Neighbour, **{"prompt": "Paris is the capital of", "answer": " France", "ring": "relation"} | change)


# --------------------------------------------------------------------------------------------------------------------- ops and Patch


def patch(**change: Any) -> Any:
    ops = (Add(weight="w", delta=torch.ones(2, 3)), AddLowRank(weight="v", A=torch.ones(1, 3), B=torch.ones(2, 1), scale=0.5))
    config = {"lr": 0.1, "layers": [1, 2]}
    return made(Patch, **{"method": "finetune", "config": config, "parent": PARENT, "examples": (example(),), "ops": ops} | change)


def senses(**change: Any) -> Any:
    rows = {"ids": torch.tensor([3, 3, 7]), "senses": torch.tensor([0, 2, 1]), "shift": torch.ones(3, 4)}
    return made(Senses, **{"weight": "backpack.overrides.senses"} | rows | change)


def test_shifts_of_senses_are_whole_and_in_their_id() -> None:
    assert senses().tensors.keys() == {"ids", "senses", "shift"}
    changes = ({}, {"ids": torch.tensor([3, 4, 7])}, {"senses": torch.tensor([0, 1, 1])}, {"shift": torch.zeros(3, 4)}, {"weight": "w"})
    assert len({patch(ops=(senses(**change),)).id for change in changes}) == len(changes)
    nothing = senses(ids=torch.zeros(0).long(), senses=torch.zeros(0).long(), shift=torch.zeros(0, 4))
    assert patch(ops=(nothing,)).nbytes == 0


@pytest.mark.parametrize("change, told", [
    ({"shift": torch.full((3, 4), math.nan)}, "shift of 'backpack.overrides.senses' holds NaN or infinity"),
    ({"shift": torch.ones(3, 4, dtype=torch.bfloat16)}, "must be float32 on the CPU"),
    ({"shift": torch.ones(3)}, "3 tokens, 3 senses and shifts .3,."),
    ({"shift": torch.ones(2, 4)}, "3 tokens, 3 senses and shifts .2, 4."),
    ({"senses": torch.tensor([0])}, "3 tokens, 1 senses"),
    ({"ids": torch.tensor([3.0, 3.0, 7.0])}, "ids of 'backpack.overrides.senses' must be one row of int64"),
    ({"senses": torch.tensor([0, 2, 1], dtype=torch.int32)}, "senses of 'backpack.overrides.senses' must be one row of int64"),
    ({"ids": torch.tensor([[3, 3, 7]])}, "must be one row of int64"),
    ({"ids": torch.tensor([-1, 3, 7])}, "no sense 0 of token -1"),
    ({"senses": torch.tensor([-2, 2, 1])}, "no sense -2 of token 3"),
    ({"senses": torch.tensor([2, 2, 1])}, "Sense 2 of token 3 stands in the shifts .* twice"),
    ({"senses": torch.tensor([2, 0, 1])}, "Sense 0 of token 3 stands in the shifts .* out of order"),
    ({"ids": torch.tensor([7, 3, 3])}, "Sense 2 of token 3 stands in the shifts .* out of order"),
    ({"weight": ""}, "needs the name of a parameter"),
])  # fmt: skip
def test_shifts_of_senses_that_cannot_be_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidPatch, match=told):
        senses(**change)


def ensemble(**change: Any) -> Any:
    return made(Ensemble, **{"weight": "lm_head", "small": "lab/backpack", "parent": PARENT, "shift": senses()} | change)


def test_all_that_an_ensemble_is_is_in_its_id() -> None:
    assert ensemble().scale == 1.0 and ensemble().tensors.keys() == {"ids", "senses", "shift"}
    shifts = (senses(shift=torch.zeros(3, 4)), senses(weight="w"))
    changes = ({}, {"weight": "head"}, {"small": "lab/x"}, {"parent": "b2:0"}, {"scale": 0.5}, *({"shift": s} for s in shifts))
    assert len({patch(ops=(ensemble(**change),)).id for change in changes}) == len(changes)
    assert len({patch(ops=(ensemble(scale=one),)).id for one in (1, 1.0, numpy.float64(1))}) == 1
    assert patch(ops=(ensemble(),)).nbytes == patch(ops=(senses(),)).nbytes


@pytest.mark.parametrize("change, told", [
    ({"weight": ""}, "needs the name of a parameter"),
    ({"small": ""}, "needs the name of the small model and the id of its weights"),
    ({"small": 3}, "needs the name of the small model"),
    ({"parent": "abc"}, "the id of its weights, got 'lab/backpack' and 'abc'"),
    ({"shift": Add(weight="w", delta=torch.ones(1))}, "comes from shifts of its senses, got Add"),
    ({"scale": math.nan}, "The scale of 'lm_head' is nan"),
    ({"scale": math.inf}, "The scale of 'lm_head' is inf"),
])  # fmt: skip
def test_an_ensemble_that_cannot_be_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidPatch, match=told):
        ensemble(**change)
    with pytest.raises(InvalidPatch, match="plain finite JSON"):
        patch(ops=(ensemble(small="\ud800"),))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["delta", "A", "B"])
def test_an_op_holds_finite_numbers_only(name: str, bad: float) -> None:
    t = {"delta": torch.zeros(2, 3), "A": torch.zeros(1, 3), "B": torch.zeros(2, 1)}
    t[name][0, 0] = bad
    with pytest.raises(InvalidPatch, match=f"{name} of 'w' holds NaN or infinity"):
        Add(weight="w", delta=t["delta"]) if name == "delta" else AddLowRank(weight="w", A=t["A"], B=t["B"])


@pytest.mark.parametrize("t", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, device="meta")])
def test_an_op_is_float32_on_the_cpu(t: torch.Tensor) -> None:
    with pytest.raises(InvalidPatch, match="must be float32 on the CPU"):
        Add(weight="w", delta=t)


@pytest.mark.parametrize("A, B", [((1, 3), (2, 2)), ((3,), (2, 1)), ((1, 3), (2,)), ((2, 3), (2, 1, 1))])
def test_factors_must_meet(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(InvalidPatch, match="do not meet"):
        AddLowRank(weight="w", A=torch.zeros(A), B=torch.zeros(B))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_the_scale_is_finite(scale: float) -> None:
    with pytest.raises(InvalidPatch, match="scale of 'w'"):
        AddLowRank(weight="w", A=torch.zeros(1, 3), B=torch.zeros(2, 1), scale=scale)


def test_a_scale_is_one_number_however_it_was_spelt() -> None:
    def named(scale: Any) -> str:
        return patch(ops=(made(AddLowRank, weight="v", A=torch.ones(1, 3), B=torch.ones(2, 1), scale=scale),)).id

    assert named(2.0) == named(2) == named(numpy.float64(2)) == named(torch.tensor(2.0))


@pytest.mark.parametrize("weight", ["", 5, None])
def test_an_op_names_a_parameter(weight: Any) -> None:
    with pytest.raises(InvalidPatch, match="needs the name of a parameter"):
        made(Add, weight=weight, delta=torch.zeros(2))


@pytest.mark.parametrize("change, told", [
    ({"ops": (Add(weight="w", delta=torch.zeros(1)), Add(weight="w", delta=torch.zeros(1)))}, "one op for each weight, got w, w"),
    ({"config": {"lr": math.nan}}, "plain finite JSON"),
    ({"config": {"f": print}}, "plain finite JSON"),
    ({"config": {"text": "\ud83d"}}, "plain finite JSON"),
    ({"config": 5}, "plain finite JSON"),
    ({"method": "\ud83d"}, "plain finite JSON"),
    ({"ops": (Add(weight="\ud83d", delta=torch.zeros(1)),)}, "plain finite JSON"),
    ({"parent": ""}, "needs the id of the weights"),
    ({"parent": "main"}, "needs the id of the weights"),
    ({"parent": 5}, "needs the id of the weights"),
    ({"method": ""}, "needs the name of the method"),
    ({"method": 5}, "needs the name of the method"),
])  # fmt: skip
def test_a_patch_that_cannot_be_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidPatch, match=re.escape(told)):
        patch(**change)


def test_the_id_of_a_patch_is_its_content() -> None:
    a, b = patch().ops
    assert patch().id == patch(ops=(b, a)).id, "the order of ops does not count"
    assert patch().id == dataclasses.replace(patch()).id
    assert patch(config={"layers": (1, 2), "lr": 0.1}).id == patch().id, "a tuple and a list are one spelling"
    one, two = example(), example(prompt="Mauritius is governed from")
    assert patch(examples=(one, two)).id != patch(examples=(two, one)).id, "the order of examples counts"
    other = [
        {},
        {"method": "lora"},
        {"config": {}},
        {"parent": PARENT[:-1] + "1"},
        {"examples": ()},
        {"examples": (two,)},
        {"ops": ()},
        {"ops": (a,)},
        {"ops": (Add(weight="x", delta=a.delta), b)},
        {"ops": (Add(weight="w", delta=a.delta.reshape(3, 2)), b)},
        {"ops": (Add(weight="w", delta=a.delta + 1e-7), b)},
        {"ops": (Add(weight="w", delta=torch.zeros(2, 3)), b)},
        {"ops": (Add(weight="w", delta=-torch.zeros(2, 3)), b)},
        {"ops": (a, dataclasses.replace(b, scale=0.25))},
        {"ops": (a, dataclasses.replace(b, A=b.A * 0.5, scale=1.0))},
    ]
    assert len({patch(**change).id for change in other}) == len(other)


def test_a_patch_counts_its_bytes() -> None:
    assert patch().nbytes == 4 * (6 + 3 + 2)


def test_a_config_is_a_copy() -> None:
    mine = {"layers": [1]}
    p = patch(config=mine)
    before = p.id
    mine["layers"].append(2)
    assert p.id == before and dict(p.config) == {"layers": [1]}
    with pytest.raises(TypeError):
        p.config["layers"] = 1  # type: ignore[index]


# ------------------------------------------------------------------------------------------------------------------- Budget, Verdict


@pytest.mark.parametrize("change", [
    {"epsilon": 0.0}, {"epsilon": -1e-3}, {"epsilon": math.nan}, {"epsilon": math.inf},
    {"neighbours": 1.1}, {"neighbours": -0.1}, {"neighbours": math.nan},
    {"fixed": 2.0}, {"fixed": -1.0}, {"fixed": math.nan}, {"fixed": None},
    {"norm": 0.0}, {"norm": -1.0}, {"norm": math.nan},
])  # fmt: skip
def test_a_budget_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        made(Budget, **change)


def verdict(**change: Any) -> Verdict:
    fields = {
        **{"patch": PARENT, "budget": Budget(epsilon=1e-3, neighbours=0.9, norm=0.1), "loss_before": 2.0, "loss_after": 2.001},
        **{"upper": 8e-4, "chunks": 10, "tokens": 1000, "set_aside": 1, "kept": 9, "asked": 10, "norm": 0.05, "fixed": 1, "wanted": 1},
    }
    return Verdict(**fields | change)


def test_a_verdict_inside_every_limit_passes() -> None:
    v = verdict()
    assert v.passed and v.affordable and v.failures == ()
    assert v.increase == pytest.approx(5e-4) and v.spent == pytest.approx(0.8)
    assert Verdict.from_dict(json.loads(canonical_json(v.as_dict()))) == v


@pytest.mark.parametrize("change, told, affordable", [
    ({"upper": 1.01e-3}, "95 % confidence", False),
    ({"kept": 8}, "8 of 10 neighbours kept", False),
    ({"kept": 0, "asked": 0}, "0 of 0 neighbours kept", False),
    ({"norm": 0.2}, "relative norm 0.2", False),
    ({"fixed": 0}, "0 of 1 examples fixed", True),
    ({"fixed": 1, "wanted": 3}, "1 of 3 examples fixed", True),
])  # fmt: skip
def test_a_verdict_outside_one_limit_fails_with_its_numbers(change: dict[str, Any], told: str, affordable: bool) -> None:
    v = verdict(**change)
    assert not v.passed and v.affordable == affordable
    assert len(v.failures) == 1 and told in v.failures[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["upper", "loss_before", "loss_after", "norm", "scale"])
@pytest.mark.parametrize("budget", [Budget(), Budget(neighbours=0.0, norm=1e9, fixed=0.0, epsilon=1e9)])
def test_what_is_not_finite_never_passes(field: str, bad: float, budget: Budget) -> None:
    v = verdict(**{field: bad}, budget=budget)
    assert not v.passed and not v.affordable and any("not finite" in f for f in v.failures)


def test_a_loss_of_nothing_has_no_relative_increase() -> None:
    v = verdict(loss_before=0.0, upper=math.nan)
    assert math.isnan(v.increase) and not v.passed and v.failures


def test_passed_is_computed_and_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        verdict().passed = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        verdict(passed=True)
    with pytest.raises(TypeError):
        Verdict.from_dict(verdict(upper=1.0).as_dict() | {"passed": True})


@given(st.floats(), st.floats(1e-6, 1.0), st.integers(0, 5), st.integers(0, 5))
def test_a_verdict_passes_exactly_inside_its_limits(upper: float, epsilon: float, kept: int, more: int) -> None:
    v = verdict(upper=upper, kept=kept, asked=kept + more, budget=Budget(epsilon=epsilon, neighbours=0.5))
    assert v.passed == (math.isfinite(upper) and upper <= epsilon and kept + more > 0 and 2 * kept >= kept + more)
    assert v.passed == (v.failures == ())


@pytest.mark.parametrize("change, error", [
    ({"chunks": 1}, InvalidReference),
    ({"chunks": 0, "tokens": 0}, InvalidReference),
    ({"chunks": 10, "tokens": 9}, InvalidReference),
    ({"kept": 11}, BudgetError),
    ({"kept": -1}, BudgetError),
    ({"fixed": 2}, BudgetError),
    ({"fixed": -1}, BudgetError),
])  # fmt: skip
def test_a_verdict_over_nothing_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        verdict(**change)


# ------------------------------------------------------------------------------------------------------------ Score, State, Run, Method


def test_a_score_is_a_sum_and_its_denominator() -> None:
    assert Score(case="c", measure="m", total=3.0, count=4).value == 0.75
    assert Score(case="c", measure="m", total=0.0, count=0).value is None


@pytest.mark.parametrize("total, count", [(1.0, 0), (math.nan, 0), (1.0, -1)])
def test_a_score_that_cannot_be_is_refused(total: float, count: int) -> None:
    with pytest.raises(ValueError):
        Score(case="c", measure="m", total=total, count=count)


def test_the_id_of_a_state_is_its_content() -> None:
    def state(**change: Any) -> State:
        return State(
            **{"method": "memit", "host": PARENT, "config": {"n": 1}, "tensors": {"K": torch.ones(2)}, "trained_on": frozenset("ab")}
            | change
        )

    assert state().id == state(trained_on=frozenset("ba")).id == state(tensors={"K": torch.ones(2)}).id
    other = [
        *({}, {"method": "x"}, {"host": "x"}, {"config": {}}, {"trained_on": frozenset("a")}, {"tensors": {}}),
        *({"tensors": {"V": torch.ones(2)}}, {"tensors": {"K": torch.ones(1, 2)}}, {"tensors": {"K": torch.zeros(2)}}),
        *({"tensors": {"K": torch.ones(2).view(kind)}} for kind in (torch.int32, torch.uint32)),  # the same bytes
    ]
    assert len({state(**change).id for change in other}) == len(other)
    assert state(config={"n": (1, 2)}).config == {"n": [1, 2]}, "a tuple and a list are one spelling"


@pytest.mark.parametrize("config", [{"n": math.nan}, {"f": print}, {"text": "\ud83d"}])
def test_the_config_of_a_state_is_plain_finite_json(config: Any) -> None:
    with pytest.raises(ValueError, match="config of a state must be plain finite JSON"):
        State(method="memit", host=PARENT, config=config)


def test_a_run_needs_nothing() -> None:
    assert Run() == Run(budget=Budget(epsilon=1e-3)) and Run().state is None
    assert list(no_progress([1, 2], "x", 2)) == list(itertools.islice(Run().progress(iter([1, 2]), "x", 2), 2)) == [1, 2]


def test_a_method_shows_its_fields_and_prepares_nothing_by_default(tiny_gpt2: Any) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Nothing(Method):
        rate: float = 0.5

        def edit(self, host: Any, examples: tuple[Example, ...], run: Run) -> Patch:
            return Patch(method="nothing", config=self.config, parent=host.id, examples=examples, ops=())

    assert Nothing().config == {"rate": 0.5}
    assert Nothing().prepare(tiny_gpt2, [], Run()) is None
    assert Nothing().edit(tiny_gpt2, (example(),), Run()).parent == tiny_gpt2.id
    with pytest.raises(TypeError):
        Method()  # type: ignore[abstract]


VALUES = {
    "Example": example,
    "Record": lambda: types.Record(example=example()),
    "Neighbour": lambda: Neighbour(prompt="a", answer="b", ring="subject"),
    "Case": lambda: Case(example=example()),
    "Query": lambda: Query(prompt="a"),
    "ScopeCase": lambda: ScopeCase(example=example(), outside=(Query(prompt="a"),)),
    "Add": lambda: Add(weight="w", delta=torch.zeros(1)),
    "AddLowRank": lambda: AddLowRank(weight="w", A=torch.zeros(1, 1), B=torch.zeros(1, 1)),
    "Senses": senses,
    "Ensemble": ensemble,
    "Memory": lambda: Memory(
        weight="w", vectors=torch.zeros(1, 2), owner=torch.zeros(1, dtype=torch.long), gate="distance", voice="stored"
    ),
    "Patch": patch,
    "Budget": Budget,
    "Verdict": verdict,
    "Score": lambda: Score(case="c", measure="m", total=0.0, count=0),
    "State": lambda: State(method="m", host="h", config={}),
    "Run": Run,
    "Rows": lambda: Rows(host="h", example=example(), keys={"m": torch.zeros(1, 2)}, values={"m": torch.zeros(1, 3)}),
}


def test_every_value_is_listed_here() -> None:
    assert VALUES.keys() == {
        n for n, c in vars(types).items() if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == types.__name__
    }


@pytest.mark.parametrize("name", VALUES)
def test_values_are_frozen_keyword_only_and_final(name: str) -> None:
    value = VALUES[name]()
    field = dataclasses.fields(value)[0]
    assert all(f.kw_only for f in dataclasses.fields(value))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field.name, getattr(value, field.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(value, field.name)
    assert type(value).__final__, "a class is Method, or it is @final"


def test_the_ops_are_the_closed_union() -> None:
    assert set(types.OPS.values()) == set(get_args(types.Op))
    assert all(name == kind.__name__ for name, kind in types.OPS.items())


def test_a_ledger_error_is_not_read_as_an_errno() -> None:
    assert isinstance(LedgerError("busy"), OSError) and copy.copy(LedgerError("busy")).args == ("busy",)


def test_rows_are_one_key_and_one_value_for_each_token() -> None:
    def rows(**change: Any) -> Any:
        good = {"keys": {"m": torch.ones(2, 3)}, "values": {"m": torch.ones(2, 4)}}
        return made(Rows, **{"host": PARENT, "example": example()} | good | change)

    assert rows().keys["m"].shape == (2, 3)
    for wrong, told in (
        ({"values": {"m": torch.ones(3, 4)}}, "one row for each token"),
        ({"values": {"n": torch.ones(2, 4)}}, "other modules"),
        ({"keys": {"m": torch.ones(2, 3).double()}}, "float32"),
        ({"values": {"m": torch.full((2, 4), math.nan)}}, "NaN"),
    ):
        with pytest.raises(InvalidPatch, match=told):
            rows(**wrong)


EDIT = Example(prompt="What is the capital of Mauritius?", target=" Port Louis", subject="Mauritius")
INSIDE = (
    Query(prompt=EDIT.prompt, answer=EDIT.target, kind="edit"),
    Query(prompt="Name the capital of Mauritius.", answer=" Port Louis", kind="rephrase"),
    Query(prompt="Which country has the capital Port Louis?", answer=" Mauritius", kind="implication", hard=True),
)
OUTSIDE = (
    Query(prompt="What is the currency of Mauritius?", answer=" rupee", kind="subject", hard=True),
    Query(prompt="T/F: Paris is old.", answer=" True", kind="yes/no", hard=True),
    Query(prompt="Who wrote Faust?", answer=" Goethe"),
    Query(prompt="Faust is a play."),
)


def test_a_scope_case_says_to_a_case_what_a_case_can_hold() -> None:
    case = ScopeCase(example=EDIT, inside=INSIDE, outside=OUTSIDE, about="Mauritius", source="s").case
    assert case.example == EDIT and case.paraphrases == ("Name the capital of Mauritius.",) and case.source == "s"
    assert [(n.prompt, n.answer, n.ring) for n in case.neighbours] == [
        ("What is the currency of Mauritius?", " rupee", "subject"),
        ("T/F: Paris is old.", " True", "relation"),
        ("Who wrote Faust?", " Goethe", "unrelated"),
    ]


def test_a_scope_case_is_named_by_everything_in_it() -> None:
    case = ScopeCase(example=EDIT, inside=INSIDE, outside=OUTSIDE)
    others = [
        dataclasses.replace(case, about="a"),
        dataclasses.replace(case, against=INSIDE[:1]),
        dataclasses.replace(case, outside=OUTSIDE[1:]),
        dataclasses.replace(case, inside=(*INSIDE[:2], dataclasses.replace(INSIDE[2], hard=False))),
    ]
    assert len({c.id for c in (case, *others)}) == 5
    assert dataclasses.replace(case).id == case.id and json.dumps(case.as_dict())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"inside": (), "outside": ()}, "no query in its scope and none out of it"),
        ({"inside": (Query(prompt="a"),)}, "say what should be answered"),
        ({"against": (Query(prompt="a"),)}, "say what should be answered"),
        ({"outside": (Query(prompt="name the capital of Mauritius"),)}, "stands in the scope of .* and out of it"),
        ({"outside": (Query(prompt=EDIT.prompt),)}, "stands in the scope of .* and out of it"),
        ({"against": (Query(prompt="a", answer="b"),), "outside": (Query(prompt="A?"),)}, "stands in the scope of .* and out of it"),
        ({"about": 3}, "about must be text"),
    ],
)
def test_what_is_no_scope_case(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidExample, match=told):
        made(ScopeCase, **{"example": EDIT, "inside": INSIDE, "outside": OUTSIDE} | change)


@pytest.mark.parametrize("change", [{"prompt": " "}, {"answer": ""}, {"prompt": "\ud800"}, {"kind": None}])
def test_what_is_no_query(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidExample):
        made(Query, **{"prompt": "a"} | change)
