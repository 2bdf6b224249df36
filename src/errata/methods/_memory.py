"""What `lu`, `rp`, `serac` and `eren` share, whose edits stay in memory. Nothing here decides or answers: see `memory/route.py`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from errata import hosts, text
from errata.hosts import Host
from errata.memory import encoder as encoders
from errata.memory import scope as scopes
from errata.memory.reader import asked_in, embedded
from errata.memory.scope import Lesson, Scope
from errata.methods._meta import finished
from errata.types import ANSWERED, Case, Example, InvalidExample, Memory, Patch, Run, ScopeCase, State

SCOPE = "scope/"  # of a state's tensors
ASKED = 512  # of the text that holds still, at most, are measured
SHARE = 0.5  # of the least distance


def requests(name: str, host: Host, examples: Sequence[Example]) -> None:
    """Raises InvalidExample for a goal that no answer reaches, or for an example that does not fit the host."""
    for e in examples:
        if e.goal not in ANSWERED:
            raise InvalidExample(f"{name} answers with the target, so it cannot {e.goal} it (example '{e}'). Take another method.")
        hosts.encode(host, e.prompt, e.target)


def memory(host: Host, name: str, config: Mapping[str, Any], examples: tuple[Example, ...], vectors_ND: Tensor, **how: Any) -> Patch:
    """The patch whose memory looks up the examples by these vectors, one for each of them or, behind those, more rounds of one for each;
    `how` are fields of `types.Memory`."""
    order = sorted(range(len(examples)), key=lambda i: (examples[i].prompt, examples[i].target))
    parts = torch.split(vectors_ND, max(1, len(examples)))
    op = Memory(
        weight=host.layout.head,
        vectors=torch.cat([part[order] for part in parts]).float().cpu().contiguous(),
        owner=torch.tensor(order * len(parts), dtype=torch.long),
        **how,
    )
    return Patch(method=name, config=dict(config), parent=host.id, examples=tuple(examples), ops=(op,))


def keys(host: Host, examples: Sequence[Example], run: Run) -> tuple[Float[Tensor, "N D"], float]:
    """(h of each prompt, half of the least distance from one of them to what the text that holds still asks)."""
    keys_ND = embedded(host, [asked_in(e.prompt) for e in examples])
    documents = run.hold or text.sampled(host, seed=run.seed)
    others = embedded(host, [asked_in(d if host.kind == "causal" else d.rpartition("|")[0]) for d in documents[:ASKED]])
    apart_NN = torch.cdist(keys_ND.double(), others.double())
    return keys_ND, SHARE * float(apart_NN[apart_NN > 0].min()) if (apart_NN > 0).any() else 0.0


def vectors(encoder: encoders.Encoder, examples: Sequence[Example]) -> Float[Tensor, "N D"]:
    """(N, D) of what each prompt asks."""
    return torch.from_numpy(encoder.encode([asked_in(e.prompt) for e in examples]))


def told(encoder: encoders.Encoder, examples: Sequence[Example]) -> Float[Tensor, "Q D"]:
    """(Q, D), two for each: of what each prompt asks, then of that with its answer, for what follows may name the answer alone."""
    answered = encoder.encode([scopes.told(asked_in(e.prompt), e.target) for e in examples])
    return torch.cat([vectors(encoder, examples), torch.from_numpy(answered)])


def known(name: str, host: Host, run: Run) -> State:
    """What `name` was prepared with, at hand for whoever puts its patches on. Raises what `_meta.finished` raises."""
    state = finished(name, host, run.state)
    host.states[state.id] = state
    return state


def lesson_of(case: Case | ScopeCase) -> Lesson:
    """What a case teaches a scope: of each text what it asks, for that is what a memory is asked."""
    if isinstance(case, Case):
        taught = scopes.lesson_of(case)
        inside, outside = taught.inside, taught.outside
    else:
        inside, outside = case.prompts, tuple(q.prompt for q in case.outside)
    inside, outside = (tuple(dict.fromkeys(asked_in(t) for t in texts)) for texts in (inside, outside))
    e = case.example
    return Lesson(question=asked_in(e.prompt), answer=e.target.strip(), inside=inside, outside=tuple(t for t in outside if t not in inside))


def scoped(cases: Iterable[Case | ScopeCase], run: Run, made: Mapping[str, Any], device: str) -> Scope:
    """A scope learnt with a method's settings; `faithful`: as published. Raises InvalidExample, UnknownName, MissingExtra."""
    faithful, verifier = bool(made.get("faithful")), made["verifier"]
    scope = scopes.train(
        [lesson_of(case) for case in sorted(cases, key=lambda c: c.id)],
        encoders.load(made["encoder"], device),
        verifier=verifier,
        backbone=made["backbone"] if verifier == "cross" else "",
        seed=run.seed,
        progress=run.progress,
        steps=made["scope_steps"] or None,
        false_fires=made["false_fires"],
        device=device,
        mined=not faithful,
    )
    if not faithful:
        return scope
    # g > 1/2, where a score is the logit of g, or log g
    half = math.nextafter(0.5, 1.0)
    slopes = (*[0.0] * (len(scope.slopes) - 1), 1.0)  # the verifier alone
    shift = 0.0 if verifier == "cross" else math.log(2)
    return replace(scope, near=-1.0, fire=half, leave=half, slopes=slopes, shift=shift, beside=0.0, held=())


def with_scope(state: State, scope: Scope) -> State:
    """The state that holds the scope too."""
    config, tensors = scope.parts()
    return replace(
        state,
        config={**state.config, "scope": config},
        tensors={**state.tensors, **{f"{SCOPE}{name}": t for name, t in tensors.items()}},
    )
