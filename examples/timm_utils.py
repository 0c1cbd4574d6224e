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


def main(epochs=4):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model("resnet18", pretrained=False, num_classes=10, in_chans=1)
    model = model.to(device, memory_format=torch.channels_last)
    resnet_fast.fuse(model, inplace=True)
    print(resnet_fast.explain(model))

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=32).to(device)
    y = torch.tensor(digits.target).to(device)

    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.02)
    steps = epochs * 15
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=5, warmup_lr_init=1e-4)
    ema = ModelEmaV3(model, decay=0.9)  # a fused copy
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=10)
    criterion = SoftTargetCrossEntropy()

    for step in range(steps):
        model.train()
        batch = torch.randint(1440, (96,), device=device)
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
    assert accuracy > 0.85, accuracy
    print(f"ok: model and average are fused, test accuracy of the average {accuracy:.3f}")


if __name__ == "__main__":
    main()
