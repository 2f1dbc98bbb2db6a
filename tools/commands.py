"""`daae` commands one after another, each printed before it runs, and the stores of the named data sets."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.children import PassOn, failure, start

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
    stop: PassOn
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

    def call(self, *words: str) -> None:
        """Print a command and run it. Raises what it failed with."""
        self.stop.check(self.what)
        to = sys.stdout if self.loud else sys.stderr
        print(f"\n$ {shlex.join(['daae', *words])}", file=to, flush=True)
        code = start(["tools.cli", *words], self.what, self.stop, None if self.loud else to.fileno())
        if code:
            raise failure(code if code > 0 else 6, f"`daae {words[0]}` ended with exit code {code}; it says why above.")
