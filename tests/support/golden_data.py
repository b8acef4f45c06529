"""Reference numbers computed with the original authors' code; tests/golden/README.md says how."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel
from ham_hf.methods import TradesLoss

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"rtol": 0, "atol": 1e-9}


class GoldenNet(nn.Module):
    """The reference network of the golden cases, float64, evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.bn1(self.conv1(x)))
        x = nn.functional.silu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Normalized(nn.Module):
    """GoldenNet behind a per-channel normalization."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.mean, self.std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def golden_net() -> GoldenNet:
    net = GoldenNet().double().eval()
    net.load_state_dict(load_file(GOLDEN / "goldennet.safetensors"))
    return net


def golden_tensors(name: str) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a golden case, and its hyper-parameters."""
    hyper = json.loads((GOLDEN / f"{name}.json").read_text())["hyperparameters"]
    return load_file(GOLDEN / f"{name}.safetensors"), hyper


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def golden_batch(rows: int | Tensor | None = None, size: int = 16) -> tuple[Tensor, Tensor]:
    """The first images of the golden batch (16 x 16 or 32 x 32), or some of them, in float64, with their labels."""
    batch, rows = load_file(GOLDEN / "batch.safetensors"), rows if isinstance(rows, Tensor) else slice(rows)
    return batch[f"x{size}_u8"][rows].double() / 255, batch[f"y{size}"][rows].long()


def golden_noise(kind: str, rows: int | Tensor | None = None, size: int = 16) -> Tensor:
    """Recorded noise: "uniform" is scaled already, "normal" has standard deviation 1."""
    noise = load_file(GOLDEN / "batch.safetensors")[f"noise_{kind}{size}"]
    return noise[rows if isinstance(rows, Tensor) else slice(rows)].double()


@contextmanager
def starting_at(*, uniform: Tensor | None = None, normal: Tensor | None = None) -> Iterator[None]:
    """Make attacks start with recorded noise."""
    with pytest.MonkeyPatch.context() as patch:
        if uniform is not None:
            patch.setattr(ThreatModel, "random_start", lambda self, x, generator=None: (x + uniform).clamp(0, 1))
        if normal is not None:
            patch.setattr(TradesLoss, "start", lambda self, x, threat_model, generator: x + 0.001 * normal)
        yield


def exact(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@dataclass(frozen=True)
class GoldenCase:
    """One case: inputs, hyper-parameters and the authors' results."""

    parameters: dict
    out: dict[str, Tensor]
    x: Tensor
    y: Tensor
    start: Tensor


def golden_case(name: str) -> GoldenCase:
    tensors, hyper = golden_tensors(name)
    rows = tensors.get("in/rows")
    x, y = golden_batch(rows)
    start = (x + golden_noise("uniform", rows)).clamp(0, 1)
    return GoldenCase(parameters=hyper, out=group(tensors, "out/"), x=x, y=y, start=start)
