"""What a delimited file does not say: what separates its fields, what marks its decimals, and whether it has names.

Each is settled by the caller, or by the first lines where they leave one reading. What two readings are left of is
refused: a wrong guess trains or scores on other numbers, and nothing tells.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pyrnode.config import DataConfig
from pyrnode.errors import DataError

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "blank"}
"""What may separate fields. A blank stands for any run of blanks, never recognised: ``1 234,5`` is one number."""

_NAN = ("NaN", "nan", "-NaN", "-nan", "1.#IND", "1.#QNAN", "-1.#IND", "-1.#QNAN")
MISSING = frozenset(("", "NA", "N/A", "n/a", "#NA", "#N/A", "#N/A N/A", "<NA>", "NULL", "null", "None", *_NAN))
"""How an empty place is written, as in pandas; always an error later, but never a name."""

Row = list[str]

_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = {
    mark: re.compile(rf"[+-]?((\d+{re.escape(mark)}?\d*|{re.escape(mark)}\d+)([eE][+-]?\d+)?|inf(inity)?)", re.A | re.I)
    for mark in ".,"
}
_GROUPED = {mark: re.compile(rf"[+-]?[1-9]\d{{0,2}}({re.escape(mark)}\d{{3}})+", re.ASCII) for mark in ".,"}
_YEARS = range(1800, 2201)


@dataclass(frozen=True)
class Dialect:
    """How a file is read: its separator, its decimal mark, and whether its first line has the names of the columns."""

    sep: str
    decimal: str
    header: bool

    def __str__(self) -> str:
        return f"sep={self.sep!r}, decimal={self.decimal!r}, header={self.header}"

    def number(self, cell: str) -> bool:
        """Whether a cell is a number; an empty place is none."""
        return is_number(cell, self.decimal)


def is_number(cell: str, decimal: str) -> bool:
    """Whether a cell is a number with that decimal mark; an empty place is none."""
    return _NUMBER[decimal].fullmatch(cell.strip()) is not None


def is_missing(cell: str) -> bool:
    """Whether a cell is an empty place: one that pandas knows, or a mark without letter or digit, such as ``?``."""
    return cell.strip() in MISSING or not any(map(str.isalnum, cell))


def fields(lines: Sequence[str], sep: str) -> list[Row]:
    """The fields of some lines, as `csv` and pandas divide them."""
    if sep == " ":
        return [line.split() for line in lines if line.strip()]
    return [row for row in csv.reader(lines, delimiter=sep, skipinitialspace=True) if row]


def length_of_first(lines: Sequence[str], sep: str) -> int:
    """How many lines the first row takes: names in quotes may be broken."""
    if sep == " ":
        return 1
    rows = csv.reader(lines, delimiter=sep, skipinitialspace=True)
    next(rows)
    return rows.line_num


def recognise(lines: Sequence[str], config: DataConfig, what: str) -> Dialect:
    """How a file is to be read.

    Args:
        lines: Its first lines, at least one, none of them blank.
        config: What the caller has settled of ``sep``, ``decimal`` and ``header``.
        what: The file, for messages.

    Raises:
        DataError: Two readings are left; the message names the setting that decides.
    """
    sep = _separator(lines, config) if config.sep == "auto" else config.sep
    rows = fields(lines, sep)
    decimal = _decimal(rows, sep, config, what) if config.decimal == "auto" else config.decimal
    if isinstance(config.header, bool):
        return Dialect(sep, decimal, config.header)
    quoted = lines[0].count('"') >= 2 * len(rows[0]) and not any('"' in line for line in lines[1:])
    header = quoted or _first_line_is_names(rows[0], rows[1:], decimal, what)
    return Dialect(sep, decimal, header)


# -- separator and decimal mark ----------------------------------------------------------------------------------------


def _separator(lines: Sequence[str], config: DataConfig) -> str:
    """The separator by which the lines have equal numbers of fields, and most cells are numbers.

    No cell is a number that still contains another separator (a decimal comma apart), so at most one makes all of them
    numbers: ``12,50;3,70`` is ``50;3`` by commas.
    """
    candidates = [sep for sep in SEPARATORS if sep != " "]
    if config.decimal == "," and '"' not in "".join(lines):
        candidates.remove(",")
    best, best_key = ",", (False, False, 0.0)  # all numbers in equal lines, equal lines, share of numbers
    for sep in candidates:
        rows = fields(lines, sep)
        body = rows[1:] or rows
        if max(map(len, rows)) == 1:
            continue
        cells = [cell for row in body for cell in row]
        marks = ".," if config.decimal == "auto" else config.decimal
        share = max(sum(is_number(cell, mark) or is_missing(cell) for cell in cells) for mark in marks) / len(cells)
        equal = len(set(map(len, rows))) == 1
        key = (share == 1 and equal, equal, share)
        if key > best_key:
            best, best_key = sep, key
    return best if best in candidates else candidates[0]


def _decimal(rows: list[Row], sep: str, config: DataConfig, what: str) -> str:
    cells = [cell.strip() for row in (rows[1:] or rows) for cell in row]
    commas = [cell for cell in cells if "," in cell and is_number(cell, ",")]
    points = [cell for cell in cells if "." in cell and is_number(cell, ".")]
    if sep == "," and config.sep == "auto":
        _not_decimals_cut_in_two(rows, what)
    if not commas:
        return "."
    if points:
        raise DataError(
            f"{what} has numbers with a decimal comma ({commas[0]!r}) and with a point ({points[0]!r}): write all of "
            "them alike, without thousands separators, or say decimal=',' or decimal='.'"
        )
    if all(_GROUPED[","].fullmatch(cell) for cell in commas):
        raise DataError(
            f"{what}: the comma in {commas[0]!r} may be a decimal mark or separate thousands: say decimal=',', or "
            "write the numbers without thousands separators"
        )
    return ","


def _not_decimals_cut_in_two(rows: list[Row], what: str) -> None:
    """Lines of two whole numbers, the second with leading zeros (``12,05``), are rather decimals, one to a line."""
    if not all(len(row) == 2 and all(_WHOLE.fullmatch(cell.strip()) for cell in row) for row in rows):
        return
    for row in rows:
        if len(second := row[1].strip()) > 1 and second.startswith("0"):
            raise DataError(
                f"{what}: {','.join(row)!r} may be two whole numbers or one with a decimal comma: say sep=',' or "
                "decimal=','"
            )


# -- names -------------------------------------------------------------------------------------------------------------


def _first_line_is_names(first: Row, body: list[Row], decimal: str, what: str) -> bool:
    """Whether the first line has the names of the columns.

    Text is names, numbers are a sample, an empty place among numbers is a place in a sample. Numbers can be names all
    the same: pandas numbers nameless columns ``0, 1, …``, tables of time series are headed by years, spectra by
    wavelengths. Where nothing but the first line looks like that, it is names if the columns are written otherwise
    (pandas writes a column of measurements with points throughout, so a ``0`` on top of it is no measurement),
    and refused if it could be a sample as well.
    """
    first = [cell.strip() for cell in first]
    numbers = [cell for cell in first if is_number(cell, decimal)]
    texts = [cell for cell in first if not is_number(cell, decimal) and not is_missing(cell)]
    columns = _kinds(len(first), body, decimal)
    uniform = "mixed" not in columns and "broken" in columns
    if not numbers:
        return bool(texts)
    if texts:
        whole = len(set(numbers)) == len(numbers) and all(map(_WHOLE.fullmatch, numbers))
        below = [kind for kind, cell in zip(columns, first, strict=True) if is_number(cell, decimal)]
        if whole and (not body or all(kind == "broken" for kind in below)):
            return True
        raise _ambiguous(first, "has text and numbers", what)
    if first[0] == "" and counts(first[1:]):
        return True  # the names that pandas writes with an index; they are refused for that
    if len(numbers) < len(first):
        return False
    if counts(first):
        if uniform:
            return True
        if first in body or (columns == ["mixed"]):
            return False
        raise _ambiguous(first, "numbers the columns", what)
    whole = all(map(_WHOLE.fullmatch, first))
    if whole and uniform and len(set(first)) == len(first):
        raise _ambiguous(first, "has whole numbers, the columns below do not", what)
    others = [row for row in body if len(row) == len(first)]
    for trait, reason in ((_equal_steps, "has equal steps, no other line does"), (_years, "is of years")):
        if others and trait(first, decimal) and not any(trait(row, decimal) for row in others):
            raise _ambiguous(first, reason, what)
    return False


def counts(names: Row) -> bool:
    """Whether these are 0, 1, 2, …, as pandas names columns that have no names."""
    return len(names) > 0 and names == [str(i) for i in range(len(names))]


def _kinds(columns: int, body: list[Row], decimal: str) -> list[str]:
    """How the numbers of each column are written: all ``whole``, all ``broken``, or ``mixed``; ``""`` without any."""
    kinds = []
    for i in range(columns):
        cells = [row[i].strip() for row in body if i < len(row) and is_number(row[i], decimal)]
        whole = sum(_WHOLE.fullmatch(cell) is not None for cell in cells)
        kinds.append("" if not cells else "broken" if not whole else "whole" if whole == len(cells) else "mixed")
    return kinds


def _values(row: Row, decimal: str) -> list[float] | None:
    if not all(is_number(cell, decimal) for cell in row):
        return None
    return [float(cell.strip().replace(decimal, ".")) for cell in row]


def _equal_steps(row: Row, decimal: str) -> bool:
    values = _values(row, decimal)
    if values is None or len(values) < 3:
        return False
    steps = [b - a for a, b in pairwise(values)]
    return steps[0] != 0 and all(abs(step - steps[0]) <= 1e-6 * abs(steps[0]) for step in steps)


def _years(row: Row, decimal: str) -> bool:
    values = _values(row, decimal)
    return values is not None and len(values) > 1 and values == sorted(set(values)) and all(v in _YEARS for v in values)


def _ambiguous(first: Row, reason: str, what: str) -> DataError:
    line = ", ".join(first[:8]) + (", …" if len(first) > 8 else "")
    return DataError(
        f"{what}: its first line ({line}) may be the names of the columns or a sample ({reason}): say header=True or "
        "header=False (data.header)"
    )


def hint(cell: str, dialect: Dialect) -> str:
    """What may be wrong with a cell that is not a number: words for the end of a message."""
    text = cell.strip()
    other = "," if dialect.decimal == "." else "."
    if is_number(text, other):
        return f"if {other!r} is its decimal mark, say decimal={other!r}"
    if re.fullmatch(r"[+-]?\d{1,3}([.,' \u00a0\u202f]\d{3})+([.,]\d*)?", text):
        return "write numbers without thousands separators"
    for sep, name in SEPARATORS.items():
        parts = [part for part in text.split(sep) if part]
        if len(parts) > 1 and all(is_number(part, mark) for mark in dialect.decimal for part in parts):
            return f"if a {name} separates the fields, say sep={sep!r}"
    return "sep=, decimal= and header= settle that"
