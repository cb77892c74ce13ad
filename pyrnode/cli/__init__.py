"""The command ``pyrnode``: train, evaluate, sample, and what there is to choose from.

Each command is a function of its parsed arguments that returns an exit code, and an entry in `_COMMANDS`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyrnode
from pyrnode import demo, distributed, doctor, engines, julia_install, julia_setup
from pyrnode.cli import export, report, score, train
from pyrnode.cli.output import (
    INTERRUPTED,
    data_dir_argument,
    device_argument,
    engine_argument,
    interrupted,
    json_argument,
    output_arguments,
    print_json,
    print_table,
    talks,
)
from pyrnode.errors import PyrnodeError, unknown_name
from pyrnode.progress import SECONDS, progress_bar
from pyrnode.solvers import USES


def _presets(args: argparse.Namespace) -> int:
    if args.name is not None:
        config = pyrnode.Config.preset(args.name)
        print_json(config.to_dict()) if args.json else print(config.to_toml(), end="")
        return 0
    table = pyrnode.presets()
    if args.json:
        print_json(table)
    else:
        for name, line in table.items():
            print(f"{name:<20}{line}")
    return 0


def _solvers(args: argparse.Namespace) -> int:
    julia = julia_setup.status()
    missing = {} if julia.ready or args.engine == "torch" else {"julia": julia.explanation}
    asked = [args.engine] if args.engine else [name for name in ("torch", "julia") if name not in missing]
    rows: list[dict[str, Any]] = []
    sensitivities: dict[str, dict[str, str]] = {}
    for name in asked:
        engine = engines.create(name)
        keys = ("order", "kind", "package", "description", "use", "fault")
        with progress_bar(None, "solvers", unit="", show=talks(args), uncounted=True, delay=SECONDS):
            found, texts = engine.solvers(), engine.sensitivities()
        rows += [{"name": s.name, "engine": name} | {key: getattr(s, key) for key in keys} for s in found]
        for algorithm, text in texts.items():
            sensitivities.setdefault(algorithm, {})[name] = text
    if args.json:
        print_json({"solvers": rows, "sensitivities": sensitivities, "missing": missing or None})
        return 0
    _print_solvers(rows, sensitivities)
    for why in missing.values():
        print(f"\nthe solvers of Julia are not listed: {why}")
    return 0


def _print_solvers(rows: list[dict[str, Any]], sensitivities: dict[str, dict[str, str]]) -> None:
    """The solvers under what one would take them for, what is wrong last; then the sensitivity algorithms."""
    columns = ("name", "engine", "order", "kind", "package", "description")
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    for use in USES:
        group = [{key: row[key] for key in columns} for row in rows if row["use"] == use]
        groups += [(use, group)] if group else []
    print_table([{**{key: key for key in columns}, "name": "solver"}], groups)
    print()
    algorithms = [
        {"name": algorithm, "engine": engine, "description": text}
        for algorithm, texts in sensitivities.items()
        for engine, text in texts.items()
    ]
    print_table([{"name": "sensitivity", "engine": "engine", "description": "description"}, *algorithms])


def _install_julia(args: argparse.Namespace) -> int:
    julia_install.install(cuda=args.cuda, sysimage=args.sysimage, quiet=args.quiet)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    world, show = distributed.world(), talks(args)
    checks = doctor.diagnose(progress=show) if world.size == 1 else doctor.diagnose_all(world, progress=show)
    if not world.first:
        return 0
    print_json([asdict(check) for check in checks]) if args.json else print(doctor.format_report(checks))
    return 1 if any(check.status == "problem" for check in checks) else 0


def _demo(args: argparse.Namespace) -> int:
    return demo.demo(args.out, device=args.device, progress=not args.quiet)


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
            progress=talks(args),
        )
    except KeyboardInterrupt:
        return interrupted("reproduce", args.experiment, "--scale", args.scale, "--out", args.out)
    if not distributed.present().first:
        return 0
    if args.json:
        print_json([{"name": f.name, "numbers": f.numbers, "claims": [asdict(c) for c in f.claims]} for f in findings])
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

    def options(self, name: str) -> list[str]:
        """Its options' names, as its usage has them."""
        parser = argparse.ArgumentParser(name)
        self.arguments(parser)
        return re.findall(r"--[\w-]+", parser.format_help())


def _presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show this preset in full")
    json_argument(parser)


def _solvers_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=["torch", "julia"], help="only its solvers (for Julia's it is started)")
    output_arguments(parser)


def _install_julia_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cuda", action="store_true", help="also the Julia packages for NVIDIA GPUs")
    parser.add_argument(
        "--no-sysimage",
        dest="sysimage",
        action="store_false",
        help="build no system image, and remove what there is",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, and of Julia's words the result alone")


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="fig1 to fig5, table1, steps, classifier, potential, or all")
    parser.add_argument("--scale", default="cpu", help="cpu: small, for two cores (default); paper: as published; tiny")
    parser.add_argument("--out", default="runs/reproduce", help="folder to write to (default runs/reproduce)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    engine_argument(parser)
    device_argument(parser)
    data_dir_argument(parser)
    output_arguments(parser)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder to write to (default runs/demo)")
    device_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


_COMMANDS: dict[str, _Command] = {
    "train": _Command(
        train.train,
        "train a flow on a data set",
        "pyrnode train digits --out runs/digits --set epochs=20",
        train.train_arguments,
    ),
    "evaluate": _Command(
        train.evaluate,
        "score a trained flow on a test set",
        "pyrnode evaluate runs/digits --set draws=5 --json",
        train.evaluate_arguments,
    ),
    "sample": _Command(
        train.sample,
        "draw samples from a trained flow",
        "pyrnode sample runs/digits -n 100 --out digits.png",
        train.sample_arguments,
    ),
    "export": _Command(
        export.export,
        "write a trained flow to a file that runs without pyrnode",
        "pyrnode export runs/digits --to torch.export --out digits.pt2",
        export.export_arguments,
    ),
    "verify": _Command(
        export.verify,
        "check an exported file against its digest and the outputs that it carries",
        "pyrnode verify digits.pt2 --trust",
        export.verify_arguments,
    ),
    "score": _Command(
        score.score,
        "anomaly scores (log-density, p-value) of the samples of a file",
        "pyrnode score runs/toy new.csv --out scores.csv --calibrate test",
        score.score_arguments,
    ),
    "report": _Command(
        report.report,
        "one page on a run, or on several side by side: curves, scores, samples, settings",
        "pyrnode report runs/digits runs/digits-free --open",
        report.report_arguments,
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
    "doctor": _Command(_doctor, "say what is installed and what to do", "pyrnode doctor", output_arguments),
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


class _Parser(argparse.ArgumentParser):
    """A parser that says which command or option may be meant; what may be abbreviated stays so."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.metavar.lower() if isinstance(action.metavar, str) else "value"
            raise argparse.ArgumentError(action, unknown_name(kind, value, map(str, action.choices)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments; of those that no option takes, an error that names the nearest."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        options = _COMMANDS[args.command].options(args.command)
        asked = next((name for name in rest if name.startswith("-")), rest[0])
        close = difflib.get_close_matches(asked.partition("=")[0], options, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f"; pyrnode {args.command} --help lists what there is"
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pyrnode", description="Densities from regularised neural ODEs (Finlay et al. 2020).")
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
    args = _parse(argv)
    try:
        return _COMMANDS[args.command].run(args)
    except PyrnodeError as error:
        world = distributed.present()
        if world.first or not getattr(error, "everywhere", False):  # what all raise, the first says for all
            here = "" if world.size == 1 else f" (process {world.rank} of {world.size})"
            print(f"pyrnode{here}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pyrnode: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `pyrnode solvers | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
