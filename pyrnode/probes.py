"""How the divergence is probed, and whose noise it is.

In use, noise belongs to a sample, not to its place in a batch: it is a function of the sample's values and of the seed,
counter-based random numbers (Philox) under a key that is a hash of both. So an estimate at a sample is the same number
alone, in any batch and at any place in it, while different samples have independent noise, whose errors average out in
a mean over data. The price: as a function of x such an estimate jumps, however close two samples are; where it must be
smooth (finite differences, HMC), take the exact trace. In training, noise comes from a generator of each step's own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrnode.config import Divergence
from pyrnode.seeds import Noise, drawn
from pyrnode.settings import whole


class Probes(NamedTuple):
    """Directions in which the Jacobian is probed.

    Attributes:
        eps: ``(k, batch, *event)``; of probes that all samples share, ``(k, 1, *event)`` (the plain engine's alone).
        weight: Weight of each probe in the sums: 1/k for an estimate, 1 for the d unit vectors (exact).
        axes: Whether they are the unit vectors, in their order, for every sample.
    """

    eps: Tensor
    weight: float
    axes: bool = False

    @staticmethod
    def draw(z: Tensor, k: int = 1, *, noise: str = "gaussian", generator: Noise | None = None) -> Probes:
        """Random probes for states like `z` ``(batch, *event)``: Gaussian, or Rademacher (±1)."""
        shape = (k, *z.shape)
        device = generator.device if generator is not None else z.device

        def numbers(shape: tuple[int, ...], source: torch.Generator | None) -> Tensor:
            if noise == "rademacher":
                return torch.randint(0, 2, shape, generator=source, device=device).to(z.dtype) * 2 - 1
            return torch.randn(shape, generator=source, dtype=z.dtype, device=device)

        return Probes(drawn(numbers, shape, generator, batch=1).to(z.device), 1 / k)

    @staticmethod
    def exact(z: Tensor) -> Probes:
        """The unit vectors: sums over them are the trace and the squared Frobenius norm themselves."""
        return Probes(Probes.unit(z).eps.expand(-1, *z.shape), 1.0, axes=True)

    @staticmethod
    def unit(z: Tensor) -> Probes:
        """The unit vectors, shared by the samples of `z`."""
        d = math.prod(z.shape[1:])
        eye = torch.eye(d, dtype=z.dtype, device=z.device)
        return Probes(eye.reshape(d, 1, *z.shape[1:]), 1.0, axes=True)


Draw = Callable[[Tensor], Probes | None]
"""Gives the probes for a block's start state, or `None` to solve for the state alone."""


def no_probes(z: Tensor) -> None:
    """The `Draw` of a solve for the state alone."""


class SampleNoise:
    """Random numbers for each sample of a batch.

    Args:
        x: The samples, ``(batch, *event)``; the same numbers of another type are the same samples.
        seed: Seed.
        dtype: Floating-point type of the noise.
    """

    def __init__(self, x: Tensor, seed: int, dtype: torch.dtype) -> None:
        self._x, self._seed, self._dtype = x.detach(), whole(seed, "seed", None), dtype

    @cached_property
    def _keys(self) -> list[NDArray[np.uint64]]:
        """A key for each sample; made when there is noise to draw."""
        x = self._x.cpu().flatten(1)
        rows = (x.double() + 0.0 if x.is_floating_point() else x.long()).numpy()  # -0.0 is the same value as 0.0
        start, keys = hashlib.blake2b(repr(self._seed).encode(), digest_size=16), []
        for row in rows:
            digest = start.copy()
            digest.update(row.tobytes())
            keys.append(np.frombuffer(digest.digest(), np.uint64))
        return keys

    def _generators(self, stream: int) -> list[np.random.Generator]:
        counter = np.array([0, 0, 0, stream], np.uint64)
        return [np.random.Generator(np.random.Philox(key=key, counter=counter)) for key in self._keys]

    def uniform(self, event_shape: tuple[int, ...]) -> Tensor:
        """Numbers in [0, 1), ``(batch, *event)``."""
        draws = [generator.random(event_shape, np.float32) for generator in self._generators(_UNIFORM)]
        return torch.from_numpy(np.stack(draws)).to(self._dtype)

    def gaussian(self, k: int, event_shape: tuple[int, ...], block: int) -> Tensor:
        """Standard normal probes for a block, ``(k, batch, *event)``; the first of them do not depend on k."""
        draws = [generator.standard_normal((k, *event_shape), np.float32) for generator in self._generators(block)]
        return torch.from_numpy(np.stack(draws, 1)).to(self._dtype)

    def draw(self, k: int, *, one_each: bool = False) -> Draw:
        """Gives the probes of the blocks of one solve, in order.

        Args:
            k: Probes per sample.
            one_each: The batch is k copies of the samples, ``(k * batch, *event)``, and each has one of the probes.
        """
        blocks = itertools.count()

        def probes(z: Tensor) -> Probes:
            eps = self.gaussian(k, tuple(z.shape[1:]), next(blocks)).to(z)
            return Probes(eps.flatten(0, 1)[None], 1.0) if one_each else Probes(eps, 1 / k)

        return probes

    def spread(self, x: Tensor) -> Tensor:
        """Integers ``p`` as ``p + u`` with the samples' own uniform noise; floating-point values as they are."""
        if x.is_floating_point() or not math.prod(x.shape):
            return x
        u = self.uniform(tuple(x.shape[1:])).to(x.device)
        return x.to(u.dtype) + u


_UNIFORM = 2**32 - 1  # number of the stream of uniform noise; the probes of block i have stream i


def draw(divergence: Divergence, dim: int, source: Noise | SampleNoise, *, noise: str = "gaussian") -> Draw:
    """How the divergence of a flow of that many dimensions is probed.

    Args:
        divergence: Its kind, and the number of probes.
        dim: Dimensions of the data.
        source: Where probes come from.
        noise: Distribution of a generator's probes; those of a sample are Gaussian.
    """
    k = divergence.probes or 1
    if divergence.exact(dim):
        return Probes.exact
    if isinstance(source, SampleNoise):
        return source.draw(k)
    return lambda z: Probes.draw(z, k, noise=noise, generator=source)
