"""Networks between a context and the blocks: how they are given, what they take and give, and how a file names them.

    raw context (n, *shape) --standardised where it is a vector--> embedding --> (n, m), which joins every block

A context of any shape becomes a vector by a network that is trained with the flow: an image by convolutions, a time
series by a recurrent one. A file of a flow holds such a network's tensors, and never its code: it names the function or
class that made it, with settings that are plain values. Nothing is imported or called because a file says so; whoever
loads it names the function too (`Recipe.stored`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyrnode.errors import ConfigError
from pyrnode.seeds import derive, seeded
from pyrnode.settings import shown

Given = nn.Module | Callable[..., nn.Module] | str
"""An embedding as its user gives it: a module, or what makes one; a text is ``"module:function"``."""

_ROWS = 2
"""Contexts of a trial."""


@dataclass(frozen=True)
class Recipe:
    """How an embedding is made, once for each flow that is built.

    Attributes:
        call: Makes it.
        name: ``"module:function"`` of what does; `None` where nobody else could find it by a name.
        settings: Its keyword arguments.
    """

    call: Callable[..., nn.Module]
    name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, embedding: Given) -> Self:
        """Of what a user gives.

        Args:
            embedding: A module, which is copied for each flow; a function or class that makes one; `functools.partial`
                of either, for its settings; or ``"module:function"``, which is imported.

        Raises:
            ConfigError: It is none of these, or cannot be imported.
        """
        if isinstance(embedding, nn.Module):
            return cls(lambda: copy.deepcopy(embedding))
        call, settings = embedding, dict[str, Any]()
        if isinstance(embedding, functools.partial):
            if embedding.args:
                raise ConfigError(f"embedding: give settings by their names, partial({_named(embedding.func)}, key=…)")
            call, settings = embedding.func, dict(embedding.keywords)
        call = _imported(call) if isinstance(call, str) else call
        if not callable(call):
            raise ConfigError(
                f"embedding = {shown(embedding)}: expected an nn.Module, a function or class that makes one, "
                "functools.partial of either, or 'module:function'"
            )
        return cls(call, _path(call), settings)

    @classmethod
    def stored(cls, embedding: Given | None, description: object, path: object) -> Self | None:
        """Of what a file says that was made there, with what its user says that may be called.

        Args:
            embedding: A function or class, or ``"module:function"``.
            description: What `Embedding.description` gave; `None` for a flow without an embedding.
            path: The file, for messages.

        Raises:
            ConfigError: One of the two is missing, or the function comes with settings, which are the file's.
        """
        if not isinstance(description, Mapping):
            if embedding is not None:
                raise ConfigError(f"{path} has no embedding: leave embedding out")
            return None
        name, settings = shown(description.get("factory")), description.get("settings")
        if embedding is None:
            raise ConfigError(
                f"{path} has an embedding, whose code is not in the file. It was made by {name} with "
                f"{shown(settings)}: load it with embedding= that function or class (in Python), or its name "
                "'module:function', which is then imported (of pyrnode sample and export: --embedding)"
            )
        if isinstance(embedding, nn.Module | functools.partial):
            raise ConfigError(
                f"embedding: expected the function or class {name} itself, or its name; its settings are the file's"
            )
        found = cls.of(embedding)
        given = settings if isinstance(settings, Mapping) else {}
        return cls(found.call, found.name, {str(key): value for key, value in given.items()})

    def make(self, seed: int) -> nn.Module:
        """The network, drawn from a seed where it is drawn.

        Raises:
            ConfigError: What makes it fails, or gives no module.
        """
        try:
            with seeded(derive(seed, "embedding")):
                network = self.call(**self.settings)
        except Exception as error:  # the user's own code, with settings that may be a file's
            raise ConfigError(f"embedding: {self.name or 'what makes it'} failed with {_line(error)}") from error
        if not isinstance(network, nn.Module):
            raise ConfigError(f"embedding: {self.name or 'it'} gives a {type(network).__name__}: expected an nn.Module")
        return network

    def described(self) -> dict[str, Any] | None:
        """What a file says of it; `None` where no file could."""
        if self.name is None or not _plain(self.settings):
            return None
        return {"factory": self.name, "settings": dict(self.settings)}


class Embedding(nn.Module):
    """A network from contexts ``(batch, *shape)`` to vectors ``(batch, m)``, trained with the flow.

    Args:
        network: The network.
        shape: Shape of one context.
        width: Number of features m.
        origin: What made it, and with which settings, for files; `None` where no file can say.
    """

    def __init__(
        self, network: nn.Module, shape: tuple[int, ...], width: int, origin: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.shape, self.width, self.origin = tuple(shape), width, origin

    @classmethod
    def build(
        cls, recipe: Recipe, shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, width: int | None = None
    ) -> Self:
        """A new one, tried on contexts of zeros where its width is not known.

        Args:
            recipe: How it is made.
            shape: Shape of one context.
            dtype: Type of its parameters.
            seed: Seed of its initial weights.
            width: Number of features, where that is known.

        Raises:
            ConfigError: It cannot be made, or does not take such contexts, or does not give vectors.
        """
        network = recipe.make(seed).to(dtype)
        meta = torch.get_default_device().type == "meta"  # whose tensors have no values
        network = network if meta else network.to("cpu")
        lazy = any(isinstance(p, nn.UninitializedParameter) for p in network.parameters())
        if width is None or lazy:
            found = _tried(network, torch.zeros(_ROWS, *shape, dtype=dtype, device="meta" if meta else "cpu"), seed)
            if width not in (None, found):
                raise ConfigError(f"embedding: it gives {found} features, expected {width}")
            width = found
        return cls(network, shape, width, recipe.described())

    def forward(self, context: Tensor) -> Tensor:
        vectors = self.network(context.clone())  # it may write to its input, which may be the user's own memory
        if not isinstance(vectors, Tensor) or tuple(vectors.shape[1:]) != (self.width,):
            given = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ConfigError(f"the embedding gave {given}: expected {self.width} features for each context, as before")
        if vectors.dtype != context.dtype:
            raise ConfigError(
                f"the embedding gave {vectors.dtype} for contexts of {context.dtype}: it must compute in the type of "
                "its input (of constants, torch.zeros(..., dtype=c.dtype))"
            )
        return vectors

    @torch.no_grad()
    def check(self, contexts: Tensor) -> None:
        """Raises `ConfigError` where a few contexts do not each have a finite vector of their own, by themselves.

        What mixes rows (a recurrent network that takes the batch for the time) would make a density of each sample that
        depends on the others.
        """
        with evaluating(self), seeded(0):
            both, alone = self(contexts), torch.cat([self(row[None]) for row in contexts])
        if not bool(torch.isfinite(both).all()):
            raise ConfigError("the embedding gives NaN or infinite features for the first contexts: scale its input")
        if both.shape != alone.shape or not torch.allclose(
            both, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())
        ):
            raise ConfigError(
                "the embedding gives a context other features beside others than alone: its first axis must be the "
                "batch (of nn.LSTM and nn.GRU batch_first=True), and no row may look at another"
            )

    def extra_repr(self) -> str:
        return f"shape={self.shape}, width={self.width}"


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """A module as it is in use: without dropout, with the running means of batch normalisation; then as it was."""
    if module is None or not module.training:
        yield
        return
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def drawing(module: nn.Module | None, device: torch.device, seed: int) -> Iterator[None]:
    """What a module draws of itself, such as dropout, from that seed: from torch's global generators, then put back."""
    if module is None:
        yield
        return
    if device.type != "cuda":
        with seeded(seed):
            yield
        return
    with torch.random.fork_rng(devices=[device]), seeded(seed):
        torch.cuda.manual_seed(seed)
        yield


def check_dividable(module: nn.Module | None) -> None:
    """Raises `ConfigError` where what a module gives depends on how a batch is divided between processes."""
    for name, part in () if module is None else module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"embedding: {name} normalises by the batch, of which each process has a share only: take "
                "nn.GroupNorm or nn.LayerNorm, or train in one process"
            )


def _tried(network: nn.Module, contexts: Tensor, seed: int) -> int:
    """How many features it gives of each context; makes parameters that wait for their first input."""
    try:
        with evaluating(network), torch.no_grad(), seeded(derive(seed, "embedding", "trial")):
            vectors = network(contexts)
    except Exception as error:  # the user's own code
        raise ConfigError(
            f"the embedding fails on contexts of shape {tuple(contexts.shape)}: {_line(error)}"
        ) from error
    expected = f"expected a tensor ({len(contexts)}, m), a vector of floating-point features for each"
    if not isinstance(vectors, Tensor):
        remedy = "; of a recurrent network take the last state, in a module of yours" * isinstance(vectors, tuple)
        raise ConfigError(
            f"the embedding gives a {type(vectors).__name__} for {len(contexts)} contexts: {expected}{remedy}"
        )
    if vectors.ndim != 2 or len(vectors) != len(contexts) or not vectors.shape[1] or not vectors.is_floating_point():
        remedy = "; end it with nn.Flatten()" if vectors.ndim > 2 and len(vectors) == len(contexts) else ""
        raise ConfigError(
            f"the embedding gives {tuple(vectors.shape)} of {vectors.dtype} for contexts of shape "
            f"{tuple(contexts.shape)}: {expected}{remedy}"
        )
    return vectors.shape[1]


def _path(call: Any) -> str | None:
    """``"module:function"``, where that leads to it."""
    module, name = getattr(call, "__module__", None), getattr(call, "__qualname__", None)
    found: Any = sys.modules.get(module) if isinstance(module, str) else None
    for part in name.split(".") if isinstance(name, str) else ():
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is not None and found is call else None


def _imported(name: str) -> Any:
    """The function or class that ``"module:function"`` names; whoever calls this has it from the user."""
    module, colon, inner = name.partition(":")
    if not colon or not module or not inner:
        raise ConfigError(f"embedding = {name!r}: expected 'module:function'")
    try:
        found: Any = importlib.import_module(module)
        for part in inner.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module of the user's raises
        raise ConfigError(f"embedding = {name!r} cannot be imported: {_line(error)}") from error
    return found


def _named(call: Any) -> str:
    return str(getattr(call, "__qualname__", type(call).__name__))


def _plain(settings: Mapping[str, Any]) -> bool:
    """Whether settings come back from JSON as they are."""
    try:
        return bool(json.loads(json.dumps(dict(settings))) == dict(settings))
    except (TypeError, ValueError, RecursionError):
        return False


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
