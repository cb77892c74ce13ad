"""Columns that lie between bounds, and columns that are periodic: fixed transforms, outside of what an engine solves.

A column between bounds goes to the whole line by the logit, or by the logarithm where one end is open. Outside, and on
the bounds themselves, the density is zero; that it is so near them too, ``p → 0``, is what a flow with a normal base
has in any case, since its tails fall faster than the logit's slope grows.

A periodic column is unwrapped. The flow learns a density q of a coordinate u on a window of two periods, (c − P, c + P)
about the data's circular mean c, and a value has the density of all that it stands for there:

    p(θ) = Σ_k q(θ + k P)                over the two turns k with θ + k P in the window

(the wrapped densities of circular statistics; as push-forward of a flow, Falorsi et al. 2019, arXiv 1903.02958).
``∫ p`` over a period is ``∫ q`` over the window, one; since q vanishes with all its derivatives at the window's ends,
p is smooth wherever the period is cut. A sample is one of q, reduced by the period.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pyrnode.columns import ColumnsConfig, Range, by_position
from pyrnode.data.arrays import column
from pyrnode.data.frames import Names
from pyrnode.data.samples import Samples, Source, Splits
from pyrnode.errors import ConfigError, DataError
from pyrnode.transforms import CHOSEN_ON, DoubleTransform, Transform

_LARGEST = 700.0
"""Exponents at most: ``exp`` of more is beyond float64."""

_SHOWN = 5
"""Rows that a message names."""


class Bounded(DoubleTransform):
    """``log(x − low)``, ``−log(high − x)``, or ``log (x − low)/(high − x)`` by column, as its bounds are; in float64.

    Of a sample with a value on a bound or outside the log-determinant is −inf, and the gradient of that value is zero.

    Args:
        low: Lower bounds ``(d,)``, −inf where there is none.
        high: Upper bounds ``(d,)``, inf where there is none.
    """

    low: Tensor
    high: Tensor
    ends32: Tensor
    ends64: Tensor

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__()
        ends = torch.tensor([list(low), list(high)], dtype=torch.float64, device="cpu")
        self.register_buffer("low", ends[0], persistent=False)  # settings, not what is learned
        self.register_buffer("high", ends[1], persistent=False)
        for name, dtype in (("ends32", np.float32), ("ends64", np.float64)):
            least = [_first_above(bound, dtype) for bound in low]
            most = [-_first_above(-bound, dtype) for bound in high]
            for i, (a, b) in enumerate(zip(low, high, strict=True)):  # an open end stays within the numbers
                largest = float(np.finfo(dtype).max)
                least[i] = -largest if a == -math.inf and b < math.inf else least[i]
                most[i] = largest if b == math.inf and a > -math.inf else most[i]
            self.register_buffer(name, torch.tensor([least, most], dtype=torch.float64, device="cpu"), persistent=False)

    def outside(self, x: Tensor) -> Tensor:
        """Which values are on a bound or beyond it, ``(n, d)``."""
        x = x.double()
        return ~((x > self.low) & (x < self.high))

    def _masks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which columns have a lower and an upper bound, and the bounds, 0 where there is none."""
        below, above = self.low > -math.inf, self.high < math.inf
        return below, above, torch.where(below, self.low, 0.0), torch.where(above, self.high, 0.0)

    def forward(self, x: Tensor, generator: object = None) -> tuple[Tensor, Tensor]:
        below, above, low, high = self._masks()
        out = self.outside(x)
        one_end = torch.where(below, low + 1 + low.abs() / 2, high - 1 - high.abs() / 2)
        between = torch.where(below & above, low + (high - low) / 2, torch.where(below | above, one_end, 0.0))
        x = torch.where(out, between, x.double())  # no gradient meets an infinity
        left = torch.log(torch.where(below, x - low, 1.0))
        right = torch.log(torch.where(above, high - x, 1.0))
        width = torch.log(torch.where(below & above, high - low, 1.0))
        y = torch.where(below | above, left - right, x)
        return y, torch.where(out.any(1), -math.inf, (width - left - right).sum(1))

    def inverse(self, y: Tensor) -> Tensor:
        below, above, low, high = self._masks()
        y = y.double()
        width = torch.where(below & above, high - low, 0.0)
        logit = torch.where(y < 0, low + width * torch.sigmoid(y), high - width * torch.sigmoid(-y))
        distance = torch.exp(torch.where(below, y, torch.where(above, -y, 0.0)).clamp(max=_LARGEST))
        open_ended = torch.where(below, low + distance, high - distance)
        return torch.where(below & above, logit, torch.where(below | above, open_ended, y))

    def contained(self, x: Tensor) -> Tensor:
        ends = (self.ends64 if x.dtype == torch.float64 else self.ends32).to(x.dtype)
        return torch.minimum(torch.maximum(x, ends[0]), ends[1])

    def extra_repr(self) -> str:
        return f"low={self.low.tolist()}, high={self.high.tolist()}"


def _first_above(bound: float, dtype: type[np.floating]) -> float:
    """The first number of a type above a bound, and not so near that it is no normal number away from it."""
    with np.errstate(over="ignore"):
        value = dtype(bound + float(np.finfo(dtype).tiny))
    return float(value if float(value) > bound or bound == -math.inf else np.nextafter(value, dtype(math.inf)))


class Periodic(DoubleTransform):
    """``logit (u − c + P)/2P`` of the columns with a period, which `unwrapped` has unwrapped about a centre c.

    Args:
        low: Where the period begins that samples lie in, ``(d,)``; NaN for the other columns.
        high: Where it ends, ``(d,)``.
        centre: ``c``, ``(d,)``, 0 for the other columns; default the middle of the period.
    """

    low: Tensor
    high: Tensor
    centre: Tensor
    ends32: Tensor
    ends64: Tensor
    pattern: Tensor

    def __init__(self, low: Sequence[float], high: Sequence[float], centre: Tensor | None = None) -> None:
        super().__init__()
        ends = torch.tensor([list(low), list(high)], dtype=torch.float64, device="cpu")
        periodic = [i for i, value in enumerate(low) if not math.isnan(value)]
        self.turns = 2 ** len(periodic)
        self.register_buffer("low", ends[0], persistent=False)
        self.register_buffer("high", ends[1], persistent=False)
        self.register_buffer("centre", ends.mean(0).nan_to_num(0.0) if centre is None else centre.double())
        other = [[False] * len(low) for _ in range(self.turns)]
        for row, choice in zip(other, itertools.product((False, True), repeat=len(periodic)), strict=True):
            for i, chosen in zip(periodic, choice, strict=True):
                row[i] = chosen
        self.register_buffer("pattern", torch.tensor(other, dtype=torch.bool, device="cpu"), persistent=False)
        for name, dtype in (("ends32", np.float32), ("ends64", np.float64)):
            first = [_least(value, dtype) for value in low]
            self.register_buffer(name, torch.tensor(first, dtype=torch.float64, device="cpu"), persistent=False)

    @classmethod
    def fit_centre(
        cls, low: Sequence[float], high: Sequence[float], x: Tensor, weight: Tensor | None = None
    ) -> Periodic:
        """About the circular mean of samples ``(n, d)``, which may have weights ``(n,)``."""
        new = cls(low, high)
        known, start, period = new._parts()
        angle = 2 * math.pi * (x.double() - start) / period
        share = torch.ones_like(angle[:, :1]) if weight is None else weight.double()[:, None]
        mean = torch.atan2((share * angle.sin()).sum(0), (share * angle.cos()).sum(0))
        new.centre = torch.where(known, start + period * mean / (2 * math.pi), 0.0)
        return new

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which columns are periodic, where their period begins, and P; 0 and 1 for the others."""
        known = ~torch.isnan(self.low)
        return known, torch.where(known, self.low, 0.0), torch.where(known, self.high - self.low, 1.0)

    def unwrapped(self, x: Tensor) -> Tensor:
        known, _, period = self._parts()
        x = x.double()
        near = torch.where(known, x - period * torch.floor((x - self.centre) / period + 0.5), x)
        far = torch.where(near < self.centre, near + period, near - period)
        return torch.where(self.pattern[:, None], far, near).flatten(0, 1)

    def forward(self, x: Tensor, generator: object = None) -> tuple[Tensor, Tensor]:
        known, _, period = self._parts()
        x = x.double()
        away = x - self.centre
        out = known & ~(away.abs() < period)
        away = torch.where(known & ~out, away, 0.0)
        left, right = torch.log(period + away), torch.log(period - away)
        log_det = torch.where(known, torch.log(2 * period) - left - right, 0.0)
        return torch.where(known, left - right, x), torch.where(out.any(1), -math.inf, log_det.sum(1))

    def inverse(self, y: Tensor) -> Tensor:
        known, start, period = self._parts()
        y = y.double()
        u = self.centre + period * torch.tanh(torch.where(known, y, 0.0) / 2)
        return torch.where(known, u - period * torch.floor((u - start) / period), y)

    def contained(self, x: Tensor) -> Tensor:
        known, wide = ~torch.isnan(self.low), x.double()
        first = torch.where(known, self.ends64 if x.dtype == torch.float64 else self.ends32, 0.0)
        seam = known & ((wide >= self.high) | (wide < self.low))  # where rounding has left the period
        return torch.where(seam, first.to(x.dtype), x)

    def extra_repr(self) -> str:
        return f"low={self.low.tolist()}, high={self.high.tolist()}, centre={self.centre.tolist()}"


def _least(bound: float, dtype: type[np.floating]) -> float:
    """The least number of a type that is not below a bound."""
    value = dtype(bound)
    return float(np.nextafter(value, dtype(math.inf)) if float(value) < bound else value)


# -- what is made of settings ----------------------------------------------------------------------------------------


def transforms(
    config: ColumnsConfig,
    event_shape: tuple[int, ...],
    levels: int | None = None,
    features: Names | None = None,
    context_features: Names | None = None,
) -> list[Transform]:
    """The transforms of columns with bounds or a period, of which there may be none.

    Args:
        config: What is known of columns.
        event_shape: Shape of a sample.
        levels: Grey levels of discrete data.
        features: Names of the columns.
        context_features: Names of the contexts' columns, for messages.

    Raises:
        ConfigError: There is no such column, or the data has no columns that could have bounds.
    """
    if config.bounds is None and config.period is None:
        return []
    if levels is not None or len(event_shape) != 1:
        kind = f"discrete data, which its {levels} levels bound" if levels is not None else f"samples of {event_shape}"
        raise ConfigError(
            f"bounds and period are for columns of continuous tables, and these are {kind}: leave them out"
        )
    (count,) = event_shape
    found = list[Transform]()
    if periods := by_position(config.period, "period", count, features, context_features):
        found.append(Periodic(*_ends(periods, count, (math.nan, math.nan))))
    if bounds := by_position(config.bounds, "bounds", count, features, context_features):
        found.append(Bounded(*_ends(bounds, count, (-math.inf, math.inf))))
    return found


def _ends(ranges: dict[int, Range], count: int, otherwise: Range) -> tuple[list[float], list[float]]:
    pairs = [ranges.get(i, otherwise) for i in range(count)]
    return [low for low, _ in pairs], [high for _, high in pairs]


def centred(begin: Iterable[Transform], x: Tensor, weight: Tensor | None = None) -> list[Transform]:
    """The same transforms with what they take from samples ``(n, d)``: where periodic columns are unwrapped."""
    return [
        Periodic.fit_centre(t.low.tolist(), t.high.tolist(), x, weight) if isinstance(t, Periodic) else t for t in begin
    ]


def from_bounds(x: Tensor, transforms: Iterable[nn.Module]) -> Tensor:
    """Samples of which the values on a bound, as a generator of uniform numbers draws them, are the next ones within.

    Args:
        x: ``(..., d)``; values beyond a bound stay there.
        transforms: What they will go through.
    """
    for bounds in transforms:
        if isinstance(bounds, Bounded):
            on = (x == bounds.low.to(x)) | (x == bounds.high.to(x))
            x = torch.where(on, bounds.contained(x), x)
    return x


def check_source(config: ColumnsConfig, source: Source | Splits) -> None:
    """`check_within` of all parts of what is to be learned; `ConfigError` where it has no such columns."""
    first = transforms(config, source.event_shape, source.levels, source.features, source.context_features)
    parts = {"validation": source.validation, "test": source.test}
    parts |= {"train": source.train} if isinstance(source, Splits) else {"": source.samples}
    for part, samples in parts.items():
        if samples is not None:
            check_within(samples, first, f"{source.name} ({part} split)" if part else source.name, source.features)


def check_within(samples: Samples, transforms: Iterable[nn.Module], what: str, features: Names | None) -> None:
    """Raises `DataError` where samples have values on a bound or beyond it, with column, count, rows and remedy.

    Args:
        samples: Samples; a row is a number among them.
        transforms: What they will go through.
        what: What they are called.
        features: Names of the columns.
    """
    for bounds in transforms:
        if isinstance(bounds, Bounded):
            _check_within(samples, bounds, what, features)


_PIECE = 65_536
"""Rows that are looked at at a time."""

_DISTANT = 1e9
"""Standard deviations of the data that its bounds may be away, or its period may be long: with more, float64 rounds
what the logarithms of distances have to tell apart, by 1e-3 nats at 1e12 of them, and by whole nats at 1e15."""


def check_near(samples: Samples, transforms: Iterable[nn.Module], what: str, features: Names | None) -> None:
    """Raises `DataError` where bounds or a period are so large that training samples are one point beside them.

    Args:
        samples: Training samples.
        transforms: What they will go through.
        what: What they are called.
        features: Names of the columns.
    """
    x = samples.first(min(len(samples), CHOSEN_ON)).x.double()
    mean, spread = x.mean(0), x.std(0, correction=0)
    for part in transforms:
        if isinstance(part, Periodic):
            away, remedy = {"period": part.high - part.low}, "leave the period out"
        elif isinstance(part, Bounded):
            away = {"lower bound": mean - part.low, "upper bound": part.high - mean}
            remedy = "leave that end open (None)"
        else:
            continue
        for name, distance in away.items():
            far = torch.isfinite(distance) & (distance > _DISTANT * spread) & (spread > 0)
            if bool(far.any()):
                i = int(far.nonzero()[0])
                raise DataError(
                    f"{what}: the {name} of column {column(i, features)} is {float(distance[i] / spread[i]):.1e} "
                    f"standard deviations of its values away, where float64 does not tell them apart: {remedy}"
                )


def _check_within(samples: Samples, bounds: Bounded, what: str, features: Names | None) -> None:
    first, found = 0, dict[int, _Found]()
    for batch in samples.batches(torch.arange(len(samples), device="cpu"), _PIECE):
        out = bounds.outside(batch.x)
        for i in out.any(0).nonzero().flatten().tolist() if bool(out.any()) else ():
            rows, at = out[:, i].nonzero().flatten(), found.setdefault(i, _Found())
            values = batch.x[rows, i]
            at.total += len(rows)
            for end in (bounds.low[i], bounds.high[i]):
                if on := int((values == end.to(values.dtype)).sum()):
                    at.on[f"{float(end):.15g}"] = at.on.get(f"{float(end):.15g}", 0) + on
            few = slice(max(0, _SHOWN - len(at.rows)))
            at.rows += [
                f"{first + row}: {v:.9g}" for row, v in zip(rows[few].tolist(), values[few].tolist(), strict=True)
            ]
        first += len(batch.x)
    if not found:
        return
    i, at = next(iter(found.items()))
    low, high = float(bounds.low[i]), float(bounds.high[i])
    exactly = "".join(f", {n} of them on {value}" for value, n in at.on.items())
    also = f"; so have columns {', '.join(column(j, features) for j in list(found)[1:9])}" if len(found) > 1 else ""
    listed = ", ".join(at.rows) + (", …" if at.total > len(at.rows) else "")
    raise DataError(
        f"{what}: column {column(i, features)} has {at.total} of {len(samples)} values that are not between its bounds "
        f"({low:.15g}, {high:.15g}){exactly}{also}. The first, by row: {listed}. On a bound and beyond it there is no "
        "density: leave such rows out, spread values that were rounded to a bound, or move the bound a little outwards "
        "(a value that many rows share, such as an exact 0, is no part of a density: give those a model of their own)"
    )


@dataclass
class _Found:
    """What of a column is not between its bounds."""

    total: int = 0
    on: dict[str, int] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
