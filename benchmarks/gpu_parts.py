"""The measurements of `benchmarks.gpu`: each an `Item` with a name, which gives rows of numbers.

What they are compared with is the CPU in double precision (parity), the number of waits that is meant (waits), and the
standard construction in the same run, in IEEE float32 and with torch's own default, TF32 in convolutions (steps).
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import pyrnode
from benchmarks import clock
from pyrnode.config import Config, SolverConfig
from pyrnode.data import Splits, TensorSamples
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.precision import own_precision
from pyrnode.probes import Probes
from pyrnode.training.trainer import Trainer

Row = dict[str, Any]

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far a gradient may be from the CPU's in double precision, relatively."""

SOLVERS = {
    "auto": SolverConfig(name="RK4"),  # of small perceptrons by a kernel
    "checkpoint": SolverConfig(name="RK4", memory="checkpoint"),
    "store": SolverConfig(name="RK4", memory="store"),
    "adaptive": SolverConfig(name="DP5", rtol=1e-5, atol=1e-5),
    "backsolve": SolverConfig(name="DP5", rtol=1e-6, atol=1e-6, sensealg="BacksolveAdjoint"),
}


VARIANTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "ieee": {"solver.precision": "ieee"},
    "no graphs": {"solver.precision": "ieee", "solver.graphs": False},
    "checkpoint": {"solver.precision": "ieee", "solver.memory": "checkpoint"},
    "tf32": {"solver.precision": "tf32"},
    "bf16": {"solver.precision": "bf16"},
}
"""What a step is timed with."""

_RECORDED = 4
"""Steps until one is by graphs alone."""


class Unfinished(Exception):
    """A measurement has stopped in good time; it goes on where it stopped."""


@dataclass(frozen=True)
class Setup:
    """What is measured, and how much of it."""

    device: torch.device
    out: Path
    minutes: float
    tiny: bool
    data: Path | None = None


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        name: ``part`` or ``part: what``.
        needs: Seconds that it is not begun without.
        measure: Makes it, given the seconds that are left.
    """

    name: str
    needs: float
    measure: Callable[[float], list[Row]]


def items(part: str, setup: Setup) -> Iterator[Item]:
    """The measurements of a part, in their order."""
    for name, needs, measure in PARTS[part](setup):
        yield Item(part if not name else f"{part}: {name}", 0.0 if setup.tiny else needs, measure)


Planned = Iterator[tuple[str, float, Callable[[float], list[Row]]]]


def _whenever(measure: Callable[..., list[Row]], *args: Any) -> Callable[[float], list[Row]]:
    """A measurement that is the same however many seconds are left."""
    return lambda left: measure(*args)


# -- the tests -------------------------------------------------------------------------------------------------------


def tests(setup: Setup) -> Planned:
    """The project's own tests of a device, on this one."""

    def run(left: float) -> list[Row]:
        if importlib.util.find_spec("pytest") is None:
            return [{"skipped": "pytest is not installed"}]
        root = Path(__file__).parent.parent
        command = [sys.executable, "-m", "pytest", "tests/test_device.py", "--device", str(setup.device), "-q"]
        command += ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]  # whatever plugins there are
        command += ["-k", "table and numbers"] if setup.tiny else []
        limit = None if left == float("inf") else left
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit)
        (setup.out / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"pytest: {done.stdout[-1500:]}{done.stderr[-300:]}")
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|deselected)", done.stdout)}
        return [dict(counts)]

    yield "", 120, run


# -- parity ----------------------------------------------------------------------------------------------------------


def _flows(tiny: bool) -> dict[str, tuple[Config, tuple[int, ...]]]:
    base = Config().override({"engine": "torch", "device": "cpu", "standardize": "none"})
    width = 8 if tiny else 64
    side = 8 if tiny else 28
    gates = {"time": "concatsquash", "activation": "tanh"}
    return {
        "mlp": (base.override({"hidden": (width, width, width)}), (6,)),
        "gates": (base.override({"hidden": (width, width), **gates}), (6,)),
        "conv": (base.override({"hidden": (width, width), "blocks": 1, "scales": 2}), (1, side, side)),
    }


def perturbed(flow: Flow) -> Flow:
    """The flow with numbers in its zero-initialised layers, as a few steps of training leave them."""
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p))
    return flow


def _gradient(flow: Flow, x: Tensor, eps: list[Tensor], solver: SolverConfig) -> tuple[Tensor, float]:
    """Gradient and loss, with given probes, on the CPU in double precision."""
    given = iter(eps)
    passage = flow.solve(x, lambda z: Probes(next(given).to(z), 1.0), solver)
    loss = objective(passage, flow.config.penalties).loss
    bars = torch.autograd.grad(loss, list(flow.parameters()))
    return torch.cat([bar.reshape(-1).cpu().double() for bar in bars]), float(loss.detach())


def parity(setup: Setup) -> Planned:
    """Gradients and every use beside the CPU's."""
    for name, (config, shape) in _flows(setup.tiny).items():
        yield f"gradients of {name}", 60, _whenever(_gradients, setup, config, shape)
        yield f"uses of {name}", 60, _whenever(_uses, setup, config, shape)


def _gradients(setup: Setup, config: Config, shape: tuple[int, ...]) -> list[Row]:
    rows, generator = list[Row](), torch.Generator("cpu").manual_seed(0)
    exact = perturbed(Flow.build(config.override({"dtype": "float64"}), shape))
    x = torch.randn(4, *shape, generator=generator, dtype=torch.float64, device="cpu")
    events = [block.dynamics.event_shape for block in exact.blocks]
    eps = [torch.randn(1, 4, *e, generator=generator, dtype=torch.float64, device="cpu") for e in events]
    for label, solver in SOLVERS.items():
        wanted, loss = _gradient(exact, x, eps, solver)
        for dtype, most in TOLERANCES.items():
            flow = copy.deepcopy(exact).to(setup.device, dtype)
            for _ in range(_RECORDED):  # the last one by graphs, where there are some
                found, value = _gradient(flow, x.to(setup.device, dtype), eps, solver)
            error = float((found - wanted).norm() / wanted.norm())
            row = {"solver": label, "dtype": str(dtype)[6:], "gradient": error, "loss": abs(value - loss)}
            rows.append(row | {"ok": error <= most})
    return rows


def _uses(setup: Setup, config: Config, shape: tuple[int, ...]) -> list[Row]:
    here = perturbed(Flow.build(config, shape))
    there = copy.deepcopy(here).to(setup.device)
    x = torch.randn(4, *shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    calls: dict[str, Callable[[Flow], Tensor]] = {
        "log_prob": lambda flow: flow.log_prob(x, divergence="hutchinson"),
        "encode": lambda flow: flow.encode(x),
        "sample": lambda flow: flow.sample(4, seed=0),
        "distribution": lambda flow: flow.distribution(divergence="hutchinson").log_prob(x.to(flow.reference)),
        "to_torch": lambda flow: flow.to_torch(divergence="hutchinson").log_prob(x.to(flow.reference)),
    }
    rows = list[Row]()
    for name, call in calls.items():
        with torch.no_grad():
            wanted, found = call(here), call(there).cpu()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        rows.append({"use": name, "differs": error, "ok": error <= 1e-3})
    return rows


# -- waits -----------------------------------------------------------------------------------------------------------


def _mnist(setup: Setup, batch: int, **more: Any) -> Trainer:
    """Training of the paper's MNIST network, on noise."""
    small = {"hidden": (4, 4), "scales": 2} if setup.tiny else {}
    config = Config.preset("finlay2020-mnist").override(
        {"engine": "torch", "device": str(setup.device), "batch_size": batch, **small, **more}
    )
    side, generator = (8 if setup.tiny else 28), torch.Generator("cpu").manual_seed(0)
    shape = (3 * batch, 1, side, side)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu")
    noise = TensorSamples(pixels)
    return Trainer(config, Splits("noise", noise, noise, noise, shape[1:], 256), None, progress=False)


def waits(setup: Setup) -> Planned:
    """Where a training step waits for the GPU, as torch itself sees it, and how many launches it is."""

    def look(graphs: str | bool) -> list[Row]:
        trainer = _mnist(setup, 2 if setup.tiny else 200, **{"solver.graphs": graphs})
        batches, places = trainer._batches(), dict[str, int]()
        for _ in range(1 if setup.tiny else _RECORDED):
            trainer._step(next(batches))
        batch, cuda = next(batches), setup.device.type == "cuda"
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
            trainer._step(batch)
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
        for warning in seen:
            place = f"{warning.filename.rpartition('pyrnode/')[2]}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
        rows: list[Row] = [{"place": place, "waits": count} for place, count in places.items()]
        kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
        with torch.profiler.profile(activities=kinds) as profile:
            trainer._step(batch)
            clock.synchronize(setup.device)
        events = profile.key_averages()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        name = "profile-graphs.txt" if graphs else "profile.txt"
        (setup.out / name).write_text(events.table(sort_by=order, row_limit=60), encoding="utf-8")
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        replays = sum(event.count for event in events if "GraphLaunch" in event.key)
        found = {"waits": len(seen), "launches": launches, "graphs": replays}
        return [*rows, found | {"ok": not cuda or len(seen) <= 1}]

    for graphs in ("auto", False):
        yield "by graphs" if graphs else "without graphs", 90, _whenever(look, graphs)


# -- steps -----------------------------------------------------------------------------------------------------------


def steps(setup: Setup) -> Planned:
    """Time and memory of a training step beside the standard construction's."""
    for batch in (2,) if setup.tiny else (32, 200):
        for variant in VARIANTS:
            yield f"pyrnode {variant}, batch {batch}", 60, _whenever(_pyrnode, setup, batch, variant)
        for side in ("adjoint", "backprop"):
            yield f"{side}, batch {batch}", 60, _whenever(_standard, setup, batch, side)


def _step_row(setup: Setup, step: clock.Step, side: str, variant: str, batch: int) -> Row:
    step()
    peak = clock.device_mib(step, setup.device) if setup.device.type == "cuda" else None
    ms = clock.median(step, setup.device, steps=1 if setup.tiny else 7, warm=0 if setup.tiny else 1)
    return {"side": side, "variant": variant, "batch": batch, "ms": round(ms, 2), "peak_MiB": peak and round(peak)}


def _pyrnode(setup: Setup, batch: int, variant: str) -> list[Row]:
    trainer = _mnist(setup, batch, **VARIANTS[variant])
    fed = next(trainer._batches())
    for _ in range(0 if setup.tiny else _RECORDED):
        trainer._step(fed)
    return [_step_row(setup, lambda: trainer._step(fed), "pyrnode", variant, batch)]


def _standard(setup: Setup, batch: int, gradients: Literal["adjoint", "backprop"]) -> list[Row]:
    if importlib.util.find_spec("torchdiffeq") is None:
        return [{"side": gradients, "variant": "not installed", "batch": batch, "ms": 0.0}]
    from benchmarks.reference import ReferenceImageFlow

    size: dict[str, Any] = {"height": 8, "width": 8, "scales": 2, "hidden": (4, 4)} if setup.tiny else {}
    flow: Any = ReferenceImageFlow(gradients=gradients, step_size=0.25, **size).to(setup.device)
    side = 8 if setup.tiny else 28
    x = torch.randn(batch, 1, side, side, dtype=torch.float32, device=setup.device)
    optimizer = torch.optim.Adam(flow.parameters())

    def step() -> None:
        optimizer.zero_grad()
        flow.loss(x).backward()
        optimizer.step()

    with own_precision(x):
        rows = [_step_row(setup, step, gradients, "ieee", batch)]
    return [*rows, _step_row(setup, step, gradients, "torch's default", batch)]


# -- training --------------------------------------------------------------------------------------------------------


def training(setup: Setup) -> Planned:
    """Real MNIST for some minutes: validation in bits per dimension against seconds."""

    def train(left: float) -> list[Row]:
        settings: dict[str, Any] = {"minutes": setup.minutes, "epochs": None, "device": str(setup.device)}
        settings |= {"warmup_steps": 300, "validate_every": 270, "validation_limit": 1000, "checkpoint_minutes": 0.5}
        if setup.data is not None:
            settings["data.dir"] = str(setup.data)
        name, preset = "mnist", "finlay2020-mnist"
        if setup.tiny:
            name, preset = "digits", "digits"
            settings |= {"hidden": (4, 4), "max_steps": 4, "validate_every": 2, "validation_limit": 20}
        alarm = threading.Timer(left - 20, os.kill, (os.getpid(), signal.SIGINT))  # as Ctrl-C: it saves, and ends
        if left < float("inf"):
            alarm.start()
        try:
            out = setup.out / "training"
            run = pyrnode.train(
                name, preset=preset, out=out, resume=True, engine="torch", evaluate=False, progress=False, **settings
            )
        finally:
            alarm.cancel()
        if run.interrupted:
            raise Unfinished
        records = [r for r in run.history if "validation_bits" in r]
        return [
            {key: r[name] for key, name in (("step", "step"), ("seconds", "seconds"), ("bits", "validation_bits"))}
            for r in records
        ]

    yield "", 60, train


PARTS: dict[str, Callable[[Setup], Planned]] = {
    "parity": parity,
    "waits": waits,
    "steps": steps,
    "training": training,
    "tests": tests,
}
"""In the order of what is to be known first."""
