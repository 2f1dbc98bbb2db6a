"""The stored JPEG of a sample, by id, from the shards."""

from __future__ import annotations

import io
import mmap

import numpy as np
from PIL import Image

from pipeline.store import Store


class JpegReader:
    """Random access to the shards through memory maps: a sample costs no system call once its pages are cached."""

    def __init__(self, store: Store):
        self.index = store.index
        self.maps: list[mmap.mmap] = []
        for shard in store.shards:
            with open(shard, "rb") as file:
                self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.bytes = [np.frombuffer(one, np.uint8) for one in self.maps]

    def read(self, sample: int) -> np.ndarray:
        """(size,) uint8 view of the JPEG file of one sample; valid until close()."""
        row = self.index[sample]
        start = int(row["offset"])
        return self.bytes[int(row["shard"])][start : start + int(row["size"])]

    def close(self) -> None:
        self.bytes.clear()  # the maps close with the last view of them


def picture(data: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as Pillow decodes a stored JPEG: the reference that every backend is compared with."""
    with Image.open(io.BytesIO(data.tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def damaged(store: Store, reader: JpegReader, ids: np.ndarray) -> str | None:
    """A sentence about the first of these samples that Pillow cannot decode either, or None if it can decode all."""
    for sample in ids.tolist():
        try:
            picture(reader.read(sample))
        except (OSError, SyntaxError, ValueError) as error:
            row = store.index[sample]
            return (
                f"sample {sample} of {store.root} is damaged ({error}; {store.shards[int(row['shard'])].name} "
                f"at byte {int(row['offset']):,}). Convert the images again."
            )
    return None
