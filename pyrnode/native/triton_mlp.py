# mypy: ignore-errors
"""The kernels of `native.device_mlp`, in Triton: whole solves of a small perceptron, and their pullback.

A program takes `B` samples through all steps. Layers are padded to one width `P`, with zeros: what a padded unit
gives, no weight passes on. Products are float32's own. What a stage leaves for later lies in `scratch`, which is the
program's alone; a barrier stands wherever one thread reads what another has written. Sums over rows and columns are
products with ones: Triton's own `sum` and `zeros` are not interpreted where Triton was imported before (in tests).
Activations are numbered as in `triton_kernels`, whose functions these are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyrnode.native.triton_kernels import _sigmoids, _value_and_slope


@triton.jit
def _curve(a, h, slope, ACTIVATION: tl.constexpr):
    """φ''(a)."""
    if ACTIVATION == 0:
        _, rest = _sigmoids(a)
        curve = slope * rest
    elif ACTIVATION == 1:
        curve = -2.0 * h * slope
    else:
        sigma, rest = _sigmoids(a)
        curve = sigma * rest * (2.0 + a * (rest - sigma))
    return curve


@triton.jit
def _product(x, w, i, P: tl.constexpr):
    """``x Wᵀ``: a layer's product."""
    n = tl.arange(0, P)
    return tl.dot(x, tl.load(w + i * P * P + n[None, :] * P + n[:, None]), input_precision="ieee")


@triton.jit
def _transposed(g, w, i, P: tl.constexpr):
    """``g W``: the product's transpose."""
    n = tl.arange(0, P)
    return tl.dot(g, tl.load(w + i * P * P + n[:, None] * P + n[None, :]), input_precision="ieee")


@triton.jit
def _probe(eps, k, batch, d, rows, P: tl.constexpr, B: tl.constexpr, EXACT: tl.constexpr):
    """The k-th direction of each sample."""
    n = tl.arange(0, P)
    if EXACT:
        e = tl.full((B, P), 0.0, tl.float32) + tl.where(n == k, 1.0, 0.0)[None, :]
    else:
        there = (rows[:, None] < batch) & (n[None, :] < d)
        e = tl.load(eps + (k * batch + rows[:, None]) * d + n[None, :], mask=there, other=0.0)
    return e


@triton.jit
def _network(y, w, shift, at, kept, LAYERS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, ACTIVATION: tl.constexpr,
             TAPE: tl.constexpr):  # fmt: skip
    """The rate at y; leaves each hidden layer's slope, and for a pullback its input and curvature, at `kept`."""
    n = tl.arange(0, P)
    tile = tl.arange(0, B)[:, None] * P + n[None, :]
    x = y
    for i in range(LAYERS - 1):
        if TAPE:
            tl.store(kept + (3 * i) * B * P + tile, x)
        a = _product(x, w, i, P) + tl.load(shift + (at * LAYERS + i) * P + n)[None, :]
        x, slope = _value_and_slope(a, ACTIVATION)
        tl.store(kept + (3 * i + 1) * B * P + tile, slope)
        if TAPE:
            tl.store(kept + (3 * i + 2) * B * P + tile, _curve(a, x, slope, ACTIVATION))
    if TAPE:
        tl.store(kept + 3 * (LAYERS - 1) * B * P + tile, x)
    f = _product(x, w, LAYERS - 1, P) + tl.load(shift + (at * LAYERS + LAYERS - 1) * P + n)[None, :]
    tl.debug_barrier()
    return f


@triton.jit
def forward(
    z0, eps, w, shift, a, b, h, z1, q, record, scratch, size, batch, d, weight, probes, steps,
    STAGES: tl.constexpr, LAYERS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """State, and l, E, n; `record` gets the stages' states."""
    program = tl.program_id(0).to(tl.int64)  # and with it whatever counts numbers of all samples
    rows, n = program * B + tl.arange(0, B), tl.arange(0, P)
    there = (rows[:, None] < batch) & (n[None, :] < d)
    tile = tl.arange(0, B)[:, None] * P + n[None, :]
    rates = scratch + program * size
    kept = rates + STAGES * B * P
    z = tl.load(z0 + rows[:, None] * d + n[None, :], mask=there, other=0.0)
    l = tl.full((B, P), 0.0, tl.float32)  # whose sums over the columns they are
    E = tl.full((B, P), 0.0, tl.float32)
    norm = tl.full((B, P), 0.0, tl.float32)
    for step in range(steps):
        length = tl.load(h + step)
        for s in range(STAGES):
            y = z
            for j in range(s):
                y += length * tl.load(a + s * STAGES + j) * tl.load(rates + j * B * P + tile)
            at = step * STAGES + s
            if RECORD:
                tl.store(record + (at * batch + rows[:, None]) * d + n[None, :], y, mask=there)
            f = _network(y, w, shift, at, kept, LAYERS, P, B, ACTIVATION, False)
            tl.store(rates + s * B * P + tile, f)
            part = length * tl.load(b + s)
            E += part * f * f
            for k in range(probes):
                e = _probe(eps, k, batch, d, rows, P, B, EXACT)
                g = e
                for back in range(LAYERS - 1):
                    i = LAYERS - 1 - back
                    g = _transposed(g, w, i, P) * tl.load(kept + (3 * i - 2) * B * P + tile)
                r = _transposed(g, w, 0, P)
                l += part * weight * e * r
                norm += part * weight * r * r
            tl.debug_barrier()
        for s in range(STAGES):
            z += length * tl.load(b + s) * tl.load(rates + s * B * P + tile)
        tl.debug_barrier()
    tl.store(z1 + rows[:, None] * d + n[None, :], z, mask=there)
    if probes > 0:
        ones = tl.full((P, P), 1.0, tl.float32)
        place = q + rows[:, None] * 4 + 0 * n[None, :]
        first = (rows[:, None] < batch) & (n[None, :] == 0)
        tl.store(place, tl.dot(l, ones, input_precision="ieee"), mask=first)
        tl.store(place + 1, tl.dot(E, ones, input_precision="ieee"), mask=first)
        tl.store(place + 2, tl.dot(norm, ones, input_precision="ieee"), mask=first)


@triton.jit
def _add(place, x, P: tl.constexpr):
    """Adds a matrix to one in the program's own memory."""
    n = tl.arange(0, P)
    at = place + n[:, None] * P + n[None, :]
    tl.store(at, tl.load(at) + x)
    tl.debug_barrier()


@triton.jit
def backward(
    z1_bar, q_bar, eps, w, shift, a, b, h, record, z0_bar, w_bar, shift_bar, scratch, size, batch, d, weight, probes,
    steps, STAGES: tl.constexpr, LAYERS: tl.constexpr, P: tl.constexpr, B: tl.constexpr, ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The cotangent of the start; a program's parts of those of the weights and of the shifts, which begin at zero."""
    program = tl.program_id(0).to(tl.int64)  # and with it whatever counts numbers of all samples
    rows, n = program * B + tl.arange(0, B), tl.arange(0, P)
    there = (rows[:, None] < batch) & (n[None, :] < d)
    tile = tl.arange(0, B)[:, None] * P + n[None, :]
    bars = scratch + program * size  # of the stages
    kept = bars + STAGES * B * P  # h, slope, curvature of each hidden layer, h of the last
    products = kept + (3 * LAYERS - 2) * B * P  # g of each layer
    raw = products + LAYERS * B * P  # r of each hidden layer
    bends = raw + LAYERS * B * P
    own = w_bar + program * LAYERS * P * P
    own_shift = shift_bar + program * steps * STAGES * LAYERS * P
    z_bar = tl.load(z1_bar + rows[:, None] * d + n[None, :], mask=there, other=0.0)
    l_bar = tl.load(q_bar + rows * 4, mask=(rows < batch) & (probes > 0), other=0.0)
    E_bar = tl.load(q_bar + rows * 4 + 1, mask=(rows < batch) & (probes > 0), other=0.0)
    n_bar = tl.load(q_bar + rows * 4 + 2, mask=(rows < batch) & (probes > 0), other=0.0)
    for back_step in range(steps):
        step = steps - 1 - back_step
        length = tl.load(h + step)
        for back_stage in range(STAGES):
            s = STAGES - 1 - back_stage
            at = step * STAGES + s
            y = tl.load(record + (at * batch + rows[:, None]) * d + n[None, :], mask=there, other=0.0)
            f = _network(y, w, shift, at, kept, LAYERS, P, B, ACTIVATION, True)
            part = length * tl.load(b + s)
            f_bar = part * z_bar + 2.0 * part * E_bar[:, None] * f
            for j in range(s + 1, STAGES):
                f_bar += length * tl.load(a + j * STAGES + s) * tl.load(bars + j * B * P + tile)
            for i in range(LAYERS - 1):
                tl.store(bends + i * B * P + tile, tl.full((B, P), 0.0, tl.float32))
            for k in range(probes):
                e = _probe(eps, k, batch, d, rows, P, B, EXACT)
                g = e
                tl.store(products + (LAYERS - 1) * B * P + tile, g)
                for back in range(LAYERS - 1):
                    i = LAYERS - 1 - back
                    r = _transposed(g, w, i, P)
                    tl.store(raw + (i - 1) * B * P + tile, r)
                    g = r * tl.load(kept + (3 * i - 2) * B * P + tile)
                    tl.store(products + (i - 1) * B * P + tile, g)
                r = _transposed(g, w, 0, P)
                tl.debug_barrier()
                p = part * weight * (l_bar[:, None] * e + 2.0 * n_bar[:, None] * r)
                for i in range(LAYERS):
                    g = tl.load(products + i * B * P + tile)
                    _add(own + i * P * P, tl.dot(tl.trans(g), p, input_precision="ieee"), P)
                    if i < LAYERS - 1:
                        g_bar = _product(p, w, i, P)
                        curve = tl.load(kept + (3 * i + 2) * B * P + tile)
                        bend = tl.load(bends + i * B * P + tile)
                        bend += curve * tl.load(raw + i * B * P + tile) * g_bar
                        tl.store(bends + i * B * P + tile, bend)
                        p = g_bar * tl.load(kept + (3 * i + 1) * B * P + tile)
                tl.debug_barrier()
            a_bar = f_bar
            for back in range(LAYERS):
                i = LAYERS - 1 - back
                _add(
                    own + i * P * P,
                    tl.dot(tl.trans(a_bar), tl.load(kept + 3 * i * B * P + tile), input_precision="ieee"),
                    P,
                )
                total = tl.dot(tl.full((B, B), 1.0, tl.float32), a_bar, input_precision="ieee")
                tl.store(own_shift + (at * LAYERS + i) * P + 0 * tile + n[None, :], total, mask=tile < P)
                h_bar = _transposed(a_bar, w, i, P)
                if i > 0:
                    slope = tl.load(kept + (3 * i - 2) * B * P + tile)
                    a_bar = slope * h_bar + tl.load(bends + (i - 1) * B * P + tile)
                else:
                    a_bar = h_bar
            tl.debug_barrier()
            tl.store(bars + s * B * P + tile, a_bar)
            tl.debug_barrier()
        for s in range(STAGES):
            z_bar += tl.load(bars + s * B * P + tile)
        tl.debug_barrier()
    tl.store(z0_bar + rows[:, None] * d + n[None, :], z_bar, mask=there)
