"""CFA: class-wise calibrated fair adversarial training (Wei et al., CVPR 2023).

The robust accuracy that each class had in the epoch before, on the training images, sets its radius (customized
margin) and its KL weight (customized regularization, TRADES form) in this epoch. The third part, fairness-gated
averaging of the weights, works with every method: `ham_hf.training.averaging`.

Defaults are those of the authors' code; the paper has lambda1 = 0.3 for TRADES, 0.5 for PGD-AT and 0.7 for FAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ham_hf.attacks import Attack, predicted
from ham_hf.methods.base import TradesOrPGDAT
from ham_hf.methods.class_rule import RadiusRule, WeightRule
from ham_hf.methods.losses import BaseLoss
from ham_hf.methods.rule_method import method_of
from ham_hf.methods.state import State, flagged_counts
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class CFARule(RadiusRule, WeightRule):
    """Radius and KL weight of each class from its robust accuracy in the epoch before."""

    name: ClassVar[str] = "cfa"
    summary: ClassVar[str] = "class-wise calibrated fair adversarial training (Wei et al., 2023)"
    weighs_losses: ClassVar[tuple[str, ...]] = ("trades",)
    gates_averaging: ClassVar[bool] = True

    cfa_margin: bool = setting(True, "scale the radius of each class")
    cfa_regularization: bool = setting(True, "scale the KL weight of each class (TRADES)")
    cfa_start_epoch: int = setting(10, "first 0-based epoch with class radii and KL weights", at_least=1)
    cfa_lambda1: float = setting(0.5, "offset added to a class's robust accuracy to scale its radius", above=0)
    cfa_lambda2: float = setting(0.5, "the same for its KL weight", above=0)

    @property
    def scales_radii(self) -> bool:
        return self.cfa_margin

    def weighs(self, loss: BaseLoss) -> bool:
        return super().weighs(loss) and self.cfa_regularization

    def initial_state(self, class_counts: Tensor) -> State:
        """Robust accuracies (-1 = not known) and the counts they are made of."""
        return {
            "robust_accuracy": torch.full_like(class_counts, -1.0),
            "counts": class_counts.new_zeros(len(class_counts), 2),
        }

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor:
        """Count correct and all examples of each class."""
        return flagged_counts(predicted(logits) == y, y, logits.shape[1])

    def after_update(self, state: State, sums: Tensor, *, epoch: int) -> None:
        state["counts"] += sums

    def before_epoch(self, state: State, *, epoch: int) -> None:
        """Update the robust accuracies; a class without examples keeps its last one."""
        correct, count = state["counts"].unbind(1)
        state["robust_accuracy"] = torch.where(count > 0, correct / count.clamp(min=1), state["robust_accuracy"])
        state["counts"].zero_()

    def class_attack(self, state: State, attack: Attack, *, epoch: int) -> tuple[Tensor, Tensor] | None:
        """Scale epsilon by lambda1 + robust accuracy; the step is not scaled."""
        if epoch < self.cfa_start_epoch or not self.scales_radii:
            return None
        factor = calibrated(state["robust_accuracy"], self.cfa_lambda1)
        return factor * attack.threat_model.epsilon, torch.ones_like(factor) * attack.step_size

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor | None:
        """Weigh so that the loss is (CE + beta_c KL) / (1 + beta_c), beta_c = (lambda2 + accuracy) beta.

        Before the first such epoch beta_c is beta: the loss is that of TRADES divided by 1 + beta.
        """
        if not self.weighs(loss):
            return None
        factor = torch.ones_like(state["robust_accuracy"])
        if epoch >= self.cfa_start_epoch:
            factor = calibrated(state["robust_accuracy"], self.cfa_lambda2)
        return torch.stack([torch.ones_like(factor), factor]) / (1 + factor * loss.beta)


CFA = method_of(CFARule, TradesOrPGDAT)
"""TRADES or PGD-AT with the class radii and weights of CFA."""


def calibrated(robust_accuracy: Tensor, offset: float) -> Tensor:
    """Factor of each class (C,): offset + robust accuracy in [0, 1], or 1 where that is not known (negative)."""
    return torch.where(robust_accuracy < 0, 1.0, offset + robust_accuracy)
