"""Training methods, one file each; `available` lists them by the name that ``--method`` takes."""

from __future__ import annotations

from ham_hf.objectives.base import InnerAttack, Objective, OuterBatch, available
from ham_hf.objectives.ham import HAM
from ham_hf.objectives.pgd_at import PGDAT

__all__ = ["HAM", "PGDAT", "InnerAttack", "Objective", "OuterBatch", "available"]
