"""rp: retrieve and prompt. As `serac`, but the model itself reads the example in front of the text; only the scope is learnt.

    i* = argmax_i g(z_i, x);    g(z_i*, x) >= fire:  p_base(y | z_i*, x),    else  p_base(y | x)

RP of Mitchell et al. 2022 (SERAC), arXiv 2206.06520, section 4.1. How well it works is how well the model reads. Where nothing was
prepared, what decides is what decides in `lu`: how near a text is to an example in the model's own hidden states.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

from errata.hosts import Host
from errata.memory import encoder as encoders
from errata.methods import _memory
from errata.types import Case, Example, Method, Patch, Run, ScopeCase, State


@final
@dataclass(frozen=True, kw_only=True)
class Rp(Method):
    """As in `serac`; `template` is what the model reads, with {notes} and {question} in it."""

    encoder: str = "hashed"
    verifier: Literal["distance", "cross"] = "cross"
    backbone: str = "lab/bert"
    scope_steps: int = 0
    false_fires: float = 0.01
    nearest: int = 8
    notes: int = 1
    template: str = "{notes} {question}"

    def prepare(self, host: Host, train_cases: Iterable[Case | ScopeCase], run: Run) -> State:
        """The scope. Raises InvalidExample, UnknownName, MissingExtra."""
        cases = tuple(train_cases)
        scope = _memory.scoped(cases, run, self.config, str(host.device))
        return _memory.with_scope(State(method="rp", host=host.id, config=self.config, trained_on=frozenset(c.id for c in cases)), scope)

    def trained(self, host: Host) -> int:
        """How many numbers an edit moves: none, for it is looked up."""
        return 0

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """Two vectors for each example. Raises InvalidExample for a goal that no answer reaches, and what `_memory.known` raises."""
        _memory.requests("rp", host, examples)
        if run.state is None:
            keys_ND, bound = _memory.keys(host, examples, run)
            own = {"gate": "distance", "bound": bound, "nearest": self.notes, "notes": self.notes, "template": self.template}
            return _memory.memory(host, "rp", self.config, examples, keys_ND, voice="note", **own)
        state = _memory.known("rp", host, run)
        found = _memory.told(encoders.load(state.config["scope"]["encoder"], str(host.device)), examples)
        how = {"nearest": self.nearest, "notes": self.notes, "template": self.template, "state": state.id}
        return _memory.memory(host, "rp", self.config | {"state": state.id}, examples, found, gate="scope", voice="note", **how)
