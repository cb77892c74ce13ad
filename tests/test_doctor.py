"""The doctor: what it says of a made-up machine, word for word where a program or a user acts on it."""

from __future__ import annotations

import json
import os
import re
import shlex
import ssl
import subprocess
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyrnode import doctor, julia_image, julia_setup, native
from pyrnode.doctor import Check, diagnose, format_report
from pyrnode.julia_image import Image
from pyrnode.julia_setup import JuliaStatus

pytest.importorskip("juliapkg", reason="juliacall is not installed (the extra `julia`)")

INSTALLED = {"torchvision": "0.29.1", "pandas": "3.0", "pyarrow": "20.0", "tensorboard": "2.20", "h5py": "3.12"} | {
    "triton": "3.8.0"
}
READY = JuliaStatus(
    ready=True,
    detail="Julia 1.10.8 at /opt/julia/bin/julia with its packages in /opt/env",
    executable="/opt/julia/bin/julia",
    project="/opt/env",
    version="1.10.8",
    juliacall="0.9.34",
    packages={"Lux": "1.31.2", "PythonCall": "0.9.34", "CUDA": "5.9.7", "LuxCUDA": "0.3.6", "cuDNN": "1.4.6"},
)
IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


class Machine:
    """A machine on which all is well, to be spoilt by the tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        self.patch, self.home = monkeypatch, home
        monkeypatch.chdir(home)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PYRNODE_DATA", str(self.data("mnist-only", [f"MNIST/raw/{name}" for name in IDX])))
        monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        monkeypatch.setattr(doctor, "_CGROUP_CPU", home / "no-cgroup")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
        self.packages(INSTALLED)
        self.needs_torch("2.14.1")
        self.executables({})
        self.free(100)
        self.gpus("NVIDIA H100")
        for name in ("JULIA_NUM_THREADS", *(n for n in os.environ if n.startswith("PYTHON_JULIACALL_"))):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "juliacall"})
        self.julia(READY)
        image = Image(self.data("depot", ["image.so"]) / "image.so", datetime.now(UTC), 60.0)
        monkeypatch.setattr(julia_image, "find", lambda found: image)
        self.kernels(native.Status(True, "compiled by /usr/bin/cc"))

    def kernels(self, status: native.Status) -> None:
        self.patch.setattr(native, "status", lambda name: status)
        self.patch.setattr(native, "enabled", lambda: "turns" not in status.why)

    def julia(self, status: JuliaStatus) -> None:
        self.patch.setattr(julia_setup, "status", lambda: status)

    def packages(self, versions: Mapping[str, str]) -> None:
        self.patch.setattr("importlib.util.find_spec", lambda name: object() if name in versions else None)

        def version(name: str) -> str:
            if not versions[name]:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        self.patch.setattr("importlib.metadata.version", version)

    def needs_torch(self, version: str | None) -> None:
        needs = None if version is None else ["numpy", f"torch=={version}", "gdown>=4.7.3; extra == 'gdown'"]
        self.patch.setattr("importlib.metadata.requires", lambda name: needs)

    def executables(self, paths: Mapping[str, str]) -> None:
        self.patch.setattr("shutil.which", lambda name: paths.get(name))

    def free(self, gib: float) -> None:
        usage = namedtuple("usage", ["total", "used", "free"])
        self.patch.setattr("shutil.disk_usage", lambda path: usage(2**40, 0, int(gib * 2**30)))

    def gpus(self, *names: str, built_for: str | None = "13.0", warning: str | None = None) -> None:
        def is_available() -> bool:
            if warning:
                warnings.warn(warning, UserWarning, stacklevel=1)
            return bool(names)

        self.patch.setattr(torch.cuda, "is_available", is_available)
        self.patch.setattr(torch.cuda, "device_count", lambda: len(names))
        self.patch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
        self.patch.setattr(torch.version, "cuda", built_for)

    def data(self, name: str, files: list[str]) -> Path:
        for file in files:
            path = self.home / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return self.home / name


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def _find(name: str) -> Check:
    (check,) = (check for check in diagnose() if check.name == name)
    return check


def test_a_good_machine(machine: Machine) -> None:
    statuses = {check.name: check.status for check in diagnose()}
    assert statuses == {
        "Python": "ok",
        "torch": "ok",
        "CUDA": "ok",
        "torchvision": "ok",
        "pandas": "ok",
        "pyarrow": "ok",
        "tensorboard": "ok",
        "h5py": "ok",
        "Julia": "ok",
        "Julia packages": "ok",
        "Julia image": "ok",
        "CUDA.jl": "ok",
        "Julia threads": "ok",
        "OpenSSL": "ok",
        "import order": "ok",
        "kernels": "ok",
        "GPU kernels": "ok",
        "data": "ok",
        "disk": "ok",
        "working folder": "ok",
        "threads": "ok",
        "processes": "ok",
    }
    assert [check.remedy for check in diagnose()] == [None] * len(statuses)


def test_one_of_several_processes_says_where_it_is(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert _find("processes").detail == "one; torchrun starts several, which speak by gloo and nccl"
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    found = _find("processes")
    assert found.status == "note"
    assert "WORLD_SIZE = 8 without MASTER_ADDR and MASTER_PORT" in found.detail
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "1234")
    machine.gpus("a", "b", "c", "d")
    assert _find("processes") == Check("processes", "ok", "6 of 8, on this machine 2 of 4: nccl, cuda:2")
    machine.gpus("a", "b")  # NCCL refuses two processes on one
    assert _find("processes").detail == "6 of 8, on this machine 2 of 4: gloo, cuda:0"
    monkeypatch.setenv("RANK", "eight")
    assert _find("processes").status == "problem"


@pytest.mark.parametrize("name", ["pandas", "pyarrow", "tensorboard", "h5py"])
def test_a_missing_optional_package_is_a_note(machine: Machine, name: str) -> None:
    machine.packages({k: v for k, v in INSTALLED.items() if k != name})
    check = _find(name)
    assert (check.status, check.remedy) == ("note", f"pip install {name}")
    assert check.detail == f"not installed ({doctor.OPTIONAL[name]})"


def test_a_package_without_metadata_is_still_found(machine: Machine) -> None:
    machine.packages({**INSTALLED, "h5py": ""})
    assert _find("h5py") == Check("h5py", "ok", "of unknown version (reads the BSDS300 set)")


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("there is no C compiler (cc, gcc or clang)", None),
        ("PYRNODE_NATIVE=0 turns them off", "export PYRNODE_NATIVE=1"),
    ],
)
def test_without_kernels(machine: Machine, why: str, remedy: str | None) -> None:
    machine.kernels(native.Status(False, why))
    detail = f"{', '.join(native.NAMES)}: {why}; training on a CPU is slower without"
    assert _find("kernels") == Check("kernels", "note", detail, remedy)


def test_torch(machine: Machine) -> None:
    assert _find("torch") == Check("torch", "ok", "2.14.1+cu130, computes with 4 threads")
    machine.patch.setattr(torch, "__version__", "2.3.1")
    remedy = "pip install --upgrade 'torch>=2.4' torchvision"
    assert _find("torch") == Check("torch", "problem", "2.3.1 is older than 2.4", remedy)


def test_torchvision(machine: Machine) -> None:
    assert _find("torchvision") == Check("torchvision", "ok", "0.29.1")
    machine.needs_torch("2.9.0")
    detail = "0.29.1 is built for torch 2.9.0, but torch is 2.14.1+cu130"
    upgrade = "pip install --upgrade torch torchvision"
    assert _find("torchvision") == Check("torchvision", "problem", detail, upgrade)
    machine.needs_torch(None)  # packages that do not say
    assert _find("torchvision").status == "ok"
    machine.packages({})
    check = _find("torchvision")
    assert (check.status, check.remedy) == ("problem", "pip install torchvision")


def test_cuda(machine: Machine) -> None:
    machine.gpus("NVIDIA H100", "NVIDIA T4")
    assert _find("CUDA") == Check("CUDA", "ok", "13.0: NVIDIA H100, NVIDIA T4")
    machine.gpus()
    assert _find("CUDA") == Check("CUDA", "note", "no GPU found: pyrnode computes on the CPU")
    machine.gpus(warning="The NVIDIA driver on your system is too old (found version 11040).\nPlease update")
    check = _find("CUDA")
    assert (check.status, check.remedy) == ("problem", "nvidia-smi")
    assert check.detail.endswith("on the CPU: The NVIDIA driver on your system is too old (found version 11040).")
    machine.gpus(built_for=None)
    assert _find("CUDA").status == "note"
    machine.executables({"nvidia-smi": "/usr/bin/nvidia-smi"})
    check = _find("CUDA")
    assert (check.status, check.remedy) == ("problem", "pip install --force-reinstall torch torchvision")


def test_julia(machine: Machine) -> None:
    assert _find("Julia") == Check("Julia", "ok", READY.detail)
    assert _find("Julia packages").detail == "Lux 1.31.2, PythonCall 0.9.34; juliacall 0.9.34"
    assert _find("CUDA.jl").detail == "CUDA 5.9.7, LuxCUDA 0.3.6, cuDNN 1.4.6"
    assert _find("Julia threads").detail == "as torch: 4 threads"
    assert _find("import order").detail == "torch is imported, juliacall not yet; either may come first"


def test_a_julia_that_is_not_installed_is_a_note_and_a_broken_one_a_problem(machine: Machine) -> None:
    machine.julia(JuliaStatus(False, "juliacall is not installed", "pip install 'pyrnode[julia]'"))
    plain = "its engine is not ready, the PyTorch engine does the work: "
    remedy = "pip install 'pyrnode[julia]'"
    assert _find("Julia") == Check("Julia", "note", plain + "juliacall is not installed", remedy)
    assert not {"CUDA.jl", "Julia threads", "OpenSSL"} & {check.name for check in diagnose()}
    machine.julia(JuliaStatus(False, "its Manifest is damaged", "pyrnode install-julia", executable="/opt/julia"))
    assert _find("Julia") == Check("Julia", "problem", plain + "its Manifest is damaged", "pyrnode install-julia")
    machine.julia(JuliaStatus(False, "PYTHON_JULIACALL_EXE is set alone", "unset PYTHON_JULIACALL_EXE"))
    assert _find("Julia").status == "note"
    machine.patch.setenv("PYTHON_JULIACALL_EXE", "/opt/julia")
    assert _find("Julia").status == "problem"


def test_julia_packages_for_a_gpu(machine: Machine) -> None:
    machine.julia(replace(READY, packages={"Lux": "1.31.2", "CUDA": "5.9.7"}))
    detail = "not installed: the Julia engine computes on the CPU"
    assert _find("CUDA.jl") == Check("CUDA.jl", "note", detail, "pyrnode install-julia --cuda")
    machine.julia(replace(READY, packages={"Lux": "1.31.2"}, own=True))
    remedy = str(_find("CUDA.jl").remedy)
    assert shlex.split(remedy)[:3] == ["/opt/julia/bin/julia", "--project=/opt/env", "-e"]
    assert '("LuxCUDA", "' in remedy
    machine.gpus()
    assert _find("CUDA.jl") == Check("CUDA.jl", "ok", "not installed, and without a GPU not needed")


@pytest.mark.parametrize(
    ("variables", "status", "detail", "remedy"),
    [
        ({"JULIA_NUM_THREADS": "2"}, "ok", "JULIA_NUM_THREADS = 2: 2 threads", None),
        ({"JULIA_NUM_THREADS": "auto"}, "ok", "JULIA_NUM_THREADS = auto: 4 threads", None),
        ({"JULIA_NUM_THREADS": "3,1"}, "ok", "JULIA_NUM_THREADS = 3,1: 3 threads", None),
        (
            {"JULIA_NUM_THREADS": "8", "PYTHON_JULIACALL_THREADS": "1"},
            "ok",
            "PYTHON_JULIACALL_THREADS = 1: 1 thread",
            None,
        ),
        (
            {"JULIA_NUM_THREADS": "8"},
            "problem",
            "JULIA_NUM_THREADS = 8: 8 threads, but this process may use 4 CPUs",
            "export JULIA_NUM_THREADS=4",
        ),
        (
            {"JULIA_NUM_THREADS": "many"},
            "problem",
            "JULIA_NUM_THREADS = many: expected a positive number or auto",
            "unset JULIA_NUM_THREADS",
        ),
        (
            {"PYTHON_JULIACALL_HANDLE_SIGNALS": "no"},
            "problem",
            "as torch: 4 threads, which can crash while PYTHON_JULIACALL_HANDLE_SIGNALS = no",
            "unset PYTHON_JULIACALL_HANDLE_SIGNALS",
        ),
    ],
)
def test_julia_threads(
    machine: Machine, variables: dict[str, str], status: str, detail: str, remedy: str | None
) -> None:
    for name, value in variables.items():
        machine.patch.setenv(name, value)
    assert _find("Julia threads") == Check("Julia threads", status, detail, remedy)  # type: ignore[arg-type]


def test_openssl(machine: Machine) -> None:
    machine.patch.setattr(ssl, "OPENSSL_VERSION", "OpenSSL 3.0.19")
    machine.patch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 19, 0))
    assert _find("OpenSSL").detail == "Python has OpenSSL 3.0.19: Julia 1 - 1.11 only, newer ones need OpenSSL 3.5"
    machine.patch.setattr(ssl, "OPENSSL_VERSION", "OpenSSL 3.5.1")
    machine.patch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 5, 0, 1, 0))
    assert _find("OpenSSL").detail == "Python has OpenSSL 3.5.1: any Julia"


def test_import_order(machine: Machine) -> None:
    fake = ModuleType("juliacall")
    fake.CONFIG = {"opt_threads": "4", "opt_handle_signals": "yes"}  # type: ignore[attr-defined]
    machine.patch.setattr(sys, "modules", {**sys.modules, "juliacall": fake})
    assert _find("import order") == Check("import order", "ok", "torch was imported before juliacall, which works")
    machine.patch.setattr(sys, "modules", {"juliacall": fake, **sys.modules})
    assert _find("import order").detail == "juliacall was imported before torch, which works"
    fake.CONFIG["opt_handle_signals"] = None
    check = _find("import order")
    assert (check.status, check.remedy) == ("problem", "export PYTHON_JULIACALL_HANDLE_SIGNALS=yes")
    assert "4 threads without signal handling" in check.detail
    fake.CONFIG["opt_threads"] = "1"
    assert _find("import order").status == "ok"


def test_data_folder_that_is_not_set(machine: Machine) -> None:
    machine.patch.delenv("PYRNODE_DATA")
    detail = "PYRNODE_DATA is not set: the folder is ./data, "
    remedy = "export PYRNODE_DATA=/path/to/data"
    assert _find("data") == Check("data", "note", detail + "sets are downloaded to it", remedy)
    machine.data("data", ["train_32x32.mat", "test_32x32.mat"])
    assert _find("data") == Check("data", "note", detail + "it holds svhn", remedy)


def test_data_folder_that_is_not_there(machine: Machine) -> None:
    machine.patch.setenv("PYRNODE_DATA", "/nowhere/my data")
    remedy = "mkdir -p '/nowhere/my data'"
    assert _find("data") == Check("data", "problem", "PYRNODE_DATA = '/nowhere/my data' does not exist", remedy)
    file = machine.data("folder", ["file"]) / "file"
    machine.patch.setenv("PYRNODE_DATA", str(file))
    detail = f"PYRNODE_DATA = '{file}' is not a folder"
    assert _find("data") == Check("data", "problem", detail, "unset PYRNODE_DATA")


def test_data_folder_that_is_empty_or_cannot_be_read(machine: Machine) -> None:
    empty = machine.home / "empty"
    empty.mkdir()
    machine.patch.setenv("PYRNODE_DATA", str(empty))
    assert _find("data") == Check("data", "note", f"PYRNODE_DATA = '{empty}' holds none of the named sets yet")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    machine.patch.setattr(Path, "iterdir", refuse)
    detail = f"PYRNODE_DATA = '{empty}' cannot be read: Permission denied"
    assert _find("data") == Check("data", "problem", detail, "unset PYRNODE_DATA")


def test_data_sets_are_known_by_all_their_files(machine: Machine) -> None:
    files = {
        "mnist": [f"MNIST/raw/{name}" for name in IDX],
        "fashion-mnist": [f"FashionMNIST/raw/{name}" for name in IDX],
        "cifar10": [
            f"cifar-10-batches-py/{name}"
            for name in (*(f"data_batch_{i}" for i in (1, 2, 3, 4, 5)), "test_batch", "batches.meta")
        ],
        "svhn": ["train_32x32.mat", "test_32x32.mat"],
        "power": ["power/data.npy"],
        "gas": ["gas/ethylene_CO.parquet"],
        "hepmass": ["hepmass/1000_train.csv", "hepmass/1000_test.csv"],
        "miniboone": ["miniboone/data.npy"],
        "bsds300": ["BSDS300/BSDS300.hdf5"],
    }
    for name, needed in files.items():
        assert doctor.data_sets(machine.data(f"one-{name}", needed)) == [name]
        last = machine.home / f"one-{name}" / needed[-1]
        last.unlink()
        assert doctor.data_sets(machine.home / f"one-{name}") == []
    everything = machine.data("all", [file for needed in files.values() for file in needed])
    machine.data("all", ["faces/train/1.png", "faces/test/2.png", "half/train/1.png"])
    assert doctor.data_sets(everything) == [*files, str(everything / "faces")]


@pytest.mark.parametrize(("suffix", "found"), [("csv", ["gas"]), ("npy", ["gas"]), ("pickle", []), ("zip", [])])
def test_the_gas_set_counts_in_the_formats_that_are_read(machine: Machine, suffix: str, found: list[str]) -> None:
    assert doctor.data_sets(machine.data("gas-only", [f"gas/ethylene_CO.{suffix}"])) == found


@pytest.mark.parametrize(
    ("gib", "status", "end"),
    [(6.0, "ok", "folder"), (4.0, "note", "enough for small runs"), (0.5, "problem", "checkpoints may not fit")],
)
def test_disk(machine: Machine, gib: float, status: str, end: str) -> None:
    machine.free(gib)
    check = _find("disk")
    assert (check.status, check.remedy) == (status, None if status == "ok" else "du -xh --max-depth=1 . | sort -h")
    assert check.detail.startswith(f"{gib} GiB free")
    assert check.detail.endswith(end)


def test_working_folder(machine: Machine) -> None:
    assert _find("working folder") == Check("working folder", "ok", f"{machine.home} can be written")
    before = sorted(machine.home.iterdir())

    def refuse(**arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    machine.patch.setattr(tempfile, "TemporaryFile", refuse)
    detail = "the working folder cannot be written: Read-only file system"
    assert _find("working folder") == Check("working folder", "problem", detail, 'cd "$HOME"')
    assert sorted(machine.home.iterdir()) == before


def test_a_working_folder_that_is_gone(machine: Machine) -> None:
    gone = machine.home / "gone"
    gone.mkdir()
    machine.patch.chdir(gone)
    gone.rmdir()
    check = _find("working folder")
    assert (check.status, check.remedy) == ("problem", 'cd "$HOME"')

    def stale(path: str) -> None:
        raise OSError(116, "Stale file handle")

    machine.patch.setattr("shutil.disk_usage", stale)
    detail = "the working folder cannot be looked at: Stale file handle"
    assert _find("disk") == Check("disk", "problem", detail, 'cd "$HOME"')


@pytest.mark.parametrize("value", ["8", "8,2", "5"])
def test_more_threads_than_cpus_is_a_problem(machine: Machine, value: str) -> None:
    machine.patch.setenv("OMP_NUM_THREADS", value)
    check = _find("threads")
    assert (check.status, check.remedy) == ("problem", "export OMP_NUM_THREADS=4")
    assert check.detail.startswith(f"OMP_NUM_THREADS = {value}: {value[0]} threads, but this process may use 4 CPUs")


@pytest.mark.parametrize("value", ["many", "0", "-2", ""])
def test_a_thread_count_that_is_no_number(machine: Machine, value: str) -> None:
    machine.patch.setenv("OMP_NUM_THREADS", value)
    detail = f"OMP_NUM_THREADS = {value!r} is not a positive number"
    assert _find("threads") == Check("threads", "problem", detail, "export OMP_NUM_THREADS=4")


def test_threads_that_fit(machine: Machine) -> None:
    assert _find("threads") == Check("threads", "ok", "torch: 4 threads, this process may use 4 CPUs")
    machine.patch.setattr(torch, "get_num_threads", lambda: 1)
    machine.patch.setenv("OMP_NUM_THREADS", "1")
    detail = "OMP_NUM_THREADS = 1: 1 thread, this process may use 4 CPUs"
    assert _find("threads") == Check("threads", "ok", detail)


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 4),
        ("800000 100000", 4),
        ("?", 4),
    ],
)
def test_the_quota_of_a_container_counts(machine: Machine, quota: str, cpus: int) -> None:
    file = machine.home / "cpu.max"
    file.write_text(quota + "\n")
    machine.patch.setattr(doctor, "_CGROUP_CPU", file)
    check = _find("threads")
    assert check.status == ("ok" if cpus == 4 else "problem")  # torch has four threads
    assert check.remedy == (None if cpus == 4 else f"export OMP_NUM_THREADS={cpus}")


def test_report() -> None:
    checks = [
        Check("torch", "ok", "2.14"),
        Check("h5py", "note", "not installed", "pip install h5py"),
        Check("working folder", "problem", "cannot be written", 'cd "$HOME"'),
    ]
    assert format_report(checks).splitlines() == [
        "ok       torch           2.14",
        "note     h5py            not installed",
        "                         → pip install h5py",
        "problem  working folder  cannot be written",
        '                         → cd "$HOME"',
        "",
        "1 problem, 1 note",
    ]
    assert format_report(checks[:1]).splitlines()[-1] == "no problems, no notes"


def test_nothing_is_imported_and_julia_not_started() -> None:
    code = (
        "import json, sys, torch\n"
        "from pyrnode import doctor\n"
        "before = set(sys.modules); doctor.diagnose()\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    heavy = {
        "juliacall",
        "torchvision",
        "pandas",
        "pyarrow",
        "tensorboard",
        "h5py",
        "matplotlib",
        "sklearn",
    }
    assert heavy.isdisjoint(json.loads(out.splitlines()[-1]))


def test_the_real_machine_is_looked_at_in_about_a_second() -> None:
    start = time.perf_counter()
    checks = diagnose()
    assert time.perf_counter() - start < 3
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    assert re.fullmatch(rf"{re.escape(sys.version.split()[0])} on \w+ \w+", found["Python"].detail)
    for name in ("pandas", "pyarrow", "tensorboard"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            assert found[name].status == "note"
        else:
            assert found[name].detail.startswith(f"{version} (")
