"""Train a fused model in a Hugging Face Accelerate loop, on one device or several.

Needs: pip install accelerate scikit-learn
Run:   python examples/accelerate_loop.py
       accelerate launch examples/accelerate_loop.py --mixed-precision bf16
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import resnet_fast


def main(mixed_precision):
    set_seed(0)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    model = resnet_fast.create_model("cifar_resnet20", num_classes=10)
    model.to(memory_format=torch.channels_last)
    assert {row.state for row in resnet_fast.explain(model).rows} == {"fused"}

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    data = TensorDataset(x, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1440, 357])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3 * len(loader))
    model, optimizer, loader, test_loader, schedule = accelerator.prepare(
        model, optimizer, loader, DataLoader(test, 128), schedule
    )
    for epoch in range(3):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            images = images.to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
    model.eval()
    correct = []
    with torch.no_grad():
        for images, labels in test_loader:
            correct.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
    assert torch.cat(correct).float().mean() > 0.9
    accelerator.print("ok: trained by Accelerate, every block fused")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
    main(parser.parse_args().mixed_precision)
