"""The system image: Julia with the engine's packages and usual solvers compiled into one file, from which it starts.

`pyrnode install-julia` has PackageCompiler build it (``julia/bridge/image.jl``), from what a process of the engine's
compiled while it ran the usual solves (`engines.julia_workload`). It holds the code of one Julia, for one kind of
processor, at the versions of one Manifest, with one RNODE: beside it lies a record of what it was made of, and an image
that was made of anything else than what is there now is stale, and not loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pyrnode import julia_setup
from pyrnode.julia_setup import JuliaStatus
from pyrnode.native.cache import processor

SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")

_MADE_OF = {
    "executable": "another Julia",
    "julia": "another version of Julia",
    "manifest": "other packages, or other preferences of theirs",
    "sources": "another version of RNODE",
    "processor": "another processor",
}
"""What an image is made of, and what it was made for where that has changed since."""


@dataclass(frozen=True)
class Image:
    """A system image that was built.

    Attributes:
        path: The file.
        built: When.
        seconds: How long it took.
        stale: Why it is not loaded, if it is not: ``"it was built for another version of RNODE"``.
    """

    path: Path
    built: datetime
    seconds: float
    stale: str | None = None

    @property
    def age(self) -> str:
        """How long ago it was built, in words."""
        seconds = (datetime.now(UTC) - self.built).total_seconds()
        for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
            if (count := int(seconds // length)) > 0:
                return f"{count} {unit}{'' if count == 1 else 's'} old"
        return "just built"


def folder(found: JuliaStatus) -> Path:
    """Where the image of a Julia project lies, and what is measured of it: in the depot, beside what Julia compiled."""
    depot = julia_setup.depots()[0]
    return depot / "pyrnode" / hashlib.sha256(str(found.project).encode()).hexdigest()[:16]


def find(found: JuliaStatus) -> Image | None:
    """The image of a Julia project, stale or not; `None` where none was built (or its record cannot be read)."""
    path, record = folder(found) / f"image{SUFFIX}", _record(folder(found))
    if record is None or not path.is_file():
        return None
    try:
        built, seconds = datetime.fromisoformat(record["built"]), float(record["seconds"])
        then = dict(record["made_of"])
    except (KeyError, TypeError, ValueError):
        return None
    now = made_of(found)
    changed = [words for name, words in _MADE_OF.items() if then.get(name) != now[name]]
    stale = f"it was built for {' and '.join(changed)}" if changed else None
    if stale is None and path.stat().st_size != record.get("size"):
        stale = "its file is not what was written"
    return Image(path, built, seconds, stale)


def usable(found: JuliaStatus) -> Path | None:
    """The file of the image, where there is one that is not stale."""
    image = find(found)
    return image.path if image is not None and image.stale is None else None


def tools() -> Path:
    """The folder of PackageCompiler's environment, apart from the engine's packages, which stay as they are."""
    return julia_setup.depots()[0] / "pyrnode" / "packagecompiler"


@contextmanager
def built(found: JuliaStatus, made: Path) -> Iterator[None]:
    """While it lasts an image is built as the file `made`; thereafter it is the project's, in the place of what was.

    What it is made of is looked at before, so that an image is stale whose sources have changed meanwhile.
    """
    parts, start = made_of(found), time.monotonic()
    yield
    seconds, now = time.monotonic() - start, datetime.now(UTC)
    table = {"made_of": parts, "built": now.isoformat(), "seconds": seconds, "size": made.stat().st_size}
    record = made.with_suffix(".json")
    record.write_text(json.dumps(table, indent=1), encoding="utf-8")
    remove(found)  # the record goes first and comes last: what has none is no image
    os.replace(made, folder(found) / made.name)
    os.replace(record, folder(found) / "image.json")


def remove(found: JuliaStatus) -> None:
    """Removes the image of a Julia project, if there is one."""
    for name in ("image.json", f"image{SUFFIX}"):
        (folder(found) / name).unlink(missing_ok=True)


def made_of(found: JuliaStatus) -> dict[str, str]:
    """What an image that were built now would be made of; each of the values means nothing but that it differs."""
    project = Path(str(found.project))
    names = ["Manifest.toml", "Project.toml", "LocalPreferences.toml"]
    tables = sorted(path for name in names for path in project.glob(f"*{name.replace('.toml', '*.toml')}"))
    return {
        "executable": str(found.executable),
        "julia": str(found.version),
        "manifest": _digest(tables, project),
        "sources": _sources(),
        "processor": hashlib.sha256(processor() or platform.processor().encode()).hexdigest(),
    }


@cache
def _sources() -> str:
    root = julia_setup.sources()
    parts = [root / "Project.toml", *(root / "src").rglob("*.jl"), *(root / "bridge").rglob("*")]
    return _digest(sorted(path for path in parts if path.is_file()), root)


def _digest(files: list[Path], root: Path) -> str:
    total = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        total.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return total.hexdigest()


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / "image.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
