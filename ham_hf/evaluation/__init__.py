"""Attacks over a split: one flag per example, on any number of processes, resumable after a kill.

`robustness` runs PGD and CW, `autoattack` AutoAttack; `verdicts` joins them image by image. `batch_sharing` hands
batches to processes, keeps finished ones, and finds how many images fit into memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ham_hf.imports import names_on_demand

if TYPE_CHECKING:
    from ham_hf.evaluation.batch_sharing import Workplace as Workplace
    from ham_hf.evaluation.robustness import (
        AttackResult as AttackResult,
        NamedAttack as NamedAttack,
        NonFiniteLogitsError as NonFiniteLogitsError,
        evaluate as evaluate,
        evaluate_batches as evaluate_batches,
        memory_layout as memory_layout,
        predict as predict,
        standard_attacks as standard_attacks,
    )

__getattr__ = names_on_demand(
    __name__,
    {
        "ham_hf.evaluation.batch_sharing": ["Workplace"],
        "ham_hf.evaluation.robustness": [
            "AttackResult",
            "NamedAttack",
            "NonFiniteLogitsError",
            "evaluate",
            "evaluate_batches",
            "memory_layout",
            "predict",
            "standard_attacks",
        ],
    },
)
