"""The work of `daae inflate`, from a store of real images to a store of generated ones.

train a generator -> draw, a file of pixels for every DRAWN images -> shards -> FFCV file -> manifest -> rename

    .OUT.partial-PID/unfinished/
      job.json        what is being made
      step_…/         the generator's newest checkpoint; metrics.jsonl: its losses
      drawn/          0000000.npy, (DRAWN, S, S, 3) uint8, and so on

What is drawn depends on the generator, the seed and the number of the image alone, so a file that is missing can be
made again, and the finished store has the same bytes however often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from model.flow import FlowNet, flow_images
from pipeline.errors import DataError, NumericsError, Preempted, ResourceError, UsageError
from pipeline.ffcv_writer import ffcv_missing
from pipeline.names import printable
from pipeline.pictures import Encoding, encode
from pipeline.sampling import key
from pipeline.shards import ShardWriter, write_manifest
from pipeline.staging import is_full, size_in_words, staging, write_durably, write_whole
from pipeline.store import MANIFEST, Store
from pipeline.unfinished import FOLDER, fits
from tools.converting.assembly import assemble
from tools.converting.conversion import STATS
from tools.converting.flags import Inflate
from tools.converting.watchdog import Watchdog
from tools.progress import Progress
from train.checkpoint import list_steps, usual_mode
from train.device import autocast, choose_device
from train.generator import Recipe, Training
from train.json_files import read_rows
from train.stop import Stop

GENERATOR, SHEET = "generator.safetensors", "sheet.png"  # beside the store's own files: to look at, and to draw more
DRAWN = 128  # images that are drawn together; another number would change them in the last bits
SHEET_ROWS = 10
STALL_SECONDS = 300.0


def inflate(flags: Inflate) -> dict:
    """Do what the flags say. Returns what `--json` prints.

    Raises DataError, NumericsError, ResourceError, StalledError, UsageError; Preempted where a signal came: what is
    done by then waits beside OUT for the same command.
    """
    start = time.monotonic()
    store = Store.open(flags.store)
    store.check_real("a generator's training")
    job = job_of(flags, store)
    if _finished(flags, job):
        return _result(flags, start, done="nothing to do")
    device = choose_device(flags.device)
    _check_disk(flags, store)
    watchdog = Watchdog(STALL_SECONDS, quiet=flags.quiet, flag="")
    adopt, keep = (lambda left: _adopt(flags, left, job)), (lambda left, error: _keep(flags, left, error, watchdog))
    with (
        watchdog,
        Stop(quiet=flags.quiet) as stop,
        staging(flags.out, replace=flags.overwrite, adopt=adopt, keep=keep) as folder,
    ):
        work = folder / FOLDER
        for path in folder.iterdir():  # of a store that was being written
            if path != work:
                path.unlink()
        (work / "drawn").mkdir(parents=True, exist_ok=True)
        if not (work / "job.json").exists():
            write_durably(work / "job.json", json.dumps(job).encode())
        training = Training(recipe_of(flags), store, work, device, quiet=flags.quiet)
        with contextlib.closing(training):
            training.resume()
            if not training.run(lambda: stop.asked):
                raise _preempted(stop, f"step {training.step:,} of {training.steps:,} of the generator")
        generator = training.mean.module.eval()
        assert isinstance(generator, FlowNet)
        _draw_all(flags, generator, training.precision, work / "drawn", stop)
        save_file(generator.state_dict(), folder / GENERATOR)
        usual_mode(folder / GENERATOR)
        _write_store(flags, store, folder, {**job, "steps": training.steps}, watchdog)
        losses = read_rows(work / "metrics.jsonl")
        stats = {"seconds": round(time.monotonic() - start, 2), "training": losses}
        write_durably(folder / STATS, (json.dumps(stats, indent=1) + "\n").encode())
        _remove(work)
    return _result(flags, start, done="generated")


def job_of(flags: Inflate, store: Store) -> dict:
    """What decides the images; how many of them there are to be is left open."""
    recipe = dataclasses.asdict(recipe_of(flags))
    return {"real": store.fingerprint, "seed": flags.seed, "sampling_steps": flags.sampling_steps, "recipe": recipe}


def recipe_of(flags: Inflate) -> Recipe:
    return Recipe(
        side=flags.side, width=flags.width, batch=flags.batch, lr=flags.lr, seed=flags.seed, steps=flags.steps,
        seconds=None if flags.steps else flags.seconds,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- draw


@torch.no_grad()
def draw(generator: FlowNet, numbers: range, *, side: int, seed: int, steps: int, precision: str) -> np.ndarray:
    """(len(numbers), side, side, 3) uint8. Image i is a function of the generator, the seed and i; its last bits may
    differ between devices, and with the number of images that are drawn together."""
    device = next(generator.parameters()).device
    noise = torch.stack([
        torch.randn(3, side, side, generator=torch.Generator().manual_seed(key(seed, number, "noise")))
        for number in numbers
    ]).to(device)  # fmt: skip
    with autocast(device, precision):
        images = flow_images(generator, noise, steps)
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def _draw_all(flags: Inflate, generator: FlowNet, precision: str, drawn: Path, stop: Stop) -> None:
    """Draw what is not there yet. A whole file each time: the images past the last that is wanted are company."""
    missing = [number for number in range(math.ceil(flags.count / DRAWN)) if not _pixels(drawn, number).exists()]
    progress = Progress("drawing", total_images=len(missing) * DRAWN, quiet=flags.quiet)
    with progress.show():
        for done, number in enumerate(missing, 1):
            pixels = draw(
                generator, range(number * DRAWN, (number + 1) * DRAWN), side=flags.side, seed=flags.seed,
                steps=flags.sampling_steps, precision=precision,
            )  # fmt: skip
            buffer = io.BytesIO()
            np.save(buffer, pixels)
            write_whole(_pixels(drawn, number), buffer.getvalue())
            progress.at(images=done * DRAWN)
            if stop.asked and done < len(missing):
                raise _preempted(stop, f"{(number + 1) * DRAWN:,} of {flags.count:,} images")


def _pixels(drawn: Path, number: int) -> Path:
    return drawn / f"{number:07d}.npy"


# ------------------------------------------------------------------------------------------------------------- write


def _write_store(flags: Inflate, real: Store, folder: Path, origin: dict, watchdog: Watchdog) -> None:
    """Shards, tables and manifest, encoded as the real pictures are, so that this does not tell the two apart."""
    facts, missing = real.manifest["encode"], ffcv_missing()
    names = {field.name for field in dataclasses.fields(Encoding)} & facts.keys()
    encoding = Encoding(**{name: facts[name] for name in names})
    backends = [name for name in facts["backends"] if name != "ffcv" or missing is None] or ["dali"]
    writer = ShardWriter(folder, shard_bytes=facts["shard_mb"] << 20, raw=real.raw)
    progress = Progress("writing", total_images=flags.count, quiet=flags.quiet)
    try:
        with progress.show():
            while writer.count < flags.count:
                pixels = np.load(_pixels(folder / FOLDER / "drawn", writer.count // DRAWN))
                if writer.count == 0:
                    _sheet(pixels[: flags.count]).save(folder / SHEET)
                for picture in pixels[: flags.count - writer.count]:
                    data = encode(Image.fromarray(picture), encoding)
                    writer.add(data, label=-1, height=flags.side, width=flags.side)
                progress.at(images=writer.count)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    whole = assemble(
        folder, writer, np.empty((flags.count, 0), np.int64),
        lambda: (b"generated-%09d" % number for number in range(flags.count)),
        backends=backends, watchdog=watchdog,
    )  # fmt: skip
    generator = hashlib.sha256((folder / GENERATOR).read_bytes()).hexdigest()[:16]
    write_manifest(
        folder, files=whole.files, index=whole.index, columns={}, shards=whole.shards,
        encode=facts | {"backends": backends},
        source={"path": printable(bytes(flags.store)), "files": flags.count, "listing": generator}, bad=0, skipped={},
        generated={"generator": generator, **origin},
    )  # fmt: skip


def _remove(work: Path) -> None:
    """Killed on the way, the same command goes on: what took longest stays longest, and job.json to the end."""
    order = {"drawn": 0, "metrics.jsonl": 2, "job.json": 3}
    for path in sorted(work.iterdir(), key=lambda path: order.get(path.name, 1)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.rmdir()


def _sheet(pixels: np.ndarray) -> Image.Image:
    """(n, S, S, 3) as one picture, for a person's eye."""
    count = min(SHEET_ROWS, math.isqrt(len(pixels)))
    side = pixels.shape[1]
    cells = pixels[: count * count].reshape(count, count, side, side, 3)
    return Image.fromarray(cells.transpose(0, 2, 1, 3, 4).reshape(count * side, count * side, 3))


# -------------------------------------------------------------------------------------------- before and after the work


def _finished(flags: Inflate, job: dict) -> bool:
    """Whether OUT is just what is asked for. Raises UsageError where it is something else."""
    out = flags.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{out} exists and is not a store. Choose another OUT, or remove it yourself.")
    if flags.overwrite:
        return False
    store = Store.open(out)
    ask = "Choose another OUT, or --overwrite replaces it."
    if store.generated is None:
        raise UsageError(f"{out} is a store of real images. {ask}")
    if differs := _differs(store.generated, job):
        raise UsageError(f"{out} was generated with other settings ({differs}). {ask}")
    if store.count != flags.count:
        raise UsageError(f"{out} holds {store.count:,} generated images, not {flags.count:,}. {ask}")
    return True


def _differs(before: dict, job: dict) -> str:
    """What two jobs disagree on, in words; nothing where they agree."""
    old, new = ({**one, **one["recipe"], "recipe": None} for one in (before, job))
    return ", ".join(f"{name}: {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name])


def _adopt(flags: Inflate, left: Path, job: dict) -> bool:
    """Whether a folder that was left is this job. Hours of another one's training are not thrown away unasked."""
    if fits(left, job) or flags.overwrite:
        return fits(left, job)
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads((left / FOLDER / "job.json").read_text())
        raise UsageError(
            f"{flags.out} is half made with other settings ({_differs(before, job)}). Give those to go on, choose "
            "another OUT, or --overwrite."
        )
    return False


def _keep(flags: Inflate, folder: Path, error: BaseException, watchdog: Watchdog) -> bool:
    """Whether what is there may help the next process; a full disk is given back, and what is wrong stays wrong."""
    wrong = is_full(error) or isinstance(error, (DataError, UsageError, NumericsError))
    kept = watchdog.hung or (bool(list_steps(folder / FOLDER)) and not wrong)
    if kept and (watchdog.hung or not flags.quiet):
        print(f"note: what is done so far is kept in {folder}; the same command goes on there.", file=sys.stderr)
    return kept


def _preempted(stop: Stop, where: str) -> Preempted:
    return Preempted(f"stopped by {stop.name} at {where}. Run the same command again to go on.")


def _check_disk(flags: Inflate, real: Store) -> None:
    pixels = 3 * flags.side**2
    # Pixels until they are written, and in shards and FFCV file what is stored of them: of JPEGs at most 0.6 bytes a
    # value. tar adds 2 kB.
    need = flags.count * ((1 + 2 * (1 if real.raw else 0.6)) * pixels + 4096) + (256 << 20)
    place = next(each for each in flags.out.absolute().parents if each.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise ResourceError(
            f"{place} has {size_in_words(free)} free, {flags.count:,} images need {size_in_words(need)}."
        )


def _result(flags: Inflate, start: float, *, done: str) -> dict:
    store = Store.open(flags.out)
    assert store.generated is not None
    rows = json.loads((flags.out / STATS).read_text())["training"]
    return {
        "store": str(flags.out), "done": done, "images": store.count, "steps": store.generated["steps"],
        "loss": rows[-1]["loss"], "seconds": round(time.monotonic() - start, 2),
        "generator": store.generated["generator"], "real": store.generated["real"], "fingerprint": store.fingerprint,
    }  # fmt: skip
