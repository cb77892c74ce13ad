"""Data: `load` turns a name, a file, a folder, an array or a data set into train, validation and test samples.

Example:
    >>> splits = load("8gaussians")
    >>> splits.event_shape, len(splits.train), len(splits.validation), len(splits.test)
    ((2,), 16000, 2000, 2000)
"""

from pyrnode.data import synthetic
from pyrnode.data.loading import labels, load, sources
from pyrnode.data.mapped import MappedSamples
from pyrnode.data.samples import Batch, DatasetSamples, Samples, Splits, TensorSamples

__all__ = [
    "Batch",
    "DatasetSamples",
    "MappedSamples",
    "Samples",
    "Splits",
    "TensorSamples",
    "labels",
    "load",
    "sources",
    "synthetic",
]
