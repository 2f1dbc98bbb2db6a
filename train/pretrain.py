"""`daae pretrain`: from flags to a run. The loop itself is in loop.py; torch is imported only when it starts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipeline.errors import UsageError
from train.allocator import keep_memory
from train.command import normalise, parse, read_yaml, run, settings
from train.config import ALIASES, Budget, Run, as_values, flat, of_type, typed, with_values
from train.help import opposite
from train.presets import PRESETS, open_preset

# MAE's own names of models, for pasted commands without a preset.
MAE_MODELS = {f"mae_vit_{size}_patch16": f"mae-vit{size[0]}16" for size in ("base", "large")}


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Flags of the command that are no setting of the run."""

    config: Path | None = None
    """YAML of settings, laid over the preset and under the flags; config.yaml of a run folder fits."""
    resume: str | None = None
    """Step of the checkpoint to start from, or its folder; a damaged one is an error, never a fallback."""
    no_resume: bool = False
    """Refuse to go on where --out holds an unfinished run."""
    overwrite: bool = False
    """Delete what --out holds and start anew."""
    dry_run: bool = False
    """Check everything, print the plan (steps, rates, FLOPs, memory, hours) and stop."""
    images_per_second: float | None = None
    """For --dry-run: project hours from this rate."""
    images: int | None = None
    """For --dry-run without --data: how many images an epoch has."""
    limit_steps: int | None = None
    """Stop with a checkpoint after this many steps of this call; the schedule stays that of the whole run."""
    until_score: bool = False
    """Stop with a checkpoint after the next score, or at the end; the same command goes on."""
    baselines: Path | None = None
    """Run folder with the same seed, encoder and tests, whose scores of pixels and the untrained encoder are taken."""
    print_config: bool = False
    """Print every setting with where it comes from, and stop."""
    list_presets: bool = False
    """Name the recipes with a line each, and stop."""
    gpus: int | None = None
    """Train on so many GPUs of this machine, a process each; without GPUs, in so many processes."""
    quiet: bool = False
    """No progress; errors are still said."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: list[str]) -> int:
    wish, controls, sources = read_flags(argv)
    if controls.list_presets:
        return list_presets(controls.json)
    if controls.print_config:
        for name, value in flat(as_values(wish)).items():
            print(f"{name}: {json.dumps(value)}  # {sources.get(name, wish.preset)}")
        return 0
    if controls.gpus is not None and controls.gpus < 1:
        raise UsageError(f"--gpus is at least 1, not {controls.gpus}.")
    wish.check()
    if controls.dry_run:
        from train.plan import print_plan

        return print_plan(wish, controls)
    if wish.data is None or wish.out is None:
        missing = "--data (a store made by `daae convert`)" if wish.data is None else "--out (the run folder)"
        raise UsageError(f"{missing} is required. See `daae pretrain --help`.")
    if controls.gpus is not None and controls.gpus > 1 and "RANK" not in os.environ:
        from train.launch import launch

        return launch("train.pretrain", controls.gpus, argv, wish.out)
    from train.loop import pretrain

    result = pretrain(wish, controls)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result) if controls.json else result["sentence"])
    return 0


def read_flags(argv: list[str]) -> tuple[Run, Controls, dict[str, str]]:
    """Settings by the order preset < --config < flags, and where each that is not the preset's comes from."""
    argv = _accept_mae_flags(argv)
    early = _early(argv, "preset", "config", "objective")
    sources: dict[str, str] = {}
    preset = early.get("preset")
    values = read_yaml(early["config"]) if "config" in early else {}
    start = open_preset(preset or values.get("preset", "custom")) if (preset or _known_preset(values)) else Run()
    if values:
        if preset:
            values = {**values, "preset": preset}
        start = with_values(start, values, early["config"])
        sources.update(dict.fromkeys(flat(values), early["config"]))
    objective = early.get("objective", start.objective)
    base = typed(objective)
    # A class of its own, so that the method's options and the controls are flags beside the settings.
    command = dataclasses.make_dataclass("Pretrain", [], bases=(base, Controls), frozen=True, kw_only=True)
    command.__doc__ = "Train an encoder. The same command resumes a run that was stopped."
    words = normalise(command, argv, ALIASES)
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if any(flag.startswith("--budget.") for flag in given):  # a wish for seconds replaces the preset's for epochs
        start = dataclasses.replace(start, budget=Budget())
    if "--optim.base-lr" in given and "--optim.lr" not in given:  # a rate per 256 images replaces the preset's rate
        start = dataclasses.replace(start, optim=dataclasses.replace(start.optim, lr=None))
    default = of_type(dataclasses.replace(start, objective=objective), command)
    flags = cast(Any, parse(command, words, prog="daae pretrain", default=default, aliases=ALIASES))
    negated = {opposite(setting.flag): setting.flag for setting in settings(command) if setting.boolean}
    sources.update({negated.get(flag, flag)[2:].replace("-", "_"): "flag" for flag in given})
    wish = base(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(base)})
    controls = Controls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Controls)})
    return wish, controls, sources


def _known_preset(values: dict) -> bool:
    return values.get("preset", "custom") != "custom"


def _early(argv: list[str], *names: str) -> dict[str, str]:
    """Flags that decide which other flags there are, read before the rest."""
    found = {}
    for at, word in enumerate(argv):
        name, equals, value = word.partition("=")
        key = name.lstrip("-").replace("-", "_")
        if word.startswith("--") and key in names:
            found[key] = value if equals else (argv[at + 1] if at + 1 < len(argv) else "")
    return found


def _accept_mae_flags(argv: list[str]) -> list[str]:
    """Pasted commands of MAE's script: --model names a preset, --batch_size counts one device's share."""
    words, per_device, at = [], None, 0
    while at < len(argv):
        name, equals, value = argv[at].partition("=")
        if name in ("--model", "--batch_size", "--batch-size"):
            if not equals:
                at += 1
                value = argv[at] if at < len(argv) else ""
            if name == "--model":
                if value not in MAE_MODELS:
                    raise UsageError(
                        f"--model {value} is unknown. MAE's names here: {', '.join(MAE_MODELS)}; or --preset."
                    )
                words += ["--preset", MAE_MODELS[value]]
            else:
                per_device = value
        else:
            words.append(argv[at])
        at += 1
    if per_device is not None:
        factors = {"batch_size": per_device, **_early(argv, "accum_iter", "gpus")}
        if world := os.environ.get("WORLD_SIZE"):  # in the processes that --gpus or torchrun has started
            factors["gpus"] = world
        for name, value in factors.items():
            if not value.isdigit():
                raise UsageError(f"--{name} wants a number, not {value!r}.")
        words += ["--batch", str(math.prod(map(int, factors.values())))]
    return words


def list_presets(as_json: bool) -> int:
    rows = {name: " ".join((recipe.__doc__ or "").split()) for name, recipe in PRESETS.items()}
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        width = max(map(len, rows))
        print("\n".join(f"{name:<{width}}  {summary}" for name, summary in rows.items()))
    return 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(run(main))
