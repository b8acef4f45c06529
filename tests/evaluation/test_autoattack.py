"""AutoAttack against the authors' attacks, one after the other; a part of the images; the package that is missing."""

from __future__ import annotations

import sys

import pytest
import torch
from accelerate import Accelerator

from ham_hf.attacks import ThreatModel
from ham_hf.evaluation import Workplace
from ham_hf.evaluation.autoattack import autoattack_version, evaluate_autoattack
from ham_hf.seeding import Stream, derive_seed
from tests.support.golden_data import golden_batch, golden_net
from tests.support.nets import TensorImages, group_norm_net, margin_of

THREAT = ThreatModel("linf", 0.03)


def place_of(batch_size, *, seed):
    return Workplace(accelerator=Accelerator(cpu=True), batch_size=batch_size, seed=seed)


@pytest.fixture
def images():
    return TensorImages(golden_batch()[0].float(), torch.arange(64) % 10)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
def test_the_authors_attacks_run_one_after_the_other_on_what_is_left(num_classes, quick_autoattack):
    net = group_norm_net(num_classes).float().eval()
    x = torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = net(x).argmax(1)
    labels[::9] = (labels[::9] + 1) % num_classes
    images, place = TensorImages(x, labels), place_of(16, seed=3)
    threat = ThreatModel("linf", 0.04)
    result = evaluate_autoattack(net, images, place, num_classes=num_classes, threat_model=threat)
    assert not any(parameter.grad is not None for parameter in net.parameters())
    version, attacks, num_targets = autoattack_version(num_classes)
    said = result.settings
    assert (said["version"], said["attacks"], said["subset"]) == (version, attacks, False)
    assert not result.flags[::9].any()
    # An image that withstands was returned as it was; one that falls is on the other side.
    torch.testing.assert_close(result.margins[result.flags], margin_of(net(x), labels)[result.flags])
    assert (result.margins[~result.flags] <= 0).all()
    expected, survivors = net(x).argmax(1), []
    for position, name in enumerate(attacks):
        left = (expected == labels).nonzero().squeeze(1)
        survivors.append(len(left))
        for number, rows in enumerate(left.split(16)):
            seed = derive_seed(3, Stream.AUTOATTACK, position, number) % 2**32
            theirs = quick_autoattack(net, attacks=[name], eps=0.04, norm="Linf", seed=seed, version="custom")
            theirs.apgd.n_restarts = theirs.fab.n_restarts = theirs.apgd_targeted.n_restarts = 1
            theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = num_targets
            _, expected[rows] = theirs.run_standard_evaluation(x[rows], labels[rows], batch_size=16)
    assert torch.equal(result.predictions, expected)
    assert 0 < survivors[-1] < survivors[0]


def test_a_subset_is_stratified_said_to_be_one_and_the_same_for_all_seeds(images):
    seen, network = [], golden_net().float()
    options = {"num_classes": 10, "threat_model": THREAT, "num_examples": 20}
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for seed in (0, 1):
        begun = len(seen)
        result = evaluate_autoattack(network, images, place_of(8, seed=seed), **options)
        assert result.labels.bincount().tolist() == [2] * 10
        assert result.settings["subset"] is True
        assert result.settings["num_examples"] == len(result.flags) == 20
        first = seen[begun]
    assert torch.equal(first, seen[0])


def test_absent_autoattack_names_the_extra(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ValueError, match=r"--autoattack needs.*ham-hf\[autoattack\]"):
        evaluate_autoattack(golden_net().float(), images, place_of(8, seed=0), num_classes=10, threat_model=THREAT)
