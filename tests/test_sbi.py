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
from pyrnode.sbi import bounds_of, rnode

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
