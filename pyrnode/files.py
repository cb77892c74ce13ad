"""Files: written atomically, checked when read, never unpickled.

A file of tensors is one ``.safetensors`` file: tensors, and in its header a JSON description with a digest of both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from pyrnode.errors import CheckpointError

FORMAT = 2
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


def read_json(path: Path, *, remedy: str, check: Callable[[Any], object] = lambda value: None) -> Any:
    """The value in a JSON file that pyrnode wrote beside a run.

    Args:
        path: The file.
        remedy: What to do about a damaged one, for the message.
        check: Looks at the parts that will be needed, and fails as Python does where one is missing or of another type.

    Raises:
        CheckpointError: It cannot be read, is no JSON, or did not pass `check`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        check(value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
    return value
