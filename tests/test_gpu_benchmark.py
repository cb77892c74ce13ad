"""`benchmarks.gpu` as it runs on a CPU: what it keeps, and how it goes on where it was cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import Item, Setup, Unfinished

ABOUT = {"name": "a machine"}


def ledger(path: Path) -> gpu.Ledger:
    return gpu.Ledger(path / "gpu.json", ABOUT)


def test_measurements_are_kept_and_not_made_again(tmp_path: Path) -> None:
    made: list[str] = []

    def item(name: str) -> Item:
        def measure(left: float) -> list[dict[str, Any]]:
            assert left == math.inf
            made.append(name)
            if name == "wrong":
                raise ValueError("no")
            return [{"value": len(made)}]

        return Item(name, 0, measure)

    todo = [item("one"), item("wrong"), item("two")]
    assert gpu.measure(todo, ledger(tmp_path), None)
    assert made == ["one", "wrong", "two"]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["about"] == ABOUT
    assert kept["items"]["two"]["rows"] == [{"value": 3}]
    assert kept["items"]["wrong"]["why"] == "ValueError: no"
    assert gpu.measure(todo, ledger(tmp_path), None)
    assert made == ["one", "wrong", "two"]
    again = ledger(tmp_path)
    again.retry()
    assert gpu.measure(todo, again, None)
    assert made == ["one", "wrong", "two", "wrong"]


def test_one_that_ends_the_process_is_begun_twice(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def ends(left: float) -> list[dict[str, Any]]:
        raise Killed

    todo = [Item("ends", 0, ends), Item("after", 0, lambda left: [])]
    for _ in range(2):
        with pytest.raises(Killed):
            gpu.measure(todo, ledger(tmp_path), None)
    assert gpu.measure(todo, ledger(tmp_path), None)
    items = ledger(tmp_path).items
    assert items["ends"] == {"status": "failed", "why": "the process ended in it 2 times"}
    assert items["after"]["status"] == "done"


def test_it_stops_in_good_time_and_goes_on(tmp_path: Path) -> None:
    def goes_on(left: float) -> list[dict[str, Any]]:
        seen.append(left)
        if len(seen) < 4:
            raise Unfinished
        return []

    seen: list[float] = []
    todo = [Item("long", 10, goes_on)]
    assert not gpu.measure(todo, ledger(tmp_path), 9.0)
    assert seen == []
    for _ in range(3):  # of which none counts as a process that ended
        assert not gpu.measure(todo, ledger(tmp_path), 11.0)
    assert gpu.measure(todo, ledger(tmp_path), 11.0)
    assert all(10 < left <= 11 for left in seen)


def test_another_machines_numbers_are_not_mixed_in(tmp_path: Path) -> None:
    ledger(tmp_path).end("one", [], 1.0)
    with pytest.raises(SystemExit, match="another device, version or size: take another --out"):
        gpu.Ledger(tmp_path / "gpu.json", {"name": "another"})


def test_gradients_that_are_wrong_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = gpu_parts._flows(tiny=True)["mlp"]
    setup = Setup(torch.device("cpu"), tmp_path, 1.0, tiny=True)
    monkeypatch.setattr(gpu_parts, "SOLVERS", {"checkpoint": gpu_parts.SOLVERS["checkpoint"]})
    assert [row["ok"] for row in gpu_parts._gradients(setup, config, shape)] == [True, True]
    right = gpu_parts._gradient
    calls: list[int] = []

    def wrong(*args: Any) -> tuple[torch.Tensor, float]:
        calls.append(0)
        gradient, loss = right(*args)
        return gradient * (1.001 if len(calls) > 1 else 1), loss

    monkeypatch.setattr(gpu_parts, "_gradient", wrong)
    assert [row["ok"] for row in gpu_parts._gradients(setup, config, shape)] == [False, False]


@pytest.mark.slow
def test_the_whole_command_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part for part in gpu_parts.PARTS if part != "tests"]
    command = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--minutes", "1", "--parts", *parts]
    assert gpu.main(command) == 0, capsys.readouterr()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert {name.partition(":")[0] for name in kept["items"]} == set(parts)
    rows = {name: item["rows"] for name, item in kept["items"].items()}
    assert all(row.get("ok", True) for part in rows.values() for row in part)
    assert [row["step"] for row in rows["training"]] == [2, 4]
    assert all(row["ms"] > 0 for name, part in rows.items() if name.startswith("steps") for row in part)
    assert "no GPU: a trial" in kept["about"]["name"]
    assert (tmp_path / "gpu.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_projects_tests_are_run_on_the_device(tmp_path: Path) -> None:
    setup = Setup(torch.device("cpu"), tmp_path, 1.0, tiny=True)
    (item,) = gpu_parts.items("tests", setup)
    (row,) = item.measure(math.inf)
    assert row["passed"] >= 2
    assert "failed" not in row
