"""Training seconds: what the claim is about.

Only time between `start` and `pause` counts: waiting for data, views, forward, backward, optimizer. Set-up,
calibration, evaluation and checkpoints happen while the clock is paused. It is saved with a checkpoint and goes on
after a resume.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch


@dataclass
class Clock:
    train_seconds: float = 0.0
    images: int = 0
    _since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def pause(self, device: torch.device) -> None:
        """CUDA calls return before the work is done: wait for it, or the clock would measure the queue."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if self._since is not None:
            self.train_seconds += time.perf_counter() - self._since
            self._since = None

    def state(self) -> dict[str, float]:
        return {"train_seconds": self.train_seconds, "images": self.images}

    def load(self, state: dict) -> None:
        self.train_seconds = state["train_seconds"]
        self.images = int(state["images"])


def process_seconds() -> float:
    """Since this process was started, its imports included."""
    return time.time() - psutil.Process().create_time()
