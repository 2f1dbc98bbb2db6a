"""Labels of ImageNet's validation pictures: the archive has none, the development kit tells them by number."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, ResourceError
from pipeline.handles import check_machine
from pipeline.names import printable
from pipeline.sources.entries import Labels, Listing, Vocabulary

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
PICTURE = re.compile(rb"(?:.*/)?ILSVRC2012_val_([0-9]{8})\.JPEG", re.DOTALL)


def is_validation(listing: Listing) -> bool:
    return len(listing.files) > 0 and all(PICTURE.fullmatch(path) for path in listing.files.paths())


def validation_labels(listing: Listing, devkit: Path) -> Labels:
    """One column `class`, the WordNet ids, which sort as the folders of the training archive do.

    The development kit's line n is the ILSVRC2012_ID (1..1000) of picture n, and its meta.mat tells which synset that
    is: neither the order of the ids nor of any list of names.
    Raises DataError: the kit is missing or not what it should be; ResourceError: SciPy is missing.
    """
    wnids, truth = read_devkit(devkit)
    words, codes = Vocabulary(), np.full(len(listing.files), -1, np.int32)
    for place, path in enumerate(listing.files.paths()):
        found = PICTURE.fullmatch(path)
        if found is None:
            continue
        number = int(found[1])
        if not 1 <= number <= len(truth):
            raise DataError(f"{devkit} tells the labels of {len(truth):,} pictures, none for {printable(path)}.")
        codes[place] = words.code(wnids[truth[number - 1]])
    classes, column = words.settle(codes)
    return Labels({"class": classes}, column[:, None])


def read_devkit(devkit: Path) -> tuple[dict[int, str], list[int]]:
    """ILSVRC2012_ID -> WordNet id of the 1000 classes, and the id of each validation picture, in order."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ResourceError(f"reading {devkit} needs SciPy, which is not installed. Run `pip install scipy`.") from None
    wanted = {"data/meta.mat": b"", "data/ILSVRC2012_validation_ground_truth.txt": b""}
    try:
        with tarfile.open(devkit, "r|*") as archive:
            for member in archive:
                for end in wanted:
                    if member.isreg() and member.name.endswith(end) and (file := archive.extractfile(member)):
                        wanted[end] = file.read(64 << 20)
        meta, text = wanted.values()
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Inner nodes of WordNet's tree have numbers above 1000 and no pictures of their own.
        leaves = synsets[synsets["num_children"] == 0]
        wnids = dict(zip(map(int, leaves["ILSVRC2012_ID"]), map(str, leaves["WNID"]), strict=True))
        truth = [int(line) for line in text.split()]
        if not truth or not set(truth) <= set(wnids):
            raise ValueError("its ground truth names classes that meta.mat lacks")
    except FileNotFoundError:
        raise DataError(f"{devkit} does not exist.") from None
    # SciPy raises almost anything over a file that is no MATLAB file.
    except Exception as error:
        check_machine(devkit, error)
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{devkit} is not ImageNet's development kit ({why}).") from None
    return wnids, truth
