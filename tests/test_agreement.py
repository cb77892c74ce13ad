"""Disagreement against the step: solvers converge with their orders, and the picture shows what was found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrnode import agreement, evaluation
from pyrnode.agreement import Disagreement
from pyrnode.config import Config
from pyrnode.errors import ConfigError, DataError, EngineUnavailableError, SolverError
from pyrnode.flow import Flow

STEPS = (0.25, 0.125)


def bent(d: int = 2, *, context_dim: int = 0, **settings: object) -> Flow:
    """A flow that moves, with an accurate solver that is far more accurate than any step here."""
    accurate = {
        "evaluation.solver.rtol": 1e-11,
        "evaluation.solver.atol": 1e-11,
        "solver.name": "RK4",
        "solver.step_size": 0.25,
    }
    config = Config().override({"dtype": "float64", "hidden": [8], "activation": "tanh", **accurate, **settings})
    flow = Flow.build(config, (d,), context_dim=context_dim)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return flow


def test_each_solver_converges_with_its_order() -> None:
    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flow = bent()
    rows = agreement.disagreement_by_step(flow, x, steps=STEPS)
    *fixed, trained = rows
    assert trained == Disagreement("RK4", 0.25, 16.0, next(r.nats for r in fixed if r.solver == "RK4"), True)
    for name, order in (("Euler", 1), ("Midpoint", 2), ("RK4", 4), ("DP5", 5)):
        coarse, fine = (row for row in fixed if row.solver == name)
        assert (coarse.step, fine.step) == STEPS
        assert coarse.nats is not None
        assert fine.nats is not None
        assert math.log2(coarse.nats / fine.nats) == pytest.approx(order, abs=0.6), name
    accurate = flow.log_prob(x).detach()
    for row in fixed:
        given = {"name": row.solver, "step_size": row.step, "adaptive": False}
        off = (flow.log_prob(x, solver=given).detach() - accurate).abs().mean() / 2
        assert row.nats == pytest.approx(float(off), rel=1e-6)


def test_the_steps_are_shares_of_a_blocks_time_and_contexts_are_taken() -> None:
    flow = bent(context_dim=1, **{"flow.end_time": 0.5})
    x, context = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    rows = agreement.disagreement_by_step(flow, x, context=context, names=["Euler"], steps=[1.0, 0.5])
    assert [(row.step, row.nfe) for row in rows if not row.trained] == [(0.5, 1.0), (0.25, 2.0)]
    with pytest.raises(DataError, match="conditional on 1 features"):
        agreement.disagreement_by_step(flow, x)


def test_discrete_data_shares_its_noise() -> None:
    """With other noise for each solver the difference would be that of dequantisation, not of the solver."""
    flow = Flow.build(Config().override({"dtype": "float64", "hidden": [3], "blocks": 1}), (1, 4, 4), levels=5)
    x = torch.randint(0, 5, (8, 1, 4, 4), dtype=torch.uint8)
    rows = agreement.disagreement_by_step(flow, x, names=["RK4"])
    assert all(row.nats is not None and row.nats < 1e-9 for row in rows)  # an untrained flow does not move


def test_a_solver_that_fails_is_told_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    original = evaluation.measure

    def failing(flow: Flow, x: Tensor, solver: object, **more: object) -> object:
        if solver.name == "Euler" and solver.step_size == 0.25:  # type: ignore[attr-defined]
            raise SolverError("no", status="Unstable")
        return original(flow, x, solver, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "measure", failing)
    rows = agreement.disagreement_by_step(bent(), torch.randn(5, 2, dtype=torch.float64), names=["Euler"], steps=STEPS)
    assert rows[0] == Disagreement("Euler", 0.25, None, None)
    axes = agreement.disagreement_plot(rows).axes[0]
    assert axes.lines[0].get_label() == "Euler (1 failed)"
    assert axes.lines[0].get_xdata().tolist() == [0.125]


def test_the_picture_shows_what_was_found() -> None:
    rows = [
        Disagreement("Euler", 1.0, 1.0, 0.5),
        Disagreement("Euler", 0.5, 2.0, 0.2),
        Disagreement("RK4", 1.0, 4.0, 0.01),
        Disagreement("RK4", 0.5, 8.0, 0.0),  # which has no logarithm
        Disagreement("DP5", 0.25, 24.0, 0.003, True),
    ]
    for unit, scale in (("nats/dim", 1.0), ("bits/dim", 1 / math.log(2))):
        axes = agreement.disagreement_plot(rows, unit=unit, tolerance=0.02).axes[0]
        euler, rk4, star, line = axes.lines
        np.testing.assert_allclose(euler.get_xydata(), [[1.0, 0.5 * scale], [0.5, 0.2 * scale]])
        np.testing.assert_allclose(rk4.get_xydata(), [[1.0, 0.01 * scale]])
        np.testing.assert_allclose(star.get_xydata(), [[0.25, 0.003 * scale]])
        assert star.get_label() == "training: DP5, step 0.25"
        np.testing.assert_allclose(line.get_ydata(), 0.02 * scale)
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_ylabel() == f"from the accurate solver ({unit})"
        looks = {(a.get_color(), a.get_linestyle(), a.get_marker()) for a in (euler, rk4)}
        assert len({part for look in looks for part in look}) == 6  # they differ in colour, line and marker


def test_bad_input_is_named() -> None:
    x = torch.zeros(2, 2)
    with pytest.raises(ConfigError, match=r"steps = \(2\.0,\): expected shares"):
        agreement.disagreement_by_step(bent(), x, steps=[2.0])
    with pytest.raises(EngineUnavailableError, match="unknown solver of the PyTorch engine 'RK5'"):
        agreement.disagreement_by_step(bent(), x, names=["RK5"])
    with pytest.raises(ConfigError, match="unknown unit 'nats'"):
        agreement.disagreement_plot([Disagreement("Euler", 1.0, 1.0, 0.5)], unit="nats")
    with pytest.raises(DataError, match="none of 1 solvers"):
        agreement.disagreement_plot([Disagreement("Euler", 1.0, None, None)])
