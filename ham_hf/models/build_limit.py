"""A limit on what building a network may take, for configurations that nobody vouches for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN_BYTES = 256 * 2**20
MARGIN_TENSORS = 20_000
FACTOR = 8
"""How much more than its weights a network may take while it is built: half-precision files, buffers, drafts."""
UNKNOWN_BYTES = 24 * 2**30
UNKNOWN_TENSORS = 200_000


class TooLargeError(ValueError):
    """A network that its weights cannot belong to."""


class BuildLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, new tensors are counted, and one too many is refused before its memory is taken.

    Whoever writes a configuration can ask for any number of layers, channels and classes, but has to send weights of
    that size: what is built may be ``FACTOR`` times as large as they are, plus a margin.

    Args:
        weights: state dict that the network is built for; None if it has none: limits are fixed then.

    Raises:
        TooLargeError: from inside, when the limit is reached.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.tensors = 0, 0
        if weights is None:
            self.max_bytes, self.max_tensors = UNKNOWN_BYTES, UNKNOWN_TENSORS
        else:
            size = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in weights.values())
            self.max_bytes = FACTOR * size + MARGIN_BYTES
            self.max_tensors = FACTOR * len(weights) + MARGIN_TENSORS

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Count the tensors that ``func`` makes of sizes alone; what is made of tensors is no larger than they are."""
        options = dict(kwargs or {})
        made_of_tensors = any(isinstance(value, Tensor) for value in (*args, *options.values()))
        if not made_of_tensors:
            self._count(func, args, options)
        return func(*args, **options)

    def _count(self, func: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> None:
        sizes = [value for value in args if isinstance(value, list | tuple) and all(_is_whole(n) for n in value)]
        numbers = [abs(value) for value in args if _is_number(value)]
        # A shape is a list; without one, linspace, arange and eye make as many as one of their numbers says.
        items = math.prod(sizes[0]) if sizes else max([1, *numbers])
        dtype = options.get("dtype") or torch.get_default_dtype()
        self.bytes += int(items) * dtype.itemsize
        self.tensors += 1
        if self.bytes > self.max_bytes or self.tensors > self.max_tensors:
            raise TooLargeError(
                f"the network it describes takes more than {self.max_bytes / 2**30:.3g} GiB or {self.max_tensors} "
                "tensors, which its weights do not fill"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
