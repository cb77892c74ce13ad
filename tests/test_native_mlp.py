"""The compiled solves of a multilayer perceptron, against the same solves by torch's operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyrnode import native
from pyrnode.config import SolverConfig
from pyrnode.dynamics import MLP
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.errors import SolverError
from pyrnode.native import mlp
from pyrnode.native import threads as native_threads
from pyrnode.probes import Probes

pytestmark = pytest.mark.skipif(
    not native.status("mlp").available, reason=f"no compiled kernel: {native.status('mlp').why}"
)

FUSED = SolverConfig(step_size=0.25, sensealg="Backprop")
PLAIN = replace(FUSED, memory="checkpoint")


def make(
    activation: str = "softplus", time: str = "concat", dtype: torch.dtype = torch.float64, context_dim: int = 0
) -> MLP:
    """A small network with widths that fill no vector, and no parameter at zero."""
    dynamics = MLP(3, (7, 16, 5), activation=activation, time=time, context_dim=context_dim).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return dynamics


def states(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def probes(z: Tensor, count: int) -> Probes | None:
    """`count` random probes; -1 for the exact trace, 0 for none."""
    if count <= 0:
        return Probes.exact(z) if count else None
    return Probes.draw(z, count, generator=torch.Generator().manual_seed(3))


def results(dynamics: MLP, z0: Tensor, count: int, solver: SolverConfig, span: tuple[float, float]) -> list[Tensor]:
    """z, l, E, n, and the gradients of a loss in which all take part, of start state, context and every parameter."""
    dynamics.zero_grad()
    z0, context = z0.clone().requires_grad_(), None
    if dynamics.context_dim:
        context = torch.randn(len(z0), dynamics.context_dim, generator=torch.Generator().manual_seed(4)).to(z0)
        context.requires_grad_()
    solution = TorchEngine().integrate(dynamics, z0, probes(z0, count), span, solver, context=context)
    loss = solution.z.square().sum() + (solution.l.sin() + 0.1 * solution.E + 0.01 * solution.n.square()).sum()
    loss.backward()
    outputs = [solution.z, solution.l, solution.E, solution.n, z0.grad, *(p.grad for p in dynamics.parameters())]
    outputs += [] if context is None else [context.grad]
    return [x.detach().clone() for x in outputs if x is not None]


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    assert len(found) == len(expected)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True)
    )


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C functions that are called, as they come to be."""
    called: list[str] = []
    run = mlp.Network._run
    monkeypatch.setattr(mlp.Network, "_run", lambda self, name, *args: (called.append(name), run(self, name, *args))[1])
    return called


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C functions that are called."""
    return calls(monkeypatch)


@pytest.mark.parametrize(("method", "count"), [("RK4", 1), ("Euler", 0), ("Heun", 3), ("SSPRK33", -1), ("Midpoint", 2)])
@pytest.mark.parametrize("time", ["concat", "none", "concatsquash"])
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_equals_the_plain_solve(activation: str, time: str, method: str, count: int, fused: list[str]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
        dynamics, z0 = make(activation, time, dtype), states(70, dtype)
        for span in ((0.0, 1.0), (0.9, 0.1)):  # the last step is shorter
            expected = results(dynamics, z0, count, replace(PLAIN, name=method), span)
            assert not fused
            found = results(dynamics, z0, count, replace(FUSED, name=method), span)
            assert largest(found, expected) < tolerance
            assert fused == ["forward", "backward"]
            fused.clear()


@pytest.mark.parametrize(("method", "count"), [("RK4", 1), ("Euler", 0), ("SSPRK33", -1)])
@pytest.mark.parametrize("time", ["concat", "none"])
@pytest.mark.parametrize("batch", [1, 31, 70, 200])
def test_contexts_equal_the_plain_solve(batch: int, time: str, method: str, count: int, fused: list[str]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
        dynamics, z0 = make("tanh", time, dtype, context_dim=4), states(batch, dtype)
        found = results(dynamics, z0, count, replace(FUSED, name=method), (0.0, 0.9))
        assert fused == ["forward", "backward"]
        assert largest(found, results(dynamics, z0, count, replace(PLAIN, name=method), (0.0, 0.9))) < tolerance
        fused.clear()


def test_a_context_in_the_gate_is_left_to_torch(fused: list[str]) -> None:
    results(make(time="concatsquash", context_dim=2), states(5), 1, FUSED, (0.0, 1.0))
    assert not fused


@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_activations_over_their_whole_range(activation: str) -> None:
    """A network that writes φ of the first number to the second; the error in units of float32's rounding."""
    # In gelu's tail the argument's own rounding counts for more (torch's own error is 489 units at -3).
    lowest, bound = (-3.0, 5) if activation == "gelu" else (-80.0, 3)
    ends = torch.tensor([1e30, -1e-30, 1e-30, 0.0])
    a = torch.cat([torch.linspace(lowest, 100, 4001), torch.linspace(-2, 2, 4001), ends])
    weights = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])]
    library = mlp.library(torch.float32)
    assert library is not None
    solve = mlp.Solve(library, weights, torch.zeros(1, 3), None, activation, mlp.Grid([[]], [1.0], [1.0]))
    h = solve.forward(torch.stack([a, torch.zeros_like(a)], 1), None, record=False)[0][:, 1]
    expected = {**vars(torch.nn.functional), "tanh": torch.tanh}[activation](a.double())
    unit = torch.finfo(torch.float32).eps * expected.abs().clamp(min=1e-30)
    error = (h.double() - expected).abs() / unit
    assert float(error.max()) < bound, float(a[error.argmax()])


@pytest.mark.parametrize("batch", [0, 1, 31, 64, 65, 200])
def test_any_batch(batch: int) -> None:
    dynamics, z0 = make(), states(batch)
    found, expected = (results(dynamics, z0, 1, solver, (0.0, 1.0)) for solver in (FUSED, PLAIN))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_a_sample_is_independent_of_its_batch() -> None:
    dynamics, z0 = make(dtype=torch.float32), states(100, torch.float32)
    everyone = TorchEngine().integrate(dynamics, z0, probes(z0, -1), (0.0, 1.0), FUSED)
    alone = TorchEngine().integrate(dynamics, z0[70:73], probes(z0[70:73], -1), (0.0, 1.0), FUSED)
    assert torch.equal(everyone.z[70:73], alone.z)
    assert torch.equal(everyone.l[70:73], alone.l)


@pytest.mark.parametrize("time", ["concat", "concatsquash"])
@pytest.mark.parametrize("method", ["RK4", "Euler"])  # with Euler a thread's gradients fill no whole vectors
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_threads_change_nothing_but_the_order_of_a_sum(
    dtype: torch.dtype, tolerance: float, method: str, time: str
) -> None:
    dynamics, z0, before = make(time=time, dtype=dtype), states(300, dtype), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(dynamics, z0, 1, replace(FUSED, name=method), (0.0, 1.0)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:5], other[:5], strict=True))
        assert largest(other, found[0]) < tolerance


def test_twice_through_one_graph() -> None:
    dynamics, z0 = make(), states(5)
    solution = TorchEngine().integrate(dynamics, z0, probes(z0, 1), (0.0, 1.0), FUSED)
    loss = (solution.z.square().sum(1) + solution.l).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in dynamics.parameters() if p.grad is not None]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(dynamics.parameters(), first, strict=True))


def test_the_statistics_are_the_plain_solves() -> None:
    dynamics, z0 = make(), states(5)
    stats = []
    for solver in (FUSED, PLAIN):
        solution = TorchEngine().integrate(dynamics, z0, probes(z0, 1), (0.0, 0.9), solver)
        (solution.z.sum() + solution.l.sum()).backward()
        stats.append(solution.stats)
    assert stats[0] == stats[1]


def test_unit_vectors_are_probes_like_others() -> None:
    dynamics, z0 = make(time="concatsquash"), states(70)
    for solver in (FUSED, replace(FUSED, name="DP5")):
        found = [
            TorchEngine().integrate(dynamics, z0, Probes.exact(z0)._replace(axes=axes), (0.0, 1.0), solver)
            for axes in (True, False)
        ]
        for name in ("z", "l", "E", "n"):
            known, written_out = (getattr(solution, name).detach() for solution in found)
            assert torch.allclose(known, written_out, rtol=1e-13, atol=1e-13)


def test_what_is_not_finite_is_named_as_by_the_plain_solve() -> None:
    dynamics, z0 = make(), states(70)
    z0[3, 1] = float("nan")
    with pytest.raises(SolverError, match=r"not finite after step 1 of 4 .* in 1 of 70 samples"):
        TorchEngine().integrate(dynamics, z0, probes(z0, 1), (0.0, 1.0), FUSED)


def test_without_kernels_torch_does_it(fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics, z0 = make(), states(70)
    expected = results(dynamics, z0, 1, FUSED, (0.0, 1.0))
    assert fused
    fused.clear()
    monkeypatch.setenv(native.VARIABLE, "0")
    assert native.status("mlp") == (False, "PYRNODE_NATIVE=0 turns them off", None)
    assert largest(results(dynamics, z0, 1, FUSED, (0.0, 1.0)), expected) < 1e-13
    assert not fused


@pytest.mark.parametrize("changes", [{"sensealg": "BacksolveAdjoint"}, {"memory": "store"}, {"memory": "checkpoint"}])
def test_what_it_leaves_to_torch(changes: dict[str, str], fused: list[str]) -> None:
    solver = replace(FUSED, **changes)
    results(make(), states(4), 1, solver, (0.0, 1.0))
    assert not fused


@pytest.mark.parametrize(
    ("batch", "time", "dtype", "kind"),
    [
        (70, "concat", torch.float32, "openmp"),
        (640, "concat", torch.float32, "openmp"),
        (640, "concat", torch.float32, "python"),
        (640, "concatsquash", torch.float64, "openmp"),
        (5000, "none", torch.float32, "openmp"),
    ],
)
@pytest.mark.parametrize("solver", [FUSED, SolverConfig(name="DP5")], ids=["grid", "adaptive"])
def test_gradients_do_not_depend_on_the_number_of_threads(
    batch: int, time: str, dtype: torch.dtype, kind: str, solver: SolverConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "python":
        monkeypatch.setattr(native_threads, "_team", lambda: None)
    dynamics, z0, before = make(time=time, dtype=dtype), states(batch, dtype), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(dynamics, z0, 1, solver, (0.0, 1.0)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_parts_are_many_where_they_are_small_and_bounded() -> None:
    assert [mlp.parts_of(blocks, 2**14) for blocks in (0, 1, 7, 64, 10**6)] == [1, 1, 7, 64, 64]
    assert mlp.parts_of(10**6, 2**21) == 32
    assert mlp.parts_of(10**6, 2**30) == 16
    bars = torch.arange(7 * 3, dtype=torch.float64).reshape(7, 3)
    assert torch.equal(mlp.total(bars.clone()), bars.sum(0))
