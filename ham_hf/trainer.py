"""The training loop, on accelerate: epochs, validation, selection, checkpoints and resuming."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ham_hf.averaging import GatedAverage
from ham_hf.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_best,
    load_checkpoint,
    rewind,
    save_best,
    save_checkpoint,
)
from ham_hf.config import TrainingConfig
from ham_hf.data import BatchRequest, ImageData, Images, PixelBatch
from ham_hf.data_order import batch_requests, epoch_order
from ham_hf.evaluation import check_pixel_range
from ham_hf.held_out import held_out_accuracy, held_out_sums
from ham_hf.metrics import FairnessSummary, count_per_class
from ham_hf.objectives import InnerAttack, Objective
from ham_hf.optimization import create_optimizer, create_scheduler, set_learning_rate
from ham_hf.runlog import RunLog
from ham_hf.train_step import Totals, TrainStep

logger = logging.getLogger(__name__)

MAY_CHANGE = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",  # with the accumulation and the processes it makes examples_per_update
        "gradient_accumulation_steps",
        "memory_format",
        "torch_compile",
        "use_cpu",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "report_to",
        "disable_tqdm",
    }
)
"""Settings of the training loop that a resumed run may change."""


@dataclass(kw_only=True)
class Progress:
    """Where a run is; JSON types only, so that it is the ``trainer_state.json`` of a checkpoint.

    Attributes:
        step: updates done, skipped ones included.
        skipped_updates: updates skipped because no process had a row to train on.
        seconds: time of updates and validation so far, earlier parts of a resumed run included; not of saving.
        class_log: what the current epoch did to each class so far, of all processes; see `MethodState.log`.
        averaged_epochs: epochs that went into the fairness-gated average.
        since_log: sums since the last line of the log.
        best: state of the best validation so far; None before the first.
        history: one record per validation.
        plan: what has to stay the same for a resumed run to continue this one.
    """

    step: int = 0
    skipped_updates: int = 0
    seconds: float = 0.0
    class_log: list[list[float]] = field(default_factory=list)
    averaged_epochs: int = 0
    since_log: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Adversarial training of one model.

    Args:
        model: pixel model (pixels in [0, 1] to logits); moved to the accelerator's device.
        data: training and held-out images.
        objective: training method.
        attack: attack of the inner maximization; its threat model also measures the held-out robustness.
        config: settings of the training loop.
        accelerator: from one CPU process to many nodes.
        eval_batch_size: images per batch and process when validating.
        after_save: called on the main process after every checkpoint; what goes wrong in it is logged, and training
            goes on.

    Raises:
        ValueError: if the training split is smaller than one update's batch.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        objective: Objective,
        attack: InnerAttack,
        config: TrainingConfig,
        accelerator: Accelerator,
        *,
        eval_batch_size: int = 256,
        after_save: Callable[[Trainer], None] | None = None,
    ) -> None:
        self.data, self.objective, self.attack, self.config = data, objective, attack, config
        self.accelerator, self.eval_batch_size, self.after_save = accelerator, eval_batch_size, after_save
        self.output_dir = Path(config.output_dir)
        self.num_classes = len(data.class_names)
        self.per_update = (
            config.per_device_train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
        )
        self.updates_per_epoch = len(data.train) // self.per_update
        if not self.updates_per_epoch:
            raise ValueError(
                f"the training split has {len(data.train)} examples, fewer than the {self.per_update} of one update "
                "(--per_device_train_batch_size x processes x --gradient_accumulation_steps); lower one of them"
            )
        planned = config.num_train_epochs * self.updates_per_epoch
        self.total_steps = min(planned, config.max_steps) if config.max_steps is not None else planned
        memory_format = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[
            config.memory_format
        ]
        model = model.to(accelerator.device).to(memory_format=memory_format)
        # Made before prepare() changes the forward: the average is always evaluated in float32.
        self.ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay is not None else None
        gated = config.uses_fawa(objective)
        self.gated = GatedAverage(model, config.fawa_decay, config.fawa_threshold) if gated else None
        if config.torch_compile:
            # In place, so that the names of weights stay; dynamic, as the number of hard rows changes.
            model.compile(dynamic=True)
        optimizer = create_optimizer(
            model,
            config.optimizer,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            decay_norm_and_bias=config.decay_norm_and_bias,
        )
        self.scheduler = create_scheduler(
            optimizer,
            config.lr_scheduler_type,
            num_epochs=config.num_train_epochs,
            updates_per_epoch=self.updates_per_epoch,
            drops=config.lr_drops,
            warmup_epochs=config.warmup_epochs,
            min_learning_rate=config.min_learning_rate,
            step_unit=config.lr_step_unit,
        )
        wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.train_step = TrainStep(
            wrapped,
            self.optimizer,
            objective,
            attack,
            accelerator,
            class_counts=count_per_class(data.train.labels, self.num_classes),
            seed=config.seed,
            memory_format=memory_format,
            ema=self.ema,
            max_grad_norm=config.max_grad_norm,
            awp_gamma=config.awp_gamma,
            awp_start_epoch=config.awp_start_epoch,
        )
        self.method_state = self.train_step.method_state
        self.module = self.train_step.module
        self.progress = Progress(plan=self._plan())

    def fit(self) -> Progress:
        """Train to the end, from the beginning or from where `resume` got to.

        Returns:
            The final progress; ``progress.best`` belongs to the weights in ``checkpoint-best``.

        Raises:
            NonFiniteLossError: before an update whose loss or gradient is not finite.
        """
        self.log = RunLog(
            self.accelerator,
            self.output_dir,
            start_step=self.progress.step,
            total_steps=self.total_steps,
            show_progress=not self.config.disable_tqdm,
        )
        try:
            while self.progress.step < self.total_steps:
                self._train_epoch(self.progress.step // self.updates_per_epoch)
        finally:
            self.log.close()
        return self.progress

    def _train_epoch(self, epoch: int) -> None:
        """Train from where the run is to the end of the epoch or of the run; validate and save where due."""
        first = self.progress.step - epoch * self.updates_per_epoch
        if first == 0:
            since = time.perf_counter()
            self.method_state.begin_epoch(epoch, partial(self._held_out_sums, epoch=epoch))
            self.progress.seconds += time.perf_counter() - since
        requests = self._requests(epoch)[first * self.config.gradient_accumulation_steps :]
        batches = self.data.train.batches(requests, device=self.accelerator.device)
        last = min((epoch + 1) * self.updates_per_epoch, self.total_steps)
        while self.progress.step < last:
            self._one_update(epoch, batches)
            if self.progress.step == last:
                self._validate(epoch)
            if self._save_is_due(epoch_ended=self.progress.step == last):
                self._save()

    def _save_is_due(self, *, epoch_ended: bool) -> bool:
        if self.config.save_steps is None or self.progress.step == self.total_steps:
            return epoch_ended
        return self.progress.step % self.config.save_steps == 0

    def _one_update(self, epoch: int, batches: Iterator[PixelBatch]) -> None:
        step, since = self.progress.step, time.perf_counter()
        micro_batches = list(islice(batches, self.config.gradient_accumulation_steps))
        if step == 0:
            check_pixel_range(micro_batches[0].x)
        learning_rate = set_learning_rate(self.scheduler, epoch=epoch, step=step)
        totals = self.train_step(micro_batches, epoch=epoch, step=step)
        elapsed = time.perf_counter() - since
        self.progress.seconds += elapsed
        window = Totals(**self.progress.since_log) + replace(totals, seconds=elapsed)
        self.progress.since_log = asdict(window)
        self.progress.skipped_updates += totals.updates == 0
        self.progress.step = step + 1
        self.log.advance()
        if self.progress.step % self.config.logging_steps == 0 or self.progress.step == self.total_steps:
            self._log_training(epoch, learning_rate, window)

    def _log_training(self, epoch: int, learning_rate: float, window: Totals) -> None:
        values: dict[str, float | None] = {
            "loss": window.loss / window.updates if window.updates else None,
            "hard_fraction": window.hard / window.mined if window.mined else None,
            "images_per_second": window.seen / window.seconds,
        }
        self.log.show({"loss": values["loss"], "hard": values["hard_fraction"], "img/s": values["images_per_second"]})
        extra = {"learning_rate": learning_rate, "skipped_updates": self.progress.skipped_updates}
        self.log.write("train", self.progress.step, {"epoch": epoch, **values, **extra})
        self.progress.since_log = {}

    def _validate(self, epoch: int) -> None:
        """Measure held-out robustness, note what the epoch did per class, keep the weights if they are the best."""
        since = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch}
        record |= self.method_state.epoch_record(self._class_log(), self.attack, epoch=epoch)
        if self.gated is not None and self.progress.step % self.updates_per_epoch == 0:
            # Not where max_steps cuts an epoch short: a longer run may go on with it.
            record["averaged"] = self._update_gated_average(self.gated)
        score = float(self.progress.step)
        if self.data.validation is not None:
            clean, robust = self._held_out(self.selected_module)
            record |= {
                "clean_accuracy": clean.average,
                "robust_accuracy": robust.average,
                "worst_class": robust.worst_class,
                "clean_per_class": [entry.accuracy for entry in clean.per_class],
                "robust_per_class": [entry.accuracy for entry in robust.per_class],
            }
            score = {
                "robust_accuracy": robust.average,
                "worst_class": robust.worst_class,
                "robust_plus_worst": robust.average + robust.worst_class,
                "last": score,
            }[self.config.selection_metric]
        self.progress.seconds += time.perf_counter() - since
        step = self.progress.step
        self.log.write("validation", step, record)
        self.progress.history.append({"step": step, **record})
        # Of equal scores the later one: it was trained longer.
        if self.progress.best is None or score >= self.progress.best["score"]:
            self.progress.best = {"score": score, "metric": self.config.selection_metric, "step": step, "epoch": epoch}
            if self.accelerator.is_main_process:
                save_best(self.output_dir, self.selected_module.state_dict(), self.progress.best)

    @property
    def selected_module(self) -> nn.Module:
        """The module that is validated and published: the average of weights if there is one."""
        if self.gated is not None and self.gated.updates:
            return self.gated.module
        return self.module if self.ema is None else cast(nn.Module, self.ema.module)

    def _update_gated_average(self, gated: GatedAverage) -> bool:
        """Let the current weights into the fairness-gated average if their worst held-out class is good enough."""
        _, robust = self._held_out(self.module)
        passed = gated.update(self.module, [entry.accuracy for entry in robust.per_class])
        self.progress.averaged_epochs = gated.updates
        return passed

    def _held_out_sums(self, part: Objective, *, epoch: int) -> Tensor:
        """Sums that a method takes over the held-out images with the current weights."""
        return held_out_sums(
            part,
            self.module,
            self._held_out_images(f"--method {part.name}"),
            objective=self.objective,
            attack=self.attack,
            num_classes=self.num_classes,
            accelerator=self.accelerator,
            batch_size=self.eval_batch_size,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _held_out(self, module: nn.Module) -> tuple[FairnessSummary, FairnessSummary]:
        """Clean and robust accuracy of a module on the held-out part of train."""
        return held_out_accuracy(
            module,
            self._held_out_images("validation"),
            attack=self.attack,
            num_steps=self.config.validation_num_steps,
            num_classes=self.num_classes,
            accelerator=self.accelerator,
            batch_size=self.eval_batch_size,
            seed=self.config.seed,
        )

    def _held_out_images(self, what_for: str) -> Images:
        if self.data.validation is None:
            raise RuntimeError(f"{what_for} needs held-out images, and there are none")
        return self.data.validation

    def _save(self) -> None:
        """Write a checkpoint on the main process; all processes wait for it."""
        self.progress.class_log = self._class_log().tolist()
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(
                model=self.module.state_dict(),
                averaged=self.averaged_module.state_dict() if self.averaged_module is not None else None,
                method=self.method_state.tensors(),
                optimizer=self.optimizer.state_dict(),
                state=asdict(self.progress),
            )
            save_checkpoint(self.output_dir, checkpoint, keep=self.config.save_total_limit)
            self._after_save()
        self.accelerator.wait_for_everyone()

    @property
    def averaged_module(self) -> nn.Module | None:
        """The average of weights that is kept, whether or not it is selected; None without one."""
        average = self.gated or self.ema
        return None if average is None else cast(nn.Module, average.module)

    def _after_save(self) -> None:
        if self.after_save is None:
            return
        try:
            self.after_save(self)
        except Exception:
            # Whatever it is, it is worth less than the training; the next save tries again.
            logger.exception("after the checkpoint of update %d", self.progress.step)

    def selected_weights(self) -> dict[str, Tensor]:
        """State dict of the best validation so far; before the first, of the current (averaged) weights."""
        if self.progress.best is None:
            return dict(self.selected_module.state_dict())
        return load_best(self.output_dir)[0]

    def resume(self) -> None:
        """Go to the checkpoint that the configuration names, if it names one.

        Raises:
            ValueError: if there is no such checkpoint or it belongs to a run with other settings.
        """
        if self.config.resume_from_checkpoint is None:
            return
        path = find_checkpoint(self.output_dir, self.config.resume_from_checkpoint)
        if path is None:
            logger.warning("no checkpoint in %s yet: starting from the beginning", self.output_dir)
            return
        checkpoint = load_checkpoint(path)
        progress = Progress(**checkpoint.state)
        plan = self._plan()
        changed = [
            f"{key} {str(progress.plan.get(key))[:60]} -> {str(plan[key])[:60]}"
            for key in plan
            if progress.plan.get(key) != plan[key]
        ]
        if changed:
            raise ValueError(
                f"--resume_from_checkpoint {path} belongs to a run with other settings: {'; '.join(changed)}; "
                "resume with the same ones, or start a new run in another --output_dir"
            )
        self.module.load_state_dict(checkpoint.model)
        if self.averaged_module is not None and checkpoint.averaged is not None:
            self.averaged_module.load_state_dict(checkpoint.averaged)
        if self.gated is not None:
            self.gated.updates = progress.averaged_epochs
        self.method_state.load(checkpoint.method)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.progress = progress
        if self.accelerator.is_main_process:
            rewind(self.output_dir, path)
            # The log is global: one process goes on from it, the others from zero.
            self.method_state.log += torch.tensor(progress.class_log, dtype=torch.float64).to(self.method_state.log)
        logger.info("resuming from %s at update %d of %d", path, progress.step, self.total_steps)

    def _plan(self) -> dict[str, Any]:
        """What a run that continues this one must share: data, network, method, and all that decides an update."""
        threat_model = self.attack.threat_model
        plan = {name: value for name, value in asdict(self.config).items() if name not in MAY_CHANGE}
        plan |= {f"{self.objective.name}.{name}": value for name, value in asdict(self.objective).items()}
        plan |= {
            "method": self.objective.name,
            "norm": threat_model.norm,
            "epsilon": float(threat_model.epsilon),
            "num_steps": self.attack.num_steps,
            "step_size": self.attack.step_size,
            "examples_per_update": self.per_update,
            "num_train_examples": len(self.data.train),
            "num_validation_examples": len(self.data.validation) if self.data.validation is not None else 0,
            "class_names": self.data.class_names,
            "augmentation": self.data.augmentation,
            "parameter_shapes": [list(parameter.shape) for parameter in self.module.parameters()],
        }
        if self.objective.depends_on_split:
            plan["split"] = [self.config.per_device_train_batch_size, self.accelerator.num_processes]
        if self.gated is not None or any(part.uses_held_out for part in self.objective.parts):
            # The noise of held-out images is numbered by batch.
            plan["per_device_eval_batch_size"] = self.eval_batch_size
        # Through JSON, as it comes back from a checkpoint: tuples become lists.
        same_types: dict[str, Any] = json.loads(json.dumps(plan))
        return same_types

    def _requests(self, epoch: int) -> list[BatchRequest]:
        """This process's batches of an epoch, one per accumulation step, in order."""
        order = epoch_order(self.data.train.labels, self.config.seed, epoch, self.method_state.class_probabilities())
        return batch_requests(
            order,
            batch_size=self.config.per_device_train_batch_size,
            per_update=self.per_update,
            world=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _class_log(self) -> Tensor:
        """What the epoch did to each class so far, of all processes."""
        log: Tensor = self.accelerator.reduce(self.method_state.log.clone(), "sum")
        return log
