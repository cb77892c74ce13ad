"""The baselines against closed forms, and against scikit-learn where they do not call it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyrnode import baselines
from pyrnode.baselines import fit_baselines, fit_gaussian, fit_kde, fit_mixture
from pyrnode.data import load, synthetic
from pyrnode.errors import DataError


def correlated(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) + 2 * torch.eye(d)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.arange(d)


def test_gaussian_equals_the_closed_form() -> None:
    """Validated on its own samples, no ridge helps: the fit is the sample mean and the sample covariance."""
    train, test = correlated(2_000, 3), correlated(500, 3, seed=1)
    gaussian = fit_gaussian(train, train)
    centred = train - train.mean(0)
    expected = torch.distributions.MultivariateNormal(train.mean(0), centred.T @ centred / len(train))
    assert torch.allclose(gaussian.log_prob(test), expected.log_prob(test), rtol=1e-11)
    assert float(gaussian.log_prob(train).mean()) == pytest.approx(
        -0.5 * float(torch.logdet(2 * math.pi * math.e * torch.cov(train.T, correction=0))), rel=1e-11
    )


def test_gaussian_takes_the_ridge_that_validation_prefers() -> None:
    train, validation, test = correlated(30, 20), correlated(500, 20, seed=1), correlated(2_000, 20, seed=2)
    gaussian = fit_gaussian(train, validation)
    covariance = torch.cov(train.T, correction=0)
    plain = torch.distributions.MultivariateNormal(train.mean(0), covariance)
    assert float(gaussian.log_prob(test).mean()) > float(plain.log_prob(test).mean()) + 1
    scale = float(covariance.diagonal().mean())
    best = max(
        float(
            torch.distributions.MultivariateNormal(train.mean(0), covariance + ridge * scale * torch.eye(20).double())
            .log_prob(validation)
            .mean()
        )
        for ridge in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1)
    )
    assert float(gaussian.log_prob(validation).mean()) == pytest.approx(best, abs=1e-9)


def test_gaussian_with_fewer_samples_than_dimensions() -> None:
    gaussian = fit_gaussian(correlated(10, 40), correlated(50, 40, seed=1))
    assert bool(torch.isfinite(gaussian.log_prob(correlated(50, 40, seed=2))).all())
    assert "ridge 0 " not in gaussian.description


def test_gaussian_in_one_dimension() -> None:
    x = synthetic.density("two-bumps").sample(400, seed=0, dtype=torch.float64)
    expected = torch.distributions.Normal(x.mean(), x.std(correction=0))
    assert torch.allclose(fit_gaussian(x, x).log_prob(x), expected.log_prob(x[:, 0]), rtol=1e-11)


def test_kde_equals_a_sum_by_hand() -> None:
    train, validation, test = correlated(60, 3), correlated(40, 3, seed=1), correlated(20, 3, seed=2)
    kde = fit_kde(train, validation, torch.Generator())
    h = kde.bandwidth
    for x, value in zip(test, kde.log_prob(test), strict=True):
        kernels = torch.distributions.Normal(train, h).log_prob(x).sum(dim=1)
        assert float(value) == pytest.approx(float(torch.logsumexp(kernels, 0) - math.log(len(train))), rel=1e-9)


def test_kde_equals_scikit_learns() -> None:
    from sklearn.neighbors import KernelDensity

    train, validation, test = correlated(500, 6), correlated(100, 6, seed=1), correlated(100, 6, seed=2)
    kde = fit_kde(train, validation, torch.Generator())
    model = KernelDensity(bandwidth=kde.bandwidth, kernel="gaussian").fit(train.numpy())
    expected = torch.from_numpy(model.score_samples(test.numpy()))
    assert torch.allclose(kde.log_prob(test), expected, rtol=1e-9, atol=1e-9)
    scores = {
        factor: model.set_params(bandwidth=factor * kde.bandwidth).fit(train.numpy()).score(validation.numpy())
        for factor in (0.8, 1.0, 1.25)
    }
    assert max(scores, key=scores.__getitem__) == 1.0


def test_kde_of_a_gaussian_finds_the_bandwidth_of_theory() -> None:
    """For a standard normal in one dimension, the bandwidth of least integrated error is 1.06 n^(−1/5)."""
    x = torch.randn(4_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kde = fit_kde(x[:2000], x[2000:], torch.Generator())
    assert kde.bandwidth == pytest.approx(1.06 * 2000**-0.2, rel=0.5)


def test_mixture_approaches_the_entropy_of_a_mixture() -> None:
    splits = load("8gaussians")
    mixture = fit_mixture(
        splits.train.tensor().double()[:4000], splits.validation.tensor().double(), torch.Generator().manual_seed(0)
    )
    test = splits.density.sample(20_000, seed=77, dtype=torch.float64)  # type: ignore[union-attr]
    truth = splits.density.log_prob(test)  # type: ignore[union-attr]
    gap = truth - mixture.log_prob(test)  # its mean is the Kullback–Leibler divergence
    assert -0.005 < float(gap.mean()) < 0.03
    assert mixture.description.startswith("8 Gaussians")


def test_all_three_integrate_to_one() -> None:
    x = synthetic.density("moons").sample(1_500, seed=0, dtype=torch.float64)
    axis = torch.linspace(-8, 8, 321, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    for baseline in fit_baselines(x[:1000], x[1000:]).values():
        mass = float(baseline.log_prob(points).exp().sum()) * 0.05**2
        assert mass == pytest.approx(1, abs=1e-3), baseline.name


def test_order_on_a_density_that_is_not_gaussian() -> None:
    splits = load("2spirals")
    train, validation = splits.train.tensor()[:3000], splits.validation.tensor()[:500]
    fitted = fit_baselines(train, validation)
    test = splits.test.tensor()
    scores = {name: float(b.log_prob(test).mean()) for name, b in fitted.items()}
    assert list(scores) == ["gaussian", "mixture", "kde"]
    assert scores["gaussian"] < scores["kde"] - 0.5
    assert scores["gaussian"] < scores["mixture"] - 0.5
    entropy = splits.density.entropy()  # type: ignore[union-attr]
    assert max(scores.values()) < -entropy + 0.05  # nothing beats the truth, but for the noise of the test set


def test_is_seeded_and_keeps_types() -> None:
    x = synthetic.density("moons").sample(1_000, seed=0)
    a, b = (fit_baselines(x[:800], x[800:], seed=3) for _ in range(2))
    for name in a:
        assert torch.equal(a[name].log_prob(x), b[name].log_prob(x))
        assert a[name].log_prob(x).dtype == torch.float32
        assert a[name].log_prob(x[:0]).shape == (0,)
        assert torch.allclose(a[name].log_prob(x.double())[:5].float(), a[name].log_prob(x[:5]))


def test_subsamples_are_owned_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_FIT_LIMIT", 300)
    monkeypatch.setattr(baselines, "_KDE_LIMIT", 200)
    x = synthetic.density("moons").sample(1_000, seed=0)
    fitted = fit_baselines(x[:800], x[800:])
    assert "fitted to 300 of 800 samples" in fitted["mixture"].description
    assert "fitted to 200 of 800 samples" in fitted["kde"].description


def test_high_dimension_says_what_is_left_out() -> None:
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixture = fit_mixture(x[:300], x[300:], torch.Generator().manual_seed(0))
    assert "several full covariances left out above 128 dimensions" in mixture.description
    # of independent normals, one diagonal Gaussian is the truth: 200 · ½ log(2πe) nats; 300 samples come near
    assert float(mixture.log_prob(x[300:]).mean()) > -200 * 0.5 * math.log(2 * math.pi * math.e) - 120


def test_bad_input() -> None:
    x = torch.randn(50, 2)
    with pytest.raises(DataError, match=r"validation has shape \(50, 3\)"):
        fit_baselines(x, torch.randn(50, 3))
    with pytest.raises(DataError, match="train has 1 samples"):
        fit_baselines(x[:1], x)
    with pytest.raises(DataError, match="train has values that are NaN"):
        fit_baselines(torch.full((5, 2), math.nan), x)
    with pytest.raises(DataError, match="all equal"):
        fit_baselines(torch.ones(50, 2), x)
    with pytest.raises(DataError, match="int64"):
        fit_baselines(torch.ones(50, 2, dtype=torch.int64), x)
    fitted = fit_gaussian(x.double(), x.double())
    with pytest.raises(DataError, match=r"expected floats \(n, 2\)"):
        fitted.log_prob(torch.zeros(3, 4))
