"""Dynamics: the explicit product and its pullback against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from pyrnode.dynamics import MLP, ConvNet, Cotangents, Dynamics, ModuleDynamics
from pyrnode.dynamics.activations import ACTIVATIONS
from pyrnode.errors import ConfigError

EVENTS = {"mlp": (3,), "conv": (2, 4, 5)}
CASES = list(itertools.product(EVENTS, ("concat", "concatsquash", "none"), ACTIVATIONS))


def perturbed(dynamics: Dynamics) -> Dynamics:
    """Dynamics in double precision whose parameters are all away from zero."""
    dynamics = dynamics.double()
    generator = torch.Generator().manual_seed(7)
    scale = 0.4 if len(dynamics.event_shape) == 1 else 0.2
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return dynamics


def make(
    kind: str,
    time: str = "concat",
    activation: str = "softplus",
    hidden: tuple[int, ...] = (4, 5),
    context_dim: int = 0,
) -> Dynamics:
    if kind == "mlp":
        return perturbed(MLP(3, hidden, activation=activation, time=time, context_dim=context_dim))
    return perturbed(ConvNet((2, 4, 5), hidden, activation=activation, time=time, context_dim=context_dim))


class Field(nn.Module):
    """A user's own dynamics: nothing of pyrnode in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.cat((z, t[:, None]), 1))))


class ConditionalField(nn.Module):
    """A user's own dynamics with a context of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, t: Tensor, z: Tensor, c: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.cat((z, t[:, None], c), 1))))


def jacobian(dynamics: Dynamics, t: float | Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
    """``∂f/∂z`` of each sample, ``(batch, d, d)``, by autograd."""
    size = z[0].numel()
    full = torch.autograd.functional.jacobian(lambda x: dynamics(t, x, context), z).reshape(len(z), size, len(z), size)
    return torch.stack([full[i, :, i] for i in range(len(z))])


@pytest.mark.parametrize(("kind", "time", "activation"), CASES)
@pytest.mark.parametrize("own_times", [False, True])
def test_product_is_autograds(kind: str, time: str, activation: str, own_times: bool) -> None:
    dynamics = make(kind, time, activation)
    z, eps = torch.randn(3, *EVENTS[kind]).double(), torch.randn(2, 3, *EVENTS[kind]).double()
    t = torch.rand(3).double() if own_times else 0.3
    linearization = dynamics.bind().linearize(t, z, eps)
    assert torch.allclose(linearization.f, dynamics(t, z), rtol=0, atol=1e-12)
    assert linearization.w is not None
    expected = torch.einsum("kbi,bij->kbj", eps.flatten(2), jacobian(dynamics, t, z)).reshape(eps.shape)
    assert torch.allclose(linearization.w, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "time", "activation"), CASES)
@pytest.mark.parametrize(("probes", "own_times"), [(1, False), (2, True)])
def test_pullback_is_nested_autograds(kind: str, time: str, activation: str, probes: int, own_times: bool) -> None:
    dynamics = make(kind, time, activation)
    shape = EVENTS[kind]
    z, eps = torch.randn(3, *shape).double().requires_grad_(), torch.randn(probes, 3, *shape).double()
    t = torch.rand(3).double() if own_times else 0.3
    f_bar, w_bar = torch.randn(3, *shape).double(), torch.randn(probes, 3, *shape).double()

    f = dynamics(t, z)
    w = torch.stack([torch.autograd.grad(f, z, e, create_graph=True)[0] for e in eps])
    expected = torch.autograd.grad((f, w), [z, *dynamics.parameters()], (f_bar, w_bar), allow_unused=True)

    bound = dynamics.bind()
    with torch.no_grad():
        z_bar, c_bar = bound.pullback(bound.linearize(t, z.detach(), eps, tape=True), Cotangents(f_bar, w_bar))
    assert expected[0] is not None
    assert c_bar is None
    assert torch.allclose(z_bar, expected[0], rtol=0, atol=1e-10)
    for gradient, reference, (name, _) in zip(
        bound.gradients(), expected[1:], dynamics.named_parameters(), strict=True
    ):
        assert reference is not None, name
        assert torch.allclose(gradient, reference, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("time", ["concat", "concatsquash", "none"])
@pytest.mark.parametrize(("probes", "own_times"), [(1, False), (2, True)])
def test_context_in_product_and_pullback(kind: str, time: str, probes: int, own_times: bool) -> None:
    dynamics = make(kind, time, context_dim=2)
    shape = EVENTS[kind]
    z, eps = torch.randn(3, *shape).double().requires_grad_(), torch.randn(probes, 3, *shape).double()
    t = torch.rand(3).double() if own_times else 0.3
    context = torch.randn(3, 2).double()
    f_bar, w_bar = torch.randn(3, *shape).double(), torch.randn(probes, 3, *shape).double()

    c = dynamics.embed(context).detach().requires_grad_()
    f = dynamics.rate(t, z, c)
    w = torch.stack([torch.autograd.grad(f, z, e, create_graph=True)[0] for e in eps])
    expected = torch.autograd.grad((f, w), [z, c, *dynamics.solved_parameters()], (f_bar, w_bar))

    bound = dynamics.bind()
    with torch.no_grad():
        linearization = bound.linearize(t, z.detach(), eps, c=c.detach(), tape=True)
        assert linearization.w is not None
        assert torch.allclose(linearization.f, dynamics(t, z, context), rtol=0, atol=1e-12)
        assert torch.allclose(linearization.w, w, rtol=0, atol=1e-10)
        z_bar, c_bar = bound.pullback(linearization, Cotangents(f_bar, w_bar))
    assert c_bar is not None
    assert torch.allclose(z_bar, expected[0], rtol=0, atol=1e-10)
    for found, reference in zip([c_bar, *bound.gradients()], expected[1:], strict=True):
        assert torch.allclose(found, reference, rtol=0, atol=1e-10)


def test_context_joins_a_convolution_as_channels_without_a_border() -> None:
    """One linear layer: the network's answer to a context is the same at every pixel, and linear in it."""
    dynamics = make("conv", hidden=(), context_dim=2)
    z, context = torch.randn(3, 2, 4, 5).double(), torch.randn(3, 2).double()
    share = dynamics(0.3, z, context) - dynamics(0.3, z, torch.zeros(3, 2).double())
    assert torch.allclose(share, share[..., :1, :1].expand_as(share), rtol=0, atol=1e-12)
    weight = dynamics.context.weight  # type: ignore[union-attr]
    assert torch.allclose(share[..., 0, 0], context @ weight.T, rtol=0, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_derivatives_are_autograds(name: str) -> None:
    activation = ACTIVATIONS[name]
    a = torch.linspace(-4, 4, 41, dtype=torch.double, requires_grad=True)  # 0 is among them
    h = activation.value(a)
    (slope,) = torch.autograd.grad(h.sum(), a, create_graph=True)
    assert torch.allclose(activation.slope(a, h), slope, rtol=0, atol=1e-12)
    smooth = a.detach() != 0 if name == "elu" else torch.ones_like(a, dtype=torch.bool)  # ELU has a kink in φ'
    (curvature,) = torch.autograd.grad(slope.sum(), a)
    r = torch.randn(41, generator=torch.Generator().manual_seed(0)).double()
    found = activation.bend(a, h, slope, slope * r, r)
    curvature = curvature * r
    assert torch.allclose(found[smooth], curvature[smooth], rtol=0, atol=1e-12)


def test_softplus_is_accurate_far_out() -> None:
    a = torch.tensor([-200.0, -30.0, 30.0, 200.0])
    h = ACTIVATIONS["softplus"].value(a)
    assert torch.allclose(h.double(), torch.nn.functional.softplus(a.double()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize("time", ["concat", "concatsquash", "none"])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_starts_at_the_identity(kind: str, time: str, context_dim: int) -> None:
    if kind == "mlp":
        dynamics: Dynamics = MLP(3, time=time, context_dim=context_dim)
    else:
        dynamics = ConvNet((2, 4, 5), (6,), time=time, context_dim=context_dim)
    context = torch.randn(4, 2) if context_dim else None
    assert torch.equal(dynamics(0.7, torch.randn(4, *EVENTS[kind]), context), torch.zeros(4, *EVENTS[kind]))


def test_time_is_one_more_input_channel() -> None:
    """``concat`` equals a plain convolution over the state and a channel of t, borders included."""
    dynamics = make("conv", hidden=(4,))
    first, last = dynamics.layers  # type: ignore[union-attr, misc]
    z = torch.randn(3, 2, 4, 5).double()
    h = z
    for layer in (first, last):
        channel = torch.full_like(h[:, :1], 0.3)
        weight = torch.cat((layer.weight, layer.time_weight), 1)
        h = nn.functional.conv2d(torch.cat((h, channel), 1), weight, layer.bias, padding=1)
        h = nn.functional.softplus(h) if layer is first else h
    assert torch.allclose(dynamics(0.3, z), h, rtol=0, atol=1e-12)


def test_users_module_and_its_batch_norm() -> None:
    assert ModuleDynamics(Field(), (3,)).event_shape == (3,)
    with pytest.raises(ConfigError, match="BatchNorm1d mixes the samples"):
        ModuleDynamics(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), (3,))


def test_users_module_of_the_wrong_shape() -> None:
    class Wrong(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return z[:, :2]

    with pytest.raises(ConfigError, match=r"gave \(2, 2\) for z of shape \(2, 3\)"):
        ModuleDynamics(Wrong(), (3,))


def test_users_module_that_cannot_take_the_context() -> None:
    with pytest.raises(ConfigError, match=r"cannot be called as module\(t, z, c\)"):
        ModuleDynamics(Field(), (3,), context_dim=2)
    with pytest.raises(ConfigError, match=r"cannot be called as module\(t, z\)"):
        ModuleDynamics(ConditionalField(), (3,))
