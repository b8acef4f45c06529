"""One training run from its configuration to the pushed folder: check, prepare, fit, evaluate, write, push."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate import Accelerator
from torch import nn

from ham_hf.artifacts import OWNED_BY_TRAINING, TRAIN_CONFIG_NAME
from ham_hf.attacks import ThreatModel
from ham_hf.calibration_run import CALIBRATION_KEY, HeldOut, fold_into, set_dial, validation_part
from ham_hf.config import TrainConfig, config_to_dict
from ham_hf.data import ImageData, load_image_data
from ham_hf.data.provenance import plain_name
from ham_hf.evaluation import AttackResult
from ham_hf.evaluation.autoattack import require_autoattack
from ham_hf.evaluation.batch_sharing import Workplace, remove_partial_results
from ham_hf.evaluation_run import FAULTS, evaluate_on_test, faults_of_work, refusals
from ham_hf.faults import (
    FROM_CHECKPOINT,
    FaultError,
    clean_exit,
    explain_faults,
    explain_interrupt,
    explain_unfinished,
)
from ham_hf.hub import PushError, SavePushes, check_write_access, push_finished
from ham_hf.hub_requests import limit_waiting
from ham_hf.models import PixelModel, Preprocessing, input_defaults, new_model
from ham_hf.models.export import ExportInfo, export_for_timm
from ham_hf.models.head import check_foldable
from ham_hf.models.source import resolve_source
from ham_hf.reporting.class_examples import run_examples
from ham_hf.reporting.formats import text_table
from ham_hf.reporting.method_text import exchange_sentence
from ham_hf.reporting.report import CalibrationReport, RunReport
from ham_hf.reporting.run_report import model_section, training_report, write_config, write_run
from ham_hf.reporting.tables import results_table
from ham_hf.terminal import hide_progress_bars, show
from ham_hf.training.checkpoint import check_resume_name, load_best
from ham_hf.training.launch import check_shared_folder, create_accelerator, launched_processes, peak_memory_bytes
from ham_hf.training.log import LOGS_NAME, chosen_trackers, end_training, start_trackers, track_test_results
from ham_hf.training.optimization import check_optimizer
from ham_hf.training.run_folder import RunLock, check_output_dir, clear_output_dir
from ham_hf.training.sharding import check_sharded_settings
from ham_hf.training.stopping import StopRequests, TrainingStopped, stop_requests
from ham_hf.training.train_step import NonFiniteLossError
from ham_hf.training.trainer import Trainer

logger = logging.getLogger("ham_hf.train")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked and assembled run.

    Attributes:
        config: its settings; the accumulation is that of this number of processes.
        preprocessing: what goes with the model; None for one that timm cannot build (`ham_hf.train`).
        selected: takes the selected weights; the trainer changes forward and device of its own network.
        held_out: images to find class shifts on; None if none are asked for.
        base_model: Hub id of the pretrained weights that it starts from, if any.
        repo_id: repository to push to; None on the other processes, and if nothing is pushed.
    """

    config: TrainConfig
    accelerator: Accelerator
    data: ImageData
    preprocessing: Preprocessing | None
    selected: PixelModel
    trainer: Trainer
    held_out: HeldOut | None = None
    base_model: str | None = None
    repo_id: str | None = None
    pushes: SavePushes | None = None

    @property
    def folder(self) -> Path:
        """Its output folder."""
        return Path(self.config.training.output_dir)

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and radius of every attack."""
        return self.config.attack.threat_model


class Evaluated(NamedTuple):
    """The selected weights, measured: their state, what each attack did, and the class shifts folded into them."""

    best: Mapping[str, Any]
    results: Mapping[str, AttackResult]
    calibration: CalibrationReport | None
    record: Mapping[str, object] | None


def run_training(config: TrainConfig) -> None:
    """Run one training with its output folder locked and signals handled; after Ctrl-C say how to resume."""
    limit_waiting()
    if config.training.disable_tqdm:
        hide_progress_bars()
    folder = Path(config.training.output_dir)
    with (
        stop_requests(folder, config.training.max_train_hours) as stop,
        RunLock(folder) as lock,
        explain_interrupt(f"continue from the last checkpoint in {folder} with {FROM_CHECKPOINT}"),
    ):
        train(config, stop, lock)


def train(config: TrainConfig, stop: StopRequests, lock: RunLock) -> None:
    """The stages of one training; ``lock`` is acquired here, on the main process."""
    with refusals(FROM_CHECKPOINT):
        check_settings(config)
        run = prepare(config, lock)
        begin(run)
    peak_memory = fit(run, stop)
    less_memory = (
        "fewer images at once were tried: lower --per_device_eval_batch_size all the same, or use a device with more "
        "memory; --resume_from_checkpoint latest trains nothing again"
    )
    with faults_of_work(less_memory, FROM_CHECKPOINT):
        found = measure(run)
    is_main_process = run.accelerator.is_main_process
    if is_main_process:
        write_results(run, found, peak_memory)
    # Before the push: a failed one ends the process, and no other process has to wait for one that takes long.
    end_training(run.accelerator)
    if is_main_process and config.hub.push_to_hub:
        with clean_exit(PushError):
            push_finished(run.folder, str(run.repo_id), config.hub)


def check_settings(config: TrainConfig) -> None:
    """Reject what can be rejected without data, network or other processes.

    Raises:
        ValueError: naming the setting.
    """
    training = config.training
    chosen_trackers(training.report_to)
    check_optimizer(training.optimizer)
    if config.evaluation.autoattack:
        require_autoattack()
    folder = Path(training.output_dir)
    if training.resume_from_checkpoint is not None:
        check_resume_name(folder, training.resume_from_checkpoint)
    check_output_dir(folder, overwrite=training.overwrite_output_dir, resume_from=training.resume_from_checkpoint)


def prepare(config: TrainConfig, lock: RunLock) -> Run:
    """Lock the output folder, load data and model, and make the trainer; nothing else is written yet.

    Raises:
        ValueError: for everything that does not fit together.
        FaultError: if processes do not find each other.
    """
    hub, seed = config.hub, config.training.seed
    inputs = input_defaults(config.model.model_name, model_args=config.model.model_args)
    # Asked now: at the end of a long run the source may be gone.
    base_model = resolve_source(config.model.model_name).hub_id if config.model.pretrained else None
    accelerator = start_accelerator(config, lock)
    repo_id = None
    if hub.push_to_hub and accelerator.is_main_process:
        repo_id = check_write_access(
            hub.hub_model_id, private=hub.hub_private_repo, revision=hub.hub_revision, space=hub.hub_space
        )
    with accelerator.main_process_first():
        data = load_image_data(config.data, inputs, seed=seed, image_size=config.model.image_size)
    model, preprocessing = new_model(config.model, data, seed=seed)
    held_out = None
    if config.calibration.is_asked_for:
        held_out = validation_part(data, seed=seed)
        check_foldable(model, num_classes=len(data.class_names), image_size=preprocessing.image_size)
    # The other processes wait --ddp_timeout for this one.
    patience = min(60.0, config.training.ddp_timeout / 8)
    pushes = SavePushes(config.training.output_dir, str(repo_id), revision=hub.hub_revision, patience=patience)

    def export_and_push(trainer: Trainer) -> None:
        def export() -> None:
            run.selected.load_state_dict(trainer.selected_weights())
            export_model(run.selected, config, data, preprocessing)

        pushes.push(export, commit_message=f"Step {trainer.progress.step}")

    run = run_of(
        config,
        accelerator,
        data,
        model,
        preprocessing,
        after_save=export_and_push if hub.push_to_hub and hub.hub_strategy == "every_save" else None,
        plan_besides={
            "model_args": config_to_dict(config)["model_args"],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
        },
    )
    return replace(run, held_out=held_out, base_model=base_model, repo_id=repo_id, pushes=pushes)


def run_of(
    config: TrainConfig,
    accelerator: Accelerator,
    data: ImageData,
    network: nn.Module,
    preprocessing: Preprocessing | None,
    *,
    after_save: Callable[[Trainer], None] | None = None,
    plan_besides: Mapping[str, object] | None = None,
) -> Run:
    """Assemble a run: make its trainer, and first a copy of the network, which the trainer changes."""
    selected = copy.deepcopy(network)
    trainer = Trainer(
        network,
        data,
        config.method,
        config.attack.attack,
        config.training,
        accelerator,
        eval_batch_size=config.evaluation.per_device_eval_batch_size,
        after_save=after_save,
        plan_besides=plan_besides,
    )
    return Run(
        # With a different number of processes than before, the accumulation differs too.
        config=replace(config, training=trainer.config),
        accelerator=accelerator,
        data=data,
        preprocessing=preprocessing,
        selected=cast(PixelModel, selected),
        trainer=trainer,
    )


def start_accelerator(config: TrainConfig, lock: RunLock) -> Accelerator:
    """The accelerator of the run; the main process locks the output folder."""
    training = config.training
    accelerator = create_accelerator(
        use_cpu=training.use_cpu,
        mixed_precision=training.mixed_precision,
        trackers=chosen_trackers(training.report_to),
        logging_dir=Path(training.output_dir) / LOGS_NAME,
        ddp_timeout=training.ddp_timeout,
    )
    if accelerator.is_fsdp2:
        check_sharded_settings(training, uses_fawa=training.uses_fawa(config.method))
    if accelerator.is_main_process:
        lock.acquire()
    return accelerator


def begin(run: Run, *, recipe: bool = True) -> None:
    """Load the named checkpoint, if there is one, and write the configuration: from here on there is a run.

    Without ``recipe`` no configuration alone could repeat the run, and none is written.
    """
    training = run.config.training
    run.trainer.resume()
    if run.accelerator.is_main_process:
        if training.overwrite_output_dir:
            clear_output_dir(run.folder, OWNED_BY_TRAINING)
        if recipe:
            write_config(run.config, run.folder)
    if recipe:
        patience = min(40.0, training.ddp_timeout / 2)
        check_shared_folder(run.folder / TRAIN_CONFIG_NAME, run.accelerator, patience=patience)
    else:
        run.accelerator.wait_for_everyone()
    start_trackers(run.accelerator, run.folder, config_to_dict(run.config), step=run.trainer.progress.step)


def fit(run: Run, stop: StopRequests) -> int | None:
    """Train to the end; returns the peak of memory in bytes, where that is known.

    Raises:
        TrainingStopped: when a signal or the time limit came first; a checkpoint is written.
    """
    logger.info(
        "training %s on %s: %d images, %d classes, %d updates, %d process(es) on %s",
        run.config.model.model_name,
        run.data.name,
        len(run.data.train),
        len(run.data.class_names),
        run.trainer.total_steps,
        run.accelerator.num_processes,
        run.accelerator.device,
    )
    try:
        with (
            clean_exit(NonFiniteLossError, *FAULTS),
            explain_faults(num_processes=launched_processes()),
            stop.deferred(),
        ):
            run.trainer.fit(stop)
    except TrainingStopped:
        end_training(run.accelerator)
        raise
    peak_memory = peak_memory_bytes(run.accelerator.device)
    run.accelerator.wait_for_everyone()
    return peak_memory


def measure(run: Run) -> Evaluated:
    """Class shifts for the selected weights, from held-out images, if asked for; then the test split, once."""
    config, calibration, record = run.config, None, None
    place = Workplace(
        accelerator=run.accelerator,
        batch_size=config.evaluation.per_device_eval_batch_size,
        seed=config.training.seed,
        output_dir=run.folder,
        show_progress=not config.training.disable_tqdm,
    )
    weights, best = load_best(run.folder)
    run.selected.load_state_dict(weights)
    if run.held_out is not None:
        calibration = set_dial(
            run.selected, run.held_out, config.calibration, threat_model=run.threat_model, place=place
        )
        record = fold_into(run.selected, calibration)
    results = evaluate_on_test(
        run.selected.to(run.accelerator.device).to(memory_format=run.trainer.train_step.memory_format),
        run.data,
        config.evaluation,
        threat_model=run.threat_model,
        place=place,
    )
    return Evaluated(best, results, calibration, record)


def write_results(run: Run, found: Evaluated, peak_memory: int | None) -> None:
    """`write_files` and the table onto the terminal; on the main process."""
    if run.pushes is not None:
        run.pushes.wait()
    with clean_exit(FaultError), explain_unfinished(run.folder):
        report = write_files(run, found, peak_memory)
    summaries = {attack.name: attack.summary for attack in report.entries()}
    track_test_results(run.accelerator, summaries, run.data.class_names, step=run.trainer.progress.step)
    if found.calibration is not None:
        show(f"{exchange_sentence(found.calibration)}\n\n")
    show(text_table(results_table(report)) + f"\n\neverything is in {run.folder}\n")


def write_files(run: Run, found: Evaluated, peak_memory: int | None) -> RunReport:
    """Write model, report, card and figures into the output folder."""
    config, data, preprocessing = run.config, run.data, run.preprocessing
    assert preprocessing is not None  # noqa: S101 (timm can build the network)
    exported = export_model(run.selected, config, data, preprocessing, calibration=found.record)
    model = model_section(config.model.model_name, exported, preprocessing, base_model=run.base_model)
    report = training_report(
        config,
        model,
        data,
        found.results,
        run.accelerator,
        progress=run.trainer.progress,
        best=found.best,
        peak_memory_bytes=peak_memory,
        calibration=found.calibration,
    )
    examples = run_examples(
        run.selected,
        data.test,
        config.evaluation,
        found.results,
        threat_model=run.threat_model,
        seed=config.training.seed,
    )
    write_run(report, run.folder, results=found.results, examples=examples, repo_id=run.repo_id)
    remove_partial_results(run.folder)
    return report


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
            **({} if calibration is None else {CALIBRATION_KEY: dict(calibration)}),
        },
        model_license=config.hub.model_license,
        tag=config.method.name,
    )
