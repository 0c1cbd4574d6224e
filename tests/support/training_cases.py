"""Data and models so small that a training run takes a second."""

import torch
from torch import nn

import resnet_fast
from resnet_fast.training import Recipe
from resnet_fast.training.data import Data
from resnet_fast.training.history import TIMES
from resnet_fast.training.preprocessing import Preprocessing

RECIPE = Recipe(epochs=3, batch_size=24, lr=0.05, warmup=1.0, augment="crop-flip", seed=3)
IMAGES = {"train": 100, "test": 31}  # neither goes into batches or processes
STEPS = IMAGES["train"] // RECIPE.batch_size


def data(size=8):
    """Four classes, each a bright band under noise."""
    generator = torch.Generator().manual_seed(1)
    n = sum(IMAGES.values())
    y = torch.arange(n) % 4
    x = torch.randint(0, 120, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    band = size // 4
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, label * band : (label + 1) * band] += 100
    counts = list(IMAGES.values())
    (train_x, test_x), (train_y, test_y) = x.split(counts), y.split(counts)
    preprocessing = Preprocessing(size, size, (0.4, 0.4, 0.4), (0.2, 0.25, 0.3))
    names = ("top", "upper", "lower", "bottom")
    return Data("bands", names, preprocessing, "crop", train_x, train_y, test_x, test_y)


def model(impl="auto", dropout=0.0, dtype=torch.float32, fused=True):
    """A residual net of two stages, the same weights every time."""
    torch.manual_seed(0)
    options = {"impl": impl} if fused else {"fused": False}
    block = resnet_fast.BasicBlock
    net = resnet_fast.ResNet(block, [1, 1], 4, stem="cifar", planes=8, **options)
    if dropout:
        net.fc = nn.Sequential(nn.Dropout(dropout), net.fc)
    return net.to(dtype)


def without_norms(dtype=torch.float64):
    """A net whose images do not know each other."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 4),
    ).to(dtype)  # fmt: skip


def metrics(history):
    """The rows of a history without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history.epochs]


def assert_same(a, b):
    """Two states of tensors and plain values are the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            if key not in TIMES:
                assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b
