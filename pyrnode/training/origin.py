"""What a run began with: the settings that stay, and the data; a checkpoint is resumed with no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrnode import files
from pyrnode.config import Config
from pyrnode.data import Samples, Splits, TensorSamples
from pyrnode.errors import CheckpointError, DataError
from pyrnode.runs import differences, lasting

_LOOKED_AT = 32  # items of a data set that is read when it is asked for


@dataclass(frozen=True)
class Origin:
    """What a run began with.

    Attributes:
        settings: The settings that a resumed run may not change, by name.
        samples: Number of training samples.
        context_dim: Number of features of the context; 0 without one.
        data: Digest of the samples that training and validation see, with contexts and weights.
        test: Digest of those that are held out for the end.
    """

    settings: Mapping[str, Any]
    samples: int
    context_dim: int
    data: str
    test: str

    @classmethod
    def of(cls, config: Config, splits: Splits) -> Origin:
        """Of a run that begins, or is to go on, with these settings and data."""
        settings = json.loads(json.dumps(lasting(config)))
        data = _digest(splits.train, splits.validation)
        return cls(settings, len(splits.train), splits.context_dim, data, _digest(splits.test))

    def check(self, stored: Origin) -> None:
        """Raises `CheckpointError` where a checkpoint's origin is not this one; the message says what differs."""
        if self.context_dim != stored.context_dim:
            raise CheckpointError(
                f"its context has {stored.context_dim} features, the one given {self.context_dim}: pass that which it "
                "was begun with, or take another folder (out)"
            )
        if changed := differences(stored.settings, self.settings):
            raise CheckpointError(f"it was begun with other settings ({'; '.join(changed)}); use another folder (out)")
        if self.samples != stored.samples:
            raise CheckpointError(
                f"it was trained on {stored.samples} samples, not {self.samples}: pass the data, and the validation "
                "samples if there were some, that it was begun with"
            )
        if self.data != stored.data:
            raise CheckpointError(
                f"it was trained on other data: as many samples, {self.samples}, but other values, there or in those "
                "that it validates on; pass those that it was begun with, or take another folder (out)"
            )


def check_unchanged(run: str | Path, splits: Splits) -> None:
    """Raises `DataError` where the test set of a run is no longer that which it held out: it may be trained on.

    Args:
        run: Folder of a run; of a model file, or a folder without a checkpoint, nothing is known.
        splits: Its data, loaded anew.
    """
    path = Path(run) / "checkpoint.safetensors"
    if not path.is_file():
        return
    if files.read(path, "checkpoint")[1].get("test") != _digest(splits.test):
        raise DataError(
            f"{splits.name} is no longer what {run} was trained on: rows that are held out now may have been trained "
            "on then; name a file of held-out samples"
        )


def _digest(*parts: Samples) -> str:
    digest = hashlib.sha256()
    for samples in parts:
        for tensor in (*_values(samples), samples.context, samples.weight):
            digest.update(b"-" if tensor is None else f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _values(samples: Samples) -> list[Tensor]:
    """What tells one set of samples from another: all that is in memory, or some items of what is read on demand.

    Items that differ when they are read again (random transforms) say nothing; nor do the draws of reading them count.
    """
    if isinstance(samples, TensorSamples):
        return [samples.tensor()]
    rows = torch.linspace(0, len(samples) - 1, min(_LOOKED_AT, len(samples)), dtype=torch.float64, device="cpu").long()
    with torch.random.fork_rng(devices=[]):
        first, again = (torch.cat([batch.x for batch in samples.batches(rows, 1)]) for _ in range(2))
    return [first if torch.equal(first, again) else first.new_zeros(0)]
