"""Shared by the tests of the training methods: every method, and the loss of an update written out plainly."""

from __future__ import annotations

from dataclasses import fields

import torch

from ham_hf.attacks import Attack, ThreatModel
from ham_hf.methods import DAFA, FAAL, FAT, FRL, HAM, MART, PGDAT, TRADES, Batch, available
from tests.support.golden_data import exact, golden_tensors, group


def golden_options(file, **theirs):
    """Options with the values of a golden case, where they have the names of the authors."""
    hyper = golden_tensors(file)[1]
    return {name: hyper[other] for name, other in theirs.items()}


CFA_OPTIONS = golden_options(
    "cfa", cfa_lambda1="lambda_1", cfa_lambda2="lambda_2", cfa_start_epoch="begin", beta="beta"
)


def attack_of(hyper, **changes):
    """The attack with the hyper-parameters of a golden case."""
    hyper = hyper | changes
    threat_model = ThreatModel("linf", hyper["epsilon"])
    return Attack(threat_model=threat_model, num_steps=hyper["num_steps"], step_size=hyper["step_size"])


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
    parameters, theirs = dict(net.named_parameters()), group(tensors, f"{prefix}grad/")
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    assert parameters.keys() == theirs.keys()
    for name, gradient in zip(parameters, gradients, strict=True):
        exact(gradient, theirs[name], tolerance)
    return logits.detach()


def golden_frl(variant):
    """FRL with the authors' options, "rw" or, with margins, "rw_rm"; and its states after each of their epochs.

    The overall error of the golden case is the mean over classes: one held-out image each.
    """
    tensors, _ = golden_tensors("frl")
    theirs = {"frl_bound": "bound0", "frl_rate1": "rate1", "frl_rate2": "rate2", "frl_limit": "lim", "beta": "beta"}
    frl = FRL(frl_margin=variant == "rw_rm", **golden_options("frl", **theirs))

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
    weighed, kinds = {"class_weighting": "hard_fraction"}, {"stop_misclassified": True}
    packed = {"pack_hard_examples": True}
    combined = {
        "ham-trades": (early(HAM, base_loss="trades"), {}),
        "ham-mart": (early(HAM, base_loss="mart"), {}),
        "ham-cfa": (early(HAM, class_margin="cfa", class_rule_args={"cfa_start_epoch": 1}), {}),
        "ham-dafa": (early(HAM, class_weighting="dafa", class_rule_args={"dafa_start_epoch": 1}), {}),
        "ham-awp": (early(HAM), {"awp_gamma": 0.01}),
        "ham-packed": (early(HAM, **packed), {}),
        "ham-easy": (early(HAM, easy_weight=0.4), {}),
        "ham-easy-packed": (early(HAM, easy_weight=1.0, **packed, **weighed), {}),
        "ham-kinds": (early(HAM, easy_weight=1.0, **kinds, **weighed), {}),
        "ham-kinds-packed": (early(HAM, **kinds, **packed), {}),
        "ham-trades-kinds": (early(HAM, base_loss="trades", easy_weight=0.5, **kinds, **packed), {}),
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
