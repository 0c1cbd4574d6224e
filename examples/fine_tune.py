"""Fine-tune a ResNet-18 on scikit-learn's digits: new head, frozen stem.

Without --pretrained the weights are random, and nothing is downloaded.

Needs: pip install scikit-learn
Run:   python examples/fine_tune.py
       python examples/fine_tune.py --pretrained
"""

import sys

import torch

import resnet_fast
from resnet_fast.training import Recipe, fit, load_data


def main(pretrained):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data("digits", size=24)
    model = resnet_fast.create_model("resnet18", pretrained=pretrained, num_classes=10)
    stem = torch.nn.ModuleList([model.conv1, model.bn1])
    before = {name: value.clone() for name, value in stem.state_dict().items()}

    recipe = Recipe(epochs=4, batch_size=32, lr=0.02, freeze=("stem",))
    history = fit(model, data, recipe, device=device, callbacks={"epoch": print})

    for name, value in stem.state_dict().items():
        assert torch.equal(before[name], value.cpu())
    assert history.epochs[-1]["test_accuracy"] > 0.8
    print("ok: the head learned, the stem did not change")


if __name__ == "__main__":
    main("--pretrained" in sys.argv[1:])
