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
import sys
from collections.abc import Sequence
from pathlib import Path

from ham_hf.invocation import command, find_recipe, program
from ham_hf.terminal import replace_what_cannot_be_shown


def main(argv: Sequence[str] | None = None) -> None:
    """Make one comparison from the command line ``argv`` (None: the process's).

    Raises:
        SystemExit: status 2 if the plan is refused, 1 if a run failed, 130 after Ctrl-C.
    """
    replace_what_cannot_be_shown()
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    options = parser.parse_args(argv)
    problem = _plan_problem(options) if options.config is not None else _existing_problem(options)
    if problem is not None:
        parser.error(problem)
    # Only now: torch takes seconds to import, and --help needs none of it.
    from ham_hf.comparison_run import run_comparison

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    run_comparison(options, argv)


def _plan_problem(options: argparse.Namespace) -> str | None:
    if options.runs or options.models:
        return "--config and runs that exist exclude each other: compare the folders in a second call"
    if options.jobs is not None and options.jobs < 1:
        return f"--jobs {options.jobs}: expected at least 1"
    return None


def _existing_problem(options: argparse.Namespace) -> str | None:
    if not (options.runs or options.models) or options.output_dir is None:
        return "expected --config COMPARE.yaml, or runs that exist (or --models FILE) and --output_dir"
    for flag in ("seeds", "only", "jobs", "launch_args", "dry_run"):
        if getattr(options, flag) not in (None, False):
            return f"--{flag} goes with --config: runs that exist are not run"
    return None


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
