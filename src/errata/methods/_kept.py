"""Sums that stay between two edits, so that one more example costs its own rows and a solve, and one less does too.

    H, B  +  those of the new examples  -  those of the examples that went            for each module, under one prior (`_normal.py`)

What is kept is a State of a few matrices and its examples: it does not grow with them as their rows would. Each example is a line of text
there, which is parsed if it goes and made if it is new: thousands of others cost no more than to copy them. The rows of an example that
went are taken again, on the base, where they are what they were. While the rows are few, and a patch is made of them in factors, they
are kept as they are; if an example goes then, those of the others are taken anew.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from errata.hosts import Host
from errata.methods import _gradients, _normal
from errata.methods._gradients import Pairs
from errata.methods._normal import Prior, Sums
from errata.types import Example, Run, State, canonical_json, digest, here, tensor_bytes

Take = Callable[[Host, tuple[Example, ...]], Pairs]
Read = Callable[[Host, Pairs], Mapping[str, tuple[Float[Tensor, "N K"], Float[Tensor, "N V"]]]]  # {module: (keys, differences)}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Summing:
    """How sums are made of examples: `take` the rows of the texts in which they are `asked`, `read` keys and differences off them, add them
    up under each module's prior.

    `take` and `read` go to the workers, so they are functions that can be pickled, and hold neither host nor run.
    """

    asked: Callable[[Host, Sequence[Example]], Sequence[Example]]
    take: Take
    read: Read
    priors: Mapping[str, Prior]


def about(host: Host, method: str, *rest: Any) -> str:
    """What sums are of, besides their examples: others cannot be added to them."""
    return digest("sums by line", host.id, method, canonical_json(list(rest)))


def of_rows(host: Host, parts: Iterable[Pairs], priors: Mapping[str, Prior], read: Read) -> dict[str, Sums]:
    """The sums of all rows, a part of them in memory at a time."""
    return _total((dict(read(host, part)) for part in parts), priors)


def of_all(host: Host, examples: Sequence[Example], summing: Summing, run: Run) -> dict[str, Sums]:
    """The sums of the examples: some of their texts at a time are a shard of `run.spread`, and what it gives is added in their order."""
    parts = list(_gradients.some(summing.asked(host, examples)))
    found = run.spread(host, _part, parts, (summing.take, summing.read))
    if run.spread is not here:  # else taking the rows of a part tells of its progress
        found = run.progress(found, "reading value gradients", len(parts))
    return _total(found, summing.priors)


def _part(host: Host, shared: tuple[Take, Read]) -> Callable[[tuple[Example, ...]], Pairs]:
    """What makes keys and differences of the texts of one part. Their sums can be much larger than they are."""
    take, read = shared
    return lambda part: dict(read(host, take(host, part)))


def _total(parts: Iterable[Pairs], priors: Mapping[str, Prior]) -> dict[str, Sums]:
    """What the parts come to, added in their order; one module after the other, so that no more is in memory than there has to be."""
    sums = dict[str, Sums]()
    for part in parts:
        for module in list(part):
            both = part.pop(module)
            sums[module] = _normal.grown(sums[module], *both) if module in sums else _normal.of(priors[module], *both)
    return sums


def _added(sums: Mapping[str, Sums], more: Mapping[str, Sums]) -> dict[str, Sums]:
    return {**sums, **{module: _normal.merged(sums[module], new) if module in sums else new for module, new in more.items()}}


def of_examples(host: Host, method: str, about: str, examples: tuple[Example, ...], summing: Summing, run: Run) -> dict[str, Sums]:
    """The sums of the examples, from those in `run.sums` where they are of the same thing and most of their examples are still there.

    `run.keep` gets what they have become.
    """
    there: dict[str, str] = {}
    sums: dict[str, Sums] = {}
    if run.sums is not None and run.sums.config.get("about") == about:
        there = _lines(run.sums.tensors["examples"])
    wanted = {e.id: e for e in examples}
    gone = [Example(**json.loads(line)) for id, line in there.items() if id not in wanted]
    if there and run.sums is not None and (not gone or (2 * len(gone) <= len(there) and _folded(run.sums))):
        sums = _of_state(host, run.sums, summing.priors)
    else:
        there, gone = {}, []
    new = [e for id, e in wanted.items() if id not in there]
    sums = _added(sums, of_all(host, new, summing, run))
    for part in _gradients.some(summing.asked(host, gone)):
        for module, (keys_NK, d_NV) in summing.read(host, summing.take(host, part)).items():
            sums[module] = _normal.without(sums[module], keys_NK, d_NV)
    if new or gone:
        lines = {id: there[id] if id in there else canonical_json(e.as_dict()) for id, e in wanted.items()}
        run.keep(_state(host, method, about, lines, sums))
    return sums


def _state(host: Host, method: str, about: str, lines: Mapping[str, str], sums: Mapping[str, Sums]) -> State:
    tensors = {"examples": _bytes(lines)}
    for module, total in sums.items():
        both, names = (total.rows, "XD") if total.folded is None else (total.folded, "HB")
        assert both is not None, "sums have their rows or what these come to"
        tensors |= {f"{module}/{name}": part.cpu() for name, part in zip(names, both, strict=True)}
    config = {"about": about, "rows": {module: total.n for module, total in sums.items()}}
    return State(method=method, host=host.id, config=config, tensors=tensors)


def _bytes(lines: Mapping[str, str]) -> Tensor:
    """Examples as canonical JSON, by id, as bytes: a line for each."""
    raw = "\n".join(f"{id} {line}" for id, line in sorted(lines.items())).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _lines(raw: Tensor) -> dict[str, str]:
    """The inverse of `_bytes`."""
    text = tensor_bytes(raw).decode()
    return {id: line for id, _, line in (row.partition(" ") for row in text.split("\n") if row)}


def _folded(state: State) -> bool:
    return not any(name.endswith("/X") for name in state.tensors)


def _of_state(host: Host, state: State, priors: Mapping[str, Prior]) -> dict[str, Sums]:
    out: dict[str, Sums] = {}
    for module, prior in priors.items():
        kept = (state.tensors.get(f"{module}/{name}") for name in "XDHB")
        X, D, H, B = (None if part is None else part.to(host.device) for part in kept)
        rows = None if X is None or D is None else (X, D)
        folded = None if H is None or B is None else (H, B)
        out[module] = Sums(prior=prior, n=state.config["rows"][module], keep=False, rows=rows, folded=folded)
    return out
