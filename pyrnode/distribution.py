"""A learned flow among `torch.distributions`: as a `Distribution`, and as a `Transform`.

>>> import pyrnode, torch
>>> flow = pyrnode.Flow.build(pyrnode.Config(), (2,))
>>> density = FlowDistribution(flow)
>>> density.log_prob(density.rsample((3,))).shape
torch.Size([3])
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints, register_kl

from pyrnode.bounded import Bounded
from pyrnode.composition import Composition
from pyrnode.config import DivergenceLike, SolverLike
from pyrnode.contexts import Contexts, check_context, chunked
from pyrnode.errors import ConfigError, DataError
from pyrnode.export import TorchFlow
from pyrnode.probes import SampleNoise
from pyrnode.settings import whole

KL_SAMPLES = 4096
"""Samples from which `torch.distributions.kl_divergence` estimates where a flow takes part."""

_KL_SEED = 0


class _Encoded(NamedTuple):
    """What encoding gives of values ``(..., *event)``: ``(..., d)``, and nats ``(...)``."""

    z: Tensor
    log_det: Tensor
    log_prob: Tensor


class Between(constraints.Constraint):
    """Vectors whose every column is strictly between its bounds; of one without bounds every number.

    Args:
        bounds: The transform of these columns.
    """

    event_dim = 1

    def __init__(self, bounds: Bounded) -> None:
        self.low, self.high = bounds.low, bounds.high
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which of ``(..., d)`` are, ``(...)``."""
        wide = value.double()
        return ((wide > self.low.to(value.device)) & (wide < self.high.to(value.device))).all(-1)

    def __repr__(self) -> str:
        return f"Between({self.low.tolist()}, {self.high.tolist()})"


class _Bijection:
    """Both directions of a flow, differentiable, on continuous values: for discrete data ``p + u``."""

    def __init__(
        self, flow: Composition, context: Tensor | None, solver: SolverLike, divergence: DivergenceLike
    ) -> None:
        if not isinstance(flow, Composition):
            raise ConfigError(f"flow = {type(flow).__name__}: expected a pyrnode flow, or what its to_torch gives")
        if isinstance(flow, TorchFlow) and (solver, divergence) != (None, None):
            raise ConfigError("a module of to_torch has its own solver and divergence: give them to to_torch")
        self.flow = flow
        self.solver, self.divergence = flow.solver.changed(solver), flow.divergence.changed(divergence)
        self.event_shape = torch.Size(flow.event_shape)
        self.dim = flow.dim
        context = flow.context_tensor(context)
        shape = flow.context_shape
        many = context is not None and context.ndim > len(shape) + 1
        check_context(context.flatten(0, -1 - len(shape)) if context is not None and many else context, shape, None)
        self.context = None if context is None else context.to(self.like.device)
        self.batch_shape = torch.Size() if context is None else context.shape[: context.ndim - len(shape)]

    @property
    def like(self) -> Tensor:
        """A tensor of the flow's type and device."""
        return self.flow.reference

    def encode(self, x: Tensor) -> _Encoded:
        """Latents of values ``(..., *event)``, broadcast with the contexts.

        Raises:
            DataError: Not a floating-point tensor, or of another shape.
        """
        x, lead = self.flat(x, self.event_shape, "values")
        if not x.is_floating_point():
            raise DataError(f"values of {x.dtype}: expected floating-point values, for discrete data p + u")
        parts = [self._encode(*pair) for pair in chunked(x, self._contexts(lead), self.flow.chunk)]
        if not parts:
            return _Encoded(self.like.new_zeros(*lead, self.dim), *[self.like.new_zeros(lead)] * 2)
        z, log_det, log_prob = (torch.cat(values) for values in zip(*parts, strict=True))
        return _Encoded(z.reshape(*lead, self.dim), log_det.reshape(lead), log_prob.reshape(lead))

    def _encode(self, x: Tensor, context: Contexts | None) -> _Encoded:
        x, c = self.flow.admit(x, context)
        noise = SampleNoise(x, self.divergence.seed, self.like.dtype)  # that of Flow.log_prob
        passage = self.flow.solve(x, self.flow.draw(self.divergence, noise), self.solver, context=c)
        return _Encoded(passage.z, passage.log_det, passage.log_prob)

    def decode(self, z: Tensor) -> Tensor:
        """``x`` ``(..., *event)`` of ``z`` ``(..., d)``, broadcast with the contexts; `DataError` for another shape."""
        z, lead = self.flat(z, torch.Size([self.dim]), "latents")
        if not len(z):
            return self.like.new_zeros(*lead, *self.event_shape)
        x = torch.cat([self._decode(*pair) for pair in chunked(z, self._contexts(lead), self.flow.chunk)])
        return x.reshape(*lead, *self.event_shape)

    def _decode(self, z: Tensor, context: Contexts | None) -> Tensor:
        z, c = self.flow.admit_latents(z, context)
        return self.flow.restored(self.flow.unsolve(z, self.solver, context=c), rounded=False)

    def _contexts(self, lead: torch.Size) -> Contexts | None:
        """The contexts of values ``(*lead, ...)``, which are flattened."""
        return None if self.context is None else Contexts.of(self.context, lead, self.flow.context_shape)

    def support(self) -> constraints.Constraint:
        """The values that have a density."""
        levels, bounds = self.flow.levels, [t for t in self.flow.transform.transforms if isinstance(t, Bounded)]
        if bounds:
            return Between(bounds[0])
        values = constraints.real if levels is None else constraints.interval(0.0, float(levels))
        return constraints.independent(values, len(self.event_shape))

    def flat(self, x: Tensor, shape: torch.Size, what: str) -> tuple[Tensor, torch.Size]:
        """``(..., *shape)``, broadcast with the contexts, as ``(n, *shape)``; and the shape that was in front."""
        if not isinstance(x, Tensor) or x.shape[max(0, x.ndim - len(shape)) :] != shape:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise DataError(f"{what} of shape {given}: expected (..., {', '.join(map(str, shape))})")
        lead = x.shape[: x.ndim - len(shape)]
        try:
            lead = torch.broadcast_shapes(lead, self.batch_shape)
        except RuntimeError:
            message = f"{what} of shape {tuple(x.shape)} do not go with contexts {tuple(self.batch_shape)}"
            raise DataError(f"{message}: expected (..., {', '.join(map(str, self.batch_shape + shape))})") from None
        return x.expand(*lead, *shape).reshape(-1, *shape), lead


class FlowDistribution(Distribution):
    """A flow as a distribution: `sample`, `rsample` with gradients for the flow's parameters, `log_prob`, `expand`.

    It computes with the flow that it is given, and its engine: what trains the flow later changes the distribution.
    For discrete data it is the density of ``p + u`` in ``[0, levels]``, and samples are such values. Noise comes
    from torch's global generator, as for every distribution of torch.

    Args:
        flow: A flow, or what its `to_torch` gives.
        context: ``(*batch_shape, m)``, for conditional flows: a batch of densities, one for each context.
        solver: Solver; default the flow's accurate one.
        divergence: How the divergence is got, as in `Flow.log_prob`; default that of the flow.
        validate_args: As in `torch.distributions.Distribution`; what torch is set to is left alone.

    Raises:
        ConfigError: Unknown divergence, or settings for a module that has its own.
        DataError: The context is missing, superfluous, or of the wrong width.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch's own declaration)
    has_rsample = True

    def __init__(
        self,
        flow: Composition,
        context: Tensor | None = None,
        *,
        solver: SolverLike = None,
        divergence: DivergenceLike = None,
        validate_args: bool | None = None,
    ) -> None:
        self._bijection = _Bijection(flow, context, solver, divergence)
        shapes = self._bijection.batch_shape, self._bijection.event_shape
        super().__init__(*shapes, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real values of the event's shape; for discrete data those in ``[0, levels]``.

        Of columns with bounds those strictly between them (`Between`). A periodic column has all, as
        `torch.distributions.VonMises` has: values that differ by a period are the same one.
        """
        return self._bijection.support()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same density, or densities, independently, for every entry of a batch."""
        new: Self = self._get_checked_instance(FlowDistribution, _instance)  # type: ignore[no-untyped-call]
        new._bijection = self._bijection
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Samples ``(*sample_shape, *batch_shape, *event_shape)``, differentiable in the flow's parameters.

        Raises:
            SolverError: A solve failed.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        lead, like = shape[: len(shape) - len(self.event_shape)], self._bijection.like
        return self._bijection.decode(torch.randn(*lead, self._bijection.dim, dtype=like.dtype, device=like.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of shape ``(*sample_shape, *batch_shape)``, differentiable.

        Raises:
            DataError: `value` has the wrong shape or is not finite.
            SolverError: A solve failed.
        """
        self._bijection.flat(value, self.event_shape, "values")  # the shape, in our words
        if self._validate_args and value.numel():  # torch's own check fails on no values
            self._validate_sample(value)
        log_prob = self._bijection.encode(value).log_prob
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def __repr__(self) -> str:
        return f"FlowDistribution(event_shape={tuple(self.event_shape)}, batch_shape={tuple(self.batch_shape)})"


class FlowTransform(Transform):
    """A flow as a bijection from latents ``(..., d)`` to data ``(..., *event)``.

    ``TransformedDistribution(Independent(Normal(zeros(d), ones(d)), 1), FlowTransform(flow))`` is the flow's density,
    and any other base makes another one. `inv` goes from data to latents. ``cache_size=1`` keeps the last pair of
    values and its log-determinant, which saves a solve; as with torch's own transforms, it does not notice that
    parameters have changed, so leave it out in training.

    Args:
        flow: A flow, or what its `to_torch` gives.
        context: ``(..., m)``, for conditional flows; values are broadcast with it.
        solver: Solver; default the flow's accurate one.
        divergence: How the divergence is got, as in `Flow.log_prob`; default that of the flow.
        cache_size: 0 or 1.

    Raises:
        ConfigError: Unknown divergence, or settings for a module that has its own; a column is periodic.
        DataError: The context is missing, superfluous, or of the wrong width.
    """

    bijective = True
    domain: constraints.Constraint = constraints.independent(constraints.real, 1)

    def __init__(
        self,
        flow: Composition,
        context: Tensor | None = None,
        *,
        solver: SolverLike = None,
        divergence: DivergenceLike = None,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self._bijection = _Bijection(flow, context, solver, divergence)
        if flow.transform.turns > 1:
            raise ConfigError(
                "a flow with periodic columns is no bijection: its density is a sum over all that a value stands for; "
                "take flow.distribution()"
            )
        self.codomain: constraints.Constraint = self._bijection.support()
        self._cached_log_det: tuple[Tensor, Tensor] | None = None

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with or without a cache."""
        if cache_size == self._cache_size:
            return self
        new = copy.copy(self)
        new._cache_size, new._cached_log_det, new._inv = cache_size, None, None
        new._cached_x_y = None, None
        return new

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the data for latents of a shape."""
        return self._shape(shape, torch.Size([self._bijection.dim]), self._bijection.event_shape)

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the latents for data of a shape."""
        return self._shape(shape, self._bijection.event_shape, torch.Size([self._bijection.dim]))

    def _shape(self, shape: Any, old: torch.Size, new: torch.Size) -> torch.Size:
        shape = torch.Size(shape)
        if shape[max(0, len(shape) - len(old)) :] != old:
            raise DataError(f"shape {tuple(shape)}: expected (..., {', '.join(map(str, old))})")
        lead = torch.broadcast_shapes(shape[: len(shape) - len(old)], self._bijection.batch_shape)
        return torch.Size((*lead, *new))

    def _call(self, x: Tensor) -> Tensor:
        return self._bijection.decode(x)

    def _inverse(self, y: Tensor) -> Tensor:
        encoded = self._bijection.encode(y)
        if self._cache_size:
            self._cached_log_det = (y, encoded.log_det)
        return encoded.z

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det ∂y/∂x|`` in nats for latents `x` and their data `y`, shape ``(...)``: found by encoding `y`."""
        if self._cached_log_det is not None and self._cached_log_det[0] is y:
            return -self._cached_log_det[1]
        return -self._bijection.encode(y).log_det

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowTransform) and other._bijection is self._bijection

    __hash__ = Transform.__hash__


def kl_divergence(
    p: Distribution, q: Distribution, *, samples: int = KL_SAMPLES, seed: int = _KL_SEED
) -> tuple[Tensor, Tensor]:
    """Monte-Carlo estimate of ``KL(p ‖ q) = E_p[log p − log q]``.

    `torch.distributions.kl_divergence` gives the first of the two, with the default `samples` and `seed`, wherever a
    `FlowDistribution` takes part. The estimate is differentiable, through the samples too where `p` has `rsample`.

    Args:
        p: Distribution to draw from.
        q: Distribution to compare with, of the same event shape.
        samples: How many samples to draw.
        seed: Seed of torch's generators while they are drawn; their state is put back afterwards.

    Returns:
        The estimate and its standard error in nats, each ``(*batch_shape)``.

    Raises:
        ConfigError: The event shapes differ, or `samples` is less than two.
    """
    if p.event_shape != q.event_shape:
        raise ConfigError(f"events of shape {tuple(p.event_shape)} and {tuple(q.event_shape)} cannot be compared")
    samples, seed = whole(samples, "samples", 2), whole(seed, "seed", None)
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        x = p.rsample((samples,)) if p.has_rsample else p.sample((samples,))
    terms = p.log_prob(x) - q.log_prob(x)
    return terms.mean(0), terms.detach().std(0) / math.sqrt(samples)


def _kl(p: Distribution, q: Distribution) -> Tensor:
    return kl_divergence(p, q)[0]


for _pair in ((FlowDistribution, FlowDistribution), (FlowDistribution, Distribution), (Distribution, FlowDistribution)):
    register_kl(*_pair)(_kl)
