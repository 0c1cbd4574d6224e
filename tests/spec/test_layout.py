"""Memory formats: which one a tensor has, the rows of its mask, and sizes past 32 bits."""

import os

import pytest
import torch

from resnet_fast import functional
from resnet_fast.spec import layout
from resnet_fast.spec.chain import Chain, Conv, ConvParams, Norm, NormParams, Tensors

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def of(shape, layout):
    return torch.zeros(shape).contiguous(memory_format=layout)


FORMATS = {
    "nchw": (of((2, 3, 4, 5), NCHW), None, NCHW),
    "nhwc": (of((2, 3, 4, 5), NHWC), None, NHWC),
    "one-channel": (of((2, 1, 4, 5), NCHW), None, NCHW),
    "one-channel-nhwc-filter": (of((2, 1, 4, 5), NCHW), of((6, 3, 3, 3), NHWC), NHWC),
    "one-channel-1x1-filter": (of((2, 1, 4, 5), NCHW), of((6, 1, 1, 1), NHWC), NCHW),
    "one-pixel": (of((2, 3, 1, 1), NHWC), of((6, 3, 3, 3), NCHW), NCHW),
    "nchw-nhwc-filter": (of((2, 3, 4, 5), NCHW), of((6, 3, 3, 3), NHWC), NCHW),
    "nhwc-nchw-filter": (of((2, 3, 4, 5), NHWC), of((6, 3, 3, 3), NCHW), NHWC),
    "sliced-nchw": (of((2, 6, 4, 5), NCHW)[:, ::2], None, NCHW),
    "sliced-nhwc": (of((2, 6, 4, 5), NHWC)[:, :3], None, NHWC),
    "expanded": (torch.zeros(1).expand(2, 3, 4, 5), None, NCHW),
    "transposed": (of((2, 3, 5, 4), NCHW).transpose(2, 3), None, NCHW),
}


@pytest.mark.parametrize("name", FORMATS)
def test_memory_format(name):
    x, weight, expected = FORMATS[name]
    assert layout.memory_format(x, weight) is expected


MASKS = {  # shape, format → rows and bytes a row
    "nchw": ((2, 3, 7, 7), NCHW, (6, 7)),
    "nhwc": ((2, 3, 7, 7), NHWC, (98, 1)),
    "nhwc-1000": ((2, 1000, 3, 3), NHWC, (18, 125)),
    "one-channel": ((2, 1, 7, 7), NCHW, (98, 1)),
    "empty": ((0, 8, 5, 5), NCHW, (0, 4)),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_shape(name):
    shape, fmt, expected = MASKS[name]
    assert layout.mask_shape(of(shape, fmt)) == expected


HUGE = (70_000, 64, 31, 33)  # 4.6e9 elements


@pytest.mark.parametrize("fmt", [NCHW, NHWC], ids=["NCHW", "channels_last"])
def test_sizes_past_32_bits(fmt):
    """Shapes, strides and masks of every op on tensors of more than 2³² elements (no storage)."""
    x = torch.empty(HUGE, device="meta", memory_format=fmt)
    assert x.numel() > 2**32
    rows, inner = layout.rows_of(x)
    assert rows * inner == x.numel()
    assert layout.mask_shape(x) == (rows, (inner + 7) // 8)
    vector = torch.empty(64, device="meta")
    y, mask = torch.ops.resnet_fast.bn_act(x, vector, vector, x, None, None, True, True, "auto")
    assert y.shape == x.shape and y.stride() == x.stride()
    assert tuple(mask.shape) == layout.mask_shape(x)
    assert torch.ops.resnet_fast.add_relu_bwd(y, mask, "auto").stride() == x.stride()
    w = torch.empty(64, 64, 3, 3, device="meta", memory_format=fmt)
    z = torch.ops.resnet_fast.conv_fprop(
        x, w, vector, vector, True, vector, vector, 1e-5, None, False, [1, 1], [1, 1], [1, 1], 1,
        "auto",
    )[0]  # fmt: skip
    assert z.shape == x.shape and z.stride() == x.stride()


def test_block_past_32_bits():
    """A whole training chain on meta tensors: counts and shapes do not wrap."""
    conv = Conv((1, 1), (1, 1))
    chain = Chain((conv, conv), (None, Norm(), Norm()), True, "identity")
    x = torch.empty(HUGE, device="meta", requires_grad=True)
    params = [ConvParams(torch.empty(64, 64, 3, 3, device="meta")) for _ in range(2)]
    norms = [NormParams(*(torch.empty(64, device="meta") for _ in range(4))) for _ in range(2)]
    tensors = Tensors(tuple(params), (NormParams(), *norms, NormParams()))
    y = functional.run_chain(chain, x, tensors, None, [None] * 4)
    y.backward(torch.empty(HUGE, device="meta"))
    assert x.grad.shape == HUGE


def available_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_elements_past_32_bits(impl):
    """The last elements of more than 2³¹ bf16 values, computed: x is zero but for them."""
    if impl.name == "reference":
        pytest.skip("plain PyTorch widens the tensor; it indexes with 64 bits")
    impl.need(torch.bfloat16, "add_relu", "bn_stats")
    impl.need_speed()
    if available_memory() < 7e9:
        pytest.skip("needs 7 GB of free memory")
    n, c, h, w = shape = (2, 24, 6_700, 6_700)
    x = torch.zeros(n * c * h * w, dtype=torch.bfloat16, device=impl.device)
    x = x.view(n, h, w, c).permute(0, 3, 1, 2)
    assert x.shape == shape and x.numel() > 2**31
    x[-1, -1, -1, -8:] = torch.tensor([1, -1, 2, -2, 3, -3, 4, -4])
    y, mask = torch.ops.resnet_fast.add_relu(x, x, True, impl.name)
    assert y[-1, -1, -1, -8:].tolist() == [2, 0, 4, 0, 6, 0, 8, 0]
    assert mask[-8:, -1].tolist() == [128, 0] * 4 and mask.count_nonzero() == 4
    del y, mask
    mean, m2 = torch.ops.resnet_fast.bn_stats(x, impl.name)
    assert mean.abs().max() == 0 and m2[:-1].max() == 0
    torch.testing.assert_close(m2[-1], torch.tensor(60.0))
