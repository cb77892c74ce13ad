"""The card beside a run's model: what it is, what it was trained on, how it scored, and what it is not for."""

from __future__ import annotations

import math
import re

from pyrnode import solvers
from pyrnode.data import Splits
from pyrnode.data.frames import said
from pyrnode.evaluation import Report
from pyrnode.flow import Flow
from pyrnode.runs import Record, RunFolder
from pyrnode.version import VERSION

NAME = "model_card.md"
"""The card's file, beside the model."""

_COLUMNS = 40
"""Names of columns that a card lists."""


def write_card(folder: RunFolder, flow: Flow, splits: Splits, report: Report | None, history: list[Record]) -> None:
    """Writes the card of the model in a run's folder.

    Raises:
        CheckpointError: It cannot be written.
    """
    folder.write_text(NAME, model_card(flow, splits, report, history, folder.model.name))


def model_card(
    flow: Flow, splits: Splits, report: Report | None, history: list[Record], file: str = "model.safetensors"
) -> str:
    """A model card, in Markdown; names that come from data are shown as code, whatever they are.

    Args:
        flow: The flow, best on validation.
        splits: What it was trained and scored on.
        report: Its score; `None` says that there is none.
        history: Records of steps and validations, as in `TrainingResult.history`.
        file: Name of the model's file.
    """
    parts = {
        f"Model card: a density of {_code(splits.name)}": _model(flow, file),
        "Data": _data(splits),
        "Training": _training(flow, history),
        "Scores": _scores(report),
        "Limits": _limits(splits, report),
    }
    first, *rest = (f"{title}\n\n{text}\n" for title, text in parts.items())
    return "\n".join([f"# {first}", *(f"## {text}" for text in rest)])


def _code(text: str) -> str:
    """Text as Markdown's code, on one line, whatever characters it has."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"


def _lines(*lines: str) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _model(flow: Flow, file: str) -> str:
    shape = "×".join(map(str, flow.event_shape))
    columns = "column" if flow.dim == 1 else "columns"
    what = f"vectors of {shape} {columns}" if len(flow.event_shape) == 1 else f"images {shape}"
    levels = "continuous" if flow.levels is None else f"discrete, {flow.levels} levels"
    given = f", given a context of {flow.context_dim} features" if flow.context_dim else ""
    if flow.embedding is not None:
        sizes = "×".join(map(str, flow.context_shape))
        given = f", given a context of shape {sizes}, from which an embedding network makes {flow.context_dim} features"
    count = sum(p.numel() for p in flow.parameters())
    return _lines(
        f"A continuous normalizing flow (regularised neural ODE, Finlay et al. 2020) on {what}, {levels}{given}: "
        "`log_prob` in nats, `sample`, `encode`, `decode`.",
        f"{len(flow.blocks)} ODE block(s), {count:,} parameters, {flow.config.dtype}.",
        f"Made by pyrnode {VERSION}; `pyrnode.load({file!r}{_named(flow)})` reads it. Nothing in the file is executed.",
        f"Scored and used with {solvers.describe(flow.solver)}.",
    )


def _named(flow: Flow) -> str:
    """What loading takes besides: the name of what makes the embedding, a function's of whoever trained it."""
    origin = None if flow.embedding is None else flow.embedding.origin
    return "" if origin is None else f", embedding={origin['factory']!r}"


def _data(splits: Splits) -> str:
    sizes = ", ".join(f"{len(getattr(splits, part)):,} {part}" for part in ("train", "validation", "test"))
    lines = [
        f"{_code(splits.name)}: {sizes} samples. The model was chosen on validation; the test samples were kept apart."
    ]
    for what, names in (("Columns", said(splits.features)), ("Context", said(splits.context_features))):
        if names is not None:
            more = f", and {len(names) - _COLUMNS} more" if len(names) > _COLUMNS else ""
            lines.append(f"{what}: {', '.join(map(_code, names[:_COLUMNS]))}{more}.")
    if splits.density is not None:
        lines.append("Synthetic.")
    return _lines(*lines)


def _training(flow: Flow, history: list[Record]) -> str:
    steps = [record for record in history if "nll" in record]
    found = [r for r in history if r.get("validation") is not None and math.isfinite(r["validation"])]
    penalties = flow.config.penalties
    lines = [f"{steps[-1]['step'] if steps else 0:,} optimiser steps, seed {flow.config.seed}."]
    weights = f"kinetic {penalties.kinetic:.4g}, Jacobian {penalties.jacobian:.4g}"
    lines.append(f"Training solver {solvers.describe(flow.config.solver)}; penalties: {weights}.")
    if found:
        best = min(found, key=lambda record: float(record["validation"]))
        lines.append(f"Best validation {best['validation']:.4f} nats per dimension, at step {best['step']:,}.")
    lines.append(
        "All settings are in `config.toml`, versions and machine in `versions.json`, each step in `metrics.jsonl`."
    )
    return _lines(*lines)


def _scores(report: Report | None) -> str:
    if report is None:
        return "None: the run was not scored on test samples. `pyrnode evaluate` does that."
    text = "\n".join(line.replace("`", "'") for line in str(report).splitlines())
    return f"```text\n{text}\n```"


def _limits(splits: Splits, report: Report | None) -> str:
    lines = [
        "Scores hold for data of the same source, in the same units and prepared in the same way. What a density says "
        "far from its data is extrapolation.",
        "A high density is no proof that a sample is ordinary, a low one none that it is odd: for outliers take "
        "p-values (`pyrnode.calibrate`), which are valid whatever the model.",
        f"It was fitted to {len(splits.train):,} samples, and may repeat what is peculiar to them. Whether samples "
        "disclose what should stay private, and whether groups of people are treated alike, was not examined.",
        "What it is meant for, and the licence of data and model, are for its maker to add here.",
    ]
    if report is not None and report.baselines and (better := _better(report)):
        lines.insert(0, f"On the test samples it scores below a simple baseline: {', '.join(better)}.")
    return _lines(*lines)


def _better(report: Report) -> list[str]:
    """The baselines that score above the flow by more than the flow's standard error."""
    margin = report.score.nats_error or 0.0  # of one sample it is not known
    return [name for name, score in report.baselines.items() if score.nats > report.score.nats + margin]
