"""Scores of a trained flow: with an accurate solver, on data that training did not see, beside simple baselines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrnode import seeds, solvers
from pyrnode.bounded import check_within
from pyrnode.config import EvaluationConfig, SolverConfig
from pyrnode.contexts import check_context
from pyrnode.data import Batch, MappedSamples, Samples, Splits, TensorSamples, load, support
from pyrnode.data.arrays import numbers
from pyrnode.data.frames import columns_of, is_frame
from pyrnode.distributed import World, alone
from pyrnode.errors import DataError, SolverError
from pyrnode.flow import Flow
from pyrnode.probes import Probes
from pyrnode.progress import parts, progress_bar
from pyrnode.turns import log_sum

_BASELINE_DIM = 128  # up to here the baselines are fitted; beyond, their fits take longer than the flow's
_BASELINE_ROWS = 50_000  # that they are fitted to, where the samples are not in memory
_INVERTED = 64  # samples on which the round trip is checked


@dataclass(frozen=True)
class Score:
    """A mean log-density in both units; weighted where the samples are.

    Attributes:
        nats: ``log p(x)`` per sample.
        nats_error: Its standard error over samples; `None` for one sample.
        bits: ``−log₂ p(x) / d`` (bits per dimension; for discrete data of the integers' density).
        bits_error: Its standard error over the draws of dequantisation and probe noise; `None` for one draw.
    """

    nats: float
    nats_error: float | None
    bits: float
    bits_error: float | None

    @classmethod
    def of(cls, draws: Tensor, d: int, weight: Tensor | None = None) -> Score:
        """From log-densities ``(draws, samples)`` in nats; `weight` ``(samples,)``, one for all by default."""
        draws = draws.double()
        if weight is not None:
            weight = (weight / weight.mean()).to(draws)
            draws = draws * weight  # whose plain means are weighted ones
        bits = -draws.mean(1) / d / math.log(2)
        count = len(bits)
        error = float(bits.std() / math.sqrt(count)) if count > 1 else None
        samples = draws.mean(0)
        spread = samples if weight is None else samples - samples.mean() * weight
        nats_error = float(spread.std() / math.sqrt(len(samples))) if len(samples) > 1 else None
        return cls(float(samples.mean()), nats_error, float(bits.mean()), error)


@dataclass(frozen=True)
class Report:
    """The evaluation of a flow.

    Attributes:
        score: The flow's score: for images over the dequantisation draws.
        bin_centre: The score at the bins' centres (``u = ½``), as ffjord-rnode reports it; discrete data only.
        true_entropy: Entropy of the true density in nats, where it is known.
        gap: Kullback-Leibler divergence from the true density to the flow, nats: mean of ``log p_true − log p`` over
            the test samples, whose own scatter cancels in the difference.
        gap_error: Its standard error.
        baselines: Scores of the baselines on the same data, in the same units.
        solver: Solver of the evaluation with its tolerances.
        divergence: ``"exact"``, or the number of probes.
        disagreement: Mean ``|Δ log p|`` between the training solver and this one, nats per dimension, on the same
            noise; `None` where the training solver failed (`notes` says how).
        training_solver: What it was compared with.
        E, n: Kinetic energy and squared Jacobian norm integrals, summed over the blocks, per dimension.
        nfe: Evaluations of the dynamics per sample, all blocks together.
        inversion_error: Largest ``|x − decode(encode(x))|`` in the flow's space; `None` where the way back failed.
        samples: Test samples scored.
        draws: Noise draws for each.
        seconds: Time it took.
        notes: What is left out and why: the score stands, whatever else fails.
    """

    score: Score
    bin_centre: Score | None
    true_entropy: float | None
    gap: float | None
    gap_error: float | None
    baselines: dict[str, Score]
    solver: str
    divergence: str
    disagreement: float | None
    training_solver: str
    E: float
    n: float
    nfe: float
    inversion_error: float | None
    samples: int
    draws: int
    seconds: float
    discrete: bool
    dim: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        bits = self.discrete
        unit = "bits/dim (lower is better)" if bits else "nats per sample (higher is better)"

        def line(name: str, score: Score) -> str:
            value, error = (score.bits, score.bits_error) if bits else (score.nats, score.nats_error)
            return f"  {name:<28}{value:10.4f}" + ("" if error is None else f" ± {error:.4f}")

        rows = [f"{unit} on {self.samples} test samples, {self.draws} draw(s) each", line("pyrnode", self.score)]
        if self.bin_centre is not None:
            rows.append(f"  {'pyrnode at bin centres':<28}{self.bin_centre.bits:10.4f}")
        rows += [line(name, score) for name, score in self.baselines.items()]
        if self.true_entropy is not None:
            gap = f"gap {self.gap:.4f} ± {self.gap_error:.4f} nats"
            rows.append(f"  {'true density (−entropy)':<28}{-self.true_entropy:10.4f}   {gap}")
        rows.append(f"solver {self.solver}, divergence {self.divergence}, {self.nfe:.0f} evaluations per sample")
        if self.disagreement is not None:
            rows.append(f"training solver {self.training_solver} differs by {self.disagreement:.2e} nats/dim")
        inversion = "unknown" if self.inversion_error is None else f"{self.inversion_error:.1e}"
        rows.append(f"E {self.E:.4f}, n {self.n:.4f} per dimension; inversion error {inversion}")
        return "\n".join(rows + self.notes)


def evaluate(
    flow: Flow,
    data: Any,
    *,
    context: Any = None,
    config: EvaluationConfig | None = None,
    training_solver: SolverConfig | None = None,
    baselines: bool = True,
    seed: int = 0,
    progress: bool = False,
    world: World = alone,
) -> Report:
    """Scores a flow.

    Args:
        flow: The flow.
        data: An array, tensor ``(n, *event)`` or data frame, all of which is scored; or `Splits`, or what
            `pyrnode.train` takes (a name, a path, a torch data set): the test set is scored, baselines are fitted on
            the training set.
        context: What the samples are conditional on, ``(n, m)``, a row for each; for conditional flows.
        config: Settings; default those of the flow.
        training_solver: Solver to compare with; default the flow's training solver.
        baselines: Fit and score the baselines (up to 128 dimensions, and only where there is a training set).
        seed: Seed of the noise.
        progress: Show a progress bar.
        world: Processes that share the samples, all of which must call this: `pyrnode.distributed.world()`. One by
            default, wherever it is called.

    Returns:
        The report; ``print`` shows it, ``to_dict()`` is for JSON.

    Raises:
        DataError: The data does not fit the flow, or is empty.
        SolverError: A solve failed.
    """
    start = time.perf_counter()
    config = config or _settings(flow)
    test, splits = _samples(flow, data, context)
    count = min(len(test), config.test_limit or len(test))
    weight = None if test.weight is None else test.weight[:count]
    exact = config.divergence.exact(flow.dim)
    draws = config.draws if flow.levels is not None or not exact else 1
    scorer = _Scorer(flow, config, seed, world)
    discrete, notes, table = flow.levels is not None, list[str](), dict[str, Score]()
    centre = error = gaps = None
    passes = draws * count + min(count, config.chunk) + (count if discrete else 0)
    with torch.no_grad(), progress_bar(passes, "evaluate", unit="sample", show=progress and world.first) as bar:
        log_prob, totals = scorer.score(test, count, config.solver, draws, bar)
        other = training_solver or flow.config.solver
        if other.step_size == "auto":
            other = replace(other, step_size=flow.config.flow.end_time)  # where training would begin
        bar.set_description("evaluate: training solver")
        disagreement = _disagreement(scorer, test, count, other, log_prob, bar, notes)
        if discrete:
            bar.set_description("evaluate: bin centres")
            with extra("the score at the bins' centres", notes):
                centre = Score.of(scorer.score(test, count, config.solver, 1, bar, centre=True)[0], flow.dim, weight)
        bar.set_description("evaluate: way back")
        with extra("the inversion error", notes):
            error = scorer.inversion_error(test, count, config.solver)
        if splits is not None:
            with extra("the remarks on the data's support", notes):
                notes += world.once(lambda: support.remarks(splits))
        density = splits.density if splits is not None else None
        if density is not None and density.exact:
            with extra("the gap to the true density", notes):
                gaps = density.log_prob(test.tensor()[:count].double()) - log_prob.double().mean(0)
        if baselines and splits is not None:
            if flow.context_dim:
                notes.append("the baselines know no context, so they are left out")
            elif flow.dim > _BASELINE_DIM:
                notes.append(f"baselines are fitted up to {_BASELINE_DIM} dimensions; this data has {flow.dim}")
            else:
                bar.set_description("evaluate: baselines")
                if weight is not None:
                    notes.append("the baselines are fitted as if all samples weighed the same, and scored by weight")
                with extra("the baselines", notes):
                    table = world.once(lambda: _baseline_scores(flow, splits, count, draws, seed))
    return Report(
        score=Score.of(log_prob, flow.dim, weight),
        bin_centre=centre,
        true_entropy=density.entropy() if density is not None and density.exact else None,
        gap=None if gaps is None else float(gaps.mean()),
        gap_error=None if gaps is None else float(gaps.std(correction=0) / math.sqrt(count)),
        baselines=table,
        solver=solvers.describe(config.solver),
        divergence="exact" if exact else f"{config.divergence.probes or 1} probe(s)",
        disagreement=disagreement,
        training_solver=solvers.describe(other),
        **totals,
        inversion_error=error,
        samples=count,
        draws=draws,
        seconds=time.perf_counter() - start,
        discrete=flow.levels is not None,
        dim=flow.dim,
        notes=notes,
    )


@contextmanager
def extra(what: str, notes: list[str]) -> Iterator[None]:
    """What a result can do without: where it fails, for whatever reason, a note takes its place."""
    try:
        yield
    except Exception as error:  # a fault here must not cost the result, ours or a library's
        notes.append(f"{what}: left out ({str(error) or type(error).__name__})")


def _settings(flow: Flow) -> EvaluationConfig:
    """The settings of a flow's use, as they are now."""
    return replace(flow.config.evaluation, solver=flow.solver, divergence=flow.divergence)


def _samples(flow: Flow, data: Any, context: Any) -> tuple[Samples, Splits | None]:
    """The samples to score, with their contexts; and the splits that they come from, if they do."""
    if isinstance(data, (Tensor, np.ndarray)) or is_frame(data):
        test: Samples = TensorSamples(numbers(columns_of(data, flow.features, "the data"), "the data").cpu())
        splits = None
        given = flow.context_tensor(context)
        check_context(given, flow.context_shape, len(test))
        if given is not None:
            test = test.carrying(context=given.cpu().expand(len(test), *flow.context_shape))
    else:
        splits = load(data, config=flow.config.data, context=context)
        splits = splits.ordered(flow.features, flow.context_features)
        test = splits.test
        check_context(test.context, flow.context_shape, len(test))
    if not len(test):
        raise DataError("no test samples to score")
    named = "the data" if splits is None else f"{splits.name} (test split)"
    check_within(test, flow.transform.transforms, named, flow.features)  # else the mean is -inf
    if flow.levels is not None and test.first(1).x.is_floating_point():
        raise DataError(
            f"this flow models discrete data: expected integers 0 to {flow.levels - 1}, not floats (for images, pass "
            "the uint8 values themselves: in torchvision, PILToTensor in place of ToTensor)"
        )
    return test, splits


@dataclass(frozen=True)
class Measurement:
    """What one solver makes of samples; see `measure`.

    Attributes:
        log_prob: Nats, ``(draws, samples)``.
        score: The mean of it.
        E, n: As in `Report`.
        nfe: As in `Report`.
        seconds: Time of the solves.
    """

    log_prob: Tensor
    score: Score
    E: float
    n: float
    nfe: float
    seconds: float


@torch.no_grad()
def measure(
    flow: Flow,
    x: Tensor,
    solver: SolverConfig | None = None,
    *,
    context: Tensor | None = None,
    config: EvaluationConfig | None = None,
    seed: int = 0,
    world: World = alone,
) -> Measurement:
    """Scores samples with any solver: the noise is the same for all solvers and flows of one seed.

    Args:
        flow: The flow.
        x: Samples, ``(n, *event)``, integers for discrete data.
        solver: Solver; default the accurate one.
        context: ``(n, m)``, for conditional flows.
        config: Divergence, probes, draws and chunk; default those of the flow.
        seed: Seed of the noise.
        world: Processes that share the samples, as in `evaluate`.

    Raises:
        DataError: `x` or `context` does not fit the flow.
        SolverError: A solve failed.
    """
    config = config or _settings(flow)
    scorer = _Scorer(flow, config, seed, world)
    start = time.perf_counter()
    samples = TensorSamples(x) if context is None else TensorSamples(x).carrying(context=context)
    log_prob, totals = scorer.score(samples, len(x), solver or config.solver, config.draws, None)
    return Measurement(log_prob, Score.of(log_prob, flow.dim), **totals, seconds=time.perf_counter() - start)


class _Scorer:
    """Passes data through a flow with noise that depends on the draw and the batch alone."""

    def __init__(self, flow: Flow, config: EvaluationConfig, seed: int, world: World = alone) -> None:
        self.flow, self.config, self.seed, self.world = flow, config, seed, world

    def score(
        self,
        samples: Samples,
        count: int,
        solver: SolverConfig,
        draws: int,
        bar: Any,
        *,
        centre: bool = False,
    ) -> tuple[Tensor, dict[str, float]]:
        """Log-densities ``(draws, count)``, and the means of E, n and the evaluations."""
        every, sums = torch.arange(count, device="cpu"), {"E": 0.0, "n": 0.0, "nfe": 0.0}

        def here() -> list[tuple[Tensor, dict[str, float]]]:
            return [
                self._batch(batch, (draw, number), solver, centre, bar)
                for draw in range(draws)
                for number, batch in enumerate(samples.shares(every, self.config.chunk, self.world.share))
            ]

        parts = []
        for batch in zip(*self.world.gathered(here), strict=True):  # of all processes
            for log_prob, means in batch:
                parts.append(log_prob)
                for name in sums:
                    sums[name] += means[name] * len(log_prob) / (count * draws)
        return torch.cat(parts).reshape(draws, count), sums

    def _batch(
        self, batch: Batch, key: tuple[int, int], solver: SolverConfig, centre: bool, bar: Any
    ) -> tuple[Tensor, dict[str, float]]:
        flow, random = self.flow, batch.noise(seeds.generator(self.seed, "evaluate", *key))
        if not len(batch):
            return flow.reference.new_zeros(0).cpu(), {"E": 0.0, "n": 0.0, "nfe": 0.0}
        x, context = flow.admit(batch.x, batch.context)
        if centre:
            x = x.to(flow.reference.dtype) + 0.5
        probes, tick = flow.draw(self.config.divergence, random), parts(bar, batch.total, len(flow.blocks))
        begun = False

        def draw(z: Tensor) -> Probes | None:
            nonlocal begun
            if begun:  # asked for by every block: the one before is done
                tick()
            begun = True
            return probes(z)

        passage = flow.solve(x, draw, solver, context=context, generator=random)
        tick()
        E, n = (float(passage.total(name).mean()) / flow.dim for name in ("E", "n"))
        return passage.log_prob.cpu(), {"E": E, "n": n, "nfe": passage.nfe}

    def inversion_error(self, samples: Samples, count: int, solver: SolverConfig) -> float:
        batch = samples.first(min(count, _INVERTED))
        x, context = self.flow.admit(batch.x, batch.context)
        random = seeds.generator(self.seed, "invert")
        passage = self.flow.solve(x, solver=solver, context=context, generator=random)
        return float((self.flow.unsolve(passage.z, solver, context=context) - passage.y).abs().max())


def _disagreement(
    scorer: _Scorer, test: Samples, count: int, solver: SolverConfig, accurate: Tensor, bar: Any, notes: list[str]
) -> float | None:
    """Mean difference to the training solver on the first batch, which shares its noise with the accurate score."""
    size = min(count, scorer.config.chunk)
    try:
        other, _ = scorer.score(test, size, solver, 1, bar)
    except SolverError as error:
        notes.append(f"the training solver ({solvers.describe(solver)}) fails on test data: {error}")
        return None
    return float((other[0] - accurate[0, :size]).abs().mean()) / scorer.flow.dim


def _baseline_scores(flow: Flow, splits: Splits, count: int, draws: int, seed: int) -> dict[str, Score]:
    """Baselines in the flow's own space (same transform), their scores brought back by the same log-determinant."""
    from pyrnode.baselines import fit_baselines

    def transformed(samples: Samples, name: str, size: int) -> tuple[Tensor, Tensor]:
        random = seeds.generator(seed, "baseline", name)
        with torch.no_grad():
            x = flow.transform.unwrapped(flow.admit(samples.first(size).x)[0])
            y, log_det = flow.transform(x, random)
        return y.flatten(1).cpu().double(), log_det.cpu().double()

    most = _BASELINE_ROWS if isinstance(splits.train, MappedSamples) else len(splits.train)
    turns, few = flow.transform.turns, min(most, len(splits.validation))
    train, validation = (
        transformed(splits.train, "train", most)[0],
        transformed(splits.validation, "validation", few)[0],
    )
    train, validation = train[: len(train) // turns], validation[: len(validation) // turns]
    fitted = fit_baselines(train, validation)
    rows: dict[str, list[Tensor]] = {name: [] for name in fitted}
    for draw in range(draws):
        y, log_det = transformed(splits.test, f"test {draw}", count)
        for name, baseline in fitted.items():
            each = baseline.log_prob(y).double() + log_det
            rows[name].append(each if turns == 1 else log_sum(each.unflatten(0, (turns, -1))))
    weight = None if splits.test.weight is None else splits.test.weight[:count]
    return {name: Score.of(torch.stack(values), flow.dim, weight) for name, values in rows.items()}
