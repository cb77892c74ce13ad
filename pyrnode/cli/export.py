"""The commands ``pyrnode export`` and ``pyrnode verify``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

import pyrnode
from pyrnode import solvers
from pyrnode.cli.output import (
    device_argument,
    embedding,
    embedding_argument,
    engine_argument,
    output_arguments,
    print_json,
    talks,
)
from pyrnode.export import TorchFlow, exported
from pyrnode.flow import Flow
from pyrnode.progress import SECONDS, progress_bar, stages


def export(args: argparse.Namespace) -> int:
    """Writes a trained flow to a file for other programs, and says how far file and flow are from the truth."""
    solver = _given({"name": args.solver, "step_size": args.step_size, "rtol": args.rtol, "atol": args.atol})
    divergence = _given({"kind": args.divergence, "probes": args.probes, "seed": args.seed})
    named = [f"export: {stage}" for stage in ("the flow", "writing and checking the file", "the solver's error")]
    with stages(named, show=talks(args)) as done:
        device = args.device or "cpu"
        flow = pyrnode.load(args.run, engine=args.engine, device=device, embedding=embedding(args))
        module = flow.to_torch(solver, divergence=divergence)
        if args.dtype is not None:
            module = module.to(getattr(torch, args.dtype))
        done()
        result = exported.save(module, args.out, to=args.to, program=args.program)
        done()
        gap = _solver_gap(flow, module)
        done()
    if args.json:
        print_json({"out": args.out, **result.to_dict(), "solver_gap": gap})
        return 0
    print(f"written to {args.out}\n{result}")
    used, accurate = solvers.describe(module.solver), solvers.describe(flow.solver)
    print(f"log_prob with {used}, {module.divergence.kind} trace: at most {gap:.1e} nats from {accurate}")
    if gap > 0.01:
        print("that is much: take a smaller --step-size, or more --probes", file=sys.stderr)
    return 0


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _solver_gap(flow: Flow, module: TorchFlow) -> float:
    """Largest difference of the module's log_prob to the flow's own accurate one, on a few samples, in nats."""
    context = exported.example_contexts(module)
    with torch.no_grad():
        x = module.sample(16, seed=1) if context is None else module.sample(1, context, seed=1)[:, 0]
        return float((module.log_prob(x, context) - flow.log_prob(x, context)).abs().max())


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pyrnode export`` takes."""
    parser.add_argument("run", help="folder of a run, or a model file")
    embedding_argument(parser)
    parser.add_argument("--to", required=True, choices=["torch.export", "safetensors", "onnx"], help="kind of file")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument(
        "--program",
        choices=["encode", "decode", "sample"],
        help="pass that a program holds: encode gives z, log_det and log_prob of x (default); safetensors holds all",
    )
    parser.add_argument("--solver", help="solver of the PyTorch engine (default RK4, or DP5 with --rtol)")
    parser.add_argument("--step-size", type=float, help="its fixed step, in units of time (default 0.05)")
    parser.add_argument("--rtol", type=float, help="tolerance of adaptive steps (safetensors only)")
    parser.add_argument("--atol", type=float, help="default: --rtol")
    parser.add_argument("--divergence", choices=["auto", "exact", "hutchinson"])
    parser.add_argument("--probes", type=int, help="probes of an estimated divergence (default 1)")
    parser.add_argument("--seed", type=int, help="seed of the probes (default 0)")
    parser.add_argument("--dtype", choices=["float32", "float64"], help="convert to this type first")
    engine_argument(parser)
    device_argument(parser)
    output_arguments(parser)


def verify(args: argparse.Namespace) -> int:
    """Checks an exported file against its digest and, if it is trusted or no program, the outputs that it carries."""
    with progress_bar(None, "verify", unit="", show=talks(args), uncounted=True, delay=SECONDS):
        result = exported.verify(args.file, trust=args.trust)
    print_json(result.to_dict()) if args.json else print(result)
    return 0


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pyrnode verify`` takes."""
    parser.add_argument("file", help="file that `pyrnode export` wrote")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run a program (.pt2, .onnx) and compare its outputs: it can do on this machine whatever you can",
    )
    output_arguments(parser)
