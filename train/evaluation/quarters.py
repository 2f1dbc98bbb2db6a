"""What an encoder's patches know of their own place: pictures are scored where four of them share one image.

A mean over all patches forgets where something was seen, and says nothing of tasks that ask about places, such as
segmentation. Here four pictures at half the side are laid out two by two as one image, and the features of each are
the mean of the patches of its own quarter. An encoder whose patches tell of the whole image gives all four the same.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.sampling import View, uniform
from pipeline.store import Store
from pipeline.views import Patches
from train.device import autocast
from train.evaluation.exam import Exam, Protocol
from train.evaluation.features import one_pass
from train.evaluation.featurise import centre_share

if TYPE_CHECKING:
    from model.network import Network
    from train.config import Run

PICTURES = 4  # an image
BATCH = 256  # pictures; whole images


def score_quarters(
    network: Network,
    settings: Run,
    exam: Exam,
    device: torch.device,
    protocols: tuple[Protocol, ...],
    neighbours: tuple[int, ...],
) -> dict:
    """What Exam.sit returns, on the leading column.

    Raises UsageError where half of the side is no multiple of the patch.
    """

    def featurise(store: Store, ids: np.ndarray) -> Tensor:
        return quarter_features(network, settings, store, ids, device)

    return exam.sit(featurise, protocols, [exam.leading], neighbours=neighbours)


def quarter_features(network: Network, settings: Run, store: Store, ids: np.ndarray, device: torch.device) -> Tensor:
    """(n, D) float32 on the host, row i of sample ids[i]. Who shares an image with whom is a function of `ids`."""
    order = np.argsort(uniform(0, 0, "quarters", ids, 1)[:, 0])  # not their own: like stands beside like in a store
    filled = np.resize(order, -(-len(ids) // PICTURES) * PICTURES)  # the last image is filled up with the first ones

    def work(seen: Patches) -> Tensor:
        (tokens,) = network.encoder(side_by_side(seen))
        return quarter_means(tokens[:, 1:].float()).cpu()

    passes = one_pass(
        network, work, store, View(side=settings.model.side // 2, centre=centre_share(settings.model.side)),
        patch=settings.model.patch, device=device, precision_context=autocast(device, settings.precision), batch=BATCH,
        only=ids[filled],
    )  # fmt: skip
    with contextlib.closing(passes) as batches:
        features = torch.cat([torch.empty(0, network.encoder.width), *batches])
    return features[: len(ids)][torch.from_numpy(np.argsort(order))]


def side_by_side(seen: Patches) -> Patches:
    """(4 B, n, P) -> (B, 4 n, P): four consecutive pictures as one image, the first two above the others."""
    # (image, down, across, row, column, P): a row of the whole image runs through two pictures.
    cells = seen.pixels.unflatten(1, (seen.grid, seen.grid)).unflatten(0, (-1, 2, 2))
    return Patches(cells.transpose(2, 3).flatten(1, 4), 2 * seen.grid)


def quarter_means(patches: Tensor) -> Tensor:
    """(B, 4 n, D) -> (4 B, D): the mean of each quarter's patches, in the order of side_by_side."""
    half = round((patches.shape[1] / PICTURES) ** 0.5)
    return patches.unflatten(1, (2, half, 2, half)).mean(dim=(2, 4)).flatten(0, 2)
