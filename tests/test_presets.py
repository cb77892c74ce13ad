"""What the presets hold."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

import pyrnode
from pyrnode.config import Config
from pyrnode.errors import ConfigError


def test_presets_are_listed_with_a_line_each() -> None:
    table = pyrnode.presets()
    assert {"digits", "toy", "mnist-cpu", "finlay2020-mnist", "finlay2020-cifar10"} <= set(table)
    assert {"ffjord-mnist", "ffjord-cifar10"} <= set(table)
    assert all(len(line) > 20 and not line.startswith("#") for line in table.values())


@pytest.mark.parametrize(
    ("name", "data", "penalties", "alpha", "flip", "scales"),
    [
        ("finlay2020-mnist", "mnist", (0.01, 0.01), 1e-5, False, 3),
        ("finlay2020-cifar10", "cifar10", (0.01, 0.03), 0.05, True, 4),
        ("ffjord-mnist", "mnist", (0.0, 0.0), 1e-5, False, 3),
        ("ffjord-cifar10", "cifar10", (0.0, 0.0), 0.05, True, 4),
    ],
)
def test_presets_hold_the_published_settings(
    name: str, data: str, penalties: tuple[float, float], alpha: float, flip: bool, scales: int
) -> None:
    config = Config.preset(name)
    assert (config.data.name, config.data.flip) == (data, flip)
    assert (config.penalties.kinetic, config.penalties.jacobian) == penalties
    assert config.penalties.total_derivative == 0
    assert (config.penalties.convention, config.penalties.noise) == ("paper", "gaussian")
    assert (config.penalties.divergence, config.penalties.probes) == ("hutchinson", 1)
    flow, network = config.flow, config.flow.network
    assert (flow.blocks, flow.scales, flow.end_time, flow.alpha) == (2, scales, 1.0, alpha)
    assert (network.kind, network.hidden, network.kernel_size) == ("conv", (64, 64, 64), 3)
    assert (network.activation, network.time) == ("softplus", "concat")
    training = config.training
    assert (training.optimizer, training.learning_rate, training.batch_size) == ("adam", 1e-3, 200)
    assert (training.epochs, training.warmup_steps, training.schedule) == (100, 1000, "constant")
    assert (training.max_steps, training.ema, training.clip_norm, training.weight_decay) == (None, None, None, 0.0)
    if name.startswith("finlay2020"):
        assert (config.solver.name, config.solver.step_size) == ("RK4", 0.25)
    else:
        assert (config.solver.name, config.solver.rtol, config.solver.atol) == ("DP5", 1e-5, 1e-5)
    solver = config.evaluation.solver
    assert (solver.name, solver.rtol, solver.atol) == ("DP5", 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "blocks", "parameters"),
    [
        ("finlay2020-mnist", (1, 28, 28), 10, 800_636),
        ("ffjord-mnist", (1, 28, 28), 10, 800_636),
        # As in FFJORD: 4 blocks on each of 3x32x32 … 24x4x4 and 2 on the last, counted by the formula below.
        ("finlay2020-cifar10", (3, 32, 32), 14, None),
        ("ffjord-cifar10", (3, 32, 32), 14, None),
    ],
)
def test_presets_build_the_published_networks(
    name: str, shape: tuple[int, ...], blocks: int, parameters: int | None
) -> None:
    flow = pyrnode.Flow.build(Config.preset(name), shape, levels=256)
    assert len(flow.blocks) == blocks
    expected = 0
    channels = shape[0]
    for scale in range((blocks - 2) // 4 + 1):  # two blocks, squeeze, two blocks, half of the channels out
        kinds = [channels, channels, 4 * channels, 4 * channels] if scale < (blocks - 2) // 4 else [channels] * 2
        expected += sum(_parameters(c) for c in kinds)
        channels *= 2
    counted = sum(p.numel() for p in flow.parameters())
    assert counted == expected
    assert parameters in (None, counted)


def _parameters(channels: int) -> int:
    """Four 3×3 convolutions, 64-64-64 channels between, each with time as one more input channel, and biases."""
    widths = [channels, 64, 64, 64, channels]
    return sum(9 * (a + 1) * b + b for a, b in pairwise(widths))


@pytest.mark.parametrize(
    ("name", "hidden", "alphas", "steps", "batch", "rate"),
    [
        ("ot-flow", (32, 32), (1.0, 30.0, 1.0), 8, 5000, 0.1),
        ("ot-flow-table", (256, 256), (1.0, 100.0, 15.0), 6, 2000, 0.02),
    ],
)
def test_presets_hold_ot_flows_settings(
    name: str, hidden: tuple[int, ...], alphas: tuple[float, float, float], steps: int, batch: int, rate: float
) -> None:
    """Its loss ``α₁ ½E + α₂ nll + α₃ H`` divided by ``α₂ d``."""
    config, (transport, likelihood, equation) = Config.preset(name), alphas
    network = config.flow.network
    assert (network.kind, network.hidden, network.activation) == ("potential", hidden, "logcosh")
    assert (network.rank, network.initial, network.time) == (10, "ot-flow", "concat")
    assert config.penalties.kinetic == pytest.approx(transport / (2 * likelihood), rel=1e-15)
    assert config.penalties.hjb == pytest.approx(equation / likelihood, rel=1e-15)
    assert (config.penalties.jacobian, config.penalties.divergence) == (0.0, "exact")
    assert (config.solver.name, config.solver.step_size) == ("RK4", pytest.approx(1 / steps, rel=1e-15))
    assert (config.training.batch_size, config.training.learning_rate) == (batch, rate)
    d = 2 if name == "ot-flow" else 43
    m, r = hidden[0], min(10, d + 1)
    flow = pyrnode.Flow.build(config, (d,))
    expected = (d + 1) * m + m + m * m + m + m + r * (d + 1) + d + 1  # theirs have one constant more
    assert sum(p.numel() for p in flow.parameters()) == expected


def test_the_other_potential_presets() -> None:
    flows = {name: pyrnode.Flow.build(Config.preset(name), (5,)) for name in ("monge-ampere", "potential-flow")}
    config = Config.preset("monge-ampere")
    assert config.penalties.kinetic == config.penalties.jacobian == config.penalties.hjb == 0
    assert (config.solver.step_size, config.flow.end_time, config.training.weight_decay) == (0.1, 10.0, 0.001)
    assert sum(p.numel() for p in flows["monge-ampere"].parameters()) == 5 * 1024 + 2 * 1024 + 5 * 5 + 5
    assert Config.preset("potential-flow").penalties.hjb == 1.0
    assert sum(p.numel() for p in flows["potential-flow"].parameters()) == 6 * 64 + 64 + 64 * 65 + 64 + 6 * 6 + 6


def test_an_unknown_preset_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'finlay2020-mnist'"):
        Config.preset("finlay2020_mnist")


def test_a_preset_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 5\n[training]\nepochs = 2\n")
    assert Config.preset(str(path)) == Config().override({"seed": 5, "epochs": 2})
    path.write_text("seed = x")
    with pytest.raises(ConfigError, match=r"mine\.toml.*not valid TOML"):
        Config.preset(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        Config.preset(str(path))
    with pytest.raises(ConfigError, match="does not exist"):
        Config.preset(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("preset", "source"),
    [
        ("finlay2020-mnist", "mnist"),
        ("ffjord-mnist", "mnist"),
        ("finlay2020-cifar10", "cifar10-jpeg"),
        ("ffjord-cifar10", "cifar10-jpeg"),
    ],
)
def test_published_presets_take_real_steps_on_real_images(preset: str, source: str, data_dir: Path) -> None:
    data: str | Path = source if source == "mnist" else data_dir / source
    overrides = {
        "data.dir": str(data_dir),
        "max_steps": 2,
        "batch_size": 2,
        "limit": 10,
        "validation_limit": 2,
        "warmup_steps": 1,
        "checkpoint_every": 2,
    }
    result = pyrnode.train(data, preset=preset, **overrides, evaluate=False, progress=False)
    steps = [record for record in result.history if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    # The start is the identity, so its score is that of logits under a standard normal; and it moves from there.
    assert steps[0]["E"] == 0
    assert steps[0]["loss"] == pytest.approx(steps[0]["nll"], rel=1e-6)
    assert steps[1]["E"] > 0
    assert 1 < steps[0]["bits"] < 40
    assert all(math.isfinite(record["grad_norm"]) and record["grad_norm"] > 0 for record in steps)
