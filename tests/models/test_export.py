"""An export loads with plain timm and computes the trained function."""

from __future__ import annotations

import copy
import json
import os
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

from ham_hf.models import PixelModel, create_backbone, input_defaults, load_pixel_model
from ham_hf.models.cifar_nets import embed_in_resnet18, extract_from_resnet18
from tests.support.exports import CLASSES, FAMILIES, SMALL_RESNET, SMALL_WIDE, export, preprocessing, trained
from tests.support.recipe_runs import finish


def logits_of(backbone, settings, x):
    with torch.no_grad():
        return PixelModel(copy.deepcopy(backbone).eval(), settings.mean, settings.std)(x)


def pixels(size=32, in_chans=3):
    return torch.rand(3, in_chans, size, size, generator=torch.Generator().manual_seed(1))


def of_pixels(model):
    return PixelModel(model, (0.5,) * 3, (0.5,) * 3)


def compiled_in_place(model):
    model = copy.deepcopy(model)
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(("size", "in_chans"), [(32, 3), (64, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_train_export_and_reload(name, size, in_chans, tmp_path):
    backbone, settings = trained(name, size, in_chans, **FAMILIES[name]), preprocessing(size, in_chans)
    info = export(backbone, tmp_path, settings)
    files = ["config.json", "model.safetensors", *(["rgb"] if info.has_rgb_form else [])]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    # Weights that are standardized cannot be folded.
    assert info.has_rgb_form == (in_chans == 1 and name != "test_nfnet")
    x = pixels(size, in_chans)
    expected = logits_of(backbone, settings, x)

    published = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    cfg = timm.data.resolve_model_data_config(published)
    assert tuple(cfg["input_size"]) == info.input_size == (in_chans, size * info.upsample, size * info.upsample)
    with torch.no_grad():
        actual = PixelModel(published, cfg["mean"], cfg["std"], info.upsample)(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    loaded = load_pixel_model(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), expected, rtol=1e-5, atol=1e-5)
    assert loaded.preprocessing == settings
    assert loaded.class_names == tuple(CLASSES)
    assert (info.upsample == 4) == (name == "resnet18_cifar")
    assert info.needs_ham_hf == name.startswith(("preact", "wide"))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        export(trained("test_resnet"), tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), 0o666 & ~mask)


PLAIN_TIMM = """
import json, sys
sys.modules["ham_hf"] = None
import timm, torch
from PIL import Image
exact, registered, image = sys.argv[1:]
model = timm.create_model("local-dir:" + exact, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.no_grad():
    logits = model(transform(Image.open(image))[None])[0].tolist()
try:
    timm.create_model("local-dir:" + registered, pretrained=True)
    error = ""
except RuntimeError as failure:
    error = str(failure)
del sys.modules["ham_hf"]
import ham_hf
x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
with torch.no_grad():
    afterwards = timm.create_model("local-dir:" + registered, pretrained=True).eval()(x)[0].tolist()
print(json.dumps({"logits": logits, "names": model.pretrained_cfg["label_names"], "type": type(model).__module__,
                  "error": error, "afterwards": afterwards}))
"""


@pytest.mark.slow
def test_without_ham_hf_and_with_it(tmp_path):
    """resnet18_cifar through timm's own transform and model; the others need ``import ham_hf``."""
    backbone, wide = trained("resnet18_cifar"), trained("wideresnet28_10_cifar", **SMALL_WIDE)
    export(backbone, tmp_path / "exact")
    assert export(wide, tmp_path / "registered").needs_ham_hf
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    folders = [str(tmp_path / name) for name in ("exact", "registered", "image.png")]
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_TIMM, *folders]
    output = json.loads(finish(command, None).stdout)
    x = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    expected = logits_of(backbone, preprocessing(), x)[0]
    torch.testing.assert_close(torch.tensor(output["logits"]), expected, rtol=0, atol=1e-5)
    assert output["names"] == CLASSES
    assert output["type"] == "timm.models.resnet"
    assert "wideresnet28_10_cifar" in output["error"]
    with torch.no_grad():
        expected = wide.eval()(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))[0]
    torch.testing.assert_close(torch.tensor(output["afterwards"]), expected, rtol=1e-5, atol=1e-5)


class TestEmbedding:
    @pytest.mark.parametrize("size", [8, 28, 32])
    def test_is_exact_with_random_statistics(self, size):
        cifar = timm.create_model("resnet18_cifar", num_classes=10, **SMALL_RESNET).eval()
        for name, value in cifar.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.2, 3)
            elif value.is_floating_point():
                value.normal_(std=0.3)
        plain = timm.create_model("resnet18", num_classes=10, replace_stem_pool=True, **SMALL_RESNET).eval()
        plain.load_state_dict(embed_in_resnet18(cifar.state_dict()))
        x = torch.randn(2, 3, size, size)
        large = F.interpolate(x, scale_factor=4, mode="nearest")
        with torch.no_grad():
            stem = plain.maxpool(plain.act1(plain.bn1(plain.conv1(large))))
            torch.testing.assert_close(stem, cifar.act1(cifar.bn1(cifar.conv1(x))), rtol=1e-6, atol=1e-6)
            expected = cifar(x)
            assert (plain(large) - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_inverse_notices_further_training(self):
        state = embed_in_resnet18(timm.create_model("resnet18_cifar", num_classes=10, **SMALL_RESNET).state_dict())
        state["maxpool.1.running_var"] = state["maxpool.1.running_var"] * 1.01
        with pytest.raises(ValueError, match=r"maxpool\.1\.running_var changed"):
            extract_from_resnet18(state)

    def test_other_activation_keeps_the_registered_name(self, tmp_path):
        backbone = trained("resnet18_cifar", act_layer="silu", **SMALL_RESNET)
        info = export(backbone, tmp_path)
        assert (info.architecture, info.needs_ham_hf, info.upsample) == ("resnet18_cifar", True, 1)

    def test_pixel_space_of_training_comes_back(self, tmp_path):
        settings = preprocessing(interpolation="bicubic", crop_pct=0.875)
        info = export(trained("resnet18_cifar", **SMALL_RESNET), tmp_path, settings)
        assert (info.architecture, info.interpolation, info.upsample) == ("resnet18", "nearest", 4)
        cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
        assert (cfg["interpolation"], cfg["crop_pct"], cfg["input_size"]) == ("nearest", 1.0, [3, 128, 128])
        assert load_pixel_model(str(tmp_path)).preprocessing == settings
        assert input_defaults(f"local-dir:{tmp_path}", model_args={}) == settings

    def test_training_goes_on_from_the_plain_form(self, tmp_path):
        backbone = trained("resnet18_cifar", **SMALL_RESNET)
        export(backbone, tmp_path)
        name = f"local-dir:{tmp_path}"
        settings = input_defaults(name, model_args={})
        again = create_backbone(name, pretrained=True, num_classes=10, preprocessing=settings, model_args={})
        assert type(again) is type(backbone)
        for key, value in backbone.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        other = create_backbone(name, pretrained=True, num_classes=4, preprocessing=settings, model_args={})
        assert other.fc.out_features == 4
        assert torch.equal(other.conv1.weight, backbone.conv1.weight)


class TestWrappers:
    @pytest.fixture
    def backbone(self):
        return trained("resnet18_cifar", **SMALL_RESNET)

    @pytest.mark.parametrize(
        "wrap",
        [
            of_pixels,
            lambda model: torch.compile(of_pixels(torch.compile(model, backend="eager")), backend="eager"),
            compiled_in_place,
            lambda model: ModelEmaV3(of_pixels(model)),
            lambda model: ModelEmaV3(model).module,
            lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
            lambda model: copy.deepcopy(model).double(),
        ],
        ids=["pixel", "compiled_twice", "compiled_in_place", "ema", "ema_module", "channels_last", "double"],
    )
    def test_are_taken_off(self, backbone, wrap, tmp_path):
        wrapped = wrap(backbone)
        if not isinstance(wrapped, ModelEmaV3) and next(wrapped.parameters()).dtype == torch.float32:
            wrapped.eval()(pixels())  # a compiled module is compiled by its first call
        export(wrapped, tmp_path)
        with torch.no_grad():
            actual = load_pixel_model(str(tmp_path)).model(pixels())
        torch.testing.assert_close(actual, logits_of(backbone, preprocessing(), pixels()), rtol=1e-5, atol=1e-5)

    def test_bfloat16(self, backbone, tmp_path):
        export(copy.deepcopy(backbone).bfloat16(), tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}

    def test_the_model_is_left_alone(self, tmp_path):
        backbone = trained("test_vit").to(memory_format=torch.channels_last)
        before = copy.deepcopy(backbone.state_dict())
        random_state = torch.get_rng_state()
        export(backbone, tmp_path)
        assert backbone.training
        assert torch.equal(torch.get_rng_state(), random_state)
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, before[key])
            assert value.stride() == before[key].stride()

    def test_foreign_module(self, tmp_path):
        with pytest.raises(ValueError, match="expected a timm model, got a Linear"):
            export(nn.Linear(3, 3), tmp_path)


class TestConfiguration:
    def test_nothing_of_the_starting_weights_leaks(self, tmp_path):
        backbone = trained("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
        export(backbone, tmp_path, metadata={"epsilon": 8 / 255})
        config = json.loads((tmp_path / "config.json").read_text())
        cfg = config["pretrained_cfg"]
        assert (cfg["tag"], cfg["license"]) == ("ham_test", "mit")
        assert (cfg["input_size"], cfg["crop_pct"], cfg["num_classes"]) == ([3, 32, 32], 1.0, 10)
        text = json.dumps(config)
        for trace in ("a1_in1k", "2110.00476", "origin_url", "paper", "test_input_size", "hf_hub_id", "url", "file"):
            assert trace not in text
        assert config["ham_hf"]["epsilon"] == 8 / 255
        assert load_pixel_model(str(tmp_path)).metadata == {"epsilon": 8 / 255}

    def test_regularization_is_not_recorded(self, tmp_path):
        backbone = trained("test_vit", drop_path_rate=0.2, proj_drop_rate=0.1)
        export(backbone, tmp_path)
        assert not any("drop" in name for name in json.loads((tmp_path / "config.json").read_text())["model_args"])

    def test_fine_tuned_from_a_published_model(self, tmp_path):
        """Architecture, arguments and geometry survive two generations; classes, tag and license are the new ones."""
        export(trained("test_vit", patch_size=8), tmp_path / "first", class_names=list("abcdefghij"))
        name = f"local-dir:{tmp_path / 'first'}"
        settings = preprocessing(48)
        tuned = create_backbone(name, pretrained=True, num_classes=3, preprocessing=settings, model_args={})
        info = export(tuned, tmp_path / "second", settings, class_names=["x", "y", "z"], tag="second")
        assert (info.architecture, info.input_size) == ("test_vit", (3, 48, 48))
        loaded = load_pixel_model(str(tmp_path / "second"))
        assert loaded.class_names == ("x", "y", "z")
        assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()
        x = pixels(48)
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(x), logits_of(tuned, settings, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"class_names": ["a"]}, "1 class names for a model with 10 classes"),
            ({"preprocessing": preprocessing(32, 1)}, "takes 3 channels, its preprocessing says 1"),
            ({"metadata": {"trained_form": 1}}, "'trained_form' is taken"),
            ({"metadata": {"x": object()}}, "cannot hold a value .* metadata"),
            ({"metadata": {"x": float("nan")}}, "cannot hold a value .* metadata"),
        ],
    )
    def test_bad_input_writes_nothing(self, changes, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            export(trained("test_resnet"), tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()

    def test_argument_that_json_cannot_hold(self, tmp_path):
        backbone = trained("resnet18", layers=[1, 1, 1, 1], norm_layer=nn.BatchNorm2d)
        with pytest.raises(ValueError, match="--model_args"):
            export(backbone, tmp_path)


class TestVerification:
    def test_surgery_that_no_argument_records(self, tmp_path):
        export(trained("test_resnet"), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        backbone = trained("test_resnet")
        backbone.act1 = nn.Tanh()
        with pytest.raises(RuntimeError, match="disagrees with the trained one"):
            export(backbone, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_weights_that_are_not_finite(self, tmp_path):
        backbone = trained("test_resnet")
        with torch.no_grad():
            backbone.fc.weight[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match="not finite"):
            export(backbone, tmp_path)
        assert list(tmp_path.iterdir()) == []
