"""Scores -> tables and pictures: one self-contained HTML page, and the same numbers as JSON beside it.

The page loads nothing: its pictures are inline SVG drawn here, its style is in it, and no script runs. The words stand in
`report.html.j2`. Nothing here measures anything: see `evaluate.py` and `gate.py`.

    html_path, json_path = write(Report(title="...", host=host.name, host_id=host.id, entries=(Entry(...),)), "report.html")
"""

import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple, final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from errata import apply, evaluate
from errata.artefact import write_whole
from errata.evaluate import Answer, Estimate, Scores, aggregate, is_rate, over_cases, paired_difference
from errata.hosts import Host
from errata.types import RINGS, EditError, Example, InvalidExample, Op, Patch, Ring, Verdict

FORMAT = "errata-report-1"
RING_NAMES: dict[Ring, str] = {"subject": "same subject", "relation": "same relation", "unrelated": "unrelated"}
SHOWN = {"edit": 1, "paraphrases": 2, "paragraphs": 1, "negations": 1, "neighbours.subject": 1, "neighbours.relation": 1}
SHOWN_CASES = 4
SHOWN_FAILURES = 200
LINE, WIDE = 14.0, 7.5  # what a label takes in a picture: its height, and the width of a letter
GROUPS = {
    "What the edit is for": ("edit", "paraphrases", "paragraphs", "ood", "negations"),
    "What must stay": (
        *("neighbours", *evaluate.NEIGHBOURS),
        *(f"{m}.{r}" for m in ("accuracy", "agreement", "top1", "kl") for r in RINGS),
        *("top1.reference", "kl.reference", "loss.reference"),
    ),
    "Extras, easier than free generation": tuple(m for m in evaluate.MEASURES if m.startswith(("teacher.", "p0.2."))),
}


# --------------------------------------------------------------------------------------------------------------------------- values


@final
@dataclass(frozen=True, kw_only=True)
class Moved:
    """||change|| / ||weight|| (Frobenius) of one part of one layer; 0 where nothing was touched.

    `layer` is the number of a block, or embedding, norm, head, other; `part` is attention, mlp or norm in a block and "" elsewhere.
    """

    layer: str
    part: str
    norm: float


@final
@dataclass(frozen=True, kw_only=True)
class Entry:
    """One patch in the report. Entries of one `label` make one line of the chart; `epsilon` None keeps an entry out of it.

    `seconds` and `peak_mb` are what making the patch took; what evaluating it took is in `scores`.
    """

    label: str
    method: str
    scores: Scores
    epsilon: float | None = None
    verdict: Verdict | None = None
    seconds: float = 0.0
    peak_mb: float = 0.0
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    moved: tuple[Moved, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page tells. The first entry is the patch it is about; the others stand beside it in the chart and its table.

    `before` are the scores of the host without an edit, `undo` the commands that take the patch off, `settings` whatever else should be
    kept with the numbers, `versions` those of the software (see `versions()`). Raises InvalidExample without entries.
    """

    title: str
    host: str
    host_id: str
    entries: tuple[Entry, ...]
    examples: tuple[Example, ...] = ()
    before: Scores | None = None
    undo: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.entries:
            raise InvalidExample("A report needs one entry or more: evaluate a patch first.")


def versions() -> dict[str, str]:
    """Of this software and what it stands on, for `Report.versions`."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in ("errata", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "not installed"
    return found


def where(host: Host, patch: Patch) -> tuple[Moved, ...]:
    """Where the change sits: one `Moved` for each part of each layer, in the order of the model."""
    ops: dict[tuple[str, str], list[Op]] = {}
    for name, _ in host.model.named_parameters():
        ops.setdefault(_place(host, name), [])
    for op in patch.ops:
        ops.setdefault(_place(host, op.weight), []).append(op)
    ranked = sorted(ops, key=lambda place: (_column(place[0]), place[1]))
    return tuple(
        Moved(layer=layer, part=part, norm=apply.relative_norm(host, replace(patch, ops=tuple(ops[layer, part])))) for layer, part in ranked
    )


def _column(layer: str) -> float:
    return float(layer) if layer.isdigit() else -1.0 if layer == "embedding" else math.inf


def _place(host: Host, weight: str) -> tuple[str, str]:
    layout = host.layout
    for row, _ in host.stacks():
        if weight.startswith(f"{row.blocks}."):
            block, _, rest = weight.removeprefix(f"{row.blocks}.").partition(".")
            parts = {"attention": (*row.attention_in, row.attention_out), "mlp": (*row.mlp_in, row.mlp_out)}
            kind = next((part for part, names in parts.items() if rest.startswith(tuple(f"{n}." for n in names))), "norm")
            return block, kind if row is layout else f"encoder's {kind}"
    if weight == layout.head:  # the module, not a parameter: an ensemble
        return "beside", ""
    places = {"embedding": layout.embedding, "norm": layout.norm, "head": layout.head}
    places |= {"senses": layout.senses} if layout.senses else {}
    return next((place for place, name in places.items() if weight.startswith(f"{name}.")), "other"), ""


# ---------------------------------------------------------------------------------------------------------------------------- output


def write(report: Report, path: str | Path) -> tuple[Path, Path]:
    """Write the page and the JSON beside it, each whole or not at all; returns their paths. Raises LedgerError if the disk refuses."""
    path = Path(path)
    page = path if path.suffix in (".html", ".htm") else path.with_name(f"{path.name}.html")
    numbers = page.with_suffix(".json")
    for target, text in ((numbers, as_json(report)), (page, html(report))):
        write_whole(target, text.encode())
    return page, numbers


def as_json(report: Report) -> str:
    """Everything in the report, every row of every score among it. JSON has no NaN: a number that is not finite is {"not finite": ..}."""
    return json.dumps({"format": FORMAT} | _plain(report), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> Report:
    """The inverse of `as_json`, to make one page of several. Raises InvalidExample."""
    try:
        raw = json.loads(text, object_hook=lambda d: float(d["not finite"]) if d.keys() == {"not finite"} else d)
        if (stated := raw.pop("format")) != FORMAT:
            raise InvalidExample(f"This report has format '{stated}', this version reads '{FORMAT}'.")
        before = raw.pop("before")
        return Report(
            entries=tuple(_entry(e) for e in raw.pop("entries")),
            examples=tuple(Example(**e) for e in raw.pop("examples")),
            before=Scores.from_dict(before) if before else None,
            undo=tuple(raw.pop("undo")),
            **raw,
        )
    except EditError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise InvalidExample(f"Not a report: {e!r}.") from e


def _entry(raw: dict[str, Any]) -> Entry:
    verdict = raw.pop("verdict")
    return Entry(
        scores=Scores.from_dict(raw.pop("scores")),
        verdict=Verdict.from_dict(verdict) if verdict else None,
        moved=tuple(Moved(**m) for m in raw.pop("moved")),
        **raw,
    )


def _plain(value: Any) -> Any:
    """`value` as JSON's own types."""
    match value:
        case float() if not math.isfinite(value):
            return {"not finite": repr(value)}
        case Scores() | Verdict() | Example():
            return _plain(value.as_dict())
        case Report() | Entry() | Moved():
            return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return value


def html(report: Report) -> str:
    """The page as one string."""
    main = report.entries[0]
    return _rendered(
        "report.html.j2",
        report=report,
        main=main,
        verdict=main.verdict,
        tiles=_tiles(report),
        budget=budget_bar(main.verdict) if main.verdict else None,
        shown=_shown(main.scores.answers),
        kinds=_KINDS,
        failures=[a for a in main.scores.answers if not a.ok and (a.was or a.measure not in evaluate.NEIGHBOURS)],
        max_failures=SHOWN_FAILURES,
        chart=budget_chart(report.entries, report.before),
        legend=_legend(report.entries),
        entries=[_compared(e) for e in _in_order(report.entries)],
        measures=_measures(main.scores, report.before),
        rings=_rings(main.scores),
        ring_chart=ring_chart({r: aggregate(main.scores, f"neighbours.{r}") for r in RINGS}),
        heat=layer_heat(main.moved) if any(m.norm for m in main.moved) else None,
        undo=report.undo or ("errata.take_off(host)   # puts the base's own tensors back, bit for bit",),
    )


def write_picture(picture: Markup, title: str, note: str, path: str | Path) -> Path:
    """Write one picture as a page of its own (.html) or as a drawing (.svg); returns its path.

    Raises InvalidExample for another kind of file, LedgerError if the disk refuses.
    """
    path = Path(path)
    check_picture(path)
    if path.suffix == ".svg":
        page = str(_standing_alone(picture))
    else:
        page = _rendered("picture.html.j2", title=title, note=note, picture=picture)
    write_whole(path, page.encode())
    return path


def check_picture(path: Path | None) -> None:
    """Raises InvalidExample unless `write_picture` can write such a file: before what is to be drawn is measured."""
    if path is not None and path.suffix not in (".html", ".htm", ".svg"):
        raise InvalidExample(f"A picture is written as .html or .svg, and '{path.name}' is neither.")


def _read(name: str) -> str:
    return resources.files("errata").joinpath(name).read_text(encoding="utf-8")


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (cut, rate, interval, difference, number, power, size, seconds, is_rate)}
    return environment.from_string(_read(template)).render(style=Markup(_read("report.css")), **values)


# ---------------------------------------------------------------------------------------------------------------------------- tables


_KINDS = {
    "edit": "the example",
    "paraphrases": "unseen phrasing",
    "paragraphs": "in a paragraph",
    "negations": "denial",
    **{f"neighbours.{r}": f"neighbour ({r})" for r in RINGS},
}


class Tile(NamedTuple):
    name: str
    value: str
    lines: tuple[str, ...]


class Row(NamedTuple):
    """One line of the table of measures."""

    measure: str
    meaning: str
    before: float | None
    now: Estimate
    cases: Estimate
    difference: Estimate | None


def _tiles(report: Report) -> Iterator[Tile]:
    main = report.entries[0]
    for name, measure in (("Unseen text right", "ood"), ("Neighbours kept", "neighbours")):
        now = aggregate(main.scores, measure)
        was = aggregate(report.before, measure).value if report.before and measure == "ood" else None
        lines = [f"95 %: {interval(now, True)}" if now.low is not None else "nothing to count", f"n = {now.n:,}"]
        yield Tile(name, rate(now.value), (*([f"was {rate(was)}"] if was is not None else []), *lines))
    if verdict := main.verdict:
        lines = [f"loss {power(verdict.increase, True)}, bound {power(verdict.upper, True)}", f"limit {power(verdict.budget.epsilon)}"]
        yield Tile("Budget spent", rate(verdict.spent, 0), tuple(lines))
    yield Tile("Made in", seconds(main.seconds), (f"patch of {size(main.scores.patch_bytes)}", f"peak memory {size(main.peak_mb * 2**20)}"))


def _shown(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The first answers of each kind of the first cases, in their order, whatever came out."""
    cases = list(dict.fromkeys(a.case for a in answers))[:SHOWN_CASES]
    return [[a for kind, n in SHOWN.items() for a in [a for a in answers if (a.case, a.measure) == (case, kind)][:n]] for case in cases]


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    """By label, as they come, then by budget."""
    labels = list(dict.fromkeys(e.label for e in entries))
    return sorted(entries, key=lambda e: (labels.index(e.label), e.epsilon or 0.0))


def _compared(entry: Entry) -> dict[str, Any]:
    return {"entry": entry} | {m: aggregate(entry.scores, m) for m in ("edit", "ood", "neighbours")}


def _measures(scores: Scores, before: Scores | None) -> dict[str, list[Row]]:
    held = {s.measure for s in scores.rows}
    return {group: [_row(m, scores, before) for m in measures if m in held] for group, measures in GROUPS.items()}


def _row(measure: str, scores: Scores, before: Scores | None) -> Row:
    was = aggregate(before, measure) if before else None
    return Row(
        measure=measure,
        meaning=evaluate.MEASURES[measure],
        before=was.value if was else None,
        now=aggregate(scores, measure),
        cases=over_cases(scores, measure),
        difference=paired_difference(before, scores, measure) if before else None,
    )


def _rings(scores: Scores) -> list[tuple[str, dict[str, Estimate]]]:
    measures = ("neighbours", "agreement", "top1", "kl")
    return [(RING_NAMES[ring], {m: aggregate(scores, f"{m}.{ring}") for m in measures}) for ring in RINGS]


def cut(text: str, length: int = 90) -> str:
    """Text for a table cell: one line, control characters made visible, cut at the end."""
    line = " ".join(text.strip().replace("\n", " ⏎ ").split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if len(line) <= length else f"{line[:length].rstrip()}…"


def rate(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "none"
    return f"{100 * value:.{digits}f} %".replace("-", "−") if math.isfinite(value) else "not finite"


def number(value: float | None, sign: bool = False, figures: int = 3) -> str:
    """So many figures; small and large ones with a power of ten."""
    if value is None or not math.isfinite(value) or not (value == 0 or 1e-2 <= abs(value) < 1e4):
        return power(value, sign)
    return f"{value:{'+' if sign else ''}.{figures}g}".replace("-", "−")


def power(value: float | None, sign: bool = False) -> str:
    """Two figures and a power of ten, as budgets are written."""
    if value is None:
        return "none"
    if not math.isfinite(value):
        return "not finite"
    mantissa, _, exponent = f"{value:{'+' if sign else ''}.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


def difference(e: Estimate, as_rate: bool) -> str:
    """The value with its interval; of rates, in percentage points."""
    if e.value is None:
        return "none"
    value = f"{100 * e.value:+.1f}".replace("-", "−") if as_rate and math.isfinite(e.value) else number(e.value, True)
    return f"{value} ({interval(e, as_rate).removesuffix(' %')})" if e.low is not None else value


def interval(e: Estimate, as_rate: bool) -> str:
    if e.low is None or e.high is None:
        return "none"
    if not (math.isfinite(e.low) and math.isfinite(e.high)):
        return "not finite"
    return f"{100 * e.low:.1f} to {100 * e.high:.1f} %".replace("-", "−") if as_rate else f"{number(e.low)} to {number(e.high)}"


def size(nbytes: int | float) -> str:
    units = ("B", "kB", "MB", "GB")
    step = min(3, (len(str(int(nbytes))) - 1) // 3)
    return f"{nbytes / 1000**step:.{1 if step else 0}f} {units[step]}"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


# -------------------------------------------------------------------------------------------------------------------------- pictures


def _tag(name: str, *inside: str, **attributes: object) -> Markup:
    """One SVG element. `class_` and `text_anchor` become class and text-anchor; numbers are rounded to a hundredth."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.2f}".rstrip("0").rstrip(".") if isinstance(v, float) else v)
        for key, v in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, Markup("").join(inside))  # join escapes what is plain text


def _picture(width: int, height: int, title: str, description: str, parts: Iterable[str]) -> Markup:
    slug = "".join(c for c in title.lower() if c.isalnum())
    return _tag(
        "svg",
        _tag("title", title, id=f"t-{slug}"),
        _tag("desc", description, id=f"d-{slug}"),
        *parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_labelledby=f"t-{slug} d-{slug}",
        style=f"min-width:{min(width, 560)}px",
    )


def _label(text: str, x: float, y: float, **more: object) -> Markup:
    return _tag("text", text, x=x, y=y, **more)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def budget_bar(verdict: Verdict) -> Markup:
    """The measured increase, its 95 % bound and the limit on one axis."""
    limit, told = verdict.budget.epsilon, f"reference loss {power(verdict.increase, True)}, 95 % bound {power(verdict.upper, True)}"
    description = f"{told}, limit {power(limit)}."
    width, left, right, top, height = 760, 14.0, 746.0, 30.0, 26.0
    if not (math.isfinite(verdict.increase) and math.isfinite(verdict.upper)):
        return _picture(
            width, 40, "Budget spent", description, [_label("The loss on reference text is not finite.", left, 25.0, class_="bad")]
        )
    low, high = min(0.0, 1.1 * verdict.increase), 1.15 * max(limit, verdict.upper, verdict.increase)

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    def mark(text: str, value: float, y: float, **more: object) -> Markup:
        at = x(value)
        anchor = "start" if at < width * 0.2 else "end" if at > width * 0.8 else "middle"
        return _label(text, at, y, text_anchor=anchor, **more)

    start, end = sorted((x(0.0), x(verdict.increase)))
    inside = "good" if verdict.upper <= limit else "bad"
    middle = top + height / 2
    parts = [
        _tag("rect", x=left, y=top, width=right - left, height=height, rx=5, class_="track"),
        _tag("rect", x=x(0.0), y=top, width=x(limit) - x(0.0), height=height, class_="room"),
        _tag("rect", x=start, y=top + 5, width=max(2.0, end - start), height=height - 10, class_=f"fill {inside}"),
        _line(x(verdict.increase), middle, x(verdict.upper), middle, "whisker"),
        _line(x(verdict.upper), top + 4, x(verdict.upper), top + height - 4, "whisker"),
        _line(x(limit), top - 7, x(limit), top + height + 7, "limit"),
        _line(x(0.0), top - 2, x(0.0), top + height + 2, "axis"),
        mark(f"limit {power(limit)}", limit, top - 12, class_="strong"),
        mark(f"measured {power(verdict.increase, True)}", verdict.increase, top + height + 18),
        mark(f"95 % bound {power(verdict.upper, True)}", verdict.upper, top + height + 36, class_="muted"),
    ]
    return _picture(width, round(top + height + 44), "Budget spent", description, parts)


def _marker(series: int, x: float, y: float, hollow: bool) -> Markup:
    """Circle, square, triangle or diamond, so that lines differ by more than colour; hollow for a refused patch."""
    class_ = f"mark s{series % 8}" + (" hollow" if hollow else "")
    if series % 4 == 0:
        return _tag("circle", cx=x, cy=y, r=4.6, class_=class_)
    shapes = {
        1: ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
        2: ((0, -5.4), (5.2, 4.2), (-5.2, 4.2)),
        3: ((0, -5.8), (5.8, 0), (0, 5.8), (-5.8, 0)),
    }
    points = " ".join(f"{x + dx:.2f},{y + dy:.2f}" for dx, dy in shapes[series % 4])
    return _tag("polygon", points=points, class_=class_)


def _lines(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """label -> its entries from the smallest budget to the largest; entries without a budget are in no line."""
    out: dict[str, list[Entry]] = {}
    for e in _in_order(entries):
        if e.epsilon is not None:
            out.setdefault(e.label, []).append(e)
    return out


def _legend(entries: Sequence[Entry]) -> list[tuple[str, Markup]]:
    """(label, small picture) for each line of the chart."""
    pictures = [_line(1.0, 8.0, 33.0, 8.0, f"series s{i % 8}") + _marker(i, 17.0, 8.0, False) for i in range(len(_lines(entries)))]
    return [
        (label, _tag("svg", picture, viewBox="0 0 34 16", width=34, height=16, aria_hidden="true"))
        for label, picture in zip(_lines(entries), pictures, strict=True)
    ]


@final
@dataclass(frozen=True, kw_only=True)
class _Plane:
    """Where a value between `low` and `high`, such as the logarithm of a budget, and a share stand in the chart."""

    low: float
    high: float
    left: float = 52.0
    right: float = 744.0
    top: float = 14.0
    bottom: float = 316.0

    def x(self, value: float) -> float:
        return self.left + 24 + (self.right - self.left - 48) * (value - self.low) / (self.high - self.low)

    def y(self, share: float) -> float:
        return self.bottom - (self.bottom - self.top) * share


def budget_chart(entries: Sequence[Entry], before: Scores | None = None) -> Markup | None:
    """Unseen text right (solid, with Wilson bars) and neighbours kept (dashed) against epsilon, one colour for each label."""
    lines = _lines(entries)
    if not lines:
        return None
    budgets = [e.epsilon or 1.0 for own in lines.values() for e in own]
    plane = _Plane(low=math.log10(min(1e-5, *budgets)), high=math.log10(max(1e-2, *budgets)))
    parts = list(_axes(plane, "limit on the relative increase of reference loss (ε)"))
    parts += (_decade(plane, decade) for decade in range(math.ceil(plane.low - 1e-9), math.floor(plane.high + 1e-9) + 1))
    base = aggregate(before, "ood").value if before else None
    if base is not None and math.isfinite(base):
        parts.append(_line(plane.left, plane.y(base), plane.right, plane.y(base), "base"))
        parts.append(_label("no edit", plane.right - 4, plane.y(base) - 6, text_anchor="end", class_="muted"))
    for i, own in enumerate(lines.values()):
        shift = min(8, 44 / len(lines)) * (i - (len(lines) - 1) / 2)  # keeps the marks of several labels at one budget apart
        refused = [e.verdict is not None and not e.verdict.passed for e in own]
        at = [plane.x(math.log10(e.epsilon or 1.0)) + shift for e in own]
        parts += _points(i, list(zip(at, (e.scores for e in own), refused, strict=True)), plane)
    description = "; ".join(
        f"{e.label} at {power(e.epsilon)}: {rate(aggregate(e.scores, 'ood').value)} of unseen text right, "
        f"{rate(aggregate(e.scores, 'neighbours').value)} of neighbours kept"
        for own in lines.values()
        for e in own
    )
    return _picture(760, 360, "Success against budget", description, parts)


def alpha_chart(curve: Sequence[tuple[float, Scores]], before: Scores, epsilon: float) -> Markup:
    """Unseen text right (solid, with Wilson bars) and neighbours kept (dashed) against alpha; hollow where the mean increase of the loss
    on reference text is over `epsilon`. Raises InvalidExample for fewer than two values of alpha."""
    if len(curve) < 2:
        raise InvalidExample(f"A curve needs two values of alpha or more, got {len(curve)}.")
    plane = _Plane(low=min(a for a, _ in curve), high=max(a for a, _ in curve))
    base = aggregate(before, "loss.reference").value
    rises = [(aggregate(s, "loss.reference").value or math.nan) / base - 1 if base else 0.0 for _, s in curve]
    parts = list(_axes(plane, "alpha: base + alpha × change"))
    for a, _ in curve:
        parts.append(_line(plane.x(a), plane.bottom, plane.x(a), plane.bottom + 5, "axis"))
        parts.append(_label(number(a), plane.x(a), plane.bottom + 21, text_anchor="middle", class_="muted"))
    parts += _points(0, [(plane.x(a), s, not rise <= epsilon) for (a, s), rise in zip(curve, rises, strict=True)], plane)
    description = "; ".join(
        f"alpha {number(a)}: {rate(aggregate(s, 'ood').value)} of unseen text right, {rate(aggregate(s, 'neighbours').value)} of "
        f"neighbours kept, loss {power(rise, True)}"
        for (a, s), rise in zip(curve, rises, strict=True)
    )
    return _picture(760, 360, "Success against alpha", description, parts)


def facts_chart(curves: Mapping[str, Sequence[tuple[int, Scores]]]) -> Markup:
    """Unseen text right (solid, with Wilson bars) and neighbours kept (dashed) against the number of facts edited at once, one colour for
    each method, whose name stands at the end of its line."""
    sizes = sorted({n for points in curves.values() for n, _ in points})
    plane = _Plane(low=math.log2(sizes[0]), high=max(math.log2(sizes[-1]), math.log2(sizes[0]) + 1), right=664.0)
    parts, ends = list(_axes(plane, "facts edited at once")), list[tuple[float, float, str]]()
    for n in sizes:
        parts.append(_line(plane.x(math.log2(n)), plane.bottom, plane.x(math.log2(n)), plane.bottom + 5, "axis"))
        parts.append(_label(f"{n:,}", plane.x(math.log2(n)), plane.bottom + 21, text_anchor="middle", class_="muted"))
    for i, (name, points) in enumerate(curves.items()):
        shift = min(8, 44 / len(curves)) * (i - (len(curves) - 1) / 2)
        at = [plane.x(math.log2(n)) + shift for n, _ in points]
        parts += _points(i, [(x, scores, False) for x, (_, scores) in zip(at, points, strict=True)], plane)
        ends.append((at[-1] + 10, plane.y(aggregate(points[-1][1], "ood").value or 0.0) + 4, name))
    colours = {name: f"fill: var(--s{i % 8})" for i, name in enumerate(curves)}
    parts += [_label(name, x, y, style=colours[name]) for x, y, name in _apart(ends)]
    description = "; ".join(
        f"{name}, {n} facts: {rate(aggregate(scores, 'ood').value)} of unseen text right, "
        f"{rate(aggregate(scores, 'neighbours').value)} of neighbours kept"
        for name, points in curves.items()
        for n, scores in points
    )
    return _picture(760, 360, "Success against the number of facts", description, parts)


def _apart(labels: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """(x, y, text) of each, the lower ones first, raised until none stands on another."""
    out: list[tuple[float, float, str]] = []
    for x, y, text in sorted(labels, key=lambda label: -label[1]):
        while over := [b for a, b, other in out if abs(b - y) < LINE and a < x + WIDE * len(text) and x < a + WIDE * len(other)]:
            y = min(over) - LINE
        out.append((x, y, text))
    return out


def reliability_chart(tenths: Sequence[tuple[float, int, int]], fire: float | None = None, leave: float | None = None) -> Markup:
    """How often a record concerned the query where its chance was in a tenth (with Wilson bars), against that chance: calibrated ones lie
    on the dotted line. Under it how many there were of each, as the root of their share. `fire` and `leave` are drawn where they are given.

    `tenths` are those of `Scope.held`: (mean chance, how many, of how many it was so). Raises InvalidExample if there are none.
    """
    if not tenths:
        raise InvalidExample("There are no chances to draw: the scope was learnt as published, or by an older errata. Prepare it again.")
    from scipy.stats import binomtest  # a second to import

    plane = _Plane(low=0.0, high=1.0, bottom=286.0)
    parts = list(_axes(plane, "chance that the record concerns the query"))
    for percent in range(0, 101, 10):
        x = plane.x(percent / 100)
        parts.append(_line(x, plane.bottom, x, plane.bottom + 5, "axis"))
        parts.append(_label(f"{percent} %", x, plane.bottom + 21, text_anchor="middle", class_="muted"))
    parts.append(_line(plane.x(0.0), plane.y(0.0), plane.x(1.0), plane.y(1.0), "base"))
    for name, at, anchor, shift in (("unsure from", leave, "end", -5), ("fires from", fire, "start", 5)):
        if at is not None:
            x = plane.x(min(1.0, at))
            anchor, shift = ("end", -5) if x > plane.right - 110 else ("start", 5) if x < plane.left + 110 else (anchor, shift)
            y = plane.top + (12 if name == "fires from" else 28)
            parts += [_line(x, plane.top, x, plane.bottom, "limit"), _label(f"{name} {rate(at)}", x + shift, y, text_anchor=anchor)]
    told, off, whole = [], 0.0, sum(n for _, n, _ in tenths)
    for mean, n, right in tenths:
        interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
        x, share = plane.x(mean), right / n
        depth = max(1.0, 34 * math.sqrt(n / whole))
        left, width = plane.x(min(9, int(10 * mean)) / 10) + 2, plane.x(0.1) - plane.x(0.0) - 4
        parts.append(_tag("rect", x=left, y=plane.bottom + 86 - depth, width=width, height=depth, class_="promoted mark s0"))
        parts.append(_label(f"{n:,}", left + width / 2, plane.bottom + 102, text_anchor="middle", class_="muted"))
        ends = (float(interval.low), float(interval.high))
        parts.append(_line(x, plane.y(ends[0]), x, plane.y(ends[1]), "bar s0"))
        parts += (_line(x - 3, plane.y(end), x + 3, plane.y(end), "bar s0") for end in ends)
        parts.append(_marker(0, x, plane.y(share), hollow=False))
        off += abs(right - mean * n) / whole
        told.append(f"{rate(mean)} said, {rate(share)} of {n} so")
    description = f"expected calibration error {off:.3f}; " + "; ".join(told)
    return _picture(760, 400, "Chances against what was so", description, parts)


def _axes(plane: _Plane, label: str) -> Iterator[Markup]:
    for percent in range(0, 101, 25):
        y = plane.y(percent / 100)
        yield _line(plane.left, y, plane.right, y, "grid")
        yield _label(f"{percent} %", plane.left - 8, y + 4, text_anchor="end", class_="muted")
    yield _label(label, (plane.left + plane.right) / 2, plane.bottom + 40, text_anchor="middle", class_="muted")


def _decade(plane: _Plane, decade: int) -> Markup:
    x, raised = plane.x(float(decade)), _tag("tspan", str(decade).replace("-", "−"), dy=-5, class_="small")
    power_of_ten = _tag("text", "10", raised, x=x, y=plane.bottom + 21, text_anchor="middle", class_="muted")
    return _line(x, plane.bottom, x, plane.bottom + 5, "axis") + power_of_ten


def _points(series: int, points: Sequence[tuple[float, Scores, bool]], plane: _Plane) -> Iterator[Markup]:
    """The two lines of one label, from (x, scores, whether its mark is hollow)."""
    colour = f"s{series % 8}"
    for measure in ("neighbours", "ood"):
        found: list[tuple[float, Any, bool]] = [(x, aggregate(scores, measure), hollow) for x, scores, hollow in points]
        known = [(x, e, hollow) for x, e, hollow in found if e.n and math.isfinite(e.value)]
        yield _tag(
            "polyline",
            points=" ".join(f"{x:.2f},{plane.y(e.value):.2f}" for x, e, _ in known),
            class_=f"series {colour}" + (" dashed" if measure == "neighbours" else ""),
        )
        for x, e, hollow in known:
            if measure == "neighbours":
                yield _line(x - 6, plane.y(e.value), x + 6, plane.y(e.value), f"series {colour}")
                continue
            yield _line(x, plane.y(e.low), x, plane.y(e.high), f"bar {colour}")
            yield from (_line(x - 3, plane.y(end), x + 3, plane.y(end), f"bar {colour}") for end in (e.low, e.high))
            yield _marker(series, x, plane.y(e.value), hollow=hollow)


def ring_chart(rings: Mapping[Ring, Estimate]) -> Markup:
    """Three arcs around the edit: how much of each ring is still right. A full arc is three quarters of the circle."""
    centre, parts = 150.0, []
    for i, (ring, e) in enumerate(rings.items()):
        radius = 44.0 + 34 * i
        arc = partial(_tag, "circle", cx=centre, cy=centre, r=radius, pathLength=360, transform=f"rotate(-90 {centre} {centre})")
        parts.append(arc(stroke_dasharray="270 360", class_="arc track"))
        if e.value and math.isfinite(e.value):
            parts.append(arc(stroke_dasharray=f"{270 * e.value:.2f} 360", class_=f"arc s{i}"))
        parts.append(_label(f"{ring} {rate(e.value)}", centre - 10, centre - radius + 4, text_anchor="end"))
    parts += [
        _tag("circle", cx=centre, cy=centre, r=22, class_="core"),
        _label("edit", centre, centre + 4, text_anchor="middle", class_="on"),
    ]
    description = ", ".join(f"{RING_NAMES[ring]}: {rate(e.value)} of {e.n}" for ring, e in rings.items())
    return _picture(300, 300, "Neighbours still right", description, parts)


def layer_heat(moved: Sequence[Moved]) -> Markup:
    """One column for each layer, one row for each part; the darker, the larger the change relative to the weight."""
    layers = list(dict.fromkeys(m.layer for m in moved))
    rows = {"attention": "attention", "mlp": "MLP", "norm": "layer norm"}
    left, top, height, gap = 76.0, 24.0, 34.0, 3.0
    width = min(84.0, (760 - left) / len(layers))
    most = max((m.norm for m in moved if math.isfinite(m.norm)), default=0.0)
    tops = {part: top + (height + gap) * i for i, part in enumerate(rows)}
    parts = [_label(rows[part], left - 10, y + height / 2 + 4, text_anchor="end", class_="muted") for part, y in tops.items()]
    for i, layer in enumerate(layers):
        x = left + width * i
        if name := _layer_name(layer, width):
            parts.append(_label(name, x + width / 2, top - 8, text_anchor="middle", class_="muted"))
        for m in (m for m in moved if m.layer == layer):
            parts += _cell(m, x, tops.get(m.part, top), width - gap, height if m.part else 3 * height + 2 * gap, most)
    touched = [f"{m.layer} {m.part}".strip() + f": {number(m.norm)}" for m in moved if m.norm]
    return _picture(
        760, round(top + 3 * (height + gap)), "Where the change sits", f"Change relative to weight. {'; '.join(touched)}", parts
    )


def _layer_name(layer: str, width: float) -> str:
    """What stands above a column; narrow columns are named now and then, and the table below names all."""
    if width < 60:
        return layer if layer.isdigit() and int(layer) % math.ceil(24 / width) == 0 else ""
    return {"norm": "final norm", "embedding": "embed"}.get(layer, f"block {layer}" if layer.isdigit() else layer)


def _cell(m: Moved, x: float, y: float, width: float, height: float, most: float) -> Iterator[Markup]:
    depth = math.sqrt(m.norm / most) if most and math.isfinite(m.norm) else 0.0  # the root, so that small ones can be seen
    told = _tag("title", f"{m.layer} {m.part}: {number(m.norm)}")
    yield _tag(
        "rect", told, x=x, y=y, width=width, height=height, rx=4, class_="cell" if m.norm else "cell empty", fill_opacity=0.1 + 0.9 * depth
    )
    if width >= 44:
        text = f"{number(100 * m.norm)} %" if m.norm else "·"
        yield _label(text, x + width / 2, y + height / 2 + 4, text_anchor="middle", class_="on" if depth > 0.6 else "ink")


class Effect(NamedTuple):
    """What restoring some layers gives back, in probability of the clean answer: mean and 95 % interval (None: of one prompt)."""

    layers: str
    value: float
    low: float | None
    high: float | None
    chosen: bool


def effect_bars(effects: Sequence[Effect], clean: float, corrupted: float) -> Markup:
    """One bar for each window of layers, those of the chosen one filled; whiskers are 95 % intervals over prompts."""
    left, right, top, bottom = 64.0, 744.0, 30.0, 296.0
    ends = [v for e in effects for v in (e.value, e.low, e.high) if v is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    tick = _tick(high - low)
    low, high = tick * math.floor(low / tick), tick * max(1, math.ceil(1.08 * high / tick))  # room for a number above the highest
    column = (right - left) / len(effects)
    width = min(64.0, 0.62 * column)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts: list[Markup] = []
    for i in range(round((high - low) / tick) + 1):
        at = low + i * tick
        parts.append(_line(left, y(at), right, y(at), "axis" if abs(at) < tick / 2 else "grid"))
        parts.append(_label(number(round(at, 9)), left - 8, y(at) + 4, text_anchor="end", class_="muted"))
    every = math.ceil(7.5 * max(len(e.layers) for e in effects) / column)  # names that would touch are left out; a bar says its own
    for i, e in enumerate(effects):
        x = left + column * (i + 0.5)
        told = _tag("title", f"layers {e.layers}: {number(e.value, True)}")
        over, under = sorted((y(e.value), y(0.0)))
        class_ = "cell" if e.chosen else "cell empty"
        parts.append(
            _tag("rect", told, x=x - width / 2, y=over, width=width, height=max(1.0, under - over), rx=3, class_=class_, fill_opacity=0.85)
        )
        if e.low is not None and e.high is not None:
            parts.append(_line(x, y(e.low), x, y(e.high), "whisker"))
            parts += [_line(x - 4, y(end), x + 4, y(end), "whisker") for end in (e.low, e.high)]
        if column >= 48:
            highest = min(y(v) for v in (0.0, e.value, e.high) if v is not None)
            parts.append(_label(number(e.value, True), x, highest - 7, text_anchor="middle", class_="strong" if e.chosen else "muted"))
        if e.chosen or i % every == 0:
            parts.append(_label(e.layers, x, bottom + 20, text_anchor="middle", class_="strong" if e.chosen else "muted"))
    middle = (left + right) / 2
    parts.append(_label("layers whose MLP outputs are restored", middle, bottom + 42, text_anchor="middle", class_="muted"))
    parts.append(_label("probability of the answer given back", left - 48, top - 16, class_="muted"))
    told_all = "; ".join(f"layers {e.layers}: {number(e.value, True)}" + (" (chosen)" if e.chosen else "") for e in effects)
    return _picture(760, 346, "Causal tracing", f"Clean {number(clean)}, corrupted {number(corrupted)}. {told_all}", parts)


def _tick(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that some five of them make up the span."""
    if not span > 0:
        return 1.0
    power_ = 10.0 ** math.floor(math.log10(span / 5))
    return next(m * power_ for m in (1, 2, 5, 10) if m * power_ >= span / 5 * 0.999)


def _standing_alone(picture: Markup) -> Markup:
    """The picture as a file: with the style that the page would give it, and a ground of its own."""
    style = _tag("style", Markup(_read("report.css")) + Markup("svg { font-family: system-ui, sans-serif; }"))
    ground = _tag("rect", x="-2%", y="-2%", width="104%", height="104%", fill="var(--card)")
    start, bracket, rest = picture.partition(">")
    return Markup("").join([start, Markup(' xmlns="http://www.w3.org/2000/svg"'), bracket, style, ground, rest])


PANELS, PANEL, ROW, WIDEST = 4, 220, 19, 22  # panels side by side, their width and that of a row in pixels, characters of a token


def senses_panels(title: str, tokens: Sequence[tuple[str, Sequence[Sequence[tuple[str, float]]]]]) -> Markup:
    """Each of `tokens` is a block of panels, one for each sense: the tokens that it promotes, and what it adds to their logits. All bars
    have one scale."""
    left, top, y = 20.0, 20.0, 24.0
    most = max((score for _, senses in tokens for row in senses for _, score in row), default=0.0)
    parts: list[Markup] = []
    for token, senses in tokens:
        parts.append(_label(f"The token {_visible(token)}", left, y + 4, class_="strong"))
        y += 16
        for first in range(0, len(senses), PANELS):
            beside = list(enumerate(senses))[first : first + PANELS]
            for column, (k, row) in enumerate(beside):
                parts += _sense(k, row, left + column * PANEL, y, most)
            y += 26 + ROW * max(len(row) for _, row in beside) + 12
        y += top
    description = "; ".join(
        f"{_visible(token)}, sense {k}: {', '.join(_visible(t) for t, _ in row)}"
        for token, senses in tokens
        for k, row in enumerate(senses)
    )
    return _picture(round(2 * left + PANELS * PANEL - 16), round(y), title, description, parts)


def _sense(k: int, row: Sequence[tuple[str, float]], x: float, y: float, most: float) -> Iterator[Markup]:
    width = PANEL - 16.0
    yield _label(f"sense {k}", x, y + 16, class_="muted")
    for i, (token, score) in enumerate(row):
        at = y + 24 + ROW * i
        yield _tag("rect", x=x, y=at, width=width, height=ROW - 3, rx=3, class_="track")
        if score > 0 and most > 0:
            longest = width - 48  # the numbers stand beside the bars
            yield _tag("rect", x=x, y=at, width=max(2.0, longest * score / most), height=ROW - 3, rx=3, class_=f"mark s{k % 8} promoted")
        yield _label(_visible(token), x + 6, at + 12.5)
        yield _label(f"{score:.2f}".replace("-", "−"), x + width - 6, at + 12.5, text_anchor="end", class_="muted")


def _visible(token: str) -> str:
    """A token with its spaces and what cannot be printed, which an SVG cannot hold either; cut where it is long."""
    text = repr(token)[1:-1].replace(" ", "·")
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
