"""Engines: who integrates the blocks."""

import os

import torch

from pyrnode import julia_setup
from pyrnode.engines.base import Engine, Solution, Stats
from pyrnode.engines.plain import PlainEngine
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.errors import ConfigError, unknown_name
from pyrnode.probes import Probes

__all__ = ["Engine", "PlainEngine", "Probes", "Solution", "Stats", "TorchEngine", "choose", "create"]


def choose(name: str, device: str = "cpu") -> tuple[str, str]:
    """The engine that `name` stands for, and why. Nothing is started, and nothing is installed.

    ``"auto"`` is the engine that the environment variable ``PYRNODE_ENGINE`` names, else Julia where it is installed
    and ready, else PyTorch.
    """
    if name != "auto":
        return name, "asked for"
    if named := os.environ.get("PYRNODE_ENGINE"):
        return named, "named by PYRNODE_ENGINE"
    status = julia_setup.status()
    if not status.ready:
        return "torch", f"Julia is not ready: {status.explanation}"
    if (device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())) and not status.has_cuda:
        return "torch", "CUDA.jl is not installed for Julia; run: pyrnode install-julia --cuda"
    return "julia", status.detail


def create(name: str, device: str = "cpu") -> Engine:
    """The engine of that name; ``"auto"`` takes the best that is installed (see `choose`).

    Raises:
        EngineUnavailableError: Julia was asked for and is not installed; the message has the one command that helps.
        ConfigError: There is no such engine.
    """
    name, _ = choose(name, device)
    if name == "torch":
        return TorchEngine()
    if name == "julia":
        from pyrnode.engines.julia import JuliaEngine

        return JuliaEngine()
    raise ConfigError(unknown_name("engine", name, ("auto", "julia", "torch")))
