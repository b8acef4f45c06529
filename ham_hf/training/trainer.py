"""The training loop, on accelerate: epochs, validation, selection, checkpoints and resuming."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ham_hf.attacks import Attack, check_pixel_range
from ham_hf.data import ImageData, PixelBatch, UpdateLayout
from ham_hf.evaluation import NonFiniteLogitsError, Workplace
from ham_hf.faults import explain_out_of_memory, smaller_batch
from ham_hf.methods import ClassRule, Method
from ham_hf.methods.rule_method import as_recorded
from ham_hf.precision import attack_passes
from ham_hf.training.averaging import GatedAverage
from ham_hf.training.checkpoint import (
    Checkpoint,
    CheckpointWriteError,
    list_checkpoints,
    load_best,
    load_checkpoint,
    rewind,
)
from ham_hf.training.config import TrainingConfig
from ham_hf.training.data_order import epoch_batches, training_class_counts
from ham_hf.training.log import RunLog
from ham_hf.training.optimization import create_optimizer, create_scheduler, set_learning_rate
from ham_hf.training.resume import (
    Progress,
    agreed_checkpoint,
    anywhere,
    changeable,
    check_same_run,
    keep_update_size,
    note_changes,
    run_plan,
)
from ham_hf.training.run_folder import RunFiles
from ham_hf.training.sharding import gathered, load_model, load_optimizer, memory_format_of, prepare, whole_state
from ham_hf.training.stopping import TrainingStopped
from ham_hf.training.train_step import STAY_FINITE, NonFiniteLossError, Totals, TrainStep
from ham_hf.training.validation import HeldOutAccuracy, HeldOutPart, held_out_record, selection_score

logger = logging.getLogger(__name__)


class Trainer:
    """Adversarial training of one model.

    Args:
        model: pixel model (pixels in [0, 1] to logits); moved to the accelerator's device.
        data: training and held-out images.
        method: training method.
        attack: attack of the inner maximization; its threat model also measures the held-out robustness.
        config: settings of the training loop.
        accelerator: from one CPU process to many nodes.
        eval_batch_size: images per batch and process when validating.
        plan_besides: what else a run that continues has to share, by the name of its setting, in JSON types.
        after_save: called on the main process after every checkpoint; an exception in it is logged.

    Attributes:
        config: those settings, with the accumulation that keeps the size of the updates of a run that continues.
        checkpoint: the one that they name to continue from, or None.

    Raises:
        ValueError: if the training split is smaller than one update's batch, there is no such checkpoint, or no
            accumulation keeps the size of its run's updates.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        method: Method,
        attack: Attack,
        config: TrainingConfig,
        accelerator: Accelerator,
        *,
        eval_batch_size: int = 256,
        after_save: Callable[[Trainer], None] | None = None,
        plan_besides: Mapping[str, object] | None = None,
    ) -> None:
        self.checkpoint = agreed_checkpoint(config, accelerator)
        config = keep_update_size(config, self.checkpoint, num_processes=accelerator.num_processes)
        self.data, self.method, self.attack, self.config = data, method, attack, config
        self.accelerator, self.eval_batch_size, self.after_save = accelerator, eval_batch_size, after_save
        self.output_dir = Path(config.output_dir)
        self.files = RunFiles(self.output_dir, config.save_total_limit)
        self.num_classes = len(data.class_names)
        self.layout = UpdateLayout(
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            world=accelerator.num_processes,
            rank=accelerator.process_index,
            seed=config.seed,
        )
        self._count_updates()
        self._warn_of_late_starts()
        model = model.to(accelerator.device).to(memory_format=memory_format_of(config, accelerator))
        # Made before prepare() changes the forward: the average is always evaluated in float32.
        self.average: ModelEmaV3 | GatedAverage | None = None
        if config.uses_fawa(method):
            self.average = GatedAverage(model, config.fawa_decay, config.fawa_threshold)
        elif config.ema_decay is not None:
            self.average = ModelEmaV3(model, decay=config.ema_decay)
        if config.torch_compile:
            # In place, so that the names of weights stay; dynamic, as the number of hard rows changes.
            model.compile(dynamic=True)
        optimizer = create_optimizer(model, config)
        self.scheduler = create_scheduler(optimizer, config, updates_per_epoch=self.updates_per_epoch)
        wrapped, self.optimizer = prepare(accelerator, model, optimizer)
        self.train_step = TrainStep(
            wrapped,
            self.optimizer,
            method,
            attack,
            accelerator,
            config,
            class_counts=training_class_counts(data.train, method, self.num_classes),
            average=self.average if isinstance(self.average, ModelEmaV3) else None,
        )
        self.method_state = self.train_step.method_state
        self.module, self.passes = self.train_step.module, self.train_step.passes
        if self.average is not None:
            self.passes.watch(cast(nn.Module, self.average.module))
        plan = run_plan(
            config,
            method,
            attack,
            data,
            self.module,
            layout=self.layout,
            eval_batch_size=eval_batch_size,
            besides=plan_besides or {},
        )
        self.progress = Progress(plan=plan, changeable=changeable(config, accelerator))

    def _smaller_evaluation(self) -> str:
        """What to do where validation has not enough memory."""
        now = f"--per_device_eval_batch_size {self.eval_batch_size}"
        if "per_device_eval_batch_size" not in self.progress.plan:
            return f"lower {now}; --resume_from_checkpoint latest continues"
        return (
            f"the images of {now} share their noise: continue with --resume_from_checkpoint latest on a device with "
            "more memory, or start again with a smaller one"
        )

    def _count_updates(self) -> None:
        """How many updates there are in an epoch and in all."""
        config, num_examples, per_update = self.config, len(self.data.train), self.layout.per_update
        self.updates_per_epoch = num_examples // per_update
        if not self.updates_per_epoch:
            raise ValueError(
                f"the training split has {num_examples} examples, fewer than the {per_update} of one update "
                "(--per_device_train_batch_size x processes x --gradient_accumulation_steps); lower one of them"
            )
        planned = config.num_train_epochs * self.updates_per_epoch
        self.total_steps = min(planned, config.max_steps) if config.max_steps is not None else planned

    def _warn_of_late_starts(self) -> None:
        """Warn of a method that ``max_steps`` ends the run before."""
        epochs = -(-self.total_steps // self.updates_per_epoch)
        for what, (first, words) in self.method.starts(self.config.first_perturbed_epoch).items():
            if epochs <= first < self.config.num_train_epochs:
                logger.warning(
                    "%s starts at %s, and --max_steps %s ends the run in epoch %d: it will never be active",
                    what,
                    words,
                    self.config.max_steps,
                    epochs,
                )

    def fit(self, stop: Callable[[], str | None] = lambda: None) -> Progress:
        """Train to the end, from the beginning or from where `resume` got to.

        Args:
            stop: asked in every update; a reason to stop, on any process, ends training on all of them after the
                update, with a checkpoint.

        Returns:
            The final progress; ``progress.best`` belongs to the weights in ``checkpoint-best``.

        Raises:
            TrainingStopped: if ``stop`` gave a reason; everything up to here is in a checkpoint.
            NonFiniteLossError: before an update whose loss or gradient is not finite, or where the logits of held-out
                images, or the weights that were to be selected, are not.
            FaultError: if there is not enough memory, with settings that need less.
            CheckpointWriteError: if the last checkpoint, of the run or before a stop, could not be written. Earlier
                ones that cannot be written are logged, and training continues.
        """
        self.log = RunLog(
            self.accelerator,
            self.output_dir,
            self.data.class_names,
            start_step=self.progress.step,
            validation_due=self.progress.validation_due is not None,
            total_steps=self.total_steps,
            show_progress=not self.config.disable_tqdm,
        )
        try:
            if self.progress.validation_due is not None:
                self._end_of_epoch(self.progress.validation_due)
            while self.progress.step < self.total_steps:
                self._train_epoch(self.progress.step // self.updates_per_epoch, stop)
            history, step = self.progress.history, self.progress.step
            if step and (not history or history[-1]["step"] != step):
                # Stopped in mid-epoch, and resumed with a total that it has reached.
                self._end_of_epoch((step - 1) // self.updates_per_epoch)
        finally:
            self.log.close()
        if isinstance(self.average, GatedAverage) and not self.average.updates:
            logger.warning(
                "no epoch had a worst held-out class of --fawa_threshold %s: the weights are not averaged",
                self.config.fawa_threshold,
            )
        return self.progress

    def _train_epoch(self, epoch: int, stop: Callable[[], str | None]) -> None:
        """Train from where the run is to the end of the epoch or of the run; validate and save where due."""
        first = self.progress.step - epoch * self.updates_per_epoch
        if first == 0:
            since = time.perf_counter()
            with explain_out_of_memory(self._smaller_evaluation()):
                self.method_state.begin_epoch(epoch, partial(self._held_out_sums, epoch=epoch))
            self.progress.seconds += time.perf_counter() - since
            self._count_passes()
        batches = epoch_batches(
            self.data.train,
            self.layout,
            epoch=epoch,
            first_update=first,
            class_probabilities=self.method_state.class_probabilities(),
            device=self.accelerator.device,
        )
        last = min((epoch + 1) * self.updates_per_epoch, self.total_steps)
        fix = smaller_batch(
            self.config.per_device_train_batch_size,
            self.config.gradient_accumulation_steps,
            may_change=not self.method.depends_on_split,
        )
        while self.progress.step < last:
            with explain_out_of_memory(fix):
                stopping = self._one_update(epoch, batches, stop)
            if stopping:
                # Validation can take longer than there is time: a run that continues begins with it.
                self.progress.validation_due = epoch if self.progress.step == last else None
                reason = stop() or "a request to another process"
                self._save(ends_training=True)
                raise TrainingStopped(
                    f"stopped by {reason} after update {self.progress.step} of {self.total_steps}; saved in "
                    f"{self.output_dir / f'checkpoint-{self.progress.step}'}"
                )
            elif self.progress.step == last:
                self._end_of_epoch(epoch)
            elif self._save_is_due(epoch_ended=False):
                self._save()

    def _end_of_epoch(self, epoch: int) -> None:
        with explain_out_of_memory(self._smaller_evaluation()):
            try:
                self._validate(epoch)
            except NonFiniteLogitsError as error:
                raise NonFiniteLossError(
                    f"validation after epoch {epoch + 1} (counted from 1): the logits are not finite on {error.count} "
                    f"of {error.total} held-out images ({error.cause}); these weights are not selected, and training "
                    f"ends here. {STAY_FINITE}"
                ) from error
        self.progress.validation_due = None
        if self._save_is_due(epoch_ended=True):
            self._save()

    def _save_is_due(self, *, epoch_ended: bool) -> bool:
        if self.config.save_steps is None or self.progress.step >= self.total_steps:
            return epoch_ended
        return self.progress.step % self.config.save_steps == 0

    def _one_update(self, epoch: int, batches: Iterator[PixelBatch], stop: Callable[[], str | None]) -> bool:
        """Make an update and log it; returns whether training is to stop, on all processes or none."""
        step, since = self.progress.step, time.perf_counter()
        micro_batches = list(islice(batches, self.config.gradient_accumulation_steps))
        if step == 0:
            check_pixel_range(micro_batches[0].x)
        learning_rate = set_learning_rate(self.scheduler, epoch=epoch, step=step)
        totals = self.train_step(micro_batches, epoch=epoch, step=step, stop=stop)
        elapsed = time.perf_counter() - since
        self.progress.seconds += elapsed
        self.progress.passes += totals.passes
        window = Totals(**self.progress.since_log) + replace(totals, seconds=elapsed, stops=0.0)
        self.progress.since_log = asdict(window)
        self.progress.skipped_updates += totals.updates + totals.overflows == 0
        self.progress.overflowed_updates += int(totals.overflows)
        self.progress.step = step + 1
        self.log.bar.update()
        if self.progress.step % self.config.logging_steps == 0 or self.progress.step == self.total_steps:
            self._log_training(epoch, learning_rate, window)
        return totals.stops > 0

    def _log_training(self, epoch: int, learning_rate: float, window: Totals) -> None:
        values: dict[str, float | None] = {
            "loss": window.loss / window.updates if window.updates else None,
            "hard_fraction": window.hard / window.mined if window.mined else None,
            "images_per_second": window.seen / window.seconds,
            "passes_per_image": window.passes / window.seen,
        }
        self.log.show({"loss": values["loss"], "hard": values["hard_fraction"], "img/s": values["images_per_second"]})
        extra = {"learning_rate": learning_rate, "skipped_updates": self.progress.skipped_updates}
        if self.accelerator.scaler is not None:
            extra["loss_scale"] = self.accelerator.scaler.get_scale()
            extra["overflowed_updates"] = self.progress.overflowed_updates
        self.log.write("train", self.progress.step, {"epoch": epoch, **values, **extra})
        self.progress.since_log = {}

    def _validate(self, epoch: int) -> None:
        """Measure held-out robustness, record how the epoch treated each class, keep the weights if they are best."""
        since = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch}
        record |= self.method_state.epoch_record(self._class_log(), self.attack, epoch=epoch)
        if isinstance(self.average, GatedAverage) and self.progress.step % self.updates_per_epoch == 0:
            # Not where max_steps cuts an epoch short: a longer run may continue it.
            robust = self._held_out(self.module).robust
            record["averaged"] = self.average.update(self.module, [entry.accuracy for entry in robust.per_class])
            self.progress.averaged_epochs = self.average.updates
        step = self.progress.step
        score = float(step)
        if self.data.validation is not None:
            held_out = self._held_out(self.selected_module)
            record |= held_out_record(held_out)
            score = selection_score(held_out, self.config.selection_metric, last=score)
        self.progress.seconds += time.perf_counter() - since
        self._count_passes()
        self.log.write("validation", step, record)
        self.progress.history.append({"step": step, **record})
        self._select_if_best(score, epoch)

    def _select_if_best(self, score: float, epoch: int) -> None:
        """Keep the current weights; of equal scores the later ones, which were trained longer."""
        best = self.progress.best
        lost = anywhere(
            self.accelerator, best is not None and self.accelerator.is_main_process and self.files.selection_is_lost()
        )
        if lost:
            logger.error("the weights selected before are gone from %s: selecting anew", self.output_dir)
        if best is not None and not lost and score < best["score"]:
            return
        step, metric = self.progress.step, self.config.selection_metric
        self.progress.best = {"score": score, "metric": metric, "step": step, "epoch": epoch}
        weights = whole_state(self.selected_module.state_dict())
        self._refuse_weights_not_finite(weights, epoch)
        if self.accelerator.is_main_process:
            self.files.select(weights, self.progress.best)

    def _count_passes(self) -> None:
        """Add up the passes of all processes since the last update."""
        passes = torch.tensor(float(self.passes.take()), device=self.accelerator.device)
        self.progress.passes += float(self.accelerator.reduce(passes, "sum"))

    def _refuse_weights_not_finite(self, weights: Mapping[str, Tensor], epoch: int) -> None:
        """Refuse to select weights that are not finite; without held-out images no logits would show it."""
        spoiled = []
        if self.accelerator.is_main_process:
            spoiled = [name for name, value in weights.items() if not bool(value.isfinite().all())]
        if anywhere(self.accelerator, bool(spoiled)):
            raise NonFiniteLossError(
                f"after epoch {epoch + 1} (counted from 1) weights are not finite ({', '.join(spoiled[:5])}); they "
                f"are not selected, and training ends here. {STAY_FINITE}"
            )

    @property
    def selected_module(self) -> nn.Module:
        """The module that is validated and published: the average of weights if there is one by now."""
        if self.average is None or (isinstance(self.average, GatedAverage) and not self.average.updates):
            return self.module
        return cast(nn.Module, self.average.module)

    def _held_out_sums(self, rule: ClassRule, *, epoch: int) -> Tensor:
        """Sums that a class rule takes over the held-out images with the current weights."""
        with gathered(self.accelerator, self.module):
            module, loss = self._as_attacked(self.module), self.method.loss
            return self._held_out_part.sums(rule, module, loss=loss, attack=self.attack, epoch=epoch)

    def _held_out(self, module: nn.Module) -> HeldOutAccuracy:
        """Clean and robust accuracy of a module on the held-out part of train."""
        with gathered(self.accelerator, module):
            return self._held_out_part.accuracy(
                self._as_attacked(module),
                replace(self.attack, num_steps=self.config.validation_num_steps),
                with_verdict=self.config.selection_metric == "verdict",
            )

    def _as_attacked(self, module: nn.Module) -> nn.Module:
        """The module as validation attacks it; an average of weights computes in float32."""
        return attack_passes(module, "training", self.accelerator.mixed_precision) if module is self.module else module

    @property
    def _held_out_part(self) -> HeldOutPart:
        if self.data.validation is None:
            raise RuntimeError("validation and class rules need held-out images, and there are none")
        return HeldOutPart(
            images=self.data.validation,
            num_classes=self.num_classes,
            place=Workplace(accelerator=self.accelerator, batch_size=self.eval_batch_size, seed=self.config.seed),
        )

    def _save(self, *, ends_training: bool = False) -> None:
        """Write a checkpoint on the main process; all processes wait for it.

        Raises:
            CheckpointWriteError: if it could not be written and it was the last one.
        """
        self.log.flush()
        self.progress.class_log = self._class_log().tolist()
        scaler = self.accelerator.scaler
        self.progress.loss_scale = None if scaler is None else scaler.state_dict()
        model, optimizer = whole_state(self.module.state_dict()), whole_state(self.optimizer.state_dict())
        problem = None
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(
                model=model,
                averaged=None if self.average is None else self.average.module.state_dict(),
                method=self.method_state.tensors(),
                optimizer=optimizer,
                state=asdict(self.progress),
            )
            problem = self.files.save(checkpoint)
            if problem is None and self.after_save is not None:
                try:
                    self.after_save(self)
                except Exception:
                    # No failure here may end the training; the next save tries again.
                    logger.exception("after the checkpoint of update %d", self.progress.step)
        step = self.progress.step
        if anywhere(self.accelerator, problem is not None) and (ends_training or step >= self.total_steps):
            raise CheckpointWriteError(
                f"training is at update {step} of {self.total_steps}, and checkpoint-{step} is missing: "
                f"{problem or 'the main process could not write it'}; make room there, or make it writable, and "
                f"finish with the same command and --resume_from_checkpoint latest, which continues from "
                f"{self.files.kept()}"
            )

    def selected_weights(self) -> dict[str, Tensor]:
        """State dict of the best validation so far; before the first, of the current (averaged) weights."""
        if self.progress.best is None:
            if self.accelerator.is_fsdp2:
                # Gathering would wait for the other processes; the checkpoint that was just written holds them whole.
                return load_checkpoint(list_checkpoints(self.output_dir)[-1]).model
            return dict(self.selected_module.state_dict())
        return load_best(self.output_dir)[0]

    def resume(self) -> None:
        """Go to `checkpoint`, if there is one.

        Raises:
            ValueError: if it belongs to a run with other settings.
        """
        path = self.checkpoint
        if path is None:
            if self.config.resume_from_checkpoint is not None:
                logger.warning("no checkpoint in %s yet: starting from the beginning", self.output_dir)
            return
        checkpoint = load_checkpoint(path)
        progress = Progress(**checkpoint.state)
        progress.plan = as_recorded(progress.plan, f"{progress.plan['method']}.")
        check_same_run(path, progress.plan, self.progress.plan)
        load_model(self.module, checkpoint.model)
        if self.average is not None and checkpoint.averaged is not None:
            self.average.module.load_state_dict(checkpoint.averaged)
        if isinstance(self.average, GatedAverage):
            self.average.updates = progress.averaged_epochs
        self.method_state.load(checkpoint.method)
        load_optimizer(self.optimizer, checkpoint.optimizer)
        if progress.loss_scale is not None:
            # As run_plan holds the precision, this run scales its loss too.
            self.accelerator.scaler.load_state_dict(progress.loss_scale)
        note_changes(
            progress, self.progress.changeable, total_steps=self.total_steps, updates_per_epoch=self.updates_per_epoch
        )
        self.progress = progress
        if self.accelerator.is_main_process:
            rewind(self.output_dir, path)
            # The log is global: one process continues it, the others begin at zero.
            self.method_state.log += torch.tensor(progress.class_log, dtype=torch.float64).to(self.method_state.log)
        logger.info("resuming from %s at update %d of %d", path, progress.step, self.total_steps)

    def _class_log(self) -> Tensor:
        """How the epoch treated each class so far, over all processes."""
        return cast(Tensor, self.accelerator.reduce(self.method_state.log.clone(), "sum"))
