"""Attacks of torchattacks, foolbox and adv-lib for `--foreign_attack docs/examples/foreign_attacks.py:NAME`.

Each is a function attack(model, x, y) that returns the attacked images, pixels in [0, 1]. It has to keep to the threat
model of the evaluation by itself: set EPSILON to its --epsilon. Images outside of ball or box end the evaluation.
"""

from __future__ import annotations

from torch import Tensor, nn

EPSILON = 8 / 255
STEPS = 20


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD of torchattacks (pip install torchattacks)."""
    import torchattacks

    return torchattacks.PGD(model, eps=EPSILON, alpha=EPSILON / 4, steps=STEPS)(x, y)


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD of foolbox (pip install foolbox)."""
    import foolbox

    shown = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    _, x_adv, _ = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=0.25)(shown, x, y, epsilons=EPSILON)
    return x_adv


def adv_lib_apgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Auto-PGD of adv-lib (pip install adv-lib)."""
    from adv_lib.attacks import apgd

    return apgd(model, x, y, eps=EPSILON, norm=float("inf"), n_iter=STEPS)
