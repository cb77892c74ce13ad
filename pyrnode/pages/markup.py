"""HTML from values that may be anything: whatever is not marked as HTML is escaped."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from pyrnode.files import to_json
from pyrnode.version import VERSION

_LONGEST = 2000
"""Characters of a text that are shown."""

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
"""What would be shown as nothing, or turn the text around it: control characters and marks of direction."""


class Html(str):
    """Text that is HTML already."""


def plain(value: Any) -> str:
    """A value as text that can be encoded and seen: what is invisible or no character is written as an escape."""
    text = value if isinstance(value, str) else str(value)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text)} characters)"
    text = text.encode("utf-8", "backslashreplace").decode()
    return _INVISIBLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def text(value: Any) -> Html:
    """A value as HTML: as it is where it is `Html`, and escaped where it is anything else."""
    return value if isinstance(value, Html) else Html(html.escape(plain(value)))


def join(*values: Any) -> Html:
    """Values one after another."""
    return Html("".join(map(text, values)))


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element: ``tag("p", "a < b", class_="note")``; attributes that are `None` are left out."""
    written = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return Html(f"<{name}{''.join(written)}>{join(*content)}</{name}>")


def name(value: Any) -> Html:
    """A name that comes from a file: its direction of writing stays its own."""
    return tag("bdi", value)


def number(value: Any, digits: int = 4) -> str:
    """A number for reading, with a true minus; a dash where there is none."""
    found = finite(value)
    return "–" if found is None else f"{found:.{digits}g}".replace("-", "−")


def decimals(value: Any, places: int = 4) -> str:
    """A number with so many decimals."""
    found = finite(value)
    return "–" if found is None else f"{found:.{places}f}".replace("-", "−")


def finite(value: Any) -> float | None:
    """The value where it is a finite number."""
    if type(value) not in (int, float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < float("inf") else None


def table(
    heads: Sequence[Any], rows: Sequence[Sequence[Any]], *, caption: Any, class_: str | None = None, note: bool = True
) -> Html:
    """A table whose first column names the rows, in a frame that scrolls by itself where it is too wide.

    Args:
        heads: Of the columns.
        rows: Values, as many as there are heads.
        caption: What the table says.
        class_: Class of the table.
        note: Show the caption; else it is there for screen readers alone.
    """
    head = join(*(tag("th", value, scope="col") for value in heads))
    lines = [tag("tr", tag("th", row[0], scope="row"), *(_cell(value) for value in row[1:])) for row in rows]
    shown = tag("caption", caption, class_=None if note else "unseen")
    content = join(shown, tag("thead", tag("tr", head)), tag("tbody", *lines))
    frame = tag("table", content, class_=class_)
    return tag("div", frame, class_="frame", role="region", tabindex="0", aria_label=_spoken(caption))


_FIGURES = 24
"""Characters of the longest number with its error and unit."""


def _cell(value: Any) -> Html:
    """Numbers stand under one another, on one line; a sentence that begins with one is no number."""
    text = value if isinstance(value, str) else ""
    figures = re.match(r"[−–-]?\d", text) is not None and len(text) <= _FIGURES
    return tag("td", value, class_="figures" if figures else None)


def _spoken(value: Any) -> str:
    """HTML of ours as text."""
    return html.unescape(re.sub("<[^>]*>", "", value)) if isinstance(value, Html) else str(value)


def details(summary: Any, *content: Any, id_: str | None = None) -> Html:
    """What opens when it is asked for."""
    return tag("details", tag("summary", summary), *content, id=id_)


def listing(items: Sequence[Any]) -> Html:
    """A list; nothing where there are no items."""
    return tag("ul", *(tag("li", item) for item in items)) if items else Html("")


def picture(png: bytes, *, alt: str, caption: Any) -> Html:
    """A PNG inside the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Html(
        f'<figure class="picture"><img alt="{html.escape(plain(alt))}" src="{source}">'
        f"{tag('figcaption', caption)}</figure>"
    )


def embedded(value: Any) -> str:
    """A value as JSON that may stand in a script: no ``<`` in it ends the script, whatever its texts are."""
    written = to_json(value)
    for sign in "<>&\u2028\u2029":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return written


@cache
def asset(file: str) -> str:
    """A file that travels with the package."""
    return (resources.files("pyrnode.pages") / "assets" / file).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


STYLES = ("uplot.min.css", "page.css")
SCRIPTS = ("uplot.min.js", "page.js", "paths.js")
GENERATOR = f'<meta name="generator" content="pyrnode {VERSION}">'


def document(title: str, body: Html, data: Mapping[str, Any] | None, *, live: bool = False) -> str:
    """A whole page that needs nothing from elsewhere.

    Its policy (Content-Security-Policy) lets no browser run or load anything but what this function puts there, so
    that no text from a file can become code even if it were not escaped.

    Args:
        title: Of the window.
        body: The content.
        data: What the scripts draw; `None`: no scripts are needed.
        live: The page asks its server for news.
    """
    styles = "\n".join(map(asset, STYLES))
    scripts = [] if data is None else [asset(file) for file in (*SCRIPTS, *(["live.js"] if live else []))]
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_digest(styles)}",
            f"script-src {' '.join(map(_digest, scripts)) or _NONE}",
            f"connect-src {_SELF if live else _NONE}",
            "base-uri 'none'; form-action 'none'",
        )
    )
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="color-scheme" content="light dark">\n{GENERATOR}',
        f"<title>{html.escape(plain(title))}</title>\n<style>{styles}</style>\n</head>\n<body>",
        body,
    ]
    if data is not None:
        parts.append(f'<script type="application/json" id="data">{embedded(data)}</script>')
    parts += [f"<script>{script}</script>" for script in scripts]
    return "\n".join([*parts, "</body>\n</html>\n"])


_NONE, _SELF = "'none'", "'self'"


def as_json(value: Any) -> str:
    """A value of a setting as it would be written, on one line."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return "(too deep)"
