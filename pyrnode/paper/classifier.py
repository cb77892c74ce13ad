"""The paper's outlook (§9): the same two penalties on a neural-ODE classifier, an ODE before a linear head."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pyrnode import data, plotting
from pyrnode.composition import Passage
from pyrnode.config import Config, Divergence
from pyrnode.devices import resolve_device
from pyrnode.errors import ConfigError, SolverError, TrainingDivergedError
from pyrnode.files import read_json, write_atomically
from pyrnode.flow import Flow
from pyrnode.objective import regularised
from pyrnode.paper.experiment import Experiment
from pyrnode.paper.report import Claim, Finding, Row, Verdict
from pyrnode.paper.scales import COLOURS, Scale
from pyrnode.paper.study import Need, Study, hours, mean_and_spread
from pyrnode.probes import no_probes
from pyrnode.seeds import generator, seeded
from pyrnode.training.state import NotFiniteError
from pyrnode.training.step import Order, check_gradient, differentiate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"rnode": "regularised", "none": "not regularised"}
CLASSES = 10


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of the classifier, beside those of its ODE.

    Attributes:
        hidden: Channels of the network's hidden layers.
        epochs: Passes over the training set.
        batch_size: Samples per step.
        learning_rate: Of Adam.
        limit: Training samples; `None` takes all.
        test_limit: Test samples.
        tolerance: Of the adaptive solver (DP5), in training and testing.
        penalty: ``λ_K`` and ``λ_J`` of the regularised classifier.
    """

    hidden: tuple[int, ...] = (16, 16)
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-3
    limit: int | None = 2000
    test_limit: int | None = 1000
    tolerance: float = 1e-4
    penalty: float = 0.01


class Classifier(nn.Module):
    """One ODE block over ``[0, 1]`` and a linear head: the block, the engine and the penalties are the flow's.

    Args:
        config: Settings of the block and its solver.
        event_shape: ``(C, H, W)`` or ``(d,)``.
        levels: Grey levels of the images.
    """

    def __init__(self, config: Config, event_shape: tuple[int, ...], levels: int) -> None:
        super().__init__()
        self.flow = Flow.build(config, event_shape)
        self.levels = levels
        with seeded(config.seed):
            self.head = nn.Linear(self.flow.dim, CLASSES, dtype=torch.float32)

    def forward(self, x: Tensor, random: torch.Generator | None) -> tuple[Tensor, Passage]:
        """Logits ``(batch, classes)`` of images ``(batch, *event)``, and the pass through the block.

        Args:
            x: Grey levels.
            random: Gives the probes of the penalties; `None` solves for the state alone.
        """
        y, _ = self.flow.admit(x.float() / (self.levels - 1) - 0.5)
        estimate = Divergence("hutchinson")
        draw = no_probes if random is None else self.flow.draw(estimate, random)
        passage = self.flow.solve(y, draw, self.flow.config.solver)
        return self.head(passage.z), passage


def settings(name: str, method: str, seed: int, given: ClassifierConfig, study_settings: dict[str, Any]) -> Config:
    """The settings of the ODE of a classifier."""
    penalty = given.penalty if method == "rnode" else 0.0
    return Config().override(
        {
            "data.name": name,
            "data.limit": given.limit,
            "seed": seed,
            "flow": {"network": {"hidden": list(given.hidden)}, "blocks": 1, "scales": 1, "standardize": "none"},
            "solver": {"name": "DP5", "rtol": given.tolerance, "atol": given.tolerance},
            "penalties": {"kinetic": penalty, "jacobian": penalty},
            **study_settings,
        }
    )


def train_classifier(
    config: Config, given: ClassifierConfig, *, progress: bool = False
) -> tuple[Classifier, list[dict[str, float]]]:
    """Trains a classifier with Adam on the cross-entropy plus the penalties per dimension.

    Returns:
        The classifier, and a record per step: ``loss, cross_entropy, E, n, nfe, nfe_backward, seconds``.

    Raises:
        ConfigError: The set has no grey levels.
        TrainingDivergedError: A loss was not finite, or a solve failed.
    """
    splits, labels = data.load(None, config=config.data), data.labels(config.data.name, config=config.data)
    if splits.levels is None:
        raise ConfigError(f"data.name = {config.data.name!r}: the classifier takes images")
    device = resolve_device(config.device)
    model = Classifier(config, splits.event_shape, splits.levels).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=given.learning_rate)
    images = splits.train.carrying(context=labels.train.tensor())  # an image's class goes where the image goes
    order = Order(len(images), given.batch_size, config.seed)
    records: list[dict[str, float]] = []
    seconds, batches = 0.0, order.batches(images)
    for step in tqdm(range(given.epochs * order.steps_per_epoch), unit="step", disable=not progress):
        batch = next(batches)
        assert batch.context is not None
        start = time.perf_counter()
        try:
            logits, passage = model(batch.x, generator(config.seed, "step", step))
            entropy = F.cross_entropy(logits, batch.context[:, 0].long().to(logits.device))
            total, E, n = regularised(entropy, passage, config.penalties)
            if not bool(torch.isfinite(total)):
                raise NotFiniteError(f"the loss is not finite (cross-entropy {float(entropy):g})")
            check_gradient(model, float(differentiate(total, model, optimizer)))
        except (SolverError, NotFiniteError) as error:
            raise TrainingDivergedError(f"step {step}: {error}") from error
        optimizer.step()
        seconds += time.perf_counter() - start
        values = {"loss": float(total.detach()), "cross_entropy": float(entropy.detach()), "E": float(E), "n": float(n)}
        records.append(
            {"step": step + 1, **values, "nfe": passage.nfe, "nfe_backward": passage.nfe_backward, "seconds": seconds}
        )
    return model, records


@torch.no_grad()
def score_classifier(model: Classifier, config: Config, limit: int | None) -> dict[str, float]:
    """Accuracy on the test set, and the solver's evaluations on it."""
    splits, labels = data.load(None, config=config.data), data.labels(config.data.name, config=config.data)
    x, y = splits.test.tensor()[:limit], labels.test.tensor()[:limit, 0]
    right, nfe = 0, 0.0
    for images, targets in zip(x.split(250), y.split(250), strict=True):
        logits, passage = model(images, None)
        right += int((logits.argmax(1).cpu() == targets).sum())
        nfe += passage.nfe * len(images) / len(x)
    return {"accuracy": right / len(x), "nfe": nfe}


def _needs(scale: Scale) -> list[Need]:
    return []


def _one(study: Study, name: str, method: str, seed: int, given: ClassifierConfig) -> tuple[Config, dict[str, float]]:
    """Trains and tests one classifier; what came out is kept in the study's folder."""
    config = settings(name, method, seed, given, study.settings)
    path = study.out / "classifiers" / f"{name}-{method}-seed{seed}.json"
    if path.exists():
        parts = itemgetter("settings", "result")
        kept = read_json(path, remedy="delete it and go on with --resume", check=parts)
        if kept["settings"] != json.loads(json.dumps(asdict(given))):
            raise ConfigError(f"{path} is of other settings ({kept['settings']}): use another out (--out)")
        return config, kept["result"]
    study.say(f"classifier of {name}, {METHODS[method]}, seed {seed}")
    model, records = train_classifier(config, given, progress=study.progress)
    tested = score_classifier(model, config, given.test_limit)
    tail = records[-max(1, len(records) // 10) :]
    result = {
        "accuracy": tested["accuracy"],
        "nfe": tested["nfe"],
        "nfe in training": sum(r["nfe"] + r["nfe_backward"] for r in records) / len(records),
        "seconds": records[-1]["seconds"],
        **{key: sum(r[key] for r in tail) / len(tail) for key in ("E", "n", "cross_entropy")},
    }
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps({"settings": asdict(given), "result": result}, indent=1) + "\n").encode())
    return config, result


def _measure(study: Study) -> Finding:
    given = replace(ClassifierConfig(), **{k: _tuple(v) for k, v in study.scale.classifier.items()})
    rows: list[Row] = []
    claims, configs = list[Claim](), dict[str, Config]()
    numbers: dict[str, float] = {}
    for name in study.scale.classifiers:
        means: dict[str, dict[str, tuple[float, float]]] = {}
        for method, label in METHODS.items():
            results = []
            for seed in study.scale.seeds:
                one = partial(_one, study, name, method, seed, given)  # small, and no flow: one process does it
                configs[f"classifier-{name}-{method}-seed{seed}"], result = study.world.once(one)  # no flow's name
                results.append(result)
                rows.append({"data": name, "classifier": label, "seed": seed, **result})
            means[method] = {key: mean_and_spread(r[key] for r in results) for key in results[0]}
            numbers |= {f"{name} {method} {key}": value[0] for key, value in means[method].items()}
        ours, theirs = means["rnode"], means["none"]
        claims += [_accuracy(name, ours, theirs), _cost(name, ours, theirs)]
    return Finding(
        name=EXPERIMENT.name,
        title=EXPERIMENT.title,
        claims=claims,
        numbers=numbers,
        tables={"classifier": rows},
        shown="classifier",
        figures={"classifier": _draw(study.scale.classifiers, rows)},
        remarks=[
            f"One convolutional ODE block, {'-'.join(map(str, given.hidden))} channels, and a linear head; DP5 at "
            f"{given.tolerance:g} in training and testing, Adam with rate {given.learning_rate:g}, {given.epochs} "
            f"epochs of {given.limit or 'all'} training images, λ_K = λ_J = {given.penalty:g} or 0. Nothing was "
            "tuned, for either.",
            "The ODE block, the engine and the penalties are those of the flows (`Flow.solve`, "
            "`objective.regularised`).",
        ],
        configs=configs,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _accuracy(name: str, ours: dict[str, tuple[float, float]], theirs: dict[str, tuple[float, float]]) -> Claim:
    (a, spread_a), (b, spread_b) = ours["accuracy"], theirs["accuracy"]
    verdict: Verdict = "holds" if a >= b - 0.01 else "does not hold"
    return Claim(
        f"The penalties do not cost a classifier its accuracy ({name}).",
        "suggested, not tested",
        f"{a:.1%} ± {spread_a:.1%} with, {b:.1%} ± {spread_b:.1%} without",
        verdict,
        "One percentage point less counts as a cost. ± is the standard deviation over seeds.",
    )


def _cost(name: str, ours: dict[str, tuple[float, float]], theirs: dict[str, tuple[float, float]]) -> Claim:
    saved, spread = theirs["nfe"][0] - ours["nfe"][0], max(ours["nfe"][1], theirs["nfe"][1])
    verdict: Verdict = "undecided" if abs(saved) <= spread else "holds" if saved > 0 else "does not hold"
    return Claim(
        f"The penalties make it cheaper to solve ({name}).",
        "suggested, not tested",
        f"{ours['nfe'][0]:.1f} against {theirs['nfe'][0]:.1f} evaluations in testing; training took "
        f"{hours(ours['seconds'][0])} against {hours(theirs['seconds'][0])}",
        verdict,
        "Judged by the evaluations; a difference within the standard deviation over seeds decides nothing. With "
        "penalties, training also integrates the Jacobian's products, which cost time of their own.",
    )


_PANELS = {"accuracy": "test accuracy", "nfe": "evaluations in testing", "seconds": "training (s)"}


def _draw(names: tuple[str, ...], rows: list[Row]) -> Figure:
    """A bar for the mean over seeds, a point for each seed."""
    figure = plotting.new_figure(9, 3.6)
    for axes, (key, label) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        for offset, (method, kind) in zip((-0.15, 0.15), METHODS.items(), strict=True):
            for place, name in enumerate(names):
                values = [float(r[key]) for r in rows if (r["data"], r["classifier"]) == (name, kind)]
                x = place + offset
                axes.bar(x, sum(values) / len(values), 0.28, color=COLOURS[method], alpha=0.5, label=kind)
                axes.plot([x] * len(values), values, "o", color=COLOURS[method], ms=4)
        axes.set(ylabel=label, xticks=range(len(names)), xticklabels=names)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))  # one of each
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=2, frameon=False)
    return figure


EXPERIMENT = Experiment("classifier", "the same penalties on a neural-ODE classifier", _needs, _measure)
