"""A flow's structure as JSON: all that it takes to compute it from its tensors, here or in another program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyrnode import solvers
from pyrnode.config import Divergence, SolverConfig
from pyrnode.dynamics.layered import LayeredDynamics
from pyrnode.dynamics.layers import Layer
from pyrnode.errors import ConfigError, unknown_name
from pyrnode.export.torch_flow import TorchFlow
from pyrnode.parts import Block, FactorOut, Squeeze
from pyrnode.transforms import Chain, Dequantize, Logit, Standardize, Transform

READING = {
    "encode": "x -> transforms in order -> parts in order -> z, flattened; log_det sums the log-determinants; "
    "log_prob = -(|z|^2 + d log(2 pi))/2 + log_det, in nats. decode runs everything backwards.",
    "standardize": "y = (x - mean)/std, in double precision; log_det = -sum(log std)",
    "dequantize": "y = x/levels, x = p + u with u in [0, 1); log_det = -d log(levels)",
    "logit": "q = alpha + (1 - 2 alpha) x, y = log q - log(1 - q); "
    "log_det = sum(log(1 - 2 alpha) - log q - log(1 - q))",
    "squeeze": "(C, H, W) -> (4C, H/2, W/2): channel 4c + 2i + j of pixel (h, w) is channel c of (2h + i, 2w + j)",
    "factor_out": "the second half of the channels goes to z, in order, before what remains at the end",
    "block": "dz/dt = f(z, t), dl/dt = trace(df/dz), from t = 0 to end_time; log_det = l(end_time)",
    "dynamics": "h = z; for every layer h = activation(a(h, t)), without activation after the last: f",
    "layer": "dense: W h = weight h; convolution: cross-correlation, stride 1, zero padding that keeps the size. "
    "time none: a = W h + bias; concat: a = W h + bias + t W' 1, where W' is time_weight on one more channel of ones; "
    " concatsquash: a = (W h + bias) sigmoid(t gate_weight + gate_bias) + t time_shift, by output channel",
    "context": "of a conditional flow, the same for all t: through context_transforms, then times the block's context "
    "matrix; the result is cut into one piece for each layer: none and concat: a vector of the output channels, added "
    "to a; concatsquash: two of them, the first added to a, the second inside the sigmoid",
    "solver": "explicit Runge-Kutta with nodes c, matrix a and weights b, on a grid of step_size whose last step is "
    "shortened; or adaptive with rtol and atol",
    "divergence": "exact: the trace; hutchinson: the mean over the block's stored probes e of e . (df/dz) e",
}
"""What the words of a description mean."""


def describe(flow: TorchFlow) -> dict[str, Any]:
    """The structure of a flow, with the names of the tensors that it uses.

    Raises:
        ConfigError: A block has dynamics of the user's own, or there is a transform that no description knows.
    """
    table = {
        "reading": READING,
        "event_shape": list(flow.event_shape),
        "levels": flow.levels,
        "dtype": dtype_name(flow.reference.dtype),
        "data_dtype": None if flow.data_dtype is None else dtype_name(flow.data_dtype),
        "transforms": _transforms("transform", flow.transform),
        "context_dim": flow.context_dim,
        "features": None if flow.features is None else list(flow.features),
        "context_features": None if flow.context_features is None else list(flow.context_features),
        "context_transforms": _transforms("context_transform", flow.context_transform),
        "parts": [_part(f"parts.{i}", part) for i, part in enumerate(flow.parts)],
        **settings(flow),
    }
    if flow.probes:
        table["divergence"]["tensors"] = [f"noise_{i}" for i, _ in enumerate(flow.blocks)]
    return table


def settings(flow: TorchFlow) -> dict[str, Any]:
    """Solver and divergence."""
    given, tableau = flow.solver, solvers.method(flow.solver.name).tableau
    steps = ("rtol", "atol") if solvers.adaptive(given) else ("step_size",)
    solver: dict[str, Any] = {"name": given.name, **{key: getattr(given, key) for key in steps}}
    divergence: dict[str, Any] = {"kind": flow.divergence.kind}
    if flow.probes:
        divergence |= {"probes": flow.probes, "seed": flow.divergence.seed}
    coefficients = {"c": list(tableau.c), "a": [list(row) for row in tableau.a], "b": list(tableau.b)}
    return {"solver": solver | coefficients, "divergence": divergence}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _transforms(prefix: str, chain: Chain) -> list[dict[str, Any]]:
    return [_transform(f"{prefix}.transforms.{i}", transform) for i, transform in enumerate(chain.transforms)]


def _transform(prefix: str, transform: nn.Module) -> dict[str, Any]:
    if isinstance(transform, Standardize):
        return {"kind": "standardize", "tensors": {"mean": f"{prefix}.mean", "std": f"{prefix}.std"}}
    if isinstance(transform, Dequantize):
        return {"kind": "dequantize", "levels": transform.levels}
    if isinstance(transform, Logit):
        return {"kind": "logit", "alpha": transform.alpha}
    raise ConfigError(f"a transform of type {type(transform).__name__} has no description; export to torch.export")


def _part(prefix: str, part: nn.Module) -> dict[str, Any]:
    if isinstance(part, Squeeze):
        return {"kind": "squeeze"}
    if isinstance(part, FactorOut):
        return {"kind": "factor_out"}
    assert isinstance(part, Block)
    dynamics = part.dynamics
    if not isinstance(dynamics, LayeredDynamics):
        raise ConfigError(
            "dynamics of your own are code, which a safetensors file cannot hold; export to torch.export or onnx, "
            "whose programs hold the operations themselves"
        )
    layers = [_layer(f"{prefix}.dynamics.layers.{i}", cast(Layer, layer)) for i, layer in enumerate(dynamics.layers)]
    return {
        "kind": "block",
        "end_time": part.end_time,
        "event_shape": list(dynamics.event_shape),
        "activation": dynamics.activation,
        "layers": layers,
        **({"context": f"{prefix}.dynamics.context.weight"} if dynamics.context_dim else {}),
    }


def _layer(prefix: str, layer: Layer) -> dict[str, Any]:
    outputs, inputs, *kernel_size = layer.weight.shape
    return {
        "kind": "dense" if layer.size is None else "convolution",
        "time": layer.time,
        "inputs": inputs,
        "outputs": outputs,
        **({} if layer.size is None else {"kernel": kernel_size, "image": list(layer.size)}),
        "tensors": {name: f"{prefix}.{name}" for name, _ in layer.named_parameters()},
    }


def build(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TorchFlow:
    """The flow of a description; what does not fit raises `KeyError`, `TypeError`, `RuntimeError` or `ConfigError`."""
    shape, context_dim = tuple(description["event_shape"]), description["context_dim"]
    solver, divergence = description["solver"], description["divergence"]
    given = {key: solver[key] for key in ("name", "step_size", "rtol", "atol") if key in solver}
    flow = TorchFlow(
        Chain(_build_transform(entry, shape) for entry in description["transforms"]),
        [_build_part(entry, context_dim) for entry in description["parts"]],
        shape,
        description["levels"],
        solver=SolverConfig(adaptive="step_size" not in solver, **given),
        data_dtype=None if (given_dtype := description["data_dtype"]) is None else getattr(torch, given_dtype),
        divergence=Divergence(divergence["kind"], divergence.get("probes"), divergence.get("seed", 0)),
        context_transform=Chain(_build_transform(entry, (context_dim,)) for entry in description["context_transforms"]),
    )
    flow = flow.to(getattr(torch, description["dtype"]))
    flow.load_state_dict(dict(tensors))
    for key in ("features", "context_features"):
        names = description.get(key)
        setattr(flow, key, None if names is None else tuple(map(str, names)))
    return flow.eval()


def _build_transform(entry: Mapping[str, Any], shape: tuple[int, ...]) -> Transform:
    kind = entry["kind"]
    if kind == "standardize":
        return Standardize(torch.zeros(shape), torch.ones(shape))
    if kind == "dequantize":
        return Dequantize(entry["levels"])
    if kind == "logit":
        return Logit(entry["alpha"])
    raise ConfigError(unknown_name("transform", kind, ("standardize", "dequantize", "logit")))


def _build_part(entry: Mapping[str, Any], context_dim: int) -> nn.Module:
    kind = entry["kind"]
    if kind == "squeeze":
        return Squeeze()
    if kind == "factor_out":
        return FactorOut()
    if kind != "block":
        raise ConfigError(unknown_name("part", kind, ("block", "squeeze", "factor_out")))
    layers = [
        Layer(
            layer["inputs"],
            layer["outputs"],
            time=layer["time"],
            kernel_size=tuple(layer.get("kernel", ())),
            size=tuple(layer["image"]) if "image" in layer else None,
        )
        for layer in entry["layers"]
    ]
    if not math.isfinite(entry["end_time"]):
        raise ConfigError(f"end_time = {entry['end_time']!r}: expected a finite number")
    dynamics = LayeredDynamics(layers, entry["activation"], tuple(entry["event_shape"]), context_dim)
    return Block(dynamics, entry["end_time"])
