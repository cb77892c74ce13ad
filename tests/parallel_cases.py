"""Runs that one process and several must end alike; as a script, one of several processes that go through all of them.

    python -m tests.parallel_cases RANK SIZE FOLDER [ENGINE CASE …]

Each process writes what it found to ``FOLDER/rank{RANK}.json``, by case. All cases share one process group, since a
process that imports torch costs seconds. The last one kills the last process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import distributed, doctor, evaluation, files
from pyrnode.cli import main
from pyrnode.data import Splits, load, mapped
from pyrnode.errors import DataError, ProcessError, PyrnodeError, SolverError
from pyrnode.paper.scales import SCALES
from pyrnode.runs import RunFolder
from pyrnode.training import TrainingResult
from pyrnode.training import trainer as loop
from tests.networks import convolutional
from tests.small_runs import FULL

Found = dict[str, Any]

COMMON: dict[str, Any] = {"engine": "torch", "device": "cpu", "dtype": "float64", "flow.network.hidden": [8], "seed": 3}
COMMON |= {"evaluation.chunk": 7, "training.warmup_steps": 0}


def rank() -> int:
    return distributed.present().rank


def last() -> bool:
    """Whether this is the last process: of one, the only one."""
    return rank() == distributed.present().size - 1


RECORDED = ("step", "nll", "E", "n", "nfe", "nfe_backward", "grad_norm", "learning_rate")


def numbers(result: TrainingResult) -> Found:
    """What is compared of a run."""
    history, weights = result.history, list(result.flow.state_dict().values())
    return {
        "losses": [r["loss"] for r in history if "loss" in r],
        "steps": [[r[key] for key in RECORDED] for r in history if "loss" in r],
        "validation": [r["validation"] for r in history if "validation" in r],
        "disagreement": [r["disagreement"] for r in history if "disagreement" in r],
        "events": [[r["step"], r["event"]] for r in history if "event" in r],
        "weights": [float(w.double().norm()) for w in weights],
        "bits": [w.double().flatten()[:4].tolist() for w in weights],  # of all processes the same
        "interrupted": result.interrupted,
    }


def train(data: Any, out: Path | None = None, **settings: Any) -> TrainingResult:
    settings = {**COMMON, **settings}
    return pyrnode.train(data, out=out, preset=pyrnode.Config(), evaluate=False, progress=False, **settings)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted() -> Splits:
    """A table with contexts and weights, whose parts do not divide by two or three."""
    splits = load(random(200, 2) * torch.tensor([1.0, 3.0]), context=random(200, 1, seed=1))
    train = splits.train.carrying(context=splits.train.context, weight=random(len(splits.train), seed=2).exp())
    validation = splits.validation
    validation = validation.carrying(context=validation.context, weight=random(len(validation), seed=4).exp())
    return replace(splits, train=train, validation=validation)


def images() -> Tensor:
    return torch.randint(0, 17, (120, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# -- runs ------------------------------------------------------------------------------------------------------------


def table(out: Path) -> Found:
    settings = {"batch_size": 31, "max_steps": 50, "validate_every": 10, "ema": 0.9, "clip_norm": 0.3}
    settings |= {"schedule": "cosine", "learning_rate": 0.02, "step_size": 0.5, "solver": "RK4", "snapshots": True}
    result = train(weighted(), out / "table", **settings)
    report = pyrnode.evaluate(result.flow, weighted(), baselines=False, world=distributed.world())
    return numbers(result) | {
        "snapshots": list(RunFolder(out / "table").snapshots()),
        "score": [report.score.nats, report.E, report.n, report.nfe, report.disagreement],
    }


def pictures(out: Path) -> Found:
    settings = {"network.kind": "conv", "hidden": [4], "scales": 1, "data.flip": True, "data.levels": 17}
    settings |= {"batch_size": 20, "max_steps": 50, "validate_every": 25, "solver": "auto", "noise": "rademacher"}
    result = train(images(), learning_rate=0.01, **settings)
    report = pyrnode.evaluate(result.flow, load(images(), config=result.config.data), world=distributed.world())
    assert report.bin_centre is not None
    found = evaluation.measure(result.flow, images()[:16], world=distributed.world())
    scores = [report.score.bits, report.bin_centre.bits, report.disagreement, found.score.bits, found.E, found.nfe]
    return numbers(result) | {"score": scores}


def held_out(out: Path) -> Found:
    """Validation rows of the user's own, which are shared out, too, and do not divide."""
    given = {"context": random(200, 1, seed=1), "validation": random(47, 2, seed=2)}
    settings = {"batch_size": 31, "max_steps": 20, "validate_every": 10, "step_size": 0.5, "solver": "RK4"}
    return numbers(train(random(200, 2), **given, validation_context=random(47, 1, seed=3), **settings))


def embedded(out: Path) -> Found:
    """Images as contexts, through a network that is trained with the flow."""
    settings = {"batch_size": 31, "max_steps": 20, "validate_every": 10, "step_size": 0.5, "solver": "RK4"}
    settings |= {"clip_norm": 0.3, "ema": 0.9, "weight_decay": 0.1, "learning_rate": 0.02}
    return numbers(train(random(200, 2), context=random(200, 1, 6, 6, seed=1), embedding=convolutional, **settings))


def mapped_file(out: Path) -> Found:
    """A table that is too large to be read as a whole, and one that is not, of the same numbers."""
    x = random(300, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 20.0]], dtype=torch.float64)
    if distributed.present().first:
        np.save(out / "table.npy", x.numpy())
    distributed.world().once(lambda: None)
    settings = {"batch_size": 31, "max_steps": 20, "validate_every": 10, "standardize": "whiten", "solver": "RK4"}
    before, mapped.LARGE, mapped._PIECE = (mapped.LARGE, mapped._PIECE), 1000, 1000
    try:
        there = train(out / "table.npy", step_size=0.5, **settings)
    finally:
        mapped.LARGE, mapped._PIECE = before
    here = train(out / "table.npy", step_size=0.5, **settings)
    assert numbers(there)["losses"] == pytest.approx(numbers(here)["losses"], rel=1e-9)
    return numbers(there)


def ladder(out: Path) -> Found:
    """A rate at which one step a block is soon wrong, and patience that soon ends."""
    settings = {"batch_size": 32, "max_steps": 200, "validate_every": 20, "solver": "auto", "learning_rate": 0.05}
    settings |= {"kinetic": 0, "jacobian": 0, "patience": 2, "tolerance": 1e-4, "penalties.divergence": "exact"}
    return numbers(train("moons", samples=200, **settings))


def failure(out: Path) -> Found:
    """A solve that fails in one process, once."""
    failed: list[int] = []
    original = loop.loss

    def loss(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        if at == 7 and last() and not failed:
            failed.append(at)
            raise SolverError("made to fail", status="Unstable")
        return original(flow, batch, config, solver, at)

    loop.loss = loss
    try:
        settings = {"batch_size": 20, "max_steps": 12, "validate_every": 6, "checkpoint_every": 3, "step_size": 0.5}
        result = train("8gaussians", samples=200, solver="RK4", **settings)
    finally:
        loop.loss = original
    causes = [r["cause"].rpartition("made")[1:] for r in result.history if "cause" in r]
    return numbers(result) | {"causes": causes}


def not_finite(out: Path) -> Found:
    """A gradient that is not finite, in one process, at every attempt: all give up."""
    original = loop.loss

    def loss(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        result, passage = original(flow, batch, config, solver, at)
        result.loss = result.loss * (float("inf") if at == 2 and last() else 1)
        return result, passage

    loop.loss = loss
    try:
        train("8gaussians", samples=200, batch_size=20, max_steps=5, max_restarts=2, step_size=0.5, solver="RK4")
    except PyrnodeError as error:
        return {"raised": type(error).__name__, "gave up": "2 restarts" in str(error)}
    finally:
        loop.loss = original
    return {}


# -- what only several do --------------------------------------------------------------------------------------------


def command(out: Path) -> list[str]:
    settings = {key: f'"{value}"' if isinstance(value, str) else value for key, value in FULL.items()}
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train", "8gaussians", "--no-evaluation", "--quiet", *pairs, "--out", str(out)]


def whole(out: Path) -> Found:
    return {"codes": [main(command(out / "whole")), main(command(out / "whole"))]}  # the folder is in use


def stopped(out: Path, number: int) -> Found:
    """The command, told to end by a signal to the last process, and gone on with."""
    original, folder = loop.loss, out / f"stopped {number}"

    def loss(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        if at == 5 and last():
            os.kill(os.getpid(), number)
        return original(flow, batch, config, solver, at)

    loop.loss = loss
    try:
        code = main(command(folder))
    finally:
        loop.loss = original
    stored = distributed.world().once(lambda: files.read(folder / "checkpoint.safetensors", "checkpoint")[1])
    return {"codes": [code, main([*command(folder), "--resume"])], "step": stored["progress"]["step"]}


class Fails(pyrnode.Callback):
    """Keeps the steps that it is told of; fails at the fifth, and asks for the end at the ninth."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_start(self, run: pyrnode.TrainingRun) -> None:
        self.run = run

    def on_step(self, record: dict[str, Any]) -> None:
        self.steps.append(record["step"])
        if record["step"] == 5:
            raise ValueError("spoilt")
        if record["step"] == 9:
            self.run.stop()


def callback(out: Path) -> Found:
    """What a callback in the first process raises, and that it asks for the end; then the rest of the run."""
    told, again, found = Fails(), Fails(), Found()
    settings: dict[str, Any] = {"out": out / "callback", "evaluate": False, "progress": False, **FULL}
    try:
        pyrnode.train("8gaussians", callbacks=told, **settings)
    except ValueError as error:
        found["raised"] = [str(error), *error.__notes__]
    stopped = pyrnode.train("8gaussians", callbacks=again, resume=True, **settings)
    pyrnode.train("8gaussians", resume=True, **settings)
    at = [r["step"] for r in stopped.history if "loss" in r][-1]
    return found | {"told": [told.steps, again.steps], "interrupted": stopped.interrupted, "last": at}


def resumed(out: Path) -> Found:
    """A run that one process has begun."""
    result = pyrnode.train("8gaussians", out=out / "begun by one", resume=True, evaluate=False, progress=False, **FULL)
    changes = [r["changes"] for r in result.history if "changes" in r]
    return numbers(result) | {"changes": changes}


def shared_errors(out: Path) -> Found:
    """What one process raises, all raise."""
    world, found = distributed.world(), Found()

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]

    def broken() -> None:
        if last():
            raise DataError("row 7 is not a number")
        if world.first:
            time.sleep(0.05)

    def solver() -> None:
        if world.first:
            raise SolverError("stiff", status="MaxIters", block=2)

    class Local(Exception):
        """One that cannot cross."""

        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} {b}")

    def foreign() -> None:
        if last():
            raise Local(1, 2)

    attempt("gathered", lambda: world.gathered(broken))
    attempt("together", lambda: world.together(broken, in_turn=True))
    attempt("once", lambda: world.once(solver))
    attempt("foreign", lambda: world.gathered(foreign))
    attempt("few", lambda: train("8gaussians", samples=200, batch_size=world.size - 1, max_steps=3))
    attempt("data", lambda: train(random(100, 2, seed=rank()), max_steps=3, batch_size=10))
    return found


def in_turn(out: Path) -> Found:
    """The first writes a file, the others find it."""
    world = distributed.world()

    def fetched() -> bool:
        there = (out / "fetched").exists()
        (out / "fetched").touch()
        return there

    found = world.together(fetched, in_turn=True)
    total = world.sum(torch.full((3,), float(rank() + 1)), patient=False)
    return {"there": found, "sum": total.tolist(), "gathered": world.gathered(rank), "once": world.once(rank)}


def reproduced(out: Path) -> Found:
    """An experiment in small: its numbers, but for the seconds; and how many rows this process scored."""
    scored: list[int] = []
    original = evaluation._Scorer._batch

    def batch(self: Any, rows: Any, *args: Any, **more: Any) -> Any:
        scored.append(len(rows))
        return original(self, rows, *args, **more)

    evaluation._Scorer._batch = batch  # type: ignore[method-assign]
    try:
        scale = replace(SCALES["tiny"], seeds=(0,))
        folder = out / "reproduce"
        (found,) = pyrnode.reproduce("table1", scale=scale, out=folder, engine="torch", device="cpu", progress=False)
    finally:
        evaluation._Scorer._batch = original  # type: ignore[method-assign]
    numbers = {name: value for name, value in found.numbers.items() if not name.endswith("seconds")}
    return {"numbers": numbers, "rows": sum(scored), "report": (folder / "table1" / "report.html").is_file()}


def doctored(out: Path) -> Found:
    checks = doctor.diagnose_all(distributed.world())
    return {"checks": len(checks), "last": [checks[-1].name, checks[-1].status, checks[-1].detail]}


def killed(out: Path) -> Found:
    """The last process is killed in a step: the others end, soon, and say why."""
    original = loop.loss

    def loss(flow: Any, batch: Any, config: Any, solver: Any, step: int) -> Any:
        if step == 4 and last():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(flow, batch, config, solver, step)

    loop.loss = loss
    begun = time.monotonic()
    try:
        train("8gaussians", samples=200, batch_size=20, max_steps=50)
    except ProcessError as error:
        return {"seconds": time.monotonic() - begun, "told": str(error)}
    return {}


ALIKE: dict[str, Callable[[Path], Found]] = {
    "table": table,
    "pictures": pictures,
    "held out": held_out,
    "embedded": embedded,
    "mapped file": mapped_file,
    "ladder": ladder,
    "failure": failure,
    "not finite": not_finite,
}
"""What one process is compared with."""

TOGETHER: dict[str, Callable[[Path], Found]] = {
    "whole": whole,
    "interrupt": lambda out: stopped(out, signal.SIGINT),
    "terminate": lambda out: stopped(out, signal.SIGTERM),
    "callback": callback,
    "resumed": resumed,
    "shared errors": shared_errors,
    "in turn": in_turn,
    "reproduced": reproduced,
    "doctor": doctored,
    "killed": killed,
}


def run() -> None:
    import torch.distributed as dist

    number, size, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    COMMON["engine"], *names = sys.argv[4:] or ["torch", *ALIKE, *TOGETHER]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=number, world_size=size)
    distributed.world()
    found: dict[str, Found] = {}
    for name in names:
        try:
            found[name] = {**ALIKE, **TOGETHER}[name](out)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        (out / f"rank{number}.json").write_text(json.dumps(found))
        if "error" in found[name]:
            os._exit(1)  # out of step with the others, who now end too


if __name__ == "__main__":
    run()
