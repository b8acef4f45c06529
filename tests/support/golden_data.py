"""Reference numbers computed with the original authors' code; tests/golden/README.md says how."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

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


@dataclass(frozen=True)
class GoldenCase:
    """One case: inputs, hyper-parameters and the authors' results."""

    name: str
    parameters: dict
    out: dict[str, Tensor]
    x: Tensor
    y: Tensor
    start: Tensor

    def out_group(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.out.items() if name.startswith(prefix)}


def golden_net() -> GoldenNet:
    net = GoldenNet().double().eval()
    net.load_state_dict(load_file(GOLDEN / "goldennet.safetensors"))
    return net


def golden_case(name: str) -> GoldenCase:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    batch = load_file(GOLDEN / "batch.safetensors")
    rows = tensors.get("in/rows", torch.arange(len(batch["y16"])))
    x = batch["x16_u8"][rows].double() / 255
    noise = batch["noise_uniform16"][rows].double()
    return GoldenCase(
        name=name,
        parameters=json.loads((GOLDEN / f"{name}.json").read_text())["hyperparameters"],
        out={key.removeprefix("out/"): value for key, value in tensors.items() if key.startswith("out/")},
        x=x,
        y=batch["y16"][rows].long(),
        start=(x + noise).clamp(0, 1),
    )
