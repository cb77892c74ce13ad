"""A process of several that is killed, at any moment: the others end, and the run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_runs import FULL, assert_same_run
from tests.test_parallel import LIMIT, environment

# Attempts at one run by some processes, forked from one that has imported torch. In each, one of them is killed at its
# n-th event: before a sum and after it, before an optimiser step, with a file half written, or just in place. The
# others must end by themselves. The next attempt goes on with what it finds.
KILLED = """
import json, os, signal, sys, time
import torch, pyrnode
import torch.distributed as dist
from pyrnode import distributed
from pyrnode.errors import ProcessError
torch.set_num_threads(1)
out, settings, attempts, size = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])

def train(rank, store, victim, moment):
    seen = 0
    def event(before=lambda *a: None):
        nonlocal seen
        seen += 1
        if rank == victim and seen == moment:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
    fsync, replace, step, add = os.fsync, os.replace, torch.optim.Adam.step, dist.all_reduce
    def killed_fsync(fd):
        path, size = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size
        cut = size // 2 if path.endswith(".part") else size - 10  # metrics are appended to
        event(lambda: os.path.isdir(path) or os.ftruncate(fd, cut))
        fsync(fd)
    def killed_replace(a, b):
        replace(a, b)
        event()
    def killed_step(*args, **kwargs):
        event()
        return step(*args, **kwargs)
    def killed_add(*args, **kwargs):
        event()
        add(*args, **kwargs)
        event()
    os.fsync, os.replace, torch.optim.Adam.step, dist.all_reduce = killed_fsync, killed_replace, killed_step, killed_add
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        pyrnode.train("8gaussians", out=out, resume=True, **settings, evaluate=False, progress=False)
    except ProcessError:
        os._exit(9)
    os._exit(0)

# Slow imports, once for all children; but no backward pass: autograd does not survive a fork.
parameter = torch.nn.Parameter(torch.zeros(1))
parameter.grad = torch.zeros(1)
torch.optim.Adam([parameter]).step()
with torch.no_grad():
    pyrnode.Flow.build(pyrnode.Config(), (2,)).log_prob(pyrnode.data.load("8gaussians").test.tensor()[:2])

ends = []
for number, (victim, moment) in enumerate(attempts):
    children, begun = [], time.monotonic()
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            train(rank, f"{out}.store{number}", victim, moment)
    codes = []
    for child in children:
        status = os.waitpid(child, 0)[1]
        codes.append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    ends.append([codes, time.monotonic() - begun])
    print(number, victim, moment, codes, round(time.monotonic() - begun, 1), file=sys.stderr, flush=True)
print(json.dumps(ends))
"""


def kill(
    out: Path, attempts: list[tuple[int, int]], *, size: int = 2, engine: str = "torch", steps: int = FULL["max_steps"]
) -> list[tuple[list[int], float]]:
    """Exit codes of the processes in each attempt, and its seconds; an attempt's process -1 is not killed."""
    settings = json.dumps({**FULL, "engine": engine, "max_steps": steps})
    command = [sys.executable, "-c", KILLED, str(out), settings, json.dumps(attempts), str(size)]
    limit = 300 if engine == "torch" else 3000  # Julia starts anew in each
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=limit)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unkilled") / "run"
    ((codes, _),) = kill(out, [(-1, 0)])
    assert codes == [0, 0]
    return out


def check_kills(
    out: Path, unkilled: Path, attempts: list[tuple[int, int]], *, size: int = 2, engine: str = "torch", **more: int
) -> list[list[int]]:
    """Kills, goes on to the end, and compares; returns the exit codes."""
    ends = kill(out, [*attempts, (-1, 0)], size=size, engine=engine, **more)
    for (codes, seconds), (victim, _) in zip(ends, attempts, strict=False):
        assert seconds < 60 or engine == "julia"
        if codes[victim] == -signal.SIGKILL:  # 0: it had done its part, and waited for nobody
            assert {code for rank, code in enumerate(codes) if rank != victim} <= {9, 0}
    assert ends[-1][0] == [0] * size
    assert_same_run(unkilled, out)
    return [codes for codes, _ in ends]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_costs_nothing(tmp_path: Path, unkilled: Path, victim: int) -> None:
    """Each attempt comes further than the one before, or falls at the same checkpoint."""
    moments = [1, 4, 7, 10, 14, 15, 16, 17, 18, 24, 31, 12, 8]
    ends = check_kills(tmp_path / "run", unkilled, [(victim, moment) for moment in moments])
    assert sum(codes[victim] == -signal.SIGKILL for codes in ends) >= 10


# The command line; the last process of the first attempt waits at a step past a checkpoint, to be killed from outside.
WAITING = """
import os, signal, sys
import torch
from pathlib import Path
from pyrnode.cli import main
waiting, step, taken = Path(sys.argv.pop(1)), torch.optim.Adam.step, 0
def counted(*args, **kwargs):
    global taken
    taken += 1
    if taken == 57 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        waiting.with_suffix(".part").write_text(str(os.getpid()))
        waiting.with_suffix(".part").rename(waiting)
        signal.pause()
    return step(*args, **kwargs)
if str(waiting) != "-":
    torch.optim.Adam.step = counted
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "size", "count"),
    [("torch", 3, 20)],
)
def test_kills_of_random_processes_at_random_moments(tmp_path: Path, engine: str, size: int, count: int) -> None:
    """Every time all end, and the run that goes on is that of nobody killed, bit for bit."""
    draw = random.Random(20)
    attempts = [(draw.randrange(size), draw.randint(1, 45)) for _ in range(count)]
    whole, steps = tmp_path / "whole", 16 * count  # more than they all get to
    ((codes, _),) = kill(whole, [(-1, 0)], size=size, engine=engine, steps=steps)
    assert codes == [0] * size
    ends = check_kills(tmp_path / "killed", whole, attempts, size=size, engine=engine, steps=steps)
    assert [codes[victim] for codes, (victim, _) in zip(ends, attempts, strict=False)] == [-signal.SIGKILL] * count


@pytest.mark.slow
def test_torchrun_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """Without --resume: a restart is one. A process is killed from outside; the run is that of nobody killed."""
    settings = {"samples": 200, "hidden": [8], "batch_size": 21, "max_steps": 120, "checkpoint_every": 10, "ema": 0.9}
    settings |= {"penalties.divergence": '"hutchinson"', "validate_every": 30, "checkpoint_minutes": 60}
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    script, waiting = tmp_path / "waiting.py", tmp_path / "waiting.pid"
    script.write_text(WAITING)
    for name in ("whole", "killed"):
        out = tmp_path / name
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
        train = ["train", "8gaussians", "--out", str(out), "--no-evaluation", "--quiet", *pairs]
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), str(waiting) if name == "killed" else "-", *train],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        try:
            if name == "killed":
                wait_for(waiting, process)
                assert (out / "checkpoint.safetensors").exists()
                os.kill(int(waiting.read_text()), signal.SIGKILL)
            said = process.communicate(timeout=LIMIT)[0]
        finally:
            if process.poll() is None:
                process.terminate()  # which it hands on to the workers, whose sessions are their own
                process.wait(timeout=60)
        assert process.returncode == 0, said
        assert said.count("trained, not evaluated") == 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert json.loads((out / "versions.json").read_text())["processes"] == 2


def wait_for(path: Path, launcher: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < limit
        assert launcher.poll() is None
        time.sleep(0.01)
