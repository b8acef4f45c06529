"""BAT: balance adversarial training (Sun et al., AAAI 2023).

On the path of a KL attack (as in TRADES) each example has two points: the last one that is classified correctly, and
the first one that is not, plus one further step. The loss is the cross-entropy of the one, the KL divergence from the
clean image to the other, and the divergence of both predictions from uniform.

The published code (silvercherry/Improving-Robust-Fairness-via-Balance-Adversarial-Training) runs two attacks per
batch, each with noise of its own and rows in the order in which they stop; here both points are taken from one path,
which saves the first attack, and keep the order of the batch. Given the same noise each point is the published one,
with its corner cases: an example that is wrong at the start has that as its "last correct" point, and one that is
never seen to be wrong has the final iterate, unchecked, as both. One training forward takes both points and the clean
images, where the published code makes three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ham_hf.attacks import ThreatModel, full_precision
from ham_hf.methods.base import Method
from ham_hf.methods.batch import Batch, TrainingRows
from ham_hf.methods.fat import early_stopped_pgd
from ham_hf.methods.losses import BaseLoss, TradesLoss, kl
from ham_hf.settings import setting

FURTHER_STEPS = 1
"""Steps beyond the first wrong iterate (tau in the published code)."""


@dataclass(frozen=True, kw_only=True)
class BalanceLoss(TradesLoss):
    """Cross-entropy of the last correct point, KL from the clean image to the wrong one, and both KLs to uniform.

    Rows of the training forward, in blocks of E: wrong points, last correct points, clean images.
    """

    name: ClassVar[str] = "bat"
    num_terms: ClassVar[int] = 3
    clean_term: ClassVar[bool] = False

    @property
    def scales(self) -> tuple[float, ...]:
        return (1.0, self.beta, 1.0)

    def start(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator | None) -> Tensor:
        """See `BaseLoss.start`: that of TRADES, clipped to [0, 1], as published."""
        return super().start(x, threat_model, generator).clamp_(0, 1)

    def terms(self, logits: Tensor, y: Tensor, some: Tensor | None = None) -> Tensor:
        wrong, correct, clean = full_precision(logits).chunk(3)
        return torch.stack(
            [
                F.cross_entropy(correct, y, reduction="none"),
                kl(clean, wrong),
                kl_to_uniform(correct) + kl_to_uniform(wrong),
            ]
        )


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) of each row (N,), which is log C minus the entropy."""
    log_p = logits.log_softmax(1)
    return (log_p.exp() * log_p).sum(1) + math.log(logits.shape[1])


@dataclass(frozen=True, kw_only=True)
class BAT(Method):
    """Balance the two sides of the decision boundary that the attack on each example crosses."""

    name: ClassVar[str] = "bat"
    summary: ClassVar[str] = "balance adversarial training on both sides of the boundary (Sun et al., 2023)"
    loss_kind: ClassVar[type[BaseLoss]] = BalanceLoss

    beta: float = setting(6.0, "weight of the KL term", at_least=0)

    def inner_maximization(self, model: nn.Module, batch: Batch) -> TrainingRows:
        """See `Method.inner_maximization`. Waits for the device once per attack step, to drop rows."""
        start, loss_fn = self.start_and_loss(model, batch)
        attacked = early_stopped_pgd(
            model, batch.x, batch.y, attack=batch.attack, start=start, loss_fn=loss_fn, tau=FURTHER_STEPS
        )
        return batch.training_rows(torch.cat([attacked.stopped, attacked.last_correct, batch.x]))
