"""Generated images: the generator, the store of what it draws, and training on real and generated ones together."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from model.flow import FlowNet, flow_images, flow_loss
from model.vit import Encoder
from pipeline.errors import DataError, Preempted, UsageError
from pipeline.inflated import Inflated
from pipeline.limits import affinity
from pipeline.loader import open_loader
from pipeline.sampling import View, mixture_order
from pipeline.store import MANIFEST, Store
from pipeline.stored import StoredPictures
from tests.conftest import PYTHON, needs_ffcv
from tests.images import make_folder
from tests.test_pretrain import flags, moments, read_json, weights
from tools import compare, convert, inflate, profile, verify
from tools.comparing import experiment
from tools.comparing.records import Cell
from tools.converting import inflation
from tools.profiling import stages
from tools.reproduce import EXPERIMENTS
from train import evaluate, generator
from train.command import parse
from train.config import Budget, as_values, flat
from train.data import open_data, open_store
from train.evaluation import features
from train.generator import Recipe, Training
from train.pretrain import main as pretrain

REAL, GENERATED = 24, 40
SMALL = "--side 16 --width 32 --steps 6 --batch 8 --sampling-steps 1 --device cpu --quiet".split()
RECIPE = Recipe(side=16, width=32, batch=8, lr=1e-3, seed=0, steps=6, seconds=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(real: Path, out: Path, *more: str) -> list[str]:
    return [str(real), str(out), "--count", str(GENERATED), *SMALL, *more]


@pytest.fixture(scope="module")
def real_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inflate")
    make_folder(root / "images", REAL, 40, 2)
    assert convert.main([str(root / "images"), str(root / "real"), "--backends", "dali", "--quiet"]) == 0
    return root / "real"


@pytest.fixture(scope="module")
def generated_path(real_path: Path) -> Path:
    out = real_path.parent / "generated"
    assert inflate.main(words(real_path, out)) == 0
    return out


@pytest.fixture
def declared(store_path: Path, tmp_path: Path) -> Path:
    """The session's store once more, passed off as generated from itself: it has every backend's files."""
    root = tmp_path / "declared"
    shutil.copytree(store_path, root)
    manifest = read_json(root / MANIFEST)
    manifest["generated"] = {"real": Store.open(store_path).fingerprint, "generator": "0" * 16}
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


# --------------------------------------------------------------------------------------------------------- the network


class Known(torch.nn.Module):
    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, images, time):
        return self.velocity(images, time)


def test_the_loss_is_that_of_the_straight_way():
    draw = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 5, 3, 4, 4, generator=draw, dtype=torch.float64)
    when = torch.rand(5, generator=draw, dtype=torch.float64)
    expected, mixed = 0.0, []
    for image, start, t in zip(images, noise, when, strict=True):
        mixed.append(t * image + (1 - t) * start)
        expected += float(((image - start) ** 2).sum()) / images.numel()
    assert flow_loss(Known(lambda at, _: at * 0), images, noise, when).item() == pytest.approx(expected, rel=1e-6)
    seen = []
    assert flow_loss(Known(lambda at, t: seen.append((at, t)) or images - noise), images, noise, when).item() < 1e-12
    assert torch.allclose(seen[0][0], torch.stack(mixed))
    assert torch.equal(seen[0][1], when)


def test_the_way_is_heuns():
    noise = torch.ones(2, 3, 4, 4)
    straight = flow_images(Known(lambda at, _: torch.full_like(at, 0.5)), noise, 3)
    assert straight == pytest.approx(torch.full_like(noise, 1.5))
    # dx = x dt grows to e; halving the steps of a second-order method divides its error by four.
    errors = [math.e - flow_images(Known(lambda at, _: at), noise, steps)[0, 0, 0, 0].item() for steps in (8, 16)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    ramp = flow_images(Known(lambda at, t: t[:, None, None, None].expand_as(at)), noise, 2)
    assert ramp == pytest.approx(torch.full_like(noise, 1.5))


@pytest.mark.parametrize("side", [16, 48, 64])
def test_the_network_has_one_size_whatever_the_side_and_sees_the_time(side):
    torch.manual_seed(0)
    network = FlowNet(side, 32)
    images = torch.randn(2, 3, side, side)
    assert torch.equal(network(images, torch.rand(2)), torch.zeros_like(images))  # before any training
    for part in network.parameters():
        torch.nn.init.normal_(part, std=0.05)
    early, late = (network(images, torch.full((2,), t)) for t in (0.1, 0.9))
    assert early.shape == images.shape
    assert not torch.allclose(early, late, atol=1e-3)
    # An image's velocity is its own: no other image of the batch has a part in it.
    assert torch.allclose(network(images[:1], torch.tensor([0.1])), early[:1], atol=1e-5)


def test_training_lowers_the_loss_and_the_mean_follows(real_path, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "LOG_STEPS", 6)
    recipe = replace(RECIPE, lr=3e-3, steps=24)
    training = Training(recipe, Store.open(real_path), tmp_path, torch.device("cpu"), quiet=True)
    training.resume()
    assert training.run(lambda: False)
    training.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12, 18, 24]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    pairs = zip(training.live.parameters(), training.mean.parameters(), strict=True)
    far = [(live - mean).abs().max() for live, mean in pairs]
    assert 0 < max(far) < 0.1


@pytest.mark.parametrize("stops", [(2,), (1, 3, 5)])  # three steps an epoch
def test_a_generator_that_was_stopped_is_the_same_to_the_bit(real_path, tmp_path, stops):
    store, whole, parts = Store.open(real_path), tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    for folder, places in ((whole, ()), (parts, stops)):
        for stop in (*places, 99):
            training = Training(RECIPE, store, folder, torch.device("cpu"), quiet=True)
            training.resume()
            assert training.run(lambda at=training, until=stop: at.step >= until) is (stop == 99)
            assert training.step == min(stop, 6)
            training.close()
    for name in ("model", "optim"):
        one, other = (load_file(folder / "step_000000006" / f"{name}.safetensors") for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_seconds_become_steps_once(real_path, tmp_path):
    recipe = replace(RECIPE, steps=None, seconds=20.0)
    counts = []
    for stop in (1, 2):
        training = Training(recipe, Store.open(real_path), tmp_path, torch.device("cpu"), quiet=True)
        training.resume()
        training.run(lambda at=training, until=stop: at.step >= until)
        training.close()
        counts.append(training.steps)
    assert counts[0] == counts[1] > 2
    # What was measured on is forgotten: the first step is that of a generator whose steps were given.
    given = tmp_path / "given"
    given.mkdir()
    wish = replace(RECIPE, steps=counts[0])
    other = Training(wish, Store.open(real_path), given, torch.device("cpu"), quiet=True)
    other.resume()
    other.run(lambda: other.step >= 2)
    other.close()
    pairs = zip(training.networks.state_dict().values(), other.networks.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


# ----------------------------------------------------------------------------------------------------------- the store


def content(root: Path) -> dict[str, bytes]:
    """Every file but the one that tells the seconds."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != "stats.json"}


def test_what_is_drawn_is_an_ordinary_store_that_says_where_it_is_from(real_path, generated_path, capsys):
    store = Store.open(generated_path)
    assert (store.count, store.max_height, store.max_width, store.columns) == (GENERATED, 16, 16, {})
    origin = store.generated
    assert origin is not None
    assert origin["real"] == Store.open(real_path).fingerprint
    assert (origin["seed"], origin["steps"], len(origin["generator"])) == (0, 6, 16)
    assert verify.main([str(generated_path), "--workers", "1", "--quiet"]) == 0
    capsys.readouterr()
    assert inflate.main(words(real_path, generated_path, "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["done"] == "nothing to do"
    assert (said["images"], said["generator"], said["fingerprint"]) == (40, origin["generator"], store.fingerprint)
    # Any part can be made again from what lies beside the pictures.
    network = FlowNet(16, 32)
    network.load_state_dict(load_file(generated_path / "generator.safetensors"))
    again = inflation.draw(network, range(128), side=16, seed=0, steps=1, precision="fp32")
    assert len({each.tobytes() for each in again}) == 128
    pictures = StoredPictures.in_shards(store)
    for sample in (0, 17, GENERATED - 1):
        stored = pictures.picture(sample)
        assert np.abs(stored.astype(int) - again[sample]).mean() < 8  # what a JPEG of noise costs
    pictures.close()


def test_more_images_begin_with_those_of_fewer(real_path, generated_path, tmp_path):
    other = tmp_path / "more"
    assert inflate.main([str(real_path), str(other), "--count", "130", *SMALL]) == 0
    fewer, more = Store.open(generated_path), Store.open(other)
    assert np.array_equal(fewer.index["sum"], more.index["sum"][:GENERATED])
    assert len(set(more.index["sum"].tolist())) == 130


def test_a_store_that_was_made_in_three_goes_has_the_same_bytes(real_path, tmp_path, monkeypatch):
    monkeypatch.setattr(inflation, "DRAWN", 16)
    command, taken, written = words(real_path, tmp_path / "out"), Training.take, inflation.write_whole
    assert inflate.main(words(real_path, tmp_path / "whole")) == 0

    def struck(self, batch):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(self, batch)

    monkeypatch.setattr(Training, "take", struck)
    with pytest.raises(Preempted, match="stopped by SIGTERM at step 4 of 6 of the generator"):
        inflate.main(command)
    monkeypatch.setattr(Training, "take", taken)
    with pytest.raises(UsageError, match=r"half made with other settings \(lr: 0.001 -> 0.002\)"):
        inflate.main([*command, "--lr", "2e-3"])

    def strike(*given):
        os.kill(os.getpid(), signal.SIGINT)
        written(*given)

    monkeypatch.setattr(inflation, "write_whole", strike)
    with pytest.raises(Preempted, match="stopped by SIGINT at 16 of 40 images"):
        inflate.main(command)
    monkeypatch.setattr(inflation, "write_whole", written)
    assert not (tmp_path / "out").exists()
    assert inflate.main(command) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_a_killed_command_goes_on(real_path, tmp_path):
    command = [PYTHON, "-m", "tools.cli", "inflate", *words(real_path, tmp_path / "out", "--steps", "400")]
    process, end = subprocess.Popen(command), time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*/unfinished/metrics.jsonl")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert subprocess.run(command, timeout=200).returncode == 0
    command[5] = str(tmp_path / "whole")
    assert subprocess.run(command, timeout=200).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], r"was generated with other settings \(seed: 0 -> 1\)"),
        (["--steps", "7"], r"was generated with other settings \(steps: 6 -> 7\)"),
        (["--count", "41"], "holds 40 generated images, not 41"),
        (["--side", "20"], "--side is a multiple of 16 up to 256, not 20"),
        (["--width", "48"], "--width is a multiple of 32"),
        (["--count", "0"], "--count is at least 1"),
        (["--steps", "0"], "--steps is at least 1, not 0"),
    ],
)
def test_another_wish_is_refused_and_the_store_left_alone(real_path, generated_path, more, message):
    before = content(generated_path)
    with pytest.raises(UsageError, match=message):
        inflate.main([*words(real_path, generated_path), *more])
    assert content(generated_path) == before


def test_what_is_no_place_or_no_source_for_generated_images_is_refused(real_path, generated_path, tmp_path):
    with pytest.raises(UsageError, match="holds generated images, and a generator's training takes real ones alone"):
        inflate.main(words(generated_path, tmp_path / "out"))
    with pytest.raises(UsageError, match="lie inside each other"):
        inflate.main(words(real_path, real_path / "out"))
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(UsageError, match="exists and is not a store"):
        inflate.main(words(real_path, tmp_path))
    shutil.copytree(real_path, tmp_path / "copy")
    with pytest.raises(UsageError, match="is a store of real images"):
        inflate.main(words(real_path, tmp_path / "copy"))


def test_mending_a_generated_store_keeps_its_mark(generated_path, tmp_path):
    shutil.copytree(generated_path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    jpeg = StoredPictures.in_shards(store).read(5).tobytes()
    shard = store.shards[0]
    shard.write_bytes(shard.read_bytes().replace(jpeg, bytes(len(jpeg))))
    assert verify.main([str(store.root), "--fix", "--workers", "1", "--quiet"]) == 0
    mended = Store.open(store.root)
    assert mended.count == GENERATED - 1
    assert mended.generated == store.generated
    for name in ("generator.safetensors", "sheet.png"):  # the manifest does not name them
        assert (mended.root / name).read_bytes() == (generated_path / name).read_bytes()


def test_a_kill_while_the_work_is_removed_leaves_what_took_longest(tmp_path, monkeypatch):
    work, order = tmp_path / "unfinished", []
    for folder in ("step_000000006", "drawn"):
        (work / folder).mkdir(parents=True)
    for name in ("job.json", "metrics.jsonl", "status.json"):
        (work / name).touch()
    rmtree, unlink = shutil.rmtree, Path.unlink

    def tree_removed(path: Path) -> None:
        order.append(path.name)
        rmtree(path)

    def file_removed(path: Path) -> None:
        order.append(path.name)
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(inflation.shutil, "rmtree", tree_removed)
        patched.setattr(Path, "unlink", file_removed)
        inflation._remove(work)
    assert (order[0], order[-2:]) == ("drawn", ["metrics.jsonl", "job.json"])
    assert len(order) == 5
    assert not work.exists()


# ------------------------------------------------------------------------------------------------- both together


VIEWS = {"holed": View(side=32, mask_ratio=0.75), "small": View(side=16)}


@pytest.mark.parametrize("backend", ["shards", "dali", "resident", pytest.param("ffcv", marks=needs_ffcv)])
def test_a_batch_holds_the_pictures_of_both_stores(store_path, declared, backend):
    real = Store.open(store_path)
    both = Inflated.join(real, declared, 2)
    loader = open_loader(both, VIEWS, batch=24, seed=3, backend=backend)
    alone = open_loader(real, VIEWS, batch=real.count, seed=3, backend=backend)
    (mine,) = alone.epoch(1)
    place = {int(sample): row for row, sample in enumerate(mine.id)}
    compared, ids = 0, []
    for batch in loader.epoch(1):
        ids += batch.id.tolist()
        for row, sample in enumerate(batch.id.tolist()):
            if sample < real.count:  # the same cut of the same picture as without the others
                compared += 1
                for name in VIEWS:
                    assert torch.equal(batch.images[name][row], mine.images[name][place[sample]])
    assert ids == mixture_order(3, 1, 96, 96, 2)[: len(ids)].tolist()
    assert len(ids) == 24 * loader.batches == 144
    assert compared == sum(sample < 96 for sample in ids) > 80
    # A generated sample is cut as its own id says, from the picture that its own store holds.
    sample = next(each for each in ids if each >= 96)
    rows = loader.where(1, np.array([sample]))
    (crops,) = alone.source.batches([np.array([sample - 96])], lambda _: rows)
    (others,) = loader.source.batches([np.array([sample])], lambda _: rows)
    assert all(torch.equal(crops[name], others[name]) for name in VIEWS)
    loader.close()
    alone.close()


def test_ranks_share_mixed_batches_and_an_epoch_can_be_entered_anywhere(store_path, declared):
    both = Inflated.join(Store.open(store_path), declared, 3)
    options = {"batch": 16, "seed": 1, "backend": "shards"}
    whole = open_loader(both, VIEWS, label="class", **options)
    batches = list(whole.epoch(4))
    known = Store.open(store_path).label("class")[0]
    for batch in batches:
        assert batch.label.tolist() == [known[sample] if sample < 96 else -1 for sample in batch.id.tolist()]
    assert len(batches) == whole.batches == (96 + 32) // 16
    assert all(len(set(batch.id.tolist())) == 16 for batch in batches)
    for ranks in (2, 4):
        parts = [open_loader(both, VIEWS, rank=rank, ranks=ranks, **options) for rank in range(ranks)]
        tails = [list(part.epoch(4, start=5)) for part in parts]
        for number, batch in enumerate(batches[5:]):
            assert torch.cat([tail[number].id for tail in tails]).tolist() == batch.id.tolist()
            pixels = torch.cat([tail[number].images["small"] for tail in tails])
            assert torch.equal(pixels, batch.images["small"])
        for part in parts:
            part.close()
    whole.close()


def test_damage_is_told_by_the_store_that_has_it(store_path, declared):
    store = Store.open(declared)
    jpeg = StoredPictures.in_shards(store).read(17).tobytes()
    shard = store.shards[0]
    shard.write_bytes(shard.read_bytes().replace(jpeg, b"\xff\xd8" + bytes(len(jpeg) - 2)))
    loader = open_loader(Inflated.join(Store.open(store_path), declared, 1), VIEWS, batch=96, backend="shards")
    with pytest.raises(DataError, match=f"sample 17 of {declared} cannot be used"):
        list(loader.epoch(0))
    loader.close()


def test_only_images_generated_from_this_store_may_inflate_it(store_path, real_path, generated_path, tmp_path):
    def ask(*more: str) -> list[str]:
        return flags("mae-tiny", store_path, tmp_path / "run", "--steps", "2", *more)

    with pytest.raises(DataError, match="was generated from another store than"):
        pretrain(ask("--inflate.data", str(generated_path)))
    with pytest.raises(UsageError, match="were not generated"):
        pretrain(ask("--inflate.data", str(real_path)))
    with pytest.raises(UsageError, match=r"--inflate.real-repeat is at least 1"):
        pretrain(ask("--inflate.real-repeat", "0"))
    inflated = flags("mae-tiny", real_path, tmp_path / "run", "--inflate.data", str(generated_path), "--steps", "2")
    with pytest.raises(DataError, match="has 28 images an epoch, with generated ones, fewer than one batch of 64"):
        pretrain([*inflated, "--batch", "64"])
    assert list(tmp_path.iterdir()) == []


def inflated_run(real: Path, generated: Path, out: Path, *more: str) -> list[str]:
    mixed = ["--inflate.data", str(generated), "--inflate.real-repeat", "2"]
    return flags("mae-tiny", real, out, *mixed, "--steps", "10", *more)


def test_an_inflated_run_resumes_to_the_bit_and_scores_real_images_alone(
    real_path, generated_path, tmp_path, monkeypatch
):
    """T-I3, on the path that training takes."""
    seen, opened = [], features.open_loader

    def watched(store, *given, **more):
        seen.append((store.root, store.generated, more["only"]))
        return opened(store, *given, **more)

    monkeypatch.setattr(features, "open_loader", watched)
    whole, parts = (inflated_run(real_path, generated_path, tmp_path / name) for name in ("whole", "parts"))
    assert pretrain([*whole, "--evaluations", "1"]) == 0
    assert seen
    for root, generated, ids in seen:
        assert (root, generated) == (real_path, None)
        assert ids.max() < REAL
    assert pretrain([*parts, "--limit-steps", "3"]) == 0  # 24 + 20 images: two steps an epoch
    assert pretrain(parts) == 0
    for kind in (weights, moments):
        one, other = kind(tmp_path / "whole", 10), kind(tmp_path / "parts", 10)
        assert all(torch.equal(one[name], other[name]) for name in one)
    facts = read_json(tmp_path / "whole" / "env.json")
    assert (facts["data"], facts["images"]) == (Store.open(real_path).fingerprint, REAL)
    assert facts["inflated"]["images"] == GENERATED
    assert facts["inflated"]["generator"] == Store.open(generated_path).manifest["generated"]["generator"]
    assert pretrain(flags("mae-tiny", real_path, tmp_path / "none", "--steps", "10")) == 0
    plain = weights(tmp_path / "none", 10)
    assert any(not torch.equal(plain[name], value) for name, value in weights(tmp_path / "whole", 10).items())
    # Other generated images are another data set, wherever they lie.
    moved = tmp_path / "moved"
    shutil.copytree(generated_path, moved)
    assert pretrain(inflated_run(real_path, moved, tmp_path / "parts")) == 0
    assert inflate.main(words(real_path, tmp_path / "other", "--seed", "1")) == 0
    with pytest.raises(DataError, match="the data set changed since step 10"):
        pretrain(inflated_run(real_path, tmp_path / "other", tmp_path / "parts"))


def test_a_profile_loads_what_the_run_would(real_path, generated_path, tmp_path):
    """The mixture of an epoch, in the loader and in each of its parts; a run's config.yaml says so."""
    config = tmp_path / "config.yaml"
    config.write_text(f"preset: mae-tiny\ninflate: {{data: {generated_path}, real_repeat: 2}}\n")
    wish = profile.Profile(data=real_path, config=config, batch=8, seconds=0.3, loader="shards", device="cpu")
    measured = profile.profile(wish)
    assert measured.images == REAL + GENERATED // 2
    sizes = Store.open(real_path).index
    sides = [*np.maximum(sizes["height"], sizes["width"]), *[16] * GENERATED]
    assert measured.stored_side == pytest.approx(np.mean(sides))
    settings = profile.settings(wish)
    store = open_store(settings)
    with contextlib.closing(open_data(settings, store)) as loader:
        ids = next(stages.Parts(loader, settings, torch.device("cpu")).ids)
    assert np.array_equal(ids, store.order(settings.seed, 1_000_000)[: len(ids)])


def test_generated_images_are_neither_bank_nor_test(real_path, generated_path, tmp_path):
    """T-I3, where someone asks for it."""
    out, refusal = tmp_path / "run", "holds generated images, and evaluation takes real ones alone"
    assert pretrain(inflated_run(real_path, generated_path, out)) == 0
    for asked in (["--data", str(generated_path)], ["--tests", str(generated_path)]):
        with pytest.raises(UsageError, match=refusal):
            evaluate.main([str(out), *asked])
    ask = ["--steps", "2", "--evaluations", "1"]
    with pytest.raises(UsageError, match=refusal):
        pretrain(flags("mae-tiny", real_path, tmp_path / "b", *ask, "--tests", str(generated_path)))
    with pytest.raises(UsageError, match=refusal):
        pretrain(flags("mae-tiny", generated_path, tmp_path / "c", *ask))
    arms = ["--presets", "mae-tiny", "--data", str(real_path), "--tests", str(generated_path)]
    with pytest.raises(UsageError, match=refusal):
        compare.main([*arms, "--steps", "2", "--out", str(tmp_path / "d")])
    for store in (Store.open(generated_path), Inflated.join(Store.open(real_path), generated_path, 1)):
        with pytest.raises(UsageError, match=refusal):
            next(features.small_pixels(store, side=16))
        with pytest.raises(UsageError, match=refusal):
            next(features.encoded(Encoder(side=16, patch=8, width=16, depth=1, heads=2), store, side=16))


def plan_of(values: dict, folder: Path) -> experiment.Plan:
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return experiment.plan_experiment(
        parse(experiment.Compare, ["--experiment", str(file), "--out", str(folder / "out")], prog="daae compare")
    )


def test_an_arm_may_be_inflated_and_all_take_equal_steps(store_path, real_path, generated_path, tmp_path):
    """T-I4."""
    settings = {"inflate.data": str(generated_path), "inflate.real_repeat": 2}
    arms = {"none": "mae-tiny", "inflated": {"preset": "mae-tiny", "settings": settings}}
    values = {"arms": arms, "data": str(real_path), "steps": 40, "settings": {"optim.batch": 16}}
    plan = plan_of(values, tmp_path)
    assert compare.differs(plan, "inflated") == settings
    assert [plan.wish(arm).inflate.data for arm in arms] == [None, generated_path]
    assert {plan.wish(arm).budget for arm in arms} == {Budget(steps=40)}
    assert all("--steps 40" in " ".join(plan.pretrain_words(Cell(arm, 0))) for arm in arms)
    fingerprint = Store.open(generated_path).fingerprint
    assert plan.fingerprints_of("none") == plan.fingerprints
    assert plan.fingerprints_of("inflated") == {**plan.fingerprints, "generated": fingerprint}
    with pytest.raises(DataError, match="was generated from another store"):
        plan_of({**values, "data": str(store_path)}, tmp_path)


def test_a_comparison_knows_which_images_were_generated(real_path, generated_path, tmp_path):
    arms = {"inflated": {"preset": "mae-tiny", "settings": {"inflate.data": str(generated_path)}}}
    values = {"arms": arms, "data": str(real_path), "steps": 40, "settings": {"optim.batch": 16}}
    plan = plan_of(values, tmp_path)
    settings = flat(as_values(plan.wish("inflated")))
    record = {
        "arm": "inflated", "seed": 0, "settings": settings, "declared": ["inflate.data"],
        "fingerprints": plan.fingerprints_of("inflated"), "env": {"cores": affinity()},
    }  # fmt: skip
    experiment.check_records(plan, [record])
    made_anew = {**record, "fingerprints": {**plan.fingerprints, "generated": "0" * 16}}
    with pytest.raises(UsageError, match=r"runs on other images or tests \(generated\)"):
        experiment.check_records(plan, [made_anew])
    experiment.check_records(plan, [{**made_anew, "arm": "earlier"}])  # another arm's images may be others


def test_the_arms_of_the_ready_experiment_are_adainfs_and_its_augmentation_alone(real_path, generated_path, tmp_path):
    """T-I4, on the file that is there to be run."""
    text = (EXPERIMENTS / "adainf.yaml").read_text()
    values = yaml.safe_load(text.replace("demo/stores/emoji-generated", str(generated_path)))
    small = {**values.get("settings", {}), "optim.batch": 16}
    plan = plan_of({**values, "data": str(real_path), "tests": [], "label": None, "settings": small}, tmp_path)
    assert list(plan.arms) == ["none", "inflated", "weaker", "both"]
    wishes = [plan.wish(arm) for arm in plan.arms]
    assert {wish.budget for wish in wishes} == {Budget(steps=values["steps"])}
    assert [wish.inflate.data for wish in wishes] == [None, generated_path, None, generated_path]
    # Generated images as they come repeat no real one; AdaInf does.
    assert [wish.inflate.real_repeat for wish in wishes if wish.inflate.data] == [1, 2]
    strong, weak = ({repr(wish.method) for wish in wishes[at : at + 2]} for at in (0, 2))
    assert len(strong) == len(weak) == 1
    changed = {"method.area": [0.2, 1.0], "method.jitter": [0.4, 0.4, 0.4, 0.1], "method.jitter_p": 0.4}
    assert compare.differs(plan, "weaker") == changed
