"""The processes that train one network together, one a device, as torchrun starts them. Alone there is rank 0 of 1.

Besides averaging gradients, which is DistributedDataParallel's work, they have to agree on when to stop, and none may
wait for ever for another that died, hangs or was stopped. For that each beats once a second in torchrun's key-value
store, and looks at the others' beats.
"""

from __future__ import annotations

# torch.distributed documents names that it does not list.
# pyright: reportPrivateImportUsage=false
import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import DaaeError, Preempted, ResourceError, StalledError, UsageError

BEAT_SECONDS = 1.0
SILENT_SECONDS = 6.0  # without a beat, after which a process counts as lost
START_SECONDS = 120.0  # for all of them to be there
GONE = "gone"  # the beat of a process that has left on purpose


class Followed(StalledError):
    """Another rank has said why it ends, and this one ends with it, and with its code."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


class Ranks:
    """This process among the others. What is said to a person, and what is written, is rank 0's business."""

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0, local_count: int = 1):
        self.rank, self.count, self.local, self.local_count = rank, count, local, local_count
        self.side: Any = None  # a group on the CPU, for what is no tensor of the network
        self._store: Any = None
        self._vote: tuple[Any, Tensor] | None = None
        self._leaving, self._told = threading.Event(), threading.Event()
        self.on_loss: Callable[[DaaeError], None] = lambda _: None  # what is still to be written then

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises UsageError on every rank, naming the first that differs from rank 0 and in what."""
        if self.count == 1:
            return
        every: list[dict] = [{}] * self.count
        dist.all_gather_object(every, dict(facts), group=self.side)
        for rank, theirs in enumerate(every):
            different = [name for name in facts if theirs.get(name) != every[0].get(name)]
            if different:
                raise UsageError(
                    f"rank {rank} differs from rank 0 in "
                    + "; ".join(f"{name}: {theirs.get(name)} there, {every[0].get(name)} here" for name in different)
                    + ". Start every process with the same command and the same data."
                )

    def any(self, mine: bool) -> bool:
        """Whether any rank said yes the last time; what is said now is heard the next time.

        Every rank calls it once a step and gets the same answer at the same step. It waits for nobody but the slowest
        of a step ago, so it costs no time.
        """
        if self.count == 1:
            return mine
        heard = False
        if self._vote is not None:
            work, answer = self._vote
            with self.waiting("a vote"):
                work.wait()
            heard = bool(answer.item())
        ballot = torch.tensor(int(mine))
        self._vote = (dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self.side, async_op=True), ballot)
        return heard

    def mean(self, values: Tensor) -> Tensor:
        """Over the ranks; every rank calls it."""
        if self.count > 1:
            with self.waiting("the metrics"):
                dist.all_reduce(values)
            values = values / self.count
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        with self.waiting("what rank 0 decides"):
            dist.broadcast_object_list(box, src=0, group=self.side)
        return box[0]

    def tell(self, occasion: str, word: str) -> None:
        """Rank 0 has done what the others wait for in `hear`. An occasion has a name of its own."""
        if self.count > 1:
            self._store.set(f"done/{occasion}", word)

    def hear(self, occasion: str) -> str:
        """Rank 0's word, however long it takes: no collective, whose patience would end. A dead rank 0 is noticed."""
        with self.waiting(f"waiting for rank 0 ({occasion})"):
            looked = 0.0
            while not self._store.check([f"done/{occasion}"]):
                if time.monotonic() - looked > 1.0:  # each look asks the store once for every rank
                    self.look_around()
                    looked = time.monotonic()
                time.sleep(0.1)
            return self._store.get(f"done/{occasion}").decode()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Turn what torch raises when another process has gone into a sentence that names it."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise self.lost(what, str(error)) from error

    def lost(self, what: str, why: str) -> DaaeError:
        """The error for a collective that failed: whose fault it was, as far as the beats tell."""
        self._told.set()
        end = time.monotonic() + SILENT_SECONDS + BEAT_SECONDS
        while time.monotonic() < end:
            try:
                self.look_around()
            except DaaeError as error:
                return error
            except RuntimeError:  # so does their store
                break
            time.sleep(BEAT_SECONDS / 4)
        return StalledError(f"rank {self.rank} could not finish {what} with the others: {' '.join(why.split())[:300]}.")

    # --- beats ---

    def farewell(self, reason: str, code: int) -> None:
        """The last beat: why this process ends, and its exit code; an empty reason where it ends in peace."""
        self._leaving.set()
        # A thread that is in the store's C++ when Python ends would take the process down with it.
        self._thread.join(timeout=SILENT_SECONDS)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"beat/{self.rank}", f"{GONE} {code} {reason}" if reason else GONE)

    def look_around(self) -> None:
        """Raises StalledError naming a rank that has left with an error, or has not beaten for SILENT_SECONDS."""
        silent = self._silent
        for rank in range(self.count):
            if rank == self.rank:
                continue
            beat = self._store.get(f"beat/{rank}").decode()
            if beat.startswith(f"{GONE} "):
                _, code, reason = beat.split(" ", 2)
                raise Followed(f"rank {rank} stopped: {reason}", int(code))
            if silent[rank][0] != beat:
                silent[rank] = (beat, time.monotonic())
            elif beat != GONE and time.monotonic() - silent[rank][1] > SILENT_SECONDS:
                host = beat.partition(" ")[2]
                raise StalledError(
                    f"rank {rank} on {host} has given no sign of life for {SILENT_SECONDS:.0f} s: it was killed or "
                    "stopped, or its machine is gone. The same command goes on from the last checkpoint."
                )

    def _beat(self) -> None:
        """Says that this process lives, and ends it where another is lost: a collective would wait for that one."""
        number, host = 0, socket.gethostname()
        while not self._leaving.wait(BEAT_SECONDS):
            number += 1
            try:
                self._store.set(f"beat/{self.rank}", f"{number} {host}")
                self.look_around()
            except RuntimeError:
                return  # the launcher has gone, and ends its processes
            except DaaeError as error:
                # The main thread may sit in a collective, which nothing interrupts. It is given a moment to see for
                # itself, so that what it has to write is written.
                if self._leaving.wait(10.0 if self._told.wait(1.5) else 0.0):
                    return
                self.on_loss(error)
                if self.first or not isinstance(error, Followed):
                    print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(error.code)

    def _start(self, side: Any, store: Any) -> None:
        self.side, self._store = side, store
        self._silent = {rank: ("", time.monotonic()) for rank in range(self.count)}
        store.set(f"beat/{self.rank}", f"0 {socket.gethostname()}")
        dist.barrier(group=side)  # from here on everybody has beaten
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._thread.start()


def wanted() -> Ranks:
    """What torchrun has put into the environment; alone where it did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0, 1), strict=True)]
    return Ranks(*values)


@contextlib.contextmanager
def together(device: torch.device, stall_seconds: float) -> Iterator[Ranks]:
    """Join the processes that torchrun has started.

    stall_seconds: how long a collective may wait. Raises ResourceError where they do not find one another.
    """
    ranks = wanted()
    if ranks.count == 1:
        yield ranks
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A vote or a sum lasts as long as the slowest rank's longest pause: a checkpoint, or a loader that waits.
    patience = datetime.timedelta(seconds=stall_seconds + 60)
    try:
        meeting = dist.rendezvous("env://", timeout=datetime.timedelta(seconds=START_SECONDS))
        store, rank, count = next(meeting)
        # A group that torchrun has restarted finds the words of the one before it in the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(
            backend, store=dist.PrefixStore("torch", store), rank=rank, world_size=count, timeout=patience
        )
        ranks._start(dist.new_group(backend="gloo", timeout=patience), dist.PrefixStore("daae", store))
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"rank {ranks.rank} of {ranks.count} cannot join the others: {' '.join(str(error).split())[:300]}. "
            "Start every process with torchrun, or `daae pretrain --gpus N`."
        ) from None
    reason, code, peace = "", 0, False
    try:
        yield ranks
        peace = True
    except Preempted:  # all of them stop at the same step, each in its time
        peace = True
        raise
    except Followed:  # one has said it
        raise
    except BaseException as error:
        ours = isinstance(error, DaaeError)
        reason, code = (f"{error}", error.code) if ours else (f"{type(error).__name__}: {error}", StalledError.code)
        raise
    finally:
        ranks.farewell(reason, code)
        with contextlib.suppress(Exception):
            if peace or backend == "gloo":
                dist.destroy_process_group()
            else:  # NCCL would wait for what the others have not sent
                dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportAttributeAccessIssue]
