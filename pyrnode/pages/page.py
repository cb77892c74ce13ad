"""A page on runs: its parts, which a page that follows a run renews one by one, and how they are laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyrnode.pages import curves, paths, scores, sections
from pyrnode.pages.charts import CHARTS
from pyrnode.pages.markup import Html, document, join, name, plain, tag
from pyrnode.pages.reading import Story
from pyrnode.pages.sections import part
from pyrnode.version import VERSION


@dataclass(frozen=True)
class Page:
    """What a page on runs holds.

    Attributes:
        title: Of the page.
        stories: The runs.
        parts: HTML by name.
        data: What its scripts draw.
        width: Steps that are a point of a curve.
        first: Name, title and content of what stands before all that.
    """

    title: str
    stories: list[Story]
    parts: dict[str, Html]
    data: dict[str, Any]
    width: int
    first: Sequence[tuple[str, str, Html]] = ()

    @classmethod
    def of(
        cls, stories: Sequence[Story], *, title: str | None = None, first: Sequence[tuple[str, str, Html]] = ()
    ) -> Page:
        """From what the runs' folders say.

        Args:
            stories: The runs.
            title: Of the page; default the run's name, or how many there are.
            first: Name, title and content of sections that stand before those on the runs.
        """
        columns, width = curves.of_runs(stories)
        particles, drawn = paths.section(stories)
        made = {
            "lead": sections.lead,
            "runs": sections.runs,
            "problems": sections.problems,
            "scores": scores.section,
            "pictures": sections.pictures,
            "ladder": sections.ladder,
            "settings": sections.settings,
            "versions": sections.versions,
        }
        parts = {"particles": particles, **{key: _guarded(make, stories) for key, make in made.items()}}
        parts |= {f"table-{chart.id}": sections.numbers(chart, stories, columns) for chart in CHARTS}
        runs = [
            {"name": plain(story.label), **{kind: curves.plain_columns(table) for kind, table in own.items()}}
            for story, own in zip(stories, columns, strict=True)
        ]
        data = {"runs": runs, "charts": [asdict(chart) for chart in CHARTS], "paths": drawn}
        if title is None:
            title = stories[0].label if len(stories) == 1 else f"{len(stories)} runs compared"
        return cls(title, list(stories), parts, data, width, first)

    def html(self, *, live: bool = False) -> str:
        """The whole page.

        Args:
            live: It asks its server for news.
        """
        data = self.data if self.stories else None
        return document(f"{self.title} · pyrnode", self.body(live=live), data, live=live)

    def body(self, *, live: bool = False) -> Html:
        """What stands in the page."""
        shown = self._sections()
        links = [tag("li", tag("a", title, href=f"#{id_}")) for id_, title, _ in shown]
        kind = "a run" if len(self.stories) == 1 else "a comparison"
        head = tag(
            "header",
            tag("p", f"pyrnode · {'the paper, repeated' if self.first else kind}", class_="kind"),
            tag("h1", name(self.title)),
            _followed() if live else "",
            "" if self.first else part("lead", self.parts["lead"]),
            part("problems", self.parts["problems"]),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        )
        return join(
            tag("a", "Skip to the content", class_="skip", href="#main"),
            head,
            tag("main", *(section(id_, title, content) for id_, title, content in shown), id="main", tabindex="-1"),
            tag("footer", f"Written by pyrnode {VERSION}. Curves drawn by uPlot 1.6.32 (MIT, © Leon Sorokin)."),
        )

    def _sections(self) -> list[tuple[str, str, Html]]:
        """Name, title and content of each section, in order."""
        if not self.stories:
            return list(self.first)
        parts, many = self.parts, len(self.stories) > 1
        shown = [*self.first, *([("runs", "Runs", part("runs", parts["runs"]))] if many else [])]
        titles = {"scores": "Scores", "pictures": "Pictures"}
        shown += [("curves", "Curves", sections.charts(self.stories, parts, self.width))]
        shown += [(key, title, part(key, parts[key])) for key, title in titles.items()]
        shown += [("particles", "Particles in time", join(_time(), part("particles", parts["particles"])))]
        titles = {"ladder": "The training solver", "settings": "Settings", "versions": "Versions"}
        return shown + [(key, title, part(key, parts[key])) for key, title in titles.items()]


def _guarded(make: Callable[[Sequence[Story]], Html], stories: Sequence[Story]) -> Html:
    """A part; where files hold what nobody thought of, a sentence that says so, and the rest of the page stands."""
    try:
        return make(stories)
    except Exception as error:  # see above: files can hold anything
        said = f"This could not be shown: the files hold what was not expected ({type(error).__name__}: {error})."
        return tag("p", said, class_="problem")


def section(id_: str, title: Any, content: Html) -> Html:
    """A section under its heading."""
    return tag("section", tag("h2", title, id=f"{id_}-title"), content, id=id_, aria_labelledby=f"{id_}-title")


def _time() -> Html:
    """The slider of time, and the place where particles are drawn."""
    slider = '<input id="time" type="range" min="0" max="200" value="0">'
    return Html(
        '<p class="note">Samples of the flow on their way from the data (t = 0) to the normal base (t = T), in the '
        "flow’s own space, by the accurate solver; the circles are one and two standard deviations of the base.</p>"
        '<div class="time" id="time-controls"><button type="button" id="play">Play</button>'
        f'<label for="time">Time</label>{slider}<output id="time-value" for="time"></output></div>'
        '<div class="particles" id="drawn-particles"></div>'
    )


def _followed() -> Html:
    return Html(
        '<p class="live"><span id="live">Followed while it goes on.</span></p>'
        '<p class="unseen" id="live-said" role="status"></p>'
    )
