"""What a type checker knows of the public names: `make lint` runs mypy over this file."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import resnet_fast

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value: Any, kind: Any) -> Any:
        """As typing's, and the value is of that class."""
        assert isinstance(value, kind)
        return value


class Net(nn.Module):
    """A model of a user's own, with a method that nn.Module lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))

    def channels(self) -> int:
        return self.conv.out_channels


def test_fuse_and_unfuse_keep_the_type() -> None:
    fused = assert_type(resnet_fast.fuse(Net()), Net)
    assert fused.channels() == 8
    assert_type(resnet_fast.unfuse(fused, inplace=True), Net)


def test_functions_and_models() -> None:
    net = assert_type(resnet_fast.create_model("cifar_resnet20"), resnet_fast.ResNet)
    x = torch.randn(1, 3, 8, 8)
    assert_type(resnet_fast.add_relu(x, x), Tensor)
    assert_type(resnet_fast.bn_act(x, None, None, torch.zeros(3), torch.ones(3)), Tensor)
    assert_type(resnet_fast.empty_cache(), int)
    assert_type(str(resnet_fast.explain(net)), str)


def test_the_package_is_typed() -> None:
    from importlib.resources import files

    assert (files("resnet_fast") / "py.typed").is_file()
