"""Tables of what a report says beside the classes: groups of another column, and corrupted images."""

from __future__ import annotations

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
        row = {
            "Evaluation": evaluation_title(name),
            "Average": percent(summary.average),
            "Worst group": f"{percent(summary.worst_class)}{interval_text(intervals, 'worst_class')} "
            f"({plain_text(found.names[summary.worst_class_index], 30)})",
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

    Worst class and worst 30 % are of the highest severity that was computed. The last row is the mean over all.
    """
    found = report.corruptions
    if found is None:
        return []
    names = report.dataset.class_names
    highest = max(found.severities)
    rows = [{"Corruption": "none", **_severities(found, None, report.results["clean"].summary.average)}]
    clean = report.results["clean"].summary
    rows[0] |= _weakest(clean.worst_class, names[clean.worst_class_index], clean.worst_30_percent, highest)
    for name in found.names:
        entries = {entry.severity: entry for entry in found.results if entry.name == name}
        last = entries[highest]
        weakest = _weakest(last.worst_class, names[last.worst_class_index], last.worst_30_percent, highest)
        rows.append({"Corruption": name, **_severities(found, name, None)} | weakest)
    return rows


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


def _severities(found: CorruptionReport, name: str | None, same: float | None) -> dict[str, str]:
    values = {entry.severity: entry.average for entry in found.results if entry.name == name}
    shown = [values.get(severity, same) for severity in found.severities]
    cells = {
        f"Severity {severity}": percent(value or 0.0) for severity, value in zip(found.severities, shown, strict=True)
    }
    mean = sum(value or 0.0 for value in shown) / len(shown)
    return {**cells, "Mean": percent(mean)}


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
