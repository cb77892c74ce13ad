"""What an experiment found, and how it is told: pictures, numbers, settings, and a report in Markdown and HTML."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from pyrnode import plotting
from pyrnode.config import Config
from pyrnode.files import read_json, write_atomically
from pyrnode.pages import MOST
from pyrnode.pages.markup import Html, join, listing, picture, tag
from pyrnode.pages.markup import table as html_table
from pyrnode.pages.page import Page
from pyrnode.pages.reading import Story, is_run
from pyrnode.pages.reading import read as read_run
from pyrnode.runs import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Verdict = Literal["holds", "does not hold", "undecided", "not comparable"]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper beside what came out here.

    Attributes:
        statement: What the paper says.
        paper: Its number; empty where it gives none.
        ours: Ours.
        verdict: Whether the statement holds here; ``"undecided"`` where the spread over seeds is too large to tell.
        note: What a reader must know to judge that.
    """

    statement: str
    paper: str
    ours: str
    verdict: Verdict
    note: str = ""


@dataclass
class Finding:
    """The outcome of one experiment.

    Attributes:
        name: The experiment, such as ``"fig2"``.
        title: What it is about.
        claims: The paper's statements beside ours.
        numbers: The headline numbers by name, for programs.
        tables: Rows of numbers by name; each becomes a CSV file.
        shown: The table that the report prints.
        figures: Pictures by name.
        remarks: Sentences on how it was done.
        configs: The resolved settings by run.
    """

    name: str
    title: str
    claims: list[Claim]
    numbers: dict[str, float]
    tables: dict[str, list[Row]]
    shown: str
    figures: dict[str, Figure]
    remarks: list[str]
    configs: dict[str, Config] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}"]
        for claim in self.claims:
            paper = f" (paper: {claim.paper})" if claim.paper else ""
            lines.append(f"  {claim.statement}{paper}\n    here: {claim.ours} -> {claim.verdict}")
            lines += [f"    {claim.note}"] if claim.note else []
        return "\n".join(lines)


def write(finding: Finding, folder: Path, *, scale: str, published: bool) -> None:
    """Writes pictures (PNG and PDF), numbers (CSV), settings, versions and both reports; the reports come last.

    Raises:
        CheckpointError: A file cannot be written.
    """
    for name, figure in finding.figures.items():
        for suffix in ("png", "pdf"):
            plotting.save(figure, folder / f"{name}.{suffix}")
    for name, rows in finding.tables.items():
        write_atomically(folder / f"{name}.csv", _csv(rows).encode())
    settings = {name: config.to_dict() for name, config in finding.configs.items()}
    write_atomically(folder / "settings.toml", tomli_w.dumps(settings).encode())
    config = next(iter(finding.configs.values()), Config())
    write_atomically(folder / "versions.json", (json.dumps(versions(config), indent=2) + "\n").encode())
    plain = {
        "name": finding.name,
        "title": finding.title,
        "scale": scale,
        "claims": [asdict(claim) for claim in finding.claims],
        "numbers": finding.numbers,
        "remarks": [*finding.remarks, *scale_remarks(scale, published)],
        "pictures": list(finding.figures),
        "table": [{key: _cell(value) for key, value in row.items()} for row in finding.tables[finding.shown]],
        "tables": list(finding.tables),
        "runs": list(finding.configs),
    }
    write_atomically(folder / "finding.json", (json.dumps(plain, indent=2) + "\n").encode())
    write_reports(folder, [(plain, folder)])


def scale_remarks(scale: str, published: bool) -> list[str]:
    """What the scale means for the comparison."""
    if published:
        return [f"Scale '{scale}': the published configuration."]
    return [
        f"Scale '{scale}': smaller networks, fewer steps and fewer samples than the paper's. Bits per dimension and "
        "times are therefore not comparable with the paper's numbers; directions and ratios between methods of one "
        "run are."
    ]


def read(folder: Path) -> dict[str, Any]:
    """A finding as `write` left it in ``finding.json``.

    Raises:
        CheckpointError: The file is damaged.
    """
    remedy = f"delete {folder} and run its experiment again"

    def check(plain: Any) -> None:
        _sections([(plain, folder)], folder)
        _stories([(plain, folder)])

    plain: dict[str, Any] = read_json(folder / "finding.json", remedy=remedy, check=check)
    return plain


def write_reports(folder: Path, findings: Sequence[tuple[dict[str, Any], Path]]) -> None:
    """Writes ``report.md`` and ``report.html``, of one or more findings and their folders.

    The page holds the pictures, and the runs that the findings are made from, with their curves, as `pyrnode.report`'s.
    """
    sections = _sections(findings, folder)
    write_atomically(folder / "report.md", "\n".join(part for part, _ in sections).encode())
    zipped = zip(findings, sections, strict=True)
    shown = [(plain["name"], f"{plain['name']}: {plain['title']}", html) for (plain, _), (_, html) in zipped]
    title = "How to train your neural ODE, repeated" if len(findings) > 1 else shown[0][1]
    page = Page.of(_stories(findings), title=title, first=shown).html()
    write_atomically(folder / "report.html", page.encode())


def _stories(findings: Sequence[tuple[dict[str, Any], Path]]) -> list[Story]:
    """The runs that the findings are made from, as far as they are there still."""
    folders = {name: where.parent / "runs" / str(name) for plain, where in findings for name in plain["runs"]}
    return [read_run(folder, name) for name, folder in folders.items() if folder.is_dir() and is_run(folder)][:MOST]


_COLUMNS = ("statement", "paper", "ours", "verdict")
_HEADS = ("The paper's statement", "Its number", "Here", "Verdict")


def _sections(findings: Sequence[tuple[dict[str, Any], Path]], folder: Path) -> list[tuple[str, Html]]:
    """Each finding in Markdown and in HTML."""
    return [(_markdown(plain, where, folder), _html(plain, where)) for plain, where in findings]


def _markdown(plain: dict[str, Any], where: Path, folder: Path) -> str:
    place = "" if where == folder else f"{where.relative_to(folder).as_posix()}/"
    lines = [f"# {plain['name']}: {plain['title']}", ""]
    lines += _markdown_table([dict(zip(_HEADS, (c[key] for key in _COLUMNS), strict=True)) for c in plain["claims"]])
    lines += [f"* {note}" for note in _notes(plain)] + [""]
    lines += [f"![{name}]({place}{name}.png)\n" for name in plain["pictures"]]
    lines += _markdown_table(plain["table"]) + [f"* {remark}" for remark in plain["remarks"]]
    files = ", ".join(f"[{name}]({place}{name})" for name in _files(plain))
    return "\n".join([*lines, "", f"Files: {files}", ""])


def _notes(plain: dict[str, Any]) -> list[str]:
    """The claims' notes, each once."""
    return list(dict.fromkeys(claim["note"] for claim in plain["claims"] if claim["note"]))


def _files(plain: dict[str, Any]) -> list[str]:
    pictures = [f"{name}.pdf" for name in plain["pictures"]]
    return [*(f"{name}.csv" for name in plain["tables"]), *pictures, "settings.toml", "versions.json"]


def _markdown_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    escaped = [[str(value).replace("|", "\\|") for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *escaped]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def _html(plain: dict[str, Any], where: Path) -> Html:
    claims = [[claim[key] for key in _COLUMNS[:-1]] + [_verdict(claim)] for claim in plain["claims"]]
    parts = [html_table(_HEADS, claims, caption="What the paper says, and what came out"), listing(_notes(plain))]
    for name in plain["pictures"]:
        png, alt = (where / f"{name}.png").read_bytes(), f"{plain['title']} ({name}); the numbers are in the tables"
        parts.append(picture(png, alt=alt, caption=f"{name}: {plain['title']}"))
    if rows := plain["table"]:
        heads = list(rows[0])
        parts.append(html_table(heads, [list(row.values()) for row in rows], caption="The numbers"))
    return join(*parts, listing(plain["remarks"]))


def _verdict(claim: Row) -> Html:
    return tag("span", claim["verdict"], class_="verdict")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
