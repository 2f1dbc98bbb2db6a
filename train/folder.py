"""The run folder: what it belongs to, and where a stopped run goes on."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline.errors import DataError, UsageError
from pipeline.staging import write_whole
from train.checkpoint import Checkpoint, list_steps, newest, verify
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


def chosen_checkpoint(out: Path, path: str | None, warn) -> Checkpoint:
    """The named checkpoint, or the newest of the run that verifies. Raises DataError where that is none."""
    found = verify(Path(path)) if path else newest(checkpoints(out), warn)
    if found is None:
        raise DataError(f"{out} holds no whole checkpoint.")
    return found


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
    different = differences(saved, asked)
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise UsageError(
            f"--out {out} belongs to another configuration ({'; '.join(different[:4])}{more}). "
            "Choose another folder, or --overwrite."
        )


def write_settings(out: Path, run: Run) -> None:
    write_whole(out / CONFIG, yaml.safe_dump(as_values(run), sort_keys=False))


def resume_point(out: Path, path: str | None, fingerprint: str, images: int, warn) -> Checkpoint | None:
    """The checkpoint to go on from: the named one, or the newest that verifies.

    Raises DataError: the named one is damaged, all are damaged, or the data set is not the one of the checkpoint.
    """
    found = verify(Path(path)) if path else newest(checkpoints(out), warn)
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
