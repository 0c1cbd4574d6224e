"""Tuning tables: entries of processes and threads that write at once are all kept."""

import json
import subprocess
import sys
import threading

import pytest

from resnet_fast.runtime import tuning_tables

WRITE = """
import sys
from pathlib import Path
from resnet_fast.runtime import tuning_tables
who = sys.argv[2]
for i in range(25):
    tuning_tables.write(Path(sys.argv[1]), "kernel", f"{who} {i}", {"config": [i], "us": 1.0})
"""


@pytest.mark.slow
def test_processes_that_write_at_once(tmp_path):
    path = tmp_path / "a" / "table.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(path), str(who)]) for who in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    wanted = {f"{who} {i}" for who in range(3) for i in range(25)}
    assert set(json.loads(path.read_text())["kernel"]) == wanted


def test_threads_that_write_at_once(tmp_path):
    path = tmp_path / "table.json"

    def write(who):
        for i in range(25):
            tuning_tables.write(path, "kernel", f"{who} {i}", {"config": [i]})

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tuning_tables.read(path)["kernel"]) == 100


@pytest.fixture
def launch():
    pytest.importorskip("triton", reason="the kernels need Triton")
    from resnet_fast.kernels import launch

    return launch


@pytest.mark.parametrize(
    ("capability", "kib"), [(80, 163), (89, 99), (90, 227), (103, 227), (120, 99)]
)
def test_shared_memory(capability, kib, launch, recwarn):
    assert launch.Target(capability, 1, "a GPU").shared == kib << 10 and not recwarn.list


def test_shared_memory_of_an_unknown_gpu(launch):
    launch._warn_of.cache_clear()
    with pytest.warns(RuntimeWarning, match="does not know compute capability 20.7: .* 99 KiB"):
        assert launch.Target(207, 1, "a GPU").shared == 99 << 10
