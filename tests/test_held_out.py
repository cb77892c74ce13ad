"""Validation samples of the user's own: in `train`, in the estimator and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import RNODEDensity
from pyrnode.cli import main
from pyrnode.data import DatasetSamples, Splits, load
from pyrnode.errors import CheckpointError, DataError
from pyrnode.training import TrainingResult
from pyrnode.transforms import Standardize
from tests.small_runs import SMALL, assert_same_weights, validations

QUIET = {"evaluate": False, "progress": False, **SMALL, "max_steps": 8}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, C = random(200, 3), random(200, 2, seed=1)
HELD, HELD_C = random(30, 3, seed=2) * 4 + 5, random(30, 2, seed=3) * 4


def train(data: Any = X, **settings: Any) -> TrainingResult:
    return pyrnode.train(data, **{**QUIET, **settings})


def sorted_rows(x: Tensor) -> Tensor:
    return x.unique(dim=0)


# -- train -----------------------------------------------------------------------------------------------------------


def test_the_score_is_that_of_the_rows_and_the_best_flow_is_chosen_by_it() -> None:
    result = train(X, context=C, validation=HELD, validation_context=HELD_C, dtype="float64")
    found = [record["validation"] for record in validations(result.history)]
    with torch.no_grad():
        score = result.flow.log_prob(HELD, HELD_C).mean() / -3
    assert float(score) == pytest.approx(min(found), abs=1e-9)


def test_they_are_neither_trained_on_nor_standardised_by() -> None:
    """All that is learned is the same whatever they are, but for what is chosen by them."""
    results = [train(validation=held, validate_every=8) for held in (HELD, HELD * 1000 + 7)]
    assert_same_weights(*[result.flow for result in results])
    splits = load(X, validation=HELD)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (180, 30, 20)
    assert torch.equal(sorted_rows(splits.validation.tensor()), sorted_rows(HELD))
    others = torch.cat([splits.train.tensor(), splits.test.tensor()])
    assert torch.equal(sorted_rows(others), sorted_rows(X))  # every sample, and no other
    assert torch.equal(splits.test.tensor(), load(X).test.tensor())  # a run is evaluated without them
    scale = next(t for t in results[0].flow.transform.transforms if isinstance(t, Standardize))
    mean, std = (getattr(scale, name).flatten() for name in ("mean", "std"))
    assert mean.tolist() == pytest.approx(splits.train.tensor().mean(0).tolist(), abs=1e-6)
    assert std.tolist() == pytest.approx(splits.train.tensor().std(0, correction=0).tolist(), rel=1e-5)


def test_rows_travel_with_their_contexts_and_none_comes_first() -> None:
    rows = torch.arange(3000.0).reshape(-1, 1).expand(-1, 3)
    splits = load(X, context=C, validation=rows, validation_context=rows[:, :2] + 0.5)
    held = splits.validation
    assert held.context is not None
    assert torch.equal(held.tensor()[:, :2] + 0.5, held.context)
    assert 1400 < float(held.tensor()[:200].mean()) < 1600  # a validation looks at the first ones


def test_contexts_are_put_in_the_order_of_the_samples() -> None:
    given, held = (pd.DataFrame(c.numpy(), columns=["east", "north"]) for c in (C, HELD_C))
    splits = load(X, context=given, validation=HELD, validation_context=held)
    swapped = load(X, context=given, validation=HELD, validation_context=held[["north", "east"]])
    assert splits.validation.context is not None
    assert swapped.validation.context is not None
    assert torch.equal(swapped.validation.context, splits.validation.context)
    assert torch.equal(sorted_rows(swapped.validation.context), sorted_rows(HELD_C))


def test_a_number_is_the_share_of_the_samples() -> None:
    result = train(validation=0.25)
    assert result.config.data.validation == 0.25
    assert_same_weights(result.flow, train(**{"data.validation": 0.25}).flow)


@pytest.mark.parametrize("kind", ["array", "tensor of float64", "integers", "frame", "csv", "npy", "npz", "dataset"])
def test_rows_come_as_data_does(kind: str, tmp_path: Path) -> None:
    data, held = pd.DataFrame(X.numpy(), columns=list("abc")), HELD.round()
    turned = pd.DataFrame(held.numpy()[:, [2, 0, 1]], columns=list("cab"))
    np.save(tmp_path / "a.npy", held.numpy())
    np.savez(tmp_path / "a.npz", held=held.numpy())
    turned.to_csv(tmp_path / "a.csv", index=False)
    given = {
        "array": held.numpy(),
        "tensor of float64": held.double(),
        "integers": held.long(),
        "frame": turned,
        "dataset": torch.utils.data.TensorDataset(held),
    }.get(kind, tmp_path / f"a.{kind}")
    splits = load(data, validation=given)
    assert isinstance(splits.validation, DatasetSamples) == (kind == "dataset")
    assert len(splits.validation) == 30
    assert torch.equal(sorted_rows(splits.validation.tensor().float()), sorted_rows(held))


def test_a_single_row_will_do_and_images_keep_their_levels() -> None:
    assert len(load(X, validation=HELD[:1]).validation) == 1
    pixels = torch.randint(0, 256, (40, 4, 4), dtype=torch.uint8)
    splits = load(pixels, validation=pixels[:3].long())
    assert splits.validation.tensor().dtype == torch.uint8
    assert splits.validation.tensor().shape == (3, 1, 4, 4)


FRAME = pd.DataFrame(X.numpy(), columns=list("abc"))
PIXELS = torch.zeros(40, 4, 4, dtype=torch.uint8)
NAN = torch.full((30, 3), torch.nan)
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (X, {"validation": HELD[:, :2]}, r"validation has shape \(30, 2\): expected \(n, 3\)"),
    (X, {"validation": HELD[0]}, r"validation has shape \(3,\): expected \(n, 3\)"),
    (X, {"validation": HELD[:0]}, r"validation is empty: shape \(0, 3\); give it rows, or leave it out"),
    (X, {"validation": NAN}, "validation has 90 NaN or infinite values, the first in row 0, column 0: remove"),
    (X, {"validation": "mnist"}, "validation = 'mnist': there is no file or folder of that name; pass rows, or a path"),
    (X, {"validation": __file__}, r"validation = .*test_held_out.py': expected one of .npy, .npz"),
    (X, {"validation": object()}, "validation of type object: expected numbers"),
    (
        random(40, 4, 4),
        {"validation": torch.utils.data.TensorDataset(PIXELS)},
        "validation has items of type torch.uint8",
    ),
    (
        FRAME,
        {"validation": FRAME.rename(columns={"a": "z"})},
        "validation has other columns .*missing: 'a'; superf.*'z'",
    ),
    (PIXELS, {"validation": PIXELS.float()}, "validation holds floating-point values, and array integers 0 .. 255"),
    (PIXELS, {"validation": PIXELS.long() + 300}, r"validation has values 300 .. 300, but levels = 256 allows"),
    (X, {"validation_context": HELD_C}, "validation_context is given, but no validation: pass the rows"),
    (X, {"validation": HELD, "validation_context": HELD_C}, "validation_context is given, but no context for array"),
    (X, {"validation": HELD, "context": C}, r"array has a context, .* validation_context of shape \(30, 2\)"),
    (X, {"validation": HELD, "context": C, "validation_context": HELD_C[:9]}, r"shape \(9, 2\): expected \(30, 2\)"),
    (X, {"validation": HELD, "context": C, "validation_context": HELD_C / 0}, "validation_context has 60 NaN or inf"),
    (load(X), {"validation": HELD}, "Splits have validation samples of their own: leave validation out"),
]


@pytest.mark.parametrize(("data", "arguments", "message"), BAD, ids=range(len(BAD)))
def test_what_is_of_no_use_is_refused(data: Any, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        train(data, **arguments, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_with_validation_samples_of_its_own_takes_no_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train=X.numpy(), validation=HELD.numpy(), test=HELD.numpy())
    with pytest.raises(DataError, match="a has validation samples of its own: leave validation out"):
        load(tmp_path / "a.npz", validation=HELD)
    with pytest.raises(DataError, match=r"validation = .*a.npz': expected one of"):
        load(X, validation=tmp_path / "a.npz")


def test_values_outside_of_bounds_are_found_in_the_rows_as_given() -> None:
    held = HELD.clone().clamp(-50, 50)
    held[17, 1] = 70.0
    with pytest.raises(DataError, match=r"array \(validation split\): column 1 has 1 of 30 values .* 17: 70"):
        train(validation=held, bounds={1: (-60, 60)})


def test_rows_that_are_trained_on_too_are_remarked_on(capsys: pytest.CaptureFixture[str]) -> None:
    train(X, validation=X)
    assert "180 of 200 validation samples are training samples too" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_rows_alone(tmp_path: Path) -> None:
    whole = train(context=C, validation=HELD, validation_context=HELD_C, out=tmp_path / "whole")
    given = {"context": C, "validation": HELD, "validation_context": HELD_C, "out": tmp_path / "run"}
    train(**given, max_steps=3)
    one, moved = HELD.clone(), HELD_C.clone()
    one[4, 1] += 1e-5
    moved[4, 1] += 1e-5
    for changed in ({"validation": one}, {"validation_context": moved}, {"validation": HELD.flip(0)}):
        with pytest.raises(CheckpointError, match="as many samples, 180, but other values, there or in those that it"):
            train(**given | changed, resume=True)
    without = {"context": C, "out": tmp_path / "run", "resume": True}
    with pytest.raises(CheckpointError, match="trained on 180 samples, not 160: pass the data, and the validation"):
        train(**without)
    assert_same_weights(train(**given, resume=True).flow, whole.flow)


def test_the_command_line_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("x", X), ("held", HELD)):
        np.save(tmp_path / f"{name}.npy", rows.numpy())
    settings = [f"--set={key}={value}" for key, value in (SMALL | {"max_steps": 4}).items()]
    settings = [text.replace("constant", "'constant'") for text in settings]
    command = [
        "train",
        str(tmp_path / "x.npy"),
        "--out",
        str(tmp_path / "run"),
        *settings,
        "--no-evaluation",
        "--quiet",
    ]
    assert main([*command, "--validation", str(tmp_path / "held.npy")]) == 0
    flow = pyrnode.load(tmp_path / "run")
    found = [r["validation"] for r in validations(pyrnode.runs.read_metrics(tmp_path / "run"))]
    with torch.no_grad():
        assert float(flow.log_prob(HELD).mean() / -3) == pytest.approx(min(found), abs=1e-5)
    assert main([*command, "--resume"]) != 0
    assert "trained on 180 samples, not 160: pass the data, and the validation samples" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0  # its test set is what it was


# -- the estimator ---------------------------------------------------------------------------------------------------

FIT: dict[str, Any] = {"hidden": (8,), "max_steps": 20, "random_state": 0, "dtype": "float64"}


def fit(*, weight: Any = None, context: Any = None, **held: Any) -> RNODEDensity:
    return RNODEDensity(**FIT).fit(X.numpy(), sample_weight=weight, context=context, **held)


def best(model: RNODEDensity) -> float:
    return min(record["validation"] for record in validations(model.history_))


def test_the_estimator_chooses_by_them_with_contexts_and_weights() -> None:
    weight = np.abs(HELD_C[:, 0].numpy()) * (np.arange(30) > 3)
    held = {"X_val": HELD.numpy(), "context_val": HELD_C.numpy(), "sample_weight_val": weight}
    model = fit(context=C.numpy(), **held)
    scores = model.score_samples(HELD.numpy(), context=HELD_C.numpy())
    assert -np.average(scores, weights=weight) / 3 == pytest.approx(best(model), abs=1e-9)
    plain = fit(X_val=HELD.numpy())
    assert -plain.score(HELD.numpy()) / 90 == pytest.approx(best(plain), abs=1e-9)


def test_the_estimator_trains_on_all_other_samples_and_never_on_them() -> None:
    once = RNODEDensity(**FIT, overrides={"validate_every": 20, "standardize": "scale"})
    flows = [once.fit(X.numpy(), X_val=held.numpy()).flow_ for held in (HELD, HELD * 1000 - 3)]
    assert_same_weights(*flows)
    assert flows[0].transform.transforms[0].mean.tolist() == pytest.approx(X.double().mean(0).tolist(), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"X_val": HELD[:, :2]}, r"X_val: X has 2 features, but RNODEDensity is expecting 3"),
        ({"X_val": HELD[:0]}, r"X_val: Found array with 0 sample"),
        ({"X_val": NAN}, r"X_val: Input X contains"),
        ({"X_val": HELD, "context_val": HELD_C}, "context_val is given, but no context: give both, or neither"),
        ({"X_val": HELD, "context": C}, "context is given, but no context_val: give both, or neither"),
        (
            {"X_val": HELD, "context": C, "context_val": HELD_C[:9]},
            r"context_val has shape \(9, 2\): expected \(30, m\)",
        ),
        ({"X_val": HELD, "context": C, "context_val": HELD_C[:, :1]}, "context_val has 1 features, context 2: give it"),
        ({"X_val": HELD, "context": C, "context_val": NAN[:, :2]}, "context_val contains"),
        ({"X_val": HELD, "sample_weight_val": np.ones(4)}, r"sample_weight_val has shape \(4,\): expected \(30,\)"),
        ({"X_val": HELD, "sample_weight_val": np.zeros(30)}, "sample_weight_val: all weights are zero"),
        ({"context_val": HELD_C}, "context_val is given, but no X_val: pass the samples that it belongs to"),
        ({"sample_weight_val": np.ones(30)}, "sample_weight_val is given, but no X_val"),
    ],
)
def test_the_estimator_says_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    given = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with pytest.raises(DataError, match=message):
        fit(**given)


def test_columns_of_a_context_are_found_by_name() -> None:
    frame = pd.DataFrame(C.numpy(), columns=["u", "v"])
    turned = pd.DataFrame(HELD_C.numpy()[:, ::-1], columns=["v", "u"])
    assert best(fit(context=frame, X_val=HELD.numpy(), context_val=turned)) == best(
        fit(context=C.numpy(), X_val=HELD.numpy(), context_val=HELD_C.numpy())
    )


def test_splits_keep_their_own() -> None:
    splits = load(X)
    held = Splits("mine", splits.train, load(HELD).train, splits.test, (3,))
    assert len(train(held).history) == 10
