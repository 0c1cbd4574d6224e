"""Which implementation "auto" takes on a GPU: by table, by measurement if asked, or the first."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast.dispatch import auto_impl, backends, cost_model, native_inference
from resnet_fast.runtime import tuning_tables
from resnet_fast.spec import reference
from resnet_fast.verify.op_cases import CONVOLUTIONS, CONVS, POINTWISE, SHAPES, Draw, op_of

GPU = "NVIDIA Test 1"
X = torch.zeros(2, 8, 3, 3).to(memory_format=torch.channels_last)
W = torch.zeros(4, 8, 1, 1, dtype=torch.bfloat16)
ARGS = (X, W, None, True, 1e-5, [1, 1])


def raises(*args):
    raise RuntimeError("not this shape")


CANDIDATES = {"triton": lambda *args: "triton", "native": lambda *args: "native"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "user"))
    monkeypatch.delenv("RESNET_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped")
    # of an op that is none
    monkeypatch.setattr(cost_model, "work", lambda op, args: cost_model.Work(10, 20))
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(auto_impl, "_chosen", {})
    monkeypatch.setattr(auto_impl, "_written", {})


def pick(args=ARGS, candidates=CANDIDATES):
    return auto_impl.pick("op", GPU, args, candidates)[0]


def entry(impl):
    return {"impl": impl, "us": {impl: 1.0}}


def test_no_table_no_search(monkeypatch):
    """The first, and nothing is timed, looked up twice or written."""
    monkeypatch.setattr(auto_impl, "_microseconds", None)
    monkeypatch.setattr(auto_impl, "signature", None)
    assert pick() == "triton"
    assert not tuning_tables.user_table("impls", GPU).exists()


def test_tables(monkeypatch):
    """The shipped table is believed, the user's before it, a name that cannot run passed over."""
    key = auto_impl.signature(ARGS)
    tuning_tables.write(tuning_tables.shipped_table("impls", GPU), "op", key, entry("native"))
    assert pick() == "native"
    assert pick((X[:1], *ARGS[1:])) == "triton", "another shape is another key"
    assert auto_impl.pick("other", GPU, ARGS, CANDIDATES)[0] == "triton"
    assert auto_impl.pick("op", "another GPU", ARGS, CANDIDATES)[0] == "triton"
    tuning_tables.write(tuning_tables.user_table("impls", GPU), "op", key, entry("triton"))
    assert pick() == "native", "asked once"
    forget(monkeypatch)
    assert pick() == "triton"
    tuning_tables.write(tuning_tables.user_table("impls", GPU), "op", key, entry("cudnn"))
    forget(monkeypatch)
    assert pick() == "native"


DAMAGED = {
    "list": [],
    "section": {"op": None},
    "entry": {"op": {"KEY": None}},
    "impl": {"op": {"KEY": {"impl": ["native"]}}},
    "times": {"op": {f"float32[{n}]": {"impl": "native", "us": 7.0, "bytes": 1, "flop": 0}
                     for n in range(4)}},
    "time": {"op": {f"float32[{n}]": {"impl": "native", "us": {"native": "1", "triton": 2.0},
                                      "bytes": 1, "flop": 0} for n in range(4)}},
    "bytes": {"op": {f"float32[{n}]": {"impl": "native", "us": {"native": 1.0, "triton": 2.0},
                                       "bytes": float("nan"), "flop": 0} for n in range(4)}},
}  # fmt: skip


@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_table(damage, shipped, monkeypatch):
    """The choice is as without it, and only the first one warns."""
    key = auto_impl.signature(ARGS)
    if shipped:
        tuning_tables.write(tuning_tables.shipped_table("impls", GPU), "op", key, entry("native"))

    def picks():
        forget(monkeypatch)
        shapes = ARGS, (X[:1], *ARGS[1:])
        return [auto_impl.pick("op", GPU, args, CANDIDATES) for args in shapes]

    expected = picks()
    path = tuning_tables.user_table("impls", GPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(DAMAGED[damage]).replace("KEY", key))
    with pytest.warns(RuntimeWarning, match=r"nvidia-test-1\.json: not a valid tuning table \("):
        assert picks() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picks() == expected


def test_half_a_work_is_no_point():
    """An entry without bytes or flop is valid, and the cost model does not use it."""
    us = {"triton": 2.0, "native": 1.0}
    table = {f"float32[{n}]": {"impl": "native", "us": us, "bytes": n} for n in range(9)}
    assert cost_model.fastest(table, "float32", cost_model.Work(1, 0), list(us)) is None


def test_a_search_that_cannot_be_saved(monkeypatch, tmp_path):
    """The measured choice is used in this process, with one warning."""
    (tmp_path / "user").write_text("a file where the folder should be")
    monkeypatch.setenv("RESNET_FAST_AUTOTUNE", "1")
    times = {"triton": 9.0, "native": 4.0}
    monkeypatch.setattr(auto_impl, "_microseconds", lambda run, args: times[run(*args)])
    with pytest.warns(RuntimeWarning, match=r"test-1\.json: measurements not saved \(") as warned:
        assert [pick(), pick((X[:1], *ARGS[1:])), pick()] == ["native"] * 3
    assert len(warned) == 1
    assert {why for _, why in auto_impl._chosen.values()} == {"measured"}


def test_search(monkeypatch):
    """Each candidate timed once, the fastest taken and written down; then nobody is timed."""
    monkeypatch.setenv("RESNET_FAST_AUTOTUNE", "1")
    timed = []

    def microseconds(run, args):
        timed.append(run(*args))
        return {"triton": 9.0, "native": 4.0004}[timed[-1]]

    monkeypatch.setattr(auto_impl, "_microseconds", microseconds)
    assert [pick(), pick()] == ["native", "native"]
    assert timed == ["triton", "native"]
    table = json.loads(tuning_tables.user_table("impls", GPU).read_text())
    us = {"triton": 9.0, "native": 4.0}
    found = {"impl": "native", "us": us, "bytes": 10, "flop": 20}
    assert table == {"op": {auto_impl.signature(ARGS): found}}
    forget(monkeypatch)
    monkeypatch.delenv("RESNET_FAST_AUTOTUNE")
    assert pick() == "native"
    assert timed == ["triton", "native"]


def test_a_candidate_that_refuses(monkeypatch):
    """What raises is not chosen; where all raise, the first runs and says why."""
    pytest.importorskip("triton")
    monkeypatch.setenv("RESNET_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(tuning_tables, "microseconds", lambda run: run() and 1.0)
    assert pick(candidates={"triton": raises, "native": CANDIDATES["native"]}) == "native"
    assert pick(ARGS[:1], {"triton": raises, "native": raises}) == "triton"
    table = json.loads(tuning_tables.user_table("impls", GPU).read_text())
    assert list(table["op"]) == [auto_impl.signature(ARGS)]


def test_no_search_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("RESNET_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(tuning_tables, "capturing", lambda: True)
    monkeypatch.setattr(auto_impl, "_microseconds", None)
    assert pick() == "triton"
    assert not auto_impl._chosen, "asked again after the capture"


def test_signature():
    """Whatever an op's time depends on is in the key, and no value."""
    assert auto_impl.signature(ARGS) == (
        "float32[2x8x3x3]/nhwc bfloat16[4x8x1x1] None True 1e-05 [1,1]"
    )
    different = [
        (X.contiguous(), *ARGS[1:]), (X.double(), *ARGS[1:]), (X[:1], *ARGS[1:]),
        (X, W, W, *ARGS[3:]), (*ARGS[:3], False, *ARGS[4:]), (*ARGS[:5], [2, 1]),
    ]  # fmt: skip
    assert len({auto_impl.signature(args) for args in (ARGS, *different)}) == 7
    assert auto_impl.signature((X + 1, *ARGS[1:])) == auto_impl.signature(ARGS)


def test_every_op_has_a_key_and_work(monkeypatch):
    """Both depend on shapes, not on values, also of tensors in a list; so does the place of a
    choice, which holds no tensor.
    """
    monkeypatch.undo()  # `cost_model.work` itself
    for variant in (*POINTWISE, *CONVOLUTIONS):
        drawn = []
        for _ in range(2):
            draw = Draw(torch.bfloat16, torch.channels_last)
            if variant in POINTWISE:
                drawn.append(POINTWISE[variant](draw, SHAPES["7x7"]))
            else:
                drawn.append(CONVOLUTIONS[variant](draw, CONVS["3x3"]))
        keys = {auto_impl.signature(args) for args in drawn}
        places = {tuple(map(auto_impl._kind, args)) for args in drawn}
        assert len(keys) == len(places) == 1 and "tensor(" not in keys.pop(), variant
        works = {cost_model.work(op_of(variant), args) for args in drawn}
        assert len(works) == 1 and works.pop().bytes > 0, variant


def test_backend_asks(monkeypatch):
    """`resolve` gives the picked function, on a GPU and under "auto" alone."""
    asked = []

    def picked(op, gpu, args, candidates, estimates):
        asked.append((op, gpu, len(args), list(candidates)))
        return "native", "measured"

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.float32

    monkeypatch.setattr(auto_impl, "pick", picked)
    monkeypatch.setattr(backends, "_live", lambda op, device, dtype: CANDIDATES)
    monkeypatch.setattr(backends, "_gpu", lambda index: GPU)
    chosen = backends.resolve("bn_act", "auto", OnGpu(), (1, 2))
    assert chosen == ("native", CANDIDATES["native"], "measured")
    assert asked == [("bn_act", GPU, 3, ["triton", "native"])]
    assert backends.resolve("bn_stats", "reference", X).run is reference.bn_stats
    assert backends.resolve("bn_stats", "reference", OnGpu()).run is reference.bn_stats
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"triton": 10.0, "native": 7.0}, "native"),
        ({"triton": 10.0, "native": 8.0}, "triton"),  # within the error of an estimate
        ({"triton": 5.0, "native": 7.0}, "triton"),
        ({"triton": 10.0}, "triton"),
        ({}, "triton"),
    ],
    ids=str,
)
def test_estimates_decide_without_a_table(monkeypatch, times, expected):
    """Once per shape; a measurement of the shape or a fitted model is believed before them."""
    asked = []

    def estimates():
        asked.append(1)
        return times

    for _ in range(2):
        name, why = auto_impl.pick("op", GPU, ARGS, CANDIDATES, estimates)
        assert name == expected and len(asked) == 1
    assert why == ("estimate 10 us by triton, 7 us by native" if expected == "native" else why)
    forget(monkeypatch)
    key = auto_impl.signature(ARGS)
    tuning_tables.write(tuning_tables.user_table("impls", GPU), "op", key, entry("triton"))
    assert auto_impl.pick("op", GPU, ARGS, CANDIDATES, estimates) == ("triton", "tuning table")
    other = (X[:1], *ARGS[1:])
    assert auto_impl.pick("op", GPU, other, CANDIDATES, estimates)[0] == expected
    assert len(asked) == 2


class OnGpu:
    """A CPU tensor that says it lies on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.mark.parametrize(
    ("channels", "filters", "change", "why"),
    [
        (16, 24, {}, None),
        (3, 64, {}, None),  # a stem is padded
        (12, 16, {}, "12 channels and 16 filters"),
        (16, 20, {}, "16 channels and 20 filters"),
        (16, 20, {"groups": 2}, None),  # cuDNN's in any case, as are the next three
        (16, 20, {"layout": torch.contiguous_format}, None),
        (16, 20, {"dtype": torch.float32}, None),
        (16, 20, {"cutlass": "not there"}, None),
        (16, 20, {"asked": "auto"}, None),
        (16, 20, {"asked": "cudnn"}, None),
        (16, 20, {"asked": "cutlass"}, "multiples of 8"),
    ],
)
def test_channels_that_cutlass_does_not_take(channels, filters, change, why, monkeypatch):
    """An error that says so where native was asked for by name; "auto" goes elsewhere."""
    layout, dtype = change.get("layout", torch.channels_last), change.get("dtype", torch.bfloat16)
    x = torch.zeros(2, channels, 4, 4, dtype=dtype).contiguous(memory_format=layout)
    w = torch.zeros(filters, channels // change.get("groups", 1), 3, 3)
    w = w.contiguous(memory_format=layout)
    monkeypatch.delenv("RESNET_FAST_CUDA_CONV", raising=False)
    if "asked" in change:
        monkeypatch.setenv("RESNET_FAST_CUDA_CONV", change["asked"])
    built = {"cutlass": change.get("cutlass", "built in")}
    monkeypatch.setattr(backends, "build_info", lambda: built)
    monkeypatch.setattr(backends, "_gpu", lambda index: GPU)
    monkeypatch.setattr(backends, "_resolve", lambda op, impl, *_: backends.Choice(impl, None, ""))
    live = {"native": "native"}
    monkeypatch.setattr(backends, "_live", lambda op, device, dtype: live)

    def resolve(impl, op="conv_bn_act"):
        return backends.resolve(op, impl, OnGpu(x), (w, None)).impl

    def joined(impl, *given):
        return backends.resolve("conv_add_projection", impl, OnGpu(given[0]), given[1:]).impl

    assert resolve("native", "conv_fprop") == "native" and resolve("reference") == "reference"
    if why is None:
        assert resolve("native") == resolve("auto") == "native"
        assert joined("native", x, w, None, None, x, w) == "native"
        return
    with pytest.raises(RuntimeError, match=f"impl='native' cannot run conv_bn_act: w: .*{why}"):
        resolve("native")
    good = torch.zeros(16, channels, 3, 3).contiguous(memory_format=layout)
    for operands, name in (((w, None, None, x, good), "w"), ((good, None, None, x, w), "source_w")):
        if name == "w" or channels % 8 == 0:  # or the good ones are refused first
            with pytest.raises(RuntimeError, match=f"cannot run conv_add_projection: {name}: .*"):
                joined("native", x, *operands)
    assert resolve("auto") == "reference"
    live = {"triton": "triton", "native": "native"}
    assert resolve("auto") == "triton"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "native"),
        ({"channels": 1024, "kernel": 1}, "triton"),  # no estimate is far from the other
        ({"route": "cudnn"}, "triton"),
        ({"capability": 100}, "triton"),
        ({"dtype": torch.float32}, "triton"),
        ({"layout": torch.contiguous_format}, "triton"),
        ({"op": "conv_fprop"}, "triton"),
    ],
    ids=str,
)
def test_auto_by_estimates(monkeypatch, change, expected):
    """CUTLASS where its estimate is clearly shorter than Triton's; else the order of preference."""
    launch = pytest.importorskip("resnet_fast.kernels.launch")
    channels, side = change.get("channels", 64), change.get("kernel", 3)
    batch, size = (64, 14) if side == 1 else (1, 56)
    fmt, dtype = change.get("layout", torch.channels_last), change.get("dtype", torch.bfloat16)
    x = torch.zeros(batch, channels, size, size, dtype=dtype).contiguous(memory_format=fmt)
    filters = 64 if side == 3 else 256
    w = torch.zeros(filters, channels, side, side, dtype=dtype).contiguous(memory_format=fmt)
    capability = change.get("capability", 90)
    monkeypatch.setattr(launch, "_device_target",
                        lambda index: launch.Target(capability, 132, "test"))  # fmt: skip
    monkeypatch.setattr(backends, "_gpu", lambda index: GPU)
    monkeypatch.setattr(backends, "_live", lambda op, device, dtype: CANDIDATES)
    monkeypatch.setattr(backends, "build_info", lambda: {"cutlass": "built in"})
    route = change.get("route", "cutlass")

    def conv_route(*args):
        assert torch._C._len_torch_dispatch_stack() == 0, "a recorder would see a value read"
        return route, "why"

    native = SimpleNamespace(conv_route=conv_route)
    monkeypatch.setattr(backends, "_capability", lambda index: divmod(capability, 10))
    monkeypatch.setattr(backends, "native_ops", lambda: native)
    norm, geometry = [None] * 5, [[1, 1], [side // 2, side // 2], [1, 1], 1]
    args = (w, *norm, None, True, 0.0, *geometry)
    with TorchDispatchMode():
        found = backends.resolve(change.get("op", "conv_bn_act"), "auto", OnGpu(x), args)
    assert found.impl == expected
    assert ("estimate" in found.why) == (change in ({}, {"channels": 1024, "kernel": 1}))


def test_a_whole_net_has_such_channels(monkeypatch):
    """Then it goes op by op, so that the op with these channels is refused or goes elsewhere."""
    x, filters = OnGpu(torch.zeros(2, 3, 8, 8)), torch.zeros(16, 3, 3, 3)
    monkeypatch.setattr(backends, "chosen", lambda *args: "native")
    monkeypatch.setattr(backends, "native_ops", lambda: SimpleNamespace(infer_chains=None))
    for more, fits in ((torch.zeros(24, 16, 1, 1), True), (torch.zeros(20, 16, 1, 1), False)):
        assert native_inference._native(x, "native", [filters, None, more]) == fits
        assert native_inference._native(x.tensor, "native", [filters, None, more])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_on_a_gpu(monkeypatch):
    """A search among what is live here, and the op's result is the chosen one's."""
    from resnet_fast.dispatch import ops

    monkeypatch.setenv("RESNET_FAST_AUTOTUNE", "1")
    x = torch.randn(2, 64, 8, 8, device="cuda")
    y, _ = ops.add_relu(x, x, False, "auto")
    torch.testing.assert_close(y, reference.add_relu(x, x, False)[0])
    live = backends._live("add_relu", "cuda", torch.float32)
    if len(live) > 1:
        table = tuning_tables.read(tuning_tables.user_table("impls", torch.cuda.get_device_name()))
        (found,) = table["add_relu"].values()
        assert set(found["us"]) == set(live) and found["impl"] in live
