"""Steps that the recipes share: classes of a model and a dataset, threat model of an evaluation, the shown images."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from ham_hf.attacks import ThreatModel
from ham_hf.config import EvaluationConfig, ThreatConfig
from ham_hf.fitting import align_classes, threat_model_of
from ham_hf.models import LoadedModel, PixelModel, Preprocessing
from ham_hf.reporting.class_examples import run_examples
from ham_hf.training.log import read_log
from tests.support.example_report import attack_result
from tests.support.nets import TensorImages


def loaded(class_names=("cat", "dog", "owl"), metadata=None, num_classes=3):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))
    backbone.num_classes = num_classes
    inputs = {"image_size": 4, "in_chans": 1, "interpolation": "bilinear", "crop_pct": 1.0}
    return LoadedModel(
        model=PixelModel(backbone, (0.5,), (0.5,)).eval(),
        preprocessing=Preprocessing(**inputs, mean=(0.5,), std=(0.5,)),
        class_names=class_names,
        metadata=metadata or {},
    )


def test_classes_in_another_order_are_matched_by_name():
    found = loaded()
    x = torch.rand(5, 1, 4, 4)
    model, order = align_classes(found, ("owl", "cat", "dog"))
    assert torch.equal(model(x), found.model(x)[:, [2, 0, 1]])
    assert order == "by name"
    assert align_classes(found, ("cat", "dog", "owl")) == (found.model, "by name")


def test_fewer_classes_are_decided_over_alone(caplog):
    found = loaded()
    x = torch.rand(5, 1, 4, 4)
    model, order = align_classes(found, ("owl", "cat"))
    assert torch.equal(model(x), found.model(x)[:, [2, 0]])
    assert order == "subset"
    assert "the dataset has 2 of the model's 3 classes" in caplog.text


@pytest.mark.parametrize("names", [("0", "1", "2"), ("cat", "hound", "owl")])
def test_the_order_is_assumed_where_names_do_not_contradict_it(names, caplog):
    found = loaded()
    assert align_classes(found, names) == (found.model, "assumed")
    assert "taking them to be in the same order" in caplog.text
    unnamed = loaded(class_names=None)
    assert align_classes(unnamed, names)[0] is unnamed.model
    assert align_classes(unnamed, names)[1] == ("by name" if names[0] == "0" else "assumed")


@pytest.mark.parametrize("names", [("0", "2", "1"), ("2", "0", "1")])
def test_numbers_of_logits_are_their_names_to_a_model_without_names(names):
    unnamed = loaded(class_names=None)
    model, order = align_classes(unnamed, names)
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(model(x), unnamed.model(x)[:, [int(name) for name in names]])
    assert order == "by name"
    with pytest.raises(ValueError, match="3 classes apart and the dataset has 2"):
        align_classes(unnamed, names[:2])  # some other dataset that numbers its classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("dog", "owl", "zero"), "class 'zero' is none of the model's, and they share others at different places"),
        (("cat", "dog", "owl", "rat"), "3 classes apart and the dataset has 4, 1 of which the model does not name"),
        (("cat", "rat"), "3 classes apart and the dataset has 2, 1 of which"),
        (("0", "1"), "3 classes apart and the dataset has 2, 2 of which"),
    ],
)
def test_classes_that_cannot_be_brought_together_are_refused_with_both_lists(names, message):
    with pytest.raises(ValueError, match=message) as caught:
        align_classes(loaded(), names)
    assert "cat, dog, owl" in str(caught.value)
    assert ", ".join(names) in str(caught.value)


def test_a_name_that_the_model_has_twice_matches_nothing():
    twice = loaded(class_names=("crane", "dog", "crane"))
    with pytest.raises(ValueError, match="the model has 2 classes called 'crane'"):
        align_classes(twice, ("dog", "crane"))
    assert align_classes(twice, ("crane", "dog", "crane")) == (twice.model, "by name")
    # At its place it contradicts nothing, and elsewhere it does.
    assert align_classes(twice, ("crane bird", "dog", "crane")) == (twice.model, "assumed")
    with pytest.raises(ValueError, match="they share others at different places"):
        align_classes(twice, ("dog", "crane", "crane bird"))


def test_a_model_without_names_knows_imagenet_by_its_synsets():
    """ImageNet-A and ImageNet-R: 200 class folders named by synsets, and timm's models name no classes."""
    found = loaded(class_names=None, num_classes=1000)
    x = torch.rand(2, 1, 4, 4)
    aligned, order = align_classes(found, ("n01498041", "n01440764"))  # stingray 6, tench 0
    assert order == "subset"
    assert torch.equal(aligned(x), found.model(x)[:, [6, 0]])
    for names in (("n01498041", "n99999999"), ("stingray", "tench")):
        with pytest.raises(ValueError, match="tells 1000 classes apart and the dataset has 2"):
            align_classes(found, names)
    with pytest.raises(ValueError, match="tells 3 classes apart and the dataset has 2"):
        align_classes(loaded(class_names=None), ("n01498041", "n01440764"))


@pytest.mark.parametrize(
    ("asked", "trained", "expected"),
    [
        ({}, {}, ("linf", 8 / 255)),
        ({}, {"norm": "l2", "epsilon": 0.5}, ("l2", 0.5)),
        ({"epsilon": 0.1}, {"norm": "linf", "epsilon": 0.5}, ("linf", 0.1)),
        ({"norm": "l2", "epsilon": 0.1}, {"norm": "linf", "epsilon": 0.5}, ("l2", 0.1)),
        ({"norm": "linf"}, {"norm": "l2", "epsilon": 0.5}, ("linf", 8 / 255)),
    ],
)
def test_threat_model_is_the_one_asked_for_or_trained_for(asked, trained, expected):
    found = threat_model_of(ThreatConfig(**asked), loaded(metadata=trained))
    assert (found.norm, found.epsilon) == expected


def test_lengths_are_judged_by_the_norm_that_the_model_says():
    l2, linf = (loaded(metadata={"norm": norm, "epsilon": 0.5}) for norm in ("l2", "linf"))
    asked = ThreatConfig(epsilon=1.5)
    assert threat_model_of(asked, l2, eval_step_size=1.25).epsilon == 1.5
    with pytest.raises(ValueError, match=r"--epsilon 1.5: .*did you mean 1.5/255.*; --eval_step_size 1.25: "):
        threat_model_of(asked, linf, eval_step_size=1.25)


def test_a_norm_without_a_usual_radius_needs_one():
    with pytest.raises(ValueError, match="--norm l2 needs --epsilon"):
        threat_model_of(ThreatConfig(norm="l2"), loaded(metadata={"norm": "linf", "epsilon": 0.1}))


def outcome(labels, withstood):
    """An evaluation in which every image is right as it is, and those of ``withstood`` under PGD."""

    def result(name, flags):
        found = attack_result(name, {}, torch.where(flags, labels, (labels + 1) % 20), labels)
        return dataclasses.replace(found, margins=torch.where(flags, 1.0, -1.0))

    return {"clean": result("clean", torch.ones_like(withstood)), "pgd-2": result("pgd-2", withstood)}


def test_shown_images_are_of_the_worst_classes():
    labels = torch.arange(60) % 20
    labels[labels == 3] = 4
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 20))
    images = TensorImages(torch.rand(60, 1, 4, 4), labels)
    config = EvaluationConfig(eval_num_steps=2)
    linf = ThreatModel("linf", 0.1)
    weak = [0, 5, 7]
    results = outcome(labels, ~torch.isin(labels, torch.tensor(weak)))
    strip = run_examples(net, images, config, results, threat_model=linf, seed=0).strip
    assert strip.labels.tolist() == [*weak, 1, 2, 4, 6, 8]
    assert 0 < (strip.adversarial - strip.clean).abs().max() <= 0.1 + 1e-6
    few = TensorImages(torch.rand(2, 1, 4, 4), torch.tensor([1, 1]))
    alone = outcome(few.labels, torch.tensor([True, False]))
    for found in (alone, {"clean": alone["clean"]}):
        strip = run_examples(net, few, config, found, threat_model=linf, seed=0).strip
        assert strip.labels.tolist() == [1]


def test_log_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]
