"""The compiled solves of potential flows, against the same solves by torch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyrnode import native
from pyrnode.config import Config, SolverConfig
from pyrnode.dynamics import Potential
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.errors import SolverError
from pyrnode.flow import Flow
from pyrnode.native import potential
from pyrnode.objective import objective
from pyrnode.probes import Probes
from tests.test_native_mlp import largest

pytestmark = pytest.mark.skipif(
    not native.status("potential").available, reason=f"no compiled kernel: {native.status('potential').why}"
)

FUSED = SolverConfig(step_size=0.25, sensealg="Backprop")
PLAIN = replace(FUSED, memory="checkpoint")
DOUBLE, SINGLE = (torch.float64, 1e-12), (torch.float32, 1e-5)

SHAPES = {
    "two layers": (3, (7, 7), 10, 0),
    "one": (2, (5,), 1, 0),
    "three, and a context": (4, (9, 9, 9), 2, 2),
    "four": (3, (16, 16, 16, 16), 3, 0),
    "a line": (1, (6, 6), 1, 1),
}
"""Dimension, widths, rank, and features of the context."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C functions that are called."""
    names: list[str] = []
    run = potential.PotentialSolve._run

    def noted(self: potential.PotentialSolve, name: str, *args: object) -> None:
        names.append(name)
        run(self, name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(potential.PotentialSolve, "_run", noted)
    return names


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(
    shape: str = "two layers", *, activation: str = "logcosh", time: str = "concat", dtype: torch.dtype = torch.float64
) -> Potential:
    """A small potential with widths that fill no vector, and no parameter at zero."""
    d, hidden, rank, context = SHAPES[shape]
    made = Potential(d, hidden, activation=activation, time=time, rank=rank, context_dim=context).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def states(dynamics: Potential, batch: int) -> tuple[Tensor, Tensor | None]:
    generator, dtype = torch.Generator().manual_seed(2), dynamics.w.dtype
    z = torch.randn(batch, dynamics.event_shape[0], generator=generator, dtype=torch.float64).to(dtype)
    if not dynamics.context_dim:
        return z, None
    return z, torch.randn(batch, dynamics.context_dim, generator=generator, dtype=torch.float64).to(dtype)


def results(
    dynamics: Potential,
    batch: int,
    solver: SolverConfig,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    exact: bool = True,
    norm: bool = True,
    hjb: bool = True,
) -> list[Tensor]:
    """z and the integrals, and the gradients of a loss in which all take part, of state, context and parameters."""
    dynamics.zero_grad()
    given = [None if x is None else x.requires_grad_() for x in states(dynamics, batch)]
    z0, c = given
    assert z0 is not None
    probes = Probes.exact(z0.detach()) if exact else None
    s = TorchEngine().integrate(dynamics, z0, probes, span, solver, context=c, hjb=hjb and exact)
    loss, outputs = s.z.square().sum(), [s.z]
    if exact:
        loss = loss + (s.l.sin() + 0.1 * s.E).sum() + (0.01 * s.n.square().sum() if norm else 0)
        outputs += [s.l, s.E, s.n]
    if hjb and exact:
        assert s.H is not None
        loss = loss + 0.3 * s.H.sin().sum()
        outputs.append(s.H)
    loss.backward()
    gradients = [x.grad for x in (*given, *dynamics.parameters()) if x is not None]
    return [x.detach().clone() for x in (*outputs, *gradients) if x is not None]


@pytest.mark.parametrize(("time", "method"), [("concat", "RK4"), ("none", "SSPRK33")])
@pytest.mark.parametrize("activation", potential.CURVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_solve(shape: str, activation: str, time: str, method: str, called: list[str]) -> None:
    for dtype, tolerance in (DOUBLE, SINGLE):
        dynamics = make(shape, activation=activation, time=time, dtype=dtype)
        for span in ((0.0, 1.0), (0.9, 0.1)):  # the last step is shorter
            expected = results(dynamics, 70, replace(PLAIN, name=method), span)
            assert not called
            found = results(dynamics, 70, replace(FUSED, name=method), span)
            assert largest(found, expected) < tolerance
            assert called == ["forward", "backward"]
            called.clear()


@pytest.mark.parametrize(("exact", "norm", "hjb"), [(False, False, False), (True, False, False), (True, True, False)])
def test_what_is_not_asked_for_changes_nothing_else(exact: bool, norm: bool, hjb: bool, called: list[str]) -> None:
    """Without integrals; without a cotangent of the norm, whose pullback is left out; without the equation."""
    dynamics = make("four")
    options = {"exact": exact, "norm": norm, "hjb": hjb}
    expected = results(dynamics, 40, PLAIN, **options)
    assert largest(results(dynamics, 40, FUSED, **options), expected) < 1e-12
    assert called == ["forward", "backward"]


@pytest.mark.parametrize("batch", [1, 31, 64, 65, 200])
def test_any_batch(batch: int, called: list[str]) -> None:
    dynamics = make("three, and a context")
    expected = results(dynamics, batch, PLAIN)
    assert largest(results(dynamics, batch, FUSED), expected) < 1e-12
    assert called == ["forward", "backward"]


def test_a_sample_is_independent_of_its_batch(called: list[str]) -> None:
    dynamics = make(dtype=torch.float32)
    z0, _ = states(dynamics, 100)
    everyone, alone = (
        TorchEngine().integrate(dynamics, z, Probes.exact(z), (0.0, 1.0), FUSED, hjb=True) for z in (z0, z0[70:73])
    )
    for name in ("z", "l", "E", "n", "H"):
        assert torch.equal(getattr(everyone, name)[70:73], getattr(alone, name)), name
    assert called == ["forward", "forward"]


@pytest.mark.parametrize(("dtype", "tolerance"), [DOUBLE, SINGLE])
def test_threads_change_nothing_but_the_order_of_a_sum(dtype: torch.dtype, tolerance: float, threads: None) -> None:
    dynamics, found = make("three, and a context", dtype=dtype), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(dynamics, 300, FUSED))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:7], other[:7], strict=True))
        assert largest(other, found[0]) < tolerance


def test_saturated_activations_are_finite_and_right() -> None:
    """At arguments of hundreds, where e^a would overflow: as near to the solve in double as torch's own in single."""
    for activation in potential.CURVES:
        single, double = (make("two layers", activation=activation, dtype=dtype) for dtype, _ in (SINGLE, DOUBLE))
        for dynamics in (single, double):
            with torch.no_grad():
                dynamics.layers[0].bias.copy_(torch.linspace(-300, 300, 7))  # type: ignore[union-attr]
        truth, own = results(double, 20, PLAIN), results(single, 20, PLAIN)
        assert largest(results(single, 20, FUSED), truth) < 2 * max(largest(own, truth), 1e-5)


def test_twice_through_one_graph() -> None:
    dynamics = make()
    z0, _ = states(dynamics, 20)
    z0.requires_grad_()
    loss = TorchEngine().integrate(dynamics, z0, Probes.exact(z0.detach()), (0.0, 1.0), FUSED, hjb=True).z.sum()
    first = torch.autograd.grad(loss, [z0, dynamics.A], retain_graph=True)
    second = torch.autograd.grad(loss, [z0, dynamics.A])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_training_step_of_a_flow_is_the_kernels(called: list[str]) -> None:
    """Loss and gradient as with other memory, the context's network included."""
    settings = {"engine": "torch", "device": "cpu", "dtype": "float64", "network.kind": "potential", "hidden": [8, 8]}
    settings |= {"activation": "logcosh", "flow.network.initial": "ot-flow", "hjb": 0.2, "step_size": 0.25}
    config = Config().override({**settings, "blocks": 2, "penalties.divergence": "exact"})
    flow = Flow.build(config, (3,), context_dim=2)
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(30, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    found = []
    for memory in ("checkpoint", "auto"):
        flow.zero_grad()
        passage = flow.solve(x, Probes.exact, replace(config.solver, memory=memory), context=c, hjb=True)
        loss = objective(passage, config.penalties).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + len(list(flow.parameters()))
    assert largest(found[1], found[0]) < 1e-11
    assert called == ["forward", "forward", "backward", "backward"]


@pytest.mark.parametrize("solver", [replace(FUSED, name="DP5"), PLAIN, replace(FUSED, sensealg="BacksolveAdjoint")])
def test_what_it_does_not_do_is_left_to_torch(solver: SolverConfig, called: list[str]) -> None:
    results(make(), 10, solver)
    assert not called


def test_probed_solves_and_other_types_are_left_to_torch(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics = make()
    z0, _ = states(dynamics, 10)
    TorchEngine().integrate(dynamics, z0, Probes.draw(z0, 1), (0.0, 1.0), FUSED)
    half = make(dtype=torch.bfloat16)
    TorchEngine().integrate(half, states(half, 4)[0], None, (0.0, 1.0), FUSED)
    monkeypatch.setenv(native.VARIABLE, "0")
    results(dynamics, 10, FUSED)
    assert not called


def test_a_state_that_is_not_finite_is_named() -> None:
    dynamics = make()
    with torch.no_grad():
        dynamics.A.mul_(1e3)
    z0, _ = states(dynamics, 10)
    with pytest.raises(SolverError, match="not finite"):
        TorchEngine().integrate(dynamics, 1e150 * z0, Probes.exact(z0), (0.0, 1.0), FUSED)
