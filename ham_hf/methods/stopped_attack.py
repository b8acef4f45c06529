"""PGD that drops an example soon after the model gets it wrong: the attack of FAT and BAT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ham_hf.attacks import Attack, LossFn, attack_mode, check_batch, input_gradient, predicted
from ham_hf.mining import RowLoss


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
        loss_fn: what to increase, per example; a `RowLoss` is told which rows are left.
        tau: number of further steps that a wrong example is given, >= 0.
        noise: standard deviation of Gaussian noise added at every step before projection, in pixel units.
        generator: source of that noise, drawn for the whole batch.

    Raises:
        ValueError: if the batch is malformed.
    """
    check_batch(x, y)
    watched = WatchedLoss(loss_fn)
    x_adv = start.detach()
    stopped, last_correct = x_adv.clone(), x_adv.clone()
    rows, budget = torch.arange(len(y), device=y.device), torch.full_like(y, tau)
    unbroken = torch.ones_like(y, dtype=torch.bool)
    with attack_mode(model):
        for _ in range(attack.num_steps):
            if not len(rows):
                break
            gradient = input_gradient(model, x_adv, y, watched)
            wrong = watched.wrong
            unbroken &= ~wrong
            last_correct[rows] = _where(unbroken, x_adv, last_correct[rows])
            left = (~wrong | (budget > 0)).nonzero().squeeze(1)
            attack = attack.rows(left)
            watched.keep(left)
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


class WatchedLoss:
    """A loss of an attack that also notes which rows the last call found misclassified: ``wrong`` (N,)."""

    wrong: Tensor

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        self.wrong = predicted(logits.detach()) != y
        return self.loss_fn(logits, y)

    def keep(self, rows: Tensor) -> None:
        if isinstance(self.loss_fn, RowLoss):
            self.loss_fn.keep(rows)


def _where(rows: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    return torch.where(rows.view(-1, 1, 1, 1), chosen, others)
