"""Attacks whose passes run in 16 bits while pixels, the perturbation and the loss stay float32.

The attack is about 90 % of the cost of adversarial training, and each step uses only the sign or the direction of a
gradient. So convolutions and matrix products of the attack may be coarser than those of the update.

float16 cannot hold the small gradients that an attack needs: the input gradient of an image that the network is
sure of is 0 in it. A direction stays the same when the loss of an image is multiplied by a positive number, so the
gradient of each image is brought to one size where it enters the network's backward, and divided by the same power of
two where it leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ham_hf.attacks import full_precision, largest_entry

EXPONENTS = (12, 4, -4)
"""The largest entry of an image's gradient by its logits lies below 2^12 in float16 and, for images whose gradient
overflows somewhere in the network, below the next of these powers (our choice: 2^0 loses a third of the entries in an
untrained EfficientNet, 2^8 none; small residual, transformer and ConvNeXt networks overflow from 2^16 on)."""


class SixteenBitPasses(nn.Module):
    """The same network, weights shared, with every pass under autocast to a type of 16 bits.

    In float16 each image's gradient is multiplied by a power of two of its own inside of the network. What comes out
    is the gradient of the loss, exactly but where float16 rounds. Images whose gradient overflows, looked for once per
    gradient, take another pass with a smaller power; one that overflows all the same has a gradient that is not
    finite, and an attack leaves it in place.

    Args:
        model: maps pixels (N, C, H, W) to logits (N, num_classes), each row by itself; not copied, so it is attacked
            as it is now. In float16 a pass of pixels that require a gradient gives none to the weights.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) in float32 at least."""
        if self.dtype == torch.float16 and x.requires_grad and torch.is_grad_enabled():
            logits: Tensor = _ScaledPass.apply(x, self._pass)
            return logits
        return self._pass(x)

    def _pass(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            logits: Tensor = self.model(x)
        return full_precision(logits)


def attack_passes(model: nn.Module, precision: str, mixed_precision: str = "no") -> nn.Module:
    """The network as an attack sees it: in "bf16" or "fp16" (always, if training is in "fp16"), or else as it is."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get("fp16" if mixed_precision == "fp16" else precision)
    return model if dtype is None else SixteenBitPasses(model, dtype)


class _ScaledPass(torch.autograd.Function):
    """A pass that keeps its own graph, as its backward may be needed again for a few images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ANN401 (private in torch)
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_(True)
            ctx.logits, ctx.again = forward(ctx.x), forward
        logits: Tensor = ctx.logits.detach()
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        found = _gradient(ctx.x, ctx.logits, gradient, EXPONENTS[0])
        ctx.logits = None
        finite = largest_entry(gradient).isfinite().squeeze(1)
        for exponent in EXPONENTS[1:]:
            rows = (finite & ~found.flatten(1).isfinite().all(1)).nonzero().squeeze(1)
            if not len(rows):
                break
            with torch.enable_grad():
                x = ctx.x.detach()[rows].requires_grad_(True)
                logits = ctx.again(x)
            found[rows] = _gradient(x, logits, gradient[rows], exponent)
        return found, None


def _gradient(x: Tensor, logits: Tensor, gradient: Tensor, exponent: int) -> Tensor:
    """Gradient by ``x`` that belongs to the ``gradient`` by ``logits``, whose rows are brought below 2^exponent."""
    largest = largest_entry(gradient)
    _, size = torch.frexp(largest)
    factors = torch.ldexp(torch.ones_like(largest), (exponent - size).clamp(max=126))
    factors = torch.where((largest > 0) & largest.isfinite(), factors, 1)
    (found,) = torch.autograd.grad(logits, x, gradient * factors)
    return found / factors.view(-1, *[1] * (x.ndim - 1))
