"""The convolutions in C against torch's convolution and its gradient in double precision."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyrnode import native
from pyrnode.config import SolverConfig
from pyrnode.dynamics import Cotangents, layers
from pyrnode.dynamics.layered import BoundLayers, ConvNet
from pyrnode.dynamics.layers import Conv, NativeConv, channels_last
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.native import conv
from pyrnode.native import threads as native_threads
from pyrnode.native.threads import WORK, ranges
from pyrnode.probes import Probes

_STATUS = native.status("conv")
_KERNEL = pytest.mark.skipif(not _STATUS.available, reason=f"no compiled convolution: {_STATUS.why}")

SIZES = [(7, 7), (14, 14), (28, 28), (5, 9), (1, 1), (2, 3)]
CHANNELS = [(16, 16), (64, 64), (24, 64), (64, 24), (1, 64), (64, 1), (2, 16), (64, 3), (8, 64), (16, 8)]

JOB = conv._Job()  # for kernels that read none

# Largest error over the largest output. Measured over these cases: 2.5e-6 at most in values, 1.7e-6 in gradients, where
# torch's own convolution has up to 1.4e-6 and its gradient of the weight up to 3.3e-6; float32 rounds at 6e-8.
TOLERANCE = 4e-6


def _case(channels: tuple[int, int], size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An input, a cotangent, a weight and a shift."""
    inputs, outputs = channels
    x, y = torch.randn(batch, inputs, *size), torch.randn(batch, outputs, *size)
    weight = torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5)
    return channels_last(x), channels_last(y), weight, torch.randn(outputs, *size)


def _bound(weight: Tensor) -> conv.Convolution:
    kernel = conv.kernel(weight)
    if kernel is None:
        pytest.skip(f"the kernel's vectors do not divide the channels {tuple(weight.shape[:2])} on this processor")
    return kernel


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).abs().max() / exact.abs().max())


def _gradient(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Σ y xᵀ by autograd in double precision."""
    w = weight.double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.conv2d(x.double(), w, padding=1), w, y.double())
    return gradient


@_KERNEL
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_values_and_gradient_are_those_of_double_precision(channels, size, batch):
    x, y, weight, shift = _case(channels, size, batch)
    kernel = _bound(weight)

    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert _error(kernel(x), exact) < TOLERANCE
    assert _error(kernel(x, shift), exact + shift.double()) < TOLERANCE
    exact = F.conv_transpose2d(y.double(), weight.double(), padding=1)
    assert _error(kernel.transpose(y), exact) < TOLERANCE

    kernel.accumulate(x, y, 0.5)
    kernel.accumulate(y.new_ones(x.shape).contiguous(memory_format=torch.channels_last), y, -2.0)
    exact = 0.5 * _gradient(x, y, weight) - 2 * _gradient(torch.ones_like(x), y, weight)
    assert _error(kernel.gradient(), exact) < TOLERANCE


@_KERNEL
def test_it_rounds_little_worse_than_torch():
    errors, theirs = [], []
    for size in [(7, 7), (14, 14), (28, 28)]:
        x, _, weight, _ = _case((64, 64), size, 4)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        errors.append(_error(_bound(weight)(x), exact))
        theirs.append(_error(F.conv2d(x, weight, padding=1), exact))
    assert max(errors) < 3 * max(theirs)


@_KERNEL
@pytest.mark.parametrize(
    "shift",
    [
        torch.randn(64, 1, 1),
        torch.randn(64, 5, 9),
        torch.randn(3, 64, 1, 1),
        torch.randn(3, 64, 5, 9),
        channels_last(torch.randn(1, 64, 5, 9))[0],
        channels_last(torch.randn(3, 64, 5, 9)),
    ],
    ids=["bias", "map", "bias-of-each", "map-of-each", "map-last", "map-of-each-last"],
)
def test_any_shift_that_broadcasts(shift):
    x, _, weight, _ = _case((64, 64), (5, 9), 3)
    kernel = _bound(weight)
    assert torch.equal(kernel(x, shift), kernel(x) + shift)


@_KERNEL
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_neighbourhood(value):
    x, y, weight, _ = _case((16, 16), (15, 15), 3)
    kernel = _bound(weight)
    clean = kernel(x)
    x[1, 3, 8, 8] = value
    a = kernel(x)
    assert not a[1, :, 7:10, 7:10].isfinite().any()
    far = torch.ones(15, 15, dtype=torch.bool)
    far[4:12, 4:12] = False  # the outputs of the tiles that see it
    assert torch.equal(a[1, :, far], clean[1, :, far])
    assert torch.equal(a[[0, 2]], clean[[0, 2]])
    kernel.accumulate(x, y, 1.0)
    gradient = kernel.gradient()
    assert not gradient[:, 3].isfinite().any()
    assert gradient[:, [c for c in range(16) if c != 3]].isfinite().all()


@_KERNEL
@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_threads_changes_no_bit(size, threads):
    x, y, weight, shift = _case((64, 64), size, 3)
    results = []
    for count in (1, 2, 3, 9):
        threads(count)
        kernel = _bound(weight)
        kernel.accumulate(x, y, 1.0)
        results.append((kernel(x, shift), kernel.transpose(y), kernel.gradient()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@_KERNEL
def test_an_empty_batch():
    kernel = _bound(torch.randn(16, 16, 3, 3))
    empty = channels_last(torch.empty(0, 16, 4, 4))
    assert kernel(empty).shape == (0, 16, 4, 4)
    kernel.accumulate(empty, empty, 1.0)
    assert not kernel.gradient().any()


@_KERNEL
def test_other_layouts_and_types_are_refused():
    kernel = _bound(torch.randn(16, 16, 3, 3))
    with pytest.raises(TypeError, match="channels-last"):
        kernel(torch.randn(2, 16, 4, 4))
    with pytest.raises(TypeError, match=r"float64"):
        kernel(channels_last(torch.randn(2, 16, 4, 4, dtype=torch.float64)))
    with pytest.raises(TypeError, match=r"expected float32 images \(2, 16, 4, 4\)"):
        kernel(channels_last(torch.randn(2, 8, 4, 4)))
    x, y = channels_last(torch.randn(2, 16, 4, 4)), channels_last(torch.randn(1, 16, 4, 4))
    with pytest.raises(TypeError, match=r"expected float32 images \(2, 16, 4, 4\)"):
        kernel.accumulate(x, y, 1.0)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(16, 16, 3, 3, dtype=torch.float64),
        torch.randn(16, 16, 5, 5),
        torch.randn(3, 1, 3, 3),
        torch.randn(17, 16, 3, 3),
    ],
    ids=["double", "5x5", "few-to-few", "17-channels"],
)
def test_what_it_does_not_do_is_left_to_torch(weight):
    assert conv.kernel(weight) is None


def _linearization(net: ConvNet) -> list[Tensor]:
    """f, εᵀ∂f/∂z and all gradients of the explicit product at a fixed point."""
    generator = torch.Generator().manual_seed(1)
    z, eps, f_bar = (torch.randn(2, 1, 7, 7, generator=generator) for _ in range(3))
    with torch.no_grad():
        bound = net.bind()
        linearization = bound.linearize(0.3, bound.layout(z), bound.layout(eps[None]), tape=True)
        z_bar, _ = bound.pullback(linearization, Cotangents(f_bar, eps[None]))
        assert linearization.w is not None
        return [linearization.f, linearization.w, z_bar, *bound.gradients()]


def _second_linear(net: ConvNet) -> layers.Linear:
    """The operator of the layer from 64 channels to 64, as a solve has it."""
    bound = net.bind()
    assert isinstance(bound, BoundLayers)
    return bound.layers[1].linear


def _net() -> ConvNet:
    net = ConvNet((1, 7, 7), (64, 64))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return net


def _assert_close(values: list[Tensor], expected: list[Tensor]) -> None:
    for value, exact in zip(values, expected, strict=True):
        assert _error(value, exact) < 5e-6


@_KERNEL
def test_a_network_uses_it_where_nothing_is_recorded():
    net = _net()
    linear = _second_linear(net)
    assert isinstance(linear, NativeConv)
    x = torch.randn(2, 64, 7, 7, requires_grad=True)
    assert linear(x).grad_fn is not None  # left to torch
    assert linear.transpose(x).grad_fn is not None
    assert type(layers._linear(net.layers[1].weight, (7, 7), detached=False)) is Conv


def _convolutions() -> int:
    gc.collect()
    return sum(issubclass(type(x), conv.Convolution) for x in gc.get_objects())


@_KERNEL
def test_between_its_passes_a_solve_holds_no_transformed_weights():
    net, z = _net(), torch.randn(2, 1, 7, 7)
    probes = Probes.draw(z, 1, generator=torch.Generator().manual_seed(0))
    before = _convolutions()
    solution = TorchEngine().integrate(net, z, probes, (0.0, 1.0), SolverConfig(memory="checkpoint"))
    assert _convolutions() == before
    (solution.z.sum() + solution.l.sum()).backward()
    assert net.layers[1].weight.grad.any()


def test_without_it_the_results_are_the_same(monkeypatch):
    net = _net()
    with_kernel = _linearization(net)
    monkeypatch.setenv(native.VARIABLE, "0")
    assert type(_second_linear(net)) is Conv
    _assert_close(with_kernel, _linearization(net))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    yield tmp_path / "pyrnode" / "kernels"
    native._load.cache_clear()


def test_without_a_compiler_the_results_are_the_same(monkeypatch, fresh, tmp_path):
    net = _net()
    with_kernel = _linearization(net)
    native._load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "no C compiler" in native.status("conv").why
    assert conv.kernel(net.layers[1].weight.detach()) is None
    _assert_close(with_kernel, _linearization(net))


@_KERNEL
def test_a_file_that_was_cut_off_is_compiled_anew(fresh):
    assert native.status("conv").available
    (file,) = Path(fresh).glob("conv-*.so")
    whole = file.read_bytes()
    for part in (b"", whole[: len(whole) // 2]):
        file.unlink()  # the process has it loaded
        file.write_bytes(part)
        native._load.cache_clear()
        assert native.status("conv").available
        assert file.read_bytes() == whole


@_KERNEL
def test_a_cache_folder_that_cannot_be_written(monkeypatch, fresh):
    fresh.parent.mkdir(parents=True)
    fresh.write_text("a file where the folder should be")
    assert native.status("conv").available
    fresh.unlink()
    native._load.cache_clear()
    monkeypatch.setattr(native.cache, "keep", _full(native.cache.keep, fresh))
    before = set(Path(tempfile.gettempdir()).glob("pyrnode-*"))
    assert native.status("conv").available
    assert not list(fresh.glob("*.so"))
    assert set(Path(tempfile.gettempdir()).glob("pyrnode-*")) == before


def _full(keep, folder):
    """`keep` where there is no space in that folder."""

    def kept(content, stem, to):
        if to == folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return keep(content, stem, to)

    return kept


@pytest.fixture(params=["openmp", "python"])
def kind(request, monkeypatch):
    """Both kinds of threads."""
    if request.param == "python":
        monkeypatch.setattr(native_threads, "_team", lambda: None)
    elif native_threads._team() is None:
        pytest.skip("no OpenMP runtime with GNU's entry points in this process")


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_ranges_cover_all_once(number, count, threads):
    threads(number)
    done: list[int] = []
    names, jobs = set(), set()

    @WORK
    def work(job: int, start: int, stop: int) -> int:
        jobs.add(job)
        done.extend(range(start, stop))
        names.add(threading.get_ident())
        return 0

    ranges(work, JOB, count)
    assert sorted(done) == list(range(count))
    assert len(names) <= max(1, min(number, count))
    assert jobs == {ctypes.addressof(JOB)}


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_ranges_say_that_a_thread_had_no_memory(failing, threads):
    threads(3)
    done = []

    @WORK
    def work(_: int, start: int, stop: int) -> int:
        done.extend(range(start, stop))
        return int(start == failing)

    with pytest.raises(MemoryError):
        ranges(work, JOB, 3)
    assert sorted(done) == [0, 1, 2]  # none is still at work


FEWER = """
import torch
from pyrnode.native import conv
from pyrnode.native.threads import WORK, ranges
done = []
work = WORK(lambda job, start, stop: done.append((start, stop)) or 0)
torch.set_num_threads(3)
ranges(work, conv._Job(), 7)
print(torch.get_num_threads(), sorted(done))
"""


def test_ranges_cover_all_by_fewer_threads_than_asked_for():
    environment = os.environ | {"OMP_THREAD_LIMIT": "2"}
    done = subprocess.run([sys.executable, "-c", FEWER], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "3 [(0, 2), (2, 4), (4, 7)]"


@_KERNEL
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (1, 64), (64, 1)])
def test_weight_gradients_do_not_depend_on_the_number_of_threads(inputs, outputs, threads):
    generator = torch.Generator().manual_seed(0)
    weight, x, y = (
        torch.randn(shape, generator=generator)
        for shape in ((outputs, inputs, 3, 3), (5, inputs, 10, 9), (5, outputs, 10, 9))
    )
    found = []
    for number in (1, 2, 3):
        threads(number)
        kernel = conv.kernel(weight)
        kernel.accumulate(channels_last(x), channels_last(y), 0.5)
        found.append(kernel.gradient())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
