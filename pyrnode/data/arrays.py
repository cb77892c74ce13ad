"""Arrays, tensors and single items: what is accepted, and what is said about the rest."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrnode.errors import DataError
from pyrnode.tracing import holds, recording

_UINT8_LEVELS = 256


def numbers(values: Any, what: str) -> Tensor:
    """What users pass as numbers, as a tensor that has them all: every entry of the package takes them through here.

    Args:
        values: A tensor, which keeps its device and gradient, or an array, or nested lists of numbers.
        what: What it is called in messages.

    Returns:
        The numbers as uint8, int8 to int64, or float16 to float64. Lists become float64 or int64: Python's own numbers
        are double, and what torch makes of them is not. Truth values become uint8.

    Raises:
        DataError: There are none, or a part of them would be lost: masks, imaginary parts, digits.
    """
    if isinstance(values, Tensor):
        return _dense(values, what)
    if isinstance(values, (list, tuple)) and values and all(isinstance(value, Tensor) for value in values):
        try:
            return _dense(torch.stack(list(values)), what)
        except (RuntimeError, TypeError) as error:
            raise DataError(f"{what} is a list of tensors that do not fit together ({error})") from error
    refuse_masked(values, what)
    if hasattr(values, "toarray"):
        raise DataError(f"{what} is a sparse matrix: pass it as .toarray()")
    try:
        array = np.asarray(values)
    except Exception as error:  # whatever an array of another library raises
        raise DataError(f"{what} of type {type(values).__name__}: expected numbers ({_line(error)})") from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise DataError(_bad_type(what, array.dtype.name, values, str(array.dtype)))
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return _dense(torch.from_numpy(array), what)


def refuse_masked(values: Any, what: str) -> None:
    """Raises `DataError` where an array, or one in a list, has masked cells: what is beneath a mask is no value."""
    for part in values if isinstance(values, (list, tuple)) else (values,):
        mask = getattr(part, "mask", None)
        if isinstance(mask, (np.ndarray, np.bool_, bool)) and (count := int(np.sum(mask))):
            raise DataError(
                f"{what} has {count} masked cells: drop their rows (numpy.ma.compress_rows), or fill them "
                "(.filled(value))"
            )


def _dense(tensor: Tensor, what: str) -> Tensor:
    """A tensor of one of torch's usual types, whose every value is there."""
    if type(tensor).__name__ == "MaskedTensor":
        raise DataError(f"{what} is a masked tensor: drop what is masked, or pass it as .to_tensor(value)")
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        raise DataError(
            f"{what} is a sparse, nested or quantized tensor; pass it as .to_dense(), torch.stack(x.unbind()) or "
            ".dequantize()"
        )
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        whole = tensor.to(torch.int64)
        if tensor.dtype == torch.uint64 and bool((whole < 0).any()):
            raise DataError(f"{what} has integers beyond int64: convert it to float64")
        return whole
    if tensor.dtype not in _NUMBERS:
        raise DataError(_bad_type(what, _short(tensor.dtype)))
    return tensor


_NUMBERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def array_tensor(array: Any, what: str) -> Tensor:
    """`numbers` to be trained on, as a CPU tensor of type uint8, int64, float32 or float64.

    Args:
        array: The array or tensor.
        what: What it is called in messages.

    Raises:
        DataError: The type is none of numbers, or one that could only be kept with a silent change.
    """
    if isinstance(array, Tensor) and array.device.type != "cpu":
        raise DataError(f"{what} is on {array.device}; pass it as .cpu(): batches move to the device in training")
    given = array.dtype if isinstance(array, Tensor) else np.asarray(array).dtype
    if given in (torch.bool, np.dtype(bool)):
        raise DataError(_bad_type(what, "bool"))
    tensor = numbers(array, what).detach()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise DataError(_bad_type(what, _short(tensor.dtype)))
    if tensor.dtype in (torch.int8, torch.int16, torch.int32):
        tensor = tensor.to(torch.int64)
    return tensor.contiguous()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _bad_type(what: str, dtype: str, values: Any = None, shown: str | None = None) -> str:
    if not isinstance(values, (np.ndarray, list, tuple, type(None))):
        return f"{what} of type {type(values).__name__}: expected numbers, as a tensor or array"
    remedies = {
        "object": "all entries must be numbers, in rows of equal length",
        "bool": "convert it to uint8 and set levels = 2",
        "float16": "convert it to float32",
        "bfloat16": "convert it to float32",
        "longdouble": "convert it to float64",
        "float128": "convert it to float64",
        "str": "expected numbers, not text",
        "bytes": "expected numbers, not text",
        "complex": "pass real and imaginary parts as features",
        "datetime": "expected numbers, not dates: pass them as seconds, .astype('datetime64[s]').astype('int64')",
        "timedelta": "expected numbers, not times: pass them as seconds, x / numpy.timedelta64(1, 's')",
    }
    remedy = remedies.get(dtype) or remedies.get(re.split(r"[\d\[]", dtype)[0])
    return f"{what} has type {shown or dtype}: {remedy or 'expected float32, float64, or integers'}"


def check_array(
    values: Tensor, what: str, levels: int | None, features: tuple[str, ...] | None = None
) -> tuple[Tensor, int | None]:
    """Checks a whole set of samples.

    Args:
        values: Samples: ``(n, d)`` vectors, ``(n, H, W)`` or ``(n, C, H, W)`` images.
        what: What it is called in messages.
        levels: Grey levels as configured, or `None`.
        features: Names of the columns, for messages.

    Returns:
        The samples, ``(n, d)`` or ``(n, C, H, W)``, and the number of levels (`None` if continuous). Discrete samples
        are uint8, or int32 from 257 levels on; the type of continuous samples is theirs.

    Raises:
        DataError: Shape, type or values are of no use; the message says where and what to do.
    """
    if values.ndim == 1:
        raise DataError(f"{what} has shape {tuple(values.shape)}: for one feature, reshape it to (n, 1)")
    if values.ndim not in (2, 3, 4):
        raise DataError(f"{what} has shape {tuple(values.shape)}: expected (n, d), (n, H, W) or (n, C, H, W)")
    if values.numel() == 0:
        raise DataError(f"{what} is empty: shape {tuple(values.shape)}")
    if values.ndim == 3:
        values = values.unsqueeze(1)
    if values.ndim == 4:
        check_channels(tuple(values.shape[1:]), what)
    if values.is_floating_point():
        _check_continuous(values, what, levels, features)
        return values, None
    levels = _levels_of(values, what, levels)
    check_levels(values, what, levels)
    return values.to(torch.uint8 if levels <= _UINT8_LEVELS else torch.int32), levels


def _levels_of(values: Tensor, what: str, levels: int | None) -> int:
    if levels is not None:
        return levels
    if values.dtype == torch.uint8 and values.ndim == 4:
        return _UINT8_LEVELS
    raise DataError(
        f"{what} holds integers ({_short(values.dtype)}): set levels = L if they are discrete values 0 .. L-1, or "
        "convert them to float32 or float64 if they are measurements"
    )


def check_levels(values: Tensor, what: str, levels: int) -> None:
    """Raises `DataError` unless all values are in ``0 .. levels-1``."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= levels:
        raise DataError(f"{what} has values {low} .. {high}, but levels = {levels} allows 0 .. {levels - 1}")


def check_channels(shape: tuple[int, ...], what: str) -> None:
    """Raises `DataError` if an image's shape is ``(H, W, C)`` by the look of it, not ``(C, H, W)``."""
    if shape[-1] in (1, 3, 4) and shape[0] > 4:
        raise DataError(f"{what} has images of shape {shape}, channels last: move them first, to (C, H, W)")


def _check_continuous(values: Tensor, what: str, levels: int | None, features: tuple[str, ...] | None) -> None:
    if not computable(values):
        raise bad_value(values, what, features, 0)
    if levels is not None:
        raise DataError(
            f"{what} holds floating-point values, but levels = {levels} is for integers 0 .. {levels - 1}: leave "
            "levels unset, or convert the values to integers"
        )
    if values.ndim == 2:
        check_varies(values, what, features)
    else:
        check_not_scaled_pixels(values[:100], what)


LARGEST = 1e150
"""Numbers beyond it have squares that float64 does not hold: no variance, no distance."""


def computable(values: Tensor) -> bool:
    """Whether all of some numbers are finite, and their squares too in double precision."""
    if not values.is_floating_point():
        return True
    return bool((values.abs() <= min(LARGEST, torch.finfo(values.dtype).max)).all())  # NaN is below nothing


def bad_value(values: Tensor, what: str, features: tuple[str, ...] | None, row: int) -> DataError:
    """The error of samples, from that row on, of which some are not finite, or too large to compute with."""
    bad, problem, remedy = ~torch.isfinite(values), "NaN or infinite values", "remove or fill them"
    if not bool(bad.any()):
        bad, problem = values.abs() > LARGEST, f"values beyond {LARGEST:g}, whose squares are no numbers"
        remedy = "leave out what is a mistake or a code, or take other units"
    first = bad.nonzero()[0].tolist()
    at = row + first[0]
    place = f"row {at}, column {column(first[1], features)}" if values.ndim == 2 else f"image {at}"
    value = float(values[tuple(first)])
    said = f" ({value:g})" if math.isfinite(value) else ""
    return DataError(f"{what} has {int(bad.sum())} {problem}, the first in {place}{said}: {remedy}")


def check_varies(values: Tensor, what: str, features: tuple[str, ...] | None) -> None:
    """Raises `DataError` if a column of a table ``(n, d)`` is constant: it has no density."""
    constant = (values == values[0]).all(dim=0).nonzero().flatten().tolist()
    if constant:
        raise constant_column(values, constant[0], len(constant), what, features)


def constant_column(values: Tensor, i: int, count: int, what: str, features: tuple[str, ...] | None) -> DataError:
    """The error of a table of which so many columns are constant, the first of them `i`."""
    if len(values) == 1:
        return DataError(f"{what} has 1 sample; expected at least 10")
    more = f" (and {count - 1} more columns)" if count > 1 else ""
    return DataError(
        f"{what}: column {column(i, features)} is constant ({values[0, i].item():g}) in all {len(values)} "
        f"samples{more}: it has no density; remove it"
    )


def check_not_scaled_pixels(values: Tensor, what: str) -> None:
    """Raises `DataError` if images are 8-bit pixels over 255: their density would be unbounded."""
    scaled = values.double() * 255
    if bool(((scaled - scaled.round()).abs() < 1e-3).all()) and float(values.min()) >= 0 and float(values.max()) <= 1:
        raise DataError(
            f"{what} holds 8-bit pixels divided by 255, so it is discrete: pass the uint8 values themselves (in "
            "torchvision, PILToTensor in place of ToTensor); pyrnode dequantises them"
        )
    if bool((values == values.round()).all()) and float(values.min()) >= 0:
        raise DataError(
            f"{what} holds whole numbers {float(values.min()):g} to {float(values.max()):g}, so it is discrete: pass "
            "them as integers (8-bit pixels as uint8), with levels = L for 0 .. L-1; pyrnode dequantises them"
        )


_PIXELS = 64
"""Values from which on it is no chance that all of them are in the lowest level, or whole."""


def check_spread(x: Tensor, levels: int, *, strict: bool) -> None:
    """Raises `DataError` if floating-point values, to be read as ``p + u`` in ``[0, levels]``, are pixels in [0, 1].

    They would pass for nearly black images.

    Args:
        x: Samples ``(n, *event)``.
        levels: Grey levels.
        strict: Refuse what a few black images could be, too: all values below 1, or none that is spread.
    """
    if recording() or not x.is_floating_point() or not x.numel() or (x.ndim != 4 and x[0].numel() < 16):
        return
    low = (x >= 0).all() & (x <= 1).all()
    grid = torch.stack([((x * k - (x * k).round()).abs() < 1e-3).all() for k in (255, levels - 1)]).any()
    half = (2 * x == (2 * x).round()).all()  # 0, 1, and the centre of the lowest bin
    whole = (x == x.round()).all()
    many = strict and x.numel() >= _PIXELS
    scaled = low & (grid & ~half if not many else ~whole if levels == 2 else torch.ones_like(low))
    if not holds(~scaled):
        raise DataError(
            f"the input has values {float(x.min()):g} to {float(x.max()):g}, and this flow models {levels} levels: it "
            f"would take them for nearly black. Pass the integers 0 .. {levels - 1} themselves (in torchvision, "
            "PILToTensor in place of ToTensor)"
        )
    if many and levels > 2 and not holds(~whole):
        raise DataError(
            "the input has whole numbers as floating-point values, which are p + u without the noise u: pass integers, "
            "x.to(torch.uint8), which get it"
        )


def column(index: int, features: tuple[str, ...] | None) -> str:
    """A column's name in quotes, or its number."""
    return repr(features[index]) if features else str(index)


def item_tensor(item: Any, what: str, levels: int | None) -> Tensor:
    """One item of a data set as a tensor: ``(d,)``, or ``(C, H, W)``; a tuple stands for its first entry.

    Raises:
        DataError: It is not a tensor, array or PIL image, or not of a type and shape that `check_array` accepts.
    """
    if isinstance(item, (tuple, list)) and len(item):
        item = item[0]
    if hasattr(item, "getbands"):  # a PIL image, without importing PIL
        return image_tensor(item, what)
    if not isinstance(item, (Tensor, np.ndarray)):
        raise DataError(
            f"{what} is of type {type(item).__name__}: expected a tensor, an array or a PIL image, or a tuple "
            "that starts with one"
        )
    value = array_tensor(item, what)
    if value.ndim == 2:
        value = value.unsqueeze(0)
    if value.ndim not in (1, 3) or value.numel() == 0:
        raise DataError(f"{what} has shape {tuple(value.shape)}: expected (d,), (H, W) or (C, H, W)")
    if value.is_floating_point():
        if levels is not None:
            raise DataError(f"{what} holds floating-point values, but levels = {levels} is for integers")
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"{what} has values that are NaN or infinite")
        return value
    if value.ndim == 3:
        check_channels(tuple(value.shape), what)
    levels = _levels_of(value.unsqueeze(0), what, levels)
    check_levels(value, what, levels)
    return value.to(torch.uint8 if levels <= _UINT8_LEVELS else torch.int32)


def check_item(value: Tensor, what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The value, or `DataError` if it differs in shape or type from the first item of its set."""
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise DataError(
            f"{what} is {tuple(value.shape)} {_short(value.dtype)}, but item 0 is {shape} {_short(dtype)}: all must "
            "have one shape and type"
        )
    return value


def image_tensor(image: Any, what: str, channels: int | None = None) -> Tensor:
    """A PIL image as uint8 ``(C, H, W)``: one channel if grey, three if colour or palette.

    Args:
        image: The PIL image.
        what: What it is called in messages.
        channels: 1 or 3 where it is known; a grey image is repeated to three channels.

    Raises:
        DataError: The image has transparency or another mode that cannot be kept, or colours where `channels` is 1.
    """
    if image.mode not in ("L", "RGB", "P") or "transparency" in image.info:
        raise DataError(f"{what} has mode {image.mode}: convert it to 8-bit grey or RGB, without transparency")
    if channels == 1 and image.mode != "L":
        raise DataError(f"{what} has colours, but the first image is grey: all must have the same channels")
    grey = image.mode == "L" and channels != 3
    pixels = np.array(image if grey else image.convert("RGB"))
    return torch.from_numpy(pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1)))
