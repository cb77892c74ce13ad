"""What a release needs beside its files: notes, from the CHANGELOG, and conda-forge's recipe with the sdist's digest.

    python .ci/release.py DIST

`make release` builds the files into DIST before it, and has twine check them. Nothing is published.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version(root: Path) -> str:
    """The version that every file names; what disagrees is an error."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    places = {
        "pyrnode/version.py": r'^VERSION = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "conda/recipe.yaml": r'^  version: "(.+)"$',
    }
    for place, pattern in places.items():
        found = re.search(pattern, (root / place).read_text(encoding="utf-8"), re.MULTILINE)
        if found is None or found[1] != project:
            raise SystemExit(f"{place} has version {found and found[1]}, pyproject.toml {project}: make them the same")
    return str(project)


def notes(changelog: str, version: str) -> str:
    """The section of that version; before it has one, that of what is unreleased, which then says so."""
    sections = dict(re.findall(r"^## \[(.+?)\].*?$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL))
    name = version if version in sections else "Unreleased"
    text = sections.get(name, "").strip()
    if not text:
        raise SystemExit(f"CHANGELOG.md has nothing under [{version}] nor [Unreleased]: write what has changed")
    draft = "" if name == version else f"*Draft: CHANGELOG.md has no section [{version}] yet.*\n\n"
    return f"# pyrnode {version}\n\n{draft}{text}\n"


def recipe(text: str, sdist: Path) -> str:
    """The recipe with the digest of the sdist."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    filled, count = re.subn(r'^(  sha256: )"0{64}"$', rf'\1"{digest}"', text, flags=re.MULTILINE)
    if count != 1:
        raise SystemExit('conda/recipe.yaml: expected one line of sha256: "000…", to be filled in here')
    return filled


def main() -> int:
    """Writes ``notes.md`` and ``recipe.yaml`` beside the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder of the built files")
    dist, number = parser.parse_args().dist, version(ROOT)
    sdist, wheel = dist / f"pyrnode-{number}.tar.gz", dist / f"pyrnode-{number}-py3-none-any.whl"
    for path in (sdist, wheel):
        if not path.is_file():
            raise SystemExit(f"{path} is not there: `make release` builds it")
    (dist / "notes.md").write_text(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), number), encoding="utf-8")
    filled = recipe((ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8"), sdist)
    (dist / "recipe.yaml").write_text(filled, encoding="utf-8")
    print(f"{dist}: {sdist.name}, {wheel.name}, notes.md, recipe.yaml; nothing was published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
