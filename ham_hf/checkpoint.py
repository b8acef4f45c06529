"""Checkpoints: everything a run needs to go on, written under another name and renamed when complete.

A checkpoint is a folder ``checkpoint-{step}`` with ``model.safetensors`` (and ``ema.safetensors``), ``optimizer.pt``
and ``trainer_state.json``. No random state is in it: every random stream is derived from its place in the run
(`ham_hf.seeding`). Tensors are read back with ``weights_only=True``, so a checkpoint cannot execute code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
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
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """Contents of one checkpoint.

    Attributes:
        model: state dict of the unwrapped pixel model.
        ema: state dict of its moving average, or None.
        optimizer: state dict of the optimizer.
        state: the trainer's counters and history; JSON types only.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
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
    beyond ``keep`` are removed afterwards, never before.

    Args:
        output_dir: output folder of the run.
        checkpoint: what to write; ``state["step"]`` names it.
        keep: number of checkpoints to keep, the newest; None keeps all.
    """
    final = output_dir / f"checkpoint-{checkpoint.state['step']}"
    part = output_dir / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_weights(part / "model.safetensors", checkpoint.model)
    if checkpoint.ema is not None:
        save_weights(part / "ema.safetensors", checkpoint.ema)
    torch.save(checkpoint.optimizer, part / "optimizer.pt")
    (part / STATE_FILE).write_text(json.dumps(checkpoint.state, indent=1, allow_nan=False))
    replace_folder(part, final)
    for old in list_checkpoints(output_dir)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


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
    ema = path / "ema.safetensors"
    return Checkpoint(
        model=load_file(path / "model.safetensors"),
        ema=load_file(ema) if ema.is_file() else None,
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        state=json.loads((path / STATE_FILE).read_text()),
    )


def save_best(output_dir: Path, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write the selected weights as ``checkpoint-best/model.safetensors``, with the state in the file's header.

    One file, so that one rename replaces weights and state together.
    """
    final = output_dir / BEST_NAME / "model.safetensors"
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_suffix(".part")
    save_weights(part, weights, {"state": json.dumps(dict(state), allow_nan=False)})
    os.replace(part, final)
    return final


def load_best(output_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The selected weights of a run and the state they were selected with."""
    path = output_dir / BEST_NAME / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return load_file(path), state


OWNED = (
    "model.safetensors",
    "config.json",
    "README.md",
    "report.json",
    "train_config.yaml",
    "metrics.jsonl",
    "figures",
    "logs",
)
"""What a run writes into its output folder beside checkpoints."""


def claim_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Make the output folder, or refuse one that already holds something; call it on the main process only.

    Overwriting removes what a run of this project writes and nothing else: a mistyped folder keeps its files.

    Raises:
        ValueError: if the folder holds anything and neither overwriting nor resuming was asked for, or the path
            is a file.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; name a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    if resume or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"--output_dir {output_dir} already holds files; name another folder, continue its run with "
            "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )
    for path in output_dir.iterdir():
        leftover = path.name.startswith(".checkpoint-")
        if path.name in OWNED or leftover or CHECKPOINT_NAME.fullmatch(path.name) or path.name == BEST_NAME:
            logger.info("removing %s", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
