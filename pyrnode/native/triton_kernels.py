# mypy: ignore-errors
"""The kernels of `native.pointwise`, in Triton; importing this imports Triton.

Every number is computed in float32, whatever it is stored as. Only exp, divisions and products are asked for: those
have the same accuracy in Triton's interpreter and on every GPU, where log near 1 and tanh near 0 need not be good.
Activations: 0 is softplus, 1 tanh, 2 silu.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log1p(e):
    """``log(1 + e)``, 0 ≤ e ≤ 1: 2 artanh(e / (2 + e)), whose series is at 1e-9 after eight terms."""
    s = e / (2.0 + e)
    x = s * s
    p = 1.0 / 13.0 + x * (1.0 / 15.0)
    p = 1.0 / 9.0 + x * (1.0 / 11.0 + x * p)
    p = 1.0 / 5.0 + x * (1.0 / 7.0 + x * p)
    return 2.0 * s * (1.0 + x * (1.0 / 3.0 + x * p))


@triton.jit
def _tanh_near_zero(x):
    """``tanh x``, |x| ≤ ½, relatively to 1e-9: Lambert's continued fraction to its ninth partial denominator."""
    y = x * x
    return x * (945.0 + y * (105.0 + y)) / (945.0 + y * (420.0 + 15.0 * y))


@triton.jit
def _sigmoids(a):
    """``σ(a)`` and ``σ(-a)``, neither as a difference."""
    e = tl.exp(-tl.abs(a))
    big = 1.0 / (1.0 + e)
    small = e * big
    return tl.where(a >= 0, big, small), tl.where(a >= 0, small, big)


@triton.jit
def _tanh(a):
    magnitude = tl.abs(a)
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(magnitude < 0.5, _tanh_near_zero(a), tl.where(a >= 0, far, -far))


@triton.jit
def _value_and_slope(a, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        h = tl.maximum(a, 0.0) + _log1p(tl.exp(-tl.abs(a)))
        slope, _ = _sigmoids(a)
    elif ACTIVATION == 1:
        h = _tanh(a)
        slope = 1.0 - h * h
    else:
        sigma, rest = _sigmoids(a)
        h = a * sigma
        slope = sigma * (1.0 + a * rest)
    return h, slope


@triton.jit
def activate(
    u, scale, shift, a_out, h_out, slope_out, count, inner, channels,
    scale_n, scale_p, scale_c, shift_n, shift_p, shift_c,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, KEPT: tl.constexpr, SLOPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A = scale ⊙ u + shift, h = φ(a) and perhaps φ'(a), of numbers in the order sample, pixel, channel.

    `inner` numbers make a sample, `channels` a pixel; scale and shift are read with strides of their own.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    n, rest = i // inner, i % inner
    p, c = rest // channels, rest % channels
    a = tl.load(u + i, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        a = a * tl.load(scale + n * scale_n + p * scale_p + c * scale_c, mask=there, other=0.0)
    a = a + tl.load(shift + n * shift_n + p * shift_p + c * shift_c, mask=there, other=0.0)
    h, slope = _value_and_slope(a, ACTIVATION)
    if KEPT:
        tl.store(a_out + i, a.to(a_out.dtype.element_ty), mask=there)
    tl.store(h_out + i, h.to(h_out.dtype.element_ty), mask=there)
    if SLOPED:
        tl.store(slope_out + i, slope.to(slope_out.dtype.element_ty), mask=there)


@triton.jit
def find_slope(x, slope_out, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """φ'(a), of h for softplus and tanh, of a for silu."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    v = tl.load(x + i, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION == 0:  # 1 - e⁻ʰ, which is 2t / (1 + t) with t = tanh(h/2)
        t = _tanh_near_zero(0.5 * v)
        slope = tl.where(v < 1.0, 2.0 * t / (1.0 + t), 1.0 - tl.exp(-v))
    elif ACTIVATION == 1:
        slope = 1.0 - v * v
    else:
        _, slope = _value_and_slope(v, 2)
    tl.store(slope_out + i, slope.to(slope_out.dtype.element_ty), mask=there)


@triton.jit
def pull(bar, slope, x, g, bend_out, p_out, count, shared, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """φ'' r ⊙ ḡ and φ' ⊙ ḡ; `x` is h for tanh, a for silu; `g` is φ' r, for silu r; `shared` numbers have one slope."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    j = i % shared
    b = tl.load(bar + i, mask=there, other=0.0).to(tl.float32)
    s = tl.load(slope + j, mask=there, other=0.0).to(tl.float32)
    v = tl.load(g + i, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        bend = v * (1.0 - s) * b
    elif ACTIVATION == 1:
        bend = -2.0 * v * tl.load(x + j, mask=there, other=0.0).to(tl.float32) * b
    else:
        a = tl.load(x + j, mask=there, other=0.0).to(tl.float32)
        sigma, rest = _sigmoids(a)
        bend = v * sigma * rest * (2.0 + a * (rest - sigma)) * b
    tl.store(bend_out + i, bend.to(bend_out.dtype.element_ty), mask=there)
    tl.store(p_out + i, (s * b).to(p_out.dtype.element_ty), mask=there)
