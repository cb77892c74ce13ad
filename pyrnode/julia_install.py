"""``pyrnode install-julia``: has juliapkg install Julia and its packages, compiles them, and tests the result.

Then it has PackageCompiler build the system image (`julia_image`). juliapkg and Julia run in processes of their own:
juliapkg reads its variables once, when it is imported. What they print is passed on as it comes, without the stacks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from pyrnode import julia_image, julia_setup
from pyrnode.errors import EngineUnavailableError
from pyrnode.julia_setup import JuliaStatus
from pyrnode.julia_times import Times, usually
from pyrnode.progress import progress_bar

_RESOLVE = """
import json, sys
sys.path[:], packages, force = json.loads(sys.argv[1])
import juliapkg
for name, (uuid, bounds) in packages.items():
    juliapkg.add(name, uuid, version=bounds)
juliapkg.resolve(force=force)
"""

_SELF_TEST = """
import json, sys
sys.path[:], = json.loads(sys.argv[1])
from pyrnode.engines.julia import self_test
print(self_test())
"""

_EXERCISE = """
import json, sys
sys.path[:], = json.loads(sys.argv[1])
from pyrnode.engines.julia import JuliaEngine
from pyrnode.engines.julia_workload import exercise
exercise(JuliaEngine())
"""

_GIB = 2**30
_SPACE, _SPACE_CUDA, _SPACE_IMAGE = 3 * _GIB, 8 * _GIB, 3 * _GIB
"""What Julia, its packages, their binaries and compiled code take at least; and the image while it is built."""

_NO_NETWORK = re.compile(
    r"could not resolve|name or service not known|name resolution|nodename nor servname|network is unreachable|"
    r"connection (refused|timed out|reset)|timed out|urlopen error|RequestError|failed to (download|clone|fetch)",
    re.IGNORECASE,
)
_NO_SPACE = re.compile(r"no space left|ENOSPC|quota exceeded", re.IGNORECASE)


def install(*, cuda: bool = False, sysimage: bool = True, quiet: bool = False) -> None:
    """Installs Julia and the engine's packages, builds its system image, and runs its self-test.

    It prints what it does as it goes. What is already there stays as it is and needs no network. Nothing is installed
    into a Julia project that the user has named: the error has the command that does. An image that cannot be built is
    a note, and the engine works without.

    Args:
        cuda: Also the packages for a GPU.
        sysimage: Build the system image where there is none, or a stale one; else remove the one that there is.
        quiet: Print the self-test's result alone.

    Raises:
        EngineUnavailableError: juliacall is missing; there is no network or no space; juliapkg or Julia failed (with
            Julia's message); the user's own project lacks packages; or the self-test failed.
    """
    julia_setup.status.cache_clear()
    found = julia_setup.status()
    if found.juliacall is None:
        raise EngineUnavailableError(found.explanation)
    complete = found.ready and (found.has_cuda or not cuda)
    if not complete and (found.own or julia_setup.is_named()):
        raise _own_julia(found, cuda=cuda)
    if not complete:
        _install_packages(cuda=cuda, force=not found.ready, quiet=quiet)
        julia_setup.status.cache_clear()
        found = julia_setup.require()
    if not quiet:
        print(f"{found.detail}\nCompiling and testing", flush=True)
    if not sysimage:
        julia_image.remove(found)
    fresh = julia_image.usable(found) is not None
    try:
        lines = _python(_SELF_TEST, [sys.path], "test of the image" if fresh else "test", quiet=quiet)
    except _FailedError as error:
        without = f"; without its system image: {julia_setup.INSTALL} --no-sysimage" if fresh else ""
        message = f"the Julia engine is installed, but its self-test failed: {error}{without}"
        raise EngineUnavailableError(message) from error
    if quiet:
        print(lines[-1])
    if sysimage and not fresh:
        try:
            _build_image(found, quiet=quiet)
        except (_FailedError, OSError) as error:
            again = f"with {julia_setup.INSTALL} it is tried again"
            print(f"note: no system image, so the engine starts slowly ({again}): {error}", file=sys.stderr)


def _build_image(found: JuliaStatus, *, quiet: bool) -> None:
    """Records what the usual solves compile, builds the image of it, and keeps it if the self-test passes with it."""
    folder = julia_image.folder(found)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < _SPACE_IMAGE:
        needed = f"it needs {_SPACE_IMAGE / _GIB:.0f} GiB"
        raise _FailedError(f"{folder} has {free / _GIB:.1f} GiB of free space, and {needed}")
    if not quiet:
        print("Building the system image, from which Julia starts faster; --no-sysimage does without", flush=True)
    with tempfile.TemporaryDirectory(prefix="image-", dir=folder) as scratch:
        statements, made = Path(scratch, "statements.jl"), Path(scratch, f"image{julia_image.SUFFIX}")
        recorded = {"PYTHON_JULIACALL_TRACE_COMPILE": str(statements), "PYTHON_JULIACALL_THREADS": "2"}
        recorded["PYTHON_JULIACALL_OPTIMIZE"] = "0"  # what is compiled matters here, not how fast it runs
        _python(_EXERCISE, [sys.path], "what to compile", quiet=quiet, variables=recorded)
        script = julia_setup.sources() / "bridge" / "image.jl"
        arguments = [str(julia_image.tools()), str(found.project), str(statements), str(made)]
        with julia_image.built(found, made):
            command = [str(found.executable), "--startup-file=no", str(script), *arguments]
            _run(command, "system image", quiet=quiet, variables=_WITHOUT_CONDA)
    try:
        _python(_SELF_TEST, [sys.path], "test of the image", quiet=quiet)
    except _FailedError as error:
        julia_image.remove(found)
        raise _FailedError(f"Julia does not work with it: {error}") from error


_WITHOUT_CONDA = {"JULIA_CONDAPKG_BACKEND": "Null", "JULIA_PYTHONCALL_EXE": sys.executable}
"""PythonCall, in a Julia that Python did not start, would install a Python."""


def _own_julia(found: JuliaStatus, *, cuda: bool) -> EngineUnavailableError:
    if found.ready:
        remedy = julia_setup.add_command(found, cuda=True)
        return EngineUnavailableError(f"the Julia project {found.project} lacks the packages for a GPU; run: {remedy}")
    return EngineUnavailableError(f"pyrnode installs nothing into a Julia that you have named: {found.explanation}")


def _install_packages(*, cuda: bool, force: bool, quiet: bool) -> None:
    """Lets juliapkg install what it finds that the packages on `sys.path` need, ours among them."""
    if os.environ.get("PYTHON_JULIAPKG_OFFLINE") == "yes":
        detail = "PYTHON_JULIAPKG_OFFLINE=yes forbids juliapkg to install anything"
        raise EngineUnavailableError(f"{detail}; run: env -u PYTHON_JULIAPKG_OFFLINE {julia_setup.INSTALL}")
    _check_space(_SPACE_CUDA if cuda else _SPACE)
    packages = julia_setup.needs(gpu=True) if cuda else {}
    if not quiet:
        print("Installing Julia and its packages; the first time this takes 10 to 30 minutes", flush=True)
    try:
        _python(_RESOLVE, [sys.path, packages, force], "packages", quiet=quiet)
    except _FailedError as error:
        raise EngineUnavailableError(_explain(str(error))) from error


def _check_space(needed: int) -> None:
    from juliapkg.state import STATE

    for folder in (Path(STATE["project"]), Path(STATE["depot"])):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise EngineUnavailableError(
                f"{folder} has {free / _GIB:.1f} GiB of free space and Julia's packages need {needed / _GIB:.0f} GiB; "
                "free some, or name other folders: JULIA_DEPOT_PATH (packages), PYTHON_JULIAPKG_PROJECT (Julia)"
            )


def _explain(reason: str) -> str:
    again = f"then run again: {julia_setup.INSTALL}"
    if _NO_SPACE.search(reason):
        return f"no space is left for Julia's packages: {reason}; free some, {again}"
    if _NO_NETWORK.search(reason):
        return f"Julia's packages cannot be downloaded: {reason}; check the network (or set https_proxy), {again}"
    return f"juliapkg could not install Julia's packages: {reason}"


class _FailedError(Exception):
    """A child process failed; the message is Julia's, or that of the Python exception."""


def _python(
    code: str, argument: object, what: str, *, quiet: bool, variables: dict[str, str] | None = None
) -> list[str]:
    """Runs code in a fresh Python (`_run`); its argument is JSON."""
    return _run([sys.executable, "-c", code, json.dumps(argument)], what, quiet=quiet, variables=variables)


def _run(command: list[str], what: str, *, quiet: bool, variables: dict[str, str] | None = None) -> list[str]:
    """Runs a program and prints what it prints, except for stacks, above a bar; returns all its lines.

    Args:
        command: The program and its arguments.
        what: What the bar says, beside how long it usually takes.
        quiet: Print nothing.
        variables: Environment variables besides those that there are.

    Raises:
        _FailedError: It ended with another exit code than 0.
    """
    lines: list[str] = []
    stack = failed = False
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})}
    program = "Python" if command[0] == sys.executable else "Julia"
    times, begun = Times(julia_setup.depots()[0] / "pyrnode"), time.monotonic()
    says = f"install-julia: {what}, {usually(times.usual(what))}"
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with (
        progress_bar(None, says, unit="", show=not quiet, uncounted=True),
        subprocess.Popen(
            command, stdout=pipe, stderr=both, env=environment, encoding="utf-8", errors="replace"
        ) as child,
    ):
        for line in child.stdout or ():
            lines.append(line.rstrip())
            stack = line.startswith(("Stacktrace:", "signal (")) or (stack and (not line.strip() or line[0] in " [@"))
            failed = failed or line.startswith("Traceback (most recent call last)")
            if not (stack or failed or quiet):
                tqdm.write(line, end="")
                sys.stdout.flush()
    if child.returncode != 0:
        raise _FailedError(_reason(lines) or f"{program} ended with exit code {child.returncode}")
    times.add(what, time.monotonic() - begun)
    return lines


def _reason(lines: list[str]) -> str:
    """The message in the output of a failed process: Julia's last error, else Python's exception."""
    errors = [i for i, line in enumerate(lines) if line.startswith("ERROR: ")]
    if errors:
        message = []
        for line in lines[errors[-1] :]:
            if line.startswith(("Stacktrace:", "Traceback (most recent call last)")):
                break
            message.append(line)
        return "\n".join(message).removeprefix("ERROR: ").strip()
    last = next((line for line in reversed(lines) if line.strip()), "")
    return re.sub(r"^[\w.]*(Error|Exception): ", "", last)
