"""Run folders and comparisons as the program writes them, made by hand: what they say is known exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tools.comparing.records import Cell
from train.config import as_values
from train.presets import open_preset

NAME = "ridge on subcategory, mean of fluent and emojione"
EPOCH_IMAGES, BATCH = 1280, 128
SPENT = {"data wait": 0.03, "encoder": 0.3, "backward": 0.6, "other": 0.07}  # of the training seconds


def score(value: float, error: float = 0.01, count: int = 1600) -> dict[str, float]:
    return {"value": value, "standard_error": error, "count": count}


def exam(value: float, error: float = 0.01) -> dict[str, Any]:
    probes = {"ridge": score(value, error), "knn20": score(value)}
    scores = {test: {"subcategory": probes} for test in ("fluent", "emojione")}
    return {"label": "subcategory", "leading": score(value, error), "leading_name": NAME, "scores": scores}


def write_run(
    folder: Path,
    *,
    preset: str = "mae-tiny",
    seed: int = 0,
    curve: Sequence[tuple[float, float]] = ((50, 0.25), (100, 0.30), (200, 0.34)),
    seconds: float = 200.0,
    rate: float = 640.0,
    baselines: tuple[float, float] | None = (0.22, 0.24),
    state: str = "done",
    labelled: bool = True,
    error: float = 0.01,
    settings: dict[str, Any] | None = None,
    gallery: tuple[int, int] | None = (560, 280),
) -> Path:
    """A run of `seconds` at `rate` images a second. curve: (training seconds, leading score), the last one final."""
    folder.mkdir(parents=True)
    values = as_values(open_preset(preset)) | {"seed": seed, "data": "stores/emoji-train", "out": str(folder)}
    values |= {"device": "cpu", "precision": "fp32", "loader": "ffcv"} | (settings or {})
    steps = round(seconds * rate / BATCH)
    values["budget"] = {"epochs": None, "steps": steps, "seconds": seconds}
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    done = steps if state == "done" else steps // 2
    status = {"state": state, "code": 0, "reason": "" if state == "done" else "stopped by SIGTERM", "step": done}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "env.json").write_text(json.dumps({
        "python": "3.11.7", "versions": {"torch": "2.15.0"}, "code": "0123456789ab", "device": "Test CPU, 2 threads",
        "cores": 2, "system": "Linux", "command": f"/anywhere/train/pretrain.py --preset {preset} --seed {seed}",
        "date": "2025-01-02T03:04:05+0000", "data": "00112233445566ff", "images": EPOCH_IMAGES + 7,
    }))  # fmt: skip
    rows = []
    for step in range(10, done + 1, 10):
        images = step * BATCH
        row = {"step": step, "epoch": images / EPOCH_IMAGES, "lr": 1e-3, "reconstruct": 1 / (1 + step / 100)}
        row |= {"info_nce": 4.8, "contrast": 0.48} if "daae" in preset else {}
        row["loss"] = row["reconstruct"] + row.get("contrast", 0)
        row |= {"images": images, "images_per_second": rate, "train_seconds": images / rate, "data_wait": 0.031}
        row["spent"] = {part: share * images / rate for part, share in SPENT.items()} | {
            "start-up": 5.0,
            "evaluation": 7.0,
        }
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state == "done":
        (folder / "ledger.json").write_text(json.dumps({"mfu": 0.314, "memory_gb": 1.53}))
    if labelled:
        taken = [(at, value) for at, value in curve if at <= done * BATCH / rate]
        lines = [
            {"step": round(at * rate / BATCH), "train_seconds": at, "images": round(at * rate), "leading": value}
            for at, value in taken
        ]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if state == "done":
            result = {"step": done, "train_seconds": seconds, **exam(curve[-1][1], error), "baselines": None}
            if baselines is not None:
                pixels, untrained = baselines
                result["baselines"] = {"pixels": exam(pixels), "untrained": exam(untrained)}
            (folder / "evaluation.json").write_text(json.dumps(result))
    if gallery is not None and state == "done":
        (folder / "media").mkdir()
        noise = np.random.default_rng(seed).integers(0, 256, (*gallery[::-1], 3), np.uint8)
        Image.fromarray(noise).save(folder / "media" / "gallery.png")
    return folder


def of_lengths(folder: Path, **scores: Sequence[float]) -> Path:
    """A comparison of two seeds, with runs of 50, 100 and 200 s: what each arm scores after them."""
    for arm, values in scores.items():
        for seed in (0, 1):
            for seconds, value in zip((50, 100, 200), values, strict=True):
                # A score in the middle of a run, which must not count: it is far too good.
                curve = ((seconds / 2, 0.9), (seconds, value + 0.001 * seed))
                write_run(
                    folder / "runs" / Cell(arm, seed, float(seconds)).folder, preset=f"{arm}-tiny", seed=seed,
                    curve=curve, seconds=seconds, gallery=None,
                )  # fmt: skip
    arms = {arm: f"{arm}-tiny" for arm in scores}
    values = {"arms": arms, "seconds": [50, 100, 200], "seeds": [0, 1], "target": "baseline"}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder
