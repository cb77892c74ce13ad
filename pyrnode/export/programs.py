"""The passes of a fixed-step flow as programs of their own: for `torch.export`, and for ONNX."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyrnode.dynamics import Potential
from pyrnode.dynamics.layered import LayeredDynamics
from pyrnode.engines.plain import PlainEngine, Recorded
from pyrnode.errors import ConfigError, EngineUnavailableError, PyrnodeError
from pyrnode.export.torch_flow import TorchFlow, unexportable


class Encode(nn.Module):
    """``x -> z, log_det, log_prob``; of a conditional flow ``x, context -> ...``."""

    inputs, outputs = ("x", "context"), ("z", "log_det", "log_prob")

    def __init__(self, flow: TorchFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        passage = self.flow.passage(x, context)
        return passage.z, passage.log_det, passage.log_prob


class Decode(nn.Module):
    """``z -> x``; of a conditional flow ``z, context -> x``."""

    inputs, outputs = ("z", "context"), ("x",)

    def __init__(self, flow: TorchFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.inverse(z, context)


class Sample(nn.Module):
    """``n -> x``, drawn with the runtime's own generator; of a conditional flow ``n, context -> x``, one context."""

    inputs, outputs = ("n", "context"), ("x",)

    def __init__(self, flow: TorchFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, n: int, context: Tensor | None = None) -> Tensor:
        return self.flow.inverse(torch.randn(n, self.flow.dim, dtype=self.flow.reference.dtype, device="cpu"), context)


Inputs = tuple[Tensor | int, ...]
"""The example inputs of a program: samples, latents or a number, and contexts where the flow takes them."""

Program = Encode | Decode | Sample

PROGRAMS: dict[str, type[Program]] = {"encode": Encode, "decode": Decode, "sample": Sample}


def _prepared(flow: TorchFlow) -> TorchFlow:
    """A copy that can be traced, its probes as they are and its foreign dynamics recorded.

    Raises:
        ConfigError: The solver is adaptive.
    """
    if not isinstance(flow.engine, PlainEngine):
        raise unexportable(flow.solver)
    flow = copy.deepcopy(flow).eval()
    for block in flow.blocks:
        if not isinstance(block.dynamics, LayeredDynamics | Potential):
            shape = block.dynamics.event_shape
            count = flow.probes or torch.Size(shape).numel()
            block.dynamics = Recorded(block.dynamics, count)  # type: ignore[assignment]
    return flow


def to_program(flow: TorchFlow, name: str, example: Inputs) -> torch.export.ExportedProgram:
    """A pass of the flow as a `torch.export` program with a batch of any size.

    Raises:
        ConfigError: The solver is adaptive, or torch cannot trace the dynamics.
    """
    from torch.export import Dim

    batch: Any = {0: Dim("batch", min=1)}
    shapes: Any = (batch,) * len(example)
    if isinstance(example[0], int):  # a number of samples, all of one context
        shapes = (Dim.DYNAMIC, *[None] * (len(example) - 1))
    try:
        with torch.no_grad(), _quiet():
            program = PROGRAMS[name](_prepared(flow)).eval()
            return torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
    except PyrnodeError:
        raise
    except Exception as error:  # whatever torch's tracer raises: its own types change from version to version
        raise ConfigError(f"torch.export cannot trace this flow: {_first_line(error)}") from error


def to_onnx(flow: TorchFlow, name: str, example: Inputs) -> Any:
    """A pass of the flow as an ONNX model (``onnx.ModelProto``) with a batch of any size.

    Raises:
        EngineUnavailableError: The extra ``onnx`` is not installed.
        ConfigError: The solver is adaptive, or the exporter cannot do the dynamics.
    """
    require_onnx()
    program = to_program(flow, name, example)
    try:
        with torch.no_grad(), _quiet():
            result = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(PROGRAMS[name].inputs[: len(example)]),
                output_names=list(PROGRAMS[name].outputs),
                dynamic_shapes=None if isinstance(example[0], int) else tuple({0: "batch"} for _ in example),
            )
            assert result is not None
            return result.model_proto
    except Exception as error:
        raise ConfigError(f"the ONNX exporter cannot do this flow: {_first_line(error)}") from error


def require_onnx() -> None:
    """Raises `EngineUnavailableError` where the packages of the extra ``onnx`` are missing."""
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineUnavailableError(f"ONNX needs {', '.join(missing)}: pip install 'pyrnode[onnx]'")


def to_bytes(program: torch.export.ExportedProgram) -> bytes:
    """The content of a ``.pt2`` file."""
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks about its own parts, and the exporters' progress messages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
