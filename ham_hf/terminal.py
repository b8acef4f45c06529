"""Terminal output: text with characters that the terminal may lack, logging, and progress bars."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings

logger = logging.getLogger(__name__)


def replace_what_cannot_be_shown() -> None:
    """Make both standard streams replace characters that their encoding lacks, such as those of class names.

    By default standard output raises an error at the first of them.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def show(text: str) -> None:
    """Print text on standard output; if that fails (a closed pipe, a full disk), warn and continue.

    The text is in files too, and the next steps, such as a push, matter more.
    """
    if sys.stdout is None:  # a process without a console
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        logger.warning("standard output takes no text (%s); nothing else is lost", error)
        _discard_output()


SAID_BY_EACH_PROCESS = ("ham_hf.data.streaming", "ham_hf.evaluation.batch_sharing")
"""Modules whose warnings concern the rows of one process; those of the others are the same on every process."""


def set_up_logging(rank: int) -> None:
    """Log to standard error: all our messages on the main process, elsewhere only those that the main one lacks.

    Characters that standard output or error cannot show are replaced from here on. ``rank`` is the process's number.
    """
    replace_what_cannot_be_shown()
    who = "%(name)s" if rank == 0 else f"%(name)s [process {rank}]"
    # It has a handler of its own: everything would be said twice.
    logging.getLogger("huggingface_hub").propagate = False
    logging.basicConfig(
        level=logging.WARNING if rank == 0 else logging.ERROR,
        format=f"%(levelname)s {who}: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("ham_hf").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if rank:
        for name in SAID_BY_EACH_PROCESS:
            logging.getLogger(name).setLevel(logging.WARNING)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        hide_progress_bars()


def hide_progress_bars() -> None:
    """Turn off the progress bars of datasets, of huggingface_hub, and of timm and others that download through it."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    datasets.disable_progress_bars()
    disable_progress_bars()


def _discard_output() -> None:
    """Discard further standard output; else Python reports the same error again at exit."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)


def printable(text: str) -> str:
    """Replace terminal commands and characters that reverse text by "?", as text may hold untrusted names."""
    return "".join(character if character in "\n\t" or character.isprintable() else "?" for character in text)
