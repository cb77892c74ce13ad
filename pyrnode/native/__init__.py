"""Kernels in C, compiled on the user's machine the first time that one is needed.

A C compiler is optional: without one (or with ``PYRNODE_NATIVE=0``) the same work is done by torch's own operations,
slower. What is compiled is kept in ``$XDG_CACHE_HOME/pyrnode`` (``~/.cache/pyrnode``), by source, compiler and
processor, so that it is done once a machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

NAMES = ("mlp", "conv", "softplus", "threads")
"""The libraries that there are: kernels, and what shares their work among threads."""

VARIABLE = "PYRNODE_NATIVE"
"""The environment variable that turns the kernels off."""

_FLAGS = ["-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_SECONDS = 120  # for one compilation, which takes one or two


class Status(NamedTuple):
    """Whether kernels can be had, and why not; for `pyrnode doctor`."""

    available: bool
    why: str


class _Unavailable(Exception):
    """There is no kernel on this machine; the message says why."""


def library(name: str) -> ctypes.CDLL | None:
    """The compiled ``name.c`` of this folder; `None` where it cannot be had (`status` says why)."""
    try:
        return _library(name, enabled())
    except _Unavailable:
        return None


def status(name: str) -> Status:
    """Whether `library` has a kernel of that name on this machine; compiles it if need be."""
    try:
        _library(name, enabled())
    except _Unavailable as error:
        return Status(False, str(error))
    return Status(True, f"compiled by {_compiler()}")


def compiler() -> str:
    """The compiler that kernels are made with, or why there are none."""
    try:
        return _compiler() if enabled() else f"{VARIABLE}=0 turns them off"
    except _Unavailable as error:
        return str(error)


def enabled() -> bool:
    """Whether the environment leaves the kernels on."""
    return os.environ.get(VARIABLE, "1") != "0"


def _library(name: str, on: bool) -> ctypes.CDLL:
    if not on:
        raise _Unavailable(f"{VARIABLE}=0 turns them off")
    found = _load(name)
    if isinstance(found, str):
        raise _Unavailable(found)
    return found


@functools.cache
def _load(name: str) -> ctypes.CDLL | str:
    """The loaded library, or why there is none; asked once a process."""
    try:
        sources = {
            file: resources.files(__package__).joinpath(file).read_bytes() for file in (f"{name}.c", "vectors.h")
        }
        compiler = _compiler()
        made_of = [*sources.values(), " ".join(_FLAGS).encode(), _target(compiler)]
        stem = f"{name}-{_digest(bytes(1).join(made_of))}"
        with contextlib.ExitStack() as stack:
            folder = _folder() or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyrnode-")))
            kept = [file for file in folder.glob(f"{stem}-*.so") if file.stem.endswith(_digest(file.read_bytes()))]
            return ctypes.CDLL(str(kept[0] if kept else _compile(compiler, sources, folder / stem)))
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        return str(error)


def _compiler() -> str:
    if sys.platform == "win32":
        raise _Unavailable("there is no kernel for Windows")
    for candidate in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if candidate and (path := shutil.which(candidate)):
            return path
    raise _Unavailable("there is no C compiler (cc, gcc or clang)")


def _target(compiler: str) -> bytes:
    """What the compiler defines for this processor: its own version, and every instruction set."""
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise _Unavailable(f"{compiler} does not know this processor: {_last_line(done.stderr)}")
    return done.stdout


def _folder() -> Path | None:
    """Where compiled files are kept; `None` where nothing can be written."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(cache).expanduser() / "pyrnode"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _compile(compiler: str, sources: dict[str, bytes], stem: Path) -> Path:
    """Compiles the first of the sources, which includes the others; gives the file.

    It is moved into place, so that no process ever loads half of one. Its name ends in its contents' digest: to load
    one that a crash or a full disk has cut off kills the process.
    """
    with tempfile.TemporaryDirectory(dir=stem.parent) as scratch:
        for file, source in sources.items():
            Path(scratch, file).write_bytes(source)
        built = Path(scratch, "kernel.so")
        command = [
            compiler,
            *_FLAGS,
            "-shared",
            "-fPIC",
            "-o",
            str(built),
            str(Path(scratch, next(iter(sources)))),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise _Unavailable(f"{compiler} does not compile it: {_last_line(done.stderr)}")
        return built.replace(f"{stem}-{_digest(built.read_bytes())}.so")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
