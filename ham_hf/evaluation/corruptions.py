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
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import yaml
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
    function, constants = _CORRUPTED[name], corruption_constants(name, x.shape[-1])[severity - 1]
    pixels = (x.detach().cpu() * 255).round().double().permute(0, 2, 3, 1).numpy() / 255
    noise = (seed, Stream.CORRUPTION, list(_CONSTANTS).index(name))
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
    if name not in _CONSTANTS:
        raise ValueError(f"--corruptions {name}: there is none of this name; there are {', '.join(_CONSTANTS)}")
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
    small = size <= MAX_SMALL_SIZE
    constants = _CONSTANTS[name]["small" if small else "large"]
    if name == "zoom_blur":
        return [tuple(np.arange(1, end, stride).tolist()) for end, stride in constants]
    # The benchmark computed with 244 where it meant 224.
    unit = (32 if small else 244) if name == "elastic_transform" else 1
    return [tuple(unit * part for part in one) if isinstance(one, list) else one for one in constants]


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


_CONSTANTS: Mapping[str, Mapping[str, Sequence[Any]]] = yaml.safe_load(
    (files("ham_hf.evaluation") / "corruptions.yaml").read_text(encoding="utf-8")
)
_FUNCTIONS: tuple[Callable[[Floats, Any, np.random.Generator], Floats], ...] = (
    _gaussian_noise, _shot_noise, _impulse_noise, _defocus_blur, _glass_blur, _motion_blur, _zoom_blur, _snow,
    _fog, _brightness, _contrast, _elastic_transform, _pixelate, _jpeg_compression, _speckle_noise, _gaussian_blur,
    _saturate,
)  # fmt: skip
_CORRUPTED = {function.__name__[1:]: function for function in _FUNCTIONS}

EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "saturate")
"""The benchmark's corruptions for validation, which its mean leaves out."""
CORRUPTIONS = tuple(name for name in _CONSTANTS if name not in EXTRA_CORRUPTIONS)
"""The corruptions of the benchmark's mean, without frost."""
