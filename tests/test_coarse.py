"""`solver.precision`: products of coarse operands in training, and IEEE's numbers wherever else there are some."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyrnode
from pyrnode import Config, ConfigError, Flow, SolverConfig, precision
from pyrnode.data import Splits, TensorSamples
from pyrnode.dynamics import MLP, ConvNet, Dynamics, Potential, coarse
from pyrnode.dynamics.layers import Conv, Dense
from pyrnode.engines import PlainEngine, Probes, TorchEngine
from pyrnode.training.trainer import Trainer

COARSE = ("tf32", "bf16")
UNIT = {"tf32": 2.0**-11, "bf16": 2.0**-8}
"""Of a number that is rounded to the nearest, at most."""


def rounded(x: Tensor, to: str) -> Tensor:
    """By numpy: the significand as a whole number of units, to the nearest even one."""
    significand, exponent = np.frexp(x.numpy().astype(np.float64))
    scale = 1 / (2 * UNIT[to])
    return torch.from_numpy(np.ldexp(np.rint(significand * 2 * scale) / (2 * scale), exponent)).float()


def net(kind: str, time: str = "concat", activation: str = "softplus") -> Dynamics:
    made: Dynamics = (
        MLP(3, (7, 6), time=time, activation=activation)
        if kind == "mlp"
        else ConvNet((2, 4, 3), (5, 6), time=time, activation=activation)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return made


def case(dynamics: Dynamics, batch: int = 5, k: int = 1) -> tuple[Tensor, Probes]:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(batch, *dynamics.event_shape, generator=generator)
    return z.requires_grad_(), Probes(torch.randn(k, *z.shape, generator=generator), 1 / k)


def solved(dynamics: Dynamics, k: int = 1, **settings: Any) -> tuple[Tensor, Tensor]:
    """The state with the integrals, and the gradient of a loss of all of them."""
    z, probes = case(dynamics, k=k)
    s = TorchEngine().integrate(dynamics, z, probes, (0.0, 1.0), SolverConfig(**settings))
    loss = (s.l + 0.3 * s.E + 0.2 * s.n).sum() + s.z.square().sum()
    found = torch.autograd.grad(loss, [z, *dynamics.parameters()])
    assert {x.dtype for x in (*found, s.z, s.l, s.E, s.n)} == {torch.float32}
    state = torch.cat([s.z.flatten(1), torch.stack([s.l, s.E, s.n], 1)], 1)
    return state.detach(), torch.cat([x.reshape(-1) for x in found])


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- rounding --------------------------------------------------------------------------------------------------------


def test_tf32_is_the_nearest_number_of_ten_bits_and_the_even_one_of_two() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4000)
    assert torch.equal(precision.tf32(x), rounded(x, "tf32"))
    unit = 2.0**-10
    ties = torch.tensor([1 + unit / 2, 1 + 3 * unit / 2, -1 - unit / 2, 1 + unit / 2 + 2.0**-23])
    assert precision.tf32(ties).tolist() == [1.0, 1 + 2 * unit, -1.0, 1 + unit]
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan, torch.finfo(torch.float32).max])
    found = precision.tf32(special)
    assert found[:4].tolist() == special[:4].tolist()
    assert torch.isnan(found[4])
    assert found[5] == torch.inf  # as in a product's operand


@pytest.mark.parametrize("to", COARSE)
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_products_are_those_of_rounded_operands_in_double_precision(kind: str, to: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*((6, 4) if kind == "dense" else (6, 4, 3, 3)), generator=generator)
    h, g = (torch.randn(9, n, *(() if kind == "dense" else (5, 7)), generator=generator) for n in (4, 6))
    exact = Dense(weight) if kind == "dense" else Conv(weight, (5, 7))
    linear: Any = coarse.Tf32(exact) if to == "tf32" else coarse.Bf16(exact, first=True, last=True)
    W, x, y = (rounded(v, to).double() for v in (weight, h, g))
    wanted = x @ W.t() if kind == "dense" else F.conv2d(x, W, padding=1)
    back = y @ W if kind == "dense" else F.conv_transpose2d(y, W, padding=1)
    V = W.clone().requires_grad_()
    (weight_bar,) = torch.autograd.grad(x @ V.t() if kind == "dense" else F.conv2d(x, V, padding=1), V, y)
    allowed = 1e-6 if to == "tf32" else UNIT[to]  # bfloat16 rounds what comes out
    with torch.no_grad():
        for found, value in ((linear(h), wanted), (linear.transpose(g), back)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), value, rtol=allowed, atol=1e-5)
        linear.accumulate(h, g)
        torch.testing.assert_close(linear.weight_gradient().double(), weight_bar, rtol=allowed, atol=1e-4)
        shift = torch.randn(6, *[1] * (h.ndim - 2), generator=generator)
        torch.testing.assert_close(linear(h, shift), linear(h) + shift)


def test_gradients_are_summed_in_float32() -> None:
    """In bfloat16 the sum of ones ends at 256."""
    linear = coarse.Bf16(Dense(torch.ones(1, 1)), first=False, last=False)
    with torch.no_grad():
        for _ in range(1000):
            linear.accumulate(torch.ones(1, 1).bfloat16(), torch.ones(1, 1).bfloat16())
    assert linear.weight_gradient().tolist() == [[1000.0]]
    bound = coarse.coarsened(net("mlp")._bind(detach=True), "bf16")
    ones = torch.ones(1000, 7, dtype=torch.bfloat16)
    bound.layers[0].accumulate(torch.full((1000,), 1 / 3), None, ones, None)
    bars = bound.layers[0].gradients()
    assert bars["bias"].tolist() == [1000.0] * 7
    torch.testing.assert_close(bars["time_weight"], torch.full((7, 1), 1000 / 3), rtol=1e-5, atol=0.0)


# -- a solve ---------------------------------------------------------------------------------------------------------


def _reference(dynamics: Any, z: Tensor, eps: Tensor, to: str) -> Tensor:
    """State, l, E and n by Euler's steps, of a dense softplus network with time as an input, by the scheme's rule."""
    hidden = (lambda x: rounded(x, to)) if to == "bf16" else (lambda x: x)
    q = torch.zeros(len(z), 3, dtype=torch.float64)
    z = z.detach()
    for t in (0.0, 0.25, 0.5, 0.75):
        h, slopes = z, []
        for i, layer in enumerate(dynamics.layers):
            a = hidden((rounded(h, to).double() @ rounded(layer.weight.detach(), to).double().t()).float())
            shift = layer.bias.detach() + t * layer.time_weight.detach()[:, 0]
            if i == 2:
                f = a + shift
                break
            a = hidden(a + shift).double()
            slopes.append(hidden(torch.sigmoid(a).float()))
            h = hidden(F.softplus(a).float())
        w = eps
        for i in (2, 1, 0):
            w = hidden((rounded(w, to).double() @ rounded(dynamics.layers[i].weight.detach(), to).double()).float())
            w = hidden(w * slopes[i - 1]) if i else w
        q += 0.25 * torch.stack([(eps * w).sum(1), (f * f).sum(1), (w * w).sum(1)], 1).double()
        z = z + 0.25 * f
    return torch.cat([z.double(), q], 1)


@pytest.mark.parametrize("to", COARSE)
def test_a_solve_is_the_scheme_number_by_number(to: Any) -> None:
    dynamics = net("mlp")
    z, probes = case(dynamics)
    wanted = _reference(dynamics, z, probes.eps[0], to)
    exact, _ = solved(dynamics, name="Euler")
    for memory in ("store", "checkpoint"):
        found, _ = solved(dynamics, name="Euler", memory=memory, precision=to)
        near, far = apart(found.double(), wanted), apart(exact.double(), wanted)
        assert near < (2e-6 if to == "tf32" else 2e-4)  # softplus and its slope are by other formulas, and may round
        assert far > 10 * near


@pytest.mark.parametrize("to", COARSE)
@pytest.mark.parametrize("activation", ["softplus", "silu"])
@pytest.mark.parametrize("time", ["concat", "concatsquash", "none"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_gradients_are_near_ieees_and_are_not_ieees(kind: str, time: str, activation: str, to: Any) -> None:
    dynamics = net(kind, time, activation)
    for memory in ("store", "checkpoint"):
        state, gradient = solved(dynamics, memory=memory)
        found, coarse_gradient = solved(dynamics, memory=memory, precision=to)
        assert 1e-6 < apart(found, state) < 8 * UNIT[to]
        assert 1e-5 < apart(coarse_gradient, gradient) < 8 * UNIT[to]


@pytest.mark.parametrize("to", COARSE)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("time", ["concat", "concatsquash"])
def test_where_nothing_is_rounded_it_is_ieees_solve(
    kind: str, time: str, to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dynamics = net(kind, time, "tanh")
    wanted = [solved(dynamics, k=2, memory=memory) for memory in ("store", "checkpoint")]
    monkeypatch.setattr(coarse, "tf32", lambda x: x)
    monkeypatch.setattr(coarse, "HALF", torch.float32)
    for memory, (state, gradient) in zip(("store", "checkpoint"), wanted, strict=True):
        found, coarse_gradient = solved(dynamics, k=2, memory=memory, precision=to)
        assert apart(found, state) < 1e-6
        assert apart(coarse_gradient, gradient) < 1e-6


def test_what_has_a_hidden_layers_shape_is_kept_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for time in ("concat", "concatsquash"):
        dynamics: Any = net("conv", time, "silu")
        z, probes = case(dynamics)
        bound = coarse.coarsened(dynamics.bind(), "bf16")
        assert bound.tape_bytes(z, 1) * 2 == dynamics.bind().tape_bytes(z, 1)
        with torch.no_grad():
            at = bound.linearize(0.5, z.detach(), probes.eps, tape=True)
        assert (at.f.dtype, at.w.dtype) == (torch.float32, torch.float32)
        for i, layer in enumerate(at.tape.layers):
            kept = [layer.output, layer.a, layer.slope, layer.product.g, layer.product.r] if i < 2 else []
            kept += [layer.input] if i else []
            kept += [layer.unscaled] if time == "concatsquash" and i < 2 else []
            assert {x.dtype for x in kept} <= {torch.bfloat16}, (time, i)


@pytest.mark.parametrize("to", COARSE)
@pytest.mark.parametrize("memory", ["auto", "store", "checkpoint"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_no_kernel_in_c_takes_a_coarse_solve(kind: str, memory: Any, to: Any) -> None:
    """Those have IEEE's numbers alone; with a gradient and without one."""
    dynamics, solver = net(kind), SolverConfig(memory=memory, precision=to)
    z, probes = case(dynamics)
    recorded = TorchEngine().integrate(dynamics, z, probes, (0.0, 1.0), solver)
    with torch.no_grad():
        plain = TorchEngine().integrate(dynamics, z, probes, (0.0, 1.0), solver)
        exact = TorchEngine().integrate(dynamics, z, probes, (0.0, 1.0), SolverConfig(memory=memory))
    for found in (recorded, plain):
        assert 1e-5 < apart(found.z.detach(), exact.z) < 8 * UNIT[to]
        assert apart(found.l.detach(), exact.l) > 1e-6


# -- who may ---------------------------------------------------------------------------------------------------------


SMALL: dict[str, Any] = {"engine": "torch", "device": "cpu", "hidden": (8, 8), "batch_size": 16, "step_size": 0.5}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "float64"}, r"which has no coarse products; set it to 'float32'"),
        ({"engine": "julia"}, r"set it to 'torch'"),
        ({"network.kind": "potential", "activation": "tanh"}, r"set it to 'mlp'"),
        ({"total_derivative": 0.1}, r"penalties.total_derivative; set it to 0"),
        ({"evaluation.solver.precision": "tf32"}, r"evaluation.solver.precision = 'tf32': scores are 'ieee'"),
    ],
)
def test_settings_that_it_has_no_meaning_beside_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config().override({"solver.precision": "bf16", **settings})
    with pytest.raises(ConfigError, match=r"precision"):
        Config().override({"solver.precision": "fp8"})


@pytest.mark.parametrize(
    ("solver", "says"),
    [
        (SolverConfig(name="DP5", precision="tf32"), r"DP5 is adaptive.*adaptive = false with a step_size, take RK4"),
        (SolverConfig(precision="bf16", sensealg="BacksolveAdjoint"), r"use 'Backprop', or set precision = 'ieee'"),
    ],
)
def test_solvers_that_cannot_are_refused(solver: SolverConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TorchEngine().check(solver)
    dynamics = net("mlp")
    with pytest.raises(ConfigError, match=says):
        TorchEngine().integrate(dynamics, *case(dynamics), (0.0, 1.0), solver)
    fixed = SolverConfig(name="DP5", adaptive=False, precision="tf32")
    TorchEngine().integrate(dynamics, *case(dynamics), (0.0, 1.0), fixed)


def test_dynamics_that_cannot_are_refused() -> None:
    solver = SolverConfig(precision="tf32")
    dynamics: Any = Potential(3)
    with pytest.raises(ConfigError, match=r"MLP, ConvNet.*set it to 'ieee'"):
        TorchEngine().integrate(dynamics, *case(dynamics), (0.0, 1.0), solver)
    double = net("mlp").double()
    z, probes = case(double)
    with pytest.raises(ConfigError, match=r"parameters of torch.float64; set it to 'ieee'"):
        TorchEngine().integrate(double, z.double(), probes._replace(eps=probes.eps.double()), (0.0, 1.0), solver)


def images() -> Splits:
    generator = torch.Generator().manual_seed(0)
    parts = [
        TensorSamples(torch.randint(0, 9, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)) for n in (64, 20, 20)
    ]
    return Splits("noise", *parts, (1, 4, 4), 9)


def _noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Precision of every solve, and whether the training step asked for it."""
    seen: list[tuple[str, bool]] = []
    integrate, step = TorchEngine.integrate, Trainer._step
    inside: list[int] = []

    def noted(self: Any, dynamics: Any, z0: Any, probes: Any, span: Any, solver: Any, **more: Any) -> Any:
        seen.append((solver.precision, bool(inside)))
        return integrate(self, dynamics, z0, probes, span, solver, **more)

    def stepped(self: Any, batch: Any) -> Any:
        inside.append(1)
        try:
            return step(self, batch)
        finally:
            inside.pop()

    monkeypatch.setattr(TorchEngine, "integrate", noted)
    monkeypatch.setattr(Trainer, "_step", stepped)
    return seen


@pytest.mark.parametrize("to", COARSE)
def test_training_steps_alone_are_coarse(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the guard of ``solver = "auto"``, which asks before the first step and every 25 steps."""
    seen = _noted(monkeypatch)
    settings = {**SMALL, "solver": "auto", "scales": 2, "max_steps": 26, "validate_every": 26}
    settings |= {"evaluation.solver.rtol": 1e-2, "evaluation.solver.atol": 1e-2, "evaluation.draws": 1}
    del settings["step_size"]
    config = Config().override({**settings, "solver.precision": to})
    subject = Trainer(config, images(), None, progress=False)
    assert subject.run()
    flow = subject.best_flow()
    assert flow.config.solver.precision == to
    pyrnode.evaluate(flow, images())
    flow.sample(3, solver=flow.config.solver)
    flow.log_prob(images().test.tensor()[:3], return_error=True, divergence={"probes": 2})
    assert {found for found, training in seen if training} == {to}
    assert {found for found, training in seen if not training} == {"ieee"}
    assert len([found for found, training in seen if not training]) > 20


@pytest.mark.parametrize("to", COARSE)
def test_scores_samples_paths_and_exports_are_ieees_whatever_is_set(to: Any) -> None:
    flow = Flow.build(Config().override({**SMALL, "solver.precision": to}), (2,))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    exact = SolverConfig(step_size=0.5)
    x, set_ = torch.randn(6, 2, generator=torch.Generator().manual_seed(4)), SolverConfig(step_size=0.5, precision=to)
    uses: list[Callable[[SolverConfig], Tensor]] = [
        lambda solver: flow.log_prob(x, solver=solver),
        lambda solver: flow.encode(x, solver=solver),
        lambda solver: flow.decode(x, solver=solver),
        lambda solver: flow.sample(4, solver=solver, seed=0),
        lambda solver: flow.distribution(solver=solver).log_prob(x),
        lambda solver: flow.to_torch(solver).log_prob(x),
    ]
    for use in uses:
        assert torch.equal(use(set_), use(exact))
    flow.solver = set_
    paths = pyrnode.particles.particle_paths(flow, x, points=3)[1]
    flow.solver = exact
    assert torch.equal(paths, pyrnode.particles.particle_paths(flow, x, points=3)[1])
    PlainEngine().check(set_)


def test_training_learns_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
    more = {"max_steps": 60, "validate_every": 60, "learning_rate": 0.01, "progress": False, "evaluate": False}
    more |= {"standardize": "none"}
    ends = {}
    for to in ("ieee", *COARSE):
        run = pyrnode.train(x, **SMALL, **more, **{"solver.precision": to})
        ends[to] = next(r["validation"] for r in run.history if "validation" in r)
    for to in COARSE:
        assert ends[to] != ends["ieee"]
        assert abs(ends[to] - ends["ieee"]) < 0.01


# -- torch's switches ------------------------------------------------------------------------------------------------


def _switches() -> list[Any]:
    return [getattr(owner, name) for owner, name, _ in precision.switches()]


COARSE_SWITCHES = ["tf32" if exact == "ieee" else True for _, _, exact in precision.switches()]
EXACT_SWITCHES = [exact for _, _, exact in precision.switches()]


def test_tf32_is_on_for_products_alone_and_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"product": [], "rest": []}
    monkeypatch.setattr(coarse, "has_tf32", lambda device: True)
    for owner, where in ((Dense, "product"), (coarse._Coarse, "rest")):
        for name in ("__call__", "transpose", "accumulate") if owner is Dense else ("gather",):
            method = getattr(owner, name)

            def noted(self: Any, *args: Any, method: Any = method, where: str = where) -> Any:
                seen[where].append(_switches())
                return method(self, *args)

            monkeypatch.setattr(owner, name, noted)
    before = _switches()
    with precision._FLOAT32.by(exact=True):  # as `own_precision` on a GPU
        state, gradient = solved(net("mlp"), precision="tf32")
        assert _switches() == EXACT_SWITCHES
    assert _switches() == before
    assert len(seen["product"]) > 50
    assert all(found == COARSE_SWITCHES for found in seen["product"])
    assert seen["rest"]
    assert all(found == EXACT_SWITCHES for found in seen["rest"])
    exact_state, exact_gradient = solved(net("mlp"), memory="store")
    assert apart(state, exact_state) < 1e-6  # the switches mean nothing to a CPU
    assert apart(gradient, exact_gradient) < 1e-6


def test_ieee_is_kept_while_any_thread_wants_it() -> None:
    before, steps = _switches(), [threading.Event() for _ in range(2)]
    seen: list[list[Any]] = []

    def score() -> None:
        with precision._FLOAT32.by(exact=True):
            steps[0].set()
            assert steps[1].wait(10)
            seen.append(_switches())

    with precision._FLOAT32.by(exact=True), precision.coarse_products():
        assert _switches() == COARSE_SWITCHES
        other = threading.Thread(target=score)
        other.start()
        assert steps[0].wait(10)
        assert _switches() == EXACT_SWITCHES
        steps[1].set()
        other.join()
        assert seen == [EXACT_SWITCHES]
        assert _switches() == COARSE_SWITCHES
    assert _switches() == before
