"""The errors that pyrnode raises: those for bad input are `ValueError`s too, those for what goes wrong later not."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial


class PyrnodeError(Exception):
    """Base of every error that pyrnode raises on purpose."""


class ConfigError(PyrnodeError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(PyrnodeError, ValueError):
    """Data is missing, unreadable, of the wrong shape or type, or not finite."""


class EngineUnavailableError(PyrnodeError, RuntimeError):
    """The engine, solver or sensitivity algorithm that was asked for is not there."""


class EngineError(PyrnodeError, RuntimeError):
    """An engine failed for a reason that has nothing to do with the dynamics; the message is the other language's."""


class SolverError(PyrnodeError, RuntimeError):
    """An ODE solve ended without reaching its end time.

    Attributes:
        status: The SciML return code: ``"MaxIters"``, ``"DtLessThanMin"`` or ``"Unstable"``.
        block: Index of the ODE block in its flow, where known.
    """

    def __init__(self, message: str, *, status: str, block: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.block = block

    def __reduce__(self) -> tuple[Callable[..., SolverError], tuple[str]]:
        """It crosses to other processes with all that it says."""
        return partial(SolverError, status=self.status, block=self.block), (str(self),)


class ProcessError(PyrnodeError, RuntimeError):
    """Another process of the same run has ended, failed, or does not answer."""


class TrainingDivergedError(PyrnodeError, RuntimeError):
    """Training became non-finite and the bounded number of restarts did not help."""

    everywhere = True  # several processes all raise it


class SolverWarning(UserWarning):
    """The training solver was not right for the dynamics that training arrived at."""


class CheckpointError(PyrnodeError, RuntimeError):
    """A checkpoint is missing, truncated, foreign, or of another version."""


def unknown_name(kind: str, name: object, known: Iterable[str], *, listing: str | None = None) -> str:
    """Message for a name that is not in a table: the value, the nearest match, and what there is.

    Args:
        kind: What the name names.
        name: The value.
        known: The names that there are.
        listing: Where a reader finds them, if they are too many to say.
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {kind} {name!r}{hint}; {listing or 'known: ' + ', '.join(names)}"
