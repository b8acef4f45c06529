"""Attacks whose passes run in 16 bits while pixels, the perturbation and the loss stay float32 (invariant 1).

An attack is nine tenths of what adversarial training costs, and a sign or a direction is all that a step takes from a
gradient. So convolutions and matrix products of the attack may be coarser than those of the update.

float16 cannot hold the small gradients that an attack lives on: the input gradient of an image that the network is
sure of is 0 in it. A direction stays the same when the loss of an image is multiplied by a positive number, so the
gradient of each image is brought to one size where it enters the network's backward, and divided by the same power of
two where it leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ham_hf.attacks import full_precision, largest_entry

GRADIENT_EXPONENT = 6
"""The largest entry of an image's gradient by its logits lies in [2^5, 2^6) in float16 (our choice: directions of
small residual, transformer and ConvNeXt networks are those of float32 from -4 to 12; at 16 images overflow)."""


class SixteenBitPasses(nn.Module):
    """The same network, weights shared, with every pass under autocast to a type of 16 bits.

    Args:
        model: maps pixels (N, C, H, W) to logits (N, num_classes); not copied, so it is attacked as it is now.
        dtype: ``torch.bfloat16``, or ``torch.float16`` with input gradients as `pass_with_scaled_gradient` has them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) in float32 at least."""
        with torch.autocast(x.device.type, self.dtype):
            if self.dtype == torch.float16:
                return pass_with_scaled_gradient(self.model, x)
            logits: Tensor = self.model(x)
        return full_precision(logits)


def attack_passes(model: nn.Module, precision: str) -> nn.Module:
    """The network as an attack sees it: in "bf16" or "fp16", or with any other ``precision`` as it is."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return model if dtype is None else SixteenBitPasses(model, dtype)


def pass_with_scaled_gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A forward whose input gradient float16 can hold; gradients of weights are left alone.

    Inside of the network the gradient of each image is multiplied by a power of two of its own, so that neither the
    other images nor how sure the network is matter. What comes out is the gradient of the loss itself, exactly but
    where float16 rounds. An image whose gradient overflows all the same has one that is not finite, and an attack
    leaves it in place.

    Args:
        forward: maps pixels (N, C, H, W) to logits (N, num_classes) of any precision.
        x: pixels in float32; if it needs no gradient, or none are recorded, this is ``forward(x)`` alone.

    Returns:
        Logits in float32 at least.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return full_precision(forward(x))
    scale = _Scale()
    logits: Tensor = _leave(full_precision(forward(_enter(x, scale))), scale)
    return logits


@dataclass
class _Scale:
    """What the gradient of each image is multiplied by, (N,) powers of two, known once the backward begins."""

    factors: Tensor | None = None


class _Leave(torch.autograd.Function):
    """The end of the network's forward, where its backward begins: brings each image's gradient to one size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: _Scale) -> Tensor:  # noqa: ANN401 (torch's own type is private)
        ctx.scale = scale
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        largest = largest_entry(gradient)
        _, exponent = torch.frexp(largest)
        factors = torch.ldexp(torch.ones_like(largest), (GRADIENT_EXPONENT - exponent).clamp(max=126))
        ctx.scale.factors = torch.where((largest > 0) & largest.isfinite(), factors, 1)
        return gradient * ctx.scale.factors, None


class _Enter(torch.autograd.Function):
    """The beginning of the network's forward, where its backward ends: takes the factors away again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: _Scale) -> Tensor:  # noqa: ANN401
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return gradient / ctx.scale.factors.view(-1, *[1] * (gradient.ndim - 1)), None


# torch.compile cannot trace what passes from one backward to the other; it compiles the network in between.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter(x: Tensor, scale: _Scale) -> Tensor:
    entered: Tensor = _Enter.apply(x, scale)
    return entered


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _leave(logits: Tensor, scale: _Scale) -> Tensor:
    left: Tensor = _Leave.apply(logits, scale)
    return left
