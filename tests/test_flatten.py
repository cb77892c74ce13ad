"""Images taken for vectors (`flow.flatten`): the density is that of the same table of pixels, everywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, ConfigError, Flow
from pyrnode.data import MappedSamples
from pyrnode.data.samples import Splits, TensorSamples
from pyrnode.training import blueprint
from pyrnode.training.blueprint import Blueprint
from pyrnode.transforms import Chain, Dequantize, Flatten, Logit, Standardize, Whiten

SETTINGS = {"flatten": True, "hidden": [8, 8], "dtype": "float64", "engine": "torch", "alpha": 0.01}


def images(n: int = 60, *, levels: int = 8) -> Tensor:
    """Grey images ``(n, 1, 3, 2)`` whose pixels depend on each other."""
    generator = torch.Generator().manual_seed(0)
    tone = torch.rand(n, 1, 1, 1, generator=generator)
    grain = torch.rand(n, 1, 3, 2, generator=generator)
    return ((0.7 * tone + 0.3 * grain) * levels).floor().clamp(0, levels - 1).to(torch.uint8)


def splits(x: Tensor, levels: int | None) -> Splits:
    parts = [TensorSamples(part) for part in (x[: len(x) // 2], x[len(x) // 2 :], x[len(x) // 2 :])]
    return Splits("images", *parts, tuple(x.shape[1:]), levels=levels)


def test_pixels_are_kept_in_their_order() -> None:
    x = torch.arange(24.0, dtype=torch.float64).reshape(2, 2, 2, 3)
    flatten = Flatten((2, 2, 3))
    y, log_det = flatten(x)
    assert torch.equal(y[1], torch.arange(12.0, 24.0, dtype=torch.float64))
    assert torch.equal(flatten.inverse(y), x)
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))
    assert flatten.shape((2, 2, 3)) == Chain([Flatten((2, 2, 3)), Logit(0.1)]).shape((2, 2, 3)) == (12,)


@pytest.mark.parametrize("kind", ["mlp", "potential"])
def test_an_untrained_flow_is_the_normal_density_of_whitened_logits(kind: str) -> None:
    x = images()
    given = splits(x, 8)
    config = Config().override({**SETTINGS, "standardize": "whiten", "network.kind": kind, "activation": "softplus"})
    flow = Blueprint(given, None).fitted(config)
    parts = list(flow.transform.transforms)
    assert [type(part) for part in parts] == [Dequantize, Logit, Flatten, Standardize, Whiten]
    spread = x[30:].double() + 0.5
    q = 0.01 + 0.98 * spread.flatten(1) / 8
    logits = q.log() - (1 - q).log()
    y = (logits - parts[3].mean) / parts[3].std @ parts[4].rotation / parts[4].scale
    slope = (0.98 / 8 / (q * (1 - q))).log().sum(1) - parts[3].std.log().sum() - parts[4].scale.log().sum()
    expected = -(y.square().sum(1) + 6 * math.log(2 * math.pi)) / 2 + slope
    assert torch.allclose(flow.log_prob(spread), expected, atol=1e-9)


def test_its_moments_are_those_of_many_draws_of_the_noise() -> None:
    x = images()
    flow = Blueprint(splits(x, 8), None).fitted(Config().override({**SETTINGS, "standardize": "scale"}))
    generator = torch.Generator().manual_seed(1)
    front = Chain([Dequantize(8, torch.float64), Logit(0.01), Flatten((1, 3, 2))])
    y = torch.cat([front(x[:30], generator)[0] for _ in range(2000)])
    scale = flow.transform.transforms[-1]
    assert torch.allclose(scale.mean, y.mean(0), atol=0.05)
    assert torch.allclose(scale.std, y.std(0), rtol=0.05)


def test_shrinkage_is_chosen_on_samples_of_which_no_two_are_draws_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the folds of the cross-validation would know each other, and nothing would be shrunk."""
    seen: list[Tensor] = []
    monkeypatch.setattr(Whiten, "best_shrinkage", lambda x, weight=None: seen.append(x) or 0.5)
    x = images()
    flow = Blueprint(splits(x, 8), None).fitted(Config().override({**SETTINGS, "standardize": "auto"}))
    assert [len(given) for given in seen] == [30]
    assert float(flow.transform.transforms[-1].scale.square().min()) >= 0.5


def test_a_file_that_is_mapped_gives_the_same_transforms() -> None:
    x = torch.randn(40, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 1e6
    config = Config().override({**SETTINGS, "standardize": "whiten"})
    whole = splits(x, None)
    mapped = replace(whole, train=MappedSamples(x[:20]))
    one, other = (list(Blueprint(given, None).fitted(config).transform.transforms) for given in (whole, mapped))
    assert [type(part) for part in one] == [type(part) for part in other] == [Flatten, Standardize, Whiten]
    assert torch.allclose(one[1].mean, other[1].mean, rtol=1e-12)
    assert torch.allclose(one[1].std, other[1].std, rtol=1e-9)
    assert torch.allclose(one[2].scale, other[2].scale, rtol=1e-9)


@pytest.mark.parametrize(("numbers", "drawn"), [(30 * 6 * 2, 60), (30 * 6, 30), (12 * 6, 12)])
def test_large_images_are_drawn_as_often_as_memory_bears(
    numbers: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    fit = Standardize.fit
    monkeypatch.setattr(blueprint, "_NUMBERS", numbers)
    monkeypatch.setattr(Standardize, "fit", lambda x, weight=None: seen.append(x) or fit(x, weight))
    Blueprint(splits(images(), 8), None).fitted(Config().override(SETTINGS))
    assert [len(given) for given in seen] == [drawn]


def test_continuous_images_are_the_table_of_their_pixels() -> None:
    x = torch.randn(40, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 1e6
    settings = {**SETTINGS, "standardize": "auto"}
    image = Blueprint(splits(x, None), None).fitted(Config().override(settings))
    table = Blueprint(splits(x.flatten(1), None), None).fitted(Config().override({**settings, "flatten": False}))
    assert torch.equal(image.log_prob(x), table.log_prob(x.flatten(1)))
    assert torch.equal(image.sample(3, seed=0), table.sample(3, seed=0).reshape(3, 1, 2, 3))


def test_train_save_load_and_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=images(200).squeeze(1).numpy())
    settings = {**SETTINGS, "standardize": "auto", "max_steps": 5, "batch_size": 20, "data.levels": 8}
    result = pyrnode.train(tmp_path / "images.npz", out=tmp_path / "run", progress=False, **settings)
    x = images(5)
    flow, loaded = result.flow, pyrnode.load(tmp_path / "run", engine="torch")
    assert result.report is not None
    assert result.report.inversion_error is not None
    assert result.report.inversion_error < 1e-4
    assert flow.sample(4, seed=0).shape == (4, 1, 3, 2)
    assert flow.decode(torch.zeros(0, 6, dtype=torch.float64)).shape == (0, 1, 3, 2)
    assert torch.equal(flow.log_prob(x), loaded.log_prob(x))


def test_what_needs_vectors_says_how_images_become_them() -> None:
    for kind in ("mlp", "potential"):
        with pytest.raises(ConfigError, match="flatten = true"):
            Flow.build(Config().override({"network.kind": kind, "activation": "softplus"}), (1, 4, 4), levels=8)
    with pytest.raises(ConfigError, match="flatten=true"):
        Flow.build(Config().override({"standardize": "whiten"}), (1, 4, 4))
    with pytest.raises(ConfigError, match=r"needs images \(C, H, W\)"):
        Flow.build(Config().override({"network.kind": "conv", "flatten": True}), (1, 4, 4), levels=8)
