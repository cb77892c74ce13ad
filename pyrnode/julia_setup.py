"""Whether the Julia engine can be started, and how: found out without starting it, and without touching the network.

Julia and its packages come from one of two places: `pyrnode install-julia` had juliapkg install them, or the user names
an own Julia and project with juliacall's variables ``PYTHON_JULIACALL_EXE`` and ``PYTHON_JULIACALL_PROJECT``. In both
cases juliacall is later given the executable and the project by name, so that juliapkg, which resolves and downloads
whenever any package on ``sys.path`` has changed its needs, takes no part in running the engine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from pyrnode.errors import EngineUnavailableError

PIP_INSTALL = "pip install 'pyrnode[julia]'"
INSTALL = "pyrnode install-julia"

_EXE, _PROJECT = "PYTHON_JULIACALL_EXE", "PYTHON_JULIACALL_PROJECT"
_UNSET = f"unset {_EXE} {_PROJECT}"


class Need(NamedTuple):
    """A Julia package that the engine needs: UUID, and bounds as Julia writes them (`None`: a standard library)."""

    uuid: str
    bounds: str | None


@dataclass(frozen=True)
class JuliaStatus:
    """What there is of Julia.

    Attributes:
        ready: Whether the engine can be started now, offline.
        detail: What was found, or why it is not ready; one sentence without a full stop.
        remedy: One command that mends it, where there is one.
        executable: Path of the Julia executable.
        project: Folder of the Julia project that holds the packages.
        version: Version of that Julia.
        juliacall: Version of juliacall.
        packages: Versions of what the project holds of the packages that the engine needs or can use, without the
            standard library.
        own: Whether the user named Julia and project, rather than letting juliapkg install them.
    """

    ready: bool
    detail: str
    remedy: str | None = None
    executable: str | None = None
    project: str | None = None
    version: str | None = None
    juliacall: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    own: bool = False

    @property
    def explanation(self) -> str:
        """`detail` and `remedy` as one sentence, for errors."""
        return self.detail if self.remedy is None else f"{self.detail}; run: {self.remedy}"

    @property
    def has_cuda(self) -> bool:
        """Whether the project holds what the engine needs for a GPU."""
        return needs(gpu=True).keys() <= self.packages.keys()


class _NotReadyError(Exception):
    """Why Julia is not ready, and the command that helps: `None` for installing what is missing, wherever that is."""

    def __init__(self, detail: str, remedy: str | None = None) -> None:
        super().__init__(detail)
        self.detail, self.remedy = detail, remedy


# --- what we need ---


def sources() -> Path:
    """The folder of the Julia package RNODE: inside the Python package in a wheel, beside it in a checkout.

    Raises:
        EngineUnavailableError: It is in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "julia", package.parent / "julia"):
        if (folder / "src" / "RNODE.jl").is_file():
            return folder
    raise EngineUnavailableError(
        f"the Julia sources (julia/src/RNODE.jl) are missing from {package}; run: pip install --force-reinstall pyrnode"
    )


def _needs_file() -> dict[str, Any]:
    text = (Path(__file__).resolve().parent / "juliapkg.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def needs(*, gpu: bool = False) -> dict[str, Need]:
    """The Julia packages that the engine needs, or those that it needs besides for a GPU, from ``juliapkg.json``.

    juliapkg finds the file by itself and installs its ``packages``; it does not know the key ``gpu``.
    """
    table = _needs_file()["gpu" if gpu else "packages"]
    return {name: Need(entry["uuid"], entry.get("version")) for name, entry in table.items()}


# --- where Julia is ---


def option(name: str) -> str | None:
    """An option of juliacall, which takes ``-X juliacall-name=value`` before the environment."""
    value = sys._xoptions.get(f"juliacall-{name.replace('_', '-')}")
    return value if isinstance(value, str) else os.environ.get(f"PYTHON_JULIACALL_{name.upper()}")


def is_named() -> bool:
    """Whether the user names an own Julia or project, rightly or wrongly."""
    return option("exe") is not None or option("project") is not None


def _named() -> tuple[str, str] | None:
    """The executable and the project that the user names, `None` where neither is named."""
    if not is_named():
        return None
    executable, project = option("exe"), option("project")
    if executable is None or project is None:
        given, missing = (_EXE, _PROJECT) if project is None else (_PROJECT, _EXE)
        raise _NotReadyError(f"{given} is set but {missing} is not, and juliacall needs both", f"unset {given}")
    found = shutil.which(executable)
    if found is None:
        raise _NotReadyError(f"{_EXE} = {executable!r} is not an executable", _UNSET)
    if not Path(project).is_dir():
        raise _NotReadyError(f"{_PROJECT} = {project!r} is not a folder", _UNSET)
    return os.path.abspath(found), os.path.abspath(project)


def _installed() -> tuple[str, str]:
    """The executable and the project of juliapkg, where it has installed them."""
    try:
        from juliapkg import deps, state

        meta = deps.load_meta()
    except Exception as error:  # a variable with a value that it does not know is a bare `Exception` of juliapkg's
        variable = re.search(r"PYTHON_JULIA\w+", str(error))
        remedy = f"unset {variable.group()}" if variable else None
        raise _NotReadyError(f"juliapkg cannot be asked: {error}", remedy) from error
    if meta is None:
        raise _NotReadyError("juliacall is installed, but Julia and its packages are not")
    executable, wanted = str(meta["executable"]), state.STATE["override_executable"]
    if wanted is not None and wanted != meta["override_executable"]:
        raise _NotReadyError(f"PYTHON_JULIAPKG_EXE = {wanted!r}, but the packages were installed with {executable}")
    if shutil.which(executable) is None:
        raise _NotReadyError(f"Julia was installed as {executable}, but is no longer there")
    return executable, str(state.STATE["project"])


# --- whether it is what we need ---


def _check_julia(executable: str) -> str:
    """Version of a Julia that juliacall, Python's OpenSSL and we can work with."""
    from juliapkg.compat import Compat
    from juliapkg.deps import openssl_compat
    from juliapkg.find_julia import julia_version

    version, bounds, other = julia_version(executable), _needs_file()["julia"], _UNSET if is_named() else INSTALL
    if version is None:
        raise _NotReadyError(f"{executable} does not run as a Julia", other)
    if version not in Compat.parse(bounds):
        raise _NotReadyError(f"{executable} is Julia {version}, which is not within {bounds}", other)
    cap = openssl_compat()[1]
    if cap is not None and version not in Compat.parse(cap):
        needed = f"Julia {version} needs OpenSSL 3.5, but this Python has {openssl_version()}"
        raise _NotReadyError(f"{needed}: a Julia within {cap} is needed, or a Python with a newer OpenSSL", other)
    return str(version)


def openssl_version() -> str:
    """Version of the OpenSSL that Python has loaded and that Julia has to share."""
    import ssl

    return ssl.OPENSSL_VERSION


def _read_toml(project: Path, names: list[str]) -> dict[str, Any]:
    """The first of the files that is there, as Julia looks for it."""
    path = next((project / name for name in names if (project / name).is_file()), None)
    if path is None:
        raise _NotReadyError(f"{project} holds no {names[-1]}: its packages are not installed")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _NotReadyError(f"{path} cannot be read: {error}") from error


def _manifest(project: Path, julia: str) -> dict[str, Any]:
    minor = ".".join(julia.split(".")[:2])
    names = [f"{stem}{mark}.toml" for mark in (f"-v{minor}", "") for stem in ("JuliaManifest", "Manifest")]
    manifest = _read_toml(project, names)
    made_by = str(manifest.get("julia_version", julia))
    if made_by.split(".")[:2] != julia.split(".")[:2]:
        raise _NotReadyError(f"the Manifest of {project} was made by Julia {made_by}, but Julia is {julia}")
    return manifest


def _entries(project: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries in the Manifest of the packages that we need or can use, where the project names them itself.

    What is there only because another package needs it cannot be loaded by name.
    """
    named = _read_toml(project, ["JuliaProject.toml", "Project.toml"]).get("deps", {})
    uuids = {name: need.uuid for name, need in (needs() | needs(gpu=True)).items() if need.bounds is not None}
    table = manifest.get("deps", {})
    return {
        name: entry
        for name, uuid in uuids.items()
        for entry in table.get(name, ())
        if entry.get("uuid") == uuid == named.get(name)
    }


def _wanting(packages: dict[str, str], bounds: dict[str, str]) -> dict[str, str]:
    """Which of the bounds are not met, and how each fails."""
    from juliapkg.compat import Compat, Version

    lacks = {name: "is not in it" for name in bounds if name not in packages}
    for name in bounds.keys() - lacks.keys():
        if Version.parse(packages[name]) not in Compat.parse(bounds[name]):
            lacks[name] = f"is {packages[name]}, not within {bounds[name]}"
    return dict(sorted(lacks.items()))


def _bounds(juliacall: str, *, gpu: bool = False) -> dict[str, str]:
    """Bounds of the packages that we need; the two halves of the bridge must be of one version."""
    wanted = needs() | (needs(gpu=True) if gpu else {})
    return {name: need.bounds for name, need in wanted.items() if need.bounds} | {"PythonCall": f"={juliacall}"}


def _check_packages(entries: dict[str, dict[str, Any]], packages: dict[str, str], found: JuliaStatus) -> None:
    bounds = _bounds(str(found.juliacall))
    lacks = _wanting(packages, bounds)
    if list(lacks) == ["PythonCall"] and "PythonCall" in packages:
        detail = f"juliacall is {found.juliacall}, but the Julia project has PythonCall {packages['PythonCall']}"
        remedy = f"pip install juliacall=={packages['PythonCall']}" if found.own else None
        raise _NotReadyError(f"{detail}, and the two must be equal", remedy)
    if lacks:
        raise _NotReadyError(
            f"in the Julia project {found.project}, " + "; ".join(f"{n} {w}" for n, w in lacks.items())
        )
    looked_in = depots()
    for name in bounds:  # an entry without a tree is under development in a folder of its own
        if "git-tree-sha1" in entries[name] and not any((depot / "packages" / name).is_dir() for depot in looked_in):
            looked = " or ".join(map(str, looked_in))
            raise _NotReadyError(f"the files of {name} are not in {looked}, where Julia will look (JULIA_DEPOT_PATH)")


def depots() -> list[Path]:
    """The folders in which Julia, started from this process, looks for packages."""
    listed = os.environ.get("JULIA_DEPOT_PATH", "").split(os.pathsep)
    return [Path(entry).expanduser() if entry else Path.home() / ".julia" for entry in listed]


def add_command(found: JuliaStatus, *, cuda: bool = False) -> str:
    """The one command that adds to a Julia project of the user's what the engine needs and it lacks.

    Args:
        found: The Julia and the project.
        cuda: Also the packages for a GPU.
    """
    bounds = _bounds(str(found.juliacall), gpu=cuda)
    specs = ", ".join(f'("{name}", "{bounds[name]}")' for name in _wanting(found.packages, bounds))
    add = f"Pkg.add([Pkg.PackageSpec(name=n, version=Pkg.Versions.semver_spec(v)) for (n, v) in [{specs}]])"
    code = f"import Pkg; {add if specs else 'Pkg.instantiate()'}"
    return shlex.join([found.executable or "julia", f"--project={found.project}", "-e", code])


# --- the answer ---


def _examine(found: JuliaStatus) -> JuliaStatus:
    """Fills in `found`, one thing after the other, until something is amiss."""
    try:
        named = _named()
        executable, project = named or _installed()
        found = replace(found, executable=executable, project=project, own=named is not None)
        found = replace(found, version=_check_julia(executable))
        entries = _entries(Path(project), _manifest(Path(project), str(found.version)))
        found = replace(found, packages={name: str(entry["version"]) for name, entry in entries.items()})
        _check_packages(entries, found.packages, found)
    except _NotReadyError as reason:
        remedy = reason.remedy or (add_command(found) if found.own else INSTALL)
        return replace(found, detail=reason.detail, remedy=remedy)
    detail = f"Julia {found.version} at {found.executable} with its packages in {found.project}"
    return replace(found, ready=True, detail=detail)


@cache
def status() -> JuliaStatus:
    """Whether the Julia engine can be started now, offline; takes milliseconds, and is remembered.

    `status.cache_clear()` forgets it, after an installation or a change of the environment variables.
    """
    if util.find_spec("juliacall") is None or util.find_spec("juliapkg") is None:
        return JuliaStatus(False, "juliacall is not installed", PIP_INSTALL)
    try:
        juliacall = metadata.version("juliacall")
    except metadata.PackageNotFoundError:
        return JuliaStatus(False, "juliacall is there, but not as an installed package", PIP_INSTALL)
    return _examine(JuliaStatus(False, "", juliacall=juliacall))


def require() -> JuliaStatus:
    """The status, where it is ready.

    Raises:
        EngineUnavailableError: It is not; the message has the one command that helps.
    """
    found = status()
    if not found.ready:
        raise EngineUnavailableError(f"the Julia engine cannot be started: {found.explanation}")
    return found


def prepare_environment(threads: int, sysimage: Path | None = None) -> None:
    """Sets what juliacall reads when it is imported, except for what the user has set.

    Args:
        threads: Threads for Julia, unless ``JULIA_NUM_THREADS`` or ``PYTHON_JULIACALL_THREADS`` says otherwise.
        sysimage: The system image that Julia starts from, unless ``PYTHON_JULIACALL_SYSIMAGE`` names another; `None`
            for Julia's own.

    Raises:
        EngineUnavailableError: Julia is not ready: to import juliacall now would download it.
    """
    found = require()
    values = {
        "exe": found.executable,
        "project": found.project,
        "sysimage": None if sysimage is None else str(sysimage),
        "handle_signals": "yes",  # with more than one thread, Julia's collector stops the others by signals
        "startup_file": "no",
        "autoload_ipython_extension": "no",  # it would redirect Julia's output in every notebook
    }
    if "JULIA_NUM_THREADS" not in os.environ:
        values["threads"] = str(threads)
    for name, value in values.items():
        if value is not None and option(name) is None:
            os.environ[f"PYTHON_JULIACALL_{name.upper()}"] = value
