"""Where the pictures lie in an FFCV file. The layout is FFCV 1.0's, version 2: header, fields, samples, pages, table.

Read with numpy alone: importing FFCV starts numba and sets torch to one thread, for a column of numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.errors import DataError

VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("count", "<u8"), ("table", "<u8")])
FIELD_BYTES = 1041  # a field's type, name and arguments
# What our writer asks for, image and label: mode, width, height and data_ptr of the image, then the label, aligned.
SAMPLE = np.dtype({"names": ["data_ptr"], "formats": ["<u8"], "offsets": [5], "itemsize": 24})


def picture_offsets(path: Path, count: int) -> np.ndarray:
    """(count,) uint64: the byte of the file at which each sample's bytes begin.

    Raises DataError: never finished (FFCV writes the table's place last), cut short, or of another make.
    """
    size = path.stat().st_size
    header = np.fromfile(path, HEADER, count=1)
    if len(header) == 0 or int(header["version"][0]) != VERSION or int(header["fields"][0]) != 2:
        raise DataError(f"{path} is no FFCV file of this program. Convert the images again.")
    table = int(header["table"][0])
    if not 0 < table < size:
        raise DataError(f"{path} is incomplete: its table is at byte {table:,} of {size:,}. Convert the images again.")
    if int(header["count"][0]) != count:
        raise DataError(f"{path} holds {int(header['count'][0]):,} pictures, not {count:,}. Convert the images again.")
    rows = np.fromfile(path, SAMPLE, count=count, offset=HEADER.itemsize + 2 * FIELD_BYTES)
    if len(rows) < count:
        raise DataError(f"{path} ends after {len(rows):,} of {count:,} rows. Convert the images again.")
    return np.ascontiguousarray(rows["data_ptr"])
