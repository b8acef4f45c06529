"""The whole trainer in one call: any dataset and network, from a script, thread or notebook, any number of times."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from ham_hf.api.evaluation import EvaluationReport, count_logits, report_of
from ham_hf.artifacts import LOADING_NAME, WEIGHTS_NAME
from ham_hf.config import TrainConfig
from ham_hf.config.assembly import build_config, load_train_config
from ham_hf.config.yaml_file import Entry
from ham_hf.data import BatchRequest, DataConfig, ImageData, load_image_data
from ham_hf.data.in_memory import NAME, Examples, first_image, image_data_from
from ham_hf.evaluation.batch_sharing import remove_partial_results
from ham_hf.evaluation.verdicts import write_verdicts
from ham_hf.files import atomic_write
from ham_hf.invocation import command
from ham_hf.models import PixelModel, Preprocessing, input_defaults, new_model
from ham_hf.models.pixel_model import data_preprocessing, preprocessing_of
from ham_hf.settings import settings_of
from ham_hf.training.checkpoint import save_weights
from ham_hf.training.launch import launched_processes, peak_memory_bytes
from ham_hf.training.log import end_training, track_test_results
from ham_hf.training.run_folder import RunLock
from ham_hf.training.stopping import stop_requests
from ham_hf.training_run import Run, begin, check_settings, measure, run_of, start_accelerator, write_files

logger = logging.getLogger(__name__)

APPLIED = ("validation_fraction", "augmentation", "limit_train_examples", "limit_test_examples")
"""Settings of the data that apply to given images too."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedModel:
    """The result of `train`.

    Attributes:
        model: maps pixels (N, C, H, W) in [0, 1] to logits; the selected weights, in evaluation mode.
        report: of the test set.
        folder: weights, predictions and log; for timm networks also card, figures and ``report.json``.
        loads_with_timm: whether ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds it.
        class_names: in label order.
    """

    model: nn.Module
    report: EvaluationReport
    folder: Path
    loads_with_timm: bool
    class_names: tuple[str, ...]


def train(
    config: TrainConfig | Mapping[str, object] | str | Path | None = None,
    *,
    train: Examples | None = None,
    test: Examples | None = None,
    model: nn.Module | None = None,
    class_names: Any = None,  # noqa: ANN401 (a sequence of names)
) -> TrainedModel:
    """Train, select, evaluate on the test set and export, as ``train_ham.py`` does.

    May be called again in the same process, and from a thread (where no signal saves the run). Trackers, checkpoints
    and resuming work as from the command line. With ``accelerate launch`` all processes call it alike.

    Args:
        config: settings by the names of the command line, as a mapping, or the path of a YAML recipe, or a
            configuration; None = the defaults.
        train: a dataset of (PIL image or tensor in [0, 1], class number), torchvision's for example, or a
            ``datasets.Dataset``, without augmentation; None = the dataset that the configuration names. See
            `ham_hf.data.image_data_from`; of the settings of the data, those of ``APPLIED`` alone may be given.
        test: likewise; is needed with ``train``.
        model: maps pixels in [0, 1] to logits, and normalizes by itself, but for a plain timm network, which gets the
            normalization of its ``pretrained_cfg`` put in front; None = that of the configuration. It is not changed.
        class_names: of ``train``, in label order; None takes those of the dataset, or numbers.

    Raises:
        ValueError: for settings, data or a network that do not fit, before anything is written.
        SystemExit: with status 75, if a signal or ``max_train_hours`` stopped the run.
    """
    settings = _settings(config)
    _check(settings, train, test, class_names, model)
    if train is not None:
        settings = replace(settings, data=replace(settings.data, dataset_name=NAME))
    folder = Path(settings.training.output_dir)
    with (
        _accelerate_of_its_own(),
        stop_requests(folder, settings.training.max_train_hours) as stop,
        RunLock(folder) as lock,
    ):
        accelerator = start_accelerator(settings, lock)
        with accelerator.main_process_first():
            data = _data(settings, train, test, class_names, model)
        settings, network, preprocessing = _network(settings, model, data)
        run = run_of(settings, accelerator, data, network, preprocessing)
        begin(run, recipe=data.name != NAME and preprocessing is not None)
        with stop.deferred():
            run.trainer.fit(stop)
        accelerator.wait_for_everyone()
        trained = _finished(run)
        end_training(accelerator)
    return trained


def _settings(config: TrainConfig | Mapping[str, object] | str | Path | None) -> TrainConfig:
    if isinstance(config, TrainConfig):
        return config
    if isinstance(config, (str, Path)):
        return load_train_config(config)
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"config: expected a mapping of settings, a path or a TrainConfig, got {config!r}")
    entries = []
    for name, value in (config or {}).items():
        plain = (
            os.fspath(value) if isinstance(value, os.PathLike) else getattr(value, "tolist", lambda one=value: one)()
        )
        if node := yaml.compose(yaml.safe_dump(plain), Loader=yaml.SafeLoader):
            entries.append(Entry(str(name), node, ""))
    return build_config(TrainConfig, entries)


def _check(settings: TrainConfig, train: object, test: object, names: object, model: object) -> None:
    """Reject what can be rejected before the data is read."""
    if (train is None) != (test is None):
        missing = "test" if test is None else "train"
        raise ValueError(f"{missing} is missing: give train and test, or neither for the dataset of the configuration")
    if train is None and names is not None:
        raise ValueError("class_names: only for given images, not for a dataset that the configuration names")
    idle = [known.name for known in settings_of(DataConfig) if known.name not in APPLIED]
    idle = [name for name in idle if getattr(settings.data, name) not in (getattr(DataConfig, name), NAME)]
    if train is not None and idle:
        raise ValueError(f"{', '.join(idle)}: only for a dataset that the configuration names, not for given images")
    if model is not None and settings.model.model_args:
        raise ValueError("model_args: only for a network that the configuration names, not for a given one")
    if settings.hub.push_to_hub:
        raise ValueError(f"push_to_hub: this call writes a folder; push it afterwards with {command('push')}")
    if settings.calibration.is_asked_for:
        raise ValueError(
            "fairness: this call trains; make the result fairer with ham_hf.calibrate, on held-out images"
        )
    check_settings(settings)


@contextmanager
def _accelerate_of_its_own() -> Iterator[None]:
    """Let a run make its own accelerator; afterwards, restore the state of any other that this process has.

    accelerate keeps one state per process, which would clash with that of a second run with other settings, or of a
    notebook's own accelerator. The connection between several launched processes is kept.
    """
    kinds: list[Any] = [AcceleratorState, GradientState]
    if launched_processes() == 1:
        kinds.append(PartialState)
    kept = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in zip(kinds, kept, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def _data(
    settings: TrainConfig,
    train: Examples | None,
    test: Examples | None,
    class_names: Any,  # noqa: ANN401 (a sequence of names)
    model: nn.Module | None,
) -> ImageData:
    inputs = input_defaults(settings.model.model_name, model_args=settings.model.model_args)
    if model is not None:
        inputs = _input_of(model, inputs, None if train is None else first_image(train))
    if train is None or test is None:
        return load_image_data(
            settings.data, inputs, seed=settings.training.seed, image_size=settings.model.image_size
        )
    return image_data_from(
        train,
        test,
        inputs=inputs,
        class_names=class_names,
        image_size=settings.model.image_size,
        augmentation=settings.data.augmentation,
        validation_fraction=settings.data.validation_fraction,
        limits=(settings.data.limit_train_examples, settings.data.limit_test_examples),
        seed=settings.training.seed,
    )


def _input_of(network: nn.Module, inputs: Preprocessing, image: Any) -> Preprocessing:  # noqa: ANN401 (of any kind)
    """The input of a given network: timm's own for a plain timm network, else ``inputs``, with its channels.

    Those are the channels of the first image if it is a tensor, else of its first convolution, else of the image.
    """
    of_image = 1 if getattr(image, "mode", None) == "L" else inputs.in_chans
    convolutions = (one.in_channels for one in network.modules() if isinstance(one, nn.Conv2d))
    in_chans = next((number for number in convolutions if number in (1, 3)), of_image)
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        in_chans = int(image.shape[0])
    network = network.backbone if isinstance(network, PixelModel) else network
    cfg: Any = getattr(network, "pretrained_cfg", None)
    if cfg is not None:
        return preprocessing_of(str(cfg["architecture"]), cfg, in_chans)
    if in_chans == inputs.in_chans:
        return inputs
    return replace(inputs, in_chans=in_chans, mean=in_chans * inputs.mean[:1], std=in_chans * inputs.std[:1])


def _network(
    settings: TrainConfig, given: nn.Module | None, data: ImageData
) -> tuple[TrainConfig, nn.Module, Preprocessing | None]:
    """The settings with its name, the network to train, and its preprocessing if timm can build it."""
    if given is None:
        return settings, *new_model(settings.model, data, seed=settings.training.seed)
    network = copy.deepcopy(given).cpu()
    cfg: Any = getattr(network, "pretrained_cfg", None)
    if cfg is not None:
        own = preprocessing_of(str(cfg["architecture"]), cfg, data.in_chans)
        network = PixelModel(network, own.mean, own.std)
    (batch,) = data.test.batches([BatchRequest(torch.arange(1), None)], device=torch.device("cpu"))
    try:
        num_logits = count_logits(network, batch.x)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the model does not take images {tuple(batch.x.shape[1:])}: {error}") from error
    if num_logits != len(data.class_names):
        raise ValueError(
            f"the model has {num_logits} logits and the data {len(data.class_names)} classes; give a model with as "
            "many, or class_names for classes without an example"
        )
    if not isinstance(network, PixelModel) or not hasattr(network.backbone, "pretrained_cfg"):
        return settings, network, None
    named: Any = network.backbone
    settings = replace(settings, model=replace(settings.model, model_name=str(named.pretrained_cfg["architecture"])))
    mean, std = (tuple(one.flatten().tolist()) for one in (network.mean, network.std))
    return settings, network, data_preprocessing(data, mean, std)


def _finished(run: Run) -> TrainedModel:
    """The selected weights, evaluated on the test set and written."""
    accelerator, data, progress = run.accelerator, run.data, run.trainer.progress
    found = measure(run)
    report = report_of(found.results, data.class_names, run.threat_model)
    summaries = {attack.name: attack.summary for attack in report.entries}
    track_test_results(accelerator, summaries, data.class_names, step=progress.step)
    if accelerator.is_main_process:
        if run.preprocessing is None:
            _write_plain(run.selected, report, data, run.folder)
            remove_partial_results(run.folder)
        else:
            write_files(run, found, peak_memory_bytes(accelerator.device))
    return TrainedModel(
        model=run.selected.eval(),
        report=report,
        folder=run.folder,
        loads_with_timm=run.preprocessing is not None,
        class_names=data.class_names,
    )


def _write_plain(selected: nn.Module, report: EvaluationReport, data: ImageData, folder: Path) -> None:
    """Write weights in safetensors, predictions, and a page on how to load the weights."""
    save_weights(folder / WEIGHTS_NAME, selected.state_dict())
    write_verdicts(report.verdicts, folder)
    kind = type(selected)
    size = f"({data.in_chans}, {data.image_size}, {data.image_size})"
    text = f"""# Loading these weights

`{WEIGHTS_NAME}` holds the state dict of a `{kind.__module__}.{kind.__qualname__}`. timm cannot load it: it is no
network of timm. Build the network with its own code, then:

```python
from safetensors.torch import load_file

model.load_state_dict(load_file("{WEIGHTS_NAME}"))
model.eval()
```

It takes pixels {size} in [0, 1] and normalizes by itself. Classes, in the order of the logits:
{json.dumps(list(data.class_names), ensure_ascii=False)}

```
{report}
```
"""
    atomic_write(folder / LOADING_NAME, text)
    logger.info("%s is not a timm network: %s says how to load its weights", kind.__qualname__, folder / LOADING_NAME)
