"""One ordered pass over a store: what an encoder makes of each image, and the raw pixels that it has to beat."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model.vit import Encoder, patch_mean
from pipeline.loader import Backend, open_loader
from pipeline.sampling import View
from pipeline.store import Store
from pipeline.views import check_views, make_views

VIEW = "eval"


@dataclass(frozen=True, slots=True)
class Features:
    """Row i belongs to sample i of the store, or to the i-th of the samples asked for. float32, on the host."""

    patch_mean: Tensor  # (N, D): mean of the patch tokens after the final norm, class token left out
    cls: Tensor  # (N, D): class token after the final norm


def encode(
    encoder: Encoder,
    store: Store,
    *,
    side: int,
    device: torch.device | str = "cpu",
    precision_context: AbstractContextManager | None = None,
    backend: Backend = "auto",
    batch: int = 256,
    workers: int = 0,
    centre: float = 1.0,
    crop_epoch: int | None = None,
    seed: int = 0,
    only: np.ndarray | None = None,
) -> Features:
    """Features of every image of a store, or of the samples `only`, by an encoder on `device`, left as it was.

    side: pixels that a picture is resized to. centre: the central square of this share of the shorter side; .875 is
    ImageNet's 224 out of 256. crop_epoch: instead, the random crops (8 to 100 % of the area) and flips of that epoch
    under `seed`, the only augmentation of MAE's linear probe. precision_context: such as train.device.autocast gives.
    Row i is sample i, or sample only[i]. Memory is bounded by the result, 8 N D bytes, and one batch.

    Raises UsageError (generated images, side is no multiple of the patch) and whatever open_loader and the loader
    raise.
    """
    store.check_real("evaluation")
    view = View(side=side, centre=centre) if crop_epoch is None else View(side=side, area=(0.08, 1.0))
    views = {VIEW: view}
    check_views(views, encoder.patch)
    count = store.count if only is None else len(only)
    result = Features(torch.empty(count, encoder.width), torch.empty(count, encoder.width))
    if count == 0:
        return result
    loader = open_loader(
        store, views, batch=min(batch, count), seed=seed, backend=backend, device=device, workers=workers,
        shuffle=False, only=only,
    )  # fmt: skip
    # Not inference_mode: the position code that the encoder keeps would be a tensor that autograd may not save.
    with (
        contextlib.closing(loader),
        _evaluating(encoder),
        torch.no_grad(),
        precision_context or contextlib.nullcontext(),
    ):
        done = 0
        for each in loader.epoch(crop_epoch or 0):
            (tokens,) = encoder(make_views(each, views, patch=encoder.patch, seed=seed)[VIEW])
            tokens = tokens.float()
            rows = slice(done, done := done + len(tokens))
            result.patch_mean[rows] = patch_mean(tokens).cpu()
            result.cls[rows] = tokens[:, 0].cpu()
    return result


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part is in the mode that it had, frozen ones too."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def pixels(
    store: Store,
    *,
    side: int = 32,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
    batch: int = 256,
    workers: int = 0,
    only: np.ndarray | None = None,
) -> Tensor:
    """(N, 3 side^2) float32 in [0, 1] on the host: the whole central square, antialiased, rows first, RGB last.

    The baseline of every evaluation: what can be told from the pictures without having learned anything.
    """
    store.check_real("evaluation")
    count = store.count if only is None else len(only)
    result, done = torch.empty(count, 3 * side * side), 0
    if count == 0:
        return result
    loader = open_loader(
        store, {VIEW: View(side=side, centre=1.0)}, batch=min(batch, count), backend=backend, device=device,
        workers=workers, shuffle=False, only=only,
    )  # fmt: skip
    with contextlib.closing(loader):
        for each in loader.epoch(0):
            rows = slice(done, done := done + len(each.id))
            result[rows] = each.images[VIEW].flatten(1).cpu().float().div_(255)
    return result
