"""Random numbers that depend only on the seed and on what they are for.

Every use has its own generator, derived from the run's seed and a name (and a step), so that a resumed run, or one
that evaluates more often, draws the same numbers as an uninterrupted one: there is no state to lose.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyrnode.settings import whole

_GLOBAL = threading.RLock()  # a network that is being made may make another


def derive(seed: int, *purpose: object) -> int:
    """A seed for one purpose: ``derive(0, "noise", step)``."""
    text = repr((whole(seed, "seed", None), *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of a device for one purpose; those of two kinds of devices give other numbers."""
    return torch.Generator(device).manual_seed(derive(seed, *purpose))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator of the CPU with that seed, then as it was before; for code that knows no other.

    One thread at a time; those of GPUs are not touched.
    """
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
