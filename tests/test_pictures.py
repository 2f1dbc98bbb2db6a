"""What becomes of each kind of picture file on its way into a store, and the reason where nothing does."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.decoder import clean
from pipeline.errors import UsageError
from pipeline.pictures import Encoding, Rejected, plain_jpeg
from pipeline.sources.entries import Entry
from pipeline.sources.folder import FolderReader
from pipeline.sources.source import try_entry
from pipeline.store import Store
from pipeline.stored import StoredPictures
from tests.conftest import needs_compiler
from tests.images import encoded, picture, pixels, psnr, read_picture
from tools import convert


def keep(tmp_path: Path, data: bytes, **encoding) -> np.ndarray:
    """The pixels that are stored for a file of these bytes."""
    path = tmp_path / "picture"
    path.write_bytes(data)
    result = read_picture(path, Encoding(**encoding))
    decoded = pixels(result.data)
    assert decoded.shape == (result.height, result.width, 3)
    return decoded


def reason(tmp_path: Path, data: bytes, **encoding) -> str:
    with pytest.raises(Rejected) as caught:
        keep(tmp_path, data, **encoding)
    return str(caught.value)


TURNED = {  # EXIF orientation -> how the file holds a picture that is to be seen upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_baked_in_and_gone(tmp_path, kind, orientation):
    upright = picture(1, 90, 60)
    turned = upright.transpose(TURNED[orientation]) if orientation in TURNED else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "picture"
    path.write_bytes(encoded(turned, kind, exif=exif, **options))
    result = read_picture(path, Encoding())
    assert psnr(pixels(result.data), pixels(upright)) > 35
    assert 0x0112 not in Image.open(io.BytesIO(result.data)).getexif()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_exif_block_is_no_fault_of_the_picture(tmp_path, kind):
    # With a resolution of its own: else Pillow looks for one in the block, and forgets that it could not be read.
    data = encoded(picture(1, 90, 60), kind, exif=b"Exif\0\0this is no TIFF header", dpi=(72, 72))
    result = read_picture(write(tmp_path, data), Encoding())
    assert psnr(pixels(result.data), pixels(data)) > 35
    assert result.kept == (kind == "JPEG")


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        grey = keep(tmp_path, encoded(Image.fromarray(ramp), kind))[..., 0]
        assert np.abs(grey - ramp / 257).max() < 4


def test_16_bit_rgb_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 32 * 32).astype(">u2").reshape(32, 32, 1).repeat(3, axis=2)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    colour = keep(tmp_path, png_file(32, 32, zlib.compress(rows), depth=16, colour=2))
    assert np.abs(colour - values.astype(float) / 257).max() < 5


def test_float_and_wide_pictures_are_stretched_and_infinite_ones_refused(tmp_path):
    ramp = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    for scale, shift in ((1, 0), (500, -100)):
        grey = keep(tmp_path, encoded(Image.fromarray(ramp * scale + shift), "TIFF"))[..., 1]
        assert np.abs(grey - ramp * 255).max() < 4
    ramp[3, 3] = np.inf
    assert "not finite" in reason(tmp_path, encoded(Image.fromarray(ramp), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(tmp_path, mode):
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (16, 12, 48, 36))
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":  # a palette whose entry 0 is transparent, though its colour is black
        image = Image.new("P", (64, 48), 0)
        image.putpalette([0, 0, 0, 200, 200, 200])
        image.paste(1, (16, 12, 48, 36))
    data = encoded(image, "PNG", **({"transparency": 0} if mode == "P" else {}))
    colour = keep(tmp_path, data)
    assert colour[:8].min() > 250
    assert np.abs(colour[20:28, 24:40] - 200).max() < 4


def test_half_transparent_colour_is_mixed_with_white(tmp_path):
    colour = keep(tmp_path, encoded(Image.new("RGBA", (32, 32), (255, 0, 0, 128)), "PNG"))
    assert np.abs(colour - np.array([255, 127, 127])).max() < 5


def test_cmyk_is_converted(tmp_path):
    upright = picture(2)
    colour = keep(tmp_path, encoded(upright.convert("CMYK"), "JPEG", quality=95))
    assert psnr(colour, pixels(upright)) > 30


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        colour = keep(tmp_path, encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(colour - np.array([255, 0, 0])).max() < 12


def test_a_large_picture_is_shrunk_with_antialiasing(tmp_path):
    stripes = np.zeros((300, 900, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing: a moiré of black and white
    colour = keep(tmp_path, encoded(Image.fromarray(stripes), "PNG"), max_side=100)
    assert colour.shape == (33, 100, 3)
    assert np.abs(colour - 127.5).max() < 12
    upright = picture(3, 640, 480)
    expected = pixels(upright.resize((500, 375), Image.Resampling.LANCZOS))
    assert psnr(keep(tmp_path, encoded(upright, "PNG")), expected) > 33


def test_small_pictures_keep_their_chroma(tmp_path):
    dots = np.zeros((64, 64, 3), np.uint8)
    dots[:, ::2] = (255, 0, 0)
    dots[:, 1::2] = (0, 0, 255)
    assert np.abs(keep(tmp_path, encoded(Image.fromarray(dots), "PNG")) - dots).mean() < 10
    for width, expected in ((128, 0x11), (129, 0x22)):
        jpeg = read_picture(write(tmp_path, encoded(picture(0, width, 90), "PNG")), Encoding()).data
        frame = jpeg.index(b"\xff\xc0")
        assert jpeg[frame + 11] == expected  # luma samples per chroma sample, across and down


def test_colour_for_each_pixel_is_a_choice(tmp_path):
    dots = np.zeros((160, 200, 3), np.uint8)
    dots[:, ::2] = (255, 0, 0)
    dots[:, 1::2] = (0, 0, 255)
    source = write(tmp_path, encoded(Image.fromarray(dots), "PNG"))
    halved, whole = (read_picture(source, Encoding(chroma=chroma)).data for chroma in ("4:2:0", "4:4:4"))
    errors = [np.abs(pixels(jpeg).astype(int) - dots).mean() for jpeg in (halved, whole)]
    assert errors[0] > 5 * errors[1]
    (tmp_path / "in").mkdir()
    source.rename(tmp_path / "in/a.png")
    words = [str(tmp_path / "in"), str(tmp_path / "store"), "--backends", "dali", "--quiet"]
    assert convert.main([*words, "--chroma", "4:4:4"]) == 0
    store = Store.open(tmp_path / "store")
    with contextlib.closing(StoredPictures.in_shards(store)) as jpegs:
        assert jpegs.read(0).tobytes() == whole
    with pytest.raises(UsageError, match=r"made with other settings \(chroma 4:4:4 -> 4:2:0\)"):
        convert.main(words)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "picture"
    path.write_bytes(data)
    return path


def scan_bytes(jpeg: bytes) -> bytes:
    """The entropy-coded bytes of a JPEG with one scan."""
    start = jpeg.index(b"\xff\xda")
    (length,) = struct.unpack_from(">H", jpeg, start + 2)
    return jpeg[start + 2 + length : jpeg.index(b"\xff\xd9", start)]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_plain_jpeg_keeps_its_own_bytes_and_loses_its_metadata(tmp_path, subsampling):
    exif = Image.Exif()
    exif[0x010E] = "SECRET description"
    source = encoded(
        picture(4, 300, 200), subsampling=subsampling, exif=exif, comment=b"SECRET", icc_profile=b"SECRET" * 9
    )
    result = read_picture(write(tmp_path, source + b"SECRET after the end"), Encoding())
    assert result.kept
    assert scan_bytes(result.data) == scan_bytes(source)
    assert b"SECRET" not in result.data
    assert np.array_equal(pixels(result.data), pixels(source))


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(5), progressive=True),
        encoded(picture(5).convert("L")),
        encoded(picture(5), keep_rgb=True),
        encoded(picture(5, 600, 300)),
    ],
    ids=["progressive", "grey", "RGB components", "too large"],
)
def test_other_jpegs_are_encoded_anew_as_baseline_ycbcr(tmp_path, data):
    result = read_picture(write(tmp_path, data), Encoding())
    assert not result.kept
    assert plain_jpeg(result.data) is not None
    assert max(result.width, result.height) <= 500


def test_a_short_jfif_header_is_left_out_and_the_picture_stays_whole(tmp_path):
    """Cut to its mark and version it could not be filled up to a header of the right length."""
    whole = encoded(picture(4, 60, 40))
    assert whole[2:11] == b"\xff\xe0\x00\x10JFIF\0"
    plain = plain_jpeg(whole[:2] + b"\xff\xe0\x00\x09JFIF\0\1\1" + whole[20:])
    assert plain == whole[:2] + whole[20:]
    assert np.array_equal(pixels(plain), pixels(whole))


@needs_compiler
def test_a_jpeg_that_pillow_alone_forgives_is_encoded_anew(tmp_path):
    """A download that was cut and closed: Pillow fills up with grey and says nothing, our decoder would stop a run."""
    whole = encoded(picture(4, 300, 200))
    cut = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
    assert plain_jpeg(cut) is not None
    assert not clean(plain_jpeg(cut) or b"")
    result = read_picture(write(tmp_path, cut), Encoding())
    assert not result.kept
    assert clean(result.data)


def png_file(width: int, height: int, idat: bytes, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(tmp_path):
    # Were any pixel of it decoded, the reason would be that the data end early.
    why = reason(tmp_path, png_file(30000, 30000, zlib.compress(bytes(1000))))
    assert why == "is 30000 x 30000 pixels, over --max-pixels 100000000: not decoded"
    gif = bytearray(encoded(Image.new("P", (10, 10)), "GIF"))
    frame = gif.index(b"\x2c")  # the frame lies about its size; the screen of the header is small
    gif[frame + 5 : frame + 9] = struct.pack("<HH", 60000, 60000)
    assert "over --max-pixels" in reason(tmp_path, bytes(gif))


def test_files_that_are_no_usable_picture_say_why(tmp_path):
    jpeg, png = encoded(picture(6)), encoded(picture(6), "PNG")
    assert reason(tmp_path, b"") == "is empty (0 bytes)"
    assert "cannot be decoded" in reason(tmp_path, jpeg[: len(jpeg) // 2])
    assert "cannot be decoded" in reason(tmp_path, png[: len(png) // 2])
    assert "header is damaged" in reason(tmp_path, jpeg[:20])
    assert reason(tmp_path, b"%PDF-1.7 ...") == "is no picture but PDF"
    assert reason(tmp_path, b"hello") == "is no picture"
    assert "HEIC" in reason(tmp_path, b"\0\0\0\x18ftypheic" + bytes(40))
    assert "under --min-side 8" in reason(tmp_path, encoded(picture(6, 20, 7), "PNG"))
    assert "too narrow at 500" in reason(tmp_path, encoded(Image.new("RGB", (1000, 9)), "PNG"))
    assert "cannot be read" in reason_of_missing(tmp_path)
    os.mkfifo(tmp_path / "missing")  # in the place of a file since the listing: nobody waits for its writer
    assert reason_of_missing(tmp_path) == "is no regular file"


def reason_of_missing(tmp_path: Path) -> str:
    with pytest.raises(Rejected) as caught:
        read_picture(tmp_path / "missing", Encoding())
    return str(caught.value)


def test_damaged_files_end_as_picture_or_reason_and_never_otherwise(tmp_path):
    draw = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [
        encoded(picture(7, 80, 60), exif=exif),
        encoded(picture(7, 80, 60), progressive=True),
        encoded(picture(7, 80, 60), "PNG"),
        encoded(picture(7, 80, 60).convert("RGBA"), "WEBP"),
        encoded(picture(7, 80, 60).convert("P"), "GIF"),
        encoded(picture(7, 80, 60), "TIFF", compression="tiff_lzw"),
    ]
    outcomes = {True: 0, False: 0}
    for data, _ in itertools.product(good, range(50)):
        damaged = bytearray(data)
        how = draw.integers(4)
        at = int(draw.integers(len(data)))
        if how == 0:
            del damaged[at:]
        elif how == 1:
            damaged[at : at + 8] = draw.bytes(8)
        elif how == 2:
            damaged[at:at] = draw.bytes(int(draw.integers(1, 64)))
        else:
            for spot in draw.integers(0, min(200, len(data)), 3):
                damaged[spot] ^= int(draw.integers(1, 256))
        write(tmp_path, bytes(damaged))
        result = try_entry(
            Entry(b"picture", len(damaged)), (FolderReader(os.fsencode(tmp_path)), Encoding(max_pixels=1e6))
        )
        if isinstance(result, str):
            assert result.isprintable()
        else:
            assert pixels(result.data).shape == (result.height, result.width, 3)
        outcomes[isinstance(result, str)] += 1
    assert min(outcomes.values()) > 50  # the damage is neither always harmless nor always fatal
