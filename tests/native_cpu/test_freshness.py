"""Inference sees every change of parameters and statistics: nothing prepared earlier is stale."""

import copy

import pytest
import torch
import twins
from calls import OPS

from resnet_fast import Bottleneck

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def scale_in_place(module):
    with torch.no_grad():
        module.conv2.weight.mul_(1.5)


def scale_data(module):
    module.conv3.weight.data.mul_(1.5)


def replace_data(module):
    module.conv1.weight.data = torch.randn_like(module.conv1.weight)


def replace_parameter(module):
    module.conv1.weight = torch.nn.Parameter(torch.randn_like(module.conv1.weight))


def scale_affine(module):
    with torch.no_grad():
        module.bn2.weight.mul_(2.0)
        module.bn3.bias.add_(1.0)


def train_statistics(module):
    module.train()
    with torch.no_grad():
        module(torch.randn(4, 16, 7, 7))
    module.eval()


def load(module):
    module.load_state_dict(Bottleneck(16, 4).state_dict())


def optimizer_step(module):
    optimizer = torch.optim.SGD(module.parameters(), 0.5, momentum=0.9)
    module(torch.randn(4, 16, 7, 7)).sum().backward()
    optimizer.step()


def fused_optimizer_step(module):
    optimizer = torch.optim.Adam(module.parameters(), 0.1, fused=True)
    module(torch.randn(4, 16, 7, 7)).sum().backward()
    optimizer.step()


def other_eps(module):
    module.bn1.eps = 0.5


def running_variance(module):
    module.bn3.running_var.fill_(9.0)


def other_format(module):
    module.to(memory_format=torch.channels_last)


CHANGES = [scale_in_place, scale_data, replace_data, replace_parameter, scale_affine,
           train_statistics, load, optimizer_step, fused_optimizer_step, other_eps,
           running_variance, other_format]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_changes_are_seen(impl, change):
    impl.need(torch.float32, *OPS)
    module = Bottleneck(16, 4, impl=impl.name).eval()
    x = torch.randn(2, 16, 7, 7)
    with torch.no_grad():
        before = module(x)
        assert torch.equal(module(x), before)
    change(module)
    plain = twins.plain(module)
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        after = module(x)
        twins.judge({"y": after}, {"y": plain(x)}, {"y": exact(x.double())})
    assert change is other_format or not torch.allclose(after, before)


def test_freed_parameters_are_forgotten(impl):
    """Modules that live one after the other at the same addresses do not share anything."""
    impl.need(torch.float32, *OPS)
    x = torch.randn(2, 16, 7, 7)
    for place in range(8):
        module = Bottleneck(16, 4, impl=impl.name).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            module.bn3.bias.zero_()[place] = 1.0
            y = module(x)
        expected = torch.relu(x + module.bn3.bias.view(1, -1, 1, 1))
        torch.testing.assert_close(y, expected.detach())


def test_shapes_and_dtypes_share_parameters(impl):
    """The same filters for other sizes, formats and dtypes, in turn."""
    impl.need(torch.float32, *OPS)
    impl.need(torch.bfloat16, *OPS)
    module = Bottleneck(16, 4, impl=impl.name).eval()
    plain, exact = twins.plain(module), twins.plain(module).double()
    for _ in range(2):
        for size in ((1, 16, 7, 7), (4, 16, 5, 9)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(size).bfloat16().float().contiguous(memory_format=layout)
                with torch.no_grad():
                    y = module(x)
                    twins.judge({"y": y}, {"y": plain(x)}, {"y": exact(x.double())})
                    with torch.autocast(impl.device, torch.bfloat16):
                        y, same = module(x.bfloat16()), plain(x.bfloat16())
                    twins.judge({"y": y}, {"y": same}, {"y": exact(x.double())})
