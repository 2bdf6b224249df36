"""What `lu`, `rp`, `serac` and `eren` share, whose edits stay in memory. Nothing here decides or answers: see `memory/route.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata import hosts
from errata.hosts import Host
from errata.types import Example, InvalidExample, Memory, Patch

GOALS = ("raise", "prefer")  # what an answer can do for an example


def requests(name: str, host: Host, examples: Sequence[Example]) -> None:
    """Raises InvalidExample for a goal that no answer reaches, or for an example that does not fit the host."""
    for e in examples:
        if e.goal not in GOALS:
            raise InvalidExample(f"{name} answers with the target, so it cannot {e.goal} it (example '{e}'). Take another method.")
        hosts.encode(host, e.prompt, e.target)


def memory(host: Host, name: str, config: Mapping[str, Any], examples: tuple[Example, ...], vectors_ND: Tensor, **how: Any) -> Patch:
    """The patch whose memory looks up the examples by these vectors, one for each prompt; `how` are fields of `types.Memory`."""
    order = sorted(range(len(examples)), key=lambda i: (examples[i].prompt, examples[i].target))
    op = Memory(
        weight=host.layout.head,
        vectors=vectors_ND[order].float().cpu().contiguous(),
        owner=torch.tensor(order, dtype=torch.long),
        **how,
    )
    return Patch(method=name, config=dict(config), parent=host.id, examples=tuple(examples), ops=(op,))
