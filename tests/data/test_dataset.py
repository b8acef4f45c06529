"""Pixels: decoding, geometry, caching, streaming, augmentation, held-out parts, statistics."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms.functional import pil_to_tensor

import ham_hf.data.dataset
from ham_hf.data import BatchRequest, PixelBatch, stratified_subset
from tests.support.example_images import (
    dataset,
    encode,
    everything,
    gray,
    gray_values,
    grays,
    load,
    noise,
    write_parquet,
)

CPU = torch.device("cpu")


def some_requests(images):
    """Overlapping batches of different sizes, with and without augmentation."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = [order[:5], order[5:7], order[3:9], order[:1], order[2:8]]
    return [BatchRequest(part, None if number == 2 else 2**62 + number) for number, part in enumerate(parts)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for name in ("x", "y", "indices"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# The digits, and the parts that are held out


def test_digits_are_complete():
    data = load("digits", in_chans=1)
    assert data.class_names == tuple("0123456789")
    assert (data.image_size, data.augmentation, data.crop_pct, data.num_skipped) == (8, "none", 1.0, 0)
    assert data.test_split_origin == "held out of train (20 %, stratified, seed 0)"
    assert (len(data.train), len(data.validation), len(data.test)) == (1380, 58, 359)
    assert torch.equal(torch.bincount(data.test.labels), torch.tensor([36, 36, 35, 37, 36, 36, 36, 36, 35, 36]))


def test_digits_in_three_channels_and_larger():
    data = load("digits", image_size=16, limit_train_examples=50, limit_test_examples=20)
    x = everything(data.test)
    assert x.shape == (20, 3, 16, 16)
    assert torch.equal(x[:, 0], x[:, 2])


def test_the_test_part_is_the_same_for_every_seed(tmp_path):
    folder = write_parquet(tmp_path / "set", train=grays(100, 4))
    runs = [load(folder, seed=seed, validation_fraction=0.1, limit_test_examples=12) for seed in (0, 1)]
    tests = [gray_values(run.test) for run in runs]
    assert tests[0] == tests[1]
    held_out = [gray_values(run.validation) for run in runs if run.validation]
    assert held_out[0] != held_out[1]
    for run in runs:
        used = gray_values(run.train) + gray_values(run.validation)
        assert len(set(used)) == 80
        assert not set(used) & set(gray_values(run.test))
        assert torch.bincount(run.validation.labels).tolist() == [2, 2, 2, 2]
        # The gray value names the example: labels stay with their images.
        assert run.train.labels.tolist() == [value % 4 for value in gray_values(run.train)]


def test_limits_are_stratified_and_at_most_everything(tmp_path):
    labels = [0] * 60 + [1] * 30 + [2] * 10
    examples = dataset([gray(index) for index in range(100)], labels)
    folder = write_parquet(tmp_path / "set", train=examples, test=examples)
    data = load(folder, limit_train_examples=20, limit_test_examples=10, validation_fraction=0)
    assert torch.bincount(data.train.labels).tolist() == [12, 6, 2]
    assert torch.bincount(data.test.labels).tolist() == [6, 3, 1]
    data = load(folder, limit_train_examples=1000, limit_test_examples=1000, validation_fraction=0.1)
    assert (len(data.train), len(data.test)) == (90, 100)
    assert len(stratified_subset(data.test.labels, 10, 0)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.1, "limit_train_examples": 2}, "--validation_fraction 0.1: .*none to hold out"),
        ({"in_chans": 4}, "4 input channels"),
        ({"cache_images": "ram", "augmentation": "timm"}, "--cache_images ram .* --augmentation crop_flip"),
        ({"cache_images": "ram", "image_size": 128}, "--cache_images ram .* --augmentation crop_flip"),
    ],
)
def test_settings_that_do_not_fit(options, message, tmp_path):
    folder = write_parquet(tmp_path / "set", train=grays(10), test=grays(4))
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


# Decoding


DECODED_AS_PIL_DOES = {
    "RGB": encode(noise(0)),
    "jpeg": encode(noise(0), "JPEG"),
    "L": encode(noise(0, mode="L")),
    "LA": encode(noise(0).convert("LA")),
    "RGBA": encode(noise(0, mode="RGBA")),
    "P": encode(noise(1).convert("P", palette=Image.Palette.ADAPTIVE), transparency=3),
    "CMYK": encode(noise(0, mode="CMYK"), "TIFF"),
    "1": encode(noise(0).convert("1")),
}


@pytest.mark.parametrize(("in_chans", "mode"), [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("kind", DECODED_AS_PIL_DOES)
def test_every_mode_becomes_what_pil_makes_of_it(kind, in_chans, mode, tmp_path):
    encoded = DECODED_AS_PIL_DOES[kind]
    folder = write_parquet(tmp_path / "set", train=grays(4), test=dataset([encoded] * 2, [0, 1]))
    data = load(folder, in_chans=in_chans)
    (tmp_path / "image").write_bytes(encoded)
    expected = pil_to_tensor(Image.open(tmp_path / "image").convert(mode)).float() / 255
    assert torch.equal(everything(data.test)[1], expected)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(file_format, tmp_path):
    deep = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65407], [65535] * 4, [300] * 4], np.uint16)
    image = dataset([encode(Image.fromarray(deep), file_format)] * 2, [0, 1])
    data = load(write_parquet(tmp_path / "set", train=image, test=image), validation_fraction=0)
    expected = np.round(deep / 257).astype(np.float32) / 255
    assert np.array_equal(everything(data.test)[0, 2].numpy(), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_range_are_an_error(dtype, tmp_path):
    image = encode(Image.fromarray(np.ones((8, 8), dtype)), "TIFF")
    folder = write_parquet(tmp_path / "set", train=grays(4), test=dataset([image] * 2, [0, 1]))
    with pytest.raises(ValueError, match=r"'test', row 0: .*no defined range; store 8- or 16-bit"):
        load(folder)


@pytest.mark.parametrize("deep", [False, True])
def test_exif_orientation_is_applied(deep, tmp_path):
    upright = np.arange(64, dtype=np.uint16 if deep else np.uint8).reshape(8, 8)
    upright = upright * 257 if deep else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = encode(Image.fromarray(np.rot90(upright).copy()), exif=exif)
    data = load(write_parquet(tmp_path / "set", train=grays(4), test=dataset([turned] * 2, [0, 1])), in_chans=1)
    assert everything(data.test)[0].mul(255).int().flatten().tolist() == list(range(64))


# Geometry


@pytest.mark.parametrize(
    ("size", "last", "expected"),
    [
        ((32, 32), None, 32),
        ((96, 96), None, 96),
        ((97, 97), None, 112),
        ((32, 24), None, 112),
        ((32, 32), (28, 28), 112),
    ],
)
def test_the_images_own_size(size, last, expected, tmp_path):
    train = dataset([gray(0, size)] * 2, [0, 1])
    # The odd one out is in the other split, so that every split has to be looked at.
    test = dataset([gray(0, size), gray(0, last or size)], [0, 1])
    folder = write_parquet(tmp_path / "set", train=train, test=test)
    data = load(folder, validation_fraction=0)
    assert data.image_size == expected
    assert data.augmentation == ("crop_flip" if expected <= 96 else "timm")
    assert everything(data.test).shape == (2, 3, expected, expected)


# Batches


def test_batches_are_float_in_0_1_and_exact(tmp_path):
    data = load(write_parquet(tmp_path / "set", train=grays(256), test=grays(4)), validation_fraction=0)
    indices = torch.randperm(256)
    (batch,) = data.train.batches([BatchRequest(indices, None)], device=CPU)
    assert (batch.x.dtype, batch.y.dtype, batch.indices.dtype) == (torch.float32, torch.int64, torch.int64)
    assert batch.x.is_contiguous()
    assert batch.x[:, 1, 3, 5].tolist() == [np.float32(value) / np.float32(255) for value in indices.tolist()]
    assert batch.y.tolist() == [value % 2 for value in indices.tolist()]
    assert torch.equal(batch.indices, indices)


def load_noise(tmp_path, **options):
    if not (tmp_path / "set").exists():
        examples = dataset([noise(index, (24, 20)) for index in range(12)], [0, 1] * 6)
        write_parquet(tmp_path / "set", train=examples, test=examples)
    return load(str(tmp_path / "set"), image_size=16, validation_fraction=0, **options)


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip", "timm"])
def test_a_batch_depends_on_its_request_alone(augmentation, tmp_path):
    loads = [{"cache_images": "none", "dataloader_num_workers": workers} for workers in (0, 2)]
    if augmentation != "timm":
        loads.append({"cache_images": "ram"})
    reference = None
    for options in loads:
        images = load_noise(tmp_path, augmentation=augmentation, **options).train
        requests = some_requests(images)
        batches = list(images.batches(requests, device=CPU))
        reference = reference or batches
        assert_same(batches, reference)
        # A resumed run asks for the tail only.
        assert_same(list(images.batches(requests[3:], device=CPU)), reference[3:])
        assert list(images.batches([], device=CPU)) == []
    for request, batch in zip(requests, reference, strict=True):
        unchanged = everything(images)[request.indices]
        assert torch.equal(batch.x, unchanged) == (request.seed is None or augmentation == "none")
    # The same images with another seed look different.
    if augmentation != "none":
        (other,) = images.batches([BatchRequest(requests[0].indices, 1)], device=CPU)
        assert not torch.equal(other.x, reference[0].x)


@pytest.mark.parametrize(("augmentation", "workers"), [("crop_flip", 2), ("timm", 0)])
def test_global_random_state_is_left_alone(augmentation, workers, tmp_path):
    images = load_noise(tmp_path, augmentation=augmentation, cache_images="none", dataloader_num_workers=workers).train
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    list(images.batches(some_requests(images), device=CPU))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(np.array_equal(new, old) for new, old in zip(np.random.get_state(), before[2], strict=True))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_timm_augmentation_applies_to_train_only(in_chans, tmp_path):
    data = load_noise(tmp_path, augmentation="timm", in_chans=in_chans)
    request = BatchRequest(torch.arange(6), 7)
    (train,) = data.train.batches([request], device=CPU)
    (test,) = data.test.batches([request], device=CPU)
    assert train.x.shape == test.x.shape == (6, in_chans, 16, 16)
    assert not torch.equal(train.x, everything(data.train)[:6])
    assert torch.equal(test.x, everything(data.test)[:6])


def test_timm_augmentation_differs_between_examples_of_a_batch(tmp_path):
    twins = dataset([noise(0, (24, 20))] * 8, [0, 1] * 4)
    folder = write_parquet(tmp_path / "set", train=twins, test=grays(4))
    images = load(folder, image_size=16, validation_fraction=0, augmentation="timm").train
    requests = [BatchRequest(torch.arange(8), 7), BatchRequest(torch.tensor([5, 2]), 7)]
    batch, part = images.batches(requests, device=CPU)
    assert len(batch.x.flatten(1).unique(dim=0)) == 8
    assert torch.equal(part.x, batch.x[[5, 2]])


@pytest.mark.parametrize("augmentation", ["crop_flip", "timm"])
def test_streamed_images_can_be_sent_to_workers_that_do_not_fork(augmentation, tmp_path):
    images = load_noise(tmp_path, augmentation=augmentation, cache_images="none", dataloader_num_workers=0).train
    copy = pickle.loads(pickle.dumps(images))
    requests = some_requests(images)
    assert_same(list(copy.batches(requests, device=CPU)), list(images.batches(requests, device=CPU)))


def test_stopping_in_the_middle_and_starting_again(tmp_path):
    images = load_noise(tmp_path, cache_images="none").train
    requests = some_requests(images)
    batches = images.batches(requests, device=CPU)
    first = next(batches)
    del batches
    assert_same([first], list(images.batches(requests[:1], device=CPU)))


# Unreadable images

READABLE = encode(noise(0, (64, 64)))
BROKEN = {
    "garbage": b"this is not an image",
    "truncated": READABLE[: len(READABLE) // 2],
    "truncated jpeg": encode(noise(0, (64, 64)), "JPEG")[:900],
    "empty": b"",
    "missing": None,
}


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_image_is_named_or_left_out(kind, tmp_path):
    images = [BROKEN[kind] if index in (5, 9) else gray(index, (64, 64)) for index in range(12)]
    folder = write_parquet(tmp_path / "set", train=dataset(images, [0, 1, 2] * 4), test=grays(4))
    options = {"validation_fraction": 0, "image_size": 64, "augmentation": "none"}
    with pytest.raises(ValueError, match=r"split 'train', row 5: the image cannot be read \(.*--skip_corrupt"):
        load(folder, **options, cache_images="ram")
    for cache_images in ("ram", "none"):
        data = load(folder, **options, cache_images=cache_images, skip_corrupt=True)
        assert data.num_skipped == 2
        assert gray_values(data.train) == [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]
        assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux workers are forked whatever Python does")
def test_workers_are_forked_whatever_the_start_method_of_python_is(tmp_path):
    """Python 3.14's method imports torch in every worker, and cannot send what is defined in a function."""
    streamed = load_noise(tmp_path, augmentation="none", cache_images="none", dataloader_num_workers=2).train
    streamed._pixels._transform = lambda image: torch.full((3, 4, 4), 7, dtype=torch.uint8)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        (batch,) = streamed.batches([BatchRequest(torch.arange(2), None)], device=CPU)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert torch.equal(batch.x, torch.full((2, 3, 4, 4), 7 / 255))


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_in_the_stream(workers, tmp_path):
    test = dataset([gray(1), gray(2), b"bad", gray(4)], [0, 1, 0, 1])
    folder = write_parquet(tmp_path / "set", train=grays(4), test=test)
    data = load(folder, image_size=8, cache_images="none", dataloader_num_workers=workers, validation_fraction=0)
    requests = [BatchRequest(torch.tensor([0, 3]), None), BatchRequest(torch.tensor([1, 2]), 0)]
    batches = data.test.batches(requests, device=CPU)
    next(batches)
    with pytest.raises(ValueError, match=r"^split 'test', row 2: the image cannot be read") as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)


def test_small_splits_are_cached_and_large_ones_streamed(tmp_path, monkeypatch):
    test = dataset([gray(1), b"bad"], [0, 1])
    folder = write_parquet(tmp_path / "set", train=grays(4), test=test)
    # Cached images are decoded at the start, streamed ones when they are asked for.
    with pytest.raises(ValueError, match=r"split 'test', row 1"):
        load(folder, image_size=8)
    monkeypatch.setattr(ham_hf.data.dataset, "CACHE_LIMIT_BYTES", 2 * 3 * 8 * 8 - 1)
    images = load(folder, image_size=8).test
    with pytest.raises(ValueError, match=r"split 'test', row 1"):
        everything(images)


def test_nothing_readable_at_all(tmp_path):
    folder = write_parquet(tmp_path / "set", train=dataset([b"bad"] * 4, [0, 1] * 2), test=grays(4))
    with pytest.raises(ValueError, match=r"split 'train' has no readable image"):
        load(folder, validation_fraction=0, skip_corrupt=True)


# Statistics


@pytest.mark.parametrize(
    ("images", "std"),
    [
        ([noise(index) for index in range(20)], None),
        # A constant channel has a standard deviation to divide by.
        ([gray(7)] * 4, [1 / 255] * 3),
    ],
)
def test_channel_statistics(images, std, tmp_path):
    examples = dataset(images, [0, 1] * (len(images) // 2))
    data = load(write_parquet(tmp_path / "set", train=examples, test=grays(4)), validation_fraction=0)
    pixels = np.stack([np.asarray(image) for image in images]) / 255
    assert data.channel_mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-7)
    assert data.channel_std == pytest.approx(std or pixels.std((0, 1, 2)), abs=1e-6)


# Where there is more


CIFAR10_CLASSES = (*("airplane", "automobile", "bird", "cat", "deer"), *("dog", "frog", "horse", "ship", "truck"))


@pytest.mark.cifar10
@pytest.mark.skipif("HAM_HF_CIFAR10" not in os.environ, reason="HAM_HF_CIFAR10 does not name a folder")
def test_cifar10():
    data = load(os.environ["HAM_HF_CIFAR10"], limit_test_examples=1000)
    assert data.class_names == CIFAR10_CLASSES
    assert (data.image_size, data.augmentation, data.test_split_origin) == (32, "crop_flip", "test")
    assert torch.bincount(data.train.labels).tolist() == [4800] * 10
    assert torch.bincount(data.validation.labels).tolist() == [200] * 10
    assert torch.bincount(data.test.labels).tolist() == [100] * 10
    # The statistics that every CIFAR-10 script carries, from 2,000 of 50,000 images.
    assert data.channel_mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
    assert data.channel_std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("cache_images", ["auto", "ram", "none"])
def test_batches_on_the_accelerator_are_the_same_bit_for_bit(cache_images, tmp_path):
    images = load_noise(tmp_path, augmentation="crop_flip", cache_images=cache_images).train
    requests = some_requests(images)
    expected = list(images.batches(requests, device=CPU))
    device = torch.accelerator.current_accelerator()
    batches = list(images.batches(requests, device=device))
    assert all(batch.x.device.type == batch.y.device.type == device.type for batch in batches)
    assert_same([PixelBatch(batch.x.cpu(), batch.y.cpu(), batch.indices) for batch in batches], expected)
