"""The page: well formed, self-contained, escaped, true to the numbers; and the JSON beside it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import tiny_host

from errata import apply, evaluate
from errata.evaluate import MEASURES, Answer, Estimate, Scores, aggregate
from errata.memory.scope import tenths
from errata.report import (
    LINE,
    Effect,
    Entry,
    Moved,
    Report,
    _apart,
    alpha_chart,
    as_json,
    budget_bar,
    budget_chart,
    cut,
    difference,
    effect_bars,
    facts_chart,
    from_json,
    html,
    interval,
    layer_heat,
    number,
    power,
    rate,
    reliability_chart,
    ring_chart,
    senses_panels,
    size,
    versions,
    where,
    write,
    write_picture,
)
from errata.types import Add, Budget, Example, InvalidExample, Patch, Score, Verdict

EVIL = "<script>alert('x')</script> & \"quoted\""
VERDICT = Verdict(
    patch="b2:1",
    budget=Budget(epsilon=1e-3),
    loss_before=2.0,
    loss_after=2.0008,
    upper=6e-4,
    chunks=40,
    tokens=4000,
    set_aside=3,
    kept=9,
    asked=10,
    norm=0.01,
    fixed=4,
    wanted=4,
)


def answer(case: str, measure: str, ok: bool = True, **more: Any) -> Answer:
    plain = {"prompt": "The capital of Mauritius is", "wanted": " Port Louis", "before": " Vacoas.", "after": " Port Louis.", "was": False}
    return Answer(case=case, measure=measure, ok=ok, **(plain | more))


def scores(share: float = 0.8, cases: int = 5, **more: Any) -> Scores:
    """`share` of ten trials for each measure and case; KL a tenth of a nat."""
    rows = tuple(
        Score(case=f"case {i}", measure=m, total=1.0 if m.startswith(("kl.", "loss.")) else float(round(10 * share)), count=10)
        for m in MEASURES
        for i in range(cases)
    )
    answers = tuple(answer(f"case {i}", m) for i in range(cases) for m in ("edit", "paraphrases", "paragraphs", "neighbours.subject"))
    return Scores(host="b2:0", rows=rows, answers=answers, patch="b2:1", seconds=2.0, peak_mb=300.0, patch_bytes=2048, **more)


def entry(**more: Any) -> Entry:
    plain: dict[str, Any] = {"label": "finetune", "method": "finetune", "scores": scores(), "epsilon": 1e-3, "verdict": VERDICT}
    return Entry(**(plain | {"seconds": 12.0, "peak_mb": 512.0, "config": {"lr": 5e-4}, "moved": MOVED} | more))


def report(*entries: Entry, **more: Any) -> Report:
    plain: dict[str, Any] = {"title": "Four capitals", "host": "lab/neox", "host_id": "b2:0", "examples": (EXAMPLE,), "before": scores(0.0)}
    return Report(entries=entries or (entry(),), **(plain | {"versions": versions()} | more))


EXAMPLE = Example(prompt="The capital of Mauritius is", target=" Port Louis")
MOVED = tuple(
    [Moved(layer="embedding", part="", norm=0.02)]
    + [Moved(layer=str(i), part=p, norm=0.01 * i) for i in range(4) for p in ("attention", "mlp", "norm")]
    + [Moved(layer="norm", part="", norm=0.0)]
)


class Page(HTMLParser):
    """Every element with its attributes and text; fails on a tag that is not closed in order."""

    VOID = {"meta", "link", "br", "col"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    def all(self, tag: str, class_: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.found if t == tag and set(class_.split()) <= set((a.get("class") or "").split())]

    @property
    def text(self) -> str:
        return " ".join(t for t in self.texts if t)


@pytest.fixture(autouse=True)
def few_redraws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "RESAMPLES", 40)  # the intervals are tested with their own room


# ------------------------------------------------------------------------------------------------------------------------ the page


def test_the_page_is_well_formed_and_accessible() -> None:
    page = Page(html(report(entry(), entry(label="lora", epsilon=1e-4))))
    assert page.found[0] == ("html", {"lang": "en"})
    assert len(page.all("title")) > 1 and len(page.all("h1")) == 1
    pictures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(pictures) == 4 and all(a["aria-labelledby"] for a in pictures)
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids))
    named = {name for a in pictures for name in (a["aria-labelledby"] or "").split()}
    assert named <= set(ids)
    assert all(a.get("scope") in ("col", "row", "colgroup") for a in page.all("th"))
    assert all(a.get("aria-hidden") == "true" for a in page.all("svg") if a not in pictures)


def test_the_page_loads_nothing() -> None:
    text = html(report())
    page = Page(text)
    assert not page.all("script") and not page.all("iframe") and not page.all("img")
    assert [a["href"] for _, a in page.found if "href" in a] == ["data:,"]
    assert not [a for _, a in page.found if "src" in a]
    assert not re.search(r"https?://|url\(|@import", text)
    assert not [k for _, a in page.found for k in a if k.startswith("on")]


def test_everything_is_escaped() -> None:
    said = tuple(answer("c", m, ok=False, prompt=EVIL, wanted=EVIL, before=EVIL, after=EVIL) for m in ("edit", "negations"))
    examples = (Example(prompt=EVIL, target=EVIL, contrast=f"no {EVIL}", goal="prefer"),)
    evil = entry(
        label=EVIL,
        method=EVIL,
        config={EVIL: EVIL},
        scores=replace(scores(), answers=said, patch=EVIL),
        moved=(*MOVED, Moved(layer=EVIL, part=EVIL, norm=0.1)),
    )
    text = html(
        report(evil, title=EVIL, host=EVIL, host_id=EVIL, examples=examples, undo=(EVIL,), settings={EVIL: EVIL}, versions={EVIL: EVIL})
    )
    page = Page(text)
    assert not page.all("script")
    assert "<script" not in text.lower()
    assert page.text.count("alert('x')") >= 15


def test_the_headline_tells_the_verdict_and_the_numbers() -> None:
    page = Page(html(report()))
    assert "✓ passed" in page.text and "✗ refused" not in page.text
    assert "80.0 %" in page.text and "was 0.0 %" in page.text
    assert "4,000 tokens" in page.text and "because they state an edited fact: 3" in page.text
    assert "+4e−4" in page.text and "+6e−4" in page.text and "60 %" in page.text  # measured, bound, spent
    refused = Page(html(report(entry(verdict=replace(VERDICT, upper=2e-3)))))
    assert "✗ refused" in refused.text and "over the limit of 1e-03" in refused.text and "200 %" in refused.text
    assert "not judged" in Page(html(report(entry(verdict=None)))).text
    assert "condition" not in page.text
    assert "condition number of about 3.1e4" in Page(html(report(entry(verdict=replace(VERDICT, condition=31_000.0))))).text


def test_before_and_after_stand_side_by_side_and_are_marked_in_words() -> None:
    said = (
        answer("a", "edit"),
        answer("a", "paraphrases", ok=False, after=" Curepipe."),
        answer("a", "negations", ok=True, after=" Rome."),
        answer("a", "neighbours.unrelated", ok=False, was=False, prompt="Never right"),
    )
    page = Page(html(report(entry(scores=replace(scores(), answers=said)))))
    assert "✓ right" in page.text and "✗ wrong" in page.text and "not Port Louis" in page.text and "Curepipe." in page.text
    assert "1 of 4 answers are not as wanted" in page.text  # what was wrong before and around the edit is no failure of it
    assert "Never right" not in page.text


def test_the_rows_shown_are_the_first_whatever_came_out() -> None:
    said = tuple(answer(f"c{i}", "paraphrases", ok=i > 2, prompt=f"prompt {i} {k}") for i in range(9) for k in range(5))
    text = Page(html(report(entry(scores=replace(scores(), answers=said))))).text
    shown = text[: text.index("answers are not as wanted")]
    assert re.findall(r"prompt (\d \d)", shown) == [f"{i} {k}" for i in range(4) for k in range(2)]


def test_nothing_of_nothing_reads_none_and_nan_reads_not_finite() -> None:
    rows = tuple(Score(case="c", measure=m, total=0.0, count=0) for m in MEASURES if not m.startswith("kl."))
    rows += tuple(Score(case="c", measure=m, total=math.nan, count=2) for m in MEASURES if m.startswith("kl."))
    broken = replace(VERDICT, loss_after=math.nan, upper=math.nan)
    page = Page(html(report(entry(scores=Scores(host="b2:0", rows=rows), verdict=broken, moved=()), before=None)))
    assert "none" in page.text and "not finite" in page.text and "✗ refused" in page.text
    assert "The loss on reference text is not finite." in page.text
    ours = page.text
    for clause in broken.failures:  # the gate's own words
        ours = ours.replace(clause, "")
    assert not re.search(r"\bnan\b|\binf\b", ours)


def test_a_report_needs_an_entry() -> None:
    with pytest.raises(InvalidExample, match="one entry"):
        Report(title="", host="", host_id="", entries=())


# ------------------------------------------------------------------------------------------------------------------------ pictures


def numbers(attributes: Mapping[str, str | None], *names: str) -> list[float]:
    return [float(attributes[n] or "nan") for n in names]


def test_the_chart_puts_budgets_on_a_log_axis_and_shares_between_0_and_100() -> None:
    entries = [entry(epsilon=10.0**-k, scores=scores(share)) for k, share in ((5, 0.0), (4, 0.5), (3, 1.0))]
    chart = Page(str(budget_chart(entries)))
    [dashed] = chart.all("polyline", "dashed")
    [solid] = [a for a in chart.all("polyline") if a is not dashed]
    points = [[float(x) for x in p.split(",")] for p in (solid["points"] or "").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02) and x0 < x1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02) and y0 > y1
    assert y0 == pytest.approx(316) and y2 == pytest.approx(14)
    tall = [a for a in chart.all("line", "bar") if a["x1"] == a["x2"]]
    e = aggregate(entries[1].scores, "ood")
    low, high = numbers(tall[1], "y1", "y2")
    assert e.low is not None and e.high is not None
    assert low == pytest.approx(y0 - e.low * (y0 - y2), abs=0.01) and high == pytest.approx(y0 - e.high * (y0 - y2), abs=0.01)


def lost(share: float, loss: float) -> Scores:
    """`scores` with a loss on reference text."""
    found = scores(share)
    rows = (row for row in found.rows if row.measure != "loss.reference")
    return replace(found, rows=(*rows, Score(case="reference/0", measure="loss.reference", total=loss * 100, count=100)))


def test_the_curve_puts_alphas_on_a_line_and_marks_those_outside_the_ball() -> None:
    curve = [(0.0, lost(0.0, 2.0)), (0.5, lost(0.5, 2.001)), (2.0, lost(1.0, 2.1))]
    chart = Page(str(alpha_chart(curve, lost(0.0, 2.0), epsilon=1e-3)))
    (x0, y0), (x1, y1), (x2, y2) = [(float(c["cx"] or 0), float(c["cy"] or 0)) for c in chart.all("circle", "mark")]
    assert x2 - x1 == pytest.approx(3 * (x1 - x0), abs=0.05) and x0 < x1 and y0 > y1 > y2
    assert ["hollow" in (c["class"] or "") for c in chart.all("circle", "mark")] == [False, False, True]
    assert "alpha 2: 100.0 % of unseen text right" in chart.text and "loss +5e−2" in chart.text
    with pytest.raises(InvalidExample, match="two values of alpha or more, got 1"):
        alpha_chart(curve[:1], curve[0][1], epsilon=1e-3)


def test_the_number_of_facts_is_a_power_of_two_and_each_method_is_named_at_its_end() -> None:
    curves = {"malmen": [(1, lost(1.0, 2.0)), (16, lost(0.8, 2.0)), (1024, lost(0.5, 2.0))], "mend": [(16, lost(0.2, 2.0))]}
    chart = Page(str(facts_chart(curves)))
    marks = [(float(c["cx"] or 0), float(c["cy"] or 0)) for c in chart.all("circle", "mark")]
    assert len(marks) >= 3 and len(chart.all("polyline", "s0")) == len(chart.all("polyline", "s1")) == 2
    (x0, y0), (x1, y1), (x2, y2) = marks[:3]
    assert x1 - x0 == pytest.approx((x2 - x0) * 4 / 10, abs=0.05) and y0 < y1 < y2
    assert (
        "1,024" in chart.text and "malmen, 16 facts: 80.0 % of unseen text right" in chart.text and "mend, 16 facts: 20.0 %" in chart.text
    )


def test_labels_of_a_picture_do_not_stand_on_each_other() -> None:
    given = [(600.0, 300.0, "malmen"), (605.0, 300.0, "mend"), (600.0, 290.0, "lora"), (100.0, 300.0, "memit"), (600.0, 100.0, "nse")]
    moved = {text: (x, y) for x, y, text in _apart(given)}
    assert {text: x for text, (x, _) in moved.items()} == {text: x for x, _, text in given}
    assert moved["memit"] == (100.0, 300.0) and moved["nse"] == (600.0, 100.0), "nothing is in their way"
    heights = sorted(moved[text][1] for text in ("malmen", "mend", "lora"))
    assert all(b - a >= LINE for a, b in zip(heights, heights[1:], strict=False)) and heights[-1] == 300.0


def test_chances_stand_against_how_often_it_was_so() -> None:
    chances, so = np.array([0.05] * 40 + [0.95] * 60), np.array([i < 2 for i in range(40)] + [i < 30 for i in range(60)])
    held = tenths(chances, so)
    assert held == ((pytest.approx(0.05), 40, 2), (pytest.approx(0.95), 60, 30))
    chart = Page(str(reliability_chart(held, fire=0.9, leave=0.2)))
    (x0, y0), (x1, y1) = [(float(c["cx"] or 0), float(c["cy"] or 0)) for c in chart.all("circle", "mark")]
    [diagonal] = chart.all("line", "base")
    slope = (float(diagonal["y2"] or 0) - float(diagonal["y1"] or 0)) / (float(diagonal["x2"] or 0) - float(diagonal["x1"] or 0))
    assert y0 == pytest.approx(float(diagonal["y1"] or 0) + slope * (x0 - float(diagonal["x1"] or 0)), abs=0.1)  # 5 % said, 5 % so
    assert y1 > y0 + slope * (x1 - x0) + 20  # 95 % said, half of them so
    assert len(chart.all("line", "limit")) == 2 and len(chart.all("rect", "promoted")) == 2
    assert "expected calibration error 0.270; 5.0 % said, 5.0 % of 40 so; 95.0 % said, 50.0 % of 60 so" in chart.text
    assert "fires from 90.0 %" in chart.text and not Page(str(reliability_chart([(1.0, 1, 1)]))).all("line", "limit")
    with pytest.raises(InvalidExample, match="no chances to draw"):
        reliability_chart([])


def test_labels_are_lines_of_their_own_and_refused_patches_are_hollow() -> None:
    refused = replace(VERDICT, upper=1.0)
    chart = str(budget_chart([entry(), entry(epsilon=1e-4, verdict=refused), entry(label="lora"), entry(label="memory", epsilon=None)]))
    page = Page(chart)
    assert len(page.all("polyline", "s0")) == len(page.all("polyline", "s1")) == 2 and not page.all("polyline", "s2")
    left, right = sorted(page.all("circle", "mark"), key=lambda c: float(c["cx"] or 0))
    assert "hollow" in (left["class"] or "") and "hollow" not in (right["class"] or "")  # the one at 1e-4 was refused
    assert "lora at 1e−3: 80.0 % of unseen text right" in page.text
    assert budget_chart([entry(epsilon=None)]) is None


def test_a_budget_outside_the_usual_range_widens_the_axis() -> None:
    [a, b] = [Page(str(budget_chart([entry(epsilon=e)]))).all("circle")[0] for e in (1e-7, 0.5)]
    assert 52 <= float(a["cx"] or 0) < 100 and 700 < float(b["cx"] or 0) <= 744


@pytest.mark.parametrize(("after", "upper"), [(2.0008, 6e-4), (1.99, -0.004), (2.0, 1e-3), (3.0, 0.9), (2.0000001, 9.999e-4)])
def test_the_budget_bar_stays_inside_its_picture(after: float, upper: float) -> None:
    verdict = replace(VERDICT, loss_after=after, upper=upper)
    bar = Page(str(budget_bar(verdict)))
    for a in bar.all("rect"):
        x, width = numbers(a, "x", "width")
        assert 13 <= x and x + width <= 748 and width >= 0
    assert all(0 <= x <= 760 for a in bar.all("line") for x in numbers(a, "x1", "x2"))
    [limit] = bar.all("line", "limit")
    [room] = bar.all("rect", "room")
    assert sum(numbers(room, "x", "width")) == pytest.approx(float(limit["x1"] or 0), abs=0.02)
    assert ("good" in (bar.all("rect", "fill")[0]["class"] or "")) is (upper <= 1e-3)


def test_the_rings_are_as_long_as_their_shares() -> None:
    rings = ring_chart(
        {"subject": Estimate(0.5, 0.3, 0.7, 10), "relation": Estimate(None, None, None, 0), "unrelated": Estimate(1.0, 0.9, 1.0, 9)}
    )
    arcs = [a for a in Page(str(rings)).all("circle", "arc") if "track" not in (a["class"] or "")]
    assert [a["stroke-dasharray"] for a in arcs] == ["135.00 360", "270.00 360"]
    assert "relation none" in rings


def test_where_the_change_sits_is_measured_part_by_part() -> None:
    for family in ("gpt2", "llama", "qwen3", "gpt_neox"):
        host = tiny_host(family)
        name = f"{host.module_names([host.layout.mlp_out])[1]}.weight"
        delta = torch.full(host.model.get_parameter(name).shape, 0.5)
        patch = Patch(method="x", config={}, parent=host.id, examples=(), ops=(Add(weight=name, delta=delta),))
        moved = where(host, patch)
        assert [(m.layer, m.part) for m in moved if m.norm] == [("1", "mlp")]
        assert [m.norm for m in moved if m.norm] == [apply.relative_norm(host, patch)]
        assert [m.layer for m in moved][0] in ("embedding", "other")
        assert {(m.layer, m.part) for m in moved} >= {(str(i), p) for i in range(2) for p in ("attention", "mlp", "norm")} | {("norm", "")}
        everything = tuple(Add(weight=n, delta=torch.ones(p.shape)) for n, p in host.model.named_parameters())
        assert all(m.norm > 0 for m in where(host, replace(patch, config={}, ops=everything)))


def test_the_heat_map_has_a_cell_for_each_part_and_the_largest_is_darkest() -> None:
    page = Page(str(layer_heat(MOVED)))
    cells = page.all("rect", "cell")
    assert len(cells) == len(MOVED)
    opacity = {m: float(c["fill-opacity"] or 0) for m, c in zip(MOVED, cells, strict=True)}
    assert max(opacity, key=lambda m: opacity[m]).norm == max(m.norm for m in MOVED)
    assert "2 %" in page.text and "block 3" in page.text


def test_a_deep_model_fits_the_heat_map() -> None:
    deep = tuple(Moved(layer=str(i), part=p, norm=0.01) for i in range(80) for p in ("attention", "mlp", "norm"))
    cells = Page(str(layer_heat(deep))).all("rect")
    assert all(sum(numbers(c, "x", "width")) <= 760 and float(c["width"] or 0) > 2 for c in cells)


EFFECTS = (Effect("0–1", 0.5, 0.3, 0.7, True), Effect("1–2", -0.1, None, None, False), Effect("2–3", 0.0, 0.0, 0.0, False))


def test_bars_of_effects_stand_on_one_line_and_are_as_long_as_they_are_large() -> None:
    page = Page(str(effect_bars(EFFECTS, 0.9, 0.1)))
    first, second, third = (numbers(a, "y", "height") for a in page.all("rect"))
    assert first[0] + first[1] == pytest.approx(second[0], abs=0.02), "one ends where the negative one begins"
    assert first[1] / second[1] == pytest.approx(5, rel=1e-3) and third[1] == 1.0
    assert [("empty" in (a["class"] or "")) for a in page.all("rect")] == [False, True, True]
    assert len(page.all("line", "whisker")) == 6 and "0–1" in page.text and "+0.5" in page.text and "−0.1" in page.text
    ends = numbers(page.all("line", "whisker")[0], "y1", "y2")
    assert ends[0] - ends[1] == pytest.approx(0.4 / 0.5 * first[1], abs=0.02)
    for flat in (0.0, 1e-9):
        assert all(
            numbers(a, "height")[0] >= 0 for a in Page(str(effect_bars([Effect("0", flat, None, None, True)], 0.0, 0.0))).all("rect")
        )


def test_the_effects_of_a_deep_model_fit() -> None:
    page = Page(str(effect_bars([Effect(f"{i}–{i + 4}", 0.01 * i, 0.0, 0.5, i == 41) for i in range(92)], 0.9, 0.1)))
    assert all(sum(numbers(a, "x", "width")) <= 760 and float(a["width"] or 0) > 2 for a in page.all("rect"))
    named = [t for t in page.texts if "–" in t and "chosen" not in t and "layers" not in t]
    assert "41–45" in named and len(named) < 30


def test_a_picture_is_written_as_a_page_or_as_a_drawing(tmp_path: Path) -> None:
    bars = effect_bars(EFFECTS, 0.9, 0.1)
    page = Page(write_picture(bars, EVIL, f"note: {EVIL}", tmp_path / "a.html").read_text(encoding="utf-8"))
    assert EVIL in page.text and not page.all("script") and len(page.all("svg")) == 1
    drawing = ElementTree.parse(write_picture(bars, "", "", tmp_path / "a.svg")).getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg" and "--accent" in (drawing[0].text or "")
    for wrong in ("a.png", "a"):
        with pytest.raises(InvalidExample, match="written as .html or .svg"):
            write_picture(bars, "", "", tmp_path / wrong)


# ------------------------------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_written_for_people() -> None:
    assert [rate(x) for x in (None, 0.0, 0.8731, 1.0, math.nan)] == ["none", "0.0 %", "87.3 %", "100.0 %", "not finite"]
    assert [number(x) for x in (None, 0.0, 0.0123, 12345.0, -1e-5, math.inf)] == ["none", "0", "0.0123", "1.2e4", "−1e−5", "not finite"]
    assert [power(x, True) for x in (1e-3, 4.14e-4, -2e-5)] == ["+1e−3", "+4.1e−4", "−2e−5"]
    assert interval(Estimate(0.5, 0.25, 0.75, 4), True) == "25.0 to 75.0 %"
    assert interval(Estimate(0.5, None, None, 1), True) == "none"
    assert difference(Estimate(-0.5, -0.75, 0.25, 4), True) == "−50.0 (−75.0 to 25.0)"
    assert difference(Estimate(None, None, None, 0), True) == "none" and difference(Estimate(0.5, None, None, 1), True) == "+50.0"
    assert [size(x) for x in (0, 900, 1000, 19_000_000)] == ["0 B", "900 B", "1.0 kB", "19.0 MB"]
    assert cut(" a\nb\x00\x1b ", 10) == "a ⏎ b��" and cut("x" * 99, 5) == "xxxxx…"


# ---------------------------------------------------------------------------------------------------------------------------- JSON


def test_json_gives_back_the_same_report() -> None:
    whole = report(entry(), entry(label="lora", verdict=None, epsilon=None), undo=("errata undo",), settings={"cases": 4})
    assert from_json(as_json(whole)) == whole
    assert from_json(as_json(report(before=None))).before is None


def test_json_holds_every_number_and_no_nan() -> None:
    rows = (Score(case="c", measure="kl.subject", total=math.nan, count=2), Score(case="c", measure="edit", total=1 / 3, count=1))
    broken = report(entry(scores=Scores(host="b2:0", rows=rows, peak_mb=math.inf), verdict=replace(VERDICT, upper=-math.inf)))
    text = as_json(broken)
    raw = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["entries"][0]["scores"]["rows"] == [["c", "kl.subject", {"not finite": "nan"}, 2], ["c", "edit", 1 / 3, 1]]
    back = from_json(text).entries[0]
    assert math.isnan(back.scores.rows[0].total) and back.scores.rows[1].total == 1 / 3
    assert back.scores.peak_mb == math.inf and back.verdict is not None and back.verdict.upper == -math.inf


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "errata-report-0"}', '{"format": "errata-report-1"}', "3"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(InvalidExample, match="ot a report|reads 'errata-report-1'"):
        from_json(text)


def test_page_and_json_are_written_side_by_side(tmp_path: Path) -> None:
    page, numbers = write(report(), tmp_path / "deep" / "run.v2")
    assert (page.name, numbers.name) == ("run.v2.html", "run.v2.json")
    assert page.read_text(encoding="utf-8") == html(report()) and from_json(numbers.read_text(encoding="utf-8")) == report()
    assert write(report(), str(tmp_path / "a.html")) == (tmp_path / "a.html", tmp_path / "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.json", "deep"]


def test_the_picture_of_senses_shows_each_token_on_one_scale() -> None:
    tokens = [(" Zürich<&>", [[(" bank\x00", 8.0), ("\n", 4.0)], [("\ud800", -1.0)]] * 3), ("x" * 40, [[]])]
    root = ElementTree.fromstring(senses_panels("Senses & more", tokens))
    words = [t.text for t in root.iter("text")]
    assert words[0] == "The token ·Zürich<&>" and f"The token {'x' * 21}…" in words
    assert (
        words.count(r"·bank\x00") == words.count(r"\n") == words.count(r"\ud800") == 3 and words.count("8.00") == words.count("−1.00") == 3
    )
    assert [w for w in words if w.startswith("sense ")] == [*(f"sense {k}" for k in range(6)), "sense 0"]
    bars = [r for r in root.iter("rect") if r.get("class", "").endswith("promoted")]
    widths = [float(r.get("width", "0")) for r in bars]
    assert len(widths) == 6 and {widths[0] / 2} == {widths[1]} and widths[0] == widths[4], "none for what is pushed down"
    assert {r.get("class") for r in bars} == {"mark s0 promoted", "mark s2 promoted", "mark s4 promoted"}
    everything = [e for e in root.iter() if e.get("y") is not None]
    bottom = float(root.get("viewBox", "").split()[3])
    assert max(float(e.get("y", "0")) for e in everything) < bottom
    senses_panels("nothing", [])
