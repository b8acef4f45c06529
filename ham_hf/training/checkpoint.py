"""Checkpoints: everything a run needs to continue, written under a temporary name and renamed when complete.

A checkpoint is a folder ``checkpoint-{step}`` with ``model.safetensors`` (and ``averaged.safetensors``),
``method.safetensors`` (class state of the training method), ``optimizer.pt``, ``trainer_state.json``, after the first
validation ``best.safetensors`` (the selected weights of that moment), and last ``SHA256SUMS``. It holds no random
state: every random stream is derived from its place in the run (`ham_hf.seeding`). Loading executes no code.

Checksums tell a damaged checkpoint: the latest whole one is resumed, a damaged one never. Checkpoints share no file.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ham_hf.artifacts import BEST_NAME, WEIGHTS_NAME
from ham_hf.files import DamagedError, check_checksums, flush, replacing, write_checksums

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
ABANDONED = ".abandoned"
REPLACED = ".old"
PART = ".part"
AVERAGED = "averaged.safetensors"
METHOD = "method.safetensors"
OPTIMIZER = "optimizer.pt"
BEST = "best.safetensors"
STATE_FILE = "trainer_state.json"
REQUIRED = (WEIGHTS_NAME, METHOD, OPTIMIZER, STATE_FILE)


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are as they were, and nothing of it is left."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """Contents of one checkpoint.

    Attributes:
        model: state dict of the unwrapped pixel model.
        averaged: state dict of the average of its weights, or None.
        method: class state of the training method, by name; may be empty.
        optimizer: state dict of the optimizer.
        state: the trainer's counters and history; JSON types only.
    """

    model: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors, contiguous and on the CPU, and flush it to the disk; OSError if it cannot."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    flush(path)


def _save_optimizer(path: Path, state: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as target:
            torch.save(state, target)
    except RuntimeError as error:
        # torch raises its own error over that of a full disk, and hides the reason.
        raise error.__context__ or error from None


def save_checkpoint(
    output_dir: Path,
    checkpoint: Checkpoint,
    *,
    keep: int | None,
    selected: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
) -> Path:
    """Write ``checkpoint-{step}``, complete or not at all; call it on the main process only.

    Older checkpoints beyond the ``keep`` newest (None: none of them) are removed afterwards, and only if the new one
    reads back as it was written. The selected weights of the moment go with it, so that a run resumed from it
    publishes weights of its own past only. What is ``selected`` and not yet on the disk, as `save_best` takes it, is
    written first.

    Raises:
        CheckpointWriteError: if the disk does not take it, with the space it needs.
    """
    final = output_dir / f"checkpoint-{checkpoint.state['step']}"
    part = _part_of(final)
    best = output_dir / BEST_NAME / WEIGHTS_NAME
    try:
        if selected is not None:
            save_best(output_dir, *selected)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_weights(part / WEIGHTS_NAME, checkpoint.model)
        if checkpoint.averaged is not None:
            save_weights(part / AVERAGED, checkpoint.averaged)
        save_weights(part / METHOD, checkpoint.method)
        _save_optimizer(part / OPTIMIZER, checkpoint.optimizer)
        if best.is_file():
            shutil.copyfile(best, part / BEST)
        (part / STATE_FILE).write_text(json.dumps(checkpoint.state, indent=1, allow_nan=False))
        write_checksums(part)
        check_checkpoint(part)
        replace_folder(part, final)
    except (OSError, DamagedError) as error:
        # Half a checkpoint would only keep the disk full.
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointWriteError(
            f"{final} could not be written: {error} ({space_needed(checkpoint, output_dir)})"
        ) from error
    for old in list_checkpoints(output_dir)[:-keep] if keep else []:
        if old != final:
            _remove(old)
    return final


def _part_of(checkpoint: Path) -> Path:
    """The name of a checkpoint that is being written or deleted."""
    return checkpoint.with_name(f".{checkpoint.name}{PART}")


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, as half of it would look like a damaged one."""
    part = _part_of(checkpoint)
    try:
        checkpoint.rename(part)
        shutil.rmtree(part)
    except OSError as error:
        logger.warning("%s is not needed any more and could not be removed: %s", checkpoint, error)


def space_needed(checkpoint: Checkpoint, output_dir: Path) -> str:
    """How much space a checkpoint needs, without headers, and how much there is, in words."""
    # The selected weights go with it: as large as the weights, wherever they are now.
    parts = [checkpoint.model, checkpoint.model, checkpoint.averaged, checkpoint.method, checkpoint.optimizer]
    size = sum(leaf.nbytes for leaf in tree_leaves(parts) if isinstance(leaf, Tensor))
    needed = f"it needs about {size / 1e6:.1f} MB"
    try:
        return f"{needed}, and {shutil.disk_usage(output_dir).free / 1e6:.1f} MB are free there"
    except OSError:
        return f"{needed}, and the folder is gone"


def rewind(output_dir: Path, checkpoint: Path) -> None:
    """Bring the output folder to the moment of ``checkpoint``; call it on the main process only.

    Its selected weights become those of the run. Checkpoints of later updates are renamed to
    ``checkpoint-{step}.abandoned``: they must not count as the newest.
    """
    step = step_of(checkpoint)
    for number, later in _numbered(output_dir):
        if number > step:
            aside = later.with_name(f"{later.name}{ABANDONED}")
            logger.warning("%s is later than the checkpoint to resume from; putting it aside as %s", later, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
    best = output_dir / BEST_NAME / WEIGHTS_NAME
    saved = checkpoint / BEST
    if saved.is_file():
        best.parent.mkdir(parents=True, exist_ok=True)
        with replacing(best) as part:
            shutil.copyfile(saved, part)
    else:
        best.unlink(missing_ok=True)


def step_of(checkpoint: Path) -> int:
    """Number of updates that a checkpoint folder was written after."""
    step: int = json.loads((checkpoint / STATE_FILE).read_text())["step"]
    return step


def replace_folder(part: Path, final: Path) -> None:
    """Flush the files of ``part`` to the disk and rename the folder to ``final``, which it replaces."""
    for path in (*part.rglob("*"), part):
        flush(path)
    aside = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        # A folder cannot be renamed over a folder with content.
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    part.rename(final)
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(output_dir: Path) -> None:
    """Clean up after a run that was killed while it saved; call it on the main process.

    A checkpoint that was being replaced comes back; half a checkpoint, written or deleted, is removed.
    """
    for path in output_dir.iterdir() if output_dir.is_dir() else []:
        final = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED).removesuffix(PART))
        if not (path.name.startswith(".") and CHECKPOINT_NAME.fullmatch(final.name)):
            continue
        if path.name.endswith(REPLACED) and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """Everything with the name of a checkpoint, by number of updates."""
    found = output_dir.iterdir() if output_dir.is_dir() else []
    return sorted((int(match[1]), path) for path in found if (match := CHECKPOINT_NAME.fullmatch(path.name)))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; their checksums are not verified."""
    return [path for _, path in _numbered(output_dir) if (path / STATE_FILE).is_file()]


def check_checkpoint(path: Path) -> None:
    """Compare a checkpoint with its checksums; DamagedError with file and reason if they differ."""
    check_checksums(path, (*REQUIRED, *(name for name in (AVERAGED, BEST) if (path / name).exists())))


def check_resume_name(output_dir: Path, resume_from: str) -> None:
    """Refuse, naming the checkpoints there are, one to resume from that is neither "latest" nor a folder."""
    if resume_from != "latest" and not Path(resume_from).is_dir():
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: there is no such folder; expected latest or the folder of a "
            f"checkpoint, and those in {output_dir} are: {_known(output_dir)}"
        )


def _known(output_dir: Path) -> str:
    return ", ".join(str(found) for found in list_checkpoints(output_dir)) or "none"


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` names: a folder, or "latest" for the newest that is whole.

    Returns:
        Its folder; None for "latest" if the run has none yet (so that the same command starts and resumes a run).

    Raises:
        ValueError: if a path was given that holds no whole checkpoint, or no checkpoint of the run is whole.
    """
    if resume_from == "latest":
        damaged = []
        for _, path in reversed(_numbered(output_dir)):
            try:
                check_checkpoint(path)
            except DamagedError as error:  # noqa: PERF203 (each checkpoint on its own)
                damaged.append(f"{path.name}: {error}")
            else:
                for reason in damaged:
                    logger.warning("%s is damaged (%s); continuing from %s", *reason.split(": ", 1), path.name)
                return path
        if damaged:
            raise ValueError(
                f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is whole ({'; '.join(damaged)}); "
                "bring one back, or start from the beginning with --overwrite_output_dir instead"
            )
        return None
    check_resume_name(output_dir, resume_from)
    path = Path(resume_from)
    try:
        check_checkpoint(path)
    except DamagedError as error:
        where = path if list_checkpoints(path) else output_dir
        raise ValueError(
            f"--resume_from_checkpoint {resume_from} holds no complete checkpoint, or a damaged one ({error}); "
            f"checkpoints in {where}: {_known(where)}; --resume_from_checkpoint latest takes the newest "
            "that is whole"
        ) from error
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder to the CPU.

    Raises:
        ValueError: if the state of the optimizer is not made of tensors and plain values; nothing of it is executed.
    """
    averaged = path / AVERAGED
    try:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message recommends to execute what is in the file.
        raise ValueError(
            f"{path / OPTIMIZER} holds something other than tensors and plain values, which is never loaded: it could "
            "be code. Resume from another checkpoint"
        ) from None
    return Checkpoint(
        model=load_file(path / WEIGHTS_NAME),
        averaged=load_file(averaged) if averaged.is_file() else None,
        method=load_file(path / METHOD),
        optimizer=optimizer,
        state=json.loads((path / STATE_FILE).read_text()),
    )


def save_best(output_dir: Path, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write the selected weights as ``checkpoint-best/model.safetensors``, with the state in the file's header."""
    final = output_dir / BEST_NAME / WEIGHTS_NAME
    final.parent.mkdir(parents=True, exist_ok=True)
    with replacing(final) as part:
        save_weights(part, weights, {"state": json.dumps(dict(state), allow_nan=False)})
    return final


def has_best(output_dir: Path) -> bool:
    """Whether the selected weights of a run are on the disk."""
    return (output_dir / BEST_NAME / WEIGHTS_NAME).is_file()


def load_best(output_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The selected weights of a run and the state they were selected with."""
    path = output_dir / BEST_NAME / WEIGHTS_NAME
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return load_file(path), state
