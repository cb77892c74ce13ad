"""``pyrnode demo``: the main job on real data that ships with scikit-learn, and a density whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyrnode import distributed
from pyrnode.training import train

_RUNS = (("digits", "digits"), ("8gaussians", "toy"))


def demo(out: str | Path, *, device: str | None = None, progress: bool = True) -> int:
    """Trains on ``digits`` and on ``8gaussians``, prints the comparisons, and writes the pictures.

    A run that is already complete in `out` is only evaluated again.

    Args:
        out: Folder to write to.
        device: torch device to compute on, or ``"auto"``; default that of the presets.
        progress: Show progress bars.

    Returns:
        An exit code.
    """
    settings: dict[str, Any] = {} if device is None else {"device": device}
    for data, preset in _RUNS:
        folder = Path(out) / data
        if distributed.world().first:
            print(f"== {data} (preset {preset}) → {folder}", flush=True)
        result = train(data, preset=preset, out=folder, resume=True, progress=progress, **settings)
        if result.interrupted:
            return 130
        if not distributed.world().first:
            continue
        print(result.report)
        pictures = sorted(path.name for path in folder.glob("*.png"))
        print(f"pictures in {folder}: {', '.join(pictures)}\n", flush=True)
    return 0
