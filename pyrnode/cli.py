"""The command ``pyrnode``: train, evaluate, sample, and what there is to choose from.

Each command is a function of its parsed arguments that returns an exit code, and an entry in `_COMMANDS`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyrnode
from pyrnode.errors import ConfigError, PyrnodeError
from pyrnode.export import cli as export_cli
from pyrnode.scores import score_arguments, score_command

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` pairs; values as in TOML, bare words as text, ``none`` for no value."""
    table: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r}: expected key=value")
        try:
            table[key] = None if text == "none" else tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            table[key] = text
    return table


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _train(args: argparse.Namespace) -> int:
    overrides = _settings(args.set)
    if args.data_dir is not None:
        overrides["data.dir"] = args.data_dir
    try:
        result = pyrnode.train(
            args.data,
            preset=args.preset,
            solver=args.solver,
            step_size=args.step_size,
            epochs=args.epochs,
            engine=args.engine,
            device=args.device,
            seed=args.seed,
            out=args.out,
            resume=args.resume,
            overrides=overrides,
            evaluate=not args.no_evaluation,
            progress=not args.quiet,
        )
        interrupted = result.interrupted
    except KeyboardInterrupt:  # outside the loop, or for the second time: the last checkpoint is there
        interrupted = True
    if interrupted:
        again = shlex.join(["pyrnode", "train", args.data, "--out", args.out, "--resume"])
        print(f"interrupted; go on with: {again}", file=sys.stderr)
        return INTERRUPTED
    if args.json:
        _print_json({"out": str(result.out), "report": result.report and result.report.to_dict()})
    else:
        print(result.report if result.report is not None else "trained, not evaluated")
        print(f"written to {result.out}")
    return 0


def _splits(flow: pyrnode.Flow, args: argparse.Namespace) -> Any:
    overrides = {} if args.data_dir is None else {"data.dir": args.data_dir}
    config = flow.config.override({**overrides, **({} if args.data is None else {"data.name": args.data})})
    return pyrnode.data.load(args.data, config=config.data)


def _evaluate(args: argparse.Namespace) -> int:
    flow = pyrnode.load(args.run, engine=args.engine)
    if flow.context_dim:
        raise ConfigError(
            f"{args.run} is conditional on {flow.context_dim} features, and the command line takes no contexts to "
            "score with: call pyrnode.evaluate(pyrnode.load(run), x, context=c) in Python"
        )
    settings = {f"evaluation.{key.removeprefix('evaluation.')}": v for key, v in _settings(args.set).items()}
    config = flow.config.override(settings).evaluation
    report = pyrnode.evaluate(flow, _splits(flow, args), config=config, progress=not args.quiet)
    _print_json(report.to_dict()) if args.json else print(report)
    return 0


def _sample(args: argparse.Namespace) -> int:
    import io

    import numpy as np
    import torch

    from pyrnode import plotting
    from pyrnode.checkpoint import write_atomically

    out = Path(args.out)
    if out.suffix not in (".png", ".npy"):
        raise ConfigError(f"--out {out}: expected a .png (images) or .npy file")
    flow = pyrnode.load(args.run, engine=args.engine)
    if out.suffix == ".png" and (flow.levels is None or len(flow.event_shape) != 3):
        raise ConfigError(f"--out {out}: this flow's samples are not images; name a .npy file")
    context = None if args.context is None else torch.tensor(args.context)
    samples = flow.sample(args.n, context, seed=args.seed, temperature=args.temperature)
    if flow.levels is not None and out.suffix == ".png":
        plotting.save_image_grid(samples, out, levels=flow.levels)
    else:
        buffer = io.BytesIO()
        np.save(buffer, samples.numpy())
        write_atomically(out, buffer.getvalue())
    print(f"{args.n} samples written to {out}")
    return 0


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys, in columns as wide as they must be; `None` is left empty."""
    cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _presets(args: argparse.Namespace) -> int:
    if args.name is not None:
        config = pyrnode.Config.preset(args.name)
        _print_json(config.to_dict()) if args.json else print(config.to_toml(), end="")
        return 0
    table = pyrnode.presets()
    if args.json:
        _print_json(table)
    else:
        for name, line in table.items():
            print(f"{name:<20}{line}")
    return 0


def _torch_solvers() -> list[dict[str, Any]]:
    from pyrnode.engines import TorchEngine

    return [{"name": row.name, "engine": "torch"} | asdict(row) for row in TorchEngine().solvers()]


def _julia_solvers() -> list[dict[str, Any]]:
    """Asks Julia itself, which starts it."""
    print("starting Julia to ask it, which takes about 15 s", file=sys.stderr)
    from pyrnode.engines.julia import JuliaEngine

    return [{"name": row.name, "engine": "julia"} | asdict(row) for row in JuliaEngine().solvers()]


def _solvers(args: argparse.Namespace) -> int:
    from pyrnode import julia_setup
    from pyrnode.solvers import SENSITIVITIES

    rows = [] if args.engine == "julia" else _torch_solvers()
    julia = julia_setup.require() if args.engine == "julia" else julia_setup.status()
    missing = None if julia.ready or args.engine == "torch" else julia.explanation
    if julia.ready and args.engine != "torch":
        rows += _julia_solvers()
    if args.json:
        _print_json({"solvers": rows, "sensitivities": SENSITIVITIES, "missing": missing and {"julia": missing}})
        return 0
    _print_table([{**{key: key for key in rows[0]}, "name": "solver"}, *rows])
    print("\nsensitivity algorithms")
    for name, text in SENSITIVITIES.items():
        print(f"{name:<20}{text}")
    if missing:
        print(f"\nthe solvers of Julia are not listed: {missing}")
    return 0


def _install_julia(args: argparse.Namespace) -> int:
    from pyrnode.julia_install import install

    install(cuda=args.cuda)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from pyrnode.doctor import diagnose, format_report

    checks = diagnose()
    _print_json([asdict(check) for check in checks]) if args.json else print(format_report(checks))
    return 1 if any(check.status == "problem" for check in checks) else 0


def _demo(args: argparse.Namespace) -> int:
    from pyrnode.demo import demo

    return demo(args.out, progress=not args.quiet)


def _reproduce(args: argparse.Namespace) -> int:
    try:
        findings = pyrnode.reproduce(
            args.experiment,
            scale=args.scale,
            out=args.out,
            resume=args.resume,
            engine=args.engine,
            device=args.device,
            data_dir=args.data_dir,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        command = ["pyrnode", "reproduce", args.experiment, "--scale", args.scale, "--out", args.out, "--resume"]
        print(f"interrupted; go on with: {shlex.join(command)}", file=sys.stderr)
        return INTERRUPTED
    if args.json:
        _print_json([{"name": f.name, "numbers": f.numbers, "claims": [asdict(c) for c in f.claims]} for f in findings])
        return 0
    for finding in findings:
        print(finding, end="\n\n")
    report = Path(args.out) / ("" if args.experiment == "all" else args.experiment) / "report.html"
    print(f"{'nothing was left to do; ' if not findings else ''}report in {report}")
    return 0


@dataclass(frozen=True)
class _Command:
    run: Callable[[argparse.Namespace], int]
    help: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]


def _step_size(text: str) -> float | str:
    return text if text == "auto" else float(text)


_step_size.__name__ = "step size"  # argparse names it in its message


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="name of a data set, or path of a .npy, .npz, .csv, .parquet file or image folder")
    parser.add_argument("--preset", help="preset name or .toml file (see: pyrnode presets)")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable")
    parser.add_argument("--epochs", type=int, help="passes over the training set")
    parser.add_argument("--solver", help="training solver (see: pyrnode solvers)")
    parser.add_argument("--step-size", type=_step_size, help="its step, or auto")
    parser.add_argument("--engine", choices=["auto", "torch", "julia"])
    parser.add_argument("--device", help="torch device, or auto")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--data-dir", help="folder of downloaded data sets (default: $PYRNODE_DATA)")
    parser.add_argument("--no-evaluation", action="store_true", help="do not score the result on the test set")
    _output_arguments(parser)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a run, or a model file")
    parser.add_argument("--data", help="data set or file to take the test set of (default: that of the run)")
    parser.add_argument("--data-dir", help="folder of downloaded data sets (default: $PYRNODE_DATA)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="evaluation setting")
    parser.add_argument("--engine", choices=["auto", "torch", "julia"])
    _output_arguments(parser)


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a run, or a model file")
    parser.add_argument("--out", required=True, help=".png grid (images) or .npy array")
    parser.add_argument("-n", type=int, default=64, help="number of samples (default 64)")
    parser.add_argument("--context", type=float, nargs="+", help="context of a conditional flow, its features in order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="standard deviation of the base (default 1)")
    parser.add_argument("--engine", choices=["auto", "torch", "julia"])


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show this preset in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _solvers_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", choices=["torch", "julia"], help="only its solvers (Julia's: about 15 s to start it)"
    )
    _json_argument(parser)


def _install_julia_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cuda", action="store_true", help="also the Julia packages for NVIDIA GPUs")


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="fig1 to fig5, table1, steps, classifier, or all")
    parser.add_argument("--scale", default="cpu", help="cpu: small, for two cores (default); paper: as published; tiny")
    parser.add_argument("--out", default="runs/reproduce", help="folder to write to (default runs/reproduce)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--engine", choices=["auto", "torch", "julia"])
    parser.add_argument("--device", help="torch device, or auto")
    parser.add_argument("--data-dir", help="folder of downloaded data sets (default: $PYRNODE_DATA)")
    _output_arguments(parser)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder to write to (default runs/demo)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


_COMMANDS: dict[str, _Command] = {
    "train": _Command(
        _train,
        "train a flow on a data set",
        "pyrnode train digits --out runs/digits --set epochs=20",
        _train_arguments,
    ),
    "evaluate": _Command(
        _evaluate,
        "score a trained flow on a test set",
        "pyrnode evaluate runs/digits --set draws=5 --json",
        _evaluate_arguments,
    ),
    "sample": _Command(
        _sample,
        "draw samples from a trained flow",
        "pyrnode sample runs/digits -n 100 --out digits.png",
        _sample_arguments,
    ),
    "export": _Command(
        export_cli.export,
        "write a trained flow to a file that runs without pyrnode",
        "pyrnode export runs/digits --to torch.export --out digits.pt2",
        export_cli.export_arguments,
    ),
    "verify": _Command(
        export_cli.verify,
        "check an exported file against the outputs that it carries",
        "pyrnode verify digits.pt2",
        export_cli.verify_arguments,
    ),
    "score": _Command(
        score_command,
        "anomaly scores (log-density, p-value) of the samples of a file",
        "pyrnode score runs/toy new.csv --out scores.csv --calibrate test",
        score_arguments,
    ),
    "presets": _Command(_presets, "list the presets, or show one", "pyrnode presets toy", _presets_arguments),
    "solvers": _Command(
        _solvers, "list solvers and sensitivity algorithms", "pyrnode solvers --engine torch", _solvers_arguments
    ),
    "install-julia": _Command(
        _install_julia,
        "install Julia and the packages of its engine, and test it",
        "pyrnode install-julia --cuda",
        _install_julia_arguments,
    ),
    "doctor": _Command(_doctor, "say what is installed and what to do", "pyrnode doctor", _json_argument),
    "reproduce": _Command(
        _reproduce,
        "repeat a figure, the table or a claim of the paper",
        "pyrnode reproduce fig2 --scale cpu --out runs/reproduce",
        _reproduce_arguments,
    ),
    "demo": _Command(
        _demo, "train on digits and on a 2-D density, and compare", "pyrnode demo --out runs/demo", _demo_arguments
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyrnode", description="Densities from regularised neural ODEs (Finlay et al. 2020)."
    )
    parser.add_argument("--version", action="version", version=f"pyrnode {pyrnode.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help, epilog=f"example: {command.example}"
        )
        command.arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (1: an error of ours, 2: wrong usage, 130: interrupted)."""
    args = _parser().parse_args(argv)
    try:
        return _COMMANDS[args.command].run(args)
    except PyrnodeError as error:
        print(f"pyrnode: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pyrnode: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `pyrnode solvers | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
