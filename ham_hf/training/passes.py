"""What a run costs: passes over the network, whatever asked for them.

The unit is one forward of one image. A forward costs 1, a gradient of the input 2 (forward included), a training pass
3 (forward, gradients of input and parameters): a count of arithmetic, not of time. Attacks that also compute the
gradient of the parameters, as published code often does, would pay 3 for a step; none here does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FORWARD, INPUT_GRADIENT, TRAINING = 1, 2, 3


class PassCounter:
    """Counts the passes of this process over some modules, in forwards of one image.

    A module that is deep-copied later brings along a counter of its own, which nothing reads.
    """

    def __init__(self) -> None:
        self._passes = 0

    def watch(self, module: nn.Module) -> None:
        """Count every call of ``module``, whose first argument is a batch (N, C, H, W)."""
        module.register_forward_pre_hook(self._count)

    def take(self) -> int:
        """The passes since the last call."""
        passes, self._passes = self._passes, 0
        return passes

    # A compiled network would trace the counter, and be compiled anew at every number.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        if not torch.is_grad_enabled():
            cost = FORWARD
        elif module.training:
            cost = TRAINING
        else:
            cost = INPUT_GRADIENT if x.requires_grad else FORWARD
        self._passes += cost * len(x)
