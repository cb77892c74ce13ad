"""Runs that are killed, told to stop, or started twice, lose nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyrnode
from pyrnode import files
from pyrnode.errors import (
    CheckpointError,
)
from pyrnode.runs import read_metrics
from pyrnode.training import trainer as loop
from tests.small_runs import (
    FULL,
    SMALL,
    assert_same_run,
    steps,
    train,
)

# -- kill -9 ---------------------------------------------------------------------------------------------------------

# Trains in child processes. Each is killed at its n-th event: before an optimiser step; with a file half written; with
# a file written but not yet in place; right after it is in place. The next child goes on with what it finds.
KILLED = """
import json, os, signal, sys
import torch, pyrnode
torch.set_num_threads(1)
out, settings, moments = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])

def train(moment):
    seen = 0
    def event(before=lambda *a: None):
        nonlocal seen
        seen += 1
        if seen == moment:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
    fsync, replace, step = os.fsync, os.replace, torch.optim.Adam.step
    def killed_fsync(fd):
        path, size = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size
        cut = size // 2 if path.endswith(".part") else size - 10  # metrics are appended to
        event(lambda: os.path.isdir(path) or os.ftruncate(fd, cut))
        fsync(fd)
        event()
    def killed_replace(a, b):
        replace(a, b)
        event()
    def killed_step(*args, **kwargs):
        event()
        return step(*args, **kwargs)
    os.fsync, os.replace, torch.optim.Adam.step = killed_fsync, killed_replace, killed_step
    pyrnode.train("8gaussians", out=out, resume=True, **settings, evaluate=False, progress=False)

# Slow imports, once for all children; but no backward pass: autograd does not survive a fork.
parameter = torch.nn.Parameter(torch.zeros(1))
parameter.grad = torch.zeros(1)
torch.optim.Adam([parameter]).step()
with torch.no_grad():
    pyrnode.Flow.build(pyrnode.Config(), (2,)).log_prob(pyrnode.data.load("8gaussians").test.tensor()[:2])

ends = []
for moment in moments:
    child = os.fork()
    if not child:
        train(moment)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    ends.append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
print(json.dumps(ends))
"""


def environment() -> dict[str, str]:
    paths = [str(Path(pyrnode.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def kill(out: Path, moments: list[int]) -> list[int]:
    command = [sys.executable, "-c", KILLED, str(out), json.dumps(FULL), json.dumps(moments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unkilled") / "run"
    assert kill(out, [0]) == [0]
    return out


@pytest.mark.parametrize(
    "moments",
    [
        [*range(1, 24), 0],  # each child comes a little further than the one before
        [40, 31, 22, 13, 9, 17, 26, 0],
        [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 0],
    ],
    ids=["rising", "falling", "around-a-checkpoint"],
)
def test_killed_runs_continue_bit_for_bit(tmp_path: Path, unkilled: Path, moments: list[int]) -> None:
    ends = kill(tmp_path, moments)
    assert ends[-1] == 0
    assert ends.count(-signal.SIGKILL) >= len(moments) // 2
    assert set(ends) == {-signal.SIGKILL, 0}
    assert_same_run(unkilled, tmp_path)


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    settings = {"samples": 200, "hidden": [8], "batch_size": 20, "max_steps": 300, "checkpoint_every": 20, "ema": 0.9}
    settings |= {"penalties.divergence": '"hutchinson"', "validate_every": 30}
    command = [sys.executable, "-m", "pyrnode", "train", "8gaussians", "--out", str(out), "--no-evaluation", *more]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def command_line_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("command line") / "run"
    code, _, err = finish(start(out, "--quiet"))
    assert code == 0, err
    return out


def test_a_command_killed_from_outside_is_resumed_bit_for_bit(tmp_path: Path, command_line_run: Path) -> None:
    out = tmp_path / "run"
    for resume in ([], ["--resume"]):
        process = start(out, *resume, "--quiet")
        before = (out / "checkpoint.safetensors").stat().st_mtime_ns if resume else 0
        wait_for(lambda b=before: _mtime(out / "checkpoint.safetensors") > b, process)  # type: ignore[misc]
        time.sleep(0.05)
        process.kill()
        code, *_ = finish(process)
        assert code == -signal.SIGKILL
    code, _, err = finish(start(out, "--resume", "--quiet"))
    assert code == 0, err
    assert_same_run(command_line_run, out)


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(
    tmp_path: Path, command_line_run: Path, number: int, expected: int
) -> None:
    out = tmp_path / "a run"
    process = start(out, "--quiet")
    wait_for((out / "checkpoint.safetensors").exists, process)
    process.send_signal(number)
    code, stdout, err = finish(process)
    assert code == expected
    assert stdout == ""
    assert err.splitlines() == [f"interrupted; go on with: pyrnode train 8gaussians --out '{out}' --resume"]
    progress = files.read(out / "checkpoint.safetensors", "checkpoint")[1]["progress"]
    assert 20 <= progress["step"] < 300
    assert steps(read_metrics(out))[-1]["step"] == progress["step"]
    command = [sys.executable, "-m", "pyrnode", "train", "8gaussians", "--out", str(out), "--resume", "--no-evaluation"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_run(command_line_run, out)


def test_a_run_names_what_it_does_and_says_its_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    settings = SMALL | {"max_steps": 12}
    pyrnode.train("8gaussians", **settings, evaluate=False)
    said = re.split(r"[\r\n]+", capsys.readouterr().err)
    left = [line for line in said if re.search(r"train: .* [1-3]/12 \[\d\d:\d\d<\d\d:\d\d, ", line)]
    assert left
    assert any(line.startswith("validate") for line in said)
    assert any(line.startswith("save") for line in said)


# -- SIGTERM ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
import pyrnode
from pyrnode.training import trainer
out, settings, mode, number = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
original = trainer.loss
def loss(flow, batch, config, solver, at):
    if at == 5:
        os.kill(os.getpid(), number)
    return original(flow, batch, config, solver, at)
trainer.loss = loss
if mode == "handler":
    signal.signal(number, lambda *a: print("handled", flush=True))
if mode == "exit":
    signal.signal(number, lambda *a: sys.exit(7))
if mode == "ignore":
    signal.signal(number, signal.SIG_IGN)
result = pyrnode.train("8gaussians", out=out, **settings, evaluate=False, progress=False)
print("next seed", result.interrupted, flush=True)
"""


@pytest.mark.parametrize(
    ("mode", "number", "code", "said"),
    [
        ("default", signal.SIGTERM, -signal.SIGTERM, ""),
        ("handler", signal.SIGTERM, 0, "handled\nnext seed True\n"),
        ("exit", signal.SIGTERM, 7, ""),
        ("ignore", signal.SIGTERM, 0, "next seed False\n"),
        ("handler", signal.SIGINT, 0, "handled\nnext seed True\n"),
        ("default", signal.SIGINT, 0, "next seed True\n"),
    ],
)
def test_a_signal_saves_and_goes_to_whoever_would_have_had_it(
    tmp_path: Path, mode: str, number: int, code: int, said: str
) -> None:
    """A script that is told to end does not go on with its next seed; the run that it was in is resumed."""
    settings = SMALL | {"max_steps": 8}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(settings), mode, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
    progress = files.read(tmp_path / "checkpoint.safetensors", "checkpoint")[1]["progress"]
    assert progress["step"] == (8 if mode == "ignore" else 5)
    assert steps(read_metrics(tmp_path))[-1]["step"] == progress["step"]


# -- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    """While a step is computed, another asks for the folder, which looks free; the run ends as if it had been alone."""
    original, refused, metrics = loop.loss, list[str](), tmp_path / "a" / "metrics.jsonl"

    def meanwhile(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
        if at == 1:
            patch.undo()
            metrics.rename(tmp_path / "kept")  # so that nothing but the lock refuses
            with pytest.raises(CheckpointError, match="in use by process") as caught:
                train(tmp_path / "a", resume=resume)
            refused.append(str(caught.value))
            (tmp_path / "kept").rename(metrics)
        return original(flow, batch, config, solver, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "loss", meanwhile)
        train(tmp_path / "a")
    assert refused == [
        f"{tmp_path / 'a'} is in use by process {os.getpid()}: wait for it, end it, or take another folder"
    ]
    train(tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
