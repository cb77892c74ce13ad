"""What `pyrnode doctor` looks at: the installation, Julia, data, the machine; and one command for what is amiss.

Julia is not started and nothing heavy is imported: packages are looked up, not loaded.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from pyrnode import distributed, julia_image, julia_setup, native
from pyrnode.devices import resolve_device
from pyrnode.distributed import World
from pyrnode.errors import ConfigError
from pyrnode.julia_setup import JuliaStatus
from pyrnode.julia_times import words
from pyrnode.native import pointwise
from pyrnode.progress import stages

Status = Literal["ok", "note", "problem"]

OPTIONAL = {
    "pandas": "reads .csv and .parquet tables",
    "pyarrow": "reads .parquet tables",
    "tensorboard": "shows metrics in TensorBoard",
    "h5py": "reads the BSDS300 set",
}
"""Packages that pyrnode can use but does not need: what each is for."""

_SMALLEST_TORCH = (2, 4)
_LITTLE_SPACE, _TOO_LITTLE_SPACE = 5 * 2**30, 2**30
_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        status: ``"ok"``, ``"note"`` (works, but worth knowing) or ``"problem"`` (something will fail or crawl).
        detail: What was found.
        remedy: One command that mends it, where there is one.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None


def diagnose(*, progress: bool = False) -> list[Check]:
    """Looks at everything; takes about a second, and changes nothing but that kernels are compiled ahead of use.

    Args:
        progress: Show a progress bar, if it takes more than two seconds (kernels that are compiled, a slow disk).
    """
    looks: dict[str, Callable[[], list[Check]]] = {
        "Python and PyTorch": lambda: [_python(), _torch(), _cuda(), _torchvision()],
        "other packages": lambda: [_optional(name, purpose) for name, purpose in OPTIONAL.items()],
        "Julia": _julia,
        "kernels": lambda: [_kernels(), _gpu_kernels()],
        "data": lambda: [_data(), _space(), _writable()],
        "threads and processes": lambda: [_threads(), _processes()],
    }
    checks = list[Check]()
    with stages([f"doctor: {name}" for name in looks], show=progress) as done:
        for look in looks.values():
            checks += look()
            done()
    return checks


def diagnose_all(world: World, *, progress: bool = False) -> list[Check]:
    """What the first process finds, and where each of the others is, once all have added a number up together.

    Args:
        world: The processes.
        progress: As in `diagnose`, of the first.

    Raises:
        ProcessError: They cannot reach one another.
    """
    device = resolve_device("auto")
    total = float(world.sum(torch.ones(1, dtype=torch.float64, device=device), patient=True))
    checks, others = world.once(lambda: diagnose(progress=progress)), world.gathered(_processes)
    added = Check("their sum", "ok" if total == world.size else "problem", f"{total:g} of {world.size} ones")
    return [*checks, *others[1:], added]


def format_report(checks: list[Check]) -> str:
    """The checks as lines of text, each remedy under its check, and a summary."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
        if check.remedy is not None:
            lines.append(f"{'':<8} {'':<{width}}  → {check.remedy}")
    problems, notes = (sum(check.status == status for check in checks) for status in ("problem", "note"))
    lines += ["", f"{_count(problems, 'problem')}, {_count(notes, 'note')}"]
    return "\n".join(lines)


def _count(n: int, noun: str) -> str:
    return f"{n or 'no'} {noun}{'' if n == 1 else 's'}"


def _version(name: str) -> str | None:
    """Version of an installed package, which is not imported; `None` where it is not there."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: ``"2.14.1+cu130"`` → ``(2, 14)``."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Check:
    version = str(torch.__version__)
    if _release(version) < _SMALLEST_TORCH:
        needed = ".".join(map(str, _SMALLEST_TORCH))
        remedy = f"pip install --upgrade 'torch>={needed}' torchvision"
        return Check("torch", "problem", f"{version} is older than {needed}", remedy)
    return Check("torch", "ok", f"{version}, computes with {_count(torch.get_num_threads(), 'thread')}")


def _cuda_available() -> tuple[bool, str | None]:
    """Whether torch can use a GPU, and what it warns of where the driver does not fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return available, str(caught[0].message).splitlines()[0] if caught else None


def _cuda() -> Check:
    available, reason = _cuda_available()
    if available:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("CUDA", "ok", f"{torch.version.cuda}: {', '.join(names)}")
    if reason is not None:
        return Check("CUDA", "problem", f"no GPU can be used, pyrnode computes on the CPU: {reason}", "nvidia-smi")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        remedy = "pip install --force-reinstall torch torchvision"
        return Check("CUDA", "problem", "there is an NVIDIA driver, but this torch is built for the CPU only", remedy)
    return Check("CUDA", "note", "no GPU found: pyrnode computes on the CPU")


def _torchvision() -> Check:
    version = _version("torchvision")
    if version is None:
        detail = "not installed: needed for the image sets and for pictures of samples"
        return Check("torchvision", "problem", detail, "pip install torchvision")
    needed = _torch_needed_by_torchvision()
    if needed is not None and _release(needed) != _release(str(torch.__version__)):
        detail = f"{version} is built for torch {needed}, but torch is {torch.__version__}"
        return Check("torchvision", "problem", detail, "pip install --upgrade torch torchvision")
    return Check("torchvision", "ok", version)


def _torch_needed_by_torchvision() -> str | None:
    """The one version of torch that torchvision's binary fits, as its package says."""
    try:
        requirements = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return None
    pins = (re.match(r"torch\s*\(?==\s*([\w.+]+)", text) for text in requirements)
    return next((pin.group(1) for pin in pins if pin), None)


def _optional(name: str, purpose: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, "note", f"not installed ({purpose})", f"pip install {name}")
    return Check(name, "ok", f"{version} ({purpose})")


# --- Julia ---


def _julia() -> list[Check]:
    """What there is of Julia; neither it nor juliacall is started."""
    found = julia_setup.status()
    if not found.ready:
        tried = found.executable is not None or julia_setup.is_named()
        detail = f"its engine is not ready, the PyTorch engine does the work: {found.detail}"
        return [Check("Julia", "problem" if tried else "note", detail, found.remedy)]
    return [
        Check("Julia", "ok", found.detail),
        _julia_packages(found),
        _julia_image(found),
        _julia_cuda(found),
        _julia_threads(),
        _julia_openssl(),
        _import_order(),
    ]


def _julia_packages(found: JuliaStatus) -> Check:
    gpu = julia_setup.needs(gpu=True)
    versions = ", ".join(f"{name} {version}" for name, version in found.packages.items() if name not in gpu)
    return Check("Julia packages", "ok", f"{versions}; juliacall {found.juliacall}")


def _julia_image(found: JuliaStatus) -> Check:
    """The system image that Julia starts from: which, of what age, and whether it is loaded."""
    named, name = julia_setup.option("sysimage"), "Julia image"
    if named is not None:
        return Check(name, "ok", f"PYTHON_JULIACALL_SYSIMAGE = {named}, which is not looked at")
    image = julia_image.find(found)
    if image is None:
        detail = "no system image: Julia starts slowly, and compiles each solver on its first use"
        return Check(name, "note", detail, julia_setup.INSTALL)
    if image.stale is not None:
        detail = f"{image.path}, {image.age}, is stale and not loaded: {image.stale}"
        return Check(name, "note", detail, julia_setup.INSTALL)
    size = image.path.stat().st_size / 2**20
    return Check(name, "ok", f"{image.path}, {image.age}, {size:.0f} MB, built in {words(image.seconds)}")


def _julia_cuda(found: JuliaStatus) -> Check:
    gpu = [name for name in julia_setup.needs(gpu=True) if name in found.packages]
    if found.has_cuda:
        return Check("CUDA.jl", "ok", ", ".join(f"{name} {found.packages[name]}" for name in gpu))
    if not torch.cuda.is_available():
        return Check("CUDA.jl", "ok", "not installed, and without a GPU not needed")
    remedy = julia_setup.add_command(found, cuda=True) if found.own else f"{julia_setup.INSTALL} --cuda"
    return Check("CUDA.jl", "note", "not installed: the Julia engine computes on the CPU", remedy)


def _julia_threads() -> Check:
    """Threads that Julia will have: the user's number or torch's."""
    cpus = _cpus()
    names = ("PYTHON_JULIACALL_THREADS", "JULIA_NUM_THREADS")  # the first one wins, in juliacall too
    name = next((name for name in names if os.environ.get(name)), None)
    value = str(torch.get_num_threads()) if name is None else os.environ[name]
    where = "as torch" if name is None else f"{name} = {value}"
    first = value.partition(",")[0]  # "4,1" is four threads and an interactive one
    if first != "auto" and (not first.isdecimal() or int(first) < 1):
        return Check("Julia threads", "problem", f"{where}: expected a positive number or auto", f"unset {name}")
    threads = cpus if first == "auto" else int(first)
    if threads > cpus:
        detail = f"{where}: {_count(threads, 'thread')}, but this process may use {_count(cpus, 'CPU')}"
        remedy = f"export {name or 'JULIA_NUM_THREADS'}={cpus}"
        return Check("Julia threads", "problem", detail, remedy)
    signals = "PYTHON_JULIACALL_HANDLE_SIGNALS"
    if threads > 1 and os.environ.get(signals, "yes") != "yes":
        detail = f"{where}: {_count(threads, 'thread')}, which can crash while {signals} = {os.environ[signals]}"
        return Check("Julia threads", "problem", detail, f"unset {signals}")
    return Check("Julia threads", "ok", f"{where}: {_count(threads, 'thread')}")


def _julia_openssl() -> Check:
    """Julia and Python share one OpenSSL in a process; `status` has checked that the two fit."""
    from juliapkg.deps import openssl_compat

    cap = openssl_compat()[1]
    allowed = "any Julia" if cap is None else f"Julia {cap} only, newer ones need OpenSSL 3.5"
    return Check("OpenSSL", "ok", f"Python has {julia_setup.openssl_version()}: {allowed}")


def _import_order() -> Check:
    """Whether juliacall is imported already, and then with which settings."""
    modules = list(sys.modules)
    if "juliacall" not in modules:
        return Check("import order", "ok", "torch is imported, juliacall not yet; either may come first")
    first, second = sorted(("torch", "juliacall"), key=modules.index)
    config = sys.modules["juliacall"].CONFIG
    threads, signals = str(config.get("opt_threads") or 1), config.get("opt_handle_signals")
    if threads not in ("0", "1") and signals != "yes":
        detail = f"juliacall was imported before pyrnode could set it up: {threads} threads without signal handling"
        return Check("import order", "problem", f"{detail} can crash", "export PYTHON_JULIACALL_HANDLE_SIGNALS=yes")
    return Check("import order", "ok", f"{first} was imported before {second}, which works")


# --- data ---


def _needs() -> dict[str, list[str]]:
    """The files by which each named set is known, relative to the data folder."""
    idx = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    return {
        "mnist": [f"MNIST/raw/{name}" for name in idx],
        "fashion-mnist": [f"FashionMNIST/raw/{name}" for name in idx],
        "cifar10": [f"cifar-10-batches-py/{name}" for name in batches],
        "svhn": ["train_32x32.mat", "test_32x32.mat"],
        "power": ["power/data.npy"],
        "gas": ["gas/ethylene_CO.[pcn][asp][rvy]*"],  # .parquet, .csv or .npy; a .pickle is not read
        "hepmass": ["hepmass/1000_train.csv", "hepmass/1000_test.csv"],
        "miniboone": ["miniboone/data.npy"],
        "bsds300": ["BSDS300/BSDS300.hdf5"],
    }


def data_sets(folder: Path) -> list[str]:
    """Named sets whose files are all in `folder`, and paths of the image folders (``train/`` and ``test/``) in it."""
    sets = [name for name, files in _needs().items() if all(any(folder.glob(file)) for file in files)]
    images = [str(f) for f in sorted(folder.iterdir()) if (f / "train").is_dir() and (f / "test").is_dir()]
    return sets + images


def _kernels() -> Check:
    states = {name: native.status(name) for name in native.NAMES}
    missing = [name for name, state in states.items() if not state.available]
    if missing:
        state = states[missing[0]]
        detail = f"{', '.join(missing)}: {state.why}; training on a CPU is slower without"
        return Check("kernels", "note", detail, f"export {native.VARIABLE}=1" if native.VARIABLE in state.why else None)
    state = next((state for state in states.values() if state.remedy), states[native.NAMES[0]])
    alone = "for this process alone" in state.why  # each one compiles again
    return Check("kernels", "note" if alone else "ok", f"{', '.join(states)}: {state.why}", state.remedy)


def _gpu_kernels() -> Check:
    """Kernels that would be used on a GPU; without one that is all there is to say of them."""
    found, (available, _) = pointwise.status(), _cuda_available()
    if not found.available:
        remedy = found.remedy if available else None
        return Check("GPU kernels", "note" if available else "ok", f"none: {found.why}", remedy)
    where = "used on CUDA" if available else "for CUDA, which is not here"
    return Check(
        "GPU kernels", "ok", f"{found.why}: {where}; never run on a GPU by its makers, so checked at first use"
    )


def _data() -> Check:
    name = os.environ.get("PYRNODE_DATA")
    if not name:
        found = data_sets(Path("data")) if Path("data").is_dir() else []
        holds = f"it holds {', '.join(found)}" if found else "sets are downloaded to it"
        detail = f"PYRNODE_DATA is not set: the folder is ./data, {holds}"
        return Check("data", "note", detail, "export PYRNODE_DATA=/path/to/data")
    folder = Path(name).expanduser()
    if folder.exists() and not folder.is_dir():
        return Check("data", "problem", f"PYRNODE_DATA = {name!r} is not a folder", "unset PYRNODE_DATA")
    if not folder.exists():
        remedy = f"mkdir -p {shlex.quote(str(folder))}"
        return Check("data", "problem", f"PYRNODE_DATA = {name!r} does not exist", remedy)
    try:
        found = data_sets(folder)
    except OSError as error:
        detail = f"PYRNODE_DATA = {name!r} cannot be read: {error.strerror}"
        return Check("data", "problem", detail, "unset PYRNODE_DATA")
    if not found:
        return Check("data", "note", f"PYRNODE_DATA = {name!r} holds none of the named sets yet")
    return Check("data", "ok", f"PYRNODE_DATA = {name!r} holds {', '.join(found)}")


# --- the machine ---


def _space() -> Check:
    try:
        free = shutil.disk_usage(".").free
    except OSError as error:
        return Check("disk", "problem", f"the working folder cannot be looked at: {error.strerror}", 'cd "$HOME"')
    detail = f"{free / 2**30:.1f} GiB free in the working folder"
    remedy = "du -xh --max-depth=1 . | sort -h"
    if free < _TOO_LITTLE_SPACE:
        return Check("disk", "problem", f"{detail}: checkpoints may not fit", remedy)
    if free < _LITTLE_SPACE:
        return Check("disk", "note", f"{detail}: enough for small runs", remedy)
    return Check("disk", "ok", detail)


def _writable() -> Check:
    """Whether runs can be written here: by writing, since permissions do not tell of a read-only file system."""
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"pyrnode")
        folder = Path.cwd()
    except OSError as error:
        detail = f"the working folder cannot be written: {error.strerror}"
        return Check("working folder", "problem", detail, 'cd "$HOME"')
    return Check("working folder", "ok", f"{folder} can be written")


def _cpus() -> int:
    """CPUs that this process may use: of the machine, its affinity, and its container's quota the fewest."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_CPU.read_text(encoding="ascii").split()
        return count if quota == "max" else max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return count


def _processes() -> Check:
    """Whether this process is one of several, and what would carry sums between them."""
    try:
        rank, size = distributed.shard()
        local, here = distributed.local_rank(), distributed.local_size()
    except ConfigError as error:
        return Check("processes", "problem", str(error), "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE")
    if not torch.distributed.is_available():
        return Check("processes", "note", "one: this torch is built without torch.distributed")
    known = " and ".join(name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")())
    if size == 1:
        return Check("processes", "ok", f"one; torchrun starts several, which speak by {known}")
    if not distributed.launched():
        detail = f"WORLD_SIZE = {size} without MASTER_ADDR and MASTER_PORT: scores are sharded, training is not"
        return Check("processes", "note", detail, "torchrun --nproc-per-node 2 -m pyrnode doctor")
    device = resolve_device("auto")
    detail = f"{rank} of {size}, on this machine {local} of {here}: {distributed.backend(device)}, {device}"
    return Check("processes", "ok", detail)


def _threads() -> Check:
    cpus, threads = _cpus(), torch.get_num_threads()
    there = f"this process may use {_count(cpus, 'CPU')}"
    value = os.environ.get("OMP_NUM_THREADS")
    remedy = f"export OMP_NUM_THREADS={cpus}"
    if value is not None:
        first = value.partition(",")[0].strip()  # a list gives one number for each level of nesting
        if not first.isdecimal() or int(first) < 1:
            return Check("threads", "problem", f"OMP_NUM_THREADS = {value!r} is not a positive number", remedy)
        threads = max(threads, int(first))
    where = "torch" if value is None else f"OMP_NUM_THREADS = {value}"
    if threads > cpus:
        detail = f"{where}: {_count(threads, 'thread')}, but {there}: they wait for one another, many times slower"
        return Check("threads", "problem", detail, remedy)
    return Check("threads", "ok", f"{where}: {_count(threads, 'thread')}, {there}")
