"""The workload: a network, batches whose number of hard rows is known beforehand, and our steps as users get them.

**The hard fraction is set by construction.** The classifier's bias lifts the logit of class 0 by `MARGIN`, far more
than an attack of 8/255 on the untrained network can make up for, so every image is predicted as class 0 at every
iterate, whatever the noise, the method or the layout. A row labeled 0 is therefore easy, any other one is hard, and
the labels alone decide how many there are. This costs nothing, holds for our steps and for the yardsticks alike, and
is checked after every measured call. Weights stay as they are because the learning rate is next to nothing;
BatchNorm's running statistics start at those of a batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.config import TrainingConfig
from ham_hf.data import ImageData, Images, PixelBatch
from ham_hf.data.pixels import CachedPixels
from ham_hf.methods import HAM, PGDAT, Method
from ham_hf.models import PixelModel, Preprocessing, create_backbone
from ham_hf.training.train_step import Totals
from ham_hf.training.trainer import Trainer

NUM_CLASSES = 10
IMAGE_SIZE = 32
EPSILON, STEP_SIZE, NUM_STEPS, MINING_STEP = 8 / 255, 2 / 255, 10, 3
ATTACK = Attack(threat_model=ThreatModel("linf", EPSILON), num_steps=NUM_STEPS, step_size=STEP_SIZE)
METHODS: dict[str, Method] = {
    "ham": HAM(mining_step=MINING_STEP, mining_start_epoch=0),
    "ham_packed": HAM(mining_step=MINING_STEP, mining_start_epoch=0, pack_hard_examples=True),
    "pgd_at": PGDAT(),
}
LEARNING_RATE = 1e-8
MARGIN = 10.0


def network(name: str, model_args: Mapping[str, object], *, margin: float = MARGIN) -> PixelModel:
    """An untrained network for 32x32 images that puts everything into class 0.

    Args:
        name: timm name.
        model_args: arguments of the architecture.
        margin: by how much the classifier's bias prefers class 0; 0 leaves the network alone.

    Raises:
        ValueError: if the network's classifier has no bias.
    """
    size = Preprocessing(
        image_size=IMAGE_SIZE, in_chans=3, interpolation="bicubic", crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    torch.manual_seed(0)
    backbone = create_backbone(
        name, pretrained=False, num_classes=NUM_CLASSES, preprocessing=size, model_args=model_args
    )
    model = PixelModel(backbone, size.mean, size.std)
    _set_batch_statistics(model, pixels(16))
    if margin:
        prefer_class_0(backbone, name, margin)
    return model


def prefer_class_0(backbone: nn.Module, name: str, margin: float = MARGIN) -> None:
    """Have a network put everything into class 0, by the bias of its classifier.

    Raises:
        ValueError: if the classifier has no bias.
    """
    classifier = backbone.get_classifier()
    if getattr(classifier, "bias", None) is None:
        raise ValueError(f"--model {name}: its classifier has no bias, by which the hard fraction is set")
    with torch.no_grad():
        classifier.bias.zero_()
        classifier.bias[0] = margin


def _set_batch_statistics(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorm the statistics of ``x``, as after some training, instead of 0 and 1."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches seen, of which there is one
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def pixels(num: int) -> Tensor:
    """(num, 3, 32, 32) noise in [0, 1]; what an image shows does not change what a pass over it costs."""
    return torch.rand(num, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def num_hard(num: int, hard_fraction: float) -> int:
    """How many of ``num`` rows are hard."""
    return round(hard_fraction * num)


def labels(num: int, hard_fraction: float, *, seed: int = 2) -> Tensor:
    """(num,) labels of which exactly `num_hard` are not 0, spread over the batch."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    y = torch.zeros(num, dtype=torch.long)
    hard = order[: num_hard(num, hard_fraction)]
    y[hard] = 1 + hard % (NUM_CLASSES - 1)
    return y


def image_data(y: Tensor) -> ImageData:
    """Noise images with these labels as a dataset in memory, for what needs one to be built."""
    stored = CachedPixels((pixels(len(y)) * 255).to(torch.uint8), move_to_device=False)
    images = Images(y, stored, "none")
    return ImageData(
        name="noise",
        config_name=None,
        revision=None,
        train=images,
        validation=None,
        test=images,
        class_names=tuple(str(label) for label in range(NUM_CLASSES)),
        image_size=IMAGE_SIZE,
        in_chans=3,
        crop_pct=1.0,
        interpolation="bicubic",
        channel_mean=(0.5,) * 3,
        channel_std=(0.25,) * 3,
        augmentation="none",
        num_skipped=0,
        test_split_origin="test",
    )


def training_config(precision: str, batch_size: int, settings: Mapping[str, object], **more: object) -> TrainingConfig:
    """Settings of training: the defaults, at a learning rate that leaves the weights alone."""
    values = {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "selection_metric": "last",
        "mixed_precision": "bf16" if precision == "bf16" else "no",
        "disable_tqdm": True,
    }
    return TrainingConfig(**{**values, **more, **settings})


class OurStep:
    """One update of training, by the ``TrainStep`` that the trainer makes of these settings.

    Args:
        method: "ham" or "pgd_at".
        model: the pixel model; becomes the trainer's.
        accelerator: of the process.
        precision: "fp32" or "bf16".
        batch_size: images per process.
        settings: other settings of training.
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        precision: str,
        batch_size: int,
        settings: Mapping[str, object],
    ) -> None:
        config = training_config(precision, batch_size, settings)
        data = image_data(labels(batch_size * accelerator.num_processes, 0.5))
        self._step = Trainer(model, data, METHODS[method], ATTACK, config, accelerator).train_step

    def __call__(self, batch: PixelBatch) -> Totals:
        """One update; always the first one, so that every call draws the same noise.

        It counts as an epoch: the next call classifies as after an epoch with this one's share of hard examples.
        """
        totals = self._step([batch], epoch=0, step=0)
        self._step.method_state.begin_epoch(0, lambda part: torch.zeros(()))
        return totals


def batch_of(num: int, hard_fraction: float, device: torch.device) -> PixelBatch:
    """A batch as the data pipeline hands it over: contiguous pixels and labels on the device."""
    return PixelBatch(pixels(num).to(device), labels(num, hard_fraction).to(device), torch.arange(num))
