"""Scores of a file by many who know nothing of one another: each scores its chunks, and the shards are merged.

Noise belongs to the sample, and chunks are the same whoever scores them: the merged scores are those of `score_file`,
to the bit on like machines, however many shards there were. A shard is a file beside the one that is to come, with a
digest, and with what it is a shard of; one that is missing or damaged is named, and done again alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from pyrnode import files
from pyrnode.anomalies import (
    CHUNK,
    Calibration,
    Summary,
    Written,
    as_settings,
    check_targets,
    check_unconditional,
    fingerprint,
    open_for,
    scored,
    scores_or_none,
    write_scores,
)
from pyrnode.config import DataConfig
from pyrnode.data.readers import Part
from pyrnode.errors import CheckpointError, ConfigError
from pyrnode.flow import Flow
from pyrnode.progress import progress_bar
from pyrnode.settings import whole

_KIND = "shard of scores"


def shard_path(out: str | Path, shard: int, shards: int) -> Path:
    """Where a shard of the scores in `out` lies until they are merged."""
    out = Path(out)
    return out.with_name(f"{out.name}.shard-{shard}-of-{shards}.safetensors")


def score_shard(
    flow: Flow,
    data: str | Path,
    out: str | Path,
    shard: int,
    shards: int,
    *,
    chunk: int = CHUNK,
    progress: bool = False,
    **written: Unpack[Written],
) -> Path:
    """Scores every `shards`-th chunk of a file, from the one of number `shard` on.

    What is read of a ``.npy`` file is those chunks alone; the others are read through, but not converted.

    Args:
        flow: The flow, the same for all shards.
        data: File of samples, as in `score_file`.
        out: The file that the scores of all are for.
        shard: Number of the shard, from 0.
        shards: How many there are.
        chunk: Samples in memory at a time; the same for all shards.
        progress: Show a progress bar.
        **written: How a ``.csv`` file is written, as in `score_file`.

    Returns:
        The shard's file, which appears when it is complete.

    Raises:
        ConfigError: There is no such shard, or an argument does not fit.
        DataError: The file cannot be read, or a row does not fit; it is named.
        CheckpointError: The shard cannot be written.
    """
    shards = whole(shards, "shards", 1, "number of shards")
    if not 0 <= whole(shard, "shard", 0, "number of a shard") < shards:
        raise ConfigError(f"shard = {shard} of {shards}: expected 0 to {shards - 1}")
    check_targets(data, out)
    check_unconditional(flow)
    chunks = open_for(flow, data, chunk, as_settings(written), Part(shard, shards))
    rows = chunks.about() if progress else None
    here = None if rows is None else sum(min(chunk, rows - n) for n in range(shard * chunk, rows, shards * chunk))
    digest = hashlib.sha256()
    with progress_bar(here, f"score shard {shard}/{shards}", unit="sample", show=progress) as bar:
        parts = list(scored(flow, _seen(chunks, lambda _: digest), bar, scores_or_none))
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    tensors = {
        "log_prob": torch.cat([none, *(torch.from_numpy(part) for _, part in parts)]),
        "first": torch.tensor([first for first, _ in parts], dtype=torch.int64, device="cpu"),
        "length": torch.tensor([len(part) for _, part in parts], dtype=torch.int64, device="cpu"),
    }
    path = shard_path(out, shard, shards)
    about = {"shard": shard, "shards": shards, "chunk": chunk, "model": fingerprint(flow), **_identity(data)}
    about["samples"] = digest.hexdigest()
    files.write(path, _KIND, tensors, about)
    return path


def _seen(chunks: Iterable[tuple[int, Tensor]], digest_of: Callable[[int], Any]) -> Iterator[tuple[int, Tensor]]:
    """The same chunks, each of which has been added to the digest for its number."""
    for number, (first, values) in enumerate(chunks):
        digest_of(number).update(values.contiguous().numpy().tobytes())
        yield first, values


def _identity(data: str | Path) -> dict[str, Any]:
    """What tells a file of samples from another, or from itself after a change."""
    return {"data": Path(data).name, "bytes": Path(data).stat().st_size}


def merge_shards(
    flow: Flow,
    data: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    progress: bool = False,
    **written: Unpack[Written],
) -> Summary:
    """Writes the scores of all shards to one file, in the order of the samples, as `score_file` does.

    The samples are read once more, to see that they are those which were scored.

    Args:
        flow: The flow that scored them.
        data: The file that they are of.
        out: The file to write, beside which the shards lie; they stay there.
        calibration: Held-out scores: all p-values are taken from them.
        progress: Show a progress bar.
        **written: How a ``.csv`` file is written, as in `score_file`.

    Raises:
        CheckpointError: Shards are missing, damaged, of another flow, file or number of shards: the message names them,
            and says how to do them again.
        ConfigError: `out` is of an unknown kind.
    """
    check_targets(data, out)
    paths = _shards(Path(out))
    wanted = {"shards": len(paths), "model": fingerprint(flow), **_identity(data)}
    shards = [_read_shard(path, number, wanted) for number, path in enumerate(paths)]
    pieces = sorted((piece for shard in shards for piece in shard.pieces), key=lambda piece: piece.first)
    end = 0
    for piece in pieces:
        if piece.first != end:
            raise CheckpointError(
                f"{piece.path} has row {piece.first} where row {end} is next: its shards were scored with chunks of "
                "different sizes; do all again with the same --chunk"
            )
        end += piece.length
    _check_samples(flow, data, shards, as_settings(written), progress=progress)
    with progress_bar(end, "merge", unit="sample", show=progress) as bar:
        return write_scores(_read(pieces, bar), out, calibration)


@dataclass(frozen=True)
class _Piece:
    """A chunk's scores in a shard's file: `length` from `start` on, of the samples from `first` on."""

    path: Path
    first: int
    start: int
    length: int


def _shards(out: Path) -> list[Path]:
    """The files of all shards, in order; `CheckpointError` where there are none, or some are missing."""
    name = re.compile(re.escape(out.name) + r"\.shard-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")
    found = sorted({int(m[2]) for path in out.parent.glob("*.safetensors") if (m := name.fullmatch(path.name))})
    if not found:
        raise CheckpointError(f"there are no shards of {out}: score them first, each with --shard I/N")
    if len(found) > 1:
        raise CheckpointError(
            f"there are shards of {out} by {' and by '.join(map(str, found))}: remove those that are not meant"
        )
    paths = [shard_path(out, number, found[0]) for number in range(found[0])]
    if missing := [f"{number}/{found[0]}" for number, path in enumerate(paths) if not path.is_file()]:
        listed = ", ".join(missing[:20]) + (", …" if len(missing) > 20 else "")
        raise CheckpointError(f"shards of {out} are missing: {listed}; do them again with --shard {missing[0]}")
    return paths


def _check_samples(flow: Flow, data: str | Path, shards: list[_Shard], config: DataConfig, *, progress: bool) -> None:
    """Raises `CheckpointError` where the file has other samples now than a shard scored."""
    digests = [hashlib.sha256() for _ in shards]
    chunks = open_for(flow, data, shards[0].chunk, config)
    with progress_bar(chunks.about(), "look at the samples again", unit="sample", show=progress) as bar:
        for _, values in _seen(chunks, lambda number: digests[number % len(shards)]):
            bar.update(len(values))
    for number, (shard, digest) in enumerate(zip(shards, digests, strict=True)):
        if shard.samples != digest.hexdigest():
            raise CheckpointError(
                f"{shard.path} is of another version of the file: do it again with --shard {number}/{len(shards)}"
            )


@dataclass(frozen=True)
class _Shard:
    """What a shard's file holds: its chunks, how many samples one has, and the digest of them all."""

    path: Path
    pieces: list[_Piece]
    chunk: int
    samples: str


def _read_shard(path: Path, number: int, wanted: dict[str, Any]) -> _Shard:
    """A shard's file, which is checked, whole, against its digest and what it must be of."""
    again = f"do it again with --shard {number}/{wanted['shards']}"
    try:
        tensors, about = files.read(path, _KIND)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {again}") from error
    for key, value in {**wanted, "shard": number}.items():
        if about.get(key) != value:
            what = {"model": "of another model", "data": "of another file", "bytes": "of another version of the file"}
            raise CheckpointError(f"{path} is {what.get(key, 'another shard')}: {again}")
    with files.converted(f"{path} is not a shard of scores; {again}"):
        firsts, lengths = tensors["first"].tolist(), tensors["length"].tolist()
        if tensors["log_prob"].shape != (sum(lengths),) or tensors["log_prob"].dtype != torch.float64:
            raise CheckpointError(f"it has scores of {tuple(tensors['log_prob'].shape)} for {sum(lengths)} samples")
        starts = [0, *np.cumsum(lengths).tolist()]
        pieces = [_Piece(path, *piece) for piece in zip(firsts, starts, lengths, strict=False)]
        return _Shard(path, pieces, whole(about["chunk"], "chunk", 1, "number of samples"), str(about["samples"]))


def _read(pieces: list[_Piece], bar: Any) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The scores, piece by piece; nothing else of them is in memory."""
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="np")).get_slice("log_prob")
            for path in {piece.path for piece in pieces}
        }
        for piece in pieces:
            scores: NDArray[np.float64] = opened[piece.path][piece.start : piece.start + piece.length]
            bar.update(len(scores))
            yield piece.first, scores
