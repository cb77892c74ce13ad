"""Exported files: written with examples of their own, and checked against them wherever they have got to.

Three kinds: a ``torch.export`` program (``.pt2``), an ONNX model, and safetensors with a JSON description. Each carries
a few inputs and the outputs that the flow gave for them when it was exported. A program is code: it is run only where
its user says that it is trusted, and is else compared with its digest.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrnode import files
from pyrnode.errors import CheckpointError, ConfigError, PyrnodeError, unknown_name
from pyrnode.export import containers, programs
from pyrnode.export.description import build, describe, dtype_name, settings
from pyrnode.export.torch_flow import TorchFlow
from pyrnode.seeds import seeded
from pyrnode.version import VERSION

FORMAT = 2  # of what is written into programs

SUFFIXES = {"torch.export": ".pt2", "safetensors": ".safetensors", "onnx": ".onnx"}
"""The kinds of files, and how the names of each end; a name that ends in none of them may be of any kind."""

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
        differences: For every output the largest difference, absolute or (for values above 1) relative; empty for a
            program that was not run, of which only structure and digest are known to be right.
        tolerance: With how much of it the file still agrees.
        versions: The versions that wrote the file.
    """

    target: str
    program: str
    differences: dict[str, float]
    tolerance: float
    versions: dict[str, str]

    @property
    def executed(self) -> bool:
        """Whether the file was run on its inputs."""
        return bool(self.differences)

    @property
    def largest(self) -> float:
        """The largest difference of all outputs; NaN where nothing was run."""
        return max(self.differences.values(), default=math.nan)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "largest": self.largest if self.executed else None, "executed": self.executed}

    def __str__(self) -> str:
        if not self.executed:
            return (
                f"{self.target}, {self.program}: whole, as its digest says; not run, for a program is code: "
                "--trust (trust=True) compares its outputs"
            )
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
    if to not in SUFFIXES:
        raise ConfigError(unknown_name("export target", to, SUFFIXES))
    path, named = Path(path), _named(path)
    if named not in (None, to):
        raise ConfigError(f"{path} is the name of a {named} file, not of {to}: let it end in {SUFFIXES[to]}")
    if flow.reference.device.type != "cpu":
        flow = copy.deepcopy(flow).cpu()
    dtype = dtype_name(flow.reference.dtype)
    if dtype not in TOLERANCES:
        raise ConfigError(f"a module of {dtype} cannot be exported; convert it: module.to(torch.float32)")
    if to == "safetensors":
        if program is not None:
            raise ConfigError(f"program = {program!r}: a safetensors file holds the whole flow; leave it out")
        _save_tensors(flow, path)
        return verify(path)
    program = program or "encode"
    if program not in programs.PROGRAMS:
        raise ConfigError(unknown_name("program", program, programs.PROGRAMS))
    content = _program_bytes(flow, to, program)
    files.write_atomically(path, content)
    if path.read_bytes() != content:  # what is run next is what was made here
        raise CheckpointError(f"{path} is not what was written to it; export it again")
    return _agreeing(path, _verify_program(path, content, to, trust=True))


def verify(path: str | Path, *, trust: bool = False) -> Verification:
    """Checks a file against what it carries: the digest of its content, and examples of inputs with their outputs.

    A safetensors file holds numbers and is run. A program (``.pt2``, ``.onnx``) is code of whoever made it: it is run
    if `trust` says so; else nothing of it is executed or unpickled, and only structure and digest are looked at. The
    digest tells of damage, not of intent: whoever changes a program can change it as well.

    Args:
        path: What `save` wrote.
        trust: Run a program on its examples.

    Raises:
        CheckpointError: The file is missing, truncated, foreign, of another version, not of the kind that its name
            says, or does not agree.
        EngineUnavailableError: It is an ONNX file to be run and the extra ``onnx`` is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    with path.open("rb") as file:
        start = file.read(10)
    found = "torch.export" if start[:2] == b"PK" else "safetensors" if start[8:] == b'{"' else "onnx"
    named = _named(path)
    if named not in (None, found):
        raise CheckpointError(
            f"{path} is named as a {named} file, and is truncated or something else; nothing of it was run: "
            "copy or export it again"
        )
    if found == "safetensors":
        return _agreeing(path, _verify_tensors(path))
    return _agreeing(path, _verify_program(path, path.read_bytes(), found, trust=trust))


def _named(path: str | Path) -> str | None:
    """The kind of file that a name speaks of, if any."""
    suffix = Path(path).suffix.lower()
    return next((target for target, ending in SUFFIXES.items() if ending == suffix), None)


def _agreeing(path: Path, result: Verification) -> Verification:
    if result.executed and not result.largest <= result.tolerance:  # a NaN does not agree
        raise CheckpointError(f"{path} does not agree with the outputs that it carries: {result}; export it again")
    return result


@torch.inference_mode(False)
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
    """The context of a sampler's example, ``(*shape)``, where it takes one."""
    contexts = example_contexts(flow)
    return {} if contexts is None else {"context": contexts[0]}


def example_contexts(flow: TorchFlow) -> Tensor | None:
    """Contexts of the examples, ``(4, *shape)``, such as the flow was trained on: normal once they are standardised."""
    if not flow.context_dim:
        return None
    generator = torch.Generator("cpu").manual_seed(_SEED)
    c = torch.randn(_EXAMPLES, *flow.context_shape, generator=generator, dtype=torch.float32, device="cpu")
    return flow.context_transform.inverse(c.to(flow.reference)).to(flow.data_dtype or flow.reference.dtype)


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
        return containers.seal_archive(programs.to_bytes(programs.to_program(flow, program, example)), table)
    if flow.reference.dtype != torch.float32:
        raise ConfigError("onnxruntime computes networks in float32 only; convert the module: module.to(torch.float32)")
    if program == "sample":
        x = flow.sample(_DRAWS, _one_context(flow).get("context"), seed=_SEED)
        median = x.median(0).values
        table |= {"inputs": table["inputs"] | {"n": _DRAWS}, "outputs": {}, "tolerance": _SHARE_TOLERANCE}
        table |= {"median": median.tolist(), "shares": _shares(x, median).tolist()}
    return containers.seal_model(programs.to_onnx(flow, program, example).SerializeToString(), table)


def _shares(x: Tensor, median: Tensor) -> Tensor:
    """Share of the samples below and above a median, ``(2, *event)``: bounded, whatever the tails of the density."""
    near = 1e-4 * median.abs().clamp(min=1)
    return torch.stack(((x < median - near).double().mean(0), (x > median + near).double().mean(0)))


def _verify_program(path: Path, content: bytes, target: str, *, trust: bool) -> Verification:
    table = (containers.open_archive if target == "torch.export" else containers.open_model)(path, content)
    carried = _carried(path, table)
    if not trust:
        return carried.result(target, {})
    outputs = _run_torch(path, content, carried) if target == "torch.export" else _run_onnx(path, content, carried)
    expected = carried.outputs
    if carried.median is not None and len(outputs) == 1:
        outputs = [_shares(outputs[0], carried.median)]
    if len(outputs) != len(expected):
        raise CheckpointError(f"{path} gives {len(outputs)} outputs, and carries {len(expected)}; export it again")
    differences = map(_difference, outputs, expected.values())
    return carried.result(target, dict(zip(expected, differences, strict=True)))


@dataclass(frozen=True)
class _Carried:
    """What a program carries: inputs, the outputs that it should give, and with how much of a difference."""

    program: str
    inputs: dict[str, Tensor | int]
    outputs: dict[str, Tensor]
    median: Tensor | None  # of a sampler in ONNX, whose one output is the shares below and above it
    tolerance: float
    versions: dict[str, str]

    def result(self, target: str, differences: dict[str, float]) -> Verification:
        return Verification(target, self.program, differences, self.tolerance, self.versions)


def _carried(path: Path, table: Mapping[str, Any]) -> _Carried:
    """The table of a program in its own types: the one place where it is read."""
    if table["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {table['format']!r:.40}; this version of pyrnode reads format {FORMAT}: export it again"
        )
    try:
        program, dtype, versions = table["program"], table["dtype"], table["versions"]
        types = table["input_dtypes"]
        if not set(types.values()) <= TOLERANCES.keys():
            raise ValueError("types of the inputs")
        inputs = {k: v if isinstance(v, int) else _tensor(v, types[k]) for k, v in table["inputs"].items()}
        outputs = {k: _tensor(v, dtype) for k, v in table["outputs"].items()}
        median = _tensor(table["median"], dtype) if "median" in table else None
        largest = TOLERANCES[dtype]
        if median is not None:
            outputs, largest = {"share of x": _tensor(table["shares"], "float64")}, _SHARE_TOLERANCE
        tolerance, known = float(table["tolerance"]), programs.PROGRAMS[program]
        if not 0 <= tolerance <= largest or tuple(inputs) != known.inputs[: len(inputs)] or not inputs:
            raise ValueError("inputs or tolerance")
        if median is None and tuple(outputs) != known.outputs:
            raise ValueError("outputs")
        if not all(isinstance(value, str) for value in versions.values()):
            raise TypeError("versions")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not describe a program of this version: {error}") from None
    return _Carried(program, inputs, outputs, median, tolerance, dict(versions))


def _run_torch(path: Path, content: bytes, carried: _Carried) -> Sequence[Tensor]:
    try:
        module = torch.export.load(io.BytesIO(content)).module()
        with torch.no_grad(), seeded(_SEED):
            outputs = module(*carried.inputs.values())
    except PyrnodeError:
        raise
    except Exception as error:  # torch raises what it likes for a program of another version
        wrote = carried.versions.get("torch")
        message = f"{path} does not run in torch {torch.__version__} (written by torch {wrote}): {error}"
        raise CheckpointError(f"{message}; export it again with this version, or install torch {wrote}") from error
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _run_onnx(path: Path, content: bytes, carried: _Carried) -> Sequence[Tensor]:
    programs.require_onnx()
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    feeds = {k: np.asarray(v, np.int64) if isinstance(v, int) else v.numpy() for k, v in carried.inputs.items()}
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(out) for out in session.run(None, feeds)]
    except Exception as error:  # onnxruntime's own types have no common base
        raise CheckpointError(f"{path} does not run in onnxruntime {onnxruntime.__version__}: {error}") from None


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


def _load(path: str | Path) -> tuple[TorchFlow, dict[str, Tensor], Verification]:
    """The flow, the examples, and what is known before they are compared."""
    tensors, description = files.read(path, _KIND)
    examples = {name: tensors.pop(name) for name in list(tensors) if name.startswith("example.")}
    try:
        flow = build(description, tensors)
        versions, tolerance = description["versions"], float(description["tolerance"])
        if not 0 <= tolerance <= TOLERANCES[description["dtype"]] or not isinstance(versions, dict):
            raise ValueError("tolerance or versions")
        names = ("x", "z", "log_det", "log_prob", "decoded", *(["context"] if flow.context_dim else []))
        if examples.keys() != {f"example.{name}" for name in names}:
            raise ValueError("the examples are not there")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a flow of this version: {error}") from error
    return flow, examples, Verification("safetensors", "all", {}, tolerance, versions)


@torch.no_grad()
def _verify_tensors(path: Path) -> Verification:
    flow, examples, known = _load(path)
    x, context = examples["example.x"], examples.get("example.context")
    outputs = dict(zip(programs.Encode.outputs, programs.Encode(flow)(x, context), strict=True))
    differences = {name: _difference(value, examples[f"example.{name}"]) for name, value in outputs.items()}
    differences["x"] = _difference(flow.inverse(examples["example.z"], context), examples["example.decoded"])
    return replace(known, differences=differences)
