"""Learned flows as plain PyTorch modules, and as files that run without pyrnode.

`Flow.to_torch` gives a `TorchFlow`; `save` writes it, `verify` checks a file against the outputs that it carries, and
`load` reads a safetensors export back.
"""

from pyrnode.export.files import Verification, load, save, verify
from pyrnode.export.module import TorchFlow, to_torch
from pyrnode.export.solve import Solve

__all__ = ["Solve", "TorchFlow", "Verification", "load", "save", "to_torch", "verify"]
