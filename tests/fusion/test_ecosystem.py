"""Structures of the packages that people use: they compute the same, and run fused."""

import copy
import functools
import pickle

import pytest
import torch
from ecosystem_models import ECOSYSTEM, built
from torch.utils import _pytree

from bench.executed import executed
from resnet_fast import fuse, unfuse

# PyTorch's own, where it copies an exported module.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
MODES = {
    name: (False,) if goal.training is None else (False, True)
    for name, (_, _, goal) in ECOSYSTEM.items()
}


@functools.cache
def pair(name):
    """A model, its fused copy with tensors of its own, and an input; copy what you change."""
    torch.manual_seed(0)
    plain, x = built(name)
    return plain, fuse(copy.deepcopy(plain)), x


def in_mode(name, model, training):
    return model.train(training) if len(MODES[name]) > 1 else model


def results(name, model, x):
    """Of a step and a call without gradients in each mode; of dropout, the same draw.

    Outputs, gradients of the input and the parameters, and buffers, by name.
    """
    found, parameters = {}, dict(model.named_parameters())
    for training in MODES[name]:
        in_mode(name, model, training)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = _pytree.tree_leaves(model(leaf * 1.0))
        loss = sum(value.square().sum() for value in y)
        gradients = torch.autograd.grad(loss, [leaf, *parameters.values()], allow_unused=True)
        torch.manual_seed(1)
        with torch.no_grad():
            again = _pytree.tree_leaves(model(x))
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        step = {"y": y, "again": again, **buffers}
        step |= {f"d{key}": g for key, g in zip(["x", *parameters], gradients, strict=True)}
        found |= {f"{key} in {training=}": value for key, value in step.items()}
    return found


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, value in actual.items():
        if value is None or expected[key] is None:
            assert value is expected[key], key
        else:
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9)


@functools.cache
def expected(name):
    plain, _, x = pair(name)
    return results(name, copy.deepcopy(plain), x)


@pytest.mark.parametrize("name", ECOSYSTEM)
def test_computes_the_same(name):
    plain, model, x = pair(name)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(results(name, copy.deepcopy(model), x), expected(name))


@pytest.mark.parametrize("name", ECOSYSTEM)
def test_a_copy_or_a_pickle_computes_the_same(name):
    plain, model, x = pair(name)
    copied = copy.deepcopy(model)
    try:
        pickle.dumps(plain)
    except Exception:  # as torch.export's
        assert name == "exported"
    else:
        copied = pickle.loads(pickle.dumps(model))
    before = results(name, copy.deepcopy(copied), x)
    assert_same(before, expected(name))
    assert_same(results(name, copied, x), before)


@pytest.mark.parametrize("name", ECOSYSTEM)
def test_unfused_it_is_what_it_was(name):
    plain, _, x = pair(name)
    model = copy.deepcopy(plain)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    assert unfuse(fuse(model, inplace=True), inplace=True) is model
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert_same(results(name, model, x), expected(name))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ECOSYSTEM)
def test_the_executed_share_reaches_the_goal(name, training):
    if training not in MODES[name]:
        pytest.skip("it has no training mode")
    counts = []
    for model in pair(name)[:2]:
        model = in_mode(name, copy.deepcopy(model), training)
        x = pair(name)[2].clone().requires_grad_(training)
        counts.append(executed(lambda model=model, x=x: model(x * 1.0), gradients=training))
    every, rest = counts
    goal = ECOSYSTEM[name][2]
    most = goal.training if training else goal.evaluation
    assert every.convolutions and most.within(every)
    assert rest.within(most), f"left in plain PyTorch: {rest} of {every}, expected at most {most}"
