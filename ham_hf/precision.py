"""Attacks whose passes run in 16 bits while pixels, the perturbation and the loss stay float32 (invariant 1).

The attack is nine tenths of the cost of adversarial training, and a step needs only the sign or direction of the
gradient. So the attack can compute convolutions and matrix products more coarsely than the update.

float16 cannot hold small gradients: the input gradient of an image that the network is sure of becomes 0. Scaling the
loss of an image by a positive number keeps the direction. So each image's gradient is scaled to one size, by a power
of two, where it enters the network's backward, and divided by the same power where it leaves.
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
    """Run a forward whose input gradient float16 can hold; gradients of weights are not scaled.

    The backward multiplies the gradient of each image by a separate power of two, so neither the other images nor the
    network's confidence matter. The result is the gradient of the loss itself, exact up to float16 rounding. An image
    whose gradient still overflows gets one that is not finite, and an attack does not move it.

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
    """Factors (N,) of the images' gradients, powers of two, known once the backward begins."""

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
    """The beginning of the network's forward, where its backward ends: divides by the factors again."""

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
