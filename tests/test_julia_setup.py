"""Whether Julia is ready: what is said of made-up installations, each with one thing wrong, and which command helps."""

from __future__ import annotations

import json
import os
import re
import shlex
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path

import pytest
import torch

from pyrnode import engines, julia_setup
from pyrnode.errors import EngineUnavailableError
from pyrnode.julia_setup import JuliaStatus
from tests.fake_julia import GPU_VERSIONS, VERSIONS, FakeJulia

pytest.importorskip("juliapkg", reason="juliacall is not installed (the extra `julia`)")

UNSET = "unset PYTHON_JULIACALL_EXE PYTHON_JULIACALL_PROJECT"


@pytest.fixture
def julia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJulia]:
    from juliapkg.state import reset_state

    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 19, 0))
    monkeypatch.setattr(ssl, "OPENSSL_VERSION", "OpenSSL 3.0.19 27 Jan 2026")
    yield FakeJulia(tmp_path, monkeypatch)
    monkeypatch.undo()
    reset_state()
    julia_setup.status.cache_clear()


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in VERSIONS.items() if name not in names}


# -- a Julia that the user names --------------------------------------------------------------------------------------


def test_an_own_julia_is_ready(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.named()
    assert julia.status() == JuliaStatus(
        ready=True,
        detail=f"Julia 1.10.8 at {julia.executable} with its packages in {julia.project}",
        executable=str(julia.executable),
        project=str(julia.project),
        version="1.10.8",
        juliacall="0.9.34",
        packages=VERSIONS,
        own=True,
    )
    assert not julia.status().has_cuda
    assert julia_setup.require() == julia.status()


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_takes_julia_where_it_is_ready(julia: FakeJulia, monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    julia.write(VERSIONS)
    julia.named()
    assert julia.status().ready
    monkeypatch.delenv("PYRNODE_ENGINE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert engines.choose("auto", "cpu") == ("julia", julia.status().detail)
    assert engines.choose("auto", "auto")[0] == ("torch" if gpu else "julia")  # without CUDA.jl
    assert engines.choose("auto", "cuda")[0] == "torch"


def test_julia_is_asked_for_its_version_once_and_nothing_else(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.patch.setenv("PYTHON_JULIACALL_EXE", str(julia.executable))
    julia.patch.setenv("PYTHON_JULIACALL_PROJECT", str(julia.project))
    julia_setup.status.cache_clear()
    assert julia_setup.status() is julia_setup.status()
    assert julia.calls() == [["--version"]]


def test_packages_for_a_gpu_are_seen(julia: FakeJulia) -> None:
    julia.write(VERSIONS | GPU_VERSIONS)
    julia.named()
    assert julia.status().packages == VERSIONS | GPU_VERSIONS
    assert julia.status().has_cuda
    julia.write({k: v for k, v in (VERSIONS | GPU_VERSIONS).items() if k != "LuxCUDA"})
    assert (julia.status().ready, julia.status().has_cuda) == (True, False)


@pytest.mark.parametrize(
    ("spoil", "detail", "remedy"),
    [
        (
            lambda j: j.patch.delenv("PYTHON_JULIACALL_PROJECT"),
            "PYTHON_JULIACALL_EXE is set but PYTHON_JULIACALL_PROJECT is not",
            "unset PYTHON_JULIACALL_EXE",
        ),
        (
            lambda j: j.patch.delenv("PYTHON_JULIACALL_EXE"),
            "PYTHON_JULIACALL_PROJECT is set but PYTHON_JULIACALL_EXE is not",
            "unset PYTHON_JULIACALL_PROJECT",
        ),
        (lambda j: j.executable.chmod(0o644), "is not an executable", UNSET),
        (lambda j: j.patch.setenv("PYTHON_JULIACALL_PROJECT", "/nowhere"), "'/nowhere' is not a folder", UNSET),
        (lambda j: j.executable.write_text("#!/bin/sh\nexit 1\n"), "does not run as a Julia", UNSET),
        (lambda j: j.version("1.9.4"), "is Julia 1.9.4, which is not within 1.10.3", UNSET),
        (
            lambda j: j.version("1.12.1"),
            "Julia 1.12.1 needs OpenSSL 3.5, but this Python has OpenSSL 3.0.19 27 Jan 2026: "
            "a Julia within 1 - 1.11 is needed",
            UNSET,
        ),
        (
            lambda j: j.write(VERSIONS | {"PythonCall": "0.9.33"}),
            "juliacall is 0.9.34, but the Julia project has PythonCall 0.9.33, and the two must be equal",
            "pip install juliacall==0.9.33",
        ),
    ],
    ids=["exe-only", "project-only", "no-exe", "no-project", "broken", "old", "openssl", "pythoncall"],
)
def test_what_can_be_wrong_with_an_own_julia(
    julia: FakeJulia, spoil: Callable[[FakeJulia], object], detail: str, remedy: str
) -> None:
    julia.write(VERSIONS)
    julia.named()
    assert julia.status().ready
    spoil(julia)
    found = julia.status()
    assert not found.ready
    assert detail in found.detail
    assert found.remedy == remedy
    with pytest.raises(EngineUnavailableError, match=re.escape(f"{found.detail}; run: {remedy}")):
        julia_setup.require()


def test_a_newer_openssl_allows_a_newer_julia(julia: FakeJulia) -> None:
    julia.version("1.12.1")
    julia.write(VERSIONS, julia_version="1.12.0")
    julia.named()
    assert not julia.status().ready
    julia.patch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 5, 0, 0, 0))
    assert julia.status().ready


def _add(julia: FakeJulia, **bounds: str) -> str:
    """The command that adds packages, written down in full; Pkg's `semver_spec` reads bounds as Project.toml does."""
    pairs = ", ".join(f'("{name}", "{bound}")' for name, bound in bounds.items())
    loop = f"Pkg.PackageSpec(name=n, version=Pkg.Versions.semver_spec(v)) for (n, v) in [{pairs}]"
    return f"{julia.executable} --project={julia.project} -e 'import Pkg; Pkg.add([{loop}])'"


def test_missing_packages_are_named_and_added_by_one_command(julia: FakeJulia) -> None:
    julia.write(without("Zygote", "PythonCall"))
    julia.named()
    assert (
        julia.status().detail == f"in the Julia project {julia.project}, PythonCall is not in it; Zygote is not in it"
    )
    assert julia.status().remedy == _add(julia, PythonCall="=0.9.34", Zygote="0.7.10")


def test_a_package_out_of_bounds_is_replaced(julia: FakeJulia) -> None:
    julia.write(VERSIONS | {"Lux": "1.30.9"})
    julia.named()
    assert julia.status().detail == f"in the Julia project {julia.project}, Lux is 1.30.9, not within 1.31"
    assert julia.status().remedy == _add(julia, Lux="1.31")


def test_what_only_another_package_needs_cannot_be_loaded_by_name(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.named()
    project = julia.project / "Project.toml"
    project.write_text(re.sub(r"^LuxCore = .*\n", "", project.read_text(), flags=re.MULTILINE))
    assert julia.status().detail == f"in the Julia project {julia.project}, LuxCore is not in it"


def test_a_package_of_the_same_name_is_not_the_package(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.named()
    uuid = julia_setup.needs()["DLPack"].uuid
    for file in ("Project.toml", "Manifest.toml"):
        path = julia.project / file
        path.write_text(path.read_text().replace(uuid, "00000000" + uuid[8:]))
    assert julia.status().detail == f"in the Julia project {julia.project}, DLPack is not in it"


def test_packages_must_be_in_a_depot(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.named()
    (julia.depot / "packages" / "Lux" / "abcde").rmdir()
    (julia.depot / "packages" / "Lux").rmdir()
    found = julia.status()
    assert found.detail.startswith(f"the files of Lux are not in {julia.depot}, where Julia will look")
    instantiate = [str(julia.executable), f"--project={julia.project}", "-e", "import Pkg; Pkg.instantiate()"]
    assert shlex.split(str(found.remedy)) == instantiate
    second = julia.home / "second" / "packages" / "Lux"
    second.mkdir(parents=True)
    julia.patch.setenv("JULIA_DEPOT_PATH", f"{julia.depot}{os.pathsep}{julia.home / 'second'}")
    assert julia.status().ready


def test_the_default_depot_is_in_the_home_folder(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.named()
    julia.depot.rename(julia.home / ".julia")
    julia.patch.setenv("HOME", str(julia.home))
    julia.patch.delenv("JULIA_DEPOT_PATH")
    assert julia.status().ready
    julia.patch.setenv("JULIA_DEPOT_PATH", f"/nowhere{os.pathsep}")  # an empty entry stands for it
    assert julia.status().ready


def test_a_package_under_development_is_in_no_depot(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.named()
    (julia.depot / "packages" / "Lux").rename(julia.home / "Lux")
    path = julia.project / "Manifest.toml"
    head, lux, rest = re.split(r"(\[\[deps\.Lux\]\][^\[]+)", path.read_text())
    path.write_text(head + re.sub(r"git-tree-sha1.*", f'path = "{julia.home / "Lux"}"', lux) + rest)
    assert julia.status().ready


def test_manifests(julia: FakeJulia) -> None:
    julia.write(VERSIONS, julia_version="1.11.2")
    julia.named()
    manifest = f"the Manifest of {julia.project} was made by Julia 1.11.2, but Julia is 1.10.8"
    assert julia.status().detail == manifest
    julia.write(VERSIONS, julia_version="1.10.2")
    assert julia.status().ready  # of the same minor version
    julia.write(without("Lux"))
    julia.write(VERSIONS, manifest=julia.project / "Manifest-v1.10.toml")
    assert julia.status().ready  # Julia's own order: that of its version first
    (julia.project / "Manifest-v1.10.toml").write_text("deps = [")
    assert f"{julia.project / 'Manifest-v1.10.toml'} cannot be read" in julia.status().detail
    for path in julia.project.glob("Manifest*"):
        path.unlink()
    assert julia.status().detail == f"{julia.project} holds no Manifest.toml: its packages are not installed"


def test_options_of_the_interpreter_come_before_the_environment(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.patch.setenv("PYTHON_JULIACALL_EXE", "/nowhere")
    julia.patch.setenv("PYTHON_JULIACALL_PROJECT", "/nowhere")
    options = {"juliacall-exe": str(julia.executable), "juliacall-project": str(julia.project)}
    julia.patch.setattr(sys, "_xoptions", options)
    assert julia.status().ready
    assert julia.status().project == str(julia.project)


# -- a Julia that juliapkg has installed ------------------------------------------------------------------------------


def test_what_juliapkg_has_installed_is_ready(julia: FakeJulia) -> None:
    julia.of_juliapkg()
    julia.meta()
    julia.write(VERSIONS)
    found = julia.status()
    assert (found.ready, found.own) == (True, False)
    assert (found.executable, found.project) == (str(julia.executable), str(julia.project))


@pytest.mark.parametrize(
    ("spoil", "detail"),
    [
        (lambda j: (j.project / "pyjuliapkg" / "meta.json").unlink(), "juliacall is installed, but Julia and its pack"),
        (lambda j: j.meta(meta_version=1), "juliacall is installed, but Julia and its packages are not"),
        (lambda j: (j.project / "pyjuliapkg" / "meta.json").write_text("{"), "juliapkg cannot be asked: "),
        (lambda j: j.meta(override_executable="/other/julia"), "PYTHON_JULIAPKG_EXE = "),
        (lambda j: j.executable.unlink(), "but is no longer there"),
        (lambda j: (j.project / "Manifest.toml").unlink(), "holds no Manifest.toml"),
        (lambda j: j.write(VERSIONS | {"PythonCall": "0.9.33"}), "has PythonCall 0.9.33, and the two must be equal"),
        (lambda j: j.version("1.9.0"), "is Julia 1.9.0, which is not within 1.10.3"),
    ],
    ids=["none", "old-meta", "bad-meta", "other-exe", "exe-gone", "no-manifest", "pythoncall", "old-julia"],
)
def test_install_julia_mends_what_juliapkg_has_installed(
    julia: FakeJulia, spoil: Callable[[FakeJulia], object], detail: str
) -> None:
    julia.of_juliapkg()
    julia.meta()
    julia.write(VERSIONS)
    spoil(julia)
    found = julia.status()
    assert not found.ready
    assert detail in found.detail
    assert found.remedy == "pyrnode install-julia"


def test_a_variable_that_juliapkg_refuses_is_named(tmp_path: Path) -> None:
    code = "from pyrnode.julia_setup import status; s = status(); print(s.ready, s.detail, s.remedy, sep='|')"
    names = ("PYTHON_JULIACALL_EXE", "PYTHON_JULIACALL_PROJECT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHON_JULIAPKG_PROJECT": "relative", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    detail = "juliapkg cannot be asked: PYTHON_JULIAPKG_PROJECT must be an absolute path"
    assert out.strip() == f"False|{detail}|unset PYTHON_JULIAPKG_PROJECT"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["juliacall", "juliapkg"])
def test_without_juliacall(julia: FakeJulia, missing: str) -> None:
    julia.patch.setattr(util, "find_spec", lambda name: None if name == missing else object())
    assert julia.status() == JuliaStatus(False, "juliacall is not installed", "pip install 'pyrnode[julia]'")


# -- what juliacall is told -------------------------------------------------------------------------------------------


def _juliacall_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("PYTHON_JULIACALL_")}


def test_the_environment_is_prepared(julia: FakeJulia) -> None:
    julia.of_juliapkg()
    julia.meta()
    julia.write(VERSIONS)
    julia.status()
    julia.patch.setattr(os, "environ", dict(os.environ))
    for name in _juliacall_variables():
        del os.environ[name]
    before = dict(os.environ)
    julia_setup.prepare_environment(threads=3)
    assert {name: value for name, value in os.environ.items() if name not in before} == {
        "PYTHON_JULIACALL_EXE": str(julia.executable),
        "PYTHON_JULIACALL_PROJECT": str(julia.project),
        "PYTHON_JULIACALL_HANDLE_SIGNALS": "yes",
        "PYTHON_JULIACALL_STARTUP_FILE": "no",
        "PYTHON_JULIACALL_AUTOLOAD_IPYTHON_EXTENSION": "no",
        "PYTHON_JULIACALL_THREADS": "3",
    }
    assert before.items() <= os.environ.items()


def test_what_the_user_has_set_stays(julia: FakeJulia) -> None:
    julia.write(VERSIONS)
    julia.patch.setattr(os, "environ", dict(os.environ))
    julia.named()
    mine = {"HANDLE_SIGNALS": "no", "STARTUP_FILE": "yes", "AUTOLOAD_IPYTHON_EXTENSION": "yes"}
    mine = {f"PYTHON_JULIACALL_{name}": value for name, value in mine.items()}
    os.environ.update(mine | {"JULIA_NUM_THREADS": "7"})
    before = dict(os.environ)
    julia_setup.prepare_environment(threads=3)
    assert dict(os.environ) == before
    del os.environ["JULIA_NUM_THREADS"], os.environ["PYTHON_JULIACALL_HANDLE_SIGNALS"]
    julia.patch.setattr(sys, "_xoptions", {"juliacall-threads": "5", "juliacall-handle-signals": "no"})
    before = dict(os.environ)
    julia_setup.prepare_environment(threads=3)
    assert dict(os.environ) == before


def test_an_environment_is_not_prepared_for_a_julia_that_is_not_ready(julia: FakeJulia) -> None:
    julia.of_juliapkg()
    julia.status()
    julia.patch.setattr(os, "environ", dict(os.environ))
    before = dict(os.environ)
    with pytest.raises(EngineUnavailableError, match="run: pyrnode install-julia"):
        julia_setup.prepare_environment(threads=2)
    assert dict(os.environ) == before


def test_juliacall_reads_every_variable_that_is_set() -> None:
    spec = util.find_spec("juliacall")  # its source, which does not import it
    assert spec is not None
    source = Path(str(spec.origin)).read_text(encoding="utf-8")
    for name in ("exe", "project", "handle_signals", "startup_file", "autoload_ipython_extension", "threads"):
        assert re.search(rf"(option|choice)\('{name}'", source), name


# -- what we need, and where it is ------------------------------------------------------------------------------------


def test_julia_sources_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert julia_setup.sources() == Path(__file__).parents[1] / "julia"
    package = tmp_path / "pyrnode"
    (package / "julia" / "src").mkdir(parents=True)
    monkeypatch.setattr(julia_setup, "__file__", str(package / "julia_setup.py"))
    with pytest.raises(EngineUnavailableError, match=r"julia/src/RNODE\.jl"):
        julia_setup.sources()
    (package / "julia" / "src" / "RNODE.jl").touch()
    assert julia_setup.sources() == package / "julia"


def test_needs_are_those_of_the_file() -> None:
    table = json.loads((Path(julia_setup.__file__).parent / "juliapkg.json").read_text())
    assert {name: (need.uuid, need.bounds) for name, need in julia_setup.needs().items()} == {
        name: (entry["uuid"], entry.get("version")) for name, entry in table["packages"].items()
    }
    assert set(julia_setup.needs(gpu=True)) == {"CUDA", "cuDNN", "LuxCUDA"}
    assert {name for name, need in julia_setup.needs().items() if need.bounds is None} <= {
        "LinearAlgebra",
        "Random",
    }
