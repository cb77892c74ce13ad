"""Every number in README.md is one that a script of the repository left in benchmarks/results, or a setting.

`measured` writes README's statements anew, from those files; `SETTINGS` lists what is no measurement, each checked
against what it is a setting of where there is such a thing. A number that neither covers is an error.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import adaptive, busy, conditional, optimisers, records, speed
from pyrnode import Config, Flow
from pyrnode.data import load
from pyrnode.version import VERSION

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.])[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[−-]?\d+)?(?!\w)")  # 8gaussians is a name
CASES = ("mlp-512", "mnist-8")


def flat(text: str) -> str:
    """A text on one line."""
    return re.sub(r"\s+", " ", text)


def said(path: Path) -> str:
    """What a page says: its prose, and what its code is commented with, but neither code nor where links lead."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```\w*\n(.*?)^```$", lambda code: comments(code[1]), text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    (.*)$", lambda line: comments(line[1]), text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return flat(re.sub(r"`[^`]*`", "`…`", text))


def comments(code: str) -> str:
    return "\n".join(re.findall(r"(?:^|\s)# (.*)$", code, flags=re.MULTILINE))


# -- what was measured -----------------------------------------------------------------------------------------------


def minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.1f}"


def measured() -> Iterator[str]:
    """The statements of README.md that hold measurements, as the files have them."""
    (look,) = records.results("first-look")
    yield f"without max_steps it takes {look['steps']:,}, and comes to {look['report']['gap']:.3f} nats of the truth"
    digits, toy = records.results("demo")
    yield f"The demo itself took {minutes(digits['demo_seconds'])} on two cores"
    scores = digits["report"]
    others = " | ".join(f"{scores['baselines'][name]['bits']:.3f}" for name in ("gaussian", "mixture", "kde"))
    best = f"**{scores['score']['bits']:.3f} ± {scores['score']['bits_error']:.3f}**"
    yield f"| digits, bits/dim (lower is better) | {best} | {others} | |"
    scores = toy["report"]
    others = " | ".join(signed(scores["baselines"][name]["nats"]) for name in ("gaussian", "mixture", "kde"))
    best, truth = f"**{signed(scores['score']['nats'])}**", signed(-scores["true_entropy"])
    yield f"| 8gaussians, nats (higher is better) | {best} | {others} | {truth} |"
    yield f"the flow is {scores['gap']:.3f} ± {scores['gap_error']:.3f} nats from the truth"
    yield f"the test sample's standard error of {scores['score']['nats_error']:.3f}"
    yield from of_mnist()
    yield from of_speed()


def of_mnist() -> Iterator[str]:
    (run,) = records.results("mnist")
    report = run["report"]
    yield f"a step took {run['seconds_per_step']:.2f} s"
    yield f"made {run['steps']:,} steps, and reached **{report['score']['bits']:.3f} bits/dim**"
    centre, draws = report["bin_centre"]["bits"], {1: "one draw"}[report["draws"]]
    yield f"on {report['samples']:,} test images (dequantised, {draws}; {centre:.3f} at bin centres)"
    yield f"differs by {report['disagreement']:.4f} nats/dim"


def of_speed() -> Iterator[str]:
    mlp, images = (records.results(f"speed-{case}")[0] for case in CASES)
    ours, theirs = ([round(row[f"{side}_mib"]) for row in (mlp, images)] for side in ("pyrnode", "reference"))
    yield f"{ratio(mlp)} times as fast on the 2-D network, with {ours[0]} MiB of peak memory beside {theirs[0]};"
    yield f"; {ratio(images)} times on the paper's MNIST network at batch 8, with {ours[1]} MiB beside {theirs[1]}."
    bare = {row["case"]: row for row in reversed(records.results("speed-no-compiler"))}
    yield f"without one it is {ratio(bare['mlp-512'])} and {ratio(bare['mnist-8'])} times."


# -- what is set -----------------------------------------------------------------------------------------------------


def parameters(preset: str, shape: tuple[int, ...], levels: int) -> int:
    flow = Flow.build(Config.preset(preset), shape, levels=levels)
    return sum(parameter.numel() for parameter in flow.parameters())


def of_mnist_cpu() -> bool:
    training = Config.preset("mnist-cpu").training
    solver = Config.preset("mnist-cpu").evaluation.solver
    (run,) = records.results("mnist")
    return (
        (training.max_steps, training.batch_size, training.minutes) == (2800, 50, 25)
        and (solver.name, solver.rtol) == ("DP5", 1e-5)
        and run["report"]["training_solver"] == "RK4 step 0.5"
        and run["report"]["solver"].startswith("DP5 rtol 1e-05")
    )


def of_digits() -> bool:
    digits = load("digits")
    return digits.event_shape == (1, 8, 8) and digits.levels == 17


def python() -> bool:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return bool(project["requires-python"] == ">=3.11")


SETTINGS: dict[str, Any] = {
    "*How to train your neural ODE* (2020)": "the paper's year",
    "Python 3.11 or newer": python,
    "2-D": "a word",
    "(5, 2)": "a shape, which test_examples.py's reading of README sees",
    "(eq. 17 of the paper)": "the paper's equation",
    "from data at t = 0 to a standard normal": "the model",
    "Vanilla FFJORD is the same with λ = 0": "the model",
    "as their sources were in 2026": "a year",
    "2,800 steps of 50 images, or what 25 minutes hold": of_mnist_cpu,
    "logits brought to mean 0 and variance 1": "the standardisation",
    "scored with DP5 at 1e-5, from which the training solver, RK4 with step 0.5,": of_mnist_cpu,
    "AVX-512": "the machine's instructions",
    "the paper's network, trained for days, gets to 0.97": "the paper's Table 1",
    "(MNIST: 800,636 parameters, 100 epochs)": lambda: (
        parameters("finlay2020-mnist", (1, 28, 28), 256) == 800_636
        and Config.preset("finlay2020-mnist").training.epochs == 100
    ),
    "the paper took 24 hours on one": "the paper's section 5",
    "8×8, 17 grey levels": of_digits,
    "at batch 8": "a case's name",
    "of p(x | c = 0.3)": "an argument of the line before",
}
"""What is said in numbers and was not measured: a check, or what it is where there is nothing to check."""


# -- the tests -------------------------------------------------------------------------------------------------------


def uncovered(text: str, statements: list[str]) -> dict[str, str]:
    """Numbers of a text that are in none of the statements, each with what stands around it."""
    spans = [found.span() for part in statements for found in re.finditer(re.escape(flat(part)), text)]
    return {
        found[0]: text[max(0, found.start() - 40) : found.end() + 20]
        for found in NUMBER.finditer(text)
        if not any(low <= found.start() and found.end() <= high for low, high in spans)
    }


@pytest.mark.parametrize("statement", list(measured()), ids=lambda text: text[:40])
def test_what_readme_says_is_what_was_measured(statement: str) -> None:
    assert flat(statement) in said(ROOT / "README.md")


@pytest.mark.parametrize("statement", list(SETTINGS))
def test_what_readme_says_is_set_so(statement: str) -> None:
    assert flat(statement) in said(ROOT / "README.md")
    check = SETTINGS[statement]
    assert isinstance(check, str) or check()


def test_readme_has_no_other_number() -> None:
    assert uncovered(said(ROOT / "README.md"), [*measured(), *SETTINGS]) == {}


def test_a_number_from_nowhere_is_found() -> None:
    text = said(ROOT / "README.md") + " It is 7.5 times as fast, of 1,234 rows, and −2.8 nats at 1e-7."
    assert list(uncovered(text, [*measured(), *SETTINGS])) == ["7.5", "1,234", "−2.8", "1e-7"]


TABLES = {f"speed-{case}": speed.table for case in (*CASES, "no-compiler")} | {"optimisers": optimisers.table}
"""The tables of benchmarks/README.md that are of this version, marked there; the others are dated readings."""


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_benchmarks_are_those_of_their_files(name: str) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for row in TABLES[name](records.results(name)).splitlines()[2:]:
        assert re.sub(r" +", " ", row) in re.sub(r" +", " ", text)


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_of_results_says_how_it_came_about(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["version"] == VERSION
    assert re.fullmatch(r"python -m benchmarks\.\w+ .*--json benchmarks/results/" + path.name, document["command"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", document["date"])
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?", document["commit"])
    assert document["machine"]["processor"]
    assert document["results"]


ROWS: dict[str, tuple[Any, list[dict[str, Any]], str]] = {
    "adaptive": (
        adaptive.table,
        [
            {"solver": "DP5", "case": "training step, 512", "kernel_ms": 11.5, "torch_ms": 53.5, "ratio": 4.61}
            | {"low": 4.47, "high": 4.94},
            {"solver": "DP5", "case": "log_prob, 2000", "kernel_ms": 21.2, "torch_ms": 109.7, "ratio": 5.17}
            | {"low": 4.4, "high": 7.12},
        ],
        "| DP5 | training step, 512 | 11.5 ms | 53.5 ms | 4.61 (4.47–4.94) |\n"
        "|  | `log_prob`, 2,000 | 21.2 ms | 109.7 ms | 5.17 (4.40–7.12) |",
    ),
    "busy": (
        busy.table,
        [
            {"loops": 1, "threads": 1, "wall": 1409.2, "cpu": 1407.0, "ratio": 1.0},
            {"loops": 1, "threads": 2, "wall": 947.0, "cpu": 1220.4, "ratio": 1.421},
        ],
        "| 1 | 1409, 1407 ms | 947, 1220 ms | 1.42 |",
    ),
    "conditional": (
        conditional.table,
        [
            {"task": "two-moons", "operation": "sample", "pyrnode": 0.19, "nsf": 0.12, "ratio": 1.54}
            | {"low": 1.5, "high": 1.6}
        ],
        "| two moons | `sample`, 200 × 100 | 0.19 | 0.12 | 1.54 (1.50–1.60) |",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_prints_the_table_that_its_page_has(name: str) -> None:
    table, results, expected = ROWS[name]
    assert table(results).split("\n", 2)[2] == expected


def test_results_are_left_with_machine_version_command_and_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["x.py", "--repeats", "3", "--json", "a b"])
    records.leave(None, [{}])
    records.leave(tmp_path / "new" / "x.json", [{"ratio": 1.5}])
    document = json.loads((tmp_path / "new" / "x.json").read_text(encoding="utf-8"))
    assert document["results"] == [{"ratio": 1.5}]
    assert document["command"].endswith("--repeats 3 --json 'a b'")
    assert document["version"] == VERSION
    assert document["machine"]["cores"] >= 1
    assert document["packages"]["torch"] == torch.__version__.partition("+")[0]


def test_every_script_that_measures_leaves_its_results_in_the_same_way() -> None:
    """Those that go on after a cut keep a file of lines instead, by ``--out``."""
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "ArgumentParser(" in text and "--out" not in text:
            assert ("records.json_argument(parser)" in text) == ("records.leave(" in text)
            assert '"--json"' not in text
    left = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "records.leave(" in path.read_text("utf-8")}
    assert left >= {"adaptive", "busy", "conditional", "julia_speed", "parallel", "precision", "runs", "speed"}
