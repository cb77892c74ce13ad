"""Images standardised by channel: their moments, and the density of an untrained flow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyrnode
from pyrnode import Config
from pyrnode.composition import base_log_prob
from pyrnode.data import MappedSamples
from pyrnode.data.samples import Splits, TensorSamples
from pyrnode.training.blueprint import Blueprint
from pyrnode.transforms import Chain, Dequantize, Logit, Standardize

SETTINGS = {"hidden": [4], "dtype": "float64", "engine": "torch", "alpha": 0.01, "standardize": "channels"}


def test_channels_have_one_mean_and_one_deviation() -> None:
    """Those of all their pixels, far from zero too, where squares would have no digits left."""
    x = torch.randn(40, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 1e8 + x * torch.tensor([1.0, 5.0]).reshape(2, 1, 1) + torch.arange(12.0).reshape(3, 4)
    scale = Standardize.fit(x).by_channel()
    assert scale.mean.shape == scale.std.shape == (2, 3, 4)
    for channel in range(2):
        pixels = x[:, channel]
        assert torch.allclose(scale.mean[channel], pixels.mean(), rtol=1e-14)
        assert torch.allclose(scale.std[channel], pixels.std(correction=0), rtol=1e-9)


def test_an_untrained_flow_is_the_normal_density_of_standardised_logits() -> None:
    x = torch.randint(0, 8, (60, 2, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    x[:, 1] //= 4  # a darker channel
    splits = Splits("x", TensorSamples(x), TensorSamples(x), TensorSamples(x), (2, 4, 4), levels=8)
    flow = Blueprint(splits, None).fitted(Config().override(SETTINGS))
    assert [type(part) for part in flow.transform.transforms] == [Dequantize, Logit, Standardize]
    scale = flow.transform.transforms[-1]
    spread = x.double() + 0.5
    y, log_det = Chain([Dequantize(8), Logit(0.01)])(spread)
    y = (y - scale.mean[:, :1, :1]) / scale.std[:, :1, :1]
    assert float(y.mean((0, 2, 3)).abs().max()) < 0.3
    assert float(scale.mean[1, 0, 0]) < float(scale.mean[0, 0, 0]) - 0.5
    expected = base_log_prob(y.flatten(1)) + log_det - 16 * scale.std[:, 0, 0].log().sum()
    with torch.no_grad():
        assert torch.allclose(flow.log_prob(spread), expected, atol=1e-9)


def test_a_file_that_is_mapped_has_the_same_channels() -> None:
    x = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 1e6
    splits = Splits("x", TensorSamples(x[:20]), TensorSamples(x[20:]), TensorSamples(x[20:]), (3, 4, 4))
    config = Config().override(SETTINGS)
    found = [
        Blueprint(replace(splits, train=train), None).fitted(config).transform.transforms[0]
        for train in (splits.train, MappedSamples(x[:20]))
    ]
    assert torch.allclose(found[0].mean, found[1].mean, rtol=1e-12)
    assert torch.allclose(found[0].std, found[1].std, rtol=1e-9)


def test_a_run_is_saved_and_read(tmp_path: Path) -> None:
    x = torch.randint(0, 8, (60, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    settings = {**SETTINGS, "max_steps": 2, "batch_size": 20, "levels": 8}
    result = pyrnode.train(x, **settings, out=tmp_path / "run", evaluate=False, progress=False)
    again = pyrnode.load(tmp_path / "run")
    assert torch.equal(again.transform.transforms[-1].mean, result.flow.transform.transforms[-1].mean)
    spread = x[:5].double() + 0.5
    with torch.no_grad():
        assert torch.equal(again.log_prob(spread), result.flow.log_prob(spread))


def test_tables_have_no_channels() -> None:
    with pytest.raises(pyrnode.ConfigError, match="standardize = 'channels': for images"):
        pyrnode.train(torch.randn(40, 2), standardize="channels", max_steps=1, evaluate=False, progress=False)
