"""DAFA: distance-aware fair adversarial training (Lee et al., ICLR 2024).

Classes that are often confused pass weight from the stronger to the weaker one, once, after a warm-up
epoch whose predictions say how close classes are. The weight scales the cross-entropy term, the radius and the
step of the attack. The published PGD-AT variant undoes the radius with a second, unweighted step and projection
(a bug that is not repeated here). A class that passes more weight than it has, which takes a large lambda, ends at 0
here; the formula and the published code let its weight be negative (a radius below zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ham_hf.attacks import Attack
from ham_hf.methods.base import TradesOrPGDAT
from ham_hf.methods.class_rule import FirstTermRule, RadiusRule
from ham_hf.methods.rule_method import method_of
from ham_hf.methods.state import State, class_sums, statistics_dtype
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class DAFARule(RadiusRule, FirstTermRule):
    """Class weights from class similarity, used as loss weights and as factors of epsilon and step size."""

    name: ClassVar[str] = "dafa"
    summary: ClassVar[str] = "distance-aware fair adversarial training (Lee et al., 2024)"

    dafa_lambda: float = setting(1.0, "how much weight passes between classes; 1.5 for 100 classes", at_least=0)
    dafa_start_epoch: int = setting(
        70, "first 0-based epoch with class weights; the epoch before it is observed", at_least=1
    )

    def initial_state(self, class_counts: Tensor) -> State:
        """The weights, and the sums they are made of."""
        num_classes = len(class_counts)
        return {"weight": torch.ones_like(class_counts), "sums": class_counts.new_zeros(num_classes, num_classes + 1)}

    def observe(self, logits: Tensor, y: Tensor, *, epoch: int) -> Tensor | None:
        """Sum the class probabilities, and count, per true class."""
        if epoch != self.dafa_start_epoch - 1:
            return None
        probabilities = logits.detach().to(statistics_dtype(logits.device)).softmax(1).nan_to_num(1 / logits.shape[1])
        return class_sums(torch.cat([probabilities, torch.ones_like(probabilities[:, :1])], 1), y, logits.shape[1])

    def after_update(self, state: State, sums: Tensor, *, epoch: int) -> None:
        state["sums"] += sums

    def before_epoch(self, state: State, *, epoch: int) -> None:
        if epoch == self.dafa_start_epoch:
            counts = state["sums"][:, -1:]
            state["weight"] = dafa_weights(state["sums"][:, :-1] / counts.clamp(min=1), self.dafa_lambda).clamp(min=0)

    def class_attack(self, state: State, attack: Attack, *, epoch: int) -> tuple[Tensor, Tensor] | None:
        if epoch < self.dafa_start_epoch:
            return None
        return state["weight"] * attack.threat_model.epsilon, state["weight"] * attack.step_size


DAFA = method_of(DAFARule, TradesOrPGDAT)
"""TRADES or PGD-AT with the class weights and radii of DAFA."""


def dafa_weights(similarity: Tensor, scale: float) -> Tensor:
    """Class weights (C,) of DAFA (equation of section 4.2); they sum to C, and may be negative for a large scale.

    Args:
        similarity: (C, C), row i = mean class probabilities of adversarial images of class i; zeros for a class
            without an example, which then keeps weight 1.
        scale: lambda.
    """
    own = similarity.diagonal()
    gain = similarity * own  # (i, j): p_i(j) p_j(j), what i gains from a stronger j
    loss = (similarity * own).T  # (i, j): p_j(i) p_i(i), what i passes to a weaker or equal j
    passed = torch.where(own[:, None] < own, gain, -loss).fill_diagonal_(0)
    return 1 + scale * passed.sum(1)
