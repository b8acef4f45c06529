"""GAIRAT: geometry-aware instance-reweighted adversarial training (Zhang et al., ICLR 2021).

Weighted cross-entropy of PGD examples: the fewer iterates of the attack the model still classifies correctly (kappa),
the closer the example is to the boundary, and the larger its weight. Epochs before ``gairat_start_epoch`` are PGD-AT.

Weights are those of the published code (zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training) with
floor(K/2) in the argument where the paper has K/2. They differ in three ways that the code does not handle: they are
normalized over all processes and accumulation steps, not per batch; they are computed relative to that of kappa = 0,
in float64, so that none is ever rounded to 0 however small lambda is; and K = 1, where floor(K/2) is 0, uses K/2.
The authors' 60th epoch, counted from 1, is epoch 59 here.

The authors report AutoAttack only for training with extra data: compare by AutoAttack, not by PGD alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ham_hf.attacks import cross_entropy, predicted
from ham_hf.methods.base import Method
from ham_hf.methods.batch import Batch, TrainingRows
from ham_hf.methods.state import statistics_dtype
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class GAIRAT(Method):
    """Weigh examples by how few attack steps separate them from the decision boundary."""

    name: ClassVar[str] = "gairat"
    summary: ClassVar[str] = "geometry-aware instance-reweighted adversarial training (Zhang et al., 2021)"

    gairat_function: Literal["tanh", "sigmoid", "discrete"] = setting(
        "tanh", "weight of an example as a function of its distance in attack steps"
    )
    gairat_lambda: float = setting(
        -1.0, "offset in the argument of tanh or sigmoid; the larger, the more alike the weights"
    )
    gairat_start_epoch: int = setting(
        59, "first 0-based epoch with weights; the epochs before it are PGD-AT", at_least=0
    )

    def inner_maximization(self, model: nn.Module, batch: Batch) -> TrainingRows:
        if batch.epoch < self.gairat_start_epoch:
            return super().inner_maximization(model, batch)
        start, _ = self.start_and_loss(model, batch)
        correct = CorrectIterates(batch.y)
        x_adv = batch.attack(model, batch.x, batch.y, start=start, loss_fn=correct)
        weight = gairat_weights(correct.count, batch.attack.num_steps, self.gairat_function, self.gairat_lambda)
        return TrainingRows(x=x_adv, y=batch.y, weight=weight.to(batch.x.dtype))


class CorrectIterates:
    """Cross-entropy for `ham_hf.attacks.pgd` that counts, on the device, the iterates classified correctly.

    ``count`` (N,) is kappa: correct iterates among those whose logits the attack computes, 0 .. num_steps - 1.
    """

    def __init__(self, y: Tensor) -> None:
        self.count = torch.zeros_like(y)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        self.count += predicted(logits.detach()) == y
        return cross_entropy(logits, y)


def gairat_weights(kappa: Tensor, num_steps: int, function: str, offset: float) -> Tensor:
    """Weight of each example relative to one with kappa = 0, in (0, 1], float64 where the device has it.

    With a = offset + 5 (h - kappa) / h and h = floor(K / 2): tanh = (1 + tanh(a)) / 2, which is a sigmoid of 2 a;
    sigmoid = 1 / (1 + exp(-a)); discrete = (K + 1 - kappa) / (K + 1). Whatever the offset, no weight is below
    exp(-10 K / h), which is at least exp(-30): a sum of weights in float32 is never 0.

    Args:
        kappa: (N,) number of correct iterates, 0 .. num_steps.
        num_steps: K >= 1.
        function: "tanh", "sigmoid" or "discrete".
        offset: Lambda; in the limit of infinity all examples weigh the same.
    """
    kappa = kappa.to(statistics_dtype(kappa.device))
    if function == "discrete":
        return (num_steps + 1 - kappa) / (num_steps + 1)
    half = num_steps // 2 or num_steps / 2
    slope = 2 if function == "tanh" else 1
    argument = slope * (offset + 5 * (half - kappa) / half)
    nearest = torch.full_like(argument, slope * (offset + 5))
    return (F.logsigmoid(argument) - F.logsigmoid(nearest)).exp()
