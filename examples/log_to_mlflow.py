"""A run's numbers in MLflow, by a callback of ten lines; in files of this machine, without a server.

    pip install mlflow
    python examples/log_to_mlflow.py [--quick] [--out FOLDER]
    mlflow ui --backend-store-uri sqlite:///runs/mlflow/mlflow.db

pyrnode does not need MLflow: what it knows of it is the class below. Copy that, and give it the address of your server
to send the numbers there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlflow

import pyrnode


class MLflow(pyrnode.Callback):
    """Optimiser steps under ``train/``, validations under ``validation/``."""

    def __init__(self, address: str) -> None:
        mlflow.set_tracking_uri(address)

    def on_start(self, run: pyrnode.TrainingRun) -> None:
        mlflow.start_run()
        mlflow.log_params(run.config.to_dict())

    def on_step(self, record: pyrnode.runs.Record, group: str = "train") -> None:
        numbers = {f"{group}/{name}": float(v) for name, v in record.items() if isinstance(v, int | float)}
        mlflow.log_metrics(numbers, step=record["step"])

    def on_validation(self, record: pyrnode.runs.Record) -> None:
        self.on_step(record, "validation")

    def on_end(self) -> None:
        mlflow.end_run()


def main() -> list[dict[str, float]]:
    """Trains a flow; returns the history that was logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", default="runs/mlflow", help="folder to write to")
    args = parser.parse_args()
    folder = Path(args.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    callback = MLflow(f"sqlite:///{folder}/mlflow.db")
    settings = {"max_steps": 4, "validate_every": 2, "samples": 200} if args.quick else {"epochs": 10}
    return pyrnode.train("8gaussians", callbacks=callback, evaluate=False, progress=not args.quick, **settings).history


if __name__ == "__main__":
    main()
