"""pyrnode against the standard construction, which shares no code with it: the same loss and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.reference import ReferenceImageFlow, ReferenceMLPFlow
from pyrnode.config import Config
from pyrnode.flow import Flow
from pyrnode.objective import objective
from pyrnode.probes import Probes

STEP = 1 / 32  # torchdiffeq's rk4 is another tableau of order 4: at this step both are exact to 1e-8


def settled(flow: Flow) -> Flow:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return flow


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_loss_and_gradients(kind: str) -> None:
    settings = {
        "dtype": "float64",
        "standardize": "none",
        "blocks": 2,
        "flow.network.hidden": (6, 5),
        "step_size": STEP,
    }
    config = Config().override(settings)
    shape = (3,) if kind == "vectors" else (1, 8, 8)
    ours = settled(Flow.build(config, shape))
    if kind == "vectors":
        theirs = ReferenceMLPFlow(3, (6, 5), blocks=2, gradients="backprop", step_size=STEP).double()
    else:
        theirs = ReferenceImageFlow(1, 8, 8, (6, 5), 2, 2, gradients="backprop", step_size=STEP).double()
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        for layer, twin in zip(block.dynamics.layers, other.network.layers, strict=True):
            twin.weight.data = torch.cat((layer.time_weight, layer.weight), 1).data
            twin.bias.data = layer.bias.data
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).double()
    probes = theirs.probes(x, torch.Generator().manual_seed(2))
    queue = iter(probes)

    def draw(z: Tensor) -> Probes:
        return Probes(next(queue)[None], 1.0)

    loss = objective(ours.solve(x, draw, config.solver), config.penalties).loss
    expected = theirs.loss(x, probes)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-8)
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        for layer, twin in zip(block.dynamics.layers, other.network.layers, strict=True):
            joined = torch.cat((layer.time_weight.grad, layer.weight.grad), 1)
            assert torch.allclose(joined, twin.weight.grad, rtol=0, atol=1e-8)
            assert torch.allclose(layer.bias.grad, twin.bias.grad, rtol=0, atol=1e-8)
