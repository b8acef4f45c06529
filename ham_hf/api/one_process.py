"""One process that shares nothing, where ours expects an accelerator."""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor


class OneProcess:
    """What evaluation asks of an ``accelerate.Accelerator``, without its state for the whole process."""

    num_processes, process_index = 1, 0
    is_main_process = is_local_main_process = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


def one_process(device: torch.device) -> Accelerator:
    """An accelerator of this process alone, for evaluation and calibration."""
    return cast(Accelerator, OneProcess(device))
