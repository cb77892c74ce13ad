"""What a section of settings is: checked when it is made, changed by names, and plain values for TOML and JSON."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from pyrnode.errors import ConfigError, unknown_name


def shown(value: object) -> str:
    """A value as an error shows it: also one that is too long, too deep or too large to be written out."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} beyond all bounds"
    return text if len(text) <= 300 else f"{text[:300]}…"


def at_least(section: object, minimum: float, *names: str, strict: bool = False) -> None:
    """Raises `ConfigError` where a number among the named settings is less than `minimum`, or not more, if `strict`."""
    for name in names:
        value = getattr(section, name)
        if isinstance(value, str) or value is None:
            continue
        if not math.isfinite(value) or value < minimum or (strict and value == minimum):
            bound = f"more than {minimum}" if strict else f"at least {minimum}"
            raise ConfigError(f"{name} = {value!r}: expected {bound}")


_INTEGERS = 2**63
"""Bound on integers; torch takes no larger ones, and text beyond some thousand digits is not even printed."""


def whole(value: Any, name: str, minimum: int | None = 0, what: str = "whole number") -> int:
    """A whole number of Python, numpy or torch as Python's own, which alone goes everywhere and has one `repr`.

    Raises:
        ConfigError: It is none, or less than `minimum`.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or (minimum is not None and number < minimum):
        bound = "" if minimum is None else f", at least {minimum}"
        raise ConfigError(f"{name} = {value!r}: expected a {what}{bound}")
    return number


@dataclass(frozen=True)
class Section:
    """What all sections share: checked construction from a mapping, and conversion back to plain TOML values."""

    _bare_word: ClassVar[str | None] = None
    """The setting that a bare word stands for where the section is expected."""

    @classmethod
    def _in_full(cls, word: str) -> dict[str, Any]:
        """The settings that a bare word stands for."""
        assert cls._bare_word is not None
        return {cls._bare_word: word}

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, _coerce(f.name, getattr(self, f.name), hints[f.name]))
        self._validate()

    def _validate(self) -> None:
        """Checks that the types alone do not make; raises `ConfigError`."""

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Builds the section from a mapping of plain values, as read from TOML or JSON.

        Of a section inside it the mapping may name some settings alone; the others keep this section's defaults.
        """
        known = _keys(cls)
        for key in table:
            if key not in known:
                raise ConfigError(unknown_name(f"key in {cls.__name__}", key, known))
        values = dict(table)
        for f in fields(cls):
            given, default = values.get(f.name), cast(Any, f.default_factory)
            inner = _sections(cls).get(f.name)
            if inner and (isinstance(given, Mapping) or (isinstance(given, str) and inner._bare_word)):
                values[f.name] = default().changed(given)
        return cls(**values)

    def changed(self, value: Self | Mapping[str, Any] | str | None) -> Self:
        """Another section as its user gives it: whole, or as the settings that differ from this one.

        Args:
            value: A section; a mapping of settings; the one setting that a bare word stands for (``"DP5"`` is
                ``{"name": "DP5"}`` of a solver, ``"exact"`` is ``{"kind": "exact"}`` of a divergence); `None` for this
                section itself.

        Raises:
            ConfigError: A setting is unknown or does not fit.
        """
        if value is None or isinstance(value, type(self)):
            return self if value is None else value
        if isinstance(value, str) and self._bare_word is not None:
            try:
                return type(self).from_dict({**self.to_dict(), **self._in_full(value)})
            except ConfigError as error:  # which knows the word as `kind`, and its user as the section
                raise ConfigError(f"{type(self).__name__.lower()} = {value!r}: {error}") from None
        if not isinstance(value, Mapping):
            keys = ", ".join(_keys(type(self)))
            raise ConfigError(f"{shown(value)}: expected a section, {type(self).__name__}; its settings are {keys}")
        return type(self).from_dict({**self.to_dict(), **value})

    def override(self, values: Mapping[str, Any]) -> Self:
        """A copy with some settings changed.

        Args:
            values: Settings by name: ``"section.key"``, or ``"key"`` alone, which is the outermost setting of that
                name (``"rtol"`` is the training solver's, not the evaluation's). A mapping changes the settings of a
                section that it names, and leaves the others.

        Raises:
            ConfigError: A key is unknown or ambiguous, or a value does not fit.
        """
        table = self.to_dict()
        paths = _setting_paths(type(self))
        given: dict[str, Any] = {}
        for name, value in flatten(values).items():
            path = _setting(name, paths)
            inner = paths[path]
            if inner is not None and inner._bare_word is not None and isinstance(value, str):
                given = {f"{path}.{key}": v for key, v in inner._in_full(value).items()} | given  # what is named counts
            else:
                given[path] = value
        for path, value in given.items():
            *sections, key = path.split(".")
            target = table
            for section in sections:
                target = target[section]
            target[key] = value
        return type(self).from_dict(table)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for TOML and JSON: settings that are `None` are left out, tuples become lists."""
        table: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Section):
                table[f.name] = value.to_dict()
            elif value is not None:
                table[f.name] = list(value) if isinstance(value, tuple) else value
        return table


_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
"""The annotations of a section: kept, since they are source text, and sections are made at every step of training."""


def _keys(section: type[Section]) -> list[str]:
    return [f.name for f in fields(section)]


def _sections(section: type[Section]) -> dict[str, type[Section]]:
    """The sections inside a section, by key."""
    hints = _hints(section)
    return {k: h for k in _keys(section) if isinstance(h := hints[k], type) and issubclass(h, Section)}


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Fits `value` to its annotation (int → float, list → tuple, mapping → section), or says what was expected.

    Numbers and texts of numpy's and torch's, as searches over settings hand them over, become Python's.
    """
    if isinstance(value, np.generic) or (hasattr(value, "item") and getattr(value, "ndim", None) == 0):
        value = value.item()
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(unknown_name(name, value, map(str, args)))
        return value
    if origin in (Union, UnionType):
        for option in args:
            try:
                return _coerce(name, value, option)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(name, item, args[0]) for item in value)
    elif origin is dict and isinstance(value, Mapping):
        return {key: item.item() if isinstance(item, np.generic) else item for key, item in value.items()}
    elif isinstance(hint, type) and issubclass(hint, Section):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return hint.from_dict(value)
    elif hint in (int, float) and isinstance(value, int) and not -_INTEGERS <= value < _INTEGERS:
        raise ConfigError(f"{name} = {shown(value)}: expected a number of 64 bits")
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (str, bool, type(None)) and isinstance(value, hint):
        return value
    if isinstance(hint, type) and issubclass(hint, Section):
        keys = ", ".join(f"{name}.{key}" for key in _keys(hint))
        raise ConfigError(f"{name} = {shown(value)}: {name} is a section; its settings are {keys}")
    raise ConfigError(f"{name} = {shown(value)}: expected {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    """An annotation as a user reads it: ``float or 'auto'``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, args))
    if origin is tuple:
        return f"a list of {_in_words(args[0])}"
    return "none" if hint is type(None) else str((origin or hint).__name__)


_TABLES = ("options", "bounds", "period")
"""Settings that are tables themselves, whose keys are no settings of ours."""


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with ``section.key`` for keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        value = value.to_dict() if isinstance(value, Section) else value
        if isinstance(value, Mapping) and str(key).rpartition(".")[2] not in _TABLES:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


_ELSEWHERE = {
    "lr": "learning_rate",
    "steps": "max_steps",
    "n_steps": "max_steps",
    "iterations": "max_steps",
    "n_iter": "max_steps",
    "n_epochs": "epochs",
    "layers": "hidden",
    "hidden_features": "hidden",
    "hidden_layer_sizes": "hidden",
    "method": "solver",
    "dt": "step_size",
    "random_state": "seed",
}
"""What other libraries call some of them."""


def _setting(name: str, paths: Mapping[str, type[Section] | None]) -> str:
    """The path of a setting, given that or its last part."""
    found = [name] if name in paths else [path for path in paths if path.endswith("." + name)]
    outermost = min((path.count(".") for path in found), default=0)
    found = [path for path in found if path.count(".") == outermost]
    if not found:
        names = {*paths, *(p.rpartition(".")[2] for p in paths)}
        listing = "`pyrnode presets table` shows them all"
        if name in _ELSEWHERE:
            raise ConfigError(f"unknown setting {name!r} (here it is {_ELSEWHERE[name]!r}); {listing}")
        raise ConfigError(unknown_name("setting", name, names, listing=listing))
    if len(found) > 1:
        example = f"**{{{found[0]!r}: …}} in Python, --set {found[0]}=… on the command line"
        raise ConfigError(f"setting {name!r} is ambiguous: {', '.join(found)}; give one in full: {example}")
    return found[0]


def _setting_paths(cls: type[Section], prefix: str = "") -> dict[str, type[Section] | None]:
    """The settings of a section and of those inside it, by path; with the section, where it is one."""
    paths: dict[str, type[Section] | None] = {}
    inner = _sections(cls)
    for key in _keys(cls):
        paths[prefix + key] = inner.get(key)
        if key in inner:
            paths |= _setting_paths(inner[key], f"{prefix}{key}.")
    return paths
