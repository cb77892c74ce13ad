"""Numbers that a change of structure must not change: training, scores, samples and files.

They were made before the structure changed (commit 2343fd7), and came out the same bit for bit after it. Since then
data are centred in double precision: what is trained on float32 tables moved by up to 6e-7, relatively, and estimates
with probes have other noise (that of a sample's value, whatever its type). Since adaptive solves take other steps, what
they give moved by up to 4e-6, relatively, and their evaluations are fewer. Since a kernel of its own trains images, its
sums are in another order, and what comes of it (weights, history, scores, files) moved by up to 6e-8, relatively.

On the machine that made them (its processor, its torch, its compiler) they are compared bit for bit; elsewhere
libraries sum in another order, and the sums of the numbers are compared, to the rounding of a short training run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pyrnode
from pyrnode import Config, Divergence, native

KEPT: dict[str, Any] = json.loads(Path(__file__).with_name("unchanged.json").read_text())

COMMON = {"engine": "torch", "device": "cpu", "step_size": 0.25}
WEIGHTS = {"kinetic": 0.001, "jacobian": 0.001}
"""Penalties that the preset of 2-D densities had when these numbers were kept."""


def machine() -> str:
    """What the bits of a result depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    return " / ".join((model, capability, torch.__version__, np.__version__, str(native.compiler())))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With more threads sums are taken in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(name: str, *values: Any) -> None:
    """Compares with what is kept under that name: the digest on the same machine, sums of the values elsewhere."""
    arrays = [np.ascontiguousarray(v.detach().numpy() if isinstance(v, Tensor) else v) for v in values]
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]
    sums = [float(np.asarray(a, dtype=np.float64).sum()) for a in arrays]
    found = {"digest": digest, "sums": sums}
    if machine() == KEPT["machine"]:
        assert found["digest"] == KEPT["numbers"][name]["digest"], name
    assert sums == pytest.approx(KEPT["numbers"][name]["sums"], rel=1e-4, abs=1e-4), name


def numbers(history: list[dict[str, Any]]) -> Any:
    """The numbers of a history, but for its times."""
    return np.array(
        [v for r in history for k, v in sorted(r.items()) if isinstance(v, (int, float)) and k != "seconds"]
    )


def scores(report: pyrnode.Report) -> Any:
    """The numbers of a report, but for its time."""
    found: list[float] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                walk(value[key])
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(float(value))

    walk({k: v for k, v in report.to_dict().items() if k not in ("seconds", "notes")})
    return np.array(found)


def test_a_table() -> None:
    settings = {
        **COMMON,
        **WEIGHTS,
        "samples": 800,
        "max_steps": 30,
        "hidden": [16, 16],
        "validate_every": 10,
        "seed": 1,
    }
    result = pyrnode.train("moons", progress=False, **settings)
    flow = result.flow
    x = flow.sample(7, seed=3)
    check("moons.weights", *flow.state_dict().values())
    check("moons.history", numbers(result.history))
    assert result.report is not None
    check("moons.report", scores(result.report))
    check("moons.sample", x)
    check("moons.logp", flow.log_prob(x))
    x = (64 * x).round() / 64  # noise belongs to the sample, to its last bit, which depends on the machine
    check("moons.err16", *flow.log_prob(x, divergence=Divergence("hutchinson", 4, 1), return_error=True))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dp5", {"solver.name": "DP5"}),
        ("store", {"solver.memory": "store"}),
        ("checkpoint", {"solver.memory": "checkpoint"}),
        ("backsolve", {"solver.sensealg": "BacksolveAdjoint"}),
        (
            "rnode",
            {"convention": "ffjord-rnode", "total_derivative": 0.01, "penalties.probes": 2, "noise": "rademacher"},
        ),
        (
            "ema",
            {
                "ema": 0.9,
                "clip_norm": 0.5,
                "schedule": "cosine",
                "warmup_steps": 3,
                "dtype": "float64",
                "flow.blocks": 2,
                "time": "concatsquash",
            },
        ),
    ],
)
def test_ways_of_training(name: str, settings: dict[str, Any]) -> None:
    small = {**COMMON, **WEIGHTS, "samples": 800, "max_steps": 8, "hidden": [16, 16]}
    small |= {"validate_every": 4, "batch_size": 50}
    result = pyrnode.train("pinwheel", evaluate=False, progress=False, **small | settings)
    check(f"pinwheel.{name}", *result.flow.state_dict().values())
    check(f"pinwheel.{name}.history", numbers(result.history))


def test_images_and_their_files(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    settings = {
        **COMMON,
        "max_steps": 6,
        "hidden": [8, 8],
        "batch_size": 20,
        "validate_every": 3,
        "flip": True,
        "step_size": 0.5,
    }
    settings |= {"validation_limit": 40, "test_limit": 30, "draws": 2, "checkpoint_every": 3}
    result = pyrnode.train("digits", preset="digits", out=out, progress=False, **settings)
    flow, pixels = result.flow, pyrnode.data.load("digits").test.tensor()
    check("digits.weights", *flow.state_dict().values())
    check("digits.history", numbers(result.history))
    assert result.report is not None
    check("digits.report", scores(result.report))
    check("digits.logp", flow.log_prob(pixels[:12]))
    check("digits.encode", flow.encode(pixels[:12]))
    check("digits.sample", flow.sample(3, seed=2))
    for name in ("model", "checkpoint"):
        check(f"digits.file.{name}", *[value for _, value in sorted(load_file(out / f"{name}.safetensors").items())])
    np.save(tmp_path / "x.npy", pixels[:40].numpy())
    calibration = pyrnode.calibrate(flow, pixels[40:70])
    pyrnode.score_file(flow, tmp_path / "x.npy", tmp_path / "scores.csv", calibration=calibration, chunk=7)
    check("digits.scores", np.loadtxt(tmp_path / "scores.csv", delimiter=",", skiprows=1))


def test_conditional() -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(300, 2, generator=generator) * 5
    x = torch.cat((c, 1 - c), 1)[:, 1:] + 0.1 * torch.randn(300, 3, generator=generator)
    settings = {**COMMON, "max_steps": 12, "hidden": [8], "batch_size": 40, "validate_every": 6}
    settings |= {"solver.memory": "store", "evaluation.solver.memory": "checkpoint"}  # kernels had no contexts then
    result = pyrnode.train(x, context=c, preset=Config(), progress=False, **settings)
    check("cond.weights", *result.flow.state_dict().values())
    check("cond.history", numbers(result.history))
    check("cond.logp", result.flow.log_prob(x[:9], c[:9]))
    check("cond.sample", result.flow.sample(3, c[:2], seed=0))
