"""Tables of what a report says beside the classes: groups of another column, and corrupted images."""

from __future__ import annotations

from collections.abc import Sequence

from ham_hf.reporting.breakdowns import CorruptionReport, GroupReport
from ham_hf.reporting.report import RunReport, evaluation_title, interval_text, percent, plain_text

MAX_GROUP_ROWS = 50
"""Groups that a table lists; of more, the weakest."""
FEW_GROUPS = 3
"""Up to here, the worst 30 % of the groups is the worst group."""


def group_rows(found: GroupReport) -> list[dict[str, str]]:
    """One row per evaluation: worst group, worst 30 % where it says more, and gap, with 95 % intervals."""
    rows = []
    for name, result in found.results.items():
        summary, intervals = result.summary, result.intervals
        worst = f"{percent(summary.worst_class)}{interval_text(intervals, 'worst_class')}"
        row = {
            "Evaluation": evaluation_title(name),
            "Average": percent(summary.average),
            "Worst group": f"{worst} {plain_text(found.names[summary.worst_class_index], 30)}",
        }
        if len(found.names) > FEW_GROUPS:
            worst_30 = percent(summary.worst_30_percent) + interval_text(intervals, "worst_30_percent")
            row["Worst 30 % of groups"] = worst_30
        rows.append(row | {"Gap": percent(summary.gap) + interval_text(intervals, "gap")})
    return rows


def each_group_rows(found: GroupReport) -> list[dict[str, str]]:
    """One row per group with images, the worst by the first evaluation first, with 95 % Wilson intervals."""
    first = next(iter(found.results.values())).summary.per_class
    clean = found.results["clean"].summary.per_class
    present = [index for index, entry in enumerate(clean) if entry.count]
    present.sort(key=lambda index: (first[index].accuracy is None, first[index].accuracy))
    rows = []
    for index in present[:MAX_GROUP_ROWS]:
        row = {plain_text(found.column, 40): plain_text(found.names[index], 40), "Images": str(clean[index].count)}
        for name, result in found.results.items():
            entry = result.summary.per_class[index]
            row[evaluation_title(name)] = "–"
            if entry.accuracy is not None and entry.low is not None and entry.high is not None:
                row[evaluation_title(name)] = f"{percent(entry.accuracy)} ({percent(entry.low)}–{percent(entry.high)})"
        rows.append(row)
    return rows


def corruption_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per corruption: its average at each severity, and what it leaves of the weakest classes.

    Worst class and worst 30 % are of the highest severity that was computed. The last row is the mean over all
    corruptions, whose last cell of accuracy is the mean corruption accuracy.
    """
    found = report.corruptions
    if found is None:
        return []
    names, highest = report.dataset.class_names, max(found.severities)
    clean = report.results["clean"].summary
    rows = [
        {"Corruption": "none", **_severities([clean.average] * len(found.severities), found)}
        | _weakest(clean.worst_class, names[clean.worst_class_index], clean.worst_30_percent, highest)
    ]
    averages = {(entry.name, entry.severity): entry.average for entry in found.results}
    for name in found.names:
        last = next(entry for entry in found.results if (entry.name, entry.severity) == (name, highest))
        rows.append(
            {"Corruption": name, **_severities([averages[name, severity] for severity in found.severities], found)}
            | _weakest(last.worst_class, names[last.worst_class_index], last.worst_30_percent, highest)
        )
    means = [sum(averages[name, severity] for name in found.names) / len(found.names) for severity in found.severities]
    last_row = {"Corruption": f"mean of {len(found.names)}", **_severities(means, found)}
    return [*rows, last_row | dict.fromkeys(_weakest(0, "", 0, highest), "–")]


def corrupted_class_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per class, the worst mean corruption accuracy first, at most `MAX_GROUP_ROWS`."""
    found = report.corruptions
    if found is None:
        return []
    means = [(mean, index) for index, mean in enumerate(found.class_means) if mean is not None]
    clean = report.results["clean"].summary.per_class
    return [
        {
            "Class": plain_text(report.dataset.class_names[index], 40),
            "Images": str(found.counts[index]),
            "Clean": percent(clean[index].accuracy or 0.0),
            "Mean corruption accuracy": percent(mean),
            "Lowest": _lowest(found, index),
        }
        for mean, index in sorted(means)[:MAX_GROUP_ROWS]
    ]


def _severities(averages: Sequence[float], found: CorruptionReport) -> dict[str, str]:
    cells = {
        f"Severity {severity}": percent(average) for severity, average in zip(found.severities, averages, strict=True)
    }
    return {**cells, "Mean": percent(sum(averages) / len(averages))}


def _weakest(worst: float, name: str, worst_30: float, severity: int) -> dict[str, str]:
    return {
        f"Worst class, severity {severity}": f"{percent(worst)} ({plain_text(name, 30)})",
        f"Worst 30 %, severity {severity}": percent(worst_30),
    }


def _lowest(found: CorruptionReport, index: int) -> str:
    lowest = min(found.results, key=lambda entry: entry.correct[index])
    return f"{percent(lowest.correct[index] / found.counts[index])} ({lowest.name}, severity {lowest.severity})"


def breakdown_tables(report: RunReport) -> list[list[dict[str, str]]]:
    """The tables of groups and of corruptions that there are, for a terminal."""
    tables = [] if report.groups is None else [group_rows(report.groups), each_group_rows(report.groups)]
    return tables if report.corruptions is None else [*tables, corruption_rows(report)]
