"""Agreement of features between two sizes of a picture: numbers that can be told by hand, and a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import UsageError
from tests.test_pretrain import flags
from train import evaluate
from train.evaluation.agreement import agreement
from train.pretrain import main as pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_all_pictures_share_is_no_agreement():
    drawn = torch.Generator().manual_seed(0)
    full, other = torch.randn(2, 400, 64, generator=drawn)
    unrelated = agreement(full + 100, other + 100)  # their plain cosine is 1
    assert abs(unrelated.same) < 0.02
    assert unrelated.found < 0.02
    twice = agreement(full + 100, 3 * full - 7)
    assert twice.same == pytest.approx(1)
    assert (twice.found, twice.count) == (1, 400)
    assert twice.others == pytest.approx(-1 / 399, abs=1e-3)  # the mean is taken off, so the others lean away


def test_a_picture_that_is_nearer_to_another_is_not_found():
    full = torch.eye(4)
    small = full[[0, 1, 3, 2]]
    found = agreement(full, small)
    assert found.found == 0.5
    # Less its mean a row has cosine -1/3 with any other, so the mean of 1, 1, -1/3, -1/3 is 1/3.
    assert found.same == pytest.approx(1 / 3)
    assert found.others == pytest.approx(-1 / 9)


def test_a_run_is_asked_beside_the_untrained_encoder(store_path: Path, tmp_path: Path, capsys):
    assert pretrain(flags("daae-tiny", store_path, tmp_path / "a", "--steps", "2")) == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "a"), "--agreement", "0.5", "--no-cache", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["agreement"]
    assert result["share"] == 0.5
    for who in ("encoder", "untrained"):
        (one,) = result[who].values()
        assert one["same"] > one["others"]
        assert 0 < one["found"] <= 1
    assert result["encoder"] != result["untrained"]
    with pytest.raises(UsageError, match="a share of the side"):
        evaluate.main([str(tmp_path / "a"), "--agreement", "2"])
    with pytest.raises(UsageError, match="multiple of the patch"):
        evaluate.main([str(tmp_path / "a"), "--agreement", "0.55", "--no-cache"])
