"""Adversarial weight perturbation (AWP; Wu et al., NeurIPS 2020): train at the worst weights nearby.

One update, in the order of the published code::

    weights = perturbable(model)
    with preserved_buffers(model):
        loss().backward()
    directions = awp_direction(weights)
    optimizer.zero_grad()
    with perturbed(weights, directions, gamma):
        loss().backward()
        optimizer.step()

The authors take the direction from one ascent step of a copy of the model. Its length cancels, so the gradient at the
weights themselves gives the same direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TINY = 1e-20
"""Added to the norm of a gradient before dividing by it; the authors' constant."""


def perturbable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that AWP moves: those that train, have more than one dimension and "weight" in the name.

    Raises:
        ValueError: if there is none.
    """
    found = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1 and "weight" in name
    ]
    if not found:
        raise ValueError(
            f"weight perturbation found nothing to perturb in {type(model).__name__}: expected at least one trainable "
            'parameter with more than one dimension and "weight" in its name; unfreeze a layer or train without it'
        )
    return found


@torch.no_grad()
def awp_direction(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The direction of steepest ascent of each parameter, as long as the parameter itself.

    ``v = g * ||w|| / (||g|| + 1e-20)`` with Frobenius norms, per parameter: the paper's step, taken once as in the
    published code. A positive factor of the loss cancels, so sums and means over a batch give the same direction.

    Args:
        parameters: at least one, each with the gradient of the loss (not of its negative) in ``.grad``.

    Returns:
        New tensors in the shapes of the parameters; zeros where ``.grad`` is None, zero, or not finite.
    """
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters]
    # A zero gradient needs no case of its own: 0 * (||w|| / 1e-20) is 0, and that factor is finite from bfloat16 up.
    lengths = torch._foreach_add(torch._foreach_norm(gradients), _TINY)
    factors = torch._foreach_div(torch._foreach_norm(list(parameters)), lengths)
    moves = torch._foreach_mul(gradients, factors)
    finite = [torch.isfinite(length) for length in lengths]
    return [torch.where(good, move, torch.zeros_like(move)) for good, move in zip(finite, moves, strict=True)]


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter], directions: Sequence[Tensor], gamma: float) -> Iterator[None]:
    """Add ``gamma * directions`` to the parameters in place, and subtract it on leaving, whatever happens.

    The optimizer's step belongs inside: it is made from the perturbed weights, and subtracting afterwards keeps it.
    Without a step, the weights come back up to rounding. The authors use a gamma of 0.01 for PGD-AT, 0.005 for TRADES.
    """
    weights: list[Tensor] = list(parameters)
    moves = list(directions)
    with torch.no_grad():
        torch._foreach_add_(weights, moves, alpha=gamma)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_add_(weights, moves, alpha=-gamma)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer of the model back on leaving, whatever happens: for forwards that are not a training step."""
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)
