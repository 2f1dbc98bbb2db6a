"""`daae` commands one after another, each printed before it runs, and the stores of the named data sets."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.interpreter import python
from tools.children import Stop, failure

PATIENCE_SECONDS = 150.0  # after a signal; a comparison gives its own run 120


@dataclass(frozen=True)
class Parts:
    """How a named data set lies in its folder: what is trained on, what is tested on."""

    train: str  # folder below the fetched one; "" is the folder itself
    tests: tuple[str, ...] = ()
    label: str | None = None


DATA_SETS = {
    "emoji": Parts("train", ("fluent", "emojione"), "subcategory"),
    "elpv": Parts(""),
    "imagenette": Parts("train", ("val",)),
    "synthetic": Parts("train", ("val",)),
}


@dataclass
class Commands:
    """Nothing is decided here that the commands do not decide themselves: each sees what is done already, so a chain of
    them may be stopped anywhere and called again."""

    out: Path  # images and stores go below it
    stop: Stop
    what: str  # the chain, as a sentence names it
    loud: bool = True  # on stdout; otherwise that stays free for a result, and all of it goes to stderr

    def stores(self, name: str, source: Path, parts: Parts) -> tuple[Path, list[Path]]:
        """The store to train on and those to test on."""
        from pipeline.store import MANIFEST  # and numpy, which no --help waits for

        if (source / MANIFEST).is_file():  # a store already
            return source, []
        stores = []
        for part in (parts.train, *parts.tests):
            store = self.out / "stores" / "-".join(filter(None, (name, part)))
            self.call("convert", str(source / part), str(store))
            stores.append(store)
        return stores[0], stores[1:]

    def call(self, *words: str, listen: bool = False) -> str:
        """Print a command and run it; with `listen`, return what it printed, which is shown all the same.

        Raises what the command failed with.
        """
        self.stop.check(self.what)
        to = sys.stdout if self.loud else sys.stderr
        print(f"\n$ {shlex.join(['daae', *words])}", file=to, flush=True)
        command = python("-m", "tools.cli", *words)
        # A process group of its own: Ctrl-C reaches it once, through `stop`.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if listen else None if self.loud else to.fileno(),
            text=True, process_group=0,
        )  # fmt: skip
        code = self.stop.watch(child)  # before reading: two lines fit a pipe, and a signal must find its way
        said = ""
        if child.stdout is not None:
            with child.stdout:
                said = child.stdout.read()
            print(said, end="", file=to, flush=True)
        self.stop.check(self.what)
        if code:
            raise failure(code if code > 0 else 6, f"`daae {words[0]}` ended with exit code {code}; it says why above.")
        return said
