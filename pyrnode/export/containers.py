"""Programs as files: sealed with a table about themselves, and opened without running or unpickling any of it.

A ``torch.export`` program is a zip archive, and an ONNX model a protobuf message; `torch.export.load` unpickles what an
archive holds and evaluates its expressions, so whoever made a program can do on this machine what its user can. Here
bytes are looked at and nothing else: entries are listed, JSON is parsed, and the digest in the table compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyrnode.errors import CheckpointError

Table = dict[str, Any]
"""What a program says about itself; its ``sha256`` covers the rest of it and the program."""

_ENTRY = "extra/pyrnode.json"
_METADATA, _LENGTH = 14, 2  # ModelProto.metadata_props, and the wire type of what has a length


def seal_archive(archive: bytes, table: Table) -> bytes:
    """A ``torch.export`` archive with the table in it."""
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as file:
        root = file.namelist()[0].partition("/")[0]
        digest = _archive_digest(_entries(file), table)
        file.writestr(zipfile.ZipInfo(f"{root}/{_ENTRY}"), json.dumps({**table, "sha256": digest}))
    return buffer.getvalue()


def seal_model(model: bytes, table: Table) -> bytes:
    """An ONNX model with the table as its last field, among the metadata: all before it is what the digest covers."""
    text = json.dumps({**table, "sha256": _model_digest(model, table)})
    entry = _field(1, b"pyrnode") + _field(2, text.encode())
    return model + _field(_METADATA, entry)


def open_archive(path: Path, content: bytes) -> Table:
    """The table of a ``torch.export`` archive, whose structure and digest are right.

    Raises:
        CheckpointError: It is truncated, damaged, or not one that pyrnode exported.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            _check_sizes(path, file, len(content))
            damaged = file.testzip()
            entries = {} if damaged else _entries(file)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is truncated, or not a torch.export file ({error}); copy or export it again"
        ) from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} does not match its checksum; export it again")
    name = next((name for name in entries if name.endswith(f"/{_ENTRY}")), None)
    table = _table(path, b"" if name is None else entries.pop(name))
    _compare(path, table, _archive_digest(entries, table))
    for entry, text in entries.items():
        if entry.endswith(".json"):
            _parsed(text, CheckpointError(f"{path} is damaged: {entry} is no JSON; export it again"))
    return table


def open_model(path: Path, content: bytes) -> Table:
    """The table of an ONNX model, whose digest is right; errors as `open_archive`."""
    fields = list(_fields(path, content))
    found = [(start, entry) for number, start, entry in fields if number == _METADATA and b"pyrnode" in entry[:16]]
    start, entry = found[-1] if found else (0, b"")
    pair = {number: value for number, _, value in _fields(path, entry)}
    table = _table(path, pair.get(2, b""))
    if len(found) != 1 or found[0] != fields[-1][1:]:
        raise CheckpointError(f"{path} is damaged: its description is not at its end; export it again")
    _compare(path, table, _model_digest(content[:start], table))
    return table


def _check_sizes(path: Path, file: zipfile.ZipFile, size: int) -> None:
    """Refuses what torch does not write: compressed or overlapping entries, by which a small file fills the memory."""
    entries = file.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"{path} claims to hold more than it does, which no export of pyrnode's does")
    if len({entry.filename for entry in entries}) != len(entries):
        raise CheckpointError(f"{path} holds two entries of one name, which no export of pyrnode's does")


def _entries(file: zipfile.ZipFile) -> dict[str, bytes]:
    return {name: file.read(name) for name in file.namelist()}


def _archive_digest(entries: Mapping[str, bytes], table: Table) -> str:
    listing = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(entries.items())}
    return _model_digest(json.dumps(listing).encode(), table)


def _model_digest(content: bytes, table: Table) -> str:
    unsealed = {key: value for key, value in table.items() if key != "sha256"}
    return hashlib.sha256(content + json.dumps(unsealed).encode()).hexdigest()


def _compare(path: Path, table: Table, digest: str) -> None:
    if table["sha256"] != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest; export it again")


def _table(path: Path, text: bytes) -> Table:
    foreign = CheckpointError(
        f"{path} is none of what pyrnode exported (torch.export, safetensors, ONNX), or truncated; copy or "
        "export it again"
    )
    table = _parsed(text, foreign)
    if not isinstance(table, dict) or not {"format", "sha256"} <= table.keys():
        raise foreign
    return table


def _parsed(text: bytes, error: CheckpointError) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no text, or nested deeper than Python goes
        raise error from None


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message."""
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(path: Path, content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The fields of a protobuf message: number, where it begins, and the content of those that have a length."""
    at = 0
    try:
        while at < len(content):
            start = at
            key, at = _read_varint(content, at)
            number, wire = key >> 3, key & 7
            if wire == _LENGTH:
                size, at = _read_varint(content, at)
                if not number or size > len(content) - at:
                    raise IndexError
                yield number, start, content[at : at + size]
                at += size
            else:
                at = _read_varint(content, at)[1] if wire == 0 else at + {1: 8, 5: 4}[wire]
                yield number, start, b""
        if at > len(content):
            raise IndexError
    except (IndexError, KeyError):
        raise CheckpointError(
            f"{path} is truncated, or none of what pyrnode exports (torch.export, safetensors, ONNX); copy or export "
            "it again"
        ) from None


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise IndexError
