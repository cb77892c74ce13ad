"""CUDA graphs: everything but the capture itself, by a recorder that keeps operations and their memory.

`replaying.py` says what it has in common with CUDA's: nothing of Python's takes part in a replay, memory is fixed and
is used again by whatever is recorded later, and what must not be recorded is refused.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrnode import Config, Flow, SolverConfig, SolverError
from pyrnode.data import Splits, TensorSamples
from pyrnode.dynamics import MLP, ConvNet, Dynamics, Potential
from pyrnode.engines import Probes, TorchEngine, graphs
from pyrnode.training.trainer import Trainer
from tests.pretend import DEVICE, host, pretended, to_device
from tests.replaying import Replaying
from tests.test_device import total, trainer

FAST: dict[str, Any] = {"solver.name": "Heun", "step_size": 1.0}
"""Two evaluations a block: every operation goes through Python here, and is kept."""


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replaying]:
    """The pretended device, whose launches can be recorded."""
    with pretended() as device:
        recorder = Replaying(device)
        monkeypatch.setattr(graphs, "records", lambda device: device.type == DEVICE.type)
        monkeypatch.setattr(graphs, "recorder", lambda device: recorder)
        monkeypatch.setattr(graphs, "address", lambda x: host(x).data_ptr())
        yield recorder


def numbers(flow: Flow) -> list[Tensor]:
    return [host(p.detach()).clone() for p in flow.parameters()]


def replays(there: Replaying) -> list[int]:
    """How often each graph was replayed."""
    return [tape.replays for tape in there.tapes]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def steps(subject: Trainer, count: int) -> list[dict[str, Any]]:
    batches, records = subject._batches(), []
    for _ in range(count):
        record = subject._step(next(batches))
        assert record is not None
        records.append(record)
    return records


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("table", {}),
        ("gates", {"solver.memory": "checkpoint"}),
        ("context", {}),
        ("images", {}),
        ("images", {"solver.memory": "checkpoint", "solver.precision": "bf16"}),
        ("theirs", {"solver.precision": "tf32"}),
    ],
)
def test_training_by_graphs_gives_the_numbers_of_training_without(
    name: str, more: dict[str, Any], there: Replaying
) -> None:
    """Six steps: two without, one in which the graphs are recorded, three of replays, with weights that change."""
    without = trainer(name, "meta", **{**FAST, **more, "solver.graphs": False})
    wanted = steps(without, 6)
    assert not there.tapes
    subject = trainer(name, "meta", **{**FAST, **more})
    for found, record in zip(steps(subject, 6), wanted, strict=True):
        assert found["loss"] == pytest.approx(record["loss"], rel=1e-6)
        assert (found["nfe"], found["nfe_backward"]) == (record["nfe"], record["nfe_backward"])
    same(numbers(subject.flow), numbers(without.flow))
    blocks = len(subject.flow.blocks)
    assert len(there.tapes) == 2 * blocks
    assert replays(there) == [5] * blocks + [4] * blocks  # a forward graph's first results are compared apart


def test_a_step_is_a_few_launches_and_one_wait(there: Replaying) -> None:
    counts = {}
    for graphs_ in ("auto", False):
        subject = trainer("images", "meta", **{**FAST, "solver.graphs": graphs_})
        steps(subject, 3)
        batch = next(subject._batches())
        there.device.reset()
        subject._step(batch)
        counts[graphs_] = there.device.reset()
    assert counts["auto"].kernels["graph"] == 2 * 3
    assert total(counts["auto"].waits) == 1, counts["auto"].report()
    assert total(counts["auto"].uploads) == 0, counts["auto"].report()
    assert total(counts["auto"].kernels) < total(counts[False].kernels) / 3, counts["auto"].report(40)


def test_blocks_share_memory(there: Replaying) -> None:
    """What one graph has done with is the next one's: the pool is less than half of what is written to."""
    steps(trainer("images", "meta", **FAST), 4)
    assert there.pool.reused > len(there.pool.blocks)


def test_refined_steps_are_recorded_anew(there: Replaying) -> None:
    ends = {}
    for graphs_ in (False, "auto"):
        subject = trainer("images", "meta", **{**FAST, "step_size": "auto", "solver.graphs": graphs_})
        steps(subject, 4)
        first = len(there.tapes)
        subject.state.progress.refinement = 1
        steps(subject, 5)
        ends[graphs_] = numbers(subject.flow)
    same(ends["auto"], ends[False])
    assert first == 6
    assert len(there.tapes) == 12
    assert replays(there) == [3] * 3 + [2] * 3 + [4] * 3 + [3] * 3


def test_a_step_that_is_not_finite_is_named(there: Replaying) -> None:
    subject = trainer("images", "meta", **FAST)
    steps(subject, 4)
    with torch.no_grad():
        subject.flow.blocks[1].dynamics.layers[-1].bias.fill_(torch.nan)
    with pytest.raises(SolverError, match=r"block 1 .*not finite after step 1 of 1"):
        steps(subject, 1)
    assert replays(there) == [4] * 3 + [3] * 3  # one of each in the step that failed


def test_a_run_goes_on_after_a_restart(there: Replaying) -> None:
    subject = trainer("table", "meta", **{**FAST, "max_steps": 8, "validate_every": 8})
    steps(subject, 5)
    subject._snapshot = subject.state.capture()
    with torch.no_grad():
        subject.flow.blocks[0].dynamics.layers[-1].bias.fill_(torch.nan)
    assert subject.run()
    assert [r["event"] for r in subject.history if "event" in r] == ["restart"]
    assert len(there.tapes) == 4  # half the step has graphs of its own
    assert all(bool(torch.isfinite(p).all()) for p in numbers(subject.flow))


# -- one block -------------------------------------------------------------------------------------------------------


class Case:
    """A solve of one block, by graphs and without, as often as it is asked for."""

    def __init__(self, dynamics: Dynamics | None = None, **settings: Any) -> None:
        self.dynamics = dynamics or ConvNet((1, 4, 4), (3, 2)).to(DEVICE)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.dynamics.parameters():
                p.copy_(to_device(0.4 * torch.randn(p.shape, generator=generator)))
        self.generator, self.settings, self.engine = generator, settings, TorchEngine()

    def start(self, batch: int = 3) -> tuple[Tensor, Tensor]:
        z, eps = torch.randn(2, batch, *self.dynamics.event_shape, generator=self.generator)
        return to_device(z).requires_grad_(), to_device(eps.unsqueeze(0))

    def solve(self, z: Tensor, eps: Tensor, engine: TorchEngine | None = None, **more: Any) -> Any:
        solver = SolverConfig(**{"name": "Heun", "step_size": 0.5, **self.settings, **more})
        return (engine or self.engine).integrate(self.dynamics, z, Probes(eps, 1.0), (0.0, 1.0), solver)

    def loss(self, s: Any, weights: tuple[float, float] = (0.3, 0.2)) -> Tensor:
        value: Tensor = (s.l + weights[0] * s.E + weights[1] * s.n).sum() + s.z.square().sum()
        return value

    def gradient(self, s: Any, z: Tensor, weights: tuple[float, float] = (0.3, 0.2), **more: Any) -> list[Tensor]:
        found = torch.autograd.grad(self.loss(s, weights), [z, *self.dynamics.parameters()], **more)
        return [host(s.z.detach()).clone(), host(s.l.detach()).clone(), *(host(x).clone() for x in found)]

    def wanted(self, z: Tensor, eps: Tensor, weights: tuple[float, float] = (0.3, 0.2), **more: Any) -> list[Tensor]:
        return self.gradient(self.solve(z, eps, TorchEngine(), **{**more, "graphs": False}), z, weights)

    def warm(self, times: int = 4) -> None:
        for _ in range(times):
            z, eps = self.start()
            self.gradient(self.solve(z, eps), z)


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_probes_start_and_penalties_are_those_of_each_solve(memory: str, there: Replaying) -> None:
    case = Case(memory=memory)
    case.warm()
    assert len(there.tapes) == 2
    for weights in ((0.3, 0.2), (0.0, 0.0), (1.5, 0.7)):
        z, eps = case.start()
        same(case.gradient(case.solve(z, eps), z, weights), case.wanted(z, eps, weights))
    assert replays(there) == [6, 5]


def test_gradients_are_summed_over_batches(there: Replaying) -> None:
    """What a gradient is summed in is nobody else's memory."""
    case = Case()
    case.warm()
    wanted = None
    for _ in range(3):
        z, eps = case.start()
        case.loss(case.solve(z, eps)).backward()
        found = case.wanted(z, eps)[3:]
        wanted = found if wanted is None else [x + y for x, y in zip(wanted, found, strict=True)]
    same([host(p.grad) for p in case.dynamics.parameters()], wanted or [])


def test_results_are_nobody_elses_memory(there: Replaying) -> None:
    case = Case()
    case.warm()
    z, eps = case.start()
    s = case.solve(z, eps)
    before = [host(x.detach()).clone() for x in (s.z, s.l, s.E, s.n)]
    case.warm()
    same([host(x.detach()) for x in (s.z, s.l, s.E, s.n)], before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_passes_before_a_gradient(order: tuple[int, int], there: Replaying) -> None:
    """The second pass takes the first one's tape, whose gradient is that of the solve taken again."""
    case = Case()
    case.warm()
    starts = [case.start() for _ in range(2)]
    passes = [case.solve(z, eps) for z, eps in starts]
    for i in order:
        same(case.gradient(passes[i], starts[i][0]), case.wanted(*starts[i]))


def test_a_gradient_asked_for_twice(there: Replaying) -> None:
    case = Case()
    case.warm()
    z, eps = case.start()
    s = case.solve(z, eps)
    wanted = case.wanted(z, eps)
    same(case.gradient(s, z, retain_graph=True), wanted)
    same(case.gradient(s, z), wanted)


def test_second_derivatives_are_those_without(there: Replaying) -> None:
    case, found = Case(MLP(2, (4,)).to(DEVICE)), {}
    case.warm()
    z, eps = case.start()
    for graphs_ in ("auto", False):
        s = case.solve(z, eps, graphs=graphs_)
        (bar,) = torch.autograd.grad(case.loss(s), z, create_graph=True)
        found[graphs_] = [host(x) for x in torch.autograd.grad(bar.square().sum(), list(case.dynamics.parameters()))]
    same(found["auto"], found[False])


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_tapes_of_two_blocks_are_pulled_back_in_any_order(order: tuple[int, int], there: Replaying) -> None:
    """In the order other than the recorded one, the first gradient's graph writes where the other one's tape was."""
    one, two = Case(memory="store"), Case(memory="store")
    two.engine = one.engine
    starts = [case.start() for case in (one, two)]
    for turn in range(6):
        passes = [case.solve(*start) for case, start in zip((one, two), starts, strict=True)]
        for i in (1, 0) if turn < 4 else order:
            case = (one, two)[i]
            same(case.gradient(passes[i], starts[i][0]), case.wanted(*starts[i]))
        if turn == 3:
            assert replays(there) == [3, 3, 2, 2]


def test_an_order_that_is_not_one_for_graphs_gives_them_up_and_says_so_once(there: Replaying) -> None:
    case = Case()
    case.warm()
    for turn in range(5):
        starts = [case.start() for _ in range(2)]
        passes = [case.solve(z, eps) for z, eps in starts]
        if turn == 2:
            with pytest.warns(RuntimeWarning, match=r"without CUDA graphs.*not asked for in the order of the passes"):
                found = [case.gradient(s, z) for s, (z, _) in zip(passes, starts, strict=True)]
        else:
            found = [case.gradient(s, z) for s, (z, _) in zip(passes, starts, strict=True)]
        for gradient, start in zip(found, starts, strict=True):
            same(gradient, case.wanted(*start))


def test_weights_that_were_moved_are_recorded_anew(there: Replaying) -> None:
    case = Case()
    case.warm()
    z, eps = case.start()
    before = case.wanted(z, eps)
    moved: list[Any] = list(case.dynamics.parameters())
    for p in moved:
        p.inner = 1.5 * p.inner  # `.data =` would leave it behind
    assert not torch.allclose(case.wanted(z, eps)[1], before[1], rtol=1e-2)
    for _ in range(4):
        z, eps = case.start()
        same(case.gradient(case.solve(z, eps), z), case.wanted(z, eps))
    assert replays(there) == [3, 2, 3, 2]


def test_weights_that_change_between_solve_and_gradient_are_an_error(there: Replaying) -> None:
    case = Case()
    case.warm()
    z, eps = case.start()
    s = case.solve(z, eps)
    with torch.no_grad():
        next(case.dynamics.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        case.gradient(s, z)


def test_the_first_gradient_may_come_passes_after_the_first_graph(there: Replaying) -> None:
    """With weights that have changed since: the tape is that of the last replay."""
    case = Case()
    for _ in range(4):
        case.solve(*case.start())
    assert len(there.tapes) == 1
    with torch.no_grad():
        next(case.dynamics.parameters()).mul_(1.5)
    z, eps = case.start()
    same(case.gradient(case.solve(z, eps), z), case.wanted(z, eps))
    assert len(there.tapes) == 2
    case.warm(1)
    same(case.gradient(case.solve(z, eps), z), case.wanted(z, eps))


def test_shapes_that_change_have_no_graphs(there: Replaying) -> None:
    case = Case()
    for batch in (3, 4, 3, 4, 3, 4):
        z, eps = case.start(batch)
        case.gradient(case.solve(z, eps), z)
    assert not there.tapes
    case.warm()
    z, eps = case.start(2)
    same(case.gradient(case.solve(z, eps), z), case.wanted(z, eps))
    for batch in (3, 2, 3, 2, 3):  # now and then, they leave the graphs alone
        z, eps = case.start(batch)
        same(case.gradient(case.solve(z, eps), z), case.wanted(z, eps))
    assert replays(there) == [6, 5]


@pytest.mark.parametrize(
    ("settings", "dynamics"),
    [
        ({"name": "DP5", "rtol": 1e-2, "atol": 1e-2}, lambda: MLP(2, (4,))),
        ({"sensealg": "BacksolveAdjoint"}, lambda: MLP(2, (4,))),
        ({"graphs": False}, lambda: MLP(2, (4,))),
        ({}, lambda: Potential(2, (4,))),
    ],
)
def test_what_has_none(settings: dict[str, Any], dynamics: Callable[[], Any], there: Replaying) -> None:
    case = Case(dynamics().to(DEVICE), **settings)
    case.warm()
    assert not there.tapes


def test_nothing_is_recorded_where_no_gradient_is_asked_for_or_on_a_cpu(there: Replaying) -> None:
    case = Case()
    with torch.no_grad():
        for _ in range(4):
            case.solve(*case.start())
    subject = trainer("table", "cpu", **FAST)
    steps(subject, 4)
    assert not there.tapes


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["fails", "lies"])
@pytest.mark.parametrize("graph", [1, 2])
def test_where_recording_fails_training_goes_on_without_and_says_so_once(
    which: str, graph: int, there: Replaying
) -> None:
    setattr(there, which, graph)
    case = Case()
    said = r"goes on without CUDA graphs, slower, with the same numbers: .*; solver.graphs = false"
    case.warm(2)

    def three() -> None:
        for _ in range(3):
            z, eps = case.start()
            same(case.gradient(case.solve(z, eps), z), case.wanted(z, eps))

    with pytest.warns(RuntimeWarning, match=said) as caught:
        three()
    assert len(caught) == 1
    assert "capturing" in str(caught[0].message) if which == "fails" else "first results" in str(caught[0].message)


def test_a_copy_of_a_flow_has_no_graphs(there: Replaying) -> None:
    case = Case()
    case.warm()
    for engine in (copy.deepcopy(case.engine), pickle.loads(pickle.dumps(case.engine))):
        z, eps = case.start()
        same(case.gradient(case.solve(z, eps, engine), z), case.wanted(z, eps))
    assert replays(there) == [3, 2]


def test_the_recorder_refuses_waits_and_memory_that_was_given_back(there: Replaying) -> None:
    held = [to_device(torch.ones(3))]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        there.record(lambda: (held[0] * float(held[0].sum()),))
    graph, (y,) = there.record(lambda: (held[0] * 2 + 1,))
    assert bool(torch.isnan(host(y)).all())
    graph.replay()
    assert host(y).tolist() == [3.0, 3.0, 3.0]
    host(held[0]).fill_(2.0)
    graph.replay()
    assert host(y).tolist() == [5.0, 5.0, 5.0]
    held.clear()
    with pytest.raises(RuntimeError, match="given back"):
        graph.replay()


@pytest.mark.slow
def test_a_step_of_the_papers_network_is_some_hundred_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """At batch 200; counted without values, by a recorder that notes the launches alone."""

    class Counting:
        def record(self, work: Callable[[], Any]) -> Any:
            before = device.reset()
            found = work()
            device.counts, made = before, device.counts
            assert not made.waits
            assert not made.uploads
            return self, found

        def replay(self) -> None:
            device.counts.kernels["graph"] += 1

    images = TensorSamples(torch.zeros(600, 1, 28, 28, dtype=torch.uint8))
    config = Config.preset("finlay2020-mnist").override({"engine": "torch", "device": "meta"})
    with pretended(values=False, memory=80 * 10**9) as device:
        monkeypatch.setattr(graphs, "records", lambda device: True)
        monkeypatch.setattr(graphs, "recorder", lambda device: Counting())
        monkeypatch.setattr(graphs, "address", id)
        monkeypatch.setattr(graphs, "_compare", lambda found, wanted: None)
        subject = Trainer(config, Splits("zeros", images, images, images, (1, 28, 28), 256), None, progress=False)
        batch = next(subject._batches())
        for _ in range(3):
            subject._step(batch)
        device.reset()
        subject._step(batch)
        counts = device.reset()
    assert counts.kernels["graph"] == 20
    assert total(counts.kernels) <= 1_000, counts.report(40)
    assert total(counts.waits) == 1, counts.report()
