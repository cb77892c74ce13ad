"""Files: whole or not at all, checked when read, and errors that say what is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pyrnode import files
from pyrnode.errors import CheckpointError


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.arange(600, dtype=torch.float64).reshape(20, 30) / 7,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 2),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "not contiguous": torch.arange(6.0).reshape(2, 3).T,
    }


DESCRIPTION: dict[str, Any] = {"shape": (1, 2), "best": math.inf, "third": 1 / 3, "text": "é", "none": None}


@pytest.fixture
def written(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "good.safetensors"
    files.write(path, "flow", tensors, DESCRIPTION)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_is_written_is_read_back(written: Path, tensors: dict[str, Tensor]) -> None:
    found, description = files.read(written, "flow")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert description == {**DESCRIPTION, "shape": [1, 2]}
    assert leftovers(written.parent) == []


def test_any_safetensors_reader_reads_it(written: Path, tensors: dict[str, Tensor]) -> None:
    assert torch.equal(safetensors.torch.load_file(written)["weight"], tensors["weight"])


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_file_is_an_error(written: Path, tenth: int) -> None:
    content = written.read_bytes()
    written.write_bytes(content[: len(content) * tenth // 10])
    with pytest.raises(CheckpointError, match=r"good\.safetensors is truncated"):
        files.read(written, "flow")


def test_a_file_that_lacks_its_last_byte_is_an_error(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        files.read(written, "flow")


def test_a_flipped_bit_anywhere_is_an_error(written: Path) -> None:
    content = written.read_bytes()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 4
        written.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"good\.safetensors"):
            files.read(written, "flow")


def test_a_flipped_bit_in_tensor_data_is_named_as_damage(written: Path) -> None:
    damaged = bytearray(written.read_bytes())
    damaged[-100] ^= 1
    written.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its content does not match its digest"):
        files.read(written, "flow")


def test_foreign_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not one that pyrnode wrote"):
        files.read(path, "flow")
    safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata={"pyrnode": "[]"})
    with pytest.raises(CheckpointError, match="not one that pyrnode wrote"):
        files.read(path, "flow")
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="truncated, or not a safetensors file"):
        files.read(path, "flow")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated, or not a safetensors file"):
        files.read(path, "flow")
    with pytest.raises(CheckpointError, match="does not exist"):
        files.read(tmp_path / "none.safetensors", "flow")
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        files.read(tmp_path, "flow")


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = tmp_path / "trap.safetensors"
    torch.save(Trap(), path)
    with pytest.raises(CheckpointError):
        files.read(path, "flow")
    assert not (tmp_path / "sprung").exists()


def test_wrong_kind_and_newer_format_are_errors(
    written: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="holds a flow, not a checkpoint"):
        files.read(written, "checkpoint")
    monkeypatch.setattr(files, "FORMAT", files.FORMAT + 1)
    files.write(written, "flow", tensors, DESCRIPTION)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format 3; this version of pyrnode reads format 2"):
        files.read(written, "flow")


def test_the_header_is_readable_json(written: Path) -> None:
    with safetensors.safe_open(written, framework="pt") as file:
        header = json.loads(file.metadata()["pyrnode"])
    assert (header["format"], header["kind"]) == (2, "flow")
    assert len(header["sha256"]) == 64


# -- what goes wrong when writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    written: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    before = written.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(CheckpointError, match="No space left on device; what was there before is untouched"):
        files.write(written, "flow", {"weight": tensors["weight"] + 1}, {})
    assert written.read_bytes() == before
    assert leftovers(written.parent) == []


def test_an_interrupt_while_writing_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_bytes()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(written, b"new")
    assert written.read_bytes() == before
    assert leftovers(written.parent) == []


def test_what_a_kill_left_behind_is_replaced_by_the_next_write(written: Path) -> None:
    (written.parent / f".{written.name}.part").write_bytes(b"half a checkpoint, longer than the new one")
    files.write_atomically(written, b"new")
    assert written.read_bytes() == b"new"
    assert leftovers(written.parent) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_without_write_permission_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        files.write_atomically(folder / "file", b"x")


def test_places_that_cannot_be_written_to_are_errors(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Not a directory"):
        files.write_atomically(written / "below a file", b"x")
    with pytest.raises(CheckpointError, match="No such file or directory"):
        files.write_atomically(tmp_path / "no folder" / "file", b"x")
    (tmp_path / "a folder").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        files.write_atomically(tmp_path / "a folder", b"x")
    assert leftovers(tmp_path) == []


# -- two writers, modes, links ---------------------------------------------------------------------------------------


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """The second begins and ends while the first writes: both contents are whole, and the later one stays."""
    path = tmp_path / "file"
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second, and longer")
            assert len(leftovers(tmp_path)) == 2
        assert path.read_bytes() == b"second, and longer"
    assert path.read_bytes() == b"first"
    assert leftovers(tmp_path) == []


def test_a_writer_that_fails_leaves_the_other_ones_work(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.replacing(path) as first:
        first.write(b"first")
        with pytest.raises(TypeError), files.replacing(path) as second:
            second.write(b"half" + "text")  # type: ignore[operator]
    assert path.read_bytes() == b"first"


def test_what_killed_writers_left_is_removed_but_not_what_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.0123456789abcdef.part").write_bytes(b"half")
    (tmp_path / ".file.mine").write_bytes(b"not ours")
    (tmp_path / ".filed.0123456789abcdef.part").write_bytes(b"of another file")
    with files.replacing(path) as first:
        files.write_atomically(path, b"second")
        first.write(b"first")
    assert path.read_bytes() == b"first"
    assert leftovers(tmp_path) == [".file.mine", ".filed.0123456789abcdef.part"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    files.write_atomically(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o7777) == (b"new", mode)


def test_a_new_file_has_the_mode_of_the_process(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o7777 == 0o640


def test_a_link_laid_in_place_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where another has guessed the random name."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(b"precious")
    folder.mkdir()
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    (folder / ".file.0000000000000000.part").symlink_to(victim)
    with pytest.raises(CheckpointError, match="File exists"):
        files.write_atomically(folder / "file", b"new")
    (folder / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(CheckpointError, match="cannot write"):
        files.append(folder / "metrics.jsonl", b"new")
    assert victim.read_bytes() == b"precious"


def test_the_folder_is_synced_after_the_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, fsync, replace = list[str](), os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix or 'folder'}")
        fsync(descriptor)

    def replaced(a: Any, b: Any) -> None:
        events.append("replace")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    files.write_atomically(tmp_path / "file", b"new")
    assert events == ["sync .part", "replace", "sync folder"]


@pytest.mark.parametrize("name", ["nul\0", "x" * 300, "é" * 200, "\udc80" * 90 + "x" * 200])
def test_names_that_no_file_can_have_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        files.write_atomically(tmp_path / name, b"x")
    with pytest.raises(CheckpointError):
        files.read(tmp_path / name, "flow")


def test_the_longest_name_that_a_file_can_have_is_written(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / ("x" * 255), b"new")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"new"


# -- locks -----------------------------------------------------------------------------------------------------------


def test_a_locked_folder_is_refused_to_others_and_free_afterwards(tmp_path: Path) -> None:
    with files.locked(tmp_path):
        with pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()}: wait"), files.locked(tmp_path):
            pass
        with pytest.raises(CheckpointError, match="in use"), files.locked(tmp_path):  # the refused one freed nothing
            pass
    with files.locked(tmp_path):
        pass
    assert leftovers(tmp_path) == []


def test_the_lock_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from pyrnode import files\n"
    code += "with files.locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError, match=f"in use by process {process.pid}"), files.locked(tmp_path):
            pass
        process.kill()
    assert leftovers(tmp_path) == [".lock"]
    with files.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert leftovers(tmp_path) == []
