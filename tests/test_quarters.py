"""Four pictures in one image: the layout by hand, what patches without a place score, and a real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from model.network import Network
from pipeline.errors import UsageError
from pipeline.sampling import View
from pipeline.store import Store
from pipeline.views import Patches
from tests.conftest import SMALL
from tests.test_pretrain import flags
from train import evaluate
from train.config import Run
from train.evaluation.features import one_pass
from train.evaluation.quarters import quarter_features, quarter_means, side_by_side
from train.pretrain import main as pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Reader(torch.nn.Module):
    """In an encoder's place: patches as they are, or each the mean of all patches of its image."""

    patch, width = SMALL.patch, 3 * SMALL.patch**2

    def __init__(self, blurred: bool):
        super().__init__()
        self.blurred = blurred

    def forward(self, view: Patches) -> list[torch.Tensor]:
        seen = view.pixels
        tokens = seen.mean(dim=1, keepdim=True).expand_as(seen) if self.blurred else seen
        return [torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)]


class Reading(torch.nn.Module):
    def __init__(self, blurred: bool):
        super().__init__()
        self.encoder = Reader(blurred)


def reading(*, blurred: bool) -> Network:
    return cast(Network, Reading(blurred))


def test_four_pictures_stand_two_by_two_and_each_has_its_own_quarter():
    pictures = torch.arange(8)[:, None, None] * 100 + torch.arange(4)[None, :, None]  # number, then place, rows first
    image = side_by_side(Patches(pictures.float(), grid=2))
    assert (image.grid, image.pixels.shape) == (4, (2, 16, 1))
    assert image.pixels[1, :, 0].view(4, 4).tolist() == [
        [400, 401, 500, 501],
        [402, 403, 502, 503],
        [600, 601, 700, 701],
        [602, 603, 702, 703],
    ]
    torch.testing.assert_close(quarter_means(image.pixels), pictures.float().mean(dim=1))


@pytest.mark.parametrize("count", [96, 93, 2])
def test_features_are_those_of_the_picture_itself_in_the_order_that_was_asked_for(store: Store, count: int):
    run, ids = Run(model=SMALL), np.arange(store.count)[:count]
    features = quarter_features(reading(blurred=False), run, store, ids, CPU)
    reader = Reader(False)
    batches = one_pass(
        reader, lambda seen: seen.pixels.mean(dim=1), store, View(side=16, centre=1.0), patch=SMALL.patch, only=ids
    )
    torch.testing.assert_close(features, torch.cat(list(batches)))


def test_patches_that_tell_of_the_whole_image_give_its_four_pictures_the_same(store: Store):
    ids = np.arange(store.count)
    placed, blurred = (
        quarter_features(reading(blurred=each), Run(model=SMALL), store, ids, CPU) for each in (False, True)
    )
    assert len(placed.unique(dim=0)) == store.count
    alike, sharing = blurred.unique(dim=0, return_counts=True)
    assert (len(alike), set(sharing.tolist())) == (store.count // 4, {4})


def test_a_run_is_asked_beside_the_untrained_encoder(store_path: Path, tmp_path: Path, capsys):
    assert pretrain(flags("daae-tiny", store_path, tmp_path / "a", "--steps", "2")) == 0
    words = [str(tmp_path / "a"), "--quarters", "--no-cache", "--no-baselines"]
    capsys.readouterr()
    assert evaluate.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["quarters"]
    assert set(result) == {"encoder", "untrained"}
    for each in result.values():
        (probes,) = each["scores"]["held-out"].values()
        assert set(probes) == {"ridge", "knn1", "knn20"}
        assert each["leading"] == probes["ridge"]
    assert evaluate.main(words) == 0
    assert "held-out, four pictures an image, each by the patches of its own quarter: ridge" in capsys.readouterr().out


def test_half_a_side_that_is_no_multiple_of_the_patch(store_path: Path, tmp_path: Path):
    words = flags("mae-tiny", store_path, tmp_path / "a", "--steps", "1", "--model.side", "24")
    assert pretrain(words) == 0
    with pytest.raises(UsageError, match="multiple of the patch"):
        evaluate.main([str(tmp_path / "a"), "--quarters", "--no-cache"])
