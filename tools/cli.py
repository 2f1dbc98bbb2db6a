"""`daae`: a sub-command is a module with a `main(argv)`, imported only when it is called."""

from __future__ import annotations

import importlib
import sys

from pipeline.errors import UsageError
from train.allocator import keep_memory
from train.command import nearest, run

COMMANDS = {  # name -> (module, what it does), in the order in which they are used
    "fetch": ("tools.fetch", "bring a named data set into a folder of image files"),
    "convert": ("tools.convert", "turn a folder, archives or tables of images into a store that loads fast"),
    "verify": ("tools.verify", "check every file and picture of a store; --fix drops what is bad"),
    "inflate": ("tools.inflate", "train a generator on a store, and write what it draws as another store"),
    "profile": ("tools.profile", "time loader, step and both; name the bottleneck"),
    "methods": ("tools.methods", "name the methods: idea, views, cost beside MAE's, paper"),
    "pretrain": ("train.pretrain", "train an encoder by a preset; the same command resumes"),
    "evaluate": ("train.evaluate", "score a checkpoint: kNN, ridge, linear and logistic probes beside two baselines"),
    "finetune": ("train.finetune", "train a checkpoint's encoder and a head on labels, end to end, and score it"),
    "compare": ("tools.compare", "run recipes side by side at equal wall time"),
    "report": ("tools.report", "turn runs into one self-contained HTML file"),
    "reproduce": ("tools.reproduce", "is the 2x real here? The standard set, from nothing to a sentence"),
    "export": ("tools.export", "write a run's encoder as safetensors that timm loads"),
    "doctor": ("tools.doctor", "what this machine has and lacks"),
}
# Those that train, or time what does; in processes of their own, which inherit how memory is taken, or in this one.
TRAINING = ("inflate", "profile", "methods", "pretrain", "evaluate", "finetune", "compare", "reproduce")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if argv is None and words and words[0] in TRAINING:
        keep_memory()
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
        print("usage: daae COMMAND [flags]\n\n" + "\n".join(lines) + "\n\n`daae COMMAND --help` lists its flags.")
        return 0
    name, rest = words[0], words[1:]
    return run(lambda _: _dispatch(name)(rest), [])


def _dispatch(name: str):
    if name not in COMMANDS:
        raise UsageError(f"{name} is no command.{nearest(name, COMMANDS)} `daae --help` lists them.")
    return importlib.import_module(COMMANDS[name][0]).main


if __name__ == "__main__":
    sys.exit(main())
