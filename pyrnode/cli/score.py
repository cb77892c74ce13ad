"""The command ``pyrnode score``."""

from __future__ import annotations

import argparse
from typing import Any

import pyrnode
from pyrnode import distributed
from pyrnode.anomalies import CHUNK, Calibration, calibrate, calibration_path, check_unconditional, score_file
from pyrnode.cli.output import device_argument, engine_argument, output_arguments, print_json, talks
from pyrnode.errors import ConfigError, DataError
from pyrnode.flow import Flow
from pyrnode.shards import merge_shards, score_shard
from pyrnode.training.origin import check_unchanged


def _calibration(flow: Flow, args: argparse.Namespace) -> Calibration | None:
    """The stored calibration, or a new one, which is stored."""
    path = calibration_path(args.run)
    if args.scores_only:
        return None
    if args.calibrate is None:
        if not path.is_file():
            raise DataError(
                f"{args.run} has no calibration: name a file of held-out samples with --calibrate (or --calibrate "
                "test, for the run's own test set), or pass --scores-only"
            )
        return Calibration.load(path, flow)
    held_out = args.calibrate
    if held_out == "test":
        splits = pyrnode.data.load(None, config=flow.config.data)
        check_unchanged(args.run, splits)
        held_out = splits.ordered(flow.features, None).test
    calibration = calibrate(flow, held_out, chunk=args.chunk, progress=talks(args), **_dialect(args))
    calibration.save(path, flow)
    return calibration


def _dialect(args: argparse.Namespace) -> dict[str, Any]:
    """How a file's fields are separated and its numbers written."""
    return {"sep": args.sep, "decimal": args.decimal, "header": {"yes": True, "no": False}.get(args.header, "auto")}


def score(args: argparse.Namespace) -> int:
    """Writes the anomaly scores of a file's samples, or of a shard of them; or merges those of all shards."""
    flow = pyrnode.load(args.run, engine=args.engine, device=args.device or "cpu")
    check_unconditional(flow)
    number, of = distributed.shard() if args.shard is None and not args.merge else args.shard or (0, 1)
    settings = {"chunk": args.chunk, "progress": talks(args), **_dialect(args)}
    if of > 1 or args.shard is not None:
        return _score_shard(flow, args, number, of, settings)
    calibration = _calibration(flow, args)
    if args.merge:
        del settings["chunk"]  # it is that of the shards
        summary = merge_shards(flow, args.data, args.out, calibration=calibration, **settings)
    else:
        summary = score_file(flow, args.data, args.out, calibration=calibration, **settings)
    if args.json:
        below = {str(level): count for level, count in summary.below.items()}
        print_json({"out": args.out, **vars(summary), "below": below})
    else:
        print(f"{summary}\nwritten to {args.out}")
    return 0


def _score_shard(flow: Flow, args: argparse.Namespace, number: int, of: int, settings: dict[str, Any]) -> int:
    if args.calibrate is not None:
        raise ConfigError(f"--calibrate with shard {number}/{of}: shards have no p-values; pass it with --merge")
    path = score_shard(flow, args.data, args.out, number, of, **settings)
    if args.json:
        print_json({"shard": number, "shards": of, "written": str(path)})
    else:
        print(f"shard {number}/{of} written to {path}; when all are there, the same command with --merge joins them")
    return 0


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N, a number from 0 and how many there are, like 0/8")
    return int(number), int(of)


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pyrnode score`` takes."""
    parser.add_argument("run", help="folder of a run, or a model file")
    parser.add_argument("data", help=".npy, .csv, .tsv or .parquet file of samples; need not fit in memory")
    parser.add_argument("--out", required=True, help=".csv, .json or .parquet file to write")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--calibrate",
        metavar="HELD_OUT",
        help="file of held-out samples to take p-values from, or test: the run's own test set; stored with the run",
    )
    source.add_argument("--scores-only", action="store_true", help="log-densities without p-values")
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"samples in memory at a time (default {CHUNK})")
    parser.add_argument("--sep", default="auto", help="what separates the fields of a .csv file (default: recognised)")
    parser.add_argument("--decimal", default="auto", help="its decimal mark (default: recognised)")
    parser.add_argument("--header", choices=["auto", "yes", "no"], default="auto", help="whether it begins with names")
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument(
        "--shard",
        metavar="I/N",
        type=_shard,
        help="score every N-th chunk from the I-th on, counted from 0 (default: RANK/WORLD_SIZE, where those are set)",
    )
    shards.add_argument("--merge", action="store_true", help="join the scores of all shards, with p-values")
    engine_argument(parser)
    device_argument(parser)
    output_arguments(parser)
