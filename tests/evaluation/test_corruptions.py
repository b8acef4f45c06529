"""Common corruptions against loops that follow their definitions, and accuracy on them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ham_hf.evaluation import Workplace, corruptions
from ham_hf.evaluation.corruption_accuracy import evaluate_corruptions
from ham_hf.evaluation.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    LEFT_OUT,
    SEVERITIES,
    chosen_corruptions,
    constants_of,
    corrupt,
    corruption_constants,
)
from tests.support.nets import TensorImages, Watched, group_norm_net

ALL = CORRUPTIONS + EXTRA_CORRUPTIONS
# Where the published constants do not make every severity stronger than the one before on every image.
NOT_ORDERED = ("glass_blur", "elastic_transform", "saturate", "pixelate")


def pictures(num=3, size=32, channels=3, seed=0):
    """Smooth images with a little noise, multiples of 1/255."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, channels, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(low, size=(size, size), mode="bilinear", align_corners=True)
    noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round() / 255


def as_bytes(x):
    return (x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def cut(values):
    return np.floor(np.clip(values, 0, 1) * 255 + 1e-6).astype(np.uint8)


@pytest.mark.parametrize("size", [32, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_stay_in_range_and_severity_grows_with_the_number(size, channels):
    x = pictures(8, size, channels)
    for name in ALL:
        if name == "saturate" and channels == 1:
            continue
        found = [corrupt(x, name, severity, seed=0, indices=torch.arange(8)) for severity in SEVERITIES]
        for corrupted in found:
            assert corrupted.shape == x.shape
            assert corrupted.dtype == torch.float32
            assert 0 <= corrupted.min() <= corrupted.max() <= 1
            assert torch.equal((corrupted * 255).round() / 255, corrupted)
        distances = [float((corrupted - x).square().mean()) for corrupted in found]
        assert distances[-1] > 0
        if size == 32 and name not in NOT_ORDERED:
            assert distances == sorted(distances), name


def test_noise_follows_from_seed_and_image_alone():
    x = pictures(4)
    every = torch.arange(4)
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "fog"):
        whole = corrupt(x, name, 3, seed=1, indices=every)
        single = torch.cat([corrupt(x[[row]], name, 3, seed=1, indices=every[[row]]) for row in (3, 1)])
        assert torch.equal(single, whole[[3, 1]])
        assert not torch.equal(corrupt(x, name, 3, seed=2, indices=every), whole)
        assert not torch.equal(corrupt(x, name, 3, seed=1, indices=every + 4), whole)


def test_noise_has_the_published_strength():
    gray = torch.full((6, 3, 32, 32), 128 / 255)
    for severity in SEVERITIES:
        every = torch.arange(6)
        noise = corrupt(gray, "gaussian_noise", severity, seed=0, indices=every) - gray
        assert float(noise.std()) == pytest.approx(corruption_constants("gaussian_noise", 32)[severity - 1], rel=0.05)
        shot = corrupt(gray, "shot_noise", severity, seed=0, indices=every) - gray
        photons = corruption_constants("shot_noise", 32)[severity - 1]
        assert float(shot.std()) == pytest.approx(math.sqrt(128 / 255 / photons), rel=0.05)
        hit = corrupt(gray, "impulse_noise", severity, seed=0, indices=every)
        share = corruption_constants("impulse_noise", 32)[severity - 1]
        assert float((hit != gray).double().mean()) == pytest.approx(share, rel=0.25)
        assert set(hit.unique().tolist()) == {0.0, gray[0, 0, 0, 0].item(), 1.0}


def naive_gaussian(image, sigma, reach, border):
    """A separable Gaussian by loops over the pixels of a padded image."""
    weights = [math.exp(-(k**2) / (2 * sigma**2)) if reach else 1.0 for k in range(-reach, reach + 1)]
    for _ in range(2):
        padded = np.pad(image, ((reach, reach), (0, 0), (0, 0)), mode=border)
        image = sum(w * padded[k : k + len(image)] for k, w in enumerate(weights)) / sum(weights)
        image = image.swapaxes(0, 1)
    return image


@pytest.mark.parametrize("size", [32, 224])
def test_blurs_against_sums_over_pixels(size):
    x = pictures(1, size)
    image, index = as_bytes(x) / 255, torch.arange(1)
    for severity in (1, 3, 5):
        sigma = corruption_constants("gaussian_blur", size)[severity - 1]
        expected = cut(naive_gaussian(image, sigma, int(4 * sigma + 0.5), "edge"))
        assert np.array_equal(as_bytes(corrupt(x, "gaussian_blur", severity, seed=0, indices=index)), expected)
        radius, alias = corruption_constants("defocus_blur", size)[severity - 1]
        half, reach = (8, 1) if radius <= 8 else (radius, 2)
        side = range(-half, half + 1)
        disk = np.array([[float(a * a + b * b <= radius**2) for a in side] for b in side])
        kernel = naive_gaussian((disk / disk.sum())[..., None], alias, reach, "reflect")[..., 0]
        padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="reflect")
        expected = sum(kernel[a, b] * padded[a : a + size, b : b + size] for a, b in np.argwhere(kernel))
        found = as_bytes(corrupt(x, "defocus_blur", severity, seed=0, indices=index)).astype(int)
        assert np.abs(found - cut(expected)).max() <= 1
        assert (found != cut(expected)).mean() < 0.01


def test_zoom_blur_is_the_mean_of_enlarged_images():
    """Linear interpolation with corners aligned, as torch has it."""
    x = pictures(1)
    for severity in SEVERITIES:
        factors = corruption_constants("zoom_blur", 32)[severity - 1]
        total = x.double()
        for factor in factors:
            kept = math.ceil(32 / factor)
            first, side = (32 - kept) // 2, round(kept * factor)
            part = x.double()[:, :, first : first + kept, first : first + kept]
            large = nn.functional.interpolate(part, size=(side, side), mode="bilinear", align_corners=True)
            start = (side - 32) // 2
            total = total + large[:, :, start : start + 32, start : start + 32]
        expected = cut((total / (len(factors) + 1))[0].permute(1, 2, 0).numpy())
        assert np.array_equal(as_bytes(corrupt(x, "zoom_blur", severity, seed=0, indices=torch.arange(1))), expected)
    # numpy.arange, by rounding, includes the end of the second list.
    assert [len(factors) for factors in corruption_constants("zoom_blur", 32)] == [7, 12, 16, 21, 26]


@pytest.mark.parametrize("angle", [0.0, 30.0, -45.0, -120.0])
def test_motion_blur_is_half_a_gaussian_along_a_line(angle):
    image = as_bytes(pictures(1, 12))
    radius, sigma = 3, 2.0
    weights = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(2 * radius + 1)]
    expected = np.zeros(image.shape)
    for row in range(12):
        for column in range(12):
            for step, weight in enumerate(weights):
                down = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
                right = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
                source = image[min(max(row + down, 0), 11), min(max(column + right, 0), 11)]
                expected[row, column] += weight / sum(weights) * source
    assert np.array_equal(corruptions._move(image, radius, sigma, angle=angle), np.rint(expected).astype(np.uint8))


def naive_hsv(pixel):
    value, low = max(pixel), min(pixel)
    if value == low:
        return 0.0, 0.0, value
    red, green, blue = pixel
    sector = {red: (green - blue) / (value - low), green: 2 + (blue - red) / (value - low)}
    hue = sector.get(value, 4 + (red - green) / (value - low))
    return hue % 6, (value - low) / value, value


def naive_rgb(hue, saturation, value):
    part = hue - math.floor(hue)
    p, q, t = value * (1 - saturation), value * (1 - saturation * part), value * (1 - saturation * (1 - part))
    return [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q)][int(hue) % 6]


@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_color_against_hue_saturation_and_value(name):
    x = pictures(1, 12)
    x[0, :, 0, :4] = 0
    x[0, :, 1, :4] = 100 / 255  # black and gray have no hue
    for severity in SEVERITIES:
        constant = corruption_constants(name, 32)[severity - 1]
        expected = []
        for pixel in (as_bytes(x).reshape(-1, 3) / 255).tolist():
            hue, saturation, value = naive_hsv(pixel)
            if name == "brightness":
                value = min(value + constant, 1)
            else:
                saturation = min(max(saturation * constant[0] + constant[1], 0), 1)
            expected.append(naive_rgb(hue, saturation, value))
        found = as_bytes(corrupt(x, name, severity, seed=0, indices=torch.arange(1))).reshape(-1, 3).astype(int)
        assert np.abs(found - cut(np.array(expected))).max() <= 1


def test_contrast_pixelate_and_jpeg_against_their_definitions():
    x = pictures(1)
    image = as_bytes(x)
    for severity in SEVERITIES:
        factor = corruption_constants("contrast", 32)[severity - 1]
        means = (image / 255).reshape(-1, 3).mean(0)
        expected = {"contrast": cut(means + factor * (image / 255 - means))}
        side = int(32 * corruption_constants("pixelate", 32)[severity - 1])
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
        expected["pixelate"] = np.asarray(small.resize((32, 32), Image.Resampling.BOX))
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=corruption_constants("jpeg_compression", 32)[severity - 1])
        expected["jpeg_compression"] = np.asarray(Image.open(file))
        for name, values in expected.items():
            assert np.array_equal(as_bytes(corrupt(x, name, severity, seed=0, indices=torch.arange(1))), values)


def test_fog_is_a_cloud_whose_mean_grows_and_lightest_pixel_stays():
    cloud = corruptions._plasma(32, 2.0, np.random.default_rng(0))
    assert cloud.shape == (32, 32)
    assert (cloud.min(), cloud.max()) == (0.0, 1.0)
    # Neighbors are alike, also around the edges: it is a torus.
    step = np.abs(cloud - np.roll(cloud, 1, 0)).mean()
    assert step < 0.5 * np.abs(cloud - np.roll(cloud, 16, 0)).mean()
    x = pictures(4)
    foggy = corrupt(x, "fog", 5, seed=0, indices=torch.arange(4))
    assert foggy.max() <= x.max()
    assert (foggy.flatten(1).std(1) < x.flatten(1).std(1) * 1.2).all()


def test_smoothing_and_reading_between_pixels_against_scipy():
    """The pieces of the elastic transform and of the blurs, against another implementation."""
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = np.random.default_rng(0)
    field = generator.random((20, 20))
    for sigma in (1.3, 6.4, 30.0):
        border, mode = ("edge", "nearest") if sigma < 2 else ("symmetric", "reflect")
        matrix = corruptions._gaussian_matrix(20, sigma, int(3 * sigma + 0.5), border)
        expected = ndimage.gaussian_filter(field, sigma, truncate=3, mode=mode)
        np.testing.assert_allclose(matrix @ field @ matrix.T, expected, rtol=1e-10)
    places = generator.uniform(-9, 28, size=(2, 20, 20))
    for border, mode in (("symmetric", "reflect"), ("reflect", "mirror")):
        expected = ndimage.map_coordinates(field, places, order=1, mode=mode)
        found = corruptions._bilinear(field[..., None], *places, border)[..., 0]
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_elastic_transform_moves_three_points_where_it_says():
    """Without the smooth moves, a linear ramp becomes the ramp of the affine map through the three moved points."""
    size = 32
    ramp = np.tile(np.arange(size, dtype=np.uint8)[None, :, None] * 4 + 60, (size, 1, 1))
    moved = corruptions._elastic_transform(ramp, (0.0, 0.0, 2.0), np.random.default_rng(3))
    center, side = 16, 10
    before = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])
    assert [center + side, center - side] == [26, 6]
    after = before + np.random.default_rng(3).uniform(-2, 2, size=(3, 2))
    for (column, _), (there, row) in zip(before, after, strict=True):
        left, top = int(there), int(row)
        near = moved[top : top + 2, left : left + 2, 0].astype(float).mean()
        assert near == pytest.approx(60 + 4 * column, abs=5)


def test_constants_are_those_of_the_nearer_benchmark():
    assert [constants_of(size) for size in (32, 224)] == ["CIFAR-10-C", "ImageNet-C"]
    assert [constants_of(size) for size in (8, 96)] == ["CIFAR-10-C (meant for 32 px)"] * 2
    assert constants_of(97) == "ImageNet-C (meant for 224 px)"
    assert corruption_constants("gaussian_noise", 96) == [0.04, 0.06, 0.08, 0.09, 0.10]
    assert corruption_constants("gaussian_noise", 97) == [0.08, 0.12, 0.18, 0.26, 0.38]


def test_names_are_the_benchmarks_and_what_is_left_out_says_why():
    assert chosen_corruptions(["all"], num_channels=1) == CORRUPTIONS
    assert len(CORRUPTIONS) == 14
    assert chosen_corruptions(["fog,snow", "fog"], num_channels=1) == ("fog", "snow")
    assert chosen_corruptions(["saturate", "all"], num_channels=3)[0] == "saturate"
    for name in LEFT_OUT:
        with pytest.raises(ValueError, match=f"--corruptions {name}: not available, "):
            chosen_corruptions([name], num_channels=3)
    with pytest.raises(ValueError, match=r"--corruptions frog: there is none .* fog"):
        chosen_corruptions(["frog"], num_channels=3)
    with pytest.raises(ValueError, match="images are gray"):
        chosen_corruptions(["saturate"], num_channels=1)


def accuracy(net, images, folder=None, names=("gaussian_noise", "contrast"), seed=3):
    place = Workplace(accelerator=Accelerator(cpu=True), batch_size=4, seed=seed, output_dir=folder)
    return evaluate_corruptions(net, images, names, (1, 5), place)


def test_flags_are_those_of_a_loop_and_an_interrupted_evaluation_goes_on(tmp_path):
    net, x = group_norm_net().float().train(), pictures(10, 8)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[3] = (y[3] + 1) % 4
    images = TensorImages(x, y)
    whole = Watched(net)
    found = accuracy(whole, images)
    assert [result.name for result in found] == ["gaussian_noise"] * 2 + ["contrast"] * 2
    assert [result.severity for result in found] == [1, 5] * 2
    for result in found:
        corrupted = corrupt(x, result.name, result.severity, seed=3, indices=torch.arange(10))
        with torch.no_grad():
            assert torch.equal(result.flags, net(corrupted).argmax(1) == y)
    assert net.training
    assert any(result.flags.any() and not result.flags.all() for result in found)
    broken = Watched(net, break_after=whole.passes * 2 // 3)
    with pytest.raises(KeyboardInterrupt):
        accuracy(broken, images, tmp_path)
    rest = Watched(net)
    again = accuracy(rest, images, tmp_path)
    assert all(torch.equal(ours.flags, theirs.flags) for ours, theirs in zip(again, found, strict=True))
    assert rest.passes == whole.passes // 2
    # Another seed, or another batch size, computes anew.
    other = Watched(net)
    accuracy(other, images, tmp_path, seed=4)
    assert other.passes == whole.passes


class _NotFinite(nn.Module):
    def forward(self, x):
        logits = torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)
        logits[x.flatten(1).std(1) > 0.2] = torch.nan
        return logits


def test_logits_that_are_not_finite_are_wrong():
    x = torch.full((4, 3, 8, 8), 0.5)
    images = TensorImages((x * 255).round() / 255, torch.zeros(4, dtype=torch.long))
    results = accuracy(_NotFinite(), images, names=("impulse_noise", "contrast"))
    assert [bool(result.flags.all()) for result in results] == [True, True, True, True]
    images.x[:2, :, :4] = 1.0
    images.x[:2, :, 4:] = 0.0
    results = accuracy(_NotFinite(), images, names=("contrast",))
    assert results[0].flags.tolist() == [False, False, True, True]
