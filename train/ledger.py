"""What the seconds of a run went into.

Parts may lie in one another (the encoder in the losses): a second counts for the innermost. On a GPU each part is
marked by events on the stream, read when the ledger is, so that nothing waits for the device in between.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# What the training clock counts; "other" is the rest of it. A compiled network is counted whole under "losses". Copies
# to the GPU overlap the previous step; what does not overlap counts as "data wait".
TRAINING = ("data wait", "views", "encoder", "decoder", "losses", "backward", "optimizer")
ASIDE = ("start-up", "evaluation", "checkpoint")  # off that clock
PARTS = (*TRAINING, "other", *ASIDE)  # in the order in which a picture of them is read


class Ledger:
    """`with ledger("views"): …` adds the seconds of the block to its part."""

    def __init__(self, device: torch.device | str, *, on: bool = True):
        self.device, self.on = torch.device(device), on
        self._open: list[str] = []
        self._marks: list[tuple[str, Any, Any]] = []  # part, start, end: seconds, or events still to be read
        self._since: Any = None
        self._seconds: dict[str, float] = defaultdict(float)

    def __call__(self, part: str) -> Ledger:
        self._next = part
        return self

    def __enter__(self) -> None:
        self._turn(self._next, opens=True)

    def __exit__(self, *_: object) -> None:
        self._turn(None, opens=False)

    def watch(self, network: nn.Module) -> None:
        """Have the modules enter themselves that say what they are (`ledger_part`). A compiled network would break at
        these hooks."""
        for module in network.modules():
            part = getattr(module, "ledger_part", None)
            if part is not None:
                module.register_forward_pre_hook(lambda *_, part=part: self._turn(part, opens=True))
                module.register_forward_hook(lambda *_: self._turn(None, opens=False), always_call=True)

    @contextlib.contextmanager
    def aside(self, part: str) -> Iterator[None]:
        """What is no training: by the host's clock, and nothing inside it is marked."""
        on, self.on = self.on, False
        start = time.perf_counter()
        try:
            yield
        finally:
            self.on = on
            self.add(part, time.perf_counter() - start)

    def add(self, part: str, seconds: float) -> None:
        self._seconds[part] += seconds

    def read(self) -> dict[str, float]:
        """Seconds by part so far. Waits for the device."""
        if self._marks and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for part, start, end in self._marks:
            self._seconds[part] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        self._marks.clear()
        return dict(self._seconds)

    def load(self, seconds: dict[str, float]) -> None:
        self._seconds = defaultdict(float, seconds)

    def _turn(self, part: str | None, *, opens: bool) -> None:
        """The seconds since the last turn belong to the part that was innermost until now."""
        if not self.on:
            return
        now = self._now()
        if self._open:
            self._marks.append((self._open[-1], self._since, now))
        if opens:
            assert part is not None
            self._open.append(part)
        else:
            self._open.pop()
        self._since = now

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
