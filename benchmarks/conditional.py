"""Speed of use of a posterior for many observations beside sbi's NSF, in one process, on one thread.

    python -m benchmarks.conditional
    python -m benchmarks.conditional --tasks linear --repeats 9 --json out.json

Both sides are trained inside sbi, on the same 2,000 simulations, for the same processor time. Then they take turns:

* ``sample``: 100 draws for each of 200 observations, ``estimator.sample((100,), x)``;
* ``log_prob``: their log-densities, ``(100, 200, d)`` with ``(200, m)``, as sbi passes them;
* ``grid``: the log-densities of 100 parameters for each of 200 observations, ``(100, 1, d)`` with ``(200, m)``;
* ``posterior``: 100 draws by sbi's ``posterior.sample_batched``, which rejects what is outside of the prior.

A time is the processor's, the median over the repeats, and the ratio is the median over the pairs of neighbours.
README.md says what the numbers mean. Needs sbi (pip install sbi).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import records
from benchmarks.inference import TASKS, Task, Trained, trained

OBSERVATIONS, DRAWS, SIMULATIONS = 200, 100, 2000


def operations(task: Task, found: Trained) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.manual_seed(1)
    theta = task.prior.sample((OBSERVATIONS,))
    x, grid = task.simulate(theta), task.prior.sample((DRAWS, 1))
    posterior = found.posterior
    estimator = posterior.posterior_estimator
    with torch.no_grad():
        drawn = estimator.sample(torch.Size([DRAWS]), x)
    return {
        "sample": lambda: estimator.sample(torch.Size([DRAWS]), x),
        "log_prob": lambda: estimator.log_prob(drawn, x),
        "grid": lambda: estimator.log_prob(grid, x),
        "posterior": lambda: posterior.sample_batched((DRAWS,), x=x, show_progress_bars=False),
    }


def compared(sides: dict[str, dict[str, Callable[[], object]]], repeats: int) -> list[dict[str, Any]]:
    """Seconds of each operation by side, and the ratio of pyrnode's to NSF's."""
    rows = []
    for name in next(iter(sides.values())):
        times: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(repeats + 1):  # the first one does not count
            for side, timed in sides.items():
                begun = time.process_time()
                with torch.no_grad():
                    timed[name]()
                if repeat:
                    times[side].append(time.process_time() - begun)
        ratios = sorted(ours / theirs for ours, theirs in zip(times["pyrnode"], times["nsf"], strict=True))
        row = {side: statistics.median(values) for side, values in times.items()}
        rows.append(
            {"operation": name, **row, "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        )
    return rows


NAMES = {"two-moons": "two moons", "linear": "linear Gaussian, 5-D", "slcp": "SLCP"}
OPERATIONS = {
    "sample": f"`sample`, {OBSERVATIONS} × {DRAWS}",
    "log_prob": "`log_prob` of them",
    "grid": f"grid of {DRAWS} parameters × {OBSERVATIONS} observations",
    "posterior": "`posterior.sample_batched`",
}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as README.md has them."""
    rows = []
    for r in results:
        task = NAMES.get(r["task"], r["task"]) if r["operation"] == "sample" else ""
        ratio = f"{r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f})"
        rows.append([task, OPERATIONS[r["operation"]], f"{r['pyrnode']:.2f}", f"{r['nsf']:.2f}", ratio])
    return records.markdown(["task", "operation", "pyrnode, s", "NSF, s", "ratio (min–max)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["two-moons", "linear"], choices=TASKS)
    parser.add_argument("--seconds", type=float, default=30.0, help="processor time of a training")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours", default="{}", metavar="JSON", help="settings of `rnode`")
    records.json_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = list[dict[str, Any]]()
    for name in args.tasks:
        task, sides = TASKS[name](), dict[str, dict[str, Callable[[], object]]]()
        with tempfile.TemporaryDirectory() as logs, contextlib.chdir(logs), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                for side in ("nsf", "pyrnode"):
                    settings = json.loads(args.ours) if side == "pyrnode" else {}
                    sides[side] = operations(task, trained(task, side, SIMULATIONS, 0, args.seconds, settings))
                rows = compared(sides, args.repeats)
        for row in rows:
            results.append({"task": name, **row})
            times = f"{row['pyrnode']:.2f} s beside {row['nsf']:.2f} s, {row['ratio']:.2f} times"
            print(f"{name}, {row['operation']}: {times}", flush=True)
    print(f"\n{table(results)}")
    records.leave(args.json, results)


if __name__ == "__main__":
    main()
