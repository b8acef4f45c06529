"""A network whose attacks run in bfloat16 while it trains in float32.

An attack is nine tenths of what adversarial training costs, and a sign or a direction is all that a step takes from a
gradient. So convolutions and matrix products of the attack may be coarser than those of the update; pixels, the
perturbation and the loss stay float32 (invariant 1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ham_hf.attacks import full_precision


class BFloat16Passes(nn.Module):
    """The same network, weights shared, with every pass under autocast to bfloat16.

    Args:
        model: maps pixels (N, C, H, W) to logits (N, num_classes); not copied, so it is attacked as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) in float32 at least."""
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return full_precision(logits)
