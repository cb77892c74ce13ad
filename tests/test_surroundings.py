"""What surrounds a call does not change it: threads, global generators, the default type, autograd's modes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode.config import Config
from pyrnode.data import load
from pyrnode.distributed import alone
from pyrnode.dynamics import MLP, ConvNet, ModuleDynamics
from pyrnode.flow import Flow
from pyrnode.training.blueprint import _standardised

# -- initialisation --------------------------------------------------------------------------------------------------

SETTINGS = {
    "vectors": ({"flow.network.hidden": [16, 8], "flow.blocks": 2}, (3,), 0),
    "contexts": ({"flow.network.hidden": [16], "flow.network.time": "concatsquash"}, (3,), 2),
    "images": ({"flow.network.hidden": [4, 4], "flow.scales": 2}, (1, 8, 8), 0),
}


def config(name: str, seed: int = 5) -> Config:
    return Config().override({**SETTINGS[name][0], "seed": seed})


def built(name: str, seed: int = 5) -> list[Tensor]:
    _, shape, context_dim = SETTINGS[name]
    return list(Flow.build(config(name, seed), shape, context_dim=context_dim).parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_those_of_the_global_generator_with_the_same_seed(name: str) -> None:
    _, shape, context_dim = SETTINGS[name]
    found = built(name)
    torch.manual_seed(5)
    network = config(name).flow.network
    options: dict[str, Any] = {"time": network.time, "context_dim": context_dim}
    if len(shape) == 1:
        made = [MLP(shape[0], network.hidden, **options) for _ in range(config(name).flow.blocks)]
    else:  # blocks, squeeze, blocks, factor out, blocks
        made = [ConvNet(s, network.hidden, **options) for s in ((1, 8, 8), (4, 4, 4), (2, 4, 4))]
    expected = [p for dynamics in made for p in dynamics.parameters()]
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z))


def own(seed: int) -> list[Tensor]:
    return list(Flow.build(Config(seed=seed), (3,), dynamics=lambda s: ModuleDynamics(Own(), s)).parameters())


@pytest.mark.parametrize("make", [lambda seed: built("vectors", seed), lambda seed: built("images", seed), own])
def test_building_is_safe_in_threads_and_touches_no_global_generator(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA's generators were seeded"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: pytest.fail("CUDA's generator was seeded"))
    state = torch.get_rng_state()
    expected = [make(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(make, [i % 4 for i in range(100)]))
    assert torch.equal(torch.get_rng_state(), state)
    for i, parameters in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected[i % 4], strict=True)), i


def test_a_flow_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        parts = Flow.build(Config().override({"flow.network.hidden": [10**6, 10**6], "flow.standardize": "none"}), (3,))
    assert {p.device.type for p in parts.parameters()} == {"meta"}


# -- default type and modes ------------------------------------------------------------------------------------------

EVERYTHING = """
import hashlib, json, sys, tempfile, warnings
from pathlib import Path
import torch
torch.set_default_dtype(getattr(torch, sys.argv[1]))
import pyrnode
def digest(*tensors):
    h = hashlib.sha256()
    for x in tensors:
        x = x.detach().contiguous()
        h.update(f"{x.dtype} {tuple(x.shape)}".encode() + x.numpy().tobytes())
    return h.hexdigest()
folder = Path(tempfile.mkdtemp())
result = {}
table = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32).cumsum(1)
small = {"flow.network.hidden": [8], "max_steps": 6, "batch_size": 50, "device": "cpu"}
for name in sys.argv[2:]:
    data = table if name == "table" else name
    more = {"context": table[:, :1], **small} if name == "table" else small | {"data.limit": 120}
    out = pyrnode.train(data, out=folder / name, progress=False, evaluate=True, **more)
    flow = pyrnode.load(folder / name)
    x = table[:20] if name == "table" else pyrnode.data.load(name).test.first(8).x
    c = table[:20, :1] if name == "table" else None
    args = () if c is None else (c,)
    module = flow.to_torch({"step_size": 0.5})
    fresh = pyrnode.flow.Flow.build(flow.config, flow.event_shape, context_dim=flow.context_dim)
    y = x if name == "table" else x.float() + 0.5
    result[name] = {
        "weights": digest(*flow.state_dict().values()),
        "initial": digest(*fresh.parameters()),
        "log_prob": digest(flow.log_prob(x, *args)),
        "estimate": digest(flow.log_prob(x, *args, divergence="hutchinson")),
        "encode": digest(flow.encode(x, *args)),
        "sample": digest(flow.sample(4, None if c is None else c[0], seed=1)),
        "module": digest(module.log_prob(y, *args)),
        "model.safetensors": hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest(),
    }
print(json.dumps(result))
"""


def everything(dtype: str, *names: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING, dtype, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["table", "digits"])
def test_the_default_type_changes_nothing(name: str) -> None:
    assert everything("float64", name) == everything("float32", name)


def test_inference_mode(tmp_path: Any) -> None:
    flow = Flow.build(config("vectors"), (3,))
    path = tmp_path / "model.safetensors"
    flow.save(path)
    x = torch.randn(5, 3)
    expected = flow.log_prob(x).detach()
    with torch.inference_mode():
        loaded = pyrnode.load(path)
        assert torch.equal(loaded.log_prob(x), expected)
        assert torch.equal(loaded.sample(3, seed=1), flow.sample(3, seed=1))
        assert torch.equal(loaded.log_prob(torch.randn(5, 3) * 0 + x), expected)
        assert torch.equal(loaded.to_torch().log_prob(x), flow.to_torch().log_prob(x).detach())
    y = x.clone().requires_grad_()
    loaded.log_prob(y).sum().backward()  # it is a flow like any other
    assert y.grad is not None


def test_training_where_autograd_is_off() -> None:
    settings: dict[str, Any] = {"flow.network.hidden": [8], "max_steps": 5, "batch_size": 50}
    x = torch.randn(200, 2)
    expected = pyrnode.train(x, evaluate=False, progress=False, **settings)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = pyrnode.train(x, evaluate=False, progress=False, **settings)
        pairs = zip(found.flow.parameters(), expected.flow.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("solver", ["DP5", "RK4"])
def test_inference_mode_with_a_module_of_the_users_own(solver: str) -> None:
    """Its divergence takes autograd, which the mode has switched off."""
    flow = Flow.build(Config(), (3,), dynamics=lambda s: ModuleDynamics(Own(), s))
    x = torch.randn(5, 3)
    expected = flow.log_prob(x, solver=solver).detach()
    with torch.inference_mode():
        assert torch.equal(flow.log_prob(x * 1, solver=solver), expected)


# -- by construction -------------------------------------------------------------------------------------------------

MAKERS = {
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "arange",
    "linspace",
    "eye",
    "randperm",
    "randint",
}
WHOLE = {"arange", "randperm", "randint"}
"""Whose type follows from whole numbers."""

ON_META = {"transforms.py", "nested.py", "plain.py", "exported.py", "composition.py", "devices.py"}
"""Files that make buffers of modules, which are built on the meta device before a file's are loaded."""


def test_every_tensor_that_the_package_makes_names_its_device_and_its_type() -> None:
    unnamed = []
    for path in sorted(Path(pyrnode.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MAKERS):
                continue
            if ast.unparse(call.func.value) != "torch":
                continue
            named = {keyword.arg for keyword in call.keywords}
            needed = {"device"} - ({"device"} if path.name in ON_META else set())
            array = call.func.attr == "tensor" and isinstance(call.args[0], (ast.Name, ast.Subscript))
            needed |= set() if array or call.func.attr in WHOLE or path.name == "devices.py" else {"dtype"}
            if not needed <= named:
                unnamed.append(f"{path.name}:{call.lineno}: {ast.unparse(call)}")
    assert unnamed == []


def test_transforms_are_on_the_samples_device_whatever_the_default_one_is() -> None:
    """Of columns that whitening leaves as they are, and of such that it turns. "meta" is a device without numbers."""
    plain = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    for x in (plain, plain @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 0.9], [0.0, 0.0, 0.2]])):
        splits = load(x)
        torch.set_default_device("meta")
        try:
            transform, _ = _standardised(Config.preset("table"), splits, alone)
        finally:
            torch.set_default_device(None)
        assert transform is not None
        assert len(transform.transforms) == 4
        assert {buffer.device.type for buffer in transform.buffers()} == {"cpu"}
