"""The command line: what a person types, what a program reads, and how it fails."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pyrnode
from pyrnode import cli
from pyrnode.config import Config
from pyrnode.errors import ConfigError
from pyrnode.runs import read_metrics

TINY = ["--set", "hidden=[4]", "--set", "max_steps=4", "--set", "batch_size=20", "--quiet"]


def run(*arguments: str) -> int:
    return cli.main([*arguments])


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "vectors"
    assert run("train", "8gaussians", "--out", str(out), "--set", "data.samples=200", *TINY) == 0
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "images"
    settings = ["--set", "data.limit=100", "--set", "blocks=1", "--set", "test_limit=20", "--set", "draws=2"]
    settings += ["--set", "evaluation.solver.rtol=1e-3", "--set", "evaluation.solver.atol=1e-3", "--set", "grid=4"]
    assert run("train", "digits", "--out", str(out), *settings, *TINY) == 0
    return out


def one_line(captured: Any) -> str:
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return str(captured.err).rstrip("\n")


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_every_command_has_help_with_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    example = cli._COMMANDS[name].example
    assert f"example: {example}" in text
    program, *arguments = shlex.split(example)
    assert program == "pyrnode"
    assert cli._parser().parse_args(arguments).command == name


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ("train", "evaluate", "sample", "presets", "solvers", "install-julia", "doctor", "demo"):
        assert name in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pyrnode {pyrnode.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["trian"], "unknown command 'trian' (did you mean 'train'?); known: demo, "),
        (["x"], "unknown command 'x'; known: demo, doctor"),
        (["train", "digits", "--out", "x", "--presett", "toy"], "--presett toy (did you mean --preset?)"),
        (["train", "digits", "--out", "x", "--minutse=5"], "--minutse=5 (did you mean --minutes?)"),
        (["train", "digits", "--out", "x", "17"], "arguments: 17; pyrnode train --help lists what there is"),
        (["export", "x", "--to", "onxn"], "unknown value 'onxn' (did you mean 'onnx'?)"),
        (["train", "digits"], "required: --out"),
        (["train", "digits", "--out", "x", "--step-size", "big"], "invalid step size value: 'big'"),
        (["train", "digits", "--out", "x", "--epochs", "1.5"], "invalid int value: '1.5'"),
        (["sample", "x"], "required: --out"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


# -- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_read_as_in_toml() -> None:
    pairs = ["epochs=3", "alpha=1e-3", "hidden=[4, 5]", "flip=true", "clip_norm=none", "solver.name=DP5", 'dir="a=b"']
    assert cli.train.settings(pairs) == {
        "epochs": 3,
        "alpha": 1e-3,
        "hidden": [4, 5],
        "flip": True,
        "clip_norm": None,
        "solver.name": "DP5",
        "dir": "a=b",
    }
    for bad in ("epochs", "=3", ""):
        with pytest.raises(ConfigError, match="expected key=value"):
            cli.train.settings([bad])


def test_options_become_settings(vectors: Path, tmp_path: Path) -> None:
    arguments = ["--solver", "Heun", "--step-size", "0.5", "--epochs", "2", "--seed", "3", "--device", "cpu"]
    arguments += ["--engine", "torch", "--preset", "toy", "--data-dir", str(tmp_path), "--no-evaluation"]
    code = run("train", "moons", "--out", str(tmp_path / "run"), *arguments, "--set", "samples=100", *TINY)
    assert code == 0
    expected = Config.preset("toy").override(
        {
            "data.name": "moons",
            "data.dir": str(tmp_path),
            "samples": 100,
            "solver.name": "Heun",
            "step_size": 0.5,
            "epochs": 2,
            "seed": 3,
            "device": "cpu",
            "engine": "torch",
            "hidden": [4],
            "max_steps": 4,
            "batch_size": 20,
        }
    )
    assert Config.preset(str(tmp_path / "run" / "config.toml")) == expected
    assert not (tmp_path / "run" / "report.json").exists()


def test_an_automatic_step_may_be_asked_for(tmp_path: Path) -> None:
    run_to = ["--out", str(tmp_path), "--step-size", "auto", "--no-evaluation", "--set", "samples=100"]
    assert run("train", "moons", *run_to, *TINY) == 0
    assert pyrnode.load(tmp_path).config.solver.step_size == 1.0


# -- train, evaluate, sample -----------------------------------------------------------------------------------------


def test_train_prints_the_report_and_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "moons", "--out", str(tmp_path), "--set", "data.samples=200", *TINY) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{(tmp_path / 'report.txt').read_text()}written to {tmp_path}\n"
    assert captured.err == ""


def test_train_shows_its_progress_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for argument in TINY if argument != "--quiet"]
    code = run("train", "moons", "--out", str(tmp_path), "--set", "samples=200", "--no-evaluation", *arguments)
    assert code == 0
    captured = capsys.readouterr()
    for part in ("loss=", "nats=", "E=", "n=", "nfe=4"):
        assert part in captured.err
    assert captured.out == f"trained, not evaluated\nwritten to {tmp_path}\n"


def test_train_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "moons", "--out", str(tmp_path), "--json", "--set", "data.samples=200", *TINY) == 0
    said = capsys.readouterr()
    assert said.err == ""
    table = json.loads(said.out)
    assert table == {"out": str(tmp_path), "report": json.loads((tmp_path / "report.json").read_text())}


def test_train_on_a_file_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32))
    arguments = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), "--no-evaluation", "--quiet"]
    assert run(*arguments, *TINY) == 0
    assert run(*arguments, "--resume", "--set", "max_steps=6") == 0
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert run(*arguments) == 1
    assert "already holds a run; pass resume=True (--resume)" in one_line(capsys.readouterr())


@pytest.mark.parametrize("which", ["vectors", "images"])
def test_evaluating_a_run_again_gives_the_runs_own_numbers(
    which: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    out = request.getfixturevalue(which)
    capsys.readouterr()
    assert run("evaluate", str(out), "--json") == 0
    said = capsys.readouterr()
    assert said.err == ""
    again, first = json.loads(said.out), json.loads((out / "report.json").read_text())
    for report in (again, first):
        report.pop("seconds")
    assert again == first
    assert run("evaluate", str(out), "--quiet") == 0
    assert capsys.readouterr().out == (out / "report.txt").read_text()


def test_data_that_have_changed_since_are_not_held_out(tmp_path: Path, capsys: Any) -> None:
    """A file that has grown is split anew: what is tested now was trained on then."""
    x = np.random.default_rng(0).normal(size=(120, 2))
    path, folder = tmp_path / "x.npy", tmp_path / "run"
    np.save(path, x)
    train = ["train", str(path), "--out", str(folder), "--set", "max_steps=2", "--set", "hidden=[4]", "--no-evaluation"]
    assert run(*train, "--quiet") == 0
    assert run("evaluate", str(folder), "--quiet") == 0
    score = ["score", str(folder), str(path), "--out", str(tmp_path / "s.csv"), "--calibrate", "test", "--quiet"]
    assert run(*score) == 0
    np.save(path, np.concatenate([x, x[:5] + 1]))
    capsys.readouterr()
    for command in (["evaluate", str(folder), "--quiet"], score):
        assert run(*command) == 1
        assert "is no longer what" in capsys.readouterr().err


def test_evaluate_takes_settings_and_other_data(vectors: Path, tmp_path: Path, capsys: Any) -> None:
    values = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    settings = ["--set", "test_limit=3", "--set", "evaluation.solver=Tsit5", "--set", "rtol=1e-6"]
    assert run("evaluate", str(vectors), "--data", str(tmp_path / "x.npy"), *settings, "--json", "--quiet") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["solver"]) == (3, "Tsit5 rtol 1e-06 atol 1e-05")
    assert report["true_entropy"] is None
    test = pyrnode.data.load(tmp_path / "x.npy").test.tensor()[:3]
    flow = pyrnode.load(vectors)
    expected = flow.log_prob(test, solver=Config().override({"solver.name": "DP8"}).solver).mean()
    assert report["score"]["nats"] == pytest.approx(expected.item(), abs=1e-4)


def test_a_model_file_may_be_named_instead_of_the_run(vectors: Path, tmp_path: Path) -> None:
    for source in (vectors, vectors / "model.safetensors"):
        assert run("sample", str(source), "-n", "3", "--out", str(tmp_path / f"{source.name}.npy")) == 0
    a, b = (np.load(tmp_path / f"{name}.npy") for name in ("vectors", "model.safetensors"))
    assert np.array_equal(a, b)


def test_sample_to_an_array(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.npy"
    assert run("sample", str(vectors), "-n", "5", "--seed", "2", "--temperature", "0.5", "--out", str(out)) == 0
    assert capsys.readouterr().out == f"5 samples written to {out}\n"
    expected = pyrnode.load(vectors).sample(5, seed=2, temperature=0.5)
    assert np.array_equal(np.load(out), expected.numpy())


def test_sample_to_a_grid_of_images(images: Path, tmp_path: Path) -> None:
    assert run("sample", str(images), "-n", "4", "--out", str(tmp_path / "x.png")) == 0
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        assert min(image.size) >= 16
    assert run("sample", str(images), "-n", "4", "--out", str(tmp_path / "x.npy")) == 0
    values = np.load(tmp_path / "x.npy")
    assert (values.shape, values.dtype) == ((4, 1, 8, 8), np.uint8)
    assert values.max() <= 16


# -- demo ------------------------------------------------------------------------------------------------------------


def test_demo_runs_both_and_prints_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    class Result:
        interrupted, report = False, "the report"

    def train(data: str, **arguments: Any) -> Result:
        calls.append((data, arguments))
        return Result()

    monkeypatch.setattr("pyrnode.demo.train", train)
    assert run("demo", "--out", str(tmp_path), "--quiet") == 0
    assert [(data, a["preset"], a["resume"]) for data, a in calls] == [
        ("digits", "digits", True),
        ("8gaussians", "toy", True),
    ]
    assert capsys.readouterr().out.count("the report") == 2
    Result.interrupted = True
    assert run("demo", "--out", str(tmp_path), "--quiet") == cli.INTERRUPTED


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "digts", "--out", "RUN"], "did you mean 'digits'"),
        (["train", "no/file.npy", "--out", "RUN"], "does not exist"),
        (["train", "moons", "--out", "RUN", "--set", "epoch=3"], "did you mean 'epochs'"),
        (["train", "moons", "--out", "RUN", "--set", "epochs"], "expected key=value"),
        (["train", "moons", "--out", "RUN", "--set", "epochs=x"], "epochs = 'x': expected int"),
        (["train", "moons", "--out", "RUN", "--preset", "toi"], "did you mean 'toy'"),
        (["train", "moons", "--out", "RUN", "--solver", "RK5"], "did you mean 'RK4'"),
        (["train", "moons", "--out", "RUN", "--device", "gpu"], "device = 'gpu'"),
        (["train", "moons", "--out", "FILE"], "cannot make the folder"),
        (["evaluate", "RUN"], "does not exist"),
        (["evaluate", "FILE"], "truncated, or not a safetensors file"),
        (["evaluate", "GOOD", "--set", "draw=3"], "did you mean 'draws'"),
        (["evaluate", "GOOD", "--data", "digits"], "expected (batch, 2)"),
        (["evaluate", "GOOD", "--data", "no.npy"], "does not exist"),
        (["sample", "RUN", "--out", "x.npy"], "does not exist"),
        (["sample", "GOOD", "--out", "x.jpg"], "expected a .png (images), .npy or .csv (tables) file"),
        (["sample", "GOOD", "--out", "x.png"], "samples are not images"),
        (["sample", "GOOD", "--out", "no/x.npy"], "cannot write no/x.npy: No such file or directory"),
        (["sample", "GOOD", "--out", "x.npy", "-n", "-1"], "expected a number of samples, at least 0"),
        (["presets", "digts"], "did you mean 'digits'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_leaves_nothing_behind(
    arguments: list[str],
    expected: str,
    vectors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    capsys.readouterr()
    quiet = ["--quiet"] if arguments[0] in ("train", "evaluate") else []
    assert run(*[str(vectors) if a == "GOOD" else a for a in arguments], *quiet) == 1
    line = one_line(capsys.readouterr())
    assert line.startswith("pyrnode: ")
    assert expected in line
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
    assert (tmp_path / "FILE").read_text() == "mine"


def test_ctrl_c_outside_the_loop_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pyrnode, "train", interrupt)
    assert run("train", "moons", "--out", str(tmp_path / "a b")) == 130
    assert one_line(capsys.readouterr()) == (
        f"interrupted; go on with: pyrnode train moons --out '{tmp_path}/a b' --resume"
    )
    monkeypatch.setattr(pyrnode, "load", interrupt)
    assert run("evaluate", str(tmp_path)) == 130
    assert one_line(capsys.readouterr()) == "pyrnode: interrupted"


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pyrnode.__file__).parents[1])}
    arguments = (sys.executable, "-W", "error", "-m", "pyrnode", *arguments)
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_the_module_runs_as_a_program_and_exits_with_its_code(tmp_path: Path) -> None:
    process = command("evaluate", str(tmp_path / "none"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    process = command("presets", "toy")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert err == ""
