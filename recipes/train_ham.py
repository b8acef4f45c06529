# /// script
# dependencies = ["ham-hf"]
# ///
"""Adversarially train a timm backbone on an image-classification dataset, evaluate it per class, save and push it.

Without arguments it runs recipes/digits/ham.yaml: real data, offline, one to two minutes on a CPU.

    accelerate launch recipes/train_ham.py
    accelerate launch recipes/train_ham.py --config recipes/cifar10/preactresnet18_ham.yaml \
        --push_to_hub --hub_model_id me/robust-cifar10
    accelerate launch recipes/train_ham.py --help
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ham_hf.attacks import ThreatModel
from ham_hf.config import TrainConfig, config_to_dict, parse_train_config
from ham_hf.data.decoding import CorruptImageError
from ham_hf.data.shards import StreamError
from ham_hf.dial import check_head, fold_into, set_dial, validation_part
from ham_hf.evaluation import NonFiniteLogitsError
from ham_hf.evaluation.autoattack import require_autoattack
from ham_hf.evaluation.partial_results import remove_partial_results
from ham_hf.faults import (
    FaultError,
    MemoryExhaustedError,
    clean_exit,
    explain_faults,
    explain_interrupt,
    explain_out_of_memory,
    explain_unfinished,
)
from ham_hf.hub import PushError, check_write_access, has_ended, limit_waiting, push_folder, start_push
from ham_hf.methods import InnerAttack
from ham_hf.models import input_defaults
from ham_hf.models.source import resolve_source
from ham_hf.reporting.calibration import exchange_sentence
from ham_hf.reporting.report import results_table, text_table
from ham_hf.reporting.results import training_report, write_config, write_training
from ham_hf.runs import (
    evaluate_on_test,
    example_strip,
    export_model,
    load_data,
    new_model,
)
from ham_hf.terminal import hide_progress_bars, show
from ham_hf.training.checkpoint import check_resume_name, load_best
from ham_hf.training.launching import (
    check_shared_folder,
    create_accelerator,
    launched_processes,
    peak_memory_bytes,
    set_up_logging,
)
from ham_hf.training.optimization import check_optimizer
from ham_hf.training.output_folder import OWNED_BY_TRAINING, check_output_dir, clear_output_dir
from ham_hf.training.run_lock import RunLock
from ham_hf.training.runlog import check_tracker, end_training, start_tracker
from ham_hf.training.stopping import StopRequests, TrainingStopped, stop_requests
from ham_hf.training.train_step import NonFiniteLossError
from ham_hf.training.trainer import Trainer

logger = logging.getLogger("ham_hf.train_ham")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one training from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    limit_waiting()
    config = parse_train_config(argv, default_recipe=Path(__file__).parent / "digits" / "ham.yaml")
    if config.training.disable_tqdm:
        hide_progress_bars()
    folder = Path(config.training.output_dir)
    with (
        stop_requests(folder, config.training.max_train_hours) as stop,
        RunLock(folder) as lock,
        explain_interrupt(folder),
    ):
        train(config, stop, lock)


def train(config: TrainConfig, stop: StopRequests, lock: RunLock) -> None:
    """Run one training; ``lock`` is acquired here, on the main process."""
    folder, hub, seed = Path(config.training.output_dir), config.hub, config.training.seed
    threat_model = ThreatModel(config.attack.norm, config.attack.epsilon)

    ########################
    # Everything that can be refused, before anything is written
    ########################
    with clean_exit(ValueError, OSError, FaultError), explain_faults(num_processes=launched_processes()):
        check_tracker(config.training.report_to)
        check_optimizer(config.training.optimizer)
        if config.evaluation.autoattack:
            require_autoattack()
        if config.training.resume_from_checkpoint is not None:
            check_resume_name(folder, config.training.resume_from_checkpoint)
        check_output_dir(
            folder,
            overwrite=config.training.overwrite_output_dir,
            resume_from=config.training.resume_from_checkpoint,
        )
        inputs = input_defaults(config.model.model_name, model_args=config.model.model_args)
        # Asked now: at the end of a long run the source may be gone.
        base_model = resolve_source(config.model.model_name).hub_id if config.model.pretrained else None
        accelerator = create_accelerator(
            use_cpu=config.training.use_cpu,
            mixed_precision=config.training.mixed_precision,
            report_to=config.training.report_to,
            logging_dir=folder / "logs",
            ddp_timeout=config.training.ddp_timeout,
        )
        if accelerator.is_main_process:
            lock.acquire()
        repo_id = None
        if hub.push_to_hub and accelerator.is_main_process:
            repo_id = check_write_access(hub.hub_model_id, private=hub.hub_private_repo, revision=hub.hub_revision)
        with accelerator.main_process_first():
            data = load_data(config.data, image_size=config.model.image_size, inputs=inputs, seed=seed)
        model, preprocessing = new_model(config.model, data, seed=seed)
        # Takes the selected weights later; made now, as the trainer changes the forward and the place of its own.
        selected = copy.deepcopy(model)
        held_out = None
        if config.calibration.is_asked_for:
            held_out = validation_part(data, seed=seed)
            check_head(model, num_classes=len(data.class_names), image_size=preprocessing.image_size)
        # The other processes wait --ddp_timeout for this one.
        push, push_patience = None, min(60.0, config.training.ddp_timeout / 8)

        def export_and_push(trainer: Trainer) -> None:
            nonlocal push
            if not has_ended(push, patience=push_patience):
                logger.warning("an earlier push is still under way: the next save pushes again")
                return
            selected.load_state_dict(trainer.selected_weights())
            export_model(selected, config, data, preprocessing)
            options = {"revision": hub.hub_revision, "commit_message": f"Step {trainer.progress.step}"}
            push = start_push(folder, str(repo_id), patience=push_patience, **options)

        trainer = Trainer(
            model,
            data,
            config.method,
            InnerAttack(
                threat_model=threat_model, num_steps=config.attack.num_steps, step_size=config.attack.step_size
            ),
            config.training,
            accelerator,
            eval_batch_size=config.evaluation.per_device_eval_batch_size,
            after_save=export_and_push if hub.push_to_hub and hub.hub_strategy == "every_save" else None,
            plan_besides={
                "model_args": config_to_dict(config)["model_args"],
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
            },
        )
        # With another number of processes than before, the accumulation is another one too.
        config = replace(config, training=trainer.config)
        trainer.resume()
        if accelerator.is_main_process:
            if config.training.overwrite_output_dir:
                clear_output_dir(folder, OWNED_BY_TRAINING)
            write_config(config, folder)
        patience = min(40.0, config.training.ddp_timeout / 2)
        check_shared_folder(folder / "train_config.yaml", accelerator, patience=patience)
        start_tracker(accelerator, config.training.report_to, config_to_dict(config))

    ########################
    # Training
    ########################
    logger.info(
        "training %s on %s: %d images, %d classes, %d updates, %d process(es) on %s",
        config.model.model_name,
        data.name,
        len(data.train),
        len(data.class_names),
        trainer.total_steps,
        accelerator.num_processes,
        accelerator.device,
    )
    faults = (
        NonFiniteLossError,
        NonFiniteLogitsError,
        MemoryExhaustedError,
        CorruptImageError,
        StreamError,
        FaultError,
        OSError,
    )
    world = launched_processes()
    try:
        with clean_exit(*faults), explain_faults(num_processes=world), stop.deferred():
            progress = trainer.fit(stop)
    except TrainingStopped:
        end_training(accelerator)
        raise
    peak_memory = peak_memory_bytes(accelerator.device)
    accelerator.wait_for_everyone()

    ########################
    # Class shifts for the selected weights, from held-out images; then the test split, once
    ########################
    calibration = record = None
    way_out = (
        "fewer images at once were tried: lower --per_device_eval_batch_size all the same, or use a device with more "
        "memory; --resume_from_checkpoint latest trains nothing again"
    )
    with clean_exit(*faults), explain_faults(num_processes=world), explain_out_of_memory(way_out):
        weights, best = load_best(folder)
        selected.load_state_dict(weights)
        if held_out is not None:
            calibration = set_dial(
                selected,
                held_out,
                config.calibration,
                threat_model=threat_model,
                accelerator=accelerator,
                batch_size=config.evaluation.per_device_eval_batch_size,
                seed=seed,
                output_dir=folder,
                show_progress=not config.training.disable_tqdm,
            )
            record = fold_into(selected, calibration)
        results = evaluate_on_test(
            selected,
            data.test,
            config.evaluation,
            num_classes=len(data.class_names),
            threat_model=threat_model,
            accelerator=accelerator,
            seed=seed,
            output_dir=folder,
            memory_format=trainer.train_step.memory_format,
            show_progress=not config.training.disable_tqdm,
        )

    ########################
    # Artefacts, then the Hub
    ########################
    if accelerator.is_main_process:
        has_ended(push, patience=None)
        with clean_exit(FaultError), explain_unfinished(folder):
            exported = export_model(selected, config, data, preprocessing, calibration=record)
            report = training_report(
                config,
                selected,
                exported,
                preprocessing,
                data,
                progress,
                best,
                results,
                accelerator,
                base_model=base_model,
                peak_memory_bytes=peak_memory,
                calibration=calibration,
            )
            examples = example_strip(selected, data.test, config.evaluation, threat_model=threat_model, seed=seed)
            write_training(report, folder, results=results, examples=examples, repo_id=repo_id)
            remove_partial_results(folder)
        if calibration is not None:
            show(f"{exchange_sentence(calibration)}\n\n")
        show(text_table(results_table(report)) + f"\n\neverything is in {folder}\n")
    main_process = accelerator.is_main_process
    # Before the push: a failed one ends the process, and nobody has to wait for one that takes long.
    end_training(accelerator)
    if main_process and hub.push_to_hub:
        with clean_exit(PushError):
            url = push_folder(
                folder,
                str(repo_id),
                private=hub.hub_private_repo,
                revision=hub.hub_revision,
                commit_message="Robust model",
            )
        show(f"pushed to {url}\n")


if __name__ == "__main__":
    main()
