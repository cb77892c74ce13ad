"""A learned flow as a plain `torch.nn.Module`: what `Flow.to_torch` gives and every exported file is made from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from pyrnode.config import SolverConfig
from pyrnode.engines import Probes, TorchEngine
from pyrnode.engines.runge_kutta import combine, grid
from pyrnode.errors import ConfigError, DataError, SolverError, unknown_name
from pyrnode.export.rates import bind
from pyrnode.export.solve import Solve, unexportable
from pyrnode.flow import EXACT_LIMIT, Flow, base_log_prob, check_context
from pyrnode.solvers import method
from pyrnode.stages import Block, FactorOut, Squeeze
from pyrnode.transforms import Chain, Dequantize, Standardize, Transform

STEP_SIZE = 0.05
"""Default step of a fixed-step solver, in units of time."""

_MAX_STEPS = 10_000


class TorchFlow(nn.Module):
    """A density as a plain PyTorch module: ``forward(x) -> (z, log_det)``, `inverse`, `log_prob` and `sample`.

    Made by `Flow.to_torch` or `pyrnode.export.load`. It holds its own copy of the parameters and buffers, under the
    names that they have in the flow, and takes and gives tensors of their type and device.

    With fixed steps the whole pass is ordinary tensor operations: gradients of any order for `x` and the
    parameters, `torch.func` (`vmap` over inputs or over stacked parameters, `grad`, `jvp`), `torch.export`. Values are
    checked (shape, type, finite, result finite) wherever they are known; under `vmap` and in an exported program only
    the shape and the type are.

    With an adaptive solver (`rtol`) every sample has its own steps, so the control flow depends on values: first
    gradients by autograd, but no `torch.func`, and no export (`ConfigError`).

    Where the divergence is estimated, the probes are drawn once, from the seed, stored as buffers, and shared by all
    samples: the same sample always gets the same number, alone or in a batch. They are ±1 with equal probability,
    which is exact for diagonal Jacobians. Do not train on them: the flow would learn to please these directions.

    Args:
        transform: Fixed bijection between the data and the flow's space.
        stages: Blocks, squeezes and factor-outs, in the order of encoding.
        event_shape: Shape of one sample.
        levels: Grey levels of discrete data, whose samples are then ``p + u`` in ``[0, levels]``; `None` for
            continuous data.
        solve: Solver.
        divergence: ``"exact"`` or ``"hutchinson"``.
        probes: Number of probes of an estimate.
        seed: Seed of the probes.
        context_transform: What the context of a conditional flow goes through before it reaches the blocks.
    """

    def __init__(
        self,
        transform: Chain,
        stages: Iterable[nn.Module],
        event_shape: tuple[int, ...],
        levels: int | None,
        *,
        solve: Solve,
        divergence: Literal["exact", "hutchinson"],
        probes: int = 1,
        seed: int = 0,
        context_transform: Chain | None = None,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.context_transform = context_transform or Chain([])
        self.stages = nn.ModuleList(stages)
        self.event_shape, self.levels = tuple(event_shape), levels
        self.solve, self.divergence = solve, divergence
        self.probes, self.seed = (probes, seed) if divergence == "hutchinson" else (0, 0)
        self._engine = TorchEngine()
        generator = torch.Generator().manual_seed(seed)
        for index, block in enumerate(self.blocks()):
            if solve.step_size is not None and block.end_time / solve.step_size > _MAX_STEPS:
                raise ConfigError(f"step_size = {solve.step_size:g}: more than {_MAX_STEPS} steps; take a larger one")
            if self.probes:
                signs = torch.randint(0, 2, (probes, *block.dynamics.event_shape), generator=generator) * 2 - 1
                self.register_buffer(f"noise_{index}", signs.to(self.reference))

    @property
    def dim(self) -> int:
        """Number of data dimensions ``d``."""
        return math.prod(self.event_shape)

    @property
    def context_dim(self) -> int:
        """Number of features of the context; 0 for an unconditional flow."""
        return next(self.blocks()).dynamics.context_dim

    @property
    def reference(self) -> Tensor:
        """A parameter, whose type and device are those of the module."""
        return next(self.stages.parameters(), torch.zeros(()))

    def blocks(self) -> Iterator[Block]:
        """The ODE blocks, in the order of encoding."""
        return (stage for stage in self.stages if isinstance(stage, Block))

    # -- the public methods ------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents of samples, and the log-determinant.

        Args:
            x: ``(batch, *event)``, of the parameters' type and device; for discrete data ``p + u`` in
                ``[0, levels]``, with u uniform noise or ½.
            context: ``(batch, m)`` or ``(m,)``, of the same type and device, for conditional flows.

        Returns:
            ``z`` ``(batch, d)`` and ``log |det ∂z/∂x|`` in nats, ``(batch,)``.

        Raises:
            DataError: Wrong shape, type or device, not finite, or outside ``[0, levels]``; a context that is missing
                or superfluous.
            SolverError: The solve did not reach its end, or is not finite.
        """
        self._check(x, self.event_shape, "input", None if self.levels is None else float(self.levels))
        c = self._condition(context, x)
        y, log_det = x, x.new_zeros(x.shape[0])
        for part in self.transform.transforms:
            y, term = _transform(part, y)
            log_det = log_det + term
        z, outs = y, list[Tensor]()
        blocks = 0
        for stage in self.stages:
            if isinstance(stage, Block):
                z, l = self._integrate(blocks, stage, z, c, (0.0, stage.end_time), divergence=True)
                log_det, blocks = log_det + l, blocks + 1
            elif isinstance(stage, FactorOut):
                z, out = stage(z)
                outs.append(out)
            else:
                z = stage(z)
        return torch.cat([part.flatten(1) for part in (*outs, z)], 1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Samples ``(batch, *event)`` of latents ``(batch, d)``; for discrete data ``p + u``, whose floor is the pixel.

        `context` as in `forward`.

        Raises:
            DataError: Wrong shape, type or device, or not finite.
            SolverError: The solve did not reach its end, or is not finite.
        """
        self._check(z, (self.dim,), "latents")
        c = self._condition(context, z)
        shapes = list(self._latent_shapes())
        sizes = [math.prod(shape) for shape in shapes]
        outs: list[Tensor] = [p.unflatten(1, shape) for p, shape in zip(z.split(sizes, 1), shapes, strict=True)]
        state = outs.pop()
        index = sum(1 for _ in self.blocks())
        for stage in reversed(self.stages):
            if isinstance(stage, Block):
                index -= 1
                state, _ = self._integrate(index, stage, state, c, (stage.end_time, 0.0), divergence=False)
            elif isinstance(stage, FactorOut):
                state = stage.inverse(state, outs.pop())
            else:
                assert isinstance(stage, Squeeze)
                state = stage.inverse(state)
        for part in reversed(self.transform.transforms):
            assert isinstance(part, Transform)
            state = state * part.levels if isinstance(part, Dequantize) else part.inverse(state)
        return state

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of samples in nats, ``(batch,)``, in the units of `x`; arguments and errors as in `forward`."""
        z, log_det = self.forward(x, context)
        return base_log_prob(z) + log_det

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        """Draws `n` samples ``(n, *event)``, as `inverse` gives them; from torch's global generator without a seed.

        For a conditional flow, `n` for a context ``(m,)``, or ``(b, n, *event)`` for each of `b` contexts ``(b, m)``.

        Raises:
            ConfigError: `n` is not a positive number.
            DataError: The context as in `forward`.
        """
        if not _tracing() and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise ConfigError(f"n = {n!r}: expected a positive number of samples")
        check_context(context, self.context_dim, None)
        reference, lead = self.reference, torch.Size() if context is None else context.shape[:-1]
        if seed is None:
            z = torch.randn(*lead, n, self.dim, dtype=reference.dtype)  # no generator argument: n may be a symbol
        else:
            z = torch.randn(*lead, n, self.dim, dtype=reference.dtype, generator=torch.Generator().manual_seed(seed))
        if not lead:
            return self.inverse(z.to(reference.device), context)
        assert context is not None
        x: Tensor = self.inverse(z.to(reference.device).flatten(0, 1), context.repeat_interleave(n, 0))
        return x.reshape(*lead, n, *self.event_shape)

    def extra_repr(self) -> str:
        trace = self.divergence + (f", probes={self.probes}, seed={self.seed}" if self.probes else "")
        return f"event_shape={self.event_shape}, solver={str(self.solve)!r}, divergence={trace}"

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _check(self, x: Tensor, shape: tuple[int, ...], what: str, high: float | None = None) -> None:
        expected = f"expected (batch, {', '.join(map(str, shape))})"
        if not isinstance(x, Tensor):
            raise DataError(f"{what} of type {type(x).__name__}: {expected} as a torch tensor")
        if tuple(x.shape[1:]) != shape or x.ndim != len(shape) + 1:
            raise DataError(f"{what} of shape {tuple(x.shape)}: {expected}")
        reference = self.reference
        if x.dtype != reference.dtype or x.device != reference.device:
            noise = ", and give integers noise in [0, 1)" if not x.is_floating_point() and high else ""
            raise DataError(
                f"{what} of {x.dtype} on {x.device}, and the module is {reference.dtype} on {reference.device}: "
                f"convert one with .to(...){noise}"
            )
        if not _true(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise DataError(f"{what}: NaN or infinite values, first in sample {bad}")
        if high is not None and not _true(((x >= 0) & (x <= high)).all()):
            raise DataError(f"{what} from {float(x.min()):g} to {float(x.max()):g}: expected 0 to {high:g}")

    def _condition(self, context: Tensor | None, like: Tensor) -> Tensor | None:
        """The context as the blocks see it, one for each of the samples or latents `like`."""
        check_context(context, self.context_dim, like.shape[0])
        if context is None:
            return None
        context = context.expand(like.shape[0], -1)
        self._check(context, (self.context_dim,), "the context")
        for part in self.context_transform.transforms:
            context, _ = _transform(part, context)
        return context

    def _latent_shapes(self) -> Iterator[tuple[int, ...]]:
        """Shapes of what is factored out, in order, and of the last state."""
        shape = self.event_shape
        for stage in self.stages:
            if isinstance(stage, Squeeze):
                shape = (shape[0] * 4, shape[1] // 2, shape[2] // 2)
            elif isinstance(stage, FactorOut):
                shape = (shape[0] // 2, *shape[1:])
                yield shape
        yield shape

    def _integrate(
        self, index: int, block: Block, z: Tensor, c: Tensor | None, span: tuple[float, float], *, divergence: bool
    ) -> tuple[Tensor, Tensor]:
        """One block: the state at the end of `span`, and l (zero where it is not asked for)."""
        if not self.solve.fixed:
            return self._adaptive(index, block, z, c, span, divergence=divergence)
        probes, weight = self._probes(index, z) if divergence else (None, 1.0)
        z, l = self._fixed(block, z, c, span, probes)
        l = l if l is None or weight == 1 else l * weight
        total = z.new_zeros(z.shape[0]) if l is None else l
        if not _true(torch.isfinite(z.sum() + total.sum())):
            raise SolverError(
                f"block {index}: the state is not finite at t = {span[1]:g} ({self.solve}); take a smaller step_size",
                status="Unstable",
                block=index,
            )
        return z, total

    def _probes(self, index: int, z: Tensor) -> tuple[Tensor, float]:
        """Probes ``(k, *event)`` shared by the batch, and their weight."""
        if self.probes:
            return self.get_buffer(f"noise_{index}"), 1 / self.probes
        d = math.prod(z.shape[1:])
        return torch.eye(d, dtype=z.dtype, device=z.device).unflatten(1, z.shape[1:]), 1.0

    def _fixed(
        self, block: Block, z: Tensor, c: Tensor | None, span: tuple[float, float], probes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The explicit Runge-Kutta method of `Solve`, its steps written out one after the other."""
        assert self.solve.step_size is not None
        tableau, rates, l = method(self.solve.name).tableau, bind(block.dynamics, c), None
        for t, h in grid(span, self.solve.step_size):
            fs: list[Tensor] = []
            for node, row, b in zip(tableau.c, tableau.a, tableau.b, strict=True):
                f, div = rates(t + node * h, combine(z, fs, row, h), probes if b else None)
                fs.append(f)
                if div is not None:
                    l = h * b * div if l is None else torch.add(l, div, alpha=h * b)
            z = combine(z, fs, tableau.b, h)
        return z, l

    def _adaptive(
        self, index: int, block: Block, z: Tensor, c: Tensor | None, span: tuple[float, float], *, divergence: bool
    ) -> tuple[Tensor, Tensor]:
        if _tracing():
            raise unexportable(self.solve)
        rtol, atol = self.solve.rtol, self.solve.atol
        assert rtol is not None
        assert atol is not None
        solver = SolverConfig(name=self.solve.name, rtol=rtol, atol=atol)
        probes = None
        if divergence:
            eps, weight = self._probes(index, z)
            probes = Probes(eps.unsqueeze(1).expand(len(eps), *z.shape), weight)
        try:
            solution = self._engine.integrate(block.dynamics, z, probes, span, solver, context=c)
        except SolverError as error:
            raise SolverError(f"block {index}: {error}", status=error.status, block=index) from error
        except RuntimeError as error:
            if "vmap" in str(error) or "functorch" in str(error):
                raise unexportable(self.solve) from error
            raise
        return solution.z, solution.l


def _transform(part: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | float]:
    """A transform of `pyrnode.transforms` without checks of values, and with a batch whose size may be a symbol."""
    if isinstance(part, Dequantize):
        return x / part.levels, -math.prod(x.shape[1:]) * math.log(part.levels)
    if isinstance(part, Standardize):
        return (x - part.mean) / part.std, -part.std.log().sum()
    y, log_det = part(x)
    return y, log_det


def _tracing() -> bool:
    """Whether operations are being recorded, so that no value is known."""
    return torch.compiler.is_compiling()


def _true(condition: Tensor) -> bool:
    """The condition, or true where no value is known (recording, `torch.vmap`)."""
    if _tracing():
        return True
    try:
        return bool(condition)
    except RuntimeError as error:
        if "vmap" in str(error):
            return True
        raise


def to_torch(
    flow: Flow,
    *,
    solver: str | None = None,
    step_size: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    divergence: str = "auto",
    probes: int = 1,
    seed: int = 0,
) -> TorchFlow:
    """A flow as a plain module; see `Flow.to_torch`.

    Args:
        flow: A flow, trained with either engine; its parameters are copied.
        solver: A solver of the PyTorch engine; default RK4, or DP5 where `rtol` is given.
        step_size: Fixed step, in units of time; default 0.05 unless `rtol` is given. Adaptive solvers' formulas
            take one too.
        rtol: Relative tolerance of adaptive steps.
        atol: Absolute tolerance; default `rtol`.
        divergence: ``"exact"``, ``"hutchinson"``, or ``"auto"``: exact up to 64 dimensions.
        probes: Probes of an estimated divergence.
        seed: Their seed.

    Raises:
        ConfigError: Settings that contradict each other or are out of range.
        EngineUnavailableError: The PyTorch engine has no such solver.
        DataError: A parameter of the flow is not finite.
    """
    if divergence not in ("auto", "exact", "hutchinson"):
        raise ConfigError(unknown_name("divergence", divergence, ("auto", "exact", "hutchinson")))
    for name, value, least in (("probes", probes, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} = {value!r}: expected a whole number, at least {least}")
    for name, tensor in flow.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name} is not finite, so this is no density: load an earlier checkpoint, or train again")
    if rtol is None and atol is None and step_size is None:
        step_size = STEP_SIZE
    if rtol is not None and atol is None:
        atol = rtol
    chosen = Solve(solver or ("RK4" if rtol is None else "DP5"), step_size, rtol, atol)
    exact = divergence == "exact" or (divergence == "auto" and flow.dim <= EXACT_LIMIT)
    transform, stages, context_transform = copy.deepcopy((flow.transform, list(flow.stages), flow.context_transform))
    module = TorchFlow(
        transform,
        stages,
        flow.event_shape,
        flow.levels,
        solve=chosen,
        divergence="exact" if exact else "hutchinson",
        probes=probes,
        seed=seed,
        context_transform=context_transform,
    )
    return module.eval()
