"""The real transformers loads, runs and fine-tunes what is exported, as it does every timm model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from tests.test_export import CLASSES, FAMILIES, export, preprocessing, trained

transformers = pytest.importorskip("transformers", reason="transformers is not installed; the test extra has it")


def plain_timm(folder: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(("size", "in_chans"), [(32, 3), (64, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_the_logits_of_plain_timm(name, size, in_chans, tmp_path):
    info = export(trained(name, size, in_chans, **FAMILIES[name]), tmp_path, preprocessing(size, in_chans))
    model, loading = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert list(model.config.id2label.values()) == CLASSES
    x = torch.randn(2, *info.input_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, plain_timm(tmp_path)(x), rtol=1e-5, atol=1e-4)


def test_the_number_of_classes_stands_once_among_the_arguments(tmp_path):
    export(trained("test_resnet"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 10
    assert "num_classes" not in config["model_args"]
    assert "num_classes" not in config["ham_hf"]["trained_form"]["model_args"]
