"""`daae verify STORE`: is every file and every picture of a store what was converted? `--fix` drops what is not."""

from __future__ import annotations

import json
import sys

from pipeline.errors import DataError, UsageError
from pipeline.staging import terminable
from tools.converting.flags import Verify
from train.command import parse, run

SHOWN = 20


def main(argv: list[str]) -> int:
    flags = parse(Verify, argv, prog="daae verify")
    if flags.quick and flags.fix:
        raise UsageError("--quick does not look at pictures, so --fix cannot tell which to drop. Leave one out.")
    if flags.workers is not None and not 1 <= flags.workers <= 4096:
        raise UsageError(f"--workers is from 1 to 4096, not {flags.workers}.")
    if not 1 <= flags.stall_timeout <= 1e6:
        raise UsageError(f"--stall-timeout is from 1 to 1e+06, not {flags.stall_timeout:g}.")
    # numpy and Pillow only now: --help and a wrong flag answer without them.
    from tools.converting.verification import verify

    with terminable(f"verifying {flags.store}"):
        result = verify(flags)
    if flags.json:
        print(json.dumps(result))
    else:
        _tell(flags, result)
    if result["sound"] or result["fixed"]:
        return 0
    if flags.json:
        return DataError.code
    raise DataError(f"{flags.store} is damaged: {_count(result)}. {_advice(flags, result)}")


def _tell(flags: Verify, result: dict) -> None:
    for one in result["files"][:SHOWN]:
        print(f"{one['file']}: {one['problem']}")
    for one in result["samples"][:SHOWN]:
        print(f"sample {one['sample']} ({one['name']}): {one['reason']}")
    hidden = sum(max(0, len(result[kind]) - SHOWN) for kind in ("files", "samples"))
    if hidden:
        print(f"and {hidden:,} more; --json lists them all.")
    if result["sound"]:
        looked = "its files" if flags.quick else f"its files and all {result['count']:,} pictures"
        print(f"{flags.store} is sound: {looked} are what was converted.")
    elif result["fixed"]:
        print(f"Fixed {flags.store}: {_count(result)}; {result['left']:,} pictures are left.")


def _count(result: dict) -> str:
    return f"{len(result['files']):,} bad files, {len(result['samples']):,} bad pictures of {result['count']:,}"


def _advice(flags: Verify, result: dict) -> str:
    if not result["fixable"]:
        return "Its tables cannot be told from its pictures: convert the images again."
    return f"`daae verify {flags.store} --fix` drops what is bad; converting the images again brings it back."


if __name__ == "__main__":
    sys.exit(run(main))
