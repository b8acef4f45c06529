"""How many images a device takes at once, found out by trying: half as many after every out-of-memory error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ham_hf.faults import is_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")


class WorkingSize:
    """The largest number of images (>= 1) that went through a model at once, so far; it begins with ``rows``.

    Each process has its own: others may have more memory left, and do not wait.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def split(self, function: Callable[[slice], Tensor], num: int) -> Tensor:
        """Results (n, ...) of ``function``, which is given rows, for ``num`` rows (>= 1) in pieces that fit, in order.

        If a single row does not fit, the allocator's error passes.
        """
        results: list[Tensor] = []
        start = 0
        while start < num:
            stop = min(start + self.rows, num)
            piece = self._attempt(partial(function, slice(start, stop)), stop - start)
            if piece is not None:
                results.append(piece)
                start = stop
        return results[0] if len(results) == 1 else torch.cat(results)

    def whole(self, function: Callable[[], T], num: int) -> T:
        """Result of ``function``, which sends ``num`` rows through a `PiecewiseModel`; tried again likewise."""
        while True:
            result = self._attempt(function, min(self.rows, num))
            if result is not None:
                return result

    def _attempt(self, function: Callable[[], T], num: int) -> T | None:
        """The result, or None if memory did not suffice for ``num`` rows; from then on, it is half of them."""
        try:
            return function()
        except (RuntimeError, MemoryError) as error:
            if num == 1 or not is_out_of_memory(error):
                raise
        # Only here, as the error holds on to the tensors of the failed attempt.
        self.rows = num // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(
            "out of memory with %d images at once: continuing with %d (--per_device_eval_batch_size %d would start "
            "with that, but draws other random starts)",
            num,
            self.rows,
            self.rows,
        )
        return None


class PiecewiseModel(nn.Module):
    """A model that takes batches of any size in pieces of the working size.

    For attacks of others, which draw their noise for the whole batch. With more than one piece, activations are
    computed again for the gradient, so that those of one piece are held at a time; a gradient then costs about a
    third more. Logits and gradients are those of the model, in which a row does not depend on the others.
    """

    def __init__(self, model: nn.Module, size: WorkingSize) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        logits: Tensor
        if len(x) <= self.size.rows:
            logits = self.model(x)
            return logits
        parts = torch.split(x, self.size.rows)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.cat([self.model(part) for part in parts])
        return torch.cat(
            [checkpoint(self.model, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )
