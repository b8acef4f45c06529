"""Compare training methods: run methods x seeds, or take runs that exist, and write one table.

    ham-hf compare --config digits/compare
    ham-hf compare ham=outputs/a pgd=outputs/b me/robust-cifar10 --output_dir outputs/compared
    ham-hf compare --models models.txt --page --output_dir outputs/leaderboard
    ham-hf compare --help

Writes comparison.md, comparison.csv, comparison.json, comparison_tradeoff.png and comparison_per_class.png, and with
--page leaderboard.html. Called again after an interruption, it continues where it was: finished runs stay, unfinished
ones resume from their checkpoint.

Runs that exist are one row if their settings are equal but for the seed; a row is called LABEL if it is given as
LABEL=FOLDER or LABEL=OWNER/NAME, or if its runs lie in LABEL/seedN, else by its method. The folder of an earlier
comparison stands for all runs in it, with its order of rows and its baseline.

Where runs kept their predictions (predictions.parquet), rows are set against the baseline image by image, and a number
is bold if it is better for sure; runs of earlier versions are shown, and it is said that they could not be tested.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ham_hf.comparison.execution import Launcher, collect, execute, survey
from ham_hf.comparison.existing import label_runs, read_list, read_runs
from ham_hf.comparison.figures import save_comparison_figures
from ham_hf.comparison.leaderboard import write_leaderboard
from ham_hf.comparison.plan import read_plan
from ham_hf.comparison.report import without_figures, write_comparison
from ham_hf.comparison.row_names import public_word
from ham_hf.comparison.table import MissingRun, Run, compare
from ham_hf.faults import clean_exit
from ham_hf.hub import download_results
from ham_hf.invocation import command, program
from ham_hf.recipe_files import find_recipe
from ham_hf.terminal import replace_what_cannot_be_shown, show
from ham_hf.training.run_folder import make_folder

TRAIN = ("-m", "ham_hf", "train")
"""What follows the interpreter, or the launcher, to train."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make one comparison from the command line ``argv`` (None: the process's).

    Raises:
        SystemExit: status 2 if the plan is refused, 1 if a run failed, 130 after Ctrl-C.
    """
    replace_what_cannot_be_shown()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
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
    failed = [run for run in missing if run.failed]
    if failed:
        sys.stderr.write(
            f"{len(failed)} of {len(runs) + len(missing)} runs failed, see comparison.md; the same command tries them "
            "again\n"
        )
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("compare"),
        description=(__doc__ or "").replace("ham-hf compare", command("compare")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="*", help="runs that exist: folders with report.json, or Hub ids; LABEL=RUN names the row"
    )
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FILE",
        help="a list of Hub ids or folders, one a line, as text or YAML; what cannot be had is listed as missing",
    )
    parser.add_argument("--page", action="store_true", help="write leaderboard.html, a page to rank and to look")
    parser.add_argument(
        "--config",
        type=find_recipe,
        metavar="COMPARE.yaml",
        help="what to run, a file or the name of one that comes with the package; see ham_hf/comparison/plan.py",
    )
    parser.add_argument("--output_dir", help="where the runs and the comparison go; wins over the file")
    parser.add_argument("--baseline", metavar="LABEL", help="row that rho is relative to; wins over the file")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="run these only, of the file's or others; the table has all that is finished",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="LABEL", help="run these only; the table has all that is finished"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at a time (default 1); they share cores and accelerator, so that seconds above 1 compare nothing",
    )
    parser.add_argument(
        "--launch_args",
        metavar="WORDS",
        help='words for accelerate launch, as --launch_args="--multi_gpu --num_processes 2"; not given: plain python',
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the runs that are not done")
    return parser


def _run_plan(options: argparse.Namespace) -> tuple[list[Run], list[MissingRun], str | None, Path]:
    """Run what ``compare.yaml`` asks for and is not done yet."""
    if options.runs or options.models:
        raise ValueError("--config and runs that exist exclude each other: compare the folders in a second call")
    jobs = 1 if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: expected at least 1")
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
    done, waiting, unusable = survey(plan.runs, chosen)
    launcher = _launcher(options, jobs)
    if options.dry_run:
        show("".join(f"{shlex.join(launcher.words(run))}\n" for run in waiting))
        return [], [], plan.baseline, plan.output_dir
    _say(f"{len(plan.runs)} runs: {len(done)} done already, {len(waiting)} to go")
    try:
        failed = unusable + execute(waiting, launcher, jobs=jobs, announce=_say)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from the last checkpoint of each run\n")
        raise SystemExit(130) from None
    runs, missing = collect(plan.runs, failed)
    if not runs and any(run.failed for run in failed):
        sys.stderr.write("every run failed: there is nothing to compare\n")
        raise SystemExit(1)
    return runs, missing, plan.baseline, plan.output_dir


def _read_existing(options: argparse.Namespace) -> tuple[list[Run], list[MissingRun], str | None, Path]:
    """Take the runs that the command line names."""
    if not (options.runs or options.models) or options.output_dir is None:
        raise ValueError("expected --config COMPARE.yaml, or runs that exist (or --models FILE) and --output_dir")
    for flag in ("seeds", "only", "jobs", "launch_args", "dry_run"):
        if getattr(options, flag) not in (None, False):
            raise ValueError(f"--{flag} goes with --config: runs that exist are not run")
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
    return Launcher(
        command=(*started_by, *TRAIN),
        environment={"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ},
    )


def _say(line: str) -> None:
    show(f"{line}\n")
