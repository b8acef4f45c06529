"""The settings of the training loop and of its attack. Importing them does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from ham_hf.evaluation.config import ThreatConfig, pixel_unit_problems
from ham_hf.settings import SettingsGroup, setting

if TYPE_CHECKING:
    from ham_hf.attacks import Attack, ThreatModel
    from ham_hf.methods import Method

CHANGES_NO_NUMBER = frozenset(
    {
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name",
        "project", "trackio_space_id", "logging_steps", "save_steps", "save_total_limit", "ddp_timeout",
        "max_train_hours",
    }
)  # fmt: skip
"""Settings of `TrainingConfig` that change no number of a run."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig(ThreatConfig):
    """The threat model, which evaluation shares, and the PGD attack of training."""

    norm: Literal["linf", "l2"] = setting("linf", "norm that bounds the perturbation")
    epsilon: float = setting(8 / 255, "radius of the perturbation in pixel units", above=0)
    step_size: float = setting(2 / 255, "length of a PGD step in training, in pixel units", above=0)
    num_steps: int = setting(10, "PGD steps in training", at_least=1)

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and radius of training and evaluation."""
        from ham_hf.attacks import ThreatModel

        return ThreatModel(self.norm, self.epsilon)

    @property
    def attack(self) -> Attack:
        """The attack of training."""
        from ham_hf.attacks import Attack

        return Attack(threat_model=self.threat_model, num_steps=self.num_steps, step_size=self.step_size)

    def contradictions(self) -> Iterator[str]:
        """Epsilon or the step size on the 0..255 scale, or l2 with a default of linf."""
        yield from pixel_unit_problems(self.norm, epsilon=self.epsilon, step_size=self.step_size)
        if self.norm == "l2" and (self.epsilon == AttackConfig.epsilon or self.step_size == AttackConfig.step_size):
            yield (
                "--norm l2 needs its own --epsilon and --step_size (8/255 and 2/255 are for linf), say 0.5 and 0.1 "
                "for 32 px"
            )


class LearningRateDrop(NamedTuple):
    """A step of the piecewise schedule: from this 0-based epoch on, the rate is ``factor`` times ``learning_rate``."""

    epoch: int
    factor: float

    @classmethod
    def parse(cls, text: str) -> LearningRateDrop:
        """Read ``EPOCH:FACTOR``; ValueError for any other form."""
        epoch, _, factor = text.partition(":")
        try:
            return cls(int(epoch), float(factor))
        except ValueError:
            raise ValueError from None  # Python's message is about int and float

    def __str__(self) -> str:
        return f"{self.epoch}:{self.factor!r}"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(SettingsGroup):
    """Optimization, checkpoints, logging and hardware."""

    output_dir: str = setting("outputs/ham", "folder for everything the run writes")
    overwrite_output_dir: bool = setting(False, "allow an output folder that already holds a run")
    resume_from_checkpoint: str | None = setting(None, "latest, or the path of a checkpoint folder")
    num_train_epochs: int = setting(120, "epochs", at_least=1)
    max_steps: int | None = setting(None, "stop after this many updates, whatever the epoch", at_least=1)
    max_train_hours: float | None = setting(
        None, "save and stop after this many hours, to continue in another job (exit status 75)", above=0
    )
    per_device_train_batch_size: int = setting(128, "training images per process and step", at_least=1)
    gradient_accumulation_steps: int = setting(1, "batches per update", at_least=1)
    optimizer: str = setting("momentum", "any timm optimizer name (momentum = SGD without Nesterov)")
    learning_rate: float = setting(0.1, "highest learning rate", above=0)
    layer_decay: float | None = setting(
        None,
        "factor on the learning rate from each layer of a timm backbone to the one before it; none = 1",
        above=0,
        at_most=1,
    )
    momentum: float = setting(0.9, "momentum, for optimizers that have it", at_least=0, below=1)
    weight_decay: float = setting(5e-4, "weight decay", at_least=0)
    decay_norm_and_bias: bool = setting(True, "decay norm layers and biases too, as adversarial training does")
    lr_scheduler_type: Literal["constant", "cosine", "piecewise"] = setting(
        "piecewise", "learning-rate schedule; piecewise follows --lr_drops"
    )
    lr_drops: tuple[LearningRateDrop, ...] = setting(
        (LearningRateDrop(60, 0.1), LearningRateDrop(90, 0.01), LearningRateDrop(110, 0.005)),
        "from the 0-based EPOCH on, the rate is FACTOR times --learning_rate (piecewise only)",
        items="EPOCH:FACTOR",
    )
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up of the learning rate", at_least=0)
    min_learning_rate: float = setting(0.0, "learning rate at the end (cosine only)", at_least=0)
    lr_step_unit: Literal["epoch", "step"] = setting("epoch", "how often the learning rate changes")
    max_grad_norm: float | None = setting(None, "clip the gradient to this l2 norm", above=0)
    ema_decay: float | None = setting(
        None, "decay per update of averaged weights; none = no average", above=0, below=1
    )
    fawa: Literal["auto", "on", "off"] = setting(
        "auto", "fairness-gated averaging of weights once per epoch; auto = with --method cfa, as published"
    )
    fawa_decay: float = setting(0.85, "share of the old average in the new one (fawa)", above=0, below=1)
    fawa_threshold: float = setting(
        0.2,
        "robust accuracy that the worst held-out class needs for its epoch to be averaged (fawa)",
        at_least=0,
        at_most=1,
    )
    awp_gamma: float | None = setting(
        None, "size of the adversarial weight perturbation, such as 0.01 (0.005 with TRADES); none = off", above=0
    )
    awp_start_epoch: int = setting(0, "first 0-based epoch that perturbs weights", at_least=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting(
        "no", "precision of the network; pixels stay float32; fp16 is for GPUs without bf16, and scales the loss"
    )
    attack_precision: Literal["training", "bf16", "fp16"] = setting(
        "training", "precision of the attack's passes in training: that of the training forward, or its own"
    )
    memory_format: Literal["channels_last", "contiguous"] = setting("channels_last", "memory layout of images")
    torch_compile: bool = setting(False, "compile the network with torch.compile")
    use_cpu: bool = setting(False, "use the CPU even if there is an accelerator")
    ddp_timeout: int = setting(1800, "seconds that a process waits for the others before it gives up", at_least=1)
    seed: int = setting(
        0, "seed of data split, initialization, order, augmentation and attacks", at_least=0, at_most=4294967295
    )
    logging_steps: int = setting(10, "updates between two lines of the training log", at_least=1)
    save_steps: int | None = setting(None, "updates between two checkpoints; none = one per epoch", at_least=1)
    save_total_limit: int | None = setting(2, "checkpoints kept, the oldest go first; none = all", at_least=1)
    selection_metric: Literal["robust_accuracy", "worst_class", "robust_plus_worst", "verdict", "last"] = setting(
        "robust_accuracy",
        "number on held-out images that selects the weights; verdict = images right under PGD and CW, which attacks "
        "twice; last = final weights",
    )
    validation_num_steps: int = setting(10, "PGD steps of the attack on held-out images", at_least=1)
    report_to: tuple[Literal["tensorboard", "trackio", "wandb", "all"], ...] = setting(
        (), "trackers to log to, besides metrics.jsonl; all = those that are installed"
    )
    run_name: str | None = setting(None, "name of the run in trackers; none = that of the output folder")
    project: str = setting("ham_hf", "project of the run in trackers")
    trackio_space_id: str | None = setting(None, "Space that trackio logs to, owner/name; none = this machine only")
    disable_tqdm: bool = setting(False, "show no progress bar")

    def uses_fawa(self, method: Method) -> bool:
        """Whether weights are averaged once per epoch, if the classes are fair enough."""
        return self.fawa == "on" or (self.fawa == "auto" and method.gates_averaging)

    @property
    def first_perturbed_epoch(self) -> int | None:
        """0-based first epoch with adversarial weight perturbation; None if there is none."""
        return self.awp_start_epoch if self.awp_gamma is not None else None

    def contradictions(self) -> Iterator[str]:
        """Impossible schedules, settings of a perturbation without one, and resuming a run to be overwritten."""
        yield from self._schedule_problems()
        yield from self._tracker_problems()
        if self.awp_gamma is None:
            yield from self.idle(["awp_start_epoch"], "--awp_gamma")
        if self.mixed_precision != "no" and self.attack_precision not in ("training", self.mixed_precision):
            yield (
                f"--attack_precision {self.attack_precision}: the passes of --mixed_precision {self.mixed_precision} "
                "have its precision, those of attacks too; leave it at training"
            )
        if self.min_learning_rate and self.lr_scheduler_type != "cosine":
            yield (
                f"--min_learning_rate {self.min_learning_rate} has no effect with --lr_scheduler_type "
                f"{self.lr_scheduler_type}"
            )
        if self.min_learning_rate > self.learning_rate:
            yield (
                f"--min_learning_rate {self.min_learning_rate}: expected at most --learning_rate, {self.learning_rate}"
            )
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            yield "--resume_from_checkpoint and --overwrite_output_dir exclude each other; give one of them"

    def _tracker_problems(self) -> Iterator[str]:
        """All trackers and one of them, and names for trackers that are not used."""
        if "all" in self.report_to and len(self.report_to) > 1:
            yield f"--report_to {' '.join(self.report_to)}: all stands alone"
        if not self.report_to:
            yield from self.idle(["run_name", "project"], "--report_to")
        if not {"all", "trackio"} & set(self.report_to):
            yield from self.idle(["trackio_space_id"], "--report_to trackio")
        for name in ("run_name", "project"):
            if re.search(r"\.\.|^[/.]|[\\:]|\s$|/$", getattr(self, name) or "run"):
                # TensorBoard makes a folder of it.
                yield f"--{name} {getattr(self, name)!r}: expected a name, such as ham/seed0, that a folder can have"

    def _schedule_problems(self) -> Iterator[str]:
        shown = " ".join(map(str, self.lr_drops))
        if any(drop.epoch < 0 or not 0 < drop.factor <= 1 for drop in self.lr_drops):
            yield f"--lr_drops {shown}: expected epochs of at least 0 and factors in (0, 1]"
        for before, after in zip(self.lr_drops, self.lr_drops[1:], strict=False):
            if after.epoch <= before.epoch or after.factor >= before.factor:
                yield (
                    f"--lr_drops {shown}: expected increasing epochs and decreasing factors "
                    f"(a factor is of --learning_rate itself), but {after} follows {before}"
                )
