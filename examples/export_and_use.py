"""A density trained here and used where pyrnode is not: as a module, as a program, and among torch.distributions.

    python examples/export_and_use.py [--quick] [--out DIR]

Trains a flow on a 2-D density, exports it to a `torch.export` program, and runs the program in a process that cannot
import pyrnode. Prints how far its log-densities are from the flow's own, and the flow's divergence from a Gaussian.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

import pyrnode
from pyrnode import export
from pyrnode.distribution import kl_divergence

ELSEWHERE = """
import sys
sys.modules["pyrnode"] = None  # importing it fails, as where it is not installed
import torch
x = torch.load(sys.argv[2], weights_only=True)
z, log_det, log_prob = torch.export.load(sys.argv[1]).module()(x)
torch.save(log_prob.detach(), sys.argv[3])
"""


def main() -> dict[str, float]:
    """Trains, exports and uses; returns the largest differences of log_prob to the flow's, in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=Path("runs/export"), help="folder of the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    overrides = {"max_steps": 60, "data.samples": 1000} if args.quick else {"max_steps": 1000}
    flow = pyrnode.train("moons", progress=False, **overrides).flow
    x = flow.sample(200, seed=0)
    accurate = flow.log_prob(x).detach()

    module = flow.to_torch({"name": "RK4", "step_size": 0.1})  # plain PyTorch, its own copy of the parameters
    program, samples, scores = args.out / "encode.pt2", args.out / "x.pt", args.out / "log_prob.pt"
    print(export.save(module, program))
    torch.save(x, samples)
    subprocess.run([sys.executable, "-c", ELSEWHERE, program, samples, scores], check=True)
    results = {"module": module.log_prob(x).detach(), "program": torch.load(scores, weights_only=True)}
    differences = {name: float((value - accurate).abs().max()) for name, value in results.items()}
    for name, value in differences.items():
        print(f"{name:<8} log_prob at most {value:.1e} nats from the flow's accurate solver")

    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    divergence, error = kl_divergence(flow.distribution(), gaussian, samples=1000)
    print(f"KL(flow, Gaussian of the same moments) = {divergence:.3f} ± {error:.3f} nats")
    return differences


if __name__ == "__main__":
    main()
