"""Fairness-aware weight averaging (FAWA, a part of CFA; Wei et al., CVPR 2023).

Once per epoch the model joins an average of itself, but only if its worst class is robust enough: the worst class
swings between neighboring epochs, and an average without the bad epochs has a better one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GatedAverage:
    """A moving average of a model's weights that only takes in epochs with a good enough worst class.

    Args:
        model: the model to average, not a DDP wrapper; it is copied and not kept.
        decay: share of the old average in the new one, in [0, 1]; paper 0.85, authors' code 0.88.
        threshold: least robust accuracy of the worst class, in [0, 1], for an epoch to pass; paper 0.2.

    Attributes:
        module: the average, in evaluation mode and without gradients. Until the first epoch passes it is a copy of
            the latest model (our choice: the authors leave it at the initial weights until then).
        updates: epochs that passed; the first is copied, the later ones are averaged in.
    """

    def __init__(self, model: nn.Module, decay: float, threshold: float) -> None:
        self.decay, self.threshold = decay, threshold
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0

    def update(self, model: nn.Module, class_accuracies: Sequence[float | None]) -> bool:
        """Take in the model of this epoch if it passes, that is, if its worst class reaches the threshold; whether so.

        Every entry of the state dict takes part, BatchNorm's buffers too: ``decay * average + (1 - decay) * model``
        in the entry's own dtype; integers are averaged and truncated, as the authors do. ``class_accuracies``, in
        [0, 1], are of held-out images under attack; None for some classes, without an example.
        """
        passed = min(accuracy for accuracy in class_accuracies if accuracy is not None) >= self.threshold
        current = model.state_dict()
        if self.updates == 0:
            self.module.load_state_dict(current)
        elif passed:
            # All new values before any is written: tied weights are in the state dict twice and must move once.
            old = self.module.state_dict()
            self.module.load_state_dict({name: self._average(old[name], new) for name, new in current.items()})
        self.updates += passed
        return passed

    def _average(self, old: Tensor, new: Tensor) -> Tensor:
        if not old.is_floating_point():
            # Float32 would round large counts; the CPU, because not every device has float64.
            old, new = old.cpu().double(), new.cpu().double()
        # What agrees stays exact (frozen layers, tables of integers): rounding would let it drift by a bit per update,
        # and truncation then takes a whole unit off some integers (with a decay of 0.3, say).
        return torch.where(old == new, old, self.decay * old + (1 - self.decay) * new)
