"""Training methods, one file each; `available` lists them by the name that ``--method`` takes."""

from __future__ import annotations

from ham_hf.objectives.base import (
    InnerAttack,
    Objective,
    OuterBatch,
    State,
    States,
    available,
    class_sums,
    statistics_dtype,
)
from ham_hf.objectives.cfa import CFA
from ham_hf.objectives.combining import BuiltOnLoss, Combinable
from ham_hf.objectives.dafa import DAFA
from ham_hf.objectives.ham import HAM
from ham_hf.objectives.losses import BASE_LOSSES, BaseLoss, MartLoss, TradesLoss
from ham_hf.objectives.pgd_at import PGDAT
from ham_hf.objectives.trades import MART, TRADES

__all__ = [
    "BASE_LOSSES",
    "CFA",
    "DAFA",
    "HAM",
    "MART",
    "PGDAT",
    "TRADES",
    "BaseLoss",
    "BuiltOnLoss",
    "Combinable",
    "InnerAttack",
    "MartLoss",
    "Objective",
    "OuterBatch",
    "State",
    "States",
    "TradesLoss",
    "available",
    "class_sums",
    "statistics_dtype",
]
