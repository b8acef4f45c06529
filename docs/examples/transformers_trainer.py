"""HAM in the Trainer of transformers: only `compute_loss` has to be written, for one device or many.

python docs/examples/transformers_trainer.py --epochs 10
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import ham_hf
from ham_hf.data.sources import read_digits

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--images", type=int, default=1797)
parser.add_argument("--output_dir", default="outputs/transformers-trainer")
arguments = parser.parse_args()


class AdversarialTrainer(Trainer):
    """Trains on adversarial images, and measures the loss on them."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss; also in evaluation, where gradients are off."""
        x, y = inputs["pixel_values"], inputs["labels"]
        loss, _ = ham_hf.adversarial_loss(model, x, y, method="ham", mining_step=3, **attack)
        return (loss, {"logits": model(x)}) if return_outputs else loss


attack = {"threat_model": ham_hf.ThreatModel("linf", 0.1), "num_steps": 10}
images, labels = read_digits()
examples = [
    # Pixels in [0, 1], not what an image processor normalizes.
    {"pixel_values": torch.tensor(image[None] / 16, dtype=torch.float32), "labels": int(label)}
    for image, label in zip(images[: arguments.images], labels, strict=False)
]
fifth = len(examples) // 5
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10),
)  # fmt: skip
trainer = AdversarialTrainer(
    model=model,
    args=TrainingArguments(
        output_dir=arguments.output_dir,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        # The network's forward does not name the columns.
        remove_unused_columns=False,
        label_names=["labels"],
    ),
    train_dataset=examples[fifth:],
    eval_dataset=examples[:fifth],
    compute_metrics=lambda found: {"clean": float(np.mean(found.predictions.argmax(1) == found.label_ids))},
)
trainer.train()
print(ham_hf.evaluate(model, trainer.get_eval_dataloader(), threat_model=attack["threat_model"]))
