"""Records of `daae profile --step --peers` and `--step --knobs`, one a size, as tables: on a terminal and on a page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from pipeline.errors import DataError
from tools.profiling.peer_process import ratios

OURS = "DAAE project"  # in a record of peers
NAMED = ("torch", "transformers", "lightly")  # of the versions in a record


def read(folder: Path) -> list[dict]:
    """What is kept there, from small to large. Raises DataError where that is nothing, or of two kinds."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    kinds = {kind for each in found for kind in ("peers", "knobs") if kind in each}
    if len(kinds) != 1:
        raise DataError(f"{folder} holds no records of one kind: neither of --step --peers nor of --step --knobs.")
    return sorted(found, key=lambda each: each["gflop_per_image"])


def table(records: list[dict]) -> list[list[str]]:
    """Headings, then rows. All of one kind."""
    return _peers(records) if "peers" in records[0] else _knobs(records)


def _peers(records: list[dict]) -> list[list[str]]:
    """Images/s of each, its share of what the device multiplies at most, and how many times as fast ours is."""
    rows = [["", *(cell for each in records for cell in (f"{each['preset']}, images/s (MFU)", "ours is"))]]
    for name in dict.fromkeys(name for each in records for name in each["peers"]):
        row = [name.replace(OURS, "ours")]
        for each in records:
            rates, mine = each["peers"].get(name), each["peers"][OURS]
            if rates is None:
                row += ["", ""]
                continue
            rate = rates["images_per_second"]
            beside = {"rounds": {"images_per_second": rates.get("beside", mine["rounds"]["images_per_second"])}}
            mfu = rate * each["gflop_per_image"] / 1000 / each["gemm_tflops"]
            faster = "" if rates is mine else _spread(ratios(beside, rates, "images_per_second"))
            row += [f"{rate:,.3g} ({mfu:.0%})", faster]
        rows.append(row)
    return rows


def _knobs(records: list[dict]) -> list[list[str]]:
    """Seconds of a step of DAAE beside plain MAE's and beside those of MAE with the same decoder, and the same in
    FLOPs."""
    heads = (f"{each['preset'].removeprefix('mae-')}: DAAE / MAE" for each in records)
    rows = [["", *(cell for head in heads for cell in (head, "FLOPs", "/ MAE with the same", "FLOPs"))]]
    for name in records[0]["knobs"]:
        row = [name]
        for each in records:
            knob = each["knobs"][name]
            daae, flops = knob["rates"]["daae"], knob["flops"]
            for other in ("mae", "mae with the same"):
                beside = knob["rates"].get(other)
                row.append("" if beside is None else _spread(ratios(beside, daae, "images_per_second")))
                row.append("" if beside is None else f"{flops['daae'] / flops[other]:.2f}")
        rows.append(row)
    return rows


def _spread(values: list[float]) -> str:
    """Median over the rounds, and the range in which differences are noise."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def caption(record: dict) -> str:
    """Where a record comes from, in a line."""
    env = record["environment"]
    versions = [f"{name} {env['versions'][name]}" for name in NAMED if name in env["versions"]]
    versions.insert(0, f"Python {env['python']}")
    return (
        f"{record['preset']}: {env['device']}, {record['precision']}, batch {record['batch']}, at most "
        f"{record['gemm_tflops']:.3g} TFLOP/s; {', '.join(versions)}; "
        f"{env['date'][:10]}, {env['code']}: {env['command']}"
    )


def markdown(folder: Path) -> list[str]:
    """A table, with a line of each record folded away below. Raises DataError."""
    records = read(folder)
    headings, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table(records))
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    where = ["<details><summary>Machine, versions, commands</summary>", "", *(f"- {caption(each)}" for each in records)]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), "", *where, "", "</details>", ""]
