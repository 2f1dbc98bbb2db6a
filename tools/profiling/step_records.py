"""Records of `daae profile --step --peers`, `--step --knobs` and `--step --techniques`, one a size, as tables: on a
terminal and on a page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from pipeline.errors import DataError
from tools.profiling.peer_process import ratios

OURS = "DAAE project"  # in a record of peers
AS_IT_IS = "our step"  # in a record of techniques
KINDS = ("peers", "knobs", "techniques")
COMPILED = ", compiled"  # behind a peer's name
NAMED = ("torch", "transformers", "lightly")  # of the versions in a record


def read(folder: Path) -> list[dict]:
    """What is kept there, from small to large. Raises DataError where that is nothing, or of two kinds."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    kinds = {kind for each in found for kind in KINDS if kind in each}
    if len(kinds) != 1:
        raise DataError(
            f"{folder} holds no records of one kind: of --step --peers, of --step --knobs or of --step --techniques."
        )
    return sorted(found, key=lambda each: each["gflop_per_image"])


def table(records: list[dict]) -> list[list[str]]:
    """Headings, then rows. All of one kind."""
    tables = {"peers": _peers, "knobs": _knobs, "techniques": _techniques}
    return next(make(records) for kind, make in tables.items() if kind in records[0])


def _peers(records: list[dict]) -> list[list[str]]:
    """Images/s of each, its share of what the device multiplies at most, and how many times as fast ours is, compiled
    too where a record has that."""
    beside = {"ours is": "beside"}
    if any(OURS + COMPILED in each["peers"] for each in records):
        beside["ours compiled is"] = "beside_compiled"
    rows = [["", *(cell for each in records for cell in (f"{each['preset']}, images/s (MFU)", *beside))]]
    for name in dict.fromkeys(name for each in records for name in each["peers"]):
        row = [name.replace(OURS, "ours")]
        for each in records:
            rates = each["peers"].get(name)
            if rates is None:
                row += [""] * (1 + len(beside))
                continue
            rate = rates["images_per_second"]
            row.append(f"{rate:,.3g} ({rate * each['gflop_per_image'] / 1000 / each['gemm_tflops']:.0%})")
            mine = {"beside": each["peers"][OURS]["rounds"]["images_per_second"], **rates}  # all were in one group
            for key in beside.values():
                itself = mine.get(key) == rates["rounds"]["images_per_second"]
                ours = {"rounds": {"images_per_second": mine.get(key)}}
                row.append(_spread(ratios(ours, rates, "images_per_second")) if key in mine and not itself else "")
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


def _techniques(records: list[dict]) -> list[list[str]]:
    """How many times as fast each makes our step, beside what was foretold."""
    rows = [["", "foretold", *(each["preset"].removeprefix("mae-") for each in records)]]
    for name, first in records[0]["techniques"].items():
        if name == AS_IT_IS:
            rate = (f"{each['techniques'][name]['images_per_second']:,.3g} images/s" for each in records)
            rows.append(["DAAE's step as it is", "", *rate])
            continue
        row = [name, first["foretold"] or "–"]
        for each in records:
            rates = each["techniques"][name]
            gains = ratios({"rounds": {"images_per_second": rates["beside"]}}, rates, "images_per_second")
            row.append(_spread([1 / gain for gain in gains] if rates["added"] else gains))
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
    from tools.tables import page_block

    records = read(folder)
    return page_block(table(records), [caption(each) for each in records])
