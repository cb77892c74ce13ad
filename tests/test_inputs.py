"""What numpy, pandas and torch users pass: taken with every value as it is, or refused in words."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode.cli import main
from pyrnode.config import Config, SolverConfig
from pyrnode.data import TensorSamples, load
from pyrnode.data.readers import open_file
from pyrnode.errors import ConfigError, DataError
from pyrnode.estimator import RNODEDensity
from pyrnode.flow import Flow
from pyrnode.parts import check_memory, network
from pyrnode.transforms import Chain, Standardize

Array = np.ndarray[Any, Any]
SMALL = {"hidden": [4], "dtype": "float64"}


def flow_of(d: int = 2, *, m: int = 0, **settings: Any) -> Flow:
    return Flow.build(Config().override(SMALL | settings), (d,), context_dim=m)


def image_flow(levels: int = 256) -> Flow:
    return Flow.build(Config().override(SMALL), (1, 4, 4), levels=levels)


def table(n: int = 40, d: int = 2) -> Array:
    return np.random.default_rng(0).normal(size=(n, d))


def scores(x: Any) -> Tensor:
    with torch.no_grad():
        return flow_of().log_prob(x)


def masked(n: int = 40) -> Array:
    x = np.ma.masked_array(table(n), mask=False)
    x[3, 1] = 1e20
    x[3, 1] = np.ma.masked
    return x


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "train": lambda x: load(x),
    "context in training": lambda x: load(table(), context=x),
    "log_prob": lambda x: flow_of().log_prob(x),
    "encode": lambda x: flow_of().encode(x),
    "decode": lambda x: flow_of().decode(x),
    "evaluate": lambda x: pyrnode.evaluate(flow_of(), x),
    "context": lambda x: flow_of(m=2).log_prob(table(), x),
    "context of samples": lambda x: flow_of(m=2).sample(1, x),
    "context in evaluate": lambda x: pyrnode.evaluate(flow_of(m=2), table(), context=x),
    "context of a distribution": lambda x: flow_of(m=2).distribution(x),
    "fit": lambda x: RNODEDensity(max_steps=1).fit(x),
    "context in fit": lambda x: RNODEDensity(max_steps=1).fit(table(), context=x),
}

REFUSED: dict[str, tuple[Callable[[Array], Any], str]] = {
    "masked": (lambda _: masked(), "1 masked cells: drop their rows"),
    "complex": (lambda x: x + 1j, "[Cc]omplex"),
    "sparse": (lambda x: __import__("scipy.sparse").sparse.csr_matrix(x), "[Ss]parse"),
    "text": (lambda x: [*x.astype(str).tolist()[:-1], ["x", "y"]], "text|not .*convert|strings"),
    "dates": (lambda x: x.astype("datetime64[s]"), "dates|could not convert|datetime|DType|not supported"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_lose_a_part_is_refused(kind: str, entry: str) -> None:
    make, message = REFUSED[kind]
    if "fit" in entry and kind == "dates":
        return  # scikit-learn takes them as numbers, and loses nothing
    if "fit" in entry and kind in ("text", "sparse"):
        message = "."  # scikit-learn's own words
    if entry in ("train", "evaluate") and kind in ("sparse", "text"):
        message = "cannot load a|sparse|text"
    with pytest.raises((DataError, TypeError) if "fit" in entry else DataError, match=message):
        ENTRIES[entry](make(table()))


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda x: x + 1j,
    "sparse": lambda x: x.to_sparse(),
    "sparse by rows": lambda x: x.to_sparse_csr(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :1]], layout=torch.jagged),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "a ragged list": lambda x: [x[0], x[1, :1]],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("entry", ["train", "log_prob", "evaluate", "context", "context of a distribution"])
def test_tensors_that_would_lose_a_part_are_refused(kind: str, entry: str) -> None:
    with pytest.raises(DataError):
        ENTRIES[entry](TENSORS[kind](torch.from_numpy(table())))


TAKEN: dict[str, Callable[[Array], Any]] = {
    "a list": lambda x: x.tolist(),
    "a list of arrays": list,
    "a list of tensors": lambda x: list(torch.from_numpy(x)),
    "big-endian": lambda x: x.astype(">f8"),
    "negative strides": lambda x: x[::-1].copy()[::-1],
    "columns first": np.asfortranarray,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "a tensor": torch.from_numpy,
    "nothing masked": lambda x: np.ma.masked_array(x, mask=False),
    "a view with steps": lambda x: np.repeat(x, 2, axis=0)[::2],
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_has_the_values_that_it_had(kind: str) -> None:
    """At 1.7e9, where single precision knows multiples of 128, by every entry."""
    x = 1.7e9 + table()
    transform = Chain([Standardize.fit(torch.from_numpy(x))])
    flow = Flow.build(Config().override(SMALL), (2,), transform=transform, context_dim=2, context_transform=transform)
    given = TAKEN[kind](x)
    with torch.no_grad():
        expected = flow.log_prob(torch.from_numpy(x), torch.from_numpy(x))
        assert len(set(expected.tolist())) == len(x)
        assert torch.equal(flow.log_prob(given, given), expected)
        assert torch.equal(flow.decode(TAKEN[kind](table()), given), flow.decode(table(), x))
        assert torch.equal(flow.distribution(given).log_prob(torch.from_numpy(x)), expected)
        assert torch.equal(flow.sample(1, given, seed=0), flow.sample(1, x, seed=0))
    if not isinstance(given, list):
        a, b = (pyrnode.evaluate(flow, given, context=given) for _ in range(2))
        assert a.score == b.score
        assert torch.equal(load(given).train.tensor(), load(x).train.tensor())
    for context in (given, TAKEN[kind](np.round(x).astype(np.int64))):
        values = load(x, context=context).train.context
        assert values is not None
        assert len(values.unique(dim=0)) > 6
        assert float(values.double().mean()) == pytest.approx(1.7e9, abs=1)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.int8, ">i2", np.bool_, np.float16])
def test_types_of_numbers(dtype: Any) -> None:
    x = np.abs(np.round(table() * 3)).astype(dtype)
    assert torch.equal(scores(x), scores(x.astype(np.float64)))
    if dtype not in (">i2",):
        assert torch.equal(scores(torch.from_numpy(x)), scores(x.astype(np.float64)))
    context = load(table(), context=x).train.context
    assert context is not None
    assert set(context.double().unique().tolist()) <= set(x.astype(np.float64).flatten().tolist())


def test_integers_beyond_int64_are_refused_not_wrapped() -> None:
    x = np.full((20, 2), 2**64 - 1, dtype=np.uint64)
    for given in (x, torch.from_numpy(x)):
        with pytest.raises(DataError, match="beyond int64"):
            flow_of().log_prob(given)
        with pytest.raises(DataError, match="beyond int64"):
            load(given)


def test_pandas_types() -> None:
    frame = pd.DataFrame(table(), columns=["a", "b"])
    for dtype in ("Float64", "float64[pyarrow]"):
        assert torch.equal(load(frame.astype(dtype)).train.tensor(), load(frame).train.tensor())
    for column in (pd.array([1, None] * 20, dtype="Int64"), pd.array([1.0, None] * 20, dtype="Float64")):
        with pytest.raises(DataError, match="row 1, column 'z'"):
            load(frame.assign(z=column))
    with pytest.raises(DataError, match=r"column 'z' has type object: .*astype"):
        load(frame.assign(z=pd.Series([1.5, 2.5] * 20, dtype=object)))
    with pytest.raises(DataError, match="column 'z' is not a number"):
        load(frame.assign(z=pd.Series([1.5, "x"] * 20, dtype=object)))


# --- pixels ----------------------------------------------------------------------------------------------------------


def pixels(n: int = 8) -> Tensor:
    return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


SCALED: dict[str, Callable[[Tensor], Tensor]] = {
    "ToTensor": lambda x: x.float() / 255,
    "ToTensor, one image": lambda x: x[:1].float() / 255,
    "half precision": lambda x: (x.float() / 255).half(),
    "by levels": lambda x: (x.double() + 0.3) / 256,
    "whole": lambda x: x.float(),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_pixels_are_refused_by_discrete_flows(kind: str) -> None:
    x, flow = SCALED[kind](pixels()), image_flow()
    for use in (flow.log_prob, flow.encode, lambda x: flow.log_prob(x, return_error=True)):
        with pytest.raises(DataError, match=r"integers"):
            use(x)
    with pytest.raises(DataError, match="expected integers 0 to 255, not floats"):
        pyrnode.evaluate(flow, x)
    if kind.startswith("ToTensor"):
        for use in (flow.to_torch().double().log_prob, flow.distribution().log_prob):
            with pytest.raises(DataError, match="nearly black"):
                use(x.double())


def test_spread_pixels_are_taken() -> None:
    x = pixels()
    flow = image_flow()
    with torch.no_grad():
        for given in (x + torch.rand(x.shape, dtype=torch.float64), x.double() + 0.5, torch.full((1, 1, 4, 4), 0.5)):
            assert bool(torch.isfinite(flow.log_prob(given)).all())
        black = torch.rand(9, 1, 4, 4, dtype=torch.float64)
        assert bool(torch.isfinite(flow.distribution().log_prob(black)).all())
        binary = Flow.build(Config().override(SMALL), (1, 4, 4), levels=2)
        assert bool(torch.isfinite(binary.log_prob((x > 99).double())).all())
        assert torch.equal(binary.log_prob(x > 99), binary.log_prob((x > 99).to(torch.uint8)))


def test_whole_numbers_as_floats_are_no_continuous_images() -> None:
    x = torch.randint(0, 256, (20, 1, 4, 4)).float()
    with pytest.raises(DataError, match=r"whole numbers .* as integers"):
        load(x)
    assert isinstance(load(x + torch.rand(x.shape)).train, TensorSamples)


# --- whole numbers, and none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [np.int64, np.uint8, np.array, torch.tensor])
def test_whole_numbers_of_others(of: Callable[[int], Any]) -> None:
    """The same as Python's, down to the noise, whose seed goes through its text."""
    flow, x = image_flow(), pixels()
    assert torch.equal(flow.sample(of(3), seed=of(1)), flow.sample(3, seed=1))
    assert torch.equal(flow.encode(x, seed=of(1)), flow.encode(x, seed=1))
    assert pyrnode.evaluate(flow, x, seed=of(1)).score == pyrnode.evaluate(flow, x, seed=1).score
    assert torch.equal(flow.to_torch().sample(of(2), seed=of(1)), flow.to_torch().sample(2, seed=1))
    assert flow.distribution().sample((of(2),)).shape == (2, 1, 4, 4)
    model = RNODEDensity(hidden=(4,), max_steps=of(2), batch_size=of(20), random_state=0).fit(table())
    plain = RNODEDensity(hidden=(4,), max_steps=2, batch_size=20, random_state=0).fit(table())
    np.testing.assert_array_equal(model.score_samples(table()), plain.score_samples(table()))
    assert model.sample(of(3), random_state=0).shape == (3, 2)
    settings: dict[str, Any] = {"hidden": [4], "evaluate": False, "progress": False}
    given = pyrnode.train(table(), epochs=of(1), seed=of(3), batch_size=of(16), **settings).flow
    same = pyrnode.train(table(), epochs=1, seed=3, batch_size=16, **settings).flow
    assert torch.equal(given.log_prob(table()), same.log_prob(table()))


@pytest.mark.parametrize("n", [1.0, True, np.bool_(True), "3", -1, None, np.float64(2), np.array([1, 2])])
def test_other_numbers_of_samples_are_refused(n: Any) -> None:
    with pytest.raises(ConfigError, match="expected a number of samples, at least 0"):
        flow_of().sample(n)


def test_no_samples() -> None:
    flow, conditional, images = flow_of(), flow_of(m=3), image_flow()
    assert flow.sample(0).shape == (0, 2)
    assert flow.sample(0).dtype == flow.sample(1).dtype
    assert (images.sample(0).shape, images.sample(0).dtype) == ((0, 1, 4, 4), torch.uint8)
    assert conditional.sample(0, torch.zeros(3)).shape == (0, 2)
    assert conditional.sample(0, torch.zeros(5, 3)).shape == (5, 0, 2)
    assert conditional.sample(2, torch.zeros(0, 3)).shape == (0, 2, 2)
    for solver in (None, {"rtol": 1e-5}):
        assert flow.to_torch(solver).sample(0).shape == (0, 2)
        assert conditional.to_torch(solver).sample(0, torch.zeros(5, 3, dtype=torch.float64)).shape == (5, 0, 2)
    assert flow.distribution().sample((0,)).shape == (0, 2)
    assert flow.distribution().sample((4, 0)).shape == (4, 0, 2)
    assert flow.log_prob(np.empty((0, 2))).shape == (0,)
    assert flow.decode(np.empty((0, 2))).shape == (0, 2)
    assert RNODEDensity(hidden=(4,), max_steps=2).fit(table()).sample(0).shape == (0, 2)


@pytest.mark.parametrize("names", [("weight", "height, cm"), ("2000", "2001"), None])
def test_samples_are_written_as_a_table(names: tuple[str, ...] | None, tmp_path: Path) -> None:
    flow = Flow.build(Config().override(SMALL), (2,), features=names)
    flow.save(tmp_path / "flow.safetensors")
    for suffix in (".csv", ".npy"):
        out = tmp_path / f"samples{suffix}"
        assert main(["sample", str(tmp_path / "flow.safetensors"), "--out", str(out), "-n", "20", "--seed", "1"]) == 0
        reader = open_file(out)
        assert reader.names == (names if suffix == ".csv" else None)
        np.testing.assert_array_equal(reader.whole(), flow.sample(20, seed=1).numpy())


def test_images_are_not_written_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_flow().save(tmp_path / "flow.safetensors")
    assert main(["sample", str(tmp_path / "flow.safetensors"), "--out", str(tmp_path / "x.csv")]) == 1
    assert "name a .png or .npy file" in capsys.readouterr().err


def test_a_context_on_the_command_line_keeps_its_digits(tmp_path: Path) -> None:
    seconds = Chain([Standardize(torch.tensor([1.7e9], dtype=torch.float64), torch.ones(1, dtype=torch.float64))])
    flow = Flow.build(Config().override(SMALL), (2,), context_dim=1, context_transform=seconds)
    torch.nn.init.normal_(flow.blocks[0].dynamics.context.weight)  # type: ignore[union-attr, arg-type]
    flow.save(tmp_path / "flow.safetensors")
    out = tmp_path / "x.npy"
    for context in (1.7e9 + 1, 1.7e9 + 2):
        given = ["--context", repr(context), "-n", "3", "--out", str(out)]
        assert main(["sample", str(tmp_path / "flow.safetensors"), *given]) == 0
        np.testing.assert_array_equal(np.load(out), flow.sample(3, np.array([context]), seed=0).numpy())


# --- sbi, and steps that are still to be found -----------------------------------------------------------------------


def test_sbi_samples_of_an_empty_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimator for sbi, by a stand-in of sbi's base, which is not installed everywhere."""

    class Estimator(torch.nn.Module):
        def __init__(self, net: torch.nn.Module, input_shape: torch.Size, condition_shape: torch.Size) -> None:
            super().__init__()
            self.net, self.input_shape, self.condition_shape = net, input_shape, condition_shape

    base = types.ModuleType("base")
    base.ConditionalDensityEstimator = Estimator  # type: ignore[attr-defined]
    for name in ("sbi", "sbi.neural_nets", "sbi.neural_nets.estimators"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sbi.neural_nets.estimators.base", base)
    monkeypatch.delitem(sys.modules, "pyrnode.sbi.estimator", raising=False)
    theta, x = torch.randn(20, 2), torch.randn(20, 3)
    x[:, 1] = 4.0  # a setting that does not vary
    estimator = pyrnode.sbi.rnode(**SMALL)(theta, x)
    monkeypatch.delitem(sys.modules, "pyrnode.sbi.estimator")
    for shape in ((), (4,), (0,), (2, 3)):
        assert estimator.sample(torch.Size(shape), x[:5]).shape == (*shape, 5, 2)
    density = flow_of(m=3).distribution(x[:5])
    assert density.sample(torch.Size(())).shape == (5, 2)
    assert flow_of().distribution().sample().shape == (2,)


def test_a_step_that_is_still_to_be_found_says_what_to_do() -> None:
    flow = flow_of()
    for solver in ({"name": "RK4", "step_size": "auto"}, SolverConfig(name="Heun", step_size="auto")):
        for use in (
            lambda solver: flow.log_prob(table(), solver=solver),
            lambda solver: flow.to_torch(solver),
            lambda solver: flow.sample(2, solver=solver),
        ):
            with pytest.raises(
                ConfigError, match=r"train with it, or give a number, e.g. {'name': .*'step_size': 0.25}"
            ):
                use(solver)


# -- what is too large to compute with --------------------------------------------------------------------------------


def with_value(value: float, n: int = 60) -> Array:
    x = table(n)
    x[37, 1] = value
    return x


def test_a_value_without_a_square_is_named_where_it_stands(tmp_path: Path) -> None:
    said = r"has 1 values beyond 1e\+150, whose squares are no numbers, the first in row 37, column {} \(1e\+300\)"
    x = with_value(1e300)
    with pytest.raises(DataError, match=said.format("1")):
        load(x)
    with pytest.raises(DataError, match=said.format("'b'")):
        load(pd.DataFrame(x, columns=["a", "b"]))
    with pytest.raises(DataError, match=said.format("1")):
        load(table(60), context=x)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match=said.format("1")):
        load(tmp_path / "x.npy")
    with pytest.raises(DataError, match=said.format("1")):
        load(table(60), validation=x)
    load(with_value(1e149))
    classes = torch.eye(3, dtype=torch.int64).repeat(20, 1)
    load(table(60), context=classes, validation=table(60) + 1, validation_context=classes)


@pytest.mark.parametrize("standardize", ["none", "auto"])
def test_a_value_that_the_flow_cannot_square_is_named_before_training(standardize: str) -> None:
    settings: dict[str, Any] = {"hidden": [4], "max_steps": 1, "progress": False, "evaluate": False}
    if standardize == "none":
        with pytest.raises(DataError, match=r"has 1e\+30 in column 1, which is 1e\+30 where the flow computes"):
            pyrnode.train(with_value(1e30), standardize=standardize, **settings)
    else:  # it sets the scale, and can be computed with
        pyrnode.train(with_value(1e30), standardize=standardize, **settings)


def test_of_a_sample_far_away_the_column_is_named_that_takes_it_there() -> None:
    """Not the one of the largest numbers: its unit may be small, and principal axes mix them all."""
    x, held_out = table(400), table(60)
    for values in (x, held_out):
        values[:, 0] = 1e25 + 1e20 * values[:, 0]
    held_out[41, 1] = -1e24
    settings: dict[str, Any] = {"hidden": [4], "max_steps": 1, "progress": False, "evaluate": False}
    for standardize in ("auto", "scale"):
        said = rf"has -1e\+24 in column 1, .*standardize = '{standardize}'.*: leave such rows out$"
        with pytest.raises(DataError, match=said):
            pyrnode.train(x, validation=held_out, standardize=standardize, **settings)
    x[:, 0] = held_out[:, 0] = 0
    x[::2, 0] = 1
    held_out[:, 1] = 1.0
    most = (torch.finfo(torch.float32).max / 2) ** 0.5
    for factor, sign in ((1.01, -1), (1.01, 1), (0.99, 1)):
        x[5, 1] = sign * factor * most
        if factor < 1:
            flow = Flow.build(Config().override({"hidden": [4], "standardize": "none"}), (2,))
            assert bool(torch.isfinite(flow.log_prob(torch.as_tensor(x[5:6]))).all())
        else:
            with pytest.raises(DataError, match=r"in column 1, .*or take standardize = 'auto'$"):
                pyrnode.train(x, validation=held_out, standardize="none", **settings)


def test_the_error_of_values_without_a_square_counts_them_all() -> None:
    x = with_value(-1e151)
    x[50, 0] = 1e151
    with pytest.raises(DataError, match=r"has 2 values beyond 1e\+150, .*row 37, column 1 \(-1e\+151\)"):
        load(x)
    x[51] = np.nan, -np.inf
    with pytest.raises(DataError, match=r"has 2 NaN or infinite values, the first in row 51, column 0: remove"):
        load(x)
    x = np.random.default_rng(0).normal(size=(20, 1, 3, 3))
    x[12, 0, 1, 1] = np.nan
    with pytest.raises(DataError, match=r"has 1 NaN or infinite values, the first in image 12: remove"):
        load(x)
    x[12, 0, 1, 1] = 2e150
    with pytest.raises(DataError, match=r"the first in image 12 \(2e\+150\)"):
        load(x)


def test_a_sample_that_the_flow_cannot_hold_is_named() -> None:
    flow = Flow.build(Config().override({"hidden": [4]}), (2,))
    x = torch.zeros(5, 2, dtype=torch.float64)
    x[3, 0] = -1e300
    flow.chunk = 2
    for use in (flow.log_prob, flow.encode):
        with pytest.raises(DataError, match=r"sample 3 holds 1e\+300, which is infinite in float32"):
            use(x)


def test_a_flow_that_no_memory_holds_is_refused() -> None:
    for settings in ({"blocks": 10**9}, {"hidden": [10**7, 10**7]}):
        with pytest.raises(ConfigError, match=r"take about [\d.e+]+ GiB, and this machine has .*: take fewer blocks"):
            flow_of(**settings)
    with pytest.raises(ConfigError, match="this machine has"):
        Flow.build(Config().override({"blocks": 10**7}), (1, 8, 8), levels=17)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "scales", "factor"), [((3,), "auto", 1), ((1, 16, 16), 2, 3), ((1, 32, 32), "auto", 7)]
)
def test_the_memory_that_a_flow_needs_is_counted(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], scales: Any, factor: int, dtype: str
) -> None:
    """Its weights, within what the scales of an image differ in; and of many small blocks Python's objects."""
    hidden = [2500, 2500] if len(shape) == 1 else [1700, 1700]
    config = Config().override({"hidden": hidden, "dtype": dtype, "blocks": 2, "scales": scales})
    with torch.device("meta"):
        block = network(config, shape, 0)(shape)
    size = 2 * factor * sum(p.numel() for p in block.parameters()) * getattr(torch, dtype).itemsize
    for copies in (1, 4):
        monkeypatch.setattr("pyrnode.parts.memory", lambda copies=copies: int(1.01 * copies * size))
        check_memory(config, shape, 0, copies=copies)
        monkeypatch.setattr("pyrnode.parts.memory", lambda copies=copies: int(0.99 * copies * size))
        with pytest.raises(ConfigError, match="the weights take" if copies == 1 else "what the optimiser keeps"):
            check_memory(config, shape, 0, copies=copies)
    many = config.override({"hidden": [4], "blocks": 10**7})
    monkeypatch.setattr("pyrnode.parts.memory", lambda: 2**37)  # their weights would fit
    with pytest.raises(ConfigError, match="take fewer blocks"):
        check_memory(many, (3,), 0, copies=1)


def test_training_needs_more_room_than_a_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"hidden": [3000, 3000]}  # 36 MB of weights
    monkeypatch.setattr("pyrnode.parts.memory", lambda: 2**26)
    Flow.build(Config().override(settings), (2,))
    with pytest.raises(ConfigError, match="their gradient and what the optimiser keeps"):
        pyrnode.train(table(), **settings, max_steps=1, progress=False, evaluate=False)
    monkeypatch.setattr("pyrnode.parts.memory", lambda: None)  # a system that does not say
    Flow.build(Config().override(settings), (2,))
