"""Settings: validation, TOML both ways, and overrides."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Literal

import numpy as np
import pytest

import pyrnode
from pyrnode.architecture import FlowConfig, NetworkConfig
from pyrnode.config import Config, PenaltyConfig
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
    ("columns.bounds", 3, "expected dict or none"),  # those of the ranges are in test_bounded.py and test_periodic.py
    ("columns.period", "angle", "expected dict or none"),
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
    ("precision", "fp8", "expected 'ieee' or 'tf32' or 'bf16' or 'auto'"),
    ("graphs", True, "known: False, auto"),
    ("options", 3, "expected dict"),
    ("kinetic", -0.01, "at least 0"),
    ("kinetic", "some", "auto"),
    ("standardize", "sphere", "auto, channels, none, radial, scale, whiten"),
    ("standardize", False, "auto, channels, none, radial, scale, whiten"),
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
    ("optimizer", "lbfgs", "adam, adamw, sgd, soap"),
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
    unbounded = {"data.dir", "device", "flow.flatten"}
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

    sections = {"data", "columns", "flow", "flow.network", "solver", "penalties", "training", "evaluation"}
    sections |= {"evaluation.solver", "evaluation.divergence"}
    return set(_setting_paths(Config)) - sections


@pytest.mark.parametrize(("samples", "weight"), [(2, 1.0), (100, 0.15), (1500, 0.01), (10**6, 0.01)])
def test_the_fewer_samples_the_larger_the_penalty_that_is_left_to_us(samples: int, weight: float) -> None:
    settled = PenaltyConfig(kinetic="auto", jacobian=0.5).settled(samples, 3)
    assert settled.weights == (pytest.approx(weight), 0.5, 0.0)


def test_a_weight_that_depends_on_the_samples_is_not_used_without_them() -> None:
    with pytest.raises(ConfigError, match=r"jacobian = 'auto' depends on the number of samples"):
        _ = PenaltyConfig(jacobian="auto").weights


@pytest.mark.parametrize("given", ["whiten", "radial"])
def test_images_have_no_axes(given: Literal["whiten", "radial"]) -> None:
    flow = FlowConfig(standardize=given)
    assert flow.whitens((3,))
    assert flow.draws_in((3,)) == (given == "radial")
    assert not FlowConfig(standardize="auto").whitens((1, 4, 4))
    assert not FlowConfig(standardize="auto").draws_in((5000,))
    message = rf"standardize = '{given}': for vectors, not for samples of shape \(1, 4, 4\); take 'scale', 'channels'"
    with pytest.raises(ConfigError, match=message):
        flow.standardizes((1, 4, 4), 256)


def test_vectors_have_no_channels() -> None:
    flow = FlowConfig(standardize="channels")
    assert flow.standardizes((1, 4, 4), 256)
    assert flow.standardizes((1, 4, 4), None)
    assert not FlowConfig(standardize="scale").standardizes((1, 4, 4), 256)
    for given, shape in ((flow, (3,)), (FlowConfig(standardize="channels", flatten=True), (1, 4, 4))):
        with pytest.raises(ConfigError, match="standardize = 'channels': for images, not for samples of shape"):
            given.standardizes(shape, None)


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
