"""The elementwise passes of softplus in C against double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrnode import native
from pyrnode.dynamics.activations import ACTIVATIONS
from pyrnode.dynamics.layers import channels_last
from pyrnode.native import softplus

_STATUS = native.status("softplus")
pytestmark = pytest.mark.skipif(not _STATUS.available, reason=f"no compiled softplus: {_STATUS.why}")

ROUNDING = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _nothing_recorded():
    with torch.no_grad():
        yield


def test_value_and_slope_to_three_roundings():
    a = torch.cat([torch.linspace(-80, 80, 100_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30])])
    exact, exact_slope = F.softplus(a.double(), threshold=100), torch.sigmoid(a.double())
    slope = softplus.activate(a)
    assert slope is not None
    assert ((a - exact).abs() <= 3 * ROUNDING * exact).all()
    assert ((slope - exact_slope).abs() <= 3 * ROUNDING * exact_slope).all()


def test_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([inf, nan, -inf, 1.0])
    slope = softplus.activate(a)
    assert slope is not None
    assert a[0] == inf
    assert a[1].isnan()
    assert slope[1].isnan()
    assert slope[0] == 1
    assert 0 <= a[2] < 1e-37
    assert 0 <= slope[2] < 1e-37
    assert a[3].isfinite()


@pytest.mark.parametrize("count", [1, 7, 8, 1023, 1024, 1025, 5000])
def test_any_length_by_any_number_of_threads(count):
    start, threads = torch.randn(count), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            a, bar = start.clone(), start.flip(0).clone()
            slope = softplus.activate(a)
            bend = softplus.pull(bar, slope, start)
            results.append((a, slope, bar, bend))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    exact = F.softplus(start.double())
    assert ((results[0][0] - exact).abs() <= 3 * ROUNDING * exact).all()


@pytest.mark.parametrize("probes", [1, 2])
def test_the_pass_back_is_that_of_torchs_operations(monkeypatch, probes):
    phi = ACTIVATIONS["softplus"]
    a = channels_last(torch.randn(3, 16, 5, 4))
    h, slope = phi.activate(a.clone(memory_format=torch.preserve_format))
    g, bar = (torch.stack([channels_last(torch.randn(3, 16, 5, 4)) for _ in range(probes)]) for _ in range(2))
    bend, down = phi.pull(h, h, slope, g, g, bar.clone())
    exact = torch.sigmoid(a.double())
    torch.testing.assert_close(down.double(), exact * bar, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bend.double(), (1 - exact) * g * bar, rtol=1e-5, atol=1e-6)
    monkeypatch.setenv(native.VARIABLE, "0")
    for value, other in zip((bend, down), phi.pull(h, h, slope, g, g, bar.clone()), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_what_it_does_not_do_is_left_to_torch():
    assert softplus.activate(torch.randn(4, dtype=torch.float64)) is None
    assert softplus.activate(torch.randn(4, 6).t()) is None
    assert softplus.pull(torch.randn(4), torch.randn(1), torch.randn(4)) is None
    with torch.enable_grad():
        assert softplus.activate(torch.randn(4)) is None
