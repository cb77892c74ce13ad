"""Julia without Python's engine, as programs of their own: a GPU's restrictions, and a layer trained natively."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

import pyrnode
from pyrnode import Config, Flow, julia_setup

pytestmark = [pytest.mark.needs_julia, pytest.mark.slow]


def run(script: str, *arguments: str, threads: int = 1, trace: Path | None = None) -> dict[str, float]:
    """What a script of ``tests/julia`` prints, as a number by name; `trace` is where Julia names what it compiles."""
    status = julia_setup.status()
    command = [str(status.executable), f"--project={status.project}", "--startup-file=no", f"--threads={threads}"]
    command += [] if trace is None else [f"--trace-compile={trace}"]
    path = Path(__file__).parent / "julia" / script
    variables = os.environ | {"TRACE": str(trace)}
    done = subprocess.run([*command, str(path), *arguments], env=variables, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[:4000]
    pairs = (line.split() for line in done.stdout.splitlines() if line)
    return {name: float(value) for name, value in pairs}


def test_gpu_arrays() -> None:
    """Arrays that forbid scalar indexing give what plain ones do, forward and backward."""
    if "JLArrays" not in (Path(str(julia_setup.status().project)) / "Project.toml").read_text(encoding="utf-8"):
        pytest.skip("JLArrays, which stands for a GPU, is not in the Julia project")
    errors = run("gpu_arrays.jl")
    assert len(errors) == 18
    assert max(errors.values()) < 1e-10


def test_package_image(tmp_path: Path) -> None:
    """It can be loaded, and the default adjoint, whose compilation takes ten seconds and more, is in it."""
    found = run("image.jl", trace=tmp_path / "compiled.txt")
    assert found["image"] == 0
    assert found["default"] == 0
    assert found["other"] > 0  # so that it would be seen


def test_native_potential() -> None:
    found = run("potential.jl")
    assert found["f"] < 1e-12  # against Zygote's gradient of the potential
    assert found["products"] < 1e-6  # central differences of that
    assert found["residual"] < 1e-8
    assert found["exact"] < 1e-12  # closed form against the products along the unit vectors
    assert found["default"] == 1
    assert found["start"] < 1e-4
    assert found["layer"] < 1e-14
    assert found["gradient"] < 1e-7
    assert found["trained"] < -0.5
    assert found["refused"] == 1


def test_native_layer() -> None:
    found = run("native.jl", threads=2)
    assert found["threads"] == 2
    assert found["layer"] < 1e-14  # its density is that of `integrate`
    assert found["gradient"] < 1e-7  # against central differences
    assert found["trained"] < -0.5
    assert found["generated"] < 1e-3
    for sensealg in ("Backprop", "InterpolatingAdjoint"):
        assert found[f"lux-{sensealg}"] < 1e-13
        assert found[f"lux-gradient-{sensealg}"] < 1e-12
        for batch in (97, 6500):
            assert found[f"pieces-{sensealg}-{batch}"] < 1e-12
    assert found["products"] < 50  # roundings
    assert found["convolutions"] < 50
    assert found["memory"] == 1
    assert found["memory-error"] < 1e-13
    assert found["stable"] == 1
    # One hidden layer's array alone has 131,072 bytes.
    assert found["bytes"] < 8_000


NETWORKS = {
    "mlp": {"kind": "mlp", "hidden": [8, 8], "activation": "tanh"},
    "squashed": {"kind": "mlp", "hidden": [8], "activation": "softplus", "time": "concatsquash"},
    "potential": {"kind": "potential", "hidden": [6, 6], "activation": "logcosh", "rank": 2},
    "table": {"kind": "mlp", "hidden": [8, 8], "activation": "tanh"},
    "tails": {"kind": "mlp", "hidden": [8], "activation": "tanh"},
    "plain": {"kind": "mlp", "hidden": [8], "activation": "tanh"},
}
STANDARDIZED = {"table": "auto", "tails": "radial", "plain": "none"}
"""Of these networks, and all others are whitened."""


def flow(name: str) -> Flow:
    """A flow of two blocks in double precision, with transforms of the data, and parameters that are not small."""
    standardize = STANDARDIZED.get(name, "whiten")
    settings = {"network": NETWORKS[name], "blocks": 2, "end_time": 1.5, "standardize": standardize}
    solver = {"name": "RK4", "step_size": 1 / 16}
    config = {"dtype": "float64", "engine": "torch", "flow": settings, "evaluation": {"solver": solver}}
    found, generator = Flow.build(Config.from_dict(config), (3,)), torch.Generator().manual_seed(1)
    tensors = {
        key: 0.4 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for key, x in found.state_dict().items()
    }
    edges = {"low": [-1.0, 0.5, 0.0], "high": [1.5, 0.0, 1.0], "width": [2.5, 2.0, 3.0]}
    edges |= {"soft_low": [0.01, 0.02, 0.0], "soft_high": [0.03, 0.0, 0.01]}
    for key, x in tensors.items():
        last = key.rpartition(".")[2]
        if last in edges:
            tensors[key] = torch.tensor(edges[last], dtype=torch.float64)
        elif last in ("std", "scale", "curvature"):
            tensors[key] = x.exp()
        elif last == "rotation":
            tensors[key] = torch.linalg.qr(x)[0]
    found.load_state_dict(tensors)
    return found


def test_files_cross_both_ways(tmp_path: Path) -> None:
    """Python's file gives the same log-densities in Julia, and Julia's the same in Python."""
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = {}
    for name in NETWORKS:
        written = flow(name)
        written.save(tmp_path / f"{name}.safetensors")
        expected[name] = written.log_prob(x).detach()
        (tmp_path / f"{name}.x").write_bytes(x.numpy().tobytes())
        (tmp_path / f"{name}.p").write_bytes(expected[name].numpy().tobytes())
    between = Flow.build(Config().override({"bounds": {"0": (0, 1)}}), (2,))
    between.save(tmp_path / "refused.safetensors")
    found = run("files.jl", str(tmp_path))
    assert found.keys() == NETWORKS.keys() | {"refused"}
    assert max(found.values()) < 1e-10
    for name, values in expected.items():
        back = pyrnode.load(tmp_path / f"{name}.back", engine="torch")
        assert back.config.flow == flow(name).config.flow
        assert float((back.log_prob(x).detach() - values).abs().max()) < 1e-12
