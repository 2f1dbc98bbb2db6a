"""`daae doctor`: what this machine has and lacks, a line each, with what to do where something is wrong.

Packages are imported in a process of their own: one that crashes, hangs or sets torch's thread count (FFCV does) does
so there, and the true reason for a failed import is what is shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.limits import affinity, cpu_quota, memory_limit, usable_cores
from train.command import parse, run

IMPORT_SECONDS = 120.0  # a cold import over a slow network disk takes a minute
State = Literal["ok", "warning", "broken"]  # broken: a package that cannot be used
FFCV_LIBRARIES = "libopencv-dev libturbojpeg0-dev pkg-config g++"
DECODER_LIBRARIES = "libjpeg-dev gcc"
COMPILER = "gcc python3-dev"  # what Triton compiles with


@dataclass(frozen=True)
class Doctor:
    """What does this machine have and lack? Exit code 0 if torch and Pillow work, so that it can train, else 5."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    name: str
    state: State
    found: str
    advice: str = ""  # one sentence, where something can be done


def judged(name: str, good: bool, found: str, advice: str) -> Finding:
    """ok, or a warning with its advice."""
    return Finding(name, "ok", found) if good else Finding(name, "warning", found, advice)


# --- packages ---------------------------------------------------------------------------------------------------------

# Runs in a process of its own: tries one import after the other and writes a JSON line before and after each.
PROBE = """
import importlib, json, os, sys
from importlib import metadata
tell = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
def facts(name):
    if name == "torch":
        import torch
        devices = []
        if torch.cuda.is_available():
            for place in range(torch.cuda.device_count()):
                each = torch.cuda.get_device_properties(place)
                with torch.cuda.device(place):
                    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
                devices.append({"name": each.name, "gb": each.total_memory / 1e9, "bf16": bf16})
        return {"cuda": torch.version.cuda, "devices": devices, "threads": torch.get_num_threads()}
    return {}
MODULES = {"dali": ["nvidia.dali", "nvidia.dali.fn"], "ffcv": ["ffcv.libffcv", "ffcv.writer"], "pillow": ["PIL.Image"]}
for name in sys.argv[1:]:
    print(json.dumps({"name": name}), file=tell)
    try:
        for module in MODULES.get(name, [name]):
            importlib.import_module(module)
        # FFCV calls itself 0.0.3rc1; DALI's distribution is named after a CUDA version.
        version = sys.modules["nvidia.dali"].__version__ if name == "dali" else metadata.version(name)
        found = {"version": version, **facts(name)}
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}", "missing": getattr(error, "name", None)}
    print(json.dumps({"name": name, **found}), file=tell)
"""

TRY_TRITON = """
import torch
from pipeline import kernels
print(kernels.why_not(torch.device("cuda", 0)) or "")
"""


def probe(names: list[str], seconds: float = IMPORT_SECONDS) -> Iterator[tuple[str, dict]]:
    """(name, facts) of each package as soon as it is known: `version`, or `error` and `missing`.

    One process tries all, since torch is half of most imports; if it dies or hangs, another one goes on behind.
    """
    left = list(names)
    while left:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", PROBE, *left], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert child.stdout is not None
        try:
            for line in _lines(child.stdout.fileno(), seconds):
                found = json.loads(line)
                if len(found) > 1:
                    left.remove(found["name"])
                    yield found.pop("name"), found
        except TimeoutError:
            if not left:  # it has told everything, and hangs at its end
                return
            yield left.pop(0), {"error": f"the import took longer than {seconds:.0f} s", "missing": None}
        else:
            if left:
                yield (
                    left.pop(0),
                    {"error": f"the import crashed the process ({_ending(child.wait())})", "missing": None},
                )
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def _lines(pipe: int, seconds: float) -> Iterator[str]:
    """Lines of a pipe. Raises TimeoutError where the next one takes longer."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        rest = b""
        while selector.select(seconds):
            more = os.read(pipe, 1 << 16)  # not readline: what its buffer holds, select does not see
            if not more:
                return
            *whole, rest = (rest + more).split(b"\n")
            yield from (line.decode() for line in whole)
    raise TimeoutError


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def broken_package(name: str, found: dict) -> Finding:
    """Why an import failed and what to install."""
    error, missing = found["error"], found.get("missing")
    own = {"dali": "nvidia"}.get(name, name)
    absent = missing is not None and missing.split(".")[0] == own
    what = "not installed" if absent else f"does not import: {error}"
    without = {
        "ffcv": "; only writing .beton files needs it",
        "dali": "; only decoding on a GPU needs it",
    }.get(name, "")
    if name == "ffcv":
        sentence = f"`sudo apt install {FFCV_LIBRARIES}`, then `make setup`"
    elif name == "dali":
        sentence = "`make setup`, or `pip install nvidia-dali-cuda130==2.4.*`"
    elif name == "timm" and "torchvision" in error:
        sentence = "torchvision must match torch: `pip install --force-reinstall torchvision`"
    else:
        sentence = f"`make setup`, or `pip install {name}`"
    return Finding(name, "broken", what, f"{sentence}{without}.")


# --- the examination --------------------------------------------------------------------------------------------------


def machine(root: Path = Path("/")) -> Iterator[Finding]:
    """What can be read off the system at once."""
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield judged("python", fits, version, "Use Python 3.11 or 3.12: FFCV and DALI are tried on those.")
    cores, quota = affinity(), cpu_quota(root)
    words = f"{cores} by affinity" + (f", {quota:g} by the control group's quota" if quota is not None else "")
    throttled = quota is not None and quota < cores and not os.environ.get("OMP_NUM_THREADS")
    threads = max(1, int(quota or cores))
    yield judged(
        "cores", not throttled, words,
        f"Set OMP_NUM_THREADS={threads}: torch starts a thread per core, and more than the quota wait for one another.",
    )  # fmt: skip
    yield arithmetic(root)
    yield memory(root)
    yield shared_memory(root)
    free = shutil.disk_usage(".").free
    full = "A store and its checkpoints need room: use another folder, or delete something."
    yield judged("disk", free > 10e9, f"{_gb(free)} free here", full)
    yield openmp()
    yield npm()


def arithmetic(root: Path) -> Finding:
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                there = set(line.partition(":")[2].split())
                named = {"AMX": {"amx_tile", "amx_bf16"}, "AVX-512": {"avx512f"}, "AVX2": {"avx2"}, "NEON": {"asimd"}}
                units = [name for name, needed in named.items() if needed <= there]
                slow = "" if "AMX" in units else "bf16 is slow on this processor; --precision auto takes fp32."
                return Finding("arithmetic", "ok", ", ".join(units) or "no vector unit that is known", slow)
    return Finding("arithmetic", "ok", platform.processor() or platform.machine())


def memory(root: Path) -> Finding:
    import psutil

    facts, limit = psutil.virtual_memory(), memory_limit(root)
    words = f"{_gb(facts.total)}, {_gb(facts.available)} available"
    if limit is not None and limit < facts.total:
        words += f", {_gb(limit)} by the control group"
    enough = min(facts.total, limit or facts.total) > 4e9
    return judged("memory", enough, words, "Less than 4 GB: use a tiny preset and --batch 64 or less.")


def shared_memory(root: Path) -> Finding:
    place = root / "dev/shm"
    if not place.is_dir():
        return Finding(
            "/dev/shm", "warning", "missing", "FFCV's writer needs it; `daae convert --backends dali` does not."
        )
    size = shutil.disk_usage(place).total
    return judged("/dev/shm", size >= 512e6, _gb(size), "Small: start the container with --shm-size 2g or more.")


def openmp() -> Finding:
    """Thread settings from outside: they decide how many cores a step on the CPU uses."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    words = ", ".join(f"{name}={value}" for name, value in given.items()) or "not set"
    threads, cores = given.get("OMP_NUM_THREADS", ""), usable_cores()
    if threads.isdigit() and not max(1, int(cores)) <= int(threads) <= cores + 1:
        why = "the step waits for threads without a core" if int(threads) > cores else "the step leaves cores idle"
        return Finding(
            "OpenMP", "warning", words, f"This process may use {cores:g} cores: {why}; unset OMP_NUM_THREADS."
        )
    return Finding("OpenMP", "ok", words)


def npm() -> Finding:
    program = shutil.which("npm")
    if program is None:
        return Finding("npm", "warning", "not found", "Only `daae fetch emoji` needs it: `sudo apt install npm`.")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
        if asked.returncode == 0:
            return Finding("npm", "ok", asked.stdout.strip())
    return Finding("npm", "warning", f"{program} does not run", "Only `daae fetch emoji` needs it: install it again.")


TRIED = {"torch": ((2, 11), (2, 15)), "timm": ((1, 0), (1, 0)), "numpy": ((2, 0), (2, 99))}  # first and last, inclusive


def package(name: str, found: dict) -> Iterator[Finding]:
    """One or, for torch, two lines about a package that was tried."""
    if "error" in found:
        yield broken_package(name, found)
        return
    version, advice = found["version"], ""
    if name in TRIED:
        first, last = TRIED[name]
        numbers = tuple(int(part) for part in version.split(".")[:2])
        if not first <= numbers <= last:
            span = " to ".join(".".join(map(str, end)) for end in (first, last))
            advice = f"Not tried with this version, but with {span}."
    words = version
    if name == "torch":
        words += f", {found['threads']} threads, " + (
            f"CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
        )
    yield judged(name, not advice, words, advice)
    if name == "torch":
        yield gpus(found)


def gpus(found: dict) -> Finding:
    if found["devices"]:
        each = [f"{one['name']} {one['gb']:.0f} GB{'' if one['bf16'] else ' without bf16'}" for one in found["devices"]]
        same = len(set(each)) == 1
        words = f"{len(each)} x {each[0]}" if same and len(each) > 1 else "; ".join(each)
        if found.get("uncompiled"):
            advice = f"Plain torch cuts crops, slower, and --compile fails. A compiler: `sudo apt install {COMPILER}`."
            return Finding("GPU", "warning", f"{words}; Triton does not compile: {found['uncompiled']}", advice)
        return Finding("GPU", "ok", words)
    if glob.glob("/dev/nvidia[0-9]*"):
        why = "torch was built without CUDA" if not found["cuda"] else f"the driver is too old for CUDA {found['cuda']}"
        return Finding("GPU", "warning", "there is one, but torch cannot use it", f"Probably {why}; see `nvidia-smi`.")
    return Finding("GPU", "ok", "none: training runs on the CPU, slowly; the tiny presets are meant for that")


def examine() -> Iterator[Finding]:
    """Each finding as soon as it is known: the system's at once, packages at the pace of their imports."""
    yield from machine()
    for name, found in probe(["numpy", "pillow", "dali", "torch", "ffcv", "timm"]):
        if found.get("devices"):
            found["uncompiled"] = uncompiled()
        yield from package(name, found)
    yield decoder()


def uncompiled() -> str:
    """Why Triton compiles no kernel for the GPU; empty where it does. In a process of its own, which may crash."""
    command = [sys.executable, "-c", TRY_TRITON]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"nothing came of it in {IMPORT_SECONDS:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else "" if done.returncode == 0 else _ending(done.returncode)


def decoder() -> Finding:
    """The part in C: compiled here and now where it has not been."""
    from pipeline import native

    reason = native.why_not()
    if reason is None:
        return Finding("decoder", "ok", "compiled: each picture decoded once, only where a view looks")
    advice = f"Pillow decodes instead, several times slower: `sudo apt install {DECODER_LIBRARIES}`."
    return Finding("decoder", "warning", f"not compiled: {reason}", advice)


def exit_code(findings: list[Finding]) -> int:
    """0 where training works, 5 elsewhere."""
    works = {finding.name for finding in findings if finding.state != "broken"}
    return 0 if {"torch", "pillow"} <= works else 5


def summary(findings: list[Finding]) -> str:
    if exit_code(findings):
        return "This machine cannot train: torch and Pillow have to work. Do what the lines above say."
    advised = sum(finding.state != "ok" for finding in findings)
    ending = {0: "nothing to do", 1: "one line above says what could be better"}
    return f"This machine can train: {ending.get(advised, f'{advised} lines above say what could be better')}."


def main(argv: list[str]) -> int:
    flags = parse(Doctor, argv, prog="daae doctor")
    if flags.json:
        findings = list(examine())
        ok = exit_code(findings) == 0
        print(
            json.dumps(
                {"ok": ok, "findings": [dataclasses.asdict(one) for one in findings], "sentence": summary(findings)}
            )
        )
    else:
        findings = show(examine())
    return exit_code(findings)


COLOURS = {"ok": "green", "warning": "yellow", "broken": "red"}


def show(examination: Iterator[Finding]) -> list[Finding]:
    """Print each finding as it comes: imports take up to half a minute where nothing is cached."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, findings = Console(highlight=False), []
    with console.status("importing packages …") if console.is_terminal else contextlib.nullcontext():
        for finding in examination:
            findings.append(finding)
            line = Table.grid(padding=(0, 1))
            line.add_column(width=7)
            line.add_column(width=10)
            line.add_column(overflow="fold")
            words = Text(finding.found)
            if finding.advice:
                words.append(f"\n{finding.advice}", style="dim" if finding.state == "ok" else "bold")
            line.add_row(Text(finding.state, style=COLOURS[finding.state]), finding.name, words)
            console.print(line)
    console.print(f"\n{summary(findings)}", style="bold")
    return findings


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(run(main))
