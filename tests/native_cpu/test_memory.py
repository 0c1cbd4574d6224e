"""What the native CPU kernels keep: within a budget, given back, and sane in a forked child."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import resnet_fast
from resnet_fast.commands.env import collect
from resnet_fast.dispatch import backends

MIB = 2**20
pytestmark = pytest.mark.skipif(backends.native_module()[0] is None, reason="native is not built")

COMMON = """
import gc, json, os, sys, threading, time
import torch, resnet_fast
from resnet_fast.dispatch import backends
torch.set_num_threads(1)
torch.set_grad_enabled(False)

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def kept():
    return backends.kept()

def model(name="resnet18", layout=torch.channels_last):
    return resnet_fast.create_model(name, impl="native").eval().to(memory_format=layout)

def image(size=32, batch=1, layout=torch.channels_last):
    return torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
"""


def run(body, megabytes=None):
    """What `body`, after COMMON and in a process of its own, prints as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "RESNET_FAST_CPU_CACHE_MB"}
    if megabytes is not None:
        environment["RESNET_FAST_CPU_CACHE_MB"] = str(megabytes)
    program = COMMON + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_models_that_go_leave_nothing():
    sizes = run("""
        def use():
            model()(image())
            gc.collect()
        use()
        before, sizes = rss(), []
        for _ in range(12):
            use()
            sizes.append(kept()["packed_filters"])
        print(json.dumps({"grown": rss() - before, "packed": max(sizes)}))
    """)
    assert sizes["packed"] == 0
    assert sizes["grown"] < 100 * MIB  # of 12 models of 45 MB and as much packed


def test_a_checkpoint_assigned_again_and_again():
    sizes = run("""
        net, sizes = model(), []
        for _ in range(6):
            state = {k: v.clone() for k, v in net.state_dict().items()}
            net.load_state_dict(state, assign=True)
            net(image())
            sizes.append(kept()["packed_filters"])
        print(json.dumps(sizes))
    """)
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
def test_sizes_stay_within_the_budget(layout):
    """Packed filters and free blocks together; the results are those of an unbounded run."""
    body = f"""
        layout = torch.{layout}
        net, most, sums = model(layout=layout), 0, []
        for size in (32, 64, 200, 96, 128, 160, 64, 32):
            torch.manual_seed(size)
            y = net(image(size, 2, layout))
            sums.append(y.double().sum().item())
            now = kept()
            most = max(most, now["packed_filters"] + now["free_blocks"])
        print(json.dumps({{"most": most, "budget": kept()["budget"], "sums": sums}}))
    """
    body = "torch.manual_seed(0)\n" + textwrap.dedent(body)
    free, bounded, none = run(body), run(body, 50), run(body, 0)
    assert free["most"] > 60 * MIB
    assert bounded["budget"] == 50 * MIB
    assert 40 * MIB < bounded["most"] <= 50 * MIB
    assert none["most"] == none["budget"] == 0
    assert bounded["sums"] == none["sums"] == free["sums"]


@pytest.mark.slow
def test_training_over_sizes_stays_within_the_budget():
    most = run("""
        torch.set_grad_enabled(True)
        net, most = model().train(), 0
        for size in (64, 96, 128, 160, 64):
            net(image(size, 2)).sum().backward()
            most = max(most, sum(kept().values()) - kept()["budget"])
        print(json.dumps(most))
    """, 40)  # fmt: skip
    assert 20 * MIB < most <= 40 * MIB


def test_empty_cache_gives_memory_to_the_system():
    sizes = run("""
        net = model()
        for size in (64, 128, 192, 256):
            net(image(size, 4))
        before, held = rss(), kept()
        freed = resnet_fast.empty_cache()
        print(json.dumps({"freed": freed, "held": held, "fell": before - rss(), "after": kept()}))
    """)
    held = sizes["held"]
    assert sizes["freed"] == held["packed_filters"] + held["free_blocks"] > 60 * MIB
    assert sizes["after"]["packed_filters"] == sizes["after"]["free_blocks"] == 0
    assert sizes["fell"] > 0.8 * sizes["freed"]


@pytest.mark.slow
def test_the_least_recently_used_goes_first():
    """Of two models the one in use stays packed when it and its blocks want more place.

    How much of the other one still fits depends on the layouts of the CPU's kernels.
    """
    kept = run("""
        one, other = model(), model()
        other(image())
        whole = kept()["packed_filters"]
        one(image())
        for _ in range(30):
            one(image(160, 2))
        before = kept()["packed_filters"]
        del other
        gc.collect()
        print(json.dumps({"whole": whole, "before": before, "after": kept()["packed_filters"]}))
    """, 100)  # fmt: skip
    assert kept["after"] >= kept["whole"] > 2 * (kept["before"] - kept["after"])


def test_the_budget_is_the_setting():
    assert run("print(json.dumps(kept()))", 7)["budget"] == 7 * MIB


GROUPS = {
    "none": ("", {}, None),
    "unlimited": ("0::/\n", {"memory.max": "max\n"}, None),
    "version 2": ("0::/\n", {"memory.max": "1073741824\n"}, 2**30),
    "its parent": ("0::/a/b\n", {"a/memory.max": "536870912", "a/b/memory.max": "max"}, 2**29),
    "version 1": ("5:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "8192"}, 8192),
    "mounted as the root": ("4:memory,hugetlb:/gone\n", {"memory/memory.limit_in_bytes": "4096"},
                            4096),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_containers(name, tmp_path):
    groups, files, expected = GROUPS[name]
    (tmp_path / "cgroup").write_text(groups)
    for path, text in files.items():
        file = tmp_path / "fs" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    module, _ = backends.native_module()
    limit = module.memory_limit(str(tmp_path / "cgroup"), str(tmp_path / "fs"))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert limit == (machine if expected is None else expected)


def test_env_prints_budget_and_use():
    module = resnet_fast.ConvBNAct2d(64, 64, 3, impl="native").eval()
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        module(x)
    found = collect()["cpu"]["kept"]
    assert found["packed_filters"] > 0
    assert found["budget"] > 0
    done = subprocess.run([sys.executable, "-m", "resnet_fast", "env"], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert re.search(r"CPU cache +\d+ MiB of at most \d+ MiB", done.stdout)


@pytest.mark.slow
def test_a_fork_waits_for_onednn():
    """Whose locks nobody would open in the child: none of the convolution is left after it.

    The clock is the CPU time of the thread that convolves, which other processes do not move.
    """
    left = run("""
        conv = resnet_fast.ConvBNAct2d(256, 256, 3, impl="native").eval()
        x, began, ended = torch.randn(8, 256, 56, 56), [], []  # NCHW
        def work():
            torch.set_grad_enabled(False)
            began.append(time.thread_time())
            conv(x)
            ended.append(time.thread_time())
        work()
        first, done = ended[0] - began[0], threading.Event()
        thread = threading.Thread(target=lambda: (work(), done.wait()))
        thread.start()
        clock = time.pthread_getcpuclockid(thread.ident)
        while len(began) < 2 or time.clock_gettime(clock) < began[1] + 0.2 * first:
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            os._exit(0)
        forked = time.clock_gettime(clock)
        os.waitpid(child, 0)
        done.set()
        thread.join()
        print(json.dumps((ended[1] - forked) / (ended[1] - began[1])))
    """)
    assert left < 0.4


@pytest.mark.slow
def test_forks_while_threads_run():
    """Children of a process whose threads hold the locks run to their end."""
    ended = run("""
        net, x, stop = model(), image(), threading.Event()
        net(x)
        def work():
            while not stop.is_set():
                net(x)
                resnet_fast.empty_cache()
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        ended = 0
        for _ in range(40):
            child = os.fork()
            if child == 0:
                conv = resnet_fast.ConvBNAct2d(32, 32, 3, impl="native").eval()
                conv(torch.randn(1, 32, 8, 8))
                resnet_fast.empty_cache()
                os._exit(0)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    ended += status == 0
                    break
                time.sleep(0.001)
            else:
                os.kill(child, 9)
                os.waitpid(child, 0)
        stop.set()
        for thread in threads:
            thread.join()
        print(json.dumps(ended))
    """)
    assert ended == 40
