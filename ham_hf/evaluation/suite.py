"""The suite of attacks that a report holds: clean, PGD, CW and, if asked for, AutoAttack."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ham_hf.attacks import ThreatModel
from ham_hf.data import TestData
from ham_hf.evaluation.autoattack import evaluate_autoattack
from ham_hf.evaluation.config import EvaluationConfig
from ham_hf.evaluation.partial_results import partial_results
from ham_hf.evaluation.robustness import AttackResult, evaluate, standard_attacks


def evaluate_on_test(
    model: nn.Module,
    data: TestData,
    config: EvaluationConfig,
    *,
    threat_model: ThreatModel,
    accelerator: Accelerator,
    seed: int,
    output_dir: Path,
    show_progress: bool = True,
) -> dict[str, AttackResult]:
    """Clean, PGD and CW accuracy, and AutoAttack if asked for, of every example.

    Finished batches are kept in the output folder until `remove_partial_results`, and are not computed again.

    Args:
        model: the unwrapped pixel model, on the device and in the memory layout of images.
        data: its test split.
        config: which attacks.
        threat_model: norm and radius.
        accelerator: shares the batches out.
        seed: seed of the attacks.
        output_dir: output folder of the run.
        show_progress: show bars on the local main process.
    """
    partial = partial_results(output_dir, model, data.test)
    results = evaluate(
        model,
        data.test,
        standard_attacks(config.eval_num_steps, eval_step_size(config, threat_model)),
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
            data.test,
            num_classes=len(data.class_names),
            threat_model=threat_model,
            accelerator=accelerator,
            batch_size=config.per_device_eval_batch_size,
            seed=seed,
            num_examples=config.autoattack_examples,
            partial=partial,
            show_progress=show_progress,
        )
    return results


def eval_step_size(config: EvaluationConfig, threat_model: ThreatModel) -> float:
    """Length of the steps of PGD and CW: the setting, or a quarter of epsilon."""
    return config.eval_step_size if config.eval_step_size is not None else float(threat_model.epsilon) / 4
