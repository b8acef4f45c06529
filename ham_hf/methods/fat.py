"""FAT: friendly adversarial training (Zhang et al., ICML 2020).

Cross-entropy on examples that are wrong, but only just: the attack on an example ends tau steps after the model
misclassifies it, and tau grows during training. As in the published code (zjfheart/Friendly-Adversarial-Training), a
step is charged to tau only where the example is wrong before it, so one that becomes right again is attacked for
longer, and Gaussian noise is added at every step. Rows keep the order of the batch here; the published code returns
them in the order in which they stop, which changes neither loss nor gradient.

Class radii of other methods (CFA's FAT variant) and class weights can be borrowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ham_hf.attacks import Attack, LossFn, attack_mode, input_gradient, predicted
from ham_hf.methods.batch import Batch, TrainingRows
from ham_hf.methods.rule_method import Borrowing
from ham_hf.mining import RowLoss
from ham_hf.settings import setting


@dataclass(frozen=True, kw_only=True)
class FAT(Borrowing):
    """Train on adversarial examples of an attack that stops soon after it succeeds."""

    name: ClassVar[str] = "fat"
    summary: ClassVar[str] = "friendly adversarial training: early-stopped PGD (Zhang et al., 2020)"

    fat_tau_epochs: tuple[int, ...] = setting(
        (50, 90),
        "0-based epochs from which an example that is wrong is attacked for one step more; before the "
        "first of them the attack stops there",
        limits=">= 0, not decreasing",
        items="EPOCH",
    )
    fat_omega: float = setting(
        0.001, "standard deviation of the noise added at every step, in pixel units", at_least=0
    )

    def check(self, *, num_steps: int) -> None:
        super().check(num_steps=num_steps)
        epochs = self.fat_tau_epochs
        if any(epoch < 0 for epoch in epochs) or list(epochs) != sorted(epochs):
            raise ValueError(
                f"--fat_tau_epochs {' '.join(map(str, epochs))}: expected epochs of at least 0 that do not decrease"
            )

    @property
    def settled_epoch(self) -> int:
        return max(self.fat_tau_epochs, default=0)

    def tau(self, epoch: int) -> int:
        """Number of further steps for a wrong example in this 0-based epoch."""
        return sum(epoch >= first for first in self.fat_tau_epochs)

    def inner_maximization(self, model: nn.Module, batch: Batch) -> TrainingRows:
        """See `Method.inner_maximization`. Waits for the device once per attack step, to drop rows."""
        start, loss_fn = self.start_and_loss(model, batch)
        attacked = early_stopped_pgd(
            model,
            batch.x,
            batch.y,
            attack=batch.attack,
            start=start,
            loss_fn=loss_fn,
            tau=self.tau(batch.epoch),
            noise=self.fat_omega,
            generator=batch.generator,
        )
        return batch.training_rows(attacked.stopped)


@dataclass(frozen=True, eq=False, kw_only=True)
class StoppedAttack:
    """Two points on the path of each example, in the order of the batch.

    Attributes:
        stopped: (N, C, H, W) iterate at which the example was dropped; the last one, which is not classified, if it
            never was.
        last_correct: (N, C, H, W) iterate before the first wrong one; the start if that is wrong already, the last
            one if none was seen to be wrong.
    """

    stopped: Tensor
    last_correct: Tensor


def early_stopped_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    attack: Attack,
    start: Tensor,
    loss_fn: LossFn,
    tau: int,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> StoppedAttack:
    """PGD in which an example stops at its wrong iterate number ``tau`` + 1 (Zhang et al., ICML 2020).

    Stopped rows leave the batch, so that the attack gets cheaper with every step. Finding them waits for the device
    once a step. The forward of a step both classifies and gives the gradient, which a row that leaves does not use.

    Args:
        model: maps pixels (N, C, H, W) in [0, 1] to logits (N, num_classes); not a DDP wrapper.
        x: clean images (N, C, H, W) in [0, 1].
        y: labels (N,).
        attack: threat model, steps and step size; radius and step may be (N,).
        start: images to start from (N, C, H, W).
        loss_fn: loss to increase, per example; a `RowLoss` is told which rows are left.
        tau: number of further steps that a wrong example is given, >= 0.
        noise: standard deviation of Gaussian noise added at every step before projection, in pixel units.
        generator: source of that noise, drawn for the whole batch.
    """
    x_adv = start.detach()
    stopped, last_correct = x_adv.clone(), x_adv.clone()
    rows, budget = torch.arange(len(y), device=y.device), torch.full_like(y, tau)
    wrong, unbroken = torch.zeros_like(y, dtype=torch.bool), torch.ones_like(y, dtype=torch.bool)

    def watched(logits: Tensor, y: Tensor) -> Tensor:
        nonlocal wrong
        wrong = predicted(logits.detach()) != y
        return loss_fn(logits, y)

    with attack_mode(model):
        for _ in range(attack.num_steps):
            if not len(rows):
                break
            gradient = input_gradient(model, x_adv, y, watched)
            unbroken &= ~wrong
            last_correct[rows] = _where(unbroken, x_adv, last_correct[rows])
            left = (~wrong | (budget > 0)).nonzero().squeeze(1)
            attack = attack.rows(left)
            if isinstance(loss_fn, RowLoss):
                loss_fn.keep(left)
            budget -= wrong.to(budget.dtype)
            rows, x_adv, gradient, y, budget, unbroken = (
                values[left] for values in (rows, x_adv, gradient, y, budget, unbroken)
            )
            moved = attack.threat_model.step(x_adv, gradient, attack.step_size)
            if noise:
                moved += torch.empty_like(x).normal_(std=noise, generator=generator)[rows]
            x_adv = stopped[rows] = attack.threat_model.project(moved, x[rows])
    last_correct[rows] = _where(unbroken, x_adv, last_correct[rows])
    return StoppedAttack(stopped=stopped, last_correct=last_correct)


def _where(rows: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    return torch.where(rows.view(-1, 1, 1, 1), chosen, others)
