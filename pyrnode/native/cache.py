"""Where compiled kernels are kept: a folder of the user's that nobody else can write, or none.

Whoever can put a library there runs code in every process that loads it. So folder and file must belong to the user,
with nobody else's right to write, and a file is loaded through the descriptor that was looked at: no other can take its
place in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_DESCRIPTORS = Path("/proc/self/fd")
_CPU = Path("/proc/cpuinfo")

_HELD: list[int] = []
"""Descriptors of what is loaded: the loader knows a library by its path, and a number must not come to mean another."""


class Unsafe(OSError):
    """A folder or file that others could have written; the message says why, `remedy` what ends it."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


def folder() -> Path:
    """The folder, made where it is not there: ``pyrnode/kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    A relative ``XDG_CACHE_HOME`` is passed over, as its specification demands: it would mean the working folder.

    Raises:
        OSError: There is none that is safe and can be used.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        cache = named if named.is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError:  # neither HOME nor an entry in the list of users: a container
        raise OSError("there is no home folder") from None
    if not cache.is_absolute():
        raise OSError(f"the home folder {str(cache.parent)!r} is no absolute path")
    path = cache / "pyrnode" / "kernels"
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        with contextlib.suppress(FileExistsError):
            missing.mkdir(mode=0o700)
    descriptor = os.open(path, _READ | getattr(os, "O_DIRECTORY", 0))
    try:
        _check(path, os.fstat(descriptor))
    finally:
        os.close(descriptor)
    return path


def load(path: Path) -> ctypes.CDLL:
    """The library in a file whose name ends in the digest of what it holds.

    Raises:
        OSError: It cannot be loaded, is damaged, or others can write it.
    """
    descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)
        _check(path, status)
        if not path.stem.endswith(_digest(_contents(descriptor))):  # to load half a library kills the process
            raise OSError(f"{path} is damaged")
        if _DESCRIPTORS.is_dir():
            library = ctypes.CDLL(str(_DESCRIPTORS / str(descriptor)))
        else:
            library = ctypes.CDLL(str(path))
            if not os.path.samestat(status, path.stat()):
                raise Unsafe(f"{path} was replaced while it was loaded")
    except BaseException:
        os.close(descriptor)
        raise
    _HELD.append(descriptor)
    return library


def keep(content: bytes, stem: str, folder: Path) -> Path:
    """Writes a library to the folder, in one move; its name is `stem` and the digest of its contents.

    Raises:
        OSError: It could not be written.
    """
    path = folder / f"{stem}-{_digest(content)}.so"
    scratch = folder / f".{uuid.uuid4().hex}"
    descriptor = os.open(scratch, _NEW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    return path


def kept(stem: str, folder: Path) -> Iterator[Path]:
    """The files whose names begin with `stem`, the newest first."""
    files = [(file.lstat().st_mtime_ns, file) for file in folder.glob(f"{stem}-*.so")]
    return (file for _, file in sorted(files, reverse=True))


def processor() -> bytes | None:
    """What tells processors of different instructions apart without a compiler; `None` where it is not known."""
    if sys.platform != "linux":
        return None
    try:
        lines = _CPU.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return None
    telling = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    found = [line for line in lines if line.partition(":")[0].strip() in telling]
    return "\n".join([platform.machine(), platform.libc_ver()[0], *found]).encode() if found else None


def _check(path: Path, status: os.stat_result) -> None:
    """Refuses what is not the user's alone."""
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        raise Unsafe(f"{path} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unsafe(f"{path} can be written by others", f"chmod go-w {path}")


def _contents(descriptor: int) -> bytes:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError("it is no plain file")
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
