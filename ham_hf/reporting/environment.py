"""Software and hardware that a run was computed with."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from ham_hf import __version__
from ham_hf.training.environment import recorded


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Software and hardware of the run.

    Attributes:
        python: version of Python.
        platform: operating system and processor.
        versions: versions of packages by name.
        device: what computed.
        num_processes: number of processes.
        num_threads: threads of a process.
        commit: commit of the source checkout, None outside of one.
        variables: ``NAME=value`` of the environment variables that were set and may change numbers; see
            `ham_hf.training.environment`.
    """

    python: str
    platform: str
    versions: Mapping[str, str]
    device: str
    num_processes: int
    num_threads: int
    commit: str | None
    variables: tuple[str, ...] = ()


def environment(*, device: torch.device, num_processes: int) -> Environment:
    """Describe the software and hardware of this process."""
    packages = ("torch", "torchvision", "timm", "accelerate", "datasets", "huggingface-hub", "safetensors")
    versions = {package.replace("-", "_"): version(package) for package in packages}
    device_name = device.type
    if device.type != "cpu":
        # Apple's has no name.
        name_of = getattr(torch.get_device_module(device), "get_device_name", None)
        device_name = name_of(device) if name_of is not None else device.type
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions={"ham_hf": __version__, **versions},
        device=device_name,
        num_processes=num_processes,
        num_threads=torch.get_num_threads(),
        commit=source_commit(Path(__file__).resolve().parents[2]),
        variables=recorded(),
    )


def source_commit(root: Path) -> str | None:
    """Commit of the checkout at ``root``, with "-dirty" if tracked or new files differ; None if it is no checkout.

    ``root`` itself must be the checkout: an installed package may lie inside somebody else's repository.
    """
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    answers = []
    for question in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            answer = subprocess.run([git, *question], cwd=root, capture_output=True, text=True, timeout=60)  # noqa: S603
        except subprocess.TimeoutExpired:  # a checkout on a slow file system: not worth a report
            return None
        if answer.returncode:
            return None
        answers.append(answer.stdout.strip())
    commit, changes = answers
    return f"{commit}-dirty" if changes else commit
