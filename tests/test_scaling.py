"""The estimate of a step on many GPUs: what it is made of, by numbers that can be checked by hand."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import UsageError
from tools.profiling.scaling import main
from train.plan import parameter_counts
from train.presets import open_preset

WORDS = ["--images-per-second", "1000", "--per-gpu", "100", "--json", "--latency", "0"]


def steps(capsys, *words: str) -> list[dict]:
    assert main([*WORDS, *words]) == 0
    return json.loads(capsys.readouterr().out)["steps"]


def test_gradients_hide_behind_the_backward_pass_until_they_outlast_it(capsys):
    size = 4 * sum(parameter_counts(open_preset("mae-vitb16")))
    alone, fast, slow = (
        steps(capsys, "--preset", "mae-vitb16", "--gpus", str(count), "--network", network)[0]
        for count, network in ((1, "40"), (16, "40"), (16, "1"))
    )
    assert (alone["seconds"], alone["gradients"], alone["efficiency"]) == (0.1, 0.0, 1.0)
    assert fast["gradients"] == pytest.approx(2 * 15 / 16 * size / 40e9)
    assert fast["seconds"] == 0.1
    assert slow["seconds"] == pytest.approx(0.1 + 2 * 15 / 16 * size / 1e9 - 0.9 * 0.1 * 2 / 3)
    half = steps(capsys, "--preset", "mae-vitb16", "--gpus", "16", "--network", "1", "--bf16-gradients")[0]
    assert half["gradients"] == pytest.approx(slow["gradients"] / 2)


def test_contrasted_vectors_are_not_hidden(capsys):
    there = steps(capsys, "--preset", "daae-vitb16", "--gpus", "8", "16", "--link", "300", "--network", "30")
    rows = 2 * 4 * 256 * 100  # bytes of two vectors of 256 for each of 100 images
    assert [each["vectors"] for each in there] == pytest.approx([3 * 7 * rows / 300e9, 3 * 15 * rows / 30e9])
    assert there[1]["seconds"] == pytest.approx(0.1 + there[1]["vectors"])
    with pytest.raises(UsageError, match="--link and --network are above 0"):
        main(["--images-per-second", "0"])
