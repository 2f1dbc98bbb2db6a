"""Errors that are a sentence for the user, each class with the exit code that the program ends with.

The codes are an interface: job scripts decide by them. README lists them.
"""


class DaaeError(Exception):
    """Says what happened, where, the number that matters, and what to do next. Shown without a traceback."""

    code = 1


class UsageError(DaaeError):
    """A flag, preset or configuration key is wrong, or the output folder belongs to something else."""

    code = 2


class DataError(DaaeError):
    """Images, a store or a checkpoint are missing, empty, incomplete, changed or damaged."""

    code = 3


class NumericsError(DaaeError):
    """The loss stayed non-finite beyond patience."""

    code = 4


class ResourceError(DaaeError):
    """Disk, memory, device or an optional package is not there."""

    code = 5


class StalledError(DaaeError):
    """A loader thread, worker process or rank died or stopped answering."""

    code = 6


class Preempted(DaaeError):
    """Stopped by a signal with a checkpoint saved; the same command goes on."""

    code = 75
