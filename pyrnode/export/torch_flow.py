"""A learned flow as a plain `torch.nn.Module`: what `Flow.to_torch` gives and every exported file is made from."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrnode import solvers
from pyrnode.composition import Composition, Passage
from pyrnode.config import Divergence, DivergenceLike, SolverConfig, SolverLike
from pyrnode.contexts import Contexts, check_context
from pyrnode.embedding import Embedding
from pyrnode.engines import Engine, PlainEngine, Solution, TorchEngine
from pyrnode.errors import ConfigError, DataError
from pyrnode.probes import Draw, Probes
from pyrnode.tracing import recording
from pyrnode.transforms import Chain

DEFAULT = SolverConfig(name="RK4", step_size=0.05, adaptive=False)
"""How a module integrates where nothing is said."""


class TorchFlow(Composition):
    """A density as a plain PyTorch module: ``forward(x) -> (z, log_det)``, `inverse`, `log_prob` and `sample`.

    Made by `Flow.to_torch` or `pyrnode.export.load`. It holds its own copy of the parameters and buffers, under the
    names that they have in the flow, and takes and gives tensors of their type and device.

    With fixed steps the whole pass is ordinary tensor operations: gradients of any order for `x` and the
    parameters, `torch.func` (`vmap` over inputs or over stacked parameters, `grad`, `jvp`), `torch.export`. Values are
    checked (shape, type, finite, result finite) wherever they are known; under `vmap` and in an exported program only
    the shape and the type are.

    With an adaptive solver every sample has its own steps, so the control flow depends on values: first gradients by
    autograd, but no `torch.func`, and no export (`ConfigError`).

    Where the divergence is estimated, the probes are drawn once, from the seed, stored as buffers, and shared by all
    samples: the same sample always gets the same number, alone or in a batch. They are ±1 with equal probability,
    which is exact for diagonal Jacobians. Do not train on them: the flow would learn to please these directions.

    Args:
        transform: Fixed bijection between the data and the flow's space.
        parts: Blocks, squeezes and factor-outs, in the order of encoding.
        event_shape: Shape of one sample.
        levels: Grey levels of discrete data, whose samples are then ``p + u`` in ``[0, levels]``; `None` for
            continuous data.
        solver: Solver of the PyTorch engine.
        divergence: How the divergence is got.
        context_transform: What the context of a conditional flow goes through before it reaches the blocks.
        data_dtype: Type of the data, which samples may have beside the parameters' own; default that.
        embedding: The network between contexts and blocks.

    Raises:
        ConfigError: The steps of the solver are too many.
        EngineUnavailableError: The PyTorch engine has no such solver.
    """

    def __init__(
        self,
        transform: Chain,
        parts: Iterable[nn.Module],
        event_shape: tuple[int, ...],
        levels: int | None,
        *,
        solver: SolverConfig,
        divergence: Divergence,
        context_transform: Chain | None = None,
        data_dtype: torch.dtype | None = None,
        embedding: Embedding | None = None,
    ) -> None:
        engine: Engine = TorchEngine() if solvers.adaptive(solver) else PlainEngine()
        engine.check(solver)
        super().__init__(
            transform,
            parts,
            event_shape,
            engine=engine,
            solver=solver,
            divergence=divergence,
            levels=levels,
            context_transform=context_transform,
            data_dtype=data_dtype,
            embedding=embedding,
        )
        exact = divergence.exact(self.dim)
        self.divergence: Divergence = Divergence("exact") if exact else replace(divergence, kind="hutchinson")
        if isinstance(engine, PlainEngine):
            for block in self.blocks:
                engine.steps((0.0, block.end_time), solver)
        generator = torch.Generator("cpu").manual_seed(divergence.seed)
        for index, block in enumerate(self.blocks[: 0 if exact else None]):
            shape = (divergence.probes or 1, *block.dynamics.event_shape)
            signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
            self.register_buffer(f"noise_{index}", signs.to(self.reference))

    @property
    def probes(self) -> int:
        """Number of stored probes; 0 where the divergence is exact."""
        return 0 if self.divergence.kind == "exact" else self.divergence.probes or 1

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents of samples, and the log-determinant.

        Args:
            x: ``(batch, *event)``, of the parameters' type and device; for discrete data ``p + u`` in
                ``[0, levels]``, with u uniform noise or ½.
            context: ``(batch, m)`` or ``(m,)``, of the same type and device, for conditional flows.

        Returns:
            ``z`` ``(batch, d)`` and ``log |det ∂z/∂x|`` in nats, ``(batch,)``; −inf outside of the columns' bounds.
            With periodic columns, those of one of the terms that `log_prob` sums up.

        Raises:
            DataError: Wrong shape, type or device, not finite, or outside ``[0, levels]``; a context that is missing
                or superfluous.
            SolverError: The solve did not reach its end, or is not finite.
        """
        passage = self.passage(x, context)
        return passage.z, passage.log_det

    def passage(self, x: Tensor, context: Tensor | None = None) -> Passage:
        """All that `forward` and `log_prob` are taken from; arguments and errors as in `forward`."""
        x, c = self.admit(x, context)
        return self.solve(x, self.draw(), context=c)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Samples ``(batch, *event)`` of latents ``(batch, d)``; for discrete data ``p + u``, whose floor is the pixel.

        `context` as in `forward`.

        Raises:
            DataError: Wrong shape, type or device, or not finite.
            SolverError: The solve did not reach its end, or is not finite.
        """
        z, c = self.admit_latents(z, context)
        return self.restored(self.unsolve(z, context=c), rounded=False)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of samples in nats, ``(batch,)``, in the units of `x`; arguments and errors as in `forward`."""
        return self.passage(x, context).log_prob

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        """Draws `n` samples ``(n, *event)``, as `inverse` gives them; from torch's global generator without a seed.

        For a conditional flow, `n` for a context ``(m,)``, or ``(b, n, *event)`` for each of `b` contexts ``(b, m)``.

        Raises:
            ConfigError: `n` is no whole number, or negative.
            DataError: The context as in `forward`.
        """
        check_context(context, self.context_shape, None)
        z, c, lead = self.base_sample(n, context, seed=seed)
        contexts: Any = c
        if c is not None and len(lead) == 2:
            contexts = c.repeat_interleave(n, 0) if self.embedding is None else Contexts.repeated(c, n, c.shape[1:])
        return self.inverse(z, contexts).reshape(*lead, *self.event_shape)

    def extra_repr(self) -> str:
        given = self.divergence
        trace = given.kind + (f", probes={self.probes}, seed={given.seed}" if self.probes else "")
        return f"event_shape={self.event_shape}, solver={solvers.describe(self.solver)!r}, divergence={trace}"

    def condition(self, context: Any, batch: int) -> Tensor | Contexts | None:
        if isinstance(context, Contexts):
            return (
                self.condition(context.whole(), batch) if self.embedding is None else super().condition(context, batch)
            )
        check_context(context, self.context_shape, batch)  # no lists: what torch makes of them need not fit the module
        return super().condition(context, batch)

    def _embedded(self, context: Tensor | Contexts | None) -> Tensor | None:
        found = super()._embedded(context)
        return found.whole() if isinstance(found, Contexts) else found

    def _admitted(self, x: Any, shape: tuple[int, ...], what: str) -> Tensor:
        if not isinstance(x, Tensor):
            expected = f"expected (batch, {', '.join(map(str, shape))})"
            raise DataError(f"{what} of type {type(x).__name__}: {expected} as a torch tensor")
        return super()._admitted(x, shape, what)

    def _converted(self, x: Tensor, what: str) -> Tensor:
        """`x` as it is: a module takes what its parameters are, and says what is not."""
        reference = self.reference
        known = (reference.dtype, torch.float64 if what == "the context" else self.data_dtype)
        if x.dtype not in known or x.device != reference.device:
            integers = self.levels is not None and what == "input" and not x.is_floating_point()
            raise DataError(
                f"{what} of {x.dtype} on {x.device}, and the module is {reference.dtype} on {reference.device}: "
                f"convert one with .to(...){', and give integers noise in [0, 1)' if integers else ''}"
            )
        return x

    def draw(self, *_: Any, **__: Any) -> Draw:
        """The probes of one pass: those of the buffers, or the unit vectors, whatever else is asked for."""
        blocks = itertools.count()

        def probes(z: Tensor) -> Probes:
            index = next(blocks)
            shared = Probes.unit(z)
            if self.probes:
                shared = Probes(self.get_buffer(f"noise_{index}").unsqueeze(1), 1 / self.probes)
            if isinstance(self.engine, PlainEngine):
                return shared
            return shared._replace(eps=shared.eps.expand(-1, *z.shape))

        return probes

    @staticmethod
    def _shared(draw: Draw, turns: int) -> Draw:
        return draw  # its probes are those of all samples

    def _integrate(self, index: int, z: Tensor, *args: Any) -> Solution:
        if isinstance(self.engine, PlainEngine):
            return super()._integrate(index, z, *args)
        if recording():
            raise unexportable(self.solver)
        try:
            return super()._integrate(index, z, *args)
        except RuntimeError as error:
            if "vmap" in str(error) or "functorch" in str(error):
                raise unexportable(self.solver) from error
            raise


def unexportable(solver: SolverConfig) -> ConfigError:
    """The error for a solver whose steps depend on values, where only a fixed sequence of operations will do."""
    return ConfigError(
        f"{solvers.describe(solver)}: an adaptive solver's steps depend on the values, so it cannot be exported, "
        "compiled, or used under torch.func; use fixed steps, e.g. solver={'name': 'RK4', 'step_size': 0.05}"
    )


@torch.inference_mode(False)
def to_torch(
    flow: Composition,
    solver: SolverLike = None,
    *,
    divergence: DivergenceLike = None,
) -> TorchFlow:
    """A flow as a plain module; see `Flow.to_torch`.

    Args:
        flow: A flow, trained with either engine; its parameters are copied.
        solver: A solver of the PyTorch engine, by its name or with settings: a ``step_size`` (default 0.05), which
            adaptive solvers' formulas take too, or ``rtol`` and perhaps ``atol`` for adaptive steps (by default DP5's).
        divergence: How the divergence is got; default exact up to 64 dimensions.

    Raises:
        ConfigError: Settings that contradict each other or are out of range.
        EngineUnavailableError: The PyTorch engine has no such solver.
        DataError: A parameter of the flow is not finite.
    """
    for name, tensor in flow.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name} is not finite, so this is no density: load an earlier checkpoint, or train again")
    owned = (flow.transform, list(flow.parts), flow.context_transform, flow.embedding)
    transform, parts, context, embedding = copy.deepcopy(owned)
    module = TorchFlow(
        transform,
        parts,
        flow.event_shape,
        flow.levels,
        solver=_solver(solver),
        divergence=Divergence().changed(divergence),
        context_transform=context,
        data_dtype=flow.data_dtype,
        embedding=embedding,
    )
    module.features, module.context_features = flow.features, flow.context_features
    return module.eval()


def _solver(given: SolverLike) -> SolverConfig:
    """The solver that is meant: along a grid, unless there are tolerances."""
    if isinstance(given, SolverConfig):
        return given
    settings = {"name": given} if isinstance(given, str) else dict(given or {})
    if not {"rtol", "atol"} & settings.keys():
        return DEFAULT.changed(settings)
    if "step_size" in settings or "rtol" not in settings:
        raise ConfigError(
            f"solver = {settings!r}: give step_size (fixed steps), or rtol and perhaps atol (adaptive ones)"
        )
    solver = DEFAULT.changed({"name": "DP5", "atol": settings["rtol"], "adaptive": True, **settings})
    if not solvers.adaptive(solver):
        raise ConfigError(f"{solver.name} has no error estimate, so rtol does not apply: give step_size, or use DP5")
    return solver
