"""Exported files, which run, and are checked, without pyrnode; and the commands for them."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyrnode
from pyrnode import export
from pyrnode.cli import main
from pyrnode.config import Config, Divergence
from pyrnode.dynamics import ModuleDynamics
from pyrnode.errors import CheckpointError, ConfigError, EngineUnavailableError
from pyrnode.export import TorchFlow, containers, to_torch
from pyrnode.export.exported import TOLERANCES
from pyrnode.export.programs import PROGRAMS
from pyrnode.flow import Flow
from tests.test_export import ROOT, error, small
from tests.test_flow import FLOWS, build, data_for

# -- files -----------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys, zipfile
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pyrnode", "juliacall"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
x = torch.tensor(json.loads(sys.argv[1]))
encode, decode, sample = (torch.export.load(name).module() for name in sys.argv[2:5])
z, log_det, log_prob = encode(x)
torch.manual_seed(7)
out = [z, log_det, log_prob, decode(z), sample(6)]
parameter = next(encode.parameters())
log_prob.sum().backward()
assert not any(name.startswith("pyrnode") for name in sys.modules)
print(json.dumps([v.tolist() for v in out] + [float(parameter.grad.abs().sum())]))
"""


@pytest.mark.parametrize("name", ["vector, two blocks", "vector, own module", "vector, edges opened"])
def test_programs_run_where_pyrnode_is_not(name: str, tmp_path: Path) -> None:
    flow = FLOWS[name]().float()
    module = to_torch(flow, {"step_size": 0.5})
    paths = [tmp_path / f"{program}.pt2" for program in PROGRAMS]
    for path in paths:
        assert export.save(module, path, program=path.stem).largest == 0
    x = module.sample(7, seed=9)  # another batch size than that of the export
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(x.tolist()), *map(str, paths)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    *values, slope = json.loads(result.stdout)
    z, log_det = module(x)
    torch.manual_seed(7)
    expected = [z, log_det, module.log_prob(x), module.inverse(z), module.sample(6)]
    assert max(error(torch.tensor(v), want) for v, want in zip(values, expected, strict=True)) < 1e-6
    (gradient,) = torch.autograd.grad(module.log_prob(x).sum(), next(module.parameters()))
    assert slope == pytest.approx(float(gradient.abs().sum()), rel=1e-4)


def test_program_of_an_image_flow(tmp_path: Path) -> None:
    flow = FLOWS["images, two scales"]().float()
    module = to_torch(flow, {"step_size": 0.5}, divergence=Divergence("hutchinson", 2))
    result = export.save(module, tmp_path / "encode.pt2")
    assert (result.target, result.program, list(result.differences)) == (
        "torch.export",
        "encode",
        ["z", "log_det", "log_prob"],
    )
    assert result.largest < 1e-6
    x = data_for(flow, 3).float()
    with torch.no_grad():
        z, _, log_prob = torch.export.load(tmp_path / "encode.pt2").module()(x)
        assert error(z, module(x)[0]) < 1e-4
        assert error(log_prob, module.log_prob(x)) < 1e-2  # of thousands


@pytest.mark.parametrize("name", ["vector", "vector, own module", "vector, edges opened", "images, one scale"])
def test_onnx_runs_in_onnxruntime(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    flow = FLOWS[name]().float()
    module = to_torch(flow, {"step_size": 0.5}, divergence="hutchinson")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3

    def run(program: str, **feeds: Any) -> list[Tensor]:
        assert export.save(module, tmp_path / program, to="onnx", program=program).largest < TOLERANCES["float32"]
        session = onnxruntime.InferenceSession((tmp_path / program).read_bytes(), options)
        assert [i.shape[0] for i in session.get_inputs()] == ["batch"]
        return [torch.from_numpy(v) for v in session.run(None, feeds)]

    x = data_for(flow, 6).float()
    with torch.no_grad():
        z, log_det = module(x)
        for value, want in zip(run("encode", x=x.numpy()), (z, log_det, module.log_prob(x)), strict=True):
            assert error(value / want.abs().clamp(min=1), want / want.abs().clamp(min=1)) < 1e-5
        (decoded,) = run("decode", z=z.numpy())
        assert error(decoded, module.inverse(z)) < 1e-4


def test_onnx_sampler(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = to_torch(small(), {"step_size": 0.5})
    result = export.save(module, tmp_path / "sample.onnx", to="onnx", program="sample")
    assert result.largest < 0.25
    with pytest.raises(ConfigError, match=r"float32 only.*module\.to\(torch\.float32\)"):
        export.save(to_torch(build((2,)), {"step_size": 0.5}), tmp_path / "double.onnx", to="onnx")


@pytest.mark.parametrize("name", ["vector, two blocks", "vector, as it is", "images, two scales", "images, flattened"])
@pytest.mark.parametrize(
    "settings",
    [{"solver": {"step_size": 0.5}, "divergence": {"kind": "hutchinson", "seed": 3}}, {"solver": {"rtol": 1e-3}}],
)
def test_safetensors_come_back(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    module = to_torch(FLOWS[name](), **settings)
    assert export.save(module, tmp_path / "flow", to="safetensors").largest == 0
    loaded = export.load(tmp_path / "flow")
    x = module.sample(3, seed=2)
    assert torch.equal(loaded.log_prob(x), module.log_prob(x))
    assert loaded.extra_repr() == module.extra_repr()
    assert list(loaded.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flow__network__time": "concatsquash", "flow__blocks": 2},
        {"flow__standardize": "radial"},
        {"flow__standardize": "auto"},
    ],
)
@pytest.mark.parametrize("activation", ["softplus", "tanh"])
def test_description_is_read_by_the_documentations_reader(
    activation: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """NumPy alone gives the flow's log-density from the JSON, by the code that the documentation prints."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    reader: dict[str, Any] = {}
    exec(compile(code, "export.md", "exec"), reader)
    flow = build((3,), flow__network__activation=activation, **settings)
    export.save(to_torch(flow, {"step_size": 0.05}), tmp_path / "flow", to="safetensors")
    x = data_for(flow, 2)
    expected = flow.log_prob(x).detach()
    for row, want in zip(x, expected, strict=True):
        assert float(reader["log_prob"](str(tmp_path / "flow"), row.numpy())) == pytest.approx(float(want), abs=1e-7)


@pytest.mark.parametrize("engine", ["torch", pytest.param("julia", marks=pytest.mark.needs_julia)])
@pytest.mark.parametrize("suffix", ["pt2", "onnx", "safetensors"])
def test_a_run_of_either_engine_exports_and_agrees(engine: str, suffix: str, tmp_path: Path) -> None:
    """With a solver of its own; the file's numbers are those of the engine's accurate solver."""
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    x, c = torch.randn(200, 2), torch.randn(200, 1)
    solver = {"name": "Vern7", "lazy": False} if engine == "julia" else "Tsit5"
    settings = {"flow.network.hidden": [8], "max_steps": 5, "batch_size": 50, "engine": engine}
    run, path = tmp_path / "run", tmp_path / f"flow.{suffix}"
    pyrnode.train(x + c, context=c, solver=solver, **settings, out=run, evaluate=False, progress=False)
    target = {"pt2": "torch.export"}.get(suffix, suffix)
    assert (
        command("export", str(run), "--engine", engine, "--step-size", "0.25", "--to", target, "--out", str(path)) == 0
    )
    assert command("verify", str(path), "--trust") == 0
    x, c = x[:7], c[:7]
    with torch.no_grad():
        if suffix == "pt2":
            found = torch.export.load(path).module()(x, c)[2]
        elif suffix == "onnx":
            session = importlib.import_module("onnxruntime").InferenceSession(path.read_bytes())
            found = torch.from_numpy(session.run(["log_prob"], {"x": x.numpy(), "context": c.numpy()})[0])
        else:
            found = export.load(path).log_prob(x, c)
        flow = pyrnode.load(run, engine=engine)
        assert flow.engine.name == engine
        assert error(found, flow.log_prob(x, c)) < 1e-4


def test_a_file_that_does_not_agree_is_refused(tmp_path: Path) -> None:
    module = to_torch(small(), {"step_size": 0.5})
    path = tmp_path / "flow.pt2"
    export.save(module, path)
    _rewrite(path, lambda table: table["outputs"]["log_prob"].__setitem__(2, table["outputs"]["log_prob"][2] + 0.01))
    with pytest.raises(CheckpointError, match=r"does not agree .*largest difference .*e-0[23]"):
        export.verify(path, trust=True)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a program says about itself, and seals it anew."""
    _replace(path, {}, change)


def _replace(
    path: Path, others: dict[str, bytes], change: Callable[[dict[str, Any]], Any] = lambda table: None
) -> None:
    """Puts other contents in the place of entries of a program, or beside them, and seals it anew."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("pyrnode.json"))
    table = json.loads(entries.pop(name))
    change(table)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, content in (entries | others).items():
            archive.writestr(entry, content)
    path.write_bytes(containers.seal_archive(buffer.getvalue(), table))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("export")
    module = to_torch(small(), {"step_size": 1.0})
    for target in ("torch.export", "safetensors"):
        export.save(module, folder / target, to=target)
    return {target: (folder / target).read_bytes() for target in ("torch.export", "safetensors")}


@pytest.mark.parametrize("target", ["torch.export", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(target: str, share: float, exported: dict[str, bytes], tmp_path: Path) -> None:
    if share == 0:
        pytest.importorskip("onnxruntime")
    content = exported[target]
    (tmp_path / "file").write_bytes(content[: int(share * len(content))])
    with pytest.raises((CheckpointError, EngineUnavailableError), match=r"truncated|pyrnode|extra"):
        export.verify(tmp_path / "file")


def test_foreign_files(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match="does not exist"):
        export.verify(path)
    path.write_text("not a model\n" * 5)
    with pytest.raises(CheckpointError, match="none of what pyrnode exports"):
        export.verify(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="none of what pyrnode exported"):
        export.verify(path)
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, f"{path}.pt2")
    with pytest.raises(CheckpointError, match="none of what pyrnode exported"):
        export.verify(f"{path}.pt2")
    small().save(path)
    with pytest.raises(CheckpointError, match="holds a flow, not a torch module"):
        export.verify(path)


def test_damaged_program(exported: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytearray(exported["torch.export"])
    where = content.find(b"graph_module")
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export.verify(path)


def test_other_versions(exported: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(exported["torch.export"])
    _rewrite(path, lambda table: table.update(format=3))
    with pytest.raises(CheckpointError, match="has format 3; this version of pyrnode reads format 2"):
        export.verify(path)
    path.write_bytes(exported["torch.export"])
    _replace(path, {"archive/models/model.json": b"{}"})  # a program whose own schema this torch does not know
    with pytest.raises(CheckpointError, match=rf"written by torch {re.escape(torch.__version__)}.*export it again"):
        export.verify(path, trust=True)
    path.write_bytes(exported["safetensors"])
    monkeypatch.setattr("pyrnode.files.FORMAT", 3)
    with pytest.raises(CheckpointError, match="has format 2"):
        export.verify(path)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    flow, out = small(), tmp_path / "file"
    adaptive = to_torch(flow, {"rtol": 1e-3})
    for target in ("torch.export", "onnx"):
        if target == "onnx":
            pytest.importorskip("onnxscript")
        for program in PROGRAMS:
            with pytest.raises(ConfigError, match="use fixed steps"):
                export.save(adaptive, out, to=target, program=program)
    module = to_torch(flow, {"step_size": 0.5})
    with pytest.raises(ConfigError, match=r"did you mean 'torch\.export'"):
        export.save(module, out, to="torch_export")
    with pytest.raises(ConfigError, match="did you mean 'encode'"):
        export.save(module, out, program="encoder")
    with pytest.raises(ConfigError, match="holds the whole flow"):
        export.save(module, out, to="safetensors", program="encode")
    with pytest.raises(ConfigError, match="bfloat16 cannot be exported"):
        export.save(to_torch(flow).to(torch.bfloat16), out)
    own = to_torch(FLOWS["vector, own module"](), {"step_size": 0.5})
    with pytest.raises(ConfigError, match=r"export to torch\.export or onnx"):
        export.save(own, out, to="safetensors")
    assert not out.exists()
    with pytest.raises(CheckpointError, match="cannot write"):
        export.save(module, tmp_path / "none" / "file", to="safetensors")


def test_untraceable_dynamics_get_our_error(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(()))

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.a * z if float(z.detach().sum()) > 0 else -self.a * z

    flow = Flow.build(Config(), (2,), dynamics=lambda shape: ModuleDynamics(Branch(), shape))
    with pytest.raises(ConfigError, match=r"torch\.export cannot trace this flow"):
        export.save(to_torch(flow, {"step_size": 0.5}), tmp_path / "file")


# -- programs are code -----------------------------------------------------------------------------------------------

WEIGHTS, SAMPLES = "archive/data/weights/model.pt", "archive/data/sample_inputs/model.pt"


class _Exploit:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("entry", [WEIGHTS, SAMPLES])
def test_nothing_of_a_program_is_unpickled_unless_it_is_trusted(
    entry: str, exported: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mark, bomb = tmp_path / "flow.pt2", tmp_path / "mark", io.BytesIO()
    torch.save(_Exploit(mark), bomb)
    path.write_bytes(exported["torch.export"])
    _replace(path, {entry: bomb.getvalue()})
    result = export.verify(path)
    assert (result.executed, result.differences, result.to_dict()["largest"]) == (False, {}, None)
    assert command("verify", str(path)) == 0
    assert "not run, for a program is code: --trust" in capsys.readouterr().out
    assert not mark.exists()
    with pytest.raises(CheckpointError, match="does not run in torch"):
        export.verify(path, trust=True)
    assert mark.exists()  # the exploit is one


@pytest.mark.parametrize("name", ["flow.safetensors", "flow.onnx", "flow.SAFETENSORS"])
@pytest.mark.parametrize("trust", [False, True])
def test_name_and_content_agree(name: str, trust: bool, exported: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(exported["torch.export"])
    with pytest.raises(CheckpointError, match=r"named as a (safetensors|onnx) file.*nothing of it was run"):
        export.verify(path, trust=trust)
    with pytest.raises(ConfigError, match=r"is the name of a .* file, not of torch\.export: let it end in \.pt2"):
        export.save(to_torch(small(), {"step_size": 1.0}), path)
    path = tmp_path / "flow.pt2"
    path.write_bytes(exported["safetensors"])
    with pytest.raises(CheckpointError, match=r"named as a torch\.export file"):
        export.verify(path, trust=trust)


def test_a_whole_program_is_known_without_running_it(exported: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "flow.pt2"
    path.write_bytes(exported["torch.export"])
    result = export.verify(path)
    assert (result.target, result.program, result.executed) == ("torch.export", "encode", False)
    assert result.versions["torch"] == torch.__version__
    assert math.isnan(result.largest)
    assert export.verify(path, trust=True).largest == 0
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    weight = "archive/data/weights/weight_0"
    entries[weight] = bytes(len(entries[weight]))
    with zipfile.ZipFile(path, "w") as archive:  # whose checksums are right
        for name, content in entries.items():
            archive.writestr(name, content)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match="damaged: its content does not match its digest"):
            export.verify(path, trust=trust)


def test_a_whole_model_is_known_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "flow.onnx"
    assert export.save(to_torch(small(), {"step_size": 1.0}), path, to="onnx").executed
    content = path.read_bytes()
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not export.verify(path).executed
    for at in range(0, len(content), 997):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError):
            export.verify(path)
        path.write_bytes(content[:at])
        with pytest.raises(CheckpointError):
            export.verify(path)


# -- the commands ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    return main([*arguments])


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow, model, out = small(), str(tmp_path / "model.safetensors"), str(tmp_path / "flow")
    flow.save(model)
    assert command("export", model, "--to", "safetensors", "--out", out, "--step-size", "0.1") == 0
    text = capsys.readouterr().out
    assert f"written to {out}" in text
    assert "largest difference 0.0e+00" in text
    gap = re.search(r"at most (\S+) nats from DP5 rtol 1e-09 atol 1e-09", text)
    assert gap is not None
    assert 0 < float(gap[1]) < 1e-4
    assert isinstance(export.load(out), TorchFlow)
    assert command("verify", out) == 0
    assert "safetensors, all: largest difference 0.0e+00" in capsys.readouterr().out
    assert command("verify", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["largest"] == 0
    arguments = ["--to", "torch.export", "--out", out, "--program", "decode", "--step-size", "1", "--json"]
    assert command("export", model, *arguments, "--dtype", "float64") == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["program"], table["tolerance"], table["largest"]) == ("decode", 1e-9, 0)


def test_a_coarse_step_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow, model = small(), str(tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(3)
    flow.save(model)
    arguments = ["--to", "safetensors", "--out", str(tmp_path / "flow"), "--step-size", "1", "--solver", "Euler"]
    assert command("export", model, *arguments) == 0
    assert "take a smaller --step-size" in capsys.readouterr().err


def test_errors_of_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(tmp_path / "model.safetensors"), str(tmp_path / "flow")
    small().save(model)
    assert command("export", model, "--to", "torch.export", "--out", out, "--rtol", "1e-3") == 1
    assert "use fixed steps" in capsys.readouterr().err
    assert command("export", model, "--to", "safetensors", "--out", f"{out}/no/flow") == 1
    assert "cannot write" in capsys.readouterr().err
    assert command("verify", out) == 1
    assert "does not exist" in capsys.readouterr().err


def test_import_is_light() -> None:
    code = "import json, sys, pyrnode.export, pyrnode.distribution; print(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"onnx", "onnxruntime", "onnxscript", "juliacall"}.isdisjoint(json.loads(result.stdout))
