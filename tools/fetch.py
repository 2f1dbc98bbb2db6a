"""`daae fetch NAME DST`: bring a named data set into a folder of image files, labels and licences beside them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO, Annotated

import tyro

from pipeline.errors import DataError, ResourceError, UsageError
from pipeline.interpreter import python
from pipeline.limits import affinity
from pipeline.staging import is_full, staging, terminable, write_durably
from tools.progress import Progress
from train.command import nearest, parse, run

FETCHED, LICENSES = "fetched.json", "LICENSES.txt"
OFFER = "`daae fetch synthetic DST` (or `make demo DATA=synthetic`) needs no network."

MAX_MEMBER = 64 << 20  # bytes; no picture or table of these data sets comes near it


@dataclass(frozen=True)
class Fetch:
    """Bring a named data set into a folder of image files: emoji, elpv, imagenette or synthetic."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """emoji (npm: 13,629 small colour pictures by four vendors), elpv (PyPI: 2,624 photographs of solar cells),
    imagenette (340 MB: 13,394 photographs, 10 classes), synthetic (drawn here, no network)."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make."""
    count: int = 2000
    """synthetic: training pictures; a fifth as many more go into val."""
    side: int = 160
    """synthetic: mean side in pixels."""
    classes: int = 10
    """synthetic: how many classes."""
    seed: int = 0
    """synthetic: same seed, same pictures."""
    timeout: float = 300.0
    """Seconds that npm or pip may take for one package. Other downloads give up after a minute without a byte."""
    overwrite: bool = False
    """Replace DST if it is a data set fetched earlier."""
    json: bool = False
    """Print one JSON object instead of the sentences."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class Licence:
    part: str
    name: str
    words: str

    def __str__(self) -> str:
        return f"{self.part}: {self.name}. {self.words}"


def main(argv: list[str]) -> int:
    flags = parse(Fetch, argv, prog="daae fetch")
    if flags.name not in DATA_SETS:
        there = ", ".join(DATA_SETS)
        raise UsageError(f"{flags.name} is no data set: there are {there}.{nearest(flags.name, DATA_SETS)}")
    _check_flags(flags)
    make, licences, options = DATA_SETS[flags.name]
    wanted = {"name": flags.name, "options": {name: getattr(flags, name) for name in options}}
    found = _fetched(flags.dst, wanted, overwrite=flags.overwrite)
    if found is None:
        start = time.monotonic()
        with terminable(f"fetching {flags.name}"), staging(flags.dst, replace=flags.overwrite) as folder:
            facts = make(flags, folder)
            _write_licences(folder, licences)
            seconds = round(time.monotonic() - start, 1)
            found = wanted | facts | {"licences": [str(one) for one in licences], "seconds": seconds}
            write_durably(folder / FETCHED, (json.dumps(found, indent=1) + "\n").encode())
        done = "fetched"
    else:
        done = "nothing to do"
    if flags.json:
        print(json.dumps({"dst": str(flags.dst), "done": done, **found}))
        return 0
    parts = ", ".join(f"{number:,} in {name}" for name, number in found["pictures"].items())
    if done == "nothing to do":
        print(f"{flags.dst} already holds {flags.name} ({parts}): nothing to do.")
        return 0
    print(f"Fetched {flags.name} into {flags.dst}: {parts}; {found['seconds']} s.")
    for licence in licences:
        print(f"  {licence}")
    print(f"  Kept in {flags.dst / LICENSES}.")
    return 0


def _check_flags(flags: Fetch) -> None:
    for name, value, low, high in (
        ("count", flags.count, flags.classes, 10**9),
        ("side", flags.side, 16, 8192),
        ("classes", flags.classes, 1, 1000),
        ("seed", flags.seed, 0, 2**63),
        ("timeout", flags.timeout, 1, 1e6),
    ):
        if not low <= value <= high:
            raise UsageError(f"--{name} is from {low:g} to {high:g}, not {value:g}.")


def _fetched(dst: Path, wanted: dict, *, overwrite: bool) -> dict | None:
    """What an earlier fetch wrote at DST if it is what is wanted now; None if there is room for it.

    Raises UsageError where DST is something else.
    """
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return None
    try:
        found = json.loads((dst / FETCHED).read_text())
        there = {key: found[key] for key in wanted}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{dst} exists and was not made by `daae fetch`. Choose another folder.") from None
    if overwrite:
        return None
    if there != wanted:
        raise UsageError(
            f"{dst} holds {_words(there)}, not {_words(wanted)}. Choose another folder, or --overwrite replaces it."
        )
    return found


def _words(what: dict) -> str:
    options = ", ".join(f"{name} {value}" for name, value in what["options"].items())
    return what["name"] + (f" ({options})" if options else "")


def _write_licences(folder: Path, licences: Iterable[Licence]) -> None:
    text = "Licences of the pictures in this folder. Keep this file with them.\n\n"
    text += "\n".join(f"{one.part}\n    {one.name}\n    {one.words}\n" for one in licences)
    write_durably(folder / LICENSES, text.encode())


# ---------------------------------------------------------------------------------------------------------- archives


def unpack(archive: Path, folder: Path, place: Callable[[str], str | None]) -> list[str]:
    """Copy the regular files of a .tar.gz for which `place` gives a name into `folder`; returns these names.

    archive: it is read as a stream and never extracted by its own names.
    place: a member's name -> the relative path to write, or None to leave it out.
    Raises DataError: the archive is cut or damaged, two members want one path, a member is too large.
    """
    names: list[str] = []
    try:
        with gzip.open(archive) as plain, tarfile.open(fileobj=plain, mode="r|") as stream:
            for member in stream:
                # Links, devices and folders are not what we came for, whatever they are called.
                if not member.isreg():
                    continue
                name = place(member.name)
                if name is None:
                    continue
                source = stream.extractfile(member)
                assert source is not None
                _place(source, member.size, folder, name, archive)
                names.append(name)
            # tarfile takes an archive that is cut between two files for a whole one; gzip's checksum does not.
            while plain.read(1 << 20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name} is cut or damaged ({error}). Fetch it again.") from None
    return names


def unzip(archive: Path, folder: Path, place: Callable[[str], str | None]) -> list[str]:
    """`unpack()` for zip files and wheels."""
    names: list[str] = []
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                name = None if member.is_dir() else place(member.filename)
                if name is None:
                    continue
                with opened.open(member) as source:
                    _place(source, member.file_size, folder, name, archive)
                names.append(name)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name} is cut or damaged ({error}). Fetch it again.") from None
    return names


def _place(source: IO[bytes], size: int, folder: Path, name: str, archive: Path) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise DataError(f"{archive.name} holds {name!r}, which would leave the folder. Nothing was kept.")
    if size > MAX_MEMBER:
        raise DataError(f"{archive.name}: {name} has {size:,} bytes, more than {MAX_MEMBER:,}. Nothing was kept.")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(target, "xb") as file:
            shutil.copyfileobj(source, file)
    except FileExistsError:
        raise DataError(f"{archive.name} holds {name} twice. Nothing was kept.") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- emoji

EMOJI = {  # npm package -> (folder of its pictures, where they go)
    "emoji-datasource-google@16.0.0": ("img/google/64", "train/google"),
    "emoji-datasource-twitter@16.0.0": ("img/twitter/64", "train/twitter"),
    "@lobehub/fluent-emoji-3d@1.1.0": ("assets", "fluent"),
    "emoji-datasource-emojione@4.0.4": ("img/emojione/64", "emojione"),
}
EMOJI_TABLE = "emoji-datasource@16.0.0"
EMOJI_LICENCES = (
    Licence(
        "google: Noto Emoji",
        "Apache-2.0",
        "Copyright Google LLC, https://github.com/googlefonts/noto-emoji, "
        "from the npm package emoji-datasource-google.",
    ),
    Licence(
        "twitter: Twemoji",
        "CC-BY-4.0",
        "Copyright Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji, "
        "from the npm package emoji-datasource-twitter. Name the source when you show them.",
    ),
    Licence(
        "fluent: Fluent Emoji, 3D",
        "MIT",
        "Copyright Microsoft Corporation, https://github.com/microsoft/fluentui-emoji, "
        "from the npm package @lobehub/fluent-emoji-3d.",
    ),
    Licence(
        "emojione: EmojiOne artwork",
        "EmojiOne's own free licence, with attribution",
        "EmojiOne 3.1, copyright Ranks.com Inc. (now JoyPixels), https://www.joypixels.com, from the npm package "
        "emoji-datasource-emojione, whose README names the owner but no terms: name EmojiOne when you show them, and "
        "ask its owner before any commercial use.",
    ),
    Licence(
        "labels: emoji.json",
        "MIT",
        "Copyright Cal Henderson, https://github.com/iamcal/emoji-data, from the npm package emoji-datasource.",
    ),
)


def fetch_emoji(flags: Fetch, folder: Path) -> dict:
    digests = {}
    table = _npm_pack(EMOJI_TABLE, folder, flags)
    unpack(table, folder, {"package/emoji.json": "emoji.json"}.get)
    emoji = json.loads((folder / "emoji.json").read_text())
    digests[EMOJI_TABLE] = sha256(table)
    table.unlink()
    names: dict[str, list[str]] = {}
    for package, (source, target) in EMOJI.items():
        archive = _npm_pack(package, folder, flags)
        names.setdefault(target.split("/")[0], []).extend(unpack(archive, folder, _only(f"package/{source}", target)))
        digests[package] = sha256(archive)
        archive.unlink()
    (folder / "emoji.json").unlink()
    counts, labelled = {}, {}
    for part, pictures in names.items():
        rows = [row for vendor in _by_folder(pictures) for row in emoji_labels(vendor, emoji)]
        with open(folder / part / "labels.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "category", "subcategory", "codepoint", "source"])
            writer.writerows((str(PurePosixPath(path).relative_to(part)), *labels) for path, *labels in sorted(rows))
        counts[part], labelled[part] = len(pictures), len(rows)
    return {"versions": list(digests), "sha256": digests, "pictures": counts, "labelled": labelled}


def _npm_pack(package: str, folder: Path, flags: Fetch) -> Path:
    """Download a package's archive with npm, which checks it against the registry's digest. Raises ResourceError."""
    npm = shutil.which("npm")
    if npm is None:
        raise ResourceError(f"emoji comes through npm, which is not installed (Debian: apt install npm). {OFFER}")
    target = folder / ".npm"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    words = [npm, "pack", package, "--pack-destination", str(target), "--ignore-scripts", "--loglevel", "error"]
    # npm's own patience without a network is minutes.
    words += ["--no-update-notifier", "--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
    output = _call(words, f"npm pack {package}", flags, target)
    archives = list(target.glob("*.tgz"))
    if len(archives) != 1:
        raise ResourceError(f"npm pack {package} brought no archive{_tail(output)}. {OFFER}")
    archive = folder / ".package.tgz"
    archives[0].rename(archive)
    shutil.rmtree(target)
    return archive


def _call(words: list[str], what: str, flags: Fetch, cwd: Path) -> str:
    """Run a downloader; returns what it said. Raises ResourceError with one sentence, whatever it died of."""
    if not flags.quiet:
        print(f"{what} ...", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=flags.timeout)
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{what} has not ended after {flags.timeout:.0f} s: no network? {OFFER}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise ResourceError(f"{what} failed{_tail(output)}: no network? {OFFER}")
    return output


def _tail(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "err" in line.lower()] or lines
    return f" ({errors[0][:160]})" if errors else ""


def _only(source: str, target: str) -> Callable[[str], str | None]:
    """Members directly inside the folder `source` -> a file of the same name, in lower case, in `target`."""

    def place(name: str) -> str | None:
        folder, _, file = name.rpartition("/")
        return f"{target}/{file.lower()}" if folder == source and file.lower().endswith((".png", ".webp")) else None

    return place


def _by_folder(paths: Iterable[str]) -> Iterator[list[str]]:
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(str(PurePosixPath(path).parent), []).append(path)
    yield from folders.values()


def emoji_labels(paths: Iterable[str], emoji: Iterable[dict]) -> list[tuple[str, str, str, str, str]]:
    """Rows (path, category, subcategory, codepoint, vendor) for the base emoji among one vendor's pictures.

    paths: in the vendor's folder, named by code points, joined by - or _, with or without leading zeros and variation
    selector.
    emoji: emoji.json's rows. A picture that they do not know, above all a skin-tone variant, gets no row: against its
    own base it would be a neighbour that pixels find. One row per code point: of two files for one emoji the
    file with the fully qualified name has it, the other stays unlabelled.
    """
    emoji, paths = list(emoji), list(paths)
    known = {codepoint(one["non_qualified"]): one for one in emoji if one["non_qualified"]}
    known |= {codepoint(one["unified"]): one for one in emoji}
    rows = {}
    for exact in (True, False):  # the fully qualified name first, then in order of the path
        for path in sorted(paths):
            one = known.get(codepoint(_stem(path)))
            if one is None:
                continue
            unified = one["unified"].lower()
            if (_stem(path) == unified) == exact and unified not in rows:
                vendor = PurePosixPath(path).parent.name
                rows[unified] = (path, one["category"], one["subcategory"], unified, vendor)
    return list(rows.values())


def _stem(path: str) -> str:
    return PurePosixPath(path).stem.lower()


def codepoint(stem: str) -> str:
    """A sequence of code points in one spelling: 23_FE0F_20E3 -> 0023-fe0f-20e3. What is none comes back as it is."""
    try:
        return "-".join(f"{int(part, 16):04x}" for part in stem.replace("_", "-").split("-"))
    except ValueError:
        return stem


# -------------------------------------------------------------------------------------------------------------- elpv

ELPV = "elpv-dataset==1.0.0.post1"
ELPV_LICENCES = (
    Licence(
        "elpv: solar cells in electroluminescence images",
        "CC-BY-NC-SA-4.0",
        "Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021, https://github.com/zae-bayern/elpv-dataset. "
        "Not for commercial use; cite the papers.",
    ),
)


def fetch_elpv(flags: Fetch, folder: Path) -> dict:
    target = folder / ".pip"
    target.mkdir()
    words = python("-m", "pip", "download", ELPV, "--no-deps", "--dest", str(target))
    words += ["--disable-pip-version-check", "--no-input", "--quiet"]
    output = _call(words, f"pip download {ELPV}", flags, target)
    archives = [path for path in target.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    if len(archives) != 1:
        raise ResourceError(f"pip download {ELPV} brought no archive{_tail(output)}. {OFFER}")
    archive = archives[0]

    def place(name: str) -> str | None:
        path = PurePosixPath(name)
        if path.parent.name == "images" and path.suffix == ".png":
            return f"images/{path.name}"
        return "table.txt" if path.parts[-2:] == ("data", "labels.csv") else None

    names = (unzip if archive.suffix == ".whl" else unpack)(archive, folder, place)
    digest = sha256(archive)
    shutil.rmtree(target)
    table = folder / "table.txt"
    if "table.txt" not in names:
        raise DataError(f"{archive.name} holds no labels.csv: another version of {ELPV}?")
    rows = elpv_labels(table.read_text())
    table.unlink()
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("path", "defect", "type"), *rows])
    pictures = sum(name.startswith("images/") for name in names)
    return {"versions": [ELPV], "sha256": {archive.name: digest}, "pictures": {"images": pictures}}


def elpv_labels(table: str) -> list[tuple[str, str, str]]:
    """Rows (path, defect, type) of elpv's table: path, probability and type in columns of blanks.

    The probability is one of 0, 1/3, 2/3, 1 and stays text, cut to two digits: it becomes a class name.
    """
    rows = []
    for line in table.splitlines():
        if line.strip():
            path, probability, kind = line.split()
            rows.append((path, f"{float(probability):.2f}", kind))
    return rows


# -------------------------------------------------------------------------------------------------------- imagenette

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
IMAGENETTE_MD5 = "3df6f0d01a2c9592104656642f5e78a3"  # as torchvision.datasets.Imagenette publishes it
IMAGENETTE_CLASSES = {
    "n01440764": "tench", "n02102040": "english-springer", "n02979186": "cassette-player", "n03000684": "chain-saw",
    "n03028079": "church", "n03394916": "french-horn", "n03417042": "garbage-truck", "n03425413": "gas-pump",
    "n03445777": "golf-ball", "n03888257": "parachute",
}  # fmt: skip
IMAGENETTE_LICENCES = (
    Licence(
        "imagenette: the selection",
        "Apache-2.0",
        "Jeremy Howard, https://github.com/fastai/imagenette, the 320 px version of imagenette2.",
    ),
    Licence(
        "imagenette: the pictures",
        "ImageNet's terms of access",
        "From ImageNet, https://image-net.org/download: for research and teaching that is not commercial.",
    ),
)


def fetch_imagenette(flags: Fetch, folder: Path) -> dict:
    # The part that has arrived outlives this run, hidden beside DST: 340 MB are not asked for twice.
    part = flags.dst.absolute().parent / f".{flags.dst.name}.imagenette2-320.tgz.part"
    download(IMAGENETTE, part, what="imagenette", timeout=min(60.0, flags.timeout), quiet=flags.quiet)
    with open(part, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if md5 != IMAGENETTE_MD5:
        part.unlink()
        raise DataError(f"imagenette arrived damaged (md5 {md5}, published {IMAGENETTE_MD5}). Run it again.")
    names = unpack(part, folder, imagenette_place)
    digest = sha256(part)
    part.unlink()
    counts = Counter(name.split("/")[0] for name in names)
    return {
        "versions": [IMAGENETTE],
        "sha256": {Path(IMAGENETTE).name: digest},
        "pictures": dict(sorted(counts.items())),
    }


def imagenette_place(name: str) -> str | None:
    """imagenette2-320/train/n01440764/x.JPEG -> train/tench/x.JPEG"""
    parts = PurePosixPath(name).parts
    if len(parts) != 4 or parts[1] not in ("train", "val") or not parts[3].upper().endswith(".JPEG"):
        return None
    return f"{parts[1]}/{IMAGENETTE_CLASSES.get(parts[2], parts[2])}/{parts[3]}"


def download(url: str, part: Path, *, what: str, timeout: float, quiet: bool = False) -> None:
    """Fetch a URL into a file, going on where an earlier attempt stopped.

    timeout: seconds without a byte. Raises ResourceError; what has arrived stays for the next attempt.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            # A server that ignores Range starts from the beginning.
            have = have if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
            total = have + int(answer.headers.get("Content-Length") or 0)
            progress = Progress(what, total_bytes=total, quiet=quiet)
            with open(part, "ab" if have else "wb") as file, progress.show():
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    have += len(chunk)
                    progress.at(done_bytes=have)
            if have < total:
                raise ConnectionError("the connection was closed early")
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return  # all of it has arrived already; the digest decides
        raise ResourceError(f"{what} cannot be fetched from {url}: {error}. {OFFER}") from None
    except (OSError, http.client.HTTPException) as error:
        if is_full(error):
            raise
        why = getattr(error, "reason", error)
        kept = f" {have / 1e6:,.0f} MB are kept: the same command goes on from there." if have else ""
        raise ResourceError(f"{what} cannot be fetched ({why}): no network?{kept} {OFFER}") from None


# --------------------------------------------------------------------------------------------------------- synthetic


def fetch_synthetic(flags: Fetch, folder: Path) -> dict:
    # numpy and Pillow only now: --help and a wrong flag answer without them.
    from pipeline.ordered_map import ordered_map
    from tools import synthetic

    drawing = synthetic.Drawing(folder, flags.seed, flags.side, flags.classes)
    validation = max(flags.classes, flags.count // 5)
    indices = [*range(flags.count), *range(synthetic.VALIDATION, synthetic.VALIDATION + validation)]
    tasks = [indices[at : at + 32] for at in range(0, len(indices), 32)]
    progress = Progress("drawing", total_images=len(indices), quiet=flags.quiet)
    written = ordered_map(
        synthetic.write_picture,
        tasks,
        drawing,
        workers=affinity(),
        stall_seconds=flags.timeout,
        describe=lambda index: f"picture {index}",
    )
    done = 0
    with contextlib.closing(written), progress.show():
        for sizes in written:
            done += len(sizes)
            progress.at(images=done)
    return {"versions": ["synthetic 1"], "sha256": {}, "pictures": {"train": flags.count, "val": validation}}


SYNTHETIC_LICENCES = (Licence("synthetic: drawn by this program", "CC0-1.0", "No rights reserved."),)

DATA_SETS: dict[str, tuple[Callable[[Fetch, Path], dict], tuple[Licence, ...], tuple[str, ...]]] = {
    # name -> (what makes it, licences, the flags that decide what it holds)
    "emoji": (fetch_emoji, EMOJI_LICENCES, ()),
    "elpv": (fetch_elpv, ELPV_LICENCES, ()),
    "imagenette": (fetch_imagenette, IMAGENETTE_LICENCES, ()),
    "synthetic": (fetch_synthetic, SYNTHETIC_LICENCES, ("count", "side", "classes", "seed")),
}

if __name__ == "__main__":
    sys.exit(run(main))
