"""Whole solves in Triton's interpreter on the CPU, against torch's engine in double precision (`native.device_mlp`)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, Flow, SolverConfig
from pyrnode.dynamics import MLP, Dynamics
from pyrnode.engines import Probes, TorchEngine, fused
from pyrnode.native import device_mlp

MODULES = ("pyrnode.native.triton_kernels", "pyrnode.native.triton_mlp")
ENGINE = TorchEngine()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are used on the CPU, where Triton interprets them; it asks for that when they are defined."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch on Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(device_mlp, "DEVICES", ("cpu",))
    for name in MODULES:
        sys.modules.pop(name, None)
    device_mlp._checked.cache_clear()
    yield
    for name in MODULES:
        sys.modules.pop(name, None)
    device_mlp._checked.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    names: list[str] = []
    original = device_mlp.Solve._launch

    def launch(self: Any, name: str, *args: Any, **more: Any) -> None:
        names.append(name)
        original(self, name, *args, **more)

    monkeypatch.setattr(device_mlp.Solve, "_launch", launch)
    return names


def net(dim: int, hidden: tuple[int, ...], *, activation: str = "softplus", time: str = "concat") -> MLP:
    made = MLP(dim, hidden, activation=activation, time=time)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=source) / max(1, p.shape[-1]) ** 0.5)
    return made


def solved(dynamics: Dynamics, batch: int, probes: int | str | None, solver: SolverConfig, span: Any) -> list[Tensor]:
    """State, integrals, and the gradients of a loss in which all of them take part."""
    source = torch.Generator().manual_seed(2)
    like = next(dynamics.parameters())
    z = torch.randn(batch, *dynamics.event_shape, generator=source).to(like).requires_grad_()
    drawn: Probes | None = None
    if isinstance(probes, int):
        drawn = Probes(torch.randn(probes, *z.shape, generator=source).to(like), 1 / probes)
    elif probes is not None:
        drawn = Probes.exact(z.detach())
    s = ENGINE.integrate(dynamics, z, drawn, span, solver)
    weight = torch.linspace(0.5, 1.5, batch).to(like)
    loss = ((s.l + 0.3 * s.E - 0.2 * s.n) * weight).sum() + (s.z * z.detach().cos()).sum()
    return [s.z, s.l, s.E, s.n, *torch.autograd.grad(loss, [z, *dynamics.parameters()])]


def compare(
    dynamics: MLP,
    taken: list[str],
    *,
    batch: int = 5,
    probes: int | str | None = 1,
    span: tuple[float, float] = (0.0, 1.0),
    most: float = 2e-5,
    **settings: Any,
) -> None:
    solver = SolverConfig(**{"name": "RK4", "step_size": 0.5, **settings})
    taken.clear()
    found = solved(dynamics, batch, probes, solver, span)
    assert taken[-2:] == ["forward", "backward"]
    taken.clear()
    wanted = solved(copy.deepcopy(dynamics).double(), batch, probes, solver, span)
    assert taken == []  # of double precision there are none
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.float32
        x, y = x.detach().double(), y.detach()
        assert float((x - y).norm()) <= most * (1e-3 + float(y.norm())), (x, y)


@pytest.mark.parametrize("activation", ["softplus", "tanh", "silu"])
@pytest.mark.parametrize("time", ["concat", "none"])
def test_activations_and_ways_of_time(taken: list[str], activation: str, time: str) -> None:
    compare(net(3, (7, 5), activation=activation, time=time), taken)


@pytest.mark.parametrize(
    ("dim", "hidden"),
    [(1, (1,)), (2, (16,)), (16, (16, 16)), (3, (17, 4, 9)), (20, (3,)), (5, (33, 2)), (2, (64, 64, 64)), (64, (8,))],
    ids=str,
)
def test_widths_that_are_odd_full_and_padded(taken: list[str], dim: int, hidden: tuple[int, ...]) -> None:
    compare(net(dim, hidden), taken, step_size=1.0)


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 40])
def test_batches_that_do_not_fill_a_program(taken: list[str], batch: int) -> None:
    compare(net(3, (6, 5)), taken, batch=batch)


@pytest.mark.parametrize("probes", [1, 2, 3, "exact", None])
def test_probes(taken: list[str], probes: int | str | None) -> None:
    compare(net(4, (6, 5)), taken, probes=probes)


@pytest.mark.parametrize("name", ["Euler", "Midpoint", "Heun", "RK4", "DP5", "DP8"])
def test_methods(taken: list[str], name: str) -> None:
    compare(net(3, (6,)), taken, name=name, adaptive=False)


@pytest.mark.parametrize("span", [(0.0, 0.7), (1.0, 0.0)], ids=["does not divide", "backwards"])
def test_spans(taken: list[str], span: tuple[float, float]) -> None:
    compare(net(3, (6, 5)), taken, span=span, step_size=0.3)


def test_what_it_is_not_for_goes_on_as_it_is(taken: list[str]) -> None:
    solver = SolverConfig(name="RK4", step_size=0.5)
    cases: list[tuple[Dynamics, SolverConfig]] = [
        (net(3, (5,), time="concatsquash"), solver),
        (MLP(3, (5,), activation="gelu"), solver),
        (net(3, (65,)), solver),
        (net(3, (5,)), SolverConfig(name="DP5", rtol=1e-3, atol=1e-3)),
        (net(3, (5,)), SolverConfig(name="RK4", step_size=0.5, memory="checkpoint")),
        (net(3, (5,)), SolverConfig(name="RK4", step_size=0.5, precision="bf16")),
    ]
    for dynamics, chosen in cases:
        device_mlp._checked("softplus", torch.device("cpu"))
        taken.clear()
        solved(dynamics, 3, 1, chosen, (0.0, 1.0))
        assert taken == [], (dynamics, chosen)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    original = device_mlp.Solve.backward

    def wrong(self: Any, *args: Any) -> Any:
        z_bar, w_bars, *rest = original(self, *args)
        return (z_bar, [w_bars[0] * 1.01, *w_bars[1:]], *rest)

    monkeypatch.setattr(device_mlp.Solve, "backward", wrong)
    with pytest.warns(UserWarning, match="softplus on cpu are solved step by step, slower"):
        assert not device_mlp._checked("softplus", torch.device("cpu"))
    assert not device_mlp.usable("softplus", [torch.zeros(4, 3), torch.zeros(3, 4)], torch.zeros(2, 3), 1)


def test_training_by_them_is_training(taken: list[str]) -> None:
    """Some steps of a flow of two blocks; and its scores by fixed steps."""
    settings: dict[str, Any] = {"engine": "torch", "device": "cpu", "hidden": (8, 8), "solver": "RK4"}
    settings |= {"step_size": 0.5, "batch_size": 20, "max_steps": 3, "validate_every": 3, "samples": 100, "blocks": 2}
    settings |= {"evaluation.solver.rtol": 1e-2, "evaluation.solver.atol": 1e-2, "learning_rate": 0.01}

    def trained() -> Flow:
        return pyrnode.train("8gaussians", preset=Config(), evaluate=False, progress=False, **settings).flow

    flow = trained()
    assert taken.count("forward") >= taken.count("backward") == 6 + 1  # and once to look whether it is right
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.device_mlp, "usable", lambda *_: False)
        expected = trained()
    for p, q in zip(flow.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_gradient_may_be_asked_for_twice(taken: list[str]) -> None:
    dynamics = net(3, (5,))
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    solver = SolverConfig(name="RK4", step_size=0.5)
    loss = ENGINE.integrate(dynamics, z, Probes.exact(z.detach()), (0.0, 1.0), solver).l.sum()
    first, second = (torch.autograd.grad(loss, [z, *dynamics.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert taken[-2:] == ["backward", "backward"]
