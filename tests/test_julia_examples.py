"""The examples of the Julia engine, from Python and in Julia alone, run in their quick forms as written."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest

from pyrnode import julia_setup

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.needs_julia, pytest.mark.slow, pytest.mark.timeout(900)]


def test_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["julia_engine.py", "--quick"])
    values = runpy.run_path(str(ROOT / "examples/julia_engine.py"))["main"]()
    # The untrained flow is 1.42 nats from the truth; a few steps must not make it worse.
    assert all(-0.05 < value < 1.45 for name, value in values.items() if name.startswith("gap "))
    assert values["module"] < 1e-3  # float32, DP5 at 1e-5 against RK4 with step 0.05
    adjoints = {"Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "GaussAdjoint", "QuadratureAdjoint"}
    assert adjoints < values.keys()
    assert all(values[name] < 1e-5 for name in adjoints)


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers in the line that fits `pattern`, in which each ``#`` stands for one."""
    number = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
    match = re.search(re.escape(pattern).replace(r"\#", number), text)
    assert match is not None, text
    return [float(group) for group in match.groups()]


def test_in_julia_alone() -> None:
    status = julia_setup.require()
    julia = [str(status.executable), f"--project={status.project}", "--startup-file=no", "--threads=2"]
    command = [*julia, str(ROOT / "examples/native.jl"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    before, _, after = numbers("loss before #, after # steps # nats per dimension", done.stdout)
    (gap,) = numbers("gap to the true density # nats per sample", done.stdout)
    # Before, f = 0, and the loss is the mean of -log N(x; 0, I) per dimension: (log 2π + (1.4² + 2 · 0.2²) / 2) / 2.
    assert before == pytest.approx((1.8379 + 1.02) / 2, abs=0.02)
    assert after < before - 0.2
    assert 0 < gap < 0.8
    assert numbers("layer and integrate differ by at most #", done.stdout)[0] < 1e-5
    assert numbers("integral over the plane #", done.stdout)[0] == pytest.approx(1, abs=1e-3)
    assert numbers("1000 samples to the base and back: at most #", done.stdout)[0] < 1e-3
    assert numbers("its log-densities differ by at most #", done.stdout)[0] < 1e-6
    assert 0 < numbers("gap of fit(RNODELayer, X) # nats", done.stdout)[0] < 0.8
