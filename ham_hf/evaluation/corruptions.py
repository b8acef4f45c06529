"""Common corruptions of images, severity 1 to 5 (Hendrycks and Dietterich, ICLR 2019), written from their definitions.

Names, formulas and constants are those of CIFAR-10-C (for 32 px) and ImageNet-C (for 224 px). Other sizes take the
constants of the nearer one, unscaled (our choice): up to 96 px those for 32. As in the benchmark, images are cut to
uint8. Where it used ImageMagick (motion blur and snow) or OpenCV, its definition is computed here in numpy. Noise is
drawn from the seed, the corruption and the position of the image in its split: the same for every severity, batch size
and number of processes. So the images are the benchmark's in kind, not bit for bit; ImageNet-C was also stored as JPEG
of quality 85, which is not repeated. `LEFT_OUT` lists the missing ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ham_hf.data.pixels import to_unit_interval
from ham_hf.seeding import Stream, derive_seed

Floats = NDArray[np.float64]
"""An image (H, W, C) in [0, 1], or a field (H, W)."""
Bytes = NDArray[np.uint8]

MAX_SMALL_SIZE = 96
"""Images up to this side take the constants of CIFAR-10-C, larger ones those of ImageNet-C."""
SEVERITIES = (1, 2, 3, 4, 5)
LEFT_OUT = {
    "frost": "it pastes the authors' photographs of ice, which are not shipped",
    "spatter": "its definition needs OpenCV's edge detector and distance transform",
}
"""Corruptions of the benchmark that are not here, and why."""

_ANTIALIASED = 8
"""Disks up to this radius are drawn on 17 x 17 pixels and smoothed over 3 x 3, larger ones over 5 x 5."""


def corrupt(x: Tensor, name: str, severity: int, *, seed: int, indices: Tensor) -> Tensor:
    """Corrupt a batch of images: (N, C, S, S) float32 multiples of 1/255 in [0, 1], on the device of ``x``.

    Args:
        x: (N, C, S, S) pixels in [0, 1], C = 1 or 3; rounded to multiples of 1/255.
        name: one of `CORRUPTIONS` or `EXTRA_CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise.
        indices: (N,) int64, positions of the images in their split.

    Raises:
        ValueError: for an unknown corruption or severity, or color saturation of gray images.
    """
    check_corruption(name, severity, num_channels=x.shape[1])
    function, constants = _DEFINITIONS[name][0], corruption_constants(name, x.shape[-1])[severity - 1]
    pixels = (x.detach().cpu() * 255).round().double().permute(0, 2, 3, 1).numpy() / 255
    noise = (seed, Stream.CORRUPTION, list(_DEFINITIONS).index(name))
    corrupted = [
        _to_bytes(function(image, constants, np.random.default_rng(derive_seed(*noise, int(index)))))
        for image, index in zip(pixels, indices, strict=True)
    ]
    stacked = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2)
    return to_unit_interval(stacked.to(x.device))


def chosen_corruptions(asked: Sequence[str], *, num_channels: int) -> tuple[str, ...]:
    """The corruptions that words ask for, each once: names, lists of them with commas, or "all" for `CORRUPTIONS`."""
    words = [word for item in asked for word in item.replace(",", " ").split()]
    names = tuple(dict.fromkeys(name for word in words for name in (CORRUPTIONS if word == "all" else [word])))
    for name in names:
        check_corruption(name, 1, num_channels=num_channels)
    return names


def check_corruption(name: str, severity: int, *, num_channels: int) -> None:
    """Raise ValueError for a corruption or severity that is unknown, or impossible with so many channels."""
    if name in LEFT_OUT:
        raise ValueError(f"--corruptions {name}: not available, {LEFT_OUT[name]}")
    if name not in _DEFINITIONS:
        raise ValueError(f"--corruptions {name}: there is none of this name; there are {', '.join(_DEFINITIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"--severities {severity}: expected 1, 2, 3, 4 or 5")
    if name == "saturate" and num_channels != 3:
        raise ValueError(
            "--corruptions saturate changes the saturation of colors, and the images are gray: leave it out"
        )


def constants_of(size: int) -> str:
    """Whose constants images of this side take, for a report."""
    name, side = ("CIFAR-10-C", 32) if size <= MAX_SMALL_SIZE else ("ImageNet-C", 224)
    return name if size == side else f"{name} (meant for {side} px)"


def corruption_constants(name: str, size: int) -> Sequence[Any]:
    """The constants of each severity of a corruption, for images of this side: numbers, or tuples of them."""
    _, small, large = _DEFINITIONS[name]
    return small if size <= MAX_SMALL_SIZE else large


def _to_bytes(x: Floats) -> Bytes:
    """Cut to [0, 1] and to whole gray levels, downwards as the benchmark does; the sum forgives rounding."""
    return np.floor(np.clip(x, 0, 1) * 255 + 1e-6).astype(np.uint8)


def _gaussian_noise(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    return x + generator.normal(scale=c, size=x.shape)


def _shot_noise(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    return generator.poisson(x * c) / c


def _impulse_noise(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    """Values of single channels become black or white, each half of the time."""
    hit, white = generator.random(x.shape) < c, generator.random(x.shape) < 0.5
    return np.where(hit, white, x)


def _speckle_noise(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    return x + x * generator.normal(scale=c, size=x.shape)


def _gaussian_blur(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    return _smooth(x, c)


def _defocus_blur(x: Floats, c: tuple[float, float], generator: np.random.Generator) -> Floats:
    kernel = _disk(*c)
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    sides = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, s=sides)[..., None]
    blurred: Floats = np.fft.irfft2(spectrum, s=sides, axes=(0, 1))[2 * reach :, 2 * reach :]
    return blurred


@lru_cache(maxsize=16)
def _disk(radius: float, alias_blur: float) -> Floats:
    """A disk smoothed by a small Gaussian; rows and columns of zeros around it are left out."""
    half, reach = (_ANTIALIASED, 1) if radius <= _ANTIALIASED else (int(radius), 2)
    axis = np.arange(-half, half + 1)
    disk = (axis[:, None] ** 2 + axis[None] ** 2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    smooth = _gaussian_matrix(len(axis), alias_blur, reach, "reflect")
    disk = smooth @ disk @ smooth.T
    edge = half - int(np.abs(axis[disk.any(0)]).max())
    kernel: Floats = disk[edge : len(axis) - edge, edge : len(axis) - edge]
    return kernel


def _glass_blur(x: Floats, c: tuple[float, int, int], generator: np.random.Generator) -> Floats:
    """Blurred, then every pixel takes over a near one, from the last row and column on, then blurred again.

    The published program means to swap the two, but leaves the near one unchanged; the published images have this bug.
    """
    sigma, move, rounds = c
    size = x.shape[0]
    blurred = _to_bytes(_smooth(x, sigma))
    places = range(size - move, move, -1)
    source = list(range(size * size))
    moves = generator.integers(-move, move, size=(rounds, len(places), len(places), 2))
    offsets = (moves[..., 1] * size + moves[..., 0]).tolist()
    for turn in offsets:
        for row, line in zip(places, turn, strict=True):
            for column, offset in zip(places, line, strict=True):
                here = row * size + column
                source[here] = source[here + offset]
    shuffled = blurred.reshape(size * size, -1)[source].reshape(x.shape)
    return _smooth(shuffled / 255, sigma)


def _motion_blur(x: Floats, c: tuple[int, float], generator: np.random.Generator) -> Floats:
    return _move(_to_bytes(x), *c, angle=generator.uniform(-45, 45)) / 255


def _zoom_blur(x: Floats, c: tuple[float, ...], generator: np.random.Generator) -> Floats:
    enlarged = [_along_both(x, _zoom_matrix(x.shape[0], factor)) for factor in c]
    return (x + sum(enlarged)) / (len(c) + 1)


def _snow(x: Floats, c: tuple[float, ...], generator: np.random.Generator) -> Floats:
    mean, deviation, factor, threshold, radius, sigma, mixing = c
    noise = generator.normal(mean, deviation, size=x.shape[:2])[..., None]
    flakes = _along_both(noise, _zoom_matrix(x.shape[0], factor))
    still = _to_bytes(np.where(flakes < threshold, 0, flakes))
    layer = _move(still, int(radius), sigma, angle=generator.uniform(-135, -45)) / 255
    gray = x @ np.array([0.299, 0.587, 0.114])[:, None] if x.shape[2] == 3 else x
    whiter = mixing * x + (1 - mixing) * np.maximum(x, gray * 1.5 + 0.5)
    return whiter + layer + np.rot90(layer, 2)


def _fog(x: Floats, c: tuple[float, float], generator: np.random.Generator) -> Floats:
    (thickness, decay), size = c, x.shape[0]
    plasma: Floats = _plasma(2 ** math.ceil(math.log2(size)), decay, generator)[:size, :size, None]
    highest = float(x.max())
    return (x + thickness * plasma) * highest / (highest + thickness)


def _plasma(size: int, decay: float, generator: np.random.Generator) -> Floats:
    """A cloud (size, size) in [0, 1] by the diamond-square algorithm on a torus; ``size`` is a power of two."""
    field, step, roughness = np.zeros((size, size)), size, 100.0

    def filled(first: Floats, second: Floats, axis: int) -> Floats:
        total = first + np.roll(first, -1, axis) + second
        noise = generator.uniform(-roughness, roughness, size=total.shape)
        return total / 4 + roughness * noise

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        below = np.roll(corners, -1, 0)
        centers = filled(corners, below + np.roll(below, -1, 1), 1)
        field[half::step, half::step] = centers
        field[::step, half::step] = filled(corners, centers + np.roll(centers, 1, 0), 1)
        field[half::step, ::step] = filled(corners, centers + np.roll(centers, 1, 1), 0)
        step, roughness = half, roughness / decay
    cloud: Floats = (field - field.min()) / (field.max() - field.min())
    return cloud


def _brightness(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    """Raise the value of HSV; hue and saturation stay, so all channels of a pixel grow by one factor."""
    value: Floats = x.max(2, keepdims=True)
    brighter = np.clip(value + c, 0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _saturate(x: Floats, c: tuple[float, float], generator: np.random.Generator) -> Floats:
    value = x.max(2, keepdims=True)
    spread = value - x.min(2, keepdims=True)
    saturation = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    # How far each channel is below the value, 0 to 1; a gray pixel counts as red, whose hue is 0.
    depth = np.where(spread > 0, (value - x) / np.where(spread > 0, spread, 1), np.array([0.0, 1.0, 1.0]))
    lowered: Floats = value * (1 - np.clip(saturation * c[0] + c[1], 0, 1) * depth)
    return lowered


def _contrast(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    means: Floats = x.mean((0, 1), keepdims=True)
    return (x - means) * c + means


def _elastic_transform(x: Floats, c: tuple[float, float, float], generator: np.random.Generator) -> Floats:
    """An affine map that moves three points at random, then a smooth random move of every pixel."""
    length, sigma, corner_move = c
    size = x.shape[0]
    center, side = size // 2, size // 3
    before = np.array([[center + side] * 2, [center + side, center - side], [center - side] * 2], dtype=np.float64)
    after = before + generator.uniform(-corner_move, corner_move, size=before.shape)
    # Where each pixel of the result is taken from: the map from the moved points (column, row) to the old ones.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    rows, columns = np.mgrid[:size, :size].astype(np.float64)
    places = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back
    warped = _bilinear(x, places[..., 1], places[..., 0], "reflect")
    smooth = _gaussian_matrix(size, sigma, int(3 * sigma + 0.5), "symmetric")
    moves = [length * (smooth @ generator.uniform(-1, 1, size=(size, size)) @ smooth.T) for _ in range(2)]
    return _bilinear(warped, rows + moves[1], columns + moves[0], "symmetric")


def _pixelate(x: Floats, c: float, generator: np.random.Generator) -> Floats:
    size = x.shape[0]
    small = max(1, int(size * c))
    picture = _picture(x).resize((small, small), Image.Resampling.BOX)
    return _from_picture(picture.resize((size, size), Image.Resampling.BOX))


def _jpeg_compression(x: Floats, c: int, generator: np.random.Generator) -> Floats:
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=c)
    return _from_picture(Image.open(file))


def _picture(x: Floats) -> Image.Image:
    return Image.fromarray(_to_bytes(x if x.shape[2] == 3 else x[..., 0]))


def _from_picture(picture: Image.Image) -> Floats:
    return np.asarray(picture).reshape(picture.height, picture.width, -1) / 255


def _move(image: Bytes, radius: int, sigma: float, *, angle: float) -> Bytes:
    """ImageMagick's motion blur: half a Gaussian along a line at ``angle`` degrees; pixels outside are the edge's."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    turn = math.radians(angle)
    shifts = np.ceil(np.outer([math.sin(turn), math.cos(turn)], steps) - 0.5).astype(int)
    size, reach = image.shape[0], 2 * radius
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge").astype(np.float64)
    moved = np.zeros(image.shape)
    for weight, down, right in zip(weights, *(reach + shifts), strict=True):
        moved += weight * padded[down : down + size, right : right + size]
    return np.rint(moved).astype(np.uint8)


def _smooth(x: Floats, sigma: float) -> Floats:
    """A Gaussian blur of deviation ``sigma`` pixels, cut at four of them, with the edge repeated outside."""
    return _along_both(x, _gaussian_matrix(x.shape[0], sigma, int(4 * sigma + 0.5), "edge"))


def _along_both(x: Floats, matrix: Floats) -> Floats:
    """A linear map (S, S) of the rows and of the columns of an image (S, S, C)."""
    mapped: Floats = np.tensordot(matrix, np.tensordot(matrix, x, (1, 0)), (1, 1)).swapaxes(0, 1)
    return mapped


@lru_cache(maxsize=64)
def _gaussian_matrix(size: int, sigma: float, reach: int, border: str) -> Floats:
    """The blur of a line of ``size`` pixels as a matrix: Gaussian weights up to ``reach`` pixels away, of sum 1.

    ``border`` says what lies outside, in the words of `numpy.pad`.
    """
    matrix = np.zeros((size, size))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2)) if reach else np.ones(1)
    sources = np.pad(np.arange(size), reach, mode=border)  # type: ignore[call-overload]
    for row in range(size):
        np.add.at(matrix[row], sources[row : row + len(offsets)], weights / weights.sum())
    return matrix


@lru_cache(maxsize=256)
def _zoom_matrix(size: int, factor: float) -> Floats:
    """The middle of a line enlarged by ``factor``, as a matrix: linear interpolation, both ends stay in place."""
    kept = math.ceil(size / factor)
    enlarged = round(kept * factor)
    first = (enlarged - size) // 2
    places = np.arange(first, first + size) * (kept - 1) / (enlarged - 1)
    below = np.minimum(places.astype(int), kept - 2)
    share = places - below
    matrix, rows, start = np.zeros((size, size)), np.arange(size), (size - kept) // 2
    matrix[rows, start + below] += 1 - share
    matrix[rows, start + below + 1] += share
    return matrix


def _bilinear(image: Floats, rows: Floats, columns: Floats, border: str) -> Floats:
    """An image (S, S, C) read at places (S, S) between its pixels; ``border`` as in `_gaussian_matrix`."""
    size, (top, left) = image.shape[0], (np.floor(rows).astype(int), np.floor(columns).astype(int))
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    top, bottom, left, right_of = (_folded(index, size, border) for index in (top, top + 1, left, left + 1))
    upper = image[top, left] * (1 - right) + image[top, right_of] * right
    lower = image[bottom, left] * (1 - right) + image[bottom, right_of] * right
    blended: Floats = upper * (1 - down) + lower * down
    return blended


def _folded(index: NDArray[np.int64], size: int, border: str) -> NDArray[np.int64]:
    """Indices mirrored into the image, with the edge pixel twice ("symmetric") or once ("reflect")."""
    twice = border == "symmetric"
    period = 2 * size if twice else 2 * size - 2
    index = index % period
    return np.where(index < size, index, period - twice - index)


def _steps(*ends_and_strides: tuple[float, float]) -> list[tuple[float, ...]]:
    return [tuple(np.arange(1, end, stride).tolist()) for end, stride in ends_and_strides]


_DEFINITIONS: Mapping[
    str, tuple[Callable[[Floats, Any, np.random.Generator], Floats], Sequence[Any], Sequence[Any]]
] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),  # deviation
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),  # photons of a white pixel
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),  # share hit
    "defocus_blur": (_defocus_blur,  # radius of the disk, deviation of its smoothing
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (_glass_blur,  # deviation of the blur, largest move, rounds
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (_motion_blur,  # radius, deviation
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (_zoom_blur,  # the enlargements that are averaged
        _steps((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        _steps((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (_snow,  # mean, deviation, enlargement and threshold of flakes; radius and deviation of motion; mixing
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    ),
    "fog": (_fog,  # thickness, decay of the roughness
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),  # added to the value of HSV
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),  # factor
    "elastic_transform": (_elastic_transform,  # length of moves, deviation of their smoothing, move of corners; px
        tuple((32 * a, 32 * b, 32 * c) for a, b, c in (
            (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
        )),
        # The benchmark computed with 244 where it meant 224.
        tuple((244 * a, 244 * b, 244 * c) for a, b, c in (
            (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
        )),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),  # factor of the side
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),  # quality
    "speckle_noise": (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),  # times the pixel
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),  # deviation
    "saturate": (_saturate,  # factor of the saturation, and what is added to it
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
}  # fmt: skip
"""The corruptions, with their constants for small and for large images, in the order of the benchmark.

The place of a corruption is part of its noise's seed: append, never reorder.
"""

EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "saturate")
"""The benchmark's corruptions for validation, which its mean leaves out."""
CORRUPTIONS = tuple(name for name in _DEFINITIONS if name not in EXTRA_CORRUPTIONS)
"""The corruptions of the benchmark's mean, without frost."""
