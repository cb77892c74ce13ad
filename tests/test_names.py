"""The names of columns: a flow that was trained on names finds its columns by them, wherever they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyrnode
from pyrnode.anomalies import calibrate, score_file
from pyrnode.config import Config
from pyrnode.data import load
from pyrnode.data.frames import ordering
from pyrnode.errors import CheckpointError, ConfigError, DataError
from pyrnode.estimator import RNODEDensity
from pyrnode.export import load as load_export
from pyrnode.flow import Flow

QUICK: dict[str, Any] = {"hidden": [4], "dtype": "float64", "max_steps": 2, "evaluate": False, "progress": False}


def people(n: int = 60) -> pd.DataFrame:
    x = np.random.default_rng(0).normal(size=(n, 2))
    return pd.DataFrame({"weight": 70 + 9 * x[:, 0], "height": 1.7 + 0.1 * x[:, 1]})


def places(n: int = 60) -> pd.DataFrame:
    x = np.random.default_rng(1).normal(size=(n, 2))
    return pd.DataFrame({"east": 5e5 + x[:, 0], "north": x[:, 1]})


@pytest.fixture(scope="module")
def flow() -> Flow:
    return pyrnode.train(people(), **QUICK).flow


@pytest.fixture(scope="module")
def conditional() -> Flow:
    return pyrnode.train(people(), context=places(), **QUICK).flow


class Columns:
    """A table as polars has it: columns with names, and no pandas."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.columns, self._values = list(frame.columns), frame.to_numpy()

    def to_numpy(self) -> Any:
        return self._values

    def __len__(self) -> int:
        return len(self._values)


class WithoutArrow(Columns):
    """polars where pyarrow is missing."""

    def to_pandas(self) -> Any:
        raise ModuleNotFoundError("pa.Table requires 'pyarrow' module to be installed")


def tables(frame: pd.DataFrame) -> list[Any]:
    import pyarrow as pa

    arrow = pa.Table.from_pandas(frame, preserve_index=False)
    given = [frame, arrow, arrow.to_batches()[0], Columns(frame), WithoutArrow(frame)]
    try:
        import polars
    except ImportError:
        return given
    return [*given, polars.DataFrame(frame.to_dict("list"))]


def test_the_flow_has_the_names_and_keeps_them(flow: Flow, conditional: Flow, tmp_path: Path) -> None:
    assert (flow.features, flow.context_features) == (("weight", "height"), None)
    conditional.save(tmp_path / "flow.safetensors")
    read = pyrnode.load(tmp_path / "flow.safetensors")
    assert (read.features, read.context_features) == (("weight", "height"), ("east", "north"))
    module = read.to_torch()
    assert (module.features, module.context_features) == (read.features, read.context_features)
    pyrnode.export.exported.save(module, tmp_path / "module.safetensors", to="safetensors")
    exported = load_export(tmp_path / "module.safetensors")
    assert (exported.features, exported.context_features) == (read.features, read.context_features)


def test_tables_are_put_in_order(flow: Flow) -> None:
    frame = people()
    with torch.no_grad():
        expected = flow.log_prob(frame.to_numpy())
        latents = flow.encode(frame.to_numpy())
        for table in (*tables(frame), *tables(frame[["height", "weight"]])):
            assert torch.equal(flow.log_prob(table), expected)
            assert torch.equal(flow.encode(table), latents)
            assert pyrnode.evaluate(flow, table).score == pyrnode.evaluate(flow, frame.to_numpy()).score
            assert torch.equal(
                load(table).train.tensor(),
                load(np.asarray(table.to_numpy() if hasattr(table, "to_numpy") else table.to_pandas())).train.tensor(),
            )
        assert torch.equal(flow.log_prob(frame.to_numpy()[:, ::-1]), flow.log_prob(frame.to_numpy()[:, [1, 0]]))
        bare = frame.set_axis([0, 1], axis=1)
        assert torch.equal(flow.log_prob(bare), expected)


def test_other_columns_are_refused(flow: Flow) -> None:
    frame = people()
    for table, said in (
        (frame.rename(columns={"weight": "Weight"}), r"missing: 'weight'; superfluous: 'Weight'"),
        (frame.assign(age=range(60)), r"\(superfluous: 'age'\)"),
        (frame[["weight"]], r"\(missing: 'height'\)"),
    ):
        for given in tables(table):
            with pytest.raises(DataError, match=said):
                flow.log_prob(given)
            with pytest.raises(DataError, match=said):
                pyrnode.evaluate(flow, given)
    with pytest.raises(DataError, match="both called 'weight'"):
        flow.log_prob(frame.set_axis(["weight", "weight"], axis=1))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".parquet"])
def test_files_are_put_in_order(flow: Flow, suffix: str, tmp_path: Path) -> None:
    def write(frame: pd.DataFrame, name: str, **settings: Any) -> Path:
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            frame.set_axis(map(str, frame.columns), axis=1).to_parquet(path)
        else:
            frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",", **settings)
        return path

    def scored(path: Path) -> Any:
        score_file(flow, path, tmp_path / "out.csv", chunk=7)
        return pd.read_csv(tmp_path / "out.csv")["log_prob"].to_numpy()

    frame = people()
    expected = flow.log_prob(frame.to_numpy()).detach().numpy()
    swapped = write(frame[["height", "weight"]], "swapped")
    np.testing.assert_allclose(scored(swapped), expected, rtol=1e-12)
    np.testing.assert_allclose(calibrate(flow, swapped).scores, np.sort(expected), rtol=1e-12)
    np.testing.assert_allclose(calibrate(flow, frame[["height", "weight"]]).scores, np.sort(expected), rtol=1e-12)
    np.testing.assert_allclose(scored(write(frame.set_axis([0, 1], axis=1), "numbered")), expected, rtol=1e-12)
    with pytest.raises(DataError, match=r"other\S* has other columns .*missing: 'weight'; superfluous: 'mass'"):
        scored(write(frame.rename(columns={"weight": "mass"}), "other"))
    whole = pyrnode.evaluate(flow, swapped, baselines=False)
    assert whole.score == pyrnode.evaluate(flow, write(frame, "straight"), baselines=False).score


def test_contexts_are_put_in_order(conditional: Flow) -> None:
    x, c = people(), places()
    with torch.no_grad():
        expected = conditional.log_prob(x.to_numpy(), c.to_numpy())
        samples = conditional.sample(2, c.to_numpy(), seed=0)
        for given in (*tables(c), *tables(c[["north", "east"]])):
            assert torch.equal(conditional.log_prob(x[["height", "weight"]], given), expected)
            assert torch.equal(conditional.sample(2, given, seed=0), samples)
            assert torch.equal(conditional.distribution(given).log_prob(torch.tensor(x.to_numpy())), expected)
            report = pyrnode.evaluate(conditional, x, context=given)
            assert report.score == pyrnode.evaluate(conditional, x.to_numpy(), context=c.to_numpy()).score
        with pytest.raises(DataError, match=r"the context has other columns .*missing: 'north'"):
            conditional.log_prob(x, c.rename(columns={"north": "up"}))


def test_a_flow_without_names_counts_by_position() -> None:
    x = people().to_numpy()
    flow = pyrnode.train(x, **QUICK).flow
    assert flow.features is None
    with torch.no_grad():
        for names in (["a", "b"], ["height", "weight"], [0, 1], ["0", "1"]):
            assert torch.equal(flow.log_prob(pd.DataFrame(x, columns=names)), flow.log_prob(x))
        swapped = pd.DataFrame(x)[[1, 0]]  # numbers in another order are names
        assert torch.equal(flow.log_prob(swapped), flow.log_prob(x))
    assert pyrnode.train(pd.DataFrame(x), **QUICK).flow.features is None
    assert pyrnode.train(pd.DataFrame(x)[[1, 0]], **QUICK).flow.features == ("1", "0")


def test_the_estimator_keeps_the_names(tmp_path: Path) -> None:
    x, c = people(), places()
    model = RNODEDensity(hidden=(4,), max_steps=2, random_state=0).fit(x, context=c)
    assert (model.flow_.features, model.flow_.context_features) == (("weight", "height"), ("east", "north"))
    expected = model.score_samples(x, c)
    np.testing.assert_array_equal(model.score_samples(x, c[["north", "east"]]), expected)
    np.testing.assert_array_equal(model.flow_.log_prob(x[["height", "weight"]], c).detach(), expected)
    drawn = model.sample(2, 0, context=c[["north", "east"]])
    np.testing.assert_array_equal(drawn, model.sample(2, 0, context=c.to_numpy()))
    with pytest.raises(DataError, match="context has other columns"):
        model.score_samples(x, c.rename(columns={"north": "up"}))
    with pytest.raises(DataError, match="feature names should match"):  # scikit-learn's rule
        model.score_samples(x[["height", "weight"]], c)


def test_names_that_do_not_fit_are_refused(flow: Flow, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 names of features"):
        Flow.build(Config(), (2,), features=("a", "b", "c"))
    from pyrnode import files

    flow.save(tmp_path / "x.safetensors")
    tensors, description = files.read(tmp_path / "x.safetensors", "flow")
    for bad in (["a"], "ab", [1, 2], {"a": 1}, 3):
        files.write(tmp_path / "x.safetensors", "flow", tensors, description | {"features": bad})
        with pytest.raises(CheckpointError, match="does not describe a flow"):
            pyrnode.load(tmp_path / "x.safetensors")


def test_orderings() -> None:
    assert ordering(("c", "a", "b"), ("a", "b", "c"), "x") == [1, 2, 0]
    assert ordering(None, ("a", "b"), "x") is None
    assert ordering(("b", "a"), None, "x") is None
    assert ordering(("2", "0", "1"), None, "x") == [1, 2, 0]
    assert ordering(("0", "1"), ("1", "0"), "x") == [1, 0]
    assert ordering(("0", "1"), ("a", "b"), "x") is None
    assert ordering(("0", "1", "2"), ("2", "0", "1"), "x") == [2, 0, 1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_numbers_in_another_order_are_names_in_every_table(suffix: str, tmp_path: Path) -> None:
    """A model of columns 1, 0 takes a table whose columns are 0, 1 by name, whatever the table comes in."""
    frame = people().set_axis(["0", "1"], axis=1)
    swapped = frame[["1", "0"]]
    flow = pyrnode.train(swapped, **QUICK).flow
    path = tmp_path / f"table{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    with torch.no_grad():
        expected = flow.log_prob(swapped.to_numpy())
        assert torch.equal(flow.log_prob(frame), expected)
        assert torch.equal(flow.log_prob(frame.set_axis([0, 1], axis=1)), expected)
    assert pyrnode.evaluate(flow, frame).score == pyrnode.evaluate(flow, swapped).score
    score_file(flow, path, tmp_path / "scores.parquet")
    scores = pd.read_parquet(tmp_path / "scores.parquet")["log_prob"].to_numpy()
    assert np.allclose(scores, expected.numpy(), atol=1e-9)
    assert load(path).ordered(flow.features, None).features == ("1", "0")
