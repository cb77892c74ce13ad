"""Delimited files as people have them: read with the right numbers, in training as in scoring, or refused in words."""

from __future__ import annotations

import contextlib
import gzip
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pyrnode.anomalies import calibrate, score_file
from pyrnode.cli.score import score as score_command
from pyrnode.cli.score import score_arguments
from pyrnode.config import Config, DataConfig
from pyrnode.data import Splits, load
from pyrnode.data.chunks import open_chunks
from pyrnode.data.frames import said
from pyrnode.data.images import ImageFiles
from pyrnode.data.readers import open_file
from pyrnode.errors import ConfigError, DataError
from pyrnode.flow import Flow

REPEATS = 6
"""How often the rows of an example stand in its file: training wants ten."""


def everything(splits: Splits) -> list[list[float]]:
    parts = (splits.train, splits.validation, splits.test)
    return sorted(torch.cat([part.tensor() for part in parts]).tolist())


def write(path: Path, text: str | bytes) -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def check(path: Path, features: Sequence[str], rows: list[list[float]], **settings: Any) -> None:
    """Training and scoring read these rows, `REPEATS` times."""
    config = DataConfig(**settings)
    splits = load(path, config=config)
    assert said(splits.features) == (None if features[0] == "x0" else tuple(features))
    assert everything(splits) == sorted(rows * REPEATS)
    dialect = {} if not settings else {"config": config}
    chunks = list(open_chunks(path, 5, event_shape=(len(features),), **dialect))
    assert torch.cat([values for _, values in chunks]).tolist() == rows * REPEATS
    assert [first for first, _ in chunks] == list(range(0, len(rows) * REPEATS, 5))


def refused(path: Path, message: str, **settings: Any) -> None:
    """Training and scoring refuse the file, before or on reading it."""
    config = DataConfig(**settings)
    with pytest.raises(DataError, match=message) as training:
        load(path, config=config)
    dialect = {} if not settings else {"config": config}
    with pytest.raises(DataError, match=message) as scoring:
        list(open_chunks(path, 5, event_shape=(2,), **dialect))
    assert str(training.value).startswith(str(path))
    assert str(training.value) == str(scoring.value)


# --- what is read ----------------------------------------------------------------------------------------------------

X = ["x0", "x1"]
AB = ["a", "b"]
ROWS = [[1.5, 2.0], [3.0, 4.25]]

READ: dict[str, tuple[str, str, Sequence[str], list[list[float]]]] = {
    "European": ("laenge;breite\n", "12,50;3,70\n1,5;2\n", ["laenge", "breite"], [[12.5, 3.7], [1.5, 2.0]]),
    "European, no names": ("", "12,50;3,70\n1,5;2\n", X, [[12.5, 3.7], [1.5, 2.0]]),
    "European, commas in names": ("a, cm;b, cm\n", "1,5;2\n3;4,25\n", ["a, cm", "b, cm"], ROWS),
    "European, three decimals": ("a;b\n", "1,234;0,500\n2,500;0,125\n", AB, [[1.234, 0.5], [2.5, 0.125]]),
    "decimal commas in quotes": ("a,b\n", '"1,5","2"\n"3","4,25"\n', AB, ROWS),
    "semicolons and points": ("a;b\n", "1.5;2\n3;4.25\n", AB, ROWS),
    "tabs": ("a\tb\n", "1.5\t2\n3\t4.25\n", AB, ROWS),
    "tabs and commas": ("a\tb\n", "1,5\t2\n3\t4,25\n", AB, ROWS),
    "bars": ("a|b\n", "1.5|2\n3|4.25\n", AB, ROWS),
    "pandas numbers its columns": ("0,1\n", "1.5,2.0\n3.0,4.25\n", X, ROWS),
    "pandas numbers one column": ("0\n", "1.5\n3.0\n", ["x0"], [[1.5], [3.0]]),
    "numbers in quotes are names": ('"2000","2001"\n', "1.5,2\n3,4.25\n", ["2000", "2001"], ROWS),
    "text and years": ("id,2000\n", "1,2.5\n3,4.25\n", ["id", "2000"], [[1.0, 2.5], [3.0, 4.25]]),
    "numbers alone": ("", "1.5,2\n3,4.25\n", X, ROWS),
    "whole numbers": ("", "5,7\n3,4\n", X, [[5.0, 7.0], [3.0, 4.0]]),
    "whole numbers, named": ("a,b\n", "5,7\n3,4\n", AB, [[5.0, 7.0], [3.0, 4.0]]),
    "too long for an integer": ("a,b\n", "18446744073709551615,2\n3,4\n", AB, [[2.0**64, 2.0], [3.0, 4.0]]),
    "byte order mark": ("\ufeffa,b\n", "1.5,2\n3,4.25\n", AB, ROWS),
    "byte order mark, no names": ("\ufeff", "1.5,2\n3,4.25\n", X, ROWS),
    "line ends of Windows": ("a,b\r\n", "1.5,2\r\n3,4.25\r\n", AB, ROWS),
    "line ends of old": ("a,b\r", "1.5,2\r3,4.25\r", AB, ROWS),
    "blank lines": ("\n \na,b\n\n", "1.5,2\n\n3,4.25\n\n", AB, ROWS),
    "blanks around": ("a, b\n", " 1.5 , 2 \n3,\t4.25\n", AB, ROWS),
    "names in quotes": ('"a,1","b\nc"\n', "1.5,2\n3,4.25\n", ["a,1", "b\nc"], ROWS),
    "numbers in quotes": ('"a","b"\n', '"1.5","2"\n"3","4.25"\n', AB, ROWS),
    "letters of other alphabets": ("Länge,幅\n", "1.5,2\n3,4.25\n", ["Länge", "幅"], ROWS),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str, tmp_path: Path) -> None:
    head, body, features, rows = READ[name]
    check(write(tmp_path / "x.csv", head + body * REPEATS), features, rows)


@pytest.mark.parametrize("suffix", [".csv.gz", ".tsv", ".tsv.gz", ".TSV"])
def test_kinds_of_files(suffix: str, tmp_path: Path) -> None:
    sep = "\t" if "t" in suffix.lower()[1:2] else ","
    text = sep.join(AB) + "\n" + f"1.5{sep}2\n3{sep}4.25\n" * REPEATS
    path = write(tmp_path / f"x{suffix}", text)
    check(path, AB, ROWS)
    assert load(path).name == "x"


def test_one_column_of_a_tsv_may_have_decimal_commas(tmp_path: Path) -> None:
    check(write(tmp_path / "x.tsv", "a\n" + "1,5\n2,25\n" * REPEATS), ["a"], [[1.5], [2.25]])


def test_what_pandas_writes_is_read_back(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    for frame in (pd.DataFrame(x), pd.DataFrame(x, columns=[*AB, "c"]), pd.DataFrame(x).assign(n=range(40))):
        for settings in ({}, {"sep": ";", "decimal": ","}, {"sep": "\t"}, {"lineterminator": "\r\n"}):
            frame.to_csv(tmp_path / "x.csv", index=False, **settings)
            assert everything(load(tmp_path / "x.csv")) == sorted(frame.to_numpy().tolist())
        frame.to_csv(tmp_path / "x.csv")
        refused(tmp_path / "x.csv", "likely a row index")


SETTLED: list[tuple[str, dict[str, Any], Sequence[str], list[list[float]]]] = [
    ("0,1\n" + "5,7\n3,4\n" * REPEATS, {"header": True}, X, [[5.0, 7.0], [3.0, 4.0]]),
    ("2000,2001\n" + "1.5,2.0\n3.0,4.25\n" * REPEATS, {"header": True}, ["2000", "2001"], ROWS),
    ("2000,2001.5\n3,4.25\n" * REPEATS, {"header": False}, X, [[2000.0, 2001.5], [3.0, 4.25]]),
    ("1,2\n3.5,4.5\n5.5,6.5\n" * REPEATS, {"header": False}, X, [[1.0, 2.0], [3.5, 4.5], [5.5, 6.5]]),
    ("a\n" + "1,5\n2,25\n" * REPEATS, {"decimal": ","}, ["a"], [[1.5], [2.25]]),
    ("12,05\n3,70\n" * REPEATS, {"decimal": ","}, ["x0"], [[12.05], [3.7]]),
    ("12,05\n3,70\n" * REPEATS, {"sep": ","}, X, [[12.0, 5.0], [3.0, 70.0]]),
    ("a;b\n" + "1,234;2,345\n3,456;4,567\n" * REPEATS, {"decimal": ","}, AB, [[1.234, 2.345], [3.456, 4.567]]),
    ("a b\n" + " 1.5  2\n3 4.25\n" * REPEATS, {"sep": " "}, AB, ROWS),
    ("a;b\n" + "1;2\n3;4\n" * REPEATS, {"sep": ";", "decimal": ".", "header": True}, AB, [[1.0, 2.0], [3.0, 4.0]]),
]


@pytest.mark.parametrize(("text", "settings", "features", "rows"), SETTLED)
def test_settings_decide(
    text: str, settings: dict[str, Any], features: Sequence[str], rows: list[list[float]], tmp_path: Path
) -> None:
    check(write(tmp_path / "x.csv", text), features, rows, **settings)


def test_settings_are_checked() -> None:
    for settings in ({"sep": ":"}, {"decimal": ";"}, {"header": "yes"}, {"header": 1}, {"sep": 3}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}"):
            DataConfig(**settings)
    config = Config().override({"data.sep": "\t", "header": False, "decimal": ","})
    assert Config.from_toml(config.to_toml()) == config


# --- what is refused -------------------------------------------------------------------------------------------------

BODY = "1.5,2\n3,4.25\n" * REPEATS
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "fewer names than fields": ("a,b\n" + "1,2,3\n4,5,6\n" * REPEATS, "more fields than its line of names: 3, and 2"),
    "an index of pandas": (",a,b\n" + "0,1,2\n1,5,6\n" * REPEATS, "likely a row index"),
    "an index beside numbered columns": (",0,1\n" + "0,1.5,2.5\n1,5.5,6.5\n" * REPEATS, "likely a row index"),
    "a trailing comma": ("a,b\n" + "1,2,\n4,5,\n" * REPEATS, "3, and end in ',', and 2"),
    "a trailing comma throughout": ("a,b,\n" + "1,2,\n4,5,\n" * REPEATS, "column 2 has no name; if its lines end in"),
    "a long row": ("a,b\n" + BODY + "1,2,3\n", "line 14 has 3 fields, not 2"),
    "a long row after blank lines": ("\n\na,b\n\n" + BODY + "\n1,2,3\n", "line 18 has 3 fields, not 2"),
    "a long row by a trailing comma": ("a,b\n" + BODY + "1,2,\n", "line 14 has 3 fields, not 2"),
    "a long row without names": (BODY + "1,2,3\n", "line 13 has 3 fields, not 2"),
    "a long second row": ("1.5,2\n1,2,3\n" + BODY, "line 2 has 3 fields, not 2"),
    "numbered columns of whole numbers": ("0,1\n" + "5,7\n3,4\n" * REPEATS, "header=True or header=False"),
    "numbered columns whose names recur": ("0,1\n" + "5,7\n0,1\n" * REPEATS, "header=True or header=False"),
    "a 0 on top of numbers as C prints them": ("0\n" + "0.5\n1\n" * REPEATS, "header=True or header=False"),
    "years": ("2000,2001\n" + "1.5,2.0\n3.0,4.25\n" * REPEATS, r"\(2000, 2001\) may be the names .* header=True"),
    "years of counts": ("2000,2001\n" + "5,7\n3,4\n" * REPEATS, "is of years.*header=True"),
    "wavelengths": ("400.5,401,401.5\n" + "1.5,2,7\n3,4.25,1\n" * REPEATS, "equal steps.*header=True"),
    "numbers and text": ("a,1.5\n" + BODY, "has text and numbers.*header=True"),
    "text over one whole number": ("a,1\n" + "3,4\n5,7\n" * REPEATS, "has text and numbers.*header=True"),
    "two decimal marks": ("a;b\n" + "1,5;2.5\n3;4\n" * REPEATS, r"decimal comma \('1,5'\) and with a point \('2.5'\)"),
    "thousands by points": ("a;b\n" + "1.234,5;2\n3;4\n" * REPEATS, "'1.234,5'.* without thousands separators"),
    "thousands by commas": ("a,b\n" + '"1,234.5",2\n"3",4\n' * REPEATS, "'1,234.5'.* without thousands separators"),
    "thousands by blanks": ("a;b\n" + "1 234,5;2\n3;4\n" * REPEATS, "'1 234,5'.* without thousands separators"),
    "thousands or decimals": ("a;b\n" + "1,234;2\n3;4\n" * REPEATS, "'1,234' may be a decimal mark .* decimal=','"),
    "thousands or decimals in quotes": ("a,b\n" + '"1,234",2\n3,4\n' * REPEATS, "'1,234' may be a decimal mark"),
    "one column of decimal commas": (
        "a\n" + "1,5\n2,25\n" * REPEATS,
        "more fields than its line of names.*decimal=','",
    ),
    "decimals cut in two": ("12,05\n3,70\n" * REPEATS, "'12,05' may be two whole numbers .* sep=',' or decimal=','"),
    "a comma later": ("a;b\n" + "1;2\n3;4\n" * 99 + "1,5;2\n", "row 198, column 'a' is not a number.* decimal=','"),
    "a point later": ("a;b\n" + "1,5;2\n3;4\n" * 99 + "1.5;2\n", "row 198, column 'a' is not a number.* decimal='.'"),
    "blanks between fields": ("1 2\n" + "1 2\n3 4\n" * REPEATS, "is not a number .* sep=' '"),
    "another separator": ("a,b\n" + BODY + "3,4;5\n", "row 12, column 'b' is not a number .*'4;5'.* sep=';'"),
    "a question mark on top": ("?,1.5\n" + BODY, r"row 0, column '0' is not a number \('\?'\)"),
    "dates": ("a,b\n" + "2020-01-01,2\n2020-01-02,4\n" * REPEATS, "row 0, column 'a' is not a number .*2020-01-01"),
    "truth values": ("a,b\n" + "True,2\nFalse,4\n" * REPEATS, r"row 0, column 'a' is not a number \(True\)"),
    "columns of one name": ("a,a\n" + BODY, "columns 0 and 1 are both called 'a'"),
    "comments alone": ("# a\n# b\n", "is not a number"),
    "blank lines alone": ("\n \n\n", "is empty"),
    "UTF-16": (("a,b\n" + BODY).encode("utf-16"), "it is UTF-16; convert it"),
    "UTF-16 without its mark": (("a,b\n" + BODY).encode("utf-16-le"), "it is UTF-16; convert it"),
    "Latin-1": (("Länge,b\n" + BODY).encode("latin-1"), "not text in UTF-8.*0xe4.*Latin-1"),
    "Latin-1 later": (("a,b\n" + BODY * 99 + "ä,1\n").encode("latin-1"), "not text in UTF-8.*0xe4.*Latin-1"),
    "zero bytes": ("a,b\n1,\x002\n" + BODY, "zero bytes"),
    "gzip by another name": (gzip.compress(b"a,b\n1,2\n"), "compressed by gzip: name it .csv.gz"),
    "Excel by another name": (b"PK\x03\x04" + bytes(99), "Excel"),
    "a huge name": ("x" * 200_000 + ",b\n" + BODY, "field larger than"),
    "a huge cell": ("a,b\n" + BODY * 99 + "x" * 200_000 + ",1\n", r"row 1188, column 'a' is not a number \('x{39}…'\)"),
    "an open quote": ("a,b\n" + BODY + '1,"2\n' + BODY, "EOF inside string"),
    "Excel's own line": ("sep=;\na;b\n" + "1;2\n3;4\n" * REPEATS, "column 1 has no name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    text, message = REFUSED[name]
    refused(write(tmp_path / "x.csv", text), message)


EMPTY_PLACES = {
    "NA on top": ("NA,1.5\n" + BODY, 0, "x0", 0),
    "an empty place on top": (",1.5\n" + BODY, 0, "x0", 0),
    "more names than fields": ("a,b,c\n" + BODY, 0, "c", 2),
    "a short row": ("a,b\n" + BODY + "1\n", 12, "b", 1),
    "a short row of tabs": ("a\tb\n" + BODY.replace(",", "\t") + "1\n", 12, "b", 1),
    "a trailing comma without names": ("1,2,\n4,5,\n" * REPEATS, 0, "x2", 2),
    "infinite": ("a,b\n" + BODY + "1,inf\n", 12, "b", 1),
    "beyond float64": ("a,b\n" + BODY + "1,1e999\n", 12, "b", 1),
}


@pytest.mark.parametrize("name", EMPTY_PLACES)
@pytest.mark.parametrize("levels", [None, 9])
def test_empty_places_are_named(name: str, levels: int | None, tmp_path: Path) -> None:
    """They are no names, however high they stand, and shift nothing; and none is a reason to unset the levels."""
    text, row, column, position = EMPTY_PLACES[name]
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(DataError, match=f"NaN or infinite values, the first in row {row}, column '{column}'"):
        load(path, config=DataConfig(levels=levels))
    width = text.splitlines()[0].replace("\t", ",").count(",") + 1
    with pytest.raises(DataError, match=f"row {row}, column {position} is NaN, empty or infinite"):
        list(open_chunks(path, 100, event_shape=(width,), discrete=levels is not None))


def test_truncated_archives(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv.gz", "a,b\n" + BODY * 50)
    path.write_bytes(path.read_bytes()[:-9])
    refused(path, "cannot be read as comma-separated values")
    path.write_bytes(b"a,b\n1,2\n")
    refused(path, "cannot be read as comma-separated values")


def test_unknown_kinds_name_those_that_are_known(tmp_path: Path) -> None:
    for name in ("x.txt", "x.npy.gz", "x.gz", "x"):
        path = write(tmp_path / name, "1,2\n")
        with pytest.raises(DataError, match=r"unknown kind of file.*\.csv.*\.tsv.*\.csv\.gz"):
            load(path)
        with pytest.raises(DataError, match=r"unknown kind of file.*\.csv.*\.tsv.*\.csv\.gz"):
            open_chunks(path, 5, event_shape=(2,))


# --- other formats ---------------------------------------------------------------------------------------------------


def test_parquet_has_no_index_either(tmp_path: Path) -> None:
    """The index that pandas stores is none of the columns, in training and in scoring."""
    frame = pd.DataFrame({"a": [1.5, 3.0] * REPEATS, "b": [2.0, 4.25] * REPEATS})
    frame.index = pd.Index([f"row {i}" for i in range(len(frame))], name="id")
    frame.to_parquet(tmp_path / "x.parquet")
    check(tmp_path / "x.parquet", AB, ROWS)


def test_numbers_too_large_for_int64(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": np.array([2**64 - 1, 3] * REPEATS, dtype=np.uint64), "b": [2.5, 4.25] * REPEATS})
    frame.to_parquet(tmp_path / "x.parquet")
    check(tmp_path / "x.parquet", AB, [[2.0**64, 2.5], [3.0, 4.25]])
    with pytest.raises(DataError, match="holds floating-point values"):
        list(
            open_chunks(write(tmp_path / "x.csv", "a,b\n18446744073709551615,2\n"), 5, event_shape=(2,), discrete=True)
        )


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_scores_of_a_european_file(tmp_path: Path) -> None:
    flow = Flow.build(Config().override({"hidden": [4], "dtype": "float64"}), (2,))
    expected = flow.log_prob(torch.tensor(ROWS * REPEATS, dtype=torch.float64)).detach().numpy()
    path = write(tmp_path / "x.csv", "a;b\n" + "1,5;2\n3;4,25\n" * REPEATS)
    score_file(flow, path, tmp_path / "out.csv", chunk=5)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out.csv")["log_prob"], expected, rtol=1e-12)
    path = write(tmp_path / "y.csv", "2000,2001\n" + "1.5,2.0\n3.0,4.25\n" * REPEATS)
    with pytest.raises(DataError, match="header=True or header=False"):
        score_file(flow, path, tmp_path / "out.csv")
    score_file(flow, path, tmp_path / "out.csv", chunk=5, header=True)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out.csv")["log_prob"], expected, rtol=1e-12)
    np.testing.assert_allclose(calibrate(flow, path, header=True).scores, np.sort(expected), rtol=1e-12)
    assert len(calibrate(flow, path, header=False, sep=",", decimal=".").scores) == len(expected) + 1
    with pytest.raises(ConfigError, match="header = 'first'"):
        score_file(flow, path, tmp_path / "out.csv", header="first")
    with pytest.raises(ConfigError, match="sep"):
        calibrate(flow, path, sep=":")


def test_the_command_takes_the_settings(tmp_path: Path) -> None:
    import argparse

    Flow.build(Config().override({"hidden": [4]}), (2,)).save(tmp_path / "model.safetensors")
    path = write(tmp_path / "y.csv", "0;1\n" + "5;7\n3;4\n" * REPEATS)
    parser = argparse.ArgumentParser()
    score_arguments(parser)
    for header, rows in (("yes", 12), ("no", 13)):
        arguments = [str(tmp_path / "model.safetensors"), str(path), "--out", str(tmp_path / "out.csv"), "--quiet"]
        arguments += ["--scores-only", "--header", header, "--sep", ";", "--decimal", "."]
        assert score_command(parser.parse_args(arguments)) == 0
        assert len(pd.read_csv(tmp_path / "out.csv")) == rows


# --- whatever is written ---------------------------------------------------------------------------------------------


def test_no_table_is_read_wrong(tmp_path: Path) -> None:
    """Tables in every dialect: the numbers that were written, or an error; most of them without one."""
    rng, read, refusals = np.random.default_rng(0), 0, list[str]()
    for _ in range(300):
        n, d = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 4, size=d)
        x = np.where(rng.random(d) < 0.3, np.round(x), x)
        form = rng.choice(["%.17g", "%r", "%.3f"])
        x = x.round(3) if form == "%.3f" else x
        decimal = rng.choice([".", ","])
        sep = rng.choice([s for s in (",", ";", "\t", "|") if s != decimal])
        end = rng.choice(["\n", "\r\n", "\n\n"])
        names = [None, [str(k) for k in range(d)], [f"name {k}" for k in range(d)]][int(rng.integers(3))]
        lines = [] if names is None else [sep.join(names)]
        lines += [sep.join((form % value).replace(".", decimal) for value in row) for row in x.tolist()]
        path = write(tmp_path / "x.csv", end.join(lines) + end)
        try:
            chunks = [values for _, values in open_chunks(path, 2, event_shape=(d,))]
        except DataError as error:
            refusals.append(str(error))
            continue
        np.testing.assert_allclose(torch.cat(chunks).numpy(), x, rtol=1e-14, err_msg=path.read_text())
        read += 1
    assert read > 200
    # 1,5 in one column of decimal commas may be two whole numbers, where no line looks otherwise
    known = r"header=True|decimal=','|samples of shape \(2,\); the flow models \(1,\)"
    assert [text for text in refusals if not re.search(known, text)] == []


def test_no_file_raises_what_is_not_ours(tmp_path: Path) -> None:
    """Cells and bytes at random: training and scoring read the same numbers, or none."""
    rng = np.random.default_rng(0)
    cells = [
        "1",
        "0",
        "1.5",
        "-2,5",
        "1.234,5",
        "NA",
        "",
        "ä",
        "?",
        "inf",
        '"1,5"',
        '"x',
        "True",
        "2000",
        " ",
        "9" * 30,
    ]
    for _ in range(300):
        sep, end = rng.choice([",", ";", "\t", "|", " "]), rng.choice(["\n", "\r\n", "\n\n"])
        pool, width = rng.choice(cells, size=int(rng.integers(1, 6))), int(rng.integers(1, 4))
        text = "".join(sep.join(rng.choice(pool, size=width)) + end for _ in range(int(rng.integers(7))))
        content = rng.bytes(40) if rng.random() < 0.1 else text.encode(rng.choice(["utf-8", "utf-8", "utf-16"]))
        settings = {"sep": rng.choice(["auto", sep]), "decimal": rng.choice(["auto", ".", ","])}
        config = DataConfig(**{key: str(value) for key, value in settings.items()})
        path = write(tmp_path / "x.csv", content)
        read: list[Any] = []
        for size in (1, 2, 100):
            try:
                read.append([row for _, part in open_file(path, config).chunks(size) for row in part.astype(float)])
            except DataError as error:
                read.append(str(error))
        for other in read[1:]:
            if isinstance(other, str):  # of two errors, the size of the chunks decides which is met first
                same = isinstance(read[0], str)
            else:
                same = np.array_equal(other, read[0], equal_nan=True)
            assert same, (content, config, read)


# --- damaged and hostile files ---------------------------------------------------------------------------------------


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    """The start of a ``.npy`` file."""
    content = text.encode() + b"\n"
    length = len(content).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + content


CLAIMS = {
    "a huge shape": "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 2)}",
    "a shape beyond int64": "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 30 + ", 2)}",
    "a shape that wraps": "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
    "one row too many": "{'descr': '<f8', 'fortran_order': False, 'shape': (21, 2)}",
    "a negative shape": "{'descr': '<f8', 'fortran_order': False, 'shape': (-20, 2)}",
    "no shape": "{'descr': '<f8', 'fortran_order': False}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (20, 2)}",
    "nothing wide": "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000, 2)}",
    "brackets": "(" * 5000,
    "no dictionary": "3",
    "not Python": "{'descr': \0",
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00"])
def test_claims_of_numpy_files_are_compared_with_what_is_there(name: str, version: bytes, tmp_path: Path) -> None:
    content = header(CLAIMS[name], version) + np.arange(40.0).tobytes()
    path = write(tmp_path / "x.npy", content)
    refused(path, "cannot be read|is not a .npy file of numbers")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(DataError, match=r"cannot be read|is not a .npz file of numbers"):
        load(tmp_path / "x.npz")


def test_an_archive_that_unpacks_to_more_than_data_does_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((2**24, 2)))  # 268 MB in 260 kB
    with pytest.raises(DataError, match="many times what it has compressed"):
        load(tmp_path / "x.npz")


def test_no_damaged_file_raises_what_is_not_ours(tmp_path: Path) -> None:
    """Bytes of tables and images changed, cut and doubled: what is read has a finite shape, or the error is ours."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 2))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", a=x)
    np.savez_compressed(tmp_path / "y.npz", a=x)
    pd.DataFrame(x, columns=AB).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "images").mkdir()
    pixels = rng.integers(0, 256, size=(6, 6, 3)).astype(np.uint8)
    for suffix in (".png", ".jpg", ".bmp", ".webp", ".ppm", ".tif", ".gif"):
        Image.fromarray(pixels).save(tmp_path / f"x{suffix}")
    for path in sorted(p for p in tmp_path.iterdir() if p.is_file()):
        good, image = path.read_bytes(), path.suffix not in (".npy", ".npz", ".parquet")
        target = tmp_path / "images" / path.name if image else path
        for _ in range(60):
            content = bytearray(good)
            for _ in range(int(rng.integers(1, 4))):
                place = int(rng.integers(min(len(content), int(rng.choice([100, 10**9])))))
                match rng.integers(4):
                    case 0:
                        content[place] = int(rng.integers(256))
                    case 1:
                        content[place] ^= 1 << int(rng.integers(8))
                    case 2:
                        del content[max(1, place) :]
                    case 3:
                        content[place:place] = content[:place]
            target.write_bytes(content)
            with contextlib.suppress(DataError):
                if image:
                    assert ImageFiles([target]).shape[0] in (1, 3)
                else:
                    assert load(target).event_shape == (2,)
        target.unlink()


# --- images ----------------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, suffix: str = ".png", count: int = 12) -> Path:
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, size=(4, 4)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}{suffix}")
    return tmp_path


def test_images_are_opened_as_what_their_names_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript by the name of a picture would start Ghostscript."""
    from PIL import EpsImagePlugin

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    folder = folder_of(tmp_path)
    (folder / "03.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"03\.png is not a readable image \(PNG"):
        load(folder)


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".gif", ".bmp", ".pgm", ".TIF"])
def test_formats_that_are_read(suffix: str, tmp_path: Path) -> None:
    splits = load(folder_of(tmp_path, suffix))
    channels = 3 if suffix == ".gif" else 1  # it has a palette
    assert splits.event_shape == (channels, 4, 4)
    expected = [int(np.random.default_rng(i).integers(0, 256, size=(4, 4)).sum()) for i in range(12)]
    parts = (splits.train, splits.validation, splits.test)
    assert sorted(int(x.long().sum()) // channels for p in parts for x in p.tensor()) == sorted(expected)


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for name in ("x.eps", "x.svg", "x.jp2"):
        path = write(folder / name, b"x")
        with pytest.raises(DataError, match=rf"{name} is not of a format that is opened \(\.png, \.jpg"):
            load(folder)
        path.unlink()


def test_images_that_claim_too_many_pixels(tmp_path: Path) -> None:
    folder, size = folder_of(tmp_path), (60_000).to_bytes(4, "big")
    chunk = b"IHDR" + size + size + b"\x08\x00\x00\x00\x00"
    png = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (folder / "03.png").write_bytes(png + zlib.compress(bytes(99)))
    with pytest.raises(DataError, match=r"03\.png"):
        load(folder)
    frames = [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(3)]
    (folder / "03.png").unlink()
    frames[0].save(folder / "03.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"03\.gif has 3 frames"):
        load(folder)
