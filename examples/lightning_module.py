"""Train a fused model by Lightning's Trainer; `self.model` is an ordinary nn.Module to it.

Needs: pip install lightning scikit-learn
Run:   python examples/lightning_module.py
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import resnet_fast


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        model = resnet_fast.create_model("cifar_resnet20", num_classes=10)
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.model(x.to(memory_format=torch.channels_last))

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main():
    lightning.seed_everything(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    data = TensorDataset(x, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1440, 357])
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(classifier, DataLoader(train, 64, shuffle=True, drop_last=True))
    (result,) = trainer.test(classifier, DataLoader(test, 357))

    assert {row.state for row in resnet_fast.explain(classifier.model).rows} == {"fused"}
    assert result["accuracy"] > 0.9
    print("ok: trained by Lightning, every block fused")


if __name__ == "__main__":
    main()
