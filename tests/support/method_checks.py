"""Shared by the tests of the training methods: golden batches, and the loss of an update written out plainly."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from unittest import mock

import torch
from safetensors.torch import load_file

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import DAFA, FAAL, FAT, FRL, HAM, MART, PGDAT, TRADES, Batch, TradesLoss, available
from tests.support.golden_data import GOLDEN


def golden_tensors(name):
    """All tensors of a golden case, and its hyper-parameters."""
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())[
        "hyperparameters"
    ]


def golden_batch(rows=None, size=16):
    """The first images of the golden batch (16 x 16 or 32 x 32) in float64, with their labels."""
    batch = load_file(GOLDEN / "batch.safetensors")
    return batch[f"x{size}_u8"][:rows].double() / 255, batch[f"y{size}"][:rows].long()


def golden_noise(kind, rows=None, size=16):
    """Recorded noise: "uniform" is scaled already, "normal" has standard deviation 1."""
    return load_file(GOLDEN / "batch.safetensors")[f"noise_{kind}{size}"][:rows].double()


def exact(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@contextmanager
def starting_at(*, uniform=None, normal=None):
    """Make attacks start with recorded noise; see `golden_noise`."""
    with ExitStack() as stack:
        if uniform is not None:
            start = lambda self, x, generator=None: (x + uniform).clamp(0, 1)  # noqa: E731
            stack.enter_context(mock.patch.object(ThreatModel, "random_start", start))
        if normal is not None:
            start = lambda self, x, threat_model, generator: x + 0.001 * normal  # noqa: E731
            stack.enter_context(mock.patch.object(TradesLoss, "start", start))
        yield


def attack_of(hyper, **changes):
    values = {"epsilon": hyper["epsilon"], "step_size": hyper["step_size"], "num_steps": hyper["num_steps"]} | changes
    return Attack(
        threat_model=ThreatModel("linf", values["epsilon"]),
        num_steps=values["num_steps"],
        step_size=values["step_size"],
    )


def initial_states(method, num_classes=10):
    counts = torch.full((num_classes,), 10.0, dtype=torch.float64)
    return {part.name: part.initial_state(counts) for part in method.state_keepers}


def rows_of(method, net, x, y, *, attack, epoch=0, states=None, seed=None):
    """The rows to train on of one batch; without states, those of the beginning."""
    states = initial_states(method) if states is None else states
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batch = Batch(x=x, y=y, attack=attack, epoch=epoch, states=states, generator=generator)
    return method.rows_to_train_on(net, batch)


def update_loss(method, net, rows, *, epoch, states):
    """Loss of an update, every block of images forwarded on its own in training mode, as the authors do."""
    net.train()
    num_adversarial, each = len(rows.adversarial_y), len(rows.y)
    blocks = [rows.x[:num_adversarial], *rows.x[num_adversarial:].split(each)]
    logits = torch.cat([net(images) for images in blocks if len(images)])
    weight, divisor = method.weigh(rows, epoch=epoch, states=states)
    return ((weight * method.losses(logits, rows)).sum(1) / divisor).sum(), logits


def assert_loss_and_gradients(method, net, rows, *, epoch, states, tensors, prefix, tolerance=1e-9):
    loss, logits = update_loss(method, net, rows, epoch=epoch, states=states)
    exact(loss, tensors[f"{prefix}loss"], tolerance)
    gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    names = {f"{prefix}grad/{name}" for name, _ in net.named_parameters()}
    assert names == {name for name in tensors if name.startswith(f"{prefix}grad/")}
    for (name, _), gradient in zip(net.named_parameters(), gradients, strict=True):
        exact(gradient, tensors[f"{prefix}grad/{name}"], tolerance)
    return logits.detach()


def golden_frl(variant):
    """FRL with the authors' options, "rw" or, with margins, "rw_rm"; and its states after each of their epochs.

    The overall error of the golden case is the mean over classes: one held-out image each.
    """
    tensors, hyper = golden_tensors("frl")
    theirs = {"frl_bound": "bound0", "frl_rate1": "rate1", "frl_rate2": "rate2", "frl_limit": "lim", "beta": "beta"}
    frl = FRL(frl_margin=variant == "rw_rm", **{name: hyper[other] for name, other in theirs.items()})

    def epochs():
        states = initial_states(frl)
        errors = zip(tensors["in/class_clean_error"], tensors["in/class_bndy_error"], strict=True)
        for epoch, (clean, boundary) in enumerate(errors):
            exact(clean.mean(), tensors["in/total_clean_error"][epoch])
            exact(boundary.mean(), tensors["in/total_bndy_error"][epoch])
            sums = torch.stack([torch.ones(10), 1 - clean, 1 - clean - boundary])
            frl.rule.after_held_out(states["frl"], sums, epoch=epoch)
            yield epoch, states

    return frl, epochs()


def early(kind, **options):
    """A method with its options such that what is its own happens from epoch 1 on."""
    starts = {one.name: 1 for one in fields(kind) if one.name.endswith("start_epoch")}
    mining = {"mining_step": 1} if issubclass(kind, HAM) else {}
    return kind(**(starts | mining | options))


def every_method():
    """Every method and the combinations that are documented, by label: the method, and changed training settings."""
    found = {name: (early(kind), {}) for name, kind in available().items() if kind.__module__.startswith("ham_hf.")}
    rules = {"cfa_start_epoch": 1, "dafa_start_epoch": 1}
    weighed = {"class_weighting": "hard_fraction"}
    combined = {
        "ham-trades": (early(HAM, base_loss="trades"), {}),
        "ham-mart": (early(HAM, base_loss="mart"), {}),
        "ham-cfa": (early(HAM, class_margin="cfa", class_rule_args={"cfa_start_epoch": 1}), {}),
        "ham-dafa": (early(HAM, class_weighting="dafa", class_rule_args={"dafa_start_epoch": 1}), {}),
        "ham-awp": (early(HAM), {"awp_gamma": 0.01}),
        "ham-packed": (early(HAM, pack_hard_examples=True), {}),
        "ham-easy": (early(HAM, easy_weight=0.4), {}),
        "ham-easy-packed": (early(HAM, easy_weight=1.0, pack_hard_examples=True, **weighed), {}),
        "ham-kinds": (early(HAM, easy_weight=1.0, stop_misclassified=True, **weighed), {}),
        "ham-kinds-packed": (early(HAM, stop_misclassified=True, pack_hard_examples=True), {}),
        "ham-trades-kinds": (
            early(HAM, base_loss="trades", stop_misclassified=True, easy_weight=0.5, pack_hard_examples=True),
            {},
        ),
        "ham-trades-weighed": (early(HAM, base_loss="trades", **weighed), {}),
        "ham-mart-easy": (early(HAM, base_loss="mart", easy_weight=0.5), {}),
        "mart-hard_fraction": (MART(**weighed), {}),
        "fat-hard_fraction": (FAT(**weighed), {}),
        "ham-ema": (early(HAM), {"ema_decay": 0.9}),
        "ham-fawa": (early(HAM), {"fawa": "on", "fawa_threshold": 0.0}),
        "ham-faal": (early(HAM, class_weighting="faal"), {}),
        "trades-cfa-dafa": (TRADES(class_margin="cfa", class_weighting="dafa", class_rule_args=rules), {}),
        "trades-awp": (TRADES(), {"awp_gamma": 0.005, "awp_start_epoch": 1}),
        "dafa-pgd_at": (early(DAFA, base_loss="pgd_at"), {}),
        "pgd_at-cfol": (PGDAT(class_weighting="cfol"), {}),
        "trades-frl": (TRADES(class_margin="frl", class_weighting="frl"), {}),
        "mart-wat": (MART(class_weighting="wat"), {}),
        "fat-cfa": (FAT(class_margin="cfa", class_rule_args={"cfa_start_epoch": 1}), {}),
        "faal-awp": (FAAL(base_loss="trades"), {"awp_gamma": 0.005}),
    }
    return found | combined
