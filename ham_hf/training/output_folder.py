"""What is in an output folder, who may write there, and what a new run removes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from ham_hf.evaluation.partial_results import PARTIAL_RESULTS
from ham_hf.evaluation.verdicts import PREDICTIONS_NAME
from ham_hf.training.checkpoint import ABANDONED, BEST_NAME, CHECKPOINT_NAME, WEIGHTS, list_checkpoints
from ham_hf.training.run_lock import LOCK_NAME, OWNER_NAME

logger = logging.getLogger(__name__)

PAGE = ("report.html", "examples.parquet")
OWNED_BY_TRAINING = (
    WEIGHTS,
    "config.json",
    "README.md",
    "report.json",
    PREDICTIONS_NAME,
    *PAGE,
    "train_config.yaml",
    "metrics.jsonl",
    "figures",
    "rgb",
    "logs",
    BEST_NAME,
    PARTIAL_RESULTS,
)
"""What a training run writes into its output folder beside numbered checkpoints."""
OWNED_BY_CALIBRATION = (WEIGHTS, "config.json", "rgb", "README.md", "report.json", PREDICTIONS_NAME, *PAGE, "figures")
OWNED_BY_EVALUATION = ("report.json", PREDICTIONS_NAME, *PAGE, "EVALUATION.md", "figures")


def check_output_dir(output_dir: Path, *, overwrite: bool, resume_from: str | None = None) -> None:
    """Refuse an output folder that holds what a training run would overwrite; nothing is written.

    Args:
        output_dir: output folder of the run.
        overwrite: whether everything in it may go.
        resume_from: "latest", the path of a checkpoint folder, or None for a new run.

    Raises:
        ValueError: if the path is a file; if the folder holds anything and this is neither to be replaced nor the run
            that is resumed.
    """
    if not _is_occupied(output_dir) or overwrite:
        return
    if resume_from is None:
        raise ValueError(
            f"--output_dir {output_dir} already holds files; name another folder, replace what is in it with "
            "--overwrite_output_dir, or continue a training run with --resume_from_checkpoint latest"
        )
    if resume_from != "latest" and Path(resume_from).resolve().parent != output_dir.resolve():
        raise ValueError(
            f"--output_dir {output_dir} already holds files, which are not those of the run of {resume_from}: name an "
            "empty folder, or continue the run in it with --resume_from_checkpoint latest"
        )
    finished = [name for name in (WEIGHTS, "report.json") if (output_dir / name).exists()]
    if finished and not list_checkpoints(output_dir):
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {output_dir} holds {' and '.join(finished)}, and no checkpoint "
            "to go on from; name another --output_dir, or replace what is in it with --overwrite_output_dir instead"
        )


def check_evaluation_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Refuse an output folder for an evaluation that holds something, or a model, which is never overwritten.

    What an evaluation left that was interrupted is not refused: the same command goes on with it.

    Raises:
        ValueError: if the path is a file, or the folder holds a model, a training run, or anything that is not to be
            replaced.
    """
    if any((output_dir / name).exists() for name in (WEIGHTS, "train_config.yaml", BEST_NAME)):
        raise ValueError(f"--output_dir {output_dir} holds a model; an evaluation needs a folder of its own")
    # Partial results are removed last: beside them, the rest is what was being written.
    unfinished = (output_dir / PARTIAL_RESULTS).exists()
    ours = (PARTIAL_RESULTS, *OWNED_BY_EVALUATION) if unfinished else ()
    if _is_occupied(output_dir, besides=ours) and not overwrite:
        raise ValueError(
            f"--output_dir {output_dir} already holds files; name another folder, or replace what an evaluation left "
            "in it with --overwrite_output_dir"
        )


def check_calibration_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Refuse an output folder for a calibrated model that holds something, or a training run, which is never replaced.

    What a calibration left that was interrupted is not refused: the same command goes on with it.

    Raises:
        ValueError: if the path is a file, or the folder holds a training run, or anything that is not to be replaced.
    """
    if any((output_dir / name).exists() for name in ("train_config.yaml", BEST_NAME)):
        raise ValueError(
            f"--output_dir {output_dir} holds a training run; a calibrated model needs a folder of its own"
        )
    unfinished = (output_dir / PARTIAL_RESULTS).exists()
    ours = (PARTIAL_RESULTS, *OWNED_BY_CALIBRATION) if unfinished else ()
    if _is_occupied(output_dir, besides=ours) and not overwrite:
        raise ValueError(
            f"--output_dir {output_dir} already holds files; name another folder, or replace what a calibration left "
            "in it with --overwrite_output_dir"
        )


def _is_occupied(output_dir: Path, besides: Collection[str] = ()) -> bool:
    """Whether a folder holds anything, ``besides`` aside; a file in its place is refused."""
    if not output_dir.exists():
        return False
    if not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; name a folder")
    # A run that was killed before it wrote anything leaves only its lock.
    return any(path.name not in (LOCK_NAME, OWNER_NAME, *besides) for path in output_dir.iterdir())


def clear_output_dir(output_dir: Path, owned: Collection[str]) -> None:
    """Make the output folder and remove what an earlier run wrote into it: a mistyped folder keeps its own files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in output_dir.iterdir():
        numbered = CHECKPOINT_NAME.fullmatch(path.name.removesuffix(ABANDONED)) or path.name.startswith(".checkpoint-")
        if path.name in owned or (WEIGHTS in owned and numbered):
            logger.info("removing %s", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
