"""How reports write numbers, paths and text of unknown origin; plain-text and Markdown tables of equal rows.

Rows are mappings of column title to cell. Class names, dataset names and settings are data: `plain_text` makes one
visible line of them, and Markdown takes nothing else than `Markdown`, which only the functions here make. Absolute
paths name users and servers: of those in a comparison, which is made to be shown, `public_text` keeps the last part.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ham_hf.intervals import FairnessIntervals
from ham_hf.metrics import ClassAccuracy, FairnessSummary

MARKUP = re.compile(r"([\\`*_{}\[\]#|~$!@]|:(?=\S)|(?<=www)\.)", flags=re.IGNORECASE)
"""Characters that mean something to Markdown inside a line, and those that make a bare address a link."""
BLOCK = re.compile(r"^(\d{0,9})([-+.)](?=\s|$)|-(?=-)|=(?==|$))")
"""Beginnings that make a line the item of a list, a rule or the underline of a heading."""
MAX_NAME = 40
_START = r"(?:~\w*/|/(?!/)|(?<!\w)[A-Za-z]:[/\\])"
_QUOTED = re.compile(rf"(['\"])({_START}[^'\"\n]+)\1")
_BARE = re.compile(rf"(?<![\w.~/]){_START}[^\s'\"`,;:()<>|]+")


class Markdown(str):
    """Text that can go into a Markdown document as it is."""

    __slots__ = ()


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one decimal, without the sign: 0.5312 -> "53.1"."""
    return f"{100 * share:.1f}"


def ratio(value: float) -> str:
    """A ratio, such as NSD, with three decimals."""
    return f"{value:.3f}"


def percent_ends(ends: tuple[float, float] | None) -> str:
    """The ends of an interval, as "50.0–56.2" in percent; nothing where they are not known."""
    return "" if ends is None else "–".join(map(percent, ends))


def percent_with_ends(value: float, low: float, high: float) -> str:
    """A share and the ends of its interval, as "53.1 (50.0–56.2)" in percent."""
    return f"{percent(value)} ({percent(low)}–{percent(high)})"


def class_cell(entry: ClassAccuracy, images: int | None = None) -> str:
    """The accuracy of a class with its interval, in percent; a dash where it has no example.

    ``images`` is the number that its row shows: that of ``entry`` follows where it differs.
    """
    if entry.accuracy is None or entry.low is None or entry.high is None:
        return "–"
    own = "" if images in (None, entry.count) else f" of {entry.count}"
    return percent_with_ends(entry.accuracy, entry.low, entry.high) + own


def with_interval(
    summary: FairnessSummary,
    intervals: FairnessIntervals | None,
    name: str,
    *,
    digits: Callable[[float], str] = percent,
) -> str:
    """A fairness number as "9.1 (7.1–12.9)" in percent, without the ends where they are not known; or a dash."""
    value, ends = getattr(summary, name), None if intervals is None else getattr(intervals, name)
    if value is None:
        return "–"
    return digits(value) + ("" if ends is None else f" ({'–'.join(map(digits, ends))})")


def signed_points(mean: float, low: float, high: float) -> str:
    """A difference and its interval in percentage points, as "+1.2 (-0.3 to +2.7)"."""
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def fraction_text(value: float) -> str:
    """A length in pixel units the way the field writes it: "8/255" where it is that, else the number."""
    steps = value * 255
    return f"{round(steps)}/255" if steps > 0.5 and abs(steps - round(steps)) < 1e-6 else f"{value:g}"


def norm_text(norm: str) -> str:
    """A norm as "L∞" or "L2"; an unknown one as it is."""
    return {"linf": "L∞", "l2": "L2"}.get(norm, plain_text(norm))


def evaluation_title(name: str) -> str:
    """Name of an evaluation for tables and figures: "Clean", "PGD-20", "AutoAttack"; a foreign attack's own."""
    fixed = {"clean": "Clean", "autoattack": "AutoAttack", "verdict": "Verdict"}
    return fixed.get(name, name.upper() if re.fullmatch(r"(pgd|cw)-\d+", name) else name)


def plain_text(value: object, max_length: int = 60) -> str:
    """Text of unknown origin (class names, dataset names) as one visible line.

    Control, format (bidirectional and zero-width), surrogate and unassigned characters go, runs of white space
    become one space, and what exceeds ``max_length`` characters is cut and marked with an ellipsis.
    """
    visible = "".join(
        " " if c.isspace() else c for c in str(value) if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    line = " ".join(visible.split())
    if len(line) > max_length:
        line = line[: max_length - 1].rstrip() + "…"
    return line or "(empty)"


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


def markdown_text(value: object, max_length: int = 60) -> Markdown:
    """Escape ``value`` for running text and table cells: no markup, no HTML, no line breaks, no autolinks."""
    escaped = BLOCK.sub(r"\1\\\2", MARKUP.sub(r"\\\1", plain_text(value, max_length)))
    return Markdown(escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def code(value: object, max_length: int = 60) -> Markdown:
    """``value`` as a code span, for running text (not for tables, whose pipes code spans do not protect)."""
    return Markdown(f"`{verbatim(value, max_length)}`")


def verbatim(value: object, max_length: int = 60) -> Markdown:
    """``value`` for the inside of a fenced code block."""
    return Markdown(plain_text(value, max_length).replace("`", "'"))


def literal(value: str | float) -> Markdown:
    """``value`` as a Python literal, for the inside of a fenced code block."""
    return Markdown(json.dumps(verbatim(value) if isinstance(value, str) else value, ensure_ascii=False))


def markdown_table(rows: Sequence[Mapping[str, str]]) -> Markdown:
    """Rows as a Markdown table; every cell that is not `Markdown` already is escaped."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    cells = [
        [cell if isinstance(cell, Markdown) or not cell else markdown_text(cell) for cell in line] for line in lines
    ]
    shown = [f"| {' | '.join(line)} |" for line in cells]
    return Markdown("\n".join([shown[0], "|---|" + "---:|" * (len(lines[0]) - 1), *shown[1:]]))


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Align rows as plain text, for a terminal; the empty string for no rows."""
    if not rows:
        return ""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
