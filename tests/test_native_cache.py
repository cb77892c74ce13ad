"""Where compiled kernels come from: the user's own cache, or a compiler; never what others could have written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyrnode import doctor, native
from pyrnode.errors import ConfigError
from pyrnode.native import cache

_COMPILED = native.status("softplus")
pytestmark = pytest.mark.skipif(not _COMPILED.available, reason=f"no compiled kernel: {_COMPILED.why}")

NAME = "softplus"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of its own, in which nothing is, and nothing loaded yet; gives the folder of the kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native._load.cache_clear()
    yield tmp_path / "cache" / "pyrnode" / "kernels"
    native._load.cache_clear()


def again() -> native.Status:
    """The status as another process would find it."""
    native._load.cache_clear()
    return native.status(NAME)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def test_folder_and_file_are_the_users_alone(home: Path) -> None:
    before = os.umask(0)
    try:
        assert again().why.endswith(f"kept in {home}")
    finally:
        os.umask(before)
    (file,) = libraries(home)
    assert [p.stat().st_mode & 0o777 for p in (home.parent.parent, home.parent, home, file)] == [0o700] * 3 + [0o600]
    written = file.stat().st_mtime_ns
    assert again().available
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(mode: int, home: Path) -> None:
    assert again().available
    (file,) = libraries(home)
    file.unlink()
    home.chmod(mode)
    status = again()
    assert status.available
    assert status.why.endswith(f"for this process alone: {home} can be written by others")
    assert status.remedy == f"chmod go-w {home}"
    assert not libraries(home)


def poisoned(file: Path, mark: Path) -> None:
    """Puts a library of the right name in the place of one, that leaves a mark where it is loaded."""
    source = file.with_suffix(".c")
    constructor = "__attribute__((constructor)) static void run(void)"
    source.write_text(f'#include <stdio.h>\n{constructor} {{fclose(fopen("{mark}", "w"));}}\n')
    built = file.with_suffix(".new")
    subprocess.run([native._compiler(), "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    stem = file.name.rpartition("-")[0]
    built.rename(file.with_name(f"{stem}-{cache._digest(built.read_bytes())}.so"))
    source.unlink()


def test_a_library_that_others_could_have_put_there_is_not_loaded(home: Path, tmp_path: Path) -> None:
    """As a shared cache: the folder is writable, or the file belongs to another or can be written by others."""
    assert again().available
    (file,) = libraries(home)
    file.unlink()
    mark = tmp_path / "mark"
    poisoned(file, mark)
    (bad,) = libraries(home)
    os.utime(bad, (2**31, 2**31))
    bad.chmod(0o666)
    assert again().available
    assert not mark.exists()
    bad.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(bad, 12345, -1)
        assert again().available
        assert not mark.exists()
        os.chown(home, 12345, -1)
        assert again().why.endswith(f"for this process alone: {home} belongs to another user")
        assert not mark.exists()
        os.chown(home, 0, -1)
        os.chown(bad, 0, -1)
    link = tmp_path / bad.name
    link.symlink_to(bad)
    with pytest.raises(OSError, match="symbolic links"):
        cache.load(link)
    assert not mark.exists()
    cache.load(bad)
    assert mark.exists()  # the exploit is one


def test_a_relative_cache_is_passed_over(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert again().why.endswith(f"kept in {tmp_path / '.cache' / 'pyrnode' / 'kernels'}")
    assert not list(work.iterdir())


def test_a_full_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        if os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(str(home)):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    assert "for this process alone: [Errno 28] No space left" in again().why
    assert not list(home.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_no_folder_can_be_made(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("/dev/null", "/dev/full/cache", "/proc/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        status = again()
        assert status.available
        assert "for this process alone" in status.why


def test_a_cache_from_which_nothing_may_be_executed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cache.load

    def refused(path: Path) -> object:
        if path.parent == home:
            raise OSError(f"{path}: failed to map segment from shared object: Operation not permitted")
        return load(path)

    monkeypatch.setattr(cache, "load", refused)
    assert "for this process alone: " in again().why
    monkeypatch.setattr(tempfile, "TemporaryDirectory", _none)
    assert not again().available


def _none(*_: object, **__: object) -> None:
    raise FileNotFoundError(2, "No usable temporary directory found")


@pytest.mark.skipif(sys.platform != "linux", reason="processors are told apart by Linux")
def test_a_filled_cache_is_used_without_a_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert again().available
    monkeypatch.setattr(shutil, "which", lambda name: None)
    status = again()
    assert status == native.Status(True, f"kept in {home}; now there is no C compiler (cc, gcc or clang)")
    monkeypatch.setattr(cache, "processor", lambda: b"another")
    assert not again().available
    monkeypatch.setattr(cache, "processor", lambda: None)
    assert not again().available


NOBODY = """
import os, pwd
os.environ.pop("HOME", None), os.environ.pop("XDG_CACHE_HOME", None)
def none(*_):
    raise KeyError("getpwuid(): uid not found: 12345")
pwd.getpwuid = none
import torch, pyrnode
from pyrnode import native
from pyrnode.config import Config
flow = pyrnode.flow.Flow.build(Config(), (2,))
assert abs(float(flow.log_prob(torch.zeros(1, 2)).detach()) + 1.8378770664093453) < 1e-6
print(native.status("mlp"))
"""


def test_nobodys_container(tmp_path: Path) -> None:
    """Neither HOME nor an entry in the list of users."""
    done = subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "for this process alone: there is no home folder" in done.stdout


@pytest.mark.parametrize("word", ["0", "false", "off", "OFF", "no", " False "])
def test_words_that_turn_them_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, word)
    assert not native.enabled()
    assert native.library(NAME) is None
    assert native.status(NAME) == (False, f"PYRNODE_NATIVE={word} turns them off", None)


@pytest.mark.parametrize("word", ["1", "true", "on", "ON", "yes", ""])
def test_words_that_leave_them_on(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, word)
    assert native.library(NAME) is not None


def test_another_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "maybe")
    message = "PYRNODE_NATIVE = 'maybe': expected 1, true or on, or 0, false or off"
    with pytest.raises(ConfigError, match=message):
        native.library(NAME)
    check = doctor._kernels()
    assert (check.status, check.remedy) == ("note", "export PYRNODE_NATIVE=1")
    assert message in check.detail


def test_the_doctor_says_where_they_are(home: Path) -> None:
    check = doctor._kernels()
    assert (check.status, check.remedy) == ("ok", None)
    assert check.detail.endswith(f", kept in {home}")
    native._load.cache_clear()
    home.chmod(0o777)
    check = doctor._kernels()
    assert (check.status, check.remedy) == ("note", f"chmod go-w {home}")
    assert "for this process alone" in check.detail
