"""Plain PyTorch twins of what is fused: the judge, its runs, and inputs away from the ReLU kink."""

import copy
import functools

import torch
import torch.nn.functional as F

from resnet_fast.modules import PLAIN, GlobalAvgPool2d
from resnet_fast.spec.layers import NORMS
from resnet_fast.spec.tolerance import assert_close, plain_runs
from resnet_fast.verify.settle import Kinks, settle

TWINS = {**PLAIN, GlobalAvgPool2d: torch.nn.AdaptiveAvgPool2d}


def plain(module):
    """A copy of `module` whose fused modules, at any depth, are their plain classes."""
    module = copy.deepcopy(module)
    for child in module.modules():
        child.__class__ = TWINS.get(type(child), type(child))
    return module


def conv_bn_act(
    x, weight, bn_weight, bn_bias, running_mean, running_var, *,
    bias=None, residual=None, stride=1, padding=0, dilation=1, groups=1,
    training=False, momentum=0.1, eps=1e-5, relu=True, impl=None,
):  # fmt: skip
    """`resnet_fast.conv_bn_act` by PyTorch's own calls."""
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return bn_act(
        z, bn_weight, bn_bias, running_mean, running_var, residual=residual,
        training=training, momentum=momentum, eps=eps, relu=relu,
    )  # fmt: skip


def bn_act(
    x, bn_weight, bn_bias, running_mean, running_var, *,
    residual=None, training=False, momentum=0.1, eps=1e-5, relu=True, impl=None,
):  # fmt: skip
    """`resnet_fast.bn_act` by PyTorch's own calls."""
    y = F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def add_relu(x, residual, *, impl=None):
    """`resnet_fast.add_relu` by PyTorch's own calls."""
    return F.relu(x + residual)


def run_chain(chain, x, tensors, residual, running):
    """`resnet_fast.functional.run_chain` by the equations of `spec.chain`."""

    def conv(i, h):
        geometry = chain.all_convs[i]
        return F.conv2d(
            h, *tensors.convs[i],
            geometry.stride, geometry.padding, geometry.dilation, geometry.groups,
        )  # fmt: skip

    def norm(i, h):
        if chain.all_norms[i] is None:
            return h
        weight, bias, mean, var = tensors.norms[i]
        rule = chain.all_norms[i]
        mean, var = (None, None) if rule.batch_stats else (mean, var)
        return F.batch_norm(h, mean, var, weight, bias, rule.batch_stats, 0.0, rule.eps)

    n, h, first = len(chain.convs), x, x
    for j in range(n):
        h = h if chain.norms[j] is None else F.relu(norm(j, h))
        first = h if j == 0 else first
        h = conv(j, h)
    h = norm(n, h)
    if chain.shortcut == "projection":
        h = h + norm(n + 1, conv(n, first))
    elif chain.shortcut != "none":
        h = h + (x if chain.shortcut == "identity" else residual)
    h = F.relu(h) if chain.relu else h
    if chain.pool is None:
        return h
    return F.max_pool2d(h, chain.pool.kernel, chain.pool.stride, chain.pool.padding)


def randomize(model):
    """`model` with normalizations that show when they are swapped, ignored or taken as 1 and 0."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.affine:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def away_from_kink(draw, run, margin=1e-4):
    """draw() from the first seed whose plain `run(*draw())` keeps every ReLU's input off zero."""
    for seed in range(200):
        torch.manual_seed(seed)
        drawn = draw()
        with Kinks() as kink, torch.no_grad():
            run(*drawn)
        if kink.least > margin:
            return drawn
    raise AssertionError(f"no seed keeps every ReLU's input {margin} away from zero")


def settled(draw, dtype=torch.float32):
    """module, x = draw() from the first seed that `settle` can move off the kink of `dtype`.

    Only the biases of the normalizations move; margins are of the order of dtype's rounding.
    """
    for seed in range(200):
        torch.manual_seed(seed)
        module, x = draw()
        exact = plain(module).double()
        if not settle(exact, x.double(), dtype=dtype):
            continue
        module.load_state_dict(exact.state_dict())
        margin = 2 * max(torch.finfo(dtype).eps, 1e-5)
        with Kinks() as kink, torch.no_grad():
            plain(module).double()(x.double())
        if kink.least > margin:
            return module, x
    raise AssertionError(f"no seed keeps every ReLU's input {margin} away from zero")


def step(run, leaves, dy=None, buffers=None):
    """One forward and backward pass: y, the gradient of every leaf, and the buffers after it.

    run() gives y; leaves and buffers are {name: tensor}; without `dy`, y's sum is differentiated.
    """
    y = run()
    if dy is None:
        y.sum().backward()
    else:
        y.backward(dy)
    found = {"y": y.detach()}
    found.update({f"d{name}": leaf.grad for name, leaf in leaves.items()})
    found.update({name: buffer.clone() for name, buffer in (buffers or {}).items()})
    return found


def module_step(module, x, dy=None, run=None, **inputs):
    """`step` of a module (or of `run` in its place) on x and named further inputs.

    The leaves are x, those inputs and the module's parameters, the buffers are the module's.
    """
    leaves = {"x": x, **inputs}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    return step(
        lambda: (module if run is None else run)(*leaves.values()),
        {**leaves, **dict(module.named_parameters())},
        dy, dict(module.named_buffers()),
    )  # fmt: skip


def judge(actual, same, exact, dtype=None, again=None):
    """Every result of a `step` by the one rule; `dtype` as `spec.tolerance.compare`'s.

    `again` repeats what gave `same`, for `tolerance.plain_runs`.
    """
    assert actual.keys() == same.keys() == exact.keys()
    runs = functools.cache(lambda: list(plain_runs(again)) if again else [])
    for name, value in actual.items():
        if exact[name] is None:
            assert value is None, f"{name}: expected no gradient"
            continue
        assert value is not None, f"{name}: no gradient"
        narrower = dtype if value.is_floating_point() else None
        assert_close(
            value, same[name], exact[name], name, gradient=name.startswith("d"), dtype=narrower,
            more=lambda name=name: [run[name] for run in runs()],
        )  # fmt: skip
