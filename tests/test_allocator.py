"""Memory that a process keeps: how many pages it asks the kernel for, and where nothing is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from train.allocator import HUGE_PAGES_SINCE, KEPT, SETTINGS, glibc

# 30 steps of a tensor of 64 MiB: allocated, written, freed.
STEPS = """
import os, resource, sys, json
from train.allocator import keep_memory, give_memory_back
for word in sys.argv[1:]:
    {"keep": keep_memory, "back": give_memory_back}[word]()
import torch
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(1 << 24)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"faults": faults, "settings": os.environ.get("GLIBC_TUNABLES"), "words": sys.argv[1:]}))
"""

pytestmark = pytest.mark.skipif(
    glibc() < HUGE_PAGES_SINCE or os.path.exists("/dev/nvidiactl"), reason="malloc is not glibc's, or there is a GPU"
)


def steps(*words: str, settings: str | None = None) -> dict:
    env = {name: value for name, value in os.environ.items() if name != SETTINGS}
    env |= {SETTINGS: settings} if settings is not None else {}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *words], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)


def test_memory_that_is_kept_is_not_asked_for_again():
    plain, kept = steps(), steps("keep")
    assert kept["settings"] == KEPT
    assert kept["words"] == ["keep"]
    assert plain["faults"] > 30 * 30  # 16,384 pages a tensor; 32, where the kernel gives huge ones to all
    assert kept["faults"] < plain["faults"] / 10


def test_settings_of_the_users_stay_and_ours_can_be_taken_back():
    assert steps("keep", settings="glibc.malloc.check=0")["settings"] == "glibc.malloc.check=0"
    assert steps("back", settings=KEPT)["settings"] is None
    assert steps("back", settings="glibc.malloc.check=0")["settings"] == "glibc.malloc.check=0"
