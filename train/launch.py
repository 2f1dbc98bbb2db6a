"""`--gpus N`: torchrun's agent starts the same command N times; the run's own exit code comes back."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import Preempted, StalledError
from pipeline.interpreter import python
from pipeline.limits import usable_cores
from train.json_files import read_object
from train.stop import SIGNALS


def launch(module: str, processes: int, words: Sequence[str], out: Path) -> int:
    """Run `python -m MODULE` with these words in so many processes of this machine.

    out: the run's folder, whose status tells why it failed. Returns its exit code. Signals reach the processes through
    the agent, which waits for them to save.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not torch.cuda.is_available():
        shared = f"{usable_cores():g} cores of this machine"
        print(f"note: there is no GPU here; {processes} processes share the {shared}.", file=sys.stderr)
    # The agent would give each process one thread; where there are no GPUs they have the cores to share.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(usable_cores()) // processes)))
    # What the processes say is enough; the agent would put a page of traceback behind each sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=f"daae-{os.getpid()}", max_restarts=0,
        signals_to_handle=",".join(each.name for each in (*SIGNALS, signal.SIGQUIT)),
    )  # fmt: skip
    started = time.time()
    try:
        program, *flags = python("-m", module, *words)
        elastic_launch(config, program)(*flags)
    except ChildFailedError as failed:
        first = failed.get_first_failure()[1].exitcode
        return _told(out, started) or (first if first > 0 else StalledError.code)
    except SignalException:
        return _told(out, started) or Preempted.code
    return 0


def _told(out: Path, started: float) -> int:
    """What the run says of itself; 0 where it says nothing."""

    status = read_object(out / "status.json")
    return int(status.get("code") or 0) if status.get("heartbeat", 0.0) >= started else 0
