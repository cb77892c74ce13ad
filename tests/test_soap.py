"""SOAP against the algorithm as the paper writes it, and what training needs of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrnode.training import soap
from pyrnode.training.origin import Origin
from pyrnode.training.soap import SOAP
from pyrnode.training.state import Snapshot
from tests.small_runs import assert_same_weights, steps, trainer


def problem(*widths: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Any]:
    """A small network, and the loss of a batch that a number determines."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, dtype=dtype), nn.Tanh()]
    network = nn.Sequential(*layers[:-1])

    def loss(step: int) -> Tensor:
        x = torch.randn(64, widths[0], generator=torch.Generator().manual_seed(step), dtype=dtype)
        target = torch.stack([x[:, j % widths[0]] * x[:, (j + 1) % widths[0]] for j in range(widths[-1])], 1)
        return (network(x) - target).square().mean()

    return network, loss


def as_the_paper_has_it(values: list[np.ndarray], gradients: list[list[np.ndarray]], rate: float, decay: float) -> None:
    """Algorithm 3 of Vyas et al. in numpy, with bases that begin as the axes and a damped iteration; in place."""
    states: list[dict[str, Any]] = [{} for _ in values]
    for t, given in enumerate(gradients, start=1):
        for w, g, s in zip(values, given, states, strict=True):
            if not s:
                s["m"], s["v"] = np.zeros_like(g), np.zeros_like(g)
                s["L"], s["R"] = np.zeros((len(g), len(g))), np.zeros((g.shape[-1], g.shape[-1]))
                s["QL"], s["QR"] = np.eye(len(g)), np.eye(g.shape[-1])
            matrix = g.ndim == 2
            rotated = s["QL"].T @ g @ s["QR"] if matrix else g
            s["m"] = 0.9 * s["m"] + 0.1 * g
            s["v"] = 0.999 * s["v"] + 0.001 * rotated**2
            m = s["m"] / (1 - 0.9**t)
            n = (s["QL"].T @ m @ s["QR"] if matrix else m) / (np.sqrt(s["v"] / (1 - 0.999**t)) + 1e-8)
            w *= 1 - rate * decay
            w -= rate * (s["QL"] @ n @ s["QR"].T if matrix else n)
            if not matrix:
                continue
            s["L"] = 0.95 * s["L"] + 0.05 * g @ g.T
            s["R"] = 0.95 * s["R"] + 0.05 * g.T @ g
            if t == 1 or t % 10 == 0:
                for factor, basis, axis in (("L", "QL", 0), ("R", "QR", 1)):
                    shift = (0.01 * np.trace(s[factor]) + 1e-16 * g.size) / len(s[factor])
                    damped = s[factor] + shift * np.eye(len(s[factor]))
                    order = np.argsort(-np.diag(s[basis].T @ damped @ s[basis]))
                    s["v"] = np.take(s["v"], order, axis)
                    s[basis] = np.linalg.qr(damped @ s[basis][:, order])[0]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_the_papers_algorithm(decay: float) -> None:
    network, loss = problem(5, 16, 16, 3)
    by_hand = [p.detach().numpy().copy() for p in network.parameters()]
    optimizer, gradients = SOAP(network.parameters(), lr=0.01, weight_decay=decay), []
    for step in range(35):
        optimizer.zero_grad()
        loss(step).backward()
        gradients.append([p.grad.numpy().copy() for p in network.parameters() if p.grad is not None])
        optimizer.step()
    as_the_paper_has_it(by_hand, gradients, 0.01, decay)
    for value, expected in zip(network.parameters(), by_hand, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_vectors_and_long_sides_keep_their_axes() -> None:
    """Then it is Adam."""
    shapes: list[tuple[int, ...]] = [(7,), (), (1, soap._LARGEST + 1)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    pairs = [(parameters, SOAP(parameters, lr=0.1)), (others, torch.optim.AdamW(others, lr=0.1, weight_decay=0))]
    for step in range(12):
        for values, optimizer in pairs:
            for index, p in enumerate(values):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index))
            optimizer.step()
    torch.testing.assert_close(parameters, others)
    assert set(soap.memory(parameters[2])) == {"exp_avg", "exp_avg_sq"}


def test_a_kernel_is_a_matrix_however_it_lies_in_memory() -> None:
    kernel = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    forms = [kernel.flatten(1).clone(), kernel.clone(), kernel.to(memory_format=torch.channels_last)]
    parameters = [nn.Parameter(form) for form in forms]
    optimizer = SOAP(parameters, lr=0.1)
    for step in range(12):
        gradient = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(step + 1))
        for p in parameters:
            p.grad = gradient.reshape(p.shape)
        optimizer.step()
    flat, *kernels = (p.detach() for p in parameters)
    for value in kernels:
        torch.testing.assert_close(value.flatten(1), flat)
    assert optimizer.state[parameters[1]]["right_basis"].shape == (36, 36)


def test_a_bent_valley_is_descended_in_fewer_steps_than_adam_takes() -> None:
    """Curvatures of 1 to 10,000 in rotated bases of both sides, and gradients as noisy as a batch's."""
    source = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(12, 12, generator=source, dtype=torch.float64))[0] for _ in range(2))
    curvature = torch.logspace(0, 2, 12, dtype=torch.float64)

    def height(w: Tensor, noise: float) -> Tensor:
        error = left.T @ w @ right + noise * torch.randn(12, 12, generator=source, dtype=torch.float64)
        return (curvature[:, None] * error**2 * curvature).sum()

    def descended(kind: Any) -> float:
        w = nn.Parameter(torch.ones(12, 12, dtype=torch.float64))
        optimizer = kind([w], lr=0.02)
        for step in range(600):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
            optimizer.zero_grad()
            height(w, 1.0).backward()
            optimizer.step()
        return height(w, 0.0).item()

    assert descended(SOAP) < 0.7 * descended(torch.optim.Adam)


@pytest.mark.parametrize("zero", [False, True], ids=["drawn", "the last layer zero"])
def test_rounding_stays_rounding(zero: bool) -> None:
    """Gradients that differ in their last bits, as those of several processes do, lead the same way.

    A flow's last layer begins at zero: then the first gradients of the others are rounding and nothing else.
    """
    losses = []
    for noise in (0.0, 1e-15):
        network, loss = problem(5, 64, 64, 3)
        if zero:
            nn.init.zeros_(network[-1].weight)  # type: ignore[arg-type]
        optimizer, source = SOAP(network.parameters(), lr=0.01), torch.Generator().manual_seed(1)
        for step in range(60):
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            for p in network.parameters():
                assert p.grad is not None
                size = p.grad.abs().mean().clamp(min=0.01)
                p.grad += noise * size * torch.randn(p.shape, generator=source, dtype=torch.float64)
            optimizer.step()
        losses.append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] != losses[1]


def test_autocast_does_not_move_it() -> None:
    found = []
    for enabled in (False, True):
        network, loss = problem(5, 16, 3, dtype=torch.float32)
        optimizer = SOAP(network.parameters(), lr=0.01)
        for step in range(12):
            optimizer.zero_grad()
            loss(step).backward()
            with torch.autocast("cpu", enabled=enabled):
                optimizer.step()
        found.append([p.detach().clone() for p in network.parameters()])
    for expected, value in zip(*found, strict=True):
        assert torch.equal(expected, value)


def test_a_weight_without_a_gradient_stays() -> None:
    w = nn.Parameter(torch.ones(4, 3))
    optimizer = SOAP([w], lr=0.1)
    for _ in range(12):
        w.grad = torch.zeros(4, 3)
        optimizer.step()
    assert torch.equal(w, torch.ones(4, 3))
    w.grad = torch.ones(4, 3)
    optimizer.step()
    assert bool((w < 1).all())


def test_a_closure_is_refused() -> None:
    network, loss = problem(5, 3)
    with pytest.raises(TypeError, match="closure"):
        SOAP(network.parameters()).step(lambda: loss(0))


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": "soap", "learning_rate": 0.01, "max_steps": 25, "hidden": [24, 24]}
    whole = trainer(**settings)
    assert whole.run()
    captured = trainer(**settings | {"max_steps": 12})
    assert captured.run()
    snapshot = captured.state.capture()
    assert {"optimizer.0.left_basis", "optimizer.0.right_factor"} <= snapshot.tensors.keys()
    snapshot.write(tmp_path / "checkpoint.safetensors", Origin.of(whole.config, whole.splits))
    rest = trainer(**settings)
    rest.state.restore(Snapshot.read(tmp_path / "checkpoint.safetensors")[0])
    assert rest.run()
    assert_same_weights(whole.flow, rest.flow)
    assert [record["loss"] for record in steps(rest.history)] == [
        record["loss"] for record in steps(whole.history) if record["step"] > 12
    ]
