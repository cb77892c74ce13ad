"""Files: written atomically, checked when read, never unpickled; and locks on the folders that hold them.

A file of tensors is one ``.safetensors`` file: tensors, and in its header a JSON description with a digest of both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from pyrnode.errors import CheckpointError, EngineUnavailableError, PyrnodeError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
"""Version of the files' layout."""

_NEW = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


# -- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and is removed when it does not.

    Each writer has a file of its own, under a random name in the same folder: of two that write `path` at once, the
    later one's content is there at last, and whole. A file that was there before keeps its permissions.

    Raises:
        CheckpointError: It could not be written (no space, no permission, no folder); the old file is untouched.
    """
    with _writing(path):
        _sweep(path)
        temporary, descriptor = _temporary(path)
    try:
        with _writing(path):
            with os.fdopen(descriptor, "wb") as file:  # its lock says that the file is not left over
                yield file
                file.flush()
                _keep_mode(path, descriptor)
                os.fsync(descriptor)
                os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; what was there before is untouched") from error


def _part(path: Path) -> str:
    """How the names of temporary files for `path` begin."""
    name = path.name
    return f".{name}." if len(name.encode(errors="replace")) < 200 else f".{_name_digest(name)}."


def _name_digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, opened and locked."""
    while True:
        temporary = path.with_name(f"{_part(path)}{secrets.token_hex(8)}.part")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | _NEW, 0o666)
        except ValueError as error:  # a NUL, or what is no text, in the name
            raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
        if _lock(descriptor) is not False and _is_at(temporary, descriptor):
            return temporary, descriptor
        os.close(descriptor)  # another writer took it for a leftover in the moment before it was locked


def _sweep(path: Path) -> None:
    """Removes what killed writers of `path` left behind: temporary files that nobody has locked."""
    if fcntl is None:
        return
    left = re.compile(re.escape(_part(path)) + r"([0-9a-f]{16}\.)?part")
    with suppress(OSError, ValueError):
        for entry in os.scandir(path.parent):
            if left.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                _remove_unlocked(entry.path)


def _remove_unlocked(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if _lock(descriptor):
                os.unlink(path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks an open file against other processes, and against others that opened it; `None`: there are no locks here.

    The lock goes with the descriptor: when it is closed, by whatever ends the process too.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the name still means the open file."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _keep_mode(path: Path, descriptor: int) -> None:
    with suppress(FileNotFoundError):
        before = os.stat(path, follow_symlinks=False)
        if stat.S_ISREG(before.st_mode) and hasattr(os, "fchmod"):
            os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def _sync_folder(folder: Path) -> None:
    """Makes a renaming in a folder outlast a loss of power, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that at every moment either the old or the whole new content is there; errors as `replacing`."""
    with replacing(Path(path)) as file:
        file.write(content)


def append(path: Path, content: bytes) -> None:
    """Adds to the end of a file, which is made if need be.

    Raises:
        CheckpointError: It could not be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | (_NEW & ~os.O_EXCL)
    try:
        with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


# -- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder from every other process, and every other thread, that asks for the same.

    Args:
        folder: It has a file ``.lock`` meanwhile, with the number of the process. What counts is the lock on that file,
            which ends with the process however that ends: a file that is left over keeps nobody out.

    Raises:
        CheckpointError: The folder is in use, or cannot be written to.
    """
    path = folder / ".lock"
    descriptor = _own(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock goes with the descriptor: whoever waits for the name makes a new file
        os.close(descriptor)


def _own(path: Path) -> int:
    flags = os.O_RDWR | (_NEW & ~os.O_EXCL)
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise CheckpointError(f"cannot lock {path.parent}: {error.strerror or error}") from error
        held = _lock(descriptor)
        if held is not False and _is_at(path, descriptor):
            return descriptor
        owner = os.pread(descriptor, 20, 0).decode(errors="replace") if held is False else ""
        os.close(descriptor)
        if held is False:
            who = f"in use by process {owner or '(unknown)'}"
            raise CheckpointError(f"{path.parent} is {who}: wait for it, end it, or take another folder")


# -- tensors ---------------------------------------------------------------------------------------------------------


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
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} {'is a folder, not a file' if os.path.isdir(path) else 'does not exist'}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except Exception as error:  # whatever the library makes of it
        raise CheckpointError(f"{path} is truncated, or not a safetensors file ({error}); use another copy") from None
    foreign = CheckpointError(f"{path} is a safetensors file, but not one that pyrnode wrote")
    try:
        header = json.loads(metadata["pyrnode"])
        version, found, digest = header["format"], header["kind"], header["sha256"]
        description: dict[str, Any] = header["description"]
    except Exception:  # no JSON, or too deep, or other JSON
        raise foreign from None
    if not isinstance(description, dict) or not isinstance(found, str):
        raise foreign
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version!r:.50}; this version of pyrnode reads format {FORMAT}")
    if found != kind:
        raise CheckpointError(f"{path} holds a {found[:50]}, not a {kind}")
    with converted(f"{path} cannot be checked"):
        right = _digest(tensors, description) == digest
    if not right:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest; use an earlier copy")
    return tensors, description


@contextmanager
def converted(problem: str) -> Iterator[None]:
    """Turns whatever fails in the block, where a reader meets contents that another may have made, into one error.

    Raises:
        CheckpointError: `problem`, and what it was. Errors that say what is missing on this machine pass.
    """
    try:
        yield
    except EngineUnavailableError:
        raise
    except Exception as error:  # whatever it is: contents can go wrong in more ways than could be listed
        reason = str(error) if isinstance(error, PyrnodeError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{problem}: {reason[:500]}") from error


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, types: bool = True) -> None:
    """Compares tensors with what they are to take the place of, which may be on torch's meta device.

    Args:
        found: Tensors by name.
        expected: Others that have the right names, shapes and types.
        types: Also compare the exact types, not only whether they are floating-point.

    Raises:
        CheckpointError: They do not fit; the message says where.
    """
    for name in sorted({*found, *expected}):
        if name not in found:
            raise CheckpointError(f"Missing key {name[:200]!r}")
        if name not in expected:
            raise CheckpointError(f"Unexpected key {name[:200]!r}")
        here, wanted = found[name], expected[name]
        if here.shape != wanted.shape:
            shapes = f"{tuple(here.shape)} instead of {tuple(wanted.shape)}"
            raise CheckpointError(f"size mismatch: {name[:200]!r} is {shapes}")
        if here.dtype != wanted.dtype and (types or here.is_floating_point() != wanted.is_floating_point()):
            raise CheckpointError(f"{name[:200]!r} is {here.dtype} instead of {wanted.dtype}")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: numbers that JSON does not know, infinite ones and NaN, are ``null``."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    except Exception as error:  # see `converted`
        raise CheckpointError(f"{path} is damaged ({str(error)[:500]}); {remedy}") from error
    return value
