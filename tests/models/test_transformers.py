"""The real transformers loads, runs and fine-tunes what is exported, as it does every timm model."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ham_hf.data.decoding import EvalTransform
from ham_hf.models import load_pixel_model
from ham_hf.reporting.card import write_card
from tests.support.example_report import make_report, with_model
from tests.support.exports import CLASSES, FAMILIES, SMALL_RESNET, export, preprocessing, trained

transformers = pytest.importorskip("transformers", reason="transformers is not installed; the test extra has it")


def plain_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    ("name", "size", "in_chans"),
    [*((name, 32, 3) for name in FAMILIES), ("test_vit", 64, 1), ("resnet18_cifar", 64, 1)],
)
def test_families_give_the_logits_of_plain_timm(name, size, in_chans, tmp_path):
    info = export(trained(name, size, in_chans, **FAMILIES[name]), tmp_path, preprocessing(size, in_chans))
    model, loading = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert list(model.config.id2label.values()) == CLASSES
    x = torch.randn(2, *info.input_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, plain_timm(tmp_path)(x), rtol=1e-5, atol=1e-4)


def pictures():
    """Images unlike those of training in size, shape and mode."""
    random = np.random.default_rng(0)
    color = Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8))
    see_through = color.copy()
    see_through.putalpha(Image.fromarray(random.integers(0, 256, (70, 90), dtype=np.uint8)))
    return {
        "larger": color,
        "RGBA": see_through,
        "L": color.convert("L").resize((33, 120)),
        "P": color.quantize(32),
        "LA": see_through.convert("LA"),
        "CMYK": color.convert("CMYK"),
        "smaller": color.resize((9, 20)),
    }


def probabilities(found):
    """The output of a pipeline, in the order of the classes."""
    scores = {entry["label"]: entry["score"] for entry in found}
    return torch.tensor([scores[name] for name in CLASSES])


def of_timm(folder, image, mode="RGB", **changes):
    """Plain timm on one image: its own transform and network."""
    model = plain_timm(folder)
    transform = create_transform(**{**resolve_model_data_config(model), **changes}, is_training=False)
    with torch.no_grad():
        return model(transform(image.convert(mode))[None])[0]


@pytest.mark.parametrize("geometry", [{}, {"crop_mode": "squash", "crop_pct": 0.9}, {"crop_mode": "border"}], ids=str)
def test_processor_and_pipeline_see_what_timm_sees(geometry, tmp_path):
    export(trained("test_resnet"), tmp_path, preprocessing(**geometry))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    for name, image in pictures().items():
        expected = of_timm(tmp_path, image)
        with torch.no_grad():
            logits = model(**processor(image.convert("RGB"), return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5, msg=name)
        found = probabilities(classify(image, top_k=10))
        torch.testing.assert_close(found, expected.softmax(0), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet", "resnet18_cifar"])
def test_networks_for_gray_images_take_rgb_in_their_second_form(name, tmp_path):
    """Gray images give the same, color images what their gray version gives up to the rounding of gray levels."""
    info = export(trained(name, 32, 1, **FAMILIES[name]), tmp_path, preprocessing(32, 1))
    if not info.has_rgb_form:
        assert name == "test_nfnet"
        return
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, subfolder="rgb")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, subfolder="rgb")
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    color = pictures()["larger"]
    for image, tolerance in ((color.convert("L"), {"rtol": 1e-4, "atol": 1e-4}), (color, {"rtol": 0.2, "atol": 0.02})):
        expected = of_timm(tmp_path, image, "L").softmax(0)
        torch.testing.assert_close(probabilities(classify(image, top_k=10)), expected, **tolerance)
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        gray, rgb = load_pixel_model(str(tmp_path)).model(x), load_pixel_model(str(tmp_path / "rgb")).model
        torch.testing.assert_close(rgb(x.repeat(1, 3, 1, 1)), gray, rtol=1e-4, atol=1e-4)


def test_second_form_goes_with_the_first(tmp_path):
    """An export of color images into the folder of one of gray images leaves no stale network."""
    assert export(trained("test_resnet", 32, 1), tmp_path, preprocessing(32, 1)).has_rgb_form
    assert not export(trained("test_resnet"), tmp_path).has_rgb_form
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


SHOWN = {3: ("test_resnet", "resnet18_cifar", "preactresnet18_cifar"), 1: ("test_vit", "resnet18_cifar", "test_nfnet")}


@pytest.mark.parametrize(("name", "in_chans"), [(name, channels) for channels in SHOWN for name in SHOWN[channels]])
def test_lines_of_the_card_give_the_evaluated_numbers(name, in_chans, tmp_path, monkeypatch, capsys):
    """An image of another size and shape, through the card's two blocks of Python."""
    settings = preprocessing(32, in_chans, interpolation="bicubic", crop_pct=0.9)
    info = export(trained(name, 32, in_chans, **FAMILIES[name]), tmp_path, settings)
    pictures()["RGBA"].save(tmp_path / "image.png")
    inputs = {"upsample": info.upsample, "needs_ham_hf": info.needs_ham_hf, **dataclasses.asdict(settings)}
    report = with_model(make_report(), **inputs)
    text = write_card(report, tmp_path, repo_id=None, model_license="mit").read_text()
    (with_timm,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (with_transformers,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert ("`resolve_model_data_config` gives all of this" in text) is (info.upsample == 1)
    variables = {}
    exec(with_timm, variables)
    # What our own pipeline makes of the image.
    image = Image.open("image.png").convert("L" if in_chans == 1 else "RGB")
    x = EvalTransform(32, 0.9, "bicubic")(image)[None] / 255
    with torch.inference_mode():
        expected = load_pixel_model(str(tmp_path)).model(x).softmax(dim=1)[0]
    torch.testing.assert_close(variables["probabilities"], expected, rtol=0, atol=1e-6)
    shown, probability = capsys.readouterr().out.rsplit(maxsplit=1)
    assert shown == CLASSES[int(expected.argmax())]
    assert float(probability) == pytest.approx(float(expected.max()), rel=1e-5)
    exec(with_transformers, variables)
    printed = capsys.readouterr().out
    if "classify" not in variables:
        assert name == "test_nfnet"
        with torch.no_grad():
            found = variables["network"](variables["x"]).logits.softmax(1)[0]
        assert "cannot use it" in text
    else:
        found = probabilities(variables["classify"](variables["image"], top_k=10))
        assert printed.startswith("[{'label': 'class ")
    torch.testing.assert_close(found, variables["probabilities"].clone(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "in_chans", "num_classes"), [("test_vit", 3, 10), ("resnet18_cifar", 3, 4)])
def test_fine_tuning_with_its_trainer(name, in_chans, num_classes, tmp_path):
    """Two steps, with the same and with other classes; what is saved loads in transformers and timm again."""
    model_args = SMALL_RESNET if name == "resnet18_cifar" else FAMILIES[name]
    info = export(trained(name, 32, in_chans, **model_args), tmp_path / "first", preprocessing(32, in_chans))
    changes = {} if num_classes == 10 else {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "first", **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(8, *info.input_size)
    examples = [{"pixel_values": image, "labels": index % num_classes} for index, image in enumerate(x)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=examples)
    assert trainer.train().global_step == 2
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trainer.save_model(str(tmp_path / "second"))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        expected = model.eval()(x).logits
        torch.testing.assert_close(again(x).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain_timm(tmp_path / "second")(x), expected, rtol=1e-5, atol=1e-5)
        ours = load_pixel_model(str(tmp_path / "second")).model
        assert ours(torch.rand(1, in_chans, 32, 32)).shape == (1, num_classes)
