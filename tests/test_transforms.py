"""Transforms: round trips and log-determinants against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyrnode.errors import ConfigError, DataError
from pyrnode.transforms import Chain, Dequantize, Logit, Standardize, Transform, Whiten

SHAPE = (2, 3)


def cases() -> dict[str, tuple[Transform, Tensor]]:
    unit = torch.rand(5, *SHAPE, dtype=torch.double) * 0.98 + 0.01
    mean, std = torch.randn(SHAPE).double(), torch.rand(SHAPE).double() + 0.1
    return {
        "dequantize": (Dequantize(17, torch.double), unit * 17),
        "logit": (Logit(0.05), unit),
        "logit without alpha": (Logit(0.0), unit),
        "standardize": (Standardize(mean, std), 4 * unit),
        "images": (Chain([Dequantize(256, torch.double), Logit(1e-5)]), unit * 256),
        "identity": (Chain([]), unit),
    }


@pytest.mark.parametrize("name", cases())
def test_log_determinant_is_autograds(name: str) -> None:
    transform, x = cases()[name]
    _, log_det = transform(x)
    for i in range(len(x)):
        full = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], x[i]).reshape(6, 6)
        assert float(log_det[i]) == pytest.approx(float(torch.linalg.slogdet(full)[1]), abs=1e-10)


@pytest.mark.parametrize("name", [n for n in cases() if n not in ("dequantize", "images")])
def test_continuous_round_trip(name: str) -> None:
    transform, x = cases()[name]
    assert torch.allclose(transform.inverse(transform(x)[0]), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 17, 256, 1000])
def test_every_level_comes_back(levels: int) -> None:
    transform = Chain([Dequantize(levels), Logit(1e-5)])
    pixels = torch.arange(levels).repeat(20)[:, None]
    y, _ = transform(pixels, torch.Generator().manual_seed(0))
    back = transform.inverse(y)
    assert torch.equal(back.to(pixels.dtype), pixels)
    assert back.dtype == (torch.uint8 if levels <= 256 else torch.int64)


def test_dequantisation_is_uniform_within_the_bin() -> None:
    pixels = torch.full((100_000, 1), 3)
    spread, _ = Dequantize(17)(pixels, torch.Generator().manual_seed(0))
    noise = spread * 17 - 3
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 1e5))
    assert float(noise.var()) == pytest.approx(1 / 12, abs=1e-3)


def test_uniform_pixels_cost_eight_bits() -> None:
    """Under the uniform density on [0, 256)^d, ``log p(p + u) = −d log 256``: exactly 8 bits per dimension."""
    pixels = torch.randint(0, 256, (64, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    s, log_det = Dequantize(256, torch.double)(pixels)
    log_uniform = torch.where(((s >= 0) & (s < 1)).flatten(1).all(1), 0.0, -math.inf)  # of s ~ U[0, 1)^d
    bits = -(log_uniform + log_det) / s[0].numel() / math.log(2)
    assert torch.allclose(bits, torch.full((64,), 8.0).double(), rtol=0, atol=1e-12)


def test_uniform_pixels_cost_eight_bits_after_the_logit_too() -> None:
    """The logistic density behind the logit is the uniform one before it, so the bits must come out the same."""
    pixels = torch.randint(0, 256, (64, 48), generator=torch.Generator().manual_seed(0))
    y, log_det = Chain([Dequantize(256, torch.double), Logit(0.0)])(pixels, torch.Generator().manual_seed(1))
    logistic = (torch.nn.functional.logsigmoid(y) + torch.nn.functional.logsigmoid(-y)).sum(1)
    bits = -(logistic + log_det) / 48 / math.log(2)
    assert torch.allclose(bits, torch.full((64,), 8.0).double(), rtol=0, atol=1e-9)


def test_standardize_fits_the_data() -> None:
    x = torch.randn(1000, 3) * torch.tensor([0.1, 1.0, 10.0]) + 5
    y, _ = Standardize.fit(x.double())(x.double())
    assert torch.allclose(y.mean(0), torch.zeros(3).double(), atol=1e-10)
    assert torch.allclose(y.std(0, correction=0), torch.ones(3).double(), atol=1e-10)


def test_is_saved_with_the_model() -> None:
    fitted = Chain([Standardize(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))])
    other = Chain([Standardize(torch.zeros(2), torch.ones(2))])
    other.load_state_dict(fitted.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(other(x)[0], fitted(x)[0])


def mixed(n: int, *, thin: float = 1e-3, seed: int = 0) -> Tensor:
    """Samples whose third column is nearly the sum of the others."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    x[:, 2] = (x[:, 0] + x[:, 1] + thin * x[:, 2]) / math.sqrt(2)
    return x


def test_whitening_leaves_unit_covariance_and_its_determinant_is_autograds() -> None:
    x = mixed(2000)
    whiten = Whiten.fit(x)
    y, log_det = whiten(x)
    assert torch.allclose(y.T @ y / len(y), torch.eye(3).double(), rtol=0, atol=1e-8)
    full = torch.autograd.functional.jacobian(lambda v: whiten(v[None])[0][0], x[0])
    assert float(log_det[0]) == pytest.approx(float(torch.linalg.slogdet(full)[1]), abs=1e-10)
    assert torch.allclose(whiten.inverse(y), x, rtol=0, atol=1e-12)


def test_whitening_respects_weights() -> None:
    x = mixed(300)
    weight = torch.arange(300).remainder(3).double()
    repeated = torch.cat([x[weight == 1], x[weight == 2], x[weight == 2]])
    assert torch.allclose(Whiten.fit(x, weight).scale, Whiten.fit(repeated).scale, rtol=1e-9)


def test_an_axis_without_width_is_not_stretched_to_rounding() -> None:
    x = mixed(500, thin=0.0)
    whiten = Whiten.fit(x)
    assert float(whiten.scale[0] / whiten.scale[-1]) == pytest.approx(1e-5, rel=1e-6)
    assert float(whiten(x)[0][:, 0].abs().max()) < 1e-9  # what rounding left is not made a feature


def test_whitening_stays_double_where_the_flow_is_single() -> None:
    whiten = Whiten.fit(mixed(100)).float()
    assert whiten.rotation.dtype == whiten.scale.dtype == torch.float64
    assert whiten(torch.ones(2, 3))[0].dtype == torch.float64


def chosen(x: Tensor, weight: Tensor | None = None) -> Whiten:
    return Whiten.fit(x, weight, shrinkage=Whiten.best_shrinkage(x, weight))


def test_as_much_is_whitened_as_other_samples_bear() -> None:
    def score(whiten: Whiten, x: Tensor) -> float:
        y, log_det = whiten(x)
        return float((log_det - y.square().sum(1) / 2).mean())

    train, other = mixed(4000), mixed(1000, seed=1)
    assert torch.equal(chosen(train).scale, Whiten.fit(train).scale)
    few = torch.randn(20, 18, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    rest = torch.randn(500, 18, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    assert score(chosen(few), rest) > score(Whiten.fit(few), rest) + 10
    assert score(chosen(few), rest) > score(Whiten.identity(18), rest) - 0.5
    far = train.clone()
    far[7] = torch.tensor([30.0, -30.0, 30.0])  # beside the sheet, and in one fold alone
    assert score(chosen(far), other) > score(Whiten.identity(3), other) - 0.5
    weight = torch.ones(4000)
    weight[7] = 0
    assert torch.equal(chosen(far, weight).scale, Whiten.fit(far, weight).scale)


def test_axes_that_are_not_orthogonal_are_refused() -> None:
    with pytest.raises(DataError, match="not orthogonal"):
        Whiten(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(DataError, match="not positive"):
        Whiten(torch.eye(2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dequantize(1), "levels = 1: expected at least 2"),
        (lambda: Logit(0.5), r"alpha = 0.5: expected 0 <= alpha < 0.5"),
    ],
)
def test_bad_settings(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_constant_feature_is_named() -> None:
    with pytest.raises(DataError, match="feature 1 is constant"):
        Standardize.fit(torch.tensor([[0.0, 2.0], [1.0, 2.0]]))


@pytest.mark.parametrize(
    ("pixels", "message"), [([[0, 17]], "0 to 17: expected 0 to 16"), ([[0.0, 17.5]], "17.5: expected 0 to 17")]
)
def test_values_outside_the_levels(pixels: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Dequantize(17).check(torch.tensor(pixels))
