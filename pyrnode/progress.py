"""Bars that a person can trust: they say what is done now, and move while it is done, however long one piece takes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from typing import Any

from tqdm import tqdm

SECONDS = 2.0
"""How long a bar stands still at most: its clock and the time left go on by themselves."""


_SHOWN: list[Any] = []
"""The bars that are shown now, the innermost last."""


def _bar() -> Any:
    """Tqdm's class of bars: the notebook's where one is open that can show it, else that of a terminal.

    As `tqdm.auto`, which warns where ipywidgets is missing, and chooses when it is imported.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if "IPKernelApp" not in getattr(shell, "config", ()) or util.find_spec("ipywidgets") is None:
        return tqdm
    from tqdm.notebook import tqdm as in_notebook

    return in_notebook


@contextmanager
def progress_bar(
    total: int | None,
    what: str,
    *,
    unit: str,
    show: bool,
    initial: int = 0,
    uncounted: bool = False,
    delay: float = 0.0,
) -> Iterator[Any]:
    """A bar of tqdm's on standard error (in a notebook, the notebook's), redrawn every `SECONDS`.

    Args:
        total: Pieces in all; `None` where they are not known.
        what: What is done; `set_description` says another thing.
        unit: What a piece is.
        show: Whether to show it at all.
        initial: Pieces done before.
        uncounted: There are no pieces to count: show what is done and the time it takes.
        delay: Seconds before it is shown, or 0 to show it at once; what is done sooner shows none.
    """
    shape = "{desc} [{elapsed}]" if uncounted else None
    ended = threading.Event()
    given = {"total": total, "initial": initial, "unit": unit, "desc": what, "bar_format": shape, "delay": delay}
    with _bar()(**given, disable=not show) as bar:

        def redraw() -> None:
            while not ended.wait(SECONDS):
                bar.refresh()
                bar.delay = 0.0  # it is seen now: tqdm clears no bar that it takes for unseen

        thread = threading.Thread(target=redraw, name="pyrnode progress", daemon=True)
        if show:
            thread.start()
            _SHOWN.append(bar)
        try:
            yield bar
        finally:
            ended.set()
            if show:
                _SHOWN.remove(bar)
                thread.join()


@contextmanager
def meanwhile(text: str) -> Iterator[None]:
    """While it lasts, the innermost bar that is shown, if one is, says `text` instead of its own words.

    It is drawn at once: what lets no other thread run, as Julia while it starts and compiles, stops the redrawing too.
    """
    bar = _SHOWN[-1] if _SHOWN else None
    if bar is None:
        yield
        return
    own, bar.delay = bar.desc, 0.0
    bar.set_description_str(text)
    try:
        yield
    finally:
        bar.set_description_str(own)


@contextmanager
def stages(names: Sequence[str], *, show: bool) -> Iterator[Callable[[], None]]:
    """A bar over what is done one after another, shown once that takes `SECONDS`; what it gives tells of each end.

    Args:
        names: What is done, in order.
        show: Whether to show it at all.
    """
    with progress_bar(len(names), names[0], unit="stage", show=show, delay=SECONDS) as bar:
        following = iter(names[1:])

        def done() -> None:
            bar.set_description(next(following, names[-1]), refresh=False)
            bar.update()

        yield done


def parts(bar: Any, size: int, count: int) -> Callable[[], None]:
    """Something to call `count` times while `size` pieces are done at once, so that the bar counts them bit by bit."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if bar is not None and done <= count:
            bar.update(size * done // count - size * (done - 1) // count)

    return tick
