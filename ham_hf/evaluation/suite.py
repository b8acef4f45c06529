"""The suite of attacks that a report holds: clean, PGD, CW and, if asked for, AutoAttack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ham_hf.attacks import ThreatModel
from ham_hf.data import TestData
from ham_hf.evaluation.autoattack import evaluate_autoattack
from ham_hf.evaluation.config import EvaluationConfig
from ham_hf.evaluation.foreign import ForeignAttack
from ham_hf.evaluation.partial_results import partial_results
from ham_hf.evaluation.robustness import AttackResult, evaluate, standard_attacks


@dataclass(frozen=True, eq=False, kw_only=True)
class Workplace:
    """Where an evaluation runs and keeps what is done.

    Attributes:
        accelerator: shares the batches out.
        seed: of the attacks and of noise.
        output_dir: output folder of the run, where finished batches are kept until `remove_partial_results`.
        show_progress: show bars on the local main process.
    """

    accelerator: Accelerator
    seed: int
    output_dir: Path
    show_progress: bool = True


def evaluate_on_test(
    model: nn.Module,
    data: TestData,
    config: EvaluationConfig,
    *,
    threat_model: ThreatModel,
    place: Workplace,
    foreign: Sequence[ForeignAttack] = (),
) -> dict[str, AttackResult]:
    """Clean, PGD and CW accuracy, and AutoAttack if asked for, of every example.

    Finished batches are kept in the output folder until `remove_partial_results`, and are not computed again.

    Args:
        model: the unwrapped pixel model, on the device and in the memory layout of images.
        data: its test split.
        config: which attacks.
        threat_model: norm and radius.
        place: where it runs.
        foreign: attacks of other libraries to run too.
    """
    partial = partial_results(place.output_dir, model, data.test)
    results = evaluate(
        model,
        data.test,
        [
            *standard_attacks(config.attack(threat_model)),
            *(replace(attack, threat_model=threat_model) for attack in foreign),
        ],
        accelerator=place.accelerator,
        batch_size=config.per_device_eval_batch_size,
        seed=place.seed,
        partial=partial,
        show_progress=place.show_progress,
    )
    if config.autoattack:
        results["autoattack"] = evaluate_autoattack(
            model,
            data.test,
            num_classes=len(data.class_names),
            threat_model=threat_model,
            accelerator=place.accelerator,
            batch_size=config.per_device_eval_batch_size,
            seed=place.seed,
            num_examples=config.autoattack_examples,
            partial=partial,
            show_progress=place.show_progress,
        )
    return results
