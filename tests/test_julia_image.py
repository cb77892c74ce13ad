"""The system image: when it is built, what makes it stale, and what is said of it. The Julia is one that pretends."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tomli_w

from pyrnode import doctor, julia_image, julia_install, julia_setup, native
from pyrnode.doctor import Check
from pyrnode.julia_image import Image
from pyrnode.julia_install import install
from tests.fake_julia import VERSIONS, FakeJulia
from tests.test_julia_install import COMPILES, PASSES

pytest.importorskip("juliapkg", reason="juliacall is not installed (the extra `julia`)")


@pytest.fixture
def julia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJulia]:
    """A Julia with all that the engine needs, and no image yet."""
    fake = FakeJulia(tmp_path, monkeypatch)
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 19, 0))
    monkeypatch.setattr(julia_install, "_SELF_TEST", PASSES)
    monkeypatch.setattr(julia_install, "_EXERCISE", COMPILES)
    monkeypatch.setattr(julia_image, "processor", lambda: b"a processor")
    monkeypatch.delenv("PYTHON_JULIACALL_SYSIMAGE", raising=False)
    fake.write(VERSIONS)
    fake.named()
    yield fake
    monkeypatch.undo()
    julia_setup.status.cache_clear()


def found(fake: FakeJulia) -> Image:
    image = julia_image.find(fake.status())
    assert image is not None
    return image


def test_it_is_built_of_what_was_compiled_and_then_left_alone(julia: FakeJulia) -> None:
    assert julia_image.find(julia.status()) is None
    install()
    ((tools, project, statements, made),) = julia.images()
    assert Path(tools) == julia.depot / "pyrnode" / "packagecompiler"
    assert Path(project) == julia.project
    image = found(julia)
    assert image.stale is None
    assert julia_image.usable(julia.status()) == image.path
    assert image.path.read_bytes() == b"image of precompile(sin)"
    assert not Path(statements).exists()
    assert not Path(made).exists()
    assert {path.name for path in image.path.parent.iterdir()} == {image.path.name, "image.json"}
    assert image.age == "just built"
    install()
    assert len(julia.images()) == 1


def test_each_project_has_an_image_of_its_own(julia: FakeJulia) -> None:
    install()
    other = julia.home / "other"
    julia.project.rename(other)
    julia.project = other
    julia.named()
    assert julia_image.find(julia.status()) is None


def _version(fake: FakeJulia) -> None:
    fake.version("1.10.9")


def _executable(fake: FakeJulia) -> None:
    fake.executable = fake.executable.rename(fake.bin / "julia-of-another-make")
    fake.named()


def _manifest(fake: FakeJulia) -> None:
    fake.write(VERSIONS | {"Lux": "1.31.4"})


def _preferences(fake: FakeJulia) -> None:
    (fake.project / "LocalPreferences.toml").write_text(tomli_w.dumps({"LinearSolve": {"LoadMKL_JLL": False}}))


def _sources(fake: FakeJulia) -> None:
    fake.patch.setattr(julia_image, "_sources", lambda: "of another RNODE")


def _processor(fake: FakeJulia) -> None:
    fake.patch.setattr(julia_image, "processor", lambda: b"another one")


def _cut(fake: FakeJulia) -> None:
    image = found(fake).path
    image.write_bytes(image.read_bytes()[:5])


STALE: dict[str, Callable[[FakeJulia], None]] = {
    "it was built for another version of Julia": _version,
    "it was built for another Julia": _executable,
    "it was built for other packages, or other preferences of theirs": _manifest,
    "it was built for other packages, or other preferences of theirs ": _preferences,
    "it was built for another version of RNODE": _sources,
    "it was built for another processor": _processor,
    "its file is not what was written": _cut,
}


@pytest.mark.parametrize("why", STALE)
def test_a_stale_one_is_named_not_loaded_and_built_anew(julia: FakeJulia, why: str) -> None:
    install()
    STALE[why](julia)
    assert found(julia).stale == why.strip()
    assert julia_image.usable(julia.status()) is None
    install()
    assert len(julia.images()) == 2
    assert found(julia).stale is None


def test_all_that_changed_is_named(julia: FakeJulia) -> None:
    install()
    _version(julia)
    _processor(julia)
    assert found(julia).stale == "it was built for another version of Julia and another processor"


def test_what_changes_while_it_is_built_makes_it_stale(julia: FakeJulia) -> None:
    install()
    made = julia.home / f"image{julia_image.SUFFIX}"
    with julia_image.built(julia.status(), made):
        made.write_bytes(b"image")
        _sources(julia)
    assert found(julia).stale == "it was built for another version of RNODE"


def test_every_source_is_looked_at(julia: FakeJulia, tmp_path: Path) -> None:
    for folder in ("src", "bridge/src"):
        (tmp_path / "sources" / folder).mkdir(parents=True)
    julia.patch.setattr(julia_setup, "sources", lambda: tmp_path / "sources")
    seen = set()
    for name in ("Project.toml", "src/RNODE.jl", "bridge/Project.toml", "bridge/image.jl", "bridge/src/RNODEBridge.jl"):
        (tmp_path / "sources" / name).write_text("# what it says")
        julia_image._sources.cache_clear()
        seen.add(julia_image.made_of(julia.status())["sources"])
    julia_image._sources.cache_clear()
    assert len(seen) == 5


@pytest.mark.parametrize("text", ["", "[]", "{", '{"built": "yesterday", "seconds": 1, "made_of": {}}', '{"built": 3}'])
def test_one_whose_record_cannot_be_read_is_none(julia: FakeJulia, text: str) -> None:
    install()
    (found(julia).path.parent / "image.json").write_text(text)
    assert julia_image.find(julia.status()) is None


def test_no_sysimage_builds_none_and_removes_what_there_is(julia: FakeJulia) -> None:
    install()
    path = found(julia).path
    install(sysimage=False)
    assert julia_image.find(julia.status()) is None
    assert not path.exists()
    assert len(julia.images()) == 1


def test_one_that_cannot_be_built_is_a_note(julia: FakeJulia, capfd: pytest.CaptureFixture[str]) -> None:
    (julia.bin / "image-error").write_text("ERROR: could not find a compiler, looked for gcc and clang\nStacktrace:\n")
    install()
    captured = capfd.readouterr()
    assert captured.err.replace("\r", "\n").splitlines()[-1] == (
        "note: no system image, so the engine starts slowly (with pyrnode install-julia it is tried again): "
        "could not find a compiler, looked for gcc and clang"
    )
    assert "self-test: 1.0 of 1.0" in captured.out
    assert julia_image.find(julia.status()) is None
    assert not list(julia_image.folder(julia.status()).iterdir())


def test_one_that_julia_does_not_work_with_is_removed(julia: FakeJulia, capfd: pytest.CaptureFixture[str]) -> None:
    works_without = f"import pathlib, sys\nif list(pathlib.Path({str(julia.depot)!r}).glob('pyrnode/*/image.json')):\n"
    julia.patch.setattr(julia_install, "_SELF_TEST", f"{works_without}    sys.exit('signal (11.1)')\n{PASSES}")
    install()
    assert "Julia does not work with it: signal (11.1)" in capfd.readouterr().err
    assert julia_image.find(julia.status()) is None


def test_a_failed_self_test_with_an_image_names_what_does_without(julia: FakeJulia) -> None:
    install()
    julia.patch.setattr(julia_install, "_SELF_TEST", "import sys; sys.exit('no')")
    with pytest.raises(Exception, match=r"without its system image: pyrnode install-julia --no-sysimage$"):
        install()


def test_julia_is_started_with_it_unless_the_user_names_another(julia: FakeJulia) -> None:
    julia.patch.setattr(os, "environ", dict(os.environ))
    julia_setup.prepare_environment(1)
    assert "PYTHON_JULIACALL_SYSIMAGE" not in os.environ
    julia_setup.prepare_environment(1, Path("/depot/image.so"))
    assert os.environ["PYTHON_JULIACALL_SYSIMAGE"] == "/depot/image.so"
    os.environ["PYTHON_JULIACALL_SYSIMAGE"] = "/mine.so"
    julia_setup.prepare_environment(1, Path("/depot/image.so"))
    assert os.environ["PYTHON_JULIACALL_SYSIMAGE"] == "/mine.so"


def test_the_doctor_names_it_its_age_and_what_makes_it_stale(julia: FakeJulia) -> None:
    def said() -> Check:
        julia.status()
        return next(check for check in doctor._julia() if check.name == "Julia image")

    julia.patch.setattr(native, "status", lambda name: native.Status(True, "compiled"))
    detail = "no system image: Julia starts slowly, and compiles each solver on its first use"
    assert said() == Check("Julia image", "note", detail, "pyrnode install-julia")
    install()
    path = found(julia).path
    assert said() == Check("Julia image", "ok", f"{path}, just built, 0 MB, built in 0 s")
    record = path.parent / "image.json"
    table = json.loads(record.read_text())
    then = datetime.now(UTC) - timedelta(days=3, hours=1)
    record.write_text(json.dumps(table | {"built": then.isoformat(), "seconds": 754.0}))
    assert said().detail == f"{path}, 3 days old, 0 MB, built in 13 min"
    _processor(julia)
    detail = f"{path}, 3 days old, is stale and not loaded: it was built for another processor"
    assert said() == Check("Julia image", "note", detail, "pyrnode install-julia")
    julia.patch.setenv("PYTHON_JULIACALL_SYSIMAGE", "/mine.so")
    assert said() == Check("Julia image", "ok", "PYTHON_JULIACALL_SYSIMAGE = /mine.so, which is not looked at")


@pytest.mark.parametrize(
    ("past", "age"), [(30, "just built"), (60, "1 minute old"), (7300, "2 hours old"), (86400, "1 day old")]
)
def test_ages(past: float, age: str) -> None:
    then = datetime.now(UTC) - timedelta(seconds=past)
    assert Image(Path("image.so"), then, 1.0).age == age
