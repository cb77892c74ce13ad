"""What the files of a run say, read without trust: whatever is missing, half-written or damaged becomes a sentence.

Nothing is written, and nothing of a run is executed.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrnode.config import Config
from pyrnode.errors import CheckpointError, ConfigError
from pyrnode.pages.markup import finite, plain
from pyrnode.runs import Record, RunFolder, legible_metrics
from pyrnode.settings import flatten

PICTURES = {
    "samples.png": "Samples of the flow, side by side",
    "density.png": "The learned density, beside the truth where it is known",
    "pairs.png": "Pairs of columns: held-out data below the diagonal, samples above it",
    "calibration.png": "Calibration: PIT values of held-out data against the uniform distribution",
    "solvers.png": "Solvers of fixed steps against the accurate one, by their step",
    "trajectories.png": "Paths of particles from the data to the base",
}
"""The pictures of a run that the page shows, and what they are (the curves are drawn anew)."""

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST = {"metrics.jsonl": 1 << 29, ".png": 1 << 24}
"""Bytes of a file that are read; of others a mebibyte."""


@dataclass
class Story:
    """A run as its folder tells it.

    Attributes:
        path: The folder.
        label: What it is called beside others.
        settings: As in ``config.toml``, by ``section.key``.
        records: Of steps, validations and events.
        report: ``report.json``; empty if there is none.
        versions: ``versions.json``; empty if there is none.
        pictures: PNGs by name.
        owner: The process that trains in it now.
        problems: What could not be read, in words.
    """

    path: Path
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    owner: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[Record]:
        """The records of optimiser steps."""
        return [record for record in self.records if "loss" in record]

    @property
    def validations(self) -> list[Record]:
        """The records of validations that have a value."""
        return [record for record in self.records if finite(record.get("validation")) is not None]

    @property
    def data(self) -> str:
        """The name of the data."""
        return plain(self.settings.get("data.name") or "data of its own")

    @property
    def discrete(self) -> bool:
        """Whether scores are bits per dimension: as the report says, or as far as the data's name tells."""
        if isinstance(said := self.report.get("discrete"), bool):
            return said
        known = ("digits", "mnist", "fashion-mnist", "cifar10", "svhn")
        return self.data in known or finite(self.settings.get("data.levels")) is not None

    @property
    def state(self) -> str:
        """Where the run stands, in words."""
        done = self.steps[-1]["step"] if self.steps else 0
        total = self.settings.get("training.max_steps")
        at = f"step {done:,}" + (f" of {total:,}" if type(total) is int and total >= done else "")
        if self.owner is not None:
            return f"running, {at}"
        if self.report:
            return f"finished and scored, {at}"
        if not self.records:
            return "no step yet"
        complete = type(total) is int and done >= total
        return f"{'finished' if complete else 'ended or interrupted'} without a score, {at}"


def read(path: str | Path, label: str | None = None) -> Story:
    """Reads a run.

    Args:
        path: Its folder.
        label: What to call it; default the folder's name.

    Raises:
        CheckpointError: There is no such folder, or nothing of a run in it.
    """
    folder = RunFolder(_checked(path))
    story = Story(folder.path, label or folder.path.resolve().name or str(folder.path))
    story.owner = folder.owner()
    story.settings = _settings(story)
    story.records = _metrics(story)
    story.report = _json(story, "report.json", "the score is not shown")
    story.versions = _json(story, "versions.json", "versions are not shown")
    for file in PICTURES:
        content = _content(story, file, "the picture is left out")
        if content is not None and not content.startswith(_PNG):
            story.problems.append(f"{file} is no PNG: the picture is left out")
        elif content is not None:
            story.pictures[file] = content
    return story


def is_run(path: Path) -> bool:
    """Whether a folder holds a run, or the beginning of one."""
    return RunFolder(path).started or os.path.isfile(path / "config.toml")


def _checked(path: str | Path) -> Path:
    try:
        folder = Path(path)
        there = folder.is_dir()
    except (TypeError, ValueError) as error:  # a NUL in the name
        raise ConfigError(f"run = {path!r}: expected the folder of a run ({error})") from None
    if not there:
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{plain(folder)} {what}: expected the folder of a run, as `pyrnode train --out` makes it"
        )
    if not is_run(folder):
        raise CheckpointError(
            f"{plain(folder)} holds no run (no config.toml, metrics.jsonl or model.safetensors): name the folder that "
            "`pyrnode train --out` wrote, or wait until it has begun"
        )
    return folder


def _content(story: Story, file: str, consequence: str) -> bytes | None:
    """The bytes of a file; `None` where there is none, or it cannot be read, which is said."""
    path = story.path / file
    if not os.path.lexists(path):
        return None
    most = _MOST.get(file) or _MOST.get(path.suffix) or 1 << 20
    try:
        if not path.is_file():
            raise OSError("it is no regular file")
        if (size := path.stat().st_size) > most:
            raise OSError(f"it has {size:,} bytes, and no more than {most:,} are read")
        return path.read_bytes()
    except OSError as error:
        story.problems.append(f"{file} cannot be read ({error.strerror or error}): {consequence}")
        return None


def _parsed(story: Story, file: str, consequence: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    content = _content(story, file, consequence)
    if content is None:
        return {}
    try:
        found = parse(content.decode())
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}")
        return found
    except Exception as error:  # contents can go wrong in more ways than could be listed
        story.problems.append(f"{file} is damaged ({plain(error)[:200]}): {consequence}")
        return {}


def _json(story: Story, file: str, consequence: str) -> dict[str, Any]:
    return _parsed(story, file, consequence, json.loads)


def _settings(story: Story) -> dict[str, Any]:
    def parse(toml: str) -> dict[str, Any]:
        return flatten(tomllib.loads(toml))

    settings = _parsed(story, "config.toml", "settings are not shown", parse)
    if settings:
        try:
            Config.from_toml((story.path / "config.toml").read_text(encoding="utf-8"))
        except Exception as error:  # as above
            reason = plain(error)[:300]
            story.problems.append(
                f"the settings are not those of this version of pyrnode ({reason}): shown as they are"
            )
    return settings


def _metrics(story: Story) -> list[Record]:
    path = story.path / "metrics.jsonl"
    try:
        if os.path.lexists(path) and not path.is_file():
            raise CheckpointError("it is no regular file")
        if path.is_file() and (size := path.stat().st_size) > (most := _MOST["metrics.jsonl"]):
            raise CheckpointError(f"it has {size:,} bytes, and no more than {most:,} are read")
        records, damaged = legible_metrics(story.path)
    except (CheckpointError, OSError) as error:
        story.problems.append(f"metrics.jsonl cannot be read ({plain(error)[:200]}): there are no curves")
        return []
    if damaged:
        lines = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines, the first of them {damaged[0]},"
        story.problems.append(f"metrics.jsonl: {lines} cannot be read, and the curves go on without")
    return records


def labelled(paths: list[Path]) -> list[str]:
    """Names of folders, as short as they can be told apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    labels = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        labels.append("/".join(own[-length:]).replace("//", "/"))
    return labels


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys on which tables differ, in order."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if any(table.get(key) != tables[0].get(key) for table in tables[1:])]
