"""The folder of a run: everything that is needed to repeat it, resume it, and see what it did.

* ``config.toml``: the resolved configuration
* ``versions.json``: versions, machine and command
* ``metrics.jsonl``: one JSON object per optimiser step and per validation
* ``checkpoint.safetensors``: the state to resume from
* ``model.safetensors``: the best model on validation
* ``model_card.md``: what the model is, its data, scores and limits, for whoever is given it
* ``report.json``, ``report.txt``, ``*.png``: the score, and pictures
* ``snapshots/``: the model of every validation, if ``training.snapshots`` is on
* ``tensorboard/``: the metrics once more, if ``training.tensorboard`` is on
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyrnode import distributed, engines, files, native
from pyrnode.config import Config
from pyrnode.errors import CheckpointError
from pyrnode.settings import flatten

Record = dict[str, Any]

_STEP = re.compile("[0-9]{8,18}")  # the name of a snapshot

_FREE = {"device", "engine"} | {
    f"training.{key}"
    for key in (
        "epochs",
        "max_steps",
        "patience",
        "checkpoint_every",
        "checkpoint_minutes",
        "max_restarts",
        "snapshots",
        "tensorboard",
    )
}


def versions(config: Config) -> dict[str, Any]:
    """Versions of what computes, the engine that is taken and why, and the machine."""
    from importlib import metadata

    packages = {}
    for name in ("pyrnode", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors", "juliacall"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "engine": dict(zip(("name", "why"), engines.choose(config.engine, config.device), strict=True)),
        "packages": packages,
        "kernels": {name: native.status(name).why for name in native.NAMES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": distributed.present().size,
        "launch": distributed.launch(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


class RunFolder:
    """A folder that holds one run.

    Args:
        path: The folder; `begin` makes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.model = self.path / "model.safetensors"
        self._metrics = self.path / "metrics.jsonl"

    @property
    def started(self) -> bool:
        """Whether the folder already holds a run."""
        return any(os.path.exists(path) for path in (self.checkpoint, self.model, self._metrics))

    def stored_config(self) -> Config | None:
        """The configuration of the run in the folder; `None` if there is none.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = self.path / "config.toml"
        if not os.path.lexists(path):
            return None
        with files.converted(f"{path} is damaged or of another version"):
            return Config.from_toml(path.read_text(encoding="utf-8"))

    def owner(self) -> int | None:
        """The number of the process that trains in the folder now; `None` if none does, as far as can be seen.

        The lock itself is left alone, so that whoever begins to train meanwhile finds it free.
        """
        try:
            lock = self.path / ".lock"
            if os.name != "posix" or not lock.is_file():  # elsewhere the signal 0 is one that ends a process
                return None
            if (number := int(lock.read_bytes()[:20])) <= 0:
                return None
            os.kill(number, 0)
        except PermissionError:  # it is there, and another user's
            return number
        except (OSError, ValueError, OverflowError):
            return None
        return number

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and keeps it from everyone else who would write a run there.

        Raises:
            CheckpointError: It cannot be made, is a file, or is in use.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot make the folder {self.path}: {reason}; use another folder (out)") from error
        with files.locked(self.path):
            yield

    def begin(self, config: Config) -> None:
        """Writes the configuration and versions of a new run, for one who has `locked` the folder.

        Raises:
            CheckpointError: It cannot be written to.
        """
        try:
            self._metrics.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            for path in self.snapshots().values():
                path.unlink()
        except OSError as error:
            raise CheckpointError(
                f"cannot empty the folder {self.path}: {error.strerror}; use another folder (out)"
            ) from error
        self.write_config(config)
        self._write_versions(versions(config))

    def _write_versions(self, about: dict[str, Any]) -> None:
        self.write_text("versions.json", json.dumps(about, indent=2) + "\n")

    def go_on(self, config: Config) -> list[str]:
        """Writes configuration and versions of a run that is resumed.

        Returns:
            What differs from when it was last computed, of that on which its last digits depend, as
            ``name: then → now``.
        """
        self.write_config(config)
        now = versions(config)
        try:
            then = files.read_json(self.path / "versions.json", remedy="", check=footing)
        except CheckpointError:
            then, changed = {}, ["versions.json: damaged or missing, so that nothing can be compared"]
        else:
            changed = differences(footing(then), footing(now))
        if changed or then.get("launch") != now["launch"]:
            self._write_versions(now)
        return changed

    def snapshot(self, step: int) -> Path:
        """The file of the model that was validated after that step; its folder is made.

        Raises:
            CheckpointError: The folder cannot be made.
        """
        folder = self.path / "snapshots"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {folder}: {error.strerror}") from error
        return folder / f"{step:08d}.safetensors"

    def snapshots(self) -> dict[int, Path]:
        """The files of the models that were validated, by step, in order; what else lies there is let lie."""
        found = sorted((self.path / "snapshots").glob("[0-9]*.safetensors"))
        return {int(path.stem): path for path in found if _STEP.fullmatch(path.stem) and os.path.isfile(path)}

    def goes_on(self) -> bool:
        """Whether torchrun started this process again for the run that the folder holds, which is then resumed."""
        if not (distributed.restarted() and self.started):
            return False
        try:
            about = files.read_json(self.path / "versions.json", remedy="", check=footing)
        except CheckpointError:
            return False
        return bool(about.get("launch") == distributed.launch())

    def write_config(self, config: Config) -> None:
        """Writes the configuration."""
        self.write_text("config.toml", config.to_toml())

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file of the folder, atomically."""
        files.write_atomically(self.path / name, text.encode())

    def append(self, records: list[Record]) -> None:
        """Appends metrics, one JSON object a line."""
        if records:
            files.append(self._metrics, "".join(json.dumps(record) + "\n" for record in records).encode())

    def rewind(self, step: int) -> list[Record]:
        """Drops metrics and snapshots after `step` (they will be computed again), and returns the other metrics."""
        with files.converted(f"cannot take back the snapshots after step {step}"):
            for later, path in self.snapshots().items():
                if later > step:
                    path.unlink()
        records = [r for r in read_metrics(self.path) if r["step"] <= step]
        self.write_text(self._metrics.name, "".join(json.dumps(r) + "\n" for r in records))
        return records


def read_metrics(path: str | Path) -> list[Record]:
    """The metrics of a run's folder; a last line that was cut short by a kill is left out.

    Raises:
        CheckpointError: A line before the last one is damaged.
    """
    records, damaged = legible_metrics(path)
    if damaged:
        raise CheckpointError(f"{Path(path) / 'metrics.jsonl'}, line {damaged[0]} is damaged")
    return records


def legible_metrics(path: str | Path) -> tuple[list[Record], list[int]]:
    """The metrics of a run's folder that can be read, and the numbers of the lines that cannot.

    A last line that was cut short, by a kill or because it is being written now, counts as neither.

    Raises:
        CheckpointError: The file cannot be read at all.
    """
    file = Path(path) / "metrics.jsonl"
    if not os.path.lexists(file):
        return [], []
    with files.converted(f"{file} cannot be read"):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records, damaged = list[Record](), list[int]()
    for number, line in enumerate(lines, 1):
        try:
            records.append(_record(line))
        except Exception:  # whatever JSON, or what is none, can be
            damaged.append(number)
    return records, [number for number in damaged if number < len(lines)]


_TEXTS = {"event", "cause", "changes", "solver", "note"}
"""What is no number in a record."""


def _record(line: str) -> Record:
    """A line of metrics; raises an error of any kind where it is not one."""
    record: Record = json.loads(line)
    for key, value in record.items():
        if key not in _TEXTS and value is not None and type(value) not in (int, float):
            raise TypeError(f"{key} = {value!r}")
        if key not in _TEXTS and value is not None:
            float(value)  # an integer may be beyond it
    if type(record["step"]) is not int or record["step"] < 0:
        raise ValueError("no step")
    return record


def lasting(config: Config) -> dict[str, Any]:
    """The settings that a resumed run may not change, by name; how long to train and how to score, it may."""
    settings = flatten(config.to_dict())
    return {k: v for k, v in settings.items() if k not in _FREE and not k.startswith("evaluation.")}


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Where settings differ, as ``key: stored → asked``."""
    keys = sorted(key for key in {*stored, *asked} if stored.get(key) != asked.get(key))
    return [f"{key}: {stored.get(key)!r} → {asked.get(key)!r}" for key in keys]


def footing(about: Mapping[str, Any]) -> dict[str, str]:
    """What the last digits of a run depend on, of what `versions` gives, by name."""
    packages, engine = about["packages"], about["engine"]["name"]
    computes = ("torch", "juliacall") if engine == "julia" else ("torch",)
    found = {name: packages.get(name) for name in ("pyrnode", *computes)} | {"engine": engine}
    found |= {name: about.get(name) for name in ("threads", "processor", "cuda")}
    found["processes"] = about.get("processes", 1)
    found |= {f"kernel {name}": why for name, why in about["kernels"].items()}
    return {name: str(value) for name, value in found.items()}
