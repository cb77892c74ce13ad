"""A flow's structure as JSON: all that it takes to compute it from its tensors, here or in another program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyrnode import bounded, solvers
from pyrnode.bounded import Bounded, Periodic
from pyrnode.columns import ColumnsConfig
from pyrnode.config import Divergence, SolverConfig
from pyrnode.dynamics import Potential
from pyrnode.dynamics.activations import ACTIVATIONS
from pyrnode.dynamics.layered import LayeredDynamics
from pyrnode.dynamics.layers import Layer
from pyrnode.edges import Edges
from pyrnode.errors import ConfigError, unknown_name
from pyrnode.export.torch_flow import TorchFlow
from pyrnode.parts import Block, FactorOut, Squeeze
from pyrnode.radial import Radial
from pyrnode.transforms import Chain, Dequantize, Flatten, Logit, Standardize, Transform, Whiten

READING = {
    "encode": "x -> transforms in order -> parts in order -> z, flattened; log_det sums the log-determinants; "
    "log_prob = -(|z|^2 + d log(2 pi))/2 + log_det, in nats. decode runs everything backwards.",
    "standardize": "y = (x - mean)/std, in double precision; log_det = -sum(log std)",
    "whiten": "y_i = (sum_j x_j rotation_ji)/scale_i, in double precision; log_det = -sum(log scale)",
    "radial": "y = c f(k |x|^2) x, f(q) = asinh(sqrt q)/sqrt q, f(0) = 1, c = scale, k = curvature, in double "
    "precision; log_det = d log c + (d - 1) log f - log(1 + k |x|^2)/2",
    "edges": "by column, in double precision; its edges are those whose softness s is positive: p_s(u) = "
    "(u + sqrt(u^2 + s^2))/2; with both u = (x - low)/width and l = log p_soft_low(u) - log p_soft_high(1 - u); with "
    "low alone l = log(exp(p_soft_low(u)) - 1); with high alone u = (high - x)/width, l = log(exp(p_soft_high(u)) - "
    "1); y = k l/(1 + c l^2)^(1/4), k = sqrt(pi/8), c = k^4/4, and -y with high alone; y = x with none; log_det = "
    "sum(log |dy/dx|), and -inf where |u| > 1e100",
    "dequantize": "y = x/levels, x = p + u with u in [0, 1); log_det = -d log(levels)",
    "logit": "q = alpha + (1 - 2 alpha) x, y = log q - log(1 - q); "
    "log_det = sum(log(1 - 2 alpha) - log q - log(1 - q))",
    "bounded": "by column: y = log(x - low) where high is null, -log(high - x) where low is null, log(x - low) - "
    "log(high - x) with both, x with neither, in double precision; log_det = sum(log |dy/dx|), and -inf where a value "
    "is not strictly between its bounds. Decoded values are kept between them by the type's next number",
    "periodic": "by column that has a low and a high, P = high - low: a value x stands for the two x + kP within P of "
    "centre = c, and y = log(P + u - c) - log(P - u + c) of such a u, in double precision; log_det = sum(log |dy/dx|). "
    "z and log_det are those of the u within P/2 of c in all columns; log_prob = log sum exp over all choices of u. "
    "Decoded values are reduced to low <= x < high",
    "flatten": "(C, H, W) -> (C H W), channel by channel, row by row; log_det = 0",
    "squeeze": "(C, H, W) -> (4C, H/2, W/2): channel 4c + 2i + j of pixel (h, w) is channel c of (2h + i, 2w + j)",
    "factor_out": "the second half of the channels goes to z, in order, before what remains at the end",
    "block": "dz/dt = f(z, t), dl/dt = trace(df/dz), from t = 0 to end_time; log_det = l(end_time)",
    "dynamics": "h = z; for every layer h = activation(a(h, t)), without activation after the last: f",
    "potential": "dynamics of a block that has a w, an A and a b: f = -dPhi/dz of Phi = w . u + |A s|^2/2 + b . s, "
    "s = (z, t), or z where time is none; u of the first layer is activation(a), every other adds activation(a)/n to "
    "it, n the number of the others; a = weight u + bias, of the first layer weight s + bias. logcosh: log(2 cosh a)",
    "layer": "dense: W h = weight h; convolution: cross-correlation, stride 1, zero padding that keeps the size. "
    "time none: a = W h + bias; concat: a = W h + bias + t W' 1, where W' is time_weight on one more channel of ones; "
    " concatsquash: a = (W h + bias) sigmoid(t gate_weight + gate_bias) + t time_shift, by output channel",
    "context": "of a conditional flow, the same for all t: through context_transforms, then times the block's context "
    "matrix; the result is cut into one piece for each layer: none and concat: a vector of the output channels, added "
    "to a; concatsquash: two of them, the first added to a, the second inside the sigmoid. Of a potential two pieces: "
    "one added to the first layer's a, one to b",
    "solver": "explicit Runge-Kutta with nodes c, matrix a and weights b, on a grid of step_size whose last step is "
    "shortened; or adaptive with rtol and atol",
    "divergence": "exact: the trace; hutchinson: the mean over the block's stored probes e of e . (df/dz) e",
}
"""What the words of a description mean."""

_TRANSFORMS = ("standardize", "whiten", "radial", "edges", "bounded", "periodic", "dequantize", "logit", "flatten")


def describe(flow: TorchFlow) -> dict[str, Any]:
    """The structure of a flow, with the names of the tensors that it uses.

    Raises:
        ConfigError: A block has dynamics of the user's own, there is an embedding, or a transform that no description
            knows.
    """
    if flow.embedding is not None:
        raise ConfigError(
            "an embedding is code, which a safetensors file cannot hold; export to torch.export or onnx, whose "
            "programs hold the operations themselves"
        )
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
    if isinstance(transform, Whiten):
        return {"kind": "whiten", "tensors": {"rotation": f"{prefix}.rotation", "scale": f"{prefix}.scale"}}
    if isinstance(transform, Radial):
        return {"kind": "radial", "tensors": {"scale": f"{prefix}.scale", "curvature": f"{prefix}.curvature"}}
    if isinstance(transform, Edges):
        return {"kind": "edges", "tensors": {name: f"{prefix}.{name}" for name, _ in transform.named_buffers()}}
    if isinstance(transform, Bounded | Periodic):
        ends = {
            name: [value if math.isfinite(value) else None for value in getattr(transform, name).tolist()]
            for name in ("low", "high")
        }
        if isinstance(transform, Bounded):
            return {"kind": "bounded", **ends}
        return {"kind": "periodic", **ends, "tensors": {"centre": f"{prefix}.centre"}}
    if isinstance(transform, Dequantize):
        return {"kind": "dequantize", "levels": transform.levels}
    if isinstance(transform, Logit):
        return {"kind": "logit", "alpha": transform.alpha}
    if isinstance(transform, Flatten):
        return {"kind": "flatten"}
    raise ConfigError(f"a transform of type {type(transform).__name__} has no description; export to torch.export")


def _part(prefix: str, part: nn.Module) -> dict[str, Any]:
    if isinstance(part, Squeeze):
        return {"kind": "squeeze"}
    if isinstance(part, FactorOut):
        return {"kind": "factor_out"}
    assert isinstance(part, Block)
    dynamics = part.dynamics
    if isinstance(dynamics, Potential):
        return _potential(f"{prefix}.dynamics", dynamics, part.end_time)
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


def _potential(prefix: str, dynamics: Potential, end_time: float) -> dict[str, Any]:
    tensors = {name: f"{prefix}.{name}" for name, _ in dynamics.named_parameters(recurse=False)}
    layers = [
        {"tensors": {name: f"{prefix}.layers.{i}.{name}" for name, _ in layer.named_parameters()}}
        for i, layer in enumerate(dynamics.layers)
    ]
    return {
        "kind": "block",
        "end_time": end_time,
        "event_shape": list(dynamics.event_shape),
        "potential": {"width": len(dynamics.w), "rank": len(dynamics.A), "tensors": tensors},
        "time": "concat" if dynamics.timed else "none",
        "activation": dynamics.activation,
        "layers": layers,
        **({"context": f"{prefix}.context.weight"} if dynamics.context_dim else {}),
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
    """The flow of a description that `describe` made: the one place where a description is read and checked.

    It is put together without memory, and compared with the tensors that are there before it takes them: what a
    description claims costs nothing.

    Raises:
        ConfigError: It is not the description of a flow, or not of these tensors.
    """
    try:
        return _build(description, tensors)
    except Exception as error:  # JSON may hold anything in any place, and every type fails in a way of its own
        raise ConfigError(f"{type(error).__name__}: {error}") from error


def _build(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TorchFlow:
    shape, (context_dim,) = _sizes(description["event_shape"]), _sizes([description["context_dim"]], least=0)
    solver, divergence = description["solver"], description["divergence"]
    given = {key: solver[key] for key in ("name", "step_size", "rtol", "atol") if key in solver}
    transform = _build_chain(description["transforms"], "transform", tensors, shape)
    context_transform = _build_chain(description["context_transforms"], "context_transform", tensors, (context_dim,))
    levels = description["levels"]
    if levels is not None:
        _sizes([levels], least=2)
    with torch.device("meta"):
        parts = _build_parts(description["parts"], transform.shape(shape), context_dim)
    if divergence["kind"] != "exact":
        _check_probes(divergence["probes"], [part for part in parts if isinstance(part, Block)], tensors)
    flow = TorchFlow(
        transform,
        parts,
        shape,
        levels,
        solver=SolverConfig(adaptive="step_size" not in solver, **given),
        data_dtype=None if description["data_dtype"] is None else _dtype(description["data_dtype"]),
        divergence=Divergence(divergence["kind"], divergence.get("probes"), divergence.get("seed", 0)),
        context_transform=context_transform,
    )
    flow = flow.to(_dtype(description["dtype"]))
    own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in flow.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if own != found:
        name = next(name for name in [*own, *found] if own.get(name) != found.get(name))
        raise ConfigError(f"{name}: the description says {own.get(name)}, the file holds {found.get(name)}")
    flow.load_state_dict(dict(tensors), assign=True)
    flow.features = _names(description.get("features"), shape)
    flow.context_features = _names(description.get("context_features"), (context_dim,))
    return flow.eval()


def _sizes(values: Any, *, least: int = 1) -> tuple[int, ...]:
    """Whole numbers, at least `least`."""
    if not isinstance(values, list) or not all(type(v) is int and least <= v < 2**31 for v in values):
        raise ConfigError(f"{values!r:.80}: expected whole numbers from {least} on")
    return tuple(values)


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{name!r:.80} is no type of real numbers")
    return dtype


def _names(names: Any, shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """Names of columns, one for each."""
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or (len(names),) != shape:
        raise ConfigError(f"{names!r:.80}: expected a name for each of {shape} columns")
    return tuple(names)


def _check_probes(probes: Any, blocks: list[Block], tensors: Mapping[str, Tensor]) -> None:
    """Compares the claimed number with the probes that are there, before as many are drawn."""
    for i, block in enumerate(blocks):
        expected, found = (*_sizes([probes]), *block.dynamics.event_shape), tuple(tensors[f"noise_{i}"].shape)
        if expected != found:
            raise ConfigError(f"noise_{i}: the description says {expected}, the file holds {found}")


def _build_chain(
    entries: list[Mapping[str, Any]], name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Chain:
    """The transforms, each of which fits what the one before it leaves."""
    transforms = list[Transform]()
    for i, entry in enumerate(entries):
        transforms.append(_build_transform(entry, f"{name}.transforms.{i}", tensors, shape))
        shape = transforms[-1].shape(shape)
    return Chain(transforms)


def _build_transform(
    entry: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Transform:
    kind = entry["kind"]
    if kind == "standardize":
        mean, std = tensors[f"{prefix}.mean"], tensors[f"{prefix}.std"]
        if not tuple(mean.shape) == tuple(std.shape) == shape:
            raise ConfigError(f"{prefix}: mean and std of {tuple(mean.shape)} for data of {shape}")
        return Standardize(mean, std)
    if kind == "whiten":
        rotation, scale = tensors[f"{prefix}.rotation"], tensors[f"{prefix}.scale"]
        if tuple(rotation.shape) != (*shape, *shape) or tuple(scale.shape) != shape:
            raise ConfigError(f"{prefix}: {tuple(rotation.shape)} axes and {tuple(scale.shape)} scales for {shape}")
        return Whiten(rotation, scale)
    if kind == "radial":
        scale, curvature = tensors[f"{prefix}.scale"], tensors[f"{prefix}.curvature"]
        if len(shape) != 1 or scale.ndim or curvature.ndim:
            raise ConfigError(f"{prefix}: expected one scale and one curvature, of vectors, not of {shape}")
        return Radial(scale, curvature)
    if kind == "edges":
        found = [tensors[f"{prefix}.{name}"] for name in ("low", "high", "width", "soft_low", "soft_high")]
        if any(tuple(values.shape) != shape for values in found):
            raise ConfigError(f"{prefix}: {[tuple(values.shape) for values in found]} for data of {shape}")
        return Edges(*found)
    if kind in ("bounded", "periodic"):
        return _build_columns(entry, kind, prefix, tensors, shape)
    if kind == "dequantize":
        (levels,) = _sizes([entry["levels"]], least=2)
        return Dequantize(levels)
    if kind == "logit":
        return Logit(float(entry["alpha"]))
    if kind == "flatten":
        return Flatten(shape)
    raise ConfigError(unknown_name("transform", kind, _TRANSFORMS))


def _build_columns(
    entry: Mapping[str, Any], kind: str, prefix: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Transform:
    """The transform of columns with bounds, or with a period, checked as their settings are."""
    pairs = [*zip(entry["low"], entry["high"], strict=True)]
    given = {str(i): pair for i, pair in enumerate(pairs) if pair != (None, None)}
    columns = ColumnsConfig(bounds=given) if kind == "bounded" else ColumnsConfig(period=given)
    found = bounded.transforms(columns, shape)
    if (len(pairs),) != shape or not found:
        raise ConfigError(
            f"{prefix}: ends of {len(pairs)} columns, {len(given)} of which have some, for data of {shape}"
        )
    if kind == "periodic":
        centre = tensors[f"{prefix}.centre"]
        if tuple(centre.shape) != shape or not bool(torch.isfinite(centre).all()):
            raise ConfigError(f"{prefix}: a centre of {tuple(centre.shape)} for data of {shape}, or one not finite")
    return found[0]


def _build_parts(entries: list[Mapping[str, Any]], shape: tuple[int, ...], context_dim: int) -> list[nn.Module]:
    """The parts, each of which fits the state that the one before it leaves."""
    parts: list[nn.Module] = []
    for entry in entries:
        kind = entry["kind"]
        if kind == "block":
            parts.append(_build_block(entry, shape, context_dim))
        elif kind == "squeeze":
            if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
                raise ConfigError(f"a state of {shape} cannot be squeezed")
            parts.append(Squeeze())
            shape = Squeeze.shape(shape)
        elif kind == "factor_out":
            if len(shape) != 3 or shape[0] % 2:
                raise ConfigError(f"a state of {shape} cannot be factored out")
            parts.append(FactorOut())
            shape = FactorOut.shape(shape)
        else:
            raise ConfigError(unknown_name("part", kind, ("block", "squeeze", "factor_out")))
    return parts


def _build_block(entry: Mapping[str, Any], shape: tuple[int, ...], context_dim: int) -> Block:
    end_time, activation, channels = entry["end_time"], entry["activation"], shape[0]
    if isinstance(end_time, bool) or not (math.isfinite(end_time) and end_time > 0):
        raise ConfigError(f"end_time = {end_time!r}: expected a finite positive number")
    if "potential" in entry:
        return Block(_build_potential(entry, shape, context_dim), end_time)
    if activation not in ACTIVATIONS:
        raise ConfigError(unknown_name("activation", activation, ACTIVATIONS))
    layers = []
    for layer in entry["layers"]:
        inputs, outputs = _sizes([layer["inputs"], layer["outputs"]])
        kernel, image = _sizes(layer.get("kernel", [])), _sizes(layer["image"]) if "image" in layer else None
        fits = inputs == channels and image == (shape[1:] or None) and len(kernel) == (2 if image else 0)
        if not fits or any(side % 2 == 0 for side in kernel) or len(set(kernel)) > 1:
            raise ConfigError(f"a layer of {inputs} channels {image}, sides {kernel}, where the state is {shape}")
        size = (image[0], image[1]) if image else None
        layers.append(Layer(inputs, outputs, time=layer["time"], kernel_size=kernel, size=size))
        channels = outputs
    if not layers or channels != shape[0] or _sizes(entry["event_shape"]) != shape:
        raise ConfigError(
            f"a block of {entry['event_shape']!r:.80} with {channels} outputs, where the state is {shape}"
        )
    return Block(LayeredDynamics(layers, activation, shape, context_dim), end_time)


def _build_potential(entry: Mapping[str, Any], shape: tuple[int, ...], context_dim: int) -> Potential:
    width, rank = _sizes([entry["potential"]["width"], entry["potential"]["rank"]])
    if len(shape) != 1 or _sizes(entry["event_shape"]) != shape:
        raise ConfigError(f"a potential of {entry['event_shape']!r:.80}, where the state is {shape}")
    hidden, time = (width,) * len(entry["layers"]), entry["time"]
    return Potential(shape[0], hidden, activation=entry["activation"], time=time, rank=rank, context_dim=context_dim)
