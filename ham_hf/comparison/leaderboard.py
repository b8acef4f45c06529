"""``leaderboard.html``: models by robust average, worst class and worst 30 %, in one self-contained page.

A ranking holds models that were attacked alike: the same images, threat model, and settings of the attack
(`ham_hf.comparison.differences.conditions`). The largest such group of an evaluation comes first; every other one
stands apart and says in what it differs. Of several seeds a number is the mean, and its interval the mean of theirs
(our choice): all seeds see the same images, so that more of them do not make it narrower.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ham_hf.comparison.differences import IMAGES, budget, conditions, evaluations, machine_of
from ham_hf.comparison.pairs import PAIRED_METRICS, FinishedRun
from ham_hf.comparison.table import METRIC_TITLES, Comparison, Row
from ham_hf.files import atomic_write
from ham_hf.hub_config import HUB, split_revision
from ham_hf.reporting.formats import percent, percent_ends, plain_text, public_source, public_text, signed_points
from ham_hf.reporting.page import render_page

LEADERBOARD_NAME = "leaderboard.html"
TITLES = {metric: METRIC_TITLES[metric] for metric in PAIRED_METRICS}
MAX_CLASSES = 10
"""Worst classes listed of each model."""


def write_leaderboard(comparison: Comparison, folder: str | Path, *, command: str = "") -> Path:
    """Write ``leaderboard.html`` into ``folder`` in one step, and return its path.

    Sources of rows are shown as seen from ``folder``; ``command`` is the command line that makes the page again.
    """
    path = Path(folder) / LEADERBOARD_NAME
    atomic_write(path, leaderboard_html(comparison, folder=folder, command=command))
    return path


def leaderboard_html(comparison: Comparison, *, folder: str | Path | None = None, command: str = "") -> str:
    """The page; see `write_leaderboard`."""
    names = comparison.names
    models, attacks = len(comparison.rows), sum(name != "clean" for name in comparison.attacks)
    return render_page(
        "leaderboard.html.jinja",
        styles=["page.css", "leaderboard.css"],
        script="leaderboard.js",
        title="Robust accuracy, class by class",
        summary=f"{models} {'models' if models > 1 else 'model'}, {attacks} robust evaluations. Accuracies in percent "
        "with 95 % intervals. A ranking holds only what was attacked alike; where intervals overlap, order may be "
        "chance. Select a model to see its worst classes.",
        columns=[("name", "Model"), *TITLES.items(), ("price", _price_title(comparison)), ("seconds", "Seconds")],
        parts=[_part(comparison, name) for name in _ordered(comparison.attacks)],
        missing=[
            (
                plain_text(names[run.label]) + ("" if run.seed is None else f", seed {run.seed}"),
                f"{run.state}. {plain_text(public_text(run.reason), 600)}",
            )
            for run in comparison.missing
            if run.state != "not run"
        ],
        models=[_model(comparison, row, folder) for row in comparison.rows],
        baseline=plain_text(names.get(comparison.baseline or "", "")),
        footnotes=_footnotes(comparison),
        command=plain_text(command, 1000) if command else "",
    )


def _ordered(attacks: Mapping[str, str]) -> list[str]:
    """The verdict, AutoAttack, other attacks, and what is no attack."""
    places = {"verdict": 0, "autoattack": 1, "clean": 3}
    return sorted(attacks, key=lambda name: places.get(name, 2))


def _price_title(comparison: Comparison) -> str:
    return "Passes, millions" if comparison.baseline is None else "Price"


def _part(comparison: Comparison, name: str) -> dict[str, object]:
    """Everything about one evaluation: its groups, the largest first, and who does not have it.

    A row of a group has only the runs that were attacked alike.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in comparison.rows:
        alike: dict[tuple[tuple[str, str], ...], list[FinishedRun]] = {}
        for run in row.runs:
            if name in evaluations(run.report):
                alike.setdefault(tuple(conditions(run.report, name).items()), []).append(run)
        for key, runs in alike.items():
            groups.setdefault(key, []).append(replace(row, runs=tuple(runs)))
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    first = dict(ordered[0][0])
    absent = [comparison.names[row.label] for row in comparison.rows if name not in row.attacks]
    return {
        "name": name,
        "title": comparison.attacks[name],
        "groups": [
            {
                "title": "; ".join(
                    f"{title}: {plain_text(told, 300)}" for title, told in key if told and title != IMAGES
                ),
                "differs": _differences(dict(key), first),
                "devices": len({machine_of(run.report)["Device"] for row in rows for run in row.runs}),
                "rows": [
                    _row(comparison, row, name)
                    for row in sorted(rows, key=lambda one: -_mean(one, name, "worst_class"))
                ],
            }
            for key, rows in ordered
        ],
        "absent": ", ".join(absent),
    }


def _differences(facts: Mapping[str, str], first: Mapping[str, str]) -> list[str]:
    """In what a group was attacked otherwise than the first one, in words; nothing for the first."""
    words = []
    for title in dict.fromkeys([*first, *facts]):
        ours, theirs = facts.get(title), first.get(title)
        if ours == theirs:
            continue
        if title == IMAGES:
            words.append("other numbers of images per class")
        elif ours is None:
            words.append(f"{title}: not run")
        elif theirs is None:
            words.append(f"{title}: not run in the ranking above ({plain_text(ours, 300)})")
        else:
            # Of a long list of settings, those that differ.
            parts, others = ([part for part in text.split(", ") if part] for text in (ours, theirs))
            own = [part for part in parts if part not in others]
            other = [part for part in others if part not in parts]
            listed = (", ".join(map(plain_text, found)) or "nothing more" for found in (own, other))
            words.append("{}: {}; above: {}".format(title, *listed))
    return words


def _mean(row: Row, name: str, metric: str) -> float:
    return statistics.fmean(getattr(evaluations(run.report)[name].summary, metric) for run in row.runs)


def _row(comparison: Comparison, row: Row, name: str) -> dict[str, object]:
    numbers = [_number(row, name, metric) for metric in TITLES]
    passes = None if row.passes is None else row.passes.mean / 1e6
    price = passes if comparison.baseline is None else row.price
    seconds = None if row.seconds is None else row.seconds.mean
    order = [(metric, f"{_mean(row, name, metric):.6f}") for metric in TITLES]
    facts = budget(row.runs[0].report)
    return {
        "label": plain_text(row.label, 1000),
        "name": comparison.names[row.label],
        "seeds": len(row.runs),
        "budget": plain_text(f"{facts['Training']}; attack: {facts['Training attack']}", 120)
        if "Training" in facts
        else "evaluated, not trained here",
        "numbers": numbers,
        "order": [*order, ("price", _sortable(price)), ("seconds", _sortable(seconds))],
        "cost": [
            {"title": _price_title(comparison), "text": "–" if price is None else f"{price:.2f}"},
            {"title": "Seconds", "text": "–" if seconds is None else f"{seconds:,.0f}"},
        ],
    }


def _sortable(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _number(row: Row, name: str, metric: str) -> dict[str, object]:
    """Mean, ends of the interval and each seed of one number, in percent of the axis and as text."""
    mean = _mean(row, name, metric)
    found = [evaluations(run.report)[name] for run in row.runs]
    if metric == "average":
        ends = [(one.summary.average_low, one.summary.average_high) for one in found]
    else:
        ends = [getattr(one.intervals, metric) for one in found if one.intervals is not None]
    known = len(ends) == len(found)
    low, high = (statistics.fmean(side) for side in zip(*ends, strict=True)) if known else (0.0, 0.0)
    values = [getattr(one.summary, metric) for one in found]
    return {
        "title": TITLES[metric],
        "text": percent(mean),
        "ends": percent_ends((low, high)) if known else "",
        "mean": _place(mean),
        "low": _place(low) if known else None,
        "high": _place(high) if known else None,
        "seeds": [_place(value) for value in values] if len(values) > 1 else [],
    }


def _place(share: float) -> str:
    return f"{100 * share:.2f}"


def _model(comparison: Comparison, row: Row, folder: str | Path | None) -> dict[str, object]:
    run = row.runs[0]
    name = next(name for name in _ordered(comparison.attacks) if name in row.attacks)
    hub_id, revision = (None if Path(run.source).exists() else split_revision(run.source)) or ("", None)
    facts = budget(run.report) | machine_of(run.report)
    if row.passes is not None:
        facts["Passes"] = f"{row.passes.mean:,.0f}"
    facts["Seeds"] = ", ".join(map(str, row.seeds))
    facts["Made"] = run.report.created
    return {
        "label": plain_text(row.label, 1000),
        "link": f"{HUB}/{hub_id}" + (f"/tree/{revision}" if revision else "") if hub_id else "",
        "source": ", ".join(plain_text(public_source(one.source, folder), 200) for one in row.runs),
        "facts": [(title, plain_text(value, 400)) for title, value in facts.items() if value],
        "classes_of": comparison.attacks[name],
        "classes": _classes(row, name),
        "differences": _paired(comparison, row),
    }


def _classes(row: Row, name: str) -> list[tuple[str, str, str]]:
    """The worst classes, as a mean over seeds: name, percent, and place on the axis."""
    known = [(accuracy, label) for label, accuracy in enumerate(row.attacks[name].per_class) if accuracy is not None]
    names = row.runs[0].report.dataset.class_names
    return [
        (plain_text(names[label], 200), percent(accuracy), _place(accuracy))
        for accuracy, label in sorted(known)[:MAX_CLASSES]
    ]


def _paired(comparison: Comparison, row: Row) -> list[str]:
    """Differences from the baseline with their intervals, or why an evaluation, or the row, could not be paired."""
    if reason := comparison.pairs.unpaired.get(row.label):
        return [f"Not paired: {plain_text(reason, 300)}"]
    lines = []
    for name, title in comparison.attacks.items():
        if found := comparison.pairs.found.get(row.label, {}).get(name):
            of_metrics = ((words.lower(), getattr(found.differences, metric)) for metric, words in TITLES.items())
            shown = [f"{words} {signed_points(one.mean, one.low, one.high)}" for words, one in of_metrics]
            lines.append(f"{title}, {found.differences.num_examples:,} images: {', '.join(shown)}")
        elif reason := comparison.pairs.reason(row.label, title):
            lines.append(f"{title}: not paired: {plain_text(reason, 300)}")
    return lines


def _footnotes(comparison: Comparison) -> list[str]:
    relative = "" if comparison.baseline is None else ", relative to that of the baseline"
    notes = [
        "Intervals are of the images: Wilson's for the average, simultaneous over the classes for the worst class, by "
        "bootstrap of the images of each class for the worst 30 %. Of several seeds (rings) a number is their mean, "
        "and so is its interval.",
        f"Price: passes of an image in training, validation and calibration{relative}; a forward counts 1, a gradient "
        "of the input 2, a training pass 3. Seconds are of the same, on the hardware that each model names.",
    ]
    if "verdict" in comparison.attacks:
        notes.insert(0, "The verdict: right on the clean image and never broken by any attack that was run.")
    return notes
