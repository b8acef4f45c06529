"""Training methods, one file each; `available` lists them by the name that ``--method`` takes."""

from __future__ import annotations

from ham_hf.methods.base import (
    InnerAttack,
    Objective,
    OuterBatch,
    State,
    States,
    available,
    class_sums,
    statistics_dtype,
)
from ham_hf.methods.bat import BAT
from ham_hf.methods.combining import BuiltOnLoss, Combinable
from ham_hf.methods.fat import FAT
from ham_hf.methods.gairat import GAIRAT
from ham_hf.methods.ham import HAM
from ham_hf.methods.losses import BASE_LOSSES, BaseLoss, MartLoss, TradesLoss
from ham_hf.methods.pgd_at import PGDAT
from ham_hf.methods.plain import MART, TRADES
from ham_hf.methods.rules.cfa import CFA
from ham_hf.methods.rules.cfol import CFOL
from ham_hf.methods.rules.dafa import DAFA
from ham_hf.methods.rules.faal import FAAL
from ham_hf.methods.rules.frl import FRL
from ham_hf.methods.rules.hard_fraction import HardFraction
from ham_hf.methods.rules.wat import WAT

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
