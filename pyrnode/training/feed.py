"""The training samples on their way to the flow: batches that it has admitted, picked on its device where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from pyrnode.composition import Composition
from pyrnode.data import Batch, Samples, TensorSamples
from pyrnode.devices import keeps, upload
from pyrnode.training.step import Order

_CHUNK = 10_000
"""Samples that are admitted at a time when all of them are."""


class Feed:
    """Batches of the training samples as the passage takes them: checked, on the flow's device, with their contexts.

    Samples in memory that fit into an eighth of a device's are taken there once, and batches are picked there: a step
    then sends nothing. Others are checked and sent batch by batch.

    Args:
        flow: The flow, on its device.
        samples: The training samples.
        order: Which of them each step takes.
        workers: Loader processes, where the samples are not in memory.
    """

    def __init__(self, flow: Composition, samples: Samples, order: Order, *, workers: int = 0) -> None:
        self._flow, self._samples, self._order, self._workers = flow, samples, order, workers

    def batches(self, first: int) -> Iterator[Batch]:
        """The batches from the step `first` on, without an end.

        Raises:
            DataError: A sample does not fit the flow, or cannot be read.
        """
        if self._kept is not None:
            return self._picked(self._kept, first)
        return map(self._admitted, self._order.batches(self._samples, first, workers=self._workers))

    def _admitted(self, batch: Batch) -> Batch:
        x, context = self._flow.admit(batch.x, batch.context)
        like = self._flow.reference
        weight = None if batch.weight is None else upload(batch.weight.to(like.dtype), like.device)
        return Batch(x, cast(Tensor | None, context), weight, self._order.share)

    @cached_property
    def _kept(self) -> Batch | None:
        """All samples on the flow's device; `None` where they are not kept there."""
        samples, device = self._samples, self._flow.reference.device
        if not isinstance(samples, TensorSamples):
            return None
        given = (samples.tensor(), samples.context, samples.weight)
        if not keeps(device, sum(x.numel() * 8 if x.is_floating_point() else x.nbytes for x in given if x is not None)):
            return None
        every = torch.arange(len(samples), device="cpu")
        parts = [self._admitted(batch) for batch in samples.batches(every, _CHUNK)]
        return Batch(
            torch.cat([part.x for part in parts]),
            _joined([part.context for part in parts]),
            _joined([part.weight for part in parts]),
        )

    def _picked(self, kept: Batch, first: int) -> Iterator[Batch]:
        for rows in self._order.epochs(first):
            for chosen in upload(rows.long(), kept.x.device).split(self._order.here):
                context = None if kept.context is None else kept.context[chosen]
                weight = None if kept.weight is None else kept.weight[chosen]
                yield Batch(kept.x[chosen], context, weight, self._order.share)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Parts of all samples as one; `None` where there are none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
