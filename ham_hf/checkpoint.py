"""Checkpoints: everything a run needs to go on, written under another name and renamed when complete.

A checkpoint is a folder ``checkpoint-{step}`` with ``model.safetensors`` (and ``averaged.safetensors``),
``method.safetensors`` (class state of the training method), ``optimizer.pt``, ``trainer_state.json`` and, after the
first validation, ``best.safetensors``: the selected weights of that moment. No random state is in it: every random
stream is derived from its place in the run (`ham_hf.seeding`). Tensors are read back with ``weights_only=True``, so a
checkpoint cannot execute code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
BEST_NAME = "checkpoint-best"
ABANDONED = ".abandoned"
WEIGHTS = "model.safetensors"
AVERAGED = "averaged.safetensors"
METHOD = "method.safetensors"
STATE_FILE = "trainer_state.json"


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
    """Write a state dict as safetensors, contiguous and on the CPU, and flush it to the disk."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, metadata)
    flush(path)


def flush(path: Path) -> None:
    """Wait until the content of a file has reached the disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def save_checkpoint(output_dir: Path, checkpoint: Checkpoint, *, keep: int | None) -> Path:
    """Write ``checkpoint-{step}`` into ``output_dir``; call it on the main process only.

    The folder is complete or absent: it is written under a temporary name, flushed, and renamed. Older checkpoints
    beyond ``keep`` are removed afterwards, never before. The selected weights of the moment go with it, so that
    a run resumed from it publishes weights of its own past only.

    Args:
        output_dir: output folder of the run.
        checkpoint: what to write; ``state["step"]`` names it.
        keep: number of checkpoints to keep, the newest; None keeps all.
    """
    final = output_dir / f"checkpoint-{checkpoint.state['step']}"
    part = output_dir / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_weights(part / WEIGHTS, checkpoint.model)
    if checkpoint.averaged is not None:
        save_weights(part / AVERAGED, checkpoint.averaged)
    save_weights(part / METHOD, checkpoint.method)
    torch.save(checkpoint.optimizer, part / "optimizer.pt")
    best = output_dir / BEST_NAME / WEIGHTS
    if best.is_file():
        link_or_copy(best, part / "best.safetensors")
    (part / STATE_FILE).write_text(json.dumps(checkpoint.state, indent=1, allow_nan=False))
    replace_folder(part, final)
    for old in list_checkpoints(output_dir)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, or a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def rewind(output_dir: Path, checkpoint: Path) -> None:
    """Bring the output folder to the moment of ``checkpoint``; call it on the main process only.

    Its selected weights become those of the run. Checkpoints of later updates, which another continuation wrote,
    are put aside as ``checkpoint-{step}.abandoned``: they must not count as the newest.
    """
    for later in list_checkpoints(output_dir):
        if step_of(later) > step_of(checkpoint):
            aside = later.with_name(f"{later.name}{ABANDONED}")
            logger.warning("%s is later than the checkpoint to resume from; putting it aside as %s", later, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
    best = output_dir / BEST_NAME / WEIGHTS
    saved = checkpoint / "best.safetensors"
    if saved.is_file():
        best.parent.mkdir(parents=True, exist_ok=True)
        part = best.with_suffix(".part")
        part.unlink(missing_ok=True)
        link_or_copy(saved, part)
        os.replace(part, best)
    else:
        best.unlink(missing_ok=True)


def step_of(checkpoint: Path) -> int:
    """Number of updates that a checkpoint folder was written after."""
    step: int = json.loads((checkpoint / STATE_FILE).read_text())["step"]
    return step


def replace_folder(part: Path, final: Path) -> None:
    """Flush the files of ``part`` to the disk and rename the folder to ``final``, which it replaces."""
    for file in part.iterdir():
        flush(file)
    if final.exists():
        # A folder cannot be renamed over a folder with content; the old one steps aside first.
        aside = final.with_name(f".{final.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        part.rename(final)
        shutil.rmtree(aside)
    else:
        part.rename(final)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else [])
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` names.

    Args:
        output_dir: output folder of the run.
        resume_from: "latest" or the path of a checkpoint folder.

    Returns:
        Its folder; None for "latest" if the run has none yet (so that the same command starts and resumes a run).

    Raises:
        ValueError: if a path was given that holds no complete checkpoint.
    """
    if resume_from == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    path = Path(resume_from)
    if not (path / STATE_FILE).is_file():
        known = ", ".join(str(found) for found in list_checkpoints(output_dir)) or "none"
        raise ValueError(
            f"--resume_from_checkpoint {resume_from} holds no complete checkpoint ({STATE_FILE} is missing); "
            f"complete checkpoints in {output_dir}: {known}"
        )
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder to the CPU."""
    averaged = path / AVERAGED
    return Checkpoint(
        model=load_file(path / WEIGHTS),
        averaged=load_file(averaged) if averaged.is_file() else None,
        method=load_file(path / METHOD),
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        state=json.loads((path / STATE_FILE).read_text()),
    )


def save_best(output_dir: Path, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write the selected weights as ``checkpoint-best/model.safetensors``, with the state in the file's header.

    One file, so that one rename replaces weights and state together.
    """
    final = output_dir / BEST_NAME / WEIGHTS
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_suffix(".part")
    save_weights(part, weights, {"state": json.dumps(dict(state), allow_nan=False)})
    os.replace(part, final)
    return final


def load_best(output_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The selected weights of a run and the state they were selected with."""
    path = output_dir / BEST_NAME / WEIGHTS
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return load_file(path), state


OWNED_BY_TRAINING = (
    WEIGHTS,
    "config.json",
    "README.md",
    "report.json",
    "train_config.yaml",
    "metrics.jsonl",
    "figures",
    "logs",
    BEST_NAME,
)
"""What a training run writes into its output folder beside numbered checkpoints."""
OWNED_BY_EVALUATION = ("report.json", "EVALUATION.md", "figures")


def check_output_dir(output_dir: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output folder that already holds something; nothing is written.

    Raises:
        ValueError: if the folder holds anything and neither overwriting nor resuming was asked for, or the path
            is a file.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; name a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (overwrite or resume):
        raise ValueError(
            f"--output_dir {output_dir} already holds files; name another folder, replace what is in it with "
            "--overwrite_output_dir, or continue a training run with --resume_from_checkpoint latest"
        )


def check_evaluation_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Refuse an output folder for an evaluation that holds something, or a model, which is never overwritten.

    Raises:
        ValueError: see `check_output_dir`; and if the folder holds a model or a training run.
    """
    if any((output_dir / name).exists() for name in (WEIGHTS, "train_config.yaml", BEST_NAME)):
        raise ValueError(f"--output_dir {output_dir} holds a model; an evaluation needs a folder of its own")
    check_output_dir(output_dir, overwrite=overwrite)


def clear_output_dir(output_dir: Path, owned: Collection[str]) -> None:
    """Make the output folder and remove what an earlier run wrote into it: a mistyped folder keeps its own files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in output_dir.iterdir():
        numbered = CHECKPOINT_NAME.fullmatch(path.name.removesuffix(ABANDONED)) or path.name.startswith(".checkpoint-")
        if path.name in owned or (WEIGHTS in owned and numbered):
            logger.info("removing %s", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
