"""Folders of runs as training leaves them, written without training, and a look at HTML, for the tests of pages."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pyrnode.config import Config

HOSTILE = [
    "<script>alert(1)<∕script>",
    "\u202egnihton & \"quoted\" 'x'",
    "</title><img src=x onerror=alert(2)>".replace("/", "∕"),
    "{{braces}} ${dollar} %s \\u003c",
    "a" * 120,
]
"""Names of folders that would be code or nonsense if they were not escaped."""

SCORE: dict[str, Any] = {
    "score": {"nats": -2.83, "nats_error": 0.02, "bits": 2.04, "bits_error": None},
    "bin_centre": None,
    "true_entropy": 2.81,
    "gap": 0.011,
    "gap_error": 0.002,
    "baselines": {"gaussian": {"nats": -4.25, "nats_error": 0.01, "bits": 3.07, "bits_error": None}},
    "solver": "DP5 rtol 1e-05 atol 1e-05",
    "divergence": "exact",
    "disagreement": 3e-4,
    "training_solver": "RK4 step 0.25",
    "E": 0.14,
    "n": 1.3,
    "nfe": 30.1,
    "inversion_error": 7e-5,
    "samples": 400,
    "draws": 1,
    "seconds": 2.0,
    "discrete": False,
    "dim": 2,
    "notes": ["a note <b>of its own</b>"],
}


def write_run(folder: Path, *, steps: int = 40, every: int = 10, seed: int = 0, **settings: Any) -> Path:
    """A run of that many steps, with a ladder that moved and a report."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    named = {"data.name": "8gaussians", "max_steps": steps, "seed": seed, **settings}
    (folder / "config.toml").write_text(Config.preset("toy").override(named).to_toml(), encoding="utf-8")
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        nll = 1.4 + 0.7 * math.exp(-step / 500) + rng.gauss(0, 0.03)
        record = {"step": step, "epoch": 0, "loss": nll, "nll": nll, "bits": nll / math.log(2), "E": 0.1, "n": 1.3}
        record |= {"nfe": 16, "grad_norm": 1.0, "learning_rate": 1e-3, "seconds": round(0.01 * step, 3)}
        lines.append(record)
        if step % every == 0:
            found = {"validation": nll, "validation_bits": nll / math.log(2), "disagreement": 1e-4, "step_size": 0.25}
            lines.append({"step": step, **found, "seconds": round(0.01 * step, 3)})
    lines.append({"step": steps, "event": "solver", "solver": "RK4 step 0.5", "step_size": 0.5, "disagreement": 0.02})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(SCORE), encoding="utf-8")
    about = {"engine": {"name": "torch"}, "packages": {"torch": "2.14"}, "threads": 1, "command": ["train", "a b"]}
    (folder / "versions.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


VOID = {"meta", "img", "input", "br", "link", "hr"}


class Look(HTMLParser):
    """What a page holds; `problems` says what is wrong with it as HTML."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.feed(page)
        self.close()
        self.problems += [f"<{name}> is never closed" for name in self.open]
        ids = [given["id"] for _, given in self.tags if "id" in given]
        self.problems += [f"id {id_!r} twice" for id_ in {i for i in ids if ids.count(i) > 1}]
        self.ids = set(ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, given))
        if len(given) != len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        if tag == "script":
            self.scripts.append((given, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            given, text = self.scripts[-1]
            self.scripts[-1] = (given, text + data)
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """What is there to read."""
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of that name."""
        return [given for name, given in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        """What the scripts draw."""
        (text,) = [text for given, text in self.scripts if given.get("id") == "data"]
        found: dict[str, Any] = json.loads(text, parse_constant=lambda name: 1 / 0)
        return found
