"""Training methods and class rules, one file each; `available` lists the methods by the name that ``--method`` takes.

A method chooses the rows to train on and their losses; a class rule keeps state of each class and gives radii or
weights. Methods named for a class rule combine a loss with that rule.
"""

from __future__ import annotations

from ham_hf.methods.base import Method as Method, available as available
from ham_hf.methods.bat import BAT as BAT
from ham_hf.methods.batch import Batch as Batch, TrainingRows as TrainingRows
from ham_hf.methods.class_rule import ClassRule as ClassRule, RadiusRule as RadiusRule, WeightRule as WeightRule
from ham_hf.methods.fat import FAT as FAT
from ham_hf.methods.gairat import GAIRAT as GAIRAT
from ham_hf.methods.ham import HAM as HAM
from ham_hf.methods.losses import (
    BASE_LOSSES as BASE_LOSSES,
    BaseLoss as BaseLoss,
    MartLoss as MartLoss,
    TradesLoss as TradesLoss,
)
from ham_hf.methods.plain import MART as MART, PGDAT as PGDAT, TRADES as TRADES
from ham_hf.methods.rule_method import RuleMethod as RuleMethod, method_of as method_of
from ham_hf.methods.rules.cfa import CFA as CFA
from ham_hf.methods.rules.cfol import CFOL as CFOL
from ham_hf.methods.rules.dafa import DAFA as DAFA
from ham_hf.methods.rules.faal import FAAL as FAAL
from ham_hf.methods.rules.frl import FRL as FRL
from ham_hf.methods.rules.hard_fraction import HardFraction as HardFraction
from ham_hf.methods.rules.wat import WAT as WAT
from ham_hf.methods.state import (
    class_sums as class_sums,
    flagged_counts as flagged_counts,
    statistics_dtype as statistics_dtype,
)
