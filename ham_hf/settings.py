"""Settings: dataclass fields with a type, a help line and a range, and the checks that follow from them.

Every settings class (the group of each component, and the training methods of `ham_hf.methods`) is a frozen dataclass
whose fields are declared with `setting`. `settings_of` reads them into `Setting` objects, from which checks,
``--help``, flags and YAML are made, so that each fact is written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

T = TypeVar("T")

MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""Largest number of 32 bits, which networks compute with."""


class ConfigError(ValueError):
    """A configuration that cannot be run, with everything that is wrong with it.

    Attributes:
        problems: one sentence each; names the setting, its value and the expected values.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        heading = f"{len(self.problems)} problems in the configuration:"
        super().__init__(self.problems[0] if len(self.problems) == 1 else "\n  - ".join([heading, *self.problems]))


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where a number has to lie: an interval, each end of which is open, closed or missing."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def __contains__(self, value: float) -> bool:
        """Whether the finite number ``value`` lies in between."""
        return self.above < value < self.below and self.at_least <= value <= self.at_most

    @property
    def has_upper_end(self) -> bool:
        """Whether there is an upper end; none is without a lower one."""
        return min(self.below, self.at_most) < math.inf

    def __str__(self) -> str:
        """``[0, 1)``, ``>= 1`` or ``> 0``; empty without an end."""
        is_open = self.at_least == -math.inf
        if self.has_upper_end:
            low = f"({self.above}" if is_open else f"[{self.at_least}"
            return f"{low}, {self.below})" if self.at_most == math.inf else f"{low}, {self.at_most}]"
        if is_open:
            return "" if self.above == -math.inf else f"> {self.above}"
        return f">= {self.at_least}"


def setting(default: T, help: str, *, limits: str = "", items: str = "", **ends: float) -> T:
    """Declare a field of a settings class.

    Args:
        default: value when nothing is given; a mapping is copied.
        help: one line with the unit, as shown by ``--help``.
        limits: in words, for what numbers do not say; shown and not checked.
        items: notation of one item, for a tuple whose items are written in their own notation.
        ends: of the interval that a number has to lie in, see `Bounds`: ``at_least=0, below=1``; checked.
    """
    metadata = {"help": help, "bounds": Bounds(**ends), "limits": limits, "items": items}
    if isinstance(default, dict):
        return field(default_factory=lambda: cast(T, dict(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


def same_as(owner: type, name: str, help: str | None = None) -> Any:  # noqa: ANN401 (of the setting's type)
    """Declare the setting ``name`` of another settings class once more, with its default and range.

    ``help`` takes the place of its help line, where that says what the setting is for there.
    """
    known = next(one for one in fields(owner) if one.name == name)
    metadata = known.metadata if help is None else {**known.metadata, "help": help}
    return field(default=known.default, default_factory=known.default_factory, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: field name, flag and YAML key at once.
        kind: the type without ``| None``: bool, int, float, str, a ``Literal``, a ``tuple[X, ...]`` or a mapping.
        optional: whether None is allowed.
        default: the default; ``dataclasses.MISSING`` if a value is required.
        help: one line with the unit.
        bounds: of a number.
        limits: the bounds, or what takes their place, as shown; may be empty.
        items: notation of one item of a tuple; may be empty.
    """

    name: str
    kind: Any
    optional: bool
    default: object
    help: str
    bounds: Bounds
    limits: str
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
        return get_args(self.kind)[0] if self.is_list else self.kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words of a ``Literal``, or of a list of such, else nothing."""
        return get_args(self.item_kind) if get_origin(self.item_kind) is Literal else ()

    @property
    def expected(self) -> str:
        """Description of the values that are allowed, to follow the word "expected"."""
        if self.choices:
            what = f"{'none, or some' if self.is_list else 'one'} of " + ", ".join(self.choices)
        elif self.is_mapping:
            what = "names with values (numbers, words, true/false, lists)"
        elif self.is_list:
            what = f"a list of {self.items or _kind_words(self.item_kind)}"
        else:
            what = _kind_words(self.kind)
        if self.limits:
            what += f" in {self.limits}" if self.bounds.has_upper_end else f" {self.limits}"
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
                item in self.choices if self.choices else is_kind(item, self.item_kind) for item in value
            )
        if self.choices:
            return value in self.choices
        return is_kind(value, self.kind) and (not isinstance(value, int | float) or value in self.bounds)


def _kind_words(kind: object) -> str:
    words: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(kind, "a text")


def is_kind(value: object, kind: object) -> bool:
    """Whether ``value`` is of a setting's type: float takes whole numbers, and no number type takes true or false."""
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


_READ: WeakKeyDictionary[type, tuple[Setting, ...]] = WeakKeyDictionary()


def settings_of(settings_class: type) -> tuple[Setting, ...]:
    """The settings that a settings class declares, in order; nested groups, which have a title, are not among them."""
    if settings_class not in _READ:
        own = [declared for declared in fields(settings_class) if "title" not in declared.metadata]
        hints = get_type_hints(settings_class) if own else {}
        _READ[settings_class] = tuple(_read_field(declared, hints[declared.name]) for declared in own)
    return _READ[settings_class]


def _read_field(declared: Field[Any], hint: object) -> Setting:
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for kind in alternatives if kind is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"{declared.name}: a setting has one type, with or without None, not {hint}")
    factory, bounds = declared.default_factory, declared.metadata.get("bounds", Bounds())
    return Setting(
        name=declared.name,
        kind=kinds[0],
        optional=len(kinds) < len(alternatives),
        default=declared.default if factory is MISSING else factory(),
        help=declared.metadata["help"],
        bounds=bounds,
        limits=declared.metadata.get("limits") or str(bounds),
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

    def idle(self, names: Iterable[str], without: str) -> Iterator[str]:
        """Problems of the settings ``names`` that are given and have no effect without the flag ``without``."""
        for name in names:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                yield f"--{name}{'' if value is True else f' {value}'} has no effect without {without}"
