"""Names in a comparison's files: short and distinct names of rows, and paths that say nothing about this machine.

A comparison is made to be shown, and absolute paths name users and servers: only their last part is written.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ham_hf.reporting.formats import plain_text

MAX_NAME = 40
_START = r"(?:~\w*/|/(?!/)|(?<!\w)[A-Za-z]:[/\\])"
_QUOTED = re.compile(rf"(['\"])({_START}[^'\"\n]+)\1")
_BARE = re.compile(rf"(?<![\w.~/]){_START}[^\s'\"`,;:()<>|]+")


def public_text(text: str) -> str:
    """``text`` with every absolute path in it cut to its last part; one with spaces has to be in quotes."""
    text = text.replace("file://", "")
    text = _QUOTED.sub(lambda match: f"{match[1]}{_last_part(match[2])}{match[1]}", text)
    return _BARE.sub(lambda match: _last_part(match[0]), text)


def public_word(word: str) -> str:
    """One word of a command line, or one value: as `public_text`, and spaces belong to the path."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{flag}{equals}{_last_part(value) if re.match(_START, value) else public_text(value)}"


def public_value(value: object) -> object:
    """A JSON value with the paths in its texts cut."""
    if isinstance(value, str):
        return public_word(value)
    if isinstance(value, dict):
        return {name: public_value(item) for name, item in value.items()}
    return [public_value(item) for item in value] if isinstance(value, list) else value


def public_source(source: str, folder: str | Path | None) -> str:
    """A run's folder as seen from ``folder``, that of the comparison; a Hub id as it is.

    Of a run that shares no more with the comparison than the root of the machine or of its users, only
    ``LABEL/seedN`` stays.
    """
    if folder is None or not Path(source).exists():
        return public_word(source)
    run, here = Path(source).resolve(), Path(folder).resolve()
    shared = Path(os.path.commonpath([run, here]))
    if shared in {Path(run.anchor), *Path.home().resolve().parents}:
        return "/".join(run.parts[-2:])
    return Path(os.path.relpath(run, here)).as_posix()


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """A name of at most ``MAX_NAME`` visible characters for each label; those that would be cut alike are numbered."""
    labels = list(dict.fromkeys(labels))
    cut = {label: plain_text(label, MAX_NAME) for label in labels}
    often = Counter(cut.values())
    taken = {name for name, count in often.items() if count == 1}
    names = {}
    for label in labels:
        names[label] = cut[label]
        if often[cut[label]] > 1:
            stem = plain_text(label.partition(" (")[0], MAX_NAME - 6)
            names[label] = next(name for number in itertools.count(1) if (name := f"{stem} #{number}") not in taken)
            taken.add(names[label])
    return names


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
