"""HAM in a training loop of your own: any network, any loader, no accelerator.

python docs/examples/own_loop.py --epochs 10
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ham_hf
from ham_hf.data.sources import read_digits

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--images", type=int, default=1797)
arguments = parser.parse_args()

# Pixels in [0, 1]; a network that needs normalized inputs normalizes them itself.
images, labels = read_digits()
x = torch.tensor(images[: arguments.images, None] / 16, dtype=torch.float32)
y = torch.tensor(labels[: arguments.images])
fifth = len(y) // 5
test, held_out = TensorDataset(x[:fifth], y[:fifth]), TensorDataset(x[fifth : 2 * fifth], y[fifth : 2 * fifth])
loader = DataLoader(TensorDataset(x[2 * fifth :], y[2 * fifth :]), batch_size=64, shuffle=True)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
attack = {"threat_model": ham_hf.ThreatModel("linf", 0.1), "num_steps": 10}

for epoch in range(arguments.epochs):
    # Warm up with plain adversarial training, then train on the hard examples, and on easy ones with half the weight.
    method = {"method": "pgd_at"} if epoch < 2 else {"method": "ham", "mining_step": 3, "easy_weight": 0.5}
    for images, labels in loader:
        loss, record = ham_hf.adversarial_loss(model, images, labels, **method, **attack)
        optimizer.zero_grad()
        loss.backward()
        if record.num_trained_on:
            optimizer.step()
    hard = "" if record.hard_fraction is None else f", hard fraction {record.hard_fraction:.2f}"
    print(f"epoch {epoch}: loss {loss.item():.3f}{hard}")

print(ham_hf.evaluate(model, DataLoader(test, batch_size=256), threat_model=attack["threat_model"]))
if fifth >= 10 * 20:  # calibration needs 20 images of every class
    fairer = ham_hf.calibrate(
        model, DataLoader(held_out, batch_size=256), fairness=0.5, threat_model=attack["threat_model"]
    )
    print(fairer)
