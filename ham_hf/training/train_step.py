"""One update of adversarial training, over all processes and accumulation steps.

Invariants held here:

- The inner maximization uses the unwrapped module; the outer minimization is one forward through the wrapped one.
- The loss of an update is a sum of terms, each a weighted mean over the rows of **all** processes and accumulation
  steps: weights are divided by their global sums before the forward, so 1, 2 and N processes agree. BatchNorm
  alone is different: in the training forward it sees the rows of its own process and accumulation step, as in any
  DDP training; its buffers are averaged over processes after every update, so all processes are equal copies.
- A process without a row to train on joins every collective with a forward that changes nothing. If no process has
  one, the update is skipped: parameters, momentum, averages and BatchNorm stay as they were.
- Every random stream is derived from (seed, epoch, step, rank), so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ham_hf.attacks import Attack, evaluation_mode, predicted
from ham_hf.data import PixelBatch
from ham_hf.methods import Method, OuterBatch, statistics_dtype
from ham_hf.precision import attack_passes
from ham_hf.seeding import Stream, derive_seed, make_generator
from ham_hf.training.method_state import MethodState
from ham_hf.training.passes import PassCounter
from ham_hf.training.sharding import gathered, local_part
from ham_hf.training.weight_perturbation import awp_direction, perturbable, perturbed, preserved_buffers

CLEAN_EVERY = 16
"""Updates of which one pays a forward of the clean images, for a log of how many are wrong without an attack: half a
percent of a short attack's passes at most."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient of an update is not finite, and it was not made; or what it led to is not finite."""


STAY_FINITE = (
    "Lower --learning_rate, lengthen --warmup_epochs, clip with --max_grad_norm, or use --mixed_precision no; if the "
    "last checkpoint is spoilt, resume from an earlier one"
)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over one or more updates, of all processes.

    Attributes:
        loss: losses of the updates.
        updates: updates that were made, skipped ones excluded; ``loss / updates`` is the mean loss.
        overflows: updates that were skipped as a gradient overflowed in float16.
        hard: hard examples.
        mined: examples that mining looked at.
        seen: all examples.
        seconds: time the updates took, waiting for data included; filled in by the trainer.
        stops: requests to stop, of all processes.
        passes: passes over the network; see `ham_hf.training.passes`.
    """

    loss: float = 0.0
    updates: float = 0.0
    overflows: float = 0.0
    hard: float = 0.0
    mined: float = 0.0
    seen: float = 0.0
    seconds: float = 0.0
    stops: float = 0.0
    passes: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        """The sums over the updates of both."""
        return Totals(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


@dataclass(frozen=True, eq=False, kw_only=True)
class _Work:
    """One accumulation step of an update after its inner maximization.

    Attributes:
        number: position in the update.
        x: clean images of the whole batch.
        y: their labels.
        batch: the rows to train on.
        weight: (T, E) weight of each term and example; divided by the global divisor once that is known.
    """

    number: int
    x: Tensor
    y: Tensor
    batch: OuterBatch
    weight: Tensor


class TrainStep:
    """Makes updates of one model.

    Args:
        model: what ``accelerator.prepare`` made of the pixel model.
        optimizer: what it made of the optimizer.
        objective: training method.
        attack: attack of the inner maximization.
        accelerator: the accelerator.
        class_counts: (num_classes,) number of training images of each class.
        seed: the run's seed.
        memory_format: layout of image batches.
        ema: moving average to update after every update that was made.
        max_grad_norm: clip the norm of the normalized gradient; None does not.
        awp_gamma: size of the adversarial weight perturbation, relative to the norm of each weight; None does without.
        awp_start_epoch: first 0-based epoch that perturbs weights.
        attack_precision: "training" attacks in the precision of the training forward, "bf16" and "fp16" in their own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Method,
        attack: Attack,
        accelerator: Accelerator,
        *,
        class_counts: Tensor,
        seed: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        ema: ModelEmaV3 | None = None,
        max_grad_norm: float | None = None,
        awp_gamma: float | None = None,
        awp_start_epoch: int = 0,
        attack_precision: str = "training",
    ) -> None:
        self.model, self.optimizer, self.objective, self.attack = model, optimizer, objective, attack
        self.accelerator, self.seed = accelerator, seed
        self.memory_format, self.ema, self.max_grad_norm = memory_format, ema, max_grad_norm
        self.awp_gamma, self.awp_start_epoch = awp_gamma, awp_start_epoch
        self.module: nn.Module = accelerator.unwrap_model(model)
        self.attacked = attack_passes(self.module, attack_precision)
        device = accelerator.device
        self.method_state = MethodState(objective, class_counts.to(device, statistics_dtype(device)))
        """Class state of the method, and the log of the epoch."""
        self.passes = PassCounter()
        """Counts the passes over the network that nothing has added up yet."""
        self.passes.watch(self.module)

    def __call__(
        self,
        batches: Sequence[PixelBatch],
        *,
        epoch: int,
        step: int,
        stop: Callable[[], str | None] = lambda: None,
    ) -> Totals:
        """One update: all inner maximizations, then a forward and a backward each; then the optimizer.

        Args:
            batches: this process's batches, one per accumulation step.
            epoch: 0-based epoch.
            step: 0-based update, for the random streams.
            stop: gives a reason to stop after this update, if there is one; ``stops`` tells the other processes.

        Returns:
            Sums over all processes; ``updates`` is 0 if the update was skipped, for want of a row to train on or as
            its gradient overflowed in float16: the scale of the loss is lower then.

        Raises:
            NonFiniteLossError: if the loss or the gradient is not finite; nothing was updated.
        """
        place = (epoch, step)
        with gathered(self.accelerator, self.module):
            outer = self._inner_maximization(batches, place)
            self._preview(batches, outer, place)
            self._note_clean(batches, outer, place)
        works, divisor = self._weigh(batches, outer, epoch)
        scaled = self.accelerator.scaler is not None
        before = [buffer.clone() for buffer in self.module.buffers()] if scaled else []
        with self._perturbed_weights(works, place) as ascent_size:
            loss, observed = self._backward(works, place)
            sums = torch.zeros(7, device=divisor.device, dtype=divisor.dtype)
            sums[0] = loss
            sums[1] = ascent_size + self._gradient_size()
            sums[2:5] = self._counts(works)
            sums[5] = float(stop() is not None)
            sums[6] = self.passes.take()
            sums = self.accelerator.reduce(torch.cat([sums, observed]), "sum")
            # The only wait for the device in an update, apart from finding the hard rows.
            total, gradient_size, seen, hard, mined, stops, passes, weight = torch.cat(
                [sums[:7], divisor.amax()[None]]
            ).tolist()
            overflow = weight > 0 and self._overflowed(total, gradient_size)
            if not overflow:
                self._refuse_if_not_finite(total, gradient_size, step)
            if weight > 0:
                self._update(overflow=overflow)
        self.optimizer.zero_grad()
        self.method_state.after_update(sums[7:], epoch=epoch)
        made = weight > 0 and not overflow
        if overflow:
            for buffer, old in zip(self.module.buffers(), before, strict=True):
                buffer.copy_(old)
        if made:
            self._average_buffers()
            if self.ema is not None:
                self.ema.update(self.module, step=step + 1)
        return Totals(
            loss=0.0 if overflow else total,
            updates=float(made),
            overflows=float(overflow),
            hard=hard,
            mined=mined,
            seen=seen,
            stops=stops,
            passes=passes,
        )

    def _inner_maximization(self, batches: Sequence[PixelBatch], place: tuple[int, int]) -> list[OuterBatch]:
        rank = self.accelerator.process_index
        return self.objective.outer_batches(
            self.attacked,
            [
                (
                    batch.x.contiguous(memory_format=self.memory_format),
                    batch.y,
                    make_generator(batch.x.device, self.seed, Stream.ATTACK, *place, rank, number),
                )
                for number, batch in enumerate(batches)
            ],
            attack=self.attack,
            epoch=place[0],
            states=self.method_state.states,
        )

    def _preview(self, batches: Sequence[PixelBatch], outer: Sequence[OuterBatch], place: tuple[int, int]) -> None:
        """Show the class rule the training logits of all rows before it weighs them, if it asks for them."""
        rule, num_classes = self.objective.weights, self.method_state.num_classes
        if rule is None or not rule.wants_preview:
            return
        sums = []
        for number, (source, batch) in enumerate(zip(batches, outer, strict=True)):
            logits = source.x.new_zeros(0, num_classes)
            if len(batch.y):
                with torch.no_grad(), preserved_buffers(self.module):
                    logits = self._training_forward(self.module, batch, number, place)
            labels = batch.adversarial_y
            sums.append(rule.preview(logits[: len(labels)], labels, num_classes))
        total = self.accelerator.reduce(torch.stack(sums).sum(0), "sum")
        rule.before_update(self.method_state.states[rule.name], total)

    def _note_clean(self, batches: Sequence[PixelBatch], outer: Sequence[OuterBatch], place: tuple[int, int]) -> None:
        """In every `CLEAN_EVERY`-th update, log what is wrong without an attack beside what is wrong at its start."""
        if place[1] % CLEAN_EVERY or outer[0].wrong_at_start is None:
            return
        with evaluation_mode(self.module), torch.no_grad():
            for batch in batches:
                logits = self.attacked(batch.x.contiguous(memory_format=self.memory_format))
                self.method_state.note_clean(batch.y, predicted(logits) != batch.y)

    def _weigh(
        self, batches: Sequence[PixelBatch], outer: Sequence[OuterBatch], epoch: int
    ) -> tuple[list[_Work], Tensor]:
        """Weights of all rows, divided by the sums over all processes (invariant 3), and those sums (T,)."""
        states = self.method_state.states
        weighed = [self.objective.weigh(batch, epoch=epoch, states=states) for batch in outer]
        dtype = self.method_state.log.dtype
        divisor = self.accelerator.reduce(torch.stack([part.to(dtype) for _, part in weighed]).sum(0), "sum")
        # Where nothing is trained on there is nothing to divide either.
        safe = torch.where(divisor > 0, divisor, 1)
        works = []
        for number, (source, batch, (weight, _)) in enumerate(zip(batches, outer, weighed, strict=True)):
            share = weight / safe.to(weight.dtype)[:, None]
            works.append(_Work(number=number, x=source.x, y=source.y, batch=batch, weight=share))
            self.method_state.note(source.y, batch, share)
        return works, divisor

    @contextmanager
    def _perturbed_weights(self, works: Sequence[_Work], place: tuple[int, int]) -> Iterator[float | Tensor]:
        """AWP: make the update at weights that are themselves moved against the loss; gives the size of its gradient.

        The length of a gradient does not matter to the move, so neither does the scale of a loss in float16.
        """
        if self.awp_gamma is None or place[0] < self.awp_start_epoch:
            yield 0.0
            return
        with preserved_buffers(self.module):
            self._backward(works, place)
        parameters = perturbable(self.module)
        directions, size = awp_direction(parameters), self._gradient_size()
        self.optimizer.zero_grad()
        with perturbed(parameters, directions, self.awp_gamma):
            yield size

    def _counts(self, works: Sequence[_Work]) -> Tensor:
        """Examples of this process: all, hard ones, and those that mining looked at."""
        counts = self.method_state.log.new_zeros(3)
        for work in works:
            counts[0] += len(work.y)
            if work.batch.hard is not None:
                counts[1] += work.batch.hard.sum()
                counts[2] += len(work.y)
        return counts

    def _gradient_size(self) -> Tensor:
        """Sum of the norms of this process's gradients: not finite if one of them is not."""
        gradients = [local_part(one.grad) for one in self.module.parameters() if one.grad is not None]
        log = self.method_state.log
        if not gradients:
            return log.new_zeros(())
        return torch.stack([norm.to(log) for norm in torch._foreach_norm(gradients)]).sum()

    def _backward(self, works: Sequence[_Work], place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Forward and backward of all accumulation steps; this process's part of the loss, and what it observed."""
        losses, observed = [], []
        for work in works:
            last = work.number == len(works) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                if len(work.batch.y):
                    logits = self._training_forward(self.model, work.batch, work.number, place)
                    loss = (self.objective.losses(logits, work.batch) * work.weight).sum()
                else:
                    logits = work.x.new_zeros(0, self.method_state.num_classes)
                    loss = self._idle_forward(work.x)
                if loss.requires_grad:
                    # DDP averages over processes; the division by the global sums wants their sum.
                    self.accelerator.backward(loss * self.accelerator.num_processes)
            losses.append(loss.detach())
            observed.append(self.method_state.observe(logits, work.batch, work.y, epoch=place[0]))
        return torch.stack(losses).sum(), torch.stack(observed).sum(0)

    def _training_forward(self, model: nn.Module, batch: OuterBatch, number: int, place: tuple[int, int]) -> Tensor:
        """Logits (R, num_classes) of the rows in training mode."""
        # Dropout and stochastic depth draw from torch's global streams.
        torch.manual_seed(derive_seed(self.seed, Stream.MODEL, *place, self.accelerator.process_index, number))
        model.train()
        # BatchNorm refuses to normalize a single value; a copy whose logits nobody uses leaves the row's normalization
        # and gradient as they are (the running variance alone, an unbiased estimate, counts the copy).
        rows = batch.x if len(batch.x) > 1 else batch.x.repeat(2, 1, 1, 1)
        logits: Tensor = model(rows)
        return logits[: len(batch.x)]

    def _idle_forward(self, x: Tensor) -> Tensor:
        """A loss that moves nothing, for a process without a row to train on."""
        if self.accelerator.num_processes == 1:
            return x.new_zeros(())
        # Other processes wait in the reduction of the gradients: join with one row that costs and moves nothing.
        with evaluation_mode(self.model):
            idle: Tensor = self.model(x[:1]).sum() * 0
        return idle

    def _refuse_if_not_finite(self, loss: float, gradient_size: float, step: int) -> None:
        if math.isfinite(loss) and math.isfinite(gradient_size):
            return
        self.optimizer.zero_grad()
        what = "gradient" if math.isfinite(loss) else "loss"
        raise NonFiniteLossError(f"the {what} of update {step} is not finite: the update was not made. {STAY_FINITE}")

    def _overflowed(self, loss: float, gradient_size: float) -> bool:
        """Whether the gradient is not finite because the loss is multiplied by too much before its backward."""
        if not math.isfinite(loss) or math.isfinite(gradient_size):
            return False
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _update(self, *, overflow: bool) -> None:
        """Step, or tell the scaler of an overflow: it makes no step and lowers the scale."""
        if overflow:
            # All of them, as it may have been the gradient of the perturbation alone, which the scaler has not seen.
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)
        elif self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()

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
