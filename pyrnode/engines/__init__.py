"""Engines: who integrates the blocks."""

from pyrnode.engines.base import Engine, Probes, Solution, Stats
from pyrnode.engines.torch import TorchEngine
from pyrnode.errors import EngineUnavailableError

__all__ = ["Engine", "Probes", "Solution", "Stats", "TorchEngine", "create"]


def create(name: str) -> Engine:
    """The engine of that name; ``"auto"`` takes the best that is installed.

    Raises:
        EngineUnavailableError: The engine is not there.
    """
    if name in ("auto", "torch"):
        return TorchEngine()
    raise EngineUnavailableError(f"engine {name!r} is not part of this version; use engine='torch' or 'auto'")
