"""An op's results, held against the reference by the tolerance rule."""

import functools

import torch

from resnet_fast.spec import reference
from resnet_fast.spec.tolerance import assert_close, plain_runs
from resnet_fast.verify.op_cases import cast, op_of

GRADIENTS = (
    "bn_bwd_finalize", "bn_act_bwd_reduce", "bn_act_bwd_apply", "max_pool_bwd", "conv_bprop",
    "gated_act_bwd_reduce", "gated_act_bwd_apply",
)  # fmt: skip


def outputs(result):
    return result if isinstance(result, tuple | list) else (result,)


def judge_impl(impl, variant, args, name):
    """`judge` of a variant's op under `impl`."""
    op = op_of(variant)
    run = getattr(torch.ops.resnet_fast, op)
    judge(op, args, f"{variant} of {name}", lambda: run(*args, impl.name))


def judge(op, args, what, run):
    """Hold every floating result of run() against `reference.op` of args, in fp64 and in theirs."""
    actual, specification = outputs(run()), getattr(reference, op)
    exact = outputs(specification(*cast(args)))
    if args[0].dtype == torch.float64:  # nothing is wider: the rule scales the fp32 result's error
        args = cast(args, torch.float32)
    again = functools.partial(specification, *args)
    same = outputs(again())
    for i, results in enumerate(zip(actual, same, exact, strict=True)):
        result = f"{what}, result {i}"
        assert results[0].shape == results[1].shape, result
        if results[0].dtype == torch.uint8:
            continue  # test_mask, test_index
        assert_close(
            *results, result, gradient=op in GRADIENTS,
            more=lambda i=i: [outputs(run)[i] for run in plain_runs(again)],
        )  # fmt: skip
        for format in (torch.contiguous_format, torch.channels_last):
            if results[0].dim() == 4 and results[0].numel():
                dense = [r.is_contiguous(memory_format=format) for r in results[:2]]
                assert dense[0] == dense[1], f"{result}: {format}"
