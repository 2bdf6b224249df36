"""The six tasks of model editing with canonical examples: one short example for each behaviour, judged on text that looks nothing like it.

An example is what an editor sees. A `Record` is what the judge asks: the log-probability of a target (and of a contrast) behind a prompt,
made one number by the task's loss, and a success if that is not above the task's threshold. Hard negatives are records too: their
likelihood should stay. Everything follows Hewitt et al. 2024 (https://arxiv.org/abs/2402.06155), section 4 and table 1, with the numbers
and the sign convention of their code, john-hewitt/model-editing-canonical-examples@15a1e7b.

    task = load(folder, "country", "validation")      before = score(host, task)      change(before, after, "success")

Two variants of each file. `published` is what their code reads. `clean`, the default, drops or mends the records that cannot be judged and
counts them in `Task.defects`. Unlike the reference code
  * hard negatives are those of the split: theirs reads the validation file at test time too, and so does `published`, and only that;
  * prompt and target are one exact string (`hosts.encode`), where they join two that were tokenised apart.

Nothing here edits, or draws a table (`published.py` does). The lab has the same six tasks on its own world: `lab/canonical.py`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, final

from errata import hosts, text
from errata.hosts import Host
from errata.types import Example, Goal, InvalidExample, Score, UnknownName

Split = Literal["validation", "test"]
VARIANTS = ("clean", "published")
SUFFIX: dict[Split, str] = {"validation": "val", "test": "test"}

# --------------------------------------------------------------------------------------------------------------------------- values


@final
@dataclass(frozen=True, kw_only=True)
class Criterion:
    """When a record counts as a success, from log-probabilities summed over the tokens of its target and its contrast."""

    goal: Goal
    threshold: float

    def loss(self, target: float, contrast: float | None = None) -> float:
        """The evaluation loss in nats. Training takes means over tokens instead, and that is the methods' business."""
        assert (contrast is not None) == (self.goal in ("prefer", "balance")), f"{self.goal} with contrast {contrast}"
        if contrast is None:
            return target if self.goal == "lower" else -target
        return contrast - target if self.goal == "prefer" else abs(target - contrast)

    def meets(self, target: float, contrast: float | None = None) -> bool:
        """Whether the loss is at most the threshold: equality is a success in the code, though not in the paper. NaN never is."""
        return self.loss(target, contrast) <= self.threshold


@final
@dataclass(frozen=True, kw_only=True)
class Record:
    """What the judge asks: how likely `target`, and for goals that compare also `contrast`, is behind `prompt`.

    `behaviour` groups what one example should teach (a country, an occupation, a verb); `source` says where the record stands.
    """

    prompt: str
    target: str
    contrast: str | None = None
    behaviour: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name, value in {"prompt": self.prompt, "target": self.target, "contrast": self.contrast}.items():
            if value is not None and not value.strip():
                raise InvalidExample(f"{self.source or 'A record'}: the {name} is empty.")


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of one split: `examples` for the editor, the rest for the judge.

    `unconditional` is text about the behaviours whose loss is watched. `defects` says what was found in the files, and how often.
    """

    name: str
    split: Split
    criterion: Criterion
    examples: tuple[Example, ...]
    records: tuple[Record, ...]
    hard: tuple[Record, ...]
    unconditional: tuple[str, ...]
    defects: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = self.criterion.goal in ("prefer", "balance")
        if strange := [e for e in self.examples if e.goal != self.criterion.goal]:
            raise InvalidExample(f"The task {self.name} is to {self.criterion.goal}, but '{strange[0]}' is to {strange[0].goal}.")
        for record, compares in [*((r, pairs) for r in self.records), *((r, False) for r in self.hard)]:
            if (record.contrast is not None) != compares:
                raise InvalidExample(f"{record.source or record.prompt} {'needs a' if compares else 'takes no'} contrast.")
        object.__setattr__(self, "defects", MappingProxyType(dict(self.defects)))


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One of the six tasks: how it is judged, its folder and files, and the key that names a record's behaviour, where there is one."""

    criterion: Criterion
    folder: str
    train: str
    records: str
    hard: str
    unconditional: str
    key: str | None = None


TASKS: dict[str, Row] = {  # thresholds: paper, section 4; the code writes them out as natural logarithms
    "country": Row(
        criterion=Criterion(goal="raise", threshold=-math.log(0.2)),
        folder="country_capital",
        train="country_capital_fixed",
        records="country_capital_clear_eval",
        hard="country_capital_hard_neg",
        unconditional="country_capital_unconditional",
        key="country",
    ),
    "company": Row(
        criterion=Criterion(goal="raise", threshold=-math.log(0.05)),
        folder="company_ceo",
        train="company_ceo_train",
        records="company_ceo_eval_clear",
        hard="company_ceo_hard_neg_eval_clear",
        unconditional="company_ceo_unconditional",
        key="company",
    ),
    "stereoset": Row(
        criterion=Criterion(goal="lower", threshold=math.log(0.001)),
        folder="stereoset",
        train="stereoset_train",
        records="stereoset_eval_clear",
        hard="stereoset_hard_neg",
        unconditional="stereoset_unconditional",
        key="target",
    ),
    "verb": Row(
        criterion=Criterion(goal="prefer", threshold=math.log(1 / 16)),
        folder="verb_conjugation",
        train="verb_conjugation_train",
        records="verb_conjugation_eval",
        hard="verb_conjugation_hard_neg_eval",
        unconditional="verb_conjugation_eval_unconditional",
    ),
    "gender": Row(
        criterion=Criterion(goal="balance", threshold=math.log(1.5)),
        folder="pronoun_gender_bias",
        train="pronoun_gender_bias_train",
        records="pronoun_gender_bias_eval",
        hard="pronoun_gender_bias_hard_neg_eval",
        unconditional="pronoun_gender_bias_unconditional",
    ),
    "temporal": Row(
        criterion=Criterion(goal="raise", threshold=-math.log(0.05)),
        folder="temporal",
        train="temporal_train",
        records="temporal_eval_clear",
        hard="temporal_hard_neg_eval_clear",
        unconditional="temporal_unconditional",
        key="entity_string",
    ),
}


def row_of(name: str) -> Row:
    """The row of a task. Raises UnknownName."""
    if name not in TASKS:
        raise UnknownName.among("task", name, TASKS)
    return TASKS[name]


def split_of(name: str) -> Split:
    """The split of that name. Raises UnknownName."""
    for known in SUFFIX:
        if name == known:
            return known
    raise UnknownName.among("split", name, SUFFIX)


# ----------------------------------------------------------------------------------------------------------------------------- files


class Line(NamedTuple):
    """One JSON object, and where it stands ("line 3 of …")."""

    source: str
    raw: dict[str, Any]

    def text(self, key: str) -> str:
        value = self.raw.get(key)
        if not isinstance(value, str) or not value.strip():
            raise InvalidExample(f"{self.source} has no '{key}'; it must be text that is not empty.")
        return value

    def but(self, **texts: str) -> "Line":
        return Line(self.source, self.raw | texts)


Lines = dict[str, list[Line]]  # by part: train, records, hard, unconditional


def load(folder: str | Path, name: str, split: str, variant: str = "clean") -> Task:
    """One task from the published layout: `folder`/<data set>/<file>-val.jsonl, where needed with their `split/` in between.

    Raises UnknownName, and InvalidExample with file and line for a file or a record that cannot be read.
    """
    row, split = row_of(name), split_of(split)
    if variant not in VARIANTS:
        raise UnknownName.among("variant", variant, VARIANTS)
    lines = {part: _read(_path(folder, row, part, split)) for part in ("train", "records", "unconditional")}
    lines["hard"] = _read(_path(folder, row, "hard", "validation" if variant == "published" else split))
    defects: dict[str, int] = {}
    if variant == "clean":
        if name == "stereoset" and split == "test":
            lines["validation"] = _read(_path(folder, row, "train", "validation"))
        lines, defects = _cleaned(lines, DEFECTS.get(name, lambda lines: iter(())))
    names = [line.text("prefix").removeprefix("The ").removesuffix(" said") for line in lines["train"]]  # occupations, for gender
    pair = row.criterion.goal in ("prefer", "balance")
    return Task(
        name=name,
        split=split,
        criterion=row.criterion,
        examples=tuple(_example(line, row.criterion.goal) for line in lines["train"]),
        records=tuple(_record(line, pair, _behaviour(name, line, names)) for line in lines["records"]),
        hard=tuple(_record(line, False, _behaviour(name, line, names)) for line in lines["hard"]),
        unconditional=tuple(line.text("text") for line in lines["unconditional"]),
        defects=defects,
    )


def _path(folder: str | Path, row: Row, part: str, split: Split) -> Path:
    home = Path(folder) / row.folder
    return (home / "split" if (home / "split").is_dir() else home) / f"{getattr(row, part)}-{SUFFIX[split]}.jsonl"


def _read(path: Path) -> list[Line]:
    out = []
    for where, line in text.lines(path, "task file", InvalidExample):
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InvalidExample(f"{where} is not JSON: {e}.") from e
        if not isinstance(raw, dict):
            raise InvalidExample(f"{where} is not a JSON object.")
        out.append(Line(where, raw))
    return out


def _texts(line: Line, pair: bool) -> dict[str, Any]:
    if pair:
        return {"prompt": line.text("prefix"), "target": line.text("suffix1"), "contrast": line.text("suffix2")}
    return {"prompt": line.text("prefix"), "target": line.text("suffix")}


def _example(line: Line, goal: Goal) -> Example:
    texts = _texts(line, goal in ("prefer", "balance"))
    try:
        return Example(**texts, goal=goal)
    except InvalidExample as e:
        raise InvalidExample(f"{line.source}: {e}") from e


def _record(line: Line, pair: bool, behaviour: str) -> Record:
    return Record(**_texts(line, pair), behaviour=behaviour, source=line.source)


def _behaviour(name: str, line: Line, occupations: Iterable[str]) -> str:
    """What the record is about: its key; the occupation in its prompt; the verb of its two targets. Without one, the record itself."""
    found = ""
    if key := TASKS[name].key:
        found = str(line.raw.get(key, "")).lower()  # StereoSet spells one target in several ways
    elif name == "gender":
        found = next((o for o in occupations if re.search(rf"\b{re.escape(o)}\b", line.text("prefix"))), "")
    elif "suffix2" in line.raw:
        found = min((line.text(k).split()[0] for k in ("suffix1", "suffix2")), key=len)
    return found or line.source


# --------------------------------------------------------------------------------------------------------------------------- defects


class Defect(NamedTuple):
    """A kind of faulty record: the indices of those in one part that have it, and how each is mended; None if it is dropped."""

    name: str
    part: str
    found: list[int]
    mend: Callable[[Line], Line] | None = None


def _cleaned(lines: Lines, look: Callable[[Lines], Iterator[Defect]]) -> tuple[Lines, dict[str, int]]:
    """All defects are looked for in the lines as published, so that no count depends on another one."""
    out: dict[str, dict[int, Line]] = {part: dict(enumerate(rows)) for part, rows in lines.items()}
    counts = {}
    for name, part, found, mend in look(lines):
        counts[name] = len(found)
        for i in found:
            if mend is None:
                out[part].pop(i, None)
            elif i in out[part]:
                out[part][i] = mend(out[part][i])
    return {part: list(rows.values()) for part, rows in out.items()}, counts


def _where(lines: list[Line], faulty: Callable[[Line], bool]) -> list[int]:
    return [i for i, line in enumerate(lines) if faulty(line)]


def _unnamed(key: str) -> Callable[[Line], bool]:
    return lambda line: line.text(key).lower() not in line.text("prefix").lower()


def _given_away(line: Line) -> bool:
    return text.whole(line.text("suffix").strip()).search(line.text("prefix")) is not None


def _repeated(lines: list[Line]) -> list[int]:
    first = {(line.text("prefix"), line.text("suffix")): i for i, line in reversed(list(enumerate(lines)))}
    return sorted(set(range(len(lines))) - set(first.values()))


def _country(lines: Lines) -> Iterator[Defect]:
    def whole(line: Line) -> Line:
        return line.but(prefix=f"The capital of {line.text('country')} is", suffix=f" {line.text('capital')}")

    def malformed(line: Line) -> bool:
        return bool(re.search(r"^['\"]|statement =", line.text("prefix")) or re.search(r"['\"]$", line.text("suffix")))

    train, records = lines["train"], lines["records"]
    yield Defect("train: stray quotes or code", "train", _where(train, malformed), whole)
    # the converter cut at the first occurrence of the capital, here inside the country's name
    same = _where(train, lambda line: line.text("capital") == line.text("country"))
    yield Defect("train: capital equals country", "train", same, whole)
    yield Defect("train: cut inside the country's name", "train", _where(train, _unnamed("country")), whole)
    yield Defect("records: country not named", "records", _where(records, _unnamed("country")))
    yield Defect("records: answer given away", "records", _where(records, _given_away))


def _company(lines: Lines) -> Iterator[Defect]:
    train, records = lines["train"], lines["records"]
    heads: dict[str, set[str]] = {}
    for line in train:
        heads.setdefault(line.text("company"), set()).add(line.text("suffix"))
    for part in ("train", "records"):
        two = _where(lines[part], lambda line: len(heads.get(line.text("company"), ())) > 1)
        yield Defect(f"{part}: company with two heads", part, two)
    yield Defect("records: company not named", "records", _where(records, _unnamed("company")))
    yield Defect("records: answer given away", "records", _where(records, _given_away))


def _stereoset(lines: Lines) -> Iterator[Defect]:
    train, records, hard = lines["train"], lines["records"], lines["hard"]
    if not len(train) == len(records) == len(lines["unconditional"]):
        counts = f"{len(train)} examples, {len(records)} records and {len(lines['unconditional'])} sentences"
        raise InvalidExample(f"The StereoSet files belong together line by line, but hold {counts}. Take them from one source.")

    def pair(line: Line) -> tuple[str, str]:
        return line.text("target").lower(), line.text("suffix").strip().lower()

    stale = [i for i in range(len(records)) if records[i].text("suffix") != train[i].text("suffix")]
    yield Defect("records: another item's text", "records", stale)  # their converter kept the last one where it found no word
    yield Defect("records: target not named", "records", _where(records, _unnamed("target")))
    yield Defect("train: repeated", "train", _repeated(train))
    anti = set()
    for i, line in enumerate(lines["unconditional"]):  # the same sentence with the word that counts as no stereotype
        before, prefix, after = line.text("text").removeprefix("<|endoftext|>").strip().partition(records[i].text("prefix"))
        if not before and prefix and (word := re.match(r"\s*([^\s.,!?;]+)", after)):
            anti.add((train[i].text("target").lower(), word[1].lower()))
    for part in ("train", "records"):
        yield Defect(f"{part}: word labelled both ways", part, _where(lines[part], lambda line: pair(line) in anti))
    if "validation" in lines:
        seen = {pair(line) for line in lines["validation"]}
        for part in ("train", "records"):
            yield Defect(f"{part}: behaviour of the validation split", part, _where(lines[part], lambda line: pair(line) in seen))

    def spaced(line: Line) -> Line:
        return line.but(prefix=line.text("prefix").rstrip(" "), suffix=f" {line.text('suffix')}")

    loose = _where(hard, lambda line: line.text("prefix").endswith(" ") and not line.text("suffix").startswith(" "))
    yield Defect("hard: space before the border", "hard", loose, spaced)  # a tokeniser puts it into the first token of the word
    yield Defect("hard: repeated", "hard", _repeated(hard))


def _temporal(lines: Lines) -> Iterator[Defect]:
    train, records = lines["train"], lines["records"]
    told: dict[str, str] = {}
    for line in train:
        told[line.text("entity_string")] = told.get(line.text("entity_string"), "") + (line.text("prefix") + line.text("suffix")).lower()
    glued = _where(records, lambda line: not line.text("suffix")[0].isspace())
    yield Defect("records: target glued to the prompt", "records", glued)
    untold = _where(records, lambda line: line.text("suffix").strip().lower() not in told.get(line.text("entity_string"), ""))
    yield Defect("records: target not in the example", "records", untold)
    asked = {line.text("entity_string") for line in records}
    yield Defect("train: entity without a record", "train", _where(train, lambda line: line.text("entity_string") not in asked))


# Verb has defects too (a rare verb completed in another reading), which only a reader finds.
DEFECTS: dict[str, Callable[[Lines], Iterator[Defect]]] = {
    "country": _country,
    "company": _company,
    "stereoset": _stereoset,
    "temporal": _temporal,
}


# --------------------------------------------------------------------------------------------------------------------------- scores


def score(host: Host, task: Task) -> tuple[Score, ...]:
    """What a host does on a task, one Score for each behaviour and measure (so that a bootstrap over cases redraws behaviours).

    success             records whose loss is at most the threshold
    loss.records        the evaluation loss, mean over records, nats
    loss.hard           -log p of the hard negatives' targets, summed over tokens, mean over records
    loss.unconditional  mean token loss on the unconditional text

    Raises InvalidExample, with the record's place, if its target becomes no token or it does not fit the context (see `fitting`).
    """
    target = _logprobs(host, task.records, [r.target for r in task.records])
    pairs = [r for r in task.records if r.contrast is not None]
    contrast: list[float | None] = [*_logprobs(host, pairs, [str(r.contrast) for r in pairs])] if pairs else [None] * len(target)
    out = [*_grouped(task, "success", task.records, [task.criterion.meets(t, c) for t, c in zip(target, contrast, strict=True)])]
    out += _grouped(task, "loss.records", task.records, [task.criterion.loss(t, c) for t, c in zip(target, contrast, strict=True)])
    out += _grouped(task, "loss.hard", task.hard, [-logp for logp in _logprobs(host, task.hard, [r.target for r in task.hard])])
    rows = hosts.chunks(host, task.unconditional, size=host.context)
    for i, (total, count) in enumerate(hosts.score(host, rows).tolist()):
        out.append(Score(case=f"{task.name}/text {i}", measure="loss.unconditional", total=-total, count=int(count)))
    return tuple(out)


def fitting(host: Host, task: Task) -> Task:
    """The task without the examples and records that are longer than the host reads, counted in its defects: paragraphs of `country` and
    `temporal` have up to some 700 tokens. A few that would just fit are left out too, for prompt and target are counted apart."""

    def fits(x: Example | Record) -> bool:
        room = host.context - len(hosts.tokens(host, x.prompt))
        return all(len(hosts.tokens(host, text)) <= room for text in (x.target, x.contrast) if text is not None)

    examples, records, hard = (
        tuple(e for e in task.examples if fits(e)),
        tuple(r for r in task.records if fits(r)),
        tuple(r for r in task.hard if fits(r)),
    )
    longer = {
        f"{part}: longer than {host.name} reads": len(all_) - len(kept)
        for part, all_, kept in (("train", task.examples, examples), ("records", task.records, records), ("hard", task.hard, hard))
    }
    return replace(task, examples=examples, records=records, hard=hard, defects={**task.defects, **longer})


def mean(rows: Iterable[Score], measure: str) -> float | None:
    """Over all records alike; None where there is none."""
    found = [s for s in rows if s.measure == measure]
    count = sum(s.count for s in found)
    return sum(s.total for s in found) / count if count else None


def change(before: Iterable[Score], after: Iterable[Score], measure: str) -> float | None:
    """After minus before: of `success` a share (the paper prints percentage points), of `loss.hard` nats."""
    first, second = mean(before, measure), mean(after, measure)
    return None if first is None or second is None else second - first


def _logprobs(host: Host, records: Sequence[Record], targets: Sequence[str]) -> list[float]:
    """Summed log-probability of each target behind its record's prompt."""
    rows = []
    for record, target in zip(records, targets, strict=True):
        try:
            rows.append(hosts.encode(host, record.prompt, target))
        except InvalidExample as e:
            raise InvalidExample(f"{record.source or 'A record'}: {e}") from e
    return [float(total) for total in hosts.score(host, rows)[:, 0]] if rows else []


def _grouped(task: Task, measure: str, records: Sequence[Record], values: Sequence[float | bool]) -> Iterator[Score]:
    groups: dict[str, list[float]] = {}
    for record, value in zip(records, values, strict=True):
        groups.setdefault(record.behaviour or record.source, []).append(float(value))
    for behaviour, found in groups.items():
        yield Score(case=f"{task.name}/{behaviour}", measure=measure, total=sum(found), count=len(found))
