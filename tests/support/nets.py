"""Small networks and data for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ham_hf.data import BatchRequest, PixelBatch


def group_norm_net(num_classes: int = 4, seed: int = 0) -> nn.Module:
    """A float64 network without batch statistics: a row's gradient does not depend on the other rows."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    ).double()


def batch_norm_net(num_classes: int = 4, seed: int = 0) -> nn.Module:
    """The same with BatchNorm and a head on a single value per channel."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
        nn.Linear(8, num_classes),
    ).double()


def labeled_for(net: nn.Module, x: Tensor, hard: list[bool], num_classes: int = 4) -> Tensor:
    """Labels that make exactly the rows marked in ``hard`` misclassified by ``net`` in evaluation mode."""
    with torch.no_grad():
        predicted = net.eval()(x).argmax(1)
    return torch.where(torch.tensor(hard), (predicted + 1) % num_classes, predicted)


def margin_of(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the true class minus the largest other one, row by row."""
    rows = zip(logits.detach().tolist(), y.tolist(), strict=True)
    return torch.tensor([row[label] - max(row[:label] + row[label + 1 :]) for row, label in rows])


def pixel_batch(x: Tensor, y: Tensor) -> PixelBatch:
    return PixelBatch(x, y, torch.arange(len(y)))


class TensorImages:
    """Images in memory with the interface of `ham_hf.data.Images`."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, requests: list[BatchRequest], *, device: torch.device):
        for request in requests:
            indices = request.indices
            yield PixelBatch(self.x[indices].to(device), self.labels[indices].to(device), indices)


class Watched(nn.Module):
    """A network that counts its passes, breaks off after some, and has memory for few rows.

    Rows are limited where a graph is built (``limit``), and everywhere (``limit_always``).
    """

    def __init__(self, net, *, break_after=None, limit=None, limit_always=None):
        super().__init__()
        self.net, self.passes = net, 0
        self.break_after, self.limit, self.limit_always = break_after, limit, limit_always

    def forward(self, x):
        self.passes += 1
        if self.passes == self.break_after:
            raise KeyboardInterrupt
        limit = self.limit if torch.is_grad_enabled() and x.requires_grad else self.limit_always
        if limit is not None and len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.net(x)

    def __repr__(self):
        return repr(self.net)

    def named_parameters(self, *args, **options):
        return self.net.named_parameters(*args, **options)
