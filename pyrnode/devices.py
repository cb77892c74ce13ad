"""Where tensors are: the device that a setting names, its memory, and how tensors get there without waiting for it.

Work for a device other than the CPU is queued: the program runs ahead of it, and stops where it reads a value. What is
decided here is what differs between the two kinds. A CPU has caches, which intermediates are kept in by taking a batch
in pieces; a device has memory, which they are kept within.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pyrnode.distributed import launched, local_rank
from pyrnode.errors import ConfigError

_UNKNOWN = 8 * 2**30
"""Bytes that a device is taken to have that does not say."""

_STORED, _PIECE, _KEPT = 4, 8, 8
"""What share of the memory that is free one block's intermediates may take, one evaluation's, and the training data."""


def resolve_device(name: str) -> torch.device:
    """The torch device of that name; ``"auto"`` is CUDA where there is one.

    Of several processes on a machine each has the next of its GPUs, unless the name has a number.

    Raises:
        ConfigError: There is no such device here.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count()) if launched() else torch.device("cuda")
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # some twenty names
            reason = "expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or another name of torch's"
        raise ConfigError(f"device = {name!r} cannot be used: {reason}") from None
    return device


def awaited(x: Tensor) -> bool:
    """Whether to read a value of `x` is to wait for its device."""
    return x.device.type != "cpu"


def memory(device: torch.device) -> int:
    """Bytes of memory that a device other than the CPU has; 8 GiB where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _UNKNOWN


def free(device: torch.device) -> int:
    """Bytes of it that this process has not filled; what other processes have is not known."""
    taken = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return max(0, memory(device) - taken)


def piece_limit(x: Tensor, cache: int) -> int:
    """Bytes of intermediates beyond which an evaluation at states like `x` goes through in pieces of the batch.

    Args:
        x: A tensor of the device.
        cache: The limit on a CPU.
    """
    return free(x.device) // _PIECE if awaited(x) else cache


def store_limit(x: Tensor, cache: int, *, taken: int = 0) -> int:
    """Up to how many bytes of intermediates of a whole solve from states like `x` are stored.

    Args:
        x: A tensor of the device.
        cache: The limit on a CPU.
        taken: Bytes that will be taken before.
    """
    return (free(x.device) - taken) // _STORED if awaited(x) else cache


def keeps(device: torch.device, size: int) -> bool:
    """Whether training data of so many bytes are kept on a device."""
    return device.type != "cpu" and size <= memory(device) // _KEPT


@cache
@torch.inference_mode(False)
def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that is made once and kept, so that a device is not sent the same ones at every step.

    Nobody may write to it. It is kept for good: a CUDA graph reads it where it is, and there are a few bytes for each
    stage of a grid.
    """
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a device, from pinned memory where that can be: the program does not wait for the copy."""
    if device.type == "cuda" and x.device.type == "cpu" and not x.requires_grad:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
