"""The loader that a run's settings describe: training, its rehearsal and the profiler open the same one."""

from __future__ import annotations

from pipeline.errors import UsageError
from pipeline.loader import Loader, check_batch, open_loader
from pipeline.store import Store
from pipeline.views import check_views
from train.config import Run
from train.ranks import Ranks
from train.stages import parts_of


def check_data(run: Run, store: Store, ranks: int = 1) -> None:
    """Whether a run, every stage of it, fits a store and its ranks.

    Raises UsageError (no grid of patches fits a view, a batch that cannot be shared out), DataError (too few images).
    """
    for _, part in parts_of(run):
        check_views(part.method.views(part.model), part.model.patch)
        check_batch(store, part.optim.batch)
        if part.optim.batch % (ranks * part.optim.accumulate):
            raise UsageError(
                f"--batch {part.optim.batch} cannot be shared out evenly among {ranks} processes"
                + (f" in {part.optim.accumulate} parts each (--accum-iter)." if part.optim.accumulate > 1 else ".")
            )


def open_data(run: Run, store: Store, ranks: Ranks | None = None) -> Loader:
    """The loader of a run in one part, or of one stage.

    run: resolved, so that device and backend are known. Raises what check_data and open_loader raise.
    """
    ranks = ranks or Ranks()
    check_data(run, store, ranks.count)
    speed = run.speed
    return open_loader(
        store, run.method.views(run.model), batch=run.optim.batch, seed=run.seed, backend=run.loader, device=run.device,
        workers=speed.workers, ahead=speed.ahead, hw_decoder_load=speed.hw_decoder_load,
        stall_seconds=speed.stall_seconds, rank=ranks.rank, ranks=ranks.count, ranks_here=ranks.local_count,
    )  # fmt: skip
