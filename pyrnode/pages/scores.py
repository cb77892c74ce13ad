"""Scores: what is said of them in a sentence, the tables, and the picture of their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrnode.pages.markup import Html, decimals, finite, join, name, number, tag, text
from pyrnode.pages.markup import table as html_table
from pyrnode.pages.reading import Story


@dataclass(frozen=True)
class Line:
    """A score with its error, in the unit of its data.

    Attributes:
        what: Whose it is.
        value: The score.
        error: Its standard error; `None` where there is none.
        kind: ``"flow"``, ``"baseline"`` or ``"truth"``.
    """

    what: str
    value: float
    error: float | None
    kind: str


def unit(story: Story) -> str:
    """The unit of a run's scores, and which way is better."""
    return "bits/dim (lower is better)" if story.discrete else "nats per sample (higher is better)"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _line(story: Story, what: str, score: Any, kind: str) -> Line | None:
    key = "bits" if story.discrete else "nats"
    value = finite(_mapping(score).get(key))
    return None if value is None else Line(what, value, finite(_mapping(score).get(f"{key}_error")), kind)


def flow_line(story: Story) -> Line | None:
    """The flow's own score."""
    return _line(story, story.label, story.report.get("score"), "flow")


def lines(story: Story) -> list[Line]:
    """The flow, the baselines and the truth, as far as the report has them."""
    report = story.report
    found = [flow_line(story)]
    if story.discrete:
        found.append(_line(story, f"{story.label}, at bin centres", report.get("bin_centre"), "baseline"))
    for title, score in _mapping(report.get("baselines")).items():
        found.append(_line(story, _BASELINES.get(title, title), score, "baseline"))
    if (entropy := finite(report.get("true_entropy"))) is not None and not story.discrete:
        found.append(Line("the true density (−entropy)", -entropy, None, "truth"))
    return [line for line in found if line is not None]


_BASELINES = {"gaussian": "a Gaussian", "mixture": "a Gaussian mixture", "kde": "a kernel density"}


def with_error(line: Line) -> str:
    """A score and its error, both to the error's digits."""
    if not line.error:
        return decimals(line.value)
    places = min(6, max(2, 1 - math.floor(math.log10(line.error))))
    return f"{decimals(line.value, places)} ± {decimals(line.error, places)}"


def sentence(story: Story) -> Html:
    """What came out, for one who reads no tables."""
    own = flow_line(story)
    if own is None:
        return Html("")
    samples = finite(story.report.get("samples"))
    where = f"On {samples:,.0f} test samples" if samples else "On the test samples"
    said = [text(f"{where} it scores "), tag("strong", f"{with_error(own)} {unit(story)}")]
    others = [line for line in lines(story) if line.kind == "baseline" and "bin centres" not in line.what]
    if others:
        best = (min if story.discrete else max)(others, key=lambda line: line.value)
        said.append(text(f"; the best of the baselines, {best.what}, {with_error(best)}"))
    gap, error = finite(story.report.get("gap")), finite(story.report.get("gap_error"))
    if gap is not None:
        said.append(text(f". It is {decimals(gap)}" + (f" ± {decimals(error)}" if error is not None else "")))
        said.append(text(" nats from the true density (Kullback-Leibler divergence)"))
    return join(*said, ".")


def section(stories: Sequence[Story]) -> Html:
    """Tables and pictures of the scores, a group for each data set: only on the same data can they be compared."""
    scored = [story for story in stories if story.report]
    if not scored:
        return tag(
            "p", "No run has been scored yet: that comes after training, or by ", tag("code", "pyrnode evaluate")
        )
    groups: dict[tuple[str, bool], list[Story]] = {}
    for story in scored:
        groups.setdefault((story.data, story.discrete), []).append(story)
    parts = []
    for (data, _), group in groups.items():
        parts.append(tag("h3", "On ", name(data)) if len(groups) > 1 else "")
        parts.append(_group(group))
    if missing := [story.label for story in stories if not story.report]:
        parts.append(tag("p", f"Without a score: {', '.join(missing)}.", class_="note"))
    return join(*parts)


def _group(group: Sequence[Story]) -> Html:
    what = group[0]
    shown = _dots(_compared(group))
    heads = ["Density", "Score", "Standard error"]
    if len(group) == 1:
        rows = [(_label(line), decimals(line.value), decimals(line.error)) for line in lines(what)]
        first = html_table(heads, rows, caption=f"Scores in {unit(what)}")
    else:
        first = html_table(
            [*heads, "Best baseline", "From the truth, nats"],
            [_compared_row(story) for story in group],
            caption=f"Scores in {unit(what)}; error: over draws of noise (bits) or over test samples (nats)",
        )
    return join(shown, first, _measured(group))


def _label(line: Line) -> Html:
    return name(line.what) if line.kind == "flow" else text(line.what)


def _compared_row(story: Story) -> list[Any]:
    own = flow_line(story)
    others = [line for line in lines(story) if line.kind == "baseline" and "bin centres" not in line.what]
    best = (min if story.discrete else max)(others, key=lambda line: line.value) if others else None
    gap, error = finite(story.report.get("gap")), finite(story.report.get("gap_error"))
    return [
        name(story.label),
        decimals(own.value if own else None),
        decimals(own.error if own else None),
        f"{decimals(best.value)} ({best.what})" if best else "–",
        "–" if gap is None else decimals(gap) + ("" if error is None else f" ± {decimals(error)}"),
    ]


def _compared(group: Sequence[Story]) -> list[Line]:
    """What the picture shows: of one run everything, of several each flow, and what they share."""
    if len(group) == 1:
        return lines(group[0])
    own = [line for line in map(flow_line, group) if line is not None]
    others = dict.fromkeys(line for story in group for line in lines(story) if line.kind != "flow")
    shared = [line for line in others if all(line in lines(story) for story in group)]
    return own + shared


def _measured(group: Sequence[Story]) -> Html:
    """How the scores were taken, and what the flows cost."""
    heads = ["Run", "E per dim", "n per dim", "Evaluations per sample", "Training solver differs by, nats/dim"]
    heads += ["Inversion error", "Test samples", "Draws", "Solver of the score", "Trace"]
    rows = []
    for story in group:
        get = story.report.get
        rows.append(
            [
                name(story.label),
                *(number(get(key)) for key in ("E", "n", "nfe", "disagreement", "inversion_error")),
                number(get("samples"), 9),
                number(get("draws"), 9),
                *(text(get(key) if isinstance(get(key), str) else "–") for key in ("solver", "divergence")),
            ]
        )
    notes = [tag("li", name(story.label), ": ", note) for story in group for note in _notes(story)]
    table = html_table(heads, rows, caption="How the scores were taken, and what a density costs")
    return join(table, tag("ul", *notes) if notes else "")


def _notes(story: Story) -> list[Any]:
    """What the report says of itself."""
    notes = story.report.get("notes")
    return notes if isinstance(notes, list) else []


_ROW, _LEFT, _WIDE = 26, 220, 700


def _dots(found: Sequence[Line]) -> Html:
    """Scores as dots with whiskers of one standard error; what is far off is drawn at the border, with an arrow."""
    if len(found) < 2:
        return Html("")
    values = sorted(line.value for line in found)
    middle = values[len(values) // 2]
    spread = sorted(abs(value - middle) for value in values)[(3 * len(values)) // 4] or abs(middle) * 0.01 or 1.0
    near = [line for line in found if abs(line.value - middle) <= 4 * spread]
    low = min(line.value - (line.error or 0.0) for line in near) - 0.15 * spread
    high = max(line.value + (line.error or 0.0) for line in near) + 0.15 * spread
    width = _WIDE - _LEFT - 20

    def place(value: float) -> float:
        return _LEFT + width * min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))

    bottom, marks = 14 + _ROW * len(found), list[Html]()
    for tick in _ticks(low, high):
        at = f"{place(tick):.1f}"
        marks.append(tag("line", x1=at, x2=at, y1="6", y2=str(bottom), class_="grid"))
        marks.append(tag("text", number(tick, 5), x=at, y=str(bottom + 16), class_="tick"))
    for row, line in enumerate(found):
        marks += _row(line, 20 + _ROW * row, place, beyond=not low <= line.value <= high, right=line.value > high)
    said = "; ".join(f"{line.what} {with_error(line)}" for line in found[:12])
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    box = f"0 0 {_WIDE} {bottom + 26}"
    drawing = tag("svg", *marks, viewBox=box, role="img", aria_label=f"Scores: {said}{more}")
    return tag("figure", drawing, class_="dots")


def _row(line: Line, y: int, place: Callable[[float], float], *, beyond: bool, right: bool) -> list[Html]:
    """A score with its name and its whisker."""
    x, label = place(line.value), line.what if len(line.what) <= 30 else f"…{line.what[-29:]}"
    marks = [tag("text", label, x=str(_LEFT - 12), y=str(y + 4), class_="label")]
    if line.error:
        left, end = (f"{place(value):.1f}" for value in (line.value - line.error, line.value + line.error))
        marks.append(tag("line", x1=left, x2=end, y1=str(y), y2=str(y), class_="whisker"))
    shape = _arrow(x, y, right=right) if beyond else _mark(x, y, line.kind)
    return [*marks, tag("g", tag("title", f"{line.what}: {with_error(line)}"), shape, class_=line.kind)]


def _mark(x: float, y: float, kind: str) -> Html:
    if kind == "truth":
        return tag("path", d=f"M{x:.1f} {y - 8} V{y + 8}", class_="mark")
    return tag("circle", cx=f"{x:.1f}", cy=str(y), r="5.5" if kind == "flow" else "4.5", class_="mark")


def _arrow(x: float, y: float, *, right: bool) -> Html:
    tip = 7 if right else -7
    return tag("path", d=f"M{x - tip:.1f} {y - 6} L{x:.1f} {y} L{x - tip:.1f} {y + 6}", class_="mark beyond")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, about five."""
    rough = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next((scale * s for s in (1, 2, 5, 10) if scale * s >= rough), scale * 10)
    first = math.ceil(low / step)
    return [step * (first + i) for i in range(12) if step * (first + i) <= high]
