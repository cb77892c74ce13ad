"""The experiments by name, and `reproduce`, which runs them over shared training runs and writes what they found."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pyrnode import distributed, engines
from pyrnode.errors import CheckpointError, ConfigError, unknown_name
from pyrnode.files import write_atomically
from pyrnode.paper import ablation, classifier, convergence, galleries, potential, steps, stiffness, table, trajectories
from pyrnode.paper.experiment import Experiment
from pyrnode.paper.report import Finding, read, write, write_reports
from pyrnode.paper.scales import Scale, scale_of
from pyrnode.paper.study import Study

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        trajectories.EXPERIMENT,
        convergence.EXPERIMENT,
        stiffness.EXPERIMENT,
        ablation.EXPERIMENT,
        galleries.EXPERIMENT,
        table.EXPERIMENT,
        steps.EXPERIMENT,
        classifier.EXPERIMENT,
        potential.EXPERIMENT,
    )
}
"""The experiments by name, in the order of the paper."""


def reproduce(
    name: str,
    *,
    scale: str | Scale = "cpu",
    out: str | Path = "runs/reproduce",
    resume: bool = False,
    engine: str | None = None,
    device: str | None = None,
    data_dir: str | None = None,
    progress: bool = True,
) -> list[Finding]:
    """Repeats an experiment of Finlay et al. (2020) and sets its statements beside what comes out here.

    Every experiment has a folder of its own in `out`, with its pictures (PNG and PDF), numbers (CSV), settings,
    versions and reports. What is trained lies in ``out/runs``, and is shared by the experiments that need the same.

    Under torchrun all processes take part: in training, in the scores of the models along a run, and in those of the
    test set. They must see the same `out`.

    Args:
        name: ``"fig1"`` to ``"fig5"``, ``"table1"``, ``"steps"``, ``"classifier"``, ``"potential"``, or ``"all"``.
        scale: ``"cpu"`` (small, for two cores), ``"paper"`` (the published configuration, for a GPU), ``"tiny"`` (a
            minute, to see that everything works), or one of your own.
        out: Folder to write to.
        resume: Go on with what is in `out`: finished experiments are kept, interrupted runs go on bit for bit.
        engine: ``"torch"``, ``"julia"`` or ``"auto"``; default as the presets have it.
        device: torch device.
        data_dir: Folder of downloaded data sets.
        progress: Show progress and the estimated cost on standard error.

    Returns:
        The findings of the experiments that were run; those that `out` held already are left out.

    Raises:
        ConfigError: There is no such experiment or scale, or `out` holds another scale's.
        CheckpointError: `out` already holds the experiment and `resume` is false, or cannot be written to.
        DataError: The data is missing.
        KeyboardInterrupt: Ctrl-C; whatever was done is kept, and ``resume=True`` goes on.

    Example:
        >>> from pyrnode.paper import EXPERIMENTS
        >>> list(EXPERIMENTS)
        ['fig1', 'fig2', 'fig3', 'fig4', 'fig5', 'table1', 'steps', 'classifier', 'potential']
    """
    if name != "all" and name not in EXPERIMENTS:
        raise ConfigError(unknown_name("experiment", name, [*EXPERIMENTS, "all"]))
    world, scale, out = distributed.world(), scale_of(scale), Path(out)
    chosen = list(EXPERIMENTS.values()) if name == "all" else [EXPERIMENTS[name]]
    world.once(partial(_check_free, out, scale, chosen, resume=resume))
    engine, why = engines.choose(engine or "auto", device or "auto")
    given: dict[str, Any] = {"engine": engine, "device": device, "data.dir": data_dir}
    settings = {key: value for key, value in given.items() if value is not None}
    study = Study(scale, out, settings=settings, progress=progress, world=world)
    study.say(f"engine: {engine} ({why})")
    done = world.once(lambda: [e.name for e in chosen if (out / e.name / "report.html").exists()])
    left = [experiment for experiment in chosen if experiment.name not in done]
    study.estimate(dict.fromkeys(need for experiment in left for need in experiment.needs(scale)))
    findings = []
    for experiment in left:
        study.say(f"== {experiment.name}: {experiment.title}")
        folder = world.once(partial(_made, out / experiment.name))
        finding = experiment.measure(study)
        world.once(partial(write, finding, folder, scale=scale.name, published=scale.published))
        findings.append(finding)
    if name == "all":
        world.once(lambda: write_reports(out, [(read(out / e.name), out / e.name) for e in chosen]))
    return findings


def _check_free(out: Path, scale: Scale, chosen: list[Experiment], *, resume: bool) -> None:
    """Raises an error where the folder holds one of the experiments already, or another scale's; notes the scale."""
    for experiment in chosen:
        if (out / experiment.name).exists() and not resume:
            raise CheckpointError(f"{out / experiment.name} already exists; pass resume=True (--resume) or another out")
    _check_scale(out, scale)


def _check_scale(out: Path, scale: Scale) -> None:
    """Notes the scale in the folder, which is for one scale only."""
    note = _made(out) / "scale.txt"
    if not note.exists():
        write_atomically(note, f"{scale.name}\n".encode())
    elif (there := note.read_text(encoding="utf-8").strip()) != scale.name:
        raise ConfigError(f"{out} holds experiments at scale {there!r}, not {scale.name!r}: use another out (--out)")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror}; use another out (--out)") from error
    return folder
