"""Write report.html of finished folders: one self-contained page on which a person sees which class fails and why.

One folder gives the page of a run, several give one page that also compares them, image by image where they kept
their predictions. Everything is made of the files in the folders: report.json, predictions.parquet and
examples.parquet, as far as they are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ham_hf.comparison.existing import label_runs, read_runs, split_label
from ham_hf.comparison.pairs import PAIRED_METRICS, verdicts_beside
from ham_hf.comparison.table import Comparison, Row, compare
from ham_hf.faults import clean_exit
from ham_hf.files import atomic_write
from ham_hf.invocation import program
from ham_hf.reporting.class_examples import read_examples
from ham_hf.reporting.formats import plain_text
from ham_hf.reporting.page import PAGE_NAME, PageRun, page_html, rounded
from ham_hf.reporting.report import read_report
from ham_hf.terminal import show


def main(argv: Sequence[str] | None = None) -> None:
    """Write a page from the command line ``argv`` (None: the process's)."""
    parser = argparse.ArgumentParser(
        prog=program("page"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folder with report.json; LABEL=FOLDER says what to call it"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"where the page goes; default: {PAGE_NAME} in the only FOLDER"
    )
    parser.add_argument("--baseline", metavar="LABEL", help="what several are compared with; default: the first")
    parser.add_argument(
        "--no_images", action="store_true", help="leave the images of the dataset out, as to show the page to others"
    )
    options = parser.parse_args(argv)
    with clean_exit(ValueError, OSError):
        path = _write(options.folders, options.output, baseline=options.baseline, images=not options.no_images)
    show(f"wrote {path}\n")


def _write(sources: Sequence[str], output: Path | None, *, baseline: str | None, images: bool) -> Path:
    folders = [Path(split_label(source)[1]) for source in sources]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder with report.json, the output folder of a run")
    if output is None and len(folders) > 1:
        raise ValueError(f"{len(folders)} folders make one page: name it with --output FILE")
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file, such as {output / PAGE_NAME}")
    path = output or folders[0] / PAGE_NAME
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}; make it first")
    if len(folders) == 1 and (folders[0] / "report.json").is_file():
        atomic_write(path, page_html([_single(folders[0], split_label(sources[0])[0], images=images)]))
        return path
    existing = read_runs(sources, _no_download)
    runs = label_runs(existing.found)
    if not runs:
        raise ValueError(f"there is no finished run in {', '.join(map(str, folders))}")
    comparison = compare(runs, baseline=baseline or existing.baseline or runs[0].label, missing=existing.missing)
    names = comparison.names
    pages = [
        PageRun(
            label=f"{names[run.label]}, seed {run.seed}",
            report=run.report,
            verdicts=run.verdicts,
            examples=read_examples(run.source) if images else None,
        )
        for run in runs
    ]
    atomic_write(path, page_html(pages, page_comparison(comparison)))
    return path


def _single(folder: Path, label: str | None, *, images: bool) -> PageRun:
    report = read_report(folder)
    return PageRun(
        label=plain_text(label or Path(report.model.name).name),
        report=report,
        verdicts=verdicts_beside(folder),
        examples=read_examples(folder) if images else None,
    )


def _no_download(source: str, revision: str | None) -> Path:
    raise ValueError(f"{source}: there is no such folder; a page is made of folders, so download the model first")


def page_comparison(comparison: Comparison) -> dict[str, object]:
    """A comparison as the page shows it: the evaluations that are of the same images under the same attack."""
    return {
        "baseline": plain_text(comparison.names.get(comparison.baseline or "", ""), 120),
        "rows": {
            title: [_row(comparison, row, name) for row in comparison.rows if name in row.attacks]
            for name, title in comparison.attacks.items()
            if name in comparison.comparable
        },
    }


def _row(comparison: Comparison, row: Row, name: str) -> dict[str, object]:
    found, paired = row.attacks[name], comparison.pairs.found.get(row.label, {}).get(name)
    differences = {} if paired is None else {one: getattr(paired.differences, one) for one in PAIRED_METRICS}
    unpaired = comparison.pairs.unpaired
    note = unpaired.get(f"{row.label}, {comparison.attacks[name]}") or unpaired.get(row.label)
    return {
        "label": plain_text(comparison.names[row.label], 120),
        "seeds": found.seeds,
        "values": {metric: rounded(getattr(found, metric).values) for metric in PAIRED_METRICS},
        "differences": {metric: rounded([one.mean, one.low, one.high]) for metric, one in differences.items()},
        "note": plain_text(note, 300) if note else "",
    }
