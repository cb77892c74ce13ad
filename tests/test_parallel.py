"""Several processes and one: the same run, whatever happens in one of them (docs/parallel.md).

Two and three processes go through the cases of parallel_cases.py, once for all tests here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrnode
from pyrnode import distributed, doctor, seeds
from pyrnode.data import load
from pyrnode.devices import resolve_device
from pyrnode.distributed import alone
from pyrnode.errors import ConfigError, ProcessError, SolverError
from pyrnode.training import trainer as loop
from pyrnode.training.step import Order
from tests.parallel_cases import ALIKE, TOGETHER, Found, numbers, reproduced
from tests.small_runs import FULL, assert_same_run

LIMIT = 400
"""Seconds after which processes are killed, and the tests fail."""


def environment() -> dict[str, str]:
    paths = [str(Path(pyrnode.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def all_of(size: int, out: Path, *chosen: str, limit: int = LIMIT) -> list[dict[str, Found]]:
    """What each of so many processes found in all cases, or in those that follow the name of an engine."""
    script = [sys.executable, "-m", "tests.parallel_cases"]
    processes = [
        subprocess.Popen(
            [*script, str(rank), str(size), str(out), *chosen], env=environment(), stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=limit)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    last = -signal.SIGKILL if not chosen or "killed" in chosen else 0
    assert [process.returncode for process in processes] == [0] * (size - 1) + [last], said
    (out / "said").write_text(said[0])
    for rank, text in enumerate(said[1:]):
        assert text == "", rank + 1  # the first prints for all
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return {name: json.loads(json.dumps(case(tmp_path_factory.mktemp("one")))) for name, case in ALIKE.items()}


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    out = tmp_path_factory.mktemp(f"{request.param}")
    begin_alone(out / "begun by one")
    return all_of(request.param, out), out


def begin_alone(out: Path) -> None:
    """Ten steps of a run, by one process."""
    with pytest.MonkeyPatch.context() as patch:
        original = loop.loss

        def stopping(flow: Any, batch: Any, config: Any, solver: Any, at: int) -> Any:
            if at == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return original(flow, batch, config, solver, at)

        patch.setattr(loop, "loss", stopping)
        assert pyrnode.train("8gaussians", out=out, evaluate=False, progress=False, **FULL).interrupted


# -- the same run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALIKE))
def test_the_number_of_processes_is_no_part_of_the_result(
    name: str, one: dict[str, Found], several: tuple[list[dict[str, Found]], Path]
) -> None:
    """Batches that do not divide, contexts, weights, averages, clipping, flips, the ladder, restarts, patience."""
    for found in several[0]:
        check_alike(found[name], one[name])


def check_alike(found: Found, expected: Found) -> None:
    """Losses to 1e-6, validation and scores to 1e-9, whatever happened the same."""
    assert "error" not in found, found["error"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key in ("losses", "steps"):
            assert torch.tensor(found[key]) == pytest.approx(torch.tensor(value), rel=1e-6, abs=1e-6), key
        elif key in ("validation", "disagreement", "weights", "score"):
            assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
        elif key != "bits":
            assert found[key] == value, key


def test_the_cases_have_in_them_what_they_are_for(one: dict[str, Found]) -> None:
    assert len(one["table"]["losses"]) == len(one["pictures"]["losses"]) == 50
    assert one["table"]["snapshots"] == [10, 20, 30, 40, 50]
    assert 10 < sum(step[6] > 0.3 for step in one["table"]["steps"]) < 50  # gradients that are clipped, and others
    assert len({step[4] for step in one["ladder"]["steps"]}) > 1  # the ladder moves
    assert len(one["ladder"]["losses"]) < 200  # patience ends it
    assert [event for _, event in one["failure"]["events"]] == ["restart"]
    assert one["not finite"] == {"raised": "TrainingDivergedError", "gave up": True}


@pytest.mark.parametrize("name", ["table", "pictures", "held out", "mapped file", "ladder", "failure", "resumed"])
def test_all_processes_have_the_same_bits(name: str, several: tuple[list[dict[str, Found]], Path]) -> None:
    first, *others = (found[name] for found in several[0])
    assert "error" not in first, first["error"]
    for other in others:
        assert other == first


def test_callbacks_are_the_first_processs_and_their_errors_and_ends_are_everyones(
    several: tuple[list[dict[str, Found]], Path],
) -> None:
    found, out = several
    for rank, process in enumerate(found):
        assert "error" not in process["callback"], process["callback"]["error"]
        message, where, how = process["callback"]["raised"]
        assert (message, where) == ("spoilt", "raised by the callback Fails.on_step, at step 5")
        assert str(out / "callback") in how
        first = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
        assert process["callback"]["told"] == ([[], []] if rank else first)
        assert (process["callback"]["interrupted"], process["callback"]["last"]) == (False, 9)
    assert_same_run(out / "whole", out / "callback")


def test_a_failure_says_whose_it_was(several: tuple[list[dict[str, Found]], Path]) -> None:
    found, out = several
    history = [json.loads(line) for line in (out / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in history if "loss" in r] == list(range(1, 25))
    assert f"process {len(found) - 1}: made to fail" in (out / "said").read_text()


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number", "code"), [("interrupt", 2, 130), ("terminate", 15, 143)])
def test_a_signal_to_one_ends_all_at_one_step_and_loses_nothing(
    several: tuple[list[dict[str, Found]], Path], name: str, number: int, code: int
) -> None:
    found, out = several
    for rank in found:
        assert rank["whole"] == {"codes": [0, 1]}
        assert rank[name] == {"codes": [code, 0], "step": 5}
    assert_same_run(out / "whole", out / f"stopped {number}")
    said = (out / "said").read_text()
    assert said.count(f"interrupted; go on with: pyrnode train 8gaussians --out '{out}/stopped {number}' --resume") == 1
    assert said.count("already holds a run") == 1


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(
    several: tuple[list[dict[str, Found]], Path],
) -> None:
    found, out = several
    result = pyrnode.train("8gaussians", evaluate=False, progress=False, **FULL)
    expected = numbers(result)
    assert found[0]["resumed"]["losses"] == pytest.approx(expected["losses"], rel=1e-5)  # in single precision
    assert found[0]["resumed"]["validation"] == pytest.approx(expected["validation"], rel=1e-5)
    (changes,) = found[0]["resumed"]["changes"]
    assert any(change == f"processes: '1' → '{len(found)}'" for change in changes)
    assert "resumed, but from here on not bit for bit as begun" in (out / "said").read_text()


def test_a_process_that_is_killed_ends_the_others_soon(several: tuple[list[dict[str, Found]], Path]) -> None:
    for found in several[0][:-1]:
        assert found["killed"]["seconds"] < 60
        assert "lost the others: one of them has ended" in found["killed"]["told"]
    assert "killed" not in several[0][-1]


def test_what_one_raises_all_raise(several: tuple[list[dict[str, Found]], Path]) -> None:
    size = len(several[0])
    for found in (rank["shared errors"] for rank in several[0]):
        assert found["gathered"] == found["together"] == ["DataError", "row 7 is not a number"]
        assert found["once"] == ["SolverError", "stiff"]
        assert found["few"][0] == "ConfigError"
        assert f"for {size} processes: expected at least one sample for each" in found["few"][1]
        assert found["data"] == ["DataError", "process 1 has other data than process 0: give all processes the same"]
    *others, origin = (rank["shared errors"]["foreign"] for rank in several[0])
    assert origin == ["Local", "1 2"]
    assert others == [["ProcessError", f"process {size - 1} failed: Local: 1 2"]] * (size - 1)


def test_the_first_process_goes_first(several: tuple[list[dict[str, Found]], Path]) -> None:
    size = len(several[0])
    found = [rank["in turn"] for rank in several[0]]
    assert [rank["there"] for rank in found] == [False] + [True] * (size - 1)
    for rank in found:
        assert rank["sum"] == [size * (size + 1) / 2] * 3
        assert rank["gathered"] == list(range(size))
        assert rank["once"] == 0


def test_an_experiment_is_trained_and_scored_by_all(
    several: tuple[list[dict[str, Found]], Path], tmp_path: Path
) -> None:
    expected = json.loads(json.dumps(reproduced(tmp_path)))
    found = [rank["reproduced"] for rank in several[0]]
    for rank in found:
        assert "error" not in rank, rank["error"]
        assert rank["report"]
        assert rank["numbers"] == pytest.approx(expected["numbers"], rel=1e-3, abs=1e-3)  # in single precision
        assert rank["rows"] <= -(-expected["rows"] // len(found)) + len(found) * 20
    assert sum(rank["rows"] for rank in found) == expected["rows"]


def test_the_doctor_lets_them_add_up(several: tuple[list[dict[str, Found]], Path]) -> None:
    size = len(several[0])
    for found in (rank["doctor"] for rank in several[0]):
        assert found["last"] == ["their sum", "ok", f"{size} of {size} ones"]
        assert found["checks"] == len(doctor.diagnose()) + size


# -- by itself -------------------------------------------------------------------------------------------------------


class Third(distributed.World):
    """The last of three."""

    rank, size = 2, 3

    def share(self, count: int) -> seeds.Share:
        return seeds.Share(count - count // 3, count // 3, count)


def test_shares_cover_a_batch() -> None:
    for count in range(8):
        for size in range(1, 5):
            world = object.__new__(distributed.Processes)
            rows: list[int] = []
            for world.rank in range(size):
                world.size = size
                share = world.share(count)
                assert (share.total, share.count) in ((count, count // size), (count, count // size + 1))
                rows += list(range(count))[share.rows]
            assert rows == list(range(count))


def test_noise_of_a_share_is_that_of_its_rows() -> None:
    def draw(shape: tuple[int, ...], source: torch.Generator | None) -> torch.Tensor:
        return torch.randn(shape, generator=source)

    every = seeds.drawn(draw, (2, 7, 3), seeds.generator(0, "x"), batch=1)
    noise = seeds.ShareNoise(seeds.generator(0, "x"), seeds.Share(4, 2, 7))
    assert torch.equal(seeds.drawn(draw, (2, 2, 3), noise, batch=1), every[:, 4:6])


def test_an_order_divides_every_batch() -> None:
    whole, third = Order.of(50, 20, 0, alone), Order.of(50, 20, 0, Third())
    rows, mine = next(whole.epochs(1)), next(third.epochs(1))
    assert (third.here, third.steps_per_epoch) == (6, 2)
    assert torch.equal(mine, rows[14:])
    few = Order.of(5, 20, 0, Third())
    assert torch.equal(next(few.epochs(0)), next(Order.of(5, 20, 0, alone).epochs(0))[4:])
    with pytest.raises(ConfigError, match="batch_size = 2, of 50 training samples, for 3 processes"):
        Order.of(50, 2, 0, Third())


def test_of_images_in_a_folder_each_reads_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr("pyrnode.data.images._IN_MEMORY_BYTES", 0)
    for number in range(40):
        pixels = torch.randint(0, 256, (4, 4), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number:02}.png")
    train = load(tmp_path).train
    read: list[int] = []
    original = type(train._items).__getitem__
    monkeypatch.setattr(type(train._items), "__getitem__", lambda self, i: read.append(i) or original(self, i))
    order = Order.of(len(train), 9, 0, Third())
    batches = order.batches(train)
    for _ in range(order.steps_per_epoch):
        assert len(next(batches).x) == 3
    assert len(train) == 32
    assert len(set(read)) == len(read) == 9  # a third of three batches of nine


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.world() is distributed.present() is alone
    assert (alone.share(5), alone.gathered(lambda: 3), alone.once(lambda: 4), alone.first) == (None, [3], 4, True)
    assert distributed.shard() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not distributed.launched()  # by somebody who says nothing of where the others are
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="RANK = 4, WORLD_SIZE = 4: expected a rank from 0 to 3"):
        distributed.shard()
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(ConfigError, match="RANK = 'three': expected a whole number"):
        distributed.shard()


def test_processes_of_a_restart_do_not_wait_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives them the store of those before them; who comes first finds there what the dead wrote."""
    monkeypatch.setattr(distributed, "_START", timedelta(seconds=60))
    store = torch.distributed.HashStore()
    marks: list[bytes] = []
    names: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        for first in (0, 1, 2):  # who reads before the others have written
            early = pool.submit(distributed.roll_call, store, first, 3)
            if first:
                _changed(store, f"mark {first}", marks[first])
                assert not early.done()
            late = [pool.submit(distributed.roll_call, store, rank, 3) for rank in range(3) if rank != first]
            (name,) = {future.result() for future in (early, *late)}
            names.append(name)
            marks = [store.get(f"mark {rank}") for rank in range(3)]
    assert len(set(names)) == 3


LAUNCHED = """
import os, sys, torch
from pyrnode import distributed
world = distributed.world()
print(int(world.sum(torch.tensor([world.rank + 1.0]), patient=True)), flush=True)
os._exit(0)  # as a process that is killed: nothing is taken back
"""


def test_processes_that_take_over_a_store_reach_each_other() -> None:
    """As torchrun's agent restarts them; the second time one comes when the other has not even begun."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}

    def start(rank: int) -> subprocess.Popen[str]:
        told = environment() | address | {"RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", LAUNCHED], env=told, stdout=pipe, stderr=pipe, text=True)

    mark, limit = b"", time.monotonic() + LIMIT
    for _ in range(2):
        processes = [start(1)]
        try:
            while mark and _mark(store) == mark:  # of who was there before
                assert processes[0].poll() is None, processes[0].communicate()
                assert time.monotonic() < limit
                time.sleep(0.05)
            processes.append(start(0))
            said = [process.communicate(timeout=LIMIT) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [out for out, _ in said] == ["3\n", "3\n"], said
        mark = _mark(store)


def _mark(store: torch.distributed.TCPStore) -> bytes:
    return store.get("mark 1") if store.check(["mark 1"]) else b"none"


def _changed(store: torch.distributed.HashStore, key: str, before: bytes) -> None:
    while store.get(key) == before:
        time.sleep(0.001)


def test_who_does_not_reach_the_others_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(distributed, "_START", timedelta(seconds=1))
    with pytest.raises(ProcessError, match=r"this process \(1 of 2\) does not reach the others by 127.0.0.1:9"):
        distributed.world()
    assert not torch.distributed.is_initialized()
    assert distributed.present() is alone


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 2)
    assert resolve_device("cpu") == torch.device("cpu")
    assert distributed.backend(torch.device("cuda", 2)) == "nccl"
    assert distributed.backend(torch.device("cpu")) == "gloo"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # two processes on each: NCCL refuses
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert distributed.backend(torch.device("cuda", 0)) == "gloo"


def test_an_error_of_a_solver_crosses_with_all_that_it_says() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(SolverError("stiff", status="MaxIters", block=2)))
    assert (str(error), error.status, error.block) == ("stiff", "MaxIters", 2)


def test_every_case_is_looked_at() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{name}"' in text for name in TOGETHER)
