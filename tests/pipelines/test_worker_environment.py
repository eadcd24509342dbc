"""What the train stage sets for its workers."""

import os
import platform
import subprocess
import sys

import pytest

from pipelines.train import WORKER_ENVIRONMENT

LARGE_TENSORS_IN_A_THREAD = """
import threading, resource, torch

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def large_tensors():
    for step in range(60):
        if step == 40:
            before = page_faults()
        torch.ones(20 * 2**20)  # 80 MiB
    print(page_faults() - before)

threading.Thread(target=large_tensors).start()
"""


def page_faults(environment: dict[str, str]) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", LARGE_TENSORS_IN_A_THREAD]
    return int(subprocess.check_output(command, env=clean | environment, text=True))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of the GNU C library")
def test_a_training_thread_keeps_the_memory_of_its_large_tensors():
    ours = page_faults(WORKER_ENVIRONMENT)
    without_arenas = {k: v for k, v in WORKER_ENVIRONMENT.items() if k != "MALLOC_ARENA_MAX"}
    assert ours < page_faults({}) / 2
    assert ours < page_faults(without_arenas) / 2  # or the setting of arenas is needed no longer
