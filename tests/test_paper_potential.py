"""`reproduce potential`: the flows that the paper leaves out, what its numbers mean, and by which rules it judges."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pyrnode
from pyrnode import particles
from pyrnode.config import Config
from pyrnode.errors import TrainingDivergedError
from pyrnode.flow import Flow
from pyrnode.paper import SCALES, Finding, potential
from pyrnode.paper.scales import LABELS, POTENTIALS
from pyrnode.paper.study import Need, Study
from pyrnode.runs import read_metrics

TINY = SCALES["tiny"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finding]:
    out = tmp_path_factory.mktemp("potential")
    (finding,) = pyrnode.reproduce("potential", scale="tiny", out=out, engine="torch", progress=False)
    return out, finding


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def row(label: str, **numbers: float) -> Any:
    return SimpleNamespace(row={"flow": label, **numbers}, run=SimpleNamespace(flow=SimpleNamespace(dim=2)))


def test_every_flow_has_a_row_whose_numbers_are_its_models(found: tuple[Path, Finding]) -> None:
    out, finding = found
    table = rows(out / "potential" / "potential.csv")
    assert [(r["data"], r["flow"]) for r in table] == [
        (data, LABELS[method]) for data in ("two-bumps", "8gaussians") for method in potential.METHODS
    ]
    study = Study(TINY, out, settings={"engine": "torch"}, progress=False)
    (line,) = (r for r in table if r["data"] == "8gaussians" and r["flow"] == "OT-Flow")
    run = study.run(Need("8gaussians", "ot-flow"))
    report = pyrnode.evaluate(run.flow, study.splits(run.config), baselines=False)
    for key, expected in (
        ("nats", report.score.nats),
        ("evaluations", report.nfe),
        ("inversion error", report.inversion_error),
        ("E", report.E),
        ("n", report.n),
    ):
        assert float(line[key]) == pytest.approx(expected, rel=1e-6), key
    # width 4, two layers, s of 3 numbers: W_0 and b_0, W_1 and b_1, w, b, and A of as many rows as s has numbers
    assert int(line["weights"]) == (12 + 4) + (16 + 4) + 4 + 3 + 9
    _, states = particles.particle_paths(run.flow, study.splits(run.config).test.tensor()[: potential.PARTICLES], 65)
    states = states.double()
    distance, length = (states[-1] - states[0]).norm(dim=1), (states[1:] - states[:-1]).norm(dim=2).sum(0)
    assert float(line["length / distance"]) == pytest.approx(float((length / distance).median()), rel=1e-9)
    steps = [r for r in read_metrics(run.folder.path) if "loss" in r]
    assert float(line["seconds a step"]) == pytest.approx(steps[-1]["seconds"] / 20)
    assert finding.numbers["nats 8gaussians ot-flow"] == pytest.approx(report.score.nats)


def test_the_pictures_show_every_flow(found: tuple[Path, Finding]) -> None:
    figures = found[1].figures
    titles = [axes.get_title() for axes in figures["potential-plane"].axes]
    assert titles == [LABELS[method] for method in potential.METHODS]
    assert all(len(axes.lines) == potential.PARTICLES // 2 for axes in figures["potential-plane"].axes)
    middle = [axes for axes in figures["potential-line"].axes if axes.get_title() in LABELS.values()]
    assert [axes.get_title() for axes in middle] == [LABELS[method] for method in potential.METHODS]


def test_verdicts_follow_from_the_numbers(found: tuple[Path, Finding]) -> None:
    _, finding = found
    dear, written, fewer, trains, used, straight = finding.claims
    n = finding.numbers
    for claim, name in ((dear, "nested"), (written, "explicit")):
        ratio = n[f"seconds of a step {name}"] / n["seconds of a step RNODE"]
        assert claim.verdict == ("holds" if ratio > 2 else "does not hold")
    share = n["weights 8gaussians ot-flow"] / n["weights 8gaussians ffjord"]
    short = (n["nats 8gaussians ffjord"] - n["nats 8gaussians ot-flow"]) / 2
    assert fewer.verdict == ("holds" if share <= 0.25 and short <= 0.02 else "does not hold")
    for claim, theirs, ours in (
        (trains, "seconds to target ffjord", "seconds to target ot-flow"),
        (used, "seconds to score 8gaussians ffjord", "seconds to score 8gaussians ot-flow"),
    ):
        assert claim.verdict == ("holds" if n[ours] < n[theirs] else "does not hold")
    assert straight.verdict in ("holds", "does not hold")


def test_a_step_twice_as_long_is_too_dear() -> None:
    claims = potential.cost_claims({"RNODE": 0.01, "explicit": 0.019, "nested": 0.021})
    assert [claim.verdict for claim in claims] == ["holds", "does not hold"]
    assert "21 ms" in claims[0].ours
    assert "2.1 times" in claims[0].ours
    assert "1.9 times" in claims[1].ours


@pytest.mark.parametrize(("length", "speed", "verdict"), [(1.01, 0.1, "holds"), (1.2, 0.1, "no"), (1.01, 0.4, "no")])
def test_straight_is_below_both_flows_without_the_penalty(length: float, speed: float, verdict: str) -> None:
    def seen(label: str, length: float, speed: float) -> Any:
        return row(label, **{"length / distance": length, "variation of speed": speed})

    plane = {
        "ffjord": seen("FFJORD", 1.3, 0.3),
        "monge-ampere": seen("Monge-Ampère flow", 1.1, 0.5),
        "potential-flow": seen("potential flow", 1.02, 0.05),
        "ot-flow": seen("OT-Flow", length, speed),
    }
    assert potential.straight_claim(plane).verdict == ("holds" if verdict == "holds" else "does not hold")


def test_steps_take_turns_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], list[str]()
    lasts = {"a": iter((100.0, 1.0, 2.0, 6.0)), "b": iter((50.0, 3.0, 3.0, 3.0))}

    def act(name: str) -> None:
        order.append(name)
        now[0] += next(lasts[name])

    monkeypatch.setattr(potential.time, "perf_counter", lambda: now[0])
    assert potential.in_turn({"a": lambda: act("a"), "b": lambda: act("b")}, 3) == {"a": 2.0, "b": 3.0}
    assert order == ["a", "b"] * 4


def test_nested_differentiation_is_the_same_step() -> None:
    config = TINY.config("8gaussians", "ot-flow").override({"engine": "torch", "dtype": "float64"})
    flow = Flow.build(config, (2,))
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    losses, gradients = [], []
    for one in (flow, potential.nested(flow)):
        losses.append(potential.training_step(config, one, x)())
        gradients.append([p.grad.clone() for p in flow.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert len(gradients[0]) == len(gradients[1]) == len(list(flow.parameters()))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_run_that_was_never_validated_is_named() -> None:
    run: Any = SimpleNamespace(
        history=[{"step": 1, "loss": 1.0, "seconds": 0.1}],
        need=Need("8gaussians", "ot-flow"),
        diverged="after step 1",
    )
    with pytest.raises(TrainingDivergedError, match="8gaussians-ot-flow-seed0 was never validated: after step 1"):
        potential.curve(run)
    run.history.append({"step": 2, "validation": 2.5, "seconds": 0.2})
    assert potential.curve(run) == [{"seconds": 0.2, "bits": 2.5}]
    assert math.isfinite(potential.common_target([potential.curve(run)]))


# -- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["two-bumps", "8gaussians"])
@pytest.mark.parametrize("method", POTENTIALS)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_potentials_share_what_is_compared(scale: Any, method: str, data: str) -> None:
    config, mlp, preset = scale.config(data, method, seed=3), scale.config(data, seed=3), Config.preset(method)
    assert (config.data, config.evaluation, config.seed) == (mlp.data, mlp.evaluation, 3)
    assert config.penalties == preset.penalties
    if scale.published:
        assert config == replace(preset, data=mlp.data, evaluation=mlp.evaluation, seed=3)
        return
    assert replace(config.flow, network=mlp.flow.network) == mlp.flow
    assert replace(config.flow.network, hidden=preset.flow.network.hidden) == preset.flow.network
    rate = {"training.learning_rate": mlp.training.learning_rate}
    assert config.override(rate).training == mlp.training
    assert (config.solver, config.dtype) == (mlp.solver, mlp.dtype)
