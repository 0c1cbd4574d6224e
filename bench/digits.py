"""ResNet-20 on scikit-learn's digits: plain PyTorch and fused modules trained in lock step.

1,797 real scans of 8×8 pixels and 17 grey levels (Alpaydin & Kaynak 1998, UCI), doubled to 16×16.
Both nets start from the same weights and see the same batches, so that their losses can be
compared step by step: equal up to rounding at first, and apart like any two runs of a chaotic
system later. The fused steps and the plain ones take turns, so their times can be compared too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL = "cifar_resnet20"
EPOCHS = 12
BATCH = 64
PEAK_LR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SHIFT = 2  # pixels of 16
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """Images [N,1,16,16] of zero mean and unit variance, labels [N]; split once and for all."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Curve:
    """What one net did: a loss a step, a test accuracy an epoch, seconds in its steps."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


def load(seed: int = 0) -> Digits:
    """The digits, a fifth of them (stratified) for the test. RuntimeError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RuntimeError(f"the digits need scikit-learn (pip install scikit-learn): {error}") from None
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    y = torch.tensor(labels)
    train, test = train_test_split(
        range(len(y)), test_size=TEST_SHARE, random_state=seed, stratify=labels
    )
    mean, std = x[train].mean(), x[train].std()
    x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
    return Digits(x[train], y[train], x[test], y[test])


def batches(data: Digits, epochs: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of BATCH, every image moved by up to SHIFT pixels; the rest is dropped."""
    generator = torch.Generator().manual_seed(seed)
    empty = data.train_x.min()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_y), generator=generator)
        for chosen in order.split(BATCH)[: len(order) // BATCH]:
            x = F.pad(data.train_x[chosen] - empty, (SHIFT,) * 4) + empty
            rows, columns = torch.randint(2 * SHIFT + 1, (2, len(chosen), 1), generator=generator)
            h, w = data.train_x.shape[2:]
            image = torch.arange(len(chosen)).view(-1, 1, 1)
            rows = (rows + torch.arange(h)).unsqueeze(2)
            columns = (columns + torch.arange(w)).unsqueeze(1)
            x = x[image, 0, rows, columns].unsqueeze(1)
            yield x.contiguous(memory_format=torch.channels_last), data.train_y[chosen]


def twins(impl: str, seed: int = 0) -> dict[str, nn.Module]:
    """The plain and the fused net with equal weights, channels_last."""
    import resnet_fast

    torch.manual_seed(seed)
    plain = resnet_fast.create_model(MODEL, in_channels=1, fused=False)
    fused = resnet_fast.create_model(MODEL, in_channels=1, impl=impl)
    fused.load_state_dict(plain.state_dict())
    return {
        name: net.to(memory_format=torch.channels_last)
        for name, net in (("plain", plain), ("fused", fused))
    }


def compare(
    nets: dict[str, nn.Module],
    data: Digits,
    *,
    epochs: int = EPOCHS,
    steps: int | None = None,
    progress: Callable[..., Iterator] | None = None,
) -> dict[str, Curve]:
    """Train all `nets` on the same batches; a curve each.

    SGD with Nesterov momentum, one cycle of the learning rate up to PEAK_LR (Smith & Topin 2017,
    arXiv:1708.07120). `steps` ends it early; `progress(iterable, total=…)` may draw a bar.
    """
    an_epoch = len(data.train_y) // BATCH
    total = epochs * an_epoch
    curves = {name: Curve() for name in nets}
    optimizers, schedules = {}, {}
    for name, net in nets.items():
        net.train()
        optimizers[name] = torch.optim.SGD(
            net.parameters(), PEAK_LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(
            optimizers[name], PEAK_LR, total_steps=total, cycle_momentum=False
        )
    work = enumerate(batches(data, epochs))
    bar = work if progress is None else progress(work, total=min(total, steps or total))
    for number, (x, y) in bar:
        if number == steps:
            break
        names = list(nets) if number % 2 else list(nets)[::-1]
        for name in names:
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            loss = F.cross_entropy(nets[name](x), y)
            loss.backward()
            optimizers[name].step()
            curves[name].seconds += time.perf_counter() - start
            schedules[name].step()
            curves[name].losses.append(loss.item())
        if (number + 1) % an_epoch == 0:
            for name, net in nets.items():
                curves[name].accuracies.append(accuracy(net, data))
    return curves


def accuracy(net: nn.Module, data: Digits) -> float:
    """Share of the test images that `net` reads right; leaves it in training mode."""
    net.eval()
    with torch.inference_mode():
        right = (net(data.test_x).argmax(1) == data.test_y).double().mean().item()
    net.train()
    return right
