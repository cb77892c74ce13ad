"""What a GPU shows of pyrnode, by one command that a time limit may cut anywhere: the same command goes on.

    make gpu                                  or: python -m benchmarks.gpu --out gpu --seconds 540
    python -m benchmarks.gpu --device cpu --tiny        the same in small, to try the command itself

Needs no network, and of pyrnode's own requirements what there is: what is missing for a part is said, and the rest is
done. Every measurement goes into OUT/gpu.json as soon as it is there, and OUT/gpu.png shows them. With --seconds it
stops in good time and exits with 3 while something is left to do. README.md says what was predicted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import PARTS, Item, Setup, Unfinished, items
from pyrnode.config import Config
from pyrnode.devices import resolve_device
from pyrnode.files import write_atomically
from pyrnode.runs import versions

TRIES = 2
"""How often a measurement is begun that a time limit cuts each time."""

LEFT = 3
"""Exit code while something is left to do."""


class Ledger:
    """What is measured so far: a JSON file that is whole at any time.

    Args:
        path: The file; what it holds is taken up.
        about: The machine, and what is to be measured: with another one's file, nothing is mixed.

    Raises:
        SystemExit: The file is of another machine, or of other settings.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"about": about, "items": {}}
        if path.is_file():
            self.document = json.loads(path.read_text(encoding="utf-8"))
            if self.document["about"] != json.loads(json.dumps(about)):
                raise SystemExit(f"{path} is of another device, version or size: take another --out")

    @property
    def items(self) -> dict[str, dict[str, Any]]:
        """The measurements by name."""
        found: dict[str, dict[str, Any]] = self.document["items"]
        return found

    def open(self, name: str) -> bool:
        """Whether that one is still to be made; one that was cut too often is given up."""
        item = self.items.get(name)
        if item is not None and item["status"] == "begun" and item["tries"] >= TRIES:
            self._put(name, {"status": "failed", "why": f"the process ended in it {TRIES} times"})
            return False
        return item is None or item["status"] == "begun"

    def begin(self, name: str) -> None:
        """Notes that it is begun, should the process end in it."""
        self._put(name, {"status": "begun", "tries": self.items.get(name, {}).get("tries", 0) + 1})

    def unfinished(self, name: str) -> None:
        """Notes that it has stopped in good time, and goes on where it stopped."""
        self._put(name, {"status": "begun", "tries": 0})

    def end(self, name: str, rows: list[dict[str, Any]], seconds: float) -> None:
        """Keeps what was found."""
        self._put(name, {"status": "done", "seconds": round(seconds, 1), "rows": rows})

    def fail(self, name: str, why: str, seconds: float) -> None:
        """Keeps that it failed."""
        self._put(name, {"status": "failed", "seconds": round(seconds, 1), "why": why})

    def retry(self) -> None:
        """Forgets what failed."""
        self.document["items"] = {name: item for name, item in self.items.items() if item["status"] != "failed"}

    def _put(self, name: str, item: dict[str, Any]) -> None:
        self.items[name] = item
        write_atomically(self.path, (json.dumps(self.document, indent=1) + "\n").encode())


def measure(todo: Iterable[Item], ledger: Ledger, seconds: float | None) -> bool:
    """Makes the measurements that are left, until the time is up; returns whether none is left."""
    start = time.monotonic()
    for item in todo:
        if not ledger.open(item.name):
            continue
        left = float("inf") if seconds is None else seconds - (time.monotonic() - start)
        if left < item.needs:
            print(f"{item.name}: not enough time left; the same command goes on with it")
            return False
        print(f"{item.name} …", flush=True)
        ledger.begin(item.name)
        begun = time.monotonic()
        try:
            rows = item.measure(left)
        except Unfinished:
            ledger.unfinished(item.name)
            return False
        except Exception as error:  # the other measurements are made all the same
            traceback.print_exc()
            ledger.fail(item.name, f"{type(error).__name__}: {error}"[:2000], time.monotonic() - begun)
            continue
        ledger.end(item.name, rows, time.monotonic() - begun)
        for row in rows[-12:]:
            print("   ", json.dumps(row), flush=True)
    return True


def picture(ledger: Ledger, path: Path) -> None:
    """Step times and the training curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, curve = figure.subplots(1, 2)
    rows = [row for name, item in ledger.items.items() if name.startswith("steps") for row in item.get("rows", [])]
    labels = [f"{row['side']} {row['variant']}, {row['batch']}" for row in rows]
    bars.barh(labels, [row["ms"] for row in rows])
    bars.set(xlabel="milliseconds a step", title=str(ledger.document["about"]["name"]))
    bars.invert_yaxis()
    rows = ledger.items.get("training", {}).get("rows", [])
    curve.plot([row["seconds"] for row in rows], [row["bits"] for row in rows], marker=".")
    curve.set(xlabel="seconds of training", ylabel="validation, bits/dim")
    figure.savefig(path, dpi=120)


def about(setup: Setup) -> dict[str, Any]:
    """The machine, and the size of what is measured."""
    device, cuda = setup.device, setup.device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if cuda else f"{device} (no GPU: a trial of the command)",
        "memory_GiB": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "versions": versions(Config().override({"engine": "torch"})),
        "tiny": setup.tiny,
        "minutes": setup.minutes,
    }


def main(argv: list[str] | None = None) -> int:
    """Measures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default cuda)")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder to write to (default gpu)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training on MNIST (default 8)")
    parser.add_argument("--seconds", type=float, help="stop in good time before so long")
    parser.add_argument("--data", type=Path, help="folder that holds MNIST/raw (default: $PYRNODE_DATA)")
    parser.add_argument("--retry", action="store_true", help="make again what failed")
    parser.add_argument("--tiny", action="store_true", help="in small, to try the command")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    setup = Setup(device, args.out, args.minutes, args.tiny, args.data)
    ledger = Ledger(args.out / "gpu.json", about(setup))
    if args.retry:
        ledger.retry()
    done = measure((item for part in args.parts for item in items(part, setup)), ledger, args.seconds)
    picture(ledger, args.out / "gpu.png")
    failed = [name for name, item in ledger.items.items() if item["status"] == "failed"]
    print(f"{args.out / 'gpu.json'}: {len(ledger.items)} measurements, failed: {', '.join(failed) or 'none'}")
    return (1 if failed else 0) if done else LEFT


if __name__ == "__main__":
    sys.exit(main())
