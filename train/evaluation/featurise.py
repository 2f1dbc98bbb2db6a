"""From samples of a store to the features that probes take: an encoder's, or raw pixels."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.network import Network
from pipeline.loader import choose_backend
from pipeline.resident_loader import free_bytes
from pipeline.store import Store
from train.config import Run
from train.device import autocast
from train.evaluation.cache import kept, weights_digest
from train.evaluation.exam import Featurise
from train.evaluation.features import encoded, small_pixels

PIXEL_SIDE = 32


def encoder_features(
    network: Network,
    settings: Run,
    device: torch.device,
    feature: str,
    cache: Path | None = None,
    *,
    share: float = 1.0,
) -> Featurise:
    """Features of samples by the network's encoder: in memory, or where there is a `cache` mapped from the disk.

    share: of the side that the encoder was trained at, which the pictures are resized to.
    """
    encoder, centre = network.encoder, centre_share(settings.model.side)
    side = round(share * settings.model.side)
    digest = weights_digest(encoder) if cache is not None else ""

    def featurise(store: Store, ids: np.ndarray) -> Tensor:
        def batches() -> Iterator[Tensor]:
            parts = encoded(
                encoder, store, side=side, centre=centre, device=device, only=ids,
                precision_context=autocast(device, settings.precision),
            )  # fmt: skip
            with contextlib.closing(parts):
                for each in parts:
                    yield getattr(each, feature)

        key = {"weights": digest, "feature": feature, "precision": settings.precision, "centre": centre}
        key |= {"side": side, "decoder": choose_backend(device), **samples_key(store, ids)}
        return at_hand(made(cache, key, (len(ids), encoder.width), batches), device)

    return featurise


def pixel_features(device: torch.device, cache: Path | None = None) -> Featurise:
    def featurise(store: Store, ids: np.ndarray) -> Tensor:
        key = {"feature": "pixels", "side": PIXEL_SIDE, "decoder": choose_backend(device), **samples_key(store, ids)}
        shape = (len(ids), 3 * PIXEL_SIDE**2)
        return at_hand(
            made(cache, key, shape, lambda: small_pixels(store, side=PIXEL_SIDE, device=device, only=ids)), device
        )

    return featurise


def baseline_features(
    start: Network, settings: Run, device: torch.device, feature: str, cache: Path | None = None
) -> dict[str, Featurise]:
    """What needs no training: raw pixels, and the encoder of the network `start`, which `untrained` draws."""
    return {
        "pixels": pixel_features(device, cache),
        "untrained": encoder_features(start, settings, device, feature, cache),
    }


def untrained(settings: Run, device: torch.device) -> Network:
    """The network as the run's seed draws it."""
    return Network(settings.method, settings.model, settings.seed).to(device)


def made(
    cache: Path | None, key: dict[str, Any], shape: tuple[int, int], batches: Callable[[], Iterator[Tensor]]
) -> Tensor:
    """(N, D) float16, of shape `shape`: what `batches` yields, in memory or kept in `cache` under `key`; the same in
    both, and with it any score."""
    if cache is not None:
        return kept(cache, key, shape, batches)
    return torch.cat([torch.empty(0, shape[1], dtype=torch.float16), *(each.half() for each in batches())])


def samples_key(store: Store, ids: np.ndarray) -> dict[str, str]:
    """Which pictures, in which order, as part of a key."""
    return {"store": store.fingerprint, "samples": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]}


def at_hand(features: Tensor, device: torch.device) -> Tensor:
    """On a GPU where they take less than a quarter of what is free there; probes work where features are."""
    if device.type != "cuda" or features.nbytes > free_bytes(device) / 4:
        return features
    return features.to(device)


def centre_share(side: int) -> float:
    """ImageNet's 224 out of 256; small pictures are framed by whoever drew them and are taken whole."""
    return 0.875 if side >= 160 else 1.0
