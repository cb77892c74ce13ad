"""The compiled solves with steps of each sample's own, against the same solves by torch's operations."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyrnode import native
from pyrnode.config import Config, SolverConfig
from pyrnode.dynamics import MLP
from pyrnode.engines.base import Solution
from pyrnode.engines.pytorch import TorchEngine
from pyrnode.errors import SolverError
from pyrnode.flow import Flow
from pyrnode.native import mlp
from pyrnode.native.adaptive import AdaptiveSolve
from pyrnode.solvers import METHODS
from tests.test_native_mlp import calls, largest, make, probes, results, states

pytestmark = pytest.mark.skipif(
    not native.status("mlp").available, reason=f"no compiled kernel: {native.status('mlp').why}"
)

DP5 = SolverConfig(name="DP5", sensealg="Backprop")
TIMES, FORWARD, RECORDED = ("concat", "none", "concatsquash"), ["start", "travel"], ["start", "travel", "back"]
LOOSE = {"BS3": 1e-3, "DP8": 1e-3}  # BS3 is slow else, and DP8's estimate little more than rounding


def by_operations(solver: SolverConfig) -> SolverConfig:
    """The same solver where no kernel does its work."""
    return replace(solver, memory="checkpoint")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C functions that are called."""
    return calls(monkeypatch)


def solution(dynamics: MLP, z0: Tensor, solver: SolverConfig = DP5, count: int = -1) -> Solution:
    return TorchEngine().integrate(dynamics, z0, probes(z0, count), (0.0, 1.0), solver)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.adaptive])
@pytest.mark.parametrize(
    ("count", "control"), [(0, "density"), (1, "density"), (2, "all"), (-1, "density"), (-1, "all")]
)
@pytest.mark.parametrize("time", TIMES)
def test_equals_the_solve_by_operations(time: str, count: int, control: str, method: str, called: list[str]) -> None:
    tolerance = LOOSE.get(method, 1e-5)
    solver = replace(DP5, name=method, error_control=control, rtol=tolerance, atol=0.5 * tolerance)
    dynamics, z0 = make(time=time), states(70)
    for span in ((0.0, 1.0), (0.9, 0.1)):
        expected = results(dynamics, z0, count, by_operations(solver), span)
        assert not called
        assert largest(results(dynamics, z0, count, solver, span), expected) < 1e-10
        assert called == RECORDED
        called.clear()


@pytest.mark.parametrize("count", [0, 1, -1])
@pytest.mark.parametrize("time", ["concat", "none"])
@pytest.mark.parametrize("batch", [1, 70, 200])  # lanes that take another sample in, and lanes that close up
def test_contexts_equal_the_solve_by_operations(batch: int, time: str, count: int, called: list[str]) -> None:
    dynamics, z0 = make("tanh", time, context_dim=4), states(batch)
    found = results(dynamics, z0, count, DP5, (0.0, 1.0))
    assert called == RECORDED
    assert largest(found, results(dynamics, z0, count, by_operations(DP5), (0.0, 1.0))) < 1e-10


@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
@pytest.mark.parametrize("time", TIMES)
def test_every_activation(activation: str, time: str) -> None:
    dynamics, z0 = make(activation, time), states(40)
    tolerance = 1e-3 if activation == "elu" else 1e-6  # its kinks make a step's error a matter of rounding
    solver = replace(DP5, rtol=tolerance, atol=tolerance)
    found, expected = (results(dynamics, z0, 1, s, (0.0, 1.0)) for s in (solver, by_operations(solver)))
    assert largest(found, expected) < 1e-10


@pytest.mark.parametrize("time", TIMES)
def test_single_precision_keeps_the_tolerance(time: str) -> None:
    tight = replace(DP5, rtol=1e-10, atol=1e-10)
    exact = results(make(time=time), states(70), -1, tight, (0.0, 1.0))
    single, z0 = make(time=time, dtype=torch.float32), states(70, torch.float32)
    errors = []
    for solver in (DP5, by_operations(DP5)):
        found = results(single, z0, -1, solver, (0.0, 1.0))
        errors.append(largest([x.double() for x in found], exact))
    assert errors[0] < max(1.5 * errors[1], 2e-5)


@pytest.mark.parametrize("batch", [0, 1, 31, 64, 65, 200])
def test_any_batch(batch: int) -> None:
    dynamics, z0 = make(), states(batch)
    found, expected = (results(dynamics, z0, 1, s, (0.0, 1.0)) for s in (DP5, by_operations(DP5)))
    assert [x.shape for x in found] == [x.shape for x in expected]
    if batch:
        assert largest(found, expected) < 1e-10
    else:
        assert not any(bool(x.any()) for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [-1, 0])
def test_a_sample_is_independent_of_its_batch(count: int, dtype: torch.dtype) -> None:
    """Bit for bit, its gradient too: wherever in a batch it stands, whoever else is there, and however many threads."""
    dynamics, everyone, before = make(dtype=dtype), states(300, dtype), torch.get_num_threads()
    everyone = everyone * torch.linspace(0.1, 3, 300)[:, None].to(dtype)  # some take many more steps than others
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(4))

    def solved(z0: Tensor) -> list[Tensor]:
        return results(dynamics, z0, count, DP5, (0.0, 1.0))[:5]

    try:
        torch.set_num_threads(1)
        expected = solved(everyone)
        for threads, chosen in ((1, rows), (1, rows[:37]), (1, rows[:1]), (2, torch.arange(300)), (3, rows)):
            torch.set_num_threads(threads)
            for a, b in zip(solved(everyone[chosen]), expected, strict=True):
                assert torch.equal(a, b[chosen])
    finally:
        torch.set_num_threads(before)


def test_twice_through_one_graph() -> None:
    dynamics = make()
    solved = solution(dynamics, states(5))
    loss = (solved.z.square().sum(1) + solved.l).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in dynamics.parameters() if p.grad is not None]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(dynamics.parameters(), first, strict=True))


@pytest.mark.parametrize("method", ["DP5", "BS3"])
def test_the_statistics_are_those_of_the_operations(method: str) -> None:
    dynamics, z0, stats = make(), 8 * states(100), []
    solver = replace(DP5, name=method, rtol=1e-3, atol=1e-3)
    for s in (solver, by_operations(solver)):
        solved = solution(dynamics, z0, s)
        (solved.z.sum() + solved.l.sum()).backward()
        stats.append(solved.stats)
    assert stats[0].rejected > 0
    assert vars(stats[0]) == vars(stats[1]) | {"nfe_backward": pytest.approx(stats[1].nfe_backward)}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("case", "status"),
    [("many steps", "MaxIters"), ("stiff", "DtLessThanMin"), ("parameter", "Unstable"), ("data", "Unstable")],
)
def test_what_goes_wrong_is_named_as_by_the_operations(
    case: str, status: str, gradients: bool, called: list[str]
) -> None:
    dynamics, z0, solver = make(), states(70), DP5
    with torch.no_grad():
        if case == "stiff":  # f is infinite from some time on
            dynamics, z0, solver = MLP(1, (1,)).double(), torch.ones(5, 1, dtype=torch.float64), DP5
            first, last = dynamics.layers
            first.weight.zero_(), first.time_weight.fill_(1e308), first.bias.fill_(-0.5e308)
            last.weight.fill_(10), last.bias.zero_()
        elif case == "parameter":
            dynamics.layers[1].weight[2, 3] = float("nan")
        elif case == "data":
            z0[5, 1] = float("inf")
        else:
            solver = replace(DP5, maxiters=3)
    said = []
    for s in (solver, by_operations(solver)):
        with torch.set_grad_enabled(gradients), pytest.raises(SolverError) as raised:
            solution(dynamics, z0, s)
        said.append((raised.value.status, str(raised.value)))
    assert said[0] == said[1]
    assert said[0][0] == status
    assert called


@pytest.mark.parametrize("time", TIMES)
def test_flows_of_two_blocks_use_it_both_ways(time: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config().override({"blocks": 2, "hidden": [8, 8], "time": time, "dtype": "float64", "standardize": "none"})
    flow, x = Flow.build(config, (3,)), states(90)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def used() -> list[Tensor]:
        z = flow.encode(x)
        return [flow.log_prob(x), z, flow.decode(z), flow.sample(50, seed=1)]

    found = used()
    assert called == FORWARD * 8
    assert torch.allclose(found[2], x, rtol=0, atol=1e-3)
    called.clear()
    monkeypatch.setenv(native.VARIABLE, "0")
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(found, used(), strict=True))
    assert not called


def test_kept_steps_are_freed_with_the_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    discard = AdaptiveSolve._discard.fget
    assert discard is not None

    def noting(self: AdaptiveSolve) -> object:
        free = discard(self)
        return lambda chunks: (freed.append(chunks), free(chunks))

    monkeypatch.setattr(AdaptiveSolve, "_discard", property(noting))
    dynamics = make()
    loss = solution(dynamics, states(70)).z.sum()
    loss.backward()
    assert not freed
    del loss
    gc.collect()
    assert len(freed) == 1
    with torch.no_grad():
        solution(dynamics, states(70))  # keeps none
    gc.collect()
    assert len(freed) == 1


def test_many_steps_fill_many_pieces_of_memory() -> None:
    dynamics, z0 = make(), states(300)
    solver = replace(DP5, rtol=1e-9, atol=1e-9)
    found, expected = (results(dynamics, z0, 1, s, (0.0, 1.0)) for s in (solver, by_operations(solver)))
    assert largest(found, expected) < 1e-10
