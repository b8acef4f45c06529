"""PGD adversarial training (Madry et al., ICLR 2018): mean cross-entropy on PGD examples of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ham_hf.methods.combining import Combinable


@dataclass(frozen=True, kw_only=True)
class PGDAT(Combinable):
    """Plain PGD-AT: the control of every other method, and what they warm up with."""

    name: ClassVar[str] = "pgd_at"
    summary: ClassVar[str] = "PGD adversarial training (Madry et al., 2018)"
