"""Short runs of training, and what is asked of them, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyrnode
from pyrnode import files
from pyrnode.config import Config
from pyrnode.data import load
from pyrnode.runs import RunFolder, read_metrics
from pyrnode.training import TrainingResult
from pyrnode.training.trainer import Trainer

SMALL: dict[str, Any] = {"flow.network.hidden": [8], "data.samples": 200, "batch_size": 20, "validate_every": 4}
SMALL |= {"warmup_steps": 0, "schedule": "constant", "step_size": 0.25}
# 160 training samples: 8 steps an epoch. Noise in the loss, the averaged weights and the schedule are all in use.
FULL = SMALL | {"max_steps": 24, "penalties.divergence": "hutchinson", "ema": 0.9, "schedule": "cosine"}
FULL |= {"warmup_steps": 3, "checkpoint_every": 3, "clip_norm": 1.0, "learning_rate": 0.01}


def train(
    out: Path | None = None, *, data: Any = "8gaussians", resume: bool = False, **settings: Any
) -> TrainingResult:
    overrides = {**SMALL, "max_steps": 10, **settings}
    return pyrnode.train(data, out=out, resume=resume, **overrides, evaluate=False, progress=False)


def trainer(data: Any = "8gaussians", folder: RunFolder | None = None, **settings: Any) -> Trainer:
    config = Config.preset("toy").override({"data.name": "8gaussians", **SMALL, "max_steps": 10, **settings})
    return Trainer(config, load(data, config=config.data), folder, progress=False)


def steps(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in history if "loss" in record]


def validations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in history if "validation" in record]


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


def assert_same_run(a: Path, b: Path) -> None:
    """Parameters, optimiser, averages, best model, counters and metrics, bit for bit; all but the seconds."""
    x, about_x = files.read(a / "checkpoint.safetensors", "checkpoint")
    y, about_y = files.read(b / "checkpoint.safetensors", "checkpoint")
    assert x.keys() == y.keys()
    assert any(name.startswith("optimizer.") for name in x)
    for name in x:
        assert torch.equal(x[name], y[name]), name
    for about in (about_x, about_y):
        for name in ("seconds", "elapsed"):
            about["progress"].pop(name)
    assert about_x == about_y
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert without_seconds(read_metrics(a)) == without_seconds(read_metrics(b))
    assert [path.name for path in b.iterdir() if path.name.startswith(".")] == []
