"""Flows as files: `Flow.save`, and `pyrnode.load`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from pyrnode import files
from pyrnode.composition import Composition
from pyrnode.config import Config
from pyrnode.dynamics import ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, EngineUnavailableError

Built = TypeVar("Built", bound=Composition)


def save(flow: Composition, config: Config, path: str | Path) -> None:
    """Writes a flow and the settings that it was built from; see `Flow.save`."""
    if any(isinstance(block.dynamics, ModuleDynamics) for block in flow.blocks):
        raise ConfigError(
            "a flow with dynamics of your own cannot be rebuilt from a file; save flow.state_dict() with torch, "
            "and build the flow with Flow.build(config, event_shape, dynamics=...) to load it"
        )
    description = {
        "config": config.to_dict(),
        "event_shape": flow.event_shape,
        "levels": flow.levels,
        "context_dim": flow.context_dim,
        "features": flow.features,
        "context_features": flow.context_features,
        "data_dtype": None if flow.data_dtype is None else str(flow.data_dtype).removeprefix("torch."),
    }
    files.write(path, "flow", flow.state_dict(), description)


def load(path: str | Path, build: Callable[..., Built], *, engine: str | None = None) -> Built:
    """Reads what `save` wrote.

    Args:
        path: The file, or the folder of a run (its best model on validation is read).
        build: Makes an untrained flow, as `Flow.build` does.
        engine: Engine to compute with; default the stored setting.

    Raises:
        CheckpointError: The file is missing, truncated, damaged or foreign.
        ConfigError: There is no such engine.
        EngineUnavailableError: The engine is not installed.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, description = files.read(path, "flow")
    overrides = {} if engine is None else {"engine": engine}
    Config().override(overrides)  # an unknown engine is not the file's fault
    try:
        config = Config.from_dict(description["config"]).override(overrides)
        shape, levels, context_dim = (description[key] for key in ("event_shape", "levels", "context_dim"))
        given = description["data_dtype"]
        dtype = None if given is None else {"float32": torch.float32, "float64": torch.float64}[given]
        names = {key: _names(description.get(key)) for key in ("features", "context_features")}
        flow = build(config, tuple(shape), levels=levels, context_dim=context_dim, data_dtype=dtype, **names)
        flow.load_state_dict(tensors)
    except EngineUnavailableError:
        raise
    except (KeyError, TypeError, ConfigError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not describe a flow of this version: {error}") from error
    return flow


def _names(given: object) -> tuple[str, ...] | None:
    """Names of columns as a description has them."""
    if given is not None and not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
        raise TypeError(f"names of columns: {given!r}")
    return None if given is None else tuple(given)
