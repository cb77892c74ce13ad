"""Pages that a person would rather look at: `report` makes one HTML file of a run, or of several side by side.

``reading`` takes in what a run's folder holds; ``charts``, ``curves``, ``scores``, ``paths`` and ``sections`` make of
it what the page shows; ``page`` lays that out, ``live`` serves it while a run goes on, and all write with ``markup``.
"""

from __future__ import annotations

import os
import webbrowser
from collections.abc import Iterable
from pathlib import Path

from pyrnode.errors import CheckpointError, ConfigError
from pyrnode.files import write_atomically
from pyrnode.pages.markup import plain
from pyrnode.pages.page import Page
from pyrnode.pages.reading import Story, is_run, labelled, read
from pyrnode.progress import stages

__all__ = ["report"]

MOST = 100
"""Runs on a page."""

_OURS = b'<meta name="generator" content="pyrnode '


def report(*runs: str | Path, out: str | Path | None = None, open: bool = False, progress: bool = False) -> Path:
    """Writes one HTML page on a run, or on several side by side, that needs nothing but a browser.

    It has the curves laid over one another, scores with their errors and baselines, samples, particles with time as a
    slider, the settings and where they differ, and versions. What is damaged or missing in a run's folder is said on
    the page. A run that is still going on is shown as it is now; ``pyrnode report RUN --live`` follows it.

    Args:
        *runs: Folders of runs; a folder that holds folders of runs stands for all of them.
        out: The file; default ``report.html`` in the folder of a single run, and in the working folder for several.
        open: Show it in the browser.
        progress: Show a progress bar, if it takes more than two seconds.

    Returns:
        The file.

    Raises:
        ConfigError: No run is named, more than 100 are, or `out` does not end in ``.html``.
        CheckpointError: A folder holds no run, `out` is a file that pyrnode did not write, or cannot be written.

    Example:
        >>> import tempfile, pyrnode
        >>> folder = tempfile.mkdtemp()
        >>> result = pyrnode.train("moons", max_steps=2, samples=200, out=f"{folder}/run", progress=False)
        >>> pyrnode.report(f"{folder}/run").name
        'report.html'
    """
    folders = found(runs)
    path = Path(out) if out is not None else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out = {plain(path)!r}: end the page's name in .html")
    _check_free(path)
    write_atomically(path, page_of(folders, progress=progress).html().encode())
    if open:
        webbrowser.open(path.resolve().as_uri())
    return path


def page_of(folders: list[Path], *, progress: bool = False) -> Page:
    """The page on runs, as their files are now."""
    labels, stories = labelled(folders), list[Story]()
    with stages([*(f"report: {label}" for label in labels), "report: the page"], show=progress) as done:
        for path, label in zip(folders, labels, strict=True):
            stories.append(read(path, label))
            done()
        return Page.of(stories)


def found(runs: Iterable[str | Path]) -> list[Path]:
    """The folders of runs that are meant, each once; errors as `report`."""
    folders: dict[str, Path] = {}
    for run in runs:
        try:
            for path in _within(Path(run)):
                folders.setdefault(os.path.realpath(path), path)
        except (OSError, TypeError, ValueError) as error:  # a NUL in the name, no permission
            raise ConfigError(f"run = {run!r}: expected the folder of a run ({error})") from None
    if not folders:
        raise ConfigError("no run is named: give the folder of a run, as in report('runs/digits')")
    if len(folders) > MOST:
        raise ConfigError(f"{len(folders)} runs are more than a page shows ({MOST}): name fewer")
    return list(folders.values())


def _within(path: Path) -> list[Path]:
    """The folder itself, or, where it is none of a run, the runs that lie in it."""
    if path.is_dir() and not is_run(path):
        return sorted(inner for inner in path.iterdir() if inner.is_dir() and is_run(inner)) or [path]
    return [path]


def _check_free(path: Path) -> None:
    """Raises `CheckpointError` where another's file would be overwritten."""
    if not os.path.lexists(path):
        return
    try:
        ours = path.is_file() and _OURS in path.read_bytes()[: 1 << 20]
    except OSError as error:
        raise CheckpointError(
            f"cannot write {plain(path)}: {error.strerror}; name another file (out=, --out)"
        ) from None
    if not ours:
        raise CheckpointError(f"{plain(path)} is no page of pyrnode's, and stays: name another file (out=, --out)")
