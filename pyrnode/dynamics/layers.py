"""The layers of the dynamics, ``a = s(t) ⊙ (W h) + β(t)``, and their transposes.

A layer is a linear map (`Dense` or `Conv`) and the way in which time enters it (`NoTime`, `ConcatTime`,
`ConcatSquashTime`). Both are bound to their parameters for the length of one solve: what depends on the parameters
alone is computed once, gradients are accumulated in place, and nothing is recorded by autograd.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrnode.native import conv

Time = float | Tensor
"""A time: one number for the whole batch, or a tensor ``(batch,)`` where every sample has its own."""


class Linear(ABC):
    """A linear map bound to its weight, with its transpose and the accumulated gradient of the weight."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.gradient: Tensor | None = None

    @abstractmethod
    def __call__(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        """W h (+ shift): ``(batch, *in)`` to ``(batch, *out)``."""

    @abstractmethod
    def transpose(self, g: Tensor) -> Tensor:
        """Wᵀ g: ``(batch, *out)`` to ``(batch, *in)``."""

    @abstractmethod
    def accumulate(self, h: Tensor, g: Tensor) -> None:
        """Adds ``Σ g hᵀ`` to the gradient."""

    def weight_gradient(self) -> Tensor:
        """The accumulated gradient, of the weight's shape."""
        return torch.zeros_like(self.weight) if self.gradient is None else self.gradient

    @abstractmethod
    def constant(self, weight: Tensor) -> Tensor:
        """Response to an input channel that is 1 everywhere: ``(*out)``, of a weight ``(out, 1, *kernel_size)``."""

    @abstractmethod
    def constant_gradient(self, bar: Tensor, weight: Tensor) -> Tensor:
        """Transpose of `constant`: the gradient for `weight` from a cotangent ``(*out)``."""

    @abstractmethod
    def spread(self, channels: Tensor) -> Tensor:
        """Gives ``(..., out)`` the trailing dimensions that make it broadcast over ``(batch, *out)``."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor:
        """Transpose of `spread`: sums ``(batch, *out)`` over all but batch and channels, in the weight's type."""


class Dense(Linear):
    """``(batch, in)`` to ``(batch, out)``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.weight_t = weight.t()

    def __call__(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        return h @ self.weight_t if shift is None else torch.addmm(shift, h, self.weight_t)

    def transpose(self, g: Tensor) -> Tensor:
        return g @ self.weight

    def accumulate(self, h: Tensor, g: Tensor) -> None:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.weight)
        self.gradient.addmm_(g.t(), h)

    def constant(self, weight: Tensor) -> Tensor:
        return weight[:, 0]

    def constant_gradient(self, bar: Tensor, weight: Tensor) -> Tensor:
        return bar.unsqueeze(1)

    def spread(self, channels: Tensor) -> Tensor:
        return channels

    def gather(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype)


class Conv(Linear):
    """``(batch, in, H, W)`` to ``(batch, out, H, W)``: cross-correlation with zero padding, channels last.

    Channels-last convolutions reach about 1.5 times the throughput of the default layout on a CPU, and the transpose
    as a convolution with the flipped filter is never slower than the library's own backward-data.
    """

    def __init__(self, weight: Tensor, size: tuple[int, int]) -> None:
        super().__init__(weight)
        self.size = size
        self.padding = weight.shape[-1] // 2

    @functools.cached_property
    def _laid(self) -> Tensor:
        return channels_last(self.weight)

    @functools.cached_property
    def _flipped(self) -> Tensor:
        return channels_last(self.weight.flip(2, 3).transpose(0, 1))

    def __call__(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        a = F.conv2d(channels_last(h), self._laid, padding=self.padding)
        if shift is None:
            return a
        return a + shift if torch.is_grad_enabled() else a.add_(shift)

    def transpose(self, g: Tensor) -> Tensor:
        return F.conv2d(channels_last(g), self._flipped, padding=self.padding)

    def accumulate(self, h: Tensor, g: Tensor) -> None:
        gradient = _conv_weight_gradient(channels_last(h), channels_last(g), self._laid)
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient.add_(gradient)

    def constant(self, weight: Tensor) -> Tensor:
        response = F.conv2d(weight.new_ones(1, 1, *self.size), weight, padding=self.padding)
        return channels_last(response)[0]

    def constant_gradient(self, bar: Tensor, weight: Tensor) -> Tensor:
        return _conv_weight_gradient(weight.new_ones(1, 1, *self.size), bar.unsqueeze(0), weight)

    def spread(self, channels: Tensor) -> Tensor:
        return channels[..., None, None]

    def gather(self, x: Tensor) -> Tensor:
        return x.sum((-2, -1), dtype=self.weight.dtype)


class NativeConv(Conv):
    """A `Conv` whose sums are found by a kernel in C (`native.conv`) where autograd records nothing."""

    def __init__(self, weight: Tensor, size: tuple[int, int], kernel: conv.Convolution) -> None:
        super().__init__(weight, size)
        self.kernel = kernel

    def __call__(self, h: Tensor, shift: Tensor | None = None) -> Tensor:
        return super().__call__(h, shift) if torch.is_grad_enabled() else self.kernel(channels_last(h), shift)

    def transpose(self, g: Tensor) -> Tensor:
        return super().transpose(g) if torch.is_grad_enabled() else self.kernel.transpose(channels_last(g))

    def accumulate(self, h: Tensor, g: Tensor) -> None:
        self.kernel.accumulate(channels_last(h), channels_last(g), 1.0)

    def weight_gradient(self) -> Tensor:
        return self.kernel.gradient()


def _linear(weight: Tensor, size: tuple[int, int] | None, *, detached: bool) -> Linear:
    """The operator of a weight; a detached convolution is the kernel's in C, where there is one for it."""
    if size is None:
        return Dense(weight)
    kernel = conv.kernel(weight) if detached else None
    return Conv(weight, size) if kernel is None else NativeConv(weight, size, kernel)


def channels_last(x: Tensor) -> Tensor:
    """`x` ``(batch, C, H, W)`` in channels-last layout, also by its strides.

    With one channel both layouts are the same memory, and `contiguous` leaves strides from which a convolution infers
    the default layout for its output, whose many channels then have to be copied at every later step.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[1] == 1 and x.stride(1) != 1:
        x = x.as_strided(x.shape, (x.stride(0), 1, x.stride(2), x.stride(3)), x.storage_offset())
    return x


def _batch_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.sum(0)``, which on channels-last images takes ten times as long as in the order of their memory."""
    return x.permute(0, 2, 3, 1).sum(0, dtype=dtype).permute(2, 0, 1) if x.ndim == 4 else x.sum(0, dtype=dtype)


def _conv_weight_gradient(h: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    padding = weight.shape[-1] // 2
    _, gradient, _ = torch.ops.aten.convolution_backward(
        g, h, weight, None, (1, 1), (padding, padding), (1, 1), False, (0, 0), 1, (False, True, False)
    )
    return cast(Tensor, gradient)


class TimeEntry(ABC):
    """How time and context enter a layer: the scale s and shift β, and the gradients of what they are made of.

    The embedded context of a layer is made of vectors ``(batch, out)``, as many as `context_parts`, side by side.
    """

    context_parts = 1
    terms: tuple[str, ...]
    """The parameters by which time enters a dense layer, in the order of `native.adaptive`: b, v, u and g."""

    def __init__(self, linear: Linear, parameters: dict[str, Tensor]) -> None:
        self.linear = linear
        self.parameters = parameters
        self.settled: dict[str, Tensor] | None = None
        """The gradients by parameter name, the weight's too, where a kernel has found them."""

    @abstractmethod
    def at(self, t: Time, c: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """``(s, β)`` at time `t`, broadcastable over ``(batch, *out)``; s is `None` where it is 1."""

    @abstractmethod
    def accumulate(self, t: Time, c: Tensor | None, a_bar: Tensor, s_bar: Tensor | None) -> Tensor | None:
        """Adds the gradient from the cotangents of the layer's output and, elementwise, of its scale.

        Gives the cotangent of the embedded context, where there is one.
        """

    @abstractmethod
    def add(self, bars: Iterable[Tensor]) -> None:
        """Adds gradients of the `terms` of a dense layer, ``(out,)`` each."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """The accumulated gradients by parameter name."""


class NoTime(TimeEntry):
    """``a = W h + b + c``."""

    terms = ("bias",)

    def __init__(self, linear: Linear, parameters: dict[str, Tensor]) -> None:
        super().__init__(linear, parameters)
        self.shift = linear.spread(parameters["bias"])
        self.bias_bar = torch.zeros_like(parameters["bias"])

    def at(self, t: Time, c: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        return None, self.shift if c is None else self.shift + self.linear.spread(c)

    def accumulate(self, t: Time, c: Tensor | None, a_bar: Tensor, s_bar: Tensor | None) -> Tensor | None:
        gathered = self.linear.gather(a_bar)
        self.bias_bar.add_(gathered.sum(0))
        return None if c is None else gathered

    def add(self, bars: Iterable[Tensor]) -> None:
        (bias_bar,) = bars
        self.bias_bar.add_(bias_bar)

    def gradients(self) -> dict[str, Tensor]:
        return {"bias": self.bias_bar}


class ConcatTime(TimeEntry):
    """Time is one more input channel: ``a = W h + (b + t m + c)``, where m is the response to a channel of ones.

    Because that channel is constant, m does not depend on the state: it is a vector (dense) or a map with its own
    border (convolution), found once per solve, and the layer never sees the extra channel.
    """

    terms = ("bias", "time_weight")

    def __init__(self, linear: Linear, parameters: dict[str, Tensor]) -> None:
        super().__init__(linear, parameters)
        self.bias = linear.spread(parameters["bias"])
        self.shift_bar: Tensor | None = None
        self.time_bar: Tensor | None = None

    @functools.cached_property
    def response(self) -> Tensor:
        """The response m."""
        return self.linear.constant(self.parameters["time_weight"])

    def at(self, t: Time, c: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        if isinstance(t, Tensor):
            shift = self.bias + t.reshape(-1, *[1] * self.response.ndim) * self.response
        else:
            shift = torch.add(self.bias, self.response, alpha=t)
        return None, shift if c is None else shift + self.linear.spread(c)

    def accumulate(self, t: Time, c: Tensor | None, a_bar: Tensor, s_bar: Tensor | None) -> Tensor | None:
        total = _batch_sum(a_bar, self.bias.dtype)
        timed = torch.tensordot(t, a_bar.to(t.dtype), 1) if isinstance(t, Tensor) else total
        self._add(total, timed, 1.0 if isinstance(t, Tensor) else t)
        return None if c is None else self.linear.gather(a_bar)

    def _add(self, shift_bar: Tensor, time_bar: Tensor, by: float) -> None:
        """Adds to the gradients; to the response's so many times."""
        if self.shift_bar is None or self.time_bar is None:
            self.shift_bar, self.time_bar = shift_bar, time_bar * by
        else:
            self.shift_bar.add_(shift_bar)
            self.time_bar.add_(time_bar, alpha=by)

    def add(self, bars: Iterable[Tensor]) -> None:
        shift_bar, time_bar = bars
        self._add(shift_bar, time_bar, 1.0)

    def gradients(self) -> dict[str, Tensor]:
        bias, weight = self.parameters["bias"], self.parameters["time_weight"]
        if self.shift_bar is None or self.time_bar is None:
            return {"bias": torch.zeros_like(bias), "time_weight": torch.zeros_like(weight)}
        return {
            "bias": self.linear.gather(self.shift_bar),
            "time_weight": self.linear.constant_gradient(self.time_bar, weight),
        }


class ConcatSquashTime(TimeEntry):
    """A gate and a shift by time: ``a = (W h + b) σ(t u + g + c') + t v + c`` (FFJORD's ``concatsquash``)."""

    context_parts = 2  # c, of the shift, and c', of the gate
    terms = ("bias", "time_shift", "gate_weight", "gate_bias")

    def __init__(self, linear: Linear, parameters: dict[str, Tensor]) -> None:
        super().__init__(linear, parameters)
        self.bars = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def _gate(self, t: Time, c: Tensor | None) -> tuple[Tensor, Time]:
        """The gate ``(out,)`` or ``(batch, out)``, and t itself, a number or ``(batch, 1)``."""
        p = self.parameters
        time = t.unsqueeze(1) if isinstance(t, Tensor) else t
        gate = time * p["gate_weight"] + p["gate_bias"]
        return torch.sigmoid(gate if c is None else gate + c.chunk(2, 1)[1]), time

    def at(self, t: Time, c: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        gate, time = self._gate(t, c)
        shift = self.parameters["bias"] * gate + time * self.parameters["time_shift"]
        shift = shift if c is None else shift + c.chunk(2, 1)[0]
        return self.linear.spread(gate), self.linear.spread(shift)

    def accumulate(self, t: Time, c: Tensor | None, a_bar: Tensor, s_bar: Tensor | None) -> Tensor | None:
        assert s_bar is not None
        gate, time = self._gate(t, c)
        shift_bar, gate_bar = self.linear.gather(a_bar), self.linear.gather(s_bar)
        if not isinstance(t, Tensor) and c is None:
            shift_bar, gate_bar = shift_bar.sum(0, keepdim=True), gate_bar.sum(0, keepdim=True)
        gate_bar = (gate_bar + self.parameters["bias"] * shift_bar) * gate * (1 - gate)
        for name, bar in (
            ("bias", shift_bar * gate),
            ("time_shift", shift_bar * time),
            ("gate_weight", gate_bar * time),
            ("gate_bias", gate_bar),
        ):
            self.bars[name].add_(bar.sum(0))
        return None if c is None else torch.cat((shift_bar, gate_bar), 1)

    def add(self, bars: Iterable[Tensor]) -> None:
        for name, bar in zip(self.terms, bars, strict=True):
            self.bars[name].add_(bar)

    def gradients(self) -> dict[str, Tensor]:
        return self.bars


TIME_ENTRIES: dict[str, type[TimeEntry]] = {"none": NoTime, "concat": ConcatTime, "concatsquash": ConcatSquashTime}


class Layer(nn.Module):
    """The parameters of one layer; `bind` gives the operators that compute with them.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        time: How time enters: a key of `TIME_ENTRIES`.
        kernel_size: Sides of the filters: ``()`` for a dense layer, ``(k, k)`` for a convolution.
        size: ``(H, W)`` of the images for a convolution.
        zero: Initialise everything to zero (the last layer, so that training starts at f = 0).
        generator: What the parameters are drawn from, on its device; default torch's global generator.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        time: str,
        kernel_size: tuple[int, ...] = (),
        size: tuple[int, int] | None = None,
        zero: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.size, self.time, self.zero = size, time, zero
        device = None if generator is None else generator.device
        made = functools.partial(torch.empty, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(made(outputs, inputs, *kernel_size))
        self.bias = nn.Parameter(made(outputs))
        if time == "concat":
            self.time_weight = nn.Parameter(made(outputs, 1, *kernel_size))
        elif time == "concatsquash":
            self.gate_weight = nn.Parameter(made(outputs))
            self.gate_bias = nn.Parameter(made(outputs))
            self.time_shift = nn.Parameter(made(outputs))
        self.reset_parameters(generator)

    @property
    def fan_in(self) -> int:
        """Inputs of one output, time among them."""
        return self.weight[0].numel() + (self.time_weight[0].numel() if self.time == "concat" else 0)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """PyTorch's own default for such a layer (uniform within 1/√fan-in), or zero."""
        bound = 0.0 if self.zero else 1 / math.sqrt(self.fan_in)
        for name, parameter in self.named_parameters():
            gated = name in ("gate_weight", "gate_bias", "time_shift") and not self.zero
            limit = 1.0 if gated else bound
            nn.init.uniform_(parameter, -limit, limit, generator)

    def bind(self, *, detach: bool) -> TimeEntry:
        """The operators over the present parameters; with `detach`, invisible to autograd."""
        values = {name: p.detach() if detach else p for name, p in self.named_parameters()}
        weight = values.pop("weight")
        return TIME_ENTRIES[self.time](_linear(weight, self.size, detached=detach), values)

    def extra_repr(self) -> str:
        outputs, inputs, *kernel_size = self.weight.shape
        return f"{inputs}, {outputs}, kernel_size={tuple(kernel_size)}, time={self.time!r}"
