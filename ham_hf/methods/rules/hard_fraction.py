"""Class weights from the hard fraction (ours): a class that the method observes as wrong more often weighs more.

h_c is the share of the examples of class c that are misclassified: at the mining step where the method mines, else
among the adversarial rows that are trained on. It is counted over an epoch, over all processes, and moves the weight
of the first term of the loss to W_c <- d W_c + (1 - d) clip(1 + 2 s (h_c - mean h), low, high), the clipped values
rescaled to mean 1; both means are over the classes of which an example was seen, and the others move to weight 1, at
which all begin. Without d, the weights swing at large learning rates: a class that weighs less for an epoch is wrong
more often in it, weighs more in the next, and so on. Weights are not in the divisor. Counting and weighing cost no
pass. Small weights suffice: those of methods that make classes fair lie within a ratio of about 2.

That weak classes should weigh more is what DAFA, WAT, FRL and CFOL do as well; this measure of weakness is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ham_hf.attacks import predicted
from ham_hf.methods.base import BuiltOnLoss
from ham_hf.methods.class_rule import FirstTermRule
from ham_hf.methods.rule_method import method_of
from ham_hf.methods.state import State, flagged_counts
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class HardFractionRule(FirstTermRule):
    """Weight of each class from its share of misclassified examples in the epochs before."""

    name: ClassVar[str] = "hard_fraction"
    summary: ClassVar[str] = "class weights from each class's share of hard examples in the epochs before (ours)"
    unrecorded: ClassVar = {"hard_fraction_decay": 0.0}

    hard_fraction_strength: float = setting(
        1.0, "s of the class weights 1 + 2 s (hard fraction - mean over classes)", above=0
    )
    hard_fraction_low: float = setting(
        0.7, "smallest weight of a class, before weights are rescaled", at_least=0, below=1
    )
    hard_fraction_high: float = setting(1.4, "largest weight of a class, before weights are rescaled", above=1)
    hard_fraction_decay: float = setting(
        0.8, "d, the share of a class's weight that is kept from epoch to epoch, against swings", at_least=0, below=1
    )
    hard_fraction_start_epoch: int = setting(
        0, "first 0-based epoch with class weights; in epoch 0 nothing is counted yet", at_least=0
    )

    @property
    def warmup_epochs(self) -> int:
        """Epochs of the plain base loss: at least the first."""
        return max(1, self.hard_fraction_start_epoch)

    def initial_state(self, class_counts: Tensor) -> State:
        """The weights, and wrong and all examples seen in this epoch."""
        return {"weight": torch.ones_like(class_counts), "counts": class_counts.new_zeros(len(class_counts), 2)}

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor:
        """Count wrong and all examples of each class."""
        return flagged_counts(predicted(logits) != y, y, logits.shape[1])

    def after_update(self, state: State, sums: Tensor, *, epoch: int) -> None:
        state["counts"] += sums

    def before_epoch(self, state: State, *, epoch: int) -> None:
        found = hard_fraction_weights(
            *state["counts"].unbind(1),
            strength=self.hard_fraction_strength,
            low=self.hard_fraction_low,
            high=self.hard_fraction_high,
        )
        state["weight"] = self.hard_fraction_decay * state["weight"] + (1 - self.hard_fraction_decay) * found
        state["counts"].zero_()


HardFraction = method_of(HardFractionRule, BuiltOnLoss)
"""A loss with class weights from the hard fraction."""


def hard_fraction_weights(wrong: Tensor, seen: Tensor, *, strength: float, low: float, high: float) -> Tensor:
    """Weight of each class (C,), 1 on average over the classes seen; 1 for a class that was not.

    Args:
        wrong: (C,) misclassified examples.
        seen: (C,) all examples.
        strength: s > 0.
        low: smallest weight before rescaling, in [0, 1).
        high: largest weight before rescaling, > 1.
    """
    present = seen > 0
    count = present.sum().clamp(min=1)
    fraction = torch.where(present, wrong / seen.clamp(min=1), 0)
    weight = (1 + 2 * strength * (fraction - fraction.sum() / count)).clamp(low, high)
    # The class of the largest fraction has at least 1, so there is something to divide by.
    return torch.where(present, weight * count / torch.where(present, weight, 0).sum().clamp(min=1e-12), 1)
