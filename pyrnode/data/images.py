"""Images: the sets of torchvision, the digits of scikit-learn, and folders of image files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyrnode.config import DataConfig
from pyrnode.data.arrays import check_levels, image_tensor
from pyrnode.data.samples import DatasetSamples, Samples, Source, Splits, TensorSamples
from pyrnode.errors import DataError, unknown_name

NAMES = {
    "mnist": "handwritten digits, 1×28×28, 60,000 + 10,000 (torchvision)",
    "fashion-mnist": "clothes, 1×28×28, 60,000 + 10,000 (torchvision)",
    "cifar10": "photographs of ten kinds, 3×32×32, 50,000 + 10,000 (torchvision)",
    "svhn": "house numbers, 3×32×32, 73,257 + 26,032 (torchvision)",
    "digits": "handwritten digits, 1×8×8, 17 grey levels, 1,797 (shipped with scikit-learn)",
}
"""The named sets of images, each with a line about it."""

_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}

DOWNLOADED = frozenset(_CLASSES)
"""Names of the sets that are fetched where they are not there."""

_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
}
"""What a file is opened as, by its name, and never as anything else: some of PIL's formats start other programs."""

_OTHERS = {
    ".avif",
    ".heic",
    ".heif",
    ".jp2",
    ".svg",
    ".eps",
    ".ps",
    ".pdf",
    ".ico",
    ".tga",
    ".psd",
    ".raw",
    ".dng",
    ".jfif",
}
"""Images by their names that are not opened: a folder that has some is not read in part."""

_PIXELS = 2**26
"""Most pixels of an image: what a small file claims is not allocated."""

_IN_MEMORY_BYTES = 512 * 2**20


def named_source(name: str, folder: Path, config: DataConfig) -> Source:
    """The set of that name; torchvision's are read from `folder`, and downloaded into it only if they are not there."""
    if name == "digits":
        values = _digits()
        levels = 17 if config.levels is None else config.levels
        check_levels(values, name, levels)
        return Source(name, TensorSamples(values), tuple(values.shape[1:]), levels)
    train, test = (_torchvision(name, folder, train=part) for part in (True, False))
    levels = 256 if config.levels is None else config.levels
    check_levels(train, name, levels)
    return Source(name, TensorSamples(train), tuple(train.shape[1:]), levels, test=TensorSamples(test))


def labels(name: str, folder: Path, config: DataConfig) -> Splits:
    """The classes of a named set, ``(n, 1)`` integers, split as `named_source` splits its images.

    Raises:
        DataError: The set has no classes here, or is missing.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        return Source(name, TensorSamples(torch.from_numpy(load_digits().target)[:, None]), ()).split(config)
    if name not in ("mnist", "fashion-mnist", "cifar10"):
        raise DataError(unknown_name("data set with classes", name, ("digits", "mnist", "fashion-mnist", "cifar10")))
    train, test = (
        torch.as_tensor(_torchvision_set(name, folder, train=p).targets, device="cpu")[:, None] for p in (True, False)
    )
    return Source(name, TensorSamples(train), (), test=TensorSamples(test)).split(config)


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images.astype(np.uint8)).unsqueeze(1)


def _torchvision(name: str, folder: Path, *, train: bool) -> Tensor:
    """Its images, ``(n, C, H, W)`` uint8."""
    values = torch.as_tensor(_torchvision_set(name, folder, train=train).data, device="cpu")
    if name == "cifar10":
        return values.permute(0, 3, 1, 2).contiguous()
    return values if values.ndim == 4 else values.unsqueeze(1)


def _torchvision_set(name: str, folder: Path, *, train: bool) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{name!r} needs torchvision: pip install torchvision ({error})") from error
    cls = getattr(datasets, _CLASSES[name])
    part: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        return _existing(cls, folder, part) or cls(str(folder), download=True, **part)
    except DataError:
        raise
    except Exception as error:  # whatever a download raises: network, read-only folder, checksum
        raise DataError(
            f"{name!r} is not in {folder.resolve()} and could not be downloaded to it ({_told(error)}); put "
            f"torchvision's {_CLASSES[name]} files there, or name their folder with PYRNODE_DATA or --data-dir"
        ) from error


def _existing(cls: Any, folder: Path, part: dict[str, Any]) -> Any:
    """The set if its files are in `folder` (nothing is written there), else `None`."""
    try:
        return cls(str(folder), download=False, **part)
    except Exception as error:  # whatever a damaged file raises
        if isinstance(error, RuntimeError) and "not found" in str(error):
            return None
        raise DataError(
            f"{cls.__name__} in {folder.resolve()} cannot be read ({_told(error)}); delete it there and fetch it again"
        ) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"  # on one line


class ImageFiles(Dataset[Tensor]):
    """Image files as uint8 ``(C, H, W)``; the first file says how many channels.

    Args:
        files: Paths of the images.
        channels: 1 or 3; default those of the first file.
    """

    def __init__(self, files: list[Path], channels: int | None = None) -> None:
        self.files = files
        self.channels = channels
        self.shape = tuple(self[0].shape)
        self.channels = self.shape[0]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        path = self.files[index]
        format = _FORMATS[path.suffix.lower()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PIL, about large images and damaged tags
                with Image.open(path, formats=[format]) as image:
                    if image.width * image.height > _PIXELS:
                        raise DataError(
                            f"{path} claims {image.width}×{image.height} pixels: expected at most {_PIXELS}"
                        )
                    if (frames := getattr(image, "n_frames", 1)) > 1:
                        raise DataError(f"{path} has {frames} frames: expected one; save each as a file")
                    image.load()
        except DataError:
            raise
        except (
            Exception,
            MemoryError,
        ) as error:  # whatever a damaged file raises: DecompressionBombError, struct.error
            remedy = "remove it, or fetch it again"
            raise DataError(f"{path} is not a readable image ({format}: {_told(error)}); {remedy}") from error
        value = image_tensor(image, str(path), self.channels)
        if index and tuple(value.shape) != self.shape:
            raise DataError(
                f"{path} is {tuple(value.shape)} (channels, height, width), but {self.files[0]} is {self.shape}: all "
                "images must have one size; resize or crop them first"
            )
        return value


def folder_source(folder: Path, config: DataConfig) -> Source:
    """The images under a folder: ``train/`` and ``test/`` (and ``validation/``) in it, if any, are the splits.

    Sub-folders (classes) are searched, their names ignored. Small sets are read into memory at once.
    """
    train = folder / "train"
    if not train.is_dir():
        samples, shape, levels = _images(_files(folder), config)
        return Source(folder.resolve().name, samples, shape, levels)
    if not (folder / "test").is_dir():
        raise DataError(f"{folder} has train/ but no test/: add one, or name {train} itself to split it by shares")
    samples, shape, levels = _images(_files(train), config)
    test = validation = None
    for part in ("test", "validation", "valid", "val"):
        if (folder / part).is_dir():
            other, other_shape, _ = _images(_files(folder / part), config, channels=shape[0])
            if other_shape != shape:
                raise DataError(f"{folder / part} has images of shape {other_shape}, but train/ of shape {shape}")
            test, validation = (other, validation) if part == "test" else (test, other)
    return Source(folder.resolve().name, samples, shape, levels, validation=validation, test=test)


def _files(folder: Path) -> list[Path]:
    known = _FORMATS.keys()
    found = (p for p in folder.rglob("*") if p.suffix.lower() in known | _OTHERS and p.is_file())
    files = sorted(
        (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)),
        key=lambda p: p.relative_to(folder).as_posix(),  # the same order on every machine
    )
    others = [p for p in files if p.suffix.lower() in _OTHERS]
    if others:
        raise DataError(f"{others[0]} is not of a format that is opened ({', '.join(known)}): convert or remove it")
    if not files:
        raise DataError(f"{folder} has no images ({', '.join(known)})")
    return files


def _images(files: list[Path], config: DataConfig, channels: int | None = None) -> tuple[Samples, tuple[int, ...], int]:
    dataset = ImageFiles(files, channels)
    levels = 256 if config.levels is None else config.levels
    samples: Samples = DatasetSamples(dataset, levels=levels)
    if len(files) * int(np.prod(dataset.shape)) <= _IN_MEMORY_BYTES:
        samples = TensorSamples(samples.tensor())
    return samples, dataset.shape, levels
