"""The scikit-learn estimator: scikit-learn's own rules, and its numbers against closed forms and other estimators."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pyrnode
from pyrnode import RNODEDensity, seeds
from pyrnode.errors import ConfigError, DataError, PyrnodeError
from pyrnode.estimator import UnfittedError

QUICK: dict[str, Any] = {"hidden": (6,), "max_steps": 8, "random_state": 0}
FULL_BATCH: dict[str, Any] = {
    "hidden": (8,),
    "max_steps": 15,
    "batch_size": 10_000,
    "validation_fraction": 0,
    "divergence": "exact",
    "random_state": 0,
}


def gaussian(n: int, d: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.fixture(scope="module")
def model() -> RNODEDensity:
    return RNODEDensity(**QUICK).fit(gaussian(200, 3) * [1, 10, 0.1] + [5, 0, -2])


# -- scikit-learn's rules --------------------------------------------------------------------------------------------

# scikit-learn skips check_array_api_input by itself where SCIPY_ARRAY_API is not set; no check is expected to fail.
EXPECTED_FAILED: dict[str, str] = {}


@pytest.mark.filterwarnings("ignore::pyrnode.data.support.SupportWarning")
@parametrize_with_checks(
    [RNODEDensity(hidden=(4,), max_steps=3, divergence="hutchinson"), RNODEDensity(hidden=(4,), max_steps=3, blocks=2)],
    expected_failed_checks=lambda _: EXPECTED_FAILED,
)
def test_scikit_learns_checks(estimator: RNODEDensity, check: Any) -> None:
    check(estimator)


def test_a_clone_is_unfitted_and_equal(model: RNODEDensity) -> None:
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert not hasattr(copy, "flow_")
    copy.set_params(hidden=(3,), kinetic=0.5)
    assert (copy.hidden, copy.kinetic, model.hidden) == ((3,), 0.5, (6,))


def test_a_pickle_scores_the_same(model: RNODEDensity) -> None:
    X = gaussian(20, 3, seed=1)
    again = pickle.loads(pickle.dumps(model.calibrate(X)))
    np.testing.assert_array_equal(again.score_samples(X), model.score_samples(X))
    np.testing.assert_array_equal(again.p_values(X), model.p_values(X))


def test_random_state_decides_everything() -> None:
    X = gaussian(60)
    global_state = torch.get_rng_state()
    first, second, other = (RNODEDensity(**{**QUICK, "random_state": s}).fit(X) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.score_samples(X), second.score_samples(X))
    assert not np.allclose(first.score_samples(X), other.score_samples(X), rtol=1e-6)
    np.testing.assert_array_equal(first.sample(4, random_state=3), second.sample(4, random_state=3))
    assert not np.allclose(first.sample(4, random_state=3), first.sample(4, random_state=4))
    assert torch.equal(torch.get_rng_state(), global_state)


def test_names_of_features_are_kept_and_checked() -> None:
    frame = pd.DataFrame(gaussian(40), columns=["a", "b"])
    model = RNODEDensity(**QUICK).fit(frame)
    assert list(model.feature_names_in_) == ["a", "b"]
    assert model.n_features_in_ == 2
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        from_array = model.score_samples(frame.to_numpy())
    np.testing.assert_array_equal(model.score_samples(frame), from_array)
    with pytest.raises(DataError, match="feature names should match"):
        model.score_samples(frame[["b", "a"]])


# -- its numbers -----------------------------------------------------------------------------------------------------


def test_densities_integrate_to_one_in_the_units_of_the_input() -> None:
    X = gaussian(300, 1, seed=2) * 40 + 1000
    model = RNODEDensity(hidden=(8,), max_steps=60, random_state=0).fit(X)
    grid = np.linspace(500, 1500, 2001)
    density = np.exp(model.score_samples(grid[:, None]))
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-4)
    assert float((grid * density).sum() / density.sum()) == pytest.approx(float(X.mean()), abs=15)


def test_another_unit_shifts_the_score_by_its_jacobian() -> None:
    """Fits to x and to 1000 x + 7 are the same flow, whose densities differ by the factor 1000 in each dimension."""
    X, scale, settings = gaussian(100), np.array([1000.0, 0.01]), {**QUICK, "dtype": "float64"}
    plain, scaled = RNODEDensity(**settings).fit(X), RNODEDensity(**settings).fit(X * scale + 7)
    np.testing.assert_allclose(
        scaled.score_samples(X * scale + 7), plain.score_samples(X) - np.log(scale).sum(), rtol=0, atol=1e-7
    )


def test_score_is_the_total_as_that_of_kernel_density(model: RNODEDensity) -> None:
    X = gaussian(30, 3, seed=3)
    assert model.score(X) == pytest.approx(model.score_samples(X).sum(), rel=1e-12)
    kernel = KernelDensity().fit(X)
    assert kernel.score(X) == pytest.approx(kernel.score_samples(X).sum())  # what it is to be like


def test_scores_are_those_of_the_flow_and_of_what_it_saves(model: RNODEDensity, tmp_path: Any) -> None:
    X = gaussian(5, 3, seed=4)
    model.flow_.save(tmp_path / "model.safetensors")
    loaded = pyrnode.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        np.testing.assert_allclose(loaded.log_prob(torch.from_numpy(X)).numpy(), model.score_samples(X), rtol=1e-12)


def test_with_an_estimated_trace_a_score_still_belongs_to_the_sample() -> None:
    """Above 64 features the trace is estimated; scores of subsets, and p-values, are those of the whole."""
    X = gaussian(40, 70)
    model = (
        RNODEDensity(hidden=(8,), max_steps=3, learning_rate=0.05, random_state=0)
        .fit(X)
        .calibrate(gaussian(30, 70, seed=1))
    )
    whole = model.score_samples(X)
    np.testing.assert_allclose(model.score_samples(X[[7, 3, 7]]), whole[[7, 3, 7]], rtol=1e-10)
    np.testing.assert_allclose(np.concatenate([model.p_values(X[[i]]) for i in range(5)]), model.p_values(X[:5]))


def test_a_normal_distribution_is_learned() -> None:
    truth = stats.multivariate_normal([3, -1], [[4.0, 1.5], [1.5, 1.0]])
    X = truth.rvs(1500, random_state=0)
    model = RNODEDensity(hidden=(16,), max_steps=150, random_state=0).fit(X)
    fresh = truth.rvs(500, random_state=1)
    gap = truth.logpdf(fresh) - model.score_samples(fresh)
    standardised = stats.multivariate_normal(X.mean(0), np.diag(X.var(0)))  # where training starts
    start = truth.logpdf(fresh) - standardised.logpdf(fresh)
    assert start.mean() > 0.3
    assert -0.01 < gap.mean() < 0.06
    samples = model.sample(4000, random_state=0)
    np.testing.assert_allclose(samples.mean(0), [3, -1], atol=0.2)
    np.testing.assert_allclose(np.cov(samples.T), truth.cov, atol=0.5)


def test_single_precision_is_asked_for_by_name() -> None:
    X = gaussian(50)
    double, single = (RNODEDensity(**QUICK, dtype=dtype).fit(X) for dtype in ("float64", "float32"))
    assert [next(m.flow_.parameters()).dtype for m in (double, single)] == [torch.float64, torch.float32]
    scores = single.score_samples(X)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, double.score_samples(X), atol=0.05)


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["paper", "ffjord-rnode"])
def test_weights_count_as_repeated_samples(convention: str) -> None:
    X, rng = gaussian(40, seed=5) * [1, 30], np.random.default_rng(0)
    weights = rng.integers(0, 5, 40)
    assert (weights == 0).any()
    settings = FULL_BATCH | {"dtype": "float64", "kinetic": 0.1, "jacobian": 0.2}
    settings["overrides"] = {"convention": convention, "flow.standardize": "whiten"}
    weighted = RNODEDensity(**settings).fit(X, sample_weight=weights)
    repeated = RNODEDensity(**settings).fit(X.repeat(weights, axis=0))
    plain = RNODEDensity(**settings).fit(X)
    np.testing.assert_allclose(weighted.score_samples(X), repeated.score_samples(X), rtol=0, atol=1e-8)
    assert np.abs(weighted.score_samples(X) - plain.score_samples(X)).max() > 0.05


def test_weights_matter_only_relative_to_each_other() -> None:
    X, weights = gaussian(40), np.random.default_rng(0).uniform(0.5, 2, 40)
    first, second = (RNODEDensity(**QUICK).fit(X, sample_weight=w) for w in (weights, 1000 * weights))
    np.testing.assert_allclose(first.score_samples(X), second.score_samples(X), rtol=0, atol=1e-9)
    same, none = (RNODEDensity(**QUICK).fit(X, sample_weight=w) for w in (np.full(40, 3.0), None))
    np.testing.assert_allclose(same.score_samples(X), none.score_samples(X), rtol=0, atol=1e-8)


def test_weights_in_batches_shift_the_density() -> None:
    """Two clusters, the rarer one weighted up: half of the mass should be there."""
    rng = np.random.default_rng(0)
    X = np.concatenate((rng.normal(-2, 0.5, 900), rng.normal(2, 0.5, 100)))[:, None]
    weights = np.where(X[:, 0] > 0, 9.0, 1.0)
    model = RNODEDensity(hidden=(16, 16), max_steps=250, batch_size=300, random_state=0).fit(X, sample_weight=weights)
    grid = np.linspace(-6, 6, 601)
    density = np.exp(model.score_samples(grid[:, None]))
    right = np.trapezoid(density[grid >= 0], grid[grid >= 0])
    assert right == pytest.approx(0.5, abs=0.06)


def test_each_batch_has_the_weights_of_its_own_samples() -> None:
    """At a learning rate of nothing the flow stays the standardised normal, whose batch losses are known."""
    X, weights = gaussian(60, seed=9) * [1, 3] + 1, np.random.default_rng(2).uniform(0.1, 5, 60)
    settings = {"hidden": (4,), "max_steps": 6, "batch_size": 20, "validation_fraction": 0, "random_state": 0}
    settings |= {"dtype": "float64", "overrides": {"flow.standardize": "scale"}}
    model = RNODEDensity(**settings, learning_rate=1e-14).fit(X, sample_weight=weights)
    random = np.random.RandomState(0)
    seed, order = random.randint(2**31 - 1), random.permutation(60)
    mean = np.average(X, axis=0, weights=weights)
    std = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weights))
    nll = -stats.norm(mean, std).logpdf(X).sum(1) / 2 * weights / weights.mean()
    batches = [order[torch.randperm(60, generator=seeds.generator(seed, "order", epoch))] for epoch in (0, 1)]
    expected = [nll[batch].mean() for epoch in batches for batch in np.split(epoch, 3)]
    losses = [record["nll"] for record in model.history_ if "loss" in record]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


def test_validation_is_weighted_too() -> None:
    X, weights = gaussian(60), np.random.default_rng(1).uniform(0.1, 5, 60)
    settings = {"hidden": (4,), "max_steps": 1, "validation_fraction": 0.5, "batch_size": 5, "random_state": 0}
    model = RNODEDensity(**settings, dtype="float64").fit(X, sample_weight=weights)
    order = np.random.RandomState(0)
    order.randint(2**31 - 1)
    held_out = order.permutation(60)[:30]
    solver = pyrnode.SolverConfig()
    with torch.no_grad():
        values = model.flow_.log_prob(torch.from_numpy(X[held_out]), solver=solver, divergence="exact").numpy()
    expected = -np.average(values, weights=weights[held_out]) / 2
    (validation,) = [record["validation"] for record in model.history_ if "validation" in record]
    assert validation == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(39), r"shape \(39,\): expected \(40,\)"),
        (np.ones((40, 1)), r"shape \(40, 1\)"),
        (np.zeros(40), "all weights are zero"),
        (np.r_[-1.0, np.ones(39)], "negative values, down to -1"),
        (np.r_[np.nan, np.ones(39)], "sample_weight contains NaN"),
    ],
)
def test_bad_weights(weights: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RNODEDensity(**QUICK).fit(gaussian(40), sample_weight=weights)


# -- what is held out ------------------------------------------------------------------------------------------------


def test_the_best_weights_on_held_out_samples_are_kept() -> None:
    model = RNODEDensity(hidden=(32, 32), max_steps=400, learning_rate=0.02, kinetic=0, jacobian=0, random_state=0)
    model.set_params(patience=5).fit(gaussian(30, seed=6))
    values = [record["validation"] for record in model.history_ if "validation" in record]
    assert model.n_iter_ < 400
    assert len(values) - 1 - int(np.argmin(values)) == 5  # stopped after five without improvement
    order = np.random.RandomState(0)
    order.randint(2**31 - 1)
    held_out = gaussian(30, seed=6)[order.permutation(30)[:3]]
    assert -model.score(held_out) / 3 / 2 == pytest.approx(min(values), abs=1e-6)


def test_calibration_samples_are_not_trained_on() -> None:
    X = gaussian(100, seed=7)
    model = RNODEDensity(**QUICK, calibration_fraction=0.3).fit(X)
    order = np.random.RandomState(0)
    order.randint(2**31 - 1)
    held_out = order.permutation(100)[:30]
    np.testing.assert_allclose(model.calibration_.scores, np.sort(model.score_samples(X[held_out])), rtol=1e-12)
    spoiled = X.copy()
    spoiled[held_out] = 100.0
    again = RNODEDensity(**QUICK, calibration_fraction=0.3).fit(spoiled)
    np.testing.assert_array_equal(model.score_samples(X), again.score_samples(X))


def test_p_values_of_ordinary_samples_are_uniform_and_those_of_outliers_small() -> None:
    model = RNODEDensity(**QUICK, calibration_fraction=0.5).fit(gaussian(2000))
    p = model.p_values(gaussian(1000, seed=8))
    # Calibration and test scores are two samples of one distribution; so their ranks are uniform up to both sizes.
    assert stats.kstest(p, "uniform").statistic < 1.63 * np.sqrt(1 / 1000 + 1 / 1000)  # the 1 % point
    assert (model.p_values([[8.0, 0.0], [0.0, -7.0]]) == 1 / 1001).all()
    assert model.p_values([[0.0, 0.0]])[0] > 0.9


def test_calibrate_replaces_and_fit_forgets_the_calibration(model: RNODEDensity) -> None:
    X = gaussian(30)
    fitted = RNODEDensity(**QUICK).fit(X)
    with pytest.raises(UnfittedError, match="is not calibrated: set calibration_fraction, or call calibrate"):
        fitted.p_values(X)
    fitted.calibrate(gaussian(9, seed=1))
    assert fitted.p_values(X).min() >= 0.1
    fitted.calibrate(gaussian(99, seed=1))
    assert len(fitted.calibration_.scores) == 99
    with pytest.raises(UnfittedError):
        fitted.fit(X).p_values(X)


# -- beside the others -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pyrnode.data.support.SupportWarning")  # iris is measured in tenths
def test_in_a_pipeline_and_a_search_beside_the_others() -> None:
    X = load_iris().data
    pipeline = make_pipeline(StandardScaler(), RNODEDensity(**QUICK))
    direct = RNODEDensity(**QUICK).fit(StandardScaler().fit_transform(X))
    expected = direct.score_samples(StandardScaler().fit_transform(X))
    np.testing.assert_allclose(pipeline.fit(X).score_samples(X), expected, rtol=1e-9)
    search = GridSearchCV(
        pipeline, {"rnodedensity__hidden": [(4,), (8, 8)], "rnodedensity__max_steps": np.arange(2, 4)}
    )
    search.set_params(cv=2).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    best = cross_val_score(pipeline.set_params(**search.best_params_), X, cv=2).mean()
    assert best == pytest.approx(search.best_score_, rel=1e-9)
    for other in (KernelDensity(), GaussianMixture()):
        assert np.isfinite(cross_val_score(make_pipeline(StandardScaler(), other), X, cv=2)).all()


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["score_samples", "score", "p_values", "calibrate", "sample"])
def test_unfitted(method: str) -> None:
    argument = 3 if method == "sample" else gaussian(3)
    with pytest.raises(NotFittedError, match="this RNODEDensity is not fitted: call fit first") as caught:
        getattr(RNODEDensity(), method)(argument)
    assert isinstance(caught.value, PyrnodeError)


def test_bad_input(model: RNODEDensity) -> None:
    with pytest.raises(DataError, match="X has 2 features, but RNODEDensity is expecting 3 features"):
        model.score_samples(gaussian(4, 2))
    with pytest.raises(DataError, match="NaN"):
        model.score_samples([[1.0, np.nan, 0.0]])
    with pytest.raises(DataError, match="NaN"):
        RNODEDensity(**QUICK).fit([[1.0, np.nan], [0.0, 1.0]])
    with pytest.raises(DataError, match="column 'b' is constant"):
        RNODEDensity(**QUICK).fit(pd.DataFrame({"a": np.arange(20.0), "b": np.ones(20)}))
    with pytest.raises(DataError, match="n_samples = 2: 1 are left to train on"):
        RNODEDensity(**QUICK).fit(gaussian(2))
    with pytest.raises(ConfigError, match="n = -1"):
        model.sample(-1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"hidden": "wide"}, "hidden = 'wide': expected 'auto'"),
        ({"hidden": 16}, "hidden = 16: expected a list of int"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"hidden": (0,)}, "hidden"),
        ({"max_steps": 0}, "max_steps"),
        ({"kinetic": -1.0}, "kinetic"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"validation_fraction": 1.0}, r"validation_fraction = 1.0: expected a share in \[0, 1\)"),
        ({"calibration_fraction": -0.1}, "calibration_fraction = -0.1"),
        ({"dtype": "float16"}, "float16"),
        ({"device": "abacus"}, "abacus"),
        ({"overrides": {"emu": 0.9}}, "did you mean 'ema'"),
        ({"overrides": {"data.limit": 20}}, "no setting of data has an effect"),
    ],
)
def test_bad_parameters_are_found_by_fit(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RNODEDensity(**QUICK).set_params(**parameters).fit(gaussian(40))


def test_weights_and_a_calibration_do_not_go_together() -> None:
    model, X = RNODEDensity(**QUICK, calibration_fraction=0.2), gaussian(40)
    with pytest.raises(ConfigError, match="p-values count samples"):
        model.fit(X, sample_weight=np.arange(1, 41))
    assert len(model.fit(X, sample_weight=np.full(40, 2.0)).calibration_.scores) == 8


def test_an_interrupted_fit_is_not_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrnode.estimator.Trainer.run", lambda self: False)
    model = RNODEDensity(**QUICK)
    with pytest.raises(KeyboardInterrupt):
        model.fit(gaussian(40))
    assert not hasattr(model, "flow_")


WORKERS = """
import sys, time
if __name__ == "__main__":
    import numpy as np
    import torch
    torch.set_num_threads(2)
    (torch.randn(400, 400, dtype=torch.float32) @ torch.randn(400, 400, dtype=torch.float32)).sum()  # its threads run
    from pyrnode import RNODEDensity
    from sklearn.model_selection import cross_val_score
    X = np.random.default_rng(0).normal(size=(120, 2))
    model = RNODEDensity(max_steps=3, hidden=(8,), batch_size=50, random_state=0)
    print([float(v) for v in cross_val_score(model, X, cv=2, n_jobs=int(sys.argv[1]))])
"""


def test_scores_in_workers_of_joblib(tmp_path: Path) -> None:
    """joblib's own workers (loky) start afresh, whatever threads this process has; they give the same numbers."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    alone, beside = (
        subprocess.run(
            [sys.executable, str(script), jobs],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for jobs in ("1", "2")
    )
    assert json.loads(beside) == pytest.approx(json.loads(alone), rel=1e-5)


@pytest.mark.parametrize(("d", "width", "rate"), [(3, 64, 0.01), (48, 128, 0.005)])
def test_network_and_rate_are_those_of_the_presets(d: int, width: int, rate: float) -> None:
    X = np.random.default_rng(0).normal(size=(60, d))
    config = RNODEDensity(max_steps=1, random_state=0).fit(X).flow_.config
    assert (config.flow.network.hidden, config.training.learning_rate) == ((width,) * 3, rate)
    given = RNODEDensity(hidden=np.array([8, 4]), learning_rate=0.02, max_steps=1, random_state=0).fit(X).flow_.config
    assert (given.flow.network.hidden, given.training.learning_rate) == ((8, 4), 0.02)
