"""What the README and the examples promise runs as written."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyrnode.cli import main
from tests.test_kills import environment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) == 3
    namespace: dict[str, object] = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), namespace)


def test_commands_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = "".join(blocks("console")).splitlines()
    assert len(commands) == 7
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "pyrnode"
        assert main(arguments) == 0, command
    assert (tmp_path / "digits.png").stat().st_size > 1000
    assert (tmp_path / "runs/digits/samples.png").stat().st_size > 1000


# These are run in test_julia_examples.py, test_sbi.py, test_paper.py and below; the last is what three of them share.
ELSEWHERE = {
    "julia_engine.py",
    "inside_sbi.py",
    "reproduce.py",
    "score_with_dask.py",
    "score_with_ray.py",
    "score_with_spark.py",
    "exported_flow.py",
}
EXAMPLES = {path.name for path in (ROOT / "examples").glob("*.py")} - ELSEWHERE
WRITING = {"straight_trajectories.py", "anomaly_scores.py", "export_and_use.py", "simulation_based_inference.py"}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick"] + (["--out", str(tmp_path)] if name in WRITING else [])
    monkeypatch.setattr("sys.argv", [name, *arguments])
    module = runpy.run_path(str(ROOT / "examples" / name))
    values = module["main"]()
    if name == "straight_trajectories.py":
        assert len(list(tmp_path.glob("*.png"))) == 2
        assert all(value >= 14 for value in values.values())  # two adaptive steps at least
    elif name == "export_and_use.py":
        assert (tmp_path / "encode.pt2").stat().st_size > 10_000
        assert values.keys() == {"module", "program"}
        assert all(value < 2e-3 for value in values.values())
    elif name == "sklearn_pipeline.py":  # after ten steps about a standardised normal, no better than kernels
        assert all(-5 < gain < 5 for gain in values.values())
    elif name == "anomaly_scores.py":
        assert values["auc"] > 0.85
        assert values["ks"] < 1.63 * (2 / 89) ** 0.5  # the 1 % point for as many p-values as calibration scores
        assert values["difference"] < 1e-9
        assert 0.3 < values["detected"] < 1
    elif name == "simulation_based_inference.py":
        gaussian, moons = values["linear Gaussian"], values["two moons"]
        assert -0.02 < gaussian["log-density error"] < 0.25 < gaussian["untrained"]  # Kullback-Leibler divergences
        assert 0 < moons["log-density error"] < moons["untrained"] - 1
        assert gaussian["C2ST"] < 0.65 < moons["C2ST"] < 0.98  # few steps do for a Gaussian, not for crescents
        assert gaussian["calibration p"] > 0.01
        assert (tmp_path / "posteriors.png").stat().st_size > 20_000
    elif name == "vae_prior.py":
        assert values["untrained"] < -500
        assert -250 < values["standard normal"] < values["RNODE"] < -150
    else:  # the untrained flow is 1.42 nats from the truth; a few steps must not make it worse
        assert all(-0.05 < gap < 1.5 for gap in values.values())


@pytest.mark.slow
@pytest.mark.parametrize("package", ["dask", "ray", "pyspark"])
def test_scores_by_other_engines(package: str, tmp_path: Path) -> None:
    """In a process of their own: they start threads, servers and a Java machine."""
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'dask[dataframe]' ray pyspark)")
    name = {"dask": "score_with_dask", "ray": "score_with_ray", "pyspark": "score_with_spark"}[package]
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr
    rows, difference = re.findall(r"(\d+) rows, log_prob at most (\S+) nats", done.stdout)[0]
    assert int(rows) == 500
    assert float(difference) < 1e-5
