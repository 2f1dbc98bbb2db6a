"""From a file somebody calls a picture to one that is stored and every decoder reads alike, or a reason why not.

Decoders disagree on orientation tags, 16-bit values, transparency and colour models, and none of the fast ones can
skip a damaged file. So all of that is settled here, once, with Pillow, and the loaders see plain JPEGs or pixels.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.decoder import clean
from pipeline.handles import steadily

# The formats that Pillow may try. Each further one is more parser code that a hostile file can reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .jpx .avif"
    b" .heic .heif".split()
)
MOST_RAW = 1 << 29  # bytes of a picture. FFCV's pages are twice as large, and one of 2 GiB is more than a write takes
ORIENTATION = 0x0112
TURNS = {  # EXIF orientation -> what makes such a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How pictures are checked and stored."""

    max_side: int = 500
    pixels: str = "jpeg"
    """How they are stored: "jpeg", or "raw": 3 bytes each, nothing to decode."""
    quality: int = 90
    """JPEG quality of larger pictures."""
    chroma: str = "4:2:0"
    """Of larger pictures: a sample of colour for 2 x 2 pixels, or one for each ("4:4:4")."""
    small_side: int = 128
    """A picture whose longer side is at most this is stored with small_quality and 4:4:4 chroma: that costs few bytes,
    and a chroma sample per 2 x 2 pixels is a visible loss where the whole picture has 64."""
    small_quality: int = 95
    max_pixels: float = 100e6
    min_side: int = 8

    @property
    def max_bytes(self) -> int:
        """No picture within the limit needs more than 8 bytes a pixel (16-bit RGBA, uncompressed)."""
        return int(8 * self.max_pixels) + (64 << 20)


@dataclass(frozen=True, slots=True)
class Stored:
    """A verified JPEG, 8-bit YCbCr, upright; or RGB pixels, row by row, where `raw`. `kept`: its entropy-coded bytes
    are the source's own."""

    data: bytes
    height: int
    width: int
    kept: bool = False
    raw: bool = False

    def image(self) -> Image.Image:
        """RGB, upright, decoded by Pillow."""
        if self.raw:
            return Image.frombytes("RGB", (self.width, self.height), self.data)
        with Image.open(io.BytesIO(self.data), formats=["JPEG"]) as image:
            return image.convert("RGB")


class Rejected(Exception):
    """The file is no usable picture; the message is the reason, for `bad_files.jsonl`."""


def sniff(head: bytes) -> str | None:
    """The format that the first 32 bytes of a file announce, in lower case, or None.

    Formats with a weak signature (BMP, PPM) or one that camera raw files share (TIFF) are left to the extension.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jpeg2000"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis"):
            return "avif"
        if head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1"):
            return "heic"
    return None


def has_picture_extension(name: bytes) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def check_picture(data: bytes, encoding: Encoding) -> Stored:
    """Check, fully decode and normalise one file.

    In this order: header checked (no pixel is decoded of one larger than max_pixels), decoded, orientation baked, made
    8-bit RGB, shrunk by antialiased (Lanczos) resampling where the longer side exceeds max_side, encoded. 16-bit
    grey is scaled to 8 bits, alpha is laid over white, CMYK converted, an animation gives its first frame.

    A baseline 8-bit YCbCr JPEG that needs none of it keeps its own entropy-coded bytes, where JPEGs are stored: no
    second loss, and the tables and scans are the source's. Only its metadata (EXIF, XMP, thumbnails, comments, bytes
    after the end) is left out.

    Raises Rejected with the reason. Truncated files are refused. Not seen are flipped bits that still decode, and a cut
    JPEG that something has closed with an end marker: decoders show grey there without a word.
    """
    # Pillow's own limit is off (decoder.py). Ours is checked below, before anything is decoded.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _normalise(image, data, encoding)
        except Rejected:
            raise
        except Image.UnidentifiedImageError:
            raise Rejected(_what_is_it(data)) from None
        except MemoryError:
            raise Rejected("too large for the memory of this machine") from None
        # A damaged file makes Pillow's parsers raise almost anything: SyntaxError, struct.error, KeyError, EOFError.
        except Exception as error:
            raise Rejected(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def read_file(path: bytes | str | Path, largest: int) -> bytes:
    """The bytes of a regular file.

    Raises Rejected, without reading it, where it is none, empty or too large; ResourceError where the machine fails.
    """

    def read() -> bytes:
        # Not blocking: a FIFO that took the place of a file since the listing must not stop us.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise Rejected("is no regular file")
            check_size(facts.st_size, largest)
            return file.read()

    try:
        return steadily(path, read)
    except OSError as error:
        raise Rejected(f"cannot be read: {error.strerror}") from None


def check_size(size: int, largest: int) -> None:
    """Raises Rejected for a file that is empty or larger than any picture."""
    if size == 0:
        raise Rejected("is empty (0 bytes)")
    if size > largest:
        raise Rejected(f"is too large a file ({size:,} bytes)")


def _what_is_it(data: bytes) -> str:
    kind = sniff(data[:32])
    if kind == "heic":
        return "is HEIC, which cannot be read here: convert it to JPEG first"
    if kind is not None:
        return f"begins as {kind.upper()} but its header is damaged"
    for signature, name in ((b"%PDF", "PDF"), (b"PK\x03\x04", "a zip archive"), (b"<", "HTML, XML or SVG")):
        if data.lstrip().startswith(signature):
            return f"is no picture but {name}"
    return "is no picture"


def _normalise(image: Image.Image, data: bytes, encoding: Encoding) -> Stored:
    _check_pixels(image, encoding)
    if min(image.size) < encoding.min_side:
        raise Rejected(f"is {image.width} x {image.height} pixels, under --min-side {encoding.min_side}")
    raw, is_jpeg = encoding.pixels == "raw", image.format in ("JPEG", "MPO")
    image.load()
    _check_pixels(image, encoding)  # some formats tell their true size only now
    orientation = _orientation(image)
    if is_jpeg and not raw and orientation in (0, 1) and max(image.size) <= encoding.max_side:
        plain = plain_jpeg(data)
        if plain is not None and clean(plain):
            return Stored(plain, image.height, image.width, kept=True)
    picture = to_rgb(image.transpose(TURNS[orientation]) if orientation in TURNS else image.copy())
    long = max(picture.size)
    if long > encoding.max_side:
        width, height = (max(1, round(side * encoding.max_side / long)) for side in picture.size)
        if min(width, height) < encoding.min_side:
            raise Rejected(f"is {picture.width} x {picture.height} pixels: too narrow at {encoding.max_side} pixels")
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if raw and 3 * picture.width * picture.height > MOST_RAW:
        raise Rejected(f"is {picture.width} x {picture.height} pixels: too many to be stored raw, lower --max-side")
    return Stored(encode(picture, encoding), picture.height, picture.width, raw=raw)


def _orientation(image: Image.Image) -> int:
    """The tag of a decoded picture (Pillow turns some formats itself and drops it); 1 where its EXIF block is damaged.

    That says nothing about the pixels, and other programs show such a picture as it lies.
    """
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # whatever the parsers of Pillow raise
        return 1
    return found if isinstance(found, int) else 1


def _check_pixels(image: Image.Image, encoding: Encoding) -> None:
    if image.width * image.height > encoding.max_pixels:
        raise Rejected(
            f"is {image.width} x {image.height} pixels, over --max-pixels {encoding.max_pixels:.0f}: not decoded"
        )


def encode(picture: Image.Image, encoding: Encoding) -> bytes:
    """An RGB picture as baseline JPEG without metadata, its Huffman tables optimised: fewer bytes to decode; or its
    pixels, row by row, where they are stored raw."""
    if encoding.pixels == "raw":
        return picture.tobytes()
    small = max(picture.size) <= encoding.small_side
    buffer = io.BytesIO()
    # `info` of the source could carry an ICC profile, a comment or a density into the file.
    picture.info = {}
    picture.save(
        buffer,
        "JPEG",
        quality=encoding.small_quality if small else encoding.quality,
        subsampling="4:4:4" if small else encoding.chroma,
        optimize=True,
    )
    return buffer.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as 8-bit RGB. Raises Rejected for values that have no meaning as colour."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 65535)
    if image.mode in ("I", "F"):
        return _grey(_unit(np.asarray(image).astype(np.float64), 65535 if image.mode == "I" else 1))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise Rejected(f"has colour mode {image.mode}, which cannot be converted to RGB") from None


def _unit(values: np.ndarray, full: float) -> np.ndarray:
    """Wide values to 0..1: divided by `full` if they lie in 0..full, else stretched from their minimum to maximum."""
    if not np.isfinite(values).all():
        raise Rejected("holds values that are not finite")
    low, high = values.min(), values.max()
    if low >= 0 and high <= full:
        return values / full
    return (values - low) / (high - low or 1)


def _grey(unit: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8)).convert("RGB")


def plain_jpeg(data: bytes) -> bytes | None:
    """A JPEG file without its metadata, or None if it is not of the plain kind that every decoder takes.

    Plain is: baseline, 8 bits, YCbCr, chroma at full or half resolution. Kept are the tables, the frame, the scans and
    the JFIF and Adobe markers (they tell the colour model); all other application segments, comments and whatever
    follows the end of the image are dropped. The entropy-coded bytes are not touched.
    """
    kept, at, adobe, jfif, plain = [b"\xff\xd8"], 2, None, False, False
    while data[at : at + 2] != b"\xff\xd9":
        if at + 4 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            return None
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            return None
        segment = data[at : at + 2 + length]
        at += 2 + length
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        elif marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 12:
            # The version, density and an empty thumbnail; a thumbnail inside is metadata.
            jfif, segment = True, b"\xff\xe0\x00\x10" + body[:12] + b"\0\0"
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            continue
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker != 0xC0 or not _plain_frame(body):
                return None
            plain = True
        kept.append(segment)
        if marker == 0xDA:
            end = _scan_end(data, at)
            if end is None:
                return None
            kept.append(data[at:end])
            at = end
    if not plain or adobe == 0 or (adobe is None and not jfif and _rgb_ids(kept)):
        return None
    return b"".join([*kept, b"\xff\xd9"])


def _plain_frame(body: bytes) -> bool:
    """Whether a frame header says 8 bits and three components sampled 1x1, 2x1, 1x2 or 2x2 to 1x1."""
    if len(body) != 15 or body[0] != 8 or body[5] != 3:
        return False
    luma, blue, red = body[7], body[10], body[13]
    return luma in (0x11, 0x21, 0x12, 0x22) and blue == red == 0x11


def _rgb_ids(segments: list[bytes]) -> bool:
    frame = next(segment for segment in segments if segment[1] == 0xC0)
    return bytes(frame[at] for at in (10, 13, 16)) == b"RGB"


def _scan_end(data: bytes, at: int) -> int | None:
    """Where the entropy-coded bytes from `at` end: at the next marker that is no restart and no stuffed zero."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            return None
        after = data[at + 1]
        if after == 0xFF:
            at += 1
        elif after == 0 or 0xD0 <= after <= 0xD7:
            at += 2
        else:
            return at
