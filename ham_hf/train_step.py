"""One update of adversarial training, over all processes and accumulation steps.

Invariants held here:

- The inner maximization uses the unwrapped module; the outer minimization is one forward through the wrapped one.
- The loss of an update is the weighted mean over the rows of **all** processes and accumulation steps: gradients
  of the weighted sum are added up and divided once by the global weight, so 1, 2 and N processes agree. BatchNorm
  alone is different: in the training forward it sees the rows of its own process and accumulation step, as in any
  DDP training; its buffers are averaged over processes after every update, so all processes are equal copies.
- A process without a row to train on joins every collective with a forward that changes nothing. If no process has
  one, the update is skipped: parameters, momentum, averages and BatchNorm stay as they were.
- Every random stream is derived from (seed, epoch, step, rank), so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ham_hf.attacks import evaluation_mode
from ham_hf.data import PixelBatch
from ham_hf.metrics import count_per_class
from ham_hf.objectives import InnerAttack, Objective, OuterBatch
from ham_hf.seeding import Stream, derive_seed, make_generator


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient of an update is not finite; the update was not made."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the examples of one or more updates, of all processes.

    Attributes:
        loss: weighted losses.
        weight: weights; ``loss / weight`` is the mean loss.
        hard: hard examples.
        mined: examples that mining looked at.
        seen: all examples.
        seconds: time the updates took, waiting for data included; filled in by the trainer.
    """

    loss: float = 0.0
    weight: float = 0.0
    hard: float = 0.0
    mined: float = 0.0
    seen: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        """The sums over the updates of both."""
        return Totals(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


class TrainStep:
    """Makes updates of one model.

    Args:
        model: what ``accelerator.prepare`` made of the pixel model.
        optimizer: what it made of the optimizer.
        objective: training method.
        attack: attack of the inner maximization.
        accelerator: the accelerator.
        num_classes: number of classes, for the counts.
        seed: the run's seed.
        memory_format: layout of image batches.
        ema: moving average to update after every update that was made.
        max_grad_norm: clip the norm of the normalized gradient; None does not.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        attack: InnerAttack,
        accelerator: Accelerator,
        *,
        num_classes: int,
        seed: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        ema: ModelEmaV3 | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.objective, self.attack = model, optimizer, objective, attack
        self.accelerator, self.num_classes, self.seed = accelerator, num_classes, seed
        self.memory_format, self.ema, self.max_grad_norm = memory_format, ema, max_grad_norm
        self.module: nn.Module = accelerator.unwrap_model(model)
        self.class_counts = torch.zeros(2, num_classes, dtype=torch.long, device=accelerator.device)
        """Hard and mined examples of each class that this process has seen since the counts were last cleared."""

    def __call__(self, batches: Sequence[PixelBatch], *, epoch: int, step: int) -> Totals:
        """One update: per accumulation step an inner maximization, a forward and a backward; then the optimizer.

        Args:
            batches: this process's batches, one per accumulation step.
            epoch: 0-based epoch.
            step: 0-based update, for the random streams.

        Returns:
            Sums over all processes; ``weight`` is 0 if the update was skipped.

        Raises:
            NonFiniteLossError: if the loss or the gradient is not finite; nothing was updated.
        """
        rank, device = self.accelerator.process_index, self.accelerator.device
        totals = torch.zeros(6, device=device, dtype=batches[0].x.dtype)
        for number, (x, y, _) in enumerate(batches):
            # Dropout and stochastic depth draw from torch's global streams.
            torch.manual_seed(derive_seed(self.seed, Stream.MODEL, epoch, step, rank, number))
            batch = self.objective.outer_batch(
                self.module,
                x.contiguous(memory_format=self.memory_format),
                y,
                attack=self.attack,
                epoch=epoch,
                generator=make_generator(device, self.seed, Stream.ATTACK, epoch, step, rank, number),
            )
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._weighted_loss(batch, x)
                if loss is not None:
                    # DDP averages over processes; the division by the global weight wants their sum.
                    self.accelerator.backward(loss * self.accelerator.num_processes)
                    totals[0] += loss.detach()
            totals[1] += batch.weight.sum()
            totals[4] += len(y)
            if batch.hard is not None:
                totals[2] += batch.hard.sum()
                totals[3] += len(y)
                self.class_counts[0] += count_per_class(y, self.num_classes, batch.hard)
                self.class_counts[1] += count_per_class(y, self.num_classes)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if gradients:
            totals[5] = torch.stack([norm.to(totals.dtype) for norm in torch._foreach_norm(gradients)]).sum()
        # The only wait for the device in an update, apart from finding the hard rows.
        loss_sum, weight, hard, mined, seen, gradient_size = self.accelerator.reduce(totals, "sum").tolist()
        self._refuse_if_not_finite(loss_sum, gradient_size, step)
        self._update(gradients, weight, step)
        return Totals(loss=loss_sum, weight=weight, hard=hard, mined=mined, seen=seen)

    def _weighted_loss(self, batch: OuterBatch, x: Tensor) -> Tensor | None:
        """Sum of the weighted losses through the wrapped model; None if there is nothing to forward for."""
        if not len(batch.y):
            if self.accelerator.num_processes == 1:
                return None
            # Other processes wait in the reduction of the gradients: join with one row that costs and moves nothing.
            with evaluation_mode(self.model):
                idle: Tensor = self.model(x[:1]).sum() * 0
            return idle
        if len(batch.x) == 1:
            # BatchNorm refuses to normalize a single value; a copy of weight 0 leaves the row's normalization and
            # gradient as they are (the running variance alone, an unbiased estimate, counts the copy).
            batch = OuterBatch(
                x=batch.x.repeat(2, 1, 1, 1),
                y=batch.y.repeat(2),
                weight=torch.cat([batch.weight, batch.weight.new_zeros(1)]),
            )
        self.model.train()
        losses = self.objective.losses(self.model(batch.x), batch)
        return (losses * batch.weight).sum()

    def _refuse_if_not_finite(self, loss: float, gradient_size: float, step: int) -> None:
        if math.isfinite(loss) and math.isfinite(gradient_size):
            return
        self.optimizer.zero_grad()
        what = "gradient" if math.isfinite(loss) else "loss"
        raise NonFiniteLossError(
            f"the {what} of update {step} is not finite: the update was not made. Lower --learning_rate, lengthen "
            "--warmup_epochs, clip with --max_grad_norm, or use --mixed_precision no; if the last checkpoint is "
            "spoilt, resume from an earlier one"
        )

    def _update(self, gradients: list[Tensor], weight: float, step: int) -> None:
        """Normalize the gradients and step the optimizer, unless no process had a row to train on."""
        if weight == 0:
            self.optimizer.zero_grad()
            return
        torch._foreach_div_(gradients, weight)
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average_buffers()
        if self.ema is not None:
            self.ema.update(self.module, step=step + 1)

    def _average_buffers(self) -> None:
        """Make all processes equal again after a training forward: average BatchNorm's statistics, largest counts."""
        if self.accelerator.num_processes == 1:
            return
        for floating in (True, False):
            buffers = [buffer for buffer in self.module.buffers() if buffer.is_floating_point() == floating]
            if not buffers:
                continue
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            copies = self.accelerator.gather(flat[None])
            agreed = copies.mean(0) if floating else copies.amax(0)
            parts = torch.split(agreed, [buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
