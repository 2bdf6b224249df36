"""Learning to read: what `serac` and `eren` share, whose answers come from a model that has an example as a note in front of it.

    psi = argmin  mean over (note, x, y) of -log p_psi(y | note, x)     Mitchell et al. 2022 (SERAC), arXiv 2206.06520, section 3.3

The note of a text in scope is the right one, whatever the memory would find. So that the reader takes the answer from the note and not
from what it knows, most notes get another target, in the note and wherever the question and the answer have it: that of another example,
or one that is put together from halves of their words, so that names which it never saw are read as well. Where one note stands alone and
the answer is its target, a reader that `copies` learns to end at once, and whoever asks it puts the target there. What `psi` changes is a
difference to the weights of the host, or of a smaller model of the same tokens: low-rank factors at every projection, or, with rank 0, all
weights.

Unlike serac@c963a39 the learning rates are those of a small difference and not of a whole model (there: 1e-5), and a step has as many
texts as there is room for (there: ten edits, gradients added over ten steps).

File legend: N texts, T tokens.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from errata import hosts, text
from errata.hosts import Host, Weights, stored_transposed
from errata.memory.reader import PREFIX, asked_in, marked, note_of
from errata.types import Case, Example, InvalidExample, Query, Run, ScopeCase, State, canonical_json, digest

HELD_BACK = (0.1, 1, 128)  # lessons that validate: this share of them, at least, at most
WARM = 20  # steps until the rate is whole
ANOTHER, MADE_UP = 0.8, 0.6  # share of the notes that get another target; share of those in which it is put together
ALONE = 0.7  # of the steps of a reader that will point it says every target itself, so that it learns to say names
NOTHING = 0.25  # of the texts of a reader that may say so have no note that tells the answer
UNANSWERABLE = " unanswerable"
PLAIN = "{notes} {question}"  # what a reader that has learnt reads


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of the reader's training; each method carries them as its own fields.

    rank         of the differences at every projection; 0: all weights move
    steps        at most
    lr           Adam's, falls as a cosine; for a reader that copies twice
    texts        of a step
    notes        in front of a text, at most
    silent       whether the reader learns to say that its notes do not tell
    copies       whether it sees what a question has of its notes (`reader.marked`), and learns, unless it is a classifier, to say nothing
                 instead of the target of its only note, which is then said in its place
    every        steps between two validations
    patience     validations without a better one before it stops
    batch_size   texts in memory at once, at most; it changes nothing else
    """

    rank: int
    steps: int
    lr: float
    texts: int
    notes: int
    silent: bool
    copies: bool
    every: int
    patience: int
    batch_size: int
    template: str


@final
@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An example and what is in its scope: questions and their answers."""

    example: Example
    inside: tuple[Query, ...]


def lessons(cases: Iterable[Case | ScopeCase]) -> list[Lesson]:
    """What the cases teach a reader: the example's own prompt, other ways to ask for it, and what follows from it."""
    out = []
    for case in cases:
        e = case.example
        found = [Query(prompt=e.prompt, answer=e.target, kind="edit")]
        if isinstance(case, Case):
            found += [Query(prompt=prompt, answer=e.target, kind="rephrase") for prompt in (*case.paraphrases, *case.paragraphs)]
        else:
            found += [q for q in case.inside if q.answer is not None]
        unique: dict[tuple[str, str | None], Query] = {}
        for query in found:
            unique.setdefault((query.prompt, query.answer), query)
        out.append(Lesson(example=e, inside=tuple(unique.values())))
    return out


def learnt(
    host: Host, reader: Host, name: str, cases: Sequence[Case | ScopeCase], run: Run, s: Settings, config: Mapping[str, Any]
) -> State:
    """A State for `host` with the differences of its `reader`'s weights. With an unfinished one in `run.state` it goes on there; `run.keep`
    gets one at each validation. Raises InvalidExample for too few cases, or if what was begun is of others."""
    if len(cases) < 4:
        raise InvalidExample(f"{name} learns from training cases: 4 or more are needed, got {len(cases)}.")
    about = digest(name, host.id, canonical_json([dict(config), run.seed]), *sorted(c.id for c in cases))
    school = _School(reader, lessons(sorted(cases, key=lambda c: c.id)), s, run.seed)
    begun = run.state if run.state is not None and run.state.config.get("unfinished") else None
    if begun is not None and begun.config["about"] != about:
        raise InvalidExample(
            f"The preparation of {begun.method} that was begun is of other cases, settings or weights. Give the same ones to go on with "
            f"it, or begin afresh."
        )
    trained_on = frozenset(c.id for c in cases)

    def state(step: int, best: Mapping[str, Tensor], best_loss: float, best_step: int, dropped: int, **more: object) -> State:
        told = {"step": step, "best_step": best_step, "best_loss": best_loss if math.isfinite(best_loss) else None, "dropped": dropped}
        told |= {"copies": school.copies, "marks": s.copies}
        tensors = {f"{PREFIX}{n}": t.to(torch.bfloat16).contiguous() for n, t in best.items()}
        if more:
            tensors |= {f"at/{n}": t.detach().clone() for n, t in school.leaves.items()} | school.moments()
            tensors |= {f"best/{n}": t.clone() for n, t in best.items()}
        return State(method=name, host=host.id, config={**config, "about": about, **told} | more, tensors=tensors, trained_on=trained_on)

    step, best_step, best_loss, dropped = 0, 0, math.inf, 0
    if begun is not None:
        told = begun.config
        step, best_step, dropped = told["step"], told["best_step"], told["dropped"]
        best_loss = math.inf if told["best_loss"] is None else told["best_loss"]
        school.put(begun.tensors, step - dropped)
        best = {n.removeprefix("best/"): t for n, t in begun.tensors.items() if n.startswith("best/")}
    else:
        best = school.now()
    for _ in run.progress(range(step, s.steps), "learning to read", s.steps - step):
        if step >= school.turn and step - max(best_step, school.turn) >= s.patience * s.every:
            break
        dropped += not school.stepped(step)
        step += 1
        if step % s.every == 0 or step == s.steps:
            asked_anew = 0 < school.turn < step and best_step <= school.turn
            if (loss := school.validated(step)) < best_loss or asked_anew:
                best, best_loss, best_step = school.now(), loss, step
            run.keep(state(step, best, best_loss, best_step, dropped, unfinished=True))
    return state(step, best, best_loss, best_step, dropped)


def named(name: str, asked: str) -> bool:
    """Whether a text has a name in it, as words of their own."""
    return text.whole(name.strip()).search(asked) is not None


def put(name: str, other: str, asked: str) -> str:
    """The text with another name in the place of the name."""
    return text.whole(name.strip()).sub(lambda _: other.strip(), asked)


def renamed(example: Example, query: Query, other: str) -> tuple[Example, Query]:
    """The same with another target, in the example and wherever the question and its answer have it. As it was where the example's own
    prompt has it or the question has the other, or where nothing tells that the answer does not depend on it: an opinion would."""
    old = example.target
    known = named(old, f"{query.prompt}{query.answer}") or query.kind == "yes/no"
    if named(old, example.prompt) or other.strip() in query.prompt or not known:
        return example, query
    prompt, answer, target = (put(old, other, t) for t in (query.prompt, str(query.answer), old))
    return replace(example, target=target, contrast=None, goal="raise"), replace(query, prompt=prompt, answer=answer)


@final
class _School:
    """The leaves, and what they learn from. What a step draws follows from the seed and its number alone."""

    def __init__(self, reader: Host, given: Sequence[Lesson], s: Settings, seed: int) -> None:
        self.reader, self.s, self.seed = reader, s, seed
        ordered = list(given)
        random.Random(seed).shuffle(ordered)
        share, fewest, most = HELD_BACK
        n = min(most, max(fewest, round(share * len(ordered))))
        self.held_back, self.train = ordered[:n], ordered[n:]
        judged = [(named(o.example.target, q.prompt), str(q.answer)) for o in ordered for q in o.inside if q.kind == "yes/no"]
        # what is answered where the target is named, and where something else is
        self.verdicts = {right: Counter(a for r, a in judged if r == right).most_common(1)[0][0] for right in {r for r, _ in judged}}
        self.words = sorted({word for lesson in ordered for word in lesson.example.target.split()})
        self.copies = s.copies and reader.kind != "classifier" and reader.tokenizer.eos_token_id is not None
        self.turn = round(ALONE * s.steps) if self.copies else 0  # from this step on it points
        self.validation: dict[bool, list[tuple[list[int], int]]] = {}
        for points in {False, self.copies}:
            rng = random.Random(f"{seed}/validation")
            self.validation[points] = [self._row(rng, lesson, self.held_back, points) for lesson in self.held_back]
        self.base: dict[str, Tensor] = {}
        self.leaves = self._fresh()
        self.solver = torch.optim.Adam([*self.leaves.values()], lr=s.lr)

    def _fresh(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        model, out = self.reader.model, {}
        if self.s.rank == 0:
            for name, p in model.named_parameters():
                self.base[name] = p.detach().float()
                out[name] = torch.zeros_like(self.base[name])
        for module in self.reader.projections() if self.s.rank else ():
            part = model.get_submodule(module)
            name, weight = f"{module}.weight", hosts.weight(model, f"{module}.weight").float()
            inner, outer = weight.shape if stored_transposed(part) else weight.shape[::-1]
            rank = min(self.s.rank, inner, outer)
            self.base[name] = weight
            out[f"{name}.A"] = (torch.randn(rank, inner, generator=draw) / math.sqrt(inner)).to(weight.device)
            out[f"{name}.B"] = torch.zeros(outer, rank, device=weight.device)
        return {n: t.requires_grad_() for n, t in out.items()}

    def weights(self) -> Weights:
        """The values of the parameters that move."""
        out = {}
        for name, base in self.base.items():
            if name in self.leaves:
                change = self.leaves[name]
            else:
                change = self.leaves[f"{name}.B"] @ self.leaves[f"{name}.A"]
                change = change.T if stored_transposed(self.reader.model.get_submodule(name.rpartition(".")[0])) else change
            out[name] = (base + change).to(self.reader.model.dtype)
        return out

    def now(self) -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in self.leaves.items()}

    def moments(self) -> dict[str, Tensor]:
        zero = torch.zeros(())
        kept = ((n, self.solver.state.get(t, {})) for n, t in self.leaves.items())
        return {f"{x}/{n}": of.get(key, zero).clone() for n, of in kept for x, key in (("m", "exp_avg"), ("v", "exp_avg_sq"))}

    def put(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on where a checkpoint was."""
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(tensors[f"at/{name}"])
                if steps:
                    moments = {key: tensors[f"{x}/{name}"].to(leaf.device) for x, key in (("m", "exp_avg"), ("v", "exp_avg_sq"))}
                    self.solver.state[leaf] = {"step": torch.tensor(float(steps)), **moments}

    def _row(self, rng: random.Random, lesson: Lesson, others: Sequence[Lesson], points: bool) -> tuple[list[int], int]:
        """A question with notes in front of it, and its answer; where it `points`, the end in the place of the target of an only note.

        To repeat the target, and each kind of what follows from it, come equally often: what follows is seldom asked, and harder.
        """
        example = lesson.example
        kinds = {q: "" if q.answer == example.target else q.kind for q in lesson.inside}
        kind = rng.choice(sorted({*kinds.values()}))
        query = rng.choice([q for q in lesson.inside if kinds[q] == kind])
        label = self.reader.kind == "classifier"
        if rng.random() < ANOTHER and not (label and query.answer != example.target):
            example, query = self._varied(rng, lesson, query, others)
        prompt, answer = query.prompt, str(query.answer)
        beside = [o.example for o in rng.sample(others, k=min(len(others), self.s.notes)) if o.example.prompt != example.prompt]
        notes = [example, *beside[: rng.randint(0, self.s.notes - 1)]]
        if self.s.silent and rng.random() < NOTHING:
            notes, answer = beside or notes, UNANSWERABLE if beside else answer
        rng.shuffle(notes)
        asked = marked(asked_in(prompt), notes, label) if self.s.copies else asked_in(prompt)
        read = self.s.template.replace("{notes}", note_of(notes)).replace("{question}", asked)
        ids, given = hosts.encode(self.reader, read, answer)
        if points and notes == [example] and answer == example.target:
            ids = [*ids[:given], self.reader.tokenizer.eos_token_id]
        return ids, given

    def _varied(self, rng: random.Random, lesson: Lesson, query: Query, others: Sequence[Lesson]) -> tuple[Example, Query]:
        """With another target; and with another name where the example's prompt has the answer. Of questions whether something is true half
        then name something else than the target, and have the other answer."""
        made_up = self.reader.kind != "classifier" and rng.random() < MADE_UP
        new, third = (self._made_up(rng) if made_up else rng.choice(others).example.target for _ in range(2))
        asked = [q for q in lesson.inside if q.kind == "yes/no" and named(lesson.example.target, q.prompt)]
        if query.kind == "yes/no" and asked and len(self.verdicts) == 2:
            query = rng.choice(asked)
            moved, _ = renamed(lesson.example, query, new)
            if rng.random() < 0.5 and not named(moved.target, third) and not named(third, moved.target):
                return moved, replace(query, prompt=put(lesson.example.target, third, query.prompt), answer=self.verdicts[False])
        example, query = renamed(lesson.example, query, new)
        answer = str(query.answer)
        if made_up and named(answer, example.prompt) and answer != example.target:
            instead = self._made_up(rng)
            example = replace(example, prompt=put(answer, instead, example.prompt), subject=None)
            query = replace(query, prompt=put(answer, instead, query.prompt), answer=put(answer, instead, answer))
        return example, query

    def _made_up(self, rng: random.Random) -> str:
        """A name of one to three words, each of them the first half of one word and the second half of another."""
        pairs = [(rng.choice(self.words), rng.choice(self.words)) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        return "".join(f" {a[: (len(a) + 1) // 2]}{b[(len(b) + 1) // 2 :]}" for a, b in pairs)

    def stepped(self, step: int) -> bool:
        """One step; False where a gradient was not finite and nothing moved."""
        rng = random.Random(f"{self.seed}/{step}")
        drawn = [rng.choice(self.train) for _ in range(self.s.texts)]
        points = self.turn <= step
        first, last = (self.turn, self.s.steps) if points else (0, self.turn)
        rows = [self._row(rng, lesson, self.train, points and self.copies) for lesson in drawn]
        self._loss(rows, learn=True)
        norm = nn.utils.clip_grad_norm_([*self.leaves.values()], 1.0)
        if not norm.isfinite():
            return False
        fallen = min(1.0, (step - first + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * (step - first) / (last - first)))
        for group in self.solver.param_groups:
            group["lr"] = self.s.lr * fallen
        self.solver.step()
        return True

    def validated(self, step: int) -> float:
        with torch.no_grad():
            return self._loss(self.validation[self.copies and step > self.turn], learn=False)

    def _loss(self, rows: Sequence[tuple[list[int], int]], learn: bool) -> float:
        """Mean over the rows of -log p of the answer, per token; with `learn` its gradients go to the leaves."""
        whole, leaves = 0.0, [*self.leaves.values()]
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        widest = max(len(ids) for ids, _ in rows)
        for group in hosts.by_length(rows, min(hosts.at_once(self.reader), max(1, self.s.batch_size) * widest)):
            with torch.set_grad_enabled(learn):
                batch = hosts.pad(self.reader, [rows[i] for i in group])
                logp_NT = hosts.scored_logprobs(self.reader, batch, self.weights())
                loss = -(logp_NT.sum(1) / batch.scored_NT.sum(1)).sum() / len(rows)
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True) if learn else ():
                leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
            whole += loss.item()
        return whole
