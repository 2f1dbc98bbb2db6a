"""What only a GPU can show. Skipped where there is none; `make test` runs these where there is one."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.attention import WAYS, attend_by_products
from model.network import Network
from model.objectives import OBJECTIVES
from pipeline import kernels
from pipeline.augment import erase, rand_augment, strengthen
from pipeline.colour import colour_maps, mean_colour, recolour
from pipeline.geometry import _batched, _one_by_one
from pipeline.loader import open_loader
from pipeline.sampling import View, colours
from pipeline.store import Store
from pipeline.views import MEAN, STD, Batch, make_views, normalise, patchify
from tests.conftest import PYTHON, SMALL
from tests.images import psnr
from tests.test_loader import BATCH, VIEWS, reference
from train.config import Speed
from train.evaluation.exam import ask
from train.presets import open_preset
from train.step import Stepper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = torch.device("cuda", 0)
compiles = pytest.mark.skipif(
    kernels.triton is None or kernels.missing_tools() is not None,
    reason=f"nothing is compiled here: {'no Triton' if kernels.triton is None else kernels.missing_tools()}",
)


@compiles
def test_kernels_compile_for_this_gpu():
    assert kernels.why_not(GPU) is None


@compiles
@pytest.mark.parametrize("side", [32, 96, 224])
def test_crop_resize_compiled_is_within_a_grey_level(side: int):
    draw = np.random.default_rng(side)
    canvas = torch.from_numpy(draw.integers(0, 256, (32, 300, 400, 3), dtype=np.uint8))
    high, wide = draw.integers(1, 301, 32), draw.integers(1, 401, 32)
    top, left = draw.integers(0, 301 - high), draw.integers(0, 401 - wide)
    boxes = np.stack([top, left, high, wide], axis=1)
    flip = torch.from_numpy(draw.integers(0, 2, 32).astype(np.int32))
    mine = kernels.crop_resize(canvas.to(GPU), torch.from_numpy(boxes.astype(np.int32)).to(GPU), flip.to(GPU), side)
    for slow in (_one_by_one(canvas, boxes, side), _batched(canvas, boxes, side)):
        theirs = torch.where(flip[:, None, None, None] > 0, slow.flip(2), slow)
        assert (mine.cpu().int() - theirs.int()).abs().max() <= 1


@compiles
@pytest.mark.parametrize("patch", [8, 14, 16])
def test_to_patches_compiled_equals_plain_torch(patch: int):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 112, 112, 3), dtype=np.uint8))
    drawn = colours(View(side=112, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.5, jitter_p=1.0), "v", 0, 0, np.arange(16))
    reference = patchify(normalise(recolour(images.float() / 255, drawn)), patch)
    maps = colour_maps(mean_colour(images.to(GPU)), drawn)
    mine = kernels.to_patches(images.to(GPU), patch, maps, MEAN, STD, torch.float32).cpu()
    assert torch.allclose(mine, reference, atol=1e-4)
    half = kernels.to_patches(images.to(GPU), patch, maps, MEAN, STD, torch.bfloat16).cpu()
    assert (half.float() - reference).abs().max() < 0.5 / 255 / min(STD) + 1e-4


@pytest.mark.parametrize(("backend", "least", "median"), [("shards", 45, 50), ("dali", 35, 42), ("resident", 45, 50)])
def test_pixels_on_the_gpu_are_pillows(store: Store, backend, least: float, median: float):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    loader = open_loader(store, VIEWS, batch=BATCH, seed=3, backend=backend, device=GPU, workers=2)
    for name in VIEWS:
        found = []
        for batch in loader.epoch(1):
            assert batch.images[name].device == GPU
            found.append(psnr(batch.images[name].cpu().numpy(), reference(store, batch.id.numpy(), name, 1)))
        decibels = np.concatenate(found)
        assert decibels.min() >= least
        assert np.median(decibels) >= median
    loader.close()


@pytest.mark.parametrize("preset", [f"{name}-tiny" for name in OBJECTIVES])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(preset: str):
    """Loss within 1e-4 and every gradient within 1e-3 of its norm, fp32 without TF32: masks and colours are equal.

    Where a batch norm follows, a bias has a true gradient of zero, and rounding is all that is left of it.
    """
    run = replace(open_preset(preset), model=SMALL, precision="fp32")
    draw = np.random.default_rng(0)
    views = run.method.views(run.model)
    images = {
        name: torch.from_numpy(draw.integers(0, 256, (16, view.side, view.side, 3), dtype=np.uint8))
        for name, view in views.items()
    }
    losses, gradients = [], []
    for device in (torch.device("cpu"), GPU):
        network = Network(run.method, run.model, 0).to(device)
        images_there = {name: each.to(device) for name, each in images.items()}
        batch = Batch(images_there, (torch.arange(16) % 5).to(device), torch.arange(16), 0)
        made = make_views(batch, views, patch=run.model.patch, seed=0)
        outcome = network(made, batch.label)
        loss = torch.stack(list(outcome.terms.values())).sum()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    rounding = 1e-6 * torch.nn.utils.get_total_norm(gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-3 * gradient.norm() + rounding, name


@pytest.mark.parametrize("preset", [f"{name}-tiny" for name in OBJECTIVES])
def test_nothing_in_a_step_waits_for_the_gpu(preset: str):
    run = replace(open_preset(preset), model=SMALL, precision="bf16")
    stepper = Stepper(run, GPU)
    stepper.prepare()
    images = {
        name: torch.randint(256, (16, view.side, view.side, 3), dtype=torch.uint8, device=GPU)
        for name, view in run.method.views(run.model).items()
    }
    batch = Batch(images, torch.arange(16, device=GPU) % 5, torch.arange(16), 0)
    stepper(batch, lr=1e-3)  # allocates and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper(batch, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@compiles
@pytest.mark.parametrize("preset", ["mae-tiny", "daae-tiny"])
def test_steps_as_cuda_graphs_are_those_without(preset: str, monkeypatch: pytest.MonkeyPatch):
    import torch._inductor.config as inductor

    found = []
    for speed in (Speed(), Speed(compile=True), Speed(compile=True, graphs=True)):
        torch.compiler.reset()  # what other tests compiled counts towards the number of graphs that are made
        if speed.graphs and hasattr(inductor.triton, "cudagraph_or_error"):
            monkeypatch.setattr(inductor.triton, "cudagraph_or_error", True)  # else what is no graph runs without one
        run = replace(open_preset(preset), model=SMALL, precision="fp32", speed=speed)
        stepper = Stepper(run, GPU)
        stepper.prepare()
        images = {
            name: torch.randint(
                256, (16, view.side, view.side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
            ).to(GPU)
            for name, view in run.method.views(run.model).items()
        }
        batch = Batch(images, torch.full((16,), -1, device=GPU), torch.arange(16), 0)
        outcomes = [stepper(batch, lr=1e-3)[0] for _ in range(6)]  # the first of them are recorded
        found.append((outcomes, {name: each.clone() for name, each in stepper.network.state_dict().items()}))
    (eager, _), (plain, weights), (captured, others) = found
    # Rounding tells the steps apart that follow: Adam makes whole steps of the smallest gradients.
    for at, apart in ((0, 1e-4), (-1, 1e-2)):
        for name, value in eager[at].terms.items():
            assert plain[at].terms[name].item() == pytest.approx(value.item(), rel=apart), name
    for one, other in zip(plain, captured, strict=True):
        assert all(
            value.item() == pytest.approx(other.terms[name].item(), rel=1e-4) for name, value in one.terms.items()
        )
    for name, value in weights.items():
        if value.is_floating_point() and value.ndim > 1:
            assert (others[name] - value).norm() <= 1e-3 * value.norm(), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(4, 12, 50, 64), (4, 16, 197, 32)])
def test_every_way_to_attend_on_the_gpu_is_the_same(way: str, shape: tuple[int, ...]):
    """In bfloat16 beside products in float64 of the same numbers, forward and backward."""
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(GPU, torch.bfloat16)
    results = []
    for attend, dtype in ((WAYS[way], torch.bfloat16), (attend_by_products, torch.float64)):
        inputs = [each.to(dtype).requires_grad_() for each in given]
        try:
            out = attend(*inputs)
            out.square().sum().backward()
        except RuntimeError as error:
            if attend is attend_by_products or way not in ("flash", "cudnn"):
                raise
            pytest.skip(f"this GPU or build has no {way} kernel for them, which `fastest` leaves out: {error}")
        results.append([out.detach(), *(each.grad for each in inputs)])
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None
        assert theirs is not None
        assert (mine.double() - theirs).norm() <= 0.02 * theirs.norm()


def test_a_run_on_the_gpu_resumes(store_path: Path, tmp_path: Path):
    flags = ["--preset", "mae-tiny", "--data", str(store_path), "--out", str(tmp_path / "run"), "--batch", "16"]
    for limit in ("3", "3"):
        command = [PYTHON, "-m", "train.pretrain", *flags, "--steps", "6", "--limit-steps", limit, "--device", "cuda"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 6)


def test_augmentation_on_the_gpu_is_that_of_the_cpu():
    images, ids = (
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 48, 48, 3), dtype=np.uint8)),
        np.arange(64),
    )
    here, there = (rand_augment(each, 0, 0, ids) for each in (images, images.to(GPU)))
    apart = (here.int() - there.cpu().int()).abs().flatten(1).max(dim=1).values
    # The pixel at which a turned picture ends, and a level that lies between two whole numbers, may go either way.
    assert (apart <= 1).float().mean() > 0.8
    # Strong changes move pixels by whole numbers, the same everywhere.
    here, there = (strengthen(each, View(side=48, strong=5), "v", 0, 0, ids) for each in (images, images.to(GPU)))
    assert (here != there.cpu()).float().mean() < 1e-3
    pixels = torch.full((64, 48, 48, 3), 9.0)
    erased = [
        erase(pixels.clone().to(device), 0.5, 0, 0, ids, torch.Generator(device).manual_seed(0)).cpu() != 9.0
        for device in ("cpu", GPU)
    ]
    assert torch.equal(*erased)


def test_probes_work_where_the_features_are():
    draw = torch.Generator().manual_seed(0)
    label = torch.arange(400) % 5
    bank = torch.randn(5, 24, generator=draw)[label] + torch.randn(400, 24, generator=draw)
    query = bank[:100] + 0.1 * torch.randn(100, 24, generator=draw)
    wanted = {
        "protocols": ("knn", "ridge", "logistic", "linear"),
        "classes": 5,
        "groups": torch.arange(400) // 2,
        "neighbours": (1, 20),
    }
    here, there = (ask(bank.half().to(each), label, query.half().to(each), **wanted) for each in ("cpu", GPU))
    assert here.keys() == there.keys() == {"knn1", "knn20", "ridge", "logistic", "linear"}
    for probe, predicted in here.items():
        assert (there[probe] == predicted).float().mean() >= 0.98, probe


def test_a_fine_tuning_on_the_gpu_resumes(store_path: Path, tmp_path: Path):
    words = ["--preset", "mae-tiny", "--data", str(store_path), "--out", str(tmp_path / "run"), "--batch", "16"]
    tune = [str(tmp_path / "run"), "--out", str(tmp_path / "tuned"), "--batch", "16", "--epochs", "2"]
    for module, more in (
        ("train.pretrain", [*words, "--steps", "2"]), ("train.finetune", [*tune, "--limit-steps", "3"]),
        ("train.finetune", tune),
    ):  # fmt: skip
        done = subprocess.run(
            [PYTHON, "-m", module, *more, "--device", "cuda"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tuned" / "finetune.json").read_text())["state"] == "done"
