"""Learned flows as plain PyTorch modules, and as files that run without pyrnode.

`Flow.to_torch` gives a `TorchFlow`; `save` writes it, `verify` checks a file against the outputs that it carries, and
`load` reads a safetensors export back.
"""

from pyrnode.export.exported import Verification, load, save, verify
from pyrnode.export.torch_flow import TorchFlow, to_torch

__all__ = ["TorchFlow", "Verification", "load", "save", "to_torch", "verify"]
