"""Anomaly scores: p-values of malignant tumours under a density of benign ones, from Python and over a file in chunks.

    python examples/anomaly_scores.py [--quick] [--out DIR]

Trains on half of the benign samples of scikit-learn's breast cancer table, calibrates with a quarter, and shows that
the p-values of the last quarter are uniform (as many below α as α says) while malignant ones are small, next to a
Gaussian on the same samples. Then writes a larger file, scores it in chunks as ``pyrnode score`` does, and compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import stats
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split

from pyrnode.anomalies import score_file
from pyrnode.estimator import RNODEDensity


def main() -> dict[str, float]:
    """Returns the area under the ROC curve, the KS statistic of benign p-values, and the share of detected tumours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=Path("runs/anomalies"), help="folder of the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_breast_cancer()
    X = np.log1p(data.data)  # areas and radii over orders of magnitude
    benign, malignant = X[data.target == 1], X[data.target == 0]
    fit, rest = train_test_split(benign, test_size=0.5, random_state=0)
    held_out, fresh = train_test_split(rest, test_size=0.5, random_state=0)

    model = RNODEDensity(kinetic=0.1, jacobian=0.1, max_steps=30 if args.quick else 400, random_state=0)
    model.fit(fit).calibrate(held_out)
    p_fresh, p_malignant = model.p_values(fresh), model.p_values(malignant)
    ks = float(stats.kstest(p_fresh, "uniform").statistic)
    alpha = 0.05
    detected = float((p_malignant <= alpha).mean())
    both, label = np.concatenate((fresh, malignant)), np.r_[np.zeros(len(fresh)), np.ones(len(malignant))]
    everything = model.score_samples(both)
    auc = float(roc_auc_score(label, -everything))
    gaussian = roc_auc_score(label, -GaussianMixture(1, random_state=0).fit(fit).score_samples(both))
    print(f"{len(fit)} benign samples trained on, {len(held_out)} to calibrate")
    print(f"fresh benign: {(p_fresh <= alpha).mean():.3f} have p ≤ {alpha}, distance from uniform {ks:.3f}")
    print(
        f"malignant:    {detected:.3f} have p ≤ {alpha}, area under the ROC curve {auc:.3f} (Gaussian {gaussian:.3f})"
    )

    source, target = args.out / "table.npy", args.out / "scores.csv"
    np.save(source, np.tile(both, (2 if args.quick else 20, 1)))
    summary = score_file(model.flow_, source, target, calibration=model.calibration_, chunk=200)
    print(f"{summary}\nwritten to {target}")
    again = np.loadtxt(target, delimiter=",", skiprows=1)[: len(everything), 1]
    return {"auc": auc, "ks": ks, "detected": detected, "difference": float(np.abs(again - everything).max())}


if __name__ == "__main__":
    main()
