"""`daae export RUN`: the encoder of a run as safetensors that timm loads, proven by loading it into timm.

RUN/export/
  model.safetensors   timm's VisionTransformer by its own names, float32
  config.json         sizes, normalisation, the call that builds the model, and where the weights come from
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pipeline.errors import DataError, ResourceError, UsageError
from train.command import parse, run
from train.json_files import read_object

if TYPE_CHECKING:
    from torch import Tensor

    from model.vit import Encoder
    from train.checkpoint import Checkpoint
    from train.config import Run

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOLERANCE = 1e-5  # of timm's features against ours, relative to the largest, in float32
FORMAT = "daae-export-1"


@dataclass(frozen=True)
class Export:
    """Write a run's encoder as model.safetensors and config.json that timm loads, and check that it does."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `daae pretrain`."""
    out: Path | None = None
    """Folder to write. Default: RUN/export."""
    checkpoint: str | None = None
    """Step of the checkpoint, or its folder. Default: the newest that verifies."""
    side: int | None = None
    """Pixels of the images that the exported model takes. Default: those of the run."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    flags = parse(Export, argv, prog="daae export")
    result = export(flags)
    if flags.json:
        print(json.dumps(result))
    else:
        print(f"{result['sentence']}\n\n{result['python']}")
    return 0


def export(flags: Export) -> dict:
    """Do what the flags say; returns what `--json` prints.

    Raises DataError: no run, no whole checkpoint, or timm's features differ from ours. UsageError: --out holds
    something else, or --side does not fit. ResourceError: timm is missing, or the disk is full.
    """
    from safetensors.torch import load_file, save

    from pipeline.staging import staging, write_durably
    from train.folder import chosen_checkpoint, run_settings

    settings = run_settings(flags.run)
    side, out = flags.side or settings.model.side, flags.out or flags.run / "export"
    if side < settings.model.patch or side % settings.model.patch:
        raise UsageError(f"--side {side} is not a multiple of the patch side {settings.model.patch}.")
    if out.exists() and not is_export(out):
        raise UsageError(f"--out {out} holds something that is no export. Choose another folder.")
    point = chosen_checkpoint(flags.run, flags.checkpoint)
    encoder, call = load_encoder(settings, point), timm_call(settings, side)
    with staging(out, replace=True) as folder:
        write_durably(folder / WEIGHTS, save(timm_weights(encoder, side), metadata={"format": "pt"}))
        difference = compare_with_timm(encoder, load_file(folder / WEIGHTS), call, side)
        facts = describe(settings, point, flags.run, side, call, difference)
        write_durably(folder / CONFIG, (json.dumps(facts, indent=1) + "\n").encode())
    sentence = (
        f"{out} holds the encoder of {settings.preset} at step {point.step:,}; "
        f"timm's features equal ours within {difference:.0e}. It loads with:"
    )
    return {"out": str(out), "python": python_lines(call, side, out), "sentence": sentence, **facts}


# --- from the run -----------------------------------------------------------------------------------------------------


def load_encoder(settings: Run, point: Checkpoint) -> Encoder:
    """The encoder in float32 on the CPU, ready to evaluate. Raises DataError where weights and settings disagree."""
    from model.vit import Encoder

    shape, prefix = settings.model, "encoder."
    encoder = Encoder(side=shape.side, patch=shape.patch, width=shape.width, depth=shape.depth, heads=shape.heads)
    weights = {name.removeprefix(prefix): value for name, value in point.scored().items() if name.startswith(prefix)}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{point.path} does not fit the run's config.yaml: {' '.join(str(error).split())}") from None
    return encoder.float().eval()


# --- as timm wants it -------------------------------------------------------------------------------------------------


def timm_weights(encoder: Encoder, side: int) -> dict[str, Tensor]:
    """timm's state dict. Names are equal by design; what is added is the position code, which we compute and timm
    keeps as a weight: (1, 1 + N, D), nothing for the class token, for images of `side` pixels."""
    import torch

    code = encoder.positions(side // encoder.patch, torch.device("cpu"))
    positions = torch.cat([torch.zeros(1, encoder.width), code])[None]
    return {**encoder.state_dict(), "pos_embed": positions}


def timm_call(settings: Run, side: int) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer; its other defaults are ours (layer norm's epsilon 1e-6, bias in qkv)."""
    shape = settings.model
    return {
        "img_size": side, "patch_size": shape.patch, "embed_dim": shape.width, "depth": shape.depth,
        "num_heads": shape.heads, "num_classes": 0, "global_pool": "token",
    }  # fmt: skip


def compare_with_timm(encoder: Encoder, weights: dict[str, Tensor], call: dict[str, Any], side: int) -> float:
    """Largest difference between timm's tokens and ours on random pictures, over the largest value.

    Raises DataError where it exceeds TOLERANCE or a name is missing, ResourceError where timm is missing.
    """
    import torch

    from pipeline.views import Patches, patchify

    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ResourceError(f"`daae export` needs timm, which does not import ({error}). Run `make setup`.") from None
    model = VisionTransformer(**call).eval()
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise DataError(f"timm does not take the weights: {' '.join(str(error).split())}") from None
    pictures = torch.randn(4, side, side, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.forward_features(pictures.permute(0, 3, 1, 2))
        (ours,) = encoder(Patches(patchify(pictures, encoder.patch), side // encoder.patch))
    difference = ((theirs - ours).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:  # also where it is not a number
        raise DataError(
            f"timm's features differ from ours by {difference:.1e} of the largest, more than {TOLERANCE:.0e}: nothing "
            "was exported. The weights hold values that are not finite, or this timm computes something else."
        )
    return difference


def describe(
    settings: Run, point: Checkpoint, folder: Path, side: int, call: dict[str, Any], difference: float
) -> dict[str, Any]:
    """What config.json holds."""
    from importlib import metadata

    from pipeline.views import MEAN, STD

    shape, state = settings.model, point.state
    return {
        "format": FORMAT, "architecture": "vision_transformer", "library": "timm",
        "img_size": side, "patch_size": shape.patch, "embed_dim": shape.width, "depth": shape.depth,
        "num_heads": shape.heads, "mlp_ratio": 4.0, "norm_eps": 1e-6, "class_token": True,
        "mean": list(MEAN), "std": list(STD), "interpolation": "bilinear", "features": "mean of the patch tokens",
        "timm_call": call_text(call), "timm_version": metadata.version("timm"), "difference_from_timm": difference,
        "preset": settings.preset, "objective": settings.objective, "trained_side": shape.side,
        "step": point.step, "steps": state["steps"], "images_seen": state["clock"]["images"],
        "train_seconds": state["clock"]["train_seconds"], "data": state["data"], "images": state["images_in_store"],
        "code": read_object(folder / "env.json").get("code", "unknown"),
    }  # fmt: skip


def call_text(call: dict[str, Any], before: str = "", after: str = "") -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
    return f"timm.models.VisionTransformer({before}{arguments}{after})"


def python_lines(call: dict[str, Any], side: int, out: Path) -> str:
    """What a person pastes to have the model and its features."""
    lines = (
        "import timm",
        "from safetensors.torch import load_file",
        "model = " + call_text(call, "\n    ", "\n"),
        f"model.load_state_dict(load_file({str(out / WEIGHTS)!r}))",
        f"# images: (B, 3, {side}, {side}), normalised by the mean and std of {CONFIG}",
        "features = model.eval().forward_features(images)[:, 1:].mean(1)",
    )
    return "\n".join(lines)


def is_export(out: Path) -> bool:
    """Whether a folder is one that this command may replace: an export, or empty."""

    if not out.is_dir():
        return False
    return not any(out.iterdir()) or read_object(out / CONFIG).get("format") == FORMAT


if __name__ == "__main__":
    sys.exit(run(main))
