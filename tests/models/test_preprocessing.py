"""Images are trained on, evaluated and exported as a model's config.json says, to the last pixel.

The oracle is timm's own evaluation transform, made from the published files alone.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ham_hf.config import DataConfig, ModelConfig
from ham_hf.data import load_image_data
from ham_hf.models import input_defaults, load_pixel_model, new_model
from ham_hf.models.pixel_model import PixelModel
from tests.support.example_images import everything
from tests.support.exports import FAMILIES, export, preprocessing, trained

SIDES = [(40, 60), (70, 33), (32, 32), (90, 20), (31, 64)]
GEOMETRIES = [
    {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"},
    {"crop_mode": "border", "crop_pct": 0.9, "interpolation": "bilinear"},
    {"crop_mode": "center", "crop_pct": 1.15, "interpolation": "bicubic"},
    {"crop_mode": "squash", "crop_pct": 0.875, "interpolation": "nearest"},
    {"crop_mode": "border", "crop_pct": 1.1, "interpolation": "lanczos"},
    {"crop_mode": "center", "crop_pct": 0.8, "interpolation": "hamming"},
    {"crop_mode": "squash", "crop_pct": 1.2, "interpolation": "box"},
]


def ids(geometry):
    return "-".join(map(str, geometry.values()))


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIDES]


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """Class folders: the images above, in order, as both splits."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        for index, image in enumerate(images):
            (root / split / f"class {index % 2}").mkdir(parents=True, exist_ok=True)
            image.save(root / split / f"class {index % 2}" / f"{index}.png")
    return root


def opened(folder, inputs, image_size=None, **settings):
    config = DataConfig(dataset_name=str(folder), validation_fraction=0.0, augmentation="none", **settings)
    return load_image_data(config, inputs, seed=0, image_size=image_size)


def by_file(data):
    """The test pixels in the order of the file names: the loader goes class by class."""
    order = sorted(range(len(SIDES)), key=lambda index: (index % 2, index))
    found = everything(data.test)
    pixels = torch.empty_like(found)
    pixels[order] = found
    return pixels


def timm_inputs(model, images, mode, **changes):
    transform = create_transform(**{**resolve_model_data_config(model), **changes}, is_training=False)
    return torch.stack([transform(image.convert(mode)) for image in images])


def normalized(loaded, x):
    return (x - loaded.model.mean) / loaded.model.std


@pytest.mark.parametrize(
    ("name", "geometry"),
    [*((name, GEOMETRIES[number % 3]) for number, name in enumerate(FAMILIES)), ("resnet18_cifar", GEOMETRIES[2])],
)
def test_families_see_what_timm_gives(name, geometry, images, folder, tmp_path):
    settings = preprocessing(**geometry)
    info = export(trained(name, **FAMILIES[name]), tmp_path, settings)
    loaded = load_pixel_model(str(tmp_path))
    assert loaded.preprocessing == settings
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    before = {"input_size": (3, 32, 32), "interpolation": settings.interpolation, "crop_pct": settings.crop_pct}
    expected = timm_inputs(model, images, "RGB", **(before if info.upsample > 1 else {}))
    x = by_file(opened(folder, loaded.preprocessing, 32))
    assert torch.equal(normalized(loaded, x), expected)
    if info.upsample > 1:
        expected = torch.nn.functional.interpolate(expected, scale_factor=info.upsample)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), model(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("in_chans", "cache_images"), [(1, "ram"), (3, "none")])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=ids)
def test_geometries_and_channels(geometry, in_chans, cache_images, images, folder, tmp_path):
    export(trained("test_resnet", 48, in_chans), tmp_path, preprocessing(48, in_chans, **geometry))
    loaded = load_pixel_model(str(tmp_path))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    data = opened(folder, loaded.preprocessing, 48, cache_images=cache_images, dataloader_num_workers=0)
    expected = timm_inputs(model, images, "L" if in_chans == 1 else "RGB")
    assert torch.equal(normalized(loaded, by_file(data)), expected)


def foreign(folder, **changes):
    """A model of somebody else's: timm's own export, and then another config.json."""
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=2), folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32], "crop_pct": 0.9, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [
        *GEOMETRIES,
        {"mean": [0.4], "std": [0.3]},
        {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1], "crop_mode": "border"},
        {"mean": [0.4], "std": [0.3], "crop_mode": "border"},
        {"crop_mode": None, "crop_pct": None, "interpolation": None, "mean": None, "std": None},
        {"test_input_size": [3, 64, 64], "test_crop_pct": 1.0},
    ],
    ids=str,
)
def test_models_of_other_origin(changes, images, folder, tmp_path):
    source = foreign(tmp_path, **changes)
    loaded = load_pixel_model(source)
    expected = timm_inputs(timm.create_model(f"local-dir:{source}", pretrained=True), images, "RGB")
    assert torch.equal(normalized(loaded, by_file(opened(folder, loaded.preprocessing, 32))), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_mode": "stretch"}, "crop_mode should be one of center, squash, border, got 'stretch'"),
        ({"crop_mode": ["squash"]}, "crop_mode should be one of"),
        ({"interpolation": "random"}, "interpolation should be one of nearest, .* training alone.*, got 'random'"),
        ({"interpolation": "area"}, "interpolation should be one of"),
        ({"crop_pct": 0}, r"crop_pct should be a share in \[0.01, 2\], got 0"),
        ({"crop_pct": 1e-6}, "crop_pct should be"),
        ({"crop_pct": 2.5}, "crop_pct should be"),
        ({"mean": [0.5, 0.5]}, "mean has 2 values for 3 channels"),
        ({"std": [0.5] * 4}, "std has 4 values for 3 channels"),
        ({"std": [0.5, 0.5, 0.0]}, "std should be"),
        ({"input_size": [3, 32, 64]}, "only square inputs are supported, this model takes 32x64"),
        ({"crop_border_pixels": 4}, "crop_border_pixels"),
    ],
    ids=str,
)
def test_anything_else_is_refused_by_name(changes, message, tmp_path):
    source = foreign(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_pixel_model(source)
    with pytest.raises(ValueError, match=message):
        input_defaults(f"local-dir:{source}", model_args={})


def test_another_size_for_testing_is_said(tmp_path, caplog):
    source = foreign(tmp_path, test_input_size=[3, 64, 64], test_crop_pct=1.0)
    (note,) = load_pixel_model(source).notes
    assert note in caplog.text
    for part in ("64 px", "crop_pct 1", "32 px", "crop_pct 0.9", "test_input_size"):
        assert part in note
    same = foreign(tmp_path / "same", test_input_size=[3, 32, 32], test_crop_pct=0.9)
    assert load_pixel_model(same).notes == ()


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=ids)
def test_training_keeps_the_geometry(geometry, pretrained, images, folder, tmp_path):
    """From somebody's model through training's data and network to our export: still what timm gives."""
    source = f"local-dir:{foreign(tmp_path / 'first', **geometry)}"
    config = ModelConfig(model_name=source, pretrained=pretrained)
    data = opened(folder, input_defaults(source, model_args={}), 32)
    model, settings = new_model(config, data, seed=0)
    assert isinstance(model, PixelModel)
    assert (settings.mean == data.channel_mean) == (not pretrained and geometry["crop_mode"] != "border")
    export(model, tmp_path / "second", settings, class_names=data.class_names)
    second = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True)
    expected = timm_inputs(second, images, "RGB")
    torch.testing.assert_close((by_file(data) - model.mean) / model.std, expected, rtol=0, atol=0)
    assert resolve_model_data_config(second)["crop_mode"] == geometry["crop_mode"]


def test_small_images_stay_whole_in_training_of_a_large_model(folder):
    """At another size than the model's own, its crop is not wanted; its way to make images square is."""
    inputs = preprocessing(224, crop_pct=0.875, crop_mode="squash")
    for size, crop_pct in ((32, 1.0), (96, 1.0), (97, 0.875), (224, 0.875)):
        data = opened(folder, inputs, size)
        assert (data.crop_pct, data.crop_mode) == (crop_pct, "squash")


def test_every_registered_model_is_understood_or_refused_by_name():
    unlike_others = []
    for name in timm.list_models():
        cfg = timm.models.get_pretrained_cfg(name)
        if cfg is None:
            continue
        if cfg.input_size[1] != cfg.input_size[2]:
            with pytest.raises(ValueError, match="only square inputs"):
                input_defaults(name, model_args={})
            continue
        found = input_defaults(name, model_args={})
        for name_of in ("crop_mode", "crop_pct", "interpolation", "mean", "std"):
            assert getattr(found, name_of) == getattr(cfg, name_of), name
        assert found.image_size == cfg.input_size[-1]
        if cfg.crop_mode != "center" or cfg.crop_pct > 1:
            unlike_others.append(name)
    assert len(unlike_others) > 20
