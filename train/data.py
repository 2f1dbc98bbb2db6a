"""The loader that a run's settings describe: training, its rehearsal and the profiler open the same one."""

from __future__ import annotations

from pipeline.loader import Loader, check_batch, open_loader
from pipeline.store import Store
from pipeline.views import check_views
from train.config import Run


def check_data(run: Run, store: Store) -> None:
    """Whether a run fits a store. Raises UsageError (no grid of patches fits a view), DataError (too few images)."""
    check_views(run.method.views(run.model), run.model.patch)
    check_batch(store, run.optim.batch)


def open_data(run: Run, store: Store) -> Loader:
    """run: resolved, so that device and backend are known. Raises what check_data and open_loader raise."""
    check_data(run, store)
    speed = run.speed
    return open_loader(
        store, run.method.views(run.model), batch=run.optim.batch, seed=run.seed, backend=run.loader, device=run.device,
        workers=speed.workers, ahead=speed.ahead, hw_decoder_load=speed.hw_decoder_load,
        stall_seconds=speed.stall_seconds,
    )  # fmt: skip
