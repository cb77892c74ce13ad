"""A run's numbers in TensorBoard, by the callback that pyrnode has for it.

    pip install tensorboard
    python examples/log_to_tensorboard.py [--quick] [--out FOLDER]
    tensorboard --logdir runs/tensorboard

Optimiser steps stand under ``train/`` and validations, by the accurate solver, under ``validation/``. The setting
``training.tensorboard = true`` (``--set tensorboard=true``) does the same in the folder of the run.
"""

from __future__ import annotations

import argparse

import pyrnode


def main() -> list[dict[str, float]]:
    """Trains a flow; returns the history that was logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", default="runs/tensorboard", help="folder to write to")
    args = parser.parse_args()
    board = pyrnode.TensorBoard(args.out)
    settings = {"max_steps": 4, "validate_every": 2, "samples": 200} if args.quick else {"epochs": 10}
    return pyrnode.train("8gaussians", callbacks=[board], evaluate=False, progress=not args.quick, **settings).history


if __name__ == "__main__":
    main()
