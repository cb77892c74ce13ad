"""Kernels in C, compiled on the user's machine the first time that one is needed.

A C compiler is optional: without one (or with ``PYRNODE_NATIVE=0``) the same work is done by torch's own operations,
slower. What is compiled is kept in ``$XDG_CACHE_HOME/pyrnode`` (``~/.cache/pyrnode``), by source, compiler and
processor, so that it is done once a machine.
"""

from __future__ import annotations

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

NAMES = ("mlp", "conv", "softplus")
"""The kernels that there are."""

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
        source = resources.files(__package__).joinpath(f"{name}.c").read_bytes()
        compiler = _compiler()
        key = _digest(b"\0".join([source, " ".join(_FLAGS).encode(), _target(compiler)]))
        folder = _folder()
        kept = [file for file in folder.glob(f"{name}-{key}-*.so") if file.stem.endswith(_digest(file.read_bytes()))]
        return ctypes.CDLL(str(kept[0] if kept else _compile(compiler, name, source, folder / f"{name}-{key}")))
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


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(cache).expanduser() / "pyrnode"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="pyrnode-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="pyrnode-"))


def _compile(compiler: str, name: str, source: bytes, stem: Path) -> Path:
    """Compiles to a file of its own and moves it into place, so that no process ever loads half of one.

    The name ends in the contents' digest: to load a file that a crash or a full disk has cut off kills the process.
    """
    with tempfile.TemporaryDirectory(dir=stem.parent) as scratch:
        code, built = Path(scratch, f"{name}.c"), Path(scratch, f"{name}.so")
        code.write_bytes(source)
        command = [compiler, *_FLAGS, "-shared", "-fPIC", "-o", str(built), str(code), "-lm"]
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise _Unavailable(f"{compiler} does not compile it: {_last_line(done.stderr)}")
        return built.replace(f"{stem}-{_digest(built.read_bytes())}.so")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
