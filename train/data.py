"""The loader that a run's settings describe: training, its rehearsal and the profiler open the same one."""

from __future__ import annotations

from pipeline.errors import UsageError
from pipeline.inflated import Inflated
from pipeline.labelled import Labelled
from pipeline.loader import Loader, check_batch, open_loader
from pipeline.store import Store
from pipeline.views import check_views, group_size
from train.config import Run
from train.ranks import Ranks
from train.stages import parts_of


def open_store(run: Run) -> Store:
    """The images that a run trains on; of a method that learns from labels, those with one.

    Raises DataError, UsageError.
    """
    assert run.data is not None
    real, wish = Store.open(run.data), run.inflate
    column = label_column(run, real)
    if column is None:
        return real if wish.data is None else Inflated.join(real, wish.data, wish.real_repeat)
    if wish.data is not None:
        raise UsageError(f"--objective {run.objective} learns from labels, and generated images (--inflate) have none.")
    return Labelled.of(real, column)


def check_data(run: Run, store: Store, ranks: int = 1) -> None:
    """Whether a run, every stage of it, fits a store and its ranks.

    Raises UsageError (no grid of patches fits a view, a batch that cannot be shared out, labels missing that a method
    learns from), DataError (too few images).
    """
    for _, part in parts_of(run):
        views, batch, parts = part.method.views(part.model), part.optim.batch, ranks * part.optim.accumulate
        check_views(views, part.model.patch)
        check_batch(store, batch)
        if batch % parts:
            raise UsageError(
                f"--batch {batch} cannot be shared out evenly among {ranks} processes"
                + (f" in {part.optim.accumulate} parts each (--accum-iter)." if part.optim.accumulate > 1 else ".")
            )
        if batch // parts % (group := group_size(views)):
            raise UsageError(
                f"--batch {batch} in {parts} parts (processes times --accum-iter) makes parts of {batch // parts} "
                f"images, and --method.group {group} wants a multiple of {group}."
            )
    label_column(run, store)


def label_column(run: Run, store: Store) -> str | None:
    """The column that a supervised method learns from: its own choice or the store's leading one; None for others.

    Raises UsageError where no image has a label in it, DataError where there is no such column.
    """
    if not run.method.supervised:
        return None
    column = getattr(run.method, "label", None) or next(iter(store.columns), None)
    if column is None:
        raise UsageError(f"--objective {run.objective} learns from labels, and {store.root} has none.")
    if (store.label(column)[0] < 0).all():
        raise UsageError(
            f"--objective {run.objective} learns from labels, and no image of {store.root} has one in column {column}. "
            "Choose another with --method.label."
        )
    return column


def open_data(run: Run, store: Store, ranks: Ranks | None = None) -> Loader:
    """The loader of a run in one part, or of one stage.

    run: resolved, so that device and backend are known. Raises what check_data and open_loader raise.
    """
    ranks = ranks or Ranks()
    check_data(run, store, ranks.count)
    speed = run.speed
    return open_loader(
        store, run.method.views(run.model), batch=run.optim.batch, seed=run.seed, backend=run.loader, device=run.device,
        label=label_column(run, store), workers=speed.workers, ahead=speed.ahead, hw_decoder_load=speed.hw_decoder_load,
        stall_seconds=speed.stall_seconds, rank=ranks.rank, ranks=ranks.count, ranks_here=ranks.local_count,
    )  # fmt: skip
