"""The five tabular sets of the literature, from the files of Papamakarios et al. 2017 (MAF), prepared as they did.

The folder is laid out as theirs (https://zenodo.org/record/1161203): ``power/data.npy``, ``gas/ethylene_CO.*``,
``hepmass/1000_train.csv``, ``hepmass/1000_test.csv``, ``miniboone/data.npy``, ``BSDS300/BSDS300.hdf5``. Splits, noise
and normalisation are those of MAF (its ``datasets/*.py``), so that likelihoods compare with published ones; they do
not depend on the configured shares and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pyrnode.config import DataConfig
from pyrnode.data.arrays import array_tensor, check_array
from pyrnode.data.readers import Array, DelimitedReader, NumpyReader, ParquetReader, TableReader
from pyrnode.data.samples import Source, TensorSamples
from pyrnode.errors import DataError

NAMES = {
    "power": "household electricity, 6 features (MAF's file power/data.npy)",
    "gas": "gas sensors, 8 features (MAF's file, converted: gas/ethylene_CO.parquet)",
    "hepmass": "particle physics, 21 features (MAF's files hepmass/1000_{train,test}.csv)",
    "miniboone": "neutrinos, 43 features (MAF's file miniboone/data.npy)",
    "bsds300": "patches of photographs, 63 features (MAF's file BSDS300/BSDS300.hdf5)",
}
"""The tabular sets, each with a line about it."""

Parts = tuple[Array, Array, Array]

_NAMED = DataConfig(sep=",", decimal=".", header=True)


def named_source(name: str, folder: Path, config: DataConfig) -> Source:
    """The set of that name, from MAF's files under `folder`."""
    readers: dict[str, Callable[[Path], Parts]] = {
        "power": _power,
        "gas": _gas,
        "hepmass": _hepmass,
        "miniboone": _miniboone,
        "bsds300": _bsds300,
    }
    arrays = readers[name](folder)
    parts = []
    for part, array in zip(("train", "validation", "test"), arrays, strict=True):
        values, _ = check_array(array_tensor(array, f"{name} ({part})"), f"{name} ({part})", config.levels)
        parts.append(TensorSamples(values))
    train, validation, test = parts
    return Source(name, train, tuple(train.tensor().shape[1:]), validation=validation, test=test)


def _require(path: Path, root: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path.resolve()} does not exist: get MAF's data (https://zenodo.org/record/1161203), unpack it, and name "
            f"the folder that has {path.relative_to(root).as_posix()} with PYRNODE_DATA or --data-dir"
        )
    return path


def _table(path: Path, columns: int) -> Array:
    array = NumpyReader(path).whole()
    if array.ndim != 2 or array.shape[1] != columns:
        raise DataError(f"{path} has shape {array.shape}: MAF's file has {columns} columns")
    return array


def _last_tenth(data: Array) -> tuple[Array, Array]:
    held_out = int(0.1 * len(data))
    if held_out == 0:
        raise DataError(f"{len(data)} samples are too few for MAF's split into tenths")
    return data[:-held_out], data[-held_out:]


def _standardised(train: Array, validation: Array, test: Array) -> Parts:
    """MAF scales by the moments of train and validation together (population standard deviation)."""
    both = np.concatenate([train, validation])
    shift, scale = both.mean(axis=0), both.std(axis=0)
    return _single((train - shift) / scale, (validation - shift) / scale, (test - shift) / scale)


def _single(train: Array, validation: Array, test: Array) -> Parts:
    return train.astype(np.float32), validation.astype(np.float32), test.astype(np.float32)


def _power(folder: Path) -> Parts:
    data = _table(_require(folder / "power" / "data.npy", folder), columns=8)
    rng = np.random.RandomState(42)  # MAF's generator and order of draws: shuffle, voltage, gap, sub-metering
    rng.shuffle(data)
    data = np.delete(data, [1, 3], axis=1)
    n = len(data)
    voltage, gap, metering = 0.01 * rng.rand(n, 1), 0.001 * rng.rand(n, 1), rng.rand(n, 3)
    data = data + np.hstack([gap, voltage, metering, np.zeros((n, 1))])
    rest, test = _last_tenth(data)
    train, validation = _last_tenth(rest)
    return _standardised(train, validation, test)


def _gas(folder: Path) -> Parts:
    data = _gas_columns(folder)
    while True:  # drop the first of the columns that are correlated with another one until none is
        crowded = (np.corrcoef(data, rowvar=False) > 0.98).sum(axis=1) > 1
        if not crowded.any():
            break
        data = np.delete(data, int(crowded.argmax()), axis=1)
    data = (data - data.mean(axis=0)) / data.std(axis=0, ddof=1)
    rest, test = _last_tenth(data)
    train, validation = _last_tenth(rest)
    return _single(train, validation, test)


def _gas_columns(folder: Path) -> Array:
    """The sensors' columns of the gas set, without time and the two concentrations."""
    stem = folder / "gas" / "ethylene_CO"
    for suffix in (".parquet", ".csv"):
        if (path := stem.with_suffix(suffix)).is_file():
            reader: TableReader = ParquetReader(path) if suffix == ".parquet" else DelimitedReader(path, _NAMED)
            names = reader.names or ()
            if missing := {"Time", "Meth", "Eth"} - set(names):
                raise DataError(f"{path} lacks the columns {', '.join(sorted(missing))} of MAF's ethylene_CO.pickle")
            sensors = [i for i, name in enumerate(names) if name not in ("Time", "Meth", "Eth")]
            return reader.whole()[:, sensors].astype(np.float64, copy=False)
    if (path := stem.with_suffix(".npy")).is_file():
        return _table(path, columns=16)
    if stem.with_suffix(".pickle").is_file():
        raise DataError(
            f"{stem}.pickle is a pickle, which pyrnode does not read, since it can run code; if you trust it, convert "
            f"it once: python -c \"import pandas; pandas.read_pickle('{stem}.pickle').to_parquet('{stem}.parquet')\" "
            "(a .csv with its column names will do, and so will a .npy without the columns Time, Meth and Eth)"
        )
    _require(stem.with_suffix(".parquet"), folder)
    raise AssertionError("unreachable")


def _hepmass(folder: Path) -> Parts:
    paths = [_require(folder / "hepmass" / f"1000_{part}.csv", folder) for part in ("train", "test")]
    tables = [DelimitedReader(path, _NAMED).whole().astype(np.float64, copy=False) for path in paths]
    train, test = (table[table[:, 0] == 1, 1:] for table in tables)  # the signal, without its label
    test = test[:, :-1]  # the test file has one column too many
    if train.shape[1] != test.shape[1]:
        raise DataError(f"{folder / 'hepmass'}: {train.shape[1]} features in train, but {test.shape[1]} in test")
    columns = np.ascontiguousarray(train.T)  # the order in which pandas, which MAF used, adds the numbers up
    shift, scale = columns.mean(axis=1), columns.std(axis=1, ddof=1)
    fitted, held_out = (train - shift) / scale, (test - shift) / scale
    # MAF means to drop features whose values recur, but counts the smallest value only; published numbers rest on that
    keep = (fitted == fitted.min(axis=0)).sum(axis=0) <= 5
    fitted, held_out = fitted[:, keep], held_out[:, keep]
    rest, validation = _last_tenth(fitted)
    return _single(rest, validation, held_out)


def _miniboone(folder: Path) -> Parts:
    data = _table(_require(folder / "miniboone" / "data.npy", folder), columns=43)
    rest, test = _last_tenth(data)
    train, validation = _last_tenth(rest)
    return _standardised(train, validation, test)


def _bsds300(folder: Path) -> Parts:
    path = _require(folder / "BSDS300" / "BSDS300.hdf5", folder)
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path}: reading HDF5 needs h5py: pip install h5py") from error
    try:
        with h5py.File(path, "r") as file:
            return file["train"][:], file["validation"][:], file["test"][:]
    except (OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read as MAF's file ({error}); it may be truncated") from error
