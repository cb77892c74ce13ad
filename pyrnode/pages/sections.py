"""The sections of a page on runs, each of parts that a page that follows a run renews one by one."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pyrnode.config import Config
from pyrnode.pages import curves, scores
from pyrnode.pages.charts import CHARTS, Chart
from pyrnode.pages.curves import Columns
from pyrnode.pages.markup import (
    Html,
    as_json,
    decimals,
    details,
    finite,
    join,
    listing,
    name,
    number,
    picture,
    plain,
    tag,
    text,
)
from pyrnode.pages.markup import table as html_table
from pyrnode.pages.reading import PICTURES, Story, differing
from pyrnode.settings import flatten

_ROWS = 16
"""Rows of the table behind a chart."""

COLOURS, DASHES = 8, 4


def part(id_: str, *content: Any) -> Html:
    """What is renewed as one while a run is followed."""
    return tag("div", *content, data_part=id_)


def swatch(run: int) -> Html:
    """The line that a run has in the charts."""
    line = tag("line", x1="1", x2="31", y1="6", y2="6")
    classes = f"swatch c{run % COLOURS} d{run // COLOURS % DASHES}"
    return tag("svg", line, class_=classes, viewBox="0 0 32 12", aria_hidden="true")


def duration(seconds: Any) -> str:
    """A time as a person would say it."""
    found = finite(seconds)
    if found is None:
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if found >= 1.5 * size:
            return f"{found / size:.3g} {unit}"
    return f"{found:.3g} s"


# -- what it is --------------------------------------------------------------------------------------------------------


def lead(stories: Sequence[Story]) -> Html:
    """The sentences at the head of the page."""
    if len(stories) > 1:
        return _lead_of_many(stories)
    (story,) = stories
    time = duration(story.steps[-1].get("seconds")) if story.steps else None
    trained = f"; its steps took {time}" if time else ""
    said = join("A density of ", name(story.data), f": {story.state}{trained}. ", scores.sentence(story))
    return join(tag("p", said, class_="lead"), _tiles(story))


def _lead_of_many(stories: Sequence[Story]) -> Html:
    data = list(dict.fromkeys(story.data for story in stories))
    on = join("on ", name(data[0])) if len(data) == 1 else text(f"on {len(data)} data sets")
    states = Counter(story.state.partition(",")[0] for story in stories)
    said = [
        text(f"{len(stories)} runs "),
        on,
        text(": "),
        text(", ".join(f"{n} {state}" for state, n in states.items())),
    ]
    said.append(text(". "))
    ranked = [(line, story) for story in stories if (line := scores.flow_line(story)) is not None]
    if len(ranked) > 1 and len(data) == 1 and len({story.discrete for _, story in ranked}) == 1:
        choose = min if ranked[0][1].discrete else max
        best, story = choose(ranked, key=lambda pair: pair[0].value)
        said += [text("The best score has "), tag("strong", name(story.label))]
        said.append(text(f": {scores.with_error(best)} {scores.unit(story)}."))
    return tag("p", *said, class_="lead")


def _tiles(story: Story) -> Html:
    """The few numbers that one looks for first."""
    get, tiles = story.report.get, list[tuple[str, str, str]]()
    own = scores.flow_line(story)
    if own is not None:
        error = f"± {number(own.error, 2)}, " if own.error else ""
        tiles.append(("Score", decimals(own.value, 3), f"{error}{scores.unit(story).replace(' (', ', ').rstrip(')')}"))
    if (gap := finite(get("gap"))) is not None:
        tiles.append(("From the truth", decimals(gap, 3), f"± {number(get('gap_error'), 2)} nats"))
    if story.validations:
        best = min(story.validations, key=lambda record: float(record["validation"]))
        key = "validation_bits" if story.discrete else "validation"
        unit = "bits/dim" if story.discrete else "nats/dim"
        tiles.append(("Best validation", decimals(best.get(key), 3), f"{unit}, at step {best['step']:,}"))
    if get("nfe") is not None:
        tiles.append(("Evaluations", number(get("nfe"), 3), "of f for a density"))
    if get("disagreement") is not None:
        tiles.append(("Training solver", number(get("disagreement"), 2), "nats/dim from the accurate one"))
    if get("E") is not None:
        tiles.append(("E and n", f"{number(get('E'), 2)}, {number(get('n'), 2)}", "per dimension"))
    shown = [tag("div", tag("dt", what), tag("dd", tag("b", value), tag("span", unit))) for what, value, unit in tiles]
    return tag("dl", *shown, class_="tiles") if shown else Html("")


def runs(stories: Sequence[Story]) -> Html:
    """The runs of a comparison, with what switches their curves on and off."""
    if len(stories) == 1:
        return Html("")
    rows = []
    for index, story in enumerate(stories):
        own, time = scores.flow_line(story), story.steps[-1].get("seconds") if story.steps else None
        box = Html(f'<input type="checkbox" id="run{index}" data-run="{index}" checked>')
        label = tag("label", box, swatch(index), name(story.label), for_=f"run{index}")
        score = f"{scores.with_error(own)} {'bits/dim' if story.discrete else 'nats'}" if own else "–"
        best = min((float(r["validation"]) for r in story.validations), default=None)
        row = [label, text(story.data), text(story.state), duration(time), number(best), score]
        rows.append(row)
    heads = ["Run", "Data", "State", "Time of its steps", "Best validation, nats/dim", "Test score"]
    return html_table(heads, rows, caption="Ticked runs are in the charts", class_="runs")


# -- curves --------------------------------------------------------------------------------------------------------


def controls(stories: Sequence[Story]) -> Html:
    """What all charts obey."""
    bits = any(story.discrete for story in stories)
    units = [("1", "nats/dim", not bits), (str(1.4426950408889634), "bits/dim", bits)]
    many = Html(
        '<button type="button" data-do="all">All runs</button><button type="button" data-do="none">No run</button>'
    )
    return Html(
        '<div class="controls" role="group" aria-label="Controls of all charts">'
        '<label>Along <select id="along"><option value="step">steps</option><option value="seconds">training time'
        "</option></select></label>"
        f'<label>Likelihood in <select id="unit">{_options(units)}</select></label>'
        '<label>Smooth <input id="smooth" type="range" min="0" max="20" value="0"></label>'
        '<label class="wide">Read at <input id="at" type="range" min="0" max="1000" value="1000" '
        'aria-describedby="at-hint"> <output id="at-value" for="at"></output></label>'
        '<span class="buttons"><button type="button" data-do="in">Zoom in</button>'
        '<button type="button" data-do="out">Zoom out</button><button type="button" data-do="reset">Whole</button>'
        f"{many if len(stories) > 1 else ''}</span></div>"
        '<p id="at-hint" class="note">Point at a chart, or move “Read at” with the arrow keys: the values there stand '
        "under each chart. Drag across a chart to look closer, double-click for the whole.</p>"
    )


def _options(options: Sequence[tuple[str, str, bool]]) -> Html:
    return join(*(tag("option", said, value=value, selected="" if on else None) for value, said, on in options))


def charts(stories: Sequence[Story], parts: Mapping[str, Html], width: int) -> Html:
    """The charts' places, each with the numbers behind it, which are among the `parts`."""
    thin = f" Each point is the mean over {width} steps." if width > 1 else ""
    places: dict[bool, list[Html]] = {True: [], False: []}
    for chart in CHARTS:
        places[chart.main].append(_chart(chart, parts[f"table-{chart.id}"], thin if chart.thins else ""))
    script = tag("noscript", tag("p", "The charts need JavaScript; the numbers are in the tables under them."))
    more = details("More curves", tag("div", *places[False], class_="charts"), id_="more")
    return join(script, controls(stories), tag("div", *places[True], class_="charts"), more)


def _chart(chart: Chart, table: Html, thin: str) -> Html:
    body = [
        tag("h3", chart.named(), data_title=chart.id),
        tag("div", class_="plot", data_chart=chart.id, role="img", aria_label=chart.named()),
        tag("div", class_="readout", data_readout=chart.id),
        tag("figcaption", f"{chart.says}{thin}"),
        part(f"table-{chart.id}", table),
    ]
    return tag("figure", *body, class_="chart", id=f"chart-{chart.id}")


def numbers(chart: Chart, stories: Sequence[Story], columns: Sequence[Mapping[str, Columns]]) -> Html:
    """The numbers behind a chart: some steps, and each run's value there, or at its last point before."""
    kind, key = chart.series[-1]
    found = [curves.chosen(run[kind], key, 10_000_000) for run in columns]
    steps = sorted({step for curve in found for step, _ in curve})
    if not steps:
        return tag("p", "No values yet.", class_="note")
    count = min(_ROWS, len(steps))
    wanted = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = [[f"{step:,.6g}", *(number(_at(curve, step), 5) for curve in found)] for step in dict.fromkeys(wanted)]
    kinds = {"nll": " (training)", "validation": " (validation)"}
    caption = f"{chart.named()}{kinds.get(key, '')}, at some steps; – before a run's first value and after its last"
    heads = ["Step", *(name(story.label) for story in stories)]
    return details("Numbers", html_table(heads, rows, caption=caption), id_=f"numbers-{chart.id}")


def _at(curve: Sequence[tuple[float, float]], step: float) -> float | None:
    """The value at a step, or at the last one before it, while the curve lasts."""
    if not curve or step > curve[-1][0]:
        return None
    before = [value for at, value in curve if at <= step]
    return before[-1] if before else None


def ladder(stories: Sequence[Story]) -> Html:
    """What training changed of its solver, and when; and restarts."""
    rows = []
    for story in stories:
        start = [as_json(story.settings.get(f"solver.{key}")) for key in ("name", "step_size")]
        rows.append([name(story.label), "0", f"settings: solver {start[0]}, step_size {start[1]}", "–", "–"])
        for record in story.records:
            if record.get("event") not in ("solver", "restart", "resumed elsewhere"):
                continue
            said = record.get("solver") or record.get("cause") or record.get("changes") or ""
            said = "; ".join(map(plain, said)) if isinstance(said, list) else plain(said)
            what = f"{record['event']}: {said}"
            values = (number(record.get("step_size")), number(record.get("disagreement"), 2))
            rows.append([name(story.label), f"{record['step']:,}", what, *values])
    heads = ["Run", "Step", "Event", "Step size", "Disagreement before, nats/dim"]
    return html_table(heads, rows[:400], caption="The solver that training took, and why") if rows else Html("")


# -- pictures -------------------------------------------------------------------------------------------------------


def pictures(stories: Sequence[Story]) -> Html:
    """Samples and densities, run beside run; the paths are a picture only where they cannot be moved."""
    shown = []
    for file in PICTURES:
        for story in stories:
            if file in story.pictures and file != "trajectories.png":
                caption = join(name(story.label), f": {PICTURES[file][0].lower()}{PICTURES[file][1:]}")
                alt = f"{PICTURES[file]}, of the run {story.label} on {story.data}"
                shown.append(picture(story.pictures[file], alt=alt, caption=caption))
    if not shown:
        return tag("p", "There are none: they are drawn with the report, of images and of continuous tables.")
    wide = all("density.png" in story.pictures for story in stories)
    return tag("div", *shown, class_="pictures wide" if wide else "pictures")


# -- settings ---------------------------------------------------------------------------------------------------------


def settings(stories: Sequence[Story]) -> Html:
    """What differs, between the runs or from the defaults; and all of them."""
    tables = [story.settings for story in stories]
    if not any(tables):
        return tag("p", "There are none that could be read.")
    first = _differences(stories, differing(tables)) if len(stories) > 1 else _own(stories[0])
    keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = [[name(key), *(_setting(table, key) for table in tables)] for key in keys]
    whole = html_table(["Setting", *(name(story.label) for story in stories)], rows, caption="All settings")
    return join(first, details("All settings", whole, id_="all-settings"))


def _differences(stories: Sequence[Story], keys: Sequence[str]) -> Html:
    if not keys:
        return tag("p", "All runs have the same settings.")
    said = "Settings that differ between the runs; the others are the same"
    if len(stories) > max(4, len(keys)):  # the longer side goes down the page
        rows = [[name(story.label), *(_setting(story.settings, key) for key in keys)] for story in stories]
        return html_table(["Run", *map(name, keys)], rows, caption=said)
    rows = [[name(key), *(_setting(story.settings, key) for story in stories)] for key in keys]
    return html_table(["Setting", *(name(story.label) for story in stories)], rows, caption=said)


def _own(story: Story) -> Html:
    """What a run has that the defaults do not."""
    defaults = flatten(Config().to_dict())
    rows = [
        [name(key), _setting(story.settings, key), _setting(defaults, key)]
        for key in dict.fromkeys([*defaults, *story.settings])
        if story.settings.get(key) != defaults.get(key) and (key in story.settings or defaults[key] is not None)
    ]
    caption = "Settings that are not the defaults of pyrnode"
    return html_table(["Setting", "Here", "Default"], rows, caption=caption) if rows else tag("p", "All defaults.")


def _setting(table: Mapping[str, Any], key: str) -> Html:
    return tag("code", as_json(table[key])) if table.get(key) is not None else Html("–")


def versions(stories: Sequence[Story]) -> Html:
    """What computed them."""
    tables = []
    for story in stories:
        about = {key: value for key, value in story.versions.items() if key not in ("packages", "command")}
        packages = story.versions.get("packages")
        about = (packages if isinstance(packages, dict) else {}) | flatten(about)
        if isinstance(command := story.versions.get("command"), list):
            about["command"] = shlex.join(map(plain, command))
        tables.append(about)
    keys = list(dict.fromkeys(key for table in tables for key in table))
    if not keys:
        return tag("p", "There are none that could be read.")
    rows = [[name(key), *(_version(table.get(key)) for table in tables)] for key in keys]
    heads = ["", *(name(story.label) for story in stories)]
    whole = html_table(["What", *heads[1:]], rows, caption="Versions, machine and command")
    differ = [key for key in differing(tables) if key != "command"] if len(tables) > 1 else []
    same = "All runs were computed alike." if len(tables) > 1 else None
    said = f"The runs differ in: {', '.join(map(plain, differ))}." if differ else same
    return join(tag("p", said) if said else "", details("Versions, machine and command", whole, id_="all-versions"))


def _version(value: Any) -> Html:
    return text(value if isinstance(value, str) else "–" if value is None else as_json(value))


def problems(stories: Sequence[Story]) -> Html:
    """What could not be read, and what the runs say of themselves."""
    said = [
        tag("span", name(story.label), ": ", problem, class_="problem")
        for story in stories
        for problem in story.problems
    ]
    for story in stories:
        for record in story.records:
            if "note" in record:
                said.append(tag("span", name(story.label), ": ", record["note"]))
            if record.get("event") == "the accurate solver failed":
                said.append(tag("span", name(story.label), f": at step {record['step']:,} the accurate solver failed"))
    return listing(said[:200]) if said else Html("")
