"""Bars that a person can trust: they say what is done now, and move while it is done, however long one piece takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

SECONDS = 2.0
"""How long a bar stands still at most: its clock and the time left go on by themselves."""


@contextmanager
def progress_bar(
    total: int | None, what: str, *, unit: str, show: bool, initial: int = 0, uncounted: bool = False
) -> Iterator[Any]:
    """A bar of tqdm's on standard error, redrawn every `SECONDS`.

    Args:
        total: Pieces in all; `None` where they are not known.
        what: What is done; `set_description` says another thing.
        unit: What a piece is.
        show: Whether to show it at all.
        initial: Pieces done before.
        uncounted: There are no pieces to count: show what is done and the time it takes.
    """
    shape = "{desc} [{elapsed}]" if uncounted else None
    ended = threading.Event()
    with tqdm(total=total, initial=initial, unit=unit, desc=what, disable=not show, bar_format=shape) as bar:

        def redraw() -> None:
            while not ended.wait(SECONDS):
                bar.refresh()

        thread = threading.Thread(target=redraw, name="pyrnode progress", daemon=True)
        if show:
            thread.start()
        try:
            yield bar
        finally:
            ended.set()
            if show:
                thread.join()


def parts(bar: Any, size: int, count: int) -> Callable[[], None]:
    """Something to call `count` times while `size` pieces are done at once, so that the bar counts them bit by bit."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if bar is not None and done <= count:
            bar.update(size * done // count - size * (done - 1) // count)

    return tick
