"""Tuning tables: entries of processes and threads that write at once are all kept."""

import json
import subprocess
import sys
import threading

import pytest
import torch

from resnet_fast.runtime import tuning_tables
from resnet_fast.spec.chain import Conv

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


@pytest.mark.parametrize("path", sorted(tuning_tables.SHIPPED.glob("tiles/*.json")), ids=str)
def test_shipped_tables_name_plans_that_are_there(path):
    """A plan that is no more would be passed over without a word."""
    conv_plan = pytest.importorskip("resnet_fast.kernels.conv_plan")
    forward = {conv_plan.FUSED, conv_plan.LIBRARY}
    infer = {*forward, conv_plan.CUDNN}
    plans = {"conv_bn_act": infer, "conv_fprop": forward, "conv_bprop": set(conv_plan.PLANS)}
    table = tuning_tables.read(path)
    assert table and set(table) <= set(plans)
    for kernel, entries in table.items():
        assert entries and {tuple(entry["config"]) for entry in entries.values()} <= plans[kernel]


def test_a_shipped_table_is_found():
    """By the key of a convolution of ResNet-50, on the GPU that the table is of."""
    config_select = pytest.importorskip("resnet_fast.kernels.config_select")
    conv_plan = pytest.importorskip("resnet_fast.kernels.conv_plan")
    x = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta")
    w = torch.empty(256, 64, 1, 1, dtype=torch.bfloat16, device="meta")
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    where = config_select._name(conv_plan.key(x, w, Conv(), conv_plan.STATS, prologue=True))
    plans = conv_plan.FUSED, conv_plan.LIBRARY
    found = config_select._measured("conv_fprop", "NVIDIA H200", where, plans)
    assert found == conv_plan.LIBRARY
    assert config_select._measured("conv_fprop", "another GPU", where, plans) is None
