"""The command ``pyrnode report``."""

from __future__ import annotations

import argparse

import pyrnode
from pyrnode.cli.output import output_arguments, print_json, talks
from pyrnode.errors import ConfigError
from pyrnode.pages import live


def report(args: argparse.Namespace) -> int:
    """Writes the page on runs, or serves it while they go on."""
    if args.live:
        if args.out is not None or args.json:
            raise ConfigError("--live serves the page and writes none: leave out --out and --json")
        live.serve(args.runs, port=args.port, open=args.open, say=lambda text: print(text, flush=True))
        return 0
    if args.port:
        raise ConfigError("--port is for --live, which serves the page: add that, or leave out the port")
    path = pyrnode.report(*args.runs, out=args.out, open=args.open, progress=talks(args))
    print_json({"out": str(path)}) if args.json else print(f"written to {path}")
    return 0


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pyrnode report`` takes."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder of such folders")
    parser.add_argument(
        "--out", help=".html file to write (default: report.html in the run's folder; of several: here)"
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument(
        "--live", action="store_true", help="follow runs that are going on, until Ctrl-C; writes nothing"
    )
    parser.add_argument("--port", type=int, default=0, help="port of --live on this machine (default: a free one)")
    output_arguments(parser)
