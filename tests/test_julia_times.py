"""How long Julia takes: what is measured and kept, and what the bar says meanwhile."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from pyrnode import progress
from pyrnode.config import SolverConfig
from pyrnode.engines.base import Engine, Solution
from pyrnode.engines.julia import SENSITIVITIES
from pyrnode.engines.julia_workload import SOLVERS, cases, exercise
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.julia_times import Times, Watch, usually, words


def test_the_last_five_are_kept_and_their_median_is_usual(tmp_path: Path) -> None:
    times = Times(tmp_path / "julia")
    assert times.usual("start") is None
    for seconds in (100.0, 9.0, 7.0, 8.0, 30.0, 6.0):
        times.add("start", seconds)
    assert Times(tmp_path / "julia").usual("start") == 8.0
    assert times.usual("another") is None
    assert json.loads((tmp_path / "julia" / "times.json").read_text()) == {"start": [9.0, 7.0, 8.0, 30.0, 6.0]}
    assert [path.name for path in (tmp_path / "julia").iterdir()] == ["times.json"]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"start": ["soon"]}', '{"start": 3}'])
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "times.json").write_text(text)
    times = Times(tmp_path)
    assert times.usual("start") is None
    times.add("start", 2.0)
    assert times.usual("start") == 2.0


def test_what_cannot_be_written_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    times = Times(tmp_path / "file")  # no folder can be made there
    times.add("start", 2.0)
    assert times.usual("start") is None


def test_what_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "times.json").mkdir()
    Times(tmp_path).add("start", 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "not measured before"), (7.4, "usually 7 s"), (99.4, "usually 99 s"), (160.0, "usually 3 min")],
)
def test_words(seconds: float | None, said: str) -> None:
    assert usually(seconds) == said
    assert seconds is None or words(seconds) == said.removeprefix("usually ")


def test_the_bar_says_what_is_waited_for_and_how_long_it_usually_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times, ticks = Times(tmp_path), count(step=12.0)
    with progress.progress_bar(10, "train", unit="step", show=True) as bar:
        with times.waiting("starting Julia", "start", clock=lambda: next(ticks)):
            assert "starting Julia, not measured before" in capsys.readouterr().err  # at once: it may stand still now
        assert "train" in capsys.readouterr().err
        with times.waiting("starting Julia", "start", clock=lambda: next(ticks)):
            assert "starting Julia, usually 12 s" in capsys.readouterr().err
        bar.update(10)
    assert "train: 100%" in capsys.readouterr().err


def test_a_bar_that_waits_to_be_shown_is_shown_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(None, "solvers", unit="", show=True, uncounted=True, delay=60.0):
        assert capsys.readouterr().err == ""
        with Times(tmp_path).waiting("starting Julia", "start"):
            assert "starting Julia, not measured before [00:00]" in capsys.readouterr().err


def test_what_is_soon_done_is_not_worth_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times, ticks = Times(tmp_path), count(step=0.4)
    times.add("start", 0.4)
    bar = progress.progress_bar(None, "solvers", unit="", show=True, uncounted=True, delay=60.0)
    with bar, times.waiting("starting Julia", "start", clock=lambda: next(ticks)):
        pass
    assert "Julia" not in capsys.readouterr().err
    assert times.usual("start") == pytest.approx(0.4)


def test_without_a_bar_nothing_is_said_and_all_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times, ticks = Times(tmp_path), count(step=5.0)
    bar = progress.progress_bar(10, "train", unit="step", show=False)
    with bar, times.waiting("starting Julia", "start", clock=lambda: next(ticks)):
        pass
    assert capsys.readouterr().err == ""
    assert times.usual("start") == 5.0


def test_the_innermost_bar_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(2, "outer", unit="", show=True):
        with progress.progress_bar(2, "inner", unit="", show=True):
            pass
        capsys.readouterr()
        with Times(tmp_path).waiting("starting Julia", "start"):
            pass
        assert "outer" in capsys.readouterr().err


def test_what_fails_is_not_measured(tmp_path: Path) -> None:
    times = Times(tmp_path)
    with pytest.raises(KeyError), times.waiting("starting Julia", "start"):
        raise KeyError
    assert times.usual("start") is None


def test_each_thing_is_compiled_once_and_from_the_image_is_another_thing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image, seconds in ((False, 8.0), (True, 0.5)):
        compiled = count(step=seconds)
        watch = Watch(Times(tmp_path), image=image)
        with progress.progress_bar(10, "train", unit="step", show=True):
            with watch.compiles("Tsit5's adjoint (MLP, float32)", lambda compiled=compiled: next(compiled)):
                said = capsys.readouterr().err
            assert "Julia compiles Tsit5's adjoint (MLP, float32), not measured before" in said
            with watch.compiles("Tsit5's adjoint (MLP, float32)", lambda: pytest.fail("it is compiled")):
                assert "Julia" not in capsys.readouterr().err
    times = Times(tmp_path)
    assert times.usual("Tsit5's adjoint (MLP, float32)") == 8.0
    assert times.usual("Tsit5's adjoint (MLP, float32), from the image") == 0.5
    with Watch(times, image=True).starts():
        pass
    assert times.usual("start, from the image") is not None
    assert times.usual("start") is None


# --- what the image is to have compiled ---


def test_the_workload_is_all_usual_solvers_with_all_their_adjoints() -> None:
    assert set(SOLVERS) == {"RK4", "DP5", "Tsit5", "BS3", "Vern7", "VCABM", "Rosenbrock23"}
    assert set(SENSITIVITIES) == set(SOLVERS["RK4"])
    assert all("GaussAdjoint" in adjoints for adjoints in SOLVERS.values())
    asked = {(case.solver.name, case.solver.sensealg, case.dtype) for case in cases()}
    for name, adjoints in SOLVERS.items():
        assert {(name, adjoint, torch.float32) for adjoint in adjoints} <= asked
        assert (name, "auto", torch.float64) in asked
    assert {type(case.dynamics).__name__ for case in cases()} == {"MLP", "ConvNet", "Potential", "ModuleDynamics"}
    assert any(case.dynamics.context_dim for case in cases())


def test_the_workload_solves_forward_differentiates_and_goes_back() -> None:
    """Every case runs, on an engine that writes down what it is asked and computes with another solver."""

    asked: list[tuple[str, bool, bool, float]] = []

    class Listening(TorchEngine):
        def integrate(self, dynamics, z0, probes, t_span, solver, **further) -> Solution:  # type: ignore[no-untyped-def]
            asked.append((solver.name, torch.is_grad_enabled(), probes is not None, t_span[0]))
            return super().integrate(dynamics, z0, probes, t_span, SolverConfig(step_size=0.5), **further)

    engine: Engine = Listening()
    exercise(engine)
    made = list(cases())
    each = [(True, True, 0.0), (False, True, 0.0), (False, False, 1.0)]
    assert asked == [(case.solver.name, *kind) for case in made for kind in each]
