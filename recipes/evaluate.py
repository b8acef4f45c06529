# /// script
# dependencies = ["ham-hf"]
# ///
"""Measure robustness per class of any model on any dataset: a Hub id, a local folder or a timm name.

    python recipes/evaluate.py outputs/digits-ham --dataset_name digits
    accelerate launch recipes/evaluate.py me/robust-cifar10 --dataset_name uoft-cs/cifar10 --autoattack
    python recipes/evaluate.py --help

Writes report.json, figures/ and EVALUATION.md (the evaluation part of a model card).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from ham_hf.checkpoint import claim_output_dir
from ham_hf.config import config_to_dict, parse_evaluate_config
from ham_hf.evaluation import require_autoattack
from ham_hf.launching import clean_exit, create_accelerator, set_up_logging
from ham_hf.models import load_pixel_model
from ham_hf.report import results_table, text_table
from ham_hf.reporting import evaluation_report, write_evaluation
from ham_hf.runs import (
    align_classes,
    evaluate_on_test,
    example_strip,
    load_data,
    threat_model_of,
)

logger = logging.getLogger("ham_hf.evaluate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one evaluation from the command line ``argv`` (None: the process's)."""
    set_up_logging()
    config = parse_evaluate_config(argv)
    accelerator = create_accelerator(use_cpu=config.use_cpu)
    with clean_exit(ValueError):
        if config.evaluation.autoattack:
            require_autoattack()
        loaded = load_pixel_model(config.model, revision=config.model_revision)
        threat_model = threat_model_of(config.attack, loaded)
        if accelerator.is_main_process:
            claim_output_dir(config.output_path, overwrite=config.overwrite_output_dir, resume=False)
        # Training images are not looked at: only as many are decoded as the loader needs to tell the classes.
        settings = replace(config.data, validation_fraction=0.0, limit_train_examples=1)
        with accelerator.main_process_first():
            data = load_data(
                settings, image_size=loaded.preprocessing.image_size, inputs=loaded.preprocessing, seed=config.seed
            )
        model = align_classes(loaded, data.class_names)
    logger.info("evaluating %s on %d images of %s", config.model, len(data.test), data.name)

    results = evaluate_on_test(
        model,
        data.test,
        config.evaluation,
        num_classes=len(data.class_names),
        threat_model=threat_model,
        accelerator=accelerator,
        seed=config.seed,
    )

    if accelerator.is_main_process:
        report = evaluation_report(
            config.model,
            loaded,
            data,
            results,
            config=config_to_dict(config),
            threat_model=threat_model,
            accelerator=accelerator,
            seed=config.seed,
        )
        examples = example_strip(model, data.test, config.evaluation, threat_model=threat_model, seed=config.seed)
        write_evaluation(report, config.output_path, examples=examples)
        sys.stdout.write(text_table(results_table(report)) + f"\n\neverything is in {config.output_path}\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
