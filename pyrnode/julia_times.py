"""How long Julia's starts and compilations took on this machine, so that messages say how long they usually take.

Nothing here is needed to work: what cannot be read or written is not measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from pyrnode import progress

_KEPT = 5


class Times:
    """The last few measurements of everything that was measured, in a file.

    Args:
        folder: Where the file lies; made when something is first written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "times.json"

    def usual(self, what: str) -> float | None:
        """The median of what was measured of it lately, in seconds; `None` where nothing was."""
        found = self._read().get(what)
        return statistics.median(found) if found else None

    def add(self, what: str, seconds: float) -> None:
        """Remembers a measurement, beside the four before it."""
        table = self._read()
        table[what] = [*table.get(what, []), round(seconds, 3)][-_KEPT:]
        scratch = self.path.with_name(f".{uuid4().hex}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(scratch, self.path)
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)

    @contextmanager
    def waiting(self, what: str, key: str, *, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Says on the bar that is shown, if one is, what is waited for, and how long it usually takes; and measures it.

        What usually takes less than a bar stands still is not worth a word.

        Args:
            what: What is waited for.
            key: What it is called among the measurements.
            clock: Tells the seconds that count as its time; of a compilation, those that were compiled in.
        """
        usual, begun = self.usual(key), clock()
        brief = usual is not None and usual < progress.SECONDS
        said: AbstractContextManager[None] = _NOTHING if brief else progress.meanwhile(f"{what}, {usually(usual)}")
        with said:
            yield
        self.add(key, clock() - begun)

    def _read(self) -> dict[str, list[float]]:
        try:
            table = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(what): [float(s) for s in found] for what, found in table.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


class Watch:
    """What one process waits for Julia to do, each thing the first time alone: said and measured.

    Args:
        times: The measurements of this machine.
        image: Whether Julia starts from the system image: with it and without are two things.
    """

    def __init__(self, times: Times, *, image: bool) -> None:
        self.times, self.image, self.known = times, image, set[str]()

    def starts(self) -> AbstractContextManager[None]:
        """Around the start of Julia."""
        return self.times.waiting("starting Julia", self._key("start"))

    def compiles(self, what: str, clock: Callable[[], Any]) -> AbstractContextManager[None]:
        """Around a call that has Julia compile `what` if it has not been called before.

        Args:
            what: What is compiled: a solver, its adjoint, for which network and numbers.
            clock: Gives the seconds that Julia has compiled for.
        """
        if what in self.known:
            return _NOTHING
        self.known.add(what)
        return self.times.waiting(f"Julia compiles {what}", self._key(what), clock=lambda: float(clock()))

    def _key(self, what: str) -> str:
        return f"{what}, from the image" if self.image else what


_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def usually(seconds: float | None) -> str:
    """How long something takes, by its measurements; `None` where there are none."""
    return "not measured before" if seconds is None else f"usually {words(seconds)}"


def words(seconds: float) -> str:
    """A time as one says it: ``"7 s"``, ``"3 min"``."""
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"
