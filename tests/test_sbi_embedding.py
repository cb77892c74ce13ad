"""Observations of any shape in sbi: networks that make vectors of them, trained with the flow."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

import pyrnode
from pyrnode.errors import ConfigError, DataError
from pyrnode.sbi import likelihood, rnode, train
from tests import networks
from tests.networks import Recurrent, convolutional
from tests.test_sbi import needs_sbi

PRIOR = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
SHAPE = (1, 6, 6)


def simulations(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose upper and lower half are as bright as the two parameters say: 18 pixels of noise 1 each."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(n, 2, generator=generator)
    x = theta.repeat_interleave(3, 1)[:, None, :, None] + torch.randn(n, *SHAPE, generator=generator)
    return theta, x


def exact(x: Tensor) -> Independent:
    mean = torch.stack([x[:, 0, :3].sum((1, 2)), x[:, 0, 3:].sum((1, 2))], 1) / 19
    return Independent(Normal(mean, torch.full_like(mean, 19**-0.5)), 1)


def gap(estimator: Any) -> float:
    theta, x = simulations(400, seed=7)
    with torch.no_grad():
        return float((exact(x).log_prob(theta) - estimator.eval().log_prob(theta[None], x)[0]).mean())


@needs_sbi
@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
@pytest.mark.parametrize("made", [convolutional, convolutional()], ids=["factory", "module"])
def test_sbi_trains_it_with_the_flow(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbi.inference import NPE

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theta, x = simulations(1500)
    builder = rnode(PRIOR, embedding=made, hidden=[16, 16], kinetic=1e-3, jacobian=1e-3)
    inference = NPE(PRIOR, density_estimator=builder, show_progress_bars=False).append_simulations(theta, x)
    estimator = inference.train(max_num_epochs=15, training_batch_size=100, learning_rate=1e-2)
    assert (estimator.input_shape, estimator.condition_shape) == ((2,), SHAPE)
    assert gap(estimator) < 0.25  # 1.6 nats before
    observed = simulations(1, seed=9)[1]
    posterior = inference.build_posterior()
    samples = posterior.sample((2000,), x=observed, show_progress_bars=False)
    assert float((samples.mean(0) - exact(observed).mean[0]).abs().max()) < 0.15
    grid = estimator.log_prob(torch.randn(5, 1, 2), simulations(3)[1])
    assert grid.shape == (5, 3)
    assert estimator.sample(torch.Size([4]), simulations(3)[1]).shape == (4, 3, 2)
    torch.save(estimator, buffer := io.BytesIO())
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(again.log_prob(theta[:9], x[:9]), estimator.log_prob(theta[:9], x[:9]))


@needs_sbi
def test_pyrnodes_trainer_trains_it_and_the_file_names_it(tmp_path: Path) -> None:
    from sbi.inference import NPE

    theta, x = simulations(1500)
    settings = {"hidden": [16, 16], "max_steps": 200, "progress": False, "out": tmp_path / "run"}
    estimator = train(theta, x, PRIOR, embedding=convolutional, **settings)
    assert gap(estimator) < 0.2
    posterior = NPE(PRIOR, show_progress_bars=False).build_posterior(estimator)
    observed = simulations(1, seed=9)[1]
    samples = posterior.sample((2000,), x=observed, show_progress_bars=False)
    assert float((samples.mean(0) - exact(observed).mean[0]).abs().max()) < 0.15
    flow = pyrnode.load(tmp_path / "run", embedding=convolutional)
    assert torch.equal(flow.log_prob(theta, x), estimator.net.log_prob(theta, x))


@needs_sbi
def test_every_loss_in_sbi_has_a_gradient_for_it_and_its_dropout_ends_with_training() -> None:
    theta, x = simulations(300)
    estimator = rnode(PRIOR, embedding=functools.partial(convolutional, dropout=0.5), hidden=[8])(theta, x)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    estimator.train().loss(theta, x).mean().backward()
    for name, parameter in estimator.net.embedding.named_parameters():
        assert float(parameter.grad.abs().max()) > 1e-5, name
    one, other = (estimator.eval().loss(theta, x) for _ in range(2))
    assert torch.equal(one, other)
    assert estimator.train().net.embedding.training


@needs_sbi
def test_the_training_solver_is_chosen_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be taken for the solver's error."""
    theta, x = simulations(60)
    estimator = rnode(PRIOR, embedding=functools.partial(convolutional, dropout=0.5), hidden=[8])(theta, x).train()
    modes, log_prob = list[bool](), estimator.net.log_prob

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        modes.append(any(part.training for part in estimator.net.embedding.modules()))
        value: Tensor = log_prob(*args, **kwargs)
        return value

    monkeypatch.setattr(estimator.net, "log_prob", noted)
    estimator._adjust(theta, x)
    assert modes
    assert not any(modes)
    assert all(part.training for part in estimator.net.embedding.modules())


@needs_sbi
def test_time_series_and_parameters_have_networks_too() -> None:
    theta = PRIOR.sample((50,))
    x = theta[:, None] + torch.randn(50, 5, 2)
    estimator = rnode(PRIOR, embedding=Recurrent, hidden=[8])(theta, x)
    assert estimator.log_prob(theta[:, None], x[:3]).shape == (50, 3)
    reverse = likelihood(embedding=functools.partial(networks.Tied, features=2), hidden=[8])(theta, x[:, -1])
    assert (reverse.input_shape, reverse.condition_shape) == ((2,), (2,))
    assert reverse.log_prob(x[:1, -1].expand(7, 1, 2), theta[:4]).shape == (7, 4)


@needs_sbi
def test_what_does_not_fit_is_refused_in_words() -> None:
    theta, x = simulations(30)
    with pytest.raises(DataError, match=r"make a vector of each observation, or pass embedding="):
        rnode(PRIOR)(theta, x)
    with pytest.raises(DataError, match=r"make a vector of each observation"):
        likelihood(embedding=convolutional)(theta, x)  # the density's own variable
    with pytest.raises(ConfigError, match="the embedding fails on contexts of shape"):
        rnode(PRIOR, embedding=Recurrent)(theta, x)
    with pytest.raises(ConfigError, match=r"expected an nn\.Module, a function or class"):
        rnode(PRIOR, embedding=7)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="observations: 1 of 30 simulations have NaN"):
        train(theta, torch.where(torch.arange(30)[:, None, None, None] < 1, torch.nan, x), embedding=convolutional)
