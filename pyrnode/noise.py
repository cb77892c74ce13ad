"""Noise that belongs to a sample, not to its place in a batch.

It is a function of the sample's values and of the seed: counter-based random numbers (Philox) under a key that is a
hash of both. So an estimate at a sample is the same number alone, in any batch and at any place in it, while different
samples have independent noise, whose errors average out in a mean over data. The price: as a function of x such an
estimate jumps, however close two samples are; where it must be smooth (finite differences, HMC), take the exact trace.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrnode.engines import Probes

_UNIFORM = 2**32 - 1  # number of the stream of uniform noise; the probes of block i have stream i


class SampleNoise:
    """Random numbers for each sample of a batch.

    Args:
        x: The samples, ``(batch, *event)``; integers of any type are the same samples.
        seed: Seed.
        dtype: Floating-point type of the noise.
    """

    def __init__(self, x: Tensor, seed: int, dtype: torch.dtype) -> None:
        self._x, self._seed, self._dtype = x.detach(), seed, dtype

    @cached_property
    def _keys(self) -> list[NDArray[np.uint64]]:
        """A key for each sample; made when there is noise to draw."""
        x = self._x.cpu().flatten(1)
        rows = (x + 0.0 if x.is_floating_point() else x.long()).numpy()  # -0.0 is the same value as 0.0
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

    def draw(self, k: int, *, one_each: bool = False) -> Callable[[Tensor], Probes]:
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


def spread(x: Tensor, noise: SampleNoise) -> Tensor:
    """Integers ``p`` as ``p + u`` with the samples' own uniform noise; floating-point values as they are."""
    if x.is_floating_point() or not math.prod(x.shape):
        return x
    u = noise.uniform(tuple(x.shape[1:])).to(x.device)
    return x.to(u.dtype) + u
