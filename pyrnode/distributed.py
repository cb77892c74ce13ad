"""Processes that work on one thing together: those that torchrun started, or those of the caller's process group.

Everything that many processes do otherwise than one goes through a `World`. The number of processes is no part of a
result: each has its rows of every batch (`World.share`), with the noise that the rows have in one process
(`seeds.ShareNoise`); sums go over all of them, decisions are taken from what all have; and what fails in one fails in
all, so that nobody waits for who has given up. `alone` is one process: all of this, and nothing of torch.distributed.
"""

from __future__ import annotations

import atexit
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyrnode.errors import ConfigError, ProcessError
from pyrnode.seeds import Share

T = TypeVar("T")

PROMPT = 50
"""Seconds that a process waits for the others in a step, once steps have proved short."""

_START = timedelta(minutes=10)
"""How long processes that were launched together wait for each other to begin."""

_PATIENT = timedelta(days=1)
"""The same where one may have much to do: a download, a validation, Julia's start. A process that ends is noticed at
once all the same, by its connections."""


class World:
    """One process, which is all there is; what a method does with several, its words say.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> Share | None:
        """Which rows of so many are this process's; `None` for all of them."""
        return None

    def sum(self, values: Tensor, *, patient: bool) -> Tensor:
        """The sum over the processes, in place of `values`; the same bits in all of them.

        Args:
            values: Numbers, on any device.
            patient: Whether the others may be much later.

        Raises:
            ProcessError: Another process has ended, or does not answer.
        """
        return values

    def gathered(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each of the processes, by rank; what it raises in one is raised in all.

        Raises:
            ProcessError: Another process has ended, or failed in a way that cannot be sent.
        """
        return [work()]

    def once(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which alone does it; what it raises is raised in all."""
        return work()

    def together(self, work: Callable[[], T], *, in_turn: bool = False) -> T:
        """What `work` gives in this process, while all do it; what it raises in one is raised in all.

        Args:
            work: What to do.
            in_turn: The first process does it before the others, then one on each machine: what it leaves on a disk is
                there for the rest.
        """
        return work()


alone: World = World()
"""One process."""


class Processes(World):
    """Several processes, over torch.distributed: gloo, and NCCL between GPUs where each process has its own.

    All of them must make it, and call its methods in the same order.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            _begin()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._prompt: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=PROMPT))
        self._patient: Any = dist.new_group(backend="gloo", timeout=_PATIENT)
        self._between_gpus: Any = None

    def share(self, count: int) -> Share:
        least, more = divmod(count, self.size)
        first = self.rank * least + min(self.rank, more)
        return Share(first, least + (self.rank < more), count)

    def sum(self, values: Tensor, *, patient: bool) -> Tensor:
        import torch.distributed as dist

        with self._answered(_PATIENT.total_seconds() if patient else PROMPT):
            if values.device.type == "cuda" and backend(values.device) == "nccl":
                if self._between_gpus is None:
                    torch.cuda.set_device(values.device)
                    self._between_gpus = dist.new_group(backend="nccl", timeout=timedelta(minutes=10))
                dist.all_reduce(values, group=self._between_gpus)
                return values
            near = values.cpu()
            dist.all_reduce(near, group=self._patient if patient else self._prompt)
            return values if near is values else values.copy_(near)

    def gathered(self, work: Callable[[], T]) -> list[T]:
        import torch.distributed as dist

        mine = self._attempt(work)
        found: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(found, (mine.value, mine.sent), group=self._patient)
        for number, (_, error) in enumerate(found):
            if error is not None:
                raise _everywhere((mine.error if number == self.rank else None) or error)
        return [value for value, _ in found]

    def once(self, work: Callable[[], T]) -> T:
        import torch.distributed as dist

        mine = self._attempt(work) if self.first else _Attempt(None, None, None)
        found = [(mine.value, mine.sent)]
        with self._answered():
            dist.broadcast_object_list(found, src=0, group=self._patient)
        value, error = found[0]
        if error is not None:
            raise _everywhere(mine.error or error)
        result: T = mine.value if self.first else value
        return result

    def together(self, work: Callable[[], T], *, in_turn: bool = False) -> T:
        kept: list[T] = []

        def mine() -> None:
            kept.append(work())

        turn = (0 if self.first else 1 if local_rank() == 0 else 2) if in_turn else 0
        for now in range(3 if in_turn else 1):
            self.gathered(mine if now == turn else _nothing)
        return kept[0]

    def _attempt(self, work: Callable[[], Any]) -> _Attempt:
        try:
            return _Attempt(work(), None, None)
        except Exception as error:  # whatever it is: the others must not wait
            sent: Exception = error
            try:
                pickle.loads(pickle.dumps(error))  # our own, made a line above
            except Exception:  # of a class whose arguments are not its message
                sent = ProcessError(f"process {self.rank} failed: {type(error).__name__}: {error}")
            return _Attempt(None, error, sent)

    @contextmanager
    def _answered(self, seconds: float = _PATIENT.total_seconds()) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.size} lost the others: one of them has ended, which see, or has not "
                f"answered for {seconds:g} s ({str(error).splitlines()[0][:200]}). A run with a folder goes on from "
                "its last checkpoint: start it again with --resume"
            ) from error


@dataclass(frozen=True)
class _Attempt:
    """What came of an attempt: a value, or an error, and the error as it is sent to others."""

    value: Any
    error: Exception | None
    sent: Exception | None


def _nothing() -> None:
    """What a process does while it is another's turn."""


def _everywhere(error: Exception) -> Exception:
    """An error that all processes raise: who reports it in the first need not in the others."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def _begin() -> None:
    """Makes the process group of those that were launched together."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=_START)))
        store = PrefixStore(roll_call(store, rank, size), store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_START)
    except RuntimeError as error:
        raise ProcessError(
            f"this process ({os.environ['RANK']} of {os.environ['WORLD_SIZE']}) does not reach the others by "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0][:200]}. Look "
            "whether all were started, and whether one has ended, which see"
        ) from error
    atexit.register(_end)


def roll_call(store: Any, rank: int, size: int) -> str:
    """A name that these processes have in common, and none before them had.

    torchrun gives the processes of a restart the store of those that have ended, with their addresses in it, and counts
    restarts on every machine by itself; who reads before the others have written waits for the dead
    (https://github.com/pytorch/pytorch/issues/135712). So each writes a mark of its own, the first writes down whose
    marks it sees, and who finds its mark there answers.

    Args:
        store: Of torch.distributed, the same for all.
        rank: Number of this process.
        size: Number of processes.

    Raises:
        RuntimeError: The others have not come within the store's time.
    """
    mine, limit = uuid.uuid4().hex, time.monotonic() + _START.total_seconds()
    store.set(f"mark {rank}", mine)
    written: list[str] = []
    while time.monotonic() < limit:
        if rank == 0:
            marks = [mine, *(str(store.get(f"mark {other}"), "ascii") for other in range(1, size))]
            if marks != written:
                store.set("roll", " ".join(written := marks))
            if store.check([f"{mine} {other}" for other in range(1, size)]):
                return mine
        else:
            name, *others = str(store.get("roll"), "ascii").split()
            if mine in others:
                store.set(f"{name} {rank}", "here")
                return name
        time.sleep(0.02)
    raise RuntimeError(f"timed out after {_START.total_seconds():g} s")


def _end() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


# -- what the launcher says ------------------------------------------------------------------------------------------

_world: list[Processes] = []


def world() -> World:
    """The processes that work together with this one; all of them must ask for it.

    They are those of torch.distributed where the caller has set that up, else those that torchrun (or who sets RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT as it does) has started; without either, this one process.
    """
    if not _world:
        if not (_set_up() or launched()):
            return alone
        _world.append(Processes())
    return _world[0]


def present() -> World:
    """What `world` has given before; one process where nobody has asked, or there is no other."""
    return _world[0] if _world else alone


def _set_up() -> bool:
    """Whether there is a process group of several."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return _number("WORLD_SIZE", 1) > 1 and all(os.environ.get(key) for key in ("RANK", "MASTER_ADDR", "MASTER_PORT"))


def shard() -> tuple[int, int]:
    """Number of this process among those that RANK and WORLD_SIZE speak of, and how many they are: 0 of 1 without."""
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < max(1, size):
        raise ConfigError(f"RANK = {rank}, WORLD_SIZE = {size}: expected a rank from 0 to {size - 1}")
    return rank, max(1, size)


def local_rank() -> int:
    """Number of this process among those on its machine; 0 where no launcher says it."""
    return _number("LOCAL_RANK", 0)


def local_size() -> int:
    """How many processes there are on this machine; 1 where no launcher says it."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name) or str(otherwise)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: expected a whole number, as torchrun sets it") from None


def launch() -> str | None:
    """What the processes of one launch have in common across torchrun's restarts; `None` without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {socket.gethostname()} {os.getppid()}"  # the agent outlives its workers


def restarted() -> bool:
    """Whether torchrun started this process in place of one that failed."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def backend(device: torch.device) -> str:
    """What carries sums between processes that compute on such a device: ``"nccl"`` or ``"gloo"``."""
    import torch.distributed as dist

    own = local_size() <= torch.cuda.device_count()
    return "nccl" if device.type == "cuda" and own and dist.is_nccl_available() else "gloo"
