"""The run folder: what it belongs to, and where a stopped run goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from pipeline.errors import DataError, UsageError
from pipeline.staging import write_whole
from train.checkpoint import Checkpoint, list_steps, newest, place, verify
from train.command import read_yaml
from train.config import Run, as_values, differences, with_values

CONFIG = "config.yaml"


def checkpoints(out: Path) -> Path:
    return out / "checkpoints"


def saved_settings(out: Path, name: str = CONFIG) -> dict | None:
    """The resolved settings of the run in this folder, or None if there is none yet."""
    return read_yaml(out / name) if (out / name).exists() else None


def run_settings(out: Path) -> Run:
    """What the run in this folder was settled to. Raises DataError where there is none."""
    saved = saved_settings(out)
    if saved is None:
        raise DataError(f"{out} is no run folder: it has no {CONFIG}.")
    return with_values(Run(), saved, str(out / CONFIG))


def chosen_checkpoint(out: Path, wish: str | None) -> Checkpoint:
    """The checkpoint that is asked for, or the newest that verifies; of damaged ones before it stderr tells.

    wish: its step or its folder. Raises DataError where there is none, or that one is damaged.
    """
    damage: list[str] = []
    found = _asked_for(out, wish) or newest(checkpoints(out), damage.append)
    if found is None:
        raise DataError(damage[0] if damage else f"{out} has no checkpoint yet.")
    for sentence in damage:
        print(f"warning: {sentence} Taking step {found.step:,}.", file=sys.stderr)
    return found


def _asked_for(out: Path, wish: str | None) -> Checkpoint | None:
    """The checkpoint of this step or in this folder; None where nothing is asked for. Raises DataError."""
    if not wish:
        return None
    if not wish.isdecimal():
        return verify(Path(wish))
    path = place(checkpoints(out), int(wish))
    if not path.is_dir():
        there = ", ".join(f"{int(one.name.removeprefix('step_')):,}" for one in list_steps(path.parent)) or "none"
        raise DataError(f"{out} has no checkpoint of step {int(wish):,} (it has: {there}).")
    return verify(path)


def check_same_run(out: Path, asked: dict, allow_resume: bool, name: str = CONFIG) -> None:
    """Raises UsageError, naming each difference, where `out` holds a run with other settings."""
    saved = saved_settings(out, name)
    if saved is None:
        return
    if not allow_resume:
        raise UsageError(
            f"--out {out} holds a run already. Choose another folder, leave out --no-resume, or --overwrite."
        )
    if name == CONFIG:  # a folder from before there was a setting has the setting's default
        saved = as_values(with_values(Run(), saved, str(out / CONFIG)))
    else:  # a fine-tuning from before there was a setting may have had any value of it
        saved = {**asked, **saved}
    different = differences(saved, asked)
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise UsageError(
            f"--out {out} belongs to another configuration ({'; '.join(different[:4])}{more}). "
            "Choose another folder, or --overwrite."
        )


def write_settings(out: Path, run: Run) -> None:
    write_whole(out / CONFIG, yaml.safe_dump(as_values(run), sort_keys=False))


def resume_point(out: Path, wish: str | None, fingerprint: str, images: int, warn) -> Checkpoint | None:
    """The checkpoint to go on from: the one asked for by step or folder, or the newest that verifies.

    Raises DataError: the one asked for is damaged or not there, all are damaged, or the data set is not that of the
    checkpoint.
    """
    found = _asked_for(out, wish) or newest(checkpoints(out), warn)
    if found is None:
        if list_steps(checkpoints(out)):
            raise DataError(f"every checkpoint in {checkpoints(out)} is damaged. Use another --out, or --overwrite.")
        return None
    state = found.state
    if state["data"] != fingerprint:
        raise DataError(
            f"the data set changed since step {state['step']:,} ({state['images_in_store']:,} -> {images:,} images; "
            f"fingerprint {state['data']} -> {fingerprint}). Use the old one, or another --out."
        )
    return found
