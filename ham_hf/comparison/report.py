"""A comparison as files: every number as JSON, one line per row and evaluation as CSV, tables to read as Markdown.

Labels, class names and settings are data, and are escaped for Markdown.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ham_hf.comparison.differences import evaluations, setting_text
from ham_hf.comparison.pairs import PAIRED_METRICS
from ham_hf.comparison.table import METRIC_TITLES, METRICS, Comparison, Row, Spread
from ham_hf.files import atomic_write
from ham_hf.reporting.formats import (
    Markdown,
    code,
    markdown_table,
    markdown_text,
    percent,
    plain_text,
    public_source,
    public_text,
    public_value,
    ratio,
    signed_points,
)

SCHEMA_VERSION = 1
MEBIBYTE = 2**20
HOW_TO_READ = (
    "Accuracies are in percent: mean ± sample standard deviation over the seeds of a row (a single seed has none). "
    "The worst classes are those of each run; the figure of the classes takes each class' mean over seeds first, and "
    "prints the lowest of these means in bold: it is never below the worst class of the table. "
    "NSD is the standard deviation over classes divided by their mean; lower is better. {rho}"
    "{bold}"
    "– means not available: the row was not evaluated this way, or the value is undefined ({undefined})."
)
BOLD_BY_NOISE = (
    "A value is bold if it is better than the next best by more than the noise, with at least two seeds each; noise "
    "is sqrt(std² + std²) of the two and, but for NSD, also has the binomial variances p(1 - p)/n of the n test "
    "images of each, which more seeds do not lower, as all see the same images. "
)
BOLD_BY_PAIRS = (
    "A value is bold if it is better than that of {baseline} on the same images, seed by seed. With one seed: the "
    "average by McNemar's exact test (5 %), worst class and worst 30 % if the 95 % interval of the difference "
    "excludes 0. With several seeds: if all agree and the interval of the pooled difference excludes 0. Intervals by "
    "bootstrap of the images of each class, in the classes that are the worst of {baseline}. NSD is bold if it is "
    "lower than the next best by more than sqrt(std² + std²), with at least two seeds each. "
)
NOT_PAIRED = "Nothing is tested image by image, as the runs (older ones) have no predictions.parquet. "
VERDICT = (
    "The verdict is right on the clean image and never broken by any attack, on the images that every attack saw. "
)
RHO = (
    "ρ is the relative change of the worst class plus that of the average against {baseline}, from the means; higher "
    "is better, and it is never bold. "
)
NO_RHO_WHERE = "NSD where no image is classified correctly"
RHO_WHERE = "ρ where the worst class or the average of the baseline is 0, or evaluations differ"
NOT_COMPARABLE = (
    "**Not the same evaluation{baseline}:** {rows}. Dataset, test images, threat model or settings of the attack "
    "differ, so these have no ρ, and are bold only where a paired test on the images that both saw says better."
)


def write_comparison(
    comparison: Comparison, folder: str | Path, *, command: str, figures: Sequence[Path] = (), jobs: int | None = None
) -> list[Path]:
    """Write the three files into ``folder`` (made if needed), each in one step, and return their paths.

    ``command`` is the command line that makes the comparison again, ``figures`` are images in ``folder`` to show in
    the Markdown, ``jobs`` runs at a time in this call; None if none was to be run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.json": comparison_json(comparison, command=command, folder=folder, jobs=jobs),
        "comparison.csv": comparison_csv(comparison),
        "comparison.md": comparison_markdown(comparison, command=command, figures=[path.name for path in figures]),
    }
    for name, content in texts.items():
        atomic_write(folder / name, content)
    return [folder / name for name in texts]


def comparison_json(
    comparison: Comparison, *, command: str, folder: Path | None = None, jobs: int | None = None
) -> str:
    """Every number, with the values of each seed; folders of runs are relative to ``folder``, the comparison's."""
    names = comparison.names
    values = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "jobs": jobs,
        "baseline": comparison.baseline,
        "evaluations": list(comparison.attacks),
        "strongest_shared_attack": comparison.strongest_shared_attack(),
        "class_names": comparison.class_names,
        "rows": [_row_values(row, names[row.label], folder) for row in comparison.rows],
        "missing": [
            {**asdict(run), "failed": run.state == "failed", "reason": public_text(run.reason)}
            for run in comparison.missing
        ],
        "paired": comparison.pairs.found,
        "unpaired": comparison.pairs.unpaired,
        "comparable": [name for name in comparison.attacks if not comparison.unlike(name)],
        "unequal": list(comparison.unequal),
        "budget": comparison.budget,
        "environment": comparison.environment,
    }
    return json.dumps(values, indent=1, allow_nan=False, default=asdict) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """One line per row and evaluation; accuracies in [0, 1], an unknown value is empty. Cost repeats on each line.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    lines: list[dict[str, object]] = []
    names = comparison.names
    for row in comparison.rows:
        cost = {"price": row.price} | _columns("passes", row.passes)
        cost |= _columns("training_seconds", row.seconds) | _columns("peak_memory_bytes", row.peak_memory_bytes)
        for name in comparison.attacks:
            if name in row.attacks:
                numbers = row.attacks[name]
                line: dict[str, object] = {
                    "label": _harmless(names[row.label]),
                    "evaluation": _harmless(name),
                    "seeds": " ".join(map(str, numbers.seeds)),
                    "num_examples": " ".join(map(str, sorted(set(numbers.num_examples)))),
                }
                for metric in METRICS:
                    line |= _columns(metric, getattr(numbers, metric))
                lines.append(line | {"rho": numbers.rho} | cost)
    target = io.StringIO()
    writer = csv.DictWriter(target, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return target.getvalue()


def comparison_markdown(comparison: Comparison, *, command: str, figures: Sequence[str] = ()) -> str:
    """Tables to read: one per evaluation and one of the cost, then how to read them and what the runs share."""
    parts = ["# Comparison", *_notes(comparison)]
    for name in comparison.attacks:
        parts.append(f"## {_heading(comparison, name)}")
        if others := ", ".join(markdown_text(comparison.names[label]) for label in comparison.unlike(name)):
            baseline = f" as {_baseline_name(comparison)}" if comparison.baseline in comparison.alike[name] else ""
            parts.append(NOT_COMPARABLE.format(rows=others, baseline=baseline))
        parts.append(_attack_table(comparison, name))
    parts += _pairs_section(comparison)
    parts.append(f"## Cost\n\n{_cost_table(comparison)}\n\n{_cost_note(comparison)}")
    if comparison.missing:
        missing = [
            f"- {markdown_text(comparison.names[run.label])}{'' if run.seed is None else f', seed {run.seed}'}: "
            f"{run.state}. {markdown_text(public_text(run.reason), 600)}"
            for run in comparison.missing
        ]
        parts.append("## Runs that are missing\n\n" + "\n".join(missing))
    parts += ["## How to read this", _how_to_read(comparison)]
    shown = comparison.strongest_shared_attack()
    if figures and shown is not None:
        parts.append(
            f"The figures are of {_heading(comparison, shown)}: of the attacks that every run was evaluated under (on "
            "all test images, where there is one), it leaves the lowest average, as a mean over the rows."
        )
    parts += [markdown_text(sentence, 1000) for sentence in without_figures(comparison)]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    parts.append(f"## What the rows share, and what not\n\n{_shared(comparison, command)}")
    lines = []
    for row in comparison.rows:
        settings = ", ".join(f"{name} {setting_text(value)}" for name, value in row.settings.items()) or "none"
        lines.append(f"- {markdown_text(comparison.names[row.label])}: {markdown_text(settings, 2000)}")
    parts += ["## Settings in which the rows differ", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def without_figures(comparison: Comparison) -> list[str]:
    """A sentence for each figure that cannot be drawn, saying why."""
    if comparison.strongest_shared_attack() is None:
        attacks = {
            title: [comparison.names[row.label] for row in comparison.rows if name in row.attacks]
            for name, title in comparison.attacks.items()
            if name not in ("clean", "verdict")
        }
        ran = "; ".join(f"{title} on {', '.join(names)}" for title, names in attacks.items())
        return [f"There are no figures, as no attack was run on every row ({ran or 'none was run on any'})."]
    if comparison.class_names is None:
        return ["There is no figure of the classes, as the rows do not have the same classes."]
    return []


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    if comparison.unequal:
        titles = ", ".join(markdown_text(title) for title in comparison.unequal)
        notes.append(
            f"**Not the same budget:** the rows differ in more than the method ({titles}); see the end of this page."
        )
    if len(comparison.environment["Commit"]) > 1:
        notes.append("**Not the same code:** the runs come from several commits; see the end of this page.")
    return notes


def _shared(comparison: Comparison, command: str) -> str:
    """Budget, environment, seeds and command: first what differs, each value with its rows."""
    by_commit: dict[str, dict[str, list[int]]] = {}
    for row in comparison.rows:
        for run in row.runs:
            commit = run.report.environment.commit or "unknown"
            by_commit.setdefault(commit, {}).setdefault(comparison.names[row.label], []).append(run.seed)
    known = {**comparison.unequal, **comparison.budget, **comparison.environment}
    lines = [
        _fact_line(comparison, title, values)
        for title, values in known.items()
        if title != "Commit" or len(values) == 1
    ]
    if len(by_commit) > 1:
        lines += [
            f"- commit {markdown_text(commit)}: "
            + "; ".join(f"{markdown_text(name)}, seed {', '.join(map(str, seeds))}" for name, seeds in rows.items())
            for commit, rows in by_commit.items()
        ]
    seeds = sorted({seed for row in comparison.rows for seed in row.seeds})
    return "\n".join([*lines, f"- Seeds: {', '.join(map(str, seeds))}", f"- Command: {code(command, 2000)}"])


def _how_to_read(comparison: Comparison) -> str:
    bold = BOLD_BY_NOISE
    if comparison.pairs.unpaired and not comparison.pairs.found:
        bold += NOT_PAIRED
    if comparison.pairs.found:
        bold = BOLD_BY_PAIRS.format(baseline=_baseline_name(comparison))
    if "verdict" in comparison.attacks:
        bold = VERDICT + bold
    if comparison.baseline is None:
        return HOW_TO_READ.format(rho="", bold=bold, undefined=NO_RHO_WHERE)
    rho = RHO.format(baseline=_baseline_name(comparison))
    return HOW_TO_READ.format(rho=rho, bold=bold, undefined=f"{NO_RHO_WHERE}; {RHO_WHERE}")


def _baseline_name(comparison: Comparison) -> str:
    return markdown_text(comparison.names[str(comparison.baseline)])


def _pairs_section(comparison: Comparison) -> list[str]:
    """Differences of the verdict from the baseline with their intervals, and which rows have none; or nothing."""
    pairs, names, rows = comparison.pairs, comparison.names, []
    if not pairs.found:
        return []
    for label, found in pairs.found.items():
        if "verdict" in found:
            paired = found["verdict"].differences
            row = {"": names[label], "Seeds": Markdown(", ".join(map(str, found["verdict"].seeds)))}
            row["Images"] = str(paired.num_examples)
            for metric in PAIRED_METRICS:
                difference = getattr(paired, metric)
                row[METRIC_TITLES[metric]] = signed_points(difference.mean, difference.low, difference.high)
            rows.append(row | {"McNemar p": Markdown(", ".join(f"{value:.2g}" for value in paired.p_values))})
    parts = [f"## Verdict, difference from {_baseline_name(comparison)}"]
    if rows:
        about = "On the images that both saw, in percentage points, with 95 % intervals; p of each seed."
        parts += [about, markdown_table(rows)]
    if pairs.unpaired:
        listed = []
        for place, reason in pairs.unpaired.items():
            label, *title = (place,) if place in names else place.rsplit(", ", 1)
            what = ", ".join(map(markdown_text, [names.get(label, label), *title]))
            listed.append(f"- {what}: {markdown_text(reason, 300)}")
        parts.append("Not paired with it, hence never bold:\n\n" + "\n".join(listed))
    return parts if len(parts) > 1 else []


def _heading(comparison: Comparison, attack: str) -> str:
    """The evaluation's title and, where it saw a part of them only, the number of test images."""
    reports = [run.report for row in comparison.rows for run in row.runs if attack in evaluations(run.report)]
    title = markdown_text(comparison.attacks[attack])
    counts = {(evaluations(report)[attack].summary.num_examples, report.dataset.num_test) for report in reports}
    if all(seen == all_images for seen, all_images in counts):
        return title
    return f"{title} ({'; '.join(f'{seen} of {all_images}' for seen, all_images in sorted(counts))} test images)"


def _row_values(row: Row, name: str, folder: Path | None) -> dict[str, object]:
    return {
        "label": row.label,
        "name": name,
        "seeds": row.seeds,
        "settings": public_value(dict(row.settings)),
        "attacks": row.attacks,
        "price": row.price,
        "passes": row.passes,
        "training_seconds": row.seconds,
        "peak_memory_bytes": row.peak_memory_bytes,
        "runs": [
            {
                "seed": run.seed,
                "source": public_source(run.source, folder),
                "created": run.report.created,
                "commit": run.report.environment.commit,
            }
            for run in row.runs
        ],
    }


def _columns(name: str, spread: Spread | None) -> dict[str, object]:
    """CSV writes None as nothing, and floats so that they read back equal."""
    return {f"{name}_mean": spread and spread.mean, f"{name}_std": spread and spread.std}


def _attack_table(comparison: Comparison, attack: str) -> str:
    rows = []
    for row in comparison.rows:
        numbers = row.attacks.get(attack)
        cells = {"": comparison.names[row.label], "Seeds": str(0 if numbers is None else len(numbers.seeds))}
        for metric in METRICS:
            shown = _cell(getattr(numbers, metric, None), ratio if metric == "nsd" else percent)
            bold = numbers is not None and comparison.is_bold(row.label, attack, metric)
            cells[METRIC_TITLES[metric]] = Markdown(f"**{shown}**") if bold else shown
        if comparison.baseline is not None:
            cells["ρ"] = "–" if numbers is None or numbers.rho is None else f"{numbers.rho:+.2f}"
        rows.append(cells)
    return markdown_table(rows)


def _cost_table(comparison: Comparison) -> str:
    priced = any(row.price is not None for row in comparison.rows)
    rows = []
    for row in comparison.rows:
        cells = {"": comparison.names[row.label], "Seeds": str(len(row.seeds))}
        if priced:
            cells["Price"] = "–" if row.price is None else f"{row.price:.2f}"
        cells["Training, seconds"] = _cell(row.seconds, lambda seconds: f"{seconds:.1f}")
        cells["Peak memory, MiB"] = _cell(row.peak_memory_bytes, lambda size: f"{size / MEBIBYTE:.0f}")
        rows.append(cells)
    return markdown_table(rows)


def _cost_note(comparison: Comparison) -> str:
    note = (
        "Seconds are of updates, held-out validation and calibration, and hold only for runs alone on a machine: not "
        "for runs made with --jobs above 1, or beside other work. Memory is the most that the main process held up to "
        "the end of training: tensors on the accelerator or, on a CPU, the whole process with its libraries."
    )
    if any(row.price is not None for row in comparison.rows):
        note = (
            "Price is the number of passes over the network in training, validation and calibration, relative to the "
            "baseline's: a forward of one image counts 1, a gradient of the input 2, a training pass 3. "
        ) + note
    if len(comparison.environment["Device"]) > 1:
        note += " **Not the same hardware:** seconds and memory of these rows cannot be compared (see Device above)."
    return note


def _fact_line(comparison: Comparison, title: str, values: Mapping[str, tuple[str, ...]]) -> str:
    """One fact; where the rows have several values, each with its rows."""
    if len(values) == 1:
        return f"- {markdown_text(title)}: {markdown_text(next(iter(values)), 400)}"
    names = comparison.names
    shown = [
        f"{markdown_text(value, 400)} ({', '.join(markdown_text(names[label]) for label in labels)})"
        for value, labels in values.items()
    ]
    return f"- {markdown_text(title)}: {'; '.join(shown)}"


def _harmless(value: str) -> str:
    value = plain_text(value, 200)
    return f"'{value}" if value[0] in "=+-@" else value


def _cell(spread: Spread | None, digits: Callable[[float], str]) -> str:
    if spread is None:
        return "–"
    return digits(spread.mean) if spread.std is None else f"{digits(spread.mean)} ± {digits(spread.std)}"
