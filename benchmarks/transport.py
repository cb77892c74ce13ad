"""The optimal map between two Gaussians, which is known, beside the maps that flows learn.

    python -m benchmarks.transport [--dims 2 10] [--steps 2000] [--points sobol] [--models potential mlp+kinetic]

Data are ``x ~ N(m, S²)``, S symmetric. The map of least cost onto N(0, I) is ``T(x) = S⁻¹(x − m)``, and its cost is
``W² = E|T(x) − x|² = |m|² + |S − I|_F²``. Each model is trained on samples of which none comes twice, and then encodes
20,000 others, drawn independently:

* map: root mean square of ``T̂(x) − T(x)``, over that of ``T(x) − x``;
* cost: relative error of the mean of ``|T̂(x) − x|²``; energy: that of the mean of ``∫‖f‖²``, which no path undercuts;
* nats: excess of the mean of ``−log p`` over the entropy's sample mean.

What limits a map is how well a batch stands for the Gaussian: the mean and the covariance of n samples are off by some
``sqrt(d/n)``. So training takes points of a scrambled Sobol sequence: each is distributed as a sample is, and together
they fill the space evenly. ``--points drawn`` takes independent samples.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from pyrnode.composition import base_log_prob
from pyrnode.config import Config
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.probes import Probes
from pyrnode.training.step import differentiate, estimator

_POTENTIAL = {
    "network.kind": "potential",
    "activation": "logcosh",
    "penalties.divergence": "exact",
    "kinetic": 0.0,
    "jacobian": 0.0,
    "learning_rate": 0.02,
}
_MLP = {**_POTENTIAL, "network.kind": "mlp", "activation": "tanh", "learning_rate": 0.003}

MODELS: dict[str, dict[str, Any]] = {
    "potential": {**_POTENTIAL, "hjb": 0.1},
    "potential, plain": _POTENTIAL,
    "potential+kinetic": {**_POTENTIAL, "kinetic": 0.01},
    "mlp+kinetic": {**_MLP, "kinetic": 0.01},
    "mlp, plain": _MLP,
}
"""Settings of the models. The equation costs the likelihood nothing, and its solution is the optimal map; the kinetic
energy is paid for in likelihood."""


@dataclass
class Gaussian:
    """``N(m, S²)``."""

    m: Tensor
    S: Tensor

    @classmethod
    def drawn(cls, d: int, seed: int = 0) -> Gaussian:
        """Standard deviations from ½ to 2 along random axes, and a mean of length 1."""
        generator = torch.Generator().manual_seed(seed)
        axes, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.double))
        m = torch.randn(d, generator=generator, dtype=torch.double)
        return cls(m / m.norm(), axes @ torch.diag(torch.logspace(-1, 1, d, 2, dtype=torch.double)) @ axes.T)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.points(torch.randn(n, len(self.m), generator=generator, dtype=torch.double))

    def points(self, normal: Tensor) -> Tensor:
        """The samples that points ``(n, d)`` of N(0, I) become."""
        return torch.addmm(self.m, normal, self.S)

    def log_prob(self, x: Tensor) -> Tensor:
        return base_log_prob(self.optimal(x)) - torch.logdet(self.S)

    def optimal(self, x: Tensor) -> Tensor:
        """``T(x)``."""
        solution: Tensor = torch.linalg.solve(self.S, (x - self.m).T)
        return solution.T

    @property
    def cost(self) -> float:
        """``W²``."""
        return float(self.m.square().sum() + (self.S - torch.eye(len(self.m), dtype=torch.double)).square().sum())


class Sobol:
    """Points of ``N(0, I)`` from a scrambled Sobol sequence, one stretch of it after the other."""

    def __init__(self, d: int, seed: int) -> None:
        self._engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)

    def draw(self, n: int) -> Tensor:
        """The next `n` points, ``(n, d)``."""
        uniform = self._engine.draw(n, dtype=torch.double)
        edge = 2.0**-31  # half of the sequence's own unit: no point is at 0 or 1
        normal: Tensor = torch.special.ndtri(uniform.clamp(edge, 1 - edge))
        return normal


@dataclass
class Measured:
    """A learned map beside the optimal one; relative errors, and nats."""

    map: float
    cost: float
    energy: float
    nats: float
    nfe: float


@torch.no_grad()
def measure(flow: Flow, gaussian: Gaussian, *, n: int = 20_000, seed: int = 1) -> Measured:
    """The flow's map on `n` samples, by its accurate solver."""
    x = gaussian.sample(n, torch.Generator().manual_seed(seed))
    passages = [flow.solve(flow.admit(part)[0], Probes.exact) for part in x.split(2000)]
    z = torch.cat([p.z for p in passages]).double()
    energy = torch.cat([p.total("E") for p in passages]).double()
    log_prob = torch.cat([p.log_prob for p in passages]).double()
    optimal = gaussian.optimal(x)
    cost = (optimal - x).square().sum(1).mean()  # on these samples, so that their scatter is in neither error
    return Measured(
        map=float(((z - optimal).square().sum(1).mean() / cost).sqrt()),
        cost=float((z - x).square().sum(1).mean() / cost - 1),
        energy=float(energy.mean() / cost - 1),
        nats=float((gaussian.log_prob(x) - log_prob).mean()),
        nfe=sum(p.nfe for p in passages) / len(passages),
    )


def learn(
    gaussian: Gaussian,
    settings: Mapping[str, Any],
    *,
    steps: int,
    batch: int = 512,
    width: int = 64,
    step_size: float = 0.5,
    points: str = "sobol",
    seed: int = 0,
) -> tuple[Flow, float]:
    """A flow trained on samples of a Gaussian, and the seconds of the processor that it took.

    Args:
        gaussian: The Gaussian.
        settings: Of the model.
        steps, batch: Adam's steps, and samples in each; the rate falls along a cosine to zero.
        width: Of the two hidden layers.
        step_size: Of RK4 in training.
        points: ``"sobol"`` or ``"drawn"``.
        seed: Of all that is drawn.
    """
    d = len(gaussian.m)
    common = {"engine": "torch", "device": "cpu", "hidden": [width, width], "standardize": "none", "seed": seed}
    config = Config().override({**common, "solver.step_size": step_size, **settings})
    flow, penalties = Flow.build(config, (d,)), config.penalties
    rate, generator = config.training.learning_rate, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    sequence = Sobol(d, seed) if points == "sobol" else None
    began = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        drawn = gaussian.points(sequence.draw(batch)) if sequence else gaussian.sample(batch, generator)
        x, _ = flow.admit(drawn)
        draw = flow.draw(estimator(flow, penalties), generator)
        passage = flow.solve(x, draw, config.solver, hjb=penalties.hjb > 0)
        differentiate(objective(passage, penalties).loss, flow, optimizer)
        optimizer.step()
    return flow, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="flows beside the optimal map between two Gaussians")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--step-size", type=float, default=0.5, help="of RK4 in training")
    parser.add_argument("--points", choices=["sobol", "drawn"], default="sobol", help="what is trained on")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    records.json_argument(parser)
    given = parser.parse_args()
    rows = []
    print("| d | model | map | cost | energy | nats | evaluations | seconds |\n|---|---|---|---|---|---|---|---|")
    for d in given.dims:
        gaussian = Gaussian.drawn(d)
        for name in given.models:
            flow, seconds = learn(
                gaussian,
                MODELS[name],
                steps=given.steps,
                batch=given.batch,
                step_size=given.step_size,
                points=given.points,
            )
            found = measure(flow, gaussian)
            rows.append({"d": d, "model": name, "seconds": seconds, **asdict(found)})
            errors = " | ".join(f"{100 * x:.2f} %" for x in (found.map, found.cost, found.energy))
            print(f"| {d} | {name} | {errors} | {found.nats:.4f} | {found.nfe:.0f} | {seconds:.0f} |", flush=True)
    records.leave(given.json, rows)


if __name__ == "__main__":
    main()
