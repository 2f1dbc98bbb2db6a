"""`daae fetch`, without a network: archives built here, npm and pip told where to look, a server on this machine."""

from __future__ import annotations

import csv
import hashlib
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError, ResourceError
from tests.images import encoded, picture, pixels
from tools import fetch, synthetic
from train.command import run


def daae_fetch(*words: object) -> int:
    return run(fetch.main, [*map(str, words), "--quiet"])


def fails(capsys, code: int, *words: object) -> str:
    assert daae_fetch(*words) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def tgz(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for member in others:
            archive.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


# ---------------------------------------------------------------------------------------------------------- archives


def test_only_regular_files_that_are_asked_for_leave_an_archive(tmp_path):
    archive = tgz(
        tmp_path / "a.tgz",
        {
            "package/img/A.PNG": b"one",
            "package/img/sub/b.png": b"x",
            "package/img/c.txt": b"x",
            "/package/img/d.png": b"x",
        },
        special("package/img/link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("package/img/hard.png", tarfile.LNKTYPE, "package/img/A.PNG"),
        special("package/img/device.png", tarfile.CHRTYPE),
        special("package/img/pipe.png", tarfile.FIFOTYPE),
        special("package/img/folder.png", tarfile.DIRTYPE),
    )
    out = tmp_path / "out"
    assert fetch.unpack(archive, out, fetch._only("package/img", "train")) == ["train/a.png"]
    assert below(out) == {"train/a.png"}
    assert (out / "train/a.png").read_bytes() == b"one"


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "", "a\0b"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    archive = tgz(tmp_path / "in/a.tgz", {"member": b"x"})
    with pytest.raises(DataError, match="would leave the folder"):
        fetch.unpack(archive, tmp_path / "in/out", lambda _: name)
    assert below(tmp_path) == {"in/a.tgz"}


def test_cut_doubled_and_oversized_archives_are_refused(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).bytes(200_000)
    whole = tgz(tmp_path / "whole.tgz", {"a": noise, "b": noise}).read_bytes()
    for at in (0, 5, len(whole) // 3, len(whole) - 20):
        cut = tmp_path / "cut.tgz"
        cut.write_bytes(whole[:at])
        with pytest.raises(DataError, match=r"cut\.tgz is cut or damaged"):
            fetch.unpack(cut, tmp_path / f"out{at}", lambda name: name)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "flipped.tgz").write_bytes(flipped)
    with pytest.raises(DataError, match="cut or damaged"):
        fetch.unpack(tmp_path / "flipped.tgz", tmp_path / "flipped", lambda name: name)
    with pytest.raises(DataError, match="holds same twice"):
        fetch.unpack(tmp_path / "whole.tgz", tmp_path / "same", lambda name: "same")
    monkeypatch.setattr(fetch, "MAX_MEMBER", 1000)
    with pytest.raises(DataError, match="a has 200,000 bytes, more than 1,000"):
        fetch.unpack(tmp_path / "whole.tgz", tmp_path / "large", lambda name: name)


# ------------------------------------------------------------------------------------------------------------- emoji

EMOJI = [
    {"unified": "0023-FE0F-20E3", "non_qualified": "0023-20E3", "category": "Symbols", "subcategory": "keycap"},
    {"unified": "1F600", "non_qualified": None, "category": "Smileys", "subcategory": "face"},
    {"unified": "00A9-FE0F", "non_qualified": "00A9", "category": "Symbols", "subcategory": "other"},
]


def test_emoji_are_matched_in_every_spelling_and_once_per_vendor():
    paths = [
        "v/1f600.png",  # exact
        "v/1f600-1f3fb.png",  # a skin tone: unknown to the table
        "v/23_fe0f_20e3.png",  # underscores, no leading zeros
        "v/0023-fe0f-20e3.png",  # ... and the same emoji by its full name, which wins
        "v/a9.png",  # without the variation selector
        "v/not-an-emoji.png",
    ]
    assert sorted(fetch.emoji_labels(paths, EMOJI)) == [
        ("v/0023-fe0f-20e3.png", "Symbols", "keycap", "0023-fe0f-20e3", "v"),
        ("v/1f600.png", "Smileys", "face", "1f600", "v"),
        ("v/a9.png", "Symbols", "other", "00a9-fe0f", "v"),
    ]


NPM = """#!/bin/sh
# A registry on the disk: `npm pack NAME@VERSION --pack-destination DIR ...` copies what lies in $PACKAGES.
cp "$PACKAGES/$(echo "$2" | tr -d @/).tgz" "$4/"
"""


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Put a script in npm's place."""

    def install(script: str) -> None:
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return install


def test_emoji_from_packages_to_a_folder_with_labels_and_licences(tmp_path, npm, monkeypatch, capsys):
    packages = tmp_path / "packages"
    small = encoded(picture(0, 16, 16), "PNG")
    for package, (source, _) in fetch.EMOJI.items():
        kind = "webp" if "fluent" in package else "png"
        files = {f"package/{source}/{stem}.{kind}": small for stem in ("1F600", "1f600-1f3fb", "0023-fe0f-20e3")}
        tgz(packages / (package.replace("@", "").replace("/", "") + ".tgz"), files | {"package/README.md": b"x"})
    table = {"package/emoji.json": json.dumps(EMOJI).encode()}
    tgz(packages / (fetch.EMOJI_TABLE.replace("@", "") + ".tgz"), table)
    monkeypatch.setenv("PACKAGES", str(packages))
    npm(NPM)
    out = tmp_path / "emoji"
    assert daae_fetch("emoji", out) == 0
    stems = ("1f600", "1f600-1f3fb", "0023-fe0f-20e3")
    assert below(out) == {
        *(f"train/{vendor}/{stem}.png" for vendor in ("google", "twitter") for stem in stems),
        *(f"fluent/{stem}.webp" for stem in stems),
        *(f"emojione/{stem}.png" for stem in stems),
        "train/labels.csv", "fluent/labels.csv", "emojione/labels.csv", "LICENSES.txt", "fetched.json",
    }  # fmt: skip
    with open(out / "train/labels.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "category", "subcategory", "codepoint", "source"],
            ["google/0023-fe0f-20e3.png", "Symbols", "keycap", "0023-fe0f-20e3", "google"],
            ["google/1f600.png", "Smileys", "face", "1f600", "google"],
            ["twitter/0023-fe0f-20e3.png", "Symbols", "keycap", "0023-fe0f-20e3", "twitter"],
            ["twitter/1f600.png", "Smileys", "face", "1f600", "twitter"],
        ]
    said = capsys.readouterr().out
    for licence in ("Apache-2.0", "CC-BY-4.0", "MIT", "EmojiOne's own"):
        assert licence in said
        assert licence in (out / "LICENSES.txt").read_text()
    facts = json.loads((out / "fetched.json").read_text())
    assert facts["pictures"] == {"train": 6, "fluent": 3, "emojione": 3}
    assert facts["labelled"] == {"train": 4, "fluent": 2, "emojione": 2}
    assert len(facts["sha256"]) == 5
    npm("#!/bin/sh\nexit 1")  # the second time nobody is asked
    assert daae_fetch("emoji", out) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_without_npm_one_sentence_offers_the_other_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = fails(capsys, 5, "emoji", tmp_path / "out")
    assert "npm, which is not installed" in said
    assert "DATA=synthetic" in said
    assert below(tmp_path) == set()


def test_npm_that_fails_or_hangs_ends_in_one_sentence(tmp_path, npm, capsys):
    npm("#!/bin/sh\necho npm error code ENOTFOUND >&2\nexit 1\n")
    said = fails(capsys, 5, "emoji", tmp_path / "out")
    assert "npm pack emoji-datasource@16.0.0 failed (npm error code ENOTFOUND): no network?" in said
    npm("#!/bin/sh\nsleep 60 & wait\n")
    start = time.monotonic()
    assert "has not ended after 1 s" in fails(capsys, 5, "emoji", tmp_path / "out", "--timeout", 1)
    assert time.monotonic() - start < 20
    npm("#!/bin/sh\nexit 0\n")
    assert "brought no archive" in fails(capsys, 5, "emoji", tmp_path / "out")
    assert below(tmp_path) == {"bin/npm"}


# -------------------------------------------------------------------------------------------------------------- elpv


def wheel(folder: Path) -> None:
    """A wheel of elpv's name and layout, that pip takes without a network."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "elpv_dataset-1.0.0.post1-py3-none-any.whl", "w") as archive:
        for i in range(3):
            archive.writestr(
                f"elpv_dataset/data/images/cell{i:04}.png", encoded(picture(i, 30, 30).convert("L"), "PNG")
            )
        rows = (
            "images/cell0000.png  0.0   mono",
            "images/cell0001.png  0.3333333333333333  poly",
            "images/cell0002.png  1.0 mono",
        )
        archive.writestr("elpv_dataset/data/labels.csv", "\n".join(rows) + "\n")
        info = "elpv_dataset-1.0.0.post1.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: elpv-dataset\nVersion: 1.0.0.post1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_elpv_through_pip(tmp_path, monkeypatch, capsys):
    wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = fails(capsys, 5, "elpv", tmp_path / "out")
    assert said.startswith("error: pip download elpv-dataset==1.0.0.post1 failed (ERROR: ")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert daae_fetch("elpv", tmp_path / "out", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["done"], result["pictures"]) == ("fetched", {"images": 3})
    assert below(tmp_path / "out") == {
        *(f"images/cell000{i}.png" for i in range(3)), "labels.csv", "LICENSES.txt", "fetched.json"
    }  # fmt: skip
    assert (tmp_path / "out/labels.csv").read_text() == (
        "path,defect,type\nimages/cell0000.png,0.00,mono\nimages/cell0001.png,0.33,poly\nimages/cell0002.png,1.00,mono\n"
    )
    assert "CC-BY-NC-SA-4.0" in (tmp_path / "out/LICENSES.txt").read_text()


# -------------------------------------------------------------------------------------------------------- imagenette


class Server:
    """Serves one file; with `ranges` it honours Range, with `drop` it closes the connection after so many bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.ranges, self.drop, self.asked = data, True, None, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.asked.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and outer.ranges else 0
                if start >= len(outer.data):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(outer.data) - start))
                self.end_headers()
                self.wfile.write(outer.data[start : start + outer.drop if outer.drop else None])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/imagenette2-320.tgz"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server():
    one = Server(np.random.default_rng(1).bytes(300_000))
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_a_download_goes_on_where_it_was_cut(tmp_path, server):
    part = tmp_path / "part"
    server.drop = 100_000
    with pytest.raises(ResourceError, match="0 MB are kept: the same command goes on from there"):
        fetch.download(server.url, part, what="it", timeout=5, quiet=True)
    assert part.read_bytes() == server.data[:100_000]
    server.drop = None
    fetch.download(server.url, part, what="it", timeout=5, quiet=True)
    assert part.read_bytes() == server.data
    fetch.download(server.url, part, what="it", timeout=5, quiet=True)  # all there: the server says 416
    assert part.read_bytes() == server.data
    assert server.asked == [None, "bytes=100000-", "bytes=300000-"]


def test_a_server_that_ignores_ranges_sends_it_all_again(tmp_path, server):
    part = tmp_path / "part"
    part.write_bytes(b"something older")
    server.ranges = False
    fetch.download(server.url, part, what="it", timeout=5, quiet=True)
    assert part.read_bytes() == server.data


def test_imagenette_is_checked_and_sorted_into_named_classes(tmp_path, server, monkeypatch, capsys):
    small = encoded(picture(0, 16, 16))
    files = {
        "imagenette2-320/train/n01440764/a.JPEG": small,
        "imagenette2-320/val/n03888257/b.JPEG": small,
        "imagenette2-320/noisy_imagenette.csv": b"x",
    }
    server.data = tgz(tmp_path / "made.tgz", files).read_bytes()
    monkeypatch.setattr(fetch, "IMAGENETTE", server.url)
    assert "imagenette arrived damaged" in fails(capsys, 3, "imagenette", tmp_path / "out")
    assert below(tmp_path) == {"made.tgz"}
    monkeypatch.setattr(fetch, "IMAGENETTE_MD5", hashlib.md5(server.data).hexdigest())
    assert daae_fetch("imagenette", tmp_path / "out") == 0
    assert below(tmp_path / "out") == {"train/tench/a.JPEG", "val/parachute/b.JPEG", "LICENSES.txt", "fetched.json"}
    assert below(tmp_path) == {"made.tgz", *(f"out/{name}" for name in below(tmp_path / "out"))}


def test_imagenette_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "IMAGENETTE", "http://127.0.0.1:9/imagenette2-320.tgz")
    said = fails(capsys, 5, "imagenette", tmp_path / "out")
    assert "Connection refused" in said
    assert "DATA=synthetic" in said
    assert below(tmp_path) == set()


# --------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_pictures_are_a_function_of_seed_and_index():
    def one(seed: int, index: int) -> bytes:
        return synthetic.jpeg_bytes(seed, index, side=64, classes=4)

    assert one(0, 5) == one(0, 5)
    assert len({one(0, 5), one(0, 6), one(1, 5), one(0, synthetic.VALIDATION + 5)}) == 4
    sides = [Image.open(io.BytesIO(one(0, i))).size for i in range(40)]
    assert len(set(sides)) > 30
    assert 56 < np.mean(sides) < 72


def test_a_synthetic_folder_holds_balanced_classes_and_is_made_once(tmp_path, capsys):
    words = ("synthetic", tmp_path / "out", "--count", 30, "--side", 32, "--classes", 3)
    assert daae_fetch(*words) == 0
    names = [path.relative_to(tmp_path / "out").parts[:2] for path in (tmp_path / "out").rglob("*.jpg")]
    counts = Counter(names)
    assert sorted(counts.values()) == [2, 2, 2, 10, 10, 10]
    assert {split for split, _ in counts} == {"train", "val"}
    capsys.readouterr()
    assert daae_fetch(*words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert "not synthetic (count 30, side 32, classes 3, seed 1)" in fails(capsys, 2, *words, "--seed", 1)
    assert daae_fetch(*words, "--seed", 1, "--overwrite") == 0
    assert json.loads((tmp_path / "out/fetched.json").read_text())["options"]["seed"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_synthetic_classes_can_be_learnt_but_not_from_colour_alone():
    def split(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        images = [synthetic.draw_picture(0, start + i, side=48, classes=4).resize((24, 24)) for i in range(count)]
        return np.stack([pixels(image).astype(float) / 255 for image in images]), np.arange(count) % 4

    (train, labels), (test, wanted) = split(0, 400), split(synthetic.VALIDATION, 200)
    test_mean, train_mean = test.mean((1, 2)), train.mean((1, 2))
    by_colour = labels[((test_mean[:, None] - train_mean) ** 2).sum(-1).argmin(1)]
    assert (by_colour == wanted).mean() < 0.42
    flat, flat_test = train.reshape(400, -1) - train.mean(), test.reshape(200, -1) - train.mean()
    weights = np.linalg.solve(flat @ flat.T + 30 * np.eye(400), np.eye(4)[labels] - 0.25)
    assert ((flat_test @ flat.T @ weights).argmax(1) == wanted).mean() > 0.45


# ------------------------------------------------------------------------------------------------------ wrong input


def test_wrong_names_values_and_folders_are_refused(tmp_path, capsys):
    assert "emojis is no data set" in fails(capsys, 2, "emojis", tmp_path / "out")
    assert "--count is from 10 to" in fails(capsys, 2, "synthetic", tmp_path / "out", "--count", 3)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    said = fails(capsys, 2, "synthetic", tmp_path / "home", "--overwrite")
    assert "was not made by `daae fetch`" in said
    assert below(tmp_path) == {"home/thesis.tex"}


def test_help_and_a_wrong_flag_import_nothing_heavy(tmp_path):
    script = (
        "import sys; sys.argv = ['x']\n"
        "from train.command import run\n"
        "import tools.fetch, tools.convert\n"
        "codes = [run(m.main, ['a', 'b', '--epocs', '3']) for m in (tools.fetch, tools.convert)]\n"
        "print(codes, [name for name in ('torch', 'numpy', 'PIL', 'rich') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(fetch.__file__).parents[1], check=True
    )
    assert done.stdout == "[2, 2] []\n"
    assert done.stderr.count("--epocs is unknown") == 2
