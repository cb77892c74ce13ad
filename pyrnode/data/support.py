"""What of the training data has no density, or stands in the test set too: remarks, since nothing else tells.

On a line or a grid a density is unbounded: a flow trained there scores the better the longer it trains, and the number
means nothing. Of rows that were trained on, a score says how well they were learned by heart. Nothing is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pyrnode.data.arrays import column
from pyrnode.data.mapped import MappedSamples
from pyrnode.data.readers.base import Array
from pyrnode.data.samples import Samples, Splits, TensorSamples

_ROWS = 20_000
"""Rows that are looked at for the columns' sake."""

_COLUMNS = 512
"""Columns up to which linear dependence is looked for."""

_FEWEST = 50
"""Rows from which on recurring values say something of a column."""

_DISTINCT, _SHARE = 100, 0.1
"""A column is discrete with at most so many values, each ten times on average, or one value in so many of its rows."""

_AWAY = 1000.0
"""Interquartile ranges that a value is away from the median which is said of its column."""

_COUNTED = 10
"""Samples of one weight that the training samples are to be worth, or half of them: ``(Σw)²/Σw²``."""

_PIECE = 2**22
"""Bytes of rows that are hashed at a time."""


class SupportWarning(UserWarning):
    """The data that an estimator was given has no density, as it stands."""


def warn(splits: Splits) -> None:
    """Says the `remarks` as warnings, one for each."""
    for text in remarks(splits):
        warnings.warn(text, SupportWarning, stacklevel=3)


def remarks(splits: Splits) -> list[str]:
    """What is to be said of the data, a sentence or two for each kind, with columns and counts."""
    train, found = splits.train, list[str]()
    if splits.levels is None and not splits.is_image and isinstance(train, (TensorSamples, MappedSamples)):
        rows = torch.arange(0, len(train), max(1, -(-len(train) // _ROWS)), device="cpu")
        x = next(train.batches(rows, _ROWS)).x
        found += _columns(x.double().numpy(), splits.features, float(np.finfo(str(x.dtype)[6:]).eps), len(train))
    if train.context is not None:
        same = [i for i, fixed in enumerate(constant(train.context.flatten(1))) if fixed]
        if train.context.ndim > 2:
            if len(same) == train.context[0].numel():
                found.append("context: all training samples have the same one, so nothing can be learned of it")
        elif same:
            named = _named(same, splits.context_features, splits.context_dim)
            found.append(f"context: {named} the same value in all training samples, so nothing can be learned of it")
    return found + _heavy(train) + _repeats(splits)


def constant(values: Tensor) -> list[bool]:
    """Which columns of ``(n, m)`` have one value throughout."""
    flags: list[bool] = (values == values[0]).all(0).tolist()
    return flags


def _named(indices: Sequence[int], names: tuple[str, ...] | None, count: int) -> str:
    """Columns by their names or numbers, as the subject of a sentence."""
    listed = ", ".join(column(i, names) for i in indices[:8]) + (", …" if len(indices) > 8 else "")
    return (
        f"column {listed} (of {count}) has"
        if len(indices) == 1
        else f"columns {listed} ({len(indices)} of {count}) have"
    )


# -- columns ---------------------------------------------------------------------------------------------------------


def _columns(x: Array, names: tuple[str, ...] | None, eps: float, rows: int) -> list[str]:
    found, d = [], x.shape[1]
    groups = _one_hot(x)
    for group in groups:
        found.append(f"no density: {_named(group, names, d)} a single 1 in each row, the code of a class (one-hot)")
    coded = {i for group in groups for i in group}
    if discrete := [i for i in _discrete(x) if i not in coded]:
        share = max(_commonest(x[:, i]) for i in discrete)
        found.append(
            f"no density: {_named(discrete, names, d)} values that recur (the commonest in {share:.0%} of the rows): "
            "drop or spread them, or make them a context"
        )
    for i in _numbering(x, rows):
        found.append(f"column {column(i, names)} numbers the rows: drop it")
    for i, text in _gross(x):
        found.append(f"column {column(i, names)}: {text}")
    for i, of in _dependent(x, eps):
        if i not in coded:
            kind = "a copy, or a multiple, of" if len(of) == 1 else "a linear combination of"
            listed = ", ".join(column(j, names) for j in of[:8]) + (", …" if len(of) > 8 else "")
            found.append(f"no density: column {column(i, names)} is {kind} {listed}: drop it")
    return found


def _one_hot(x: Array) -> list[list[int]]:
    """Neighbouring columns of 0 and 1 that sum to 1 in every row."""
    binary = ((x == 0) | (x == 1)).all(0)
    groups, run, total = [], list[int](), np.zeros(len(x))
    for i in range(x.shape[1]):
        total = total + x[:, i] if binary[i] else np.zeros(len(x))
        run = [*run, i] if binary[i] else []
        if len(run) > 1 and bool((total == 1).all()):
            groups.append(run)
        if bool((total >= 1).all()) or bool((total > 1).any()):
            run, total = [], np.zeros(len(x))
    return groups


def _commonest(values: Array) -> float:
    """Share of the most frequent value."""
    return float(np.unique(values, return_counts=True)[1].max() / len(values))


def _discrete(x: Array) -> list[int]:
    if len(x) < _FEWEST:
        return []
    found = []
    for i in range(x.shape[1]):
        counts = np.unique(x[:, i], return_counts=True)[1]
        if len(counts) <= min(_DISTINCT, len(x) * _SHARE) or counts.max() >= _SHARE * len(x):
            found.append(i)
    return found


def _numbering(x: Array, rows: int) -> list[int]:
    """Columns of whole numbers that do not recur and leave few out: of `rows` rows, of which ``x`` are some."""
    if len(x) < _FEWEST:
        return []
    whole = np.flatnonzero((x == np.floor(x)).all(0))
    return [
        int(i)
        for i in whole
        if len(np.unique(x[:, i])) == len(x) and x[:, i].max() - x[:, i].min() < 1.5 * max(rows, len(x))
    ]


def _gross(x: Array) -> Iterator[tuple[int, str]]:
    """Columns with values that are far from all others, each with what they may be."""
    if len(x) < _FEWEST:
        return
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    for i in np.flatnonzero(high > low):
        values, count = np.unique(x[:, i], return_counts=True)
        for value, often, rest in ((values[0], count[0], values[1:]), (values[-1], count[-1], values[:-1])):
            gap = abs(value - (rest[0] if value < rest[0] else rest[-1]))
            spread = rest[-1] - rest[0]
            away = abs(value - middle[i]) / (high[i] - low[i])
            if often >= max(3, 0.001 * len(x)) and gap > max(spread, 2 * (high[i] - low[i])):
                text = f"{value:g}, in {often} of {len(x)} rows, is far from all other values"
                yield int(i), f"{text}: if it is a code for a missing value, leave those rows out or fill them"
            elif away > _AWAY:
                text = f"{value:g} is {away:.1e} interquartile ranges from the median, and sets the scale of all of it"
                yield int(i), f"{text}: if it is a mistake, or a code for a missing value, leave such rows out"


def _dependent(x: Array, eps: float) -> list[tuple[int, list[int]]]:
    """Columns that are linear in others, each with those: to what rounding leaves of the standardised columns."""
    import scipy.linalg

    n, d = x.shape
    if not 1 < d <= _COLUMNS or n <= d + 1:
        return []
    x = x[:: max(1, n // max(2000, 8 * d))]
    mean, std = x.mean(0), x.std(0)
    varies = np.flatnonzero(std > 0)
    z = (x[:, varies] - mean[varies]) / std[varies]
    rounding = eps * float((np.abs(x[:, varies]).max(0) / std[varies]).max(initial=1.0))
    tolerance = min(1e-3, 4 * rounding * len(varies)) * np.sqrt(len(z))
    if not len(varies) or (rank := int((scipy.linalg.svdvals(z) > tolerance).sum())) == len(varies):
        return []
    _, _, order = scipy.linalg.qr(z, mode="economic", pivoting=True)
    basis, found = np.sort(order[:rank]), []
    for i in np.sort(order[rank:]):
        shares = np.linalg.lstsq(z[:, basis], z[:, i], rcond=None)[0]
        found.append((int(varies[i]), [int(varies[j]) for j in basis[np.abs(shares) > 1e-3]]))
    return found


def _heavy(train: Samples) -> list[str]:
    """Weights of which a few samples have so much that the others hardly count."""
    weight, n = train.weight, len(train)
    if weight is None or (counted := n / float(weight.square().mean())) >= min(_COUNTED, n / 2):
        return []
    return [
        f"weights: the largest is {float(weight.max()):.3g} times their mean, so that {n} training samples count as "
        f"{counted:.3g} of one weight: if it is a mistake, leave that sample out"
    ]


# -- rows ------------------------------------------------------------------------------------------------------------


def _repeats(splits: Splits) -> list[str]:
    """How many rows of the other parts are training rows; parts that are read from disk are left out."""
    found, parts = [], {"validation": splits.validation, "test": splits.test}
    if splits.test is splits.validation:  # of an estimator, which has no test set
        del parts["test"]
    hashes = {
        name: np.concatenate(list(_hashes(part)))
        for name, part in parts.items()
        if part is not splits.train and isinstance(part, TensorSamples) and isinstance(splits.train, TensorSamples)
    }
    sought = {name: np.unique(values, return_counts=True) for name, values in hashes.items()}
    seen = {name: np.zeros(len(values), dtype=bool) for name, (values, _) in sought.items()}
    for piece in _hashes(splits.train) if hashes else ():
        for name, (values, _) in sought.items():
            place = np.searchsorted(values, piece).clip(max=len(values) - 1)
            seen[name][place[values[place] == piece]] = True
    for name, (_, times) in sought.items():
        if count := int(times[seen[name]].sum()):
            found.append(
                f"repeated rows: {count} of {len(hashes[name])} {name} samples are training samples too, so "
                "their scores say little of new data"
            )
    return found


def _hashes(samples: Samples) -> Iterator[Array]:
    """A number of 64 bits for each sample with its context, piece by piece."""
    x, c = samples.tensor().flatten(1), None if samples.context is None else samples.context.flatten(1)
    rows = max(1, _PIECE // (8 * (x.shape[1] + (0 if c is None else c.shape[1]))))
    for first in range(0, len(x), rows):
        bits = np.concatenate([_words(v[first : first + rows]) for v in (x, c) if v is not None], 1)
        weights = np.asarray(2 * np.random.default_rng(0).integers(2**63, size=bits.shape[1], dtype=np.uint64) + 1)
        with np.errstate(over="ignore"):
            for shift, odd in ((32, weights), (29, weights[::-1])):
                bits = (bits ^ (bits >> np.uint64(shift))) * odd
            yield (bits ^ (bits >> np.uint64(31))).sum(1, dtype=np.uint64)


def _words(values: Tensor) -> Array:
    """Rows of numbers as rows of 64 bits, equal where the numbers are."""
    array: Array = values.numpy()
    if array.dtype == np.uint8:
        padded = np.zeros((len(array), -(-array.shape[1] // 8) * 8), np.uint8)
        padded[:, : array.shape[1]] = array
        return padded.view(np.uint64)
    return (array.astype(np.float64) + 0.0).view(np.uint64)  # + 0.0: −0 is 0
