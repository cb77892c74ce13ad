"""The composition of a flow: the gate, which says what may enter, and the passage through transform and blocks.

    x --transform--> y --blocks--> z ~ N(0, I)        log p(x) = log N(z; 0, I) + Σ l_block(T) + log |det ∂y/∂x|

Encoding runs the blocks from t = 0 to T, decoding from T to 0. In a conditional flow, ``log p(x | c)``, the context
joins the dynamics of every block, and stays the same along the way. Everything that passes through a flow does it here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pyrnode.config import CHUNK, Divergence, Precision, SolverConfig
from pyrnode.contexts import Contexts, check_context
from pyrnode.data.arrays import check_spread, numbers
from pyrnode.data.frames import Names, columns_of
from pyrnode.devices import upload
from pyrnode.embedding import Embedding
from pyrnode.engines import Engine, Solution
from pyrnode.engines.base import verify
from pyrnode.errors import ConfigError, DataError
from pyrnode.parts import Block, FactorOut, Squeeze, naming
from pyrnode.precision import in_own_precision
from pyrnode.probes import Draw, Probes, SampleNoise, draw, no_probes
from pyrnode.seeds import Noise, plain
from pyrnode.settings import whole
from pyrnode.tracing import holds, recording
from pyrnode.transforms import Chain
from pyrnode.turns import log_sum, means, shared


def base_log_prob(z: Tensor) -> Tensor:
    """``log N(z; 0, I)`` in nats, ``(...)``, of ``(..., d)``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


@dataclass
class Passage:
    """What came of a pass through transform and blocks.

    Attributes:
        y: The samples in the flow's space, where the first block starts, ``(batch, *event)``.
        z: Latent, ``(batch, d)``.
        l: ``Σ l`` over the blocks, nats, ``(batch,)``.
        transform_log_det: Log-determinant of the transform, nats, ``(batch,)``; −inf outside of the columns' bounds.
        blocks: The blocks' solutions, in order.
        turns: Of periodic columns the log-densities ``(turns, batch)`` of all that a sample stands for, whose sum is
            its density; latent and log-determinants are those of the first. `None` without such columns.
    """

    y: Tensor
    z: Tensor
    l: Tensor
    transform_log_det: Tensor
    blocks: list[Solution]
    turns: Tensor | None = None

    @property
    def log_det(self) -> Tensor:
        """``log |det ∂z/∂x|``, nats, ``(batch,)``."""
        return self.l + self.transform_log_det

    @property
    def log_prob(self) -> Tensor:
        """``log p(x)``, nats, ``(batch,)``; of discrete data the density of ``p + u``."""
        if self.turns is not None:
            return log_sum(self.turns)
        return base_log_prob(self.z) + self.l + self.transform_log_det

    def gathered(self, turns: int) -> Passage:
        """The passage of samples, of the passage of all turns of theirs, ``(turns * batch, ...)``."""
        if turns == 1:
            return self
        each = self.log_prob.unflatten(0, (turns, -1))
        y, z, l, log_det = (v[: each.shape[1]] for v in (self.y, self.z, self.l, self.transform_log_det))
        return Passage(y, z, l, log_det, [means(block, each) for block in self.blocks], each)

    def total(self, name: Literal["E", "n", "D", "H"]) -> Tensor:
        """An integral summed over the blocks, ``(batch,)``."""
        return torch.stack([getattr(block, name) for block in self.blocks]).sum(0)

    def verify(self) -> None:
        """Raises `SolverError`, naming block and step, where a solve that has not looked for itself is not finite."""
        verify(self.blocks)

    @property
    def nfe(self) -> float:
        """Evaluations of the dynamics per sample, all blocks together."""
        return self._solves * sum(block.stats.nfe for block in self.blocks)

    @property
    def nfe_backward(self) -> float:
        """The same in the backward pass, once it has run."""
        return self._solves * sum(block.stats.nfe_backward for block in self.blocks)

    @property
    def _solves(self) -> int:
        return 1 if self.turns is None else len(self.turns)


class Composition(nn.Module):
    """Transform and parts, the gate before them, and the passage through them, both ways.

    Args:
        transform: Fixed bijection between the data and the flow's space.
        parts: Blocks, squeezes and factor-outs, in the order of encoding.
        event_shape: Shape of one sample.
        engine: Who integrates the blocks.
        solver: Solver where none is named.
        divergence: How the divergence is got where nothing is said.
        levels: Grey levels of discrete data; `None` for continuous.
        context_transform: What the context goes through before it reaches the blocks.
        data_dtype: Type of continuous data and contexts, in which samples are given back; default the flow's own.
        embedding: The network between contexts and blocks; `None` where a context is a vector that they take as it is.

    Raises:
        ConfigError: The blocks differ in the number of features of their contexts, or from what the embedding gives.
    """

    chunk = CHUNK
    """Samples per solve."""

    features: Names | None = None
    """Names of the columns that it was trained on, if they had some: data frames and files are put in their order."""

    context_features: Names | None = None
    """The same of the context."""

    def __init__(
        self,
        transform: Chain,
        parts: Iterable[nn.Module],
        event_shape: tuple[int, ...],
        *,
        engine: Engine,
        solver: SolverConfig,
        divergence: Divergence,
        levels: int | None = None,
        context_transform: Chain | None = None,
        data_dtype: torch.dtype | None = None,
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__()
        self.data_dtype = data_dtype
        self.transform = transform
        self.context_transform: Chain = context_transform or Chain([])
        self.embedding: Embedding | None = embedding
        self.parts: nn.ModuleList = nn.ModuleList(parts)
        self.event_shape: tuple[int, ...] = tuple(event_shape)
        self.levels = levels
        self.engine = engine
        self.solver = solver
        self.divergence = divergence
        widths = sorted({block.dynamics.context_dim for block in self.blocks})
        if len(widths) != 1:
            raise ConfigError(f"the blocks take contexts of {widths} features: expected the same for all")
        self.context_dim: int = widths[0]
        if embedding is not None and embedding.width != self.context_dim:
            given, taken = embedding.width, self.context_dim
            raise ConfigError(f"the embedding gives {given} features, the dynamics take a context of {taken}")
        self.context_shape: tuple[int, ...] = (self.context_dim,) if embedding is None else embedding.shape
        """Shape of one context, as it is given; ``(0,)`` for an unconditional flow. The blocks have `context_dim`."""

    @property
    def dim(self) -> int:
        """Number of data dimensions ``d``."""
        return math.prod(self.event_shape)

    @property
    def blocks(self) -> list[Block]:
        """The ODE blocks, in the order of encoding."""
        return [part for part in self.parts if isinstance(part, Block)]

    @property
    def closed_trace(self) -> bool:
        """Whether all blocks have the trace of their Jacobian in closed form."""
        return all(block.dynamics.closed_trace for block in self.blocks)

    @property
    def reference(self) -> Tensor:
        """A parameter, whose type and device are those of the flow."""
        return next(self.parts.parameters(), torch.zeros((), dtype=torch.float32))

    # -- the gate ----------------------------------------------------------------------------------------------------

    def admit(self, x: Any, context: Any = None) -> tuple[Tensor, Tensor | Contexts | None]:
        """Samples and their contexts as the passage takes them: checked, and on the flow's device.

        Args:
            x: ``(batch, *event)``. They keep their type until the transform has centred them; integers that are
                continuous data become float64.
            context: ``(batch, *context_shape)``, ``(*context_shape)`` for one that all samples share, or `Contexts` of
                which samples share some; `None` for an unconditional flow.

        Returns:
            Samples, and what `condition` makes of the contexts.

        Raises:
            DataError: A wrong shape, or values that are not finite; a context that is missing or superfluous.
        """
        x = self._admitted(x, self.event_shape, "input")
        return x, self.condition(context, x.shape[0])

    def admit_latents(self, z: Any, context: Any = None) -> tuple[Tensor, Tensor | Contexts | None]:
        """`admit` of latents ``(batch, d)``."""
        z = self._admitted(z, (self.dim,), "latents").to(self.reference.dtype)
        return z, self.condition(context, z.shape[0])

    def context_tensor(self, context: Any) -> Tensor | None:
        """A context as its user gives it, as a tensor with the features in their order; `None` stays.

        Raises:
            DataError: It does not consist of real numbers, or has other columns.
        """
        named = "the context"
        return None if context is None else numbers(columns_of(context, self.context_features, named), named)

    def condition(self, context: Any, batch: int) -> Tensor | Contexts | None:
        """The contexts of a batch as the passage takes them: checked, one for each; vectors standardised.

        An embedding comes after that, within `solve` and `unsolve`: what is kept here does not age while it is trained.
        """
        if isinstance(context, Contexts):
            return replace(context, values=cast(Tensor, self.condition(context.values, len(context.values))))
        context, shape = self.context_tensor(context), self.context_shape
        check_context(context, shape, batch)
        if context is None:
            return None
        if not holds(torch.isfinite(context).all()):
            raise DataError("the context has NaN or infinite values")
        if self.embedding is not None and context.ndim == len(shape):
            rows = torch.zeros(batch, dtype=torch.int64, device=self.reference.device)
            return Contexts(self._standardised(context[None]), rows)
        return self._standardised(context.expand(batch, *shape))

    def _standardised(self, context: Tensor) -> Tensor:
        c, _ = self.context_transform(self._converted(context, "the context"))
        return cast(Tensor, c.to(self.reference.dtype))

    def _embedded(self, context: Tensor | Contexts | None) -> Tensor | Contexts | None:
        """The contexts of `condition` as the blocks take them, ``(batch, m)``; differentiable."""
        if self.embedding is None or context is None:
            return context
        if isinstance(context, Contexts):
            return replace(context, values=self.embedding(context.values))
        return cast(Tensor, self.embedding(context))

    def _admitted(self, x: Any, shape: tuple[int, ...], what: str) -> Tensor:
        """`x` as a tensor of samples of that shape, checked and converted."""
        x = numbers(columns_of(x, self.features, what) if what == "input" else x, what)
        if tuple(x.shape[1:]) != shape or x.ndim != len(shape) + 1:
            one = "; of one sample, pass x[None]" if tuple(x.shape) == shape else ""
            raise DataError(f"{what} of shape {tuple(x.shape)}: expected (batch, {', '.join(map(str, shape))}){one}")
        if not holds(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise DataError(f"{what} has NaN or infinite values, first in sample {bad}")
        if what == "input":
            if self.levels is not None:
                check_spread(x, self.levels, strict=False)
            self.transform.check(x)
        return self._converted(x, what)

    def _converted(self, x: Tensor, what: str) -> Tensor:
        """`x` on the flow's device, in the finer of its type and the flow's; integers as float64, unless discrete."""
        dtype = torch.promote_types(x.dtype, self.reference.dtype)
        if not x.is_floating_point():
            dtype = x.dtype if self.levels is not None and what == "input" else torch.float64
        if what == "the context" and len(self.context_shape) > 1:
            dtype = self.reference.dtype  # which nothing centres
        return upload(x, self.reference.device).to(dtype)

    # -- the passage -------------------------------------------------------------------------------------------------

    def draw(self, divergence: Divergence, source: Noise | SampleNoise, *, noise: str = "gaussian") -> Draw:
        """How the divergence is probed (`pyrnode.probes.draw`)."""
        return draw(divergence, self.dim, source, noise=noise)

    _shared = staticmethod(shared)

    @in_own_precision
    def solve(
        self,
        x: Tensor,
        draw: Draw = no_probes,
        solver: SolverConfig | None = None,
        *,
        context: Tensor | Contexts | None = None,
        generator: Noise | None = None,
        total_derivative: bool = False,
        verified: bool = True,
        hjb: bool = False,
        precision: Precision = "ieee",
    ) -> Passage:
        """Passes samples through transform and blocks.

        Args:
            x: ``(batch, *event)``, as `admit` gives them.
            draw: Gives the probes for each block's start state; by default there are none, and the state is all.
            solver: Solver; default `self.solver`.
            context: What `condition` gives.
            generator: Where the noise that dequantises integers comes from.
            total_derivative: Also integrate D.
            verified: False leaves it to the caller to look whether solves of fixed steps are finite, which waits for
                a device (`Passage.verify`).
            hjb: Also integrate H; of potentials alone.
            precision: In which numbers, whatever the solver's settings say: only training asks for coarser ones.

        Raises:
            ConfigError: The dynamics are no potential, and H is asked for.
            DataError: Values outside the grey levels.
            SolverError: A block's solve failed; the message names it.
        """
        solver, context = (solver or self.solver).computing_in(precision), self._embedded(context)
        if (turns := self.transform.turns) > 1:
            draw, context = self._shared(draw, turns), None if context is None else context.repeat(turns, 1)
        y, log_det = self._transformed(self.transform.unwrapped(x), generator)
        z, l, outs, solutions = y, y.new_zeros(y.shape[0]), list[Tensor](), list[Solution]()
        for part in self.parts:
            if isinstance(part, Block):
                span = (0.0, part.end_time)
                solution = self._integrate(len(solutions), z, draw(z), span, solver, context, total_derivative, hjb)
                solutions.append(solution)
                z, l = solution.z, l + solution.l
            elif isinstance(part, FactorOut):
                z, out = part(z)
                outs.append(out)
            else:
                z = part(z)
        if verified:
            verify(solutions)
        return Passage(y, torch.cat([out.flatten(1) for out in (*outs, z)], 1), l, log_det, solutions).gathered(turns)

    def transformed(self, x: Tensor, generator: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Samples in the flow's space and type, ``(batch, *state)``, and the transform's log-determinant, in nats."""
        return self._transformed(self.transform.unwrapped(x)[: x.shape[0]], generator)

    def _transformed(self, x: Tensor, generator: Noise | None) -> tuple[Tensor, Tensor]:
        y, log_det = self.transform(x, generator)
        return y.to(self.reference.dtype), log_det.to(self.reference.dtype)

    def restored(self, y: Tensor, *, rounded: bool) -> Tensor:
        """The inverse of `transformed`, in the type of the data.

        Args:
            y: ``(batch, *state)`` in the flow's space.
            rounded: Discrete data as integers; else as ``p + u``.
        """
        x = self.transform.inverse(y) if rounded else self.transform.continuous(y)
        return self.transform.contained(x.to(self.data_dtype or y.dtype)) if x.is_floating_point() else x

    @in_own_precision
    def unsolve(
        self,
        z: Tensor,
        solver: SolverConfig | None = None,
        *,
        context: Tensor | Contexts | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The way back: of latents ``(batch, d)`` the ``y`` of `solve`. `tick` is called after each block."""
        solver, shapes = (solver or self.solver).computing_in("ieee"), self._latent_shapes()
        context = self._embedded(context)
        sizes = [math.prod(shape) for shape in shapes]
        outs: list[Tensor] = [p.unflatten(1, shape) for p, shape in zip(z.split(sizes, 1), shapes, strict=True)]
        state, index, solutions = outs.pop(), len(self.blocks), list[Solution]()
        for part in reversed(self.parts):
            if isinstance(part, Block):
                index -= 1
                solutions.append(self._integrate(index, state, None, (part.end_time, 0.0), solver, context))
                state = solutions[-1].z
                tick()
            elif isinstance(part, FactorOut):
                state = part.inverse(state, outs.pop())
            else:
                assert isinstance(part, Squeeze)
                state = part.inverse(state)
        verify(solutions)
        return state

    def _integrate(
        self,
        index: int,
        z: Tensor,
        probes: Probes | None,
        span: tuple[float, float],
        solver: SolverConfig,
        context: Tensor | Contexts | None,
        total_derivative: bool = False,
        hjb: bool = False,
    ) -> Solution:
        """One block."""
        dynamics = self.blocks[index].dynamics
        with naming(index, dynamics.event_shape):
            solution = self.engine.integrate(
                dynamics, z, probes, span, solver, context=context, total_derivative=total_derivative, hjb=hjb
            )
        if solution.verify is not None:
            solution.verify = naming(index, dynamics.event_shape)(solution.verify)
        return solution

    def _latent_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what is factored out, in order, and of the last state."""
        shape, shapes = self.transform.shape(self.event_shape), list[tuple[int, ...]]()
        for part in self.parts:
            if isinstance(part, Squeeze | FactorOut):
                shape = part.shape(shape)
            if isinstance(part, FactorOut):
                shapes.append(shape)
        return [*shapes, shape]

    def base_sample(
        self, n: int, context: Tensor | None, *, seed: int | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Draws from the base what `n` samples are decoded from.

        Args:
            n: How many; of a conditional flow, how many for each context.
            context: ``(*context_shape)`` or ``(b, *context_shape)``, for conditional flows.
            seed: Seed; `None` draws from torch's global generator.
            temperature: Standard deviation of the base.

        Returns:
            Latents ``(n, d)`` or ``(b n, d)``, the context as a tensor, and the shape ``(n,)`` or ``(b, n)``.

        Raises:
            ConfigError: `n` is no whole number, or negative.
            DataError: The context is missing, superfluous or of the wrong shape.
        """
        if not recording():
            n = whole(n, "n", 0, "number of samples")
            if n * self.dim >= 2**59:
                raise ConfigError(f"n = {n}: more samples than any memory holds")
        context = self.context_tensor(context)
        check_context(context, self.context_shape, None)
        lead = (n,) if context is None or context.ndim == len(self.context_shape) else (len(context), n)
        dtype, shape = self.reference.dtype, (*lead, self.dim)
        if seed is None:  # no generator argument: where operations are recorded, n is a symbol
            z = torch.randn(*shape, dtype=dtype, device="cpu")
        else:
            generator = torch.Generator().manual_seed(plain(seed))
            z = torch.randn(*shape, dtype=dtype, generator=generator, device="cpu")
        return z.flatten(0, -2).to(self.reference.device) * temperature, context, lead
