"""A flow as the density estimator of `sbi`, in its neural posterior estimation, and what it takes from a prior."""

from __future__ import annotations

import io
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Beta, Gamma, Independent, LogNormal, MultivariateNormal, Normal, Uniform, VonMises

from pyrnode.errors import ConfigError, DataError
from pyrnode.probes import Probes
from pyrnode.sbi import bounds_of, likelihood, rnode, train

INF = torch.inf
EXAMPLE = str(Path(__file__).parent.parent / "examples/inside_sbi.py")
needs_sbi = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("sbi"),
    reason="sbi is not installed: pip install sbi (pyrnode itself does not need it)",
)


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (Independent(Uniform(torch.tensor([0.0, -2.0]), torch.tensor([1.0, 3.0])), 1), {0: (0, 1), 1: (-2, 3)}),
        (Independent(Normal(torch.zeros(2), torch.ones(2)), 1), {}),
        (MultivariateNormal(torch.zeros(2), torch.eye(2)), {}),
        (Independent(Gamma(torch.ones(2), torch.ones(2)), 1), {0: (0, INF), 1: (0, INF)}),
        (Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1), {0: (0, INF), 1: (0, INF)}),
        (Independent(Beta(torch.ones(2), torch.ones(2)), 1), {0: (0, 1), 1: (0, 1)}),
        (Independent(VonMises(torch.zeros(2), torch.ones(2)), 1), {}),
    ],
    ids=lambda value: getattr(getattr(value, "base_dist", value), "__class__", type).__name__,
)
def test_bounds_are_those_of_the_priors_support(prior: Any, expected: dict[int, Any]) -> None:
    assert bounds_of(prior, 2) == expected


def test_a_prior_that_says_nothing_of_its_support() -> None:
    with pytest.raises(ConfigError, match="it has no support, so give bounds="):
        bounds_of(object(), 2)
    with pytest.raises(ConfigError, match="it has 3 parameters, the simulations 2"):
        bounds_of(Independent(Uniform(torch.zeros(3), torch.ones(3)), 1), 2)


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="hiden"):
        rnode(hiden=[3])


@pytest.mark.parametrize("setting", ["max_steps", "minutes", "learning_rate", "total_derivative"])
def test_settings_without_effect_in_sbis_loop_are_refused(setting: str) -> None:
    for build in (rnode, likelihood):
        with pytest.raises(ConfigError, match=rf"{setting}: without effect in sbi's loop.*pyrnode\.sbi\.train"):
            build(**{setting: 0.5 if setting != "max_steps" else 7})
    rnode(tolerance=0.02, kinetic=0.1, hidden=[8])
    with pytest.raises(ConfigError, match="convention: without effect"):
        rnode(convention="ffjord-rnode")


# -- with sbi --------------------------------------------------------------------------------------------------------


@needs_sbi
@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_sbi_trains_a_flow_and_samples_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # sbi writes its logs there
    monkeypatch.setattr("sys.argv", ["inside_sbi.py", "--quick"])
    values = runpy.run_path(EXAMPLE)["main"]()
    assert values["untrained"] > 0.8  # KL(posterior ‖ prior)
    assert -0.02 < values["trained"] < 0.15
    assert values["mean"] < 0.15  # the posterior's standard deviations are about 0.4
    assert values["std"] < 0.1
    assert values["outside"] == 0


NORMAL = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)


def simulations(prior: Any, n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    theta = prior.sample((n,))
    return theta, theta + 0.1 * torch.randn_like(theta)


@needs_sbi
def test_the_estimator_is_a_density_on_the_box_and_samples_inside() -> None:
    from sbi.utils import BoxUniform

    prior = BoxUniform(torch.tensor([100.0]), torch.tensor([101.0]))
    estimator = rnode(prior, hidden=[8])(*simulations(prior))
    with torch.no_grad():
        for parameter in estimator.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    t, x = torch.linspace(-16, 16, 801, dtype=torch.double), torch.tensor([[100.2], [100.9]])
    s = torch.sigmoid(t)
    log_prob = estimator.log_prob((100 + s)[:, None, None], x)
    assert log_prob.shape == (801, 2)
    total = ((log_prob.double().exp() * (s * (1 - s))[:, None]).sum(0) * (t[1] - t[0])).detach()
    assert total.tolist() == pytest.approx([1, 1], abs=2e-3)  # float32, and DP5 at 1e-5
    drawn = estimator.sample(torch.Size([5000]), x)
    assert drawn.shape == (5000, 2, 1)
    assert bool(((drawn.double() > 100) & (drawn.double() < 101)).all())
    assert estimator.log_prob(torch.tensor([[[99.0]], [[101.5]]]), x[:1]).flatten().tolist() == [-INF] * 2


@needs_sbi
def test_what_a_prior_draws_on_its_bound_is_taken_and_what_is_outside_refused() -> None:
    from sbi.utils import BoxUniform

    prior = BoxUniform(torch.zeros(2), torch.ones(2))
    theta, x = simulations(prior)
    theta[3, 0], theta[5, 1] = 0.0, 1.0
    estimator = rnode(prior, hidden=[8])(theta, x)
    assert bool(torch.isfinite(estimator.loss(theta, x)).all())
    assert bool(torch.isfinite(estimator.log_prob(theta, x)).all())
    theta[7, 0] = 1.5
    with pytest.raises(DataError, match="column 0 has 1 of 300 values that are not between its bounds"):
        rnode(prior, hidden=[8])(theta, x)
    assert rnode(prior, bounds={}, hidden=[8])(theta, x).net.config.columns.bounds is None


@needs_sbi
def test_members_of_an_ensemble_differ_and_are_pickled() -> None:
    from sbi.utils import BoxUniform, MultipleIndependent

    prior = MultipleIndependent(
        [
            BoxUniform(torch.zeros(1), torch.ones(1)),
            Gamma(torch.ones(1), torch.ones(1)),
            Normal(torch.zeros(1), torch.ones(1)),
        ],
        validate_args=False,
    )
    assert bounds_of(prior, 3) == {0: (0, 1), 1: (0, INF)}
    simulated = simulations(prior)
    one, other = (rnode(prior, hidden=[8])(*simulated) for _ in range(2))
    weights = [dict(estimator.named_parameters())["net.parts.0.dynamics.layers.0.weight"] for estimator in (one, other)]
    assert not torch.equal(*weights)
    torch.save(one, buffer := io.BytesIO())
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(again.log_prob(*simulated), one.log_prob(*simulated))


@needs_sbi
def test_observations_that_are_no_vectors_are_refused() -> None:
    with pytest.raises(DataError, match="make a vector of each observation"):
        rnode()(torch.zeros(5, 2), torch.zeros(5, 3, 4))


@needs_sbi
@torch.no_grad()
def test_a_grid_of_parameters_and_observations_is_that_of_the_pairs() -> None:
    estimator = rnode(hidden=[8])(*simulations(NORMAL))
    theta, x = torch.randn(5, 1, 2), torch.randn(4, 2)
    grid = estimator.log_prob(theta, x)
    pairs = [[float(estimator.log_prob(t, c[None])) for c in x] for t in theta]
    assert grid.shape == (5, 4)
    assert torch.allclose(grid, torch.tensor(pairs), atol=1e-4)
    assert torch.equal(estimator.log_prob(theta.expand(5, 4, 2), x), grid)
    each = x.expand(5, 4, 2)  # as sbi passes conditions that differ by sample
    assert torch.allclose(estimator.log_prob(theta, each), grid, atol=1e-5)


@needs_sbi
def test_sbi_validates_by_the_likelihood_of_the_accurate_solver() -> None:
    """What early stopping looks at is the density that is used: no penalty, no probe, not the training solver."""
    theta, x = simulations(NORMAL)
    estimator = rnode(hidden=[8], kinetic=3.0, jacobian=2.0, **{"penalties.divergence": "hutchinson"})(theta, x)
    with torch.no_grad():
        for parameter in estimator.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    flow = estimator.net
    expected = flow.log_prob(theta, x).detach()
    assert torch.allclose(estimator.eval().loss(theta, x), -expected, atol=1e-4)
    trained = estimator.train().loss(theta, x).detach()
    admitted, context = flow.admit(theta, x)
    passage = flow.solve(admitted, Probes.exact, context=context)
    penalty = (3 * passage.total("E") + 2 * passage.total("n")).mean().detach()
    assert float((trained + expected).mean()) == pytest.approx(float(penalty), rel=0.15)  # one probe for each


@needs_sbi
def test_the_training_solver_gets_finer_where_it_is_wrong_and_only_in_training() -> None:
    theta, x = simulations(NORMAL)
    estimator = rnode(hidden=[32])(theta, x).train()
    assert (estimator.solver.name, estimator.solver.step_size) == ("RK4", 1.0)
    with torch.no_grad():
        for parameter in estimator.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
    estimator._losses = 0
    estimator.loss(theta, x)
    assert estimator.solver.step_size < 1
    first, second = (-estimator.net.log_prob(theta[:50], x[:50], solver=s) for s in (estimator.solver, None))
    assert float((first - second).abs().mean().detach()) / 2 < 0.02
    assert estimator.eval().solver == estimator.net.solver
    fixed = rnode(hidden=[8], solver={"name": "RK4", "step_size": 0.5})(theta, x).train()
    fixed.loss(theta, x)
    assert fixed.solver.step_size == 0.5


@needs_sbi
def test_the_trainer_of_pyrnode_serves_sbi(tmp_path: Path) -> None:
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta, x = simulations(prior, 600)
    settings = {"hidden": [16, 16], "max_steps": 150, "progress": False, "out": tmp_path / "run"}
    estimator = train(theta, x, prior, **settings)
    assert not estimator.training
    assert estimator.net.config.columns.bounds == {"0": (-1, 1), "1": (-1, 1)}
    assert (tmp_path / "run/model.safetensors").exists()
    posterior = NPE(prior, show_progress_bars=False).build_posterior(estimator)
    samples = posterior.sample((1000,), x=torch.tensor([0.2, -0.3]), show_progress_bars=False)
    assert torch.allclose(samples.mean(0), torch.tensor([0.2, -0.3]), atol=0.05)  # sd 0.1
    assert float((samples.std(0) - 0.1).abs().max()) < 0.06


@needs_sbi
def test_simulations_that_the_trainer_cannot_use() -> None:
    theta, x = simulations(NORMAL)
    with pytest.raises(DataError, match="observations: 2 of 300 simulations have NaN or infinite values; leave those"):
        train(theta, torch.where(torch.arange(300)[:, None] < 2, torch.nan, x))
    with pytest.raises(DataError, match=r"parameters of shape \(300, 2\) and observations of shape \(299, 2\)"):
        train(theta, x[1:])
    with pytest.raises(DataError, match="5 simulations: expected at least 10"):
        train(theta[:5], x[:5])
    with pytest.raises(ConfigError, match="validation = 0: expected a share"):
        train(theta, x, validation=0)
    with pytest.raises(ConfigError, match="hiden"):
        train(theta, x, hiden=[3])


@needs_sbi
@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_likelihoods_are_learned_the_right_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbi.inference import NLE
    from sbi.inference.posteriors.posterior_parameters import MCMCPosteriorParameters

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theta = NORMAL.sample((1000,))
    x = torch.stack([theta[:, 0], theta[:, 0], theta[:, 1]], 1) + torch.tensor([0.3, 0.5, 0.2]) * torch.randn(1000, 3)
    builder = likelihood(hidden=[16, 16], kinetic=1e-3, jacobian=1e-3, standardize="scale")
    inference = NLE(NORMAL, density_estimator=builder, show_progress_bars=False).append_simulations(theta, x)
    estimator = inference.train(max_num_epochs=25, training_batch_size=100, learning_rate=1e-2)
    assert (estimator.input_shape, estimator.condition_shape) == ((3,), (2,))
    mean, sd = torch.stack([theta[:, 0], theta[:, 0], theta[:, 1]], 1), torch.tensor([0.3, 0.5, 0.2])
    exact = Independent(Normal(mean, sd), 1).log_prob(x)
    with torch.no_grad():
        found = estimator.log_prob(x[None], theta)[0]
    assert abs(float((exact - found).mean())) < 0.15  # 3 nats before
    posterior = inference.build_posterior(
        posterior_parameters=MCMCPosteriorParameters(num_chains=20, warmup_steps=20, thin=1)
    )
    samples = posterior.sample((200,), x=torch.tensor([[0.4, 0.4, -1.0]]), show_progress_bars=False)
    assert torch.allclose(samples.mean(0), torch.tensor([0.375, -0.96]), atol=0.12)


@needs_sbi
def test_the_wrong_way_round_and_ratios_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbi.inference import NLE, NPE, NRE

    monkeypatch.chdir(tmp_path)
    theta, x = simulations(NORMAL)
    for method, builder, message in (
        (NLE, rnode(NORMAL, hidden=[8]), r"of the parameters, .* take pyrnode.sbi.likelihood\(\) for NLE"),
        (NPE, likelihood(hidden=[8]), r"of the observations, .* take pyrnode.sbi.rnode\(prior\) for NPE"),
    ):
        inference = method(NORMAL, density_estimator=builder, show_progress_bars=False)
        with pytest.raises(ConfigError, match=message):
            inference.append_simulations(theta, x).train(max_num_epochs=1)
    ratio = NRE(NORMAL, classifier=rnode(NORMAL, hidden=[8]), show_progress_bars=False)
    with pytest.raises(
        ConfigError, match=r"ratio estimation \(NRE\) trains a classifier .* NPE with pyrnode.sbi.rnode"
    ):
        ratio.append_simulations(theta, x).train(max_num_epochs=1)


@needs_sbi
def test_bounds_of_observations() -> None:
    theta = NORMAL.sample((100,))
    x = theta.exp()
    estimator = likelihood(bounds={0: (0, None), 1: (0, None)}, hidden=[8])(theta, x)
    assert bool((estimator.sample(torch.Size([50]), theta[:5]) > 0).all())
    with pytest.raises(DataError, match="column 0 has 100 of 100 values that are not between its bounds"):
        likelihood(bounds={0: (None, 0)}, hidden=[8])(theta, x)
