"""The configurations of a training, an evaluation and a calibration, made of the settings of their components.

A field's name is its flag (``--name``) and its YAML key; names are unique over all groups. Epsilon and step sizes
are in pixel units, pixels being in [0, 1]. A field with a title is a group, whose class is the field's factory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ham_hf.data.config import CalibrationDataConfig, DataConfig
from ham_hf.evaluation.config import (
    CalibrationConfig,
    EvaluationConfig,
    MoreEvaluationConfig,
    ThreatConfig,
    pixel_unit_problems,
)
from ham_hf.hub_config import EvaluationHubConfig, HubConfig, split_revision
from ham_hf.models.config import ModelConfig
from ham_hf.settings import ConfigError, SettingsGroup, same_as, setting, setting_problems, settings_of
from ham_hf.training.config import AttackConfig, LearningRateDrop, TrainingConfig

if TYPE_CHECKING:
    from ham_hf.methods import Method

DEFAULT_METHOD = "ham"
OF_TRAINING = ("validation_fraction", "limit_train_examples", "augmentation", "shuffle_buffer_size")
"""Settings of the data that only a training has a use for."""


def available_methods() -> dict[str, type[Method]]:
    """Every training method by its name. Imports torch, which takes seconds and which the rest here does without."""
    from ham_hf.methods import available

    return available()


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SettingsGroup):
    """Everything that defines a training run.

    Raises:
        ConfigError: when groups contradict each other or the method's options do not fit the attack.
    """

    data: DataConfig = field(default_factory=DataConfig, metadata={"title": "Data"})
    model: ModelConfig = field(default_factory=ModelConfig, metadata={"title": "Model"})
    attack: AttackConfig = field(default_factory=AttackConfig, metadata={"title": "Attack (threat model)"})
    method: Method = field(default_factory=lambda: available_methods()[DEFAULT_METHOD](), metadata={"title": "Method"})
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata={"title": "Training"})
    calibration: CalibrationConfig = field(
        default_factory=CalibrationConfig, metadata={"title": "Calibration (fairness after training)"}
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"title": "Evaluation"})
    hub: HubConfig = field(default_factory=HubConfig, metadata={"title": "Hub"})

    def contradictions(self) -> Iterator[str]:
        """Problems of the method, of step sizes, and of what needs held-out images or several batches per update."""
        yield from setting_problems(self.method) or self._method_problems()
        yield from pixel_unit_problems(self.attack.norm, eval_step_size=self.evaluation.eval_step_size)
        if self.data.validation_fraction == 0 and self.training.selection_metric != "last":
            yield (
                f"--validation_fraction 0 leaves no images for --selection_metric {self.training.selection_metric}; "
                "hold some out, or take --selection_metric last"
            )
        if self.data.validation_fraction == 0 and self.calibration.is_asked_for:
            yield (
                "--validation_fraction 0 leaves no images to calibrate on (--fairness, --max_average_drop); hold some "
                "out"
            )
        if getattr(self.method, "pack_hard_examples", False) and self.training.gradient_accumulation_steps == 1:
            yield (
                "--pack_hard_examples packs the batches of an update, and there is one: raise "
                "--gradient_accumulation_steps, and lower --per_device_train_batch_size to keep the size of an update "
                "(a run that resumes with more processes has fewer batches per update: give it fewer processes)"
            )

    def _method_problems(self) -> Iterator[str]:
        """Problems of the method, of the rules that it borrows, and of averaged weights."""
        try:
            self.method.check(num_steps=self.attack.num_steps)
        except ValueError as error:
            yield from error.problems if isinstance(error, ConfigError) else [str(error)]
            return
        if self.data.dataset_streaming:
            own = [self.method.flag_of(rule) for rule in self.method.rules if rule.draws_classes]
            yield from (
                f"{flag} draws a class and then one of its images, which a stream cannot give; leave "
                "--dataset_streaming out, or take another method"
                for flag in own
            )
        held_out = [self.method.flag_of(rule) for rule in self.method.rules if rule.num_held_out_sums]
        averaged = self.training.uses_fawa(self.method)
        if self.data.validation_fraction == 0 and (held_out or averaged):
            who = held_out[0] if held_out else "fairness-gated averaging (--fawa)"
            yield f"--validation_fraction 0: {who} measures classes on held-out images; hold some out"
        if not averaged:
            yield from self.training.idle(["fawa_decay", "fawa_threshold"], "--fawa on")
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
    seed: int = same_as(
        TrainingConfig, "seed", "seed of the attacks' noise; test images and subsets are the same for every seed"
    )
    use_cpu: bool = same_as(TrainingConfig, "use_cpu")
    ddp_timeout: int = same_as(TrainingConfig, "ddp_timeout")
    disable_tqdm: bool = same_as(TrainingConfig, "disable_tqdm")
    data: DataConfig = field(default_factory=DataConfig, metadata={"title": "Data"})
    attack: ThreatConfig = field(default_factory=ThreatConfig, metadata={"title": "Attack (threat model)"})
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata={"title": "Evaluation"})
    more: MoreEvaluationConfig = field(
        default_factory=MoreEvaluationConfig, metadata={"title": "Other attacks, corruptions and groups"}
    )
    hub: EvaluationHubConfig = field(default_factory=EvaluationHubConfig, metadata={"title": "Hub"})

    @property
    def output_path(self) -> Path:
        """``output_dir``, or the folder that stands for it when it is not given."""
        return Path(self.output_dir or Path("evaluation", Path(self.model.split(":")[-1]).resolve().name))

    @property
    def repo_id(self) -> str | None:
        """The repository to push to; None where none is named, and the model is not on the Hub."""
        source = None if Path(self.model).expanduser().exists() else split_revision(self.model)
        return self.hub.hub_model_id or (source[0] if source else None)

    def contradictions(self) -> Iterator[str]:
        """A step size on the 0..255 scale, a push without a repository, and settings of training data."""
        if self.hub.push_to_hub and self.repo_id is None:
            yield f"--push_to_hub needs --hub_model_id OWNER/NAME, as {self.model} is not on the Hub"
        yield from self.data.idle([*OF_TRAINING, "num_train_examples"], "training")
        yield from pixel_unit_problems(self.attack.norm, eval_step_size=self.evaluation.eval_step_size)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(SettingsGroup):
    """Everything that defines a calibration of a model that exists."""

    model: str = same_as(EvaluateConfig, "model")
    model_revision: str | None = same_as(EvaluateConfig, "model_revision")
    calibration_split: str | None = setting(
        None, "split of images that the model was not trained on; none = the part that its training run held out"
    )
    allow_training_images: bool = setting(
        False, "calibrate on the training split too, which overestimates the gain; the card says so"
    )
    limit_calibration_examples: int | None = setting(
        None, "calibrate on this many images of --calibration_split, stratified", at_least=1
    )
    output_dir: str | None = setting(None, "folder of the calibrated model; none = outputs/<model>-fair-<fairness>")
    overwrite_output_dir: bool = setting(False, "allow an output folder that already holds a calibrated model")
    model_license: str | None = setting(None, "license of the weights, for the card; none = that of the model")
    seed: int = same_as(TrainingConfig, "seed", "seed of the attacks' noise and of the two halves of the images")
    use_cpu: bool = same_as(TrainingConfig, "use_cpu")
    ddp_timeout: int = same_as(TrainingConfig, "ddp_timeout")
    disable_tqdm: bool = same_as(TrainingConfig, "disable_tqdm")
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig, metadata={"title": "Calibration"})
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig, metadata={"title": "Data"})
    attack: ThreatConfig = field(default_factory=ThreatConfig, metadata={"title": "Attack (threat model)"})
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
        """No goal, settings of a split without one, a stream, the model's own folder as output, and step sizes."""
        if not self.calibration.is_asked_for:
            yield "--fairness F (0 = as it is, 1 = all classes alike) or --max_average_drop is required"
            return
        if self.calibration_split is None:
            yield from self.idle(["allow_training_images", "limit_calibration_examples"], "--calibration_split")
        elif self.data.dataset_streaming:
            yield (
                f"--calibration_split {self.calibration_split}: a stream cannot be calibrated on; leave "
                "--dataset_streaming out"
            )
        yield from self.data.idle(OF_TRAINING, "training")
        source = Path(self.model.removeprefix("local-dir:")).expanduser()
        if source.is_dir() and source.resolve() == self.output_path.resolve():
            yield f"--output_dir {self.output_path} is the model's own folder; name another one"
        yield from pixel_unit_problems(self.attack.norm, eval_step_size=self.evaluation.eval_step_size)


AnyConfig: TypeAlias = TrainConfig | EvaluateConfig | CalibrateConfig


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
        if isinstance(config, TrainConfig) and group is config.method:
            values = {"method": config.method.name, **values}
        yield declared.metadata["title"], values


def config_to_dict(config: AnyConfig) -> dict[str, object]:
    """All settings by name in one flat dictionary of what JSON can hold; reading it back gives ``config``."""
    return {name: _plain(value) for _, values in sections(config) for name, value in values.items()}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [str(item) if isinstance(item, LearningRateDrop) else item for item in value]
    return dict(value) if isinstance(value, Mapping) else value
