"""Where tensors are: the device that a setting names."""

from __future__ import annotations

import torch

from pyrnode.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The torch device of that name; ``"auto"`` is CUDA where there is one.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
