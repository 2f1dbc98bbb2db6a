"""Real and generated images as one store to train on: nothing of it is on disk but the two that it is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, UsageError
from pipeline.sampling import mixture_length, mixture_order
from pipeline.store import Store


@dataclass(frozen=True)
class Inflated(Store):
    """The samples of `real` and then those of `artificial`, unlabelled; `real` keeps its ids, so every crop and colour
    of a real image is what it is without the others."""

    real: Store
    artificial: Store
    real_repeat: int  # how many times as often as a generated image a real one is drawn

    @classmethod
    def join(cls, real: Store, path: Path, real_repeat: int) -> Inflated:
        """Raises UsageError: the store at `path` is no generated one; DataError: it was not made from this real one."""
        artificial = Store.open(path)
        if artificial.generated is None:
            raise UsageError(f"the images of {path} were not generated. `daae inflate {real.root} OUT` makes some.")
        if artificial.generated["real"] != real.fingerprint:
            raise DataError(
                f"{path} was generated from another store than {real.root} (fingerprint "
                f"{artificial.generated['real']}, not {real.fingerprint}). Make another by `daae inflate`."
            )
        manifest = real.manifest | {
            "count": real.count + artificial.count,
            "max_height": max(real.max_height, artificial.max_height),
            "max_width": max(real.max_width, artificial.max_width),
        }
        return cls(real.root, manifest, real, artificial, real_repeat)

    @property
    def parts(self) -> tuple[Store, Store]:
        return self.real, self.artificial

    @property
    def per_epoch(self) -> int:
        return mixture_length(self.real.count, self.artificial.count, self.real_repeat)

    @property
    def drawn(self) -> str:
        return " an epoch, with generated ones"

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return mixture_order(seed, epoch, self.real.count, self.artificial.count, self.real_repeat)

    @property
    def real_share(self) -> float:
        """Of the images of a batch, on average."""
        often = self.real_repeat * self.real.count
        return often / (often + self.artificial.count)

    @property
    def generated(self) -> dict | None:
        return self.artificial.generated

    @property
    def shards(self) -> list[Path]:
        return [*self.real.shards, *self.artificial.shards]

    @property
    def beton(self) -> Path | None:
        """Of the real images; each part has its own."""
        return self.real.beton if self.artificial.beton is not None else None

    def owner(self, sample: int) -> tuple[Store, int]:
        count = self.real.count
        return (self.real, sample) if sample < count else (self.artificial, sample - count)

    @cached_property
    def index(self) -> np.ndarray:
        rows = np.concatenate([part.index for part in self.parts])
        rows["shard"][self.real.count :] += len(self.real.shards)
        return rows

    @cached_property
    def labels(self) -> np.ndarray:
        unknown = np.full((self.artificial.count, len(self.columns)), -1, np.int32)
        return np.concatenate([self.real.labels, unknown])

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint for part in self.parts).encode()).hexdigest()[:16]
