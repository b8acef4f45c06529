"""Compare training methods: run methods x seeds, or take runs that exist, and write one table.

    ham-hf compare --config digits/compare
    ham-hf compare ham=outputs/a pgd=outputs/b me/robust-cifar10 --output_dir outputs/compared
    ham-hf compare --models models.txt --page --output_dir outputs/leaderboard
    ham-hf compare --help

Writes comparison.md, comparison.csv, comparison.json, comparison_tradeoff.png and comparison_per_class.png, and with
--page leaderboard.html. Called again after an interruption, it continues where it was: finished runs stay, unfinished
ones resume from their checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ham_hf.invocation import command_parser, find_recipe
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
    if problem := _problem(options):
        parser.error(problem)
    # Only now: torch takes seconds to import, and --help needs none of it.
    from ham_hf.comparison_run import run_comparison

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    run_comparison(options, argv)


def _problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the flags, if anything: some go with a plan, others with runs that exist."""
    exist = options.runs or options.models
    if options.config is not None:
        if exist:
            return "--config and runs that exist exclude each other: compare the folders in a second call"
        return f"--jobs {options.jobs}: expected at least 1" if options.jobs is not None and options.jobs < 1 else None
    if not exist or options.output_dir is None:
        return "expected --config COMPARE.yaml, or runs that exist (or --models FILE) and --output_dir"
    for flag in ("seeds", "only", "jobs", "launch_args", "dry_run"):
        given = getattr(options, flag)
        if given is not None and given is not False:
            return f"--{flag} goes with --config: runs that exist are not run"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("compare", __doc__, allow_abbrev=True)
    parser.add_argument("runs", nargs="*", help="folders with report.json, or Hub ids; LABEL=RUN names the row")
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FILE",
        help="a list of Hub ids or folders, one a line, as text or YAML; what cannot be loaded is listed as missing",
    )
    parser.add_argument("--page", action="store_true", help="write leaderboard.html, a sortable page")
    parser.add_argument(
        "--config",
        type=find_recipe,
        metavar="COMPARE.yaml",
        help="what to run: a file as in ham_hf/comparison/plan.py, or the name of one that comes with the package",
    )
    parser.add_argument("--output_dir", help="where the runs and the comparison go; wins over the file")
    parser.add_argument("--baseline", metavar="LABEL", help="row that rho is relative to; wins over the file")
    finished = "the table has all that is finished"
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help=f"run only these, the file's or others; {finished}"
    )
    parser.add_argument("--only", nargs="+", metavar="LABEL", help=f"run only these rows; {finished}")
    parser.add_argument("--jobs", type=int, help="runs at a time (default 1); above 1, seconds are not comparable")
    parser.add_argument(
        "--launch_args",
        metavar="WORDS",
        help='words for accelerate launch, as --launch_args="--multi_gpu --num_processes 2"; default: plain python',
    )
    parser.add_argument("--dry_run", action="store_true", help="only print the commands of unfinished runs")
    return parser
