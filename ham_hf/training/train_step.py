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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ham_hf.attacks import Attack, evaluation_mode, predicted
from ham_hf.data import PixelBatch
from ham_hf.methods import Batch, Method, TrainingRows, statistics_dtype
from ham_hf.precision import attack_passes
from ham_hf.seeding import Stream, derive_seed, make_generator
from ham_hf.training.config import TrainingConfig
from ham_hf.training.method_state import MethodState
from ham_hf.training.sharding import gathered, local_part, memory_format_of
from ham_hf.training.weight_perturbation import awp_direction, perturbable, perturbed, preserved_buffers

CLEAN_EVERY = 16
"""Updates of which one pays a forward of the clean images, for a log of how many are wrong without an attack: half a
percent of a short attack's passes at most."""


class NonFiniteLossError(RuntimeError):
    """The loss or gradient of an update is not finite, so it was not made; or logits or weights are not finite."""


STAY_FINITE = (
    "Lower --learning_rate, lengthen --warmup_epochs, clip with --max_grad_norm, or use --mixed_precision no; if the "
    "last checkpoint is spoiled, resume from an earlier one"
)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over one or more updates, of all processes.

    Attributes:
        loss: losses of the updates.
        updates: updates that were made, skipped ones excluded.
        overflows: updates that were skipped as a gradient overflowed in float16.
        hard: hard examples.
        mined: examples that were mined.
        seen: all examples.
        seconds: time the updates took, waiting for data included; filled in by the trainer.
        stops: requests to stop.
        passes: passes over the network; see `PassCounter`.
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
        return Totals(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


@dataclass(frozen=True, eq=False, kw_only=True)
class _WeighedBatch:
    """The batch of one accumulation step, its rows to train on, and their shares (T, E) in the loss."""

    batch: Batch
    rows: TrainingRows
    share: Tensor


class TrainStep:
    """Makes updates of one model by a method, with an attack for its inner maximization.

    ``model`` and ``optimizer`` are what ``accelerator.prepare`` made of the pixel model and its optimizer,
    ``class_counts`` (num_classes,) the numbers of training images of each class; ``average`` follows every update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        attack: Attack,
        accelerator: Accelerator,
        config: TrainingConfig,
        *,
        class_counts: Tensor,
        average: ModelEmaV3 | None = None,
    ) -> None:
        self.model, self.optimizer, self.method, self.attack = model, optimizer, method, attack
        self.accelerator, self.config, self.average = accelerator, config, average
        self.memory_format = memory_format_of(config, accelerator)
        self.module: nn.Module = accelerator.unwrap_model(model)
        self.attacked = attack_passes(self.module, config.attack_precision, accelerator.mixed_precision)
        device = accelerator.device
        self.method_state = MethodState(method, class_counts.to(device, statistics_dtype(device)))
        """Class state of the method, and the log of the epoch."""
        self.passes = PassCounter()
        """Counts the passes over the network that nothing has added up yet."""
        self.passes.watch(self.module)

    def __call__(
        self, batches: Sequence[PixelBatch], *, epoch: int, step: int, stop: Callable[[], str | None] = lambda: None
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
        when = (epoch, step)
        to_attack = [self._to_attack(batch, number, when) for number, batch in enumerate(batches)]
        with gathered(self.accelerator, self.module):
            chosen = self.method.rows_of_update(self.attacked, to_attack)
            self._preview(chosen, when)
            self._note_clean(to_attack, chosen, step)
        weighed, divisor = self._weigh(to_attack, chosen)
        scaled = self.accelerator.scaler is not None
        before = [buffer.clone() for buffer in self.module.buffers()] if scaled else []
        with self._perturbed_weights(weighed, when) as ascent_size:
            loss, observed = self._backward(weighed, when)
            mine: dict[str, Tensor | float] = {
                "loss": loss,
                "gradient_size": ascent_size + self._gradient_size(),
                **self._counts(weighed),
                "stops": float(stop() is not None),
                "passes": self.passes.take(),
            }
            total, observed = self._over_all_processes(mine, observed, divisor)
            overflow = total["weight"] > 0 and self._overflowed(total)
            if not overflow:
                self._refuse_if_not_finite(total, step)
            if total["weight"] > 0:
                self._update(overflow=overflow)
        self.optimizer.zero_grad()
        self.method_state.after_update(observed, epoch=epoch)
        made = total["weight"] > 0 and not overflow
        if overflow:
            for buffer, old in zip(self.module.buffers(), before, strict=True):
                buffer.copy_(old)
        if made:
            self._average_buffers()
            if self.average is not None:
                self.average.update(self.module, step=step + 1)
        return Totals(
            loss=0.0 if overflow else total["loss"],
            updates=float(made),
            overflows=float(overflow),
            **{name: total[name] for name in ("hard", "mined", "seen", "stops", "passes")},
        )

    def _over_all_processes(
        self, mine: Mapping[str, Tensor | float], observed: Mapping[str, Tensor], divisor: Tensor
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Named numbers and the method's observations, each added up over all processes.

        ``weight`` is the largest of the divisors, which are added up already: 0 where nothing is trained on.
        """
        row = divisor.new_zeros(len(mine))
        for position, value in enumerate(mine.values()):
            row[position] = value
        sums = self.accelerator.reduce(torch.cat([row, *map(torch.flatten, observed.values())]), "sum")
        numbers, *parts = sums.split([len(mine), *(one.numel() for one in observed.values())])
        # The only wait for the device in an update, apart from finding the hard rows.
        found = torch.cat([numbers, divisor.amax()[None]]).tolist()
        everywhere = {name: part.view_as(observed[name]) for name, part in zip(observed, parts, strict=True)}
        return dict(zip([*mine, "weight"], found, strict=True)), everywhere

    def _to_attack(self, batch: PixelBatch, number: int, when: tuple[int, int]) -> Batch:
        """One accumulation step of an update, with the random stream of its epoch and update."""
        rank = self.accelerator.process_index
        return Batch(
            x=batch.x.contiguous(memory_format=self.memory_format),
            y=batch.y,
            attack=self.attack,
            epoch=when[0],
            states=self.method_state.states,
            generator=make_generator(batch.x.device, self.config.seed, Stream.ATTACK, *when, rank, number),
        )

    def _preview(self, chosen: Sequence[TrainingRows], when: tuple[int, int]) -> None:
        """Show the class rule the training logits of all rows before it weighs them, if it asks for them."""
        rule, num_classes = self.method.weights, self.method_state.num_classes
        if rule is None or not rule.wants_preview:
            return
        sums = []
        for number, rows in enumerate(chosen):
            logits = rows.x.new_zeros(0, num_classes)
            if len(rows.y):
                with torch.no_grad(), preserved_buffers(self.module):
                    logits = self._training_forward(self.module, rows, number, when)
            labels = rows.adversarial_y
            sums.append(rule.preview(logits[: len(labels)], labels, num_classes))
        total = self.accelerator.reduce(torch.stack(sums).sum(0), "sum")
        rule.before_update(self.method_state.states[rule.name], total)

    def _note_clean(self, batches: Sequence[Batch], chosen: Sequence[TrainingRows], step: int) -> None:
        """In every `CLEAN_EVERY`-th update, also log which examples are wrong without an attack."""
        if step % CLEAN_EVERY or chosen[0].wrong_at_start is None:
            return
        with evaluation_mode(self.module), torch.no_grad():
            for batch in batches:
                self.method_state.note_clean(batch.y, predicted(self.attacked(batch.x)) != batch.y)

    def _weigh(self, batches: Sequence[Batch], chosen: Sequence[TrainingRows]) -> tuple[list[_WeighedBatch], Tensor]:
        """Weights of all rows, divided by the sums over all processes, and those sums (T,)."""
        epoch, states = batches[0].epoch, self.method_state.states
        weights = [self.method.weigh(rows, epoch=epoch, states=states) for rows in chosen]
        dtype = self.method_state.log.dtype
        divisor = self.accelerator.reduce(torch.stack([part.to(dtype) for _, part in weights]).sum(0), "sum")
        # Where nothing is trained on there is nothing to divide either.
        safe = torch.where(divisor > 0, divisor, 1)
        weighed = []
        for batch, rows, (weight, _) in zip(batches, chosen, weights, strict=True):
            share = weight / safe.to(weight.dtype)[:, None]
            weighed.append(_WeighedBatch(batch=batch, rows=rows, share=share))
            self.method_state.note(batch.y, rows, share)
        return weighed, divisor

    @contextmanager
    def _perturbed_weights(self, weighed: Sequence[_WeighedBatch], when: tuple[int, int]) -> Iterator[float | Tensor]:
        """AWP: make the update at weights that are themselves moved against the loss; gives the size of its gradient.

        The length of a gradient does not matter to the move, so neither does the scale of a loss in float16.
        """
        gamma = self.config.awp_gamma
        if gamma is None or when[0] < self.config.awp_start_epoch:
            yield 0.0
            return
        with preserved_buffers(self.module):
            self._backward(weighed, when)
        parameters = perturbable(self.module)
        directions, size = awp_direction(parameters), self._gradient_size()
        self.optimizer.zero_grad()
        with perturbed(parameters, directions, gamma):
            yield size

    def _counts(self, weighed: Sequence[_WeighedBatch]) -> dict[str, Tensor]:
        """Examples of this process: all, hard ones, and those that were mined."""
        seen, hard, mined = self.method_state.log.new_zeros(3).unbind()
        for one in weighed:
            seen += len(one.batch.y)
            if one.rows.hard is not None:
                hard += one.rows.hard.sum()
                mined += len(one.batch.y)
        return {"seen": seen, "hard": hard, "mined": mined}

    def _gradient_size(self) -> Tensor:
        """Sum of the norms of this process's gradients: not finite if one of them is not."""
        gradients = [local_part(one.grad) for one in self.module.parameters() if one.grad is not None]
        log = self.method_state.log
        if not gradients:
            return log.new_zeros(())
        return torch.stack([norm.to(log) for norm in torch._foreach_norm(gradients)]).sum()

    def _backward(self, weighed: Sequence[_WeighedBatch], when: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of all accumulation steps; this process's part of the loss, and its observations."""
        losses, observed = [], []
        for number, one in enumerate(weighed):
            batch, rows = one.batch, one.rows
            last = number == len(weighed) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                if len(rows.y):
                    logits = self._training_forward(self.model, rows, number, when)
                    loss = (self.method.losses(logits, rows) * one.share).sum()
                else:
                    logits = batch.x.new_zeros(0, self.method_state.num_classes)
                    loss = self._idle_forward(batch.x)
                if loss.requires_grad:
                    # DDP averages over processes; the division by the global sums wants their sum.
                    self.accelerator.backward(loss * self.accelerator.num_processes)
            losses.append(loss.detach())
            observed.append(self.method_state.observe(logits, rows, batch.y, epoch=batch.epoch))
        sums = {name: torch.stack([one[name] for one in observed]).sum(0) for name in observed[0]}
        return torch.stack(losses).sum(), sums

    def _training_forward(self, model: nn.Module, rows: TrainingRows, number: int, when: tuple[int, int]) -> Tensor:
        """Logits (R, num_classes) of the rows in training mode."""
        # Dropout and stochastic depth draw from torch's global streams.
        torch.manual_seed(derive_seed(self.config.seed, Stream.MODEL, *when, self.accelerator.process_index, number))
        model.train()
        # BatchNorm needs at least two values, so duplicate a lone row and discard the copy's logits. Batch statistics
        # and gradients are unchanged; only the unbiased running variance sees n = 2.
        x = rows.x if len(rows.x) > 1 else rows.x.repeat(2, 1, 1, 1)
        logits: Tensor = model(x)
        return logits[: len(rows.x)]

    def _idle_forward(self, x: Tensor) -> Tensor:
        """A loss that moves nothing, for a process without a row to train on."""
        if self.accelerator.num_processes == 1:
            return x.new_zeros(())
        # Other processes wait in the reduction of the gradients: join with one row that costs and moves nothing.
        with evaluation_mode(self.model):
            idle: Tensor = self.model(x[:1]).sum() * 0
        return idle

    def _refuse_if_not_finite(self, total: Mapping[str, float], step: int) -> None:
        if math.isfinite(total["loss"]) and math.isfinite(total["gradient_size"]):
            return
        self.optimizer.zero_grad()
        what = "gradient" if math.isfinite(total["loss"]) else "loss"
        raise NonFiniteLossError(f"the {what} of update {step} is not finite: the update was not made. {STAY_FINITE}")

    def _overflowed(self, total: Mapping[str, float]) -> bool:
        """Whether the gradient is not finite because the loss is multiplied by too much before its backward."""
        if not math.isfinite(total["loss"]) or math.isfinite(total["gradient_size"]):
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
        elif self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
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


class PassCounter:
    """Count this process's passes over the watched modules.

    The unit is one forward of one image: a count of arithmetic, not of time. With its forward, a gradient of the input
    costs 2, one of input and parameters 3. (In much published code a step of an attack costs 3; here it costs 2.) A
    module that is deep-copied later has its own counter, which nothing reads.
    """

    def __init__(self) -> None:
        self._passes = 0

    def watch(self, module: nn.Module) -> None:
        """Count every call of ``module``, whose first argument is a batch (N, C, H, W)."""
        module.register_forward_pre_hook(self._count)

    def take(self) -> int:
        """The passes since the last call."""
        passes, self._passes = self._passes, 0
        return passes

    # A compiled network would trace the counter, and be compiled anew at every number.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        cost = 1
        if torch.is_grad_enabled():
            cost = 3 if module.training else 2 if x.requires_grad else 1
        self._passes += cost * len(x)
