"""Tuning tables: concurrent writers lose no entry, and damaged files count as missing."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from resnet_fast.runtime import tuning_tables
from resnet_fast.spec.chain import Conv

GPU = "NVIDIA Test 1"
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
    path = tmp_path / "tiles" / "table.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(path), str(who)]) for who in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    wanted = {f"{who} {i}" for who in range(3) for i in range(25)}
    assert set(json.loads(path.read_text())["kernel"]) == wanted


def test_threads_that_write_at_once(tmp_path):
    path = tmp_path / "tiles" / "table.json"

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
def user(monkeypatch, tmp_path):
    """User's tables by kind; there are no others."""
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning_tables, "_unsaved", set())
    paths = {kind: tuning_tables.user_table(kind, GPU) for kind in ("tiles", "impls")}
    for path in paths.values():
        path.parent.mkdir(parents=True)
    return paths


def warned(run):
    """Messages of the warnings of run(), which must end within a minute."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    return [str(warning.message) for warning in caught]


def lookups(kind):
    return [section for _ in range(3) for section in tuning_tables.sections(kind, GPU, "op")]


def of_entry(**fields):
    """A table with a good entry and another one."""
    good = {"config": [1]} if "config" in fields else {"impl": "triton"}
    return json.dumps({"op": {"good": good, "key": fields}}).encode()


FILES = {
    "empty": b"",
    "cut off": b'{"op": {"key": {"conf',
    "binary": b"\xff\xfe\xfd\x00\x9c",
    "not UTF-8": b'{"op": {"\xe9": {"config": [1], "impl": "triton"}}}',
    "list": b"[]",
    "null": b"null",
    "string": b'"op"',
    "deep list": b"[" * 100_000,
    "deep object": b'{"op":' * 100_000,
    "deep and complete": b'{"op":' * 5000 + b"1" + b"}" * 5000,
    "long number": b'{"op": {"key": {"config": [' + b"1" * 5000 + b"]}}}",
    "section null": b'{"op": null}',
    "section list": b'{"op": ["key"]}',
    "section string": b'{"op": "key"}',
    "another section": b'{"other": 3}',
    "entry null": b'{"op": {"key": null}}',
    "entry list": b'{"op": {"key": ["config", "impl"]}}',
    "entry number": b'{"op": {"key": 7}}',
    "entry empty": b'{"op": {"key": {}}}',
}
NO_TIMES = (None, "7", True, -1.0, 0, float("nan"), float("inf"), 1e300, 5e-324, 10**400, [1.0])
NO_COUNTS = (None, "7", True, -1, 1.5, float("nan"), 10**400, [1], {"op": 1})
CONFIGS = (None, 1, "11", {}, {"1": 1}, [None], ["1"], [True], [1.0], [float("nan")], [[1]], [{}])
TILES = [
    *({"config": config} for config in CONFIGS),
    *({"config": [1], "us": us} for us in (*NO_TIMES, {"triton": 1.0})),
    {"config": [1], "more": {"deeper": 1}},
]
IMPLS = [
    *({"impl": impl} for impl in (None, 1, True, float("nan"), [], ["triton"], {})),
    *({"impl": "triton", "us": us} for us in (None, "triton", 7.0, ["triton"])),
    *({"impl": "triton", "us": {"native": 1.0, "triton": us}} for us in (*NO_TIMES, {"a": 1})),
    *({"impl": "triton", field: count} for field in ("bytes", "flop") for count in NO_COUNTS),
    {"impl": "triton", "more": [1]},
]
DAMAGED = [
    *(pytest.param(kind, data, id=f"{kind} {name}") for kind in ("tiles", "impls")
      for name, data in FILES.items()),
    pytest.param("tiles", of_entry(impl="triton"), id="tiles impls"),
    pytest.param("impls", of_entry(config=[1]), id="impls tiles"),
    *(pytest.param("tiles", of_entry(**fields), id=f"tiles {fields!s:.60}") for fields in TILES),
    *(pytest.param("impls", of_entry(**fields), id=f"impls {fields!s:.60}") for fields in IMPLS),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data"), DAMAGED)
def test_a_damaged_table_counts_as_missing(kind, data, user):
    """One warning names it, another one if it changes; a write keeps it beside the new table."""
    path, found = user[kind], []
    path.write_bytes(data)
    (said,) = warned(lambda: found.extend(lookups(kind)))
    assert said.startswith(f"{path}: not a valid tuning table (") and len(said) < 600
    assert said.endswith("); resnet_fast ignores it") and "\n" not in said
    assert found == [{}] * 6
    path.write_bytes(data + b" ")
    (said,) = warned(lambda: lookups(kind))
    entry = {"config": [2]} if kind == "tiles" else {"impl": "native"}
    (moved,) = warned(lambda: tuning_tables.write(path, "op", "new", entry))
    kept = path.with_name(f"{path.name}.damaged")
    assert moved == said.replace("ignores it", f"moved it to {kept}")
    assert kept.read_bytes() == data + b" "
    assert not warned(lambda: found.extend(lookups(kind)))
    assert found[6:] == [{"new": entry}, {}] * 3


@pytest.mark.parametrize("what", ["pipe", "folder", "link to a device", "huge"])
def test_what_is_not_read(what, user, monkeypatch):
    """Neither waited for nor read, and moved when an entry is written."""
    path, found = user["impls"], []
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        (path / "inside").mkdir(parents=True)
    elif what == "huge":
        path.write_text("{}")
        os.truncate(path, tuning_tables.LARGEST + 1)
    else:
        path.symlink_to("/dev/zero")
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", None)
        (said,) = warned(lambda: found.extend(lookups("impls")))
    why = "larger than 16 MiB" if what == "huge" else "expected a regular file, got a folder, pipe"
    assert said.startswith(f"{path}: not a valid tuning table ({why}") and found == [{}] * 6
    (moved,) = warned(lambda: tuning_tables.write(path, "op", "new", {"impl": "native"}))
    assert "; resnet_fast moved it to " in moved
    assert tuning_tables.read(path) == {"op": {"new": {"impl": "native"}}}
    assert os.path.lexists(f"{path}.damaged")


def test_valid_tables(user, monkeypatch):
    """Fields that are optional, and scalars of later versions; parsed again only after a change."""
    table = {"op": {"a": {"config": []}, "b": {"config": [-1, 2], "us": 0.001, "by": "me"}}}
    user["tiles"].write_text(json.dumps({**table, "empty": {}}))
    times = {"triton": 3, "native": 1e12}
    more = {"impl": "native", "us": times, "bytes": 0, "flop": 2**62, "later": None}
    user["impls"].write_text(json.dumps({"op": {"a": {"impl": "gone"}, "b": more}}))
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    found = []
    assert not warned(lambda: found.extend((*lookups("tiles"), *lookups("impls"))))
    assert found == [table["op"], {}] * 3 + [{"a": {"impl": "gone"}, "b": more}, {}] * 3
    assert len(parsed) == 2
    tuning_tables.write(user["tiles"], "op", "c", {"config": [3]})
    assert tuning_tables.read(user["tiles"])["op"].keys() == {"a", "b", "c"}
    shutil.copy(user["impls"], user["tiles"])
    assert len(warned(lambda: lookups("tiles"))) == 1


@pytest.mark.parametrize("path", sorted(tuning_tables.SHIPPED.glob("*/*.json")), ids=str)
def test_shipped_tables_are_valid(path):
    found = []
    assert not warned(lambda: found.append(tuning_tables.read(path)))
    assert found == [json.loads(path.read_text())] != [{}]


def refuse(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full", [False, True], ids=["no folder", "full disk"])
def test_an_unwritable_cache(full, user, monkeypatch):
    """One warning; what was measured is used, and the table is as before."""
    config_select = pytest.importorskip("resnet_fast.kernels.config_select")
    path = tuning_tables.user_table("tiles", "interpreter")
    tuning_tables.write(path, "kernel", "old", {"config": [1], "us": 3.0})
    before = path.read_bytes()
    if full:
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        shutil.rmtree(path.parent)
        path.parent.write_bytes(b"")
    monkeypatch.setattr(config_select, "_chosen", {})
    monkeypatch.setattr(config_select, "_searches", lambda x: True)
    monkeypatch.setattr(config_select, "_microseconds", lambda start, config: config[0])
    found = []

    def choose():
        for key in (("k", 1), ("k", 2), ("k", 1)):
            args = "kernel", key, ((2,), (1,), (3,)), 0, torch.empty(0), lambda config: None
            found.append(config_select.choose(*args))

    (said,) = warned(choose)
    assert found == [(1,)] * 3
    assert said.startswith(f"{path}: measurements not saved (")
    assert said.endswith("); only this process uses them")
    assert ("No space left on device" in said) == full
    if full:
        assert path.read_bytes() == before
        assert not list(path.parent.glob("*.part"))


def test_no_entry_if_nothing_can_run(user, monkeypatch):
    """An infinite time would make the table invalid."""
    config_select = pytest.importorskip("resnet_fast.kernels.config_select")
    monkeypatch.setattr(config_select, "_chosen", {})
    monkeypatch.setattr(config_select, "_searches", lambda x: True)
    monkeypatch.setattr(config_select, "_microseconds", lambda start, config: float("inf"))
    args = "kernel", ("k", 1), ((2,), (1,)), 0, torch.empty(0), lambda config: None
    assert config_select.choose(*args) == (2,)
    assert not tuning_tables.user_table("tiles", "interpreter").exists()


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
