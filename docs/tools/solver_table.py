"""The table of docs/solvers.md, from what tests/julia/solvers.jl wrote: ``python docs/tools/solver_table.py FILE``."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "solvers.md"
HEADER = "| solver | error | evaluations | ms | |\n|---|---|---|---|---|\n"


class Row(NamedTuple):
    """A solver, its error (NaN: it did not arrive), evaluations of a sample, milliseconds, and what is wrong."""

    name: str
    error: float
    evaluations: float
    milliseconds: float
    fault: str


def faults() -> dict[str, str]:
    """The methods that RNODE marks as wrong."""
    source = (ROOT / "julia" / "src" / "solvers.jl").read_text(encoding="utf-8")
    table = re.search(r"^const FAULTS = Dict\(\n((?:    .*\n)*)\)", source, flags=re.MULTILINE)
    if table is None:
        raise ValueError("julia/src/solvers.jl has no table FAULTS")
    return dict(re.findall(r'"([^"]+)" => "([^"]+)"', table[1]))


def measured(path: Path) -> list[Row]:
    """What `tests/julia/solvers.jl` wrote, in the order of the alphabet."""
    known, rows = faults(), {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, error, evaluations, milliseconds, _ = line.split("|", 4)
        rows[name] = Row(name, float(error), float(evaluations), float(milliseconds), known.get(name, ""))
    return [rows[name] for name in sorted(rows)]


def shown(page: str) -> list[Row]:
    """The rows that a page has."""
    found = re.findall(r"^\| `([^`]+)` \| (\S*) \| (\S*) \| (\S*) \| (.*?) ?\|$", table_of(page), flags=re.MULTILINE)
    number = {"failed": math.nan, "": math.nan}
    return [Row(name, *(number.get(x) or float(x) for x in numbers), fault) for name, *numbers, fault in found]


def table_of(page: str) -> str:
    """The last section of a page."""
    return page.partition("## The table\n")[2]


def render(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        if math.isnan(row.error):
            lines.append(f"| `{row.name}` | failed |  |  | {row.fault} |")
        else:
            numbers = f"{row.error:.1e} | {row.evaluations:.0f} | {row.milliseconds:.2g}"
            lines.append(f"| `{row.name}` | {numbers} | {row.fault} |")
    return HEADER + "\n".join(lines) + "\n"


def main(file: str) -> None:
    """Puts what was measured in the place of the page's table."""
    page = PAGE.read_text(encoding="utf-8")
    before = page[: page.index(table_of(page))]
    PAGE.write_text(f"{before}\n{render(measured(Path(file)))}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
