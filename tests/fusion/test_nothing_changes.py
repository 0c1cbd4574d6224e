"""explain and fuse change nothing of the model they are given; the fused copy does all it did."""

import copy
import gc
import inspect
import random
from collections import deque
from types import BuiltinFunctionType, FunctionType, MethodType

import busy_models
import numpy as np
import pytest
import torch
from busy_models import ALONE, OTHERS
from torch import nn

from resnet_fast import explain, fuse

MODELS = ALONE | OTHERS
SHAPE = (2, 4, 8, 8)
ATOMS = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, type)


def build(name):
    """The same model at every call, after a block that is always fusible."""
    torch.manual_seed(0)
    return nn.Sequential(busy_models.Block(), MODELS[name]()).double()


def in_mode(model, name, training):
    """`model` in one mode, but where it has some of its own."""
    return model if name in ("traced", "mixed-modes") else model.train(training)


def contents(path, value, found, memo):
    """Adds to `found` what `value` and all in it hold, by path; containers and objects opened."""
    if isinstance(value, ATOMS):
        found[path] = value
        return
    if id(value) in memo:
        found[path] = f"-> {memo[id(value)]}"
        return
    memo[id(value)] = path
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, np.random.Generator):
        found[path] = str(value.bit_generator.state)
    elif isinstance(value, random.Random):
        found[path] = value.getstate()
    elif isinstance(value, FUNCTIONS):
        found[path] = value
    elif isinstance(value, dict):
        found[f"{path} keys"] = list(map(str, value))
        for key, entry in value.items():
            contents(f"{path}[{key}]", entry, found, memo)
    elif isinstance(value, list | tuple | deque):
        found[f"{path} length"] = len(value)
        for i, entry in enumerate(value):
            contents(f"{path}[{i}]", entry, found, memo)
    elif isinstance(value, set):
        found[path] = sorted(map(str, value))
    else:
        found[f"{path} class"] = type(value)
        contents(path, vars(value) if hasattr(value, "__dict__") else repr(value), found, memo)


def outside():
    """What a forward may reach that no model holds, by name."""
    found = {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }
    for name in ("SEEN", "COUNTS", "TALLY"):
        contents(name, getattr(busy_models, name), found, {})
    for cls in (c for c in vars(busy_models).values() if inspect.isclass(c)):
        entries = {k: v for k, v in vars(cls).items() if not k.startswith("__")}
        contents(cls.__name__, entries, found, {})
    return found


def snapshot(model):
    """All of `model` and around it: values, versions, and which object stands where."""
    found = {}
    contents("model", model, found, {})
    found |= outside()
    for path, value in found.items():
        if isinstance(value, torch.Tensor):
            data = value.detach().clone().numpy().tobytes()
            grad = value.grad if value.is_leaf else None
            found[path] = (id(value), value._version, value.requires_grad, grad, data)
    found["modules"] = [(name, type(m), m.training) for name, m in model.named_modules()]
    objects = [m for module in model.modules() for m in (module, *vars(module).values())]
    return found, objects


def assert_unchanged(before, after):
    changed = {k: (before[0].get(k), v) for k, v in after[0].items() if before[0].get(k) != v}
    gone = sorted(before[0].keys() - after[0].keys())
    assert not changed and not gone
    assert len(before[1]) == len(after[1])
    assert all(a is b for a, b in zip(*(s[1] for s in (before, after)), strict=True))


def forget():
    """What a run before left outside of its model."""
    busy_models.SEEN.clear()
    busy_models.COUNTS["calls"] = busy_models.TALLY = busy_models.CountsInItsClass.calls = 0
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


@pytest.fixture(autouse=True)
def nothing_seen():
    forget()
    yield
    forget()


def run(model):
    """Two calls with and two without gradients, two in inference mode: all that came of them."""
    forget()
    found = {}
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for i in range(2):
            x = torch.linspace(-1, 1, 512, dtype=torch.float64).view(SHAPE).sin() + 0.1 * i
            x = (x * torch.arange(1, 5).view(4, 1, 1)).requires_grad_()
            with mode():
                y = model(x)
                if y.requires_grad:
                    y.square().mean().backward()
            found |= {f"y{i} under {mode.__name__}": y, f"dx{i} under {mode.__name__}": x.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    contents("model", model, found, {})
    return found | outside()


def assert_same(actual, expected):
    """All of `expected`; a fused model may hold more, be of another class, have another graph."""
    for path, value in expected.items():
        if path.startswith("model") and (path.endswith((" class", " keys")) or "[_graph]" in path):
            continue
        assert path in actual, path
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                actual[path], value, rtol=1e-9, atol=1e-9, msg=lambda m, p=path: f"{p}: {m}"
            )
            assert actual[path].requires_grad == value.requires_grad, path
        elif not isinstance(value, FUNCTIONS):  # a copied model's methods are bound to the copy
            assert actual[path] == value, path


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    @pytest.mark.slow
    def test_stays_as_it_was(self, name):
        model = in_mode(build(name), name, training=True)
        before = snapshot(model)
        explain(model)
        assert_unchanged(before, snapshot(model))
        before = snapshot(in_mode(model, name, training=False))
        fused = fuse(model)
        assert_unchanged(before, snapshot(model))
        assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
        explain(fused)
        assert_unchanged(before, snapshot(model))

    def test_does_the_same_when_fused(self, name):
        plain, model = build(name), fuse(build(name))
        for training in (True, False):
            expected = run(in_mode(plain, name, training))
            assert_same(run(in_mode(model, name, training)), expected)


@pytest.mark.parametrize("name", ALONE)
def test_is_left_alone_and_explained(name):
    model = fuse(build(name))
    rows = explain(model).rows
    inside = [row for row in rows if row.path.split(".")[0] == "1"]
    assert {row.state for row in inside} == {"left alone"} and all(row.why for row in inside)
    assert [row.path for row in rows if row.state == "fused"] == ["0"]


def test_a_value_is_removed_from_a_frozen_list():
    """`gc.freeze` hides objects from `gc.get_referrers`."""
    model = build("fills-a-closure")
    before = list(busy_models.SEEN)
    gc.freeze()
    try:
        explain(model)
    finally:
        gc.unfreeze()
    assert busy_models.SEEN == before


def test_what_a_forward_does_not_name_is_not_copied_to_trace_it():
    model = busy_models.Block().double().eval()
    model.trainer = busy_models.Uncopyable()
    x = torch.randn(SHAPE, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(TypeError, match=r"^model: cannot be copied .* use inplace=True"):
        fuse(model)
    assert [row.state for row in explain(fuse(model, inplace=True)).rows] == ["fused"]
    torch.testing.assert_close(model(x), expected)


def test_a_traced_model_keeps_its_mode_and_the_original_its_statistics():
    model = build("traced").eval()
    state = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert not any(m.training for m in fused.modules())
    fused(torch.randn(SHAPE, dtype=torch.float64))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
