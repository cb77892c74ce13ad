"""A second device on a machine without one: every value is real, and every crossing between devices is seen.

Tensors "on" the device wrap a tensor of the CPU, so control flow that depends on values runs as it would on a GPU, and
results can be compared with the CPU's. `Device` is a dispatch mode that does what CUDA does about devices: it refuses
operations on tensors of two devices (but for numbers, `()`, and indices), counts kernels and copies, and notes where
every wait for the device is (`float(x)`, `bool(x)`, `.cpu()`, `nonzero`, indexing by a mask).

Without values (`pretended(values=False)`) nothing is computed: a step of any size is counted in seconds, and what is
read of the device is a half. What the device is not: a compiler, a driver or a clock. It says nothing of CUDA's own
faults, and nothing of time.

It is called "meta": a backward pass over tensors that call themselves "cuda" needs a driver, even for fake ones.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pyrnode import devices

DEVICE = torch.device("meta")
aten = torch.ops.aten

_FREE = {  # no kernel of their own
    aten.detach.default,
    aten.alias.default,
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.lift_fresh.default,
    aten._local_scalar_dense.default,
}
_WAITS = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal", "is_nonzero"}
_WAITS |= {"repeat_interleave"}
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
_LISTED = 30
"""Tensors that one launch of a `_foreach` operation goes through, about."""


class Pretend(torch.Tensor):
    """A tensor that says it is on `DEVICE`; its values are those of `inner`, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretend({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (Pretend, (self.inner,))

    __torch_function__ = torch._C._disabled_torch_function_impl

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:  # else a true meta tensor
        return torch.tensor(data, dtype=dtype or self.dtype, device="cpu").to(DEVICE)

    def tolist(self) -> Any:  # which torch refuses of a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = Device.current
        if mode is None:
            raise RuntimeError(f"{func}: outside the mode")
        with mode:
            return func(*args, **(kwargs or {}))


class _Generator(torch.Generator):
    """A generator of the device has the numbers of the CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        there = torch.device(device).type == DEVICE.type
        made = super().__new__(cls, "cpu" if there else device)
        made.there = there
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE if self.there else super().device


def _place() -> str:
    """The nearest line of the package under test."""
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.endswith("/pretend.py")]
    ours = [frame for frame in frames if "/pyrnode/" in frame.filename and "/site-packages/" not in frame.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.split('/pyrnode/')[-1]}:{frame.lineno} {frame.line}"


@dataclass
class Counts:
    """What came to the device; by operation, or by the line of the program that it came from."""

    kernels: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)  # device to host
    uploads: Counter = field(default_factory=Counter)  # host to device
    bytes_up: int = 0
    bytes_down: int = 0

    def report(self, most: int = 14) -> str:
        sums = [f"{sum(getattr(self, name).values())} {name}" for name in ("kernels", "waits", "uploads")]
        lines = [f"{', '.join(sums)}; {self.bytes_up} bytes up, {self.bytes_down} down"]
        lines += [", ".join(f"{name} {n}" for name, n in self.kernels.most_common(most))]
        for what in ("waits", "uploads"):
            lines += [f"{what[:-1]} {n:5d}x {place}" for place, n in getattr(self, what).most_common(most)]
        return "\n".join(lines)


def _execute(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on the tensors behind; whoever records operations takes the place of this (`replaying.py`)."""
    return func(*args, **kwargs)


class Device(TorchDispatchMode):
    """See above."""

    current: Device | None = None

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.counts, self.behind = Counts(), torch.device("cpu" if values else "meta")
        self.execute = _execute

    def reset(self) -> Counts:
        """What was counted since the last time."""
        counts, self.counts = self.counts, Counts()
        return counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        here = [x for x in leaves if isinstance(x, Pretend)]
        there = [x for x in leaves if not isinstance(x, Pretend)]
        for x in there:
            assert x.device.type == "cpu", f"a tensor that is truly on {x.device}, at {_place()}"
        target = kwargs.get("device")
        goes_here = torch.device(target).type == DEVICE.type if target is not None else bool(here)
        if target is not None and goes_here:
            kwargs["device"] = self.behind
        if name == "copy_" and here and there:
            self._crossed(args[1], up=isinstance(args[0], Pretend))
            goes_here = isinstance(args[0], Pretend)
        elif name == "_to_copy" and target is not None:
            kwargs.pop("non_blocking", None)
            if here and not goes_here:
                self._crossed(here[0], up=False)
                if self.behind == DEVICE:
                    return torch.full(here[0].shape, 0.5, dtype=torch.float64, device="cpu").to(here[0].dtype)
            elif there and goes_here:
                self._crossed(there[0], up=True)
        elif here and there and target is None:
            self._refuse(func, name, args, here, there)
        if here and self._waits(name, args):
            self.counts.waits[_place()] += 1
        if here and name == "_local_scalar_dense" and self.behind == DEVICE:
            return here[0].dtype.is_floating_point / 2
        inner = tree_map(lambda x: x.inner if isinstance(x, Pretend) else x, (args, kwargs))
        out = self.execute(func, *inner)
        if goes_here:
            self._launched(func, name, args)
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written:  # what was given comes back
            return self._given(func, written, args, kwargs, out)
        return tree_map(lambda x: Pretend(x) if isinstance(x, torch.Tensor) and goes_here else x, out)

    def _crossed(self, x: torch.Tensor, *, up: bool) -> None:
        size = x.numel() * x.element_size()
        if up:
            self.counts.uploads[_place()] += 1
            self.counts.bytes_up += size
        else:
            self.counts.waits[_place()] += 1
            self.counts.bytes_down += size

    def _refuse(self, func: Any, name: str, args: Any, here: list[Any], there: list[torch.Tensor]) -> None:
        big = [x for x in there if x.ndim]
        if name in _INDEXED and isinstance(args[0], Pretend):
            indices = [i for i in args[1] if i is not None and not isinstance(i, Pretend)]
            big = [x for x in big if not any(x is i for i in indices)]
            self.counts.uploads[_place()] += len(indices)
        if big:
            shapes = [(tuple(x.shape), "device" if isinstance(x, Pretend) else "cpu") for x in (*here, *there)]
            raise RuntimeError(f"{func} on two devices {shapes} at {_place()}")

    def _waits(self, name: str, args: Any) -> bool:
        masks = name in _INDEXED and any(isinstance(i, Pretend) and i.dtype == torch.bool for i in args[1])
        return masks or name in _WAITS or name == "_local_scalar_dense"

    def _launched(self, func: Any, name: str, args: Any) -> None:
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if view or func in _FREE:
            return
        listed = len(args[0]) if name.startswith("_foreach_") else 1
        self.counts.kernels[name] += -(-listed // _LISTED)

    def _given(self, func: Any, written: list[Any], args: Any, kwargs: Any, out: Any) -> Any:
        names = [a.name for a in func._schema.arguments]
        values = [kwargs[a.name] if a.name in kwargs else args[names.index(a.name)] for a in written]
        returns = func._schema.returns
        if not returns:
            return None
        if len(returns) == len(values):
            return values[0] if len(values) == 1 else tuple(values)
        return tree_map(lambda x: Pretend(x) if isinstance(x, torch.Tensor) else x, out)


@contextmanager
def pretended(*, values: bool = True, memory: int = 2**33) -> Iterator[Device]:
    """The device, with so many bytes of memory, for the time of a test."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` would leave `inner` behind
    devices.constants.cache_clear()  # which is told apart by device, and there are two of that name
    try:
        with (
            mock.patch.object(torch, "Generator", _Generator),
            mock.patch.object(devices, "memory", return_value=memory),
            mock.patch.object(Device, "current", Device(values)) as device,
            device,
        ):
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        devices.constants.cache_clear()


def to_device(x: torch.Tensor) -> Pretend:
    """A copy on the device."""
    return Pretend(x.detach().clone())


def host(x: torch.Tensor) -> torch.Tensor:
    """The values, without a wait that is counted."""
    return x.inner if isinstance(x, Pretend) else x.cpu()
