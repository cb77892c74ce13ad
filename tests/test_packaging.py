"""The package as it is installed: versions that agree, a light import, and the files that must travel along."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import pyrnode
from pyrnode import julia_setup
from tests.fake_julia import GPU_VERSIONS, VERSIONS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

HEAVY = [
    "juliacall",
    "juliapkg",
    "matplotlib",
    "sklearn",
    "pandas",
    "pyarrow",
    "h5py",
    "torchvision",
    "tensorboard",
    "torchdiffeq",
]

NEWEST = VERSIONS | {
    "CUDA": "6.2.1",
    "DiffEqFlux": "4.8.2",
    "JSON": "1.6.1",
    "Lux": "1.31.4",
    "LuxCUDA": "0.3.6",
    "NNlib": "0.9.38",
    "OrdinaryDiffEqAdamsBashforthMoulton": "2.1.1",
    "OrdinaryDiffEqBDF": "2.4.0",
    "OrdinaryDiffEqFeagin": "2.1.0",
    "OrdinaryDiffEqFIRK": "2.4.1",
    "OrdinaryDiffEqHighOrderRK": "2.1.0",
    "OrdinaryDiffEqLowOrderRK": "2.2.1",
    "OrdinaryDiffEqLowStorageRK": "3.2.1",
    "OrdinaryDiffEqRosenbrock": "2.6.0",
    "OrdinaryDiffEqSDIRK": "2.8.1",
    "OrdinaryDiffEqSSPRK": "2.2.0",
    "OrdinaryDiffEqStabilizedRK": "2.4.0",
    "OrdinaryDiffEqTsit5": "2.1.0",
    "OrdinaryDiffEqVerner": "2.2.0",
    "PrecompileTools": "1.3.4",
    "PythonCall": "0.9.37",
    "SciMLBase": "3.39.0",
    "SciMLSensitivity": "7.116.2",
    "cuDNN": "6.2.1",
}
"""What Julia's General registry had in July 2026 (PythonCall: what PyPI has of juliacall)."""


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    texts = PROJECT["dependencies"] + [r for extra in extras.values() for r in extra]
    return [r for r in map(Requirement, texts) if r.name != PROJECT["name"]]


def _constraints() -> dict[str, Version]:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if text := line.partition("#")[0].strip():
            name, version = text.split("==")
            pins[name] = Version(version)
    return pins


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_constraints_pin_a_version_within_the_bounds(requirement: Requirement) -> None:
    assert requirement.name in _constraints()
    assert requirement.specifier.contains(_constraints()[requirement.name])


def test_constraints_pin_nothing_else() -> None:
    assert set(_constraints()) == {r.name for r in _requirements()}


def test_version_is_the_same_everywhere() -> None:
    assert pyrnode.__version__ == PROJECT["version"]


def test_installed_metadata_agree() -> None:
    try:
        installed = metadata.version("pyrnode")
    except metadata.PackageNotFoundError:
        pytest.skip("pyrnode is not installed here (make test installs it)")
    assert installed == pyrnode.__version__


def test_changelog_has_a_section_for_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)[0] == "Unreleased"


def test_typed_marker_and_presets_travel_with_the_package() -> None:
    package = resources.files("pyrnode")
    assert (package / "py.typed").is_file()
    shipped = {entry.name.removesuffix(".toml") for entry in (package / "presets").iterdir() if ".toml" in entry.name}
    assert shipped >= {"digits", "toy", "finlay2020-mnist", "finlay2020-cifar10"}


def test_import_starts_nothing_heavy() -> None:
    code = "import sys, json, pyrnode; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {name.partition(".")[0] for name in json.loads(out)}
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))
    assert "torch" in loaded


def _public_callables() -> list[str]:
    """Dotted names of what `pyrnode.__all__` lists, and of the methods and properties that its classes define."""
    names = []
    for name in pyrnode.__all__:
        item = getattr(pyrnode, name)
        if not (inspect.isclass(item) or inspect.isfunction(item)):
            continue
        names.append(name)
        for member, value in vars(item).items() if inspect.isclass(item) else ():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                names.append(f"{name}.{member}")
    return names


def test_public_api_is_documented() -> None:
    undocumented = []
    for name in _public_callables():
        head, _, member = name.partition(".")
        item = getattr(pyrnode, head)
        if not inspect.getdoc(getattr(item, member) if member else item):
            undocumented.append(name)
    assert undocumented == []


def test_the_tests_that_the_guide_names_are_there() -> None:
    """What is promised under kill, fault, damage and attack; ``::name`` alone is of the file named before."""
    text, missing, named, path = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), [], 0, ""
    for file, name in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        path = file or path
        if not path:
            continue
        there = ROOT / "tests" / path
        if not there.is_file() or (name and f"def {name}(" not in there.read_text(encoding="utf-8")):
            missing.append(f"{path}::{name}")
        named += 1
    assert missing == []
    assert named >= 10


# -- the layout ------------------------------------------------------------------------------------------------------

LAYERS = (
    ("__main__",),
    ("cli",),
    ("pyrnode",),  # pyrnode/__init__.py, the public names
    ("demo", "doctor", "julia_install"),
    (
        "training",
        "runs",
        "evaluation",
        "reports",
        "cards",
        "pages",
        "baselines",
        "anomalies",
        "shards",
        "estimator",
        "plotting",
        "comparisons",
        "particles",
        "agreement",
        "animations",
        "paper",
        "sbi",
    ),
    ("flow",),
    ("distribution", "export", "uncertainty", "objective", "checkpoint"),
    ("composition", "parts", "turns"),
    ("engines",),
    ("probes", "files", "contexts"),
    ("data", "dynamics", "radial", "edges", "transforms", "bounded", "embedding"),
    (
        "config",
        "architecture",
        "columns",
        "optimisation",
        "settings",
        "solvers",
        "native",
        "julia_image",
        "julia_setup",
        "julia_times",
        "devices",
        "seeds",
        "tracing",
        "distributed",
        "precision",
        "progress",
        "version",
        "errors",
    ),
)
"""docs/design.md §3, from top to bottom: a file or folder imports from its own line and from lines below."""

LONGEST = 450


def _sources() -> dict[str, Path]:
    """The files of the package by the name that they are imported by."""
    root, names = ROOT / "pyrnode", {}
    for path in sorted(root.rglob("*.py")):
        parts = ("pyrnode", *path.relative_to(root).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def _imports(module: str, sources: dict[str, Path]) -> set[str]:
    """The files of ours that a file imports by name, at its top, in functions, and for its types.

    Python runs the ``__init__.py`` of every folder on the way, too; those do not count, or else each folder that lists
    what its files offer would be a circle.
    """
    found = set()
    package = module if sources[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(sources[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, (start, node.module)))
            for alias in node.names:  # a file of that folder, or a name in its __init__.py
                found.add(inner if (inner := f"{origin}.{alias.name}") in sources else origin)
    return found & sources.keys()


def _imported() -> dict[str, set[str]]:
    sources = _sources()
    return {module: _imports(module, sources) for module in sources}


def _reached(module: str, imported: dict[str, set[str]]) -> set[str]:
    """Everything that a file imports, and what that imports, and so on."""
    reached: set[str] = set()
    left = [*imported[module]]
    while left:
        if (name := left.pop()) not in reached:
            reached.add(name)
            left += imported[name]
    return reached


def test_no_files_import_each_other_in_a_circle() -> None:
    imported = _imported()
    reached = {module: _reached(module, imported) for module in imported}
    circles = {
        " <-> ".join(sorted(other for other in reached[module] if module in reached[other]))
        for module in imported
        if module in reached[module]
    }
    assert not circles, "\n".join(sorted(circles))


def test_imports_point_downwards() -> None:
    floor = {name: number for number, names in enumerate(LAYERS) for name in names}
    imported = _imported()
    names = {module: module.split(".")[:2][-1] for module in imported}  # the file or folder in pyrnode/
    assert floor.keys() - set(names.values()) == set(), "in LAYERS, but not there"
    assert set(names.values()) - floor.keys() == set(), "there, but not in LAYERS"
    upward = [
        f"{module} imports {other}"
        for module, others in imported.items()
        for other in others
        if floor[names[other]] < floor[names[module]]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_file_is_long() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in _sources().items()}
    long = [f"{module}: {length} lines" for module, length in lengths.items() if length > LONGEST]
    assert not long, "\n".join(long)


# -- Julia ------------------------------------------------------------------------------------------------------------


def test_juliapkg_is_told_what_the_julia_project_says() -> None:
    project = tomllib.loads((ROOT / "Project.toml").read_text(encoding="utf-8"))
    table = json.loads((ROOT / "pyrnode" / "juliapkg.json").read_text(encoding="utf-8"))
    compat = dict(project["compat"])
    assert compat.pop("julia") == table["julia"]
    del compat["JLArrays"]  # only the tests use it
    assert project["extras"].pop("JLArrays")
    for section, key in (("packages", "deps"), ("gpu", "extras")):
        assert {name: entry["uuid"] for name, entry in table[section].items()} == project[key]
    entries = table["packages"] | table["gpu"]
    assert {name: entry["version"] for name, entry in entries.items() if "version" in entry} == compat


BRIDGE = {"DLPack", "PythonCall"}
"""What the bridge to Python loads beside the Julia package's own dependencies."""


def loaded_by(folder: str) -> set[str]:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).glob("*.jl")))
    return set(re.findall(r"^\s*(?:using|import) ([A-Z]\w*)", sources, flags=re.MULTILINE)) - {"Base", "Core", "RNODE"}


def test_the_julia_package_has_what_its_sources_load_and_nothing_else() -> None:
    package = tomllib.loads((ROOT / "julia" / "Project.toml").read_text(encoding="utf-8"))
    assert loaded_by("julia/src") == package["deps"].keys()
    assert (package["name"], package["version"]) == ("RNODE", pyrnode.__version__)


def test_the_bridge_is_a_package_of_what_its_sources_load() -> None:
    """So that PackageCompiler can put it into an image; the script for that needs nothing but Julia itself."""
    bridge = tomllib.loads((ROOT / "julia" / "bridge" / "Project.toml").read_text(encoding="utf-8"))
    package = tomllib.loads((ROOT / "julia" / "Project.toml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "Project.toml").read_text(encoding="utf-8"))
    assert loaded_by("julia/bridge/src") == bridge["deps"].keys() - {"RNODE"}
    assert bridge["deps"].items() <= project["deps"].items() | {("RNODE", package["uuid"])}
    assert bridge["deps"].keys() >= BRIDGE
    assert (bridge["name"], bridge["version"]) == ("RNODEBridge", pyrnode.__version__)
    assert loaded_by("julia/bridge") == {"Pkg", "PackageCompiler"}


def test_the_julia_package_and_the_engines_environment_are_one() -> None:
    """What the package needs beyond it comes into every Manifest: Distributions through DiffEqFlux, SHA with Julia."""
    package = tomllib.loads((ROOT / "julia" / "Project.toml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "Project.toml").read_text(encoding="utf-8"))
    for key, further in (("deps", {"Distributions", "SHA"}), ("compat", {"Distributions"})):
        assert package[key].keys() - project[key].keys() == further
        assert {name: package[key][name] for name in package[key].keys() - further} == {
            name: value for name, value in project[key].items() if name in package[key]
        }
    assert project["deps"].keys() - package["deps"].keys() == BRIDGE


@pytest.mark.parametrize("folder", ["tests/julia", "examples"])
def test_julia_scripts_load_only_what_the_julia_project_names(folder: str) -> None:
    """A package that another one brings into the Manifest cannot be loaded by its own name."""
    named = {*julia_setup.needs(), "JLArrays", "Printf", "RNODE"}
    for path in (ROOT / folder).glob("*.jl"):
        lines = re.findall(r"^\s*(?:using|import) ([^:\n]*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert {name.strip().partition(".")[0] for line in lines for name in line.split(",")} <= named, path


@pytest.mark.parametrize("versions", [VERSIONS | GPU_VERSIONS, NEWEST], ids=["tested", "newest"])
def test_bounds_of_julia_packages_admit(versions: dict[str, str]) -> None:
    compat = pytest.importorskip("juliapkg.compat", reason="juliacall is not installed (the extra `julia`)")
    needs = julia_setup.needs() | julia_setup.needs(gpu=True)
    assert {name for name, need in needs.items() if need.bounds is not None} == set(versions)
    for name, version in versions.items():
        bounds = needs[name].bounds
        assert compat.Version.parse(version) in compat.Compat.parse(bounds), f"{name} {version} not in {bounds}"


def test_the_wheel_carries_what_julia_needs() -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed (`make wheel-smoke` builds the wheel)")
    from hatchling.builders.wheel import WheelBuilder

    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    sources = [path for path in (ROOT / "julia").rglob("*") if path.suffix in (".jl", ".toml")]
    assert files >= {f"pyrnode/{path.relative_to(ROOT)}" for path in sources}
    assert {"pyrnode/julia/Project.toml", "pyrnode/julia/src/RNODE.jl"} <= files
    assert files >= {"pyrnode/juliapkg.json", "pyrnode/py.typed", "pyrnode/presets/toy.toml"}
    assert {file.partition("/")[0] for file in files} == {"pyrnode"}


def test_juliapkg_finds_our_needs_beside_the_package() -> None:
    deps = pytest.importorskip("juliapkg.deps", reason="juliacall is not installed (the extra `julia`)")
    assert str(Path(pyrnode.__file__).parent / "juliapkg.json") in deps.deps_files()
