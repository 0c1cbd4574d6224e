"""An op under one implementation, held against the reference by the tolerance rule."""

import functools

import torch

from resnet_fast.spec import reference
from resnet_fast.spec.tolerance import assert_close, plain_runs
from resnet_fast.verify.op_cases import cast, op_of

GRADIENTS = (
    "bn_bwd_finalize", "bn_act_bwd_reduce", "bn_act_bwd_apply", "max_pool_bwd", "conv_bprop",
)  # fmt: skip


def outputs(result):
    return result if isinstance(result, tuple | list) else (result,)


def judge(impl, dtype, variant, args, name):
    """Run the op under `impl` and hold every floating result against the reference's."""
    op = op_of(variant)
    actual = outputs(getattr(torch.ops.resnet_fast, op)(*args, impl.name))
    specification = getattr(reference, op)
    exact = outputs(specification(*cast(args)))
    if dtype == torch.float64:  # nothing is wider: the rule scales the fp32 result's error
        args = [a.float() if is_floating(a) else a for a in args]
    again = functools.partial(specification, *args)
    same = outputs(again())
    for i, results in enumerate(zip(actual, same, exact, strict=True)):
        what = f"{variant} result {i} of {name}"
        assert results[0].shape == results[1].shape, what
        if results[0].dtype == torch.uint8:
            continue  # test_mask, test_index
        assert_close(
            *results, what, gradient=op in GRADIENTS,
            more=lambda i=i: [outputs(run)[i] for run in plain_runs(again)],
        )  # fmt: skip
        for format in (torch.contiguous_format, torch.channels_last):
            if results[0].dim() == 4 and results[0].numel():
                dense = [r.is_contiguous(memory_format=format) for r in results[:2]]
                assert dense[0] == dense[1], f"{what}: {format}"


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()
