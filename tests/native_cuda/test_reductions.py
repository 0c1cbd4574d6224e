"""The reductions of `csrc/cuda` in as many partial results as a large GPU makes, against fp64."""

import emulation
import pytest
import torch

from resnet_fast.spec import reference
from resnet_fast.spec.tolerance import assert_close

pytestmark = [
    pytest.mark.skipif(emulation.refusal() is not None, reason=str(emulation.refusal())),
    pytest.mark.usefixtures("poisoned_memory"),
]
# One, fewer than a merge's 32 rows of threads, a round of 8 loads and one more, rounds and a part.
SPLITS = pytest.mark.parametrize("splits", (1, 31, 257, 801))
CHANNELS = 20  # three blocks of a merge, the last in part
ROWS = 85  # of threads in a split


def integers(low, high, splits):
    """A value for every thread, so that every split has a partial result of its own."""
    x = torch.randint(low, high, (1, CHANNELS, splits, ROWS)).float()
    return x.contiguous(memory_format=torch.channels_last)


@SPLITS
@pytest.mark.parametrize("residual", [False, True], ids=["two-sums", "three-sums"])
def test_sums(splits, residual):
    """Exact in a split in fp32; over all splits only in double."""
    dy = integers(0, 2**11, splits)
    mean, rstd = torch.arange(CHANNELS) % 2 + 0.0, 2.0 ** (torch.arange(CHANNELS) % 3)
    z = [integers(-1, 3, splits) for _ in range(2)]
    second = (z[1], mean.flip(0), rstd.flip(0)) if residual else (None, None, None)
    args = dy, None, z[0], mean, rstd, *second
    ops = emulation.ops()
    with emulation.splits(splits):
        found = ops.bn_act_bwd_reduce(*args)
    wide = [a if a is None else a.double() for a in args]
    scales = rstd.double(), rstd.double() if residual else None
    exact = reference.bn_act_bwd_reduce(*wide[:5], scales[0], *wide[5:], scales[1])
    exact = exact[0], exact[1], exact[4]
    for actual, expected in zip(found, exact, strict=True):
        assert torch.equal(actual, expected.float())


@SPLITS
def test_moments(splits):
    x = integers(-(2**7), 2**7, splits) + 1000
    x += torch.arange(splits).view(-1, 1)  # each split has a mean of its own
    ops = emulation.ops()
    with emulation.splits(splits):
        found = ops.bn_stats(x)
    same, exact = reference.bn_stats(x), reference.bn_stats(x.double())
    for i, what in enumerate(("mean", "m2")):
        assert_close(found[i], same[i], exact[i], what)
