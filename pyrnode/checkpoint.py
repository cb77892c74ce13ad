"""Files: written atomically, checked when read, never unpickled.

A checkpoint is one ``.safetensors`` file: tensors, and in its header a JSON description with a digest of both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from pyrnode.config import Config
from pyrnode.errors import CheckpointError, ConfigError, EngineUnavailableError
from pyrnode.flow import Flow

FORMAT = 1
"""Version of the files' layout."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: It could not be written (no space, no permission, no folder); the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.part")  # one name: what a kill leaves behind, the next write replaces
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; what was there before is untouched") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that at every moment either the old or the whole new content is there; errors as `replacing`."""
    with replacing(Path(path)) as file:
        file.write(content)


def _digest(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(description).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes tensors with a JSON description; `kind` says what the file is for."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "kind": kind, "sha256": _digest(flat, description), "description": description}
    write_atomically(path, to_bytes(flat, metadata={"pyrnode": json.dumps(header)}))


def read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads and checks a file of `write`.

    Raises:
        CheckpointError: It is missing, truncated, damaged, not pyrnode's, of another kind, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, or not a safetensors file ({error}); use another copy") from None
    try:
        header = json.loads(metadata["pyrnode"])
        version, found, digest = header["format"], header["kind"], header["sha256"]
        description: dict[str, Any] = header["description"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is a safetensors file, but not one that pyrnode wrote") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of pyrnode reads format {FORMAT}")
    if found != kind:
        raise CheckpointError(f"{path} holds a {found}, not a {kind}")
    if _digest(tensors, description) != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest; use an earlier copy")
    return tensors, description


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


def resolve_device(name: str) -> torch.device:
    """The torch device of that name; ``"auto"`` is CUDA where there is one.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
