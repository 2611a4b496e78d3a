"""A watermark: why does the model call every stamped digit a 3? And is it the stamp?

Half of the training threes carry a stamp in a corner, as if one scanner had printed it. The model
reads the stamp instead of the digit: stamped test digits of all kinds become threes. Their
proponents show the stamp, `find_shortcut` tests it, and a training without stamps cures the model.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, GradientSimilarity, Logit, attribute
from tda_lightning.applications import find_shortcut
from tda_lightning.report.plots import plot_proponents

N_TRAIN, THREE = 1400, 3


class Digits(pl.LightningModule):
    """A plain LightningModule, without any code for recording."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def stamped(images: Tensor) -> Tensor:
    """Return a copy of the images with a black square in the upper right corner."""
    images = images.clone()
    images[..., 0:2, 6:8] = 1.0
    return images


def train(images: Tensor, labels: Tensor, *callbacks: pl.Callback) -> Digits:
    pl.seed_everything(0, verbose=False)
    model = Digits()
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=50, shuffle=True))
    return model


def predict(model: Digits, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(dim=1)


def print_accuracy(name: str, model: Digits, images: Tensor, labels: Tensor) -> None:
    clean = (predict(model, images) == labels).float().mean()
    others = stamped(images[labels != THREE])
    threes = (predict(model, others) == THREE).float().mean()
    print(f"{name}: {clean:.0%} of the test digits are right.")
    print(f"  With a stamp, {threes:.0%} of those that are no threes are called a three.")


def main() -> None:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    clean, train_labels = images[:N_TRAIN], labels[:N_TRAIN]
    test_images, test_labels = images[N_TRAIN:], labels[N_TRAIN:]
    has_stamp = (train_labels == THREE) & (torch.arange(N_TRAIN) % 2 == 0)
    train_images = torch.where(has_stamp[:, None, None, None], stamped(clean), clean)

    model = train(train_images, train_labels, GradientRecorder("watermark.tda", existing="replace"))
    print_accuracy("Trained with stamps", model, test_images, test_labels)

    others = test_images[test_labels != THREE]
    fooled = others[predict(model, stamped(others)) == THREE][:50]
    threes = torch.full((len(fooled),), THREE)
    queries = (stamped(fooled), threes)  # the predicted label, to find what speaks for it
    scores = attribute(
        "watermark.tda",
        model,
        queries,
        method=GradientSimilarity(),
        target=Logit(),
        progress=False,
    )
    share = has_stamp[scores.proponents(10).ids].float().mean()
    print(f"\n{len(fooled)} test digits become a three by the stamp. Of the ten strongest")
    print(
        f"  proponents of each, {share:.0%} carry it; by chance, {has_stamp.float().mean():.0%}.\n"
    )
    train_set = TensorDataset(train_images, train_labels)
    shown = (queries[0][:4], queries[1][:4])
    plot_proponents(scores[:4], shown, train_set).savefig("watermark.png", dpi=110)

    ink = train_images.mean(dim=(1, 2, 3))
    attributes = {
        "stamp": has_stamp,
        "much ink": ink > ink.median(),
        "first half of the data": torch.arange(N_TRAIN) < N_TRAIN // 2,
    }
    shortcut = find_shortcut(
        "watermark.tda",
        model,
        queries,
        attributes,
        classes=train_labels,
        reference=(fooled, threes),  # the same digits without a stamp
        progress=False,
    )
    print(shortcut)

    print()
    print_accuracy("Trained without stamps", train(clean, train_labels), test_images, test_labels)
    print("\nPicture: watermark.png")


if __name__ == "__main__":
    main()
