"""What a run's folder says of its evaluation, and that nothing a result can do without ever costs it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

import pyrnode
from pyrnode import agreement, comparisons, evaluate, reports
from pyrnode.config import Config, EvaluationConfig
from pyrnode.data import Splits, TensorSamples
from pyrnode.evaluation import Report
from pyrnode.flow import Flow
from pyrnode.reports import write_report
from pyrnode.runs import RunFolder

LEVELS = 5


def build(shape: tuple[int, ...], levels: int | None) -> Flow:
    config = Config().override({"hidden": [3], "blocks": 1, "alpha": 0.03, "dtype": "float64"})
    return Flow.build(config, shape, levels=levels).requires_grad_(False)


# -- extras ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 11, 12, 13, 14])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_handful_of_rows_is_a_result(n: int, d: int, tmp_path: Path) -> None:
    """One row is left for validation, to which no baseline can be fitted: the report says so."""
    settings = {"hidden": [4], "max_steps": 2, "batch_size": 8}
    result = pyrnode.train(torch.randn(n, d), out=tmp_path, **settings, progress=False)
    assert result.report is not None
    assert result.report.samples == 1
    assert result.report.baselines == {}
    assert result.report.notes[0] == "the baselines: left out (validation has 1 samples: expected at least 2)"
    assert [note for note in result.report.notes if "picture" in note] == []  # one row has no window: the samples have
    assert (tmp_path / "density.png").exists() == (d < 3)
    assert result.notes == []
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert stored["notes"] == result.report.notes
    assert result.report.notes[0] in (tmp_path / "report.txt").read_text()
    assert torch.equal(pyrnode.load(tmp_path).log_prob(torch.zeros(2, d)), result.flow.log_prob(torch.zeros(2, d)))


def fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("of another's making")


@pytest.mark.parametrize(
    ("where", "note"),
    [
        ("pyrnode.baselines.fit_baselines", "the baselines"),
        ("pyrnode.plotting.learning_curves", "the learning curves"),
        ("pyrnode.plotting.density_2d", "the pictures of the density"),
        ("pyrnode.particles.trajectories", "the pictures of the density"),
        ("pyrnode.comparisons.calibration_plot", "the calibration plot"),
        ("pyrnode.agreement.disagreement_plot", "the picture of solvers"),
        ("pyrnode.evaluation._Scorer.inversion_error", "the inversion error"),
        ("pyrnode.data.support.remarks", "the remarks on the data's support"),
    ],
)
def test_an_extra_that_fails_is_a_note(where: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, fails)
    settings = {"hidden": [4], "max_steps": 2, "samples": 100}
    result = pyrnode.train("8gaussians", out=tmp_path, **settings, progress=False)
    assert result.report is not None
    assert result.report.notes == [f"{note}: left out (of another's making)"]
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == result.report.notes
    assert math.isfinite(result.report.score.nats)


@pytest.mark.parametrize(
    ("where", "lost"),
    [
        ("pyrnode.evaluation._Scorer.score", ["the report"]),
        ("pyrnode.runs.RunFolder.write_text", ["the report", "the model card"]),
    ],
)
def test_a_report_that_fails_is_a_note_of_the_result(
    where: str, lost: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"hidden": [4], "max_steps": 2, "samples": 100}
    original = pyrnode.evaluation.evaluate

    def evaluate_with_a_fault(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(where, fails)
        return original(*arguments, **more)

    monkeypatch.setattr(pyrnode.evaluation, "evaluate", evaluate_with_a_fault)
    result = pyrnode.train("8gaussians", out=tmp_path, **settings, progress=False)
    assert result.notes == [f"{what}: left out (of another's making)" for what in lost]
    said = capsys.readouterr().err
    assert all(note in said for note in result.notes)
    assert torch.equal(pyrnode.load(tmp_path).log_prob(torch.zeros(2, 2)), result.flow.log_prob(torch.zeros(2, 2)))


# -- what is written -------------------------------------------------------------------------------------------------


def test_a_report_is_json() -> None:
    x = torch.randint(0, LEVELS, (4, 1, 4, 4), dtype=torch.uint8)
    report = evaluate(build((1, 4, 4), LEVELS), x, config=EvaluationConfig(draws=1))
    table = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert table["score"]["bits"] == report.score.bits
    assert table["score"]["bits_error"] is None
    assert set(table) == set(Report.__dataclass_fields__)


@pytest.mark.parametrize(
    ("values", "levels", "pictures"),
    [
        (torch.randint(0, LEVELS, (30, 1, 4, 4), dtype=torch.uint8), LEVELS, {"curves.png", "samples.png"}),
        (torch.randn(30, 1), None, {"curves.png", "density.png", "trajectories.png", "calibration.png"}),
        (torch.randn(30, 2), None, {"curves.png", "density.png", "trajectories.png", "calibration.png"}),
        (torch.randn(30, 3), None, {"curves.png", "pairs.png", "calibration.png"}),
    ],
    ids=["images", "1-D", "2-D", "3-D"],
)
def test_pictures_are_written_where_there_is_something_to_see(
    tmp_path: Path, values: Tensor, levels: int | None, pictures: set[str]
) -> None:
    from PIL import Image

    flow, parts = build(tuple(values.shape[1:]), levels), [TensorSamples(part) for part in values.split(10)]
    splits = Splits("test data", *parts, event_shape=tuple(values.shape[1:]), levels=levels)
    history = [{"step": 1, "loss": 2.0, "nll": 2.0, "bits": 3.0, "E": 0.1, "n": 0.1, "nfe": 16.0, "seconds": 0.1}]
    history += [{"step": 1, "validation": 2.0, "validation_bits": 3.0, "disagreement": 0.0, "step_size": 0.25}]
    history += [{"step": 1, "event": "restart", "cause": "step 2", "refinement": 1}]
    report = evaluate(flow, splits, baselines=False)
    write_report(RunFolder(tmp_path), flow, splits, report, history)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.txt", *pictures}
    for name in pictures:
        with Image.open(tmp_path / name) as image:
            image.load()
            assert min(image.size) > 16


@pytest.mark.parametrize(
    ("data", "levels", "pictures"),
    [
        (torch.randint(0, 5, (200, 2)), 5, {"curves.png", "solvers.png"}),
        (torch.randint(0, 9, (60, 2, 4, 4), dtype=torch.uint8), 9, {"curves.png", "solvers.png"}),
        (torch.randint(0, 9, (60, 3, 4, 4), dtype=torch.uint8), 9, {"curves.png", "samples.png", "solvers.png"}),
        (
            torch.randn(200, 2),
            None,
            {"curves.png", "solvers.png", "density.png", "trajectories.png", "calibration.png"},
        ),
        (torch.randn(200, 4), None, {"curves.png", "solvers.png", "pairs.png", "calibration.png"}),
    ],
)
def test_a_run_draws_what_can_be_drawn(data: Tensor, levels: int | None, pictures: set[str], tmp_path: Path) -> None:
    overrides = {"max_steps": 2, "hidden": (4,), "data.levels": levels, "evaluation.draws": 1, "grid": 4}
    pyrnode.train(data, out=tmp_path / "run", **overrides, progress=False)
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == pictures


@pytest.mark.parametrize(("d", "context"), [(1, 0), (3, 2), (9, 0)])
def test_calibration_is_of_the_first_latents_and_of_all_together(
    d: int, context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(comparisons, "calibration_plot", lambda pit, names: told.append((pit, names)) or Figure())
    flow = Flow.build(Config().override({"hidden": [3], "dtype": "float64"}), (d,), context_dim=context)
    samples = TensorSamples(torch.randn(2100, d, dtype=torch.float64))
    c = torch.randn(2100, context, dtype=torch.float64) if context else None
    part = samples if c is None else samples.carrying(context=c)
    splits = Splits("test data", part, part, part, (d,))
    write_report(RunFolder(tmp_path), flow.requires_grad_(False), splits, evaluate(flow, splits, baselines=False), [])
    ((pit, names),) = told
    z = flow.encode(samples.tensor()[:2000], None if c is None else c[:2000])
    shown = min(d, 6)
    assert names == [f"$z_{{{i + 1}}}$" for i in range(shown)] + (["$|z|^2$"] if d > 1 else [])
    np.testing.assert_allclose(pit[:, :shown], stats.norm.cdf(z[:, :shown]), atol=1e-12)
    if d > 1:
        np.testing.assert_allclose(pit[:, -1], stats.chi2(d).cdf(z.square().sum(1)), atol=1e-12)


def test_of_julias_solvers_the_training_solver_alone_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each other one would be compiled first."""
    told: list[Any] = []
    monkeypatch.setattr(agreement, "disagreement_plot", lambda rows, **more: told.append((rows, more)) or Figure())
    flow = build((2,), None)
    flow.config = flow.config.override({"solver.name": "RK4", "solver.step_size": 0.5, "tolerance": 0.03})
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(0.3)
    splits = Splits("test data", *[TensorSamples(torch.randn(100, 2))] * 3, event_shape=(2,))
    for name, expected in (("torch", {"Euler", "Midpoint", "RK4", "DP5"}), ("julia", {"RK4"})):
        monkeypatch.setattr(type(flow.engine), "name", name)
        reports._draw_solvers(RunFolder(tmp_path), flow, splits)
        rows, more = told.pop()
        assert {row.solver for row in rows} == expected
        assert [row.step for row in rows if row.trained] == [0.5]
        assert more == {"unit": "nats/dim", "tolerance": 0.03}
