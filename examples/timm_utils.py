"""Fuse a timm model and train it with timm's optimizer, scheduler, Mixup and ModelEmaV3.

Needs: pip install timm scikit-learn
Run:   python examples/timm_utils.py
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import resnet_fast


def main(steps=60):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    channels = (32, 64, 128, 256)  # half of ResNet-18's, to be quick; any ResNet of timm will do
    model = timm.create_model("resnet18", channels=channels, num_classes=10)
    resnet_fast.fuse(model.to(device, memory_format=torch.channels_last), inplace=True)

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=24).repeat(1, 3, 1, 1)
    x = x.to(device, memory_format=torch.channels_last)
    y = torch.tensor(digits.target).to(device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=5e-4)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=5, warmup_lr_init=1e-4)
    ema = ModelEmaV3(model, decay=0.9)  # a fused copy
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=10)
    criterion = SoftTargetCrossEntropy()

    for step in range(steps):
        model.train()
        batch = torch.randint(1440, (64,), device=device)
        images, targets = mixup(x[batch], y[batch])
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(step + 1)
        ema.update(model)

    ema.eval()
    with torch.no_grad():
        accuracy = (ema(x[1440:]).argmax(1) == y[1440:]).float().mean().item()
    for net in (model, ema.module):
        assert {row.state for row in resnet_fast.explain(net).rows} == {"fused"}
    assert accuracy > 0.8
    print(f"ok: model and average are fused, test accuracy of the average {accuracy:.3f}")


if __name__ == "__main__":
    main()
