"""Times with a cold cache: the arithmetic, by a GPU whose clock is counted."""

from types import SimpleNamespace

import pytest

from bench import ceilings
from resnet_fast.runtime import graph_timing, tuning_tables

WRITE, CALL = 0.04, 0.003  # ms


class Gpu:
    """Work takes the time that it says; `drift` slows the clock after every measurement."""

    def __init__(self, monkeypatch, write=WRITE, drift=1.0):
        self.now, self.slow, self.drift, self.order = 0.0, 1.0, drift, []
        buffer = SimpleNamespace(fill_=lambda _: self.work("write", write))
        monkeypatch.setattr(graph_timing, "scratch", lambda: buffer)
        monkeypatch.setattr(graph_timing, "captured", self.captured)
        monkeypatch.setattr(graph_timing, "elapsed_ms", self.elapsed_ms)
        self.graphs = []

    def work(self, name, ms):
        self.now += ms * self.slow
        self.order.append(name)

    def captured(self, run, calls):
        self.graphs.append(calls)
        return SimpleNamespace(replay=lambda: [run() for _ in range(calls)])

    def elapsed_ms(self, run):
        begin = self.now
        run()
        took = self.now - begin
        self.slow *= self.drift
        return took


def test_the_write_is_subtracted(monkeypatch):
    """What is left is the call; a buffer is written before each."""
    gpu = Gpu(monkeypatch)
    found = graph_timing.cold_ms(lambda: gpu.work("call", CALL), 5)
    assert found == pytest.approx([CALL] * 5) and gpu.graphs == [100, 100]
    pairs = list(zip(gpu.order, gpu.order[1:], strict=False))
    assert gpu.order.count("call") == 4 + 5 * 100 and ("call", "call") not in pairs
    assert tuning_tables.microseconds(lambda: gpu.work("call", CALL)) == pytest.approx(1e3 * CALL)


@pytest.mark.parametrize("ms", [1e-3, 0.5, 25.0])
def test_graphs_last_no_longer_than_they_need(monkeypatch, ms):
    """As many calls as last 10 ms, at least one, at most 100."""
    gpu = Gpu(monkeypatch)
    assert graph_timing.cold_ms(lambda: gpu.work("call", ms), 1) == pytest.approx([ms])
    assert gpu.graphs == [{1e-3: 100, 0.5: 18, 25.0: 1}[ms]] * 2
    assert graph_timing.calls_for(0.0) == 100


def test_a_drift_cancels(monkeypatch):
    """A clock that slows by 1% a replay: the rounds' errors have both signs, 13 times the call."""
    gpu = Gpu(monkeypatch, drift=1.01)
    found = graph_timing.cold_ms(lambda: gpu.work("call", 10 * CALL), 20)
    scale = [found[i] / (10 * CALL * 1.01 ** (3 + 2 * i)) - 1 for i in range(20)]
    assert max(scale) > 0.01 and min(scale) < -0.01 and abs(sum(scale)) / 20 < 0.01


def test_noise_gives_no_negative_time():
    """A difference below nothing is the least time, which is positive."""
    times = iter([1.0, 1.5, 2.0, 1.0])
    found = graph_timing.differences(lambda: next(times), lambda: next(times), 10, 2)
    assert found == [graph_timing.LEAST_MS] * 2 and graph_timing.LEAST_MS > 0


def test_rounds_take_turns():
    order = []
    graph_timing.differences(lambda: order.append("whole") or 2.0,
                             lambda: order.append("part") or 1.0, 1, 3)  # fmt: skip
    assert order == ["whole", "part", "part", "whole", "whole", "part"]


def test_layers_are_timed_cold_and_limits_hot(monkeypatch):
    """`median_ms` on CUDA subtracts writes; `best_ms` replays one graph of the call alone."""
    gpu = Gpu(monkeypatch)
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(ceilings.timing, "synchronizer", lambda _: lambda: None)
    assert ceilings.median_ms(lambda: gpu.work("call", CALL), device, 3) == pytest.approx(CALL)
    gpu.order.clear()
    assert ceilings.best_ms(lambda: gpu.work("call", 5.0), device, 3) == pytest.approx(5.0)
    assert set(gpu.order) == {"call"}


def test_a_small_launch(monkeypatch):
    """The graph's time over its launches; the device is a CPU here, the clock counts 2 ms."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(graph_timing, "elapsed_ms", lambda run: run() and 2.0)
    assert ceilings.small_launch_us("cpu") == pytest.approx(2.0) and gpu.graphs == [1000]
