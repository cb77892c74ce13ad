"""`reproduce`: every experiment in its tiny form, what its numbers mean, and what survives an interruption."""

from __future__ import annotations

import csv
import json
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import pyrnode
from pyrnode import data, evaluation
from pyrnode.cli import main
from pyrnode.config import Config
from pyrnode.errors import CheckpointError, ConfigError, DataError, TrainingDivergedError
from pyrnode.paper import (
    EXPERIMENTS,
    SCALES,
    Finding,
    ablation,
    classifier,
    convergence,
    steps,
    stiffness,
    trajectories,
)
from pyrnode.paper.scales import LABELS, PRESETS
from pyrnode.paper.study import Need, Study
from pyrnode.runs import RunFolder, read_metrics
from pyrnode.training.trainer import Trainer
from tests.page_runs import Look

TINY = SCALES["tiny"]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finding]]:
    out = tmp_path_factory.mktemp("reproduce")
    return out, {f.name: f for f in pyrnode.reproduce("all", scale="tiny", out=out, progress=False)}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_pictures_numbers_settings_and_reports(name: str, reproduced: Any) -> None:
    out, findings = reproduced
    folder, finding = out / name, findings[name]
    for figure in finding.figures:
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
    assert bool(finding.figures) == (name != "table1")
    for table, expected in finding.tables.items():
        assert len(rows(folder / f"{table}.csv")) == len(expected) > 0
    report, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for claim in finding.claims:
        assert claim.statement in report
        assert claim.ours in report
        assert claim.verdict in report
    for text in (report, page):
        assert "not comparable with the paper" in text
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert len(re.findall("<img", page)) == len(finding.figures)
    found = Look(page)
    assert found.problems == []
    if name == "classifier":  # whose networks are no flows: it has no curves, whatever runs of flows are beside it
        assert 'type="application/json"' not in page
    else:
        assert {run["name"] for run in found.data["runs"]} == set(finding.configs)
    for claim in finding.claims:
        assert " ".join(claim.ours.split()) in found.text
    for target in re.findall(r"\]\(([^)]+)\)", report):
        assert (folder / target).is_file(), target
    assert "torch" in json.loads((folder / "versions.json").read_text())["packages"]


def test_the_settings_written_are_those_of_the_runs(reproduced: Any) -> None:
    import tomllib

    out, findings = reproduced
    for name in ("fig1", "fig2", "fig4"):
        table = tomllib.loads((out / name / "settings.toml").read_text())
        assert table.keys() == findings[name].configs.keys()
        for run, settings in table.items():
            assert Config.from_dict(settings) == RunFolder(out / "runs" / run).stored_config()


def test_all_together_have_one_report(reproduced: Any) -> None:
    out, findings = reproduced
    report = (out / "report.md").read_text()
    assert re.findall(r"^# (\w+):", report, re.MULTILINE) == list(EXPERIMENTS)
    for target in re.findall(r"\]\(([^)]+)\)", report):
        assert (out / target).is_file(), target
    pictures = sum(len(finding.figures) for finding in findings.values())
    assert len(re.findall("data:image/png;base64", (out / "report.html").read_text())) == pictures


def test_methods_differ_in_nothing_but_what_is_compared(reproduced: Any) -> None:
    _, findings = reproduced
    configs = findings["fig2"].configs | findings["fig4"].configs
    for name, config in configs.items():
        method = name.split("-")[1]
        rate = {"training.learning_rate": config.training.learning_rate, "engine": config.engine}
        assert config == TINY.config("digits", method, seed=config.seed).override(rate)
    one, other = (configs[f"digits-{m}-seed0"] for m in ("ffjord", "rnode"))
    assert (one.data, one.flow, one.evaluation, one.seed) == (other.data, other.flow, other.evaluation, other.seed)


# -- what the numbers mean -------------------------------------------------------------------------------------------


def test_the_ratio_of_times_is_that_of_the_recorded_curves(reproduced: Any) -> None:
    out, findings = reproduced
    recorded: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows(out / "fig2" / "curves.csv"):
        key = row["method"], int(row["seed"])
        recorded.setdefault(key, []).append((float(row["seconds"]), float(row["bits"])))
    target = max(min(bits for _, bits in curve) for curve in recorded.values())
    times = {}
    for key, curve in recorded.items():  # linear interpolation of the running minimum, by numpy
        seconds, best = [s for s, _ in curve], np.minimum.accumulate([b for _, b in curve])
        falling = [0] + [i for i in range(1, len(best)) if best[i] < best[i - 1]]
        if best[0] <= target:
            times[key] = seconds[0]
        else:
            times[key] = float(np.interp(-target, [-best[i] for i in falling], [seconds[i] for i in falling]))
    ratios = [times["FFJORD", seed] / times["RNODE", seed] for seed in TINY.seeds]
    numbers = findings["fig2"].numbers
    assert numbers["target"] == pytest.approx(target, abs=1e-12)
    assert numbers["ratio"] == pytest.approx(math.exp(np.mean(np.log(ratios))), rel=1e-9)
    assert numbers["low"] < numbers["ratio"] < numbers["high"]


def test_curves_are_the_kept_models_under_one_solver(reproduced: Any) -> None:
    out, _ = reproduced
    study = Study(TINY, out, settings={"engine": "torch"}, progress=False)
    run = study.run(Need("digits", "ffjord", 1))
    curve = study.curve(run)
    assert [point["step"] for point in curve] == [3, 6, 9, 12]
    seconds = {r["step"]: r["seconds"] for r in read_metrics(run.folder.path) if "loss" in r}
    assert [point["seconds"] for point in curve] == [seconds[step] for step in (3, 6, 9, 12)]
    flow = pyrnode.load(run.folder.snapshot(9))
    found = evaluation.measure(flow, study.validation("digits"), config=replace(flow.config.evaluation, draws=1))
    assert found.score.bits == pytest.approx(curve[2]["bits"], abs=1e-6)
    assert found.nfe == pytest.approx(curve[2]["nfe"])


@pytest.mark.parametrize("method", ["rnode", "kinetic", "jacobian"])
def test_penalties_lower_what_they_penalise(method: str, reproduced: Any) -> None:
    numbers = reproduced[1]["fig4"].numbers
    if method != "jacobian":
        assert numbers[f"E {method}"] < numbers["E none"]
    if method != "kinetic":
        assert numbers[f"n {method}"] < numbers["n none"]


def test_a_step_that_no_longer_resolves_the_dynamics_is_dated(reproduced: Any) -> None:
    values = [0.0, 0.02, 0.001, 0.5, 0.6]
    history = [{"step": 10 * i, "validation": 1.0, "disagreement": x} for i, x in enumerate(values)]
    run = SimpleNamespace(history=[*history, {"step": 41, "loss": 1.0}])
    assert ablation.unresolved(run) == 30  # type: ignore[arg-type]
    run.history = history[:3]
    assert ablation.unresolved(run) is None  # type: ignore[arg-type]
    assert reproduced[1]["fig4"].tables["fig4"][0]["unresolved from step"] == "never"


def test_a_regularised_flow_goes_straighter(reproduced: Any) -> None:
    numbers = reproduced[1]["fig1"].numbers
    assert numbers["squared change of speed regularised"] < numbers["squared change of speed unregularised"]
    assert numbers["E regularised"] < numbers["E unregularised"]
    assert numbers["n regularised"] < numbers["n unregularised"]


def test_solvers_converge_to_the_accurate_one(reproduced: Any) -> None:
    out, findings = reproduced
    table = rows(out / "steps" / "steps.csv")
    for flow in ("regularised", "not regularised"):
        off = {row["solver"]: float(row["off by (bits/dim)"]) for row in table if row["flow"] == flow}
        nfe = {row["solver"]: float(row["nfe"]) for row in table if row["flow"] == flow}
        assert off["Euler, step 1"] > off["Euler, step 0.25"] > off["RK4, step 0.25"]
        assert off["RK4, step 0.125"] < 1e-4
        right = min(nfe[solver] for solver in off if off[solver] <= steps.RIGHT)
        assert findings["steps"].numbers["nfe rnode" if flow == "regularised" else "nfe none"] == right


@pytest.mark.needs_julia
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_solvers_of_julia_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "FIXED", ("RK4",))
    monkeypatch.setattr(steps, "ADAPTIVE", ())
    (finding,) = pyrnode.reproduce("steps", scale="tiny", out=tmp_path, engine="julia", progress=False)
    table = rows(tmp_path / "steps" / "steps.csv")
    assert "Engine: julia." in (tmp_path / "steps" / "report.md").read_text()
    labels = [label.partition(",")[0] for label in finding.figures["steps"].axes[0].get_legend_handles_labels()[1]]
    for flow in ("regularised", "not regularised"):
        found = {row["solver"]: row for row in table if row["flow"] == flow}
        assert not any(row["failed"] for row in found.values())
        off = {solver: float(row["off by (bits/dim)"]) for solver, row in found.items()}
        for name, bound in (("Vern7", 1e-5), ("VCABM", 2e-3), ("ROCK2", 2e-4)):
            assert labels.count(name) == 2
            assert off[f"{name}, tolerance 0.0001"] < bound
            assert off[f"{name}, tolerance 0.01"] < 0.05
        # A method of order 7, one of many steps, and a stabilised one of low order, which pays with evaluations.
        nfe = {solver: float(row["nfe"]) for solver, row in found.items()}
        at = "tolerance 0.0001"
        assert nfe[f"VCABM, {at}"] < nfe[f"Vern7, {at}"] < nfe[f"ROCK2, {at}"]


def test_the_table_has_a_row_for_each_method_and_no_published_number_for_other_data(reproduced: Any) -> None:
    table = rows(reproduced[0] / "table1" / "table1.csv")
    assert [row["method"] for row in table] == ["FFJORD (here, 2 seed(s))", "RNODE (here, 2 seed(s))"]
    numbers = reproduced[1]["table1"].numbers
    for row, method in zip(table, ("ffjord", "rnode"), strict=True):
        assert row["dequantised (bits/dim)"].startswith(f"{numbers[f'digits {method} bits']:.3f} ± ")
        assert row["bin centre (bits/dim)"].startswith(f"{numbers[f'digits {method} bin centre']:.3f} ± ")


def test_scores_of_the_table_are_those_of_evaluate(reproduced: Any) -> None:
    out, findings = reproduced
    study = Study(TINY, out, settings={"engine": "torch"}, progress=False)
    bits = []
    for seed in TINY.seeds:
        run = study.run(Need("digits", "rnode", seed))
        bits.append(pyrnode.evaluate(run.flow, study.splits(run.config), baselines=False).score.bits)
    assert findings["table1"].numbers["digits rnode bits"] == pytest.approx(np.mean(bits), abs=1e-6)


# -- their parts, against oracles ------------------------------------------------------------------------------------


def test_speed_change_of_a_parabola() -> None:
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    straight, parabola = 2 * t, t**2  # speeds 2 and 2t, whose squared changes are 0 and 4
    states = torch.stack((straight, parabola), 1)[..., None]
    assert trajectories.speed_change(t, states[:, :1]) == pytest.approx(0, abs=1e-18)
    assert trajectories.speed_change(t, states[:, 1:]) == pytest.approx(4, rel=1e-9)
    assert trajectories.speed_change(t, states) == pytest.approx(2, rel=1e-9)


def test_time_to_reach_a_score() -> None:
    curve = [{"seconds": s, "bits": b} for s, b in ((1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (5.0, 1.0))]
    assert convergence.time_to_reach(curve, 6) == 1
    assert convergence.time_to_reach(curve, 4) == 1.5
    assert convergence.time_to_reach(curve, 3) == 2
    assert convergence.time_to_reach(curve, 2) == 3.5  # from the best so far, at 2 s, straight to 5 s
    assert convergence.time_to_reach(curve, 0.5) == math.inf
    assert convergence.common_target([curve, curve[:2]]) == 3


def test_interval_of_ratios_is_students() -> None:
    ratios = [1.5, 2.0, 3.0, 2.5]
    mean, low, high = convergence.ratio_with_interval(ratios)
    logs = np.log(ratios)
    expected = stats.t.interval(0.95, 3, np.mean(logs), stats.sem(logs))
    assert (math.log(low), math.log(high)) == pytest.approx(expected)
    assert mean == pytest.approx(stats.gmean(ratios))
    assert convergence.ratio_with_interval([2.0])[1] == 0


def test_confidence_band_of_curves() -> None:
    curves = [[{"seconds": s, "bits": b + s} for s in (0.0, 10.0)] for b in (1.0, 2.0, 4.0)]
    times, mean, half = convergence.band(curves, 11)
    assert times == pytest.approx(np.arange(11.0))
    assert mean == pytest.approx(7 / 3 + times)
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem([1, 2, 4]))


def test_rank_correlation_and_its_interval() -> None:
    x = np.arange(50.0)
    assert stiffness.spearman(x, x**3) == pytest.approx((1, 1, 1))
    noisy = x + np.random.default_rng(0).normal(scale=20, size=50)
    value, low, high = stiffness.spearman(x, noisy)
    assert value == pytest.approx(stats.spearmanr(x, noisy).statistic)
    fisher = np.tanh(np.arctanh(value) + np.array([-1, 1]) * 1.96 * math.sqrt(1.06 / 47))  # Fieller et al. 1957
    assert (low, high) == pytest.approx(tuple(fisher), abs=0.1)
    value, low, high = stiffness.spearman(x, np.abs(x - 24.5))
    assert value == pytest.approx(0, abs=1e-12)
    assert low < 0 < high


# -- interruption, resume, and what is refused -----------------------------------------------------------------------


def test_an_interrupted_experiment_goes_on_bit_for_bit(
    tmp_path: Path, reproduced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Trainer._validate

    def stop(trainer: Trainer) -> None:
        validate(trainer)
        trainer._stop = trainer.state.progress.step == 20

    monkeypatch.setattr(Trainer, "_validate", stop)
    with pytest.raises(KeyboardInterrupt):
        pyrnode.reproduce("fig1", scale="tiny", out=tmp_path, progress=False)
    monkeypatch.setattr(Trainer, "_validate", validate)
    assert not (tmp_path / "fig1" / "report.html").exists()
    with pytest.raises(CheckpointError, match="already exists; pass resume=True"):
        pyrnode.reproduce("fig1", scale="tiny", out=tmp_path, progress=False)
    (finding,) = pyrnode.reproduce("fig1", scale="tiny", out=tmp_path, resume=True, progress=False)
    assert finding.numbers == reproduced[1]["fig1"].numbers
    for method in ("rnode", "none"):
        name = f"two-bumps-{method}-seed0"
        models = [pyrnode.load(out / "runs" / name).state_dict() for out in (tmp_path, reproduced[0])]
        assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])
        ours, theirs = (read_metrics(out / "runs" / name) for out in (tmp_path, reproduced[0]))
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]


def test_what_is_finished_is_kept(reproduced: Any) -> None:
    out, _ = reproduced
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert pyrnode.reproduce("fig2", scale="tiny", out=out, resume=True, progress=False) == []
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_bad_input(tmp_path: Path, reproduced: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown experiment 'fig7'.*known: all, classifier, fig1"):
        pyrnode.reproduce("fig7", out=tmp_path)
    with pytest.raises(ConfigError, match="unknown scale 'huge'; known: cpu, paper, tiny"):
        pyrnode.reproduce("fig1", scale="huge", out=tmp_path)
    with pytest.raises(ConfigError, match="holds experiments at scale 'tiny', not 'cpu'"):
        pyrnode.reproduce("fig1", scale="cpu", out=reproduced[0], resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        pyrnode.reproduce("fig1", scale="tiny", out=tmp_path / "file" / "out", progress=False)
    with pytest.raises(ConfigError, match="unknown data set of the experiments 'svhn'"):
        TINY.config("svhn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_damaged_results_are_named(tmp_path: Path, reproduced: Any) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(reproduced[0], out)
    (out / "fig4" / "finding.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"finding.json is damaged .* delete .*fig4 and run"):
        pyrnode.reproduce("all", scale="tiny", out=out, resume=True, progress=False)
    shutil.rmtree(out / "fig3")
    next((out / "runs").glob("digits-ffjord*/curve.json")).write_text("[")
    with pytest.raises(CheckpointError, match=r"curve.json is damaged .* delete it"):
        pyrnode.reproduce("fig3", scale="tiny", out=out, resume=True, progress=False)
    shutil.rmtree(out / "classifier")
    next((out / "classifiers").iterdir()).write_text("")
    with pytest.raises(CheckpointError, match=r"json is damaged .* delete it"):
        pyrnode.reproduce("classifier", scale="tiny", out=out, resume=True, progress=False)


def test_a_run_that_diverges_is_reported(tmp_path: Path) -> None:
    images = dict(TINY.overrides["digits"]) | {"training.max_restarts": 0, "training.clip_norm": None}
    wild = replace(TINY, learning_rates=(1e6,), overrides={"digits": images})
    study = Study(wild, tmp_path, settings={"engine": "torch"}, progress=False)
    run = study.run(Need("digits", "none"))
    assert run.diverged
    assert "is not finite" in run.diverged
    assert ablation.instability(run).startswith("diverged: after step")
    again = Study(wild, tmp_path, settings={"engine": "torch"}, progress=False).run(Need("digits", "none"))
    assert again.diverged == run.diverged
    with pytest.raises(TrainingDivergedError, match="digits-none-seed0 was never validated"):
        study.curve(run)


def test_cost_is_the_time_of_a_step_times_the_steps(
    tmp_path: Path, reproduced: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = [Need("digits", "rnode", seed) for seed in (0, 1)] + [Need("digits", "none")]
    study = Study(TINY, tmp_path, settings={"engine": "torch"}, progress=True)
    monkeypatch.setattr(study, "_step_seconds", lambda config: 10.0)
    # three runs of 12 steps, and for the tuned method two rates of three steps
    assert study.estimate(needs) == 10 * (3 * 12 + 2 * 3)
    assert "digits rnode: 2 run(s) of 12 steps, 10 s each: 5 min" in capsys.readouterr().err
    done = Study(TINY, reproduced[0], settings={"engine": "torch"}, progress=True)
    assert done.estimate(needs) == 0
    assert done._step_seconds(done.config(needs[0])) > 0


# -- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_paper_scale_is_the_published_configuration(name: str) -> None:
    kept = {"training.snapshots": True}
    assert SCALES["paper"].config(name, "rnode") == Config.preset(f"finlay2020-{name}").override(kept)
    assert SCALES["paper"].config(name, "ffjord") == Config.preset(f"ffjord-{name}").override(kept)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_scale_has_all_that_the_experiments_need(scale: Any) -> None:
    for experiment in EXPERIMENTS.values():
        for need in experiment.needs(scale):
            config = scale.config(need.data, need.method, seed=need.seed)
            assert config.data.name == need.data in PRESETS
            assert need.method in LABELS
            if need.data in scale.images:
                assert config.training.snapshots


# -- the classifier --------------------------------------------------------------------------------------------------


def test_labels_belong_to_their_images() -> None:
    from sklearn.datasets import load_digits

    config = Config().override({"data.limit": 300}).data
    known = {image.astype(int).tobytes(): label for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    images, labels = data.load("digits", config=config), data.labels("digits", config=config)
    for part in ("train", "validation", "test"):
        x, y = getattr(images, part).tensor(), getattr(labels, part).tensor()
        assert y.shape == (len(x), 1)
        assert [known[image.flatten().numpy().astype(int).tobytes()] for image in x] == y[:, 0].tolist()
    with pytest.raises(DataError, match="unknown data set with classes 'svhn'; known: cifar10, digits"):
        data.labels("svhn")


def test_labels_of_mnist_belong_to_their_images(data_dir: Path) -> None:
    from torchvision.datasets import MNIST

    config = Config().override({"data.dir": str(data_dir)}).data
    images, labels = data.load("mnist", config=config), data.labels("mnist", config=config)
    raw = MNIST(str(data_dir), train=True)
    known = {image.numpy().tobytes(): int(label) for image, label in zip(raw.data, raw.targets, strict=True)}
    x, y = images.validation.tensor()[:200], labels.validation.tensor()[:200, 0]
    assert [known[image[0].numpy().tobytes()] for image in x] == y.tolist()
    assert torch.equal(labels.test.tensor()[:, 0], MNIST(str(data_dir), train=False).targets)


def test_the_penalties_regularise_the_classifier(reproduced: Any) -> None:
    numbers = reproduced[1]["classifier"].numbers
    assert numbers["digits rnode E"] < numbers["digits none E"]
    assert numbers["digits rnode n"] < numbers["digits none n"]


@pytest.mark.slow
def test_the_classifier_learns() -> None:
    given = classifier.ClassifierConfig(hidden=(8,), epochs=4, limit=600, tolerance=1e-3, learning_rate=1e-2)
    config = classifier.settings("digits", "rnode", 0, given, {"engine": "torch"})
    model, records = classifier.train_classifier(config, given)
    assert records[-1]["cross_entropy"] < 0.5 * records[0]["cross_entropy"]
    assert classifier.score_classifier(model, config, 100)["accuracy"] > 0.75


# -- the example -----------------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parent.parent / "examples" / "reproduce.py"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_example(
    name: str, reproduced: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script asks for its experiment in the tiny form, and tells what that found (it was run by the fixture)."""
    out, findings = reproduced
    calls = []

    def reproduce(*arguments: Any, **keywords: Any) -> list[Finding]:
        calls.append((arguments, keywords))
        return [findings[name]]

    monkeypatch.setattr(pyrnode, "reproduce", reproduce, raising=False)
    monkeypatch.setattr("sys.argv", ["example", name, "--quick", "--out", str(out)])
    assert runpy.run_path(str(EXAMPLE))["main"]() == findings[name].numbers
    assert calls == [((name,), {"scale": "tiny", "out": str(out), "progress": False})]
    printed = capsys.readouterr().out
    assert printed.splitlines()
    assert "nan" not in printed


def test_the_example_knows_every_experiment() -> None:
    assert runpy.run_path(str(EXAMPLE))["HEADLINES"].keys() == EXPERIMENTS.keys()


# -- the command -----------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, reproduced: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(reproduced[0])
    assert main(["reproduce", "all", "--scale", "tiny", "--out", out, "--resume", "--quiet"]) == 0
    assert capsys.readouterr().out == f"nothing was left to do; report in {out}/report.html\n"
    assert main(["reproduce", "fig1", "--scale", "tiny", "--out", out, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pass resume=True (--resume) or another out" in error
    arguments = ["--scale", "tiny", "--out", str(tmp_path), "--quiet", "--json", "--engine", "torch"]
    assert main(["reproduce", "fig1", *arguments]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["numbers"] == reproduced[1]["fig1"].numbers


def test_ctrl_c_ends_the_estimate_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    def interrupt(trainer: Trainer) -> None:
        stopped.append(trainer)
        trainer._stop = True

    monkeypatch.setattr(Trainer, "_validate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pyrnode.reproduce("fig1", scale="tiny", out=tmp_path, progress=False)
    assert len(stopped) == 1


def test_command_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(trainer: Trainer) -> None:
        trainer._stop = True

    monkeypatch.setattr(Trainer, "_validate", interrupt)
    monkeypatch.setattr(Study, "_step_seconds", lambda self, config: 1.0)
    out = str(tmp_path / "out")
    assert main(["reproduce", "fig1", "--scale", "tiny", "--out", out, "--quiet"]) == 130
    assert f"go on with: pyrnode reproduce fig1 --scale tiny --out {out} --resume" in capsys.readouterr().err
