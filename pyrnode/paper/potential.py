"""The flows that the paper leaves out (§8), along the gradient of a potential, beside vanilla FFJORD and RNODE."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from pyrnode import evaluation, particles, plotting
from pyrnode.config import Config
from pyrnode.dynamics.potential import Potential, PotentialDynamics
from pyrnode.errors import TrainingDivergedError
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.paper.convergence import common_target, time_to_reach
from pyrnode.paper.experiment import Experiment
from pyrnode.paper.report import Claim, Finding, Row, Verdict
from pyrnode.paper.scales import LABELS, POTENTIALS, Scale
from pyrnode.paper.study import Need, Run, Study
from pyrnode.paper.trajectories import PARTICLES, TIMES, draw, speed_change
from pyrnode.probes import Probes
from pyrnode.solvers import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE, PLANE = "two-bumps", "8gaussians"
METHODS = ("ffjord", "rnode", *POTENTIALS)
STRAIGHTENED = ("potential-flow", "ot-flow")
"""Those with the Hamilton-Jacobi penalty."""

DEAR, QUARTER, SAME = 2.0, 0.25, 0.02
"""How many of RNODE's steps are too dear; the share of weights that OT-Flow claims; nats per dimension that count."""

TURNS, SCORED, STEP = 5, 1000, 0.25
_KEYS = (
    "weights",
    "nats",
    "evaluations",
    "length / distance",
    "variation of speed",
    "squared change of speed",
    "inversion error",
    "E",
    "n",
    "seconds a step",
    "seconds to score",
)


class Seen(NamedTuple):
    """A trained flow: its row of the table, and the paths of its particles."""

    run: Run
    row: dict[str, Any]
    paths: tuple[Tensor, Tensor]


def _needs(scale: Scale) -> list[Need]:
    return [Need(data, method) for data in (LINE, PLANE) for method in METHODS]


# -- one flow ----------------------------------------------------------------------------------------------------------


def _seen(study: Study, run: Run) -> Seen:
    study.say(f"scoring {run.need.name} on the test set")
    splits, flow = study.splits(run.config), run.flow
    report = evaluation.evaluate(flow, splits, baselines=False)
    chosen = splits.test.tensor()[:PARTICLES]
    times, states = particles.particle_paths(flow, chosen.sort(0).values if flow.dim == 1 else chosen, TIMES)
    row: dict[str, Any] = {
        "data": run.need.data,
        "flow": LABELS[run.need.method],
        "weights": sum(p.numel() for p in flow.parameters()),
        "nats": report.score.nats,
        "evaluations": report.nfe,
        "length / distance": float(particles.detours(states).median()),
        "variation of speed": particles.speed_variation(states),
        "squared change of speed": speed_change(times, states),
        "inversion error": report.inversion_error,
        "E": report.E,
        "n": report.n,
        "seconds a step": run.seconds / len(run.steps),
    }
    return Seen(run, row, (times, states))


def curve(run: Run) -> list[dict[str, float]]:
    """The run's validations as `convergence.time_to_reach` takes them; ``bits`` are nats per dimension here.

    Raises:
        TrainingDivergedError: There are none.
    """
    found = [{"seconds": r["seconds"], "bits": r["validation"]} for r in run.history if "validation" in r]
    if not found:
        raise TrainingDivergedError(f"{run.need.name} was never validated: {run.diverged}")
    return found


# -- what things cost --------------------------------------------------------------------------------------------------


def in_turn(actions: Mapping[str, Callable[[], object]], turns: int = TURNS) -> dict[str, float]:
    """Median seconds of actions that take turns, so that a change in the machine's speed meets all; one is warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            if turn:
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


class _Nested(nn.Module):
    """The same Φ as a module of a user's own, which autograd differentiates three times."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.own = potential

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.own.potential(t, z)


def nested(flow: Flow) -> Flow:
    """The flow of a potential of one block, its derivatives by autograd; the parameters are shared."""
    own = flow.blocks[0].dynamics
    assert isinstance(own, Potential)
    return Flow.build(
        flow.config,
        flow.event_shape,
        transform=flow.transform,
        dynamics=lambda shape: PotentialDynamics(_Nested(own), shape),
    )


def training_step(config: Config, flow: Flow, x: Tensor) -> Callable[[], float]:
    """Loss and gradient of a batch with the penalties of `config`, the exact trace, and RK4 in four steps."""
    penalties = config.penalties
    solver = replace(config.solver, name="RK4", step_size=STEP * config.flow.end_time)
    batch = flow.admit(x)[0]

    def step() -> float:
        flow.zero_grad(set_to_none=True)
        passage = flow.solve(batch, Probes.exact, solver, hjb=penalties.hjb > 0)
        loss = objective(passage, penalties).loss
        loss.backward()
        return float(loss.detach())  # read, so that a GPU is waited for

    return step


def _step_seconds(study: Study, mlp: Run, own: Run) -> dict[str, float]:
    """Seconds of a step of RNODE, and of OT-Flow's potential by explicit products and by nested differentiation."""
    x = study.splits(own.config).train.first(own.config.training.batch_size).x
    steps = {
        "RNODE": training_step(mlp.config, mlp.flow, x),
        "explicit": training_step(own.config, own.flow, x),
        "nested": training_step(own.config, nested(own.flow), x),
    }
    return in_turn(steps)


def _score_seconds(study: Study, runs: Mapping[str, Run]) -> dict[str, float]:
    """Seconds to score the same samples with the accurate solver."""
    x = study.splits(runs["rnode"].config).test.tensor()[:SCORED]

    def scored(flow: Flow) -> Callable[[], object]:
        return lambda: evaluation.measure(flow, x)

    return in_turn({method: scored(run.flow) for method, run in runs.items()}, turns=3)


# -- the experiment ----------------------------------------------------------------------------------------------------


def _measure(study: Study) -> Finding:
    seen = {need: _seen(study, study.run(need)) for need in _needs(study.scale)}
    for data in (LINE, PLANE):
        seconds = _score_seconds(study, {m: seen[Need(data, m)].run for m in METHODS})
        for method in METHODS:
            seen[Need(data, method)].row["seconds to score"] = seconds[method]
    plane = {method: seen[Need(PLANE, method)] for method in METHODS}
    line = {method: seen[Need(LINE, method)] for method in METHODS}
    steps = _step_seconds(study, plane["rnode"].run, plane["ot-flow"].run)
    ends = {m: curve(plane[m].run) for m in ("ffjord", "ot-flow")}
    target = common_target(list(ends.values()))
    reached = {m: time_to_reach(ends[m], target) for m in ends}
    rows: list[Row] = [found.row for found in seen.values()]
    numbers = {
        f"{key} {need.data} {need.method}": float(found.row[key])
        for need, found in seen.items()
        for key in _KEYS
        if found.row[key] is not None
    }
    numbers |= {f"seconds of a step {name}": value for name, value in steps.items()}
    numbers |= {f"seconds to target {m}": value for m, value in reached.items()} | {"target": target}
    labels = {method: LABELS[method] for method in METHODS}
    return Finding(
        name=EXPERIMENT.name,
        title=EXPERIMENT.title,
        claims=[*cost_claims(steps), *_rivals(plane, reached, target), straight_claim(plane)],
        numbers=numbers,
        tables={"potential": rows},
        shown="potential",
        figures={
            "potential-line": draw(
                {m: found.run for m, found in line.items()}, {m: found.paths for m, found in line.items()}, labels
            ),
            "potential-plane": _draw_plane(plane),
        },
        remarks=_remarks(study, plane),
        configs={found.run.need.name: found.run.config for found in seen.values()},
    )


def cost_claims(seconds: Mapping[str, float]) -> list[Claim]:
    """The paper's reason for leaving potentials out: given seconds of a step of ``RNODE``, ``explicit``, ``nested``."""
    ratio = {name: seconds[name] / seconds["RNODE"] for name in ("nested", "explicit")}
    told = {name: f"{1000 * seconds[name]:.3g} ms" for name in seconds}
    note = (
        f"More than {DEAR:g} times RNODE's step counts as too dear. All have the same batch of {PLANE}, the exact "
        "trace, and four steps of RK4."
    )
    return [
        Claim(
            "Flows of a potential are too dear to train: dynamics, divergence and gradient are derivatives of "
            "derivatives (“triple backprop”).",
            "the reason given, no number",
            f"a step of OT-Flow's potential takes {told['nested']} by nested differentiation, RNODE's "
            f"{told['RNODE']}: {ratio['nested']:.2g} times as long",
            "holds" if ratio["nested"] > DEAR else "does not hold",
            note,
        ),
        Claim(
            "They are too dear with the products written out, too.",
            "",
            f"{told['explicit']}: {ratio['explicit']:.2g} times RNODE's step",
            "holds" if ratio["explicit"] > DEAR else "does not hold",
            note,
        ),
    ]


def _rivals(plane: Mapping[str, Seen], reached: Mapping[str, float], target: float) -> list[Claim]:
    """OT-Flow's own claims (Onken et al. 2021, abstract), against FFJORD, in the plane."""
    theirs, ours = plane["ffjord"].row, plane["ot-flow"].row
    share, short = ours["weights"] / theirs["weights"], (theirs["nats"] - ours["nats"]) / plane["ffjord"].run.flow.dim
    note = (
        "Of the ratios only the direction is judged: theirs are averages over five large problems. Time to the lowest "
        "validation score that both reach; scoring by the accurate solver, which for theirs was RK4 in few steps."
    )

    def faster(seconds: float, other: float) -> Verdict:
        return "holds" if seconds < other else "does not hold"

    return [
        Claim(
            "OT-Flow is as good a density as FFJORD's with a quarter of the weights.",
            "one fourth (OT-Flow's)",
            f"{ours['weights']} weights against {theirs['weights']}; {ours['nats']:.4f} against "
            f"{theirs['nats']:.4f} nats",
            "holds" if share <= QUARTER and short <= SAME else "does not hold",
            f"More than {SAME:g} nats per dimension below FFJORD counts as worse.",
        ),
        Claim(
            "OT-Flow trains faster than FFJORD.",
            "8 times (OT-Flow's)",
            f"{reached['ffjord'] / reached['ot-flow']:.2g} times as fast to {target:.4f} nats per dimension: "
            f"{reached['ot-flow']:.3g} s against {reached['ffjord']:.3g} s",
            faster(reached["ot-flow"], reached["ffjord"]),
            note,
        ),
        Claim(
            "OT-Flow is faster in use than FFJORD.",
            "24 times (OT-Flow's)",
            f"{theirs['seconds to score'] / ours['seconds to score']:.2g} times as fast, with "
            f"{ours['evaluations']:.3g} evaluations against {theirs['evaluations']:.3g}",
            faster(ours["seconds to score"], theirs["seconds to score"]),
            note,
        ),
    ]


def straight_claim(plane: Mapping[str, Seen]) -> Claim:
    """What the penalty is for: both measures of its flows below those of the two flows that have none."""
    keys = ("length / distance", "variation of speed")
    free, held = ([plane[m].row for m in names] for names in (("ffjord", "monge-ampere"), STRAIGHTENED))
    holds = all(max(row[key] for row in held) < min(row[key] for row in free) for key in keys)
    told = "; ".join(f"{row['flow']} {row[keys[0]]:.3f}, {row[keys[1]]:.2f}" for row in (*held, *free))
    return Claim(
        "The Hamilton-Jacobi equation makes trajectories straight lines at constant speed; a potential alone does not.",
        "a picture, no number",
        f"path length over distance, variation of speed: {told}",
        "holds" if holds else "does not hold",
    )


def _remarks(study: Study, plane: Mapping[str, Seen]) -> list[str]:
    ours, theirs = plane["rnode"].run.config, plane["ot-flow"].run.config
    trained = (
        "The potentials have their presets' settings, which are those of their papers."
        if study.scale.published
        else f"All have the same batches and number of steps, and all but FFJORD (DP5 at 1e-5) the same solver "
        f"({describe(ours.solver)}); the MLPs' learning rate is {ours.training.learning_rate:g}, the potentials' "
        f"{theirs.training.learning_rate:g}. Nothing was tuned."
    )
    return [
        f"All share data, split and seed, and are scored on the same test samples with DP5 at 1e-5. {trained}",
        f"Paths of {PARTICLES} particles at {TIMES} times in the flow's own space; length over distance is the median, "
        "variation of speed the mean over the particles. On the line every dynamics are the gradient of a potential.",
        "Seconds a step are those of the run, which its solver's number of steps is part of; seconds to score are for "
        f"{SCORED} samples, the flows in turn.",
    ]


def _draw_plane(plane: Mapping[str, Seen]) -> Figure:
    """The paths of each flow, side by side."""
    figure = plotting.new_figure(2.9 * len(plane), 3.5)
    for axes, found in zip(figure.subplots(1, len(plane), sharex=True, sharey=True), plane.values(), strict=True):
        particles.draw_in_plane(axes, found.paths[1].cpu().double().numpy())
        axes.set_title(found.row["flow"])
        axes.set_aspect("equal")
        axes.set_xlabel("$z_1$")
    figure.axes[0].set_ylabel("$z_2$")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


EXPERIMENT = Experiment("potential", "flows along the gradient of a potential", _needs, _measure)
