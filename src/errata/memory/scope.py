"""Whether a record that the index found concerns the query: the second stage of scope.

The index proposes the nearest records (`Candidate`), a verifier looks at each of them beside the query, and what it says becomes a chance
and a ruling: in, out, or unsure, where the base model answers. Two verifiers, both of SERAC (Mitchell et al. 2022, arXiv 2206.06520,
section 3.2), g(z, x) for a record z and a query x:

    distance   log g = -s ||P (e(z) - e(x))||^2 - s' ||P' (e(z' a) - e(x'))||^2   e: the memory's encoder, or a finetuned copy of one
    cross      logit g = w . T(z', a, x')                                         one transformer reads all three, a being z's answer

z' and x' are the two with X in the place of the longest name that they share (`unnamed`): what is asked of it is then compared without it,
and a relation that was learnt with one name is known with another; a name that they do not share stays, and tells them apart. Where they
share none, a and x' are such a pair (`bare`): x may ask for what follows. (SERAC has neither the second distance nor the X.) P, P', s and
s' are learned; at the beginning both distances are SERAC's, with half of its weight.

Both verifiers are trained with the balanced loss of serac@c963a39, mean of -log g over pairs in scope + mean of -log (1 - g) over pairs out
of scope. Unlike there,
* pairs out of scope are not only a record with its own out-of-scope queries: half of them are a query with a record of the whole memory
  that is near to it and does not concern it, drawn by exp(cosine / .1) as its QA-hard draws queries. What the memory says is never a pair
  out of scope where any wording of the two records is the same;
* the first distance is between the questions alone, as the index has them; the answer is read beside z', for "X plays" asks for an
  instrument, a position or a kind of music, and the answer says which;
* a probability is not g itself but what lessons that were held back say of it (Platt 1999), over the candidates that an index gives. A
  cross has a distance beside it that is trained on its own, and both are weighed there: they err on other pairs. A query that shares no
  name with the question and one with the answer (`follows`) asks for what follows, in other words: such pairs have a shift of their own;
* what fires is bounded: of queries that concern no record, counted over the whole memory, at most `false_fires` with 95 % confidence
  (Clopper & Pearson 1934). That takes queries as drawn on their own; those of one lesson resemble each other.

Nothing here finds a record (see `index.py`, `store.py`) or answers a query.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from errata.hosts import LAB_MODELS
from errata.memory import encoder as encoders
from errata.memory.encoder import FUNCTION_WORDS, WORD, Encoder, Pooled, Vectors
from errata.types import Case, InvalidExample, Progress, UnknownName, WrongBase, folded, no_progress

# N texts, P pairs, K verifiers, D width of vectors, T tokens
Scores = Float64[np.ndarray, "P K"]
Chances = Float64[np.ndarray, "P"]

Ruling = Literal["in", "unsure", "out"]
Tenth = tuple[float, int, int]  # of chances between two tenths: their mean, how many they are, of how many it was so
VERIFIERS = ("distance", "cross")
CANDIDATES = 8  # that the index is taken to propose, while training
HARDNESS = 0.1  # temperature at which records near a query are drawn
LEAST = 4  # lessons that there must be
CONFIDENCE = 0.95
REMEMBERED = 1 << 18  # texts whose vectors are kept
FEW_FOLLOW = 0.1  # decay of `beside`: where next to no pair follows nothing is known of such
NEVER_NEAR, MARGIN = 0.002, 0.05  # `near` lies so far below what all but such a share of the queries in scope reach


@final
@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A record that the index proposes for a query; `score` is the cosine that it was found with."""

    question: str
    answer: str
    score: float


@final
@dataclass(frozen=True, kw_only=True)
class Judged:
    """`chance` is the calibrated probability that the record concerns the query."""

    chance: float
    ruling: Ruling


@final
@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A record with queries that it concerns (`inside`) and queries that it does not (`outside`: of the same subject, of the same relation,
    unrelated). Raises InvalidExample."""

    question: str
    answer: str
    inside: tuple[str, ...]
    outside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("inside", "outside"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise InvalidExample(f"'{name}' is a list of texts, got the one text '{given}'.")
        if empty := next((text for text in (self.question, *self.inside, *self.outside) if not text.strip()), None):
            raise InvalidExample(f"One of the queries of the lesson '{self.question}' is empty: {empty!r}.")


def lesson_of(case: Case) -> Lesson:
    """What a case teaches: its own prompt, paraphrases and paragraphs are in scope; neighbours, and denials, which must not get the target,
    are not."""
    example = case.example
    return Lesson(
        question=example.prompt,
        answer=example.target.strip(),
        inside=(example.prompt, *case.paraphrases, *case.paragraphs),
        outside=(*(n.prompt for n in case.neighbours), *case.negations),
    )


def told(question: str, answer: str) -> str:
    """A record as it is found by what it says, where a query names the answer."""
    return f"{question} {answer}".strip()


class Pair(NamedTuple):
    question: str
    answer: str
    query: str


# ------------------------------------------------------------------------------------------------------------------------------ names


def unnamed(question: str, query: str, capitals: Callable[[str], frozenset[str]] | None = None) -> tuple[str, str]:
    """Both texts with X in the place of the longest name that they share; as they are if they share none. `capitals` is `_capitals`, of
    somebody who remembers what it said of a text.

    A name is a run of words that begins and ends with a capital, a digit or a letter that has no case; at the beginning of a text a
    capital says nothing of a function word.
    """
    capitals = capitals or _capitals
    if capitals(question).isdisjoint(capitals(query)):  # most pairs are done with here, and there are many
        return question, query
    a, b = list(WORD.finditer(question)), list(WORD.finditer(query))
    at: dict[str, list[int]] = {}
    for j, word in enumerate(b):
        at.setdefault(word[0].lower(), []).append(j)
    longest, ends = (0, 0), (0, 0)
    above: dict[int, int] = {}  # words that are shared up to the word before of the question and this one of the query
    for i, word in enumerate(a):
        here: dict[int, int] = {}
        for j in at.get(word[0].lower(), ()):
            here[j] = above.get(j - 1, 0) + 1
            if not _is_name(a, i, b, j):
                continue
            named = [k for k in range(here[j]) if _is_name(a, i - k, b, j - k)]
            if (size := (len(named), named[-1] + 1)) > longest:
                longest, ends = size, (i, j)
        above = here
    if not longest[1]:
        return question, query
    (i, j), back = ends, longest[1] - 1
    return (
        f"{question[: a[i - back].start()]}X{question[a[i].end() :]}",
        f"{query[: b[j - back].start()]}X{query[b[j].end() :]}",
    )


def _capitals(text: str) -> frozenset[str]:
    """The words that a name may end with."""
    words = enumerate(WORD.findall(text))
    return frozenset(w.lower() for i, w in words if not w[0].islower() and (i or w.lower() not in FUNCTION_WORDS))


def bare(pair: Pair, capitals: Callable[[str], frozenset[str]] | None = None) -> Pair:
    """The pair without the name that question and query share; if they share none, without the one that the answer and the query do:
    "Which country has the capital X?" asks the same of any X that is the answer to "What is the capital of Togo?"."""
    question, query = unnamed(pair.question, pair.query, capitals)
    if (question, query) != (pair.question, pair.query):
        return Pair(question, pair.answer, query)
    answer, query = unnamed(pair.answer, pair.query, capitals)
    return Pair(pair.question, answer, query)


def _all_bare(pairs: Sequence[Pair]) -> list[Pair]:
    """Looking for names takes most of the time of a closed gate."""
    capitals = functools.cache(_capitals)  # one query stands beside many records
    return [bare(pair, capitals) for pair in pairs]


def follows(pairs: Sequence[Pair], without: Sequence[Pair]) -> Float64[np.ndarray, "P"]:
    """1 for each pair that is `without` the name of its answer: it may ask for what follows."""
    return np.array([a.question == b.question and a.answer != b.answer for a, b in zip(pairs, without, strict=True)], dtype=float)


def _is_name(a: Sequence[re.Match[str]], i: int, b: Sequence[re.Match[str]], j: int) -> bool:
    """Whether a word that both texts have is written as one in both."""
    first, second = a[i][0], b[j][0]
    if first[0].islower() or second[0].islower():
        return False
    return (i > 0 and j > 0) or first.lower() not in FUNCTION_WORDS


# -------------------------------------------------------------------------------------------------------------------------- the verifiers


@final
class Distance(nn.Module):
    """SERAC's Embed. A score is log g."""

    kind = "distance"

    def __init__(self, width: int, backbone: Pooled | None) -> None:
        super().__init__()
        self.changes = nn.Parameter(torch.zeros(2, width, width))  # P - 1 and P' - 1: what decays is the change
        self.log_scales = nn.Parameter(torch.full((2,), math.log(0.5)))
        self.backbone = backbone
        self.transformer = None if backbone is None else backbone.model

    def forward(self, pairs: Sequence[Pair], encoder: Encoder) -> Float[Tensor, "P"]:
        return self.first(pairs, encoder) + self.second(_all_bare(pairs), encoder)

    def first(self, pairs: Sequence[Pair], encoder: Encoder) -> Float[Tensor, "P"]:
        """The first distance alone, which no score is above."""
        return self._of(0, [(pair.question, pair.query) for pair in pairs], encoder)

    def second(self, pairs: Sequence[Pair], encoder: Encoder) -> Float[Tensor, "P"]:
        """What the second distance takes away, of pairs that are `bare`."""
        return self._of(1, [(told(pair.question, pair.answer), pair.query) for pair in pairs], encoder)

    def _of(self, i: int, texts: Sequence[tuple[str, str]], encoder: Encoder) -> Float[Tensor, "P"]:
        place = {text: n for n, text in enumerate(dict.fromkeys(text for two in texts for text in two))}
        vectors_ND = self._vectors(list(place), encoder)
        apart_PD = vectors_ND[[place[z] for z, _ in texts]] - vectors_ND[[place[x] for _, x in texts]]
        return -self.log_scales[i].exp() * (apart_PD + apart_PD @ self.changes[i].T).square().sum(1)

    def losses(self, scores_P: Float[Tensor, "P"]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """-log g and -log (1 - g); 1 - g is floored, for a query in the words of the record has g = 1."""
        floor = torch.finfo(scores_P.dtype).eps
        return -scores_P, -torch.log(-torch.expm1(scores_P).clamp(max=-floor))

    def length(self, pair: Pair) -> int:
        return len(pair.question) + len(pair.query)

    def _vectors(self, texts: Sequence[str], encoder: Encoder) -> Float[Tensor, "N D"]:
        device = self.changes.device
        if self.backbone is None:
            return torch.from_numpy(encoder.encode(texts)).to(device)
        encoded = self.backbone.tokenizer(list(texts), truncation=True, max_length=self.backbone.window, padding=True, return_tensors="pt")
        batch = encoded.to(device)
        hidden_NTD = self.backbone.model(**batch).last_hidden_state
        return nn.functional.normalize(_mean(hidden_NTD, batch["attention_mask"]), dim=1)


@final
class Cross(nn.Module):
    """SERAC's Cross: [CLS] question [SEP] answer [SEP] query [SEP]. A score is the logit of g.

    Of a query that does not fit beside the record the end is read: that is where it asks.
    """

    kind = "cross"

    def __init__(self, backbone: Pooled) -> None:
        super().__init__()
        self.backbone, self.transformer = backbone, backbone.model
        self.head = nn.Linear(backbone.width, 1, device=backbone.model.device)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, pairs: Sequence[Pair], encoder: Encoder) -> Float[Tensor, "P"]:
        rows = [self._ids(pair) for pair in pairs]
        longest = max(len(ids) for ids, _ in rows)
        pad = self.backbone.tokenizer.pad_token_id or 0
        ids_PT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows], device=self.head.weight.device)
        mask_PT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows], device=ids_PT.device)
        given = {"input_ids": ids_PT, "attention_mask": mask_PT}
        if getattr(self.transformer.config, "type_vocab_size", 0) > 1:
            given["token_type_ids"] = torch.tensor([[0] * at + [1] * (longest - at) for _, at in rows], device=ids_PT.device)
        hidden_PTD = self.transformer(**given).last_hidden_state
        scores_P: Tensor = self.head(_mean(hidden_PTD, mask_PT)).squeeze(1)
        return scores_P.float()

    def losses(self, scores_P: Float[Tensor, "P"]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """-log g and -log (1 - g)."""
        return nn.functional.softplus(-scores_P), nn.functional.softplus(scores_P)

    def length(self, pair: Pair) -> int:
        return len(self._ids(pair)[0])

    def _ids(self, pair: Pair) -> tuple[list[int], int]:
        """The tokens of a pair, and where those of the query begin. Raises InvalidExample if the record leaves no room for a query."""
        tokenizer = self.backbone.tokenizer
        behind = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        front = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else behind
        apart = [] if behind is None else [behind]
        parts = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in bare(pair)]
        record = ([] if front is None else [front]) + parts[0] + apart + (parts[1] + apart if parts[1] else [])
        room = (self.backbone.window or 512) - len(record) - len(apart)
        if room < 8:
            raise InvalidExample(
                f"'{pair.question[:60]}...' and its answer have {len(record)} tokens, which leaves no room for a query in the "
                f"{self.backbone.window} that {self.backbone.name} reads. Shorten them, or use another backbone."
            )
        return record + parts[2][-room:] + apart, len(record)


Verifier = Distance | Cross


def _mean(hidden_NTD: Float[Tensor, "N T D"], mask_NT: Tensor) -> Float[Tensor, "N D"]:
    """The mean over what is no padding, float32."""
    mask_NT1 = mask_NT.unsqueeze(-1).float()
    return (hidden_NTD.float() * mask_NT1).sum(1) / mask_NT1.sum(1)


def _backbone(name: str, device: str) -> Pooled:
    """Raises UnknownName, MissingExtra, InvalidExample."""
    folder = LAB_MODELS / name.removeprefix("lab/")
    if name.startswith("lab/") and folder.is_dir():
        return Pooled(folder, name, device)
    if not name or name == encoders.HASHED:
        raise UnknownName.among("backbone", name, [encoders.MINILM, "lab/bert", "the folder of an encoder"])
    found = encoders.load(name, device)
    assert isinstance(found, Pooled), "what is loaded by name and is not hashed has weights"
    return found


def _verifiers(kind: str, width: int, backbone: str, device: str) -> tuple[Verifier, ...]:
    """What a scope of this kind asks, the one that it is called after last."""
    if kind not in VERIFIERS:
        raise UnknownName.among("verifier", kind, VERIFIERS)
    if kind == "cross":
        return Distance(width, None).to(device), Cross(_backbone(backbone, device))
    transformer = _backbone(backbone, device) if backbone else None
    return (Distance(transformer.width if transformer else width, transformer).to(device),)


def _learned(verifier: Verifier) -> dict[str, nn.Parameter]:
    """What training changes: everything but the embedding of words, which would learn those of the lessons alone."""
    words = {id(p) for p in verifier.transformer.get_input_embeddings().parameters()} if verifier.transformer is not None else set()
    unused = {id(p) for name, p in verifier.named_parameters() if ".pooler." in name}
    return {name: p for name, p in verifier.named_parameters() if id(p) not in words | unused}


def _all_learned(verifiers: Sequence[Verifier]) -> dict[str, nn.Parameter]:
    return {f"{verifier.kind}/{name}": p for verifier in verifiers for name, p in _learned(verifier).items()}


# -------------------------------------------------------------------------------------------------------------------------------- scope


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Scope:
    """A verifier that is trained and calibrated.

    encoder      what the index's vectors are made with
    near         candidates whose cosine is below it are out without a look: a gate that stays closed is cheap
    fire         chance from which on the ruling is in
    leave        chance up to which it is out; between the two it is unsure
    verifiers    one, or for cross two
    slopes, shift  a chance is sigmoid(slopes . scores of the verifiers + shift)
    beside       what is added to the shift of a pair that `follows`
    false_fires  with 95 % confidence no more of the queries that concern no record fire
    held         what came of the chances of the pairs that were held back (`report.reliability_chart`)
    """

    encoder: Encoder
    near: float
    fire: float
    leave: float
    verifiers: tuple[Verifier, ...]
    slopes: tuple[float, ...]
    shift: float
    false_fires: float
    beside: float = 0.0
    held: tuple[Tenth, ...] = ()

    def judge(self, queries: Sequence[str], candidates: Sequence[Sequence[Candidate]]) -> list[list[Judged]]:
        """For each query, what is to be thought of each of its candidates: a chance of 0 of those that are out without a look, and of those
        that are too long to be read."""
        places = [(i, j) for i, some in enumerate(candidates) for j, c in enumerate(some) if c.score >= self.near]
        pairs = [Pair(candidates[i][j].question, candidates[i][j].answer, queries[i]) for i, j in places]
        try:
            each = self._chances(pairs).tolist()
        except InvalidExample:  # one is too long for the verifier; the others are judged
            each = [self._readable(pair) for pair in pairs]
        chances = dict(zip(places, each, strict=True))
        return [[self._judged(chances.get((i, j), 0.0)) for j in range(len(some))] for i, some in enumerate(candidates)]

    def _readable(self, pair: Pair) -> float:
        try:
            return float(self._chances([pair])[0])
        except InvalidExample:
            return 0.0

    @torch.no_grad()
    def _chances(self, pairs: Sequence[Pair]) -> Chances:
        """Those of the pairs; 0 where it is known without a look at the names that it is out."""
        slopes, last = np.array(self.slopes), self.verifiers[-1]
        if not pairs or not isinstance(last, Distance) or last.backbone is not None:
            x_P = _scores(self.verifiers, pairs, self.encoder) @ slopes + self.shift
            return _sigmoid(x_P + self.beside * follows(pairs, _all_bare(pairs)))
        first_P = last.first(pairs, self.encoder).double().cpu().numpy() * slopes[-1] + self.shift
        (looked,) = np.nonzero(_sigmoid(first_P + max(0.0, self.beside)) > self.leave * (1 - 1e-5))  # rounding puts none of them out
        out = np.zeros(len(pairs))
        if not len(looked):
            return out
        near = [pairs[n] for n in looked.tolist()]
        without = _all_bare(near)
        second_P = last.second(without, self.encoder).double().cpu().numpy() * slopes[-1]
        out[looked] = _sigmoid(first_P[looked] + second_P + self.beside * follows(near, without))
        return out

    def _judged(self, chance: float) -> Judged:
        return Judged(chance=chance, ruling="in" if chance >= self.fire else "out" if chance <= self.leave else "unsure")

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain JSON, and tensors on the CPU: what a State holds of it. Weights that training left as they were are not in it."""
        last = self.verifiers[-1]
        config = {
            **{"verifier": last.kind, "encoder": self.encoder.name, "encoder_id": self.encoder.id},
            **{"backbone": "" if last.backbone is None else last.backbone.name},
            **{"backbone_id": "" if last.backbone is None else last.backbone.id},
            **{name: float(getattr(self, name)) for name in (*NUMBERS, "beside")},
            "slopes": list(self.slopes),
            "held": [list(tenth) for tenth in self.held],
        }
        return config, {name: p.detach().to("cpu", _kept_as(p)).clone() for name, p in _all_learned(self.verifiers).items()}


NUMBERS = ("near", "fire", "leave", "shift", "false_fires")


def _kept_as(p: Tensor) -> torch.dtype:
    """Half of the bits for matrices; a scale or a bias costs nothing."""
    return torch.float16 if p.ndim > 1 else torch.float32


def from_parts(config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: str = "cpu", encoder: Encoder | None = None) -> Scope:
    """The inverse of `parts`; `encoder` if it is at hand already.

    Raises WrongBase if the encoder or the backbone is another one now, MissingExtra or UnknownName if it is not there.
    """
    try:
        encoder = encoders.load(config["encoder"], device) if encoder is None else encoder
        _check_same("encoder", encoder.name, encoder.id, config["encoder"], config["encoder_id"])
        verifiers = _verifiers(config["verifier"], encoder.width, config["backbone"], device)
        if (backbone := verifiers[-1].backbone) is not None:
            _check_same("backbone", backbone.name, backbone.id, config["backbone"], config["backbone_id"])
        own = _all_learned(verifiers)
        if {n: tuple(p.shape) for n, p in own.items()} != {n: tuple(t.shape) for n, t in tensors.items()}:
            raise WrongBase(
                f"The tensors of the scope are not those of a {config['verifier']} verifier on {config['backbone'] or 'vectors'}."
            )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])
        for verifier in verifiers:
            verifier.eval().requires_grad_(False)
        numbers = {name: config[name] for name in NUMBERS} | {"beside": config.get("beside", 0.0)}
        held = tuple((float(mean), int(n), int(so)) for mean, n, so in config.get("held", ()))
        return Scope(encoder=encoder, verifiers=verifiers, slopes=tuple(config["slopes"]), held=held, **numbers)
    except KeyError as e:
        if isinstance(e, UnknownName):
            raise
        raise WrongBase(f"These are not the parts of a scope: {e} is missing.") from e


def _check_same(what: str, name: str, id: str, named: str, known: str) -> None:
    if id != known:
        raise WrongBase(f"The scope was trained with the {what} {named} ({known}), and this one is {name} ({id}). Train it again.")


@torch.no_grad()
def _scores(verifiers: Sequence[Verifier], pairs: Sequence[Pair], encoder: Encoder, batch_size: int = 64) -> Scores:
    """(P, K) what each verifier says of each pair, pairs of like length together."""
    out = np.zeros((len(pairs), len(verifiers)))
    for k, verifier in enumerate(verifiers):
        lengths = [verifier.length(pair) for pair in pairs]
        in_order = sorted(range(len(pairs)), key=lambda i: lengths[i])
        for at in range(0, len(pairs), batch_size):
            chosen = in_order[at : at + batch_size]
            out[chosen, k] = verifier([pairs[i] for i in chosen], encoder).double().cpu().numpy()
    return out


def _log_odds(chance: float) -> float:
    chance = min(max(chance, 1e-9), 1 - 1e-9)
    return math.log(chance / (1 - chance))


def _sigmoid(x: Chances) -> Chances:
    out: Chances = np.exp(-np.logaddexp(0.0, -x))
    return out


# ------------------------------------------------------------------------------------------------------------------- lessons as a memory


@final
class Lessons:
    """The lessons as one memory: which queries concern which record, and which records are near a query.

    Records that share a wording are one matter: each query of the one concerns the other too, as far as we know.
    """

    def __init__(self, lessons: Sequence[Lesson], encoder: Encoder) -> None:
        self.lessons = list(lessons)
        self._matter: dict[str, int] = {}  # wording -> matter
        self.matters = self._joined()
        self.records = encoder.encode([lesson.question for lesson in lessons])
        self.told = encoder.encode([told(lesson.question, lesson.answer) for lesson in lessons])
        texts = dict.fromkeys(text for lesson in lessons for text in (*lesson.inside, *lesson.outside))
        self.rows = {text: i for i, text in enumerate(texts)}
        self.queries = encoder.encode(list(texts))

    def concerns(self, record: int, query: str) -> bool:
        return self._matter.get(folded(query)) == self.matters[record]

    def stray(self, query: str) -> bool:
        """Whether the query concerns no record."""
        return folded(query) not in self._matter

    def outside(self, record: int) -> list[str]:
        """What the lesson calls out of scope, without what it calls in scope as well."""
        return [query for query in self.lessons[record].outside if not self.concerns(record, query)]

    def cosine(self, record: int, query: str) -> float:
        query_D = self.queries[self.rows[query]]
        return float(max(self.records[record] @ query_D, self.told[record] @ query_D))

    def nearest(self, queries: Sequence[str], among: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
        """The k records among some that are nearest to each query, by their question or by that with its answer, with their cosines, the
        nearest first."""
        numbers = np.array(among, dtype=np.int64)
        out: list[list[tuple[int, float]]] = []
        for at in range(0, len(queries), 1024):
            asked_QD = self.queries[[self.rows[query] for query in queries[at : at + 1024]]]
            scores = np.maximum(asked_QD @ self.records[numbers].T, asked_QD @ self.told[numbers].T)
            first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            out += [list(zip(numbers[f].tolist(), row[f].tolist(), strict=True)) for f, row in zip(first, scores, strict=True)]
        return out

    def _joined(self) -> list[int]:
        """The matter of each lesson: the least number of those that it shares a wording with, however many steps lie between."""
        parent = list(range(len(self.lessons)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for i, lesson in enumerate(self.lessons):
            for text in (lesson.question, *lesson.inside):
                a, b = root(i), root(self._matter.setdefault(folded(text), i))
                parent[max(a, b)] = min(a, b)
        self._matter = {text: root(i) for text, i in self._matter.items()}
        return [root(i) for i in range(len(self.lessons))]

    def split(self, held: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Records to learn from, and records to be held back, whole matters together."""
        matters = np.unique(self.matters)
        rng.shuffle(matters)
        back = set(matters[: max(1, round(held * len(matters)))].tolist())
        return [i for i, m in enumerate(self.matters) if m not in back], [i for i, m in enumerate(self.matters) if m in back]


@final
class Drawn:
    """Draws batches of pairs from a memory: in scope, out of scope by the lesson's own word, out of scope because of another record."""

    def __init__(self, memory: Lessons, records: Sequence[int], rng: np.random.Generator, mined: bool = True) -> None:
        self.memory, self.rng = memory, rng
        self.inside = [(i, query) for i in records for query in memory.lessons[i].inside]
        self.outside = [(i, query) for i in records for query in memory.outside(i)]
        asked = list(dict.fromkeys(query for _, query in (*self.inside, *self.outside)))
        self.near: list[tuple[str, list[int], Chances]] = []
        for query, found in zip(asked, memory.nearest(asked, records, 2 * CANDIDATES), strict=True) if mined else ():
            if wrong := [(i, score) for i, score in found if not memory.concerns(i, query)]:
                weights = np.exp((np.array([score for _, score in wrong]) - wrong[0][1]) / HARDNESS)
                self.near.append((query, [i for i, _ in wrong], weights / weights.sum()))
        self._queues: dict[str, list[int]] = {"inside": [], "outside": [], "near": []}

    def batch(self, size: int) -> tuple[list[Pair], int]:
        """Pairs, those in scope first, and how many those are: a quarter."""
        n_in = max(1, size // 4)
        n_own = (size - n_in) // 2 if self.near else size - n_in
        n_own = n_own if self.outside else 0
        inside = [self.inside[i] for i in self._next("inside", len(self.inside), n_in)]
        own = [self.outside[i] for i in self._next("outside", len(self.outside), n_own)]
        near = []
        for i in self._next("near", len(self.near), size - n_in - n_own):
            query, records, weights = self.near[i]
            near.append((records[int(self.rng.choice(len(records), p=weights))], query))
        return [self._pair(i, query) for i, query in (*inside, *own, *near)], n_in

    def _next(self, name: str, of: int, n: int) -> list[int]:
        """The next n numbers: each once before one comes again."""
        queue = self._queues[name]
        while len(queue) < n:
            queue += self.rng.permutation(of).tolist()
        self._queues[name] = queue[n:]
        return queue[:n]

    def _pair(self, i: int, query: str) -> Pair:
        lesson = self.memory.lessons[i]
        return Pair(lesson.question, lesson.answer, query)


@final
class Remembering:
    """An encoder that makes the vector of a text once: training, and a memory, ask for the same ones over and over."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.id, self.name, self.width, self.window = encoder.id, encoder.name, encoder.width, encoder.window
        self._kept: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> Vectors:
        if len(self._kept) > REMEMBERED:
            self._kept.clear()
        if new := [text for text in dict.fromkeys(texts) if text not in self._kept]:
            self._kept |= zip(new, self.encoder.encode(new), strict=True)
        out: Vectors = np.stack([self._kept[text] for text in texts]) if texts else np.zeros((0, self.width), dtype=np.float32)
        return out


# ----------------------------------------------------------------------------------------------------------------------------- training


def train(
    lessons: Sequence[Lesson],
    encoder: Encoder,
    *,
    verifier: Literal["distance", "cross"] = "distance",
    backbone: str = "",
    seed: int = 0,
    progress: Progress = no_progress,
    steps: int | None = None,
    batch_size: int = 32,
    rate: float | None = None,
    held: float = 0.25,
    false_fires: float = 0.01,
    mined: bool = True,
    device: str = "cpu",
) -> Scope:
    """A scope from lessons.

    backbone     minilm, lab/bert or the folder of an encoder: what cross reads with; for distance, what is finetuned ("": nothing, vectors
                 are the encoder's own)
    steps        of the descent, each over `batch_size` pairs (of the distance beside a cross, too, which learns at its own rate)
    held         share of the lessons that is held back, for calibration and the bound
    false_fires  the bound on queries that concern no record, for `fire`; with too few of them held back to say so, none of those fires, and
                 `Scope.false_fires` is what can be said. `leave` lies where so few of the pairs in scope lie below it. Where that is above
                 what the bound asks for, the two meet in the middle

    mined        half of the pairs out of scope are what the index finds in the whole memory; else they are each lesson's own, as published

    Raises InvalidExample if there are too few lessons, or none that says anything; UnknownName, MissingExtra.
    """
    if len(lessons) < LEAST or not any(lesson.inside for lesson in lessons):
        raise InvalidExample(
            f"A scope is learnt from {LEAST} lessons or more, some with queries in scope; got {len(lessons)} lessons with "
            f"{sum(len(lesson.inside) for lesson in lessons)} of them."
        )
    rng = np.random.default_rng(seed)
    remembering = Remembering(encoder)
    memory = Lessons(lessons, remembering)
    learning, back = memory.split(held, rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        verifiers = _verifiers(verifier, encoder.width, backbone, device)
    drawn = Drawn(memory, learning, rng, mined)
    if not drawn.inside or not (drawn.outside or drawn.near):
        raise InvalidExample("The lessons to learn from have no pair in scope, or none out of scope. Give more of them.")
    for beside in verifiers[:-1]:
        _descend(beside, drawn, remembering, steps, 2 * batch_size, None, progress)
    _descend(verifiers[-1], drawn, remembering, steps, batch_size, rate, progress)
    return _calibrated(verifiers, memory, back, encoder, remembering, false_fires)


def _descend(
    verifier: Verifier,
    drawn: Drawn,
    encoder: Encoder,
    steps: int | None,
    batch_size: int,
    rate: float | None,
    progress: Progress,
) -> None:
    """AdamW, a step that rises over a tenth of the way and falls to nothing. Weights end as what `parts` keeps of them."""
    with_transformer = verifier.transformer is not None
    steps = steps or (400 if with_transformer else 300)
    rate = rate or (1e-4 if with_transformer else 1e-3)
    verifier.eval().requires_grad_(False)
    learned = list(_learned(verifier).values())
    for p in learned:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(learned, lr=rate, weight_decay=0.01)
    device = learned[0].device.type
    for step in progress(range(steps), f"scope, {verifier.kind}", steps):
        now = min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
        for group in optimiser.param_groups:
            group["lr"] = rate * now
        pairs, n_in = drawn.batch(batch_size)
        with torch.autocast(device, torch.bfloat16, enabled=with_transformer):
            scores_P = verifier(pairs, encoder).float()
        in_P, out_P = verifier.losses(scores_P)
        loss = in_P[:n_in].mean() + out_P[n_in:].mean()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
    verifier.requires_grad_(False)
    with torch.no_grad():
        for p in learned:
            p.copy_(p.to(_kept_as(p)))


# -------------------------------------------------------------------------------------------------------------------------- calibration


def _calibrated(
    verifiers: tuple[Verifier, ...], memory: Lessons, back: Sequence[int], encoder: Encoder, remembering: Encoder, false_fires: float
) -> Scope:
    """Chances and thresholds by the lessons that were held back, asked of the whole memory."""
    whole = range(len(memory.lessons))
    near = float(np.quantile([memory.cosine(i, query) for i in whole for query in memory.lessons[i].inside], NEVER_NEAR)) - MARGIN
    asked = [(i, query) for i in back for query in (*memory.lessons[i].inside, *memory.outside(i))]
    pairs: list[Pair] = []
    concerned: list[bool] = []
    stray: list[list[int]] = []  # for each query that concerns no record, its pairs
    for (i, query), found in zip(asked, memory.nearest([query for _, query in asked], whole, CANDIDATES), strict=True):
        looked = [j for j, score in found if score >= near]
        numbers = range(len(pairs), len(pairs) + len(looked))
        pairs += [Pair(memory.lessons[j].question, memory.lessons[j].answer, query) for j in looked]
        right = [memory.concerns(j, query) for j in looked]
        concerned += right
        if memory.stray(query) or memory.concerns(i, query):
            # a query in scope, asked of the memory without its own record, concerns none of the others
            stray.append([n for n, own in zip(numbers, right, strict=True) if not own])
    scores_PK = _scores(verifiers, pairs, remembering)
    concerned_P = np.array(concerned, dtype=bool)
    follows_P = follows(pairs, _all_bare(pairs))
    slopes, shift, beside = platt(scores_PK, concerned_P, follows_P)
    chances_P = _sigmoid(scores_PK @ np.array(slopes) + shift + beside * follows_P)
    fired = np.array([chances_P[numbers].max(initial=0.0) for numbers in stray])
    certain, bound = above(fired, false_fires)
    enough = -above(-chances_P[concerned_P], false_fires)[0]  # all but so many of the pairs in scope lie above it
    if certain > enough:
        fire, leave = certain, enough
    else:  # the two come apart: between them, in log odds, both are kept with room to spare
        fire = leave = float(_sigmoid(np.array([0.5 * (_log_odds(certain) + _log_odds(enough))]))[0])
    return Scope(
        encoder=encoder,
        near=near,
        fire=fire,
        leave=leave,
        verifiers=verifiers,
        slopes=slopes,
        shift=shift,
        beside=beside,
        false_fires=bound,
        held=tenths(chances_P, concerned_P),
    )


def tenths(chances_P: Chances, concerned_P: Bool[np.ndarray, "P"]) -> tuple[Tenth, ...]:
    """What came of the chances, tenth by tenth, without those that there were none of."""
    of_P = np.minimum(9, (10 * chances_P).astype(int))
    return tuple((float(chances_P[of_P == t].mean()), int((of_P == t).sum()), int(concerned_P[of_P == t].sum())) for t in np.unique(of_P))


def platt(
    scores_PK: Scores, concerned_P: Bool[np.ndarray, "P"], follows_P: Float64[np.ndarray, "P"]
) -> tuple[tuple[float, ...], float, float]:
    """(slopes, shift, beside) so that sigmoid(slopes . scores + shift + beside * follows) is the chance of being concerned (Platt 1999,
    with his targets: a few held-out pairs that are all told apart do not make a chance of 1). No slope is negative: a verifier is believed
    or left out."""
    yes = int(concerned_P.sum())
    no = len(concerned_P) - yes
    wanted_P = np.where(concerned_P, (yes + 1) / (yes + 2), 1 / (no + 2))
    middle_K, spread_K = np.zeros(scores_PK.shape[1]), np.ones(scores_PK.shape[1])
    if len(scores_PK):
        middle_K, spread_K = scores_PK.mean(0), scores_PK.std(0) + 1e-9
    kept = list(range(scores_PK.shape[1]))
    while True:
        x_PK = np.column_stack([(scores_PK[:, kept] - middle_K[kept]) / spread_K[kept], follows_P, np.ones(len(scores_PK))])
        w_K = _newton(x_PK, wanted_P, np.array([1e-6] * len(kept) + [FEW_FOLLOW, 1e-6]))
        if len(kept) == 1 or (w_K[:-2] >= 0).all():
            break
        kept = [k for k, w in zip(kept, w_K[:-2].tolist(), strict=True) if w >= 0] or kept[-1:]
    slopes_K = np.zeros(scores_PK.shape[1])
    slopes_K[kept] = np.maximum(w_K[:-2], 1e-6) / spread_K[kept]
    return tuple(slopes_K.tolist()), float(w_K[-1] - slopes_K @ middle_K), float(w_K[-2])


def _newton(x_PK: Scores, wanted_P: Chances, decay_K: Float64[np.ndarray, "K"]) -> Float64[np.ndarray, "K"]:
    """The weights of a logistic regression, by Newton's steps; each has its decay."""
    w_K = np.zeros(x_PK.shape[1])
    decay = np.diag(decay_K)
    for _ in range(100):
        chance_P = _sigmoid(x_PK @ w_K)
        gradient_K = x_PK.T @ (chance_P - wanted_P) + decay @ w_K
        hessian_KK = (x_PK * (chance_P * (1 - chance_P))[:, None]).T @ x_PK + decay
        step_K = np.linalg.solve(hessian_KK, gradient_K)
        w_K = w_K - step_K * min(1.0, 2.0 / (float(np.abs(step_K).max()) + 1e-12))  # a whole step may leap where chances are near 0 or 1
        if np.abs(step_K).max() < 1e-9:
            break
    return w_K


def above(values: Chances, most: float) -> tuple[float, float]:
    """(threshold, bound): the least threshold that, with 95 % confidence, at most the share `most` of such values reaches; the bound is
    what is known of that share. Where so few values do not say so of any threshold: one that none of them reaches.

    Thresholds are tried from the greatest on, until the first that fails, so that no more confidence is spent on many than on one.
    """
    descending = np.sort(values)[::-1]
    reach = 0
    while reach + 1 < len(descending) and clopper_pearson(reach + 1, len(descending)) <= most:
        reach += 1
    if not len(descending):
        return -math.inf, 1.0
    return float(np.nextafter(descending[reach], math.inf)), clopper_pearson(reach, len(descending))


def clopper_pearson(k: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The upper bound of a share of which k of n were seen."""
    from scipy.special import betaincinv

    return 1.0 if k >= n else float(betaincinv(k + 1, n - k, confidence))
