"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyrnode.precision import own_precision

_LARGEST = 1024
"""Rows or columns beyond which a side of a weight keeps its own axes: a basis costs their third power."""

_EVERY = 10
"""Steps between two refreshments of the bases."""

_FACTOR_DECAY = 0.95
"""Decay of the averages of G Gᵀ and Gᵀ G, `shampoo_beta` of the authors' code."""

_DAMPING = 0.01
"""Share of its mean eigenvalue that is added to a factor's diagonal."""


class SOAP(torch.optim.Optimizer):
    """SOAP: the update of Adam, computed in the eigenbases of the averages of G Gᵀ and Gᵀ G.

    A weight is taken as a matrix, a kernel ``(o, i, h, w)`` as ``(o, i h w)``. Vectors (biases) and sides of more than
    1,024 keep their own axes, as in Adam. A basis begins as those axes and takes a step of orthogonal iteration after
    the first update and after every tenth. Weight decay is decoupled, as in AdamW.

    The authors begin with an eigendecomposition of the first gradient's factors instead. These have the rank of the
    smaller side, and in their null space any basis will do: rounding chooses it. A damped iteration depends on its
    factors smoothly, so that two machines, or one process and several, take the same way.

    Args:
        params: Parameters.
        lr: Learning rate.
        betas: Decays of Adam's two averages.
        eps: Added to the root of the second.
        weight_decay: Share of a weight that a step of rate 1 takes away.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a step along the gradients that the parameters have.

        Raises:
            TypeError: A closure is given.
        """
        if closure is not None:
            raise TypeError("a closure is given: SOAP takes the gradients that the parameters have")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    with own_precision(p):
                        _update(p, p.grad, self.state[p], group)


def memory(parameter: Tensor) -> dict[str, Tensor]:
    """What is kept of a parameter beside the number of its steps, as it is before the first."""
    kept = {name: parameter.new_zeros(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
    for side, length in _sides(parameter).items():
        kept[f"{side}_factor"] = parameter.new_zeros(length, length)
        kept[f"{side}_basis"] = parameter.new_zeros(length, length).fill_diagonal_(1)
    return kept


def orthonormal(basis: Tensor) -> bool:
    """Whether a matrix is a basis, but for rounding: by another one steps would have wrong lengths and directions."""
    with own_precision(basis):
        return bool(
            (basis.mT @ basis - torch.eye(len(basis), dtype=basis.dtype, device=basis.device)).abs().max() < 1e-3
        )


def _matrix(value: Tensor) -> Tensor:
    return value.flatten(1) if value.ndim > 1 else value.reshape(-1, 1)


def _sides(parameter: Tensor) -> dict[str, int]:
    """The sides that have a basis, and their lengths."""
    if parameter.ndim < 2:
        return {}
    lengths = dict(zip(("left", "right"), _matrix(parameter).shape, strict=True))
    return {side: length for side, length in lengths.items() if 1 < length <= _LARGEST}


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state |= {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **memory(parameter)}
    state["step"] += 1
    count, (first, second) = int(state["step"]), group["betas"]
    g, average, variance = (_matrix(value) for value in (gradient, state["exp_avg"], state["exp_avg_sq"]))
    average.lerp_(g, 1 - first)
    variance.lerp_(_rotated(g, state).square(), 1 - second)
    scale = (variance / (1 - second**count)).sqrt_().add_(group["eps"])
    change = _rotated(average / (1 - first**count), state).div_(scale)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(_rotated(change, state, back=True).view(parameter.shape), alpha=group["lr"])
    for side in _sides(parameter):
        state[f"{side}_factor"].lerp_(g @ g.mT if side == "left" else g.mT @ g, 1 - _FACTOR_DECAY)
        if count == 1 or count % _EVERY == 0:
            _refresh(state, side, variance, group["eps"])


def _rotated(value: Tensor, state: dict[str, Any], *, back: bool = False) -> Tensor:
    """A matrix in the bases of its sides, or back from there."""
    if (left := state.get("left_basis")) is not None:
        value = (left if back else left.mT) @ value
    if (right := state.get("right_basis")) is not None:
        value = value @ (right.mT if back else right)
    return value


def _refresh(state: dict[str, Any], side: str, variance: Tensor, eps: float) -> None:
    """One step of orthogonal iteration, directions in falling order; the squares' average moves with its directions.

    A gradient of entries below `eps` is rounding, as before the last layer has left zero: it turns nothing.
    """
    factor, basis = state[f"{side}_factor"], state[f"{side}_basis"]
    shift = _DAMPING * factor.trace() / len(factor) + eps**2 * variance.numel() / len(factor)
    image = factor @ basis + basis * shift
    order = (basis * image).sum(0).argsort(descending=True)
    variance.copy_(variance[order] if side == "left" else variance[:, order])
    basis.copy_(torch.linalg.qr(image[:, order])[0])  # in place: a file keeps the order of its memory
