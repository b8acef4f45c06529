"""FAAL: fairness-aware adversarial learning (Zhang et al., CVPR 2024), on PGD-AT, TRADES or MART.

For every update the class weights are the worst ones within reach: p maximizes the sum of p_c a_c, where a_c sums
over the rows of class c by how much the largest other probability exceeds the true one, subject to KL(U || p) <= r
with U uniform. The rows are forwarded once more for it, in training mode. The authors fine-tune a robust network for
two epochs at a learning rate of 0.01.

Because a_c is a sum, a class missing from the update has a_c = 0, and gets the largest weight of all where the
classes that are there have negative ones.

Where the published code differs: it solves with cvxpy, on the host, to about 1e-8, and rounds p to float32; ours is
the closed form, on the device. Its batch is that of its one process; ours is the whole update, of all processes.
With MART it attacks the KL term, as with TRADES; ours is MART's own attack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ham_hf.methods.base import BuiltOnLoss
from ham_hf.methods.class_rule import WeightRule
from ham_hf.methods.losses import BaseLoss
from ham_hf.methods.rule_method import method_of
from ham_hf.methods.state import State, class_sums, statistics_dtype
from ham_hf.settings import setting

BISECTIONS = 64
"""Halvings of the interval of `worst_case_weights`: at most 760 wide, it ends up below the rounding of float64."""
TIE = 1e-9
"""Classes whose values differ by less are alike: below the resolution of the published solver, above rounding."""


@dataclass(frozen=True, kw_only=True)
class FAALRule(WeightRule):
    """Class weights that are the worst within a KL ball, from the margins of each update's rows."""

    name: ClassVar[str] = "faal"
    summary: ClassVar[str] = "fairness-aware adversarial learning, class-wise robust optimization (Zhang et al., 2024)"
    uses_class_counts: ClassVar[bool] = True
    wants_preview: ClassVar[bool] = True

    faal_radius: float = setting(0.5, "largest KL divergence of the class weights from equal ones", at_least=0)

    def initial_state(self, class_counts: Tensor) -> State:
        """The class weights, 1 on average over classes with training images."""
        present = (class_counts > 0).to(class_counts)
        return {"weight": present.clone(), "present": present}

    def preview(self, logits: Tensor, y: Tensor, num_classes: int) -> Tensor:
        """Sum over each class the largest other probability minus the true one."""
        probabilities = logits.detach().to(statistics_dtype(logits.device)).softmax(1)
        true = probabilities.gather(1, y[:, None])
        runner_up = probabilities.scatter(1, y[:, None], 0.0).amax(1, keepdim=True)
        return class_sums((runner_up - true).squeeze(1), y, num_classes)

    def before_update(self, state: State, sums: Tensor) -> None:
        present = state["present"] > 0
        state["weight"] = state["present"].sum() * worst_case_weights(sums, self.faal_radius, present)

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor:
        """Weigh every term alike."""
        return state["weight"].expand(loss.num_terms, -1)


@dataclass(frozen=True, kw_only=True)
class _OnAnyLoss(BuiltOnLoss):
    """Any loss, with one weight of the KL term for all."""

    beta: float | None = setting(6.0, "weight of the KL term of TRADES or MART as --base_loss", at_least=0)


FAAL = method_of(FAALRule, _OnAnyLoss)
"""A loss with the class weights of FAAL."""


def worst_case_weights(values: Tensor, radius: float, present: Tensor | None = None) -> Tensor:
    """The probabilities p (C,) that maximize p @ values subject to KL(U || p) <= radius, with U uniform.

    The optimum is p_c = q_c / sum(q) with q_c = 1 / (nu - values_c), nu > max(values) such that the divergence is the
    radius. The distance of nu from the maximum, in units of the range of the values, is found by bisection of its
    logarithm: the divergence falls with it, from infinity to 0. Nothing waits for the device.

    Args:
        values: (C,) finite; if all are alike the result is uniform.
        radius: r >= 0.
        present: (C,) bool, the classes there are; the others get 0. None = all.
    """
    if present is None:
        present = torch.ones_like(values, dtype=torch.bool)
    gap = torch.where(present, values, -torch.inf).amax() - values
    spread = torch.where(present, gap, 0).amax()
    # Absent classes get an infinite gap: the logarithm of their weight is -inf, so the weight is 0.
    gap = torch.where(present, gap / spread.clamp(min=TIE), torch.inf)
    count = present.sum().to(values)
    low = torch.full_like(spread, math.log(torch.finfo(values.dtype).tiny))
    high = torch.full_like(spread, 50.0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        divergence = -torch.where(present, _log_weights(gap, middle), 0).sum() / count - count.log()
        low, high = torch.where(divergence > radius, middle, low), torch.where(divergence > radius, high, middle)
    return torch.where(spread > TIE, _log_weights(gap, high).exp(), present / count)


def _log_weights(gap: Tensor, log_distance: Tensor) -> Tensor:
    """Logarithm of the weights (C,) for values ``gap`` below the largest, whose distance from nu has this log."""
    return (-(gap + log_distance.exp()).log()).log_softmax(0)
