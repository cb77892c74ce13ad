"""Columns between bounds: the transform, the density of a flow with it, what is refused, and what is learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, Flow
from pyrnode.anomalies import fingerprint
from pyrnode.bounded import Bounded, check_within
from pyrnode.columns import ColumnsConfig, by_position
from pyrnode.data import TensorSamples
from pyrnode.distribution import Between
from pyrnode.errors import ConfigError, DataError
from pyrnode.estimator import RNODEDensity

INF = math.inf
SMALL: dict[str, Any] = {"engine": "torch", "hidden": [12], "activation": "tanh", "dtype": "float64"}
ACCURATE = {"evaluation.solver.rtol": 1e-9, "evaluation.solver.atol": 1e-9}


def flow_of(dim: int, *, features: tuple[str, ...] | None = None, **settings: Any) -> Flow:
    """A flow with weights that make every derivative matter."""
    flow = Flow.build(Config().override({**SMALL, **ACCURATE, **settings}), (dim,), features=features)
    generator = torch.Generator().manual_seed(1)
    for parameter in flow.parameters():
        with torch.no_grad():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return flow


def panels(low: float, high: float, count: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a composite Gauss-Legendre rule."""
    x, w = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(low, high, count + 1)
    half = np.diff(edges)[:, None] / 2
    return torch.from_numpy((edges[:-1, None] + half * (x + 1)).ravel()), torch.from_numpy((half * w).ravel())


# -- the transform ---------------------------------------------------------------------------------------------------

KINDS = Bounded([0.0, -INF, 2.0, -3.0, -INF], [INF, 1.0, 5.0, 4e9, INF])


def inside(n: int) -> Tensor:
    u = torch.rand(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return torch.stack([u[:, 0] * 3, 1 - u[:, 1] * 40, 2 + 3 * u[:, 2], 4e9 * u[:, 3], 8 * u[:, 4] - 4], 1)


def test_the_log_determinant_is_autograds() -> None:
    x = inside(6)
    _, log_det = KINDS(x)
    for i in range(len(x)):
        full = torch.autograd.functional.jacobian(lambda v: KINDS(v[None])[0][0], x[i])
        assert float(log_det[i]) == pytest.approx(float(torch.linalg.slogdet(full)[1]), abs=1e-10)


def test_there_and_back() -> None:
    x = inside(50)
    y, _ = KINDS(x)
    assert torch.allclose(KINDS.inverse(y), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(y[:, 4], x[:, 4])  # without bounds it stays


def test_near_either_bound_no_digit_is_lost() -> None:
    """The distance to the nearer bound is what counts: as relative as it is, it comes back."""
    bounds = Bounded([0.0, -1.0], [1.0, 0.0])
    for exponent in (-300, -100, -20):
        distance = 10.0**exponent
        x = torch.tensor([[distance, -distance]], dtype=torch.double)
        assert torch.allclose(bounds.inverse(bounds(x)[0]), x, rtol=1e-10, atol=0)


def test_on_the_bounds_and_beyond_them_is_minus_infinity_with_finite_gradients() -> None:
    x = inside(9).repeat(2, 1)[:9]
    for row, column, value in (
        (0, 0, 0.0),
        (1, 0, -1.0),
        (2, 1, 1.0),
        (3, 1, 7.0),
        (4, 2, 2.0),
        (5, 2, 5.0),
        (6, 2, 9.0),
    ):
        x[row, column] = value
    x.requires_grad_()
    y, log_det = KINDS(x)
    assert torch.isinf(log_det).tolist() == [True] * 7 + [False] * 2
    assert bool(torch.isfinite(y).all())
    (gradient,) = torch.autograd.grad(torch.where(torch.isinf(log_det), 0.0, log_det).sum() + y.sum(), x)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0, 0]) == float(gradient[6, 2]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1, 0.3), (-1e-3, 1e-3), (1e9, 1e9 + 1e4), (0, INF), (-INF, 0.1), (-7, INF)]
)
def test_what_comes_back_is_strictly_inside_however_it_is_rounded(low: float, high: float, dtype: torch.dtype) -> None:
    bounds = Bounded([low], [high])
    y = torch.tensor([-1e300, -1e4, -800.0, -40.0, 0.0, 17.0, 40.0, 800.0, 1e300], dtype=torch.double)[:, None]
    x = bounds.contained(bounds.inverse(y).to(dtype))
    assert x.dtype == dtype
    assert bool(torch.isfinite(x).all())
    assert all(low < value < high for value in x.double().flatten().tolist())
    near = x.clone().requires_grad_()
    log_det = bounds(near)[1]
    assert bool(torch.isfinite(log_det).all())
    (gradient,) = torch.autograd.grad(log_det.sum(), near)
    assert bool(torch.isfinite(gradient).all())


def test_a_bound_far_from_zero_keeps_its_digits() -> None:
    bounds = Bounded([1e9], [1e9 + 1])
    x = 1e9 + torch.tensor([[0.25], [0.5], [0.999]], dtype=torch.double)
    y, log_det = bounds(x)
    s = (x - 1e9)[:, 0]
    assert torch.allclose(y[:, 0], torch.logit(s), rtol=0, atol=1e-6)
    assert torch.allclose(log_det, -torch.log(s * (1 - s)), rtol=0, atol=1e-6)
    assert torch.equal(bounds.inverse(y), x)


def test_outside_of_a_bound_beyond_whole_numbers_nothing_is_infinite() -> None:
    y, log_det = Bounded([1e17, -INF], [INF, -1e17])(torch.zeros(1, 2, dtype=torch.double))
    assert bool(torch.isfinite(y).all())
    assert log_det.tolist() == [-INF]


def test_its_numbers_stay_double() -> None:
    bounds = Bounded([1e9 + 0.1], [1e9 + 1]).to(torch.float32)
    assert bounds.low.dtype == torch.float64
    assert float(bounds.low) == 1e9 + 0.1
    assert not bounds.state_dict()  # settings, which are saved with the others


# -- a flow with bounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "potential"])
def test_the_density_integrates_to_one_between_the_bounds(network: str) -> None:
    settings = {"flow.network.kind": network, "hidden": [12, 12]}
    flow = flow_of(1, bounds={0: (2, 5)}, **settings)
    x, w = panels(2, 5, 200)
    with torch.no_grad():
        assert float((w * flow.log_prob(x[:, None]).exp()).sum()) == pytest.approx(1, abs=1e-6)
        outside = torch.tensor([[1.0], [2.0], [5.0], [6.0]], dtype=torch.double)
        assert flow.log_prob(outside).tolist() == [-INF] * 4


def test_the_density_of_a_half_line_integrates_to_one() -> None:
    flow = flow_of(1, bounds={0: (-1, None)})
    t, w = panels(-12, 12, 200)  # in the logarithm of the distance
    with torch.no_grad():
        total = float((w * t.exp() * flow.log_prob((t.exp() - 1)[:, None]).exp()).sum())
    assert total == pytest.approx(1, abs=1e-7)


def test_the_density_of_two_columns_integrates_to_one() -> None:
    flow = flow_of(2, bounds={0: (0, 1)})
    flow.transform.transforms[1].std.copy_(torch.tensor([1.5, 0.8]))
    (t, v), (b, w) = panels(-14, 14, 10), panels(-9, 9, 8)
    a = torch.sigmoid(t)
    with torch.no_grad():
        p = flow.log_prob(torch.cartesian_prod(a, b), solver={"rtol": 1e-7}).exp().reshape(len(a), len(b))
    assert float((v * a * (1 - a)) @ p @ w) == pytest.approx(1, abs=1e-6)


def test_the_density_is_the_base_times_autograds_determinant() -> None:
    flow = flow_of(2, bounds={0: (0, 1), 1: (None, 3)})
    x = flow.sample(4, seed=0)
    for row, log_prob in zip(x, flow.log_prob(x).detach(), strict=True):
        full = torch.autograd.functional.jacobian(lambda v: flow.encode(v[None])[0], row)
        base = torch.distributions.Normal(0, 1).log_prob(flow.encode(row[None]).detach()[0]).sum()
        assert float(log_prob) == pytest.approx(float(base + torch.linalg.slogdet(full)[1]), abs=1e-6)


def test_encode_and_decode_are_inverse() -> None:
    flow = flow_of(3, bounds={0: (0, 1), 2: (0, None)})
    x = flow.sample(20, seed=1)
    assert torch.allclose(flow.decode(flow.encode(x)), x, rtol=1e-7, atol=1e-9)


def test_what_is_outside_has_no_latent() -> None:
    flow = flow_of(1, bounds={0: (0, 1)})
    flow.chunk = 2
    with pytest.raises(DataError, match="sample 3 is on a bound or beyond it"):
        flow.encode([[0.5], [0.2], [0.3], [1.0], [0.4]])


def test_a_hundred_thousand_samples_in_single_precision_are_inside() -> None:
    settings = {
        **SMALL,
        "dtype": "float32",
        "solver.step_size": 0.5,
        "evaluation.solver": {"name": "RK4", "step_size": 1.0},
    }
    flow = Flow.build(Config().override({**settings, "bounds": {0: (0.1, 0.3), 1: (0, None)}}), (2,))
    flow.chunk = 100_000
    for temperature in (1.0, 12.0):  # the second puts a share of them onto the very ends
        x = flow.sample(100_000, seed=0, temperature=temperature).double()
        assert bool(((x[:, 0] > 0.1) & (x[:, 0] < 0.3) & (x[:, 1] > 0) & (x[:, 1] < INF)).all())
        assert bool(torch.isfinite(flow.log_prob(x.float()[:1000])).all())


def test_the_gradients_of_rows_outside_are_finite() -> None:
    flow = flow_of(2, bounds={0: (0, 1)})
    x = torch.tensor([[-1.0, 0.0], [0.0, 0.5], [0.5, 0.5]], dtype=torch.double, requires_grad=True)
    log_prob = flow.log_prob(x)
    assert log_prob.tolist()[:2] == [-INF] * 2
    gradients = torch.autograd.grad(log_prob.sum(), [x, *flow.parameters()])
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert gradients[0][0, 0] == gradients[0][1, 0] == 0


def test_the_stated_error_of_a_density_of_zero_is_zero() -> None:
    flow = flow_of(2, bounds={0: (0, 1)})
    x = torch.tensor([[-1.0, 0.0], [0.5, 0.5]], dtype=torch.double)
    for divergence in ("exact", {"kind": "hutchinson", "probes": 4}):
        estimate, error = flow.log_prob(x, divergence=divergence, return_error=True)
        assert (float(estimate[0].detach()), float(error[0])) == (-INF, 0.0)
        assert math.isfinite(float(error[1]))


def test_support() -> None:
    density = flow_of(2, bounds={0: (0, 1)}).distribution()
    assert isinstance(density.support, Between)
    x = torch.tensor([[0.5, 1e6], [0.0, 0.0], [1.0, 0.0], [1.5, 0.0]], dtype=torch.double)
    assert density.support.check(x).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="Between"):  # as torch's own distributions do
        density.log_prob(x)
    assert flow_of(2, bounds={0: (0, 1)}).distribution(validate_args=False).log_prob(x)[1:].tolist() == [-INF] * 3


def test_among_torchs_distributions() -> None:
    flow = flow_of(2, bounds={0: (0, 1)})
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(2).double(), torch.ones(2).double()), 1
    )
    density = torch.distributions.TransformedDistribution(base, [pyrnode.FlowTransform(flow)])
    x = flow.sample(5, seed=0)
    assert torch.allclose(density.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-9)
    assert bool(density.support.check(density.sample((50,))).all())


def test_conditional_flows() -> None:
    config = Config().override({**SMALL, **ACCURATE, "bounds": {0: (0, 1)}})
    flow = Flow.build(config, (1,), context_dim=2)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, w = panels(0, 1, 60)
    for context in ([0.0, 1.0], [-2.0, 0.5]):
        with torch.no_grad():
            assert float((w * flow.log_prob(x[:, None], context).exp()).sum()) == pytest.approx(1, abs=1e-6)
    x = flow.sample(50, [[0.0, 1.0], [1.0, 1.0]], seed=0)
    assert bool(((x > 0) & (x < 1)).all())


# -- files -----------------------------------------------------------------------------------------------------------


def mixed() -> Flow:
    names = ("share", "income", "angle", "free")
    bounds, period = {"share": (0, 1), "income": (0, None)}, {"angle": (-180, 180)}
    flow = flow_of(4, features=names, bounds=bounds, period=period)
    flow.transform.transforms[0].centre.copy_(torch.tensor([0.0, 0.0, 150.0, 0.0]))
    return flow


def test_a_saved_flow_is_the_same(tmp_path: Path) -> None:
    flow = mixed()
    flow.save(tmp_path / "flow.safetensors")
    again, x = pyrnode.load(tmp_path / "flow.safetensors"), flow.sample(10, seed=0)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(again.sample(10, seed=0), x)
    assert again.config.columns == flow.config.columns
    x[0, 0] = 1.0
    assert again.log_prob(x)[0].tolist() == -INF


@pytest.mark.parametrize("program", ["encode", "decode", "sample", None])
def test_exports_agree(program: str | None, tmp_path: Path) -> None:
    """The written file is run on examples, and compared with the flow, when it is written."""
    module = mixed().to_torch({"name": "Heun", "step_size": 1.0})
    name, to = ("flow.safetensors", "safetensors") if program is None else (f"{program}.pt2", "torch.export")
    assert pyrnode.export.save(module, tmp_path / name, to=to, program=program).largest < 1e-9


def test_an_exported_program_knows_where_there_is_no_density(tmp_path: Path) -> None:
    module = mixed().to_torch({"name": "Heun", "step_size": 1.0})
    pyrnode.export.save(module, tmp_path / "flow.pt2")
    program = torch.export.load(tmp_path / "flow.pt2").module()
    x = module.sample(7, seed=1)
    x[0, 0], x[1, 1], x[2, 0] = 0.0, -3.0, 2.0
    log_prob = program(x)[2]
    assert log_prob[:3].tolist() == [-INF] * 3
    assert torch.allclose(log_prob, module.log_prob(x), rtol=0, atol=1e-12)


def test_an_onnx_program_agrees_and_samples_inside(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    import onnxruntime

    module = mixed().to_torch({"name": "Heun", "step_size": 1.0}).to(torch.float32)
    assert pyrnode.export.save(module, tmp_path / "flow.onnx", to="onnx").largest < 1e-4
    pyrnode.export.save(module, tmp_path / "sample.onnx", to="onnx", program="sample")
    session = onnxruntime.InferenceSession(tmp_path / "sample.onnx", providers=["CPUExecutionProvider"])
    (x,) = session.run(None, {"n": np.asarray(20_000)})
    x = x.astype(np.float64)
    assert ((x[:, 0] > 0) & (x[:, 0] < 1) & (x[:, 1] > 0) & (x[:, 2] >= -180) & (x[:, 2] < 180)).all()


def test_a_module_is_differentiated_by_torch_func() -> None:
    module = mixed().to_torch({"name": "Heun", "step_size": 1.0})
    x = module.sample(4, seed=0)
    by_hand = torch.stack([module.log_prob(row[None])[0] for row in x])
    assert torch.allclose(torch.func.vmap(lambda row: module.log_prob(row[None])[0])(x), by_hand, rtol=0, atol=1e-10)
    gradient = torch.func.vmap(torch.func.grad(lambda row: module.log_prob(row[None])[0]))(x)
    x.requires_grad_()
    assert torch.allclose(gradient, torch.autograd.grad(module.log_prob(x).sum(), x)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": [0.0, 0.0, None]}, "argument"),
        ({"low": ["0", 0.0, None, None]}, "two numbers"),
        ({"low": [2.0, 0.0, None, None]}, "low < high"),
        ({"low": [None] * 4, "high": [None] * 4}, "none of which|0 of which"),
    ],
)
def test_a_description_is_checked(change: dict[str, Any], message: str) -> None:
    from pyrnode.export.description import build, describe

    module = mixed().to_torch({"name": "Heun", "step_size": 1.0})
    table = describe(module)
    assert build(table, module.state_dict()).transform.turns == 2
    table["transforms"][1] |= change
    with pytest.raises(ConfigError, match=message):
        build(table, module.state_dict())


# -- settings and data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"a": (1, 1)}, "low < high"),
        ({"a": (2, 1)}, "low < high"),
        ({"a": (math.nan, 1)}, "neither NaN"),
        ({"a": (None, None)}, "no bound"),
        ({"a": (1, math.nextafter(1, 2))}, "no number between"),
        ({"a": (-1.7e308, 1.7e308)}, "width"),
        ({"a": 3}, r"expected \(low, high\)"),
        ({"a": ("0", "1")}, "two numbers"),
        ({"a": (0, 1), "0": (0, 1), 0: (0, 2)}, "twice"),
        ([("a", 1)], "expected"),
    ],
)
def test_bounds_that_are_none(bounds: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config().override({"bounds": bounds})


def test_settings_go_through_files() -> None:
    config = Config().override({"bounds": {"a": (0, None), "b": [None, 2.5]}, "period": {"c": 24, "d": (-1, 1)}})
    assert config.columns == ColumnsConfig(
        bounds={"a": (0, INF), "b": (-INF, 2.5)}, period={"c": (0, 24), "d": (-1, 1)}
    )
    assert Config.from_toml(config.to_toml()) == config
    assert Config.from_toml("[columns.bounds]\nage = [0, inf]").columns.bounds == {"age": (0.0, INF)}
    assert config.override({"bounds": {"a": (0, 1)}}).columns.bounds == {"a": (0.0, 1.0)}  # as a whole
    assert config.override({"bounds": {}}).columns.bounds is None


def test_columns_are_found_by_name() -> None:
    assert by_position({"b": (0, 1)}, "bounds", 2, ("a", "b")) == {1: (0, 1)}
    with pytest.raises(ConfigError, match=r"unknown column in bounds: 'shore'.*did you mean 'share'"):
        by_position({"shore": (0, 1)}, "bounds", 2, ("share", "b"))
    with pytest.raises(ConfigError, match="'x' is one of the context, which needs no density"):
        by_position({"x": (0, 1)}, "bounds", 2, ("a", "b"), ("x",))
    with pytest.raises(ConfigError, match="unknown column in bounds: '2'; known: 0, 1"):
        by_position({"2": (0, 1)}, "bounds", 2, None)


def test_discrete_data_and_images_have_no_bounds() -> None:
    with pytest.raises(ConfigError, match="16 levels bound: leave them out"):
        Flow.build(Config().override({"bounds": {0: (0, 1)}}), (2,), levels=16)
    with pytest.raises(ConfigError, match=r"samples of \(1, 8, 8\)"):
        Flow.build(Config().override({"bounds": {0: (0, 1)}}), (1, 8, 8))


def test_data_on_a_bound_is_refused_in_words() -> None:
    table = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    table[7, 1], table[11, 1], table[150, 1] = 0.0, 0.0, 1.25
    message = (
        r"array: column 1 has 3 of 200 values that are not between its bounds \(0, 1\), 2 of them on 0. The first, by "
        r"row: 7: 0, 11: 0, 150: 1.25. On a bound and beyond it there is no density: leave such rows out, spread values"
    )
    with pytest.raises(DataError, match=message):
        pyrnode.train(table, bounds={1: (0, 1)}, max_steps=1, progress=False)
    with pytest.raises(DataError, match=message.replace("array", "X")):
        RNODEDensity(bounds={1: (0, 1)}).fit(table.numpy())


def test_single_precision_at_a_bound_that_it_does_not_have() -> None:
    """0.1 as a float32 is a little more than 0.1: it is on the bound, not outside."""
    samples = TensorSamples(torch.tensor([[0.05], [0.1]], dtype=torch.float32))
    with pytest.raises(DataError, match=r"\(0, 0.1\), 1 of them on 0.1. The first, by row: 1: 0.100000001"):
        check_within(samples, [Bounded([0.0], [0.1])], "the data", None)


def test_all_bad_columns_are_named_and_few_rows() -> None:
    samples = TensorSamples(torch.full((300, 2), 5.0))
    with pytest.raises(DataError) as caught:
        check_within(samples, [Bounded([0.0, 0.0], [1.0, 1.0])], "the data", ("a", "b"))
    assert "column 'a' has 300 of 300 values" in str(caught.value)
    assert "so have columns 'b'" in str(caught.value)
    assert "0: 5, 1: 5, 2: 5, 3: 5, 4: 5, …" in str(caught.value)


def test_a_constant_column_between_bounds_is_refused_as_ever() -> None:
    with pytest.raises(DataError, match="constant"):
        pyrnode.train(torch.full((50, 2), 0.5), bounds={0: (0, 1)}, max_steps=1, progress=False)


# -- what is made of it -----------------------------------------------------------------------------------------------

LEARNED = {"hidden": (16,), "max_steps": 120, "batch_size": 256, "random_state": 0}
BETA = torch.distributions.Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
GAMMA = torch.distributions.Gamma(torch.tensor(2.0).double(), torch.tensor(1.0).double())


@pytest.mark.parametrize(("law", "bounds"), [(BETA, (0, 1)), (GAMMA, (0, None))], ids=["beta", "gamma"])
def test_a_density_is_learned_to_its_entropy(law: Any, bounds: Any) -> None:
    x, test = law.sample((3000, 1)), law.sample((4000, 1))
    model = RNODEDensity(bounds={0: bounds}, **LEARNED).fit(x.numpy())
    gap = law.log_prob(test[:, 0]).numpy() - model.score_samples(test.numpy())
    error = gap.std() / math.sqrt(len(gap))
    assert -4 * error < gap.mean() < 0.02
    drawn = model.sample(20_000, random_state=0)
    assert (law.support.check(torch.from_numpy(drawn)) & (torch.from_numpy(drawn) > 0)).all()
    assert drawn.mean() == pytest.approx(float(law.mean), abs=0.05 * float(law.stddev) + 0.01)


def test_a_table_is_trained_scored_and_calibrated(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed: pip install pyrnode[tables]")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"share": rng.beta(2, 3, 400), "income": rng.gamma(2.0, 1e4, 400)})
    bounds = {"income": (0, None), "share": (0, 1)}
    quick = {"max_steps": 8, "hidden": [8], "progress": False}
    result = pyrnode.train(frame, out=tmp_path / "run", bounds=bounds, **quick)
    assert result.report is not None
    assert math.isfinite(result.report.score.nats)
    assert result.report.baselines.keys() == {"gaussian", "mixture", "kde"}
    flow = pyrnode.load(tmp_path / "run")
    assert flow.config.columns.bounds == {"income": (0.0, INF), "share": (0.0, 1.0)}
    assert torch.equal(flow.log_prob(frame.iloc[:3][["income", "share"]]), flow.log_prob(frame.iloc[:3]))
    with pytest.raises(DataError, match=r"the data: column 'share' has 1 of 3 values.*by row: 1: 1"):
        pyrnode.evaluate(flow, torch.tensor([[0.5, 1.0], [1.0, 1.0], [0.2, 2.0]]))
    with pytest.raises(ConfigError, match="cannot resume with other settings"):
        pyrnode.train(frame, out=tmp_path / "run", resume=True, bounds={"share": (0, 1)}, **quick)

    calibration = pyrnode.calibrate(flow, torch.tensor(frame.to_numpy()[:99].copy()))
    with pytest.raises(DataError, match=r"calibration scores of shape \(3,\).*1 are not: leave those samples out"):
        pyrnode.calibrate(flow, torch.tensor([[0.5, 1.0], [1.0, 1.0], [0.2, 2.0]]))
    frame.iloc[3, 0] = 1.5
    frame.to_csv(tmp_path / "new.csv", index=False)
    for name in ("scores.csv", "scores.json"):
        summary = pyrnode.score_file(flow, tmp_path / "new.csv", tmp_path / name, calibration=calibration)
        assert summary.impossible == 1
        assert "or of their columns' bounds: log_prob -inf" in str(summary)
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert scores.log_prob[3] == -INF
    assert scores.p_value[3] == pytest.approx(1 / 100)
    assert '"log_prob": null' in (tmp_path / "scores.json").read_text()


def test_the_fingerprint_knows_the_bounds() -> None:
    one, other, none = (flow_of(1, bounds=bounds) for bounds in ({0: (0, 1)}, {0: (0, 2)}, None))
    assert len({fingerprint(flow) for flow in (one, other, none)}) == 3


def test_the_estimator_scores_what_is_outside() -> None:
    x = np.random.default_rng(0).beta(2, 3, (200, 1))
    model = RNODEDensity(hidden=(8,), max_steps=5, bounds={0: (0, 1)}, calibration_fraction=0.2, random_state=0).fit(x)
    assert model.score_samples([[-0.5], [1.0]]).tolist() == [-INF] * 2
    assert model.p_values([[1.5]])[0] == pytest.approx(1 / 41)
    assert model.score([[0.5], [1.5]]) == -INF


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pyrnode.cli import main

    np.savetxt(
        tmp_path / "t.csv", np.random.default_rng(0).beta(2, 3, (60, 2)), delimiter=",", header="a,b", comments=""
    )
    call = [
        "train",
        str(tmp_path / "t.csv"),
        "--quiet",
        "--no-evaluation",
        "--set",
        "max_steps=2",
        "--set",
        "hidden=[4]",
    ]
    options = ["--bounds", "a=0:1", "--bounds=b=-1:", "--out", str(tmp_path / "run")]
    assert main([*call, *options]) == 0
    assert pyrnode.load(tmp_path / "run").config.columns.bounds == {"a": (0.0, 1.0), "b": (-1.0, INF)}
    for bad, said in ((["--bounds", "a=0"], "expected COLUMN=LOW:HIGH"), (["--bounds", "a=0.5:1"], "column 'a' has")):
        assert main([*call, *bad, "--out", str(tmp_path / "other")]) != 0
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"bounds": {"0": (-1e15, 1e15)}}, r"the lower bound of column .* is .*e\+1[45] standard deviations .*open"),
        ({"bounds": {"0": (None, 1e10)}}, r"the upper bound of column .* is .*e\+(09|10) standard deviations .*open"),
        ({"period": {"0": (0.0, 1e12)}}, r"the period of column .*standard deviations of .*leave the period out"),
    ],
)
def test_ends_that_are_beyond_what_numbers_tell_apart_are_refused(columns: dict[str, Any], message: str) -> None:
    """Bounds of 1e15 gave a density that integrates to 3.4."""
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    x = x + 10 if "period" in columns else x
    settings = {"hidden": [4], "max_steps": 1, "evaluate": False, "progress": False, "engine": "torch"}
    with pytest.raises(DataError, match=message):
        pyrnode.train(x, **columns, **settings)
    with pytest.raises(DataError, match=message):
        pyrnode.RNODEDensity(hidden=(4,), max_steps=1, **columns).fit(x.numpy())
