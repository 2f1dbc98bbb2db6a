"""Test pictures: seeded, photograph-like (gradients, shapes, noise), drawn with numpy and encoded by Pillow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.pictures import Encoding, Stored, check_picture, read_file


def picture(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """An RGB picture: a smooth gradient, a few discs and bars, a little noise. No two corners are alike."""
    draw = np.random.default_rng([0, seed])
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ends = draw.uniform(30, 225, (4, 3))
    canvas = (
        ends[0] * ((1 - rows) * (1 - columns))[..., None]
        + ends[1] * ((1 - rows) * columns)[..., None]
        + ends[2] * (rows * (1 - columns))[..., None]
        + ends[3] * (rows * columns)[..., None]
    )
    for _ in range(3):
        x, y, radius = draw.uniform(0.2, 0.8), draw.uniform(0.2, 0.8), draw.uniform(0.08, 0.25)
        canvas[np.hypot(columns - x, rows - y) < radius] = draw.uniform(0, 255, 3)
    left, top = draw.uniform(0, 0.7), draw.uniform(0, 0.8)
    canvas[(columns > left) & (columns < left + 0.25) & (rows > top) & (rows < top + 0.1)] = draw.uniform(0, 255, 3)
    canvas += draw.normal(0, 3, canvas.shape)
    return Image.fromarray(np.clip(canvas, 0, 255).round().astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of a file that holds the image."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        options = {"quality": 92} | options
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_folder(
    root: Path, count: int, side: int = 64, classes: int = 0, *, first: int = 0, kind: str = "JPEG"
) -> list[Path]:
    """Write `count` pictures under root, of sides about `side` at differing proportions. Returns the paths.

    Picture i has the content of seed first + i and, where classes > 0, lies in the folder class-{i % classes}.
    """
    paths = []
    for i in range(count):
        folder = root / f"class-{i % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        width, height = side + (i % 5) * side // 8, side + (i % 3) * side // 8
        path = folder / f"{first + i:05d}.{'jpg' if kind == 'JPEG' else kind.lower()}"
        path.write_bytes(encoded(picture(first + i, width, height), kind))
        paths.append(path)
    return paths


def read_picture(path: Path, encoding: Encoding) -> Stored:
    """What is stored of a file. Raises Rejected."""
    return check_picture(read_file(path, encoding.max_bytes), encoding)


def pixels(image: Image.Image | bytes) -> np.ndarray:
    """(H, W, 3) int16, of an image or a file's bytes: int16, so that differences do not wrap."""
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    return np.asarray(image.convert("RGB")).astype(np.int16)


def psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(...) peak signal-to-noise ratios, in decibels, of two (..., H, W, 3) of 8-bit pictures."""
    assert one.shape == other.shape
    error = np.square(one.astype(float) - other.astype(float)).mean(axis=(-3, -2, -1))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-9))
