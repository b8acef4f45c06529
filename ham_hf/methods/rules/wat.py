"""WAT: worst-class adversarial training (Li and Liu, AAAI 2023), on TRADES or PGD-AT.

Hedge over C + 1 arms, one per class and one for the average: the loss of each arm on attacked held-out images adds
to its cumulative cost, and the arms are weighted by C softmax(eta cost). All arms begin at 1. An example is weighted
by its class and by the average, so the loss is about twice the plain one, as published.

Where the published code differs: it computes held-out costs as if classes and batches were of equal size (a class's
sum times C, over batches times batch size); ours are means over the images there are, and a class without one
costs the average. When resumed it forgets the cumulative costs; ours are part of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ham_hf.methods.base import TradesOrPGDAT
from ham_hf.methods.batch import Batch
from ham_hf.methods.class_rule import WeightRule
from ham_hf.methods.losses import BaseLoss
from ham_hf.methods.rule_method import method_of
from ham_hf.methods.state import State, class_sums
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class WATRule(WeightRule):
    """Class weights by the cumulative loss of each class on held-out images."""

    name: ClassVar[str] = "wat"
    summary: ClassVar[str] = "worst-class adversarial training (Li and Liu, 2023)"
    num_held_out_sums: ClassVar[int] = 2

    wat_eta: float = setting(0.1, "how fast weight moves to costly classes", at_least=0)

    def initial_state(self, class_counts: Tensor) -> State:
        """Cumulative cost and weight of the classes and, last, of the average."""
        cost = class_counts.new_zeros(len(class_counts) + 1)
        return {"cost": cost, "weight": torch.ones_like(cost)}

    def wants_held_out(self, epoch: int) -> bool:
        """True after every epoch, that is, before every epoch but the first."""
        return epoch > 0

    def held_out_sums(self, model: nn.Module, batch: Batch, *, loss: BaseLoss, num_classes: int) -> Tensor:
        """Count the images, and sum the loss under its own attack."""
        x, y, attack = batch.x, batch.y, batch.attack
        start = loss.start(x, attack.threat_model, batch.generator)
        x_adv = attack(model, x, y, start=start, loss_fn=loss.attack_loss(model, x))
        with torch.no_grad():
            terms = loss.terms(model(loss.rows(x_adv, x)), y)
        cost = sum(scale * term for scale, term in zip(loss.scales, terms, strict=True))
        return class_sums(torch.stack([torch.ones_like(terms[0]), cost], 1), y, num_classes).T

    def after_held_out(self, state: State, sums: Tensor, *, epoch: int) -> None:
        state["cost"] = state["cost"] + mean_costs(sums)
        state["weight"] = hedge_weights(state["cost"], self.wat_eta)

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor:
        """Weigh every term by the class's weight plus that of the average."""
        weight = state["weight"]
        return (weight[:-1] + weight[-1]).expand(loss.num_terms, -1)


WAT = method_of(WATRule, TradesOrPGDAT)
"""TRADES or PGD-AT with the class weights of WAT."""


def mean_costs(sums: Tensor) -> Tensor:
    """Mean loss of each class and, last, of all images (C + 1,); a class without an image gets that of all.

    Args:
        sums: (2, C) number of images and sum of their loss.
    """
    count, cost = sums
    overall = cost.sum() / count.sum().clamp(min=1)
    return torch.cat([torch.where(count > 0, cost / count.clamp(min=1), overall), overall[None]])


def hedge_weights(cost: Tensor, eta: float) -> Tensor:
    """Weights (C + 1,) of the arms from their cumulative costs (C + 1,); they sum to C."""
    return (len(cost) - 1) * (eta * cost).softmax(0)
