"""HAM in Lightning: the loss in `training_step`, and robust accuracy in `validation_step`, in inference mode too.

pip install lightning; python docs/examples/lightning_module.py --epochs 10
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ham_hf
from ham_hf.data.sources import read_digits

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--images", type=int, default=1797)
arguments = parser.parse_args()


class Robust(lightning.LightningModule):
    """A small network for digits, trained on hard adversarial examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10),
        )  # fmt: skip
        self.threat_model = ham_hf.ThreatModel("linf", 0.1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of HAM."""
        loss, record = ham_hf.adversarial_loss(self.net, *batch, threat_model=self.threat_model)
        self.log("hard_fraction", record.hard_fraction, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Accuracy under PGD."""
        x, y = batch
        x_adv = ham_hf.pgd(self.net, x, y, threat_model=self.threat_model, num_steps=10, step_size=0.025)
        self.log("robust_accuracy", (self.net(x_adv).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


images, labels = read_digits()
x = torch.tensor(images[: arguments.images, None] / 16, dtype=torch.float32)
y = torch.tensor(labels[: arguments.images])
fifth = len(y) // 5
train = DataLoader(TensorDataset(x[fifth:], y[fifth:]), batch_size=64, shuffle=True)
test = DataLoader(TensorDataset(x[:fifth], y[:fifth]), batch_size=256)
module = Robust()
trainer = lightning.Trainer(max_epochs=arguments.epochs, logger=False, enable_checkpointing=False, accelerator="cpu")
trainer.fit(module, train, test)
trainer.validate(module, test)
print(ham_hf.evaluate(module.net, test, threat_model=module.threat_model))
