"""The parts that a flow is composed of: ODE blocks, and what stands between them in the multi-scale flow (FFJORD)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrnode.config import Config
from pyrnode.dynamics import MLP, ConvNet, Dynamics, Potential
from pyrnode.dynamics.potential import check_settings, check_shape
from pyrnode.errors import ConfigError, SolverError


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
