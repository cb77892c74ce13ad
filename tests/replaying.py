"""CUDA graphs on the pretended device: operations that are kept, with their memory, and done again on replay.

As on a GPU nothing of Python's takes part in a replay. Every operation reads and writes the memory that it had when it
was recorded; what was allocated then came from a pool, and went back to it, for later operations and later graphs, as
soon as nobody held it any more. To record is not to compute: what was in memory before is there after it, and what is
new is NaN until a replay.
Waits and uploads cannot be recorded, nor can memory of others be read that they have given back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_map

from pyrnode.engines.graphs import Results
from tests.pretend import Device


class Place(NamedTuple):
    """A tensor in memory that is held elsewhere."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(x: torch.Tensor) -> Place:
        return Place(x.untyped_storage(), x.dtype, x.size(), x.stride(), x.storage_offset())

    def tensor(self) -> torch.Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(self.storage, self.offset, self.size, self.stride)


def _holders(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Pool:
    """Memory that recorded operations share."""

    def __init__(self) -> None:
        self.blocks: list[torch.UntypedStorage] = []
        self.reused = 0

    def take(self, size: int) -> torch.UntypedStorage:
        """Memory that nobody holds, or new."""
        for block in self.blocks:
            if block.nbytes() == size and _holders(block) == 1:
                self.reused += 1
                return block
        self.blocks.append(torch.UntypedStorage(size, device="cpu"))
        return self.blocks[-1]

    def holds(self, x: torch.Tensor) -> torch.UntypedStorage | None:
        """The block that a tensor lies in."""
        where = x.untyped_storage().data_ptr()
        return next((block for block in self.blocks if where and block.data_ptr() == where), None)


@dataclass
class Tape:
    """A graph: operations with the places of their operands and results."""

    device: Device
    calls: list[tuple[Any, Any, Any, list[Place | None]]] = field(default_factory=list, repr=False)
    theirs: dict[int, torch.UntypedStorage] = field(default_factory=dict, repr=False)  # by address
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.device.counts.kernels["graph"] += 1
        for storage in self.theirs.values():
            if _holders(storage) <= 1:
                raise RuntimeError("a graph reads memory that was given back")
        for func, args, kwargs, results in self.calls:
            real = tree_map(lambda x: x.tensor() if isinstance(x, Place) else x, (args, kwargs), is_leaf=_is_place)
            out = func(*real[0], **real[1])
            for place, x in zip(results, _tensors(out), strict=True):
                if place is not None:
                    place.tensor().copy_(x)


def _is_place(x: Any) -> bool:
    return isinstance(x, Place)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class Replaying:
    """A recorder (`engines.graphs.Recorder`) for the pretended device.

    Attributes:
        tapes: The graphs so far.
        broken: What is wrong with it: it fails at that graph (1 is the first), or that graph's results are others.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.pool, self.tapes = device, Pool(), list[Tape]()
        self.fails: int | None = None
        self.lies: int | None = None

    def record(self, work: Callable[[], Results]) -> tuple[Tape, Results]:
        device, tape, counted = self.device, Tape(self.device), self.device.reset()
        if self.fails == len(self.tapes) + 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        kept = [(block, _bytes(block).clone()) for block in self.pool.blocks]
        device.execute, plain = (lambda *call: self._kept(tape, *call)), device.execute
        try:
            found = work()
        finally:
            device.execute = plain
            counts = device.reset()
            device.counts = counted
        if counts.waits or counts.uploads:
            raise RuntimeError(f"operation not permitted when stream is capturing: {counts.report()}")
        for block in self.pool.blocks[len(kept) :]:
            _bytes(block).fill_(255)  # of any type a NaN, or nonsense
        for block, content in kept:
            _bytes(block).copy_(content)
        self.tapes.append(tape)
        if self.lies == len(self.tapes):
            tape.calls = tape.calls[:-1]
        return tape, found

    def _kept(self, tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
        known = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        results: list[Place | None] = []

        def moved(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            storage = x.untyped_storage()
            if storage.data_ptr() in known or not storage.nbytes():
                results.append(None)  # a view, or what was written to
                return x
            block = self.pool.take(storage.nbytes())
            there = torch.empty(0, dtype=x.dtype).set_(block, x.storage_offset(), x.size(), x.stride())
            there.copy_(x)
            results.append(Place(block, *Place.of(there)[1:]))
            return there

        out = tree_map(moved, out)
        places = tree_map(lambda x: self._place(tape, x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        if func._schema.is_mutable or any(place is not None for place in results):
            tape.calls.append((func, *places, results))
        return out

    def _place(self, tape: Tape, x: torch.Tensor) -> Place:
        block = self.pool.holds(x)
        if block is not None:
            return Place(block, *Place.of(x)[1:])
        storage = tape.theirs.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        return Place(storage, *Place.of(x)[1:])
