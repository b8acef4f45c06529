"""Training methods and class rules, one file each; `available` lists the methods by the name that ``--method`` takes.

A method chooses the rows to train on and their losses; a class rule keeps state of each class and gives radii or
weights. Methods named for a class rule combine a loss with that rule.
"""

from __future__ import annotations

from ham_hf.methods.base import BuiltOnLoss, Method, available
from ham_hf.methods.bat import BAT
from ham_hf.methods.batch import Batch, TrainingRows
from ham_hf.methods.class_rule import ClassRule, RadiusRule, WeightRule
from ham_hf.methods.fat import FAT
from ham_hf.methods.gairat import GAIRAT
from ham_hf.methods.ham import HAM
from ham_hf.methods.losses import BASE_LOSSES, BaseLoss, MartLoss, TradesLoss
from ham_hf.methods.plain import MART, PGDAT, TRADES
from ham_hf.methods.rule_method import Borrowing, RuleMethod, method_of
from ham_hf.methods.rules.cfa import CFA
from ham_hf.methods.rules.cfol import CFOL
from ham_hf.methods.rules.dafa import DAFA
from ham_hf.methods.rules.faal import FAAL
from ham_hf.methods.rules.frl import FRL
from ham_hf.methods.rules.hard_fraction import HardFraction
from ham_hf.methods.rules.wat import WAT
from ham_hf.methods.state import State, Stateful, States, class_sums, flagged_counts, statistics_dtype

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
    "Batch",
    "Borrowing",
    "BuiltOnLoss",
    "ClassRule",
    "HardFraction",
    "MartLoss",
    "Method",
    "RadiusRule",
    "RuleMethod",
    "State",
    "Stateful",
    "States",
    "TradesLoss",
    "TrainingRows",
    "WeightRule",
    "available",
    "class_sums",
    "flagged_counts",
    "method_of",
    "statistics_dtype",
]
