"""`daae profile --peers`: our loader beside torchvision's, FFCV's and DALI's own, on the pictures of one store.

Each peer is a process of its own, set up as its documentation does it, with as many workers as ours has threads, and
with malloc as it comes; ours takes memory as `daae pretrain` does (train/allocator.py). Rounds are interleaved: one
peer works while the others wait with full queues, which are emptied before its round counts. What counts is images per
CPU-second, user and system, of a peer and its workers: it hardly moves when others use the machine, and predicts what
more cores bring. Ratios are medians of each round's own.
"""

from __future__ import annotations

# The peers are not annotated, or less exactly than they are called.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline import native
from pipeline.decoder import ppm_head
from pipeline.loader import check_batch
from pipeline.store import Store
from pipeline.stored import StoredPictures
from tools.profiling.bottleneck import pillow_note
from tools.profiling.peer_process import measure, ratio, serve
from train.allocator import give_memory_back
from train.command import run

MOST_IMAGES = 4096  # of the store, written out as files for torchvision
STALL_SECONDS = 300.0


@dataclass(frozen=True)
class Task:
    """What a peer process is told."""

    peer: str
    views: str  # a key of VIEWS
    store: str
    files: str  # folder of class folders with the store's pictures
    batch: int
    workers: int


# Name -> sides and whether the views share a crop. The crop is RandomResizedCrop's: 8 to 100 % of the area.
VIEWS = {
    "224": ([224], False),
    "224 + 112, shared crop": ([224, 112], True),
    "224 + 112": ([224, 112], False),
    "2 x 224 + 6 x 96": ([224] * 2 + [96] * 6, False),
}


def ours(task: Task, backend: Any) -> Iterator[int]:
    from pipeline.loader import open_loader
    from pipeline.sampling import View
    from pipeline.store import Store

    sides, shared = VIEWS[task.views]
    views = {
        f"view{place}": View(side=side, area=(0.08, 1.0), same_crop_as="view0" if shared and place else None)
        for place, side in enumerate(sides)
    }
    loader = open_loader(
        Store.open(task.store), views, batch=task.batch, backend=backend, device="cpu", workers=task.workers
    )
    epoch = 0
    while True:
        for batch in loader.epoch(epoch):
            yield len(batch.id)
        epoch += 1


def torchvision(task: Task, *, pillow: bool) -> Iterator[int]:
    """ImageFolder and DataLoader as in torchvision's reference training, uint8 out."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms import v2

    sides, _ = VIEWS[task.views]
    if pillow:
        crops = [
            transforms.Compose([
                transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), transforms.PILToTensor()
            ])
            for side in sides
        ]  # fmt: skip
        folder = ImageFolder(task.files, lambda image: tuple(crop(image) for crop in crops))
    else:
        crops = [v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()]) for side in sides]
        folder = ImageFolder(
            task.files, lambda image: tuple(crop(image) for crop in crops),
            loader=lambda path: decode_image(read_file(path), ImageReadMode.RGB),
        )  # fmt: skip
    torch.set_num_threads(1)
    loader = DataLoader(
        folder, task.batch, shuffle=True, num_workers=task.workers, drop_last=True, persistent_workers=True
    )
    while True:
        for images, _ in loader:
            yield len(images[0])


def ffcv(task: Task, *, pool: bool = False) -> Iterator[int]:
    """FFCV's own loader and crop, as in its ImageNet example, on the .beton of the store."""
    import torch
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    sides, _ = VIEWS[task.views]

    def operations(side: int) -> list:
        return [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip(), ToTensor()]

    pipelines: dict[str, Any] = {"image": operations(sides[0]), "label": None}
    for place, side in enumerate([] if pool else sides[1:]):
        decode, *then = operations(side)
        pipelines[f"view{place}"] = PipelineSpec("image", decoder=decode, transforms=then)
    loader = Loader(
        str(Path(task.store) / "images.beton"), batch_size=task.batch, num_workers=task.workers,
        order=OrderOption.RANDOM, seed=0, drop_last=True, pipelines=pipelines,
    )  # fmt: skip
    while True:
        for images, *_ in loader:
            if pool:  # the small view as the mean of 2 x 2 pixels
                torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2).to(torch.uint8)
            yield len(images)


def dali(task: Task) -> Iterator[int]:
    """DALI's own readers and crops on the shards of the store; further views are cut from one decode of the crop."""
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    sides, shared = VIEWS[task.views]
    shards, picture = sorted(str(path) for path in Path(task.store).glob("*.tar")), Store.open(Path(task.store)).suffix

    @pipeline_def(batch_size=task.batch, num_threads=task.workers, device_id=None, prefetch_queue_depth=2)
    def pipeline():
        file, _label = fn.readers.webdataset(
            paths=shards, index_paths=[path.replace(".tar", ".idx") for path in shards], ext=[picture, "cls"],
            name="reader", random_shuffle=True, initial_fill=1024, missing_component_behavior="error",
        )  # fmt: skip
        views, crop = [], None
        for side in sides:
            if crop is None or not shared:
                crop = fn.decoders.image_random_crop(
                    file, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
                )
            sized = fn.resize(crop, size=[side, side], antialias=True)
            views.append(fn.flip(sized, horizontal=fn.random.coin_flip()))
        return tuple(views)

    names = [f"view{place}" for place in range(len(sides))]
    loader = DALIGenericIterator([pipeline()], names, reader_name="reader", auto_reset=True)
    while True:
        for (batch,) in loader:
            yield len(batch["view0"])


PEERS: dict[str, Callable[[Task], Iterator[int]]] = {
    "DAAE, FFCV file": lambda task: ours(task, "ffcv"),
    "DAAE, shards": lambda task: ours(task, "shards"),
    "FFCV": ffcv,
    "FFCV, small view pooled": lambda task: ffcv(task, pool=True),
    "DALI": dali,
    "torchvision, Pillow": lambda task: torchvision(task, pillow=True),
    "torchvision, v2": lambda task: torchvision(task, pillow=False),
}
PLAN = {
    "224": ["DAAE, FFCV file", "DAAE, shards", "FFCV", "DALI", "torchvision, Pillow", "torchvision, v2"],
    "224 + 112, shared crop": ["DAAE, FFCV file", "DAAE, shards", "FFCV, small view pooled", "DALI"],
    "224 + 112": ["DAAE, FFCV file", "DAAE, shards", "FFCV", "DALI", "torchvision, Pillow"],
    "2 x 224 + 6 x 96": ["DAAE, FFCV file", "DAAE, shards"],
}


OURS = "DAAE, shards"
SCALED = (OURS, "224 + 112, shared crop")  # what is measured with 1, 2, … threads


def compare_peers(
    data: Path, *, seconds: float, batch: int, workers: int, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, dict]], dict[str, dict], dict[int, dict], list[str]]:
    """views -> peer -> rates; of ours alone views -> rates and threads -> rates; what is to be said beside them.

    seconds: of each, in all rounds. Raises DataError, ResourceError, StalledError.
    """
    from tools.profiling.stages import watched  # which no peer's process waits for

    store = Store.open(data)
    check_batch(store, batch)
    absent = missing(store)
    for name, why in absent.items():
        print(f"note: {name} is left out: {why}.", file=sys.stderr)
    results: dict[str, dict[str, dict]] = {}
    with tempfile.TemporaryDirectory(prefix="daae-peers-") as files:
        watched(lambda got_on: write_files(store, Path(files), got_on), STALL_SECONDS, f"{store.root} was copied")
        for views, names in PLAN.items():
            there = [name for name in names if name not in absent]
            tasks = {name: command(Task(name, views, str(data), files, batch, workers)) for name in there}
            results[views] = measure(tasks, seconds, lambda doing, views=views: say(f"{views}: {doing}"))
        # Beside one another in the same rounds: what more views cost is a smaller difference than the machine's moods.
        tasks = {views: command(Task(OURS, views, str(data), files, batch, workers)) for views in VIEWS}
        costs = measure(tasks, seconds, lambda doing: say(f"the cost of views: {doing}"))
        counts = sorted({1, *(2**power for power in range(1, 10) if 2**power < workers), workers})
        tasks = {f"{count} threads": command(Task(*SCALED, str(data), files, batch, count)) for count in counts}
        scaled = measure(tasks, seconds, lambda doing: say(f"scaling: {doing}"))
    return results, costs, dict(zip(counts, scaled.values(), strict=True)), notes(store)


def command(task: Task) -> list[str]:
    return ["tools.profiling.peers", json.dumps(asdict(task))]


def missing(store: Store) -> dict[str, str]:
    """Peers that cannot run here, and why."""
    found = {}
    if store.beton is None:
        found |= dict.fromkeys(("DAAE, FFCV file", "FFCV", "FFCV, small view pooled"), "the store has no FFCV file")
    if not any(path.suffix == ".tar" for path in store.shards):
        found["DALI"] = "the store has no tar shards"
    if store.raw:
        found["torchvision, v2"] = "it cannot read portable pixmaps"
    for package, names in (("ffcv", ("FFCV", "FFCV, small view pooled")), ("nvidia.dali", ("DALI",))):
        with contextlib.suppress(ModuleNotFoundError):
            if find_spec(package) is not None:
                continue
        found |= dict.fromkeys(names, f"{package} is not installed")
    return found


def write_files(store: Store, folder: Path, got_on: Callable[[], None]) -> None:
    """The store's pictures, or its first MOST_IMAGES, as an ImageFolder: JPEGs, or portable pixmaps of raw pixels."""
    (folder / "all").mkdir()
    with contextlib.closing(StoredPictures.in_shards(store)) as stored:
        for sample in range(min(store.count, MOST_IMAGES)):
            row, path = store.index[sample], folder / "all" / f"{sample:09d}.{store.suffix}"
            head = ppm_head(int(row["height"]), int(row["width"])) if store.raw else b""
            path.write_bytes(head + stored.read(sample).tobytes())
            got_on()


def notes(store: Store) -> list[str]:
    """What a reader of the table has to know."""
    found = []
    if store.count > MOST_IMAGES:
        found.append(
            f"torchvision reads the first {MOST_IMAGES:,} of the {store.count:,} images, as files; the others read all."
        )
    if (why := native.why_not()) is not None:
        found.append(f"Ours: {pillow_note(why)}")
    return found


def show_peers(
    results: dict[str, dict[str, dict]], costs: dict[str, dict], scaled: dict[int, dict], notes: list[str]
) -> None:
    from tools.tables import plain_table, print_whole

    table = plain_table()
    for heading in ("views", "loader", "images/CPU-s", "min to max", "CPU-ms/image", "images/s", "ours is"):
        table.add_column(heading, justify="left" if heading in ("views", "loader") else "right", no_wrap=True)
    for views, peers in results.items():
        mine = [each for name, each in peers.items() if name.startswith("DAAE")]
        best = max(mine, key=lambda each: each["images_per_cpu_second"])
        for place, (name, each) in enumerate(peers.items()):
            rate = each["images_per_cpu_second"]
            table.add_row(
                views if place == 0 else "", name, f"{rate:,.0f}", f"{each['least']:,.0f} to {each['most']:,.0f}",
                f"{1000 / rate:.2f}", f"{each['images_per_second']:,.0f}",
                "" if name.startswith("DAAE") else f"{ratio(best, each, 'images_per_cpu_second'):.2f}x",
            )  # fmt: skip
    print_whole(table)
    for note in notes:
        print(f"\n{note}")
    print(f"\nWhat views cost ours ({OURS}), in CPU-seconds of one 224 px view:")
    for views, each in costs.items():
        print(f"  {views}: {ratio(costs['224'], each, 'images_per_cpu_second'):.2f}")
    print(f"\nOurs with more threads ({', '.join(SCALED)}):")
    for threads, each in scaled.items():
        rate, share = each["images_per_second"], ratio(each, scaled[1], "images_per_second") / threads
        print(f"  {threads} threads: {rate:,.0f} images/s, {share:.0%} of {threads} times one thread's")


def main(argv: list[str]) -> int:
    task = Task(**json.loads(argv[0]))
    if not task.peer.startswith("DAAE"):
        give_memory_back()
    serve(lambda: PEERS[task.peer](task))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
