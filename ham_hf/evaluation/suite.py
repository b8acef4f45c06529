"""The suite of attacks that a report holds: clean, PGD, CW, foreign attacks and, if asked for, AutoAttack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ham_hf.attacks import ThreatModel
from ham_hf.data import TestData
from ham_hf.evaluation.autoattack import evaluate_autoattack
from ham_hf.evaluation.batch_sharing import Workplace
from ham_hf.evaluation.config import EvaluationConfig
from ham_hf.evaluation.foreign import ForeignAttack
from ham_hf.evaluation.robustness import AttackResult, evaluate, standard_attacks


def evaluate_on_test(
    model: nn.Module,
    data: TestData,
    config: EvaluationConfig,
    *,
    threat_model: ThreatModel,
    place: Workplace,
    foreign: Sequence[ForeignAttack] = (),
) -> dict[str, AttackResult]:
    """Clean, PGD, CW and foreign attacks on the whole test split; AutoAttack, if asked for, perhaps on a part.

    ``model`` is the unwrapped pixel model, on the device and in the memory layout of images.
    """
    results = evaluate(
        model,
        data.test,
        [
            *standard_attacks(config.attack(threat_model)),
            *(replace(attack, threat_model=threat_model) for attack in foreign),
        ],
        place,
    )
    if config.autoattack:
        results["autoattack"] = evaluate_autoattack(
            model,
            data.test,
            place,
            num_classes=len(data.class_names),
            threat_model=threat_model,
            num_examples=config.autoattack_examples,
        )
    return results
