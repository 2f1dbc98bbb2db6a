"""One ordered pass over a store: what an encoder makes of each image, and the raw pixels that it has to beat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model.vit import Encoder, patch_mean
from pipeline.loader import Backend, open_loader
from pipeline.sampling import View
from pipeline.store import Store
from pipeline.views import Patches, check_views, make_views

VIEW = "eval"


@dataclass(frozen=True, slots=True)
class Features:
    """Of a batch of samples, a row each. float32, on the host."""

    patch_mean: Tensor  # (B, D): mean of the patch tokens after the final norm, class token left out
    cls: Tensor  # (B, D): class token after the final norm


def encoded(
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
    only: np.ndarray | None = None,
) -> Generator[Features]:
    """Features batch by batch, in the order of the samples, by an encoder on `device`, left as it was.

    side: pixels that a picture is resized to. centre: the central square of this share of the shorter side; .875 is
    ImageNet's 224 out of 256. precision_context: such as train.device.autocast gives. only: ids of the samples, in the
    order asked for; all by default. Close it where it is not exhausted.

    Raises UsageError (generated images, side is no multiple of the patch) and whatever open_loader and the loader
    raise.
    """
    store.check_real("evaluation")

    def features(seen: Patches) -> Features:
        (tokens,) = encoder(seen)
        tokens = tokens.float()
        return Features(patch_mean(tokens).cpu(), tokens[:, 0].cpu())

    yield from one_pass(
        encoder, features, store, View(side=side, centre=centre), patch=encoder.patch, device=device,
        precision_context=precision_context, backend=backend, batch=batch, workers=workers, only=only,
    )  # fmt: skip


T = TypeVar("T")


def one_pass(
    module: nn.Module,
    work: Callable[[Patches], T],
    store: Store,
    view: View,
    *,
    patch: int,
    device: torch.device | str = "cpu",
    precision_context: AbstractContextManager | None = None,
    backend: Backend = "auto",
    batch: int = 256,
    workers: int = 0,
    only: np.ndarray | None = None,
) -> Generator[T]:
    """What `work` makes of each batch of samples in order, `module` being evaluated and left as it was. Close it where
    it is not exhausted. Arguments as of `encoded`."""
    views = {VIEW: view}
    check_views(views, patch)
    count = store.count if only is None else len(only)
    if count == 0:
        return
    loader = open_loader(
        store, views, batch=min(batch, count), backend=backend, device=device, workers=workers, shuffle=False,
        only=only,
    )  # fmt: skip
    precision = precision_context or contextlib.nullcontext()
    with contextlib.closing(loader), _evaluating(module):
        for each in loader.epoch(0):
            # Around the work alone: whoever takes the result has a grad mode and an autocast of its own. And not
            # inference_mode: the position code that the encoder keeps would be a tensor that autograd may not save.
            with torch.no_grad(), precision:
                made = work(make_views(each, views, patch=patch, seed=0)[VIEW])
            yield made


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


def small_pixels(
    store: Store,
    *,
    side: int,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
    batch: int = 256,
    workers: int = 0,
    only: np.ndarray | None = None,
) -> Generator[Tensor]:
    """(B, 3 side^2) float32 in [0, 1] on the host, batch by batch: the whole central square, antialiased, rows first,
    RGB last. Close it where it is not exhausted.

    The baseline of every evaluation: what can be told from the pictures without having learned anything.
    """
    store.check_real("evaluation")
    count = store.count if only is None else len(only)
    if count == 0:
        return
    loader = open_loader(
        store, {VIEW: View(side=side, centre=1.0)}, batch=min(batch, count), backend=backend, device=device,
        workers=workers, shuffle=False, only=only,
    )  # fmt: skip
    with contextlib.closing(loader):
        for each in loader.epoch(0):
            yield each.images[VIEW].flatten(1).cpu().float().div_(255)
