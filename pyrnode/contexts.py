"""The contexts of a batch in which samples share them: each is conditioned and embedded once, and copied for nobody.

Of a flow with an embedding a context has any shape, ``(*shape)``; of all others it is a vector, ``(m,)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, TypeVar, cast

import torch
from torch import Tensor

from pyrnode.errors import DataError


@dataclass(frozen=True)
class Contexts:
    """Some contexts, and which of them each sample has.

    Attributes:
        values: The contexts, ``(b, m)``, or ``(b, *shape)`` before they are embedded.
        rows: The row of each sample's, ``(batch,)``.
    """

    values: Tensor
    rows: Tensor

    @classmethod
    def of(cls, context: Tensor, lead: tuple[int, ...], shape: tuple[int, ...]) -> Self:
        """Contexts ``(..., *shape)``, broadcast with samples of the shape ``(*lead, ...)``, which are flattened."""
        batch, values = context.shape[: context.ndim - len(shape)], context.reshape(-1, *shape)
        rows = torch.arange(len(values), device=values.device).reshape(batch)
        return cls(values, rows.expand(lead).reshape(-1))

    @classmethod
    def repeated(cls, context: Tensor, times: int, shape: tuple[int, ...]) -> Self:
        """Contexts ``(*shape)`` or ``(b, *shape)``, each for so many samples that follow one another."""
        values = context.reshape(-1, *shape)
        return cls(values, torch.arange(len(values), device=values.device).repeat_interleave(times))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, samples: slice) -> Contexts:
        """Those of consecutive samples; the contexts that none of them has are left out."""
        used, rows = self.rows[samples].unique(return_inverse=True)
        return Contexts(self.values[used], rows)

    def repeat(self, times: int, *_features: int) -> Contexts:
        """As `Tensor.repeat`: those of the batch, and again."""
        return Contexts(self.values, self.rows.repeat(times))

    def double(self) -> Contexts:
        """As `Tensor.double`."""
        return Contexts(self.values.double(), self.rows)

    def whole(self) -> Tensor:
        """One for each sample, ``(batch, m)`` or ``(batch, *shape)``."""
        return self.values[self.rows]


def check_context(context: Tensor | None, shape: tuple[int, ...], batch: int | None) -> None:
    """Checks the context that a flow is given.

    Args:
        context: ``(batch, *shape)`` or ``(*shape)``; `None` for an unconditional flow.
        shape: Shape of one context (`Composition.context_shape`).
        batch: Number of samples; `None` for any.

    Raises:
        DataError: It is missing, superfluous, no tensor, or of the wrong shape.
    """
    if shape == (0,):
        if context is not None:
            raise DataError("this flow is unconditional (it was trained without a context): leave the context out")
        return
    each = ", ".join(map(str, shape))
    wanted = f"{shape} for one that all samples share, or ({'n' if batch is None else batch}, {each}) for each its own"
    if context is None:
        on = f"{shape[0]} features" if len(shape) == 1 else f"contexts of shape {shape}"
        raise DataError(f"this flow is conditional on {on}: pass their values as context, {wanted}")
    if not isinstance(context, Tensor):
        raise DataError(f"context of type {type(context).__name__}: expected a torch tensor, {wanted}")
    given, one = tuple(context.shape), context.ndim == len(shape)
    own = given[1:] == shape and (batch is None or given[0] == batch)
    if given != shape if one else not own:
        feature = shape == (1,)
        remedy = "; for one feature, pass context[:, None]" if feature and context.ndim == 1 else ""
        remedy = "; of one number, pass [context]" if context.ndim == 0 and feature else remedy
        raise DataError(f"context of shape {given}: expected {wanted}{remedy}")


C = TypeVar("C", bound=Tensor | Contexts | None)


def chunked(x: Tensor, c: C, size: int) -> Iterator[tuple[Tensor, C]]:
    """Samples ``(batch, ...)`` and their contexts, if any, in pieces of at most `size`."""
    for start in range(0, len(x), size):
        yield x[start : start + size], cast(C, None if c is None else c[start : start + size])
