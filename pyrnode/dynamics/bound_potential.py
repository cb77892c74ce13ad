"""Potentials with explicit products: f, εᵀ∂f/∂z, trace, Frobenius norm, ∂Φ/∂t, and the pullback of all of them.

The symbols are those of scalar.py. What is asked of the curvature is pulled back first, which leaves cotangents of the
layers' ``a_i`` and ``y_i``; then the gradient is, whose transpose runs forward (``q = Ḡ``, ``v̄_i = W_i q_{i−1}``,
``q_i = q_{i−1} + h_i φ' ⊙ v̄_i + ȳ_i``, ``ā_i += h_i φ'' ⊙ y_i ⊙ v̄_i``); then the network, back as usual.

* Probes: ``∇²Φ ε`` is the derivative of the gradient's two sweeps along ε, and is pulled back through both.
* Exact: with ``M = τ̄ I + 2 ν̄ ∇²Φ`` the cotangents of trace and squared norm give ``J̄_i = 2 c_i ⊙ J_i M`` and
  ``c̄_i = J_iᵀ M J_i``, ``c_i = h_i φ'' ⊙ y_i``: one sweep forward and one back, as much as half the d products of unit
  vectors; J_0 is W_0 itself, for all samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrnode.dynamics.base import BoundDynamics, Cotangents, Linearization
from pyrnode.dynamics.layers import Time
from pyrnode.dynamics.scalar import Gradient, Scalar, gradient

_FLAT, _FEW = 64, 4
"""Up to how many dimensions the products of W_0's columns are written out, and those of J's are taken one by one."""


@dataclass(slots=True)
class _Tangent:
    """A layer along the probes, ``(k, batch, m)``: what the derivative of the two sweeps leaves."""

    input: Tensor  # of the layer, along ε
    a: Tensor  # ȧ
    y: Tensor | None  # ẏ; `None` of the last layer, where y is w
    v: Tensor  # v̇


@dataclass(slots=True)
class _Jacobian:
    """A layer's Jacobian ``∂a/∂z`` as ``(batch, d, m)``, and that of its input; of layer 0 ``(1, d, m)`` and none."""

    J: Tensor
    input: Tensor | None


@dataclass(slots=True)
class _Tape:
    """What one evaluation leaves for its pullback."""

    s: Tensor
    at: Gradient
    f: Tensor
    conditional: bool
    eps: Tensor | None = None
    bends: list[Tensor] = field(default_factory=list)  # φ''(a_i), once something is curved
    weights: list[Tensor] = field(default_factory=list)  # c_i
    tangents: list[_Tangent] = field(default_factory=list)
    jacobians: list[_Jacobian] = field(default_factory=list)
    hessian: Tensor | None = None


def _scaled(x: Tensor, h: float) -> Tensor:
    return x if h == 1 else x.mul_(h)


def _curve(scalar: Scalar, tape: _Tape) -> None:
    """φ'' and c of every layer, where they are not there yet."""
    if not tape.bends:
        for layer, h in zip(tape.at.layers, scalar.steps, strict=True):
            bend = scalar.curve.bend(layer.root, layer.slope)
            tape.bends.append(bend)
            tape.weights.append(_scaled(bend * layer.y, h))


def _jacobians(scalar: Scalar, tape: _Tape, d: int) -> None:
    """``J_i``, from the first layer to the last."""
    # Contiguous, or what is made of it is not, and its products with W_i fall apart into one for each sample.
    J, given, layers = scalar.weights[0][:, :d].t().contiguous().unsqueeze(0), None, tape.at.layers
    tape.jacobians.append(_Jacobian(J, None))
    for i in range(1, len(layers)):
        moved = layers[i - 1].slope.unsqueeze(1) * J
        given = moved if given is None else moved.mul_(scalar.steps[i - 1]).add_(given)
        J = given @ scalar.weights[i].t()
        tape.jacobians.append(_Jacobian(J, given))


def _hessian(scalar: Scalar, tape: _Tape) -> Tensor:
    """``∇²Φ`` in z, ``(batch, d, d)``."""
    if tape.hessian is None:
        _curve(scalar, tape)
        d = tape.f.shape[1]
        Az = scalar.A[:, :d]
        total = Az.t() @ Az
        for jacobian, weight in zip(tape.jacobians, tape.weights, strict=True):
            total = total + _gram(jacobian.J, weight)
        tape.hessian = total
    return tape.hessian


def _gram(J: Tensor, weight: Tensor) -> Tensor:
    """``Jᵀ diag(c) J`` of each sample, given J as ``(batch or 1, d, m)``; by few and large operations."""
    d = J.shape[1]
    if len(J) == 1 and d <= _FLAT:
        products = (J[0].unsqueeze(1) * J[0].unsqueeze(0)).flatten(0, 1)
        return (weight @ products.t()).reshape(-1, d, d)
    weighted = weight.unsqueeze(1) * J
    if d > _FEW:
        return weighted @ J.transpose(1, 2)
    rows = [(weighted * J[:, p : p + 1]).sum(2) for p in range(d)]
    return torch.stack(rows, 1)


class _Sums:
    """The gradients of the parameters, as they gather."""

    def __init__(self, scalar: Scalar) -> None:
        self.weights = [torch.zeros_like(W) for W in scalar.weights]
        self.biases = [torch.zeros_like(b) for b in scalar.biases]
        self.w, self.A, self.b = (torch.zeros_like(p) for p in (scalar.w, scalar.A, scalar.b))

    def in_order(self) -> list[Tensor]:
        """As `Potential.solved_parameters` has the parameters."""
        layers = [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]
        return [*layers, self.w, self.A, self.b]


class _Pull:
    """One pullback: the layers' cotangents, which gather from the curvature to the network.

    Without `sums` those of the parameters are not computed.
    """

    def __init__(self, scalar: Scalar, tape: _Tape, sums: _Sums | None) -> None:
        self.scalar, self.tape, self.sums = scalar, tape, sums
        self.layers = tape.at.layers
        self.a_bars: list[Tensor | None] = [None] * len(self.layers)
        self.y_bars: list[Tensor | None] = [None] * len(self.layers)
        _curve(scalar, tape)
        self.weights = tape.weights

    def _add(self, bars: list[Tensor | None], i: int, bar: Tensor) -> None:
        known = bars[i]
        bars[i] = bar if known is None else known.add_(bar)

    def _weight(self, i: int, d: int | None = None) -> Tensor | None:
        """Where the gradient of W_i gathers, or of its first d columns."""
        return None if self.sums is None else self.sums.weights[i][:, :d]

    def _quadratic(self, d: int | None = None) -> Tensor | None:
        """Likewise of A."""
        return None if self.sums is None else self.sums.A[:, :d]

    def _outer(self, total: Tensor | None, left: Tensor, right: Tensor) -> None:
        """Adds ``Σ left rightᵀ`` over all but the last dimension."""
        if total is not None:
            total.addmm_(left.flatten(0, -2).t(), right.flatten(0, -2))

    def _bent(self, i: int, x: Tensor) -> Tensor:
        """``h_i φ''(a_i) ⊙ x``, in place of a new one."""
        return _scaled(x.mul_(self.tape.bends[i]), self.scalar.steps[i])

    def _twisted(self, i: int, x: Tensor) -> Tensor:
        """``h_i φ‴(a_i) ⊙ y_i ⊙ x``."""
        layer = self.layers[i]
        twist = self.scalar.curve.twist(layer.root, layer.slope, self.tape.bends[i])
        return _scaled(twist.mul_(layer.y).mul_(x), self.scalar.steps[i])

    # -- the curvature -----------------------------------------------------------------------------------------------

    def products(self, w_bar: Tensor) -> None:
        """Pulls back ``w = −∇²Φ ε``, given ``(k, batch, d)``."""
        tape, scalar, steps = self.tape, self.scalar, self.scalar.steps
        assert tape.eps is not None
        d, eta = w_bar.shape[-1], -w_bar
        a_dot_bars, y_dot_bar = list[Tensor](), eta
        for i, (layer, tangent, W) in enumerate(zip(self.layers, tape.tangents, scalar.weights, strict=True)):
            h, W = steps[i], W[:, :d] if i == 0 else W
            v_dot_bar = y_dot_bar @ W.t()
            self._outer(self._weight(i, d if i == 0 else None), tangent.v, y_dot_bar)
            a_dot_bars.append(v_dot_bar * self.weights[i])
            along = (v_dot_bar * tangent.a).sum(0)
            a_bar = self._twisted(i, along)
            self._add(self.y_bars, i, self._bent(i, along))
            if tangent.y is not None:
                a_bar += self._bent(i, (v_dot_bar * tangent.y).sum(0))
            self._add(self.a_bars, i, a_bar)
            moved = v_dot_bar * (h * layer.slope)
            y_dot_bar = moved if i == 0 else y_dot_bar + moved
        self._along(a_dot_bars, d)
        Az = scalar.A[:, :d]
        self._outer(self._quadratic(d), tape.eps @ Az.t(), eta)
        self._outer(self._quadratic(d), eta @ Az.t(), tape.eps)

    def _along(self, a_dot_bars: list[Tensor], d: int) -> None:
        """The rest of `products`: back through the sweep that ran forward along ε."""
        u_dot_bar: Tensor | None = None
        for i in reversed(range(len(self.layers))):
            layer, tangent, h = self.layers[i], self.tape.tangents[i], self.scalar.steps[i]
            a_dot_bar = a_dot_bars[i]
            if u_dot_bar is not None:
                a_dot_bar = a_dot_bar + u_dot_bar * (h * layer.slope)
                self._add(self.a_bars, i, self._bent(i, (u_dot_bar * tangent.a).sum(0)))
            if i == 0:
                self._outer(self._weight(0, d), a_dot_bar, tangent.input)
                return
            self._outer(self._weight(i), a_dot_bar, tangent.input)
            pulled = a_dot_bar @ self.scalar.weights[i]
            u_dot_bar = pulled if u_dot_bar is None else pulled + u_dot_bar

    def exact(self, trace: Tensor, frobenius: Tensor | None) -> None:
        """Pulls back ``tr ∂f/∂z = −tr ∇²Φ`` and ``‖∂f/∂z‖_F²``, given their cotangents ``(batch,)``."""
        tape, scalar = self.tape, self.scalar
        d, M = self.tape.f.shape[1], -trace
        if frobenius is not None:
            M = 2 * frobenius[:, None, None] * _hessian(scalar, tape)
            M.diagonal(dim1=1, dim2=2).sub_(trace[:, None])
        U_bar: Tensor | None = None
        for i in reversed(range(1, len(self.layers))):
            layer, J, given = self.layers[i], tape.jacobians[i].J, tape.jacobians[i].input
            assert given is not None
            c_bar, J_bar = self._quadratic_form(i, J, M)
            self._weigh(i, c_bar)
            if U_bar is not None:
                self._add(self.a_bars, i, self._bent(i, (J * U_bar).sum(1)))
                J_bar.addcmul_(U_bar, layer.slope.unsqueeze(1), value=scalar.steps[i])
            self._outer(self._weight(i), J_bar, given)
            pulled = J_bar @ scalar.weights[i]
            U_bar = pulled if U_bar is None else pulled.add_(U_bar)
        self._first(M, U_bar, d)
        if self.sums is not None:
            Az = scalar.A[:, :d]
            self.sums.A[:, :d] += 2 * Az * M.sum() if M.ndim == 1 else 2 * Az @ M.sum(0)

    def _quadratic_form(self, i: int, J: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        """``c̄_i`` and ``J̄_i`` of ``tr(M Jᵀ diag(c) J)``."""
        if M.ndim == 1:
            return (J * J).sum(1).mul_(M[:, None]), J * (self.weights[i] * (2 * M[:, None])).unsqueeze(1)
        JM = M @ J
        return (J * JM).sum(1), JM.mul_((2 * self.weights[i]).unsqueeze(1))

    def _weigh(self, i: int, c_bar: Tensor) -> None:
        """Pulls ``c̄_i`` back, of ``c_i = h_i φ''(a_i) ⊙ y_i``."""
        self._add(self.a_bars, i, self._twisted(i, c_bar))
        self._add(self.y_bars, i, self._bent(i, c_bar))

    def _first(self, M: Tensor, U_bar: Tensor | None, d: int) -> None:
        """The rest of `exact`: layer 0, whose Jacobian is W_0, and ``U_0 = φ'(a_0) ⊙ W_0``."""
        layer, Kt = self.layers[0], self.scalar.weights[0][:, :d].t()
        if M.ndim == 1:
            self._weigh(0, M[:, None] * (Kt * Kt).sum(0))
            K_bar = 2 * (M @ self.weights[0]) * Kt
        else:
            c_bar, J_bar = self._quadratic_form(0, Kt.unsqueeze(0), M)
            self._weigh(0, c_bar)
            K_bar = J_bar.sum(0)
        if U_bar is not None:
            self._add(self.a_bars, 0, self._bent(0, (U_bar * Kt).sum(1)))
            K_bar = K_bar + (U_bar.mul_(layer.slope.unsqueeze(1))).sum(0)
        if (total := self._weight(0, d)) is not None:
            total += K_bar.t()

    # -- the gradient, and the network -------------------------------------------------------------------------------

    def gradient(self, G_bar: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangents of s and of the embedded context, given that of ``∇_s Φ``; last."""
        scalar, steps, q = self.scalar, self.scalar.steps, G_bar
        for i, (layer, W) in enumerate(zip(self.layers, scalar.weights, strict=True)):
            self._outer(self._weight(i), layer.v, q)
            v_bar = q @ W.t()
            self._add(self.a_bars, i, v_bar * self.weights[i])
            moved = v_bar * layer.slope if i == 0 else torch.addcmul(q, v_bar, layer.slope, value=steps[i])
            known = self.y_bars[i]
            q = moved if known is None else moved + known
        s_bar, a_bar = self._network()
        A, s = scalar.A, self.tape.s
        AG = G_bar @ A.t()
        if self.sums is not None:
            self.sums.w += q.sum(0)
            self.sums.b += G_bar.sum(0)
        self._outer(self._quadratic(), self.tape.at.As, G_bar)
        self._outer(self._quadratic(), AG, s)
        return s_bar + AG @ A, torch.cat((a_bar, G_bar), 1)

    def _network(self) -> tuple[Tensor, Tensor]:
        """Back through the layers: the cotangents of s, without that of the quadratic term, and of a_0."""
        u_bar: Tensor | None = None
        for i in reversed(range(len(self.layers))):
            layer, a_bar = self.layers[i], self.a_bars[i]
            assert a_bar is not None
            if u_bar is not None:
                a_bar.addcmul_(u_bar, layer.slope, value=self.scalar.steps[i])
            self._outer(self._weight(i), a_bar, layer.input)
            if self.sums is not None:
                self.sums.biases[i] += a_bar.sum(0)
            pulled = a_bar @ self.scalar.weights[i]
            u_bar = pulled if u_bar is None or i == 0 else pulled.add_(u_bar)
        assert u_bar is not None
        assert a_bar is not None
        return u_bar, a_bar


class BoundPotential(BoundDynamics):
    """A `Potential`, bound.

    Args:
        scalar: Its parameters, without autograd's graph.
        exact: The probes are the unit vectors, so trace and norm are what is wanted of the products.
        hjb: Also the residual of the Hamilton-Jacobi equation.
    """

    def __init__(self, scalar: Scalar, *, exact: bool, hjb: bool) -> None:
        self.scalar, self.exact, self.hjb = scalar, exact, hjb
        self.sums = _Sums(scalar)

    def layout(self, z: Tensor) -> Tensor:
        return z if self.exact and z.ndim == 3 else z.contiguous()  # unit vectors are looked at by nobody

    def tape_bytes(self, z: Tensor, probes: int) -> int:
        widths = [len(W) for W in self.scalar.weights]
        curved = 2 * probes * sum(widths[1:]) if self.exact else 4 * probes * sum(widths)
        return z.element_size() * z[..., 0].numel() * (6 * sum(widths) + curved)

    def linearize(
        self, t: Time, z: Tensor, eps: Tensor | None, *, c: Tensor | None = None, tape: bool = False
    ) -> Linearization:
        s, d = self.scalar.point(t, z), z.shape[1]
        at = gradient(self.scalar, s, c)
        f = -at.G[:, :d]
        record = _Tape(s, at, f, c is not None)
        if eps is None:
            return Linearization(f, None, None, record if tape else None)
        found = Linearization(
            f, None, None, record if tape else None, hjb=self._residual(at.G, f) if self.hjb else None
        )
        if self.exact:
            _jacobians(self.scalar, record, d)
            return found
        return found._replace(w=self._products(record, eps))

    def trace_and_norm(self, linearization: Linearization) -> tuple[Tensor, Tensor] | None:
        if not self.exact:
            return None
        hessian = _hessian(self.scalar, linearization.tape)
        return -hessian.diagonal(dim1=1, dim2=2).sum(1), hessian.square().sum((1, 2))

    def _residual(self, G: Tensor, f: Tensor) -> Tensor:
        half = 0.5 * f.square().sum(1)
        return G[:, -1] - half if self.scalar.timed else -half

    def _products(self, record: _Tape, eps: Tensor) -> Tensor:
        """``w = −∇²Φ ε``: both sweeps of the gradient along ε."""
        scalar, steps, layers, d = self.scalar, self.scalar.steps, record.at.layers, eps.shape[-1]
        _curve(scalar, record)
        record.eps, tangent, rates = eps, eps, list[tuple[Tensor, Tensor]]()
        for i, (layer, W) in enumerate(zip(layers, scalar.weights, strict=True)):
            a_dot = tangent @ (W[:, :d] if i == 0 else W).t()
            rates.append((tangent, a_dot))
            moved = layer.slope * a_dot
            tangent = moved if i == 0 else torch.add(tangent, moved, alpha=steps[i])
        y_dot: Tensor | None = None
        for i in reversed(range(len(layers))):
            layer, (given, a_dot) = layers[i], rates[i]
            v_dot = a_dot * record.weights[i]
            if y_dot is not None:
                v_dot.addcmul_(layer.slope, y_dot, value=steps[i])
            record.tangents.insert(0, _Tangent(given, a_dot, y_dot, v_dot))
            pulled = v_dot @ (scalar.weights[i][:, :d] if i == 0 else scalar.weights[i])
            y_dot = pulled if y_dot is None or i == 0 else pulled.add_(y_dot)
        assert y_dot is not None
        Az = scalar.A[:, :d]
        return -(y_dot + eps @ Az.t() @ Az)

    def pullback(self, linearization: Linearization, bars: Cotangents) -> tuple[Tensor, Tensor | None]:
        tape: _Tape = linearization.tape
        z_bar, c_bar = self._pull(tape, bars, self.sums)
        return z_bar, c_bar if tape.conditional else None

    def pullback_state(self, linearization: Linearization, bars: Cotangents) -> Tensor:
        return self._pull(linearization.tape, bars, None)[0]

    def _pull(self, tape: _Tape, bars: Cotangents, sums: _Sums | None) -> tuple[Tensor, Tensor]:
        d, pull = tape.f.shape[1], _Pull(self.scalar, tape, sums)
        if bars.trace is not None:
            pull.exact(bars.trace, bars.frobenius)
        if bars.w is not None:
            pull.products(bars.w)
        G_bar = -bars.f
        if bars.hjb is not None:
            G_bar = torch.addcmul(G_bar, bars.hjb.unsqueeze(1), tape.f)
        if self.scalar.timed:
            last = torch.zeros_like(G_bar[:, :1]) if bars.hjb is None else bars.hjb.unsqueeze(1)
            G_bar = torch.cat((G_bar, last), 1)
        s_bar, c_bar = pull.gradient(G_bar)
        return s_bar[:, :d], c_bar

    def gradients(self) -> list[Tensor]:
        return self.sums.in_order()
