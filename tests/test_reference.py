"""The benchmark's reference against closed forms: a slow or wrong baseline would make every speed-up meaningless."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm
from torch import Tensor

from benchmarks.reference import ConcatConvNet, ReferenceBlock, ReferenceImageFlow, ReferenceMLPFlow


def _randomise(flow: torch.nn.Module, scale: float = 0.3) -> None:
    """Gives all weights, the zero-initialised last layers too, values that make every derivative matter."""
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=scale)


def _standard_normal_nll(x: Tensor) -> Tensor:
    d = x[0].numel()
    return (0.5 * (x * x).flatten(1).sum(1) + 0.5 * d * math.log(2 * math.pi)).mean() / d


def test_paper_mnist_network() -> None:
    flow = ReferenceImageFlow(1, 28, 28)
    assert sum(p.numel() for p in flow.parameters()) == 800_636
    sides = [(1, 28, 28), (4, 14, 14), (2, 14, 14), (8, 7, 7), (4, 7, 7)]
    assert flow.block_shapes == [shape for shape in sides for _ in range(2)]


def test_paper_cifar10_network_has_14_blocks() -> None:
    flow = ReferenceImageFlow(3, 32, 32, scales=4)
    assert len(flow.blocks) == 14
    assert flow.block_shapes[-1] == (24, 4, 4)


def test_starts_at_the_identity() -> None:
    flow = ReferenceImageFlow(1, 8, 8, hidden=(4,), scales=2)
    x = torch.randn(3, 1, 8, 8)
    z, l, E, n = flow.augmented(x)
    torch.testing.assert_close(z.sort(dim=1).values, x.flatten(1).sort(dim=1).values)  # squeezes only permute
    assert torch.stack([l, E, n]).abs().max() == 0
    torch.testing.assert_close(flow.loss(x), _standard_normal_nll(x))


@pytest.mark.parametrize("gradients", ["adjoint", "backprop"])
def test_linear_dynamics_have_the_closed_form(gradients: str) -> None:
    A = np.array([[0.3, -0.5], [0.7, -0.2]])
    flow = ReferenceMLPFlow(2, hidden=(), gradients=gradients, step_size=1 / 64).double()
    with torch.no_grad():
        flow.blocks[0].network.layers[0].weight[:, 1:] = torch.from_numpy(A)  # column 0 is the time's
    x, eps = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    z, l, E, n = flow.augmented(x, [eps])

    def speed2(t: float) -> np.ndarray:
        return ((x.numpy() @ expm(A * t).T @ A.T) ** 2).sum(1)

    eps_A = eps.numpy() @ A
    np.testing.assert_allclose(z.detach(), x.numpy() @ expm(A).T, atol=1e-9)
    np.testing.assert_allclose(l.detach(), (eps_A * eps.numpy()).sum(1), atol=1e-12)
    np.testing.assert_allclose(n.detach(), (eps_A**2).sum(1), atol=1e-12)
    np.testing.assert_allclose(E.detach(), quad_vec(speed2, 0, 1, epsabs=1e-12)[0], atol=1e-9)


def test_right_hand_side_against_the_full_jacobian() -> None:
    network = ConcatConvNet(2, (5, 5)).double()
    _randomise(network)
    block = ReferenceBlock(network, gradients="adjoint", step_size=0.25, end_time=1.0)
    z, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor(0.37, dtype=torch.float64)
    block.ode.eps = eps
    f, dl, dE, dn = block.ode(t, (z,))
    for i in range(3):
        J = torch.func.jacrev(lambda v: network(t, v[None])[0])(z[i]).reshape(32, 32)
        e = eps[i].flatten()
        torch.testing.assert_close(dl[i], e @ J @ e)
        torch.testing.assert_close(dn[i], ((e @ J) ** 2).sum())
        torch.testing.assert_close(dE[i], (f[i] ** 2).sum())


def _loss_and_gradients(flow: ReferenceImageFlow, x: Tensor, eps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = flow.loss(x, eps, kinetic=0.3, jacobian=0.2)
    return loss.detach(), list(torch.autograd.grad(loss, list(flow.parameters())))


def _image_flow(**kwargs: object) -> tuple[ReferenceImageFlow, Tensor, list[Tensor]]:
    torch.manual_seed(1)
    flow = ReferenceImageFlow(1, 4, 4, hidden=(3,), scales=2, blocks=1, **kwargs).double()
    _randomise(flow)
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    return flow, x, flow.probes(x)


def test_backprop_gradient_against_finite_differences() -> None:
    flow, x, eps = _image_flow(gradients="backprop")
    _, gradients = _loss_and_gradients(flow, x, eps)
    h = 1e-5
    for parameter, gradient in zip(flow.parameters(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * h * direction
                values.append(flow.loss(x, eps, kinetic=0.3, jacobian=0.2))
                parameter -= sign * h * direction
        difference = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close(difference, (gradient * direction).sum(), rtol=1e-6, atol=1e-8)


def test_adjoint_gradient_tends_to_the_backprop_gradient() -> None:
    loss, exact = _loss_and_gradients(*_image_flow(gradients="backprop", step_size=1 / 32))
    adjoint_loss, adjoint = _loss_and_gradients(*_image_flow(gradients="adjoint", step_size=1 / 32))
    torch.testing.assert_close(adjoint_loss, loss, rtol=1e-14, atol=0)
    for a, b in zip(adjoint, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_generator_draws_the_same_probes_again() -> None:
    flow, x, _ = _image_flow()
    drawn = flow.probes(x, torch.Generator().manual_seed(7))
    assert flow.loss(x, torch.Generator().manual_seed(7)) == flow.loss(x, drawn)
    assert flow.loss(x, torch.Generator().manual_seed(8)) != flow.loss(x, drawn)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30×30 cannot be halved 2 times"):
        ReferenceImageFlow(1, 30, 30)
    with pytest.raises(ValueError, match="expected 'adjoint' or 'backprop'"):
        ReferenceMLPFlow(2, gradients="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 probes for 1 blocks"):
        ReferenceMLPFlow(2).loss(torch.zeros(3, 2), [])
