"""A Julia that is not one: a script that answers what juliapkg asks, and a project and a depot as Pkg makes them."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pyrnode import julia_setup

VERSIONS = {
    "ADTypes": "1.22.2",
    "ChainRulesCore": "1.26.1",
    "ComponentArrays": "0.15.42",
    "DLPack": "0.3.1",
    "DiffEqFlux": "4.4.0",
    "JSON": "1.6.1",
    "Lux": "1.31.2",
    "LuxCore": "1.5.3",
    "MLDataDevices": "1.17.10",
    "NNlib": "0.9.31",
    "OrdinaryDiffEqAdamsBashforthMoulton": "1.11.0",
    "OrdinaryDiffEqBDF": "1.26.0",
    "OrdinaryDiffEqFeagin": "1.10.0",
    "OrdinaryDiffEqFIRK": "1.26.0",
    "OrdinaryDiffEqHighOrderRK": "1.12.0",
    "OrdinaryDiffEqLowOrderRK": "1.13.0",
    "OrdinaryDiffEqLowStorageRK": "1.15.0",
    "OrdinaryDiffEqRosenbrock": "1.31.1",
    "OrdinaryDiffEqSDIRK": "1.14.0",
    "OrdinaryDiffEqSSPRK": "1.14.0",
    "OrdinaryDiffEqStabilizedRK": "1.11.1",
    "OrdinaryDiffEqTsit5": "1.12.0",
    "OrdinaryDiffEqVerner": "1.14.0",
    "PrecompileTools": "1.2.1",
    "PythonCall": "0.9.34",
    "SciMLBase": "2.155.1",
    "SciMLSensitivity": "7.106.0",
    "SpecialFunctions": "2.8.0",
    "Zygote": "0.7.12",
}
"""What the engine was developed with: resolved by Pkg, and run."""

GPU_VERSIONS = {"CUDA": "5.9.7", "LuxCUDA": "0.3.6", "cuDNN": "1.4.6"}

SCRIPT = """#!{python} -IS
import os, shutil, sys
from pathlib import Path
here = Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(repr(sys.argv[1:]) + "\\n")
if sys.argv[1:] == ["--version"]:
    print("julia version", (here / "version").read_text())
elif "Libdl.dlpath" in sys.argv[-1]:
    print(here / "libjulia.so", here, sep="\\0", end="")
elif "Pkg.add" in sys.argv[-1]:
    print("   Resolving package versions...", flush=True)
    if (here / "error").exists():
        sys.exit((here / "error").read_text())
    (project,) = [a.removeprefix("--project=") for a in sys.argv if a.startswith("--project=")]
    shutil.copy(here / "Manifest.toml", project)
elif sys.argv[-5].endswith("image.jl"):
    print("PackageCompiler: compiling incremental system image", flush=True)
    if (here / "image-error").exists():
        sys.exit((here / "image-error").read_text())
    Path(sys.argv[-1]).write_bytes(b"image of " + Path(sys.argv[-2]).read_bytes())
else:
    sys.exit("ERROR: the fake Julia does not know " + sys.argv[-1])
"""


class FakeJulia:
    """Writes the files; what is wrong with them is for the tests to arrange."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home, self.patch = home, patch
        self.bin, self.project, self.depot = home / "bin", home / "project", home / "depot"
        for folder in (self.bin, self.project, self.depot):
            folder.mkdir()
        self.executable = self.bin / "julia"
        self.executable.write_text(SCRIPT.format(python=sys.executable))
        self.executable.chmod(0o755)
        self.version("1.10.8")
        for name in [*VERSIONS, *GPU_VERSIONS]:
            (self.depot / "packages" / name / "abcde").mkdir(parents=True)
        for name in ("PYTHON_JULIAPKG_OFFLINE", "JULIA_NUM_THREADS", "PYTHON_JULIACALL_THREADS"):
            patch.delenv(name, raising=False)
        patch.setenv("JULIA_DEPOT_PATH", str(self.depot))
        patch.setattr("importlib.metadata.version", lambda name: {"juliacall": "0.9.34"}[name])

    def version(self, version: str) -> None:
        (self.bin / "version").write_text(version)

    def images(self) -> list[list[str]]:
        """What was given to the script that builds an image, each time."""
        return [call[-4:] for call in self.calls() if len(call) > 4 and call[-5].endswith("image.jl")]

    def calls(self) -> list[list[str]]:
        """Arguments of every call so far."""
        path = self.bin / "calls"
        return [ast.literal_eval(line) for line in path.read_text().splitlines()] if path.exists() else []

    def named(self) -> None:
        """The user names this Julia and its project."""
        self.patch.setenv("PYTHON_JULIACALL_EXE", str(self.executable))
        self.patch.setenv("PYTHON_JULIACALL_PROJECT", str(self.project))
        self.status()

    def of_juliapkg(self) -> None:
        """Nobody names a Julia; juliapkg would take this one."""
        from juliapkg.state import reset_state

        for name in ("PYTHON_JULIACALL_EXE", "PYTHON_JULIACALL_PROJECT"):
            self.patch.delenv(name, raising=False)
        self.patch.setenv("PYTHON_JULIAPKG_EXE", str(self.executable))
        self.patch.setenv("PYTHON_JULIAPKG_PROJECT", str(self.project))
        reset_state()

    def write(self, versions: Mapping[str, str], *, manifest: Path | None = None, **changes: Any) -> None:
        """Project.toml and Manifest.toml with these packages; `changes` are of the Manifest's own keys."""
        uuids = {name: need.uuid for name, need in (julia_setup.needs() | julia_setup.needs(gpu=True)).items()}
        deps = {name: uuids[name] for name in versions}
        (self.project / "Project.toml").write_text(tomli_w.dumps({"deps": deps}))
        entries = {
            name: [{"uuid": uuids[name], "version": version, "git-tree-sha1": "0" * 40}]
            for name, version in versions.items()
        }
        table = {"julia_version": "1.10.8", "manifest_format": "2.0", "deps": entries} | changes
        (manifest or self.project / "Manifest.toml").write_text(tomli_w.dumps(table))

    def meta(self, **changes: Any) -> None:
        """What juliapkg writes when it has resolved."""
        from juliapkg.deps import META_VERSION

        meta = {
            "meta_version": META_VERSION,
            "version": "1.10.8",
            "executable": str(self.executable),
            "override_executable": str(self.executable),
        } | changes
        (self.project / "pyjuliapkg").mkdir(exist_ok=True)
        (self.project / "pyjuliapkg" / "meta.json").write_text(json.dumps(meta))

    def status(self) -> julia_setup.JuliaStatus:
        """The status as a new process would see it."""
        julia_setup.status.cache_clear()
        return julia_setup.status()
