"""``pyrnode install-julia``: has juliapkg install Julia and its packages, compiles them, and tests the result.

juliapkg runs in a process of its own: it reads its variables once, when it is imported, and what it and Julia print is
passed on as it comes, without the stacks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from pyrnode import julia_setup
from pyrnode.errors import EngineUnavailableError
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

_GIB = 2**30
_SPACE, _SPACE_CUDA = 3 * _GIB, 8 * _GIB
"""What Julia, its packages, their binaries and compiled code take at least."""

_NO_NETWORK = re.compile(
    r"could not resolve|name or service not known|name resolution|nodename nor servname|network is unreachable|"
    r"connection (refused|timed out|reset)|timed out|urlopen error|RequestError|failed to (download|clone|fetch)",
    re.IGNORECASE,
)
_NO_SPACE = re.compile(r"no space left|ENOSPC|quota exceeded", re.IGNORECASE)


def install(*, cuda: bool = False, quiet: bool = False) -> None:
    """Installs Julia and the engine's packages, and runs its self-test; prints what it does as it goes.

    What is already there stays as it is and needs no network. Nothing is installed into a Julia project that the user
    has named: the error has the command that does.

    Args:
        cuda: Also the packages for a GPU.
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
        print(f"{found.detail}\nCompiling and testing; the first time takes minutes", flush=True)
    try:
        lines = _python(_SELF_TEST, [sys.path], "install-julia: test", quiet=quiet)
    except _FailedError as error:
        raise EngineUnavailableError(f"the Julia engine is installed, but its self-test failed: {error}") from error
    if quiet:
        print(lines[-1])


def _own_julia(found: julia_setup.JuliaStatus, *, cuda: bool) -> EngineUnavailableError:
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
        print("Installing Julia and its packages; with compilation this takes 10 to 30 minutes", flush=True)
    try:
        _python(_RESOLVE, [sys.path, packages, force], "install-julia: packages", quiet=quiet)
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


def _python(code: str, argument: object, what: str, *, quiet: bool) -> list[str]:
    """Runs code in a fresh Python and prints what it prints, except for stacks, above a bar; returns all its lines.

    Args:
        code: The code.
        argument: Its argument, as JSON.
        what: What the bar says.
        quiet: Print nothing.

    Raises:
        _FailedError: It ended with another exit code than 0.
    """
    lines: list[str] = []
    stack = failed = False
    command = [sys.executable, "-c", code, json.dumps(argument)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with (
        progress_bar(None, what, unit="", show=not quiet, uncounted=True),
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
        raise _FailedError(_reason(lines) or f"Python ended with exit code {child.returncode}")
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
