"""A run in parts: which step has which size, and a whole run through all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.network import Network
from model.objectives.daae import DAAE
from pipeline.errors import UsageError
from pipeline.sampling import batch_ids, epoch_order
from pipeline.store import Store
from tests.conftest import COUNT, SMALL
from tests.test_pretrain import flags, weights
from tests.test_step import batch_of, small_run
from train.config import Optim, Run
from train.json_files import read_rows
from train.pace import seconds_per_step
from train.plan import make_plan
from train.pretrain import main
from train.stages import images_per_step, lay_out, macs_per_image, parse_stages, parts_of, steps_of
from train.step import Stepper, views_of

STAGED = Run(model=replace(SMALL, side=64), optim=Optim(batch=32, lr=1e-3, stages="0.5:side=32 0.75:side=48,batch=16"))


def test_stages_say_which_steps_have_which_size():
    stages = lay_out(STAGED, 40, 100)
    assert [(s.first, s.last, s.run.model.side, s.run.optim.batch, s.run.optim.peak_lr()) for s in stages] == [
        (0, 20, 32, 32, 1e-3), (20, 30, 48, 16, 5e-4), (30, 40, 64, 32, 1e-3),
    ]  # fmt: skip
    # 100 images are 3 batches of 32 and 6 of 16; 20 steps of 3 an epoch begin 7 epochs, and 10 of 6 begin 2.
    assert [(s.epoch, s.batches) for s in stages] == [(0, 3), (7, 6), (9, 3)]
    assert [stages[0].place(step) for step in (0, 2, 3, 19)] == [(0, 0), (0, 2), (1, 0), (6, 1)]
    assert [stages[1].place(step) for step in (20, 26)] == [(7, 0), (8, 0)]
    assert stages[2].epochs(33) == 10.0
    assert lay_out(replace(STAGED, optim=replace(STAGED.optim, stages="")), 40, 100)[0].place(7) == (2, 1)


def test_a_wish_for_epochs_counts_the_images_of_every_stage():
    assert images_per_step(STAGED) == 0.75 * 32 + 0.25 * 16
    assert steps_of(STAGED, 14, 100) == 14 * 100 // 28
    plain = replace(STAGED, optim=replace(STAGED.optim, stages=""))
    assert steps_of(plain, 14, 100) == 14 * 3
    assert sum((s.last - s.first) * s.run.optim.batch for s in lay_out(STAGED, 50, 100)) == pytest.approx(1400, abs=16)
    macs = [plain.method.macs(replace(plain.model, side=side)) for side in (32, 48, 64)]
    expected = (0.5 * 32 * macs[0] + 0.25 * 16 * macs[1] + 0.25 * 32 * macs[2]) / 28
    assert macs_per_image(STAGED) == pytest.approx(expected)
    plan = make_plan(replace(STAGED, budget=replace(STAGED.budget, steps=50)), 100, 10.0)
    assert plan["epochs"] == 14
    assert plan["hours"] == pytest.approx(1400 / 10 / 3600, abs=0.005)


WRONG = ("0.5", "0.5:width=3", "1.5:side=32", "0.5:side=32 0.4:side=48", "0.5:side=0", "a:side=8")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_stage_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError, match=r"--optim\.stages .*SHARE:side=PIXELS"):
        parse_stages(wrong)
    with pytest.raises(UsageError, match=r"30 is not a multiple of --model\.patch 8"):
        replace(STAGED, optim=replace(STAGED.optim, stages="0.5:side=30")).check()


def test_a_smaller_picture_has_the_codes_of_its_places_in_the_decoder_too():
    run = replace(small_run(DAAE(head_hidden=32, head_out=16)), model=replace(SMALL, side=64))
    half = replace(run, model=replace(run.model, side=32))
    network = Network(run.method, run.model, 0)
    views = views_of(half, batch_of(half))
    assert (views["holed"].grid, views["small"].grid) == (4, 2)
    seen = []
    network.parts["decoder"].blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(views, torch.full((16,), -1))
    hidden = views["holed"].hidden
    assert hidden is not None
    code = network.parts["decoder"].positions(8, torch.device("cpu")).view(8, 8, -1)
    # A place of the coarse grid lies between four of the fine one, and so does its code, nearly.
    between = code.unfold(0, 2, 2).unfold(1, 2, 2).mean(dim=(-1, -2)).reshape(16, -1)
    guessed = seen[0][:, -hidden.shape[1] :] - network.parts["decoder"].mask_token
    assert torch.nn.functional.cosine_similarity(guessed, between[hidden], dim=-1).min() > 0.99


def test_a_run_goes_through_its_stages_and_resumes_inside_one(store_path, tmp_path):
    def words(name: str, *more: str) -> list[str]:
        stages = ["--model.side", "48", "--optim.stages", "0.4:side=32 0.7:batch=8", "--watch.log-every", "1"]
        return flags("daae-tiny", store_path, tmp_path / name, "--steps", "10", *stages, *more)

    taken: list[tuple[list[int], int, float]] = []
    whole = Stepper.__call__

    def seen(self, batch, lr, *more):
        taken.append((batch.id.tolist(), batch.images["holed"].shape[1], lr))
        return whole(self, batch, lr, *more)

    Stepper.__call__ = seen
    try:
        assert main(words("whole")) == 0
        for _ in range(2):
            assert main(words("parts", "--limit-steps", "5")) == 0
    finally:
        Stepper.__call__ = whole
    assert taken[:10] == taken[10:]
    assert [(len(ids), side) for ids, side, _ in taken[:10]] == [(16, 32)] * 4 + [(8, 48)] * 3 + [(16, 48)] * 3
    assert taken[4][0] == batch_ids(epoch_order(0, 1, COUNT), 0, 8).tolist()
    one, other = (weights(tmp_path / name, 10) for name in ("whole", "parts"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    rows = read_rows(tmp_path / "parts" / "metrics.jsonl")
    assert [row["images"] for row in rows] == [16, 32, 48, 64, 72, 80, 88, 104, 120, 136]
    assert rows[3]["epoch"] == pytest.approx(4 / 6, abs=1e-4)
    assert rows[4]["epoch"] == pytest.approx(1 + 1 / 12, abs=1e-4)


def test_the_pace_of_a_run_is_the_mean_of_its_stages(store_path, monkeypatch):
    run = replace(STAGED, data=store_path, device="cpu", precision="fp32", loader="shards")
    asked = []

    def rehearse(part, loader, ranks):
        asked.append((part.model.side, part.optim.batch, loader.batch))
        yield 0.0
        while True:
            yield float(part.model.side)

    monkeypatch.setattr("train.pace._rehearse", rehearse)
    (pace,) = seconds_per_step([(run, Store.open(store_path))], 20.0)
    assert asked == [(part.model.side, part.optim.batch, part.optim.batch) for _, part in parts_of(run)]
    assert pace == pytest.approx(0.5 * 32 + 0.25 * 48 + 0.25 * 64)
