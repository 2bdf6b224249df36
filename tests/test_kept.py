"""Sums that stay between two edits: what came is added, what went is subtracted, and no other sums are taken for them."""

from dataclasses import replace

import pytest
import torch
from conftest import TEXT
from torch import Tensor

from errata import apply
from errata.hosts import Host
from errata.methods import _gradients
from errata.methods._gradients import Pairs
from errata.methods.ultraedit import Ultraedit
from errata.types import Example, Run, State

EXAMPLES = tuple(Example(prompt=f"Town {i} lies in the land of", target=f" Port Louis number {7 * i}") for i in range(24))
METHOD = Ultraedit(held=0, layers="1")
both_orientations = pytest.mark.parametrize("host", ["gpt2", "llama"], indirect=True)


class Book:
    """What a ledger would do: the last sums, and how many examples' rows were taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sums: State | None = None
        self.taken: list[int] = []
        gathered = _gradients.gathered

        def counted(host: Host, examples: tuple[Example, ...], *rest: object, **named: object) -> Pairs:
            self.taken.append(len(examples))
            return gathered(host, examples, *rest, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(_gradients, "gathered", counted)

    def keep(self, state: State) -> None:
        self.sums = state

    def edit(self, host: Host, examples: tuple[Example, ...], method: Ultraedit = METHOD, afresh: bool = False) -> dict[str, Tensor]:
        self.taken.clear()
        run = Run(hold=TEXT, sums=None if afresh else self.sums, keep=self.keep)
        return {op.weight: apply.change(host, op) for op in method.edit(host, examples, run).ops}


ROUNDING = 1e-5  # rows are taken in float32, and in another batch their last digits are others; the sums themselves are in float64


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    return Book(monkeypatch)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The greatest relative difference of two edits."""
    assert a.keys() == b.keys()
    return max(float((a[w].double() - b[w].double()).norm() / b[w].double().norm()) for w in a)


@both_orientations
def test_only_what_came_is_read_and_the_edit_is_that_of_all(host: Host, book: Book) -> None:
    book.edit(host, EXAMPLES[:20])
    assert book.sums is not None and book.taken == [20]
    more = book.edit(host, EXAMPLES[:22])
    assert book.taken == [2]
    assert apart(more, book.edit(host, EXAMPLES[:22], afresh=True)) < ROUNDING
    assert apart(more, book.edit(host, EXAMPLES[:20], afresh=True)) > 1e-3


@both_orientations
def test_what_went_was_never_there(host: Host, book: Book) -> None:
    book.edit(host, EXAMPLES)
    less = book.edit(host, EXAMPLES[2:])
    assert book.taken == [2]
    assert apart(less, book.edit(host, EXAMPLES[2:], afresh=True)) < ROUNDING
    book.edit(host, EXAMPLES)
    both = book.edit(host, (*EXAMPLES[:10], *EXAMPLES[12:]))
    assert book.taken == [2]
    assert apart(both, book.edit(host, (*EXAMPLES[:10], *EXAMPLES[12:]), afresh=True)) < ROUNDING


def test_the_same_again_reads_nothing_and_is_the_same_patch(tiny_gpt2: Host, book: Book) -> None:
    first = book.edit(tiny_gpt2, EXAMPLES)
    again = book.edit(tiny_gpt2, EXAMPLES[::-1])
    assert book.taken == [] and all(torch.equal(first[w], again[w]) for w in first)


def test_sums_of_other_settings_are_not_taken(tiny_gpt2: Host, book: Book) -> None:
    book.edit(tiny_gpt2, EXAMPLES)
    book.edit(tiny_gpt2, EXAMPLES, replace(METHOD, eta=2.0))
    assert sum(book.taken) == len(EXAMPLES)
    book.edit(tiny_gpt2, EXAMPLES, replace(METHOD, eta=2.0, lam=3.0))
    assert book.taken == [], "lam is not in the sums"


def test_where_most_went_the_rest_is_read_anew(tiny_gpt2: Host, book: Book) -> None:
    book.edit(tiny_gpt2, EXAMPLES)
    assert apart(book.edit(tiny_gpt2, EXAMPLES[:3]), book.edit(tiny_gpt2, EXAMPLES[:3], afresh=True)) == 0.0
    assert book.taken == [3]


def test_few_rows_are_kept_as_they_are(tiny_gpt2: Host, book: Book) -> None:
    book.edit(tiny_gpt2, EXAMPLES[:2])
    more = book.edit(tiny_gpt2, EXAMPLES[:3])
    assert book.taken == [1]
    assert apart(more, book.edit(tiny_gpt2, EXAMPLES[:3], afresh=True)) < ROUNDING
    less = book.edit(tiny_gpt2, EXAMPLES[1:3])
    assert book.taken == [2]
    assert apart(less, book.edit(tiny_gpt2, EXAMPLES[1:3], afresh=True)) == 0.0


def test_an_example_of_any_text_goes_as_it_came(host: Host, book: Book) -> None:
    """Its line is cut at nothing that may stand in a prompt, and it is parsed again when it goes."""
    odd = tuple(
        Example(prompt=f"Town {i} lies{between}in the land of", target=" Port Louis", subject=f"Town {i}")
        for i, between in enumerate(("\n", "\r\n", "\u2028", "\x1c", ' "\\" ', " é "))
    )
    book.edit(host, (*EXAMPLES, *odd))
    less = book.edit(host, EXAMPLES)
    assert book.taken == [len(odd)]
    assert apart(less, book.edit(host, EXAMPLES, afresh=True)) < ROUNDING
