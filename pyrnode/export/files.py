"""Exported files: written with examples of their own, and checked against them wherever they have got to.

Three kinds: a ``torch.export`` program (``.pt2``), an ONNX model, and safetensors with a JSON description. Each carries
a few inputs and the outputs that the flow gave for them when it was exported.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrnode import files
from pyrnode.errors import CheckpointError, ConfigError, PyrnodeError, unknown_name
from pyrnode.export import programs
from pyrnode.export.description import build, describe, dtype_name, settings
from pyrnode.export.torch_flow import TorchFlow
from pyrnode.version import VERSION

FORMAT = 1
"""Version of what is written into programs."""

TARGETS = ("torch.export", "safetensors", "onnx")

TOLERANCES = {"float32": 1e-4, "float64": 1e-9}
"""Largest difference, absolute or (for values above 1) relative, with which an output still agrees."""

_KIND = "torch module"
_EXAMPLES, _SEED = 4, 0
_DRAWS, _SHARE_TOLERANCE = 256, 0.25  # of an ONNX sampler: nearly six standard errors of the difference of two shares


@dataclass(frozen=True)
class Verification:
    """How far a file is from the outputs that it carries.

    Attributes:
        target: ``"torch.export"``, ``"safetensors"`` or ``"onnx"``.
        program: The pass that the file holds; ``"all"`` for safetensors.
        differences: For every output the largest difference, absolute or (for values above 1) relative.
        tolerance: With how much of it the file still agrees.
        versions: The versions that wrote the file.
    """

    target: str
    program: str
    differences: dict[str, float]
    tolerance: float
    versions: dict[str, str]

    @property
    def largest(self) -> float:
        """The largest difference of all outputs."""
        return max(self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "largest": self.largest}

    def __str__(self) -> str:
        each = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        largest = f"largest difference {self.largest:.1e} (allowed: {self.tolerance:g})"
        return f"{self.target}, {self.program}: {largest}; {each}"


def save(flow: TorchFlow, path: str | Path, *, to: str = "torch.export", program: str | None = None) -> Verification:
    """Writes a flow to a file that runs without pyrnode, and checks the file.

    Programs are written for the CPU, wherever the flow is; `torch.export.passes.move_to_device_pass` moves one.

    Args:
        flow: What `Flow.to_torch` gives.
        path: File to write, atomically.
        to: ``"torch.export"`` (a program for PyTorch), ``"onnx"`` (a program for onnxruntime and others; the extra
            ``onnx``), or ``"safetensors"`` (the tensors, with a JSON description of the structure in the header).
        program: Which pass a program holds: ``"encode"`` (``x -> z, log_det, log_prob``; the default), ``"decode"``
            (``z -> x``) or ``"sample"`` (``n -> x``). Batches may have any size. A safetensors file holds all.

    Returns:
        How far the outputs of the written file are from the flow's.

    Raises:
        ConfigError: The solver is adaptive (programs need fixed steps), or the flow cannot be described or traced.
        EngineUnavailableError: The extra ``onnx`` is not installed.
        CheckpointError: The file could not be written, or does not agree with the flow.
    """
    if to not in TARGETS:
        raise ConfigError(unknown_name("export target", to, TARGETS))
    if flow.reference.device.type != "cpu":
        flow = copy.deepcopy(flow).cpu()
    dtype = dtype_name(flow.reference.dtype)
    if dtype not in TOLERANCES:
        raise ConfigError(f"a module of {dtype} cannot be exported; convert it: module.to(torch.float32)")
    if to == "safetensors":
        if program is not None:
            raise ConfigError(f"program = {program!r}: a safetensors file holds the whole flow; leave it out")
        _save_tensors(flow, path)
    else:
        program = program or "encode"
        if program not in programs.PROGRAMS:
            raise ConfigError(unknown_name("program", program, programs.PROGRAMS))
        content = _program_bytes(flow, to, program)
        files.write_atomically(path, content)
    return verify(path)


def verify(path: str | Path) -> Verification:
    """Runs an exported file on the inputs that it carries, and compares with the outputs that it carries.

    Raises:
        CheckpointError: The file is missing, truncated, foreign, of another version, or does not agree.
        EngineUnavailableError: It is an ONNX file and the extra ``onnx`` is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    content = path.read_bytes()
    if content[:2] == b"PK":
        result = _verify_torch(path, content)
    elif content[8:10] == b'{"':
        result = _verify_tensors(path)
    else:
        result = _verify_onnx(path, content)
    if not result.largest <= result.tolerance:  # a NaN does not agree
        raise CheckpointError(f"{path} does not agree with the outputs that it carries: {result}; export it again")
    return result


def load(path: str | Path) -> TorchFlow:
    """The module of a safetensors export; programs are loaded with their own runtimes.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, foreign, or of another version.
    """
    return _load(path)[0]


def _versions() -> dict[str, str]:
    return {"pyrnode": VERSION, "torch": torch.__version__}


# -- examples --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _examples(flow: TorchFlow, program: str) -> tuple[dict[str, Tensor | int], dict[str, Tensor]]:
    """Inputs drawn from the flow, and its outputs."""
    if program == "sample":
        given = _one_context(flow)
        return {"n": _EXAMPLES, **given}, {"x": flow.sample(_EXAMPLES, given.get("context"), seed=_SEED)}
    context = example_contexts(flow)
    given = {} if context is None else {"context": context}
    x = flow.sample(1, context, seed=_SEED)[:, 0] if given else flow.sample(_EXAMPLES, seed=_SEED)
    z, log_det, log_prob = programs.Encode(flow)(x, context)
    if program == "decode":
        return {"z": z, **given}, {"x": flow.inverse(z, context)}
    return {"x": x, **given}, {"z": z, "log_det": log_det, "log_prob": log_prob}


def _one_context(flow: TorchFlow) -> dict[str, Tensor]:
    """The context of a sampler's example, ``(m,)``, where it takes one."""
    contexts = example_contexts(flow)
    return {} if contexts is None else {"context": contexts[0]}


def example_contexts(flow: TorchFlow) -> Tensor | None:
    """Contexts of the examples, ``(4, m)``, such as the flow was trained on: normal once they are standardised."""
    if not flow.context_dim:
        return None
    c = torch.randn(_EXAMPLES, flow.context_dim, generator=torch.Generator().manual_seed(_SEED)).to(flow.reference)
    return flow.context_transform.inverse(c)


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float(((actual - expected).abs() / expected.abs().clamp(min=1)).max())


def _tensor(values: Any, dtype: str) -> Tensor:
    return torch.tensor(values, dtype=getattr(torch, dtype))


# -- programs --------------------------------------------------------------------------------------------------------


def _program_bytes(flow: TorchFlow, to: str, program: str) -> bytes:
    inputs, outputs = _examples(flow, program)
    example = tuple(inputs.values())
    table: dict[str, Any] = {
        "format": FORMAT,
        "program": program,
        "versions": _versions(),
        "event_shape": list(flow.event_shape),
        "levels": flow.levels,
        "context_dim": flow.context_dim,
        "dtype": dtype_name(flow.reference.dtype),
        **settings(flow),
        "inputs": {name: v.tolist() if isinstance(v, Tensor) else v for name, v in inputs.items()},
        "input_dtypes": {name: dtype_name(v.dtype) for name, v in inputs.items() if isinstance(v, Tensor)},
        "outputs": {name: v.tolist() for name, v in outputs.items()},
        "tolerance": TOLERANCES[dtype_name(flow.reference.dtype)],
    }
    if to == "torch.export":
        return programs.to_bytes(programs.to_program(flow, program, example), {"pyrnode.json": json.dumps(table)})
    if flow.reference.dtype != torch.float32:
        raise ConfigError("onnxruntime computes networks in float32 only; convert the module: module.to(torch.float32)")
    if program == "sample":
        x = flow.sample(_DRAWS, _one_context(flow).get("context"), seed=_SEED)
        median = x.median(0).values
        table |= {"inputs": table["inputs"] | {"n": _DRAWS}, "outputs": {}, "tolerance": _SHARE_TOLERANCE}
        table |= {"median": median.tolist(), "shares": _shares(x, median).tolist()}
    model = programs.to_onnx(flow, program, example)
    entry = model.metadata_props.add()
    entry.key, entry.value = "pyrnode", json.dumps(table)
    content: bytes = model.SerializeToString()
    return content


def _shares(x: Tensor, median: Tensor) -> Tensor:
    """Share of the samples below and above a median, ``(2, *event)``: bounded, whatever the tails of the density."""
    near = 1e-4 * median.abs().clamp(min=1)
    return torch.stack(((x < median - near).double().mean(0), (x > median + near).double().mean(0)))


def _table(path: Path, text: str | bytes | None) -> dict[str, Any]:
    """The JSON that a program carries, checked."""
    try:
        table = json.loads(text or "")
        version = table["format"]
        if not {"program", "versions", "dtype", "inputs", "input_dtypes", "outputs", "tolerance"} <= table.keys():
            raise KeyError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is a program, but not one that pyrnode exported") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of pyrnode reads format {FORMAT}")
    assert isinstance(table, dict)
    return table


def _result(target: str, table: Mapping[str, Any], differences: dict[str, float]) -> Verification:
    return Verification(target, table["program"], differences, table["tolerance"], dict(table["versions"]))


def _verify_torch(path: Path, content: bytes) -> Verification:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith("extra/pyrnode.json")]
            text = archive.read(names[0]) if names else None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated, or not a torch.export file ({error}); copy or export it again"
        ) from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} does not match its checksum; export it again")
    table = _table(path, text)
    try:
        module = torch.export.load(io.BytesIO(content)).module()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            dtype = table["dtype"]
            types = table["input_dtypes"]
            values = [v if isinstance(v, int) else _tensor(v, types[k]) for k, v in table["inputs"].items()]
            outputs = module(*values)
    except PyrnodeError:
        raise
    except Exception as error:  # torch raises what it likes for a program of another version
        wrote = table["versions"].get("torch")
        message = f"{path} does not run in torch {torch.__version__} (written by torch {wrote}): {error}"
        raise CheckpointError(f"{message}; export it again with this version, or install torch {wrote}") from error
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = [(name, _tensor(v, dtype)) for name, v in table["outputs"].items()]
    differences = {name: _difference(out, want) for out, (name, want) in zip(outputs, expected, strict=True)}
    return _result("torch.export", table, differences)


def _verify_onnx(path: Path, content: bytes) -> Verification:
    programs.require_onnx()
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types have no common base
        raise CheckpointError(
            f"{path} is truncated, or none of what pyrnode exports (torch.export, safetensors, ONNX); copy or export "
            f"it again ({error})"
        ) from None
    table = _table(path, session.get_modelmeta().custom_metadata_map.get("pyrnode"))
    feeds = {
        k: np.asarray(v, dtype=np.int64 if isinstance(v, int) else table["input_dtypes"][k])
        for k, v in table["inputs"].items()
    }
    try:
        outputs = [torch.from_numpy(out) for out in session.run(None, feeds)]
    except Exception as error:
        raise CheckpointError(f"{path} does not run in onnxruntime {onnxruntime.__version__}: {error}") from None
    if table["program"] == "sample":
        shares = _shares(outputs[0], _tensor(table["median"], table["dtype"]))
        return _result("onnx", table, {"share of x": _difference(shares, _tensor(table["shares"], "float64"))})
    expected = [(name, _tensor(v, table["dtype"])) for name, v in table["outputs"].items()]
    return _result("onnx", table, {k: _difference(o, want) for o, (k, want) in zip(outputs, expected, strict=True)})


# -- safetensors -----------------------------------------------------------------------------------------------------


def _save_tensors(flow: TorchFlow, path: str | Path) -> None:
    inputs, outputs = _examples(flow, "encode")
    with torch.no_grad():
        values = {**inputs, **outputs, "decoded": flow.inverse(outputs["z"], example_contexts(flow))}
    examples = {f"example.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    context = {"context": "example.context"} if flow.context_dim else {}
    description = {
        **describe(flow),
        "versions": _versions(),
        "examples": {
            "encode": {"x": "example.x", **context, **{name: f"example.{name}" for name in outputs}},
            "decode": {"z": "example.z", **context, "x": "example.decoded"},
        },
        "tolerance": TOLERANCES[dtype_name(flow.reference.dtype)],
    }
    files.write(path, _KIND, {**flow.state_dict(), **examples}, description)


def _load(path: str | Path) -> tuple[TorchFlow, dict[str, Tensor], dict[str, Any]]:
    """The flow, the examples, and the description."""
    tensors, description = files.read(path, _KIND)
    examples = {name: tensors.pop(name) for name in list(tensors) if name.startswith("example.")}
    try:
        return build(description, tensors), examples, description
    except (KeyError, TypeError, AttributeError, RuntimeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a flow of this version: {error}") from error


@torch.no_grad()
def _verify_tensors(path: Path) -> Verification:
    flow, examples, description = _load(path)
    x, context = examples["example.x"], examples.get("example.context")
    outputs = dict(zip(programs.Encode.outputs, programs.Encode(flow)(x, context), strict=True))
    differences = {name: _difference(value, examples[f"example.{name}"]) for name, value in outputs.items()}
    differences["x"] = _difference(flow.inverse(examples["example.z"], context), examples["example.decoded"])
    return _result("safetensors", {**description, "program": "all"}, differences)
