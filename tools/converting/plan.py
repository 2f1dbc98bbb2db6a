"""`daae convert --plan`: what a conversion would give, from a sample of the source."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.decoder import SAMPLE, open_decoder
from pipeline.errors import DataError
from pipeline.limits import usable_cores
from pipeline.pictures import Encoding, Rejected, Stored, check_picture
from pipeline.sampling import View, epoch_order, geometry
from pipeline.shards import MAX_SIDE
from pipeline.sources.entries import Entry, Tell
from pipeline.sources.source import Reader
from pipeline.staging import size_in_words
from tools.converting.conversion import source_of
from tools.converting.decoding import encoding_of
from tools.converting.flags import Convert
from tools.converting.watchdog import Watchdog

SAMPLED = 200
ROUNDS = 5  # of loading, the choices taking turns
CROP = View(side=224)
LOOKED_AT = 64  # pictures whose detail is compared
HELD_BYTES = 1 << 30  # of raw pictures
AREAS = (0.2, 1.0)  # share of the picture that a crop covers: the tightest of most recipes, and all of it
TAR_BYTES = 2048  # headers, padding and the label of a picture in a shard


def plan(flags: Convert) -> dict:
    """What `--json` prints. Raises DataError, ResourceError, StalledError, UsageError.

    A source that can only be streamed is read as a whole, its pictures in a folder for the moment beside DST: nothing
    else tells how many it holds.
    """
    watchdog = Watchdog(flags.stall_timeout, quiet=flags.quiet)
    source = watchdog.do("looking at the source", lambda: source_of(flags, watchdog.tell))
    beside = flags.dst.absolute().parent if flags.dst is not None and flags.dst.absolute().parent.is_dir() else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=".daae-plan-") as place:
        spool = Path(place) / "spool"
        listing = watchdog.do("listing", lambda: source.listing(spool))
        if not listing.files:
            raise DataError(f"{flags.src} has no images ({listing.looked_at()}).")
        # The order of the store is by a hash, but a sample of its own leaves nobody to guess what it holds.
        looked_at = SAMPLED if flags.pixels == "jpeg" else min(SAMPLED, max(16, HELD_BYTES // (3 * flags.max_side**2)))
        sample = [listing.files[int(at)] for at in epoch_order(0, 0, len(listing.files))[:looked_at]]
        if not flags.quiet:
            print(f"looking at {len(sample)} pictures …", file=sys.stderr)
        made = watchdog.do(
            "reading",
            lambda: [_Made(encoding, source.reader(spool), sample, watchdog.tell) for encoding in choices(flags)],
        )
        whole = watchdog.do("reading", lambda: as_they_were(flags, source.reader(spool), sample, watchdog.tell))
    if not any(each.good for each in made):
        raise DataError(f"{flags.src}: none of {len(sample)} pictures looked at is readable, {made[0].reason}.")
    cores = usable_cores()
    workers = min(flags.workers or cores, cores)
    scale = len(listing.files) / len(sample)
    copies = 2 if flags.backends == "both" else 1
    loads = load_seconds([each.good for each in made])
    return {
        "source": flags.src,
        "kind": source.kind,
        "images": len(listing.files),
        "source_bytes": int(listing.files.sizes.sum()),
        "sampled": len(sample),
        "bad": len(sample) - len(made[0].good),
        "cores": cores,
        "choices": [
            {
                "max_side": one.encoding.max_side if one.encoding.max_side < MAX_SIDE else None,
                "pixels": one.encoding.pixels,
                "quality": one.encoding.quality,
                "chroma": one.encoding.chroma,
                "bytes": round(
                    len(one.good) * scale * (copies * one.mean_bytes + (flags.backends != "ffcv") * TAR_BYTES)
                ),
                # Only the first read of a file is one from the disk.
                "seconds": round(max(one.seconds / workers, made[0].read_seconds) * scale, 1),
                # A choice may reject what another one keeps: a strip is too narrow once it is shrunk.
                "bad": len(sample) - len(one.good),
                "load_images_per_second": None if load is None else round(cores / load),
                "kept": None if not one.good else round(one.kept / len(one.good), 3),
                "psnr": {f"{area:g}": psnr(one.stored, whole, area) for area in AREAS},
            }
            for one, load in zip(made, loads, strict=True)
        ],
    }


def choices(flags: Convert) -> list[Encoding]:
    """JPEGs of sides as they are, of the default and of a smaller one; and what the flags say, if none of these."""
    asked = encoding_of(flags)
    plain = dataclasses.replace(asked, pixels=Encoding.pixels, chroma=Encoding.chroma)
    usual = [dataclasses.replace(plain, max_side=side, quality=q) for side, q in ((MAX_SIDE, 90), (500, 90), (400, 85))]
    return usual if asked in usual else [*usual, asked]


class _Made:
    """The sample as one choice would store it."""

    def __init__(self, encoding: Encoding, reader: Reader, sample: list[Entry], tell: Tell) -> None:
        self.encoding = encoding
        self.stored: list[Stored | None] = []  # as long as the sample; None where this choice rejects a picture
        self.reason = ""
        self.read_seconds = 0.0  # by the clock: a disk or a network may be slower than the decoder
        began = time.process_time()
        for entry in sample:
            tell(entry.path, len(self.stored))
            stored = None
            try:
                asked = time.perf_counter()
                data = reader.read(entry, encoding.max_bytes)
                self.read_seconds += time.perf_counter() - asked
                stored = check_picture(data, encoding)
            except Rejected as reason:
                self.reason = f"e.g. {reason}"
            self.stored.append(stored)
        self.seconds = time.process_time() - began  # of a core: what else runs here does not count

    @property
    def good(self) -> list[Stored]:
        return [one for one in self.stored if one is not None]

    @property
    def mean_bytes(self) -> float:
        return sum(len(one.data) for one in self.good) / max(1, len(self.good))

    @property
    def kept(self) -> int:
        return sum(one.kept for one in self.good)


def load_seconds(made: list[list[Stored]]) -> list[float | None]:
    """Core seconds to decode one random 224 px crop of a picture of each choice; the median of interleaved rounds.

    None for a choice that has no picture.
    """
    times: list[list[float]] = [[] for _ in made]
    decoder = open_decoder(1)
    try:
        for epoch in range(ROUNDS):
            for at, stored in enumerate(made):
                count = len(stored)
                if not count:
                    continue
                samples = np.zeros(count, SAMPLE)
                held = [np.frombuffer(one.data, np.uint8) for one in stored]
                samples["data"] = [data.ctypes.data for data in held]
                samples["size"] = [len(data) for data in held]
                samples["raw"] = [one.raw for one in stored]
                samples["file"] = -1
                samples["height"], samples["width"] = zip(*((one.height, one.width) for one in stored), strict=True)
                sizes = np.stack([samples["height"], samples["width"]], axis=1)
                where = geometry(CROP, "plan", 0, epoch, np.arange(count), sizes)
                out = np.empty((count, CROP.side, CROP.side, 3), np.uint8)
                began = time.process_time()
                decoder.decode(samples, [where], [out])
                times[at].append((time.process_time() - began) / count)
    finally:
        decoder.close()
    return [max(statistics.median(each), 1e-9) if each else None for each in times]


Crops = dict[float, np.ndarray]  # of one picture, by the share of it that they cover


def as_they_were(flags: Convert, reader: Reader, sample: list[Entry], tell: Tell) -> list[Crops | None]:
    """Central crops of the first pictures of the sample before anything is lost; None of one that is no picture."""
    plain = dataclasses.replace(encoding_of(flags), max_side=MAX_SIDE, pixels="raw")
    found: list[Crops | None] = []
    for entry in sample[:LOOKED_AT]:
        tell(entry.path, len(found))
        crops = None
        with contextlib.suppress(Rejected):
            image = check_picture(reader.read(entry, plain.max_bytes), plain).image()
            crops = {area: _central(image, math.sqrt(area)) for area in AREAS}
        found.append(crops)
    return found


def psnr(stored: list[Stored | None], whole: list[Crops | None], area: float) -> float | None:
    """Decibels between a central 224 px crop of a picture as it is stored and the same crop of the picture as it was.

    stored, whole: of the same pictures, None where one is rejected. area: share of the picture that the crop covers.
    The median over what is there twice and not the same; None where nothing is.
    """
    found = []
    for one, crops in zip(stored, whole, strict=False):
        if one is None or crops is None:
            continue
        difference = _central(one.image(), math.sqrt(area)).astype(float) - crops[area]
        error = float(np.square(difference).mean())
        found += [10 * math.log10(255**2 / error)] if error else []
    return round(statistics.median(found), 1) if found else None


def _central(image: Image.Image, share: float) -> np.ndarray:
    """(224, 224, 3) uint8: the central part of `share` of each side, by Pillow's antialiased bilinear filter."""
    wide, high = image.size
    left, top = wide * (1 - share) / 2, high * (1 - share) / 2
    box = (left, top, wide - left, high - top)
    return np.asarray(image.resize((CROP.side, CROP.side), Image.Resampling.BILINEAR, box=box))


def table(flags: Convert, planned: dict) -> str:
    bad = f"{planned['bad']} of them bad" if planned["bad"] else "none bad"
    lines = [
        f"{flags.src}: {planned['images']:,} images, {size_in_words(planned['source_bytes'])} ({planned['kind']}); "
        f"{planned['sampled']} looked at, {bad}; {planned['cores']:g} cores.",
        f"{'':30}{'store':>12}{'conversion':>14}{'one 224 px crop':>22}{'bytes kept':>12}{'others, dB':>14}",
    ]
    for one in planned["choices"]:
        names = ("max_side", "pixels", "quality", "chroma")
        asked = all(one[name] == getattr(flags, name) for name in names)
        name = "sides as they are" if one["max_side"] is None else f"--max-side {one['max_side']}"
        how = "raw" if one["pixels"] == "raw" else f"q{one['quality']}"
        how += "" if one["chroma"] == Encoding.chroma else f" {one['chroma']}"
        name = f"{name + (' *' if asked else ''):<20}{how:<10}"
        if one["load_images_per_second"] is None:
            lines.append(f"{name}{'none left':>12}")
            continue
        lines.append(
            f"{name}{size_in_words(one['bytes']):>12}"
            f"{_time(one['seconds']):>14}{one['load_images_per_second']:>13,} images/s{one['kept']:>12.0%}"
            f"{_decibels(one['psnr']):>14}"
        )
    lines.append("* is what these flags ask for. Decoding on all cores, without disk and training step.")
    lines.append(
        "Others: those whose bytes are not kept; PSNR of 224 px crops of a fifth / of all of such a picture to the "
        "same of the picture as it was."
    )
    return "\n".join(lines)


def _decibels(by_area: dict[str, float | None]) -> str:
    values = list(by_area.values())
    return "" if None in values else " / ".join(f"{value:.0f}" for value in values)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
