"""A run's numbers in Weights & Biases, by a callback of ten lines; offline, without an account.

    pip install wandb
    python examples/log_to_wandb.py [--quick] [--out FOLDER]
    wandb sync FOLDER/wandb/offline-run-*     # sends it, if you want that

pyrnode does not need wandb: what it knows of it is the class below. Copy that, and leave out ``mode="offline"`` to send
the numbers as they come.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import wandb

import pyrnode


class WandB(pyrnode.Callback):
    """Optimiser steps under ``train/``, validations under ``validation/``."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_start(self, run: pyrnode.TrainingRun) -> None:
        self.run = wandb.init(project="pyrnode", dir=self.folder, mode="offline", config=run.config.to_dict())

    def on_step(self, record: pyrnode.runs.Record) -> None:
        self.run.log({f"train/{name}": value for name, value in record.items()})

    def on_validation(self, record: pyrnode.runs.Record) -> None:
        self.run.log({f"validation/{name}": value for name, value in record.items()})

    def on_end(self) -> None:
        self.run.finish()


def main() -> list[dict[str, float]]:
    """Trains a flow; returns the history that was logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", default="runs/wandb", help="folder to write to")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    settings = {"max_steps": 4, "validate_every": 2, "samples": 200} if args.quick else {"epochs": 10}
    callback = WandB(args.out)
    return pyrnode.train("8gaussians", callbacks=callback, evaluate=False, progress=not args.quick, **settings).history


if __name__ == "__main__":
    main()
