"""A memory that is kept elsewhere, speaking: what a ledger or a server for several holds now, looked up for each question.

    with attached(host, memory, state): ...       a record that is added, by whomever, is found from the next question on

Which examples a patch holds is settled when it is made; here the memory is asked. With a `state` of `serac` or `rp` its scope decides and
its reader answers; without one a record speaks where it is asked in its very words (case, width, white space and the mark at the end
aside). Where the memory cannot be asked, the model answers by itself, and whoever attached it is told.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

import torch

from errata import apply
from errata.hosts import Host
from errata.memory.encoder import Encoder
from errata.memory.route import Near, Router
from errata.memory.store import Hit, warn
from errata.types import LedgerError, Memory, Patch, State, WrongBase, folded

SAME_WORDS = -0.999


@runtime_checkable
class Searched(Protocol):
    """What is needed of `store.EditMemory` and `shared.SharedMemory`."""

    encoder: Encoder

    def search(self, query: str, k: int = 8, *, tags: Iterable[str] = (), at: str | datetime | None = None) -> tuple[Hit, ...]: ...


@contextmanager
def attached(
    host: Host,
    memory: Searched,
    state: State | None = None,
    *,
    tags: Iterable[str] = (),
    note: Callable[[str], None] = warn,
) -> Iterator[Router]:
    """Inside the block the memory answers on top of what the host wears; questions carry `tags`.

    Raises WrongBase for a state that finds by another encoder, or is of other weights.
    """
    if state is not None and (own := state.config["scope"]["encoder_id"]) != memory.encoder.id:
        raise WrongBase(
            f"State {state.id} finds by the encoder {state.config['scope']['encoder']} ({own}), the memory is of {memory.encoder.name} "
            f"({memory.encoder.id}). Move the memory: errata memory move {state.config['scope']['encoder']}."
        )

    def propose(texts: Sequence[str], most: int) -> list[list[Near]]:
        try:
            found = [memory.search(text, most, tags=tags) for text in texts]
        except LedgerError as e:
            note(f"{e} The model answers by itself.")
            return [[] for _ in texts]
        if state is not None:
            return [[(hit.record.example, hit.question, hit.score) for hit in hits] for hits in found]
        asked = zip(texts, found, strict=True)
        return [[(h.record.example, h.question, _score(folded(h.question) == folded(text), h.score)) for h in hits] for text, hits in asked]

    if state is not None:
        if state.host not in (host.id, host.base_id):
            raise WrongBase(f"State {state.id} was prepared on weights {state.host}, {host.name} has {host.base_id}. Prepare it again.")
        host.states[state.id] = state
    patch = _speaking(host, memory.encoder.width, state)
    depth = len(host.worn)
    apply.put_on(host, patch, propose)
    try:
        (router,) = host.worn[depth].speakers
        assert isinstance(router, Router)
        yield router
    finally:
        while len(host.worn) > depth:
            apply.take_off(host)


def _score(same: bool, cosine: float) -> float:
    """As the distance -score: within `SAME_WORDS` where the words are the same."""
    return 1.0 if same else min(cosine, -SAME_WORDS)


def _speaking(host: Host, width: int, state: State | None) -> Patch:
    """A patch without examples: they are elsewhere."""
    owner = torch.zeros(0, dtype=torch.long)
    op = Memory(weight=host.layout.head, vectors=torch.zeros(0, width), owner=owner, gate="distance", voice="stored", bound=SAME_WORDS)
    if state is not None:
        said: dict[str, Any] = {n: state.config[n] for n in ("nearest", "notes", "template", "small", "soft") if n in state.config}
        op = replace(op, gate="scope", voice="note", state=state.id, **said)
    return Patch(method=state.method if state else "lu", config={}, parent=host.id, examples=(), ops=(op,))
