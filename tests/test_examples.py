"""What the README and the examples promise runs as written."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shlex
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyrnode
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


# These are run in test_julia_examples.py, test_sbi.py, test_paper.py and below; exported_flow.py is what three share,
# and embeddings.py what two do.
ELSEWHERE = {
    "julia_engine.py",
    "inside_sbi.py",
    "reproduce.py",
    "score_with_dask.py",
    "score_with_ray.py",
    "score_with_spark.py",
    "exported_flow.py",
    "embeddings.py",
    "log_to_tensorboard.py",
    "log_to_wandb.py",
    "log_to_mlflow.py",
}
EXAMPLES = {path.name for path in (ROOT / "examples").glob("*.py")} - ELSEWHERE
WRITING = {"straight_trajectories.py", "anomaly_scores.py", "export_and_use.py", "simulation_based_inference.py"}
WRITING |= {"image_observation.py", "time_series_observation.py"}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick"] + (["--out", str(tmp_path)] if name in WRITING else [])
    monkeypatch.setattr("sys.argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
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
    elif name == "image_observation.py":
        assert 0 < values["flow"] < 2.5 < 4 < values["prior"]
        assert values["loaded"] == 0
    elif name == "time_series_observation.py":
        assert 0 < values["flow"] < 1 < 2 < values["prior"]
        assert values["loaded"] == 0
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


def logged(package: str, folder: Path) -> list[dict[str, float]]:
    """What the example writes for that package, in a process of its own: these start threads and servers."""
    pytest.importorskip(package, reason=f"{package} is not installed (pip install {package})")
    command = [sys.executable, str(ROOT / "examples" / f"log_to_{package}.py"), "--quick", "--out", str(folder)]
    offline = {**environment(), "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=offline)
    assert done.returncode == 0, done.stderr
    settings = {"max_steps": 4, "validate_every": 2, "samples": 200}  # training is repeatable to the bit
    return pyrnode.train("8gaussians", evaluate=False, progress=False, **settings).history


def of_training(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [record for record in history if "loss" in record and "event" not in record]


def test_numbers_for_tensorboard(tmp_path: Path) -> None:
    history = logged("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path))
    read.Reload()
    losses = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in of_training(history)]
    assert [event.step for event in read.Scalars("validation/validation")] == [2, 4]


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log, in blocks of 32 KiB after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no room for a record's head: the block is filled up
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)  # after a checksum
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_numbers_for_wandb(tmp_path: Path) -> None:
    history = logged("wandb", tmp_path)
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = [Record.FromString(data) for data in wandb_records(path.read_bytes())]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == [pytest.approx(record["loss"]) for record in of_training(history)]
    assert [row["validation/step"] for row in rows if "validation/step" in row] == [2, 4]


def test_numbers_for_mlflow(tmp_path: Path) -> None:
    history = logged("mlflow", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as stored:
        asked = "SELECT step, value FROM metrics WHERE key = ? ORDER BY step"
        losses = stored.execute(asked, ["train/loss"]).fetchall()
        validations = stored.execute(asked, ["validation/validation"]).fetchall()
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in of_training(history)]
    assert [step for step, _ in validations] == [2, 4]
