"""Settings: validation, TOML both ways, overrides, and what the presets hold."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import pyrnode
from pyrnode.config import Config, FlowConfig, NetworkConfig, PenaltyConfig
from pyrnode.errors import ConfigError
from pyrnode.settings import flatten

BAD = [
    ("data.levels", 1, "at least 2"),
    ("data.samples", 9, "at least 10"),
    ("data.limit", 9, "at least 10"),
    ("data.workers", -1, "at least 0"),
    ("data.split_seed", -1, "at least 0"),
    ("data.validation", 0.0, "a share between 0 and 0.9"),
    ("data.validation", math.nan, "a share"),
    ("data.test", 0.9, "a share"),
    ("data.flip", 1, "expected bool"),
    ("data.sep", ":", "expected 'auto' or one of ',', ';', '\\t'"),
    ("data.decimal", ";", "expected 'auto', '.' or ','"),
    ("data.header", "yes", "expected bool or 'auto'"),
    ("data.name", 3, "expected str"),
    ("hidden", [], "positive widths"),
    ("hidden", [8, 0], "positive widths"),
    ("hidden", [8.5], "expected int"),
    ("hidden", 8, "expected a list of int"),
    ("kernel_size", 2, "odd"),
    ("kernel_size", -1, "odd"),
    ("activation", "relu", "'relu'"),
    ("activation", "softpluss", "did you mean 'softplus'"),
    ("network.time", "both", "concatsquash"),
    ("network.kind", "rnn", "auto, conv, mlp"),
    ("blocks", 0, "at least 1"),
    ("blocks", 1.5, "expected int"),
    ("blocks", True, "expected int"),
    ("scales", 0, "at least 1"),
    ("scales", "automatic", "expected int or 'auto'"),
    ("end_time", 0.0, "more than 0"),
    ("end_time", math.inf, "more than 0"),
    ("alpha", 0.5, "0 <= alpha < 0.5"),
    ("alpha", -1e-9, "0 <= alpha < 0.5"),
    ("alpha", math.nan, "0 <= alpha < 0.5"),
    ("step_size", 0, "more than 0"),
    ("step_size", -0.25, "more than 0"),
    ("step_size", "small", "expected float or 'auto'"),
    ("solver.rtol", 0.0, "more than 0"),
    ("solver.atol", math.nan, "more than 0"),
    ("error_control", "none", "density"),
    ("maxiters", 0, "at least 1"),
    ("memory", "disk", "checkpoint"),
    ("clip_norm", "no", "expected float or none"),
    ("options", 3, "expected dict"),
    ("kinetic", -0.01, "at least 0"),
    ("kinetic", "some", "auto"),
    ("standardize", "sphere", "auto, none, scale, whiten"),
    ("standardize", False, "auto, none, scale, whiten"),
    ("jacobian", math.inf, "at least 0"),
    ("total_derivative", -1, "at least 0"),
    ("hjb", -0.1, "at least 0"),
    ("flow.network.rank", 0, "at least 1"),
    ("flow.network.initial", "random", "identity, ot-flow"),
    ("convention", "theirs", "ffjord-rnode"),
    ("penalties.divergence", "trace", "hutchinson"),
    ("noise", "uniform", "rademacher"),
    ("penalties.probes", 0, "at least 1"),
    ("epochs", 0, "at least 1"),
    ("max_steps", 0, "at least 1"),
    ("batch_size", 0, "at least 1"),
    ("optimizer", "lbfgs", "adam, adamw, sgd"),
    ("learning_rate", 0.0, "more than 0"),
    ("learning_rate", "1e-3", "expected float"),
    ("schedule", "linear", "cosine"),
    ("warmup_steps", -1, "at least 0"),
    ("weight_decay", -0.1, "at least 0"),
    ("clip_norm", 0.0, "more than 0"),
    ("ema", 1.0, "between 0 and 1"),
    ("ema", 0, "between 0 and 1"),
    ("validate_every", -1, "at least 0"),
    ("validation_limit", 0, "at least 1"),
    ("patience", 0, "at least 1"),
    ("minutes", 0, "more than 0"),
    ("tolerance", 0, "more than 0"),
    ("checkpoint_every", -1, "at least 0"),
    ("checkpoint_minutes", 0.0, "more than 0"),
    ("max_restarts", -1, "at least 0"),
    ("tensorboard", "yes", "expected bool"),
    ("snapshots", 1, "expected bool"),
    ("evaluation.solver.rtol", -1e-5, "more than 0"),
    ("evaluation.divergence.probes", 0, "at least 1"),
    ("draws", 0, "at least 1"),
    ("chunk", 0, "at least 1"),
    ("test_limit", 0, "at least 1"),
    ("grid", 0, "at least 1"),
    ("evaluation.divergence.kind", "trace", "auto, exact, hutchinson"),
    ("engine", "jax", "auto, julia, torch"),
    ("dtype", "float16", "float32, float64"),
    ("seed", -1, "at least 0"),
    ("seed", "0", "expected int"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD, ids=[f"{k}={v}" for k, v, _ in BAD])
def test_a_bad_value_is_named_with_what_was_expected(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().override({key: value})
    message = str(caught.value)
    assert key.rpartition(".")[2] in message
    assert repr(value) in message or (isinstance(value, list) and "hidden" in message)
    assert expected in message


def test_every_numeric_setting_has_a_bad_value_in_the_list_above() -> None:
    # A new setting with a bound belongs in BAD; these have no bound to break.
    unbounded = {"data.dir", "device"}
    unbounded |= {
        f"{section}solver.{key}" for section in ("", "evaluation.") for key in ("name", "sensealg", "adaptive")
    }
    tested = set()
    for key, *_ in BAD:
        tested |= {path for path in _paths() if path == key or path.endswith("." + key)}
    assert _paths() - tested == unbounded


def _paths() -> set[str]:
    """The settings that are not sections."""
    from pyrnode.settings import _setting_paths

    sections = {"data", "flow", "flow.network", "solver", "penalties", "training", "evaluation"}
    sections |= {"evaluation.solver", "evaluation.divergence"}
    return set(_setting_paths(Config)) - sections


@pytest.mark.parametrize(("samples", "weight"), [(2, 1.0), (100, 0.15), (1500, 0.01), (10**6, 0.01)])
def test_the_fewer_samples_the_larger_the_penalty_that_is_left_to_us(samples: int, weight: float) -> None:
    settled = PenaltyConfig(kinetic="auto", jacobian=0.5).settled(samples, 3)
    assert settled.weights == (pytest.approx(weight), 0.5, 0.0)


def test_a_weight_that_depends_on_the_samples_is_not_used_without_them() -> None:
    with pytest.raises(ConfigError, match=r"jacobian = 'auto' depends on the number of samples"):
        _ = PenaltyConfig(jacobian="auto").weights


def test_images_are_not_whitened() -> None:
    flow = FlowConfig(standardize="whiten")
    assert flow.whitens((3,))
    assert not FlowConfig(standardize="auto").whitens((1, 4, 4))
    assert not FlowConfig(standardize="auto").whitens((5000,))
    with pytest.raises(ConfigError, match=r"standardize = 'whiten': for vectors, not for samples of shape \(1, 4, 4\)"):
        flow.whitens((1, 4, 4))


def test_settings_are_frozen_and_keyword_only() -> None:
    config = Config()
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        NetworkConfig("mlp")  # type: ignore[misc]


def test_values_are_fitted_to_their_types() -> None:
    penalties = PenaltyConfig(kinetic=1)
    assert isinstance(penalties.kinetic, float)
    config = Config(flow={"network": {"hidden": [3, 4]}})  # type: ignore[arg-type]
    assert config.flow.network.hidden == (3, 4)
    assert config.flow.blocks == 1


def test_numpys_numbers_become_pythons() -> None:
    values = {
        "epochs": (np.int64(3), 3),
        "learning_rate": (np.float32(0.5), 0.5),
        "kinetic": (np.int8(2), 2.0),
        "step_size": (np.float64(0.125), 0.125),
        "flip": (np.bool_(True), True),
        "solver.name": (np.str_("DP5"), "DP5"),
        "schedule": (np.str_("cosine"), "cosine"),
        "hidden": ([np.int32(4), np.int64(5)], (4, 5)),
        "options": ({"lazy": np.bool_(False), "order": np.int64(2)}, {"lazy": False, "order": 2}),
    }
    given, expected = ({key: pair[i] for key, pair in values.items()} for i in (0, 1))
    config = Config().override(given)
    assert config == Config().override(expected)
    flat = flatten(config.to_dict())
    for key, plain in expected.items():
        value = next(v for name, v in flat.items() if name == key or name.endswith("." + key))
        assert type(value) is type(list(plain) if isinstance(plain, tuple) else plain)
        if isinstance(value, (list, dict)):
            assert {type(v) for v in (value.values() if isinstance(value, dict) else value)} <= {int, bool}
    assert Config.from_toml(config.to_toml()) == config
    for key, value in (("epochs", np.float64(3)), ("epochs", np.bool_(True)), ("flip", np.int64(1))):
        with pytest.raises(ConfigError, match=f"{key} = {value.item()!r}: expected"):
            Config().override({key: value})


def test_defaults_are_the_papers_but_for_the_step_and_the_end() -> None:
    config = Config()
    assert (config.solver.name, config.solver.step_size) == ("auto", "auto")
    assert (config.penalties.kinetic, config.penalties.jacobian) == (0.01, 0.01)
    assert (config.training.optimizer, config.training.learning_rate) == ("adam", 1e-3)
    assert (config.training.batch_size, config.training.epochs) == (200, None)
    solver = config.evaluation.solver
    assert (solver.name, solver.rtol, solver.atol) == ("DP5", 1e-5, 1e-5)


# -- overrides -------------------------------------------------------------------------------------------------------


def test_override_by_full_and_short_name() -> None:
    config = Config().override({"epochs": 3, "flow.network.hidden": (4,), "network.time": "none", "seed": 7})
    assert config.training.epochs == 3
    assert config.flow.network == NetworkConfig(hidden=(4,), time="none")
    assert config.seed == 7
    assert Config().training.epochs is None  # a copy


def test_override_with_a_mapping_changes_only_what_it_names() -> None:
    config = Config.preset("toy").override({"flow": {"blocks": 2, "network": {"hidden": [8]}}})
    toy = Config.preset("toy").flow.network
    assert config.flow.blocks == 2
    assert (config.flow.network.hidden, config.flow.network.activation) == ((8,), toy.activation)
    assert toy.activation == "tanh"


def test_override_with_none_unsets() -> None:
    assert Config.preset("digits").training.clip_norm == 10.0
    assert Config.preset("digits").override({"clip_norm": None}).training.clip_norm is None
    with pytest.raises(ConfigError, match="batch_size = None: expected int"):
        Config().override({"batch_size": None})


def test_solver_options_are_replaced_as_a_whole() -> None:
    config = Config().override({"solver.options": {"a": 1}}).override({"solver": {"options": {"b": 2}}})
    assert config.solver.options == {"b": 2}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("epoch", "did you mean 'epochs'"),
        ("training.epoch", "did you mean 'training.epochs'"),
        ("flow.netwrok.hidden", "did you mean 'flow.network.hidden'"),
        ("", "unknown setting ''"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(key: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Config().override({key: 1})


def test_an_ambiguous_name_lists_what_it_may_be() -> None:
    with pytest.raises(ConfigError, match=r"'divergence' is ambiguous: penalties\.divergence, evaluation\.divergence"):
        Config().override({"divergence": "exact"})


def test_a_section_given_as_a_value_lists_its_settings() -> None:
    with pytest.raises(ConfigError, match=r"flow is a section; its settings are flow\.network, flow\.blocks"):
        Config().override({"flow": "big"})


# -- TOML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(pyrnode.presets()))
def test_every_preset_round_trips_through_toml(name: str) -> None:
    config = Config.preset(name)
    assert Config.from_toml(config.to_toml()) == config
    assert Config.from_dict(config.to_dict()) == config


def test_unusual_values_round_trip_through_toml() -> None:
    values = {
        "data.name": 'a "quoted" näme\\path',
        "data.dir": "",
        "learning_rate": 1 / 3,
        "alpha": 5e-324,
        "step_size": "auto",
        "scales": 2,
        "options": {"force_dtmin": True, "save": [1, 2.5, "x"]},
        "clip_norm": None,
        "seed": 2**62,
    }
    config = Config().override(values)
    assert Config.from_toml(config.to_toml()) == config
    assert config.flow.alpha == 5e-324


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed = ", "not valid TOML"),
        ("sead = 1", "unknown key in Config 'sead' .did you mean 'seed'"),
        ("[training]\nepoch = 1", "unknown key in TrainingConfig 'epoch' .did you mean 'epochs'"),
        ("training = 3", "training is a section"),
        ("[flow.network]\nhidden = ['a']", "hidden = 'a': expected int|'a': expected int"),
    ],
)
def test_bad_toml_is_a_config_error(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Config.from_toml(text)


def test_flatten_names_settings_by_section() -> None:
    flat = flatten(Config().to_dict())
    assert flat["flow.network.hidden"] == [64, 64, 64]
    assert flat["solver.options"] == {}
    assert set(flat) <= _paths()


# -- presets ---------------------------------------------------------------------------------------------------------


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
