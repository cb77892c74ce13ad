"""`pyrnode install-julia` with the real juliapkg and a Julia that pretends: what is asked of it, and how it fails."""

from __future__ import annotations

import json
import shutil
import ssl
import tomllib
from collections import namedtuple
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

from pyrnode import cli, julia_install, julia_setup, progress
from pyrnode.errors import EngineUnavailableError
from pyrnode.julia_install import install
from tests.fake_julia import GPU_VERSIONS, VERSIONS, FakeJulia

pytest.importorskip("juliapkg", reason="juliacall is not installed (the extra `julia`)")

PASSES = "print('self-test: 1.0 of 1.0')"
COMPILES = "import os; open(os.environ['PYTHON_JULIACALL_TRACE_COMPILE'], 'w').write('precompile(sin)')"


@pytest.fixture
def julia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJulia]:
    """Julia where juliapkg finds it, its packages not installed yet, and a network that has them."""
    from juliapkg.state import reset_state

    fake = FakeJulia(tmp_path, monkeypatch)
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 19, 0))
    fake.of_juliapkg()
    offer(fake, VERSIONS)
    monkeypatch.setattr(julia_install, "_SELF_TEST", PASSES)
    monkeypatch.setattr(julia_install, "_EXERCISE", COMPILES)
    monkeypatch.syspath_prepend(str(Path(julia_setup.__file__).parents[1]))  # as an installed pyrnode is
    yield fake
    monkeypatch.undo()
    reset_state()
    julia_setup.status.cache_clear()


def offer(fake: FakeJulia, versions: dict[str, str]) -> None:
    """What the fake Pkg resolves to."""
    fake.write(versions, manifest=fake.bin / "Manifest.toml")
    (fake.project / "Project.toml").unlink()


def scripts(fake: FakeJulia) -> list[str]:
    """The Pkg scripts that Julia was given."""
    return [call[-1] for call in fake.calls() if "Pkg.add" in call[-1]]


def test_julia_is_installed_tested_and_then_left_alone(julia: FakeJulia, capfd: pytest.CaptureFixture[str]) -> None:
    assert julia.status().remedy == "pyrnode install-julia"
    install()
    assert julia_setup.status().ready
    assert julia_setup.status().packages == VERSIONS
    project = tomllib.loads((julia.project / "Project.toml").read_text())
    ours = {name: need.uuid for name, need in julia_setup.needs().items()}
    assert project["deps"].items() >= ours.items()
    assert project["compat"]["PythonCall"] == "=0.9.34"  # juliacall's own need, joined with ours
    assert project["compat"]["OrdinaryDiffEqLowStorageRK"] == "^1.15, ^2, ^3"
    assert "CUDA" not in project["deps"]
    out = capfd.readouterr().out
    assert "Resolving package versions..." in out
    assert out.splitlines()[-1] == "self-test: 1.0 of 1.0"
    (script,) = scripts(julia)
    assert "Pkg.precompile()" in script

    julia.patch.setenv("PYTHON_JULIAPKG_OFFLINE", "yes")  # nothing is needed any more
    install()
    assert len(scripts(julia)) == 1
    assert capfd.readouterr().out.splitlines() == [
        f"Julia 1.10.8 at {julia.executable} with its packages in {julia.project}",
        "Compiling and testing",
        "self-test: 1.0 of 1.0",
    ]


def test_cuda_is_added_to_the_same_project(julia: FakeJulia) -> None:
    install()
    offer_both = VERSIONS | GPU_VERSIONS
    julia.write(offer_both, manifest=julia.bin / "Manifest.toml")
    install(cuda=True)
    assert julia_setup.status().has_cuda
    assert julia_setup.status().packages == offer_both
    added = json.loads((julia.project / "pyjuliapkg" / "juliapkg.json").read_text())["packages"]
    assert added == {
        name: {"uuid": need.uuid, "version": need.bounds} for name, need in julia_setup.needs(gpu=True).items()
    }
    assert len(scripts(julia)) == 2
    install(cuda=True)
    install()
    assert len(scripts(julia)) == 2


def test_the_command_installs(julia: FakeJulia, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["install-julia", "--no-sysimage"]) == 0
    assert capfd.readouterr().out.endswith("self-test: 1.0 of 1.0\n")
    assert julia.images() == []
    assert cli.main(["install-julia"]) == 0
    assert capfd.readouterr().out.endswith("self-test: 1.0 of 1.0\n")
    assert len(julia.images()) == 1
    assert cli.main(["install-julia", "--quiet"]) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("self-test: 1.0 of 1.0\n", "")
    (julia.bin / "error").write_text("ERROR: nothing works\n")
    (julia.project / "Manifest.toml").unlink()
    assert cli.main(["install-julia"]) == 1
    err = capfd.readouterr().err
    said = err.replace("\r", "\n").splitlines()[-1]  # under the bar
    assert said == "pyrnode: juliapkg could not install Julia's packages: nothing works"


def test_a_bar_shows_that_julia_is_at_work(
    julia: FakeJulia, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.setattr(julia_install, "_SELF_TEST", f"import time; time.sleep(0.5); {PASSES}")
    install()
    captured = capfd.readouterr()
    assert "install-julia: test, not measured before [00:00]" in captured.err
    assert "install-julia: test of the image, not measured before [00:00]" in captured.err
    install()
    assert "install-julia: test of the image, usually 1 s [00:00]" in capfd.readouterr().err
    assert "install-julia" not in captured.out


FAILURES = {
    "julia": (
        "ERROR: Unsatisfiable requirements detected for package Lux [b2108857]:\n restricted to versions 1.31\n"
        "Stacktrace:\n [1] resolve(a::Int)\n   @ Pkg /julia/Pkg.jl:12\n"
        "[7] signal (11.1): Segmentation fault\nsignal (11) thread (1) f [1] at julia.h:776\n",
        "juliapkg could not install Julia's packages: Unsatisfiable requirements detected for package Lux [b2108857]:\n"
        " restricted to versions 1.31",
    ),
    "network": (
        "ERROR: could not download https://pkg.julialang.org/registries:\nRequestError: Could not resolve host: pkg\n"
        "Stacktrace:\n [1] f()\n",
        "Julia's packages cannot be downloaded: could not download https://pkg.julialang.org/registries:\n"
        "RequestError: Could not resolve host: pkg; check the network (or set https_proxy), "
        "then run again: pyrnode install-julia",
    ),
    "disk": (
        "ERROR: IOError: write: no space left on device (ENOSPC)\nStacktrace:\n [1] f()\n",
        "no space is left for Julia's packages: IOError: write: no space left on device (ENOSPC); free some, "
        "then run again: pyrnode install-julia",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_julias_message_is_kept_and_its_stack_is_not(
    julia: FakeJulia, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    printed, expected = FAILURES[name]
    (julia.bin / "error").write_text(printed)
    with pytest.raises(EngineUnavailableError) as raised:
        install()
    assert str(raised.value) == expected
    out = capfd.readouterr().out
    assert "Resolving package versions..." in out
    assert "[1]" not in out
    assert "Traceback" not in out
    assert "CalledProcessError" not in out
    assert not julia.status().ready


def test_an_error_of_juliapkgs_own_is_kept(julia: FakeJulia) -> None:
    julia.executable.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(EngineUnavailableError) as raised:
        install()
    text = f"juliapkg_exe={julia.executable} is not a Julia executable."
    assert str(raised.value) == f"juliapkg could not install Julia's packages: {text}"


def test_what_is_installed_must_be_what_is_needed(julia: FakeJulia) -> None:
    offer_old = VERSIONS | {"Lux": "1.2.0"}
    julia.write(offer_old, manifest=julia.bin / "Manifest.toml")
    with pytest.raises(EngineUnavailableError, match=r"Lux is 1\.2\.0, not within 1\.31"):
        install()


def test_offline_is_respected(julia: FakeJulia) -> None:
    julia.patch.setenv("PYTHON_JULIAPKG_OFFLINE", "yes")
    remedy = "env -u PYTHON_JULIAPKG_OFFLINE pyrnode install-julia"
    with pytest.raises(EngineUnavailableError, match=remedy):
        install()
    assert julia.calls() == []


@pytest.mark.parametrize(("free", "cuda", "needed"), [(2.5, False, 3), (7.5, True, 8)])
def test_a_full_disk_is_said_before_anything_is_downloaded(
    julia: FakeJulia, free: float, cuda: bool, needed: int
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    julia.patch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, int(free * 2**30)))
    message = f"{julia.project} has {free} GiB of free space and Julia's packages need {needed} GiB"
    with pytest.raises(EngineUnavailableError, match=message):
        install(cuda=cuda)
    assert julia.calls() == []


def test_nothing_is_installed_into_a_julia_of_the_users_own(julia: FakeJulia) -> None:
    julia.write({name: version for name, version in VERSIONS.items() if name != "Zygote"})
    julia.named()
    with pytest.raises(EngineUnavailableError) as raised:
        install()
    remedy = julia_setup.add_command(julia_setup.status())
    assert '[("Zygote", "0.7.10")]' in remedy
    detail = f"in the Julia project {julia.project}, Zygote is not in it"
    message = f"pyrnode installs nothing into a Julia that you have named: {detail}; run: {remedy}"
    assert str(raised.value) == message
    assert {tuple(call) for call in julia.calls()} == {("--version",)}
    julia.patch.delenv("PYTHON_JULIACALL_PROJECT")
    with pytest.raises(EngineUnavailableError, match="run: unset PYTHON_JULIACALL_EXE"):
        install()


def test_an_own_julia_is_tested_and_asked_for_its_gpu_packages(
    julia: FakeJulia, capfd: pytest.CaptureFixture[str]
) -> None:
    julia.write(VERSIONS | {"CUDA": "5.9.7"})
    julia.named()
    install()
    assert capfd.readouterr().out.endswith("self-test: 1.0 of 1.0\n")
    with pytest.raises(EngineUnavailableError, match="lacks the packages for a GPU") as raised:
        install(cuda=True)
    gpu = julia_setup.needs(gpu=True)
    assert f'[("LuxCUDA", "{gpu["LuxCUDA"].bounds}"), ("cuDNN", "{gpu["cuDNN"].bounds}")]' in str(raised.value)
    julia.write(VERSIONS | GPU_VERSIONS)
    install(cuda=True, sysimage=False)
    assert {tuple(call) for call in julia.calls() if len(call) < 5} == {("--version",)}
    assert len(julia.images()) == 1  # which is no part of the user's project


def test_a_failed_self_test_is_an_error_with_its_message(julia: FakeJulia, capfd: pytest.CaptureFixture[str]) -> None:
    julia.patch.setattr(julia_install, "_SELF_TEST", "print('starts')\nraise RuntimeError('l is 0.5, expected 1.0')")
    with pytest.raises(EngineUnavailableError) as raised:
        install()
    assert str(raised.value) == ("the Julia engine is installed, but its self-test failed: l is 0.5, expected 1.0")
    assert capfd.readouterr().out.splitlines()[-1] == "starts"
    julia.patch.setattr(julia_install, "_SELF_TEST", "import os; os._exit(3)")
    with pytest.raises(EngineUnavailableError, match="Python ended with exit code 3"):
        install()


def test_without_juliacall(julia: FakeJulia) -> None:
    julia.patch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailableError) as raised:
        install()
    assert str(raised.value) == "juliacall is not installed; run: pip install 'pyrnode[julia]'"
