"""What doctor says of this machine, of staged ones, and of packages that are missing, crash or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import native
from pipeline.limits import cpu_quota, memory_limit, usable_cores
from tests.conftest import needs_ffcv
from tools import doctor
from tools.doctor import Finding, exit_code, package, probe, summary

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def changed(root: Path, hidden: tuple[str, ...] = (), **code: str) -> dict[str, str]:
    """An environment for new processes in which some packages are not there and others run this code on import."""
    root.mkdir(exist_ok=True)
    (root / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    for name, body in code.items():
        (root / f"{name}.py").write_text(body)
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parents[1]}"}


# --- this machine -----------------------------------------------------------------------------------------------------


def test_the_real_examination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    # Two slow imports are spared, which shows how a machine without them looks; other tests import them.
    environment = changed(tmp_path, ("ffcv",), timm="raise OSError('libjpeg.so.8 is missing')")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    threads = torch.get_num_threads()
    code = doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    findings = {each["name"]: each for each in found["findings"]}
    assert list(findings) == [
        "python", "cores", "arithmetic", "memory", "/dev/shm", "disk", "OpenMP", "npm",
        "numpy", "pillow", "dali", "torch", "GPU", "ffcv", "timm", "decoder",
    ]  # fmt: skip
    assert findings["python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert findings["torch"]["found"].startswith(torch.__version__.split("+")[0])
    assert findings["numpy"]["found"] == np.__version__
    assert findings["cores"]["found"].startswith(str(len(os.sched_getaffinity(0))))
    for each in findings.values():
        # A warning says what to do in one sentence; what is well needs none.
        assert each["state"] == "ok" or each["advice"].endswith(".")
    assert (findings["ffcv"]["state"], findings["ffcv"]["found"]) == ("broken", "not installed")
    assert findings["timm"]["found"] == "does not import: OSError: libjpeg.so.8 is missing"
    works = findings["pillow"]["state"] != "broken" and findings["torch"]["state"] != "broken"
    assert findings["decoder"]["state"] == ("ok" if native.why_not() is None else "warning")
    assert code == (0 if works else 5)
    assert found["ok"] is works
    assert torch.get_num_threads() == threads


def test_lines_are_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("COLUMNS", "80")
    findings = doctor.show(
        iter([Finding("disk", "ok", "75.5 GB free here"), Finding("npm", "warning", "not found", "Do it.")])
    )
    text = capsys.readouterr().out
    assert [finding.name for finding in findings] == ["disk", "npm"]
    assert "ok      disk       75.5 GB free here" in text
    assert "warning npm        not found" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


# --- limits of a staged machine ---------------------------------------------------------------------------------------


def staged(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_control_groups_version_2(tmp_path: Path):
    root = staged(tmp_path, {
        "proc/self/cgroup": "0::/jobs/42\n",
        "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",  # a parent's limit is the tighter one
        "sys/fs/cgroup/jobs/42/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/jobs/memory.max": "max\n",
        "sys/fs/cgroup/jobs/42/memory.max": "8589934592\n",
    })  # fmt: skip
    assert cpu_quota(root) == 1.5
    assert memory_limit(root) == 8 << 30


def test_limits_of_control_groups_version_1(tmp_path: Path):
    root = staged(tmp_path, {
        # In a container the kernel names the host's path, which is not mounted: the root holds the limits.
        "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4294967296\n",
    })  # fmt: skip
    assert cpu_quota(root) == 3.0
    assert memory_limit(root) == 4 << 30


def test_no_limit_is_no_limit(tmp_path: Path):
    assert cpu_quota(tmp_path) is None
    assert memory_limit(tmp_path) is None
    root = staged(tmp_path, {
        "proc/self/cgroup": "2:memory:/\n1:cpu:/\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    })  # fmt: skip
    assert cpu_quota(root) is None
    assert memory_limit(root) is None
    assert usable_cores(root) == len(os.sched_getaffinity(0))


def machine(root: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.machine(root)}


def test_a_tight_machine_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    root = staged(tmp_path, {
        "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/memory.max": "2000000000\n", "proc/cpuinfo": "flags\t\t: sse avx2 avx512f amx_tile amx_bf16\n",
    })  # fmt: skip
    found = machine(root)
    assert found["cores"].state == "warning"
    assert "0.5 by the control group" in found["cores"].found
    assert "OMP_NUM_THREADS=1" in found["cores"].advice
    assert found["memory"].state == "warning"
    assert "2.0 GB by the control group" in found["memory"].found
    assert found["/dev/shm"].state == "warning"
    assert found["arithmetic"].found == "AMX, AVX-512, AVX2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine(root)["cores"].state == "ok"


def test_a_thread_setting_that_fits_no_core_count_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "512")
    assert doctor.openmp().state == "warning"
    assert "OMP_NUM_THREADS=512" in doctor.openmp().found
    assert "threads without a core" in doctor.openmp().advice
    monkeypatch.setenv("OMP_NUM_THREADS", str(int(usable_cores())))
    assert doctor.openmp().state == "ok"


def test_without_npm_only_emoji_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.npm().state == "warning"
    assert "sudo apt install npm" in doctor.npm().advice


# --- packages ---------------------------------------------------------------------------------------------------------


def test_every_way_in_which_an_import_fails_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = {
        "crashing": "import os; os.abort()",
        "hanging": "import time; time.sleep(600)",
        "torn": 'raise ImportError("libopencv_core.so.410: cannot open shared object file")',
        "exiting": "raise SystemExit(3)",
    }
    monkeypatch.setenv("PYTHONPATH", changed(tmp_path, (), **code)["PYTHONPATH"])
    names = ["crashing", "json", "torn", "absent_package", "hanging", "exiting"]
    found = dict(probe(names, seconds=3.0))
    assert list(found) == names
    assert found["crashing"]["error"] == "the import crashed the process (SIGABRT)"
    assert found["hanging"]["error"] == "the import took longer than 3 s"
    assert found["torn"]["error"] == "ImportError: libopencv_core.so.410: cannot open shared object file"
    assert found["exiting"]["error"] == "SystemExit: 3"
    assert found["absent_package"]["missing"] == "absent_package"


@pytest.mark.parametrize(
    ("name", "found", "words", "advice"),
    [
        ("ffcv", {"error": "ModuleNotFoundError: …", "missing": "ffcv"}, "not installed", "libturbojpeg0-dev"),
        (
            "ffcv",
            {"error": "ImportError: libopencv_core.so.410", "missing": None},
            "libopencv_core.so.410",
            "libopencv-dev",
        ),
        (
            "dali",
            {"error": "ModuleNotFoundError: …", "missing": "nvidia"},
            "not installed",
            "pip install nvidia-dali-cuda",
        ),
        (
            "dali",
            {"error": "ModuleNotFoundError: …", "missing": "astunparse"},
            "does not import: ModuleNotFound",
            "make setup",
        ),
        ("torch", {"error": "OSError: libtorch_cpu.so", "missing": None}, "libtorch_cpu.so", "pip install torch"),
        ("timm", {"error": "RuntimeError: operator torchvision::nms does not exist"}, "nms", "reinstall torchvision"),
    ],
)
def test_a_broken_package_says_why_and_what_to_install(name: str, found: dict, words: str, advice: str):
    (finding,) = package(name, found)
    assert finding.state == "broken"
    assert words in finding.found
    assert advice in finding.advice


def test_gpus_and_versions():
    h100 = {"name": "NVIDIA H100 80GB HBM3", "gb": 85.0, "bf16": True}
    facts = {"version": "2.12.1+cu130", "cuda": "13.0", "devices": [h100, h100], "threads": 16}
    torch_, gpu = package("torch", facts)
    assert (torch_.state, torch_.found) == ("ok", "2.12.1+cu130, 16 threads, CUDA 13.0")
    assert gpu.found == "2 x NVIDIA H100 80GB HBM3 85 GB"
    old = {"name": "Tesla V100", "gb": 16.0, "bf16": False}
    torch_, gpu = package("torch", {**facts, "version": "2.4.0", "devices": [h100, old]})
    assert torch_.state == "warning"
    assert "2.11 to 2.15" in torch_.advice
    assert gpu.found == "NVIDIA H100 80GB HBM3 85 GB; Tesla V100 16 GB without bf16"


def test_torch_and_pillow_are_enough():
    def findings(*broken: str) -> list[Finding]:
        names = ("torch", "pillow", "ffcv", "dali", "timm")
        return [Finding(name, "broken" if name in broken else "ok", "", "") for name in names]

    assert [exit_code(findings(*broken)) for broken in ((), ("ffcv",), ("dali", "ffcv", "timm"))] == [0, 0, 0]
    assert [exit_code(findings(*broken)) for broken in (("pillow",), ("torch",))] == [5, 5]
    assert summary(findings()) == "This machine can train: nothing to do."
    assert "one line above" in summary(findings("ffcv"))
    assert "cannot train" in summary(findings("torch"))


# --- a loader that is missing -----------------------------------------------------------------------------------------


def python(script: str, environment: dict[str, str]) -> dict:
    """What a fresh process prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"err": done.stderr}


TRAIN = """
import json
from train import pretrain
from train.command import run
encoder = "--model.side 32 --model.width 32 --model.depth 1 --model.heads 2".split()
decoder = "--model.decoder-width 32 --model.decoder-heads 2".split()
def train(loader):
    flags = ["--preset", "mae-tiny", *encoder, *decoder, "--data", DATA, "--out", OUT + loader, "--loader", loader]
    return run(pretrain.main, [*flags, "--steps", "2", "--limit-steps", "1", "--batch", "8", "--quiet"])
"""


@pytest.mark.slow
@needs_ffcv
def test_without_ffcv_and_dali_the_rest_trains(store_path: Path, tmp_path: Path):
    """FFCV is needed to write a .beton, not to read one; DALI where it is asked for."""
    environment = changed(tmp_path / "changed", ("ffcv", "nvidia.dali"))
    script = f"DATA, OUT = {str(store_path)!r}, {str(tmp_path / 'run-')!r}\n{TRAIN}\n"
    script += (
        "import torch; before = torch.get_num_threads()\n"
        'codes = [train(name) for name in ("dali", "ffcv", "auto")]\n'
        'print(json.dumps({"codes": codes, "threads": [before, torch.get_num_threads()]}))'
    )
    found = python(script, environment)
    assert found["codes"] == [5, 0, 0]
    said = "error: --loader dali needs nvidia.dali, which is not installed. Run `make setup`, or pass --loader auto."
    assert said in found["err"]
    assert "Traceback" not in found["err"]
    assert (tmp_path / "run-ffcv" / "checkpoints" / "step_000000001").is_dir()
    assert "loader: shards" in (tmp_path / "run-auto" / "config.yaml").read_text()
    assert found["threads"][0] == found["threads"][1]
