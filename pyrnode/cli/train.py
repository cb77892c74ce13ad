"""The commands ``pyrnode train``, ``evaluate`` and ``sample``: a run, from its first step to its samples."""

from __future__ import annotations

import argparse
import csv
import io
import signal
import threading
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

import pyrnode
from pyrnode import animations, distributed, plotting
from pyrnode.cli.output import (
    INTERRUPTED,
    data_dir_argument,
    device_argument,
    embedding,
    embedding_argument,
    engine_argument,
    interrupted,
    output_arguments,
    print_json,
    talks,
)
from pyrnode.errors import ConfigError
from pyrnode.files import write_atomically
from pyrnode.training.origin import check_unchanged


def settings(pairs: Sequence[str]) -> dict[str, Any]:
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
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--set {key}: {error}") from None
    return table


@contextmanager
def _said_when_ended() -> Iterator[list[int]]:
    """SIGTERM as an interrupt, so that the command can say how to go on; the list has its number if it came."""
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def train(args: argparse.Namespace) -> int:
    """Trains a flow; Ctrl-C and SIGTERM say how to go on."""
    with _said_when_ended() as came:
        code = _train(args)
    return 128 + came[0] if came and code == INTERRUPTED else code


def _train(args: argparse.Namespace) -> int:
    named = {"solver": args.solver, "step_size": args.step_size, "epochs": args.epochs, "data.dir": args.data_dir}
    named |= {"bounds": ranges("--bounds", args.bounds), "period": ranges("--period", args.period)}
    named |= {"minutes": args.minutes, "engine": args.engine, "device": args.device, "seed": args.seed}
    try:
        result = pyrnode.train(
            args.data,
            validation=args.validation,
            preset=args.preset,
            out=args.out,
            resume=args.resume,
            evaluate=not args.no_evaluation,
            progress=talks(args),
            **{key: value for key, value in named.items() if value is not None} | settings(args.set),
        )
        stopped = result.interrupted
    except KeyboardInterrupt:  # outside the loop, or for the second time: the last checkpoint is there
        stopped = True
    if stopped:
        held_out = [] if args.validation is None else ["--validation", args.validation]
        return interrupted("train", args.data, *held_out, "--out", args.out)
    if not distributed.present().first:
        return 0
    if args.json:
        print_json({"out": str(result.out), "report": result.report and result.report.to_dict()})
    else:
        print(result.report if result.report is not None else "trained, not evaluated")
        print(f"written to {result.out}")
    return 0


def _splits(flow: pyrnode.Flow, args: argparse.Namespace) -> Any:
    overrides = {} if args.data_dir is None else {"data.dir": args.data_dir}
    config = flow.config.override({**overrides, **({} if args.data is None else {"data.name": args.data})})
    splits = pyrnode.data.load(args.data, config=config.data)
    if args.data is None:
        check_unchanged(args.run, splits)
    return splits


def evaluate(args: argparse.Namespace) -> int:
    """Scores a trained flow on a test set."""
    flow = pyrnode.load(args.run, engine=args.engine, device=args.device or "cpu")
    if flow.context_dim:
        raise ConfigError(
            f"{args.run} is conditional on {flow.context_dim} features, and the command line takes no contexts to "
            "score with: call pyrnode.evaluate(pyrnode.load(run), x, context=c) in Python"
        )
    changes = {key.removeprefix("evaluation."): value for key, value in settings(args.set).items()}
    config = flow.config.evaluation.override(changes)
    world = distributed.world()
    splits = world.together(lambda: _splits(flow, args), in_turn=True)
    report = pyrnode.evaluate(flow, splits, config=config, progress=talks(args), world=world)
    if not world.first:
        return 0
    print_json(report.to_dict()) if args.json else print(report)
    return 0


def sample(args: argparse.Namespace) -> int:
    """Draws samples into a picture, an array or an animation."""
    out = Path(args.out)
    if out.suffix not in (".png", ".npy", ".csv", *animations.SUFFIXES):
        raise ConfigError(
            f"--out {out}: expected a .png (images), .npy or .csv (tables) file, or a .gif or .mp4 "
            "(an animation, of one or two columns)"
        )
    device = args.device or "cpu"
    flow = pyrnode.load(args.run, engine=args.engine, device=device, embedding=embedding(args))
    if out.suffix == ".png" and (flow.levels is None or len(flow.event_shape) != 3):
        raise ConfigError(f"--out {out}: this flow's samples are not images; name a .npy or .csv file")
    if out.suffix == ".csv" and len(flow.event_shape) != 1:
        raise ConfigError(f"--out {out}: this flow's samples are images; name a .png or .npy file")
    if out.suffix in animations.SUFFIXES:
        animations.check_animation(flow, out)
        if args.temperature != 1:
            raise ConfigError(f"--out {out}: an animation shows the density as it is; leave --temperature out")
    context = None if args.context is None else torch.tensor(args.context, dtype=torch.float64, device="cpu")
    samples = flow.sample(args.n, context, seed=args.seed, temperature=args.temperature, progress=talks(args))
    samples = samples.cpu()
    if flow.levels is not None and out.suffix == ".png":
        plotting.save_image_grid(samples, out, levels=flow.levels)
    elif out.suffix in animations.SUFFIXES:
        animations.animate(flow, samples, out, progress=talks(args))
    elif out.suffix == ".csv":
        write_atomically(out, _csv(samples, flow.features).encode())
    else:
        buffer = io.BytesIO()
        np.save(buffer, samples.numpy())
        write_atomically(out, buffer.getvalue())
    print_json({"out": str(out), "samples": args.n}) if args.json else print(f"{args.n} samples written to {out}")
    return 0


def _csv(samples: torch.Tensor, names: Sequence[str] | None) -> str:
    """Rows of samples with every digit, under the names of the columns, if they have some."""
    text = io.StringIO(newline="")
    numbers = any(name[:1].isdigit() for name in names or ())  # "2000" in quotes is a name
    quoting: Literal[0, 1] = csv.QUOTE_ALL if numbers else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator="\n", quoting=quoting).writerows([names] if names else [])
    lines = csv.writer(text, lineterminator="\n")
    lines.writerows([[repr(number) for number in row] for row in samples.tolist()])
    return text.getvalue()


def ranges(option: str, pairs: Sequence[str]) -> dict[str, Any] | None:
    """Columns with bounds or a period, ``COLUMN=LOW:HIGH`` or ``COLUMN=PERIOD``; an end that is left out is open."""
    table: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.rpartition("=")
        try:
            ends = [float(end) if end.strip() else None for end in text.split(":")]
        except ValueError:
            ends = []
        if not equals or not name or len(ends) not in ((1, 2) if option == "--period" else (2,)):
            expected = "COLUMN=LOW:HIGH" + (
                " or COLUMN=PERIOD" if option == "--period" else ", one of which may be left out"
            )
            raise ConfigError(f"{option} {pair!r}: expected {expected}, such as 'share=0:1'")
        if name in table:
            raise ConfigError(f"{option} {pair!r}: column {name!r} is named twice")
        table[name] = tuple(ends) if len(ends) == 2 else ends[0]
    return table or None


def _step_size(text: str) -> float | str:
    return text if text == "auto" else float(text)


_step_size.__name__ = "step size"  # argparse names it in its message


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pyrnode train`` takes."""
    parser.add_argument("data", help="name of a data set, or path of a .npy, .npz, .csv, .parquet file or image folder")
    parser.add_argument("--validation", metavar="FILE", help="rows to choose the best flow on, in place of a share")
    parser.add_argument("--preset", help="preset name or .toml file (see: pyrnode presets)")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable")
    parser.add_argument(
        "--bounds",
        action="append",
        default=[],
        metavar="COLUMN=LOW:HIGH",
        help="a column's values lie strictly between; leave an end out that is open (income=0:); repeatable",
    )
    parser.add_argument(
        "--period",
        action="append",
        default=[],
        metavar="COLUMN=PERIOD",
        help="a column's values count modulo this (angle=360, or angle=-180:180); repeatable",
    )
    parser.add_argument("--epochs", type=int, help="passes over the training set")
    parser.add_argument("--minutes", type=float, help="train for so long, or until epochs and steps are done")
    parser.add_argument("--solver", help="training solver (see: pyrnode solvers)")
    parser.add_argument("--step-size", type=_step_size, help="its step, or auto")
    engine_argument(parser)
    device_argument(parser)
    parser.add_argument("--seed", type=int)
    data_dir_argument(parser)
    parser.add_argument("--no-evaluation", action="store_true", help="do not score the result on the test set")
    output_arguments(parser)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pyrnode evaluate`` takes."""
    parser.add_argument("run", help="folder of a run, or a model file")
    parser.add_argument("--data", help="data set or file to take the test set of (default: that of the run)")
    data_dir_argument(parser)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="evaluation setting")
    engine_argument(parser)
    device_argument(parser)
    output_arguments(parser)


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pyrnode sample`` takes."""
    parser.add_argument("run", help="folder of a run, or a model file")
    parser.add_argument(
        "--out", required=True, help=".png grid (images), .npy array, .csv table, or .gif or .mp4 animation"
    )
    parser.add_argument("-n", type=int, default=64, help="number of samples (default 64)")
    embedding_argument(parser)
    parser.add_argument("--context", type=float, nargs="+", help="context of a conditional flow, its features in order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="standard deviation of the base (default 1)")
    engine_argument(parser)
    device_argument(parser)
    output_arguments(parser)
