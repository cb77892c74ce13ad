"""Triton's kernels of `native.pointwise`, in Triton's interpreter on the CPU, against torch in double precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyrnode import SolverConfig, doctor
from pyrnode.dynamics import MLP, ConvNet, layered
from pyrnode.dynamics.gpu import Kernelled
from pyrnode.engines import Probes, TorchEngine, pytorch
from pyrnode.native import pointwise

FUNCTIONS = {"softplus": F.softplus, "tanh": torch.tanh, "silu": F.silu}
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Relatively; to bfloat16 the interpreter cuts off, where a GPU rounds to the nearest."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are used on the CPU, where Triton interprets them; it asks for that when they are defined."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch on Linux")
    name = "pyrnode.native.triton_kernels"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(pointwise, "DEVICES", ("cpu",))
    sys.modules.pop(name, None)
    pointwise._checked.cache_clear()
    yield
    sys.modules.pop(name, None)
    pointwise._checked.cache_clear()


def drawn(*shape: int, seed: int = 0, wide: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = wide * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x).to(dtype)


def derivatives(name: str, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ and its first two derivatives, in double precision."""
    a = a.double().clone().requires_grad_()
    value = FUNCTIONS[name](a)
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    return value.detach(), first.detach(), second.detach()


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.dtype == dtype
    scale = max(1.0, float(wanted.abs().max()))  # of what is cancelled on the way
    torch.testing.assert_close(found.double(), wanted, rtol=ALLOWED[dtype], atol=scale * ALLOWED[dtype] / 10)


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "a shift for all": ((5, 7), (7,)),
    "a shift each": ((5, 7), (5, 7)),
    "more than a block": ((300, 9), (9,)),
    "one number": ((1, 1), (1,)),
    "a map": ((3, 5, 4, 7), (5, 4, 7)),
    "a map each": ((3, 5, 4, 7), (3, 5, 4, 7)),
    "channels": ((3, 5, 4, 7), (5, 1, 1)),
    "channels each": ((3, 5, 4, 7), (3, 5, 1, 1)),
    "one channel": ((2, 1, 3, 3), (1, 3, 3)),
    "a column": ((2, 3, 5, 1), (3, 5, 1)),
    "a row": ((2, 3, 1, 5), (3, 1, 5)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shift_activation_and_slope(name: str, shapes: Any) -> None:
    shape, of_shift = shapes
    kernels = pointwise.Kernels(name)
    for last in (True, False) if len(of_shift) == 3 else (False,):  # maps lie as images do, or not
        shift, scale = drawn(*of_shift, seed=1, wide=1.0), drawn(*of_shift, seed=2, wide=1.0)
        if last:
            shift = shift.unsqueeze(0).contiguous(memory_format=torch.channels_last)[0]
        for dtype in (torch.float32, torch.bfloat16):
            for s in (None, scale):
                u = drawn(*shape, dtype=dtype)
                a = u.double() * (1 if s is None else s.double()) + shift.double()
                value, first, _ = derivatives(name, a)
                before = u.clone()
                found = kernels.activate(u, s, shift, kept=True, sloped=True)
                assert found is not None
                for x, y in zip(found, (a, value, first), strict=True):
                    assert x is not None
                    near(x, y, dtype)
                    assert x.is_contiguous(
                        memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format
                    )
                u = before.clone()
                found = kernels.activate(u, s, shift, kept=False, sloped=False)
                assert found is not None
                assert found[2] is None
                near(found[1], value, dtype)
                assert s is None or torch.equal(u, before)  # which the scale's gradient is made of


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinite numbers, in the interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_far_from_zero_and_near_it(name: str) -> None:
    """Relatively: softplus and its slope far down, tanh near zero; and where an exponential would overflow."""
    a = torch.cat([torch.linspace(-80, 80, 641), torch.logspace(-30, 0, 61), -torch.logspace(-30, 0, 61)])[None]
    value, first, _ = derivatives(name, a)
    found = pointwise.Kernels(name).activate(a.clone(), None, torch.zeros(1), kept=False, sloped=True)
    assert found is not None
    torch.testing.assert_close(found[1].double(), value, rtol=6e-6, atol=0.0)
    if name == "softplus":
        torch.testing.assert_close(found[2].double(), first, rtol=6e-6, atol=0.0)
        again = pointwise.Kernels(name).slope(found[1])
        torch.testing.assert_close(again.double(), first, rtol=6e-6, atol=1e-7)
    infinite = torch.tensor([[torch.inf, torch.nan]])
    h = pointwise.Kernels(name).activate(infinite, None, torch.zeros(1), kept=False, sloped=False)[1]
    assert not bool(torch.isfinite(h[0, 1]))
    assert name == "tanh" or float(h[0, 0]) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (1, 300, 9), (2, 3, 5, 4, 7)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_pullback_and_the_slope(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k, *event = shape
    a = drawn(*event, dtype=dtype)
    value, first, second = derivatives(name, a)
    h, slope = (x.float().to(dtype) for x in (value, first))
    side_by_side = [drawn(k * event[0], *event[1:], seed=j, dtype=dtype) for j in (3, 4)]
    bar, r = (x.unflatten(0, (k, event[0])) for x in side_by_side)
    kernels, x = pointwise.Kernels(name), a if name == "silu" else h
    again = kernels.slope(x)
    near(again, first if dtype == torch.float32 else _slope(name, x), dtype)
    g = (slope * r).to(dtype) if name != "silu" else r
    exact = bar.double()
    factor = {"softplus": lambda: g.double() * (1 - slope.double()), "tanh": lambda: -2 * g.double() * h.double()}
    wanted = (factor[name]() if name in factor else second * r.double()) * exact
    bend, p = kernels.pull(bar, slope, x, g)
    near(bend, wanted, dtype)
    near(p, slope.double() * exact, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(bend.double(), second * r.double() * exact, rtol=1e-4, atol=1e-4)


def _slope(name: str, x: Tensor) -> Tensor:
    x = x.double()
    if name == "silu":
        return derivatives(name, x)[1]
    return -torch.expm1(-x) if name == "softplus" else 1 - x * x


def test_tensors_of_another_kind_are_left_alone() -> None:
    kernels = pointwise.Kernels("softplus")
    shift = torch.zeros(4)
    images = torch.zeros(2, 4, 3, 5)
    for u, s in (
        (torch.zeros(3, 4, dtype=torch.float64), shift),
        (torch.zeros(4, 3).t(), shift),
        (images, torch.zeros(4, 1, 1)),  # whose channels are not last
        (torch.zeros(3, 4), shift.double()),
        (images.contiguous(memory_format=torch.channels_last), torch.zeros(4, 5, 3).transpose(1, 2)),
    ):
        assert kernels.activate(u, None, s, kept=True, sloped=True) is None
    assert kernels.slope(torch.zeros(4, 3).t()) is None
    bar, slope = torch.zeros(1, 3, 4), torch.zeros(3, 4)
    assert kernels.pull(bar, slope, slope, bar.double()) is None
    assert kernels.pull(torch.zeros(2, 3, 4)[:, :2], slope[:2], slope[:2], torch.zeros(2, 2, 4)) is None
    empty = kernels.activate(torch.zeros(0, 4), None, shift, kept=True, sloped=True)
    assert empty is not None
    assert empty[1].shape == (0, 4)


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize(
    ("kind", "time", "activation"),
    [
        ("conv", "concat", "softplus"),
        ("conv", "concatsquash", "silu"),
        ("mlp", "concat", "tanh"),
        ("mlp", "none", "silu"),
    ],
)
def test_a_solve_by_kernels_is_that_without(
    kind: str, time: str, activation: str, precision: Any, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = MLP(3, (5, 4), time=time, activation=activation)
    if kind == "conv":
        net = ConvNet((1, 4, 3), (3, 2), time=time, activation=activation)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(drawn(p.numel(), seed=i, wide=0.4).reshape(p.shape))
    z = drawn(3, *net.event_shape, wide=1.0).requires_grad_()
    probes = Probes(drawn(2 * z.numel(), seed=9, wide=1.0).reshape(2, *z.shape), 0.5)
    solver, found = SolverConfig(step_size=0.5, memory=memory, precision=precision), []
    assert pointwise.kernels(activation, torch.device("cpu")) is not None  # whose check at first use is not counted
    monkeypatch.setattr(pytorch, "_compiled", lambda *args, **more: None)  # a GPU has no kernels in C
    used: list[str] = []
    launch = pointwise.Kernels._launch
    monkeypatch.setattr(
        pointwise.Kernels, "_launch", lambda self, name, *a, **s: (used.append(name), launch(self, name, *a, **s))[1]
    )
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(layered, "kernelled", lambda phi, name, device: phi)
        count = len(used)
        s = TorchEngine().integrate(net, z, probes, (0.0, 1.0), solver)
        loss = (s.l + 0.3 * s.E + 0.2 * s.n).sum() + s.z.square().sum()
        gradient = torch.autograd.grad(loss, [z, *net.parameters()])
        found.append(torch.cat([s.z.detach().reshape(-1), s.l.detach(), *(x.reshape(-1) for x in gradient)]))
        assert (len(used) > count) is kernels
    assert {"activate", "pull"} <= set(used)
    assert ("find_slope" in used) == (memory == "store")
    allowed = 2e-5 if precision == "ieee" else 2e-2
    assert float((found[0] - found[1]).norm() / found[1].norm()) < allowed


def test_a_kernel_that_is_wrong_or_cannot_be_made_is_not_used_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert isinstance(layered.kernelled(layered.ACTIVATIONS["tanh"], "tanh", cpu), Kernelled)
    assert layered.kernelled(layered.ACTIVATIONS["gelu"], "gelu", cpu) is layered.ACTIVATIONS["gelu"]
    pull = pointwise.Kernels.pull
    monkeypatch.setattr(pointwise.Kernels, "pull", lambda self, bar, *more: pull(self, bar * 1.01, *more))
    with pytest.warns(
        UserWarning, match=r"softplus on cpu is computed without kernels.*its (bend|product) is not that"
    ):
        assert pointwise.kernels("softplus", cpu) is None
    assert pointwise.kernels("softplus", cpu) is None  # and no second warning

    def failing(self: Any, *args: Any, **more: Any) -> Any:
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(pointwise.Kernels, "activate", failing)
    with pytest.warns(UserWarning, match=r"silu on cpu .* RuntimeError: no compiler$"):
        assert pointwise.kernels("silu", cpu) is None


def test_who_can_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("PYRNODE_NATIVE", "0")
    assert pointwise.kernels("tanh", cpu) is None
    assert "PYRNODE_NATIVE" in pointwise.status().why
    monkeypatch.delenv("PYRNODE_NATIVE")
    monkeypatch.setattr(pointwise, "DEVICES", ("cuda",))
    assert pointwise.kernels("tanh", cpu) is None
    assert pointwise.status().available
    check = next(check for check in doctor.diagnose() if check.name == "GPU kernels")
    assert check.status == "ok"
    assert "softplus, tanh, silu" in check.detail
    monkeypatch.setattr(pointwise.importlib.util, "find_spec", lambda name: None)
    assert not pointwise.status().available
    assert pointwise.kernels("tanh", torch.device("cuda")) is None
