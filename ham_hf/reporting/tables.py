"""The tables of a report as rows for `ham_hf.reporting.formats`: results, classes, groups, corruptions, the frontier.

Accuracies are in percent, intervals are 95 % ones. Names are cleaned (``plain_text``) but not escaped.
"""

from __future__ import annotations

from ham_hf.evaluation.calibration import Calibration
from ham_hf.metrics import FairnessSummary
from ham_hf.reporting.breakdowns import CorruptedAccuracy, GroupReport
from ham_hf.reporting.formats import (
    class_cell,
    evaluation_title,
    percent,
    percent_with_ends,
    plain_text,
    ratio,
    with_interval,
)
from ham_hf.reporting.report import RunReport

MAX_GROUP_ROWS = 50
"""Groups that a table lists; of more, the weakest."""
FEW_GROUPS = 3
"""Up to here, the worst 30 % of the groups is the worst group."""


def results_table(report: RunReport, *, intervals: bool = False) -> list[dict[str, str]]:
    """One row per evaluation, the verdict first, with the interval of the average.

    Args:
        report: a finished run.
        intervals: also show those of the fairness numbers, which make the table wide.
    """
    rows = []
    for attack in report.entries():
        summary, known = attack.summary, attack.intervals if intervals else None
        worst_name = plain_text(report.dataset.class_names[summary.worst_class_index], 30)
        seen = f"{summary.num_examples} of {report.dataset.num_test}"
        rows.append(
            {
                "Evaluation": attack.title,
                "Images": seen if report.is_subset(attack) else f"{summary.num_examples}",
                "Average": percent_with_ends(summary.average, summary.average_low, summary.average_high),
                "Macro": percent(summary.macro_average),
                "Worst class": f"{with_interval(summary, known, 'worst_class')} ({worst_name})",
                "Worst 10 %": percent(summary.worst_10_percent),
                "Worst 30 %": with_interval(summary, known, "worst_30_percent"),
                "Gap": with_interval(summary, known, "gap"),
                "Std": with_interval(summary, known, "std"),
                "NSD": with_interval(summary, known, "nsd", digits=ratio),
            }
        )
    return rows


def class_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per class with images, the worst of `RunReport.ordering_entry` first.

    "Images" are the most that an evaluation saw of the class; a cell of one that saw fewer has their number.
    """
    rows = []
    for index in report.worst_first():
        found = {entry.title: entry.summary.per_class[index] for entry in report.entries()}
        if images := max(one.count for one in found.values()):
            row = {"Class": plain_text(report.dataset.class_names[index], 40), "Images": str(images)}
            rows.append(row | {title: class_cell(one, images) for title, one in found.items()})
    return rows


def group_rows(found: GroupReport) -> list[dict[str, str]]:
    """One row per evaluation: worst group, worst 30 % where it says more, and gap, with intervals."""
    rows = []
    for name, result in found.results.items():
        summary, intervals = result.summary, result.intervals
        worst_name = plain_text(found.names[summary.worst_class_index], 30)
        row = {
            "Evaluation": evaluation_title(name),
            "Average": percent(summary.average),
            "Worst group": f"{with_interval(summary, intervals, 'worst_class')} {worst_name}",
        }
        if len(found.names) > FEW_GROUPS:
            row["Worst 30 % of groups"] = with_interval(summary, intervals, "worst_30_percent")
        rows.append(row | {"Gap": with_interval(summary, intervals, "gap")})
    return rows


def each_group_rows(found: GroupReport) -> list[dict[str, str]]:
    """One row per group with images, the worst by the first evaluation first, with Wilson intervals."""
    first = next(iter(found.results.values())).summary.per_class
    clean = found.results["clean"].summary.per_class
    present = [index for index, entry in enumerate(clean) if entry.count]
    present.sort(key=lambda index: (first[index].accuracy is None, first[index].accuracy))
    rows, column = [], plain_text(found.column, 40)
    if column in ("Images", *map(evaluation_title, found.results)):
        column += " (group)"
    for index in present[:MAX_GROUP_ROWS]:
        images = clean[index].count
        row = {column: plain_text(found.names[index], 40), "Images": str(images)}
        for name, one in found.results.items():
            row[evaluation_title(name)] = class_cell(one.summary.per_class[index], images)
        rows.append(row)
    return rows


def corruption_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per corruption: its average at each severity, and the accuracy of the weakest classes.

    Worst class and worst 30 % are of the highest severity that was computed. The last row is the mean over all
    corruptions, whose last cell of accuracy is the mean corruption accuracy.
    """
    found = report.corruptions
    if found is None:
        return []
    names, highest = report.dataset.class_names, max(found.severities)
    clean = report.results["clean"].summary
    at = {(entry.name, entry.severity): entry for entry in found.results}
    averages = {name: [at[name, severity].average for severity in found.severities] for name in found.names}
    means = [sum(column) / len(column) for column in zip(*averages.values(), strict=True)]
    lines: list[tuple[str, list[float], FairnessSummary | CorruptedAccuracy | None]] = [
        ("none", [clean.average] * len(means), clean),
        *((name, averages[name], at[name, highest]) for name in found.names),
        (f"mean of {len(found.names)}", means, None),
    ]
    rows = []
    for name, values, last in lines:
        row = {"Corruption": name}
        row |= {f"Severity {level}": percent(value) for level, value in zip(found.severities, values, strict=True)}
        row["Mean"] = percent(sum(values) / len(values))
        worst, worst_30 = "–", "–"
        if last is not None:
            worst = f"{percent(last.worst_class)} ({plain_text(names[last.worst_class_index], 30)})"
            worst_30 = percent(last.worst_30_percent)
        row |= {f"Worst class, severity {highest}": worst, f"Worst 30 %, severity {highest}": worst_30}
        rows.append(row)
    return rows


def corrupted_class_rows(report: RunReport) -> list[dict[str, str]]:
    """One row per class, the worst mean corruption accuracy first, at most `MAX_GROUP_ROWS`."""
    found = report.corruptions
    if found is None:
        return []
    clean, rows = report.results["clean"].summary.per_class, []
    means = [(mean, index) for index, mean in enumerate(found.class_means) if mean is not None]
    for mean, index in sorted(means)[:MAX_GROUP_ROWS]:
        lowest = min(found.results, key=lambda entry: entry.correct[index])
        share = percent(lowest.correct[index] / found.counts[index])
        rows.append(
            {
                "Class": plain_text(report.dataset.class_names[index], 40),
                "Images": str(found.counts[index]),
                "Clean": percent(clean[index].accuracy or 0.0),
                "Mean corruption accuracy": percent(mean),
                "Lowest": f"{share} ({lowest.name}, severity {lowest.severity})",
            }
        )
    return rows


def breakdown_tables(report: RunReport) -> list[tuple[str, list[dict[str, str]]]]:
    """Caption and rows of the tables of groups and of corruptions that there are."""
    tables: list[tuple[str, list[dict[str, str]]]] = []
    if report.groups is not None:
        column = plain_text(report.groups.column, 40)
        tables += [
            (f"Groups by {column}, in percent with 95 % intervals", group_rows(report.groups)),
            (f"Each group by {column}, in percent with 95 % intervals", each_group_rows(report.groups)),
        ]
    if report.corruptions is not None:
        constants = plain_text(report.corruptions.constants)
        tables.append((f"Accuracy in percent on corrupted images, constants of {constants}", corruption_rows(report)))
    return tables


def frontier_rows(found: Calibration) -> list[dict[str, str]]:
    """One row per point of the frontier, with intervals."""
    return [
        {
            "Fairness": f"{point.fairness:g}" + (" (this model)" if point.fairness == found.fairness else ""),
            "Average": percent_with_ends(point.average, point.average_low, point.average_high),
            "Worst class": percent_with_ends(point.worst_class, point.worst_class_low, point.worst_class_high),
            "Worst 30 %": percent_with_ends(
                point.worst_30_percent, point.worst_30_percent_low, point.worst_30_percent_high
            ),
        }
        for point in found.frontier
    ]
