"""The images of a store that have a label: what a method that learns from labels is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.sampling import epoch_order
from pipeline.store import Store


@dataclass(frozen=True)
class Labelled(Store):
    """A store of which an epoch holds only what has a label in `column`; every image keeps its sample id."""

    column: str

    @classmethod
    def of(cls, store: Store, column: str) -> Store:
        """The store itself where every image has one."""
        known = store.label(column)[0] >= 0
        return store if known.all() else cls(store.root, store.manifest, column)

    @cached_property
    def ids(self) -> np.ndarray:
        """Sample ids with a label, (per_epoch,) int64."""
        return np.flatnonzero(self.label(self.column)[0] >= 0)

    @property
    def per_epoch(self) -> int:
        return len(self.ids)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return self.ids[epoch_order(seed, epoch, len(self.ids))]

    @property
    def drawn(self) -> str:
        return f" with a label in column {self.column}"
