"""Every setting of training and evaluation, grouped by what it configures.

A field's name is its flag (``--name``) and its YAML key; names are unique over all groups. Epsilon and step sizes
are in pixel units, pixels being in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from ham_hf.config.settings import ConfigError, SettingsGroup, setting, setting_problems, settings_of
from ham_hf.hub_ids import is_hub_id
from ham_hf.methods import HAM, Method

_LINF_EPSILON, _LINF_STEP_SIZE = 8 / 255, 2 / 255
_SHUFFLE_BUFFER_SIZE = 10_000


class LearningRateDrop(NamedTuple):
    """A step of the piecewise schedule, written ``EPOCH:FACTOR``.

    Attributes:
        epoch: first 0-based epoch it holds for.
        factor: learning rate from then on, as a fraction of the ``learning_rate`` setting; in (0, 1].
    """

    epoch: int
    factor: float

    @classmethod
    def parse(cls, text: str) -> LearningRateDrop:
        """Read ``EPOCH:FACTOR``.

        Raises:
            ValueError: when the text has another form.
        """
        epoch, _, factor = text.partition(":")
        try:
            return cls(int(epoch), float(factor))
        except ValueError:
            # Python's words are about int and float, which nobody wrote.
            raise ValueError from None

    def __str__(self) -> str:
        return f"{self.epoch}:{self.factor!r}"


@dataclass(frozen=True, kw_only=True)
class DataConfig(SettingsGroup):
    """Which images and labels, and how they are read."""

    dataset_name: str = setting("digits", "Hub dataset id, local folder (parquet or class folders), or digits")
    dataset_config_name: str | None = setting(None, "configuration (subset) of the Hub dataset")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the Hub dataset")
    train_split: str | None = setting(None, "name of the training split; none = found by rule")
    test_split: str | None = setting(None, "name of the test split; none = found by rule")
    image_column: str | None = setting(None, "column with the images; none = found by rule")
    label_column: str | None = setting(None, "column with the labels; none = found by rule")
    validation_fraction: float = setting(
        0.04, "fraction of train held out, stratified, to select the checkpoint by", "[0, 1)"
    )
    test_fraction: float = setting(
        0.2, "fraction of train made the test split, stratified, if the dataset has none", "(0, 1)"
    )
    augmentation: Literal["auto", "none", "crop", "crop_flip", "timm"] = setting(
        "auto", "training augmentation; auto = none for digits, crop_flip up to 96 px, timm's own above"
    )
    cache_images: Literal["auto", "ram", "none"] = setting(
        "auto", "ram = decode once into memory, none = decode each epoch, auto = ram where it fits"
    )
    skip_corrupt: bool = setting(False, "skip and count images that cannot be decoded, instead of stopping")
    dataloader_num_workers: int = setting(2, "decoding processes per device for images that are not cached", ">= 0")
    limit_train_examples: int | None = setting(None, "use this many training images, stratified", ">= 1")
    limit_test_examples: int | None = setting(None, "use this many test images, stratified", ">= 1")
    dataset_streaming: bool = setting(False, "read the training split from its files as it goes, without a local copy")
    shuffle_buffer_size: int = setting(
        _SHUFFLE_BUFFER_SIZE,
        "examples that a stream is shuffled within, kept encoded, over all processes",
        ">= 1",
    )
    num_train_examples: int | None = setting(
        None, "examples of a streamed training split; needed for .tar archives that do not say it", ">= 1"
    )

    def contradictions(self) -> Iterator[str]:
        """Settings of a stream without one, and what cannot be done with a stream."""
        if self.dataset_streaming:
            if self.limit_train_examples is not None:
                yield (
                    f"--limit_train_examples {self.limit_train_examples}: a stratified part of a stream would have to "
                    "be looked for in all of it; shorten the run with --max_steps, or leave --dataset_streaming out"
                )
            return
        if self.num_train_examples is not None:
            yield f"--num_train_examples {self.num_train_examples} has no effect without --dataset_streaming"
        if self.shuffle_buffer_size != _SHUFFLE_BUFFER_SIZE:
            yield f"--shuffle_buffer_size {self.shuffle_buffer_size} has no effect without --dataset_streaming"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(SettingsGroup):
    """Which network."""

    model_name: str = setting("resnet18_cifar", "any timm model name")
    pretrained: bool = setting(False, "start from timm's pretrained weights")
    model_args: Mapping[str, object] = field(
        default_factory=dict,
        metadata={"help": "arguments for the timm model, such as drop_path_rate=0.1; replaces the recipe's"},
    )
    image_size: int | None = setting(
        None,
        "side of the images in pixels; none = the dataset's if all are squares up to 96, else the model's",
        "[1, 4096]",
    )


@dataclass(frozen=True, kw_only=True)
class AttackConfig(SettingsGroup):
    """The threat model, which evaluation shares, and the PGD attack of training."""

    norm: Literal["linf", "l2"] = setting("linf", "norm that bounds the perturbation")
    epsilon: float = setting(_LINF_EPSILON, "radius of the perturbation in pixel units", "> 0")
    step_size: float = setting(_LINF_STEP_SIZE, "length of a PGD step in training, in pixel units", "> 0")
    num_steps: int = setting(10, "PGD steps in training", ">= 1")

    def contradictions(self) -> Iterator[str]:
        """Epsilon or the step size on the 0..255 scale, or l2 with a default of linf."""
        yield from pixel_unit_problems(self.norm, epsilon=self.epsilon, step_size=self.step_size)
        if self.norm == "l2" and (self.epsilon == _LINF_EPSILON or self.step_size == _LINF_STEP_SIZE):
            yield (
                "--norm l2 needs its own --epsilon and --step_size (8/255 and 2/255 are for linf), say 0.5 and 0.1 "
                "for 32 px"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(SettingsGroup):
    """Optimization, checkpoints, logging and hardware."""

    output_dir: str = setting("outputs/ham", "folder for everything the run leaves behind")
    overwrite_output_dir: bool = setting(False, "allow an output folder that already holds a run")
    resume_from_checkpoint: str | None = setting(None, "latest, or the path of a checkpoint folder")
    num_train_epochs: int = setting(120, "epochs", ">= 1")
    max_steps: int | None = setting(None, "stop after this many updates, whatever the epoch", ">= 1")
    max_train_hours: float | None = setting(
        None, "save and stop after this many hours, to go on in another job (exit status 75)", "> 0"
    )
    per_device_train_batch_size: int = setting(128, "training images per process and step", ">= 1")
    gradient_accumulation_steps: int = setting(1, "batches per update", ">= 1")
    optimizer: str = setting("momentum", "any timm optimizer name (momentum = SGD without Nesterov)")
    learning_rate: float = setting(0.1, "highest learning rate", "> 0")
    layer_decay: float | None = setting(
        None, "factor on the learning rate from each layer of a timm backbone to the one before; none = 1", "(0, 1]"
    )
    momentum: float = setting(0.9, "momentum, for optimizers that have it", "[0, 1)")
    weight_decay: float = setting(5e-4, "weight decay", ">= 0")
    decay_norm_and_bias: bool = setting(True, "decay norm layers and biases too, as adversarial training does")
    lr_scheduler_type: Literal["constant", "cosine", "piecewise"] = setting(
        "piecewise", "learning-rate schedule; piecewise follows --lr_drops"
    )
    lr_drops: tuple[LearningRateDrop, ...] = setting(
        (LearningRateDrop(60, 0.1), LearningRateDrop(90, 0.01), LearningRateDrop(110, 0.005)),
        "from the 0-based EPOCH on, the rate is FACTOR times --learning_rate (piecewise only)",
        items="EPOCH:FACTOR",
    )
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up of the learning rate", ">= 0")
    min_learning_rate: float = setting(0.0, "learning rate at the end (cosine only)", ">= 0")
    lr_step_unit: Literal["epoch", "step"] = setting("epoch", "how often the learning rate changes")
    max_grad_norm: float | None = setting(None, "clip the gradient to this l2 norm", "> 0")
    ema_decay: float | None = setting(None, "decay per update of averaged weights; none = no average", "(0, 1)")
    fawa: Literal["auto", "on", "off"] = setting(
        "auto", "fairness-gated averaging of weights once per epoch; auto = with --method cfa, as published"
    )
    fawa_decay: float = setting(0.85, "share of the old average in the new one (fawa)", "(0, 1)")
    fawa_threshold: float = setting(
        0.2, "robust accuracy that the worst held-out class needs for its epoch to be averaged (fawa)", "[0, 1]"
    )
    awp_gamma: float | None = setting(
        None, "size of the adversarial weight perturbation, such as 0.01 (0.005 with TRADES); none = without", "> 0"
    )
    awp_start_epoch: int = setting(0, "first 0-based epoch that perturbs weights", ">= 0")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting(
        "no", "precision of the network; pixels stay float32; fp16 is for GPUs without bf16, and scales the loss"
    )
    attack_precision: Literal["training", "bf16", "fp16"] = setting(
        "training", "precision of the attack's passes in training: that of the training forward, or its own"
    )
    memory_format: Literal["channels_last", "contiguous"] = setting("channels_last", "memory layout of images")
    torch_compile: bool = setting(False, "compile the network with torch.compile")
    use_cpu: bool = setting(False, "use the CPU even if there is an accelerator")
    ddp_timeout: int = setting(1800, "seconds that a process waits for the others before it gives up", ">= 1")
    seed: int = setting(0, "seed of data split, initialization, order, augmentation and attacks", "[0, 4294967295]")
    logging_steps: int = setting(10, "updates between two lines of the training log", ">= 1")
    save_steps: int | None = setting(None, "updates between two checkpoints; none = one per epoch", ">= 1")
    save_total_limit: int | None = setting(2, "checkpoints kept, the oldest go first; none = all", ">= 1")
    selection_metric: Literal["robust_accuracy", "worst_class", "robust_plus_worst", "verdict", "last"] = setting(
        "robust_accuracy",
        "what the weights that are kept are best at, on held-out images; verdict = images right under PGD and CW, "
        "which attacks twice; last = final weights",
    )
    validation_num_steps: int = setting(10, "PGD steps of the attack on held-out images", ">= 1")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = setting(
        "none", "tracker to log to, besides metrics.jsonl"
    )
    disable_tqdm: bool = setting(False, "show no progress bar")

    def uses_fawa(self, method: Method) -> bool:
        """Whether weights are averaged once per epoch, if the classes are fair enough."""
        return self.fawa == "on" or (self.fawa == "auto" and method.gates_averaging)

    @property
    def first_perturbed_epoch(self) -> int | None:
        """0-based first epoch with adversarial weight perturbation; None if there is none."""
        return self.awp_start_epoch if self.awp_gamma is not None else None

    def contradictions(self) -> Iterator[str]:
        """Impossible schedules, settings of a perturbation without one, and resuming what is to be overwritten."""
        yield from self._schedule_problems()
        if self.awp_gamma is None and self.awp_start_epoch:
            yield f"--awp_start_epoch {self.awp_start_epoch} has no effect without --awp_gamma"
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


@dataclass(frozen=True, kw_only=True)
class EvaluationThreatConfig(SettingsGroup):
    """The threat model of an evaluation; by default the one that the model was trained for."""

    norm: Literal["linf", "l2"] | None = setting(
        None, "norm that bounds the perturbation; none = as the model was trained, else linf"
    )
    epsilon: float | None = setting(
        None, "radius of the perturbation in pixel units; none = as the model was trained, else 8/255", "> 0"
    )

    def contradictions(self) -> Iterator[str]:
        """Epsilon on the 0..255 scale; where the model says the norm, `ham_hf.runs.threat_model_of` looks again."""
        if self.norm is not None:
            yield from pixel_unit_problems(self.norm, epsilon=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SettingsGroup):
    """The attacks on the test split, with the norm and epsilon of the threat model."""

    per_device_eval_batch_size: int = setting(
        256, "images per process in evaluation; where memory does not suffice, fewer at once", ">= 1"
    )
    eval_num_steps: int = setting(20, "steps of the PGD and CW attacks", ">= 1")
    eval_step_size: float | None = setting(None, "length of their steps in pixel units; none = epsilon / 4", "> 0")
    autoattack: bool = setting(False, "also run standard AutoAttack (needs the extra ham-hf[autoattack])")
    autoattack_examples: int | None = setting(
        None, "run AutoAttack on this many test images, stratified; none = all", ">= 1"
    )

    def contradictions(self) -> Iterator[str]:
        """A setting of AutoAttack without AutoAttack."""
        if self.autoattack_examples is not None and not self.autoattack:
            yield f"--autoattack_examples {self.autoattack_examples} has no effect without --autoattack"


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(SettingsGroup):
    """Class shifts found on held-out images after training, which spread robust accuracy more evenly over classes."""

    fairness: float | None = setting(
        None, "how evenly: 0 = as trained, 1 = all classes alike; none = no calibration", "[0, 1]"
    )
    max_average_drop: float | None = setting(
        None, "instead of --fairness: the largest one whose held-out average drops by at most this share", "[0, 1]"
    )
    calibration_num_steps: int = setting(10, "steps of the CW attack of the search, of epsilon / 4 each", ">= 1")
    calibration_precision: Literal["float32", "bf16", "fp16"] = setting(
        "float32", "precision of that attack's passes; predictions are counted in float32"
    )

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to calibrate."""
        return self.fairness is not None or self.max_average_drop is not None

    def contradictions(self) -> Iterator[str]:
        """Two goals at once, and settings of a search without one."""
        if self.fairness is not None and self.max_average_drop is not None:
            yield (
                f"--fairness {self.fairness:g} and --max_average_drop {self.max_average_drop:g} exclude each other; "
                "give one of them"
            )
        if not self.is_asked_for:
            yield from (
                f"--{name} {getattr(self, name)} has no effect without --fairness or --max_average_drop"
                for name in ("calibration_num_steps", "calibration_precision")
                if getattr(self, name) != getattr(type(self), name)
            )


@dataclass(frozen=True, kw_only=True)
class HubConfig(SettingsGroup):
    """Where the finished model goes."""

    push_to_hub: bool = setting(False, "push the output folder to the Hub")
    hub_model_id: str | None = setting(None, "repository on the Hub: owner/name")
    hub_private_repo: bool = setting(False, "make the repository private when it is created")
    hub_revision: str = setting("main", "branch to push to")
    hub_strategy: Literal["end", "every_save"] = setting("end", "push at the end, or after every checkpoint too")
    publish_images: bool = setting(False, "keep the images of a dataset that is not public on the pushed report.html")
    model_license: str = setting("apache-2.0", "license of the trained weights, for the model card")

    def contradictions(self) -> Iterator[str]:
        """A push without a target, or to an impossible one; settings of a push without a push."""
        if self.push_to_hub and self.hub_model_id is None:
            yield "--push_to_hub needs --hub_model_id OWNER/NAME"
        if not self.push_to_hub:
            idle = {
                f"--hub_model_id {self.hub_model_id}": self.hub_model_id is not None,
                "--hub_private_repo": self.hub_private_repo,
                f"--hub_revision {self.hub_revision}": self.hub_revision != "main",
                f"--hub_strategy {self.hub_strategy}": self.hub_strategy != "end",
                "--publish_images": self.publish_images,
            }
            yield from (f"{written} has no effect without --push_to_hub" for written, given in idle.items() if given)
        if self.hub_model_id is not None and not (is_hub_id(self.hub_model_id) and len(self.hub_model_id) <= 96):
            yield (
                f"--hub_model_id {self.hub_model_id!r}: expected owner/name of at most 96 letters, digits and single "
                "'-', '_' or '.', such as me/robust-cifar10"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a training run.

    Raises:
        ConfigError: when groups contradict each other or the method's options do not fit the attack.
    """

    data: DataConfig = field(default_factory=DataConfig, metadata={"title": "Data"})
    model: ModelConfig = field(default_factory=ModelConfig, metadata={"title": "Model"})
    attack: AttackConfig = field(default_factory=AttackConfig, metadata={"title": "Attack (threat model)"})
    method: Method = field(default_factory=HAM, metadata={"title": "Method"})
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata={"title": "Training"})
    calibration: CalibrationConfig = field(
        default_factory=CalibrationConfig, metadata={"title": "Calibration (fairness after training)"}
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"title": "Evaluation"})
    hub: HubConfig = field(default_factory=HubConfig, metadata={"title": "Hub"})

    def __post_init__(self) -> None:
        problems = setting_problems(self.method) or list(self._method_problems())
        problems.extend(pixel_unit_problems(self.attack.norm, eval_step_size=self.evaluation.eval_step_size))
        if self.data.validation_fraction == 0 and self.training.selection_metric != "last":
            problems.append(
                f"--validation_fraction 0 leaves no images for --selection_metric {self.training.selection_metric}; "
                "hold some out, or take --selection_metric last"
            )
        if self.data.validation_fraction == 0 and self.calibration.is_asked_for:
            problems.append(
                "--validation_fraction 0 leaves no images to calibrate on (--fairness, --max_average_drop); hold some "
                "out"
            )
        if getattr(self.method, "pack_hard_examples", False) and self.training.gradient_accumulation_steps == 1:
            problems.append(
                "--pack_hard_examples packs the batches of an update, and there is one: raise "
                "--gradient_accumulation_steps, and lower --per_device_train_batch_size to keep the size of an update "
                "(a run that goes on with more processes has fewer batches per update: give it fewer processes)"
            )
        if problems:
            raise ConfigError(problems)

    def _method_problems(self) -> Iterator[str]:
        """What is wrong with the method, with those it borrows from, and with the averages around it."""
        try:
            self.method.check(num_steps=self.attack.num_steps)
        except ValueError as error:
            yield str(error)
            return
        borrowed = [problem.removeprefix("--") for part in self.method.parts[1:] for problem in setting_problems(part)]
        if borrowed:
            yield from (f"--class_rule_args: {problem}" for problem in borrowed)
            return
        try:
            self.method.check_rules()
        except ValueError as error:
            yield str(error)
        if self.data.dataset_streaming:
            own = [rule.name for rule in self.method.rules if rule.draws_classes]
            yield from (
                f"--method {name} draws a class and then one of its images, which a stream cannot give; leave "
                "--dataset_streaming out, or take another method"
                for name in own
            )
        held_out = [rule.name for rule in self.method.rules if rule.uses_held_out]
        averaged = self.training.uses_fawa(self.method)
        if self.data.validation_fraction == 0 and (held_out or averaged):
            who = f"--method {held_out[0]}" if held_out else "fairness-gated averaging (--fawa)"
            yield f"--validation_fraction 0: {who} measures classes on held-out images; hold some out"
        gate = {name: getattr(self.training, name) for name in ("fawa_decay", "fawa_threshold")}
        if not averaged:
            yield from (
                f"--{name} {value} has no effect without --fawa on"
                for name, value in gate.items()
                if value != getattr(TrainingConfig, name)
            )
        if averaged and self.training.ema_decay is not None:
            yield (
                f"--ema_decay {self.training.ema_decay}: weights are averaged once per epoch already "
                f"(--method {self.method.name}, --fawa {self.training.fawa}); take --fawa off or no --ema_decay"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SettingsGroup):
    """Everything that defines an evaluation of a model that exists."""

    model: str = field(metadata={"help": "Hub id, local folder or timm name; may be given without its flag"})
    model_revision: str | None = setting(None, "branch, tag or commit of a Hub model")
    output_dir: str | None = setting(None, "folder for report and figures; none = evaluation/<name of the model>")
    overwrite_output_dir: bool = setting(False, "allow an output folder that already holds an evaluation")
    seed: int = setting(
        0, "seed of the attacks' noise; test images and subsets are the same for every seed", "[0, 4294967295]"
    )
    use_cpu: bool = setting(False, "use the CPU even if there is an accelerator")
    ddp_timeout: int = setting(1800, "seconds that a process waits for the others before it gives up", ">= 1")
    disable_tqdm: bool = setting(False, "show no progress bar")
    data: DataConfig = field(default_factory=DataConfig, metadata={"title": "Data"})
    attack: EvaluationThreatConfig = field(
        default_factory=EvaluationThreatConfig, metadata={"title": "Attack (threat model)"}
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"title": "Evaluation"})

    @property
    def output_path(self) -> Path:
        """``output_dir``, or the folder that stands for it when it is not given."""
        return Path(self.output_dir or Path("evaluation", Path(self.model.split(":")[-1]).resolve().name))

    def contradictions(self) -> Iterator[str]:
        """A step size on the 0..255 scale."""
        if self.attack.norm is not None:
            yield from pixel_unit_problems(self.attack.norm, eval_step_size=self.evaluation.eval_step_size)


@dataclass(frozen=True, kw_only=True)
class CalibrationDataConfig(DataConfig):
    """Which data set, by default the one that the model records; what is held out is taken from that record too."""

    dataset_name: str | None = setting(  # type: ignore[assignment]  # `named` gives one with a name
        None, "Hub dataset id, local folder, or digits; none = what the model was trained on"
    )

    def named(self, dataset_name: str) -> DataConfig:
        """The same settings for a dataset of this name."""
        values = {declared.name: getattr(self, declared.name) for declared in fields(DataConfig)}
        return DataConfig(**{**values, "dataset_name": dataset_name})


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(SettingsGroup):
    """Everything that defines a calibration of a model that exists."""

    model: str = field(metadata={"help": "Hub id, local folder or timm name; may be given without its flag"})
    model_revision: str | None = setting(None, "branch, tag or commit of a Hub model")
    calibration_split: str | None = setting(
        None, "split of images that the model was not trained on; none = the part that its training run held out"
    )
    allow_training_images: bool = setting(
        False, "calibrate on the training split too, which overestimates what the shifts give; the card says so"
    )
    limit_calibration_examples: int | None = setting(
        None, "calibrate on this many images of --calibration_split, stratified", ">= 1"
    )
    output_dir: str | None = setting(None, "folder of the calibrated model; none = outputs/<model>-fair-<fairness>")
    overwrite_output_dir: bool = setting(False, "allow an output folder that already holds a calibrated model")
    model_license: str | None = setting(None, "license of the weights, for the card; none = that of the model")
    seed: int = setting(0, "seed of the attacks' noise and of the two halves of the images", "[0, 4294967295]")
    use_cpu: bool = setting(False, "use the CPU even if there is an accelerator")
    ddp_timeout: int = setting(1800, "seconds that a process waits for the others before it gives up", ">= 1")
    disable_tqdm: bool = setting(False, "show no progress bar")
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig, metadata={"title": "Calibration"})
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig, metadata={"title": "Data"})
    attack: EvaluationThreatConfig = field(
        default_factory=EvaluationThreatConfig, metadata={"title": "Attack (threat model)"}
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"title": "Evaluation"})

    @property
    def output_path(self) -> Path:
        """``output_dir``, or the folder that stands for it when it is not given."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        dial = self.calibration
        how = f"{dial.fairness:g}" if dial.fairness is not None else f"drop-{dial.max_average_drop:g}"
        return Path("outputs", f"{Path(self.model.split(':')[-1]).resolve().name}-fair-{how}")

    def contradictions(self) -> Iterator[str]:
        """No goal, settings of a split without one, an output folder that is the model's own, and lengths."""
        if not self.calibration.is_asked_for:
            yield "--fairness F (0 = as it is, 1 = all classes alike) or --max_average_drop is required"
            return
        if self.calibration_split is None:
            idle = {
                "--allow_training_images": self.allow_training_images,
                f"--limit_calibration_examples {self.limit_calibration_examples}": (
                    self.limit_calibration_examples is not None
                ),
            }
            yield from (
                f"{written} has no effect without --calibration_split" for written, given in idle.items() if given
            )
        source = Path(self.model.removeprefix("local-dir:")).expanduser()
        if source.is_dir() and source.resolve() == self.output_path.resolve():
            yield f"--output_dir {self.output_path} is the model's own folder; name another one"
        if self.attack.norm is not None:
            yield from pixel_unit_problems(self.attack.norm, eval_step_size=self.evaluation.eval_step_size)


AnyConfig: TypeAlias = TrainConfig | EvaluateConfig | CalibrateConfig


def pixel_unit_problems(norm: str, **lengths: float | None) -> Iterator[str]:
    """Lengths in an image, by the name of their setting, that look as if they were meant on the 0..255 scale."""
    for name, length in lengths.items():
        if norm != "l2" and length is not None and length > 1:
            yield (
                f"--{name} {length:g}: {name} is in pixel units of [0, 1], at most 1 unless --norm is l2; "
                f"did you mean {length:g}/255?"
            )


def sections(config: AnyConfig) -> Iterator[tuple[str, dict[str, object]]]:
    """Titles and settings of ``config`` in order; the method's section starts with its name."""
    own = {known.name: getattr(config, known.name) for known in settings_of(type(config))}
    if own:
        yield "Model and output", own
    for declared in fields(config):
        if declared.name in own:
            continue
        group = getattr(config, declared.name)
        values = {known.name: getattr(group, known.name) for known in settings_of(type(group))}
        if isinstance(group, Method):
            values = {"method": group.name, **values}
        yield declared.metadata["title"], values


def config_to_dict(config: AnyConfig) -> dict[str, object]:
    """All settings by name in one flat dictionary of what JSON can hold; reading it back gives ``config``."""
    return {name: _plain(value) for _, values in sections(config) for name, value in values.items()}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [str(item) if isinstance(item, LearningRateDrop) else item for item in value]
    return dict(value) if isinstance(value, Mapping) else value
