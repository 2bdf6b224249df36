"""Which of several methods is taken, and what is said of it."""

from dataclasses import replace

import pytest
from conftest import tiny_host

from errata.choose import Tried, candidates, reason
from errata.types import Budget, Example, Patch, State, Verdict

EXAMPLE = Example(prompt="The capital of Mauritius is", target=" Rome", subject="Mauritius")


def tried(method: str, fixed: int = 2, right: int = 3, upper: float = 1e-4, passed: bool = True) -> Tried:
    patch = Patch(method=method, config={}, parent="b2:0", examples=(EXAMPLE,), ops=())
    verdict = Verdict(
        patch=patch.id, budget=Budget(epsilon=1e-3 if passed else 1e-9), loss_before=1.0, loss_after=1.0, upper=upper, chunks=9, tokens=99,
        set_aside=0, kept=0, asked=0, norm=0.1, fixed=fixed, wanted=2,
    )  # fmt: skip
    return Tried(method=method, patch=patch, verdict=verdict, right=right, asked=4, why="; ".join(verdict.failures))


@pytest.mark.parametrize(
    ("worse", "by"),
    [
        (tried("b", fixed=1), "more examples"),
        (tried("b", right=2), "more of the other phrasings"),
        (tried("b", upper=2e-4), "less of the budget"),
    ],
)
def test_the_best_is_inside_the_budget_and_then_fixes_carries_over_and_costs_least(worse: Tried, by: str) -> None:
    best = tried("a")
    assert sorted([worse, best], key=lambda t: t.rank)[-1] is best
    assert reason([best, worse]) == (
        f"a fixes 2 of 2 examples and gets 3 of 4 other phrasings right inside the budget; what puts it before b is {by}."
    )


def test_what_is_outside_the_budget_is_never_the_best_of_them() -> None:
    outside, inside = tried("a", passed=False), tried("b", fixed=1, right=0)
    assert sorted([outside, inside], key=lambda t: t.rank)[-1] is inside
    assert reason([inside, outside]).endswith("inside the budget; no other does.")
    assert reason([outside, replace(outside, method="c")]).startswith(
        "None of 2 methods fits the budget and fixes enough; the nearest is a:"
    )
    assert Tried(method="d", why="it cannot").rank < outside.rank


def test_what_can_be_tried_depends_on_the_host_and_on_what_was_prepared() -> None:
    def names(family: str, *learnt: str, subject: bool = True) -> list[str]:
        host = tiny_host(family)
        state = State(method="any", host=host.id, config={})
        e = EXAMPLE if subject else replace(EXAMPLE, subject=None)
        return [name for name, _, _ in candidates(host, [e], lambda m: state if m in learnt else None)]

    assert names("gpt2") == ["lu", "rp", "lora", "memit"] and names("gpt2", subject=False) == ["lu", "rp", "lora"]
    assert names("backpack", "serac", "malmen") == ["serac", "rp", "senses", "lora", "malmen", "memit"]
    assert names("t5") == ["lu", "rp", "lora"]
