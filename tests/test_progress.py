"""Bars of the commands: over two seconds there is one that moves, and `--quiet` and `--json` print the result alone."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm import tqdm

import pyrnode
from pyrnode import cli, doctor, flow, pages, progress
from pyrnode.cli import export as export_command
from pyrnode.data.chunks import open_chunks
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.export import TorchFlow, exported

SOON = 0.05


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bars") / "run"
    pyrnode.train("moons", max_steps=2, samples=200, blocks=3, hidden=[4], out=out, evaluate=False, progress=False)
    return out


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer than a moment is long."""
    for module in (progress, flow, cli, export_command):
        monkeypatch.setattr(module, "SECONDS", SOON)


def slowly(function: Callable[..., Any], seconds: float = 0.4) -> Callable[..., Any]:
    def slow(*args: Any, **settings: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **settings)

    return slow


# -- the bar ---------------------------------------------------------------------------------------------------------


def test_what_is_done_soon_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.stages(["first", "second"], show=True) as done:
        done()
        done()
    assert capsys.readouterr().err == ""


def test_stages_are_named_and_counted_with_the_time_left(capsys: pytest.CaptureFixture[str], impatient: None) -> None:
    with progress.stages(["first", "second", "third"], show=True) as done:
        for _ in range(3):
            time.sleep(0.2)
            done()
    said = capsys.readouterr().err.replace("\n", "\r").split("\r")
    assert any("first:   0%" in line and "0/3" in line for line in said)
    moved = [line for line in said if "second:  33%" in line]
    assert "1/3" in moved[0]
    assert "<00:00" in moved[-1]  # time left
    assert any("third: 100%" in line and "3/3" in line for line in said)  # left standing, as any bar


class Notebook(SimpleNamespace):
    """A notebook's kernel as tqdm looks for it, with ipywidgets or without."""

    @classmethod
    def opened(cls, monkeypatch: pytest.MonkeyPatch, kernel: str, *, widgets: bool) -> None:
        shell = ModuleType("IPython")
        shell.get_ipython = lambda: cls(config={kernel: {}})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", shell)
        monkeypatch.setattr(progress.util, "find_spec", lambda name: object() if widgets else None)


def test_a_notebook_has_its_own_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    in_notebook = ModuleType("tqdm.notebook")
    in_notebook.tqdm = type("Widget", (tqdm,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.notebook", in_notebook)
    assert progress._bar() is tqdm  # no notebook
    Notebook.opened(monkeypatch, "IPKernelApp", widgets=True)
    assert progress._bar() is in_notebook.tqdm
    with progress.progress_bar(1, "x", unit="y", show=False) as bar:
        assert type(bar) is in_notebook.tqdm
    Notebook.opened(monkeypatch, "IPKernelApp", widgets=False)  # warnings are errors here
    assert progress._bar() is tqdm
    Notebook.opened(monkeypatch, "TerminalIPythonApp", widgets=True)
    assert progress._bar() is tqdm


def test_the_bar_of_a_notebook_takes_what_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed (pip install ipywidgets)")
    from tqdm import notebook

    shown: list[Any] = []
    monkeypatch.setattr(notebook, "display", shown.append)
    monkeypatch.setattr(progress, "_bar", lambda: notebook.tqdm)
    monkeypatch.setattr(progress, "SECONDS", SOON)
    with progress.progress_bar(2, "piece by piece", unit="piece", show=True) as bar:
        bar.update(2)
    with progress.stages(["late"], show=True) as done:
        time.sleep(0.2)
        done()
    with progress.progress_bar(None, "uncounted", unit="", show=True, uncounted=True):
        pass
    assert [type(box).__name__ for box in shown] == ["TqdmHBox"] * 3
    assert "piece by piece" in repr(shown[0])
    assert capsys.readouterr().err == ""


# -- the commands ----------------------------------------------------------------------------------------------------


def test_samples_are_counted_block_by_block_and_are_the_same(run_folder: Path) -> None:
    trained = pyrnode.load(run_folder)
    seen = list[int]()
    bar = SimpleNamespace(update=seen.append)
    z, _, _ = trained.base_sample(10, None, seed=3)
    trained.chunk = 6
    x = trained._decoded(z, None, trained.solver, bar)
    assert seen == [2, 2, 2, 1, 1, 2]  # two chunks through three blocks
    assert torch.equal(x, trained.decode(z))
    assert torch.equal(x, trained.sample(10, seed=3, progress=True))
    assert trained.sample(0, progress=True).shape == (0, 2)


COMMANDS = {
    "sample": (["RUN", "--out", "x.npy"], "sample:", (flow.Flow, "unsolve")),
    "export": (
        ["RUN", "--to", "safetensors", "--out", "x.safetensors"],
        "export: ",
        (TorchFlow, "log_prob"),
    ),
    "verify": (["FILE"], "verify [", (exported, "verify")),
    "report": (["RUN", "--out", "x.html"], "report: run", (pages, "read")),
    "doctor": ([], "doctor: Julia", (doctor, "_julia")),
    "solvers": (["--engine", "torch"], "solvers [", (TorchEngine, "solvers")),
}


@pytest.fixture(scope="module")
def exported_file(run_folder: Path) -> Path:
    path = run_folder.parent / "flow.safetensors"
    exported.save(pyrnode.load(run_folder).to_torch(), path, to="safetensors")
    return path


@pytest.fixture
def command(
    request: pytest.FixtureRequest,
    run_folder: Path,
    exported_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    impatient: None,
) -> tuple[list[str], str]:
    """A command that takes long, and the beginning of its bar."""
    monkeypatch.chdir(tmp_path)
    arguments, bar, (owner, slow) = COMMANDS[request.param]
    monkeypatch.setattr(owner, slow, slowly(getattr(owner, slow)))
    names = {"RUN": str(run_folder), "FILE": str(exported_file)}
    return [request.param, *(names.get(argument, argument) for argument in arguments)], bar


@pytest.mark.parametrize("command", COMMANDS, indirect=True)
def test_a_long_command_has_a_bar(command: tuple[list[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments, bar = command
    assert cli.main(arguments) in (0, 1)  # 1: the doctor found something
    captured = capsys.readouterr()
    assert captured.err.count(bar) >= 3
    assert bar not in captured.out


@pytest.mark.parametrize("command", COMMANDS, indirect=True)
def test_quiet_and_json_print_the_result_alone(
    command: tuple[list[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _ = command
    assert cli.main([*arguments, "--quiet"]) in (0, 1)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out
    assert cli.main([*arguments, "--json"]) in (0, 1)
    captured = capsys.readouterr()
    assert captured.err == ""
    json.loads(captured.out)


def test_scores_as_json_are_the_json_alone(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text("0.5,1.25\n1.5,2.75\n")
    arguments = ["score", str(run_folder), str(tmp_path / "x.csv"), "--out", str(tmp_path / "y.csv"), "--scores-only"]
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["out"] == str(tmp_path / "y.csv")
    assert cli.main(arguments) == 0
    assert "score: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0.5,1.25\n1.5,2.75\n", "a,b\n0.5,1.25\n1.5,2.75"], ids=["plain", "names, no end"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_the_rows_of_a_text_file_are_counted_for_the_time_left(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    chunks = open_chunks(path, 10, event_shape=(2,))
    assert chunks.rows is None
    assert chunks.about() == sum(len(values) for _, values in chunks) == 2
