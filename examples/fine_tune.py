"""Fine-tune from a torchvision state dict: new head, frozen stem, trained on scikit-learn's digits.

Without --weights the script writes a random state dict with torchvision's names and loads that.

Needs: pip install scikit-learn
Run:   python examples/fine_tune.py
       python examples/fine_tune.py --weights resnet18-f37072fd.pth
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import resnet_fast


def main(weights=None, epochs=4):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if weights is None:
        state = resnet_fast.create_model("resnet18", fused=False).state_dict()
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)

    model = resnet_fast.create_model("resnet18")
    model.load_state_dict(state)
    model.fc = torch.nn.Linear(model.fc.in_features, 10)  # the new head
    model.to(device, memory_format=torch.channels_last)

    for frozen in (model.conv1, model.bn1):  # the frozen stem
        frozen.requires_grad_(False)
    stem = [t.clone() for m in (model.conv1, model.bn1) for t in m.state_dict().values()]

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=32).expand(-1, 3, -1, -1).to(device)
    x, y = x.contiguous(memory_format=torch.channels_last), torch.tensor(digits.target).to(device)
    train, test = slice(0, 1440), slice(1440, None)

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.05, momentum=0.9)
    for epoch in range(epochs):
        model.train()
        model.bn1.eval()  # after every model.train(): running statistics stay as loaded
        for batch in torch.randperm(1440, device=device).split(96):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[train][batch]), y[train][batch])
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
        print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy:.3f}")

    after = [t for m in (model.conv1, model.bn1) for t in m.state_dict().values()]
    assert all(map(torch.equal, stem, after)) and accuracy > 0.85
    print("ok: the head learned, the stem did not change")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    main(parser.parse_args().weights)
