"""Write report.html of finished folders: one self-contained page that shows which class fails and why.

One folder gives the page of a run, several give one page that also compares them, image by image where they kept
their predictions. Everything comes from the files in the folders: report.json, predictions.parquet and
examples.parquet, where they exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ham_hf.invocation import command_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write a page from the command line ``argv`` (None: the process's)."""
    parser = command_parser("page", __doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folder with report.json; LABEL=FOLDER says what to call it"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the page goes; default: report.html in the only FOLDER"
    )
    parser.add_argument("--baseline", metavar="LABEL", help="what several are compared with; default: the first")
    parser.add_argument(
        "--no_images", action="store_true", help="leave the images of the dataset out, to show the page to others"
    )
    options = parser.parse_args(argv)
    output, number = options.output, len(options.folders)
    if output is None and number > 1:
        parser.error(f"{number} folders make one page: name it with --output FILE")
    if output is not None and output.is_dir():
        parser.error(f"--output {output} is a folder; name a file, such as {output / 'report.html'}")
    if output is not None and not output.parent.is_dir():
        parser.error(f"--output {output}: there is no folder {output.parent}; make it first")
    # Only now: torch and pyarrow take seconds to import, and --help needs none of them.
    from ham_hf.comparison_run import run_page

    run_page(options)
