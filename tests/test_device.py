"""The code paths of a second device, on a machine without one: `pretend.py` says what is held here, and what is not.

The numbers are the CPU's, nothing is on two devices, and the program runs ahead of the device: a solve of fixed steps
reads nothing of it and sends it nothing, a training step reads once. With ``pytest --device cuda`` the numbers are
those of that device, and what only the pretended one can count is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrnode
from pyrnode import Config, Flow, SolverConfig, SolverError, cli, devices, precision, seeds
from pyrnode.data import Splits, TensorSamples
from pyrnode.engines import Probes
from pyrnode.runs import RunFolder
from pyrnode.training import step
from pyrnode.training.state import NotFiniteError
from pyrnode.training.trainer import Trainer
from tests.pretend import DEVICE, Counts, Device, host, pretended, to_device

COARSE = {"evaluation.solver.rtol": 0.01, "evaluation.solver.atol": 0.01}
SMALL: dict[str, Any] = {"engine": "torch", "training.batch_size": 8, "flow.network.hidden": (8, 8), "step_size": 0.5}
SMALL |= COARSE
IMAGES = {**SMALL, "flow.network.hidden": (4, 4), "flow.scales": 2}

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "table": ({**SMALL, "clip_norm": 0.1, "ema": 0.9}, (2,)),
    "soap": ({**SMALL, "optimizer": "soap", "learning_rate": 0.01}, (2,)),
    "gates": ({**SMALL, "time": "concatsquash", "activation": "gelu", "optimizer": "adamw"}, (3,)),
    "context": ({**SMALL, "time": "concatsquash", "activation": "tanh", "solver.memory": "checkpoint"}, (3,)),
    "adaptive": ({**SMALL, "solver.name": "DP5", "solver.rtol": 1e-2, "solver.atol": 1e-2, "dtype": "float64"}, (2,)),
    "backsolve": ({**SMALL, "sensealg": "BacksolveAdjoint", "activation": "silu", "optimizer": "sgd"}, (2,)),
    "nested": ({**SMALL, "total_derivative": 0.1, "penalties.divergence": "exact", "activation": "elu"}, (2,)),
    "images": ({**IMAGES, "data.flip": True, "solver.memory": "store"}, (1, 8, 8)),
    "theirs": ({**IMAGES, "convention": "ffjord-rnode", "penalties.probes": 2, "noise": "rademacher"}, (1, 8, 8)),
}
LEVELS = 17


def samples(name: str) -> Splits:
    """Noise of a case's shape, for the contexts and the weights that it has."""
    _, shape = CASES[name]
    generator, image = torch.Generator().manual_seed(0), len(shape) == 3
    parts = []
    for n in (24, 12, 12):
        x = torch.randn(n, *shape, generator=generator)
        if image:
            x = torch.randint(0, LEVELS, (n, *shape), generator=generator, dtype=torch.uint8)
        c = torch.randn(n, 2, generator=generator, dtype=torch.float64) if name == "context" else None
        weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 if name == "context" else None
        parts.append(TensorSamples(x).carrying(context=c, weight=weight))
    return Splits("noise", *parts, shape, LEVELS if image else None)


def trainer(name: str, device: str, folder: Path | None = None, **more: Any) -> Trainer:
    config = Config().override({**CASES[name][0], "device": device, **more})
    if folder is None:
        return Trainer(config, samples(name), None, progress=False)
    folder.mkdir(exist_ok=True)
    return Trainer(config, samples(name), RunFolder(folder), progress=False)


def steps(subject: Trainer, count: int) -> None:
    batches = subject._batches()
    for _ in range(count):
        assert subject._step(next(batches)) is not None


def alike(flow: Flow, reference: Flow) -> None:
    for p, q in zip(flow.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(host(p.data), q.data, rtol=2e-4, atol=2e-6)


@pytest.fixture(scope="module")
def trained() -> dict[str, Flow]:
    """A flow of each case after two steps on the CPU."""
    flows = {}
    for name in CASES:
        subject = trainer(name, "cpu")
        steps(subject, 2)
        flows[name] = subject.flow.eval()
    return flows


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the numbers come from: the pretended device, or the one that ``--device`` names."""
    named = request.config.getoption("--device")
    if named is None:
        with pretended():
            yield DEVICE
        return
    monkeypatch.setattr(step, "generator", lambda *purpose, device: seeds.generator(*purpose))  # the CPU's noise
    yield devices.resolve_device(named)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The pretended device, which counts."""
    if request.config.getoption("--device") is not None:
        pytest.skip("counted on the pretended device: leave --device out")
    with pretended() as there:
        yield there


def moved(flow: Flow, place: torch.device = DEVICE) -> Flow:
    return copy.deepcopy(flow).to(place)


def total(counts: Any) -> int:
    return sum(counts.values())


# -- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_training_gives_the_cpus_numbers(name: str, trained: dict[str, Flow], place: torch.device) -> None:
    subject = trainer(name, str(place))
    steps(subject, 2)
    alike(subject.flow, trained[name])


def _uses(x: Tensor, values: Tensor, c: Tensor | None) -> dict[str, Callable[[Flow], Any]]:
    tall, few = {"name": "RK4", "step_size": 0.5}, {"kind": "hutchinson", "probes": 2}
    base = torch.linspace(-1, 1, x[0].numel() * 3, dtype=torch.float32).reshape(3, -1)
    two = None if c is None else c[:3]
    return {
        "log_prob": lambda f: f.log_prob(x, c, divergence="hutchinson"),
        "error": lambda f: f.log_prob(x[:2], None if c is None else c[:2], divergence=few, return_error=True),
        "encode": lambda f: f.encode(x, c),
        "decode": lambda f: f.decode(base, two, solver=tall),
        "sample": lambda f: f.sample(3, two, seed=0, temperature=0.5),
        "distribution": lambda f: f.distribution(c, divergence="hutchinson").log_prob(values.to(f.reference.device)),
        "to_torch": lambda f: f.to_torch(tall).log_prob(
            values.to(f.reference), None if c is None else c.to(f.reference)
        ),
        "gradient": lambda f: torch.autograd.grad(
            f.log_prob(x, c, solver=tall, divergence="hutchinson").sum(), list(f.parameters())
        ),
        "second": lambda f: torch.autograd.grad(
            sum(g.square().sum() for g in torch.autograd.grad(
                f.log_prob(x[:1], None if c is None else c[:1], solver=tall, divergence="hutchinson").sum(),
                list(f.blocks[0].dynamics.solved_parameters()), create_graph=True)),
            list(f.blocks[0].dynamics.solved_parameters()),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["table", "context", "theirs"])
def test_every_use_gives_the_cpus_numbers(name: str, trained: dict[str, Flow], place: torch.device) -> None:
    reference, flow, test = trained[name], moved(trained[name], place), samples(name).test
    x, c = test.tensor()[:4], None if test.context is None else test.context[:4]
    values = x if x.is_floating_point() else x + 0.5
    for use, call in _uses(x, values, c).items():
        found, wanted = call(flow), call(reference)
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
        for a, b in pairs:
            assert a.device.type == place.type, use
            torch.testing.assert_close(host(a.detach()), b.detach(), rtol=1e-3, atol=1e-4, msg=lambda m, u=use: u + m)


@pytest.mark.parametrize("name", ["table", "context", "images"])
def test_scores_are_the_cpus(name: str, trained: dict[str, Flow], place: torch.device, tmp_path: Path) -> None:
    flow, splits = moved(trained[name], place), samples(name)
    found, wanted = (pyrnode.evaluate(f, splits, baselines=name == "table") for f in (flow, trained[name]))
    assert not [note for note in found.notes if "left out" in note and "baselines" not in note], found.notes
    for part in ("nats", "bits"):
        assert getattr(found.score, part) == pytest.approx(getattr(wanted.score, part), rel=1e-4)
    assert found.disagreement == pytest.approx(wanted.disagreement, rel=0.05, abs=1e-5)
    assert found.inversion_error == pytest.approx(wanted.inversion_error, rel=0.2, abs=1e-4)
    if name == "context":
        return
    np.save(tmp_path / "x.npy", splits.test.tensor().numpy())
    for f, out in ((flow, "there.csv"), (trained[name], "here.csv")):
        calibration = pyrnode.calibrate(f, splits.validation)
        pyrnode.score_file(f, tmp_path / "x.npy", tmp_path / out, calibration=calibration, chunk=5)
    there, here = (np.loadtxt(tmp_path / out, delimiter=",", skiprows=1) for out in ("there.csv", "here.csv"))
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4)


def test_a_flow_of_the_device_is_exported_for_the_cpu(
    trained: dict[str, Flow], place: torch.device, tmp_path: Path
) -> None:
    flow = moved(trained["table"], place)
    pyrnode.export.save(flow.to_torch(), tmp_path / "flow.safetensors", to="safetensors")
    x = samples("table").test.tensor()[:3]
    loaded = pyrnode.export.load(tmp_path / "flow.safetensors")
    assert loaded.reference.device.type == "cpu"
    torch.testing.assert_close(loaded.log_prob(x), host(flow.to_torch().log_prob(x.to(place))).detach())


def test_a_run_is_saved_and_taken_up_again_on_either(place: torch.device, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "checkpoint_every": 2, "validate_every": 2, "validation_limit": 4}
    whole = trainer("table", str(place), **settings)
    assert whole.run()
    half = trainer("table", str(place), tmp_path / "run", **settings)
    half.folder.begin(half.config)
    steps(half, 2)
    half._save()
    for name in (str(place), "cpu"):
        again = trainer("table", name, tmp_path / "run", **settings)
        again.resume()
        slots = again.state.optimizer.state_dict()["state"][0]
        kinds = slots["step"].device.type, slots["exp_avg"].device.type
        assert kinds == ("cpu", torch.device(name).type)  # Adam reads the step
        steps(again, 2)
        for p, q in zip(again.flow.parameters(), whole.flow.parameters(), strict=True):
            torch.testing.assert_close(host(p.data), host(q.data), rtol=1e-5, atol=1e-6)
    model = tmp_path / "run" / "model.safetensors"
    assert pyrnode.load(model, device=str(place)).reference.device.type == place.type
    assert pyrnode.load(model).reference.device.type == "cpu"


# -- waits, uploads and launches -------------------------------------------------------------------------------------


def last_step(name: str, device: Device, **more: Any) -> Counts:
    """What a training step comes to, once the data are there."""
    subject = trainer(name, "meta", **more)
    batches = subject._batches()
    for _ in range(2):  # the optimiser's memory is made, and constants are sent
        subject._step(next(batches))
    device.reset()
    subject._step(next(batches))
    return device.reset()


@pytest.mark.parametrize("name", ["table", "soap", "gates", "context", "backsolve", "nested", "images", "theirs"])
def test_a_training_step_waits_once_and_sends_nothing(name: str, device: Device) -> None:
    counts = last_step(name, device)
    assert total(counts.waits) == 1, counts.report()
    assert counts.bytes_down <= 40, counts.report()
    assert total(counts.uploads) == 0, counts.report()


def test_samples_that_do_not_fit_are_sent_batch_by_batch(device: Device) -> None:
    size = samples("images").train.tensor().nbytes
    with pretended(memory=8 * size - 1) as small:
        counts = last_step("images", small, **{"solver.memory": "store"})
    assert total(counts.waits) == 1, counts.report()
    assert total(counts.uploads) == 1, counts.report()
    assert counts.bytes_up == 8 * 64, counts.report()


def test_a_training_step_with_adaptive_steps_waits_a_few_times_for_each(device: Device) -> None:
    subject = trainer("adaptive", "meta")
    batches = subject._batches()
    record = None
    for _ in range(2):
        device.reset()
        record = subject._step(next(batches))
    assert record is not None
    counts = device.reset()
    attempts = record["nfe"] / 7  # at most: of the sample that needed most there are more
    assert total(counts.waits) <= 12 + 6 * attempts, counts.report()


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("time", ["concat", "concatsquash"])
def test_a_solve_of_fixed_steps_neither_waits_nor_sends(memory: str, time: str, device: Device) -> None:
    flow = Flow.build(Config().override({**IMAGES, "time": time}), (1, 8, 8), levels=LEVELS).to(DEVICE)
    dynamics, solver = flow.blocks[0].dynamics, SolverConfig(name="RK4", memory=memory)
    z = to_device(torch.randn(4, *dynamics.event_shape)).requires_grad_()
    probes = Probes(to_device(torch.randn(1, *z.shape)), 1.0)
    for _ in range(2):  # the first time, the constants of the grid are sent
        device.reset()
        s = flow.engine.integrate(dynamics, z, probes, (0.0, 1.0), solver)
        (s.z.sum() + s.l.sum() + s.E.sum() + s.n.sum()).backward()
        counts = device.reset()
    assert not counts.waits, counts.report()
    assert not counts.uploads, counts.report()
    assert s.verify is not None
    s.verify()
    assert total(device.reset().waits) == 1


def test_noise_of_training_is_drawn_on_the_device(device: Device) -> None:
    counts = last_step("theirs", device)
    assert counts.bytes_up == 0
    assert counts.kernels["randint"] + counts.kernels["rand"] == 4, counts.report(40)  # three blocks, and the pixels


@pytest.mark.slow
def test_a_step_of_the_papers_network_is_12000_launches_at_most() -> None:
    """At batch 200, on a device of 80 GB; counted without values."""
    images = TensorSamples(torch.zeros(600, 1, 28, 28, dtype=torch.uint8))
    config = Config.preset("finlay2020-mnist").override({"engine": "torch", "device": "meta"})
    with pretended(values=False, memory=80 * 10**9) as device:
        subject = Trainer(config, Splits("zeros", images, images, images, (1, 28, 28), 256), None, progress=False)
        assert sum(p.numel() for p in subject.flow.parameters()) == 800_636
        batch = next(subject._batches())
        device.reset()
        subject._step(batch)
        counts = device.reset()
    assert 2_000 < total(counts.kernels) <= 12_000, counts.report(40)
    assert total(counts.waits) == 1, counts.report()


def test_the_benchmark_of_speed_times_a_step_that_does_not_wait(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = pytest.importorskip("benchmarks.speed")  # which needs torchdiffeq, and a GPU's machine may have none
    monkeypatch.setitem(speed.CASES, "mlp-4", 4)
    timed = speed.pyrnode_step("mlp-4", DEVICE)
    for _ in range(2):
        device.reset()
        timed()
        counts = device.reset()
    assert not counts.waits, counts.report()
    assert not counts.uploads, counts.report()


# -- memory ----------------------------------------------------------------------------------------------------------


def test_limits_are_the_devices_memory_and_on_a_cpu_the_caches(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = torch.zeros(1), to_device(torch.zeros(1))
    assert (devices.piece_limit(here, 5), devices.store_limit(here, 7)) == (5, 7)
    assert (devices.piece_limit(there, 5), devices.store_limit(there, 7)) == (2**30, 2**31)
    monkeypatch.setattr(devices, "free", lambda device: 80)
    assert (devices.piece_limit(there, 5), devices.store_limit(there, 7)) == (10, 20)
    assert not devices.keeps(here.device, 1)
    assert devices.keeps(DEVICE, 2**30)
    assert not devices.keeps(DEVICE, 2**30 + 1)


def test_where_memory_is_short_evaluations_go_through_in_pieces_and_nothing_is_stored(trained: dict[str, Flow]) -> None:
    more = {"solver.memory": "auto"}
    with pretended() as device:
        plenty = total(last_step("images", device, **more).kernels)
    with pretended(memory=2**17) as device:
        subject = trainer("images", "meta", **more)
        steps(subject, 2)
        alike(subject.flow, trained["images"])
        short = total(last_step("images", device, **more).kernels)
    assert short > 2 * plenty


# -- what goes wrong -------------------------------------------------------------------------------------------------


def _broken(flow: Flow, block: int) -> Flow:
    with torch.no_grad():
        flow.blocks[block].dynamics.layers[-1].bias.fill_(torch.nan)
    return flow


@pytest.mark.parametrize(
    "use", [lambda f, x: f.log_prob(x, solver="RK4"), lambda f, x: f.decode(torch.zeros(2, 64), solver="RK4")]
)
def test_a_solve_that_is_not_finite_names_block_and_step(
    use: Callable[[Flow, Tensor], Any], trained: dict[str, Flow], place: torch.device
) -> None:
    x = samples("images").test.tensor()[:2]
    said = []
    for flow in (_broken(copy.deepcopy(trained["images"]), 2), _broken(moved(trained["images"], place), 2)):
        with pytest.raises(SolverError, match=r"block 2 .*not finite after step 1 of 4 \(RK4") as raised:
            use(flow, x)
        said.append(str(raised.value))
        assert raised.value.block == 2
    assert said[0] == said[1]


def test_a_training_step_that_is_not_finite_says_where(place: torch.device) -> None:
    subject = trainer("images", str(place))
    _broken(subject.flow, 1)
    with pytest.raises(SolverError, match=r"block 1 .*not finite after step 1 of 2"):
        steps(subject, 1)
    subject = trainer("table", str(place))
    weight = subject.flow.blocks[0].dynamics.layers[1].weight
    weight.register_hook(lambda bar: bar * torch.inf)
    with pytest.raises(NotFiniteError, match=r"block 0: the gradient of dynamics\.layers\.1\.weight is not finite"):
        steps(subject, 1)


def test_training_recovers_as_on_the_cpu(place: torch.device) -> None:
    subject = trainer("table", str(place), **{"max_steps": 3, "validate_every": 3})
    steps(subject, 1)
    _broken(subject.flow, 0)
    assert subject.run()
    assert [r["event"] for r in subject.history if "event" in r] == ["restart"]
    assert "after step 1 of 2" in next(r["cause"] for r in subject.history if "cause" in r)
    assert all(bool(torch.isfinite(host(p.data)).all()) for p in subject.flow.parameters())


# -- what is the user's ----------------------------------------------------------------------------------------------


def test_the_users_generators_and_switches_stay_as_they_are(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all", "seed", "seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("the user's generators were seeded"))
    torch.backends.cuda.matmul.allow_tf32 = True
    before = _switches()
    try:
        subject = trainer("table", "meta", tmp_path / "run", **{"max_steps": 2, "checkpoint_every": 1})
        subject.folder.begin(subject.config)
        state = torch.get_rng_state()
        assert subject.run()
        flow = subject.best_flow()
        flow.log_prob(samples("table").test.tensor())
        flow.sample(2, seed=0)
        flow.to_torch().sample(2, seed=0)
        assert torch.equal(state, torch.get_rng_state())
        assert _switches() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def _switches() -> list[Any]:
    return [getattr(owner, name) for owner, name, _ in precision.switches()]


def test_a_solve_and_its_pullback_are_ieee_whatever_the_user_has_set(
    trained: dict[str, Flow], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, x = moved(trained["table"]), samples("table").test.tensor()[:2]
    exact, seen = [value for _, _, value in precision.switches()], []
    bind = type(flow.blocks[0].dynamics).bind

    def noticed(self: Any, **settings: Any) -> Any:
        seen.append(_switches())
        return bind(self, **settings)

    monkeypatch.setattr(type(flow.blocks[0].dynamics), "bind", noticed)
    assert _switches() != exact  # torch's own defaults
    before = _switches()
    flow.log_prob(x, solver="RK4").sum().backward()
    flow.decode(torch.zeros(1, 2))
    assert len(seen) >= 3
    assert all(switches == exact for switches in seen)
    with pytest.raises(SolverError):
        _broken(flow, 0).log_prob(x)
    assert _switches() == before


def test_two_threads_that_solve_at_once_leave_the_switches_as_they_were() -> None:
    before, like = _switches(), torch.zeros(1, device=DEVICE)
    first, second = precision.own_precision(like), precision.own_precision(like)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _switches() != before  # the second still computes
    second.__exit__(None, None, None)
    assert _switches() == before


# -- the command line ------------------------------------------------------------------------------------------------


def test_every_command_that_computes_takes_a_device(
    place: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, where = str(tmp_path / "run"), ["--device", str(place)]
    small = {"samples": 60, "hidden": [4], "batch_size": 8, "max_steps": 2, "step_size": 0.5, **COARSE}
    settings = [*(part for key, value in small.items() for part in ("--set", f"{key}={value}")), "--quiet"]
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    used: list[torch.device] = []
    integrate = pyrnode.engines.TorchEngine.integrate

    def noted(self: Any, dynamics: Any, z0: Tensor, *args: Any, **kwargs: Any) -> Any:
        used.append(z0.device)
        return integrate(self, dynamics, z0, *args, **kwargs)

    monkeypatch.setattr(pyrnode.engines.TorchEngine, "integrate", noted)
    for command in (
        ["train", "8gaussians", "--out", run, "--no-evaluation", *settings],
        ["evaluate", run, "--set", "test_limit=4", "--quiet"],
        ["sample", run, "--out", str(tmp_path / "s.csv"), "-n", "2"],
        ["score", run, str(tmp_path / "x.npy"), "--out", str(tmp_path / "s.json"), "--scores-only", "--quiet"],
        ["export", run, "--to", "safetensors", "--out", str(tmp_path / "f.safetensors")],
    ):
        used.clear()
        assert cli.main([*command, *where]) == 0, capsys.readouterr().err
        assert used, command[0]
        assert {there.type for there in used} == {place.type}, command[0]
    monkeypatch.setattr(pyrnode.demo, "train", lambda *args, **settings: pytest.fail(str(settings["device"])))
    with pytest.raises(pytest.fail.Exception, match=str(place)):
        cli.main(["demo", "--out", run, "--quiet", *where])
    assert cli.main(["sample", run, "--out", str(tmp_path / "s.csv"), "--device", "nowhere"]) == 1
    assert "device = 'nowhere' cannot be used" in capsys.readouterr().err
