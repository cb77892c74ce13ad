"""The flow: ODE blocks composed (for images over several scales) between the data and a standard normal.

    x --transform--> y --blocks--> z ~ N(0, I)        log p(x) = log N(z; 0, I) + Σ l_block(T) + log |det ∂y/∂x|

Encoding runs the blocks from t = 0 to T, decoding and sampling from T to 0. In a conditional flow, ``log p(x | c)``,
the context joins the dynamics of every block, and stays the same along the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from pyrnode import engines
from pyrnode.config import Config, SolverConfig
from pyrnode.dynamics import Dynamics
from pyrnode.engines import Engine, Probes, Solution
from pyrnode.errors import ConfigError, DataError, SolverError
from pyrnode.noise import SampleNoise, spread
from pyrnode.stages import Block, FactorOut, Squeeze, network, stages
from pyrnode.transforms import Chain, Dequantize, Logit, Standardize

if TYPE_CHECKING:
    from pyrnode.distribution import FlowDistribution
    from pyrnode.export import TorchFlow

Draw = Callable[[Tensor], Probes | None]
"""Gives the probes for a block's start state."""

EXACT_LIMIT = 64
"""Up to how many dimensions ``divergence="auto"`` takes the exact trace."""

_CHUNK = 500


@dataclass
class FlowSolution:
    """A pass through all blocks.

    Attributes:
        z: Latent, ``(batch, d)``.
        log_det: ``Σ l`` over the blocks, nats, ``(batch,)``.
        blocks: The blocks' solutions, in order.
    """

    z: Tensor
    log_det: Tensor
    blocks: list[Solution]

    def total(self, name: Literal["E", "n", "D"]) -> Tensor:
        """An integral summed over the blocks, ``(batch,)``."""
        return torch.stack([getattr(block, name) for block in self.blocks]).sum(0)

    @property
    def nfe(self) -> float:
        """Evaluations of the dynamics per sample, all blocks together."""
        return sum(block.stats.nfe for block in self.blocks)


def chunked(x: Tensor, c: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Samples ``(batch, ...)`` and their contexts, if any, in pieces of at most `size`."""
    for start in range(0, len(x), size):
        yield x[start : start + size], None if c is None else c[start : start + size]


def context_tensor(context: Any) -> Tensor | None:
    """A context as its user gives it, a tensor or what torch makes one of, as a tensor; `None` stays.

    Raises:
        DataError: It does not consist of real numbers.
    """
    if context is None:
        return None
    try:
        tensor = torch.as_tensor(context)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"context of type {type(context).__name__}: expected numbers, as a tensor or array") from error
    if tensor.is_complex():
        raise DataError("the context has complex numbers: pass real and imaginary parts as features")
    return tensor


def check_context(context: Tensor | None, dim: int, batch: int | None) -> None:
    """Checks the context that a flow is given.

    Args:
        context: ``(batch, dim)`` or ``(dim,)``; `None` for an unconditional flow.
        dim: Number of features that the flow is conditional on; 0 for none.
        batch: Number of samples; `None` for any.

    Raises:
        DataError: It is missing, superfluous, no tensor, or of the wrong shape.
    """
    if dim == 0:
        if context is not None:
            raise DataError("this flow is unconditional (it was trained without a context): leave the context out")
        return
    wanted = f"({dim},) for one that all samples share, or ({'n' if batch is None else batch}, {dim}) for each its own"
    if context is None:
        raise DataError(f"this flow is conditional on {dim} features: pass their values as context, {wanted}")
    if not isinstance(context, Tensor):
        raise DataError(f"context of type {type(context).__name__}: expected a torch tensor, {wanted}")
    shape = tuple(context.shape)
    if context.ndim not in (1, 2) or shape[-1] != dim or (context.ndim == 2 and batch not in (None, shape[0])):
        remedy = "; for one feature, pass context[:, None]" if dim == 1 and context.ndim == 1 else ""
        raise DataError(f"context of shape {shape}: expected {wanted}{remedy}")


def base_log_prob(z: Tensor) -> Tensor:
    """``log N(z; 0, I)`` in nats, ``(...)``, of ``(..., d)``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


class Flow(nn.Module):
    """A density with `log_prob` and `sample`, given by a chain of neural ODEs.

    Made by `pyrnode.train`, `pyrnode.load` or `Flow.build`; `log_prob`, `encode`, `decode` and `sample` use `solver`,
    by default the accurate one of the evaluation settings, whatever solver the flow was trained with.

    Args:
        transform: Fixed bijection between the data and the flow's space.
        stages: Blocks, squeezes and factor-outs, in the order of encoding.
        event_shape: Shape of one sample.
        config: The settings that it was built from.
        levels: Grey levels of discrete data; `None` for continuous.
        context_transform: What the context goes through before it reaches the blocks.

    Raises:
        ConfigError: The blocks differ in the number of features of their contexts.
    """

    def __init__(
        self,
        transform: Chain,
        stages: list[nn.Module],
        event_shape: tuple[int, ...],
        config: Config,
        levels: int | None = None,
        context_transform: Chain | None = None,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.context_transform = context_transform or Chain([])
        self.stages = nn.ModuleList(stages)
        self.event_shape = event_shape
        self.levels = levels
        self.config = config
        evaluation = config.evaluation
        self.solver = replace(
            config.solver, name=evaluation.solver, rtol=evaluation.rtol, atol=evaluation.atol, options={}, memory="auto"
        )
        self.engine: Engine = engines.create(config.engine, config.device)
        widths = sorted({block.dynamics.context_dim for block in self.blocks})
        if len(widths) != 1:
            raise ConfigError(f"the blocks take contexts of {widths} features: expected the same for all")
        (self.context_dim,) = widths

    @classmethod
    def build(
        cls,
        config: Config,
        event_shape: tuple[int, ...],
        *,
        levels: int | None = None,
        sample: Tensor | None = None,
        context_dim: int = 0,
        context_sample: Tensor | None = None,
        dynamics: Callable[[tuple[int, ...]], Dynamics] | None = None,
    ) -> Flow:
        """An untrained flow, initialised from ``config.seed``: the identity between `transform` and the normal.

        Args:
            config: Settings; the network, blocks, scales and transform are read from ``config.flow``.
            event_shape: ``(d,)`` for vectors, ``(C, H, W)`` for images.
            levels: Grey levels of discrete data.
            sample: Continuous training data ``(n, *event)``, from which the standardisation is taken.
            context_dim: Number of features ``m`` of the context; 0 for an unconditional flow.
            context_sample: Contexts of training ``(n, m)``, from which their standardisation is taken.
            dynamics: Makes the dynamics of a block from its event shape; default as ``config.flow.network`` says.

        Raises:
            ConfigError: The settings do not fit the shape.
        """
        dtype = getattr(torch, config.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            composed = list(stages(config, event_shape, dynamics or network(config, event_shape, context_dim)))
        parts = [] if levels is None else [Dequantize(levels, dtype), Logit(config.flow.alpha)]
        if levels is None and config.flow.standardize:
            identity = (torch.zeros(event_shape), torch.ones(event_shape))
            parts = [Standardize(*identity) if sample is None else Standardize.fit(sample.to(torch.float64))]
        context = []
        if context_dim and config.flow.standardize:
            identity = (torch.zeros(context_dim), torch.ones(context_dim))
            known = context_sample is not None
            context = [Standardize.fit(context_sample.double()) if known else Standardize(*identity)]  # type: ignore[union-attr]
        flow = cls(Chain(parts), composed, event_shape, config, levels, Chain(context))
        if flow.context_dim != context_dim:
            raise ConfigError(f"the dynamics take a context of {flow.context_dim} features, the data has {context_dim}")
        return flow.to(dtype)

    @property
    def dim(self) -> int:
        """Number of data dimensions ``d``."""
        return math.prod(self.event_shape)

    @property
    def blocks(self) -> list[Block]:
        """The ODE blocks, in the order of encoding."""
        return [stage for stage in self.stages if isinstance(stage, Block)]

    def _reference(self) -> Tensor:
        return next(self.parameters())

    def prepare(self, x: Tensor) -> Tensor:
        """`x` on the flow's device, checked; continuous values in the flow's type.

        Raises:
            DataError: Wrong shape, not finite, or not a tensor.
        """
        reference = self._reference()
        x = torch.as_tensor(x)
        if tuple(x.shape[1:]) != self.event_shape or x.ndim != len(self.event_shape) + 1:
            raise DataError(
                f"input of shape {tuple(x.shape)}: expected (batch, {', '.join(map(str, self.event_shape))})"
            )
        if x.is_floating_point():
            if not bool(torch.isfinite(x).all()):
                bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
                raise DataError(f"input has NaN or infinite values, first in sample {bad}")
            return x.to(reference.device, reference.dtype)
        return x.to(reference.device) if self.levels is not None else x.to(reference.device, reference.dtype)

    def condition(self, context: Tensor | None, batch: int) -> Tensor | None:
        """The context of a batch as the blocks see it: checked, one for each sample, standardised.

        Args:
            context: ``(batch, m)``, or ``(m,)`` for one that all samples share; `None` for an unconditional flow.
            batch: Number of samples.

        Raises:
            DataError: It is missing, superfluous, of the wrong shape, or not finite.
        """
        context = context_tensor(context)
        check_context(context, self.context_dim, batch)
        if context is None:
            return None
        if not bool(torch.isfinite(context).all()):
            raise DataError("the context has NaN or infinite values")
        reference = self._reference()
        c, _ = self.context_transform(context.to(reference.device, reference.dtype).expand(batch, -1))
        return cast(Tensor, c)

    def solve(
        self,
        y: Tensor,
        draw: Draw,
        solver: SolverConfig | None = None,
        *,
        context: Tensor | None = None,
        total_derivative: bool = False,
    ) -> FlowSolution:
        """Passes transformed data through all blocks.

        Args:
            y: ``(batch, *event)`` in the flow's space.
            draw: Gives the probes for each block's start state, or `None` to solve for the state alone.
            solver: Solver; default `self.solver`.
            context: What `condition` gives.
            total_derivative: Also integrate D.

        Raises:
            SolverError: A block's solve failed; the message names it.
        """
        z, outs = y, list[Tensor]()
        solutions: list[Solution] = []
        log_det = y.new_zeros(len(y))
        for stage in self.stages:
            if isinstance(stage, Block):
                span = (0.0, stage.end_time)
                solution = self._block(len(solutions), stage, z, draw(z), span, solver, context, total_derivative)
                solutions.append(solution)
                z, log_det = solution.z, log_det + solution.l
            elif isinstance(stage, FactorOut):
                z, out = stage(z)
                outs.append(out)
            else:
                z = stage(z)
        return FlowSolution(torch.cat([part.flatten(1) for part in (*outs, z)], 1), log_det, solutions)

    def _block(
        self,
        index: int,
        block: Block,
        z: Tensor,
        probes: Probes | None,
        span: tuple[float, float],
        solver: SolverConfig | None,
        context: Tensor | None,
        total_derivative: bool = False,
    ) -> Solution:
        solver = solver or self.solver
        try:
            return self.engine.integrate(
                block.dynamics, z, probes, span, solver, context=context, total_derivative=total_derivative
            )
        except SolverError as error:
            message = f"block {index} ({tuple(block.dynamics.event_shape)}): {error}"
            raise SolverError(message, status=error.status, block=index) from error

    def _latents(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last scale's state, and what was factored out before it, of a flat latent."""
        outs, shape = [], self.event_shape
        for stage in self.stages:
            if isinstance(stage, Squeeze):
                shape = (shape[0] * 4, shape[1] // 2, shape[2] // 2)
            elif isinstance(stage, FactorOut):
                shape = (shape[0] // 2, *shape[1:])
                size = math.prod(shape)
                outs.append(z[:, :size].reshape(-1, *shape))
                z = z[:, size:]
        return z.reshape(-1, *shape), outs

    def unsolve(self, z: Tensor, solver: SolverConfig | None = None, *, context: Tensor | None = None) -> Tensor:
        """The inverse of `solve`: a latent ``(batch, d)`` back through all blocks, ``(batch, *event)``."""
        state, outs = self._latents(z)
        index = len(self.blocks)
        for stage in reversed(self.stages):
            if isinstance(stage, Block):
                index -= 1
                state = self._block(index, stage, state, None, (stage.end_time, 0.0), solver, context).z
            elif isinstance(stage, FactorOut):
                state = stage.inverse(state, outs.pop())
            else:
                assert isinstance(stage, Squeeze)
                state = stage.inverse(state)
        return state

    def draw(
        self,
        divergence: str = "auto",
        *,
        noise: str = "gaussian",
        probes: int = 1,
        generator: torch.Generator | SampleNoise,
    ) -> Draw:
        """How the divergence is probed: ``"exact"``, ``"hutchinson"``, or ``"auto"`` (exact up to 64 dimensions)."""
        if divergence not in ("auto", "exact", "hutchinson"):
            raise ConfigError(f"divergence = {divergence!r}: expected 'auto', 'exact' or 'hutchinson'")
        if divergence == "exact" or (divergence == "auto" and self.dim <= EXACT_LIMIT):
            return Probes.exact
        if probes < 1:
            raise ConfigError(f"probes = {probes!r}: expected at least 1")
        if isinstance(generator, SampleNoise):
            return generator.draw(probes)
        return lambda z: Probes.draw(z, probes, noise=noise, generator=generator)

    @overload
    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        solver: SolverConfig | None = None,
        divergence: str = "auto",
        probes: int | None = None,
        seed: int = 0,
        return_error: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        solver: SolverConfig | None = None,
        divergence: str = "auto",
        probes: int | None = None,
        seed: int = 0,
        return_error: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        solver: SolverConfig | None = None,
        divergence: str = "auto",
        probes: int | None = None,
        seed: int = 0,
        return_error: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-density of samples, differentiable.

        Noise belongs to the sample: it depends on its values and on the seed, not on the rest of the batch.

        Args:
            x: ``(batch, *event)``. For discrete data integers, to which dequantisation noise is added, or
                floating-point values ``p + u`` in ``[0, levels]``.
            context: ``(batch, m)``, or ``(m,)`` for one that all samples share; for conditional flows.
            solver: Solver; default the accurate one.
            divergence: ``"exact"``, ``"hutchinson"`` or ``"auto"`` (exact up to 64 dimensions).
            probes: Probes per sample where the divergence is estimated; default 1, or 16 with an error.
            seed: Seed of the probes and of the dequantisation: the same call gives the same numbers.
            return_error: Also state the error of the estimate, from the spread of at least two probes and a finer
                solve (`pyrnode.uncertainty`); this costs several solves.

        Returns:
            Nats, ``(batch,)``, in the units of `x` (for discrete data, the density of ``p + u``). With `return_error`,
            also the standard error, ``(batch,)``: the exact value is within it for at least 68 % of the samples.

        Raises:
            ConfigError: `divergence` is unknown, or there are too few probes.
            DataError: `x` or `context` has the wrong shape or is not finite; a conditional flow was given no context,
                or an unconditional one was given some.
            SolverError: A solve failed.
        """
        if return_error:
            from pyrnode.uncertainty import log_prob_with_error

            return log_prob_with_error(self, x, context, solver=solver, divergence=divergence, probes=probes, seed=seed)
        x, parts = self.prepare(x), [self._reference().new_zeros(0)]
        for chunk, c in chunked(x, self.condition(context, len(x)), _CHUNK):
            noise = SampleNoise(chunk, seed, self._reference().dtype)
            y, log_det = self.transform(spread(chunk, noise))
            draw = self.draw(divergence, probes=1 if probes is None else probes, generator=noise)
            solution = self.solve(y, draw, solver, context=c)
            parts.append(base_log_prob(solution.z) + solution.log_det + log_det)
        return torch.cat(parts)

    def encode(
        self, x: Tensor, context: Tensor | None = None, *, solver: SolverConfig | None = None, seed: int = 0
    ) -> Tensor:
        """Latents ``(batch, d)`` of samples ``(batch, *event)``; arguments and errors as in `log_prob`."""
        x, parts = self.prepare(x), [self._reference().new_zeros(0, self.dim)]
        for chunk, c in chunked(x, self.condition(context, len(x)), _CHUNK):
            y, _ = self.transform(spread(chunk, SampleNoise(chunk, seed, self._reference().dtype)))
            parts.append(self.solve(y, lambda _: None, solver, context=c).z)
        return torch.cat(parts)

    def decode(self, z: Tensor, context: Tensor | None = None, *, solver: SolverConfig | None = None) -> Tensor:
        """Samples ``(batch, *event)`` of latents ``(batch, d)``; integers for discrete data.

        Raises:
            DataError: `z` has the wrong shape or is not finite; `context` as in `log_prob`.
            SolverError: A solve failed.
        """
        if z.ndim != 2 or z.shape[1] != self.dim or not bool(torch.isfinite(z).all()):
            raise DataError(f"latents of shape {tuple(z.shape)}: expected finite values of shape (batch, {self.dim})")
        reference = self._reference()
        z = z.to(reference.device, reference.dtype)
        pairs = chunked(z, self.condition(context, len(z)), _CHUNK)
        parts = [self.transform.inverse(self.unsolve(chunk, solver, context=c)) for chunk, c in pairs]
        return torch.cat(parts) if parts else self.transform.inverse(z.reshape(0, *self.event_shape))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        solver: SolverConfig | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draws samples.

        Args:
            n: How many; of a conditional flow, how many for each context.
            context: ``(m,)`` or ``(b, m)``, for conditional flows.
            solver: Solver; default the accurate one.
            seed: Seed; `None` draws from torch's global generator.
            temperature: Standard deviation of the base.

        Returns:
            ``(n, *event)``, or ``(b, n, *event)`` for b contexts; integers for discrete data.

        Raises:
            ConfigError: `n` is not a positive number, or `temperature` is out of range.
            DataError: `context` as in `log_prob`.
            SolverError: A solve failed.
        """
        if not isinstance(n, int) or n < 1:
            raise ConfigError(f"n = {n!r}: expected a positive number of samples")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"temperature = {temperature!r}: expected a finite number, at least 0")
        context = context_tensor(context)
        check_context(context, self.context_dim, None)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        if context is None or context.ndim == 1:
            z = torch.randn(n, self.dim, generator=generator, dtype=self._reference().dtype)
            return self.decode(z * temperature, context, solver=solver)
        z = torch.randn(len(context) * n, self.dim, generator=generator, dtype=self._reference().dtype)
        x = self.decode(z * temperature, context.repeat_interleave(n, 0), solver=solver)
        return x.reshape(len(context), n, *self.event_shape)

    def to_torch(
        self,
        *,
        solver: str | None = None,
        step_size: float | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        divergence: str = "auto",
        probes: int = 1,
        seed: int = 0,
    ) -> TorchFlow:
        """The density as a plain PyTorch module with its own copy of the parameters, which needs no engine.

        Args:
            solver: A solver of the PyTorch engine; default RK4, or DP5 where `rtol` is given.
            step_size: Fixed step, in units of time; default 0.05 unless `rtol` is given.
            rtol: Relative tolerance of adaptive steps; a module with them cannot be exported.
            atol: Absolute tolerance; default `rtol`.
            divergence: ``"exact"``, ``"hutchinson"`` or ``"auto"`` (exact up to 64 dimensions).
            probes: Probes of an estimated divergence.
            seed: Their seed.

        Raises:
            ConfigError: Settings that contradict each other or are out of range.
            EngineUnavailableError: The PyTorch engine has no such solver.
            DataError: A parameter is not finite.
        """
        from pyrnode.export import to_torch

        return to_torch(
            self,
            solver=solver,
            step_size=step_size,
            rtol=rtol,
            atol=atol,
            divergence=divergence,
            probes=probes,
            seed=seed,
        )

    def distribution(
        self,
        context: Tensor | None = None,
        *,
        solver: SolverConfig | None = None,
        divergence: str = "auto",
        probes: int = 1,
        seed: int = 0,
        validate_args: bool | None = None,
    ) -> FlowDistribution:
        """The flow among `torch.distributions`: it computes with this flow, so training changes it.

        Args:
            context: ``(*batch_shape, m)``, for conditional flows: a batch of densities.
            solver: Solver; default the accurate one.
            divergence: ``"exact"``, ``"hutchinson"`` or ``"auto"`` (exact up to 64 dimensions).
            probes: Probes of an estimated divergence.
            seed: Seed of the probes.
            validate_args: As in `torch.distributions.Distribution`.

        Raises:
            ConfigError: There is no such divergence.
            DataError: `context` as in `log_prob`.
        """
        from pyrnode.distribution import FlowDistribution

        return FlowDistribution(
            self, context, solver=solver, divergence=divergence, probes=probes, seed=seed, validate_args=validate_args
        )

    def save(self, path: str | Path) -> None:
        """Writes the flow to one ``.safetensors`` file, atomically; `pyrnode.load` reads it."""
        from pyrnode.checkpoint import save_flow

        save_flow(self, path)
