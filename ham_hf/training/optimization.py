"""Optimizer and learning-rate schedule: timm's, plus the one schedule timm cannot express."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ham_hf.training.config import TrainingConfig


class PiecewiseScheduler(Scheduler):
    """The learning rate times a factor that changes at given times, with a linear warm-up of ``warmup_t``.

    timm's multi-step schedule multiplies by the same rate at every milestone; adversarial training papers use
    drops such as 1/10, 1/100, 1/200 (HAM, GAIRAT). ``drops`` are (time, factor) pairs, times in epochs or updates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        drops: Sequence[tuple[float, float]],
        *,
        warmup_t: float = 0,
        t_in_epochs: bool = True,
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=t_in_epochs)
        self.drops = tuple(drops)
        self.warmup_t = warmup_t
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: float) -> list[float]:
        factor = 1.0
        for time, value in self.drops:
            if t >= time:
                factor = value
        if t < self.warmup_t:
            factor *= (t + 1) / (self.warmup_t + 1)
        return [base * factor for base in self.base_values]


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that timm does not have, with a ValueError that names the nearest ones."""
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"--optimizer {name} is not one of timm's; did you mean {', '.join(near)}?")
    if name == "adahessian":
        raise ValueError(f"--optimizer {name} needs second derivatives, which no training step here computes")


def create_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of the settings, by timm's name: "momentum" is SGD with plain momentum, "sgd" is Nesterov's.

    Layer decay goes by timm's division of its networks into layers; the classifier has the full rate.

    Raises:
        ValueError: if timm cannot tell the layers of the network apart.
    """
    if config.layer_decay is not None:
        # Only the network itself knows its layers, not the normalization around it, which has no parameters.
        model = getattr(model, "backbone", model)
        if not hasattr(model, "group_matcher"):
            raise ValueError(
                f"--layer_decay {config.layer_decay:g}: timm does not say what the layers of {type(model).__name__} "
                "are; leave it out"
            )
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        filter_bias_and_bn=not config.decay_norm_and_bias,
        layer_decay=config.layer_decay,
    )
    return optimizer


def create_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, *, updates_per_epoch: int) -> Scheduler:
    """The schedule of the settings; it sets the rate of the first update and is told of every later one."""
    per_epoch = config.lr_step_unit == "epoch"
    unit = 1 if per_epoch else updates_per_epoch
    if config.lr_scheduler_type == "piecewise":
        return PiecewiseScheduler(
            optimizer,
            [(drop.epoch * unit, drop.factor) for drop in config.lr_drops],
            warmup_t=config.warmup_epochs * unit,
            t_in_epochs=per_epoch,
        )
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # A step schedule with rate 1: older timm has no schedule called constant.
        sched="step" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type,
        num_epochs=config.num_train_epochs,
        decay_epochs=config.num_train_epochs,
        decay_rate=1.0,
        min_lr=config.min_learning_rate,
        # The first update must not have the rate 0; this makes the ramp (t + 1) / (warmup + 1).
        warmup_lr=optimizer.param_groups[0]["lr"] / (config.warmup_epochs * unit + 1),
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # fractions work
        step_on_epochs=per_epoch,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def set_learning_rate(scheduler: Scheduler, *, epoch: int, step: int) -> float:
    """Set and return the learning rate of 0-based update ``step`` in 0-based ``epoch``.

    A schedule is a function of time alone, so a resumed run needs no state of it.
    """
    scheduler.step(epoch)
    scheduler.step_update(step)
    # With layer decay the groups differ; the highest rate is the scheduled one.
    return float(max(group["lr"] for group in scheduler.optimizer.param_groups))
