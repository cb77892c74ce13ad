"""The compiled solves of a convolutional network, against the same solves by torch's operations in double precision."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrnode import native
from pyrnode.config import SolverConfig
from pyrnode.dynamics import ConvNet
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.errors import SolverError
from pyrnode.native import convnet
from pyrnode.native.mlp import ACTIVATIONS
from pyrnode.native.threads import WORK, apart
from pyrnode.probes import Probes

pytestmark = pytest.mark.skipif(
    not native.status("convnet").available, reason=f"no compiled kernel: {native.status('convnet').why}"
)

SOLVER = SolverConfig(step_size=0.5, sensealg="Backprop", memory="checkpoint")
CASES: list[dict[str, Any]] = [
    {"shape": (1, 7, 7), "hidden": (16, 16), "method": "RK4"},
    {"shape": (2, 5, 9), "hidden": (16, 24), "method": "Heun", "count": 2},
    {"shape": (1, 1, 1), "hidden": (8,), "method": "Euler", "batch": 2},
    {"shape": (12, 3, 2), "hidden": (16, 5), "method": "SSPRK33", "batch": 3},
    {"shape": (1, 2, 3), "hidden": (8, 8), "method": "Midpoint", "count": -1},
    {"shape": (3, 6, 6), "hidden": (16,), "method": "RK4", "count": 2, "context": 3},
    {"shape": (9, 1, 5), "hidden": (8,), "method": "Heun", "count": 0, "batch": 9, "context": 2},
]
"""Channels that fill no vector, images that fill no tile, batches that fill no group; -1: the exact trace."""


def make(
    shape: tuple[int, int, int] = (1, 7, 7),
    hidden: tuple[int, ...] = (16, 16),
    *,
    activation: str = "softplus",
    time: str = "concat",
    context: int = 0,
    kernel_size: int = 3,
) -> ConvNet:
    """A small network with no parameter at zero."""
    dynamics = ConvNet(shape, hidden, activation=activation, time=time, context_dim=context, kernel_size=kernel_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dynamics.parameters():
            scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return dynamics


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probes(z: Tensor, count: int) -> Probes | None:
    if count <= 0:
        return Probes.exact(z) if count else None
    return Probes(draw((count, *z.shape), 3).to(z.dtype), 1 / count)


def results(
    dynamics: ConvNet,
    z0: Tensor,
    solver: SolverConfig = SOLVER,
    *,
    count: int = 1,
    span: tuple[float, float] = (0.0, 1.0),
    context: Tensor | None = None,
) -> list[Tensor]:
    """z, l, E, n, and the gradients of a loss in which all take part, of start state, context and every parameter."""
    dynamics.zero_grad()
    z0 = z0.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    solution = TorchEngine().integrate(dynamics, z0, probes(z0, count), span, solver, context=context)
    loss = solution.z.square().sum() + (solution.l.sin() + 0.1 * solution.E + 0.01 * solution.n.square()).sum()
    loss.backward()
    outputs = [solution.z, solution.l, solution.E, solution.n, z0.grad, None if context is None else context.grad]
    return [x.detach().clone() for x in (*outputs, *(p.grad for p in dynamics.parameters())) if x is not None]


def exact(dynamics: ConvNet, z0: Tensor, solver: SolverConfig = SOLVER, **given: Any) -> list[Tensor]:
    """The same by torch's operations in double precision."""
    context = given.pop("context", None)
    context = None if context is None else context.double()
    return results(copy.deepcopy(dynamics).double(), z0.double(), solver, context=context, **given)


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    assert len(found) == len(expected)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C functions that are called, as they come to be."""
    names: list[str] = []
    run = convnet.Solve._run
    monkeypatch.setattr(
        convnet.Solve, "_run", lambda self, name, *args: (names.append(name), run(self, name, *args))[1]
    )
    return names


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("time", ["concat", "none", "concatsquash"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_solve_in_double_precision(activation: str, time: str, case: int, called: list[str]) -> None:
    given = {"count": 1, "batch": 5, "context": 0, **CASES[case]}
    dynamics = make(given["shape"], given["hidden"], activation=activation, time=time, context=given["context"])
    z0 = draw((given["batch"], *given["shape"]), 2)
    context = draw((given["batch"], given["context"]), 4) if given["context"] else None
    solver = replace(SOLVER, name=given["method"])
    for span in ((0.0, 1.0), (0.9, 0.1)):  # the last step is shorter
        expected = exact(dynamics, z0, solver, count=given["count"], span=span, context=context)
        assert not called
        found = [
            results(dynamics, z0, replace(solver, memory=memory), count=given["count"], span=span, context=context)
            for memory in ("checkpoint", "store")
        ]
        assert largest(found[0], expected) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # what is stored is what is found again
        assert called == ["forward", "backward"] * 2
        called.clear()


@pytest.mark.parametrize("method", ["DP5", "BS3", "Tsit5"])
def test_methods_that_estimate_errors_along_a_grid(method: str, called: list[str]) -> None:
    dynamics, z0 = make(), draw((2, 1, 7, 7), 2)
    solver = replace(SOLVER, name=method, adaptive=False)
    assert largest(results(dynamics, z0, solver), exact(dynamics, z0, solver)) < 1e-5
    assert called == ["forward", "backward"]


def test_the_papers_network(called: list[str]) -> None:
    dynamics, z0 = make((1, 28, 28), (64, 64, 64)), draw((3, 1, 28, 28), 2)
    assert largest(results(dynamics, z0), exact(dynamics, z0)) < 1e-5
    assert called == ["forward", "backward"]


def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None], called: list[str]) -> None:
    dynamics, z0 = make((2, 9, 6), (16, 24)), draw((11, 2, 9, 6), 2)
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(results(dynamics, z0))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert called == ["forward", "backward"] * 3


@pytest.mark.parametrize("kind", ["C", "python"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_threads_apart_cover_all_once(
    number: int, kind: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "python":
        monkeypatch.setattr(native, "library", lambda name: None)
    threads(number)
    for count in (0, 1, 2, 7):
        done, names = list[int](), set[int]()

        @WORK
        def work(_: int, start: int, stop: int, done: list[int] = done, names: set[int] = names) -> int:
            done.extend(range(start, stop))
            names.add(threading.get_ident())
            return int(5 in range(start, stop))

        if count > 5:
            with pytest.raises(MemoryError):
                apart(work, convnet._Job(), count)
        else:
            apart(work, convnet._Job(), count)
        assert sorted(done) == list(range(count))  # none is still at work
        assert len(names) <= max(1, min(number, count))


@pytest.mark.parametrize("memory", ["checkpoint", "store"])
def test_a_sample_does_not_depend_on_its_batch(memory: str) -> None:
    dynamics, z0 = make(), draw((13, 1, 7, 7), 2)
    eps = draw((2, 13, 1, 7, 7), 3)
    solver = replace(SOLVER, memory=memory)

    def solved(rows: slice) -> list[Tensor]:
        z = z0[rows].clone().requires_grad_()
        s = TorchEngine().integrate(dynamics, z, Probes(eps[:, rows], 0.5), (0.0, 1.0), solver)
        (gradient,) = torch.autograd.grad((s.z.square().sum() + s.l.sum() + s.n.sum()), z)
        return [s.z.detach(), s.l.detach(), s.E.detach(), s.n.detach(), gradient]

    whole = solved(slice(None))
    for rows in (slice(0, 1), slice(4, 9), slice(12, 13)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(solved(rows), whole, strict=True))


def test_small_batches_and_large_give_the_mean_of_their_gradients() -> None:
    dynamics, z0 = make(), draw((70, 1, 7, 7), 2)
    assert largest(results(dynamics, z0), exact(dynamics, z0)) < 1e-5


@pytest.mark.parametrize("memory", ["checkpoint", "store"])
def test_a_second_backward_pass_is_the_first(memory: str) -> None:
    dynamics, z0 = make(), draw((3, 1, 7, 7), 2).requires_grad_()
    solution = TorchEngine().integrate(dynamics, z0, probes(z0, 1), (0.0, 1.0), replace(SOLVER, memory=memory))
    loss = solution.z.square().sum() + solution.l.sum()
    inputs = [z0, *dynamics.parameters()]
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_that_change_in_place_are_transformed_again() -> None:
    dynamics, z0 = make(), draw((2, 1, 7, 7), 2)
    before = results(dynamics, z0)
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.mul_(1.5)
    after = results(dynamics, z0)
    assert largest(after, before) > 0.1
    assert largest(after, exact(dynamics, z0)) < 1e-5


def test_weights_that_change_before_the_backward_pass_are_refused() -> None:
    dynamics, z0 = make(), draw((2, 1, 7, 7), 2)
    solution = TorchEngine().integrate(dynamics, z0, probes(z0, 1), (0.0, 1.0), SOLVER)
    with torch.no_grad():
        dynamics.layers[1].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="changed in place"):
        solution.z.sum().backward()


def test_between_its_passes_a_solve_holds_no_transformed_weights() -> None:
    def held() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) and x.ndim == 4 and x.shape[0] == 36 for x in gc.get_objects())

    dynamics, z0 = make(), draw((2, 1, 7, 7), 2)
    before = held()
    solution = TorchEngine().integrate(dynamics, z0, probes(z0, 1), (0.0, 1.0), SOLVER)
    assert held() == before
    solution.z.sum().backward()
    assert dynamics.layers[1].weight.grad is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_as_by_torch(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics, z0 = make(), draw((3, 1, 7, 7), 2)
    z0[1, 0, 3, 3] = value
    messages = []
    for switch in ("1", "0"):
        monkeypatch.setenv(native.VARIABLE, switch)
        for start in (z0, z0.clone().requires_grad_()):
            with pytest.raises(SolverError) as caught:
                TorchEngine().integrate(dynamics, start, probes(z0, 1), (0.0, 1.0), SOLVER)
            messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert "in 1 of 3 samples" in messages[0]


def test_a_step_that_is_stored_is_kept_till_it_is_pulled_back() -> None:
    dynamics, z0 = make(), draw((5, 1, 7, 7), 2).requires_grad_()
    tapes = []
    for memory in ("checkpoint", "store", "auto"):
        solution = TorchEngine().integrate(dynamics, z0, probes(z0, 1), (0.0, 1.0), replace(SOLVER, memory=memory))
        (node,) = [x for x in gc.get_objects() if issubclass(type(x), convnet.Solve) and x.record is not None]
        tapes.append(None if node.tape is None else node.tape.numel())
        loss = solution.z.sum()
        loss.backward(retain_graph=True)
        assert solution.stats.nfe_backward == (8 if memory == "checkpoint" else 0)
        loss.backward()  # evaluates again
        assert solution.stats.nfe_backward == (16 if memory == "checkpoint" else 8)
        assert node.tape is None
        del solution, node, loss
        gc.collect()
    groups, pixels, evaluations = 3, 49, 8  # two samples in each group; φ(a), φ'(a) and g of two layers, f and w
    assert tapes[0] is None
    assert tapes[1] == tapes[2]
    assert tapes[1] == groups * evaluations * (6 * 2 * pixels * 16 + 2 * 112)


@pytest.mark.parametrize(
    "why",
    ["double", "5x5", "adaptive", "off", "few-to-few", "backsolve"],
)
def test_what_it_leaves_to_torch(why: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics = make(hidden=() if why == "few-to-few" else (16, 16), kernel_size=5 if why == "5x5" else 3)
    z0, solver = draw((2, 1, 7, 7), 2), SOLVER
    if why == "adaptive":
        solver = replace(SOLVER, name="BS3", rtol=1e-6, atol=1e-6)
    elif why == "backsolve":
        solver = SolverConfig(step_size=0.5, sensealg="BacksolveAdjoint")
    elif why == "off":
        monkeypatch.setenv(native.VARIABLE, "0")
    dtype = torch.float64 if why == "double" else torch.float32
    found = results(dynamics.to(dtype), z0.to(dtype), solver)
    assert not called
    assert largest(found, exact(dynamics, z0, solver)) < 2e-5
