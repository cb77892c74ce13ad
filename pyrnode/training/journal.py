"""What a person sees of a run: the records of its steps, kept, written, and shown beside the bar."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pyrnode.runs import Record, RunFolder

_FLUSH_SECONDS = 5.0


class Journal:
    """The records of a run: in memory, and in its folder.

    Args:
        folder: Where to write; `None` keeps them in memory alone.

    Attributes:
        history: All records, in order.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.history: list[Record] = []
        self._folder = folder
        self._pending: list[Record] = []
        self._flushed = 0.0

    def log(self, record: Record) -> None:
        """Adds a record; it is written within seconds, or with the next `flush`."""
        self.history.append(record)
        if self._folder is None:
            return
        self._pending.append(record)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet."""
        self._flushed = time.monotonic()
        if self._folder is not None:
            self._folder.append(self._pending)
        self._pending.clear()

    def rewind(self, step: int) -> None:
        """Forgets what came after that step, in the folder too."""
        self.history = [r for r in self.history if r["step"] <= step]
        self._pending = [r for r in self._pending if r["step"] <= step]
        if self._folder is not None:
            self._folder.rewind(step)


def beside_the_bar(record: Record, *, best: float, dim: int, discrete: bool) -> dict[str, str]:
    """A step's numbers as the bar shows them, and the best validation value so far."""
    unit, factor = ("bits/dim", 1 / math.log(2)) if discrete else ("nats", dim)
    shown = {"loss": f"{record['loss']:.4f}", unit: f"{record['nll'] * factor:.3f}"}
    shown |= {"E": f"{record['E']:.3g}", "n": f"{record['n']:.3g}", "nfe": f"{record['nfe']:.0f}"}
    if math.isfinite(best):
        shown["best"] = f"{best * factor:.3f}"
    return shown


@contextmanager
def signals_call(stop: Callable[[], None], came: list[int]) -> Iterator[None]:
    """Ctrl-C (and SIGTERM) call `stop`, in the main thread; elsewhere nothing is changed.

    When the block has ended, a signal that came meanwhile goes to the handler that was there before: whoever sends
    SIGTERM wants the process to end, not one call in it. Ctrl-C ends the call alone, unless the caller has a handler of
    their own: neither Python's answer, KeyboardInterrupt, nor the system's follows. What was ignored is ignored still.

    Args:
        stop: What is called.
        came: Takes the numbers of the signals; one that another process had is added to it, and answered as if it had
            come here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)
        stop()

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        former = signal.getsignal(number)
        if former not in (signal.SIG_IGN, None):  # None: a handler that Python could not put back
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number in previous:
            signal.signal(number, previous[number])
        if previous.get(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
            del previous[signal.SIGINT]
        for number in previous:
            if number in came:
                signal.raise_signal(number)
