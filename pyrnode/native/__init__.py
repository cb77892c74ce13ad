"""Kernels in C, compiled on the user's machine the first time that one is needed.

A C compiler is optional: without one (or with ``PYRNODE_NATIVE=0``) the same work is done by torch's own operations,
slower. What is compiled is kept (`native.cache`), by source, processor and compiler, so that it is done once a machine;
where nothing can be kept safely, each process compiles for itself, in a private folder that is gone thereafter.
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

from pyrnode.errors import ConfigError
from pyrnode.native import cache

NAMES = ("mlp", "conv", "convnet", "potential", "softplus", "threads")
"""The libraries that there are: kernels, and what shares their work among threads."""

VARIABLE = "PYRNODE_NATIVE"
"""The environment variable that turns the kernels off."""

_WORDS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
_FLAGS = ["-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_SECONDS = 120  # for one compilation, which takes one or two


class Status(NamedTuple):
    """Whether kernels can be had, and from where, or why not; for `pyrnode doctor`."""

    available: bool
    why: str
    remedy: str | None = None


class _Unavailable(Exception):
    """There is no kernel on this machine; the message says why."""


class _Loaded(NamedTuple):
    library: ctypes.CDLL
    status: Status


def library(name: str) -> ctypes.CDLL | None:
    """The compiled ``name.c`` of this folder; `None` where it cannot be had (`status` says why).

    Raises:
        ConfigError: ``PYRNODE_NATIVE`` is neither on nor off.
    """
    found = _load(name) if enabled() else None
    return found.library if isinstance(found, _Loaded) else None


def status(name: str) -> Status:
    """Whether `library` has a kernel of that name on this machine; compiles it if need be."""
    try:
        found = _load(name) if enabled() else f"{VARIABLE}={os.environ[VARIABLE]} turns them off"
    except ConfigError as error:
        found = str(error)
    return found.status if isinstance(found, _Loaded) else Status(False, found)


def compiler() -> str:
    """The compiler that kernels are made with, or why there are none."""
    if not enabled():
        return f"{VARIABLE}=0 turns them off"
    try:
        return _compiler()
    except _Unavailable as error:
        found = status(NAMES[0])
        return found.why if found.available else str(error)


def enabled() -> bool:
    """Whether the environment leaves the kernels on.

    Raises:
        ConfigError: ``PYRNODE_NATIVE`` is neither on (1, true, on) nor off (0, false, off).
    """
    word = os.environ.get(VARIABLE, "").strip().lower() or "1"
    if word not in _WORDS:
        raise ConfigError(f"{VARIABLE} = {os.environ[VARIABLE]!r}: expected 1, true or on, or 0, false or off")
    return _WORDS[word]


@functools.cache
def _load(name: str) -> _Loaded | str:
    """The loaded library, or why there is none; asked once a process."""
    try:
        folder = resources.files(__package__)
        headers = sorted(file.name for file in folder.iterdir() if file.name.endswith(".h"))
        sources = {file: folder.joinpath(file).read_bytes() for file in (f"{name}.c", *headers)}
        made_of = [*sources.values(), " ".join(_FLAGS).encode()]
        return _find(name, sources, bytes(1).join(made_of))
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        return str(error)


def _find(name: str, sources: dict[str, bytes], made_of: bytes) -> _Loaded:
    """What is kept, else what the compiler makes."""
    processor = cache.processor()
    stem = f"{name}-{_digest(made_of + (processor or b''))}"
    try:
        folder, unkept = cache.folder(), None
    except OSError as error:  # among them cache.Unsafe
        folder, unkept = None, error
    try:
        compiler = _compiler()
        stem = f"{stem}-{_digest(_target(compiler))}"
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        found = _kept(stem, folder) if folder and processor else None
        if found is None:
            raise
        return _Loaded(found, Status(True, f"kept in {folder}; now {error}"))
    found = _kept(stem, folder) if folder else None
    if found is not None:
        return _Loaded(found, Status(True, f"compiled by {compiler}, kept in {folder}"))
    return _made(compiler, sources, stem, folder, unkept)


def _kept(stem: str, folder: Path) -> ctypes.CDLL | None:
    """The library of that name in the cache, if there is one that is whole, safe, and can be executed."""
    for file in cache.kept(stem, folder):
        try:
            return cache.load(file)
        except OSError:
            continue
    return None


def _made(compiler: str, sources: dict[str, bytes], stem: str, folder: Path | None, unkept: OSError | None) -> _Loaded:
    """Compiles, in a private folder, and keeps the library where that can be done."""
    with _scratch(folder) as name:
        scratch = Path(name)
        content = _compile(compiler, sources, scratch)
        if folder is not None:
            try:
                loaded = cache.load(cache.keep(content, stem, folder))
                return _Loaded(loaded, Status(True, f"compiled by {compiler}, kept in {folder}"))
            except OSError as error:  # it is full, or nothing in it may be executed
                unkept = error
        loaded = cache.load(cache.keep(content, stem, scratch))
    why = f"compiled by {compiler} for this process alone: {_reason(unkept)}"
    return _Loaded(loaded, Status(True, why, getattr(unkept, "remedy", None)))


def _reason(error: OSError | None) -> str:
    if error is None or isinstance(error, cache.Unsafe):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _scratch(folder: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A private folder among the temporary files, else in the cache."""
    try:
        return tempfile.TemporaryDirectory(prefix="pyrnode-")
    except OSError:
        if folder is None:
            raise
        return tempfile.TemporaryDirectory(prefix="pyrnode-", dir=folder)


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


def _compile(compiler: str, sources: dict[str, bytes], scratch: Path) -> bytes:
    """Compiles the first of the sources, which includes the others; gives the library."""
    for file, source in sources.items():
        (scratch / file).write_bytes(source)
    built = scratch / "kernel.so"
    first = scratch / next(iter(sources))
    command = [compiler, *_FLAGS, "-shared", "-fPIC", "-o", str(built), str(first), "-lm"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False, env=environment)
    if done.returncode:
        raise _Unavailable(f"{compiler} does not compile it: {_last_line(done.stderr)}")
    return built.read_bytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
