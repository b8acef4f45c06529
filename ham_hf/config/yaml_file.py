"""Parse setting values from flags and YAML, and write them back to YAML.

YAML's own guesses at types are not used. They turn ``no`` into False, ``1e-3`` into a text, ``010`` into 8 and
``60:0.1`` into 3600.1; here the type of the setting decides how its text is read. Only the values inside a mapping
such as ``model_args``, which have no declared type, are recognized by their form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from ham_hf.config.configs import AnyConfig, config_to_dict, sections
from ham_hf.settings import MAX_FLOAT, ConfigError, Setting

_NULLS = {"", "~", "null", "Null", "NULL"}
_NONES = {"none", "None", "NONE"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INT = re.compile(r"[-+]?[0-9]{1,4000}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
MAX_NESTING = 20
MAX_RECIPE_BYTES = 2**20
_TEXT_TAG, _LIST_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq"


class Entry(NamedTuple):
    """One setting as written: its name, which may be unknown, and its value, not yet read.

    ``origin`` is file and line, to begin a message with; empty for a flag.
    """

    name: str
    node: yaml.Node
    origin: str


def text_node(text: str | list[str]) -> yaml.Node:
    """A flag's value, or several, as the node that the same text makes in a YAML file."""
    if isinstance(text, list):
        return yaml.SequenceNode(_LIST_TAG, [text_node(one) for one in text])
    return yaml.ScalarNode(_TEXT_TAG, text)


def mapping_node(flag: str, pairs: list[str]) -> yaml.Node:
    """A flag's ``key=value`` words, whose values are YAML, as a mapping node; ConfigError for other words."""
    items = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {pair!r}: expected key=value")
        items.append((text_node(key), _compose(text, f"{flag} {pair[:80]}") or text_node("")))
    return yaml.MappingNode("tag:yaml.org,2002:map", items)


def read_yaml(path: Path) -> list[Entry]:
    """The settings in a YAML file, in order.

    Raises:
        ConfigError: when the file cannot be read, is not YAML, or is not one flat mapping without repetitions.
    """
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= MAX_RECIPE_BYTES else ""
    except FileNotFoundError:
        raise ConfigError(
            f"--config {path}: there is no such file, and no recipe of that name (ham-hf recipes lists them)"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"--config {path}: this is a folder; name the YAML file in it") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: expected a YAML file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {str(path)!r}: cannot be read ({error})") from None
    if size > MAX_RECIPE_BYTES:
        raise ConfigError(f"--config {path}: expected a file of settings, and this one has {size} bytes")
    root = _compose(text, str(path))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--config {path}: expected lines of the form 'setting: value'")
    entries = [Entry(_key(key, path), node, f"{path}, line {_line(key)}: ") for key, node in root.value]
    repeated = [entry for at, entry in enumerate(entries) if entry.name in {e.name for e in entries[:at]}]
    if repeated:
        raise ConfigError(f"{entry.origin}{entry.name} is set a second time" for entry in repeated)
    return entries


def read_value(known: Setting, node: yaml.Node) -> object:
    """Read the value of a setting.

    Raises:
        ValueError: when the text is not of the setting's type or not in its range; with a message only where it adds
            something to `Setting.expected`.
    """
    value = _read(known, node)
    if not known.accepts(value):
        raise ValueError
    return value


def show_node(node: yaml.Node) -> str:
    """The value as it was written, for messages, shortened when long."""
    if isinstance(node, yaml.ScalarNode):
        shown = str(node.value) if re.fullmatch(r"[\w./:+-]+", node.value) else repr(node.value)
    elif isinstance(node, yaml.SequenceNode):
        shown = " ".join(show_node(item) for item in node.value) or "[]"
    else:
        shown = "{" + ", ".join(f"{show_node(key)}: {show_node(item)}" for key, item in node.value) + "}"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def config_to_yaml(config: AnyConfig) -> str:
    """Every setting of ``config``, by group; passed to ``--config`` it gives an equal configuration."""
    flat = config_to_dict(config)
    blocks = [
        "".join([f"# {title}\n", *(_write(name, flat[name]) for name in values)]) for title, values in sections(config)
    ]
    return "\n".join(blocks)


def setting_words(values: Mapping[str, object]) -> list[str]:
    """Settings as words of a command line, which reads them back equal.

    Args:
        values: by name, in the form of `ham_hf.config.config_to_dict`.
    """
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            words += [f"--{name}", *(f"{key}={_quoted(item)}" for key, item in value.items())]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is None or isinstance(value, bool):
            words.append(f"--{name}={str(value).lower()}")
        else:
            words.append(f"--{name}={exact_fraction(value) or value}")
    return words


def _quoted(value: object) -> str:
    """JSON in the characters that YAML reads back; it refuses some, and takes others for the end of a line."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def exact_fraction(value: object) -> str | None:
    """``"8/255"`` for a number that is an exact multiple of 1/255 and long to write otherwise, else None."""
    if isinstance(value, float) and 0 < value < 1 and len(repr(value)) > 8 and round(value * 255) / 255 == value:
        return f"{round(value * 255)}/255"
    return None


def _read(known: Setting, node: yaml.Node) -> object:
    if known.optional and _is_unquoted(node) and node.value in _NULLS | _NONES:
        return None
    if known.is_mapping and isinstance(node, yaml.MappingNode):
        return _untyped(node)
    if known.is_list and known.choices:
        return _words(node)
    if known.is_list and isinstance(node, yaml.SequenceNode):
        return tuple(_read_scalar(known.item_kind, item) for item in node.value)
    if known.is_mapping or known.is_list:
        raise ValueError
    return _read_scalar(str if known.choices else known.kind, node)


def _words(node: yaml.Node) -> tuple[str, ...]:
    """A list of words, each once: ``[a, b]``, ``a b`` of a flag, or ``a,b``; ``none`` stands for an empty one."""
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    words = [word.strip() for item in items for word in str(_read_scalar(str, item)).split(",")]
    return () if words == ["none"] else tuple(dict.fromkeys(words))


def _read_scalar(kind: object, node: yaml.Node) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError
    text: str = node.value
    if kind is str:
        if _is_unquoted(node) and text in _NULLS:
            raise ValueError
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError
        return _BOOLEANS[text.lower()]
    if kind is int:
        if not _INT.fullmatch(text):
            raise ValueError
        return int(text)
    if kind is float:
        return _number(text)
    assert hasattr(kind, "parse"), f"no way to read {kind}"  # noqa: S101 (a settings class declares wrongly)
    return kind.parse(text)


def _is_unquoted(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _number(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    try:
        above, below = float(numerator), float(denominator) if slash else 1.0
    except ValueError:
        raise ValueError from None  # Python's message is about strings and float
    if below == 0:
        raise ValueError("the denominator is 0")
    value = above / below
    if MAX_FLOAT < abs(value) < math.inf:
        raise ValueError(f"networks compute with numbers up to {MAX_FLOAT:.3g}")
    return value


def _untyped(node: yaml.Node) -> object:
    """A value without a declared type: quoted text is text, the rest is recognized as in YAML 1.2."""
    if isinstance(node, yaml.SequenceNode):
        return [_untyped(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, object] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("a name must be a word")
            if key.value in found:
                raise ValueError(f"{key.value} is set a second time")
            found[key.value] = _untyped(item)
        return found
    text: str = node.value
    if not _is_unquoted(node):
        return text
    if text in _NULLS | _NONES:
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _compose(text: str, source: str) -> yaml.Node | None:
    """Parse YAML without interpreting it; reject anchors, aliases, tags and deep nesting.

    The time that PyYAML takes grows with the square of the depth.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_NESTING:
                raise ConfigError(f"{source}: nested too deeply; no setting needs more than {MAX_NESTING} levels")
            if isinstance(event, yaml.NodeEvent) and (event.anchor or getattr(event, "tag", None)):
                raise ConfigError(f"{source}: '&', '*' and '!' have a meaning in YAML; quote texts that begin so")
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML ({error.problem or error.context})") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{source}: not valid YAML ({reason})") from None
    return node


def _key(node: yaml.Node, path: Path) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{path}, line {_line(node)}: expected 'setting: value'")
    return str(node.value)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1 if node.start_mark else 1


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_untyped` or an optional setting would take for something else."""


# PyYAML matches from the beginning only, hence the end.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:none|None|NONE)\Z"), list("nN"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), list("-+.0123456789"))


def _write(name: str, value: object) -> str:
    if isinstance(value, dict | list):
        return f"{name}: {_dump(value, flow=True)}"
    fraction = exact_fraction(value)
    line = _dump({name: value}, flow=False)
    return f"{line.rstrip()}  # {fraction}\n" if fraction else line


def _dump(value: object, *, flow: bool) -> str:
    # Without allow_unicode other characters are escaped; with it, PyYAML writes a few that it cannot read (U+0085).
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, width=float("inf"))
