"""Random numbers that depend only on the seed and on what they are for.

Every use has its own generator, derived from the run's seed and a name (and a step), so that a resumed run, or one
that evaluates more often, draws the same numbers as an uninterrupted one: there is no state to lose.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrnode.errors import ConfigError
from pyrnode.settings import whole

_GLOBAL = threading.RLock()  # a network that is being made may make another


def derive(seed: int, *purpose: object) -> int:
    """A seed for one purpose: ``derive(0, "noise", step)``."""
    text = repr((whole(seed, "seed", None), *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def plain(seed: int) -> int:
    """A seed as torch takes it itself; `ConfigError` where it is none."""
    seed = whole(seed, "seed", None)
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed = {seed}: expected a whole number from -2**63 to 2**64 - 1")
    return seed


def generator(seed: int, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of a device for one purpose; those of two kinds of devices give other numbers."""
    return torch.Generator(device).manual_seed(derive(seed, *purpose))


@dataclass(frozen=True)
class Share:
    """Which rows of a batch are here, where others have the rest of it.

    Attributes:
        first: The first of them.
        count: How many they are.
        total: How many rows the batch has.
    """

    first: int
    count: int
    total: int

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class ShareNoise:
    """The random numbers of a share: drawn for the whole batch, so that they do not depend on how it is divided."""

    generator: torch.Generator
    share: Share

    @property
    def device(self) -> torch.device:
        """Where they are drawn."""
        return self.generator.device


Noise = torch.Generator | ShareNoise
"""Where random numbers for a batch, or for a share of one, come from."""


def drawn(
    draw: Callable[[tuple[int, ...], torch.Generator | None], Tensor],
    shape: tuple[int, ...],
    source: Noise | None,
    *,
    batch: int = 0,
) -> Tensor:
    """Random numbers of a shape.

    Args:
        draw: Makes them, of a shape and with a generator (`None` for torch's own).
        shape: The shape.
        source: Where they come from.
        batch: The axis of the batch.
    """
    if not isinstance(source, ShareNoise):
        return draw(shape, source)
    share = source.share
    every = draw((*shape[:batch], share.total, *shape[batch + 1 :]), source.generator)
    return every.narrow(batch, share.first, share.count)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator of the CPU with that seed, then as it was before; for code that knows no other.

    One thread at a time; those of GPUs are not touched.
    """
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
