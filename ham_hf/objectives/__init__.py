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
from ham_hf.objectives.bat import BAT
from ham_hf.objectives.cfa import CFA
from ham_hf.objectives.cfol import CFOL
from ham_hf.objectives.combining import BuiltOnLoss, Combinable
from ham_hf.objectives.dafa import DAFA
from ham_hf.objectives.faal import FAAL
from ham_hf.objectives.fat import FAT
from ham_hf.objectives.frl import FRL
from ham_hf.objectives.gairat import GAIRAT
from ham_hf.objectives.ham import HAM
from ham_hf.objectives.hard_fraction import HardFraction
from ham_hf.objectives.losses import BASE_LOSSES, BaseLoss, MartLoss, TradesLoss
from ham_hf.objectives.pgd_at import PGDAT
from ham_hf.objectives.trades import MART, TRADES
from ham_hf.objectives.wat import WAT

__all__ = [
    "BASE_LOSSES",
    "BAT",
    "CFA",
    "CFOL",
    "DAFA",
    "FAAL",
    "FAT",
    "FRL",
    "GAIRAT",
    "HAM",
    "MART",
    "PGDAT",
    "TRADES",
    "WAT",
    "BaseLoss",
    "BuiltOnLoss",
    "Combinable",
    "HardFraction",
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
