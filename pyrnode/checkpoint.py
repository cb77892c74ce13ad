"""Flows as files: `Flow.save`, and `pyrnode.load`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyrnode import files
from pyrnode.composition import Composition
from pyrnode.config import Config
from pyrnode.dynamics import ModuleDynamics
from pyrnode.embedding import Given, Recipe
from pyrnode.errors import CheckpointError, ConfigError
from pyrnode.settings import shown

Built = TypeVar("Built", bound=Composition)


def save(flow: Composition, config: Config, path: str | Path) -> None:
    """Writes a flow and the settings that it was built from; see `Flow.save`."""
    if any(isinstance(block.dynamics, ModuleDynamics) for block in flow.blocks):
        raise ConfigError(
            "a flow with dynamics of your own cannot be rebuilt from a file; save flow.state_dict() with torch, "
            "and build the flow with Flow.build(config, event_shape, dynamics=...) to load it"
        )
    embedding = flow.embedding
    if embedding is not None and embedding.origin is None:
        raise ConfigError(
            "a flow whose embedding was given as a module, by a lambda, or with settings that are no plain values "
            "cannot be rebuilt from a file: give a function or class at the top level of a module, functools.partial "
            "for its settings; or save flow.state_dict() with torch, and build the flow with Flow.build(config, "
            "event_shape, embedding=..., context_shape=...) to load it"
        )
    description = {
        "config": config.to_dict(),
        "event_shape": flow.event_shape,
        "levels": flow.levels,
        "context_dim": flow.context_dim,
        "embedding": None if embedding is None else {**(embedding.origin or {}), "shape": embedding.shape},
        "features": flow.features,
        "context_features": flow.context_features,
        "data_dtype": None if flow.data_dtype is None else str(flow.data_dtype).removeprefix("torch."),
    }
    tensors = flow.state_dict()
    if embedding is not None:  # whose layers may share their weights
        tensors = {name: value.detach().clone() for name, value in tensors.items()}
    files.write(path, "flow", tensors, description)


def load(
    path: str | Path, build: Callable[..., Built], *, engine: str | None = None, embedding: Given | None = None
) -> Built:
    """Reads what `save` wrote.

    Args:
        path: The file, or the folder of a run (its best model on validation is read).
        build: Makes an untrained flow, as `Flow.build` does.
        engine: Engine to compute with; default the stored setting.
        embedding: What makes the embedding, where the flow has one (`pyrnode.load`).

    Raises:
        CheckpointError: The file is missing, truncated, damaged or foreign.
        ConfigError: There is no such engine; the embedding is missing, superfluous, or fails.
        EngineUnavailableError: The engine is not installed.
    """
    path = Path(path)
    path = path / "model.safetensors" if os.path.isdir(path) else path
    tensors, description = files.read(path, "flow")
    overrides = {} if engine is None else {"engine": engine}
    Config().override(overrides)  # an unknown engine is not the file's fault
    recipe = Recipe.stored(embedding, description.get("embedding"), path)
    with files.converted(f"{path} does not describe a flow of this version"):
        config, shape, more = _described(description, overrides)
        if recipe is not None:
            more |= {"embedding": recipe, "context_shape": _sizes(description["embedding"]["shape"])}
        _check_counts(config, tensors)
        with torch.device("meta"):  # nothing is allocated before it is known that the file has as much
            expected = build(config, shape, **more).state_dict()
        files.check_tensors(tensors, expected, types=False)
        flow = build(config, shape, **more)
        flow.load_state_dict(tensors)
    return flow


def _described(
    description: dict[str, Any], overrides: dict[str, Any]
) -> tuple[Config, tuple[int, ...], dict[str, Any]]:
    """Settings, shape, and the numbers of levels and of context features, and the type of the data, checked."""
    config = Config.from_dict(description["config"]).override(overrides)
    shape, levels, context_dim = (description[key] for key in ("event_shape", "levels", "context_dim"))
    if not isinstance(shape, list) or len(shape) not in (1, 3):
        raise CheckpointError(f"event_shape = {shown(shape)}: expected one or three sizes")
    for name, least, value in [("event_shape", 1, size) for size in shape] + [("context_dim", 0, context_dim)]:
        if type(value) is not int or not least <= value < 2**31:
            raise CheckpointError(f"{name}: {shown(value)} is no size")
    if levels is not None and (type(levels) is not int or not 2 <= levels < 2**31):
        raise CheckpointError(f"levels = {shown(levels)}: expected a number of grey levels")
    dtype = {None: None, "float32": torch.float32, "float64": torch.float64}[description["data_dtype"]]
    names = {key: _names(description.get(key)) for key in ("features", "context_features")}
    return config, tuple(shape), {"levels": levels, "context_dim": context_dim, "data_dtype": dtype, **names}


def _sizes(given: object) -> tuple[int, ...]:
    """The shape of a context, as a description has it."""
    if not isinstance(given, list) or not given or not all(type(size) is int and 1 <= size < 2**31 for size in given):
        raise CheckpointError(f"the embedding's shape = {shown(given)}: expected sizes")
    return tuple(given)


def _check_counts(config: Config, tensors: dict[str, Tensor]) -> None:
    """Raises `CheckpointError` for settings of more layers than there are tensors: each has one at least."""
    blocks, layers = config.flow.blocks, len(config.flow.network.hidden) + 1
    if blocks * layers > len(tensors):
        raise CheckpointError(f"Missing keys: {blocks} blocks of {layers} layers, and {len(tensors)} tensors in all")


def _names(given: object) -> tuple[str, ...] | None:
    """Names of columns as a description has them."""
    if given is not None and not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
        raise TypeError(f"names of columns: {given!r}")
    return None if given is None else tuple(given)
