"""Which training digits caused a CNN's predictions? And which of their labels are wrong?

Trains a small CNN on scikit-learn's handwritten digits with one callback. A tenth of the training
labels are flipped. Then it finds the training samples behind some predictions, and the flipped
labels.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, Scores, attribute, self_influence
from tda_lightning.metrics import mislabel_recall
from tda_lightning.report.plots import plot_proponents
from tda_lightning.results import Ranking


class DigitsCNN(pl.LightningModule):
    """A plain LightningModule, without any code for recording."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.LayerNorm(64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def load(seed: int) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Return training set, test set, and a mask of the flipped training labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:1497], order[1497:]
    flipped = torch.rand(len(train), generator=generator) < 0.1
    wrong = (labels[train] + torch.randint(1, 10, train.shape, generator=generator)) % 10
    noisy = torch.where(flipped, wrong, labels[train])
    return TensorDataset(images[train], noisy), TensorDataset(images[test], labels[test]), flipped


def losses(model: nn.Module, data: TensorDataset) -> Tensor:
    """Return the loss of every sample."""
    images, labels = data.tensors
    with torch.no_grad():
        return functional.cross_entropy(model(images), labels, reduction="none")


def easiest_and_hardest(model: nn.Module, test: TensorDataset) -> Tensor:
    """Return the indices of the test digit with the lowest loss and the two with the highest."""
    order = losses(model, test).argsort()
    return torch.cat([order[:1], order[-2:]])


def print_answer(train: TensorDataset, digits: Tensor, best: Ranking, worst: Ranking) -> None:
    """Print the proponents and the opponents of every query."""
    labels = train.tensors[1]
    for row, digit in enumerate(digits.tolist()):
        print(f"\nTest digit {row}, a {digit}:")
        for name, ranking in (("proponents", best), ("opponents", worst)):
            pairs = zip(ranking.ids[row].tolist(), ranking.values[row].tolist(), strict=True)
            listed = ", ".join(f"#{i} labelled {labels[i]} ({value:+.3f})" for i, value in pairs)
            print(f"  {name:10s} {listed}")


def draw(
    path: Path, scores: Scores, train: TensorDataset, flipped: Tensor, queries: tuple[Tensor, ...]
) -> None:
    """Save a picture of each query beside its proponents and its opponents."""
    names = [
        f"{label} (flipped)" if is_flipped else str(int(label))
        for label, is_flipped in zip(train.tensors[1].tolist(), flipped.tolist(), strict=True)
    ]
    samples = list(zip(train.tensors[0], names, strict=True))
    plot_proponents(scores, queries, samples).savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=Path("digits.tda"), help="folder to record into"
    )
    parser.add_argument("--picture", type=Path, default=Path("digits.png"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    pl.seed_everything(options.seed)
    train, test, flipped = load(options.seed)
    model = DigitsCNN()
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[GradientRecorder(options.run, existing="replace")],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))

    queries = test[easiest_and_hardest(model, test)]
    scores = attribute(options.run, model, queries)
    best, worst = scores.proponents(4), scores.opponents(4)
    print_answer(train, queries[1], best, worst)
    draw(options.picture, scores, train, flipped, queries)

    influence = self_influence(options.run)
    recall = mislabel_recall(influence.values, flipped)
    baseline = mislabel_recall(losses(model, train), flipped)
    print(f"\n{int(flipped.sum())} of {len(flipped)} training labels were flipped. Among the 10 %")
    print(f"  of highest self-influence stand {recall:.1%} of them,")
    print(f"  of highest loss after training  {baseline:.1%}.")
    print(f"\nPicture: {options.picture}. To inspect the run: tda-lightning info {options.run}")


if __name__ == "__main__":
    main()
