"""How far a long job has come, on stderr: a bar on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

LINE_SECONDS = 30.0


class Progress:
    """`with progress.show(): progress.at(...)`. Quiet says nothing at all."""

    def __init__(self, what: str, *, total_bytes: int = 0, total_images: int = 0, quiet: bool = False) -> None:
        self.what, self.quiet = what, quiet
        self.total_bytes, self.total_images = total_bytes, total_images
        self.bar = None

    @contextlib.contextmanager
    def show(self) -> Iterator[None]:
        self.start = time.monotonic()
        self.next_line = self.start + LINE_SECONDS
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.percentage:>3.0f} %  {task.fields[rates]}  ETA"),
            progress.TimeRemainingColumn(compact=True),
        )
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as self.bar:
            self.task = self.bar.add_task(self.what, total=self.total_bytes or self.total_images, rates="")
            yield

    def at(self, *, images: int = 0, done_bytes: int = 0, bad: int = 0) -> None:
        """What is done so far, of the totals given at the start."""
        now = time.monotonic()
        if self.quiet or (self.bar is None and now < self.next_line):
            return
        seconds = max(now - self.start, 1e-3)
        done, total = (done_bytes, self.total_bytes) if self.total_bytes else (images, self.total_images)
        rates = [f"{images / seconds:,.0f} images/s"] if images else []
        rates += [f"{done_bytes / seconds / 1e6:,.1f} MB/s"] if done_bytes else []
        rates += [f"{bad:,} bad"] if bad else []
        if self.bar is not None:
            self.bar.update(self.task, completed=done, rates="  ".join(rates))
            return
        self.next_line = now + LINE_SECONDS
        count = f"{images:,} of {self.total_images:,} images  " if images else ""
        left = f"  ETA {seconds * (total - done) / done:,.0f} s" if done else ""
        print(f"{self.what}: {count}{done / max(total, 1):.0%}  {'  '.join(rates)}{left}", file=sys.stderr, flush=True)
