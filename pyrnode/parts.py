"""The parts that a flow is composed of: ODE blocks, and what stands between them in the multi-scale flow (FFJORD)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrnode.config import Config
from pyrnode.dynamics import MLP, ConvNet, Dynamics, Potential
from pyrnode.dynamics.potential import check_settings, check_shape
from pyrnode.errors import ConfigError, SolverError

_OBJECTS = 2**15
"""Bytes that a block has beside its weights: Python's objects, counted of MLPs (28 kB)."""

_SMALL = 10**7
"""Numbers, roughly, up to which nobody asks whether there is room for them."""


class Block(nn.Module):
    """One ODE block: `dynamics` over ``[0, T]``."""

    def __init__(self, dynamics: Dynamics, end_time: float = 1.0) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.end_time = end_time

    def extra_repr(self) -> str:
        return f"end_time={self.end_time}"


class Squeeze(nn.Module):
    """``(C, H, W)`` to ``(4C, H/2, W/2)``: each 2×2 patch becomes channels."""

    @staticmethod
    def shape(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what comes out of a state of that shape."""
        return (shape[0] * 4, shape[1] // 2, shape[2] // 2)

    def forward(self, z: Tensor) -> Tensor:
        return F.pixel_unshuffle(z, 2)

    def inverse(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, 2)


class FactorOut(nn.Module):
    """The second half of the channels leaves the flow here and is normal as it is."""

    @staticmethod
    def shape(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of either half of a state of that shape."""
        return (shape[0] // 2, *shape[1:])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        kept, out = z.chunk(2, dim=1)
        return kept, out

    def inverse(self, kept: Tensor, out: Tensor) -> Tensor:
        return torch.cat((kept, out), dim=1)


def network(
    config: Config, event_shape: tuple[int, ...], context_dim: int, generator: torch.Generator | None = None
) -> Callable[[tuple[int, ...]], Dynamics]:
    """Makes the dynamics of a block from its event shape, as ``config.flow.network`` says.

    The parameters are drawn from `generator`, one block after the other; default torch's global generator.

    Raises:
        ConfigError: That kind of network does not fit the data's shape.
    """
    network = config.flow.network
    image = len(event_shape) == 3
    kind = network.kind if network.kind != "auto" else ("conv" if image else "mlp")
    if kind == "conv" and not image:
        raise ConfigError(f"network.kind = 'conv' needs images (C, H, W); the data has shape {event_shape}")
    if kind == "potential":
        check_shape(event_shape)
        check_settings(network.hidden, network.activation, network.time, network.rank, network.initial)
    if kind == "mlp" and image:
        raise ConfigError(f"network.kind = 'mlp' needs vectors (d,); the data has shape {event_shape}: flatten = true")

    def make(shape: tuple[int, ...]) -> Dynamics:
        if len(shape) == 3:
            return ConvNet(
                (shape[0], shape[1], shape[2]),
                network.hidden,
                activation=network.activation,
                time=network.time,
                kernel_size=network.kernel_size,
                context_dim=context_dim,
                generator=generator,
            )
        if kind == "potential":
            return Potential(
                shape[0],
                network.hidden,
                activation=network.activation,
                time=network.time,
                rank=network.rank,
                initial=network.initial,
                context_dim=context_dim,
                generator=generator,
            )
        return MLP(
            shape[0],
            network.hidden,
            activation=network.activation,
            time=network.time,
            context_dim=context_dim,
            generator=generator,
        )

    return make


def multi_scale(
    config: Config, event_shape: tuple[int, ...], make: Callable[[tuple[int, ...]], Dynamics]
) -> Iterator[nn.Module]:
    """The multi-scale flow of FFJORD: per scale blocks, squeeze, blocks, factor out; the last has blocks."""
    flow = config.flow

    def blocks(shape: tuple[int, ...]) -> Iterator[nn.Module]:
        for _ in range(flow.blocks):
            yield Block(make(shape), flow.end_time)

    if len(event_shape) != 3:
        if len(event_shape) != 1:
            raise ConfigError(f"data of shape {event_shape}: expected vectors (d,) or images (C, H, W)")
        yield from blocks(event_shape)
        return
    shape: tuple[int, ...] = event_shape
    scales = _count_scales(shape) if flow.scales == "auto" else flow.scales
    for scale in range(scales):
        yield from blocks(shape)
        if scale == scales - 1:
            return
        if shape[1] % 2 or shape[2] % 2:
            raise ConfigError(f"scales = {scales}: a {shape[1]}x{shape[2]} image cannot be halved; at most {scale + 1}")
        shape = Squeeze.shape(shape)
        yield Squeeze()
        yield from blocks(shape)
        shape = FactorOut.shape(shape)
        yield FactorOut()


def check_memory(config: Config, event_shape: tuple[int, ...], context_dim: int, *, copies: int) -> None:
    """Raises `ConfigError` where the blocks of the settings do not fit into the machine's memory.

    Args:
        config: Settings.
        event_shape: Shape of the states.
        context_dim: Features of the context.
        copies: How often each weight is kept.
    """
    flow, most = config.flow, memory()
    widths = flow.network.hidden
    if most is None or flow.blocks * max(widths) ** 2 * len(widths) < _SMALL:
        return
    with torch.device("meta"):
        block = network(config, event_shape, context_dim)(event_shape)
    blocks = flow.blocks
    if len(event_shape) == 3:
        blocks *= 2 * (_count_scales(event_shape) if flow.scales == "auto" else flow.scales) - 1
    numbers = sum(parameter.numel() for parameter in block.parameters())
    needed = blocks * (_OBJECTS + copies * numbers * getattr(torch, config.dtype).itemsize)
    if needed > most:
        what = "the weights" if copies == 1 else "the weights, their gradient and what the optimiser keeps of them"
        raise ConfigError(
            f"blocks = {flow.blocks}, hidden = {list(widths)}: {what} take about {needed / 2**30:.3g} GiB, and this "
            f"machine has {most / 2**30:.3g}: take fewer blocks (1 to 10 are usual), or narrower layers"
        )


def memory() -> int | None:
    """Bytes of this machine's memory; `None` where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _count_scales(shape: tuple[int, ...]) -> int:
    height, width = shape[1:]
    scales = 1
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 8:
        height, width, scales = height // 2, width // 2, scales + 1
    return scales


@contextmanager
def naming(index: int, event_shape: tuple[int, ...]) -> Iterator[None]:
    """Errors of a solve say which block's it was."""
    try:
        yield
    except SolverError as error:
        message = f"block {index} ({tuple(event_shape)}): {error}"
        raise SolverError(message, status=error.status, block=index) from error
