# /// script
# dependencies = ["ham-hf"]
# ///
"""Adversarially train a timm backbone on an image-classification dataset, evaluate it per class, save and push it.

Without arguments it runs recipes/digits/ham.yaml: real data, offline, about two minutes on two CPU cores.

    accelerate launch recipes/train_ham.py
    accelerate launch recipes/train_ham.py --config recipes/cifar10/preactresnet18_ham.yaml \
        --push_to_hub --hub_model_id me/robust-cifar10
    accelerate launch recipes/train_ham.py --help
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ham_hf.attacks import ThreatModel
from ham_hf.checkpoint import claim_output_dir, load_best
from ham_hf.config import config_to_dict, config_to_yaml, parse_train_config
from ham_hf.evaluation import require_autoattack
from ham_hf.hub import PushError, check_write_access, push_folder, try_push
from ham_hf.launching import clean_exit, create_accelerator, set_up_logging
from ham_hf.models import input_defaults
from ham_hf.objectives import InnerAttack
from ham_hf.report import results_table, text_table
from ham_hf.reporting import training_report, write_training
from ham_hf.runlog import check_tracker
from ham_hf.runs import (
    evaluate_on_test,
    example_strip,
    export_model,
    load_data,
    new_model,
)
from ham_hf.train_step import NonFiniteLossError
from ham_hf.trainer import Progress, Trainer

logger = logging.getLogger("ham_hf.train_ham")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one training from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    ########################
    # Settings, and everything that can be refused before anything expensive starts
    ########################
    config = parse_train_config(argv, default_recipe=Path(__file__).parent / "digits" / "ham.yaml")
    folder, hub, seed = Path(config.training.output_dir), config.hub, config.training.seed
    threat_model = ThreatModel(config.attack.norm, config.attack.epsilon)
    with clean_exit(ValueError):
        check_tracker(config.training.report_to)
        if config.evaluation.autoattack:
            require_autoattack()
    accelerator = create_accelerator(
        use_cpu=config.training.use_cpu,
        mixed_precision=config.training.mixed_precision,
        report_to=config.training.report_to,
        logging_dir=folder / "logs",
    )
    repo_id = None
    with clean_exit(ValueError):
        inputs = input_defaults(config.model.model_name, model_args=config.model.model_args)
        if accelerator.is_main_process:
            claim_output_dir(
                folder,
                overwrite=config.training.overwrite_output_dir,
                resume=config.training.resume_from_checkpoint is not None,
            )
            if hub.push_to_hub:
                repo_id = check_write_access(hub.hub_model_id, private=hub.hub_private_repo, revision=hub.hub_revision)
            (folder / "train_config.yaml").write_text(config_to_yaml(config))

        ########################
        # Data and model
        ########################
        with accelerator.main_process_first():
            data = load_data(config.data, image_size=config.model.image_size, inputs=inputs, seed=seed)
        model, preprocessing = new_model(config.model, data, seed=seed)

        def export_and_push(progress: Progress) -> None:
            selected, _ = new_model(config.model, data, seed=seed)
            selected.load_state_dict(load_best(folder)[0])
            export_model(selected, config, data, preprocessing)
            try_push(folder, str(repo_id), revision=hub.hub_revision, commit_message=f"Step {progress.step}")

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
        )
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
        accelerator.init_trackers("ham_hf", config={key: str(value) for key, value in config_to_dict(config).items()})
        trainer.resume()

    ########################
    # Training
    ########################
    with clean_exit(NonFiniteLossError):
        progress = trainer.fit()

    ########################
    # Evaluation of the selected weights on the test split, once
    ########################
    accelerator.wait_for_everyone()
    selected, _ = new_model(config.model, data, seed=seed)
    weights, best = load_best(folder)
    selected.load_state_dict(weights)
    results = evaluate_on_test(
        selected,
        data.test,
        config.evaluation,
        num_classes=len(data.class_names),
        threat_model=threat_model,
        accelerator=accelerator,
        seed=seed,
        show_progress=not config.training.disable_tqdm,
    )

    ########################
    # Artefacts, then the Hub
    ########################
    if accelerator.is_main_process:
        exported = export_model(selected, config, data, preprocessing)
        report = training_report(config, selected, exported, preprocessing, data, progress, best, results, accelerator)
        examples = example_strip(selected, data.test, config.evaluation, threat_model=threat_model, seed=seed)
        write_training(report, folder, examples=examples, repo_id=repo_id)
        sys.stdout.write(text_table(results_table(report)) + f"\n\neverything is in {folder}\n")
        if hub.push_to_hub:
            with clean_exit(PushError):
                url = push_folder(folder, str(repo_id), revision=hub.hub_revision, commit_message="Robust model")
            sys.stdout.write(f"pushed to {url}\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
