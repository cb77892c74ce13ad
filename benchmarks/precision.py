"""What training in TF32 or bfloat16 costs in numbers: the rounding is imitated on a CPU, so no GPU is needed.

    python -m benchmarks.precision [--data FOLDER] [--steps 200] [--hidden 16 16 16] [--json FILE]

On real MNIST (or, without --data, on the digits that come with scikit-learn), with the paper's network in small:

* a run of training in each precision, from the same weights, with the same batches and noise: bits/dim on the same
  validation images by the same IEEE solver;
* at the weights that IEEE's run ends with, of one batch with the same noise: how far log-densities are from IEEE's
  (their mean, which is a bias, and their spread, both in bits/dim), and how far the gradient of the loss is.

docs/gpu.md has the table. It says nothing of time: a CPU takes longer to imitate a precision than to do without.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from pyrnode.config import Config, Precision
from pyrnode.data import Splits, load
from pyrnode.training.step import differentiate, loss
from pyrnode.training.trainer import Trainer

PRECISIONS: tuple[Precision, ...] = ("ieee", "tf32", "bf16")
_SHOWN = 5
"""Validations of a run."""


def settings(args: argparse.Namespace, precision: Precision) -> Config:
    """Those of a run; the validation's solver is a grid's, so that its cost does not depend on the weights."""
    return Config.preset("finlay2020-mnist").override(
        {
            "engine": "torch",
            "device": "cpu",
            "data.name": "mnist" if args.data else "digits",
            **({"data.dir": str(args.data)} if args.data else {}),
            "hidden": args.hidden,
            "scales": 2,
            "blocks": 1,
            "solver.precision": precision,
            "batch_size": args.batch,
            "epochs": None,
            "max_steps": args.steps,
            "warmup_steps": args.steps // 10,
            "validate_every": max(1, args.steps // _SHOWN),
            "validation_limit": args.validation,
            "evaluation.solver": {"name": "RK4", "step_size": 0.25},
        }
    )


def curve(args: argparse.Namespace, precision: Precision, splits: Splits) -> tuple[Trainer, list[dict[str, float]]]:
    """A run, and its validations in bits/dim by steps."""
    trainer = Trainer(settings(args, precision), splits, None, progress=False)
    trainer.run()
    validations = [r for r in trainer.history if "validation_bits" in r]
    points = [{"step": float(r["step"]), "bits": float(r["validation_bits"])} for r in validations]
    return trainer, points


def _of_batch(trainer: Trainer, precision: Precision) -> tuple[Tensor, Tensor]:
    """Bits per dimension of a batch's samples, and the gradient of the loss, in double precision."""
    batch = next(trainer.feed.batches(0))
    solver = trainer.solver.computing_in(precision)
    result, passage = loss(trainer.flow, batch, trainer.config, solver, 0)
    differentiate(result.loss, trainer.flow, trainer.state.optimizer)
    gradient = torch.cat([p.grad.reshape(-1) for p in trainer.flow.parameters() if p.grad is not None])
    return passage.log_prob.detach().double() / trainer.flow.dim / math.log(2), gradient.double()


def differences(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Of the coarse precisions from IEEE's, at the weights of a run."""
    bits, exact = _of_batch(trainer, "ieee")
    found = dict[str, dict[str, float]]()
    for precision in PRECISIONS[1:]:
        other, gradient = _of_batch(trainer, precision)
        apart = other - bits
        found[precision] = {
            "bias_bits": float(apart.mean()),
            "bias_error": float(apart.std() / len(apart) ** 0.5),
            "rms_bits": float(apart.square().mean().sqrt()),
            "gradient": float((gradient - exact).norm() / exact.norm()),
        }
    return found


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, nargs="+", default=[16, 16, 16])
    parser.add_argument("--validation", type=int, default=100, help="validation images")
    records.json_argument(parser)
    args = parser.parse_args()
    splits = load(None, config=settings(args, "ieee").data)
    results: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items()}, "curves": {}}
    runs = {}
    for precision in PRECISIONS:
        begun = time.perf_counter()
        runs[precision], results["curves"][precision] = curve(args, precision, splits)
        print(f"{precision}: {time.perf_counter() - begun:.0f} s", flush=True)
    results["differences"] = differences(runs["ieee"])
    records.leave(args.json, results)
    steps = [int(point["step"]) for point in results["curves"]["ieee"]]
    print("| precision | bias of log p | its spread | gradient |", " | ".join(f"{n} steps" for n in steps), "|")
    print("|---" * (4 + len(steps)) + "|")
    for precision in PRECISIONS:
        d = results["differences"].get(precision)
        cells = (
            ["", "", ""]
            if d is None
            else [f"{d['bias_bits']:.1e} ± {d['bias_error']:.0e}", f"{d['rms_bits']:.1e}", f"{d['gradient']:.1e}"]
        )
        cells += [f"{point['bits']:.4f}" for point in results["curves"][precision]]
        print("|", " | ".join([f"`{precision}`", *cells]), "|")


if __name__ == "__main__":
    main()
