"""How things are timed: in rounds, wall seconds beside CPU seconds, and what others took of the machine meanwhile."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One round of one timing."""

    images: int
    seconds: float
    cpu_seconds: float
    wait_seconds: float = 0.0

    def minus(self, other: Sample) -> Sample:
        """What is left of the time for the same images: a fiftieth at least, below which a difference is noise."""
        assert self.images == other.images
        return Sample(
            self.images,
            max(self.seconds / 50, self.seconds - other.seconds),
            max(self.cpu_seconds / 50, self.cpu_seconds - other.cpu_seconds),
        )


@dataclass(frozen=True)
class Spread:
    """Over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Stage:
    """One thing that was timed."""

    images_per_second: Spread
    cpu_ms_per_image: float  # of the whole process, all threads, user and system; median over the rounds
    data_wait: float = 0.0  # share of the seconds in which the step waited for the loader

    @property
    def rate(self) -> float:
        return self.images_per_second.median

    @property
    def seconds_per_image(self) -> float:
        return 1 / self.rate

    @property
    def cores(self) -> float:
        """How many cores were busy."""
        return self.rate * self.cpu_ms_per_image / 1000


def summarise(samples: Sequence[Sample]) -> Stage:
    rates = [each.images / each.seconds for each in samples]
    return Stage(
        Spread.of(rates),
        statistics.median(1000 * each.cpu_seconds / each.images for each in samples),
        statistics.median(each.wait_seconds / each.seconds for each in samples),
    )


class Watch:
    """Adds up the seconds of blocks: `with watch: …`, as often as wanted."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = 0.0, 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]

    def sample(self, images: int) -> Sample:
        return Sample(images, self.seconds, self.cpu_seconds)


@contextlib.contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 2)


class Neighbours:
    """How many cores other processes took since it was made, if that left none free: then our rates are too low."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        import psutil

        every = psutil.cpu_times(percpu=True)
        ours = [
            every[core] for core in os.sched_getaffinity(0) if core < len(every)
        ]  # what others do elsewhere is theirs
        idle = sum(times.idle + getattr(times, "iowait", 0.0) for times in ours)
        return time.perf_counter(), sum(sum(times[:8]) for times in ours) - idle, idle, time.process_time()

    def cores(self) -> float:
        seconds, busy, idle, own = (now - before for now, before in zip(self._now(), self.start, strict=True))
        others = (busy - own) / seconds
        return round(others, 1) if others > 0.2 and idle / seconds < 0.3 else 0.0
