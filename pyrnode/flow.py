"""The flow: a density with `log_prob` and `sample`, composed of ODE blocks between the data and a standard normal.

It is the face of a `Composition`: what it adds is the settings of use, the same for all that computes with it, and the
pieces in which large batches go through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from pyrnode import bounded, checkpoint, engines, export, seeds, uncertainty
from pyrnode.composition import Composition
from pyrnode.config import Config, DivergenceLike, SolverConfig, SolverLike
from pyrnode.contexts import Contexts, chunked
from pyrnode.data.arrays import check_spread
from pyrnode.data.frames import Names
from pyrnode.devices import resolve_device
from pyrnode.distribution import FlowDistribution
from pyrnode.dynamics import Dynamics
from pyrnode.edges import Edges
from pyrnode.embedding import Embedding, Given, Recipe
from pyrnode.errors import ConfigError, DataError, SolverError
from pyrnode.export import TorchFlow
from pyrnode.parts import check_memory, multi_scale, network
from pyrnode.probes import SampleNoise
from pyrnode.progress import SECONDS, parts, progress_bar
from pyrnode.radial import Radial
from pyrnode.transforms import Chain, Dequantize, Flatten, Logit, Standardize, Transform, Whiten


class Flow(Composition):
    """A density with `log_prob` and `sample`, given by a chain of neural ODEs.

    Made by `pyrnode.train`, `pyrnode.load` or `Flow.build`. `log_prob`, `encode`, `decode` and `sample` use `solver`
    and `divergence`, those of the evaluation settings, whatever the flow was trained with; so do `pyrnode.evaluate`,
    scores, the estimator and the distribution.

    Args:
        transform: Fixed bijection between the data and the flow's space.
        parts: Blocks, squeezes and factor-outs, in the order of encoding.
        event_shape: Shape of one sample.
        config: The settings that it was built from.
        levels: Grey levels of discrete data; `None` for continuous.
        context_transform: What the context goes through before it reaches the blocks.
        data_dtype: Type of continuous data and contexts, in which samples are given back; default the flow's own.
        embedding: The network between contexts and blocks.

    Raises:
        ConfigError: The blocks differ in the number of features of their contexts, or from what the embedding gives.
    """

    def __init__(
        self,
        transform: Chain,
        parts: list[nn.Module],
        event_shape: tuple[int, ...],
        config: Config,
        levels: int | None = None,
        context_transform: Chain | None = None,
        data_dtype: torch.dtype | None = None,
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__(
            transform,
            parts,
            event_shape,
            engine=engines.create(config.engine, config.device),
            solver=config.evaluation.solver,
            divergence=config.evaluation.divergence,
            levels=levels,
            context_transform=context_transform,
            data_dtype=data_dtype,
            embedding=embedding,
        )
        self.config = config
        self.chunk: int = config.evaluation.chunk

    @classmethod
    @torch.inference_mode(False)  # in which the parameters could never be trained
    def build(
        cls,
        config: Config,
        event_shape: tuple[int, ...],
        *,
        levels: int | None = None,
        transform: Chain | None = None,
        context_dim: int = 0,
        context_transform: Chain | None = None,
        data_dtype: torch.dtype | None = None,
        features: Names | None = None,
        context_features: Names | None = None,
        dynamics: Callable[[tuple[int, ...]], Dynamics] | None = None,
        embedding: Given | Recipe | None = None,
        context_shape: tuple[int, ...] | None = None,
    ) -> Flow:
        """An untrained flow, initialised from ``config.seed``: the identity between `transform` and the normal.

        Args:
            config: Settings; the network, blocks, scales and transform are read from ``config.flow`` and
                ``config.columns``.
            event_shape: ``(d,)`` for vectors, ``(C, H, W)`` for images.
            levels: Grey levels of discrete data.
            transform: Fixed bijection between the data and the flow's space; default as ``config.flow`` says, with
                mean 0, standard deviation 1 and no rotation where it standardises (`Standardize.fit` and `Whiten.fit`
                take them from data).
            context_dim: Number of features ``m`` of the context; 0 for an unconditional flow. With an embedding that of
                what it gives; 0 to find it by a trial.
            context_transform: The same for contexts ``(n, m)``.
            data_dtype: Type of continuous data and contexts, in which samples are given back; default ``config.dtype``.
            features: Names of the columns of vectors: a data frame or file is put in their order, or refused.
            context_features: The same for contexts.
            dynamics: Makes the dynamics of a block from its event shape, and may draw from torch's global generator,
                which is seeded for it and put back; default as ``config.flow.network`` says.
            embedding: As in `pyrnode.train`: a network from contexts of any shape to the vectors that the blocks take.
            context_shape: Shape of one context, for an embedding.

        Raises:
            ConfigError: The settings do not fit the shape, the embedding does not, or the flow does not fit the
                machine's memory.
        """
        dtype = getattr(torch, config.dtype)
        shape = config.flow.state_shape(event_shape)
        between: Embedding | None = None
        given: tuple[int, ...] = (context_dim,)
        if embedding is not None:
            if not context_shape or min(context_shape) < 1:
                raise ConfigError(f"embedding: it needs contexts; context_shape = {context_shape}, the shape of one")
            recipe = embedding if isinstance(embedding, Recipe) else Recipe.of(embedding)
            given = tuple(context_shape)
            between = Embedding.build(recipe, given, dtype, config.seed, width=context_dim or None)
            context_dim = between.width
        if dynamics is None:
            on_meta = torch.get_default_device().type == "meta"  # whose tensors have no values, and take no memory
            if not on_meta:
                check_memory(config, shape, context_dim, copies=1)
            generator = None if on_meta else torch.Generator("cpu").manual_seed(config.seed)
            parts = list(multi_scale(config, shape, network(config, shape, context_dim, generator)))
        else:
            with seeds.seeded(config.seed):
                parts = list(multi_scale(config, shape, dynamics))
        if transform is None:
            begin = outset(config, event_shape, levels, features, context_features)
            transform = Chain([*begin, *_unfitted(config, event_shape, levels)])
        if context_transform is None:
            standardised = context_dim and config.flow.scales_features and len(given) == 1
            context_transform = Chain([Standardize.identity(given)] if standardised else [])
        flow = cls(transform, parts, event_shape, config, levels, context_transform, data_dtype, between)
        if flow.context_dim != context_dim:
            raise ConfigError(f"the dynamics take a context of {flow.context_dim} features, the data has {context_dim}")
        for names, shape in ((features, flow.event_shape), (context_features, given)):
            if names is not None and (len(names),) != shape:
                raise ConfigError(f"{len(names)} names of features for values of shape {shape}: {names}")
        flow.features, flow.context_features = features, context_features
        return flow.to(dtype)

    def _pieces(self, x: Any, context: Any, seed: int) -> Iterator[tuple[Tensor, SampleNoise, Tensor | None]]:
        """Samples in pieces, integers dequantised; the noise of each piece, and its contexts."""
        x, context = self.admit(x, context)
        if self.levels is not None:
            check_spread(x, self.levels, strict=True)
        for piece, c in chunked(x, context, self.chunk):
            noise = SampleNoise(piece, seed, self.reference.dtype)
            yield noise.spread(piece), noise, c

    @contextmanager
    def _near_enough(self, x: Tensor, before: int) -> Iterator[None]:
        """Where a solve of samples fails that are infinite in the flow's space: a `DataError`, which names the first.

        Args:
            x: ``(batch, *event)``, dequantised.
            before: Samples before these.
        """
        try:
            yield
        except SolverError as error:
            far = (~torch.isfinite(self.transformed(x)[0])).flatten(1).any(1)
            if not bool(far.any()):
                raise
            row = int(far.nonzero()[0])
            raise DataError(
                f"sample {before + row} holds {float(x[row].abs().max()):g}, which is infinite in {self.config.dtype} "
                "where the flow computes: leave it out; its density is zero, as far as numbers go"
            ) from error

    @overload
    def log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        solver: SolverLike = None,
        divergence: DivergenceLike = None,
        return_error: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        solver: SolverLike = None,
        divergence: DivergenceLike = None,
        return_error: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        solver: SolverLike = None,
        divergence: DivergenceLike = None,
        return_error: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-density of samples, differentiable.

        Noise belongs to the sample: it depends on its values and on the seed, not on the rest of the batch.

        Args:
            x: ``(batch, *event)``: an array, a tensor, or a data frame, whose columns are found by their names where
                the flow was trained on names. For discrete data integers, to which dequantisation noise is added, or
                floating-point values ``p + u`` in ``[0, levels]``.
            context: ``(batch, m)``, or ``(m,)`` for one that all samples share; for conditional flows. With an
                embedding ``m`` stands for the shape of a context (`context_shape`), here and elsewhere.
            solver: Solver; default the accurate one. A name or a mapping changes that one's settings.
            divergence: How the divergence is got, e.g. ``"exact"`` or ``Divergence("hutchinson", probes=4, seed=1)``;
                default that of the evaluation settings. Its seed seeds probes and dequantisation: the same call gives
                the same numbers.
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
        solver, divergence = self.solver.changed(solver), self.divergence.changed(divergence)
        if return_error:
            return uncertainty.log_prob_with_error(self, x, context, solver=solver, divergence=divergence)
        parts = [self.reference.new_zeros(0)]
        for piece, noise, c in self._pieces(x, context, divergence.seed):
            with self._near_enough(piece, sum(map(len, parts))):
                parts.append(self.solve(piece, self.draw(divergence, noise), solver, context=c).log_prob)
        return torch.cat(parts)

    def encode(self, x: Any, context: Any = None, *, solver: SolverLike = None, seed: int | None = None) -> Tensor:
        """Latents ``(batch, d)`` of samples ``(batch, *event)``; arguments and errors as in `log_prob`.

        Args:
            x: ``(batch, *event)``. What is on its columns' bounds or beyond them has no latent: a `DataError`.
            context: As in `log_prob`.
            solver: As in `log_prob`.
            seed: Seed of the dequantisation; default that of the evaluation settings' divergence.
        """
        solver, seed = self.solver.changed(solver), self.divergence.seed if seed is None else seed
        parts = [self.reference.new_zeros(0, self.dim)]
        for piece, _, c in self._pieces(x, context, seed):
            with self._near_enough(piece, sum(map(len, parts))):
                passage = self.solve(piece, solver=solver, context=c)
            if self.config.columns.bounds and not bool(torch.isfinite(passage.transform_log_det).all()):
                row = sum(map(len, parts)) + int((~torch.isfinite(passage.transform_log_det)).nonzero()[0])
                raise DataError(f"sample {row} is on a bound or beyond it (config.columns.bounds): it has no latent")
            parts.append(passage.z)
        return torch.cat(parts)

    def decode(self, z: Any, context: Any = None, *, solver: SolverLike = None) -> Tensor:
        """Samples ``(batch, *event)`` of latents ``(batch, d)``; integers for discrete data.

        Raises:
            DataError: `z` has the wrong shape or is not finite; `context` as in `log_prob`.
            SolverError: A solve failed.
        """
        solver = self.solver.changed(solver)
        z, contexts = self.admit_latents(z, context)
        return self._decoded(z, contexts, solver)

    def _decoded(self, z: Tensor, context: Tensor | Contexts | None, solver: SolverConfig, bar: Any = None) -> Tensor:
        """What `decode` gives of admitted latents; counts them on the bar, if there is one."""
        pieces = chunked(z, context, self.chunk) if len(z) else [(z, context)]
        made = list[Tensor]()
        for piece, c in pieces:
            tick = parts(bar, len(piece), len(self.blocks))
            made.append(self.restored(self.unsolve(piece, solver, context=c, tick=tick), rounded=True))
        return torch.cat(made)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Any = None,
        *,
        solver: SolverLike = None,
        seed: int | None = None,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> Tensor:
        """Draws samples.

        Args:
            n: How many, 0 too; of a conditional flow, how many for each context.
            context: ``(m,)`` or ``(b, m)``, for conditional flows.
            solver: Solver; default the accurate one.
            seed: Seed; `None` draws from torch's global generator.
            temperature: Standard deviation of the base.
            progress: Show a progress bar, if it takes more than two seconds.

        Returns:
            ``(n, *event)``, or ``(b, n, *event)`` for b contexts; integers for discrete data.

        Raises:
            ConfigError: `n` is no whole number or negative, or `temperature` is out of range.
            DataError: `context` as in `log_prob`.
            SolverError: A solve failed.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"temperature = {temperature!r}: expected a finite number, at least 0")
        z, contexts, lead = self.base_sample(n, context, seed=seed, temperature=temperature)
        solver = self.solver.changed(solver)
        z, shared = self.admit_latents(
            z, None if contexts is None else Contexts.repeated(contexts, n, self.context_shape)
        )
        with progress_bar(len(z), "sample", unit="sample", show=progress, delay=SECONDS) as bar:
            return self._decoded(z, shared, solver, bar).reshape(*lead, *self.event_shape)

    def to_torch(self, solver: SolverLike = None, *, divergence: DivergenceLike = None) -> TorchFlow:
        """The density as a plain PyTorch module with its own copy of the parameters, which needs no engine.

        Args:
            solver: A solver of the PyTorch engine, e.g. ``"Heun"`` or ``{"name": "RK4", "step_size": 0.1}``; default
                RK4 with step 0.05, whose operations torch can trace. Tolerances (``{"rtol": 1e-6}``) make an adaptive
                module, which cannot be exported.
            divergence: As in `log_prob`; the probes of an estimate are drawn once, for all samples.

        Raises:
            ConfigError: Settings that contradict each other or are out of range.
            EngineUnavailableError: The PyTorch engine has no such solver.
            DataError: A parameter is not finite.
        """
        return export.to_torch(self, solver, divergence=self.divergence.changed(divergence))

    def distribution(
        self,
        context: Tensor | None = None,
        *,
        solver: SolverLike = None,
        divergence: DivergenceLike = None,
        validate_args: bool | None = None,
    ) -> FlowDistribution:
        """The flow among `torch.distributions`: it computes with this flow, so training changes it.

        Args:
            context: ``(*batch_shape, m)``, for conditional flows: a batch of densities.
            solver: As in `log_prob`.
            divergence: As in `log_prob`.
            validate_args: As in `torch.distributions.Distribution`.

        Raises:
            ConfigError: There is no such divergence.
            DataError: `context` as in `log_prob`.
        """
        return FlowDistribution(self, context, solver=solver, divergence=divergence, validate_args=validate_args)

    def save(self, path: str | Path) -> None:
        """Writes the flow to one ``.safetensors`` file, atomically; `pyrnode.load` reads it.

        Raises:
            ConfigError: A block has dynamics of the user's own, or the embedding was given as a module, which a file
                cannot describe; or the name is one of another kind of file.
            CheckpointError: The file cannot be written.
        """
        if Path(path).suffix in (".pt", ".pth", ".pt2", ".onnx", ".pkl", ".ckpt"):
            raise ConfigError(
                f"{path}: a flow is saved as safetensors: name it .safetensors (for other kinds: pyrnode.export)"
            )
        checkpoint.save(self, self.config, path)


@torch.inference_mode(False)
def load(path: str | Path, *, engine: str | None = None, device: str = "cpu", embedding: Given | None = None) -> Flow:
    """Reads a flow that `Flow.save` or a training run wrote.

    Args:
        path: The file, or the folder of a run (its best model on validation is read).
        engine: Engine to compute with; default the stored setting.
        device: Device to put it on, or ``"auto"``.
        embedding: Of a flow with an embedding the function or class that made it, or its name ``"module:function"``,
            which is imported. It is called with the settings that the file holds, which are plain values; the code is
            yours, and nothing is imported or called on the file's word.

    Raises:
        CheckpointError: The file is missing, truncated, damaged or foreign.
        ConfigError: There is no such engine or device; the embedding is missing, superfluous, or fails.
        EngineUnavailableError: The engine is not installed.
    """
    target = resolve_device(device)
    return checkpoint.load(path, Flow.build, engine=engine, embedding=embedding).to(target).eval()


def outset(
    config: Config,
    event_shape: tuple[int, ...],
    levels: int | None,
    features: Names | None = None,
    context_features: Names | None = None,
) -> list[Transform]:
    """The transforms that come first: of columns with bounds or a period; grey levels to logits, images to vectors.

    Of data nothing is taken but where periodic columns are unwrapped (`pyrnode.bounded.centred`).

    Raises:
        ConfigError: There is no column with one of these names.
    """
    known = bounded.transforms(config.columns, event_shape, levels, features, context_features)
    logits = [] if levels is None else [Dequantize(levels, getattr(torch, config.dtype)), Logit(config.flow.alpha)]
    return [*known, *logits, *([Flatten(event_shape)] if config.flow.state_shape(event_shape) != event_shape else [])]


def _unfitted(config: Config, event_shape: tuple[int, ...], levels: int | None) -> Iterator[Transform]:
    """Transforms to load those of data into."""
    shape = config.flow.state_shape(event_shape)
    if config.flow.standardizes(event_shape, levels):
        if config.flow.opens(event_shape, levels):
            yield Edges.none(*shape)
        yield Standardize.identity(shape)
        if config.flow.whitens(event_shape):
            yield Whiten.identity(math.prod(shape))
        if config.flow.draws_in(event_shape):
            yield Radial.identity()
