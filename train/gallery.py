"""Pictures of what a run does: its views as the encoder gets them, and what its decoder repaints."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from model.network import Network
from pipeline.loader import Loader, open_loader
from pipeline.store import Store
from pipeline.stored import StoredPictures
from pipeline.views import Batch, Patches, denormalise, group_size, make_views, take, unpatchify
from train.config import Run
from train.device import autocast

SHOWN = 8
GAP, HIDDEN_GRAY = 4, 0.5
LABEL_WIDTH, LEAST_CELL = 150, 64  # pixels, of draw_stages
FRAMES = ("#e4572e", "#17b890", "#2e86e4", "#e4b72e", "#9b5de5", "#00bbd4", "#f15bb5", "#8d99ae")  # of the views' boxes


def draw_gallery(out: Path, network: Network, run: Run, store: Store, device: torch.device) -> Path:
    """Write media/gallery.png: a column per image, a row per view, and the repainted view where there is a decoder."""
    views = run.method.views(run.model)
    group = group_size(views)
    shown = max(group, min(SHOWN, store.count) // group * group)
    with contextlib.closing(opened(store, run, device, shown, shuffle=False)) as loader:
        batch = first_batch(loader)
    made = make_views(batch, views, patch=run.model.patch, seed=run.seed)
    rows = []
    for view in made.values():
        rows.append(denormalise(unpatchify(view.pixels, run.model.patch)))
        if view.keep is not None:
            rows.append(_with_holes(view, run.model.patch))
            if "decoder" in network.parts:
                rows.append(repainted(network, view, run))
    path = out / "media" / "gallery.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(_grid(rows, run.model.side)).save(path)
    return path


def draw_stages(path: Path, run: Run, store: Store, device: torch.device) -> Path:
    """Write a picture of a batch on its way: a column per image, rows for what is stored, with the boxes of its views,
    and for each view what is cut, how it is coloured, and what the encoder sees of it.

    run: resolved. The images are the first of the run's first epoch, and their views those that it trains on.
    """
    views = run.method.views(run.model)
    group = group_size(views)
    shown = max(group, min(SHOWN, store.count) // group * group)
    with contextlib.closing(opened(store, run, device, shown, shuffle=True)) as loader:
        batch = first_batch(loader)
        rows = [("as stored, with crops", "black", _stored(store, loader, batch, max(LEAST_CELL, run.model.side)))]
    made = make_views(batch, views, patch=run.model.patch, seed=run.seed)
    for colour, (name, view) in zip(itertools.cycle(FRAMES), views.items(), strict=False):
        rows.append((f"{name}: cut to {view.side} px", colour, batch.images[name].cpu() / 255))
        if view.coloured or view.strong:
            pixels = denormalise(unpatchify(made[name].pixels, run.model.patch))
            rows.append((f"{name}: coloured", colour, pixels.cpu()))
        if made[name].keep is not None:
            rows.append((f"{name}: what is seen of it", colour, _with_holes(made[name], run.model.patch).cpu()))
    grid = _grid([pictures for _, _, pictures in rows], max(LEAST_CELL, run.model.side))
    page = Image.new("RGB", (LABEL_WIDTH + grid.shape[1], grid.shape[0]), "white")
    page.paste(Image.fromarray(grid), (LABEL_WIDTH, 0))
    pen, height = ImageDraw.Draw(page), (grid.shape[0] - GAP) // len(rows)
    for row, (words, colour, _) in enumerate(rows):
        pen.text((GAP, GAP + row * height + height // 2), words, fill=colour, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path


def _stored(store: Store, loader: Loader, batch: Batch, cell: int) -> Tensor:
    """(B, cell, cell, 3) in [0, 1]: the stored pictures, shrunk to fit, with a frame for each crop that is cut."""
    ids, found = batch.id.numpy(), torch.ones(len(batch.id), cell, cell, 3)
    boxes = {name: geometry.boxes for name, geometry in loader.where(batch.epoch, ids).items()}
    with contextlib.closing(StoredPictures.in_shards(store)) as stored:
        for row, sample in enumerate(ids):
            image = Image.fromarray(stored.picture(int(sample)))
            scale = min(1.0, cell / max(image.size))
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            pen = ImageDraw.Draw(image)
            for colour, box in zip(itertools.cycle(FRAMES), boxes.values(), strict=False):
                top, left, height, width = (float(each) * scale for each in box[row])
                pen.rectangle((left, top, left + width - 1, top + height - 1), outline=colour, width=2)
            found[row, : image.height, : image.width] = torch.from_numpy(np.asarray(image) / 255)
    return found


def opened(store: Store, run: Run, device: torch.device, shown: int, *, shuffle: bool) -> Loader:
    views = run.method.views(run.model)
    return open_loader(store, views, batch=shown, seed=run.seed, backend=run.loader, device=device, shuffle=shuffle)


def first_batch(loader: Loader) -> Batch:
    with contextlib.closing(loader.epoch(0)) as batches:
        return next(batches)


def _with_holes(view: Patches, patch: int) -> Tensor:
    """(B, S, S, 3) in [0, 1], hidden patches gray."""
    assert view.hidden is not None
    shown = denormalise(unpatchify(view.pixels, patch))
    holes = torch.zeros(view.pixels.shape[:2], device=view.pixels.device).scatter(1, view.hidden, 1.0)
    holes = unpatchify(holes[:, :, None].expand(-1, -1, 3 * patch**2), patch)
    return torch.where(holes > 0, torch.full_like(shown, HIDDEN_GRAY), shown)


@torch.no_grad()
def repainted(network: Network, view: Patches, run: Run) -> Tensor:
    """(B, S, S, 3) in [0, 1]: seen patches as they are, hidden ones as the decoder predicts them.

    With norm_pix the decoder predicts each patch relative to its own mean and deviation; these are taken from the
    true patch, as MAE's own pictures do.
    """
    assert view.keep is not None
    assert view.hidden is not None
    network.eval()
    with autocast(view.pixels.device, run.precision):  # attention was chosen for this type
        code = run.method.code(network, view)
        predicted = network.parts["decoder"](code, view, view.hidden)[0].float()
    if getattr(run.method, "norm_pix", False):
        truth = take(view.pixels, view.hidden)
        predicted = predicted * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
    index = view.hidden[:, :, None].expand(-1, -1, predicted.shape[-1])
    return denormalise(unpatchify(view.pixels.scatter(1, index, predicted), run.model.patch))


def _grid(rows: list[Tensor], side: int) -> np.ndarray:
    """Rows of (B, s, s, 3) pictures, each in a cell of `side`, on white."""
    columns = len(rows[0])
    canvas = np.full((len(rows) * (side + GAP) + GAP, columns * (side + GAP) + GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        pixels = (row.cpu().numpy() * 255).round().astype(np.uint8)
        for across, picture in enumerate(pixels):
            top, left = GAP + down * (side + GAP), GAP + across * (side + GAP)
            canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas
