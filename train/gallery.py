"""Pictures of what a run does: its views as the encoder gets them, and what its decoder repaints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.network import Network
from pipeline.loader import open_loader
from pipeline.store import Store
from pipeline.views import Patches, denormalise, group_size, make_views, take, unpatchify
from train.config import Run

SHOWN = 8
GAP, HIDDEN_GRAY = 4, 0.5


def draw_gallery(out: Path, network: Network, run: Run, store: Store, device: torch.device) -> Path:
    """Write media/gallery.png: a column per image, a row per view, and the repainted view where there is a decoder."""
    views = run.method.views(run.model)
    group = group_size(views)
    shown = max(group, min(SHOWN, store.count) // group * group)
    loader = open_loader(store, views, batch=shown, seed=run.seed, backend=run.loader, device=device, shuffle=False)
    try:
        batch = next(iter(loader.epoch(0)))
    finally:
        loader.close()
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
