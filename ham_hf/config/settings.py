"""What a setting is: a dataclass field with a type, a help line and a range, and the checks that follow from them.

Every settings class (the groups of `ham_hf.config.groups` and the training methods of `ham_hf.methods`) is a
frozen dataclass whose fields carry ``metadata={"help": ..., "range": ...}``. `settings_of` reads that into
`Setting` objects, from which checks, ``--help``, flags and YAML are made, so that each fact is written once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""Largest number of 32 bits, which networks compute with."""
_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")
_BOUND = re.compile(r"(>=?) (\S+)")


class ConfigError(ValueError):
    """A configuration that cannot be run, with everything that is wrong with it.

    Attributes:
        problems: one sentence each; names the setting, its value and what was expected.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        heading = f"{len(self.problems)} problems in the configuration:"
        super().__init__(self.problems[0] if len(self.problems) == 1 else "\n  - ".join([heading, *self.problems]))


def setting(default: T, help: str, range: str = "", items: str = "") -> T:
    """Declare a field of a settings class.

    Args:
        default: value when nothing is given.
        help: one line with the unit, as shown by ``--help``.
        range: ``"(0, 1]"``, ``">= 1"`` or ``"> 0"``, checked; any other wording is shown only.
        items: notation of one item, for a tuple whose items are written in their own notation.
    """
    return field(default=default, metadata={"help": help, "range": range, "items": items})


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: field name, flag and YAML key at once.
        kind: the type without ``| None``: bool, int, float, str, a ``Literal``, a ``tuple[X, ...]`` or a mapping.
        optional: whether None is allowed.
        default: the default; ``dataclasses.MISSING`` if a value is required.
        help: one line with the unit.
        range: limits of a number, as for `setting`; may be empty.
        items: notation of one item of a tuple; may be empty.
    """

    name: str
    kind: Any
    optional: bool
    default: object
    help: str
    range: str
    items: str

    @property
    def is_list(self) -> bool:
        """Whether the value is a tuple of items."""
        return get_origin(self.kind) is tuple

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping of names to plain values."""
        return get_origin(self.kind) is Mapping

    @property
    def item_kind(self) -> object:
        """Type of one item if the value is a list, else the type of the value."""
        kind: object = get_args(self.kind)[0] if self.is_list else self.kind
        return kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words of a ``Literal``, or of a list of such, else nothing."""
        return get_args(self.item_kind) if get_origin(self.item_kind) is Literal else ()

    @property
    def expected(self) -> str:
        """What a value must be, to follow the word "expected"."""
        if self.choices:
            what = f"{'none, or some' if self.is_list else 'one'} of " + ", ".join(self.choices)
        elif self.is_mapping:
            what = "names with values (numbers, words, true/false, lists)"
        elif self.is_list:
            what = f"a list of {self.items or _kind_words(self.item_kind)}"
        else:
            what = _kind_words(self.kind)
        if self.range:
            what += f" in {self.range}" if _INTERVAL.fullmatch(self.range) else f" {self.range}"
        return what + (" or none" if self.optional else "")

    def accepts(self, value: object) -> bool:
        """Whether ``value`` has the right type and lies in the range."""
        if value is None:
            return self.optional
        if self.is_mapping:
            return isinstance(value, Mapping) and all(
                isinstance(key, str) and key.isidentifier() and _is_plain(item) for key, item in value.items()
            )
        if self.is_list:
            return isinstance(value, tuple) and all(
                item in self.choices if self.choices else _is_kind(item, self.item_kind) for item in value
            )
        if self.choices:
            return value in self.choices
        return _is_kind(value, self.kind) and self._in_range(value)

    def _in_range(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return True
        if bound := _BOUND.fullmatch(self.range):
            return value >= float(bound[2]) if bound[1] == ">=" else value > float(bound[2])
        interval = _INTERVAL.fullmatch(self.range)
        if interval is None:
            return True
        opening, low, high, closing = interval.groups()
        above = value >= float(low) if opening == "[" else value > float(low)
        below = value <= float(high) if closing == "]" else value < float(high)
        return above and below


def _kind_words(kind: object) -> str:
    words: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(kind, "a text")


def _is_kind(value: object, kind: object) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and value != "" and "\0" not in value
    return isinstance(kind, type) and isinstance(value, kind)


def _is_plain(value: object) -> bool:
    """Whether JSON and YAML can hold ``value`` and give the same value back."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def settings_of(settings_class: type) -> tuple[Setting, ...]:
    """The settings that a settings class declares, in order; nested groups are not among them."""
    hints = get_type_hints(settings_class)
    return tuple(
        _read_field(declared, hints[declared.name])
        for declared in fields(settings_class)
        if not is_dataclass(hints[declared.name])
    )


def _read_field(declared: Field[Any], hint: object) -> Setting:
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for kind in alternatives if kind is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"{declared.name}: a setting has one type, with or without None, not {hint}")
    factory = declared.default_factory
    return Setting(
        name=declared.name,
        kind=kinds[0],
        optional=len(kinds) < len(alternatives),
        default=declared.default if factory is MISSING else factory(),
        help=declared.metadata["help"],
        range=declared.metadata.get("range", ""),
        items=declared.metadata.get("items", ""),
    )


def setting_problems(owner: object) -> list[str]:
    """Everything wrong with the settings of ``owner`` taken one by one: types and ranges."""
    return [
        f"--{known.name} {getattr(owner, known.name)!r}: expected {known.expected}"
        for known in settings_of(type(owner))
        if not known.accepts(getattr(owner, known.name))
    ]


@dataclass(frozen=True, kw_only=True)
class SettingsGroup:
    """Base of the groups: a group that exists has been checked.

    Raises:
        ConfigError: when a value has the wrong type, is out of range, or contradicts another of the group.
    """

    def __post_init__(self) -> None:
        problems = setting_problems(self) or list(self.contradictions())
        if problems:
            raise ConfigError(problems)

    def contradictions(self) -> Iterator[str]:
        """Problems between settings, each of which is fine by itself."""
        return iter(())
