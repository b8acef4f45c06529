"""The stages that the recipes put together: data and model from settings, evaluation, export."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, evaluation_mode, pgd, unsaturated_cross_entropy
from ham_hf.config import (
    DataConfig,
    EvaluationConfig,
    EvaluationThreatConfig,
    ModelConfig,
    MoreEvaluationConfig,
    TrainConfig,
    pixel_unit_problems,
)
from ham_hf.data import BatchRequest, ImageData, Images, TestData, load_image_data, load_test_data
from ham_hf.data.decoding import EvalTransform
from ham_hf.data.evaluation_data import TrainedOn
from ham_hf.data.parts import DatasetChoice
from ham_hf.data.provenance import Provenance, plain_name, read_provenance
from ham_hf.evaluation import AttackResult, evaluate, predict, standard_attacks
from ham_hf.evaluation.autoattack import evaluate_autoattack
from ham_hf.evaluation.corruption_accuracy import CorruptionResult, evaluate_corruptions
from ham_hf.evaluation.corruptions import chosen_corruptions
from ham_hf.evaluation.foreign import ForeignAttack
from ham_hf.evaluation.partial_results import partial_results
from ham_hf.evaluation.verdicts import verdicts_of
from ham_hf.models import LoadedModel, PixelModel, Preprocessing, create_backbone, input_defaults
from ham_hf.models.export import ExportInfo, export_for_timm
from ham_hf.models.pixel_model import imagenet_synsets
from ham_hf.reporting.class_examples import (
    AttackedImages,
    ClassExamples,
    choose_images,
    encode_examples,
    worst_classes,
)
from ham_hf.reporting.plots import ExampleStrip
from ham_hf.reporting.report import plain_text
from ham_hf.seeding import Stream, make_generator

logger = logging.getLogger(__name__)

NUM_EXAMPLES_SHOWN = 8


def load_data(config: DataConfig, *, image_size: int | None, inputs: Preprocessing, seed: int) -> ImageData:
    """The dataset of a run, in the geometry and channels that the model takes.

    Args:
        config: settings of the data.
        image_size: side in pixels; None lets the dataset decide, or the model's own for large images.
        inputs: what goes with the model.
        seed: seed of the held-out parts and limits.
    """
    return load_image_data(
        **asdict(config),
        image_size=image_size,
        default_image_size=inputs.image_size,
        in_chans=inputs.in_chans,
        interpolation=inputs.interpolation,
        crop_pct=inputs.crop_pct,
        crop_mode=inputs.crop_mode,
        border_color=inputs.mean,
        seed=seed,
    )


def load_evaluation_data(config: DataConfig, loaded: LoadedModel, *, group_column: str | None = None) -> TestData:
    """What a finished model is evaluated on: the named or only split, whole, unless the model was trained on it.

    See `ham_hf.data.evaluation_data.evaluation_part`. ``group_column`` names a column of groups.

    Raises:
        ValueError: for anything that does not fit, or where every image of the split was for training.
    """
    inputs, trained = loaded.preprocessing, loaded.metadata
    return load_test_data(
        DatasetChoice(
            name=config.dataset_name,
            config_name=config.dataset_config_name,
            revision=config.dataset_revision,
            train_split=config.train_split,
            test_split=config.test_split,
            image_column=config.image_column,
            label_column=config.label_column,
            in_chans=inputs.in_chans,
            group_column=group_column,
        ),
        TrainedOn(
            record=provenance_of(loaded),
            dataset=trained.get("dataset"),
            test_fraction=trained.get("test_fraction"),
            class_names=loaded.class_names,
        ),
        test_fraction=config.test_fraction,
        limit_test_examples=config.limit_test_examples,
        streaming=config.dataset_streaming,
        geometry=EvalTransform(
            inputs.image_size,
            inputs.crop_pct,
            inputs.interpolation,
            crop_mode=inputs.crop_mode,
            border_color=inputs.mean,
        ),
        cache_images=config.cache_images,
        skip_corrupt=config.skip_corrupt,
        num_workers=config.dataloader_num_workers,
    )


def new_model(config: ModelConfig, data: ImageData, *, seed: int) -> tuple[PixelModel, Preprocessing]:
    """A model to train, the same on every process.

    Pretrained weights keep the mean and standard deviation they were trained with; a new network gets the data's,
    unless images are brought to their size with borders of the mean color, which then has to stay.
    """
    inputs = input_defaults(config.model_name, model_args=config.model_args)
    own_statistics = config.pretrained or data.crop_mode == "border"
    preprocessing = Preprocessing(
        image_size=data.image_size,
        in_chans=data.in_chans,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        crop_mode=data.crop_mode,
        mean=inputs.mean if own_statistics else data.channel_mean,
        std=inputs.std if own_statistics else data.channel_std,
    )
    torch.manual_seed(seed)
    backbone = create_backbone(
        config.model_name,
        pretrained=config.pretrained,
        num_classes=len(data.class_names),
        preprocessing=preprocessing,
        model_args=config.model_args,
    )
    return PixelModel(backbone, preprocessing.mean, preprocessing.std), preprocessing


def evaluate_on_test(
    model: nn.Module,
    images: Images,
    config: EvaluationConfig,
    *,
    num_classes: int,
    threat_model: ThreatModel,
    accelerator: Accelerator,
    seed: int,
    output_dir: Path,
    foreign: Sequence[ForeignAttack] = (),
    memory_format: torch.memory_format = torch.channels_last,
    show_progress: bool = True,
) -> dict[str, AttackResult]:
    """Clean, PGD and CW accuracy, and AutoAttack if asked for, of every example.

    Finished batches are kept in the output folder until `remove_partial_results`, and are not computed again.

    Args:
        model: the unwrapped pixel model; moved to the device and into the memory format.
        images: the test split.
        config: which attacks.
        num_classes: number of logits.
        threat_model: norm and radius.
        accelerator: shares the batches out.
        seed: seed of the attacks.
        output_dir: output folder of the run.
        foreign: attacks of other libraries to run too.
        memory_format: layout of weights and images; the same numbers up to rounding.
        show_progress: show bars on the local main process.
    """
    model = model.to(accelerator.device).to(memory_format=memory_format)
    partial = partial_results(output_dir, model, images)
    results = evaluate(
        model,
        images,
        [*standard_attacks(config.eval_num_steps, eval_step_size(config, threat_model)), *foreign],
        threat_model=threat_model,
        accelerator=accelerator,
        batch_size=config.per_device_eval_batch_size,
        seed=seed,
        partial=partial,
        show_progress=show_progress,
    )
    if config.autoattack:
        results["autoattack"] = evaluate_autoattack(
            model,
            images,
            num_classes=num_classes,
            threat_model=threat_model,
            accelerator=accelerator,
            batch_size=config.per_device_eval_batch_size,
            seed=seed,
            num_examples=config.autoattack_examples,
            partial=partial,
            show_progress=show_progress,
        )
    return results


def evaluate_corrupted(
    model: nn.Module,
    data: TestData,
    config: MoreEvaluationConfig,
    *,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    output_dir: Path,
    show_progress: bool = True,
) -> list[CorruptionResult]:
    """What a model, on its device already, makes of corrupted test images; nothing where none are asked for.

    Finished batches are kept in the output folder as by `evaluate_on_test`.
    """
    names = chosen_corruptions(config.corruptions, num_channels=data.in_chans)
    if not names:
        return []
    return evaluate_corruptions(
        model,
        data.test,
        names,
        config.severities,
        num_channels=data.in_chans,
        accelerator=accelerator,
        batch_size=batch_size,
        seed=seed,
        partial=partial_results(output_dir, model, data.test),
        show_progress=show_progress,
    )


def eval_step_size(config: EvaluationConfig, threat_model: ThreatModel) -> float:
    """Length of the steps of PGD and CW: the setting, or a quarter of epsilon."""
    return config.eval_step_size if config.eval_step_size is not None else float(threat_model.epsilon) / 4


def find_validation_part(loaded: LoadedModel, config: DataConfig) -> ImageData:
    """The data that a model was trained on, held out just as in training; ``validation`` is what it never trained on.

    Args:
        loaded: the model; its ``config.json`` records the split, the seed and the shares.
        config: says where the data is now (``dataset_name``) and how it is decoded. What decides which images are
            held out is taken from the record, whatever it says.

    Raises:
        ValueError: if the model records nothing or held nothing out, or if the data is not what it was trained on.
    """
    trained = provenance_of(loaded)
    if trained is None:
        raise ValueError(
            "the model's config.json does not record what it was trained on (ham_hf.trained_on), so its validation "
            "images cannot be found again; train it with this version"
        )
    if trained.validation_fraction == 0:
        raise ValueError(
            "the model was trained with --validation_fraction 0, so it has seen every training image; choose a model "
            "that was trained with a held-out part"
        )
    settings = trained.loading_settings(config.dataset_name)
    seed = settings.pop("seed")
    data = load_data(
        replace(config, **settings),
        image_size=loaded.preprocessing.image_size,
        inputs=loaded.preprocessing,
        seed=seed,
    )
    found = data.provenance
    if found is None or (found.num_images, found.fingerprint) != (trained.num_images, trained.fingerprint):
        raise ValueError(
            f"--dataset_name {config.dataset_name}: split {trained.train_split!r} is not what the model was trained "
            f"on, {trained.num_images} images of {trained.dataset}: number of images or labels differ; give that "
            "dataset, or a copy of it"
        )
    return data


def provenance_of(loaded: LoadedModel) -> Provenance | None:
    """What a model was trained on; None if its ``config.json`` does not say so.

    Raises:
        ValueError: if the record is damaged.
    """
    record = loaded.metadata.get("trained_on")
    if record is None:
        return None
    try:
        return read_provenance(record)
    except ValueError as error:
        raise ValueError(f"the model's config.json is damaged: ham_hf.{error}") from error


def example_strip(
    model: nn.Module,
    images: Images,
    config: EvaluationConfig,
    results: Mapping[str, AttackResult],
    *,
    threat_model: ThreatModel,
    seed: int,
) -> ExampleStrip:
    """Images of the classes that withstood the attacks of ``results`` least, the worst first, for the figure.

    Of each class the first image, before and after the evaluation's PGD.
    """
    device = next(model.parameters()).device
    attack = standard_attacks(config.eval_num_steps, eval_step_size(config, threat_model))[0]
    worst = worst_classes(verdicts_of(results, ()))[:NUM_EXAMPLES_SHOWN]
    firsts = torch.tensor([int((images.labels == label).nonzero()[0]) for label in worst])
    (batch,) = images.batches([BatchRequest(firsts, None)], device=device)
    with evaluation_mode(model):
        x_adv = pgd(
            model,
            batch.x,
            batch.y,
            threat_model=threat_model,
            num_steps=attack.num_steps,
            step_size=attack.step_size,
            loss_fn=unsaturated_cross_entropy,
            generator=make_generator(device, seed, Stream.EVALUATION, 0, 0),
        )
        return ExampleStrip(
            clean=batch.x,
            adversarial=x_adv,
            labels=batch.y,
            clean_predictions=predict(model, batch.x),
            adversarial_predictions=predict(model, x_adv),
            attack=attack.name.upper(),
        )


def class_examples(
    model: nn.Module,
    images: Images,
    config: EvaluationConfig,
    results: Mapping[str, AttackResult],
    *,
    threat_model: ThreatModel,
    seed: int,
) -> ClassExamples | None:
    """The most easily broken images of each class and the ones that hold, for the page; None without an attack.

    They are chosen by the verdicts of ``results`` and attacked again with its PGD, from other random starts.
    """
    verdicts = verdicts_of(results, ())
    chosen = choose_images(verdicts)
    if not chosen:
        return None
    device = next(model.parameters()).device
    attack = standard_attacks(config.eval_num_steps, eval_step_size(config, threat_model))[0]
    rows = torch.tensor([row for row, _ in chosen])
    found = list[tuple[Tensor, Tensor, Tensor]]()
    size = config.per_device_eval_batch_size
    requests = [BatchRequest(part, None) for part in torch.split(verdicts.positions[rows], size)]
    with evaluation_mode(model):
        for number, batch in enumerate(images.batches(requests, device=device)):
            x_adv = pgd(
                model,
                batch.x,
                batch.y,
                threat_model=threat_model,
                num_steps=attack.num_steps,
                step_size=attack.step_size,
                loss_fn=unsaturated_cross_entropy,
                generator=make_generator(device, seed, Stream.EVALUATION, 0, number),
            )
            found.append((batch.x.cpu(), x_adv.cpu(), predict(model, x_adv).cpu()))
    clean, attacked, predictions = (torch.cat(parts) for parts in zip(*found, strict=True))
    shown = AttackedImages(
        rows=rows,
        kinds=[kind for _, kind in chosen],
        clean=clean,
        attacked=attacked,
        attacked_predictions=predictions,
    )
    return encode_examples(shown, verdicts, attack=attack.name.upper())


def export_model(
    model: PixelModel,
    config: TrainConfig,
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    calibration: Mapping[str, object] | None = None,
) -> ExportInfo:
    """Write ``model.safetensors`` and ``config.json`` for plain timm into the output folder.

    ``calibration`` is the record of the class shifts that are folded into the model, if there are any.
    """
    return export_for_timm(
        model,
        config.training.output_dir,
        preprocessing=preprocessing,
        class_names=data.class_names,
        metadata={
            "norm": config.attack.norm,
            "epsilon": config.attack.epsilon,
            "method": config.method.name,
            "dataset": plain_name(data.name),
            "test_fraction": config.data.test_fraction,
            "trained_on": data.provenance.record() if data.provenance is not None else None,
            **({} if calibration is None else {"calibration": dict(calibration)}),
        },
        model_license=config.hub.model_license,
        tag=config.method.name,
    )


def threat_model_of(
    config: EvaluationThreatConfig, loaded: LoadedModel, *, eval_step_size: float | None = None
) -> ThreatModel:
    """The threat model asked for; where nothing is, the one the model was trained for, else linf 8/255.

    Raises:
        ValueError: if l2 is asked for, no epsilon, and the model was trained for something else; or if a length is on
            the 0..255 scale.
    """
    trained_norm, trained_epsilon = loaded.metadata.get("norm"), loaded.metadata.get("epsilon")
    norm = config.norm or trained_norm or "linf"
    problems = list(pixel_unit_problems(norm, epsilon=config.epsilon, eval_step_size=eval_step_size))
    if problems:
        raise ValueError("; ".join(problems))
    if config.epsilon is not None:
        return ThreatModel(norm, config.epsilon)
    if trained_epsilon is not None and norm == trained_norm:
        return ThreatModel(norm, float(trained_epsilon))
    if norm != "linf":
        raise ValueError(f"--norm {norm} needs --epsilon: there is no usual radius for it")
    return ThreatModel(norm, 8 / 255)


def num_logits(loaded: LoadedModel) -> int:
    """Number of classes that a model tells apart.

    Raises:
        ValueError: if it has no classifier.
    """
    found = int(loaded.model.backbone.num_classes)  # type: ignore[arg-type]  # timm's attribute
    if found < 1:
        raise ValueError("the model has no classifier, only features: train one on top of it first")
    return found


class ReorderedLogits(nn.Module):
    """A classifier whose logits are put into another order of classes."""

    order: Tensor

    def __init__(self, model: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of pixels (N, C, H, W) in the new order."""
        logits: Tensor = self.model(x)
        return logits[:, self.order]


class AlignedModel(NamedTuple):
    """A model with its logits in the order of a dataset's classes.

    Attributes:
        model: the model.
        class_order: ``by name``; ``subset``: by name, and the dataset has some of the model's classes only, so only
            their logits are attacked and decided over; ``assumed``: names say nothing, the orders are taken to be one.
    """

    model: nn.Module
    class_order: str


def align_classes(loaded: LoadedModel, class_names: Sequence[str]) -> AlignedModel:
    """The model with its logits in the order of the dataset's classes; names that both have decide.

    Raises:
        ValueError: if the dataset has a class that the model does not name while they share others at different
            places, or if they share none and their numbers differ.
    """
    names, number = loaded.class_names, num_logits(loaded)
    numbers, synsets = tuple(map(str, range(number))), imagenet_synsets(number)
    if names is None and set(class_names) == set(numbers):
        # Folders 0, 1, 10, 100, ... come sorted as text, where a model that names no classes counts (ImageNetV2).
        names = numbers
    if names is None and all(name in (synsets or ()) for name in class_names):
        names = synsets  # timm's models name no classes; ImageNet-A and ImageNet-R have 200 of the 1,000
    if names is not None and tuple(names) == tuple(class_names):
        return AlignedModel(loaded.model, "by name")
    shared = set(names or ()) & set(class_names)
    lists = f"the model's: {_shown_names(names or ())}; the dataset's: {_shown_names(class_names)}"
    if names is not None and shared == set(class_names):
        twice = sorted(name for name in shared if names.count(name) > 1)
        if twice:
            raise ValueError(
                f"the model has {names.count(twice[0])} classes called {plain_text(twice[0])!r}, so the dataset's "
                f"cannot be matched by name ({lists}); evaluate it on the dataset it was trained for"
            )
        same = len(class_names) == number
        if not same:
            logger.warning(
                "the dataset has %d of the model's %d classes: attacked and decided over those alone",
                len(class_names),
                number,
            )
        order = [names.index(name) for name in class_names]
        return AlignedModel(ReorderedLogits(loaded.model, order), "by name" if same else "subset")
    if number != len(class_names):
        raise ValueError(
            f"the model tells {number} classes apart and the dataset has {len(class_names)}"
            + (f", {len(class_names) - len(shared)} of which the model does not name" if names else "")
            + f" ({lists}); evaluate it on the dataset it was trained for, or name another --label_column"
        )
    if names is None:
        logger.warning("the model does not name its classes: taking them to be in the order of the dataset's")
        return AlignedModel(loaded.model, "assumed")
    moved = [name for name, own in zip(class_names, names, strict=True) if name in shared and name != own]
    unknown = [name for name in class_names if name not in shared]
    if moved:
        raise ValueError(
            f"the dataset's class {plain_text(unknown[0])!r} is none of the model's, and they share others at "
            f"different places, such as {plain_text(moved[0])!r}, so the order cannot be assumed ({lists}); give "
            "the dataset's classes the model's names"
        )
    logger.warning(
        "the model calls its classes %s, the dataset %s: taking them to be in the same order",
        ", ".join(map(plain_text, names[:5])),
        ", ".join(map(plain_text, class_names[:5])),
    )
    return AlignedModel(loaded.model, "assumed")


def _shown_names(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 12 else ""
    return ", ".join(map(plain_text, names[:12])) + more if names else "not named"
