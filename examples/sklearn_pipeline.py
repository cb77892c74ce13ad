"""Densities of scikit-learn's tables: RNODEDensity beside KernelDensity and GaussianMixture, in pipelines and searches.

    python examples/sklearn_pipeline.py [--quick]

Each of the three is one step of a pipeline. The peers' parameters are chosen by a search on the training part of each
fold; RNODEDensity is as it comes, for what depends on the table it finds by itself. Printed is the log-density of the
held-out part, in nats per sample and in the units of the table (the scaler's Jacobian included), mean ± standard error
over the folds. These tables have 150 to 569 rows, few for any of the three.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pyrnode.estimator import RNODEDensity

TABLES = {
    # Lengths to a tenth of a centimetre, which recur: a grid has no density, so they are spread over what was rounded.
    "iris": lambda: load_iris().data + np.random.default_rng(0).uniform(-0.05, 0.05, (150, 4)),
    "wine": lambda: load_wine().data,
    "diabetes": lambda: np.delete(load_diabetes().data, 1, axis=1),  # without sex, which is not continuous
    "breast cancer": lambda: np.log1p(load_breast_cancer().data),
}


def models(quick: bool) -> dict[str, Pipeline | GridSearchCV]:
    """The three estimators, each behind a scaler; two of them inside a search."""
    peers = {
        "kernel density": (KernelDensity(), {"density__bandwidth": np.geomspace(0.1, 2, 14)}),
        "Gaussian mixture": (
            GaussianMixture(random_state=0),
            {"density__n_components": [1, 2, 3, 5], "density__reg_covar": [1e-4, 1e-3, 1e-2]},
        ),
    }
    folds = KFold(2, shuffle=True, random_state=0)  # these tables are sorted by class: folds in order are other data
    searches = {
        name: GridSearchCV(Pipeline([("scale", StandardScaler()), ("density", estimator)]), grid, cv=folds)
        for name, (estimator, grid) in peers.items()
    }
    density = RNODEDensity(random_state=0)
    if quick:
        density.set_params(max_steps=10)
    return {**searches, "RNODE": Pipeline([("scale", StandardScaler()), ("density", density)])}


def held_out(model: Pipeline | GridSearchCV, X: np.ndarray, folds: int) -> np.ndarray:
    """Nats per held-out sample in each fold, in the units of the table."""
    values = []
    for train, test in KFold(folds, shuffle=True, random_state=0).split(X):
        fitted = model.fit(X[train])
        best = fitted.best_estimator_ if isinstance(fitted, GridSearchCV) else fitted
        values.append(best.score_samples(X[test]).mean() - np.log(best["scale"].scale_).sum())
    return np.array(values)


def main() -> dict[str, float]:
    """Compares on each table; returns RNODE's nats per sample above the kernel density's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one table and a few steps only")
    quick = parser.parse_args().quick
    gains = {}
    for table in ["iris"] if quick else TABLES:
        X, start = TABLES[table](), time.perf_counter()
        scores = {name: held_out(model, X, 2 if quick else 3) for name, model in models(quick).items()}
        cells = [f"{name} {v.mean():8.3f} ± {v.std(ddof=1) / len(v) ** 0.5:.3f}" for name, v in scores.items()]
        print(f"{table:<14}{X.shape!s:<11}{'   '.join(cells)}   ({time.perf_counter() - start:.0f} s)", flush=True)
        gains[table] = float((scores["RNODE"] - scores["kernel density"]).mean())
    return gains


if __name__ == "__main__":
    main()
