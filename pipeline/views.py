"""uint8 crops -> what the encoder reads: normalised patches, and which of them are kept. On the device, batched.

Every backend decodes to the same crops; this is written once for all of them. Patches hold their values in (channel,
row, column) order, the order of a convolution's weight, so that timm's patch embedding is a reshape away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.augment import strengthen
from pipeline.colour import colour_maps, mean_colour, recolour
from pipeline.errors import UsageError
from pipeline.masks import kept_count
from pipeline.sampling import (
    GOLDEN,
    MASK64,
    MOST_VIEWS,
    View,
    branch_scales,
    colours,
    mask_key,
    noise_key,
    noise_levels,
)
from pipeline.transfer import constant, to_device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every published ViT here uses


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loader yields: crops from one decode of each image, nothing random left but colour and mask."""

    images: dict[str, Tensor]  # view -> (B, S, S, 3) uint8 on the training device
    label: Tensor  # (B,) int64, -1 where unknown; only evaluation and supervised objectives read it
    id: Tensor  # (B,) int64 on the host, the sample's place in the store
    epoch: int  # with `id`, the key of every random choice


@dataclass(frozen=True, slots=True)
class Patches:
    """One view of a batch, ready for the encoder."""

    pixels: Tensor  # (B, N, P) float32 or bfloat16, normalised; P = 3 p^2 in (channel, row, column) order
    grid: int  # N = grid^2, rows first
    keep: Tensor | None = None  # (B, K) int64, patches that the encoder sees; None means all
    hidden: Tensor | None = None  # (B, N - K) int64, the others, in random order
    noise: Tensor | None = None  # (B, N, P) float32, on what the encoder sees; pixels are without it
    sigma: Tensor | None = None  # (B,) float32, the deviation of each image's noise
    branches: Tensor | None = None  # (B, depth, 2) float32, what the encoder multiplies its residual branches by

    @property
    def tokens(self) -> int:
        """How many patches of each image go through the encoder."""
        return self.pixels.shape[1] if self.keep is None else self.keep.shape[1]

    def visible(self) -> Tensor:
        """(B, K, P): the pixels that the encoder sees. Gathered before the embedding: what is hidden costs nothing."""
        seen = self.kept(self.pixels)
        return seen if self.noise is None else seen + self.kept(self.noise)

    def first(self, count: int) -> Patches:
        """The same view of the first images alone."""
        rows = (self.keep, self.hidden, self.noise, self.sigma, self.branches)
        return Patches(self.pixels[:count], self.grid, *(None if each is None else each[:count] for each in rows))

    def kept(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, K, D): those of the patches that the encoder sees."""
        return rows if self.keep is None else take(rows, self.keep)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) and (B, K) -> (B, K, D): rows[b, index[b]]."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, S, S, 3) -> (B, N, 3 p^2), N = (S / p)^2, each patch in (channel, row, column) order."""
    batch, side, _, channels = images.shape
    grid = side // patch
    cells = images.view(batch, grid, patch, grid, patch, channels)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, grid * grid, channels * patch * patch)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """(B, N, 3 p^2) -> (B, S, S, 3), the exact inverse of patchify."""
    batch, count, values = patches.shape
    grid, channels = round(count**0.5), values // patch**2
    cells = patches.view(batch, grid, grid, channels, patch, patch)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, grid * patch, grid * patch, channels)


def normalise(images: Tensor) -> Tensor:
    """(B, S, S, 3) in [0, 1] -> zero mean and unit variance over ImageNet."""
    mean, std = _mean_and_std(images.device, images.dtype)
    return (images - mean).div_(std)


def normalised_patches(images: Tensor, patch: int) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, N, 3 p^2) float32: to the bit patchify(normalise(images / 255)).

    Cut while a value is one byte instead of four, and then normalised a channel, not a pixel, at a time.
    """
    mean, std = _mean_and_std(images.device, torch.float32)
    values = patchify(images, patch).unflatten(-1, (3, patch**2)).float().div_(255)
    return values.sub_(mean[:, None]).div_(std[:, None]).flatten(-2)


def denormalise(images: Tensor) -> Tensor:
    """The inverse of normalise, clamped to [0, 1]: for looking at."""
    mean, std = _mean_and_std(images.device, images.dtype)
    return (images * std + mean).clamp(0, 1)


def _mean_and_std(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return constant(MEAN, device, dtype), constant(STD, device, dtype)


def to_grey_levels(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) in [0, 1] -> uint8, to the nearest."""
    return pixels.mul(255).round_().to(torch.uint8)


def draw_mask(ids: Tensor, patches: int, keep: int, stream: int, group: int = 1) -> tuple[Tensor, Tensor]:
    """Which patches of each sample stay, and which are hidden: uniform without replacement, exactly `keep` each.

    ids: (B,) int64. Returns (B, keep) and (B, patches - keep) int64. Row i depends on (stream, ids[i]) alone and is
    equal on every device: integer hashing and a sort, no generator state. MAE, section "Masking", argsort of noise.

    group: so many consecutive samples share one order of the patches, a function of the stream and of all their ids;
    the s-th of them keeps its s-th part, so that with group * keep = patches each patch is kept by exactly one.
    """
    place = torch.arange(1, patches + 1, device=ids.device, dtype=torch.int64)
    rows = torch.full_like(ids[::group], _signed(stream))
    for member in ids.view(-1, group).unbind(1):
        rows = _mix(rows + member * _signed(GOLDEN))
    order = torch.argsort(_mix(rows[:, None] + place[None, :] * _signed(GOLDEN)), dim=1, stable=True)
    # Turned round by its parts: the first are a sample's own, and the others are still in random order.
    order = torch.stack([order.roll(-member * keep, dims=1) for member in range(group)], dim=1).flatten(0, 1)
    return order[:, :keep], order[:, keep:]


def draw_noise(ids: Tensor, count: int, stream: int) -> Tensor:
    """(B, count) float32, independent standard normal numbers. Row i depends on (stream, ids[i]) alone and is equal on
    every device but for the rounding of a logarithm and a cosine: 24 bits of a hash each for radius and angle.

    Source: Box and Muller 1958; one word makes two numbers.
    """
    place = torch.arange(1, (count + 1) // 2 + 1, device=ids.device, dtype=torch.int64)
    rows = _mix(ids * _signed(GOLDEN) + _signed(stream))
    words = _mix(rows[:, None] + place[None, :] * _signed(GOLDEN))
    unit = 2.0**-24
    radius = (1 - ((words >> 40) & 0xFFFFFF).float() * unit).log_().mul_(-2).sqrt_()  # of numbers in (0, 1]
    angle = ((words >> 16) & 0xFFFFFF).float().mul_(2 * math.pi * unit)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits; torch's int64 wraps around as uint64 does."""
    word &= MASK64
    return word - (1 << 64) if word >> 63 else word


def _mix(words: Tensor) -> Tensor:
    """sampling.mix on int64 tensors: shifts made logical by masking off the copied sign."""
    words = (words ^ ((words >> 30) & (MASK64 >> 30))) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ ((words >> 27) & (MASK64 >> 27))) * _signed(0x94D049BB133111EB)
    return words ^ ((words >> 31) & (MASK64 >> 31))


def make_views(
    batch: Batch, views: dict[str, View], *, patch: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Patches]:
    """Colour, normalise, cut into patches, mask and draw noise for every view of a batch.

    dtype: on a GPU, of what the fused kernel makes of views that nothing is hidden of: bfloat16 halves their bytes and
    moves a pixel by less than half a grey level. Hidden patches are what a decoder is to predict, and stay float32.

    Raises UsageError where a batch cannot be cut into the groups that a view wants.
    """
    made, ids = {}, batch.id.numpy()
    there = to_device(ids, next(iter(batch.images.values())).device)
    for name, view in views.items():
        patches, grid = _pixels(batch, view, name, patch=patch, seed=seed, dtype=dtype), view.side // patch
        keep = hidden = noise = sigma = branches = None
        if view.mask_ratio > 0:
            if len(batch.id) % view.group:
                raise UsageError(f"view {name}: {len(batch.id)} images cannot be cut into groups of {view.group}.")
            count = kept_count(grid * grid, view.mask_ratio) if view.group == 1 else grid * grid // view.group
            keep, hidden = draw_mask(there, grid * grid, count, mask_key(name, seed, batch.epoch), view.group)
        if view.noise is not None:
            sigma = to_device(noise_levels(view.noise, name, seed, batch.epoch, ids), patches.device).float()
            drawn_noise = draw_noise(there, patches[0].numel(), noise_key(name, seed, batch.epoch))
            noise = sigma[:, None, None] * drawn_noise.view_as(patches)
        if view.drop_path is not None:
            scales = branch_scales(*view.drop_path, f"drop path {name}", seed, batch.epoch, ids)
            branches = to_device(scales, patches.device)
        made[name] = Patches(patches, grid, keep, hidden, noise, sigma, branches)
    return made


def _pixels(batch: Batch, view: View, name: str, *, patch: int, seed: int, dtype: torch.dtype) -> Tensor:
    """(B, N, 3 p^2): one view of a batch, coloured, normalised and cut into patches. dtype: as of make_views."""
    images, ids = batch.images[name], batch.id.numpy()
    drawn = colours(view, name, seed, batch.epoch, ids) if view.coloured else None
    if view.strong:  # changes of grey levels: what was coloured is rounded to them, as between any two in Pillow
        images = images if drawn is None else to_grey_levels(recolour(images.float().div_(255), drawn))
        images, drawn = strengthen(images, view, name, seed, batch.epoch, ids), None
    # The fused kernel maps one pixel at a time: a view that is blurred or solarised takes the plain path.
    if kernels.usable(images.device) and (drawn is None or not view.filtered):
        maps = None if drawn is None else colour_maps(mean_colour(images), drawn)
        return kernels.to_patches(images, patch, maps, MEAN, STD, torch.float32 if view.mask_ratio else dtype)
    if drawn is None:
        return normalised_patches(images, patch)
    return patchify(normalise(recolour(images.float().div_(255), drawn)), patch)


def group_size(views: dict[str, View]) -> int:
    """A batch, and any part of it, has to hold a multiple of so many samples."""
    return math.lcm(*(view.group for view in views.values()))


def check_views(views: dict[str, View], patch: int) -> None:
    """Raises UsageError for more views than a decoder cuts, and for one that no grid of patches fits, or that hides all
    or none of its patches."""
    if len(views) > MOST_VIEWS:
        raise UsageError(f"{len(views)} views are too many: at most {MOST_VIEWS} are cut from one picture.")
    for name, view in views.items():
        if view.side % patch:
            raise UsageError(f"view {name}: its side {view.side} is not a multiple of the patch side {patch}.")
        patches = (view.side // patch) ** 2
        if patches % view.group:
            raise UsageError(f"view {name}: {patches} patches cannot be shared out evenly in a group of {view.group}.")
        if view.mask_ratio and not 0 < kept_count(patches, view.mask_ratio) < patches:
            raise UsageError(f"view {name}: a mask ratio of {view.mask_ratio} leaves no patch to see or none to hide.")
        if view.same_crop_as is not None and view.same_crop_as not in views:
            raise UsageError(f"view {name}: there is no view {view.same_crop_as} to share a crop with.")
