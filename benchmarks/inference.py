"""Posteriors inside sbi beside its own NSF: C2ST to the exact posterior after equal processor time, on one thread.

    python -m benchmarks.inference --out runs/inference.jsonl --seconds 20
    python -m benchmarks.inference --out runs/inference.jsonl --tasks slcp --simulations 10000 --seeds 0
    python -m benchmarks.inference --out runs/inference.jsonl --sides pyrnode --ours 'silu={"activation": "silu"}'
    python -m benchmarks.inference --table runs/inference.jsonl

``nsf`` and ``pyrnode`` are trained by ``NPE(prior, density_estimator=...).train()`` with sbi's own defaults (Adam at
5e-4, batches of 200, a tenth held out, 20 epochs without improvement end it), ``trainer`` is `pyrnode.sbi.train`. All
have the same simulations, and are cut off at the same processor time. The C2ST is sbi's (a random forest, five folds,
0.5 is best) between 1,000 samples of each posterior and 1,000 exact ones, the mean over five observations; −log q is
the mean over 2,000 fresh pairs, in nats. Runs that are in the file are not repeated.
README.md says what the numbers mean. Needs sbi (pip install sbi).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

OBSERVATIONS, SAMPLES, FRESH = 5, 1000, 2000
SIDES = ("nsf", "pyrnode", "trainer")


@dataclass(frozen=True)
class Task:
    """A simulator whose posterior can be drawn from exactly."""

    prior: Distribution
    simulate: Callable[[Tensor], Tensor]
    posterior: Callable[[Tensor, int], Tensor]


# -- two moons (Lueckmann et al. 2021) -------------------------------------------------------------------------------


def _crescent(n: int) -> Tensor:
    angle, radius = (torch.rand(n) - 0.5) * math.pi, 0.1 + 0.01 * torch.randn(n)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def two_moons() -> Task:
    from sbi.utils import BoxUniform

    def simulate(theta: Tensor) -> Tensor:
        moved = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
        return _crescent(len(theta)) + moved

    def posterior(x: Tensor, n: int) -> Tensor:
        """A point of the crescent, taken off again: what was moved has a constant Jacobian, and two signs alike."""
        moved = (x - _crescent(40 * n)) * math.sqrt(2)
        total: Tensor = -moved[:, 0] * torch.where(torch.rand(len(moved)) < 0.5, 1.0, -1.0)
        theta = torch.stack([total - moved[:, 1], total + moved[:, 1]], 1) / 2
        return theta[(moved[:, 0] <= 0) & (theta.abs() < 1).all(1)][:n]

    return Task(BoxUniform(-torch.ones(2), torch.ones(2)), simulate, posterior)


# -- a linear Gaussian of five dimensions ----------------------------------------------------------------------------


def linear() -> Task:
    matrix = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    matrix = matrix * torch.tensor([0.3, 0.6, 1.0, 1.5, 2.0])

    def simulate(theta: Tensor) -> Tensor:
        x: Tensor = theta @ matrix.T + 0.5 * torch.randn_like(theta)
        return x

    def posterior(x: Tensor, n: int) -> Tensor:
        precision = torch.eye(5) + matrix.T @ matrix / 0.25
        mean = torch.linalg.solve(precision, matrix.T @ x / 0.25)
        exact: Tensor = MultivariateNormal(mean, precision_matrix=precision).sample((n,))
        return exact

    prior = MultivariateNormal(torch.zeros(5), torch.eye(5))
    return Task(prior, simulate, posterior)


# -- simple likelihood, complex posterior (Papamakarios et al. 2019) -------------------------------------------------


def slcp() -> Task:
    from sbi.utils import BoxUniform

    def scale(theta: Tensor) -> Tensor:
        """Cholesky factors ``(n, 2, 2)`` of the covariance of a point."""
        s1, s2, rho = theta[:, 2] ** 2, theta[:, 3] ** 2, theta[:, 4].tanh()
        zero = torch.zeros_like(s1)
        return torch.stack([s1, zero, rho * s2, s2 * (1 - rho**2).clamp(min=1e-9).sqrt()], 1).reshape(-1, 2, 2)

    def simulate(theta: Tensor) -> Tensor:
        noise = torch.randn(len(theta), 4, 2)
        points: Tensor = theta[:, None, :2] + noise @ scale(theta).mT
        return points.flatten(1)

    def log_likelihood(theta: Tensor, points: Tensor) -> Tensor:
        factor = scale(theta)
        spread: Tensor = torch.linalg.solve_triangular(factor, (points - theta[:, None, :2]).mT, upper=False)
        return -0.5 * spread.square().sum((1, 2)) - 4 * factor.diagonal(dim1=1, dim2=2).log().sum(1)

    def posterior(x: Tensor, n: int) -> Tensor:
        """Draws from the prior, about the points' mean, by their weights; then Metropolis steps, which part copies."""
        points = x.reshape(4, 2).double()
        theta = (torch.rand(1_000_000, 5, dtype=torch.float64) - 0.5) * 6
        factor = scale(theta)
        theta[:, :2] = points.mean(0) + (factor @ torch.randn(len(theta), 2, 1, dtype=torch.float64))[:, :, 0] / 2
        spread = torch.linalg.solve_triangular(
            factor, (points - points.mean(0)).T.expand(len(theta), 2, 4), upper=False
        )
        log_weight = -0.5 * spread.square().sum((1, 2)) - 3 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        log_weight[(theta[:, :2].abs() > 3).any(1)] = -torch.inf
        theta = theta[torch.multinomial((log_weight - log_weight.max()).exp(), n, replacement=True)]
        at = log_likelihood(theta, points)
        for length in torch.tensor([0.5, 0.15, 0.05]).repeat(200):
            new = theta + length * torch.randn_like(theta) * theta.std(0)
            value = log_likelihood(new, points)
            taken = (torch.rand_like(value).log() < value - at) & (new.abs() < 3).all(1)
            theta, at = torch.where(taken[:, None], new, theta), torch.where(taken, value, at)
        return theta.float()

    return Task(BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5)), simulate, posterior)


# -- a decay with noise: an amplitude and a rate in a box, ten readings ------------------------------------------------


def decay() -> Task:
    from sbi.utils import BoxUniform

    times, noise = torch.linspace(0.2, 4, 10), 0.15
    low, high = torch.tensor([0.2, 0.05]), torch.tensor([2.0, 3.0])

    def curve(theta: Tensor) -> Tensor:
        return theta[:, :1] * (-theta[:, 1:] * times.to(theta)).exp()

    def simulate(theta: Tensor) -> Tensor:
        return curve(theta) + noise * torch.randn(len(theta), len(times))

    def posterior(x: Tensor, n: int) -> Tensor:
        """Draws from the prior, taken by their weights."""
        theta = low + (high - low) * torch.rand(1_000_000, 2)
        log_weight = -0.5 * ((x - curve(theta)) / noise).square().sum(1)
        weight = (log_weight - log_weight.max()).exp()
        return theta[(weight > torch.rand(len(weight))).nonzero()[:n, 0]]

    return Task(BoxUniform(low, high), simulate, posterior)


TASKS: dict[str, Callable[[], Task]] = {"two-moons": two_moons, "linear": linear, "slcp": slcp, "decay": decay}


# -- a run -----------------------------------------------------------------------------------------------------------


def builder(side: str, prior: Any, settings: dict[str, Any]) -> Any:
    """What sbi is given for its density estimator."""
    if side == "nsf":
        from sbi.neural_nets import posterior_nn

        return posterior_nn("nsf", **settings)
    import pyrnode.sbi

    return pyrnode.sbi.rnode(prior, **settings)


@dataclass(frozen=True)
class Trained:
    """A posterior of sbi, the epochs of sbi's loop, and the processor time that they took, in seconds."""

    posterior: Any
    epochs: int
    seconds: float


def trained(task: Task, side: str, simulations: int, seed: int, seconds: float, settings: dict[str, Any]) -> Trained:
    """Trains for that much processor time at most."""
    from sbi.inference import NPE

    class Limited(NPE):  # type: ignore[misc]
        spent = 0.0

        def _converged(self, epoch: int, stop_after_epochs: int) -> bool:
            self.spent = time.process_time() - begun
            return bool(super()._converged(epoch, 0 if self.spent > seconds else stop_after_epochs))

    torch.manual_seed(seed)
    theta = task.prior.sample((simulations,))
    x = task.simulate(theta)
    if side == "trainer":
        return _by_pyrnode(theta, x, task.prior, seconds, settings)
    inference = Limited(task.prior, density_estimator=builder(side, task.prior, settings), show_progress_bars=False)
    inference.append_simulations(theta, x)
    begun = time.process_time()
    inference.train()
    return Trained(inference.build_posterior(), inference.summary["epochs_trained"][-1], inference.spent)


def _by_pyrnode(theta: Tensor, x: Tensor, prior: Any, seconds: float, settings: dict[str, Any]) -> Trained:
    """The same by `pyrnode.sbi.train`, whose clock is the processor's for once."""
    from sbi.inference import NPE

    import pyrnode.sbi

    with mock.patch.object(time, "perf_counter", time.process_time):
        begun = time.process_time()
        estimator = pyrnode.sbi.train(theta, x, prior, minutes=seconds / 60, progress=False, **settings)
        spent = time.process_time() - begun
    return Trained(NPE(prior, show_progress_bars=False).build_posterior(estimator), 0, spent)


def measure(
    name: str, side: str, simulations: int, seed: int, seconds: float, settings: dict[str, Any]
) -> dict[str, Any]:
    """Trains, draws at the observations, which are the same for all runs of a task, and compares."""
    from sbi.utils.metrics import c2st

    task = TASKS[name]()
    found = trained(task, side, simulations, seed, seconds, settings)
    torch.manual_seed(1234)
    observed = task.simulate(task.prior.sample((OBSERVATIONS,)))
    fresh = task.prior.sample((FRESH,))
    with torch.no_grad():
        log_prob = found.posterior.posterior_estimator.log_prob(fresh[None], task.simulate(fresh))
    scores, drawing = list[float](), 0.0
    for x in observed:
        exact = task.posterior(x, SAMPLES)
        begun = time.process_time()
        drawn = found.posterior.sample((SAMPLES,), x=x, show_progress_bars=False)
        drawing += time.process_time() - begun
        scores.append(float(c2st(exact, drawn)))
    return {
        "c2st": statistics.mean(scores),
        "each": scores,
        "nll": -float(log_prob.mean()),
        "epochs": found.epochs,
        "seconds": found.seconds,
        "drawing": drawing,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Mean C2ST and −log q, and what differs between the seeds, by task, simulations and side."""
    found = defaultdict(list)
    for line in lines:
        found[line["task"], line["simulations"], line["side"]].append(line)
    rows = [
        "| task | simulations | side | C2ST | seeds | −log q | epochs | training, s | drawing, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, simulations, side), runs in sorted(found.items()):
        scores = [run["c2st"] for run in runs]
        keys = ("nll", "epochs", "seconds", "drawing")
        nll, epochs, seconds, drawing = (statistics.mean(run[key] for run in runs) for key in keys)
        apart = f"{min(scores):.3f} to {max(scores):.3f} ({len(scores)})"
        run = f"{statistics.mean(scores):.3f} | {apart} | {nll:.2f} | {epochs:.0f} | {seconds:.0f} | {drawing:.1f}"
        rows.append(f"| {task} | {simulations:,} | {side} | {run} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file of JSON lines, to which runs are added")
    parser.add_argument("--table", type=Path, help="shows what is in such a file, and runs nothing")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--simulations", nargs="+", type=int, default=[2000, 10_000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=45.0, help="processor time of a training")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=JSON", help="settings of `rnode`; repeatable"
    )
    parser.add_argument("--trainer", action="append", default=[], metavar="NAME=JSON", help="of `pyrnode.sbi.train`")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    if args.out is None:
        parser.error("--out or --table is needed")
    torch.set_num_threads(1)
    out = args.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    there = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    given = {"pyrnode": args.ours, "trainer": args.trainer}
    sides = list[tuple[str, str, str]]()
    for side in args.sides:
        named = [each.partition("=") for each in given.get(side, [])] or [(side, "=", "{}")]
        sides += [(name, side, text) for name, _, text in named]
    for task, simulations, seed, (name, side, text) in itertools.product(
        args.tasks, args.simulations, args.seeds, sides
    ):
        key = {"task": task, "simulations": simulations, "seed": seed, "side": name, "limit": args.seconds}
        if any(key.items() <= line.items() for line in there):
            continue
        with tempfile.TemporaryDirectory() as logs, contextlib.chdir(logs), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):
                found = measure(task, side, simulations, seed, args.seconds, json.loads(text))
        line = {**key, "settings": json.loads(text), **found}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{key}: C2ST {found['c2st']:.3f}, {found['epochs']} epochs in {found['seconds']:.0f} s", flush=True)
    print(table([json.loads(line) for line in out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
