"""Counters of arrival: which launches share a set, and when captured ones come back."""

import contextlib
import ctypes
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from resnet_fast.kernels import captures, counters

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def no_gpu(monkeypatch):
    """Counters of a "cuda:0" that has CPU memory, the stream and the capture that it says.

    capture: (id, graph) as the driver tells it, (0, 0) where it tells none. refuse: the function of
    the driver that fails. held: the semaphores of a graph, which `destroy` posts.
    """
    state = SimpleNamespace(stream=1, capturing=False, made=0, capture=(0, 0), refuse="", held={})

    def zeros(of, count):
        assert of == DEVICE and not state.capturing
        state.made += 1
        return torch.zeros(count, dtype=torch.int32)

    monkeypatch.setattr(counters, "_of_stream", {})
    monkeypatch.setattr(counters, "_free", {})
    monkeypatch.setattr(counters, "_captured", {})
    monkeypatch.setattr(counters, "_zeros", zeros)
    calls = driver(state)
    monkeypatch.setattr(captures, "driver", lambda: calls)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=state.stream)
    )
    state.x = SimpleNamespace(device=DEVICE, new_zeros=lambda *a, **k: torch.zeros(*a, **k))
    return state


def driver(state):
    """A driver of Python functions with libc's semaphores; None where libc has none."""
    objects = itertools.count(1)
    made_for = {}

    def cuStreamGetCaptureInfo_v2(stream, status, number, graph, nodes, count):
        assert stream == state.stream
        status._obj.value = state.capture != (0, 0)
        number._obj.value, graph._obj.value = state.capture
        return 0

    def cuUserObjectCreate(made, semaphore, destructor, references, flags):
        assert references == flags == 1 and destructor.value
        made._obj.value = next(objects)
        made_for[made._obj.value] = semaphore
        return int(state.refuse == "create")

    def cuGraphRetainUserObject(graph, made, references, flags):
        assert references == flags == 1
        if state.refuse == "retain":
            return 1
        state.held.setdefault(graph, []).append(made_for.pop(made.value))
        return 0

    def cuUserObjectRelease(made, references):
        assert references == 1
        calls.sem_post(made_for.pop(made.value))

    def destroy(graph):
        for semaphore in state.held.pop(graph):
            calls.sem_post(semaphore)

    state.destroy = destroy
    cuda = SimpleNamespace(
        cuStreamGetCaptureInfo_v2=cuStreamGetCaptureInfo_v2, cuUserObjectCreate=cuUserObjectCreate,
        cuGraphRetainUserObject=cuGraphRetainUserObject, cuUserObjectRelease=cuUserObjectRelease,
    )  # fmt: skip
    if sys.platform != "linux":
        return None
    calls = captures.declared(cuda, ctypes.CDLL(None))
    calls.sem_post.argtypes = [ctypes.c_void_p]
    return calls


def share_memory(*given):
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in given)
    return any(a[1] > b[0] for a, b in itertools.pairwise(spans))


def test_counters_of_streams_and_captures(no_gpu):
    """A stream's launches share a set, another stream has another. Where the driver does not tell
    the capture, each captured launch has its own.
    """
    first = counters.counters(no_gpu.x, 16)
    assert counters.counters(no_gpu.x, 64).data_ptr() == first.data_ptr()
    no_gpu.stream = 2
    second = counters.counters(no_gpu.x, 16)
    no_gpu.capturing = True
    captured = [counters.counters(no_gpu.x, count) for count in (1, 33, 64)]
    assert [t.numel() for t in captured] == [32, 64, 64]
    no_gpu.capturing = False
    larger = counters.counters(no_gpu.x, counters.OF_A_STREAM + 1)
    assert larger.numel() > counters.OF_A_STREAM
    assert counters.counters(no_gpu.x, 16).data_ptr() == larger.data_ptr()
    given = (first, second, *captured, larger)
    assert not share_memory(*given) and no_gpu.made == 1
    assert all(t.data_ptr() % 16 == 0 for t in given), "Triton compiles one kernel for all"


def test_capture_without_free_counters(no_gpu, monkeypatch):
    """The captured work makes zeros of its own: before anything ran, and when all are given."""
    monkeypatch.setattr(counters, "SIZE", counters.OF_A_STREAM + counters.LINE)
    no_gpu.capturing = True
    assert counters.counters(no_gpu.x, 16).numel() == 16 and no_gpu.made == 0
    no_gpu.capturing = False
    counters.counters(no_gpu.x, 16)
    no_gpu.capturing = True
    own, zeroed = (counters.counters(no_gpu.x, 16) for _ in range(2))
    assert own.numel() == counters.LINE and zeroed.numel() == 16 and no_gpu.made == 1
    no_gpu.capturing, no_gpu.stream = False, 3
    counters.counters(no_gpu.x, 16)
    assert no_gpu.made == 2


def test_zeros_are_made_outside_of_what_the_thread_is_in():
    """Not an inference tensor, and unseen by a mode, as the pool of a graph would be."""
    with torch.inference_mode():
        zeros = counters._zeros(torch.device("cpu"), 64)
    assert not zeros.is_inference() and zeros.dtype == torch.int32 and not zeros.any()


linux = pytest.mark.skipif(sys.platform != "linux", reason="without libc's semaphores")


def taken(state, capture, count=16, stream=1):
    """What a launch in a capture is given; (0, 0): in one that the driver does not tell."""
    state.capturing, state.capture, state.stream = True, capture, stream
    try:
        return counters.counters(state.x, count)
    finally:
        state.capturing, state.stream = False, 1


def spare():
    """How many counters are free."""
    return sum(piece.numel() for piece in counters._free[DEVICE])


@linux
def test_a_capture_takes_one_set_a_stream(no_gpu):
    """Its launches on one stream share; other streams and captures have sets of their own."""
    eager = counters.counters(no_gpu.x, 16)
    before = spare()
    first = [taken(no_gpu, (5, 70), count) for count in (16, 200, 1) * 60]
    assert len({t.data_ptr() for t in first}) == 1 and before - spare() == counters.OF_A_STREAM
    forked, other = taken(no_gpu, (5, 70), stream=2), taken(no_gpu, (6, 80))
    assert taken(no_gpu, (5, 70), stream=2) is forked and taken(no_gpu, (5, 70)) is first[0]
    assert not share_memory(eager, first[0], forked, other)
    assert [len(semaphores) for semaphores in no_gpu.held.values()] == [1, 1], "one a capture"


@linux
def test_sets_of_a_dead_graph_come_back(no_gpu):
    """All that its capture took, the smaller set of a stream among them, and nothing earlier."""
    counters.counters(no_gpu.x, 16)
    before = spare()
    small = taken(no_gpu, (5, 70))
    large = taken(no_gpu, (5, 70), counters.OF_A_STREAM + 1)
    assert taken(no_gpu, (5, 70)) is large and not share_memory(small, large)
    alive = taken(no_gpu, (6, 80))
    assert taken(no_gpu, (7, 90)).numel() == counters.OF_A_STREAM
    no_gpu.destroy(90)
    no_gpu.destroy(70)
    again = [taken(no_gpu, (id, 10 * id)) for id in (10, 11)]
    assert {t.data_ptr() for t in again} & {small.data_ptr()}, "the smallest piece that is enough"
    assert not share_memory(alive, *again)
    for graph in (80, 100, 110):
        no_gpu.destroy(graph)
    taken(no_gpu, (12, 120))
    assert before - spare() == counters.OF_A_STREAM and len(counters._captured) == 1


@linux
def test_captures_without_end(no_gpu, monkeypatch):
    """One piece of memory serves any number of graphs, as long as few live at a time."""
    monkeypatch.setattr(counters, "SIZE", 4 * counters.OF_A_STREAM)
    counters.counters(no_gpu.x, 16)
    for i in range(1, 200):
        assert taken(no_gpu, (i, i), 16).numel() == counters.OF_A_STREAM, "its own zeros have 16"
        if i > 2:
            no_gpu.destroy(i - 2)
    assert no_gpu.made == 1


@linux
@pytest.mark.parametrize("refuse", ["create", "retain"])
def test_a_graph_that_cannot_be_watched(no_gpu, refuse):
    """Its launches share a set that stays theirs; another capture has another."""
    counters.counters(no_gpu.x, 16)
    no_gpu.refuse = refuse
    first = taken(no_gpu, (5, 70))
    assert taken(no_gpu, (5, 70)) is first and not no_gpu.held
    no_gpu.refuse = ""
    assert not share_memory(first, *(taken(no_gpu, (i, i)) for i in (6, 7)))


@linux
def test_no_watch_without_counters(no_gpu):
    """In a capture that nothing preceded, the graph is given no user object."""
    assert taken(no_gpu, (5, 70)).numel() == 16 and not no_gpu.held and not counters._captured


def test_a_system_without_the_driver(monkeypatch):
    """No library, or an old one: no capture is known."""

    def missing(name):
        raise OSError(name)

    for library in (missing, lambda name: SimpleNamespace()):
        monkeypatch.setattr(captures.ctypes, "CDLL", library)
        captures.driver.cache_clear()
        assert captures.driver() is None and captures.current(1) is None
    captures.driver.cache_clear()
