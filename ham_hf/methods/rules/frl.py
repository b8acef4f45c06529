"""FRL: fair robust learning (Xu et al., ICML 2021), on TRADES.

Before every epoch the clean and the boundary error (clean minus robust accuracy) of each class are measured on
held-out images. A class that exceeds the average by more than a bound gains weight of its clean cross-entropy or its
KL term (Reweight), and a wider radius (ReMargin). The authors fine-tune a robust network (learning rate 0.001).

With ReMargin the step is a quarter of the largest radius, not ``--step_size``. The published code takes the largest
of the batch; ours that of all classes, so that an example's attack does not depend on the other rows. It also rounds
weights and radii to float32, and fails on a class without a held-out image; ours treats it as an average class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ham_hf.attacks import Attack, predicted
from ham_hf.methods.base import Method
from ham_hf.methods.batch import Batch
from ham_hf.methods.class_rule import RadiusRule, WeightRule
from ham_hf.methods.losses import BaseLoss, TradesLoss
from ham_hf.methods.rule_method import method_of
from ham_hf.methods.state import State, class_sums
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class FRLRule(RadiusRule, WeightRule):
    """Class weights of both TRADES terms, and class radii, from errors on held-out images."""

    name: ClassVar[str] = "frl"
    summary: ClassVar[str] = "fair robust learning, Reweight and ReMargin (Xu et al., 2021)"
    weighs_losses: ClassVar[tuple[str, ...]] = ("trades",)
    num_held_out_sums: ClassVar[int] = 3
    divides_by_class_weight: ClassVar[bool] = True

    frl_margin: bool = setting(True, "scale the radius of each class (ReMargin)")
    frl_bound: float = setting(
        0.07, "tolerated excess of a class's error; the authors' 0.1 without ReMargin", at_least=0
    )
    frl_rate1: float = setting(0.05, "rate of weights, halved every 40 epochs", above=0)
    frl_rate2: float = setting(0.2, "rate of the radii (ReMargin)", above=0)
    frl_limit: float = setting(0.5, "largest sum of multipliers per error", above=0, below=1)

    @property
    def scales_radii(self) -> bool:
        return self.frl_margin

    def initial_state(self, class_counts: Tensor) -> State:
        """Multipliers of clean and boundary error, and half the log of the radius."""
        return {"multipliers": class_counts.new_zeros(2, len(class_counts)), "radius": torch.zeros_like(class_counts)}

    def wants_held_out(self, epoch: int) -> bool:
        return True

    def held_out_sums(self, model: nn.Module, batch: Batch, *, loss: BaseLoss, num_classes: int) -> Tensor:
        """Count images, images right when clean, and images right after PGD-20.

        PGD takes steps of epsilon / 4. The last count is by its prediction alone, also where the clean one is wrong.
        """
        x, y, epsilon = batch.x, batch.y, batch.attack.threat_model.epsilon
        x_adv = replace(batch.attack, num_steps=20, step_size=epsilon / 4)(model, x, y, generator=batch.generator)
        with torch.no_grad():
            right = [predicted(model(images)) == y for images in (x, x_adv)]
        return class_sums(torch.stack([torch.ones_like(right[0]), *right], 1), y, num_classes).T

    def after_held_out(self, state: State, sums: Tensor, *, epoch: int) -> None:
        excess = excess_errors(sums) - self.frl_bound
        rate = self.frl_rate1 * 0.5 ** ((epoch + 1) // 40)
        moved = state["multipliers"] + torch.stack([rate * excess[0], 2 * rate * excess[1]])
        state["multipliers"] = limited(moved, self.frl_limit)
        if self.frl_margin:
            state["radius"] = state["radius"] + self.frl_rate2 * excess[1]

    def class_attack(self, state: State, attack: Attack, *, epoch: int) -> tuple[Tensor, Tensor] | None:
        """Scale epsilon by 0.98 to 3; the step is a quarter of the largest radius."""
        if not self.scales_radii:
            return None
        radius = attack.threat_model.epsilon * (2 * state["radius"]).exp().clamp(0.98, 3)
        return radius, (radius.amax() / 4).expand_as(radius)

    def class_weight(self, state: State, loss: BaseLoss, *, epoch: int) -> Tensor:
        """The authors' weights times the number of classes, so that 1 is plain."""
        multipliers = state["multipliers"]
        return 1 + multipliers.shape[1] * (multipliers - multipliers.mean(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class _OnTrades(Method):
    """TRADES with the weight of the KL term that the authors take."""

    loss_kind: ClassVar[type[BaseLoss]] = TradesLoss

    beta: float = setting(1.5, "weight of the KL term", at_least=0)


FRL = method_of(FRLRule, _OnTrades)
"""TRADES with the class weights and radii of FRL."""


def excess_errors(sums: Tensor) -> Tensor:
    """By how much clean and boundary error of each class exceed the overall ones (2, C); 0 for a class without images.

    Args:
        sums: (3, C) images, images right when clean, images right under attack.
    """
    count, clean, robust = sums
    errors = torch.stack([count - clean, clean - robust])
    overall = errors.sum(1, keepdim=True) / count.sum().clamp(min=1)
    return torch.where(count > 0, errors / count.clamp(min=1) - overall, 0.0)


def limited(multipliers: Tensor, limit: float) -> Tensor:
    """The multipliers (2, C) without negative ones, each row scaled down where its sum exceeds ``limit``."""
    kept = multipliers.clamp(min=0)
    return kept * (limit / kept.sum(1, keepdim=True).clamp(min=limit))
