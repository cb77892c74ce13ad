"""Where operations are recorded rather than done (`torch.export`), or done for many inputs at once (`torch.vmap`)."""

from __future__ import annotations

import torch
from torch import Tensor


def recording() -> bool:
    """Whether operations are being recorded, so that no value is known."""
    return torch.compiler.is_compiling()


def holds(condition: Tensor) -> bool:
    """A condition on values, true where none are known: while recording, and under `torch.vmap`."""
    if recording():
        return True
    try:
        return bool(condition)
    except RuntimeError as error:
        if "vmap" in str(error):
            return True
        raise
