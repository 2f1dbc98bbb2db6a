"""Which image comes when, and every crop, flip and colour change: pure functions of (seed, epoch, sample id, view).

Nothing here keeps state. A batch is therefore the same on any number of workers, at any batch size and after any
resume, whichever library decodes it. numpy only: the numbers are few, and made on the host while the device works.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import numpy as np

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2^64 / golden ratio, odd
TRIES = 10  # of a crop that has to fit
BLUR_SIGMA = (0.1 / 224, 2.0 / 224)  # of a blur, as a share of the side: SimCLR's 0.1 to 2 pixels of 224
MOST_VIEWS = 16  # that are cut from one picture, as native/crops.c has it


@dataclass(frozen=True, kw_only=True)
class View:
    """How one view of an image is drawn. An objective declares its views by name."""

    side: int  # pixels of the square it is resized to
    area: tuple[float, float] = (0.2, 1.0)  # share of the image's area that the crop covers, uniform
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop, log-uniform
    flip: float = 0.5  # probability
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian blur, after jitter and gray
    solarise: float = 0.0  # probability that bright pixels are inverted, last of the colours
    strong: int = 0  # changes of CLSA's fourteen that are drawn after the colours (augment.py)
    mask_ratio: float = 0.0  # share of the patches hidden from the encoder
    noise: float | None = None  # largest deviation of Gaussian noise on normalised pixels; None: none is drawn
    group: int = 1  # > 1: so many consecutive samples share the patches out among them; mask_ratio is 1 - 1 / group
    same_crop_as: str | None = None  # crop and flip of that other view; area, aspect and flip here mean nothing then
    drop_path: tuple[float, int] | None = None  # chance that the last of so many blocks is left out; see branch_scales
    centre: float | None = None  # for evaluation: the central square of this share of the shorter side, no chance

    @property
    def coloured(self) -> bool:
        return any(self.jitter) or self.gray > 0 or self.filtered

    @property
    def filtered(self) -> bool:
        """What happens to its colours is more than one affine map per image."""
        return self.blur > 0 or self.solarise > 0


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@functools.lru_cache(maxsize=1024)
def key(seed: int, epoch: int, purpose: str) -> int:
    """One 64-bit key for a stream of random numbers; streams of different purposes are unrelated."""
    state = np.uint64(zlib.crc32(purpose.encode()))
    for word in (seed, epoch):
        with np.errstate(over="ignore"):
            state = mix(np.array([state ^ np.uint64(word & MASK64)]) + np.uint64(GOLDEN))[0]
    return int(state)


def uniform(seed: int, epoch: int, purpose: str, ids: np.ndarray, count: int) -> np.ndarray:
    """(len(ids), count) float64 in [0, 1): row i depends on ids[i] alone, not on its neighbours or its place."""
    return _numbers(_rows(np.array(key(seed, epoch, purpose), np.uint64), ids), count)


def _rows(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """uint64, of the shape that keys and ids make together: the beginning of each one's endless stream."""
    with np.errstate(over="ignore"):
        return mix(keys + np.asarray(ids, np.uint64) * np.uint64(GOLDEN))


def _numbers(rows: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """(B, count) float64 in [0, 1) from the streams of B rows. first: where in each stream the count begins."""
    with np.errstate(over="ignore"):
        place = np.arange(first + 1, first + count + 1, dtype=np.uint64)
        words = mix(rows[:, None] + place * np.uint64(GOLDEN))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(seed: int, epoch: int, count: int, purpose: str = "order") -> np.ndarray:
    """A permutation of range(count), int64: the order of samples in this epoch.

    Sorting hashed ids instead of numpy's shuffle keeps the order equal across numpy versions.
    """
    with np.errstate(over="ignore"):
        ids = np.arange(count, dtype=np.uint64)
        keys = mix(np.uint64(key(seed, epoch, purpose)) + ids * np.uint64(GOLDEN))
    return np.argsort(keys, kind="stable").astype(np.int64)


def mixture_order(seed: int, epoch: int, real: int, generated: int, real_repeat: int) -> np.ndarray:
    """Sample ids of an epoch of `real` images and, with ids that follow theirs, `generated` ones.

    A real image comes `real_repeat` times as often as a generated one: an epoch is one pass over the real images, mixed
    with the next 1/real_repeat of the generated ones in an order of their own. On average the share of real images in a
    batch is real_repeat real / (real_repeat real + generated), as where the real ones are written down real_repeat
    times (AdaInf, Wang et al. 2024). Unlike there no image comes twice in a batch, where it would be its own negative,
    nor twice in an epoch, where it would be cut the same way again. Without generated images this is epoch_order.
    """
    turn, part = divmod(epoch, real_repeat)
    start, stop = (place * generated // real_repeat for place in (part, part + 1))
    drawn = epoch_order(seed, turn, generated, "generated")[start:stop]
    ids = np.concatenate([np.arange(real), real + drawn])
    return ids[epoch_order(seed, epoch, len(ids))]


def mixture_length(real: int, generated: int, real_repeat: int) -> int:
    """Images that every epoch of mixture_order has. Some have one more, where real_repeat does not divide generated."""
    return real + generated // real_repeat


def batch_ids(order: np.ndarray, step: int, batch: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
    """Sample ids of this rank's share of global batch `step` of an epoch.

    `batch` counts images over all ranks and is divided evenly. The images left over at the end of an epoch, fewer
    than a batch, are dropped; another epoch's order drops others.
    """
    share = batch // ranks
    start = step * batch + rank * share
    return order[start : start + share]


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of one view of a batch come from. Row i belongs to sample i."""

    boxes: np.ndarray  # (B, 4) int64: top, left, height, width in the stored picture
    flip: np.ndarray  # (B,) bool


def geometry(view: View, name: str, seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> Geometry:
    """Crop boxes and flips of a view for the samples `ids` whose stored sizes are `sizes`, (B, 2) height, width."""
    return geometries({name: view}, seed, epoch, ids, sizes)[name]


def geometries(
    views: dict[str, View], seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray
) -> dict[str, Geometry]:
    """The same of several views in one pass: each call of numpy costs more than what it does for one of them."""
    sizes = sizes.astype(np.int64)
    central = {name: _central(view.centre, sizes) for name, view in views.items() if view.centre is not None}
    others = {name: view for name, view in views.items() if view.centre is None}
    return central | (_random(others, seed, epoch, ids, sizes) if others else {})


def _central(share: float, sizes: np.ndarray) -> Geometry:
    heights, widths = sizes.T
    side = np.maximum(1, np.round(np.minimum(heights, widths) * share).astype(np.int64))
    boxes = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)
    return Geometry(boxes, np.zeros(len(sizes), bool))


def _random(views: dict[str, View], seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> dict[str, Geometry]:
    """The crop rule is torchvision's RandomResizedCrop: ten tries at an area and an aspect, and if none fits the
    largest central crop with the nearest aspect allowed.

    All arrays have R = V B rows, the B samples of one view after those of another.
    """
    area, aspect, flip = (
        np.repeat([getattr(view, what) for view in views.values()], len(ids), axis=0)
        for what in ("area", "aspect", "flip")
    )
    heights, widths = np.tile(sizes.T, len(views))
    keys = np.array([key(seed, epoch, f"crop {name}") for name in views], np.uint64)
    rows = _rows(keys[:, None], ids).reshape(-1)
    boxes, flip = np.empty((len(rows), 4), np.int64), _numbers(rows, 1, 4 * TRIES)[:, 0] < flip
    left = np.arange(len(rows))
    # Most fit at the first try; those that do not get all their other tries at once, and take the first that fits.
    for first, tries in ((0, 1), (1, TRIES - 1)):
        draw = _numbers(rows[left], 4 * tries, 4 * first).reshape(-1, tries, 4)
        tried, fits = _try_crops(area[left], aspect[left], draw, heights[left, None], widths[left, None])
        found, which = fits.any(axis=1), fits.argmax(axis=1)
        boxes[left[found]] = tried[found, which[found]]
        left = left[~found]
    boxes[left] = _largest_central(aspect[left], heights[left], widths[left])
    boxes, flip = boxes.reshape(len(views), -1, 4), flip.reshape(len(views), -1)
    return {name: Geometry(boxes[place], flip[place]) for place, name in enumerate(views)}


def _try_crops(
    area: np.ndarray, aspect: np.ndarray, draw: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of some tries for each of R rows, (R, tries, 4), and which lie inside the picture, (R, tries).

    area, aspect: (R, 2), from and to. draw: (R, tries, 4) in [0, 1): area, aspect, top, left. heights, widths: (R, 1).
    """
    area = heights * widths * _between(draw[..., 0], area[:, :1], area[:, 1:])
    aspect = np.exp(_between(draw[..., 1], np.log(aspect[:, :1]), np.log(aspect[:, 1:])))
    wide, high = (np.round(np.sqrt(side)).astype(np.int64) for side in (area * aspect, area / aspect))
    top = np.floor(draw[..., 2] * (heights - high + 1)).astype(np.int64)
    left = np.floor(draw[..., 3] * (widths - wide + 1)).astype(np.int64)
    fits = (wide > 0) & (high > 0) & (wide <= widths) & (high <= heights)
    return np.stack([top, left, high, wide], axis=-1), fits


def _between(unit: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    return low + unit * (high - low)


def _largest_central(aspect: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    (narrowest, widest), ratio = aspect.T, widths / heights
    wide = np.where(ratio > widest, np.round(heights * widest), widths).astype(np.int64)
    high = np.where(ratio < narrowest, np.round(widths / narrowest), heights).astype(np.int64)
    wide, high = np.clip(wide, 1, widths), np.clip(high, 1, heights)
    return np.stack([(heights - high) // 2, (widths - wide) // 2, high, wide], axis=1)


@dataclass(frozen=True)
class Colours:
    """Colour changes of one view of a batch; a row that nothing happens to holds factors 1, hue 0 and gray False."""

    factors: np.ndarray  # (B, 3) float64: brightness, contrast, saturation
    hue: np.ndarray  # (B,) float64, in turns of the colour circle
    order: np.ndarray  # (B, 4) int64: the four changes in the order in which they apply
    gray: np.ndarray  # (B,) bool
    blur: np.ndarray | None = None  # (B,) float64: sigma in pixels, 0 where not blurred; None: the view never is
    solarise: np.ndarray | None = None  # (B,) bool


def colours(view: View, name: str, seed: int, epoch: int, ids: np.ndarray) -> Colours:
    """Jitter strengths as torchvision's ColorJitter: factors in [1 - s, 1 + s], hue in [-h, h], any order."""
    draw = uniform(seed, epoch, f"colour {name}", ids, 13 if view.filtered else 10)
    jittered = (draw[:, 0] < view.jitter_p)[:, None]
    strength = np.asarray(view.jitter[:3])
    factors = np.where(jittered, _between(draw[:, 1:4], np.maximum(0, 1 - strength), 1 + strength), 1.0)
    hue = np.where(jittered[:, 0], _between(draw[:, 4], -view.jitter[3], view.jitter[3]), 0.0)
    changes = (factors, hue, np.argsort(draw[:, 5:9], axis=1), draw[:, 9] < view.gray)
    if not view.filtered:
        return Colours(*changes)
    sigma = view.side * _between(draw[:, 11], *BLUR_SIGMA)
    return Colours(*changes, blur=np.where(draw[:, 10] < view.blur, sigma, 0.0), solarise=draw[:, 12] < view.solarise)


def mask_key(name: str, seed: int, epoch: int) -> int:
    """The stream from which views.py draws, on the device, which patches of each sample are hidden."""
    return key(seed, epoch, f"mask {name}")


def noise_levels(largest: float, name: str, seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """(B,) float64, uniform in [0, largest): the deviation of each sample's noise."""
    return largest * uniform(seed, epoch, f"noise level {name}", ids, 1)[:, 0]


def branch_scales(rate: float, depth: int, purpose: str, seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Stochastic depth: (B, depth, 2) float32, 0 where a residual branch (attention, MLP) of a block is left out for an
    image, else 1 / (1 - p), so that the mean stays. p rises linearly from 0 in the first block to `rate` in the last.

    Source: Huang et al. 2016, as timm's DropPath.
    """
    chance = np.linspace(0, rate, depth)[None, :, None]
    draw = uniform(seed, epoch, purpose, ids, 2 * depth).reshape(len(ids), depth, 2)
    return np.where(draw < chance, 0.0, 1 / (1 - chance)).astype(np.float32)


def noise_key(name: str, seed: int, epoch: int) -> int:
    """The stream from which views.py draws, on the device, the noise of each sample."""
    return key(seed, epoch, f"noise {name}")
