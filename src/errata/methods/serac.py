"""serac: edits stay in a memory; a scope model says which of them a text is about, and a model that reads it answers.

    i* = argmax_i g(z_i, x);    g(z_i*, x) >= fire:  p_reader(y | z_i*, x),    else  p_base(y | x)

Mitchell et al. 2022, arXiv 2206.06520, equation 1: z an example, g the scope (`memory/scope.py`), p_reader the counterfactual model, which
gets the example as a note in front of the text. `prepare` learns both, once for a model; an edit then learns nothing, and costs two
vectors for each example. Nothing here depends on another edit, so any can be taken back alone.

    L = L_scope + L_reader,    L_reader = mean -log p_reader(y | z, x) with the right z (`_notes.py`)

The two share no weight, so they are learnt one after the other (there: one loss, .1 and 1).

Unlike serac@c963a39:
* the reader is the host with a difference to its weights, or with `small` a smaller model of the same tokens (there: a model of its own);
* where the answer is the noted target, the reader learns to end before it begins, and the target is said in its place (`memory/route.py`):
  a small model copies nine names in ten, and what is left for it to learn is when to repeat and when to conclude;
* the scope is learnt against the whole memory, and `fire` bounds how often it fires where it should not (there: the diagonal, and 1/2);
  where it is unsure, the base answers;
* only the nearest examples are looked at closely (there: all), and several may speak at once, with `notes`;
* all words of a target are kept from the key, not the last one alone; a second key has them all, for what follows from an example may
  name the answer alone.
`faithful` is as published: pairs of the diagonal, 1/2, one note, whose target the reader says itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, final

from errata import hosts
from errata.hosts import Host
from errata.memory import encoder as encoders
from errata.methods import _memory, _notes
from errata.types import Case, Example, InvalidExample, Method, Patch, Run, ScopeCase, State


@final
@dataclass(frozen=True, kw_only=True)
class Serac(Method):
    """
    encoder      of the memory: hashed, minilm or a folder (`memory/encoder.py`)
    verifier     cross or distance, with `backbone` (`memory/scope.py`), learnt in `scope_steps` (0: its own number)
    false_fires  at most so many of the texts that concern no example fire, with 95 % confidence
    nearest      examples that are looked at closely
    notes        of them speak at once, at most
    soft         what is not ruled out answers with the share that its chance is, and the base with the rest; else what is ruled in alone.
                 A `distance` that is `faithful` has the share 2g / (1 + 2g), which is 1/2 where its g is
    small        the reader is this model instead of the host
    the rest: `_notes.Settings`
    """

    encoder: str = "hashed"
    verifier: Literal["distance", "cross"] = "cross"
    backbone: str = "lab/bert"
    scope_steps: int = 0
    false_fires: float = 0.01
    nearest: int = 8
    notes: int = 1
    soft: bool = False
    small: str = ""
    rank: int = 16
    steps: int = 800
    lr: float = 3e-3
    texts: int = 64
    every: int = 50
    patience: int = 6
    batch_size: int = 64
    faithful: bool = False

    def __post_init__(self) -> None:
        for name in ("nearest", "notes", "steps", "lr", "texts", "every", "patience", "batch_size"):
            if not getattr(self, name) > 0:
                raise InvalidExample(f"serac needs {name} over 0, got {getattr(self, name)}.")
        if not self.notes <= self.nearest:
            raise InvalidExample(f"serac lets {self.notes} of the {self.nearest} nearest examples speak.")

    def prepare(self, host: Host, train_cases: Iterable[Case | ScopeCase], run: Run) -> State:
        """The reader and the scope. Raises InvalidExample, UnknownName, MissingExtra."""
        cases = tuple(train_cases)
        reader = hosts.beside(host, self.small) if self.small else host
        own = {f.name: self.config[f.name] for f in fields(_notes.Settings) if f.name in self.config}
        settings = _notes.Settings(**own, silent=False, copies=not self.faithful, template=_notes.PLAIN)
        state = _notes.learnt(host, reader, "serac", cases, run, settings, self.config)
        scope = _memory.scoped(cases, run, self.config, str(host.device))
        return _memory.with_scope(state, scope)

    def trained(self, host: Host) -> int:
        """How many numbers an edit moves: none, for it is looked up."""
        return 0

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """Two vectors for each example. Raises InvalidExample for a goal that no answer reaches, and what `_memory.known` raises."""
        _memory.requests("serac", host, examples)
        state = _memory.known("serac", host, run)
        encoder = encoders.load(state.config["scope"]["encoder"], str(host.device))
        return _memory.memory(
            host,
            "serac",
            self.config | {"state": state.id},
            examples,
            _memory.told(encoder, examples),
            gate="scope",
            voice="note",
            nearest=self.nearest,
            notes=1 if self.faithful else self.notes,
            state=state.id,
            small=state.config["small"],
            soft=self.soft,
        )
