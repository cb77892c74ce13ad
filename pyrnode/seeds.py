"""Random numbers that depend only on the seed and on what they are for.

Every use has its own generator, derived from the run's seed and a name (and a step), so that a resumed run, or one
that evaluates more often, draws the same numbers as an uninterrupted one: there is no state to lose.
"""

from __future__ import annotations

import hashlib

import torch

from pyrnode.settings import whole


def derive(seed: int, *purpose: object) -> int:
    """A seed for one purpose: ``derive(0, "noise", step)``."""
    text = repr((whole(seed, "seed", None), *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
