"""What the commands share: how they print, the exit code of Ctrl-C, and arguments that mean the same everywhere."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from pyrnode import distributed
from pyrnode.files import to_json

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def interrupted(*command: str) -> int:
    """Says with which command to go on, if this is the process that says things; gives the exit code."""
    if distributed.present().first:
        print(f"interrupted; go on with: {shlex.join(('pyrnode', *command, '--resume'))}", file=sys.stderr)
    return INTERRUPTED


def talks(args: argparse.Namespace) -> bool:
    """Whether a command says more than its result: progress and remarks, on standard error."""
    return not (args.quiet or args.json)


def print_json(value: Any) -> None:
    """A value as a program reads it; numbers that are not finite are ``null``, as JSON knows none."""
    print(to_json(value, indent=2))


def print_table(rows: list[dict[str, Any]], groups: Sequence[tuple[str, list[dict[str, Any]]]] = ()) -> None:
    """Rows with the same keys, in columns as wide as they must be; `None` is left empty.

    Args:
        rows: The rows.
        groups: Further rows, each group of them under a line of its own.
    """
    parts = [("", rows), *groups]
    cells = [[["" if v is None else str(v) for v in row.values()] for row in part] for _, part in parts]
    widths = [max(map(len, column)) for column in zip(*[row for part in cells for row in part], strict=True)]
    for (heading, _), part in zip(parts, cells, strict=True):
        if heading:
            print(f"\n{heading}")
        for row in part:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def json_argument(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--quiet``."""
    json_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def engine_argument(parser: argparse.ArgumentParser) -> None:
    """``--engine``."""
    parser.add_argument("--engine", choices=["auto", "torch", "julia"])


def embedding_argument(parser: argparse.ArgumentParser) -> None:
    """``--embedding``, of which `embedding` reads what is meant."""
    parser.add_argument(
        "--embedding",
        metavar="MODULE:FUNCTION",
        help="what made the flow's embedding: it is imported, from the working folder too, and called",
    )


def embedding(args: argparse.Namespace) -> str | None:
    """The function that ``--embedding`` names, with the working folder among the places where modules are."""
    if args.embedding is not None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    name: str | None = args.embedding
    return name


def device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", help="torch device to compute on, or auto: CUDA where there is one")


def data_dir_argument(parser: argparse.ArgumentParser) -> None:
    """``--data-dir``."""
    parser.add_argument("--data-dir", help="folder of downloaded data sets (default: $PYRNODE_DATA)")
