"""What is known of single columns before anything is learned: between which bounds they lie, and which are periodic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrnode.errors import ConfigError, unknown_name
from pyrnode.settings import Section, shown

Range = tuple[float, float]

PERIODIC = 6
"""Periodic columns at most: a density of so many costs 64 solves."""


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig(Section):
    """What is known of single columns of a table, by name, or by number (from 0) where they have no names.

    Args:
        bounds: ``(low, high)`` by column: its values lie strictly between, and elsewhere the density is zero. An end
            that is open is `None`, or infinite. The flow sees the logarithm of the distance to a bound, or the logit
            between two (`pyrnode.bounded.Bounded`).
        period: ``P``, or ``(low, high)`` with ``P = high − low``, by column: values that differ by a multiple of P
            are the same one (`pyrnode.bounded.Periodic`). A number P stands for ``(0, P)``, which samples lie in.

    Raises:
        ConfigError: A range is none: NaN, empty, or without a finite end.
    """

    bounds: dict[str, Any] | None = None
    period: dict[str, Any] | None = None

    def _validate(self) -> None:
        for name, read in (("bounds", _bounds), ("period", _period)):
            given = getattr(self, name)
            ranges = {str(key): read(f"{name}[{key!r}]", value) for key, value in (given or {}).items()}
            if len(ranges) < len(given or {}):
                raise ConfigError(f"{name} = {shown(given)}: names a column twice")
            object.__setattr__(self, name, ranges or None)
        if both := (self.bounds or {}).keys() & (self.period or {}).keys():
            raise ConfigError(
                f"column {min(both)!r} is in bounds and in period: a period has no bounds, leave those out"
            )
        if len(self.period or {}) > PERIODIC:
            raise ConfigError(
                f"{len(self.period or {})} periodic columns: at most {PERIODIC}, since a density costs two solves for "
                "each, multiplied; give the others as sine and cosine in a context, or leave them as they are"
            )


def by_position(
    ranges: Mapping[str, Range] | None,
    setting: str,
    count: int,
    features: Sequence[str] | None,
    context_features: Sequence[str] | None = None,
) -> dict[int, Range]:
    """The ranges of columns by their positions.

    Args:
        ranges: As `ColumnsConfig` has them.
        setting: Its name, for messages.
        count: How many columns there are.
        features: Their names; `None` where they count from 0.
        context_features: Names of the contexts' columns, for messages.

    Raises:
        ConfigError: There is no such column.
    """
    names = [str(i) for i in range(count)] if features is None else list(features)
    found = {}
    for name, value in (ranges or {}).items():
        if name not in names and name in (context_features or ()):
            raise ConfigError(
                f"{setting}: column {name!r} is one of the context, which needs no density: leave it out"
                + (" (a periodic context is given as sine and cosine)" if setting == "period" else "")
            )
        if name not in names:
            raise ConfigError(unknown_name(f"column in {setting}:", name, names))
        found[names.index(name)] = value
    return found


def _bounds(what: str, value: Any) -> Range:
    """One pair of bounds, of which either end may be open."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigError(f"{what} = {shown(value)}: expected (low, high), with None for an end that is open")
    low, high = value
    return _checked(what, value, -math.inf if low is None else low, math.inf if high is None else high)


def _period(what: str, value: Any) -> Range:
    """One period, as the range that samples lie in."""
    low, high = value if isinstance(value, (list, tuple)) and len(value) == 2 else (0.0, value)
    found = _checked(what, value, low, high)
    if math.inf in found or -math.inf in found:
        raise ConfigError(f"{what} = {shown(value)}: a period is finite")
    return found


def _checked(what: str, value: Any, low: Any, high: Any) -> Range:
    try:
        if any(isinstance(end, (str, bytes, bool)) for end in (low, high)):
            raise TypeError
        low, high = float(low), float(high)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(f"{what} = {shown(value)}: expected two numbers, low and high") from None
    if not low < high:  # NaN is not either
        raise ConfigError(f"{what} = {shown(value)}: expected low < high, and neither NaN")
    if low == -math.inf and high == math.inf:
        raise ConfigError(f"{what} = {shown(value)}: both ends are open, so there is no bound: leave the column out")
    if math.isfinite(low) and math.isfinite(high) and not math.isfinite(high - low):
        raise ConfigError(f"{what} = {shown(value)}: the width is beyond all numbers; open one end")
    if not math.nextafter(low, high) < high:
        raise ConfigError(f"{what} = {shown(value)}: there is no number between them")
    return low, high
