"""ResNet-20 on scikit-learn's digits: plain PyTorch and fused modules trained in lock step.

1,797 real scans of 8×8 pixels and 17 grey levels (Alpaydin & Kaynak 1998, UCI), doubled to 16×16
and given three equal channels.
All nets start from the same weights and see the same batches, so that their losses can be compared
step by step. They are equal up to rounding at first; later they diverge, because training amplifies
differences. Plain PyTorch in NCHW against channels_last shows how much divergence is normal.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import rotated
from resnet_fast.training import load_data

MODEL = "cifar_resnet20"
EPOCHS = 10
BATCH = 32
PEAK_LR = 0.05
START_LR = 1e-4
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SHIFT = 2  # pixels of 16


@dataclass(frozen=True)
class Digits:
    """Images [N,3,16,16] of zero mean and unit variance, labels [N]; the split is fixed."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Curve:
    """One model's training: a loss per step, a test accuracy per epoch, seconds in its steps."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


def load(seed: int = 0) -> Digits:
    """The digits, a fifth of them (stratified) for testing. RuntimeError without scikit-learn."""
    data = load_data("digits", seed=seed)
    train, test = (
        data.preprocessing.normalize(x).contiguous(memory_format=torch.channels_last)
        for x in (data.train_x, data.test_x)
    )
    return Digits(train, data.train_y, test, data.test_y)


def batches(data: Digits, epochs: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of BATCH, every image shifted by up to SHIFT pixels; drops a last short one.
    """
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
            yield x[image, :, rows, columns].permute(0, 3, 1, 2), data.train_y[chosen]


def nets(impl: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Module]:
    """Three nets with equal weights: "plain" and "fused" in channels_last, and "plain NCHW"."""
    import resnet_fast

    torch.manual_seed(seed)
    plain = resnet_fast.create_model(MODEL, fused=False)
    fused = resnet_fast.create_model(MODEL, impl=impl)
    fused.load_state_dict(plain.state_dict())
    nchw = copy.deepcopy(plain).to(dtype)
    last = {"dtype": dtype, "memory_format": torch.channels_last}
    return {"plain": plain.to(**last), "fused": fused.to(**last), "plain NCHW": nchw}


def train(
    models: Mapping[str, nn.Module],
    data: Digits,
    *,
    epochs: int = EPOCHS,
    steps: int | None = None,
    progress: Callable[..., Iterable] | None = None,
) -> dict[str, Curve]:
    """Train all `models` on the same batches, in turns; returns one curve each.

    SGD with Nesterov momentum, one cycle of the learning rate from START_LR to PEAK_LR and back
    (Smith & Topin 2017, arXiv:1708.07120). It starts low so that differences grow slowly.
    `steps` limits the number of steps; `progress(list)` may wrap the batches in a progress bar.
    """
    an_epoch = len(data.train_y) // BATCH
    total = epochs * an_epoch
    curves = {name: Curve() for name in models}
    optimizers, schedules = {}, {}
    for name, model in models.items():
        model.train()
        optimizers[name] = torch.optim.SGD(
            model.parameters(), PEAK_LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(
            optimizers[name], PEAK_LR, total_steps=total, pct_start=0.25,
            div_factor=PEAK_LR / START_LR, cycle_momentum=False,
        )  # fmt: skip
    work = list(itertools.islice(batches(data, epochs), steps))
    for number, (x, y) in enumerate(work if progress is None else progress(work)):
        for name in rotated(list(models), number):
            model, optimizer = models[name], optimizers[name]
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(_as_of(model, x)), y)
            loss.backward()
            optimizer.step()
            curves[name].seconds += time.perf_counter() - start
            schedules[name].step()
            curves[name].losses.append(loss.item())
        if (number + 1) % an_epoch == 0:
            for name, model in models.items():
                curves[name].accuracies.append(accuracy(model, data))
    return curves


def drift(curves: Mapping[str, Curve], name: str, beside: str = "plain") -> list[float]:
    """|loss − loss of `beside`| / loss of `beside`, one value per step."""
    pairs = zip(curves[name].losses, curves[beside].losses, strict=True)
    return [abs(a - b) / b for a, b in pairs]


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test images that `model` classifies correctly; leaves it in training mode."""
    model.eval()
    with torch.no_grad():
        logits = model(_as_of(model, data.test_x))
    model.train()
    return (logits.argmax(1) == data.test_y).double().mean().item()


def _as_of(model: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype and memory format of the model's filters."""
    w = model.conv1.weight
    last = w.is_contiguous(memory_format=torch.channels_last)
    return x.to(w.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
