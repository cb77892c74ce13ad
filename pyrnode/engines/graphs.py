"""CUDA graphs: a block's solve of fixed steps and its pullback, recorded once and then replayed by one launch each.

A graph is a list of launches with everything but the numbers in memory fixed: which memory, which shapes, and whatever
Python decided on the way. So start state, probes, context and cotangents are copied to where the graph reads them,
results are copied from where it writes them, and whatever else a solve depends on is part of what was `_Asked`. Weights
are read where the optimiser changes them in place.

Graphs share one pool of memory, as the solves of one training step do: a tape lies there from its block's forward graph
to its backward graph, and before and after other graphs use the same memory. Replayed in the order in which they were
recorded they do not harm each other; where a program takes another order (two passes before one gradient, a gradient
asked for twice), the tape is known to be gone, and the solve is taken again without graphs.

Nothing of CUDA has run here. What is not CUDA's is tested with a recorder that keeps the operations, their memory and
its reuse (`tests/replaying.py`); and each graph's first results are compared with the solve's own.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyrnode import solvers
from pyrnode.config import SolverConfig
from pyrnode.dynamics.base import Dynamics
from pyrnode.dynamics.layered import BoundLayers
from pyrnode.engines.augmented import Augmented
from pyrnode.engines.base import Stats
from pyrnode.engines.torch_solve import TorchSolve, check_versions, replay

_AFTER = 3
"""The so-many-eth time in a row that a block is asked for the same solve, it is recorded."""

_AGREE = 1e-2
"""How far a graph's first results may be from the solve's own, relatively; they are the same operations."""

_STALE = 3
"""A gradient whose tape was gone has all graphs recorded anew; after so many, a program's order is not one for them."""

Results = tuple[Tensor | None, ...]
Eager = Callable[[Augmented, Tensor, Stats], TorchSolve]
"""The solve in single launches, of a system from a start state."""


class Graph(Protocol):
    """Recorded launches."""

    def replay(self) -> None:
        """Does them again, on what is in memory now."""


class Recorder(Protocol):
    """Records launches, of graphs that share a pool of memory."""

    def record(self, work: Callable[[], Results]) -> tuple[Graph, Results]:
        """The launches of `work`, which need not have been done, and the tensors that they leave their results in.

        Raises:
            RuntimeError: There is something among them that cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records CUDA's launches."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Results]) -> tuple[Graph, Results]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),  # other threads may copy
        ):
            found = work()
        return graph, found


def records(device: torch.device) -> bool:
    """Whether a device has graphs."""
    return device.type == "cuda"


def recorder(device: torch.device) -> Recorder:
    """Who records launches on a device, with a pool of its own."""
    return CudaRecorder(device)


def _stream(device: torch.device) -> int | None:
    """Where launches go to at present; `None` where they cannot be recorded now, since someone else does."""
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def address(x: Tensor) -> int:
    """Where a tensor's numbers are."""
    return x.data_ptr()


class _Asked(NamedTuple):
    """What a solve depends on beside numbers in memory."""

    tensors: tuple[Any, ...]  # of start state, probes and context: shape, strides and type
    probes: tuple[float, bool] | None
    parameters: tuple[int, ...]
    t_span: tuple[float, float]
    solver: SolverConfig
    device: torch.device
    stream: int


def _asked(system: Augmented, z0: Tensor, t_span: tuple[float, float], solver: SolverConfig) -> _Asked | None:
    """`None` where it is nothing to be recorded."""
    stream = _stream(z0.device)
    if stream is None or solvers.adaptive(solver) or solver.sensealg != "Backprop":
        return None
    if not isinstance(system.bound, BoundLayers):
        return None
    tensors = tuple((x.shape, x.stride(), x.dtype) for x in _inputs(system, z0))
    probes = None if system.probes is None else (system.probes.weight, system.probes.axes)
    parameters = tuple(address(p) for p in system.dynamics.solved_parameters())
    return _Asked(tensors, probes, parameters, t_span, solver, z0.device, stream)


def _inputs(system: Augmented, z0: Tensor) -> list[Tensor]:
    held = system.held(None)
    return [x for x in (z0, held.eps, held.c) if x is not None]


class _Arena:
    """The graphs that share a pool, and whose tapes are in it at present."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._tapes, self._count = recorder, list[_Recording](), itertools.count(1)

    def record(self, work: Callable[[], Results]) -> tuple[Graph, Results, int]:
        """The graph, where it leaves its results, and its number: later ones know what memory was taken then."""
        return *self._recorder.record(work), next(self._count)

    def add(self, recording: _Recording) -> None:
        """One more whose tape is to be watched."""
        self._tapes.append(recording)

    def replays(self, number: int) -> None:
        """The graph of that number will be replayed.

        It was recorded beside the tapes that were there then, and may write to any other one's memory.
        """
        for tape in self._tapes:
            if not tape.number < number <= tape.last:
                tape.token = None

    def clear(self) -> None:
        """Forgets all graphs; their memory is free again."""
        for tape in self._tapes:
            tape.token = None
        self._tapes.clear()


class _Recording:
    """The graphs of one block's solve: forward, and backward from when a gradient has first been asked for.

    Attributes:
        asked: What it is the solve of.
        number: Number of the forward graph, from which on there is a tape.
        last: That of the backward graph, which ends it.
        token: Whose tape it is; `None` where there is none.
        arena: The graphs that it shares memory with.
    """

    def __init__(self, arena: _Arena, asked: _Asked, system: Augmented, z0: Tensor, eager: Eager) -> None:
        self.asked, self.arena, self.last = asked, arena, math.inf
        self.token: int | None = None
        held = system.held(None)
        own = Augmented(
            system.dynamics,
            None if system.probes is None else system.probes._replace(eps=system.probes.eps.clone()),
            None if held.c is None else held.c.clone(),
            total_derivative=False,
            precision=system.precision,
        )
        z = own.bound.layout(z0.clone())
        self._solve: TorchSolve | None = eager(own, z, Stats())
        own.release()  # what is made of the weights is made in the graph
        self._given = _inputs(own, z)
        forward = self._solve.forward
        self._forward, found, self.number = arena.record(lambda: forward(z))
        self._found = [x for x in found if x is not None]
        self._backward: Graph | None = None
        self._stats = dict(vars(self._solve.stats))
        arena.add(self)

    def forward(self, system: Augmented, z0: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """State and integrals at the end time; the tape is that of `token`."""
        self.arena.replays(self.number)
        torch._foreach_copy_(self._given, _inputs(system, z0))
        self._forward.replay()
        self.token = token
        z, q = _copied(self._found)
        return z, q

    @property
    def complete(self) -> bool:
        """Whether there is a backward graph."""
        return self._backward is not None

    def add_backward(self, z_bar: Tensor, q_bar: Tensor) -> None:
        """Records the backward graph, for cotangents like these; the tape is there."""
        solve = self._solve
        assert solve is not None
        solve.versions = solve.system.versions()  # the weights of the last replay, which need not be the recorded ones
        self._bars = [z_bar.clone(), q_bar.clone()]

        def work() -> Results:
            z0_bar, c_bar, gradients = solve.backward(*self._bars)
            return z0_bar, c_bar, *gradients

        self._backward, self._gradient, self.last = self.arena.record(work)
        self._nfe_backward = solve.stats.nfe_backward
        self._solve = None  # and with it the tape, whose memory is free for later graphs

    def backward(self, z_bar: Tensor, q_bar: Tensor) -> Results:
        """Cotangents of start state, context and parameters; the tape is gone then."""
        assert self._backward is not None
        self.arena.replays(int(self.last))
        self.token = None
        torch._foreach_copy_(self._bars, [z_bar, q_bar])
        self._backward.replay()
        found = iter(_copied([x for x in self._gradient if x is not None]))
        return tuple(None if x is None else next(found) for x in self._gradient)

    def count(self, stats: Stats, *, backward: bool = False) -> None:
        """What the solve did."""
        if backward:
            stats.nfe_backward += self._nfe_backward
        else:
            vars(stats).update(self._stats)


def _copied(xs: list[Tensor]) -> list[Tensor]:
    """Copies, which no replay writes to."""
    copies = [torch.empty_like(x) for x in xs]
    torch._foreach_copy_(copies, xs)
    return copies


@dataclass
class _Known:
    """What a block was asked for last, and how often in a row; the graphs that it has."""

    asked: _Asked | None = None
    count: int = 0
    recording: _Recording | None = None


class Graphs:
    """The graphs of an engine, by the block's dynamics. A copy of it has none: memory and weights are others'."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Dynamics, _Known] = WeakKeyDictionary()
        self._arena: _Arena | None = None
        self._tokens, self._lock = itertools.count(1), threading.RLock()
        self._stale = 0  # gradients whose tape was gone
        self._reason: str | None = None  # why there are none

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    @torch.no_grad()
    def solve(
        self,
        system: Augmented,
        z0: Tensor,
        t_span: tuple[float, float],
        solver: SolverConfig,
        stats: Stats,
        eager: Eager,
    ) -> Graphed | None:
        """The solve by graphs; `None` where there are none, or none yet."""
        if self._reason is not None or not records(z0.device):
            return None
        asked = _asked(system, z0, t_span, solver)
        if asked is None:
            return None
        with self._lock:
            known = self._known.setdefault(system.dynamics, _Known())
            if known.recording is not None and known.recording.asked == asked:
                known.asked, known.count = asked, _AFTER  # where its tape is gone, the next one is recorded anew
                return Graphed(self, known.recording, system, stats, eager)
            known.count = known.count + 1 if known.asked == asked else 1
            known.asked = asked
            if known.count < _AFTER:
                return None
            recording = self._record(known, asked, system, z0, eager)
            return None if recording is None else Graphed(self, recording, system, stats, eager)

    def _record(self, known: _Known, asked: _Asked, system: Augmented, z0: Tensor, eager: Eager) -> _Recording | None:
        """The graph, if there can be one; an old one of other shapes, steps or weights is replaced, and so are all."""
        if known.recording is not None:
            self._clear()
        wanted = eager(system, z0, Stats()).forward(z0)
        try:
            self._arena = self._arena or _Arena(recorder(z0.device))
            recording = _Recording(self._arena, asked, system, z0, eager)
            _compare(recording.forward(system, z0, 0), wanted)
        except RuntimeError as error:
            self.give_up(str(error))
            return None
        known.recording = recording
        return recording

    def _clear(self) -> None:
        """Forgets all graphs; what is asked for again is recorded in the order of that pass."""
        if self._arena is not None:
            self._arena.clear()
        self._arena = None
        for known in self._known.values():
            known.recording = None

    def give_up(self, reason: str) -> None:
        """No graphs from here on; says so."""
        first = self._reason is None
        self._reason = reason
        self._clear()
        if first:
            why = reason.strip().splitlines()[0] if reason.strip() else "no reason was given"
            warnings.warn(
                f"training goes on without CUDA graphs, slower, with the same numbers: {why}; "
                "solver.graphs = false does without from the start",
                RuntimeWarning,
                stacklevel=2,
            )

    def _misses(self) -> None:
        """A tape is gone: the next pass may be the one to record."""
        self._stale += 1
        if self._stale < _STALE:
            self._clear()
        else:
            self.give_up("gradients are not asked for in the order of the passes that they are of")

    def forward(self, recording: _Recording, system: Augmented, z0: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
        """The forward graph's results, and the token of its tape."""
        with self._lock:
            token = next(self._tokens)
            return token, recording.forward(system, z0, token)

    def backward(
        self, recording: _Recording, token: int, bars: tuple[Tensor, Tensor], again: Callable[[], Results]
    ) -> tuple[Results, bool]:
        """Cotangents, and whether they are the backward graph's; else they are those of the solve taken `again`."""
        with self._lock:
            if recording.token != token:
                if recording.arena is self._arena:
                    self._misses()
                return again(), False
            if recording.complete:
                return recording.backward(*bars), True
            wanted = again()
            try:
                recording.add_backward(*bars)
                found = recording.backward(*bars)
                _compare(found, wanted)
            except RuntimeError as error:
                self.give_up(str(error))
                return wanted, False
            return found, True


def _compare(found: Results, wanted: Results) -> None:
    """Raises `RuntimeError` where a graph's results are not the solve's own; waits for the device."""
    pairs = [(x, y) for x, y in zip(found, wanted, strict=True) if x is not None and y is not None]
    apart = torch.stack([torch.linalg.vector_norm(x - y) for x, y in pairs])
    size = torch.stack([torch.linalg.vector_norm(y) for _, y in pairs])
    finite = math.isfinite(float(size.sum()))
    if finite and not bool((apart <= _AGREE * size).all()):
        raise RuntimeError("a graph's first results are not those of its solve")


class Graphed:
    """One solve by graphs, and its gradient, as `base.Solve` has them.

    Args:
        graphs: Those of the engine.
        recording: Those of the block.
        system: The system with this solve's probes and context.
        stats: What the solve does.
        eager: The solve without graphs, where its tape is gone when a gradient is asked for.
    """

    def __init__(self, graphs: Graphs, recording: _Recording, system: Augmented, stats: Stats, eager: Eager) -> None:
        self._graphs, self._recording = graphs, recording
        self._system, self._stats, self._eager = system, stats, eager

    @torch.no_grad()
    def forward(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        self._z0, self._versions = z0, self._system.versions()
        self._system.release()
        self._token, found = self._graphs.forward(self._recording, self._system, z0)
        self._recording.count(self._stats)
        return found

    def backward(self, z_bar: Tensor, q_bar: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        check_versions(self._system, self._versions)
        bars = z_bar, q_bar
        found, by_graph = self._graphs.backward(self._recording, self._token, bars, lambda: self._again(*bars))
        if by_graph:
            self._recording.count(self._stats, backward=True)
        else:
            self._stats.nfe_backward += self._taken_again
        z0_bar, c_bar, *gradients = found
        assert z0_bar is not None
        return z0_bar, c_bar, [x for x in gradients if x is not None]

    def _again(self, z_bar: Tensor, q_bar: Tensor) -> Results:
        solve = self._eager(self._system, self._z0, Stats())
        solve.forward(self._z0)
        z0_bar, c_bar, gradients = solve.backward(z_bar, q_bar)
        self._taken_again = solve.stats.nfe_backward
        return z0_bar, c_bar, *gradients

    def replay(self, z0: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        asked = self._recording.asked
        return replay(self._system, z0, c, asked.t_span, asked.solver)
