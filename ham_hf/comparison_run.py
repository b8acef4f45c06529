"""A comparison, and a page of finished runs, from their command lines.

`run_comparison` runs what is not done, or reads existing runs, and writes tables and figures; `run_page` writes
report.html.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ham_hf.artifacts import PAGE_NAME, REPORT_NAME
from ham_hf.comparison.execution import Launcher, collect, execute, survey
from ham_hf.comparison.existing import label_runs, read_list, read_runs, split_label
from ham_hf.comparison.figures import save_comparison_figures
from ham_hf.comparison.leaderboard import write_leaderboard
from ham_hf.comparison.pairs import PAIRED_METRICS, FinishedRun
from ham_hf.comparison.plan import read_plan
from ham_hf.comparison.report import without_figures, write_comparison
from ham_hf.comparison.table import Comparison, MissingRun, Row, compare
from ham_hf.faults import clean_exit, explain_interrupt
from ham_hf.files import atomic_write
from ham_hf.hub import download_results
from ham_hf.invocation import command
from ham_hf.reporting.class_examples import read_examples
from ham_hf.reporting.formats import plain_text, public_word
from ham_hf.reporting.page import PageRun, page_html, rounded
from ham_hf.terminal import show
from ham_hf.training.run_folder import make_folder

TRAIN = ("-m", "ham_hf", "train")
"""Words after the interpreter, or the launcher, that train."""


def run_comparison(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run or read what ``options`` ask for, and write the comparison; ``argv`` is what was typed.

    Raises:
        SystemExit: status 2 if the plan is rejected, 1 if a run failed, 130 after Ctrl-C.
    """
    with clean_exit(ValueError, OSError):
        if options.config is not None:
            runs, missing, baseline, folder = _run_plan(options)
        else:
            runs, missing, baseline, folder = _read_existing(options)
        if options.dry_run:
            return
        make_folder(folder)
        comparison = compare(runs, baseline=options.baseline or baseline, missing=missing)
        figures = save_comparison_figures(comparison, folder)
        words = f"{command('compare')} {shlex.join(map(public_word, argv))}"
        jobs = None if options.config is None else options.jobs or 1
        written = write_comparison(comparison, folder, command=words, figures=figures, jobs=jobs)
        if options.page:
            written.append(write_leaderboard(comparison, folder, command=words))
    show("".join(f"{sentence}\n" for sentence in without_figures(comparison)))
    show("".join(f"wrote {path}\n" for path in (*written, *figures)))
    failed = [run for run in missing if run.state == "failed"]
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(runs) + len(missing)} runs failed, see comparison.md; try again\n")
        raise SystemExit(1)


def _run_plan(options: argparse.Namespace) -> tuple[list[FinishedRun], list[MissingRun], str | None, Path]:
    jobs = options.jobs or 1
    plan = read_plan(options.config, output_dir=options.output_dir, seeds=options.seeds)
    for flag, labels in (("--only", options.only or ()), ("--baseline", filter(None, [options.baseline]))):
        for label in labels:
            if label not in plan.labels:
                raise ValueError(f"{flag} {label}: expected a label of {options.config}: {', '.join(plan.labels)}")
    chosen = [
        run
        for run in plan.runs
        if run.label in (options.only or plan.labels) and (options.seeds is None or run.seed in options.seeds)
    ]
    for label in options.only or ():
        if not any(run.label == label for run in chosen):
            known = ", ".join(str(run.seed) for run in plan.runs if run.label == label)
            raise ValueError(
                f"--only {label}: it has the seeds {known} in {options.config}, and --seeds asks for others"
            )
    done, waiting, unusable = survey(plan.runs, chosen)
    launcher = _launcher(options, jobs)
    if options.dry_run:
        show("".join(f"{shlex.join(launcher.words(run))}\n" for run in waiting))
        return [], [], plan.baseline, plan.output_dir
    show(f"{len(plan.runs)} runs: {len(done)} done already, {len(waiting)} to go\n")
    with explain_interrupt("the same command resumes each run from its last checkpoint"):
        failed = unusable + execute(waiting, launcher, jobs=jobs, announce=lambda line: show(f"{line}\n"))
    runs, missing = collect(plan.runs, failed)
    if not runs and any(run.state == "failed" for run in failed):
        sys.stderr.write("every run failed: there is nothing to compare\n")
        raise SystemExit(1)
    return runs, missing, plan.baseline, plan.output_dir


def _read_existing(options: argparse.Namespace) -> tuple[list[FinishedRun], list[MissingRun], str | None, Path]:
    listed = [] if options.models is None else read_list(options.models)
    existing = read_runs([*options.runs, *listed], download_results, listed=listed)
    runs, missing = label_runs(existing.found), list(existing.missing)
    if not runs:
        raise ValueError("\n".join(["there is no finished run to compare", *(run.reason for run in missing)]))
    labels = {run.label for run in runs} | {run.label for run in missing}
    baseline = existing.baseline if existing.baseline in labels else None
    return runs, missing, baseline, Path(options.output_dir)


def _launcher(options: argparse.Namespace, jobs: int) -> Launcher:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    started_by = [sys.executable]
    if options.launch_args is not None:
        started_by += ["-m", "accelerate.commands.launch", *shlex.split(options.launch_args)]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    return Launcher(command=(*started_by, *TRAIN), environment={**threads, **os.environ})


def run_page(options: argparse.Namespace) -> None:
    """Write the page that ``options`` ask for.

    Raises:
        SystemExit: status 2 if there is nothing to make it of.
    """
    with clean_exit(ValueError, OSError):
        path = _write_page(options.folders, options.output, baseline=options.baseline, images=not options.no_images)
    show(f"wrote {path}\n")


def _write_page(sources: Sequence[str], output: Path | None, *, baseline: str | None, images: bool) -> Path:
    folders = [Path(split_label(source)[1]) for source in sources]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder with report.json, the output folder of a run")
    is_alone = len(folders) == 1 and (folders[0] / REPORT_NAME).is_file()
    if is_alone and baseline is not None:
        raise ValueError(f"--baseline {baseline}: one run is not compared with any other")
    path = output or folders[0] / PAGE_NAME
    existing = read_runs(sources, download_results)
    runs = label_runs(existing.found)
    if not runs:
        reasons = [run.reason for run in existing.missing]
        raise ValueError("\n".join([f"there is no finished run in {', '.join(map(str, folders))}", *reasons]))
    if is_alone:
        label = split_label(sources[0])[0]
        labels, shown = [plain_text(label) if label else ""], None
    else:
        found = existing.baseline if existing.baseline in {run.label for run in runs} else None
        comparison = compare(runs, baseline=baseline or found or runs[0].label, missing=existing.missing)
        labels = [f"{comparison.names[run.label]}, seed {run.seed}" for run in runs]
        shown = _page_comparison(comparison)
    pages = [
        PageRun(
            label=label,
            report=run.report,
            verdicts=run.verdicts,
            examples=read_examples(run.source) if images else None,
        )
        for label, run in zip(labels, runs, strict=True)
    ]
    atomic_write(path, page_html(pages, shown))
    return path


def _page_comparison(comparison: Comparison) -> dict[str, object]:
    """A comparison as the page shows it: of each evaluation the rows of the same images under the same attack."""
    found = comparison.pairs.found
    rows = {
        title: [
            _page_row(comparison, row, name)
            for row in comparison.rows
            if row.label in comparison.alike[name] or name in found.get(row.label, {})
        ]
        for name, title in comparison.attacks.items()
    }
    return {
        "baseline": plain_text(comparison.names.get(comparison.baseline or "", ""), 120),
        "rows": {title: shown for title, shown in rows.items() if shown},
    }


def _page_row(comparison: Comparison, row: Row, name: str) -> dict[str, object]:
    found, paired = row.attacks[name], comparison.pairs.found.get(row.label, {}).get(name)
    differences = {} if paired is None else {one: getattr(paired.differences, one) for one in PAIRED_METRICS}
    note = comparison.pairs.reason(row.label, comparison.attacks[name])
    if paired is not None:
        note = f"on {paired.differences.num_examples:,} images"
    return {
        "label": plain_text(comparison.names[row.label], 120),
        "seeds": found.seeds,
        "values": {metric: rounded(getattr(found, metric).values) for metric in PAIRED_METRICS},
        "differences": {metric: rounded([one.mean, one.low, one.high]) for metric, one in differences.items()},
        "note": plain_text(note, 300) if note else "",
    }
