"""Flows as files: `Flow.save`, and `pyrnode.load`."""

from __future__ import annotations

from pathlib import Path

from pyrnode.config import Config
from pyrnode.devices import resolve_device
from pyrnode.errors import CheckpointError, ConfigError, EngineUnavailableError
from pyrnode.files import read, write
from pyrnode.flow import Flow


def save_flow(flow: Flow, path: str | Path) -> None:
    """Writes a flow; see `Flow.save`.

    Raises:
        ConfigError: A block has dynamics of the user's own, which a file cannot describe.
        CheckpointError: The file cannot be written.
    """
    from pyrnode.dynamics import ModuleDynamics

    if any(isinstance(block.dynamics, ModuleDynamics) for block in flow.blocks):
        raise ConfigError(
            "a flow with dynamics of your own cannot be rebuilt from a file; save flow.state_dict() with torch, "
            "and build the flow with Flow.build(config, event_shape, dynamics=...) to load it"
        )
    description = {
        "config": flow.config.to_dict(),
        "event_shape": flow.event_shape,
        "levels": flow.levels,
        "context_dim": flow.context_dim,
    }
    write(path, "flow", flow.state_dict(), description)


def load_flow(path: str | Path, *, engine: str | None = None, device: str = "cpu") -> Flow:
    """Reads a flow that `Flow.save` or a training run wrote.

    Args:
        path: The file, or the folder of a run (its best model on validation is read).
        engine: Engine to compute with; default the stored setting.
        device: Device to put it on, or ``"auto"``.

    Raises:
        CheckpointError: The file is missing, truncated, damaged or foreign.
        ConfigError: There is no such engine or device.
        EngineUnavailableError: The engine is not installed.
    """
    path, target = Path(path), resolve_device(device)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, description = read(path, "flow")
    overrides = {} if engine is None else {"engine": engine}
    Config().override(overrides)  # an unknown engine is not the file's fault
    try:
        config = Config.from_dict(description["config"]).override(overrides)
        shape, levels, context_dim = (description[key] for key in ("event_shape", "levels", "context_dim"))
        flow = Flow.build(config, tuple(shape), levels=levels, context_dim=context_dim)
        flow.load_state_dict(tensors)
    except EngineUnavailableError:
        raise
    except (KeyError, TypeError, ConfigError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not describe a flow of this version: {error}") from error
    return flow.to(target).eval()
