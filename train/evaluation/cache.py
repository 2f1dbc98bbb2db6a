"""Features kept on the disk: RUN/cache/KEY/features.npy, float16, mapped into memory when they are read.

What they depend on is their key: the encoder's weights, the samples and their store, side and crop, which feature, the
precision, who decoded. So they are never stale, only unused; the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.staging import staging

FEATURES, KEY = "features.npy", "key.json"


def kept(folder: Path, key: dict[str, Any], shape: tuple[int, int], batches: Callable[[], Iterator[Tensor]]) -> Tensor:
    """(N, D) float16: what `folder` holds under this key, or else what `batches` yields, kept there first.

    shape: N and D. Of what is made now only one batch is in memory. What is half-written, or has another shape, is made
    anew. Raises ResourceError on a full disk, UsageError where another process is writing the same.
    """
    if not shape[0]:
        return torch.empty(shape, dtype=torch.float16)
    place = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    found = _mapped(place / FEATURES, shape)
    if found is None:
        with staging(place, replace=True) as made:
            _write(made / FEATURES, shape, batches())
            (made / KEY).write_text(json.dumps(key, indent=1))
        found = _mapped(place / FEATURES, shape)
    assert found is not None
    return found


def _mapped(path: Path, shape: tuple[int, int]) -> Tensor | None:
    with contextlib.suppress(OSError, ValueError, EOFError):
        features = np.load(path, mmap_mode="c")  # torch takes no array that must not be written
        if features.shape == shape and features.dtype == np.float16:
            return torch.from_numpy(features)
    return None


def _write(path: Path, shape: tuple[int, int], batches: Iterator[Tensor]) -> None:
    """By plain writes: a full disk is an error there, and kills the process where a mapped file grows."""
    rows = 0
    with open(path, "wb") as file:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            file.write(batch.half().contiguous().numpy().tobytes())
            rows += len(batch)
    assert rows == shape[0]


def weights_digest(module: nn.Module) -> str:
    """Short name of exactly these weights: 16 hex digits over names and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
