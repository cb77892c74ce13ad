"""What the device decides where settings say "auto": the numbers of training; and estimates and checkpoints there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pyrnode import Config, SolverConfig, devices, precision
from pyrnode.data import Splits, TensorSamples
from pyrnode.dynamics import coarse
from pyrnode.paper import study
from pyrnode.paper.scales import SCALES
from pyrnode.runs import RunFolder
from pyrnode.training import coarse as settling
from pyrnode.training import trainer as loop
from pyrnode.training.trainer import Trainer
from tests.pretend import pretended
from tests.small_runs import train

HIDDEN, BATCH = 8, 6
TAPE = BATCH * 2 * HIDDEN * 4 * 4  # numbers of two hidden layers, of which h, slope, ā and g are kept, in float32
BLOCK = 4 * 4 * TAPE  # four stages of four steps


def trainer(device: str = "meta", **more: Any) -> Trainer:
    settings = {"engine": "torch", "device": device, "hidden": (HIDDEN, HIDDEN), "batch_size": BATCH, "blocks": 2}
    settings |= {"solver.name": "RK4", "step_size": 0.25, "solver.precision": "auto", "standardize": "none"}
    noise = TensorSamples(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)))
    config = Config().override({**settings, **more})
    return Trainer(config, Splits("noise", noise, noise, noise, (3,)), None, progress=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device of that much memory, with tensor cores."""

    def of(size: int) -> None:
        monkeypatch.setattr(precision, "gains", lambda device: True)
        monkeypatch.setattr(devices, "free", lambda device: size)

    with pretended():
        yield of


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.9, "tf32"), (1.1, "tf32"), (0.45, "tf32"), (0.55, "bf16"), (0.99, "bf16")],
    ids=["no memory does", "all fits", "not even halves fit", "halves fit", "nearly"],
)
def test_the_device_and_its_memory_choose(gpu: Any, share: float, expected: str) -> None:
    """Two blocks, one after the other: the second has a quarter of what the first has left."""
    memory = share * (4 * BLOCK + BLOCK)
    gpu(int(memory))
    # where the user wants nothing stored, nothing would be gained by halves
    found = trainer(**({"solver.memory": "checkpoint"} if share == 0.9 else {}))
    assert found.solver.precision == expected
    assert found.ladder[2].precision == expected
    assert found.best_flow().config.solver.precision == expected
    assert found.config.solver.precision == "auto"  # on another device it is chosen again


def test_what_is_stored_grows_with_times_turns_and_probes(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(2**40)
    seen: list[int] = []

    def limit(like: Any, size: int, *, taken: int) -> float:
        seen.append(taken)
        return math.inf

    monkeypatch.setattr(settling, "store_limit", limit)

    def stored(turns: int = 1, **settings: Any) -> int:
        """Bytes of the first of two blocks: what is taken when the second is looked at."""
        found = trainer(**settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(found.flow.transform), "turns", turns)
            settling.settled(found.flow, found.config, BATCH)
        return seen[-1]

    probed = {"penalties.divergence": "hutchinson"}
    one = stored(**probed)
    assert one > 0
    assert stored(**probed, end_time=2.0) == 2 * one
    assert stored(2, **probed) == 2 * one
    assert stored(**probed, probes=3) == stored(**{"penalties.divergence": "exact"}) > one  # three dimensions


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float64"},
        {"solver.name": "DP5"},
        {"sensealg": "BacksolveAdjoint"},
        {"total_derivative": 0.1},
        {"network.kind": "potential"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_where_coarse_numbers_mean_nothing_it_is_ieee(gpu: Any, settings: dict[str, Any]) -> None:
    gpu(2**40)
    assert trainer(**settings).solver.precision == "ieee"


def test_a_solver_that_training_chooses_is_settled_too(gpu: Any) -> None:
    gpu(2**40)
    found = trainer(**{"solver.name": "auto", "step_size": "auto"})
    assert [found.ladder[i].precision for i in range(4)] == ["tf32"] * 4


def test_on_a_cpu_it_is_ieee() -> None:
    assert not precision.gains(torch.device("cpu"))
    found = trainer("cpu")
    assert found.solver.precision == "ieee"
    batch = next(found._batches())
    assert found._step(batch) is not None


def test_tensor_cores_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert precision.gains(torch.device("cuda")) is expected


def test_before_it_is_settled_it_is_ieees(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine, a score, and a step taken by hand never guess."""
    solver = SolverConfig(precision="auto")
    assert solver.numbers == "ieee"
    monkeypatch.setattr(coarse, "Tf32", lambda *_: pytest.fail("coarse"))
    flow = trainer("cpu").flow
    assert flow.log_prob(torch.zeros(2, 3)).shape == (2,)


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_the_papers_scale_leaves_it_to_the_device(data: str) -> None:
    """Pieces, memory and precision; the baseline's adaptive steps stay IEEE's."""
    config = SCALES["paper"].config(data)
    assert (config.solver.precision, config.solver.memory, config.solver.graphs) == ("auto", "auto", "auto")
    assert (config.training.checkpoint_every, config.training.checkpoint_minutes) == (0, 2.0)
    assert SCALES["paper"].config(data, "ffjord").solver.name == "DP5"


# -- the estimate ----------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    history: list[dict[str, float]]
    interrupted: bool = False


@pytest.mark.parametrize(("device", "first"), [("cpu", 0), ("meta", study.UNTIMED)])
def test_an_estimate_leaves_out_what_a_device_does_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, first: int
) -> None:
    """Graphs are recorded the third time that a solve is asked for, and kernels compiled the first time."""

    def told(splits: Any, *, preset: Config, **more: Any) -> Result:
        steps = preset.training.max_steps
        assert steps == first + study.TIMED_STEPS
        took = [60.0] * first + [60.0] + [0.25] * (study.TIMED_STEPS - 1)
        seconds = torch.tensor(took).cumsum(0).tolist()
        return Result([{"loss": 1.0, "seconds": value} for value in seconds])

    monkeypatch.setattr(study, "train", told)
    with pretended():
        tiny = study.Study(SCALES["tiny"], tmp_path, settings={"engine": "torch", "device": device}, progress=False)
        assert tiny._step_seconds(tiny._untuned(study.Need("8gaussians", "rnode"))) == pytest.approx(0.25)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_come_by_time_and_not_by_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of a few steps writes nothing; what training falls back to is kept in memory all the same."""
    monkeypatch.setattr(loop, "_SAVED", 1)
    written: list[int] = []
    original = loop.Snapshot.write

    def write(self: Any, path: Path, origin: Any) -> None:
        written.append(self.progress.step)
        original(self, path, origin)

    monkeypatch.setattr(loop.Snapshot, "write", write)
    settings = {"samples": 50, "batch_size": 20, "max_steps": 12, "checkpoint_every": 0}  # two steps an epoch
    train(tmp_path / "by time", **settings)
    assert written == [12]
    written.clear()
    train(tmp_path / "at once", **settings, checkpoint_minutes=1e-9)
    assert written == [*range(1, 13)]
    assert RunFolder(tmp_path / "by time").model.is_file()
