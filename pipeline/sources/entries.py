"""What a source holds, in columns: millions of pictures without a Python object for each.

An entry costs its path and 40 bytes, 16 more once the entries are in the order of the store.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from pipeline.names import printable, unprintable

# Told where a listing stands, before anything is waited for there, and how many pictures it has so far.
Tell = Callable[[bytes | str, int], None]


def nobody(place: bytes | str, images: int) -> None:
    """A Tell that nobody listens to."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a source; `volume` and `at` say where its bytes lie where that is not told by the path."""

    path: bytes  # relative to the source
    size: int
    stamp: int = 0  # time of its last change, in nanoseconds
    volume: int = 0
    at: int = 0


class Entries(Sequence[Entry]):
    """Entries in the order in which they were added, or after `settle_order()` in the order of the store."""

    def __init__(self) -> None:
        self._paths = bytearray()
        self._ends = array("Q", [0])
        self._columns = {name: array("q") for name in ("size", "stamp", "at")}
        self._volume = array("i")
        self._label = array("i")
        self._order: np.ndarray | None = None
        self._keys: np.ndarray | None = None

    def add(self, path: bytes, size: int, *, stamp: int = 0, volume: int = 0, at: int = 0, label: int = -1) -> None:
        """label: a code of the caller's own, -1 where there is none."""
        self._paths += path
        self._ends.append(len(self._paths))
        for name, value in (("size", size), ("stamp", stamp), ("at", at)):
            self._columns[name].append(value)
        self._volume.append(volume)
        self._label.append(label)

    def relabel_last(self, count: int, label: int) -> None:
        """Give the `count` entries that were added last a label."""
        for place in range(len(self._label) - count, len(self._label)):
            self._label[place] = label

    def __len__(self) -> int:
        return len(self._label) if self._order is None else len(self._order)

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> list[Entry]: ...
    def __getitem__(self, place: int | slice) -> Entry | list[Entry]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        row = self._row(place)
        size, stamp, at = (self._columns[name][row] for name in ("size", "stamp", "at"))
        return Entry(self._path(row), size, stamp, self._volume[row], at)

    def __iter__(self) -> Iterator[Entry]:
        return (self[place] for place in range(len(self)))

    def path(self, place: int) -> bytes:
        return self._path(self._row(place))

    def paths(self) -> Iterator[bytes]:
        return (self.path(place) for place in range(len(self)))

    @property
    def sizes(self) -> np.ndarray:
        """(count,) int64, bytes."""
        return self._ordered(np.array(self._columns["size"], np.int64))

    @property
    def labels(self) -> np.ndarray:
        """(count,) int32, as they were added."""
        return self._ordered(np.array(self._label, np.int32))

    def _ordered(self, column: np.ndarray) -> np.ndarray:
        return column if self._order is None else column[self._order]

    def _row(self, place: int) -> int:
        return place if self._order is None else int(self._order[place])

    def _path(self, row: int) -> bytes:
        return bytes(memoryview(self._paths)[self._ends[row] : self._ends[row + 1]])

    def settle_order(self) -> int:
        """Put them in the order of the store. Of several with one path the last stays, as when an archive is unpacked.

        The order is by a hash of the path: neighbours in a shard are unrelated, so a reader that shuffles within a
        window sees mixed classes, and a file that is gone leaves the others where they were.
        Returns how many have gone because a later one has their path.
        """
        count = len(self._label)
        state = bytearray()
        for row in range(count):
            state += hashlib.blake2b(self._path(row), digest_size=16).digest()
        words = np.frombuffer(bytes(state), ">u8").reshape(count, 2)
        high, low = words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
        order = np.lexsort((low, high))  # stable: of equal paths the last added comes last
        high, low = high[order], low[order]
        last = np.ones(count, bool)
        last[:-1] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self._order, self._keys = order[last], high[last]
        return count - int(last.sum())

    def find(self, path: bytes) -> int | None:
        """Where a path stands, once they are in the order of the store."""
        assert self._keys is not None
        key = np.uint64(int.from_bytes(hashlib.blake2b(path, digest_size=16).digest()[:8], "big"))
        place = int(np.searchsorted(self._keys, key))
        while place < len(self) and self._keys[place] == key:
            if self.path(place) == path:
                return place
            place += 1
        return None

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, as `from_arrays()` takes it; needs `settle_order()`."""
        assert self._order is not None
        assert self._keys is not None
        numbers = {name: np.array(column, np.int64) for name, column in self._columns.items()}
        return {
            **numbers,
            "paths": np.frombuffer(bytes(self._paths), np.uint8),
            "ends": np.array(self._ends, np.uint64),
            "volume": np.array(self._volume, np.int32),
            "label": np.array(self._label, np.int32),
            "order": self._order,
            "keys": self._keys,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Entries:
        new = cls()
        new._paths = bytearray(arrays["paths"].tobytes())
        new._ends = array("Q", arrays["ends"].tobytes())
        new._columns = {name: array("q", arrays[name].tobytes()) for name in new._columns}
        new._volume, new._label = (array("i", arrays[name].tobytes()) for name in ("volume", "label"))
        new._order, new._keys = arrays["order"], arrays["keys"]
        return new

    def keep(self, places: np.ndarray) -> None:
        """Leave only these, given in ascending order; needs `settle_order()`."""
        assert self._order is not None
        assert self._keys is not None
        self._order, self._keys = self._order[places], self._keys[places]


@dataclass(frozen=True)
class Labels:
    columns: dict[str, list[str]]  # name -> class names
    table: np.ndarray  # (entries of the listing, columns) int32, -1 where unknown


def no_labels(files: Entries) -> Labels:
    return Labels({}, np.empty((len(files), 0), np.int32))


@dataclass
class Listing:
    """What lies in a source. `files`: what claims to be a picture, in the order of the store."""

    files: Entries = field(default_factory=Entries)
    others: Entries = field(default_factory=Entries)  # regular files that are no pictures; archives leave it empty
    skipped: Counter = field(default_factory=Counter)  # reason -> files or folders
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)  # folders/, archives, items; why
    example: bytes = b""  # a file that is no picture
    labels: Labels = field(default_factory=lambda: no_labels(Entries()))

    def not_an_image(self, path: bytes) -> None:
        self.skipped["not images"] += 1
        if not self.example or path < self.example:
            self.example = path

    def digest(self) -> str:
        """sha256 over path, size and time of every file: another digest means that the source has changed."""
        state = hashlib.sha256()
        for entries in (self.files, self.others):
            for one in entries:
                state.update(b"%d %d %d %s\0" % (len(one.path), one.size, one.stamp, one.path))
            state.update(b"\0")
        return state.hexdigest()

    def looked_at(self) -> str:
        number = len(self.files) + sum(self.skipped.values())
        parts = [f"{count} {reason}" for reason, count in sorted(self.skipped.items(), key=lambda item: -item[1])]
        example = f", e.g. {printable(self.example)}" if self.example else ""
        return f"looked at {number} files" + (f": {', '.join(parts)}{example}" if parts else "")

    def save(self, path: Path) -> None:
        """Write it to an .npz file, so that a source need not be read once more. `others` is empty where that pays."""
        facts = {
            "skipped": self.skipped,
            "unreadable": [[printable(place), why] for place, why in self.unreadable],
            "example": printable(self.example),
            "columns": self.labels.columns,
        }
        text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        arrays: dict[str, Any] = {**self.files.arrays(), "facts": text, "labels": self.labels.table}
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Listing:
        """Raises OSError, ValueError or KeyError where it is not whole."""
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return cls(
                files=Entries.from_arrays(arrays),
                skipped=Counter(facts["skipped"]),
                unreadable=[(unprintable(place), why) for place, why in facts["unreadable"]],
                example=unprintable(facts["example"]),
                labels=Labels(facts["columns"], arrays["labels"]),
            )


class Vocabulary:
    """Texts of one label column as they are met -> small codes; each distinct text is held once."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {"": -1}

    def code(self, text: str) -> int:
        """-1 for an empty text: unknown."""
        return self.codes.setdefault(text, len(self.codes) - 1)

    def settle(self, codes: np.ndarray, *, numbers: bool = False) -> tuple[list[str], np.ndarray]:
        """Class names in their final order and the codes as places in it; a class nobody has is left out.

        numbers: where all are numbers they sort by value, so that 0, 1, …, 9, 10 keep their meaning; else as text.
        """
        used = set(np.unique(codes).tolist())
        texts = [text for text, code in self.codes.items() if code in used and code >= 0]
        by_value = numbers and all(text.isascii() and text.isdigit() for text in texts)
        classes = sorted(texts, key=int if by_value else str)
        table = np.full(len(self.codes), -1, np.int32)  # the last place is the one of code -1
        for place, text in enumerate(classes):
            table[self.codes[text]] = place
        # A byte that is no UTF-8 must not end up in the manifest.
        return [printable(text.encode("utf-8", "surrogateescape")) for text in classes], table[codes]
