"""Adversarially train a timm backbone on an image-classification dataset, evaluate it per class, save and push it.

Without arguments it runs recipes/digits/ham.yaml: real data, offline, one to two minutes on a CPU.

    accelerate launch recipes/train_ham.py
    accelerate launch recipes/train_ham.py --config recipes/cifar10/preactresnet18_ham.yaml \
        --push_to_hub --hub_model_id me/robust-cifar10
    accelerate launch recipes/train_ham.py --help
"""

from __future__ import annotations

from ham_hf.commands.train import main

if __name__ == "__main__":
    main()
