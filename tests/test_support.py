"""What has no density, or stands in two splits, is said once, by column and count; nothing is refused."""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode.data import Splits, TensorSamples, load
from pyrnode.data.support import SupportWarning, remarks
from pyrnode.estimator import RNODEDensity

QUICK: dict[str, Any] = {"hidden": [4], "max_steps": 2, "progress": False}
RNG = np.random.default_rng(0)
A, B, C = RNG.normal(size=(3, 400))
K = RNG.integers(0, 3, 400)

FOUND: dict[str, tuple[dict[str, Any], str]] = {
    "a copy": ({"a": A, "b": B, "c": A}, r"column '[ac]' is a copy, or a multiple, of '[ac]'"),
    "other units": ({"a": A, "b": B, "c": 2.54 * A + 3}, r"column '[ac]' is a copy, or a multiple, of '[ac]'"),
    "a sum": ({"a": A, "b": B, "c": A + B}, r"column '[abc]' is a linear combination of '[abc]', '[abc]'"),
    "a sum far from zero": ({"a": A + 1e6, "b": B, "c": A + B}, r"is a linear combination of"),
    "shares": ({"a": A, "b": B, "c": C, "d": 1 - A - B - C}, r"is a linear combination of '\w', '\w', '\w'"),
    "one-hot": ({"a": A, **{f"is{i}": (i == K) * 1.0 for i in range(3)}}, r"columns 'is0', 'is1', 'is2' \(3 of 4\)"),
    "classes": ({"a": A, "k": K * 1.0}, r"column 'k' \(of 2\) has values that recur \(the commonest in 3\d%"),
    "row numbers": ({"a": A, "id": np.arange(400.0)}, r"column 'id' numbers the rows: drop it"),
    "a code": (
        {"a": A, "b": np.where((K == 2) & (A > 1), -999.0, B)},
        r"column 'b': -999, in \d+ of \d+ rows, is far from",
    ),
    "a mistake": ({"a": A, "b": np.where(A > 1.5, 1e9 * A, B)}, r"column 'b': .* ranges from"),
    "zeros": ({"a": A, "rain": np.maximum(B, 0)}, r"column 'rain' \(of 2\) has values that recur"),
}


def of(columns: dict[str, Any], dtype: Any = np.float64) -> list[str]:
    return remarks(load(pd.DataFrame(columns).astype(dtype)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", FOUND)
def test_columns_without_a_density(name: str, dtype: Any) -> None:
    columns, message = FOUND[name]
    if name == "a sum far from zero" and dtype == np.float32:
        return  # whose rounding, 0.06, is no small part of it
    (said,) = of(columns, dtype)
    assert re.search(message, said), said


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nothing_is_said_of_ordinary_data(dtype: Any) -> None:
    for columns in (
        {"a": A, "b": B, "c": C},
        {"a": A, "b": A + 1e-2 * B},
        {"a": A, "b": np.exp(A)},
        {"a": 1e-9 * A, "b": 1e9 * B},
        {"a": A.round(2), "b": B},
        {"a": A[:12], "b": B[:12]},
        {"a": np.exp(2 * A), "b": RNG.standard_t(2, 400)},
    ):
        assert of(columns, dtype) == []
    for name in ("8gaussians", "two-bumps", "moons", "digits"):
        assert [text for text in remarks(load(name)) if "no density" in text] == []


@pytest.mark.parametrize(("heaviest", "count"), [(1e30, "1 of"), (1e3, "1.69 of"), (30.0, None)])
def test_weights_of_which_one_is_all(heaviest: float, count: str | None) -> None:
    weight = torch.ones(400)
    weight[5] = heaviest
    splits = split(torch.randn(400, 2, generator=torch.Generator().manual_seed(0)))
    splits = replace(splits, train=splits.train.carrying(weight=weight[:300]))
    found = [text for text in remarks(splits) if text.startswith("weights")]
    assert len(found) == (count is not None)
    if count is not None:
        assert re.search(rf"times their mean, so that 300 training samples count as {count}", found[0]), found


def split(x: Tensor, c: Tensor | None = None) -> Splits:
    """Parts of 300, 50 and 50."""
    parts = TensorSamples(x).carrying(context=c)
    rows = torch.arange(len(x)).split([300, 50, 50])
    return Splits("x", *map(parts.take, rows), event_shape=tuple(x.shape[1:]))  # type: ignore[arg-type]


def test_rows_of_two_splits() -> None:
    x = torch.from_numpy(np.stack([A, B], 1)[:400])
    assert remarks(split(x)) == []
    x[-3:] = x[5]
    x[310] = x[7]
    first, second = remarks(split(x))
    assert "1 of 50 validation samples are training samples" in first
    assert "3 of 50 test samples are training samples" in second
    c = torch.randn(400, 1)
    assert remarks(split(x, c)) == []  # other contexts
    images = torch.randint(0, 256, (400, 1, 3, 3), dtype=torch.uint8)
    images[399] = images[0]
    assert remarks(split(images)) == [
        "repeated rows: 1 of 50 test samples are training samples too, so their scores say little of new data"
    ]
    signs = torch.randn(400, 2).double()  # rows that differ in signs alone are others
    signs[300:] = -signs[:100]
    assert remarks(split(signs)) == []


def test_it_is_said_once_in_the_report_and_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    result = pyrnode.train(pd.DataFrame({"a": A, "b": B, "c": A + B}), **QUICK)
    assert result.report is not None
    (note,) = [note for note in result.report.notes if "linear combination" in note]
    assert result.notes == [note]
    assert note in str(result.report)
    assert capsys.readouterr().err.count("is a linear combination of") == 1


def test_the_estimator_warns() -> None:
    with pytest.warns(SupportWarning, match="linear combination") as record:
        RNODEDensity(hidden=(4,), max_steps=2).fit(np.stack([A, B, A + B], 1))
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RNODEDensity(hidden=(4,), max_steps=2, validation_fraction=0).fit(np.stack([A, B], 1))


def test_a_million_rows_are_quick() -> None:
    x = torch.randn(1_000_000, 8)
    splits = Splits("x", *map(TensorSamples, x.split([800_000, 100_000, 100_000])), event_shape=(8,))  # type: ignore[arg-type]
    start = time.process_time()
    assert remarks(splits) == []
    assert time.process_time() - start < 10


# --- contexts that do not vary ---------------------------------------------------------------------------------------


def test_a_context_may_be_constant(capsys: pytest.CaptureFixture[str]) -> None:
    """The density is that of a flow without the column: the dynamics see 0 of it."""
    x, c = np.stack([A, B], 1), pd.DataFrame({"c": C, "fixed": np.full(400, 0.1)})
    result = pyrnode.train(x, context=c, **QUICK)
    assert result.report is not None
    assert sum("'fixed' (of 2) has the same value" in note for note in result.report.notes) == 1
    assert capsys.readouterr().err.count("'fixed' (of 2) has the same value") == 1
    standardised, _ = result.flow.context_transform(torch.tensor([[0.0, 0.1], [0.0, 1.1]], dtype=torch.float64))
    assert standardised[:, 1].tolist() == [0.0, 1.0]
    with pytest.warns(SupportWarning, match="has the same value"):
        model = RNODEDensity(hidden=(4,), max_steps=2).fit(x, context=c)
    assert np.isfinite(model.score_samples(x, c)).all()
