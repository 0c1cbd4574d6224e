"""Fine-tune from a torchvision state dict: new head, frozen stem, trained on scikit-learn's digits.

Without a file the state dict is a random one.

Needs: pip install scikit-learn
Run:   python examples/fine_tune.py
       python examples/fine_tune.py resnet18-f37072fd.pth
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import resnet_fast


def main(weights, epochs=3):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = resnet_fast.create_model("resnet18", fused=False).state_dict()  # torchvision's names
    if weights:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    model = resnet_fast.create_model("resnet18")
    model.load_state_dict(state)
    model.fc = torch.nn.Linear(model.fc.in_features, 10)  # the new head
    model.to(device, memory_format=torch.channels_last)
    stem = torch.nn.ModuleList([model.conv1, model.bn1]).requires_grad_(False)
    before = {name: value.clone() for name, value in stem.state_dict().items()}

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=24).expand(-1, 3, -1, -1).to(device)
    x, y = x.contiguous(memory_format=torch.channels_last), torch.tensor(digits.target).to(device)

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=epochs * 15)
    for epoch in range(epochs):
        model.train()
        model.bn1.eval()  # after every model.train(): running statistics stay as loaded
        for batch in torch.randperm(1440, device=device).split(96):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x[1440:]).argmax(1) == y[1440:]).float().mean().item()
        print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy:.3f}")

    assert all(torch.equal(before[name], value) for name, value in stem.state_dict().items())
    assert accuracy > 0.8
    print("ok: the head learned, the stem did not change")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
