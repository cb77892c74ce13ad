"""The Julia engine: OrdinaryDiffEq's solvers and SciMLSensitivity's adjoints, behind the same contract.

The only file that imports juliacall. One call is one solve of one block, forward or back. All arrays are torch's: Julia
computes on their memory (through DLPack) and writes its results into them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from pyrnode import julia_image, julia_setup
from pyrnode.config import SolverConfig
from pyrnode.contexts import Contexts
from pyrnode.dynamics import MLP, ConvNet, Dynamics, Potential
from pyrnode.dynamics.layered import LayeredDynamics
from pyrnode.engines.base import Engine, Solution, Stats, check_potential, check_state, embedded, run
from pyrnode.engines.foreign import Foreign
from pyrnode.engines.julia_words import JuliaFailure, check_options, in_words
from pyrnode.errors import ConfigError, EngineUnavailableError, unknown_name
from pyrnode.julia_times import Times, Watch
from pyrnode.probes import Probes
from pyrnode.solvers import SolverInfo, step_size, unknown_solver

SENSITIVITIES: dict[str, str] = {
    "InterpolatingAdjoint": 'the adjoint, solved backwards along an interpolation of the solve ("auto": fixed steps)',
    "BacksolveAdjoint": "solves the state backwards beside the adjoint: constant memory, an error of the solver's own",
    "QuadratureAdjoint": 'as InterpolatingAdjoint, the parameters\' gradient by adaptive quadrature ("auto": FBDF)',
    "GaussAdjoint": 'as InterpolatingAdjoint, the parameters\' gradient by Gauss quadrature ("auto": adaptive)',
    "Backprop": "discretise, then optimise: the exact gradient of the discrete solve (explicit Runge-Kutta methods)",
}

_DEVICES = ("cpu", "cuda")
_NATIVE = (MLP, ConvNet, Potential)
"""Networks that Julia has too; what is only derived from one may be anything."""

_EMBEDDED = "__JULIA_PYTHONCALL_EMBEDDED_LIBPTR__"
"""The variable by which PythonCall, out of the system image, knows the Python that it is in (RNODEBridge.jl)."""

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


@cache
def _start() -> Any:
    """Starts Julia in this process and loads the module; gives `RNODEBridge`.

    Raises:
        EngineUnavailableError: Julia is not installed, or does not start.
    """
    julia_setup.prepare_environment(torch.get_num_threads(), _image())
    with _watch().starts():
        bridge = _load()
    os.register_at_fork(after_in_child=_mark_forked)
    _give_signals_back()
    return bridge


def _load() -> Any:
    os.environ[_EMBEDDED] = hex(ctypes.pythonapi._handle)
    try:
        with warnings.catch_warnings():
            # Either order of import works (tests/test_julia_engine.py tries both in processes of their own).
            warnings.filterwarnings("ignore", message="torch was imported before juliacall")
            import juliacall
        main = juliacall.Main
        add = main.seval("folder -> push!(LOAD_PATH, folder)")  # behind the project, whose Manifest has what they need
        for folder in (julia_setup.sources(), julia_setup.sources() / "bridge"):
            add(str(folder))
        main.seval("import RNODEBridge")
        bridge = main.RNODEBridge
        bridge.start()
    except Exception as error:
        reason = str(error).split("\nStacktrace", 1)[0].strip()
        raise EngineUnavailableError(f"Julia does not start: {reason}; run: pyrnode doctor") from error
    finally:
        os.environ.pop(_EMBEDDED, None)  # other processes have a Python of their own
    return bridge


@cache
def _image() -> Path | None:
    """The system image that Julia starts from in this process."""
    return julia_image.usable(julia_setup.require())


@cache
def _watch() -> Watch:
    return Watch(Times(julia_image.folder(julia_setup.require())), image=_image() is not None)


def _give_signals_back() -> None:
    """Ctrl-C and SIGTERM are Python's again: Julia blocks them in the thread that starts it, and ends the process."""
    if threading.current_thread() is not threading.main_thread():
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    for number in (signal.SIGINT, signal.SIGTERM):
        if (handler := signal.getsignal(number)) is not None:
            signal.signal(number, handler)


def _bridge() -> Any:
    if _forked:
        raise EngineUnavailableError(
            "this process was forked after Julia had started, and Julia does not survive that; start processes with "
            "multiprocessing's 'spawn' method"
        )
    return _start()


def _call(function: Any, *args: Any) -> Any:
    """Calls into Julia; its exceptions become ours, with Julia's message and without its stack."""
    try:
        return function(*args)
    except Exception as error:
        exception = getattr(error, "exception", None)
        if type(error).__name__ != "JuliaError":
            raise
        bridge = _start()
        if (original := bridge.original(exception)) is not None:
            raise original from None
        raise JuliaFailure(*bridge.describe(exception)) from None


class JuliaEngine(Engine):
    """Any solver of OrdinaryDiffEq and adjoint of SciMLSensitivity, on a CPU or an NVIDIA GPU.

    Julia starts with the first solve, not before; faster from the system image (`julia_image`) than without.
    """

    name = "julia"

    def __init__(self) -> None:
        julia_setup.require()
        self._solvers: dict[str, Any] = {}
        self._last: tuple[SolverConfig | None, Any] = None, None
        self._networks: WeakKeyDictionary[Dynamics, _Network] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[JuliaEngine], tuple[()]]:
        return JuliaEngine, ()  # a copy, or in another process: what it keeps of Julia's is found again

    def solvers(self) -> list[SolverInfo]:
        bridge = _bridge()
        with _watch().compiles("the list of its solvers", bridge.compile_seconds):
            rows = json.loads(str(bridge.solvers()))
        for row in rows:
            row["description"] = "; ".join(filter(None, (f"from {row['package']}", row["fault"])))
        return [SolverInfo(**row) for row in rows]

    def sensitivities(self) -> dict[str, str]:
        return SENSITIVITIES

    def check(self, solver: SolverConfig) -> None:
        self._solver(solver)

    def _solver(self, solver: SolverConfig) -> Any:
        known, handle = self._last  # in one piece: other threads may look up solvers of theirs
        if solver is not known:
            handle = self._look_up(solver)
            self._last = solver, handle
        return handle

    def _look_up(self, solver: SolverConfig) -> Any:
        step_size(solver)
        if solver.numbers != "ieee":
            raise ConfigError(
                f"solver.precision = {solver.precision!r}: the Julia engine computes in IEEE's numbers alone; use "
                'engine="torch", or set it to "ieee"'
            )
        if solver.sensealg != "auto" and solver.sensealg not in SENSITIVITIES:
            raise EngineUnavailableError(
                unknown_name("sensitivity algorithm of the Julia engine", solver.sensealg, SENSITIVITIES)
            )
        check_options(solver)
        key = json.dumps(solver.to_dict(), sort_keys=True)
        if key not in self._solvers:
            bridge = _bridge()
            if not bool(bridge.is_known(solver.name)):
                names, listing = [str(name) for name in bridge.names()], "`pyrnode solvers` lists them"
                raise EngineUnavailableError(unknown_solver("Julia", solver.name, names, listing=listing))
            numbers = [float(solver.step_size), solver.rtol, solver.atol, float(solver.maxiters)]
            try:
                self._solvers[key] = _call(
                    bridge.solver,
                    solver.name,
                    solver.sensealg,
                    numbers,
                    solver.error_control,
                    solver.memory,
                    solver.options | ({} if solver.adaptive else {"adaptive": False}),
                )
            except JuliaFailure as failure:
                raise ConfigError(f"solver {solver.name!r}: {failure}") from None
        return self._solvers[key]

    def _network(self, dynamics: LayeredDynamics | Potential, parameters: Sequence[Tensor]) -> _Network:
        """Julia's side of a network that both engines have; made anew where it has changed or its parameters moved."""
        network = self._networks.get(dynamics)
        if network is None or not network.is_of(dynamics, parameters):
            self._networks[dynamics] = network = _Network(dynamics, parameters)
        return network

    def integrate(
        self,
        dynamics: Dynamics,
        z0: Tensor,
        probes: Probes | None,
        t_span: tuple[float, float],
        solver: SolverConfig,
        *,
        context: Tensor | Contexts | None = None,
        total_derivative: bool = False,
        hjb: bool = False,
    ) -> Solution:
        handle = self._solver(solver)
        check_state(dynamics, z0, probes)
        if hjb:
            check_potential(dynamics)
        if z0.dtype not in (torch.float32, torch.float64) or z0.device.type not in _DEVICES:
            raise ConfigError(
                f"a state of {z0.dtype} on {z0.device}: the Julia engine takes float32 and float64, CPU or CUDA"
            )
        if z0.device.type == "cuda" and not julia_setup.status().has_cuda:
            raise EngineUnavailableError(
                "CUDA.jl is not installed for the Julia engine; run: pyrnode install-julia --cuda"
            )
        further = _Further(total_derivative and probes is not None, hjb and probes is not None)
        c = embedded(dynamics, context, len(z0))
        detached = None if c is None else c.detach()
        parameters = tuple(dynamics.solved_parameters())
        solve = _Solve(self, dynamics, parameters, probes, detached, t_span, solver, handle, further)
        z, q = run(z0.contiguous(), c, parameters, plain=solve.plain, recorded=lambda _: solve)
        return Solution.of(z, q if probes is not None else q[:, :0], solve.stats)


def flat_parameters(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters of a solve as one vector ``(P,)`` that shares their memory.

    They are moved into one piece of memory where they are not in one already: the first time, and after ``.to()`` or a
    copy. Optimisers and ``load_state_dict`` write into that memory, so this happens once.
    """
    first, offset = parameters[0], 0
    together = True
    for p in parameters:
        together = together and p.is_contiguous() and p.data_ptr() == first.data_ptr() + offset * first.element_size()
        together = together and p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        offset += p.numel()
    if not together:
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        start = 0
        for p in parameters:
            p.data = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
    return first.detach().as_strided((offset,), (1,))


def _shared(x: Tensor | None) -> Any:
    """`x` as Julia takes it without a copy: a DLPack capsule, or the CUDA tensor itself with its axes reversed."""
    if x is None:
        return None
    x = x.detach()
    if x.device.type != "cpu":
        return x.permute(*reversed(range(x.ndim)))
    return to_dlpack(x)


def _form(dynamics: LayeredDynamics | Potential) -> tuple[str, str]:
    """What a network has besides its parameters: activation, and the way of time."""
    if isinstance(dynamics, Potential):
        return dynamics.activation, "concat" if dynamics.timed else "none"
    return dynamics.activation, dynamics.layers[0].time  # type: ignore[return-value]


class _Network:
    """A network that Julia has too: its description there, and Julia's view of the parameters' memory."""

    def __init__(self, dynamics: LayeredDynamics | Potential, parameters: Sequence[Tensor]) -> None:
        bridge, layers, event = _bridge(), list[Any](dynamics.layers), list(dynamics.event_shape)
        widths, context = [layer.weight.shape[0] for layer in layers], dynamics.context_dim > 0
        self.form = _form(dynamics)
        if isinstance(dynamics, Potential):
            self.handle = bridge.potential(*event, widths, *self.form, len(dynamics.A), context)
        else:
            side = layers[0].weight.shape[-1] if isinstance(dynamics, ConvNet) else 0
            kind = "mlp" if isinstance(dynamics, MLP) else "conv"
            self.handle = bridge.network(kind, event, widths[:-1], *self.form, side, context)
        self.flat = flat_parameters(parameters)  # its memory is not another's as long as this holds it
        self.addresses = [p.data_ptr() for p in parameters]
        self.theta = bridge.view_of(_shared(self.flat))

    def is_of(self, dynamics: LayeredDynamics | Potential, parameters: Sequence[Tensor]) -> bool:
        """Whether it is still what the dynamics are, and their parameters lie where they lay."""
        places = [p.data_ptr() for p in parameters if p.is_contiguous()]
        return self.form == _form(dynamics) and places == self.addresses


class _Further(NamedTuple):
    """What a solve integrates beside l, E and n."""

    total_derivative: bool
    hjb: bool


@dataclass
class _Solve:
    """One solve of one block in Julia; remembers what its backward pass needs."""

    engine: JuliaEngine
    dynamics: Dynamics
    parameters: tuple[Tensor, ...]
    probes: Probes | None
    context: Tensor | None  # embedded
    t_span: tuple[float, float]
    solver: SolverConfig
    handle: Any
    further: _Further
    stats: Stats = field(default_factory=Stats)
    recorded: Any = None
    kept: tuple[Any, ...] = ()  # memory that Julia looks at until the backward pass
    versions: list[int] = field(default_factory=list)

    def plain(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, of which Julia keeps nothing."""
        return self._solve(z0, record=False)

    def forward(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        return self._solve(z0, record=True)

    def _solve(self, z0: Tensor, *, record: bool) -> tuple[Tensor, Tensor]:
        bridge = _bridge()
        z0 = z0.detach()
        axes = self.probes is not None and self.probes.axes  # Julia has them by itself, where it needs them at all
        eps = None if self.probes is None or axes else self.probes.eps.contiguous()
        total_derivative, hjb = self.further
        if type(self.dynamics) in _NATIVE and not total_derivative:
            network = self.engine._network(self.dynamics, self.parameters)  # type: ignore[arg-type]
            dynamics, theta = network.handle, network.theta
            held: _Network | Foreign = network
        else:
            alone = bool(bridge.is_separate(self.handle, _shared(z0)))
            rows = slice(0, 1 if alone else len(z0))
            c = None if self.context is None else self.context[rows]
            foreign = Foreign(self.dynamics, z0[rows], c, self.probes, total_derivative=total_derivative, hjb=hjb)
            buffers = {name: _shared(buffer) for name, buffer in foreign.buffers().items()}
            dynamics = bridge.foreign(foreign.linearize, foreign.pull, foreign.collect, **buffers)
            theta, held = _shared(foreign.theta), foreign
        z, q = torch.empty_like(z0), z0.new_empty(len(z0), 4 + hjb)
        weight = 0.0 if self.probes is None else self.probes.weight
        inputs = (theta, _shared(z0), _shared(self.context), _shared(eps), weight, axes, *self.t_span)
        _synchronize(z0)
        try:
            with _watch().compiles(self._named(self.solver.name, z0.dtype), bridge.compile_seconds):
                solve, nfe, nfe_max, accepted, rejected = _call(
                    bridge.forward, dynamics, self.handle, *inputs, *self.further, record, _shared(z), _shared(q)
                )
        except JuliaFailure as failure:
            raise self._error(failure) from None
        stats = self.stats
        stats.nfe, stats.nfe_max, stats.accepted, stats.rejected = nfe, nfe_max, accepted, rejected
        if record:
            self.recorded, self.kept = solve, (z0, eps, held)
            self.versions = [p._version for p in self.parameters]
        return z, q

    def replay(self, z0: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        raise ConfigError(
            "the Julia engine gives first derivatives alone: take flow.to_torch(), or engine='torch', for second ones"
        )

    def backward(self, z_bar: Tensor, q_bar: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        if [p._version for p in self.parameters] != self.versions:
            raise RuntimeError("a parameter was changed in place between the solve and its backward pass")
        z_bar, q_bar = z_bar.contiguous(), q_bar.contiguous()
        wanted = (z_bar, *([] if self.context is None else [self.context]), *self.parameters)
        bars = z_bar.new_empty(sum(x.numel() for x in wanted))
        length = 0 if self.context is None else self.context.shape[1]
        _synchronize(z_bar)
        try:
            arrays = _shared(z_bar), _shared(q_bar), length, _shared(bars)
            bridge, adjoint = _bridge(), "adjoint" if self.solver.sensealg == "auto" else self.solver.sensealg
            with _watch().compiles(self._named(f"{self.solver.name}'s {adjoint}", z_bar.dtype), bridge.compile_seconds):
                self.stats.nfe_backward = float(_call(bridge.backward, self.recorded, *arrays))
        except JuliaFailure as failure:
            raise self._error(failure) from None
        z0_bar, *rest = _unflatten_dense_tensors(bars, wanted)
        c_bar = None if self.context is None else rest.pop(0)
        return z0_bar, c_bar, rest

    def _named(self, what: str, dtype: torch.dtype) -> str:
        """What is compiled for this solve, as messages and measurements call it."""
        return f"{what} ({type(self.dynamics).__name__}, {str(dtype).removeprefix('torch.')})"

    def _error(self, failure: JuliaFailure) -> BaseException:
        adaptive = failure.kind == "solve" and bool(_bridge().is_adaptive(self.handle))
        return in_words(failure, self.solver, self.t_span, adaptive=adaptive)


def _synchronize(x: Tensor) -> None:
    """Waits for what torch has queued on the GPU before the other side reads it."""
    if x.device.type == "cuda":
        torch.cuda.current_stream(x.device).synchronize()


def self_test() -> str:
    """Solves and differentiates one small problem in both engines; gives what was found, in a line.

    Raises:
        EngineUnavailableError: Julia does not start, or gives other numbers than PyTorch.
    """
    from pyrnode.engines.pytorch import TorchEngine

    generator = torch.Generator().manual_seed(0)
    dynamics, z0 = MLP(2, (8,)).double(), torch.randn(4, 2, generator=generator, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for p in dynamics.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu"))
    probes = Probes.draw(z0, 1, generator=generator)
    found = []
    for engine in (TorchEngine(), JuliaEngine()):
        solution = engine.integrate(dynamics, z0, probes, (0.0, 1.0), SolverConfig(sensealg="Backprop"))
        loss = solution.z.square().sum() + solution.l.sum() + solution.E.sum() + solution.n.sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(dynamics.parameters()))]))
    error = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    if not error < 1e-10:
        raise EngineUnavailableError(f"the Julia engine's gradient differs from PyTorch's by {error:.1e}, relatively")
    return f"Julia {_start().version()}: a solve and its gradient agree with PyTorch's to {error:.0e}"
