"""eren: reading notes. The nearest examples stand in front of the text, and whoever reads them says whether they tell the answer.

    y = p_reader(. | z_1 ... z_k, x);    y = "unanswerable":  p_base(. | x)

Chen et al. 2024, arXiv 2403.17431, section 3. All `notes` are seen at once, so that an answer may need two of them. The reader is the model
itself, as published, which takes one that follows instructions; or, after `prepare`, the model with what it has learnt about reading notes
and about saying that they do not tell (`_notes.py`), for models that have never seen an instruction.

Unlike EREN@e88cea0 notes are kept one in a row, a batch goes through both steps, and the answer to the plain text is the model's own as
it is and not what it says to an instruction.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import final

from errata.hosts import Host
from errata.memory import encoder as encoders
from errata.methods import _memory, _notes
from errata.types import Case, Example, InvalidExample, Method, Patch, Run, ScopeCase, State, UnknownArchitecture

# the first of Flan's forms for SQuAD v2
INSTRUCTION = 'Read this and answer the question. If the question is unanswerable, say "unanswerable".\n\n{notes}\n\n{question}'


@final
@dataclass(frozen=True, kw_only=True)
class Eren(Method):
    """encoder: finds the notes (`memory/encoder.py`); notes: how many are read. The rest, for `prepare`: `_notes.Settings`."""

    encoder: str = "hashed"
    notes: int = 5
    rank: int = 16
    steps: int = 1200
    lr: float = 3e-3
    texts: int = 64
    every: int = 50
    patience: int = 6
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("notes", "steps", "lr", "texts", "every", "patience", "batch_size"):
            if not getattr(self, name) > 0:
                raise InvalidExample(f"eren needs {name} over 0, got {getattr(self, name)}.")

    def prepare(self, host: Host, train_cases: Iterable[Case | ScopeCase], run: Run) -> State:
        """A reader, for a model that was not taught to follow instructions. Raises InvalidExample, UnknownArchitecture."""
        _says(host)
        own = {f.name: self.config[f.name] for f in fields(_notes.Settings) if f.name in self.config}
        settings = _notes.Settings(**own, silent=True, copies=False, template=_notes.PLAIN)
        return _notes.learnt(host, host, "eren", tuple(train_cases), run, settings, self.config)

    def trained(self, host: Host) -> int:
        """How many numbers an edit moves: none, for it is looked up."""
        return 0

    def edit(self, host: Host, examples: tuple[Example, ...], run: Run) -> Patch:
        """A vector for each example. Raises InvalidExample for a goal that no answer reaches, UnknownArchitecture for a classifier, and
        what `_memory.known` raises."""
        _says(host)
        _memory.requests("eren", host, examples)
        state = _memory.known("eren", host, run) if run.state is not None else None
        found = _memory.vectors(encoders.load(self.encoder, str(host.device)), examples)
        config = self.config | ({"state": state.id} if state else {})
        how = {
            **{"nearest": self.notes, "notes": self.notes, "encoder": self.encoder, "state": state and state.id},
            "template": _notes.PLAIN if state else INSTRUCTION,
        }
        return _memory.memory(host, "eren", config, examples, found, gate="reader", voice="note", **how)


def _says(host: Host) -> None:
    if host.kind == "classifier":
        raise UnknownArchitecture(
            f"eren lets a model say that its notes do not tell; {host.name} is a classifier, and has its labels alone."
        )
